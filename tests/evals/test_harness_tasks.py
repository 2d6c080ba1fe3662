"""The harness from local files: every row of the table, prompts, and the SFSD splits."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eckart.evals.harness_tasks import LOCAL_TASKS, SPLITS, find_local_task, split_rows

from .harness_files import FILES, MEMBERS, ROWS, STOCK, corpus, run, write

# Local tasks


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_every_local_task(name: str, tmp_path: Path) -> None:
    member = MEMBERS.get(name, name)
    result = run(corpus(tmp_path, name), member)
    assert result.metric == "acc"
    assert 0 <= result.value <= 1
    assert result.n == len(result.examples) == len(result.details["answers"]) == 6
    assert result.value == pytest.approx(sum(result.examples) / 6)
    assert result.settings["documents"] == FILES[name]
    assert result.settings["shots"] == (5 if name == "mmlu" else 0)
    assert result.settings.get("examples") == ("mmlu/dev.jsonl" if name == "mmlu" else None)
    assert ("note" in result.settings) == (name == "hellaswag")
    rows = [ROWS[name](n) for n in range(6)]
    if name not in ("lambada_openai", "truthfulqa_mc2", "blimp"):
        right = [float(row["answer"] == answer) for row, answer in zip(rows, result.details["answers"], strict=True)]
        assert result.examples == right


@pytest.mark.parametrize(
    ("name", "prompt", "continuations"),
    [
        ("boolq", "{context}\nQuestion: {question}?\nAnswer:", " no| yes"),
        ("piqa", "Question: {question}\nAnswer:", " {0}| {1}"),
        ("hellaswag", "{context}", " {0}| {1}| {2}| {3}"),
        ("arc_easy", "Question: {question}\nAnswer:", " {0}| {1}| {2}| {3}"),
        ("openbookqa", "{question}", " {0}| {1}| {2}| {3}"),
        ("mmlu", "{question}\nA. {0}\nB. {1}\nC. {2}\nD. {3}\nAnswer:", " A| B| C| D"),
    ],
)
def test_prompts(name: str, prompt: str, continuations: str, tmp_path: Path, asked: list[tuple[str, str]]) -> None:
    run(corpus(tmp_path, name, 1), MEMBERS.get(name, name), shots=0)
    row = ROWS[name](0)
    start = "The following are multiple choice questions (with answers) about anatomy.\n\n" if name == "mmlu" else ""
    context = start + prompt.format(*row["choices"], **row)
    assert asked == [(context, text.format(*row["choices"])) for text in continuations.split("|")]


def test_the_blank_is_filled(tmp_path: Path, asked: list[tuple[str, str]]) -> None:
    write(tmp_path / "winogrande/dev.jsonl", [{"question": "w1 _ w2 w3.", "choices": ["w4", "w5"], "answer": 1}])
    run(tmp_path, "winogrande")
    assert asked == [("w1 w4", " w2 w3."), ("w1 w5", " w2 w3.")]


def test_a_title_begins_the_passage(tmp_path: Path, asked: list[tuple[str, str]]) -> None:
    write(tmp_path / "boolq/dev.jsonl", [{**ROWS["boolq"](0), "title": "w7", "context": "w8"}])
    run(tmp_path, "boolq")
    assert asked[0][0].startswith("w7 -- w8\nQuestion:")


def test_examples_come_first(tmp_path: Path, asked: list[tuple[str, str]]) -> None:
    run(corpus(tmp_path, "mmlu", 1), "mmlu_anatomy", shots=2)
    first, second, _ = asked[0][0].removesuffix("\nAnswer:").split("\nAnswer: ")
    assert ROWS["mmlu"](70)["question"] in first
    assert second.startswith("ABCD"[70 % 4] + "\n\n" + ROWS["mmlu"](71)["question"])


def test_examples_follow_the_seed(tmp_path: Path, asked: list[tuple[str, str]]) -> None:
    data, prompts = corpus(tmp_path, "arc_easy", 4), []
    for seed in (0, 0, 1):
        asked.clear()
        result = run(data, "arc_easy", shots=3, seed=seed)
        prompts.append([context for context, _ in asked])
        assert result.settings["examples"] == "arc_easy/train.jsonl.gz"
        assert (result.settings["shots"], result.settings["seed"]) == (3, seed)
    assert prompts[0] == prompts[1] != prompts[2]
    training = [ROWS["arc_easy"](n)["question"] for n in range(70, 77)]
    assert all(sum(question in prompt for question in training) == 3 for prompt in prompts[0])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """(prompt, continuation) of every request, in order."""
    from lm_eval.models.huggingface import HFLM

    seen: list[tuple[str, str]] = []
    original = HFLM.loglikelihood

    def record(self: Any, requests: list[Any], **options: Any) -> Any:
        seen.extend(request.args for request in requests)
        return original(self, requests, **options)

    monkeypatch.setattr(HFLM, "loglikelihood", record)
    return seen


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_the_table_agrees_with_the_installed_harness(name: str) -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    row = LOCAL_TASKS[name]
    path = STOCK / row.stock
    definition = load_yaml(path if row.member is None else next(path.glob("*a*_a*.yaml")), resolve_func=False)
    assert definition[row.documents[0]] == row.documents[1]
    if row.documents[0] == "validation_split":
        assert definition.get("test_split") is None
    if row.examples:
        assert definition[row.examples[0]] == row.examples[1]
    else:
        assert definition.get("training_split") is None
        assert definition.get("fewshot_split") is None


def test_names_of_members() -> None:
    assert find_local_task("mmlu_stem", STOCK) is find_local_task("mmlu_virology", STOCK) is LOCAL_TASKS["mmlu"]
    assert find_local_task("blimp_wh_island", STOCK) is LOCAL_TASKS["blimp"]
    assert find_local_task("mmlu_pro", STOCK) is None
    assert find_local_task("arc", STOCK) is None


# Splits


@given(st.integers(5, 3000), st.integers(0, 5))
def test_splits_part_the_documents(n: int, seed: int) -> None:
    search, rest = (split_rows(n, f"sfsd-{part}", seed=seed) for part in ("search", "evaluation"))
    assert search == sorted(search)
    assert rest == sorted(rest)
    assert sorted(search + rest) == split_rows(n, "test") == list(range(n))
    assert len(search) == math.floor(0.2 * n)


@pytest.mark.parametrize(
    ("n", "search", "evaluation"),
    [(3270, 654, 2616), (1838, 367, 1471), (10042, 2008, 8034), (1267, 253, 1014), (2376, 475, 1901), (1172, 234, 938)],
)
def test_split_sizes_are_the_papers(n: int, search: int, evaluation: int) -> None:
    assert len(split_rows(n, "sfsd-search")) == search
    assert len(split_rows(n, "sfsd-evaluation")) == evaluation


def test_a_split_is_a_draw_that_does_not_change() -> None:
    assert split_rows(20, "sfsd-search") == split_rows(20, "sfsd-search", seed=0)
    assert split_rows(20, "sfsd-search") != split_rows(20, "sfsd-search", seed=1)
    assert split_rows(100, "sfsd-search") != list(range(20))
    order = list(range(100))
    random.Random(0).shuffle(order)
    assert split_rows(100, "sfsd-search") == sorted(order[:20])


def test_a_split_reads_its_documents(tmp_path: Path) -> None:
    data = corpus(tmp_path, "boolq", 23)
    whole = run(data, "boolq")
    parts = [run(data, "boolq", split=split) for split in SPLITS[1:]]
    assert [part.n for part in parts] == [4, 19]
    assert sorted(parts[0].details["ids"] + parts[1].details["ids"]) == whole.details["ids"]
    for split, part in zip(SPLITS[1:], parts, strict=True):
        assert part.details["ids"] == split_rows(23, split)
        assert part.examples == [whole.examples[i] for i in part.details["ids"]]
        assert part.details["answers"] == [whole.details["answers"][i] for i in part.details["ids"]]
        assert (part.settings["split"], part.settings["split_seed"]) == (split, 0)
        some = run(data, "boolq", split=split, limit=3, seed=5)
        assert some.details["ids"] == part.details["ids"][:3]
        assert some.examples == part.examples[:3]


def test_limit_reads_the_first_documents(tmp_path: Path) -> None:
    data = corpus(tmp_path, "piqa")
    whole, some = run(data, "piqa"), run(data, "piqa", limit=4)
    assert some.examples == whole.examples[:4]
    assert (some.n, some.details["ids"], some.settings["limit"]) == (4, [0, 1, 2, 3], 4)
    assert run(data, "piqa", limit=99).n == 6
    assert run(data, "piqa", limit=1).stderr is None
