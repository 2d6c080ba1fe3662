"""Tables: their numbers against arithmetic by hand, and their digits."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from eckart.reports.formats import amount, number, percent, plain, score
from eckart.reports.runs import read_runs
from eckart.reports.tables import Table, clashes, paper_table, summary

from .make_runs import change_result, make_probing_study, make_run, make_study, write_json


def column(table: Table, label: str) -> int:
    return [c.label for c in table.columns].index(label)


def row(table: Table, *, method: str, keep: str) -> int:
    return next(at for at, cells in enumerate(table.rows) if cells[1].text == method and cells[2].text == keep)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "\u2013"),
        (math.nan, "\u2013"),
        (math.inf, "inf"),
        (-math.inf, "\u2212inf"),
        (-0.0214, "\u22120.021"),
        (0.0, "0"),
        (0.000123, "0.00012"),
        (0.04214, "0.042"),
        (5.678, "5.68"),
        (91.849, "91.85"),
        (678.91, "678.9"),
        (20083.2, "20,083"),
        (99999.0, "99,999"),
        (1.2345e9, "1.23e+09"),
    ],
)
def test_numbers_have_the_digits_that_matter(value: float | None, text: str) -> None:
    assert number(value) == text


def test_other_formats() -> None:
    assert amount(59e6, "B") == "59.0 MB"
    assert amount(6.738e9) == "6.74 G"
    assert amount(999) == "999"
    assert percent(0.1234) == "12.3 %"
    assert percent(-0.1234, signed=True) == "\u221212.3 %"
    assert percent(-27.83, signed=True) == "\u22122,783 %"
    assert score(0.41234, "acc_norm") == "0.412"
    assert score(66.64, "icat.gender") == "66.6"
    assert plain("<b>&") == "&lt;b&gt;&amp;"


def test_selectivity_is_next_to_the_score_of_a_probing(tmp_path: Path) -> None:
    assert score(0.81234, "f1.12") == score(0.81234, "mcc") == score(0.81234, "selectivity.3") == "0.812"
    table = summary(read_runs([make_probing_study(tmp_path)]))
    labels = [column.label for column in table.columns if column.group == "Probing, mean of layers"]
    assert labels == ["cola ↑", "cola selectivity ↑", "sst2 ↑", "sst2 selectivity ↑"]
    cells = table.rows[row(table, method="fwsvd", keep="0.9")]
    runs = read_runs([tmp_path]).of("heron-15M")
    result = next(run for run in runs if run.series == "fwsvd" and run.keep == 0.9).compressed["probing:cola"]
    at = column(table, "cola selectivity ↑")
    assert (cells[at - 1].value, cells[at].value) == (result.value, result.scores["selectivity"].value)
    assert cells[at].best
    assert "dense 0.249 →" in cells[at].hint


def test_the_average_improvement_is_the_papers(tmp_path: Path) -> None:
    baseline = make_run(tmp_path / "a", method="asvd-i")
    ours = make_run(tmp_path / "b", method="nsvd-i")
    for name, theirs, mine in (("wikitext2", 10, 100), ("ptb", 20, 10), ("snips", 40, 30), ("cmrc", 100, 175)):
        change_result(baseline / "evals" / f"perplexity-{name}.json", value=theirs)
        change_result(ours / "evals" / f"perplexity-{name}.json", value=mine)
    table = summary(read_runs([tmp_path]))
    cells = table.rows[row(table, method="nsvd-i", keep="0.7")]
    # wikitext2 is the calibration's own: (1/2 + 1/4 - 3/4) / 3
    assert cells[column(table, "Gain on asvd-i")].value == pytest.approx(0.0)
    change_result(ours / "evals" / "perplexity-cmrc.json", value=25)
    table = summary(read_runs([tmp_path]))
    cells = table.rows[row(table, method="nsvd-i", keep="0.7")]
    assert cells[column(table, "Gain on asvd-i")].value == pytest.approx(0.5)
    assert cells[column(table, "Gain on asvd-i")].text == "+50.0 %"
    assert table.rows[row(table, method="asvd-i", keep="0.7")][column(table, "Gain on asvd-i")].text == "baseline"


@pytest.mark.parametrize(
    ("corpus", "parts"),
    [("wikitext2*3+mine.jsonl", None), ("broad", [{"corpus": "wikitext2", "samples": 3, "tokens": 9}])],
)
def test_every_part_of_a_mixture_is_the_calibrations_own(
    tmp_path: Path, corpus: str, parts: list[dict[str, Any]] | None
) -> None:
    for name, method in (("a", "asvd-i"), ("b", "nsvd-i")):
        folder = make_run(tmp_path / name, method=method, corpus=corpus)
        facts = json.loads((folder / "model" / "compression.json").read_text())
        if parts is not None:
            (folder / "model" / "compression.json").write_text(json.dumps({**facts, "calibration": parts}))
        for task in ("wikitext2", "ptb", "snips", "cmrc"):
            value = 100 if method == "asvd-i" else 1 if task == "wikitext2" else 50
            change_result(folder / "evals" / f"perplexity-{task}.json", value=value)
    table = summary(read_runs([tmp_path]))
    cells = table.rows[row(table, method="nsvd-i", keep="0.7")]
    assert cells[column(table, "Gain on asvd-i")].value == pytest.approx(0.5)


def test_no_improvement_on_another_size_or_an_infinite_baseline(tmp_path: Path) -> None:
    baseline = make_run(tmp_path / "a", method="asvd-i", keep=0.7)
    make_run(tmp_path / "b", method="nsvd-i", keep=0.7)
    make_run(tmp_path / "c", method="nsvd-i", keep=0.5)
    table = summary(read_runs([tmp_path]))
    gain = column(table, "Gain on asvd-i")
    assert table.rows[row(table, method="nsvd-i", keep="0.7")][gain].value is not None
    assert table.rows[row(table, method="nsvd-i", keep="0.5")][gain].value is None
    change_result(baseline / "evals" / "perplexity-cmrc.json", value=math.inf)
    table = summary(read_runs([tmp_path]))
    assert table.rows[row(table, method="nsvd-i", keep="0.7")][gain].value is None


def test_no_improvement_over_other_corpora_than_the_baselines(tmp_path: Path) -> None:
    make_run(tmp_path / "a", method="asvd-i", keep=0.7)
    ours = make_run(tmp_path / "b", method="nsvd-i", keep=0.7)
    (ours / "evals" / "perplexity-ptb.json").unlink()
    table = summary(read_runs([tmp_path]))
    assert table.rows[row(table, method="nsvd-i", keep="0.7")][column(table, "Gain on asvd-i")].value is None


def test_another_baseline_and_one_that_is_not_there(tmp_path: Path) -> None:
    make_run(tmp_path / "a", method="svd")
    make_run(tmp_path / "b", method="nsvd-i")
    runs = read_runs([tmp_path])
    assert not any(c.label.startswith("Gain") for c in summary(runs).columns)
    assert any(c.label == "Gain on svd" for c in summary(runs, "svd").columns)
    with pytest.raises(ValueError, match="no run has the baseline 'asvd-i'; there are nsvd-i, svd"):
        summary(runs, "asvd-i")


def test_the_summary_has_dense_and_compressed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    change_result(run / "evals" / "perplexity-ptb.dense.json", value=5.678)
    change_result(run / "evals" / "perplexity-ptb.json", value=math.inf, stderr=None)
    table = summary(read_runs([run]))
    at = next(place for place, c in enumerate(table.columns) if c.label.startswith("ptb") and c.group == "Perplexity")
    assert table.columns[at].label == "ptb \u2193"
    assert [cells[1].text for cells in table.rows] == ["dense", "asvd-i"]
    assert [cells[at].text for cells in table.rows] == ["5.68", "inf"]
    assert table.rows[1][at].hint.startswith("dense 5.68 \u2192 inf")
    assert table.rows[0][column(table, "Parameters left")].text == "100.0 %"


def test_the_best_of_a_size_is_marked_and_int8_does_not_compete(tmp_path: Path) -> None:
    make_study(tmp_path / "study", models=1)
    for name, value in (("svd", 9.0), ("asvd-0", 8.0), ("asvd-i", 7.0), ("nsvd-i", 7.5)):
        change_result(tmp_path / f"study/runs/sable-60M-{name}-0.7/evals/perplexity-ptb.json", value=value)
    change_result(tmp_path / "study/runs/sable-60M-int8/evals/perplexity-ptb.json", value=1.0)
    table = summary(read_runs([tmp_path / "study"]))
    at = next(place for place, c in enumerate(table.columns) if c.label.startswith("ptb"))
    marked = {(cells[1].text, cells[2].text) for cells in table.rows if cells[at].best}
    assert ("asvd-i", "0.7") in marked
    assert len(marked) == 3  # one for each share kept
    assert not any(cells[at].best for cells in table.rows if cells[1].text == "int8")


def test_the_papers_numbers_are_next_to_ours(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "run")
    write_json(
        tmp_path / "study.json",
        {
            "title": "T",
            "columns": ["perplexity:ptb", "agreement:lm-eval:piqa#delta", "stereoset#icat.gender", "cost#params"],
            "rows": [
                {
                    "label": "x",
                    "run": "run",
                    "ours": [12.5, -0.021, None, 6.7e9],
                    "published": [10.0, None, 60.0, 6.7e9],
                    "difference": [2.5, None, None, -1e6],
                    "improvement": 0.25,
                    "published_improvement": 0.147,
                    "refusals": {"stereoset@64": "too long"},
                }
            ],
        },
    )
    collection = read_runs([tmp_path])
    table = paper_table(collection.studies[0], 1)
    assert [name for name, _ in table.groups] == [
        "",
        "ptb",
        "piqa delta",
        "icat.gender",
        "params",
        "average improvement",
    ]
    assert [cell.text for cell in table.rows[0]] == [
        *("x", "12.50", "10.00", "+2.50", "\u22120.021", "\u2013", "\u2013", "refused", "60.0", "\u2013"),
        *("6.70 G", "6.70 G", "\u22121.00 M", "+25.0 %", "+14.7 %", "+10.3 %"),
    ]
    assert table.rows[0][7].hint == "too long"


def test_a_study_of_nothing_published_shows_ours_alone(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "run")
    row = {"label": "x", "ours": [12.5, 0.2, 1.5], "published": [None, None, None], "improvement": 0.25}
    columns = ["perplexity:ptb", "lm-eval:piqa", "divergence:ptb"]
    write_json(tmp_path / "study.json", {"columns": columns, "rows": [row]})
    table = paper_table(read_runs([tmp_path]).studies[0], 1)
    assert [c.label for c in table.columns] == ["", "perplexity ptb", "piqa", "divergence ptb", "average improvement"]
    assert table.groups == []
    assert [cell.text for cell in table.rows[0]] == ["x", "12.50", "0.200", "1.50", "+25.0 %"]


def test_results_under_different_settings_are_warned_of(tmp_path: Path) -> None:
    make_run(tmp_path / "a", method="svd")
    other = make_run(tmp_path / "b", method="nsvd-i")
    assert clashes(read_runs([tmp_path]), "perplexity:ptb") == []
    change_result(other / "evals" / "perplexity-ptb.json", settings={"length": 64, "windows": 32})
    assert clashes(read_runs([tmp_path]), "perplexity:ptb") == [
        "perplexity:ptb on heron-15M was measured with different length: do not compare."
    ]
