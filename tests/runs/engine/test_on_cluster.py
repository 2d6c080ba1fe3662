"""Work on a cluster: the numbers and decisions of one process, whatever the number of workers."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import eckart
from eckart.allocation import plan
from eckart.allocation.search.loss_weights import probe_linears
from eckart.allocation.search.sensitivity import measure_sensitivity
from eckart.compression.cuts import CutRequest, FactorRequest
from eckart.compression.spectra import spectra_on_demand
from eckart.evals.result import EvalResult
from eckart.evals.subject import Setup, Subject
from eckart.evals.task import Task
from eckart.lowrank import METHODS, build_method
from eckart.models.sites import find_sites
from eckart.models.units import Unit
from eckart.runs.engine.base import CalibrationRequest, EvaluationRequest, SearchRequest
from eckart.runs.engine.local import HERE
from eckart.runs.engine.on_cluster import OnCluster
from runs.engine.clusters import TOKENS, compressed, dying_once, score, searched, told
from tiny import Run, logits_of, relative, tiny_pairs

ray = pytest.importorskip("ray", reason="Ray is an optional extra: pip install 'eckart[ray]'")


def factors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The low-rank factors of a compressed model."""
    return {name: value for name, value in model.state_dict().items() if "left" in name or "right" in name}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "method"), [("llama", "asvd-i"), ("llama", "kfac"), ("llama", "svd"), ("gpt2", "sfsd")]
)
def test_any_number_of_workers_gives_the_same_factors(engine: OnCluster, place: Path, name: str, method: str) -> None:
    alone = compressed(HERE, place / name, method)
    models = []
    for engine.cluster.requested in (4, 1, 2):
        models.append(compressed(engine, place / name, method))
    for other in models[1:]:
        assert factors(other)
        assert all(torch.equal(factors(other)[key], value) for key, value in factors(models[0]).items())
    assert relative(logits_of(models[0]), logits_of(alone)) < (1e-4 if name == "llama" else 5e-2)


@pytest.mark.parametrize(
    ("name", "method", "options"), [("t5", "kfac", {"weighted": True}), ("bart", "asvd-i", {})], ids=["t5", "bart"]
)
def test_workers_calibrate_and_cut_encoder_decoders(
    engine: OnCluster, place: Path, name: str, method: str, options: dict[str, Any]
) -> None:
    pairs = tiny_pairs(11, padded=True)
    alone, clustered = (compressed(where, place / name, method, pairs, options) for where in (HERE, engine))
    assert factors(clustered)
    assert relative(logits_of(clustered), logits_of(alone)) < 1e-3


def test_an_encoder_decoder_s_recipe_runs_on_a_cluster(run: Run, joined: None, place: Path, tmp_path: Path) -> None:
    """The anchored order of `best`, and evaluations of both stacks side by side."""
    text, ends = place / "train.txt", []
    for engine in ("local", "ray"):
        given = ["--calibration", text, "--samples", "8", "--length", "16", "--no-cache", "--engine", engine]
        status, printed = run("compress", place / "t5", tmp_path / engine, "--keep", "0.6", *given)
        assert status == 0, printed
        ends.append(logits_of(eckart.load_model(tmp_path / engine)))
    assert relative(*ends) < 1e-3
    tasks = ["--task", f"perplexity:{text}", "--task", f"divergence:{text}", "--reference", place / "t5"]
    status, printed = run("eval", tmp_path / "ray", *tasks, "--length", "16", "--limit", "4", "--engine", "ray")
    assert status == 0, printed
    assert "top1" in printed


@pytest.mark.slow
@pytest.mark.parametrize("name", ["masked", "classifier"])
def test_gradients_that_are_drawn_are_those_of_one_process(engine: OnCluster, place: Path, name: str) -> None:
    model = eckart.load_model(place / name)
    alone, clustered = (
        where.gather_gradients(CalibrationRequest(model, TOKENS, build_method("kfac"))) for where in (HERE, engine)
    )
    assert list(clustered) == list(alone)
    for site, moments in alone.items():
        assert (clustered[site].examples, clustered[site].tokens) == (moments.examples, moments.tokens)
        for key, value in moments.sums.items():
            assert relative(clustered[site].sums[key], value) < 1e-6


def test_every_method_goes_to_a_worker(engine: OnCluster, place: Path) -> None:
    model = eckart.load_model(place / "llama")
    sites = [site for site in find_sites(model) if site.block == 1]
    for name in METHODS:
        method = build_method(name)
        (part,) = HERE.calibrate_by_block(CalibrationRequest(model, TOKENS, method, sites=sites))
        ranks = plan(model, 0.5)
        units = [unit for unit in ranks.units if unit.sites[0].block == 1]
        request = CutRequest(FactorRequest(method, units, part, partial(Unit.weight, model=model)), ranks)
        alone, clustered = (dict(where.cut_units(request)) for where in (HERE, engine))
        assert list(clustered) == list(alone)
        for unit, cut in alone.items():
            assert relative(clustered[unit].factors.dense(), cut.factors.dense()) < 1e-6, (name, unit.name)


