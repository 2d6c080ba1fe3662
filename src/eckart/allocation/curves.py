"""Curves: what each rank of a linear loses, and what that costs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from eckart.allocation.costs import Cost
from eckart.allocation.knapsack import Item
from eckart.lowrank import Layout
from eckart.models.sites import Site
from eckart.models.units import Unit


@dataclass(frozen=True, eq=False)
class Curve:
    """The loss of a site, or of a joint group factored as one stack, at every rank.

    Attributes:
        sites: one, or all of an input group.
        losses: (max_rank + 1,) loss at rank 0, 1, ...; `Factored.tails()`. Taken to a float64 array.
        weight: how much a unit of this loss counts against those of other curves.

    Raises:
        ValueError: sites that do not read one tensor, fewer than two losses or more than ranks, a loss that is not
            finite, or a weight that is not positive.
    """

    sites: tuple[Site, ...]
    losses: np.ndarray
    weight: float = 1.0

    def __post_init__(self) -> None:
        if not self.sites:
            raise ValueError("a curve is of one site or of several; it has none")
        if len({site.joint_group for site in self.sites}) > 1:
            names = ", ".join(site.name for site in self.sites)
            raise ValueError(f"{names} do not read one tensor and cannot share a right factor")
        losses = np.asarray(self.losses, dtype=np.float64)
        limit = min(self.unit.d_out, self.unit.d_in)
        if losses.ndim != 1 or not 2 <= len(losses) <= limit + 1:
            raise ValueError(f"{self.name}: losses have shape {losses.shape}, expected up to ({limit + 1},)")
        if not np.isfinite(losses).all():
            raise ValueError(f"{self.name}: the loss at rank {np.argmin(np.isfinite(losses))} is not finite")
        if not (np.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"{self.name}: weight {self.weight} is not positive")
        object.__setattr__(self, "losses", losses)

    @property
    def unit(self) -> Unit:
        return Unit(self.sites)

    @property
    def name(self) -> str:
        """`Unit.name`."""
        return self.unit.name

    def item(
        self, layout: Layout = "plain", rank_multiple: int = 1, cost: Cost = Unit.num_stored
    ) -> tuple[Item, tuple[int | None, ...]]:
        """The choice that a budget has to make here, and the rank of each of its options; None is dense.

        Options are the multiples of `rank_multiple` whose factors store and cost less than the dense weight, and the
        dense weight, which loses nothing.
        """
        unit = self.unit
        dense = cost(unit, None, layout)
        costs = {
            rank: cost(unit, rank, layout)
            for rank in range(rank_multiple, len(self.losses), rank_multiple)
            if unit.num_stored(rank, layout) < unit.num_params
        }
        ranks = [rank for rank, taken in costs.items() if taken < dense]
        item = Item(
            self.name,
            np.array([*(costs[rank] for rank in ranks), dense]),
            np.append(self.weight * self.losses[ranks], 0.0),
        )
        return item, (*ranks, None)

    @property
    def effective_rank(self) -> float:
        """exp(entropy) of the normalised singular values, in 1 ... max_rank (Roy and Vetterli, EUSIPCO 2007).

        p_i = sigma_i / sum sigma, with sigma_i^2 what the i-th direction takes off the loss; exp(-sum p_i log p_i).
        """
        singular = np.sqrt(np.maximum(-np.diff(self.losses), 0))
        if not singular.any():
            return 1.0
        shares = singular[singular > 0] / singular.sum()
        return float(np.exp(-(shares * np.log(shares)).sum()))
