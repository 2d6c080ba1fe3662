"""The stopwatch: which linears it times, at which ranks; how long they take is not asserted."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from eckart.allocation import SpeedTable, stopwatch
from eckart.allocation.speed import Shape
from eckart.allocation.stopwatch import describe_machine, measure_speed
from eckart.lowrank import Layout
from eckart.models.linear import LowRankLinear
from eckart.models.sites import find_sites, select_sites
from eckart.models.units import Unit, units_of
from tiny import POSITIONS, tiny_model


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """One round of single calls."""
    monkeypatch.setattr(stopwatch, "MOST_ROUNDS", 1)
    monkeypatch.setattr(stopwatch, "STRETCH", 0.0)
    monkeypatch.setattr(stopwatch, "COPIES", 3)


def measured(model: PreTrainedModel, layout: Layout = "plain", rows: int = 1, **how: object) -> SpeedTable:
    return measure_speed(model, find_sites(model), rows=rows, layout=layout, **how)  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_every_linear_is_timed_alone_and_with_those_that_read_its_input(model_type: str, layout: Layout) -> None:
    model = tiny_model(model_type)
    sites = find_sites(model)
    joint = {site.input_group for site in sites if [s.input_group for s in sites].count(site.input_group) > 1}
    for rows in (1, 8):
        speeds = measured(model, layout, rows, joint=joint, bias=True)
        assert speeds.rows == rows
        assert speeds.layout == layout
        assert speeds.step > 0
        for unit in (*units_of(sites), *units_of(sites, joint)):
            largest = unit.rank_for(1.0, layout)
            times = next(each for each in speeds.linears if each.shape == Shape.of(unit))
            assert times.ranks[0] == 1
            assert largest - 1 <= times.ranks[-1] <= largest
            assert all(rank % 2 for rank in times.ranks)
            assert speeds.cost(unit, None, layout) == sum(
                speeds.cost(Unit((site,)), None, layout) for site in unit.sites
            )
        assert len(speeds.linears) == len({Shape.of(unit) for unit in (*units_of(sites), *units_of(sites, joint))})


def test_ranks_are_the_multiples_that_a_plan_may_have() -> None:
    for times in measured(tiny_model("llama"), rank_multiple=4).linears:
        assert not any(rank % 4 for rank in times.ranks)


def test_what_is_timed_are_the_linears_that_a_plan_makes(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the model's type, with its bias, whole layouts, and weights that are numbers."""
    seen: list[LowRankLinear] = []
    forward = LowRankLinear.forward

    def watched(module: LowRankLinear, x: torch.Tensor) -> torch.Tensor:
        seen.append(module)
        y = forward(module, x)
        assert y.shape == (1, 5, module.out_features)
        assert y.dtype == torch.bfloat16
        assert torch.isfinite(y).all()
        return y

    monkeypatch.setattr(LowRankLinear, "forward", watched)
    model = tiny_model("gpt2").bfloat16()
    group = find_sites(model)[0].input_group
    measured(model, "pivoted", 5, joint={group})
    assert all(module.bias is not None for module in seen)
    for module in seen:
        assert module.order is not None
        rows = torch.cat([torch.arange(module.rank), module.rank + torch.arange(module.left.out_features)])
        assert set(module.order.tolist()) <= set(rows.tolist())
        assert len(set(module.order.tolist())) == module.out_features


def test_the_model_stays_as_it_is() -> None:
    model = tiny_model("llama")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    measured(model, joint={find_sites(model)[0].input_group})
    assert {name: type(module) for name, module in model.named_modules()}.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_prompts_past_the_positions_are_refused() -> None:
    with pytest.raises(ValueError, match=f"rows {POSITIONS + 1} is past the model's {POSITIONS} positions"):
        measured(tiny_model("llama"), rows=POSITIONS + 1)


def test_experts_are_not_timed() -> None:
    model = tiny_model("mixtral")
    sites = find_sites(model)
    with pytest.raises(ValueError, match=r"experts\.0\.gate_up_proj: a budget in speed is not supported for experts"):
        measure_speed(model, sites, rows=1)
    others = select_sites(sites, exclude="*.experts.*")
    assert measure_speed(model, others, rows=1).rows == 1


def test_a_machine_is_its_device_threads_type_and_torch() -> None:
    model = tiny_model("llama")
    machine = describe_machine(model)
    assert machine["threads"] == torch.get_num_threads()
    assert machine["torch"] == torch.__version__
    assert machine["name"]
    assert describe_machine(model.bfloat16()) == {**machine, "dtype": "bfloat16"}
