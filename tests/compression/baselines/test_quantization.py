"""Weights in 8 and 4 bits: bytes and numbers by hand, every family, what stays dense."""

from __future__ import annotations

import copy
import json
import logging
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import eckart
from eckart.compression.baselines import baseline_options, build_baseline
from eckart.compression.baselines.quantization import quantize_weights
from eckart.evals.cost import count_macs, resident_bytes
from eckart.models.families import UnsupportedModelError
from eckart.models.sites import find_sites, read_weight
from eckart.support.sizes import num_params
from tiny import FAMILY_CONFIGS, logits_of, relative, tiny_model, tiny_tokens

# Quantization.


@pytest.fixture
def torchao() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # of kernels for other machines
    module = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install 'eckart[baselines]'")
    logging.disable(before)
    return module


def weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """{site: weight as ordinary numbers, (d_out, d_in)}."""
    numbers = {}
    for site in find_sites(model):
        weight = model.get_submodule(site.name).weight
        quantised = (
            not isinstance(weight.data, nn.Parameter) and hasattr(weight, "dequantize") and hasattr(weight, "scale")
        )
        numbers[site.name] = weight.dequantize() if quantised else read_weight(model.get_submodule(site.name)).clone()
    return numbers


def wide_model(**changes: Any) -> PreTrainedModel:
    """Wide enough for scales to be a small part of the bytes."""
    return tiny_model("llama", hidden_size=256, intermediate_size=384, head_dim=64, **changes)


@pytest.mark.parametrize(("bits", "bound", "share"), [(8, 0.01, 0.255), (4, 0.15, 0.135)])
def test_weights_stay_near_and_shrink(torchao: Any, bits: Any, bound: float, share: float) -> None:
    model = wide_model()
    before, logits = weights(model), logits_of(model)
    others = {n: p.clone() for n, p in model.named_parameters() if ".layers." not in n or "norm" in n}
    sites = find_sites(model)
    dense = num_params(model)
    facts = quantize_weights(model, bits=bits)
    for name, weight in weights(model).items():
        error = (weight - before[name]).norm() / before[name].norm()
        assert bound / 100 < error < bound, name
    assert relative(logits_of(model), logits) < 20 * bound
    parameters = dict(model.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in others.items())
    assert num_params(model) == dense
    stored = sum(resident_bytes(model.get_submodule(site.name)) for site in sites)
    assert stored / sum(4 * site.num_params for site in sites) == pytest.approx(share, abs=0.003)
    assert facts["sites"] == len(sites)
    assert not facts["left_dense"]


def test_int8_bytes_by_hand(torchao: Any) -> None:
    model = tiny_model("llama")
    weight = model.model.layers[0].mlp.down_proj.weight
    quantize_weights(model, bits=8)
    module = model.model.layers[0].mlp.down_proj
    # (32, 48) codes, and a float32 scale and an int8 zero point for each row
    assert resident_bytes(module) == 32 * 48 + 32 * (4 + 1)
    scale = weight.detach().abs().amax(1, keepdim=True) / 127.5
    assert torch.allclose(module.weight.scale, scale)
    assert ((module.weight.dequantize() - weight).abs() <= 0.501 * scale).all()


@pytest.mark.parametrize(("d_in", "group"), [(128, 128), (256, 128), (240, 120), (172, 86), (48, 48), (35, 35)])
def test_int4_is_torchaos_in_half_the_bytes(torchao: Any, d_in: int, group: int) -> None:
    model = tiny_model("llama", intermediate_size=d_in)
    weight = model.model.layers[0].mlp.down_proj.weight.detach().clone()
    facts = quantize_weights(model, bits=4)
    module = model.model.layers[0].mlp.down_proj
    assert facts["groups"][str(group)] >= 3
    unpacked = torchao.IntxUnpackedToInt8Tensor.from_hp(
        weight, (1, group), torch.int4, mapping_type=torchao.quant_primitives.MappingType.ASYMMETRIC
    )
    assert torch.equal(module.weight.dequantize(), unpacked.dequantize())
    assert resident_bytes(module) == 32 * d_in // 2 + 32 * d_in // group * (4 + 1)
    low, high = (getattr(weight.view(32, -1, group), f"a{m}")(-1).double() for m in ("min", "max"))
    step = (high.clamp_min(0) - low.clamp_max(0)) / 15
    error = (module.weight.dequantize() - weight).view(32, -1, group).abs().amax(-1).double()
    assert (error <= step * 1.01).all()
    x = torch.randn(2, 3, d_in)
    assert torch.allclose(module(x), nn.functional.linear(x, unpacked.dequantize()), atol=1e-5)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("model_type", FAMILY_CONFIGS)
