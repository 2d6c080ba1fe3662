"""Pitfalls: the probing paper's three research questions, answered from run directories.

1. Does loss of quality correlate with loss of what the layers know? (`relate`)
2. How do methods differ in it, at equal size? (`compare`, `fail`)
3. What is lost for good, and what does a short fine-tuning win back? (`recover`)

Errors of probing results are over their seeds. The error of a difference is the root of the sum of squares, as if its
two sides were independent; seeds share their splits, so that it is rather too large than too small.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eckart.evals.result import EvalResult, Score
from eckart.reports.counterparts import counterpart
from eckart.reports.profiles import blocks_of, probings
from eckart.reports.resampling import Estimate, correlations, mean_of
from eckart.reports.runs import Collection, Run, base_of, naming_damage
from eckart.reports.tables import clashes

# Against which the other methods are compared: what everybody starts from.
BASELINE = "svd"
# What is shown for all models together.
POOLED = "all models"


@dataclass(frozen=True)
class Point:
    """A compressed run: what it lost of a task's score, and of the probes' selectivity.

    Attributes:
        loss: of the score, in its unit; of perplexity, in nats per token.
        selectivity: lost, mean over the blocks' layers. layers: lost at each of them, 1 ... L.
    """

    model: str
    run: str
    loss: float
    selectivity: float
    layers: tuple[float, ...]


@dataclass(frozen=True)
class Relation:
    """Question 1 for one score and one probing task.

    Attributes:
        model: "all models" for all of them pooled.
        score: task and metric. probing: task.
        pearson, spearman: over the runs, intervals by resampling them.
        layers: {layer: (Pearson, Spearman)} with the selectivity lost at this layer; empty for all models together.
        left_out: runs with a loss that is not finite.
    """

    model: str
    score: str
    probing: str
    pearson: Estimate
    spearman: Estimate
    layers: Mapping[int, tuple[Estimate, Estimate]]
    points: tuple[Point, ...]
    left_out: tuple[str, ...] = ()

    @property
    def together(self) -> list[int]:
        """The layers whose loss correlates with the score's: Pearson's whole interval is above 0."""
        return [layer for layer, (pearson, _) in self.layers.items() if pearson.sign > 0]

    @property
    def verdict(self) -> str:
        if self.pearson.interval is None:
            return self.pearson.why
        return {1: "go together", 0: "no relation shown", -1: "go apart"}[self.pearson.sign]


@dataclass(frozen=True)
class Contrast:
    """A method minus the baseline on one task at one size, layers averaged."""

    model: str
    task: str
    size: str
    selectivity: float
    f1: float


@dataclass(frozen=True)
class Difference:
    """Question 2 for one method: how much more the layers know than the baseline's, over tasks and sizes."""

    model: str
    method: str
    baseline: str
    selectivity: Estimate
    f1: Estimate
    cells: tuple[Contrast, ...]

    @property
    def verdict(self) -> str:
        if self.selectivity.interval is None:
            return self.selectivity.why
        return {1: "keeps more", 0: "no difference shown", -1: "keeps less"}[self.selectivity.sign]


@dataclass(frozen=True)
class Failing:
    """Layers of a model that fail the check (selectivity below 0.2): {task: (failed, of)}."""

    model: str
    method: str
    size: str
    tasks: Mapping[str, tuple[int, int]]

    @property
    def total(self) -> tuple[int, int]:
        failed, layers = zip(*self.tasks.values(), strict=True)
        return sum(failed), sum(layers)


Verdict = Literal["no loss shown", "won back", "partly won back", "lost for good"]


@dataclass(frozen=True)
class WonBack:
    """Question 3 for one measure of one pair of runs, which differ in the fine-tuning after the compression alone.

    Attributes:
        measure: "selectivity" or "f1" of a probing task, or the metric of another.
        dense, cut, recovered: the measure of the three models.
        failed: layers that fail the check, of the three; None where the task is no probing.
        settings: of the fine-tuning.
    """

    model: str
    method: str
    size: str
    task: str
    measure: str
    dense: Score
    cut: Score
    recovered: Score
    failed: tuple[int, int, int] | None
    settings: Mapping[str, Any]

    @property
    def lost(self) -> Score:
        """By the compression."""
        return _difference(self.dense, self.cut)

    @property
    def remains(self) -> Score:
        """Lost, after the fine-tuning."""
        return _difference(self.dense, self.recovered)

    @property
    def won_back(self) -> float | None:
        """As a share of what was lost; None where nothing was."""
        if self.verdict == "no loss shown":
            return None
        return (self.recovered.value - self.cut.value) / self.lost.value

    @property
    def verdict(self) -> Verdict:
        """A difference that is not larger than its error is none."""
        won = _difference(self.recovered, self.cut)
        if self.lost.value <= (self.lost.stderr or 0.0):
            return "no loss shown"
        if self.remains.value <= (self.remains.stderr or 0.0):
            return "won back"
        return "partly won back" if won.value > (won.stderr or 0.0) else "lost for good"


