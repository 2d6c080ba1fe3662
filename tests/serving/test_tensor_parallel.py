"""Linears fused and cut for several processes: together, the shares compute what the linears do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart.lowrank import Factors, factor, pivot, split
from eckart.lowrank.codes import round_nearest
from eckart.lowrank.rounding import CodedFactors
from eckart.lowrank.storage import Storage
from eckart.models.coded import CodedLinear
from eckart.models.linear import LowRankLinear
from eckart.models.weight_files import CheckpointError
from eckart.serving.tensor_parallel import Arriving, Share, SharedLayer, Span, cut_order, rows_of, share_of

D_IN, SIZES = 24, (32, 16, 16)
CPU: dict[str, Any] = {"device": torch.device("cpu"), "dtype": torch.float64}


def weight_of(rows: int, seed: int) -> Tensor:
    return torch.randn(rows, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def plain(rank: int, rows: int, *, bias: bool = False, pivoted: bool = False) -> LowRankLinear:
    cut = factor(weight_of(rows, rank)).cut(rank)
    factors = replace(cut, bias=torch.arange(rows) / 8) if bias else cut
    return LowRankLinear.from_factors(pivot(factors) if pivoted else factors, None, **CPU)


def joint(pivoted: bool) -> list[nn.Module]:
    """Linears that share the first one's right factor."""
    factors = factor(torch.cat([weight_of(rows, rows) for rows in SIZES])).cut(9)
    members = split(pivot(factors) if pivoted else factors, list(SIZES))
    made: list[LowRankLinear] = []
    for member in members:
        made.append(LowRankLinear.from_factors(member, None, **CPU, right_of=made[0] if made else None))
    return list(made)


def coded(rows: int, *, base: int | None, factors: int | None) -> CodedLinear:
    """A linear in few bits, with a base, factors, or both."""
    cut: Factors = factor(weight_of(rows, 5).float()).cut(8)
    return CodedLinear.from_coded(
        CodedFactors(
            Storage(base, factors, 8),
            None if base is None else round_nearest(weight_of(rows, 6).float(), base, (1, 8)),
            cut.left if factors is None else round_nearest(cut.left, factors, (8, 1)),
            cut.right if factors is None else round_nearest(cut.right, factors, (1, 8)),
            torch.arange(rows) / 8,
        ),
        None,
        **CPU,
    )


def dense(rows: int) -> nn.Linear:
    layer = nn.Linear(D_IN, rows, bias=False, dtype=torch.float64)
    layer.weight.data = weight_of(rows, rows + 1)
    return layer


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "plain, three ranks, one bias": lambda: [plain(7, 32), plain(3, 16, bias=True), plain(11, 16)],
    "pivoted": lambda: [plain(7, 32, pivoted=True), plain(16, 16, pivoted=True), plain(5, 16, pivoted=True, bias=True)],
    "joint": lambda: joint(False),
    "joint, pivoted": lambda: joint(True),
    "some dense": lambda: [dense(32), plain(3, 16, bias=True), dense(16)],
    "dense, pivoted, plain": lambda: [dense(32), plain(6, 16, pivoted=True), plain(4, 16)],
    "few bits": lambda: [
        coded(32, base=4, factors=None),
        coded(16, base=None, factors=8),
        coded(16, base=3, factors=4),
    ],
}


def lenders_of(linears: list[nn.Module]) -> list[int]:
    return [linears.index(getattr(each, "lender", None) or each) for each in linears]


def expected(linears: list[nn.Module], x: Tensor) -> Tensor:
    return torch.cat([each(x) for each in linears], -1)


