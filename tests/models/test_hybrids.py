"""Hybrids: blocks of linears around convolutions, state spaces and recurrences, which stay as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from eckart.allocation import plan
from eckart.calibration.moments import calibrate
from eckart.calibration.sequential import SequentialCalibration
from eckart.compression.replace import compress
from eckart.lowrank import build_method
from eckart.models.dense import export_dense
from eckart.models.families import UnsupportedModelError
from eckart.models.loading import load_model, save
from eckart.models.sites import find_sites, low_rank_modules
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.out_of_core import compress_out_of_core
from eckart.runs.recipe import parse_recipe
from tiny import HYBRID_CONFIGS, logits_of, tiny_model, tiny_text, tiny_tokenizer, tiny_tokens

ALL = sorted(HYBRID_CONFIGS)
TOKENS = tiny_tokens(6, 12)
# Linears of the blocks that are no sites.
LEFT_OUT = dict.fromkeys(("mamba", "falcon_mamba", "jamba"), frozenset({"dt_proj"}))


def others(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The parameters of the blocks that are no linear's."""
    linears = {id(p) for module in model.modules() if isinstance(module, nn.Linear) for p in module.parameters()}
    return {name: p.detach().clone() for name, p in model.named_parameters() if id(p) not in linears}


@pytest.mark.parametrize("model_type", ALL)
def test_every_linear_is_a_site(model_type: str) -> None:
    model = tiny_model(model_type)
    blocks = {name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "lm_head" not in name}
    left_out = {name for name in blocks if name.rpartition(".")[2] in LEFT_OUT.get(model_type, ())}
    assert {site.name for site in find_sites(model)} == blocks - left_out


def test_jamba_has_blocks_of_two_kinds_and_experts_in_some() -> None:
    sites = find_sites(tiny_model("jamba"))
    parts = [{site.part for site in sites if site.block == block} for block in range(3)]
    assert parts == [{"mamba", "experts"}, {"mamba", "mlp"}, {"attention", "experts"}]
    assert {site.input_group for site in sites if site.part == "attention"} == {
        "model.layers.2.self_attn.q_proj",
        "model.layers.2.self_attn.o_proj",
    }


@pytest.mark.parametrize("model_type", ALL)
def test_it_is_compressed_saved_loaded_generated_with_and_exported(model_type: str, tmp_path: Path) -> None:
    model, method = tiny_model(model_type), build_method("asvd-i")
    before = others(model)
    compress(model, method, plan(model, 0.6), calibrate(model, TOKENS, method))
    assert low_rank_modules(model)
    now = dict(model.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in before.items())
    expected = logits_of(model, TOKENS)
    save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits_of(again, TOKENS), expected)
    ids, how = TOKENS.ids[:2, :6], {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    alone = model.generate(input_ids=ids, use_cache=False, **how)
    assert torch.equal(again.generate(input_ids=ids, **how), alone)
    save(export_dense(again), tmp_path / "dense")
    torch.testing.assert_close(logits_of(load_model(tmp_path / "dense"), TOKENS), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("model_type", ALL)
def test_what_each_linear_reads_is_what_hooks_see_in_every_order(model_type: str) -> None:
    """Nothing is replaced, so that both orders read what the dense model does."""
    method = build_method("asvd-i")
    one_shot = calibrate(tiny_model(model_type), TOKENS, method)
    sequential = SequentialCalibration(tiny_model(model_type), TOKENS, method, order="sequential", batch_size=4)
    expected, seen = (
        {group: moments.second_moment for part in parts for group, moments in part.inputs.items()}
        for parts in (one_shot, sequential)
    )
    assert seen.keys() == expected.keys()
    for group, moment in expected.items():
        torch.testing.assert_close(seen[group], moment, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("model_type", ["mamba2", "falcon_h1", "recurrent_gemma", "jamba"])
def test_best_comes_out_of_core_as_in_memory(model_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model(model_type).save_pretrained(tmp_path / "model", max_shard_size="10KB")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "train.txt").write_text("\n\n".join(tiny_text(20, seed=number) for number in range(40)))
    keys: dict[str, Any] = {
        "model": str(tmp_path / "model"),
        "method": "best",
        "keep": 0.6,
        "calibration": {"corpus": str(tmp_path / "train.txt"), "samples": 8, "length": 16},
    }
    monkeypatch.setattr("eckart.runs.out_of_core.load_tokenizer", lambda *_a, **_k: tiny_tokenizer())
    monkeypatch.setattr("eckart.runs.in_memory.load_tokenizer", lambda *_a, **_k: tiny_tokenizer())
    compress_out_of_core(parse_recipe(keys), tmp_path / "out", How(batch_size=4))
    make_checkpoint(parse_recipe(keys), tmp_path / "expected", How(batch_size=4))
    ours, theirs = (load_model(tmp_path / name) for name in ("out", "expected"))
    torch.testing.assert_close(logits_of(ours, TOKENS), logits_of(theirs, TOKENS), rtol=1e-3, atol=1e-3)


def test_a_convolution_over_all_channels_is_refused() -> None:
    model = tiny_model("mamba2")
    mixer = model.get_submodule("backbone.layers.0.mixer")
    mixer.conv1d = nn.Conv1d(mixer.conv1d.in_channels, 8, 4)
    with pytest.raises(UnsupportedModelError, match=r"is the kernel of a convolution; .*over all channels"):
        find_sites(model)
