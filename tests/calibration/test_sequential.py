"""Sequential: each group's moments are those of plain hooks on the model as it is when the group's turn comes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import eckart.calibration.sequential
from eckart.allocation import RankPlan, plan
from eckart.calibration.calls import Call
from eckart.calibration.gradients import collect_gradients
from eckart.calibration.moments import BlockCalibration, calibrate, calibrate_by_block
from eckart.calibration.pausing import Run
from eckart.calibration.sequential import Order, SequentialCalibration
from eckart.calibration.streams import Sample, _Runs
from eckart.compression.replace import compress
from eckart.data.tokens import Tokens
from eckart.lowrank import InputMoments, Moments, build_method, output_error
from eckart.models.sites import Site, blocks_of, find_sites, low_rank_modules, read_weight
from tiny import BLOCKS, logits_of, relative, tiny_model, tiny_tokens
from walks import (
    ANCHORED,
    METHOD_OF,
    PLAIN,
    Collect,
    Nudge,
    assert_walks_as_hooks_see_it,
    hidden_states,
    members_of,
    same,
    tensors_of,
    tokens_of,
    walk,
)

# Grouped queries, Conv1D, an encoder, biases, sliding windows, fused projections, parallel halves, no row of its own.
MODELS = ("llama", "gpt2", "bert", "opt", "gemma2", "phi3", "gpt_neox", "modernbert")


@torch.no_grad()
def execution_order(model: PreTrainedModel, sites: Iterable[Site]) -> list[str]:
    """The input groups in the order in which a forward pass of the whole model reads them."""
    seen: list[str] = []
    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda _module, _args, group=site.input_group: seen.append(group)
        )
        for site in sites
    ]
    logits_of(model)
    for handle in handles:
        handle.remove()
    return list(dict.fromkeys(seen))


# The law


@pytest.mark.parametrize("model_type", MODELS)
def test_anchored_moments_are_those_of_hooks_on_both_models(model_type: str) -> None:
    model = tiny_model(model_type)
    sites = find_sites(model)
    expected = execution_order(model, sites)
    assert assert_walks_as_hooks_see_it(model, sites, "anchored") == expected
    assert low_rank_modules(model).keys() == {site.name for site in sites}


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_sequential_moments_are_those_of_hooks_on_the_compressed_model(model_type: str) -> None:
    model = tiny_model(model_type)
    sites = find_sites(model)
    expected = execution_order(model, sites)
    assert assert_walks_as_hooks_see_it(model, sites, "sequential") == expected


@pytest.mark.parametrize("blocks", [{0}, {2}, {0, 2}, {1}])
@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_blocks_without_sites_are_walked_through(model_type: str, blocks: set[int]) -> None:
    model = tiny_model(model_type)
    sites = [site for site in find_sites(model) if site.block in blocks]
    assert assert_walks_as_hooks_see_it(model, sites, "anchored") == execution_order(model, sites)


def test_some_sites_of_a_group_have_its_moments() -> None:
    model = tiny_model("llama")
    sites = [site for site in find_sites(model) if site.role in {"self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"}]
    came = assert_walks_as_hooks_see_it(model, sites, "anchored")
    assert came[:3] == [f"model.layers.0.{role}" for role in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")]


@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_later_blocks_see_what_a_pass_did(model_type: str) -> None:
    model = tiny_model(model_type)
    assert_walks_as_hooks_see_it(model, find_sites(model), "anchored", passes=[Nudge()])


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_later_sites_see_shared_right_factors(model_type: str) -> None:
    model = tiny_model(model_type)
    assert_walks_as_hooks_see_it(model, find_sites(model), "anchored", joint=True)
    assert any(module.lender is not None for module in low_rank_modules(model).values())


@pytest.mark.parametrize("model_type", MODELS)
def test_one_shot_is_calibrate_by_block(model_type: str) -> None:
    model, (tokens, held_out) = tiny_model(model_type), tokens_of()
    expected = [tensors_of(calibrate_by_block(model, text, PLAIN, batch_size=2)) for text in (tokens, held_out)]
    parts = walk(model, SequentialCalibration(model, tokens, PLAIN, order="one-shot", held_out=held_out, batch_size=2))
    assert [part.block for part in parts] == list(range(BLOCKS))
    assert same(tensors_of(parts), expected[0])
    assert same(tensors_of(parts, held_out=True), expected[1])


@pytest.mark.parametrize("order", ["sequential", "anchored"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "gemma2"])
def test_where_nothing_is_lost_every_order_is_one_shot(model_type: str, order: Order) -> None:
    model, (tokens, _) = tiny_model(model_type), tokens_of()
    before, sites = logits_of(model), find_sites(model)
    expected = calibrate(model, tokens, PLAIN)
    parts: list[BlockCalibration] = []

    def noted(calibration: Iterable[BlockCalibration]) -> Iterator[BlockCalibration]:
        for part in calibration:
            parts.append(part)
            yield part

    full = RankPlan(sites, {site.name: min(site.d_in, site.d_out) for site in sites})
    method = METHOD_OF[order]
    compress(model, method, full, noted(SequentialCalibration(model, tokens, method, order=order)))
    assert len(low_rank_modules(model)) == len(sites)
    assert relative(logits_of(model), before) < 1e-4
    for part in parts:
        for group, moments in part.inputs.items():
            dense = expected.blocks[part.block].inputs[group].second_moment
            assert relative(moments.second_moment, dense) < 1e-4
            if order == "anchored":
                assert relative(moments.cross_moment, dense) < 1e-4
                assert relative(moments.reference_second_moment, dense) < 1e-5


# Held-out samples, padding, batches


@pytest.mark.parametrize("order", ["one-shot", "sequential", "anchored"])
def test_held_out_samples_are_in_no_statistic(order: Order) -> None:
    calibrations = {}
    held_out_sets = {"none": None, "some": tiny_tokens(2, 9, seed=7), "others": tiny_tokens(5, 16, padded=True, seed=8)}
    for name, held_out in held_out_sets.items():
        model = tiny_model("llama")
        calibration = SequentialCalibration(
            model, tokens_of()[0], METHOD_OF[order], order=order, held_out=held_out, batch_size=2
        )
        calibrations[name] = walk(model, calibration)
    assert same(tensors_of(calibrations["none"]), tensors_of(calibrations["some"]))
    assert same(tensors_of(calibrations["none"]), tensors_of(calibrations["others"]))
    assert all(part.held_out == {} for part in calibrations["none"])
    for name in ("some", "others"):
        counts = {moments.count for part in calibrations[name] for moments in part.held_out.values()}
        assert counts == {held_out_sets[name].count}  # type: ignore[union-attr]
        assert all(part.held_out.keys() == part.inputs.keys() for part in calibrations[name])


def test_padding_is_in_no_statistic() -> None:
    tokens, held_out = tokens_of()
    ids = torch.where(tokens.mask, tokens.ids, torch.tensor(9))
    calibrations = []
    for text in (tokens, Tokens(ids, tokens.mask)):
        model = tiny_model("gemma2")
        calibrations.append(walk(model, SequentialCalibration(model, text, ANCHORED, held_out=held_out)))
    assert same(tensors_of(calibrations[0]), tensors_of(calibrations[1]))
    assert {moments.count for part in calibrations[0] for moments in part.inputs.values()} == {tokens.count}


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_batch_size_changes_nothing(model_type: str) -> None:
    calibrations = []
    for size in (1, 2, 100):
        model = tiny_model(model_type)
        texts = tiny_tokens(5, 12, padded=True), tiny_tokens(3, 9, seed=1)
        parts = walk(model, SequentialCalibration(model, texts[0], ANCHORED, held_out=texts[1], batch_size=size))
        calibrations.append(
            {**tensors_of(parts), **{f"held out {k}": v for k, v in tensors_of(parts, held_out=True).items()}}
        )
    for other in calibrations[1:]:
        assert other.keys() == calibrations[0].keys()
        assert max(relative(other[name], calibrations[0][name]) for name in other) < 1e-5


def test_dense_moments_that_are_known_are_not_summed_again() -> None:
    tokens, held_out = tiny_tokens(4, 12), tiny_tokens(2, 9, seed=1)
    dense = calibrate(tiny_model("llama"), tokens, PLAIN)
    calibrations, asked = [], []

    def known(number: int) -> dict[str, InputMoments]:
        asked.append(number)
        return dense.blocks[number].inputs

    for given in (None, known):
        model = tiny_model("llama")
        calibration = SequentialCalibration(model, tokens, ANCHORED, held_out=held_out, known=given)
        calibrations.append(tensors_of(walk(model, calibration)))
    assert asked == list(range(BLOCKS))
    assert calibrations[0].keys() == calibrations[1].keys()
    for name, tensor in calibrations[0].items():
        torch.testing.assert_close(calibrations[1][name], tensor, rtol=1e-5, atol=1e-6)
    other = calibrate(tiny_model("llama"), tiny_tokens(3, 12), PLAIN)
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="48 tokens were seen, and the reference's are of 36"):
        walk(model, SequentialCalibration(model, tokens, ANCHORED, known=lambda number: other.blocks[number].inputs))


@pytest.mark.parametrize("order", ["sequential", "anchored"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_batches_that_may_not_wait_start_again(model_type: str, order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    open_run = _Runs._open

    def count(runs: _Runs, name: str, index: int) -> Run:
        opened.append(name)
        return open_run(runs, name, index)

    monkeypatch.setattr(_Runs, "_open", count)
    calibrations, started = [], []
    for room in (2**30, 40_000, 0):  # all batches wait, some, none
        monkeypatch.setattr("eckart.calibration.streams.WAITING_BYTES", room)
        model, (tokens, held_out) = tiny_model(model_type), tokens_of()
        calibration = SequentialCalibration(
            model, tokens, METHOD_OF[order], order=order, held_out=held_out, batch_size=1
        )
        calibrations.append(walk(model, calibration))
        started.append(len(opened))
        opened.clear()
    assert started[0] < started[1] < started[2]
    for other in calibrations[1:]:
        for held in (False, True):
            assert same(tensors_of(calibrations[0], held_out=held), tensors_of(other, held_out=held))


# Gradients, and methods that need no inputs


def test_gradients_are_the_dense_models() -> None:
    method = build_method("kfac").anchored(0.1)
    model, (tokens, held_out) = tiny_model("llama"), tokens_of()
    sites = find_sites(model)
    expected = collect_gradients(model, tokens, sites, frozenset({"gradient_covariance"}))
    call: dict[str, Any] = {}
    for part in walk(model, SequentialCalibration(model, tokens, method, held_out=held_out)):
        assert part.gradients.keys() == {site.name for site in members_of(part, sites)}
        call |= part.gradients
    assert call.keys() == expected.keys()
    for name, moments in call.items():
        assert torch.equal(moments.gradient_covariance, expected[name].gradient_covariance)


def test_gradients_that_are_there_are_not_gathered_again(monkeypatch: pytest.MonkeyPatch) -> None:
    method = build_method("kfac").anchored(0.1)
    model, (tokens, _) = tiny_model("llama"), tokens_of()
    call = collect_gradients(model, tokens, find_sites(model), frozenset({"gradient_covariance"}))
    monkeypatch.setattr(eckart.calibration.sequential, "gather_gradients", None)
    parts = walk(model, SequentialCalibration(model, tokens, method, gradients=call))
    assert all(part.gradients[name] is call[name] for part in parts for name in part.gradients)


@pytest.mark.parametrize("order", ["one-shot", "sequential"])
@pytest.mark.parametrize("name", ["svd", "fwsvd"])
def test_a_method_that_reads_no_inputs_gets_a_part_a_block(name: str, order: Order) -> None:
    model, (tokens, _) = tiny_model("llama"), tokens_of()
    parts = list(SequentialCalibration(model, tokens, build_method(name), order=order))
    assert [(part.block, part.inputs, part.held_out) for part in parts] == [
        (number, {}, {}) for number in range(BLOCKS)
    ]
    assert all(len(part.gradients) == (7 if name == "fwsvd" else 0) for part in parts)


# Passes


@pytest.mark.parametrize("order", ["one-shot", "anchored"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "gemma2"])
def test_a_pass_is_given_both_streams(model_type: str, order: Order) -> None:
    model, texts, collect = tiny_model(model_type), tokens_of(), Collect()
    dense = copy.deepcopy(model)
    calibration = SequentialCalibration(
        model, texts[0], METHOD_OF[order], order=order, held_out=texts[1], passes=[collect], batch_size=1
    )
    walk(model, calibration)
    assert [number for number, *_ in collect.calls] == list(range(BLOCKS))
    assert [report.place for report in calibration.reports] == ["block 0", "block 2"]
    for part, text in ((2, texts[0]), (3, texts[1])):
        compressed, target = hidden_states(model, text), hidden_states(dense, text)
        for call in collect.calls:
            number, block, samples = call[0], call[1], call[part]
            assert block is blocks_of(model)[number]
            assert len(samples) == len(text)
            for row, sample in enumerate(samples):
                real = sample.mask[0]
                assert torch.equal(sample.mask, text.mask[row : row + 1])
                with torch.no_grad():
                    output = sample.run(block)[0, real]
                torch.testing.assert_close(output, compressed[row][number], rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(sample.target[0, real], target[row][number], rtol=1e-4, atol=1e-4)
                if number:
                    torch.testing.assert_close(
                        sample.hidden[0, real], compressed[row][number - 1], rtol=1e-4, atol=1e-4
                    )


def test_a_sample_is_cast_whole() -> None:
    hidden, mask = torch.zeros(1, 2, 3, dtype=torch.bfloat16), torch.ones(1, 2, dtype=torch.bool)
    table = torch.ones(2, dtype=torch.bfloat16)
    sample = Sample(hidden, Call(((table, [mask, 3]),), {"positions": {"a": table}, "flag": None}), mask, hidden)
    cast = sample.cast(torch.float32)
    args, kwargs = cast.call.args, cast.call.kwargs
    assert cast.hidden.dtype == args[0][0].dtype == kwargs["positions"]["a"].dtype == torch.float32
    assert args[0][1][0] is mask
    assert (args[0][1][1], kwargs["flag"], cast.target) == (3, None, hidden)
    assert sample.cast(torch.bfloat16) is sample


# What anchoring is for


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_an_anchored_cut_loses_less_than_any_other_of_the_same_inputs(model_type: str) -> None:
    # Eckart-Young for xh and W x: no map of rank r, and so no cut of W in the metric of xh, comes nearer to W x.
    # The weights are disturbed and not cut: a cut v_proj would leave o_proj a singular moment, and no exact solution.
    exact = PLAIN.anchored(0.0)
    model, tokens = tiny_model(model_type), tiny_tokens(24, 16)
    sites, generator = find_sites(model), torch.Generator().manual_seed(0)
    gains = []
    for part in SequentialCalibration(model, tokens, exact):
        for site in members_of(part, sites):
            moments = Moments(part.inputs[site.input_group])
            weight, rank = read_weight(model.get_submodule(site.name)), min(site.d_in, site.d_out) // 2
            spectrum = exact.factor(weight, moments)
            own, energy = output_error(weight, spectrum.cut(rank), moments)
            other, _ = output_error(weight, PLAIN.factor(weight, moments).cut(rank), moments)
            assert spectrum.tail(rank) == pytest.approx(own, rel=1e-3, abs=1e-5 * energy)
            assert spectrum.tail(rank) <= other + 1e-5 * energy
            gains.append(1 - spectrum.tail(rank) / other)
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    assert abs(gains[0]) < 1e-3  # nothing was disturbed before the first, and both are the same
    assert sorted(gains)[len(gains) // 2] > 0.05


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_anchoring_brings_the_logits_nearer(model_type: str) -> None:
    tokens = tiny_tokens(24, 16)
    dense = logits_of(tiny_model(model_type), tokens)
    lost = {}
    for order in ("one-shot", "anchored"):
        model = tiny_model(model_type)
        method = PLAIN if order == "one-shot" else PLAIN.anchored(1e-3)
        compress(model, method, plan(model, 0.5), SequentialCalibration(model, tokens, method, order=order))
        lost[order] = float((logits_of(model, tokens) - dense).square().mean())
    assert lost["anchored"] < 0.75 * lost["one-shot"]
