"""Units: what is cut as one: a linear, or the linears of one input group whose weights are factored as one stack."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from eckart.lowrank import Factors, Layout, Pivoted, num_stored, pivot, pivoted_rank_for, rank_for, split
from eckart.lowrank.rounding import CodedFactors
from eckart.models.coded import CodedLinear, CompressedLinear
from eckart.models.linear import LowRankLinear
from eckart.models.sites import Site, read_weight

# What a checkpoint holds in place of a weight.
Stored: TypeAlias = Factors | Pivoted | CodedFactors


@dataclass(frozen=True)
class Unit:
    """What is cut as one: a site, or the sites of one input group whose weights are factored as one stack.

    Attributes:
        sites: in the model's order, which is the order of the stack.
    """

    sites: tuple[Site, ...]

    @property
    def name(self) -> str:
        """The site's name; of several, the first one's with the last parts of the others: "layers.0.attn.q+k+v"."""
        return "+".join([self.sites[0].name, *(site.name.rsplit(".", 1)[-1] for site in self.sites[1:])])

    @property
    def group(self) -> str:
        """The input group of its sites; of experts' linears that share a right factor, their role."""
        return self.sites[0].input_group if len(self.sites) == 1 else self.sites[0].joint_group

    @property
    def is_of_experts(self) -> bool:
        """Whether its sites are the same linear of several experts, each of which reads tokens of its own."""
        return len({site.input_group for site in self.sites}) > 1

    @property
    def d_in(self) -> int:
        return self.sites[0].d_in

    @property
    def d_out(self) -> int:
        return sum(site.d_out for site in self.sites)

    @property
    def num_params(self) -> int:
        return self.d_in * self.d_out

    def rank_for(self, share: float, layout: Layout = "plain", multiple: int = 1) -> int:
        """The rank whose factors hold a share of the numbers, rounded down to a multiple, but never below one."""
        count = rank_for if layout == "plain" else pivoted_rank_for
        rank = count(share, self.d_out, self.d_in)
        return max(rank - rank % multiple, min(multiple, rank))

    def num_stored(self, rank: int | None, layout: Layout = "plain") -> int:
        """Numbers stored at this rank; None is dense."""
        return self.num_params if rank is None else num_stored(self.d_out, self.d_in, rank, layout)

    def weight(self, model: nn.Module) -> Tensor:
        """(d_out, d_in): the dense weight in the model, or the stack of them."""
        weights = [read_weight(model.get_submodule(site.name)) for site in self.sites]
        return weights[0] if len(weights) == 1 else torch.cat(weights)

    def own_bias(self, model: nn.Module) -> Tensor | None:
        """(d_out,): the dense bias in the model, zero where one of several sites has none; None where none has one."""
        if not any(site.has_bias for site in self.sites):
            return None
        biases: list[Tensor] = []
        for site in self.sites:
            module = model.get_submodule(site.name)
            biases.append(
                cast(Tensor, module.bias).detach() if site.has_bias else read_weight(module).new_zeros(site.d_out)
            )
        return torch.cat(biases)

    def split(self, factors: Stored) -> Sequence[Stored]:
        """The factors of each site, left: its rows of the stack's left factor; right: the stack's, shared by all."""
        if isinstance(factors, CodedFactors):
            return [factors]  # which are never of several
        return split(factors, [site.d_out for site in self.sites])

    def stored(self, factors: Factors, layout: Layout, dtype: torch.dtype) -> Factors | Pivoted:
        """The factors as a checkpoint holds them: laid out, and rounded to `dtype`.

        A bias stays as it is: it is rounded once the linear's own is added to it.

        Raises:
            ValueError: the factors are of another shape, or of a higher rank than the layout stores; names the unit.
        """
        if (factors.d_out, factors.d_in) != (self.d_out, self.d_in):
            raise ValueError(
                f"{self.name}: its factors are of a {factors.d_out} x {factors.d_in} map, expected "
                f"{self.d_out} x {self.d_in}"
            )
        whole: Factors | Pivoted = pivot(factors) if layout == "pivoted" else factors.balanced()
        return replace(whole.to(dtype), bias=whole.bias)

    def modules(self, model: nn.Module, factors: Factors, layout: Layout = "plain") -> dict[str, nn.Module]:
        """{site name: module for its part of the factors}; see `stored` and `modules_of`, which raise the errors."""
        dtypes = (read_weight(model.get_submodule(site.name)).dtype for site in self.sites)
        return self.modules_of(model, self.stored(factors, layout, reduce(torch.promote_types, dtypes)))

    def modules_of(self, model: nn.Module, stored: Stored) -> dict[str, nn.Module]:
        """{site name: module for its part of factors as they are stored}, in the dense modules' type and on their
        device, with their own biases added. The dense modules must be in the model.

        Raises:
            ValueError: a factor is not finite in the dense type (attention kernels are known to make a finite output
                of one); names the site.
        """
        modules: dict[str, CompressedLinear] = {}
        lender: LowRankLinear | None = None
        for site, member in zip(self.sites, self.split(stored), strict=True):
            dense = model.get_submodule(site.name)
            weight, own = read_weight(dense), dense.bias.detach() if site.has_bias else None  # type: ignore[operator]
            place: Any = {"device": weight.device, "dtype": weight.dtype}
            if isinstance(member, CodedFactors):
                module: CompressedLinear = CodedLinear.from_coded(member, own, **place)
            else:
                module = LowRankLinear.from_factors(member, own, **place, right_of=lender)
                lender = lender or module
            if not all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
                raise ValueError(
                    f"{site.name}: its factors are not finite in {weight.dtype}; load the model in float32"
                )
            modules[site.name] = module
        return dict(modules)


def units_of(sites: Sequence[Site], joint: Collection[str] = ()) -> tuple[Unit, ...]:
    """The sites in order, those of the `Site.joint_group`s in `joint` as one unit each, at the place of their first.

    Raises:
        ValueError: no site has such an input group.
    """
    groups: dict[str, list[Site]] = {}
    for site in sites:
        groups.setdefault(f"joint {site.joint_group}" if site.joint_group in joint else site.name, []).append(site)
    for group in joint:
        if f"joint {group}" not in groups:
            raise ValueError(f"no site reads {group!r}; joint names input groups, such as {sites[0].joint_group!r}")
    return tuple(Unit(tuple(members)) for members in groups.values())
