"""Linears in few bits: the laws of a quantised weight with factors, one linear at a time and in a whole model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.allocation import RankPlan, plan
from eckart.allocation.rank_plan import in_bits
from eckart.calibration.moments import calibrate, gather_gradients
from eckart.calibration.sequential import SequentialCalibration
from eckart.compression.coding import code_linear, losses_in_bits
from eckart.compression.replace import compress
from eckart.lowrank import Method, build_method, output_error
from eckart.lowrank.storage import Storage
from eckart.models.coded import CodedLinear
from eckart.models.sites import find_sites, low_rank_modules, read_weight
from lowrank.reference import Layer, as_matrix, laws, layers, make_layer, weighted_loss
from tiny import logits_of, relative, site_inputs, tiny_model, tiny_tokens

TOKENS = tiny_tokens(6, 20)
NAMES = ("svd", "asvd-0", "asvd-i", "shrunk", "sfsd", "kfac", "nsvd-i")


def method_of(name: str, *, anchored: bool = False) -> Method:
    # Errors are then of tokens that count alike.
    method = build_method(name, {"weighted": False} if name == "kfac" else {})
    return method.anchored(0.1) if anchored else method


def coded_of(method: Method, layer: Layer, storage: Storage, rank: int | None, **settings: Any) -> Any:
    moments = layer.moments(method.needs)
    return code_linear(method, layer.weight, moments, method.prepare(moments), storage, rank, **settings)[0]


def loss_of(method: Method, layer: Layer, kept: Tensor) -> float:
    """By the method's own measure, from the target on: the part that the linear decides."""
    moments = layer.moments(method.needs)
    prepared = method.prepare(moments)
    target = layer.weight if prepared.anchor is None else prepared.anchor.target(layer.weight)
    assert target is not None
    metric = None if method.stage.metric is None else method.stage.metric(moments)
    return weighted_loss(
        target - kept, prepared.root, None if metric is None else torch.from_numpy(as_matrix(metric, len(target)))
    )  # type: ignore[arg-type]


@pytest.mark.parametrize("anchored", [False, True], ids=["one-shot", "anchored"])
@pytest.mark.parametrize("name", NAMES)
def test_a_correction_of_any_rank_is_better_than_none(name: str, anchored: bool) -> None:
    if anchored and name in ("svd", "asvd-0", "nsvd-i"):
        pytest.skip("is not anchored to a second moment here")
    layer, method = make_layer(24, 32, 300), method_of(name, anchored=anchored)
    losses = [
        loss_of(method, layer, coded_of(method, layer, Storage(3, None, 16), rank, turns=0).dense())
        for rank in (None, 1, 4, 12, 24)
    ]
    assert losses == sorted(losses, reverse=True)
    # At full rank the factors give back what quantising took away.
    assert losses[-1] <= 1e-9 * loss_of(method, layer, torch.zeros_like(layer.weight))


@pytest.mark.parametrize("name", ["asvd-i", "kfac"])
@laws(15)
@given(layer=layers(kinds=("rich", "few"), tokens=(12, 40)), turns=st.integers(1, 3), anchored=st.booleans())
def test_taking_turns_never_raises_the_loss(name: str, layer: Layer, turns: int, anchored: bool) -> None:
    method, rank = method_of(name, anchored=anchored), 1
    once, again = (
        loss_of(method, layer, coded_of(method, layer, Storage(3, 8, 8), rank, turns=count).dense())
        for count in (0, turns)
    )
    assert again <= once * (1 + 1e-9) + 1e-12


@pytest.mark.parametrize("storage", [Storage(4), Storage(None, 8), Storage(4, 4)], ids=str)
def test_a_bias_is_that_of_what_is_stored(storage: Storage) -> None:
    """The mean output is the dense one's, on the inputs that the linear reads."""
    method, layer = method_of("kfac", anchored=True), make_layer(16, 24, 200)
    rank = None if storage.factors is None else 6
    coded = coded_of(method, layer, storage, rank)
    given = layer.xh.mean(0) @ coded.dense().mT + coded.bias
    torch.testing.assert_close(given, layer.x.mean(0) @ layer.weight.mT)