@pytest.mark.parametrize("processes", [1, 2, 4])
@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_outputs_of_divided_outputs(kind: str, processes: int) -> None:
    linears, x = LAYERS[kind](), torch.randn(5, D_IN, dtype=torch.float64)
    whole = [each(x) for each in linears]
    for process in range(processes):
        spans = [Span.of(size // processes, process, processes) for size in SIZES]
        shares = [share_of(each, rows_of([span])[1], Span.of(D_IN)) for each, span in zip(linears, spans, strict=True)]
        layer = SharedLayer([share.to(**CPU) for share in shares], lenders_of(linears))
        wanted = [y[:, span.start : span.start + span.size] for y, span in zip(whole, spans, strict=True)]
        torch.testing.assert_close(layer(x), torch.cat(wanted, -1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduced", [True, False], ids=["rank values summed", "outputs summed"])
@pytest.mark.parametrize("pivoted", [False, True], ids=["plain", "pivoted"])
@torch.no_grad()
def test_outputs_of_divided_inputs(pivoted: bool, reduced: bool) -> None:
    linear, x, rows = (
        plain(7, 16, bias=True, pivoted=pivoted),
        torch.randn(5, D_IN, dtype=torch.float64),
        torch.arange(16),
    )
    columns = [Span.of(D_IN // 3, process, 3) for process in range(3)]
    inputs = [x[:, each.start : each.start + each.size] for each in columns]
    shares = [share_of(linear, rows, each) for each in columns]
    if reduced:
        # What the runtime's sum over processes gives to each of them.
        total = torch.stack([part @ share.right.mT for part, share in zip(inputs, shares, strict=True)]).sum(0)
        for part, share in zip(inputs, shares, strict=True):
            torch.testing.assert_close(SharedLayer([share], [0], reduce=lambda _part: total)(part), linear(x))
    else:
        first, *others = shares
        parts = [SharedLayer([share], [0]) for share in (first, *(replace(each, bias=None) for each in others))]
        torch.testing.assert_close(sum(layer(part) for layer, part in zip(parts, inputs, strict=True)), linear(x))


def test_a_linear_of_several_parts_takes_its_rows_of_each() -> None:
    # One linear holds q of 8, k and v of 4 each: the second of two processes has the second half of all three.
    total, rows = rows_of([Span.of(4, 1, 2), Span.of(2, 1, 2), Span.of(2, 1, 2)])
    assert (total, rows.tolist()) == (16, [4, 5, 6, 7, 10, 11, 14, 15])


def test_heads_that_are_copied() -> None:
    # One head of keys for four processes, of 8 outputs, and two heads: neighbours have the same.
    assert [Span.of(8, process, 4, copies=4) for process in range(4)] == [Span(8, 0, 8)] * 4
    assert [Span.of(8, process, 4, copies=2).start for process in range(4)] == [0, 0, 8, 8]
    assert Span.of(8, 3, 4, copies=2).full == 16


def test_coefficients_that_a_share_needs() -> None:
    needed, order = cut_order(torch.tensor([3, 0, 4, 1, 2, 5], dtype=torch.int32), 3, torch.tensor([2, 4, 5]))
    assert (needed.tolist(), order.tolist()) == ([1, 2], [3, 2, 4])


SPECS: dict[str, Any] = {"q": {"rank": 7, "bias": True}, "k": {"rank": 16, "bias": False, "pivots": 16}, "v": None}


def arriving(**changes: Any) -> tuple[Arriving, list[nn.Module]]:
    rows = [rows_of([Span.of(size)]) for size in SIZES]
    linears = [plain(7, 32, bias=True), plain(16, 16, pivoted=True), dense(16)]
    return Arriving({**SPECS, **changes}, rows, Span.of(D_IN), **CPU), linears


def hand_over(layer: Arriving, linears: list[nn.Module], **changes: Tensor) -> None:
    for i, linear in enumerate(linears):
        for key, tensor in linear.state_dict().items():
            layer.take(i, key, changes.get(f"{layer.names[i]}.{key}".replace(".", "_"), tensor))


@torch.no_grad()
def test_tensors_may_arrive_in_any_order_and_turned() -> None:
    layer, linears = arriving()
    x = torch.randn(3, D_IN, dtype=torch.float64)
    for i in (2, 0, 1):
        for key, tensor in reversed(linears[i].state_dict().items()):
            layer.take(i, key, tensor.mT if key == "left.weight" and tensor.numel() else tensor)
    torch.testing.assert_close(SharedLayer(layer.finished(), layer.lenders)(x), expected(linears, x))


def test_a_buffer_that_is_filled_again_changes_nothing() -> None:
    layer, linears = arriving()
    buffer = linears[0].left.weight.detach().clone()
    layer.take(0, "left.weight", buffer)
    buffer.zero_()
    layer.take(0, "right.weight", linears[0].right.weight)
    layer.take(0, "bias", linears[0].bias)
    torch.testing.assert_close(layer.shares[0].left, linears[0].left.weight.detach())


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"q_left_weight": torch.zeros(32, 6)}, r"q.left.weight has shape \(32, 6\), expected \(32, 7\)"),
        ({"q_right_weight": torch.full((7, D_IN), float("nan"))}, "q.right.weight has numbers that are not finite"),
        ({"k_order": torch.zeros(16, dtype=torch.int32)}, "k.order: an order of 16 outputs must take"),
    ],
    ids=["shape", "not finite", "order"],
)
def test_a_damaged_tensor_is_named(changes: dict[str, Tensor], error: str) -> None:
    with pytest.raises(CheckpointError, match=error):
        hand_over(*arriving(), **changes)


def test_what_does_not_fit_is_named() -> None:
    layer, _ = arriving()
    with pytest.raises(CheckpointError, match=r"lack q.bias, q.right.weight, q.left.weight, k.order, .*v.weight"):
        layer.finished()
    with pytest.raises(CheckpointError, match=r"q.base.codes is in the checkpoint's files, and not in its rank map"):
        layer.take(0, "base.codes", torch.ones(3))
    with pytest.raises(CheckpointError, match=r"v shares the right factor of o, which is in another layer .* --dense"):
        arriving(v={"rank": 4, "bias": False, "right_of": "o"})
    with pytest.raises(CheckpointError, match=r"k has no bias in the checkpoint's rank map, and one in the model's"):
        layer.give_up_biases()
    with pytest.raises(CheckpointError, match=r"does not fit the model: 17 pivots"):
        arriving(k={"rank": 20, "bias": False, "pivots": 17})


def test_the_runtime_may_load_biases_itself() -> None:
    layer, linears = arriving(k={"rank": 16, "bias": True, "pivots": 16})
    layer.give_up_biases()
    hand_over(layer, [nn.Module(), nn.Module(), linears[2]])
    layer.take(0, "right.weight", linears[0].right.weight)
    layer.take(0, "left.weight", linears[0].left.weight)
    assert isinstance(layer.shares[0], Share)
    assert layer.shares[0].bias is None


def test_the_product_is_the_runtimes() -> None:
    linear, called = plain(7, 16), []
    multiply = partial(
        lambda calls, matrix, x: (calls.append(tuple(matrix.weight.shape)), x @ matrix.weight.mT)[1], called
    )
    layer = SharedLayer([share_of(linear, torch.arange(16), Span.of(D_IN))], [0], multiply=multiply)
    x = torch.randn(2, D_IN, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x))
    assert called == [(7, D_IN), (16, 7)] == [tuple(matrix.weight.shape) for matrix in layer.matrices]
