"""The application: the names of the commands, how one is fetched from its file, and how it ends on bad input."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Annotated, Any, Final, NoReturn

import typer
import wrapt
from typer.core import TyperCommand, TyperGroup

from eckart.cli.completion import command_in, outline
from eckart.cli.ending import DEBUG, HandedOver, Stopped, stopping, tell, way_on
from eckart.cli.terminal import be_quiet, errors

# Each is the function `command` of the file of its name, and its docstring is the help. In the order of a first use.
COMMANDS = (
    "demo",
    "compress",
    "correct",
    "export",
    "inspect",
    "methods",
    "evaluations",
    "eval",
    "report",
    "run",
    "reproduce",
    "search",
    "probe",
    "finetune",
    "pitfalls",
    "exec",
)
STYLE: Final = "rich"


def load_command(name: str) -> TyperCommand:
    """The command of this name of COMMANDS; imports its file, and torch with most of them, which takes seconds."""
    module = importlib.import_module(f"eckart.cli.{name}")
    return _as_command(name, module.command, getattr(module, "SETTINGS", None))


def outline_command(name: str) -> TyperCommand:
    """The same with its options alone, for completion: from the text of its file, at once."""
    return _as_command(name, outline(name))


def _as_command(name: str, function: Callable[..., Any], settings: dict[str, Any] | None = None) -> TyperCommand:
    one = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=STYLE)
    one.command(name, context_settings=settings)(function)
    command = typer.main.get_command(one)
    assert isinstance(command, TyperCommand)
    return command


def first_line(name: str) -> str:
    """What the command of this name of COMMANDS does, from its file, without importing it."""
    return (ast.get_docstring(command_in(name)) or "").partition("\n")[0]


class LazyGroup(TyperGroup):
    """Lists the commands from the text of their files, and imports the file of the one that is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=first_line(name), rich_markup_mode=STYLE) for name in COMMANDS}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, _listed, others = super().resolve_command(ctx, args)
        if name != "exec":  # whose program says what it wants to
            wrapt.when_imported("transformers.utils.logging")(_silence)
        make = outline_command if ctx.resilient_parsing else load_command
        return name, make(name) if name else None, others


app = typer.Typer(
    name="eckart",
    cls=LazyGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=STYLE,
)


def _print_version(requested: bool) -> None:
    if requested:
        print(f"eckart {importlib.metadata.version('eckart')}")
        raise typer.Exit


@app.callback()
def eckart(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit")
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print errors and warnings only, and what --json asks for")
    ] = False,
) -> None:
    """Low-rank compression of Hugging Face language models.

    Start with [bold]eckart demo[/bold] (the built-in model, no network), then [bold]eckart compress[/bold] and
    [bold]eckart eval[/bold] on your own. "keep" is always the share of parameters kept, not removed.
    """
    be_quiet(quiet)


def main() -> None:
    """Entry point. What does not end well is told in one line on stderr, see `ending`; ECKART_DEBUG=1 raises it."""
    program: Callable[[], None] | None = None
    try:
        with stopping(), warnings.catch_warnings():
            warnings.showwarning = _warn
            app(prog_name="eckart")
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        _end(*tell(error))
    except Stopped as signal:
        _end(signal.status, f"stopped; {way_on(sys.argv[1:])}")
    except HandedOver as end:
        program = end.program
    if program is not None:  # not called above: what it raises would be told as raised while that was handled
        program()


def _end(status: int, line: str) -> NoReturn:
    errors.print(line, style="red", highlight=False, soft_wrap=True)
    sys.exit(status)


def _warn(message: Warning | str, category: type[Warning], filename: str, lineno: int, *_: Any, **__: Any) -> None:
    """A warning is a line, without the place in the code that Python adds."""
    errors.print(f"warning: {message}", style="yellow", highlight=False, soft_wrap=True)


def _silence(logging: ModuleType) -> None:
    """Of transformers a command shows errors only, and no bars of its own."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
