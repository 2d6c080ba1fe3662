"""EvalResult: what one evaluation found, on what it was measured, and the outcome of every example."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from eckart.support.files import write_whole


@dataclass(frozen=True)
class Score:
    """One number beside the main one.

    Attributes:
        value: the number.
        stderr: its standard error in the same unit; None where there is none.
        n: examples that it is a mean over.
    """

    value: float
    stderr: float | None = None
    n: int = 1


@dataclass(frozen=True)
class EvalResult:
    """The outcome of one evaluation.

    Attributes:
        task: name and corpus, "perplexity:wikitext2".
        metric: what `value` is.
        value: the main number.
        stderr: its standard error, in the same unit; None for a single example.
        n: examples that it is a mean over.
        better: which way is good; None where neither is.
        settings: everything that changes the value.
        examples: outcome per example, for paired comparisons.
        scores: further numbers of the same evaluation by name, such as {"acc_norm": Score(0.41, 0.01, 1172)}.
        details: plain data for tables and figures: answers, histograms.

    Raises:
        ValueError: a value that is not a number; a broken model has no result.
    """

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    better: Literal["higher", "lower"] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    examples: list[float] = field(default_factory=list)
    scores: Mapping[str, Score] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in {self.metric: self.value, **{key: s.value for key, s in self.scores.items()}}.items():
            if math.isnan(value):
                raise ValueError(f"{self.task}: {name} is not a number; the model or its data is broken")

    def read(self, score: str | None = None) -> float:
        """The main value, or the score of that name; the main metric's name gives the main value, "n" the examples.

        Of scores that are numbered, "f1.-1" is the one with the highest number, "f1.-2" the one before it, and so on:
        the last layers of a model of any depth.

        Raises:
            ValueError: no such score (the message lists those there are).
        """
        if score is None or score == self.metric:
            return self.value
        if score == "n":
            return float(self.n)
        if score not in self.scores and (match := re.fullmatch(r"(.+)\.-(\d+)", score)):
            numbered = [name for name in self.scores if re.fullmatch(re.escape(match[1]) + r"\.\d+", name)]
            last = max((int(name.rpartition(".")[2]) for name in numbered), default=0)
            score = f"{match[1]}.{last + 1 - int(match[2])}"
        if score not in self.scores:
            raise ValueError(f"{self.task} has no score {score!r}; it has {', '.join([self.metric, *self.scores])}")
        return self.scores[score].value

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> EvalResult:
        data = json.loads(text)
        scores = {name: Score(**score) for name, score in data.pop("scores", {}).items()}
        return cls(**data, scores=scores)


def write_result(result: EvalResult, file: Path) -> None:
    """Write a result as JSON; the file appears whole or not at all."""
    write_whole(file, result.to_json())
