"""What the laws are measured against: layers made of random tokens, and answers of numpy's float64 SVD.

Nothing here goes through the code under test, but for `Layer.moments`, which streams the tokens into it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank import Factors, GradientMoments, InputMoments, Moments
from eckart.lowrank.input_moments import INPUT_STATISTICS
from eckart.lowrank.metrics import Whitening
from eckart.lowrank.moments import GRADIENT_STATISTICS

# "few": fewer tokens than channels; "dead": channels that never fire; "zero": no input at all.
# All but "rich" have singular moments.
KINDS = ("rich", "few", "dead", "zero")


def laws(examples: int) -> settings:
    """Settings of a property test: the same examples in every run, however slow the machine."""
    return settings(max_examples=examples, deadline=None, derandomize=True, database=None)


@dataclass(frozen=True)
class Layer:
    """One linear layer with everything that calibration could see of it, kept token by token.

    Attributes:
        weight: (d_out, d_in).
        x: (n, d_in) inputs in the dense model, xh: (n, d_in) the same inputs in a compressed one.
        dy: (n, d_out) loss gradient per token, dw: (examples, d_out, d_in) loss gradient per example.
    """

    weight: Tensor
    x: Tensor
    xh: Tensor
    dy: Tensor
    dw: Tensor

    @property
    def ranks(self) -> range:
        return range(1, min(self.weight.shape) + 1)

    def read(self, needs: frozenset[str]) -> Tensor:
        """What the factors will read: the compressed model's input where a method anchors to it."""
        return self.xh if "cross_moment" in needs else self.x

    def moments(self, needs: frozenset[str]) -> Moments:
        """The statistics `needs` and nothing beyond them."""
        d_out, d_in = self.weight.shape
        inputs = InputMoments(d_in, needs & INPUT_STATISTICS)
        inputs.update(self.read(needs), reference=self.x if "cross_moment" in needs else None)
        gradients = None
        if needs & GRADIENT_STATISTICS:
            gradients = GradientMoments(d_out, d_in, needs & GRADIENT_STATISTICS)
            if gradients.keeps_fisher:
                for gradient in self.dw:
                    gradients.update_fisher(gradient)
            if "gradient_covariance" in needs:
                gradients.update_covariance(self.dy, None)
        return Moments(inputs if needs & INPUT_STATISTICS else None, gradients)


def make_layer(d_out: int, d_in: int, tokens: int, *, seed: int = 0, kind: str = "rich") -> Layer:
    """A layer with correlated inputs that have a mean and one loud channel; see KINDS."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random, dtype=torch.float64)

    if kind == "few":
        tokens = max(1, d_in // 2)
    x = normal(tokens, d_in) @ normal(d_in, d_in) / d_in**0.5 + 2 * normal(d_in)
    x[:, 0] *= 10
    alive = torch.ones(d_in, dtype=torch.float64)
    alive[:: 1 if kind == "zero" else 3] = 0 if kind in ("dead", "zero") else 1
    xh = x @ (torch.eye(d_in, dtype=torch.float64) + 0.1 * normal(d_in, d_in)) + 0.3 * normal(tokens, d_in)
    return Layer(
        weight=normal(d_out, d_in),
        x=x * alive,
        xh=xh * alive,
        dy=normal(tokens, d_out) @ normal(d_out, d_out),
        dw=normal(4, d_out, d_in) * normal(d_out, 1).exp() * normal(d_in).exp(),
    )


@st.composite
def layers(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS, tokens: tuple[int, int] = (1, 24)) -> Layer:
    """Any layer up to 7 x 7: tall, wide, square or a single row, with few tokens or many."""
    return make_layer(
        draw(st.integers(1, 7)),
        draw(st.integers(1, 7)),
        draw(st.integers(*tokens)),
        seed=draw(st.integers(0, 2**16)),
        kind=draw(st.sampled_from(kinds)),
    )


def as_matrix(side: Tensor | Whitening | None, size: int) -> np.ndarray:
    """A root or metric (a matrix, a diagonal, a `Whitening`, or None for the identity) as a matrix."""
    if side is None:
        return np.eye(size)
    if isinstance(side, Whitening):
        side = side.root()
    return np.diag(side.double().numpy()) if side.ndim == 1 else side.double().numpy()


def optimum(
    target: Tensor, rank: int, root: Tensor | Whitening | None = None, metric: Tensor | None = None
) -> tuple[Tensor, float]:
    """(M, loss): the best M of `rank` in ||A (T - M) B||_F^2, by numpy's float64 SVD of A T B."""
    matrix = target.double().numpy()
    a, b = as_matrix(metric, target.shape[0]), as_matrix(root, target.shape[1])
    basis, singular, _ = np.linalg.svd(a @ matrix @ b, full_matrices=False)
    best = np.linalg.solve(a, basis[:, :rank] @ (basis[:, :rank].T @ (a @ matrix)))
    return torch.from_numpy(best), float((singular[rank:] ** 2).sum())


def weighted_loss(lost: Tensor, root: Tensor | Whitening | None = None, metric: Tensor | None = None) -> float:
    """||A L B||_F^2."""
    a, b = as_matrix(metric, lost.shape[0]), as_matrix(root, lost.shape[1])
    return float(np.square(a @ lost.double().numpy() @ b).sum())


def token_loss(
    weight: Tensor, factors: Factors, x: Tensor, xh: Tensor | None = None, metric: Tensor | None = None
) -> float:
    """E||A (W x - M xh - d)||^2, every raw token passed through both layers; xh is x if not given."""
    outputs = factors(x if xh is None else xh)
    errors = (x @ weight.T - outputs).numpy() @ as_matrix(metric, weight.shape[0]).T
    return float(np.square(errors).sum(1).mean())


def separated(energies: Tensor, rank: int, share: float = 1e-3) -> bool:
    """Whether the cut at `rank` is unique in floating point: a clear gap, or nothing left out."""
    return rank == len(energies) or bool(energies[rank - 1] - energies[rank] > share * energies[0] > 0)


def random_orthogonal(size: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))[0]


def neighbours(factors: Factors, scale: float, seed: int) -> Factors:
    """Other factors of the same rank, a random step away."""
    random = torch.Generator().manual_seed(seed)

    def moved(matrix: Tensor) -> Tensor:
        step = torch.randn(matrix.shape, generator=random, dtype=torch.float64)
        return matrix + scale * matrix.norm() / step.norm() * step

    return Factors(moved(factors.left), moved(factors.right), factors.bias)
