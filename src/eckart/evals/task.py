"""One evaluation to run, by name: "perplexity:wikitext2", "lm-eval:piqa", "stereoset", "cost"."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from eckart.evals.hidden_states import Pooling
from eckart.evals.probing import Control
from eckart.support.names import LONGEST, dashed, dashed_apart

# What a label commonly has behind its name, see `Task.label`.
MARKS = r"train|validation|sfsd-search|sfsd-evaluation|train-without-test|\d+|\d+-shot|last|cls|last-word"
# Ends of other files next to a result.
ENDS = (".dense", ".agreement")


@dataclass(frozen=True)
class Task:
    """One evaluation to run: what changes its value.

    Attributes:
        name: "<evaluation>:<corpus or task>", or "<evaluation>" for one that reads neither.
        split: of the corpus. Also "sfsd-search" (20 %) and "sfsd-evaluation" (the other 80 %): of a harness task's
            documents, of StereoSet's clusters, or of the windows of a corpus's test split; of those of another split
            "sfsd-search of validation". Of a labelled set also "train-without-test", what a search reads.
        column: field of the corpus that holds the text.
        length: window; None is the subject's context, 2048 by default, or the model's positions if fewer. Of `cost`:
            the length of the prompt.
        limit: windows, or examples, of the split read at most.
        shots: examples in front of each question; None is the task's own number.
        seed: draws those examples; of probing, the rows, and is the first of its seeds.
        leave_out_long: StereoSet leaves out, and counts, what is past the model's positions, instead of refusing.
        pooling, control, seeds: of probing, see `probing.probe`.
    """

    name: str
    split: str = "test"
    column: str | None = None
    length: int | None = None
    limit: int | None = None
    shots: int | None = None
    seed: int = 0
    leave_out_long: bool = False
    pooling: Pooling = "mean"
    control: Control = "text"
    seeds: int = 3

    def __post_init__(self) -> None:
        for name, least in (("length", 2), ("limit", 1), ("shots", 0), ("seeds", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{self.name}: {name} {value} is below {least}")

    @property
    def kind(self) -> str:
        """The evaluation."""
        return self.name.partition(":")[0]

    @property
    def argument(self) -> str:
        """The corpus or harness task; empty where there is none."""
        return self.name.partition(":")[2]

    @property
    def label(self) -> str:
        """The name, with what tells it from another reading of the same corpus: "lm-eval:piqa@sfsd-search"."""
        marks = [
            f"@{self.split}" if self.split != "test" else "",
            f"@{self.length}" if self.length is not None else "",
            f"@{self.shots}-shot" if self.shots is not None else "",
            f"@{self.pooling}" if self.pooling != "mean" else "",
            f"@{self.control}" if self.control != "text" else "",
        ]
        return self.name + "".join(marks)

    @property
    def slug(self) -> str:
        """A file name that no other label has: "lm-eval-piqa-sfsd-search".

        Of the labels that become the same with dashes, the one that the name is read as has it alone, and each other a
        digest behind it.
        """
        name = dashed(self.label)
        read_as = re.sub(rf"-(?=(?:{MARKS})(?:-|$))", "@", name)
        read_as = re.sub(r"^(lm-eval|[a-z]+)-", r"\1:", read_as)
        read_as = re.sub(r":builtin-(?=prose|code)", ":builtin/", read_as)
        plain = read_as == self.label and len(name) <= LONGEST and not name.endswith(ENDS)
        return name if plain else dashed_apart(self.label)


def check_distinct(tasks: Iterable[Task]) -> None:
    """Raises ValueError for two tasks whose results would be one file."""
    labels: dict[str, str] = {}
    for task in tasks:
        if task.slug in labels:
            both = " and ".join(dict.fromkeys(map(repr, (labels[task.slug], task.label))))
            raise ValueError(f"{both} would be written to one file, {task.slug}.json: leave one out")
        labels[task.slug] = task.label
