"""Bands: the rows of a map, and the errors that are measured on them, are those of the whole matrix."""

from __future__ import annotations

import pytest
import torch

import eckart.lowrank.bands
from eckart.lowrank import Factors, output_error
from eckart.lowrank.bands import bands, wide_product
from eckart.lowrank.codes import round_nearest
from eckart.lowrank.pivoting import Pivoted, pivot, split
from eckart.lowrank.rounding import CodedFactors
from eckart.lowrank.storage import Storage

from .reference import make_layer

OUT, IN, RANK = 22, 16, 5


def low_rank(dtype: torch.dtype = torch.float64) -> Factors:
    random = torch.Generator().manual_seed(1)
    left, right, bias = (
        torch.randn(*shape, generator=random, dtype=torch.float64) for shape in ((OUT, RANK), (RANK, IN), (OUT,))
    )
    return Factors(left, right, bias).to(dtype)


def maps() -> dict[str, Factors | Pivoted | CodedFactors]:
    factors, weight = low_rank(), make_layer(OUT, IN, 30).weight
    member = split(pivot(factors), [9, 13])[1]
    assert isinstance(member, Pivoted)
    # A last group of columns, and of rows, that is smaller than the others.
    left, right = (round_nearest(side, 4, block) for side, block in ((factors.left, (8, 1)), (factors.right, (1, 12))))
    base = round_nearest(weight, 4, (1, 12))
    return {
        "plain": factors,
        "half": low_rank(torch.float16),
        "pivoted": pivot(factors).to(torch.float32),
        "shared pivots": member,
        "codes": CodedFactors(Storage(4, None, 8), base, left, right, factors.bias),
        "corrected": CodedFactors(Storage(4, None, 8), base, factors.left, right, factors.bias),
        "quantised": CodedFactors(Storage(4, None, 8), base, None, None, factors.bias),
    }


@pytest.mark.parametrize("name", list(maps()))
def test_rows_are_those_of_the_matrix(name: str) -> None:
    layout = maps()[name]
    whole = layout.dense() if isinstance(layout, CodedFactors) else layout.to(torch.float64).dense()
    for step in (1, 3, 8, layout.d_out):
        for start in range(0, layout.d_out, step):
            place = slice(start, min(start + step, layout.d_out))
            rows = layout.rows(place)
            assert rows.dtype == torch.float64
            torch.testing.assert_close(rows, whole[place], rtol=1e-12, atol=1e-12)


def test_bands_are_all_rows_once_and_of_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eckart.lowrank.bands, "BYTES", 8 * IN * 4)
    assert list(bands(10, IN)) == [slice(0, 4), slice(4, 8), slice(8, 10)]
    assert list(bands(2, 10**9)) == [slice(0, 1), slice(1, 2)]  # a row is the least that there is


def test_a_product_is_taken_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eckart.lowrank.bands, "TOGETHER", 2)
    single = low_rank(torch.float32)
    exact = single.left.double() @ single.right.double()
    torch.testing.assert_close(wide_product(single.left, single.right), exact, rtol=1e-14, atol=1e-14)
    nothing = wide_product(torch.zeros(3, 0), torch.zeros(0, 4))
    assert torch.equal(nothing, torch.zeros(3, 4, dtype=torch.float64))


@pytest.mark.parametrize("name", [name for name in maps() if name != "shared pivots"])
@pytest.mark.parametrize("streams", [1, 2])
@pytest.mark.parametrize("corrects", [False, True])
def test_an_error_does_not_depend_on_the_bands(
    monkeypatch: pytest.MonkeyPatch, name: str, streams: int, corrects: bool
) -> None:
    layout, layer = maps()[name], make_layer(OUT, IN, 30)
    needs = frozenset({"second_moment"} if streams == 1 else {"second_moment", "cross_moment"})
    base = torch.ones_like(layer.weight) if corrects else None

    def measured() -> tuple[float, float]:
        return output_error(layer.weight, layout, layer.moments(needs), base=base)

    whole = measured()
    monkeypatch.setattr(eckart.lowrank.bands, "BYTES", 8 * IN * 3)
    assert measured() == pytest.approx(whole, rel=1e-12)
    rows = layout.rows(slice(0, OUT)) + (0 if base is None else base)
    read, given = layer.x @ layer.weight.T, (layer.x if streams == 1 else layer.xh) @ rows.T
    assert layout.bias is not None
    error = (read - given - layout.bias.double()).square().sum(1).mean()
    assert whole == pytest.approx((float(error), float(read.square().sum(1).mean())), rel=1e-9)


def test_no_band_is_larger_than_it_should_be(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is any map made dense."""
    seen: list[int] = []
    original = Pivoted.rows

    def rows(self: Pivoted, place: slice) -> torch.Tensor:
        seen.append(place.stop - place.start)
        return original(self, place)

    monkeypatch.setattr(Pivoted, "rows", rows)
    monkeypatch.setattr(Pivoted, "dense", None)
    monkeypatch.setattr(eckart.lowrank.bands, "BYTES", 8 * IN * 4)
    layer = make_layer(OUT, IN, 30)
    output_error(layer.weight, pivot(low_rank()), layer.moments(frozenset({"second_moment"})))
    assert seen == [4] * 5 + [2]
