"""Composition: a method, and everything that is done around it, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from eckart.allocation.search.surgical import PERPLEXITY_TOLERANCE, Tolerance
from eckart.calibration.sequential import Order
from eckart.compression.tuning.distillation import Distillation
from eckart.compression.tuning.recovery import Recovery
from eckart.compression.tuning.refinement import Refinement
from eckart.evals.tasks import Task, find_task
from eckart.lowrank import METHODS, Layout, Method, method_options
from eckart.lowrank.catalogue import INPUT_SHRINKAGE, kfac
from eckart.lowrank.entries import entry_options

# How far the anchored target's moments are shrunk: as far as the two-sided metric's input moment, so that both speak of
# the same inputs.
ANCHOR_SHRINKAGE = INPUT_SHRINKAGE


class Allocation(BaseModel):
    """How a budget is shared out: a name of `allocation.ALLOCATIONS`, or a search that measures the model.

    Attributes:
        shares: of per-role, {role: weight}.
        weights: of global: "equal" takes the method's own losses as they are, "probes" measures what they are worth.
        exact: of global: the true optimum.
        score: of the searches: a task. Of text, and of tasks of lm-eval, a search reads the split sfsd-search; of
            labelled sets the rows to train on. Of probing:SET it is the mean selectivity of the layers.
        limit: windows or questions that the score reads at most.
        tolerance: of surgical, as `Tolerance.parse` reads it: "0.5% per linear", "5%", "0.01". None is what the
            authors' release has: 0.5 % of perplexity at each linear, of other scores nothing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["uniform", "per-role", "effective-rank", "global", "sensitivity", "surgical"] = "uniform"
    shares: dict[str, float] = Field(default_factory=dict)
    weights: Literal["equal", "probes"] = "equal"
    exact: bool = False
    score: str | None = None
    limit: int | None = Field(None, gt=0)
    tolerance: str | None = Field(None, coerce_numbers_to_str=True)

    @property
    def searches(self) -> bool:
        """Whether it measures the model with trial cuts."""
        return self.name in ("sensitivity", "surgical")

    @property
    def allowed(self) -> Tolerance:
        """The tolerance, of a surgical search: what is said, else the authors'."""
        if self.tolerance is not None:
            return Tolerance.parse(self.tolerance)
        by_perplexity = self.score is not None and Task(self.score).kind == "perplexity"
        return PERPLEXITY_TOLERANCE if by_perplexity else Tolerance(0.0, relative=False)

    def spelled_out(self) -> Allocation:
        """The same with its tolerance said."""
        return self.model_copy(update={"tolerance": str(self.allowed)}) if self.name == "surgical" else self

    @model_validator(mode="after")
    def _fits(self) -> Allocation:
        if bool(self.shares) != (self.name == "per-role"):
            raise ValueError("shares, such as {mlp: 2, attention: 1}, go with per-role, and only with it")
        if self.searches and self.score is None:
            raise ValueError(f"{self.name} needs a score, such as perplexity:wikitext2 or lm-eval:piqa")
        if self.score is not None:
            if not self.searches:
                raise ValueError(f"{self.name} measures nothing: leave out score")
            _check_score(self.score)
        if self.limit is not None and not self.searches:
            raise ValueError(f"limit bounds the score of a search, and {self.name} is none")
        if self.tolerance is not None:
            if self.name != "surgical":
                raise ValueError(f"tolerance goes with surgical, not with {self.name}")
            Tolerance.parse(self.tolerance)
        if self.name != "global" and (self.weights != "equal" or self.exact):
            raise ValueError(f"weights and exact go with global, not with {self.name}")
        return self


@dataclass(frozen=True)
class Composition:
    """How a model is compressed.

    Attributes:
        method: what factors a linear.
        allocation: which linear gets which rank.
        layout: how factors are stored.
        order: what a linear is calibrated on.
        joint: linears that read one input may share a right factor.
        refit: left factors are fit once more, by least squares.
        refinement: gradient steps on each block, or None.
        distillation: gradient steps on the whole model, or None.
        recovery: a short fine-tuning of what came of it, or None.
    """

    method: Method
    allocation: Allocation = field(default_factory=Allocation)
    layout: Layout = "plain"
    order: Order = "one-shot"
    joint: bool = False
    refit: bool = False
    refinement: Refinement | None = None
    distillation: Distillation | None = None
    recovery: Recovery | None = None

    def describe(self, ranks: str | None = None) -> str:
        """In words, what is done around the method.

        Args:
            ranks: where they come from instead of the allocation.
        """
        words = [f"Ranks: {ranks or self.allocation.name}", f"layout: {self.layout}", f"order: {self.order}"]
        words += ["right factors shared where that is better"] if self.joint else []
        words += ["left factors refit"] if self.refit else []
        words += [f"blocks refined in {self.refinement.steps} steps"] if self.refinement else []
        words += [f"distilled in {self.distillation.steps} steps"] if self.distillation else []
        words += [f"fine-tuned in {self.recovery.steps} steps"] if self.recovery else []
        return ", ".join(words)

    @property
    def in_order(self) -> Method:
        """The method as it factors each linear in the composition's order; it asks for what a refit needs as well."""
        method = self.method.anchored(ANCHOR_SHRINKAGE) if self.order == "anchored" else self.method
        return replace(method, needs=method.needs | {"second_moment"}) if self.refit else method

    @property
    def holds_out(self) -> bool:
        """Whether something has to prove itself on samples that no statistic sees."""
        return self.refit or self.refinement is not None or self.distillation is not None


def best(**options: Any) -> Composition:
    """kfac, ranks from a knapsack over all linears, pivoted layout, anchored order, refined blocks.

    docs/ablation.md has what each of them earns, alone and beside the others. Settings are those of kfac.
    """
    return Composition(
        method=kfac(**options),
        allocation=Allocation(name="global"),
        layout="pivoted",
        order="anchored",
        refinement=Refinement(),
    )


def best_distilled(**options: Any) -> Composition:
    """best, and then the whole model distilled: better still, for those who have the memory to train the model."""
    return replace(best(**options), distillation=Distillation())


# Whole ways to compress, by name; a recipe names one where it may name a method.
COMPOSITIONS: dict[str, Callable[..., Composition]] = {"best": best, "best-distilled": best_distilled}


def composition_options(name: str) -> dict[str, Any]:
    """{setting: default} of a composition or of a method of the catalogue. Raises ValueError on an unknown name."""
    entry_options({**COMPOSITIONS, **METHODS}, "method", name)
    return method_options(COMPOSITIONS[name]().method.name if name in COMPOSITIONS else name)


def _check_score(task: str) -> None:
    """Raises ValueError for a task that is no measure of one model alone."""
    if find_task(task).needs or Task(task).kind == "cost":
        known = "perplexity:CORPUS, lm-eval:TASK, probing:SET, classification:SET and stereoset"
        raise ValueError(f"{task!r} is no score to search by; there are {known}")
