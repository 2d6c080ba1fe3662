"""Trials of what eckart promises: kills at random moments, two runs at once, damaged files, and a disk that is full.

    python benchmarks/trials.py [--kills 20] [--pairs 10] [--flips 200] [--full 10] [--seed 0] [--json FILE]

Each kind is tried on the built-in model, in processes of their own as a user starts them, and ends as one row: how many
trials, and how many of them ended as promised. Others are printed with what happened. docs/reliability.md says what is
promised, and has the counts of one day; the tests try each kind a few times.

kills      `eckart run`, and `eckart compress --out-of-core`, get SIGKILL after a random part of the time that they take
           when nothing stops them. The same command, given again, has to end well, with the weights and the numbers of
           the run that was not stopped.
pairs      Two `eckart compress --force` of different seeds start on one OUT that has an older checkpoint. At least one
           has to end well; what is there has to be whole, and of one of those that ended well.
flips      One random bit of a file of the cache, or of a checkpoint, is turned over. The cache's has to be noticed and
           computed again, with the same weights as before; the checkpoint's has to be told by `inspect --verify`.
full       Files may not grow past a random size (RLIMIT_FSIZE, as a full disk, without needing one). The command has to
           end with one line, and the older checkpoint has to stay as it was, byte for byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from measuring import write_json
from rich.console import Console
from rich.table import Table

EXECUTABLE = [sys.executable, "-c", "from eckart.cli import main; main()"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
CALIBRATION = ["--calibration", "builtin/prose", "--samples", "8", "--length", "128"]
RECIPE = """\
model: builtin
method: {name: asvd-i}
keep: 0.6
calibration: {corpus: builtin/prose, samples: 8, length: 128}
evaluate:
  - {task: "perplexity:builtin/prose", length: 128, limit: 8}
  - {task: "perplexity:builtin/code", length: 128, limit: 8}
