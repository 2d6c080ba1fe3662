"""Budget: how large a compressed model may be, in the measure that matters to the one who asks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from eckart.allocation.file_size import (
    SHARD,
    WORD,
    coded_twin,
    dense_tensors,
    entry,
    header_bytes,
    low_rank_twin,
    type_name,
    weight_bytes,
    with_modules,
)
from eckart.allocation.rank_plan import RankPlan
from eckart.lowrank import Layout
from eckart.lowrank.storage import Storage
from eckart.models.coded import CompressedLinear
from eckart.models.sites import Site, read_weight
from eckart.models.units import units_of
from eckart.support.sizes import num_params

# Bytes that one more file takes: a word, a header without tensors, and what fills it up.
ONE_MORE_FILE = 64


@dataclass(frozen=True)
class Budget:
    """How large the compressed model may be. Exactly one of:

    Attributes:
        keep: share of the selected linears' numbers, in (0, 1]. Everything else stays as it is and is not counted.
        keep_total: share of all the model's numbers, in (0, 1]: embeddings, head and norms count, tied ones once.
        max_bytes: of the weight files, as `save_pretrained` writes them.

    Raises:
        ValueError: none or several are given, or one is out of range.
    """

    keep: float | None = None
    keep_total: float | None = None
    max_bytes: int | None = None

    def __post_init__(self) -> None:
        named = {"keep": self.keep, "keep_total": self.keep_total, "max_bytes": self.max_bytes}
        given = [name for name, value in named.items() if value is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of {', '.join(named)}, not {' and '.join(given) or 'none'}")
        for name, share, of in (
            ("keep", self.keep, "the selected linears"),
            ("keep_total", self.keep_total, "the model"),
        ):
            if share is not None and not 0 < share <= 1:
                raise ValueError(f"{name} {share} is outside (0, 1]: it is the share of {of} kept, not removed")
        if self.max_bytes is not None and (self.max_bytes < 1 or self.max_bytes != int(self.max_bytes)):
            raise ValueError(f"max_bytes {self.max_bytes} is not a positive whole number")

    def numbers(
        self,
        model: PreTrainedModel,
        sites: Sequence[Site],
        *,
        layout: Layout = "plain",
        joint: Collection[str] = (),
        bias: bool = False,
    ) -> int:
        """How many numbers the selected `sites` may store together; at most their dense ones.

        What is not selected stays dense. Of `max_bytes`, everything that comes with a low-rank site besides its
        factors is taken off for every selected site (see `weight_bytes`), so no plan of so many numbers makes larger
        files.

        Args:
            model: dense; its weights are not read.
            joint: input groups whose sites are to share a right factor.
            bias: the method adds a bias to every low-rank site that has none. Its numbers count in `keep_total`, its
                bytes in `max_bytes`.

        Raises:
            ValueError: the selected sites do not fit even at rank 1; the message says what the least possible is.
        """
        dense = sum(site.num_params for site in sites)
        present = [group for group in joint if any(site.joint_group == group for site in sites)]
        least = sum(min(unit.num_stored(1, layout), unit.num_params) for unit in units_of(sites, present))
        if self.keep is not None:
            numbers = _share_of(dense, self.keep)
            possible = f"keep {_rounded_up(least / dense)}"
        elif self.keep_total is not None:
            whole = num_params(model)
            rest = whole - dense + sum(site.d_out for site in sites if bias and not site.has_bias)
            numbers = dense if self.keep_total == 1 else _share_of(whole, self.keep_total) - rest
            possible = f"keep_total {_rounded_up((rest + least) / whole)}"
        else:
            assert self.max_bytes is not None
            most = int(self.max_bytes)
            if weight_bytes(model, RankPlan(tuple(sites), {})) <= most:
                return dense
            size = max(read_weight(model.get_submodule(site.name)).itemsize for site in sites)
            longest = {
                site.name: low_rank_twin(
                    model, site, min(site.d_out, site.d_in), 0 if layout == "pivoted" else None, bias=bias
                )
                for site in sites
            }
            factors = {f"{name}.{side}.weight" for name in longest for side in ("left", "right")}
            rest = _other_bytes(model, longest, factors, most)
            numbers = (most - rest) // size
            possible = f"max_bytes {rest + least * size:,}"
        if numbers < least:
            raise ValueError(
                f"{self}: too small, the least possible is {possible}, with every selected linear at rank 1; "
                "allow more, or choose more linears"
            )
        return min(numbers, dense)

    def coded_bytes(self, model: PreTrainedModel, sites: Sequence[Site], *, group: int, bias: bool = False) -> int:
        """Bytes that numbers in few bits, and their scales, may take in the selected sites together: of `max_bytes`.

        Raises:
            ValueError: the rest of the model takes more than that already.
        """
        assert self.max_bytes is not None
        fullest = {
            site.name: coded_twin(model, site, min(site.d_out, site.d_in), Storage(8, 8, group), bias=bias)
            for site in sites
        }
        counted = {
            f"{name}.{part}.{kind}"
            for name in fullest
            for part in ("base", "left", "right")
            for kind in ("codes", "scales")
        }
        rest = _other_bytes(model, fullest, counted, self.max_bytes)
        if rest >= self.max_bytes:
            raise ValueError(
                f"{self}: too small, what is not compressed takes {rest:,} bytes; allow more, or choose more linears"
            )
        return self.max_bytes - rest

    def __str__(self) -> str:
        if self.max_bytes is not None:
            return f"max_bytes {self.max_bytes:,}"
        return f"keep {self.keep}" if self.keep is not None else f"keep_total {self.keep_total}"


def _share_of(numbers: int, share: float) -> int:
    """floor(share numbers). A share such as 0.58 is no binary fraction; what falls short only by that counts."""
    return math.floor(round(share * numbers, 3))


def _rounded_up(share: float) -> float:
    """With four decimals: enough of the share, for messages."""
    return math.ceil(share * 1e4) / 1e4


def _other_bytes(
    model: PreTrainedModel,
    longest: Mapping[str, CompressedLinear],
    counted: Collection[str],
    max_bytes: int,
) -> int:
    """The most that files of `max_bytes` hold in addition to the numbers that a budget shares out.

    That is with every site on its own and with every tensor that it may have, each with an entry in the header. Shapes
    and places in the file are taken at their longest.

    Args:
        longest: {site: module with all tensors, of its highest rank}.
        counted: the tensors whose numbers are shared out.
    """
    tensors = with_modules(dense_tensors(model), longest)
    rest = sum(tensor.nbytes for name, tensor in tensors.items() if name not in counted)
    stored = revert_weight_conversion(model, tensors)
    entries = {
        name: entry(type_name(name, tensor), list(tensor.shape), max_bytes, max_bytes)
        for name, tensor in stored.items()
    }
    # Two files that follow each other hold more than one may, or they would be one.
    files = 1 + 2 * max_bytes // SHARD
    return WORD + header_bytes(entries) + files * ONE_MORE_FILE + rest
