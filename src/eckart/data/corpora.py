"""Corpora: names in, text out. Known data sets, files, the hub, and the text that comes with Python."""

from __future__ import annotations

import difflib
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eckart.data import questions
from eckart.data.builtin import builtin_texts
from eckart.data.files import Row, check_length, read_lines, read_rows, table_kind
from eckart.data.mixtures import LANGUAGES, parts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What the file of a corpus that is not known has its text in: prose, or a conversation.
COLUMNS = ("text", "messages")
# The branch on which the hub keeps a copy, in parquet files, of every data set.
CONVERTED = "refs/convert/parquet"
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(:.+)?")


@dataclass(frozen=True)
class Text:
    """Documents, and how they are joined into one stream.

    Attributes:
        templated: the documents are conversations, written out by a chat template, special tokens and all.
    """

    documents: tuple[str, ...]
    joiner: str
    source: dict[str, Any]
    templated: bool = False

    def __repr__(self) -> str:
        size = sum(map(len, self.documents))
        return f"Text({len(self.documents):,} documents, {size:,} characters of {self.source.get('corpus')})"

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
        plain: where the tokenizer has no chat template, conversations are their messages with an empty line between.
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
    plain: bool = False


def _wikitext_row(line: str) -> str:
    """A line as the hub's rows have it: empty, or with its line end."""
    return line.rstrip("\n") + "\n" if line.strip() else ""


def _questions(hub: str, config: str | None, compose: Callable[[dict[str, Any]], str]) -> Corpus:
    """A commonsense task's row."""
    files = {"train": ("train*.jsonl*",), "test": ("dev.jsonl*", "val.jsonl*", "test.jsonl*")}
    splits = {"train": "train", "test": "validation"}
    return Corpus(hub, config, splits, "text", "\n", files, compose=compose)


def _wikipedia(language: str, rows: int) -> Corpus:
    """An edition of Wikipedia: a row is an article."""
    config = f"20231101.{language}"
    return Corpus("wikimedia/wikipedia", config, {"train": "train"}, "text", "\n\n", LOCAL_FILES, rows=rows)


# Local copies of sets that have no usual layout of their own: train.jsonl and the like.
LOCAL_FILES = {split: tuple(f"{split}*.{kind}*" for kind in ("json", "parquet", "txt")) for split in ("train", "test")}

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
        "\n\n",
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
        {"train": "train", "validation": "validation", "test": "test"},
        "context",
        "\n\n",
        {"validation": ("*dev*.jsonl*",), "test": ("*test*.jsonl*", "*dev*.jsonl*", "trial.jsonl*")},
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
    # The parts of broad; none needs a login. Their rows are long, and the first hundreds more than is drawn.
    # Wikipedia of November 2023: CC BY-SA 3.0 and GFDL.
    **{f"wikipedia_{language}": _wikipedia(language, 100) for language in LANGUAGES},
    "wikipedia_en": _wikipedia("en", 200),
    # Python files of GitHub; each row names the licence of its repository.
    "codeparrot": Corpus(
        "codeparrot/codeparrot-clean-valid", None, {"train": "train"}, "content", "\n\n", LOCAL_FILES, rows=500
    ),
    # Conversations of a user with an assistant: MIT.
    "ultrachat": Corpus(
        "HuggingFaceH4/ultrachat_200k",
        None,
        {"train": "train_sft", "test": "test_sft"},
        "messages",
        "\n\n",
        LOCAL_FILES,
        rows=500,
        plain=True,
    ),
    # The six commonsense tasks that SFSD calibrates on: questions with their right answers.
    "boolq": _questions("google/boolq", None, questions.boolq),
    "piqa": _questions("ybisk/piqa", None, questions.piqa),
    "hellaswag": _questions("Rowan/hellaswag", None, questions.hellaswag),
    "winogrande": _questions("allenai/winogrande", "winogrande_xl", questions.winogrande),
    "arc_easy": _questions("allenai/ai2_arc", "ARC-Easy", questions.arc),
    "arc_challenge": _questions("allenai/ai2_arc", "ARC-Challenge", questions.arc),
}

BUILTIN = "builtin"
# The split that calibrates.
DEFAULT_SPLIT = "train"
# {split: the part of the built-in text that it is}.
BUILTIN_SPLITS = {"train": "train", "validation": "heldout", "test": "heldout"}


