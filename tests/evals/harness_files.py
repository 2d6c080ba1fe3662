"""Local files of every harness task with rows made up, and what is asked of them. Needs lm_eval."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

import eckart
from eckart.evals.harness import run_harness
from eckart.evals.harness_tasks import LOCAL_TASKS
from eckart.evals.result import EvalResult
from tiny import BOS, tiny_model, tiny_text, tiny_tokenizer, tiny_tokens

lm_eval = pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'eckart[tasks]'")

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
