"""Which run of a baseline another run is compared with, and what becomes of it in the summary and in the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eckart.reports.counterparts import counterpart
from eckart.reports.pitfalls import compare
from eckart.reports.runs import Collection, read_runs
from eckart.reports.tables import Cell, summary

from .make_runs import CORPORA, change_recipe, change_result, make_probing_run, make_run, write_json
from .test_pitfalls import flat


def found(collection: Collection, name: str, method: str, tasks: tuple[str, ...] = ()) -> str | None:
    """The name of a run's counterpart."""
    run = next(run for run in collection.runs if run.name == name)
    other = counterpart(collection, run, method, tasks)
    return None if other is None else other.name


def gain_of(collection: Collection, name: str) -> Cell:
    table = summary(collection)
    at = [column.label for column in table.columns].index("Gain on asvd-i")
    return next(cells for cells in table.rows if cells[-1].text == name)[at]


def make_measured(folder: Path, method: str, corpus: str, value: float) -> Path:
    make_run(folder, method=method, corpus=corpus)
    for name in CORPORA:
        change_result(folder / "evals" / f"perplexity-{name}.json", value=value)
    return folder


def test_the_baseline_was_calibrated_on_the_same_text(tmp_path: Path) -> None:
    make_measured(tmp_path / "1", "asvd-i", "snips", 50.0)
    make_measured(tmp_path / "2", "asvd-i", "wikitext2", 100.0)
    make_measured(tmp_path / "3", "nsvd-i", "wikitext2", 90.0)
    make_measured(tmp_path / "4", "nsvd-i", "ptb", 90.0)
    collection = read_runs([tmp_path])
    assert gain_of(collection, "3").value == pytest.approx(0.1)
    assert gain_of(collection, "3").hint == "against 2"
    assert gain_of(collection, "4").value is None
    assert gain_of(collection, "4").hint.startswith("no run of asvd-i has the same size, calibration")
    assert [gain_of(collection, name).text for name in ("1", "2")] == ["baseline", "baseline"]


def test_a_baseline_that_read_no_text_goes_with_every_calibration(tmp_path: Path) -> None:
    make_run(tmp_path / "base", method="svd", corpus="snips")
    make_run(tmp_path / "ours", method="nsvd-i", corpus="wikitext2")
    assert found(read_runs([tmp_path]), "ours", "svd") is None
    file = tmp_path / "base" / "model" / "compression.json"
    write_json(file, {**json.loads(file.read_text()), "calibration": []})
    assert found(read_runs([tmp_path]), "ours", "svd") == "base"


@pytest.mark.parametrize(
    "keys",
    [
        {"dtype": "bfloat16"},
        {"sites": {"include": ["mlp"], "exclude": []}},
        {"rank_multiple": 32},
        {"recover": {"steps": 8}},
        {"context": 64},
        {"bits": 4},
        {"keep": 0.5},
    ],
    ids=str,
)
def test_what_else_differs_is_no_gain_of_the_method(tmp_path: Path, keys: dict[str, Any]) -> None:
    change_recipe(make_run(tmp_path / "other", method="asvd-i"), **keys)
    make_run(tmp_path / "ours", method="nsvd-i")
    assert found(read_runs([tmp_path]), "ours", "asvd-i") is None
    make_run(tmp_path / "plain", method="asvd-i")
    assert found(read_runs([tmp_path]), "ours", "asvd-i") == "plain"


def test_of_several_it_is_the_one_with_most_in_common(tmp_path: Path) -> None:
    change_recipe(make_run(tmp_path / "a", method="asvd-i"), layout="pivoted", order="anchored")
    change_recipe(make_run(tmp_path / "b", method="asvd-i"), sites={"include": [], "exclude": []})
    for name, keys in (("pivoted", {"layout": "pivoted"}), ("plain", {})):
        change_recipe(make_run(tmp_path / name, method="nsvd-i"), **keys)
    collection = read_runs([tmp_path])
    assert found(collection, "plain", "asvd-i") == "b"
    assert found(collection, "pivoted", "asvd-i") == "a"


def test_texts_that_were_read_in_another_way_are_no_gain(tmp_path: Path) -> None:
    make_run(tmp_path / "base", method="asvd-i")
    ours = make_run(tmp_path / "ours", method="nsvd-i")
    change_result(ours / "evals" / "perplexity-ptb.json", settings={"length": 64, "windows": 32})
    cell = gain_of(read_runs([tmp_path]), "ours")
    assert cell.value is None
    assert "that base has as well, measured alike" in cell.hint


def test_methods_are_compared_in_the_same_type(tmp_path: Path) -> None:
    for name, method, selectivity, dtype in (
        ("1", "svd", 0.10, "bfloat16"),
        ("2", "svd", 0.30, "float32"),
        ("3", "fwsvd", 0.32, "float32"),
    ):
        results = {"probing:cola": (flat(0.4), flat(selectivity))}
        change_recipe(make_probing_run(tmp_path / name, method=method, results=results), dtype=dtype)
    (difference,) = compare(read_runs([tmp_path]))
    assert difference.selectivity.value == pytest.approx(0.02)
    change_result(tmp_path / "2" / "evals" / "probing-cola.json", settings={"seeds": 1})
    assert list(compare(read_runs([tmp_path]))) == []
