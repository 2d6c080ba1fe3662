"""Tokens: text cut into windows or documents of token ids, and the checks that a model can read them."""

from __future__ import annotations

import functools
import hashlib
import random
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from html import escape
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.corpora import BUILTIN, CORPORA, Text, read_text
from eckart.data.files import table_kind
from eckart.data.mixtures import interleaved, share_out
from eckart.data.pieces import pieces

# How text becomes samples.
Cutting = Literal["windows", "documents", "halves", "pairs"]


class Rows(NamedTuple):
    """Some samples, as a model reads them at a time.

    Attributes:
        ids, mask: (rows, length), as those of `Tokens`.
        split: of an encoder-decoder, how many columns the source has; those after it are the target's. Else None.
        sound: as that of `Tokens`.
    """

    ids: Int[Tensor, "rows length"]
    mask: Bool[Tensor, "rows length"]
    split: int | None = None
    sound: Float[Tensor, "rows ..."] | None = None

    def mask_of(self, *, source: bool) -> Bool[Tensor, "rows side"]:
        """The mask of the source or of the target; where there is but one text, of that."""
        if self.split is None:
            return self.mask
        return self.mask[:, : self.split] if source else self.mask[:, self.split :]

    def offered(self, *, source: bool) -> int:
        """Of what reads the source, the tokens of the target, by which losses are counted; 0 of all else."""
        return int(self.mask_of(source=False).sum()) if source and self.split is not None else 0


