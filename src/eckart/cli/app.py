"""The command itself: its name, the options that several commands share, and how it ends on bad input."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from eckart.lowrank import DecompositionError
from eckart.runs.engine.choose import describe_engines

app = typer.Typer(
    name="eckart",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="""Low-rank compression of Hugging Face language models.

    Start with [bold]eckart demo[/bold] (the built-in model, no network), then [bold]eckart compress[/bold] and
    [bold]eckart eval[/bold] on your own. "keep" is always the share of parameters kept, not removed.""",
)
# What is not a terminal, a file or a pipe, has room for a wide table.
console = Console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 160)

Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps")]
Dtype = Annotated[str, typer.Option(help="auto (as stored), float32, bfloat16, float16")]
Data = Annotated[Path | None, typer.Option(help="Folder with local copies of known corpora; default: ask the hub")]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there, once the new one is complete")]
CACHE = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "eckart"
Cache = Annotated[Path, typer.Option(help="Folder for calibration moments, reused by content; safe to delete")]
NoCache = Annotated[bool, typer.Option("--no-cache", help="Keep no moments on disk")]
CORES = os.cpu_count() or 1
Workers = Annotated[
    int | None,
    typer.Option(min=1, help="Probes trained at a time, or workers of a cluster; default every core: speed only"),
]
EngineName = Annotated[
    str,
    typer.Option("--engine", help=f"Where work runs: {describe_engines()}"),
]
Address = Annotated[
    str | None,
    typer.Option(help="Head of a cluster, HOST:PORT, or auto; default: a cluster of this machine's own cores"),
]
Batch = Annotated[int, typer.Option(min=1, help="Calibration rows at a time: memory and speed only")]


def main() -> None:
    """Entry point: bad input ends with one line on stderr and status 2; ECKART_DEBUG=1 shows the traceback."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        app()
    except (ValueError, OSError, DecompositionError) as error:
        if os.environ.get("ECKART_DEBUG"):
            raise
        Console(stderr=True).print(f"[red]error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
