"""Compression in every layout and order, of linears alone and joined, refit: the counts, the report, the map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cache, partial

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.allocation import RankPlan, plan, settle
from eckart.calibration.moments import BlockCalibration, Calibration, calibrate, calibrate_by_block
from eckart.calibration.sequential import Order, SequentialCalibration
from eckart.compression.cuts import FactorRequest, factor_units, moments_of
from eckart.compression.replace import CompressionReport, compress
from eckart.compression.tuning.refinement import Refinement
from eckart.lowrank import Factored, Factors, InputMoments, Layout, Method, build_method
from eckart.lowrank.pivoting import LAYOUTS
from eckart.models.sites import find_sites, low_rank_modules, read_weight
from eckart.models.units import Unit
from eckart.support.sizes import num_bytes, num_params
from tiny import BLOCKS, logits_of, relative, site_inputs, tiny_model, tiny_tokens

# Grouped queries, Conv1D, an encoder, biases, fused projections.
MODELS = ("llama", "gpt2", "bert", "opt", "phi3")
# No metric, an exact root, two stages, a bias, gradients on one side, gradients of stacked linears on the other.
CHOSEN = ("svd", "asvd-i", "nsvd-i", "sfsd", "fwsvd", "kfac")


@cache
def calibrated(model_type: str, method: str) -> Calibration:
    """Calibrations are made once, of the model with seed 0."""
    return calibrate(tiny_model(model_type), tiny_tokens(6, 16), build_method(method))


def groups_of(model: PreTrainedModel) -> frozenset[str]:
    """Input groups that several linears read."""
    readers = Counter(site.input_group for site in find_sites(model))
    return frozenset(group for group, count in readers.items() if count > 1)


def make_plan(model: PreTrainedModel, layout: Layout = "plain", joint: bool = False, keep: float = 0.5) -> RankPlan:
    return plan(model, keep, layout=layout, joint=groups_of(model) if joint else ())


def same(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


# Counts


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("model_type", "method"), [("llama", "asvd-i"), *((name, "sfsd") for name in MODELS)])
def test_the_model_holds_what_the_plan_says(model_type: str, method: str, layout: Layout, joint: bool) -> None:
    model = tiny_model(model_type)
    before, rank_plan = num_params(model), make_plan(model, layout, joint)
    report = compress(model, method, rank_plan, calibrated(model_type, method))
    low = [site for site in rank_plan.sites if rank_plan.rank(site) is not None]
    added = sum(site.d_out for site in low if not site.has_bias) if method == "sfsd" else 0
    assert num_params(model) == before - rank_plan.dense_params + rank_plan.kept_params + added
    assert (report.params_before, report.params_after) == (before, num_params(model))
    assert report.bytes_after == num_bytes(model)
    assert [each.name for each in report.sites] == [site.name for site in low]
    assert all(each.rank == rank_plan.rank(each.site) for each in report.sites)


def test_a_joint_group_that_stays_dense_is_left_alone() -> None:
    model = tiny_model("llama")
    joint, sites = groups_of(model), find_sites(model)
    rank_plan = settle(sites, {site.name: 4 for site in sites if site.input_group not in joint}, joint=joint)
    report = compress(model, "svd", rank_plan)
    assert low_rank_modules(model).keys() == {site.name for site in sites if site.input_group not in joint}
    assert {site.name for site in report.dense} == {site.name for site in sites if site.input_group in joint}


# The map


@pytest.mark.parametrize("method", CHOSEN)
@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_joined_linears_are_the_rows_of_one_cut(model_type: str, method: str) -> None:
    dense, built = tiny_model(model_type), build_method(method)
    calibration = calibrated(model_type, method)
    expected = {}
    for layout in LAYOUTS:
        model = tiny_model(model_type)
        rank_plan = make_plan(model, layout, joint=True)
        compress(model, built, rank_plan, calibration if built.needs else None)
        for unit in rank_plan.units:
            rank = rank_plan.rank(unit.sites[0])
            assert rank is not None
            if (unit.name, rank) not in expected:
                part = calibration.blocks[unit.sites[0].block]
                request = FactorRequest(built, [unit], part, partial(Unit.weight, model=dense))
                ((_, factored),) = factor_units(request, rank_plan)
                expected[unit.name, rank] = factored.cut(rank)
            modules = [model.get_submodule(site.name) for site in unit.sites]
            whole = torch.cat([module.dense().detach() for module in modules])
            assert relative(whole, expected[unit.name, rank].dense()) < 1e-4, unit.name
            assert all(module.right is modules[0].right for module in modules)
            assert [module.lender for module in modules] == [None] + [modules[0]] * (len(modules) - 1)
            for site, module in zip(unit.sites, modules, strict=True):
                own = dense.get_submodule(site.name).bias
                assert (module.bias is not None) == (own is not None or built.centred)
                if own is not None and not built.centred:
                    assert torch.equal(module.bias, own)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("method", ["nsvd-i", "kfac"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_pivoted_is_the_same_map_in_fewer_numbers(model_type: str, method: str, joint: bool) -> None:
    logits, sizes = {}, {}
    for layout in LAYOUTS:
        model = tiny_model(model_type)
        rank_plan = replace(make_plan(model, "plain", joint), layout=layout)
        built = build_method(method)
        compress(model, built, rank_plan, calibrated(model_type, method) if built.needs else None)
        logits[layout], sizes[layout] = logits_of(model), num_params(model)
    torch.testing.assert_close(logits["pivoted"], logits["plain"], rtol=1e-4, atol=1e-4)
    assert sizes["pivoted"] < sizes["plain"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_joined_factors_have_the_models_type(layout: Layout, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    compress(model, "kfac", make_plan(model, layout, True), calibrate(model, tiny_tokens(6, 16), build_method("kfac")))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert all(module.order.dtype == torch.int32 for module in low_rank_modules(model).values() if layout == "pivoted")
    assert torch.isfinite(logits_of(model)).all()


@pytest.mark.parametrize("joint", [False, True])
def test_moments_lie_where_the_weight_does(joint: bool) -> None:
    # Gradients, and what a cache gives, are in main memory; the device without memory represents any other.
    model, calibration = tiny_model("llama"), calibrated("llama", "kfac")
    unit = make_plan(model, joint=joint).units[0]
    there, here = (moments_of(unit, calibration.blocks[0], torch.device(name)) for name in ("meta", "cpu"))
    for moments, device in ((there, "meta"), (here, "cpu")):
        statistics = [moments.require_inputs(), *moments.require_gradients().members]
        assert len(statistics) == 1 + len(unit.sites)
        assert {value.device.type for each in statistics for value in each.sums.values()} == {device}
    inputs = calibration.blocks[0].inputs[unit.group]
    assert here.require_inputs().count == inputs.count
    assert all(here.require_inputs().sums[name] is value for name, value in inputs.sums.items())


# The report


@pytest.mark.parametrize("method", ["asvd-i", "sfsd", "nsvd-i"])
@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_the_report_of_joined_linears(model_type: str, method: str) -> None:
    dense, model = tiny_model(model_type), tiny_model(model_type)
    rank_plan = make_plan(model, "pivoted", joint=True)
    inputs = site_inputs(dense, tiny_tokens(6, 16), find_sites(dense))
    report = compress(model, method, rank_plan, calibrated(model_type, method))
    lost: dict[str, float] = {}
    for each in report.sites:
        linear, low, x = dense.get_submodule(each.name), model.get_submodule(each.name), inputs[each.name]
        with torch.no_grad():
            error = (linear(x) - low(x)).double().square().sum(1).mean()
            energy = (x.double() @ read_weight(linear).double().T).square().sum(1).mean()
        assert each.relative_error == pytest.approx(float(error / energy), rel=1e-3, abs=1e-6), each.name
        group = each.site.input_group
        lost[group] = lost.get(group, 0.0) + float(error)
    for each in report.sites:
        if method == "nsvd-i":
            assert each.tail is None
        else:  # of all the linears that share the factor
            assert each.tail == pytest.approx(lost[each.site.input_group], rel=1e-3)
        assert each.refit is None
    written = report.to_dict()["sites"]
    assert all("refit" not in entry for entry in written.values())
    assert [entry["tail"] for entry in written.values()] == [each.tail for each in report.sites]


# Refits


def refit_of(calibration: Iterable[BlockCalibration], method: Method | str = "svd", **how: object) -> CompressionReport:
    model = tiny_model("llama")
    return compress(model, method, make_plan(model, **how), calibration, refit=True)


@pytest.mark.parametrize(("layout", "joint"), [("plain", False), ("plain", True), ("pivoted", True)])
@pytest.mark.parametrize("method", ["svd", "kfac"])
def test_a_refit_lowers_the_error_on_the_calibration(method: str, layout: Layout, joint: bool) -> None:
    model, needs = tiny_model("llama"), build_method(method).needs | {"second_moment"}
    calibration = calibrate(model, tiny_tokens(6, 16), replace(build_method(method), needs=needs))
    plain = compress(model, method, make_plan(model, layout, joint), calibration)
    better = refit_of(calibration, method, layout=layout, joint=joint)
    for before, after in zip(plain.sites, better.sites, strict=True):
        assert before.name == after.name
        assert after.relative_error < before.relative_error
        assert (before.refit, after.refit) == (None, True)
        assert after.tail == before.tail  # what the method's own cut loses in its own metric
    assert all(entry["refit"] for entry in better.to_dict()["sites"].values())


def test_a_refit_is_what_the_model_computes() -> None:
    dense, model = tiny_model("opt"), tiny_model("opt")
    report = compress(model, "svd", make_plan(model, "pivoted", True), calibrated("opt", "asvd-i"), refit=True)
    inputs = site_inputs(dense, tiny_tokens(6, 16), find_sites(dense))
    for each in report.sites:
        linear, low, x = dense.get_submodule(each.name), model.get_submodule(each.name), inputs[each.name]
        with torch.no_grad():
            error = (linear(x) - low(x)).double().square().sum()
            energy = (x.double() @ read_weight(linear).double().T).square().sum()
        assert each.relative_error == pytest.approx(float(error / energy), rel=1e-3, abs=1e-6)


def with_held_out(calibration: Calibration, held_out: dict[str, InputMoments]) -> list[BlockCalibration]:
    return [replace(part, held_out={group: held_out[group] for group in part.inputs}) for part in calibration.blocks]


def test_a_refit_that_is_worse_on_held_out_samples_is_undone() -> None:
    # Aside, every direction counts alike: there the plain singular value decomposition is best, and a refit to
    # anything else is worse.
    calibration = calibrated("llama", "asvd-i")
    white = {
        group: InputMoments.from_state(
            10,
            {
                "mean": torch.zeros(moments.d_in, dtype=torch.float64),
                "abs_mean": torch.ones(moments.d_in, dtype=torch.float64),
                "covariance": 10 * torch.eye(moments.d_in, dtype=torch.float64),
            },
        )
        for part in calibration
        for group, moments in part.inputs.items()
    }
    plain, model = tiny_model("llama"), tiny_model("llama")
    compress(plain, "svd", make_plan(plain))
    report = compress(model, "svd", make_plan(model), with_held_out(calibration, white), refit=True)
    assert {each.refit for each in report.sites} == {False}
    assert same(model, plain)
    assert not any(entry["refit"] for entry in report.to_dict()["sites"].values())


def test_a_refit_that_is_better_on_held_out_samples_stays() -> None:
    calibration = calibrated("llama", "asvd-i")
    alike = {group: moments for part in calibration for group, moments in part.inputs.items()}
    tried, trusted = tiny_model("llama"), tiny_model("llama")
    report = compress(tried, "svd", make_plan(tried), with_held_out(calibration, alike), refit=True)
    compress(trusted, "svd", make_plan(trusted), calibration, refit=True)
    assert {each.refit for each in report.sites} == {True}
    assert same(tried, trusted)


def test_a_refit_needs_second_moments() -> None:
    for calibration in (None, calibrated("llama", "asvd-0"), calibrated("llama", "fwsvd")):
        model = tiny_model("llama")
        before = logits_of(model)
        with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj: a refit needs second moments"):
            compress(model, "svd", make_plan(model), calibration, refit=True)
        assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("order", ["one-shot", "sequential", "anchored"])
def test_a_refit_in_every_order(order: Order) -> None:
    method = replace(build_method("asvd-0"), needs=frozenset({"abs_mean", "second_moment"}))
    method = method.anchored(0.1) if order == "anchored" else method
    errors = {}
    for refit in (False, True):
        model = tiny_model("gpt2")
        calibration = SequentialCalibration(
            model, tiny_tokens(24, 16), method, order=order, held_out=tiny_tokens(8, 16, seed=1)
        )
        report = compress(model, method, make_plan(model, "pivoted"), calibration, refit=refit)
        errors[refit] = report.sites[0].relative_error
        assert {each.refit for each in report.sites} <= ({True, False} if refit else {None})
        assert any(each.refit for each in report.sites) == refit
    # The first site reads the same in both runs.
    assert errors[True] <= errors[False]


# Spectra that are there


@pytest.mark.parametrize(("method", "joint"), [("nsvd-i", False), ("sfsd", True), ("kfac", True)])
def test_spectra_serve_every_size_and_layout(method: str, joint: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    built = build_method(method)
    calibration = calibrated("llama", method) if built.needs else None
    spectra: dict[str, Factored] = {}
    cases: list[tuple[Layout, float]] = [("plain", 0.3), ("pivoted", 0.7)]
    expected = []
    for layout, keep in cases:
        expected.append(tiny_model("llama"))
        compress(expected[-1], built, make_plan(expected[-1], layout, joint, keep), calibration, spectra={})
    first = tiny_model("llama")
    compress(first, built, make_plan(first, joint=joint, keep=0.8), calibration, spectra=spectra)
    assert spectra.keys() == {unit.name for unit in make_plan(tiny_model("llama"), joint=joint).units}
    monkeypatch.setattr(Method, "factor", None)  # nothing is factored a second time
    monkeypatch.setattr(Method, "root", None)
    for (layout, keep), other_model in zip(cases, expected, strict=True):
        model = tiny_model("llama")
        compress(model, built, make_plan(model, layout, joint, keep), calibration, spectra=spectra)
        assert same(model, other_model)


def test_spectra_that_are_missing_are_put_in() -> None:
    spectra: dict[str, Factored] = {}
    some, whole, fresh = tiny_model("llama"), tiny_model("llama"), tiny_model("llama")
    compress(some, "svd", plan(some, 0.5, include=["mlp"]), spectra=spectra)
    assert len(spectra) == 3 * BLOCKS
    before = dict(spectra)
    compress(whole, "svd", plan(whole, 0.5), spectra=spectra)
    compress(fresh, "svd", plan(fresh, 0.5), spectra={})
    assert len(spectra) == 7 * BLOCKS
    assert all(spectra[name] is factored for name, factored in before.items())
    assert same(whole, fresh)


def test_spectra_of_linears_and_of_groups_lie_side_by_side() -> None:
    spectra: dict[str, Factored] = {}
    for joint in (False, True, False, True):
        model, fresh = tiny_model("llama"), tiny_model("llama")
        compress(model, "svd", make_plan(model, joint=joint), spectra=spectra)
        compress(fresh, "svd", make_plan(fresh, joint=joint), spectra={})
        assert same(model, fresh)
    assert len(spectra) == (7 + 2) * BLOCKS


@dataclass(frozen=True)
class Spoilt:
    """A spectrum one of whose cuts' rows is not finite."""

    inner: Factored
    row: int

    @property
    def max_rank(self) -> int:
        return self.inner.max_rank

    def cut(self, rank: int) -> Factors:
        factors = self.inner.cut(rank)
        bias = torch.zeros(factors.d_out, dtype=torch.float64)
        bias[self.row] = float("inf")
        return Factors(factors.left, factors.right, bias)

    def tail(self, rank: int) -> float:
        return self.inner.tail(rank)

    def tails(self) -> Tensor:
        return self.inner.tails()

    def losses(self, points: int) -> list[float]:
        return self.inner.losses(points)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("row", "role"), [(0, "q_proj"), (33, "k_proj"), (63, "v_proj")])
