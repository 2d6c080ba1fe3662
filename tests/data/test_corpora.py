"""Corpora: files and known data sets become text in the usual way, and text becomes windows or padded documents."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from eckart.data.corpora import CORPORA, is_hub_name, read_text
from tiny import tiny_text, tiny_tokenizer


def lines(*rows: object) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text, encoding="utf-8")
    return path


# Files


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_text_file_is_one_document(tmp_path: Path, suffix: str) -> None:
    text = read_text(str(write(tmp_path / f"a.txt{suffix}", "One é\n\n  two \n")))
    assert text.documents == ("One é\n\n  two \n",)
    assert text.joined == "One é\n\n  two \n"
    assert text.source == {"corpus": f"a.txt{suffix}"}


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_json_lines_are_a_document_each(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / name, lines({"text": "One é", "n": 1}) + "\n" + lines({"text": "two\n"}))
    text = read_text(str(path))
    assert text.documents == ("One é", "two\n")
    assert text.joined == "One é\n\ntwo\n"


def test_a_named_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"text": "no", "body": "yes"}))
    assert read_text(str(path), column="body").documents == ("yes",)


def test_plain_text_has_no_field_to_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "One")
    for name in (str(path), "builtin/prose"):
        with pytest.raises(ValueError, match=f"{name} is plain text, which has no field 'body': leave column out"):
            read_text(name, column="body")
    (tmp_path / "ptb").mkdir()
    write(tmp_path / "ptb" / "ptb.train.txt", "a row\n")
    with pytest.raises(ValueError, match=r"ptb\.train\.txt is plain text, which has no field 'body'"):
        read_text("ptb", data=tmp_path, column="body")


def test_a_missing_field_names_the_fields_and_how_to_choose(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"body": "b", "title": "t"}, {"body": "c", "title": "u"}))
    with pytest.raises(
        ValueError, match=r"a\.jsonl has no text field 'text' .*; it has body, title; choose .*--column"
    ):
        read_text(str(path))
    with pytest.raises(ValueError, match=r"a\.jsonl has no text field 'bod'; it has body, title"):
        read_text(str(path), column="bod")


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"text": 3}, "row 2: field 'text' holds no text but int: 3"),
        (["text"], "line 2 holds no row of fields but a list"),
        ({"text": ["a", "b"]}, "row 2: field 'text' is no conversation"),
    ],
)
def test_a_row_of_another_kind_is_named(tmp_path: Path, row: object, what: str) -> None:
    path = write(tmp_path / "a.jsonl", lines({"text": "fine"}, row))
    with pytest.raises(ValueError, match=rf"a\.jsonl: {what}"):
        read_text(str(path))


TABLE = (('One é, "two"', "7"), (None, "8"), ("NA", "009"), ("None\nnull", "10"))


def table(path: Path) -> Path:
    """The rows of TABLE in the form that the file's name asks for."""
    rows = [{"id": number, "text": text} for text, number in TABLE]
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(path)
        return path
    if ".jsonl" in path.suffixes:
        return write(path, lines(*rows))
    if path.suffix == ".json":
        return write(path, json.dumps(rows, indent=1))
    file = io.StringIO()
    csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows(
        [["id", "text"], *((n, t) for t, n in TABLE)]
    )
    return write(path, file.getvalue())


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet", "a [1].csv"])
def test_tables_of_every_kind_have_the_same_text(tmp_path: Path, name: str) -> None:
    with pytest.warns(UserWarning, match="1 of 4 rows have no text and are left out"):
        text = read_text(str(table(tmp_path / name)))
    assert text.documents == ('One é, "two"', "NA", "None\nnull")
    assert text.source == {"corpus": name, "skipped": 1}
    assert read_text(str(tmp_path / name), column="id").documents == ("7", "8", "009", "10")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
def test_a_byte_order_mark_is_no_text(tmp_path: Path, name: str) -> None:
    content = {".txt": "x", ".jsonl": '{"text": "x"}', ".json": '[{"text": "x"}]', ".csv": "text,id\nx,1\n"}
    write(tmp_path / name, "\ufeff" + content[Path(name).suffix])
    assert read_text(str(tmp_path / name)).documents == ("x",)


