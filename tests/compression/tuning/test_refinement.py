"""Refinement: a block comes nearer to the dense one on samples that no step has seen, or stays what it was."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.allocation import RankPlan, plan
from eckart.calibration.sequential import SequentialCalibration
from eckart.calibration.streams import Sample
from eckart.compression.replace import compress
from eckart.compression.tuning.descent import descend, low_rank_parameters
from eckart.compression.tuning.refinement import Refinement
from eckart.lowrank import Layout, build_method
from eckart.models.linear import LowRankLinear
from eckart.models.sites import blocks_of, find_sites, low_rank_modules
from eckart.models.units import units_of
from eckart.support.precision import in_float32
from eckart.support.progress import silent
from tiny import BLOCKS, logits_of, tiny_model, tiny_tokens
from walks import Collect

SVD = build_method("svd")
HALF = (torch.bfloat16, torch.float16)
# A rate at which a dozen steps on random models show, and one that ruins every block.
BRISK, ABSURD = Refinement(12, 1e-2), Refinement(12, 0.9)


@dataclass
class Scene:
    """A compressed model, and the arguments of a pass for each of its blocks."""

    model: PreTrainedModel
    calls: list[tuple[int, nn.Module, list[Sample], list[Sample]]]


def scene(
    model_type: str = "gpt2",
    *,
    layout: Layout = "plain",
    joint: bool = False,
    include: Sequence[str] = (),
    keep: float | None = 0.5,
    dtype: torch.dtype = torch.float32,
) -> Scene:
    """A tiny model compressed by plain SVD; without `keep` to one rank less than full."""
    model = tiny_model(model_type, dtype=dtype)
    readers = Counter(site.input_group for site in find_sites(model))
    groups = [group for group, count in readers.items() if count > 1] if joint else []
    tokens, held_out = tiny_tokens(16, 12, padded=True), tiny_tokens(6, 12, padded=True, seed=1)
    collect = Collect()
    calibration = SequentialCalibration(model, tokens, SVD, order="sequential", held_out=held_out, passes=[collect])
    if keep is None:
        units = units_of(find_sites(model), groups)
        ranks = {site.name: min(unit.d_in, unit.d_out) - 1 for unit in units for site in unit.sites}
        made_plan = RankPlan(find_sites(model), ranks, layout=layout, joint=frozenset(groups))
    else:
        made_plan = plan(model, keep, layout=layout, joint=groups, include=include)
    compress(model, SVD, made_plan, calibration)
    return Scene(model, collect.calls)


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    every = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in every}


def changed(module: nn.Module, before: dict[str, Tensor]) -> set[str]:
    """Names of the tensors that are not bit for bit what they were."""
    now = tensors_of(module)
    assert now.keys() == before.keys()
    assert all(now[name].dtype == before[name].dtype for name in now)
    return {name for name in now if not torch.equal(now[name], before[name])}


@torch.no_grad()
def loss_of(block: nn.Module, samples: Sequence[Sample]) -> float:
    """What a refinement lowers, written down once more, without the padding."""
    losses = []
    for sample in samples:
        output, target, hidden = (
            rows[sample.mask].double() for rows in (sample.run(block), sample.target, sample.hidden)
        )
        losses.append(float((output - target).square().sum() / (target - hidden).square().sum()))
    return sum(losses) / len(losses)


# Kept or undone


@pytest.mark.parametrize("model_type", ["gpt2", "bert", "gemma2", "phi3", "gpt_neox"])
def test_a_refinement_that_is_kept_lowers_the_loss_on_held_out_samples(model_type: str) -> None:
    case = scene(model_type)
    assert len(case.calls) == BLOCKS
    for number, block, samples, held_out in case.calls:
        before = loss_of(block, samples), loss_of(block, held_out)
        report = BRISK(number, block, samples, held_out)
        assert report is not None
        assert report.kept
        assert (report.name, report.place) == ("refine", f"block {number}")
        assert (report.before, report.after) == pytest.approx((before[1], loss_of(block, held_out)), rel=1e-4)
        assert report.after < report.before
        assert loss_of(block, samples) < before[0]


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("layout", ["plain", "pivoted"])
def test_a_refinement_that_ruins_is_undone_bit_for_bit(layout: Layout, dtype: torch.dtype) -> None:
    case = scene("llama", layout=layout, joint=True, keep=None, dtype=dtype)
    before, logits = tensors_of(case.model), logits_of(case.model)
    for call in case.calls:
        report = ABSURD(*call)
        assert report is not None
        assert not report.kept
        assert not report.after < report.before
    assert changed(case.model, before) == set()
    assert torch.equal(logits_of(case.model), logits)


@pytest.mark.parametrize("size", [1.0, float("inf")])
def test_steps_towards_noise_are_undone(size: float) -> None:
    case = scene()
    before, generator = tensors_of(case.model), torch.Generator().manual_seed(0)
    for number, block, samples, held_out in case.calls:
        noise = [replace(s, target=size * torch.randn(s.target.shape, generator=generator)) for s in samples]
        report = Refinement(24, 3e-2)(number, block, noise, held_out)
        assert report is not None
        assert not report.kept
    assert changed(case.model, before) == set()


def test_a_block_without_low_rank_linears_is_left_alone() -> None:
    case = scene("llama", include=["model.layers.1.*"])
    number, _, samples, held_out = case.calls[0]
    before = tensors_of(case.model)
    assert BRISK(number, blocks_of(case.model)[0], samples, held_out) is None
    assert changed(case.model, before) == set()


def test_a_block_that_is_broken_names_its_place() -> None:
    case = scene()
    number, block, samples, held_out = case.calls[1]
    low = next(iter(low_rank_modules(block).values()))
    low.right.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^block 1: its output is not finite"):
        BRISK(number, block, samples, held_out)


@pytest.mark.parametrize(("steps", "rate"), [(0, 0.1), (4, 0.0), (4, 1.0), (4, -0.1), (4, float("nan"))])
def test_settings_that_mean_nothing(steps: int, rate: float) -> None:
    with pytest.raises(ValueError, match=r"refinement: -?\d+ steps at rate"):
        Refinement(steps, rate)


# What moves


@pytest.mark.parametrize("model_type", ["opt", "llama"])
def test_only_factors_and_their_biases_move(model_type: str) -> None:
    case = scene(model_type, include=["mlp"])
    model = case.model
    dense = next(parameter for name, parameter in model.named_parameters() if name.endswith("k_proj.weight"))
    dense.requires_grad_(False)
    # What somebody computed before is theirs.
    gradients = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.grad = gradients[name] if parameter.requires_grad else None
    before = tensors_of(model)
    required = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    refine = Refinement(12, 1e-3)
    kept = {(report := refine(*call)).kept and report.place for call in case.calls}
    low = low_rank_modules(model)
    names = {f"{name}.{inner}" for name, module in low.items() for inner, _ in module.named_parameters()}
    moved = changed(model, before)
    assert moved == {name for name in names if f"block {name.split('layers.')[1].split('.')[0]}" in kept}
    assert len(moved) >= len(names) / BLOCKS
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == required
    for name, parameter in model.named_parameters():
        assert parameter.grad is (gradients[name] if required[name] else None)
        assert name not in gradients or torch.equal(gradients[name], torch.ones_like(parameter))
    assert not model.training
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("layout", ["plain", "pivoted"])
@pytest.mark.parametrize("model_type", ["bert", "gemma2"])
def test_every_layout_is_refined_and_stays_what_it_is(model_type: str, layout: Layout, joint: bool) -> None:
    case = scene(model_type, layout=layout, joint=joint)
    model, before = case.model, tensors_of(case.model)
    lenders = {name: module.lender for name, module in low_rank_modules(model).items()}
    for call in case.calls:
        report = BRISK(*call)
        assert report is not None
        assert report.kept
    moved = changed(model, before)
    assert not [name for name in moved if name.endswith("order")]
    assert [name for name in moved if name.endswith("right.weight")]
    assert {name: module.lender for name, module in low_rank_modules(model).items()} == lenders
    assert joint == any(lender is not None for lender in lenders.values())
    for name, module in low_rank_modules(model).items():
        if module.lender is not None:
            assert module.right is module.lender.right, name
            assert "right.weight" not in dict(module.named_parameters())
    assert torch.isfinite(logits_of(model)).all()


def test_a_shared_factor_is_one_parameter() -> None:
    case = scene("llama", joint=True)
    parameters = low_rank_parameters(blocks_of(case.model)[0])
    # q, k, v share; gate and up share; o and down have their own: four right factors and seven left ones.
    assert len(parameters) == len({id(parameter) for parameter in parameters}) == 4 + 7
    assert sum(parameter.numel() for parameter in parameters) == sum(
        parameter.numel()
        for module in low_rank_modules(blocks_of(case.model)[0]).values()
        for parameter in module.parameters()
    )


def test_a_member_all_of_whose_rows_are_pivots() -> None:
    # Its left factor is empty: there is nothing to move, and nothing that is not a number.
    model = tiny_model("llama")
    groups = [site.input_group for site in find_sites(model) if site.role == "self_attn.q_proj"]
    collect = Collect()
    calibration = SequentialCalibration(
        model, tiny_tokens(16, 12), SVD, order="sequential", held_out=tiny_tokens(4, 12, seed=1), passes=[collect]
    )
    with torch.no_grad():
        for block in blocks_of(model):
            block.self_attn.k_proj.weight.mul_(100)  # the largest rows are pivots
    compress(model, SVD, plan(model, 0.75, layout="pivoted", joint=groups), calibration)
    empty = [module for module in low_rank_modules(model).values() if not len(module.left.weight)]
    assert empty
    before = tensors_of(model)
    for call in collect.calls:
        report = BRISK(*call)
        assert report is not None
    assert all(bool(torch.isfinite(parameter).all()) for parameter in model.parameters())
    assert changed(model, before)


# Types


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("layout", ["plain", "pivoted"])
def test_half_precision_stays_half(layout: Layout, dtype: torch.dtype) -> None:
    case = scene("gpt_neox", layout=layout, dtype=dtype)
    model = case.model
    norms = {name: p for name, p in model.named_parameters() if "layernorm" in name}
    table = nn.Parameter(torch.tensor([1 / 3]))
    blocks_of(model)[1].register_buffer("table", table.detach())
    before = tensors_of(model)
    kept = []
    for call in case.calls:
        # 8 bits of mantissa: only steps that are longer than half of the last one stay.
        report = Refinement(24, 2e-2)(*call)
        assert report is not None
        kept.append(report.kept)
        assert report.after == pytest.approx(loss_of(call[1], call[3]), rel=1e-2) or not report.kept
    assert any(kept)
    moved = changed(model, before)
    assert moved
    assert not moved & norms.keys()
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert blocks_of(model)[1].table.dtype == torch.float32
    assert torch.isfinite(logits_of(model)).all()


def test_norms_that_are_kept_in_float32_stay_so() -> None:
    case = scene("llama", dtype=torch.bfloat16)
    number, block, samples, held_out = case.calls[0]
    # As some models do: the norm works in float32 and gives what comes after it its own type.
    block.input_layernorm.weight.data = block.input_layernorm.weight.data.float() + 1 / 3
    block.input_layernorm.register_forward_hook(lambda module, _args, output: output.to(block.mlp.up_proj.weight.dtype))
    before = tensors_of(block)
    report = Refinement(24, 2e-2)(number, block, samples, held_out)
    assert report is not None
    assert "input_layernorm.weight" not in changed(block, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALF])
def test_in_float32_and_back(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    before, logits = tensors_of(model), logits_of(model)
    parameters = list(model.parameters())
    with in_float32(model) as inside:
        assert inside == (torch.float32 if dtype in HALF else dtype)
        assert {parameter.dtype for parameter in model.parameters()} == {inside}
        assert all(mine is theirs for mine, theirs in zip(model.parameters(), parameters, strict=True))
    assert changed(model, before) == set()
    assert torch.equal(logits_of(model), logits)
    with pytest.raises(KeyboardInterrupt), in_float32(model):
        raise KeyboardInterrupt
    assert changed(model, before) == set()


# How


def test_the_same_samples_give_the_same_steps() -> None:
    results = []
    for _ in range(2):
        case = scene("opt")
        reports = [BRISK(*call) for call in case.calls]
        results.append((reports, tensors_of(case.model)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(value, results[1][1][name]) for name, value in results[0][1].items())


def test_padding_is_in_no_loss() -> None:
    first = scene()
    second = copy.deepcopy(first)
    for (number, block, samples, held_out), (_, other, *_) in zip(first.calls, second.calls, strict=True):
        spoilt = [
            [replace(s, target=torch.where(s.mask[..., None], s.target, torch.tensor(1e3))) for s in part]
            for part in (samples, held_out)
        ]
        assert BRISK(number, block, samples, held_out) == BRISK(number, other, *spoilt)


def test_gradients_are_asked_for_where_there_are_none() -> None:
    case = scene()
    with torch.no_grad():
        report = BRISK(*case.calls[0])
        assert not torch.is_grad_enabled()
    assert report is not None
    assert report.kept


def test_a_step_is_relative_to_the_tensor_it_is_in() -> None:
    # Left a thousand times as long and right a thousandth: the map is the same, and so is the way it goes.
    case = scene()
    number, block, samples, held_out = case.calls[0]
    other = copy.deepcopy(block)
    for module in low_rank_modules(other).values():
        module.left.weight.data.mul_(1024)
        module.right.weight.data.div_(1024)
    reports = [BRISK(number, each, samples, held_out) for each in (block, other)]
    assert reports[0] is not None
    assert reports[1] is not None
    assert reports[0].before == pytest.approx(reports[1].before, rel=1e-5)
    assert reports[0].after == pytest.approx(reports[1].after, rel=1e-3)


def test_the_rate_rises_then_falls_to_nothing() -> None:
    module = LowRankLinear(4, 4, 2, bias=False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.ones_like(parameter))
    places: list[float] = []

    def loss(step: int) -> Tensor:
        places.append(module.left.weight[0, 0].item())
        return module.left.weight.sum() + module.right.weight.sum()

    descend(module, list(module.parameters()), loss, steps=40, rate=0.01, what="", track=silent)
    # A constant gradient: Adam's step is the rate itself.
    lengths = [a - b for a, b in zip(places, [*places[1:], module.left.weight[0, 0].item()], strict=True)]
    assert max(lengths) <= 0.0101
    assert lengths[0] < 0.2 * max(lengths)
    assert lengths[-1] < 0.01 * max(lengths)
    assert lengths.index(max(lengths)) == 7
