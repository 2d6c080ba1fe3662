"""Rooms, floors, arrows and circles of the package, and the files that one linear passes on its way to a checkpoint.

    python tools/rooms.py                               # of this checkout
    python tools/rooms.py OTHER/src                     # of another one, older ones included
    python tools/rooms.py OTHER/src --follow asvd-i     # runs `eckart compress` there, lists the files it enters

A room is a module or a package directly below `eckart`. An arrow is a room that imports another one, anywhere in it. A
room's floor is one above the highest room that it imports; rooms that need each other share one. Imports are read by
grimp and nothing is imported, but for `--follow`.
"""

from __future__ import annotations

import argparse
import graphlib
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import grimp

PACKAGE = "eckart"
HERE = Path(__file__).resolve().parents[1] / "src"
# Of the command, calibrated on little: which files are entered does not depend on how much text there is.
COMMAND = (
    *("compress", "builtin", "OUT", "--keep", "0.7", "--no-cache"),
    *("--calibration", "builtin/prose", "--samples", "16", "--length", "32"),
)
# Notes each file of the package in which a function runs, in the order of the first call. Calls made by imports
# (decorators, tables that are built) are not part of the way.
TRACER = """
import inspect, json, sys, threading
package, target = sys.argv[1], sys.argv[2]
sys.argv = sys.argv[2:]
import eckart.cli
entered = {}
def note(frame, event, argument):
    code = frame.f_code
    if event != "call" or code.co_filename in entered or not code.co_filename.startswith(package):
        return
    if not code.co_flags & inspect.CO_OPTIMIZED:
        return
    caller = frame.f_back
    while caller is not None:
        if caller.f_code.co_filename.startswith("<frozen importlib"):
            return
        caller = caller.f_back
    entered[code.co_filename] = code.co_qualname
threading.setprofile(note)
sys.setprofile(note)
try:
    eckart.cli.main()
except SystemExit as stop:
    if stop.code:
        raise
finally:
    sys.setprofile(None)
    with open(target, "w") as out:
        json.dump(entered, out)
"""


@dataclass(frozen=True)
class House:
    """What `read_house` gives: which room needs which, and the circles among rooms and among files."""

    needs: dict[str, frozenset[str]]
    files: int
    circles: list[list[str]]

    @property
    def arrows(self) -> int:
        return sum(map(len, self.needs.values()))

    @property
    def floors(self) -> list[list[str]]:
        """Rooms by floor, the lowest first."""
        group = {room: frozenset(circle) for circle in circles_of(self.needs) for room in circle}
        group = {room: group.get(room, frozenset({room})) for room in self.needs}
        below = {
            rooms: {group[other] for room in rooms for other in self.needs[room]} - {rooms} for rooms in group.values()
        }
        floor: dict[frozenset[str], int] = {}
        for rooms in graphlib.TopologicalSorter(below).static_order():
            floor[rooms] = 1 + max((floor[other] for other in below[rooms]), default=0)
        height = max(floor.values())
        return [sorted(room for room in group if floor[group[room]] == level) for level in range(1, height + 1)]


def read_house(source: Path) -> House:
    """The package below `source`, a folder that holds `eckart/`. Raises ValueError where there is none."""
    if not (source / PACKAGE / "__init__.py").is_file():
        raise ValueError(f"no package {PACKAGE} in {source}: give the folder that holds {PACKAGE}/, as in CHECKOUT/src")
    sys.path.insert(0, str(source))
    try:
        graph = grimp.build_graph(PACKAGE, cache_dir=None)
    finally:
        sys.path.remove(str(source))
    modules = graph.modules - {PACKAGE}
    imports = {module: graph.find_modules_directly_imported_by(module) & modules for module in modules}
    needs: dict[str, set[str]] = {room_of(module): set() for module in modules}
    for module, others in imports.items():
        needs[room_of(module)] |= {room_of(other) for other in others} - {room_of(module)}
    return House({room: frozenset(others) for room, others in needs.items()}, len(modules), circles_of(imports))


def room_of(module: str) -> str:
    return module.split(".")[1]


def circles_of(needs: dict[str, frozenset[str]] | dict[str, set[str]]) -> list[list[str]]:
    """Groups of names of which each needs each other one, directly or not."""
    reach = {name: set(others) for name, others in needs.items()}
    for middle in reach:
        for name in reach:
            if middle in reach[name]:
                reach[name] |= reach[middle]
    groups = {frozenset(other for other in others if name in reach[other]) for name, others in reach.items()}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def follow(source: Path, method: str) -> dict[str, str]:
    """Files of the package that `eckart compress` enters, each with the first function that runs in it, in order.

    Cost: a compression of the built-in model, some seconds; `best` half a minute.
    """
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "entered.json"
        options = () if method == "best" else ("--method", method)
        command = [sys.executable, "-c", TRACER, str(source / PACKAGE), str(target), *COMMAND, *options]
        environment = {**os.environ, "PYTHONPATH": str(source)}
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
        entered = json.loads(target.read_text())
    return {str(Path(file).relative_to(source / PACKAGE)): function for file, function in entered.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", type=Path, default=HERE, help="the folder that holds eckart/")
    parser.add_argument("--follow", metavar="METHOD", help="run a compression and list the files that it enters")
    arguments = parser.parse_args()
    source = arguments.source.resolve()
    try:
        house = read_house(source)
    except ValueError as error:
        parser.error(str(error))
    print(f"{len(house.needs)} rooms on {len(house.floors)} floors, {house.arrows} arrows, {house.files} modules")
    for level, rooms in reversed(list(enumerate(house.floors, 1))):
        print(f"  floor {level:2d}  {', '.join(rooms)}")
    if len(house.needs) <= 15:
        for room in sorted(house.needs, key=lambda room: (-len(house.needs[room]), room)):
            print(f"  {room} -> {', '.join(sorted(house.needs[room])) or 'nothing of ours'}")
    print(f"{len(house.circles)} circles of imports")
    for circle in house.circles:
        print(f"  {', '.join(circle)}")
    if arguments.follow:
        entered = follow(source, arguments.follow)
        passed = {name.split("/")[0] for name in entered}
        print(
            f"{len(entered)} files in {len(passed)} rooms from `eckart compress` to the checkpoint, {arguments.follow}:"
        )
        for name, function in entered.items():
            print(f"  {name}: {function}")


if __name__ == "__main__":
    main()
