"""Tiny models in every layout: plain or pivoted, each linear with a right factor of its own or one for all of an input.

The factors are those of plain SVD, cut here and put in by hand, so that nothing depends on how a compression selects.
"""

from __future__ import annotations

import torch
from transformers import PreTrainedModel

from eckart.lowrank import Factors, Layout, factor, pivot, pivoted_rank_for, rank_for, split
from eckart.models.checkpoint import describe
from eckart.models.linear import LowRankLinear
from eckart.models.sites import Site, find_sites, read_weight, replace_module
from tiny import ENCODERS, tiny_model

# {name: (layout, whether linears of one input share the right factor)}
KINDS: dict[str, tuple[Layout, bool]] = {
    "plain": ("plain", False),
    "pivoted": ("pivoted", False),
    "joint plain": ("plain", True),
    "joint pivoted": ("pivoted", True),
}


def head_of(model_type: str) -> str:
    """The head that the type's tiny model has."""
    return "masked" if model_type in ENCODERS else "causal"


def groups_of(model: PreTrainedModel, joint: bool) -> list[list[Site]]:
    """The model's sites, those of one input together if `joint`."""
    groups: dict[str, list[Site]] = {}
    for site in find_sites(model):
        groups.setdefault(site.input_group if joint else site.name, []).append(site)
    return list(groups.values())


@torch.no_grad()
def lay_out(model: PreTrainedModel, kind: str, *, keep: float = 0.6, added_bias: bool = True) -> PreTrainedModel:
    """Factor every linear of `model`, in place; `added_bias` adds one as sfsd does, the hardest thing to store."""
    layout, joint = KINDS[kind]
    for sites in groups_of(model, joint):
        modules = [model.get_submodule(site.name) for site in sites]
        weights = [read_weight(module) for module in modules]
        stacked = torch.cat(weights)
        rank = (rank_for if layout == "plain" else pivoted_rank_for)(keep, *stacked.shape)
        factors = factor(stacked).cut(rank)
        if added_bias:
            factors = Factors(factors.left, factors.right, factors.left.sum(1) / 8)
        members = split(pivot(factors) if layout == "pivoted" else factors, [len(weight) for weight in weights])
        parts: list[LowRankLinear] = []
        for site, module, member in zip(sites, modules, members, strict=True):
            parts.append(
                LowRankLinear.from_factors(
                    member,
                    module.bias.detach() if site.has_bias else None,
                    device=weights[0].device,
                    dtype=weights[0].dtype,
                    right_of=parts[0] if parts else None,
                )
            )
            replace_module(model, site.name, parts[-1])
    describe(model, {"layout": kind})
    return model


def laid_out(model_type: str, kind: str, head: str | None = None, *, added_bias: bool = True, **changes: object):
    """A tiny model of the type in that layout."""
    return lay_out(tiny_model(model_type, head, **changes), kind, added_bias=added_bias)
