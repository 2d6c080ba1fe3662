"""Claims: of several processes that write one place at the same time one wins, and a kill loses nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eckart.support import files
from eckart.support.files import claimed, staged_directory

# Writes ARGV[1] as two files that belong together. Its start is a file that appears, and it holds on for a moment.
WRITER = """
import sys, time
from pathlib import Path
from eckart.support.files import claimed, staged_directory
out, name, gate = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
gate.with_suffix("." + name).touch()
while not gate.exists():
    time.sleep(0.001)
with claimed(out):
    time.sleep(0.2)
    with staged_directory(out, force=True) as staging:
        (staging / "config").write_text(name)
        time.sleep(0.05)
        (staging / "weights").write_text(name)
"""


def start(*arguments: object, code: str = WRITER) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("round_", range(3))
def test_of_simultaneous_writers_exactly_one_wins(tmp_path: Path, round_: int) -> None:
    out, gate, names = tmp_path / "out[1]", tmp_path / "gate", ("a", "b", "c")
    with staged_directory(out) as staging:
        (staging / "config").write_text("older")
    writers = [start(out, name, gate) for name in names]
    wait_for(lambda: all(gate.with_suffix(f".{name}").exists() for name in names))
    gate.touch()
    told = [writer.communicate(timeout=60)[1] for writer in writers]
    (winner,) = [name for name, writer in zip(names, writers, strict=True) if writer.returncode == 0]
    assert {file.name: file.read_text() for file in out.iterdir()} == {"config": winner, "weights": winner}
    assert sum("ValueError: another run is making" in text for text in told) == len(names) - 1
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_owner_blocks_nobody(tmp_path: Path, number: int) -> None:
    out, ready = tmp_path / "out", tmp_path / "ready"
    code = (
        "import sys, time; from pathlib import Path; from eckart.support.files import staged_directory\n"
        "with staged_directory(sys.argv[1]) as staging:\n"
        "    (staging / 'half').touch(); Path(sys.argv[2]).touch(); time.sleep(60)\n"
    )
    child = start(out, ready, code=code)
    wait_for(ready.exists)
    with pytest.raises(ValueError, match=r"another run is making .*wait for it"), claimed(out):
        pass
    child.send_signal(number)
    child.communicate()
    with staged_directory(out) as staging:
        assert not list(staging.iterdir())
        (staging / "whole").touch()
    assert [file.name for file in tmp_path.iterdir() if file != ready] == ["out"]


@pytest.mark.parametrize("call", range(4))
def test_a_kill_while_replacing_loses_nothing(tmp_path: Path, call: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends at each of the steps of a replacement in turn, by `os._exit`, which cleans nothing up."""
    out = tmp_path / "out"
    with staged_directory(out) as staging:
        (staging / "file").write_text("older")
    child = os.fork()
    if child == 0:
        calls = 0

        def dying(original):  # type: ignore[no-untyped-def]
            def step(*arguments, **options):  # type: ignore[no-untyped-def]
                nonlocal calls
                if calls == call:
                    os._exit(0)
                calls += 1
                return original(*arguments, **options)

            return step

        Path.rename = dying(Path.rename)  # type: ignore[method-assign]
        files.shutil.rmtree = dying(files.shutil.rmtree)  # type: ignore[assignment]
        with staged_directory(out, force=True) as staging:
            (staging / "file").write_text("newer")
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    with claimed(out):
        assert (out / "file").read_text() == ("older" if call < 2 else "newer")
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_an_owner_may_claim_again_and_another_thread_may_not(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def other() -> None:
        with claimed(out):
            raise AssertionError("was let in")

    with claimed(out), claimed(tmp_path / "x" / ".." / "out"), ThreadPoolExecutor(1) as pool:
        with pytest.raises(ValueError, match="another run"):
            pool.submit(other).result()
        with staged_directory(out) as staging:
            (staging / "file").touch()
    with claimed(out):
        assert (out / "file").exists()


def test_places_whose_names_begin_alike_are_two(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "out.v2") as staging:
        (staging / "file").touch()
        with claimed(tmp_path / "out"):
            assert (staging / "file").exists()


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "old").touch()
    (tmp_path / "out").symlink_to(tmp_path / "disk", target_is_directory=True)
    with staged_directory(tmp_path / "out", force=True) as staging:
        (staging / "new").write_text(json.dumps({}))
    assert (tmp_path / "out").is_symlink()
    assert [file.name for file in (tmp_path / "disk").iterdir()] == ["new"]


def test_a_file_system_without_locks_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(OSError, match=r"has no locks .*give a place on another"), claimed(tmp_path / "out"):
        pass
