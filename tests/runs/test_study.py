"""Studies: scales laid over a study, its runs carried out on a tiny model, and its table."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import eckart
from eckart.cli.reproduce import study_notes
from eckart.evals.result import EvalResult
from eckart.evals.task import Task
from eckart.reports import write_report
from eckart.reports.runs import read_runs
from eckart.reports.tables import paper_table
from eckart.runs import experiment
from eckart.runs.how import How
from eckart.runs.recipe import parse_recipe
from eckart.runs.reproduction import read, run_study, slug
from eckart.runs.study import Study, load_study, studies
from eckart.support.recipe_words import describe
from tiny import tiny_model, tiny_text, tiny_tokenizer

BASE: dict[str, Any] = {
    "title": "Table 0",
    "base": {
        "model": "owner/big",
        "calibration": {"corpus": "text.txt", "samples": 8, "length": 16},
        "evaluate": ["perplexity:text.txt", {"task": "perplexity:other.txt", "length": 16}],
    },
    "columns": ["perplexity:text.txt", "perplexity:other.txt"],
    "dense": [5.0, 6.0],
    "runs": [
        {"method": "svd", "keep": 0.5, "published": [50.0, None]},
        {"method": "asvd-i", "keep": 0.5, "published": [7.0, 8.0]},
        {
            "method": {"name": "nsvd-i", "options": {"share": 0.5}},
            "keep": 0.5,
            "published": [7.5, 7.0],
            "improvement": 0.1,
        },
    ],
    "compare": {"baseline": {"method": "asvd-i"}, "in_domain": ["perplexity:text.txt"]},
    "scales": {
        "small": {"base": {"model": "small", "calibration": {"samples": 4}}, "limits": {"windows": 3}},
        "other": {"base": {"model": "small"}, "evaluate": ["perplexity:text.txt"], "note": "Only one corpus."},
    },
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and two texts."""
    folder = tmp_path_factory.mktemp("study")
    eckart.save(tiny_model("llama"), folder / "model", tiny_tokenizer())
    for name, seed in (("text.txt", 0), ("other.txt", 1)):
        (folder / name).write_text(tiny_text(400, seed=seed))
    return folder


def at_place(place: Path, **changes: Any) -> Study:
    data = json.loads(
        json.dumps(BASE).replace("text.txt", str(place / "text.txt")).replace("other.txt", str(place / "other.txt"))
    )
    return Study.model_validate({**data, **changes}).at("paper", {"model": str(place / "model")})


def test_a_scale_is_laid_over_base_and_runs() -> None:
    study = Study.model_validate(BASE).at("small")
    (_, row, recipe), *others = study.recipes()
    assert recipe.model == "small"
    assert recipe.calibration.samples == 4
    assert recipe.calibration.length == 16
    assert [task.limit for task in recipe.tasks] == [3, 3]
    assert row.published == [50.0, None]
    assert len(others) == 2


def test_a_scale_with_other_evaluations_has_nothing_published_to_compare() -> None:
    study = Study.model_validate(BASE).at("other")
    assert study.columns == ["perplexity:text.txt"]
    assert study.dense is None
    assert all(row.published is None for row in study.runs)
    assert study.about.startswith("Only one corpus.")


@pytest.mark.parametrize("scale", ["paper", "small"])
def test_a_row_of_another_size_has_the_numbers_of_that_size_or_none(scale: str) -> None:
    rows = [
        {"method": "svd", "keep": 0.9, "published": [1.0, 2.0], "improvement": 0.1, "label": "little cut"},
        {"method": "svd", "keep": 0.5, "published": [3.0, 4.0], "improvement": 0.2},
        {"method": "svd", "keep": 0.5, "model": "owner/other", "published": [5.0, 6.0]},
    ]
    study = Study.model_validate({**BASE, "runs": rows})

    def numbers(changes: dict[str, Any]) -> list[Any]:
        runs = study.at(scale, changes).runs
        return [(row.published, row.improvement, row.label) for row in runs]

    as_printed = [([1.0, 2.0], 0.1, "little cut"), ([3.0, 4.0], 0.2, None), ([5.0, 6.0], None, None)]
    assert numbers({}) == numbers({"dtype": "float32", "calibration.samples": 2}) == as_printed
    assert numbers({"keep": 0.5}) == [as_printed[1], *as_printed[1:]]
    assert numbers({"keep": 0.7}) == numbers({"method": "asvd-i"}) == [(None, None, None)] * 3
    assert numbers({"keep": None, "keep_total": 0.5}) == [(None, None, None)] * 3
    assert numbers({"method": {"name": "svd"}}) == as_printed
    assert numbers({"layout": "pivoted"}) == numbers({"sites.include": ["mlp"]}) == [(None, None, None)] * 3


