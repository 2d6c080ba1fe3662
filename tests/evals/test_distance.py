"""Distance from the calibration text: laws, and one case worked out by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import eckart
from eckart.data.tokens import Tokens
from eckart.evals.catalogue import find_task
from eckart.evals.distance import FAR, NAMED, LinearErrors, distance, read_errors
from eckart.evals.result import EvalResult
from eckart.evals.tasks import evaluate
from eckart.lowrank import Factors
from eckart.models.linear import LowRankLinear
from eckart.models.sites import find_sites, low_rank_modules, read_weight, replace_module
from evals.log_errors import log_errors
from tiny import FAMILY_CONFIGS, POSITIONS, tiny_model, tiny_tokenizer, tiny_tokens

LENGTH = 16


def compressed(model_type: str, tokens: Tokens, *, method: str = "asvd-i", keep: float = 0.5) -> PreTrainedModel:
    model, built = tiny_model(model_type), eckart.build_method(method)
    eckart.compress(model, built, eckart.plan(model, keep), eckart.calibrate(model, tokens, built))
    return model


def errors_on(tokens: Tokens, model: PreTrainedModel, reference: PreTrainedModel) -> LinearErrors:
    return read_errors(model, reference, tokens, list(low_rank_modules(model)))


def measure(model: PreTrainedModel, calibration: Tokens, text: Tokens, **more: Any) -> EvalResult:
    reference = tiny_model("llama")
    return distance(model, reference, errors_on(calibration, model, reference), text.ids.flatten(), **more)


def test_the_calibration_text_is_at_one() -> None:
    tokens = tiny_tokens(6, LENGTH)
    result = measure(compressed("llama", tokens), tokens, tokens)
    assert result.value == pytest.approx(1, abs=1e-6)
    assert result.scores["error"].value == pytest.approx(result.scores["error.calibration"].value, rel=1e-6)
    assert 0 < result.scores["error"].value < 1
    assert result.warning is None
    assert math.prod(result.examples) == pytest.approx(1, rel=1e-3)


@torch.no_grad()
def test_by_hand() -> None:
    calibration, text = tiny_tokens(3, LENGTH, seed=1), tiny_tokens(2, 8, seed=2)
    model, reference = compressed("llama", calibration), tiny_model("llama")
    sites = find_sites(reference)

    theirs, ours = log_errors(model, reference, calibration), log_errors(model, reference, text)
    growth = {
        name: [value - sum(theirs[name]) / len(theirs[name]) for value in values] for name, values in ours.items()
    }
    result = measure(model, calibration, text, length=8)
    windows = [math.exp(sum(values[row] for values in growth.values()) / len(growth)) for row in range(2)]
    assert result.examples == pytest.approx(windows, rel=1e-4)
    assert result.value == pytest.approx(math.sqrt(windows[0] * windows[1]), rel=1e-4)
    name = sites[4].name
    assert result.details["linears"][name] == pytest.approx(math.exp(sum(growth[name]) / 2), rel=1e-4)
    by_growth = sorted(growth, key=lambda each: -sum(growth[each]))
    assert result.details["farthest"] == by_growth[:NAMED]
    logs_of_windows = torch.tensor(windows, dtype=torch.float64).log()
    assert result.stderr == pytest.approx(result.value * float(logs_of_windows.std()) / math.sqrt(2), rel=1e-3)


def test_exact_linears_are_no_farther_anywhere() -> None:
    """Their errors are rounding, which has no ratio."""
    model = tiny_model("llama")
    for site in find_sites(model):
        weight = read_weight(model.get_submodule(site.name))
        factors = Factors(weight, torch.eye(site.d_in))
        replace_module(
            model, site.name, LowRankLinear.from_factors(factors, None, device=weight.device, dtype=weight.dtype)
        )
    result = measure(model, tiny_tokens(3, LENGTH, seed=1), tiny_tokens(3, LENGTH, seed=2))
    assert result.value == 1
    assert result.scores["error"].value < 1e-12
    assert result.warning is None


def test_a_text_of_inputs_that_the_calibration_never_had_is_far() -> None:
    """One token alone gives every linear one input, on which a cut at any rank is exact."""
    tokens = tiny_tokens(4, LENGTH)
    one = Tokens(torch.full_like(tokens.ids, 9), tokens.mask, {"corpus": "one"})
    result = measure(compressed("llama", one), one, tokens, task="distance:notes.txt@16")
    assert result.value > 1e3
    assert result.scores["error.calibration"].value < 1e-6
    assert result.scores["error"].value > 1e-2
    assert result.warning is not None
    assert result.warning.startswith("notes.txt is far from the text that the model was calibrated on")
    assert "--calibration 'broad*3+notes.txt'" in result.warning
    assert EvalResult.from_json(result.to_json()).warning == result.warning


def test_what_is_far_has_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    calibration, text = tiny_tokens(6, LENGTH), tiny_tokens(6, LENGTH, seed=5)
    model = compressed("llama", calibration)
    value = measure(model, calibration, text).value
    for far, warned in ((value * 1.001, False), (value * 0.999, True)):
        monkeypatch.setattr("eckart.evals.distance.FAR", far)
        assert (measure(model, calibration, text).warning is not None) == warned


def test_a_text_is_not_far_that_is_like_one_part_of_a_mixture() -> None:
    """One part is one token, on which the cut is exact; the errors on the other are what the whole is far from."""
    tokens = tiny_tokens(4, LENGTH)
    one = Tokens(torch.full_like(tokens.ids, 9), tokens.mask, {"corpus": "one"})
    both, model = one + Tokens(tokens.ids, tokens.mask, {"corpus": "many"}), compressed("llama", one)
    result = measure(model, both, tokens, task="distance:many")
    parts = result.details["parts"]
    assert parts["one"] == pytest.approx(1 / parts["many"], rel=1e-4)
    assert parts["many"] == pytest.approx(result.value, rel=1e-4)
    assert result.value > FAR
    assert result.warning is None
    assert measure(model, one, tokens).warning is not None


def test_padding_is_left_out() -> None:
    tokens, reference = tiny_tokens(4, LENGTH, padded=True), tiny_model("llama")
    model = compressed("llama", tokens)
    wider = Tokens(torch.nn.functional.pad(tokens.ids, (0, 5)), torch.nn.functional.pad(tokens.mask, (0, 5)))
    for name, logs in errors_on(tokens, model, reference).logs.items():
        torch.testing.assert_close(errors_on(wider, model, reference).logs[name], logs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_every_family_has_a_distance_and_keeps_no_hook(family: str) -> None:
    """With a bias of the method's own in place of, or in addition to, the dense one."""
    tokens, reference = tiny_tokens(4, 8), tiny_model(family)
    model = compressed(family, tokens, method="sfsd")
    result = distance(model, reference, errors_on(tokens, model, reference), tokens.ids.flatten(), length=8)
    assert result.value == pytest.approx(1, abs=1e-5)
    assert set(result.details["linears"]) == {site.name for site in find_sites(reference)}
    assert not any(module._forward_hooks for each in (model, reference) for module in each.modules())


