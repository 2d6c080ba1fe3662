"""Calibration errors: which samples distances are measured from, and a distance in a whole run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eckart.evals.distance import FAR
from eckart.evals.result import EvalResult
from eckart.models.loading import load_model, load_tokenizer
from eckart.reports.page import render
from eckart.reports.runs import read_runs
from eckart.reports.tables import summary, warnings
from eckart.runs.calibration_errors import READ, calibration_errors, comparable_tokens, recorded_recipe
from eckart.runs.calibration_text import make_tokens
from eckart.runs.experiment import run
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.recipe import Recipe, parse_recipe
from tiny import tiny_model, tiny_text, tiny_tokenizer

LENGTH = 16
MODEL, TOKENIZER = tiny_model("llama"), tiny_tokenizer()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, two calibration texts, and a text of words that they do not have."""
    folder = tmp_path_factory.mktemp("distance")
    MODEL.save_pretrained(folder / "model")
    TOKENIZER.save_pretrained(folder / "model")
    for seed, name in enumerate(("train", "other"), 1):
        (folder / f"{name}.txt").write_text(" ".join(f"w{3 * place % 7 + seed}" for place in range(100 * LENGTH)))
    (folder / "words.txt").write_text(tiny_text(100 * LENGTH))
    (folder / "far.txt").write_text(" ".join(f"w{number % 40 + 40}" for number in range(8 * LENGTH)))
    return folder


def recipe_of(place: Path, corpus: str | None = None, **more: object) -> Recipe:
    calibration = {"corpus": corpus or str(place / "train.txt"), "samples": 8, "length": LENGTH}
    model = {"model": str(place / "model"), "method": "asvd-i", "keep": 0.5}
    return parse_recipe({**model, "calibration": calibration, **more})


def rows(ids: torch.Tensor) -> set[tuple[int, ...]]:
    return set(map(tuple, ids.tolist()))


def test_the_samples_are_others_than_the_calibrations_of_the_same_text(place: Path) -> None:
    recipe = recipe_of(place, str(place / "words.txt"))
    used = make_tokens(recipe, MODEL, TOKENIZER, None)
    tokens = comparable_tokens(recipe, MODEL, TOKENIZER, None)
    assert 0 < len(tokens) <= 8
    assert not rows(tokens.ids) & rows(used.ids)
    whole = TOKENIZER((place / "words.txt").read_text(), return_tensors="pt")["input_ids"].view(-1, LENGTH)
    assert rows(tokens.ids) < rows(whole)
    assert tokens.source == {**used.source, "seed": 1, "part": "unseen", "read": [len(tokens), LENGTH]}
    many = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"samples": 49})})
    assert READ - 15 < len(comparable_tokens(many, MODEL, TOKENIZER, None)) <= READ


def test_no_more_is_read_of_them_than_of_the_text(place: Path) -> None:
    """Windows of the same length, and no more of them, but one of each part of a mixture."""
    recipe = recipe_of(place, f"{place / 'words.txt'}+{place / 'train.txt'}")
    tokens = comparable_tokens(recipe, MODEL, TOKENIZER, None)
    for limit, samples in ((1, 2), (3, 3), (99, len(tokens))):
        short = comparable_tokens(recipe, MODEL, TOKENIZER, None, length=10, limit=limit)
        torch.testing.assert_close(short.ids, tokens.ids[:samples, :10])
        assert short.mask.shape == short.ids.shape
        assert short.source["read"] == [samples, 10]
    assert {part["samples"] > 0 for part in comparable_tokens(recipe, MODEL, TOKENIZER, None, limit=1).parts} == {True}


def test_documents_are_others_too(place: Path, tmp_path: Path) -> None:
    """Padding, which depends on the longest of a draw, does not make a document another one."""
    documents = [{"text": tiny_text(3 + number % 9, seed=number)} for number in range(20)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, documents)))
    recipe = recipe_of(place, str(tmp_path / "rows.jsonl"))
    cut = recipe.calibration.model_copy(update={"cut": "documents", "samples": 12})
    recipe = recipe.model_copy(update={"calibration": cut})
    used, tokens = (draw(recipe, MODEL, TOKENIZER, None) for draw in (make_tokens, comparable_tokens))
    ours, theirs = (
        {tuple(ids[mask].tolist()) for ids, mask in zip(drawn.ids, drawn.mask, strict=True)} for drawn in (used, tokens)
    )
    assert theirs
    assert not ours & theirs


