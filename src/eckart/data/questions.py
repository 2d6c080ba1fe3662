"""Questions: rows of the commonsense tasks as text, each question with its right answer (SFSD calibrates on them)."""

from __future__ import annotations

from typing import Any


def answered(row: dict[str, Any]) -> str:
    """A question and its right answer, from a row with `question` and/or `context`, `choices` and `answer` (from 0)."""
    asked = " ".join(str(row[key]) for key in ("context", "question") if row.get(key))
    return fill(asked, row["choices"][int(row["answer"])])


def fill(asked: str, answer: str) -> str:
    """The answer in the blank "_" where there is one, else after the question."""
    return asked.replace("_", answer) if "_" in asked else f"{asked} {answer}"


def boolq(row: dict[str, Any]) -> str:
    """A row of google/boolq."""
    return f"{row['passage']} {row['question']} {'yes' if row['answer'] else 'no'}"


def piqa(row: dict[str, Any]) -> str:
    """A row of ybisk/piqa."""
    return fill(row["goal"], row["sol2"] if int(row["label"]) else row["sol1"])


def hellaswag(row: dict[str, Any]) -> str:
    """A row of Rowan/hellaswag."""
    return f"{row['ctx']} {row['endings'][int(row['label'])]}"


def winogrande(row: dict[str, Any]) -> str:
    """A row of allenai/winogrande; its answers count from 1."""
    return fill(row["sentence"], row[f"option{row['answer']}"])


def arc(row: dict[str, Any]) -> str:
    """A row of allenai/ai2_arc; its answers are labels, letters or digits."""
    choices = row["choices"]
    return fill(row["question"], choices["text"][choices["label"].index(row["answerKey"])])
