"""Adapters as models: merged into their base model, or refused by name."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from eckart.allocation import RankPlan, plan
from eckart.compression.replace import compress
from eckart.lowrank import build_method
from eckart.lowrank.storage import Storage
from eckart.models.adapters import MERGEABLE, lora_targets
from eckart.models.families import UnsupportedModelError
from eckart.models.loading import load_classifier, load_model, load_tokenizer, save
from eckart.models.shards import Skeleton
from eckart.models.sites import find_sites, low_rank_modules
from eckart.models.weight_files import CheckpointError
from gguf_files import write_gguf
from tiny import tiny_model, tiny_tokenizer, tiny_tokens

from .layouts import laid_out

SITE = "model.layers.1.self_attn.v_proj"


def write_adapter(folder: Path, base: Path, kind: str = "LORA", **given: Any) -> Path:
    """A folder with a random adapter of the model at `base`; the tests that call it are skipped without PEFT."""
    peft: Any = pytest.importorskip("peft", reason="needs peft (pip install 'eckart[peft]')")
    config: Any = peft.PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    if kind == "ADALORA":
        given["total_step"] = 10
    if kind == "IA3":
        given["feedforward_modules"] = []
    wrapped = peft.get_peft_model(load_model(base), config(target_modules=["v_proj", "down_proj"], **given))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    wrapped.save_pretrained(folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    return folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save(tiny_model("llama"), tmp_path / "base", tiny_tokenizer())


@pytest.fixture
def lora(base: Path, tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "lora", base, r=2, lora_alpha=6)


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny_tokens(samples=2, length=12).ids).logits


def test_lora_is_the_base_plus_the_product_of_its_factors(base: Path, lora: Path) -> None:
    merged, before = load_model(lora, dense=True), load_model(base)
    factors = load_file(lora / "adapter_model.safetensors")
    a, b = (factors[f"base_model.model.{SITE}.lora_{side}.weight"] for side in "AB")
    weight = f"{SITE}.weight"
    expected = before.get_parameter(weight) + 6 / 2 * b @ a
    assert torch.allclose(merged.get_parameter(weight), expected, atol=1e-6)
    assert not torch.allclose(before.get_parameter(weight), expected, atol=1e-2)
    other = "model.layers.1.self_attn.q_proj.weight"
    assert torch.equal(merged.get_parameter(other), before.get_parameter(other))
    assert merged.state_dict().keys() == before.state_dict().keys()
    assert (merged.name_or_path, merged.training) == (str(lora), False)
    compress(merged, "svd", plan(merged, 0.5))  # it is a model like any other
    assert len(find_sites(load_model(lora, dtype="bfloat16"))) == len(find_sites(before))


@pytest.mark.parametrize("kind", MERGEABLE)
def test_every_kind_computes_what_it_does_around_the_base(kind: str, base: Path, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft")
    folder = write_adapter(tmp_path / "adapter", base, kind)
    expected = logits_of(peft.PeftModel.from_pretrained(load_model(base), folder).eval())
    assert torch.allclose(logits_of(load_model(folder)), expected, atol=1e-4)
    assert not torch.allclose(logits_of(load_model(base)), expected, atol=1e-2)


def test_the_tokenizer_is_its_own_or_the_bases(lora: Path) -> None:
    assert load_tokenizer(lora).unk_token == "<unk>"
    tiny_tokenizer(unk_token="<mask>").save_pretrained(lora)
    assert load_tokenizer(lora).unk_token == "<mask>"


def test_the_base_may_be_a_gguf_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    folder = write_adapter(tmp_path / "lora", tmp_path / "m.gguf", r=2)
    merged, before = load_model(folder), load_model(tmp_path / "m.gguf")
    assert not torch.equal(merged.get_parameter(f"{SITE}.weight"), before.get_parameter(f"{SITE}.weight"))
    assert load_tokenizer(folder).eos_token == "</s>"


def test_a_classifier_of_it(lora: Path) -> None:
    model, new = load_classifier(lora, ["a", "b"])
    assert new == ("score.weight",)
    merged = load_model(lora)
    assert torch.equal(model.get_parameter(f"{SITE}.weight"), merged.get_parameter(f"{SITE}.weight"))


def test_out_of_core_it_is_refused_with_what_to_give(lora: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"lora is an adapter.*`eckart export .*lora DENSE --dense`"):
        Skeleton(lora)


def change(folder: Path, **settings: Any) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


# {what is wrong: (entries of adapter_config.json, the sentence)}
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "prompts": ({"peft_type": "PROMPT_TUNING"}, "of the kind PROMPT_TUNING, which cannot be merged"),
    "whole modules": ({"modules_to_save": ["lm_head"]}, r"with modules_to_save \(\['lm_head'\]\), which is more than"),
    "more blocks": ({"layer_replication": [[0, 2], [1, 3]]}, "with layer_replication"),
    "no base": ({"base_model_name_or_path": None}, "names no base model"),
    "no kind": ({"peft_type": 3}, "its peft_type is 3"),
    "another base": ({"base_model_name_or_path": "/no/such"}, "an adapter of /no/such: "),
    "another rank": ({"r": 3}, r"lora cannot be merged into .*base: .*size mismatch"),
    "more linears": ({"target_modules": ["v_proj", "down_proj", "q_proj"]}, "missing tensor base_model.*q_proj.lora_A"),
    "fewer linears": ({"target_modules": ["v_proj"]}, "unknown tensor base_model.*down_proj.lora_A"),
    "none of them": ({"target_modules": ["other"]}, "cannot be merged into .*base: Target modules .*not found"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_merged_is_named(what: str, lora: Path) -> None:
    settings, sentence = WRONG[what]
    change(lora, **settings)
    with pytest.raises(ValueError, match=sentence) as error:
        load_model(lora)
    assert str(error.value).startswith(str(lora))
    assert "\n" not in str(error.value)


def test_an_adapter_without_the_entry_names_no_base(lora: Path) -> None:
    file = lora / "adapter_config.json"
    settings = json.loads(file.read_text())
    del settings["base_model_name_or_path"]
    file.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match="names no base model"):
        load_model(lora)


def test_a_damaged_adapter_is_one_error(lora: Path) -> None:
    weights, settings = lora / "adapter_model.safetensors", lora / "adapter_config.json"
    factors = load_file(weights)
    save_file({name: torch.full_like(value, torch.nan) for name, value in factors.items()}, weights)
    with pytest.raises(CheckpointError, match=r"lora cannot be merged into .*NaNs detected"):
        load_model(lora)
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is damaged or missing"):
        load_model(lora)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"holds no adapter_model\.safetensors, so the adapter is not whole"):
        load_model(lora)
    change(lora, base_model_name_or_path=str(lora))
    with pytest.raises(CheckpointError, match="names its own folder as the base model"):
        load_model(lora)
    settings.write_text("{")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json is damaged"):
        load_model(lora)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "some/base"})
    )
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"merged with PEFT: pip install 'eckart\[peft\]'"):
        load_model(tmp_path)


# Names of linears, for adapters on a compressed model


def test_ordinary_names_become_those_that_peft_takes() -> None:
    peft: Any = pytest.importorskip("peft", reason="needs peft (pip install 'eckart[peft]')")
    model = laid_out("llama", "joint pivoted")
    before = logits_of(model)
    names = lora_targets(model, ["q_proj", "k_proj", "lm_head"])
    first = "model.layers.0.self_attn"
    assert names[:3] == [f"{first}.q_proj.right", f"{first}.q_proj.left", f"{first.replace('0', '1')}.q_proj.right"]
    # The right factor of k is q's, and has one adapter; the head is dense.
    assert f"{first}.k_proj.left" in names
    assert f"{first}.k_proj.right" not in names
    assert names[-1] == "lm_head"
    assert lora_targets(model, "q_proj") == [name for name in names if "q_proj" in name]
    assert lora_targets(model) == lora_targets(model, ["q_proj", "v_proj"])  # what LoraConfig() means for a llama
    for given in (["q_proj"], None):
        with pytest.raises(ValueError, match="LowRankLinear"):
            peft.get_peft_model(laid_out("llama", "plain"), peft.LoraConfig(target_modules=given))
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=lora_targets(model), init_lora_weights=False))
    changed = logits_of(wrapped)
    assert not torch.allclose(changed, before, atol=1e-3)
    merged = wrapped.merge_and_unload()
    assert low_rank_modules(merged)
    torch.testing.assert_close(logits_of(merged), changed, rtol=0, atol=1e-4)


def test_names_that_no_adapter_fits_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no linear of the LlamaForCausalLM is named 'query'; there are .*q_proj"):
        lora_targets(laid_out("llama", "plain"), ["query"])
    model = tiny_model("llama")
    sites = find_sites(model)
    ranks = {site.name: 4 for site in sites}
    stored = {site.name: Storage(None, 4, 8) for site in sites}
    compress(model, build_method("svd"), RankPlan(sites, ranks, stored=stored))
    with pytest.raises(UnsupportedModelError, match=r"q_proj keeps its numbers in few bits \(int4 factors\)"):
        lora_targets(model, ["q_proj"])
