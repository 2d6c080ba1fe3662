"""The catalogue of baselines: each one a function from its settings to a `Baseline`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from transformers import PreTrainedModel

from eckart.compression.baselines.pruning import prune_structures
from eckart.compression.baselines.quantization import check_group_size, import_torchao, quantize_weights
from eckart.data.tokens import Tokens
from eckart.lowrank.entries import build_entry, entry_options
from eckart.support.progress import Track, silent
from eckart.support.sizes import num_bytes, num_params

TORCHAO = "torchao, Or et al., arXiv 2507.16099; rounding to nearest, no calibration"


class Procedure(Protocol):
    """Changes a model in place and returns facts for JSON."""

    def __call__(
        self, model: PreTrainedModel, *, keep: float | None, tokens: Tokens | None, track: Track
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Baseline:
    """A rival of low-rank compression, with its settings.

    Its model stays in memory. It is for measuring, and is not saved as a checkpoint: blocks that were pruned have
    shapes of their own, which no config states.

    Attributes:
        name: in the catalogue.
        paper: its source.
        about: what it does, in a line.
        run: applies it.
        needs_tokens: whether it reads calibration text.
        needs_keep: whether its size can be set; baselines that do not need it have one size.
        options: its settings.
        check: raises ValueError where an optional package that it needs is not installed.
    """

    name: str
    paper: str
    about: str
    run: Procedure = field(repr=False, compare=False)  # follows from `name` and `options`
    needs_tokens: bool = False
    needs_keep: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    check: Callable[[], Any] = field(default=lambda: None, repr=False, compare=False)

    def apply(
        self,
        model: PreTrainedModel,
        *,
        keep: float | None = None,
        tokens: Tokens | None = None,
        track: Track = silent,
    ) -> dict[str, Any]:
        """Compress `model` in place.

        Args:
            keep: share of the numbers in the compressible linears that is kept, in (0, 1].
            tokens: calibration text; ignored by a baseline that reads none.

        Returns:
            Facts for JSON: "params" and "bytes" of all parameters, [before, after], and what was done to which linear.

        Raises:
            ValueError: keep or tokens are missing, keep is given to a baseline of one size, or an optional package is
                not installed.
            UnsupportedModelError: the model cannot be compressed this way. Nothing was changed.
        """
        if self.needs_keep and (keep is None or not 0 < keep <= 1):
            raise ValueError(f"baseline {self.name}: keep {keep} is not in (0, 1]")
        if not self.needs_keep and keep is not None:
            raise ValueError(f"baseline {self.name} has one size; it takes no keep")
        if self.needs_tokens and tokens is None:
            raise ValueError(f"baseline {self.name} reads calibration text; give tokens")
        before = (num_params(model), num_bytes(model))
        facts = self.run(model, keep=keep, tokens=tokens, track=track)
        return {
            "baseline": self.name,
            "options": self.options,
            "params": [before[0], num_params(model)],
            "bytes": [before[1], num_bytes(model)],
            **facts,
        }


def int8() -> Baseline:
    """Eight bits for every weight, one scale for each of its rows."""

    def run(model: PreTrainedModel, *, keep: float | None, tokens: Tokens | None, track: Track) -> dict[str, Any]:
        return quantize_weights(model, bits=8, track=track)

    return Baseline("int8", TORCHAO, "weights in 8 bits, symmetric, a scale per output", run, check=import_torchao)


def int4(group_size: int = 128) -> Baseline:
    """Four bits for every weight, a scale and a zero point for each group of a row."""
    check_group_size(group_size)

    def run(model: PreTrainedModel, *, keep: float | None, tokens: Tokens | None, track: Track) -> dict[str, Any]:
        return quantize_weights(model, bits=4, group_size=group_size, track=track)

    about = f"weights in 4 bits, asymmetric, a scale per {group_size} inputs"
    return Baseline("int4", TORCHAO, about, run, options={"group_size": group_size}, check=import_torchao)


def llm_pruner(samples: int = 10, length: int = 64, first: int | None = None, last: int | None = None) -> Baseline:
    """Whole attention heads and MLP channels removed, those first whose removal costs least."""
    for option, value, least in (
        ("samples", samples, 1),
        ("length", length, 2),
        ("first", first, 0),
        ("last", last, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"baseline llm-pruner: {option} {value} is below {least}")

    def run(model: PreTrainedModel, *, keep: float | None, tokens: Tokens | None, track: Track) -> dict[str, Any]:
        assert keep is not None
        assert tokens is not None
        return prune_structures(
            model, keep, tokens, samples=samples, length=length, first=first, last=last, track=track
        )

    return Baseline(
        "llm-pruner",
        "Ma et al., LLM-Pruner, arXiv 2305.11627: block-wise, first-order Taylor per weight, no recovery training",
        "attention heads and MLP channels of least importance removed",
        run,
        needs_tokens=True,
        needs_keep=True,
        options={"samples": samples, "length": length, "first": first, "last": last},
    )


BASELINES: dict[str, Callable[..., Baseline]] = {"int8": int8, "int4": int4, "llm-pruner": llm_pruner}


def baseline_options(name: str) -> dict[str, Any]:
    """{setting: default} of a baseline. Raises ValueError on an unknown name, with the nearest known one."""
    return entry_options(BASELINES, "baseline", name)


def build_baseline(name: str, options: dict[str, Any] | None = None) -> Baseline:
    """The catalogue's baseline `name` with its settings.

    Raises:
        ValueError: an unknown baseline or setting (the message has the nearest known name), or a bad value.
    """
    return build_entry(BASELINES, "baseline", name, options)
