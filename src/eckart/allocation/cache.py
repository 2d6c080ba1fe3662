"""Cache: how many numbers a cache of keys and values may hold for a token, shared out among groups of heads."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from eckart.allocation.rank_plan import RankPlan
from eckart.lowrank import Layout
from eckart.models.families import language_model
from eckart.models.heads import dense_numbers, group_names, heads_in_a_group, rotation_numbers
from eckart.models.sites import Site, find_sites
from eckart.models.units import Unit


@dataclass(frozen=True)
class CacheBudget:
    """How many numbers a `LatentCache` may hold for a token.

    Attributes:
        keep: as a share of those that an ordinary cache holds, in (0, 1).
    """

    keep: float

    def numbers(self, model: PreTrainedModel, sites: Collection[Site]) -> int:
        """How many latents the selected groups of heads may have together.

        The rest of the cache is taken off: groups that are not selected, and the rotations of the tokens. All of it is
        counted as if every layer held every token; a layer with a sliding window holds fewer.

        Args:
            model: dense, with open heads. sites: groups of heads.

        Raises:
            ValueError: the selected groups do not fit even at rank 1; the message says what the least possible is.
        """
        config, dense = language_model(model).config, sum(site.d_out for site in sites)
        whole = dense_numbers(config)
        rest = whole - dense + rotation_numbers(config)
        # A share such as 0.58 is no binary fraction; what falls short only by that counts.
        numbers = int(round(self.keep * whole, 3)) - rest
        if numbers < len(sites):
            raise ValueError(
                f"{self}: too small, the least possible is keep_cache {-(-(rest + len(sites)) * 10_000 // whole) / 1e4}"
                ", with every selected group of heads at rank 1; allow more, or choose more of them"
            )
        return numbers

    def __str__(self) -> str:
        return f"keep_cache {self.keep}"


def num_cached(unit: Unit, rank: int | None, layout: Layout = "plain") -> int:
    """Numbers that a cache holds for a token of a group of heads at this rank, in any layout; None is dense."""
    return unit.d_out if rank is None else rank


def head_sites(model: PreTrainedModel, sites: Collection[Site]) -> tuple[Site, ...]:
    """Those of the sites that are groups of key or value heads."""
    names = group_names(model)
    return tuple(site for site in sites if site.name in names)


def cache_facts(model: PreTrainedModel, plan: RankPlan) -> dict[str, Any]:
    """What a plan makes of the cache, for JSON.

    Args:
        model: with open heads.

    Returns:
        "heads": key-value heads in a group; "numbers_per_token": [of an ordinary cache, of a `LatentCache`];
        "rotations": those of the latter that are the tokens' rotations.
    """
    config = language_model(model).config
    latents = sum(num_cached(Unit((site,)), plan.rank(site)) for site in head_sites(model, find_sites(model)))
    rotations = rotation_numbers(config)
    return {
        "heads": heads_in_a_group(model),
        "numbers_per_token": [dense_numbers(config), latents + rotations],
        "rotations": rotations,
    }