@pytest.mark.parametrize("half", [r"a\ud800b", r"a\udc00b", r"\ud83d\ud83d\ude00", r"\\\ud800"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_half_a_character_names_its_line(tmp_path: Path, name: str, half: str) -> None:
    rows = ['{"text": "x"}', f'{{"text": "{half}"}}']
    write(tmp_path / name, "\n".join(rows) if name == "a.jsonl" else "[" + ",\n".join(rows) + "]")
    with pytest.raises(ValueError, match=rf"{name}: line 2 holds half a character"):
        read_text(str(tmp_path / name))


def test_whole_characters_in_two_halves_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", r'{"text": "\ud83d\ude00 \\ud800"}')
    assert read_text(str(path)).documents == ("\U0001f600 \\ud800",)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("text,id\nx,1\ny,2,3,4\n", "Expected 2 fields in line 3, saw 4"),
        ("text,id\nx,1,3,4\n", "more fields than its first line has names"),
        ("text,id\n", "holds no text: it has no rows"),
    ],
)
def test_a_damaged_csv_is_refused(tmp_path: Path, content: str, what: str) -> None:
    with pytest.raises(ValueError, match=rf"a\.csv .*{what}"):
        read_text(str(write(tmp_path / "a.csv", content)))


def test_a_damaged_parquet_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.parquet is not readable as parquet"):
        read_text(str(write(tmp_path / "a.parquet", "no such thing")))


# Conversations

TEMPLATE = "{% for m in messages %}<s> {{ m.role }}: {{ m.content }}</s>{% endfor %}"
CHATS = [
    {"messages": [{"role": "user", "content": "w0"}, {"role": "assistant", "content": "w1"}]},
    {"messages": [{"role": "user", "content": "w2"}]},
]


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_conversations_go_through_the_chat_template(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        Dataset.from_list(CHATS).to_parquet(path)
    else:
        write(path, lines(*CHATS))
    tokenizer = tiny_tokenizer(chat_template=TEMPLATE)
    text = read_text(str(path), tokenizer=tokenizer)
    assert text.documents == ("<s> user: w0</s><s> assistant: w1</s>", "<s> user: w2</s>")
    assert text.joined == "".join(text.documents)
    assert text.templated


def test_conversations_without_a_template_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines(*CHATS))
    for tokenizer in (None, tiny_tokenizer()):
        with pytest.raises(ValueError, match=r"row 1: field 'messages' is a conversation, .* no chat template"):
            read_text(str(path), tokenizer=tokenizer)
    strict = tiny_tokenizer(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(ValueError, match=r"row 1: the tokenizer's chat template refuses it: roles must alternate"):
        read_text(str(path), tokenizer=strict)


def test_texts_and_conversations_are_not_mixed(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({**CHATS[0], "text": None}, {"text": "x", "messages": None}))
    with pytest.raises(ValueError, match="holds texts and conversations; choose a field"):
        read_text(str(path), tokenizer=tiny_tokenizer(chat_template=TEMPLATE))


# Folders, and what is too long


@pytest.mark.parametrize("name", ["corpus", "owner/name"])
def test_a_folder_is_no_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match=f"corpus '{name}' is a folder: name a file in it"):
        read_text(name)
    with pytest.raises(ValueError, match="is a folder"):
        read_text(str(tmp_path))


@pytest.mark.parametrize("name", ["/no/such/folder", "./corpus/text", "a/b/c", "owner/rows.jsonl", "owner/rows.txt.gz"])
def test_a_path_is_not_asked_of_the_hub(name: str) -> None:
    assert not is_hub_name(name)
    with pytest.raises(ValueError, match="no corpus"):
        read_text(name)