@dataclass(frozen=True)
class Answers:
    """The answers to the three questions; empty where the runs say nothing of one.

    Attributes:
        clashes: {task: warnings, where runs measured it under different settings}.
    """

    baseline: str
    relations: tuple[Relation, ...]
    differences: tuple[Difference, ...]
    failing: tuple[Failing, ...]
    recoveries: tuple[WonBack, ...]
    clashes: Mapping[str, Sequence[str]] = field(default_factory=dict)


@naming_damage
def answer(collection: Collection, *, baseline: str = BASELINE, seed: int = 0) -> Answers:
    """Answer what the runs can answer.

    Args:
        baseline: the method that others are compared with.
        seed: of the resampling.

    Raises:
        ValueError: no compressed model was probed, or a probing result without its layers.

    Cost: 2000 resamples for every score, probing task, model and layer.
    """
    if not any(run.compressed.keys() & set(probings(collection)) for run in _compressed(collection)):
        raise ValueError(
            "no compressed model was probed: give runs whose recipe evaluates probing:cola, or another labelled set"
        )
    return Answers(
        baseline,
        tuple(relate(collection, seed=seed)),
        tuple(compare(collection, baseline=baseline, seed=seed)),
        tuple(fail(collection)),
        tuple(recover(collection)),
        {task: warnings for task in collection.tasks() if (warnings := clashes(collection, task))},
    )


def relate(collection: Collection, *, seed: int = 0) -> Iterator[Relation]:
    """Correlations between what runs lose of a score and of selectivity: by model, and for all models together.

    Runs with a fine-tuning after the compression are left out: it moves both in its own way. Pairs of a score and a
    probing of the same set come first.
    """
    pairs = [(score, probing) for score in _scores(collection) for probing in probings(collection)]
    for score, probing in sorted(pairs, key=lambda pair: _set_of(pair[0]) != _set_of(pair[1])):
        points: list[Point] = []
        dropped: dict[str, list[str]] = {}
        for run in _compressed(collection):
            point = _point(collection, run, score, probing)
            if run.recovery is None and point is not None:
                if math.isfinite(point.loss):
                    points.append(point)
                else:
                    dropped.setdefault(run.model, []).append(run.name)
        metric = next(run.compressed[score].metric for run in _compressed(collection) if score in run.compressed)
        name = f"{score} {metric}"
        models = list(dict.fromkeys(point.model for point in points))
        for model in models:
            own = tuple(point for point in points if point.model == model)
            layers = {
                number: _correlations(own, [point.layers[number - 1] for point in own], seed)
                for number in range(1, 1 + min(len(point.layers) for point in own))
            }
            whole = _correlations(own, [point.selectivity for point in own], seed)
            yield Relation(model, name, probing, *whole, layers, own, tuple(dropped.get(model, ())))
        if len(models) > 1:
            whole = _correlations(points, [point.selectivity for point in points], seed)
            left_out = tuple(run for runs in dropped.values() for run in runs)
            yield Relation(POOLED, name, probing, *whole, {}, tuple(points), left_out)


def compare(collection: Collection, *, baseline: str = BASELINE, seed: int = 0) -> Iterator[Difference]:
    """Every method minus the baseline at the same size: means over (task, size), intervals by resampling those cells.

    What else the two have to have in common says `counterpart`.
    """
    cells: dict[tuple[str, str, str], list[Contrast]] = {}
    for run in _compressed(collection):
        if run.method == baseline or run.size is None:
            continue
        for task in probings(collection):
            base = counterpart(collection, run, baseline, [task])
            if base is None:
                continue
            ours, theirs = run.compressed[task], base.compressed[task]
            selectivity = ours.read("selectivity") - theirs.read("selectivity")
            cell = Contrast(run.model, task, run.size, selectivity, ours.value - theirs.value)
            cells.setdefault((run.model, run.series, base.series), []).append(cell)
    for pair in dict.fromkeys((method, base) for _, method, base in cells):
        several = [own for (_, *names), own in cells.items() if tuple(names) == pair]
        if len(several) > 1:
            cells[POOLED, *pair] = [cell for own in several for cell in own]
    for (model, method, base_series), own in cells.items():
        means = [mean_of([getattr(cell, name) for cell in own], seed=seed) for name in ("selectivity", "f1")]
        yield Difference(model, method, base_series, means[0], means[1], tuple(own))


