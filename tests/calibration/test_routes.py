"""Routes: an expert's moments are of the tokens that its router gives it, in one pass or in two streams."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from eckart.allocation import plan
from eckart.calibration.moments import PRIOR, BlockCalibration, calibrate
from eckart.calibration.routes import add_rows, both_routes
from eckart.calibration.sequential import SequentialCalibration
from eckart.compression.cuts import FactorRequest, tails_of_units, use_of
from eckart.compression.replace import compress
from eckart.data.tokens import Tokens
from eckart.lowrank import InputMoments, Moments, build_method
from eckart.models.experts import Route, layer_role, opened_experts
from eckart.models.sites import find_sites
from eckart.models.units import Unit
from tiny import MIXTURE_CONFIGS, tiny_model, tiny_tokens

NEEDS = frozenset({"second_moment"})
TOKENS = tiny_tokens(5, 14, padded=True)


@torch.no_grad()
def rows_by_expert(model_type: str, tokens: Tokens) -> dict[str, tuple[Tensor, Tensor]]:
    """{experts' module: (hidden states of every real token, what the router multiplies each expert's output by)}."""
    model = tiny_model(model_type)
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    for name, experts in opened_experts(model).items():

        def note(module: torch.nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            hidden, chosen, weights = args
            table = torch.zeros(len(hidden), module.num_experts)  # type: ignore[arg-type]
            table.scatter_(1, chosen, weights.float())
            seen[name] = hidden[tokens.mask.flatten()], table[tokens.mask.flatten()]

        experts.register_forward_pre_hook(note)
    model(input_ids=tokens.ids, attention_mask=tokens.mask.long())
    return seen


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss"])
def test_moments_are_of_the_tokens_given_to_an_expert_weighted_by_its_router(model_type: str) -> None:
    model = tiny_model(model_type)
    seen = rows_by_expert(model_type, TOKENS)
    for part in calibrate(model, TOKENS, build_method("asvd-i"), batch_size=2):
        for group, moments in part.inputs.items():
            if not group.endswith("gate_up_proj"):
                continue
            place, _, rest = group.rpartition(".experts.")
            hidden, table = seen[f"{place}.experts"]
            weights = table[:, int(rest.split(".")[0])].double().square()
            assert moments.count == int((weights > 0).sum())
            torch.testing.assert_close(moments.total, float(weights.sum()), rtol=1e-5, atol=1e-8)
            torch.testing.assert_close(moments.use, float(weights.sum()) / len(hidden), rtol=1e-5, atol=1e-8)
            if moments.count:
                expected = torch.einsum("n,ni,nj->ij", weights, hidden.double(), hidden.double()) / weights.sum()
                torch.testing.assert_close(moments.second_moment, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", sorted(MIXTURE_CONFIGS))
@pytest.mark.parametrize("method", ["kfac", "fwsvd"])
def test_every_method_has_what_it_needs_of_every_expert(model_type: str, method: str) -> None:
    # So few tokens that some experts get none.
    model, tokens = tiny_model(model_type), tiny_tokens(2, 4)
    report = compress(model, method, plan(model, keep=0.5), calibrate(model, tokens, build_method(method)))
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert len(report.sites) == len(find_sites(tiny_model(model_type))) - len(report.dense)


def test_an_expert_without_a_token_has_the_mean_of_its_layer() -> None:
    x = torch.randn(50, 6)
    rich, poor = InputMoments(6, NEEDS), InputMoments(6, NEEDS)
    mask = torch.ones(50, dtype=torch.bool)
    add_rows(rich, x, mask, Route(torch.arange(50), torch.rand(50)))
    add_rows(poor, x[:0], mask, Route(torch.arange(0), torch.rand(0)))
    part = BlockCalibration(0, {"b.experts.0.down_proj": rich.compact(), "b.experts.1.down_proj": poor.compact()})
    shrunk = part.inputs_of("b.experts.1.down_proj")
    assert shrunk is not None
    torch.testing.assert_close(shrunk.second_moment, rich.second_moment, rtol=1e-5, atol=1e-6)
    assert shrunk.count == round(PRIOR * 6)
    own = part.inputs_of("b.experts.0.down_proj")
    assert own is not None
    torch.testing.assert_close(own.second_moment, rich.second_moment, rtol=1e-5, atol=1e-6)  # the mean is its own


def test_two_streams_meet_on_the_tokens_that_both_give_the_expert() -> None:
    x, y = torch.arange(5.0)[:, None], 10 + torch.arange(4.0)[:, None]
    first = Route(torch.tensor([1, 3, 4, 7, 8]), torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5]))
    second = Route(torch.tensor([0, 3, 7, 9]), torch.tensor([0.6, 0.7, 0.8, 0.9]))
    route, rows = both_routes({"dense": first, "compressed": second}, {"dense": x, "compressed": y})
    assert route is not None
    assert route.tokens.tolist() == [3, 7]
    torch.testing.assert_close(route.weights, torch.tensor([0.7, 0.8]))
    assert rows["dense"].flatten().tolist() == [1, 3]
    assert rows["compressed"].flatten().tolist() == [11, 12]


@pytest.mark.parametrize("model_type", ["qwen3_moe", "gpt_oss"])
def test_experts_are_calibrated_in_anchored_order(model_type: str) -> None:
    model, method = tiny_model(model_type), build_method("kfac").anchored(0.01)
    calibration = SequentialCalibration(model, TOKENS, method, order="anchored", batch_size=2)
    report = compress(model, method, plan(model, keep=0.7), calibration)
    assert {site.name for site in report.sites} == {site.name for site in find_sites(tiny_model(model_type))}
    assert all(each.relative_error is not None for each in report.sites)


def test_an_experts_losses_are_those_of_a_token_of_the_text() -> None:
    model, method = tiny_model("mixtral"), build_method("asvd-i")
    part = next(iter(calibrate(model, TOKENS, method)))
    sites = [site for site in find_sites(model) if site.block == 0 and layer_role(site.name)]
    units = [Unit((site,)) for site in sites]
    request = FactorRequest(method, units, part, lambda unit: unit.weight(model))
    for unit, tails in tails_of_units(request):
        inputs = part.inputs_of(unit.group)
        assert inputs is not None
        expected = inputs.energy(unit.weight(model)) * use_of(method, Moments(inputs))
        torch.testing.assert_close(float(tails[0]), expected, rtol=1e-3, atol=1e-6)
        assert use_of(method, Moments(inputs)) == inputs.use < 1


def test_rows_that_no_text_has_are_no_use() -> None:
    """Shrunk towards the layer's mean, experts are given as many tokens as before: two of every token's."""
    random = torch.Generator().manual_seed(0)
    count, experts, width = 64, 8, 96
    x = torch.randn(count, width, generator=random)
    chosen = torch.stack([torch.randperm(experts - 1, generator=random)[:2] for _ in range(count)])
    part = BlockCalibration(0)
    for number, route in enumerate(Route.to_each(experts, chosen, torch.full((count, 2), 0.5))):
        moments = part.inputs[f"b.experts.{number}.down_proj"] = InputMoments(width, NEEDS)
        add_rows(moments, x[route.tokens], torch.ones(count, dtype=torch.bool), route)
        moments.compact()
    *used, unused = part.inputs
    shrunk = {group: moments for group in part.inputs if (moments := part.inputs_of(group))}
    for group in used:
        own, other = part.inputs[group], shrunk[group]
        assert other.count == own.count + round(PRIOR * width)
        assert other.share == pytest.approx(own.share)
        assert other.use == pytest.approx(own.use)  # all tokens weigh alike
    assert sum(shrunk[group].share for group in used) == pytest.approx(2)
    assert shrunk[unused].share == pytest.approx(0.5 / count)


def test_selected_experts_without_any_token_are_one_error() -> None:
    poor = InputMoments(6, NEEDS)
    add_rows(poor, torch.randn(0, 6), torch.ones(5, dtype=torch.bool), Route(torch.arange(0), torch.rand(0)))
    part = BlockCalibration(0, {"b.experts.1.down_proj": poor.compact()})
    with pytest.raises(ValueError, match="no calibration token is given to any selected expert"):
        part.inputs_of("b.experts.1.down_proj")
