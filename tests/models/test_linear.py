"""LowRankLinear: computes its factors in every layout, and looks enough like a linear for code that reads `.weight`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from eckart.lowrank import Factors, Layout, Pivoted, pivot, split
from eckart.lowrank.pivoting import LAYOUTS, check_order
from eckart.models.linear import LowRankLinear

D_IN, RANK = 5, 3
# Of three linears that share an input: 7 + 4 + 2 rows, the last of them in all likelihood without a pivot of its own.
SIZES = (7, 4, 2)
CPU = torch.device("cpu")


def made_factors(bias: bool = False, rows: int = 7) -> Factors:
    generator = torch.Generator().manual_seed(0)
    sizes = [(rows, RANK), (RANK, D_IN), (rows,)]
    left, right, extra = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    left[-SIZES[-1] :] *= 0.01
    return Factors(left, right, extra if bias else None)


def in_layout(factors: Factors, layout: Layout) -> Factors | Pivoted:
    return pivot(factors) if layout == "pivoted" else factors


def made_group(
    layout: Layout, dtype: torch.dtype = torch.float64, *, bias: bool = False
) -> tuple[Factors, list[LowRankLinear]]:
    """Factors of the stacked map, and the modules of its members; the first lends the right factor."""
    factors = made_factors(bias, sum(SIZES))
    modules: list[LowRankLinear] = []
    for member in split(in_layout(factors, layout), SIZES):
        lender = modules[0] if modules else None
        modules.append(LowRankLinear.from_factors(member, None, device=CPU, dtype=dtype, right_of=lender))
    return factors, modules


def rows(seed: int = 1) -> Tensor:
    return torch.randn(2, 4, D_IN, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_computes_its_factors_and_both_biases(layout: Layout, own: bool, added: bool) -> None:
    factors = made_factors(added)
    bias = torch.arange(7.0) if own else None
    module = LowRankLinear.from_factors(in_layout(factors, layout), bias, device=CPU, dtype=torch.float64)
    x = rows()
    torch.testing.assert_close(module(x), factors(x) + (0 if bias is None else bias))
    assert (module.bias is None) == (not own and not added)
    torch.testing.assert_close(module.dense(), factors.dense())
    assert module.rank == 3
    assert (module.in_features, module.out_features) == (5, 7)
    assert "rank=3" in repr(module)
    assert ("pivots=3" in repr(module)) == (layout == "pivoted")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(5,), (1, 5), (0, 5), (2, 3, 5), (2, 1, 3, 5)])
def test_takes_any_batch(layout: Layout, shape: tuple[int, ...]) -> None:
    factors = made_factors(True)
    module = LowRankLinear.from_factors(in_layout(factors, layout), None, device=CPU, dtype=torch.float64)
    x = torch.ones(shape, dtype=torch.float64)
    y = module(x)
    assert y.is_contiguous()
    torch.testing.assert_close(y, factors(x))


@pytest.mark.parametrize("rank", [1, 7])
@pytest.mark.parametrize("d_in", [7, 9])
def test_pivoted_at_rank_one_and_at_full_rank(rank: int, d_in: int) -> None:
    left, right = torch.randn(7, rank, dtype=torch.float64), torch.randn(rank, d_in, dtype=torch.float64)
    module = LowRankLinear.from_factors(pivot(Factors(left, right)), None, device=CPU, dtype=torch.float64)
    assert module.left.weight.shape == (7 - rank, rank)
    x = torch.randn(3, d_in, dtype=torch.float64)
    torch.testing.assert_close(module(x), x @ (left @ right).T)
    torch.testing.assert_close(module.dense(), left @ right)


def test_stores_factors_bias_and_an_empty_sentinel() -> None:
    module = LowRankLinear.from_factors(made_factors(True), None, device=CPU, dtype=torch.bfloat16)
    assert {name: (tuple(value.shape), value.dtype) for name, value in module.state_dict().items()} == {
        "left.weight": ((7, 3), torch.bfloat16),
        "right.weight": ((3, 5), torch.bfloat16),
        "bias": ((7,), torch.bfloat16),
        "weight": ((0,), torch.bfloat16),
    }
    assert module.half().weight.dtype == torch.float16


def test_pivoted_stores_less_and_an_order() -> None:
    module = LowRankLinear.from_factors(pivot(made_factors()), None, device=CPU, dtype=torch.bfloat16)
    assert {name: (tuple(value.shape), value.dtype) for name, value in module.state_dict().items()} == {
        "left.weight": ((4, 3), torch.bfloat16),
        "right.weight": ((3, 5), torch.bfloat16),
        "order": ((7,), torch.int32),
        "weight": ((0,), torch.bfloat16),
    }
    order = module.order.clone()
    for change in (module.half, module.bfloat16, module.float, lambda: module.to(torch.bfloat16)):
        assert torch.equal(change().order, order)
        assert module.order.dtype == torch.int32


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dense_is_rounded_once(layout: Layout) -> None:
    module = LowRankLinear.from_factors(in_layout(made_factors(), layout), None, device=CPU, dtype=torch.bfloat16)
    exact = module.left.weight.double() @ module.right.weight.double()
    if module.order is not None:
        exact = torch.cat([module.right.weight.double(), exact])[module.order]
    assert module.dense().dtype == torch.bfloat16
    torch.testing.assert_close(module.dense().double(), exact, rtol=2**-8, atol=0)


def test_starts_with_a_valid_order() -> None:
    module = LowRankLinear(D_IN, 7, RANK, bias=True, pivots=2)
    check_order(module.order, RANK, module.left.out_features)
    assert module(torch.ones(3, D_IN)).shape == (3, 7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_are_those_of_the_plain_product(layout: Layout) -> None:
    module = LowRankLinear.from_factors(in_layout(made_factors(), layout), None, device=CPU, dtype=torch.float64)
    x = rows().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, *_: module(x), (x, module.left.weight, module.right.weight))


# Linears that share a right factor


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_members_compute_the_stacked_map(layout: Layout, bias: bool) -> None:
    factors, modules = made_group(layout, bias=bias)
    x = rows()
    torch.testing.assert_close(torch.cat([module(x) for module in modules], -1), factors(x))
    torch.testing.assert_close(torch.cat([module.dense() for module in modules]), factors.dense())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_right_factor_is_stored_once(layout: Layout) -> None:
    factors, modules = made_group(layout)
    group = torch.nn.ModuleList(modules)
    assert all(module.right is modules[0].right for module in modules)
    assert [key for key in group.state_dict() if "right" in key] == ["0.right.weight"]
    assert sum(p.numel() for p in group.parameters()) == in_layout(factors, layout).num_params
    assert ["right shared" in repr(module) for module in modules] == [False, True, True]
    if layout == "pivoted":
        assert sum(module.pivots for module in modules) == RANK


def test_a_member_of_a_member_borrows_from_its_lender() -> None:
    _, (first, second, _) = made_group("plain")
    third = LowRankLinear(D_IN, 4, RANK, bias=False, right_of=second)
    assert third.lender is first


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["copy", "pickle", "type", "meta"])
def test_sharing_survives(layout: Layout, way: str) -> None:
    factors, modules = made_group(layout)
    group = torch.nn.ModuleList(modules)
    other = {
        "copy": lambda: copy.deepcopy(group),
        "pickle": lambda: pickle.loads(pickle.dumps(group)),
        "type": lambda: copy.deepcopy(group).float().double(),
        "meta": lambda: copy.deepcopy(group).to("meta").to_empty(device="cpu"),
    }[way]()
    assert all(module.right is other[0].right for module in other)
    assert other[0].right is not group[0].right
    assert other[0].right.weight is not group[0].right.weight
    if way == "meta":
        other.load_state_dict(group.state_dict())
    tolerance = 1e-5 if way == "type" else 1e-12
    x = rows()
    torch.testing.assert_close(torch.cat([m(x) for m in other], -1), factors(x), rtol=tolerance, atol=tolerance)
    with torch.no_grad():
        other[0].right.weight.zero_()
    torch.testing.assert_close(other[2].dense(), torch.zeros_like(other[2].dense()))
    torch.testing.assert_close(torch.cat([m(x) for m in group], -1), factors(x))


def test_a_module_put_around_the_right_factor_serves_every_member() -> None:
    """What adapters do: they put a module of their own in the place of the lender's child."""
    _, modules = made_group("plain")
    x = rows()
    before = [module(x) for module in modules]
    modules[0].right = torch.nn.Sequential(modules[0].right, torch.nn.Tanh())
    for module, old in zip(modules, before, strict=True):
        new = module(x)
        torch.testing.assert_close(new, torch.tanh(x @ modules[0].right[0].weight.T) @ module.left.weight.T)
        assert not torch.allclose(new, old)


