"""Covariances of inputs that hardly vary: known as well as any others, whatever the mean, and merged without loss."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank import GradientMoments, InputMoments, Moments, build_method, deviations, float32, input_moments
from eckart.lowrank.anchor import Anchor
from eckart.lowrank.deviations import DOMINANT
from eckart.lowrank.method import output_error

from .reference import laws, token_loss

SIZE, TOKENS, BATCH = 24, 2048, 256
RATIOS = [1e0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6]
ANCHORED = frozenset({"second_moment", "cross_moment"})
# What float32 loses of a sum of products of a few thousand rows, mostly less.
ROUNDING = 3e-7
ratios = pytest.mark.parametrize("ratio", RATIOS, ids=lambda ratio: f"{ratio:.0e}")
METHODS = {
    "sfsd": build_method("sfsd"),
    "shrunk": build_method("shrunk", {"bias": True}),
    "kfac": build_method("kfac"),
    "anchored": build_method("kfac").anchored(0.01),
    "anchored without a bias": build_method("kfac", {"bias": False}).anchored(0.01),
}


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tokens(ratio: float, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(x, xh): correlated features, every second of which has a mean of `ratio` times its spread."""
    mix = normal(SIZE, SIZE, seed=seed) * torch.logspace(0, -1.5, SIZE, dtype=torch.float64)[:, None] / SIZE**0.5
    x = normal(TOKENS, SIZE, seed=seed + 1) @ mix
    turn = torch.eye(SIZE, dtype=torch.float64) + 0.05 * normal(SIZE, SIZE, seed=seed + 2)
    xh = x @ turn + 0.1 * normal(TOKENS, SIZE, seed=seed + 3) @ mix
    mean = ratio * x.std(0)
    mean[::2] = 0
    return (x + mean).to(dtype), (xh + mean).to(dtype)


def stream(xh: Tensor, x: Tensor | None = None, batch: int = BATCH, **settings: Any) -> InputMoments:
    collected = InputMoments(xh.shape[1], {"second_moment"} if x is None else ANCHORED, **settings)
    for start in range(0, len(xh), batch):
        rows = slice(start, start + batch)
        collected.update(xh[rows], reference=None if x is None else x[rows])
    return collected


def centred(x: Tensor) -> Tensor:
    """In float64, in two passes."""
    return x.double() - x.double().mean(0)


def worst(covariance: Tensor, first: Tensor, second: Tensor) -> float:
    """The largest error of a covariance, in units of the spreads of the two features."""
    first, second = centred(first), centred(second)
    size = torch.outer(first.square().mean(0).sqrt(), second.square().mean(0).sqrt())
    return float(((covariance - first.T @ second / len(first)).abs() / size)[size > 0].max())


def truth(x: Tensor, xh: Tensor, needs: frozenset[str]) -> Moments:
    """What a method asks for, of the same tokens without their means, in float64."""
    inputs = InputMoments(SIZE, needs & ANCHORED)
    crossed = "cross_moment" in needs
    inputs.update(centred(xh) if crossed else centred(x), reference=centred(x) if crossed else None)
    return Moments(inputs, gradients())


def gradients() -> GradientMoments:
    collected = GradientMoments(16, SIZE, {"gradient_covariance"})
    collected.update_covariance(normal(TOKENS, 16, seed=9), None)
    return collected


@ratios
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sums", [torch.float64, torch.float32])
def test_covariances_are_those_of_two_passes_whatever_the_mean(
    ratio: float, dtype: torch.dtype, sums: torch.dtype
) -> None:
    """Within ROUNDING of the spreads for the stream, and once more for each time that the first batch goes into it.

    Of 16 bits, a mean below DOMINANT times the spread is not shifted, and the error is of the mean's square.
    """
    x, xh = tokens(ratio, dtype)
    kept = stream(xh, x, dtype=sums).compact()
    limit = ROUNDING * (1 + TOKENS / BATCH) * (1 if dtype == torch.float32 else DOMINANT)
    assert worst(kept.covariance, xh, xh) < limit
    assert worst(kept.cross_covariance, x, xh) < limit
    assert worst(kept._about("reference_covariance", dtype=torch.float64) / kept.count, x, x) < limit


