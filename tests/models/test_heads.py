"""Heads: keys and values by groups of heads compute the same, cache their latents, are saved, loaded and exported."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, DynamicCache, PreTrainedModel

import eckart
from eckart.allocation import plan
from eckart.compression.replace import compress
from eckart.models.checkpoint import LowRankConfig
from eckart.models.dense import export_dense
from eckart.models.families import UnsupportedModelError
from eckart.models.heads import (
    TAKEN,
    HeadGroups,
    close_heads,
    dense_numbers,
    head_numbers,
    open_heads,
    opened_heads,
    rotation_numbers,
)
from eckart.models.latent_attention import LatentAttention, LatentCache
from eckart.models.loading import load_model, save
from eckart.models.remote_code import carry_code
from eckart.models.sites import find_sites, low_rank_modules, select_sites
from eckart.models.weight_files import CheckpointError
from tiny import CONFIGS, PAD, logits_of, relative, tiny_model, tiny_tokens

TOKENS = tiny_tokens(2, 14)
CLOSE = 1e-5


def eager(model_type: str, **changes: Any) -> PreTrainedModel:
    """A tiny model; Gemma 2's attention has a kernel of its own alone, as `sdpa` has no soft cap."""
    model = tiny_model(model_type, **changes)
    if model_type == "gemma2":
        model.set_attn_implementation("eager")
    return model


def cut(model: PreTrainedModel, keep: float = 0.6, **given: Any) -> PreTrainedModel:
    """The model with its open keys and values cut by plain SVD."""
    compress(model, "svd", plan(model, keep, include=["k_proj", "v_proj"], **given))
    return model


@torch.no_grad()
def in_steps(model: PreTrainedModel, cache: Any, ids: Tensor, *steps: int) -> Tensor:
    """The logits of tokens that are given in steps of so many, with a cache between them."""
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(steps, 1)], 1)


STEPS = (6, 1, 1, 4, 1, 1)


@pytest.mark.parametrize("model_type", TAKEN)
@pytest.mark.parametrize("size", [1, 2])
def test_open_heads_compute_the_same_whatever_the_cache_and_close_again(model_type: str, size: int) -> None:
    model = eager(model_type)
    expected, state = logits_of(model, TOKENS), copy.deepcopy(model.state_dict())
    classes = [type(module) for module in model.modules()]
    open_heads(model, size)
    assert len(opened_heads(model)) == 2 * model.config.num_hidden_layers
    assert relative(logits_of(model, TOKENS), expected) < CLOSE
    for cache in (LatentCache(model.config), DynamicCache(config=model.config)):
        # full rank: a group that is not cut is cached whole
        assert relative(in_steps(model, cache, TOKENS.ids, *STEPS), expected) < CLOSE
    close_heads(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits_of(model, TOKENS), expected)


@pytest.mark.parametrize("model_type", TAKEN)
@pytest.mark.parametrize("layout", ["plain", "pivoted"])
def test_latents_give_what_the_low_rank_model_gives(model_type: str, layout: Any) -> None:
    model = cut(open_heads(eager(model_type), 1), layout=layout)
    assert len(low_rank_modules(model)) == 2 * 2 * model.config.num_hidden_layers
    expected = logits_of(model, TOKENS)
    assert relative(in_steps(model, LatentCache(model.config), TOKENS.ids, *STEPS), expected) < CLOSE


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_any_group_and_kernel(size: int, kernel: str) -> None:
    model = tiny_model("qwen2", num_attention_heads=8, num_key_value_heads=4, head_dim=8, attention_bias=True)
    model = cut(open_heads(model, size))
    model.set_attn_implementation(kernel)
    expected = logits_of(model, TOKENS)
    assert relative(in_steps(model, LatentCache(model.config), TOKENS.ids, *STEPS), expected) < CLOSE


