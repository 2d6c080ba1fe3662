"""The harness: numbers by hand and by lm_eval itself, every local task, and what is refused."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

import eckart
from eckart.evals import harness
from eckart.evals.harness import run_harness
from eckart.evals.harness_tasks import LOCAL_TASKS, SPLITS, find_local_task, split_rows, write_definitions
from eckart.evals.result import EvalResult
from tiny import BOS, POSITIONS, VOCABULARY, tiny_model, tiny_text, tiny_tokenizer, tiny_tokens

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'eckart[tasks]'")

SHARED = Path(__file__).parents[2] / "shared"
STOCK = Path(lm_eval.__file__).parent / "tasks"
Row = dict[str, Any]


def words(seed: int, count: int = 3) -> str:
    return tiny_text(count, seed)


def choices(seed: int, count: int) -> list[str]:
    return [words(100 * seed + number, 1 + (seed + number) % 3) for number in range(count)]


def multiple(count: int) -> Callable[[int], Row]:
    return lambda n: {"question": words(n), "choices": choices(n, count), "answer": n % count}


# {task: what makes its nth row}
ROWS: dict[str, Callable[[int], Row]] = {
    "boolq": lambda n: {"context": words(n), "question": words(n + 50), "choices": ["no", "yes"], "answer": n % 2},
    "piqa": multiple(2),
    "hellaswag": lambda n: {"context": words(n), "choices": choices(n, 4), "answer": n % 4},
    "winogrande": lambda n: {"question": f"{words(n)} _ w1 w{n}", "choices": choices(n, 2), "answer": n % 2},
    "arc_easy": multiple(4),
    "arc_challenge": lambda n: multiple(3 + n % 3)(n),
    "openbookqa": multiple(4),
    "mmlu": lambda n: {**multiple(4)(n), "subject": "anatomy"},
    "lambada_openai": lambda n: {"text": words(n, 6), "target": "of other readers"},
    "blimp": lambda n: {"good": words(n), "bad": words(n + 50), "uid": "adjunct_island"},
    "truthfulqa_mc1": lambda n: {**multiple(3)(n), "answer": 0},
    "truthfulqa_mc2": lambda n: {"question": words(n), "mc2_choices": choices(n, 4), "mc2_labels": [1, 0, n % 2, 0]},
}
FILES = {"mmlu": "mmlu/test.jsonl", "lambada_openai": "lambada/test.jsonl", "blimp": "blimp/test.jsonl"}
FILES |= {name: f"{name}/dev.jsonl" for name in ("boolq", "piqa", "hellaswag", "winogrande")}
FILES |= {name: f"{name}/test.jsonl" for name in ("arc_easy", "arc_challenge", "openbookqa")}
FILES |= dict.fromkeys(("truthfulqa_mc1", "truthfulqa_mc2"), "truthfulqa/mc.v0.jsonl")
MEMBERS = {"mmlu": "mmlu_anatomy", "blimp": "blimp_adjunct_island"}


def write(path: Path, rows: Iterable[Row | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def corpus(data: Path, name: str, count: int = 6) -> Path:
    """Local files of a task, with few-shot examples where it has any; returns the folder of all."""
    write(data / FILES[name], (ROWS[name](n) for n in range(count)))
    if LOCAL_TASKS[name].examples:
        examples = "mmlu/dev.jsonl" if name == "mmlu" else f"{name}/train.jsonl.gz"
        write(data / examples, (ROWS[name](n) for n in range(70, 77)))
    return data


def run(data: Path | None, name: str, **changes: Any) -> EvalResult:
    model = changes.pop("model", None) or tiny_model("llama")
    return run_harness(model, changes.pop("tokenizer", None) or tiny_tokenizer(), name, data=data, **changes)


@torch.no_grad()
def likelihood(model: Any, context: str, continuation: str) -> tuple[float, bool]:
    """Of a continuation, a prediction at a time in float64, and whether it is the greedy one."""
    tokenizer = tiny_tokenizer()
    prompt = tokenizer(context)["input_ids"] or [BOS]
    total, greedy = 0.0, True
    for token in tokenizer(continuation)["input_ids"]:
        logits = model(input_ids=torch.tensor([prompt])).logits[0, -1].double()
        total += float(logits[token] - torch.logsumexp(logits, 0))
        greedy &= int(logits.argmax()) == token
        prompt.append(token)
    return total, greedy


def low_rank() -> Any:
    model = tiny_model("llama", num_key_value_heads=4)
    method = eckart.build_method("asvd-i")
    eckart.compress(model, method, eckart.plan(model, 0.5), eckart.calibrate(model, tiny_tokens(), method))
    return model


# Numbers


@pytest.mark.parametrize("make", [lambda: tiny_model("llama"), lambda: tiny_model("gpt2"), low_rank])
def test_accuracy_by_hand(make: Callable[[], Any], tmp_path: Path) -> None:
    model, rows = make(), [ROWS["piqa"](n) for n in range(12)]
    found = run(corpus(tmp_path, "piqa", 12), "piqa", model=model)
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
    assert found.details == {"ids": list(range(12)), "answers": answers, "truncated": 0}
    assert found.examples == right
    value = sum(right) / 12
    assert (found.task, found.metric, found.value, found.n, found.better) == (
        "lm-eval:piqa",
        "acc",
        value,
        12,
        "higher",
    )
    assert found.stderr == pytest.approx(math.sqrt(value * (1 - value) / 11))
    value = sum(answer == row["answer"] for answer, row in zip(normed, rows, strict=True)) / 12
    assert found.scores["acc_norm"].value == value
    assert found.scores["acc_norm"].stderr == pytest.approx(math.sqrt(value * (1 - value) / 11))
    assert found.settings == {
        "harness": f"lm_eval {lm_eval.__version__}",
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
    assert EvalResult.from_json(found.to_json()) == found


def test_lambada_by_hand(tmp_path: Path) -> None:
    model, rows = tiny_model("llama"), [ROWS["lambada_openai"](n)["text"] for n in range(8)]
    # One text that goes on as the model would.
    context = words(99, 5)
    best = int(model(input_ids=torch.tensor([tiny_tokenizer()(context)["input_ids"]])).logits[0, -1].argmax())
    rows.append(f"{context} {tiny_tokenizer().convert_ids_to_tokens(best)}")
    write(tmp_path / "lambada/test.jsonl", ({"text": text} for text in rows))
    found = run(tmp_path, "lambada_openai", task="x")
    by_hand = [likelihood(model, *text.rsplit(" ", 1)) for text in rows]
    assert by_hand[-1][1]
    assert found.details["answers"] == [int(greedy) for _, greedy in by_hand]
    assert found.examples == [float(greedy) for _, greedy in by_hand]
    assert (found.task, found.metric, found.value) == ("x", "acc", sum(found.examples) / 9)
    logs = [value for value, _ in by_hand]
    perplexity = found.scores["perplexity"]
    assert perplexity.value == pytest.approx(math.exp(-sum(logs) / 9), rel=1e-5)
    assert perplexity.stderr == pytest.approx(perplexity.value * np.std(logs, ddof=1) / 3, rel=1e-4)


def test_a_continuation_of_nothing_starts_at_the_begin_token(tmp_path: Path) -> None:
    model = tiny_model("llama")
    found = run(corpus(tmp_path, "blimp", 10), "blimp_adjunct_island", model=model)
    by_hand = []
    for row in (ROWS["blimp"](n) for n in range(10)):
        good, bad = (likelihood(model, "", row[key])[0] for key in ("good", "bad"))
        by_hand.append(float(good > bad))
    assert found.examples == by_hand
    assert 0 < sum(by_hand) < 10


def test_truthful_mass_by_hand(tmp_path: Path) -> None:
    model, rows = tiny_model("llama", max_position_embeddings=512), [ROWS["truthfulqa_mc2"](n) for n in range(3)]
    found = run(corpus(tmp_path, "truthfulqa_mc2", 3), "truthfulqa_mc2", model=model)
    import lm_eval.utils

    template = yaml.safe_load((STOCK / "truthfulqa/truthfulqa_mc1.yaml").read_text())["doc_to_text"]
    for row, example, answer in zip(rows, found.examples, found.details["answers"], strict=True):
        context = lm_eval.utils.apply_template(template, row)
        mass = [math.exp(likelihood(model, context, choice)[0]) for choice in row["mc2_choices"]]
        true = sum(part for part, label in zip(mass, row["mc2_labels"], strict=True) if label)
        assert example == pytest.approx(true / sum(mass), rel=1e-4)
        assert answer == int(np.argmax(mass))
    assert found.value == pytest.approx(sum(found.examples) / 3)


# Local tasks


@pytest.mark.parametrize("name", LOCAL_TASKS)
def test_every_local_task(name: str, tmp_path: Path) -> None:
    member = MEMBERS.get(name, name)
    found = run(corpus(tmp_path, name), member)
    assert found.metric == "acc"
    assert 0 <= found.value <= 1
    assert found.n == len(found.examples) == len(found.details["answers"]) == 6
    assert found.value == pytest.approx(sum(found.examples) / 6)
    assert found.settings["documents"] == FILES[name]
    assert found.settings["shots"] == (5 if name == "mmlu" else 0)
    assert found.settings.get("examples") == ("mmlu/dev.jsonl" if name == "mmlu" else None)
    assert ("note" in found.settings) == (name == "hellaswag")
    rows = [ROWS[name](n) for n in range(6)]
    if name not in ("lambada_openai", "truthfulqa_mc2", "blimp"):
        right = [float(row["answer"] == answer) for row, answer in zip(rows, found.details["answers"], strict=True)]
        assert found.examples == right


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
        found = run(data, "arc_easy", shots=3, seed=seed)
        prompts.append([context for context, _ in asked])
        assert found.settings["examples"] == "arc_easy/train.jsonl.gz"
        assert (found.settings["shots"], found.settings["seed"]) == (3, seed)
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
    found = run(tmp_path, "mmlu", shots=0)
    size = sum(size for _, size in members)
    assert found.n == len(found.examples) == len(found.details["answers"]) == size
    assert found.value == pytest.approx(sum(found.examples) / size, rel=1e-12)
    assert (found.metric, found.better, found.settings["task_version"]) == ("acc", "higher", "2")
    assert set(found.scores) == {f"mmlu_{member}" for member, _ in members} | {
        "mmlu_stem",
        "mmlu_other",
        "mmlu_social_sciences",
        "mmlu_humanities",
    }
    groups: dict[str, list[float]] = {}
    for name, example in zip(found.details["ids"], found.examples, strict=True):
        groups.setdefault(name.partition("/")[0], []).append(example)
    assert {name: len(values) for name, values in groups.items()} == {f"mmlu_{name}": n for name, n in members}
    for name, values in groups.items():
        assert found.scores[name].value == pytest.approx(sum(values) / len(values))
        assert found.scores[name].n == len(values)
    within = sum(sum((v - sum(vs) / len(vs)) ** 2 for v in vs) for vs in groups.values())
    assert found.stderr == pytest.approx(math.sqrt(within / (size - 57) / size))
    assert next(iter(groups)) == "mmlu_abstract_algebra"
    stem = run(tmp_path, "mmlu_stem", shots=0)
    assert stem.value == found.scores["mmlu_stem"].value
    assert stem.n == found.scores["mmlu_stem"].n < size


def test_blimp_is_the_plain_mean_over_paradigms(tmp_path: Path) -> None:
    members = family(tmp_path, "blimp", lambda number: 1 + number % 3)
    assert len(members) == 67
    found = run(tmp_path, "blimp", limit=2)
    values = [found.scores[f"blimp_{member}"].value for member, _ in members]
    assert found.value == pytest.approx(sum(values) / 67, rel=1e-12)
    assert found.value != pytest.approx(sum(found.examples) / found.n, rel=1e-6)
    assert found.n == sum(min(2, size) for _, size in members)
    # A paradigm with one document has no standard error, so the harness gives the mean none.
    assert found.stderr is None
    assert found.scores["blimp_causative"].stderr is not None or found.scores["blimp_causative"].n == 1


def test_a_group_with_a_member_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"test\.jsonl has no row whose subject is 'abstract_algebra'"):
        run(corpus(tmp_path, "mmlu"), "mmlu", shots=0)


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


# What is left as it was


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
def index(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of the harness's tasks in place of all, whose index takes seconds to make."""
    import lm_eval.tasks

    make = lm_eval.tasks.TaskManager
    folders = [STOCK / name for name in ("arc", "benchmarks", "gsm8k", "triviaqa", "wikitext", "winogrande")]
    some = {"include_path": folders, "include_defaults": False}
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **options: make(**(options or some)))


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
    found, local = run(None, "piqa", limit=5), run(corpus(tmp_path, "piqa"), "piqa", limit=5)
    assert (found.value, found.examples, found.scores, found.details) == (
        local.value,
        local.examples,
        local.scores,
        local.details,
    )
    assert found.settings == {**local.settings, "documents": "hub"}


