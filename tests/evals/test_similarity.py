"""Activation similarity: laws, and one case worked out by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from eckart.data.tokens import Tokens
from eckart.evals.result import EvalResult
from eckart.evals.similarity import BINS, read_activations, similarity
from eckart.models.sites import find_sites
from tiny import FAMILY_CONFIGS, POSITIONS, site_inputs, tiny_model, tiny_tokens

WATCHED = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.down_proj")


def compare(model: Any, tokens: Tokens, stream: torch.Tensor, *, watched: Sequence[str], length: int) -> EvalResult:
    return similarity(model, read_activations(model, tokens, watched), stream, length=length)


def rows_of(tokens: Tokens) -> torch.Tensor:
    return tokens.ids.flatten()


def test_a_text_against_itself_is_as_similar_as_it_can_be() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(4, 16)
    result = compare(model, tokens, rows_of(tokens), watched=WATCHED, length=16)
    assert result.value == pytest.approx(result.scores["calibration"].value, abs=1e-7)
    one = compare(model, tiny_tokens(1, 16), rows_of(tiny_tokens(1, 16)), watched=WATCHED, length=16)
    assert one.value == pytest.approx(1, abs=1e-6)
    assert one.stderr is None
    assert one.scores["std"].value == pytest.approx(0, abs=1e-6)


def test_by_hand() -> None:
    model = tiny_model("llama")
    calibration, text = tiny_tokens(3, 16, seed=1), tiny_tokens(2, 8, seed=2)
    result = compare(model, calibration, rows_of(text), watched=WATCHED, length=8)
    expected = []
    for name in WATCHED:
        (site,) = (each for each in find_sites(model) if each.name == name)
        centre = site_inputs(model, calibration, [site])[name].double().mean(0)
        for row in range(len(text)):
            mean = site_inputs(model, text.take(slice(row, row + 1)), [site])[name].double().mean(0)
            expected.append(float(mean @ centre / (mean.norm() * centre.norm())))
    assert result.value == pytest.approx(sum(expected) / len(expected), abs=1e-6)
    assert result.examples[1] == pytest.approx((expected[1] + expected[3]) / 2, abs=1e-5)
    assert result.scores["std"].value == pytest.approx(float(torch.tensor(expected).std(correction=0)), abs=1e-5)
    assert result.details["modules"][WATCHED[0]] == pytest.approx((expected[0] + expected[1]) / 2, abs=1e-5)
    histogram = result.details["histogram"]
    assert len(histogram["edges"]) == len(histogram["counts"]) + 1 == BINS + 1
    assert sum(histogram["counts"]) == len(expected)
    inside = [i for i, count in enumerate(histogram["counts"]) if count]
    assert all(any(histogram["edges"][i] <= cosine <= histogram["edges"][i + 1] for i in inside) for cosine in expected)


def test_padding_is_left_out() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, 16)
    padded = Tokens(
        torch.nn.functional.pad(tokens.ids, (0, 5)), torch.nn.functional.pad(tokens.mask, (0, 5)), tokens.source
    )
    text = rows_of(tiny_tokens(2, 8, seed=2))
    plain = compare(model, tokens, text, watched=WATCHED, length=8)
    assert compare(model, padded, text, watched=WATCHED, length=8).value == pytest.approx(plain.value, abs=1e-6)


@pytest.mark.parametrize("family", FAMILY_CONFIGS)
def test_every_family_can_be_watched_and_keeps_no_hook(family: str) -> None:
    model = tiny_model(family)
    watched = tuple(dict.fromkeys(site.input_group for site in find_sites(model)))
    result = compare(model, tiny_tokens(2, 8), rows_of(tiny_tokens(2, 8, seed=5)), watched=watched, length=8)
    assert -1 <= result.value <= 1
    assert set(result.details["modules"]) == set(watched)
    assert not any(module._forward_hooks for module in model.modules())


def test_refusals() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(2, 8)
    with pytest.raises(ValueError, match="needs the names of the modules"):
        compare(model, tokens, rows_of(tokens), watched=(), length=8)
    with pytest.raises(ValueError, match=r"no module 'model\.layers\.9'"):
        compare(model, tokens, rows_of(tokens), watched=("model.layers.9",), length=8)
    with pytest.raises(ValueError, match="past the model's"):
        compare(model, tokens, rows_of(tiny_tokens(4, 32)), watched=WATCHED, length=POSITIONS + 1)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"an input of model\.layers\.2\.mlp\.down_proj is not finite"):
        compare(model, tokens, rows_of(tokens), watched=WATCHED[1:], length=8)
    assert not any(module._forward_hooks for module in model.modules())
