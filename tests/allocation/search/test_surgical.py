"""Rank search: SFSD's Algorithm 1 to the letter, and the same result however often it is killed."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.allocation import RankPlan
from eckart.allocation.search import criteria
from eckart.allocation.search.criteria import search_criterion, task_criterion, windows_criterion
from eckart.allocation.search.surgical import PERPLEXITY_TOLERANCE, SearchResult, Tolerance, search
from eckart.allocation.search.trials import SHARES, planned
from eckart.calibration.moments import calibrate
from eckart.compression.replace import compress
from eckart.compression.spectra import spectra_on_demand
from eckart.evals.result import EvalResult, Score
from eckart.evals.task import Task
from eckart.lowrank import Factored, build_method, rank_for
from eckart.models.sites import find_sites, low_rank_modules
from eckart.models.units import units_of
from tiny import logits_of, tiny_model, tiny_tokenizer, tiny_tokens

FEW = (0.2, 0.5, 0.8)


@cache
def spectra_of(model_type: str) -> dict[str, Factored]:
    """sfsd's, so that cuts bring a bias."""
    model, method = tiny_model(model_type), build_method("sfsd")
    make = spectra_on_demand(model, method, calibrate(model, tiny_tokens(6, 16), method))
    return {site.name: make(site.name) for site in find_sites(model)}


class TableScore:
    """A score that reads the ranks in the model: dense 10, and for each cut linear a loss drawn from its name and rank.

    Losses do not fall with the rank, so that a search that assumes it would be found out.
    """

    def __init__(self, seed: int = 0, sign: float = 1.0) -> None:
        self.seed, self.sign, self.seen = seed, sign, []

    def of(self, ranks: dict[str, int]) -> float:
        losses = [random.Random(f"{self.seed} {name} {rank}").random() ** 2 for name, rank in sorted(ranks.items())]
        return 10.0 + self.sign * sum(losses)

    def __call__(self, model: PreTrainedModel) -> float:
        self.seen.append({name: module.rank for name, module in low_rank_modules(model).items()})
        return self.of(self.seen[-1])


class Killed(Exception):
    """Stands for a kill."""


def killed_at(score: Callable[[Any], float], evaluation: int) -> Callable[[Any], float]:
    """The score, which dies at its n-th evaluation."""
    count = 0

    def dying(model: Any) -> float:
        nonlocal count
        count += 1
        if count > evaluation:
            raise Killed
        return score(model)

    return dying


def algorithm_1(
    sites: list[Any], score: Callable[[dict[str, int]], float], bar: Callable[[int], float], better: str
) -> dict[str, int | None]:
    """The paper's listing on a plain dictionary of ranks."""
    ranks: dict[str, int] = {}
    result: dict[str, int | None] = {}
    for number, site in enumerate(reversed(sites), 1):
        result[site.name] = None
        for beta in (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9):
            rank = math.floor(round(beta * site.d_out * site.d_in / (site.d_out + site.d_in), 9))
            value = score({**ranks, site.name: rank})
            if value <= bar(number) if better == "lower" else value >= bar(number):
                ranks[site.name] = result[site.name] = rank
                break
    return result


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    amount=st.floats(0.0, 0.6),
    relative=st.booleans(),
    per_site=st.booleans(),
    better=st.sampled_from(["lower", "higher"]),
)
def test_it_is_algorithm_1(seed: int, amount: float, relative: bool, per_site: bool, better: Any) -> None:
    model = tiny_model("llama")
    score = TableScore(seed, 1.0 if better == "lower" else -1.0)
    amount = amount / 10 if relative else amount  # of 10
    sign = 1 if better == "lower" else -1

    def bar(number: int) -> float:
        steps = number if per_site else 1
        return 10 * (1 + sign * amount) ** steps if relative else 10 + sign * steps * amount

    expected = algorithm_1(list(find_sites(model)), score.of, bar, better)
    result = search(model, spectra_of("llama"), score, better=better, tolerance=Tolerance(amount, relative, per_site))
    assert dict(result.plan.ranks) == expected
    assert result.evaluations == len(score.seen) == 1 + len(result.trials)
    assert not low_rank_modules(model)


