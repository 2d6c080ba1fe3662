"""GGUF files as models: llama.cpp's quantised weights multiplied out into an ordinary model, and its tokenizer.

The package gguf knows the quantised types, and transformers where each architecture's tensors belong and how llama.cpp
lays them out. What the metadata say is read here, and strictly: an entry or a tensor that was left out would make
another model of it, so it is an error.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from accelerate.utils import set_module_tensor_to_device  # type: ignore[import-untyped]
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, get_gguf_hf_weights_map
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import local_torch_dtype

from eckart.models.families import UnsupportedModelError
from eckart.models.gguf_header import GgufHeader, damaged_gguf, read_gguf_header
from eckart.models.matching import check_finite, refuse
from eckart.support.extras import import_extra

# {entry of the metadata, after the architecture's name: entry of the configuration}.
LLAMA = {
    "context_length": "max_position_embeddings",
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
WITH_HEADS = {**LLAMA, "attention.key_length": "head_dim"}
WINDOW = {"attention.sliding_window": "sliding_window"}


@dataclass(frozen=True)
class Architecture:
    """An architecture of llama.cpp: its type in transformers, and which entry of its metadata is which there.

    Attributes:
        switches: {tensor of a block: entry of the configuration that says the model has such}.
    """

    model_type: str
    entries: Mapping[str, str]
    switches: Mapping[str, str] = field(default_factory=dict)


# {llama.cpp's name: it in transformers}; each has a row in `families.FAMILIES`, and transformers knows its tensors.
ARCHITECTURES = {
    # Mistral's too, and whatever else computes as Llama does
    "llama": Architecture("llama", WITH_HEADS, {"attn_output.bias": "attention_bias", "ffn_down.bias": "mlp_bias"}),
    "qwen2": Architecture("qwen2", LLAMA),
    "qwen3": Architecture("qwen3", WITH_HEADS),
    "phi3": Architecture(
        "phi3", {**LLAMA, **WINDOW, "rope.scaling.original_context_length": "original_max_position_embeddings"}
    ),
    "gemma2": Architecture(
        "gemma2",
        {
            **WITH_HEADS,
            **WINDOW,
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
    ),
    "gemma3": Architecture("gemma3_text", {**WITH_HEADS, **WINDOW, "rope.freq_base_swa": "rope_local_base_freq"}),
    "gpt2": Architecture(
        "gpt2",
        {
            "context_length": "n_positions",
            "block_count": "n_layer",
            "embedding_length": "n_embd",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
    ),
}
# Entries that a file has to have, of those that its row names.
NEEDED = frozenset({"context_length", "block_count", "embedding_length", "feed_forward_length", "attention.head_count"})
# Entries that change nothing which is computed, or are checked against the others.
SILENT = frozenset(
    {"vocab_size", "tensor_data_layout", "rope.dimension_count", "attention.value_length", "attention.causal"}
    | {"rope.scaling.type", "rope.scaling.factor", "rope.scaling.finetuned"}
)
# No number of a model is larger than this: a length that is comes of a damaged file.
LARGEST = 1 << 24
# llama.cpp's base of the rotary frequencies where the file names none.
ROPE_BASE = 10_000.0
# What each pair of coordinates is slowed by, in place of an entry: of Llama 3.1 and 3.2. The constants are theirs.
ROPE_FACTORS = "rope_freqs.weight"
LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
# {architecture: blocks of its largest model}, which divides by the root of width over heads, and not of a head's width;
# llama.cpp knows it by that number as well (src/models/gemma2.cpp, gemma3.cpp).
LARGEST_GEMMA = {"gemma2": 46, "gemma3": 62}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
IDS = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding", "unk_token_id": "unknown"}
FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def import_gguf() -> ModuleType:
    """The package gguf.

    Raises:
        ValueError: it is not installed.
    """
    return import_extra("gguf", "gguf", "a GGUF file needs the package gguf")


def load_gguf(file: Path, dtype: str = "auto") -> PreTrainedModel:
    """The model in a GGUF file, in memory of its own, with nothing in it that says it was quantised.

    Args:
        dtype: "auto" is float32, in which quantised weights are multiplied out; of a file that holds no quantised
            tensor, the type of its weights.

    Raises:
        ValueError: the package gguf is not installed.
        UnsupportedModelError: an architecture that is not in ARCHITECTURES, a quantised type that gguf lacks, or an
            entry of the metadata that is not read.
        CheckpointError: the file is damaged or cut short; or it does not hold what its metadata describe: one message
            with all tensors that are missing, unknown or of another shape.

    Cost: every tensor is read and multiplied out, one at a time: a minute of a processor for 135 million parameters.
    """
    gguf, header = import_gguf(), read_gguf_header(file)
    types = _types(header, gguf)
    config = read_gguf_config(header)
    config.dtype = stored_type(types.values()) if dtype == "auto" else getattr(torch, dtype)
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    try:
        with init_empty_weights(include_buffers=False), local_torch_dtype(config.dtype, model_class.__name__):
            model: PreTrainedModel = model_class(config)
    except (ValueError, RuntimeError, TypeError, ArithmeticError, MemoryError) as error:
        raise damaged_gguf(file, f"no model is of the sizes that it says: {error}") from error
    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(config=model.config.to_dict())
    places = get_gguf_hf_weights_map(model, processor)
    _check_names(header, model, places)
    misshaped, parameters = [], dict(model.named_parameters())
    for name, tensor in _read(header, types, processor, places):
        if tensor.shape != parameters[name].shape:
            misshaped.append(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(parameters[name].shape)}")
            continue
        check_finite(str(file), [(name, tensor)])
        set_module_tensor_to_device(model, name, "cpu", value=tensor, dtype=config.dtype)
    refuse(str(file), misshaped, f"the {type(model).__name__} that its metadata describe")
    model.tie_weights()
    return model.eval()


def load_gguf_tokenizer(file: Path) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file.

    Raises:
        CheckpointError: the file is damaged, or holds none.
        UnsupportedModelError: as `load_gguf`.
    """
    import_gguf()
    header = read_gguf_header(file)
    _row(header)
    try:
        # In a folder of its own: transformers would take in what lies next to the file.
        with tempfile.TemporaryDirectory() as empty:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(empty, gguf_file=str(file.resolve()))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise damaged_gguf(file, f"no tokenizer can be made of it: {error!r}") from error
    for name, key in IDS.items():  # transformers 5.6 to 5.16 leave pad out, and take another eos
        number, token = header.metadata.get(f"tokenizer.ggml.{key}_token_id"), name.removesuffix("_id")
        if number is not None and getattr(tokenizer, name) != number:
            setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(number))
    tokenizer.name_or_path = str(file)
    tokenizer.init_kwargs.pop("name_or_path", None)
    return tokenizer


