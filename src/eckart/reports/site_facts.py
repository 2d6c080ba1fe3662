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
        kept_bytes: of numbers in few bits, their bytes as a share of the dense weight's.
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
    kept_bytes: float | None = None
    tokens: float | None = None

    @classmethod
    def of(cls, name: str, item: Mapping[str, Any]) -> SiteFacts:
        """The linear of an entry of compression.json's "sites" that says where it is."""
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
            item.get("kept"),
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

    @property
    def kept(self) -> float:
        """Share of the weight's numbers that are stored: rank (d_out + d_in) / (d_out d_in), 1 where dense.

        Of numbers in few bits it is the share of its bytes.
        """
        if self.kept_bytes is not None:
            return self.kept_bytes
        d_out, d_in = self.shape
        return 1.0 if self.rank is None else self.rank * (d_out + d_in) / (d_out * d_in)
