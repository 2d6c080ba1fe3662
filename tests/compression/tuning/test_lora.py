"""Recovery by an adapter: it merges into the factors, whose ranks stay, or is kept for PEFT; the loss falls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from eckart.compression.tuning.lora import Lora
from eckart.compression.tuning.recovery import Recovery, Samples
from eckart.models.checkpoint import specs_of
from eckart.models.loading import load_model, save
from eckart.models.sites import low_rank_modules
from eckart.runs.how import How
from eckart.runs.in_memory import ADAPTER_FOLDER, make_checkpoint
from eckart.runs.recipe import parse_recipe
from models.layouts import KINDS, laid_out
from tiny import logits_of, relative, tiny_model, tiny_text, tiny_tokenizer, tiny_tokens

peft = pytest.importorskip("peft", reason="needs peft (pip install 'eckart[peft]')")

SAMPLES = Samples(tiny_tokens(16, 12, padded=True))
SETTINGS: dict[str, Any] = {"steps": 6, "rate": 0.01, "batch": 4, "adapter": "lora"}


def others(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All numbers but those of factors."""
    inside = tuple(f"{name}.{side}." for name in low_rank_modules(model) for side in ("left", "right"))
    return {name: value.clone() for name, value in model.state_dict().items() if not name.startswith(inside)}


@pytest.mark.parametrize(("model_type", "kind"), [*(("llama", kind) for kind in KINDS), ("gpt2", "joint pivoted")])
def test_the_merged_model_is_the_trained_one_and_its_ranks_stay(model_type: str, kind: str) -> None:
    merged, kept = laid_out(model_type, kind), laid_out(model_type, kind)
    specs, before, untouched = specs_of(merged), logits_of(merged), others(merged)
    report = Recovery(**SETTINGS)(merged, SAMPLES)
    assert report.after < 0.99 * report.before
    same, lora = Recovery(**SETTINGS, merge=False).train(kept, SAMPLES)
    assert same.after == pytest.approx(report.after, rel=1e-5)
    assert lora is not None
    assert relative(logits_of(kept), logits_of(merged)) < 1e-5
    assert relative(before, logits_of(merged)) > 1e-3
    assert specs_of(merged) == specs
    assert all(torch.equal(value, untouched[name]) for name, value in others(merged).items())
    assert all(parameter.requires_grad for parameter in merged.parameters())
    assert not hasattr(merged, "peft_config")
    lora.take_off("base")
    assert torch.equal(logits_of(kept), before)
    assert specs_of(kept) == specs


def test_only_the_adapter_has_gradients_and_half_precision_stays() -> None:
    model = laid_out("llama", "plain").to(torch.bfloat16)
    lora = Lora.around(model, 4)
    assert [parameter for parameter in model.parameters() if parameter.requires_grad] == lora.parameters
    assert {parameter.dtype for parameter in lora.parameters} == {torch.float32}
    lora.merge()
    report = Recovery(**{**SETTINGS, "adapter_rank": 4})(model, SAMPLES)
    assert model.dtype == torch.bfloat16
    assert report.after < report.before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge": False}, "adapter_rank and merge go with adapter: lora"),
        ({"adapter_rank": 4}, "adapter_rank and merge go with adapter: lora"),
        ({"adapter": "lora", "adapter_rank": 0}, "adapter of rank 0"),
    ],
    ids=["merge", "rank", "none"],
)
def test_settings_that_go_with_nothing_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Recovery(**settings)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lora")
    save(tiny_model("llama"), folder / "llama", tiny_tokenizer())
    (folder / "train.txt").write_text(tiny_text(900, seed=1))
    return folder


def test_a_recipe_merges_the_adapter_or_keeps_it_for_peft(place: Path, tmp_path: Path) -> None:
    recipe = {
        "model": str(place / "llama"),
        "context": 16,
        "calibration": {"corpus": str(place / "train.txt"), "samples": 8, "cut": "windows"},
        "keep": 0.5,
        "method": "svd",
    }
    trained = {"steps": 12, "rate": 0.01, "adapter": "lora", "adapter_rank": 4}
    makes = {"plain": None, "merged": trained, "kept": {**trained, "merge": False}}
    outcomes = {name: make_checkpoint(parse_recipe({**recipe, "recover": recover}), tmp_path / name, How())
                for name, recover in makes.items()}  # fmt: skip
    (report,) = outcomes["merged"].passes
    assert report.after < report.before
    plain, merged, kept = (load_model(tmp_path / name) for name in makes)
    assert specs_of(plain) == specs_of(merged)
    assert torch.equal(logits_of(kept), logits_of(plain))
    assert not (tmp_path / "merged" / ADAPTER_FOLDER).exists()
    folder = tmp_path / "kept" / ADAPTER_FOLDER
    by_peft = peft.PeftModel.from_pretrained(kept, folder)
    assert relative(logits_of(by_peft), logits_of(merged)) < 1e-4
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(tmp_path / "kept")
    assert relative(logits_of(load_model(folder)), logits_of(merged)) < 1e-4
    assert "by a LoRA adapter, merged into the factors" in (tmp_path / "merged/README.md").read_text()
    written = parse_recipe(json.loads(json.dumps(outcomes["kept"].recipe.model_dump())))
    assert written.composition.recovery == Recovery(12, 0.01, 8, None, "lora", 4, False)