def gguf_type(file: Path) -> str:
    """How a GGUF file is quantised, in llama.cpp's words: "Q4_K_M".

    Raises:
        ValueError, CheckpointError, UnsupportedModelError: as `load_gguf`.
    """
    gguf, header = import_gguf(), read_gguf_header(file)
    try:
        return str(gguf.LlamaFileType(header.metadata.get("general.file_type")).name.split("_", 1)[1])
    except ValueError:  # not said, or newer than the package: by the tensors
        matrices = {name: kind for name, kind in _types(header, gguf).items() if len(header.tensors[name].shape) > 1}
        return str(Counter(kind.name for kind in matrices.values()).most_common(1)[0][0])


def stored_type(types: Any) -> torch.dtype:
    """The type of a file's weights: float32 where any is quantised. Its norms are float32 whatever the matrices are."""
    names = {kind.name for kind in types}
    return next((FLOATS[name] for name in FLOATS if name in names and names <= FLOATS.keys()), torch.float32)


def _row(header: GgufHeader) -> Architecture:
    row = ARCHITECTURES.get(header.architecture)
    if row is None:
        raise UnsupportedModelError(
            f"{header.path} is of the architecture {header.architecture!r}; of GGUF files eckart reads "
            f"{', '.join(ARCHITECTURES)}: give the Hugging Face model that it was converted from"
        )
    return row