@pytest.mark.parametrize("ratio", [0.0, 1e3])
def test_a_first_batch_unlike_the_others_costs_a_bounded_part(ratio: float) -> None:
    """The shift is at most sqrt(tokens / first batch) spreads from the mean, and its square is all that cancels."""
    x, _ = tokens(ratio, torch.float32)
    x[:BATCH] += 1000
    assert worst(stream(x).compact().covariance, x, x) < ROUNDING * (1 + TOKENS / BATCH)
    assert worst(stream(x, batch=8).compact().covariance, x, x) < ROUNDING * (1 + TOKENS / 8)


@pytest.mark.parametrize("ratio", [1e3, 1e4, 1e6])
@pytest.mark.parametrize("name", METHODS)
def test_factors_lose_no_more_than_those_of_exact_moments(ratio: float, name: str) -> None:
    method, weight, rank = METHODS[name], normal(16, SIZE, seed=7), 8
    if not method.centred:
        ratio = 1.0  # a mean that no bias takes is most of the loss
    x, xh = tokens(ratio, torch.float32)
    crossed = "cross_moment" in method.needs
    collected = Moments((stream(xh, x) if crossed else stream(x)).compact(), gradients())
    factors = method.factor(weight, collected).cut(rank)
    lost = token_loss(weight, factors, x.double(), (xh if crossed else x).double())
    if method.centred:
        best = method.factor(weight, truth(x, xh, method.needs)).cut(rank)
        least = token_loss(weight, best, centred(x), centred(xh if crossed else x))
        assert lost == pytest.approx(least, rel=1e-4)
    assert output_error(weight, factors, collected)[0] == pytest.approx(lost, rel=1e-4)


@pytest.mark.parametrize("constant", [-3.0, 1000.0, 1e6])
@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].centred])
def test_a_constant_added_to_all_inputs_moves_the_bias_alone(constant: float, name: str) -> None:
    """d = W mu - M mu. The inputs are whole multiples of 2^-8, so that adding the constant rounds nothing."""
    method, weight = METHODS[name], normal(16, SIZE, seed=7)
    x, xh = ((each * 256).round() / 256 for each in tokens(1.0, torch.float64))
    factors = []
    for added in (0.0, constant):
        collected = stream(xh + added, x + added) if "cross_moment" in method.needs else stream(x + added)
        factors.append(method.factor(weight, Moments(collected, gradients())).cut(8))
    before, after = factors
    assert before.bias is not None
    assert after.bias is not None
    size = float(before.dense().norm())
    assert float((after.dense() - before.dense()).norm()) < 1e-9 * size
    moved = (weight - before.dense()) @ torch.full((SIZE,), constant, dtype=torch.float64)
    assert float((after.bias - before.bias - moved).norm()) < 1e-9 * size * (1 + abs(constant)) * SIZE**0.5


