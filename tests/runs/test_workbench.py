"""The pipeline: every way to share out a budget and everything around a method, from a recipe to a checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import eckart
from eckart.allocation.search import criteria
from eckart.allocation.search.criteria import windows_criterion
from eckart.evals.task import Task
from eckart.lowrank import METHODS, build_method
from eckart.models.sites import find_sites, low_rank_modules, select_sites
from eckart.runs.composition import COMPOSITIONS, Composition
from eckart.runs.facts import Outcome
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.recipe import Recipe, load_recipe, parse_recipe
from eckart.support.sizes import num_params
from tiny import logits_of, tiny_model, tiny_text, tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer, a calibration text and a text to score on."""
    folder = tmp_path_factory.mktemp("pipeline")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "train.txt").write_text(tiny_text(900, seed=1))
    (folder / "test.txt").write_text(tiny_text(600, seed=2))
    return folder


def recipe_of(place: Path, **keys: Any) -> Recipe:
    """A recipe at the place; SCORE in an allocation is its text."""
    if isinstance(keys.get("allocation"), dict) and keys["allocation"].get("score") == "SCORE":
        keys["allocation"] = {**keys["allocation"], "score": f"perplexity:{place / 'test.txt'}"}
    calibration = {"corpus": str(place / "train.txt"), "samples": 8}
    return parse_recipe({"model": str(place / "model"), "context": 16, "calibration": calibration, **keys})


def make(place: Path, out: Path, how: How | None = None, **keys: Any) -> Outcome:
    """The checkpoint of such a recipe."""
    return make_checkpoint(recipe_of(place, **keys), out, how or How(cache=place / "cache"))


def dense_params() -> int:
    return sum(site.num_params for site in find_sites(tiny_model("llama")))


SURGICAL = {"name": "surgical", "score": "SCORE", "tolerance": "20%"}
ALLOCATIONS: list[tuple[str, dict[str, Any]]] = [
    ("asvd-i", {"allocation": "uniform"}),
    ("asvd-i", {"allocation": {"name": "per-role", "shares": {"mlp": 2, "q_proj": 0.5}}}),
    ("asvd-i", {"allocation": "effective-rank"}),
    ("sfsd", {"allocation": "global"}),
    ("kfac", {"allocation": {"name": "global", "exact": True}}),
    ("svd", {"allocation": {"name": "global", "weights": "probes"}, "joint": True}),
    ("nsvd-i", {"allocation": {"name": "global", "weights": "probes", "exact": True}}),
    ("svd", {"allocation": {"name": "sensitivity", "score": "SCORE", "limit": 2}}),
    ("sfsd", {"allocation": SURGICAL}),
    ("svd", {"allocation": SURGICAL, "joint": True}),
    ("best", {}),
    ("best-distilled", {"joint": True, "refine": {"steps": 2}, "distil": {"steps": 2}}),
]


@pytest.mark.parametrize(("method", "around"), ALLOCATIONS)
@pytest.mark.parametrize("layout", ["plain", "pivoted"])
def test_every_allocation_makes_a_checkpoint_within_its_budget(
    place: Path, tmp_path: Path, method: str, around: dict[str, Any], layout: str
) -> None:
    outcome = make(place, tmp_path / "out", method=method, keep=0.75, layout=layout, **around)
    plan, written = outcome.plan, json.loads((tmp_path / "out/plan.json").read_text())
    assert plan.kept_params <= 0.75 * dense_params()
    assert written["ranks"] == dict(plan.ranks)
    assert (written["layout"], written["joint"]) == (plan.layout, sorted(plan.joint)) == (layout, written["joint"])
    loaded = eckart.load_model(tmp_path / "out")
    assert {name: module.rank for name, module in low_rank_modules(loaded).items()} == {
        name: rank for name, rank in plan.ranks.items() if rank is not None
    }
    assert torch.isfinite(logits_of(loaded)).all()
    assert num_params(loaded) == outcome.summary.params[1] == outcome.report.params_after

    # What is measured for the ranks is told; what is not measured is not.
    measures = isinstance(around.get("allocation"), dict) and {"score", "weights"} & around["allocation"].keys()
    assert (tmp_path / "out/allocation.json").is_file() == bool(measures) == bool(outcome.allocation)
    if measures:
        assert json.loads((tmp_path / "out/allocation.json").read_text()) == json.loads(json.dumps(outcome.allocation))


