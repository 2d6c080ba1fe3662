"""The README runs: its Python, and every option of every command line in it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from eckart.cli.app import load_command

README = Path(__file__).parents[1] / "README.md"
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
COMMANDS = [
    line.split(" #")[0].strip()
    for language, block in BLOCKS
    if language == "sh"
    for line in block.splitlines()
    if line.startswith("eckart ")
]


def test_the_python_of_the_readme_runs(tmp_path: Path) -> None:
    (script,) = [block for language, block in BLOCKS if language == "python" and "eckart.compress(" in block]
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=600)
    load = next(block for language, block in BLOCKS if language == "python" and "from_pretrained" in block)
    subprocess.run([sys.executable, "-c", load.replace('"OUT"', '"out"')], cwd=tmp_path, check=True, timeout=600)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_of_the_readme_is_understood(line: str) -> None:
    name, *arguments = shlex.split(line)[1:]
    context = load_command(name).make_context(name, arguments)
    assert context.info_name == name


def test_there_are_command_lines_to_check() -> None:
    assert len(COMMANDS) >= 6


def test_every_make_target_of_the_documents_exists() -> None:
    root = README.parent
    targets = set(re.findall(r"^([a-z-]+):", (root / "Makefile").read_text(), flags=re.MULTILINE))
    for document in (README, root / "CONTRIBUTING.md"):
        for target in re.findall(r"make ([a-z-]+)(?=[`\s])", document.read_text(encoding="utf-8")):
            assert target in targets or target in {"and", "language"}, f"{document.name}: make {target}"
