"""EvalResult: one number, what it was measured on, and the outcome of every example."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class EvalResult:
    """The outcome of one evaluation.

    Attributes:
        task: name and corpus, "perplexity:wikitext2".
        metric: what `value` is.
        value: the result.
        stderr: its standard error, in the same unit; None for a single example.
        n: examples that it is a mean over.
        settings: everything that changes the value.
        examples: outcome per example, for paired comparisons.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    settings: dict[str, Any] = field(default_factory=dict)
    examples: list[float] = field(default_factory=list)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> EvalResult:
        return cls(**json.loads(text))
