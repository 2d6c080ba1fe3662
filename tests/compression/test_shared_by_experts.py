"""Experts that share a right factor: laws of the stacked factorisation, and the whole way through every order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eckart.allocation import RankPlan, plan
from eckart.calibration.moments import BlockCalibration, calibrate
from eckart.calibration.sequential import SequentialCalibration
from eckart.compression.cuts import CutRequest, FactorRequest, cut_units, factor_units, tails_of_units, use_of
from eckart.compression.replace import compress
from eckart.compression.shared_by_experts import SharedByExperts
from eckart.lowrank import LAYOUTS, Factors, InputMoments, Layout, Method, Moments, build_method, output_error
from eckart.models.dense import export_dense
from eckart.models.experts import opened_experts
from eckart.models.linear import LowRankLinear
from eckart.models.loading import load_model, save
from eckart.models.sites import find_sites
from eckart.models.units import Unit, units_of
from eckart.runs.ranks import joint_groups
from tiny import MIXTURE_CONFIGS, logits_of, tiny_model, tiny_tokens

ALL = sorted(MIXTURE_CONFIGS)
TOKENS = tiny_tokens(6, 14, padded=True)


def of_experts(model: Any) -> tuple[Unit, ...]:
    """The units of all the model's first linears of experts."""
    sites = [site for site in find_sites(model) if site.joint_group != site.input_group]
    return units_of(sites, {site.joint_group for site in sites})


def factored(method: Method, model: Any, part: BlockCalibration) -> list[tuple[Unit, SharedByExperts]]:
    units = [unit for unit in of_experts(model) if unit.sites[0].block == part.block]
    made = factor_units(FactorRequest(method, units, part, lambda unit: unit.weight(model)))
    return [(unit, result) for unit, result in made if isinstance(result, SharedByExperts)]


def loss_of(
    unit: Unit, model: Any, part: BlockCalibration, method: Method, rank: int, result: SharedByExperts
) -> float:
    """sum_e u_e E_e ||W_e x - L_e R x||^2."""
    total = 0.0
    for site, factors in zip(unit.sites, unit.split(result.cut(rank)), strict=True):
        moments = Moments(part.inputs_of(site.input_group))
        weight: Tensor = model.get_submodule(site.name).weight.detach()
        total += use_of(method, moments) * output_error(weight, factors, moments)[0]
    return total


def unfit_loss_of(
    unit: Unit, model: Any, part: BlockCalibration, method: Method, rank: int, result: SharedByExperts
) -> float:
    """The same of the stack's left factors, each over the root of its expert's use."""
    stacked, total = result.spectrum.cut(rank), 0.0
    lefts = stacked.left.split([site.d_out for site in unit.sites])
    for site, left, root in zip(unit.sites, lefts, result.roots, strict=True):
        moments = Moments(part.inputs_of(site.input_group))
        weight: Tensor = model.get_submodule(site.name).weight.detach()
        factors = Factors(left / root, stacked.right)
        total += use_of(method, moments) * output_error(weight, factors, moments)[0]
    return total


def test_experts_first_linears_are_one_group_and_the_others_are_alone() -> None:
    sites = {site.role: site for site in find_sites(tiny_model("mixtral")) if site.block == 1}
    layer = "model.layers.1.mlp.experts.*.gate_up_proj"
    assert {sites[f"mlp.experts.{number}.gate_up_proj"].joint_group for number in range(4)} == {layer}
    down = sites["mlp.experts.2.down_proj"]
    assert down.joint_group == down.input_group
    assert sites["self_attn.q_proj"].joint_group == sites["self_attn.k_proj"].joint_group
    (unit,) = units_of([site for role, site in sites.items() if "gate_up" in role], {layer})
    assert unit.group == layer
    assert unit.is_of_experts
    assert unit.name.startswith("model.layers.1.mlp.experts.0.gate_up_proj+")


@pytest.mark.parametrize("model_type", ALL)
def test_the_loss_is_never_above_that_of_the_stacks_own_factors_and_none_at_full_rank(model_type: str) -> None:
    """Each left factor is the best for its expert's tokens; the stack's tail is of other tokens, and near it."""
    model, method = tiny_model(model_type), build_method("asvd-i")
    for part in calibrate(model, TOKENS, method):
        for unit, result in factored(method, model, part):
            whole = result.tail(0)
            for rank in (1, 4, 16):
                loss = loss_of(unit, model, part, method, rank, result)
                assert loss <= unfit_loss_of(unit, model, part, method, rank, result) + 1e-9 * whole
                assert loss <= 1.05 * result.tail(rank) + 1e-9 * whole
            assert loss_of(unit, model, part, method, result.max_rank, result) <= 1e-9 * whole


def test_experts_with_the_same_tokens_have_the_loss_of_the_stack() -> None:
    """Eckart-Young: with one moment for all, the stack's truncation is the best, and no fit improves it."""
    model, method = tiny_model("mixtral"), build_method("asvd-i")
    part = calibrate(model, TOKENS, method).blocks[0]
    groups = [site.input_group for unit in of_experts(model) for site in unit.sites if site.block == 0]
    most = max((part.inputs[group] for group in groups), key=lambda moments: moments.total)
    part.inputs.update(dict.fromkeys(groups, most))
    ((unit, result),) = factored(method, model, part)
    for rank in (1, 8, 20):
        assert loss_of(unit, model, part, method, rank, result) == pytest.approx(result.tail(rank), rel=1e-4)


