"""The examples run as they are, on the built-in model."""

import re
import shlex
from pathlib import Path

import pytest

from eckart.data.builtin import builtin_model_path
from eckart.runs.recipe import load_recipe
from tiny import Run

ROOT = Path(__file__).parents[1]
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))


def test_there_are_five() -> None:
    assert len(EXAMPLES) == 5


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda file: file.stem)
def test_each_reads_what_comes_with_eckart_and_says_how_to_run_it(example: Path) -> None:
    recipe, text = load_recipe(example), example.read_text(encoding="utf-8")
    assert recipe.model == "builtin"
    assert all(task.argument.startswith("builtin/") for task in recipe.tasks if task.argument)
    assert recipe.is_baseline or recipe.calibration.corpus.startswith("builtin/")
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^#   (eckart run .+)$", text, re.MULTILINE)]
    assert ["eckart", "run", f"examples/{example.name}", "--out", f"runs/{example.stem}"] in commands


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_each_runs(example: Path, run: Run, tmp_path: Path) -> None:
    status, printed = run("run", example, "--out", tmp_path / "run", "--cache", tmp_path / "cache")
    assert status == 0, printed
    results = {file.name for file in (tmp_path / "run" / "evals").glob("*.json")}
    recipe = load_recipe(example)
    assert all({f"{task.slug}.json", f"{task.slug}.dense.json"} & results for task in recipe.tasks)
    weights = tmp_path / "run" / "model" / "model.safetensors"
    if not recipe.is_baseline:
        assert weights.stat().st_size < (builtin_model_path() / "model.safetensors").stat().st_size
    if recipe.max_bytes is not None:
        assert weights.stat().st_size <= recipe.max_bytes
