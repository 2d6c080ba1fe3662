"""In memory: two compressions into one place at the same time, of which one is carried out."""

from __future__ import annotations

import json
import multiprocessing
import traceback
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest
import yaml

import eckart
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.recipe import parse_recipe
from tiny import tiny_model, tiny_tokenizer

KEEPS = (0.4, 0.7)


def compress(model: Path, out: Path, keep: float, gate: Barrier, answers: Queue) -> None:
    recipe = parse_recipe({"model": str(model), "method": "svd", "keep": keep})
    gate.wait()
    try:
        make_checkpoint(recipe, out, How(), force=True)
        answers.put((keep, None))
    except ValueError:
        answers.put((keep, traceback.format_exc()))


@pytest.mark.parametrize("attempt", range(3))
def test_of_two_compressions_into_one_place_one_is_carried_out(tmp_path: Path, attempt: int) -> None:
    eckart.save(tiny_model("llama"), tmp_path / "model", tiny_tokenizer())
    out = tmp_path / "out"
    eckart.save(tiny_model("gpt2"), out)  # an older one, which is replaced whole
    context = multiprocessing.get_context("fork")
    gate, answers = context.Barrier(len(KEEPS)), context.Queue()
    pair = [context.Process(target=compress, args=(tmp_path / "model", out, keep, gate, answers)) for keep in KEEPS]
    for process in pair:
        process.start()
    told = dict(answers.get(timeout=120) for _ in pair)
    for process in pair:
        process.join()
    (winner,) = [keep for keep, error in told.items() if error is None]
    (loser,) = [error for error in told.values() if error is not None]
    assert "another run is making" in loser
    assert "load_model" not in loser, "it stops before it reads anything"
    assert yaml.safe_load((out / "recipe.yaml").read_text())["keep"] == winner
    ranks = json.loads((out / "config.json").read_text())["quantization_config"]["sites"]
    reference = tmp_path / "reference"
    make_checkpoint(parse_recipe({"model": str(tmp_path / "model"), "method": "svd", "keep": winner}), reference, How())
    assert ranks == json.loads((reference / "config.json").read_text())["quantization_config"]["sites"]
    assert (out / "model.safetensors").read_bytes() == (reference / "model.safetensors").read_bytes()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model", "out", "reference"]
