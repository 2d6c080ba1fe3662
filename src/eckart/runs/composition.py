"""Composition: a method, and everything that is done around it, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from eckart.allocation import Allocation
from eckart.calibration.sequential import Order
from eckart.compression.tuning.distillation import Distillation
from eckart.compression.tuning.recovery import Recovery
from eckart.compression.tuning.refinement import Refinement
from eckart.lowrank import METHODS, Layout, Method, method_options
from eckart.lowrank.catalogue import anchored, kfac
from eckart.lowrank.entries import entry_options
from eckart.lowrank.storage import GROUP

# Bits that numbers may be kept in, see `Composition.bits`.
Bits = Literal["auto", 8, 4, 3, 2]


@dataclass(frozen=True)
class Composition:
    """How a model is compressed.

    Attributes:
        method: what factors a linear.
        allocation: which linear gets which rank.
        layout: how factors are stored.
        order: what a linear is calibrated on.
        joint: linears that read one input may share a right factor.
        refit: left factors are fitted once more, by least squares.
        refinement: gradient steps on each block, or None.
        distillation: gradient steps on the whole model, or None.
        recovery: a short fine-tuning of the compressed model, or None.
        bits: that numbers are kept in; "auto" for those of a knapsack over ranks and bits, None for the model's type.
        group: numbers that share a scale, where they are kept in few bits.
        turns: how often at most a quantised weight and its correction are made anew, each for what the other leaves.
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
    bits: Bits | None = None
    group: int = GROUP
    turns: int = 0

    def describe(self, ranks: str | None = None) -> str:
        """In words, what is done around the method.

        Args:
            ranks: where they come from instead of the allocation.
        """
        words = [f"Ranks: {ranks or self.allocation.name}", f"layout: {self.layout}", f"order: {self.order}"]
        words += [] if self.bits is None else ["bits by the budget" if self.bits == "auto" else f"{self.bits} bits"]
        words += ["right factors shared where that is better"] if self.joint else []
        words += ["left factors refit"] if self.refit else []
        words += [f"blocks refined in {self.refinement.steps} steps"] if self.refinement else []
        words += [f"distilled in {self.distillation.steps} steps"] if self.distillation else []
        words += [self.recovery.describe()] if self.recovery else []
        return ", ".join(words)

    @property
    def in_order(self) -> Method:
        """The method as it factors each linear in the composition's order; it asks for what a refit needs as well."""
        method = anchored(self.method) if self.order == "anchored" else self.method
        return replace(method, needs=method.needs | {"second_moment"}) if self.refit else method

    @property
    def holds_out(self) -> bool:
        """Whether samples are held out from all statistics, to judge a refit, refinement or distillation by."""
        return self.refit or self.refinement is not None or self.distillation is not None


# How much time a composition may take. docs/methods.md has what each step up gains and costs.
Effort = Literal["low", "medium", "high"]


def best(effort: Effort = "medium", **options: Any) -> Composition:
    """kfac, ranks from a knapsack over all linears, pivoted layout; more with more effort.

    docs/ablation.md has the gain of each part, alone and with the others. A recipe that does not say `bias` has it only
    where the model can be exported dense with it: see `added_bias.settle_bias`.

    Args:
        effort: low calibrates every linear on the dense model; medium in anchored order; high refines the blocks too.
        options: settings of kfac.
    """
    return Composition(
        method=kfac(**options),
        allocation=Allocation(name="global"),
        layout="pivoted",
        order="one-shot" if effort == "low" else "anchored",
        refinement=Refinement() if effort == "high" else None,
    )


def best_distilled(effort: Effort = "high", **options: Any) -> Composition:
    """best, and then the whole model distilled: better still, for those who have the memory to train the model."""
    return replace(best(effort, **options), distillation=Distillation())


# Compositions by name; a recipe may name one instead of a method.
COMPOSITIONS: dict[str, Callable[..., Composition]] = {"best": best, "best-distilled": best_distilled}


def composition_options(name: str) -> dict[str, Any]:
    """{setting: default} of a composition or of a method of the catalogue. Raises ValueError on an unknown name."""
    entry_options({**COMPOSITIONS, **METHODS}, "method", name)
    return method_options(COMPOSITIONS[name]().method.name if name in COMPOSITIONS else name)
