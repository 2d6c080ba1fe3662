"""Samples: text cut into windows, documents, halves or pairs of token ids, of one corpus or of a mixture."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from eckart.data.corpora import CORPORA, DEFAULT_SPLIT, Text, check_split, is_plain, read_text
from eckart.data.encoding import cut_on_the_right, encode, specials_of
from eckart.data.mixtures import interleaved, share_out
from eckart.data.tokens import Tokens

# How text becomes samples.
Cutting = Literal["windows", "documents", "halves", "pairs"]


def sample_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int = 0
) -> Tokens:
    """`samples` windows of `length` tokens drawn without overlap from the joined text: calibration of decoders.

    Raises:
        ValueError: fewer than `samples` windows in the text (the message has the numbers).
    """
    _positive(samples=samples, length=length)
    ids = _draw_windows(text, encode(text, tokenizer), samples, length, seed)
    source = {**text.source, "samples": samples, "length": length, "seed": seed, "cut": "windows"}
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool), source, tokenizer.mask_token_id)


def _draw_windows(
    text: Text, stream: Int[Tensor, "tokens"], samples: int, length: int, seed: int
) -> Int[Tensor, "samples length"]:
    """Windows of the text's tokens, drawn without overlap, in order. Raises ValueError where there are too few."""
    windows = len(stream) // length
    if windows < samples:
        raise ValueError(
            f"corpus {text.source.get('corpus')} has {len(stream)} tokens, {windows} windows of {length}; "
            f"{samples} were asked for: lower samples or length, or give more text"
        )
    numbers = sorted(random.Random(seed).sample(range(windows), samples))
    return stream[: windows * length].view(windows, length)[numbers]


def sample_documents(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int = 0
) -> Tokens:
    """`samples` documents, of each the first `length` tokens, padded: calibration of encoders, which read whole texts.

    A text file that is one document is split at its empty lines. Empty documents are skipped.

    Raises:
        ValueError: fewer than `samples` documents, or the tokenizer has no pad token.
    """
    _positive(samples=samples, length=length)
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token; set one, or calibrate on windows instead of documents")
    documents: Sequence[str] = text.documents
    if len(documents) == 1:
        documents = documents[0].split("\n\n")
    documents = [document for document in documents if document.strip()]
    if len(documents) < samples:
        raise ValueError(f"corpus {text.source.get('corpus')} has {len(documents)} documents; {samples} were asked for")
    numbers = sorted(random.Random(seed).sample(range(len(documents)), samples))
    with cut_on_the_right(tokenizer):
        batch = tokenizer(
            [documents[i] for i in numbers],
            truncation=True,
            max_length=length,
            padding=True,
            add_special_tokens=not text.templated,
            padding_side="right",  # on the left it would shift the positions of a model that counts from the start
            return_tensors="pt",
        )
    source = {**text.source, "samples": samples, "length": length, "seed": seed, "cut": "documents"}
    return Tokens(batch["input_ids"], batch["attention_mask"].bool(), source, tokenizer.mask_token_id)


def halve(
    rows: Int[Tensor, "windows content"], before: Sequence[int], after: Sequence[int]
) -> Int[Tensor, "windows length"]:
    """Windows of text as pairs: the first half is the source, the second the target, each between special tokens."""
    first, second = (torch.tensor([*ids], dtype=rows.dtype).expand(len(rows), -1) for ids in (before, after))
    source, target = rows.tensor_split(2, 1)
    return torch.cat([first, source, second, first, target, second], 1)


def half_content(length: int, before: Sequence[int], after: Sequence[int]) -> int:
    """How many tokens of text are in each half of a pair of `length` tokens.

    Raises:
        ValueError: none.
    """
    content = length // 2 - len(before) - len(after)
    if content < 1:
        raise ValueError(
            f"length {length}: a source and a target, each with {len(before) + len(after)} special tokens, do not fit; "
            "raise it"
        )
    return content


