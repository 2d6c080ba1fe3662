"""What several commands print: tables, and remarks on a plan."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from rich.table import Table

from eckart.allocation import PlanSummary, RankPlan, slow_settings
from eckart.cli.terminal import table
from eckart.compression.replace import CompressionReport, SiteReport
from eckart.models.sites import Site

# Linears that a remark names one by one.
NAMED = 5
# Layers of experts that are printed; the report has all of them.
LAYERS = 12


def sizes_table(title: str, summary: PlanSummary, plan: RankPlan) -> Table:
    """A model's size before and after a plan, in every measure of a budget."""

    def row(what: str, before: float, after: float) -> list[str]:
        return [what, f"{before:,.0f}", f"{after:,.0f}", f"{after / before:.1%}" if before else ""]

    everything = (plan.dense_params, plan.kept_params)
    removed = plan.dense_params - plan.kept_params
    files = [size / 1e6 for size in summary.file_bytes]
    return table(
        title,
        ["", "dense", "compressed", "kept"],
        [
            row("numbers in the linears (keep)", plan.planned_params, plan.planned_params - removed),
            *([] if plan.planned_params == plan.dense_params else [row("numbers in all linears", *everything)]),
            row("numbers in the model (keep_total)", *summary.params),
            ["weight files in MB (max_bytes)", *(f"{size:,.2f}" for size in files), f"{files[1] / files[0]:.1%}"],
            row("multiply-accumulates per token, in linears", *summary.macs_per_token),
        ],
    )


def experts_table(report: CompressionReport) -> Table | None:
    """Of each layer of a mixture, the experts' use against their ranks and errors; None of a model without experts.

    The half of a layer's experts that is given the most tokens is compared with the other half.
    """
    layers: dict[int, list[SiteReport]] = {}
    for each in report.sites:
        if each.tokens is not None:
            layers.setdefault(each.site.block, []).append(each)
    if not layers:
        return None
    rows = []
    for block, sites in list(layers.items())[:LAYERS]:
        by_use = sorted(sites, key=lambda each: (each.tokens or 0.0, each.name))
        halves = (by_use[len(sites) // 2 :], by_use[: len(sites) // 2])
        uses = [each.tokens for each in by_use if each.tokens is not None]
        rows.append(
            [
                f"{block}",
                f"{len({each.site.input_group.rpartition('.')[0] for each in sites})}",
                f"{uses[0]:.1%} to {uses[-1]:.1%}",
                *(_mean([each.rank for each in half], ".0f") for half in halves),
                *(_mean([each.relative_error for each in half], ".2g") for half in halves),
            ]
        )
    more = f"; the first {LAYERS} of {len(layers)} layers" if len(layers) > LAYERS else ""
    columns = ["layer", "experts", "tokens given", "rank: used most", "used least", "error: used most", "used least"]
    return table(f"experts, the more used half of a layer and the other{more}", columns, rows)


def _mean(values: Sequence[float | None], form: str) -> str:
    """The mean of what is there, "" where nothing is."""
    known = [value for value in values if value is not None]
    return f"{sum(known) / len(known):{form}}" if known else ""


def remarks(plan: RankPlan, report: CompressionReport | None = None) -> Iterator[str]:
    """A line for each linear that stays dense although a rank was asked for, or that has no influence on the
    calibration text, one on numbers in few bits, and one for each kind that may be slow."""
    for name, note in plan.notes.items():
        yield f"{name}: {note}"
    notes: dict[str, list[str]] = {}
    for site in report.sites if report else ():
        if site.note:
            notes.setdefault(site.note, []).append(f"{site.name} (rank {site.rank})")
    for note, names in notes.items():
        for name in names[:NAMED]:
            yield f"{name}: {note}"
        if len(names) > NAMED:
            yield f"{len(names) - NAMED} more linears: {note}; compression.json has all of them"
    if plan.stored:
        ways = Counter(_way_of(plan, site) for site in plan.sites if site.name in plan.ranks)
        yield "kept: " + ", ".join(f"{count} {way}" for way, count in ways.most_common())
    for line in slow_settings(plan):
        yield f"speed: {line}"


def _way_of(plan: RankPlan, site: Site) -> str:
    """How a linear is kept, in words: "as they are", "as factors", "as int4 weight and int4 factors"."""
    storage = plan.storage(site)
    if storage.is_plain:
        return "as they are" if plan.rank(site) is None else "as factors"
    return f"as {storage}"