@pytest.mark.parametrize("mixed", [False, True])
def test_a_text_that_has_no_others_gives_the_calibrations_own(place: Path, tmp_path: Path, mixed: bool) -> None:
    """Of a mixture: where one part has none, lest the comparison be with another mixture."""
    small = tmp_path / "small.txt"
    small.write_text(tiny_text(4 * LENGTH if mixed else 8 * LENGTH, seed=3))
    recipe = recipe_of(place, f"{place / 'words.txt'}+{small}" if mixed else str(small))
    tokens = comparable_tokens(recipe, MODEL, TOKENIZER, None)
    torch.testing.assert_close(tokens.ids, make_tokens(recipe, MODEL, TOKENIZER, None).ids)
    assert tokens.source["part"] == "used"


def test_a_text_that_cannot_be_had_is_one_error(place: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone.txt"
    with pytest.raises(ValueError, match=r"the calibration text, .*gone\.txt, and that cannot be had: .*--calibration"):
        comparable_tokens(recipe_of(place, str(gone)), MODEL, TOKENIZER, None)


def test_a_checkpoint_says_what_it_was_calibrated_on(place: Path, tmp_path: Path) -> None:
    make_checkpoint(recipe_of(place), tmp_path / "small", How())
    assert recorded_recipe(tmp_path / "small").calibration.corpus == str(place / "train.txt")
    make_checkpoint(recipe_of(place, method="svd"), tmp_path / "svd", How())
    with pytest.raises(ValueError, match=r"calibrated on no text, for svd reads none.*--calibration"):
        recorded_recipe(tmp_path / "svd")
    with pytest.raises(ValueError, match=r"has no recipe\.yaml.*--calibration"):
        recorded_recipe(place / "model")
    model = load_model(place / "model")
    with pytest.raises(ValueError, match="model has no low-rank linear"):
        calibration_errors(place / "model", model, model, load_tokenizer(place / "model"))


def test_a_copy_of_the_text_gives_the_samples_that_the_text_gives(place: Path, tmp_path: Path) -> None:
    """What was seen is left out of the copy too."""
    make_checkpoint(recipe_of(place, str(place / "words.txt")), tmp_path / "out", How())
    copy = tmp_path / "moved.txt"
    copy.write_text((place / "words.txt").read_text())
    model = load_model(tmp_path / "out", dtype="float32")
    own = calibration_errors(tmp_path / "out", model, MODEL, TOKENIZER)
    moved = calibration_errors(tmp_path / "out", model, MODEL, TOKENIZER, text=str(copy))
    assert own.source["part"] == moved.source["part"] == "unseen"
    assert all(torch.equal(own.logs[name], moved.logs[name]) for name in own.logs)


def test_a_reference_of_low_rank_is_refused(place: Path, tmp_path: Path) -> None:
    make_checkpoint(recipe_of(place), tmp_path / "out", How())
    model = load_model(tmp_path / "out", dtype="float32")
    with pytest.raises(ValueError, match=r"the reference has low-rank linears itself"):
        calibration_errors(tmp_path / "out", model, model, TOKENIZER)


def test_a_run_measures_distances_and_its_report_warns(place: Path, tmp_path: Path) -> None:
    tasks = [f"distance:{place / name}.txt" for name in ("train", "far")]
    folder = tmp_path / "run"
    measured = run(recipe_of(place, evaluate=tasks), folder, How())
    assert [item.dense for item in measured] == [None, None]
    near, far = (item.compressed for item in measured)
    assert near is not None
    assert far is not None
    assert near.warning is None
    assert 0.5 < near.value < FAR < far.value
    assert far.warning is not None
    assert near.settings["calibration"]["part"] in ("unseen", "used")
    stored = {json.loads(file.read_text())["value"] for file in (folder / "evals").glob("distance-*.json")}
    assert stored == {near.value, far.value}

    collection = read_runs([folder])
    assert warnings(collection) == [("run", far.warning)]
    groups = [column.group for column in summary(collection).columns]
    assert groups.count("Distance from the calibration text") == 2
    page = render(collection)
    assert "1 result calls for care" in page
    assert "is far from the text that the model was calibrated on" in page
    for file in (folder / "evals").glob("*far*.json"):
        data = json.loads(file.read_text())
        del data["details"]["warning"]
        file.write_text(EvalResult(**{k: v for k, v in data.items() if k not in ("scores", "traits")}).to_json())
    assert "for care" not in render(read_runs([folder]))
    again = run(recipe_of(place, evaluate=tasks), folder, How())
    assert again[0].compressed == near


def test_a_baseline_has_no_distance(place: Path, tmp_path: Path) -> None:
    recipe = recipe_of(place, method="llm-pruner", evaluate=[f"distance:{place / 'far.txt'}"])
    (item,) = run(recipe, tmp_path / "run", How(), keep_going=True)
    assert "has no low-rank linear" in item.refusals["compressed"]
