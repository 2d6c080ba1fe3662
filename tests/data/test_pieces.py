"""Pieces of a text have the tokens of the whole text: of every kind of tokenizer, over random texts."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from eckart import load_tokenizer
from eckart.data import pieces as module
from eckart.data.corpora import Text
from eckart.data.encoding import encode
from eckart.data.pieces import EXPRESSIONS, PIECE, pieces, prefixes
from eckart.data.samples import sample_windows
from tiny import tiny_text, tiny_tokenizer

SAMPLE = [
    "The cat's hat, it sat on 12 mats; 1999 and 20000.",
    "Don't  stop\n\nnow \t(really) é ö ß 文字 の",
    "def f(x):\n    return x + 1  # aa bb aa bb the the he he",
] * 3
SPECIALS = ["<unk>", "<s>", "</s>", "<mask>"]


def trained(
    model: Any, normalizer: Any, pre_tokenizer: Any, *, size: int = 400, trainer: Callable[..., Any] | None = None
) -> PreTrainedTokenizerFast:
    inner = Tokenizer(model)
    if normalizer is not None:
        inner.normalizer = normalizer
    if pre_tokenizer is not None:
        inner.pre_tokenizer = pre_tokenizer
    more: dict[str, Any] = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()} if trainer is None else {}
    kind = trainer or trainers.BpeTrainer
    inner.train_from_iterator(SAMPLE, kind(vocab_size=size, special_tokens=SPECIALS, show_progress=False, **more))
    inner.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", bos_token="<s>", mask_token="<mask>")


def byte_level(expression: str | None = None, **options: Any) -> PreTrainedTokenizerFast:
    if expression is None:
        return trained(models.BPE(), None, pre_tokenizers.ByteLevel(**options))
    split = pre_tokenizers.Split(Regex(expression), "isolated")
    return trained(
        models.BPE(ignore_merges=True),
        normalizers.NFC(),
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]),
    )


def sentence_piece(front: bool = True, metaspace: str | None = None, split: bool = False, gemma: bool = False) -> Any:
    """A BPE over "▁": trained on words, as sentencepiece does it, then read as Llama's or Gemma's tokenizers are."""
    fitted = trained(models.BPE(), None, pre_tokenizers.Metaspace(), size=250, trainer=trainers.BpeTrainer)
    inner = fitted.backend_tokenizer
    steps = [normalizers.Prepend("▁")] if front else []
    if metaspace is None:
        inner.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
        inner.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous") if gemma else pre_tokenizers.Digits()
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=metaspace, split=split)
    inner.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", mask_token="<mask>")


TOKENIZERS: dict[str, Callable[[], Any]] = {
    "builtin": lambda: load_tokenizer("builtin"),
    "gpt2": lambda: byte_level(add_prefix_space=False),
    "roberta": lambda: byte_level(add_prefix_space=True),
    **{f"split {n}": partial(byte_level, e) for n, e in enumerate(sorted(EXPRESSIONS))},
    "llama": lambda: sentence_piece(),
    "gemma": lambda: sentence_piece(front=False, gemma=True),
    **{
        f"metaspace {scheme} {split}": partial(sentence_piece, False, scheme, split)
        for scheme in ("first", "always", "never")
        for split in (False, True)
    },
    "unigram": lambda: trained(
        models.Unigram(),
        None,
        pre_tokenizers.Metaspace(),
        trainer=lambda **o: trainers.UnigramTrainer(unk_token="<unk>", **o),
    ),
    "bert": lambda: trained(
        models.WordPiece(unk_token="<unk>"),
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        trainer=trainers.WordPieceTrainer,
    ),
    "words": lambda: tiny_tokenizer(),
}
_made: dict[str, Any] = {}


def tokenizer_of(name: str) -> Any:
    return _made.setdefault(name, TOKENIZERS[name]())


def in_pieces(text: str, tokenizer: Any, size: int) -> tuple[int, list[int], list[int]]:
    """(pieces, their ids, the whole's ids) with pieces of `size` characters."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "PIECE", size)
        count, ids = len(pieces(text, tokenizer)), encode(text, tokenizer).tolist()
    return count, ids, tokenizer(text, verbose=False)["input_ids"]


# Among them a ligature, an iota that NFKC makes a space and a mark, and a letter with its accent apart.
WORDS = [
    *["the", "cat's", "a", "B", "12", "2000", "é", "ﬁ", "文字", "ς", "İ", "²", "x́", "_", "▁", "don't", "w3"],
    chr(0x37A),
]
MARKS = [*" " * 4, "  ", "   ", "\n", " \n", "\n\n", "\t", ". ", ", ", "' "]
MARKS += ["\u00a0", "\u200b", "", "<mask>", " <s> "]


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=60, deadline=None)
@given(parts=st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from(MARKS)), max_size=40), size=st.integers(1, 12))
def test_pieces_have_the_tokens_of_the_whole(name: str, parts: list[tuple[str, str]], size: int) -> None:
    text = "".join(word + mark for word, mark in parts)
    _, ids, whole = in_pieces(text, tokenizer_of(name), size)
    assert ids == whole


