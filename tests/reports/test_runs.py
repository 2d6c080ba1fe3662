"""Reading run directories: what is found, what is missing, what is refused, and under which names runs are shown."""

from __future__ import annotations

import json
import math
import re
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from eckart.reports.files import write_files
from eckart.reports.linears import kept_share
from eckart.reports.page import render
from eckart.reports.runs import read_runs
from eckart.reports.site_facts import SiteFacts

from .make_runs import (
    CORPORA,
    KEEPS,
    METHODS,
    change_recipe,
    change_result,
    make_probing_run,
    make_run,
    make_study,
    write_json,
)


def test_a_study_is_read_whole_and_in_order(tmp_path: Path) -> None:
    collection = read_runs([make_study(tmp_path / "study")])
    assert len(collection.runs) == 2 * (len(METHODS) * len(KEEPS) + 1)
    assert collection.models == ["heron-15M", "sable-60M"]
    first = [(run.series, run.keep) for run in collection.of("heron-15M")]
    assert first == [(method, keep) for method in sorted(METHODS) for keep in KEEPS] + [("int8", None)]
    assert [study.title for study in collection.studies] == ["NSVD, Table 1 (small)"]
    assert all(not run.missing for run in collection.runs)


def test_tasks_follow_the_recipe_not_the_alphabet(tmp_path: Path) -> None:
    run = read_runs([make_run(tmp_path / "run")]).runs[0]
    assert [task for task in run.compressed if task.startswith("perplexity")] == [f"perplexity:{c}" for c in CORPORA]


def test_kept_share_counts_factors_and_leaves_dense_at_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    file = run / "model" / "compression.json"
    facts = json.loads(file.read_text())
    names = list(facts["sites"])[:2]
    facts["sites"][names[0]] |= {"shape": [6, 4], "rank": 2}
    facts["sites"][names[1]] |= {"rank": None}
    write_json(file, facts)
    sites = {site.name: site for site in read_runs([run]).runs[0].sites}
    assert sites[names[0]].kept == pytest.approx(2 * (6 + 4) / 24)
    assert sites[names[1]].kept == 1


