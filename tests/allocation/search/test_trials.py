"""Trials: what is put into a model comes out of it, to the same modules and the same bits."""

from __future__ import annotations

import math
import re
from contextlib import ExitStack

import pytest
import torch
from torch import nn

from eckart.allocation.search.trials import Cuts, TrialScores, ladder_of, low_rank, measure, select_units, swapped
from eckart.calibration.moments import calibrate
from eckart.compression.cuts import moments_of
from eckart.compression.spectra import spectra_on_demand
from eckart.lowrank import DecompositionError, Factored, Moments, build_method, factor
from eckart.models.linear import LowRankLinear
from eckart.models.sites import find_sites, low_rank_modules, read_weight
from eckart.models.units import Unit, units_of
from eckart.support.journal import open_journal
from tiny import logits_of, relative, tiny_model, tiny_tokens

MODELS = ("llama", "gpt2", "bert")


def spectra_of(model: nn.Module) -> dict[str, Factored]:
    return {site.name: factor(read_weight(model.get_submodule(site.name))) for site in find_sites(model)}


@pytest.mark.parametrize("model_type", MODELS)
def test_a_trial_leaves_no_trace(model_type: str) -> None:
    model, spectra = tiny_model(model_type), spectra_of(tiny_model(model_type))
    before, state = logits_of(model), {name: value.clone() for name, value in model.state_dict().items()}
    modules, order = dict(model.named_modules()), list(model.state_dict())
    for site in find_sites(model):
        cut = low_rank(model, Unit((site,)), spectra[site.name], 2)
        with swapped(model, cut):
            assert model.get_submodule(site.name) is cut[site.name]
            assert not torch.equal(logits_of(model), before)
        assert dict(model.named_modules()) == modules
    assert torch.equal(logits_of(model), before)
    assert list(model.state_dict()) == order
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_a_trial_that_fails_leaves_no_trace(error: type[BaseException]) -> None:
    model = tiny_model("llama")
    modules, names = dict(model.named_modules()), [site.name for site in find_sites(model)[:3]]
    with pytest.raises(error), swapped(model, {name: nn.Identity() for name in names}):
        raise error
    assert dict(model.named_modules()) == modules


def test_only_its_own_modules_come_off() -> None:
    model = tiny_model("llama")
    first, second = (site.name for site in find_sites(model)[:2])
    dense, mine, others = model.get_submodule(second), nn.Identity(), nn.Identity()
    with swapped(model, {first: mine, second: nn.Identity()}):
        model.set_submodule(first, others)
    assert model.get_submodule(first) is others
    assert model.get_submodule(second) is dense
    modules = dict(model.named_modules())
    with pytest.raises(AttributeError), swapped(model, {second: mine, "model.nothing": mine}):
        pass
    assert dict(model.named_modules()) == modules


def test_a_trial_that_holds_can_stay() -> None:
    model = tiny_model("llama")
    name, modules = find_sites(model)[0].name, dict(model.named_modules())
    with ExitStack() as kept:
        with swapped(model, {name: (cut := nn.Identity())}):
            pass
        kept.enter_context(swapped(model, {name: cut}))
        with swapped(model, {name: nn.Identity()}):
            pass
        assert model.get_submodule(name) is cut
    assert dict(model.named_modules()) == modules


@pytest.mark.parametrize("model_type", MODELS)
def test_a_cut_at_full_rank_computes_the_dense_model(model_type: str) -> None:
    model, spectra = tiny_model(model_type), spectra_of(tiny_model(model_type))
    before = logits_of(model)
    full: dict[str, nn.Module] = {}
    for unit in units_of(find_sites(model)):
        full |= low_rank(model, unit, spectra[unit.name], spectra[unit.name].max_rank)
    with swapped(model, full):
        assert set(low_rank_modules(model)) == set(full)
        assert relative(logits_of(model), before) < 1e-4


def test_a_bad_cut_names_the_site() -> None:
    model = tiny_model("llama")
    (unit, *_) = units_of(find_sites(model))
    weight = unit.weight(model)
    with pytest.raises(ValueError, match=rf"{unit.name}: rank 99 is not in 1"):
        low_rank(model, unit, factor(weight), 99)
    singular = factor(weight, metric=torch.diag(torch.eye(32, dtype=torch.float64)[0]))
    with pytest.raises(DecompositionError, match=unit.name):
        low_rank(model, unit, singular, 2)


