"""GGUF files of tiny models, laid out as llama.cpp's converter does, by the package gguf's own writer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from tiny import VOCABULARY, tiny_model

# {llama.cpp's name: (model type of `tiny_model`, what its tiny model is changed by)}; gemma's windows are by its rule.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"intermediate_size": 64, "rope_theta": 500.0}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "phi3": ("phi3", {}),
    "gemma2": ("gemma2", {"layer_types": None}),
    "gemma3": ("gemma3_text", {"layer_types": None, "num_hidden_layers": 6}),
    "gpt2": ("gpt2", {"n_positions": 64}),
}
WORDS = ["<pad>", "<s>", "</s>", "<unk>", "Ġ", *"abcdefghijklmnopqrstuvwxyz", "th", "the", "Ġthe", "Ġa"]
MERGES = ["t h", "th e", "Ġ the", "Ġ a"]


def tiny_of(architecture: str, **changes: Any) -> PreTrainedModel:
    """The tiny model of an architecture of llama.cpp, with `changes`."""
    kind, given = MODELS[architecture]
    return tiny_model(kind, **{**given, **changes})


def write_gguf(
    path: Path,
    architecture: str = "llama",
    model: PreTrainedModel | None = None,
    *,
    quantised: str = "F32",
    entries: dict[str, Any] | None = None,
    tensors: dict[str, np.ndarray | None] | None = None,
) -> PreTrainedModel:
    """Write a model; the tests that call it are skipped where gguf is not installed. Gives the model.

    Args:
        quantised: type of its matrices.
        entries: of the metadata, below the architecture's name; None leaves one out.
        tensors: more of them, by their names in the file; None leaves one out.
    """
    gguf: Any = pytest.importorskip("gguf", reason="needs the package gguf (pip install 'eckart[gguf]')")
    model = model or tiny_of(architecture)
    config = model.config
    writer = gguf.GGUFWriter(path, architecture)
    kind = gguf.GGMLQuantizationType[quantised]
    types = {"F32": "ALL_F32"}
    writer.add_file_type(gguf.LlamaFileType[types.get(quantised, f"MOSTLY_{quantised}")])
    given = {"embedding_length": config.hidden_size, "block_count": config.num_hidden_layers}
    given |= {"context_length": config.max_position_embeddings, "attention.head_count": config.num_attention_heads}
    if architecture == "gpt2":
        given |= {"feed_forward_length": config.n_inner, "attention.layer_norm_epsilon": config.layer_norm_epsilon}
    else:
        rope = config.rope_parameters.get("full_attention", config.rope_parameters)
        given |= {
            "feed_forward_length": config.intermediate_size,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
            "rope.freq_base": rope["rope_theta"],
        }
        if (head := getattr(config, "head_dim", None)) is not None:
            given |= {"attention.key_length": head, "attention.value_length": head}
        if getattr(config, "sliding_window", None):
            given["attention.sliding_window"] = config.sliding_window
    for key, value in {**given, **(entries or {})}.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
        if value is not None:
            add.get(type(value), writer.add_array)(f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    words = WORDS + [f"[PAD{number}]" for number in range(len(WORDS), VOCABULARY)]
    writer.add_token_list(words)
    writer.add_token_types([3 if word in WORDS[:4] else 1 for word in words])
    writer.add_token_merges(MERGES)
    for number, name in enumerate(("pad", "bos", "eos", "unk")):
        getattr(writer, f"add_{name}_token_id")(number)
    for name, values in {**_tensors(gguf, architecture, model), **(tensors or {})}.items():
        if values is None:
            continue
        if values.ndim > 1 and quantised != "F32":
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _tensors(gguf: Any, architecture: str, model: PreTrainedModel) -> dict[str, np.ndarray]:
    """{name: tensor} as llama.cpp stores them."""
    number = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}[architecture]
    names = gguf.get_tensor_name_map(number, model.config.num_hidden_layers)
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    stored = {}
    for key, tensor in model.named_parameters():
        if key in tied:
            continue
        name = names.get_name(key.removeprefix("transformer."), (".weight", ".bias")) or names.get_name(
            key, (".weight", ".bias")
        )
        values = tensor.detach().float().numpy()
        if architecture == "llama" and name.split(".")[-2] in ("attn_q", "attn_k"):
            values = interleave(values, len(values) // model.config.head_dim)
        elif architecture.startswith("gemma") and "norm.weight" in name:
            values = values + 1
        elif architecture == "gpt2" and values.ndim == 2 and "embd" not in name:
            values = values.T
        stored[name] = np.ascontiguousarray(values)
    return stored


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of each head as llama.cpp turns them: neighbours are a pair, where transformers pairs the halves."""
    return values.reshape(heads, 2, len(values) // heads // 2, -1).swapaxes(1, 2).reshape(values.shape)


def dequantised(values: torch.Tensor, kind: str) -> torch.Tensor:
    """A matrix after it went through a quantised type."""
    gguf: Any = pytest.importorskip("gguf")
    number = gguf.GGMLQuantizationType[kind]
    return torch.from_numpy(np.array(gguf.dequantize(gguf.quantize(values.detach().numpy(), number), number)))
