"""Speed: which low-rank linears of a plan are expected to be no faster than the dense ones they replace.

The thresholds are measured by benchmarks/inference.py (docs/scale.md has the tables): linears of a width of 768 to
4096, in float32 and bfloat16, on a processor. They say where to look and measure; another machine has others.
"""

from __future__ import annotations

from collections.abc import Iterator

from eckart.allocation.rank_plan import RankPlan
from eckart.models.units import Unit

# A linear with a side below this is so quick that two calls in place of one cost what is saved, unless little is kept.
NARROW = 1024
# Above these shares of its numbers a narrow linear was no faster, by layout.
NARROW_SHARES = {"plain": 0.6, "pivoted": 0.5}
# Above this share reordering the outputs of a prompt costs what the pivoted layout saves, at any width.
PIVOTED_SHARE = 0.75
# Processors and GPUs multiply bfloat16 in tiles; a rank between their multiples is up to twice as slow for a prompt.
TILE = 32


def slow_settings(plan: RankPlan) -> tuple[str, ...]:
    """A line for each kind of setting that is expected to be slow, with how many linears have it and what helps."""
    counts = {"narrow": 0, "reordered": 0, "odd": 0, "coded": len(plan.stored)}
    for unit, rank, share in _low_rank(plan):
        members = len(unit.sites)
        narrow = min(unit.d_in, *(site.d_out for site in unit.sites)) < NARROW
        if narrow and share > NARROW_SHARES[plan.layout]:
            counts["narrow"] += members
        elif plan.layout == "pivoted" and share > PIVOTED_SHARE:
            counts["reordered"] += members
        if rank > TILE and rank % TILE:
            counts["odd"] += members
    lines = {
        "narrow": f"have a side below {NARROW} and keep more than {NARROW_SHARES[plan.layout]:g} of their numbers: "
        "expected no faster than dense; they save bytes. Keep less of them, or leave them out (--exclude)",
        "reordered": f"keep more than {PIVOTED_SHARE:g} of their numbers in the pivoted layout: reading a prompt is "
        "expected no faster than dense; --layout plain is",
        "odd": f"have ranks that are no multiples of {TILE}: in bfloat16 a prompt can take twice as long as it need; "
        f"--rank-multiple {TILE} rounds them down",
        "coded": "keep numbers in few bits, to save bytes: all but 4 bits in bfloat16 on a processor are multiplied "
        "out at every call, and generate several times more slowly than dense",
    }
    return tuple(f"{count} linears {lines[kind]}" for kind, count in counts.items() if count)


def _low_rank(plan: RankPlan) -> Iterator[tuple[Unit, int, float]]:
    """Each unit that is cut, its rank and the share of its numbers that is kept; none of numbers in few bits."""
    for unit in plan.units:
        rank = plan.rank(unit.sites[0])
        if rank is not None and plan.storage(unit.sites[0]).is_plain:
            yield unit, rank, unit.num_stored(rank, plan.layout) / unit.num_params
