"""Method: a metric, a cut and a sum, as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.lowrank.anchor import Anchor
from eckart.lowrank.bands import bands, wide_product
from eckart.lowrank.factors import Factors
from eckart.lowrank.metrics import BlockDiagonal, Metric, Root, Whitening
from eckart.lowrank.moments import GRADIENT_STATISTICS, Moments
from eckart.lowrank.pivoting import Pivoted
from eckart.lowrank.rounding import CodedFactors
from eckart.lowrank.truncation import Problem, Spectrum, check_rank, factor, interpolate, weigh

InputRoot = Callable[[Moments], Tensor | Whitening]
OutputMetric = Callable[[Moments], Tensor | BlockDiagonal]


@runtime_checkable
class Factored(Protocol):
    """A layer factored by a method: cut it at any rank, read off the loss of each cut."""

    @property
    def max_rank(self) -> int: ...

    def cut(self, rank: int) -> Factors: ...

    def tail(self, rank: int) -> float: ...

    def tails(self) -> Tensor: ...

    def losses(self, points: int) -> list[float]: ...


@dataclass(frozen=True)
class Stage:
    """One term of the sum.

    Attributes:
        root: moments -> input root B: (d_in, d_in), a diagonal (d_in,) or a `Whitening`; None is the identity.
        metric: moments -> output metric A, (d_out, d_out) or a diagonal (d_out,); None is the identity.
        interpolative: cut by column interpolation instead of by truncation.
    """

    root: InputRoot | None = None
    metric: OutputMetric | None = None
    interpolative: bool = False


@dataclass(frozen=True)
class Prepared:
    """What a method needs of a layer's inputs.

    Attributes:
        root: the first stage's B. anchor: of an anchored method, else None.
        is_shared: whether it is that of every layer which reads the same input.
    """

    root: Root
    anchor: Anchor | None
    is_shared: bool


@dataclass(frozen=True)
class Method:
    """A published way to factor a layer.

    Attributes:
        name: the paper's name.
        paper, equation: its source.
        assumes, fails: what must hold, and what happens when it does not.
        needs: statistics of INPUT_STATISTICS and GRADIENT_STATISTICS that must be collected.
        stage: the first (or only) term.
        residual: the second term, cut from the residual of the first, or None.
        share: part of the rank that the first term gets when there is a second: k1 = round(share k).
        centred: fit a bias, the mean of what is dropped; the root is mostly of the covariance then, as the bias takes
            the mean's part of the loss.
        exact: the root is that of the inputs' own moment, so that the tail is the squared output error per token.
        shrinkage: how far the first stage shrinks the input moment that its root is of.
        anchor: shrinkage of the anchored target T = W X Gh^-1, or None for T = W.
        options: the settings that made this entry, for the recipe.
    """

    name: str
    paper: str
    equation: str
    assumes: str
    fails: str
    stage: Stage
    needs: frozenset[str] = frozenset()
    residual: Stage | None = None
    share: float = 1.0
    centred: bool = False
    exact: bool = False
    shrinkage: float = 0.0
    anchor: float | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"{self.name}: the first stage's share {self.share} is outside (0, 1]")

    @property
    def needs_gradients(self) -> bool:
        return bool(self.needs & GRADIENT_STATISTICS)

    @property
    def identity(self) -> dict[str, Any]:
        """The name and the settings, as journals tell methods apart; sfsd's `centred` only where it is not as always.

        Journals that were written before sfsd had that setting are those of the same method.
        """
        options = {name: value for name, value in self.options.items() if (name, value) != ("centred", True)}
        return {"name": self.name, "options": options}

    def anchored(self, share: float) -> Method:
        """The same method with the dense model's outputs as target of the compressed model's inputs: T = W X Gh^-1."""
        return replace(self, anchor=share, needs=self.needs | {"cross_moment", "second_moment"}, exact=False)

    def root(self, moments: Moments) -> Root:
        """The first stage's input root."""
        return None if self.stage.root is None else self.stage.root(moments)

    def prepare(self, moments: Moments) -> Prepared:
        """What `factor` and `tails` need of the inputs: make it once for the layers for which it `is_shared`."""
        root = self.root(moments)
        anchor = None if self.anchor is None else Anchor(moments.require_inputs(), self.anchor, centred=self.centred)
        # A root of a layer's own gradients is no other layer's.
        return Prepared(root, anchor, is_shared=isinstance(root, Whitening) or not self.needs_gradients)

    def factor(
        self,
        weight: Float[Tensor, "out in"],
        moments: Moments | None = None,
        *,
        prepared: Prepared | None = None,
        rank: int | None = None,
        base: Float[Tensor, "out in"] | None = None,
    ) -> Factored:
        """Factor one layer for every rank at once.

        Args:
            weight: (d_out, d_in); taken to float64.
            moments: what `needs` asks for; None for a method that needs nothing.
            prepared: where the caller has it already.
            rank: the only one that will be cut, where that is known; see `truncation.Problem.factor`.
            base: (d_out, d_in) Q, a quantised weight that the cuts are to correct: they are of W - Q (anchored T - Q),
                and their loss is that of Q + M.

        Raises:
            ValueError: a statistic is missing, shapes disagree, an entry is not finite.
            DecompositionError: a decomposition failed.
        """
        moments = moments or Moments()
        problem = self._problem(weight, moments, prepared, base)
        first = problem.factor(rank if rank is None or self.residual is None else first_rank(rank, self.share))
        if self.residual is None:
            return first
        second_root = None if self.residual.root is None else self.residual.root(moments)
        second_metric = None if self.residual.metric is None else self.residual.metric(moments)
        return NestedSpectrum(first, problem.root, self.residual, second_root, second_metric, self.share)

    def tails(
        self,
        weight: Float[Tensor, "out in"],
        moments: Moments | None = None,
        *,
        prepared: Prepared | None = None,
        base: Float[Tensor, "out in"] | None = None,
    ) -> Float[Tensor, "points"]:
        """The loss of every rank from 0 to full, as `factor(...).tails()`, at a third of the cost.

        Args, raises: as `factor`.
        """
        tails = self._problem(weight, moments or Moments(), prepared, base).tails()
        return tails if self.residual is None else tails[_first_ranks(len(tails), self.share)]

    def _problem(
        self, weight: Float[Tensor, "out in"], moments: Moments, prepared: Prepared | None, base: Tensor | None
    ) -> Problem:
        if moments.inputs is not None and moments.inputs.d_in != weight.shape[-1]:
            raise ValueError(f"the inputs have width {moments.inputs.d_in}, expected {weight.shape[-1]}")
        prepared = prepared or self.prepare(moments)
        metric = None if self.stage.metric is None else self.stage.metric(moments)
        output_mean, input_mean = None, None
        if self.centred:
            inputs = moments.require_inputs()
            output_mean, input_mean = weight.double() @ inputs.reference_mean, inputs.mean
            if base is not None:
                output_mean -= base.double() @ input_mean
        return Problem(weight, prepared.root, metric, prepared.anchor, output_mean, input_mean, base=base)


