"""Tables: rows and columns of a report, with what is shown, what is sorted by, and what goes into a CSV file."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from eckart.evals.improvement import average_improvement
from eckart.evals.result import Better, EvalResult, Score, SectionName
from eckart.reports.counterparts import WHAT, counterpart
from eckart.reports.formats import MISSING, amount, number, percent, score
from eckart.reports.runs import Collection, Run, Study, base_of, kind_of

# Against which the NSVD paper prints its average improvement.
BASELINE = "asvd-i"
# The sections that are in the summary, in the order of its columns.
TITLES: dict[SectionName, str] = {
    "perplexity": "Perplexity",
    "stereoset": "StereoSet",
    "divergence": "Divergence from dense",
    "distance": "Distance from the calibration text",
    "accumulation": "Error after the last block",
    "probing": "Probing, mean of layers",
    "tasks": "Tasks",
}
ARROWS: dict[Better | None, str] = {"higher": "↑", "lower": "↓", None: ""}


@dataclass(frozen=True)
class Column:
    """A column.

    Attributes:
        label: its heading. group: a heading over several columns.
        numeric: it is aligned right and starts its sorting with the largest.
    """

    label: str
    numeric: bool = True
    group: str = ""


@dataclass(frozen=True)
class Cell:
    """A cell.

    Attributes:
        text: as shown. value: sorted by and exported, in full; None where there is nothing.
        hint: a longer reading, shown on hover. best: the best of its kind.
    """

    text: str
    value: float | str | None = None
    hint: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table: as many cells in every row as there are columns."""

    slug: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    reading: str = ""
    notes: tuple[str, ...] = ()

    @property
    def groups(self) -> list[tuple[str, int]]:
        """(group, columns under it) from left to right; empty where no column has a group."""
        spans: list[tuple[str, int]] = []
        for column in self.columns:
            if spans and spans[-1][0] == column.group:
                spans[-1] = (column.group, spans[-1][1] + 1)
            else:
                spans.append((column.group, 1))
        return spans if any(group for group, _ in spans) else []


def text_cell(text: object, hint: str = "") -> Cell:
    """A cell of text."""
    return Cell(str(text), str(text), hint)


def number_cell(value: float | None, text: str | None = None, hint: str = "") -> Cell:
    """A cell with a number, shown by `number` where no text is given."""
    return Cell(number(value) if text is None else text, value, hint)


def corpus_of(task: str) -> str:
    """ "wikitext2" of "perplexity:wikitext2"; the whole name where there is no corpus."""
    return task.partition(":")[2] or task


def gain(run: Run, baseline: Run | None) -> float | None:
    """The average improvement in perplexity over the baseline's run, on the corpora that were not calibrated on.

    None where there is no such corpus, where one of the two lacks a corpus of the other (a mean over the rest is
    another number) or measured it under other settings, or a perplexity of the baseline is infinite.
    """
    if baseline is None:
        return None
    own = run.corpora
    ours, theirs = (
        {
            task: result
            for task, result in measured.items()
            if result.traits.ratio and corpus_of(base_of(task)) not in own
        }
        for measured in (run.compressed, baseline.compressed)
    )
    if not ours or ours.keys() != theirs.keys() or any(math.isinf(base.value) for base in theirs.values()):
        return None
    if any(result.settings != theirs[task].settings for task, result in ours.items()):
        return None
    values, bases = ({task: result.value for task, result in each.items()} for each in (ours, theirs))
    return average_improvement(values, bases)


