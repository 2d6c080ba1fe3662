"""Commonsense rows as text: one row of each layout, by hand."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from eckart.data import questions
from eckart.data.corpora import CORPORA, read_text
from eckart.data.mixtures import MIXTURES


def test_every_layout() -> None:
    assert questions.answered({"question": "What is it?", "choices": ["a cat", "a dog"], "answer": 1}) == (
        "What is it? a dog"
    )
    assert questions.answered({"context": "Roof: a man", "choices": ["sits.", "runs."], "answer": 0}) == (
        "Roof: a man sits."
    )
    assert questions.answered({"question": "Ann met Bo, so _ left.", "choices": ["Ann", "Bo"], "answer": 1}) == (
        "Ann met Bo, so Bo left."
    )
    assert questions.boolq({"passage": "Ice is cold.", "question": "is ice warm", "answer": False}) == (
        "Ice is cold. is ice warm no"
    )
    assert questions.piqa({"goal": "To cut,", "sol1": "use a knife.", "sol2": "use soup.", "label": 0}) == (
        "To cut, use a knife."
    )
    assert questions.hellaswag({"ctx": "He", "endings": ["flies.", "walks."], "label": "1"}) == "He walks."
    assert questions.winogrande({"sentence": "_ won.", "option1": "Al", "option2": "Cy", "answer": "2"}) == "Cy won."
    assert questions.arc(
        {"question": "Which?", "choices": {"text": ["x", "y"], "label": ["1", "2"]}, "answerKey": "2"}
    ) == ("Which? y")


def test_local_rows_are_questions_or_texts(tmp_path: Path) -> None:
    folder = tmp_path / "arc_easy"
    folder.mkdir()
    rows = [{"question": "Which?", "choices": ["x", "y"], "answer": 0}, {"text": "A plain text."}]
    with gzip.open(folder / "train.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    assert read_text("arc_easy", data=tmp_path).documents == ("Which? x", "A plain text.")


def test_a_mixture_is_made_of_rows_of_the_table() -> None:
    for parts in MIXTURES.values():
        assert all(part in CORPORA for part in parts)


def test_a_question_without_its_answer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps({"question": "Which?", "choices": ["x"]}))
    with pytest.raises(ValueError, match=r"train\.jsonl has no text field 'text'.*it has question, choices"):
        read_text("arc_easy", data=tmp_path)
