"""Accumulation in whole runs: of a low-rank model and of a baseline, with the report of both."""

from __future__ import annotations

from pathlib import Path

from eckart.reports.page import render
from eckart.reports.runs import read_runs
from eckart.reports.tables import summary
from eckart.runs.experiment import run
from eckart.runs.how import How
from eckart.runs.recipe import parse_recipe
from tiny import tiny_model, tiny_text, tiny_tokenizer


def test_runs_measure_the_errors_of_blocks_and_the_report_draws_them(tmp_path: Path) -> None:
    place, text = tmp_path / "model", tmp_path / "text.txt"
    tiny_model("llama").save_pretrained(place)
    tiny_tokenizer().save_pretrained(place)
    text.write_text(tiny_text(400))
    task = {"task": f"accumulation:{text}", "length": 16, "limit": 4}
    calibration = {"corpus": str(text), "samples": 8, "length": 16}
    for method in ("asvd-i", "llm-pruner"):
        recipe = {"model": str(place), "method": method, "keep": 0.5, "calibration": calibration, "evaluate": [task]}
        (item,) = run(parse_recipe(recipe), tmp_path / "runs" / method, How())
        assert item.dense is None
        assert item.compressed is not None
        assert item.compressed.value == item.compressed.read("error.3") > 0
        assert item.compressed.read("inherited.1") == 0 < item.compressed.read("inherited.2")
        assert (item.compressed.n, item.compressed.settings["blocks"]) == (4, 3)
    collection = read_runs([tmp_path / "runs"])
    assert "Error after the last block" in [column.group for column in summary(collection).columns]
    assert 'id="accumulation"' in render(collection)