@cache
def log_probabilities(model_type: str) -> torch.Tensor:
    return logits_of(tiny_model(model_type), tiny_tokens(2, 16, seed=3)).double().log_softmax(-1)


def distance(model: PreTrainedModel) -> float:
    """A real score: how far the model's predictions are from those of the dense one, in nats. Dense is 0."""
    log_p = log_probabilities(model.config.model_type)
    log_q = logits_of(model, tiny_tokens(2, 16, seed=3)).double().log_softmax(-1)
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize(("model_type", "bar"), [("llama", 0.1), ("gpt2", 0.1), ("bert", 0.002)])
def test_real_models_by_brute_force(model_type: str, bar: float) -> None:
    # The same search on copies of the model, whose weights are overwritten by the products, one copy a trial.
    spectra = spectra_of(model_type)
    kept: dict[str, int] = {}

    def overwritten(ranks: dict[str, int]) -> PreTrainedModel:
        model = tiny_model(model_type)
        for name, rank in ranks.items():
            factors, module = spectra[name].cut(rank), model.get_submodule(name)
            weight = factors.dense().float()
            module.weight.data = weight.mT.contiguous() if isinstance(module, Conv1D) else weight
            bias = factors.bias.float() if module.bias is None else module.bias.detach() + factors.bias.float()
            module.bias = nn.Parameter(bias)
        return model

    sites = find_sites(tiny_model(model_type))
    for site in reversed(sites):
        for beta in FEW:
            rank = rank_for(beta, site.d_out, site.d_in)
            if distance(overwritten({**kept, site.name: rank})) <= bar:
                kept[site.name] = rank
                break
    model = tiny_model(model_type)
    before, modules = logits_of(model), dict(model.named_modules())
    result = search(model, spectra, distance, better="lower", tolerance=Tolerance(bar, relative=False), budgets=FEW)
    assert 0 < len(kept) < len(sites)
    assert {name: rank for name, rank in result.plan.ranks.items() if rank is not None} == kept
    assert result.curve[-1].score == pytest.approx(distance(overwritten(kept)), abs=1e-5)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits_of(model), before)


def test_the_plan_is_what_the_score_was_of() -> None:
    model, score = tiny_model("llama"), TableScore()
    result = search(model, spectra_of("llama"), score, better="lower", tolerance=Tolerance(0.5, False))
    method = build_method("sfsd")
    with planned(model, result.plan, spectra_of("llama")):
        assert score(model) == result.curve[-1].score
        standing = logits_of(model)
    assert score(model) == result.dense_score
    compress(model, method, result.plan, calibrate(model, tiny_tokens(6, 16), method), spectra={})
    assert score(model) == result.curve[-1].score
    assert torch.equal(logits_of(model), standing)


@pytest.mark.parametrize(
    ("tolerance", "better", "all_smallest"),
    [
        (Tolerance(1e300), "lower", True),
        (Tolerance(1e300, per_site=True), "lower", True),
        (Tolerance(1e300, relative=False), "higher", True),
        (Tolerance(5.0, per_site=True), "higher", True),
        (Tolerance(-0.5), "lower", False),
        (Tolerance(-100.0, relative=False), "higher", False),
    ],
)
def test_the_ends_of_tolerance(tolerance: Tolerance, better: Any, all_smallest: bool) -> None:
    model, score = tiny_model("llama"), TableScore()
    before, modules = logits_of(model), dict(model.named_modules())
    result = search(model, spectra_of("llama"), score, better=better, tolerance=tolerance)
    sites = find_sites(model)
    smallest = {site.name: rank_for(0.1, site.d_out, site.d_in) if all_smallest else None for site in sites}
    assert dict(result.plan.ranks) == smallest
    assert result.evaluations == 1 + len(sites) * (1 if all_smallest else 9)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits_of(model), before)


def test_the_order_is_from_the_last_linear_to_the_first() -> None:
    model, score, factored = tiny_model("llama"), TableScore(), []

    def spectrum(name: str) -> Factored:
        factored.append(name)
        return spectra_of("llama")[name]

    result = search(model, spectrum, score, better="lower", tolerance=Tolerance(0.1, False))
    names = [site.name for site in reversed(find_sites(model))]
    assert factored == names  # each once
    assert list(result.order) == names
    assert names[0] == "model.layers.2.mlp.down_proj"
    assert names[-1] == "model.layers.0.self_attn.q_proj"