def summary(collection: Collection, baseline: str | None = None) -> Table:
    """One row for every model as it was and one for every run: what remains of it, and the main value of every task.

    Args:
        baseline: the method that improvements are counted from; None is asvd-i, where there is one.

    Raises:
        ValueError: a baseline that no run has.
    """
    methods = {run.method for run in collection.runs}
    if baseline is not None and baseline not in methods:
        raise ValueError(f"no run has the baseline {baseline!r}; there are {', '.join(sorted(methods))}")
    baseline = baseline or BASELINE
    measured = list(dict.fromkeys([*collection.tasks(), *collection.tasks(where="dense")]))
    traits = {task: collection.traits(task) for task in measured}
    tasks = [task for section in TITLES for task in measured if traits[task].section == section]
    better = {
        task: next(
            results[task].better
            for run in collection.runs
            for results in (run.compressed, run.dense)
            if task in results
        )
        for task in tasks
    }
    measures = [(task, name) for task in tasks for name in (None, *traits[task].shown)]
    compared = baseline in methods and len(methods) > 1
    columns = [
        Column("Model", False),
        Column("Method", False),
        Column("Keep"),
        Column("Parameters left"),
        Column("Bytes"),
        *([Column(f"Gain on {baseline}")] if compared else []),
        *(
            Column(
                " ".join(filter(None, (corpus_of(task), name, ARROWS[better[task]]))),
                group=TITLES[traits[task].section],
            )
            for task, name in measures
        ),
        Column("Run", False),
    ]
    rows: list[tuple[Cell, ...]] = []
    for model in collection.models:
        runs = collection.of(model)
        counted = next((run for run in runs if run.compression), None)
        full = next(str(run.recipe["model"]) for run in collection.runs if run.model == model)
        results = {task: result for task in tasks if (result := collection.dense(model, task)) is not None}
        rows.append(
            (
                text_cell(model, full),
                text_cell("dense"),
                Cell(MISSING),
                *_counts(counted, 0),
                *([Cell(MISSING)] if compared else []),
                *(_value(results.get(task), name) for task, name in measures),
                Cell(MISSING),
            )
        )
        best = _best(runs, measures, better)
        for run in runs:
            rows.append(
                (
                    text_cell(model, str(run.recipe["model"])),
                    text_cell(run.series),
                    number_cell(run.keep, f"{run.keep:g}") if run.keep is not None else Cell(run.size or MISSING),
                    *_counts(run, 1),
                    *([_gain_cell(collection, run, baseline)] if compared else []),
                    *(
                        replace(
                            _value(run.compressed.get(task), name, run.dense.get(task)),
                            best=best.get((run.size, task, name)) == _reading(run, task, name) is not None,
                        )
                        for task, name in measures
                    ),
                    text_cell(run.name, str(run.directory)),
                )
            )
    notes = ["Bold: the best of a model at one share kept."] if any(cell.best for row in rows for cell in row) else []
    if compared:
        notes.append(
            f"Gain: mean over corpora of 1 \u2212 perplexity ÷ {baseline}'s at the same {WHAT}, "
            "without the corpus of the calibration."
        )
    return Table(
        "summary",
        "Summary",
        tuple(columns),
        tuple(rows),
        "The dense model of each kind comes first; hover a number for its error and for the dense value beside it.",
        tuple(notes),
    )


def _counts(run: Run | None, moment: int) -> tuple[Cell, Cell]:
    """Parameters and bytes before (0) or after (1)."""
    if run is None or run.compression is None:
        return Cell(MISSING), Cell(MISSING)
    params, size = run.counted("params", moment), run.counted("bytes", moment)
    share = run.share if moment else 1.0
    return (
        number_cell(share, percent(share), f"{params:,.0f} parameters" if params is not None else ""),
        number_cell(size, amount(size, "B"), f"{size:,.0f} bytes" if size is not None else ""),
    )


def _value(result: EvalResult | None, name: str | None = None, dense: EvalResult | None = None) -> Cell:
    """The main value of a result, or the score of a name, with the dense model's before it in the hint."""
    measured = None if result is None else _score(result, name)
    if result is None or measured is None:
        return Cell(MISSING)
    metric = name or result.metric
    text = score(measured.value, metric)
    error = "" if measured.stderr is None else f" ± {score(measured.stderr, metric)}"
    was = None if dense is None else _score(dense, name)
    before = "" if was is None else f"dense {score(was.value, metric)} → "
    return number_cell(measured.value, text, f"{before}{text}{error} {metric}, n = {result.n:,}")


def _score(result: EvalResult, name: str | None) -> Score | None:
    return Score(result.value, result.stderr, result.n) if name is None else result.scores.get(name)


def _reading(run: Run, task: str, name: str | None = None) -> float | None:
    measured = _score(run.compressed[task], name) if task in run.compressed else None
    return None if measured is None else measured.value


def _best(
    runs: Sequence[Run], measures: Sequence[tuple[str, str | None]], better: Mapping[str, str | None]
) -> dict[tuple[str | None, str, str | None], float]:
    """{(size, task, score): best value} where at least two runs of that size can be compared."""
    best: dict[tuple[str | None, str, str | None], float] = {}
    for task, name in measures:
        pick: Callable[[list[float]], float] = max if better[task] == "higher" else min
        for size in {run.size for run in runs if run.size is not None}:
            values = [v for run in runs if run.size == size and (v := _reading(run, task, name)) is not None]
            if len(values) > 1 and better[task] is not None and len(set(values)) > 1:
                best[size, task, name] = pick(values)
    return best


def _gain_cell(collection: Collection, run: Run, baseline: str) -> Cell:
    """A run's gain, with the run that it is against in the hint, or why there is none."""
    if run.method == baseline:
        return Cell("baseline", 0.0)
    base = counterpart(collection, run, baseline)
    share = gain(run, base)
    if base is None:
        why = f"no run of {baseline} has the same {WHAT}"
    elif share is None:
        why = f"no finite perplexities besides the calibration's that {base.name} has as well, measured alike"
    else:
        why = f"against {base.name}"
    return number_cell(share, percent(share, signed=True), why)


