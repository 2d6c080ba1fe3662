"""What the harness adapter refuses: names, files, settings, broken models."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import torch

from eckart.evals import harness
from eckart.evals.harness_tasks import LOCAL_TASKS, find_local_task, split_rows, write_definitions
from tiny import POSITIONS, VOCABULARY, tiny_model, tiny_tokenizer

from .harness_files import FILES, MEMBERS, ROWS, Row, corpus, run, words, write

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


@pytest.mark.parametrize("content", [b"\xff\xfe", gzip.compress(b"{}" * 99, mtime=0)[:-12], b"no gzip"])
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
    with pytest.raises(ValueError, match=r"piqa: token 95 \('w88'\) is outside the model's vocabulary of 95"):
        run(tmp_path, "piqa", model=model)
    assert not called


def test_without_a_start_token_only_prompts_are_continued(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(bos_token=None, eos_token=None)
    startless, usual = (run(corpus(tmp_path, "piqa"), "piqa", tokenizer=t) for t in (tokenizer, tiny_tokenizer()))
    assert startless.details["answers"] == usual.details["answers"]
    with pytest.raises(ValueError, match=r"blimp_\w+: document 0 has no prompt.*neither a begin nor an end token"):
        run(corpus(tmp_path, "blimp"), MEMBERS["blimp"], tokenizer=tokenizer)


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


def test_examples_are_not_drawn_from_what_is_divided(tmp_path: Path) -> None:
    """Lambada has no split but the one that is asked: a search's prompts would hold what its report asks."""
    corpus(tmp_path, "lambada_openai", 12)
    assert run(tmp_path, "lambada_openai", split="sfsd-search").n == 2
    with pytest.raises(ValueError, match="drawn from the documents themselves"):
        run(tmp_path, "lambada_openai", split="sfsd-search", shots=1)
    assert run(corpus(tmp_path, "boolq", 12), "boolq", split="sfsd-search", shots=1).n == 2
