"""Broken input to the evaluations: one clear error each, and no result counted."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tiny import SPECIALS, Run, tiny_model, tiny_text, tiny_tokenizer

ROWS = [{"question": f"w1 w{n}", "choices": ["w2", "w3 w4"], "answer": n % 2} for n in range(6)]
SENTENCES = [
    {"sentence": "w2 is w3 .", "gold_label": "stereotype"},
    {"sentence": "w2 is w4 .", "gold_label": "anti-stereotype"},
    {"sentence": "w2 is w5 .", "gold_label": "unrelated"},
]
CLUSTER = {"bias_type": "gender", "target": "w2", "context": "w2 is BLANK .", "sentences": SENTENCES}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a tiny model, its tokenizer, a text, a task and StereoSet, all of them whole."""
    tiny_model("llama").save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(tiny_text(300))
    (tmp_path / "data" / "piqa").mkdir(parents=True)
    (tmp_path / "data" / "piqa" / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (tmp_path / "data" / "stereoset").mkdir()
    whole = {"data": {"intrasentence": [CLUSTER] * 3, "intersentence": [CLUSTER] * 3}}
    (tmp_path / "data" / "stereoset" / "dev.json").write_text(json.dumps(whole))
    return tmp_path


def evaluate(run: Run, place: Path) -> tuple[int, str]:
    """Every evaluation that needs no second model, one call each task, results to place/out."""
    tasks = (f"perplexity:{place / 'text.txt'}", "lm-eval:piqa", "stereoset")
    outcomes = [
        run("eval", place / "model", "--task", task, "--data", place / "data", "--out", place / "out") for task in tasks
    ]
    return max(status for status, _ in outcomes), "".join(printed for _, printed in outcomes)


def spoil_model(place: Path) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    shutil.rmtree(place / "model")
    model.save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")


def spoil_tokenizer(place: Path) -> None:
    shutil.rmtree(place / "model")
    tiny_model("llama", vocab_size=len(SPECIALS)).save_pretrained(place / "model")
    tiny_tokenizer().save_pretrained(place / "model")


def test_whole_input_gives_every_result(run: Run, place: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra 'tasks'")
    status, printed = evaluate(run, place)
    assert status == 0, printed
    assert len(list((place / "out").glob("*.json"))) == 3


@pytest.mark.parametrize(
    ("spoil", "errors"),
    [
        (spoil_model, ["window 0 is not finite", "piqa: document 0 has a log-likelihood of nan", "not finite"]),
        (spoil_tokenizer, ["is outside the model's vocabulary of 7"] * 3),
    ],
)
def test_a_broken_model_or_tokenizer_has_no_result(
    run: Run, place: Path, spoil: Callable[[Path], None], errors: list[str]
) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra 'tasks'")
    spoil(place)
    status, printed = evaluate(run, place)
    assert status == 2
    for error in errors:
        assert error in printed
    assert printed.count("error:") == 3, "one line each"
    assert not (place / "out").exists()


@pytest.mark.parametrize(
    ("file", "text", "task", "error"),
    [
        ("text.txt", "  \n\n", "perplexity:{}/text.txt", "holds no text"),
        ("data/piqa/dev.jsonl", "", "lm-eval:piqa", "dev.jsonl"),
        (
            "data/piqa/dev.jsonl",
            json.dumps(ROWS[0]) + "\n" + json.dumps({"question": "w1", "choices": ["w2", "w3"]}) + "\n",
            "lm-eval:piqa",
            "answer",
        ),
        (
            "data/stereoset/dev.json",
            json.dumps({"data": {"intrasentence": [{**CLUSTER, "bias_type": None}], "intersentence": [CLUSTER]}}),
            "stereoset",
            "bias_type",
        ),
        ("data/stereoset/dev.json", "{", "stereoset", "dev.json"),
    ],
)
def test_a_broken_file_has_no_result(run: Run, place: Path, file: str, text: str, task: str, error: str) -> None:
    if task.startswith("lm-eval"):
        pytest.importorskip("lm_eval", reason="needs the extra 'tasks'")
    (place / file).write_text(text)
    status, printed = run(
        "eval", place / "model", "--task", task.format(place), "--data", place / "data", "--out", place / "out"
    )
    assert status == 2
    assert error in printed
    assert printed.count("error:") == 1
    assert "Traceback" not in printed
    assert not (place / "out").exists()