def paper_table(study: Study, place: int) -> Table:
    """The published numbers of a study next to ours; ours alone where nothing was published.

    Args:
        place: of the study in the report, for its anchor.
    """
    columns = [Column("", False)]
    published_any = any(value is not None for row in study.rows for value in row.get("published") or ())
    improvements = ("improvement", "published_improvement")
    improved = any(row.get(key) is not None or row.get("unmeasured") for row in study.rows for key in improvements)
    labels = [_label(column) for column in study.columns]
    labels = [  # two evaluations of one corpus
        f"{kind_of(column)} {label}" if labels.count(label) > 1 else label
        for column, label in zip(study.columns, labels, strict=True)
    ]
    for label in [*labels, *(["average improvement"] if improved else [])]:
        comparison = [Column("ours", group=label), Column("published", group=label), Column("difference", group=label)]
        columns += comparison if published_any else [Column(label)]
    rows = []
    for row in study.rows:
        cells = [text_cell(row.get("label", ""), str(row.get("run") or "no run"))]
        lists: list[Sequence[Any]] = [
            row.get(key) or [None] * len(study.columns) for key in ("ours", "published", "difference")
        ]
        refusals = dict(row.get("refusals") or {})
        for name, section, ours, published, difference in zip(study.columns, study.sections, *lists, strict=True):
            task, _, metric = name.partition("#")
            show = amount if section == "cost" else partial(score, metric=metric)
            why = next((str(why) for refused, why in refusals.items() if base_of(refused) == base_of(task)), None)
            cells.append(Cell("refused", None, why) if ours is None and why else number_cell(ours, show(ours)))
            if published_any:
                cells += [number_cell(published, show(published)), number_cell(difference, _signed(difference, show))]
        if improved:
            ours, published = row.get("improvement"), row.get("published_improvement")
            apart = None if ours is None or published is None else ours - published
            shown = (ours, published, apart) if published_any else (ours,)
            cells += [number_cell(value, percent(value, signed=True)) for value in shown]
            if ours is None and row.get("unmeasured"):
                lacking = ", ".join(_label(str(column)) for column in row["unmeasured"])
                cells[-len(shown)] = Cell("incomplete", None, f"not measured: {lacking}")
        rows.append(tuple(cells))
    return Table(f"paper-{place}", study.title, tuple(columns), tuple(rows), study.about, study.notes)


def repeats(whole: Table, part: Table) -> bool:
    """Whether a table has numbers, and all of them stand in another one, to nine digits: it need not be shown again."""

    def numbers(table: Table) -> set[str]:
        return {f"{cell.value:.9g}" for row in table.rows for cell in row if isinstance(cell.value, int | float)}

    return bool(numbers(part)) and numbers(part) <= numbers(whole)


def _label(column: str) -> str:
    """ "piqa delta" of "agreement:lm-eval:piqa#delta"."""
    task, _, inner = column.partition("#")
    if ":" not in task:
        return inner or task
    return f"{task.rpartition(':')[2]} {inner}".strip()


def _signed(value: float | None, show: Callable[[float | None], str]) -> str:
    text = show(value)
    return f"+{text}" if value is not None and value > 0 else text


def incomplete(collection: Collection) -> list[tuple[str, str]]:
    """(run, what it lacks) for every run that is not whole."""
    return [(run.name, "; ".join(run.missing)) for run in collection.runs if run.missing]


def warnings(collection: Collection) -> list[tuple[str, str]]:
    """(run, what a result of its compressed model warns of), such as a text far from the calibration text."""
    return [
        (run.name, result.warning)
        for run in collection.runs
        for result in run.compressed.values()
        if result.warning is not None
    ]


def environments(collection: Collection) -> list[tuple[str, list[str]]]:
    """(where and with what, names of the runs) for every environment that differs."""
    by_environment: dict[str, list[str]] = {}
    for run in collection.runs:
        by_environment.setdefault(describe_environment(run.environment), []).append(run.name)
    return list(by_environment.items())


def describe_environment(environment: Mapping[str, Any]) -> str:
    """An environment in a line: machine, cores, Python, packages."""
    if not environment:
        return "not recorded"
    packages = environment.get("packages")
    place = [environment.get("system"), environment.get("machine")]
    parts = [" ".join(str(word) for word in place if word)]
    parts += [f"{environment['cores']} cores"] if environment.get("cores") else []
    parts += [f"CUDA {environment['cuda']}"] if environment.get("cuda") else []
    parts += [f"Python {environment['python']}"] if environment.get("python") else []
    parts += [f"{name} {version}" for name, version in (packages if isinstance(packages, Mapping) else {}).items()]
    return " · ".join(part for part in parts if part)


def clashes(collection: Collection, task: str) -> list[str]:
    """Warnings for a task that was measured under different settings on one model: such values do not compare."""
    warnings = []
    for model in collection.models:
        settings = [
            results[task].settings
            for run in collection.runs
            for results in (run.dense, run.compressed)
            if run.model == model and task in results
        ]
        keys = sorted({key for setting in settings for key in setting})
        differ = [key for key in keys if len({repr(setting.get(key)) for setting in settings}) > 1]
        if differ:
            warnings.append(f"{task} on {model} was measured with different {', '.join(differ)}: do not compare.")
    return warnings