def fail(collection: Collection) -> Iterator[Failing]:
    """How many layers fail the check, of every dense model and of every run; the embeddings do not count."""
    tasks = probings(collection)
    for model in collection.models:
        dense = {task: result for task in tasks if (result := collection.dense(model, task)) is not None}
        rows = [("dense", "", dense)]
        rows += [
            (run.series, run.size or "", {task: run.compressed[task] for task in tasks if task in run.compressed})
            for run in collection.of(model)
        ]
        for method, size, results in rows:
            counts = {task: (_failed(result), len(blocks_of(result))) for task, result in results.items()}
            if counts:
                yield Failing(model, method, size, counts)


def recover(collection: Collection) -> Iterator[WonBack]:
    """Pairs of runs that differ in the fine-tuning after the compression alone: what it wins back of every measure."""
    plain = {_recipe_key(run): run for run in _compressed(collection) if run.recovery is None}
    for run in _compressed(collection):
        cut = plain.get(_recipe_key(run))
        if run.recovery is None or cut is None:
            continue
        for task in run.compressed:
            dense = collection.dense_of(run, task)
            if dense is None or task not in cut.compressed:
                continue
            if cut.compressed[task].settings != run.compressed[task].settings:
                continue
            three = (dense, cut.compressed[task], run.compressed[task])
            failed = None
            if dense.traits.section == "probing":
                measures = ["selectivity", dense.metric]
                failed = (_failed(three[0]), _failed(three[1]), _failed(three[2]))
            elif dense.traits.quality and dense.better == "higher":
                measures = [dense.metric]
            else:
                continue
            for measure in measures:
                values = [_score(result, measure) for result in three]
                yield WonBack(
                    run.model,
                    cut.series,
                    cut.size or "",
                    task,
                    measure,
                    *(values[0], values[1], values[2]),
                    failed,
                    dict(run.recovery),
                )


def _compressed(collection: Collection) -> list[Run]:
    return [run for run in collection.runs if not run.is_dense]


def _scores(collection: Collection) -> list[str]:
    """Tasks that say how good a model is."""
    names = [task for task in collection.tasks() if collection.traits(task).quality]
    return [name for name in names if any(r.compressed[name].better for r in collection.runs if name in r.compressed)]


def _set_of(task: str) -> str:
    """ "cola" of "classification:cola@train"."""
    return base_of(task).partition(":")[2]


def _point(collection: Collection, run: Run, score: str, probing: str) -> Point | None:
    results = [run.compressed.get(score), run.compressed.get(probing)]
    before = [collection.dense_of(run, task) for task in (score, probing)]
    if results[0] is None or results[1] is None or before[0] is None or before[1] is None:
        return None
    blocks = (blocks_of(before[1]), blocks_of(results[1]))
    if len(blocks[0]) != len(blocks[1]):
        raise ValueError(f"{run.name}: {probing} has {len(blocks[1])} layers, of the dense model {len(blocks[0])}")
    pairs = list(zip(*blocks, strict=True))
    layers = tuple(old.selectivity.value - new.selectivity.value for old, new in pairs)
    lost = before[1].read("selectivity") - results[1].read("selectivity")
    return Point(run.model, run.name, _loss(before[0], results[0]), lost, layers)


def _loss(dense: EvalResult, compressed: EvalResult) -> float:
    """What was lost, in the unit of the score; of what is compared by ratio log(compressed / dense)."""
    if dense.traits.ratio:
        change = math.log(compressed.value / dense.value) if math.isfinite(dense.value) else math.nan
    else:
        change = compressed.value - dense.value
    return change if dense.better == "lower" else -change


def _correlations(points: Sequence[Point], lost: Sequence[float], seed: int) -> tuple[Estimate, Estimate]:
    names = ("loss of the score", "loss of selectivity")
    return correlations([point.loss for point in points], lost, names=names, seed=seed)


def _recipe_key(run: Run) -> str:
    """A recipe without its fine-tuning, and without what is measured afterwards."""
    own = {key: value for key, value in run.recipe.items() if key not in ("recover", "evaluate")}
    return json.dumps(own, sort_keys=True, default=str)


def _failed(result: EvalResult) -> int:
    return sum(not layer.passes for layer in blocks_of(result))


def _score(result: EvalResult, name: str) -> Score:
    stderr = result.stderr if name == result.metric or name not in result.scores else result.scores[name].stderr
    return Score(result.read(name), stderr, result.n)


def _difference(one: Score, other: Score) -> Score:
    errors = [score.stderr for score in (one, other) if score.stderr is not None]
    return Score(one.value - other.value, math.hypot(*errors) if errors else None, min(one.n, other.n))
