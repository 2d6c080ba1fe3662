"""Criteria: what a search reads no report reads, whatever the score; and which way a score is good."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import normalizers
from transformers import PreTrainedModel

from eckart.allocation.search.criteria import Criterion, check_apart, search_criterion
from eckart.evals.catalogue import EVALUATIONS, find_task, searched_by
from eckart.evals.task import Task
from tiny import PAD, tiny_model, tiny_text, tiny_tokenizer

# A task for every evaluation that a search may score by, of data that `data` writes.
SCORES = {
    "perplexity": "perplexity:wikitext2",
    "lm-eval": "lm-eval:piqa",
    "stereoset": "stereoset",
    "probing": "probing:cola",
    "classification": "classification:cola",
}
# The folders that some of them read.
SCORES_IN = {"stereoset": "stereoset", "lm-eval:piqa": "piqa", "probing:cola": "cola"}
COMPARED = ("divergence", "distance", "accumulation", "similarity")
REFUSED = {**{kind: f"{kind}:wikitext2" for kind in COMPARED}, "cost": "cost"}


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sentence(part: str, kind: str, label: str) -> dict[str, str]:
    return {"sentence": f"{part} {kind}", "gold_label": label}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a little of each, every item of its own words; two of CoLA's sentences are in both of its parts."""
    folder = tmp_path_factory.mktemp("data")
    (folder / "wikitext2").mkdir()
    (folder / "wikitext2" / "wiki.test.raw").write_text(tiny_text(160, seed=1))
    pairs = [{"question": tiny_text(4, n), "choices": ["w1 w2", "w3 w4"], "answer": n % 2} for n in range(20)]
    write(folder / "piqa" / "dev.jsonl", pairs)
    labelled = [{"text": tiny_text(5, 100 + n) + " w1" * (n % 2), "label": n % 2} for n in range(60)]
    write(folder / "cola" / "train.jsonl", labelled[:40])
    write(folder / "cola" / "dev.jsonl", labelled[38:])
    clusters = [
        {
            "target": f"t{n}",
            "bias_type": "race",
            "context": f"{tiny_text(3, 200 + n)} BLANK",
            "sentences": [
                sentence(tiny_text(3, 200 + n), f"w{4 + place}", label)
                for place, label in enumerate(("stereotype", "anti-stereotype", "unrelated"))
            ],
        }
        for n in range(10)
    ]
    parts = {"intrasentence": clusters[:5], "intersentence": clusters[5:]}
    (folder / "stereoset").mkdir()
    (folder / "stereoset" / "dev.json").write_text(json.dumps({"version": "1", "data": parts}))
    return folder


def rows_read(criterion: Criterion, model: PreTrainedModel) -> set[tuple[int, ...]]:
    """Every row of token ids that the model reads while it is scored, without padding; a start token alone is none."""
    rows: set[tuple[int, ...]] = set()

    def note(_module: Any, given: tuple[Any, ...]) -> None:
        for row in given[0].reshape(-1, given[0].shape[-1]).tolist():
            rows.add(tuple(token for token in row if token != PAD))

    with model.get_input_embeddings().register_forward_pre_hook(note):
        criterion(model)
    return {row for row in rows if len(row) > 1}


def criterion_of(name: str, model: PreTrainedModel, data: Path, *, others: bool) -> Criterion:
    return search_criterion(name, model, tiny_tokenizer(), others=others, data=data, context=8)


def test_every_evaluation_is_here() -> None:
    """A new row of the table belongs into one of these."""
    assert {*SCORES, *REFUSED} == EVALUATIONS.keys()
    assert {kind for kind, row in EVALUATIONS.items() if row.search} == SCORES.keys()


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] if kind == "probing" else []) for kind in SCORES]
)
def test_search_and_report_read_other_items(kind: str, data: Path) -> None:
    if kind == "lm-eval":
        pytest.importorskip("lm_eval")
    model = tiny_model("llama", "classifier" if kind == "classification" else None)
    first, second = (rows_read(criterion_of(SCORES[kind], model, data, others=o), model) for o in (False, True))
    assert first
    assert second
    assert not first & second


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_divided_is_no_score(kind: str) -> None:
    with pytest.raises(ValueError, match="no score to search by; there are perplexity:CORPUS"):
        searched_by(REFUSED[kind])


@pytest.mark.parametrize("kind", ["probing", "classification"])
@pytest.mark.parametrize("name", ["truthfulqa", "truthfulqa-iti"])
def test_a_set_of_one_split_is_refused(kind: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} has one split, which would be searched and reported on"):
        searched_by(f"{kind}:{name}")


def test_a_sentence_of_both_parts_is_not_searched_on(data: Path) -> None:
    """Two of 40 sentences are reported on, so 38 remain; the plain split has all of them."""
    model = tiny_model("llama", "classifier")
    assert len(rows_read(criterion_of("classification:cola", model, data, others=False), model)) == 38
    assert searched_by("classification:cola").split == "train-without-test"


def test_a_lower_score_is_better_where_it_is(data: Path) -> None:
    """A broken model has the higher perplexity, and the criterion says that lower is better."""
    model = tiny_model("llama")
    criterion = criterion_of("perplexity:wikitext2", model, data, others=False)
    assert criterion.better == "lower"
    with torch.no_grad():
        sharp = tiny_model("llama")
        sharp.get_output_embeddings().weight.mul_(30)
    before, after = criterion(model), criterion(sharp)
    assert before < after
    assert math.isfinite(after)


