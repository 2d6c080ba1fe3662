"""Tokens, and the tokenizer that made them: batches, sums, whether they are the model's."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from tokenizers.processors import TemplateProcessing

from eckart.data.encoding import check_vocabulary, encode, warn_of_tokenizer
from tiny import BOS, EOS, VOCABULARY, tiny_model, tiny_tokenizer, tiny_tokens


def test_batches_are_all_rows_in_order() -> None:
    tokens = tiny_tokens(7, 5, padded=True)
    batches = tokens.batches(3)
    assert [len(ids) for ids, _ in batches] == [3, 3, 1]
    assert torch.equal(torch.cat([ids for ids, _ in batches]), tokens.ids)
    assert torch.equal(torch.cat([mask for _, mask in batches]), tokens.mask)
    assert len(tokens) == 7


def test_tokens_add_and_the_shorter_are_padded() -> None:
    long, short = tiny_tokens(2, 8), tiny_tokens(3, 5, seed=1)
    both = short + long + short
    assert both.ids.shape == (8, 8)
    assert both.count == short.count * 2 + long.count
    assert torch.equal(both.ids[3:5], long.ids)
    assert torch.equal(both.ids[:3, :5], short.ids)
    assert not both.mask[:3, 5:].any()
    assert both.source == {"parts": [short.source, long.source, short.source]}


def test_encode_keeps_the_tokenizers_specials() -> None:
    tokenizer = tiny_tokenizer()
    assert encode("w0 w1", tokenizer).tolist() == [7, 8]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    assert encode("w0 w1", tokenizer).tolist() == [BOS, 7, 8, EOS]


def test_check_vocabulary() -> None:
    model = SimpleNamespace(get_input_embeddings=lambda: torch.nn.Embedding(10, 2))
    assert check_vocabulary(model, torch.tensor([[0, 9]])) == 10  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="token 10 is outside the model's vocabulary of 10"):
        check_vocabulary(model, torch.tensor([[0, 10]]))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"token 10 \('w3'\) is outside the model's vocabulary of 10"):
        check_vocabulary(model, torch.tensor([[0, 10]]), tiny_tokenizer())  # type: ignore[arg-type]


@pytest.mark.parametrize(("vocabulary", "fits"), [(VOCABULARY, True), (112, True), (121, False), (90, True)])
def test_a_tokenizer_that_leaves_much_of_the_embedding_unused_is_warned_of(vocabulary: int, fits: bool) -> None:
    model = tiny_model("llama", vocab_size=vocabulary)
    if fits:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warn_of_tokenizer(model, tiny_tokenizer())
    else:
        with pytest.warns(UserWarning, match=f"the tokenizer knows 96 tokens and LlamaForCausalLM {vocabulary}"):
            warn_of_tokenizer(model, tiny_tokenizer())
