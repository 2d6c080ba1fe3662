"""Section: settings that somebody wrote down, checked by pydantic."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator


class Section(BaseModel):
    """Settings: unknown keys are refused, values do not change, and true and false are no numbers."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_value(cls, value: Any, info: ValidationInfo) -> Any:
        """Pydantic would take true for 1, and YAML reads `yes` and `on` as true."""
        types = set(_types(cls.model_fields[str(info.field_name)].annotation))
        if types & {int, float} and bool not in types:
            inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else [value]
            for one in inside:
                if isinstance(one, bool):
                    raise ValueError(f"expected a number, not {str(one).lower()}")
        return value


def _types(annotation: Any) -> Iterator[Any]:
    """The types that an annotation is made of."""
    yield annotation
    for inner in get_args(annotation):
        yield from _types(inner)