@pytest.mark.parametrize("name", studies())
def test_every_row_as_it_is_written_keeps_its_own_numbers(name: str) -> None:
    study = load_study(name)
    for row, same in zip(study.runs, study.at("paper").runs, strict=True):
        assert (same.published, same.improvement, same.label) == (row.published, row.improvement, row.label)
    sizes = {**study.base}.get("keep"), {row.recipe.get("keep") for row in study.runs}
    for keep in sizes[1] - {None}:
        for row in study.at("paper", {"keep": keep}).runs:
            printed = [r for r in study.runs if r.published == row.published]
            assert row.published is None or any(r.recipe.get("keep", sizes[0]) == keep for r in printed)


def test_changes_win_and_make_equal_runs_one() -> None:
    study = Study.model_validate(BASE).at("small", {"method": "svd", "calibration.samples": 2, "model": "mine"})
    ((label, _, recipe),) = study.recipes()
    assert label == "svd, keep 0.5"
    assert (recipe.model, recipe.calibration.samples, recipe.calibration.length) == ("mine", 2, 16)


def test_several_models() -> None:
    study = Study.model_validate(BASE).at("small", {"models": ["a/x", "b/y"]})
    labels = [label for label, *_ in study.recipes()]
    assert labels[0] == "x, svd, keep 0.5"
    assert labels[3] == "y, svd, keep 0.5"
    assert len(labels) == 6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": [1.0]}, "1 published numbers for 2 columns"),
        ({"runs": []}, "runs"),
        ({"collumns": []}, "collumns"),
    ],
)
def test_a_study_that_does_not_fit_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(json.dumps({**BASE, **change}))
    with pytest.raises(ValueError, match=message):
        load_study(str(file))


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(ValueError, match="did you mean 'nsvd-table-1'"):
        load_study("nsvd-table1")
    with pytest.raises(ValueError, match="no scale 'tiny' in this study; it has paper, small, other"):
        Study.model_validate(BASE).at("tiny")


def test_a_whole_study(place: Path, tmp_path: Path) -> None:
    study = at_place(place)
    dense, svd, asvd, nsvd = run_study(study, tmp_path / "out", How())
    assert dense.run is None
    assert dense.published == [5.0, 6.0]
    text, other = (column.partition("#")[0] for column in study.columns)
    for line in (svd, asvd, nsvd):
        assert line.run is not None
        written = tmp_path / "out" / "runs" / line.run / "evals"
        values = {
            data["task"]: data["value"]
            for file in written.glob("*.json")
            if not file.name.endswith(".dense.json") and (data := json.loads(file.read_text()))
        }
        assert line.ours[0] == values[text]
    assert svd.difference == [pytest.approx(svd.ours[0] - 50.0), None]
    assert asvd.improvement is None
    assert asvd.ours[1] is not None
    assert nsvd.ours[1] is not None
    assert nsvd.improvement == pytest.approx(1 - nsvd.ours[1] / asvd.ours[1])
    assert nsvd.published_improvement == 0.1
    table = json.loads((tmp_path / "out" / "study.json").read_text())
    assert [row["ours"] for row in table["rows"]] == [line.ours for line in (dense, svd, asvd, nsvd)]
    assert len(list((tmp_path / "out" / "dense").iterdir())) == 2, "dense is measured once for all runs"
    assert other


