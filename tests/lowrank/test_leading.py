"""Float32 where it is enough, float64 where it is not: the loss is the least one either way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank import InputMoments, Moments, build_method, factor
from eckart.lowrank.leading import LARGEST_EXCESS, LARGEST_TAIL_ERROR, SOUGHT, all_energies, leading_basis
from eckart.lowrank.metrics import BlockDiagonal, Root, Whitening
from eckart.lowrank.truncation import Problem

from .reference import as_matrix, laws, optimum, weighted_loss

# The moments are float32 numbers: what is below this share of the whole is their rounding.
EPSILON = float(torch.finfo(torch.float32).eps)
SHAPES = [(40, 40), (24, 60), (60, 24)]


def layer(shape: tuple[int, int], reach: float, seed: int = 0) -> tuple[Tensor, InputMoments]:
    """A float32 weight, and float32 moments of inputs whose channels' sizes fall geometrically from 1 to 1 / reach."""
    generator = torch.Generator().manual_seed(seed)
    d_out, d_in = shape
    weight = torch.randn(d_out, d_in, generator=generator)
    x = torch.randn(4 * d_in, d_in, generator=generator) * torch.logspace(0, -torch.tensor(reach).log10().item(), d_in)
    turned = torch.linalg.qr(torch.randn(d_in, d_in, generator=generator))[0]
    collected = InputMoments(d_in)
    collected.update(x @ turned)
    return weight, collected.compact()


def roots(moments: InputMoments) -> dict[str, Root]:
    return {"none": None, "diagonal": moments.abs_mean, "whitening": Whitening(moments)}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["none", "diagonal", "whitening"])
@pytest.mark.parametrize("reach", [10.0, 1e3, 1e6])
@laws(8)
@given(seed=st.integers(0, 2**16), share=st.floats(0.1, 0.95))
def test_the_loss_is_the_least_one(shape: tuple[int, int], kind: str, reach: float, seed: int, share: float) -> None:
    weight, moments = layer(shape, reach, seed)
    root = roots(moments)[kind]
    rank = max(1, int(share * min(shape)))
    spectrum = factor(weight, root=root, rank=rank)
    factors = spectrum.cut(rank)
    _, least = optimum(weight, rank, root)
    whole = weighted_loss(weight, root)
    loss = weighted_loss(weight.double() - factors.left.double() @ factors.right.double(), root)

    assert loss <= least * (1 + 10 * LARGEST_EXCESS) + EPSILON * whole
    # A tail sums as many rounded values as directions are dropped.
    rounding = max(1, min(shape) - rank) * EPSILON * whole
    assert abs(spectrum.tail(rank) - least) <= 10 * LARGEST_TAIL_ERROR * least + rounding


