"""Hub data sets, with the hub played by a function or by a folder: no network."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.hf_api import SPECIAL_REFS_REVISION_REGEX

from eckart.data.corpora import CONVERTED, CORPORA, open_converted, read_text


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
    with pytest.raises(ValueError, match="no text field 'text' or 'messages'; it has body; choose a field by `column`"):
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


# Sets with a loading script: a folder laid out as the hub's branch of converted copies


def branch(folder: Path, files: dict[str, list[dict[str, Any]]]) -> Path:
    """A branch of parquet files, CONFIG/SPLIT/0000.parquet, and what else lies in it."""
    for name, rows in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Dataset.from_list(rows).to_parquet(folder / name)
    (folder / ".gitattributes").write_text("*.parquet filter=lfs\n")
    return folder


def texts(rows: Iterable[Any], field: str = "text") -> list[str]:
    return [row[field] for row in rows]


def test_a_branch_of_converted_copies_is_read_by_configuration_and_split(tmp_path: Path) -> None:
    root = str(
        branch(
            tmp_path,
            {
                "mc160/train/0000.parquet": [{"text": "no"}],
                "mc160/test/0000.parquet": [{"text": "one"}],
                "mc160/test/0001.parquet": [{"text": "two"}],
                "mc500/test/0000.parquet": [{"text": "no"}],
                "mc500/partial-train/0000.parquet": [{"text": "the first of many"}],
            },
        )
    )
    assert texts(open_converted(root, "mc160", "test")) == ["one", "two"]
    assert texts(open_converted(root, "mc500", "train")) == ["the first of many"]
    with pytest.raises(ValueError, match="no configuration 'mc1'; it has mc160, mc500"):
        open_converted(root, "mc1", "test")
    with pytest.raises(ValueError, match="no configuration 'default'; it has mc160, mc500"):
        open_converted(root, None, "test")
    with pytest.raises(ValueError, match="no split 'validation' in mc500; it has train, test"):
        open_converted(root, "mc500", "validation")


def test_a_split_called_eval_keeps_its_name(tmp_path: Path) -> None:
    """`load_dataset` by itself takes a folder of that name for the split "test"."""
    root = branch(tmp_path, {"alpaca_eval/eval/0000.parquet": [{"instruction": "Say é"}]})
    assert texts(open_converted(str(root), "alpaca_eval", "eval"), "instruction") == ["Say é"]


def test_a_set_of_one_configuration_needs_no_name(tmp_path: Path) -> None:
    root = branch(tmp_path, {"plain_text/train/0000.parquet": [{"goal": "To cut,"}]})
    assert texts(open_converted(str(root), None, "train"), "goal") == ["To cut,"]


SCRIPTED: dict[str, dict[str, list[dict[str, Any]]]] = {
    "ptb": {"penn_treebank/test/0000.parquet": [{"sentence": " a <unk> "}]},
    "alpaca_eval": {"alpaca_eval/eval/0000.parquet": [{"instruction": "a <unk>", "output": "no"}]},
    "mctest": {"mc160/test/0000.parquet": [{"story": "a <unk>", "question": str(n)} for n in range(4)]},
    "piqa": {"plain_text/validation/0000.parquet": [{"goal": "a", "sol1": "<unk>", "sol2": "no", "label": 0}]},
}


@pytest.mark.parametrize("name", SCRIPTED)
def test_a_known_set_with_a_loading_script_is_read_from_its_converted_copy(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`datasets` itself refuses the folder of the script; only the address of the branch is another one here."""
    monkeypatch.chdir(tmp_path)
    corpus = CORPORA[name]
    assert corpus.hub is not None
    script = tmp_path / corpus.hub / f"{corpus.hub.partition('/')[2]}.py"
    script.parent.mkdir(parents=True)
    script.write_text("raise SystemError('this is never run')\n")
    branch(tmp_path / "branch", SCRIPTED[name])
    asked: list[str] = []

    def opened(root: str, config: str | None, split: str) -> Iterable[Any]:
        asked.append(root)
        return open_converted(str(tmp_path / "branch"), config, split)

    monkeypatch.setattr("eckart.data.corpora.open_converted", opened)
    assert read_text(name, split="test").documents == ("a <unk>",)
    assert asked == [f"hf://datasets/{corpus.hub}@refs/convert/parquet"]


def test_the_address_of_a_branch_is_one_that_the_hub_knows() -> None:
    """The hub's file system keeps the revision whole, slashes and all."""
    assert SPECIAL_REFS_REVISION_REGEX.search(CONVERTED).group() == CONVERTED  # type: ignore[union-attr]


def test_a_gated_set_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, DatasetNotFoundError("Dataset 'owner/name' is a gated dataset on the Hub."))
    with pytest.raises(ValueError, match=r"accept its terms on https://huggingface.co/datasets/owner/name, .*HF_TOKEN"):
        read_text("owner/name")


def test_a_wrong_field_names_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, [{"instruction_ja": "x", "output": "y"}])
    with pytest.raises(ValueError, match="japanese has no text field 'instruction'; it has instruction_ja, output"):
        read_text("japanese", split="test")
    assert read_text("japanese", split="test", column="instruction_ja").documents == ("x",)


def test_rows_without_text_are_left_out_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    serve(monkeypatch, [{"text": "x"}, {"text": None}, {"text": "y"}])
    with pytest.warns(UserWarning, match="owner/name: 1 of 3 rows have no text"):
        text = read_text("owner/name")
    assert text.documents == ("x", "y")
    assert text.source["skipped"] == 1


def test_the_papers_splits_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """NSVD: the test split, else the training split; C4 has neither labels nor a test split, SVD-LLM validates."""
    expected = {
        "wikitext2": "test", "ptb": "test", "c4": "validation", "snips": "test", "alpaca_eval": "eval",
        "mctest": "test", "cmrc2018": "test", "japanese": "train",
    }  # fmt: skip
    for name, split in expected.items():
        calls = serve(monkeypatch, [{CORPORA[name].column: "x"}])
        assert read_text(name, split="test").documents == ("x\n" if name == "wikitext2" else "x",)
        assert calls[0][2] == split, name
    assert CORPORA["mctest"].config == "mc160"


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