@laws(30)
@given(
    means=st.lists(st.sampled_from([0.0, 1.0, -30.0, 1e3, 1e6]), min_size=3, max_size=3),
    sizes=st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(any),
    seed=st.integers(0, 2**16),
)
def test_merging_is_associative_and_gives_the_whole(means: list[float], sizes: list[int], seed: int) -> None:
    """Of streams whose shifts are as far apart as their means."""
    parts = [normal(size, 5, seed=seed + at) + means[at] for at, size in enumerate(sizes)]
    others = [part + 0.1 * normal(len(part), 5, seed=seed + 5) for part in parts]
    first, second, third = (stream(*both) for both in zip(parts, others, strict=True))
    left, right = (first + second) + third, first + (second + third)
    xh, x = torch.cat(parts), torch.cat(others)
    spread = float(torch.cat([centred(xh), centred(x)], 1).square().mean())
    exact = {
        "covariance": centred(xh).T @ centred(xh),
        "cross_covariance": centred(x).T @ centred(xh),
        "reference_covariance": centred(x).T @ centred(x),
    }
    assert left.count == right.count == len(xh)
    for name, value in exact.items():
        for merged in (left, right):
            # Means of a million have ten digits behind the point, and so have deviations from them.
            assert (merged.sums[name] - value).abs().max() <= 1e-9 * len(xh) * (spread + 1), name
    torch.testing.assert_close(left.mean, xh.mean(0), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(left.reference_mean, x.mean(0), rtol=1e-14, atol=1e-14)


def test_read_moments_go_on() -> None:
    """From a file, about their mean, to further batches; and what was read stays as it was."""
    x, xh = tokens(1e4, torch.float32)
    begun = stream(xh[:1024], x[:1024]).compact()
    state = {name: total.clone() for name, total in begun.sums.items()}
    again = InputMoments.from_state(begun.count, begun.sums)
    again.update(xh[1024:], reference=x[1024:])
    assert worst(again.covariance, xh, xh) < 1e-6
    assert worst(again.cross_covariance, x, xh) < 1e-6
    assert all(torch.equal(total, state[name]) for name, total in begun.sums.items())


def test_known_moments_of_the_reference_merge() -> None:
    """The shift of the cross moment's dense side is its own, the known moments' mean is not."""
    x, xh = tokens(1e4, torch.float32)
    halves = []
    for rows in (slice(1000), slice(1000, None)):
        known = stream(x[rows]).compact()
        half = InputMoments(SIZE, ANCHORED, reference=known)
        half.update(xh[rows], reference=x[rows])
        assert worst(half.cross_covariance, x[rows], xh[rows]) < 1e-6
        halves.append(half)
    merged = (halves[0] + halves[1]).compact()
    assert worst(merged.cross_covariance, x, xh) < 1e-6
    assert worst(merged.sums["reference_covariance"].double() / TOKENS, x, x) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_features_that_never_vary_have_no_covariance_and_stop_nothing(dtype: torch.dtype) -> None:
    x, xh = tokens(1.0, dtype)
    x[:, 3], xh[:, 3], x[:, 4], xh[:, 4] = 1000.0, 1000.0, 0.1, 0.3
    kept, weight = stream(xh, x).compact(), normal(16, SIZE, seed=7)
    assert kept.covariance[3:5].abs().max() < 1e-12
    target = Anchor(kept, 0.01, centred=True).target(weight.float())
    assert target is not None
    # Nothing was seen of what W reads there: it stays.
    torch.testing.assert_close(target[:, 3:5].double(), weight[:, 3:5], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("spread", [0.0, 1e-3])
def test_an_input_is_constant_where_its_rounding_is_all_that_varies(spread: float) -> None:
    noise = normal(TOKENS, SIZE, seed=1)
    x, xh = ((1000 + spread * each).float() for each in (noise, noise + 0.1 * normal(TOKENS, SIZE, seed=2)))
    anchor, weight = Anchor(stream(xh, x).compact(), 0.01, centred=True), normal(16, SIZE, seed=7)
    assert anchor.is_constant == (spread == 0)
    target = anchor.target(weight)
    assert target is not None
    lost = ((centred(x) @ weight.T - centred(xh) @ each.T).square().mean() for each in (target, weight))
    assert next(lost) <= next(lost)


@ratios
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_units_for_16_bits_get_numbers_of_16_bits(
    ratio: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: what is multiplied in 16 bits is exact in them, and nearly all rows are."""
    seen = {True: 0, False: 0}

    def multiply(first: Tensor, second: Tensor) -> Tensor:
        seen[first.dtype == second.dtype == dtype] += len(first)
        return first.float().T @ second.float()

    for module in (float32, deviations):
        monkeypatch.setattr(module, "is_multiplied_exactly", lambda x: x.dtype == dtype)
    for module in (float32, input_moments):
        monkeypatch.setattr(module, "inner_product", multiply)
    monkeypatch.setattr(deviations, "has_units_for", lambda x: x.dtype == dtype)
    x, xh = tokens(min(ratio, 1e4), dtype)
    kept = stream(xh, x).compact()
    limit = ROUNDING * (1 + TOKENS / BATCH) * DOMINANT
    assert worst(kept.covariance, xh, xh) < limit
    assert worst(kept.cross_covariance, x, xh) < limit
    assert seen[False] < 0.1 * seen[True]


@ratios
@pytest.mark.parametrize("streams", [1, 2])
def test_units_for_16_bits_get_no_row_that_weighs(ratio: float, streams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row times the root of its weight has 24 bits, with a shift and without: units would round it."""
    allowed: list[bool] = []

    def note(parts: list[deviations.Deviations]) -> Iterator[tuple[tuple[Tensor, ...], bool]]:
        for part in deviations.exact_parts(parts):
            allowed.append(part[1] and len(part[0][0]) > 0)
            yield part

    monkeypatch.setattr(input_moments, "exact_parts", note)
    monkeypatch.setattr(deviations, "has_units_for", lambda x: x.dtype == torch.bfloat16)
    x, xh = tokens(min(ratio, 1e4), torch.bfloat16)
    moments = InputMoments(x.shape[-1], {"second_moment"} if streams == 1 else {"second_moment", "cross_moment"})
    moments.update(xh, reference=None if streams == 1 else x, weights=torch.rand(len(x)))
    assert allowed
    assert not any(allowed)
