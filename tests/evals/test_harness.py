"""lm-evaluation-harness on loaded models: its numbers by hand, groups, what stays as it was, the hub."""

from __future__ import annotations

import logging
import math
import os
import random
import socket
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from eckart.allocation.search.criteria import search_criterion
from eckart.allocation.search.surgical import Tolerance, search
from eckart.compression.spectra import spectra_on_demand
from eckart.evals.harness import harness_direction
from eckart.evals.harness_tasks import LOCAL_TASKS
from eckart.evals.result import EvalResult
from eckart.lowrank import build_method
from eckart.models.sites import find_sites
from tiny import POSITIONS, tiny_model, tiny_tokenizer

from .harness_files import FILES, MEMBERS, ROWS, STOCK, corpus, likelihood, low_rank, run, words, write

# Numbers


@pytest.mark.parametrize("make", [lambda: tiny_model("llama"), lambda: tiny_model("gpt2"), low_rank])
def test_accuracy_by_hand(make: Callable[[], Any], tmp_path: Path) -> None:
    model, rows = make(), [ROWS["piqa"](n) for n in range(12)]
    result = run(corpus(tmp_path, "piqa", 12), "piqa", model=model)
    likelihoods = [
        [likelihood(model, f"Question: {row['question']}\nAnswer:", choice)[0] for choice in row["choices"]]
        for row in rows
    ]
    answers = [int(first < second) for first, second in likelihoods]
    normed = [
        int(np.argmax([value / len(choice) for value, choice in zip(pair, row["choices"], strict=True)]))
        for pair, row in zip(likelihoods, rows, strict=True)
    ]
    right = [float(answer == row["answer"]) for answer, row in zip(answers, rows, strict=True)]
    assert 0 < sum(right) < 12
    assert result.details == {"ids": list(range(12)), "answers": answers, "truncated": 0}
    assert result.examples == right
    value = sum(right) / 12
    assert (result.task, result.metric, result.value, result.n, result.better) == (
        "lm-eval:piqa",
        "acc",
        value,
        12,
        "higher",
    )
    assert result.stderr == pytest.approx(math.sqrt(value * (1 - value) / 11))
    value = sum(answer == row["answer"] for answer, row in zip(normed, rows, strict=True)) / 12
    assert result.scores["acc_norm"].value == value
    assert result.scores["acc_norm"].stderr == pytest.approx(math.sqrt(value * (1 - value) / 11))
    assert result.settings == {
        "harness": f"lm_eval {version('lm_eval')}",
        "task_version": 1.0,
        "shots": 0,
        "seed": 0,
        "batch_size": 8,
        "split": "test",
        "limit": None,
        "documents": "piqa/dev.jsonl",
        "chat_template": None,
        "max_length": POSITIONS,
    }
    assert EvalResult.from_json(result.to_json()) == result


def test_lambada_by_hand(tmp_path: Path) -> None:
    model, rows = tiny_model("llama"), [ROWS["lambada_openai"](n)["text"] for n in range(8)]
    # One text that goes on as the model would.
    context = words(99, 5)
    best = int(model(input_ids=torch.tensor([tiny_tokenizer()(context)["input_ids"]])).logits[0, -1].argmax())
    rows.append(f"{context} {tiny_tokenizer().convert_ids_to_tokens(best)}")
    write(tmp_path / "lambada/test.jsonl", ({"text": text} for text in rows))
    result = run(tmp_path, "lambada_openai", task="x")
    by_hand = [likelihood(model, *text.rsplit(" ", 1)) for text in rows]
    assert by_hand[-1][1]
    assert result.details["answers"] == [int(greedy) for _, greedy in by_hand]
    assert result.examples == [float(greedy) for _, greedy in by_hand]
    assert (result.task, result.metric, result.value) == ("x", "acc", sum(result.examples) / 9)
    logs = [value for value, _ in by_hand]
    perplexity = result.scores["perplexity"]
    assert perplexity.value == pytest.approx(math.exp(-sum(logs) / 9), rel=1e-5)
    assert perplexity.stderr == pytest.approx(perplexity.value * np.std(logs, ddof=1) / 3, rel=1e-4)


