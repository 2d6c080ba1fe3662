"""Storage: in how many bits a linear's numbers are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from eckart.lowrank.codes import check_bits, stored_bytes

# Numbers that share a scale, where nothing else is said.
GROUP = 64


@dataclass(frozen=True)
class Storage:
    """In how many bits a linear's numbers are kept.

    Attributes:
        base: bits of a quantised weight, to which the factors, if there are any, are added; None for none.
        factors: bits of the factors; None for the model's own type.
        group: numbers that share a scale: of a row of the weight and of the right factor, of a column of the left one.

    Raises:
        ValueError: bits that there are no codes of, or too small a group.
    """

    base: int | None = None
    factors: int | None = None
    group: int = GROUP

    def __post_init__(self) -> None:
        for bits in (self.base, self.factors):
            if bits is not None:
                check_bits(bits, self.group)

    @property
    def is_plain(self) -> bool:
        """Whether all numbers are of the model's own type, as if nothing were said."""
        return self.base is None and self.factors is None

    def num_bytes(self, d_out: int, d_in: int, rank: int | None, itemsize: int) -> int:
        """Bytes of weights and scales of a linear. rank None: no factors; without a base it is dense.

        Args:
            itemsize: bytes of a number of the model's own type.
        """
        if rank is None and self.base is None:
            return d_out * d_in * itemsize
        total = 0 if self.base is None else stored_bytes(d_out, d_in, self.base, (1, self.group))
        if rank is None:
            return total
        if self.factors is None:
            return total + rank * (d_out + d_in) * itemsize
        left = stored_bytes(d_out, rank, self.factors, (self.group, 1))
        return total + left + stored_bytes(rank, d_in, self.factors, (1, self.group))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        values = {"base": self.base, "bits": self.factors}
        return {**{name: bits for name, bits in values.items() if bits is not None}, "group": self.group}

    @classmethod
    def from_dict(cls, written: Mapping[str, Any]) -> Storage:
        """The storage that `to_dict` wrote; other keys, as an entry of a rank map has, are not read.

        Raises:
            ValueError: as the class.
        """
        return cls(written.get("base"), written.get("bits"), written.get("group", GROUP))

    def __str__(self) -> str:
        words = [] if self.base is None else [f"int{self.base} weight"]
        words += [] if self.factors is None else [f"int{self.factors} factors"]
        return " and ".join(words) or "the model's type"


PLAIN = Storage()