@pytest.mark.parametrize("shape", SHAPES)
def test_a_plain_layer_is_factored_in_float32(shape: tuple[int, int]) -> None:
    weight, moments = layer(shape, 10.0)
    for root in roots(moments).values():
        spectrum = factor(weight, root=root, rank=10)
        assert spectrum.basis.dtype == torch.float32
        assert spectrum.basis.shape == (shape[0], 10)
        assert (spectrum.basis.mT @ spectrum.basis - torch.eye(10)).abs().max() < 1e-5
        assert len(spectrum.energies) == spectrum.max_rank == min(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_an_outlying_direction_takes_float64(shape: tuple[int, int]) -> None:
    """Singular values far below 3e-4 of the largest are rounding in float32's Gram matrix, on every processor."""
    weight, moments = layer(shape, 1e8)
    rank = 3 * min(shape) // 4
    assert leading_basis(weight, Whitening(moments), rank) is None
    assert factor(weight, root=Whitening(moments), rank=rank).basis.dtype == torch.float64


def test_float64_stays_float64() -> None:
    weight, moments = layer((40, 40), 10.0)
    assert factor(weight.double(), root=Whitening(moments), rank=10).basis.dtype == torch.float64
    exact = InputMoments(40)
    exact.update(torch.randn(200, 40, generator=torch.Generator().manual_seed(1)))
    assert factor(weight, root=Whitening(exact), rank=10).basis.dtype == torch.float64
    assert factor(weight, root=Whitening(moments)).basis.dtype == torch.float64  # every rank may be asked for


def test_what_was_not_made_cannot_be_cut() -> None:
    weight, moments = layer((40, 40), 10.0)
    spectrum = factor(weight, root=Whitening(moments), rank=10)
    assert spectrum.cut(10).rank == 10
    with pytest.raises(ValueError, match="factored for rank 10, and is to be cut at 11"):
        spectrum.cut(11)
    with pytest.raises(ValueError, match="rank 41 is not in"):
        factor(weight, rank=41)


@pytest.mark.parametrize("name", ["svd", "asvd-0", "asvd-i", "asvd-ii", "nsvd-i", "nid-i", "sfsd", "shrunk"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_rank_that_is_known_changes_no_loss(name: str, shape: tuple[int, int]) -> None:
    weight, inputs = layer(shape, 30.0)
    method, moments, rank = build_method(name), Moments(inputs), 11
    whole, known = (method.factor(weight, moments, rank=hint) for hint in (None, rank))
    losses = [
        weighted_loss(weight.double() - (cut.left.double() @ cut.right.double()), as_root(inputs))
        for cut in (whole.cut(rank), known.cut(rank))
    ]
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[0]
    if name != "nid-i":  # whose tail is measured
        assert known.tail(rank) == pytest.approx(whole.tail(rank), rel=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["triangle", "blocks", "diagonal"])
@pytest.mark.parametrize("scale", [1.0, 1e-9])
def test_an_output_metric_is_factored_in_float32_too(shape: tuple[int, int], kind: str, scale: float) -> None:
    """However small the gradients are: their squares' squares would leave float32's range."""
    weight, moments = layer(shape, 10.0)
    rank, d_out = 10, shape[0]
    triangles = [
        2 * torch.eye(n) + torch.randn(n, n, generator=torch.Generator().manual_seed(n)).triu() for n in (8, d_out - 8)
    ]
    whole = torch.block_diag(*triangles) * scale
    metric = {
        "triangle": whole,
        "blocks": BlockDiagonal(tuple(scale * each for each in triangles)),
        "diagonal": whole.diagonal(),
    }[kind]
    spectrum = factor(weight, root=Whitening(moments), metric=metric, rank=rank)
    assert spectrum.basis.dtype == torch.float32
    factors, side = spectrum.cut(rank), whole.diagonal() if kind == "diagonal" else whole
    _, least = optimum(weight, rank, Whitening(moments), side)
    lost = weight.double() - factors.left.double() @ factors.right.double()
    assert weighted_loss(lost, Whitening(moments), side) <= least * (1 + 10 * LARGEST_EXCESS)
    assert spectrum.tail(rank) == pytest.approx(least, rel=10 * LARGEST_TAIL_ERROR)


# Curves


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reach", [10.0, 1e3, 1e8])
def test_curves_are_the_tails_of_the_spectrum(shape: tuple[int, int], reach: float) -> None:
    weight, moments = layer(shape, reach)
    for root in roots(moments).values():
        expected, curve = factor(weight, root=root).tails(), Problem(weight, root).tails()
        sought = int(SOUGHT * min(shape))
        torch.testing.assert_close(curve[: sought + 1], expected[: sought + 1], rtol=1e-4, atol=1e-6 * float(curve[0]))
        exact = Problem(weight.double(), root).tails()
        torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-12 * float(curve[0]))


def test_a_curve_below_what_float32_resolves_takes_float64() -> None:
    weight, moments = layer((40, 40), 1e8)
    assert all_energies(weight, Whitening(moments)) is None
    weight, moments = layer((40, 40), 10.0)
    assert all_energies(weight, Whitening(moments)) is not None


@pytest.mark.parametrize("name", ["svd", "asvd-i", "asvd-ii", "nsvd-i", "sfsd", "shrunk"])
def test_tails_of_a_method_need_no_spectrum(name: str) -> None:
    weight, inputs = layer((24, 60), 10.0)
    method, moments = build_method(name), Moments(inputs)
    expected = method.factor(weight, moments).tails()
    whole = float(expected[0])
    torch.testing.assert_close(method.tails(weight, moments), expected, rtol=1e-5, atol=1e-6 * whole)
    exact = method.tails(weight.double(), moments)
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-12 * whole)


def as_root(inputs: InputMoments) -> Tensor:
    return torch.from_numpy(as_matrix(Whitening(inputs), inputs.d_in))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    weight, moments = layer((24, 30), 10.0)
    weight[3, 4] = value
    with pytest.raises(ValueError, match="not finite"):
        factor(weight, root=Whitening(moments), rank=5)
