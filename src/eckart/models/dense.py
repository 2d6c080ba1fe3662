"""Dense: multiply the factors back, for people without eckart."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.models.coded import CompressedLinear
from eckart.models.experts import close_experts, layer_role, open_experts
from eckart.models.families import UnsupportedModelError, is_linear, text_config
from eckart.models.heads import close_heads, heads_in_a_group, open_heads
from eckart.models.remote_code import drop_code
from eckart.models.sites import low_rank_modules, replace_module

# Config switches that give an architecture's linears a bias: Llama's two; SeedOss's, Ernie's, StableLM's and Falcon's.
BIAS_SWITCHES = ("attention_bias", "mlp_bias", "attention_out_bias", "use_bias", "use_qkv_bias", "bias")


def export_dense(model: PreTrainedModel) -> PreTrainedModel:
    """Multiply every pair of factors back, in place, and return an ordinary model: `save_pretrained` writes it as one.

    Numbers in few bits become those that they stand for.

    Pivoted layouts and shared right factors are multiplied out too: every linear has a matrix of its own.

    A bias that the method added needs a place in the architecture. Where its config can ask for one (Llama's
    attention_bias and mlp_bias) it does, and linears that get a place they do not need hold zeros. No bias is folded
    into another layer: docs/decisions.md says why that never makes a whole model exportable.

    Raises:
        UnsupportedModelError: the architecture has no place for an added bias. Nothing was changed.
    """
    biased = [name for name, module in low_rank_modules(model).items() if module.bias is not None]
    skeleton = _biased_skeleton(model, biased)
    lacking = _without_bias(skeleton, biased)
    if lacking:
        raise UnsupportedModelError(
            f"{lacking[0]}: the method added a bias, and {type(model).__name__} has no place for one in "
            f"{describe_linears(lacking)}; to export dense, compress anew without: `best` leaves it out by itself "
            "where there is no place, kfac and shrunk with the option bias=false, and feature-space is sfsd without one"
        )
    multiply_back(model)
    close_heads(close_experts(model))
    close_heads(skeleton)
    for name, module in model.named_modules():
        if is_linear(module) and module.bias is None and skeleton.get_submodule(name).bias is not None:
            module.bias = nn.Parameter(module.weight.new_zeros(module.weight.shape[0]))
    for switch in BIAS_SWITCHES:
        if hasattr(text_config(skeleton), switch):
            setattr(text_config(model), switch, getattr(text_config(skeleton), switch))
    quantizer: Any = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)
    drop_code(model.config)
    return model


def describe_linears(names: Sequence[str]) -> str:
    """How many linears these are and of which roles: "24 linears (self_attn.o_proj, mlp.up_proj)"."""
    roles = dict.fromkeys(".".join((layer_role(name) or name).split(".")[-2:]) for name in names)
    return f"{len(names)} linear{'' if len(names) == 1 else 's'} ({', '.join(roles)})"


def without_place_for_bias(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Those of the linears to which `export_dense` could not give a bias, as the architecture has no place for it."""
    return _without_bias(_biased_skeleton(model, names), names) if names else []


def _biased_skeleton(model: PreTrainedModel, names: Sequence[str]) -> PreTrainedModel:
    """The dense model without memory for its weights, with biases asked for where one of these linears has none.

    A switch is turned where it gives such a linear a bias, and nothing to any module that is no linear.
    """
    skeleton = _skeleton(model, model.config)
    for switch in BIAS_SWITCHES:
        lacking, section = _without_bias(skeleton, names), text_config(skeleton)
        if not lacking or getattr(section, switch, None) is not False:
            continue
        setattr(section, switch, True)
        wider = _skeleton(model, copy.deepcopy(skeleton.config))
        setattr(section, switch, False)
        gained = {name for name, _ in wider.named_parameters()} - {name for name, _ in skeleton.named_parameters()}
        biases = {f"{name}.bias" for name, module in wider.named_modules() if is_linear(module)}
        if gained <= biases and not gained.isdisjoint(f"{name}.bias" for name in lacking):
            skeleton = wider
    return skeleton


def _without_bias(skeleton: PreTrainedModel, names: Sequence[str]) -> list[str]:
    return [name for name in names if skeleton.get_submodule(name).bias is None]


def multiply_back(model: PreTrainedModel) -> None:
    """Replace every low-rank linear by the ordinary linear that computes the same, in place."""
    skeleton = _skeleton(model, model.config)
    for name, module in low_rank_modules(model).items():
        replace_module(model, name, _dense_linear(module, type(skeleton.get_submodule(name))))


def _skeleton(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """The dense model that the class builds from a copy of `config`, without memory for its weights."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        skeleton = type(model)(config)
    heads = heads_in_a_group(model)
    return open_experts(skeleton) if heads is None else open_heads(open_experts(skeleton), heads)


@torch.no_grad()
def _dense_linear(module: CompressedLinear, like: type[nn.Module]) -> nn.Module:
    """An nn.Linear that computes what `module` does, or a Conv1D where the architecture has those."""
    weight, bias = module.dense(), module.bias
    if issubclass(like, Conv1D):
        conv = Conv1D(module.out_features, module.in_features)
        conv.weight = nn.Parameter(weight.mT.contiguous())
        conv.bias = nn.Parameter(weight.new_zeros(len(weight)) if bias is None else bias.detach().clone())
        return conv
    linear = nn.Linear(module.in_features, module.out_features, bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone())
    return linear
