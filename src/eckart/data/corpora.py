"""Corpora: names in, text out. Known data sets, files, the hub, and the text that comes with Python."""

from __future__ import annotations

import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eckart.data import questions
from eckart.data.builtin import builtin_texts


@dataclass(frozen=True)
class Text:
    """Documents, and how they are joined into one stream."""

    documents: tuple[str, ...]
    joiner: str
    source: dict[str, Any]

    @property
    def joined(self) -> str:
        return self.joiner.join(self.documents)


@dataclass(frozen=True)
class Corpus:
    """A row of the table: where a known corpus lives on the hub and in a folder, and how its rows make one text.

    Attributes:
        hub, config: data set and configuration on the Hugging Face hub; None where it is only local.
        splits: {split: the hub's name for it}.
        column: the field that holds the text.
        joiner: put between rows.
        files: {split: shell patterns of local files, the first match is read}, inside DATA/<corpus name>/, or inside
            DATA/ where there is no such folder.
        row: applied to each row's text.
        compose: from a whole hub row to its text, where no single field holds it; local rows of such a corpus are
            questions with choices, or texts.
        distinct: a row for each question repeats its text on the hub; each text is read once. A text that is read again
            and again is predicted from its own copy, and its perplexity is too low.
        rows: read from the hub at most; it has sets of terabytes, and WikiText-2's 36,718 rows are plenty.
    """

    hub: str | None
    config: str | None
    splits: dict[str, str]
    column: str
    joiner: str
    files: dict[str, tuple[str, ...]]
    row: Callable[[str], str] = str
    compose: Callable[[dict[str, Any]], str] | None = None
    distinct: bool = False
    rows: int = 50_000


def _wikitext_row(line: str) -> str:
    """A line as the hub's rows have it: empty, or with its line end."""
    return line.rstrip("\n") + "\n" if line.strip() else ""


def _questions(hub: str, config: str | None, compose: Callable[[dict[str, Any]], str]) -> Corpus:
    """A commonsense task's row."""
    files = {"train": ("train*.jsonl*",), "test": ("dev.jsonl*", "val.jsonl*", "test.jsonl*")}
    splits = {"train": "train", "test": "validation"}
    return Corpus(hub, config, splits, "text", "\n", files, compose=compose)


