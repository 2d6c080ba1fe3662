"""genai_config.json: what onnxruntime-genai reads of a decoder before it runs it."""

from __future__ import annotations

from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from eckart.serving.onnx_decoder import MODEL
from eckart.serving.onnx_graph import Signature


def genai_config(config: PreTrainedConfig, generation: GenerationConfig, signature: Signature) -> dict[str, Any] | None:
    """The settings of onnxruntime-genai for a decoder; None where it has none for it.

    It takes keys and values of one shape in all blocks, positions as an input, and a token that ends a text.
    (https://onnxruntime.ai/docs/genai/reference/config.html)
    """
    positions = getattr(config, "max_position_embeddings", None)
    end = generation.eos_token_id
    if len(set(signature.past)) != 1 or "position_ids" not in signature.inputs or positions is None or end is None:
        return None
    (heads, width), first = signature.past[0], end[0] if isinstance(end, list) else end
    start, pad = generation.bos_token_id, generation.pad_token_id
    return {
        "model": {
            "type": "decoder",
            "bos_token_id": first if start is None else start,
            "eos_token_id": end,
            "pad_token_id": first if pad is None else pad,
            "context_length": positions,
            "vocab_size": config.vocab_size,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "filename": MODEL,
                "head_size": width,
                "hidden_size": config.hidden_size,
                "num_attention_heads": config.num_attention_heads,
                "num_hidden_layers": len(signature.past) // 2,
                "num_key_value_heads": heads,
                "inputs": {
                    **{name: name for name in signature.inputs},
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        # Greedy, as far as is stored; a program asks for what it wants.
        "search": {"do_sample": False, "max_length": positions, "num_beams": 1, "past_present_share_buffer": False},
    }
