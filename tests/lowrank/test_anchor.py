"""The anchored target: what a linear gives for the compressed input, to come nearest to the dense one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank import DecompositionError, InputMoments
from eckart.lowrank.anchor import Anchor
from eckart.lowrank.input_moments import STREAMS
from eckart.lowrank.truncation import Problem

from .reference import Layer, laws, layers, make_layer

ANCHORED = frozenset({"second_moment", "cross_moment"})
SHARES = st.sampled_from([0.0, 0.01, 0.3, 1.0])
centred_or_not = pytest.mark.parametrize("centred", [False, True], ids=["uncentred", "centred"])


def anchor_of(layer: Layer, share: float, *, centred: bool = False) -> Anchor:
    return Anchor(layer.moments(ANCHORED).require_inputs(), share, centred=centred)


def target_of(anchor: Anchor, weight: Tensor) -> Tensor:
    target = anchor.target(weight)
    assert target is not None
    return target


def floor_of(anchor: Anchor, weight: Tensor) -> float:
    anchored = anchor.target_and_floor(weight)
    assert anchored is not None
    assert torch.equal(anchored[0], target_of(anchor, weight))
    return anchored[1]


def token_error(layer: Layer, matrix: Tensor, *, centred: bool) -> float:
    x, xh = (each - each.mean(0) if centred else each for each in (layer.x, layer.xh))
    return float((x @ layer.weight.T - xh @ matrix.T).square().sum(1).mean())


@laws(30)
@given(layer=layers(kinds=("rich",), tokens=(20, 40)))
def test_is_the_least_squares_read_out(layer: Layer) -> None:
    target = target_of(anchor_of(layer, 0.0), layer.weight)
    expected = np.linalg.lstsq(layer.xh.numpy(), (layer.x @ layer.weight.T).numpy(), rcond=None)[0].T
    np.testing.assert_allclose(target.numpy(), expected, rtol=1e-6, atol=1e-8)


@centred_or_not
@laws(30)
@given(layer=layers(kinds=("rich",), tokens=(20, 40)), share=SHARES)
def test_is_the_shrunk_read_out(centred: bool, layer: Layer, share: float) -> None:
    """T = W ((1 - s) X + s m I) ((1 - s) Gh + s m I)^-1, from the tokens."""
    x, xh = (each - each.mean(0) if centred else each for each in (layer.x, layer.xh))
    cross, moment = x.T @ xh / len(x), xh.T @ xh / len(x)
    ridge = share * moment.diagonal().mean() * torch.eye(len(moment), dtype=torch.float64)
    expected = torch.linalg.solve(
        (1 - share) * moment + ridge, layer.weight @ ((1 - share) * cross + ridge), left=False
    )
    target = target_of(anchor_of(layer, share, centred=centred), layer.weight)
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=1e-7)


@laws(30)
@given(layer=layers(kinds=("rich",), tokens=(20, 40)), share=SHARES)
def test_a_stream_anchored_to_itself_leaves_the_weight(layer: Layer, share: float) -> None:
    inputs = InputMoments(layer.x.shape[1], ANCHORED)
    inputs.update(layer.x, reference=layer.x)
    anchor = Anchor(inputs, share)
    torch.testing.assert_close(target_of(anchor, layer.weight), layer.weight, rtol=1e-8, atol=1e-8)


@laws(30)
@given(layer=layers(kinds=("rich", "few", "dead")))
def test_shrinking_all_the_way_leaves_the_weight(layer: Layer) -> None:
    torch.testing.assert_close(target_of(anchor_of(layer, 1.0), layer.weight), layer.weight)
    near = target_of(anchor_of(layer, 1 - 1e-9), layer.weight)
    torch.testing.assert_close(near, layer.weight, rtol=1e-6, atol=1e-6)


@centred_or_not
@laws(30)
@given(layer=layers(), share=st.sampled_from([0.01, 0.3, 1.0]), seed=st.integers(0, 2**16))
def test_errors_are_those_of_the_tokens(centred: bool, layer: Layer, share: float, seed: int) -> None:
    """Of the target, which is the floor, and of any other matrix."""
    anchor = anchor_of(layer, share, centred=centred)
    random = torch.Generator().manual_seed(seed)
    other = torch.randn(layer.weight.shape, generator=random, dtype=torch.float64)
    target = target_of(anchor, layer.weight)
    scale = token_error(layer, 0 * other, centred=False) + token_error(layer, other, centred=False)
    for matrix in (target, other):
        error = anchor.error(layer.weight, matrix)
        assert error == pytest.approx(token_error(layer, matrix, centred=centred), abs=1e-9 * scale)
    assert floor_of(anchor, layer.weight) == pytest.approx(anchor.error(layer.weight, target), abs=1e-9 * scale)
    energy = float((layer.x @ layer.weight.T).square().sum(1).mean())
    assert anchor.energy(layer.weight) == pytest.approx(energy, rel=1e-9, abs=1e-12)


@centred_or_not
@pytest.mark.parametrize("drift", [1e-4, 1e-2, 1.0])
def test_float32_is_as_good_where_it_is_taken(centred: bool, drift: float) -> None:
    """A floor of a millionth of the energy is known as well as one of the whole: nothing cancels."""
    layer = make_layer(48, 64, 400, seed=3)
    xh = layer.x + drift * (layer.xh - layer.x)
    inputs = InputMoments(64, ANCHORED)
    inputs.update(xh, reference=layer.x)
    kept, weight = Anchor(inputs.compact(), 0.1, centred=centred), layer.weight.float()
    exact = target_of(kept, weight.double())
    single = target_of(kept, weight)
    assert single.dtype == torch.float32
    floor = floor_of(kept, weight.double())
    assert kept.error(weight.double(), exact) == pytest.approx(floor, rel=1e-9)
    assert floor_of(kept, weight) == pytest.approx(floor, rel=1e-5)
    # What float32 loses of the target costs nothing of the loss.
    assert kept.error(weight.double(), single.double()) <= floor * (1 + 1e-5)


def hardly_solved() -> InputMoments:
    """Of an input of six decades, turned."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=random) * torch.logspace(0, -6, 32)
    turned = x @ torch.linalg.qr(torch.randn(32, 32, generator=random))[0]
    inputs = InputMoments(32, ANCHORED)
    inputs.update(turned, reference=turned + 0.1 * torch.randn(200, 32, generator=random))
    return inputs.compact()


