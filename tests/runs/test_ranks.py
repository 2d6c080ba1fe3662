"""Ranking: losses gathered, scores chosen and searches run on a model, as an allocation asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from eckart.allocation import ALLOCATIONS, Allocation, Allocator, Budget, Curve, RankPlan, settle
from eckart.allocation.search.loss_weights import Probe, ProbeResult
from eckart.calibration.moments import calibrate
from eckart.compression.spectra import spectra_on_demand
from eckart.data.tokens import Tokens
from eckart.evals.task import Task
from eckart.evals.tasks import evaluate
from eckart.evals.texts import windows_of
from eckart.lowrank import Layout, build_method
from eckart.models.sites import Site, find_sites, low_rank_modules
from eckart.models.units import units_of
from eckart.runs.composition import Composition
from eckart.runs.ranks import PROBE_SAMPLES, AllocationInputs, joint_groups, make_score, measure_losses, rank
from tiny import logits_of, tiny_model, tiny_text, tiny_tokenizer, tiny_tokens

LENGTH = 16


@pytest.fixture
def text(tmp_path: Path) -> str:
    """A text to score on."""
    (tmp_path / "text.txt").write_text(tiny_text(600))
    return str(tmp_path / "text.txt")


def inputs_of(method: str = "asvd-i", model_type: str = "llama", **changes: Any) -> AllocationInputs:
    """A tiny model with the moments that a method needs."""
    model, tokens = tiny_model(model_type), tiny_tokens(6, LENGTH)
    moments = calibrate(model, tokens, build_method(method))
    defaults: dict[str, Any] = {
        "blocks": (lambda: moments) if build_method(method).needs else None,
        "tokens": tokens,
        "tokenizer": tiny_tokenizer(),
        "context": LENGTH,
    }
    return AllocationInputs(model, find_sites(model), **{**defaults, **changes})


def spread(model_type: str) -> tuple[Any, list[str]]:
    """A model's joint groups, and the names of all input groups that more than one linear reads."""
    sites = find_sites(tiny_model(model_type))
    names = [site.input_group for site in sites]
    return sites, sorted({name for name in names if names.count(name) > 1})


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_joint_groups_are_whole(model_type: str) -> None:
    sites, shared = spread(model_type)
    assert sorted(joint_groups(sites, sites)) == shared
    for group in shared:
        first = next(site for site in sites if site.input_group == group)
        remaining = [site for site in sites if site != first]
        assert sorted(joint_groups(remaining, sites)) == [name for name in shared if name != group]
    assert joint_groups(sites[:0], sites) == frozenset()


@pytest.mark.parametrize("method", ["svd", "asvd-i", "nsvd-i", "kfac"])
def test_losses_are_the_tails_of_every_unit(method: str) -> None:
    inputs, factoring = inputs_of(method), build_method(method)
    joint = joint_groups(inputs.sites, inputs.sites)
    blocks = inputs.blocks() if inputs.blocks else ()
    alone = spectra_on_demand(inputs.model, factoring, blocks)
    together = spectra_on_demand(inputs.model, factoring, blocks, joint=joint)
    separate, units = ({unit.sites for unit in units_of(inputs.sites, groups)} for groups in ((), joint))
    for groups, both, expected in (
        ((), True, separate),
        (joint, False, units),
        (joint, True, units | {sites for sites in separate if sites[0].input_group in joint}),
    ):
        curves = measure_losses(factoring, inputs, frozenset(groups), both=both)
        assert len(curves) == len(expected)
        assert {curve.sites for curve in curves} == expected
        for curve in curves:
            spectrum = (together if len(curve.sites) > 1 else alone)(curve.name)
            # Of products in float32, where the moments are known to that only.
            whole = curve.losses[0]
            np.testing.assert_allclose(curve.losses, spectrum.tails().numpy(), rtol=1e-5, atol=1e-6 * whole)