@pytest.mark.slow
def test_a_search_decides_as_it_would_alone(engine: OnCluster, place: Path, tmp_path: Path) -> None:
    alone = searched(HERE, place / "llama", journal=tmp_path / "alone", identity={"of": "test"})
    assert 0.2 < alone.curve[-1].keep < 0.98
    # In the middle, so that the worker that stands in has to put in what was decided before.
    dying = dying_once(tmp_path / "marks", score(), alone.evaluations // 2)
    clustered = searched(engine, place / "llama", dying, journal=tmp_path / "team", identity={"of": "test"})
    assert (tmp_path / "marks" / "died").exists()
    assert told(clustered) == told(alone)
    keys = [
        [json.loads(line).get("key") for line in (tmp_path / name).read_text().splitlines()]
        for name in ("alone", "team")
    ]
    assert keys[0] == keys[1]

    lines = (tmp_path / "team").read_text().splitlines(keepends=True)
    (tmp_path / "team").write_text("".join(lines[: len(lines) // 2]))
    assert told(searched(engine, place / "llama", journal=tmp_path / "team", identity={"of": "test"})) == told(alone)


def test_sensitivity_and_probes_are_those_of_one_process(engine: OnCluster, place: Path, tmp_path: Path) -> None:
    model, method = eckart.load_model(place / "llama"), build_method("asvd-i")
    moments = list(HERE.calibrate_by_block(CalibrationRequest(model, TOKENS, method)))
    sites = find_sites(model)[:6]
    spectra = spectra_on_demand(model, method, moments)
    shared: dict[str, Any] = {"sites": sites, "identity": {"of": "test"}}
    with engine.team(SearchRequest(model, method, lambda: moments), score()) as team:
        results = [
            measure_sensitivity(
                model, source, score(), better="lower", team=who, journal=tmp_path / name, shares=(0.2, 0.5), **shared
            )
            for source, who, name in ((spectra, None, "alone"), ({}, team, "team"))
        ]
    assert told(results[0]) == told(results[1])
    budget = sum(site.num_params for site in find_sites(model)) - sum(site.num_params for site in sites) // 3
    assert results[0].plan_within(budget) == results[1].plan_within(budget)

    alone = probe_linears(model, spectra, TOKENS, sites=sites)
    with engine.probing(SearchRequest(model, method, lambda: moments)) as spread:
        result = probe_linears(model, {}, TOKENS, sites=sites, spread=spread)
    assert [probe.rank for probe in result.probes] == [probe.rank for probe in alone.probes]
    for one, other in zip(alone.probes, result.probes, strict=True):
        assert other.divergence == pytest.approx(one.divergence, rel=1e-3, abs=1e-6)


def test_evaluations_come_in_order_and_a_refusal_names_its_task(engine: OnCluster, place: Path) -> None:
    model, tokenizer = eckart.load_model(place / "llama"), eckart.load_tokenizer(place / "llama")
    texts = [f"perplexity:{place / name}" for name in ("test.txt", "train.txt")]
    divergence = Task(f"divergence:{place / 'test.txt'}", length=16)
    tasks = [Task(texts[0], length=16), Task("cost"), Task(texts[1], length=9999), divergence, Task(texts[1], length=8)]
    subject = Subject(model, tokenizer, reference=eckart.load_model(place / "llama"))
    alone, clustered = (list(where.outcomes(EvaluationRequest(subject, tasks, Setup()))) for where in (HERE, engine))
    assert [type(outcome) for outcome in clustered] == [type(outcome) for outcome in alone]
    assert isinstance(clustered[2], ValueError)
    assert str(clustered[2]).startswith(tasks[2].label)
    for one, other in zip(alone, clustered, strict=True):
        if isinstance(one, EvalResult) and one.task != "cost":
            assert isinstance(other, EvalResult)
            assert other.task == one.task
            assert other.value == pytest.approx(one.value, rel=1e-5, abs=1e-6)


def test_a_recipe_runs_on_a_cluster(run: Run, joined: None, place: Path, tmp_path: Path) -> None:
    """From the command line: a search, the best composition's anchored order, evaluations."""
    recipes = {
        "best": {"method": {"name": "best"}, "keep": 0.6, "refine": {"steps": 1}},
        "search": {"method": {"name": "asvd-i"}, "keep": 0.6, "allocation": {"name": "sensitivity", "limit": 4}},
    }
    for name, recipe in recipes.items():
        if name == "search":
            recipe["allocation"]["score"] = f"perplexity:{place / 'test.txt'}"  # type: ignore[index]
        recipe |= {
            "model": str(place / "llama"),
            "context": 16,
            "calibration": {"corpus": str(place / "train.txt"), "samples": 8},
            "evaluate": [
                {"task": f"perplexity:{place / 'test.txt'}", "split": "sfsd-evaluation"},
                f"perplexity:{place / 'train.txt'}",
            ],
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        for where in ("local", "ray"):
            out = tmp_path / f"{name}-{where}"
            status, printed = run("run", tmp_path / "recipe.yaml", "--out", out, "--no-cache", "--engine", where)
            assert status == 0, printed
        measured = Task(f"perplexity:{place / 'test.txt'}", split="sfsd-evaluation").slug
        plans, values = (
            [json.loads((tmp_path / f"{name}-{where}" / file).read_text()) for where in ("local", "ray")]
            for file in ("model/plan.json", f"evals/{measured}.json")
        )
        assert plans[0] == plans[1]
        assert values[0]["value"] == pytest.approx(values[1]["value"], rel=1e-3)


def test_searching_from_the_command_line(run: Run, joined: None, place: Path, tmp_path: Path) -> None:
    for where in ("local", "ray"):
        status, printed = run(
            "search", place / "llama", tmp_path / f"{where}.json", "--score", f"perplexity:{place / 'test.txt'}",
            "--length", "16", "--calibration", place / "train.txt", "--samples", "8", "--no-cache", "--tolerance", "2%",
            "--budget", "0.3", "--budget", "0.6", "--engine", where,
        )  # fmt: skip
        assert status == 0, printed
    assert (tmp_path / "local.json").read_text() == (tmp_path / "ray.json").read_text()
    status, printed = run("eval", place / "llama", "--task", f"perplexity:{place / 'test.txt'}", "--engine", "ray")
    assert status == 0, printed
