"""Speed as a budget, by tables that are made up: no test of a clock."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from eckart.allocation import Curve, RankPlan, Speed, SpeedTable, effective_rank, global_, per_role, uniform
from eckart.allocation.curves import Curve as Losses
from eckart.allocation.speed import LinearTimes, Shape
from eckart.lowrank import Layout
from eckart.models.sites import Site
from eckart.models.units import Unit, units_of

from .curves import block, curve, site
from .speeds import table

SITES = [*block(0), *block(1)]
TIMES = (1.1, 1.25, 1.5, 1.75, 2.0)


def curves(sites: list[Site]) -> list[Curve]:
    return [curve(each, seed) for seed, each in enumerate(sites)]


def loss(plan: RankPlan, losses: list[Losses]) -> float:
    return sum(each.losses[rank] for each in losses if (rank := plan.rank(each.sites[0])) is not None)


def allocate(name: str, speeds: SpeedTable, times: float, layout: Layout = "plain") -> RankPlan:
    budget = speeds.budget(Speed(times), SITES)
    how = {"layout": layout, "cost": speeds.cost}
    if name == "uniform":
        return uniform(SITES, units_of(SITES), budget, **how)  # type: ignore[arg-type]
    if name == "per-role":
        return per_role(SITES, units_of(SITES), budget, shares={"mlp": 2.0}, **how)  # type: ignore[arg-type]
    if name == "effective-rank":
        return effective_rank(SITES, curves(SITES), budget, **how)  # type: ignore[arg-type]
    return global_(SITES, curves(SITES), budget, exact=True, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
@pytest.mark.parametrize("name", ["uniform", "per-role", "effective-rank", "global"])
def test_a_plan_is_as_fast_as_asked_and_loses_more_the_faster_it_is(name: str, layout: Layout) -> None:
    speeds, losses = table(SITES, layout=layout), curves(SITES)
    plans = [allocate(name, speeds, times, layout) for times in TIMES]
    assert plans == [allocate(name, speeds, times, layout) for times in TIMES]
    for times, plan in zip(TIMES, plans, strict=True):
        assert speeds.modelled(plan, SITES) >= times
        assert plan.ranks.keys() == {each.name for each in SITES}
        assert not plan.notes
    lost = [loss(plan, losses) for plan in plans]
    assert lost == sorted(lost)
    assert lost[0] < lost[-1]


def test_nothing_faster_is_better() -> None:
    """Against all choices of ranks, on linears small enough to go through them."""
    sites = [site(6, 5, "a.0.x"), site(7, 4, "a.0.y"), site(5, 5, "a.1.x")]
    speeds, losses = table(sites, rest=200, call=20, grid=1), [curve(each, seed) for seed, each in enumerate(sites)]
    choices = [[*range(1, min(each.d_out, each.d_in)), None] for each in sites]
    plans = [
        RankPlan(tuple(sites), dict(zip((s.name for s in sites), ranks, strict=True)))
        for ranks in itertools.product(*choices)
    ]
    for times in (1.05, 1.2, 1.4):
        best = min(loss(plan, losses) for plan in plans if speeds.modelled(plan, sites) >= times)
        plan = global_(sites, losses, speeds.budget(Speed(times), sites), exact=True, cost=speeds.cost)
        assert loss(plan, losses) == pytest.approx(best)


def test_uniform_is_the_largest_share_that_is_fast_enough() -> None:
    speeds = table(SITES)
    plan = allocate("uniform", speeds, 1.5)
    shares = np.linspace(0.001, 0.999, 999)
    fast = [
        share
        for share in shares
        if speeds.modelled(RankPlan(tuple(SITES), {each.name: Unit((each,)).rank_for(share) for each in SITES}), SITES)
        >= 1.5
    ]
    for each in SITES:
        expected, rank = Unit((each,)).rank_for(max(fast)), plan.rank(each)
        assert rank is None or rank >= expected


def test_at_speed_1_all_stay_dense() -> None:
    speeds = table(SITES)
    assert speeds.budget(Speed(1), SITES) == speeds.dense(SITES)
    for name in ("uniform", "global"):
        assert set(allocate(name, speeds, 1).ranks.values()) == {None}


def test_a_linear_that_no_rank_makes_faster_stays_dense() -> None:
    narrow = Shape.of(Unit((SITES[1],)))
    speeds = table(SITES)
    linears = tuple(
        replace(each, low_rank=tuple(each.dense for _ in each.ranks)) if each.shape == narrow else each
        for each in speeds.linears
    )
    speeds = replace(speeds, linears=linears)
    for name in ("uniform", "per-role", "effective-rank", "global"):
        plan = allocate(name, speeds, 1.5)
        assert [plan.rank(each) for each in SITES if Shape.of(Unit((each,))) == narrow] == [None] * 4
        assert any(rank is not None for rank in plan.ranks.values())


@pytest.mark.parametrize("members", [False, True])
@pytest.mark.parametrize("rank_multiple", [1, 4])
def test_too_fast_is_refused_with_the_most(members: bool, rank_multiple: int) -> None:
    joint = ["a.0.q", "a.1.q"]
    speeds = table(SITES, joint=joint)
    ways = {"joint": joint, "members": members, "rank_multiple": rank_multiple}
    with pytest.raises(ValueError, match=r"speed 50: too fast, the most is (\d+\.\d+) on this machine .*generating"):
        speeds.budget(Speed(50), SITES, **ways)  # type: ignore[arg-type]
    try:
        speeds.budget(Speed(50), SITES, **ways)  # type: ignore[arg-type]
    except ValueError as error:
        most = float(str(error).split("the most is ")[1].split()[0])
    budget = speeds.budget(Speed(most), SITES, **ways)  # type: ignore[arg-type]
    losses = [curve([each for each in SITES if each.input_group == group]) for group in joint]
    own = curves(SITES) if members else [curve(each) for each in SITES if each.input_group not in joint]
    plan = global_(SITES, [*losses, *own], budget, rank_multiple=rank_multiple, cost=speeds.cost)
    assert speeds.modelled(plan, SITES) >= most
    with pytest.raises(ValueError, match="too fast"):
        speeds.budget(Speed(most + 0.02), SITES, **ways)  # type: ignore[arg-type]


def test_only_selected_linears_count() -> None:
    selected = [each for each in SITES if each.part == "mlp"]
    speeds = table(SITES)
    budget = speeds.budget(Speed(1.2), selected)
    plan = global_(SITES, curves(selected), budget, cost=speeds.cost)
    assert speeds.rest(selected) == speeds.step - speeds.dense(selected)
    assert speeds.modelled(plan, selected) >= 1.2
    assert speeds.modelled(plan, selected) == pytest.approx(speeds.modelled(plan, SITES))


def test_linears_timed_longer_than_a_step_leave_no_rest() -> None:
    speeds = replace(table(SITES), step=100)
    assert speeds.rest(SITES) == 0
    plan = global_(SITES, curves(SITES), speeds.budget(Speed(1.5), SITES), cost=speeds.cost)
    assert speeds.modelled(plan, SITES) >= 1.5


def test_times_are_on_lines_between_ranks_and_never_fall() -> None:
    wide = site(16, 16, "a.0.w")
    times = LinearTimes(Shape.of(Unit((wide,))), 900, (1, 3, 5, 7), (100, 300, 200, 500))
    speeds = SpeedTable(1, "plain", 1000, (times,))
    assert [speeds.cost(Unit((wide,)), rank, "plain") for rank in (1, 2, 3, 4, 5, 6, 7, 15)] == [
        100,
        200,
        300,
        300,
        300,
        400,
        500,
        500,
    ]
    assert speeds.cost(Unit((wide,)), None, "plain") == 900


def test_tables_are_kept_as_text() -> None:
    speeds = table(SITES, layout="pivoted", joint=["a.0.q"], rows=512)
    assert SpeedTable.from_json(speeds.to_json(), "there") == speeds
    for text in ("{", "[]", "{}", speeds.to_json().replace('"ranks"', '"rank"'), speeds.to_json().replace("1,", "-1,")):
        with pytest.raises(ValueError, match="there"):
            SpeedTable.from_json(text, "there")


def test_a_table_of_something_else_is_refused() -> None:
    with pytest.raises(ValueError, match="of plain factors, has no such pivoted linear"):
        table(SITES).cost(Unit((SITES[0],)), 2, "pivoted")
    with pytest.raises(ValueError, match="has no such plain linear"):
        table(SITES).cost(Unit((site(99, 16),)), None, "plain")


@pytest.mark.parametrize("times", [0.9, 0, -1, float("inf"), float("nan")])
def test_a_speed_below_dense_is_refused(times: float) -> None:
    with pytest.raises(ValueError, match="is not 1 or more"):
        Speed(times)
    with pytest.raises(ValueError, match="rows 0 is not positive"):
        Speed(2, rows=0)