CORPORA: dict[str, Corpus] = {
    "wikitext2": Corpus(
        "Salesforce/wikitext",
        "wikitext-2-raw-v1",
        {"train": "train", "validation": "validation", "test": "test"},
        "text",
        "\n\n",
        {
            "train": ("wiki.train.raw*", "raw.train*.txt*"),
            "validation": ("wiki.valid.raw*", "raw.valid*.txt*"),
            "test": ("wiki.test.raw*", "raw.test*.txt*"),
        },
        _wikitext_row,
    ),
    "ptb": Corpus(
        "ptb-text-only/ptb_text_only",
        "penn_treebank",
        {"train": "train", "validation": "validation", "test": "test"},
        "sentence",
        " ",
        {"train": ("*train.txt*",), "validation": ("*valid.txt*",), "test": ("*test.txt*",)},
        str.strip,
    ),
    "c4": Corpus(
        "allenai/c4",
        "en",
        {"train": "train", "test": "validation"},
        "text",
        "\n\n",
        {"train": ("*train*.json*",), "test": ("*valid*.json*", "*.jsonl*")},
        rows=2_000,
    ),
    "snips": Corpus(
        "benayas/snips",
        None,
        {"train": "train", "test": "test"},
        "text",
        "\n",
        {"train": ("train.jsonl*",), "test": ("test.jsonl*", "valid.jsonl*")},
    ),
    "alpaca_eval": Corpus(
        "tatsu-lab/alpaca_eval",
        "alpaca_eval",
        {"test": "eval"},
        "instruction",
        "\n\n",
        {"test": ("eval.jsonl*", "alpaca_eval*.json*")},
    ),
    "mctest": Corpus(
        "sagnikrayc/mctest",
        "mc160",
        {"test": "test"},
        "story",
        "\n\n",
        {"test": ("*test.stories.jsonl*",)},
        distinct=True,
    ),
    "cmrc2018": Corpus(
        "hfl/cmrc2018",
        None,
        {"train": "train", "test": "validation"},
        "context",
        "\n\n",
        {"test": ("*dev*.jsonl*", "trial.jsonl*")},
        distinct=True,
    ),
    # The hub's set is the NSVD paper's, 805 translated instructions; it has one split, called train.
    "japanese": Corpus(
        "junsashihara/alpaca_eval_ja", None, {"test": "train"}, "instruction", "\n\n", {"test": ("*_ja.jsonl*",)}
    ),
    "lambada": Corpus("EleutherAI/lambada_openai", "en", {"test": "test"}, "text", "\n\n", {"test": ("test.jsonl*",)}),
    "tinystories": Corpus(
        "roneneldan/TinyStories",
        None,
        {"train": "train", "test": "validation"},
        "text",
        "\n\n",
        {"test": ("*.jsonl*",)},
    ),
    # The six commonsense tasks that SFSD calibrates on: questions with their right answers.
    "boolq": _questions("google/boolq", None, questions.boolq),
    "piqa": _questions("ybisk/piqa", None, questions.piqa),
    "hellaswag": _questions("Rowan/hellaswag", None, questions.hellaswag),
    "winogrande": _questions("allenai/winogrande", "winogrande_xl", questions.winogrande),
    "arc_easy": _questions("allenai/ai2_arc", "ARC-Easy", questions.arc),
    "arc_challenge": _questions("allenai/ai2_arc", "ARC-Challenge", questions.arc),
}

# {name: the corpora it is made of, in equal parts}.
MIXTURES: dict[str, tuple[str, ...]] = {
    "commonsense": ("boolq", "piqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge"),
}

BUILTIN = "builtin"


def read_text(name: str, *, split: str = "train", data: Path | None = None, column: str | None = None) -> Text:
    """The documents of a corpus.

    Args:
        name: one of
            "builtin", "builtin/prose", "builtin/code": the text that every Python carries ("builtin" is both);
            a file: .txt (one document; a row a line for a known corpus) or .jsonl / .json lines, plain or .gz;
            a row of CORPORA, read from `data` when given, else from the hub;
            any hub data set "owner/name" or "owner/name:config".
        split: "train", "validation" or "test". For "builtin" anything but train is the held-out part.
        data: folder with local copies of known corpora, DATA/<name>/..., or the folder of this one.
        column: field with the text; default "text", or the known corpus's own.

    Raises:
        ValueError: an unknown name, a missing file or field, an empty corpus.
    """
    path = Path(name)
    if name == BUILTIN or name.startswith(f"{BUILTIN}/"):
        domains = ("prose", "code") if name == BUILTIN else (name.removeprefix(f"{BUILTIN}/"),)
        part = "train" if split == "train" else "heldout"
        documents = [text for domain in domains for text in builtin_texts(domain, part)]
        text = Text(tuple(documents), "\n\n", {"corpus": name, "split": part})
    elif path.is_file():
        text = Text(tuple(_read_file(path, column or "text")), "\n\n", {"corpus": path.name})
    elif name in CORPORA and data is not None:
        text = _read_known_file(name, split, data, column)
    elif name in CORPORA:
        text = _read_hub(name, CORPORA[name], split, column)
    elif "/" in name and not path.suffix:
        hub, _, config = name.partition(":")
        row = Corpus(hub, config or None, {split: split}, column or "text", "\n\n", {})
        text = _read_hub(name, row, split, column)
    else:
        raise ValueError(
            f"no corpus {name!r}: it is no file here, and known names are builtin, {', '.join(CORPORA)}; "
            "a hub data set is given as owner/name"
        )
    if not any(document.strip() for document in text.documents):
        raise ValueError(f"corpus {name!r} ({split}) holds no text")
    return text