def test_float32_is_refused_where_it_does_not_solve() -> None:
    inputs, weight = hardly_solved(), torch.randn(8, 32, generator=torch.Generator().manual_seed(1))
    assert Anchor(inputs, 1e-9).target(weight) is None
    assert torch.isfinite(target_of(Anchor(inputs, 1e-9), weight.double())).all()


def test_float32_is_not_tried_again_on_an_input_that_takes_more(monkeypatch: pytest.MonkeyPatch) -> None:
    anchor, weights = Anchor(hardly_solved(), 1e-9), torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(1))
    types, factor = [], anchor._factor
    monkeypatch.setattr(anchor, "_factor", lambda dtype: types.append(dtype) or factor(dtype))
    for weight in weights:
        problem = Problem(weight, anchor=anchor)
        spectrum = problem.factor(4)
        torch.testing.assert_close(spectrum.target.double(), target_of(anchor, weight.double()), rtol=1e-3, atol=1e-3)
    assert types[0] == torch.float32
    assert set(types[1:]) == {torch.float64}


def test_a_moment_that_stays_singular_is_refused_with_its_numbers() -> None:
    layer = make_layer(3, 6, 40, kind="dead")
    says = r"\(6, 6\) \(eigenvalues .* to .*asymmetry .* on cpu\) is singular at shrinkage 0\.0; raise the shrinkage"
    with pytest.raises(DecompositionError, match=says):
        anchor_of(layer, 0.0).target(layer.weight)


def test_a_covariance_below_its_rounding_is_no_reason_to_stop() -> None:
    """Inputs that hardly vary, of squares that were added by cutting off, as tensor cores do it.

    The sums are about zero, as those of 16-bit inputs whose means are not dominant; second moments are 4e-6 too small,
    and the least eigenvalue of the covariance is below zero by more than a shrinkage of 0.1 lifts it.
    """
    random = torch.Generator().manual_seed(0)
    x = 5 + 0.05 * torch.randn(300, 64, generator=random, dtype=torch.float64)
    xh = x + 0.03 * torch.randn(300, 64, generator=random, dtype=torch.float64)
    weight = torch.randn(12, 64, generator=random, dtype=torch.float64)
    layer = Layer(weight, x, xh, x, x)
    true = layer.moments(ANCHORED).require_inputs()
    second = {
        "covariance": true.second_moment,
        "cross_covariance": true.cross_moment,
        "reference_covariance": true.reference_second_moment,
    }
    cut_off = {name: value - 4e-6 * true.count * second.get(name, 0) for name, value in true.sums.items()}
    kept = InputMoments.from_state(true.count, cut_off | {name: true.sums[name] for name in STREAMS}).compact()
    covariance = kept.covariance
    shrunk = 0.9 * covariance + 0.1 * covariance.diagonal().mean() * torch.eye(64, dtype=torch.float64)
    assert torch.linalg.eigvalsh(shrunk)[0] < 0

    anchor = Anchor(kept, 0.1, centred=True)
    assert anchor.target(weight.float()) is None
    target = target_of(anchor, weight)
    dense = token_error(layer, weight, centred=True)
    assert token_error(layer, target, centred=True) < dense
    assert token_error(layer, target_of(Anchor(true, 0.1, centred=True), weight), centred=True) < dense


@centred_or_not
@pytest.mark.parametrize("single", [False, True])
def test_a_wide_input_keeps_no_matrices_and_gives_the_same(
    centred: bool, single: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of its moments are made when they are multiplied: bit for bit the same, but for what is in memory."""
    monkeypatch.setattr("eckart.lowrank.anchor.ROWS", 24)
    layer = make_layer(7, 96, 400)
    inputs, weight = layer.moments(ANCHORED).require_inputs(), layer.weight
    if single:
        inputs, weight = inputs.compact(), weight.float()
    kept = Anchor(inputs, 0.1, centred=centred)
    target = target_of(kept, weight)
    assert kept._matrices is not None
    monkeypatch.setattr("eckart.lowrank.anchor.KEPT", 0)
    made = Anchor(inputs, 0.1, centred=centred)
    again = target_of(made, weight)
    assert torch.equal(again, target)
    assert floor_of(made, weight) == floor_of(kept, weight)
    assert made._matrices is None
