"""Families: where each model architecture keeps its blocks and which of their linears read the same input.

One row per `config.model_type`. Paths of linears are inside a block; those in one inner tuple read the same tensor and
share one calibration. A model without a row gets `default_family`: every linear of its blocks, each with its own input.
Of a model that reads images or sound as well, all of this is its language model's.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.models.experts import projections_of, routers_of

Inputs = tuple[tuple[str, ...], ...]
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)


class UnsupportedModelError(ValueError):
    """This model cannot be compressed as it is; the message says why."""


@dataclass(frozen=True)
class Family:
    """A row of the table.

    Attributes:
        blocks: path of the list of blocks, from the `language_model`; of an encoder-decoder, of the decoder's.
        parts: {part: linears by shared input}; a part ("attention", "mlp", "experts") can be selected by its name. "*"
            in a path stands for every number of an expert; each expert has tokens, and so inputs, of its own.
        encoder: of an encoder-decoder, path of the list of the encoder's blocks, which come before the decoder's.
        crossing: of an encoder-decoder, linears of the decoder's blocks that read what the encoder gives.
        kept: modules of the blocks whose 3-D parameters stay as they are, such as the gates of a recurrence.
        positions: linears that read relative positions, and no tokens.
        shared_positions: linears that read them as well as tokens, where the configuration's `share_att_key` is set.
    """

    blocks: str
    parts: dict[str, Inputs]
    encoder: str | None = None
    crossing: frozenset[str] = frozenset()
    kept: frozenset[str] = frozenset()
    positions: frozenset[str] = frozenset()
    shared_positions: frozenset[str] = frozenset()


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
# The same with relative positions in the attention, which have projections of their own or go through the tokens'.
DEBERTA = Family(
    blocks="encoder.layer",
    parts={
        "attention": (
            ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
            ("attention.self.pos_key_proj",),
            ("attention.self.pos_query_proj",),
            ("attention.output.dense",),
        ),
        "mlp": BERT.parts["mlp"],
    },
    positions=frozenset({"attention.self.pos_key_proj", "attention.self.pos_query_proj"}),
    shared_positions=frozenset({"attention.self.query_proj", "attention.self.key_proj"}),
)

# Linears of every expert, opened: see `experts.Experts`.
EXPERTS: Inputs = (("mlp.experts.*.gate_up_proj",), ("mlp.experts.*.down_proj",))
# The same blocks with a mixture of experts in some or all of them; Mixtral, Qwen3-MoE, OLMoE, GPT-OSS.
MIXTURE = Family(blocks="layers", parts={**GATED.parts, "experts": EXPERTS})


def _shared(name: str) -> Inputs:
    """The linears of the experts that every token is given to, in the mixture's child of this name."""
    return ((f"mlp.{name}.gate_proj", f"mlp.{name}.up_proj"), (f"mlp.{name}.down_proj",))


