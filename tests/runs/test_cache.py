"""Recipes with a budget for the cache: what is made of it holds as many bytes as was asked for, and is what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import eckart
from eckart.models.latent_attention import LatentCache
from eckart.models.sites import low_rank_modules
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.out_of_core import compress_out_of_core
from tiny import Run, logits_of, relative, tiny_tokens

from .from_files import BATCHED, recipe_of

TOKENS = tiny_tokens(2, 10)
CACHED: list[dict[str, Any]] = [
    {"method": "best", "keep": None, "keep_cache": 0.6},
    {"method": "best", "keep": 0.7, "keep_cache": 0.5, "cache_group": 1},
    {"method": "asvd-i", "keep": 0.7, "keep_cache": 0.5},
    {"method": "asvd-i", "keep": None, "allocation": "global", "keep_cache": 0.7, "order": "sequential"},
    {"method": "svd", "rules": [{"keep": 0.5, "include": ["mlp", "k_proj"]}], "keep_cache": 0.5},
    {"method": "sfsd", "keep": None, "keep_cache": 0.5},
]


def plan_of(folder: Path) -> dict[str, Any]:
    plan: dict[str, Any] = json.loads((folder / "plan.json").read_text())
    return plan


@pytest.mark.parametrize("keys", CACHED, ids=str)
def test_a_cache_holds_what_was_asked_for(place: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    outcome = make_checkpoint(recipe_of(place, **keys), tmp_path / "out", BATCHED)
    model = eckart.load_model(tmp_path / "out")
    cache = LatentCache(model.config)
    with torch.no_grad():
        steps = [model(part, past_key_values=cache).logits for part in TOKENS.ids.split([6, 1, 3], 1)]
    assert relative(torch.cat(steps, 1), logits_of(model, TOKENS)) < 1e-5
    # bytes a token: measured, of the plan, and within the budget
    facts = json.loads((tmp_path / "out" / "compression.json").read_text())
    before, after = facts["cache"]["numbers_per_token"]
    assert cache.nbytes == after * 4 * TOKENS.ids.numel()
    assert 0.8 * keys["keep_cache"] < after / before <= keys["keep_cache"]
    assert outcome.allocation["cache"] == facts["cache"]
    # the budget of the weights is that of the other linears
    ranks = plan_of(tmp_path / "out")["ranks"]
    cut = {name for name, rank in ranks.items() if rank is not None}
    others = {name for name in cut if "k_proj" not in name and "v_proj" not in name}
    assert bool(others) == (keys.get("keep", 0.6) is not None)
    assert {*low_rank_modules(model)} == cut
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    assert outcome.summary.file_bytes[1] == size
    assert "eckart.LatentCache(model.config)" in (tmp_path / "out" / "README.md").read_text()


def test_a_plan_of_groups_makes_the_same_again(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, keep=None, keep_cache=0.5, cache_group=1, allocation="global")
    make_checkpoint(recipe, tmp_path / "first", BATCHED)
    again = recipe_of(place, plan=str(tmp_path / "first" / "plan.json"), cache_group=1)
    make_checkpoint(again, tmp_path / "second", BATCHED)
    first, second = (eckart.load_model(tmp_path / name) for name in ("first", "second"))
    assert torch.equal(logits_of(first), logits_of(second))
    assert plan_of(tmp_path / "first") == plan_of(tmp_path / "second")


def test_moments_on_disk_give_the_same(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, method="best", keep=0.7, keep_cache=0.5)
    make_checkpoint(recipe, tmp_path / "first", BATCHED)
    make_checkpoint(recipe, tmp_path / "second", How(batch_size=3, cache=tmp_path / "cache"))
    assert plan_of(tmp_path / "first") == plan_of(tmp_path / "second")
    first, second = (eckart.load_model(tmp_path / name) for name in ("first", "second"))
    assert relative(logits_of(second), logits_of(first)) < 1e-4


def test_the_command_says_what_a_cache_holds(place: Path, tmp_path: Path, run: Run) -> None:
    options = ("--method", "svd", "--keep-cache", "0.5", "--cache-group", "1", "--no-cache")
    status, text = run("compress", place / "model", tmp_path / "out", *options)
    assert status == 0, text
    words = " ".join(text.split())
    assert "Cache: 44 numbers a token where whole keys and values take 96 (0.458), with heads in groups of 1" in words
    status, text = run("compress", place / "model", tmp_path / "none", "--keep-cache", "0.1", "--method", "svd")
    assert status != 0
    assert "keep_cache 0.1: too small" in text


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"cache_group": 2}, "cache_group goes with keep_cache, or with a plan"),
    ({"keep_cache": 0.5, "plan": "plan.json"}, "leave out keep_cache: the plan decides"),
    ({"keep_cache": 0.5, "bits": 8}, "keep_cache does not go with bits"),
    ({"keep_cache": 0.5, "joint": True}, "keep_cache does not go with joint"),
    ({"keep_cache": 0.5, "keep": None, "max_bytes": 10**6}, "keep_cache does not go with max_bytes"),
    ({"keep_cache": 0.5, "keep": None, "speed": 1.5}, "keep_cache does not go with speed"),
    (
        {"keep_cache": 0.5, "allocation": {"name": "surgical", "score": "perplexity:ptb"}},
        "keep_cache goes with the allocations uniform",
    ),
    ({"keep_cache": 0.5, "method": "int8", "keep": None}, "int8 is no low-rank method: leave out keep_cache"),
    ({"keep_cache": 1}, "keep_cache: Input should be less than 1"),
]


@pytest.mark.parametrize(("keys", "message"), REFUSED, ids=lambda value: str(value))
def test_what_does_not_go_together(place: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        recipe_of(place, **keys)


def test_what_cannot_be_made(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, keep=None, keep_cache=0.5, sites={"include": ["mlp"]})
    with pytest.raises(ValueError, match="sites selects no k_proj and no v_proj"):
        make_checkpoint(recipe, tmp_path / "out", BATCHED)
    with pytest.raises(ValueError, match=r"out of core.*leave out keep_cache"):
        compress_out_of_core(recipe_of(place, keep_cache=0.5), tmp_path / "out", BATCHED)
    with pytest.raises(ValueError, match="2 key-value heads do not divide into groups of 4"):
        make_checkpoint(recipe_of(place, keep_cache=0.5, cache_group=4), tmp_path / "out", BATCHED)
    assert not (tmp_path / "out").exists()
