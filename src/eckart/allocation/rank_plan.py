"""Plan: a rank for every site, as data; what it stores, and as JSON that people edit."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from eckart.lowrank import LAYOUTS, Layout
from eckart.lowrank.storage import GROUP, PLAIN, Storage
from eckart.models.sites import Site
from eckart.models.units import Unit, units_of
from eckart.support.html import html_table, span
from eckart.support.plain_data import parse_json


@dataclass(frozen=True)
class RankPlan:
    """A rank for every site that was planned, or None for dense; what a site costs before and after.

    Attributes:
        sites: every compressible site of the model, in order.
        ranks: {site name: rank or None}; a site that is not named stays dense.
        notes: {site name: why it stays dense although a rank was asked for}.
        layout: how the factors of the low-rank sites are stored.
        joint: input groups whose sites are factored as one stack and share a right factor.
        stored: {site name: in how many bits its numbers are kept}; a site that is not named keeps the model's type.

    Raises:
        ValueError: an unknown layout, a joint group that no site has, or one whose sites differ in rank; numbers in few
            bits where factors are pivoted or shared.
    """

    sites: tuple[Site, ...]
    ranks: Mapping[str, int | None]
    notes: Mapping[str, str] = field(default_factory=dict)
    layout: Layout = "plain"
    joint: frozenset[str] = frozenset()
    stored: Mapping[str, Storage] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout {self.layout!r} is none of {', '.join(LAYOUTS)}")
        for unit in self.units:
            _common_rank(unit, self.ranks)
            coded = [site.name for site in unit.sites if not self.storage(site).is_plain]
            if coded and (len(unit.sites) > 1 or self.layout != "plain"):
                raise ValueError(
                    f"{coded[0]} is to be kept in few bits, which goes with layout plain and a right factor of its own"
                )

    def __repr__(self) -> str:
        ranks = [rank for rank in self.ranks.values() if rank is not None]
        stored = f", {len(self.stored)} in few bits" if self.stored else ""
        return (
            f"RankPlan({len(ranks)} of {len(self.sites)} linears with a rank, {span(ranks)}; keep {self.keep:.3f}, "
            f"layout {self.layout}{stored})"
        )

    def _repr_html_(self) -> str:
        """What a notebook shows: a line for each role, over the blocks."""
        roles: dict[str, list[Site]] = {}
        for site in self.sites:
            roles.setdefault(site.role, []).append(site)
        rows = []
        for role, sites in roles.items():
            ranks = [rank for site in sites if (rank := self.rank(site)) is not None]
            shapes = dict.fromkeys(f"{site.d_out:,} x {site.d_in:,}" for site in sites)
            rows.append([role, len(sites), ", ".join(shapes), span(ranks), len(sites) - len(ranks)])
        return html_table(repr(self), ["role", "linears", "out x in", "ranks", "without a rank"], rows)

    def rank(self, site: Site) -> int | None:
        return self.ranks.get(site.name)

    def storage(self, site: Site) -> Storage:
        """In how many bits the site's numbers are kept."""
        return self.stored.get(site.name, PLAIN)

    @property
    def stored_record(self) -> dict[str, dict[str, Any]]:
        """`stored` for JSON: {site name: as `Storage.to_dict` has it}."""
        return {name: each.to_dict() for name, each in self.stored.items()}

    @property
    def changed(self) -> tuple[Site, ...]:
        """The sites that do not stay as they are: those with a rank, and those whose weight is quantised."""
        return tuple(site for site in self.sites if self.rank(site) is not None or self.storage(site).base is not None)

    @property
    def units(self) -> tuple[Unit, ...]:
        """The sites in order, those of a joint group as one."""
        return units_of(self.sites, self.joint)

    @property
    def dense_params(self) -> int:
        """Numbers in the weights of all compressible sites before."""
        return sum(site.num_params for site in self.sites)

    @property
    def kept_params(self) -> int:
        """Numbers in them after: those of the factors, a shared one counted once, or d_out d_in where dense.

        A quantised weight counts its numbers too, whatever their bits.
        """
        return sum(map(self.kept_of, self.units))

    def kept_of(self, unit: Unit) -> int:
        """Of one unit, see `kept_params`."""
        rank = self.rank(unit.sites[0])
        based = sum(site.num_params for site in unit.sites if self.storage(site).base and rank is not None)
        return based + unit.num_stored(rank, self.layout)

    @property
    def planned_params(self) -> int:
        """Numbers in the weights of the sites that the plan names, before: what a budget's keep is a share of."""
        return sum(site.num_params for site in self.sites if site.name in self.ranks)

    @property
    def keep(self) -> float:
        """Share of these numbers kept; 1 where the plan names no site."""
        planned = self.planned_params
        return 1 - (self.dense_params - self.kept_params) / planned if planned else 1.0

    def to_json(self) -> str:
        """plan.json: meant to be read and edited by hand, and read back by `RankPlan.from_json`."""
        return json.dumps(
            {
                "dense_params": self.dense_params,
                "kept_params": self.kept_params,
                "planned_params": self.planned_params,
                "keep": round(self.keep, 6),
                "layout": self.layout,
                "joint": sorted(self.joint),
                "ranks": dict(self.ranks),
                "notes": dict(self.notes),
                **({"stored": self.stored_record} if self.stored else {}),
            },
            indent=2,
        )

    @classmethod
    def from_json(cls, text: str, sites: Sequence[Site]) -> RankPlan:
        """The plan in `text` for a model with `sites`. Only "ranks", "layout", "joint" and "stored" are read.

        Without "layout" it is plain, without "joint" every site has its own factors, without "stored" all numbers are
        of the model's type.

        Raises:
            ValueError: not JSON, no "ranks", an unknown site, layout or input group, a rank outside
                1 ... min(d_out, d_in), a joint group whose sites differ in rank, or bits that there are no codes of.
        """
        try:
            written = parse_json(text, "the text")
            items = dict(written["ranks"]).items()
            layout, joint = written.get("layout", "plain"), written.get("joint", [])
            stored = {name: dict(entry) for name, entry in dict(written.get("stored", {})).items()}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a rank plan: {error}; expected JSON with a map 'ranks'") from error
        if not isinstance(joint, list) or not all(isinstance(group, str) for group in joint):
            raise ValueError(f"joint {joint!r} is not a list of input groups")
        known = {site.name: site for site in sites}
        for name, rank in items:
            if name not in known:
                raise ValueError(f"the plan names {name}, which this model has not")
            if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool)):
                raise ValueError(f"{name}: rank {rank!r} is neither a whole number nor null (dense)")
        return settle(sites, dict(items), layout=layout, joint=joint, stored=_read_storage(stored, known))


