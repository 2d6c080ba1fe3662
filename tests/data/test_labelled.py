"""Labelled sets: known ones from a folder, files of every kind, the draw, and what is refused."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from eckart.data.labelled import LABELLED, Labelled, read_labelled


def write_rows(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    with gzip.open(file, "wt") if file.suffix == ".gz" else file.open("w") as stream:
        stream.write(text)
    return file


def question(number: int, wrong: int) -> dict[str, Any]:
    choices = ["right", "also right", *(f"wrong {place}" for place in range(wrong))]
    return {"question": f"Why {number}?", "mc2_choices": choices, "mc2_labels": [1, 1] + [0] * wrong}


def test_a_known_set_is_read_from_a_folder(tmp_path: Path) -> None:
    write_rows(tmp_path / "cola" / "train.jsonl.gz", [{"text": "a", "label": 1}, {"text": "b", "label": 0}])
    write_rows(tmp_path / "cola" / "dev.jsonl", [{"text": "c", "label": 0}, {"text": "d", "label": 1}])
    train, dev = (read_labelled("cola", split=split, data=tmp_path) for split in ("train", "test"))
    assert (train.texts, train.labels, train.classes) == (("a", "b"), (1, 0), ("unacceptable", "acceptable"))
    assert dev.texts == ("c", "d")
    assert dev.source == {"corpus": "cola", "split": "test", "file": "dev.jsonl", "rows": 2}
    assert read_labelled("cola", split="test", data=tmp_path / "cola").texts == dev.texts  # the set's own folder


def test_truthfulqa_is_one_right_answer_to_four_wrong_ones(tmp_path: Path) -> None:
    write_rows(tmp_path / "truthfulqa" / "mc.v0.jsonl.gz", [question(0, 6), question(1, 3), question(2, 4)])
    rows = read_labelled("truthfulqa", split="test", data=tmp_path)
    assert Counter(rows.labels) == {1: 2, 0: 8}
    assert rows.groups == (0,) * 5 + (1,) * 5  # the answers to a question are one group
    assert rows.source["left_out"] == 1
    assert rows.texts[0] == "Q: Why 0? A: right"
    assert len(set(rows.texts)) == 10
    assert rows == read_labelled("truthfulqa", split="test", data=tmp_path)
    every = read_labelled("truthfulqa-iti", split="test", data=tmp_path)
    assert Counter(every.labels) == {1: 6, 0: 13}


def test_the_hub_and_a_folder_have_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hub's fields have other names: GLUE's text is `sentence`, TruthfulQA's answers are nested."""
    asked: list[tuple[Any, ...]] = []
    rows = {
        "nyu-mll/glue": [{"sentence": "a", "label": 1, "idx": 0}, {"sentence": "b", "label": 0, "idx": 1}],
        "truthfulqa/truthful_qa": [
            {"question": q["question"], "mc2_targets": {"choices": q["mc2_choices"], "labels": q["mc2_labels"]}}
            for q in (question(0, 6), question(1, 5))
        ],
    }

    def open_hub(hub: str, config: str | None, split: str) -> list[dict[str, Any]]:
        asked.append((hub, config, split))
        return rows[hub]

    monkeypatch.setattr("eckart.data.corpora.open_hub", open_hub)
    assert read_labelled("cola", split="test").texts == ("a", "b")
    write_rows(tmp_path / "mc.v0.jsonl", [question(0, 6), question(1, 5)])
    local = read_labelled("truthfulqa", split="test", data=tmp_path)
    assert read_labelled("truthfulqa", split="test").texts == local.texts
    assert asked == [
        ("nyu-mll/glue", "cola", "validation"),
        ("truthfulqa/truthful_qa", "multiple_choice", "validation"),
    ]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json", "rows.csv", "rows.tsv", "rows.parquet"])
