"""A folder of tiny models, and a real cluster: two nodes of one core each on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from eckart.runs.engine.cluster import Cluster, open_cluster
from eckart.runs.engine.on_cluster import OnCluster
from runs.engine.clusters import BLOCKS
from tiny import tiny_model, tiny_text, tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny models, and texts to calibrate and to score on."""
    folder = tmp_path_factory.mktemp("cluster")
    tiny_model("llama", num_hidden_layers=BLOCKS).save_pretrained(folder / "llama")
    tiny_tokenizer().save_pretrained(folder / "llama")
    tiny_model("llama", num_hidden_layers=8).save_pretrained(folder / "deep")
    tiny_model("gpt2", dtype=torch.bfloat16).save_pretrained(folder / "gpt2")
    for name in ("t5", "bart"):
        tiny_model(name).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
    tiny_model("bert").save_pretrained(folder / "masked")
    tiny_model("bert", "classifier").save_pretrained(folder / "classifier")
    (folder / "train.txt").write_text(tiny_text(900, seed=1))
    (folder / "test.txt").write_text(tiny_text(400, seed=2))
    return folder


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
def engine(nodes: Any) -> Iterator[OnCluster]:
    """Two workers, one on each node."""
    with closing(Cluster(2)) as cluster:
        yield OnCluster(cluster)


@pytest.fixture
def joined(engine: OnCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands find the workers that are there, instead of starting new ones."""
    monkeypatch.setattr("eckart.runs.engine.on_cluster.open_cluster", lambda *_: nullcontext(engine.cluster))
