"""Weights: tokens count in the moments of an input by the size of their gradients, in every order and engine."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import eckart
from eckart.calibration.gradients import collect_gradients
from eckart.calibration.moments import Memory, calibrate, calibrate_by_block, gather_gradients
from eckart.calibration.sequential import SequentialCalibration
from eckart.calibration.weights import ALIKE, group_weights
from eckart.data.tokens import Tokens
from eckart.lowrank import build_method
from eckart.lowrank.moments import TOKEN_WEIGHTS
from eckart.models.sites import find_sites
from tiny import (
    ENCODER_DECODER_CONFIGS,
    MIXTURE_CONFIGS,
    relative,
    site_inputs,
    tiny_model,
    tiny_pairs,
    tiny_tokens,
)

WEIGHTED = build_method("kfac", {"weighted": True})
NEEDS = frozenset({TOKEN_WEIGHTS, "gradient_covariance"})


def text_of(model_type: str) -> Tokens:
    if model_type in ENCODER_DECODER_CONFIGS:
        return tiny_pairs(4, 9, 7, padded=True)
    return tiny_tokens(4, 10, padded=True)


def side_of(tokens: Tokens, whole: Tensor, *, source: bool) -> Tensor:
    """The numbers of the tokens of a side, without padding."""
    columns = slice(None) if tokens.split is None else slice(tokens.split) if source else slice(tokens.split, None)
    return whole[:, columns][tokens.mask[:, columns]]


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "t5", "bart"])
def test_the_moments_are_those_of_weighted_tokens(model_type: str) -> None:
    model, tokens = tiny_model(model_type), text_of(model_type)
    sites = find_sites(model)
    gradients = collect_gradients(model, tokens, sites, NEEDS)
    read = site_inputs(model, tokens, sites)
    for block in calibrate(model, tokens, WEIGHTED, batch_size=3):
        for group, moments in block.inputs.items():
            readers = [site for site in sites if site.input_group == group]
            source = readers[0].of_source
            weights = torch.ones(len(read[readers[0].name]), dtype=torch.float64)
            if readers[0].part not in ALIKE:
                total = sum(gradients[site.name].token_weights for site in readers)
                weights = side_of(tokens, total.view(tokens.ids.shape), source=source).double().sqrt()
            weights = weights / weights.sum()
            x = read[readers[0].name].double()
            mean = weights @ x
            assert moments.count == len(x)
            assert moments.total == pytest.approx(len(x))
            assert relative(moments.mean, mean) < 1e-5, group
            assert relative(moments.second_moment, x.mT @ (weights[:, None] * x)) < 1e-5, group
            centred = x - mean
            assert relative(moments.covariance, centred.mT @ (weights[:, None] * centred)) < 1e-5, group


def test_the_tail_is_the_loss_with_the_outputs_summed_over() -> None:
    """E[|g| |(W - M) x|^2] / E[|g|], where nothing is shrunk and outputs count alike."""
    model, tokens = tiny_model("llama"), tiny_tokens(6, 12)
    sites = find_sites(model)
    gradients = collect_gradients(model, tokens, sites, NEEDS)
    site = next(site for site in sites if site.name.endswith("o_proj"))  # which reads an input of its own
    x = site_inputs(model, tokens, [site])[site.name].double()
    sizes = gradients[site.name].token_weights.double().sqrt()
    (moments,) = [
        block.inputs[site.input_group]
        for block in calibrate(model, tokens, WEIGHTED)
        if site.input_group in block.inputs
    ]
    weight = model.get_submodule(site.name).weight.detach()
    factored = build_method("asvd-i").factor(weight, eckart.lowrank.Moments(moments))
    lost = (weight.double() - factored.cut(5).dense()) @ x.mT
    assert factored.tail(5) == pytest.approx(float((sizes * lost.square().sum(0)).sum() / sizes.sum()), rel=1e-5)


@pytest.mark.parametrize("model_type", ["llama", "bert", "t5"])
def test_parts_of_a_text_add_up_to_the_whole(model_type: str) -> None:
    model, tokens = tiny_model(model_type), text_of(model_type)
    sites = find_sites(model)
    whole = collect_gradients(model, tokens, sites, NEEDS)
    first, second = tokens.take(slice(3)), tokens.take(slice(3, None))
    parts = [
        collect_gradients(model, first, sites, NEEDS, samples=len(tokens)),
        collect_gradients(model, second, sites, NEEDS, after=first, samples=len(tokens)),
    ]
    for site in sites:
        merged = (parts[0][site.name] + parts[1][site.name]).token_weights
        if site.part in ALIKE:
            assert merged is None
            continue
        assert relative(merged, whole[site.name].token_weights) < 1e-5


@pytest.mark.parametrize("order", ["one-shot", "sequential", "anchored"])
def test_every_order_weighs_alike_while_nothing_is_replaced(order: str) -> None:
    """The compressed stream is the dense one then, so that all moments are the one-shot ones."""
    model, tokens = tiny_model("llama"), tiny_tokens(5, 10, padded=True)
    expected = {
        group: moments for block in calibrate(model, tokens, WEIGHTED) for group, moments in block.inputs.items()
    }
    method = WEIGHTED.anchored(0.1) if order == "anchored" else WEIGHTED
    walk = SequentialCalibration(model, tokens, method, order=order, batch_size=2)  # type: ignore[arg-type]
    seen = 0
    for part in walk:
        for group, moments in part.inputs.items():
            seen += 1
            assert relative(moments.second_moment, expected[group].second_moment) < 1e-5
            assert relative(moments.mean, expected[group].mean) < 1e-5
            if order == "anchored":
                assert relative(moments.cross_moment, expected[group].second_moment) < 1e-5
    assert seen == len(expected)


def test_weights_are_one_on_average_and_none_where_nothing_moves_the_loss() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(4, 10, padded=True)
    sites = find_sites(model)
    with torch.no_grad():
        model.model.layers[-1].self_attn.o_proj.weight.zero_()  # what it reads moves nothing then
    gradients = collect_gradients(model, tokens, sites, NEEDS)
    weights = group_weights(gradients, sites, tokens)
    last = f"model.layers.{len(model.model.layers) - 1}"
    assert f"{last}.self_attn.q_proj" not in weights
    assert f"{last}.self_attn.o_proj" in weights
    assert not [group for group in weights if "mlp" in group]
    # The passes that bring the weights bring the moments too, and none of that block's then.
    memory: Memory = {}
    known = gather_gradients(model, tokens, WEIGHTED, memory=memory)
    assert sorted(memory) == list(range(len(model.model.layers) - 1))
    for block in calibrate_by_block(model, tokens, WEIGHTED, gradients=known, memory=memory):
        assert all(moments.total == pytest.approx(tokens.count) for moments in block.inputs.values())
    for each in weights.values():
        assert float(each[tokens.mask].mean()) == pytest.approx(1)
        assert not each[~tokens.mask].any()


def test_a_text_may_have_two_lengths_of_samples() -> None:
    """Those of one length are read together, and each token keeps its place."""
    model = tiny_model("llama")
    tokens = tiny_tokens(5, 10, padded=True)
    sites = find_sites(model)
    together = collect_gradients(model, tokens, sites, NEEDS)
    for row in range(len(tokens)):
        alone = collect_gradients(model, tokens.take(slice(row, row + 1)), sites, NEEDS)
        for site in (site for site in sites if site.part not in ALIKE):
            own = together[site.name].token_weights.view(tokens.ids.shape)[row]
            assert relative(own, alone[site.name].token_weights) < 1e-4


def test_experts_are_weighed_by_their_router_alone() -> None:
    model_type = next(iter(MIXTURE_CONFIGS))
    model, tokens = eckart.open_experts(tiny_model(model_type)), tiny_tokens(4, 12)
    plain, weighted = (
        {group: each for block in calibrate(model, tokens, method) for group, each in block.inputs.items()}
        for method in (build_method("kfac", {"weighted": False}), WEIGHTED)
    )
    routed = [group for group in plain if ".experts." in group]
    assert routed
    for group in routed:
        if plain[group].total:
            assert torch.equal(plain[group].second_moment, weighted[group].second_moment)
    read_by_all = next(group for group in plain if "q_proj" in group)
    assert not torch.equal(plain[read_by_all].second_moment, weighted[read_by_all].second_moment)
