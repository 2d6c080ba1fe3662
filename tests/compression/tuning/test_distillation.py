"""Distillation: a whole model nearer to the dense one's predictions, or bit for bit what it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from eckart.allocation import plan
from eckart.calibration.moments import calibrate
from eckart.compression.replace import compress
from eckart.compression.tuning.distillation import Distillation
from eckart.lowrank import build_method
from eckart.models.sites import low_rank_modules
from tiny import tiny_model, tiny_tokens

METHOD = build_method("svd")


def pair(model_type: str, dtype: torch.dtype = torch.float32) -> tuple:
    dense = tiny_model(model_type, dtype=dtype)
    model = copy.deepcopy(dense)
    compress(model, METHOD, plan(model, 0.5), calibrate(model, tiny_tokens(), METHOD))
    return dense, model, *tiny_tokens(16, 12).hold_out(0.25)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_predictions_come_nearer_and_only_the_factors_move(model_type: str) -> None:
    dense, model, tokens, held_out = pair(model_type)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = Distillation(steps=12, rate=0.01, batch=4)(model, dense, tokens, held_out)
    assert report is not None
    assert report.kept
    assert report.after < report.before
    assert (report.name, report.place) == ("distil", "model")
    inside = tuple(low_rank_modules(model))
    for name, value in model.state_dict().items():
        if not name.startswith(inside):
            assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_does_not_help_is_undone_bit_for_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    def harm(_model: nn.Module, parameters: list[nn.Parameter], *_args: object, **_options: object) -> None:
        with torch.no_grad():
            for parameter in parameters:
                parameter.mul_(-3)

    monkeypatch.setattr("eckart.compression.tuning.distillation.descend", harm)
    dense, model, tokens, held_out = pair("llama", dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = Distillation(steps=3, batch=4)(model, dense, tokens, held_out)
    assert report is not None
    assert not report.kept
    assert report.after > report.before
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.dtype == dtype


def test_two_runs_are_one() -> None:
    states = []
    for _ in range(2):
        dense, model, tokens, held_out = pair("llama")
        Distillation(steps=4, rate=1e-3, batch=4)(model, dense, tokens, held_out)
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_a_dense_model_has_nothing_to_distil() -> None:
    dense = tiny_model("llama")
    tokens, held_out = tiny_tokens().hold_out(0.5)
    assert Distillation()(copy.deepcopy(dense), dense, tokens, held_out) is None


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"rate": 0.0}, {"rate": 1.0}, {"batch": 0}])
def test_settings_that_take_no_step_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="give at least 1"):
        Distillation(**wrong)
