"""Notices: what to know of a compression before it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from transformers import PreTrainedModel

from eckart.models.dense import describe_linears
from eckart.models.families import parts_outside
from eckart.models.sites import Site, blocks_of
from eckart.runs.added_bias import lacking_place
from eckart.runs.composition import Composition


def uncompressed_parts(model: PreTrainedModel, sites: Sequence[Site]) -> Iterator[str]:
    """A line that says which blocks the linears are in, for a model with linears in other parts as well."""
    outside = parts_outside(model, blocks_of(model))
    if outside:
        blocks = " and ".join(
            dict.fromkeys(site.name.removesuffix(f".{site.role}").rpartition(".")[0] for site in sites)
        )
        yield f"{type(model).__name__}: linears in {blocks} are compressed; {', '.join(outside)} stay as they are"


def notices(model: PreTrainedModel, sites: Sequence[Site], composition: Composition) -> Iterator[str]:
    """A line for each thing: parts of the model that are not compressed, and an export that will not be possible.

    Args:
        model: dense. sites: its linears that are selected for compression.
    """
    yield from uncompressed_parts(model, sites)
    method = composition.method
    lacking = lacking_place(model, sites, method)
    if lacking:
        way = "with the method's option bias=false" if "bias" in method.options else "with the method feature-space"
        yield (
            f"the method, {method.name}, adds a bias to every linear, and {type(model).__name__} has no place for one "
            f"in {describe_linears(lacking)}: `eckart export --dense` will refuse the result; if you need it dense, "
            f"compress {way}"
        )