@dataclass(frozen=True)
class Tokens:
    """Token windows for calibration.

    Of an encoder-decoder a sample is a pair: the source, which the encoder reads, and after it the target, which the
    decoder is to predict. Both are padded, each to a width of its own.

    Attributes:
        ids: (samples, length) int64.
        mask: (samples, length), True for real tokens, False for padding.
        source: where the text came from and how it was cut.
        mask_token: the tokenizer's, where it has one; masked language models need it for their loss.
        part_of: (samples,) of a mixture: which of `source["parts"]` each sample is of; None is all of one text.
        split: of pairs, how many columns are the source's; None where samples are no pairs.
        sound: (samples, ...) features that a speech model's encoder reads in place of tokens; the source's columns are
            then the rows that it makes of them, with no ids.
    """

    ids: Int[Tensor, "samples length"]
    mask: Bool[Tensor, "samples length"]
    source: dict[str, Any] = field(default_factory=dict)
    mask_token: int | None = None
    part_of: Int[Tensor, "samples"] | None = None
    split: int | None = None
    sound: Float[Tensor, "samples ..."] | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        parts = self.parts
        of = parts[0]["corpus"] if len(parts) == 1 else f"{len(parts)} texts"
        return f"Tokens({len(self):,} samples of {self.ids.shape[1]:,}, {self.count:,} tokens of {of})"

    def _repr_html_(self) -> str:
        """What a notebook shows: a line for each text."""
        rows = [
            f"<tr><td>{escape(str(part['corpus']))}</td><td>{part['samples']:,}</td><td>{part['tokens']:,}</td></tr>"
            for part in self.parts
        ]
        head = "<tr><th>text</th><th>samples</th><th>tokens</th></tr>"
        return f"<table><caption>{escape(repr(self))}</caption>{head}{''.join(rows)}</table>"

    @property
    def count(self) -> int:
        """Real tokens."""
        return int(self.mask.sum())

    @property
    def digest(self) -> str:
        """A digest of the ids and the mask, so that another tokenizer, text, seed or cut has another digest."""
        split = "" if self.split is None else f" {self.split}"
        state = hashlib.sha256(f"{tuple(self.ids.shape)} {self.mask_token}{split}".encode())
        state.update(self.ids.numpy().tobytes())
        state.update(self.mask.numpy().tobytes())
        if self.sound is not None:
            state.update(self.sound.numpy().tobytes())
        return state.hexdigest()

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Of each text that it is drawn from: its name as "corpus", "samples", and real "tokens"."""
        sources = self.source.get("parts", [self.source])
        tokens = self.mask.sum(1)
        rows = [self._own_part == number for number in range(len(sources))]
        return [
            {"corpus": source.get("corpus"), "samples": int(own.sum()), "tokens": int(tokens[own].sum())}
            for source, own in zip(sources, rows, strict=True)
        ]

    @property
    def _own_part(self) -> Int[Tensor, "samples"]:
        return torch.zeros(len(self), dtype=torch.int64) if self.part_of is None else self.part_of

    def __add__(self, other: Tokens) -> Tokens:
        """Both, one after the other; the shorter rows are padded, of pairs the shorter sources and targets.

        Raises:
            ValueError: only one of them is made of pairs.
        """
        if (self.split is None, self.sound is None) != (other.split is None, other.sound is None):
            raise ValueError(
                "pairs of source and target cannot be joined with samples that are none, nor sound with text"
            )
        mine, others = (each.source.get("parts", [each.source]) for each in (self, other))
        sides = [
            [[rows] if each.split is None else rows.tensor_split([each.split], 1) for rows in (each.ids, each.mask)]
            for each in (self, other)
        ]
        widths = [max(first.shape[1], second.shape[1]) for first, second in zip(sides[0][0], sides[1][0], strict=True)]
        ids, mask = (
            torch.cat(
                [
                    torch.cat(
                        [
                            nn.functional.pad(side, (0, width - side.shape[1]))
                            for side, width in zip(both[at], widths, strict=True)
                        ],
                        1,
                    )
                    for both in sides
                ]
            )
            for at in (0, 1)
        )
        part_of = torch.cat([self._own_part, other._own_part + len(mine)])
        split = None if self.split is None else widths[0]
        sound = None if self.sound is None or other.sound is None else torch.cat([self.sound, other.sound])
        return Tokens(ids, mask, {"parts": [*mine, *others]}, self.mask_token, part_of, split, sound)

    def hold_out(self, share: float) -> tuple[Tokens, Tokens]:
        """(used, held out): the second is a share of the samples, at least one, evenly spread over all of them.

        Of a mixture it is spread over the parts, so that each gives its share of it, whatever the samples' order is.

        Raises:
            ValueError: the share is outside (0, 1), or there are fewer than two samples.
        """
        if not 0 < share < 1:
            raise ValueError(f"share {share} is outside (0, 1)")
        if len(self) < 2:
            raise ValueError("one sample cannot be both used and held out: give at least two")
        count = min(max(1, round(share * len(self))), len(self) - 1)
        by_part = self._own_part.argsort(stable=True)
        held_out = torch.zeros(len(self), dtype=torch.bool)
        held_out[by_part[[(2 * index + 1) * len(self) // (2 * count) for index in range(count)]]] = True
        used, aside = self.take(~held_out), self.take(held_out)
        return (
            replace(used, source={**self.source, "part": "used"}),
            replace(aside, source={**self.source, "part": "aside"}),
        )

    def take(self, rows: Tensor | slice) -> Tokens:
        """These samples."""
        part_of = None if self.part_of is None else self.part_of[rows]
        sound = None if self.sound is None else self.sound[rows]
        return replace(self, ids=self.ids[rows], mask=self.mask[rows], part_of=part_of, sound=sound)

    def shortened(self, length: int) -> Tokens:
        """Every sample cut at `length` tokens; of pairs source and target at half of them each."""
        if self.split is None:
            return replace(self, ids=self.ids[:, :length], mask=self.mask[:, :length])
        split, half = self.split, length // 2
        ids, mask = (
            torch.cat([side[:, :half] for side in rows.tensor_split([split], 1)], 1) for rows in (self.ids, self.mask)
        )
        return replace(self, ids=ids, mask=mask, split=min(half, split))

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """(ids, mask) in order, `size` rows at a time."""
        return list(zip(self.ids.split(size), self.mask.split(size), strict=True))

    def rows(self, size: int) -> list[Rows]:
        """The samples in order, `size` rows at a time."""
        batches = self.batches(size)
        sounds = [None] * len(batches) if self.sound is None else self.sound.split(size)
        return [Rows(*batch, self.split, sound) for batch, sound in zip(batches, sounds, strict=True)]


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
    """`samples` documents, each cut at `length` tokens and padded: calibration of encoders, which read whole texts.

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
    batch = tokenizer(
        [documents[i] for i in numbers],
        truncation=True,
        max_length=length,
        padding=True,
        add_special_tokens=not text.templated,
        padding_side="right",  # on the left it would shift the positions of a model that counts them from the start
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
        length: tokens of source and target together; each is cut at half of them, and padded.

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
    split: str = "train",
    data: Path | None = None,
    column: str | None = None,
    target: str | None = None,
) -> Tokens:
    """`samples` samples of a corpus or of a mixture, "broad" or "wikitext2*2+c4", as `mixtures` shares them out.

    The samples of a mixture are interleaved: the first few are of all parts by their shares.

    Args:
        cut: see `sample_windows`, `sample_documents`, `sample_halves` and `sample_pairs`.
        split, data: see `read_text`. Of a mixture `data` has a folder for each known corpus, DATA/<corpus>/.
        column: see `read_text`. Of a mixture, a known corpus keeps its own where a part is none.
        target: of pairs, the field with the target; `column` is the source's.

    Raises:
        ValueError: a target without pairs, or pairs without one; what `read_text` and the cut raise, with the name of
            the part; fewer samples than parts.
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
    known = all(part in CORPORA for part in counts)
    drawn = []
    for part, count in counts.items():
        own = column if known or part not in CORPORA else None
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


def _check_whole(part: str, text: Text) -> None:
    """Raises ValueError where the text has no fields that a target could be in, or rows of it were left out."""
    if part == BUILTIN or part.startswith(f"{BUILTIN}/") or (Path(part).is_file() and table_kind(Path(part)) is None):
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


def encode(text: Text | str, tokenizer: PreTrainedTokenizerBase) -> Int[Tensor, "tokens"]:
    """The text as one stream of tokens, with the tokenizer's own special tokens at its ends.

    A conversation that a chat template wrote out has its special tokens already. A long text is read in pieces where
    that gives the same tokens (see `pieces`): a tokenizer's own record of a token is some hundred bytes.
    """
    whole, specials = (text, True) if isinstance(text, str) else (text.joined, not text.templated)
    parts = pieces(whole, tokenizer)
    # verbose=False: the warning that the stream is longer than the model's window is meant for other uses.
    if len(parts) == 1:
        ids = tokenizer(whole, add_special_tokens=specials, verbose=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)
    before, after = specials_of(tokenizer) if specials else ([], [])
    read = (tokenizer(part, add_special_tokens=False, verbose=False)["input_ids"] for part in parts)
    return torch.cat([torch.tensor(ids, dtype=torch.int64) for ids in (before, *read, after)])


def specials_of(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a text."""
    example = tokenizer("a", return_special_tokens_mask=True, verbose=False)
    ids, mask = example["input_ids"], example["special_tokens_mask"]
    first, last = mask.index(0), len(mask) - mask[::-1].index(0)
    return ids[:first], ids[last:]


