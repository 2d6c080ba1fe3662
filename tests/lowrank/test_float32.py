"""Products that leave out what is known, and those that bfloat16 makes exact."""

from __future__ import annotations

import pytest
import torch

from eckart.lowrank.float32 import COLUMNS, add_gram, exact_products, full_float32, lower_gram, mirror

WIDTHS = (1, COLUMNS - 1, COLUMNS, COLUMNS + 3, 2 * COLUMNS + 5)


def whole_numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Small whole numbers, whose sums of products are exact in float32: any lost or doubled one shows."""
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("width", WIDTHS)
def test_a_gram_is_added_in_halves_and_mirrored(width: int) -> None:
    first, second = whole_numbers(7, width), whole_numbers(9, width, seed=1)
    total = torch.zeros(width, width, dtype=torch.float64)
    add_gram(total, first)
    add_gram(total, second)
    mirror(total)
    assert torch.equal(total, (first.T @ first + second.T @ second).double())


@pytest.mark.parametrize("width", WIDTHS)
def test_the_lower_half_of_a_gram_is_all_an_eigensolver_reads(width: int) -> None:
    rows = whole_numbers(width, 6)
    gram, expected = lower_gram(rows, rows), rows @ rows.T
    assert torch.equal(gram.tril(), expected.tril())
    assert torch.equal(torch.linalg.eigvalsh(gram), torch.linalg.eigvalsh(expected))
    assert torch.isfinite(gram).all()


def test_products_of_bfloat16_numbers_are_exact() -> None:
    """With 2^7 + 1 next to 1, a product that were rounded to bfloat16's 8 bits on the way would lose the 1."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-127, 128, (300, 70), generator=generator).bfloat16()
    with exact_products(x):
        gram = x.float().T @ x.float()
    assert torch.equal(gram.double(), x.double().T @ x.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_numbers_are_multiplied_in_full(dtype: torch.dtype) -> None:
    x = (1 + torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) / 512).to(dtype)
    with exact_products(x):
        gram = x.float().T @ x.float()
    assert (gram.double() - x.double().T @ x.double()).abs().max() < 1e-4
    with exact_products(x):
        assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("before", ["highest", "high", "medium"])
def test_the_precision_that_was_set_comes_back(before: str) -> None:
    kept = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(before)
        with full_float32():
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == before
        with pytest.raises(RuntimeError), exact_products(torch.zeros(1, dtype=torch.bfloat16)):
            torch.zeros(2, 3) @ torch.zeros(2, 3)
        assert torch.get_float32_matmul_precision() == before
    finally:
        torch.set_float32_matmul_precision(kept)
