"""A new evaluation is its function and its row: studies, searches, reports and pitfalls read it rightly from those.

The evaluation is one of which less is better, and nothing but its row says so.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eckart.evals.catalogue import EVALUATIONS, Evaluation, Searched
from eckart.evals.perplexity import perplexity
from eckart.evals.result import EvalResult, Traits
from eckart.evals.subject import Setup, Subject
from eckart.evals.task import Task
from eckart.evals.tasks import evaluate
from eckart.evals.texts import windows_of
from eckart.reports.pitfalls import relate
from eckart.reports.runs import read_runs
from eckart.reports.sizes import scores
from eckart.reports.tables import summary
from eckart.runs.experiment import run
from eckart.runs.how import How
from eckart.runs.ranks import make_score
from eckart.runs.recipe import parse_recipe
from eckart.runs.search import search_ranks
from eckart.runs.study import Study
from eckart.runs.workbench import Workbench
from reports.make_runs import make_probing_run, probing_result
from tiny import tiny_model, tiny_text, tiny_tokenizer


def surprise(subject: Subject, task: Task, setup: Setup) -> EvalResult:
    """Mean nats per token."""
    windows = windows_of(subject.model, subject.tokenizer, task, data=setup.data, context=subject.context)
    value = math.log(perplexity(subject.model, windows.flatten(), length=windows.shape[1]).value)
    return EvalResult(task.label, "nats", value, None, len(windows))


ROW = Evaluation(
    surprise,
    "mean nats per token",
    Traits(better="lower", counts="windows"),
    search=Searched("sfsd-search", "sfsd-evaluation"),
)


@pytest.fixture(autouse=True)
def row(monkeypatch: pytest.MonkeyPatch) -> None:
    """The row in the table."""
    monkeypatch.setitem(EVALUATIONS, "surprise", ROW)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, a calibration text and a text to measure on."""
    folder = tmp_path_factory.mktemp("new")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "train.txt").write_text(tiny_text(900, seed=1))
    (folder / "test.txt").write_text(tiny_text(300, seed=2))
    return folder


def recipe_keys(place: Path, **more: Any) -> dict[str, Any]:
    """A recipe that measures it."""
    return {
        "model": str(place / "model"),
        "context": 16,
        "calibration": {"corpus": str(place / "train.txt"), "samples": 8},
        "evaluate": [f"surprise:{place / 'test.txt'}"],
        **more,
    }


def test_a_study_limits_its_windows(place: Path) -> None:
    allocation = {"name": "surgical", "score": f"surprise:{place / 'test.txt'}"}
    study = Study.model_validate(
        {
            "title": "A study",
            "base": {**recipe_keys(place), "evaluate": [f"surprise:{place / 'test.txt'}", "cost"]},
            "columns": [f"surprise:{place / 'test.txt'}"],
            "runs": [{"method": "svd", "allocation": allocation}],
            "scales": {"small": {"limits": {"windows": 3, "documents": 99, "members": 98}}},
        }
    )
    ((_, _, recipe),) = study.at("small").recipes()
    assert [task.limit for task in recipe.tasks] == [3, None]
    assert recipe.allocation is not None
    assert recipe.allocation.limit == 3


def test_a_search_accepts_what_is_no_worse(place: Path) -> None:
    """Lower is no worse, on windows that the report on it does not read."""
    score = f"surprise:{place / 'test.txt'}"
    recipe = parse_recipe({**recipe_keys(place), "method": "svd", "allocation": {"name": "surgical", "score": score}})
    report = search_ranks(recipe, How())
    dense, trials = report.facts["dense_score"], report.facts["trials"]
    ranks = {name: rank for name, rank in report.facts["ranks"].items() if rank is not None}
    held = {trial["name"]: trial for trial in trials if ranks.get(trial["name"]) == trial["rank"]}
    assert held.keys() == ranks.keys()
    assert all((trial["score"] <= dense) == (trial in held.values()) for trial in trials)
    assert 0 < len(held) < len(trials)
    work = Workbench(recipe, tiny_model("llama"), tiny_tokenizer(), How())
    assert recipe.allocation is not None
    others = make_score(recipe.allocation, work.allocation_inputs(), others=True)
    assert (others.better, others.about["task"]["split"]) == ("lower", "sfsd-evaluation")
    assert report.dense == pytest.approx(others(work.model))


def test_tables_mark_the_lowest(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for method in ("svd", "asvd-i"):
        run(parse_recipe(recipe_keys(place, method=method, keep=0.5)), tmp_path / method, How())
    monkeypatch.undo()  # a report reads results, and no table of evaluations
    collection = read_runs([tmp_path])
    (task,) = collection.tasks()
    assert collection.tasks("tasks") == [task]
    assert all(not run.missing for run in collection.runs)
    table = summary(collection)
    number = next(place for place, column in enumerate(table.columns) if column.group == "Tasks")
    assert table.columns[number].label.endswith("↓")
    cells = [row[number] for row in table.rows if row[1].text != "dense"]
    values = [run.compressed[task].value for run in collection.of("model")]
    assert [cell.value for cell in cells] == values
    assert [cell.best for cell in cells] == [value == min(values) for value in values]


def test_figures_say_which_way_is_good(tmp_path: Path) -> None:
    chart = scores(read_runs([make_runs(tmp_path)]))
    assert chart is not None
    titles = [note.text for view in chart.views for note in view.figure.layout.annotations]
    assert titles == ["text: nats ↓"]


def test_pitfalls_count_a_rise_as_a_loss(tmp_path: Path) -> None:
    """Runs that lose selectivity and rise in surprise go together."""
    (relation,) = relate(read_runs([make_runs(tmp_path)]))
    assert (relation.score, relation.probing) == ("surprise:text nats", "probing:cola")
    assert sorted(point.loss for point in relation.points) == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert relation.pearson.value == pytest.approx(1.0)


def make_runs(folder: Path) -> Path:
    """Runs that lose selectivity as surprise rises."""
    for step in range(1, 5):
        results = {
            "surprise:text": (result_of(3.0), result_of(3.0 + step / 10)),
            "probing:cola": tuple(
                probing_result("probing:cola", [(0.6, 0.5), *[(0.9 - lost, 0.5)] * 4]) for lost in (0.0, step / 20)
            ),
        }
        make_probing_run(folder / str(step), keep=1 - step / 10, results=results)  # type: ignore[arg-type]
    return folder


def result_of(value: float) -> EvalResult:
    """As `evaluate` writes it."""
    return replace(EvalResult("surprise:text", "nats", value, 0.01, 20), traits=ROW.traits, better=ROW.traits.better)


def test_the_result_says_what_it_is(place: Path) -> None:
    (result,) = evaluate(tiny_model("llama"), tiny_tokenizer(), [f"surprise:{place / 'test.txt'}"], context=16)
    assert (result.better, result.traits) == ("lower", ROW.traits)
    assert json.loads(result.to_json())["traits"]["section"] == "tasks"
    assert EvalResult.from_json(result.to_json()) == result
