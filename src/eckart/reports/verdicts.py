"""Verdicts: the answers to the probing paper's questions as people read them, and as machines do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from eckart.evals.result import CHECK, Score
from eckart.reports.counterparts import WHAT
from eckart.reports.formats import MISSING, percent, score, with_error
from eckart.reports.pitfalls import Answers, Difference, Relation, WonBack, answer
from eckart.reports.profiles import probings
from eckart.reports.resampling import Estimate
from eckart.reports.runs import Collection
from eckart.reports.tables import Cell, Column, Table, corpus_of, number_cell, text_cell
from eckart.support.plain_data import finite

# The columns of an estimate, in a group under its name.
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
    questions = []
    if answers.relations:
        tasks = [task for each in answers.relations for task in (each.score.rpartition(" ")[0], each.probing)]
        questions.append(_warned(_related(answers.relations), answers, tasks))
    if answers.differences or answers.failing:
        tasks = [task for each in answers.failing for task in each.tasks]
        questions.append(_warned(_compared(answers), answers, tasks))
    if answers.recoveries:
        tasks = [each.task for each in answers.recoveries]
        questions.append(_warned(_recovered(answers.recoveries), answers, tasks))
    return questions


def _warned(section: Section, answers: Answers, tasks: Sequence[str]) -> Section:
    """The section with what there is to warn of in its tasks."""
    warnings = [text for task in dict.fromkeys(tasks) for text in answers.clashes.get(task, ())]
    return replace(section, sentences=(*section.sentences, *warnings))


def _related(relations: Sequence[Relation]) -> Section:
    rows, layers = [], []
    for relation in relations:
        who = tuple(map(text_cell, (relation.model, relation.score, relation.probing)))
        along = f"{_spans(relation.together)} of {len(relation.layers)}" if relation.layers else MISSING
        rows.append(
            (
                *who,
                number_cell(relation.pearson.n, str(relation.pearson.n)),
                *_estimate(relation.pearson),
                *_estimate(relation.spearman),
                Cell(along, along if relation.layers else None),
                text_cell(relation.verdict),
            )
        )
        layers += [
            (*who, number_cell(number, str(number)), *_estimate(pearson), *_estimate(spearman))
            for number, (pearson, spearman) in relation.layers.items()
        ]
    who_columns = (Column("Model", False), Column("Score", False), Column("Probing", False))
    numbers = (*_columns("Pearson"), *_columns("Spearman"))
    counts = Counter(relation.verdict if relation.pearson.interval else "too little to say" for relation in relations)
    left_out = sorted({name for relation in relations for name in relation.left_out})
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
    sentences = [_difference_sentence(difference) for difference in answers.differences]
    if not sentences:
        sentences = [f"No method can be compared with {baseline}: no run of it has another's {WHAT}."]
    else:
        numbers = (*_columns("Selectivity"), *_columns("F1"))
        words = (Column(name, False) for name in ("Model", "Method", "Minus"))
        columns = (*words, Column("Cells"), *numbers, Column("Answer", False))
        rows = [
            (
                text_cell(difference.model),
                text_cell(difference.method),
                text_cell(difference.baseline),
                number_cell(len(difference.cells), str(len(difference.cells))),
                *_estimate(difference.selectivity),
                *_estimate(difference.f1),
                text_cell(difference.verdict),
            )
            for difference in answers.differences
        ]
        sentences += [
            "A cell is a task at a size, layers averaged; the numbers are means over cells, with 95 % intervals.",
            NOT_INDEPENDENT.format("cells"),
        ]
        tables.append(Table("compared", f"Methods minus {baseline}, at equal size", columns, tuple(rows)))
    for failing in answers.failing:
        if failing.method == "dense" and failing.total[0] == failing.total[1]:
            sentences.append(
                f"{failing.model}: the dense model fails the check in every layer; there is little to lose."
            )
    if answers.failing:
        tasks = list(dict.fromkeys(task for failing in answers.failing for task in failing.tasks))
        words = (Column(name, False) for name in ("Model", "Method", "Size"))
        columns = (*words, *(Column(corpus_of(task)) for task in tasks), Column("all"))
        rows = [
            (
                *(text_cell(text) for text in (failing.model, failing.method, failing.size)),
                *(_share(failing.tasks.get(task)) for task in tasks),
                _share(failing.total),
            )
            for failing in answers.failing
        ]
        tables.append(
            Table("failing", f"Layers that fail the check (selectivity below {CHECK:g})", columns, tuple(rows))
        )
    title = "How do methods differ in what they leave of it?"
    return Section("pitfalls-methods", title, tuple(sentences), tuple(tables))


def _difference_sentence(difference: Difference) -> str:
    words = {"keeps more": "more", "keeps less": "less"}.get(difference.verdict)
    number = f"{_signed(difference.selectivity.value)}{_range(difference.selectivity)}"
    if words is None:
        return f"{difference.model}: {difference.method} against {difference.baseline}, {number}; {difference.verdict}."
    cells = _count(len(difference.cells), "cell")
    pair = f"{difference.method} leaves {words} selectivity than {difference.baseline}"
    return f"{difference.model}: {pair}, {number} over {cells}."


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
            *(
                text_cell(text)
                for text in (recovery.model, recovery.method, recovery.size, recovery.task, recovery.measure)
            ),
            *(_with_error(value, recovery.measure) for value in (recovery.dense, recovery.cut, recovery.recovered)),
            *_pair(recovery.lost),
            number_cell(recovery.won_back, percent(recovery.won_back)),
            *_pair(recovery.remains),
            text_cell(" → ".join(map(str, recovery.failed))) if recovery.failed else Cell(MISSING),
            text_cell(recovery.verdict),
        )
        for recovery in recoveries
    ]
    counts = Counter(recovery.verdict for recovery in recoveries)
    pairs = len(
        {(recovery.model, recovery.method, recovery.size, json.dumps(recovery.settings)) for recovery in recoveries}
    )
    sentences = [
        f"Of {_count(len(recoveries), 'measure')} on {_count(pairs, 'pair')} of runs with and without a short "
        f"fine-tuning after the compression, {_list(counts)}.",
        "Errors of probes are over their seeds, and that of a difference is the root of the sum of both squares. A "
        "difference that is not larger than its error counts as none. The dense model had no further fine-tuning.",
    ]
    if any(None in (recovery.dense.stderr, recovery.cut.stderr, recovery.recovered.stderr) for recovery in recoveries):
        sentences.append("Where a value has no error, as of a single seed, every difference counts.")
    title = "What is lost for good?"
    table = Table("recovered", title, columns, tuple(rows))
    return Section("pitfalls-recovery", title, tuple(sentences), (table,))


def answers_data(answers: Answers) -> dict[str, Any]:
    """The answers as plain data: every number in full, null for what is not finite."""
    return finite(
        {
            "baseline": answers.baseline,
            "relations": [
                {**asdict(relation), "together": relation.together, "verdict": relation.verdict}
                for relation in answers.relations
            ],
            "differences": [
                {**asdict(difference), "verdict": difference.verdict} for difference in answers.differences
            ],
            "failing": [{**asdict(failing), "total": failing.total} for failing in answers.failing],
            "recoveries": [
                {
                    **asdict(recovery),
                    "lost": asdict(recovery.lost),
                    "won_back": recovery.won_back,
                    "remains": asdict(recovery.remains),
                    "verdict": recovery.verdict,
                }
                for recovery in answers.recoveries
            ],
            "sentences": {section.slug: section.sentences for section in sections(answers)},
        }
    )


def _columns(name: str) -> tuple[Column, ...]:
    return tuple(Column(label, group=name) for label in ESTIMATE)


def _estimate(estimate: Estimate) -> tuple[Cell, ...]:
    ends = estimate.interval or (None, None)
    return tuple(number_cell(value, score(value, "selectivity"), estimate.why) for value in (estimate.value, *ends))


def _pair(measured: Score) -> tuple[Cell, Cell]:
    values = (measured.value, measured.stderr)
    return number_cell(values[0], score(values[0], "f1")), number_cell(values[1], score(values[1], "f1"))


def _with_error(measured: Score, measure: str) -> Cell:
    return number_cell(
        measured.value, score(measured.value, measure), with_error(measured.value, measured.stderr, measure)
    )


def _share(counts: tuple[int, int] | None) -> Cell:
    return Cell(MISSING) if counts is None else number_cell(counts[0] / counts[1], f"{counts[0]} of {counts[1]}")


def _range(estimate: Estimate) -> str:
    ends = estimate.interval
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
