"""Codes: numbers in few bits, packed and unpacked, and the scales that blocks of them share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from eckart.lowrank.codes import BITS, SCALE, Codes, check_bits, pack, round_nearest, span, stored_bytes, unpack
from eckart.lowrank.storage import Storage

from .reference import laws

BLOCKS = ((1, 8), (1, 64), (8, 1), (64, 1))


def numbers(d_out: int, d_in: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(d_out, d_in, generator=random) * torch.rand(d_out, 1, generator=random).exp()


@laws(60)
@given(bits=st.sampled_from(BITS), d_out=st.integers(1, 9), d_in=st.integers(1, 40), seed=st.integers(0, 999))
def test_packed_codes_come_back(bits: int, d_out: int, d_in: int, seed: int) -> None:
    lowest, highest = span(bits)
    random = torch.Generator().manual_seed(seed)
    codes = torch.randint(lowest, highest + 1, (d_out, d_in), generator=random, dtype=torch.int8)
    codes[0, 0], codes[-1, -1] = lowest, highest
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert len(packed) == -(-d_out * d_in // 8) * bits
    assert torch.equal(unpack(packed, bits, (d_out, d_in)), codes)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("bits", BITS)
def test_every_number_has_the_nearest_code(bits: int, block: tuple[int, int]) -> None:
    """Of all codes, at the scale that its block has; and the bytes are those of codes and scales."""
    matrix = numbers(70, 90)
    coded = round_nearest(matrix, bits, block)
    assert coded.scales.dtype == SCALE
    assert coded.scales.shape == (-(-70 // block[0]), -(-90 // block[1]))
    lowest, highest = span(bits)
    levels = torch.arange(lowest, highest + 1).float()
    for row in (0, 13, 69):
        for column in (0, 8, 89):
            scale = float(coded.scales[row // block[0], column // block[1]])
            nearest = (levels * scale - matrix[row, column]).abs().min()
            assert abs(float(coded.dense()[row, column] - matrix[row, column])) == pytest.approx(
                float(nearest), abs=1e-6
            )
    packed = len(pack(coded.codes, bits))
    assert coded.num_bytes == packed + coded.scales.numel() * 2 == stored_bytes(70, 90, bits, block)


@laws(40)
@given(bits=st.sampled_from(BITS), seed=st.integers(0, 999), exponent=st.integers(-30, 30))
def test_a_scale_follows_its_numbers(bits: int, seed: int, exponent: int) -> None:
    """Numbers of any size lose the same share: bfloat16 scales neither overflow nor vanish."""
    matrix = numbers(4, 64, seed)
    lost, scaled = (
        float((round_nearest(each, bits, (1, 64)).dense() - each).square().sum() / each.square().sum())
        for each in (matrix, matrix * 2.0**exponent)
    )
    assert scaled == pytest.approx(lost, rel=1e-3)


@pytest.mark.parametrize("bits", BITS)
def test_more_bits_lose_less_and_clipping_never_more_than_spanning(bits: int) -> None:
    matrix = numbers(64, 256)
    lost = float((round_nearest(matrix, bits, (1, 64)).dense() - matrix).square().sum())
    spanning = matrix.view(64, 4, 64).abs().amax(-1, keepdim=True) / span(bits)[1]
    plain = (matrix.view(64, 4, 64) / spanning).round() * spanning
    assert lost <= 1.01 * float((plain.view(64, 256) - matrix).square().sum())
    finer = [each for each in BITS if each > bits]
    if finer:
        assert float((round_nearest(matrix, finer[0], (1, 64)).dense() - matrix).square().sum()) < lost / 2


def test_a_weighted_block_spends_its_levels_where_they_count() -> None:
    matrix, weights = numbers(16, 64), torch.ones(64)
    weights[:8] = 1000.0
    lost = [
        (round_nearest(matrix, 3, (1, 64), weights=each).dense() - matrix)[:, :8].square().sum()
        for each in (None, weights)
    ]
    assert lost[1] < lost[0]


def test_zeros_stay_zero() -> None:
    matrix = torch.zeros(3, 70)
    matrix[1] = 1.0
    coded = round_nearest(matrix, 4, (1, 64))
    assert torch.equal(coded.dense()[[0, 2]], matrix[[0, 2]])
    torch.testing.assert_close(coded.dense()[1], matrix[1], rtol=1e-2, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_numbers_are_rounded_once_to_a_type(dtype: torch.dtype) -> None:
    coded = round_nearest(numbers(8, 64), 8, (1, 64))
    exact = coded.codes.double() * coded.scales.double().repeat_interleave(64, 1)
    assert torch.equal(coded.dense(dtype), exact.to(dtype))


@pytest.mark.usefixtures("as_users_see_it")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_bits(5, 64), "bits 5 is none of 2, 3, 4, 8"),
        (lambda: check_bits(4, 4), "group 4 is below 8"),
        (lambda: Storage(base=16), "bits 16 is none of"),
        (lambda: round_nearest(torch.full((2, 8), torch.inf), 4, (1, 8)), "not finite"),
    ],
    ids=["bits", "group", "storage", "infinite"],
)
def test_what_does_not_go_is_refused(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()  # type: ignore[operator]


@pytest.mark.parametrize("rank", [None, 1, 5, 12])
@pytest.mark.parametrize("storage", [Storage(4), Storage(None, 8), Storage(3, 4, 16), Storage(8), Storage(4, None, 8)])
def test_a_storage_says_its_bytes(storage: Storage, rank: int | None) -> None:
    """Those of the tensors that are stored."""
    d_out, d_in, group = 20, 36, storage.group
    total = 0
    if storage.base is not None:
        total += round_nearest(numbers(d_out, d_in), storage.base, (1, group)).num_bytes
    elif rank is None:
        total += d_out * d_in * 2
    if rank is not None and storage.factors is None:
        total += 2 * rank * (d_out + d_in)
    elif rank is not None:
        assert storage.factors is not None
        total += round_nearest(numbers(d_out, rank), storage.factors, (group, 1)).num_bytes
        total += round_nearest(numbers(rank, d_in), storage.factors, (1, group)).num_bytes
    assert storage.num_bytes(d_out, d_in, rank, 2) == total
    assert Storage.from_dict(storage.to_dict()) == storage


def test_codes_say_their_shape() -> None:
    coded = Codes(torch.zeros(3, 5, dtype=torch.int8), torch.ones(3, 1, dtype=SCALE), 4, (1, 64))
    assert coded.shape == (3, 5)