@pytest.mark.parametrize(("method", "around"), [ALLOCATIONS[0], ALLOCATIONS[5], ALLOCATIONS[8], ALLOCATIONS[-1]])
def test_the_recipe_of_a_checkpoint_makes_it_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, around: dict[str, Any]
) -> None:
    """Also when a name has come to stand for something else since."""
    outcome = make(place, tmp_path / "first", method=method, keep=0.7, **around)
    recipe = load_recipe(tmp_path / "first/recipe.yaml")
    assert recipe == outcome.recipe
    noted = json.loads((tmp_path / "first/config.json").read_text())["quantization_config"]["recipe"]
    assert parse_recipe(noted) == recipe
    for name in COMPOSITIONS:
        monkeypatch.setitem(COMPOSITIONS, name, lambda: Composition(build_method("svd")))
    again = make_checkpoint(recipe, tmp_path / "again", How(cache=place / "cache"))
    assert again.recipe == recipe
    for name in ("model.safetensors", "plan.json", "recipe.yaml", "README.md"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_card_says_what_was_done(place: Path, tmp_path: Path) -> None:
    make(place, tmp_path / "best", keep=0.5, effort="high")
    card = (tmp_path / "best/README.md").read_text()
    assert "Ranks: global, layout: pivoted, order: anchored, blocks refined in 36 steps." in card
    assert "name: kfac" in card


BUDGETS: list[dict[str, Any]] = [
    *({"keep": share} for share in (0.9, 0.35)),
    *({"keep_total": share} for share in (0.9, 0.5)),
    *({"max_bytes": size} for size in (110_000, 70_000)),
]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    ("method", "around"),
    [
        ("sfsd", {}),  # brings a bias to linears that have none
        ("kfac", {"allocation": "global", "layout": "pivoted", "joint": True}),
        ("svd", {"allocation": {"name": "per-role", "shares": {"mlp": 3}}, "layout": "pivoted", "rank_multiple": 4}),
        ("sfsd", {"allocation": {**SURGICAL, "tolerance": "100000%"}, "sites": {"exclude": ["v_proj"]}}),
    ],
)
def test_no_budget_is_overrun(
    place: Path, tmp_path: Path, budget: dict[str, Any], method: str, around: dict[str, Any]
) -> None:
    outcome = make(place, tmp_path / "out", method=method, **budget, **around)
    ((name, allowed),) = budget.items()
    loaded = eckart.load_model(tmp_path / "out")
    modules = low_rank_modules(loaded)
    selected = select_sites(outcome.plan.sites, exclude=outcome.recipe.sites.exclude)
    stored = sum(module.left.weight.numel() for module in modules.values())
    stored += sum(module.right.weight.numel() for module in modules.values() if module.lender is None)
    stored += sum(site.num_params for site in selected if site.name not in modules)
    size = sum(file.stat().st_size for file in (tmp_path / "out").glob("*.safetensors"))
    taken = {
        "keep": stored / sum(site.num_params for site in selected),
        "keep_total": num_params(loaded) / num_params(tiny_model("llama")),
        "max_bytes": size,
    }[name]
    assert 0.6 * allowed < taken <= allowed
    assert outcome.summary.file_bytes[1] >= size
    if not outcome.plan.joint:
        assert outcome.summary.file_bytes[1] == size


