"""Labelled: texts with classes, for probes and classifiers. Known data sets, files, the hub."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eckart.data.corpora import is_hub_name, read_hub_rows
from eckart.data.files import TABLES, Row, read_rows, table_kind

# Wrong answers for each right one, as the probing paper pairs them.
WRONG_PER_RIGHT = 4
# Seed of the draw of the wrong answers; no setting, so that every result is of the same rows.
PAIRING_SEED = 0
# Rows read from the hub at most.
HUB_ROWS = 100_000


@dataclass(frozen=True)
class Labelled:
    """Texts, each with its class.

    Attributes:
        texts: what is read.
        labels: index of each text's class.
        classes: their names.
        groups: rows of one group are of one text or one question; no split divides a group.
        source: of the rows.

    Raises:
        ValueError: texts, labels and groups of different length, or a label without a class.
    """

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...]
    groups: tuple[int, ...]
    source: dict[str, Any]

    def __post_init__(self) -> None:
        if not len(self.texts) == len(self.labels) == len(self.groups):
            raise ValueError(f"{len(self.texts)} texts, {len(self.labels)} labels and {len(self.groups)} groups")
        if self.labels and not 0 <= min(self.labels) <= max(self.labels) < len(self.classes):
            raise ValueError(f"a label is outside the {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.texts)

    def __repr__(self) -> str:
        return f"Labelled({len(self):,} texts, classes {', '.join(self.classes)})"

    def draw(self, limit: int | None, seed: int = 0) -> Labelled:
        """At least `limit` rows where there are so many: whole groups drawn at random, in their own order.

        Args:
            limit: None is all of them.
            seed: of the draw.
        """
        if limit is None or limit >= len(self):
            return self
        sizes: dict[int, int] = {}
        for group in self.groups:
            sizes[group] = sizes.get(group, 0) + 1
        order = list(sizes)
        random.Random(seed).shuffle(order)
        counts = itertools.accumulate((sizes[group] for group in order), initial=0)
        drawn = {group for group, before in zip(order, counts, strict=False) if before < limit}
        return self.take([place for place, group in enumerate(self.groups) if group in drawn])

    def take(self, rows: Sequence[int]) -> Labelled:
        """These rows, in this order."""
        return replace(
            self,
            texts=tuple(self.texts[row] for row in rows),
            labels=tuple(self.labels[row] for row in rows),
            groups=tuple(self.groups[row] for row in rows),
        )


@dataclass(frozen=True)
class LabelledSet:
    """A row of the table: where a known set lives, and what its rows are.

    Attributes:
        hub, config: data set and configuration on the Hugging Face hub.
        splits: {split: the hub's name for it}; "test" is a part with labels that is not trained on.
        files: {split: shell patterns of local files, the first match is read}, inside DATA/<folder>/, or inside DATA/.
        classes: names of the labels.
        text: the field that holds the text, or a function from a row to its (text, label) pairs.
        folder: inside DATA; default the set's own name.
    """

    hub: str
    config: str
    splits: dict[str, str]
    files: dict[str, tuple[str, ...]]
    classes: tuple[str, ...]
    text: str | Callable[[Row, random.Random], list[tuple[str, int]]]
    folder: str | None = None


def _paired(row: Row, draw: random.Random) -> list[tuple[str, int]]:
    """A question's first right answer and four wrong ones; nothing where it has fewer."""
    pairs = _answers(row)
    right, wrong = ([text for text, label in pairs if label == kind] for kind in (1, 0))
    if not right or len(wrong) < WRONG_PER_RIGHT:
        return []
    return [(right[0], 1), *((text, 0) for text in draw.sample(wrong, WRONG_PER_RIGHT))]


def _every_answer(row: Row, _draw: random.Random) -> list[tuple[str, int]]:
    return _answers(row)


def _answers(row: Row) -> list[tuple[str, int]]:
    """ "Q: question A: answer" and whether it is true, for every answer: Inference-Time Intervention's (2306.03341)."""
    targets = row.get("mc2_targets")
    choices = targets["choices"] if targets else row.get("mc2_choices")
    labels = targets["labels"] if targets else row.get("mc2_labels")
    if not isinstance(row.get("question"), str) or not choices or not labels or len(choices) != len(labels):
        raise ValueError(f"no question with mc2 choices and labels; it has {', '.join(map(str, row))}")
    return [(f"Q: {row['question']} A: {text}", int(label)) for text, label in zip(choices, labels, strict=True)]


GLUE_FILES = {"train": ("train.jsonl*", "train.tsv*"), "test": ("dev.jsonl*", "dev.tsv*", "validation.jsonl*")}
TRUTHFUL: dict[str, Any] = {
    "hub": "truthfulqa/truthful_qa",
    "config": "multiple_choice",
    "splits": {"test": "validation"},
    "files": {"test": ("mc.v0.jsonl*", "mc*.jsonl*")},
    "classes": ("incorrect", "correct"),
    "folder": "truthfulqa",
}
GLUE: dict[str, Any] = {"hub": "nyu-mll/glue", "splits": {"train": "train", "test": "validation"}, "files": GLUE_FILES}

LABELLED: dict[str, LabelledSet] = {
    # Warstadt et al. 1805.12471: is the sentence one that a speaker would accept?
    "cola": LabelledSet(config="cola", classes=("unacceptable", "acceptable"), text="sentence", **GLUE),
    # Socher et al. 2013, as GLUE has it: phrases of film reviews.
    "sst2": LabelledSet(config="sst2", classes=("negative", "positive"), text="sentence", **GLUE),
    # Lin et al. 2109.07958: one right answer and four wrong ones of each question, as the probing paper pairs them.
    "truthfulqa": LabelledSet(text=_paired, **TRUTHFUL),
    # Every answer, right or wrong, as Inference-Time Intervention probes them.
    "truthfulqa-iti": LabelledSet(text=_every_answer, **TRUTHFUL),
}


def read_labelled(
    name: str,
    *,
    split: str = "train",
    data: Path | None = None,
    column: str | None = None,
    label_column: str | None = None,
) -> Labelled:
    """The rows of a labelled set.

    Rows without a text or a label are left out: a warning says how many, and `source` has the number as "skipped".

    Args:
        name: one of
            a row of LABELLED, read from `data` when given, else from the hub;
            a file of rows with a text and a label: JSON lines, a JSON array, CSV, TSV (plain or .gz) or parquet;
            any hub data set "owner/name" or "owner/name:config".
        split: "train", or "test": the part that is not trained on (GLUE's dev set, as its test labels are not public).
        data: folder with local copies, DATA/<name>/..., or the folder of this one.
        column, label_column: fields of a file or hub set; default "text" and "label".

    Raises:
        ValueError: an unknown name, split, file or field (the message names the line), fewer than two classes.
    """
    path = Path(name)
    if path.is_file():
        rows, source = _read_file(path), {"corpus": path.name}
        labelled = _gather(name, rows, column or "text", label_column or "label", None, source)
    elif name in LABELLED:
        row = LABELLED[name]
        if split not in row.splits:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(row.splits)}")
        rows, source = _read_known(name, row, split, data)
        labelled = _gather(name, rows, column or row.text, label_column or "label", row.classes, source)
    elif path.is_dir():
        raise ValueError(f"labelled set {name!r} is a folder; name a file in it")
    elif is_hub_name(name):
        hub, _, config = name.partition(":")
        rows, source = _read_hub(name, hub, config or None, split)
        labelled = _gather(name, rows, column or "text", label_column or "label", None, {**source, "split": split})
    else:
        raise ValueError(
            f"no labelled set {name!r}: it is no file here, and known names are {', '.join(LABELLED)}; "
            "a hub data set is given as owner/name"
        )
    if len(set(labelled.labels)) < 2:
        raise ValueError(f"{name} ({split}): {len(labelled)} rows of fewer than two classes: nothing to tell apart")
    return labelled