# Latent attention: keys and values are low-rank by design, and so are queries of the larger models.
DEEPSEEK = Family(
    blocks="layers",
    parts={
        "attention": (
            ("self_attn.q_proj", "self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
            ("self_attn.q_b_proj",),
            ("self_attn.kv_b_proj",),
            ("self_attn.o_proj",),
        ),
        "mlp": (*GATED.parts["mlp"], *_shared("shared_experts")),
        "experts": EXPERTS,
    },
)

# Encoder-decoders. Keys and values of cross-attention read what the encoder gives, its queries what the decoder has.
# A block of T5 is a list of layers, and the encoder's has no cross-attention in it.
T5 = Family(
    blocks="decoder.block",
    parts={
        "attention": (
            ("layer.0.SelfAttention.q", "layer.0.SelfAttention.k", "layer.0.SelfAttention.v"),
            ("layer.0.SelfAttention.o",),
        ),
        "cross_attention": (
            ("layer.1.EncDecAttention.q",),
            ("layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"),
            ("layer.1.EncDecAttention.o",),
        ),
        "mlp": tuple(
            tuple(f"layer.{at}.DenseReluDense.{name}" for name in names)
            for at in (1, 2)
            for names in (("wi",), ("wi_0", "wi_1"), ("wo",))
        ),
    },
    encoder="encoder.block",
    crossing=frozenset({"layer.1.EncDecAttention.k", "layer.1.EncDecAttention.v"}),
)
BART = Family(
    blocks="decoder.layers",
    parts={
        "attention": (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.out_proj",),
        ),
        "cross_attention": (
            ("encoder_attn.q_proj",),
            ("encoder_attn.k_proj", "encoder_attn.v_proj"),
            ("encoder_attn.out_proj",),
        ),
        "mlp": (("fc1",), ("fc2",)),
    },
    encoder="encoder.layers",
    crossing=frozenset({"encoder_attn.k_proj", "encoder_attn.v_proj"}),
)

# The step's projection, dt_proj, is no site: its weight is multiplied with past the module.
MAMBA = Family(blocks="layers", parts={"mixer": (("mixer.in_proj",), ("mixer.x_proj",), ("mixer.out_proj",))})

# Blocks of two kinds, mamba and attention, each with an MLP or with experts.
JAMBA = Family(
    blocks="layers",
    parts={
        "mamba": tuple((path.replace("mixer", "mamba"),) for (path,) in MAMBA.parts["mixer"]),
        "attention": GATED.parts["attention"],
        **{
            part: tuple(tuple(path.replace("mlp", "feed_forward") for path in paths) for paths in inputs)
            for part, inputs in (("mlp", GATED.parts["mlp"]), ("experts", EXPERTS))
        },
    },
)

FAMILIES: dict[str, Family] = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma2": GATED,
    "gemma3_text": GATED,
    "mixtral": MIXTURE,
    "olmoe": MIXTURE,
    "gpt_oss": MIXTURE,
    "qwen3_moe": MIXTURE,
    "qwen2_moe": Family(
        blocks="layers",
        parts={**MIXTURE.parts, "mlp": (*GATED.parts["mlp"], *_shared("shared_expert"))},
    ),
    "granitemoe": Family(
        blocks="layers",
        parts={
            "attention": GATED.parts["attention"],
            "experts": tuple(tuple(path.replace("mlp", "block_sparse_moe") for path in paths) for paths in EXPERTS),
        },
    ),
    "deepseek_v2": DEEPSEEK,
    "deepseek_v3": DEEPSEEK,
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
    "mamba": MAMBA,
    "falcon_mamba": MAMBA,
    "jamba": JAMBA,
    "recurrent_gemma": Family(
        blocks="layers",
        parts={
            "temporal_block": (
                ("temporal_block.linear_x", "temporal_block.linear_y"),
                ("temporal_block.linear_out",),
                ("temporal_block.q_proj", "temporal_block.k_proj", "temporal_block.v_proj"),
                ("temporal_block.o_proj",),
            ),
            "mlp": (("mlp_block.gate_proj", "mlp_block.up_proj"), ("mlp_block.down_proj",)),
        },
        kept=frozenset({"temporal_block.rg_lru"}),
    ),
    "bert": BERT,
    "roberta": BERT,
    "roberta-prelayernorm": BERT,
    "deberta-v2": DEBERTA,
    "t5": T5,
    "mt5": T5,
    "umt5": T5,
    "bart": BART,
    "mbart": BART,
    "pegasus": BART,
    "marian": BART,
    "whisper": BART,
}


def family_of(model: PreTrainedModel) -> Family:
    """The row of the language model: by its `config.model_type`, or from `default_family`.

    A row of encoder-decoders is not that of a model which is only one of their two stacks.

    Raises:
        UnsupportedModelError: an encoder-decoder without a row; or as `default_family`.
    """
    config = language_model(model).config
    row = FAMILIES.get(config.model_type)
    if not getattr(model.config, "is_encoder_decoder", False):
        return default_family(model) if row is None or row.encoder is not None else row
    if row is None or row.encoder is None:
        known = ", ".join(name for name, family in FAMILIES.items() if family.encoder is not None)
        raise UnsupportedModelError(
            f"{type(model).__name__}: of encoder-decoders, {known} have a row in eckart.models.families.FAMILIES, and "
            f"{config.model_type!r} has none; add one"
        )
    return row


def position_readers(model: PreTrainedModel) -> frozenset[str]:
    """Paths, inside a block, of the linears that read relative positions, instead of the tokens or as well."""
    family, config = family_of(model), text_config(model)
    shared = getattr(config, "share_att_key", False) and getattr(config, "relative_attention", False)
    return family.positions | (family.shared_positions if shared else frozenset())


def language_model(model: PreTrainedModel) -> PreTrainedModel:
    """The part that reads and writes text: the base model, or the one inside it that has the config's text section.

    Models that read images or sound too have towers for them next to their language model, often with more linears.

    Raises:
        UnsupportedModelError: the config has a text section, and no module reads tokens with it; or the model cannot
            be called with text alone.
    """
    base, config = cast(PreTrainedModel, model.base_model), text_config(model)
    if config is model.config:
        return base
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel) and part is not model]
    tokens = _tokens_of(model)
    readers = [
        part
        for part in parts
        if part.config.model_type == config.model_type and any(module is tokens for module in part.modules())
    ]
    if not readers:
        raise UnsupportedModelError(
            f"{type(model).__name__} joins parts of several kinds and has no language model among them that reads its "
            "tokens; eckart compresses language models"
        )
    demanded = [
        name
        for name, parameter in inspect.signature(base.forward).parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name != "input_ids"
    ]
    if demanded:
        raise UnsupportedModelError(
            f"{type(model).__name__} cannot be called with text alone, it demands {', '.join(demanded)}: neither "
            "calibration nor evaluation on text is possible; give its language model as a model of its own"
        )
    return cast(PreTrainedModel, readers[0].base_model)