def read_gguf_config(header: GgufHeader) -> PreTrainedConfig:
    """The configuration of the model in a GGUF file.

    Raises:
        UnsupportedModelError: an architecture that is not in ARCHITECTURES, or an entry that is not read.
        CheckpointError: entries that there have to be are missing or are no numbers.
    """
    row, architecture = _row(header), header.architecture
    entries = {
        key.removeprefix(f"{architecture}."): value
        for key, value in header.metadata.items()
        if key.startswith(f"{architecture}.")
    }
    _check_entries(header, row, entries)
    values = {name: entries[key] for key, name in row.entries.items() if key in entries}
    values |= {switch: f"blk.0.{tensor}" in header.tensors for tensor, switch in row.switches.items()}
    if "rope.freq_base" in row.entries:
        values |= _rotary(header, row, entries)
    ids = {name: header.metadata.get(f"tokenizer.ggml.{key}_token_id") for name, key in IDS.items()}
    values |= {name: number for name, number in ids.items() if number is not None}
    config_class: Any = CONFIG_MAPPING[row.model_type]
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config_class]
    try:
        config: PreTrainedConfig = config_class(
            **values,
            vocab_size=header.tensors[EMBEDDING].shape[0],  # the tokenizer may have fewer words, where it was padded
            tie_word_embeddings=HEAD not in header.tensors,
            architectures=[model_class.__name__],
        )
    except (ValueError, TypeError, ArithmeticError) as error:
        raise damaged_gguf(header.path, f"its metadata describe no {row.model_type}: {error}") from error
    config.name_or_path = str(header.path)
    return config


def _check_entries(header: GgufHeader, row: Architecture, entries: Mapping[str, Any]) -> None:
    """Raises where an entry is missing, is no number that a model has, or would be left out."""
    lacking = sorted(NEEDED - entries.keys()) + [EMBEDDING] * (EMBEDDING not in header.tensors)
    if lacking:
        raise damaged_gguf(header.path, f"it lacks {', '.join(lacking)}")
    arrays = sorted(key for key, value in entries.items() if isinstance(value, tuple))
    if arrays:
        raise UnsupportedModelError(
            f"{header.path}: {', '.join(arrays)} differ from block to block, and transformers builds all blocks alike"
        )
    wrong = [key for key in row.entries if key in entries and not _is_size(entries[key], key in NEEDED)]
    if wrong:
        raise damaged_gguf(header.path, f"{wrong[0]} is {entries[wrong[0]]!r}")
    if entries["block_count"] > len(header.tensors):
        held = f"{len(header.tensors):,} tensors"
        raise damaged_gguf(header.path, f"block_count is {entries['block_count']:,}, and it holds {held}")
    ignored = [
        f"{key} ({value})"
        for key, value in sorted(entries.items())
        if key not in row.entries and key not in SILENT and value not in (0, "", "none")
    ]
    if entries.get("attention.causal") is False:
        ignored.append("attention.causal (False)")
    if ignored:
        raise UnsupportedModelError(
            f"{header.path}: eckart does not read {', '.join(ignored)} of a GGUF file, and without it the model would "
            "compute something else; give the Hugging Face model that it was converted from"
        )


def _is_size(value: Any, is_count: bool) -> bool:
    return type(value) in ((int,) if is_count else (int, float)) and 0 < value <= LARGEST


