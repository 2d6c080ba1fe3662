"""Sections: true and false are no numbers, wherever a number is expected."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from eckart.support.section import Section


class Some(Section):
    share: float = 1
    count: int | None = None
    on: bool = False
    either: bool | float = 0
    weights: dict[str, float] | None = None
    counts: list[int] | None = None


@pytest.mark.parametrize(
    "settings", [{"share": True}, {"count": False}, {"weights": {"a": True}}, {"counts": [1, False]}]
)
def test_a_truth_value_is_no_number(settings: dict[str, object]) -> None:
    with pytest.raises(ValidationError, match=r"expected a number, not (true|false)"):
        Some(**settings)  # type: ignore[arg-type]


def test_a_truth_value_where_one_is_expected() -> None:
    made = Some(on=True, either=True, share=1, weights={"a": 1})
    assert (made.on, made.either, made.share) == (True, True, 1)