@pytest.mark.parametrize(
    "rope",
    [{"rope_type": "dynamic", "factor": 2.0}, {"rope_type": "yarn", "factor": 2.0}, {"rope_type": "default"}],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_any_rotary_positions(rope: dict[str, Any]) -> None:
    """As an ordinary cache has them: those that change with the length are cached as they were."""
    rope = {**rope, "rope_theta": 10_000.0}
    model = cut(open_heads(tiny_model("llama", max_position_embeddings=8, rope_parameters=rope), 1))
    caches = (LatentCache(model.config), DynamicCache(config=model.config))
    latent, ordinary = (in_steps(model, cache, TOKENS.ids, *STEPS) for cache in caches)
    assert relative(latent, ordinary) < CLOSE


def test_a_copy_takes_it_too() -> None:
    model = copy.deepcopy(cut(open_heads(tiny_model("llama"), 1)))
    latent = in_steps(model, LatentCache(model.config), TOKENS.ids, *STEPS)
    assert relative(latent, logits_of(model, TOKENS)) < CLOSE


def test_left_of_values_is_applied_after_the_sums_as_exactly_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    model = cut(open_heads(tiny_model("qwen2", num_attention_heads=4, num_key_value_heads=2), 2))  # it has biases
    asked: list[bool] = []
    rule = LatentAttention._sums_latents

    def choose(sums: bool) -> Callable[..., bool]:
        def note(self: LatentAttention, queries: Tensor) -> bool:
            asked.append(rule(self, queries))
            return sums

        return note

    results = []
    for sums in (True, False):
        monkeypatch.setattr(LatentAttention, "_sums_latents", choose(sums))
        results.append(in_steps(model, LatentCache(model.config), TOKENS.ids, *STEPS))
    assert True in asked
    assert relative(*results) < CLOSE


def test_probabilities_and_hidden_states_are_recorded_as_before() -> None:
    model = cut(open_heads(tiny_model("llama"), 1))
    model.set_attn_implementation("eager")
    given: dict[str, Any] = {"output_attentions": True, "output_hidden_states": True}
    with torch.no_grad():
        expected = model(TOKENS.ids[:, :3], **given)
        output = model(TOKENS.ids[:, :3], past_key_values=LatentCache(model.config), **given)
    for name in ("attentions", "hidden_states"):
        assert len(output[name]) == len(expected[name])
        assert all(relative(a, b) < CLOSE for a, b in zip(output[name], expected[name], strict=True))


@pytest.mark.parametrize("model_type", ["llama", "mistral", "gemma3_text"])
def test_it_holds_as_many_numbers_as_it_says(model_type: str) -> None:
    model = cut(open_heads(tiny_model(model_type), 1))
    config = model.config
    cache = LatentCache(config)
    in_steps(model, cache, TOKENS.ids[:, :5], 4, 1)  # below the window
    told = sum(count for _, count in head_numbers(model)) + rotation_numbers(config)
    assert cache.nbytes == 2 * 5 * 4 * told  # rows, tokens, bytes of a number
    ranks = sum(module.rank for module in low_rank_modules(model).values())
    assert told == ranks + config.head_dim * (2 if model_type == "gemma3_text" else 1)
    assert dense_numbers(config) == 2 * 3 * 2 * 8 > ranks
    ordinary = DynamicCache(config=config)
    in_steps(model, ordinary, TOKENS.ids[:, :5], 4, 1)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in ordinary.layers)
    assert held == 2 * 5 * 4 * dense_numbers(config)
    # a sliding layer drops what is out of its window, rotations too
    if model_type == "mistral":
        in_steps(model, cache, TOKENS.ids[:, 5:], 9)
        assert cache.nbytes == 2 * 5 * 4 * told


def padded(model: PreTrainedModel) -> dict[str, Tensor]:
    """Prompts of two lengths, padded on the left."""
    ids = TOKENS.ids[:, :8].clone()
    ids[1, :3] = PAD
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("model_type", TAKEN)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_takes_it_as_any_cache(model_type: str, how: dict[str, Any]) -> None:
    model = cut(open_heads(eager(model_type), 1))
    how = {**how, "do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}
    for prompts in ({"input_ids": TOKENS.ids[:, :8]}, padded(model)):
        expected = model.generate(**prompts, **how)
        cache = LatentCache(model.config)
        assert torch.equal(model.generate(**prompts, **how, past_key_values=cache), expected)
        assert cache.get_seq_length() == 15
        assert all(layer.keys.shape[1] == 1 for layer in cache.layers)


def test_generation_goes_on_after_a_prompt_that_was_cached_before() -> None:
    model = cut(open_heads(tiny_model("gemma3_text"), 1))
    how: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "min_new_tokens": 5}
    expected = model.generate(TOKENS.ids, **how)
    cache = LatentCache(model.config)
    in_steps(model, cache, TOKENS.ids[:, :-1], 13)
    assert torch.equal(model.generate(TOKENS.ids, **how, past_key_values=cache), expected)


def test_it_is_cropped_and_reordered_as_any_cache() -> None:
    model = cut(open_heads(tiny_model("llama"), 1))
    ids, cache = TOKENS.ids, LatentCache(model.config)
    in_steps(model, cache, ids, 14)
    cache.crop(-6)
    with torch.no_grad():
        expected = model(ids[:, :9]).logits[:, -1]
        assert relative(model(ids[:, 8:9], past_key_values=cache).logits[:, -1], expected) < CLOSE
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0]))
        assert relative(model(ids[:, 8:9].flip(0), past_key_values=cache).logits[:, -1].flip(0), expected) < CLOSE
    cache.reset()
    assert cache.get_seq_length() == 0


def test_it_is_refused_where_there_are_no_latents_or_some_layers_were_left_out() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=r"layer 0 has no latents .* eckart.open_heads"):
        model(TOKENS.ids, past_key_values=LatentCache(model.config))
    open_heads(model, 1)
    cache = LatentCache(model.config)
    in_steps(model, cache, TOKENS.ids, 14)
    cache.layers[2].reset()
    with pytest.raises(ValueError, match="layer 0 has cached 15 tokens, and layer 2, which holds their positions, 1"):
        model(TOKENS.ids[:, :1], past_key_values=cache)


