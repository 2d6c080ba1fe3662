"""Terminal: progress and tables for people."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from eckart.cli.ending import check_stopped
from eckart.evals.result import EvalResult
from eckart.support.plain_data import finite

T = TypeVar("T")

# Names of files, models and text are printed as they are: brackets in them are no styles, colons no emoji.
# What is not a terminal, a file or a pipe, has room for a wide table.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160, markup=False, emoji=False)
errors = Console(stderr=True, markup=False, emoji=False)
# A log file gets a line this often; a terminal gets a live bar.
LOG_SECONDS = 30.0
# What turns the progress bars of libraries off, where it is set before they are imported.
BARS = ("TQDM_DISABLE", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
# Of what --json prints: another one where a key goes, or comes to mean something else.
JSON_FORMAT = 1


class TerminalTrack:
    """A `Track` that draws nested bars with the remaining time; without a terminal it writes a line now and then."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(elapsed_when_finished=True),
            console=console,
            transient=True,
        )
        self.depth = 0

    def __call__(self, items: Iterable[T], description: str, total: int) -> Iterator[T]:
        show = self._live if self.console.is_terminal else self._log
        for item in show(items, description, total):
            check_stopped()
            yield item

    def _live(self, items: Iterable[T], description: str, total: int) -> Iterator[T]:
        if self.depth == 0:
            self.progress.start()
        self.depth += 1
        bar = self.progress.add_task(description, total=total)
        try:
            for item in items:
                yield item
                self.progress.advance(bar)
        finally:
            self.progress.remove_task(bar)
            self.depth -= 1
            if self.depth == 0:
                self.progress.stop()

    def _log(self, items: Iterable[T], description: str, total: int) -> Iterator[T]:
        start = last = time.monotonic()
        outermost = self.depth == 0
        self.depth += 1
        try:
            for done, item in enumerate(items, 1):
                yield item
                now = time.monotonic()
                if outermost and now - last > LOG_SECONDS:
                    last, remaining = now, (now - start) / done * (total - done)
                    self.console.print(f"{description}: {done} of {total}, about {remaining:.0f} s left")
        finally:
            self.depth -= 1


def print_line(line: str) -> None:
    """Print a line as it is, brackets and all."""
    console.print(line, highlight=False, soft_wrap=True)


def be_quiet(wanted: bool) -> None:
    """From now on print nothing but errors, warnings and JSON; libraries that are imported later draw no bars."""
    console.quiet = wanted
    if wanted:
        os.environ.update(dict.fromkeys(BARS, "1"))


def stdout_for_json(wanted: bool) -> AbstractContextManager[Any]:
    """Inside, what is printed goes to stderr where JSON is wanted: stdout has that and nothing else."""
    return redirect_stdout(sys.stderr) if wanted else nullcontext()


def print_json(data: dict[str, Any]) -> None:
    """Print plain data as JSON, with null for numbers that are not finite; docs/commands.md has what is in it."""
    print(json.dumps({"format": JSON_FORMAT, **finite(data)}, indent=2, ensure_ascii=False, allow_nan=False))


def print_warnings(results: Iterable[EvalResult]) -> None:
    """Print what results warn of: a line for each."""
    for result in results:
        if result.warning is not None:
            errors.print(f"warning: {result.warning}", style="yellow", highlight=False, soft_wrap=True)


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]], *, text_columns: int = 1) -> Table:
    """A table whose first `text_columns` columns are words, folded where room is scarce, and the others numbers."""
    drawn = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        words = index < text_columns
        drawn.add_column(column, justify="left" if words else "right", overflow="fold", no_wrap=not words)
    for row in rows:
        drawn.add_row(*row)
    return drawn


def megabytes(count: float) -> str:
    """1234567 -> "1.23 MB"."""
    return f"{count / 1e6:,.2f} MB"


def number(value: float) -> str:
    """Four decimals where they say something: 0.0123, 13.7413, 1,234.6, 1.2e+06."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-4:
        return f"{value:.2e}"
    return f"{value:,.1f}" if size >= 1000 else f"{value:.4f}"
