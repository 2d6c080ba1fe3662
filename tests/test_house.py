"""The house rules that a reader cannot see at a glance: which way imports run, and what the table of contents holds."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import eckart

PACKAGE = Path(eckart.__file__).parent
# A room may import rooms to its right, never to its left.
ORDER = [
    *("cli", "reports", "terminal"),
    *("reproduction", "study", "experiment", "outofcore", "pipeline", "demo", "card", "recipe"),
    *("ranking", "engine", "shares", "source", "composition", "finetuning"),
    *("distillation", "recovery", "refinement", "sequential"),
    *("teams", "probes", "sensitivity", "rank_search", "scores", "predictions", "spectra", "trials", "journal"),
    *(
        "baselines",
        "descent",
        "compression",
        "cuts",
        "sweep",
        "calibration",
        "gradients",
        "spill",
        "store",
        "walk",
        "allocation",
        "models",
        "lowrank",
    ),
    *("evals", "tokens", "labelled", "corpora", "questions", "builtin", "fingerprint"),
    *("cluster", "precision", "quiet", "sizes", "tracking"),
]


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


def files_of(room: str) -> list[Path]:
    folder = PACKAGE / room
    return sorted(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{room}.py"]


def test_every_room_has_its_place() -> None:
    rooms = {place.stem for place in PACKAGE.iterdir() if place.suffix == ".py" or (place / "__init__.py").is_file()}
    assert rooms - {"__init__", "__main__"} == set(ORDER)
    assert len(set(ORDER)) == len(ORDER)


@pytest.mark.parametrize("room", ORDER)
def test_imports_run_downward(room: str) -> None:
    above = ORDER[: ORDER.index(room)]
    for file in files_of(room):
        for module in imports_of(file):
            assert not any(module == f"eckart.{up}" or module.startswith(f"eckart.{up}.") for up in above), (
                file,
                module,
            )


def test_lowrank_never_imports_transformers() -> None:
    for file in files_of("lowrank"):
        for module in imports_of(file):
            assert module.split(".")[0] != "transformers", file
            assert module.split(".")[0] != "eckart" or module.startswith("eckart.lowrank"), (file, module)


def test_evals_know_nothing_of_compression() -> None:
    below = ("corpora", "fingerprint", "labelled", "quiet", "sizes", "tokens", "tracking")
    allowed = ("eckart.evals", *(f"eckart.{room}" for room in below))
    for file in files_of("evals"):
        for module in imports_of(file):
            assert not module.startswith("eckart") or module.startswith(allowed), (file, module)


def test_reports_know_files_and_no_models() -> None:
    for file in files_of("reports"):
        for module in imports_of(file):
            assert module.split(".")[0] not in {"torch", "transformers"}, (file, module)
            allowed = ("eckart.reports", "eckart.evals.result", "eckart.evals.improvement")
            assert not module.startswith("eckart") or module.startswith(allowed), (file, module)


def test_only_the_terminal_knows_rich() -> None:
    for file in PACKAGE.rglob("*.py"):
        if file.name != "terminal.py" and file.parent.name != "cli":
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
        "import eckart, torch\n"
        "assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