# Refusals


def test_rank_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 0 is not positive"):
        LowRankLinear(4, 4, 0, bias=False)


@pytest.mark.parametrize(("pivots", "limit"), [(-1, 3), (4, 3), (3, 2)])
def test_more_pivots_than_there_can_be_are_refused(pivots: int, limit: int) -> None:
    with pytest.raises(ValueError, match=rf"{pivots} pivots are not in 0 \.\.\. {limit}"):
        LowRankLinear(9, 4 if limit == 3 else 2, 3, bias=False, pivots=pivots)


@pytest.mark.parametrize(("d_in", "rank", "pivots"), [(6, 3, None), (5, 2, None), (5, 3, 1)])
def test_a_lender_of_another_kind_is_refused(d_in: int, rank: int, pivots: int | None) -> None:
    lender = LowRankLinear(5, 7, 3, bias=False)
    with pytest.raises(ValueError, match=r"cannot share the right factor of one of rank 3, d_in 5, plain"):
        LowRankLinear(d_in, 7, rank, bias=False, pivots=pivots, right_of=lender)
    assert lender.product.readers == 1


def test_factors_of_another_split_are_refused() -> None:
    lender = LowRankLinear.from_factors(made_factors(), None, device=CPU, dtype=torch.float32)
    other = Factors(made_factors().left, 2 * made_factors().right)
    with pytest.raises(ValueError, match="the factors' right is not the lender's"):
        LowRankLinear.from_factors(other, None, device=CPU, dtype=torch.float32, right_of=lender)
    assert lender.product.readers == 1