def tower_modules(model: PreTrainedModel) -> set[nn.Module]:
    """Modules of the base model that read no tokens: all outside its language model, and models of images or sound.

    None of an encoder-decoder, of which both stacks are its language model, Whisper's encoder of sound too.
    """
    language = language_model(model)
    if getattr(model.config, "is_encoder_decoder", False) and language is model.base_model:
        return set()
    parts = [part for part in language.modules() if isinstance(part, PreTrainedModel)]
    towers = [part for part in parts if part.main_input_name != language.main_input_name]
    inside = {module for tower in towers for module in tower.modules()}
    return inside | (set(model.base_model.modules()) - set(language.modules()))


def text_config(model: PreTrainedModel) -> PreTrainedConfig:
    """The text section of the model's config; the config itself where it has none, or several."""
    try:
        return model.config.get_text_config()
    except ValueError:
        return model.config


def _tokens_of(model: PreTrainedModel) -> nn.Module | None:
    """The embedding of the model's tokens; None where it has none."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


def default_family(model: PreTrainedModel) -> Family:
    """A row for a model that the table lacks: the list of like modules that holds most linear weights is its blocks.

    Every linear counts as reading an input of its own (correct, at the price of calibrating equal inputs twice); its
    part is the block's child that holds it, such as "self_attn" or "mlp".

    Raises:
        UnsupportedModelError: no list of blocks with linears was found.
    """
    language, elsewhere = language_model(model), tower_modules(model)
    candidates = [
        (_linear_params(blocks), name, blocks)
        for name, blocks in language.named_modules()
        if isinstance(blocks, nn.ModuleList) and len({type(block) for block in blocks}) == 1
        if blocks not in elsewhere
    ]
    if not candidates or max(candidates, key=lambda c: c[0])[0] == 0:
        raise UnsupportedModelError(
            f"{type(model).__name__}: no list of blocks of one kind, made of linears, was found; "
            "add a row to eckart.models.families.FAMILIES"
        )
    _, name, blocks = max(candidates, key=lambda c: c[0])
    parts: dict[str, Inputs] = {}
    paths = dict.fromkeys(path for block in blocks for path in _sites(block))
    for path in paths:
        part = path.split(".")[0]
        parts[part] = (*parts.get(part, ()), (path,))
    return Family(blocks=name, parts=parts)


def refuse_other_weights(model: PreTrainedModel, blocks: nn.Module) -> None:
    """Raises UnsupportedModelError where blocks compute with 3-D parameters: experts stored as one, convolutions over
    all channels, recurrences without a row, attention weights by head.

    A walk over linears would leave most of a mixture of experts out and say nothing; the other kinds multiply with
    their linears' weights themselves, past the modules that would take the linears' places. Let pass are kernels of
    convolutions of each channel by itself, a few numbers next to the linears around them, and what a row keeps.
    """
    kept = family_of(model).kept
    for path, module in blocks.named_modules():
        each_channel = isinstance(module, nn.Conv1d) and module.groups == module.in_channels
        if each_channel or path.partition(".")[2] in kept:
            continue
        for name, parameter in module.named_parameters(path, recurse=False):
            if parameter.ndim != 3:
                continue
            kind, shape = type(model).__name__, tuple(parameter.shape)
            if "experts" in f"{path} {type(module).__name__}".lower():
                open_them = (
                    "give each linears of its own first: eckart.open_experts(model); eckart.load_model does it"
                    if projections_of(module)
                    else "experts of this form are not supported yet"
                )
                raise UnsupportedModelError(
                    f"{kind}: {name} holds all experts of a layer in one tensor of shape {shape}; {open_them}"
                )
            what = "the kernel of a convolution" if isinstance(module, CONVOLUTIONS) else "no linear's weight"
            raise UnsupportedModelError(
                f"{kind}: {name}, of shape {shape}, is {what}; blocks with recurrences, convolutions over all "
                f"channels or attention weights by head are not supported yet, and {model.config.model_type} has such"
            )


def parts_outside(model: PreTrainedModel, blocks: nn.Module) -> tuple[str, ...]:
    """Names of the base model's largest parts with linears that are not in its blocks: towers, projectors, poolers.

    A head is none, though T5's model is its own base model.
    """
    inside, head = set(blocks.modules()), model.get_output_embeddings()

    def names(prefix: str, module: nn.Module) -> Iterator[str]:
        linears = [child for child in module.modules() if is_linear(child) and child is not head]
        if linears and not any(child in inside for child in module.modules()):
            yield prefix
        elif module not in inside:
            for name, child in module.named_children():
                yield from names(f"{prefix}.{name}" if prefix else name, child)

    base = model.base_model
    return tuple(names(next(name for name, module in model.named_modules() if module is base), base))


def is_linear(module: nn.Module) -> bool:
    """True for what can be factored: nn.Linear, and GPT-2's Conv1D."""
    return isinstance(module, nn.Linear | Conv1D) and isinstance(module.weight, Tensor)


def _linear_params(module: nn.Module) -> int:
    return sum(cast(Tensor, linear.weight).numel() for linear in _linears(module).values())


def _sites(block: nn.Module) -> list[str]:
    """Paths of the block's linears in order, routers left out."""
    routers = {*routers_of(block)}
    return [path for path in _linears(block) if path not in routers]


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: child for name, child in module.named_modules() if is_linear(child)}
