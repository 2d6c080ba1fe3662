"""Hub data sets, with the hub played by a function: no network."""

from collections.abc import Iterator
from typing import Any

import pytest

from eckart.data.corpora import CORPORA, read_text


def serve(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]] | Exception) -> list[tuple[Any, ...]]:
    """Answer `datasets.load_dataset` with `rows`; gives the list of calls."""
    calls: list[tuple[Any, ...]] = []

    def load_dataset(path: str, name: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        assert streaming, "a hub set may be terabytes"
        calls.append((path, name, split))
        if isinstance(rows, Exception):
            raise rows
        return iter(rows)

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    return calls


def test_a_known_corpus_is_asked_by_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = serve(monkeypatch, [{"text": ""}, {"text": " a b \n"}])
    text = read_text("wikitext2", split="test")
    assert calls == [("Salesforce/wikitext", "wikitext-2-raw-v1", "test")]
    assert text.joined == "\n\n a b \n"
    assert text.source["rows"] == 2


def test_any_set_by_owner_and_name(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = serve(monkeypatch, [{"body": "x"}, {"body": "y"}])
    assert read_text("owner/name:en", split="train", column="body").documents == ("x", "y")
    assert calls == [("owner/name", "en", "train")]
    with pytest.raises(ValueError, match="no text field 'text'; it has body"):
        read_text("owner/name")


def test_a_big_set_is_read_only_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "t"}] * (CORPORA["c4"].rows + 5)
    serve(monkeypatch, rows)
    assert len(read_text("c4").documents) == CORPORA["c4"].rows


def test_what_the_hub_says_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, ConnectionError("no route"))
    with pytest.raises(ValueError, match=r"the hub did not give .*no route.*local"):
        read_text("wikitext2")
    serve(monkeypatch, [])
    with pytest.raises(ValueError, match="no rows"):
        read_text("ptb")
    with pytest.raises(ValueError, match="no split 'train' on the hub"):
        read_text("japanese")


def test_a_set_with_a_loading_script_is_read_from_its_converted_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    revisions: list[str | None] = []

    def load_dataset(*_args: Any, revision: str | None = None, **_options: Any) -> Iterator[dict[str, Any]]:
        revisions.append(revision)
        if revision is None:
            raise RuntimeError("Dataset scripts are no longer supported, but found ptb_text_only.py")
        return iter([{"sentence": " a <unk> "}])

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert read_text("ptb", split="test").documents == ("a <unk>",)
    assert revisions == [None, "refs/convert/parquet"]


def test_rows_without_a_text_field_are_composed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = serve(monkeypatch, [{"goal": "To cut,", "sol1": "use a knife.", "sol2": "use soup.", "label": 0}])
    assert read_text("piqa").documents == ("To cut, use a knife.",)
    assert calls == [("ybisk/piqa", None, "train")]
    assert read_text("piqa", column="goal").documents == ("To cut,",)


def test_a_story_that_stands_before_each_of_its_questions_is_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, [{"story": story, "question": str(n)} for story in ("one", "two") for n in range(4)])
    assert read_text("mctest", split="test").documents == ("one", "two")
    serve(monkeypatch, [{"sentence": "same"}, {"sentence": "same"}])
    assert read_text("ptb", split="test").documents == ("same", "same")
