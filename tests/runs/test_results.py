"""A folder of results: a stopped `eval` goes on with what is missing, and never shows results of something else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file

import eckart
from eckart.evals.result import EvalResult, read_result
from eckart.evals.task import Task
from eckart.runs.results import ASKED, open_results
from eckart.support.plain_data import read_yaml
from tiny import Run, tiny_model, tiny_text, tiny_tokenizer


@pytest.fixture
def place(tmp_path: Path) -> Path:
    eckart.save(tiny_model("llama"), tmp_path / "model", tiny_tokenizer())
    for seed, name in enumerate(("a.txt", "b.txt")):
        (tmp_path / name).write_text(tiny_text(300, seed=seed))
    return tmp_path


def evaluate(run: Run, place: Path, *more: str) -> tuple[int, str]:
    tasks = [word for name in ("a.txt", "b.txt") for word in ("--task", f"perplexity:{place / name}")]
    return run("eval", place / "model", *tasks, "--length", "16", "--out", place / "out", *more)


def results_in(place: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted((place / "out").glob("*.json"))}


def test_a_stopped_evaluation_goes_on_with_what_is_missing(run: Run, place: Path) -> None:
    status, printed = evaluate(run, place)
    assert status == 0, printed
    whole = results_in(place)
    first, second = whole
    (place / "out" / second).unlink()
    kept = (place / "out" / first).stat().st_mtime_ns
    status, printed = evaluate(run, place)
    assert status == 0, printed
    assert "1 of 2 are there already" in printed
    assert results_in(place) == whole
    assert (place / "out" / first).stat().st_mtime_ns == kept
    for name in whole:
        assert f"{read_result(place / 'out' / name).value:.4f}" in printed


@pytest.mark.parametrize("what", ["weights", "text", "limit", "dtype", "note"])
def test_results_of_something_else_are_refused_and_named(run: Run, place: Path, what: str) -> None:
    status, printed = evaluate(run, place)
    assert status == 0, printed
    before, more = results_in(place), []
    if what == "weights":
        file = place / "model" / "model.safetensors"
        save_file({name: 1.5 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
        (place / "model" / "digests.json").unlink()
        told = "model.safetensors is changed"
    elif what == "text":
        (place / "b.txt").write_text(tiny_text(300, seed=7))
        told = "b.txt is changed"
    elif what == "limit":
        more, told = ["--limit", "2"], "limit was None and is 2"
    elif what == "dtype":
        more, told = ["--dtype", "bfloat16"], "dtype was 'auto' and is 'bfloat16'"
    else:
        (place / "out" / ASKED).unlink()
        told = "there is no note of what it was asked for"
    status, printed = evaluate(run, place, *more)
    assert status == 2
    assert told in printed
    assert "give another --out, or --force" in printed
    assert results_in(place) == before
    status, printed = evaluate(run, place, *more, "--force")
    assert status == 0, printed
    assert (results_in(place) == before) == (what == "note")


def values_in(folder: Path) -> list[float]:
    return sorted(read_result(file).value for file in folder.glob("*.json"))


def test_texts_of_like_names_have_results_of_their_own(run: Run, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value is that of the text alone, at the first time and where the results are there already."""
    monkeypatch.chdir(place)
    names = ("散文.txt", "代码.txt", "a/b.txt", "a-b.txt")
    Path("a").mkdir()
    for seed, name in enumerate(names):
        Path(name).write_text(tiny_text(300, seed=seed))
    tasks = [f"perplexity:{name}" for name in names]
    for number, task in enumerate(tasks):
        status, printed = run("eval", "model", "--task", task, "--length", "16", "--out", f"alone/{number}")
        assert status == 0, printed
    alone = [value for number in range(len(names)) for value in values_in(Path("alone") / str(number))]
    assert len(set(alone)) == len(names)
    recipe = {"model": "model", "keep": 1, "context": 16, "evaluate": tasks}
    Path("recipe.yaml").write_text(yaml.safe_dump(recipe, allow_unicode=True), encoding="utf-8")
    options = [word for task in tasks for word in ("--task", task)]
    for _ in range(2):
        status, printed = run("eval", "model", *options, "--length", "16", "--out", "out")
        assert status == 0, printed
        places = [printed.index(f"{value:.4f}") for value in alone]
        assert places == sorted(places)
        assert values_in(Path("out")) == sorted(alone)
        status, printed = run("run", "recipe.yaml", "--out", "whole")
        assert status == 0, printed
        assert values_in(Path("whole/evals")) == sorted(alone)


