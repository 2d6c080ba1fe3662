"""Studies whose models are fine-tuned first: the section, its scales and changes, the runs that start from there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import eckart
from eckart.compression.tuning.finetuning import NOTES
from eckart.runs.how import How
from eckart.runs.recipe import load_recipe
from eckart.runs.reproduction import run_study
from eckart.runs.study import Study
from eckart.support.progress import T
from tiny import tiny_model, tiny_text, tiny_tokenizer

BASE: dict[str, Any] = {
    "title": "Table 0",
    "base": {"model": "owner/big", "evaluate": ["classification:cola"]},
    "finetune": {"task": "cola", "epochs": 3, "rate": 0.003, "batch": 16},
    "columns": ["classification:cola", "classification:cola#accuracy"],
    "runs": [
        {"method": "fwsvd", "keep": 0.5, "calibration": {"fisher": "recorded"}},
        {"method": "svd", "keep": 0.5},
    ],
    "scales": {"small": {"finetune": {"limit": 32, "epochs": 2}}, "plain": {"base": {"model": "small"}}},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two tiny models and a tiny CoLA."""
    folder = tmp_path_factory.mktemp("study")
    for name in ("one", "two"):
        eckart.save(tiny_model("bert", seed=len(name + name[0])), folder / name, tiny_tokenizer())
    (folder / "cola").mkdir()
    for split, count in (("train", 64), ("dev", 20)):
        rows = [{"text": tiny_text(5, seed=seed), "label": seed % 2} for seed in range(count)]
        (folder / f"cola/{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def settings(study: Study) -> dict[str, Any]:
    assert study.finetune is not None
    return study.finetune.model_dump(exclude_defaults=True)


def test_scales_and_changes_are_laid_over_the_section() -> None:
    study = Study.model_validate(BASE)
    assert settings(study.at("plain")) == {"task": "cola", "rate": 0.003, "batch": 16}
    assert settings(study.at("small")) == {"task": "cola", "rate": 0.003, "batch": 16, "limit": 32, "epochs": 2}
    changed = study.at("small", {"finetune.epochs": 1, "finetune.rate": "2e-5", "calibration.samples": 4})
    assert settings(changed) == {"task": "cola", "batch": 16, "limit": 32, "epochs": 1}
    for _, _, recipe in changed.recipes():
        assert recipe.calibration.samples == 4
        assert "finetune" not in recipe.to_yaml()
    assert study.at("small", {"finetune": None}).finetune is None
    plain = Study.model_validate({key: value for key, value in BASE.items() if key not in ("finetune", "scales")})
    assert plain.at().finetune is None
    assert settings(plain.at("paper", {"finetune.task": "sst2"})) == {"task": "sst2"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"finetune.epoch": 1}, "finetune: epoch: Extra inputs"),
        ({"finetune.epochs": 0}, "finetune: epochs: Input should be greater than 0"),
        ({"finetune": 3}, "finetune: 3 is no section"),
    ],
)
def test_changes_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Study.model_validate(BASE).at("paper", changes)
    with pytest.raises(ValueError, match="task"):
        Study.model_validate({**BASE, "finetune": None}).at("paper", {"finetune.epochs": 1})


def at_place(place: Path, *models: str, **changes: Any) -> Study:
    return Study.model_validate(BASE).at("paper", {"models": [str(place / model) for model in models], **changes})


def test_runs_start_from_the_fine_tuned_models(place: Path, tmp_path: Path) -> None:
    lines = run_study(at_place(place, "one", "two"), tmp_path, How(data=place))
    assert sorted(folder.name for folder in (tmp_path / "finetuned").iterdir()) == ["one", "two"]
    labels = [line.label for line in lines]
    assert labels == [
        *("one, dense", "one, fwsvd, keep 0.5", "one, svd, keep 0.5"),
        *("two, dense", "two, fwsvd, keep 0.5", "two, svd, keep 0.5"),
    ]
    for line in lines:
        assert None not in line.ours
        assert not line.refusals
        if line.run is not None:
            recipe = load_recipe(tmp_path / "runs" / line.run / "recipe.yaml")
            assert recipe.model == str(tmp_path / "finetuned" / line.label[:3])
    for dense in (lines[0], lines[3]):
        facts = json.loads((tmp_path / "finetuned" / dense.label[:3] / NOTES).read_text())
        assert facts["model"] == str(place / dense.label[:3])
        assert dense.ours == [pytest.approx(facts["dev"][name]) for name in ("mcc", "accuracy")]
    written = json.loads((tmp_path / "study.json").read_text())
    assert written["finetune"]["epochs"] == 3


