"""Ranks and bits within a budget of bytes: against every combination tried, and in the bytes of the files."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from eckart.allocation import Budget, RankPlan, weight_bytes
from eckart.allocation.few_bits import BitCurve, expected_noise, share_bytes
from eckart.lowrank.codes import round_nearest
from eckart.lowrank.storage import PLAIN, Storage
from eckart.models.sites import Site, find_sites
from tiny import tiny_model


def curves_of(sites: tuple[Site, ...], seed: int = 0, itemsize: int = 2) -> list[BitCurve]:
    """Falling losses: of factors alone from a large one, of a quantised weight from what its bits lose."""
    random = np.random.default_rng(seed)
    curves = []
    for site in sites:
        size = min(site.d_out, site.d_in)
        energy = np.sort(random.exponential(size=size))[::-1] ** 3
        tails = np.append(np.cumsum(energy[::-1])[::-1], 0.0) * random.uniform(0.5, 2)
        curves.append(BitCurve(site, {None: tails, 3: 0.05 * tails, 4: 0.012 * tails, 8: 0.00005 * tails}, itemsize))
    return curves


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def every_way(curve: BitCurve, factors: tuple[int | None, ...], group: int) -> list[tuple[int, float]]:
    """(bytes, loss) of all ways of a linear, written out."""
    site = curve.site
    shape = (site.d_out, site.d_in)
    ways = [(2 * site.num_params, 0.0)]
    for base, tails in curve.losses.items():
        if base is not None:
            ways.append((Storage(base, None, group).num_bytes(*shape, None, 2), float(tails[0])))
        for bits, rank in itertools.product(factors, range(1, len(tails))):
            noise = 0 if bits is None else 2 * expected_noise(bits, group)
            loss = tails[rank] + noise * (tails[0] - tails[rank])
            ways.append((Storage(base, bits, group).num_bytes(*shape, rank, 2), float(loss)))
    return ways


@pytest.mark.parametrize("share", [0.15, 0.2, 0.3, 0.5, 0.8])
def test_it_is_the_best_of_all_combinations(model: Any, share: float) -> None:
    sites = find_sites(model)[:2]
    curves = [BitCurve(c.site, {base: each[:6] for base, each in c.losses.items()}) for c in curves_of(sites)]
    budget = int(share * sum(2 * site.num_params for site in sites))
    ways = [every_way(curve, (None, 4), 8) for curve in curves]
    least = min(a[1] + b[1] for a, b in itertools.product(*ways) if a[0] + b[0] <= budget)
    plan = share_bytes(find_sites(model), curves, budget, factors=(None, 4), group=8, exact=True)
    assert cost_of(plan, sites) <= budget
    assert loss_of(plan, curves, 8) == pytest.approx(least, rel=1e-9)


def cost_of(plan: RankPlan, sites: Any) -> int:
    return sum(plan.storage(site).num_bytes(site.d_out, site.d_in, plan.rank(site), 2) for site in sites)


def loss_of(plan: RankPlan, curves: list[BitCurve], group: int) -> float:
    total = 0.0
    for curve in curves:
        storage, rank = plan.storage(curve.site), plan.rank(curve.site)
        if storage == PLAIN and rank is None:
            continue
        tails = curve.losses[storage.base]
        noise = 0 if storage.factors is None else 2 * expected_noise(storage.factors, group)
        total += tails[rank or 0] + noise * (tails[0] - tails[rank or 0])
    return total


def test_more_bytes_never_lose_more_and_all_of_them_nothing(model: Any) -> None:
    sites = find_sites(model)
    curves, whole = curves_of(sites), sum(2 * site.num_params for site in sites)
    losses = [loss_of(share_bytes(sites, curves, int(whole * s), group=16), curves, 16) for s in (0.2, 0.3, 0.5, 0.8)]
    assert losses == sorted(losses, reverse=True)
    dense = share_bytes(sites, curves, whole, group=16)
    assert not dense.stored
    assert set(dense.ranks.values()) == {None}


def test_factors_in_few_bits_of_a_rank_past_break_even_are_no_dense_weight(model: Any) -> None:
    """All of the loss lies in the last ranks, which in 16 bits would take more than the dense weight, and in 4 half."""
    sites = find_sites(model)[:1]
    size = min(sites[0].d_out, sites[0].d_in)
    tails = np.append(np.ones(size - 2), [1e-3, 1e-6, 0])
    whole = 2 * sites[0].num_params
    plan = share_bytes(find_sites(model), [BitCurve(sites[0], {None: tails})], int(0.8 * whole), group=8)
    assert plan.rank(sites[0]) > sites[0].num_params // (sites[0].d_out + sites[0].d_in)
    assert plan.storage(sites[0]).factors is not None
    assert cost_of(plan, sites) <= 0.8 * whole
    assert RankPlan.from_json(plan.to_json(), find_sites(model)).ranks == plan.ranks


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("share", [0.45, 0.6, 0.9])
def test_the_files_stay_below_their_bytes(model: Any, share: float, bias: bool) -> None:
    sites = find_sites(model)
    most = int(share * weight_bytes(model, RankPlan(sites, {})))
    room = Budget(max_bytes=most).coded_bytes(model, sites, group=16, bias=bias)
    plan = share_bytes(sites, curves_of(sites, itemsize=4), room, group=16)
    assert 0.85 * most < weight_bytes(model, plan, bias=bias) <= most


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_the_noise_is_that_of_rounding(bits: int) -> None:
    """Independent errors in left and right add up to twice it, in the part of the output that the factors carry."""
    random = torch.Generator().manual_seed(3)
    left, right = torch.randn(512, 64, generator=random), torch.randn(64, 512, generator=random)
    rounded = round_nearest(left, bits, (64, 1)).dense() @ round_nearest(right, bits, (1, 64)).dense()
    lost = float((rounded - left @ right).square().sum() / (left @ right).square().sum())
    noise = expected_noise(bits, 64)
    assert lost == pytest.approx(2 * noise + noise**2, rel=0.1)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: share_bytes(find_sites(m), [], 100), "no linear is selected"),
        (lambda m: share_bytes(find_sites(m), curves_of(find_sites(m)), 100), "a budget of 100 bytes .* too small"),
        (lambda m: Budget(max_bytes=5000).coded_bytes(m, find_sites(m), group=64), "what is not compressed takes"),
        (lambda m: BitCurve(find_sites(m)[0], {}), "no way to keep it"),
        (lambda m: BitCurve(find_sites(m)[0], {4: np.array([np.nan])}), "not finite"),
    ],
    ids=["nothing", "small", "rest", "empty", "nan"],
)
def test_what_does_not_go_is_refused(model: Any, call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(model)
