"""Rules: the same share kept at every selected site, or at those of each rule."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from eckart.allocation.budget import Budget
from eckart.allocation.fitting import check_multiple
from eckart.allocation.rank_plan import RankPlan, settle
from eckart.allocation.uniform import uniform
from eckart.lowrank import Layout
from eckart.models.sites import Site, as_patterns, find_sites, select_sites
from eckart.models.units import Unit, units_of


@dataclass(frozen=True)
class Rule:
    """One line of an allocation: the selected sites keep the share `keep` of their numbers.

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


def plan(
    model: PreTrainedModel,
    keep: float | None = None,
    *,
    keep_total: float | None = None,
    max_bytes: int | None = None,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    blocks: str | None = None,
    rules: Sequence[Rule] | None = None,
    rank_multiple: int = 1,
    layout: Layout = "plain",
    joint: Collection[str] = (),
    bias: bool = False,
) -> RankPlan:
    """The same share kept at every selected site: rank = floor(keep d_out d_in / (d_out + d_in)), SFSD Eq. 3.

    In the pivoted layout the rank is the largest whose r (d_out + d_in - r) numbers are within the share. With
    `keep_total` or `max_bytes` the share is the largest that the budget allows, see `uniform`.

    Args:
        keep: share of each selected site's numbers kept, in (0, 1].
        keep_total: share of the whole model's numbers kept. max_bytes: of the weight files. See `Budget`.
        include, exclude, blocks: as in `select_sites`; everything else stays dense.
        rules: instead of the above, several lines; the first that chooses a site decides.
        rank_multiple: round ranks down to a multiple (8 on CPUs, 16 or 64 on GPUs run faster), never below one.
        joint: input groups whose linears share a right factor; a share is then of their numbers together.
        bias: the method will add a bias where there is none, which `keep_total` and `max_bytes` count.

    Raises:
        ValueError: keep outside (0, 1], a pattern that matches nothing, a budget that nothing fits, or not exactly one
            of keep, keep_total, max_bytes and rules.
    """
    given = {"keep": keep, "keep_total": keep_total, "max_bytes": max_bytes, "rules": rules}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise ValueError(f"give exactly one of {', '.join(given)}, not {' and '.join(named) or 'none'}")
    check_multiple(rank_multiple)
    sites = find_sites(model)
    include, exclude = as_patterns(include), as_patterns(exclude)
    if keep_total is not None or max_bytes is not None:
        selected = select_sites(sites, include=include, exclude=exclude, blocks=blocks)
        budget = Budget(keep_total=keep_total, max_bytes=max_bytes)
        units = _units_of(selected, joint)
        numbers = budget.numbers(model, selected, layout=layout, joint=joint, bias=bias)
        return uniform(sites, units, numbers, layout=layout, rank_multiple=rank_multiple)
    if rules is None:
        assert keep is not None
        rules = [Rule(keep, include, exclude, blocks)]
    ranks: dict[str, int | None] = {}
    for rule in rules:
        selected = select_sites(sites, include=rule.include, exclude=rule.exclude, blocks=rule.blocks)
        for unit in _units_of(selected, joint):
            rank = None  # at keep = 1 the dense weight is the same size, and exact
            if rule.keep < 1:
                rank = unit.rank_for(rule.keep, layout, rank_multiple)
            for site in unit.sites:
                ranks.setdefault(site.name, rank)
    return settle(sites, ranks, layout=layout, joint=joint)


def _units_of(selected: Sequence[Site], joint: Collection[str]) -> tuple[Unit, ...]:
    """The selected sites, those of a joint group that has any of them as one."""
    return units_of(selected, [group for group in joint if any(site.joint_group == group for site in selected)])
