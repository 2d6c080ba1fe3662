"""Tiny models and a tiny tokenizer: every family in some ten thousand random numbers, built in memory.

A family's row in `eckart.models.families.FAMILIES` needs its tiny config here; a test says so where it is missing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoModelForSpeechSeq2Seq,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from eckart.data.pairs import decoder_inputs, is_encoder_decoder
from eckart.data.tokens import Tokens
from eckart.models.experts import open_experts
from eckart.models.sites import Site

# `eckart ARGUMENTS` in this process: the exit status and everything printed. See the fixture `run`.
Run = Callable[..., tuple[int, str]]

VOCABULARY = 96
POSITIONS = 64
BLOCKS = 3
PAD, BOS, EOS, UNKNOWN, MASK, CLS, SEP = range(7)
SPECIALS = ("<pad>", "<s>", "</s>", "<unk>", "<mask>", "<cls>", "<sep>")

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
GROUPED: dict[str, Any] = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
# Windows shorter than the test rows: blocks of one model then get different masks, which calibration has to respect.
GEMMA: dict[str, Any] = {
    **GROUPED,
    "sliding_window": 6,
    "query_pre_attn_scalar": 8,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}

# {model_type: config}: the rows of the families table.
FAMILY_CONFIGS: dict[str, dict[str, Any]] = {
    "llama": GROUPED,
    "mistral": {**GROUPED, "sliding_window": 6},
    "qwen2": {**COMMON, "num_key_value_heads": 2},
    "qwen3": GROUPED,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA,
    "phi3": {**COMMON, "num_key_value_heads": 2},
    "opt": {**COMMON, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt2": {**COMMON, "n_inner": 48},
    "gpt_neox": COMMON,
    "bert": COMMON,
    "roberta": COMMON,
    "roberta-prelayernorm": COMMON,
    "deberta-v2": {**COMMON, "type_vocab_size": 0},
}
# Mixtures of experts that have a row, four experts or more of which a token is given to two.
EXPERTS: dict[str, Any] = {**GROUPED, "num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
DEEPSEEK: dict[str, Any] = {
    **COMMON,
    "moe_intermediate_size": 24,
    "n_routed_experts": 8,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_shared_experts": 1,
}
MIXTURE_CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {**GROUPED, "num_local_experts": 4},
    "olmoe": {**EXPERTS, "intermediate_size": 24},
    "gpt_oss": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "granitemoe": {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 40},
    # The second of its blocks has no experts.
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [1]},
    "deepseek_v2": {**DEEPSEEK, "q_lora_rank": None},
    "deepseek_v3": {**DEEPSEEK, "q_lora_rank": 16},
}
# Models without a row: the default family's.
DEFAULT_CONFIGS: dict[str, dict[str, Any]] = {
    "phi": COMMON,
    "starcoder2": {**COMMON, "num_key_value_heads": 2},
    "stablelm": {**COMMON, "num_key_value_heads": 2},
    "bloom": {**COMMON, "n_head": 4, "n_layer": BLOCKS},
    "modernbert": {**COMMON, "cls_token_id": CLS, "sep_token_id": SEP, "local_attention": 6},
}
# Encoder-decoders that have a row; of some the two stacks are not of one size.
T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_ff": 48,
    "d_kv": 8,
    "num_heads": 4,
    "num_layers": BLOCKS,
    "num_decoder_layers": 2,
    "relative_attention_num_buckets": 8,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "decoder_start_token_id": PAD,
}
BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": BLOCKS,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "decoder_start_token_id": EOS,
    "forced_eos_token_id": EOS,
}
ENCODER_DECODER_CONFIGS: dict[str, dict[str, Any]] = {
    "t5": T5,
    "mt5": {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "umt5": {**T5, "feed_forward_proj": "gated-gelu"},
    "bart": BART,
    "mbart": BART,
    "pegasus": {**BART, "decoder_start_token_id": PAD},
    "marian": {**BART, "decoder_start_token_id": PAD},
}
# Reads sound, and no text.
WHISPER: dict[str, Any] = {
    **BART,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": POSITIONS,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}
SCAN = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
DELTA = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
}
# Linears around convolutions, state spaces and recurrences.
HYBRID_CONFIGS: dict[str, dict[str, Any]] = {
    "mamba": {**COMMON, "state_size": 4},
    "falcon_mamba": {**COMMON, "state_size": 4},
    "mamba2": {**COMMON, "state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "lfm2": {
        **COMMON,
        "num_key_value_heads": 2,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "conv", "full_attention"],
    },
    "falcon_h1": {**COMMON, **SCAN, "num_key_value_heads": 2, "mamba_d_ssm": 64},
    "bamba": {**COMMON, **SCAN, "num_key_value_heads": 2, "attn_layer_indices": [1]},
    "recurrent_gemma": {
        **COMMON,
        "num_key_value_heads": 1,
        "lru_width": 32,
        "attention_window_size": 16,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "granitemoehybrid": {
        **COMMON,
        **SCAN,
        "num_key_value_heads": 2,
        "num_local_experts": 0,
        "layer_types": ["mamba", "attention", "mamba"],
        "shared_intermediate_size": 48,
    },
    "qwen3_5_text": {**COMMON, **DELTA},
    # Two blocks of mamba, of which the first has experts, and one of attention with experts.
    "jamba": {
        **COMMON,
        "num_key_value_heads": 2,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "expert_layer_period": 2,
        "expert_layer_offset": 0,
        "mamba_d_state": 4,
        "use_mamba_kernels": False,
    },
}
# Models that are refused, each for its own reason.
REFUSED_CONFIGS: dict[str, dict[str, Any]] = {
    "albert": {**COMMON, "embedding_size": 16, "num_hidden_groups": 1},
}
CONFIGS = {
    **FAMILY_CONFIGS,
    **MIXTURE_CONFIGS,
    **DEFAULT_CONFIGS,
    **HYBRID_CONFIGS,
    **ENCODER_DECODER_CONFIGS,
    "whisper": WHISPER,
    **REFUSED_CONFIGS,
}
ENCODERS = frozenset({"bert", "roberta", "roberta-prelayernorm", "deberta-v2", "modernbert", "albert"})
DECODERS = tuple(name for name in FAMILY_CONFIGS if name not in ENCODERS)

HEADS: dict[str, Any] = {
    "base": AutoModel,
    "causal": AutoModelForCausalLM,
    "masked": AutoModelForMaskedLM,
    "seq2seq": AutoModelForSeq2SeqLM,
    "speech": AutoModelForSpeechSeq2Seq,
    "classifier": AutoModelForSequenceClassification,
}


def tiny_config(model_type: str, **changes: Any) -> PreTrainedConfig:
    """The tiny config of a model type, with `changes`."""
    assert model_type in CONFIGS, f"add a tiny config of {model_type!r} to tests/tiny.py"
    return CONFIG_MAPPING[model_type](**{**CONFIGS[model_type], **changes})


def tiny_model(
    model_type: str,
    head: str | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """A model as `closed_model` makes it; the experts of a mixture are open, as `load_model` gives them."""
    return open_experts(closed_model(model_type, head, seed=seed, dtype=dtype, **changes))


def closed_model(
    model_type: str,
    head: str | None = None,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **changes: Any,
) -> PreTrainedModel:
    """A model with random weights, ready to evaluate; its head is the pretraining one unless another is named.

    Biases and norms are random as well, so that a dropped one shows, and weights keep activations near one in size.
    """
    config = tiny_config(model_type, **changes)
    own = {
        **dict.fromkeys(ENCODERS, "masked"),
        **dict.fromkeys(ENCODER_DECODER_CONFIGS, "seq2seq"),
        "whisper": "speech",
    }
    head = head or own.get(model_type, "causal")
    with torch.random.fork_rng(devices=[]):  # some classes draw vectors
        torch.manual_seed(seed)
        model: PreTrainedModel = HEADS[head].from_config(config, dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name in (model._keys_to_ignore_on_save or ()):
                continue  # a table that the class computes whenever it is loaded
            if parameter.ndim == 1:
                parameter.add_(0.2 * noise)
            else:
                parameter.copy_(noise / 32**0.5)
    return model


def tiny_tokenizer(**changes: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words: the specials, then "w0" ... ; anything else is unknown."""
    words = [*SPECIALS, *(f"w{number}" for number in range(VOCABULARY - len(SPECIALS)))]
    inner = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = dict(
        zip(
            ("pad_token", "bos_token", "eos_token", "unk_token", "mask_token", "cls_token", "sep_token"),
            SPECIALS,
            strict=True,
        )
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, **{**named, **changes})