def sample_halves(
    text: Text, tokenizer: PreTrainedTokenizerBase, *, samples: int, length: int, seed: int = 0
) -> Tokens:
    """`samples` windows drawn without overlap from the joined text, their first halves sources, their second targets.

    Args:
        length: tokens of source and target together, each with the tokenizer's special tokens at its ends.

    Raises:
        ValueError: fewer than `samples` windows in the text (the message has the numbers).
    """
    before, after = specials_of(tokenizer)
    window = 2 * half_content(length, before, after)
    ids = halve(_draw_windows(text, encode(text, tokenizer), samples, window, seed), before, after)
    source = {**text.source, "samples": samples, "length": length, "seed": seed, "cut": "halves"}
    mask = torch.ones_like(ids, dtype=torch.bool)
    return Tokens(ids, mask, source, tokenizer.mask_token_id, split=ids.shape[1] // 2)


def sample_pairs(
    sources: Text,
    targets: Text,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int = 0,
) -> Tokens:
    """`samples` pairs of documents: of each what the encoder reads, and what the decoder is to predict.

    Args:
        sources, targets: with as many documents; those of one place belong together. Empty ones are skipped.
        length: tokens of source and target together; each is cut on the right at half of them, and padded.

    Raises:
        ValueError: fewer than `samples` pairs, numbers of documents that differ, or the tokenizer has no pad token.
    """
    if tokenizer.pad_token_id is None:
        raise ValueError("the tokenizer has no pad token, which pairs of different lengths need; set one")
    if len(sources.documents) != len(targets.documents):
        raise ValueError(
            f"corpus {sources.source.get('corpus')} has {len(sources.documents)} sources and "
            f"{len(targets.documents)} targets: give rows that have both"
        )
    whole = [
        pair for pair in zip(sources.documents, targets.documents, strict=True) if all(text.strip() for text in pair)
    ]
    if len(whole) < samples:
        raise ValueError(f"corpus {sources.source.get('corpus')} has {len(whole)} pairs; {samples} were asked for")
    half_content(length, *specials_of(tokenizer))
    drawn = [whole[number] for number in sorted(random.Random(seed).sample(range(len(whole)), samples))]
    options = {"truncation": True, "max_length": length // 2, "padding": True, "return_tensors": "pt"}
    with cut_on_the_right(tokenizer):
        read = tokenizer([source for source, _ in drawn], padding_side="right", **options)
        asked = tokenizer(text_target=[target for _, target in drawn], padding_side="right", **options)
    return Tokens(
        torch.cat([read["input_ids"], asked["input_ids"]], 1),
        torch.cat([read["attention_mask"], asked["attention_mask"]], 1).bool(),
        {**sources.source, "samples": samples, "length": length, "seed": seed, "cut": "pairs"},
        tokenizer.mask_token_id,
        split=read["input_ids"].shape[1],
    )


SAMPLERS = {"windows": sample_windows, "documents": sample_documents, "halves": sample_halves}


def read_tokens(
    corpus: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    seed: int = 0,
    cut: Cutting = "windows",
    split: str = DEFAULT_SPLIT,
    data: Path | None = None,
    column: str | None = None,
    target: str | None = None,
) -> Tokens:
    """`samples` samples of a corpus or of a mixture, "broad" or "wikitext2*2+c4", as `mixtures` shares them out.

    The samples of a mixture are interleaved: the first few are of all parts by their shares.

    Args:
        cut: see `sample_windows`, `sample_documents`, `sample_halves` and `sample_pairs`.
        split, data: see `read_text`. Of a mixture `data` has a folder for each known corpus, DATA/<corpus>/.
        column: see `read_text`. Of a mixture, a known corpus keeps its own where a part is none, and plain text has
            none.
        target: of pairs, the field with the target; `column` is the source's.

    Raises:
        ValueError: a target without pairs, or pairs without one; a split of files alone, or a column of plain text
            alone; what `read_text` and the cut raise, with the name of the part; fewer samples than parts.
    """
    _positive(samples=samples, length=length)
    if (target is None) == (cut == "pairs"):
        raise ValueError(
            "pairs need the field that holds the target (target)"
            if target is None
            else f"target {target!r} is for pairs of source and target, and the text is cut in {cut}: leave it out"
        )
    counts = share_out(corpus, samples)
    if len(counts) > 1 and data is not None:
        _check_folders(corpus, [part for part in counts if part in CORPORA], data, split)
    check_split(list(counts), split, DEFAULT_SPLIT)
    own_column = _columns(list(counts), column)
    drawn = []
    for part, count in counts.items():
        own = own_column[part]
        try:
            text = read_text(part, split=split, data=data, column=own, tokenizer=tokenizer)
            if target is None:
                drawn.append(SAMPLERS[cut](text, tokenizer, samples=count, length=length, seed=seed))
                continue
            _check_whole(part, text)
            answers = read_text(part, split=split, data=data, column=target, tokenizer=tokenizer)
            drawn.append(sample_pairs(text, answers, tokenizer, samples=count, length=length, seed=seed))
        except ValueError as error:
            if len(counts) == 1:
                raise
            raise ValueError(
                f"the mixture {corpus} lacks its part {part}: {error}. It is not made smaller: give what is missing, "
                "or calibrate on another text (--calibration NAME)"
            ) from error
    if len(drawn) == 1:
        return drawn[0]
    names = [tokens.source.get("corpus") for tokens in drawn]
    drawn = [  # files of one name in two folders: as they were asked for
        tokens if names.count(name) == 1 else replace(tokens, source={**tokens.source, "corpus": part})
        for tokens, name, part in zip(drawn, names, counts, strict=True)
    ]
    return functools.reduce(Tokens.__add__, drawn).take(torch.tensor(interleaved(list(counts.values()))))


def _columns(parts: Sequence[str], column: str | None) -> dict[str, str | None]:
    """{part: the field that is read of it}: of a mixture's parts those that have fields and no field of their own.

    Raises:
        ValueError: there is no such part.
    """
    if column is None or len(parts) == 1:
        return dict.fromkeys(parts, column)
    known = all(part in CORPORA for part in parts)
    read = {part: (known or part not in CORPORA) and not is_plain(part) for part in parts}
    if not any(read.values()):
        raise ValueError(f"no part of {'+'.join(parts)} has a field to choose: leave column {column!r} out")
    return {part: column if chosen else None for part, chosen in read.items()}


def _check_whole(part: str, text: Text) -> None:
    """Raises ValueError where the text has no fields that a target could be in, or rows of it were left out."""
    if is_plain(part):
        raise ValueError(f"{part} is plain text, which has no field for a target: leave target out, and it is halved")
    if "skipped" in text.source:
        raise ValueError(
            f"{part}: {text.source['skipped']} rows have no source, so which target is whose is not known: leave those "
            "rows out of the file"
        )


def _check_folders(corpus: str, parts: Sequence[str], data: Path, split: str) -> None:
    """Raises ValueError unless every part has a folder: without its own, one would read another's file in DATA."""
    missing = [part for part in parts if not (data / part).is_dir()]
    if missing:
        patterns = CORPORA[missing[0]].files
        wanted = ", ".join(patterns.get(split) or next(iter(patterns.values())))
        raise ValueError(
            f"the mixture {corpus} lacks its {'part' if len(missing) == 1 else 'parts'} {', '.join(missing)}: no "
            f"folder of that name in {data}. It is not made smaller: put its text there ({wanted} in "
            f"{data / missing[0]}), leave --data out to ask the hub, or calibrate on another text (--calibration NAME)"
        )


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} {value} is not positive")
