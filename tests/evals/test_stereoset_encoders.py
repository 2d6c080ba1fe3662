"""StereoSet on encoders: masked words and next sentences against loops over one text at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForNextSentencePrediction, AutoModelForPreTraining

from eckart.evals.likelihoods import has_next_sentence_head, masked_rows
from eckart.evals.stereoset import stereoset
from tiny import MASK, tiny_model, tiny_tokenizer

from .stereoset_models import bert_tokenizer, encoder_clusters, scores_of, tiny_bert, tiny_clusters, words_of


@torch.no_grad()
def masked_probability(model: Any, ids: list[int], target: str) -> float:
    output = model(input_ids=torch.tensor([ids]))
    logits = output.prediction_logits if "prediction_logits" in output else output.logits
    return float(logits[0, ids.index(MASK)].double().softmax(-1)[words_of(target)[0]])


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert", "pretraining"])
def test_masked_words_equal_a_loop_by_hand(model_type: str) -> None:
    model = tiny_bert(AutoModelForPreTraining) if model_type == "pretraining" else tiny_model(model_type, "masked")
    result = stereoset(model, bert_tokenizer(), encoder_clusters())

    def asked(before: tuple[str, ...], target: str, after: tuple[str, ...]) -> float:
        return masked_probability(model, words_of("<cls>", *before, "<mask>", *after, "<sep>"), target)

    first, second = ("man", "."), ("!",)
    pieces = [
        asked(("the",), "un", first),
        asked(("the", "un"), "##believ", first),
        asked(("the", "un", "##believ"), "##able", first),
    ]
    expected = [
        [asked(("the",), "happy", first), sum(pieces) / 3, asked(("the",), "table", first)],
        [asked(("the", "man", "is"), word, second) for word in ("mean", "here", "un")],
    ]
    assert np.array(scores_of(result, "intrasentence")) == pytest.approx(np.log(expected), abs=3e-5)
    assert result.settings["intrasentence"] == "mean probability of the blank's pieces"
    if model_type != "pretraining":
        assert result.settings["intersentence"] == "not scored: the model has no next-sentence head"
        assert result.settings["clusters"] == {"intrasentence": 2, "intersentence": 0}
        assert result.n == 2
        assert not any(name.startswith("intersentence") for name in (*result.scores, *result.details))
    assert "start" not in result.settings


@pytest.mark.parametrize("auto", [AutoModelForPreTraining, AutoModelForNextSentencePrediction])
def test_next_sentences_equal_a_loop_by_hand(auto: Any) -> None:
    model = tiny_bert(auto)
    assert has_next_sentence_head(model)
    result = stereoset(model, bert_tokenizer(), encoder_clusters())
    expected = []
    for words in (("the", "man", "is", "mean", "."), ("the", "man"), ("table",) * 3):
        ids = words_of("<cls>", "the", "man", "is", "here", "<sep>", *words, "<sep>")
        types = torch.tensor([[0] * 6 + [1] * (len(words) + 1)])
        with torch.no_grad():
            output = model(input_ids=torch.tensor([ids]), token_type_ids=types)
        logits = output.seq_relationship_logits if "seq_relationship_logits" in output else output.logits
        expected.append(float(logits[0].double().log_softmax(-1)[0]))
    assert scores_of(result, "intersentence")[0] == pytest.approx(expected, abs=3e-5)
    assert result.settings["intersentence"] == "next-sentence head"
    if auto is AutoModelForNextSentencePrediction:
        assert result.settings["intrasentence"] == "not scored: the model has no masked-token head"
        assert list(result.details) == ["intersentence"]
    else:
        assert result.n == 3


@pytest.mark.parametrize("auto", [AutoModelForPreTraining, AutoModelForNextSentencePrediction])
def test_batches_of_encoders_change_nothing(auto: Any) -> None:
    model = tiny_bert(auto)
    one, many = (stereoset(model, bert_tokenizer(), encoder_clusters(), batch_size=size) for size in (1, 50))
    for part in one.details:
        assert np.array(scores_of(one, part)) == pytest.approx(np.array(scores_of(many, part)), abs=1e-5)


def test_a_broken_encoder_names_its_cluster() -> None:
    model = tiny_bert(AutoModelForPreTraining, tie_word_embeddings=False)
    with torch.no_grad():
        model.bert.embeddings.word_embeddings.weight[words_of("!")] = math.nan
    with pytest.raises(ValueError, match=r"a logit in intrasentence\[1\] is not finite"):
        stereoset(model, bert_tokenizer(), encoder_clusters(), batch_size=4)
    model = tiny_bert(AutoModelForNextSentencePrediction)
    with torch.no_grad():
        model.cls.seq_relationship.bias[1] = math.inf
    with pytest.raises(ValueError, match=r"a logit in intersentence\[0\] is not finite"):
        stereoset(model, bert_tokenizer(), encoder_clusters())


def test_two_blanks_are_filled_alike_and_the_first_is_read() -> None:
    rows = masked_rows(bert_tokenizer(), "BLANK is BLANK.", "unbelievable", "x")
    assert [row.ids for row in rows[:2]] == [
        words_of("<cls>", "<mask>", "is", "<mask>", ".", "<sep>"),
        words_of("<cls>", "un", "<mask>", "is", "un", "<mask>", ".", "<sep>"),
    ]
    assert [(row.masked, row.target) for row in rows] == [
        (1, words_of("un")[0]),
        (2, words_of("##believ")[0]),
        (3, words_of("##able")[0]),
    ]


def test_tokenizers_that_cannot_ask_for_a_word() -> None:
    with pytest.raises(ValueError, match="no mask token"):
        stereoset(tiny_model("bert"), tiny_tokenizer(mask_token=None), tiny_clusters())
