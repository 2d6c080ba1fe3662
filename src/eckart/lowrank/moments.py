"""Moments: what calibration remembers of a layer's inputs and of the loss gradient at its outputs.

All statistics are running sums, so that streams can be cut anywhere, merged with `+`, and normalised last. They are in
float64, but for gradient covariances, which are in float32: those are shrunk by a hundredth or more before they are
used, and there is one for each linear.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from eckart.lowrank.float32 import add_gram, exact_products, inner_product, is_multiplied_exactly, mirror

# Rows multiplied in float32 before the product is added in float64. Long enough for full-speed matrix products,
# short enough that float32 rounding inside one product stays near 1e-7 of it.
CHUNK_ROWS = 4096
# Rows of a square sum that are normalised at a time: no second copy of it in float64 is made on the way, and these rows
# stay in a cache.
NORMALISED_ROWS = 64
# Rows whose sizes are summed at a time: a copy of them fits a cache, one of all would be fetched from the system anew.
SIZED_ROWS = 512
# Square sums that are symmetric; of these only the upper block triangle is added to, and mirrored when they are read.
SYMMETRIC = ("second_moment", "reference_second_moment", "gradient_covariance")

# What a method may ask for. The first group is of a layer's input and is shared by every layer that reads the same
# tensor; the second is of one layer and needs backward passes.
INPUT_STATISTICS = frozenset({"mean", "abs_mean", "second_moment", "cross_moment"})
FISHER = frozenset({"fisher_in", "fisher_out"})
GRADIENT_STATISTICS = FISHER | {"gradient_covariance"}


class InputMoments:
    """Streamed statistics of the tensor that one input group of layers reads (q, k and v share one).

        mean mu = E[x],  abs_mean a = E[|x|],  second_moment G = E[x x^T],  covariance C = G - mu mu^T,
        cross_moment X = E[x xh^T]   (x in the dense model, xh the same input in the compressed one)

    With a reference stream (`update(xh, reference=x)`), mean / second_moment are of xh, `reference_mean` of x.

    Args:
        d_in: width of the input.
        needs: names out of INPUT_STATISTICS; the mean and the absolute mean cost nothing and are always kept.
        device: where the inputs will be.
        reference: moments of the reference stream on the tokens that will be seen, where they are known already: they
            are not summed again then.
        dtype: of the square sums.

    Memory: d_in^2 numbers for each of second_moment and cross_moment that is needed.
    """

    def __init__(
        self,
        d_in: int,
        needs: frozenset[str] | set[str] = frozenset({"second_moment"}),
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float64,
        reference: InputMoments | None = None,
    ) -> None:
        unknown = set(needs) - INPUT_STATISTICS
        if unknown:
            raise ValueError(f"not statistics of an input: {sorted(unknown)}; known: {sorted(INPUT_STATISTICS)}")
        self.count = 0
        self.reference = reference
        shapes: dict[str, tuple[int, ...]] = {"mean": (d_in,), "abs_mean": (d_in,)}
        self._mirrored = True
        if "second_moment" in needs or "cross_moment" in needs:
            shapes["second_moment"] = (d_in, d_in)
        if "cross_moment" in needs:
            shapes |= {"cross_moment": (d_in, d_in)}
            if reference is None:
                shapes |= {"reference_mean": (d_in,), "reference_second_moment": (d_in, d_in)}
        self._sums: dict[str, Tensor] = {
            name: torch.zeros(shape, dtype=dtype if len(shape) == 2 else torch.float64, device=device)
            for name, shape in shapes.items()
        }

    @property
    def d_in(self) -> int:
        return self._sums["mean"].shape[0]

    @property
    def are_zero(self) -> bool:
        """Whether the input was zero on every token."""
        return self.count > 0 and not bool(self._sums["abs_mean"].any())

    @property
    def sums(self) -> dict[str, Tensor]:
        """The running sums by name, whole. A square one is written in its upper half only until it is asked for."""
        if not self._mirrored:
            for name in SYMMETRIC:
                if name in self._sums:
                    mirror(self._sums[name])
            self._mirrored = True
        return self._sums

    def update(
        self,
        x: Float[Tensor, "*batch in"],
        mask: Bool[Tensor, "*batch"] | None = None,
        *,
        reference: Float[Tensor, "*batch in"] | None = None,
    ) -> None:
        """Add a batch, in place. Rows where `mask` is False (padding) are left out.

        Args:
            x: (..., d_in); any float type, products are taken in float32 (float64 for float64 input).
            mask: (...), True for real tokens.
            reference: (..., d_in), the same input in the dense model; required when cross_moment is kept.

        Raises:
            ValueError: shapes disagree, an entry is not finite, a reference is missing or needs cross_moment.

        Cost: n d_in (d_in + 512) operations for each symmetric statistic, 2 n d_in^2 for the cross moment.
        """
        if x.shape[-1] != self.d_in:
            raise ValueError(f"input has width {x.shape[-1]}, expected {self.d_in}")
        if (reference is not None) != ("cross_moment" in self._sums):
            raise ValueError("a reference stream is for the statistic cross_moment, and only for it")
        if reference is not None and reference.shape != x.shape:
            raise ValueError(f"reference {tuple(reference.shape)} does not fit input {tuple(x.shape)}")
        rows = _rows(x, mask)
        reference_rows = None if reference is None else _rows(reference, mask)
        for start in range(0, len(rows), CHUNK_ROWS):
            stored = rows[start : start + CHUNK_ROWS]
            part = _widened(stored)
            factors = stored if is_multiplied_exactly(stored) else part
            self._on(part.device, "mean").add_(part.sum(0))
            for some in part.split(SIZED_ROWS if part.device.type == "cpu" else CHUNK_ROWS):
                self._on(part.device, "abs_mean").add_(some.abs().sum(0))
            with exact_products(x):
                if "second_moment" in self._sums:
                    self._add_square("second_moment", factors)
                if reference_rows is not None:
                    stored = reference_rows[start : start + CHUNK_ROWS]
                    part = _widened(stored)
                    dense = stored if is_multiplied_exactly(stored) else part
                    self._on(part.device, "cross_moment").add_(inner_product(dense, factors))
                    if self.reference is None:
                        self._add_square("reference_second_moment", dense)
                        self._on(part.device, "reference_mean").add_(part.sum(0))
        self.count += len(rows)
        # Looked at once per batch: a NaN or an infinity anywhere in the rows survives the sums.
        for name in ("abs_mean", "reference_mean"):
            if name in self._sums and not torch.isfinite(self._sums[name]).all():
                raise ValueError("an input is not finite; the model is broken or overflows in its stored type")

    def _on(self, device: torch.device, name: str) -> Tensor:
        """A sum, moved to where the inputs are."""
        if self._sums[name].device != device:
            self._sums[name] = self._sums[name].to(device)
        return self._sums[name]

    def _add_square(self, name: str, part: Tensor) -> None:
        """Add part^T part to the upper block triangle of a square sum."""
        add_gram(self._on(part.device, name), part)
        self._mirrored = False

    def __add__(self, other: InputMoments) -> InputMoments:
        """The moments of both streams together."""
        if self.d_in != other.d_in or self.sums.keys() != other.sums.keys():
            raise ValueError("only moments of the same width and the same statistics can be merged")
        return InputMoments.from_state(
            self.count + other.count,
            {name: self.sums[name].double() + other.sums[name].double() for name in self.sums},
        )

    @classmethod
    def from_state(cls, count: int, sums: dict[str, Tensor]) -> InputMoments:
        """The moments with this `count` and these `sums`, as read from a file."""
        moments = cls(sums["mean"].shape[0], frozenset())
        moments.count, moments._sums = count, dict(sums)
        return moments

    def compact(self) -> InputMoments:
        """The same moments with the square sums rounded to float32: half the memory and disk, 6e-8 relative.

        Raises:
            ValueError: the reference stream's moments that were given are of another number of tokens.
        """
        sums = self.sums
        if self.reference is not None:
            if self.reference.count != self.count:
                raise ValueError(f"{self.count} tokens were seen, and the reference's are of {self.reference.count}")
            known = self.reference.sums
            sums = {**sums, "reference_mean": known["mean"], "reference_second_moment": known["second_moment"]}
        return InputMoments.from_state(
            self.count, {name: s.float() if s.ndim == 2 else s.clone() for name, s in sums.items()}
        )

    def keeps(self, name: str) -> torch.dtype | None:
        """The type in which a statistic is kept, or None where it is not."""
        return self._sums[name].dtype if name in self._sums else None

    def _sum_of(self, name: str) -> Tensor:
        if name not in self._sums:
            raise ValueError(f"{name} was not collected; calibrate with a method that needs it")
        if self.count == 0:
            raise ValueError("no token was seen: the calibration text is empty or masked out")
        return self.sums[name]

    def _mean_of(self, name: str) -> Tensor:
        return self._sum_of(name).double() / self.count

    def moment(self, *, centred: bool = False, dtype: torch.dtype = torch.float64) -> Float[Tensor, "in in"]:
        """G, or C = G - mu mu^T where centred: computed in float64, returned in `dtype`, without a copy in between."""
        matrix = torch.empty(self.d_in, self.d_in, dtype=dtype, device=self._sum_of("second_moment").device)
        for place, rows in self._moment_rows(centred):
            matrix[place] = rows
        return matrix

    def apply_moment(self, vectors: Float[Tensor, "in n"], *, centred: bool = False) -> Float[Tensor, "in n"]:
        """G or C times some vectors, in float64, without the matrix in float64."""
        return torch.cat([rows @ vectors.double() for _, rows in self._moment_rows(centred)])

    def variances(self, *, centred: bool = False) -> Float[Tensor, "in"]:
        """The diagonal of G or C."""
        squares = self._sum_of("second_moment").diagonal().double() / self.count
        return squares - self.mean.square() if centred else squares

    def _moment_rows(self, centred: bool) -> Iterator[tuple[slice, Tensor]]:
        """Some rows of G or C at a time, in float64, and which."""
        total = self._sum_of("second_moment")
        mean = self.mean if centred else None
        for start in range(0, self.d_in, NORMALISED_ROWS):
            place = slice(start, start + NORMALISED_ROWS)
            rows = total[place].to(torch.float64, copy=True).div_(self.count)
            if mean is not None:
                rows.addr_(mean[place], mean, alpha=-1)
            yield place, rows

    @property
    def mean(self) -> Float[Tensor, "in"]:
        return self._mean_of("mean")

    @property
    def abs_mean(self) -> Float[Tensor, "in"]:
        return self._mean_of("abs_mean")

    @property
    def second_moment(self) -> Float[Tensor, "in in"]:
        """G = E[x x^T], uncentred."""
        return self.moment()

    @property
    def covariance(self) -> Float[Tensor, "in in"]:
        """C = G - mu mu^T."""
        return self.moment(centred=True)

    @property
    def cross_moment(self) -> Float[Tensor, "in in"]:
        """X = E[x xh^T], dense input by compressed input."""
        return self._mean_of("cross_moment")

    @property
    def cross_covariance(self) -> Float[Tensor, "in in"]:
        return self.cross_moment - torch.outer(self.reference_mean, self.mean)

    @property
    def reference_mean(self) -> Float[Tensor, "in"]:
        """E[x] of the dense model's input; the mean itself where no reference was streamed."""
        return self._mean_of("reference_mean") if "reference_mean" in self.sums else self.mean

    @property
    def reference_second_moment(self) -> Float[Tensor, "in in"]:
        return self._mean_of("reference_second_moment")