def test_probes_weigh_every_curve() -> None:
    """Those of linears and those of groups, each its own."""
    inputs, method = inputs_of("asvd-i"), build_method("asvd-i")
    equal, alone, joint = (
        rank(Composition(method, Allocation(name="global", weights=weights), joint=joint), Budget(keep=0.5), inputs)
        for weights, joint in (("equal", False), ("probes", False), ("probes", True))
    )
    assert equal.facts == {}
    groups, weights = joint_groups(inputs.sites, inputs.sites), alone.facts["weights"]
    assert weights.keys() == {site.name for site in inputs.sites}
    assert joint.facts["weights"].keys() == weights.keys() | {unit.name for unit in units_of(inputs.sites, groups)}
    assert joint.facts["weights"].items() >= weights.items()
    assert all(weight >= 0 for weight in joint.facts["weights"].values())
    # A dense pass and one for each linear; with groups, another dense one and one for each group.
    assert alone.facts["evaluations"] == 1 + len(inputs.sites)
    assert joint.facts["evaluations"] == alone.facts["evaluations"] + 1 + len(groups)
    for ranking in (equal, alone, joint):
        assert ranking.plan.kept_params <= 0.5 * ranking.plan.dense_params
    assert alone.plan.ranks != equal.plan.ranks


def test_probes_read_some_windows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tokens] = []

    def note(_model: object, _spectra: object, tokens: Tokens, **_options: object) -> ProbeResult:
        seen.append(tokens)
        return ProbeResult(tuple(Probe(site.name, 1, 0.5, 1.0, 0.0) for site in inputs.sites), 1)

    monkeypatch.setattr("eckart.runs.ranks.probe_linears", note)
    inputs = inputs_of("svd", tokens=tiny_tokens(PROBE_SAMPLES + 4, LENGTH))
    rank(Composition(build_method("svd"), Allocation(name="global", weights="probes")), Budget(keep=0.5), inputs)
    (tokens,) = seen
    assert inputs.tokens is not None
    assert torch.equal(tokens.ids, inputs.tokens.ids[:PROBE_SAMPLES])


@pytest.mark.parametrize(
    "allocation",
    [
        Allocation(name="global", weights="probes"),
        Allocation(name="effective-rank"),
        Allocation(name="surgical", score="perplexity:nowhere.txt"),
        Allocation(name="sensitivity", score="perplexity:nowhere.txt"),
    ],
)
def test_a_budget_of_everything_is_the_dense_model_and_measures_nothing(allocation: Allocation) -> None:
    def refuse() -> Any:
        raise AssertionError("nothing has to be measured")

    ranking = rank(Composition(build_method("asvd-i"), allocation), Budget(keep=1.0), inputs_of(blocks=refuse))
    assert set(ranking.plan.ranks.values()) == {None}
    assert len(ranking.plan.ranks) == len(ranking.plan.sites)
    assert ranking.facts == {}


def test_search_and_evaluation_windows_are_disjoint_and_all_there_is(text: str) -> None:
    inputs, task = inputs_of(), f"perplexity:{text}"
    parts = {
        split: windows_of(inputs.model, inputs.tokenizer, Task(task, split), context=LENGTH)
        for split in ("test", "sfsd-search", "sfsd-evaluation")
    }
    whole, search, evaluation = ([tuple(row.tolist()) for row in rows] for rows in parts.values())
    assert len(set(whole)) == len(whole) == 600 // LENGTH
    assert len(search) == len(whole) // 5
    assert not set(search) & set(evaluation)
    assert sorted(search + evaluation) == sorted(whole)
    for split, rows in parts.items():
        (result,) = evaluate(inputs.model, inputs.tokenizer, [Task(task, split)], context=LENGTH)
        assert result.n == len(rows)
        assert result.settings["split"] == split
        few = windows_of(inputs.model, inputs.tokenizer, Task(task, split, limit=2), context=LENGTH)
        assert torch.equal(few, rows[:2])


