"""A budget in speed, modelled against measured: is a model as fast as the table of speeds says?

    python benchmarks/speed_budget.py --model DIR [--times 1.2 1.4] [--rows 1] [--layouts plain pivoted]
        [--dtype float32] [--rounds 7] [--json FILE] [--quick]

For each layout a table is measured anew; for each speed asked for, the model gets random factors at the ranks of the
allocation `uniform`, and the dense and the low-rank model take turns. With one thread on a processor the seconds are
those that the thread ran, so that other programs on the machine disturb less.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from pathlib import Path

from inference import low_rank
from real_models import add_model_option
from transformers import PreTrainedModel

from eckart.allocation import RankPlan, Speed, uniform
from eckart.allocation.stopwatch import measure_speed, step_of
from eckart.models.loading import load_model
from eckart.models.sites import find_sites, replace_module
from eckart.models.units import units_of


def replaced(model: PreTrainedModel, plan: RankPlan) -> PreTrainedModel:
    """A copy of the model with random factors of the plan's ranks."""
    made = copy.deepcopy(model)
    where: dict[str, object] = {"device": model.device, "dtype": model.dtype}
    for site in plan.sites:
        rank = plan.rank(site)
        if rank is not None:
            replace_module(made, site.name, low_rank(site.d_out, site.d_in, rank, plan.layout, where))
    return made.eval()


def measured(dense: PreTrainedModel, compressed: PreTrainedModel, rows: int, rounds: int) -> dict[str, float]:
    """Speeds of the compressed model over the dense one's, a round each."""
    one, other = step_of(dense, rows)[0], step_of(compressed, rows)[0]
    one()
    other()
    speeds = [one() / other() for _ in range(rounds)]
    return {"measured": statistics.median(speeds), "least": min(speeds), "most": max(speeds)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser)
    parser.add_argument("--times", type=float, nargs="+", default=[1.2, 1.4])
    parser.add_argument("--rows", type=int, nargs="+", default=[1])
    parser.add_argument("--layouts", nargs="+", choices=["plain", "pivoted"], default=["plain", "pivoted"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--quick", action="store_true", help="one speed, one layout, three rounds")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.times, arguments.layouts, arguments.rounds = [1.05], ["plain"], 3
    model = load_model(arguments.model, dtype=arguments.dtype, device=arguments.device)
    sites = find_sites(model)
    results = []
    print("rows, layout, speed asked for, keep, modelled, measured (median), least, most")
    for rows in arguments.rows:
        for layout in arguments.layouts:
            table = measure_speed(model, sites, rows=rows, layout=layout)
            for times in arguments.times:
                try:
                    budget = table.budget(Speed(times, rows), sites)
                except ValueError as error:
                    print(error)
                    continue
                plan = uniform(sites, units_of(sites), budget, layout=layout, cost=table.cost)
                result = {
                    "rows": rows,
                    "layout": layout,
                    "asked": times,
                    "keep": plan.keep,
                    "modelled": table.modelled(plan, sites),
                    **measured(model, replaced(model, plan), rows, arguments.rounds),
                }
                results.append(result)
                print("  ".join(str(round(v, 3) if isinstance(v, float) else v) for v in result.values()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
