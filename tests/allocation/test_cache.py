"""The cache's budget: counts every number that a cache holds, and is spent by the knapsack, exactly where asked."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from eckart.allocation import Curve, global_
from eckart.allocation.cache import CacheBudget, cache_facts, head_sites, num_cached
from eckart.allocation.rank_plan import settle
from eckart.models.heads import dense_numbers, open_heads, rotation_numbers
from eckart.models.sites import find_sites
from eckart.models.units import Unit
from tiny import tiny_model


def test_all_of_a_cache_is_counted() -> None:
    model = open_heads(tiny_model("llama"), 1)  # 3 blocks of 2 x 2 heads of 8
    every = head_sites(model, find_sites(model))
    assert len(every) == 12
    whole, rotations = dense_numbers(model.config), rotation_numbers(model.config)
    assert (whole, rotations) == (96, 8)
    assert CacheBudget(0.5).numbers(model, every) == 48 - 8
    # groups that are not selected take what they take
    assert CacheBudget(0.75).numbers(model, every[:6]) == 72 - 8 - 48
    with pytest.raises(ValueError, match=r"keep_cache 0.2: too small, the least possible is keep_cache 0\.2084"):
        CacheBudget(0.2).numbers(model, every)
    assert CacheBudget(0.2084).numbers(model, every) == 12
    gemma = open_heads(tiny_model("gemma3_text"))
    assert rotation_numbers(gemma.config) == 16  # two kinds of layers


def test_facts_are_those_of_the_plan() -> None:
    model = open_heads(tiny_model("llama"), 1)
    sites = find_sites(model)
    heads = head_sites(model, sites)
    plan = settle(sites, {heads[0].name: 3, heads[5].name: 2, sites[0].name: 4})
    assert cache_facts(model, plan) == {"heads": 1, "numbers_per_token": [96, 96 - 5 - 6 + 8], "rotations": 8}


@pytest.mark.parametrize("seed", range(3))
def test_the_knapsack_over_a_cache_is_exact(seed: int) -> None:
    """Against every choice of ranks of three groups."""
    model = open_heads(tiny_model("llama"), 1)
    sites = find_sites(model)
    heads = head_sites(model, sites)[:3]
    generator = np.random.default_rng(seed)
    curves = [Curve((site,), np.append(np.sort(generator.random(8))[::-1], 0.0)) for site in heads]
    budget = 11
    plan = global_(sites, curves, budget, exact=True, cost=num_cached)
    ranks = [plan.rank(site) for site in heads]
    options: list[list[int | None]] = [
        [rank for rank in range(1, 8) if Unit((site,)).num_stored(rank) < site.num_params] + [None] for site in heads
    ]

    def cost(choice: tuple[int | None, ...]) -> int:
        return sum(num_cached(Unit((site,)), rank) for site, rank in zip(heads, choice, strict=True))

    def loss(choice: tuple[int | None, ...]) -> float:
        pairs = zip(curves, choice, strict=True)
        return float(sum(0.0 if rank is None else curve.losses[rank] for curve, rank in pairs))

    least = min(loss(choice) for choice in itertools.product(*options) if cost(choice) <= budget)
    assert cost(tuple(ranks)) <= budget
    assert loss(tuple(ranks)) == pytest.approx(least)
