"""Accumulation: a split worked out without calling a block twice, and its laws."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import eckart
from eckart.evals.accumulation import accumulation
from eckart.evals.catalogue import find_task
from eckart.evals.result import EvalResult
from eckart.evals.tasks import evaluate
from eckart.models.sites import block_names
from tiny import BLOCKS, DEFAULT_CONFIGS, FAMILY_CONFIGS, POSITIONS, tiny_model, tiny_tokenizer, tiny_tokens

LENGTH = 10
STREAM = tiny_tokens(1, 4 * LENGTH + 3).ids[0]
ALL = tuple(range(BLOCKS))


@torch.no_grad()
def changed(model_type: str, blocks: tuple[int, ...] = ALL, noise: float = 0.3, **changes: Any) -> PreTrainedModel:
    """The tiny model with the matrices of some blocks moved, as by compression; a block always in the same way."""
    model = tiny_model(model_type, **changes)
    for number in blocks:
        generator = torch.Generator().manual_seed(number)
        for parameter in model.get_submodule(block_names(model)[number]).parameters():
            if parameter.ndim == 2:
                parameter.add_(noise * torch.randn(parameter.shape, generator=generator) / 32**0.5)
    return model


def measure(model: PreTrainedModel, reference: PreTrainedModel, stream: Tensor = STREAM, **more: Any) -> EvalResult:
    return accumulation(model, reference, block_names(reference), stream, **{"length": LENGTH, **more})


def details(result: EvalResult, name: str) -> list[Any]:
    return [row[name] for row in result.details["blocks"]]


def scores(result: EvalResult, name: str) -> list[float]:
    return [result.read(f"{name}.{number}") for number in range(1, len(details(result, "block")) + 1)]


@torch.no_grad()
def states_of(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What the first block reads, and what each block gives, by plain hooks."""
    states: list[Tensor] = []

    def enter(_block: nn.Module, args: Any, kwargs: Any) -> None:
        states.append((args[0] if args else kwargs["hidden_states"]).double())

    def leave(_block: nn.Module, _args: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).double())

    blocks = [model.get_submodule(name) for name in block_names(model)]
    handles = [blocks[0].register_forward_pre_hook(enter, with_kwargs=True)]
    handles += [block.register_forward_hook(leave) for block in blocks]
    model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return states


@pytest.mark.parametrize("model_type", [*FAMILY_CONFIGS, *DEFAULT_CONFIGS])
def test_by_whole_models_in_which_one_block_is_compressed(model_type: str) -> None:
    """All blocks before it being dense, the block reads the dense states: what it gives there is off by its own."""
    reference, model = tiny_model(model_type), changed(model_type)
    ids = STREAM[: 4 * LENGTH].view(4, LENGTH)
    dense, whole = states_of(reference, ids), states_of(model, ids)
    result = measure(model, reference)
    for number in range(1, BLOCKS + 1):
        mixed = states_of(changed(model_type, (number - 1,)), ids)[number]
        own, inherited = mixed - dense[number], whole[number] - mixed
        arriving = whole[number - 1] - dense[number - 1]

        def mean(states: Tensor, base: Tensor) -> float:
            return float((states.square().sum(-1) / base.square().sum(-1)).mean())

        for name, states in (("own", own), ("inherited", inherited), ("error", whole[number] - dense[number])):
            assert result.read(f"{name}.{number}") == pytest.approx(mean(states, dense[number]), rel=1e-3, abs=1e-9)
        overlap = (2 * (own * inherited).sum(-1) / dense[number].square().sum(-1)).mean()
        assert details(result, "overlap")[number - 1] == pytest.approx(float(overlap), rel=1e-3, abs=1e-7)
        if number > 1:
            growth = mean(inherited, dense[number - 1]) / mean(arriving, dense[number - 1])
            assert details(result, "growth")[number - 1] == pytest.approx(growth, rel=1e-3)
    assert details(result, "block") == [1, 2, 3]
    assert details(result, "growth")[0] is None
    assert result.value == result.read("error.-1") > 1e-3
    assert not any(module._forward_hooks for each in (model, reference) for module in each.modules())


def test_error_is_own_and_inherited_and_overlap() -> None:
    result = measure(changed("llama"), tiny_model("llama"))
    overlaps = details(result, "overlap")
    assert max(map(abs, overlaps)) > 1e-3  # the squares alone do not add up
    for error, own, inherited, overlap in zip(
        *(scores(result, name) for name in ("error", "own", "inherited")), overlaps, strict=True
    ):
        assert error == pytest.approx(own + inherited + overlap, rel=1e-12)


@pytest.mark.parametrize("model_type", ["gemma3_text", "bert", "gpt2"])
def test_a_dense_model_has_no_error(model_type: str) -> None:
    result = measure(tiny_model(model_type), tiny_model(model_type))
    assert (result.value, result.stderr) == (0, 0)
    assert {score.value for score in result.scores.values()} == {0}
    assert details(result, "overlap") == [0, 0, 0]
    assert details(result, "growth") == [None, None, None]


@pytest.mark.parametrize("block", ALL)
def test_one_compressed_block_errs_there_and_those_behind_it_inherit(block: int) -> None:
    result = measure(changed("llama", (block,)), tiny_model("llama"))
    own, inherited = scores(result, "own"), scores(result, "inherited")
    assert [value > 0 for value in own] == [number == block for number in ALL]
    assert [value > 0 for value in inherited] == [number > block for number in ALL]
    assert scores(result, "error") == pytest.approx([a + b for a, b in zip(own, inherited, strict=True)])


