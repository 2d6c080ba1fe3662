"""Verdicts: the answers to the probing paper's questions as people read them, and as machines do."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from eckart.evals.result import CHECK, Score
from eckart.reports.formats import MISSING, percent, score, with_error
from eckart.reports.pitfalls import Answers, Difference, Relation, WonBack, answer
from eckart.reports.profiles import probings
from eckart.reports.resampling import Estimate
from eckart.reports.runs import Collection
from eckart.reports.tables import Cell, Column, Table, corpus_of, number_cell, text_cell

# An estimate's columns: they stand under its name.
ESTIMATE = ("value", "from", "to")
NOT_INDEPENDENT = (
    "Runs of one model are not independent: they share its weights and the splits of its probes. The intervals, which "
    "resample {} as if they were, are rather too narrow, and more so where there are fewer than ten."
)


@dataclass(frozen=True)
class Section:
    """One question: its answer in plain sentences, the tables behind it, and long ones that few will open."""

    slug: str
    title: str
    sentences: tuple[str, ...]
    tables: tuple[Table, ...]
    long: tuple[Table, ...] = ()


def pitfalls_of(collection: Collection) -> list[Section]:
    """The questions that the runs answer; none where no compressed model was probed."""
    names = set(probings(collection))
    if not any(run.compressed.keys() & names for run in collection.runs if not run.is_dense):
        return []
    return sections(answer(collection))


def sections(answers: Answers) -> list[Section]:
    """The questions that there is an answer to."""
    found = []
    if answers.relations:
        found.append(_related(answers.relations))
    if answers.differences or answers.failing:
        found.append(_compared(answers))
    if answers.recoveries:
        found.append(_recovered(answers.recoveries))
    return found


def _related(relations: Sequence[Relation]) -> Section:
    rows, layers = [], []
    for found in relations:
        who = tuple(map(text_cell, (found.model, found.score, found.probing)))
        along = f"{_spans(found.together)} of {len(found.layers)}" if found.layers else MISSING
        rows.append(
            (
                *who,
                number_cell(found.pearson.n, str(found.pearson.n)),
                *_estimate(found.pearson),
                *_estimate(found.spearman),
                Cell(along, along if found.layers else None),
                text_cell(found.verdict),
            )
        )
        layers += [
            (*who, number_cell(number, str(number)), *_estimate(pearson), *_estimate(spearman))
            for number, (pearson, spearman) in found.layers.items()
        ]
    who_columns = (Column("Model", False), Column("Score", False), Column("Probing", False))
    numbers = (*_columns("Pearson"), *_columns("Spearman"))
    counts = Counter(found.verdict if found.pearson.interval else "too little to say" for found in relations)
    left_out = sorted({name for found in relations for name in found.left_out})
    sentences = (
        f"Of {_count(len(relations), 'comparison')} of a score with a probing, {_list(counts)}.",
        "Compared is what each compressed run lost of a score (dense minus compressed; of perplexity the logarithm of "
        "compressed over dense) with what its layers lost of selectivity, on average. They go together where the "
        "whole 95 % interval of Pearson's correlation is above 0.",
        NOT_INDEPENDENT.format("runs"),
        *([f"Left out, as their loss is infinite: {', '.join(left_out)}."] if left_out else []),
    )
    columns = (*who_columns, Column("Runs"), *numbers, Column("Layers that go along", False), Column("Answer", False))
    title = "Does loss of quality go with loss of what the layers know?"
    by_layer = Table(
        "related-layers", f"{title} Layer by layer", (*who_columns, Column("Layer"), *numbers), tuple(layers)
    )
    table = Table("related", title, columns, tuple(rows))
    return Section("pitfalls-relation", title, sentences, (table,), (by_layer,) if layers else ())


def _compared(answers: Answers) -> Section:
    baseline = answers.baseline
    tables = []
    sentences = [_difference_sentence(found) for found in answers.differences]
    if not sentences:
        sentences = [f"No method can be compared with {baseline}: no run of it has the size of another's."]
    else:
        numbers = (*_columns("Selectivity"), *_columns("F1"))
        words = (Column(name, False) for name in ("Model", "Method", "Minus"))
        columns = (*words, Column("Cells"), *numbers, Column("Answer", False))
        rows = [
            (
                text_cell(found.model),
                text_cell(found.method),
                text_cell(found.baseline),
                number_cell(len(found.cells), str(len(found.cells))),
                *_estimate(found.selectivity),
                *_estimate(found.f1),
                text_cell(found.verdict),
            )
            for found in answers.differences
        ]
        sentences += [
            "A cell is a task at a size, layers averaged; the numbers are means over cells, with 95 % intervals.",
            NOT_INDEPENDENT.format("cells"),
        ]
        tables.append(Table("compared", f"Methods minus {baseline}, at equal size", columns, tuple(rows)))
    for found in answers.failing:
        if found.method == "dense" and found.total[0] == found.total[1]:
            sentences.append(f"{found.model}: the dense model fails the check in every layer; there is little to lose.")
    if answers.failing:
        tasks = list(dict.fromkeys(task for found in answers.failing for task in found.tasks))
        words = (Column(name, False) for name in ("Model", "Method", "Size"))
        columns = (*words, *(Column(corpus_of(task)) for task in tasks), Column("all"))
        rows = [
            (
                *(text_cell(text) for text in (found.model, found.method, found.size)),
                *(_share(found.tasks.get(task)) for task in tasks),
                _share(found.total),
            )
            for found in answers.failing
        ]
        tables.append(
            Table("failing", f"Layers that fail the check (selectivity below {CHECK:g})", columns, tuple(rows))
        )
    title = "How do methods differ in what they leave of it?"
    return Section("pitfalls-methods", title, tuple(sentences), tuple(tables))


def _difference_sentence(found: Difference) -> str:
    words = {"keeps more": "more", "keeps less": "less"}.get(found.verdict)
    number = f"{_signed(found.selectivity.value)}{_range(found.selectivity)}"
    if words is None:
        return f"{found.model}: {found.method} against {found.baseline}, {number}; {found.verdict}."
    cells = _count(len(found.cells), "cell")
    return f"{found.model}: {found.method} leaves {words} selectivity than {found.baseline}, {number} over {cells}."


def _recovered(recoveries: Sequence[WonBack]) -> Section:
    columns = (
        *(Column(name, False) for name in ("Model", "Method", "Size", "Task", "Measure")),
        *(Column(name) for name in ("Dense", "Compressed", "Fine-tuned")),
        *(Column(name, group="Lost") for name in ("value", "error")),
        Column("Won back"),
        *(Column(name, group="Remains") for name in ("value", "error")),
        Column("Failing", False),
        Column("Answer", False),
    )
    rows = [
        (
            *(text_cell(text) for text in (found.model, found.method, found.size, found.task, found.measure)),
            *(_with_error(value, found.measure) for value in (found.dense, found.cut, found.recovered)),
            *_pair(found.lost),
            number_cell(found.won_back, percent(found.won_back)),
            *_pair(found.remains),
            text_cell(" → ".join(map(str, found.failed))) if found.failed else Cell(MISSING),
            text_cell(found.verdict),
        )
        for found in recoveries
    ]
    counts = Counter(found.verdict for found in recoveries)
    pairs = len({(found.model, found.method, found.size, json.dumps(found.settings)) for found in recoveries})
    sentences = [
        f"Of {_count(len(recoveries), 'measure')} on {_count(pairs, 'pair')} of runs with and without a short "
        f"fine-tuning after the compression, {_list(counts)}.",
        "Errors of probes are over their seeds, and that of a difference is the root of the sum of both squares. A "
        "difference that is not larger than its error counts as none. The dense model had no further fine-tuning.",
    ]
    if any(None in (found.dense.stderr, found.cut.stderr, found.recovered.stderr) for found in recoveries):
        sentences.append("Where a value has no error, as of a single seed, every difference counts.")
    title = "What is lost for good?"
    table = Table("recovered", title, columns, tuple(rows))
    return Section("pitfalls-recovery", title, tuple(sentences), (table,))


def answers_data(answers: Answers) -> dict[str, Any]:
    """The answers as plain data: every number in full, null for what is not finite."""
    return _plain(
        {
            "baseline": answers.baseline,
            "relations": [
                {**asdict(found), "together": found.together, "verdict": found.verdict} for found in answers.relations
            ],
            "differences": [{**asdict(found), "verdict": found.verdict} for found in answers.differences],
            "failing": [{**asdict(found), "total": found.total} for found in answers.failing],
            "recoveries": [
                {
                    **asdict(found),
                    "lost": asdict(found.lost),
                    "won_back": found.won_back,
                    "remains": asdict(found.remains),
                    "verdict": found.verdict,
                }
                for found in answers.recoveries
            ],
            "sentences": {section.slug: section.sentences for section in sections(answers)},
        }
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _columns(name: str) -> tuple[Column, ...]:
    return tuple(Column(label, group=name) for label in ESTIMATE)


def _estimate(found: Estimate) -> tuple[Cell, ...]:
    ends = found.interval or (None, None)
    return tuple(number_cell(value, score(value, "selectivity"), found.why) for value in (found.value, *ends))


def _pair(found: Score) -> tuple[Cell, Cell]:
    values = (found.value, found.stderr)
    return number_cell(values[0], score(values[0], "f1")), number_cell(values[1], score(values[1], "f1"))


def _with_error(found: Score, measure: str) -> Cell:
    return number_cell(found.value, score(found.value, measure), with_error(found.value, found.stderr, measure))


def _share(counts: tuple[int, int] | None) -> Cell:
    return Cell(MISSING) if counts is None else number_cell(counts[0] / counts[1], f"{counts[0]} of {counts[1]}")


def _range(found: Estimate) -> str:
    ends = found.interval
    return "" if ends is None else f" [{score(ends[0], 'selectivity')}, {score(ends[1], 'selectivity')}]"


def _signed(value: float | None) -> str:
    text = score(value, "selectivity")
    return f"+{text}" if value is not None and value > 0 else text


def _list(counts: Counter[Any]) -> str:
    """ "3 go together, 1 no relation shown"."""
    return ", ".join(f"{count} {what}" for what, count in counts.most_common())


def _spans(numbers: Sequence[int]) -> str:
    """ "1, 3-5" of [1, 3, 4, 5]; "none"."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in spans) or "none"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
