"""A budget in speed from recipe to checkpoint: tables, here made up, are kept, and made again when they have to be."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import eckart
from allocation.speeds import table
from eckart.allocation import SpeedTable
from eckart.models.sites import find_sites, low_rank_modules
from eckart.runs import speed_tables
from eckart.runs.facts import Facts
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.out_of_core import compress_out_of_core
from eckart.runs.recipe import parse_recipe
from eckart.runs.speed_tables import default_rows, speeds_of
from tiny import POSITIONS, Run, tiny_model

from .from_files import recipe_of


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Tables are made up; gives what each was asked for."""
    asked: list[dict[str, Any]] = []

    def measure(model: Any, sites: Any, *, track: object, bias: bool, rank_multiple: int, **how: Any) -> SpeedTable:
        asked.append({"bias": bias, "rank_multiple": rank_multiple, **how})
        return table(sites, rest=20_000, **how)

    monkeypatch.setattr(speed_tables, "measure_speed", measure)
    return asked


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"method": "svd"},
        {"method": "svd", "layout": "pivoted", "rank_multiple": 2},
        {"method": "asvd-i", "allocation": "global", "joint": True},
        {"method": "asvd-i", "allocation": "effective-rank"},
        {"method": "svd", "allocation": {"name": "per-role", "shares": {"mlp": 2}}, "sites": {"blocks": "last 2"}},
    ],
    ids=str,
)
def test_a_checkpoint_is_as_fast_as_asked(
    made: list[dict[str, Any]], place: Path, tmp_path: Path, keys: dict[str, Any]
) -> None:
    recipe = recipe_of(place, keep=None, speed=1.2, **keys)
    outcome = make_checkpoint(recipe, tmp_path / "out", How(cache=tmp_path / "cache"))
    (asked,) = made
    assert asked["layout"] == recipe.composition.layout
    assert asked["rank_multiple"] == recipe.rank_multiple
    model = eckart.load_model(place / "model")
    selected = [site for site in find_sites(model) if site.name in outcome.plan.ranks]
    speeds = table(selected, rest=20_000, layout=asked["layout"], joint=asked["joint"])
    assert 1.2 <= speeds.modelled(outcome.plan, selected) < 1.3
    facts = Facts.read(tmp_path / "out")
    assert facts.speed is not None
    assert facts.speed["asked"] == 1.2
    assert facts.speed["modelled"] == pytest.approx(speeds.modelled(outcome.plan, selected), abs=1e-4)
    assert json.loads((tmp_path / "out" / "allocation.json").read_text())["speed"] == facts.speed
    assert "times the dense model's where 1.2 was asked for" in (tmp_path / "out" / "README.md").read_text()
    assert outcome.recipe.speed is not None
    assert outcome.recipe.speed.rows == 1
    again = make_checkpoint(recipe, tmp_path / "again", How(cache=tmp_path / "cache"))
    assert len(made) == 1
    assert again.plan == outcome.plan


def test_at_speed_1_the_model_is_the_dense_one(made: list[dict[str, Any]], place: Path, tmp_path: Path) -> None:
    for name, keys in {"speed": {"keep": None, "speed": 1}, "keep": {"keep": 1}}.items():
        make_checkpoint(recipe_of(place, method="svd", **keys), tmp_path / name, How())
    assert made
    assert not low_rank_modules(eckart.load_model(tmp_path / "speed"))
    plans = [(tmp_path / name / "plan.json").read_text() for name in ("speed", "keep")]
    assert json.loads(plans[0])["ranks"] == json.loads(plans[1])["ranks"]