"""


@dataclass
class Kind:
    """Trials of one kind: how many there were, and what happened in those that did not end as promised."""

    name: str
    trials: int = 0
    broken: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)

    def note(self, what: str) -> None:
        self.notes[what] = self.notes.get(what, 0) + 1


def start(arguments: Sequence[str], prepare: Callable[[], None] | None = None) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*EXECUTABLE, *arguments],
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=prepare,
    )


def run(arguments: Sequence[str], prepare: Callable[[], None] | None = None) -> tuple[int, str]:
    process = start(arguments, prepare)
    printed, _ = process.communicate(timeout=600)
    return process.returncode, printed


def must(arguments: Sequence[str]) -> float:
    """Seconds of a command that has to end well."""
    began = time.perf_counter()
    status, printed = run(arguments)
    if status:
        raise SystemExit(f"eckart {' '.join(arguments)} ended with {status}:\n{printed}")
    return time.perf_counter() - began


def weights_of(folder: Path) -> str:
    """One digest of all weight files."""
    state = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        state.update(file.read_bytes())
    return state.hexdigest()


def values_of(run_directory: Path) -> dict[str, float]:
    return {
        file.name: json.loads(file.read_text())["value"] for file in sorted((run_directory / "evals").glob("*.json"))
    }


def kills_of_run(folder: Path, count: int, draw: random.Random) -> Kind:
    kind = Kind("SIGKILL of `run`, given again")
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE)

    def command(place: Path) -> list[str]:
        return ["run", str(recipe), "--out", str(place / "run"), "--cache", str(place / "cache")]

    seconds = must(command(folder / "whole"))
    whole = weights_of(folder / "whole" / "run" / "model"), values_of(folder / "whole" / "run")
    for trial in range(count):
        place = folder / f"killed-{trial}"
        killed = _kill(command(place), draw.uniform(0.1, 1) * seconds)
        kind.note("killed" if killed else "finished before")
        status, printed = run(command(place))
        kind.trials += 1
        if status:
            kind.broken.append(f"trial {trial}: status {status}: {printed[-300:]}")
        elif (weights_of(place / "run" / "model"), values_of(place / "run")) != whole:
            kind.broken.append(f"trial {trial}: other weights or numbers than the run that nothing stopped")
        shutil.rmtree(place)
    return kind


def kills_out_of_core(folder: Path, count: int, draw: random.Random) -> Kind:
    kind = Kind("SIGKILL of `compress --out-of-core`, --resume")

    def command(place: Path, *more: str) -> list[str]:
        settings = [
            "--method",
            "asvd-i",
            "--keep",
            "0.6",
            *CALIBRATION,
            "--out-of-core",
            "--cache",
            str(place / "cache"),
        ]
        return ["compress", "builtin", str(place / "out"), *settings, *more]

    seconds = must(command(folder / "whole"))
    whole = weights_of(folder / "whole" / "out")
    for trial in range(count):
        place = folder / f"killed-{trial}"
        killed = _kill(command(place), draw.uniform(0.1, 1) * seconds)
        if (place / "out").exists():  # whole, since it appears whole: nothing remains to be resumed
            kind.note("killed with OUT in place" if killed else "finished before")
            kind.trials += 1
            if weights_of(place / "out") != whole:
                kind.broken.append(f"trial {trial}: OUT is in place with other weights")
            shutil.rmtree(place, ignore_errors=True)
            continue
        kind.note("killed at work")
        status, printed = run(command(place, "--resume"))
        kind.trials += 1
        if status:
            kind.broken.append(f"trial {trial}: status {status}: {printed[-300:]}")
        elif weights_of(place / "out") != whole:
            kind.broken.append(f"trial {trial}: other weights than the run that nothing stopped")
        shutil.rmtree(place, ignore_errors=True)
    return kind


def _kill(arguments: Sequence[str], seconds: float) -> bool:
    """Whether the command was still at work after that time; it is killed then."""
    process = start(arguments)
    try:
        process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return True
    return False


def pairs(folder: Path, count: int, draw: random.Random) -> Kind:
    kind = Kind("two `compress --force` on one OUT")

    def command(out: Path, seed: int) -> list[str]:
        settings = ["--method", "asvd-i", "--keep", "0.6", *CALIBRATION, "--seed", str(seed), "--no-cache", "--force"]
        return ["compress", "builtin", str(out), *settings]

    whole = {}
    for seed in (1, 2):
        must(command(folder / f"whole-{seed}", seed))
        whole[seed] = weights_of(folder / f"whole-{seed}")
    out = folder / "out"
    shutil.copytree(folder / "whole-1", out)
    for trial in range(count):
        processes = {}
        for seed in draw.sample((1, 2), 2):
            processes[seed] = start(command(out, seed))
            time.sleep(draw.choice((0, 0, 0.05, 0.5)))
        printed = {seed: process.communicate(timeout=600)[0] for seed, process in processes.items()}
        well = [seed for seed, process in processes.items() if process.returncode == 0]
        kind.trials += 1
        kind.note(f"{len(well)} ended well")
        status, told = run(["inspect", str(out), "--verify"])
        lost = [seed for seed in processes if seed not in well and "Traceback" in printed[seed]]
        if not well or lost:
            kind.broken.append(f"trial {trial}: {[text[-200:] for text in printed.values()]}")
        elif status or weights_of(out) not in [whole[seed] for seed in well]:
            kind.broken.append(f"trial {trial}: OUT is of no run that ended well: {told[-200:]}")
    return kind


def flips_in_cache(folder: Path, count: int, draw: random.Random) -> Kind:
    kind = Kind("one bit of the cache turned over, run again")
    cache, out = folder / "cache", folder / "out"
    command = ["compress", "builtin", str(out), "--method", "asvd-i", "--keep", "0.6", *CALIBRATION, "--force"]
    must([*command, "--cache", str(cache)])
    whole = weights_of(out)
    for trial in range(count):
        file = draw.choice(sorted(path for path in cache.rglob("*.safetensors")))
        bit = _flip(file, draw)
        status, printed = run([*command, "--cache", str(cache)])
        kind.trials += 1
        kind.note("told" if "damaged" in printed else "not told")
        if status or weights_of(out) != whole:
            kind.broken.append(f"trial {trial}: bit {bit} of {file.name}: status {status}, {printed[-200:]}")
    return kind


def flips_in_checkpoint(folder: Path, count: int, draw: random.Random) -> Kind:
    from eckart.models.weight_files import verify

    kind = Kind("one bit of a checkpoint turned over, verified")
    out = folder / "out"
    must(["compress", "builtin", str(out), "--method", "asvd-i", "--keep", "0.6", *CALIBRATION, "--no-cache"])
    files = [out / name for name in ("model.safetensors", "config.json")]
    for trial in range(count):
        file = draw.choice(files)
        before = file.read_bytes()
        bit = _flip(file, draw)
        try:
            verify(out)
        except ValueError:
            kind.note("told")
        else:
            kind.broken.append(f"trial {trial}: bit {bit} of {file.name} was not noticed")
        kind.trials += 1
        file.write_bytes(before)
    return kind


def _flip(file: Path, draw: random.Random) -> int:
    content = bytearray(file.read_bytes())
    bit = draw.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)
    return bit


def full_disk(folder: Path, count: int, draw: random.Random) -> Kind:
    kind = Kind("a disk that is full at a random size, OUT replaced")
    out, cache = folder / "out", folder / "cache"
    command = ["compress", "builtin", str(out), "--method", "asvd-i", *CALIBRATION, "--cache", str(cache), "--force"]
    must([*command, "--keep", "0.5"])
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    largest = max(len(content) for content in before.values())
    for trial in range(count):
        shutil.rmtree(cache, ignore_errors=True)
        limit = int(draw.uniform(0.01, 0.9) * largest)

        def prepare(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        status, printed = run([*command, "--keep", "0.6"], prepare)
        kind.trials += 1
        after = {file.name: file.read_bytes() for file in out.iterdir()}
        if status == 0 or "Traceback" in printed or "error:" not in printed:
            kind.broken.append(f"trial {trial}: limit {limit}: status {status}: {printed[-300:]}")
        elif after != before:
            kind.broken.append(f"trial {trial}: limit {limit}: the older checkpoint is not as it was")
        elif [path.name for path in folder.iterdir() if "partial" in path.name]:
            kind.broken.append(f"trial {trial}: limit {limit}: something half-written was left")
    return kind


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--pairs", type=int, default=10)
    parser.add_argument("--flips", type=int, default=200, help="of a checkpoint; a tenth as many of the cache")
    parser.add_argument("--full", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    jobs = [
        (kills_of_run, arguments.kills),
        (kills_out_of_core, arguments.kills),
        (pairs, arguments.pairs),
        (flips_in_cache, arguments.flips // 10),
        (flips_in_checkpoint, arguments.flips),
        (full_disk, arguments.full),
    ]
    console, kinds = Console(markup=False), []
    table = Table("what was tried", "trials", "as promised", "of these")
    with tempfile.TemporaryDirectory() as folder:
        for job, count in jobs:
            place = Path(folder) / job.__name__
            place.mkdir()
            kind = job(place, count, random.Random(f"{arguments.seed} {job.__name__}"))
            kinds.append(kind)
            notes = ", ".join(f"{what}: {number}" for what, number in kind.notes.items())
            table.add_row(kind.name, str(kind.trials), str(kind.trials - len(kind.broken)), notes)
            console.print(f"{kind.name}: {kind.trials} trials, {len(kind.broken)} broken")
            for line in kind.broken:
                console.print(line)
            write_json(arguments.json, [vars(each) for each in kinds])
    console.print(table)
    sys.exit(any(kind.broken for kind in kinds))


if __name__ == "__main__":
    main()
