"""What a plan says of settings that are expected to be slow."""

from __future__ import annotations

import pytest

from eckart.allocation import RankPlan, slow_settings
from eckart.allocation.rank_plan import in_bits
from eckart.lowrank import Layout
from eckart.models.sites import Site


def site(name: str, d_out: int, d_in: int, group: str = "") -> Site:
    return Site(name, name, "mlp", 0, group or name, d_in, d_out, False)


def plan_of(layout: Layout = "plain", **ranks: tuple[int, int, int | None]) -> RankPlan:
    """Of linears given as name=(d_out, d_in, rank)."""
    sites = tuple(site(name, d_out, d_in) for name, (d_out, d_in, _) in ranks.items())
    return RankPlan(sites, {name: rank for name, (_, _, rank) in ranks.items()}, layout=layout)


def test_wide_linears_at_aligned_ranks_need_no_word() -> None:
    assert slow_settings(plan_of(a=(4096, 4096, 1024), b=(2048, 5632, 736), c=(512, 512, None))) == ()


@pytest.mark.parametrize(
    ("layout", "size", "rank", "said"),
    [
        ("plain", (768, 768), 256, "side below 1024"),  # 0.67 of the numbers
        ("plain", (768, 768), 192, ""),  # half of them
        ("pivoted", (768, 768), 256, "side below 1024"),  # 0.56
        ("pivoted", (768, 768), 192, ""),  # 0.44
        ("pivoted", (4096, 4096), 2112, "pivoted layout"),  # 0.77
        ("pivoted", (4096, 4096), 1984, ""),  # 0.73
        ("plain", (4096, 4096), 1985, "multiples of 32"),
        ("plain", (4096, 4096), 31, ""),  # no multiple below it
        ("plain", (256, 4096), 224, "side below 1024"),
    ],
)
def test_each_kind_of_setting(layout: Layout, size: tuple[int, int], rank: int, said: str) -> None:
    found = slow_settings(plan_of(layout, a=(*size, rank)))
    assert [line for line in found if said in line] == list(found)
    assert len(found) == bool(said)


def test_linears_are_counted_by_kind_and_joint_ones_singly() -> None:
    sites = (site("q", 2048, 2048, "qkv"), site("k", 512, 2048, "qkv"), site("o", 2048, 2048))
    plan = RankPlan(sites, {"q": 700, "k": 700, "o": 701}, joint=frozenset({"qkv"}))
    lines = slow_settings(plan)
    assert len(lines) == 2
    assert lines[0].startswith("2 linears have a side below 1024")
    assert lines[1].startswith("3 linears have ranks that are no multiples of 32")


def test_numbers_in_few_bits_are_one_line() -> None:
    """And no other one: what is multiplied out is slow whatever its rank."""
    lines = slow_settings(in_bits(plan_of(a=(512, 512, 250), b=(4096, 4096, 1000), c=(512, 512, None)), 4))
    assert len(lines) == 1
    assert lines[0].startswith("3 linears keep numbers in few bits, to save bytes")
