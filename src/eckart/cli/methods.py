"""`eckart methods`: the three tables of what compresses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any

import typer

from eckart.cli.options import Json
from eckart.cli.terminal import console, print_json, table
from eckart.compression.baselines import BASELINES, baseline_options, build_baseline
from eckart.lowrank import METHODS, build_method, method_options
from eckart.runs.composition import COMPOSITIONS, composition_options


def command(
    name: Annotated[str | None, typer.Argument(help="Show one method whole")] = None,
    as_json: Json = False,
) -> None:
    """List compositions, methods and baselines, or show one: its paper, equation, assumptions and settings."""
    if as_json:
        kinds: dict[str, Iterable[str]] = {"compositions": COMPOSITIONS, "methods": METHODS, "baselines": BASELINES}
        print_json(
            {kind: [_entry(each) for each in names] for kind, names in kinds.items()} if name is None else _entry(name)
        )
        return
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


def _entry(name: str) -> dict[str, Any]:
    """All that is known of a composition, a method or a baseline, as plain data. Raises ValueError for another name."""
    if name in BASELINES:
        baseline = build_baseline(name)
        return {
            "name": name,
            "kind": "baseline",
            "about": baseline.about,
            "paper": baseline.paper,
            "needs": ["calibration text"] if baseline.needs_tokens else [],
            "settings": baseline_options(name),
        }
    settings = composition_options(name)  # refuses an unknown name, with what there is
    composed = COMPOSITIONS[name]() if name in COMPOSITIONS else None
    method = composed.method if composed else build_method(name)
    return {
        "name": name,
        "kind": "composition" if composed else "method",
        "about": f"{method.name}. {composed.describe()}" if composed else _first_line(METHODS[name]),
        "paper": method.paper,
        "equation": method.equation,
        "assumes": method.assumes,
        "fails": method.fails,
        "needs": sorted(method.needs),
        "settings": settings,
    }


def _first_line(entry: Callable[..., object]) -> str:
    return (entry.__doc__ or "").splitlines()[0]


def _settings(options: Mapping[str, object]) -> str:
    return ", ".join(f"{key}={value}" for key, value in options.items())
