"""Pipeline: a recipe in, a checkpoint or a run directory out."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.allocation import RankPlan, Rule, plan, summarise
from eckart.calibration import calibrate_by_block
from eckart.card import write_card
from eckart.compression import CompressionReport, compress
from eckart.corpora import Tokens, read_text, sample_documents, sample_windows
from eckart.evals.result import EvalResult
from eckart.evals.tasks import Task, default_length, evaluate, find_task
from eckart.lowrank import build_method
from eckart.models.loading import check_free, load_model, load_tokenizer, own_memory, save
from eckart.models.sites import find_sites
from eckart.recipe import Recipe, load_recipe
from eckart.tracking import Track, silent


@dataclass(frozen=True)
class How:
    """Where and how fast a run goes. None of it changes a number beyond rounding.

    Attributes:
        device: of the model while it is calibrated, factored and evaluated.
        batch_size: calibration rows at a time.
        cache: folder for moments; None keeps none.
        data: folder with local copies of known corpora; None asks the hub.
        track: shows progress.
    """

    device: str = "cpu"
    batch_size: int = 8
    cache: Path | None = None
    data: Path | None = None
    track: Track = silent


@dataclass(frozen=True)
class Outcome:
    """What `make_checkpoint` did: the recipe with every default filled in, the plan, the report, the seconds."""

    recipe: Recipe
    plan: RankPlan
    summary: dict[str, Any]
    report: CompressionReport
    seconds: dict[str, float]


def make_checkpoint(recipe: Recipe, out: Path, how: How, *, force: bool = False) -> Outcome:
    """Compress the recipe's model into the checkpoint directory `out`.

    The directory holds the model, the tokenizer, README.md, plan.json, recipe.yaml and compression.json. It appears
    whole or not at all.

    Raises:
        FileExistsError: `out` exists and `force` is not given; nothing is read or computed then.
        ValueError, UnsupportedModelError, DecompositionError: as the stages raise them.
    """
    check_free(out, force=force)
    start = time.perf_counter()
    model = load_model(recipe.model, dtype=recipe.dtype, device=how.device)
    own_memory(model)
    tokenizer = load_tokenizer(recipe.model)
    seconds = {"load": time.perf_counter() - start}
    ranks = make_plan(model, recipe)
    summary = summarise(ranks, model)
    method = build_method(recipe.method.name, recipe.method.options)
    blocks = None
    if method.needs:
        recipe = resolve(recipe, model, tokenizer)
        blocks = calibrate_by_block(
            model,
            make_tokens(recipe, model, tokenizer, how.data),
            method,
            sites=[site for site in ranks.sites if ranks.rank(site) is not None],
            cache=how.cache,
            batch_size=how.batch_size,
            track=how.track,
        )
    noted = recipe.model_dump(exclude_none=True, exclude={"evaluate"})
    report = compress(model, method, ranks, blocks, recipe=noted, track=how.track)
    seconds |= report.seconds
    start = time.perf_counter()
    facts = {**summary, **report.to_dict()}
    files = {
        "README.md": write_card(recipe, facts),
        "plan.json": ranks.to_json(),
        "recipe.yaml": recipe.to_yaml(),
        "compression.json": json.dumps(facts, indent=2),
    }
    save(model, out, tokenizer, recipe=noted, files=files, force=force)
    seconds["save"] = time.perf_counter() - start
    return Outcome(recipe, ranks, summary, report, seconds)


def run(recipe: Recipe, directory: Path, how: How, *, force: bool = False) -> list[tuple[EvalResult, EvalResult]]:
    """Carry out a whole recipe in a run directory, and go on where a killed run stopped.

    The directory gets recipe.yaml (as given), environment.json, model/ (see `make_checkpoint`), evals/<task>.json of
    the compressed model and evals/<task>.dense.json of the one it was made from. What is there already is not done
    again.

    Returns:
        (dense, compressed) results of every task.

    Raises:
        FileExistsError: the directory holds a run of another recipe and `force` is not given.
        ValueError: as the stages raise it; an unknown task is found before anything runs.
    """
    tasks = [Task(item.task, item.split, item.column, item.length, item.limit) for item in recipe.evaluate]
    for task in tasks:
        find_task(task.name)
    written = directory / "recipe.yaml"
    same = written.is_file() and written.read_text(encoding="utf-8") == recipe.to_yaml()
    if not same:
        if directory.exists() and any(directory.iterdir()) and not force:
            raise FileExistsError(
                f"{directory} holds something else than a run of this recipe; give another place, or --force"
            )
        directory.mkdir(parents=True, exist_ok=True)
        written.write_text(recipe.to_yaml(), encoding="utf-8")
    (directory / "environment.json").write_text(json.dumps(environment(), indent=2), encoding="utf-8")
    evals = directory / "evals"
    dense = _evaluate_missing(recipe.model, recipe.dtype, tasks, evals, ".dense", how, fresh=not same)
    checkpoint = directory / "model"
    made = not same or not (checkpoint / "config.json").is_file()
    if made:
        make_checkpoint(recipe, checkpoint, how, force=force or same)
    compressed = _evaluate_missing(checkpoint, "auto", tasks, evals, "", how, fresh=made)
    results = list(zip(dense, compressed, strict=True))
    facts = json.loads((checkpoint / "compression.json").read_text(encoding="utf-8"))
    card = write_card(load_recipe(checkpoint / "recipe.yaml"), facts, results)
    (checkpoint / "README.md").write_text(card, encoding="utf-8")
    return results


def _evaluate_missing(
    model: str | Path, dtype: str, tasks: Sequence[Task], folder: Path, suffix: str, how: How, *, fresh: bool
) -> list[EvalResult]:
    """Results of all tasks; those whose file is there are read (unless `fresh`), the others run and written."""
    loaded: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None = None
    results = []
    for task in tasks:
        file = folder / f"{task.slug}{suffix}.json"
        if file.is_file() and not fresh:
            results.append(EvalResult.from_json(file.read_text(encoding="utf-8")))
            continue
        if loaded is None:
            loaded = load_model(model, dtype=dtype, device=how.device), load_tokenizer(model)
        results += evaluate(*loaded, [task], data=how.data, track=how.track)
        write_result(results[-1], file)
    return results


def write_result(result: EvalResult, file: Path) -> None:
    """Write a result; the file appears whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".partial")
    partial.write_text(result.to_json(), encoding="utf-8")
    partial.rename(file)


