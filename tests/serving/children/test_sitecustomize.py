"""Processes that a program starts: they import eckart where the environment reaches them, and lose nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Prints, of this process and of those that it starts: whether eckart was imported.
SCRIPT = """
import multiprocessing, subprocess, sys

def imported(_=None):
    return "eckart" in sys.modules

def child(*options, code="import sys; print('eckart' in sys.modules)"):
    return subprocess.run([sys.executable, *options, "-c", code], capture_output=True, text=True).stdout.strip()

if __name__ == "__main__":
    print("here", imported())
    print("child", child())
    print("grandchild", child(code="import subprocess, sys; subprocess.run([sys.executable, '-c', "
        "'import sys; print(\\"eckart\\" in sys.modules)'])"))
    print("isolated", child("-I"))
    print("own sitecustomize", child(code="import sitecustomize; print(sitecustomize.OWN)"))
    print("places", child(code="import sys; print([place for place in sys.path if 'serving' in place])"))
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print("spawned", pool.map(imported, [0])[0])
"""


def test_children_import_eckart_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "own").mkdir()
    (tmp_path / "own/sitecustomize.py").write_text("OWN = 'still read'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "own"), os.environ.get("PYTHONPATH", "")]))
    command = [sys.executable, "-c", "from eckart.cli import main; main()", "exec", str(tmp_path / "script.py")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "here True",
        "child True",
        "grandchild True",
        "isolated False",
        "own sitecustomize still read",
        "places []",
        "spawned True",
    ]


def test_a_python_without_eckart_starts_all_the_same(tmp_path: Path) -> None:
    import eckart.serving.launch

    environment = {"PYTHONPATH": str(eckart.serving.launch.CHILDREN), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-s", "-c", "import importlib.util, sys; print('started')"]
    # An environment of its own, whose Python has no packages at all.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    command[0] = str(tmp_path / "venv/bin/python")
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    assert (done.stdout, done.stderr) == ("started\n", "")