@pytest.mark.parametrize(
    "name", ["owner/name", "owner/name:en", "HuggingFaceFW/fineweb-edu:sample-10BT", "o/name-v1.5"]
)
def test_a_hub_name_may_have_dots(name: str) -> None:
    assert is_hub_name(name)


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.jsonl", "a.jsonl.gz", "a.csv", "a.parquet"])
def test_a_bound_on_the_text_that_a_variable_lifts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    long = "word " * 250_000  # 1.2 MiB
    if name == "a.parquet":
        Dataset.from_list([{"text": long}]).to_parquet(tmp_path / name)
    else:
        content = {".txt": long, ".jsonl": lines({"text": long}), ".csv": f"text,id\n{long},1\n"}
        write(tmp_path / name, content[Path(name).suffixes[0]])
    monkeypatch.setenv("ECKART_TEXT_LIMIT", "1")
    with pytest.raises(ValueError, match=rf"{name} holds more than 1 MiB of text; .*ECKART_TEXT_LIMIT"):
        read_text(str(tmp_path / name))
    for lifted in ("2", "0"):
        monkeypatch.setenv("ECKART_TEXT_LIMIT", lifted)
        assert read_text(str(tmp_path / name)).joined == long
    monkeypatch.setenv("ECKART_TEXT_LIMIT", "many")
    with pytest.raises(ValueError, match="ECKART_TEXT_LIMIT='many' is no whole number of MiB"):
        read_text(str(tmp_path / name))


def test_a_small_archive_of_a_large_file_is_not_unpacked(tmp_path: Path) -> None:
    """300 MB in 300 kB: no more than the bound is read."""
    with gzip.open(tmp_path / "a.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(300):
            file.write(bytes(2**20))
    tracemalloc.start()
    with pytest.raises(ValueError, match="holds more than 64 MiB of text"):
        read_text(str(tmp_path / "a.txt.gz"))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 200 * 2**20


def test_bad_json_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", lines({"text": "fine"}) + "\n" + '{"text": "cut\n')
    with pytest.raises(ValueError, match=r"a\.jsonl: line 3 is not JSON"):
        read_text(str(path))


@pytest.mark.parametrize("content", ["", " \n\t\n"])
def test_an_empty_corpus_is_refused(tmp_path: Path, content: str) -> None:
    with pytest.raises(ValueError, match=r"holds no text"):
        read_text(str(write(tmp_path / "a.txt", content)))
    with pytest.raises(ValueError, match=r"holds no text"):
        read_text(str(write(tmp_path / "a.jsonl", lines({"text": content}) if content else "")))
    with pytest.raises(ValueError, match=r"a\.csv holds no text"):
        read_text(str(write(tmp_path / "a.csv", content)))


def corrupted(data: bytes) -> bytes:
    return data[:20] + bytes(byte ^ 0xFF for byte in data[20:40]) + data[40:]


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("a.txt", lambda _: "Grüße".encode("latin-1")),
        ("a.txt.gz", lambda _: b"this is no archive"),
        ("a.txt.gz", lambda data: data[:-20]),
        ("a.txt.gz", corrupted),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path: Path, name: str, damage: Any) -> None:
    path = write(tmp_path / name, tiny_text(100))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"{name} is not readable as UTF-8 text"):
        read_text(str(path))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wikitex2", "no corpus 'wikitex2': did you mean 'wikitext2'?"),
        ("poems", "no corpus 'poems': known names are builtin, wikitext2, ptb, c4"),
        ("no_such_file.txt", "no corpus 'no_such_file.txt': there is no such file"),
        ("folder/no_such_file.txt", "no corpus 'folder/no_such_file.txt': there is no such file"),
    ],
)
def test_an_unknown_name_says_what_there_is(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_text(name)


# The built-in corpus


def test_builtin_has_domains_and_a_held_out_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eckart.data.corpora.builtin_texts", lambda domain, part: (f"{domain} {part}", "more"))
    assert read_text("builtin").joined == "prose train\n\nmore\n\ncode train\n\nmore"
    assert read_text("builtin/code").documents == ("code train", "more")
    for split in ("test", "validation"):
        assert read_text("builtin/prose", split=split).documents == ("prose heldout", "more")
    assert read_text("builtin/code").source == {"corpus": "builtin/code", "split": "train"}


def test_builtin_has_no_other_domain() -> None:
    with pytest.raises(ValueError, match="poetry"):
        read_text("builtin/poetry")


@pytest.mark.parametrize("name", ["builtin", "builtin/code"])
def test_builtin_has_no_other_split(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}: no split 'tst'; there are train, validation, test"):
        read_text(name, split="tst")


# Known corpora in a local folder

WIKI_LINES = " \n = Title = \n \n Some text . \n"
WIKI_ROWS = ["", " = Title = \n", "", " Some text . \n"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("wiki.test.raw", "test"),
        ("wiki.valid.raw", "validation"),
        ("raw.train.txt", "train"),
        ("raw.test.txt.gz", "test"),
    ],
)
def test_wikitext_rows_are_those_of_the_hub(tmp_path: Path, name: str, split: str) -> None:
    write(tmp_path / "wikitext2" / name, WIKI_LINES)
    text = read_text("wikitext2", split=split, data=tmp_path)
    assert list(text.documents) == WIKI_ROWS
    assert text.joined == "\n\n".join(WIKI_ROWS)
    assert text.source == {"corpus": "wikitext2", "split": split, "file": name}


