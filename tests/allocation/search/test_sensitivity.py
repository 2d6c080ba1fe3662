"""Sensitivity: one linear at a time, and ASVD's ranks in the order of what that cost."""

from __future__ import annotations

import math
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from eckart.allocation import RankPlan
from eckart.allocation.search.sensitivity import Sensitivity, measure_sensitivity
from eckart.lowrank import Factored, factor, rank_for
from eckart.models.sites import find_sites, low_rank_modules, read_weight
from tiny import logits_of, tiny_model

FEW = (0.2, 0.5, 0.8)


@cache
def spectra_of(model_type: str) -> dict[str, Factored]:
    model = tiny_model(model_type)
    return {site.name: factor(read_weight(model.get_submodule(site.name))) for site in find_sites(model)}


class TableScore:
    """Dense 10, and for the one linear that is cut a number drawn from its name and rank."""

    def __init__(self, seed: int = 0, kill: int | None = None) -> None:
        self.seed, self.kill, self.seen = seed, kill, []

    def __call__(self, model: PreTrainedModel) -> float:
        if len(self.seen) == self.kill:
            raise KeyboardInterrupt
        ranks = {name: module.rank for name, module in low_rank_modules(model).items()}
        assert len(ranks) <= 1
        self.seen.append(ranks)
        return 10.0 + sum(round(random.Random(f"{self.seed} {item}").random(), 1) for item in ranks.items())


def measured(model_type: str = "llama", score: Any = None, **options: Any) -> Sensitivity:
    options = {"better": "lower", "shares": FEW, **options}
    return measure_sensitivity(tiny_model(model_type), spectra_of(model_type), score or TableScore(), **options)


def plan_by_trying_all(sensitivity: Sensitivity, budget: int) -> RankPlan | None:
    """The paper's order walked from its start, a pair at a time."""
    sites = {site.name: site for site in sensitivity.sites}
    sign = 1 if sensitivity.better == "lower" else -1

    def saved(trial: Any) -> int:
        site = sites[trial.name]
        return site.num_params - (site.d_in + site.d_out) * trial.rank

    pairs = sorted(sensitivity.trials, key=lambda t: (sign * t.score, -saved(t)))
    ranks: dict[str, int | None] = {}
    for trial in [None, *pairs]:
        if trial is not None:
            ranks[trial.name] = min(trial.rank, ranks.get(trial.name) or trial.rank)
        plan = RankPlan(sensitivity.sites, dict(ranks))
        if plan.kept_params <= budget:
            return plan
    return None


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_each_linear_is_cut_alone_at_every_share(model_type: str) -> None:
    model, score = tiny_model(model_type), TableScore()
    before, modules = logits_of(model), dict(model.named_modules())
    sensitivity = measure_sensitivity(model, spectra_of(model_type), score, better="lower")
    sites = find_sites(model)
    expected = [
        {site.name: rank}
        for site in sites
        for rank in dict.fromkeys(rank_for(share / 10, site.d_out, site.d_in) for share in range(1, 10))
    ]
    assert score.seen == [{}, *expected]
    assert [{trial.name: trial.rank} for trial in sensitivity.trials] == expected
    assert sensitivity.evaluations == len(score.seen)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits_of(model), before)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), keep=st.floats(0.05, 1.2), better=st.sampled_from(["lower", "higher"]))
def test_the_ranks_are_those_of_the_first_place_that_fits(seed: int, keep: float, better: Any) -> None:
    # Scores have one decimal, so many are equal.
    sensitivity = measured(score=TableScore(seed), better=better)
    total = sum(site.num_params for site in sensitivity.sites)
    budget = int(keep * total)
    expected = plan_by_trying_all(sensitivity, budget)
    if expected is None:
        with pytest.raises(ValueError, match=f"more than {budget:,}"):
            sensitivity.plan_within(budget)
        return
    plan = sensitivity.plan_within(budget)
    assert dict(plan.ranks) == dict(expected.ranks)
    assert plan.kept_params <= budget