class GradientMoments:
    """Streamed statistics of the loss gradient at one layer.

        gradient_covariance H = E[g g^T]        (d_out, d_out), g = dLoss/dy per token
        fisher F = E[(dLoss/dW)^2]              (d_out, d_in), kept as its row and column sums:
        fisher_in (d_in,) sums F over outputs,  fisher_out (d_out,) sums F over inputs

    One `update_fisher` per example: the square is of one example's gradient, so batching examples would change F.

    Args:
        needs: names out of GRADIENT_STATISTICS; the two Fisher sums are kept together.
        device: where the sums are; default main memory.

    Memory: d_out^2 float32 for gradient_covariance; float64 where the gradients are.
    """

    def __init__(
        self,
        d_out: int,
        d_in: int,
        needs: frozenset[str] | set[str] = GRADIENT_STATISTICS,
        *,
        device: torch.device | None = None,
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

    @property
    def keeps_fisher(self) -> bool:
        """Whether the Fisher sums are kept."""
        return "fisher_out" in self._sums

    @property
    def keeps_covariance(self) -> bool:
        """Whether the gradient covariance is kept."""
        return "gradient_covariance" in self._sums

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
        rows = _rows(gradients, mask)
        if not is_multiplied_exactly(rows):
            rows = _widened(rows)
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

    def __add__(self, other: GradientMoments) -> GradientMoments:
        shapes = [{name: s.shape for name, s in moments.sums.items()} for moments in (self, other)]
        if shapes[0] != shapes[1]:
            raise ValueError("only moments of the same shape and the same statistics can be merged")
        merged = {name: self.sums[name] + other.sums[name] for name in self.sums}
        return GradientMoments.from_state(self.examples + other.examples, self.tokens + other.tokens, merged)

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
        return self._mean_of("gradient_covariance", self.tokens)

    def _mean_of(self, name: str, count: int) -> Tensor:
        """In float64."""
        if name not in self._sums or count == 0:
            raise ValueError(f"{name} was not collected; calibrate with a method that needs it")
        return self.sums[name].double() / count


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


def _rows(x: Tensor, mask: Tensor | None) -> Tensor:
    """(..., d) -> (n, d) without the masked rows."""
    rows = x.detach().reshape(-1, x.shape[-1])
    if mask is not None:
        if mask.numel() != len(rows):
            raise ValueError(f"mask {tuple(mask.shape)} does not fit input {tuple(x.shape)}")
        if not bool(mask.all()):
            rows = rows[mask.reshape(-1).to(rows.device)]
    return rows


def _widened(rows: Tensor) -> Tensor:
    """The rows in float32, or in float64 as they are."""
    return rows if rows.dtype == torch.float64 else rows.float()