def test_a_continuation_of_nothing_starts_at_the_begin_token(tmp_path: Path) -> None:
    model = tiny_model("llama")
    result = run(corpus(tmp_path, "blimp", 10), "blimp_adjunct_island", model=model)
    by_hand = []
    for row in (ROWS["blimp"](n) for n in range(10)):
        good, bad = (likelihood(model, "", row[key])[0] for key in ("good", "bad"))
        by_hand.append(float(good > bad))
    assert result.examples == by_hand
    assert 0 < sum(by_hand) < 10


def test_truthful_mass_by_hand(tmp_path: Path) -> None:
    model, rows = tiny_model("llama", max_position_embeddings=512), [ROWS["truthfulqa_mc2"](n) for n in range(3)]
    result = run(corpus(tmp_path, "truthfulqa_mc2", 3), "truthfulqa_mc2", model=model)
    import lm_eval.utils

    template = yaml.safe_load((STOCK / "truthfulqa/truthfulqa_mc1.yaml").read_text())["doc_to_text"]
    for row, example, answer in zip(rows, result.examples, result.details["answers"], strict=True):
        context = lm_eval.utils.apply_template(template, row)
        mass = [math.exp(likelihood(model, context, choice)[0]) for choice in row["mc2_choices"]]
        true = sum(part for part, label in zip(mass, row["mc2_labels"], strict=True) if label)
        assert example == pytest.approx(true / sum(mass), rel=1e-4)
        assert answer == int(np.argmax(mass))
    assert result.value == pytest.approx(sum(result.examples) / 3)


# Groups


def family(data: Path, name: str, sizes: Callable[[int], int]) -> list[tuple[str, int]]:
    """Local files of every member of a family; [(member, its size)]."""
    names = ("mmlu_*", "subject") if name == "mmlu" else ("[!_]*", "uid")
    members = [
        path.stem.removeprefix("mmlu_") for path in sorted((STOCK / LOCAL_TASKS[name].stock).glob(f"{names[0]}.yaml"))
    ]
    counted = [(member, sizes(number)) for number, member in enumerate(members)]
    rows = [
        {**ROWS[name](n + number), names[1]: member}
        for number, (member, size) in enumerate(counted)
        for n in range(size)
    ]
    write(data / FILES[name], rows)
    return counted


def test_mmlu_is_weighted_by_size(tmp_path: Path) -> None:
    members = family(tmp_path, "mmlu", lambda number: 2 + number % 2)
    assert len(members) == 57
    result = run(tmp_path, "mmlu", shots=0)
    size = sum(size for _, size in members)
    assert result.n == len(result.examples) == len(result.details["answers"]) == size
    assert result.value == pytest.approx(sum(result.examples) / size, rel=1e-12)
    assert (result.metric, result.better, result.settings["task_version"]) == ("acc", "higher", "2")
    assert harness_direction("mmlu", data=tmp_path) == "higher"
    assert set(result.scores) == {f"mmlu_{member}" for member, _ in members} | {
        "mmlu_stem",
        "mmlu_other",
        "mmlu_social_sciences",
        "mmlu_humanities",
    }
    groups: dict[str, list[float]] = {}
    for name, example in zip(result.details["ids"], result.examples, strict=True):
        groups.setdefault(name.partition("/")[0], []).append(example)
    assert {name: len(values) for name, values in groups.items()} == {f"mmlu_{name}": n for name, n in members}
    for name, values in groups.items():
        assert result.scores[name].value == pytest.approx(sum(values) / len(values))
        assert result.scores[name].n == len(values)
    within = sum(sum((v - sum(vs) / len(vs)) ** 2 for v in vs) for vs in groups.values())
    assert result.stderr == pytest.approx(math.sqrt(within / (size - 57) / size))
    assert next(iter(groups)) == "mmlu_abstract_algebra"
    stem = run(tmp_path, "mmlu_stem", shots=0)
    assert stem.value == result.scores["mmlu_stem"].value
    assert stem.n == result.scores["mmlu_stem"].n < size


