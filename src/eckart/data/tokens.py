"""Tokens: samples of token ids, as calibration holds them and as a model reads them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Rows(NamedTuple):
    """Some samples, as a model reads them at a time.

    Attributes:
        ids, mask: (rows, length), as those of `Tokens`.
        split: of an encoder-decoder, how many columns the source has; those after it are the target's. Else None.
        sound: as that of `Tokens`.
        first: the number of the first of them in the text.
    """

    ids: Int[Tensor, "rows length"]
    mask: Bool[Tensor, "rows length"]
    split: int | None = None
    sound: Float[Tensor, "rows ..."] | None = None
    first: int = 0

    @property
    def content(self) -> tuple[Tensor, Tensor, int | None, Tensor | None]:
        """The ids, the mask, the split and the sound: all but the place in the text."""
        return self.ids, self.mask, self.split, self.sound

    def mask_of(self, *, source: bool) -> Bool[Tensor, "rows side"]:
        """The mask of the source or of the target; where there is but one text, of that."""
        return self.side_of(self.mask, source=source)

    def side_of(self, whole: Tensor, *, source: bool) -> Tensor:
        """The columns of the source or of the target; where there is but one text, all."""
        if self.split is None:
            return whole
        return whole[:, : self.split] if source else whole[:, self.split :]

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
        return [
            Rows(*batch, self.split, sound, size * number)
            for number, (batch, sound) in enumerate(zip(batches, sounds, strict=True))
        ]

    def places(self, rows: Rows, *, source: bool) -> Int[Tensor, "n"]:
        """Where the tokens of some samples are among all places of the text, (samples length), row by row.

        Args:
            rows: of this text, with or without its padding. source: of pairs, those of the source or of the target.
        """
        own = self.mask[rows.first : rows.first + len(rows.ids)].clone()
        if self.split is not None:
            own[:, self.split :] &= not source
            own[:, : self.split] &= source
        return rows.first * self.ids.shape[1] + own.flatten().nonzero()[:, 0]
