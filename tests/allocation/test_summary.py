"""Summaries: every size that is foretold is what compression then makes."""

from __future__ import annotations

from typing import Any

import pytest

from eckart.allocation import Rule, linear_macs, plan, summarise
from eckart.compression.replace import compress
from eckart.evals.cost import count_macs
from eckart.lowrank import LAYOUTS, Layout
from eckart.models.sites import find_sites, low_rank_modules
from eckart.runs.ranks import joint_groups
from eckart.support.sizes import num_params
from tiny import DEFAULT_CONFIGS, FAMILY_CONFIGS, MIXTURE_CONFIGS, tiny_model

LENGTH = 8


def counted(model: Any) -> float:
    return count_macs(model, LENGTH).linear / LENGTH


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", sorted({*FAMILY_CONFIGS, *DEFAULT_CONFIGS, *MIXTURE_CONFIGS}))
def test_the_summary_is_what_compression_then_does(model_type: str, layout: Layout) -> None:
    model = tiny_model(model_type)
    sites = find_sites(model)
    joint = {site.input_group for site in sites if site.input_group != site.name}
    made = plan(model, rules=[Rule(0.6, blocks="first 2")], layout=layout, joint=joint)
    summary = summarise(made, model)
    dense_params, dense_macs = num_params(model), counted(model)
    compress(model, "svd", made)
    assert summary.params == [dense_params, num_params(model)]
    assert summary.macs_per_token == [dense_macs, counted(model)]
    assert summary.keep_of_model == pytest.approx(num_params(model) / dense_params)
    assert summary.keep_of_linears == pytest.approx(made.kept_params / made.dense_params)
    assert (summary.sites_low_rank, summary.sites_dense) == (
        len(low_rank_modules(model)),
        sum(site.block == 2 for site in sites),
    )


def test_added_biases_are_counted() -> None:
    model = tiny_model("llama")
    made = plan(model, 0.5, include="mlp")
    plain, biased = summarise(made, model), summarise(made, model, bias=True)
    outputs = sum(site.d_out for site in made.sites if site.part == "mlp")
    assert biased.params[1] - plain.params[1] == outputs
    assert biased.keep_of_model > plain.keep_of_model
    assert biased.keep_of_linears == plain.keep_of_linears
    # keep is of what was chosen; the share of all linears, attention included, is another number.
    assert plain.keep_of_planned == biased.keep_of_planned == made.keep <= 0.5 < plain.keep_of_linears
    assert biased.file_bytes[1] > plain.file_bytes[1] + 4 * outputs
    assert biased.macs_per_token == plain.macs_per_token


@pytest.mark.parametrize(
    ("model_type", "head"), [("llama", "base"), ("bert", "base"), ("bert", "classifier"), ("gpt2", "classifier")]
)
def test_what_reads_one_token_is_not_counted(model_type: str, head: str) -> None:
    """A base model has no head, and poolers and classifiers are small beside the rest, per token of a longer text."""
    model = tiny_model(model_type, head)
    inside = linear_macs(model)
    assert inside == sum(site.num_params for site in find_sites(model))
    few, many = (count_macs(model, length).linear - length * inside for length in (2, 12))
    assert few >= 0
    assert many <= 12 * 32 * 2 + 32 * 32


def test_experts_count_for_the_tokens_that_they_are_given() -> None:
    """Of a rank for one expert of four, of which each token is given to two, half of what it saves is saved."""
    model = tiny_model("mixtral")
    experts = {site.name for site in find_sites(model) if ".experts." in site.name}
    made = plan(model, rules=[Rule(0.5, include="*.experts.1.*")])
    before, after = summarise(made, model).macs_per_token
    assert before - after == pytest.approx((made.dense_params - made.kept_params) / 2, abs=0.5)
    inside = sum(site.num_params * (0.5 if site.name in experts else 1) for site in find_sites(model))
    assert before == inside + model.lm_head.weight.numel()


def test_a_mixture_that_does_not_say_how_many_experts_a_token_is_given() -> None:
    model = tiny_model("deepseek_v2")
    model.config.num_experts_per_tok = None
    with pytest.raises(ValueError, match="DeepseekV2ForCausalLM: its configuration has no num_experts_per_tok"):
        linear_macs(model)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_token_goes_through_a_right_factor_that_experts_share_once(layout: Layout) -> None:
    model = tiny_model("mixtral")
    sites = find_sites(model)
    made = plan(model, 0.5, layout=layout, joint=joint_groups(sites, sites))
    assert any("*" in group for group in made.joint)
    before, after = summarise(made, model).macs_per_token
    assert before == counted(model)
    compress(model, "svd", made)
    # Pivots are not the same number of each expert's rows, and every token here is given to the same two.
    assert counted(model) == pytest.approx(after, rel=0 if layout == "plain" else 0.01)
