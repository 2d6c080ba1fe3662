"""Families: every row finds all linears of the blocks, and what it says is shared is one tensor."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel, BlenderbotConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.allocation import plan
from eckart.compression.replace import compress
from eckart.models.experts import opened_experts
from eckart.models.families import FAMILIES, UnsupportedModelError, default_family, family_of
from eckart.models.sites import Site, block_names, blocks_of, find_sites, read_weight
from tiny import (
    DEFAULT_CONFIGS,
    ENCODER_DECODER_CONFIGS,
    FAMILY_CONFIGS,
    HYBRID_CONFIGS,
    MIXTURE_CONFIGS,
    closed_model,
    logits_of,
    tiny_config,
    tiny_model,
)

# Those of hybrids: tests/models/test_hybrids.py.
ALL = sorted({*FAMILIES, *DEFAULT_CONFIGS} - {*HYBRID_CONFIGS})
# transformers has no classifier of these.
NO_CLASSIFIER = {"olmoe", "granitemoe", "pegasus", "marian", "whisper"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_row_has_a_tiny_config(model_type: str) -> None:
    known = {*FAMILY_CONFIGS, *MIXTURE_CONFIGS, *ENCODER_DECODER_CONFIGS, *HYBRID_CONFIGS, "whisper"}
    assert model_type in known, f"add a tiny config of {model_type!r} to tests/tiny.py"
    assert tiny_config(model_type).model_type == model_type


@pytest.mark.parametrize("model_type", DEFAULT_CONFIGS)
def test_models_of_the_default_row_have_no_row(model_type: str) -> None:
    assert model_type not in FAMILIES
    assert family_of(tiny_model(model_type)) == default_family(tiny_model(model_type))


def linears_of_blocks(model: PreTrainedModel) -> list[str]:
    """By brute force: every linear whose path has a block number in it, but a shared expert's gate of one row."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and re.search(r"\.\d+\.", name)
        if not name.endswith("shared_expert_gate")
    ]


@pytest.mark.parametrize("head", ["pretraining", "base", "classifier"])
@pytest.mark.parametrize("model_type", ALL)
def test_sites_are_all_linears_of_the_blocks(model_type: str, head: str) -> None:
    if head == "classifier" and model_type in NO_CLASSIFIER:
        pytest.skip(f"transformers has no classifier of {model_type}")
    model = tiny_model(model_type, None if head == "pretraining" else head)
    sites = find_sites(model)
    names = [site.name for site in sites]
    assert sorted(names) == sorted(linears_of_blocks(model))
    assert [site.block for site in sites] == sorted(site.block for site in sites)
    assert {site.block for site in sites} == set(range(len(blocks_of(model))))
    for site in sites:
        module = model.get_submodule(site.name)
        shape = module.weight.shape if isinstance(module, nn.Linear) else module.weight.T.shape
        assert (site.d_out, site.d_in) == tuple(shape) == tuple(read_weight(module).shape)
        assert site.has_bias == (module.bias is not None)
        assert site.name == f"{block_names(model)[site.block]}.{site.role}"
        assert blocks_of(model)[site.block].get_submodule(site.role) is module


@pytest.mark.parametrize("model_type", ALL)
def test_read_weight_is_what_the_linear_computes(model_type: str) -> None:
    model = tiny_model(model_type)
    for site in find_sites(model):
        module = model.get_submodule(site.name)
        x = torch.randn(5, site.d_in)
        bias = 0 if module.bias is None else module.bias
        torch.testing.assert_close(module(x), x @ read_weight(module).T + bias, rtol=0, atol=1e-5)


@torch.no_grad()
def inputs_of(model: PreTrainedModel, sites: tuple[Site, ...]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda _module, args, name=site.name: seen.__setitem__(name, args[0])
        )
        for site in sites
    ]
    for experts in opened_experts(model).values():
        experts.visits_all = True
    logits_of(model)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_group_reads_one_tensor_and_groups_read_different_ones(model_type: str) -> None:
    model = tiny_model(model_type)
    sites = find_sites(model)
    seen = inputs_of(model, sites)
    assert seen.keys() == {site.name for site in sites}
    for first in sites:
        for second in sites:
            if first.block != second.block and first.of_source and second.of_source:
                continue  # every block of a decoder reads what the encoder gives; groups are of one block
            same = seen[first.name] is seen[second.name]
            assert same == (first.input_group == second.input_group), (first.name, second.name)


@pytest.mark.parametrize("model_type", DEFAULT_CONFIGS)
def test_default_row_shares_nothing(model_type: str) -> None:
    sites = find_sites(tiny_model(model_type))
    assert len({site.input_group for site in sites}) == len(sites)
    assert {site.part for site in sites} <= {"self_attn", "self_attention", "attn", "mlp"}


def test_default_row_ignores_smaller_lists() -> None:
    model = tiny_model("phi")
    model.model.extras = nn.ModuleList([nn.Linear(4, 4)])
    assert all(site.name.startswith("model.layers.") for site in find_sites(model))


def test_blocks_without_linears_are_refused() -> None:
    model = tiny_model("phi")
    model.model.layers = nn.ModuleList([nn.LayerNorm(32)])
    with pytest.raises(UnsupportedModelError, match=r"PhiForCausalLM.*no list of blocks"):
        find_sites(model)


def test_a_row_whose_path_leads_nowhere_is_refused() -> None:
    model = tiny_model("llama")
    del model.model.layers
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no blocks at 'layers'"):
        find_sites(model)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe"])
def test_closed_experts_are_refused(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"0\.mlp\.experts\.\w+ holds all experts.*eckart\.open_experts"):
        find_sites(closed_model(model_type))


def test_encoder_decoders_without_a_row_are_refused() -> None:
    with torch.device("meta"):
        model = AutoModel.from_config(BlenderbotConfig(vocab_size=8, d_model=32, encoder_layers=1, decoder_layers=1))
    with pytest.raises(UnsupportedModelError, match=r"BlenderbotModel: of encoder-decoders, t5, .* 'blenderbot' has"):
        find_sites(model)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "phi"])
@pytest.mark.parametrize("blocks", ["0-2", "last 1"])
def test_a_compressed_model_is_refused(model_type: str, blocks: str) -> None:
    model = tiny_model(model_type)
    compress(model, "svd", plan(model, 0.5, include=("mlp",), blocks=blocks))
    with pytest.raises(UnsupportedModelError, match="is low-rank already"):
        find_sites(model)


def test_integer_weights_are_refused() -> None:
    model = tiny_model("llama")
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"layers\.1\.mlp\.up_proj is stored as torch.int8"):
        find_sites(model)


def test_a_module_that_is_no_linear_is_refused() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.up_proj = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"layers\.2\.mlp\.up_proj is a Identity"):
        find_sites(model)
