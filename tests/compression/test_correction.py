"""Corrections of quantised models: errors by plain hooks on tokens, PEFT's adapter, ranks, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import eckart
from eckart.calibration.moments import calibrate
from eckart.compression.correction import correct, correction_method
from eckart.data.pairs import is_encoder_decoder
from eckart.lowrank import Moments, build_method
from eckart.lowrank.truncation import Problem
from eckart.models.adapters import write_lora
from eckart.models.corrected import CorrectedLinear
from eckart.models.families import UnsupportedModelError
from eckart.models.quantised import differing_sites, quantised_weight
from eckart.models.sites import Site, find_sites, read_weight, select_sites
from tiny import logits_of, relative, site_inputs, tiny_model, tiny_pairs, tiny_sound, tiny_tokens

TOKENS = tiny_tokens(5, 14, padded=True)


@torch.no_grad()
def rounded_model(reference: PreTrainedModel, *, embedding: bool = False) -> PreTrainedModel:
    """A copy with every linear in coarse steps, multiplied out as a GGUF file is; perhaps the embedding as well."""
    model = copy.deepcopy(reference)
    weights = [model.get_submodule(site.name).weight for site in find_sites(model)]
    for weight in weights + [model.get_input_embeddings().weight] * embedding:
        step = weight.abs().mean() / 2 + 1e-9
        weight.copy_((weight / step).round() * step)
    return model


@pytest.fixture(scope="module")
def reference() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def quantised(reference: PreTrainedModel) -> PreTrainedModel:
    return rounded_model(reference)


def square(rows: Tensor) -> float:
    return float(rows.double().square().sum(-1).mean())


@pytest.mark.parametrize("blocks", [None, "last 1"])
@pytest.mark.parametrize("order", ["one-shot", "anchored"])
def test_the_errors_are_those_of_the_tokens(order: Any, blocks: str | None, reference: PreTrainedModel) -> None:
    """What a linear reads in the corrected model at the end is what it was calibrated on, block by block."""
    model = rounded_model(reference, embedding=True)
    before = copy.deepcopy(model)
    sites = select_sites(find_sites(reference), blocks=blocks)
    correction = correct(model, reference, TOKENS, rank=3, order=order, sites=sites, dtype=torch.float32)
    assert [each.site for each in correction.sites] == list(sites)
    dense = site_inputs(reference, TOKENS, sites)
    read = dense if order == "one-shot" else site_inputs(model, TOKENS, sites)
    for each in correction.sites:
        weight, base = read_weight(reference.get_submodule(each.name)), quantised_weight(before, each.site)
        wanted = dense[each.name] @ weight.T
        assert each.factors is not None
        for error, matrix in ((each.before, base), (each.after, base + each.factors.dense())):
            measured = square(wanted - read[each.name] @ matrix.T) / square(wanted)
            assert error == pytest.approx(measured, rel=2e-3), each.name
        assert each.after < each.before
    outside = {site.name for site in find_sites(reference)} - {site.name for site in sites}
    assert not any(isinstance(model.get_submodule(name), CorrectedLinear) for name in outside)


@pytest.mark.parametrize("order", ["one-shot", "anchored"])
def test_at_full_rank_the_model_is_the_reference(
    order: Any, reference: PreTrainedModel, quantised: PreTrainedModel
) -> None:
    off = relative(logits_of(quantised), logits_of(reference))
    correct(quantised, reference, TOKENS, rank=48, order=order, dtype=torch.float32)
    assert relative(logits_of(quantised), logits_of(reference)) < 1e-4 < off / 100


@pytest.mark.parametrize("method", ["svd", "asvd-i", "kfac"])
def test_the_knapsack_spends_the_same_and_loses_less(method: str, reference: PreTrainedModel) -> None:
    """By the method's own measure on the reference's inputs, added up over the linears."""
    losses, numbers, entry = {}, {}, correction_method(method)
    moments = {part.block: part for part in calibrate(reference, TOKENS, entry)}
    for allocation in ("uniform", "global"):
        model = rounded_model(reference)
        correction = correct(model, reference, TOKENS, rank=3, method=method, order="one-shot", allocation=allocation)
        numbers[allocation], losses[allocation] = correction.num_params, 0.0
        for each in correction.sites:
            part = moments[each.site.block]
            seen = Moments(part.inputs.get(each.site.input_group), part.gradients.get(each.name))
            weight, name = read_weight(reference.get_submodule(each.name)), each.name
            base = quantised_weight(rounded_model(reference), each.site)
            losses[allocation] += float(entry.tails(weight, seen, base=base)[each.rank])
            assert (each.rank == 3) or allocation == "global", name
    assert 0.97 * numbers["uniform"] <= numbers["global"] <= numbers["uniform"]
    assert losses["global"] < losses["uniform"]


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert", "t5", "bart", "whisper"])
def test_peft_runs_the_dense_sum(kind: str, allocation: Any, tmp_path: Path) -> None:
    """PEFT's model with the adapter, the corrected model, and a dense one with Q + L R for weights, all alike."""
    peft: Any = pytest.importorskip("peft", reason="needs peft (pip install 'eckart[peft]')")
    reference, tokens = tiny_model(kind), TOKENS
    if is_encoder_decoder(reference):
        tokens = tiny_pairs(5, padded=kind != "whisper")
        tokens = replace(tokens, sound=tiny_sound(5) if kind == "whisper" else None)
    model, before, dense = (rounded_model(reference) for _ in range(3))
    correction = correct(model, reference, tokens, rank=4, allocation=allocation)
    assert len(correction.sites) == len(find_sites(reference))
    assert {each.left.dtype for each in correction.factors.values()} == {torch.bfloat16}
    write_lora(tmp_path, reference, correction.factors, "base")
    size = (tmp_path / "adapter_model.safetensors").stat().st_size
    assert correction.num_bytes < size < correction.num_bytes + 200 * 2 * len(correction.factors)
    wrapped = peft.PeftModel.from_pretrained(before, str(tmp_path))
    expected = logits_of(model)
    assert relative(logits_of(wrapped), expected) < 1e-5
    with torch.no_grad():
        for name, factors in correction.factors.items():
            read_weight(dense.get_submodule(name)).add_(factors.to(torch.float32).dense())
    assert relative(logits_of(dense), expected) < 1e-4
    assert relative(logits_of(rounded_model(reference)), expected) > 3e-3
    settings = peft.PeftConfig.from_pretrained(str(tmp_path))
    assert settings.r == settings.lora_alpha == max(each.rank for each in correction.factors.values())
    assert settings.rank_pattern == settings.alpha_pattern
    assert bool(settings.rank_pattern) == (allocation == "global")


