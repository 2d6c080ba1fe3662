"""Heads: keys and values in groups of heads, each group a linear of its own, so that a cache can hold its latents.

A cache of keys and values holds d_out numbers a token for each of `k_proj` and `v_proj`. Where W_g of a group of heads
is L_g R_g of rank r_g, it may hold the r_g latents z_g = R_g x, and L_g z_g is made when it is read (Palu, Chang et al.
2024, arXiv 2407.21118, whose groups these are). `open_heads` gives each group a linear of its own: they are sites as
any other, and every method, order and layout is theirs. The layers that read latents are in `latent_attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from eckart.models.families import UnsupportedModelError, family_of, language_model
from eckart.models.latent_attention import as_latent, as_stock
from eckart.models.linear import LowRankLinear

# Model types whose attention is: keys k_proj(x), perhaps a norm, a rotation; values v_proj(x). Each is in the tests.
TAKEN = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3_text",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
)
# Heads in a group at most where none is named: quality rises with the group, and so does what reading values costs.
HEADS = 4
OPENED = ("k_proj", "v_proj")


class HeadGroups(nn.Module):
    """What a key or value projection computes, each group of heads by a linear of its own, a child by its number.

    An empty tensor is under the projection's key, as in `LowRankLinear`: a loader without eckart stops there.

    Args:
        linear: the projection; its numbers are copied.
        groups: how many; they are of one size.
    """

    def __init__(self, linear: nn.Linear, groups: int) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.size = linear.out_features // groups
        for number in range(groups):
            self.add_module(str(number), _rows(linear, number * self.size, self.size))
        self.register_buffer("weight", linear.weight.new_empty(0))

    @property
    def groups(self) -> list[nn.Module]:
        """The linears, in the order of the heads."""
        return list(self._modules.values())  # type: ignore[arg-type]

    @property
    def widths(self) -> list[int]:
        """How many numbers a cache holds of each group for a token: its rank, or all of them where it is dense."""
        return [_width(group) for group in self.groups]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([group(x) for group in self.groups], -1)

    def latents(self, x: Tensor) -> Tensor:
        """(..., sum of widths): what a cache holds."""
        return torch.cat([g.right(x) if isinstance(g, LowRankLinear) else g(x) for g in self.groups], -1)

    def rebuild(self, latents: Tensor) -> Tensor:
        """(..., d_out): what `forward` gives, of its latents."""
        parts = latents.split(self.widths, -1)
        return torch.cat([self.rebuild_group(number, part) for number, part in enumerate(parts)], -1)

    def rebuild_group(self, number: int, latents: Tensor) -> Tensor:
        """(..., size): the keys or values of one group, of its latents."""
        group = self.groups[number]
        return group.rebuild(latents) if isinstance(group, LowRankLinear) else latents

    def close(self) -> nn.Linear:
        """The projection with these groups' numbers.

        Raises:
            ValueError: a group is no dense linear.
        """
        groups = self.groups
        if not all(type(group) is nn.Linear for group in groups):
            raise ValueError("a group of heads is compressed, and has no place in one matrix")
        linears = cast(list[nn.Linear], groups)
        biased = any(each.bias is not None for each in linears)
        whole = nn.Linear(self.in_features, self.out_features, bias=biased, device="meta")
        whole.weight = nn.Parameter(torch.cat([each.weight.detach() for each in linears]))
        if biased:  # a method may have added one to some
            biases = [each.weight.new_zeros(self.size) if each.bias is None else each.bias for each in linears]
            whole.bias = nn.Parameter(torch.cat([each.detach() for each in biases]))
        return whole.train(self.training)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


def _width(group: nn.Module) -> int:
    return group.rank if isinstance(group, LowRankLinear) else cast(nn.Linear, group).out_features


def _rows(linear: nn.Linear, first: int, count: int) -> nn.Linear:
    """A linear of some of the rows, in memory of its own."""
    part = nn.Linear(linear.in_features, count, bias=linear.bias is not None, device="meta")
    rows = slice(first, first + count)
    part.weight = nn.Parameter(linear.weight.detach()[rows].clone())
    if linear.bias is not None:
        part.bias = nn.Parameter(linear.bias.detach()[rows].clone())
    return part.train(linear.training)


def opened_heads(model: nn.Module) -> dict[str, HeadGroups]:
    """{name: module} of the key and value projections that are open."""
    return {name: module for name, module in model.named_modules() if isinstance(module, HeadGroups)}


def group_names(model: nn.Module) -> set[str]:
    """The names of all linears of groups of heads."""
    return {f"{name}.{number}" for name, module in opened_heads(model).items() for number in range(len(module.groups))}


def heads_in_a_group(model: PreTrainedModel) -> int | None:
    """How many key-value heads a group of an opened model has; None of a model that is not open."""
    opened = [*opened_heads(model).values()]
    return opened[0].size // _head_dim(language_model(model).config) if opened else None


def open_heads(model: PreTrainedModel, size: int | None = None) -> PreTrainedModel:
    """Give every group of key and of value heads a linear of its own, in place; the model computes the same.

    Its attention then also takes a `LatentCache`. An open model is returned as it is. `eckart.save` writes the
    projections of a model without a compressed linear as transformers does.

    Args:
        size: key-value heads in a group. Default: the largest divisor of their number that is at most 4.

    Raises:
        UnsupportedModelError: a model whose attention is not known to compute keys and values so; says why.
        ValueError: heads that do not divide into such groups, or an open model whose groups have another size.

    Cost: a copy of one projection at a time.
    """
    attentions = check_heads(model)
    config = language_model(model).config
    size = group_size(config, size)
    own = heads_in_a_group(model)
    if own is not None:
        if own != size:
            raise ValueError(f"its key-value heads are in groups of {own} already, and not of {size}")
        return model
    groups = config.num_key_value_heads // size
    closed = [getattr(attention, name) for attention in attentions for name in OPENED]
    if other := next((type(linear).__name__ for linear in closed if type(linear) is not nn.Linear), None):
        raise UnsupportedModelError(
            f"a key or value projection is a {other}: heads are opened of a dense model, before it is compressed"
        )
    for attention in attentions:
        for name in OPENED:
            setattr(attention, name, HeadGroups(getattr(attention, name), groups))
        as_latent(attention)
    return model


def close_heads(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `open_heads`, in place: groups of dense linears become one projection again.

    Raises:
        ValueError: a group is compressed; names its projection. Nothing was changed.
    """
    closed = {}
    for name, groups in opened_heads(model).items():
        try:
            closed[name] = groups.close()
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    for name, linear in closed.items():
        model.set_submodule(name, linear)
    for name in dict.fromkeys(name.rpartition(".")[0] for name in closed):
        as_stock(model.get_submodule(name))
    return model


