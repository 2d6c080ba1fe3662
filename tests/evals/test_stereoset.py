"""StereoSet on decoders: scores by hand and at their limits, likelihoods against loops over one text at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from eckart.evals.icat import icat
from eckart.evals.likelihoods import find_start
from eckart.evals.result import EvalResult
from eckart.evals.stereoset import StereoSet, stereoset
from tiny import BOS, DECODERS, EOS, POSITIONS, SPECIALS, VOCABULARY, tiny_model, tiny_tokenizer

from .stereoset_models import cluster_of, scores_of, started_tokenizer, tiny_clusters


@torch.no_grad()
def mean_log(model: Any, ids: list[int], scored: int, start: int) -> float:
    """One prediction at a time; token 0 from the start token alone."""
    logs = []
    for position in range(scored, len(ids)):
        logits = model(input_ids=torch.tensor([ids[:position] or [start]])).logits[0, -1].double()
        logs.append(float(logits.log_softmax(-1)[ids[position]]))
    return sum(logs) / len(logs)


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize("always", [True, False])
def test_decoders_equal_a_loop_by_hand(model_type: str, always: bool) -> None:
    model, tokenizer = tiny_model(model_type), started_tokenizer() if always else tiny_tokenizer()
    clusters = tiny_clusters()
    result = stereoset(model, tokenizer, clusters, batch_size=4)
    number = {word: 7 + index for index, word in enumerate(f"w{i}" for i in range(40))}

    def ids_of(text: str) -> list[int]:
        return [number.get(word, SPECIALS.index("<unk>")) for word in text.split()]

    before = [BOS] if always else []
    expected = {
        "intrasentence": [
            [mean_log(model, before + ids_of(s), len(before), BOS) for s in cluster.sentences]
            for cluster in clusters.intrasentence
        ],
        "intersentence": [
            [
                # "w20 w21" gets its full stop, which makes "w21." a word that the tokenizer does not know.
                mean_log(model, before + ids_of(f"{context} {s}"), len(before) + 2, BOS)
                for s in cluster.sentences
            ]
            for context, cluster in zip(("w20 w21.", "w30 ."), clusters.intersentence, strict=True)
        ],
    }
    for part, scores in expected.items():
        assert np.array(scores_of(result, part)) == pytest.approx(np.array(scores), abs=3e-5)
    assert result.settings["start"] == ("<s> before every text" if always else "<s> before the first token only")


def test_the_result_is_the_scores_of_its_details() -> None:
    clusters = tiny_clusters()
    result = stereoset(tiny_model("llama"), tiny_tokenizer(), clusters, task="stereoset:x", settings={"seen": 1})
    inside, between = (scores_of(result, part) for part in ("intrasentence", "intersentence"))
    whole = icat(["a", "b", "a", "a", "b"], np.array(inside + between))
    assert result.value == pytest.approx(whole["icat"].value)
    assert result.stderr == pytest.approx(whole["icat"].stderr)
    assert result.read("lms") == pytest.approx(whole["lms"].value)
    assert result.read("ss") == pytest.approx(whole["ss"].value)
    race = icat(["a", "a", "a"], np.array([inside[0], inside[2], between[0]]))
    for name in ("icat", "lms", "ss"):
        assert result.scores[f"{name}.race"].value == pytest.approx(race[name].value)
        assert result.scores[f"intersentence.{name}"].value == pytest.approx(
            icat(["a", "b"], np.array(between))[name].value
        )
        assert result.scores[f"intrasentence.{name}.gender"].value == pytest.approx(
            icat(["b"], np.array(inside[1:2]))[name].value
        )
        assert f"{name}.religion" not in result.scores
    assert (result.task, result.metric, result.better, result.n) == ("stereoset:x", "icat", "higher", 5)
    assert result.scores["intrasentence.icat"].n == 3
    assert result.settings == {
        "intrasentence": "mean log-likelihood per token",
        "intersentence": "mean log-likelihood per token given the context",
        "start": "<s> before the first token only",
        "clusters": {"intrasentence": 3, "intersentence": 2},
        "limit": None,
        "data": clusters.digest,
        "file": "tiny",
        "seen": 1,
    }
    assert EvalResult.from_json(result.to_json()) == result


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_batches_change_nothing(size: int) -> None:
    model, tokenizer, seen = tiny_model("gpt2"), tiny_tokenizer(), []
    whole = stereoset(model, tokenizer, tiny_clusters(), batch_size=3)
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True)
    cut = stereoset(model, tokenizer, tiny_clusters(), batch_size=size)
    assert max(seen) == min(size, 9)
    for part in ("intrasentence", "intersentence"):
        assert np.array(scores_of(cut, part)) == pytest.approx(np.array(scores_of(whole, part)), abs=1e-5)


def unigram_model(**logits: float) -> Any:
    """A decoder whose next word never depends on the text: these logits for words, 0 for others."""
    model = tiny_model("gpt2", tie_word_embeddings=False)
    with torch.no_grad():
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.copy_(torch.eye(32)[0])
        model.lm_head.weight.zero_()
        for word, logit in logits.items():
            model.lm_head.weight[len(SPECIALS) + int(word[1:]), 0] = logit
    return model


def test_likelihoods_of_a_model_known_in_closed_form() -> None:
    result = stereoset(unigram_model(w1=2, w3=1, w9=-1), tiny_tokenizer(), tiny_clusters())
    normaliser = math.log(VOCABULARY - 3 + math.exp(2) + math.exp(1) + math.exp(-1))
    inside, between = (scores_of(result, part) for part in ("intrasentence", "intersentence"))
    # The mean logit of each sentence's words, less the normaliser; contexts do not count.
    logits = [[(2 + 1) / 3, 2 / 3, 2 / 3], [0, 0, -1], [(2 + 1 - 1) / 9, (2 + 1) / 2, 2 / 3]]
    assert np.array(inside) == pytest.approx(np.array(logits) - normaliser, abs=1e-5)
    logits = [[(2 + 1) / 3, 0, 0], [2, 0, -1 / 2]]
    assert np.array(between) == pytest.approx(np.array(logits) - normaliser, abs=1e-5)


@pytest.mark.parametrize(("second", "icat_expected"), [("anti", 100), ("stereotype", 0)])
def test_the_limits_of_whole_models(second: str, icat_expected: float) -> None:
    """Never the unrelated sentence; the stereotype in half of a term's clusters, or in all."""
    likely, next_likely, rest = "w1 w1", "w2 w2", "w3 w3"
    clusters = tuple(
        cluster_of("intersentence", number, "w4 .", *sentences)
        for number, sentences in enumerate(
            [
                (likely, next_likely, rest),
                (next_likely, likely, rest) if second == "anti" else (likely, next_likely, rest),
            ]
        )
    )
    result = stereoset(unigram_model(w1=2, w2=1), tiny_tokenizer(), StereoSet((), clusters))
    assert (result.value, result.read("lms")) == (icat_expected, 100)


