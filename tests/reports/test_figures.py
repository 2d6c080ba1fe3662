"""Figures: what is drawn, from which numbers, and which are left out."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import pytest

from eckart.reports.answers import agreement
from eckart.reports.bars import cost, stereoset, tasks
from eckart.reports.charts import Chart, View, spread_demands_log
from eckart.reports.figures import all_figures
from eckart.reports.histograms import similarity
from eckart.reports.linears import kept_share, spectra
from eckart.reports.palette import DARK, METHODS, RAMP, SURFACE, give_looks
from eckart.reports.rows import looks_of, names_of
from eckart.reports.runs import Collection, read_runs
from eckart.reports.sizes import divergence, perplexity, scores

from .make_runs import CORPORA, KEEPS, TASKS, change_recipe, change_result, make_probing_study, make_run, make_study
from .make_runs import METHODS as NAMES


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return read_runs([make_study(tmp_path_factory.mktemp("study"))])


def view(chart: Chart | None, *choices: str) -> View:
    assert chart is not None
    return next(view for view in chart.views if view.choices == choices)


def test_every_section_has_its_figure(study: Collection) -> None:
    charts = all_figures(study)
    assert [chart.slug for chart in charts] == [
        *("perplexity", "kept", "spectra", "tasks", "scores", "stereoset"),
        *("agreement", "divergence", "similarity", "cost"),
    ]
    for chart in charts:
        assert chart.reading.endswith(".")
        assert chart.table.rows
        assert all(len(cells) == len(chart.table.columns) for cells in chart.table.rows), chart.slug
        assert {view.choices[0] for view in chart.views} == {"heron-15M", "sable-60M"}, chart.slug
        assert all(len(view.choices) == len(chart.selectors) for view in chart.views), chart.slug


def test_a_line_for_each_method_and_a_panel_for_each_corpus(study: Collection) -> None:
    figure = view(perplexity(study), "sable-60M").figure
    assert [note.text for note in figure.layout.annotations] == list(CORPORA)
    lines = [trace for trace in figure.data if trace.name == "nsvd-i"]
    assert len(lines) == len(CORPORA)
    runs = {run.keep: run for run in study.of("sable-60M") if run.method == "nsvd-i"}
    sizes = [runs[keep].compression["bytes"][1] / 1e6 for keep in sorted(KEEPS)]
    assert list(lines[1].x) == pytest.approx(sizes)
    assert list(lines[1].y) == [runs[keep].compressed["perplexity:ptb"].value for keep in sorted(KEEPS)]
    assert "0.7" in lines[1].hovertext[1]
    assert "nsvd-i, keep 0.7" in lines[1].hovertext[1]


def test_a_method_looks_the_same_in_every_figure(study: Collection) -> None:
    look = looks_of(study)["asvd-i"]
    for chart in (perplexity(study), divergence(study)):
        traces = [t for view in chart.views for t in view.figure.data if t.name == "asvd-i"]
        assert {trace.line.color for trace in traces} == {look.color}
    bars = view(tasks(study), "sable-60M", "keep 0.7", "acc").figure.data[0]
    assert bars.marker.color[list(bars.y).index("asvd-i")] == look.color


def test_far_apart_numbers_get_a_logarithmic_axis(study: Collection) -> None:
    assert spread_demands_log([5, 20083])
    assert not spread_demands_log([5, 9])
    assert not spread_demands_log([0, 20083])
    assert view(perplexity(study), "sable-60M").figure.layout.yaxis3.type == "log"


def test_an_infinite_perplexity_is_said_not_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    make_run(tmp_path / "b", keep=0.5)
    change_result(run / "evals" / "perplexity-ptb.json", value=math.inf, stderr=None)
    chart = perplexity(read_runs([tmp_path]))
    shown = view(chart, "heron-15M")
    assert shown.notes == ("asvd-i, keep 0.7 is infinite on ptb and not drawn.",)
    assert all(math.isfinite(y) for trace in shown.figure.data for y in trace.y)
    assert chart is not None
    assert "inf" in {cell.text for cells in chart.table.rows for cell in cells}


def test_the_heat_map_has_a_cell_for_every_linear(study: Collection) -> None:
    figure = view(kept_share(study), "sable-60M", "nsvd-i", "keep 0.5", "kept share").figure
    heat = figure.data[0]
    assert len(heat.y) == 7
    assert len(heat.x) == 6
    run = next(r for r in study.of("sable-60M") if r.series == "nsvd-i" and r.keep == 0.5)
    site = next(s for s in run.sites if s.role == "mlp.up_proj" and s.block == 4)
    assert heat.z[list(heat.y).index("mlp.up_proj")][4] == site.kept
    assert f"rank {site.rank}" in heat.hovertext[list(heat.y).index("mlp.up_proj")][4]
    assert (heat.zmin, heat.zmax) == (0, 1)


def test_methods_without_an_error_have_no_error_map(study: Collection) -> None:
    chart = kept_share(study)
    assert chart is not None
    shown = {(view.choices[1], view.choices[3]) for view in chart.views}
    assert ("asvd-i", "relative error") in shown
    assert ("svd", "relative error") not in shown
    assert not any(view.choices[1] == "int8" for view in chart.views)


def test_spectra_have_a_panel_for_each_role_and_a_line_for_each_block(study: Collection) -> None:
    figure = view(spectra(study), "heron-15M", "svd").figure
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert len(lines) == 7 * 4
    assert lines[0].y[0] == 1
    assert (lines[0].x0, lines[0].dx, len(lines[0].y)) == (0, 1 / 64, 65)


def test_bars_have_the_dense_model_first_and_their_errors(study: Collection) -> None:
    figure = view(tasks(study), "heron-15M", "keep 0.5", "acc").figure
    bars = figure.data[0]
    assert list(bars.y) == ["dense", *sorted(NAMES), "int8"]
    dense = study.dense("heron-15M", "lm-eval:boolq")
    assert dense is not None
    assert bars.x[0] == dense.value
    assert bars.error_x.array[0] == dense.stderr
    panels = [note.text for note in view(tasks(study), "heron-15M", "keep 0.5", "acc_norm").figure.layout.annotations]
    assert panels == ["piqa", "arc_easy"]  # boolq has no acc_norm


def test_parts_of_a_task_are_no_measures_of_their_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    part = {"value": 0.5, "stderr": 0.1, "n": 4}
    for end in ("", ".dense"):
        scores = {"piqa_easy": part, "piqa_hard": part, "acc_norm": part}
        change_result(run / "evals" / f"lm-eval-piqa{end}.json", task="lm-eval:piqa@5-shot", scores=scores)
    chart = tasks(read_runs([run]))
    assert chart is not None
    assert {view.choices[2] for view in chart.views} == {"acc", "acc_norm"}
    assert chart.notes == ("piqa@5-shot has 2 parts; their scores are in its result files.",)


def test_scores_fall_along_the_share_kept(study: Collection) -> None:
    shown = view(scores(study), "heron-15M")
    assert [note.text for note in shown.figure.layout.annotations] == [f"{task}: acc ↑" for task in TASKS]
    line = next(trace for trace in shown.figure.data if trace.name == "svd")
    assert list(line.x) == [100 * keep for keep in sorted(KEEPS)]
    runs = {run.keep: run for run in study.of("heron-15M") if run.method == "svd"}
    assert list(line.y) == [runs[keep].compressed["lm-eval:boolq"].value for keep in sorted(KEEPS)]
    assert any("int8 is without a share to keep on boolq" in note for note in shown.notes)


def test_one_share_is_no_line_of_scores(tmp_path: Path) -> None:
    make_run(tmp_path / "a")
    make_run(tmp_path / "b", method="svd")
    assert scores(read_runs([tmp_path])) is None


def test_a_classifier_is_a_task_among_others(tmp_path: Path) -> None:
    collection = read_runs([make_probing_study(tmp_path)])
    for chart in (tasks(collection), scores(collection)):
        assert chart is not None
        assert "probing" not in {cells[3].text for cells in chart.table.rows}
        assert {cells[3].text for cells in chart.table.rows} == {"cola"}
    assert {view.choices[2] for view in tasks(collection).views} == {"mcc", "accuracy", "f1"}


def test_stereoset_by_domain(study: Collection) -> None:
    figure = view(stereoset(study), "heron-15M", "keep 0.5", "ss: stereotypes preferred, 50 is even").figure
    panels = [note.text for note in figure.layout.annotations]
    assert panels == ["overall", "gender", "profession", "race", "religion", "intrasentence", "intersentence"]
    dense = study.dense("heron-15M", "stereoset")
    assert dense is not None
    assert figure.data[3].x[0] == dense.scores["ss.race"].value


def budget_runs(folder: Path) -> Collection:
    """Runs of one method whose budgets are of every kind."""
    budgets = {
        "keep": {},
        "total": {"keep_total": 0.5},
        "bytes": {"max_bytes": 1000},
        "speed": {"speed": {"times": 1.5, "rows": 64}},
        "rules": {"rules": [{"keep": 0.5, "include": ["mlp"]}]},
        "plan": {"plan": "some/mine.json"},
        "search": {},
    }
    for name, budget in budgets.items():
        run = make_run(folder / name)
        if name != "keep":
            change_recipe(run, keep=None, **budget)
    return read_runs([folder])


def test_every_budget_has_its_size_and_every_run_its_bar(tmp_path: Path) -> None:
    collection = budget_runs(tmp_path)
    sizes = {run.name: run.size for run in collection.runs}
    share = f"{collection.runs[0].compression['keep_of_linears']:.2f} of linears"
    assert sizes == {
        "keep": "keep 0.7",
        "total": "keep_total 0.5",
        "bytes": "max_bytes 1000",
        "speed": "speed 1.5 at 64 tokens",
        "rules": f"keep 0.5 of mlp, {share}",
        "plan": f"plan mine, {share}",
        "search": share,
    }
    for run in collection.runs:
        assert run.size is not None
        assert collection.at("heron-15M", run.size) == [run]
        bars = view(tasks(collection), "heron-15M", run.size, "acc").figure.data[0]
        assert list(bars.x)[1:] == [pytest.approx(run.compressed["lm-eval:boolq"].value)]
        assert f"{run.series}, {run.size}" in bars.hovertext[1]
        flips = view(agreement(collection), "heron-15M", run.size).figure.data[0]
        assert list(flips.y) == [run.series]


def test_runs_of_one_series_are_told_apart_by_their_size(tmp_path: Path) -> None:
    make_run(tmp_path / "a", keep=0.9)
    make_run(tmp_path / "b", keep=0.5)
    make_run(tmp_path / "c", method="svd", keep=0.5)
    names = names_of(read_runs([tmp_path]).runs)
    assert names == {"a": "asvd-i, keep 0.9", "b": "asvd-i, keep 0.5", "c": "svd"}


def test_flips_point_both_ways(study: Collection) -> None:
    figure = view(agreement(study), "heron-15M", "keep 0.7").figure
    run = next(r for r in study.of("heron-15M") if r.series == "svd" and r.keep == 0.7)
    result = run.agreement["agreement:lm-eval:boolq"]
    learned, unlearned, differ = figure.data[:3]
    place = list(learned.y).index("svd")
    assert learned.x[place] == pytest.approx(100 * result.scores["learned"].value / result.n)
    assert unlearned.x[place] == pytest.approx(-100 * result.scores["unlearned"].value / result.n)
    assert differ.x[place] == pytest.approx(100 * result.value)
    assert [note.text for note in figure.layout.annotations] == ["boolq", "piqa", "arc_easy"]


def test_similarity_is_the_share_of_the_counts(study: Collection) -> None:
    chart = similarity(study)
    figure = view(chart, "sable-60M", "wikitext2").figure
    assert sum(figure.data[0].y) == pytest.approx(1)
    assert figure.layout.annotations[0].text.startswith("wikitext2: 0.9")


def test_speeds_are_held_against_one(study: Collection) -> None:
    figure = view(cost(study), "heron-15M", "keep 0.5", "").figure
    titles = [note.text for note in figure.layout.annotations]
    lines = {shape.xref: shape.x0 for shape in figure.layout.shapes}
    assert lines[f"x{titles.index('Decode speed, dense = 1') + 1}"] == 1
    assert lines["x"] == study.of("heron-15M")[0].counted("params", 0)


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for file in (run / "evals").glob("*"):
        if not file.name.startswith("perplexity-ptb"):
            file.unlink()
    assert [chart.slug for chart in all_figures(read_runs([run]))] == ["perplexity", "kept", "spectra"]
    shutil.rmtree(run / "evals")
    (run / "model" / "compression.json").unlink()
    assert all_figures(read_runs([run])) == []


def test_names_are_escaped_where_plotly_reads_tags(tmp_path: Path) -> None:
    make_run(tmp_path / "a", method="<b>bold</b>")
    chart = perplexity(read_runs([tmp_path]))
    names = {trace.name for trace in view(chart, "heron-15M").figure.data}
    assert "&lt;b&gt;bold&lt;/b&gt;" in names
    bars = view(tasks(read_runs([tmp_path])), "heron-15M", "keep 0.7", "acc").figure.data[0]
    assert "&lt;b&gt;bold&lt;/b&gt;" in bars.y
    assert all("<b>" not in text for text in bars.hovertext)


# Relative luminance and contrast by WCAG 2.2; colour blindness by Machado et al. 2009, severity 1.
BLIND = {
    "protan": ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998)),
    "deutan": ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881)),
    "tritan": ((1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602), (0.004733, 0.691367, 0.303900)),
}


def linear(color: str) -> list[float]:
    values = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    return [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]


def luminance(rgb: list[float]) -> float:
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), rgb, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(linear(one)), luminance(linear(other))))
    return (high + 0.05) / (low + 0.05)


def lab(rgb: list[float]) -> list[float]:
    """CIELAB under D65."""
    rows = ((0.4124, 0.3576, 0.1805), (0.2126, 0.7152, 0.0722), (0.0193, 0.1192, 0.9505))
    xyz = [sum(a * b for a, b in zip(row, rgb, strict=True)) for row in rows]
    f = [
        t ** (1 / 3) if t > (6 / 29) ** 3 else t / (3 * (6 / 29) ** 2) + 4 / 29
        for t in (value / white for value, white in zip(xyz, (0.9505, 1, 1.089), strict=True))
    ]
    return [116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])]


def seen(color: str, kind: str) -> list[float]:
    return lab([min(max(sum(a * b for a, b in zip(row, linear(color), strict=True)), 0), 1) for row in BLIND[kind]])


@pytest.mark.parametrize("side", ["light", "dark"])
def test_method_colours_stand_out_from_the_page(side: str) -> None:
    for tone in METHODS:
        assert contrast(getattr(tone, side), getattr(SURFACE, side)) >= 3, tone


@pytest.mark.parametrize("kind", list(BLIND))
@pytest.mark.parametrize("side", ["light", "dark"])
def test_method_colours_stay_apart_for_the_colour_blind(side: str, kind: str) -> None:
    colors = [seen(getattr(tone, side), kind) for tone in METHODS[:6]]
    apart = {(a, b): math.dist(colors[a], colors[b]) for a in range(6) for b in range(a)}
    assert min(apart.values()) > 15, min(apart, key=lambda pair: apart[pair])


def test_the_ramp_is_ordered_by_lightness_alone() -> None:
    light = [luminance(linear(tone.light)) for tone in RAMP]
    dark = [luminance(linear(tone.dark)) for tone in RAMP]
    assert light == sorted(light, reverse=True)
    assert dark == sorted(dark)


@pytest.mark.slow
def test_every_colour_of_a_figure_has_a_dark_partner(study: Collection) -> None:
    def colors(value: object) -> set[str]:
        if isinstance(value, dict):
            return set().union(*(colors(inner) for inner in value.values()))
        if isinstance(value, list | tuple):
            return set().union(*(colors(inner) for inner in value))
        return {value} if isinstance(value, str) and value.startswith("#") else set()

    used = {c for chart in all_figures(study) for view in chart.views for c in colors(view.figure.to_plotly_json())}
    assert used <= set(DARK)
    assert used


def test_variants_of_a_method_share_its_colour_and_differ_in_their_dash() -> None:
    looks = give_looks([("svd", "svd"), ("asvd-0", "asvd-0 (alpha 0.5)"), ("asvd-0", "asvd-0 (alpha 1.0)")])
    one, other = looks["asvd-0 (alpha 0.5)"], looks["asvd-0 (alpha 1.0)"]
    assert one.color == other.color != looks["svd"].color
    assert one.dash != other.dash
