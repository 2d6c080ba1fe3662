"""StereoSet: its scores by hand and at their limits, and likelihoods against plain loops over one text at a time."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForNextSentencePrediction, AutoModelForPreTraining, PreTrainedTokenizerFast

from eckart.evals import stereoset as module
from eckart.evals.icat import icat
from eckart.evals.likelihoods import find_start, has_next_sentence_head, masked_rows
from eckart.evals.result import EvalResult
from eckart.evals.stereoset import Cluster, StereoSet, find_word, read_stereoset, stereoset
from places import SHARED
from tiny import (
    BOS,
    CLS,
    DECODERS,
    EOS,
    MASK,
    POSITIONS,
    SEP,
    SPECIALS,
    VOCABULARY,
    tiny_config,
    tiny_model,
    tiny_tokenizer,
)

WORDS = ("the", "man", "is", "table", "happy", "mean", "here", "un", "##believ", "##able", "s", "'", ".", "!", ",")


def started_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny tokenizer, with the start token before every text."""
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return tokenizer


def bert_tokenizer() -> PreTrainedTokenizerFast:
    """Pieces of words, punctuation apart, and pairs: as BERT's."""
    vocabulary = {word: number for number, word in enumerate([*SPECIALS, *WORDS])}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = TemplateProcessing(
        single="<cls> $A <sep>", pair="<cls> $A <sep> $B:1 <sep>:1", special_tokens=[("<cls>", CLS), ("<sep>", SEP)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        unk_token="<unk>",
        mask_token="<mask>",
        cls_token="<cls>",
        sep_token="<sep>",
    )


def words_of(*tokens: str) -> list[int]:
    return [[*SPECIALS, *WORDS].index(token) for token in tokens]


def cluster_of(
    part: str, number: int, context: str, *sentences: str, target: str = "t", domain: str = "race"
) -> Cluster:
    first, second, third = sentences
    return Cluster(target, domain, context, (first, second, third), f"{part}[{number}]")


def tiny_clusters() -> StereoSet:
    """Sentences of one to nine words of the tiny tokenizer; two terms in two domains."""
    inside = [
        cluster_of("intrasentence", 0, "w1 BLANK w2", "w1 w3 w2", "w1 w4 w2", "w1 w5 w2", target="a"),
        cluster_of("intrasentence", 1, "BLANK", "w7", "w8", "w9 w9", target="b", domain="gender"),
        cluster_of("intrasentence", 2, "w1 BLANK", "w1 w2 w3 w4 w5 w6 w7 w8 w9", "w1 w3", "w1 w4 w5", target="a"),
    ]
    between = [
        cluster_of("intersentence", 0, "w20 w21", "w1 w2 w3", "w4 w5 w6", "w8", target="a"),
        cluster_of("intersentence", 1, "w30 .", "w1", "w11 w12 w13 w14 w15", "w8 w9", target="b", domain="gender"),
    ]
    return StereoSet(tuple(inside), tuple(between), {"file": "tiny"})


def encoder_clusters() -> StereoSet:
    inside = [
        cluster_of("intrasentence", 0, "the BLANK man.", "the happy man.", "the unbelievable man.", "the table man."),
        cluster_of("intrasentence", 1, "the man is BLANK!", "the man is mean!", "the man is here!", "the man is un!"),
    ]
    between = [cluster_of("intersentence", 0, "the man is here", "the man is mean.", "the man", "table table table")]
    return StereoSet(tuple(inside), tuple(between))


def tiny_bert(auto: Any, **changes: Any) -> Any:
    torch.manual_seed(3)
    model = auto.from_config(tiny_config("bert", type_vocab_size=2, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 4)
    return model


def scores_of(result: EvalResult, part: str) -> list[list[float]]:
    """(clusters, 3) log scores."""
    kinds = ("stereotype", "anti-stereotype", "unrelated")
    return [list(row) for row in zip(*(result.details[part][kind] for kind in kinds), strict=True)]


# Decoders.


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
        found = scores_of(result, part)
        assert np.array(found) == pytest.approx(np.array(scores), abs=3e-5)
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


def test_search_and_evaluation_clusters_are_disjoint_and_all_there_are() -> None:
    counts = {"intrasentence": 12, "intersentence": 7}
    parts = {
        part: tuple(cluster_of(part, n, "BLANK", "w1", "w2", "w3") for n in range(counts[part])) for part in counts
    }
    whole = StereoSet(**parts, source={"split": "dev"})
    search, evaluation = whole.take("sfsd-search"), whole.take("sfsd-evaluation")
    assert whole.take("test") is whole
    for part, count in counts.items():
        first, second = getattr(search, part), getattr(evaluation, part)
        assert len(first) == count // 5
        assert not set(first) & set(second)
        assert sorted([*first, *second], key=parts[part].index) == list(parts[part])
    assert search.source == {"split": "dev", "part": "sfsd-search", "split_seed": 0}
    assert len({whole.digest, search.digest, evaluation.digest}) == 3
    with pytest.raises(ValueError, match="stereoset: no split 'train'"):
        whole.take("train")
    with pytest.raises(ValueError, match="stereoset: 3 documents are too few"):
        tiny_clusters().take("sfsd-search")


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
    assert find_start(tiny_tokenizer()) == module.find_start(tiny_tokenizer(eos_token="</s>"))
    assert (find_start(tiny_tokenizer()).token, find_start(tiny_tokenizer()).always) == (BOS, False)
    assert find_start(started_tokenizer()).always
    without = tiny_tokenizer(bos_token=None)
    assert find_start(without).token == EOS
    neither = tiny_tokenizer(bos_token=None, eos_token=None)
    assert find_start(neither) is None
    # Without any, the first token of a sentence has no probability; after a context it does not need one.
    model, clusters = tiny_model("gpt2"), tiny_clusters()
    longer = StereoSet(clusters.intrasentence[:1], clusters.intersentence)
    found, started = (stereoset(model, tokenizer, longer) for tokenizer in (neither, tiny_tokenizer()))
    assert found.settings["start"] == "none; the first token is not scored"
    by_hand = [mean_log(model, [8, word, 9], 1, BOS) for word in (10, 11, 12)]
    assert scores_of(found, "intrasentence")[0] == pytest.approx(by_hand, abs=3e-5)
    assert scores_of(found, "intersentence") == scores_of(started, "intersentence")
    with pytest.raises(ValueError, match=r"intrasentence\[1\]: the tokenizer leaves no token to score in 'w7'"):
        stereoset(model, neither, clusters)


def test_models_that_are_refused() -> None:
    for model_type, head in (("llama", "base"), ("t5", "base"), ("bert", "classifier")):
        with pytest.raises(ValueError, match="is neither a causal nor a masked language model"):
            stereoset(tiny_model(model_type, head), tiny_tokenizer(), tiny_clusters())
    with pytest.raises(ValueError, match=r"is in training mode.*call model\.eval\(\)"):
        stereoset(tiny_model("gpt2").train(), tiny_tokenizer(), tiny_clusters())


# Encoders.


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


def test_words_are_found_as_the_authors_do() -> None:
    def word(context: str, sentence: str) -> str:
        return find_word(cluster_of("intrasentence", 7, context, "", "", ""), sentence)

    assert word("the BLANK, man", "the happy, man") == "happy"
    assert word("a BLANK's hat", "a nurse's hat") == "nurses"
    assert word("BLANK is BLANK", "one is two") == "two"
    with pytest.raises(ValueError, match=r"intrasentence\[7\]: 'the' has no word for the blank of 'the BLANK'"):
        word("the BLANK", "the")
    with pytest.raises(ValueError, match="has no word for the blank"):
        word("the BLANK", "the ...")


def test_tokenizers_that_cannot_ask_for_a_word() -> None:
    with pytest.raises(ValueError, match="no mask token"):
        stereoset(tiny_model("bert"), tiny_tokenizer(mask_token=None), tiny_clusters())


# Reading.


def one(label: str | int, text: str = "x") -> dict[str, Any]:
    return {"sentence": text, "gold_label": label}


def content_of(**changes: Any) -> dict[str, Any]:
    three = [one("unrelated", "u BLANK"), one("stereotype", "s"), one("anti-stereotype", "a")]
    cluster = {"target": "t", "bias_type": "race", "context": "a BLANK", "sentences": three}
    return {"version": "1", "data": {"intrasentence": [cluster, {**cluster, **changes}], "intersentence": [cluster]}}


def write(folder: Path, content: Any) -> Path:
    (folder / "dev.json").write_text(json.dumps(content))
    return folder


def test_reading_puts_sentences_in_order(tmp_path: Path) -> None:
    read = read_stereoset(write(tmp_path, content_of()))
    assert read.intrasentence[1] == Cluster("t", "race", "a BLANK", ("s", "a", "u BLANK"), "intrasentence[1]")
    assert (len(read.intersentence), read.source) == (1, {"file": "dev.json", "split": "dev"})
    inner = tmp_path / "data"
    (inner / "stereoset").mkdir(parents=True)
    with gzip.open(inner / "stereoset" / "dev.json.gz", "wt") as file:
        json.dump(content_of(), file)
    assert read_stereoset(inner).intrasentence == read.intrasentence
    assert read_stereoset(inner).digest == read.digest
    assert read_stereoset(write(tmp_path, content_of(context="b BLANK"))).digest != read.digest


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": None}, r"intrasentence\[1\] has no field 'target'"),
        ({"context": " "}, r"intrasentence\[1\] has no field 'context', or no text"),
        ({"bias_type": "age"}, r"intrasentence\[1\] has bias_type 'age'; known: gender"),
        ({"context": "no gap"}, r"intrasentence\[1\] has no BLANK"),
        ({"sentences": None}, r"intrasentence\[1\] has no field 'sentences'"),
        (
            {"sentences": [one("stereotype"), one("unrelated")]},
            r"\[1\] has no sentence with gold_label 'anti-stereotype'",
        ),
        ({"sentences": [one("stereotype"), one("stereotype")]}, r"\[1\], sentence 1 is a second sentence"),
        ({"sentences": [one("related")]}, r"\[1\], sentence 0 has gold_label 'related'"),
        ({"sentences": [one(7)]}, r"\[1\], sentence 0 has gold_label 7"),
        ({"sentences": ["x"]}, r"\[1\], sentence 0 has gold_label None"),
        ({"sentences": [one("stereotype", "")]}, r"\[1\], sentence 0 has no field 'sentence'"),
        ({"sentences": {"sentence": ["x"]}}, r"\[1\] has no field 'sentence' or 'gold_label'"),
    ],
)
def test_fields_that_are_missing_or_wrong(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"dev\.json: intrasentence.*{message.removeprefix('intrasentence')}"):
        read_stereoset(write(tmp_path, content_of(**changes)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not readable as JSON"),
        ("[]", "has no field 'data'"),
        ('{"data": {}}', "no cluster in 'intrasentence'"),
        ('{"data": {"intrasentence": []}}', "no cluster in 'intrasentence'"),
        ('{"data": {"intrasentence": [3], "intersentence": []}}', r"intrasentence\[0\] has no field 'target'"),
    ],
)
def test_files_that_hold_nothing(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "dev.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_stereoset(tmp_path)


def test_no_file_and_no_archive(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no dev\.json or dev\.json\.gz in .*stereoset or "):
        read_stereoset(tmp_path)
    (tmp_path / "dev.json.gz").write_text("no archive")
    with pytest.raises(ValueError, match="not readable as JSON"):
        read_stereoset(tmp_path)


def test_the_hub_gives_lists_and_numbers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    asked: list[tuple[str, str, str]] = []
    columns = {"sentence": ["u BLANK", "s", "a"], "gold_label": [2, 1, 0], "id": ["1", "2", "3"]}

    def load(name: str, config: str, *, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        return [{"id": "0", "target": "t", "bias_type": "race", "context": "a BLANK", "sentences": columns}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    read = read_stereoset(None)
    local = read_stereoset(write(tmp_path, content_of()))
    assert read.intersentence == local.intersentence
    assert read.intrasentence == local.intrasentence[:1]
    assert asked == [(module.HUB, part, "validation") for part in ("intrasentence", "intersentence")]

    def refuse(*_: Any, **__: Any) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(ValueError, match=r"the hub did not give McGill-NLP/stereoset .*no network.*local copy"):
        read_stereoset(None)


@pytest.mark.skipif(
    not (SHARED / "data/stereoset").is_dir(), reason="needs ../shared/data, which is not part of the project"
)
def test_the_real_file() -> None:
    read = read_stereoset(SHARED / "data")
    assert (len(read.intrasentence), len(read.intersentence)) == (2106, 2123)
    assert len({cluster.target for cluster in (*read.intrasentence, *read.intersentence)}) == 79
    assert all(find_word(cluster, sentence) for cluster in read.intrasentence for sentence in cluster.sentences)