@pytest.mark.parametrize(
    ("score", "split", "task", "context"),
    [
        ("perplexity:wikitext2", None, Task("perplexity:wikitext2", split="sfsd-evaluation"), None),
        ("perplexity:wikitext2", None, Task("perplexity:wikitext2", split="sfsd-evaluation", length=64), 64),
        ("perplexity:wikitext2", None, Task("perplexity:wikitext2", split="validation"), None),
        ("perplexity:wikitext2", None, Task("divergence:wikitext2", split="sfsd-evaluation"), None),
        ("perplexity:wikitext2", None, Task("perplexity:ptb"), None),
        ("perplexity:wikitext2", None, Task("similarity:wikitext2"), None),
        ("perplexity:wikitext2", None, Task("cost"), None),
        ("perplexity:wikitext2", "validation", Task("perplexity:wikitext2"), None),
        ("perplexity:builtin", "train", Task("perplexity:builtin/prose"), None),
        ("perplexity:builtin/code", None, Task("perplexity:builtin/prose"), None),
        ("lm-eval:piqa", None, Task("lm-eval:piqa", split="sfsd-evaluation"), None),
        ("lm-eval:piqa", None, Task("lm-eval:arc_easy"), None),
        ("lm-eval:mmlu_anatomy", None, Task("lm-eval:mmlu", split="sfsd-evaluation"), None),
        ("stereoset", None, Task("stereoset", split="sfsd-evaluation"), None),
        ("probing:cola", None, Task("probing:cola"), None),
        ("probing:cola", None, Task("classification:cola"), None),
        ("probing:cola", None, Task("probing:sst2", split="train"), None),
    ],
)
def test_a_report_on_the_rest_is_fine(score: str, split: str | None, task: Task, context: int | None) -> None:
    check_apart(score, split, [Task("cost"), task], context=context)


@pytest.mark.parametrize(
    ("score", "split", "task", "message"),
    [
        ("perplexity:wikitext2", None, Task("perplexity:wikitext2"), "the split sfsd-evaluation"),
        ("perplexity:wikitext2", None, Task("perplexity:wikitext2", split="sfsd-search"), "sfsd-evaluation"),
        # Windows of another length are other windows: those of the one part lie across both parts of the other.
        ("perplexity:wikitext2", None, Task("perplexity:wikitext2", split="sfsd-evaluation", length=9), "no length"),
        ("perplexity:wikitext2", None, Task("divergence:wikitext2"), "the split sfsd-evaluation"),
        ("perplexity:wikitext2", "validation", Task("perplexity:wikitext2", split="validation"), "of validation"),
        ("perplexity:builtin", None, Task("perplexity:builtin/prose", split="sfsd-evaluation"), "of builtin itself"),
        ("perplexity:builtin", None, Task("perplexity:builtin", split="validation"), "the split sfsd-evaluation"),
        ("perplexity:piqa", None, Task("lm-eval:piqa"), "sfsd-evaluation"),
        ("lm-eval:piqa", None, Task("lm-eval:piqa"), "sfsd-evaluation"),
        ("lm-eval:piqa", None, Task("perplexity:piqa", split="sfsd-evaluation"), "measured on what the search"),
        ("lm-eval:mmlu_anatomy", None, Task("lm-eval:mmlu"), "sfsd-evaluation"),
        ("lm-eval:cola", None, Task("probing:cola"), "measured on what the search"),
        ("stereoset", None, Task("stereoset"), "sfsd-evaluation"),
        ("probing:cola", None, Task("probing:cola", split="train"), "the split test"),
        ("probing:cola", None, Task("classification:cola", split="train"), "the split test"),
    ],
)
def test_a_report_on_what_was_searched_on_is_refused(score: str, split: str | None, task: Task, message: str) -> None:
    assert find_task(task.name)
    with pytest.raises(ValueError, match=message):
        check_apart(score, split, [task])


@pytest.mark.parametrize("name", ["stereoset", "lm-eval:piqa", "probing:cola"])
def test_other_data_and_another_tokenizer_are_another_score(name: str, data: Path, tmp_path: Path) -> None:
    """By content: a journal of trials goes on with the same data in another place, and with no other."""
    copy = tmp_path / "copy"
    shutil.copytree(data, copy)

    def about(folder: Path) -> dict[str, Any]:
        return search_criterion(name, tiny_model("llama"), tokenizer, data=folder).about

    tokenizer = tiny_tokenizer()
    before = about(data)
    assert about(copy) == before
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    assert about(data) != before
    tokenizer = tiny_tokenizer()
    for file in (copy / SCORES_IN[name]).iterdir():
        file.write_text(file.read_text().replace("w4", "w5"))
    assert about(copy) != before


def test_a_file_that_was_rewritten_is_another_score(tmp_path: Path) -> None:
    file, model = tmp_path / "notes.txt", tiny_model("t5")
    kept = []
    for seed in (0, 1, 0):
        file.write_text("\n\n".join(tiny_text(200, seed=100 * seed + number) for number in range(30)))
        kept.append(search_criterion(f"perplexity:{file}", model, tiny_tokenizer(), context=16, limit=4).about)
    assert kept[0] != kept[1]
    assert kept[0] == kept[2]


def test_one_file_has_one_split(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("words")
    name = f"perplexity:{file}"
    check_apart(name, None, [Task(name, split="sfsd-evaluation")])
    with pytest.raises(ValueError, match="measured on what the search"):
        check_apart(name, None, [Task(name, split="validation")])
    with pytest.raises(ValueError, match="measured on what the search"):
        check_apart(name, None, [Task(f"perplexity:{tmp_path / '..' / tmp_path.name / 'text.txt'}")])