@pytest.mark.parametrize("keys", [{"keep": 1}, {"keep_total": 1}, {"max_bytes": 10**9}])
@pytest.mark.parametrize("method", ["best", "asvd-i"])
def test_a_budget_of_everything_is_the_dense_model(
    place: Path, tmp_path: Path, method: str, keys: dict[str, Any]
) -> None:
    outcome = make(place, tmp_path / "out", method=method, distil=method == "best", **keys)
    assert set(outcome.plan.ranks.values()) == {None}
    assert outcome.passes == ()
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert torch.equal(logits_of(eckart.load_model(tmp_path / "out")), logits_of(tiny_model("llama")))
    assert "0 linears are low-rank" in (tmp_path / "out/README.md").read_text()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_with_every_order_and_pass(place: Path, tmp_path: Path, method: str) -> None:
    around = {"order": "anchored", "layout": "pivoted", "refit": True, "refine": {"steps": 1}, "distil": {"steps": 1}}
    outcome = make(place, tmp_path / "out", method=method, keep=0.5, sites={"blocks": "last 2"}, **around)
    assert [(each.name, each.place) for each in outcome.passes] == [
        ("refine", "block 1"),
        ("refine", "block 2"),
        ("distil", "model"),
    ]
    assert all(report.refit is not None for report in outcome.report.sites), "a refit was asked for at each"
    assert torch.isfinite(logits_of(eckart.load_model(tmp_path / "out"))).all()
    facts = json.loads((tmp_path / "out/compression.json").read_text())
    assert facts["passes"] == [asdict(each) for each in outcome.passes]
    for each in outcome.passes:
        assert each.kept == (each.after < each.before)


def test_orders_differ_and_the_first_is_what_nothing_said_means(place: Path, tmp_path: Path) -> None:
    logits = {}
    for order in (None, "one-shot", "sequential", "anchored"):
        make(place, tmp_path / str(order), method="asvd-i", keep=0.4, **({"order": order} if order else {}))
        logits[order] = logits_of(eckart.load_model(tmp_path / str(order)))
    assert torch.equal(logits[None], logits["one-shot"])
    assert not torch.equal(logits["one-shot"], logits["sequential"])
    assert not torch.equal(logits["sequential"], logits["anchored"])


def test_layouts_of_the_same_ranks_are_one_function(place: Path, tmp_path: Path) -> None:
    plan = make(place, tmp_path / "plain", method="sfsd", keep=0.5).plan
    written = json.loads(plan.to_json())
    (tmp_path / "plan.json").write_text(json.dumps({**written, "layout": "pivoted"}))
    outcome = make(place, tmp_path / "pivoted", method="sfsd", plan=str(tmp_path / "plan.json"))
    assert outcome.plan.layout == "pivoted"
    assert outcome.plan.kept_params < plan.kept_params
    plain, pivoted = (logits_of(eckart.load_model(tmp_path / name)) for name in ("plain", "pivoted"))
    torch.testing.assert_close(pivoted, plain, rtol=1e-4, atol=1e-4)
    card = (tmp_path / "pivoted/README.md").read_text()
    assert "Ranks: as in plan.json, layout: pivoted, " in card


def test_a_plan_edited_by_hand_is_carried_out(place: Path, tmp_path: Path) -> None:
    """A joint group, another with ranks of its own, and the rest dense."""
    q, k, v, o, *_ = (site.name for site in find_sites(tiny_model("llama")))
    plan = {"ranks": {q: 6, k: 6, v: 6, o: 5}, "layout": "pivoted", "joint": [q]}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    make(place, tmp_path / "out", method="asvd-i", plan=str(tmp_path / "plan.json"), refine={"steps": 1})
    modules = low_rank_modules(eckart.load_model(tmp_path / "out"))
    assert {name: module.rank for name, module in modules.items()} == plan["ranks"]
    assert modules[k].right is modules[v].right is modules[q].right
    assert modules[o].lender is None
    assert all(module.pivots is not None for module in modules.values())
    plan["ranks"] = {q: 6, k: 6, o: 5}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="its linears share a right factor and need one rank"):
        make(place, tmp_path / "other", method="asvd-i", plan=str(tmp_path / "plan.json"))
    with pytest.raises(ValueError, match="no plan at"):
        make(place, tmp_path / "other", method="asvd-i", plan=str(tmp_path / "nowhere.json"))