def make_plan(model: PreTrainedModel, recipe: Recipe) -> RankPlan:
    """The recipe's allocation on this model."""
    if recipe.plan is not None:
        path = Path(recipe.plan)
        if not path.is_file():
            raise ValueError(f"no plan at {path}")
        return RankPlan.from_json(path.read_text(encoding="utf-8"), find_sites(model))
    if recipe.rules is not None:
        rules = [Rule(r.keep, tuple(r.include), tuple(r.exclude), r.blocks) for r in recipe.rules]
        return plan(model, rules=rules, rank_multiple=recipe.rank_multiple)
    return plan(model, recipe.keep, rank_multiple=recipe.rank_multiple)


def make_tokens(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Path | None
) -> Tokens:
    """The calibration tokens of a resolved recipe."""
    section = resolve(recipe, model, tokenizer).calibration
    assert section.length is not None
    text = read_text(section.corpus, split=section.split, data=data, column=section.column)
    sample = sample_windows if section.cut == "windows" else sample_documents
    return sample(text, tokenizer, samples=section.samples, length=section.length, seed=section.seed)


def resolve(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """The recipe with the defaults that depend on the model filled in: calibration length and cut.

    A model that does not generate and whose tokenizer has a mask token is an encoder, and reads whole documents.
    """
    section = recipe.calibration
    decoder = model.can_generate() or tokenizer.mask_token_id is None
    return recipe.model_copy(
        update={
            "calibration": section.model_copy(
                update={
                    "length": section.length or default_length(model),
                    "cut": section.cut or ("windows" if decoder else "documents"),
                }
            )
        }
    )


def environment() -> dict[str, Any]:
    """Versions and machine, as far as they may move a number."""
    packages = ("eckart", "torch", "transformers", "tokenizers", "safetensors", "datasets", "numpy", "scipy")
    return {
        "python": platform.python_version(),
        "packages": {name: version(name) for name in packages},
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }
