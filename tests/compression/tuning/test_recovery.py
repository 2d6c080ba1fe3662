"""Recovery: a compressed model's own loss goes down, by steps that the recipe says and the checkpoint keeps."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import eckart
from eckart.allocation import plan
from eckart.calibration.gradients import language_loss
from eckart.calibration.moments import calibrate
from eckart.compression.replace import compress
from eckart.compression.tuning.recovery import Recovery, Samples
from eckart.lowrank import build_method
from eckart.models.sites import low_rank_modules
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.recipe import parse_recipe
from tiny import MASK, logits_of, tiny_model, tiny_text, tiny_tokenizer, tiny_tokens

METHOD = build_method("svd")


def compressed(model_type: str, head: str | None = None, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = tiny_model(model_type, head, dtype=dtype)
    compress(model, METHOD, plan(model, 0.5), calibrate(model, tiny_tokens(), METHOD))
    return model


def samples_for(head: str | None) -> Samples:
    """Padded; labels for a classifier."""
    tokens = tiny_tokens(16, 12, padded=True)
    return Samples(tokens, tokens.ids[:, 0] % 2 if head == "classifier" else None)


CASES = [("llama", None), ("gpt2", None), ("bert", None), ("bert", "classifier"), ("llama", "classifier")]


@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_the_loss_goes_down_and_every_weight_moves(model_type: str, head: str | None) -> None:
    model = compressed(model_type, head)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    report = Recovery(steps=24, rate=0.01, batch=4)(model, samples_for(head))
    assert (report.name, report.place, report.kept) == ("recover", "model", True)
    assert report.after < 0.95 * report.before
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert not [name for name in still if "token_type" not in name and "key.bias" not in name], still
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.training
    assert low_rank_modules(model)


def test_what_does_not_help_is_kept_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    def harm(_model: nn.Module, parameters: list[nn.Parameter], *_args: object, **_options: object) -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(-3)

    monkeypatch.setattr("eckart.compression.tuning.recovery.descend", harm)
    model = compressed("llama")
    before = model.model.norm.weight.detach().clone()
    report = Recovery(steps=6, batch=4)(model, samples_for(None))
    assert report.kept
    assert report.after > report.before
    assert torch.equal(model.model.norm.weight, -3 * before)


def test_half_precision_stays_what_it_is() -> None:
    model = compressed("llama", dtype=torch.bfloat16)
    report = Recovery(steps=16, rate=0.02, batch=4)(model, samples_for(None))
    assert model.dtype == torch.bfloat16
    assert report.after < report.before


def test_two_runs_are_one() -> None:
    states = []
    for _ in range(2):
        model = compressed("bert")
        Recovery(steps=4, batch=4)(model, samples_for(None))
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_the_loss_before_is_that_of_the_rows_that_steps_are_taken_on() -> None:
    model, samples = compressed("llama", "classifier"), samples_for("classifier")
    assert samples.labels is not None
    with torch.no_grad():
        logits = model(input_ids=samples.tokens.ids, attention_mask=samples.tokens.mask.long()).logits
    expected = torch.nn.functional.cross_entropy(logits, samples.labels)
    report = Recovery(steps=9, batch=4)(model, samples)  # 36 rows of 16: each has been in some step, and counts once
    assert report.before == pytest.approx(float(expected), rel=1e-4)


def test_a_loss_that_is_not_finite_is_an_error() -> None:
    model = compressed("llama")
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(ValueError, match="recovery: the loss is not finite"):
        Recovery(steps=2)(model, samples_for(None))


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"rate": 0.0}, {"rate": 1.0}, {"batch": 0}])
def test_settings_that_take_no_step_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"recovery: .* give at least 1"):
        Recovery(**wrong)


# The loss of a batch


def test_padding_is_in_no_loss_and_rows_count_by_their_tokens() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(4, 10, padded=True)
    losses = [
        language_loss(model, row[mask][None], mask[mask][None], None, torch.Generator())
        for row, mask in zip(tokens.ids, tokens.mask, strict=True)
    ]
    loss, scored = language_loss(model, tokens.ids, tokens.mask, None, torch.Generator())
    assert scored == sum(count for _, count in losses)
    assert loss.item() == pytest.approx(sum(one.item() * count for one, count in losses) / scored, rel=1e-5)


def test_every_padded_row_of_a_masked_model_is_asked_for_something_real() -> None:
    model, tokens, seen = tiny_model("bert"), tiny_tokens(8, 10, padded=True), []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    for seed in range(5):
        _, scored = language_loss(model, tokens.ids, tokens.mask, MASK, torch.Generator().manual_seed(seed))
        masked = seen[-1] == MASK
        assert scored == int(masked.sum())
        assert masked.any(1).all()
        assert not (masked & ~tokens.mask).any()


# From a recipe to a checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models, a calibration text and labelled rows."""
    folder = tmp_path_factory.mktemp("recovery")
    for name, head in (("llama", None), ("bert", "classifier")):
        eckart.save(tiny_model(name, head), folder / name, tiny_tokenizer())
    (folder / "train.txt").write_text(tiny_text(900, seed=1))
    rows = [{"text": tiny_text(6, seed=seed), "label": seed % 2} for seed in range(24)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def make(place: Path, model: str, out: Path, **said: Any) -> Any:
    calibration = {"corpus": str(place / "train.txt"), "samples": 8, "cut": "windows"}
    data = {
        "model": str(place / model),
        "context": 16,
        "calibration": calibration,
        "keep": 0.5,
        "method": "svd",
        **said,
    }
    return make_checkpoint(parse_recipe(data), out, How())


def test_a_decoder_recovers_on_its_calibration_text(place: Path, tmp_path: Path) -> None:
    plain = make(place, "llama", tmp_path / "plain")
    outcome = make(place, "llama", tmp_path / "out", recover={"steps": 20, "rate": 0.01})
    (report,) = outcome.passes
    assert plain.passes == ()
    assert (report.name, report.kept) == ("recover", True)
    assert report.after < report.before
    assert json.loads((tmp_path / "out/compression.json").read_text())["passes"] == [asdict(report)]
    assert "fine-tuned in 20 steps" in (tmp_path / "out/README.md").read_text()
    assert outcome.recipe.recover is not None
    assert outcome.recipe.recover.steps == 20
    assert outcome.seconds["recover"] > 0
    model, before = eckart.load_model(tmp_path / "out"), eckart.load_model(tmp_path / "plain")
    assert not torch.equal(logits_of(model), logits_of(before))
    again = make_checkpoint(outcome.recipe, tmp_path / "again", How())
    assert again.passes == outcome.passes
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_it_comes_after_what_else_is_done_to_the_model(place: Path, tmp_path: Path) -> None:
    around = {"refine": {"steps": 1}, "distil": {"steps": 1}, "recover": {"steps": 1}}
    outcome = make(place, "llama", tmp_path / "out", **around)
    assert [report.name for report in outcome.passes] == [*["refine"] * 3, "distil", "recover"]


def test_a_classifier_recovers_on_labels(place: Path, tmp_path: Path) -> None:
    recover = {"steps": 20, "rate": 0.01, "corpus": str(place / "rows.jsonl")}
    outcome = make(place, "bert", tmp_path / "out", recover=recover)
    (report,) = outcome.passes
    assert report.after < report.before
    assert type(eckart.load_model(tmp_path / "out")).__name__ == "BertForSequenceClassification"


@pytest.mark.parametrize(
    ("model", "recover", "message"),
    [
        ("bert", True, r"BertForSequenceClassification recovers on labels: give a corpus"),
        ("llama", {"corpus": "rows.jsonl"}, r"LlamaForCausalLM is no classifier .*: leave out corpus"),
        ("bert", {"corpus": "three.jsonl"}, r"tells 2 classes apart, .*three.jsonl has 3"),
    ],
)
def test_what_does_not_fit_the_model_is_found_before_anything_is_computed(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, recover: Any, message: str
) -> None:
    rows = [{"text": tiny_text(6, seed=seed), "label": seed % 3} for seed in range(9)]
    (place / "three.jsonl").write_text("\n".join(map(json.dumps, rows)))
    if isinstance(recover, dict):
        recover = {**recover, "corpus": str(place / recover["corpus"])}

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("nothing is computed")

    monkeypatch.setattr("eckart.runs.in_memory.compress", refuse)
    with pytest.raises(ValueError, match=message):
        make(place, model, tmp_path / "out", recover=recover)
    assert not (tmp_path / "out").exists()


def test_no_steps_are_no_recovery(place: Path, tmp_path: Path) -> None:
    plain, none = (
        make(place, "llama", tmp_path / name, **said) for name, said in (("a", {}), ("b", {"recover": False}))
    )
    assert plain.recipe == none.recipe
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert none.passes == ()
