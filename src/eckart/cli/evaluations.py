"""`eckart evaluations`: the tables of what measures, and of what is read for it."""

from __future__ import annotations

from typing import Any

from eckart.cli.options import Json
from eckart.cli.terminal import console, print_json, table
from eckart.data.corpora import CORPORA
from eckart.data.labelled import LABELLED
from eckart.data.mixtures import MIXTURES, describe, shares_of
from eckart.evals.catalogue import EVALUATIONS
from eckart.evals.harness_tasks import LOCAL_TASKS


def command(as_json: Json = False) -> None:
    """List what can be measured: evaluations, the corpora and labelled sets that they read, the local tasks."""
    if as_json:
        print_json(_listed())
        return
    rows = [
        [f"{name}:{row.argument.upper()}" if row.argument else name, row.about] for name, row in EVALUATIONS.items()
    ]
    console.print(table("Evaluations", ["name", "what it measures"], rows, text_columns=2))
    rows = [[name, corpus.hub or "", ", ".join(corpus.files)] for name, corpus in CORPORA.items()]
    console.print(
        table("Corpora (or a file, or a hub data set)", ["name", "hub", "local splits"], rows, text_columns=3)
    )
    rows = [[name, describe(shares_of(name))] for name in MIXTURES]
    console.print(table("Mixtures, to calibrate on (or c4*2+ptb)", ["name", "shares"], rows, text_columns=2))
    rows = [[name, f"{known.hub}:{known.config}", ", ".join(known.splits)] for name, known in LABELLED.items()]
    console.print(
        table("Labelled sets (or a file, or a hub data set)", ["name", "hub", "splits"], rows, text_columns=3)
    )
    console.print(f"lm-eval tasks that local files serve: {', '.join(LOCAL_TASKS)}; any other is read from the hub")


def _listed() -> dict[str, Any]:
    """The tables as plain data."""
    return {
        "evaluations": [
            {
                "name": name,
                "argument": row.argument or None,
                "about": row.about,
                "better": row.traits.better,
                "needs": sorted(row.needs),
            }
            for name, row in EVALUATIONS.items()
        ],
        "corpora": [
            {"name": name, "hub": corpus.hub, "local_splits": list(corpus.files), "local_files": corpus.files}
            for name, corpus in CORPORA.items()
        ],
        "mixtures": [
            {"name": name, "shares": {part: float(share) for part, share in shares_of(name).items()}}
            for name in MIXTURES
        ],
        "labelled": [
            {"name": name, "hub": known.hub, "config": known.config, "splits": list(known.splits)}
            for name, known in LABELLED.items()
        ],
        "lm_eval_from_local_files": list(LOCAL_TASKS),
    }
