"""What goes wrong on a cluster: workers, machines and runs that die, and models that are not there."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import eckart
from eckart.allocation import plan
from eckart.lowrank import build_method
from eckart.runs.engine.base import CalibrationRequest, SearchRequest
from eckart.runs.engine.cluster import Cluster, ClusterError
from eckart.runs.engine.local import HERE
from eckart.runs.engine.on_cluster import OnCluster
from eckart.runs.engine.teams import ClusterTeam, TrialRequest
from runs.engine.clusters import BLOCKS, TOKENS, dying_once, processes, score
from tiny import Run, logits_of, relative, tiny_model

ray = pytest.importorskip("ray", reason="Ray is an optional extra: pip install 'eckart[ray]'")


@pytest.mark.slow
def test_a_killed_worker_is_replaced(nodes: Any, engine: OnCluster, place: Path) -> None:
    model, method = eckart.load_model(place / "deep"), build_method("asvd-i")
    whole = list(engine.calibrate_by_block(CalibrationRequest(model, TOKENS, method)))
    stream = engine.calibrate_by_block(CalibrationRequest(model, TOKENS, method))
    streamed = [next(stream)]
    doomed = processes(nodes, "_stream")
    assert doomed
    os.kill(doomed[0], signal.SIGKILL)
    streamed += stream
    for block, other in zip(whole, streamed, strict=True):
        for group, moments in block.inputs.items():
            assert all(torch.equal(other.inputs[group].sums[key], value) for key, value in moments.sums.items())


@pytest.mark.slow
def test_a_factorisation_whose_worker_dies_is_done_again(engine: OnCluster, place: Path, tmp_path: Path) -> None:
    model, method = eckart.load_model(place / "llama"), build_method("asvd-i")
    moments = list(HERE.calibrate_by_block(CalibrationRequest(model, TOKENS, method)))
    assert method.stage.root is not None
    dying = replace(method, stage=replace(method.stage, root=dying_once(tmp_path / "marks", method.stage.root, 5)))
    other = eckart.load_model(place / "llama")
    eckart.compress(model, method, plan(model, 0.5), moments)
    eckart.compress(other, dying, plan(other, 0.5), moments, cut=engine.cut_units)
    assert (tmp_path / "marks" / "died").exists()
    assert relative(logits_of(other), logits_of(model)) < 1e-5


@pytest.mark.slow
def test_a_model_that_a_worker_cannot_load_is_named(engine: OnCluster, place: Path, tmp_path: Path) -> None:
    import socket

    shutil.copytree(place / "llama", tmp_path / "model")
    model = eckart.load_model(tmp_path / "model")
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()  # out of the file
    tiny_model("llama", seed=1, num_hidden_layers=BLOCKS).save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="is not the one that the run was started with"):
        list(engine.calibrate_by_block(CalibrationRequest(model, TOKENS, build_method("asvd-i"))))
    shutil.rmtree(tmp_path / "model")
    with pytest.raises(ValueError, match="has to find the model at") as caught:
        list(engine.calibrate_by_block(CalibrationRequest(model, TOKENS, build_method("asvd-i"))))
    assert str(tmp_path / "model") in str(caught.value)
    assert socket.gethostname() in str(caught.value)
    with pytest.raises(ValueError, match="save it first"):
        list(engine.calibrate_by_block(CalibrationRequest(tiny_model("llama"), TOKENS, build_method("asvd-i"))))


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


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_lost_machine_is_made_do_without(nodes: Any, place: Path) -> None:
    model, method = eckart.load_model(place / "deep"), build_method("asvd-i")
    more = nodes.add_node(num_cpus=1, object_store_memory=80_000_000)
    stack = ExitStack()
    engine = OnCluster(stack.enter_context(closing(Cluster())))
    assert engine.cluster.workers == 3
    alone = list(HERE.calibrate_by_block(CalibrationRequest(model, TOKENS, method)))
    stream = engine.calibrate_by_block(CalibrationRequest(model, TOKENS, method))
    streamed = [next(stream)]
    with engine.team(SearchRequest(model, method, lambda: alone), score()) as team:
        assert isinstance(team, ClusterTeam)
        dense, _ = team.score(None, "dense")
        nodes.remove_node(more, allow_graceful=False)
        deadline = time.monotonic() + 30
        while engine.cluster.workers == 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        streamed += stream
        members = [team.crew.get(team.crew.ask(n, TrialRequest((), None, "dense"))) for n in range(3)]
    assert [value for value, _ in members] == [dense] * 3
    for block, other in zip(alone, streamed, strict=True):
        for group, moments in block.inputs.items():
            for key, value in moments.sums.items():
                assert relative(other.inputs[group].sums[key], value) < 1e-5
    assert engine.cluster.workers == 2
    stack.close()


@pytest.mark.slow
def test_a_worker_that_always_dies_ends_the_run_with_advice(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kill, number = os.kill, signal.SIGKILL

    def die(_item: Any) -> None:
        kill(os.getpid(), number)

    monkeypatch.setattr("eckart.runs.engine.cluster.RETRIES", 1)
    with closing(Cluster(1)) as cluster, pytest.raises(ClusterError, match=r"lost 2 times .* fewer --workers"):
        list(cluster.spread(die, [0]))