def tiny_text(words: int, seed: int = 0) -> str:
    """Random words of the tiny tokenizer."""
    return " ".join(f"w{random.Random(seed * 100_003 + i).randrange(VOCABULARY - 7)}" for i in range(words))


def tiny_tokens(samples: int = 6, length: int = 16, *, padded: bool = False, seed: int = 0) -> Tokens:
    """Random calibration tokens; `padded` cuts every row but the first to a length of its own, padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(len(SPECIALS), VOCABULARY, (samples, length), generator=generator)
    mask = torch.ones_like(ids, dtype=torch.bool)
    if padded:
        lengths = torch.randint(3, length, (samples, 1), generator=generator)
        lengths[0] = length
        mask = torch.arange(length) < lengths
        ids = ids.masked_fill(~mask, PAD)
    return Tokens(ids, mask, {"corpus": "random"}, MASK)


def tiny_pairs(samples: int = 6, source: int = 12, target: int = 8, *, padded: bool = False, seed: int = 0) -> Tokens:
    """Random pairs of source and target."""
    sides = [
        tiny_tokens(samples, length, padded=padded, seed=seed + at) for at, length in ((0, source), (1_000, target))
    ]
    ids, mask = (torch.cat([getattr(side, name) for side in sides], 1) for name in ("ids", "mask"))
    return Tokens(ids, mask, {"corpus": "random"}, MASK, split=source)


@torch.no_grad()
def logits_of(model: PreTrainedModel, tokens: Tokens | None = None) -> Tensor:
    """The model's logits (of the base model: its hidden states) on some tokens, padding masked."""
    if is_encoder_decoder(model):
        return model(**given_of(model, tokens or tiny_pairs(2))).logits
    tokens = tokens or tiny_tokens(2, 12)
    output = model(input_ids=tokens.ids, attention_mask=tokens.mask.long())
    return output.logits if "logits" in output else output.last_hidden_state