def test_the_whole_budget_leaves_all_dense_and_the_least_takes_the_smallest() -> None:
    sensitivity = measured()
    total = sum(site.num_params for site in sensitivity.sites)
    assert dict(sensitivity.plan_within(total).ranks) == {}
    smallest = {site.name: rank_for(0.2, site.d_out, site.d_in) for site in sensitivity.sites}
    least = RankPlan(sensitivity.sites, smallest).kept_params
    assert dict(sensitivity.plan_within(least).ranks) == smallest
    assert sensitivity.plan_within(least).kept_params == least


def test_a_linear_that_costs_nothing_is_cut_first() -> None:
    free = "model.layers.1.mlp.up_proj"

    def score(model: PreTrainedModel) -> float:
        ranks = {name: module.rank for name, module in low_rank_modules(model).items()}
        return 1.0 + sum(0.0 if name == free else 1.0 / rank for name, rank in ranks.items())

    sensitivity = measured(score=score)
    total = sum(site.num_params for site in sensitivity.sites)
    plan = sensitivity.plan_within(total - 1)
    assert set(plan.ranks) == {free}
    # Of equal scores the one that saves most comes first.
    (site,) = (site for site in sensitivity.sites if site.name == free)
    assert plan.ranks[free] == rank_for(0.2, site.d_out, site.d_in)


@pytest.mark.parametrize("kill", [0, 1, 5, 30])
def test_a_killed_measurement_goes_on(tmp_path: Path, kill: int) -> None:
    whole, dying, rest, none = TableScore(), TableScore(kill=kill), TableScore(), TableScore()
    expected = measured(score=whole)
    options = {"journal": tmp_path / "journal.jsonl", "identity": {"model": "tiny"}}
    with pytest.raises(KeyboardInterrupt):
        measured(score=dying, **options)
    shown: list[tuple[str, int]] = []

    def track(items: Any, description: str, total: int) -> Any:
        shown.append((description, total))
        return items

    for score in (rest, none):
        sensitivity = measured(score=score, **options, track=track)
        assert [(t.name, t.rank, t.share, t.score) for t in sensitivity.trials] == [
            (t.name, t.rank, t.share, t.score) for t in expected.trials
        ]
        assert (sensitivity.evaluations, sensitivity.dense_score) == (expected.evaluations, expected.dense_score)
    assert dying.seen + rest.seen == whole.seen
    assert none.seen == []
    assert shown == [("sensitivity", 63 - max(0, kill - 1)), ("sensitivity", 0)]
    with pytest.raises(ValueError, match='better was "lower" and is "higher"'):
        measured(better="higher", **options)


def test_joint_groups_and_the_pivoted_layout() -> None:
    model = tiny_model("llama")
    sites = find_sites(model)
    group = sites[0].input_group
    members, joint = [site for site in sites if site.input_group == group], f"{group}+k_proj+v_proj"
    stack = factor(torch.cat([read_weight(model.get_submodule(site.name)) for site in members]))

    def spectrum(name: str) -> Factored:
        return stack if name == joint else spectra_of("llama")[name]

    score = lambda scoring: 10.0 + len(low_rank_modules(scoring))
    sensitivity = measure_sensitivity(
        model, spectrum, score, better="lower", shares=FEW, joint=[group], layout="pivoted", rank_multiple=2
    )
    assert {trial.name for trial in sensitivity.trials} == {
        joint,
        *(site.name for site in sites if site not in members),
    }
    plan = sensitivity.plan_within(int(0.6 * sum(site.num_params for site in sites)))
    assert (plan.layout, plan.joint) == ("pivoted", frozenset([group]))
    assert len({plan.ranks.get(site.name) for site in members}) == 1
    assert sensitivity.to_dict()["evaluations"] == 1 + len(sensitivity.trials)


def test_what_is_broken_is_named() -> None:
    broken = lambda model: math.nan if low_rank_modules(model) else 1.0
    with pytest.raises(ValueError, match=r"layers.0.self_attn.q_proj at rank 3 \(keep 0.2\): the score is nan"):
        measured(score=broken)
    with pytest.raises(ValueError, match=r"shares \[0.5, 1.0\]"):
        measured(shares=(0.5, 1.0))