def test_a_task_that_is_given_twice_is_refused(run: Run, place: Path) -> None:
    task = f"perplexity:{place / 'a.txt'}"
    status, printed = run("eval", place / "model", "--task", task, "--task", task)
    assert status == 2
    assert "leave one out" in printed


def test_nothing_is_kept_nowhere(tmp_path: Path) -> None:
    task = Task("perplexity:builtin/prose")
    result = EvalResult(task.name, "perplexity", 2.0, None, 1)
    with open_results(None, [task], {}, models=["builtin"]) as (results, kept):
        results.write(task, result)
        assert kept == {}
        assert results.find(task) is None


def test_a_result_is_never_without_its_note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two writes, the task is measured again."""
    task = Task("perplexity:builtin/prose")
    out = tmp_path / "out"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with open_results(out, [task], {}, models=["builtin"]) as (results, _):
        monkeypatch.setattr("eckart.runs.results.write_result", killed)
        with pytest.raises(KeyboardInterrupt):
            results.write(task, EvalResult(task.name, "perplexity", 2.0, None, 1))
    assert (out / ASKED).is_file()
    with open_results(out, [task], {}, models=["builtin"]) as (_, kept):
        assert kept == {}


@pytest.mark.parametrize("first", ["folder", "hub"])
def test_a_set_of_a_folder_is_not_the_hubs(tmp_path: Path, first: str) -> None:
    """Nor the other way round; a note of an older eckart, which does not tell them apart, is believed."""
    (tmp_path / "data/ptb").mkdir(parents=True)
    (tmp_path / "data/ptb/ptb.test.txt").write_text(tiny_text(300))
    out, task = tmp_path / "out", Task("perplexity:ptb")
    places = {"folder": tmp_path / "data", "hub": None}
    names = {"folder": r"ptb\.test\.txt", "hub": "its copy on the hub"}
    before = places.pop(first)
    ((_, now),) = places.items()
    with open_results(out, [task], {}, models=["builtin"], data=before) as (results, _):
        results.write(task, EvalResult(task.name, "perplexity", 2.0, None, 1))
    with open_results(out, [task], {}, models=["builtin"], data=before) as (_, kept):
        assert kept[task.slug].value == 2
    told = rf"the data of ptb: {names.pop(first)} is gone.*--force"
    with pytest.raises(FileExistsError, match=told), open_results(out, [task], {}, models=["builtin"], data=now):
        pass
    asked = read_yaml(out / ASKED)
    asked[task.slug]["inputs"].pop("the data of ptb")
    (out / ASKED).write_text(yaml.safe_dump(asked))
    with open_results(out, [task], {}, models=["builtin"], data=now) as (_, kept):
        assert kept[task.slug].value == 2


def test_what_reads_no_text_does_not_ask_where_it_is_from(tmp_path: Path) -> None:
    task = Task("cost")
    (tmp_path / "notes.txt").write_text(tiny_text(300))
    with open_results(tmp_path / "out", [task], {}, models=["builtin"]) as (results, _):
        results.write(task, EvalResult(task.name, "params", 2.0, None, 1))
    with open_results(tmp_path / "out", [task], {}, models=["builtin"], data=tmp_path) as (_, kept):
        assert task.slug in kept
