"""The Hugging Face face: a compressed model is a checkpoint that stock `from_pretrained` builds and loads.

transformers calls a plug-in for stored weight formats a "quantizer"; importing this file registers ours. `config.json`
then carries, under `quantization_config`, a format number and the rank map; the loader builds the model empty, swaps
each named linear for a LowRankLinear, checks the files against it, and loads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from eckart.models.dense import export_dense
from eckart.models.families import is_linear
from eckart.models.linear import LowRankLinear
from eckart.models.sites import low_rank_modules, read_weight, replace_module

QUANT_METHOD = "eckart"
FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint on disk does not fit its own description; the message names the tensor or the number."""


class LowRankConfig(QuantizationConfigMixin):
    """The `quantization_config` section of a compressed model's config.json.

    Attributes:
        format: number of this layout; a loader refuses a number it does not know.
        sites: {module name: {"rank": int, "bias": bool}}; every other module is as its class builds it.
        recipe: method, settings and calibration that made it; for people, not read by the loader.
    """

    def __init__(
        self,
        sites: Mapping[str, Mapping[str, Any]] | None = None,
        format: int = FORMAT,
        recipe: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if format != FORMAT:
            raise CheckpointError(
                f"checkpoint format {format!r} is not known to this eckart, which reads format {FORMAT}; "
                "install the eckart that wrote it, or a newer one"
            )
        if unknown:
            raise CheckpointError(f"unknown keys in the checkpoint's eckart section: {', '.join(sorted(unknown))}")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format = format
        for name, spec in (sites or {}).items():
            rank, bias = (spec.get("rank"), spec.get("bias")) if isinstance(spec, Mapping) else (None, None)
            if not isinstance(rank, int) or rank < 1 or not isinstance(bias, bool):
                raise CheckpointError(f"{name}: its entry {spec} is not {{'rank': a positive int, 'bias': a bool}}")
        self.sites = {name: dict(spec) for name, spec in (sites or {}).items()}
        self.recipe = dict(recipe or {})


class LowRankQuantizer(HfQuantizer):
    """What transformers calls while it builds, loads, saves and dequantises a compressed model."""

    quantization_config: LowRankConfig
    requires_calibration = True  # a dense checkpoint cannot be compressed on the fly by passing a config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        names = resolve_names(model, self.quantization_config.sites)
        for name, spec in zip(names, self.quantization_config.sites.values(), strict=True):
            dense = model.get_submodule(name)
            if not is_linear(dense):
                raise CheckpointError(
                    f"{name} is in the checkpoint's rank map but is a {type(dense).__name__}, not a linear"
                )
            weight = read_weight(dense)
            replace_module(
                model,
                name,
                LowRankLinear(
                    weight.shape[1],
                    weight.shape[0],
                    spec["rank"],
                    bias=spec["bias"],
                    device="meta",
                    dtype=weight.dtype,
                ),
            )
        files = kwargs.get("checkpoint_files") or ()
        check_files(model, names, [file for file in files if str(file).endswith(".safetensors")])
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # The factors are ordinary float tensors: half(), float() and to(dtype) are safe and so is training, and
        # transformers forbids them while this is True. `hf_quantizer` stays, so that save_pretrained writes the rank
        # map again.
        model.is_quantized = False  # type: ignore[assignment]
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """`model.dequantize()` is `export_dense`, so that what it gives can be saved; None keeps the model's type."""
        model = export_dense(model)
        return model if dtype is None else model.to(dtype)  # type: ignore[arg-type]


def register() -> None:
    """Make stock `from_pretrained` read our checkpoints. Called once, by `import eckart`."""
    if QUANT_METHOD not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(QUANT_METHOD)(LowRankConfig)
        register_quantizer(QUANT_METHOD)(LowRankQuantizer)


def describe(model: PreTrainedModel, recipe: Mapping[str, Any] | None = None) -> None:
    """Write the model's rank map into its config, in place, so that `save_pretrained` writes a loadable checkpoint."""
    sites = {
        name: {"rank": module.rank, "bias": module.bias is not None} for name, module in low_rank_modules(model).items()
    }
    config = LowRankConfig(sites=sites, recipe=recipe)
    model.config.quantization_config = config
    model.hf_quantizer = LowRankQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    model.quantization_method = QUANT_METHOD  # type: ignore[assignment]


def resolve_names(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """The saved site names as this class spells them: with or without the base model's prefix ("model.", "bert.").

    Raises:
        CheckpointError: the class has no such module.
    """
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    resolved = []
    for name in names:
        found = [n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules]
        if not found:
            raise CheckpointError(
                f"{name} is in the checkpoint's rank map but {type(model).__name__} has no such module"
            )
        resolved.append(found[0])
    return resolved


def check_files(model: PreTrainedModel, names: list[str], files: Iterable[Any]) -> None:
    """Compare the tensors on disk with what the model expects, before anything is loaded.

    transformers initialises a missing tensor at random and only warns. For a compressed model that is an error: the
    blocks must match tensor for tensor, and so must the rest when the class is the one that was saved (another class
    may bring a head of its own or leave one out).

    Raises:
        CheckpointError: a damaged file; else a missing or extra tensor or a wrong shape, one message with all of them.
    """
    prefix = f"{model.base_model_prefix}."
    # Releases rename tensors ("embed_out" is "lm_head" today, "gamma" is "weight"); the stock loader's table says how.
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    stored: dict[str, tuple[int, ...]] = {}
    for file in files:
        for key, shape in _shapes(file).items():
            for renaming in renamings:
                key = renaming.rename_source_key(key)[0]
            stored[key.removeprefix(prefix)] = shape
    if not stored:
        return  # the caller passed a state dict; the stock loader checks its shapes
    tied = {key.removeprefix(prefix) for key in getattr(model, "all_tied_weights_keys", None) or {}}
    expected = {
        key.removeprefix(prefix): tuple(value.shape)
        for key, value in model.state_dict().items()
        if key.removeprefix(prefix) not in tied
    }
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or [])
    blocks = {_block_prefix(name.removeprefix(prefix)) for name in names}

    def strict(key: str) -> bool:
        return same_class or any(key.startswith(block) for block in blocks)

    missing = {key for key in expected.keys() - stored.keys() if strict(key)}
    extra = {key for key in stored.keys() - expected.keys() - tied if strict(key)}
    complaints = [f"missing tensor {key}" for key in sorted(missing)]
    complaints += [f"unknown tensor {key}" for key in sorted(extra)]
    complaints += [
        f"{key} has shape {stored[key]}, expected {expected[key]}"
        for key in sorted(expected.keys() & stored.keys())
        if strict(key) and stored[key] != expected[key]
    ]
    if complaints:
        shown = "; ".join(complaints[:5]) + (f"; and {len(complaints) - 5} more" if len(complaints) > 5 else "")
        raise CheckpointError(f"the checkpoint does not match its rank map: {shown}. Save or download it again")


def _shapes(file: str | Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            return {key: tuple(tensors.get_slice(key).get_shape()) for key in tensors.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{file} is damaged or missing ({error}). Save or download it again") from error


def _block_prefix(name: str) -> str:
    """ "layers.3.mlp.down_proj" -> "layers.": everything under the list of blocks."""
    match = re.match(r"(.*?)\d+\.", name)
    return match[1] if match else name


register()
