"""Threads: one of scipy's for small matrices, and as many as before for others and afterwards."""

from __future__ import annotations

from typing import Any

import pytest
import scipy.linalg
import torch
from threadpoolctl import ThreadpoolController

from eckart.lowrank import Factors, pivoting
from eckart.lowrank.threads import ALONE, few_threads


def taken() -> set[int]:
    """How many threads the libraries of scipy and numpy take."""
    return {each["num_threads"] for each in ThreadpoolController().info() if each["internal_api"] == "openblas"}


@pytest.mark.skipif(not taken(), reason="scipy and numpy have other libraries here")
def test_a_small_matrix_takes_one_and_a_large_one_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with ThreadpoolController().limit(limits=2):
        before = taken()
        with few_threads(ALONE):
            assert taken() == {1}
        assert taken() == before
        with few_threads(ALONE + 1):
            assert taken() == before
        with pytest.raises(ValueError, match="inside"), few_threads(1):
            raise ValueError("inside")
        assert taken() == before

        seen, qr = [], scipy.linalg.qr

        def note(*args: Any, **options: Any) -> Any:
            seen.append(taken())
            return qr(*args, **options)

        monkeypatch.setattr(scipy.linalg, "qr", note)
        pivoting.pivot(Factors(torch.randn(12, 4), torch.randn(4, 8)))
        assert seen == [{1}]
