"""Allocation: which site gets which rank."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedModel

from eckart.lowrank import rank_for
from eckart.models.sites import Site, as_patterns, find_sites, select_sites
from eckart.sizes import num_params


@dataclass(frozen=True)
class Rule:
    """One line of an allocation: the chosen sites keep the share `keep` of their numbers.

    Attributes:
        keep: share kept, in (0, 1]; 1 leaves the sites dense.
        include, exclude, blocks: as in `select_sites`.
    """

    keep: float
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    blocks: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep {self.keep} is outside (0, 1]: it is the share of parameters kept, not removed")


@dataclass(frozen=True)
class RankPlan:
    """A rank for every site that was planned, or None for dense; what a site costs before and after.

    Attributes:
        sites: every compressible site of the model, in order.
        ranks: {site name: rank or None}; a site that is not named stays dense.
        notes: {site name: why it stays dense although a rank was asked for}.
    """

    sites: tuple[Site, ...]
    ranks: Mapping[str, int | None]
    notes: Mapping[str, str] = field(default_factory=dict)

    def rank(self, site: Site) -> int | None:
        return self.ranks.get(site.name)

    @property
    def dense_params(self) -> int:
        """Numbers in the weights of all compressible sites before."""
        return sum(site.num_params for site in self.sites)

    @property
    def kept_params(self) -> int:
        """Numbers in them after: rank (d_out + d_in), or d_out d_in where dense."""
        return sum(stored_params(site, self.rank(site)) for site in self.sites)

    def to_json(self) -> str:
        """plan.json: meant to be read and edited by hand, and read back by `RankPlan.from_json`."""
        return json.dumps(
            {
                "dense_params": self.dense_params,
                "kept_params": self.kept_params,
                "keep": round(self.kept_params / self.dense_params, 6),
                "ranks": dict(self.ranks),
                "notes": dict(self.notes),
            },
            indent=2,
        )

    @classmethod
    def from_json(cls, text: str, sites: Sequence[Site]) -> RankPlan:
        """The plan in `text` (only "ranks" is read) for a model with `sites`.

        Raises:
            ValueError: not JSON, no "ranks", an unknown site, or a rank outside 1 ... min(d_out, d_in).
        """
        try:
            ranks = json.loads(text)["ranks"]
            items = dict(ranks).items()
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a rank plan: {error}; expected JSON with a map 'ranks'") from error
        known = {site.name: site for site in sites}
        for name, rank in items:
            if name not in known:
                raise ValueError(f"the plan names {name}, which this model has not")
            if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool)):
                raise ValueError(f"{name}: rank {rank!r} is neither a whole number nor null (dense)")
        return settle(sites, dict(items))


def plan(
    model: PreTrainedModel,
    keep: float | None = None,
    *,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    blocks: str | None = None,
    rules: Sequence[Rule] | None = None,
    rank_multiple: int = 1,
) -> RankPlan:
    """The same share kept at every chosen site: rank = floor(keep d_out d_in / (d_out + d_in)), SFSD Eq. 3.

    Args:
        keep: share of each chosen site's numbers kept, in (0, 1].
        include, exclude, blocks: as in `select_sites`; everything else stays dense.
        rules: instead of the above, several lines; the first that chooses a site decides.
        rank_multiple: round ranks down to a multiple (8 on CPUs, 16 or 64 on GPUs run faster), never below one.

    Raises:
        ValueError: keep outside (0, 1], a pattern that matches nothing, or neither keep nor rules.
    """
    if (keep is None) == (rules is None):
        raise ValueError("give either keep or rules")
    if rank_multiple < 1:
        raise ValueError(f"rank_multiple {rank_multiple} is not positive")
    if rules is None:
        assert keep is not None
        rules = [Rule(keep, as_patterns(include), as_patterns(exclude), blocks)]
    sites = find_sites(model)
    ranks: dict[str, int | None] = {}
    for rule in rules:
        for site in select_sites(sites, include=rule.include, exclude=rule.exclude, blocks=rule.blocks):
            if site.name not in ranks:
                ranks[site.name] = _rank(site, rule.keep, rank_multiple)
    return settle(sites, ranks)


def settle(sites: Sequence[Site], ranks: Mapping[str, int | None]) -> RankPlan:
    """A plan in which a site whose factors would store more than its dense weight stays dense, with a note.

    Raises:
        ValueError: a rank outside 1 ... min(d_out, d_in).
    """
    settled: dict[str, int | None] = {}
    notes: dict[str, str] = {}
    for site in sites:
        rank = ranks.get(site.name)
        if rank is None:
            if site.name in ranks:
                settled[site.name] = None
            continue
        limit = min(site.d_out, site.d_in)
        if not 1 <= rank <= limit:
            raise ValueError(
                f"{site.name}: rank {rank} is not in 1 ... min(d_out, d_in) = {limit}; lower keep or exclude this site"
            )
        if rank > site.break_even_rank:
            notes[site.name] = f"rank {rank} is past break-even ({site.break_even_rank}): left dense"
            settled[site.name] = None
        else:
            settled[site.name] = rank
    return RankPlan(tuple(sites), settled, notes)


def stored_params(site: Site, rank: int | None) -> int:
    """Numbers stored for the site's weight at this rank; None is dense."""
    return site.num_params if rank is None else rank * (site.d_in + site.d_out)


def summarise(plan: RankPlan, model: PreTrainedModel) -> dict[str, Any]:
    """Shares kept, counted both ways people count: of the compressible linears, and of the whole model.

    Call before compressing; embeddings, heads and norms are in the second count.
    """
    whole = num_params(model)
    low_rank = sum(rank is not None for rank in plan.ranks.values())
    removed = plan.dense_params - plan.kept_params
    return {
        "sites_low_rank": low_rank,
        "sites_dense": len(plan.sites) - low_rank,
        "keep_of_linears": plan.kept_params / plan.dense_params,
        "keep_of_model": (whole - removed) / whole,
    }


def _rank(site: Site, keep: float, multiple: int) -> int | None:
    if keep == 1:
        return None  # full rank at break-even cost: the dense weight is the same size and exact
    rank = rank_for(keep, site.d_out, site.d_in)
    return max(rank - rank % multiple, min(multiple, rank))