def _gather(
    name: str,
    rows: Sequence[tuple[str, Row]],
    text: str | Callable[[Row, random.Random], list[tuple[str, int]]],
    label: str,
    classes: tuple[str, ...] | None,
    source: dict[str, Any],
) -> Labelled:
    """Texts with classes from rows; rows of the same text are one group, as are the answers to a question."""
    texts: list[str] = []
    labels: list[Any] = []
    groups: list[int] = []
    known: dict[str, int] = {}
    draw, left_out, skipped = random.Random(PAIRING_SEED), 0, 0
    for place, row in rows:
        if callable(text):
            try:
                pairs = text(row, draw)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{place}: {error}") from error
            if not pairs:
                left_out += 1
                continue
            texts += [one for one, _ in pairs]
            labels += [kind for _, kind in pairs]
            groups += [known.setdefault(str(row["question"]), len(known))] * len(pairs)
            continue
        # The hub's GLUE calls the field "sentence", local copies "text".
        field = text if text in row else "text"
        if field not in row or label not in row:
            has = ", ".join(map(str, row))
            raise ValueError(
                f"{place} has no text {field!r} with a {label!r}; it has {has}; "
                "choose fields by `column` and `label_column`"
            )
        if row[field] is None or row[label] in (None, ""):
            skipped += 1
            continue
        if not isinstance(row[field], str):
            raise ValueError(f"{place}: field {field!r} holds no text but {type(row[field]).__name__}")
        texts.append(row[field])
        labels.append(row[label])
        groups.append(known.setdefault(row[field], len(known)))
    names, numbers = _number(name, labels, classes)
    if skipped:
        warnings.warn(f"{name}: {skipped} of {len(rows)} rows have no text or no label and are left out", stacklevel=2)
    counts = {"left_out": left_out, "skipped": skipped}
    facts = {**source, "rows": len(texts), **{key: count for key, count in counts.items() if count}}
    return Labelled(tuple(texts), tuple(numbers), names, tuple(groups), facts)