def test_a_checkpoint_inside_a_run_is_no_run(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    shutil.copy(run / "recipe.yaml", run / "model" / "recipe.yaml")
    assert len(read_runs([tmp_path]).runs) == 1


def test_the_same_run_given_twice_counts_once(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    assert len(read_runs([run, tmp_path, run]).runs) == 1


def test_a_killed_run_shows_what_it_has_and_says_what_it_lacks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "model" / "compression.json").unlink()
    (run / "environment.json").unlink()
    (run / "evals" / "perplexity-ptb.json").unlink()
    (run / "evals" / "stereoset.dense.json").unlink()
    (run / "evals" / "perplexity-snips.partial").write_text("{")
    read = read_runs([run]).runs[0]
    assert read.missing == (
        "environment.json",
        "the compressed model's compression.json",
        "perplexity:ptb (compressed)",
        "stereoset (dense)",
    )
    assert "perplexity:ptb" in read.dense
    assert read.share is None


def test_refusals_are_passed_on(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "evals" / "perplexity-ptb.json").unlink()
    write_json(run / "refusals.json", {"perplexity:ptb@256": {"compressed": "window 3 is not finite"}})
    assert "perplexity:ptb@256 (compressed, refused: window 3 is not finite)" in read_runs([run]).runs[0].missing


def test_a_run_that_keeps_everything_lacks_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", method="svd", keep=1)
    shutil.rmtree(run / "model")
    for file in (run / "evals").glob("*.json"):
        if ".dense" not in file.name:
            file.unlink()
    collection = read_runs([run])
    assert collection.runs[0].is_dense
    assert not collection.runs[0].missing
    assert collection.of("heron-15M") == []
    assert collection.dense("heron-15M", "perplexity:ptb") is not None


def test_one_task_at_two_lengths_is_two_tasks(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    file = run / "evals" / "perplexity-ptb.json"
    file.rename(run / "evals" / "perplexity-ptb-256.json")
    shutil.copy(run / "evals" / "perplexity-ptb-256.json", run / "evals" / "perplexity-ptb-64.json")
    change_result(run / "evals" / "perplexity-ptb-64.json", value=77.0)
    results = read_runs([run]).runs[0].compressed
    assert results["perplexity:ptb@64"].value == 77
    assert results["perplexity:ptb@256"].value != 77
    assert "perplexity:ptb" not in results


def test_a_result_that_names_its_settings_is_the_task_that_was_asked_for(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for end in ("", ".dense"):
        change_result(run / "evals" / f"lm-eval-piqa{end}.json", task="lm-eval:piqa@5-shot")
    read = read_runs([run]).runs[0]
    assert not read.missing
    assert [task for task in read.compressed if task.startswith("lm-eval")] == [
        *("lm-eval:boolq", "lm-eval:piqa@5-shot", "lm-eval:arc_easy")
    ]


def test_a_fine_tuned_run_is_a_series_of_its_own(tmp_path: Path) -> None:
    make_probing_run(tmp_path / "a")
    make_probing_run(tmp_path / "b", steps=64)
    make_probing_run(tmp_path / "c", keep=0.5)
    (tmp_path / "c" / "recipe.yaml").open("a").write("recover: {steps: 0}\n")  # no steps, no fine-tuning
    assert {r.name: r.series for r in read_runs([tmp_path]).runs} == {"a": "svd", "b": "svd (recovered)", "c": "svd"}
    make_probing_run(tmp_path / "d", steps=8)
    series = {run.name: run.series for run in read_runs([tmp_path]).runs}
    assert (series["a"], series["d"]) == ("svd", "svd (recovered, steps 8)")


def test_settings_that_differ_are_in_the_name(tmp_path: Path) -> None:
    make_run(tmp_path / "a", method="asvd-0", options={"alpha": 0.5})
    make_run(tmp_path / "b", method="asvd-0", options={"alpha": 1.0})
    make_run(tmp_path / "c", method="asvd-i")
    make_run(tmp_path / "d", method="asvd-i", keep=0.5)
    make_run(tmp_path / "e", method="svd", corpus="ptb")
    make_run(tmp_path / "f", method="svd")
    series = {run.name: run.series for run in read_runs([tmp_path]).runs}
    assert series == {
        "a": "asvd-0 (alpha 0.5)",
        "b": "asvd-0 (alpha 1.0)",
        "c": "asvd-i",
        "d": "asvd-i",
        "e": "svd (corpus ptb)",
        "f": "svd (corpus wikitext2)",
    }


ONE_CHANGE: list[dict[str, Any]] = [
    {"method": {"name": "asvd-i", "options": {"shrinkage": 0.1}}},
    {"dtype": "bfloat16"},
    {"sites": {"include": ["mlp"]}},
    {"allocation": {"name": "global"}},
    {"allocation": {"name": "global", "weights": "probes"}},
    {"allocation": {"name": "per-role", "shares": {"mlp": 2, "attention": 1}}},
    {"layout": "pivoted"},
    {"order": "anchored"},
    {"joint": True},
    {"refit": True},
    {"refine": {"steps": 8, "rate": 0.1}},
    {"refine": {"steps": 9, "rate": 0.1}},
    {"distil": {"steps": 8}},
    {"recover": {"steps": 8}},
    {"bits": 4},
    {"bits": 4, "group": 32},
    {"bits": 4, "turns": 2},
    {"rank_multiple": 32},
    {"context": 64},
    {"cache_group": 2},
    {"calibration": {"corpus": "ptb", "samples": 8}},
    {"keep": None, "rules": [{"keep": 0.7}]},
]


def test_recipes_that_differ_in_more_than_size_are_other_series(tmp_path: Path) -> None:
    make_run(tmp_path / "as it is")
    for place, keys in enumerate(ONE_CHANGE):
        change_recipe(make_run(tmp_path / str(place), keep=0.7), **keys)
    series = [run.series for run in read_runs([tmp_path]).runs]
    assert len(set(series)) == len(ONE_CHANGE) + 1
    assert not any("[" in name for name in series)


def test_runs_that_differ_in_size_and_evaluations_are_one_series(tmp_path: Path) -> None:
    spelled: dict[str, Any] = {"layout": "plain", "order": "one-shot", "refine": {"steps": 0, "rate": 0.1}}
    budgets = ({"keep_total": 0.5}, {"max_bytes": 1000}, {"keep": 0.5, "evaluate": ["cost"]}, {"keep": 0.9, **spelled})
    for place, keys in enumerate(budgets):
        change_recipe(make_run(tmp_path / str(place)), **{"keep": None, **keys})
    assert {run.series for run in read_runs([tmp_path]).runs} == {"asvd-i"}


def test_labels_are_short_and_a_composition_has_its_name(tmp_path: Path) -> None:
    """However its parts are written."""
    best = {"allocation": {"name": "global"}, "layout": "pivoted", "order": "anchored", "joint": False, "refit": False}
    refined = {"refine": {"steps": 36, "rate": 0.0003}}
    for name, method, keep, keys in (
        ("given", "best", 0.9, {}),
        ("spelled", "kfac", 0.7, {**best, "refine": {"steps": 0, "rate": 0.0003}, "distil": {"steps": 0}}),
        ("low", "kfac", 0.7, {**best, "order": "one-shot"}),
        ("high", "kfac", 0.7, {**best, **refined}),
        ("bare", "kfac", 0.7, {}),
        ("a", "asvd-i", 0.9, {"layout": "plain"}),
        ("b", "asvd-i", 0.7, {"layout": "pivoted", "order": "anchored", "sites": {"include": ["mlp"]}}),
        ("c", "asvd-i", 0.5, {"bits": 4}),
    ):
        change_recipe(make_run(tmp_path / name, method=method, keep=keep), **keys)
    assert {run.name: run.series for run in read_runs([tmp_path]).runs} == {
        "given": "best (anchored)",
        "spelled": "best (anchored)",
        "low": "best (one-shot)",
        "high": "best (anchored, refined)",
        "bare": "kfac",
        "a": "asvd-i (plain, one-shot)",
        "b": "asvd-i (pivoted, anchored, of mlp)",
        "c": "asvd-i (4 bits, plain, one-shot)",
    }


def test_one_recipe_run_twice_is_told_apart_by_its_folder(tmp_path: Path) -> None:
    make_run(tmp_path / "one" / "run")
    make_run(tmp_path / "two" / "run")
    runs = read_runs([tmp_path / "one", tmp_path / "two"]).runs
    assert [run.name for run in runs] == ["one/run", "two/run"]
    assert [run.series for run in runs] == ["asvd-i [one/run]", "asvd-i [two/run]"]


def test_models_of_one_last_name_keep_their_whole_name(tmp_path: Path) -> None:
    for owner in ("first", "second"):
        run = make_run(tmp_path / owner)
        recipe = (run / "recipe.yaml").read_text().replace("example-org/heron-15M", f"{owner}/heron-15M")
        (run / "recipe.yaml").write_text(recipe)
    assert read_runs([tmp_path]).models == ["first/heron-15M", "second/heron-15M"]


def test_infinity_is_read(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    change_result(run / "evals" / "perplexity-ptb.json", value=math.inf, stderr=None)
    assert "Infinity" in (run / "evals" / "perplexity-ptb.json").read_text()
    assert read_runs([run]).runs[0].compressed["perplexity:ptb"].value == math.inf


def test_folders_that_hold_no_run_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no folder at .*nowhere"):
        read_runs([tmp_path / "nowhere"])
    with pytest.raises(ValueError, match=r"holds no run: a run directory has a recipe\.yaml"):
        read_runs([tmp_path])
    with pytest.raises(ValueError, match="no run to report"):
        read_runs([])


@pytest.mark.parametrize(
    "name", ["environment.json", "model/compression.json", "evals/cost.json", "evals/cost.dense.json", "refusals.json"]
)
@pytest.mark.parametrize("text", ["{", "[1, 2]", "\xff"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, text: str) -> None:
    run = make_run(tmp_path / "run")
    (run / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=f"{name} (is not JSON|is not UTF-8 text|holds no JSON object)"):
        read_runs([run])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is not YAML"),
        ("keep: 1", "names no model"),
        ("- a", "expected keys and values"),
        ("", "names no model"),
        ("model: x\nevaluate: {a: 1}", "evaluate is not a list of tasks"),
    ],
)
def test_a_recipe_that_cannot_be_read_is_named(tmp_path: Path, text: str, message: str) -> None:
    run = make_run(tmp_path / "run")
    (run / "recipe.yaml").write_text(text)
    with pytest.raises(ValueError, match=rf"recipe\.yaml.*{message}"):
        read_runs([run])


@pytest.mark.parametrize("changes", [{"value": math.nan}, {"surprise": 1}, {"scores": {"a": {"wrong": 1}}}])
def test_a_result_that_is_none_is_named(tmp_path: Path, changes: dict[str, object]) -> None:
    run = make_run(tmp_path / "run")
    change_result(run / "evals" / "cost.json", **changes)
    with pytest.raises(ValueError, match=r"evals/cost\.json is no result of an evaluation"):
        read_runs([run])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"params": 5}, "params is not a pair"),
        ({"bytes": [1, None]}, "bytes is not a pair"),
        ({"sites": {"a": {"shape": [1]}}}, "site a has no shape"),
        ({"sites": {"a": {"shape": [1, 2], "block": "x"}}}, "site a has block 'x'"),
    ],
)
def test_a_compression_of_another_form_is_named(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    run = make_run(tmp_path / "run")
    write_json(run / "model" / "compression.json", changes)
    with pytest.raises(ValueError, match=rf"compression\.json: {message}"):
        read_runs([run])


def test_a_study_whose_rows_do_not_fit_is_named(tmp_path: Path) -> None:
    make_run(tmp_path / "runs" / "run")
    write_json(tmp_path / "study.json", {"columns": ["a", "b"], "rows": [{"label": "x", "ours": [1.0]}]})
    with pytest.raises(ValueError, match=r"study\.json: row 0 has ours that does not fit its 2 columns"):
        read_runs([tmp_path])


def test_the_time_of_a_run_is_what_it_noted(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (run,) = read_runs([folder]).runs
    assert run.when is not None
    assert run.when.isoformat() == "2026-11-22T10:00:00+00:00"
    assert "when" not in run.environment
    facts = json.loads((folder / "environment.json").read_text())
    write_json(folder / "environment.json", {**facts, "when": "yesterday"})
    with pytest.raises(ValueError, match=r"environment\.json: 'when' is no ISO 8601 time"):
        read_runs([folder])


@pytest.mark.slow
def test_details_of_a_wrong_form_are_one_error_that_names_the_run(tmp_path: Path) -> None:
    """What each evaluation keeps in detail is taken as written; where it cannot be drawn, its run is named."""
    make_run(tmp_path / "whole", keep=0.5)
    make_run(tmp_path / "damaged", keep=0.9)
    file = tmp_path / "damaged" / "evals" / "similarity-wikitext2.dense.json"
    data = json.loads(file.read_text())
    data["details"]["histogram"]["counts"][3] = "many"
    file.write_text(json.dumps(data))
    for draw in (render, partial(write_files, folder=tmp_path / "files")):
        with pytest.raises(ValueError, match=r"damaged: a file there holds what no run writes \(\w+Error: "):
            draw(read_runs([tmp_path]))


@pytest.mark.parametrize("shape", [[0, 0], [0, 4], [2.5, 4], [-1, 4], [True, 4]])
def test_a_linear_without_a_shape_is_named(tmp_path: Path, shape: list[float]) -> None:
    run = make_run(tmp_path / "run")
    file = run / "model" / "compression.json"
    data = json.loads(file.read_text())
    name = next(iter(data["sites"]))
    data["sites"][name]["shape"] = shape
    file.write_text(json.dumps(data))
    with pytest.raises(ValueError, match=rf"compression\.json: site {re.escape(name)} has no shape \[d_out, d_in\]"):
        read_runs([run])


@pytest.mark.parametrize(
    ("more", "way", "kept"),
    [
        ({"rank": None}, "dense", 1.0),
        ({"rank": 4}, "rank 4 of 8", 0.75),
        ({"rank": None, "base": 4, "group": 64, "kept": 0.27}, "4 bits", 0.27),
        ({"rank": 4, "bits": 8, "group": 64, "kept": 0.4}, "rank 4 of 8 in 8 bits", 0.4),
        ({"rank": 4, "base": 3, "bits": 4, "group": 64, "kept": 0.3}, "3 bits and rank 4 of 8 in 4 bits", 0.3),
    ],
)
def test_a_linear_says_how_it_is_kept(more: dict[str, Any], way: str, kept: float) -> None:
    """In few bits its share is one of bytes."""
    site = SiteFacts.of("a.b", {"block": 1, "role": "b", "shape": [8, 16], **more}, {})
    assert site.way == way
    assert site.kept == kept


@pytest.mark.parametrize(
    ("facts", "kept", "dense"),
    [
        ({"layout": "plain", "joint": []}, 0.75, 1.0),
        ({"layout": "pivoted", "joint": []}, 4 * (8 + 16 - 4) / 128, 1.0),
        ({"layout": "plain", "joint": ["model.layers.0.self_attn.q_proj"]}, None, 1.0),
    ],
)
def test_a_file_without_shares_says_what_it_can(facts: dict[str, Any], kept: float | None, dense: float) -> None:
    """An older file does not tell which linears share a right factor: nothing is better than a wrong number."""
    item = {"block": 1, "role": "b", "shape": [8, 16]}
    assert SiteFacts.of("a.b", {**item, "rank": 4}, facts).kept == kept
    assert SiteFacts.of("a.b", {**item, "rank": 4, "kept": 0.4}, facts).kept == 0.4
    assert SiteFacts.of("a.b", {**item, "rank": None}, facts).kept == dense


def test_a_share_that_no_file_tells_is_not_drawn(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    file = run / "model" / "compression.json"
    facts = json.loads(file.read_text())
    for item in facts["sites"].values():
        item["rank"] = 4
    write_json(file, facts | {"joint": ["x"]})
    chart = kept_share(read_runs([run]))
    assert chart is not None
    assert {view.choices[-1] for view in chart.views} == {"relative error"}
    assert "kept" not in "".join(text for row in chart.views[0].figure.data[0].hovertext for text in row)