def _rotary(header: GgufHeader, row: Architecture, entries: Mapping[str, Any]) -> dict[str, Any]:
    """What a decoder with rotary positions has besides its row's entries, or where they are missing, as llama.cpp
    makes it."""
    width, heads = entries["embedding_length"], entries["attention.head_count"]
    head = entries.get("attention.key_length", width // heads)
    turned = entries.get("rope.dimension_count", head)
    values: dict[str, Any] = {
        "num_key_value_heads": entries.get("attention.head_count_kv", heads),
        "rope_theta": entries.get("rope.freq_base", ROPE_BASE),
    }
    if "attention.key_length" in row.entries:
        values["head_dim"] = head
    elif head * heads != width:
        raise UnsupportedModelError(f"{header.path}: heads of {head} are not {row.model_type}'s, of {width // heads}")
    if entries.get("attention.value_length", head) != head:
        raise UnsupportedModelError(f"{header.path}: its heads' keys are {head} wide, and its values are not")
    if turned != head:
        if row.model_type != "phi3":
            raise UnsupportedModelError(f"{header.path}: only {turned} of a head's {head} coordinates turn with places")
        values["partial_rotary_factor"] = turned / head
    if header.architecture in LARGEST_GEMMA:
        is_largest = entries["block_count"] == LARGEST_GEMMA[header.architecture]
        values["query_pre_attn_scalar"] = width // heads if is_largest else head
    scaling = _scaling(header, entries, head, values["rope_theta"])
    return values if scaling is None else {**values, "rope_scaling": scaling}


def _scaling(header: GgufHeader, entries: Mapping[str, Any], head: int, base: float) -> dict[str, Any] | None:
    """How rotary positions are stretched; None where they are not."""
    kind = entries.get("rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": float(entries.get("rope.scaling.factor", 1.0))}
    if kind != "none":
        raise UnsupportedModelError(
            f"{header.path} stretches its positions by {kind!r}, which eckart does not read of a GGUF file; give the "
            "Hugging Face model that it was converted from"
        )
    if header.architecture != "llama" or ROPE_FACTORS not in header.tensors:
        return None
    gguf = import_gguf()
    factors = torch.from_numpy(_values(header, ROPE_FACTORS, _types(header, gguf)[ROPE_FACTORS])).double()
    scaling = {"rope_type": "llama3", "rope_theta": base, "factor": float(factors.max()), **LLAMA_3}
    llama: Any = CONFIG_MAPPING["llama"]
    config = llama(head_dim=head, rope_parameters=scaling)
    frequencies = base ** -(torch.arange(0, head, 2).double() / head) / factors
    if not torch.allclose(ROPE_INIT_FUNCTIONS["llama3"](config)[0].double(), frequencies, rtol=1e-4, atol=0):
        raise UnsupportedModelError(
            f"{header.path}: its {ROPE_FACTORS} stretches positions otherwise than Llama 3 does; give the Hugging Face "
            "model that it was converted from"
        )
    return scaling


def _types(header: GgufHeader, gguf: ModuleType) -> dict[str, Any]:
    """{tensor: its type}, and every tensor is whole.

    Raises:
        UnsupportedModelError: a type that the package does not know.
        CheckpointError: the file is cut short, or a row is not made of whole blocks.
    """
    types = {}
    for name, tensor in header.tensors.items():
        try:
            types[name] = kind = gguf.GGMLQuantizationType(tensor.type)
        except ValueError as error:
            raise UnsupportedModelError(
                f"{header.path}: {name} is of a type that gguf does not know ({error}); is a newer gguf needed?"
            ) from error
        block, size = gguf.GGML_QUANT_SIZES[kind]
        if tensor.shape[-1] % block or min(tensor.shape) < 1:
            raise damaged_gguf(header.path, f"{name} has shape {tensor.shape}, in blocks of {block}")
        end = tensor.begin + int(np.prod(tensor.shape, dtype=object)) // block * size
        if end > header.size:
            raise damaged_gguf(header.path, f"{name} ends at byte {end:,}, and the file has {header.size:,}")
    return types


def _check_names(header: GgufHeader, model: PreTrainedModel, places: Mapping[str, str]) -> None:
    """Raises CheckpointError where the file lacks a tensor of the model, or has one that the model has no place for."""
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    given = {places[name] for name in header.tensors if name in places}
    missing = [name for name, _ in model.named_parameters() if name not in given and name not in tied]
    used = {ROPE_FACTORS} if header.architecture == "llama" else set()
    complaints = [f"missing tensor {name}" for name in missing]
    complaints += [f"unknown tensor {name}" for name in sorted(header.tensors.keys() - places.keys() - used)]
    refuse(str(header.path), complaints, f"the {type(model).__name__} that its metadata describe")


def _read(
    header: GgufHeader, types: Mapping[str, Any], processor: TensorProcessor, places: Mapping[str, str]
) -> Iterator[tuple[str, Tensor]]:
    """(name in the model, tensor) of each, in float32 and in transformers' layout."""
    for name in header.tensors.keys() & places.keys():
        apart: dict[str, Any] = {"tensors": {}}  # where a processor puts what it has named itself
        given = {"tensor_key_mapping": places, "parsed_parameters": apart}
        result = processor.process(weights=_values(header, name, types[name]), name=name, **given)
        if result.name is not None:
            apart["tensors"][places[result.name]] = torch.from_numpy(np.ascontiguousarray(result.weights))
        yield from apart["tensors"].items()


def _values(header: GgufHeader, name: str, kind: Any) -> np.ndarray:
    """A tensor's numbers, multiplied out, in float32."""
    gguf, tensor = import_gguf(), header.tensors[name]
    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (*tensor.shape[:-1], tensor.shape[-1] // block * size)
    data = np.fromfile(header.path, np.uint8, int(np.prod(shape)), offset=tensor.begin).reshape(shape)
    try:
        return np.asarray(gguf.dequantize(data, kind), dtype=np.float32)
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"{header.path}: {name} is of the type {kind.name}, which gguf does not multiply out; is a newer gguf "
            "needed?"
        ) from error
