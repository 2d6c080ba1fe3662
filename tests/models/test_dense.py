"""Dense export: an ordinary model that computes what the factored one did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import eckart  # noqa: F401 (registers the checkpoint format)
from eckart.allocation import plan
from eckart.calibration.moments import calibrate
from eckart.compression.replace import compress
from eckart.lowrank import build_method
from eckart.models.dense import BIAS_SWITCHES, export_dense
from eckart.models.families import UnsupportedModelError
from eckart.models.loading import save
from eckart.models.sites import low_rank_modules, read_weight
from tiny import COMMON, DEFAULT_CONFIGS, FAMILY_CONFIGS, GROUPED, HEADS, logits_of, tiny_model, tiny_tokens

from .layouts import KINDS, head_of, laid_out

# Families with a bias on every linear, or with config switches for one: sfsd can be exported.
TAKES_BIASES = {
    *("llama", "opt", "gpt2", "gpt_neox", "bert", "roberta", "roberta-prelayernorm", "deberta-v2"),
    *("phi", "starcoder2", "bloom", "modernbert"),
}
ALL = sorted({*FAMILY_CONFIGS, *DEFAULT_CONFIGS})


def compressed(model: PreTrainedModel, method: str, **selection: Any) -> PreTrainedModel:
    built = build_method(method)
    compress(model, built, plan(model, 0.6, **selection), calibrate(model, tiny_tokens(4, 12), built))
    return model


def is_ordinary(model: PreTrainedModel) -> bool:
    """No trace of a compression, and the modules that the class builds."""
    skeleton = type(model)(model.config)
    kinds = {name: type(module) for name, module in skeleton.named_modules()}
    return (
        {name: type(module) for name, module in model.named_modules()} == kinds
        and model.state_dict().keys() == skeleton.state_dict().keys()
        and not hasattr(model.config, "quantization_config")
        and not hasattr(model, "hf_quantizer")
    )


@pytest.mark.parametrize("model_type", ALL)
def test_export_equals_the_factored_model(model_type: str, tmp_path: Path) -> None:
    model = compressed(tiny_model(model_type), "nsvd-i")
    expected = logits_of(model)
    dense = export_dense(model)
    assert dense is model
    assert is_ordinary(dense)
    torch.testing.assert_close(logits_of(dense), expected, rtol=0, atol=1e-4)
    dense.save_pretrained(tmp_path)
    assert torch.equal(logits_of(HEADS[head_of(model_type)].from_pretrained(tmp_path)), logits_of(dense))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_every_layout_is_exported(model_type: str, loaded: bool, kind: str, tmp_path: Path) -> None:
    model = laid_out(model_type, kind)
    matrices = {name: module.dense() for name, module in low_rank_modules(model).items()}
    expected = logits_of(model)
    if loaded:
        model = HEADS[head_of(model_type)].from_pretrained(save(model, tmp_path / "low"))
    dense = export_dense(model)
    assert is_ordinary(dense)
    assert not low_rank_modules(dense)
    for name, matrix in matrices.items():
        assert torch.equal(read_weight(dense.get_submodule(name)), matrix)
    torch.testing.assert_close(logits_of(dense), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", ALL)
def test_export_of_added_biases_or_a_refusal_that_changes_nothing(model_type: str, tmp_path: Path) -> None:
    model = compressed(tiny_model(model_type), "sfsd")
    expected, state, config = logits_of(model), dict(model.state_dict()), model.config.to_dict()
    if model_type in TAKES_BIASES:
        dense = export_dense(model)
        assert is_ordinary(dense)
        torch.testing.assert_close(logits_of(dense), expected, rtol=0, atol=1e-4)
        dense.save_pretrained(tmp_path)
        assert torch.equal(logits_of(HEADS[head_of(model_type)].from_pretrained(tmp_path)), logits_of(dense))
    else:
        first = next(iter(low_rank_modules(model)))
        with pytest.raises(UnsupportedModelError, match=r"^[\w.]+: the method added a bias.*no place for one") as why:
            export_dense(model)
        assert type(model).__name__ in str(why.value)
        assert "mlp.down_proj" in str(why.value)
        assert "`best` leaves it out by itself" in str(why.value)
        assert first in low_rank_modules(model)
        assert model.state_dict().keys() == state.keys()
        assert model.config.to_dict() == config
        assert torch.equal(logits_of(model), expected)
        save(model, tmp_path / "still")
        assert torch.equal(logits_of(HEADS[head_of(model_type)].from_pretrained(tmp_path / "still")), logits_of(model))


def test_llama_asks_its_config_for_biases() -> None:
    model = compressed(tiny_model("llama"), "sfsd", blocks="last 1")
    expected = logits_of(model)
    dense = export_dense(model)
    assert dense.config.attention_bias is True
    assert dense.config.mlp_bias is True
    # the blocks that were not changed get a place they do not need
    assert torch.equal(dense.model.layers[0].mlp.up_proj.bias, torch.zeros(48))
    assert dense.model.layers[2].mlp.up_proj.bias.abs().max() > 0
    torch.testing.assert_close(logits_of(dense), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("part", "switch"), [("attention", "attention_bias"), ("mlp", "mlp_bias")])
def test_only_the_switch_that_is_needed_is_turned(part: str, switch: str) -> None:
    model = compressed(tiny_model("llama"), "sfsd", include=[part])
    expected = logits_of(model)
    dense = export_dense(model)
    assert {name for name in ("attention_bias", "mlp_bias") if getattr(dense.config, name)} == {switch}
    assert is_ordinary(dense)
    torch.testing.assert_close(logits_of(dense), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("model_type", "changes", "include", "switches"),
    [
        ("seed_oss", GROUPED, ["*"], {"mlp_bias", "attention_out_bias"}),
        ("ernie4_5", GROUPED, ["*"], {"use_bias"}),
        ("stablelm", {**COMMON, "num_key_value_heads": 2}, ["*.q_proj", "*.k_proj", "*.v_proj"], {"use_qkv_bias"}),
        ("falcon", {**COMMON, "new_decoder_architecture": True, "num_kv_heads": 2}, ["*"], {"bias"}),
    ],
    ids=["seed_oss", "ernie4_5", "stablelm", "falcon"],
)
def test_switches_by_other_names(
    model_type: str, changes: dict[str, Any], include: list[str], switches: set[str], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = HEADS["causal"].from_config(CONFIG_MAPPING[model_type](**changes)).eval()
    before = model.config.to_dict()
    model = compressed(model, "sfsd", include=include)
    expected = logits_of(model)
    dense = export_dense(model)
    assert {name for name in BIAS_SWITCHES if dense.config.to_dict().get(name) != before.get(name)} == switches
    torch.testing.assert_close(logits_of(dense), expected, rtol=0, atol=1e-4)
    dense.save_pretrained(tmp_path)
    assert torch.equal(logits_of(HEADS["causal"].from_pretrained(tmp_path)), logits_of(dense))


def test_a_switch_that_gives_more_than_biases_of_linears_is_not_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = compressed(tiny_model("llama"), "sfsd", include=["mlp"])
    model.config.norm_bias = False
    build = type(model).__init__

    def with_norm_bias(self: Any, config: Any) -> None:
        build(self, config)
        if config.norm_bias:  # a norm's bias besides the wanted one: the export would lack it
            self.model.norm.bias = nn.Parameter(torch.zeros(4))
            self.model.layers[0].mlp.up_proj.bias = nn.Parameter(torch.zeros(48))

    monkeypatch.setattr(type(model), "__init__", with_norm_bias)
    monkeypatch.setattr("eckart.models.dense.BIAS_SWITCHES", ("norm_bias", "mlp_bias"))
    dense = export_dense(model)
    assert dense.config.norm_bias is False
    assert dense.config.mlp_bias is True


def test_no_switch_is_touched_without_need() -> None:
    dense = export_dense(compressed(tiny_model("llama"), "svd"))
    assert dense.config.attention_bias is False
    assert dense.model.layers[0].mlp.up_proj.bias is None


def test_gpt2_gets_its_conv1d_back() -> None:
    dense = export_dense(compressed(tiny_model("gpt2"), "svd"))
    assert isinstance(dense.transformer.h[0].mlp.c_fc, Conv1D)
    assert not any(isinstance(m, nn.Linear) for m in dense.transformer.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_export_keeps_the_type(dtype: torch.dtype) -> None:
    dense = export_dense(compressed(tiny_model("llama", dtype=dtype), "sfsd"))
    assert {parameter.dtype for parameter in dense.parameters()} == {dtype}
    assert logits_of(dense).dtype == dtype


def test_export_of_a_dense_model_leaves_it_alone() -> None:
    model = tiny_model("llama")
    before = logits_of(model)
    assert torch.equal(logits_of(export_dense(model)), before)


# transformers' own verb


@pytest.mark.parametrize("loaded", [True, False])
@pytest.mark.parametrize("method", ["nsvd-i", "sfsd"])
def test_dequantize_is_the_export(method: str, loaded: bool, tmp_path: Path) -> None:
    model = compressed(tiny_model("llama"), method)
    expected = logits_of(model)
    if loaded:
        model = HEADS["causal"].from_pretrained(save(model, tmp_path / "low"))
    dense = model.dequantize()
    assert is_ordinary(dense)
    torch.testing.assert_close(logits_of(dense), expected, rtol=0, atol=1e-4)
    dense.save_pretrained(tmp_path / "dense")
    assert torch.equal(logits_of(HEADS["causal"].from_pretrained(tmp_path / "dense")), logits_of(dense))


def test_dequantize_follows_a_changed_type(tmp_path: Path) -> None:
    path = save(compressed(tiny_model("llama", dtype=torch.bfloat16), "svd"), tmp_path / "low")
    model = HEADS["causal"].from_pretrained(path)
    assert {p.dtype for p in model.float().dequantize().parameters()} == {torch.float32}
    model = HEADS["causal"].from_pretrained(path)
    assert {p.dtype for p in model.dequantize(dtype=torch.float32).parameters()} == {torch.float32}
    assert logits_of(model).dtype == torch.float32


def test_dequantize_refuses_what_export_refuses() -> None:
    model = compressed(tiny_model("gemma2"), "sfsd")
    expected = logits_of(model)
    with pytest.raises(UnsupportedModelError, match="Gemma2ForCausalLM has no place for one"):
        model.dequantize()
    assert torch.equal(logits_of(model), expected)