def test_every_family_is_quantised(torchao: Any, model_type: str, bits: Any) -> None:
    model = tiny_model(model_type)
    before, logits, sites = weights(model), logits_of(model), find_sites(model)
    bytes_before = resident_bytes(model)
    facts = quantize_weights(model, bits=bits)
    assert facts["sites"] == len(sites)
    assert facts["rewritten"] == (len(sites) if model_type == "gpt2" else 0)
    assert resident_bytes(model) < 0.75 * bytes_before
    rounded_logits = logits_of(model)
    assert not torch.equal(rounded_logits, logits)
    # The same as the dense model with the weights rounded.
    rounded = tiny_model(model_type)
    now = {site.name: model.get_submodule(site.name).weight.dequantize() for site in sites}
    with torch.no_grad():
        for name, weight in now.items():
            assert (weight - before[name]).norm() < 0.15 * before[name].norm()
            read_weight(rounded.get_submodule(name)).copy_(weight)
    assert relative(rounded_logits, logits_of(rounded)) < 1e-4


def test_conv1d_becomes_the_same_linear() -> None:
    model = tiny_model("gpt2")
    from eckart.compression.baselines.quantization import as_linear

    conv = model.transformer.h[0].attn.c_attn
    assert isinstance(conv, Conv1D)
    linear = as_linear(conv)
    assert torch.equal(linear.weight, conv.weight.mT)
    assert torch.equal(linear.bias, conv.bias)
    x = torch.randn(2, 3, 32)
    assert torch.allclose(linear(x), conv(x), atol=1e-6)


def test_a_width_without_a_group_stays_dense(torchao: Any) -> None:
    model = tiny_model("llama", intermediate_size=34)  # 34 = 2 x 17
    facts = quantize_weights(model, bits=4, group_size=16)
    assert set(facts["left_dense"]) == {f"model.layers.{block}.mlp.down_proj" for block in range(3)}
    assert "no group of 16 ... 16 divides its 34 inputs" in facts["left_dense"]["model.layers.0.mlp.down_proj"]
    assert facts["sites"] == 18
    assert type(model.model.layers[0].mlp.down_proj.weight.data) is Tensor


@pytest.mark.parametrize("name", ["int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_quantised_model_is_used_like_any_other(torchao: Any, name: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    facts = build_baseline(name).apply(model)
    assert facts["params"] == [num_params(model)] * 2
    assert facts["bytes"][1] == resident_bytes(model) - sum(b.numel() * b.element_size() for b in model.buffers())
    assert facts["bytes"][1] < facts["bytes"][0]
    assert (facts["baseline"], facts["options"]) == (name, baseline_options(name))
    assert json.loads(json.dumps(facts)) == facts
    assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(model))
    assert logits_of(model).dtype == dtype
    assert model.generate(torch.ones(1, 3, dtype=torch.int64), max_new_tokens=4, min_new_tokens=4).shape == (1, 7)
    assert count_macs(model, 8) == count_macs(tiny_model("llama"), 8)
    assert repr(model)
    with pytest.raises(UnsupportedModelError, match=r"q_proj is quantised already"):
        build_baseline(name).apply(model)


def test_quantising_shows_its_progress(torchao: Any) -> None:
    seen: list[tuple[str, int]] = []

    def track(items: Any, description: str, total: int) -> Any:
        seen.append((description, total))
        return items

    build_baseline("int8").apply(tiny_model("llama"), track=track)
    build_baseline("llm-pruner", {"samples": 2}).apply(tiny_model("llama"), keep=0.7, tokens=tiny_tokens(), track=track)
    assert seen == [("int8", 21), ("llm-pruner: gradients", 2)]


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_without_torchao(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for module in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, module, None)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"torchao is not installed: pip install 'eckart\[baselines\]'"):
        build_baseline(name).apply(model)
    assert torch.equal(logits_of(model), logits_of(tiny_model("llama")))


def test_a_compressed_model_is_not_quantised(torchao: Any) -> None:
    model = tiny_model("llama")
    eckart.compress(model, "svd", eckart.plan(model, 0.5))
    with pytest.raises(UnsupportedModelError, match="is low-rank already"):
        build_baseline("int8").apply(model)
