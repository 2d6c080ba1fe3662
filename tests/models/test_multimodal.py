"""Models that read images or sound as well: their language model is what is compressed, and nothing else of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

import eckart
from eckart.allocation import plan, summarise
from eckart.calibration.moments import calibrate
from eckart.compression.replace import compress
from eckart.lowrank import build_method
from eckart.models.families import GATED, UnsupportedModelError, family_of, language_model, parts_outside
from eckart.models.loading import load_model, save
from eckart.models.sites import blocks_of, find_sites, low_rank_modules
from tiny import BLOCKS, COMMON, GROUPED, VOCABULARY, logits_of, relative, tiny_config, tiny_tokens

# A tower with more linears than the language model, wider ones at that: the list of blocks with most weights is its.
TOWER: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
IMAGE = VOCABULARY - 1


def llava() -> PreTrainedModel:
    vision = hf.CLIPVisionConfig(**TOWER)
    text = tiny_config("llama")
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config)


def gemma3() -> PreTrainedModel:
    text = {**GROUPED, "sliding_window": 6}
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(text_config=text, vision_config=TOWER, mm_tokens_per_image=4, image_token_index=IMAGE)
    )


def qwen2_vl() -> PreTrainedModel:
    rotary = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 4, "embed_dim": 64, "hidden_size": 32, "num_heads": 4, "mlp_ratio": 2, "patch_size": 8}
    text = {**COMMON, "num_key_value_heads": 2, "rope_parameters": rotary}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(text_config=text, vision_config=vision))


def idefics3() -> PreTrainedModel:
    config = hf.Idefics3Config(text_config=tiny_config("llama"), vision_config=TOWER, image_token_id=IMAGE)
    return hf.Idefics3ForConditionalGeneration(config)


def qwen2_audio() -> PreTrainedModel:
    audio = {"d_model": 64, "encoder_layers": 4, "encoder_attention_heads": 4, "encoder_ffn_dim": 128}
    text = {"model_type": "qwen2", **COMMON, "num_key_value_heads": 2}
    config = hf.Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=IMAGE)
    return hf.Qwen2AudioForConditionalGeneration(config)


def git() -> PreTrainedModel:
    return hf.GitForCausalLM(hf.GitConfig(vision_config=TOWER, **COMMON))


# {name: (model, path of its language model, its other parts)}
MODELS: dict[str, tuple[Callable[[], PreTrainedModel], str, tuple[str, ...]]] = {
    "llava": (llava, "model.language_model", ("model.vision_tower", "model.multi_modal_projector")),
    "gemma3": (gemma3, "model.language_model", ("model.vision_tower",)),
    "qwen2-vl": (qwen2_vl, "model.language_model", ("model.visual",)),
    "idefics3": (idefics3, "model.text_model", ("model.vision_model", "model.connector")),
    "qwen2-audio": (qwen2_audio, "model.language_model", ("model.audio_tower", "model.multi_modal_projector")),
    "git": (git, "git", ("git.image_encoder", "git.visual_projection")),
}


def model_of(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


@pytest.mark.parametrize("name", MODELS)
def test_the_language_models_linears_are_the_sites(name: str) -> None:
    model, (_, path, others) = model_of(name), MODELS[name]
    assert model.get_submodule(path) is language_model(model)
    sites = find_sites(model)
    assert {site.block for site in sites} == set(range(BLOCKS))
    assert all(site.name.startswith(f"{path}.") for site in sites)
    assert not any(site.name.startswith(f"{other}.") for site in sites for other in others)
    assert set(parts_outside(model, blocks_of(model))) == set(others)


@pytest.mark.parametrize("name", ["llava", "gemma3", "idefics3"])
def test_a_language_model_of_a_known_family_has_its_row(name: str) -> None:
    assert family_of(model_of(name)) is GATED


def test_a_model_of_one_part_has_no_part_outside_but_a_pooler() -> None:
    llama, bert = hf.LlamaForCausalLM(tiny_config("llama")), hf.BertModel(tiny_config("bert"))
    assert parts_outside(llama, blocks_of(llama)) == ()
    assert parts_outside(bert, blocks_of(bert)) == ("pooler",)


@pytest.mark.parametrize("name", MODELS)
def test_calibrated_compressed_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, (_, _, others) = model_of(name), MODELS[name]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ranks = plan(model, 0.6)
    tokens = tiny_tokens()
    method = build_method("sfsd")
    compress(model, method, ranks, calibrate(model, tokens, method))
    assert set(low_rank_modules(model)) == {site.name for site in ranks.sites}
    for key, value in model.state_dict().items():
        if key.startswith(others):
            assert torch.equal(value, before[key]), key
    expected = logits_of(model, tokens)
    save(model, tmp_path / "out", recipe={})
    assert relative(logits_of(load_model(tmp_path / "out"), tokens), expected) < 1e-6


@pytest.mark.parametrize("name", [name for name in MODELS if name != "git"])  # its projector is told from no linear
def test_what_a_token_costs_is_counted_without_the_towers(name: str) -> None:
    model, (_, _, others) = model_of(name), MODELS[name]
    tower = {id(module) for other in others for module in model.get_submodule(other).modules()}
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and id(m) not in tower]
    assert summarise(plan(model, 0.6), model).macs_per_token[0] == sum(m.weight.numel() for m in linears)


def test_a_model_that_cannot_read_text_alone_is_refused() -> None:
    former = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = {"model_type": "opt", **COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}
    config = hf.Blip2Config(vision_config=TOWER, qformer_config=former, text_config=text)
    with pytest.raises(UnsupportedModelError, match=r"Blip2For\w+ cannot be called with text alone.*pixel_values"):
        find_sites(hf.Blip2ForConditionalGeneration(config))


def test_towers_without_a_language_model_are_refused() -> None:
    config = hf.CLIPConfig(text_config={**COMMON}, vision_config=TOWER)
    with pytest.raises(UnsupportedModelError, match="CLIPModel joins parts of several kinds and has no language model"):
        find_sites(hf.CLIPModel(config))


def test_the_face_finds_them_too() -> None:
    assert len(eckart.plan(model_of("llava"), 0.5).sites) == 7 * BLOCKS