@pytest.mark.parametrize("layout", ["plain", "pivoted"])
def test_a_checkpoint_loads_back_with_its_heads_open(layout: Any, tmp_path: Path) -> None:
    model = cut(open_heads(tiny_model("qwen2"), 1), layout=layout)
    expected = logits_of(model, TOKENS)
    save(model, tmp_path / "out")
    for load in (load_model, AutoModelForCausalLM.from_pretrained):
        loaded = load(tmp_path / "out").eval()
        section = loaded.config.quantization_config
        assert (section.format, section.heads) == (5, 1)
        assert {*section.sites} == {*low_rank_modules(model)}
        assert "model.layers.0.self_attn.k_proj.1" in section.sites
        assert torch.equal(logits_of(loaded, TOKENS), expected)
        steps = in_steps(loaded, LatentCache(loaded.config), TOKENS.ids, *STEPS)
        assert relative(steps, expected) < CLOSE
    built = AutoModelForCausalLM.from_config(loaded.config)
    assert {*built.state_dict()} == {*loaded.state_dict()}
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert {*low_rank_modules(classifier)} == {*low_rank_modules(model)}
    assert torch.equal(logits_of(export_dense(loaded), TOKENS).argmax(-1), expected.argmax(-1))
    assert not opened_heads(loaded)
    save(loaded, tmp_path / "dense")
    assert relative(logits_of(load_model(tmp_path / "dense"), TOKENS), expected) < CLOSE


def test_a_dense_model_is_saved_closed_and_stays_open(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    names = {*model.state_dict()}
    save(open_heads(model, 1), tmp_path / "out")
    assert all(isinstance(block.self_attn.k_proj, HeadGroups) for block in model.model.layers)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert {*stock.state_dict()} == names
    assert not opened_heads(stock)
    assert relative(logits_of(stock, TOKENS), logits_of(model, TOKENS)) < CLOSE


def test_an_added_bias_of_some_groups_is_exported_dense(tmp_path: Path) -> None:
    model = open_heads(tiny_model("llama"), 1)
    only = [site.name for site in find_sites(model) if site.name.endswith("k_proj.1")]
    calibration = eckart.calibrate(model, tiny_tokens(8, 16), eckart.build_method("sfsd"))
    compress(model, "sfsd", plan(model, 0.5, include=only), calibration)
    expected = logits_of(model, TOKENS)
    assert relative(in_steps(model, LatentCache(model.config), TOKENS.ids, *STEPS), expected) < CLOSE
    save(export_dense(model), tmp_path / "dense")
    assert relative(logits_of(load_model(tmp_path / "dense"), TOKENS), expected) < CLOSE


def test_code_in_the_checkpoint_is_refused() -> None:
    model = cut(open_heads(tiny_model("llama"), 1))
    with pytest.raises(UnsupportedModelError, match="only eckart's own code loads: leave out remote code"):
        carry_code(model)


def test_groups_of_heads_are_chosen_by_the_projections_name() -> None:
    sites = find_sites(open_heads(tiny_model("llama"), 1))
    names = [site.name for site in select_sites(sites, include="k_proj", blocks="first 1")]
    assert names == [f"model.layers.0.self_attn.k_proj.{number}" for number in range(2)]
    assert {site.input_group for site in sites if site.block == 0 and ".k_proj" in site.name} == {
        "model.layers.0.self_attn.q_proj"
    }
    assert len(select_sites(sites, include="self_attn.v_proj")) == 6


REASONS = {
    "phi3": "keys and values are not the outputs of two linears",
    "gpt2": "keys and values are not the outputs of two linears",
    "opt": "its keys are not known to be k_proj's output, perhaps normed, and rotated",
    "deepseek_v3": "it caches latents by design",
    "gpt_oss": "its keys are not known",
}


@pytest.mark.parametrize("model_type", sorted(REASONS))
def test_other_models_are_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{model_type} cannot cache latents .*{REASONS[model_type]}"):
        open_heads(tiny_model(model_type))


def test_what_else_is_refused() -> None:
    with pytest.raises(ValueError, match="2 key-value heads do not divide into groups of 3: give a divisor of 2"):
        open_heads(tiny_model("llama"), 3)
    model = open_heads(tiny_model("llama"))
    assert open_heads(model, 2) is model
    with pytest.raises(ValueError, match="in groups of 2 already, and not of 1"):
        open_heads(model, 1)
    compressed = tiny_model("llama")
    compress(compressed, "svd", plan(compressed, 0.5))
    with pytest.raises(UnsupportedModelError, match="projection is a LowRankLinear: heads are opened of a dense model"):
        open_heads(compressed)
    with pytest.raises(ValueError, match="k_proj: a group of heads is compressed"):
        close_heads(cut(open_heads(tiny_model("llama"))))
    with pytest.raises(CheckpointError, match="heads: 1 does not go with format 4"):
        LowRankConfig(format=4, heads=1)
    assert {*TAKEN} <= {*CONFIGS}


def test_the_face_has_both() -> None:
    assert (eckart.open_heads, eckart.LatentCache) == (open_heads, LatentCache)
