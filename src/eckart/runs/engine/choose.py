"""Choose: an engine by its name. A new one is a file with its class and what opens it, and a row in this table.

Nothing else says the name of an engine, and an engine's file is read when it is opened.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pkgutil import resolve_name
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from eckart.runs.engine.base import Engine


@dataclass(frozen=True)
class Backend:
    """A place where work can run.

    Attributes:
        about: the place in words, for the help of commands.
        opener: "module:function". The function takes an address and a number of workers, either may be None, and gives
            the engine, for a `with` block. It raises ValueError for what it cannot use.
    """

    about: str
    opener: str


ENGINES: dict[str, Backend] = {
    "local": Backend("this process", "eckart.runs.engine.local:open_here"),
    "ray": Backend("a worker for each core of a Ray cluster", "eckart.runs.engine.on_cluster:open_on_cluster"),
}
# Where work runs by default.
DEFAULT = next(iter(ENGINES))


def open_engine(
    name: str = DEFAULT, *, address: str | None = None, workers: int | None = None
) -> AbstractContextManager[Engine]:
    """The engine of this name, for a `with` block.

    Args:
        name: of ENGINES.
        address, workers: of a cluster, see `cluster.open_cluster`.

    Raises:
        ValueError: an unknown name; and, here or on entry, what the engine's opener raises.
    """
    if name not in ENGINES:
        raise ValueError(f"engine {name!r} is none of {', '.join(ENGINES)}")
    opener: Callable[[str | None, int | None], AbstractContextManager[Engine]] = resolve_name(ENGINES[name].opener)
    return opener(address, workers)


def describe_engines() -> str:
    """Every name with its place, in one line, for the help of commands."""
    return ", or ".join(f"{name} ({row.about})" for name, row in ENGINES.items())
