"""What every benchmark measures and writes with: seconds, peak memory, the machine's name, JSON. Not a program."""

from __future__ import annotations

import json
import platform
import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from eckart.support.files import write_whole

PROCESSOR = torch.device("cpu")
# Shortest stretch that is timed: a thousand times the clock's own resolution and cost.
STRETCH = 2e-3
# Calls that take longer than LONG seconds are timed in FEW rounds at most.
LONG, FEW = 0.05, 5


def now(device: torch.device) -> float:
    """The time, once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(run: Callable[[], object], rounds: int, device: torch.device) -> list[float]:
    """Of each of some rounds, after one to warm up."""
    run()
    times = []
    for _ in range(rounds):
        start = now(device)
        run()
        times.append(now(device) - start)
    return times


def best_seconds(run: Callable[[], object], rounds: int = 3, *, device: torch.device = PROCESSOR) -> float:
    """The shortest of some rounds."""
    return min(seconds_of(run, rounds, device))


def median_seconds(run: Callable[[], object], device: torch.device, rounds: int = 3) -> float:
    """The one in the middle of some rounds."""
    return statistics.median(seconds_of(run, rounds, device))


def in_turns(
    runs: Mapping[str, Callable[[], object]], rounds: int, device: torch.device = PROCESSOR
) -> dict[str, list[float]]:
    """{name: seconds of one call in each round}, all of them in turns, so that what slows the machine slows all."""
    times = {}
    for name, run in runs.items():
        _seconds_each(run, 3, device)
        taken = _seconds_each(run, 1, device)
        times[name] = max(1, round(STRETCH / taken))
        rounds = min(rounds, FEW) if taken > LONG else rounds
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            samples[name].append(_seconds_each(run, times[name], device))
    return samples


def _seconds_each(run: Callable[[], object], times: int, device: torch.device) -> float:
    """Of one call, over `times` of them."""
    start = now(device)
    for _ in range(times):
        run()
    return (now(device) - start) / times


@contextmanager
def lap(entry: MutableMapping[str, Any], stage: str, device: torch.device = PROCESSOR) -> Iterator[None]:
    """Notes the seconds that the block takes under `stage`."""
    start = now(device)
    yield
    entry[stage] = round(now(device) - start, 4)


def peak_bytes(process: int | None = None) -> int:
    """The most bytes that this process, or one of that number, has had resident so far (mapped pages count)."""
    if process is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    status = Path(f"/proc/{process}/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def peak_gb(device: torch.device) -> float | None:
    """The most memory that tensors took on the device since the part began."""
    return round(torch.cuda.max_memory_allocated() / 1e9, 3) if device.type == "cuda" else None


def machine(device: torch.device | str = PROCESSOR) -> str:
    """What it runs on: the processor's or card's name, threads, torch."""
    device = torch.device(device)
    processor = platform.processor() or platform.machine()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def write_json(file: Path | None, facts: Any) -> None:
    """Write facts to a file that appears whole; without one, nothing."""
    if file is not None:
        write_whole(file, json.dumps(facts, indent=1, default=str) + "\n")


def append_line(file: Path | None, row: Any) -> None:
    """Add a row to a file of JSON lines; without one, nothing."""
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(row) + "\n")


def read_lines(file: Path | None) -> list[Any]:
    """The rows of a file of JSON lines; none where there is no file."""
    if file is None or not file.is_file():
        return []
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
