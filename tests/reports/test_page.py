"""The page as a file: what is in it, what is escaped, what it never asks for."""

from __future__ import annotations

import base64
import gzip
import json
import math
import re
import shutil
from pathlib import Path

import pytest

from eckart.evals.result import read_result
from eckart.reports import write_report
from eckart.reports.page import script_json

from .make_runs import change_result, make_probing_study, make_run, make_study


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("page")
    return write_report([make_study(folder / "study")], folder / "out" / "report.html").read_text(encoding="utf-8")


def stored(page: str) -> dict[str, object]:
    match = re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.DOTALL)
    assert match
    return json.loads(match[1], parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


PACKED = re.compile(r'<script id="plotly" type="application/gzip">(.*?)</script>', re.DOTALL)


def without_plotly(page: str) -> str:
    return PACKED.sub("<script></script>", page)


def test_the_page_has_its_parts(page: str) -> None:
    assert page.startswith("<!doctype html>")
    for part in ("Summary", "Beside the paper", "Perplexity against size", "Runs and settings", "torch 2.13.0"):
        assert part in page
    assert "incomplete; the report" not in page
    assert len(stored(page)["charts"]) == 10  # type: ignore[arg-type]


def test_the_questions_about_probing_are_sections_where_there_is_an_answer(page: str, tmp_path: Path) -> None:
    assert "pitfalls" not in without_plotly(page)
    run = make_probing_study(tmp_path)
    own = without_plotly(write_report([run], tmp_path / "r.html").read_text(encoding="utf-8"))
    for slug in ("pitfalls-relation", "pitfalls-methods", "pitfalls-recovery", "probing"):
        assert f'<a href="#{slug}">' in own
        assert f'<section id="{slug}"' in own
    assert "Runs of one model are not independent" in own
    assert "1.000" in own


def test_the_page_may_not_ask_the_network(page: str) -> None:
    assert "default-src 'none'" in page
    own = without_plotly(page)
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", own)
    assert not re.search(r"@import|url\(", own)


def test_the_same_runs_give_the_same_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    one = write_report([run], tmp_path / "one.html").read_text(encoding="utf-8")
    assert one == write_report([run], tmp_path / "two.html").read_text(encoding="utf-8")


def test_the_library_is_packed_and_only_where_there_is_a_figure(page: str, tmp_path: Path) -> None:
    (packed,) = PACKED.findall(page)
    script = gzip.decompress(base64.b64decode(packed))
    assert script.startswith(b"/**\n* plotly.js")
    assert b"Licensed under the MIT license" in script
    assert len(packed) < 0.45 * len(script)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("model: some/model\nmethod: svd\nkeep: 0.5\n")
    bare = write_report([tmp_path], tmp_path / "r.html").read_text(encoding="utf-8")
    assert not PACKED.findall(bare)
    assert len(bare) < 60_000


def facts(page: str) -> list[str]:
    """The counters in the head of the page."""
    return re.findall(r"<dt><b>(\d+)</b> (\w+)</dt>", page)


def test_what_there_is_none_of_is_not_counted(page: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", keep=1)
    shutil.rmtree(run / "model")
    dense = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert facts(dense) == [("1", "model"), ("17", "evaluations")]
    assert "heron-15M, measured</h1>" in dense
    assert facts(page) == [("2", "models"), ("5", "methods"), ("26", "runs"), ("17", "evaluations")]
    assert "Bold" not in dense
    assert "Bold" in page


def test_a_summary_without_a_number_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("model: some/model\nmethod: svd\nkeep: 1\n")
    page = write_report([tmp_path], tmp_path / "r.html").read_text(encoding="utf-8")
    assert 'href="#summary"' not in page
    assert "<table" not in page


@pytest.mark.slow
def test_no_table_stands_twice(tmp_path: Path) -> None:
    """A study whose every number is in the summary has its text, and a link, but not its table."""
    columns = ("perplexity:wikitext2", "perplexity:ptb")
    rows = []
    for keep in (0.9, 0.5):
        run = make_run(tmp_path / "study" / f"svd-{keep}", keep=keep)
        files = [run / "evals" / f"{column.replace(':', '-')}.json" for column in columns]
        rows.append({"label": run.name, "run": run.name, "ours": [read_result(file).value for file in files]})
    study = {"title": "T", "about": "What it is.", "columns": columns, "sections": ["perplexity"] * 2, "rows": rows}
    (tmp_path / "study" / "study.json").write_text(json.dumps(study))
    page = write_report([tmp_path / "study"], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "What it is." in page
    assert "Its numbers are those of the" in page
    assert 'id="paper-1-table"' not in page
    for numbers in ([rows[0]["ours"][0], 123.456], [None, None]):
        rows[0]["ours"] = numbers
        rows[1]["ours"] = [None, None]
        (tmp_path / "study" / "study.json").write_text(json.dumps(study))
        page = write_report([tmp_path / "study"], tmp_path / "r.html").read_text(encoding="utf-8")
        assert "Its numbers are those of the" not in page
        assert 'id="paper-1-table"' in page


def test_names_are_escaped_everywhere(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", method="</script><script>alert(1)</script>")
    recipe = (run / "recipe.yaml").read_text().replace("example-org/heron-15M", "x/<img src=x onerror=alert(2)>")
    (run / "recipe.yaml").write_text(recipe)
    page = write_report([run], tmp_path / "r.html", title="<script>alert(3)</script>").read_text(encoding="utf-8")
    own = without_plotly(page)
    assert "<script>alert" not in own
    assert "<img" not in own
    assert "&lt;script&gt;alert(3)" in own
    assert own.count("<script") == own.count("</script>") == 3


def test_infinity_is_null_in_the_script_and_inf_for_the_reader(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    change_result(run / "evals" / "perplexity-ptb.json", value=math.inf, stderr=None)
    page = write_report([run], tmp_path / "r.html").read_text(encoding="utf-8")
    assert 'data-v="inf"' in page or ">inf<" in page
    charts = stored(page)["charts"]
    notes = charts["perplexity"]["views"][0]["notes"]  # type: ignore[index]
    assert notes == ["asvd-i, keep 0.7 is infinite on ptb and not drawn."]
    cells = [cell for row in charts["perplexity"]["table"]["rows"] for cell in row]  # type: ignore[index]
    assert ["inf", "Infinity"] in cells


def test_script_json_is_json_and_cannot_end_its_element() -> None:
    data = {"a": [math.nan, math.inf, (1, -math.inf)], "b": "</script><!-- \u2028 &"}
    text = script_json(data)
    assert "<" not in text
    assert "\u2028" not in text
    assert json.loads(text) == {"a": [None, None, [1, None]], "b": "</script><!-- \u2028 &"}


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "whole")
    run = make_run(tmp_path / "runs" / "killed", keep=0.5)
    (run / "evals" / "perplexity-ptb.json").unlink()
    page = write_report([tmp_path], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "1 of 2 runs is incomplete" in page
    assert "<b>killed</b> lacks perplexity:ptb (compressed)" in page


def test_a_run_with_nothing_but_a_recipe_still_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.yaml").write_text("model: some/model\nmethod: svd\nkeep: 0.5\n")
    page = write_report([tmp_path], tmp_path / "r.html").read_text(encoding="utf-8")
    assert "model, compressed" in page
    assert stored(page)["charts"] == {}


def test_a_title_of_ones_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert "<title>Mine</title>" in write_report([run], tmp_path / "r.html", title="Mine").read_text(encoding="utf-8")


def test_a_page_that_fails_leaves_no_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(ValueError, match="no run has the baseline 'x'"):
        write_report([run], tmp_path / "r.html", baseline="x")
    assert not list(tmp_path.glob("r.html*"))


@pytest.mark.slow
def test_one_study_of_several_models_has_one_title(tmp_path: Path) -> None:
    folders = [make_study(tmp_path / name) for name in ("a", "b")]
    page = write_report(folders, tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.count("NSVD, Table 1 (small)") >= 1
    assert "NSVD, Table 1 (small); NSVD, Table 1 (small)" not in page