def _read_storage(written: Mapping[str, Mapping[str, Any]], known: Collection[str]) -> dict[str, Storage]:
    """{site: how its numbers are kept}, of what `Storage.to_dict` wrote.

    Raises:
        ValueError: an unknown site or key, or what `Storage` raises; names the site.
    """
    stored = {}
    for name, entry in written.items():
        if name not in known:
            raise ValueError(f"the plan stores {name}, which this model has not")
        unknown = entry.keys() - {"base", "bits", "group"}
        if unknown:
            raise ValueError(f"{name}: stored has {sorted(unknown)[0]!r}, which is none of base, bits, group")
        try:
            stored[name] = Storage.from_dict(entry)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name}: {error}") from error
    return stored


def settle(
    sites: Sequence[Site],
    ranks: Mapping[str, int | None],
    *,
    layout: Layout = "plain",
    joint: Collection[str] = (),
    stored: Mapping[str, Storage] | None = None,
) -> RankPlan:
    """A plan in which a site whose factors would store more than its dense weight stays dense, with a note.

    Not so of what is kept in few bits, which is judged by its bytes where it is chosen.

    A joint group is settled as the one stacked weight that is factored, all of its sites or none. In the pivoted layout
    every rank below min(d_out, d_in) stores less than the dense weight; at min(d_out, d_in) the site is dense.

    Raises:
        ValueError: a rank outside 1 ... min(d_out, d_in), or what `RankPlan` raises.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is none of {', '.join(LAYOUTS)}")
    settled = {site.name: ranks[site.name] for site in sites if site.name in ranks}
    notes: dict[str, str] = {}
    for unit in units_of(sites, joint):
        rank = _common_rank(unit, ranks)
        if rank is None:
            continue
        limit = min(unit.d_out, unit.d_in)
        if not 1 <= rank <= limit:
            raise ValueError(
                f"{unit.name}: rank {rank} is not in 1 ... min(d_out, d_in) = {limit}; lower it or keep, or exclude it"
            )
        coded = any(not (stored or {}).get(site.name, PLAIN).is_plain for site in unit.sites)
        note = None if coded else _why_dense(unit, rank, layout)
        if note is not None:
            for site in unit.sites:
                settled[site.name], notes[site.name] = None, note
    return RankPlan(tuple(sites), settled, notes, layout, frozenset(joint), stored or {})


def in_bits(plan: RankPlan, bits: int, group: int = GROUP) -> RankPlan:
    """The same ranks, with the factors of the sites that the plan names in so many bits, and the weights of those of
    them that have no rank.

    Raises:
        ValueError: as `RankPlan` and `Storage`.
    """
    stored = {
        site.name: Storage(base=bits, group=group) if plan.rank(site) is None else Storage(factors=bits, group=group)
        for site in plan.sites
        if site.name in plan.ranks
    }
    return replace(plan, stored=stored)


def stored_params(site: Site, rank: int | None, layout: Layout = "plain") -> int:
    """Numbers stored for the site's weight at this rank, with a right factor of its own; None is dense."""
    return Unit((site,)).num_stored(rank, layout)


def _why_dense(unit: Unit, rank: int, layout: Layout) -> str | None:
    if layout == "pivoted":
        full = rank == min(unit.d_out, unit.d_in)
        return f"rank {rank} is full, and stores as much as the dense weight: stays dense" if full else None
    break_even = unit.num_params // (unit.d_in + unit.d_out)
    return f"rank {rank} is past break-even ({break_even}): stays dense" if rank > break_even else None


def _common_rank(unit: Unit, ranks: Mapping[str, int | None]) -> int | None:
    """The rank of the unit's sites. Raises ValueError where they differ; names the unit."""
    own = {site.name: ranks.get(site.name) for site in unit.sites}
    if len(set(own.values())) > 1:
        given = ", ".join(f"{name} {'dense' if rank is None else rank}" for name, rank in own.items())
        raise ValueError(
            f"joint {unit.name}: its linears share a right factor and need one rank, or all stay dense; they have "
            f"{given}"
        )
    return next(iter(own.values()))


@dataclass(frozen=True)
class Ranking:
    """A plan, and how it was come by.

    Attributes:
        facts: for JSON: what was measured, and the trade-off that a search walked.
    """

    plan: RankPlan
    facts: dict[str, Any] = field(default_factory=dict)