def test_a_study_goes_on_where_it_stopped(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, out = at_place(place), tmp_path / "out"
    first = run_study(study, out, How())

    def nothing(*_args: Any, **_options: Any) -> Any:
        raise AssertionError("was done already")

    monkeypatch.setattr("eckart.runs.experiment.load_model", nothing)
    assert run_study(study, out, How()) == first


def test_what_is_refused_is_a_gap_with_its_reason(place: Path, tmp_path: Path) -> None:
    base = json.loads(json.dumps(BASE["base"]).replace("text.txt", str(place / "text.txt")))
    base["evaluate"] = [f"perplexity:{place / 'text.txt'}", {"task": "perplexity:nowhere.txt", "length": 16}]
    study = at_place(place, base=base, columns=[f"perplexity:{place / 'text.txt'}", "perplexity:nowhere.txt"])
    _, svd, *_ = run_study(study, tmp_path / "out", How())
    assert svd.ours[0] is not None
    assert svd.ours[1] is None
    assert svd.refusals is not None
    assert "no corpus 'nowhere.txt'" in svd.refusals["perplexity:nowhere.txt@16"]
    assert svd.run is not None
    assert (tmp_path / "out" / "runs" / svd.run / "refusals.json").is_file()


def test_an_average_over_fewer_corpora_than_the_papers_is_none(place: Path, tmp_path: Path) -> None:
    """The paper's improvement is a mean over all of its corpora; one that cannot be read leaves the cell empty."""
    missing = "perplexity:nowhere.txt"
    base = at_place(place).base
    base["evaluate"].append(missing)
    columns = [*at_place(place).columns, missing]
    runs = [{"method": "asvd-i", "keep": 0.5}, {"method": "nsvd-i", "keep": 0.5}]
    study = at_place(place, base=base, columns=columns, runs=runs, dense=None)
    _, asvd, nsvd = run_study(study, tmp_path / "out", How())
    assert (asvd.improvement, nsvd.improvement) == (None, None)
    assert (asvd.unmeasured, nsvd.unmeasured) == ([], [missing])
    rows = json.loads((tmp_path / "out" / "study.json").read_text())["rows"]
    assert [row.get("unmeasured") for row in rows] == [None, None, [missing]]
    table = paper_table(read_runs([tmp_path / "out"]).studies[0], 1)
    assert (table.rows[2][-1].text, table.rows[2][-1].hint) == ("incomplete", "not measured: nowhere.txt")
    told = study_notes([asvd, nsvd])
    assert told == [f"{nsvd.label}: no average improvement, for {missing} was not measured"]


def test_a_compressed_model_without_a_result_does_not_get_the_dense_one_s(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, whole = at_place(place), experiment._Models.evaluate

    def broken(self: experiment._Models, tasks: Sequence[Task], which: str) -> Iterator[EvalResult | ValueError]:
        if which == "compressed":
            return iter([ValueError("a logit in window 0 is not finite")] * len(tasks))
        return whole(self, tasks, which)

    monkeypatch.setattr(experiment._Models, "evaluate", broken)
    dense, *others = run_study(study, tmp_path / "out", How())
    assert None not in dense.ours
    for line in others:
        assert line.ours == [None, None]
        assert line.improvement is None
        assert set((line.refusals or {}).values()) == {"a logit in window 0 is not finite"}


def test_a_model_that_cannot_be_compressed_is_a_row_of_gaps(place: Path, tmp_path: Path) -> None:
    runs = [{"method": "svd", "keep": 0.5}, {"method": "asvd-i", "keep": 0.5, "calibration": {"samples": 9999}}]
    _, svd, asvd = run_study(at_place(place, runs=runs), tmp_path / "out", How())
    assert None not in svd.ours
    assert asvd.ours == [None, None]
    assert all("the model was not compressed: corpus" in why for why in (asvd.refusals or {"": ""}).values())
    assert write_report([tmp_path / "out"], tmp_path / "report.html").is_file()


def test_weights_are_let_go_and_made_again_when_asked_for(place: Path, tmp_path: Path) -> None:
    study, out = at_place(place, runs=[{"method": "svd", "keep": 0.5}]), tmp_path / "out"
    first = run_study(study, out, How())
    assert not list(out.rglob("*.safetensors"))
    (result,) = [file for file in out.glob("runs/*/evals/*other*.json") if ".dense" not in file.name]
    before = result.read_text()
    result.unlink()
    assert run_study(study, out, How(), keep_weights=True) == first
    assert result.read_text() == before
    assert len(list(out.rglob("*.safetensors"))) == 1


def test_keeping_everything_is_the_dense_model(place: Path, tmp_path: Path) -> None:
    dense, kept = run_study(at_place(place, runs=[{"method": "svd", "keep": 1}]), tmp_path / "out", How())
    assert kept.ours == dense.ours
    assert not (tmp_path / "out" / "runs" / "svd-keep-1" / "model").exists()


def test_the_context_is_the_window_of_text_that_names_none(place: Path, tmp_path: Path) -> None:
    base = json.loads(json.dumps(BASE["base"]).replace("text.txt", str(place / "text.txt")))
    base |= {"context": 24, "evaluate": [f"perplexity:{place / 'text.txt'}"]}
    del base["calibration"]["length"]
    study = at_place(place, base=base, columns=base["evaluate"], dense=None, runs=[{"method": "asvd-i", "keep": 0.5}])
    run_study(study, tmp_path / "out", How())
    (run,) = (tmp_path / "out" / "runs").iterdir()
    (result,) = (run / "evals").glob("*.dense.json")
    assert json.loads(result.read_text())["settings"]["length"] == 24
    assert "length: 24" in (run / "model" / "recipe.yaml").read_text()


def test_a_rival_of_one_size_stands_in_the_table_without_an_improvement(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao", reason="needs the extra 'baselines'")
    runs = [{"method": "asvd-i", "keep": 0.5}, {"method": "int8"}]
    study = at_place(place, runs=runs, columns=["cost#params"], dense=None)
    study = study.model_copy(update={"columns": [item["task"] for item in study.base["evaluate"]]})
    _, asvd, int8 = run_study(study, tmp_path / "out", How())
    assert int8.improvement is None
    assert asvd.ours[0] is not None
    assert int8.ours[0] is not None
    assert int8.ours[0] != asvd.ours[0]


def test_a_rival_that_lacks_its_package_says_so_before_anything_is_measured(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in ("torchao", "torchao.quantization"):
        monkeypatch.setitem(sys.modules, module, None)
    recipe = parse_recipe({"model": str(place / "no such model"), "method": "int8", "evaluate": ["perplexity:x.txt"]})
    with pytest.raises(ValueError, match="torchao is not installed"):
        experiment.run(recipe, tmp_path / "out", How())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("recipe", "label"),
    [
        ({"keep": 0.5}, "best, keep 0.5"),
        ({"method": {"options": {"bias": False}}, "keep": 0.5}, "best (bias=False), keep 0.5"),
        ({"method": "kfac", "allocation": "global", "keep": 0.5}, "kfac, global, keep 0.5"),
        (
            {"method": "kfac", "allocation": {"name": "global", "exact": True}, "keep_total": 0.5},
            "kfac, global (exact=True), keep_total 0.5",
        ),
        (
            {"method": "sfsd", "allocation": {"name": "surgical", "score": "lm-eval:piqa", "limit": 9}, "keep": 0.5},
            "sfsd, surgical (score=lm-eval:piqa), keep 0.5",
        ),
        (
            {"method": "sfsd", "allocation": {"name": "surgical", "score": "stereoset"}},
            "sfsd, surgical (score=stereoset)",
        ),
        ({"method": "svd", "layout": "pivoted", "order": "anchored", "keep": 0.5}, "svd, pivoted, anchored, keep 0.5"),
        ({"method": "svd", "joint": True, "refit": True, "max_bytes": 5000000}, "svd, joint, refit, max_bytes 5000000"),
        ({"refine": False, "joint": False, "keep": 0.5}, "best, no joint, no refine, keep 0.5"),
        ({"effort": "high", "keep": 0.5}, "best, high effort, keep 0.5"),
        ({"refine": {"steps": 0}, "distil": {"steps": 8}, "keep": 0.5}, "best, no refine, distil (steps=8), keep 0.5"),
        ({"recover": True, "keep": 0.5}, "best, recover, keep 0.5"),
        ({"distil": False, "recover": {"steps": 64}, "keep": 0.5}, "best, no distil, recover (steps=64), keep 0.5"),
        ({"sites": {"include": ["mlp"], "blocks": "last 2"}, "keep": 0.5}, "best, keep 0.5 of mlp, last 2"),
        ({"method": "svd", "sites": {"exclude": ["q_proj"]}, "keep": 0.5}, "svd, keep 0.5 of not q_proj"),
        (
            {"method": "svd", "rules": [{"keep": 0.5, "include": ["mlp"]}, {"keep": 0.9}]},
            "svd, keep 0.5 of mlp; keep 0.9 of all blocks",
        ),
        ({"method": "svd", "plan": "some/where/mine.json"}, "svd, plan mine"),
        ({"speed": {"times": 1.5}}, "best, speed 1.5"),
        ({"speed": {"times": 1.5, "rows": 64}}, "best, speed 1.5 at 64 tokens"),
        ({"keep": 0.5, "keep_cache": 0.25}, "best, keep 0.5, keep_cache 0.25"),
        ({"refine": {}, "keep": 0.5}, "best, refine, keep 0.5"),
        ({"method": "int8"}, "int8"),
    ],
)
def test_what_is_around_a_method_is_in_the_label(recipe: dict[str, Any], label: str) -> None:
    parse_recipe({"model": "m", **recipe})
    assert describe(recipe) == label


def test_runs_that_differ_in_something_else_need_a_label() -> None:
    few, many = ({"method": "asvd-i", "keep": 0.5, "calibration": {"samples": number}} for number in (4, 8))
    with pytest.raises(ValueError, match=r"two different runs are both called 'asvd-i, keep 0.5': give each a label"):
        Study.model_validate({**BASE, "runs": [few, many]}).recipes()
    study = Study.model_validate({**BASE, "runs": [few, {**many, "label": "asvd-i, 8 samples"}]})
    assert [label for label, *_ in study.recipes()] == ["asvd-i, keep 0.5", "asvd-i, 8 samples"]


def test_limits_bound_the_scores_of_searches() -> None:
    search = {"name": "surgical", "score": "perplexity:text.txt"}
    runs: list[dict[str, Any]] = [
        {"method": "sfsd", "allocation": search},
        {"method": "svd", "allocation": {**search, "limit": 2}},
        {"method": "sfsd", "allocation": {"name": "surgical", "score": "lm-eval:piqa"}},
        {"method": "svd", "keep": 0.5},
    ]
    small = {"base": {"model": "small"}, "limits": {"windows": 3, "documents": 5}}
    study = Study.model_validate({**BASE, "runs": runs, "scales": {"small": small}, "compare": None})
    limits = [recipe.allocation and recipe.allocation.limit for *_, recipe in study.at("small").recipes()]
    assert limits == [3, 2, 5, None]
    assert [recipe.allocation and recipe.allocation.limit for *_, recipe in study.recipes()] == [None, 2, None, None]
    base = {**BASE["base"], "method": "sfsd", "allocation": search}
    shared = Study.model_validate({**BASE, "base": base, "runs": [{}, {"keep": 0.8}], "scales": {"small": small}})
    assert [recipe.allocation and recipe.allocation.limit for *_, recipe in shared.at("small").recipes()] == [3, 3]


def test_limits_can_be_changed_by_hand() -> None:
    runs = [{"method": "svd", "keep": 0.5, "evaluate": ["perplexity:text.txt", "probing:cola", "lm-eval:mmlu", "cost"]}]
    small = {"base": {"model": "small"}, "limits": {"windows": 3, "documents": 5}}
    study = Study.model_validate({**BASE, "runs": runs, "scales": {"small": small}, "compare": None})
    changes = {"limits.documents": 7, "limits.members": 1}
    for scale, windows in (("small", 3), ("paper", None)):
        ((_, _, recipe),) = study.at(scale, changes).recipes()
        assert [task.limit for task in recipe.tasks] == [windows, 7, 1, None]
    for key, value in (("limits.rows", 7), ("limits.windows", 0), ("limits.windows", "few"), ("limits", 7)):
        with pytest.raises(ValueError, match=r"is no limit: give limits\.windows, limits\.documents, limits\.members"):
            study.at("small", {key: value})


def test_a_search_that_stays_above_its_size_is_a_gap_with_its_reason(place: Path, tmp_path: Path) -> None:
    search = {"name": "surgical", "score": f"perplexity:{place / 'text.txt'}", "tolerance": "-90%", "limit": 1}
    runs = [{"method": "svd", "keep": 0.5}, {"method": "svd", "allocation": search, "keep": 0.5}]
    with pytest.raises(ValueError, match="give it the split sfsd-evaluation"):
        run_study(at_place(place, runs=runs), tmp_path / "out", How())
    assert not (tmp_path / "out").exists()
    base = at_place(place).base
    base["evaluate"][0] = {**base["evaluate"][0], "split": "sfsd-evaluation"}
    study = at_place(place, base=base, runs=runs)
    _, uniform, searched = run_study(study, tmp_path / "out", How(cache=tmp_path / "cache"))
    assert None not in uniform.ours
    assert searched.ours == [None, None]
    assert "raise the tolerance" in next(iter((searched.refusals or {}).values()))
    assert searched.label.startswith("svd, surgical (score=perplexity:")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sfsd-table-1", "probing-figure-1-mmlu"])
def test_llm_pruner_runs_in_the_type_of_the_papers(name: str, tmp_path: Path) -> None:
    """float16, as both studies say at the paper's scale; gradients are taken in float32."""
    study = load_study(name).at("builtin", {"dtype": "float16", "calibration.samples": 4})
    pruned = [row for row in study.runs if row.recipe["method"] == "llm-pruner"][-1:]
    base = {**study.base, "evaluate": [{"task": "perplexity:builtin/prose", "limit": 1}]}
    study = study.model_copy(update={"runs": pruned, "base": base, "columns": ["perplexity:builtin/prose"]})
    dense, line = run_study(study, tmp_path / "out", How())
    assert not line.refusals
    assert line.ours[0] is not None
    assert dense.ours[0] is not None
    assert dense.ours[0] < line.ours[0]


def test_labels_and_folders() -> None:
    assert describe({"method": "svd", "keep": 0.7}) == "svd, keep 0.7"
    assert describe({"method": {"name": "nsvd-i", "options": {"share": 0.9}}, "keep": 0.5}) == (
        "nsvd-i (share=0.9), keep 0.5"
    )
    assert (
        describe({"method": "sfsd", "rules": [{"keep": 0.46, "blocks": "last 3/8"}]}) == "sfsd, keep 0.46 of last 3/8"
    )
    assert slug("llama-7b, nsvd-i (share=0.9), keep 0.5") == "llama-7b-nsvd-i-share=0.9-keep-0.5"
    assert slug("sfsd, 46 % of mlp/down; keep 0.5: a") == "sfsd-46-of-mlp-down-keep-0.5-a"


@given(st.text(max_size=300), st.text(max_size=300))
@example("模型一", "模型二")
@example("a+b", "a-b")
def test_labels_of_any_script_have_folders_of_their_own(one: str, other: str) -> None:
    """But for those that differ in what stands between words alone; a study refuses them."""
    words = [re.sub(r"[ ,()%/:;-]+", "-", label).strip("-.") for label in (one, other)]
    assert words[0] == words[1] or slug(one) != slug(other)
    assert slug(one) == Path(slug(one)).name != ""


def test_two_runs_of_one_folder_are_refused(tmp_path: Path) -> None:
    rows = [{"label": label, "method": "svd", "keep": keep} for label, keep in (("a b", 0.5), ("a, b", 0.6))]
    base = {"model": "builtin", "evaluate": ["cost"]}
    study = Study.model_validate({"title": "t", "base": base, "columns": ["cost"], "runs": rows})
    with pytest.raises(ValueError, match="'a b' and 'a, b' would share the folder a-b: give one another name"):
        run_study(study, tmp_path, How())
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize("name", studies())
def test_every_study_makes_recipes_at_every_scale(name: str) -> None:
    """Scale builtin is not there where a study reads nothing but labelled text, which does not come with eckart."""
    whole = load_study(name)
    assert "small" in whole.scales
    for study in (whole.at(scale) for scale in ("paper", *whole.scales)):
        planned = study.recipes()
        assert planned
        names = [slug(label) for label, *_ in planned]
        assert len(set(names)) == len(names), "two runs would share a folder"
        for _, row, _ in planned:
            assert row.published is None or len(row.published) == len(study.columns)
        assert read([], study.columns[0]) is None


def test_a_title_says_which_models_and_scale_it_is_of() -> None:
    study = load_study("nsvd-table-1")
    assert study.at("paper").title == study.title == "NSVD Table 1: perplexity of LLaMA-7B, 10 to 50 % removed"
    assert study.at("builtin").title == "NSVD Table 1, on builtin (scale builtin)"
    assert study.at("small", {"model": "/models/pythia"}).title == "NSVD Table 1, on pythia (scale small)"
    assert study.at("paper", {"model": "x/other"}).title == "NSVD Table 1, on other (scale paper)"
    several = study.at("small", {"models": ["a/one", "b/two", "three", "four"]})
    assert several.title == "NSVD Table 1, on one, two, three and others (scale small)"