@pytest.mark.parametrize("joint", [False, True])
def test_the_moments_of_an_expert_are_shrunk_once_for_its_cut(joint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model, method = tiny_model("mixtral"), build_method("asvd-i")
    part = calibrate(model, TOKENS, method).blocks[0]
    ranks = shared_plan(model, 0.5) if joint else plan(model, 0.5)
    units = [unit for unit in ranks.units if unit.sites[0].block == 0]
    shrunk, own = [], InputMoments.shrunk
    monkeypatch.setattr(InputMoments, "shrunk", lambda each, *given: shrunk.append(id(each)) or own(each, *given))
    request = FactorRequest(method, units, part, lambda unit: unit.weight(model))
    cuts = dict(cut_units(CutRequest(request, ranks)))
    assert len(cuts) == len(units)
    assert len(shrunk) == len(set(shrunk)) == 2 * 4  # what each expert's two linears read


@pytest.mark.parametrize("name", ["svd", "fwsvd", "asvd-0", "asvd-ii", "nsvd-i", "sfsd", "kfac"])
def test_losses_without_spectra_are_those_of_the_spectra(name: str) -> None:
    model, method = tiny_model("qwen3_moe"), build_method(name)
    parts = calibrate(model, TOKENS, method).blocks if method.needs else [BlockCalibration(1)]
    part = parts[1] if method.needs else parts[0]
    made = factored(method, model, part)
    units = [unit for unit, _ in made]
    tails = tails_of_units(FactorRequest(method, units, part, lambda unit: unit.weight(model)))
    for (_, result), (_, losses) in zip(made, tails, strict=True):
        torch.testing.assert_close(losses, result.tails(), rtol=1e-6, atol=1e-9 * float(result.tail(0)))


def shared_plan(model: Any, keep: float, layout: Layout = "plain") -> RankPlan:
    sites = find_sites(model)
    return plan(model, keep, layout=layout, joint=joint_groups(sites, sites))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", ALL)
def test_it_is_saved_loaded_and_exported(model_type: str, layout: Layout, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    method = build_method("asvd-i")
    made = shared_plan(model, 0.5, layout)
    assert any("*" in group for group in made.joint)
    compress(model, method, made, calibrate(model, TOKENS, method))
    for experts in opened_experts(model).values():
        first = [experts.get_submodule(f"{number}.gate_up_proj") for number in range(experts.num_experts)]
        assert all(isinstance(linear, LowRankLinear) for linear in first)
        assert len({id(linear.right) for linear in first}) == 1
    expected = logits_of(model, TOKENS)
    save(model, tmp_path / "out")
    again = load_model(tmp_path / "out")
    stored, loaded = model.state_dict(), again.state_dict()
    assert stored.keys() == loaded.keys()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in stored.items())
    torch.testing.assert_close(logits_of(again, TOKENS), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits_of(export_dense(again), TOKENS), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("order", ["sequential", "anchored"])
def test_what_experts_read_is_the_same_together_and_one_by_one(order: Any) -> None:
    """Nothing is replaced, so that only the order of reading differs."""
    method = build_method("asvd-i")
    method = method.anchored(0.0) if order == "anchored" else method

    def moments(joint: bool) -> dict[str, Tensor]:
        model = tiny_model("mixtral")
        sites = find_sites(model)
        groups = joint_groups(sites, sites) if joint else ()
        parts = SequentialCalibration(model, TOKENS, method, order=order, joint=groups, batch_size=2)
        return {group: each.second_moment for part in parts for group, each in part.inputs.items()}

    alone, together = moments(False), moments(True)
    assert alone.keys() == together.keys()
    for group, moment in alone.items():
        torch.testing.assert_close(together[group], moment, rtol=0, atol=0)


def test_nothing_of_a_layer_is_replaced_before_all_its_experts_were_read() -> None:
    model, method = tiny_model("mixtral"), build_method("asvd-i")
    made = shared_plan(model, 0.5)
    calibration = SequentialCalibration(
        model, TOKENS, method, order="sequential", joint=made.joint, sites=made.changed, batch_size=3
    )
    report = compress(model, method, made, calibration)
    assert {site.site.name for site in report.sites} == {site.name for site in made.changed}
    assert torch.isfinite(logits_of(model, TOKENS)).all()


def test_what_the_shared_factor_keeps_is_computed_once_and_each_expert_alone_computes_the_same() -> None:
    model, method = tiny_model("mixtral"), build_method("asvd-i")
    compress(model, method, shared_plan(model, 0.5), calibrate(model, TOKENS, method))
    experts = next(iter(opened_experts(model).values()))
    right, calls = experts.get_submodule("0.gate_up_proj").right, []
    right.register_forward_hook(lambda *_: calls.append(1))
    hidden = torch.randn(9, right.in_features)
    chosen = torch.tensor([[0, 1], [1, 2], [2, 3]]).repeat(3, 1)
    weights = torch.rand(9, 2)
    together = experts(hidden, chosen, weights)
    assert len(calls) == 1
    alone = torch.zeros_like(hidden)
    for token in range(9):
        for number, weight in zip(chosen[token].tolist(), weights[token], strict=True):
            alone[token] += weight * experts.run(number, hidden[token][None])[0]
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    together.sum().backward()
    assert right.weight.grad is not None