def check_vocabulary(model: PreTrainedModel, ids: Tensor, tokenizer: PreTrainedTokenizerBase | None = None) -> int:
    """The number of tokens that the model knows; checks that `ids` are among them.

    A tokenizer may know more, such as the image token of a model that was taken out of a larger one: what counts is
    which ids occur.

    Args:
        tokenizer: for the message, which then has the token's text as well.

    Raises:
        ValueError: an id is outside the model's embedding: the tokenizer is another model's, or has tokens added.
    """
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    largest = int(ids.max())
    if largest >= vocabulary:
        text = "" if tokenizer is None else f" ({tokenizer.convert_ids_to_tokens(largest)!r})"
        raise ValueError(
            f"token {largest}{text} is outside the model's vocabulary of {vocabulary}; is it another model's tokenizer?"
        )
    return vocabulary


def warn_of_tokenizer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Warns where the tokenizer may be another model's.

    Most embeddings are padded by a few percent at most, so one of which the tokenizer uses less than four fifths may
    have been made for another. Some were meant to be so large; nothing in the files tells the two apart.
    """
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    known = 1 + max(tokenizer.get_vocab().values())
    if known < 0.8 * vocabulary:
        warnings.warn(
            f"the tokenizer knows {known} tokens and {type(model).__name__} {vocabulary}: if it is another model's, "
            "every number is wrong; the model's own belongs into its directory",
            stacklevel=2,
        )


def _positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} {value} is not positive")
