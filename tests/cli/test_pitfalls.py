"""`eckart pitfalls`, and the files that `eckart report` writes: from the command line, on runs without models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from reports.make_runs import make_probing_study, make_run
from tiny import Run


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_probing_study(tmp_path_factory.mktemp("study"))


def test_the_three_questions_are_answered_and_kept(run: Run, study: Path, tmp_path: Path) -> None:
    out = tmp_path / "answers" / "answers.json"
    status, printed = run("pitfalls", study, "--out", out)
    assert status == 0, printed
    for text in (
        "Does loss of quality go with loss of what the layers know?",
        "1.000 [1.000, 1.000]",
        "fwsvd leaves more selectivity than svd",
        "Layers that fail the check",
        "What is lost for good?",
        "0.219 ±",
        "partly won back",
    ):
        assert text in printed, text
    data = json.loads(out.read_text())
    assert data["baseline"] == "svd"
    assert {row["verdict"] for row in data["recoveries"]} == {"partly won back"}
    status, printed = run("pitfalls", study, "--out", out)
    assert status == 2
    assert "exists" in printed
    assert run("pitfalls", study, "--out", out, "--force", "--baseline", "fwsvd")[0] == 0
    assert json.loads(out.read_text())["differences"][0]["verdict"] == "keeps less"


def test_what_the_runs_do_not_say_is_said(run: Run, study: Path, tmp_path: Path) -> None:
    status, printed = run("pitfalls", study / "runs" / "heron-15M-svd-0.5")
    assert status == 0, printed
    assert "No two runs differ in `recover` alone" in printed
    status, printed = run("pitfalls", make_run(tmp_path / "run"))
    assert status == 2
    assert "no compressed model was probed" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_report_leaves_its_tables_and_figures_as_files(run: Run, study: Path, tmp_path: Path) -> None:
    arguments = ("report", study, "--out", tmp_path / "r.html", "--files", tmp_path / "files")
    status, printed = run(*arguments)
    assert status == 0, printed
    files = list((tmp_path / "files").iterdir())
    assert f"{len(files)} files in {tmp_path / 'files'}" in printed.replace("\n", "")
    assert {file.suffix for file in files} == {".csv", ".svg"}
    status, printed = run("report", study, "--out", tmp_path / "other.html", "--files", tmp_path / "files")
    assert status == 2
    assert "not empty" in printed
    assert not (tmp_path / "other.html").exists()
    assert run(*arguments, "--force")[0] == 0


@pytest.mark.slow
def test_a_report_without_figures_says_what_to_install(
    run: Run, study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eckart.cli.report.why_no_drawings", lambda: "pip install 'eckart[figures]'")
    status, printed = run("report", study, "--out", tmp_path / "r.html", "--files", tmp_path / "files")
    assert status == 0, printed
    assert "pip install 'eckart[figures]'" in printed
