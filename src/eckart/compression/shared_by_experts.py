"""Shared by experts: one right factor for the same linear of all experts of a layer, a left factor of each.

minimise over R and L_e:  sum_e u_e E_e || A_e (W_e x - L_e R xh) ||^2    with u_e the use of expert e

The experts read tokens of one tensor, so that what most of them need of it is alike; each reads its own tokens, so that
with different moments there is no closed form. R is that of the stack [sqrt(u_1) W_1; sqrt(u_2) W_2; ...] on the tokens
of all experts, and each L_e the regression of its own expert's outputs on what R keeps of its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eckart.lowrank import Factored, Factors, InputMoments, Moments, refit_left


@dataclass(frozen=True)
class SharedByExperts:
    """A spectrum of the stacked, weighed experts, whose cuts have left factors fit to each expert's own tokens.

    Attributes:
        spectrum: of the stack. Its losses are those of the tokens of all experts, before the left factors are fit to
            each one's own: an estimate of the loss of the cut, as a rule above it.
        weights: W_e of each expert, (d_out, d_in). roots: sqrt(u_e) of each.
        inputs: the moments of each, shrunk; those without second moments leave the left factors of the stack.
    """

    spectrum: Factored
    weights: tuple[Tensor, ...]
    roots: tuple[float, ...]
    inputs: tuple[InputMoments | None, ...]

    @property
    def max_rank(self) -> int:
        return self.spectrum.max_rank

    def tail(self, rank: int) -> float:
        return self.spectrum.tail(rank)

    def tails(self) -> Tensor:
        return self.spectrum.tails()

    def losses(self, points: int) -> list[float]:
        return self.spectrum.losses(points)

    def cut(self, rank: int) -> Factors:
        """The factors of the stack of the experts' own weights.

        Raises: as the spectrum's `cut`, and `refit_left`.
        Cost: a regression on `rank` numbers for each expert.
        """
        stacked = self.spectrum.cut(rank)
        sizes = [len(weight) for weight in self.weights]
        biases = [None] * len(sizes) if stacked.bias is None else stacked.bias.split(sizes)
        fit = []
        parts = zip(self.weights, stacked.left.split(sizes), biases, self.roots, self.inputs, strict=True)
        for weight, left, bias, root, inputs in parts:
            own = Factors(left / root, stacked.right, None if bias is None else bias / root)
            knows = inputs is not None and inputs.keeps("covariance") is not None
            fit.append(refit_left(weight, own, Moments(inputs)) if knows else own)
        bias = None if stacked.bias is None else torch.cat([each.bias for each in fit if each.bias is not None])
        return Factors(torch.cat([each.left for each in fit]), fit[0].right, bias)


def weigh_rows(weight: Tensor, rows: Sequence[int], roots: Sequence[float]) -> Tensor:
    """The stack of linears of so many `rows`, each times its root."""
    return torch.cat([part * root for part, root in zip(weight.split(list(rows)), roots, strict=True)])