def same(result: SearchResult, expected: SearchResult) -> bool:
    """But for the seconds."""

    def timeless(result: SearchResult) -> dict[str, Any]:
        data = result.to_dict()
        for trial in data["trials"]:
            del trial["seconds"]
        return data

    return timeless(result) == timeless(expected) and result.plan == expected.plan


@pytest.mark.parametrize("kill", [0, 1, 2, 9, 10, 11, 37, 80])
def test_a_killed_search_goes_on(tmp_path: Path, kill: int) -> None:
    path, options = tmp_path / "journal.jsonl", {"better": "lower", "tolerance": Tolerance(0.3, False)}
    expected = search(tiny_model("llama"), spectra_of("llama"), whole := TableScore(), **options)
    options |= {"journal": path, "identity": {"model": "tiny"}}
    first, second, third = TableScore(), TableScore(), TableScore()
    model = tiny_model("llama")
    modules = dict(model.named_modules())
    with pytest.raises(Killed):
        search(model, spectra_of("llama"), killed_at(first, kill), **options)
    assert dict(model.named_modules()) == modules
    with path.open("a") as file:
        file.write('{"key": "torn')
    assert same(search(model, spectra_of("llama"), second, **options), expected)
    assert first.seen + second.seen == whole.seen
    # Finished: nothing is scored, and no spectrum is asked for.
    assert same(search(model, {}, third, **options), expected)
    assert third.seen == []
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 1 + expected.evaluations
    assert {"site", "budget", "rank", "score", "held", "seconds"} <= lines[2].keys()
    assert sum(line.get("held", False) for line in lines) == sum(
        rank is not None for rank in expected.plan.ranks.values()
    )


def test_another_search_does_not_take_the_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    run = lambda tolerance, **identity: search(
        tiny_model("llama"), spectra_of("llama"), TableScore(), better="lower", tolerance=Tolerance(tolerance, False),
        budgets=FEW, journal=path, identity=identity,
    )  # fmt: skip
    run(0.3, model="a")
    before = path.read_bytes()
    with pytest.raises(ValueError, match='model was "a" and is "b"'):
        run(0.3, model="b")
    with pytest.raises(ValueError, match=r"tolerance was .*0.3.* and is .*0.4"):
        run(0.4, model="a")
    with pytest.raises(ValueError, match="say what makes"):
        run(0.3)
    assert path.read_bytes() == before


def test_a_target_ends_the_search_and_can_be_moved(tmp_path: Path) -> None:
    model = tiny_model("llama")
    options = {"better": "lower", "tolerance": Tolerance(0.02, per_site=True)}
    whole = search(model, spectra_of("llama"), TableScore(), **options)
    assert whole.plan.kept_params / whole.plan.dense_params < 0.7
    score, scored = TableScore(), []
    for keep in (1.0, 0.9, 0.75):
        stop = int(keep * whole.plan.dense_params)
        result = search(
            model, spectra_of("llama"), score, **options, stop=stop,
            journal=tmp_path / "journal.jsonl", identity={"model": "tiny"},
        )  # fmt: skip
        assert result.plan.kept_params <= stop
        assert len(result.curve) == 1 or result.curve[-2].kept_params > stop
        assert result.curve == whole.curve[: len(result.curve)]
        assert result.plan == plan_after(whole, result.curve[-1].sites)
        scored.append(len(score.seen))
    assert scored == sorted(set(scored))
    assert len(score.seen) == result.evaluations  # none twice


def plan_after(result: SearchResult, sites: int) -> RankPlan:
    """The plan as it was when that many linears were decided."""
    ranks = {name: result.plan.ranks[name] for name in result.order[:sites]}
    return RankPlan(result.plan.sites, ranks, layout=result.plan.layout, joint=result.plan.joint)


