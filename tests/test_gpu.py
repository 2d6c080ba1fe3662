"""A GPU computes what the processor does, path by path; benchmarks/gpu.py comes through on a processor, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from eckart.lowrank import Factors, pivoting
from places import BENCHMARKS

from gpu_checks import CHECKS, failures  # isort: skip (places says where it is)

CUDA = torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device here")
@pytest.mark.parametrize("name", CHECKS)
def test_a_gpu_computes_what_the_processor_does(name: str, tmp_path: Path) -> None:
    assert not failures(CHECKS[name](CUDA, tmp_path))


@pytest.mark.parametrize("name", ["moments", "factors", "inference"])
def test_the_checks_compare_with_float64_and_pass_on_a_processor(name: str, tmp_path: Path) -> None:
    differences = CHECKS[name](torch.device("cpu"), tmp_path)
    assert len(differences) > 20
    assert not failures(differences)


def test_a_difference_above_its_tolerance_and_nan_are_failures() -> None:
    assert failures({"fine": (1e-7, 1e-6), "large": (2e-6, 1e-6), "nan": (float("nan"), 1e-6)}).keys() == {
        "large",
        "nan",
    }


@pytest.mark.slow
def test_the_script_comes_through_in_small(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "ignore", str(BENCHMARKS / "gpu.py"), "--device", "cpu", "--shape", "tiny"]
    parts = ["rates", "parts", "asvd-i", "best", "plain"]
    finished = subprocess.run(
        [*command, "--json", str(tmp_path / "gpu.json"), "--only", *parts], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    facts = json.loads((tmp_path / "gpu.json").read_text())
    assert facts["asvd-i"]["whole"] >= facts["asvd-i"]["factor"] > 0
    assert facts["best, 2 blocks (EXTRAPOLATED)"]["anchored walk"] > 0
    assert facts["plain"]["factor a block (4 x, 2 x and 1 x these)"] > 0


def test_a_recipe_passes_on_a_processor(tmp_path: Path) -> None:
    assert not failures(CHECKS["recipe: best, joint, refit"](torch.device("cpu"), tmp_path))


@pytest.mark.parametrize(("d_out", "rank"), [(90, 20), (31, 30), (30, 30), (12, 1)])
def test_elimination_chooses_rows_that_the_others_are_combinations_of(d_out: int, rank: int) -> None:
    generator = torch.Generator().manual_seed(d_out)
    geometry = torch.randn(d_out, rank, generator=generator, dtype=torch.float64) * torch.logspace(0, -6, rank)
    chosen = pivoting._choose_by_elimination(geometry)
    assert chosen is not None
    pivots, others, combined = chosen
    assert sorted([*pivots, *others]) == list(range(d_out))
    torch.testing.assert_close(combined @ geometry[pivots], geometry[others], rtol=0, atol=1e-12)
    assert combined.abs().max() <= pivoting.LARGEST_COEFFICIENT if len(others) else combined.numel() == 0


def test_elimination_gives_up_where_rounding_would_decide() -> None:
    geometry = torch.randn(40, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert pivoting._choose_by_elimination(torch.cat([geometry, geometry[:, :2]], 1)) is None
    assert pivoting._choose_by_elimination(geometry * float("nan")) is None


def test_a_pivoted_map_is_the_same_whoever_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    factors = Factors(torch.randn(50, 12, generator=generator), torch.randn(12, 33, generator=generator))
    monkeypatch.setattr(
        pivoting, "_choose", lambda geometry, _rank: pivoting._choose_by_elimination(torch.from_numpy(geometry))
    )
    layout = pivoting.pivot(factors)
    rows = torch.cat([layout.pivots, layout.coefficients @ layout.pivots])[layout.order]
    np.testing.assert_allclose(rows.numpy(), factors.dense().double().numpy(), atol=1e-5)