def test_other_tasks_of_the_hub(hub: dict[str, Any]) -> None:
    """Generated text, rolling likelihoods, unknown aggregates: nothing of the kind has local files."""
    from datasets import Dataset, DatasetDict

    rows = [{"page": words(n, 9)} for n in range(3)]
    hub["EleutherAI/wikitext_document_level"] = DatasetDict(
        dict.fromkeys(("train", "validation", "test"), Dataset.from_list(rows))
    )
    found = run(None, "wikitext")
    assert (found.metric, found.better, found.n, found.stderr) == ("word_perplexity", "lower", 3, None)
    model = tiny_model("llama")
    total = sum(likelihood(model, "", row["page"])[0] for row in rows)
    assert found.value == pytest.approx(math.exp(-total / 27), rel=1e-5)
    assert set(found.scores) == {"byte_perplexity", "bits_per_byte"}
    assert found.examples == []
    assert "answers" not in found.details


def test_generated_text(hub: dict[str, Any]) -> None:
    from datasets import Dataset, DatasetDict

    rows = [{"question": words(n, 4), "answer": {"aliases": [f"w{n}"]}} for n in range(2)]
    hub["mandarjoshi/trivia_qa"] = DatasetDict(dict.fromkeys(("train", "validation"), Dataset.from_list(rows)))
    model = tiny_model("llama", max_position_embeddings=512)
    found = run(None, "triviaqa", model=model)
    assert (found.metric, found.n) == ("exact_match,remove_whitespace", 2)
    assert all(isinstance(answer, str) for answer in found.details["answers"])
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(ValueError, match="triviaqa: a logit is not finite"):
        run(None, "triviaqa", model=model)
    assert not model._forward_hooks


