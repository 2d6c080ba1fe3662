"""A cluster of this machine ends with the process that started it, and its death is told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

psutil = pytest.importorskip("psutil", reason="comes with Ray, an optional extra: pip install 'eckart[ray]'")
pytest.importorskip("ray", reason="Ray is an optional extra: pip install 'eckart[ray]'")

from eckart.runs.engine.cluster import ClusterError, _noticing  # noqa: E402
from eckart.runs.engine.watcher import vital_processes, watched  # noqa: E402

# What Ray's manager of workers does: it starts a process that outlives it.
RAYLET = """#!/bin/sh
setsid sleep 300 &
echo $! > "$1"
wait
"""
# Starts it, and waits for its own end; ARGV: the program, the file for the number of what it starts.
DRIVER = """
import subprocess, sys, time
from eckart.runs.engine.watcher import watched
with watched():
    subprocess.Popen(sys.argv[1:])
    time.sleep(300)
"""


def start(tmp_path: Path, *command: str) -> tuple[subprocess.Popen[str], int]:
    """The process, and the number of what its raylet has started."""
    raylet, number = tmp_path / "raylet", tmp_path / "number"
    raylet.write_text(RAYLET)
    raylet.chmod(0o755)
    process = subprocess.Popen([*command, str(raylet), str(number)], stdout=subprocess.PIPE, text=True)
    while not (number.is_file() and number.read_text().strip()):
        assert process.poll() is None
        time.sleep(0.05)
    return process, int(number.read_text())


def is_alive(number: int) -> bool:
    return psutil.pid_exists(number) and psutil.Process(number).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_nothing_outlives_a_killed_driver(tmp_path: Path, how: int) -> None:
    driver, agent = start(tmp_path, sys.executable, "-c", DRIVER)
    time.sleep(2.5)  # the watcher has started, and has looked
    (raylet,) = vital_processes(psutil.Process(driver.pid))
    driver.send_signal(how)
    driver.wait()
    deadline = time.monotonic() + 10
    while is_alive(agent) or is_alive(raylet.pid):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_what_is_not_of_the_cluster_is_left_alone() -> None:
    bystander = subprocess.Popen(["sleep", "60"])
    with watched():
        time.sleep(1.5)
    assert bystander.poll() is None
    bystander.kill()
    bystander.wait()


def kill_and_wait(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    time.sleep(30)


def test_the_death_of_a_vital_process_is_one_error(tmp_path: Path) -> None:
    vital = subprocess.Popen(["sleep", "60"])
    lost = threading.Event()
    with (
        pytest.raises(ClusterError, match=r"has died, and what was finished is kept: give the same command again"),
        _noticing([psutil.Process(vital.pid)], lost),
    ):
        kill_and_wait(vital)
    assert lost.is_set()
    vital.wait()


def test_an_interrupt_by_the_user_stays_one() -> None:
    with pytest.raises(KeyboardInterrupt), _noticing([psutil.Process()], threading.Event()):
        raise KeyboardInterrupt


# A real cluster: two tasks that take their time.
REAL = """
import sys, time
from eckart.runs.engine.cluster import ClusterError, open_cluster
try:
    with open_cluster(None, 1) as cluster:
        list(cluster.spread(lambda seconds: time.sleep(seconds), [0]))
        print("ready", flush=True)
        list(cluster.spread(lambda seconds: time.sleep(seconds), [600]))
except ClusterError as error:
    sys.exit(f"error: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize("who", ["driver", "raylet", "gcs_server"])
def test_a_real_cluster_dies_in_order(who: str) -> None:
    driver = subprocess.Popen([sys.executable, "-c", REAL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    assert driver.stdout.readline() == "ready\n"
    time.sleep(2)
    processes = psutil.Process(driver.pid).children(recursive=True)
    victim = {process.name(): process.pid for process in processes}.get(who, driver.pid)
    os.kill(victim, signal.SIGKILL)
    _, told = driver.communicate(timeout=60)
    if who != "driver":
        assert driver.returncode == 1
        assert "error: a process of Ray's (gcs_server or raylet) has died, and what was finished is kept" in told
        assert "Traceback" not in told
    deadline = time.monotonic() + 10
    while [process for process in processes if is_alive(process.pid)]:
        assert time.monotonic() < deadline
        time.sleep(0.1)