def test_wikitext_is_the_same_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: iter([{"text": row} for row in WIKI_ROWS]))
    write(tmp_path / "wikitext2" / "wiki.test.raw", WIKI_LINES)
    hub, local = read_text("wikitext2", split="test"), read_text("wikitext2", split="test", data=tmp_path)
    assert hub.joined == local.joined


def test_ptb_lines_are_stripped_and_joined_as_svd_llm_joins_them(tmp_path: Path) -> None:
    write(tmp_path / "ptb" / "ptb.test.txt", " no it was n't black monday \n but while <unk> \n")
    text = read_text("ptb", split="test", data=tmp_path)
    assert text.documents == ("no it was n't black monday", "but while <unk>")
    assert text.joined == "no it was n't black monday\n\nbut while <unk>"


def test_the_corpus_own_field_is_known(tmp_path: Path) -> None:
    write(tmp_path / "alpaca_eval" / "eval.jsonl", lines({"instruction": "Say é", "output": "é"}))
    write(tmp_path / "cmrc2018" / "cmrc_dev.jsonl.gz", lines({"context": "文"}, {"context": "字"}))
    assert read_text("alpaca_eval", split="test", data=tmp_path).documents == ("Say é",)
    assert read_text("cmrc2018", split="test", data=tmp_path).joined == "文\n\n字"
    assert read_text("alpaca_eval", split="test", data=tmp_path, column="output").documents == ("é",)


def test_the_folder_of_one_corpus_may_be_given_itself(tmp_path: Path) -> None:
    write(tmp_path / "raw.test.txt", WIKI_LINES)
    assert list(read_text("wikitext2", split="test", data=tmp_path).documents) == WIKI_ROWS


def test_the_corpus_own_folder_comes_first(tmp_path: Path) -> None:
    write(tmp_path / "wiki.test.raw", "somebody else's\n")
    write(tmp_path / "wikitext2" / "raw.test.txt", WIKI_LINES)
    assert list(read_text("wikitext2", split="test", data=tmp_path).documents) == WIKI_ROWS


def test_c4_train_is_not_taken_for_the_test_split(tmp_path: Path) -> None:
    write(tmp_path / "c4" / "c4-train.00000-of-01024.json.gz", lines({"text": "train"}))
    with pytest.raises(ValueError, match="c4: no file for split 'test'"):
        read_text("c4", split="test", data=tmp_path)
    write(tmp_path / "c4" / "c4-validation.00000-of-00008.json.gz", lines({"text": "validation"}))
    assert read_text("c4", split="test", data=tmp_path).documents == ("validation",)
    assert read_text("c4", split="train", data=tmp_path).documents == ("train",)


@pytest.mark.parametrize("name", CORPORA)
def test_a_split_without_a_file_says_what_was_looked_for(tmp_path: Path, name: str) -> None:
    pattern = CORPORA[name].files["test"][0]
    with pytest.raises(ValueError, match="no file for split 'test'") as caught:
        read_text(name, split="test", data=tmp_path)
    assert pattern in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match="nothing, the corpus has no such split"):
        read_text(name, split="dev", data=tmp_path)
