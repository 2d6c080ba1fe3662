"""Trained models and real text, where they are: in ../shared next to the checkout, and what real_models.py has made."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

import eckart
from places import SHARED, real_model

MODELS = {"llama6M": 256, "stories260K": 256, "craftgpt-5M": 64}

needs_shared = pytest.mark.skipif(
    not (SHARED / "models/llama6M/config.json").is_file(),
    reason="needs the real models and corpora of ../shared, which are not part of the project",
)


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    path = SHARED / "models" / name
    return eckart.load_model(path), eckart.load_tokenizer(path)


@needs_shared
@pytest.mark.parametrize("name", MODELS)
def test_the_round_trip_is_exact(name: str, tmp_path: Path) -> None:
    model, tokenizer = load(name)
    text = eckart.read_text("wikitext2", data=SHARED / "data")
    tokens = eckart.sample_windows(text, tokenizer, samples=8, length=MODELS[name])
    method = eckart.build_method("sfsd")
    eckart.compress(model, method, eckart.plan(model, 0.7), eckart.calibrate(model, tokens, method))
    eckart.save(model, tmp_path / "out", tokenizer)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        assert torch.equal(model(tokens.ids[:2]).logits, again(tokens.ids[:2]).logits)


@pytest.mark.slow
@needs_shared
def test_activation_awareness_pays_in_its_domain() -> None:
    """The NSVD paper's first finding, on a model where it is small: asvd-i beats svd on the calibration corpus."""
    model, tokenizer = load("llama6M")
    text = eckart.read_text("wikitext2", data=SHARED / "data")
    tokens = eckart.sample_windows(text, tokenizer, samples=64, length=256)
    task = eckart.Task("perplexity:wikitext2", length=256, limit=16)
    values = {}
    for name in ("dense", "svd", "asvd-i"):
        model, tokenizer = load("llama6M")
        if name != "dense":
            method = eckart.build_method(name)
            statistics = eckart.calibrate(model, tokens, method) if method.needs else None
            eckart.compress(model, method, eckart.plan(model, 0.5), statistics)
        values[name] = eckart.evaluate(model, tokenizer, [task], data=SHARED / "data")[0].value
    assert values["dense"] < values["asvd-i"] < values["svd"]


@needs_shared
def test_the_reference_perplexity_of_llama6m() -> None:
    """The model's makers give 103.0 for the first 12 thousand tokens, with a begin token before each document."""
    model, tokenizer = load("llama6M")
    task = eckart.Task("perplexity:wikitext2", length=256, limit=48)
    (result,) = eckart.evaluate(model, tokenizer, [task], data=SHARED / "data")
    assert result.settings["scored_tokens"] == 48 * 255
    assert 90 < result.value < 160


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_real_model_knows_a_capital_and_english(name: str) -> None:
    """What a wrong norm, window or tokenizer would spoil. Between the two, 2 to 4 nats a token is what they are at."""
    from real_models import MODELS as REAL
    from real_models import continuation

    place = real_model(name)
    assert REAL[name].answer in continuation(place, REAL[name].prompt)
    model, tokenizer = eckart.load_model(place, dtype="float32"), eckart.load_tokenizer(place)
    task = eckart.Task("perplexity:builtin/prose", length=256, limit=4)
    (result,) = eckart.evaluate(model, tokenizer, [task])
    assert 1.5 < math.log(result.value) < 4.2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["smollm2", "gemma3"])
def test_a_real_model_is_compressed_and_read_again(name: str, tmp_path: Path) -> None:
    """Grouped queries, tied embeddings, and for Gemma heads wider than the model's share and a sliding window."""
    place = real_model(name)
    model, tokenizer = eckart.load_model(place), eckart.load_tokenizer(place)
    tokens = eckart.sample_windows(eckart.read_text("builtin/prose"), tokenizer, samples=16, length=128)
    method = eckart.build_method("asvd-i")
    with torch.no_grad():
        before = model(tokens.ids[:2], labels=tokens.ids[:2]).loss
        eckart.compress(model, method, eckart.plan(model, 0.9), eckart.calibrate(model, tokens, method))
        eckart.save(model, tmp_path / "out", tokenizer)
        ours = model(tokens.ids[:2], labels=tokens.ids[:2])
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert torch.equal(ours.logits, again(tokens.ids[:2]).logits)
    assert before < ours.loss < before + 1
