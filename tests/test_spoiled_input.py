"""Spoiled input, drawn at random: it is read, or refused by one error of ours. Nothing else happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

import eckart
from eckart.allocation import RankPlan
from eckart.evals.result import EvalResult, Score
from eckart.models.sites import find_sites
from eckart.reports import write_report
from eckart.runs.recipe import load_recipe, parse_recipe
from eckart.runs.study import load_study, studies
from reports.make_runs import make_run, study_data, write_json
from runs.test_recipe import AROUND, GOOD
from spoiling import as_json, damaged, spoiled
from tiny import tiny_model, tiny_tokenizer

RECIPES = [GOOD, *({"model": "m", "evaluate": ["stereoset"], **settings} for settings in AROUND)]
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def refusal_of(read: Any) -> str | None:
    """The message of the ValueError that a reader raises, or None; any other error is a failure."""
    message = None
    try:
        read()
    except ValueError as error:
        message = str(error)
    assert message != "", "an error without a word"
    return message


@QUICK
@given(st.sampled_from(RECIPES).flatmap(spoiled))
def test_a_recipe(data: Any) -> None:
    if not isinstance(data, dict):
        data = {"model": data}
    message = refusal_of(lambda: parse_recipe(data, where="r.yaml"))
    assert message is None or message.startswith("r.yaml: ")
    if message is None:
        recipe = parse_recipe(data)
        assert parse_recipe(yaml.safe_load(recipe.to_yaml())) == recipe


@QUICK
@given(damaged(yaml.safe_dump(GOOD).encode()))
def test_the_text_of_a_recipe(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_bytes(content)
    message = refusal_of(lambda: load_recipe(file))
    assert message is None or message.startswith(str(file))


@QUICK
@given(st.sampled_from([yaml.safe_load(file.read_text()) for file in studies().values()]).flatmap(spoiled))
def test_a_study(tmp_path: Path, data: Any) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(as_json(data))
    read = refusal_of(lambda: load_study(str(file)))
    if read is None:
        refusal_of(lambda: load_study(str(file)).at("builtin"))


@pytest.fixture(scope="module")
def plan() -> tuple[dict[str, Any], Any]:
    sites = find_sites(tiny_model("llama"))
    ranks = {site.name: 3 for site in sites[:5]} | {sites[5].name: None}
    return {"ranks": ranks, "layout": "pivoted", "joint": [], "notes": {}, "keep": 0.5}, sites


@QUICK
@given(st.data())
def test_a_plan(plan: tuple[dict[str, Any], Any], data: st.DataObject) -> None:
    whole, sites = plan
    text = as_json(data.draw(spoiled(whole)))
    if refusal_of(lambda: RankPlan.from_json(text, sites)) is None:
        ranks = RankPlan.from_json(text, sites).ranks
        assert all(rank is None or rank >= 1 for rank in ranks.values())


RESULT = EvalResult("lm-eval:piqa", "acc", 0.5, 0.1, 4, examples=[1.0, 0.0], scores={"acc_norm": Score(0.4, 0.1, 4)})


@QUICK
@given(spoiled(json.loads(RESULT.to_json())))
def test_a_result(data: Any) -> None:
    message = refusal_of(lambda: EvalResult.from_json(as_json(data), "x.json"))
    assert message is None or message.startswith(("x.json", "lm-eval")) or "is not a number" in message


def read_run(run: Path) -> dict[Path, Any]:
    """{file: its data} of a run directory."""
    files = {file: json.loads(file.read_text()) for file in sorted(run.rglob("*.json"))}
    return files | {run / "recipe.yaml": yaml.safe_load((run / "recipe.yaml").read_text())}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Path, Any]]:
    folder = tmp_path_factory.mktemp("runs")
    run = make_run(folder / "runs" / "one")
    write_json(folder / "study.json", study_data())
    return folder, {**read_run(run), folder / "study.json": json.loads((folder / "study.json").read_text())}


@pytest.mark.slow
@settings(QUICK, max_examples=20, phases=set(Phase) - {Phase.shrink, Phase.explain})
@given(st.data())
def test_a_run_directory_in_a_report(made: tuple[Path, dict[Path, Any]], data: st.DataObject) -> None:
    folder, files = made
    file = data.draw(st.sampled_from(sorted(files)))
    before = file.read_text()
    file.write_text(as_json(data.draw(spoiled(files[file]))))
    try:
        message = refusal_of(lambda: write_report([folder], folder / "report.html"))
    finally:
        file.write_text(before)
    assert message is None or str(folder) in message or "lm-eval" in message


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A dense model and a compressed one, pivoted, with shared right factors and a bias."""
    place = tmp_path_factory.mktemp("checkpoints")
    eckart.save(tiny_model("llama"), place / "dense", tiny_tokenizer())
    model = tiny_model("llama")
    method = eckart.build_method("svd")
    eckart.compress(model, method, eckart.plan(model, keep=0.6, layout="pivoted"), None)
    eckart.save(model, place / "compressed", tiny_tokenizer())
    return [place / "dense", place / "compressed"]


@settings(QUICK, max_examples=40)
@given(st.data())
def test_the_header_of_a_weights_file(checkpoints: list[Path], data: st.DataObject) -> None:
    """A header says names, types, shapes and places; what it says otherwise is seen, and never read past the file."""
    file = data.draw(st.sampled_from(checkpoints)) / "model.safetensors"
    whole = file.read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    spoilt = data.draw(damaged(whole[:header])) + whole[header:]
    file.write_bytes(spoilt)
    try:
        message = refusal_of(lambda: eckart.load_model(file.parent))
    finally:
        file.write_bytes(whole)
    assert message is None or str(file.parent) in message


@settings(QUICK, max_examples=40)
@given(st.data())
def test_the_configuration_of_a_model(checkpoints: list[Path], data: st.DataObject) -> None:
    file = data.draw(st.sampled_from(checkpoints)) / "config.json"
    whole = file.read_text()
    file.write_text(as_json(data.draw(spoiled(json.loads(whole)))))
    try:
        refusal_of(lambda: eckart.load_model(file.parent))
    finally:
        file.write_text(whole)