def test_the_curve_is_what_was_walked() -> None:
    model, score = tiny_model("llama"), TableScore()
    result = search(model, spectra_of("llama"), score, better="lower", tolerance=Tolerance(0.02, per_site=True))
    sites = find_sites(model)
    assert [point.sites for point in result.curve] == list(range(len(sites) + 1))
    assert result.curve[0].keep == 1.0
    assert result.curve[0].score == result.dense_score == 10.0
    assert result.curve[-1].evaluations == result.evaluations
    for point in result.curve:
        plan = plan_after(result, point.sites)
        assert plan.kept_params == point.kept_params
        assert plan.kept_params / plan.dense_params == pytest.approx(point.keep)
        assert score.of({name: rank for name, rank in plan.ranks.items() if rank is not None}) == point.score


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
def test_some_sites_a_layout_and_a_multiple(layout: Any) -> None:
    model, score = tiny_model("llama"), TableScore()
    sites = find_sites(model)
    result = search(
        model, spectra_of("llama"), score, better="lower", tolerance=Tolerance(1e9), sites=sites[7:9], budgets=(0.4,),
        layout=layout, rank_multiple=4,
    )  # fmt: skip
    assert set(result.plan.ranks) == {site.name for site in sites[7:9]}
    assert all(rank % 4 == 0 for rank in result.plan.ranks.values())
    assert result.plan.layout == layout
    assert result.curve[-1].kept_params == result.plan.kept_params
    searched = sum(site.num_params for site in sites[7:9])
    stored = result.plan.kept_params - (result.plan.dense_params - searched)
    assert result.curve[-1].keep == pytest.approx(stored / searched)  # of what was searched, not of the model


def test_joint_groups_are_decided_as_one() -> None:
    model = tiny_model("llama")
    sites, method = find_sites(model), build_method("svd")
    groups = {site.input_group: [s for s in sites if s.input_group == site.input_group] for site in sites}
    joint = [name for name, members in groups.items() if len(members) > 1]
    units = {unit.name: unit for unit in units_of(sites, joint)}

    def spectrum(name: str) -> Factored:
        return method.factor(units[name].weight(model))

    result = search(model, spectrum, TableScore(), better="lower", tolerance=Tolerance(2.0, False), joint=joint)
    assert result.plan.joint == frozenset(joint)
    assert result.curve[-1].kept_params == result.plan.kept_params
    assert any(rank is not None for rank in result.plan.ranks.values())
    with planned(model, result.plan, spectrum):
        low = low_rank_modules(model)
    assert {name: module.rank for name, module in low.items()} == {
        name: rank for name, rank in result.plan.ranks.items() if rank is not None
    }
    for name in joint:
        assert len({result.plan.ranks[site.name] for site in groups[name]}) == 1


def test_what_is_left_is_shown(tmp_path: Path) -> None:
    shown: list[tuple[str, int]] = []

    def track(items: Any, description: str, total: int) -> Any:
        shown.append((description, total))
        return items

    options: dict[str, Any] = {"better": "lower", "tolerance": Tolerance(1e9), "budgets": FEW, "track": track}
    options |= {"journal": tmp_path / "journal.jsonl", "identity": {"model": "tiny"}}
    with pytest.raises(Killed):
        search(tiny_model("llama"), spectra_of("llama"), killed_at(TableScore(), 6), **options)
    assert shown[:2] == [("rank search", 21), ("model.layers.2.mlp.down_proj", 3)]
    shown.clear()
    search(tiny_model("llama"), spectra_of("llama"), TableScore(), **options)
    assert shown[0] == ("rank search", 16)  # five were decided


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_model_never_holds(broken: float) -> None:
    model, table = tiny_model("llama"), TableScore()

    def score(scoring: PreTrainedModel) -> float:
        return broken if low_rank_modules(scoring) else table(scoring)

    with pytest.raises(ValueError, match=r"model.layers.2.mlp.down_proj at rank 1 \(keep 0.1\): the score is"):
        search(model, spectra_of("llama"), score, better="lower", tolerance=Tolerance(1e9))
    assert not low_rank_modules(model)


@pytest.mark.parametrize("budgets", [(), (0.0, 0.5), (1.0,), (-0.1,), (1.5,)])
def test_bad_budgets_are_refused(budgets: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"each in \(0, 1\)"):
        search(tiny_model("llama"), {}, TableScore(), better="lower", tolerance=Tolerance(0), budgets=budgets)


