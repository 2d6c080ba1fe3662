"""Rounding that compensates: against the rule written out column by column, and in what it may and may not lose."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank import Factors
from eckart.lowrank.codes import BITS, block_scales, round_nearest, spread, to_codes
from eckart.lowrank.rounding import TOGETHER, CodedFactors, code_factors, round_compensated
from eckart.lowrank.storage import Storage

from .reference import KINDS, Layer, laws, layers, make_layer


def moment_of(layer: Layer) -> Tensor:
    return layer.x.mT @ layer.x / len(layer.x)


def lost(target: Tensor, kept: Tensor, moment: Tensor) -> float:
    change = target.double() - kept.double()
    return float(((change @ moment) * change).sum())


def surgeon(target: Tensor, moment: Tensor, bits: int, block: tuple[int, int], damping: float) -> Tensor:
    """Optimal brain surgeon with a fixed order: after each column the inverse of what is left of the moment."""
    values, d_in, (down, across) = target.clone(), target.shape[1], block
    left_over = moment + damping * moment.diagonal().mean() * torch.eye(d_in, dtype=moment.dtype)
    counts = torch.stack([1 / torch.linalg.inv(left_over[at:, at:])[0, 0] for at in range(d_in)])
    rounded = torch.empty_like(target)
    for column in range(d_in):
        if column % across == 0:
            group = slice(column, min(column + across, d_in))
            scales = block_scales(values[:, group], bits, (down, group.stop - column), weights=counts[group])
        scale = spread(scales.to(values.dtype), values[:, :1].shape, (down, 1))
        rounded[:, column] = (to_codes(values[:, column : column + 1], scale, bits).to(values.dtype) * scale)[:, 0]
        inverse = torch.linalg.inv(left_over[column:, column:])
        error = (values[:, column] - rounded[:, column]) / inverse[0, 0]
        values[:, column:] -= error[:, None] * inverse[0]
    return rounded


@pytest.mark.parametrize("block", [(1, 8), (1, 64), (8, 1)])
@pytest.mark.parametrize("bits", BITS)
def test_it_is_the_surgeons_rule(bits: int, block: tuple[int, int]) -> None:
    layer = make_layer(6, 24, 60)
    moment = moment_of(layer)
    coded = round_compensated(layer.weight, moment, bits, block)
    torch.testing.assert_close(coded.dense(torch.float64), surgeon(layer.weight, moment, bits, block, 0.01))


@pytest.mark.parametrize("block", [(1, 48), (1, 64), (1, 200), (16, 1)])
def test_columns_in_rounds_are_columns_one_by_one(block: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that do not end where a round of columns does are told of the errors before them too."""
    layer = make_layer(5, 2 * TOGETHER + 30, 600)
    moment = moment_of(layer)
    together = round_compensated(layer.weight, moment, 4, block)
    monkeypatch.setattr("eckart.lowrank.rounding.TOGETHER", 10**6)
    one = round_compensated(layer.weight, moment, 4, block)
    assert (together.codes != one.codes).float().mean() < 0.01  # but for ties that rounding decides


@pytest.mark.parametrize("block", [(1, 64), (64, 1)])
@pytest.mark.parametrize("bits", BITS)
def test_inputs_that_have_nothing_to_do_with_each_other_leave_nothing_to_compensate(
    bits: int, block: tuple[int, int]
) -> None:
    weight = make_layer(70, 80, 8).weight.float()
    nearest = round_nearest(weight, bits, block)
    coded = round_compensated(weight, torch.eye(80, dtype=torch.float64), bits, block, damping=0.0)
    assert torch.equal(coded.codes, nearest.codes)
    assert torch.equal(coded.scales, nearest.scales)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("seed", range(5))
def test_correlated_inputs_lose_less_than_by_rounding_to_nearest(bits: int, seed: int) -> None:
    layer = make_layer(32, 64, 500, seed=seed)
    moment = moment_of(layer)
    nearest, coded = (
        lost(layer.weight, each.dense(torch.float64), moment)
        for each in (
            round_nearest(layer.weight, bits, (1, 32), weights=moment.diagonal()),
            round_compensated(layer.weight, moment, bits, (1, 32)),
        )
    )
    assert coded < 0.8 * nearest


