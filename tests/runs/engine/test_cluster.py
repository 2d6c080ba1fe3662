"""A cluster is started or joined, or it is said why not."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

import eckart
from eckart.runs.engine.choose import open_engine
from eckart.runs.engine.cluster import Cluster, ClusterError, open_cluster
from eckart.runs.engine.on_cluster import OnCluster
from tiny import Run, logits_of, relative

ray = pytest.importorskip("ray", reason="Ray is an optional extra: pip install 'eckart[ray]'")


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


@pytest.mark.slow
def test_a_worker_with_another_release_is_refused(nodes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eckart.runs.engine.cluster.version", lambda _: "0.0.1")  # the workers have what is installed
    told = rf"{socket.gethostname()} has eckart {version('eckart')}, and the run was started with 0\.0\.1"
    with closing(Cluster(1)) as cluster:
        with pytest.raises(ClusterError, match=told):
            list(cluster.spread(lambda item: item, [1]))
        with pytest.raises(ClusterError, match=told), cluster.streams(lambda item: iter([item]), [1]) as streams:
            next(streams[0])


def test_an_engine_within_a_program_that_has_joined(nodes: Any) -> None:
    with open_engine("ray", address=nodes.address, workers=2) as engine:
        assert isinstance(engine, OnCluster)
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
