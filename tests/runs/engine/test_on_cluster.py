"""Work on a Ray cluster: the numbers of one process, whatever number of workers, and whoever of them is lost.

The cluster is a real one, of several nodes of one core each on this machine.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import eckart
from eckart.allocation import plan
from eckart.allocation.search.criteria import Criterion, windows_criterion
from eckart.allocation.search.loss_weights import probe_linears
from eckart.allocation.search.sensitivity import measure_sensitivity
from eckart.allocation.search.surgical import Tolerance, search
from eckart.calibration.gradients import collect_gradients
from eckart.compression.spectra import spectra_on_demand
from eckart.data.tokens import Tokens
from eckart.evals.result import EvalResult
from eckart.evals.tasks import Task
from eckart.lowrank import METHODS, build_method
from eckart.models.sites import find_sites
from eckart.runs.engine.cluster import Cluster, ClusterError, open_cluster
from eckart.runs.engine.on_cluster import HERE, OnCluster, open_engine
from eckart.runs.engine.shares import branches, count_shares, put_together, share_of
from tiny import Run, logits_of, relative, tiny_model, tiny_text, tiny_tokenizer, tiny_tokens

ray = pytest.importorskip("ray", reason="Ray is an optional extra: pip install 'eckart[ray]'")

TOKENS = tiny_tokens(11, 16, padded=True)
BLOCKS = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models, and texts to calibrate and to score on."""
    folder = tmp_path_factory.mktemp("cluster")
    tiny_model("llama", num_hidden_layers=BLOCKS).save_pretrained(folder / "llama")
    tiny_tokenizer().save_pretrained(folder / "llama")
    tiny_model("llama", num_hidden_layers=8).save_pretrained(folder / "deep")
    tiny_model("gpt2", dtype=torch.bfloat16).save_pretrained(folder / "gpt2")
    tiny_model("bert").save_pretrained(folder / "masked")
    tiny_model("bert", "classifier").save_pretrained(folder / "classifier")
    (folder / "train.txt").write_text(tiny_text(900, seed=1))
    (folder / "test.txt").write_text(tiny_text(400, seed=2))
    return folder


