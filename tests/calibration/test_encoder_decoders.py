"""Encoder-decoders: calibration goes through both stacks, and cross-attention reads what the encoder gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from eckart.allocation import plan
from eckart.calibration.calls import record, shared
from eckart.calibration.gradients import collect_gradients, language_loss
from eckart.calibration.moments import calibrate
from eckart.calibration.sequential import Order, SequentialCalibration
from eckart.compression.replace import compress
from eckart.compression.tuning.refinement import Refinement
from eckart.lowrank import build_method
from eckart.lowrank.moments import FISHER, GRADIENT_STATISTICS
from eckart.models.sites import blocks_of, find_sites, stacks_of
from tiny import (
    ENCODER_DECODER_CONFIGS,
    PAD,
    given_of,
    logits_of,
    relative,
    site_inputs,
    tiny_model,
    tiny_pairs,
    tiny_sound,
    tiny_tokens,
    unpadded,
)
from walks import METHOD_OF, Collect, assert_walks_as_hooks_see_it, pairs_of, traces, walk

PLAIN = build_method("asvd-i")


@pytest.mark.parametrize("model_type", ENCODER_DECODER_CONFIGS)
@torch.no_grad()
def test_blocks_one_at_a_time_are_the_whole_model(model_type: str) -> None:
    model, pairs = tiny_model(model_type), tiny_pairs(3, padded=True)
    blocks, last = blocks_of(model), []
    blocks[-1].register_forward_hook(lambda _module, _args, output: last.append(output))
    model(**given_of(model, pairs))
    (output,) = last
    (rows,) = pairs.rows(3)
    recording = record(model, rows)
    hidden = recording.hidden
    assert len(recording.calls) == len(blocks)
    for number, call in enumerate(recording.calls):
        hidden = call.run(blocks[number], hidden)
    expected = output[0] if isinstance(output, tuple) else output
    real = rows.mask_of(source=False)
    torch.testing.assert_close(hidden[:, pairs.split :][real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("model_type", ENCODER_DECODER_CONFIGS)
def test_moments_are_of_what_each_linear_reads(model_type: str) -> None:
    model, pairs = tiny_model(model_type), tiny_pairs(5, 10, 7, padded=True)
    sites = find_sites(model)
    inputs = site_inputs(model, pairs, sites)
    blocks = {block.block: block for block in calibrate(model, pairs, PLAIN, batch_size=2)}
    source, target = (int(side.sum()) for side in pairs.mask.tensor_split([pairs.split], 1))
    for site in sites:
        moments, x = blocks[site.block].inputs[site.input_group], inputs[site.name].double()
        assert moments.count == len(x) == (source if site.of_source else target)
        assert relative(moments.second_moment, x.T @ x / len(x)) < 5e-6
        assert moments.share == moments.use == pytest.approx(len(x) / target)
    assert traces(model) == []


def test_the_sites_that_read_the_source() -> None:
    for model_type, cross in (("t5", "EncDecAttention"), ("bart", "encoder_attn")):
        for site in find_sites(tiny_model(model_type)):
            crossing = cross in site.role and site.role.split(".")[-1] in {"k", "v", "k_proj", "v_proj"}
            assert site.of_source == (".encoder." in f".{site.name}" or crossing)
            assert (site.part == "cross_attention") == (cross in site.role)


@pytest.mark.parametrize("model_type", ["t5", "bart"])
@pytest.mark.parametrize("order", METHOD_OF)
def test_every_order_walks_as_hooks_see_it(model_type: str, order: Order) -> None:
    model = tiny_model(model_type)
    if order == "one-shot":
        calibration = SequentialCalibration(model, pairs_of()[0], PLAIN, order=order, batch_size=2)
        parts, expected = walk(copy.deepcopy(model), calibration), calibrate(model, pairs_of()[0], PLAIN)
        for part, block in zip(parts, expected, strict=True):
            for group, moments in part.inputs.items():
                assert relative(moments.second_moment, block.inputs[group].second_moment) < 1e-6
        return
    assert_walks_as_hooks_see_it(model, find_sites(model), order)
    assert traces(model) == []


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_passes_see_the_blocks_own_tokens(model_type: str) -> None:
    model, (pairs, held_out), collect = tiny_model(model_type), pairs_of(), Collect()
    calibration = SequentialCalibration(
        model, pairs, METHOD_OF["anchored"], held_out=held_out, passes=(collect,), batch_size=2
    )
    encoders = len(stacks_of(model)[0])
    with torch.no_grad():
        for _ in calibration:  # nothing is replaced: the compressed stream is the dense one
            pass
        for number, block, samples, _ in collect.calls:
            for sample, rows in zip(samples, pairs.rows(2), strict=True):
                assert torch.equal(sample.mask, rows.mask_of(source=number < encoders))
                assert sample.own.shape == sample.target.shape == sample.run(block).shape
                torch.testing.assert_close(sample.run(block), sample.target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_refined(dtype: torch.dtype) -> None:
    model, (pairs, held_out) = tiny_model("t5", dtype=dtype), pairs_of()
    calibration = SequentialCalibration(
        model, pairs, METHOD_OF["anchored"], held_out=held_out, passes=(Refinement(steps=3),), batch_size=3
    )
    compress(model, METHOD_OF["anchored"], plan(model, 0.5), calibration)
    assert [report.place for report in calibration.reports] == [f"block {number}" for number in range(5)]
    assert torch.isfinite(logits_of(model)).all()


@pytest.mark.parametrize("model_type", ENCODER_DECODER_CONFIGS)
def test_gradients_are_of_the_targets_loss(model_type: str) -> None:
    model, pairs = tiny_model(model_type), tiny_pairs(3, 9, 6, padded=True)
    sites = find_sites(model)
    gathered = collect_gradients(model, pairs, sites, GRADIENT_STATISTICS)
    squares = {site.name: torch.zeros(site.d_out, site.d_in) for site in sites}
    for row in range(len(pairs)):
        pair = unpadded(pairs.take(slice(row, row + 1)))
        model.zero_grad()
        logits = model(**given_of(model, pair)).logits
        nn.functional.cross_entropy(logits[0], pair.ids[0, pair.split :]).backward()
        for site in sites:
            squares[site.name] += model.get_submodule(site.name).weight.grad.square()
    for site in sites:
        moments, expected = gathered[site.name], squares[site.name] / len(pairs)
        assert relative(moments.fisher_out, expected.sum(1)) < 1e-4
        assert relative(moments.fisher_in, expected.sum(0)) < 1e-4
        assert moments.tokens == int(pairs.rows(3)[0].mask_of(source=site.of_source).sum())


def test_the_loss_to_recover_on_is_the_models_own() -> None:
    model, pairs = tiny_model("bart"), tiny_pairs(3, padded=True)
    loss, count = language_loss(model, pairs.ids, pairs.mask, None, torch.Generator(), pairs.split)
    given = given_of(model, pairs)
    real = pairs.mask[:, pairs.split :]
    labels = pairs.ids[:, pairs.split :].masked_fill(~real, -100)
    assert count == int(real.sum())
    torch.testing.assert_close(loss, model(**given, labels=labels).loss)


def test_what_is_no_pair_and_what_reads_no_text_is_refused() -> None:
    with pytest.raises(ValueError, match=r"T5ForConditionalGeneration is an encoder-decoder.*eckart\.sample_halves"):
        calibrate(tiny_model("t5"), tiny_tokens(), PLAIN)
    with pytest.raises(ValueError, match="LlamaForCausalLM reads one text"):
        calibrate(tiny_model("llama"), tiny_pairs(), PLAIN)
    with pytest.raises(ValueError, match="calibration length: a target of 65 is past the model's 64 positions"):
        calibrate(tiny_model("bart"), tiny_pairs(2, 4, 65), PLAIN)
    with pytest.raises(ValueError, match="WhisperForConditionalGeneration reads input_features and no text"):
        calibrate(tiny_model("whisper"), tiny_pairs(), PLAIN)
    with pytest.raises(ValueError, match="T5Model has no loss"):
        collect_gradients(model := tiny_model("t5", "base"), tiny_pairs(), find_sites(model), FISHER)


def test_a_data_free_method_needs_no_text() -> None:
    model = tiny_model("whisper")
    sound, start = tiny_sound(), torch.full((2, 1), PAD)
    before = model(input_features=sound, decoder_input_ids=start).logits
    compress(model, "svd", plan(model, 0.9, include="cross_attention"))
    after = model(input_features=sound, decoder_input_ids=start).logits
    assert after.shape == before.shape
    assert not torch.equal(after, before)


def test_calls_of_equal_batches_are_held_once() -> None:
    model, pairs = tiny_model("t5"), tiny_pairs(4)
    first, second = (record(model, rows).calls for rows in pairs.rows(2))
    for known, call in zip(first, shared(second, first), strict=True):
        assert all(a is b for a, b in zip(known.args, call.args, strict=True) if isinstance(a, torch.Tensor))
