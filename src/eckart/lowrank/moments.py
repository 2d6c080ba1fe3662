"""Moments: what calibration remembers of one layer, of its inputs and of the loss gradient at its outputs.

Statistics of gradients are running sums as those of inputs are (input_moments.py): in float64, but for gradient
covariances, which are in float32: those are shrunk by a hundredth or more before they are used, and there is one for
each linear.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from eckart.lowrank.deviations import CHUNK_ROWS, rows_of, widened
from eckart.lowrank.float32 import (
    add_gram,
    exact_products,
    is_multiplied_exactly,
    mirror,
)
from eckart.lowrank.input_moments import NORMALISED_ROWS, InputMoments

# What a method may ask for, of one layer's gradients; it needs backward passes.
FISHER = frozenset({"fisher_in", "fisher_out"})
OF_GRADIENTS = FISHER | {"gradient_covariance"}
# What each token of the calibration text weighs at the linear.
TOKEN_WEIGHTS = "token_weights"
GRADIENT_STATISTICS = OF_GRADIENTS | {TOKEN_WEIGHTS}
FISHER_PRIOR = 0.01


class GradientMoments:
    """Streamed statistics of the loss gradient at one layer.

        gradient_covariance H = E[g g^T]        (d_out, d_out), g = dLoss/dy per token
        fisher F = E[(dLoss/dW)^2]              (d_out, d_in), kept as its row and column sums:
        fisher_in (d_in,) sums F over outputs,  fisher_out (d_out,) sums F over inputs
        token_weights |g_t|^2                   (places,), of every place of the text; zero where there is no token

    One `update_fisher` per example: the square is of one example's gradient, so batching examples would change F.

    Args:
        needs: names out of GRADIENT_STATISTICS; the two Fisher sums are kept together.
        device: where the sums are; default main memory.
        places: of the text, samples times their length, for token_weights.

    Memory: d_out^2 float32 for gradient_covariance, float64 where the gradients are; a float32 a place.
    """

    def __init__(
        self,
        d_out: int,
        d_in: int,
        needs: frozenset[str] | set[str] = OF_GRADIENTS,
        *,
        device: torch.device | None = None,
        places: int = 0,
    ) -> None:
        unknown = set(needs) - GRADIENT_STATISTICS
        if unknown:
            raise ValueError(f"not statistics of a gradient: {sorted(unknown)}; known: {sorted(GRADIENT_STATISTICS)}")
        self.examples = 0
        self.tokens = 0
        self._mirrored = True
        self._sums: dict[str, Tensor] = {}
        if FISHER & needs:
            self._sums["fisher_in"] = torch.zeros(d_in, dtype=torch.float64, device=device)
            self._sums["fisher_out"] = torch.zeros(d_out, dtype=torch.float64, device=device)
        if "gradient_covariance" in needs:
            self._sums["gradient_covariance"] = torch.zeros(d_out, d_out, device=device)
        if TOKEN_WEIGHTS in needs:
            self._sums[TOKEN_WEIGHTS] = torch.zeros(places, device=device)

    def __repr__(self) -> str:
        names = ", ".join(self._sums) or "nothing kept"
        return f"GradientMoments({names}; {self.examples:,} examples, {self.tokens:,} tokens)"

    @property
    def keeps_fisher(self) -> bool:
        """Whether the Fisher sums are kept."""
        return "fisher_out" in self._sums

    @property
    def keeps_covariance(self) -> bool:
        """Whether the gradient covariance is kept."""
        return "gradient_covariance" in self._sums

    @property
    def token_weights(self) -> Float[Tensor, "places"] | None:
        """|g|^2 at every place of the text; None where it is not kept."""
        return self._sums.get(TOKEN_WEIGHTS)

    @property
    def sums(self) -> dict[str, Tensor]:
        """The running sums by name, whole. The covariance is written in its upper half only until it is asked for."""
        if not self._mirrored:
            mirror(self._sums["gradient_covariance"])
            self._mirrored = True
        return self._sums

    def update_fisher(self, gradient: Float[Tensor, "out in"]) -> None:
        """Add one example's dLoss/dW, in place.

        Raises:
            ValueError: an entry is not finite, or the Fisher sums are not kept.
        """
        if not self.keeps_fisher:
            raise ValueError("gradients of a weight are for the statistics fisher_in and fisher_out, and only for them")
        square = gradient.detach().float().square()
        for axis, name in enumerate(("fisher_in", "fisher_out")):
            self._sums[name] += square.sum(axis, dtype=torch.float64).to(self._sums[name].device)
        self.examples += 1
        if not torch.isfinite(self._sums["fisher_out"]).all():
            raise ValueError("a gradient is not finite; the model is broken or overflows in its stored type")

    def update_covariance(self, gradients: Float[Tensor, "*batch out"], mask: Bool[Tensor, "*batch"] | None) -> None:
        """Add per-token dLoss/dy, in place. Rows where `mask` is False are left out.

        Raises:
            ValueError: an entry is not finite, or gradient_covariance is not kept.

        Cost: n d_out (d_out + 512) operations.
        """
        if not self.keeps_covariance:
            raise ValueError("per-token gradients are for the statistic gradient_covariance, and only for it")
        rows = rows_of(gradients, mask)
        if not is_multiplied_exactly(rows):
            rows = widened(rows)
        if rows.dtype == torch.float64:
            self._sums["gradient_covariance"] = self._sums["gradient_covariance"].double()
        total = self._sums["gradient_covariance"]
        with exact_products(gradients):
            for part in rows.split(CHUNK_ROWS):
                add_gram(total, part)
        self._mirrored = False
        self.tokens += len(rows)
        if not torch.isfinite(total.diagonal()).all():
            raise ValueError("a gradient is not finite; the model is broken or overflows in its stored type")

    def update_weights(self, gradients: Float[Tensor, "*batch out"], places: Int[Tensor, "n"]) -> None:
        """Add what some tokens weigh, in place: the square of the gradient at each.

        Args:
            gradients: per-token dLoss/dy, of n tokens. places: of each in the text.

        Raises:
            ValueError: token_weights is not kept, or there is not one gradient for each place.
        """
        total, rows = self.token_weights, rows_of(gradients, None)
        if total is None:
            raise ValueError("what tokens weigh is the statistic token_weights, which is not kept")
        if len(rows) != len(places):
            raise ValueError(f"{len(rows)} gradients are not one for each of {len(places)} tokens")
        total[places.to(total.device)] += rows.float().square().sum(1).to(total.device)

    def __add__(self, other: GradientMoments) -> GradientMoments:
        shapes = [{name: s.shape for name, s in moments.sums.items()} for moments in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError("only moments of the same shape and the same statistics can be merged")
        merged = {name: self.sums[name] + other.sums[name] for name in self.sums}
        return GradientMoments.from_state(self.examples + other.examples, self.tokens + other.tokens, merged)

    @property
    def device(self) -> torch.device:
        """Where the sums are."""
        return next(iter(self._sums.values())).device

    @property
    def d_out(self) -> int:
        """The number of outputs."""
        return next(len(self._sums[name]) for name in ("fisher_out", "gradient_covariance") if name in self._sums)

    def shrunk(self, mean: GradientMoments, rows: float) -> GradientMoments:
        """These moments with so many more tokens, distributed as those of `mean` are.

        Fisher sums, of which one is of as many examples as any other, get FISHER_PRIOR of the average one.

        Args:
            mean: the sum of these moments and others of the same kind.
        """
        merged = {}
        for name, total in self.sums.items():
            if name == TOKEN_WEIGHTS:
                continue
            covariance = name == "gradient_covariance"
            factor = rows / max(mean.tokens, 1) if covariance else FISHER_PRIOR * self.examples / max(mean.examples, 1)
            merged[name] = total + mean.sums[name].to(total) * factor
        return GradientMoments.from_state(self.examples, self.tokens + round(rows), merged)

    @classmethod
    def from_state(cls, examples: int, tokens: int, sums: dict[str, Tensor]) -> GradientMoments:
        """The moments with these counts and `sums`, as read from a file."""
        moments = cls(0, 0, frozenset())
        moments.examples, moments.tokens, moments._sums = examples, tokens, dict(sums)
        return moments

    @property
    def are_zero(self) -> bool:
        """Whether the gradient was zero on every token: nothing that the linear gives moves the loss."""
        if self.tokens and self.keeps_covariance:
            return not bool(self._sums["gradient_covariance"].diagonal().any())
        return self.examples > 0 and not bool(self._sums["fisher_out"].any())

    @property
    def members(self) -> tuple[GradientMoments, ...]:
        """The moments of each linear that these describe: only these."""
        return (self,)

    @property
    def fisher_in(self) -> Float[Tensor, "in"]:
        return self._mean_of("fisher_in", self.examples)

    @property
    def fisher_out(self) -> Float[Tensor, "out"]:
        return self._mean_of("fisher_out", self.examples)

    @property
    def gradient_covariance(self) -> Float[Tensor, "out out"]:
        return self.covariance()

    def covariance(self, dtype: torch.dtype = torch.float64) -> Float[Tensor, "out out"]:
        """H = E[g g^T]: computed in float64, returned in `dtype`, without a copy in between."""
        self._require("gradient_covariance", self.tokens)
        total = self.sums["gradient_covariance"]
        matrix = torch.empty_like(total, dtype=dtype)
        for start in range(0, len(total), NORMALISED_ROWS):
            place = slice(start, start + NORMALISED_ROWS)
            matrix[place] = total[place].to(torch.float64, copy=True).div_(self.tokens)
        return matrix

    def _mean_of(self, name: str, count: int) -> Tensor:
        """In float64."""
        self._require(name, count)
        return self.sums[name].double() / count

    def _require(self, name: str, count: int) -> None:
        """Raises ValueError where a sum is not kept, or nothing was added to it."""
        if name not in self._sums or count == 0:
            raise ValueError(f"{name} was not collected; calibrate with a method that needs it")


@dataclass(frozen=True)
class JointGradients:
    """The gradient statistics of linears that read one input, stacked into one linear [W1; W2; ...]."""

    members: tuple[GradientMoments, ...]

    @property
    def fisher_in(self) -> Float[Tensor, "in"]:
        return torch.stack([member.fisher_in for member in self.members]).sum(0)

    @property
    def fisher_out(self) -> Float[Tensor, "out"]:
        return torch.cat([member.fisher_out for member in self.members])


@dataclass(frozen=True)
class Moments:
    """All that a method may know of one layer: its inputs, and the loss gradient at it. Either may be absent."""

    inputs: InputMoments | None = None
    gradients: GradientMoments | JointGradients | None = None

    def require_inputs(self) -> InputMoments:
        if self.inputs is None:
            raise ValueError("this method needs statistics of the inputs; calibrate first")
        return self.inputs

    def require_gradients(self) -> GradientMoments | JointGradients:
        if self.gradients is None:
            raise ValueError("this method needs statistics of the gradient; calibrate first")
        return self.gradients
