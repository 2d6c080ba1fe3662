"""Completion: the options of a command from the text of its file, for a shell that waits for the next word.

Importing a command's file takes torch's seconds. Its options are annotations, made of typer and of `options.py`, which
are quick; what else an annotation names (a type of another room, a number in a help text) is not needed to complete.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from pathlib import Path
from typing import Any

from eckart.cli import options


def command_in(name: str) -> ast.FunctionDef:
    """The function `command` of the file of a command, as syntax."""
    tree = ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
    (function,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "command")
    return function


def outline(name: str) -> Any:
    """A function with the parameters of a command, none of its defaults, and no body."""

    def nothing(**_: object) -> None:
        """Does nothing."""

    names = _Names({**vars(builtins), **vars(options)})
    arguments = command_in(name).args
    nothing.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [
            inspect.Parameter(each.arg, inspect.Parameter.KEYWORD_ONLY, annotation=_value(each.annotation, names))
            for each in (*arguments.args, *arguments.kwonlyargs)
        ]
    )
    return nothing


class _Names(dict[str, Any]):
    """What annotations name. A type that has to be imported is taken for text."""

    def __missing__(self, name: str) -> type:
        return str


class _Holes(ast.NodeTransformer):
    """Leaves out what is filled into a help text."""

    def visit_FormattedValue(self, node: ast.FormattedValue) -> ast.Constant:
        return ast.Constant("...")


def _value(annotation: ast.expr | None, names: _Names) -> Any:
    assert annotation is not None
    whole = ast.fix_missing_locations(ast.Expression(_Holes().visit(annotation)))
    return eval(compile(whole, "<annotation>", "eval"), {}, names)
