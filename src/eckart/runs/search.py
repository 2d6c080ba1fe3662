"""Search: a recipe's ranks by measuring its model, and their score on data that the search did not read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eckart.allocation import RankPlan
from eckart.allocation.search.trials import planned
from eckart.calibration.moments import BlockCalibration, calibration_digest
from eckart.models.loading import load_model, load_tokenizer
from eckart.models.matching import check_finite
from eckart.models.sites import find_sites
from eckart.runs.how import How
from eckart.runs.ranks import joint_groups, make_score, rank, spectra_of
from eckart.runs.recipe import Recipe
from eckart.runs.workbench import Workbench


@dataclass(frozen=True)
class SearchReport:
    """The ranks that a search decided, and their score on data that it did not read.

    Attributes:
        plan: the ranks.
        facts: for JSON: dense score, ranks, curve and trials, see `SearchResult.to_dict`.
        kept: share of the selected linears' numbers that the plan keeps.
        dense, compressed: the score before and after, on the data that was not searched on.
    """

    plan: RankPlan
    facts: dict[str, Any]
    kept: float
    dense: float
    compressed: float


def search_ranks(recipe: Recipe, how: How, *, journal: Path | None = None) -> SearchReport:
    """Carry out the search of a recipe's allocation, and measure the model with its ranks on the rest of the data.

    The search is the one that `make_checkpoint` carries out. A surgical search that ends above the recipe's budget is
    no error here: `kept` says where it ended.

    Args:
        journal: a file of trials, a line each; the same search goes on after the last of them. None keeps them in
            `how.cache`, as `make_checkpoint` does.

    Raises:
        ValueError: a recipe whose allocation searches nothing, or whose budget keeps everything; and what the stages
            raise; the score's data are read before the model is calibrated.

    Cost: the search (see `surgical.search`), two scores on the rest of the data, and the moments of the selected
    linears in memory.
    """
    allocation = recipe.composition.allocation
    if allocation.row.needs != "trials":
        raise ValueError(f"{allocation.name} measures nothing: nothing is searched")
    trust = how.trust_remote_code
    model = load_model(recipe.model, dtype=recipe.dtype, device=how.device, dense=True, trust_remote_code=trust)
    check_finite(recipe.model, model.named_parameters())
    tokenizer = load_tokenizer(recipe.model, trust_remote_code=trust)
    work = Workbench(recipe, model, tokenizer, how)
    composition, inputs = work.composition, work.allocation_inputs()
    others = make_score(allocation, inputs, others=True)
    if inputs.blocks is not None:
        inputs = replace(inputs, blocks=_computed_once(inputs.blocks))
    if journal is not None:
        inputs = replace(inputs, trials=journal, identity=_identity(work))
    ranking = rank(composition, recipe.budget, inputs, rank_multiple=recipe.rank_multiple, above=True)
    if "search" not in ranking.facts:
        raise ValueError("the budget keeps everything: there is nothing to search")
    joint = joint_groups(inputs.sites, find_sites(model)) if composition.joint else frozenset()
    dense = others(model)
    with planned(model, ranking.plan, spectra_of(composition.method, inputs, joint)):
        compressed = others(model)
    selected = sum(site.num_params for site in inputs.sites)
    kept = 1 - (ranking.plan.dense_params - ranking.plan.kept_params) / selected
    return SearchReport(ranking.plan, ranking.facts["search"], kept, dense, compressed)


def _computed_once(blocks: Callable[[], Iterable[BlockCalibration]]) -> Callable[[], tuple[BlockCalibration, ...]]:
    """The same blocks, computed once and held in memory: the search and the report need all of them."""

    @functools.cache
    def held() -> tuple[BlockCalibration, ...]:
        return tuple(blocks())

    return held


def _identity(work: Workbench) -> dict[str, Any]:
    """What determines the spectra of a search, for the header of its journal."""
    recipe, model, method = work.recipe, work.model, work.composition.method
    identity = {
        "model": recipe.model,
        "dtype": str(model.dtype),
        "calibration": calibration_digest(model, work.tokens[0], method.needs, find_sites(model)),
        "method": method.identity,
    }
    return identity if work.recording is None else {**identity, "fisher": work.recording}
