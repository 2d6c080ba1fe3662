"""Samples: text becomes windows of one length, or documents that are cut and padded."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from eckart.data.corpora import Text
from eckart.data.samples import sample_documents, sample_pairs, sample_windows
from tiny import PAD, tiny_tokenizer

# Windows


class Numbers:
    """A tokenizer of whole numbers, so that every token says where in the text it stood."""

    mask_token_id = None
    is_fast = False

    def __call__(self, text: str, verbose: bool = True, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}


def numbers(count: int) -> Text:
    return Text((" ".join(map(str, range(count))),), "\n\n", {"corpus": "numbers"})


def test_windows_are_whole_stretches_without_overlap() -> None:
    tokens = sample_windows(numbers(1000), Numbers(), samples=17, length=30, seed=3)  # type: ignore[arg-type]
    assert tokens.ids.shape == tokens.mask.shape == (17, 30)
    assert tokens.ids.dtype == torch.int64
    assert tokens.mask.all()
    assert torch.equal(tokens.ids - tokens.ids[:, :1], torch.arange(30).expand(17, 30))
    assert (tokens.ids[:, 0] % 30 == 0).all()
    assert len(tokens.ids.unique()) == 17 * 30
    assert tokens.count == 17 * 30
    assert tokens.source == {"corpus": "numbers", "samples": 17, "length": 30, "seed": 3, "cut": "windows"}


def test_the_seed_decides() -> None:
    def drawn(seed: int) -> set[int]:
        return set(
            sample_windows(numbers(5000), cast(Any, Numbers()), samples=20, length=10, seed=seed).ids[:, 0].tolist()
        )

    assert drawn(0) == drawn(0)
    assert len({frozenset(drawn(seed)) for seed in range(5)}) == 5
    # drawn from the whole text, not from its head
    assert min(drawn(0)) < 1500
    assert max(drawn(0)) > 3500


def test_all_windows_may_be_asked_for() -> None:
    tokens = sample_windows(numbers(105), Numbers(), samples=10, length=10)  # type: ignore[arg-type]
    assert torch.equal(tokens.ids.flatten(), torch.arange(100))


def test_too_few_windows_give_the_numbers() -> None:
    with pytest.raises(ValueError, match="numbers has 105 tokens, 10 windows of 10; 11 were asked for"):
        sample_windows(numbers(105), Numbers(), samples=11, length=10)  # type: ignore[arg-type]


@pytest.mark.parametrize("sample", [sample_windows, sample_documents])
def test_sizes_are_positive(sample: Any) -> None:
    with pytest.raises(ValueError, match="samples 0 is not positive"):
        sample(numbers(10), tiny_tokenizer(), samples=0, length=5)
    with pytest.raises(ValueError, match="length -1 is not positive"):
        sample(numbers(10), tiny_tokenizer(), samples=1, length=-1)


def test_documents_run_on_across_windows() -> None:
    text = Text(("0 1 2", "3 4", "5 6 7"), " ", {"corpus": "rows"})
    assert sample_windows(text, cast(Any, Numbers()), samples=2, length=4).ids.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]


# Documents

ROWS = ("w0 w1 w2", "", "w3", "w4 w5 w6 w7 w8 w9", "  \n")


@pytest.mark.parametrize("side", ["left", "right"])
def test_documents_are_cut_padded_on_the_right_and_masked(side: str) -> None:
    tokenizer = tiny_tokenizer(padding_side=side, truncation_side=side)
    tokens = sample_documents(Text(ROWS, "\n", {"corpus": "rows"}), tokenizer, samples=3, length=4)
    assert tokens.ids.tolist() == [[7, 8, 9, PAD], [10, PAD, PAD, PAD], [11, 12, 13, 14]]
    assert tokens.mask.dtype == torch.bool
    assert torch.equal(tokens.mask, tokens.ids != PAD)
    assert tokens.count == 8
    assert tokens.mask_token == tokenizer.mask_token_id
    assert tokens.source == {"corpus": "rows", "samples": 3, "length": 4, "seed": 0, "cut": "documents"}


@pytest.mark.parametrize("side", ["left", "right"])
def test_pairs_are_cut_on_the_right(side: str) -> None:
    tokenizer, text = tiny_tokenizer(padding_side=side, truncation_side=side), Text(ROWS, "\n", {})
    tokens = sample_pairs(text, text, tokenizer, samples=3, length=8)
    assert tokens.ids.tolist() == [
        [7, 8, 9, PAD, 7, 8, 9, PAD],
        [10, PAD, PAD, PAD, 10, PAD, PAD, PAD],
        [11, 12, 13, 14, 11, 12, 13, 14],
    ]
    assert tokenizer.truncation_side == side


def test_a_file_of_paragraphs_is_split_at_empty_lines() -> None:
    text = Text(("w0 w1\n\nw2\n\n\n\nw3 w4\n",), "\n\n", {})
    assert sample_documents(text, tiny_tokenizer(), samples=3, length=8).ids.tolist() == [[7, 8], [9, PAD], [10, 11]]


def test_the_seed_draws_documents() -> None:
    text = Text(tuple(f"w{number}" for number in range(60)), "\n", {})
    drawn = [sample_documents(text, tiny_tokenizer(), samples=9, length=4, seed=s).ids.flatten() for s in (0, 0, 1)]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    assert len(drawn[0].unique()) == 9


def test_too_few_documents_give_the_numbers() -> None:
    with pytest.raises(ValueError, match="rows has 3 documents; 4 were asked for"):
        sample_documents(Text(ROWS, "\n", {"corpus": "rows"}), tiny_tokenizer(), samples=4, length=4)


def test_documents_need_a_pad_token() -> None:
    with pytest.raises(ValueError, match="the tokenizer has no pad token"):
        sample_documents(Text(ROWS, "\n", {}), tiny_tokenizer(pad_token=None), samples=1, length=4)