@pytest.mark.parametrize("name", TOKENIZERS)
def test_long_texts_are_cut(name: str) -> None:
    generator = random.Random(0)
    text = "".join(generator.choice(WORDS) + generator.choice(MARKS) for _ in range(4000))
    count, ids, whole = in_pieces(text, tokenizer_of(name), 100)
    assert count > 20
    assert ids == whole


def test_only_a_long_text_is_cut() -> None:
    text = tiny_text(PIECE // 2)
    assert len(text) > PIECE
    parts = pieces(text, tiny_tokenizer())
    assert len(parts) == 2
    assert "".join(parts) == text
    assert pieces(text[:PIECE], tiny_tokenizer()) == [text[:PIECE]]
    assert pieces("w0" * PIECE, tiny_tokenizer()) == ["w0" * PIECE]  # nowhere to cut


def changed(tokenizer: Any, **parts: Any) -> Any:
    for name, value in parts.items():
        setattr(tokenizer.backend_tokenizer, name, value)
    return tokenizer


def crossing() -> Any:
    """A BPE with a merge across a space: "a b" may be one token."""
    vocabulary = {text: number for number, text in enumerate(["<unk>", "a", "b", "▁", "▁b", "a▁b"])}
    inner = Tokenizer(models.BPE(vocabulary, [("▁", "b"), ("a", "▁b")], unk_token="<unk>"))
    inner.normalizer = normalizers.Replace(" ", "▁")
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def with_token(**options: Any) -> Any:
    tokenizer = byte_level(add_prefix_space=False)
    tokenizer.add_tokens([AddedToken(**options)])
    return tokenizer


def gpt2_with(**parts: Any) -> Any:
    return changed(byte_level(add_prefix_space=False), **parts)


def words_and_first() -> Any:
    steps = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="first")]
    return changed(tiny_tokenizer(), pre_tokenizer=pre_tokenizers.Sequence(steps))


@pytest.mark.parametrize(
    "make",
    [
        crossing,
        lambda: gpt2_with(normalizer=normalizers.Strip()),
        lambda: gpt2_with(normalizer=normalizers.Replace(Regex(r"\s+"), " ")),
        lambda: gpt2_with(pre_tokenizer=pre_tokenizers.Split(Regex(r"\w+ \w+"), "isolated")),
        lambda: gpt2_with(pre_tokenizer=None),
        lambda: changed(sentence_piece(), pre_tokenizer=pre_tokenizers.WhitespaceSplit()),
        words_and_first,
        lambda: with_token(content="the cat", normalized=False),
        lambda: with_token(content="cat", rstrip=True),
    ],
)
def test_a_tokenizer_of_another_make_reads_the_whole(make: Callable[[], Any]) -> None:
    tokenizer = make()
    assert prefixes(tokenizer) is None
    text = "a b the cat sat " * 20
    count, ids, whole = in_pieces(text, tokenizer, 10)
    assert count == 1
    assert ids == whole


def test_a_token_that_is_added_later_is_seen() -> None:
    tokenizer = byte_level(add_prefix_space=False)
    assert prefixes(tokenizer) is False
    tokenizer.add_tokens([AddedToken("the cat", normalized=False)])
    assert prefixes(tokenizer) is None


def test_the_windows_of_a_long_text_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, text = load_tokenizer("builtin"), Text((" ".join(SAMPLE * 20),), "\n\n", {"corpus": "sample"})
    whole = sample_windows(text, tokenizer, samples=20, length=16)
    monkeypatch.setattr(module, "PIECE", 64)
    assert torch.equal(sample_windows(text, tokenizer, samples=20, length=16).ids, whole.ids)


def test_a_conversation_has_no_special_tokens_but_its_own() -> None:
    tokenizer = load_tokenizer("builtin")
    text = Text(("<s>one two",), "", {}, templated=True)
    assert encode(text, tokenizer).tolist().count(tokenizer.bos_token_id) == 1
    assert encode("one two", tokenizer)[0] == tokenizer.bos_token_id