@pytest.mark.usefixtures("hub")
def test_a_hub_that_cannot_be_reached() -> None:
    with pytest.raises(ValueError, match=r"piqa: the harness did not get its data from the hub \(ConnectionError"):
        run(None, "piqa")


# What is refused


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("piq", r"unknown task 'piq'; did you mean 'piqa' \(local files or the hub\)"),
        ("gsm8", r"unknown task 'gsm8'; did you mean 'gsm8k' \(hub only\)"),
        ("mmlu_anatomi", r"did you mean 'mmlu_anatomy' \(local files or the hub\)"),
        ("qqqqqqqqqqqq", r"unknown task 'qqqqqqqqqqqq'; with local files there are boolq, piqa"),
    ],
)
def test_an_unknown_task(name: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(tmp_path, name)


@pytest.mark.usefixtures("index")
def test_an_unknown_task_of_the_hub() -> None:
    with pytest.raises(ValueError, match=r"did you mean 'winogrande' \(local files or the hub\)"):
        run(None, "winogrand")
    with pytest.raises(ValueError, match=r"'ai2_arc' stands for several tasks.*: arc_challenge, arc_easy"):
        run(None, "ai2_arc")
    with pytest.raises(ValueError, match=r"'pythia' stands for several tasks.*: lambada_openai, logiqa, piqa"):
        run(None, "pythia")


@pytest.mark.usefixtures("index")
def test_a_task_without_local_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="task 'gsm8k' is read from the hub only: leave out the data folder"):
        run(tmp_path, "gsm8k")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("piqa", {"choices": None}, r"piqa: .*dev\.jsonl: line 3 has no field 'choices'; it has question, answer"),
        ("piqa", {"choices": ["w1"]}, "line 3: 'choices' has 1 texts; the task takes 2"),
        ("piqa", {"choices": ["w1", 2]}, "line 3: 'choices' has to be a list of texts"),
        ("piqa", {"answer": 2}, "line 3: 'answer' has to be an index from 0 to 1; it is 2"),
        ("piqa", {"answer": "1"}, "line 3: 'answer' has to be an index from 0 to 1; it is '1'"),
        ("piqa", {"question": " "}, "line 3: 'question' has to be text that is not empty"),
        ("boolq", {"context": None}, "line 3 has no field 'context'"),
        ("boolq", {"choices": ["yes", "no"]}, "line 3: 'choices' has to be no, yes in that order"),
        ("winogrande", {"question": "w1 w2"}, "line 3: 'question' has no blank _"),
        ("lambada_openai", {"text": "w1"}, "line 3: 'text' has to be words"),
        ("lambada_openai", {"text": "w1 w2 "}, "line 3: 'text' has to be words"),
        ("mmlu", {"subject": None}, "line 3 has no field 'subject'"),
        ("mmlu", {"choices": ["a", "b", "c"]}, "line 3: 'choices' has 3 texts; the task takes 4"),
        ("blimp", {"bad": None, "good": None}, "line 3 has no field 'good' or 'bad'"),
        ("truthfulqa_mc1", {"answer": 1}, "line 3: 'answer' has to be 0"),
        ("truthfulqa_mc2", {"mc2_labels": [1, 0, 2, 0]}, "line 3: 'mc2_labels' has to be 0 or 1 for each of the 4"),
        ("truthfulqa_mc2", {"mc2_labels": [1]}, "line 3: 'mc2_labels' has to be 0 or 1 for each of the 4"),
        ("truthfulqa_mc2", {"mc2_labels": [0, 0, 0, 0]}, "line 3: 'mc2_labels' marks no choice as true"),
    ],
)
def test_rows_that_do_not_fit(name: str, change: Row, message: str, tmp_path: Path) -> None:
    rows = [ROWS[name](n) for n in range(4)]
    rows[2] = {key: value for key, value in {**rows[2], **change}.items() if value is not None}
    write(tmp_path / FILES[name], rows)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, MEMBERS.get(name, name), shots=0)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], r"piqa: .*dev\.jsonl is empty"),
        (["", "  "], r"dev\.jsonl is empty"),
        (["{"], r"dev\.jsonl: line 1 is not JSON"),
        (["", "[1]"], r"dev\.jsonl: line 2 is a list; it has to be an object with question, choices, answer"),
    ],
)
def test_files_that_do_not_fit(lines: list[str], message: str, tmp_path: Path) -> None:
    write(tmp_path / "piqa/dev.jsonl", lines)
    with pytest.raises(ValueError, match=message):
        run(tmp_path, "piqa")