def test_files_of_every_kind_give_the_same_rows(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    said = [{"said": "x, y", "kind": "b"}, {"said": "z", "kind": "a"}, {"said": "x, y", "kind": "b"}]
    if ".jsonl" in name:
        write_rows(file, said)
    elif name.endswith(".json"):
        file.write_text(json.dumps(said))
    elif name.endswith(".parquet"):
        Dataset.from_list(said).to_parquet(file)
    else:
        mark = "," if name.endswith("csv") else "\t"
        file.write_text(f'said{mark}kind\n"x, y"{mark}b\nz{mark}a\n"x, y"{mark}b\n')
    rows = read_labelled(str(file), column="said", label_column="kind")
    assert rows.texts == ("x, y", "z", "x, y")
    assert (rows.labels, rows.classes) == ((1, 0, 1), ("a", "b"))
    assert rows.groups == (0, 1, 0)  # the same text is one group


def test_rows_without_a_text_or_a_label_are_left_out_and_counted(tmp_path: Path) -> None:
    labels: list[dict[str, Any]] = [{"text": "a", "label": 1}, {"text": None, "label": 0}, {"text": "c", "label": None}]
    file = write_rows(tmp_path / "rows.jsonl", [*labels, {"text": "d", "label": 0}])
    with pytest.warns(UserWarning, match="2 of 4 rows have no text or no label and are left out"):
        rows = read_labelled(str(file))
    assert rows.texts == ("a", "d")
    assert rows.source == {"corpus": "rows.jsonl", "rows": 2, "skipped": 2}


def test_labels_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": str(n), "label": n} for n in (10, 9, 2, 10)])
    rows = read_labelled(str(file))
    assert rows.classes == ("2", "9", "10")
    assert rows.labels == (2, 1, 0, 2)


def test_a_draw_takes_whole_groups_and_keeps_their_order() -> None:
    groups = tuple(number // 5 for number in range(100))
    rows = Labelled(tuple(map(str, range(100))), tuple(n % 5 and 1 for n in range(100)), ("a", "b"), groups, {})
    for seed in range(5):
        drawn = rows.draw(42, seed)
        assert len(drawn) == 45
        assert all(count == 5 for count in Counter(drawn.groups).values())
        assert list(drawn.texts) == sorted(drawn.texts, key=int)
    assert rows.draw(42, 0) == rows.draw(42, 0) != rows.draw(42, 1)
    assert rows.draw(None) is rows
    assert rows.draw(100) is rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "a", "label": 1}], "fewer than two classes"),
        ([{"txt": "a", "label": 1}, {"txt": "b", "label": 0}], "row 1 has no text 'text'.*it has txt, label; choose"),
        ([{"text": "a"}, {"text": "b"}], "row 1 has no text 'text' with a 'label'"),
        ([{"text": "a", "label": 1}, {"text": 3, "label": 0}], "row 2: field 'text' holds no text but int"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": 7}], r"labels \[7\] are none of 0 ... 1"),
        ([{"text": "a", "label": 1}, {"text": "b", "label": "no"}], "a label is no number"),
    ],
)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, rows: list[dict[str, Any]], message: str) -> None:
    write_rows(tmp_path / "cola" / "train.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        read_labelled("cola", data=tmp_path)


def test_what_is_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "torn.jsonl").write_text('{"text": "a", "label": 1}\n{"text"')
    (tmp_path / "plain.txt").write_text("text")
    (tmp_path / "list.jsonl").write_text("[1, 2]\n")
    write_rows(tmp_path / "truthfulqa" / "mc.v0.jsonl", [{"question": "Why?"}])
    for name, split, message in (
        ("colla", "train", "no labelled set 'colla'"),
        ("cola", "validation", "cola has no split 'validation'; it has train, test"),
        ("truthfulqa", "train", "truthfulqa has no split 'train'; it has test"),
        ("truthfulqa", "test", "row 1: no question with mc2 choices"),
        ("sst2", "test", r"sst2: no file for split 'test' in .*; looked for dev.jsonl\*"),
        (str(tmp_path / "torn.jsonl"), "train", "line 2 is not JSON"),
        (str(tmp_path / "list.jsonl"), "train", "row 1 has no text 'text' with a 'label'; it has text"),
        (str(tmp_path), "train", "is a folder; name a file in it"),
        (str(tmp_path / "plain.txt"), "train", "is no table of texts with labels; give one of .jsonl"),
    ):
        with pytest.raises(ValueError, match=message):
            read_labelled(name, split=split, data=tmp_path)


def test_a_labelled_set_is_whole() -> None:
    with pytest.raises(ValueError, match="2 texts, 1 labels"):
        Labelled(("a", "b"), (0,), ("x",), (0, 1), {})
    with pytest.raises(ValueError, match="outside the 1 classes"):
        Labelled(("a",), (1,), ("x",), (0,), {})
    assert all(len(row.classes) == 2 for row in LABELLED.values())