@pytest.mark.parametrize("method", ["asvd-i", "sfsd"])
@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_a_joint_cut_is_the_stack_cut_and_shared_out(model_type: str, method: str) -> None:
    # llama: grouped queries, so that q is wider than k and v; bert: biases of the linears' own.
    model = tiny_model(model_type)
    sites, built = find_sites(model), build_method(method)
    calibration = calibrate(model, tiny_tokens(6, 16), built)
    group = sites[0].input_group
    (unit, *others) = units_of(sites, [group])
    assert (unit.group, len(unit.sites), len(others)) == (group, 3, len(sites) - 3)
    spectrum = built.factor(unit.weight(model), Moments(calibration.blocks[0].inputs[group]))
    factors, x = spectrum.cut(5), torch.randn(4, unit.d_in)
    modules = low_rank(model, unit, spectrum, 5)
    own = [model.get_submodule(site.name).bias for site in unit.sites]
    bias = torch.cat([torch.zeros(s.d_out) if b is None else b for s, b in zip(unit.sites, own, strict=True)])
    outputs = torch.cat([modules[site.name](x) for site in unit.sites], dim=-1)
    assert relative(outputs.detach(), factors(x.double()) + bias.detach()) < 1e-5
    with swapped(model, modules):
        assert set(low_rank_modules(model)) == set(modules)
    assert not low_rank_modules(model)
    with pytest.raises(ValueError, match=f"{re.escape(unit.name)}: its factors are of a"):
        low_rank(model, unit, spectra_of(model)[sites[0].name], 5)


def test_units_are_sites_or_whole_groups() -> None:
    model = tiny_model("llama")
    sites = find_sites(model)
    group = sites[7].input_group
    every, units = select_units(model, None, [group])
    assert every == sites
    assert [site.name for unit in units for site in unit.sites] == [site.name for site in sites]
    _, some = select_units(model, [sites[5], sites[2]], [])
    assert [unit.name for unit in some] == [sites[2].name, sites[5].name]
    with pytest.raises(ValueError, match="no site reads 'nothing'"):
        select_units(model, None, ["nothing"])
    with pytest.raises(ValueError, match=f"{sites[8].name} is joint"):
        select_units(model, [sites[7], sites[9]], [group])
    with pytest.raises(ValueError, match="no site of this model"):
        select_units(model, [find_sites(tiny_model("gpt2"))[0]], [])
    with pytest.raises(ValueError, match="no site is selected"):
        select_units(model, [], [])


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
@pytest.mark.parametrize("multiple", [1, 4, 16])
def test_a_ladder_climbs_and_always_saves(layout: str, multiple: int) -> None:
    for site in find_sites(tiny_model("llama")):
        unit = Unit((site,))
        ladder = ladder_of(unit, [0.9, 0.5, 0.1, 0.11, 0.7], layout, multiple)
        stored = [unit.num_stored(rank, layout) for rank in ladder]
        assert stored == sorted(stored)
        assert list(ladder) == sorted(set(ladder))
        assert all(count < unit.num_params for count in stored)
        assert all(rank % multiple == 0 or rank < multiple for rank in ladder)
        assert unit.num_stored(None, layout) == site.num_params
        for rank, share in ladder.items():
            assert unit.num_stored(rank, layout) <= max(share * unit.num_params, unit.num_stored(1, layout))


@pytest.mark.parametrize("score", [math.nan, math.inf, -math.inf])
def test_a_broken_score_is_an_error_with_a_name(score: float) -> None:
    with pytest.raises(ValueError, match=r"somewhere: the score is -?(nan|inf)"):
        measure(tiny_model("llama"), lambda model: score, "somewhere")


def test_a_refusing_score_is_named_and_others_pass() -> None:
    def refuse(model: nn.Module) -> float:
        raise ValueError("window 3 is not finite")

    def stop(model: nn.Module) -> float:
        raise KeyboardInterrupt

    model = tiny_model("llama")
    with pytest.raises(ValueError, match="somewhere: window 3"):
        measure(model, refuse, "somewhere")
    with pytest.raises(KeyboardInterrupt):
        measure(model, stop, "somewhere")