def test_too_little_text_to_split_says_so(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text(tiny_text(60))
    with pytest.raises(ValueError, match="of windows of 16 tokens, 3 documents are too few for sfsd-search"):
        windows_of(
            inputs_of().model, tiny_tokenizer(), Task(f"perplexity:{tmp_path}/short.txt", "sfsd-search"), context=LENGTH
        )


@pytest.mark.parametrize("limit", [None, 3])
def test_perplexity_as_a_score_is_the_evaluation_of_the_search_split(text: str, limit: int | None) -> None:
    inputs, name = inputs_of(), f"perplexity:{text}"
    score = make_score(Allocation(name="surgical", score=name, limit=limit), inputs)
    (result,) = evaluate(inputs.model, inputs.tokenizer, [Task(name, "sfsd-search", limit=limit)], context=LENGTH)
    assert score(inputs.model) == pytest.approx(result.value, rel=1e-12)
    assert score.better == "lower"
    Path(text).write_text(tiny_text(600, seed=9))
    assert make_score(Allocation(name="surgical", score=name, limit=limit), inputs).about != score.about


@pytest.mark.parametrize(
    ("task", "split", "others"),
    [
        ("stereoset", "sfsd-search", "sfsd-evaluation"),
        ("probing:cola", "train-without-test", "test"),
        ("classification:cola", "train-without-test", "test"),
    ],
)
def test_other_scores_read_what_is_for_searching(task: str, split: str, others: str) -> None:
    allocation = Allocation(name="surgical", score=task, limit=7)
    for score, part in (
        (make_score(allocation, inputs_of()), split),
        (make_score(allocation, inputs_of(), others=True), others),
    ):
        assert score.better == "higher"
        assert (score.about["task"]["split"], score.about["task"]["limit"]) == (part, 7)
        assert score.about["score"] == ("selectivity" if task.startswith("probing") else None)


def test_a_search_that_ends_above_its_budget_says_so(text: str) -> None:
    inputs = inputs_of()
    none = Composition(
        build_method("asvd-i"), Allocation(name="surgical", score=f"perplexity:{text}", tolerance="-99%")
    )
    with pytest.raises(
        ValueError, match=r"its ranks keep 23,040 of 23,040 numbers, more than the budget's 11,520: raise the tolerance"
    ):
        rank(none, Budget(keep=0.5), inputs)
    assert rank(none, None, inputs).plan.kept_params == sum(site.num_params for site in inputs.sites)


@pytest.mark.parametrize("name", ["surgical", "sensitivity"])
def test_a_search_leaves_the_model_as_it_was(text: str, name: str) -> None:
    inputs = inputs_of("svd")
    before = logits_of(inputs.model)
    allocation = Allocation(name=name, score=f"perplexity:{text}")  # type: ignore[arg-type]
    ranking = rank(Composition(build_method("svd"), allocation), Budget(keep=0.8), inputs)
    assert not low_rank_modules(inputs.model)
    assert torch.equal(logits_of(inputs.model), before)
    assert ranking.plan.kept_params <= 0.8 * ranking.plan.dense_params
    assert ranking.facts["search"]["evaluations"] >= len(ranking.facts["search"]["trials"]) > 0


def test_a_new_allocation_is_a_function_and_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def last_first(
        sites: Sequence[Site], curves: Sequence[Curve], numbers: int, *, layout: Layout, rank_multiple: int
    ) -> RankPlan:
        """Rank 1 for one linear after another, from the last, until the budget is met."""
        read.extend(curve.name for curve in curves if curve.losses[-1] <= curve.losses[0])
        ranks: dict[str, int | None] = {}
        for curve in reversed(curves):
            if settle(sites, ranks, layout=layout).kept_params > numbers:
                ranks[curve.name] = rank_multiple
        return settle(sites, ranks, layout=layout)

    monkeypatch.setitem(ALLOCATIONS, "last-first", Allocator(last_first, "from the last", needs="losses"))
    inputs = inputs_of()
    plan = rank(Composition(build_method("asvd-i"), Allocation(name="last-first")), Budget(keep=0.5), inputs).plan
    assert sorted(read) == sorted(site.name for site in inputs.sites)
    cut = {name for name, rank in plan.ranks.items() if rank == 1}
    assert 0 < len(cut) < len(read)
    assert cut == set(read[-len(cut) :])
    assert plan.kept_params <= 0.5 * plan.dense_params
