"""The harness itself, on trained models and real files, finds the same numbers to the last digit."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import eckart
from eckart.evals.harness import run_harness
from eckart.evals.result import EvalResult
from places import SHARED

from .harness_files import STOCK, Row, write

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


def assert_equal_to(result: EvalResult, table: dict[str, Any]) -> None:
    assert result.value == table["acc,none"]
    assert result.stderr == table["acc_stderr,none"]
    if "acc_norm,none" in table:
        assert result.scores["acc_norm"].value == table["acc_norm,none"]
        assert result.scores["acc_norm"].stderr == table["acc_norm_stderr,none"]


@pytest.mark.slow
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
    result = run_harness(model, tokenizer, name, limit=25, data=SHARED / "data")
    assert stock is not None
    assert_equal_to(result, stock["results"][name])
    samples = sorted(stock["samples"][name], key=lambda sample: sample["doc_id"])
    assert result.examples == [sample["acc"] for sample in samples]
    assert result.details["answers"] == [
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
