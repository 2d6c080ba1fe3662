"""A block that passes its input through: its linears have no gradient, and every way to compress takes the model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from eckart.models.loading import load_model
from tiny import Run, logits_of, relative, tiny_model, tiny_text, tiny_tokenizer

IDLE = [
    f"model.layers.1.{role}"
    for role in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj")
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of which block 1 does nothing, and one whose block 1 reads zeros in its MLP."""
    folder = tmp_path_factory.mktemp("idle")
    model = tiny_model("llama")
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[1].get_submodule(name).weight.zero_()
    model.save_pretrained(folder / "passing")
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.zero_()
    model.save_pretrained(folder / "dead")
    for name in ("passing", "dead"):
        tiny_tokenizer().save_pretrained(folder / name)
    (folder / "train.txt").write_text(tiny_text(600, seed=1))
    return folder


def compress(run: Run, place: Path, model: str, out: Path, *more: str) -> str:
    text = ("--calibration", place / "train.txt", "--samples", "8", "--length", "16", "--no-cache")
    status, printed = run("compress", place / model, out, "--keep", "0.5", *text, *more)
    assert status == 0, printed
    return printed


@pytest.mark.parametrize(
    "more", [(), ("--method", "kfac"), ("--method", "kfac", "--out-of-core"), ("--method", "kfac", "--joint")]
)
def test_a_block_that_passes_through(run: Run, place: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    printed = compress(run, place, "passing", tmp_path / "out", *more)
    sites = json.loads((tmp_path / "out/compression.json").read_text())["sites"]
    note = "its gradient is zero on every calibration token; it was factored by its inputs alone"
    assert [name for name, facts in sites.items() if facts.get("note") == note] == IDLE
    assert f"model.layers.1.mlp.up_proj (rank {sites[IDLE[-1]]['rank']}): {note}" in printed
    if not more:  # ranks by loss: what has no influence gets the least
        assert {sites[name]["rank"] for name in IDLE} == {1}
    small = load_model(tmp_path / "out")
    assert torch.isfinite(logits_of(small)).all()


@pytest.mark.parametrize(("method", "option"), [("fwsvd", "fisher_axis=out"), ("fwsvd", "fisher_axis=in")])
def test_fisher_sums_of_zero(run: Run, place: Path, tmp_path: Path, method: str, option: str) -> None:
    compress(run, place, "passing", tmp_path / "out", "--method", method, "--option", option)
    sites = json.loads((tmp_path / "out/compression.json").read_text())["sites"]
    assert [name for name, facts in sites.items() if "gradient is zero" in facts.get("note", "")] == IDLE


@pytest.mark.parametrize(
    "method", ["best", "kfac", "asvd-i", "asvd-0", "sfsd", "nsvd-i", "nid-ii", "shrunk", "asvd-iii"]
)
def test_inputs_that_are_always_zero(run: Run, place: Path, tmp_path: Path, method: str) -> None:
    printed = compress(run, place, "dead", tmp_path / "out", "--method", method)
    sites = json.loads((tmp_path / "out/compression.json").read_text())["sites"]
    note = "its input is zero on every calibration token; it was factored as if all inputs were alike"
    idle = {name for name, facts in sites.items() if facts.get("note") == note}
    assert {f"model.layers.1.mlp.{role}" for role in ("gate_proj", "up_proj", "down_proj")} == idle
    assert note in printed
    assert torch.isfinite(logits_of(load_model(tmp_path / "out"))).all()


def test_a_block_that_passes_through_costs_nothing(run: Run, place: Path, tmp_path: Path) -> None:
    compress(run, place, "passing", tmp_path / "out", "--method", "kfac", "--blocks", "1")
    assert relative(logits_of(load_model(tmp_path / "out")), logits_of(load_model(place / "passing"))) < 1e-5
