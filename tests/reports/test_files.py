"""A report as files: the tables read back, the figures are SVG, and nothing is half written."""

from __future__ import annotations

import csv
import io
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import plotly.graph_objects as go
import pytest

from eckart.reports.charts import panel_grid
from eckart.reports.drawings import draw_lines, why_no_drawings
from eckart.reports.figures import all_figures
from eckart.reports.files import slug, table_csv, write_files
from eckart.reports.palette import METHODS
from eckart.reports.runs import read_runs
from eckart.reports.tables import Cell, Column, Table, number_cell, text_cell

from .make_runs import make_probing_run, make_probing_study, make_run, make_study


def read(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def test_a_table_read_back_has_its_numbers_in_full() -> None:
    columns = (Column("Name", False), Column("value", group="F1"), Column("error", group="F1"), Column("n"))
    rows = (
        (text_cell('a, "b"'), number_cell(0.1 + 0.2, "0.300"), number_cell(None, "\u2013"), number_cell(3, "3")),
        (text_cell("=1+1"), number_cell(float("inf"), "inf"), Cell("refused", None), number_cell(-1e-9, "0")),
    )
    table = read(table_csv(Table("t", "T", columns, rows)))
    assert table[0] == ["Name", "F1 value", "F1 error", "n"]
    assert table[1] == ['a, "b"', "0.30000000000000004", "", "3"]
    assert table[2][0] == "'=1+1"
    assert [float(table[2][1]), float(table[2][3])] == [float("inf"), -1e-9]
    assert table[2][2] == "refused"


def test_every_table_of_a_report_is_a_file(tmp_path: Path) -> None:
    collection = read_runs([make_study(tmp_path / "study", models=1)])
    files = write_files(collection, tmp_path / "out" / "files")
    assert sorted(files) == sorted((tmp_path / "out" / "files").iterdir())
    tables = {file.name: read(file.read_text(encoding="utf-8")) for file in files if file.suffix == ".csv"}
    charts = all_figures(collection)
    assert set(tables) == {"summary.csv", "nsvd-table-1-small.csv", *(f"{chart.slug}.csv" for chart in charts)}
    for chart in charts:
        head, *rows = tables[f"{chart.slug}.csv"]
        assert len(rows) == len(chart.table.rows)
        for cells, fields in zip(chart.table.rows, rows, strict=True):
            assert len(cells) == len(fields) == len(head)
            for cell, text in zip(cells, fields, strict=True):
                if isinstance(cell.value, float):
                    assert float(text) == cell.value
    assert tables["nsvd-table-1-small.csv"][0][:3] == ["", "wikitext2 ours", "wikitext2 published"]


@pytest.mark.slow
def test_the_layers_and_their_questions_are_files_too(tmp_path: Path) -> None:
    files = {file.name: file for file in write_files(read_runs([make_probing_study(tmp_path / "s")]), tmp_path / "f")}
    assert {"probing.csv", "scores.csv", "pitfalls-related.csv", "pitfalls-related-layers.csv"} <= set(files)
    assert {"pitfalls-compared.csv", "pitfalls-failing.csv", "pitfalls-recovered.csv"} <= set(files)
    name = "probing-heron-15m-sizes-of-svd-f1-and-control.svg"
    assert {name, "scores-heron-15m.svg", "probing-heron-15m-methods-keep-0.5-selectivity.svg"} <= set(files)
    drawn = files[name].read_text(encoding="utf-8")
    ElementTree.fromstring(drawn)
    for text in ("What each layer knows", "cola", "sst2", "weighted F1", "layer", "keep 0.7", "control task"):
        assert text in drawn
    methods = files["scores-heron-15m.svg"].read_text(encoding="utf-8")
    assert all(tone.light in methods for tone in METHODS[:2])
    again = {file.name: file for file in write_files(read_runs([tmp_path / "s"]), tmp_path / "g")}
    assert again[name].read_text(encoding="utf-8") == drawn  # the same runs, the same file


def test_without_matplotlib_there_are_tables_and_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'eckart[figures]'" in str(why_no_drawings())
    files = write_files(read_runs([make_probing_run(tmp_path / "run")]), tmp_path / "files")
    assert {file.suffix for file in files} == {".csv"}


def test_hostile_names_are_text(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "a", method="<b>$x_1$</b>&")
    make_run(tmp_path / "runs" / "b", method="<b>$x_1$</b>&", keep=0.5)
    files = write_files(read_runs([tmp_path / "runs"]), tmp_path / "files")
    texts = [
        "".join(ElementTree.fromstring(file.read_text(encoding="utf-8")).itertext())
        for file in files
        if file.suffix == ".svg"
    ]
    assert any("<b>$x_1$</b>&" in text for text in texts)


@pytest.mark.slow
def test_names_are_slugs_and_each_is_its_own(tmp_path: Path) -> None:
    assert slug("Table 2: CoLA & MMLU (small)") == "table-2-cola-mmlu-small"
    assert slug("../..") == "untitled"
    assert len(slug("x" * 300)) == 100
    studies = [make_study(tmp_path / name, models=1) for name in ("one", "two")]
    names = [file.name for file in write_files(read_runs(studies), tmp_path / "files")]
    assert {"nsvd-table-1-small.csv", "nsvd-table-1-small-2.csv"} <= set(names)
    assert len(set(names)) == len(names)
    assert not list((tmp_path / "files").glob("*.partial"))


def test_what_is_no_line_is_refused() -> None:
    figure = panel_grid([""], row=100, least=100)
    figure.add_trace(go.Bar(x=[1], y=[1]), row=1, col=1)
    with pytest.raises(ValueError, match="type bar is no line"):
        draw_lines(figure, "Bars")


def test_a_zero_on_a_logarithmic_axis_is_a_gap() -> None:
    def drawn(start: float | None, axis: str) -> str:
        figure = panel_grid([""], row=100, least=100)
        figure.add_trace(go.Scatter(x=[1, 2, 3], y=[start, 2, 4], mode="lines", name="a"), row=1, col=1)
        figure.update_yaxes(type=axis)
        return draw_lines(figure, "Lines")

    assert drawn(0, "log") == drawn(None, "log")
    assert drawn(0, "linear") != drawn(None, "linear")
