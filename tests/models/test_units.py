"""Units: linears cut as one are the linear that they are stacked, and every layout stores what it says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

from eckart.lowrank import Factors, Layout, factor
from eckart.lowrank.pivoting import LAYOUTS
from eckart.models.linear import LowRankLinear
from eckart.models.sites import Site, find_sites, low_rank_modules, read_weight
from eckart.models.units import Unit, units_of
from tiny import site_inputs, tiny_model, tiny_tokens

# Grouped queries, Conv1D, biases, fused projections.
MODELS = ("llama", "gpt2", "bert", "opt", "phi3")


def every_unit(model: PreTrainedModel, joint: bool) -> tuple[Unit, ...]:
    sites = find_sites(model)
    return units_of(sites, {site.input_group for site in sites} if joint else ())


def first_block(units: tuple[Unit, ...]) -> list[Unit]:
    return [unit for unit in units if unit.sites[0].block == 0]


def cut(unit: Unit, model: PreTrainedModel, rank: int = 6, *, bias: bool = False) -> Factors:
    factors = factor(unit.weight(model)).cut(rank)
    return Factors(factors.left, factors.right, factors.left.sum(1)) if bias else factors


def site_of(name: str, d_out: int, d_in: int, group: str = "g") -> Site:
    return Site(name, name, "attention", 0, group, d_in, d_out, False)


# What they are


@pytest.mark.parametrize("model_type", MODELS)
def test_alone_every_site_is_a_unit(model_type: str) -> None:
    model = tiny_model(model_type)
    units = every_unit(model, joint=False)
    assert [unit.sites for unit in units] == [(site,) for site in find_sites(model)]
    for unit, site in zip(units, find_sites(model), strict=True):
        assert (unit.name, unit.d_in, unit.d_out, unit.num_params) == (
            site.name,
            site.d_in,
            site.d_out,
            site.num_params,
        )
        assert torch.equal(unit.weight(model), read_weight(model.get_submodule(site.name)))


@pytest.mark.parametrize("model_type", MODELS)
def test_joint_units_are_their_input_groups(model_type: str) -> None:
    model = tiny_model(model_type)
    sites = find_sites(model)
    units = every_unit(model, joint=True)
    assert [unit.group for unit in units] == list(dict.fromkeys(site.input_group for site in sites))
    assert [site for unit in units for site in unit.sites] == list(sites)
    for unit in units:
        assert {site.input_group for site in unit.sites} == {unit.group}
        assert unit.num_params == sum(site.num_params for site in unit.sites) == unit.weight(model).numel()
        rows = unit.weight(model).split([site.d_out for site in unit.sites])
        for site, weight in zip(unit.sites, rows, strict=True):
            assert torch.equal(weight, read_weight(model.get_submodule(site.name)))


def test_names_tell_linears_and_groups_apart() -> None:
    model = tiny_model("llama")
    alone, together = ([unit.name for unit in every_unit(model, joint)] for joint in (False, True))
    assert together[:2] == ["model.layers.0.self_attn.q_proj+k_proj+v_proj", "model.layers.0.self_attn.o_proj"]
    assert set(alone) & set(together) == {name for name in alone if name.endswith(("o_proj", "down_proj"))}


def test_a_joint_unit_stands_where_its_first_site_does() -> None:
    names = ["q", "o", "k", "up"]
    sites = [site_of(name, 3, 4, {"q": "q", "k": "q"}.get(name, name)) for name in names]
    assert [[site.name for site in unit.sites] for unit in units_of(sites, ["q"])] == [["q", "k"], ["o"], ["up"]]
    assert [unit.name for unit in units_of(sites)] == names


def test_a_group_of_one_is_that_site() -> None:
    model = tiny_model("llama")
    (unit, *_) = [unit for unit in every_unit(model, joint=True) if unit.group.endswith("o_proj")]
    assert len(unit.sites) == 1
    assert unit == Unit((next(site for site in find_sites(model) if site.role == "self_attn.o_proj"),))


def test_an_input_group_that_is_not_there() -> None:
    sites = find_sites(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"no site reads 'mlp'; joint names input groups, such as 'model\.layers\.0\."):
        units_of(sites, ["mlp"])


# What they store


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", MODELS)
def test_what_is_counted_is_what_is_stored(model_type: str, layout: Layout, joint: bool) -> None:
    model = tiny_model(model_type)
    for unit in first_block(every_unit(model, joint)):
        for rank, added in ((1, False), (6, True), (min(unit.d_in, unit.d_out), False)):
            modules = unit.modules(model, cut(unit, model, rank, bias=added), layout)
            assert list(modules) == [site.name for site in unit.sites]
            stored = sum(parameter.numel() for module in modules.values() for parameter in module.parameters())
            biases = sum(site.d_out for site in unit.sites if site.has_bias or added)
            assert unit.num_stored(rank, layout) == stored - biases
    assert unit.num_stored(None, layout) == unit.num_params


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    d_in=st.integers(1, 40),
    share=st.floats(0.02, 1),
    multiple=st.integers(1, 9),
)
def test_the_rank_for_a_share_is_the_largest(
    layout: Layout, rows: list[int], d_in: int, share: float, multiple: int
) -> None:
    unit = Unit(tuple(site_of(str(index), d_out, d_in) for index, d_out in enumerate(rows)))
    budget = share * unit.num_params * (1 + 1e-9) + 1e-4
    largest = unit.rank_for(share, layout)
    assert 1 <= largest <= min(unit.d_in, unit.d_out)
    if largest > 1:
        assert unit.num_stored(largest, layout) <= budget
    if largest < min(unit.d_in, unit.d_out):
        assert unit.num_stored(largest + 1, layout) > budget - 2e-4
    rank = unit.rank_for(share, layout, multiple)
    assert rank == (largest if largest < multiple else multiple * math.floor(largest / multiple))


# What they compute


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", MODELS)
def test_modules_compute_the_stacked_factors_and_their_own_biases(model_type: str, layout: Layout, joint: bool) -> None:
    model = tiny_model(model_type)
    units = first_block(every_unit(model, joint))
    inputs = site_inputs(model, tiny_tokens(2, 8), [site for unit in units for site in unit.sites])
    for unit in units:
        factors = cut(unit, model, bias=True)
        modules = unit.modules(model, factors, layout)
        x = inputs[unit.sites[0].name]
        expected = factors(x.double()).split([site.d_out for site in unit.sites], -1)
        for site, product in zip(unit.sites, expected, strict=True):
            own = model.get_submodule(site.name).bias if site.has_bias else torch.zeros(())
            with torch.no_grad():
                outputs = modules[site.name](x)
            assert outputs.dtype == torch.float32
            torch.testing.assert_close(outputs, (product + own).float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_joint_modules_share_one_right_factor(layout: Layout) -> None:
    model = tiny_model("llama")
    unit = every_unit(model, joint=True)[0]
    modules = list(unit.modules(model, cut(unit, model), layout).values())
    assert len(modules) == 3
    first = modules[0]
    assert isinstance(first, LowRankLinear)
    assert first.lender is None
    for module in modules[1:]:
        assert isinstance(module, LowRankLinear)
        assert module.lender is first
        assert module.right is first.right
    assert {id(p) for m in modules for p in m.parameters()} == {id(m.left.weight) for m in modules} | {
        id(first.right.weight)
    }


@pytest.mark.parametrize("bias", [False, True])
def test_split_is_the_stack_cut_up(bias: bool) -> None:
    model = tiny_model("llama")
    unit = every_unit(model, joint=True)[0]
    factors = cut(unit, model, bias=bias)
    members = unit.split(factors)
    assert [member.d_out for member in members] == [site.d_out for site in unit.sites]
    assert torch.equal(torch.cat([member.left for member in members]), factors.left)
    assert all(member.right is factors.right for member in members)
    assert (factors.bias is None) == (not bias)
    if factors.bias is not None:
        assert torch.equal(torch.cat([member.bias for member in members]), factors.bias)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_plain_factors_are_balanced_before_they_are_rounded(dtype: torch.dtype, joint: bool) -> None:
    # As a cut in an output metric leaves them: a million apart, which float16 does not hold.
    model = tiny_model("llama", dtype=dtype)
    unit = every_unit(model, joint)[0]
    factors = factor(unit.weight(model)).cut(6)
    modules = list(unit.modules(model, Factors(1e6 * factors.left, 1e-6 * factors.right)).values())
    left = torch.cat([module.left.weight for module in modules]).float()
    right = modules[0].right.weight.float()
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1), rtol=0.02, atol=0)
    torch.testing.assert_close((left @ right).double(), factors.dense(), rtol=0.02, atol=0.02)
    assert {parameter.dtype for module in modules for parameter in module.parameters()} == {dtype}


# Refusals


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("left", "right"), [((33, 4), (4, 32)), ((32, 4), (4, 31))])
def test_factors_of_another_shape(layout: Layout, left: tuple[int, int], right: tuple[int, int]) -> None:
    model = tiny_model("llama")
    unit = every_unit(model, joint=False)[0]
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj: its factors are of a 3\d x 3\d map"):
        unit.modules(model, Factors(torch.zeros(left), torch.zeros(right)), layout)


def spoilt(unit: Unit, model: PreTrainedModel, row: int, value: float) -> Factors:
    factors = cut(unit, model, bias=True)
    bias: Tensor = factors.bias
    bias[row] = value
    return factors


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.float32, float("nan")), (torch.float32, float("inf")), (torch.float16, 1e6)]
)
def test_what_is_not_finite_names_the_site(layout: Layout, dtype: torch.dtype, value: float) -> None:
    model = tiny_model("llama", dtype=dtype)
    unit = every_unit(model, joint=True)[0]
    # 32 rows of q, then 16 of k
    match = rf"^model\.layers\.0\.self_attn\.k_proj: its factors are not finite in {dtype}; load the model in float32"
    with pytest.raises(ValueError, match=match):
        unit.modules(model, spoilt(unit, model, 33, value), layout)
    assert low_rank_modules(model) == {}