def test_a_bad_multiple_is_refused() -> None:
    with pytest.raises(ValueError, match="rank_multiple 0"):
        search(tiny_model("llama"), {}, TableScore(), better="lower", tolerance=Tolerance(0), rank_multiple=0)


def test_tolerances_that_say_nothing_are_refused() -> None:
    for amount in (math.nan, math.inf, -1.0):
        with pytest.raises(ValueError, match="tolerance"):
            Tolerance(amount)
    with pytest.raises(ValueError, match="give an absolute tolerance"):
        Tolerance(0.1).bar(-3.0, "higher", 1)
    assert PERPLEXITY_TOLERANCE.bar(10.0, "lower", 2) == pytest.approx(10 * 1.005**2)
    assert Tolerance(0.03, relative=False).bar(0.7, "higher", 5) == pytest.approx(0.67)
    assert SHARES == (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


@pytest.mark.parametrize(
    ("text", "tolerance"),
    [
        ("0.5% per linear", PERPLEXITY_TOLERANCE),
        ("5%", Tolerance(0.05)),
        ("0.01", Tolerance(0.01, relative=False)),
        ("-1e-3 per linear", Tolerance(-0.001, relative=False, per_site=True)),
    ],
)
def test_a_tolerance_in_words(text: str, tolerance: Tolerance) -> None:
    assert Tolerance.parse(text) == tolerance
    assert Tolerance.parse(str(tolerance)) == tolerance


@pytest.mark.parametrize("text", ["", "much", "5 % of all", "1.2.3", "5 per block"])
def test_a_tolerance_in_other_words_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is none of"):
        Tolerance.parse(text)


def test_perplexity_as_a_score() -> None:
    model, rows = tiny_model("llama"), tiny_tokens(4, 12).ids
    task = Task("perplexity:text")
    score = windows_criterion(task, rows)
    logits = logits_of(model, tiny_tokens(4, 12))[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1).double(), rows[:, 1:].flatten()).exp()
    assert score(model) == pytest.approx(float(expected), rel=1e-5)
    assert score.better == "lower"
    assert score.about != windows_criterion(task, rows.flip(0)).about
    json.dumps(score.about)
    result = search(
        model, spectra_of("llama"), score, better=score.better, tolerance=PERPLEXITY_TOLERANCE, budgets=(0.8,)
    )
    assert result.dense_score == score(model)


def test_tasks_as_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def evaluate(model: Any, tokenizer: Any, tasks: list[Any], **options: Any) -> list[EvalResult]:
        asked.append((tasks[0], options))
        return [EvalResult("t", "acc", 0.5, None, 4, "higher", scores={"acc_norm": Score(0.75)})]

    monkeypatch.setattr(criteria, "evaluate", evaluate)
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    task = Task("lm-eval:piqa", "sfsd-search")
    plain = task_criterion(task, tokenizer, better="higher")
    assert (plain(model), plain.better) == (0.5, "higher")
    assert asked[0][0] == task
    assert plain.about["task"]["split"] == "sfsd-search"
    json.dumps(plain.about)
    assert task_criterion(task, tokenizer, better="higher", score="acc_norm", batch_size=2)(model) == 0.75
    assert asked[1][1]["batch_size"] == 2
    with pytest.raises(ValueError, match=r"lm-eval:piqa@sfsd-search: a search takes lower values .* its result higher"):
        task_criterion(task, tokenizer, better="lower")(model)
    with pytest.raises(ValueError, match="unknown evaluation"):
        task_criterion(Task("perplexty:ptb"), tokenizer, better="higher")
    with pytest.raises(ValueError, match="is not measured on windows"):
        windows_criterion(task, tiny_tokens(2, 8).ids)


@pytest.mark.parametrize("name", ["cost", "divergence:ptb", "similarity:ptb"])
def test_what_cannot_be_searched_by(name: str) -> None:
    with pytest.raises(ValueError, match=r"no score to search by; there are perplexity:CORPUS, .*probing:SET"):
        search_criterion(name, tiny_model("llama"), tiny_tokenizer())