@pytest.mark.parametrize(
    ("keys", "groups"),
    [
        ({"keep": 0.5}, 6),
        ({"keep": 0.5, "sites": {"include": ["attention"]}}, 3),
        ({"keep": 0.5, "sites": {"exclude": ["k_proj", "up_proj"], "blocks": "last 1"}}, 0),
        ({"rules": [{"keep": 0.4, "include": ["mlp"]}, {"keep": 0.6}]}, 6),
        ({"keep_total": 0.6, "sites": {"blocks": "last 2"}}, 4),
    ],
)
def test_whole_groups_share_their_right_factor(place: Path, tmp_path: Path, keys: dict[str, Any], groups: int) -> None:
    outcome = make(place, tmp_path / "out", method="asvd-i", joint=True, **keys)
    assert len(outcome.plan.joint) == groups
    lenders = {id(m.lender) for m in low_rank_modules(eckart.load_model(tmp_path / "out")).values() if m.lender}
    assert len(lenders) == groups


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"keep": 0.5, "allocation": {"name": "per-role", "shares": {"q_prj": 2}}}, "'q_prj' matches no selected site"),
        ({"keep": 0.5, "allocation": {"name": "per-role", "shares": {"mlp": -1}}}, "which is not positive"),
        (
            {"keep": 0.5, "allocation": {"name": "per-role", "shares": {"q_proj": 2}}, "joint": True},
            "they are factored as one and need one",
        ),
        ({"keep_total": 0.1}, "the least possible is keep_total"),
        ({"max_bytes": 1000}, "the least possible is max_bytes"),
        ({"keep": 0.001, "method": "best"}, "the least possible is keep 0."),
        ({"keep": 0.1, "rank_multiple": 16, "allocation": "global"}, "lower rank_multiple"),
        ({"keep": 0.1, "allocation": {**SURGICAL, "tolerance": 0}}, "raise the tolerance"),
        ({"keep": 0.5, "allocation": {**SURGICAL, "score": "perplexity:none.txt"}}, "no corpus 'none.txt'"),
        ({"keep": 0.5, "refine": True, "calibration": {"samples": 1}}, "give at least two"),
        ({"rules": [{"keep": 0.5, "include": ["q_proj"]}], "joint": True}, "need one rank"),
    ],
)
def test_what_cannot_be_done_is_said_once_and_leaves_nothing(
    place: Path, tmp_path: Path, keys: dict[str, Any], message: str
) -> None:
    keys = {"method": "svd", **keys}
    if "calibration" in keys:
        keys["calibration"] = {"corpus": str(place / "train.txt"), **keys["calibration"]}
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        make(place, tmp_path / "out", **keys)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_batch_size_moves_nothing_where_steps_are_taken(place: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"method": "asvd-i", "keep": 0.5, "order": "anchored", "refine": {"steps": 3}}
    for size in (2, 8):
        make(place, tmp_path / str(size), How(batch_size=size), **keys)
    assert (tmp_path / "2/model.safetensors").read_bytes() == (tmp_path / "8/model.safetensors").read_bytes()


class Killed(BaseException):
    """As a kill is: nothing catches it."""


class Counter:
    """Perplexity as a score that counts, and is killed at an evaluation."""

    def __init__(self, kill: int | None = None) -> None:
        self.count, self.kill = 0, kill

    def __call__(self, task: Task, windows: torch.Tensor) -> criteria.Criterion:
        score = windows_criterion(task, windows)

        def measure(model: PreTrainedModel) -> float:
            if self.count == self.kill:
                raise Killed
            self.count += 1
            return score(model)

        return criteria.Criterion(measure, score.better, score.about)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int | None], Counter]:
    """Puts a counter in place of the score."""

    def put(kill: int | None = None) -> Counter:
        counter = Counter(kill)
        monkeypatch.setattr("eckart.allocation.search.criteria.windows_criterion", counter)
        return counter

    return put