@pytest.mark.parametrize("content", [b"\xff\xfe", gzip.compress(b"{}" * 99)[:-12], b"no gzip"])
def test_files_that_cannot_be_read(content: bytes, tmp_path: Path) -> None:
    path = write(tmp_path / ("piqa/dev.jsonl" if content == b"\xff\xfe" else "piqa/dev.jsonl.gz"), [])
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"dev\.jsonl.* is not readable as UTF-8 text"):
        run(tmp_path, "piqa")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"piqa: no file dev\.json\* or val\.json\* or validation\.json\* in .*piqa"):
        run(tmp_path, "piqa")
    # The folder of one task is not taken for another's.
    corpus(tmp_path, "arc_easy")
    assert run(tmp_path / "arc_easy", "arc_easy").n == 6
    with pytest.raises(ValueError, match=r"no file test\.json\* in .*arc_challenge"):
        run(tmp_path / "arc_easy", "arc_challenge")
    (tmp_path / "arc_easy/train.jsonl.gz").unlink()
    assert run(tmp_path, "arc_easy").n == 6
    with pytest.raises(ValueError, match=r"arc_easy: no file train\.json\* in .*arc_easy"):
        run(tmp_path, "arc_easy", shots=1)


def test_examples_that_there_are_not(tmp_path: Path) -> None:
    data = corpus(tmp_path, "truthfulqa_mc1")
    with pytest.raises(ValueError, match="truthfulqa_mc1: 2 examples asked for; the harness defines this task without"):
        run(data, "truthfulqa_mc1", shots=2)
    with pytest.raises(ValueError, match="mmlu_anatomy: 8 examples asked for; there are 7"):
        run(corpus(tmp_path, "mmlu"), "mmlu_anatomy", shots=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 0}, "piqa: limit 0 is less than 1"),
        ({"shots": -1}, "piqa: shots -1 is less than 0"),
        ({"batch_size": 0}, "piqa: batch_size 0 is less than 1"),
        ({"split": "train"}, "piqa: no split 'train'; there are test, sfsd-search, sfsd-evaluation"),
    ],
)
def test_settings_that_make_no_sense(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        run(corpus(tmp_path, "piqa"), "piqa", **changes)


def test_too_few_documents_for_a_split(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="piqa: 4 documents are too few for sfsd-search"):
        run(corpus(tmp_path, "piqa", 4), "piqa", split="sfsd-search")
    with pytest.raises(ValueError, match="no split 'search'"):
        split_rows(10, "search")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("split", ["test", "sfsd-evaluation"])
def test_a_broken_model_names_task_and_document(split: str, bad: float, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = bad
    rows = [{"question": "w1 w2", "choices": ["w3", "w4 w5"], "answer": 0} for _ in range(10)]
    rows[9]["question"] = "w1 w0"  # w0 is the broken word
    write(tmp_path / "piqa/dev.jsonl", rows)
    assert split_rows(10, "sfsd-evaluation").index(9) < 9
    with pytest.raises(ValueError, match="piqa: document 9 has a log-likelihood of nan; the model is broken"):
        run(tmp_path, "piqa", model=model, split=split)


def test_a_mass_of_nothing_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 1e4
    with pytest.raises(ValueError, match=r"truthfulqa_mc2: acc of document . is not a number"):
        run(corpus(tmp_path, "truthfulqa_mc2"), "truthfulqa_mc2", model=model)


def test_a_perplexity_past_all_numbers(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 1e4
    with pytest.raises(ValueError, match=r"lambada_openai: the harness gave up \(OverflowError"):
        run(corpus(tmp_path, "lambada_openai"), "lambada_openai", model=model)


def test_another_tokenizer(tmp_path: Path) -> None:
    called: list[int] = []
    model = tiny_model("llama", vocab_size=VOCABULARY - 1)
    model.register_forward_hook(lambda *_: called.append(1))
    row = {"question": "w1", "choices": ["w1", f"w{VOCABULARY - 8}"], "answer": 0}
    write(tmp_path / "piqa/dev.jsonl", [row])
    with pytest.raises(ValueError, match="piqa: token 95 is outside the model's vocabulary of 95"):
        run(tmp_path, "piqa", model=model)
    assert not called
    with pytest.raises(ValueError, match="neither a begin nor an end token"):
        run(tmp_path, "piqa", tokenizer=tiny_tokenizer(bos_token=None, eos_token=None))


def test_a_continuation_that_does_not_fit(tmp_path: Path) -> None:
    row = {"question": "w1", "choices": ["w1", words(0, POSITIONS + 1)], "answer": 0}
    write(tmp_path / "piqa/dev.jsonl", [row])
    with pytest.raises(ValueError, match="piqa: document 0: a continuation has 65 tokens, more than the model's 64"):
        run(tmp_path, "piqa")


@pytest.mark.parametrize(("model_type", "head"), [("bert", "masked"), ("t5", "base"), ("llama", "classifier")])
def test_models_that_are_not_causal_are_refused(model_type: str, head: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a causal language model; lm-eval:piqa is not defined"):
        run(tmp_path, "piqa", model=tiny_model(model_type, head))


def test_a_model_in_training_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is in training mode"):
        run(tmp_path, "piqa", model=tiny_model("llama").train())


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(ValueError, match=r"lm_eval is not installed: pip install 'eckart\[tasks\]'"):
        run(tmp_path, "piqa")


def test_a_harness_without_the_definition(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the installed harness has no definition piqa/piqa\.yaml"):
        write_definitions(LOCAL_TASKS["piqa"], tmp_path, corpus(tmp_path, "piqa"), tmp_path, shots=0)
    with pytest.raises(ValueError, match=r"the installed harness has no definition mmlu/default"):
        find_local_task("mmlu_anatomy", tmp_path)


# Real models

real = pytest.mark.skipif(
    not (SHARED / "models/stories260K/config.json").is_file() or not (SHARED / "data/piqa").is_dir(),
    reason="needs the real models and corpora of ../shared, which are not part of the project",
)
# {task: (stock definition, its files' split, local file, row in the words of the stock data set)}, written again here.
REAL: dict[str, tuple[str, str, str, Callable[[Row], Row]]] = {
    "piqa": (
        "piqa/piqa.yaml",
        "validation",
        "piqa/dev.jsonl.gz",
        lambda r: {"goal": r["question"], "sol1": r["choices"][0], "sol2": r["choices"][1], "label": r["answer"]},
    ),
    "arc_easy": (
        "arc/arc_easy.yaml",
        "test",
        "arc_easy/test.jsonl.gz",
        lambda r: {
            "question": r["question"],
            "choices": {"text": r["choices"], "label": ["A", "B", "C", "D", "E"][: len(r["choices"])]},
            "answerKey": "ABCDE"[r["answer"]],
        },
    ),
    "boolq": (
        "super_glue/boolq/default.yaml",
        "validation",
        "boolq/dev.jsonl.gz",
        lambda r: {"passage": f"{r['title']} -- {r['context']}", "question": r["question"], "label": r["answer"]},
    ),
}


def stock_definitions(folder: Path, limit: int) -> None:
    """The stock tasks with their documents from JSON, as the harness's own guide has it."""
    for name, (stock, split, file, row) in REAL.items():
        lines = gzip.decompress((SHARED / "data" / file).read_bytes()).decode().split("\n")[: limit + 3]
        write(folder / f"{name}.jsonl", (row(json.loads(line)) for line in lines))
        definition = {
            "include": str(STOCK / stock),
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {split: str(folder / f"{name}.jsonl")},
                "cache_dir": str(folder / "cache"),
            },
            "training_split": None,
            **({"validation_split": None} if split == "test" else {}),
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition))


def assert_equal_to(found: EvalResult, table: dict[str, Any]) -> None:
    assert found.value == table["acc,none"]
    assert found.stderr == table["acc_stderr,none"]
    if "acc_norm,none" in table:
        assert found.scores["acc_norm"].value == table["acc_norm,none"]
        assert found.scores["acc_norm"].stderr == table["acc_norm_stderr,none"]


@real
@pytest.mark.parametrize(("name", "keep"), [("piqa", 1), ("boolq", 1), ("arc_easy", 1), ("arc_easy", 0.7)])
def test_the_harness_itself_finds_the_same(
    name: str, keep: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import lm_eval.evaluator
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    stock_definitions(tmp_path, 25)
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda _results: None)  # it asks the machine for long
    monkeypatch.setattr(HFLM, "get_model_info", lambda _self: {})  # it asks the hub
    path = SHARED / "models/stories260K"
    model, tokenizer = eckart.load_model(path), eckart.load_tokenizer(path)
    if keep < 1:
        path = tmp_path / "low-rank"
        eckart.compress(model, eckart.build_method("svd"), eckart.plan(model, keep), None)
        eckart.save(model, path, tokenizer)
    stock = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(path), "dtype": "float32"},
        tasks=[name],
        limit=25,
        batch_size=8,
        device="cpu",
        bootstrap_iters=1000,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
    )
    found = run_harness(model, tokenizer, name, limit=25, data=SHARED / "data")
    assert stock is not None
    assert_equal_to(found, stock["results"][name])
    samples = sorted(stock["samples"][name], key=lambda sample: sample["doc_id"])
    assert found.examples == [sample["acc"] for sample in samples]
    assert found.details["answers"] == [
        int(np.argmax([likelihood for likelihood, _ in sample["filtered_resps"]])) for sample in samples
    ]


@pytest.mark.slow
@real
def test_the_harness_s_command_line_finds_the_same(tmp_path: Path) -> None:
    stock_definitions(tmp_path / "tasks", 30)
    path = SHARED / "models/llama6M"
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--model_args"]
    command += [f"pretrained={path},dtype=float32", "--tasks", *REAL, "--limit", "30", "--batch_size", "8"]
    command += ["--device", "cpu", "--include_path", str(tmp_path / "tasks"), "--output_path", str(tmp_path / "out")]
    subprocess.run(command, check=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True)
    results = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())["results"]
    model, tokenizer = eckart.load_model(path), eckart.load_tokenizer(path)
    for name in REAL:
        assert_equal_to(run_harness(model, tokenizer, name, limit=30, data=SHARED / "data"), results[name])


@real
def test_the_real_files_fit_the_table() -> None:
    """Every row of every file is checked and converted before the first document is scored."""
    path = SHARED / "models/stories260K"
    model, tokenizer = eckart.load_model(path), eckart.load_tokenizer(path)
    sizes = {"mmlu_anatomy": 135, "blimp_wh_island": 1000, "truthfulqa_mc1": 817, "lambada_openai": 5153}
    for name in sizes:
        assert run_harness(model, tokenizer, name, limit=2, shots=0, data=SHARED / "data").n == 2