def test_factors_that_are_not_finite_name_their_site_once(layout: Layout, row: int, role: str) -> None:
    model = tiny_model("llama")
    rank_plan = make_plan(model, layout, joint=True)
    unit = rank_plan.units[0]
    request = FactorRequest(build_method("svd"), [unit], BlockCalibration(0), partial(Unit.weight, model=model))
    ((_, factored),) = factor_units(request)
    with pytest.raises(ValueError, match=rf"^model\.layers\.0\.self_attn\.{role}: its factors are not finite"):
        compress(model, "svd", rank_plan, spectra={unit.name: Spoilt(factored, row)})
    assert low_rank_modules(model) == {}


# In every order, with passes


@pytest.mark.parametrize(
    ("order", "layout", "joint"),
    [
        ("one-shot", "pivoted", True),
        ("sequential", "pivoted", True),
        ("anchored", "plain", True),
        ("anchored", "pivoted", False),
        ("anchored", "pivoted", True),
    ],
)
def test_orders_and_layouts_go_together(order: Order, layout: Layout, joint: bool) -> None:
    method = build_method("sfsd")
    method = method.anchored(0.1) if order == "anchored" else method
    model = tiny_model("llama")
    rank_plan = make_plan(model, layout, joint)
    before = num_params(model)
    calibration = SequentialCalibration(model, tiny_tokens(12, 16), method, order=order)
    report = compress(model, method, rank_plan, calibration)
    assert {each.name for each in report.sites} == low_rank_modules(model).keys() == rank_plan.ranks.keys()
    added = sum(site.d_out for site in rank_plan.sites)
    assert num_params(model) == before - rank_plan.dense_params + rank_plan.kept_params + added
    assert torch.isfinite(logits_of(model)).all()
    assert all(0 < each.relative_error < 1 for each in report.sites)


