"""`eckart report`: one page, and files for a paper, from run directories. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from eckart.cli.options import Force
from eckart.cli.terminal import console
from eckart.reports import read_runs, why_no_drawings, write_files, write_report


def command(
    directories: Annotated[list[Path], typer.Argument(help="Run or study directories")],
    out: Annotated[Path, typer.Option(help="The page to write")] = Path("report.html"),
    title: Annotated[str | None, typer.Option(help="Its heading")] = None,
    files: Annotated[
        Path | None, typer.Option(help="Folder for its tables as CSV and its line figures as SVG, for a paper")
    ] = None,
    force: Force = False,
) -> None:
    """Write one HTML page from run directories: tables and figures, no network, opens from disk."""
    if out.exists() and not force:
        raise FileExistsError(f"{out} exists; give another --out, or --force")
    if files is not None and files.exists() and any(files.iterdir()) and not force:
        raise FileExistsError(f"{files} is not empty; give another --files, or --force")
    console.print(f"{write_report(directories, out, title=title)}")
    if files is not None:
        console.print(tell_files(directories, files))


def tell_files(directories: Sequence[Path], folder: Path) -> str:
    """Write a report's tables and figures as files; says where, and why there are no figures, in rich's markup."""
    count = len(write_files(read_runs(directories), folder))
    why = why_no_drawings()
    return f"{count} files in {folder}" + (f"; {why}" if why else "")
