"""`eckart methods`: the three tables of what compresses."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Annotated

import typer

from eckart.cli.terminal import console, table
from eckart.compression.baselines import BASELINES, baseline_options, build_baseline
from eckart.lowrank import METHODS, build_method, method_options
from eckart.runs.composition import COMPOSITIONS, composition_options


def command(
    name: Annotated[str | None, typer.Argument(help="Show one method whole")] = None,
) -> None:
    """List compositions, methods and baselines, or show one: its paper, equation, assumptions and settings."""
    if name is None:
        compositions = {entry: compose() for entry, compose in COMPOSITIONS.items()}
        rows = [
            [entry, f"{one.method.name}. {one.describe()}", _settings(composition_options(entry))]
            for entry, one in compositions.items()
        ]
        console.print(
            table("Compositions: the first is the default", ["name", "what it is", "settings"], rows, text_columns=3)
        )
        rows = [[entry, _first_line(METHODS[entry]), _settings(method_options(entry))] for entry in METHODS]
        console.print(table("Methods", ["name", "what it is", "settings"], rows, text_columns=3))
        rows = [[entry, _first_line(BASELINES[entry]), _settings(baseline_options(entry))] for entry in BASELINES]
        console.print(table("Baselines, for `run`", ["name", "what it is", "settings"], rows, text_columns=3))
        return
    if name in BASELINES:
        baseline = build_baseline(name)
        facts = {
            "": BASELINES[name].__doc__ or "",
            "paper": baseline.paper,
            "does": baseline.about,
            "size": "keep" if baseline.needs_keep else "one",
            "needs": "calibration text" if baseline.needs_tokens else "no calibration",
            "settings": _settings(baseline_options(name)) or "none",
        }
    else:
        settings = composition_options(name)  # refuses an unknown name, with what there is
        composed = COMPOSITIONS[name]() if name in COMPOSITIONS else None
        method = composed.method if composed else build_method(name)
        facts = {
            "": (COMPOSITIONS[name] if composed else METHODS[name]).__doc__ or "",
            **({"method": method.name, "around it": composed.describe()} if composed else {}),
            "paper": method.paper,
            "equation": method.equation,
            "assumes": method.assumes,
            "fails": method.fails,
            "needs": ", ".join(sorted(method.needs)) or "no calibration",
            "settings": _settings(settings) or "none",
        }
    console.print(table(name, ["", ""], [[key, value] for key, value in facts.items()], text_columns=2))


def _first_line(entry: Callable[..., object]) -> str:
    return (entry.__doc__ or "").splitlines()[0]


def _settings(options: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())
