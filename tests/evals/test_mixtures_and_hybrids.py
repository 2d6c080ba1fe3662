"""Evaluations of mixtures of experts and of hybrids: by direct computations, of what reads every token."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import eckart
from eckart.data.tokens import Tokens
from eckart.evals.accumulation import accumulation
from eckart.evals.cost import cost, count_macs
from eckart.evals.distance import distance, read_errors
from eckart.evals.divergence import divergence
from eckart.evals.perplexity import perplexity
from eckart.evals.similarity import read_activations, similarity
from eckart.models.experts import expert_of
from eckart.models.sites import block_names, find_sites, input_groups, low_rank_modules, read_weight
from eckart.runs.calibration_errors import calibration_errors
from tiny import HYBRID_CONFIGS, MIXTURE_CONFIGS, site_inputs, tiny_model, tiny_tokenizer, tiny_tokens

QUICK = ("mixtral", "deepseek_v3", "mamba", "recurrent_gemma", "jamba")
BOTH = [
    name if name in QUICK else pytest.param(name, marks=pytest.mark.slow)
    for name in (*MIXTURE_CONFIGS, *HYBRID_CONFIGS)
]
TOKENS = tiny_tokens(4, 12)


def compressed(model_type: str) -> PreTrainedModel:
    model = tiny_model(model_type)
    eckart.compress(model, "svd", eckart.plan(model, 0.6))
    return model


@torch.no_grad()
@pytest.mark.parametrize("model_type", BOTH)
def test_perplexity_and_divergence(model_type: str) -> None:
    model, dense = compressed(model_type), tiny_model(model_type)
    log_q, log_p = (each(TOKENS.ids).logits[:, :-1].double().log_softmax(-1) for each in (model, dense))
    losses = nn.functional.nll_loss(log_q.flatten(0, 1), TOKENS.ids[:, 1:].flatten())
    stream = TOKENS.ids.flatten()
    assert perplexity(model, stream, length=12).value == pytest.approx(float(losses.exp()), rel=1e-4)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert divergence(model, dense, stream, length=12).value == pytest.approx(float(kl), rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("model_type", BOTH)
def test_distance_and_similarity_are_of_what_reads_every_token(model_type: str) -> None:
    model, dense = compressed(model_type), tiny_model(model_type)
    sites = [site for site in find_sites(dense) if expert_of(site.name) is None]
    names, text = [site.name for site in sites], tiny_tokens(2, 12, seed=5)
    result = distance(model, dense, read_errors(model, dense, TOKENS, names), text.ids.flatten(), length=12)
    site = sites[-1]

    def log(tokens: Tokens) -> list[float]:
        logs = []
        for row in range(len(tokens)):
            x = site_inputs(dense, tokens.take(slice(row, row + 1)), [site])[site.name].double()
            weight = read_weight(dense.get_submodule(site.name)).double()
            cut = model.get_submodule(site.name).dense().double()
            error, signal = (float((x @ w.mT).square().sum()) for w in (weight - cut, weight))
            logs.append(math.log(error / signal))
        return logs

    growth = sum(log(text)) / 2 - sum(log(TOKENS)) / 4
    assert result.details["linears"][site.name] == pytest.approx(math.exp(growth), rel=1e-2)

    groups = input_groups(dense)
    assert set(groups) <= set(names)
    measured = similarity(dense, read_activations(dense, TOKENS, groups), text.ids.flatten(), length=12)
    first = next(each for each in sites if each.name == groups[-1])
    centre = site_inputs(dense, TOKENS, [first])[first.name].double().mean(0)
    rows = site_inputs(dense, text, [first])[first.name].double().view(2, 12, -1).mean(1)
    expected = nn.functional.cosine_similarity(rows, centre[None]).mean()
    assert measured.details["modules"][first.name] == pytest.approx(float(expected), abs=1e-4)


@pytest.mark.parametrize("model_type", BOTH)
def test_accumulation_of_a_model_that_is_its_own_reference(model_type: str) -> None:
    model, dense = compressed(model_type), tiny_model(model_type)
    names = block_names(dense)
    assert accumulation(dense, tiny_model(model_type), names, TOKENS.ids.flatten(), length=12).value == 0
    result = accumulation(model, dense, names, TOKENS.ids.flatten(), length=12)
    assert result.value > 0
    assert len(result.details["blocks"]) == len(names)


@pytest.mark.parametrize("model_type", BOTH)
def test_cost(model_type: str) -> None:
    model, dense = compressed(model_type), tiny_model(model_type)
    result = cost(model, reference=dense, prompt=8, tokens=2, rounds=1)
    assert result.read("macs.linear") == count_macs(model, 8).linear / 8
    assert result.read("macs.kept") < 1
    assert ("decode_speed" in result.scores) == (model_type != "recurrent_gemma")  # which gives no cache


@torch.no_grad()
def test_a_mamba_is_timed_with_its_cache() -> None:
    model = tiny_model("mamba")
    read: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(
        lambda _module, _args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    cost(model, prompt=8, tokens=3, rounds=1)
    assert read == [(1, 8), (1, 8), (1, 1), (1, 1), (1, 8), (1, 1), (1, 1), (1, 1)]


def test_experts_alone_have_no_distance(tmp_path: Path) -> None:
    dense, model = tiny_model("mixtral"), tiny_model("mixtral")
    eckart.compress(model, "svd", eckart.plan(model, 0.6, include=["experts"]))
    with pytest.raises(ValueError, match=r"low-rank linears in experts alone.*divergence compares such models"):
        calibration_errors(tmp_path, model, dense, tiny_tokenizer())
    with pytest.raises(ValueError, match=r"experts\.0\.\w+ reads \d+ rows for 48 tokens, as a linear of an expert"):
        read_errors(model, dense, TOKENS, list(low_rank_modules(model)))
