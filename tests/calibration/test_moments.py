"""Calibration: moments block by block equal those of plain hooks on the whole model, which stays as it was."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import nn

from eckart.allocation import plan
from eckart.calibration.moments import BlockCalibration, calibrate, calibrate_by_block
from eckart.compression.replace import compress
from eckart.data.tokens import Tokens
from eckart.lowrank import build_method
from eckart.models.sites import blocks_of, find_sites
from tiny import (
    BLOCKS,
    DEFAULT_CONFIGS,
    FAMILY_CONFIGS,
    logits_of,
    relative,
    site_inputs,
    tiny_model,
    tiny_tokens,
)
from walks import Noted, alike, refuse_to_run, tensors_of, traces

ALL = sorted({*FAMILY_CONFIGS, *DEFAULT_CONFIGS})
METHOD = build_method("asvd-i")
T = TypeVar("T")


# The law: a block at a time is the whole model at once.


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", ALL)
def test_moments_equal_those_of_plain_hooks(model_type: str, padded: bool) -> None:
    model, tokens = tiny_model(model_type), tiny_tokens(padded=padded)
    sites = find_sites(model)
    inputs = site_inputs(model, tokens, sites)
    calibration = calibrate(model, tokens, METHOD, batch_size=4)
    assert [block.block for block in calibration] == list(range(BLOCKS))
    collected = {group: moments for block in calibration for group, moments in block.inputs.items()}
    assert collected.keys() == {site.input_group for site in sites}
    for site in sites:
        rows, moments = inputs[site.name].double(), collected[site.input_group]
        assert moments.count == len(rows) == tokens.count
        assert relative(moments.second_moment, rows.T @ rows / len(rows)) < 2e-6, site.name
        assert relative(moments.mean, rows.mean(0)) < 5e-6, site.name
        assert relative(moments.abs_mean, rows.abs().mean(0)) < 2e-6, site.name


@pytest.mark.parametrize("head", ["base", "classifier"])
@pytest.mark.parametrize("model_type", ["llama", "bert", "roberta"])
def test_the_head_does_not_matter(model_type: str, head: str) -> None:
    model, tokens = tiny_model(model_type, head), tiny_tokens(padded=True)
    expected = site_inputs(model, tokens, find_sites(model))
    for block in calibrate(model, tokens, METHOD):
        for group, moments in block.inputs.items():
            rows = expected[group].double()
            assert relative(moments.second_moment, rows.T @ rows / len(rows)) < 2e-6


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "bert"])
def test_batch_size_changes_nothing(model_type: str, padded: bool) -> None:
    model, tokens = tiny_model(model_type), tiny_tokens(7, padded=padded)
    whole = tensors_of(calibrate(model, tokens, METHOD, batch_size=7))
    for size in (1, 3, 100):
        cut = tensors_of(calibrate(model, tokens, METHOD, batch_size=size))
        assert whole.keys() == cut.keys()
        assert max(relative(cut[name], whole[name]) for name in whole) < 5e-6


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "bert", "roberta"])
def test_more_padding_changes_nothing(model_type: str) -> None:
    model, tokens = tiny_model(model_type), tiny_tokens(4, 12, padded=True)
    wider = Tokens(nn.functional.pad(tokens.ids, (0, 9)), nn.functional.pad(tokens.mask, (0, 9)))
    assert wider.count == tokens.count
    expected = tensors_of(calibrate(model, tokens, METHOD))
    again = tensors_of(calibrate(model, wider, METHOD))
    assert max(relative(again[name], expected[name]) for name in expected) < 5e-6


def test_moments_are_of_the_stored_type_in_float32() -> None:
    model, tokens = tiny_model("llama", dtype=torch.bfloat16), tiny_tokens()
    rows = site_inputs(model, tokens, find_sites(model))
    assert rows["model.layers.0.mlp.down_proj"].dtype == torch.bfloat16
    moments = calibrate(model, tokens, METHOD, batch_size=1).blocks[0].inputs["model.layers.0.mlp.down_proj"]
    assert moments.sums["covariance"].dtype == torch.float32
    exact = rows["model.layers.0.mlp.down_proj"].double()
    assert relative(moments.second_moment, exact.T @ exact / len(exact)) < 1e-6


# Only what is needed


def test_a_method_without_needs_never_runs_the_model() -> None:
    model = tiny_model("llama")
    model.base_model.register_forward_pre_hook(refuse_to_run)
    calibration = calibrate(model, tiny_tokens(), build_method("svd"))
    assert [(block.block, block.inputs, block.gradients) for block in calibration] == [(n, {}, {}) for n in range(3)]


def test_statistics_are_what_the_method_needs() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(2, 8)
    assert calibrate(model, tokens, build_method("asvd-0")).blocks[0].inputs[
        "model.layers.0.mlp.down_proj"
    ].sums.keys() == {
        "mean",
        "abs_mean",
    }
    fisher = calibrate(model, tokens, build_method("fwsvd"))
    assert fisher.blocks[0].inputs == {}
    assert fisher.blocks[1].gradients.keys() == {s.name for s in find_sites(model) if s.block == 1}
    both = dataclasses.replace(METHOD, needs=frozenset({"abs_mean", "fisher_out"}))
    assert calibrate(model, tokens, both).blocks[2].inputs
    assert calibrate(model, tokens, both).blocks[2].gradients


def test_only_the_selected_sites() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    sites = [s for s in find_sites(model) if s.block == 2 and s.role in {"self_attn.v_proj", "mlp.down_proj"}]
    (block,) = calibrate_by_block(model, tokens, METHOD, sites=sites)
    whole = calibrate(model, tokens, METHOD).blocks[2]
    assert block.block == 2
    assert block.inputs.keys() == {"model.layers.2.self_attn.q_proj", "model.layers.2.mlp.down_proj"}
    for group, moments in block.inputs.items():
        assert torch.equal(moments.second_moment, whole.inputs[group].second_moment)


def test_calibration_says_where_it_came_from() -> None:
    tokens = tiny_tokens(3, 8)
    assert calibrate(tiny_model("llama"), tokens, METHOD).source == {"corpus": "random", "tokens": 24}


def test_a_block_may_be_replaced_as_soon_as_it_was_given_out() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    expected = calibrate(model, tokens, METHOD)
    again = []
    for block in calibrate_by_block(model, tokens, METHOD):
        again.append(block)
        blocks_of(model)[block.block] = nn.Identity()
    assert alike(again, expected)


def test_one_block_of_moments_in_memory_at_a_time() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    alive: list[weakref.ref[Any]] = []
    at_start: dict[str, int] = {}

    def track(items: Iterable[T], description: str, total: int) -> Iterable[T]:
        at_start[description] = sum(reference() is not None for reference in alive)
        for item in items:  # noqa: UP028 (holds the item while the next one is made, as progress bars do)
            yield item

    def watched(blocks: Iterable[BlockCalibration]) -> Iterable[BlockCalibration]:
        for block in blocks:
            alive.extend(weakref.ref(moments) for moments in block.inputs.values())
            yield block
            del block

    walk = watched(calibrate_by_block(model, tokens, METHOD, track=track))
    compress(model, METHOD, plan(model, 0.5), walk, track=track)
    assert len(alive) == 12
    assert {at_start[f"block {number}: moments"] for number in range(BLOCKS)} == {0}


# The model stays as it was


@pytest.mark.parametrize("method", ["asvd-i", "fwsvd"])
@pytest.mark.parametrize("model_type", ALL)
def test_nothing_is_left_on_the_model(model_type: str, method: str) -> None:
    model = tiny_model(model_type)
    before, clean = logits_of(model), traces(model)
    calibrate(model, tiny_tokens(3, 8), build_method(method))
    assert traces(model) == clean == []
    assert torch.equal(logits_of(model), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("where", ["model.layers.1", "model.layers.1.mlp.down_proj", "model.layers.0.mlp"])
def test_nothing_is_left_when_a_block_raises(where: str) -> None:
    model = tiny_model("llama")
    before = logits_of(model)
    handle = model.get_submodule(where).register_forward_pre_hook(refuse_to_run)
    with pytest.raises(AssertionError, match="the model ran"):
        calibrate(model, tiny_tokens(), METHOD)
    handle.remove()
    assert traces(model) == []
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("step", ["embedding", "block 0: moments", "block 1: moments"])
def test_nothing_is_left_when_it_is_stopped(step: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt, match=step):
        calibrate(model, tiny_tokens(), METHOD, batch_size=2, track=Noted(step))
    assert traces(model) == []


def test_nothing_is_left_when_the_reader_stops() -> None:
    model = tiny_model("llama")
    walk = calibrate_by_block(model, tiny_tokens(), METHOD)
    next(iter(walk))
    assert traces(model) == []


def test_a_forward_that_somebody_put_on_a_block_stays() -> None:
    # accelerate's offloading works that way.
    model = tiny_model("llama")
    expected = calibrate(model, tiny_tokens(), METHOD)
    calls: list[object] = []

    class Counting(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    for block in blocks_of(model):
        add_hook_to_module(block, Counting())
    again = calibrate(model, tiny_tokens(), METHOD)
    assert alike(again, expected)
    calls.clear()
    logits_of(model)
    assert calls == list(blocks_of(model))


# Refusals


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is in training mode.*call model\.eval\(\)"):
        calibrate(tiny_model("gpt2").train(), tiny_tokens(), METHOD)


@pytest.mark.parametrize("method", ["asvd-i", "fwsvd"])
def test_a_token_outside_the_vocabulary(method: str) -> None:
    tokens = tiny_tokens()
    tokens.ids[2, 3] = 96
    with pytest.raises(ValueError, match="token 96 is outside the model's vocabulary of 96"):
        calibrate(tiny_model("llama"), tokens, build_method(method))


@pytest.mark.parametrize("method", ["asvd-i", "fwsvd"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_samples_longer_than_the_model_reads(model_type: str, method: str) -> None:
    with pytest.raises(ValueError, match="calibration length 65 is past the model's 64 positions"):
        calibrate(tiny_model(model_type), tiny_tokens(1, 65), build_method(method))
    assert calibrate(tiny_model(model_type), tiny_tokens(1, 64), build_method(method)).source["tokens"] == 64


def test_an_input_that_is_not_finite_names_its_group() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.gate_proj: an input is not finite"):
        calibrate(model, tiny_tokens(), METHOD)


def test_an_anchored_method_is_refused() -> None:
    with pytest.raises(ValueError, match="asvd-i is anchored and reads the compressed model too"):
        calibrate(tiny_model("llama"), tiny_tokens(), METHOD.anchored(0.1))


def test_a_model_that_calls_a_block_again_is_refused() -> None:
    with pytest.raises(ValueError, match="AlbertForMaskedLM does not call its 1 blocks once each in order"):
        calibrate(tiny_model("albert"), tiny_tokens(), METHOD)
