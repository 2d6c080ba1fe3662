"""Added bias: a composition has one only where its result can be exported dense with it, and says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eckart.models.loading import load_model
from eckart.models.sites import find_sites, low_rank_modules
from eckart.reports import write_report
from eckart.runs.added_bias import settle_bias
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.out_of_core import compress_out_of_core
from eckart.runs.recipe import load_recipe, parse_recipe
from eckart.runs.workbench import planned_sites
from tiny import FAMILY_CONFIGS, Run, logits_of, tiny_model, tiny_text, tiny_tokenizer

# Families of which some linear has no bias, and no switch of the configuration gives it one.
WITHOUT_PLACE = {"mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Mistral, a tiny Llama, their tokenizer and a calibration text."""
    folder = tmp_path_factory.mktemp("bias")
    for name in ("mistral", "llama"):
        tiny_model(name).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "train.txt").write_text(tiny_text(600, seed=1))
    return folder


def recipe_of(folder: Path, model: str = "mistral", **more: Any):
    calibration = {"corpus": str(folder / "train.txt"), "samples": 8, "length": 16}
    return parse_recipe({"model": str(folder / model), "keep": 0.5, "calibration": calibration, **more})


@pytest.mark.parametrize("model_type", sorted(FAMILY_CONFIGS))
@pytest.mark.parametrize("method", ["best", "best-distilled"])
def test_it_is_left_out_where_the_architecture_has_no_place(model_type: str, method: str) -> None:
    model, recipe = tiny_model(model_type), parse_recipe({"model": "x", "method": method, "keep": 0.5})
    settled, why = settle_bias(recipe, model, find_sites(model))
    assert settled.composition.method.centred == (model_type not in WITHOUT_PLACE)
    assert (why is None) == (model_type not in WITHOUT_PLACE)
    if why is None:
        assert settled == recipe
    else:
        assert type(model).__name__ in why


@pytest.mark.parametrize(
    "method",
    [
        {"name": "best", "options": {"bias": True}},
        {"name": "best", "options": {"bias": False}},
        "kfac",
        "sfsd",
        "int8",
    ],
    ids=["true", "false", "kfac", "sfsd", "int8"],
)
def test_what_a_recipe_says_is_left_alone(method: Any) -> None:
    model = tiny_model("mistral")
    recipe = parse_recipe({"model": "x", "method": method, **({} if method == "int8" else {"keep": 0.5})})
    assert settle_bias(recipe, model, find_sites(model)) == (recipe, None)


def test_only_linears_that_are_compressed_count(tmp_path: Path) -> None:
    model = tiny_model("qwen3")  # attention_bias gives one to every linear of the attention, and nothing to the MLP

    def centred(**budget: Any) -> bool:
        recipe = parse_recipe({"model": "x", **budget})
        return settle_bias(recipe, model, planned_sites(model, recipe))[0].composition.method.centred

    assert centred(keep=0.5, sites={"include": ["attention"]})
    assert not centred(keep=0.5, sites={"include": ["mlp"]})
    assert centred(rules=[{"keep": 0.5, "include": ["attention"]}])
    assert not centred(rules=[{"keep": 0.5, "include": ["attention"]}, {"keep": 0.9, "include": ["up_proj"]}])
    for name, ranks in (("o_proj", True), ("down_proj", False)):
        site = next(site for site in find_sites(model) if site.role.endswith(name))
        plan = tmp_path / f"{name}.json"
        plan.write_text(json.dumps({"ranks": {site.name: 4}}))
        assert centred(plan=str(plan)) is ranks


@pytest.mark.parametrize("make", [make_checkpoint, compress_out_of_core])
def test_everything_says_so_and_the_export_works(make: Any, run: Run, place: Path, tmp_path: Path) -> None:
    said: list[str] = []
    make(recipe_of(place), tmp_path / "out", How(say=said.append))
    (line,) = said
    assert line.startswith(
        "best adds no bias here, as MistralForCausalLM has no place for one in 21 linears (self_attn"
    )
    assert "bias=true adds it" in line
    assert json.loads((tmp_path / "out/compression.json").read_text())["no_bias"] == line
    assert line in (tmp_path / "out/README.md").read_text()
    kept = load_recipe(tmp_path / "out/recipe.yaml")
    assert kept.method.name == "kfac"
    assert kept.method.options["bias"] is False
    small = load_model(tmp_path / "out")
    assert all(module.bias is None for module in low_rank_modules(small).values())
    assert run("export", tmp_path / "out", tmp_path / "dense", "--dense")[0] == 0
    difference = logits_of(load_model(tmp_path / "dense")) - logits_of(small)
    assert difference.abs().max() < 1e-4


def test_a_model_with_a_place_keeps_it_and_nothing_is_said(place: Path, tmp_path: Path) -> None:
    said: list[str] = []
    make_checkpoint(recipe_of(place, "llama"), tmp_path / "out", How(say=said.append))
    assert not said
    assert "no_bias" not in json.loads((tmp_path / "out/compression.json").read_text())
    assert load_recipe(tmp_path / "out/recipe.yaml").method.options["bias"] is True
    assert all(module.bias is not None for module in low_rank_modules(load_model(tmp_path / "out")).values())


def test_a_report_says_so(run: Run, place: Path, tmp_path: Path) -> None:
    task = {"task": f"perplexity:{place / 'train.txt'}", "limit": 2, "length": 16}
    (tmp_path / "recipe.yaml").write_text(recipe_of(place, evaluate=[task]).to_yaml())
    status, printed = run("run", tmp_path / "recipe.yaml", "--out", tmp_path / "run", "--no-cache")
    assert status == 0, printed
    write_report([tmp_path / "run"], tmp_path / "report.html")
    said = "best adds no bias here, as MistralForCausalLM has no place for one"
    assert said in (tmp_path / "report.html").read_text()