@laws(60)
@given(layer=layers(kinds=KINDS), bits=st.sampled_from(BITS), sideways=st.booleans())
def test_any_layer_can_be_rounded(layer: Layer, bits: int, sideways: bool) -> None:
    """Singular moments, dead inputs, no input at all: finite numbers, and never worse than none of them."""
    coded = round_compensated(layer.weight, moment_of(layer), bits, (8, 1) if sideways else (1, 8))
    assert torch.isfinite(coded.dense(torch.float64)).all()
    if bits == 8:
        torch.testing.assert_close(
            coded.dense(torch.float64), layer.weight, rtol=0.5, atol=0.1 * float(layer.weight.abs().max())
        )


@laws(40)
@given(layer=layers(kinds=("rich",), tokens=(20, 60)), bits=st.sampled_from(BITS), data=st.data())
def test_the_left_factor_takes_up_what_the_right_one_lost(layer: Layer, bits: int, data: st.DataObject) -> None:
    """With the rounded right factor no left one is better than the one that is fit to it, which is then rounded."""
    moment, rank = moment_of(layer), data.draw(st.sampled_from(list(layer.ranks)))
    u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
    factors = Factors(u[:, :rank] * s[:rank], v[:rank])
    left, right = code_factors(factors, layer.weight, moment, bits, 8)
    assert left.shape == factors.left.shape
    assert right.shape == factors.right.shape
    read = right.dense(torch.float64)
    # The best left factor for these inputs, by least squares on the tokens themselves.
    inputs = layer.x @ read.mT
    best = torch.linalg.lstsq(inputs, layer.x @ layer.weight.mT, driver="gelsd").solution.mT
    least = lost(layer.weight, best @ read, moment)
    refit = lost(layer.weight, left.dense(torch.float64) @ read, moment)
    unfit = lost(layer.weight, round_nearest(factors.balanced().left, bits, (8, 1)).dense(torch.float64) @ read, moment)
    assert refit >= least * (1 - 1e-6) - 1e-9
    if bits == 8:
        scale = lost(layer.weight, torch.zeros_like(layer.weight), moment)
        assert refit <= unfit + 1e-3 * scale


def test_factors_in_eight_bits_lose_next_to_nothing() -> None:
    layer = make_layer(48, 64, 400)
    moment = moment_of(layer)
    u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
    factors = Factors(u[:, :20] * s[:20], v[:20])
    left, right = code_factors(factors, layer.weight, moment, 8, 64)
    exact = lost(layer.weight, factors.dense(), moment)
    assert lost(layer.weight, left.dense(torch.float64) @ right.dense(torch.float64), moment) < 1.01 * exact


def test_without_a_text_factors_are_rounded_to_nearest() -> None:
    weight = make_layer(20, 30, 8).weight
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    left, right = code_factors(Factors(u[:, :8] * s[:8], v[:8]), weight, None, 8, 8)
    torch.testing.assert_close(
        left.dense(torch.float64) @ right.dense(torch.float64), (u[:, :8] * s[:8]) @ v[:8], rtol=0.2, atol=0.1
    )


def test_parts_add_up() -> None:
    weight = make_layer(12, 16, 8).weight
    base = round_nearest(weight, 4, (1, 8))
    left, right = torch.randn(12, 3, dtype=torch.float64), torch.randn(3, 16, dtype=torch.float64)
    for coded, expected in (
        (CodedFactors(Storage(4, None, 8), base, None, None), base.dense(torch.float64)),
        (CodedFactors(Storage(4, None, 8), base, left, right), base.dense(torch.float64) + left @ right),
    ):
        torch.testing.assert_close(coded.dense(), expected)
        assert (coded.d_out, coded.d_in) == (12, 16)
    assert coded.rank == 3
