"""The house rules that a reader cannot see at a glance: which way imports run, and what the table of contents holds."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import eckart

PACKAGE = Path(eckart.__file__).parent
TESTS = Path(__file__).parent
# The rooms, and which others each may import. All but the mathematics and data may import support.
ROOMS: dict[str, set[str]] = {
    "lowrank": set(),
    "support": set(),
    "data": set(),
    "evals": {"data", "support"},
    "models": {"lowrank", "data", "support"},
    "serving": {"models", "lowrank", "support"},
    "reports": {"evals", "support"},
    "allocation": {"models", "lowrank", "evals", "data", "support"},
    "calibration": {"models", "lowrank", "data", "support"},
    "compression": {"calibration", "allocation", "evals", "models", "lowrank", "data", "support"},
    "runs": {"compression", "calibration", "allocation", "evals", "models", "lowrank", "data", "support"},
}
ROOMS["cli"] = set(ROOMS)
# Of another room, only these files.
DOORS: dict[tuple[str, str], tuple[str, ...]] = {
    ("models", "data"): ("eckart.data.builtin",),
    ("reports", "evals"): ("eckart.evals.result", "eckart.evals.improvement"),
    ("reports", "support"): (
        *("eckart.support.files", "eckart.support.plain_data"),
        *("eckart.support.recipe_words", "eckart.support.recipe_settings"),
    ),
}
# Libraries that a room must never import.
NEVER: dict[str, set[str]] = {"lowrank": {"transformers"}, "reports": {"torch", "transformers"}}


def imports_of(file: Path) -> set[str]:
    """Modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add(node.module or "")
            found.update(f"eckart.{name.name}" for name in node.names if node.module == "eckart")
    return found


def test_the_rooms_are_these() -> None:
    rooms = {place.name for place in PACKAGE.iterdir() if (place / "__init__.py").is_file()}
    assert rooms == set(ROOMS)
    assert {place.name for place in PACKAGE.glob("*.py")} == {"__init__.py"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_downward(room: str) -> None:
    for file in sorted((PACKAGE / room).rglob("*.py")):
        for module in imports_of(file):
            library, _, rest = module.partition(".")
            assert library not in NEVER.get(room, ()), (file, module)
            other = rest.partition(".")[0]
            if library != "eckart" or other == room:
                continue
            assert other in ROOMS[room], (file, module)
            allowed = DOORS.get((room, other), ("eckart",))
            assert any(f"{module}.".startswith(f"{door}.") for door in allowed), (file, module)


def test_no_room_needs_a_room_that_needs_it() -> None:
    order = list(ROOMS)
    for room, below in ROOMS.items():
        assert all(order.index(other) < order.index(room) for other in below), room


@pytest.mark.parametrize("folder", sorted({file.parent for file in PACKAGE.rglob("*.py")} - {PACKAGE}), ids=str)
def test_tests_mirror_the_rooms(folder: Path) -> None:
    place = TESTS / folder.relative_to(PACKAGE)
    if any(file.stem != "__init__" for file in folder.glob("*.py")):
        assert list(place.rglob("test_*.py")), place


def test_only_the_terminal_knows_rich() -> None:
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name != "cli":
            assert not any(module.split(".")[0] in {"rich", "typer"} for module in imports_of(file)), file


def test_the_face_is_what_it_says() -> None:
    for name in eckart.__all__:
        value = getattr(eckart, name)
        assert value.__doc__, name
        assert not (PACKAGE / f"{name}.py").exists(), f"{name}.py would be hidden by the function {name}"


def test_every_public_function_is_documented() -> None:
    for file in PACKAGE.rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        assert ast.get_docstring(tree), file
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{file}: {node.name}"


def test_importing_needs_no_network_and_no_gpu() -> None:
    code = (
        "import socket\n"
        "def refuse(*a, **k): raise OSError('no network in this test')\n"
        "socket.socket.connect = refuse; socket.getaddrinfo = refuse\n"
        "from eckart import *\n"
        "import torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
