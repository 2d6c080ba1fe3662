"""The application: the names of the commands, how one is fetched from its file, and how it ends on bad input."""

from __future__ import annotations

import ast
import importlib
import importlib.metadata
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Final, NoReturn

import typer
import wrapt
from typer.core import TyperCommand, TyperGroup

from eckart.cli.ending import DEBUG, HandedOver, Stopped, stopping, tell
from eckart.cli.terminal import errors

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
# How a command that was stopped goes on. Of one that is not here, nothing is kept.
GOES_ON = {
    "compress": "the same command starts from what is in the cache, and with --out-of-core goes on by --resume",
    "correct": "the same command starts from what is in the cache",
    "eval": "with --out, the same command goes on with what is missing",
    **dict.fromkeys(("run", "reproduce"), "the same command goes on with what is missing"),
    **dict.fromkeys(("search", "probe", "finetune"), "the same command goes on where it was"),
}
NOTHING_KEPT = "nothing was changed"


def load_command(name: str) -> TyperCommand:
    """The command of this name of COMMANDS; imports its file, and torch with most of them, which takes seconds."""
    one = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=STYLE)
    module = importlib.import_module(f"eckart.cli.{name}")
    one.command(name, context_settings=getattr(module, "SETTINGS", None))(module.command)
    command = typer.main.get_command(one)
    assert isinstance(command, TyperCommand)
    return command


def first_line(name: str) -> str:
    """What the command of this name of COMMANDS does, from its file, without importing it."""
    tree = ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "command")
    return (ast.get_docstring(function) or "").partition("\n")[0]


class LazyGroup(TyperGroup):
    """Lists the commands from the text of their files, and imports the file of the one that is called."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.commands = {name: TyperCommand(name, help=first_line(name), rich_markup_mode=STYLE) for name in COMMANDS}

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[Any, Any, list[str]]:
        name, _listed, others = super().resolve_command(ctx, args)
        if name != "exec":  # whose program says what it wants to
            wrapt.when_imported("transformers.utils.logging")(_silence)
        return name, load_command(name) if name else None, others


app = typer.Typer(
    name="eckart",
    cls=LazyGroup,
    no_args_is_help=True,
    add_completion=False,
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
) -> None:
    """Low-rank compression of Hugging Face language models.

    Start with [bold]eckart demo[/bold] (the built-in model, no network), then [bold]eckart compress[/bold] and
    [bold]eckart eval[/bold] on your own. "keep" is always the share of parameters kept, not removed.
    """


def main() -> None:
    """Entry point. What does not end well is told in one line on stderr, see `ending`; ECKART_DEBUG=1 raises it."""
    program: Callable[[], None] | None = None
    try:
        with stopping(), warnings.catch_warnings():
            warnings.showwarning = _warn
            app()
    except Exception as error:
        if os.environ.get(DEBUG):
            raise
        _end(*tell(error))
    except Stopped as signal:
        _end(signal.status, f"stopped; {GOES_ON.get(''.join(sys.argv[1:2]), NOTHING_KEPT)}")
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