def test_a_unit_is_factored_once_and_nothing_is_measured_twice() -> None:
    model, factored, scored = tiny_model("llama"), [], []
    units = units_of(find_sites(model))
    spectra = spectra_of(model)

    def spectrum(name: str) -> Factored:
        factored.append(name)
        return spectra[name]

    def score(scoring: nn.Module) -> float:
        scored.append(sorted(low_rank_modules(scoring)))
        return float(len(scored))

    with open_journal(None, "test", None) as journal:
        scores = TrialScores(model, spectrum, score, journal)
        assert scores.dense() == scores.dense() == 1.0
        for unit in units[:2]:
            for rank in (1, 2, 2, 3):
                scores.trial(unit, 0.1, rank)
    assert factored == [unit.name for unit in units[:2]]
    assert scored == [[]] + [[unit.name] for unit in units[:2] for _ in range(3)]
    assert scores.evaluations == 2 + 8


def test_a_missing_spectrum_is_named() -> None:
    model = tiny_model("llama")
    (unit, *_) = units_of(find_sites(model))
    with pytest.raises(ValueError, match=f"no spectrum of {unit.name}"):
        Cuts(model, {}).modules(unit, 2)


@pytest.mark.parametrize("method", ["svd", "asvd-i", "nsvd-i", "sfsd", "fwsvd"])
def test_spectra_on_demand_are_what_the_method_makes(method: str) -> None:
    model, built = tiny_model("llama"), build_method(method)
    calibration = calibrate(model, tiny_tokens(6, 16), built) if built.needs else ()
    spectra = spectra_on_demand(model, built, calibration)
    blocks = {block.block: block for block in calibration}
    for site in reversed(find_sites(model)):
        block = blocks.get(site.block)
        moments = Moments(block.inputs.get(site.input_group), block.gradients.get(site.name)) if block else None
        expected = built.factor(read_weight(model.get_submodule(site.name)), moments).cut(3)
        factors = spectra(site.name).cut(3)
        assert torch.equal(factors.dense(), expected.dense())
        assert (factors.bias is None) == (expected.bias is None)


@pytest.mark.parametrize("method", ["asvd-i", "fwsvd"])
def test_joint_spectra_are_of_the_stack(method: str) -> None:
    model, built = tiny_model("llama"), build_method(method)
    group = find_sites(model)[0].input_group
    calibration = calibrate(model, tiny_tokens(6, 16), built)
    (unit, *_) = units_of(find_sites(model), [group])
    expected = built.factor(unit.weight(model), moments_of(unit, calibration.blocks[0])).cut(4)
    spectra = spectra_on_demand(model, built, calibration, joint=[group])
    assert torch.equal(spectra(unit.name).cut(4).dense(), expected.dense())
    with pytest.raises(ValueError, match=f"{group} is no site of this model, nor the name of a joint unit"):
        spectra(group)


def test_spectra_on_demand_refuse_what_they_cannot_make() -> None:
    model, method = tiny_model("llama"), build_method("asvd-i")
    with pytest.raises(ValueError, match="asvd-i needs second_moment"):
        spectra_on_demand(model, method)
    blocks = calibrate(model, tiny_tokens(2, 8), method).blocks
    spectra, site = spectra_on_demand(model, method, blocks[1:]), find_sites(model)[0]
    with pytest.raises(ValueError, match=r"no moments of block 0"):
        spectra(site.name)
    with pytest.raises(ValueError, match="no site"):
        spectra("model.nothing")
    spectra, module = spectra_on_demand(model, method, blocks), model.get_submodule(site.name)
    with pytest.raises(ValueError, match="no site reads"):
        spectra_on_demand(model, method, blocks, joint=["model.nothing"])
    with (
        swapped(model, {site.name: LowRankLinear(32, 32, 2, bias=False)}),
        pytest.raises(ValueError, match=f"{site.name} is low-rank already"),
    ):
        spectra(site.name)
    assert model.get_submodule(site.name) is module