@dataclass(frozen=True)
class NestedSpectrum:
    """A cut, and a second cut of its residual: `first.cut(k1) + second(residual, k2)`, stored as one pair (NSVD Eq. 5).

    Every rank splits as k1 = round(share k), k2 = k - k1. The second stage depends on k1, so each `cut` decomposes
    its residual; `tail` is the measured loss in the first stage's metric, and a bias is that of the sum.

    Attributes:
        first, root: the first stage's spectrum and its B.
        second, second_root, second_metric: the second stage, with its B and A.
        share: of the rank, to the first stage.
    """

    first: Spectrum
    root: Root
    second: Stage
    second_root: Root
    second_metric: Metric
    share: float

    @property
    def max_rank(self) -> int:
        return self.first.max_rank

    def tails(self) -> Tensor:
        """The first stage's loss at k1 of every rank, (max_rank + 1,): what the second stage gains is not in it."""
        tails = self.first.tails()
        return tails[_first_ranks(len(tails), self.share)]

    def losses(self, points: int) -> list[float]:
        """The first stage's curve; the second stage has another one for every rank."""
        return self.first.losses(points)

    def cut(self, rank: int) -> Factors:
        check_rank(rank, self.max_rank)
        k1 = first_rank(rank, self.share)
        factors = self.first.cut(k1)
        if k1 == rank:
            return factors
        residual = self.first.target - factors.dense()
        if self.second.interpolative:
            second = interpolate(residual, rank - k1)
        else:
            spectrum = factor(residual, root=self.second_root, metric=self.second_metric, rank=rank - k1)
            second = spectrum.cut(rank - k1)
        return self.first.with_bias(factors + second)

    def tail(self, rank: int) -> float:
        if rank == 0:
            return self.first.tail(0)
        lost = self.first.target - self.cut(rank).dense()
        return self.first.floor + float(weigh(lost, self.root, self.first.metric).square().sum())


