"""Speed tables: what the linears of a model take on this machine, measured once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import asdict
from pathlib import Path

from transformers import PreTrainedModel

from eckart.allocation import SpeedTable
from eckart.allocation.speed import Shape
from eckart.allocation.stopwatch import describe_machine, measure_speed
from eckart.data.pairs import is_encoder_decoder
from eckart.data.positions import usable_positions
from eckart.lowrank import Layout
from eckart.models.sites import Site
from eckart.models.units import units_of
from eckart.runs.how import How
from eckart.support.files import set_aside, write_whole
from eckart.support.fingerprint import describe_architecture

# Raised when the way of measuring changes: tables of another way are not read.
FORMAT = 2
# Tokens that a model reads at a time where it does not generate and nobody says how many.
TEXT = 512


def default_rows(model: PreTrainedModel) -> int:
    """Tokens at a time that a budget in speed is about: 1 where the model generates, else a text.

    Raises:
        ValueError: an encoder-decoder, which reads a source once and generates a target token by token.
    """
    _check_one_stack(model)
    if model.can_generate():
        return 1
    positions = usable_positions(model)
    return TEXT if positions is None else min(TEXT, positions)


def speeds_of(
    model: PreTrainedModel,
    sites: Sequence[Site],
    how: How,
    *,
    rows: int,
    layout: Layout = "plain",
    joint: Collection[str] = (),
    bias: bool = False,
    rank_multiple: int = 1,
) -> SpeedTable:
    """The table of the model's `sites`, see `measure_speed`: out of the cache's folder `speed`, or measured and kept.

    A table is for one architecture, one choice of linears and one machine: device and its name, number of threads, type
    of numbers, version of torch. Where any of these is another, it is measured anew; a file that is none is set aside.

    Raises:
        ValueError: more rows than the model's positions; an encoder-decoder.
    """
    _check_one_stack(model)
    settings = {"rows": rows, "layout": layout, "bias": bias, "rank_multiple": rank_multiple}
    shapes = {Shape.of(unit): None for unit in (*units_of(sites), *units_of(sites, joint))}
    identity = {
        "format": FORMAT,
        "machine": describe_machine(model),
        "architecture": describe_architecture(model),
        "attention": getattr(model.config, "_attn_implementation", None),
        "shapes": [asdict(shape) for shape in shapes],
        **settings,
    }
    file = None if how.cache is None else _file(how.cache, identity)
    if file is not None and file.exists():
        try:
            return SpeedTable.from_json(file.read_text(encoding="utf-8"), str(file))
        except ValueError:
            set_aside(file)
    kept = "" if file is None else f"; kept in {file}"
    how.say(f"timing the model and its linears, which takes some seconds{kept}")
    table = measure_speed(
        model, sites, rows=rows, layout=layout, joint=joint, bias=bias, rank_multiple=rank_multiple, track=how.track
    )
    if file is not None:
        write_whole(file, table.to_json())
    return table


def _check_one_stack(model: PreTrainedModel) -> None:
    if is_encoder_decoder(model):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder, of whose two stacks one reads a text and one generates: a "
            "budget in speed is not defined for it; give --keep, --keep-total or --max-bytes"
        )


def _file(cache: Path, identity: dict[str, object]) -> Path:
    text = json.dumps(identity, sort_keys=True, default=str)
    return cache / "speed" / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"
