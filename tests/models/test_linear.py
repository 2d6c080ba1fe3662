"""LowRankLinear: computes its factors, and looks enough like a linear for code that reads `.weight`."""

from __future__ import annotations

import pytest
import torch

from eckart.lowrank import Factors
from eckart.models.linear import LowRankLinear


def made_factors(bias: bool) -> Factors:
    generator = torch.Generator().manual_seed(0)
    sizes = [(7, 3), (3, 5), (7,)]
    left, right, extra = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
    return Factors(left, right, extra if bias else None)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("added", [True, False])
def test_computes_its_factors_and_both_biases(own: bool, added: bool) -> None:
    factors = made_factors(added)
    bias = torch.arange(7.0) if own else None
    module = LowRankLinear.from_factors(factors, bias, device=torch.device("cpu"), dtype=torch.float64)
    x = torch.randn(2, 4, 5, dtype=torch.float64)
    expected = factors(x) + (0 if bias is None else bias)
    torch.testing.assert_close(module(x), expected)
    assert (module.bias is None) == (not own and not added)
    torch.testing.assert_close(module.dense(), factors.dense())
    assert module.rank == 3
    assert (module.in_features, module.out_features) == (5, 7)
    assert "rank=3" in repr(module)


def test_stores_factors_bias_and_an_empty_sentinel() -> None:
    module = LowRankLinear.from_factors(made_factors(True), None, device=torch.device("cpu"), dtype=torch.bfloat16)
    assert {name: (tuple(value.shape), value.dtype) for name, value in module.state_dict().items()} == {
        "left.weight": ((7, 3), torch.bfloat16),
        "right.weight": ((3, 5), torch.bfloat16),
        "bias": ((7,), torch.bfloat16),
        "weight": ((0,), torch.bfloat16),
    }
    assert module.half().weight.dtype == torch.float16


def test_dense_is_rounded_once() -> None:
    factors = made_factors(False)
    module = LowRankLinear.from_factors(factors, None, device=torch.device("cpu"), dtype=torch.bfloat16)
    exact = module.left.weight.double() @ module.right.weight.double()
    assert module.dense().dtype == torch.bfloat16
    torch.testing.assert_close(module.dense().double(), exact, rtol=2**-8, atol=0)


def test_rank_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="rank 0 is not positive"):
        LowRankLinear(4, 4, 0, bias=False)