def given_of(model: PreTrainedModel, tokens: Tokens) -> dict[str, Tensor]:
    """What an encoder-decoder is called with: a source or, of one that reads sound, some of that; and the targets."""
    assert tokens.split is not None
    sources, targets = tokens.ids.tensor_split([tokens.split], 1)
    masks = tokens.mask.long().tensor_split([tokens.split], 1)
    decoder = {"decoder_input_ids": decoder_inputs(model, targets), "decoder_attention_mask": masks[1]}
    if model.main_input_name == "input_features":
        return {"input_features": tiny_sound(len(tokens)), **decoder}
    return {"input_ids": sources, "attention_mask": masks[0], **decoder}


def tiny_sound(samples: int = 2, seed: int = 0) -> Tensor:
    """Random features of as long a sound as the tiny Whisper reads."""
    return torch.randn(samples, 8, 24, generator=torch.Generator().manual_seed(seed))


def unpadded(pair: Tokens) -> Tokens:
    """One pair without its padding."""
    assert pair.split is not None
    split = int(pair.mask[:, : pair.split].sum())
    return replace(pair, ids=pair.ids[pair.mask][None], mask=pair.mask[pair.mask][None], split=split)


@torch.no_grad()
def site_inputs(model: PreTrainedModel, tokens: Tokens, sites: Iterable[Site]) -> dict[str, Tensor]:
    """{site name: (n, d_in) rows it reads} by plain hooks on forward passes of the whole model, a sample at a time.

    The samples are stripped of their padding, so nothing here knows about masks or blocks.
    """
    seen: dict[str, list[Tensor]] = {}
    handles = [
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda _module, args, name=site.name: seen.setdefault(name, []).append(args[0].flatten(0, -2).clone())
        )
        for site in sites
    ]
    try:
        for row in range(len(tokens)):
            one = tokens.take(slice(row, row + 1))
            if tokens.split is None:
                model(input_ids=one.ids[one.mask][None])
            else:
                model(**given_of(model, unpadded(one)))
    finally:
        for handle in handles:
            handle.remove()
    return {name: torch.cat(rows) for name, rows in seen.items()}


def relative(value: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest entry."""
    return float((value.double() - expected.double()).abs().max() / expected.double().abs().max())
