"""Catalogue: the allocations by name, what each needs, and the section of a recipe that names one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from eckart.allocation.effective_rank import effective_rank
from eckart.allocation.global_loss import global_
from eckart.allocation.rank_plan import Ranking, RankPlan
from eckart.allocation.search.criteria import check_split
from eckart.allocation.search.sensitivity import rank_by_sensitivity
from eckart.allocation.search.surgical import PERPLEXITY_TOLERANCE, Tolerance, rank_surgically
from eckart.allocation.search.trials import check_shares
from eckart.allocation.uniform import per_role, uniform
from eckart.evals.catalogue import find_task, searched_by
from eckart.lowrank.entries import check_entry
from eckart.support.section import Section


@dataclass(frozen=True)
class Allocator:
    """A way to share a budget out among linears.

    Attributes:
        allocate: f(sites, what it needs, budget, *, layout, rank_multiple, **options) -> RankPlan or Ranking: every
            site of the model; the units that share the budget, with their loss curves, or `SearchInputs`; and how many
            numbers the units may store together.
        about: one line for people.
        needs: "sites": which linears there are. "losses": what each of them loses at every rank. "trials": the model
            measured with some of them cut.
        options: fields of `Allocation` that `allocate` takes.
        measures: fields of `Allocation` that say how losses or trials are measured.
        required: those of the fields without which it is nothing.
        members: of linears that may share a right factor it reads the losses together and apart, and decides.
        same_share: with `keep`, every linear keeps just that share, and what rounding saves is not given out again.
        open_ended: it may go without a budget, and ends by itself.
        any_cost: `allocate` takes `cost`, a `Cost` that the budget counts instead of numbers.
    """

    allocate: Callable[..., RankPlan | Ranking]
    about: str
    needs: Literal["sites", "losses", "trials"] = "sites"
    options: tuple[str, ...] = ()
    measures: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    members: bool = False
    same_share: bool = False
    open_ended: bool = False
    any_cost: bool = False


ALLOCATIONS: dict[str, Allocator] = {
    "uniform": Allocator(uniform, "the same share of every linear (SFSD Eq. 3)", same_share=True, any_cost=True),
    "per-role": Allocator(
        per_role, "shares in given proportions", options=("shares",), required=("shares",), any_cost=True
    ),
    "effective-rank": Allocator(
        effective_rank, "ranks in proportion to effective ranks (Roy and Vetterli 2007)", needs="losses", any_cost=True
    ),
    "global": Allocator(
        global_,
        "the ranks that lose the least together: a knapsack over all linears, dense ones included",
        needs="losses",
        options=("exact",),
        measures=("weights",),
        members=True,
        any_cost=True,
    ),
    "sensitivity": Allocator(
        rank_by_sensitivity,
        "cut where a score falls least, one linear at a time (ASVD's STRS)",
        needs="trials",
        measures=("score", "split", "limit"),
        required=("score",),
    ),
    "surgical": Allocator(
        rank_surgically,
        "the smallest budget of one linear after another at which a score holds (SFSD Algorithm 1)",
        needs="trials",
        options=("tolerance", "budgets"),
        measures=("score", "split", "limit"),
        required=("score",),
        open_ended=True,
    ),
}


class Allocation(Section):
    """How a budget is shared out: a name of ALLOCATIONS, and the settings that it takes."""

    name: str = Field("uniform", description=", ".join(ALLOCATIONS))
    shares: dict[str, float] = Field(
        default_factory=dict,
        description="per-role: {role, part or pattern: weight}",
        examples=["{mlp: 2, attention: 1}"],
    )
    weights: Literal["equal", "probes"] = Field(
        "equal",
        description="global: equal takes the method's own losses as they are, probes measures what they are worth",
    )
    exact: bool = Field(False, description="global: the true optimum, not one within a step of it")
    score: str | None = Field(
        None,
        description="of a search: the task. Of text, of StereoSet and of tasks of lm-eval a search reads the split "
        "sfsd-search; of labelled sets the rows to train on. Of probing:SET it is the mean selectivity of the layers",
        examples=["perplexity:wikitext2", "lm-eval:piqa"],
    )
    split: str | None = Field(
        None, description="of a search: the split of the score's corpus that search and report divide; default test"
    )
    limit: int | None = Field(
        None, gt=0, description="of a search: windows or questions that the score reads at most, after that division"
    )
    budgets: list[float] | None = Field(
        None, description="surgical: the shares of a linear that are tried; default 0.1 ... 0.9"
    )
    tolerance: str | None = Field(
        None,
        coerce_numbers_to_str=True,
        description="surgical: '0.5% per linear', '5%', '0.01'; default what the authors' release has: 0.5 % of "
        "perplexity at each linear, of other scores nothing",
    )

    @property
    def row(self) -> Allocator:
        """What the name stands for."""
        return ALLOCATIONS[self.name]

    @property
    def options(self) -> dict[str, Any]:
        """The settings of `Allocator.allocate`, with every default filled in."""
        values = {name: getattr(self, name) for name in self.row.options}
        return {**values, **({"tolerance": self.allowed} if "tolerance" in values else {})}

    @property
    def allowed(self) -> Tolerance:
        """The tolerance: what is said, else the authors'."""
        if self.tolerance is not None:
            return Tolerance.parse(self.tolerance)
        by_ratio = self.score is not None and find_task(self.score).traits.ratio
        return PERPLEXITY_TOLERANCE if by_ratio else Tolerance(0.0, relative=False)

    def spelled_out(self) -> Allocation:
        """The same with its tolerance said."""
        takes_one = "tolerance" in self.row.options
        return self.model_copy(update={"tolerance": str(self.allowed)}) if takes_one else self

    @field_validator("name")
    @classmethod
    def _known(cls, name: str) -> str:
        check_entry(ALLOCATIONS, "allocation", name)
        return name

    @model_validator(mode="after")
    def _fits(self) -> Allocation:
        takes = (*self.row.options, *self.row.measures)
        for name, field in type(self).model_fields.items():
            said = getattr(self, name) != field.get_default(call_default_factory=True)
            if name in self.row.required and not said:
                raise ValueError(f"{self.name} needs {name}, such as {' or '.join(field.examples or ['a value'])}")
            if said and name not in ("name", *takes):
                owners = [other for other, row in ALLOCATIONS.items() if name in (*row.options, *row.measures)]
                raise ValueError(f"{name} goes with {' and '.join(owners)}, not with {self.name}: leave it out")
        if self.score is not None:
            searched_by(self.score)
            if self.split is not None:
                check_split(self.score, self.split)
        if self.budgets is not None:
            check_shares(self.budgets)
        if self.tolerance is not None:
            Tolerance.parse(self.tolerance)
        return self
