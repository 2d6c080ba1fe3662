"""How a command ends when it does not end well: one line, a status, and nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from eckart.cli.app import COMMANDS, load_command
from eckart.cli.ending import BAD_INPUT, FAULT, Stopped, stopping, tell, way_on
from eckart.cli.terminal import TerminalTrack
from eckart.lowrank import DecompositionError
from tiny import Run


class SafetensorError(Exception):
    """As the one of safetensors: its message is all that says what happened."""


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("keep 2 is not in (0, 1]"), "error: keep 2 is not in (0, 1]"),
        (DecompositionError("4 x 4: no"), "error: 4 x 4: no"),
        (ModuleNotFoundError("No module named 'ray'"), "error: No module named 'ray'"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/out"), "error: /x/out: Permission denied"),
        (OSError("no such place"), "error: no such place"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/out"), "error: the disk of /x/out is full: make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "error: the disk is full: make room"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "error: the disk is full: make room"),
        (MemoryError(), "error: out of memory: give a smaller --batch-size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "error: out of memory: give a smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "error: out of memory: give a smaller"),
    ],
)
def test_what_is_told_in_one_line(error: Exception, line: str) -> None:
    status, told = tell(error)
    assert status == BAD_INPUT
    assert told.startswith(line)
    assert "\n" not in told


def test_what_nobody_foresaw_is_kept_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("sys.argv", ["eckart", "compress", "lone \udc80 surrogate"])
    try:
        torch.zeros(2) @ torch.zeros(3)
    except RuntimeError as error:
        status, told = tell(error)
    assert status == FAULT
    (file,) = tmp_path.iterdir()
    assert told.startswith("error: RuntimeError, which eckart did not expect: ")
    assert str(file) in told
    written = file.read_text()
    assert "torch.zeros(2) @ torch.zeros(3)" in written
    assert "command: eckart compress" in written
    assert f"torch {torch.__version__.partition('+')[0]}" in written


def test_names_are_printed_as_they_are(run: Run, tmp_path: Path) -> None:
    place = tmp_path / "[red]out[/bold] :smile:"
    arguments = ("--method", "svd", "--keep", "0.5", "--no-cache")
    status, printed = run("compress", "builtin", place, *arguments)
    assert status == 0, printed
    assert "[red]out[/bold]:smile:" in "".join(printed.split())
    status, printed = run("compress", "builtin", place, *arguments)
    assert status == 2
    assert "[red]out[/bold] :smile: exists" in printed
    assert "Traceback" not in printed


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_ends_with_one_line_and_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    code = "from eckart.cli import main; main()"
    command = ["compress", "builtin", str(tmp_path / "out"), "--keep", "0.5", "--calibration", "builtin/prose"]
    command += ["--samples", "400", "--cache", str(tmp_path / "cache")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def hear() -> None:
        """As started from a terminal, whatever started the tests."""
        signal.signal(number, signal.SIG_DFL)

    with subprocess.Popen(
        [sys.executable, "-c", code, *command], stderr=subprocess.PIPE, env=environment, preexec_fn=hear
    ) as process:
        # Its first sign of work: moments of a calibration that takes minutes, or the folder they will be in.
        limit = time.monotonic() + 120
        while not list(tmp_path.iterdir()) and process.poll() is None and time.monotonic() < limit:
            time.sleep(0.1)
        assert process.poll() is None
        process.send_signal(number)
        _, told = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    again = shlex.join(["eckart", *command])
    assert told.decode().splitlines()[-1] == f"stopped; the moments so far are in the cache; start again with: {again}"
    assert b"Traceback" not in told
    assert not [file for file in tmp_path.rglob("*") if "partial" in file.name or file.name == "out"]


@pytest.mark.parametrize(
    ("words", "kept", "more"),
    [
        ("run 'my recipe.yaml' --out r", "go on with", ""),
        ("-q run r.yaml --out r --force", "go on with", ""),
        ("reproduce nsvd-table-1", "go on with", ""),
        ("search M plan.json --no-cache", "go on with", ""),
        ("finetune M OUT --task cola", "go on with", ""),
        ("eval M --task cost --out r", "go on with", ""),
        ("eval M --task cost --out=r --force", "start again with", ""),
        ("eval M --task cost", "nothing was changed; start again with", ""),
        ("probe M --task cola", "the states so far are in the cache; start again with", ""),
        ("correct Q OUT --reference M", "the moments so far are in the cache; start again with", ""),
        ("compress M OUT --keep 0.5 --no-cache", "nothing was changed; start again with", ""),
        ("compress M OUT --keep 0.5 --out-of-core", "go on with", " --resume"),
        ("compress M OUT --keep 0.5 --out-of-core --resume", "go on with", ""),
        ("export M OUT --dense", "nothing was changed; start again with", ""),
    ],
)
def test_a_stopped_command_says_the_line_that_goes_on(words: str, kept: str, more: str) -> None:
    assert way_on(shlex.split(words)) == f"{kept}: eckart {words}{more}"
    name, *others = [word for word in shlex.split(words + more) if word != "-q"]
    assert name in COMMANDS
    with load_command(name).make_context(name, others) as context:  # the line is one that the command takes
        assert not context.args


def test_a_signal_that_a_callback_dropped_ends_the_next_step_of_progress() -> None:
    track, steps = TerminalTrack(Console(file=io.StringIO())), []

    def work() -> None:
        for step in track(range(5), "steps", 5):
            steps.append(step)
            if step == 1:
                with contextlib.suppress(Stopped):
                    signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped), stopping():
        work()
    assert steps == [0, 1]
    assert [*track(range(3), "steps", 3)] == [0, 1, 2]
