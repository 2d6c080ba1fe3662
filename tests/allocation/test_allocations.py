"""Allocations: laws of all of them, and what each is for."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.allocation import (
    ALLOCATIONS,
    Curve,
    RankPlan,
    effective_rank,
    global_,
    per_role,
    plan,
    settle,
    uniform,
)
from eckart.allocation.knapsack import lower_hull
from eckart.lowrank import LAYOUTS, Layout, Spectrum, num_stored
from eckart.models.sites import Site, find_sites
from eckart.models.units import units_of
from tiny import tiny_model

from .curves import block, curve, site

# Those that need no model to measure.
BUDGETED = {name: row.allocate for name, row in ALLOCATIONS.items() if row.needs != "trials"}
LOSSES = {name for name, row in ALLOCATIONS.items() if row.needs == "losses"}
OPTIONS: Mapping[str, dict[str, Any]] = {"per-role": {"shares": {"mlp": 2.0, "attention": 1.0}}}
SITES = [*block(0), *block(1), *block(2)]
DENSE = sum(s.num_params for s in SITES)


def curves_of(sites: Sequence[Site], joint: Sequence[str] = ()) -> list[Curve]:
    return [curve(unit.sites, seed) for seed, unit in enumerate(units_of(sites, joint))]


def allocate(name: str, curves: Sequence[Curve], numbers: int, **options: Any) -> RankPlan:
    return BUDGETED[name](SITES, curves, numbers, **OPTIONS.get(name, {}), **options)


def loss_of(made: RankPlan, curves: Sequence[Curve]) -> float:
    """Of a plan that has a curve for each of its units."""
    by_sites = {c.sites: c for c in curves}
    total = 0.0
    for unit in made.units:
        rank = made.rank(unit.sites[0])
        if rank is not None:
            total += by_sites[unit.sites].weight * by_sites[unit.sites].losses[rank]
    return total


# All of them


@pytest.mark.parametrize("joint", [(), ("a.0.q", "a.2.q")], ids=["", "joint"])
@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_is_kept_and_spent(name: str, layout: Layout, multiple: int, joint: tuple[str, ...]) -> None:
    curves = curves_of(SITES, joint)
    before = 0
    for share in (0.55, 0.7, 0.8, 0.95):
        made = allocate(name, curves, int(share * DENSE), layout=layout, rank_multiple=multiple)
        assert made.layout == layout
        assert made.joint <= set(joint)
        assert before <= made.kept_params <= share * DENSE
        # One step of the widest unit's rank is left over at most, in each of a third of the units.
        assert made.kept_params > share * DENSE - 6 * multiple * 48
        for rank in made.ranks.values():
            assert rank is None or rank % multiple == 0 or (name not in LOSSES and rank < multiple)
        assert made.notes == {}
        before = made.kept_params


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_for_everything_leaves_everything_dense(name: str, layout: Layout) -> None:
    curves = curves_of(SITES, ["a.1.q"])
    for numbers in (DENSE, 10 * DENSE):
        made = allocate(name, curves, numbers, layout=layout)
        assert made.ranks == dict.fromkeys(s.name for s in SITES)


@pytest.mark.parametrize("name", BUDGETED)
def test_what_has_no_curve_stays_dense_and_is_not_counted(name: str) -> None:
    chosen = SITES[:6]
    made = allocate(name, curves_of(chosen), sum(s.num_params for s in chosen) // 2)
    assert set(made.ranks) == {s.name for s in chosen}
    assert made.sites == tuple(SITES)
    assert made.kept_params - sum(s.num_params for s in SITES[6:]) <= sum(s.num_params for s in chosen) // 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BUDGETED)
def test_a_budget_that_nothing_fits_says_what_would(name: str, layout: Layout) -> None:
    least = sum(num_stored(s.d_out, s.d_in, 1, layout) for s in SITES)
    curves = curves_of(SITES)
    with pytest.raises(ValueError, match=f"a budget of {least - 1} numbers is too small: .* take {least}"):
        allocate(name, curves, least - 1, layout=layout)
    assert set(allocate(name, curves, least, layout=layout).ranks.values()) == {1}


@pytest.mark.parametrize("name", BUDGETED)
def test_a_multiple_that_no_rank_has_leaves_dense(name: str) -> None:
    """k and v have 8 rows. Shares round down to no less than one multiple only where there is one."""
    curves = curves_of(SITES)
    if name in LOSSES:
        made = allocate(name, curves, int(0.9 * DENSE), layout="pivoted", rank_multiple=8)
        assert made.ranks["a.0.k"] is made.ranks["a.0.v"] is None
        assert any(rank == 8 for rank in made.ranks.values())
    with pytest.raises(ValueError, match="rank_multiple 0 is not positive"):
        allocate(name, curves, DENSE, rank_multiple=0)


@pytest.mark.parametrize("name", BUDGETED)
def test_units_that_overlap_or_are_none_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"a\.0\.o is in two of the units"):
        allocate(name, [curve(SITES[3]), curve(SITES[3], 1), curve(SITES[4])], 100)
    with pytest.raises(ValueError, match=r"no linear is selected|matches no selected site"):
        allocate(name, [], 100)


# Shares


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("keep", [0.4, 0.7, 0.9])
def test_uniform_is_one_share_everywhere(layout: Layout, keep: float) -> None:
    model = tiny_model("llama")
    sites = find_sites(model)
    numbers = int(keep * sum(s.num_params for s in sites))
    made, by_rule = uniform(sites, units_of(sites), numbers, layout=layout), plan(model, keep, layout=layout)
    # The rule leaves over what rounding down leaves. The share that fits may be a little larger, but for all.
    assert by_rule.kept_params <= made.kept_params <= numbers
    for unit in made.units:
        rank, at_least = made.rank(unit.sites[0]), by_rule.rank(unit.sites[0])
        assert rank is not None
        assert at_least is not None
        assert at_least <= rank <= at_least + 1


def test_shares_are_in_proportion() -> None:
    big = [site(256, 256, "a.0.mlp", part="mlp"), site(256, 256, "a.0.attn", part="attention")]
    made = per_role(big, units_of(big), 60_000, shares={"mlp": 2.0, "attention": 1.0})
    mlp, attention = (made.ranks[name] for name in ("a.0.mlp", "a.0.attn"))
    assert mlp is not None
    assert attention is not None
    assert mlp + attention == 60_000 // 512
    assert mlp in (2 * attention - 1, 2 * attention, 2 * attention + 1)
    # Where the larger share is past the whole, the linear is dense and the other goes on.
    made = per_role(big, units_of(big), 110_000, shares={"mlp": 2.0, "attention": 1.0})
    assert made.ranks == {"a.0.mlp": None, "a.0.attn": (110_000 - 256 * 256) // 512}


def test_the_first_share_that_names_a_site_decides() -> None:
    units = units_of(SITES)
    shares = {"a.1.*": 1.0, "up": 3.0}
    made = per_role(SITES, units, int(0.6 * DENSE), shares=shares)
    assert made.ranks["a.1.up"] == per_role(SITES, units, int(0.6 * DENSE), shares={"a.0.up": 3.0, "a.2.up": 3.0}).rank(
        SITES[10]
    )
    assert made.ranks["a.0.up"] is None
    assert made.ranks["a.0.q"] == made.ranks["a.1.q"]


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ({"up": 0.0}, "shares: 'up' has weight 0.0, which is not positive"),
        ({"up": float("inf")}, "shares: 'up' has weight inf"),
        ({"mpl": 2.0}, "shares: 'mpl' matches no selected site; roles: q, k, v, o, up, down"),
        ({"q": 2.0}, r"shares: the linears of joint a\.0\.q\+k\+v have the weights 1.0, 2.0"),
    ],
)
def test_a_wrong_share_is_named(shares: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        per_role(SITES, units_of(SITES, ["a.0.q"]), DENSE // 2, shares=shares)


# Effective rank


def flat(s: Site, directions: int) -> Curve:
    """A spectrum of equal singular values, and then nothing."""
    return Curve((s,), np.maximum(directions - np.arange(min(s.d_out, s.d_in) + 1.0), 0))


@given(st.integers(1, 16), st.floats(1e-6, 1e6))
def test_equal_singular_values_are_as_many_as_there_are(directions: int, scale: float) -> None:
    one = flat(site(16, 24), directions)
    assert one.effective_rank == pytest.approx(directions)
    scaled = Curve(one.sites, scale * one.losses + 3 * scale)
    assert scaled.effective_rank == pytest.approx(directions)


def test_the_effective_rank_is_that_of_the_singular_values() -> None:
    singular = np.array([5.0, 2.0, 1.0, 0.5])
    shares = singular / singular.sum()
    losses = np.append((singular**2)[::-1].cumsum()[::-1], 0.0)
    expected = np.exp(-(shares * np.log(shares)).sum())
    assert Curve((site(4, 9),), losses).effective_rank == pytest.approx(expected)
    assert Curve((site(4, 9),), np.zeros(5)).effective_rank == 1


def test_ranks_are_in_proportion_to_effective_ranks() -> None:
    sites = [site(64, 64, f"a.{number}.w") for number in range(3)]
    made = effective_rank(sites, [flat(s, n) for s, n in zip(sites, (10, 20, 40), strict=True)], 42 * 128)
    assert made.ranks == {"a.0.w": 6, "a.1.w": 12, "a.2.w": 24}


# Global


@settings(max_examples=60)
@given(
    st.integers(0, 2**32 - 1),
    st.floats(0.35, 1),
    st.sampled_from(LAYOUTS),
    st.sampled_from([1, 2, 3]),
    st.booleans(),
)
def test_the_exact_allocation_is_the_best_of_all_plans(
    seed: int, share: float, layout: Layout, multiple: int, weighted: bool
) -> None:
    sites = [site(7, 6, "a.0.x"), site(5, 9, "a.0.y"), site(6, 6, "a.0.z")]
    curves = [curve(s, seed + at, 1.0 + 4 * at * weighted) for at, s in enumerate(sites)]
    numbers = int(share * sum(s.num_params for s in sites))
    plans = [
        settle(sites, dict(zip((s.name for s in sites), ranks, strict=True)), layout=layout)
        for ranks in itertools.product(*([None, *range(multiple, min(s.d_out, s.d_in), multiple)] for s in sites))
    ]
    losses = [loss_of(made, curves) for made in plans if made.kept_params <= numbers]
    if not losses:
        with pytest.raises(ValueError, match="too small"):
            global_(sites, curves, numbers, layout=layout, rank_multiple=multiple, exact=True)
        return
    quick, exact = (
        global_(sites, curves, numbers, layout=layout, rank_multiple=multiple, exact=exact) for exact in (False, True)
    )
    assert max(quick.kept_params, exact.kept_params) <= numbers
    assert loss_of(exact, curves) == pytest.approx(min(losses), abs=1e-9)
    assert loss_of(exact, curves) <= loss_of(quick, curves) + 1e-9


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share", [0.4, 0.6, 0.8])
def test_global_loses_least(layout: Layout, share: float) -> None:
    curves, numbers = curves_of(SITES), int(share * DENSE)
    made = {name: loss_of(allocate(name, curves, numbers, layout=layout), curves) for name in BUDGETED}
    exact = loss_of(global_(SITES, curves, numbers, layout=layout, exact=True), curves)
    assert exact <= made["global"] <= 1.05 * exact
    assert made["global"] < min(loss for name, loss in made.items() if name != "global")


def test_a_weight_draws_rank() -> None:
    curves = curves_of(SITES)
    even = global_(SITES, curves, DENSE // 2)
    name, rank = next((name, rank) for name, rank in even.ranks.items() if rank is not None)
    heavy = [Curve(c.sites, c.losses, 100.0 if c.name == name else 1.0) for c in curves]
    drawn = global_(SITES, heavy, DENSE // 2).ranks[name]
    assert drawn is None or drawn > rank


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("share", [0.4, 0.6, 0.85])
def test_joint_or_apart_whichever_is_better(share: float, layout: Layout) -> None:
    """Against every choice that is offered: each stack's ranks, and its linears' along the hull of all pairs."""
    sites, groups = [], []
    for number in range(2):
        group = f"a.{number}.k"
        sites += [site(6, 8, group, group), site(5, 8, f"a.{number}.v", group)]
    numbers = int(share * sum(s.num_params for s in sites))
    rng = np.random.default_rng(5)
    curves, offers = [], []
    for number in range(2):
        members = sites[2 * number : 2 * number + 2]
        apart = [curve(s, 10 * number + at) for at, s in enumerate(members)]
        # A stack loses more than its linears at the same rank each, but a rank of it costs less.
        stack = Curve(tuple(members), rng.uniform(0.5, 0.9) * curve(members, 7 + number).losses)
        curves += [stack, *apart]
        made = [c.item(layout) for c in apart]
        costs = np.add.outer(made[0][0].costs, made[1][0].costs).ravel()
        losses = np.add.outer(made[0][0].losses, made[1][0].losses).ravel()
        hull = lower_hull(costs, losses)
        own = stack.item(layout)[0]
        offers.append([*zip(costs[hull], losses[hull], strict=True), *zip(own.costs, own.losses, strict=True)])
        groups.append(group)
    best = min(a[1] + b[1] for a, b in itertools.product(*offers) if a[0] + b[0] <= numbers)
    exact = global_(sites, curves, numbers, layout=layout, exact=True)
    assert exact.kept_params <= numbers
    assert loss_of(exact, curves) == pytest.approx(best)
    only_joint = global_(sites, [c for c in curves if len(c.sites) == 2], numbers, layout=layout, exact=True)
    assert loss_of(exact, curves) <= loss_of(only_joint, curves) + 1e-12


def test_a_group_that_is_cheap_as_a_stack_is_joint_and_another_is_not() -> None:
    low, sites = np.zeros(17), SITES[:12]
    low[:5] = [4e6, 3e6, 2e6, 1e6, 0]
    alone = [curve(s, at, 100.0) for at, s in enumerate(sites)]
    both = [*alone, Curve(tuple(sites[:3]), low), Curve(tuple(sites[6:9]), 1e6 * (17 - np.arange(17.0)))]
    made = global_(sites, both, int(0.7 * sum(s.num_params for s in sites)))
    assert made.joint == {"a.0.q"}
    assert {made.ranks[f"a.0.{role}"] for role in "qkv"} == {4}


def test_a_part_of_a_joint_group_is_refused() -> None:
    group = curve(SITES[:3])
    with pytest.raises(ValueError, match=r"joint a\.0\.q\+k\+v is of 3 linears, and only 2 of them have curves"):
        global_(SITES, [group, curve(SITES[0]), curve(SITES[1])], 500)
    with pytest.raises(ValueError, match=r"joint a\.0\.q\+k\+v: its linears share a right factor and need one rank"):
        global_(SITES, [curve(SITES[:2]), curve(SITES[3])], 400)


# Curves


def test_a_stack_has_another_name_than_its_first_linear() -> None:
    first, stack = curve(SITES[0]), curve(SITES[:3])
    assert (first.name, stack.name) == ("a.0.q", "a.0.q+k+v")
    assert first.unit.group == stack.unit.group == "a.0.q"


def test_a_curve_takes_the_losses_of_a_spectrum() -> None:
    spectrum = Spectrum(
        torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64), torch.tensor([4.0, 3, 2, 1]).double()
    )
    assert Curve((site(4, 4),), spectrum.tails()).losses.tolist() == [10, 6, 3, 1, 0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_options_are_the_multiples_that_save_numbers(layout: Layout) -> None:
    item, ranks = curve(site(16, 24), weight=3.0).item(layout, 4)
    assert ranks == ((4, 8, None) if layout == "plain" else (4, 8, 12, None))
    assert item.costs.tolist() == [num_stored(16, 24, rank, layout) for rank in ranks if rank] + [16 * 24]
    assert item.losses.tolist() == [3 * curve(site(16, 24)).losses[rank] for rank in ranks if rank] + [0]
    assert curve(site(16, 24)).item(layout, 32)[1] == (None,)


@pytest.mark.parametrize(
    ("sites", "losses", "weight", "message"),
    [
        ([], [1, 0], 1, "a curve is of one site or of several"),
        ([SITES[0], SITES[3]], [1, 0], 1, r"a\.0\.q, a\.0\.o do not read one tensor"),
        ([SITES[0]], [1], 1, r"a\.0\.q: losses have shape \(1,\), expected up to \(17,\)"),
        ([SITES[0]], [1] * 18, 1, r"a\.0\.q: losses have shape \(18,\), expected up to \(17,\)"),
        ([SITES[0]], [2, float("nan"), 0], 1, r"a\.0\.q: the loss at rank 1 is not finite"),
        ([SITES[0]], [1, 0], 0, r"a\.0\.q: weight 0 is not positive"),
        ([SITES[0]], [1, 0], float("nan"), r"a\.0\.q: weight nan is not positive"),
    ],
)
def test_a_wrong_curve_is_named(sites: list[Site], losses: list[float], weight: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Curve(tuple(sites), np.array(losses, dtype=float), weight)
