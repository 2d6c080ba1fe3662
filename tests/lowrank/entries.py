"""Entries of METHODS with their settings, and a case: one of them on a layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor

from eckart.lowrank import METHODS, Method, build_method

from .reference import Layer, weighted_loss

RELATIVE = 1e-9


@dataclass(frozen=True)
class Entry:
    name: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return " ".join([self.name, *(f"{key}={value}" for key, value in self.options.items())])

    def build(self) -> Method:
        return build_method(self.name, self.options)


# Settings other than the defaults, where they change the method.
OTHER_SETTINGS = (
    Entry("fwsvd", {"fisher_axis": "out"}),
    Entry("asvd-0", {"alpha": 1.0}),
    Entry("nsvd-i", {"share": 0.5}),
    Entry("nsvd-ii", {"share": 1.0}),
    Entry("nid-i", {"share": 0.5}),
    Entry("shrunk", {"share": 0.5, "bias": True}),
    Entry("sfsd", {"centred": False}),
    Entry("kfac", {"shrink_in": 0.0, "bias": False}),
    Entry("kfac", {"shrink_out": 1.0}),
)
ENTRIES = (*map(Entry, METHODS), *OTHER_SETTINGS)
SINGLE_STAGE = tuple(entry for entry in ENTRIES if entry.build().residual is None)
NESTED = tuple(entry for entry in ENTRIES if entry.build().residual is not None)

every_entry = pytest.mark.parametrize("entry", ENTRIES, ids=str)
single_stage = pytest.mark.parametrize("entry", SINGLE_STAGE, ids=str)


class Case:
    """A method on a layer, with the statistics it asks for and no others.

    Attributes:
        root, metric: B and A of the first stage; target, floor: T, and the loss that no rank removes.
        scale: what rounding errors of its losses are relative to.
    """

    def __init__(self, method: Method, layer: Layer) -> None:
        self.method, self.layer = method, layer
        self.moments = layer.moments(method.needs)
        self.root = method.root(self.moments)
        self.metric = None if method.stage.metric is None else method.stage.metric(self.moments)
        self.factored: Any = method.factor(layer.weight, self.moments)
        first = self.factored if method.residual is None else self.factored.first
        self.target, self.floor = first.target, first.floor
        self.scale = self.factored.tail(0) + float((layer.x @ layer.weight.T).square().sum(1).mean())

    def loss(self, matrix: Tensor) -> float:
        """||A (T - M) B||^2: what the method itself minimises."""
        return weighted_loss(self.target - matrix, self.root, self.metric)
