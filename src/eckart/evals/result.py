"""EvalResult: what one evaluation measured, on what it was measured, and how its number is to be read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from eckart.support.files import write_whole
from eckart.support.html import html_table
from eckart.support.plain_data import parse_json, read_json

Better = Literal["higher", "lower"]
# The parts of a report. Results that have no part of their own are tasks.
SectionName = Literal[
    "perplexity",
    "tasks",
    "stereoset",
    "agreement",
    "divergence",
    "distance",
    "accumulation",
    "probing",
    "similarity",
    "cost",
]
# Where the weighted F1 of a probe is not above its control's by this much, a layer is no evidence (the probing paper).
CHECK = 0.2


@dataclass(frozen=True)
class Traits:
    """How the numbers of an evaluation are to be read, whatever its name is. Results carry them.

    Attributes:
        section: of the report.
        better: which way its value is good; None where neither is, or where the result says (lm-eval's tasks).
        counts: what a limit counts, "windows" of text or "documents"; None where it reads none.
        quality: whether the value says how good a model is at something, and is lost by compression.
        ratio: two values are compared by their ratio, as perplexities are, and not by their difference.
        of: which models are measured: "both" the dense and the compressed one, or only one of them.
        shown: further scores that are shown with the value.
    """

    section: SectionName = "tasks"
    better: Better | None = None
    counts: Literal["windows", "documents"] | None = "documents"
    quality: bool = True
    ratio: bool = False
    of: Literal["both", "dense", "compressed"] = "both"
    shown: tuple[str, ...] = ()


# By evaluation. They are here, and not in its row, because results that were written before results carried them are
# read by name. `evals.catalogue` has the rows; a new evaluation says its traits there.
TRAITS: dict[str, Traits] = {
    "perplexity": Traits("perplexity", "lower", "windows", ratio=True),
    "lm-eval": Traits(),
    "stereoset": Traits("stereoset", "higher", quality=False),
    "divergence": Traits("divergence", "lower", "windows", quality=False, of="compressed"),
    "distance": Traits("distance", "lower", "windows", quality=False, of="compressed"),
    "accumulation": Traits("accumulation", "lower", "windows", quality=False, of="compressed"),
    "similarity": Traits("similarity", None, "windows", quality=False, of="dense"),
    "probing": Traits("probing", "higher", quality=False, shown=("selectivity",)),
    "classification": Traits(better="higher"),
    "cost": Traits("cost", "lower", None, quality=False),
    "agreement": Traits("agreement", "lower", quality=False),
}


def traits_of(task: str) -> Traits:
    """What is known of a task by its name alone; a plain task's traits where it is none of TRAITS."""
    return TRAITS.get(task.partition(":")[0].partition("@")[0], Traits())


@dataclass(frozen=True)
class Score:
    """One number in addition to the main one.

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
        better: which way is good; None where neither is. Default: what the traits say.
        settings: everything that changes the value.
        examples: outcome per example, for paired comparisons.
        scores: further numbers of the same evaluation by name, such as {"acc_norm": Score(0.41, 0.01, 1172)}.
        details: plain data for tables and figures: answers, histograms; a `warning`.
        traits: how the value is to be read. Default, as of a file without them: what is known by the task's name.

    Raises:
        ValueError: a value that is not a number; a broken model has no result.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    better: Better | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    examples: list[float] = field(default_factory=list)
    scores: Mapping[str, Score] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)
    traits: Traits = None  # type: ignore[assignment]  # filled in below, so that it is never None

    def __post_init__(self) -> None:
        if self.traits is None:
            object.__setattr__(self, "traits", traits_of(self.task))
        if self.better is None:
            object.__setattr__(self, "better", self.traits.better)
        for name, value in {self.metric: self.value, **{key: s.value for key, s in self.scores.items()}}.items():
            if math.isnan(value):
                raise ValueError(f"{self.task}: {name} is not a number; the model or its data is broken")

    def __repr__(self) -> str:
        error = "" if self.stderr is None else f" \u00b1 {self.stderr:.2g}"
        return f"EvalResult({self.task}: {self.metric} {self.value:.6g}{error}, n = {self.n:,})"

    def _repr_html_(self) -> str:
        """What a notebook shows: the value and the other scores, with their errors."""
        scores = {self.metric: Score(self.value, self.stderr, self.n), **self.scores}
        rows = [
            [name, f"{each.value:.6g}", "" if each.stderr is None else f"{each.stderr:.2g}", f"{each.n:,}"]
            for name, each in scores.items()
        ]
        return html_table(self.task, ["metric", "value", "stderr", "n"], rows)

    @property
    def warning(self) -> str | None:
        """A line for people on what to do, where the value calls for it."""
        line = self.details.get("warning")
        return None if line is None else str(line)

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
    def from_json(cls, text: str, where: str = "the text") -> EvalResult:
        """The result that `to_json` wrote.

        Args:
            where: names the text in the message.

        Raises:
            ValueError: no JSON, or no result: a field is missing, unknown, or of another type.
        """
        return _result_of(parse_json(text, where), where)


_STORED: Final = TypeAdapter(EvalResult)


def _result_of(data: dict[str, Any], where: str) -> EvalResult:
    try:
        return _STORED.validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{where} is no result of an evaluation: {place}: {first['msg']}") from None


def read_result(file: Path) -> EvalResult:
    """The result in a file. Raises ValueError as `EvalResult.from_json` does, and OSError where there is none."""
    return _result_of(read_json(file), str(file))


def write_result(result: EvalResult, file: Path) -> None:
    """Write a result as JSON; the file appears whole or not at all."""
    write_whole(file, result.to_json())
