"""Few bits: for each linear a rank and bits, chosen together so that the model loses least within its bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from eckart.allocation.fitting import check_multiple
from eckart.allocation.knapsack import Item, solve
from eckart.allocation.rank_plan import RankPlan, settle
from eckart.lowrank.codes import round_nearest
from eckart.lowrank.storage import GROUP, PLAIN, Storage
from eckart.models.sites import Site

# Bits that a weight may be quantised to, and that factors may be kept in beside the model's own type. Two bits are
# out: what they lose is beyond what a quadratic loss foresees.
BASES = (3, 4, 8)
FACTORS = (4, 8)
# Rows of normal numbers by which the noise of rounding is measured.
SAMPLES = 4096


@dataclass(frozen=True, eq=False)
class BitCurve:
    """What a linear loses at every rank, in each way to keep its weight.

    Attributes:
        losses: {bits of a quantised weight: (ranks + 1,) loss with a correction of rank 0, 1, ...}; under None the
            losses of factors alone. Taken to float64 arrays.
        itemsize: bytes of a number of the linear's own type, which need not be the model's.

    Raises:
        ValueError: nothing to choose from, or a loss that is not finite.
    """

    site: Site
    losses: Mapping[int | None, np.ndarray]
    itemsize: int = 2

    def __post_init__(self) -> None:
        losses = {base: np.asarray(each, dtype=np.float64) for base, each in self.losses.items()}
        if not losses:
            raise ValueError(f"{self.site.name}: there is no way to keep it to choose from")
        for base, each in losses.items():
            if each.ndim != 1 or not np.isfinite(each).all():
                raise ValueError(f"{self.site.name}: the losses with a weight in {base} bits are not finite numbers")
        object.__setattr__(self, "losses", losses)


def share_bytes(
    sites: Sequence[Site],
    curves: Sequence[BitCurve],
    budget: int,
    *,
    factors: Sequence[int | None] = (None, *FACTORS),
    group: int = GROUP,
    rank_multiple: int = 1,
    exact: bool = False,
) -> RankPlan:
    """The ranks and bits that lose the least together: minimise sum loss_l(way_l) with sum bytes_l(way_l) <= budget.

    The ways of a linear are: as it is, at no loss; factors alone, of any rank and bits; a quantised weight alone; and a
    quantised weight with factors of any rank and bits, which correct it. Rounding factors of bits b adds to the loss

        2 noise(b) (loss(0) - loss(r)),

    what independent errors of that relative size in left and right do to the part of the output that they carry.

    Args:
        sites: every site of the model; those of no curve stay as they are.
        budget: bytes of the curves' sites together, weights and scales, biases not counted.
        factors: bits that factors may have; None is the linear's own type.
        group: numbers that share a scale.
        exact: the true optimum; else within a step of it.

    Raises:
        ValueError: the smallest ways take more than `budget`; the message says how much.
    """
    check_multiple(rank_multiple)
    if not curves:
        raise ValueError("there is nothing to share a budget among: no linear is selected")
    made = [_ways(curve, factors, group, rank_multiple) for curve in curves]
    least = sum(int(item.costs.min()) for item, _ in made)
    if budget < least:
        raise ValueError(
            f"a budget of {budget:,} bytes for the selected linears is too small: they take {least:,} at the least; "
            "allow more, or choose more linears"
        )
    choices = solve([item for item, _ in made], budget, exact=exact).choices
    ranks, stored = {}, {}
    for curve, (_, ways), at in zip(curves, made, choices, strict=True):
        storage, rank = ways[at]
        ranks[curve.site.name] = rank
        if not storage.is_plain:
            stored[curve.site.name] = storage
    return settle(sites, ranks, stored=stored)


# How a linear is kept, and the rank of its factors.
Way = tuple[Storage, int | None]


def _ways(curve: BitCurve, factors: Sequence[int | None], group: int, rank_multiple: int) -> tuple[Item, list[Way]]:
    """The choice that a budget has to make of a linear; of ways that cost as much or more and lose more, none."""
    site, itemsize = curve.site, curve.itemsize
    d_out, d_in = site.d_out, site.d_in
    dense = d_out * d_in * itemsize
    ways: list[Way] = [(PLAIN, None)] if None in factors else []
    losses: list[float] = [0.0] if None in factors else []
    for base, tails in curve.losses.items():
        if base is not None:
            ways.append((Storage(base=base, group=group), None))
            losses.append(float(tails[0]))
        for bits in factors:
            storage = Storage(base, bits, group)
            noise = 0.0 if bits is None else 2 * expected_noise(bits, group)
            for rank in range(rank_multiple, len(tails), rank_multiple):
                if storage.num_bytes(d_out, d_in, rank, itemsize) >= dense:
                    break
                ways.append((storage, rank))
                losses.append(float(tails[rank] + noise * max(tails[0] - tails[rank], 0.0)))
    costs = np.array([storage.num_bytes(d_out, d_in, rank, itemsize) for storage, rank in ways])
    lost = np.array(losses)
    order = np.lexsort((lost, costs))
    before = np.minimum.accumulate(np.concatenate([[np.inf], lost[order][:-1]]))
    kept = order[lost[order] < before]
    return Item(site.name, costs[kept], lost[kept]), [ways[at] for at in kept]


@cache
def expected_noise(bits: int, group: int) -> float:
    """The relative squared error of normal numbers rounded to the nearest code, a scale for every group of them."""
    rows = torch.randn(SAMPLES, group, generator=torch.Generator().manual_seed(0))
    lost = round_nearest(rows, bits, (1, group)).dense() - rows
    return float(lost.square().sum() / rows.square().sum())