def parts_of(name: str) -> tuple[str, ...]:
    """The corpora that a name asks for: a row of MIXTURES, "boolq+arc_easy", or just the one."""
    return MIXTURES.get(name) or ((name,) if Path(name).is_file() else tuple(name.split("+")))


def _read_known_file(name: str, split: str, data: Path, column: str | None) -> Text:
    corpus = CORPORA[name]
    patterns = corpus.files.get(split, ())
    folder = data / name if (data / name).is_dir() else data
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            documents = (
                read_lines(file)
                if ".txt" in file.suffixes or ".raw" in file.suffixes
                else _read_file(file, column or "text", corpus.column, answered=corpus.compose is not None)
            )
            source = {"corpus": name, "split": split, "file": file.name}
            return Text(tuple(corpus.row(d) for d in documents), corpus.joiner, source)
    raise ValueError(
        f"{name}: no file for split {split!r} in {folder}; "
        f"looked for {', '.join(patterns) or 'nothing, the corpus has no such split'}"
    )


def _read_hub(name: str, corpus: Corpus, split: str, column: str | None) -> Text:
    if corpus.hub is None or split not in corpus.splits:
        raise ValueError(f"{name}: no split {split!r} on the hub; give a folder with a local copy")
    try:
        rows: list[dict[str, Any]] = list(
            itertools.islice(open_hub(corpus.hub, corpus.config, corpus.splits[split]), corpus.rows)
        )
    except Exception as error:
        raise ValueError(
            f"{name}: the hub did not give {corpus.hub} ({type(error).__name__}: {error}); "
            "give a local file, a folder with local copies (--data), or builtin/prose, which needs no network"
        ) from error
    source = {"corpus": name, "hub": corpus.hub, "config": corpus.config, "split": split, "rows": len(rows)}
    if corpus.compose is not None and column is None:
        return Text(tuple(corpus.compose(row) for row in rows), corpus.joiner, source)
    field_name = column or corpus.column
    if not rows or not isinstance(rows[0].get(field_name), str):
        raise ValueError(f"{name}: no text field {field_name!r}; it has {', '.join(rows[0]) if rows else 'no rows'}")
    documents = [corpus.row(row[field_name]) for row in rows]
    return Text(tuple(dict.fromkeys(documents) if corpus.distinct else documents), corpus.joiner, source)


def open_hub(hub: str, config: str | None, split: str) -> Iterable[Any]:
    """The rows of a hub data set's split, streamed."""
    import datasets  # slow to import, and needed only here

    try:
        return datasets.load_dataset(hub, config, split=split, streaming=True)
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        # Older sets come with a loading script, which datasets no longer runs; the hub keeps a converted copy of each.
        return datasets.load_dataset(hub, config, split=split, streaming=True, revision="refs/convert/parquet")


def _read_file(path: Path, *columns: str, answered: bool = False) -> list[str]:
    """Its documents: the first of `columns` that a row has, or (answered) its question with the right answer."""
    if ".jsonl" not in path.suffixes and ".json" not in path.suffixes:
        return ["".join(read_lines(path))]
    documents = []
    for number, row in read_json_lines(path):
        if answered and isinstance(row, dict) and {"choices", "answer"} <= set(row):
            documents.append(questions.answered(row))
            continue
        present = [c for c in columns if isinstance(row, dict) and isinstance(row.get(c), str)]
        if not present:
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{path}: line {number} has no text field {' or '.join(map(repr, columns))}; it has {has}")
        documents.append(row[present[0]])
    return documents


def read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, value) of every line of a .jsonl file that is not empty. Raises ValueError where one is not JSON."""
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: line {number} is not JSON ({error})") from error


def read_lines(path: Path) -> list[str]:
    """The lines of a text file, plain or .gz. Raises ValueError where it is not UTF-8."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            return list(file)
    except (UnicodeDecodeError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{path} is not readable as UTF-8 text: {error}") from error
