"""Divergence: its laws, a case known by hand, and a loop over one prediction at a time."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from eckart.evals import divergence as measured
from eckart.evals import windows as module
from eckart.evals.divergence import divergence
from eckart.evals.perplexity import perplexity
from eckart.evals.result import EvalResult
from tiny import DECODERS, POSITIONS, VOCABULARY, tiny_model, tiny_tokens


def stream_of(count: int, seed: int = 0) -> torch.Tensor:
    return tiny_tokens(1, count, seed=seed).ids[0]


def nearby(model_type: str, noise: float = 0.1, **changes: Any) -> Any:
    """The tiny model of a type, its weights a little moved, as by compression."""
    model = tiny_model(model_type, **changes)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn(parameter.shape, generator=generator) / 32**0.5)
    return model


def constant_model(logits: torch.Tensor) -> Any:
    """A decoder with the same logits everywhere."""
    model = tiny_model("gpt2", tie_word_embeddings=False)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.eye(32)[0])
        model.lm_head.weight.zero_()
        model.lm_head.weight[:, 0] = logits
    return model


@pytest.mark.parametrize("model_type", DECODERS)
def test_a_model_does_not_diverge_from_itself(model_type: str) -> None:
    stream = stream_of(40)
    result = divergence(tiny_model(model_type), tiny_model(model_type), stream, length=10)
    assert (result.value, result.stderr) == (0, 0)
    assert result.read("top1") == result.read("top5") == 1
    assert result.read("log_perplexity.change") == 0
    assert result.scores.get("top1_where_right") is None or result.read("top1_where_right") == 1
    assert result.read("log_perplexity") == pytest.approx(
        math.log(perplexity(tiny_model(model_type), stream, length=10).value)
    )


@pytest.mark.parametrize("model_type", DECODERS)
def test_equals_a_loop_by_hand(model_type: str) -> None:
    model, reference, stream = nearby(model_type), tiny_model(model_type), stream_of(36)
    rows = []
    for start in range(0, 36, 9):
        window = stream[start : start + 9]
        kl = same = shared = right = both = ours_nll = theirs_nll = 0.0
        for position in range(1, 9):
            with torch.no_grad():
                ours, theirs = (
                    candidate(input_ids=window[None, :position]).logits[0, -1].double().softmax(-1).tolist()
                    for candidate in (model, reference)
                )
            kl += sum(p * math.log(p / q) for p, q in zip(theirs, ours, strict=True))
            order = [sorted(range(VOCABULARY), key=lambda token, row=row: -row[token])[:5] for row in (ours, theirs)]
            same += order[0][0] == order[1][0]
            shared += len(set(order[0]) & set(order[1])) / 5
            right += order[1][0] == window[position]
            both += order[0][0] == order[1][0] == window[position]
            ours_nll -= math.log(ours[window[position]])
            theirs_nll -= math.log(theirs[window[position]])
        rows.append([value / 8 for value in (kl, same, shared, right, both, ours_nll, theirs_nll)])
    kl, same, shared, right, both, ours_nll, theirs_nll = torch.tensor(rows, dtype=torch.float64).T
    result = divergence(model, reference, stream, length=9)
    assert result.examples == pytest.approx(kl.tolist(), abs=1e-5)
    assert result.value == pytest.approx(float(kl.mean()), abs=1e-5)
    assert result.value > 1e-3
    assert result.stderr == pytest.approx(float(kl.std()) / 2, abs=1e-5)
    assert result.read("top1") == pytest.approx(float(same.mean()))
    assert result.read("top5") == pytest.approx(float(shared.mean()))
    assert result.read("log_perplexity") == pytest.approx(float(ours_nll.mean()), abs=1e-5)
    assert result.read("log_perplexity.reference") == pytest.approx(float(theirs_nll.mean()), abs=1e-5)
    change = ours_nll - theirs_nll
    assert result.read("log_perplexity.change") == pytest.approx(float(change.mean()), abs=1e-5)
    assert result.scores["log_perplexity.change"].stderr == pytest.approx(float(change.std()) / 2, abs=1e-5)
    if right.sum():
        assert result.read("top1_where_right") == pytest.approx(float(both.sum() / right.sum()))
    else:
        assert "top1_where_right" not in result.scores


@pytest.mark.parametrize("seed", range(5))
def test_divergence_is_never_negative(seed: int) -> None:
    result = divergence(tiny_model("llama", seed=seed), tiny_model("llama", seed=seed + 1), stream_of(60), length=12)
    assert min(result.examples) > 0
    other = divergence(tiny_model("llama", seed=seed + 1), tiny_model("llama", seed=seed), stream_of(60), length=12)
    assert other.value != pytest.approx(result.value, rel=1e-3)  # it has a direction


def test_a_shift_of_all_logits_is_no_divergence() -> None:
    logits = torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(0))
    result = divergence(constant_model(logits + 5), constant_model(logits), stream_of(40), length=10)
    assert result.value == pytest.approx(0, abs=1e-6)
    assert result.read("top1") == 1


def test_one_certain_word_against_a_uniform_model() -> None:
    """KL(certain || uniform) = log V; the other way it is the logit of the certain word, less what the rest weighs."""
    certain = torch.zeros(VOCABULARY)
    certain[7] = 60.0
    uniform = torch.zeros(VOCABULARY)
    result = divergence(constant_model(uniform), constant_model(certain), stream_of(40), length=10)
    assert result.value == pytest.approx(math.log(VOCABULARY), rel=1e-6)
    # Uniform p = 1/V; log q = -60 for the V - 1 others, 0 for the certain one, up to exp(-60) V.
    back = divergence(constant_model(certain), constant_model(uniform), stream_of(40), length=10)
    assert back.value == pytest.approx(-math.log(VOCABULARY) + 60 * (VOCABULARY - 1) / VOCABULARY, rel=1e-6)


def test_agreement_where_the_reference_is_right() -> None:
    """The reference always says token 7, the model always token 8; then both token 7."""
    seven, eight = (10 * torch.eye(VOCABULARY)[token] for token in (7, 8))
    stream = torch.tensor([7, 7, 8, 9, 7, 8, 8, 8])
    apart = divergence(constant_model(eight), constant_model(seven), stream, length=4)
    assert (apart.read("top1"), apart.read("top1_where_right")) == (0, 0)
    together = divergence(constant_model(seven + eight / 2), constant_model(seven), stream, length=4)
    assert (together.read("top1"), together.read("top1_where_right")) == (1, 1)
    assert (
        "top1_where_right" not in divergence(constant_model(eight), constant_model(seven), stream[4:], length=4).scores
    )


def test_the_error_of_a_ratio_is_its_spread_over_draws_of_windows() -> None:
    generator = torch.Generator().manual_seed(0)
    bottom = torch.rand(300, generator=generator, dtype=torch.float64)
    top = bottom * torch.rand(300, generator=generator, dtype=torch.float64)
    score = measured._ratio(top, bottom)
    draws = torch.randint(300, (20_000, 300), generator=generator)
    assert score.value == pytest.approx(float(top.sum() / bottom.sum()))
    assert score.stderr == pytest.approx(float((top[draws].sum(1) / bottom[draws].sum(1)).std()), rel=0.03)


def test_settings_and_what_the_result_is() -> None:
    result = divergence(
        nearby("llama"),
        tiny_model("llama"),
        stream_of(47),
        length=10,
        limit=3,
        task="divergence:x",
        settings={"split": 1},
    )
    assert (result.task, result.metric, result.better, result.n) == ("divergence:x", "kl", "lower", 3)
    assert result.settings == {"length": 10, "windows": 3, "scored_tokens": 27, "split": 1}
    assert EvalResult.from_json(result.to_json()) == result
    assert divergence(nearby("llama"), tiny_model("llama"), stream_of(10), length=10).stderr is None


@pytest.mark.parametrize("windows", [1, 2, 3])
def test_batches_change_nothing(monkeypatch: pytest.MonkeyPatch, windows: int) -> None:
    model, reference, stream = nearby("llama"), tiny_model("llama"), stream_of(70)
    whole = divergence(model, reference, stream, length=10)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    monkeypatch.setattr(module, "LOGITS_PER_BATCH", windows * 2 * 10 * VOCABULARY)
    cut = divergence(model, reference, stream, length=10)
    assert (max(sizes), sum(sizes)) == (windows, 7)
    assert cut.examples == pytest.approx(whole.examples, abs=1e-6)


def test_the_softmax_is_in_float32() -> None:
    model, reference, stream = (nearby("llama", dtype=torch.bfloat16), tiny_model("llama"), stream_of(40))
    with torch.no_grad():
        ours, theirs = (m(stream.view(4, 10)).logits[:, :-1].double().log_softmax(-1) for m in (model, reference))
    expected = (theirs.exp() * (theirs - ours)).sum(-1).mean()
    assert divergence(model, reference, stream, length=10).value == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("broken", ["compressed", "dense"])
@pytest.mark.parametrize("windows", [1, 2, 100])
def test_a_logit_that_is_not_finite_names_model_and_window(
    monkeypatch: pytest.MonkeyPatch, broken: str, windows: int
) -> None:
    monkeypatch.setattr(module, "LOGITS_PER_BATCH", windows * 2 * 10 * VOCABULARY)
    models = {"compressed": nearby("llama"), "dense": tiny_model("llama")}
    stream = stream_of(60).clamp_min(8)
    with torch.no_grad():
        models[broken].model.embed_tokens.weight[7] = math.nan
    stream[33] = 7
    with pytest.raises(ValueError, match=f"divergence, {broken} model: a logit in window 3 is not finite"):
        divergence(models["compressed"], models["dense"], stream, length=10)


def test_models_that_cannot_be_compared() -> None:
    model, stream = tiny_model("llama"), stream_of(20).clamp_max(70)
    with pytest.raises(ValueError, match="the model has a vocabulary of 96, the reference of 80"):
        divergence(model, tiny_model("llama", vocab_size=80), stream, length=10)
    for first, second in ((model, tiny_model("bert")), (tiny_model("bert"), model)):
        with pytest.raises(
            ValueError, match="BertForMaskedLM is not a causal language model; divergence is not defined"
        ):
            divergence(first, second, stream, length=10)
    for first, second in ((model, tiny_model("llama").train()), (tiny_model("llama").train(), model)):
        with pytest.raises(ValueError, match="is in training mode"):
            divergence(first, second, stream, length=10)
    short = tiny_model("llama", max_position_embeddings=8)
    for first, second in ((model, short), (short, model)):
        with pytest.raises(ValueError, match="length 10 is past the model's 8 positions"):
            divergence(first, second, stream, length=10)
    with pytest.raises(ValueError, match="the text has 20 tokens, less than one window of 64"):
        divergence(model, model, stream, length=POSITIONS)
    with pytest.raises(ValueError, match="token 96 is outside"):
        divergence(model, model, stream + 96 - stream.max(), length=10)
