"""The figure of the layers: which lines there are, from which numbers, and the table behind them."""

from __future__ import annotations

from pathlib import Path

import pytest

from eckart.reports.charts import Chart, View
from eckart.reports.layers import F1_AND_CONTROL, SELECTIVITY, probing
from eckart.reports.profiles import blocks_of, layers_of
from eckart.reports.rows import looks_of
from eckart.reports.runs import Collection, read_runs

from .make_runs import change_result, make_probing_run, make_probing_study, make_run, probing_result


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Collection:
    return read_runs([make_probing_study(tmp_path_factory.mktemp("study"))])


def view(chart: Chart | None, *choices: str) -> View:
    assert chart is not None
    return next(view for view in chart.views if view.choices == choices)


def test_a_profile_is_the_layers_from_the_embeddings_up() -> None:
    result = probing_result("probing:cola", [(0.5, 0.45), (0.69, 0.5), (0.9, 0.5)], spread=0.02)
    layers = layers_of(result)
    assert [layer.number for layer in layers] == [0, 1, 2]
    assert [layer.passes for layer in layers] == [False, False, True]
    assert layers[2].selectivity.value == pytest.approx(0.4)
    assert layers[2].f1.stderr == pytest.approx(0.02 / 3**0.5)
    assert layers[2].accuracy == pytest.approx(0.9)
    assert layers[2].mcc == pytest.approx(0.8)
    assert blocks_of(result) == layers[1:]


def test_a_result_without_layers_is_refused() -> None:
    result = probing_result("probing:cola", [(0.5, 0.45), (0.7, 0.5)])
    del result.scores["control.1"]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"probing:cola has no score 'control\.1'"):
        layers_of(result)
    result.scores.clear()  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="no result of a probing of layers"):
        layers_of(result)


def test_the_sizes_of_a_method_are_lines_next_to_the_dense_one(study: Collection) -> None:
    figure = view(probing(study), "heron-15M", "sizes of svd", F1_AND_CONTROL).figure
    assert [note.text for note in figure.layout.annotations] == ["cola", "sst2"]
    lines = [trace for trace in figure.data if trace.meta != "control" and (trace.yaxis or "y") == "y"]
    assert [trace.name for trace in lines] == ["dense", "keep 0.9", "keep 0.7", "keep 0.5"]
    run = next(run for run in study.of("heron-15M") if run.series == "svd" and run.keep == 0.5)
    layers = layers_of(run.compressed["probing:cola"])
    assert list(lines[3].x) == [0, 1, 2, 3, 4]
    assert list(lines[3].y) == [layer.f1.value for layer in layers]
    assert list(lines[3].error_y.array) == [layer.f1.stderr for layer in layers]
    assert "layer 4" in lines[3].hovertext[4]
    assert "fails" in lines[3].hovertext[4]
    controls = [trace for trace in figure.data if trace.meta == "control" and (trace.yaxis or "y") == "y"]
    assert [trace.line.color for trace in controls] == [trace.line.color for trace in lines]
    assert {trace.line.dash for trace in controls} == {"dot"}
    assert list(controls[3].y) == [layer.control.value for layer in layers]
    assert [shape.y0 for shape in figure.layout.shapes] == [0.57, 0.57]


def test_the_methods_of_a_size_have_their_own_colours(study: Collection) -> None:
    figure = view(probing(study), "heron-15M", "methods, keep 0.5", SELECTIVITY).figure
    lines = {trace.name: trace for trace in figure.data if (trace.yaxis or "y") == "y"}
    assert list(lines) == ["dense", "fwsvd", "fwsvd (recovered)", "svd", "svd (recovered)"]
    looks = looks_of(study)
    assert all(lines[name].line.color == looks[name].color for name in lines if name != "dense")
    assert lines["svd"].line.dash != lines["svd (recovered)"].line.dash
    assert [shape.y0 for shape in figure.layout.shapes] == [0.2, 0.2]


def test_one_run_alone_has_a_figure_and_so_has_a_dense_model(tmp_path: Path) -> None:
    run = make_probing_run(tmp_path / "run")
    chart = probing(read_runs([run]))
    assert chart is not None
    assert {view.choices[1] for view in chart.views} == {"svd, keep 0.7"}
    for file in (run / "evals").glob("probing-*"):
        if ".dense." not in file.name:
            file.unlink()
    chart = probing(read_runs([run]))
    assert chart is not None
    assert {view.choices[1] for view in chart.views} == {"dense"}


def test_the_table_has_every_number_of_every_layer(study: Collection) -> None:
    chart = probing(study)
    assert chart is not None
    table = chart.table
    assert len(table.rows) == (1 + 6 + 2) * 2 * 5  # models, tasks, layers
    labels = [" ".join(filter(None, (column.group, column.label))) for column in table.columns]
    assert labels[4:] == [
        *("Layer", "F1 value", "F1 error", "Control value", "Control error"),
        *("Selectivity value", "Selectivity error", "Passes", "Accuracy", "Matthews"),
    ]
    assert all(len(cells) == len(labels) for cells in table.rows)
    for cells in table.rows:
        numbers = {label: cell.value for label, cell in zip(labels, cells, strict=True)}
        assert numbers["Selectivity value"] == pytest.approx(numbers["F1 value"] - numbers["Control value"])
        assert (numbers["Passes"] == "yes") == (numbers["Selectivity value"] >= 0.2)


def test_other_settings_are_said(tmp_path: Path) -> None:
    make_probing_run(tmp_path / "a")
    run = make_probing_run(tmp_path / "b", keep=0.5)
    change_result(run / "evals" / "probing-cola.json", settings={"pooling": "cls"})
    chart = probing(read_runs([tmp_path]))
    assert chart is not None
    assert any("probing:cola on heron-15M was measured with different" in note for note in chart.notes)


def test_no_probing_no_figure(tmp_path: Path) -> None:
    assert probing(read_runs([make_run(tmp_path / "run")])) is None
