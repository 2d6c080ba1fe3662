"""Site facts: what compression.json says of one linear."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SiteFacts:
    """One compressible linear after compression.

    Attributes:
        block, role, part: where it is; "self_attn.q_proj" of the "attention" in block 3.
        shape: (d_out, d_in).
        rank: of its factors; None is dense.
        relative_error, tail: what the cut lost, as compression.json has it.
        spectrum: share of the loss that remains at evenly spaced ranks, 0 to min(d_out, d_in); empty if not stored.
        base, bits: of a quantised weight and of the factors; None where there is none, or in the model's type.
        kept: share of the weight's numbers that are stored, 1 where dense; of numbers in few bits that of its bytes,
            and of linears that share a right factor that of all of them. None where the file does not say it and the
            rank alone does not tell.
        tokens: share of the calibration text's tokens that an expert is given; None of other linears.
    """

    name: str
    block: int
    role: str
    part: str
    shape: tuple[int, int]
    rank: int | None
    relative_error: float | None
    tail: float | None
    spectrum: tuple[float, ...]
    base: int | None = None
    bits: int | None = None
    kept: float | None = None
    tokens: float | None = None

    @classmethod
    def of(cls, name: str, item: Mapping[str, Any], facts: Mapping[str, Any]) -> SiteFacts:
        """The linear of an entry of compression.json's "sites" that says where it is.

        Args:
            facts: the whole of compression.json.
        """
        return cls(
            name,
            int(item["block"]),
            str(item["role"]),
            str(item.get("part", "")),
            (int(item["shape"][0]), int(item["shape"][1])),
            item.get("rank"),
            item.get("relative_error"),
            item.get("tail"),
            tuple(item.get("spectrum") or ()),
            item.get("base"),
            item.get("bits"),
            _kept(item, facts),
            item.get("tokens"),
        )

    @property
    def expert(self) -> tuple[int, str] | None:
        """The number of the expert whose linear it is, and the linear's own name; None of other linears."""
        match = re.fullmatch(r".*experts\.(\d+)\.(\w+)", self.role)
        return None if match is None else (int(match[1]), match[2])

    @property
    def way(self) -> str:
        """In words, how it is kept: "dense", "rank 8 of 64", "4 bits and rank 8 in 8 bits"."""
        words = [] if self.base is None else [f"{self.base} bits"]
        if self.rank is not None:
            words.append(f"rank {self.rank} of {min(self.shape)}" + (f" in {self.bits} bits" if self.bits else ""))
        return " and ".join(words) or "dense"


def _kept(item: Mapping[str, Any], facts: Mapping[str, Any]) -> float | None:
    """The share of an entry; of an older file, which has none, r (d_out + d_in) / (d_out d_in), pivoted r² less.

    Such a file does not say which linears share a right factor, nor what each of them keeps then.
    """
    if item.get("kept") is not None:
        return float(item["kept"])
    rank, (d_out, d_in) = item.get("rank"), item["shape"]
    if rank is None:
        return 1.0
    if facts.get("joint"):
        return None
    return rank * (d_out + d_in - (rank if facts.get("layout") == "pivoted" else 0)) / (d_out * d_in)
