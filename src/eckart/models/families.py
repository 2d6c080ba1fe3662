"""Families: where each model architecture keeps its blocks and which of their linears read the same input.

One row per `config.model_type`. Paths of linears are inside a block; those in one inner tuple read the same tensor and
share one calibration. A model without a row gets `default_family`: every linear of its blocks, each with its own input.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

Inputs = tuple[tuple[str, ...], ...]


class UnsupportedModelError(ValueError):
    """This model cannot be compressed as it is; the message says why."""


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        blocks: path of the list of blocks, from the base model (`model.base_model`).
        parts: {part: linears by shared input}; a part ("attention", "mlp") can be selected by its name.
    """

    blocks: str
    parts: dict[str, Inputs]


# Separate projections and a gated MLP: Llama and everything descended from it. Grouped-query attention needs nothing
# special, its key and value projections are only narrower.
GATED = Family(
    blocks="layers",
    parts={
        "attention": (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",)),
        "mlp": (("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",)),
    },
)
# BERT's layout, with the output projections inside `*.output.dense`. Its norms come after the projections; in
# roberta-prelayernorm they come before them, inside the same modules, and q, k and v share one norm's output too.
BERT = Family(
    blocks="encoder.layer",
    parts={
        "attention": (
            ("attention.self.query", "attention.self.key", "attention.self.value"),
            ("attention.output.dense",),
        ),
        "mlp": (("intermediate.dense",), ("output.dense",)),
    },
)

FAMILIES: dict[str, Family] = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma2": GATED,
    "gemma3_text": GATED,
    # Fused projections are one linear each: factored whole, they share their right factor.
    "phi3": Family(
        blocks="layers",
        parts={
            "attention": (("self_attn.qkv_proj",), ("self_attn.o_proj",)),
            "mlp": (("mlp.gate_up_proj",), ("mlp.down_proj",)),
        },
    ),
    "opt": Family(
        blocks="decoder.layers",
        parts={
            "attention": (
                ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                ("self_attn.out_proj",),
            ),
            "mlp": (("fc1",), ("fc2",)),
        },
    ),
    # Conv1D: weights are stored (d_in, d_out).
    "gpt2": Family(
        blocks="h",
        parts={
            "attention": (("attn.c_attn",), ("attn.c_proj",)),
            "mlp": (("mlp.c_fc",), ("mlp.c_proj",)),
        },
    ),
    "gpt_neox": Family(
        blocks="layers",
        parts={
            "attention": (("attention.query_key_value",), ("attention.dense",)),
            "mlp": (("mlp.dense_h_to_4h",), ("mlp.dense_4h_to_h",)),
        },
    ),
    "bert": BERT,
    "roberta": BERT,
    "roberta-prelayernorm": BERT,
}


def family_of(model: PreTrainedModel) -> Family:
    """The model's row: by `config.model_type`, or from `default_family`."""
    return FAMILIES.get(model.config.model_type) or default_family(model)


def default_family(model: PreTrainedModel) -> Family:
    """A row for a model that the table lacks: the list of like modules that holds most linear weights is its blocks.

    Every linear counts as reading an input of its own (correct, at the price of calibrating equal inputs twice); its
    part is the block's child that holds it, such as "self_attn" or "mlp".

    Raises:
        UnsupportedModelError: no list of blocks with linears was found.
    """
    candidates = [
        (_linear_params(blocks), name, blocks)
        for name, blocks in model.base_model.named_modules()
        if isinstance(blocks, nn.ModuleList) and len({type(block) for block in blocks}) == 1
    ]
    if not candidates or max(candidates, key=lambda c: c[0])[0] == 0:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no list of blocks made of linears was found; "
            "add a row to eckart.models.families.FAMILIES"
        )
    _, name, blocks = max(candidates, key=lambda c: c[0])
    parts: dict[str, Inputs] = {}
    paths = dict.fromkeys(path for block in blocks for path in _linears(block))
    for path in paths:
        part = path.split(".")[0]
        parts[part] = (*parts.get(part, ()), (path,))
    return Family(blocks=name, parts=parts)


def refuse_fused_experts(model: PreTrainedModel, blocks: nn.Module) -> None:
    """Raises UnsupportedModelError where a mixture of experts keeps its experts as 3-D parameters.

    A walk over linears would leave most of such a model out and say nothing.
    """
    for name, parameter in blocks.named_parameters():
        if parameter.ndim == 3:
            raise UnsupportedModelError(
                f"{type(model).__name__}: {name} holds fused experts, a parameter of shape {tuple(parameter.shape)}; "
                "mixtures of experts stored so are not supported yet"
            )


def is_linear(module: nn.Module) -> bool:
    """True for what can be factored: nn.Linear, and GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D) and isinstance(module.weight, Tensor)


def _linear_params(module: nn.Module) -> int:
    return sum(cast(Tensor, linear.weight).numel() for linear in _linears(module).values())


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_modules() if is_linear(child)}
