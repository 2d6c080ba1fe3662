"""The package as a whole: what it may import, what it offers, and that these tests see its shape types."""

from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import pytest
import torch
from jaxtyping import TypeCheckError

from eckart import lowrank
from eckart.lowrank import Factors, factor

FOLDER = Path(lowrank.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
OUTSIDE = {"torch", "numpy", "scipy", "threadpoolctl", "jaxtyping"}


def imported(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of it; relative imports with their dots."""
    modules = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            modules.add("." * node.level + (node.module or ""))
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_only_itself_and_numerics(path: Path) -> None:
    for module in imported(path):
        own = module == "eckart.lowrank" or module.startswith("eckart.lowrank.")
        assert own or module.split(".")[0] in OUTSIDE | sys.stdlib_module_names, module


def test_works_where_transformers_cannot_be_imported() -> None:
    """The parent package is an empty stand-in, so only what `eckart.lowrank` imports itself is imported."""
    program = f"""
import sys, types
parent = types.ModuleType("eckart")
parent.__path__ = [{str(FOLDER.parent)!r}]
sys.modules["eckart"] = parent
sys.modules["transformers"] = None
import torch
import eckart.lowrank as lowrank
factors = lowrank.build_method("svd").factor(torch.eye(3)).cut(3)
assert torch.allclose(factors.dense(), torch.eye(3).double())
mine = {{name for name in sys.modules if name.split(".")[0] == "eckart"}}
assert all(name == "eckart" or name.startswith("eckart.lowrank") for name in mine), mine
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def test_every_offered_name_exists() -> None:
    assert sorted(lowrank.__all__) == sorted(set(lowrank.__all__))
    assert all(hasattr(lowrank, name) for name in lowrank.__all__)


def test_no_file_hides_an_offered_function() -> None:
    assert not {path.stem for path in FILES} & set(lowrank.__all__)


def annotated(path: Path) -> list[Any]:
    """Every function, method and class that a file defines."""
    module = importlib.import_module(f"eckart.lowrank.{path.stem}")
    definitions = []
    for value in vars(module).values():
        if getattr(value, "__module__", None) != module.__name__ or not callable(value):
            continue
        definitions.append(value)
        if inspect.isclass(value):
            members = [getattr(member, "fget", None) or member for member in vars(value).values()]
            definitions += [inspect.unwrap(member) for member in members if inspect.isfunction(member)]
    return definitions


@pytest.mark.parametrize("path", [p for p in FILES if p.stem != "__init__"], ids=lambda path: path.name)
def test_every_shape_type_can_be_read(path: Path) -> None:
    """An annotation that does not evaluate (a shape string that lost its quotes) is one that nobody checks."""
    values = annotated(path)
    assert values
    for value in values:
        get_type_hints(inspect.unwrap(value), include_extras=True)


def test_shape_types_are_checked_here() -> None:
    with pytest.raises(TypeCheckError):
        Factors(torch.zeros(3, 2), torch.zeros(1, 4))
    with pytest.raises(TypeCheckError):
        factor(torch.zeros(3))


@pytest.mark.usefixtures("as_users_see_it")
def test_shape_types_are_not_checked_for_users() -> None:
    with pytest.raises(ValueError, match="d_out, d_in"):
        factor(torch.zeros(3))