@pytest.mark.parametrize("name", ["surgical", "sensitivity"])
def test_a_killed_search_measures_nothing_twice(
    place: Path, tmp_path: Path, counted: Callable[[int | None], Counter], name: str
) -> None:
    keys: dict[str, Any] = {"method": "sfsd", "keep": 0.6, "allocation": {"name": name, "score": "SCORE", "limit": 3}}
    how = How(cache=tmp_path / "cache")
    whole = counted(None)
    outcome = make(place, tmp_path / "whole", How(), **keys)
    assert outcome.allocation["search"]["evaluations"] == whole.count
    first = counted(whole.count // 2)
    with pytest.raises(Killed):
        make(place, tmp_path / "out", how, **keys)
    assert not (tmp_path / "out").exists()
    second = counted(None)
    again = make(place, tmp_path / "out", how, **keys)
    assert first.count + second.count == whole.count
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert again.plan == outcome.plan
    (journal,) = (tmp_path / "cache/searches").iterdir()
    assert len(journal.read_text().splitlines()) == 1 + whole.count
    # All of it is there now. A larger budget needs nothing new, a smaller one goes on from here.
    for keep, more in ((0.6, False), (0.8, False), (0.5, name == "surgical")):
        counter = counted(None)
        make(place, tmp_path / str(keep), how, **{**keys, "keep": keep})
        assert (counter.count > 0) == more
    assert len(list((tmp_path / "cache/searches").iterdir())) == 1


def test_every_search_has_its_own_journal(
    place: Path, tmp_path: Path, counted: Callable[[int | None], Counter]
) -> None:
    """What makes a trial names the file, so that no search is refused for another one's, and none takes its numbers."""
    here = tmp_path / "place"
    shutil.copytree(place, here, ignore=shutil.ignore_patterns("cache"))
    keys: dict[str, Any] = {
        "method": "asvd-i",
        "keep": 0.95,
        "allocation": {**SURGICAL, "limit": 2},
        "calibration": {"corpus": str(here / "train.txt"), "samples": 8},
    }

    def search(**changes: Any) -> int:
        counter = counted(None)
        make(here, tmp_path / "out", How(cache=tmp_path / "cache"), **{**keys, **changes})
        shutil.rmtree(tmp_path / "out")
        return counter.count

    assert search() > 0
    assert search() == 0
    assert search(order="anchored", dtype="float32", evaluate=["cost"]) == 0, "of what comes after the ranks"
    for changes in (
        {"layout": "pivoted"},
        {"rank_multiple": 2},
        {"joint": True},
        {"method": "svd"},
        {"sites": {"exclude": ["q_proj"]}},
        {"refit": True},  # holds samples out
        {"allocation": {**SURGICAL, "limit": 3}},
        {"allocation": {**SURGICAL, "limit": 2, "tolerance": "21%"}},
        {"calibration": {**keys["calibration"], "seed": 1}},
    ):
        assert search(**changes) > 0, changes
    (here / "test.txt").write_text(tiny_text(600, seed=8))
    assert search() > 0, "another text under the same name"
    tiny_model("llama", seed=1).save_pretrained(here / "model")
    assert search() > 0, "another model under the same name"
    assert search() == 0


def test_killed_probes_go_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from eckart.allocation.search import loss_weights

    keys: dict[str, Any] = {
        "method": "svd",
        "keep": 0.5,
        "allocation": {"name": "global", "weights": "probes"},
        "joint": True,
    }
    measure, limit, calls = loss_weights._divergence, [None], [0]

    def counting(*arguments: Any) -> float:
        if limit[0] is not None and calls[0] == limit[0]:
            raise Killed
        calls[0] += 1
        return measure(*arguments)

    monkeypatch.setattr(loss_weights, "_divergence", counting)
    whole = make(place, tmp_path / "whole", How(), **keys)
    total, calls[0], limit[0] = calls[0], 0, 24  # type: ignore[assignment]
    assert total == 21 + 6, "every linear, and every group"
    with pytest.raises(Killed):
        make(place, tmp_path / "out", How(cache=tmp_path / "cache"), **keys)
    limit[0] = None
    assert make(place, tmp_path / "out", How(cache=tmp_path / "cache"), **keys).plan == whole.plan
    assert calls[0] == total


def test_a_task_can_be_searched_with(place: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval", reason="needs the extra 'tasks'")
    rows = [{"question": f"w1 w{n}", "choices": ["w2", "w3 w4"], "answer": n % 2} for n in range(20)]
    (tmp_path / "data/piqa").mkdir(parents=True)
    (tmp_path / "data/piqa/dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = make(
        place,
        tmp_path / "out",
        How(data=tmp_path / "data"),
        method="sfsd",
        allocation={"name": "surgical", "score": "lm-eval:piqa", "tolerance": 1},
        sites={"include": ["down_proj"], "blocks": "last 2"},
    )
    assert outcome.allocation["search"]["evaluations"] == 3, "the dense model, and the smallest budget of two linears"
    assert list(outcome.plan.ranks.values()) == [1, 1]