def test_blimp_is_the_plain_mean_over_paradigms(tmp_path: Path) -> None:
    members = family(tmp_path, "blimp", lambda number: 1 + number % 3)
    assert len(members) == 67
    result = run(tmp_path, "blimp", limit=2)
    values = [result.scores[f"blimp_{member}"].value for member, _ in members]
    assert result.value == pytest.approx(sum(values) / 67, rel=1e-12)
    assert result.value != pytest.approx(sum(result.examples) / result.n, rel=1e-6)
    assert result.n == sum(min(2, size) for _, size in members)
    # A paradigm with one document has no standard error, so the harness gives the mean none.
    assert result.stderr is None
    assert result.scores["blimp_causative"].stderr is not None or result.scores["blimp_causative"].n == 1


def test_a_group_with_a_member_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test\.jsonl has no row whose subject is 'abstract_algebra'"):
        run(corpus(tmp_path, "mmlu"), "mmlu", shots=0)


# What stays as it was


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("the network was asked")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("name", ["hellaswag", "mmlu_anatomy"])
def test_local_files_need_no_network(name: str, tmp_path: Path) -> None:
    assert run(corpus(tmp_path, name.partition("_")[0]), name).n == 6


def test_nothing_is_left_changed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import datasets

    data, model = corpus(tmp_path, "arc_easy"), tiny_model("llama")
    tokenizer = tiny_tokenizer(pad_token=None)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random.seed(3)
    np.random.seed(3)
    torch.manual_seed(3)
    logger = logging.getLogger("lm_eval")
    before = (dict(os.environ), logger.level, datasets.are_progress_bars_disabled(), random.getstate())
    draws = (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index]
    run(data, "arc_easy", model=model, tokenizer=tokenizer, shots=2)
    assert (dict(os.environ), logger.level, datasets.are_progress_bars_disabled(), random.getstate()) == before
    assert (np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == draws  # type: ignore[index]
    assert tokenizer.pad_token is None
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())
    assert not model._forward_hooks
    assert capfd.readouterr() == ("", "")


def test_progress_is_a_step_a_request(tmp_path: Path) -> None:
    seen: list[Any] = []

    def track(items: Iterable[Any], description: str, total: int) -> Iterator[Any]:
        seen.append((description, total))
        for item in items:
            yield item
            seen.append(item)

    run(corpus(tmp_path, "piqa"), "piqa", track=track)
    assert seen == [("piqa", 12), *range(12)]


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_change_nothing(batch_size: int, tmp_path: Path) -> None:
    data = corpus(tmp_path, "hellaswag")
    whole, cut = run(data, "hellaswag"), run(data, "hellaswag", batch_size=batch_size)
    assert cut.settings == {**whole.settings, "batch_size": batch_size}
    assert (cut.examples, cut.details) == (whole.examples, whole.details)


def test_cut_prompts_are_counted(tmp_path: Path) -> None:
    short = {**ROWS["piqa"](0), "choices": ["w1", "w2 w3"]}
    # "Question:", the words, "Answer:" and the choice but for its last token have to fit.
    texts = [words(1, POSITIONS - 2), words(1, POSITIONS - 3), words(1, POSITIONS - 1)]
    write(tmp_path / "piqa/dev.jsonl", [{**short, "question": text} for text in texts])
    assert run(tmp_path, "piqa").details["truncated"] == 1 + 0 + 2


# The hub