def test_the_error_is_that_of_the_tokens() -> None:
    method, layer = method_of("asvd-i", anchored=True), make_layer(16, 24, 200)
    coded = coded_of(method, layer, Storage(3, 8, 8), 4)
    error, energy = output_error(layer.weight, coded, layer.moments(method.needs))
    wanted = layer.x @ layer.weight.mT
    measured = (wanted - layer.xh @ coded.dense().mT).square().sum(1).mean()
    assert error == pytest.approx(float(measured), rel=1e-6)
    assert energy == pytest.approx(float(wanted.square().sum(1).mean()), rel=1e-6)


@pytest.mark.parametrize("name", ["svd", "asvd-i", "kfac"])
def test_losses_by_bits_are_those_of_the_corrections(name: str) -> None:
    method, layer = method_of(name), make_layer(12, 16, 200)
    moments = layer.moments(method.needs)
    losses = losses_in_bits(method, layer.weight, moments, method.prepare(moments), (3, 8), 16)
    assert losses.keys() == {None, 3, 8}
    assert losses[8][0] < losses[3][0] < losses[None][0]
    for base in (3, 8):
        for rank in (None, 4):
            kept = coded_of(method, layer, Storage(base, None, 16), rank, turns=0).dense()
            assert loss_of(method, layer, kept) == pytest.approx(float(losses[base][rank or 0]), rel=1e-5)


def model_in(storage: Storage, ranks: int | None, name: str, order: str = "one-shot", model_type: str = "llama") -> Any:
    """(dense, compressed, report): a tiny model with all linears in these bits."""
    dense, model = tiny_model(model_type), tiny_model(model_type)
    sites, method = find_sites(model), method_of(name)
    chosen = RankPlan(sites, {site.name: ranks for site in sites}, stored={site.name: storage for site in sites})
    calibration: Any = None
    if order == "anchored":
        gradients = gather_gradients(model, TOKENS, method) if method.needs_gradients else {}
        method = method.anchored(0.1)
        calibration = SequentialCalibration(model, TOKENS, method, order="anchored", sites=sites, gradients=gradients)
    elif method.needs:
        calibration = calibrate(model, TOKENS, method)
    return dense, model, compress(model, method, chosen, calibration)


@pytest.mark.parametrize("order", ["one-shot", "anchored"])
@pytest.mark.parametrize("name", ["asvd-i", "kfac"])
def test_a_models_errors_are_those_of_its_tokens(name: str, order: str) -> None:
    """In anchored order each linear makes up for what those before it lost to their bits."""
    dense, model, report = model_in(Storage(3, 8, 16), 2, name, order)
    sites = find_sites(dense)
    wanted = site_inputs(dense, TOKENS, sites)
    read = wanted if order == "one-shot" else site_inputs(model, TOKENS, sites)
    for each in report.sites:
        module = model.get_submodule(each.name)
        assert isinstance(module, CodedLinear)
        outputs = wanted[each.name] @ read_weight(dense.get_submodule(each.name)).mT
        given = read[each.name] @ module.dense().mT + (0 if module.bias is None else module.bias.detach())
        measured = (outputs - given).square().sum() / outputs.square().sum()
        assert each.relative_error == pytest.approx(float(measured), rel=2e-2), each.name
        assert each.rank == 2


def test_eight_bits_are_next_to_the_dense_model_and_few_are_not() -> None:
    far = {}
    for bits in (8, 4, 2):
        dense, model, report = model_in(Storage(bits, None, 32), None, "asvd-i")
        far[bits] = relative(logits_of(model), logits_of(dense))
        assert all(each.rank is None and each.tail is None and each.losses == () for each in report.sites)
        assert report.dense == ()
    assert far[8] < 0.05 < far[4] < far[2]


def test_factors_of_a_plan_in_bits() -> None:
    """Low-rank linears have both factors in them, those that stay dense their weight; others are not touched."""
    model = tiny_model("llama")
    ranks = plan(model, 0.5, include="mlp", blocks="0-1")
    first = ranks.sites[4].name
    chosen = in_bits(RankPlan(ranks.sites, {**ranks.ranks, first: None}), 8, 16)
    method = build_method("asvd-i")
    compress(model, method, chosen, calibrate(model, TOKENS, method))
    coded = low_rank_modules(model)
    assert coded.keys() == ranks.ranks.keys()
    for name, module in coded.items():
        assert isinstance(module, CodedLinear)
        assert module.storage == (Storage(8, None, 16) if name == first else Storage(None, 8, 16))
        assert module.rank == (ranks.ranks[name] if name != first else 0)
