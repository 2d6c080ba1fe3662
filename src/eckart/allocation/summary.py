"""Summary: what a plan makes of a model, counted in every way that people count."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.allocation.file_size import weight_bytes
from eckart.allocation.rank_plan import RankPlan
from eckart.models.experts import share_of_tokens
from eckart.models.families import tower_modules
from eckart.models.units import Unit
from eckart.support.sizes import num_params


@dataclass(frozen=True)
class PlanSummary:
    """What a plan makes of a model, in numbers.

    Attributes:
        sites_low_rank, sites_dense: how many linears.
        keep_of_linears: share of the compressible linears' numbers, planned or not.
        keep_of_model: share of the whole model's; embeddings, heads and norms are counted.
        params: [before, after], numbers of the whole model.
        file_bytes: [before, after], of the weight files, see `weight_bytes`.
        macs_per_token: [before, after], multiply-accumulates in linears, see `linear_macs`.
        keep_of_planned: share of the numbers of the linears that the plan names: what `keep` asks for. None in a file
            that an older eckart wrote.
    """

    sites_low_rank: int
    sites_dense: int
    keep_of_linears: float
    keep_of_model: float
    params: list[int]
    file_bytes: list[int]
    macs_per_token: list[int]
    keep_of_planned: float | None = None


def summarise(plan: RankPlan, model: PreTrainedModel, *, bias: bool = False) -> PlanSummary:
    """Shares kept, counted both ways people count, and sizes before and after. Call before compressing.

    Args:
        bias: the method adds a bias to every low-rank site that has none. It counts in neither
            keep_of_linears nor keep_of_planned.
    """
    whole = num_params(model)
    low_rank = [site for site in plan.sites if plan.rank(site) is not None]
    removed = plan.dense_params - plan.kept_params
    added = sum(site.d_out for site in low_rank if bias and not site.has_bias)
    # Factors take a multiply-accumulate for each number that they store: the layouts and a shared right factor save as
    # many of the one as of the other.
    macs_removed = sum(_macs_removed(unit, plan, model) for unit in plan.units)
    macs = linear_macs(model)
    return PlanSummary(
        sites_low_rank=len(low_rank),
        sites_dense=len(plan.sites) - len(low_rank),
        keep_of_linears=plan.kept_params / plan.dense_params,
        keep_of_model=(whole - removed + added) / whole,
        params=[whole, whole - removed + added],
        file_bytes=[weight_bytes(model, RankPlan(plan.sites, {})), weight_bytes(model, plan, bias=bias)],
        macs_per_token=[macs, round(macs - macs_removed)],
        keep_of_planned=plan.keep,
    )


def _macs_removed(unit: Unit, plan: RankPlan, model: PreTrainedModel) -> Fraction:
    """Multiply-accumulates per token that the plan saves in a unit."""
    share, rank = share_of_tokens(model, unit.sites[0].name), plan.rank(unit.sites[0])
    kept = plan.kept_of(unit) * share
    if unit.is_of_experts and rank is not None:  # each token goes through the shared right factor once
        kept += rank * unit.d_in * (1 - share)
    return unit.num_params * share - kept


def linear_macs(model: PreTrainedModel) -> int:
    """Multiply-accumulates per token of the dense model's linears: those that read each token, the head included.

    A pooler and what a classifier adds to the base model read one token of a text, and towers for images or sound none;
    they are not counted. Products that are no linear's, such as attention scores, grow with the text and are not
    counted either. Of a layer's experts those count that a token is given to, each for the mean of all.
    """
    base = model.base_model
    counted = [model] if model.get_output_embeddings() is not None else [base]
    pooler = getattr(base, "pooler", None)
    once = set(pooler.modules()) if isinstance(pooler, nn.Module) else set()
    once |= tower_modules(model)
    paths = {module: path for path, module in model.named_modules()}
    macs = sum(
        module.weight.numel() * share_of_tokens(model, paths[module])
        for root in counted
        for module in root.modules()
        if isinstance(module, nn.Linear | Conv1D) and module not in once
    )
    return round(macs)