def first_rank(rank: int, share: float) -> int:
    """k1 = round(share rank), at least 1: what the first stage of a nested method gets."""
    return max(1, round(share * rank))


def _first_ranks(count: int, share: float) -> Tensor:
    """The first stage's rank at each of the ranks 0 ... count - 1."""
    ranks = torch.arange(count)
    # round() of Python and torch both take halves to the even number.
    return (share * ranks.double()).round().long().clamp(min=1).minimum(ranks)


def output_error(
    weight: Float[Tensor, "out in"],
    factors: Factors | Pivoted | CodedFactors,
    moments: Moments,
    *,
    energy: float | None = None,
    anchor: Anchor | None = None,
    base: Float[Tensor, "out in"] | None = None,
) -> tuple[float, float]:
    """(E||W x - M xh - d||^2, E||W x||^2) per token, from the second moments: what a replacement costs at the output.

    xh is x itself where the moments are of one stream. For a method whose root is that of the second moment (or,
    centred, of the covariance) the first then equals its tail. The factors are taken as they are: of rounded ones it is
    the error of what is stored.

    Args:
        energy: E||W x||^2, where the caller has it.
        anchor: of these moments, where there are two streams and the caller has it; else it is made, in float64.
        base: (d_out, d_in) Q, which the factors correct: M is Q plus their product then.

    Cost: in float64, 2 rank d_out d_in operations for M and d_out d_in (d_in + 256) for the error. The same for the
    energy, and of two streams 3 d_out d_in^2 more, both in float32 where an anchor is given that knows no more.
    Memory: a few bands of M, see `bands`.
    """
    inputs = moments.require_inputs()
    if inputs.keeps("cross_covariance") is None:
        anchor, single = None, False
    else:
        single = anchor is not None and anchor.is_single and weight.dtype != torch.float64
        anchor = anchor or Anchor(inputs, 0.0, centred=True)
    read_mean, given_mean = inputs.reference_mean, inputs.mean
    error, total = 0.0, 0.0
    for place in bands(*weight.shape):
        kept = factors.rows(place)
        if base is not None:
            kept += base[place]
        read, given = wide_product(weight[place], read_mean[:, None])[:, 0], kept @ given_mean
        shift = read - given if factors.bias is None else read - given - factors.bias[place].double()
        error += float(shift.square().sum())
        rows = weight[place].float() if single else weight[place].double()
        if anchor is None:
            total += inputs.energy(rows) if energy is None else 0.0
            error += inputs.spread(kept.sub_(rows))
            continue
        total += anchor.energy(rows)
        error += anchor.error(rows, kept)
        if not anchor.centred:
            # What is not about the means has the error at the mean already, but as it is without a bias.
            error -= float((read - given).square().sum())
    return max(error, 0.0), total if energy is None or anchor is not None else energy