def _number(name: str, labels: Sequence[Any], classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], list[int]]:
    """The classes' names, and each label as an index into them."""
    if classes is None:
        written = [str(label) for label in labels]
        whole = all(text.lstrip("-").isdigit() for text in written)
        names = sorted(set(written), key=int) if whole else sorted(set(written))
        return tuple(names), [names.index(text) for text in written]
    try:
        numbers = [int(label) for label in labels]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name}: a label is no number: {error}") from error
    strange = sorted({number for number in numbers if not 0 <= number < len(classes)})
    if strange:
        raise ValueError(f"{name}: labels {strange} are none of 0 ... {len(classes) - 1} ({', '.join(classes)})")
    return classes, numbers


def _read_known(
    name: str, row: LabelledSet, split: str, data: Path | None
) -> tuple[Sequence[tuple[str, Row]], dict[str, Any]]:
    if data is None:
        rows, source = _read_hub(name, row.hub, row.config, row.splits[split])
        return rows, {**source, "corpus": name, "split": split}
    folder = data / (row.folder or name)
    folder = folder if folder.is_dir() else data
    for pattern in row.files[split]:
        for file in sorted(folder.glob(pattern)):
            return _read_file(file), {"corpus": name, "split": split, "file": file.name}
    raise ValueError(f"{name}: no file for split {split!r} in {folder}; looked for {', '.join(row.files[split])}")


def _read_hub(name: str, hub: str, config: str | None, split: str) -> tuple[Sequence[tuple[str, Row]], dict[str, Any]]:
    return read_hub_rows(name, hub, config, split, HUB_ROWS), {"corpus": name, "hub": hub, "config": config}


def _read_file(path: Path) -> Sequence[tuple[str, Row]]:
    """("FILE: row 3", row) of a table."""
    if table_kind(path) is None:
        raise ValueError(f"{path} is no table of texts with labels; give one of {', '.join(TABLES)}")
    return read_rows(path)