@pytest.fixture
def hub(index: None, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """{path on the hub: data set}, in place of the network."""
    import datasets

    sets: dict[str, Any] = {}

    def load(path: str, name: str | None = None, **_options: Any) -> Any:
        if path not in sets:
            raise ConnectionError(f"cannot reach {path}")
        return sets[path]

    monkeypatch.setattr(datasets, "load_dataset", load)
    return sets


def test_the_harness_reads_the_hub(hub: dict[str, Any], tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    rows = [LOCAL_TASKS["piqa"].convert(ROWS["piqa"](n)) for n in range(6)]
    hub["baber/piqa"] = DatasetDict(dict.fromkeys(("train", "validation"), Dataset.from_list(rows)))
    from_hub, local = run(None, "piqa", limit=5), run(corpus(tmp_path, "piqa"), "piqa", limit=5)
    assert (from_hub.value, from_hub.examples, from_hub.scores, from_hub.details) == (
        local.value,
        local.examples,
        local.scores,
        local.details,
    )
    assert from_hub.settings == {**local.settings, "documents": "hub"}


def test_other_tasks_of_the_hub(hub: dict[str, Any]) -> None:
    """Generated text, rolling likelihoods, unknown aggregates: nothing of the kind has local files."""
    from datasets import Dataset, DatasetDict

    rows = [{"page": words(n, 9)} for n in range(3)]
    hub["EleutherAI/wikitext_document_level"] = DatasetDict(
        dict.fromkeys(("train", "validation", "test"), Dataset.from_list(rows))
    )
    result = run(None, "wikitext")
    assert (result.metric, result.better, result.n, result.stderr) == ("word_perplexity", "lower", 3, None)
    model = tiny_model("llama")
    total = sum(likelihood(model, "", row["page"])[0] for row in rows)
    assert result.value == pytest.approx(math.exp(-total / 27), rel=1e-5)
    assert set(result.scores) == {"byte_perplexity", "bits_per_byte"}
    assert result.examples == []
    assert "answers" not in result.details


def test_a_search_by_a_perplexity_of_the_harness_wants_it_low(hub: dict[str, Any]) -> None:
    """The direction is the harness's own; the search reads one document in five."""
    from datasets import Dataset, DatasetDict

    rows = [{"page": words(n, 9)} for n in range(10)]
    hub["EleutherAI/wikitext_document_level"] = DatasetDict(
        dict.fromkeys(("train", "validation", "test"), Dataset.from_list(rows))
    )
    model, method = tiny_model("llama"), build_method("svd")
    criterion = search_criterion("lm-eval:wikitext", model, tiny_tokenizer())
    assert criterion.better == "lower"
    searched = run(None, "wikitext", split="sfsd-search")
    assert searched.n == 2
    assert criterion(model) == searched.value
    outcome = search(
        model,
        spectra_on_demand(model, method, ()),
        criterion,
        better=criterion.better,
        tolerance=Tolerance(0.0, relative=False),
        sites=find_sites(model)[-8:],
        budgets=(0.2, 0.6),
    )
    assert outcome.dense_score == searched.value
    worse = [trial.score > outcome.dense_score for trial in outcome.trials]
    assert set(worse) == {True, False}
    held = {trial.name: trial.rank for trial, is_worse in zip(outcome.trials, worse, strict=True) if not is_worse}
    assert {name: rank for name, rank in outcome.plan.ranks.items() if rank is not None} == held


@pytest.mark.parametrize("name", [name for name in (*ROWS, *MEMBERS.values()) if name not in MEMBERS])
def test_the_direction_is_the_results(name: str, tmp_path: Path) -> None:
    family = next((family for family, member in MEMBERS.items() if member == name), name)
    data = corpus(tmp_path, family, 6)
    assert harness_direction(name, data=data) == run(data, name, limit=2, shots=0).better == "higher"


def test_generated_text(hub: dict[str, Any]) -> None:
    from datasets import Dataset, DatasetDict

    rows = [{"question": words(n, 4), "answer": {"aliases": [f"w{n}"]}} for n in range(2)]
    hub["mandarjoshi/trivia_qa"] = DatasetDict(dict.fromkeys(("train", "validation"), Dataset.from_list(rows)))
    model = tiny_model("llama", max_position_embeddings=512)
    result = run(None, "triviaqa", model=model)
    assert (result.metric, result.n) == ("exact_match,remove_whitespace", 2)
    assert all(isinstance(answer, str) for answer in result.details["answers"])
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="triviaqa: a logit is not finite"):
        run(None, "triviaqa", model=model)
    assert not model._forward_hooks


@pytest.mark.usefixtures("hub")
def test_a_hub_that_cannot_be_reached() -> None:
    with pytest.raises(ValueError, match=r"piqa: the harness did not get its data from the hub \(ConnectionError"):
        run(None, "piqa")