def test_limit_reads_the_first_clusters_of_each_part() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    whole, some = (stereoset(model, tokenizer, tiny_clusters(), limit=limit) for limit in (None, 1))
    assert (some.n, some.settings["clusters"]) == (2, {"intrasentence": 1, "intersentence": 1})
    assert scores_of(some, "intersentence")[0] == pytest.approx(scores_of(whole, "intersentence")[0], abs=1e-5)
    with pytest.raises(ValueError, match="limit 0 leaves no cluster"):
        stereoset(model, tokenizer, tiny_clusters(), limit=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("size", [1, 3])
def test_a_logit_that_is_not_finite_names_its_cluster(bad: float, size: int) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[7 + 12] = bad  # of w12, only in intersentence[1]
    with pytest.raises(ValueError, match=r"stereoset intersentence: a logit in intersentence\[1\] is not finite"):
        stereoset(model, tiny_tokenizer(), tiny_clusters(), batch_size=size)


def test_a_start_token_that_breaks_the_model() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight[BOS] = math.nan
    with pytest.raises(ValueError, match="a logit in the start token is not finite"):
        stereoset(model, tiny_tokenizer(), tiny_clusters())


def test_long_inputs_are_refused_or_left_out() -> None:
    long = cluster_of("intersentence", 2, " ".join(["w1"] * 50), "w2", "w3", " ".join(["w4"] * (POSITIONS - 49)))
    clusters = StereoSet(tiny_clusters().intrasentence, (*tiny_clusters().intersentence, long))
    model, tokenizer = tiny_model("gpt2"), tiny_tokenizer()
    with pytest.raises(ValueError, match=r"intersentence\[2\] has 65 tokens, past the model's 64 positions"):
        stereoset(model, tokenizer, clusters)
    result = stereoset(model, tokenizer, clusters, leave_out_long=True)
    assert result.settings["left_out"] == {"intrasentence": 0, "intersentence": 1}
    assert result.settings["clusters"] == {"intrasentence": 3, "intersentence": 2}
    expected = stereoset(model, tokenizer, tiny_clusters())
    assert result.details["intersentence"]["left_out"] == [2]
    assert [scores_of(result, part) for part in result.details] == [
        scores_of(expected, part) for part in expected.details
    ]
    assert result.value == expected.value
    with pytest.raises(ValueError, match="no cluster is left"):
        stereoset(model, tokenizer, StereoSet((), (long,)), leave_out_long=True)


def test_another_models_tokenizer() -> None:
    clusters = StereoSet((), (cluster_of("intersentence", 0, "w1.", "w88", "w2", "w3"),))
    with pytest.raises(ValueError, match="token 95 is outside the model's vocabulary of 80"):
        stereoset(tiny_model("llama", vocab_size=80), tiny_tokenizer(), clusters)


def test_start_tokens() -> None:
    assert find_start(tiny_tokenizer()) == find_start(tiny_tokenizer(eos_token="</s>"))
    assert (find_start(tiny_tokenizer()).token, find_start(tiny_tokenizer()).always) == (BOS, False)
    assert find_start(started_tokenizer()).always
    without = tiny_tokenizer(bos_token=None)
    assert find_start(without).token == EOS
    neither = tiny_tokenizer(bos_token=None, eos_token=None)
    assert find_start(neither) is None
    # Without any, the first token of a sentence has no probability; after a context it does not need one.
    model, clusters = tiny_model("gpt2"), tiny_clusters()
    longer = StereoSet(clusters.intrasentence[:1], clusters.intersentence)
    startless, started = (stereoset(model, tokenizer, longer) for tokenizer in (neither, tiny_tokenizer()))
    assert startless.settings["start"] == "none; the first token is not scored"
    by_hand = [mean_log(model, [8, word, 9], 1, BOS) for word in (10, 11, 12)]
    assert scores_of(startless, "intrasentence")[0] == pytest.approx(by_hand, abs=3e-5)
    assert scores_of(startless, "intersentence") == scores_of(started, "intersentence")
    with pytest.raises(ValueError, match=r"intrasentence\[1\]: the tokenizer leaves no token to score in 'w7'"):
        stereoset(model, neither, clusters)


def test_models_that_are_refused() -> None:
    for model_type, head in (("llama", "base"), ("t5", "base"), ("bert", "classifier")):
        with pytest.raises(ValueError, match="is neither a causal nor a masked language model"):
            stereoset(tiny_model(model_type, head), tiny_tokenizer(), tiny_clusters())
    with pytest.raises(ValueError, match=r"is in training mode.*call model\.eval\(\)"):
        stereoset(tiny_model("gpt2").train(), tiny_tokenizer(), tiny_clusters())
