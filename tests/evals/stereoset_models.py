"""Tokenizers, clusters and a small encoder for the tests of StereoSet."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from eckart.evals.result import EvalResult
from eckart.evals.stereoset import Cluster, StereoSet
from tiny import BOS, CLS, SEP, SPECIALS, tiny_config, tiny_tokenizer

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