@pytest.mark.parametrize("order", ["one-shot", "sequential"])
def test_a_method_without_statistics_is_refined(order: Order) -> None:
    plain, model = tiny_model("gpt2"), tiny_model("gpt2")
    tokens, held_out = tiny_tokens(16, 12), tiny_tokens(6, 12, seed=1)
    compress(plain, "svd", make_plan(plain))
    calibration = SequentialCalibration(
        model, tokens, build_method("svd"), order=order, held_out=held_out, passes=[Refinement(12, 1e-2)]
    )
    report = compress(model, "svd", make_plan(model), calibration)
    assert [done.place for done in calibration.reports] == [f"block {number}" for number in range(BLOCKS)]
    assert all(done.kept and done.after < done.before for done in calibration.reports)
    assert {each.relative_error for each in report.sites} == {None}
    dense = logits_of(tiny_model("gpt2"), held_out)
    lost = [float((logits_of(each, held_out) - dense).square().mean()) for each in (plain, model)]
    assert lost[1] < lost[0]


@pytest.mark.parametrize("order", ["one-shot", "sequential", "anchored"])
def test_progress_counts_what_there_is(order: Order) -> None:
    method = build_method("asvd-i")
    method = method.anchored(0.1) if order == "anchored" else method
    model = tiny_model("llama")
    counts: list[tuple[str, int, int]] = []

    def track(items: Iterable[object], description: str, total: int) -> Iterable[object]:
        done = 0
        for item in items:
            yield item
            done += 1
        counts.append((description, done, total))

    calibration = SequentialCalibration(model, tiny_tokens(4, 8), method, order=order, track=track)
    compress(model, method, make_plan(model, joint=True), calibration, track=track)
    assert ("linears", 4 * BLOCKS, 4 * BLOCKS) in counts
    assert all(done == total for _, done, total in counts)


def test_a_calibration_that_lacks_a_joint_group_says_so() -> None:
    model = tiny_model("llama")
    sites = [site for site in find_sites(model) if site.part == "mlp"]
    calibration = calibrate_by_block(model, tiny_tokens(), build_method("asvd-i"), sites=sites)
    match = r"no moments of model\.layers\.0\.self_attn\.q_proj\+k_proj\+v_proj, which the plan compresses"
    with pytest.raises(ValueError, match=match):
        compress(model, "asvd-i", make_plan(model, joint=True), calibration)
