"""Moments: streams that can be cut, merged and reordered, and forget nothing but the padding."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank import GradientMoments, InputMoments, Moments, input_moments
from eckart.lowrank.deviations import CHUNK_ROWS
from eckart.lowrank.float32 import full_float32
from eckart.lowrank.input_moments import INPUT_STATISTICS, SQUARES
from eckart.lowrank.moments import FISHER, OF_GRADIENTS

from .reference import Layer, laws, layers, make_layer

EXACT = {"rtol": 1e-12, "atol": 1e-12}
STATISTICS = ("mean", "abs_mean", "second_moment", "covariance")
REFERENCE_STATISTICS = (
    "cross_moment",
    "cross_covariance",
    "reference_mean",
    "reference_second_moment",
)


def stream(x: Tensor, reference: Tensor | None = None, **settings: Any) -> InputMoments:
    needs = {"second_moment"} if reference is None else {"cross_moment"}
    collected = InputMoments(x.shape[-1], needs)
    collected.update(x, reference=reference, **settings)
    return collected


def gradient_stream(layer: Layer, dw: Tensor | None = None, dy: Tensor | None = None) -> GradientMoments:
    collected = GradientMoments(*layer.weight.shape)
    for gradient in layer.dw if dw is None else dw:
        collected.update_fisher(gradient)
    collected.update_covariance(layer.dy if dy is None else dy, None)
    return collected


def assert_same(a: Any, b: Any, **tolerance: float) -> None:
    """The same sums; square ones are compared in units of their largest entry."""
    assert a.sums.keys() == b.sums.keys()
    for name, expected in b.sums.items():
        size = expected.abs().max().clamp_min(1e-300).double() if expected.ndim == 2 else 1.0
        torch.testing.assert_close(a.sums[name] / size, expected / size, check_dtype=False, **(tolerance or EXACT))


def assert_equal(a: Any, b: Any) -> None:
    assert_same(a, b, rtol=0, atol=0)


# What they are


@laws(30)
@given(layers())
def test_statistics_are_their_definitions(layer: Layer) -> None:
    moments = stream(layer.xh, layer.x)
    xh, x = layer.xh.numpy(), layer.x.numpy()
    n = len(x)
    expected = {
        "mean": xh.mean(0),
        "abs_mean": np.abs(xh).mean(0),
        "second_moment": xh.T @ xh / n,
        "covariance": (xh - xh.mean(0)).T @ (xh - xh.mean(0)) / n,
        "cross_moment": x.T @ xh / n,
        "cross_covariance": (x - x.mean(0)).T @ (xh - xh.mean(0)) / n,
        "reference_mean": x.mean(0),
        "reference_second_moment": x.T @ x / n,
    }
    assert moments.count == n
    assert moments.d_in == x.shape[1]
    assert set(expected) == {*STATISTICS, *REFERENCE_STATISTICS}
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(moments, name).numpy(), value, rtol=1e-10, atol=1e-10, err_msg=name)


@laws(30)
@given(layers())
def test_gradient_statistics_are_their_definitions(layer: Layer) -> None:
    moments = gradient_stream(layer)
    fisher, dy = np.square(layer.dw.numpy()).mean(0), layer.dy.numpy()
    # The squares are taken in float32, their sums in float64.
    np.testing.assert_allclose(moments.fisher_in.numpy(), fisher.sum(0), rtol=1e-5)
    np.testing.assert_allclose(moments.fisher_out.numpy(), fisher.sum(1), rtol=1e-5)
    np.testing.assert_allclose(moments.gradient_covariance.numpy(), dy.T @ dy / len(dy), rtol=1e-10, atol=1e-10)


def test_fisher_is_of_one_example_at_a_time() -> None:
    gradient = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    apart, together = GradientMoments(2, 2), GradientMoments(2, 2)
    apart.update_fisher(gradient)
    apart.update_fisher(-gradient)
    together.update_fisher(gradient - gradient)
    assert apart.fisher_in.tolist() == [10, 20]
    assert apart.fisher_out.tolist() == [5, 25]
    assert together.fisher_in.tolist() == [0, 0]


def test_without_a_reference_the_reference_is_the_input() -> None:
    moments = stream(make_layer(3, 4, 10).x)
    assert torch.equal(moments.reference_mean, moments.mean)


@pytest.mark.parametrize("name", sorted(INPUT_STATISTICS))
def test_every_named_statistic_can_be_asked_for_alone(name: str) -> None:
    layer = make_layer(3, 4, 10)
    moments = InputMoments(4, {name})
    moments.update(layer.x, reference=layer.x if name == "cross_moment" else None)
    assert getattr(moments, name).abs().sum() > 0


@pytest.mark.parametrize("name", sorted(OF_GRADIENTS))
def test_every_named_gradient_statistic_can_be_asked_for_alone(name: str) -> None:
    layer = make_layer(3, 4, 10)
    moments = GradientMoments(3, 4, {name})
    if name == "gradient_covariance":
        moments.update_covariance(layer.dy, None)
        with pytest.raises(ValueError, match="for the statistics fisher_in and fisher_out, and only for them"):
            moments.update_fisher(layer.dw[0])
    else:
        moments.update_fisher(layer.dw[0])
    assert getattr(moments, name).abs().sum() > 0
    assert moments.sums.keys() == (FISHER if name in FISHER else {name})
    again = GradientMoments.from_state(moments.examples, moments.tokens, moments.sums)
    assert_equal(again, moments)
    assert not again.are_zero


def test_a_gradient_covariance_is_summed_in_float32_in_halves() -> None:
    """Wider than the columns that are multiplied at a time, over many batches: within 1e-6 of a sum in float64."""
    generator = torch.Generator().manual_seed(0)
    scales = torch.logspace(0, -6, 700)
    moments, exact = GradientMoments(700, 4, {"gradient_covariance"}), torch.zeros(700, 700, dtype=torch.float64)
    for _ in range(60):
        rows = torch.randn(150, 700, generator=generator) * scales
        moments.update_covariance(rows, None)
        exact += rows.double().T @ rows.double()
    assert not moments._sums["gradient_covariance"][600:, :500].any()  # not multiplied: mirrored when it is read
    covariance = moments.gradient_covariance
    assert moments.sums["gradient_covariance"].dtype == torch.float32
    assert covariance.dtype == torch.float64
    assert torch.equal(covariance, covariance.T)
    # Of the size of the two outputs, so that the faintest one counts as the strongest.
    size = exact.diagonal().sqrt()
    assert ((covariance * moments.tokens - exact) / torch.outer(size, size)).abs().max() < 1e-6


# How the stream is cut does not matter


@laws(40)
@given(layers(), st.integers(0, 24), st.booleans())
def test_merged_is_the_whole(layer: Layer, cut: int, both: bool) -> None:
    cut = min(cut, len(layer.x))
    reference = layer.x if both else None
    whole = stream(layer.xh, reference)
    merged = stream(layer.xh[:cut], layer.x[:cut] if both else None) + stream(
        layer.xh[cut:], layer.x[cut:] if both else None
    )
    assert merged.count == whole.count
    assert_same(merged, whole)


@laws(20)
@given(layers(), st.integers(0, 4), st.integers(0, 24))
def test_merged_gradients_are_the_whole(layer: Layer, examples: int, tokens: int) -> None:
    whole = gradient_stream(layer)
    merged = gradient_stream(layer, layer.dw[:examples], layer.dy[:tokens]) + gradient_stream(
        layer, layer.dw[examples:], layer.dy[tokens:]
    )
    assert (merged.examples, merged.tokens) == (whole.examples, whole.tokens)
    assert_same(merged, whole)


@laws(30)
@given(layers(), st.randoms(use_true_random=False), st.lists(st.integers(1, 9), max_size=6))
def test_order_and_batching_do_not_matter(layer: Layer, random: Any, sizes: list[int]) -> None:
    whole, order = stream(layer.x), list(range(len(layer.x)))
    random.shuffle(order)
    shuffled, start = InputMoments(layer.x.shape[1]), 0
    for size in [*sizes, len(order)]:
        shuffled.update(layer.x[order[start : start + size]])
        start += size
    assert shuffled.count == whole.count
    assert_same(shuffled, whole)


@laws(20)
@given(layers(), st.integers(1, 5))
def test_chunking_does_not_matter(layer: Layer, rows: int) -> None:
    whole = stream(layer.xh, layer.x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(input_moments, "CHUNK_ROWS", rows)
        chunked = stream(layer.xh, layer.x)
    assert chunked.count == whole.count
    assert_same(chunked, whole)


def test_no_row_is_lost_between_chunks() -> None:
    """A row at either end of a chunk is a thousandth of the sums, and float64 is off by 1e-14."""
    rows = 2 * CHUNK_ROWS + 5
    x = torch.arange(2 * rows).reshape(rows, 2).remainder(7).double()
    x[0], x[CHUNK_ROWS - 1], x[CHUNK_ROWS], x[-1] = 11.0, 12.0, 13.0, 14.0
    moments = stream(x)
    assert moments.count == rows
    second = x.double().T @ x.double() / rows
    torch.testing.assert_close(moments.second_moment, second, rtol=1e-12, atol=0)
    torch.testing.assert_close(moments.sums["mean"], x.sum(0), rtol=1e-12, atol=0)


@laws(20)
@given(layers(), st.integers(1, 4))
def test_batch_shape_does_not_matter(layer: Layer, length: int) -> None:
    whole = len(layer.x) - len(layer.x) % length
    x = layer.x[:whole]
    assert_equal(stream(x.reshape(-1, length, x.shape[1])), stream(x))


# Padding


@laws(40)
@given(layers(), st.data())
def test_masked_rows_are_left_out_exactly(layer: Layer, data: st.DataObject) -> None:
    n = len(layer.x)
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=n, max_size=n)))
    padded, reference = layer.xh.clone(), layer.x.clone()
    padded[~mask], reference[~mask] = float("nan"), float("inf")
    moments = InputMoments(layer.x.shape[1], {"cross_moment"})
    moments.update(padded[None], mask[None], reference=reference[None])
    expected = stream(layer.xh[mask], layer.x[mask])
    assert moments.count == expected.count == int(mask.sum())
    assert_equal(moments, expected)


def test_masked_gradients_are_left_out_exactly() -> None:
    layer = make_layer(3, 4, 6)
    mask = torch.tensor([[True, False, True], [True, True, False]])
    padded = layer.dy.reshape(2, 3, 3).clone()
    padded[~mask] = float("nan")
    moments, expected = GradientMoments(3, 4), GradientMoments(3, 4)
    moments.update_covariance(padded, mask)
    expected.update_covariance(layer.dy[mask.flatten()], None)
    assert moments.tokens == expected.tokens == 4
    assert_equal(moments, expected)


# Precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_its_float32_copy(dtype: torch.dtype) -> None:
    layer = make_layer(3, 4, 50)
    x, reference = layer.xh.to(dtype), layer.x.to(dtype)
    assert_same(stream(x, reference), stream(x.float(), reference.float()), rtol=1e-6, atol=1e-6)
    gradients, copies = GradientMoments(3, 4), GradientMoments(3, 4)
    for collected, cast in ((gradients, lambda t: t), (copies, lambda t: t.float())):
        collected.update_fisher(cast(layer.dw[0].to(dtype)))
        collected.update_covariance(cast(layer.dy.to(dtype)), None)
    assert_equal(gradients, copies)


def test_float32_stream_is_near_the_float64_one() -> None:
    x = make_layer(3, 16, 3000).x
    moments, expected = stream(x.float()), stream(x.float().double())
    for name in STATISTICS:
        error = (getattr(moments, name) - getattr(expected, name)).norm() / getattr(expected, name).norm()
        assert error < 1e-6, name


@pytest.mark.parametrize("before", ["high", "medium", "highest"])
def test_matrix_products_keep_float32_and_the_setting_comes_back(before: str) -> None:
    outside = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before)
    try:
        with full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == before
        with pytest.raises(KeyError), full_float32():
            raise KeyError
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(outside)


def test_compact_is_the_same_within_float32() -> None:
    layer = make_layer(3, 16, 200)
    whole, compact = stream(layer.xh, layer.x), stream(layer.xh, layer.x).compact()
    assert compact.count == whole.count
    for name in (*STATISTICS, *REFERENCE_STATISTICS):
        moments, expected = getattr(compact, name), getattr(whole, name)
        assert moments.dtype == torch.float64
        assert (moments - expected).norm() < 1e-6 * expected.norm(), name
    squares = [s for s in compact.sums.values() if s.ndim == 2]
    assert len(squares) == 3
    assert {s.dtype for s in squares} == {torch.float32}


def test_compact_rounds_in_place_and_goes_on() -> None:
    layer = make_layer(3, 5, 20)
    whole, sums = stream(layer.xh, layer.x), stream(layer.xh, layer.x)
    assert sums.compact() is sums
    for each in (whole, sums):
        each.update(layer.xh + 1, reference=layer.x)
    for name in (*STATISTICS, *REFERENCE_STATISTICS):
        assert torch.allclose(getattr(sums, name), getattr(whole, name), rtol=1e-5, atol=1e-6), name


def test_compact_holds_one_sum_in_both_types_at_a_time() -> None:
    layer = make_layer(3, 64, 200)
    moments = stream(layer.xh, layer.x)
    alive: list[weakref.ref[Tensor]] = [weakref.ref(moments._sums[name]) for name in SQUARES]
    moved, seen = InputMoments._about, []

    def about(self: InputMoments, name: str, *rest: Any, **options: Any) -> Tensor:
        seen.append(sum(each() is not None for each in alive))
        return moved(self, name, *rest, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InputMoments, "_about", about)
        moments.compact()
    assert seen == [3, 2, 1]


# To a file and back


def test_state_round_trip() -> None:
    layer = make_layer(3, 4, 20)
    for whole in (stream(layer.xh, layer.x), stream(layer.x).compact()):
        again = InputMoments.from_state(whole.count, whole.sums)
        assert (again.count, again.d_in) == (whole.count, whole.d_in)
        assert_equal(again, whole)
    whole = gradient_stream(layer)
    again = GradientMoments.from_state(whole.examples, whole.tokens, whole.sums)
    assert (again.examples, again.tokens) == (whole.examples, whole.tokens)
    assert_equal(again, whole)


# What is refused


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_an_input_that_is_not_finite_is_refused(value: float, dtype: torch.dtype) -> None:
    x = torch.ones(5, 3, dtype=dtype)
    x[2, 1] = value
    with pytest.raises(ValueError, match="not finite"):
        stream(x)
    with pytest.raises(ValueError, match="not finite"):
        stream(torch.ones(5, 3, dtype=dtype), x)
    with pytest.raises(ValueError, match="not finite"):
        GradientMoments(5, 3).update_fisher(x)
    with pytest.raises(ValueError, match="not finite"):
        GradientMoments(3, 5).update_covariance(x, None)


@pytest.mark.parametrize("name", ["second_moment", "covariance", *REFERENCE_STATISTICS])
def test_a_missing_statistic_is_named(name: str) -> None:
    moments = InputMoments(3, {"mean"})
    moments.update(torch.ones(5, 3))
    if name == "reference_mean":
        assert torch.equal(moments.reference_mean, moments.mean)
        return
    missing = {"covariance": "second_moment", "cross_covariance": "cross_moment"}.get(name, name)
    with pytest.raises(ValueError, match=f"^{missing} was not collected"):
        getattr(moments, name)


def test_a_missing_gradient_statistic_is_named() -> None:
    layer = make_layer(3, 4, 5)
    moments = GradientMoments(3, 4, {"fisher_in"})
    with pytest.raises(ValueError, match=r"^fisher_in was not collected"):
        _ = moments.fisher_in
    moments.update_fisher(layer.dw[0])
    with pytest.raises(ValueError, match=r"^gradient_covariance was not collected"):
        _ = moments.gradient_covariance
    with pytest.raises(ValueError, match="gradient_covariance"):
        moments.update_covariance(layer.dy, None)


@pytest.mark.parametrize("name", STATISTICS)
def test_no_token_is_no_statistic(name: str) -> None:
    moments = InputMoments(3)
    moments.update(torch.ones(2, 3), torch.zeros(2, dtype=torch.bool))
    with pytest.raises(ValueError, match="no token was seen"):
        getattr(moments, name)


@pytest.mark.parametrize("make", [lambda needs: InputMoments(3, needs), lambda n: GradientMoments(3, 3, n)])
def test_an_unknown_statistic_is_named(make: Callable[[set[str]], Any]) -> None:
    with pytest.raises(ValueError, match=r"\['third_moment'\]; known: \["):
        make({"third_moment"})


@pytest.mark.usefixtures("as_users_see_it")
def test_streams_that_do_not_fit_are_refused() -> None:
    plain, anchored = InputMoments(3), InputMoments(3, {"cross_moment"})
    x = torch.ones(5, 3)
    with pytest.raises(ValueError, match="width 4, expected 3"):
        plain.update(torch.ones(5, 4))
    with pytest.raises(ValueError, match="reference"):
        plain.update(x, reference=x)
    with pytest.raises(ValueError, match="reference"):
        anchored.update(x)
    with pytest.raises(ValueError, match=r"\(4,\).*\(5, 3\)"):
        plain.update(x, torch.ones(4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(5, 2\).*\(5, 3\)"):
        anchored.update(x, reference=torch.ones(5, 2))


@pytest.mark.usefixtures("as_users_see_it")
def test_a_longer_reference_is_refused_even_at_the_end_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(input_moments, "CHUNK_ROWS", 5)
    anchored = InputMoments(3, {"cross_moment"})
    with pytest.raises(ValueError, match=r"\(7, 3\).*\(5, 3\)"):
        anchored.update(torch.ones(5, 3), reference=torch.ones(7, 3))


def test_refused_streams_leave_no_count() -> None:
    """A caller that catches the error must not go on with half a batch."""
    moments = InputMoments(3)
    moments.update(torch.ones(5, 3))
    with pytest.raises(ValueError, match="width"):
        moments.update(torch.ones(5, 4))
    assert moments.count == 5
    assert moments.mean.tolist() == [1, 1, 1]


def test_only_like_moments_merge() -> None:
    with pytest.raises(ValueError, match="same width and the same statistics"):
        InputMoments(3) + InputMoments(4)
    with pytest.raises(ValueError, match="same width and the same statistics"):
        InputMoments(3) + InputMoments(3, {"mean"})
    with pytest.raises(ValueError, match="same shape and the same statistics"):
        GradientMoments(3, 3) + GradientMoments(3, 3, {"fisher_in"})
    with pytest.raises(ValueError, match="same shape and the same statistics"):
        GradientMoments(3, 3) + GradientMoments(4, 3)


def test_absent_moments_say_what_is_missing() -> None:
    with pytest.raises(ValueError, match="statistics of the inputs"):
        Moments().require_inputs()
    with pytest.raises(ValueError, match="statistics of the gradient"):
        Moments().require_gradients()
