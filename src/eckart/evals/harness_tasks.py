"""Local tasks: lm-evaluation-harness's own tasks on documents from files, and the splits of their documents."""

from __future__ import annotations

import json
import random
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from eckart.data.files import lines_of, unpack

if TYPE_CHECKING:
    from datasets import DatasetDict

Row = dict[str, Any]

# All of a set, what rank searches read of it, and what remains to report on.
SPLITS = ("test", "sfsd-search", "sfsd-evaluation")
# What the draw of SFSD's split starts from. It is no setting of a run: a search with one seed and an evaluation with
# another would share documents.
SPLIT_SEED = 0

VALIDATION = ("dev.json*", "val.json*", "validation.json*")
TEST = ("test.json*",)
TRAIN = ("train.json*",)


def is_family(name: str) -> bool:
    """Whether a task is a group of many of one kind, as mmlu is of its subjects."""
    return name in LOCAL_TASKS and LOCAL_TASKS[name].member is not None


def split_rows(n: int, split: str, *, seed: int = SPLIT_SEED) -> list[int]:
    """The documents of a split, as indices in ascending order.

    "test" is all of them. "sfsd-search" and "sfsd-evaluation" are the 20 % that the SFSD paper searches ranks on and
    the other 80 % (its Table 4): 0 ... n-1 are shuffled by `random.Random(seed)`, the first floor(n / 5) are for the
    search and the rest for the evaluation. The sizes are those of the paper, but for two sets of which it leaves one
    document out: PIQA has 1838 (the paper prints 367 + 1470) and WinoGrande 1267 (253 + 1013).

    Raises:
        ValueError: an unknown split, or fewer than 5 documents for a share of 20 %.
    """
    if split not in SPLITS:
        raise ValueError(f"no split {split!r}; there are {', '.join(SPLITS)}")
    if split == "test":
        return list(range(n))
    if n < 5:
        raise ValueError(f"{n} documents are too few for {split}, which takes one in five for the search")
    order = list(range(n))
    random.Random(seed).shuffle(order)
    return sorted(order[: n // 5] if split == "sfsd-search" else order[n // 5 :])


def _boolq(row: Row) -> Row:
    if _choices(row) != ["no", "yes"]:
        raise ValueError("'choices' has to be no, yes in that order")
    # SuperGLUE, where the harness reads, begins a passage with its title.
    title = f"{_text(row, 'title')} -- " if "title" in row else ""
    return {"passage": title + _text(row, "context"), "question": _text(row, "question"), "label": _answer(row)}


def _piqa(row: Row) -> Row:
    first, second = _choices(row, 2)
    return {"goal": _text(row, "question"), "sol1": first, "sol2": second, "label": _answer(row)}


def _hellaswag(row: Row) -> Row:
    return {"query": _text(row, "context"), "choices": _choices(row), "label": _answer(row)}


def _winogrande(row: Row) -> Row:
    sentence, (first, second) = _text(row, "question"), _choices(row, 2)
    if "_" not in sentence:
        raise ValueError("'question' has no blank _ to fill")
    return {"sentence": sentence, "option1": first, "option2": second, "answer": str(_answer(row) + 1)}


def _arc(row: Row) -> Row:
    return {"question": _text(row, "question"), **_lettered(row)}


def _openbookqa(row: Row) -> Row:
    return {"question_stem": _text(row, "question"), **_lettered(row)}


def _lettered(row: Row) -> Row:
    choices = _choices(row)
    letters = list(string.ascii_uppercase[: len(choices)])
    return {"choices": {"text": choices, "label": letters}, "answerKey": letters[_answer(row)]}


def _mmlu(row: Row) -> Row:
    return {"question": _text(row, "question"), "choices": _choices(row, 4), "answer": _answer(row)}


def _lambada(row: Row) -> Row:
    text = _text(row, "text")
    if " " not in text.strip() or text != text.strip():
        raise ValueError("'text' has to be words with nothing around them; its last word is the one to predict")
    return {"text": text}


def _blimp(row: Row) -> Row:
    return {"sentence_good": _text(row, "good"), "sentence_bad": _text(row, "bad")}


def _truthfulqa_mc1(row: Row) -> Row:
    choices = _choices(row)
    if _answer(row) != 0:
        raise ValueError("'answer' has to be 0: the harness takes the first choice as the right one")
    labels = [1] + [0] * (len(choices) - 1)
    return {"question": _text(row, "question"), "mc1_targets": {"choices": choices, "labels": labels}}


def _truthfulqa_mc2(row: Row) -> Row:
    choices, labels = _choices(row, name="mc2_choices"), row["mc2_labels"]
    if not isinstance(labels, list) or len(labels) != len(choices) or any(label not in (0, 1) for label in labels):
        raise ValueError(f"'mc2_labels' has to be 0 or 1 for each of the {len(choices)} choices")
    if 1 not in labels:
        raise ValueError("'mc2_labels' marks no choice as true")
    return {"question": _text(row, "question"), "mc2_targets": {"choices": choices, "labels": labels}}


def _text(row: Row, name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} has to be text that is not empty; it is {value!r}")
    return value


def _choices(row: Row, count: int | None = None, *, name: str = "choices") -> list[str]:
    choices = row[name]
    if not isinstance(choices, list) or any(not isinstance(choice, str) or not choice for choice in choices):
        raise ValueError(f"{name!r} has to be a list of texts; it is {choices!r}")
    if len(choices) < 2 or (count is not None and len(choices) != count):
        raise ValueError(f"{name!r} has {len(choices)} texts; the task takes {count or 'at least 2'}")
    return choices


def _answer(row: Row) -> int:
    answer, choices = row["answer"], row["choices"]
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
        raise ValueError(f"'answer' has to be an index from 0 to {len(choices) - 1}; it is {answer!r}")
    return answer


@dataclass(frozen=True)
class LocalTask:
    """A row of the table: a task of the harness, and how local files replace its data set.

    Attributes:
        stock: the harness's definition, in its tasks folder: prompt, metrics, filters. Of a family, the folder with
            the definitions of its groups and members.
        folder: inside DATA; DATA itself where it has that name.
        files: shell patterns for the file of documents, the first match is read.
        fields: what every row of the files has to have.
        convert: a row to the columns that the definition reads.
        documents: the definition's key and split for the documents.
        examples, example_files: the same for few-shot examples, read only when there are any; None where the
            definition has no split for them.
        member: field that tells the members of a family apart.
        shots: few-shot examples where a run does not say; None leaves that to the definition.
        changes: keys of the definition that are not as in stock, for rows that come prepared.
        note: how the documents differ from those of the hub.
    """

    stock: str
    folder: str
    files: tuple[str, ...]
    fields: tuple[str, ...]
    convert: Callable[[Row], Row]
    documents: tuple[str, str]
    examples: tuple[str, str] | None = None
    example_files: tuple[str, ...] = TRAIN
    member: str | None = None
    shots: int | None = None
    changes: dict[str, Any] = field(default_factory=dict)
    note: str | None = None


_CHOICE = ("question", "choices", "answer")
_TRAINING = ("training_split", "train")

LOCAL_TASKS: dict[str, LocalTask] = {
    "boolq": LocalTask(
        "super_glue/boolq/default.yaml",
        "boolq",
        VALIDATION,
        ("context", *_CHOICE),
        _boolq,
        ("validation_split", "validation"),
        _TRAINING,
    ),
    "piqa": LocalTask(
        "piqa/piqa.yaml", "piqa", VALIDATION, _CHOICE, _piqa, ("validation_split", "validation"), _TRAINING
    ),
    "hellaswag": LocalTask(
        "hellaswag/hellaswag.yaml",
        "hellaswag",
        VALIDATION,
        ("context", "choices", "answer"),
        _hellaswag,
        ("validation_split", "validation"),
        _TRAINING,
        changes={"process_docs": None},
        note="contexts are cleaned and joined in the file; the harness would make the first letter of their second "
        "part a capital and the rest of it small",
    ),
    "winogrande": LocalTask(
        "winogrande/default.yaml",
        "winogrande",
        VALIDATION,
        _CHOICE,
        _winogrande,
        ("validation_split", "validation"),
        _TRAINING,
    ),
    "arc_easy": LocalTask("arc/arc_easy.yaml", "arc_easy", TEST, _CHOICE, _arc, ("test_split", "test"), _TRAINING),
    "arc_challenge": LocalTask(
        "arc/arc_challenge.yaml", "arc_challenge", TEST, _CHOICE, _arc, ("test_split", "test"), _TRAINING
    ),
    "openbookqa": LocalTask(
        "openbookqa/openbookqa.yaml", "openbookqa", TEST, _CHOICE, _openbookqa, ("test_split", "test"), _TRAINING
    ),
    "mmlu": LocalTask(
        "mmlu/default",
        "mmlu",
        TEST,
        (*_CHOICE, "subject"),
        _mmlu,
        ("test_split", "test"),
        ("fewshot_split", "dev"),
        VALIDATION,
        member="subject",
        shots=5,
    ),
    "lambada_openai": LocalTask(
        "lambada/lambada_openai.yaml", "lambada", TEST, ("text",), _lambada, ("test_split", "test")
    ),
    "blimp": LocalTask(
        "blimp", "blimp", TEST, ("good", "bad", "uid"), _blimp, ("validation_split", "train"), member="uid"
    ),
    "truthfulqa_mc1": LocalTask(
        "truthfulqa/truthfulqa_mc1.yaml",
        "truthfulqa",
        ("mc.v0.json*", "mc.json*", "mc.v1.json*"),
        _CHOICE,
        _truthfulqa_mc1,
        ("validation_split", "validation"),
    ),
    "truthfulqa_mc2": LocalTask(
        "truthfulqa/truthfulqa_mc2.yaml",
        "truthfulqa",
        ("mc.v0.json*", "mc.json*", "mc.v1.json*"),
        ("question", "mc2_choices", "mc2_labels"),
        _truthfulqa_mc2,
        ("validation_split", "validation"),
    ),
}


def find_local_task(name: str, stock: Path) -> LocalTask | None:
    """The row that covers a task, a group or a member of one; None where there is none.

    Args:
        stock: the harness's folder of task definitions.
    """
    if name in LOCAL_TASKS:
        return LOCAL_TASKS[name]
    for family, row in LOCAL_TASKS.items():
        if row.member and name.startswith(f"{family}_") and name in _definitions(row, stock):
            return row
    return None


def local_names(stock: Path) -> list[str]:
    """Every name that `find_local_task` knows."""
    members = [name for row in LOCAL_TASKS.values() if row.member for name in _definitions(row, stock)]
    return list(dict.fromkeys([*LOCAL_TASKS, *members]))


def write_definitions(row: LocalTask, stock: Path, data: Path, folder: Path, *, shots: int) -> dict[str, str]:
    """Write definitions into `folder` that take everything from the stock ones but the documents.

    Each is a YAML file that includes its stock file; the rows, in the stock data set's columns, are in a JSON file.

    Args:
        row: which tasks; of a family, all its groups and members are written.
        stock: the harness's folder of task definitions.
        data: folder with local copies, DATA/<row.folder>/..., or that folder itself.
        shots: few-shot examples in a prompt; their file is read only if there are any.

    Returns:
        {"documents": file, "examples": file}: what was read.

    Raises:
        ValueError: a missing or empty file (the message lists what was looked for), or a row that does not fit
            (the message names the file, the line and the field).
    """
    sources = {"documents": _find_file(row, row.files, data)}
    if shots and row.examples:
        sources["examples"] = _find_file(row, row.example_files, data)
    rows = {part: _read_rows(row, path) for part, path in sources.items()}
    places = {"documents": row.documents, "examples": row.examples}
    splits = dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"))
    splits.update(dict(places[part] for part in sources))  # type: ignore[misc]
    for number, (path, member) in enumerate(_definitions(row, stock).values()):
        definition: Row = {"include": str(path)}
        if member is not None:
            kept = {}
            for part, source in sources.items():
                converted = [columns for owner, columns in rows[part] if owner == member]
                of_member = f" whose {row.member} is {member!r}" if row.member else ""
                empty = "" if converted else f"{source} has no row{of_member}"
                kept[places[part][1]] = {"rows": converted, "empty": empty}  # type: ignore[index]
            file = folder / f"{number}.json"
            file.write_text(json.dumps(kept), encoding="utf-8")
            definition |= {"dataset_kwargs": {"documents_file": str(file)}, **splits, **row.changes}
        text = yaml.safe_dump(definition)
        if member is not None:
            text += f"custom_dataset: !function {load_documents.__module__}.{load_documents.__name__}\n"
        (folder / f"{number}.yaml").write_text(text, encoding="utf-8")
    return {part: f"{path.parent.name}/{path.name}" for part, path in sources.items()}


def load_documents(*, documents_file: str, **_: Any) -> DatasetDict:
    """The data set of a local definition; the harness calls it with the definition's keywords and metadata.

    Raises:
        ValueError: a split has no rows.
    """
    from datasets import Dataset, DatasetDict

    splits = json.loads(Path(documents_file).read_text(encoding="utf-8"))
    for split in splits.values():
        if split["empty"]:
            raise ValueError(split["empty"])
    return DatasetDict({name: Dataset.from_list(split["rows"]) for name, split in splits.items()})


def _definitions(row: LocalTask, stock: Path) -> dict[str, tuple[Path, str | None]]:
    """{task or group: (its stock file, which rows are its own)}: "" for all rows, None for a group, which has none."""
    path = stock / row.stock
    if not path.exists():
        raise ValueError(f"the installed harness has no definition {row.stock}: pip install 'eckart[tasks]' brings one")
    if row.member is None:
        return {row.stock: (path, "")}
    definitions: dict[str, tuple[Path, str | None]] = {}
    for file in sorted(path.glob("*.yaml")):
        definition = yaml.safe_load(file.read_text(encoding="utf-8"))
        if "group" in definition:
            definitions[definition["group"]] = (file, None)
        else:
            definitions[definition["task"]] = (file, definition["dataset_name"])
    return definitions


def _find_file(row: LocalTask, patterns: tuple[str, ...], data: Path) -> Path:
    inner = data / row.folder
    folder = data if data.name == row.folder and not inner.is_dir() else inner
    for pattern in patterns:
        for path in sorted(folder.glob(pattern)):
            if path.is_file():
                return path
    raise ValueError(f"no file {' or '.join(patterns)} in {folder}")


def _read_rows(row: LocalTask, path: Path) -> list[tuple[str, Row]]:
    """[(member, columns of the stock data set)] of a file; the member is "" for a task of its own."""
    lines = enumerate(lines_of(unpack(path)), 1)
    rows = [_read_row(row, line, f"{path}: line {number}") for number, line in lines if line.strip()]
    if not rows:
        raise ValueError(f"{path} is empty")
    return rows


def _read_row(row: LocalTask, line: str, where: str) -> tuple[str, Row]:
    try:
        content = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{where} is a {type(content).__name__}; it has to be an object with {', '.join(row.fields)}")
    missing = [name for name in row.fields if name not in content]
    if missing:
        raise ValueError(f"{where} has no field {' or '.join(map(repr, missing))}; it has {', '.join(content)}")
    try:
        return _text(content, row.member) if row.member else "", row.convert(content)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
