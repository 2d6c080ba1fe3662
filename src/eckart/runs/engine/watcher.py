"""Watcher: a process that ends the processes of a cluster once the one that started the cluster is gone.

It runs as a program of its own and waits for the end of its input, which a pipe gives when its writer ends, by SIGKILL
as well. Ray ends most of its processes itself then, and not the agents of its raylet.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil

# Processes of Ray's without which there is no cluster: the head, and the manager of this machine's workers.
VITAL = ("gcs_server", "raylet")
# Seconds between two looks at what these have started.
EVERY = 1.0


@contextmanager
def watched() -> Iterator[None]:
    """What Ray starts inside ends soon after this process does, however it ends, and with the block at the latest."""
    program = [sys.executable, __file__]
    watcher = subprocess.Popen(program, stdin=subprocess.PIPE, start_new_session=True)  # Ctrl-C is not for it
    try:
        yield
    finally:
        watcher.communicate()


def vital_processes(parent: psutil.Process) -> list[psutil.Process]:
    """Those that this process has started."""
    with suppress(psutil.Error):
        return [child for child in parent.children() if child.name() in VITAL]
    return []


def watch(parent: psutil.Process) -> None:
    """Wait until the input ends, then kill what the parent's vital processes have started, and them."""
    known: set[psutil.Process] = set()
    end = threading.Thread(target=sys.stdin.read, daemon=True)
    end.start()
    while end.is_alive():
        end.join(EVERY)
        for process in vital_processes(parent):
            with suppress(psutil.Error):
                known |= {process, *process.children(recursive=True)}
    for process in known:
        with suppress(psutil.Error):  # psutil kills none that has only the number of one that it knew
            process.kill()


if __name__ == "__main__":
    watch(psutil.Process(os.getppid()))