def test_it_is_an_evaluation_by_name(tmp_path: Any) -> None:
    text, tokens = tmp_path / "notes.txt", tiny_tokens(6, LENGTH)
    text.write_text(" ".join(f"w{number % 80}" for number in range(70)))
    model, reference = compressed("llama", tokens), tiny_model("llama")
    errors = errors_on(tokens, model, reference)
    name = f"distance:{text}"
    (result,) = evaluate(model, tiny_tokenizer(), [name], reference=reference, errors=errors)
    assert (result.metric, result.better, result.traits) == ("error ratio", "lower", find_task(name).traits)
    assert (result.n, result.settings["length"]) == (70 // LENGTH, LENGTH)
    assert result.settings["calibration"] == {"corpus": "random"}
    with pytest.raises(ValueError, match=r"needs the dense model to compare with \(--reference\)"):
        evaluate(model, tiny_tokenizer(), [name])


def test_refusals() -> None:
    tokens, reference = tiny_tokens(3, 8), tiny_model("llama")
    model = compressed("llama", tokens)
    with pytest.raises(ValueError, match="needs the names of the low-rank linears"):
        errors_on(tokens, reference, reference)
    with pytest.raises(ValueError, match="past the model's"):
        errors_on(tiny_tokens(2, POSITIONS + 1), model, reference)
    with pytest.raises(ValueError, match=r"has no module 'model\.layers\.2"):
        errors_on(tokens, model, tiny_model("llama", num_hidden_layers=2))
    with pytest.raises(ValueError, match="gives 64 numbers in the dense model and 48 in the compressed one"):
        errors_on(tokens, model, tiny_model("llama", intermediate_size=64))
    with pytest.raises(ValueError, match="in training mode"):
        errors_on(tokens, model, tiny_model("llama").train())
    errors = errors_on(tokens, model, reference)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").left.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"the error of model\.layers\.1\.mlp\.up_proj is not finite"):
        distance(model, reference, errors, tokens.ids.flatten())
    assert not any(module._forward_hooks for module in reference.modules())
