"""The figure of the blocks' errors: its panels and lines, the numbers behind it, its files."""

from __future__ import annotations

from pathlib import Path

import pytest

from eckart.evals.result import EvalResult, Score
from eckart.reports.blocks import PARTS, accumulation, errors_of
from eckart.reports.charts import Chart, View
from eckart.reports.drawings import draw_lines
from eckart.reports.figures import all_figures
from eckart.reports.files import table_csv
from eckart.reports.rows import looks_of
from eckart.reports.runs import Collection, read_runs
from eckart.reports.tables import summary

from .make_runs import HARM, MODELS, change_result, make_run, write_result

TEXTS = ("wikitext2", "ptb")


def result_of(text: str, method: str, keep: float, blocks: int) -> EvalResult:
    """A result as `evals.accumulation` writes it: every block errs alike by itself, and triples what it is given."""
    own, error, scores, rows = HARM[method] * (1 - keep) / 100, 0.0, {}, []
    for block in range(1, blocks + 1):
        inherited, given = 3 * error, error
        error = own + inherited + 0.1 * inherited
        values = {"error": error, "own": own, "inherited": inherited}
        scores |= {f"{name}.{block}": Score(value, value / 10, 4) for name, value in values.items()}
        rows.append({"block": block, "overlap": 0.1 * inherited, "growth": 3.0 if given else None})
    task = f"accumulation:{text}"
    return EvalResult(task, "relative error", error, error / 10, 4, scores=scores, details={"blocks": rows})


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    folder = tmp_path_factory.mktemp("study")
    for model, (blocks, *_) in MODELS.items():
        for method in ("svd", "asvd-i"):
            for keep in (0.9, 0.5):
                run = make_run(folder / f"{model[-3:]}-{method}-{keep}", model, method, keep)
                for text in TEXTS:
                    result = result_of(text, method, keep, blocks)
                    write_result(run, result.task, "", result)
    return read_runs([folder])


def view(chart: Chart | None, *choices: str) -> View:
    assert chart is not None
    return next(view for view in chart.views if view.choices == choices)


def test_a_panel_for_the_error_and_each_part_and_a_line_for_each_method(study: Collection) -> None:
    chart = accumulation(study)
    assert chart is not None
    assert len(chart.views) == len(MODELS) * 2 * len(TEXTS)
    figure = view(chart, "sable-60M", "keep 0.5", "ptb").figure
    assert [note.text for note in figure.layout.annotations] == list(PARTS.values())
    assert [trace.name for trace in figure.data] == ["asvd-i", "svd"] * 3
    runs = {run.series: run for run in study.at("sable-60M", "keep 0.5")}
    for place, name in enumerate(PARTS):
        for trace in figure.data[2 * place : 2 * place + 2]:
            result = runs[trace.name].compressed["accumulation:ptb"]
            assert list(trace.x) == [1, 2, 3, 4, 5, 6]
            assert list(trace.y) == [result.read(f"{name}.{block}") for block in trace.x]
            assert list(trace.error_y.array) == [result.scores[f"{name}.{block}"].stderr for block in trace.x]
            assert trace.line.color == looks_of(study)[trace.name].color
    assert "svd, keep 0.5, block 3" in figure.data[1].hovertext[2]
    assert "growth 3.00" in figure.data[1].hovertext[2]
    assert {axis.type for axis in (figure.layout.yaxis, figure.layout.yaxis3)} == {"log"}


def test_the_table_has_every_number_of_every_block(study: Collection) -> None:
    chart = accumulation(study)
    assert chart is not None
    labels = [" ".join(filter(None, (column.group, column.label))) for column in chart.table.columns]
    parts = ("Error value", "Error error", "Own value", "Own error", "Inherited value", "Inherited error")
    assert labels[4:] == ["Block", *parts, "Overlap", "Growth"]
    assert len(chart.table.rows) == (6 + 4) * 2 * 2 * len(TEXTS)
    for cells in chart.table.rows:
        numbers = {label: cell.value for label, cell in zip(labels, cells, strict=True)}
        total = sum(numbers[label] for label in ("Own value", "Inherited value", "Overlap"))
        assert numbers["Error value"] == pytest.approx(total)
        assert (numbers["Growth"] is None) == (numbers["Block"] == 1)


def test_it_is_in_the_report_and_can_be_a_file(study: Collection, tmp_path: Path) -> None:
    assert "Error after the last block" in [column.group for column in summary(study).columns]
    run = make_run(tmp_path / "run")
    write_result(run, "accumulation:ptb", "", result_of("ptb", "asvd-i", 0.7, 4))
    chart = next(chart for chart in all_figures(read_runs([run])) if chart.slug == "accumulation")
    assert chart.lines
    assert chart.logs
    assert len(table_csv(chart.table).splitlines()) == 1 + 4
    assert PARTS["inherited"] in draw_lines(chart.views[0].figure, chart.title)


def test_other_windows_are_said_and_a_result_without_blocks_is_refused(tmp_path: Path) -> None:
    for place, keep in (("a", 0.9), ("b", 0.5)):
        result = result_of("ptb", "svd", keep, 4)
        write_result(make_run(tmp_path / place, method="svd", keep=keep), result.task, "", result)
    file = tmp_path / "b/evals/accumulation-ptb.json"
    change_result(file, settings={"windows": 2})
    chart = accumulation(read_runs([tmp_path]))
    assert chart is not None
    assert any("accumulation:ptb on heron-15M was measured with different windows" in note for note in chart.notes)
    change_result(file, scores={"error.1": {"value": 0.1, "stderr": None, "n": 4}})
    with pytest.raises(ValueError, match=r"accumulation:ptb has no score 'own\.1'"):
        accumulation(read_runs([tmp_path]))
    with pytest.raises(ValueError, match="has no errors of blocks"):
        errors_of(EvalResult("accumulation:ptb", "relative error", 0.1, None, 4))


def test_a_model_with_one_compressed_block_is_drawn_and_no_result_is_no_figure(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", method="svd")
    assert accumulation(read_runs([run])) is None
    values = [(0.0, 0.0), (0.2, 0.0), (0.0, 0.25), (0.0, 0.3)]
    scores = {
        f"{name}.{block}": Score(value)
        for block, (own, inherited) in enumerate(values, 1)
        for name, value in (("error", own + inherited), ("own", own), ("inherited", inherited))
    }
    write_result(
        run, "accumulation:ptb", "", EvalResult("accumulation:ptb", "relative error", 0.3, None, 1, scores=scores)
    )
    chart = accumulation(read_runs([run]))
    assert chart is not None
    assert [list(trace.y) for trace in chart.views[0].figure.data[1:]] == [[0, 0.2, 0, 0], [0, 0, 0.25, 0.3]]
    assert {cells[-1].value for cells in chart.table.rows} == {None}  # no details: neither overlap nor growth
