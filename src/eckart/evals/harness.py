"""lm-evaluation-harness: its tasks, prompts and metrics on a loaded model, from the hub or from local files."""

from __future__ import annotations

import difflib
import functools
import importlib.util
import math
import os
import random
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.evals.harness_model import make_scorer
from eckart.evals.harness_tasks import (
    LOCAL_TASKS,
    SPLIT_SEED,
    SPLITS,
    LocalTask,
    find_local_task,
    local_names,
    split_rows,
    write_definitions,
)
from eckart.evals.result import TRAITS, Better, EvalResult, Score
from eckart.evals.windows import check_causal, check_evaluating
from eckart.support.progress import Track, silent
from eckart.support.quiet import quiet


def run_harness(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    split: str = "test",
    shots: int | None = None,
    seed: int = 0,
    limit: int | None = None,
    data: Path | None = None,
    batch_size: int = 8,
    task: str | None = None,
    track: Track = silent,
) -> EvalResult:
    """What lm-evaluation-harness finds for a causal language model on one of its tasks.

    Prompts, metrics and aggregation are those of the installed harness, and so are the numbers. Chat templates are
    not applied. Standard errors are the harness's own formula for means (of a group: pooled, or of the plain mean
    over members, as the group aggregates); of lambada's perplexity by the delta method; others have none, as nothing
    is bootstrapped.

    Args:
        name: the harness's name of a task or of a group with an overall value: "piqa", "mmlu", "mmlu_anatomy".
        split: "test", the documents that the harness evaluates on; or one of SFSD's "sfsd-search", "sfsd-evaluation"
            (see `split_rows`). The split does not depend on `seed`, so a search and an evaluation never share
            documents.
        shots: few-shot examples in each prompt; None is 5 for MMLU and the harness's default, mostly 0, for others.
        seed: of the draw of few-shot examples, and of whatever else a task draws.
        limit: documents read at most, of each member of a group, from the start of the split.
        data: folder with local copies, DATA/<task>/...; see `harness_tasks.LOCAL_TASKS`. No network is used then.
            None has the harness read its data sets from the hub.
        task: the result's name; None is "lm-eval:<name>".

    Returns:
        metric = "acc" where the task has it, else its first metric; further metrics ("acc_norm", "perplexity") and
        the members of a group are in `scores`. examples = the metric of each document in order, those of a group
        member after member in the harness's order. details: "ids" = index of each document ("member/index" in a
        group), "answers" = index of the choice with the greatest likelihood (before length normalisation), or
        whether a continuation is the greedy one, or the text generated; "truncated" = requests whose prompt was cut
        at its start to fit the model's positions.

    Raises:
        ValueError: lm_eval is not installed; an unknown name (the message has the nearest known); a model that is
            not causal or is in training mode; a tokenizer of another model; a missing, empty or ill-formed file; a
            likelihood that is not finite (the message names task and document); a continuation longer than the
            model's positions; more examples than there are; a hub that cannot be reached.
    """
    _check_installed()
    check_causal(model, f"lm-eval:{name}")
    check_evaluating(model)
    if split not in SPLITS:
        raise ValueError(f"{name}: no split {split!r}; there are {', '.join(SPLITS)}")
    for argument, value, least in (("shots", shots, 0), ("limit", limit, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise ValueError(f"{name}: {argument} {value} is less than {least}")
    with _contained(seed, model.device):
        from lm_eval.evaluator import evaluate

        row = find_local_task(name, _stock())
        shots = row.shots if shots is None and row is not None else shots
        loaded, sources = _load(name, row, data, shots or 0)
        _set_shots(loaded["tasks"], shots, seed)
        rows = _rows(loaded["tasks"], split, limit)
        scorer = make_scorer(model, tokenizer, batch_size, rows, name, track)
        try:
            with np.errstate(all="ignore"):  # what is not a number is refused below
                outputs = evaluate(scorer, loaded, limit=None if rows else limit, samples=rows, bootstrap_iters=0)
        except (AssertionError, OverflowError) as error:
            raise ValueError(f"{name}: the harness gave up ({type(error).__name__}: {error})") from error
        tables = _with_errors(outputs, loaded)
    settings = {
        **_describe(outputs, name, list(loaded["tasks"])),
        "seed": seed,
        "batch_size": batch_size,
        "split": split,
        **({} if split == "test" else {"split_seed": SPLIT_SEED}),
        "limit": limit,
        **sources,
        "chat_template": None,
        "max_length": scorer.max_length,
        **({"note": row.note} if row is not None and row.note and data is not None else {}),
    }
    return _result(task or f"lm-eval:{name}", name, outputs, tables, loaded, settings, scorer.truncated)


def harness_direction(name: str, *, data: Path | None = None) -> Better | None:
    """Which way the main metric of a task is good, as the harness defines it; None where its members disagree.

    Args:
        name, data: as in `run_harness`. The documents are read, and no model is.

    Raises:
        ValueError: lm_eval is not installed, an unknown name, a missing or ill-formed file, a hub out of reach.
    """
    _check_installed()
    with _contained(0, torch.device("cpu")):
        row = find_local_task(name, _stock())
        loaded, _ = _load(name, row, data, 0)
        group = loaded.get("groups", {}).get(name)
        if group is not None:
            metrics = [each.metric for each in group.aggregate_metric_list]
        else:
            metrics = list(loaded["tasks"][name].aggregation())
        return _direction(loaded, "acc" if "acc" in metrics else metrics[0])


def _direction(loaded: Any, metric: str) -> Better | None:
    """Which way a metric is good by the definitions of all tasks; None where they disagree or do not say."""
    directions = {definition.higher_is_better().get(metric) for definition in loaded["tasks"].values()}
    higher = directions.pop() if len(directions) == 1 else None
    return None if higher is None else "higher" if higher else "lower"


def _check_installed() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm_eval is not installed: pip install 'eckart[tasks]'")


def _load(name: str, row: LocalTask | None, data: Path | None, shots: int) -> tuple[Any, dict[str, str]]:
    """The task or group with its documents, and where they came from."""
    if data is None:
        return _load_from_hub(name, row), {"documents": "hub"}
    return _load_from_files(name, row, Path(data), shots)


@contextmanager
def _contained(seed: int, device: torch.device) -> Iterator[None]:
    """Seeds everything and quietens the harness; afterwards all is as it was, the environment included."""
    environment, state, numpy_state = dict(os.environ), random.getstate(), np.random.get_state()
    import datasets
    import lm_eval.api.task as building  # sets environment variables

    bars, tqdm = datasets.are_progress_bars_disabled(), building.tqdm
    devices = list(range(torch.cuda.device_count())) if device.type == "cuda" else []
    # The second logger warns of prompts past the model's positions, which the harness cuts and the result counts.
    with torch.random.fork_rng(devices=devices), quiet("lm_eval", "transformers.tokenization_utils_base"):
        try:
            datasets.disable_progress_bars()
            building.tqdm = functools.partial(tqdm, disable=True)  # it has no switch of its own
            random.seed(seed)
            np.random.seed(seed)
            torch.manual_seed(seed)
            yield
        finally:
            building.tqdm = tqdm
            if not bars:
                datasets.enable_progress_bars()
            random.setstate(state)
            np.random.set_state(numpy_state)
            for key in os.environ.keys() - environment.keys():
                del os.environ[key]
            os.environ.update(environment)


def _stock() -> Path:
    """The harness's folder of task definitions."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def _load_from_hub(name: str, row: LocalTask | None) -> Any:
    from lm_eval.tasks import TaskManager

    if row is None:
        manager = TaskManager()
    else:  # reading all the harness's definitions takes seconds, those of one task no time
        stock = _stock() / row.stock
        manager = TaskManager(include_path=stock if stock.is_dir() else stock.parent, include_defaults=False)
    if name not in manager.all_tasks:
        raise ValueError(_unknown(name, manager.all_tasks))
    entry = manager.task_index[name]
    if name in manager.all_tags or (name in manager.all_groups and not entry.cfg.get("aggregate_metric_list")):
        members = sorted(entry.tags) or [str(member) for member in entry.cfg["task"]]
        raise ValueError(f"{name!r} stands for several tasks without an overall value; name one: {', '.join(members)}")
    try:
        return manager.load([name])
    except Exception as error:
        raise ValueError(
            f"{name}: the harness did not get its data from the hub ({type(error).__name__}: {error}); "
            "give a folder with a local copy"
        ) from error


def _load_from_files(name: str, row: LocalTask | None, data: Path, shots: int) -> tuple[Any, dict[str, str]]:
    from lm_eval.tasks import TaskManager

    if row is None:
        names = TaskManager().all_tasks
        if name not in names:
            raise ValueError(_unknown(name, names))
        raise ValueError(
            f"task {name!r} is read from the hub only: leave out the data folder; "
            f"with local files there are {', '.join(LOCAL_TASKS)} and members of the groups"
        )
    with tempfile.TemporaryDirectory() as folder:
        try:
            sources = write_definitions(row, _stock(), data, Path(folder), shots=shots)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        return TaskManager(include_path=folder, include_defaults=False).load([name]), sources


def _unknown(name: str, names: Sequence[str]) -> str:
    local = local_names(_stock())
    near = difflib.get_close_matches(name, dict.fromkeys([*local, *names]), n=3)
    if not near:
        return f"unknown task {name!r}; with local files there are {', '.join(LOCAL_TASKS)} and members of the groups"
    hints = (f"{other!r} (local files or the hub)" if other in local else f"{other!r} (hub only)" for other in near)
    return f"unknown task {name!r}; did you mean {' or '.join(hints)}?"


def _set_shots(tasks: dict[str, Any], shots: int | None, seed: int) -> None:
    """Sets the number of few-shot examples, in place, as the harness does, but refuses what it would pass over."""
    for name, task in tasks.items():
        fixed = task.get_config("num_fewshot")
        if fixed == 0 and shots:
            raise ValueError(f"{name}: {shots} examples asked for; the harness defines this task without any")
        task.set_config(key="num_fewshot", value=shots if shots is not None else fixed or 0)
        there = len(task.sampler.df) if hasattr(task, "sampler") else None
        if there is not None and there < task.get_config("num_fewshot"):
            raise ValueError(f"{name}: {task.get_config('num_fewshot')} examples asked for; there are {there}")
        task.set_fewshot_seed(seed=seed)


def _rows(tasks: dict[str, Any], split: str, limit: int | None) -> dict[str, list[int]] | None:
    """The documents to read of each task, ascending as the harness wants them; None leaves that to the limit."""
    if split == "test":
        return None
    rows = {}
    for name, task in tasks.items():
        try:
            rows[name] = split_rows(len(task.eval_docs), split)[:limit]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if task.get_config("num_fewshot") and hasattr(task, "sampler") and _same_rows(task.sampler.df, task.eval_docs):
            raise ValueError(
                f"{name}: its examples are drawn from the documents themselves, so that what is divided for {split} "
                "would be read all the same: ask for 0 shots"
            )
    return rows


def _same_rows(one: Any, other: Any) -> bool:
    """Whether two sets of documents are one split of the data; its length and its first row tell."""
    return len(one) == len(other) > 0 and one[0] == other[0]


def _with_errors(outputs: Any, loaded: Any) -> dict[str, dict[str, Any]]:
    """{task or group: its table of values}, with the standard errors that have a formula.

    The harness itself gives errors of means only together with bootstrapped ones of other metrics.
    """
    from lm_eval.api.metrics import mean, mean_stderr, perplexity

    tables: dict[str, dict[str, Any]] = {name: dict(table) for name, table in outputs["results"].items()}
    for name, task in loaded["tasks"].items():
        for key in _keys(tables[name]):
            metric, _, which = key.partition(",")
            kind, values = task.aggregation().get(metric), _values(outputs["samples"][name], key)
            if kind not in (mean, perplexity) or len(values) < 2:
                continue
            error = mean_stderr(values)
            # perplexity = exp(-mean): its error is, to first order, itself times that of the mean.
            tables[name][f"{metric}_stderr,{which}"] = error if kind is mean else error * tables[name][key]
    for name, group in loaded.get("groups", {}).items():
        tables[name] = group.aggregate(tables)
    return tables


def _keys(table: dict[str, Any]) -> list[str]:
    """The "metric,filter" keys of a table that hold numbers, the main one first: "acc", or what comes first."""
    keys = [
        key
        for key, value in table.items()
        if "," in key and "_stderr," not in key and isinstance(value, int | float | np.number)
    ]
    return sorted(keys, key=lambda key: not key.startswith("acc,"))


def _values(samples: list[dict[str, Any]], key: str) -> list[Any]:
    """The value of "metric,filter" for each document."""
    metric, _, which = key.partition(",")
    return [sample[metric] for sample in samples if sample["filter"] == which and metric in sample]


def _score(table: dict[str, Any], key: str) -> Score:
    metric, _, which = key.partition(",")
    error: Any = table.get(f"{metric}_stderr,{which}")  # "N/A" or missing where there is none
    number = isinstance(error, int | float | np.number)
    return Score(float(table[key]), float(error) if number else None, int(table["sample_len"]))


def _label(key: str) -> str:
    """ "acc,none" is the metric "acc"; other filters stay in the name."""
    return key.removesuffix(",none")


def _describe(outputs: Any, name: str, members: list[str]) -> dict[str, Any]:
    from lm_eval import __version__

    shots = {member: outputs["n-shot"][member] for member in members}
    same = set(shots.values())
    return {
        "harness": f"lm_eval {__version__}",
        "task_version": outputs["versions"][name],
        "shots": same.pop() if len(same) == 1 else shots,
    }


def _result(
    task: str,
    name: str,
    outputs: Any,
    tables: dict[str, dict[str, Any]],
    loaded: Any,
    settings: dict[str, Any],
    truncated: int,
) -> EvalResult:
    table = tables[name]
    main = _keys(table)[0]
    scores = {_label(key): _score(table, key) for key in _keys(table)[1:]}
    for other, numbers in tables.items():
        if other != name and main in _keys(numbers):
            scores[other] = _score(numbers, main)
    examples: list[float] = []
    ids: list[int | str] = []
    answers: list[int | str] = []
    for member, definition in loaded["tasks"].items():
        samples = [sample for sample in outputs["samples"][member] if sample["filter"] == main.partition(",")[2]]
        ids += [sample["doc_id"] if member == name else f"{member}/{sample['doc_id']}" for sample in samples]
        answers += [answer for sample in samples if (answer := _answer(definition, sample)) is not None]
        values = _values(samples, main)
        for sample, value in zip(samples, values, strict=False):
            if isinstance(value, float | np.floating) and math.isnan(value):
                raise ValueError(
                    f"{member}: {_label(main)} of document {sample['doc_id']} is not a number; "
                    "every choice is too unlikely, the model is broken"
                )
        if all(isinstance(value, int | float | np.number) for value in values):
            examples += [float(value) for value in values]
    score = _score(table, main)
    return EvalResult(
        task=task,
        metric=_label(main),
        value=score.value,
        stderr=score.stderr,
        n=score.n,
        better=_direction(loaded, main.partition(",")[0]),
        traits=TRAITS["lm-eval"],
        settings=settings,
        examples=examples if len(examples) == len(ids) else [],
        scores=scores,
        details={
            "ids": ids,
            **({"answers": answers} if len(answers) == len(ids) else {}),
            "truncated": truncated,
        },
    )


def _answer(task: Any, sample: dict[str, Any]) -> int | str | None:
    """What the model answered: a choice, whether it would have gone on as the text does, or what it wrote."""
    responses = sample["filtered_resps"]
    if task.OUTPUT_TYPE == "multiple_choice":
        likelihoods = [likelihood for likelihood, _ in responses]
        if "acc_mutual_info" in task.aggregation():
            likelihoods = likelihoods[: len(likelihoods) // 2]  # the other half are without the prompt
        return int(np.argmax(likelihoods))
    if task.OUTPUT_TYPE == "loglikelihood":
        return int(responses[0][1])
    return str(responses[0]) if task.OUTPUT_TYPE == "generate_until" else None
