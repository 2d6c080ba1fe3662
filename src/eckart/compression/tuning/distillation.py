"""Distillation: the factors of a whole compressed model, a few gentle steps towards the dense model's predictions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.calibration.sequential import PassReport
from eckart.compression.tuning.descent import descend, draw_batches, low_rank_parameters, put_back
from eckart.data.tokens import Tokens
from eckart.evals.predictions import log_probabilities, summed_divergence
from eckart.support.precision import in_float32
from eckart.support.progress import Track, silent


@dataclass(frozen=True)
class Distillation:
    """Gradient steps on all low-rank linears of a model at once.

        minimise  E KL(dense || compressed)

    of the predictions on the calibration samples (Hinton et al., arXiv 1503.02531), over left, right and bias of every
    low-rank linear. No label is read: the compressed model is to repeat the dense one's mistakes as well.

    Attributes:
        steps: of one batch each, in an order that is the same in every run.
        rate: of the largest step of a number, relative to the root mean square of the tensor that it is in.
        batch: samples in a step.

    Raises:
        ValueError: steps, a rate or a batch that are not positive.
    """

    steps: int = 64
    rate: float = 5e-4
    batch: int = 8

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not 0 < self.rate < 1:
            raise ValueError(
                f"distillation: {self.steps} steps of {self.batch} at rate {self.rate}; give at least 1 of each and a "
                "rate in (0, 1)"
            )

    def __call__(
        self, model: PreTrainedModel, dense: PreTrainedModel, tokens: Tokens, held_out: Tokens, track: Track = silent
    ) -> PassReport | None:
        """Distil, in place. Undone where the divergence on `held_out` is not lower; None where nothing is low-rank.

        Args:
            model: compressed. dense: the model that it was compressed from.

        Raises:
            ValueError: a prediction of either model that is not finite before any step, or models without predictions.

        Cost: a forward and a backward pass of the model and a forward pass of the dense one per step; memory of both
        models, of the gradients, and of the activations of one batch.
        """
        parameters = low_rank_parameters(model)
        if not parameters:
            return None
        before = _divergence(model, dense, held_out, self.batch)
        kept = [parameter.detach().clone() for parameter in parameters]
        drawn = draw_batches(len(tokens), self.batch, self.steps)
        batches = [tokens.take(torch.tensor(rows)).rows(len(rows))[0] for rows in drawn]

        def loss(step: int) -> Tensor:
            with torch.no_grad():
                log_p = log_probabilities(dense, *batches[step].content)
            log_q = log_probabilities(model, *batches[step].content)
            return torch.nn.functional.kl_div(log_q, log_p.to(log_q.device), log_target=True, reduction="batchmean")

        try:
            with in_float32(model):
                descend(model, parameters, loss, steps=self.steps, rate=self.rate, what="distillation", track=track)
            after = _divergence(model, dense, held_out, self.batch)  # of the numbers that are stored
        except ValueError:  # a prediction that is not finite: the rate was too high
            after = float("inf")
        better = after < before
        if not better:
            put_back(parameters, kept)
        return PassReport("distil", "model", before, after, better)


@torch.no_grad()
def _divergence(model: PreTrainedModel, dense: PreTrainedModel, tokens: Tokens, batch: int) -> float:
    """Mean KL(dense || model) over all predictions."""
    total, count = 0.0, 0
    for rows in tokens.rows(batch):
        log_p = log_probabilities(dense, *rows.content)
        total += summed_divergence(log_p, log_probabilities(model, *rows.content).to(log_p.device))
        count += len(log_p)
    return total / max(count, 1)
