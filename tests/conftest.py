"""Hooks the shape types of `eckart.lowrank`, so that its tests can have them checked at run time.

A hook has to be in place before the first import, and this file is read before any test module of any
folder. The checks are off until a test asks for them (tests/lowrank/conftest.py): everybody else meets the
package as its users do. Also the fixture `run`, the command line in this process.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from jaxtyping import config, install_import_hook

if TYPE_CHECKING:
    from tiny import Run

assert "eckart.lowrank" not in sys.modules, "imported too early: its shape types can no longer be hooked"
install_import_hook("eckart.lowrank", "beartype.beartype")
config.update("jaxtyping_disable", True)

# Tables have room, whoever runs the tests; a process of several has 80 columns otherwise.
os.environ["COLUMNS"] = "200"

# Tiny matrices gain nothing from two threads, and two threads that wait for each other on a busy machine lose minutes.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Two processes share the tests (`make test`). A file's stay together, and so do all that start a Ray cluster."""
    for item in items:
        group = "engine" if "engine" in item.path.parts else str(item.path)
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `eckart ARGUMENTS` in this process; gives the exit status and everything printed."""
    from eckart import cli  # not above: the hook comes first

    def call(*arguments: str | Path) -> tuple[int, str]:
        monkeypatch.setattr("sys.argv", ["eckart", *map(str, arguments)])
        try:
            cli.main()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return status, captured.out + captured.err

    return call


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few of lm-evaluation-harness's tasks in place of all, whose index takes seconds to make."""
    import lm_eval.tasks

    make, stock = lm_eval.tasks.TaskManager, Path(lm_eval.tasks.__file__).parent
    folders = [stock / name for name in ("arc", "benchmarks", "gsm8k", "triviaqa", "wikitext", "winogrande")]
    some = {"include_path": folders, "include_defaults": False}
    monkeypatch.setattr(lm_eval.tasks, "TaskManager", lambda **options: make(**(options or some)))