@pytest.mark.parametrize("count", [1, 2, 3, 5, 32])
def test_what_workers_add_up_is_one_sum(count: int) -> None:
    class Noted:
        """A sum that shows in which order it was made."""

        def __init__(self, text: str) -> None:
            self.text = text

        def __add__(self, other: Noted) -> Noted:
            return Noted(f"({self.text}+{other.text})")

    tree = range(count)
    single = [range(number, number + 1) for number in tree]
    whole = put_together(tree, single, lambda share: {"x": Noted(str(share.start))})["x"].text
    for workers in range(1, count + 1):
        cuts = [worker * count // workers for worker in range(workers + 1)]
        made = {}
        for start, stop in pairwise(cuts):
            for branch in branches(tree, range(start, stop)):
                made[branch] = put_together(branch, single, lambda share: {"x": Noted(str(share.start))})
        assert sorted(n for branch in made for n in branch) == list(tree)
        assert put_together(tree, made, made.pop)["x"].text == whole


def test_shares_are_all_of_the_samples_once() -> None:
    tokens = tiny_tokens(75, 4)
    shares = [share_of(tokens, number) for number in range(count_shares(tokens))]
    assert torch.equal(torch.cat([rows.ids for rows, _ in shares]), tokens.ids)
    assert all(len(rows) in (2, 3) for rows, _ in shares)
    assert all(len(before) == sum(len(rows) for rows, _ in shares[:n]) for n, (_, before) in enumerate(shares))


@pytest.mark.parametrize(("model_type", "head"), [("llama", None), ("bert", None), ("bert", "classifier")])
def test_gradients_of_parts_add_up_to_those_of_the_whole(model_type: str, head: str | None) -> None:
    model, needs = tiny_model(model_type, head), frozenset({"fisher_in", "gradient_covariance"})
    sites = find_sites(model)[:3]
    whole = collect_gradients(model, TOKENS, sites, needs)
    parts = [collect_gradients(model, rows, sites, needs, after=before) for rows, before in map(share, (0, 1, 2))]
    for site in sites:
        summed = parts[0][site.name] + parts[1][site.name] + parts[2][site.name]
        assert (summed.examples, summed.tokens) == (whole[site.name].examples, whole[site.name].tokens)
        for name, value in whole[site.name].sums.items():
            assert relative(summed.sums[name], value) < 1e-9


def share(number: int) -> tuple[Tokens, Tokens]:
    """A third of the samples, and those before it."""
    ends = (0, 3, 8, 11)
    start, stop = ends[number], ends[number + 1]
    return (
        replace(TOKENS, ids=TOKENS.ids[start:stop], mask=TOKENS.mask[start:stop]),
        replace(TOKENS, ids=TOKENS.ids[:start], mask=TOKENS.mask[:start]),
    )


# Before the cluster of the tests is there, which every later test has joined.
def test_an_address_where_no_cluster_is_is_told_at_once(run: Run, place: Path, tmp_path: Path) -> None:
    start = time.perf_counter()
    for address, told in (("127.0.0.1:1", "nothing answers at 127.0.0.1:1"), ("here", "is not HOST:PORT")):
        status, printed = run(
            "compress", place / "llama", tmp_path / "out", "--keep", "0.5", "--engine", "ray", "--address", address
        )
        assert status == 2
        assert told in " ".join(printed.split())
    assert time.perf_counter() - start < 20
    assert not (tmp_path / "out").exists()


def test_a_place_that_is_no_cluster_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    monkeypatch.setattr("eckart.runs.engine.cluster.PATIENCE", 2.0)
    with socket.socket() as somebody:
        somebody.bind(("127.0.0.1", 0))
        somebody.listen()
        address = f"127.0.0.1:{somebody.getsockname()[1]}"
        with pytest.raises(ClusterError, match=f"{address} is no Ray head"), open_cluster(address):
            pass


def test_without_ray_the_extra_is_named(run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    status, printed = run("compress", place / "llama", tmp_path / "out", "--keep", "0.5", "--engine", "ray")
    assert status == 2
    assert "pip install 'eckart[ray]'" in printed


def test_engines_are_named(run: Run, place: Path, tmp_path: Path) -> None:
    for more, told in (
        (("--engine", "mpi"), "none of local, ray"),
        (("--address", "auto"), "add --engine ray"),
        (("--engine", "ray", "--out-of-core"), "leave out --engine"),
    ):
        status, printed = run("compress", place / "llama", tmp_path / "out", "--keep", "0.5", *more)
        assert status == 2
        assert told in printed


@pytest.fixture(scope="module")
def nodes() -> Iterator[Any]:
    """A cluster of two nodes with a core each, which this process has joined."""
    from ray.cluster_utils import Cluster as Nodes

    shape = {"num_cpus": 1, "object_store_memory": 80_000_000}
    # A worker takes seconds to start: those that have nothing to do are not ended.
    kept = {"num_workers_soft_limit": 6, "idle_worker_killing_time_threshold_ms": 600_000}
    kept |= {"health_check_period_ms": 1000, "health_check_failure_threshold": 3}
    head = {**shape, "include_dashboard": False, "_system_config": kept}
    cluster = Nodes(initialize_head=True, head_node_args=head)
    cluster.add_node(**shape)
    with open_cluster(cluster.address):
        yield cluster
    cluster.shutdown()


@pytest.fixture(scope="module")
def engine(nodes: Any) -> OnCluster:
    """Two workers, one on each node."""
    return OnCluster(Cluster(2))


@pytest.fixture
def joined(engine: OnCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the workers that are there, instead of starting new ones."""
    monkeypatch.setattr("eckart.runs.engine.on_cluster.open_cluster", lambda *_: nullcontext(engine.cluster))


def processes(nodes: Any, name: str) -> list[int]:
    """The workers of this test's cluster that are at something of this name."""
    ours = {process.process.pid for node in nodes.list_all_nodes() for process in node.all_processes["raylet"]}
    found = []
    for folder in Path("/proc").iterdir():
        try:
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue
        if folder.name.isdigit() and parent in ours and title.startswith(f"ray::{name}"):
            found.append(int(folder.name))
    return found


def dying_once(marks: Path, work: Callable[..., Any], call: int = 1) -> Callable[..., Any]:
    """`work`, but the worker that is at its n-th call, of all workers together, kills itself."""
    kill, number = os.kill, signal.SIGKILL
    marks.mkdir()

    def called(*arguments: Any) -> Any:
        (marks / str(time.time_ns())).touch()
        if len(list(marks.iterdir())) >= call and not (marks / "died").exists():
            (marks / "died").touch()
            kill(os.getpid(), number)
        return work(*arguments)

    return called


def factors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The low-rank factors of a compressed model."""
    return {name: value for name, value in model.state_dict().items() if "left" in name or "right" in name}


def compressed(where: Any, path: Path, method: str, tokens: Tokens = TOKENS) -> PreTrainedModel:
    """The model at a path, compressed to half on an engine; first all of the moments, so that few workers do."""
    model, built = eckart.load_model(path), build_method(method)
    moments = list(where.calibrate_by_block(model, tokens, built, batch_size=4))
    if where is not HERE:
        where.cluster.wanted = min(where.cluster.wanted, 2)
    eckart.compress(model, built, plan(model, 0.5), moments, cut=where.cut_units)
    return model


@pytest.mark.parametrize(
    ("name", "method"), [("llama", "asvd-i"), ("llama", "kfac"), ("llama", "svd"), ("gpt2", "sfsd")]
)
def test_any_number_of_workers_gives_the_same_factors(engine: OnCluster, place: Path, name: str, method: str) -> None:
    alone = compressed(HERE, place / name, method)
    found = []
    for engine.cluster.wanted in (4, 1, 2):
        found.append(compressed(engine, place / name, method))
    for other in found[1:]:
        assert factors(other)
        assert all(torch.equal(factors(other)[key], value) for key, value in factors(found[0]).items())
    assert relative(logits_of(found[0]), logits_of(alone)) < (1e-4 if name == "llama" else 5e-2)


@pytest.mark.parametrize("name", ["masked", "classifier"])
def test_gradients_that_are_drawn_are_those_of_one_process(engine: OnCluster, place: Path, name: str) -> None:
    model = eckart.load_model(place / name)
    alone, found = (where.gather_gradients(model, TOKENS, build_method("kfac")) for where in (HERE, engine))
    assert list(found) == list(alone)
    for site, moments in alone.items():
        assert (found[site].examples, found[site].tokens) == (moments.examples, moments.tokens)
        for key, value in moments.sums.items():
            assert relative(found[site].sums[key], value) < 1e-6


def test_every_method_goes_to_a_worker(engine: OnCluster, place: Path) -> None:
    model = eckart.load_model(place / "llama")
    sites = [site for site in find_sites(model) if site.block == 1]
    for name in METHODS:
        method = build_method(name)
        (part,) = HERE.calibrate_by_block(model, TOKENS, method, sites=sites)
        ranks = plan(model, 0.5)
        units = [unit for unit in ranks.units if unit.sites[0].block == 1]
        alone, found = (
            dict(where.cut_units(method, units, ranks, part, lambda unit: unit.weight(model)))
            for where in (HERE, engine)
        )
        assert list(found) == list(alone)
        for unit, cut in alone.items():
            assert relative(found[unit].factors.dense(), cut.factors.dense()) < 1e-6, (name, unit.name)


def test_a_killed_worker_is_replaced(nodes: Any, engine: OnCluster, place: Path) -> None:
    model, method = eckart.load_model(place / "deep"), build_method("asvd-i")
    whole = list(engine.calibrate_by_block(model, TOKENS, method))
    stream = engine.calibrate_by_block(model, TOKENS, method)
    found = [next(stream)]
    doomed = processes(nodes, "_stream")
    assert doomed
    os.kill(doomed[0], signal.SIGKILL)
    found += stream
    for block, other in zip(whole, found, strict=True):
        for group, moments in block.inputs.items():
            assert all(torch.equal(other.inputs[group].sums[key], value) for key, value in moments.sums.items())


def test_a_factorisation_whose_worker_dies_is_done_again(engine: OnCluster, place: Path, tmp_path: Path) -> None:
    model, method = eckart.load_model(place / "llama"), build_method("asvd-i")
    moments = list(HERE.calibrate_by_block(model, TOKENS, method))
    assert method.stage.root is not None
    dying = replace(method, stage=replace(method.stage, root=dying_once(tmp_path / "marks", method.stage.root, 5)))
    other = eckart.load_model(place / "llama")
    eckart.compress(model, method, plan(model, 0.5), moments)
    eckart.compress(other, dying, plan(other, 0.5), moments, cut=engine.cut_units)
    assert (tmp_path / "marks" / "died").exists()
    assert relative(logits_of(other), logits_of(model)) < 1e-5


@cache
def score() -> Criterion:
    return windows_criterion(Task("perplexity:text"), tiny_tokens(4, 16, seed=5).ids)


def searched(where: Any, path: Path, criterion: Any = None, **more: Any) -> Any:
    """A surgical search on an engine."""
    model, method = eckart.load_model(path), build_method("asvd-i")
    moments = list(HERE.calibrate_by_block(model, TOKENS, method))
    with where.team(model, method, lambda: moments, criterion or score()) as team:
        spectra = {} if team else spectra_on_demand(model, method, moments)
        return search(model, spectra, score(), better="lower", tolerance=Tolerance.parse("-1%"), team=team, **more)


def told(result: Any) -> dict[str, Any]:
    """A result without what is never the same, seconds and the last digits."""
    text = json.dumps(result.to_dict())
    return json.loads(text, parse_float=lambda digits: round(float(digits), 3), object_hook=_timeless)


def _timeless(record: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key != "seconds"}


def test_a_search_decides_as_it_would_alone(engine: OnCluster, place: Path, tmp_path: Path) -> None:
    alone = searched(HERE, place / "llama", journal=tmp_path / "alone", identity={"of": "test"})
    assert 0.2 < alone.curve[-1].keep < 0.98
    # In the middle, so that the worker that stands in has to put in what was decided before.
    dying = dying_once(tmp_path / "marks", score(), alone.evaluations // 2)
    found = searched(engine, place / "llama", dying, journal=tmp_path / "team", identity={"of": "test"})
    assert (tmp_path / "marks" / "died").exists()
    assert told(found) == told(alone)
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
    moments = list(HERE.calibrate_by_block(model, TOKENS, method))
    sites = find_sites(model)[:6]
    spectra = spectra_on_demand(model, method, moments)
    shared: dict[str, Any] = {"sites": sites, "identity": {"of": "test"}}
    with engine.team(model, method, lambda: moments, score()) as team:
        results = [
            measure_sensitivity(
                model, given, score(), better="lower", team=who, journal=tmp_path / name, shares=(0.2, 0.5), **shared
            )
            for given, who, name in ((spectra, None, "alone"), ({}, team, "team"))
        ]
    assert told(results[0]) == told(results[1])
    budget = sum(site.num_params for site in find_sites(model)) - sum(site.num_params for site in sites) // 3
    assert results[0].plan_within(budget) == results[1].plan_within(budget)

    alone = probe_linears(model, spectra, TOKENS, sites=sites)
    with engine.probing(model, method, lambda: moments) as spread:
        found = probe_linears(model, {}, TOKENS, sites=sites, spread=spread)
    assert [probe.rank for probe in found.probes] == [probe.rank for probe in alone.probes]
    for one, other in zip(alone.probes, found.probes, strict=True):
        assert other.divergence == pytest.approx(one.divergence, rel=1e-3, abs=1e-6)


def test_evaluations_come_in_order_and_a_refusal_names_its_task(engine: OnCluster, place: Path) -> None:
    model, tokenizer = eckart.load_model(place / "llama"), eckart.load_tokenizer(place / "llama")
    texts = [f"perplexity:{place / name}" for name in ("test.txt", "train.txt")]
    divergence = Task(f"divergence:{place / 'test.txt'}", length=16)
    tasks = [Task(texts[0], length=16), Task("cost"), Task(texts[1], length=9999), divergence, Task(texts[1], length=8)]
    given: dict[str, Any] = {"reference": eckart.load_model(place / "llama")}
    alone = list(HERE.outcomes(model, tokenizer, tasks, **given))
    found = list(engine.outcomes(model, tokenizer, tasks, **given))
    assert [type(outcome) for outcome in found] == [type(outcome) for outcome in alone]
    assert isinstance(found[2], ValueError)
    assert str(found[2]).startswith(tasks[2].label)
    for one, other in zip(alone, found, strict=True):
        if isinstance(one, EvalResult) and one.task != "cost":
            assert isinstance(other, EvalResult)
            assert other.task == one.task
            assert other.value == pytest.approx(one.value, rel=1e-5, abs=1e-6)


def test_a_model_that_a_worker_cannot_load_is_named(engine: OnCluster, place: Path, tmp_path: Path) -> None:
    import socket

    shutil.copytree(place / "llama", tmp_path / "model")
    model = eckart.load_model(tmp_path / "model")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the file
    tiny_model("llama", seed=1, num_hidden_layers=BLOCKS).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="is not the one that the run was started with"):
        list(engine.calibrate_by_block(model, TOKENS, build_method("asvd-i")))
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ValueError, match="has to find the model at") as caught:
        list(engine.calibrate_by_block(model, TOKENS, build_method("asvd-i")))
    assert str(tmp_path / "model") in str(caught.value)
    assert socket.gethostname() in str(caught.value)
    with pytest.raises(ValueError, match="save it first"):
        list(engine.calibrate_by_block(tiny_model("llama"), TOKENS, build_method("asvd-i")))


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
            "evaluate": [f"perplexity:{place / 'test.txt'}", f"perplexity:{place / 'train.txt'}"],
        }
        (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
        for where in ("local", "ray"):
            out = tmp_path / f"{name}-{where}"
            status, printed = run("run", tmp_path / "recipe.yaml", "--out", out, "--no-cache", "--engine", where)
            assert status == 0, printed
        plans, values = (
            [json.loads(next((tmp_path / f"{name}-{where}").glob(glob)).read_text()) for where in ("local", "ray")]
            for glob in ("model/plan.json", "evals/*test.txt.json")
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


# Starts as `eckart` does, and dies when it has written the moments of one block.
DRIVER = """
import os, signal, sys
from eckart import cli
from eckart.calibration import cache
write = cache.Store.write
def once(self, block, inputs):
    write(self, block, inputs)
    if block == 1:
        os.kill(os.getpid(), signal.SIGKILL)
cache.Store.write = once
sys.argv = ["eckart", *sys.argv[1:]]
cli.main()
"""


def test_a_run_whose_head_dies_goes_on_from_what_it_kept(
    run: Run, nodes: Any, joined: None, place: Path, tmp_path: Path
) -> None:
    arguments = [
        "compress", place / "llama", tmp_path / "out", "--method", "asvd-i", "--keep", "0.5", "--samples", "8",
        "--length", "16", "--calibration", place / "train.txt", "--cache", tmp_path / "cache", "--engine", "ray",
    ]  # fmt: skip
    dead = subprocess.run(
        [sys.executable, "-c", DRIVER, *map(str, arguments), "--address", nodes.address, "--workers", "1"],
        capture_output=True,
        check=False,
    )
    assert dead.returncode == -signal.SIGKILL, dead.stderr.decode()
    kept = {file: file.stat().st_mtime_ns for file in (tmp_path / "cache").glob("*/block-*.safetensors")}
    assert len(kept) == 2
    assert not (tmp_path / "out").exists()
    status, printed = run(*arguments)
    assert status == 0, printed
    assert all(file.stat().st_mtime_ns == before for file, before in kept.items())
    assert len(list((tmp_path / "cache").glob("*/block-*.safetensors"))) == BLOCKS
    status, printed = run(*arguments, "--force")  # all of it is there
    assert status == 0, printed
    arguments[2] = tmp_path / "local"
    arguments[-1] = "local"
    assert run(*arguments, "--no-cache")[0] == 0
    ends = [logits_of(eckart.load_model(tmp_path / name)) for name in ("out", "local")]
    assert relative(*ends) < 1e-4


def test_a_lost_machine_is_made_do_without(nodes: Any, place: Path) -> None:
    model, method = eckart.load_model(place / "deep"), build_method("asvd-i")
    more = nodes.add_node(num_cpus=1, object_store_memory=80_000_000)
    stack = ExitStack()
    engine = OnCluster(stack.enter_context(closing(Cluster())))
    assert engine.cluster.workers == 3
    alone = list(HERE.calibrate_by_block(model, TOKENS, method))
    stream = engine.calibrate_by_block(model, TOKENS, method)
    found = [next(stream)]
    with engine.team(model, method, lambda: alone, score()) as team:
        assert team is not None
        dense, _ = team.score(None, "dense")
        nodes.remove_node(more, allow_graceful=False)
        deadline = time.monotonic() + 30
        while engine.cluster.workers == 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        found += stream
        members = [team.crew.get(team.crew.ask(n, team_question())) for n in range(3)]  # type: ignore[attr-defined]
    assert [value for value, _ in members] == [dense] * 3
    for block, other in zip(alone, found, strict=True):
        for group, moments in block.inputs.items():
            for key, value in moments.sums.items():
                assert relative(other.inputs[group].sums[key], value) < 1e-5
    assert engine.cluster.workers == 2
    stack.close()


def team_question() -> Any:
    from eckart.runs.engine.teams import Asked

    return Asked((), None, "dense")


def test_a_worker_that_always_dies_ends_the_run_with_advice(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kill, number = os.kill, signal.SIGKILL

    def die(_item: Any) -> None:
        kill(os.getpid(), number)

    monkeypatch.setattr("eckart.runs.engine.cluster.RETRIES", 1)
    with closing(Cluster(1)) as cluster, pytest.raises(ClusterError, match=r"lost 2 times .* fewer --workers"):
        list(cluster.spread(die, [0]))


def test_an_engine_within_a_program_that_has_joined(nodes: Any) -> None:
    with open_engine("ray", address=nodes.address, workers=2) as found:
        assert isinstance(found, OnCluster)
    with pytest.raises(ClusterError, match="has joined the cluster at"), open_engine("ray", address="127.0.0.1:2"):
        pass


@pytest.mark.slow
def test_without_an_address_the_cores_of_this_machine_work(place: Path, tmp_path: Path) -> None:
    for name in ("local", "ray"):
        arguments = [
            "compress", place / "llama", tmp_path / name, "--method", "kfac", "--keep", "0.5", "--samples", "8",
            "--length", "16", "--calibration", place / "train.txt", "--no-cache", "--engine", name, "--workers", "2",
        ]  # fmt: skip
        subprocess.run([sys.executable, "-c", "from eckart.cli import main; main()", *map(str, arguments)], check=True)
    ends = [logits_of(eckart.load_model(tmp_path / name)) for name in ("ray", "local")]
    assert relative(*ends) < 1e-4
