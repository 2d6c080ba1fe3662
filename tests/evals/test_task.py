"""Tasks: the file of a task's result is its own, and called as it always was where the name is a usual one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from eckart.evals.catalogue import EVALUATIONS
from eckart.evals.task import Task, check_distinct

USUAL: list[tuple[Task, str]] = [
    (Task("perplexity:wikitext2"), "perplexity-wikitext2"),
    (Task("perplexity:wikitext2", length=64), "perplexity-wikitext2-64"),
    (Task("perplexity:builtin"), "perplexity-builtin"),
    (Task("perplexity:builtin/prose", length=256), "perplexity-builtin-prose-256"),
    (Task("perplexity:my-notes.txt"), "perplexity-my-notes.txt"),
    (Task("divergence:c4", split="validation"), "divergence-c4-validation"),
    (Task("lm-eval:piqa"), "lm-eval-piqa"),
    (Task("lm-eval:piqa", split="sfsd-search"), "lm-eval-piqa-sfsd-search"),
    (Task("lm-eval:mmlu", split="sfsd-evaluation", shots=5), "lm-eval-mmlu-sfsd-evaluation-5-shot"),
    (Task("lm-eval:wmt16-de-en"), "lm-eval-wmt16-de-en"),
    (Task("probing:cola"), "probing-cola"),
    (Task("probing:cola", split="train", pooling="last"), "probing-cola-train-last"),
    (Task("probing:sst2", control="last-word"), "probing-sst2-last-word"),
    (Task("probing:sst2", split="train-without-test", pooling="cls"), "probing-sst2-train-without-test-cls"),
    (Task("stereoset", split="sfsd-search"), "stereoset-sfsd-search"),
    (Task("cost", length=64), "cost-64"),
    (Task("cost"), "cost"),
]
KINDS = st.sampled_from(sorted(EVALUATIONS))
# Few letters, so that names differ in little.
NAMES = st.text(st.sampled_from("ab64-@:/ .=散文é\n"), min_size=1, max_size=8) | st.sampled_from(
    ["builtin", "builtin/prose", "builtin-prose", "a@64", "a-64", "a@train", "a-train", "a.dense", "a.agreement"]
)
TASKS = st.builds(
    lambda kind, name, **fields: Task(f"{kind}:{name}", **fields),
    KINDS,
    NAMES | st.text(max_size=400),
    split=st.sampled_from(["test", "train", "prose", "a", "train-5", "sfsd-search"]),
    length=st.sampled_from([None, 5, 64]),
    shots=st.sampled_from([None, 5]),
    pooling=st.sampled_from(["mean", "last"]),
    control=st.sampled_from(["text", "last-word"]),
)


@pytest.mark.parametrize(("task", "slug"), USUAL, ids=lambda value: str(value))
def test_usual_names_are_as_they_were(task: Task, slug: str) -> None:
    assert task.slug == slug


@settings(deadline=None, max_examples=500)
@given(TASKS, TASKS)
@example(Task("perplexity:散文.txt"), Task("perplexity:代码.txt"))
@example(Task("perplexity:a/b.txt"), Task("perplexity:a-b.txt"))
@example(Task("perplexity:a-64"), Task("perplexity:a", length=64))
@example(Task("perplexity:builtin/prose"), Task("perplexity:builtin", split="prose"))
def test_two_labels_never_share_a_file(one: Task, other: Task) -> None:
    assert (one.slug == other.slug) == (one.label == other.label)
    ends = ("", ".dense", ".agreement")
    assert one.label == other.label or not {one.slug + end for end in ends} & {other.slug + end for end in ends}


@settings(deadline=None)
@given(TASKS)
def test_a_slug_is_one_file_name(task: Task) -> None:
    name = f"{task.slug}.agreement.json"
    assert Path(name).name == name
    assert name.isascii()
    assert name.isprintable()
    assert len(name) < 200
    assert not name.startswith((".", "-"))


def test_two_results_of_one_file_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_distinct([task for task, _ in USUAL])
    with pytest.raises(ValueError, match=r"^'cost' would be written to one file, cost\.json"):
        check_distinct([Task("cost"), Task("cost", seed=1)])
    same: Any = property(lambda _: "same")
    monkeypatch.setattr(Task, "slug", same)
    with pytest.raises(ValueError, match=r"'cost' and 'stereoset' would be written to one file, same\.json"):
        check_distinct([Task("cost"), Task("stereoset")])