@torch.no_grad()
def test_a_block_that_adds_nothing_passes_on_what_it_is_given() -> None:
    models = changed("llama", (0, 2)), tiny_model("llama")
    for model in models:
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.get_submodule(f"model.layers.1.{name}").weight.zero_()
    result = measure(*models)
    assert details(result, "growth")[1] == pytest.approx(1)
    assert result.read("own.2") == 0
    assert result.read("inherited.2") == pytest.approx(result.read("error.1"))


@torch.no_grad()
def test_a_token_counts_no_more_for_being_long() -> None:
    """The first token's state is made a thousand times as long, as decoders learn to: others' errors are still seen."""
    reference, model = tiny_model("gpt2"), changed("gpt2")
    plain = measure(model, reference, length=LENGTH)
    for each in (reference, model):
        each.transformer.wpe.weight[0] *= 1000
    long = measure(model, reference, length=LENGTH)
    assert long.read("own.1") > 0.5 * plain.read("own.1")


def test_windows_are_averaged_and_their_spread_is_the_error() -> None:
    model, reference = changed("llama"), tiny_model("llama")
    result = measure(model, reference)
    alone = [measure(model, reference, STREAM[start : start + LENGTH]) for start in range(0, 4 * LENGTH, LENGTH)]
    assert (result.n, result.settings["windows"], alone[0].stderr) == (4, 4, None)
    assert result.examples == pytest.approx([each.value for each in alone], rel=1e-4)
    for name, score in result.scores.items():
        values = torch.tensor([each.read(name) for each in alone], dtype=torch.float64)
        assert score.value == pytest.approx(float(values.mean()), rel=1e-4, abs=1e-12)
        assert score.stderr == pytest.approx(float(values.std()) / math.sqrt(4), rel=1e-2, abs=1e-9)
    assert measure(model, reference, limit=2).examples == pytest.approx(result.examples[:2], rel=1e-4)


@pytest.mark.parametrize("model_type", ["gemma3_text", "bert", "bloom"])
def test_batches_change_nothing(model_type: str) -> None:
    model, reference = changed(model_type), tiny_model(model_type)
    one, three = (measure(model, reference, batch_size=size) for size in (1, 3))
    for name in one.scores:
        assert three.read(name) == pytest.approx(one.read(name), rel=1e-4, abs=1e-9)
    for name in ("overlap", "growth"):
        for first, second in zip(details(one, name), details(three, name), strict=True):
            assert second == (None if first is None else pytest.approx(first, rel=1e-3, abs=1e-6))


def test_a_compressed_model_by_name(tmp_path: Any) -> None:
    text, tokens = tmp_path / "notes.txt", tiny_tokens(6, 16)
    text.write_text(" ".join(f"w{number % 80}" for number in range(70)))
    model, reference, method = tiny_model("llama"), tiny_model("llama"), eckart.build_method("asvd-i")
    eckart.compress(model, method, eckart.plan(model, 0.5), eckart.calibrate(model, tokens, method))
    name, blocks = f"accumulation:{text}", block_names(reference)
    (result,) = evaluate(model, tiny_tokenizer(), [name], reference=reference, blocks=blocks, context=16)
    assert (result.metric, result.better) == ("relative error", "lower")
    assert result.traits == find_task(name).traits
    assert (result.n, result.settings["length"], result.settings["corpus"]) == (4, 16, "notes.txt")
    assert 0 < result.read("own.-1") < 1
    assert result.read("inherited.1") == 0 < result.read("inherited.2")
    assert EvalResult.from_json(result.to_json()) == result
    with pytest.raises(ValueError, match=r"needs the dense model to compare with \(--reference\)$"):
        evaluate(model, tiny_tokenizer(), [name])
    with pytest.raises(ValueError, match="needs the names of its blocks"):
        evaluate(model, tiny_tokenizer(), [name], reference=reference)


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    reference, model = tiny_model("llama"), changed("llama")
    blocks = block_names(reference)
    with pytest.raises(ValueError, match="past the model's"):
        measure(model, reference, tiny_tokens(1, 200).ids[0], length=POSITIONS + 1)
    with pytest.raises(ValueError, match="in training mode"):
        measure(model, tiny_model("llama").train())
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no block 'model\.layers\.2'"):
        measure(tiny_model("llama", num_hidden_layers=2), reference)
    with pytest.raises(ValueError, match="of width 32 in the dense model and of width 16 in the compressed one"):
        measure(tiny_model("llama", hidden_size=16, head_dim=8), reference)
    for wrong in (blocks[::-1], (*blocks, "lm_head"), (blocks[0], "model.layers")):
        with pytest.raises(ValueError, match=r"does not run its \d blocks once each in order"):
            accumulation(model, reference, wrong, STREAM, length=LENGTH)
    with pytest.raises(ValueError, match="needs the names of the model's blocks"):
        accumulation(model, reference, (), STREAM, length=LENGTH)

    counting = model.model.layers[0].forward
    calls = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return counting(*args, **kwargs) * len(calls)

    with monkeypatch.context() as patch:
        patch.setattr(model.model.layers[0], "forward", forward)
        with pytest.raises(ValueError, match=r"model\.layers\.0 gives something else when it is called again"):
            measure(model, reference)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"accumulation: a state after model\.layers\.1 is not finite"):
        measure(model, reference)
    assert not any(module._forward_hooks for each in (model, reference) for module in each.modules())
