"""Budgets: how many numbers they leave to the selected linears, and what they say when that is too few."""

from __future__ import annotations

import re
from typing import Any

import pytest

from eckart.allocation import Budget, RankPlan, weight_bytes
from eckart.lowrank import LAYOUTS, Layout
from eckart.models.sites import find_sites, select_sites
from eckart.support.sizes import num_params
from tiny import tiny_model


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


@pytest.mark.parametrize("keep", [0.58, 0.7, 1.0])
def test_keep_is_of_the_chosen_linears(model: Any, keep: float) -> None:
    for sites in (find_sites(model), select_sites(find_sites(model), include="mlp", blocks="last 1")):
        dense = sum(site.num_params for site in sites)
        numbers = Budget(keep=keep).numbers(model, sites)
        assert numbers == round(keep * dense - 0.4999)


def test_keep_total_counts_everything_once(model: Any) -> None:
    for made in (model, tiny_model("gemma2")):  # its head is its embedding
        sites = select_sites(find_sites(made), include="mlp")
        whole, chosen = num_params(made), sum(site.num_params for site in sites)
        numbers = Budget(keep_total=0.8).numbers(made, sites)
        assert 0.8 * whole - 1 < whole - chosen + numbers <= 0.8 * whole
        assert Budget(keep_total=1).numbers(made, sites) == chosen


def test_an_added_bias_counts_in_the_model(model: Any) -> None:
    sites = find_sites(model)
    outputs = sum(site.d_out for site in sites)
    budget = Budget(keep_total=0.8)
    assert budget.numbers(model, sites) - budget.numbers(model, sites, bias=True) == outputs
    with_biases = tiny_model("gpt2")
    sites = find_sites(with_biases)
    assert budget.numbers(with_biases, sites) == budget.numbers(with_biases, sites, bias=True)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_bytes_are_more_numbers(model: Any, layout: Layout) -> None:
    sites = find_sites(model)
    dense_bytes = weight_bytes(model, RankPlan(sites, {}))
    dense = sum(site.num_params for site in sites)
    sizes = (60_000, 80_000, 100_000, dense_bytes - 1, dense_bytes, 10**12)
    found = [Budget(max_bytes=size).numbers(model, sites, layout=layout) for size in sizes]
    assert found == sorted(found)
    assert found[0] < found[1] < found[2] < dense
    assert found[-2:] == [dense, dense]
    # float32: twenty thousand bytes are five thousand numbers
    assert found[1] - found[0] == pytest.approx(5000, abs=30)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("budget", "possible", "as_budget"),
    [
        ({"keep": 0.02}, r"keep (0\.\d+)", float),
        ({"keep_total": 0.2}, r"keep_total (0\.\d+)", float),
        ({"max_bytes": 24_000}, r"max_bytes ([\d,]+)", lambda text: int(text.replace(",", ""))),
    ],
    ids=["keep", "keep_total", "max_bytes"],
)
def test_too_little_says_how_much_is_the_least(
    model: Any, budget: dict[str, Any], possible: str, as_budget: Any, layout: Layout
) -> None:
    """24,000 bytes are less than the embeddings alone take. What the message names is enough, and no more than that."""
    sites = find_sites(model)
    with pytest.raises(ValueError, match="too small, the least possible is") as caught:
        Budget(**budget).numbers(model, sites, layout=layout)
    found = re.search(f"least possible is {possible}, with every selected linear at rank 1", str(caught.value))
    assert found is not None
    least = as_budget(found[1])
    (name,) = budget
    rank_1 = sum(s.d_out + s.d_in - (layout == "pivoted") for s in sites)
    assert rank_1 <= Budget(**{name: least}).numbers(model, sites, layout=layout) < rank_1 + 10
    with pytest.raises(ValueError, match="least possible"):
        Budget(**{name: least - 1 if name == "max_bytes" else least - 1e-3}).numbers(model, sites, layout=layout)


def test_joint_groups_can_be_smaller(model: Any) -> None:
    sites = find_sites(model)
    budget = Budget(keep=0.05)
    joint = {site.input_group for site in sites}
    with pytest.raises(ValueError, match="too small"):
        budget.numbers(model, sites)
    assert budget.numbers(model, sites, joint=joint) == int(0.05 * sum(site.num_params for site in sites))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({}, "give exactly one of keep, keep_total, max_bytes, not none"),
        ({"keep": 0.5, "max_bytes": 3}, "give exactly one of keep, keep_total, max_bytes, not keep and max_bytes"),
        ({"keep": 0}, r"keep 0 is outside \(0, 1\]: it is the share of the selected linears kept, not removed"),
        ({"keep": 70}, r"keep 70 is outside \(0, 1\]"),
        ({"keep_total": 1.1}, r"keep_total 1.1 is outside \(0, 1\]: it is the share of the model kept"),
        ({"max_bytes": 0}, "max_bytes 0 is not a positive whole number"),
        ({"max_bytes": 3.5}, "max_bytes 3.5 is not a positive whole number"),
    ],
)
def test_a_wrong_budget_is_refused(budget: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**budget)
