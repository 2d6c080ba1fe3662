"""The wheel: what is installed from it works in another directory, with its files other than Python in place."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from zipfile import ZipFile

import pytest

from reports.make_runs import make_run

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "eckart"
Installed = Callable[..., str]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that nothing is left in the repository and nothing that lay there is taken along."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(PACKAGE, tree / "src" / "eckart", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", str(out), str(tree)], check=True, timeout=600)
    (file,) = out.iterdir()
    return file


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Runs the `eckart` that the wheel brings, from an empty directory; gives what it prints."""
    place = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(place)]
    subprocess.run([*command, str(wheel)], check=True, timeout=600)
    environment = {**os.environ, "PYTHONPATH": str(place), "COLUMNS": "200"}

    def run(*arguments: str | Path, program: str | Path = place / "bin" / "eckart") -> str:
        return subprocess.run(
            [str(program), *map(str, arguments)],
            cwd=tmp_path_factory.mktemp("elsewhere"),
            env=environment,
            check=True,
            capture_output=True,
            text=True,
            timeout=600,
        ).stdout

    assert Path(run("-c", "import eckart; print(eckart.__file__)", program=sys.executable)).is_relative_to(place)
    return run


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    files = {str(file.relative_to(PACKAGE.parent)) for file in PACKAGE.rglob("*") if file.is_file()}
    kept = {file for file in files if "__pycache__" not in file}
    with ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if name.startswith("eckart/")}
    assert packed == kept
    assert {"eckart/py.typed", "eckart/__init__.pyi", "eckart/data/builtin/model/model.safetensors"} <= packed
    assert any(name.startswith("eckart/runs/studies/") for name in packed)


def test_what_is_installed_runs_elsewhere(installed: Installed, tmp_path: Path) -> None:
    assert installed("--version").startswith("eckart ")
    assert "compress" in installed("--help")
    make_run(tmp_path / "run")
    installed("report", tmp_path / "run", "--out", tmp_path / "page.html")  # by the templates
    assert "</html>" in (tmp_path / "page.html").read_text()


@pytest.mark.slow
def test_what_is_installed_has_its_studies_and_its_model(installed: Installed) -> None:
    assert "nsvd-i" in installed("methods")
    listed = installed("reproduce")
    assert all(file.stem in listed for file in (PACKAGE / "runs" / "studies").glob("*.yaml"))
    assert "model.layers.0" in installed("inspect", "builtin", "--keep", "0.5")
