"""Rows: what the sections share: names of runs, looks of methods, rows of the tables of numbers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from eckart.evals.result import EvalResult, SectionName
from eckart.reports.formats import amount, percent, score, with_error
from eckart.reports.palette import Look, give_looks
from eckart.reports.runs import Collection, Run
from eckart.reports.tables import Cell, Column, corpus_of, number_cell, text_cell


def looks_of(collection: Collection) -> dict[str, Look]:
    """How every series is drawn, in all figures alike."""
    return give_looks([(run.method, run.series) for run in collection.runs])


def tasks_of(collection: Collection, section: SectionName | None = None) -> list[str]:
    """Tasks of a section, or of all: those of the compressed models, then those that only dense models have."""
    return list(dict.fromkeys([*collection.tasks(section), *collection.tasks(section, where="dense")]))


def results_on(collection: Collection, task: str) -> list[EvalResult]:
    """Every result on a task, of dense and of compressed models."""
    return [results[task] for run in collection.runs for results in (run.dense, run.compressed) if task in results]


def scores_of(result: EvalResult | None) -> list[str]:
    """The names of a result's further scores."""
    return [] if result is None else list(result.scores)


def name_run(run: Run) -> str:
    """ "nsvd-i, keep 0.7"."""
    return f"{run.series}, {run.size}" if run.size else run.series


def names_of(runs: Sequence[Run]) -> dict[str, str]:
    """{run's name: what it is called among these}: its series, with its size where another has the same series."""
    series = [run.series for run in runs]
    return {run.name: run.series if series.count(run.series) == 1 else name_run(run) for run in runs}


def hover_text(run: Run, result: EvalResult) -> str:
    """What a mark of a run says: who, the value with its error, the size."""
    size, share = run.counted("bytes", 1), run.share
    kept = "" if share is None else f", {percent(share)} of the parameters"
    value = with_error(result.value, result.stderr, result.metric)
    return f"{name_run(run)}\n{result.metric} {value}\n{amount(size, 'B')}{kept}"


def id_columns(*, task: str) -> tuple[Column, ...]:
    """The columns that say which run and which task a row is of."""
    return (Column("Model", False), Column("Method", False), Column("Size", False), Column(task, False))


def run_row(
    run: Run, task: str, result: EvalResult, inner: Iterable[str], *, size: Cell | None = None
) -> tuple[Cell, ...]:
    """A run's row: who, the task, perhaps its size, value and error, and the scores named in `inner`."""
    who = (text_cell(run.model), text_cell(run.series), text_cell(run.size or ""))
    return _numbers(who, task, result, inner, size)


def dense_row(
    model: str, task: str, result: EvalResult, inner: Iterable[str], *, size: Cell | None = None
) -> tuple[Cell, ...]:
    """The same of a dense model."""
    return _numbers((text_cell(model), text_cell("dense"), text_cell("")), task, result, inner, size)


def bytes_cell(size: float | None) -> Cell:
    """A number of bytes."""
    return number_cell(size, amount(size, "B"))


def score_cells(result: EvalResult, names: Iterable[str], metric: str | None = None) -> list[Cell]:
    """Scores of a result by name, written as `metric` is (None: as their own names say)."""
    cells = []
    for name in names:
        entry = result.scores.get(name)
        value = None if entry is None else entry.value
        cells.append(number_cell(value, score(value, metric or name)))
    return cells


def _numbers(
    who: tuple[Cell, ...], task: str, result: EvalResult, inner: Iterable[str], size: Cell | None
) -> tuple[Cell, ...]:
    return (
        *who,
        text_cell(corpus_of(corpus_of(task)) if result.traits.section == "agreement" else corpus_of(task)),
        *([] if size is None else [size]),
        number_cell(result.value, score(result.value, result.metric)),
        number_cell(result.stderr, score(result.stderr, result.metric)),
        *score_cells(result, inner),
    )
