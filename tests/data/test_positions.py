"""Positions: at the length that is taken by default, and at no longer one, every kind of model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModel, AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration

from eckart.data.positions import check_positions, usable_positions
from eckart.evals.hidden_states import read_hidden_states
from eckart.evals.tasks import evaluate
from eckart.evals.texts import DEFAULT_LENGTH, default_length
from tiny import COMMON, POSITIONS, VOCABULARY, tiny_config, tiny_model, tiny_text, tiny_tokenizer

SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0}
# {model type: (config, tokens that it reads at most)}
MODELS: dict[str, tuple[dict[str, Any], int | None]] = {
    "llama": ({**COMMON, "num_key_value_heads": 2}, POSITIONS),
    "gpt2": (COMMON, POSITIONS),
    "opt": ({**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32}, POSITIONS),
    "biogpt": (COMMON, POSITIONS),
    "mpt": ({**SMALL, "d_model": 32, "n_heads": 4, "n_layers": 2, "expansion_ratio": 2, "max_seq_len": 64}, POSITIONS),
    "roberta": (COMMON, POSITIONS - 1),
    "xlm-roberta": ({**COMMON, "pad_token_id": 1}, POSITIONS - 2),
    "camembert": ({**COMMON, "pad_token_id": 1}, POSITIONS - 2),
    "esm": ({**COMMON, "pad_token_id": 1, "position_embedding_type": "absolute"}, POSITIONS - 2),
    "mpnet": ({**COMMON, "pad_token_id": 1}, POSITIONS - 2),
    "bert": (COMMON, POSITIONS),
    "bloom": ({**SMALL, "hidden_size": 32, "n_head": 4, "n_layer": 2}, None),
    "mamba": ({**SMALL, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, None),
    "xlnet": ({**SMALL, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, None),
}
DECODERS = ("llama", "gpt2", "opt", "biogpt", "mpt", "bloom")
ENCODERS = ("roberta", "xlm-roberta", "camembert", "mpnet", "bert")


def model_of(model_type: str, kind: Any = AutoModel) -> Any:
    torch.manual_seed(0)
    return kind.from_config(CONFIG_MAPPING[model_type](**MODELS[model_type][0])).eval()


@pytest.mark.parametrize("model_type", [name for name, (_, positions) in MODELS.items() if positions])
def test_a_model_runs_at_its_positions_and_not_past_them(model_type: str) -> None:
    model, positions = model_of(model_type), MODELS[model_type][1]
    assert positions is not None
    assert usable_positions(model) == default_length(model) == positions
    ids = torch.randint(8, VOCABULARY, (1, positions))
    with torch.no_grad():
        model(input_ids=ids)
    check_positions(model, positions)
    with pytest.raises(ValueError, match=f"rows {positions + 1} is past the model's {positions} positions"):
        check_positions(model, positions + 1, "rows")


@pytest.mark.parametrize("model_type", [name for name, (_, positions) in MODELS.items() if positions is None])
def test_a_model_without_a_bound_reads_what_others_do(model_type: str) -> None:
    model = model_of(model_type)
    assert usable_positions(model) is None
    assert default_length(model) == DEFAULT_LENGTH
    assert default_length(model, context=100) == 100
    check_positions(model, 10**6)


@pytest.mark.parametrize("model_type", DECODERS)
def test_perplexity_at_the_default_length(model_type: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(2 * POSITIONS), encoding="utf-8")
    context = None if MODELS[model_type][1] else 50
    model = model_of(model_type, AutoModelForCausalLM)
    (result,) = evaluate(model, tiny_tokenizer(), [f"perplexity:{text}"], context=context)
    assert result.settings["length"] == (context or POSITIONS)
    assert result.value > 1


@pytest.mark.parametrize("model_type", ENCODERS)
def test_hidden_states_at_the_default_length(model_type: str) -> None:
    model, expected = model_of(model_type), MODELS[model_type][1]
    with read_hidden_states(model, tiny_tokenizer(), [tiny_text(2 * POSITIONS), "w1 w2"]) as states:
        assert (states.length, states.truncated) == (expected, 1)


def test_hidden_states_of_a_model_without_a_bound_may_be_longer_than_by_default() -> None:
    with read_hidden_states(model_of("bloom"), tiny_tokenizer(), [tiny_text(2100)], length=2100) as states:
        assert (states.length, states.truncated) == (2100, 0)


def test_the_limit_of_a_model_with_a_tower_is_its_language_models() -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 8, "patch_size": 4, **vision},
        text_config=tiny_config("llama"),
        image_token_index=VOCABULARY - 1,
    )
    assert usable_positions(LlavaForConditionalGeneration(config)) == POSITIONS


def test_a_task_asks_no_more_tokens_than_there_are() -> None:
    assert default_length(tiny_model("llama"), context=10 * POSITIONS) == POSITIONS
