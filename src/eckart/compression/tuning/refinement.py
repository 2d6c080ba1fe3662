"""Refinement: a compressed block's factors, a few gentle steps towards the dense block's output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart.calibration.sequential import PassReport
from eckart.calibration.streams import Sample
from eckart.compression.tuning.descent import descend, low_rank_parameters, put_back
from eckart.lowrank.float32 import products_as_stored
from eckart.support.precision import in_float32
from eckart.support.progress import Track, silent


@dataclass(frozen=True)
class Refinement:
    """Gradient steps on the low-rank linears of one block.

        minimise  E ||block(xh) - dense block(x)||^2 / E ||dense block(x) - xh||^2

    over left, right and bias of its low-rank linears; x in the dense stream, xh in the compressed one, without padding.
    The steps are taken in float32 (with TF32 products on a GPU, where the model has 16 bits); the same samples recur
    in the same order.

    Attributes:
        steps: of one batch each. A few dozen: with more the blocks begin to fit the calibration text.
        rate: of the largest step of a number, relative to the root mean square of the tensor that it is in.

    Raises:
        ValueError: steps or a rate that are not positive.
    """

    steps: int = 36
    rate: float = 3e-4

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.rate < 1:
            raise ValueError(
                f"refinement: {self.steps} steps at rate {self.rate}; give at least 1 and a rate in (0, 1)"
            )

    def __call__(
        self,
        number: int,
        block: nn.Module,
        samples: Sequence[Sample],
        held_out: Sequence[Sample],
        track: Track = silent,
    ) -> PassReport | None:
        """Refine a block, in place. Undone where the loss on `held_out` is not lower; None where nothing is low-rank.

        Raises:
            ValueError: the block's output is not finite before any step.

        Cost: a forward and a backward pass of the block per step, and two forward passes over what is held out.
        """
        parameters = low_rank_parameters(block)
        if not parameters:
            return None
        place = f"block {number}"
        before = _loss(block, held_out)
        if not math.isfinite(before):
            raise ValueError(f"{place}: its output is not finite; the model is broken or overflows in its stored type")
        kept = [parameter.detach().clone() for parameter in parameters]
        with products_as_stored(parameters[0].detach()), in_float32(block) as dtype:
            descend(
                block,
                parameters,
                lambda step: _relative(samples[step % len(samples)].cast(dtype), block),
                steps=self.steps,
                rate=self.rate,
                what=f"{place}: refinement",
                track=track,
            )
        after = _loss(block, held_out)
        better = after < before  # false of a NaN
        if not better:
            put_back(parameters, kept)
        return PassReport("refine", place, before, after, better)


def _relative(sample: Sample, block: nn.Module) -> Tensor:
    """The loss on one batch."""
    output = sample.run(block).float()
    mask = sample.mask.to(output.device)[..., None]
    target = sample.target.float()
    lost = ((output - target).square() * mask).sum()
    added = ((target - sample.own.float()).square() * mask).sum()
    return lost / added.clamp_min(torch.finfo(torch.float32).tiny)


@torch.no_grad()
def _loss(block: nn.Module, samples: Sequence[Sample]) -> float:
    """The mean loss over batches."""
    return sum(float(_relative(sample, block)) for sample in samples) / len(samples)