def read_text(
    name: str,
    *,
    split: str = DEFAULT_SPLIT,
    data: Path | None = None,
    column: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> Text:
    """The documents of a corpus.

    Rows whose text is missing are left out: a warning says how many, and `source` has the number as "skipped".

    Args:
        name: one of
            "builtin", "builtin/prose", "builtin/code": the text that every Python carries ("builtin" is both);
            a file: JSON lines, a JSON array, CSV, TSV, parquet (a row is a document), or anything else in UTF-8 (one
            document; a row a line for a known corpus), plain or .gz;
            a row of CORPORA, read from `data` when given, else from the hub;
            any hub data set "owner/name" or "owner/name:config".
        split: "train", "validation" or "test"; for "builtin" the last two are the held-out part. A file has none.
        data: folder with local copies of known corpora, DATA/<name>/..., or the folder of this one.
        column: field with the text, or with a conversation: a list of messages with "role" and "content". Default: the
            known corpus's own; "text"; "messages".
        tokenizer: its chat template writes conversations out.

    Raises:
        ValueError: an unknown name, a missing file or field, a field of plain text, a conversation without a chat
            template, an empty corpus, or more text than `text_limit` allows.
    """
    path = Path(name)
    if is_plain(name):
        _check_no_field(name, column)
    if len(parts_of(name)) > 1:
        raise ValueError(
            f"{name} is a mixture, which is for calibration: name one of its parts, {', '.join(parts_of(name))}"
        )
    if name == BUILTIN or name.startswith(f"{BUILTIN}/"):
        domains = ("prose", "code") if name == BUILTIN else (name.removeprefix(f"{BUILTIN}/"),)
        if split not in BUILTIN_SPLITS:
            raise ValueError(f"{name}: no split {split!r}; there are {', '.join(BUILTIN_SPLITS)}")
        part = BUILTIN_SPLITS[split]
        documents = [text for domain in domains for text in builtin_texts(domain, part)]
        text = Text(tuple(documents), "\n\n", {"corpus": name, "split": part})
    elif path.is_file():
        text = _read_file(path, (column,) if column else COLUMNS, {"corpus": path.name}, tokenizer)
    elif name in CORPORA and data is not None:
        text = _read_known_file(name, split, data, column, tokenizer)
    elif name in CORPORA:
        text = _read_hub(name, CORPORA[name], split, column, tokenizer)
    elif path.is_dir():
        raise ValueError(
            f"corpus {name!r} is a folder: name a file in it, several joined by +, "
            f"or a known corpus ({', '.join(CORPORA)}) with the folder as --data"
        )
    elif is_hub_name(name):
        hub, _, config = name.partition(":")
        row = Corpus(hub, config or None, {split: split}, column or COLUMNS[0], "\n\n", {})
        text = _read_hub(name, row, split, column, tokenizer)
    else:
        if table_kind(path) is not None or path.suffix or len(path.parts) > 1:
            raise ValueError(f"no corpus {name!r}: there is no such file; `eckart evaluations` lists known corpora")
        known = [BUILTIN, *CORPORA]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known names are {', '.join(known)};"
        raise ValueError(f"no corpus {name!r}: {hint} A file is given by its path, a hub data set as owner/name")
    check_length(name, sum(map(len, text.documents)))
    if not any(document.strip() for document in text.documents):
        raise ValueError(f"corpus {name!r} ({split}) holds no text")
    return text


def check_split(parts: Sequence[str], split: str, default: str) -> None:
    """Raises ValueError where another split than the default is asked for of files alone, which are read whole."""
    if split != default and all(Path(part).is_file() for part in parts):
        raise ValueError(f"{'+'.join(parts)} is read whole, a file has no split {split!r}: leave split out")


def is_plain(name: str) -> bool:
    """Whether a corpus is text without fields: the built-in one, or a file that is no table."""
    path = Path(name)
    return name == BUILTIN or name.startswith(f"{BUILTIN}/") or (path.is_file() and table_kind(path) is None)


def _check_no_field(name: str, column: str | None) -> None:
    """Raises ValueError where a field is named of a corpus of plain text."""
    if column is not None:
        raise ValueError(f"{name} is plain text, which has no field {column!r}: leave column out")


def is_hub_name(name: str) -> bool:
    """Whether a name that is no file can be "owner/name" or "owner/name:config" of the hub, and no mistyped path."""
    hub = name.partition(":")[0]
    return HUB_NAME.fullmatch(name) is not None and table_kind(Path(hub)) is None and not hub.endswith((".txt", ".gz"))


def _read_known_file(
    name: str, split: str, data: Path, column: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> Text:
    corpus = CORPORA[name]
    patterns = corpus.files.get(split, ())
    folder = data / name if (data / name).is_dir() else data
    for pattern in patterns:
        for file in sorted(folder.glob(pattern)):
            source = {"corpus": name, "split": split, "file": file.name}
            if table_kind(file) is None:
                _check_no_field(str(file), column)
                return Text(tuple(map(corpus.row, read_lines(file))), corpus.joiner, source)
            columns = (column,) if column else ("text", corpus.column)
            text = _read_file(file, columns, source, tokenizer, corpus)
            return Text(tuple(map(corpus.row, text.documents)), corpus.joiner, text.source, text.templated)
    raise ValueError(
        f"{name}: no file for split {split!r} in {data / name} or {data}; "
        f"looked for {', '.join(patterns) or 'nothing, the corpus has no such split'}"
    )


def _read_hub(
    name: str, corpus: Corpus, split: str, column: str | None, tokenizer: PreTrainedTokenizerBase | None
) -> Text:
    if corpus.hub is None or split not in corpus.splits:
        raise ValueError(f"{name}: no split {split!r} on the hub; give a folder with a local copy")
    instead = ", or builtin/prose, which needs no network"
    rows = read_hub_rows(name, corpus.hub, corpus.config, corpus.splits[split], corpus.rows, instead=instead)
    source = {"corpus": name, "hub": corpus.hub, "config": corpus.config, "split": split, "rows": len(rows)}
    if corpus.compose is not None and column is None:
        return Text(tuple(corpus.compose(dict(row)) for _, row in rows), corpus.joiner, source)
    known = COLUMNS if corpus.column in COLUMNS else (corpus.column,)
    text = _gather(name, rows, (column,) if column else known, source, tokenizer, plain=corpus.plain)
    documents = [corpus.row(document) for document in text.documents]
    unique = tuple(dict.fromkeys(documents) if corpus.distinct else documents)
    return Text(unique, text.joiner if text.templated else corpus.joiner, text.source, text.templated)


def read_hub_rows(
    name: str, hub: str, config: str | None, split: str, limit: int, *, instead: str = ""
) -> list[tuple[str, Row]]:
    """("NAME: row 3", row) of a hub data set's split, `limit` rows at most.

    Args:
        instead: what may be read in its place without a network, for the error.

    Raises:
        ValueError: the hub does not give it; says what to do.
    """
    try:
        rows = list(itertools.islice(open_hub(hub, config, split), limit))
    except Exception as error:
        gated = (
            f"it is gated: accept its terms on https://huggingface.co/datasets/{hub}, then log in (hf auth login, or a "
            "token in HF_TOKEN); or "
            if re.search("gated|401|403", str(error))
            else ""
        )
        raise ValueError(
            f"{name}: the hub did not give {hub} ({type(error).__name__}: {error}); "
            f"{gated}give a local file or a folder with local copies (--data){instead}"
        ) from error
    return [(f"{name}: row {number}", row) for number, row in enumerate(rows, 1)]


def open_hub(hub: str, config: str | None, split: str) -> Iterable[Row]:
    """The rows of a hub data set's split, streamed."""
    import datasets  # slow to import, and needed only here

    try:
        rows: Iterable[Row] = datasets.load_dataset(hub, config, split=split, streaming=True)
        return rows
    except RuntimeError as error:
        if "script" not in str(error):
            raise
        # Older sets come with a loading script, which datasets no longer runs; the hub keeps a converted copy of each.
        return open_converted(f"hf://datasets/{hub}@{CONVERTED}", config, split)


def open_converted(root: str, config: str | None, split: str) -> Iterable[Row]:
    """The rows of a split in a folder laid out as the hub's branch of converted copies, streamed.

    It has a folder for each configuration and in it one for each split, CONFIG/SPLIT/0000.parquet; a split of which
    only the first 5 GB were converted is CONFIG/partial-SPLIT. The branch has no list of configurations, so that
    `load_dataset` does not know them by name, and would take a split "eval" for "test".

    Args:
        root: a path or URL that fsspec knows.
        config: None is the only one, or "default".
        split: the data set's own name for it.

    Raises:
        ValueError: there is no such configuration or split; names those that there are.
    """
    import datasets
    import fsspec

    system, base = fsspec.core.url_to_fs(root)
    files: dict[str, dict[str, list[str]]] = {}
    for file in sorted(system.find(base)):
        parts = file.removeprefix(base).strip("/").split("/")
        if len(parts) == 3 and parts[2].endswith(".parquet"):
            folder = files.setdefault(parts[0], {})
            folder.setdefault(parts[1].removeprefix("partial-"), []).append(system.unstrip_protocol(file))
    named = config or (next(iter(files)) if len(files) == 1 else "default")
    if named not in files:
        raise ValueError(f"{root} has no configuration {config or 'default'!r}; it has {', '.join(files) or 'none'}")
    if split not in files[named]:
        raise ValueError(f"{root} has no split {split!r} in {named}; it has {', '.join(files[named])}")
    rows: Iterable[Row] = datasets.load_dataset(
        "parquet", data_files={split: files[named][split]}, split=split, streaming=True
    )
    return rows


def _read_file(
    path: Path,
    columns: tuple[str, ...],
    source: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    corpus: Corpus | None = None,
) -> Text:
    """Its documents: see `_gather`; a file of plain text is one.

    Args:
        corpus: the known one that it is of.
    """
    if table_kind(path) is None:
        return Text(("".join(read_lines(path)),), "\n\n", source)
    answered, plain = (False, False) if corpus is None else (corpus.compose is not None, corpus.plain)
    return _gather(str(path), read_rows(path), columns, source, tokenizer, answered=answered, plain=plain)


def _gather(
    name: str,
    rows: Sequence[tuple[str, Row]],
    columns: tuple[str, ...],
    source: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None,
    answered: bool = False,
    plain: bool = False,
) -> Text:
    """The first of `columns` that a row has, or (answered) its question with the right answer, from every row.

    Args:
        plain: without a chat template conversations are joined plainly, and `source` says so.
    """
    plain = plain and not getattr(tokenizer, "chat_template", None)
    documents: list[str] = []
    kinds: set[str] = set()
    for place, row in rows:
        if answered and row.get("choices") is not None and row.get("answer") is not None:
            documents.append(questions.answered(dict(row)))
            kinds.add("texts")
            continue
        present = [column for column in columns if row.get(column) is not None]
        if not present:
            continue
        value = row[present[0]]
        if isinstance(value, list):
            documents.append(_write_out(place, present[0], value, tokenizer, plain))
            kinds.add("conversations")
        elif isinstance(value, str):
            documents.append(value)
            kinds.add("texts")
        else:
            raise ValueError(f"{place}: field {present[0]!r} holds no text but {type(value).__name__}: {value!r:.60}")
    if not rows:
        raise ValueError(f"{name} holds no text: it has no rows")
    if not documents:
        fields = list(rows[0][1])
        raise ValueError(
            f"{name} has no text {'in' if set(columns) & set(fields) else 'field'} {' or '.join(map(repr, columns))}; "
            f"it has {', '.join(fields)}; choose a field by `column` (--column)"
        )
    if len(kinds) > 1:
        raise ValueError(f"{name} holds texts and conversations; choose a field by `column` (--column)")
    templated = kinds == {"conversations"} and not plain
    if kinds == {"conversations"} and plain:
        source = {**source, "conversations": "joined plainly: the tokenizer has no chat template"}
    skipped = len(rows) - len(documents)
    if skipped:
        warnings.warn(f"{name}: {skipped} of {len(rows)} rows have no text and are left out", stacklevel=2)
        source = {**source, "skipped": skipped}
    return Text(tuple(documents), "" if templated else "\n\n", source, templated)


def _write_out(
    place: str, column: str, messages: Sequence[Any], tokenizer: PreTrainedTokenizerBase | None, plain: bool
) -> str:
    """A conversation as one text, by the tokenizer's chat template, or plainly."""
    if not all(isinstance(message, dict) and {"role", "content"} <= set(message) for message in messages):
        raise ValueError(f"{place}: field {column!r} is no conversation: a list of messages with role and content")
    if plain:
        return "\n\n".join(str(message["content"]) for message in messages)
    if tokenizer is None or not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{place}: field {column!r} is a conversation, and the tokenizer has no chat template to write it out: "
            "give a chat model's tokenizer, or a field that holds text (column)"
        )
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False))
    except Exception as error:
        raise ValueError(f"{place}: the tokenizer's chat template refuses it: {error}") from error
