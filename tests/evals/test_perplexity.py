"""Perplexity: exp of the mean NLL over fixed windows, checked against a loop written by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from eckart.evals import windows as module
from eckart.evals.perplexity import perplexity
from eckart.evals.predictions import token_losses
from eckart.evals.result import EvalResult
from tiny import DECODERS, POSITIONS, VOCABULARY, tiny_model, tiny_tokens


def stream_of(count: int, seed: int = 0) -> torch.Tensor:
    return tiny_tokens(1, count, seed=seed).ids[0]


@torch.no_grad()
def nll_by_hand(model: Any, window: list[int]) -> float:
    """The mean NLL of every token but the first, one prediction at a time, in float64."""
    total = 0.0
    for position in range(1, len(window)):
        logits = model(input_ids=torch.tensor([window[:position]])).logits[0, -1].double()
        total += float(torch.logsumexp(logits, 0) - logits[window[position]])
    return total / (len(window) - 1)


@pytest.mark.parametrize("model_type", DECODERS)
def test_uniform_logits_give_the_vocabulary_size(model_type: str) -> None:
    model = tiny_model(model_type, tie_word_embeddings=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    result = perplexity(model, stream_of(100), length=10)
    assert result.value == pytest.approx(VOCABULARY, rel=1e-5)
    assert result.stderr == pytest.approx(0, abs=1e-3)


@pytest.mark.parametrize("model_type", DECODERS)
def test_equals_a_loop_by_hand(model_type: str) -> None:
    model, stream = tiny_model(model_type), stream_of(40)
    by_hand = [nll_by_hand(model, stream[start : start + 9].tolist()) for start in (0, 9, 18, 27)]
    result = perplexity(model, stream, length=9)
    assert result.examples == pytest.approx(by_hand, abs=2e-5)
    assert result.value == pytest.approx(math.exp(sum(by_hand) / 4), rel=2e-5)
    spread = math.sqrt(sum((nll - sum(by_hand) / 4) ** 2 for nll in by_hand) / 3)
    assert result.stderr == pytest.approx(result.value * spread / 2, rel=1e-3)
    assert (result.metric, result.n) == ("perplexity", 4)


def test_many_classes_are_summed_as_exactly_as_few() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 8, 50_000, generator=generator)
    targets = torch.randint(0, 50_000, (2, 8), generator=generator)
    exact = -logits.double().log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    for read in (logits, logits.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.testing.assert_close(token_losses(read, targets).double(), exact, rtol=0, atol=3e-5)


def test_settings_count_windows_and_scored_tokens() -> None:
    result = perplexity(tiny_model("llama"), stream_of(47), length=10, task="perplexity:x", settings={"split": "test"})
    assert result.task == "perplexity:x"
    assert result.settings == {"length": 10, "windows": 4, "scored_tokens": 36, "split": "test"}
    assert EvalResult.from_json(result.to_json()) == result


@pytest.mark.parametrize("windows_per_batch", [1, 2, 3])
def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch, windows_per_batch: int) -> None:
    model, stream = tiny_model("llama"), stream_of(70)
    whole = perplexity(model, stream, length=10)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    monkeypatch.setattr(module, "LOGITS_PER_BATCH", windows_per_batch * 10 * VOCABULARY)
    cut = perplexity(model, stream, length=10)
    assert max(sizes) == windows_per_batch
    assert sum(sizes) == 7
    assert cut.examples == pytest.approx(whole.examples, abs=1e-5)


def test_limit_reads_the_first_windows() -> None:
    model, stream = tiny_model("llama"), stream_of(50)
    whole, some = perplexity(model, stream, length=10), perplexity(model, stream, length=10, limit=2)
    assert some.examples == pytest.approx(whole.examples[:2], abs=1e-5)
    assert (some.n, some.settings["windows"], some.settings["scored_tokens"]) == (2, 2, 18)
    assert perplexity(model, stream, length=10, limit=99).n == 5


def test_one_window_has_no_standard_error() -> None:
    assert perplexity(tiny_model("llama"), stream_of(10), length=10).stderr is None


def test_the_softmax_is_in_float32() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    stream = stream_of(20)
    with torch.no_grad():
        logits = model(input_ids=stream.view(2, 10)).logits[:, :-1].double()
    scored = stream.view(2, 10)[:, 1:, None]
    exact = -logits.log_softmax(-1).gather(-1, scored)[..., 0].mean(1)
    assert perplexity(model, stream, length=10).examples == pytest.approx(exact.tolist(), abs=1e-5)


@pytest.mark.parametrize("windows_per_batch", [1, 2, 100])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_names_its_window(
    monkeypatch: pytest.MonkeyPatch, bad: float, windows_per_batch: int
) -> None:
    monkeypatch.setattr(module, "LOGITS_PER_BATCH", windows_per_batch * 10 * VOCABULARY)
    model, stream = tiny_model("llama"), stream_of(60).clamp_min(8)
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = bad
    stream[33] = 7
    with pytest.raises(ValueError, match="perplexity: a logit in window 3 is not finite"):
        perplexity(model, stream, length=10)


def test_a_perplexity_past_all_numbers_is_infinite() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight *= 1e4
    result = perplexity(model, stream_of(40), length=10)
    assert result.value == math.inf
    assert EvalResult.from_json(result.to_json()).value == math.inf


def test_too_short_a_text() -> None:
    with pytest.raises(ValueError, match="the text has 9 tokens, less than one window of 10: lower the length"):
        perplexity(tiny_model("llama"), stream_of(9), length=10)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_too_long_a_window(model_type: str) -> None:
    with pytest.raises(ValueError, match="length 65 is past the model's 64 positions"):
        perplexity(tiny_model(model_type), stream_of(200), length=POSITIONS + 1)
    assert perplexity(tiny_model(model_type), stream_of(64), length=POSITIONS).n == 1


@pytest.mark.parametrize("length", [1, 0, -3])
def test_nothing_to_predict(length: int) -> None:
    with pytest.raises(ValueError, match=f"length {length} leaves nothing to predict"):
        perplexity(tiny_model("llama"), stream_of(20), length=length)


@pytest.mark.parametrize("limit", [0, -1])
def test_no_window_to_read(limit: int) -> None:
    with pytest.raises(ValueError, match=f"limit {limit} leaves no window"):
        perplexity(tiny_model("llama"), stream_of(20), length=10, limit=limit)


def test_a_token_outside_the_vocabulary() -> None:
    stream = stream_of(20)
    stream[3] = VOCABULARY
    with pytest.raises(ValueError, match="token 96 is outside the model's vocabulary of 96"):
        perplexity(tiny_model("llama"), stream, length=10)


@pytest.mark.parametrize(
    ("model_type", "head"), [("bert", "masked"), ("roberta", "classifier"), ("llama", "base"), ("t5", "base")]
)
def test_models_that_are_not_causal_are_refused(model_type: str, head: str) -> None:
    with pytest.raises(ValueError, match="is not a causal language model"):
        perplexity(tiny_model(model_type, head), stream_of(20), length=10)


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is in training mode.*call model\.eval\(\)"):
        perplexity(tiny_model("gpt2").train(), stream_of(20), length=10)