def test_peft_computes_in_the_same_types_in_half_precision(tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft", reason="needs peft (pip install 'eckart[peft]')")
    reference = tiny_model("llama", dtype=torch.bfloat16)
    model, before = rounded_model(reference), rounded_model(reference)
    correction = correct(model, reference, TOKENS, rank=4)
    write_lora(tmp_path, reference, correction.factors, "base")
    wrapped = peft.PeftModel.from_pretrained(before, str(tmp_path))
    assert torch.equal(logits_of(wrapped), logits_of(model))


def test_torchao_weights_are_corrected_as_they_are() -> None:
    pytest.importorskip("torchao", reason="needs torchao: pip install 'eckart[baselines]'")
    from eckart.compression.baselines.quantization import quantize_weights

    for bits in (8, 4):
        reference = tiny_model("llama", intermediate_size=64)
        model = copy.deepcopy(reference)
        quantize_weights(model, bits=bits, group_size=16)  # type: ignore[arg-type]
        wanted = logits_of(reference)
        before = (logits_of(model) - wanted).norm()
        weights = {name: p.dequantize() for name, p in model.named_parameters() if hasattr(p, "scale")}
        correction = correct(model, reference, tiny_tokens(), rank=8)
        assert len(weights) == len(correction.sites) == len(find_sites(reference))
        assert (logits_of(model) - wanted).norm() < 0.6 * before
        sites = find_sites(reference)
        numbers = sum(8 * (site.d_in + site.d_out) for site in sites)
        assert correction.bits_a_weight == 16 * numbers / sum(site.num_params for site in sites)
        for site in sites:  # not a code was changed
            base = model.get_submodule(site.name).base.weight
            assert torch.equal(base.dequantize(), weights[f"{site.name}.weight"])


def test_a_linear_that_was_not_quantised_is_passed_over(reference: PreTrainedModel, quantised: PreTrainedModel) -> None:
    name = "model.layers.1.mlp.up_proj"
    with torch.no_grad():
        quantised.get_submodule(name).weight.copy_(reference.get_submodule(name).weight)
    correction = correct(quantised, reference, TOKENS, rank=2)
    assert [site.name for site in correction.unchanged] == [name]
    assert name not in correction.factors
    assert name not in correction.to_dict()["sites"]
    assert not isinstance(quantised.get_submodule(name), CorrectedLinear)


def test_a_reference_in_half_precision_has_streams_of_its_own_type() -> None:
    reference = tiny_model("llama", dtype=torch.bfloat16)
    model = rounded_model(reference.float())
    reference = tiny_model("llama", dtype=torch.bfloat16)
    correction = correct(model, reference, TOKENS, rank=4)
    before, after = correction.errors
    assert after < 0.9 * before
    assert {each.left.dtype for each in correction.factors.values()} == {torch.bfloat16}


def test_a_linear_without_influence_is_noted_and_gets_no_rank_of_the_knapsack(reference: PreTrainedModel) -> None:
    """Its input is zero on every token: nothing that quantising took away from it is missed."""
    silent = copy.deepcopy(reference)
    with torch.no_grad():
        silent.get_submodule("model.layers.1.mlp.gate_proj").weight.zero_()
    name = "model.layers.1.mlp.down_proj"
    ranks: dict[Any, int] = {"uniform": 2, "global": 0}
    for allocation, rank in ranks.items():
        model = rounded_model(silent)
        correction = correct(model, silent, TOKENS, rank=2, order="one-shot", allocation=allocation)
        each = next(each for each in correction.sites if each.name == name)
        assert (each.rank, each.before, each.after) == (rank, 0.0, 0.0)
        assert each.note is not None
        assert "zero on every calibration token" in each.note
        assert correction.to_dict()["sites"][name]["note"] == each.note


def refused(message: str, *arguments: Any, error: type[Exception] = ValueError, **given: Any) -> None:
    with pytest.raises(error, match=message):
        correct(*arguments, **{"rank": 2, **given})


def test_refusals(reference: PreTrainedModel, quantised: PreTrainedModel) -> None:
    same = copy.deepcopy(reference)
    refused("none of the 21 linears differs", same, reference, TOKENS, error=UnsupportedModelError)
    half = copy.deepcopy(reference).bfloat16()  # rounded to another type is not quantised
    assert differing_sites(half, reference, find_sites(reference)) == ()
    refused("rank 0 is below 1", quantised, reference, TOKENS, rank=0)
    refused("order 'sequential' is none of", quantised, reference, TOKENS, order="sequential")
    refused("allocation 'best' is none of", quantised, reference, TOKENS, allocation="best")
    refused("asvd-i is calibrated", quantised, reference)
    refused("sfsd fits a bias", quantised, reference, TOKENS, method="sfsd")
    with pytest.raises(ValueError, match="leave out bias=true"):
        correction_method("kfac", {"bias": True})
    wider = tiny_model("llama", intermediate_size=64)
    refused("layers.0.mlp.gate_proj is 48 x 32 in the reference and 64 x 32 in", wider, reference, TOKENS)
    shorter = tiny_model("llama", num_hidden_layers=2)
    refused(r"layers.2.self_attn.q_proj is in the reference and not", shorter, reference, TOKENS)
    codes = copy.deepcopy(quantised)
    place = codes.get_submodule("model.layers.0.self_attn.q_proj")
    place.weight = torch.nn.Parameter(place.weight.to(torch.int8), requires_grad=False)
    refused("q_proj is stored as torch.int8", codes, reference, TOKENS, error=UnsupportedModelError)
    codes.set_submodule("model.layers.0.self_attn.q_proj", torch.nn.Identity())
    refused("q_proj is a Identity, whose quantised weight", codes, reference, TOKENS, error=UnsupportedModelError)
    broken = copy.deepcopy(quantised)
    with torch.no_grad():
        broken.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = torch.nan
    refused("layers.1.mlp.up_proj: its quantised weight", broken, reference, TOKENS)
    assert not any(isinstance(module, CorrectedLinear) for module in quantised.modules())  # nothing was touched


def test_what_is_corrected_has_the_shape_of_the_weight() -> None:
    with pytest.raises(ValueError, match=r"what is corrected has shape \(2, 3\), expected \(3, 2\)"):
        Problem(torch.zeros(3, 2), base=torch.zeros(2, 3))


def test_the_face_has_it(reference: PreTrainedModel, quantised: PreTrainedModel) -> None:
    correction = eckart.correct(quantised, reference, rank=2, method="svd")
    assert isinstance(correction, eckart.Correction)
    site: Site = correction.sites[0].site
    weight = read_weight(reference.get_submodule(site.name))
    best = build_method("svd").factor(weight, base=quantised_weight(rounded_model(reference), site))
    assert correction.sites[0].after == pytest.approx(best.tail(2) / float(weight.double().square().sum()), rel=1e-2)