def group_size(config: PreTrainedConfig, size: int | None) -> int:
    """Key-value heads in a group. Raises ValueError where a model's do not divide into groups of `size`."""
    heads: int = config.num_key_value_heads
    if size is None:
        return next(each for each in range(min(HEADS, heads), 0, -1) if heads % each == 0)
    if size < 1 or heads % size:
        raise ValueError(f"{heads} key-value heads do not divide into groups of {size}: give a divisor of {heads}")
    return size


def check_heads(model: PreTrainedModel) -> list[nn.Module]:
    """The attention modules whose keys and values can be opened, block by block.

    Raises:
        UnsupportedModelError: the attention is not known to compute keys and values as `open_heads` needs; says why.
    """
    language = language_model(model)
    kind = language.config.model_type
    blocks = language.get_submodule(family_of(model).blocks)
    if kind not in TAKEN:
        raise UnsupportedModelError(
            f"{kind} cannot cache latents of its keys and values: {_reason(blocks)}; those that can are "
            f"{', '.join(TAKEN)}"
        )
    return [cast(nn.Module, block.self_attn) for block in cast(nn.ModuleList, blocks)]


def _reason(blocks: nn.Module) -> str:
    """Why the attention of blocks is not of the form that `open_heads` needs."""
    names = {name.rpartition(".")[2] for name, _ in blocks.named_modules()}
    if any(name.startswith("kv_a_proj") for name in names):
        return "it caches latents by design, compress the linears that make and read them"
    if not names >= {"k_proj", "v_proj"}:
        return "keys and values are not the outputs of two linears, k_proj and v_proj"
    return "its keys are not known to be k_proj's output, perhaps normed, and rotated by position"


def head_numbers(model: PreTrainedModel) -> Iterator[tuple[str, int]]:
    """(name of a projection, numbers of its outputs that a cache holds for a token) of an opened model."""
    for name, groups in opened_heads(model).items():
        yield name, sum(groups.widths)


def rotation_numbers(config: PreTrainedConfig) -> int:
    """Numbers that a `LatentCache` holds for a token in addition to latents: its rotation, once a kind of layers.

    Args:
        config: of the language model.
    """
    return _head_dim(config) * len(set(getattr(config, "layer_types", None) or [""]))


def dense_numbers(config: PreTrainedConfig) -> int:
    """Numbers of an ordinary cache for a token: keys and values of all layers. config: of the language model."""
    return int(2 * config.num_hidden_layers * config.num_key_value_heads * _head_dim(config))


def _head_dim(config: PreTrainedConfig) -> int:
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
