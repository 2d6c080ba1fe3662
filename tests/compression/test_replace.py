"""Compression: every method on every family leaves a model that computes what its report says."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from eckart.allocation import plan, settle
from eckart.calibration.gradients import collect_gradients
from eckart.calibration.moments import BlockCalibration, Calibration, calibrate, calibrate_by_block
from eckart.compression.replace import compress
from eckart.lowrank import METHODS, DecompositionError, Moments, build_method
from eckart.models.linear import LowRankLinear
from eckart.models.sites import Site, find_sites, low_rank_modules, read_weight, replace_module
from eckart.support.sizes import num_bytes, num_params
from tiny import DEFAULT_CONFIGS, FAMILY_CONFIGS, logits_of, site_inputs, tiny_model, tiny_tokens

ALL = sorted({*FAMILY_CONFIGS, *DEFAULT_CONFIGS})
# The catalogue's parts: no metric, a root of the second moment, two stages, an interpolative one, a bias, gradients.
CHOSEN = ("svd", "asvd-i", "nsvd-i", "nid-i", "sfsd", "fwsvd")
CASES = [(name, None) for name in ALL] + [(name, "classifier") for name in ("bert", "roberta")]


@cache
def calibrated(model_type: str, head: str | None, method: str) -> Calibration:
    """Calibrations are made once for each need, of the model with seed 0."""
    return calibrate(tiny_model(model_type, head), tiny_tokens(6, 16), build_method(method))


def source(model_type: str, head: str | None, method: str) -> Calibration | None:
    needs = build_method(method).needs
    if not needs:
        return None
    return calibrated(model_type, head, "asvd-i" if needs == frozenset({"second_moment"}) else method)


@pytest.mark.parametrize("method", CHOSEN)
@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_keep_one_leaves_logits_alone(model_type: str, head: str | None, method: str) -> None:
    model = tiny_model(model_type, head)
    before, modules = logits_of(model), dict(model.named_modules())
    report = compress(model, method, plan(model, 1), source(model_type, head, method))
    assert torch.equal(logits_of(model), before)
    assert dict(model.named_modules()) == modules
    assert report.sites == ()
    assert report.params_before == report.params_after


@pytest.mark.parametrize("method", CHOSEN)
@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_full_rank_is_the_dense_model(model_type: str, head: str | None, method: str) -> None:
    # A plan leaves a site past break-even dense, so the factors are put in by hand.
    model = tiny_model(model_type, head)
    before, built = logits_of(model), build_method(method)
    calibration = source(model_type, head, method)
    blocks = calibration.blocks if calibration else [BlockCalibration(n) for n in range(3)]
    for site in find_sites(model):
        block, module = blocks[site.block], model.get_submodule(site.name)
        weight = read_weight(module)
        moments = Moments(block.inputs.get(site.input_group), block.gradients.get(site.name))
        factors = built.factor(weight, moments).cut(min(weight.shape))
        low = LowRankLinear.from_factors(factors, module.bias, device=weight.device, dtype=weight.dtype)
        replace_module(model, site.name, low)
    assert len(low_rank_modules(model)) == len(find_sites(tiny_model(model_type, head)))
    torch.testing.assert_close(logits_of(model), before, rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", ["asvd-i", "nsvd-i", "nid-i", "sfsd"])
@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_the_report_is_the_error_on_real_activations(model_type: str, head: str | None, method: str) -> None:
    dense, model = tiny_model(model_type, head), tiny_model(model_type, head)
    sites = {site.name: site for site in find_sites(dense)}
    inputs = site_inputs(dense, tiny_tokens(6, 16), sites.values())
    report = compress(model, method, plan(model, 0.6), source(model_type, head, method))
    assert [each.name for each in report.sites] == list(sites)
    for each in report.sites:
        linear, low = dense.get_submodule(each.name), model.get_submodule(each.name)
        assert isinstance(low, LowRankLinear)
        assert low.rank == each.rank
        x = inputs[each.name]
        with torch.no_grad():
            lost = (linear(x) - low(x)).double().square().sum()
            whole = (x.double() @ read_weight(linear).double().T).square().sum()
        # Moments are kept in float32, 6e-8 of the layer's energy.
        assert each.relative_error == pytest.approx(float(lost / whole), rel=1e-4, abs=1e-7), each.name
        assert 0 < each.relative_error < 1


@pytest.mark.parametrize("axis", ["in", "out"])
@pytest.mark.parametrize("model_type", FAMILY_CONFIGS)
def test_gradients_reach_the_site_that_they_are_of(model_type: str, axis: str) -> None:
    method = build_method("fwsvd", {"fisher_axis": axis})
    dense, model = tiny_model(model_type), tiny_model(model_type)
    rank_plan = plan(model, 0.5)
    compress(model, method, rank_plan, calibrate(model, tiny_tokens(3, 10), method))
    gradients = collect_gradients(dense, tiny_tokens(3, 10), rank_plan.sites, method.needs)
    for site in rank_plan.sites:
        rank = rank_plan.rank(site)
        assert rank is not None
        weight = read_weight(dense.get_submodule(site.name))
        expected = method.factor(weight, Moments(None, gradients[site.name])).cut(rank)
        # A cut whose rank is known is made in float32, and this one for every rank in float64.
        torch.testing.assert_close(model.get_submodule(site.name).dense(), expected.dense().float(), rtol=0, atol=5e-5)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_of_the_catalogue_runs(method: str) -> None:
    model = tiny_model("llama")
    report = compress(model, method, plan(model, 0.5), source("llama", None, method))
    assert torch.isfinite(logits_of(model)).all()
    assert len(report.sites) == 21
    assert all(each.tail is None or each.tail > 0 for each in report.sites)


def test_tails_are_the_errors_of_an_exact_method() -> None:
    model = tiny_model("llama")
    energies = {}
    for site in find_sites(model):
        rows = site_inputs(model, tiny_tokens(6, 16), [site])[site.name].double()
        energies[site.name] = float(
            (rows @ read_weight(model.get_submodule(site.name)).double().T).square().sum(1).mean()
        )
    for each in compress(model, "asvd-i", plan(model, 0.6), source("llama", None, "asvd-i")).sites:
        assert each.tail is not None
        assert each.tail / energies[each.name] == pytest.approx(each.relative_error, rel=1e-4)


# What stays


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert", "opt"])
def test_only_planned_sites_change_and_biases_stay(model_type: str) -> None:
    dense, model = tiny_model(model_type), tiny_model(model_type)
    rank_plan = plan(model, 0.6, include=["mlp"], blocks="last 2")
    compress(model, "nsvd-i", rank_plan, calibrate(model, tiny_tokens(), build_method("nsvd-i")))
    assert low_rank_modules(model).keys() == rank_plan.ranks.keys()
    for name, module in low_rank_modules(model).items():
        bias = dense.get_submodule(name).bias
        assert (module.bias is None) == (bias is None)
        assert bias is None or torch.equal(module.bias, bias)
    kept = {k: v for k, v in model.state_dict().items() if k.rpartition(".")[0] in dict(dense.named_modules())}
    for name, value in kept.items():
        if name.rpartition(".")[0] not in rank_plan.ranks:
            assert torch.equal(value, dense.state_dict()[name]), name


def test_sfsd_adds_its_bias_to_the_layers_own() -> None:
    for model_type, has_own in (("llama", False), ("opt", True)):
        dense, model = tiny_model(model_type), tiny_model(model_type)
        compress(model, "sfsd", plan(model, 0.5), source(model_type, None, "sfsd"))
        inputs = site_inputs(dense, tiny_tokens(6, 16), find_sites(dense))
        for name, module in low_rank_modules(model).items():
            linear = dense.get_submodule(name)
            assert (linear.bias is not None) == has_own
            # the mean output of the layer is kept exactly
            with torch.no_grad():
                means = [layer(inputs[name]).mean(0) for layer in (linear, module)]
            torch.testing.assert_close(means[1], means[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_have_the_models_type(dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    compress(model, "asvd-i", plan(model, 0.5), calibrate(model, tiny_tokens(), build_method("asvd-i")))
    assert {value.dtype for value in model.state_dict().values()} == {dtype}
    assert torch.isfinite(logits_of(model)).all()


def test_tied_embeddings_stay_tied() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    compress(model, "svd", plan(model, 0.5))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_the_report_counts() -> None:
    model = tiny_model("llama")
    before, rank_plan = (num_params(model), num_bytes(model)), plan(model, 0.5)
    report = compress(model, "svd", rank_plan)
    assert (report.params_before, report.bytes_before) == before
    assert (report.params_after, report.bytes_after) == (num_params(model), num_bytes(model))
    assert before[0] - report.params_after == rank_plan.dense_params - rank_plan.kept_params
    assert report.seconds["factor"] > 0
    written = report.to_dict()
    assert written["params"] == [before[0], report.params_after]
    assert written["sites"]["model.layers.0.mlp.up_proj"]["rank"] == 9
    assert written["sites"]["model.layers.0.mlp.up_proj"]["relative_error"] is None


def test_the_recipe_is_noted() -> None:
    model = tiny_model("llama")
    compress(model, build_method("svd"), plan(model, 0.5), recipe={"seed": 3})
    assert model.config.quantization_config.recipe == {"seed": 3}
    model = tiny_model("llama")
    compress(model, build_method("nsvd-i", {"share": 0.8}), plan(model, 0.5), source("llama", None, "nsvd-i"))
    assert model.config.quantization_config.recipe == {"method": "nsvd-i", "options": {"share": 0.8}}


@pytest.mark.parametrize("method", ["asvd-i", "sfsd", "fwsvd"])
def test_block_by_block_equals_all_at_once(method: str) -> None:
    built, tokens = build_method(method), tiny_tokens()
    whole, walked = tiny_model("gemma2"), tiny_model("gemma2")
    compress(whole, built, plan(whole, 0.5), calibrate(whole, tokens, built))
    compress(walked, built, plan(walked, 0.5), calibrate_by_block(walked, tokens, built))
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in walked.state_dict().items())


def test_a_layer_that_runs_twice_can_be_compressed_without_calibration() -> None:
    model = tiny_model("albert")
    compress(model, "svd", plan(model, 0.9))
    assert len(low_rank_modules(model)) == 6
    assert torch.isfinite(logits_of(model)).all()


# Refusals


def test_a_method_needs_its_statistics() -> None:
    model = tiny_model("llama")
    before = logits_of(model)
    with pytest.raises(ValueError, match="nsvd-i needs second_moment: calibrate first"):
        compress(model, "nsvd-i", plan(model, 0.5))
    abs_mean = calibrate(model, tiny_tokens(), build_method("asvd-0"))
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj: second_moment was not collected"):
        compress(model, "asvd-i", plan(model, 0.5), abs_mean)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj: .*statistics of the gradient"):
        compress(model, "fwsvd", plan(model, 0.5), abs_mean)
    assert torch.equal(logits_of(model), before)


def test_a_calibration_without_a_planned_block() -> None:
    model = tiny_model("llama")
    calibration = [block for block in calibrate(model, tiny_tokens(), build_method("asvd-i")) if block.block != 1]
    match = r"the calibration has no moments of model\.layers\.1\.self_attn\.q_proj, which the plan compresses"
    with pytest.raises(ValueError, match=match):
        compress(model, "asvd-i", plan(model, 0.5), calibration)


def test_a_plan_of_another_model_changes_nothing() -> None:
    model = tiny_model("llama")
    before = logits_of(model)
    for other in (tiny_model("gpt2"), tiny_model("llama", intermediate_size=64), tiny_model("llama", "base")):
        with pytest.raises(ValueError, match=r"the plan has \S+ as \d+ x \d+, which is not in this model"):
            compress(model, "svd", plan(other, 0.5))
    assert torch.equal(logits_of(model), before)


def test_a_compressed_model_is_not_compressed_again() -> None:
    model = tiny_model("llama")
    rank_plan = plan(model, 0.5)
    compress(model, "svd", rank_plan)
    before = logits_of(model)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj as 32 x 32, which is not in this model"):
        compress(model, "svd", rank_plan)
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("method", ["svd", "asvd-i"])
def test_a_weight_that_is_not_finite_names_its_site(method: str) -> None:
    model = tiny_model("llama")
    calibration = calibrate(model, tiny_tokens(), build_method(method))
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[3, 3] = float("inf")
    with pytest.raises((ValueError, DecompositionError), match=r"^model\.layers\.1\.mlp\.gate_proj: "):
        compress(model, method, plan(model, 0.5), calibration)


def test_an_unknown_method() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="unknown method 'nsvd'; did you mean 'svd'"):
        compress(model, "nsvd", plan(model, 0.5))


def test_a_plan_is_not_bound_to_uniform_ranks() -> None:
    model = tiny_model("llama")
    sites: tuple[Site, ...] = find_sites(model)
    ranks: dict[str, int | None] = {site.name: 1 + number % 7 for number, site in enumerate(sites)}
    compress(model, "svd", settle(sites, ranks))
    assert {name: module.rank for name, module in low_rank_modules(model).items()} == ranks
