"""`eckart exec`: another program, in a process that has imported eckart."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from eckart.cli.ending import HandedOver
from eckart.serving.launch import find_program

# The first word that is no option of ours is the program, and all after it is the program's.
SETTINGS: dict[str, Any] = {"ignore_unknown_options": True, "allow_interspersed_args": False}


def command(
    program: Annotated[
        list[str] | None,
        typer.Argument(
            help="An installed program, python SCRIPT.py, -m MODULE, -c CODE or SCRIPT.py, and its own arguments",
            metavar="PROGRAM",
        ),
    ] = None,
) -> None:
    """Run a Python program that does not import eckart, so that it loads compressed checkpoints.

    It runs in this process, as it would by itself: arguments, exit status and signals are its own. Python processes
    that it starts import eckart too, if they are given its environment; not those on other machines.

    \b
    eckart exec -- lm_eval --model hf --model_args pretrained=OUT --tasks piqa
    eckart exec -- python script.py OUT
    eckart exec -- -m package.module OUT
    """
    raise HandedOver(find_program(program or []))