@pytest.mark.slow
def test_what_is_fine_tuned_is_not_again_unless_it_is_to_be_otherwise(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run_study(at_place(place, "one"), tmp_path, How(data=place))

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("was done already")

    with monkeypatch.context() as patch:
        patch.setattr("eckart.runs.reproduction.fine_tune", refuse)
        patch.setattr("eckart.runs.experiment.load_model", refuse)
        assert run_study(at_place(place, "one"), tmp_path, How(data=place)) == first
        with pytest.raises(FileExistsError, match=r"finetuned.one was fine-tuned otherwise .*'epochs': 3.* --force"):
            run_study(at_place(place, "one", **{"finetune.epochs": 1}), tmp_path, How(data=place))
    changed = at_place(place, "one", **{"finetune.epochs": 1, "finetune.seed": 3})
    again = run_study(changed, tmp_path, How(data=place), force=True)
    assert json.loads((tmp_path / "finetuned/one" / NOTES).read_text())["settings"]["epochs"] == 1
    assert again == run_study(changed, tmp_path / "anew", How(data=place)), "nothing is left of the other weights"


@pytest.mark.slow
def test_a_killed_study_goes_on_in_the_middle_of_a_training(place: Path, tmp_path: Path) -> None:
    whole = run_study(at_place(place, "one"), tmp_path / "whole", How(data=place))

    def kill(items: Iterable[T], description: str, total: int) -> Iterator[T]:
        for done, item in enumerate(items):
            if description == "fine-tuning" and done == 6:
                raise RuntimeError("killed")
            yield item

    with pytest.raises(RuntimeError, match="killed"):
        run_study(at_place(place, "one"), tmp_path / "out", How(data=place, track=kill))
    remaining: list[int] = []

    def count(items: Iterable[T], description: str, total: int) -> Iterable[T]:
        remaining.extend([total] if description == "fine-tuning" else [])
        return items

    assert run_study(at_place(place, "one"), tmp_path / "out", How(data=place, track=count)) == whole
    assert remaining == [8], "the first epoch of three, of four steps each, is not done again"


def test_models_of_one_name_get_folders_of_their_own(place: Path, tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    eckart.save(tiny_model("bert", seed=9), tmp_path / "other/one", tiny_tokenizer())
    models = {"a": str(place / "one"), "b": str(tmp_path / "other/one")}
    runs = [{"model": model, "method": "svd", "keep": 1, "label": label} for label, model in models.items()]
    study = Study.model_validate({**BASE, "runs": runs}).at("paper", {"finetune.epochs": 1})
    run_study(study, tmp_path / "out", How(data=place))
    sources = {json.loads(file.read_text())["model"] for file in (tmp_path / "out/finetuned").glob(f"*/{NOTES}")}
    assert sources == set(models.values())


def test_a_source_that_changed_is_not_taken_for_the_one_that_was_fine_tuned(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "one", tmp_path / "one")
    study = Study.model_validate(BASE).at("paper", {"models": [str(tmp_path / "one")], "finetune.epochs": 1})
    run_study(study, tmp_path / "out", How(data=place))
    weights = tmp_path / "one" / "model.safetensors"
    save_file({name: tensor * 1.5 for name, tensor in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(FileExistsError, match=r"fine-tuned otherwise .*model\.safetensors is changed.*--force"):
        run_study(study, tmp_path / "out", How(data=place))