def test_a_speed_out_of_reach_is_refused_before_anything_is_calibrated(
    made: list[dict[str, Any]], place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eckart.runs.ranks.measure_losses", lambda *_, **__: pytest.fail("losses were measured"))
    with pytest.raises(ValueError, match=r"speed 9: too fast, the most is \d\.\d\d on this machine"):
        make_checkpoint(recipe_of(place, keep=None, speed=9, allocation="global"), tmp_path / "out", How())
    assert not (tmp_path / "out").exists()


def test_a_table_is_kept_for_one_machine_and_one_model(made: list[dict[str, Any]], tmp_path: Path) -> None:
    model, how = tiny_model("llama"), How(cache=tmp_path)
    sites = find_sites(model)
    first = speeds_of(model, sites, how, rows=1)
    assert speeds_of(tiny_model("llama", seed=5), sites, how, rows=1) == first
    assert len(made) == 1
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        speeds_of(model, sites, how, rows=1)
    finally:
        torch.set_num_threads(threads)
    speeds_of(model, sites, how, rows=8)
    speeds_of(model, sites, how, rows=1, layout="pivoted")
    speeds_of(model, sites, how, rows=1, joint=[sites[0].input_group])
    speeds_of(model, sites, how, rows=1, bias=True)
    speeds_of(model, sites, how, rows=1, rank_multiple=2)
    speeds_of(tiny_model("llama", vocab_size=64), sites, how, rows=1)
    speeds_of(tiny_model("llama").bfloat16(), sites, how, rows=1)
    assert len(made) == 9
    assert len(list((tmp_path / "speed").iterdir())) == 9
    speeds_of(model, sites, replace(how, cache=None), rows=1)
    assert len(made) == 10


def test_a_damaged_table_is_made_again(made: list[dict[str, Any]], tmp_path: Path) -> None:
    model, how = tiny_model("llama"), How(cache=tmp_path)
    sites = find_sites(model)
    first = speeds_of(model, sites, how, rows=1)
    (file,) = (tmp_path / "speed").iterdir()
    file.write_text(file.read_text()[:100])
    with pytest.warns(UserWarning, match="damaged"):
        assert speeds_of(model, sites, how, rows=1) == first
    assert len(made) == 2
    assert SpeedTable.from_json(file.read_text(), "file") == first


def test_rows_are_what_the_model_is_used_for() -> None:
    assert default_rows(tiny_model("llama")) == 1
    assert default_rows(tiny_model("bert")) == POSITIONS


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"speed": 1.5, "keep": 0.5}, "give exactly one of"),
        ({"speed": 0.5}, "speed.times: Input should be greater than or equal to 1"),
        ({"speed": {"times": 2, "rows": 0}}, "speed.rows: Input should be greater than 0"),
        ({"speed": {"rows": 5}}, "speed.times: Field required"),
        (
            {"speed": 2, "allocation": {"name": "surgical", "score": "perplexity:ptb"}},
            "speed goes with the allocations uniform, per-role, effective-rank, global, and surgical counts numbers",
        ),
        (
            {"speed": 2, "allocation": {"name": "sensitivity", "score": "perplexity:ptb"}},
            "and sensitivity counts numbers",
        ),
        ({"speed": 2, "method": "llm-pruner"}, "llm-pruner takes keep, and no other budget"),
    ],
)
def test_what_cannot_honour_a_speed_refuses(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_recipe({"model": "m", "method": "svd", **keys})


def test_out_of_core_refuses(place: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a budget in speed, for which the whole model is timed"):
        compress_out_of_core(recipe_of(place, keep=None, speed=1.2), tmp_path / "out", How())


def test_from_the_command_line(made: list[dict[str, Any]], run: Run, place: Path, tmp_path: Path) -> None:
    common = (place / "model", tmp_path / "out", "--method", "svd", "--cache", tmp_path / "cache")
    status, printed = run("compress", *common, "--keep", "0.5", "--speed-rows", "8")
    assert status != 0
    assert "--speed-rows goes with --speed" in printed
    status, printed = run("compress", *common, "--speed", "1.2", "--speed-rows", "8")
    assert status == 0, printed
    assert "Speed, modelled: 1.2" in printed
    assert "reading prompts of 8 tokens" in printed
    assert [each["rows"] for each in made] == [8]
