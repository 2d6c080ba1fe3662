"""StereoSet's clusters: read from files and the hub, split for searches, and the word in their blank."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from eckart.evals import stereoset as module
from eckart.evals.stereoset import Cluster, StereoSet, find_word, read_stereoset
from places import SHARED

from .stereoset_models import cluster_of, tiny_clusters


def test_search_and_evaluation_clusters_are_disjoint_and_all_there_are() -> None:
    counts = {"intrasentence": 12, "intersentence": 7}
    parts = {
        part: tuple(cluster_of(part, n, "BLANK", "w1", "w2", "w3") for n in range(counts[part])) for part in counts
    }
    whole = StereoSet(**parts, source={"split": "dev"})
    search, evaluation = whole.take("sfsd-search"), whole.take("sfsd-evaluation")
    assert whole.take("test") is whole
    for part, count in counts.items():
        first, second = getattr(search, part), getattr(evaluation, part)
        assert len(first) == count // 5
        assert not set(first) & set(second)
        assert sorted([*first, *second], key=parts[part].index) == list(parts[part])
    assert search.source == {"split": "dev", "part": "sfsd-search", "split_seed": 0}
    assert len({whole.digest, search.digest, evaluation.digest}) == 3
    with pytest.raises(ValueError, match="stereoset: no split 'train'"):
        whole.take("train")
    with pytest.raises(ValueError, match="stereoset: 3 documents are too few"):
        tiny_clusters().take("sfsd-search")


def test_words_are_found_as_the_authors_do() -> None:
    def word(context: str, sentence: str) -> str:
        return find_word(cluster_of("intrasentence", 7, context, "", "", ""), sentence)

    assert word("the BLANK, man", "the happy, man") == "happy"
    assert word("a BLANK's hat", "a nurse's hat") == "nurses"
    assert word("BLANK is BLANK", "one is two") == "two"
    with pytest.raises(ValueError, match=r"intrasentence\[7\]: 'the' has no word for the blank of 'the BLANK'"):
        word("the BLANK", "the")
    with pytest.raises(ValueError, match="has no word for the blank"):
        word("the BLANK", "the ...")


def one(label: str | int, text: str = "x") -> dict[str, Any]:
    return {"sentence": text, "gold_label": label}


def content_of(**changes: Any) -> dict[str, Any]:
    three = [one("unrelated", "u BLANK"), one("stereotype", "s"), one("anti-stereotype", "a")]
    cluster = {"target": "t", "bias_type": "race", "context": "a BLANK", "sentences": three}
    return {"version": "1", "data": {"intrasentence": [cluster, {**cluster, **changes}], "intersentence": [cluster]}}


def write(folder: Path, content: Any) -> Path:
    (folder / "dev.json").write_text(json.dumps(content))
    return folder


def test_reading_puts_sentences_in_order(tmp_path: Path) -> None:
    read = read_stereoset(write(tmp_path, content_of()))
    assert read.intrasentence[1] == Cluster("t", "race", "a BLANK", ("s", "a", "u BLANK"), "intrasentence[1]")
    assert (len(read.intersentence), read.source) == (1, {"file": "dev.json", "split": "dev"})
    inner = tmp_path / "data"
    (inner / "stereoset").mkdir(parents=True)
    with gzip.open(inner / "stereoset" / "dev.json.gz", "wt") as file:
        json.dump(content_of(), file)
    assert read_stereoset(inner).intrasentence == read.intrasentence
    assert read_stereoset(inner).digest == read.digest
    assert read_stereoset(write(tmp_path, content_of(context="b BLANK"))).digest != read.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": None}, r"intrasentence\[1\] has no field 'target'"),
        ({"context": " "}, r"intrasentence\[1\] has no field 'context', or no text"),
        ({"bias_type": "age"}, r"intrasentence\[1\] has bias_type 'age'; known: gender"),
        ({"context": "no gap"}, r"intrasentence\[1\] has no BLANK"),
        ({"sentences": None}, r"intrasentence\[1\] has no field 'sentences'"),
        (
            {"sentences": [one("stereotype"), one("unrelated")]},
            r"\[1\] has no sentence with gold_label 'anti-stereotype'",
        ),
        ({"sentences": [one("stereotype"), one("stereotype")]}, r"\[1\], sentence 1 is a second sentence"),
        ({"sentences": [one("related")]}, r"\[1\], sentence 0 has gold_label 'related'"),
        ({"sentences": [one(7)]}, r"\[1\], sentence 0 has gold_label 7"),
        ({"sentences": ["x"]}, r"\[1\], sentence 0 has gold_label None"),
        ({"sentences": [one("stereotype", "")]}, r"\[1\], sentence 0 has no field 'sentence'"),
        ({"sentences": {"sentence": ["x"]}}, r"\[1\] has no field 'sentence' or 'gold_label'"),
    ],
)
def test_fields_that_are_missing_or_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"dev\.json: intrasentence.*{message.removeprefix('intrasentence')}"):
        read_stereoset(write(tmp_path, content_of(**changes)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not readable as JSON"),
        ("[]", "has no field 'data'"),
        ('{"data": {}}', "no cluster in 'intrasentence'"),
        ('{"data": {"intrasentence": []}}', "no cluster in 'intrasentence'"),
        ('{"data": {"intrasentence": [3], "intersentence": []}}', r"intrasentence\[0\] has no field 'target'"),
    ],
)
def test_files_that_hold_nothing(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "dev.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_stereoset(tmp_path)


def test_no_file_and_no_archive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no dev\.json or dev\.json\.gz in .*stereoset or "):
        read_stereoset(tmp_path)
    (tmp_path / "dev.json.gz").write_text("no archive")
    with pytest.raises(ValueError, match=r"dev\.json\.gz is not readable as UTF-8 text: Not a gzipped file"):
        read_stereoset(tmp_path)


def test_the_hub_gives_lists_and_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    asked: list[tuple[str, str, str]] = []
    columns = {"sentence": ["u BLANK", "s", "a"], "gold_label": [2, 1, 0], "id": ["1", "2", "3"]}

    def load(name: str, config: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        return [{"id": "0", "target": "t", "bias_type": "race", "context": "a BLANK", "sentences": columns}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    read = read_stereoset(None)
    local = read_stereoset(write(tmp_path, content_of()))
    assert read.intersentence == local.intersentence
    assert read.intrasentence == local.intrasentence[:1]
    assert asked == [(module.HUB, part, "validation") for part in ("intrasentence", "intersentence")]

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"the hub did not give McGill-NLP/stereoset .*no network.*local copy"):
        read_stereoset(None)


@pytest.mark.skipif(
    not (SHARED / "data/stereoset").is_dir(), reason="needs ../shared/data, which is not part of the project"
)
def test_the_real_file() -> None:
    read = read_stereoset(SHARED / "data")
    assert (len(read.intrasentence), len(read.intersentence)) == (2106, 2123)
    assert len({cluster.target for cluster in (*read.intrasentence, *read.intersentence)}) == 79
    assert all(find_word(cluster, sentence) for cluster in read.intrasentence for sentence in cluster.sentences)
