"""Refusals: what is no model that can be taken, said in one sentence before any weight is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES

from eckart.models.adapters import ADAPTER
from eckart.models.families import UnsupportedModelError
from eckart.models.gguf_header import gguf_file
from eckart.models.registration import QUANT_METHOD
from eckart.models.weight_files import CONFIG
from eckart.support.plain_data import read_json

UNTRUSTED = (
    "its files bring code of their own, which runs only where you allow it: read it, then give --trust-remote-code "
    "(in Python trust_remote_code=True)"
)


def check_source(path: str | Path, *, trust_remote_code: bool = False) -> None:
    """Refuse what stands at `path` where it is no model that transformers has a class for.

    Args:
        path: a directory, or a name on the hub, of which only the configuration is asked for.
        trust_remote_code: a class in the model's own files will do.

    Raises:
        UnsupportedModelError: a file instead of a directory, a GGUF file or an adapter (`loading.load_model` takes
            both, and they are no checkpoint), a model that needs code of its own, or of a type that this transformers
            does not know.
    """
    place = Path(path)
    made_of = "a GGUF file" if gguf_file(path) is not None else "an adapter" if (place / ADAPTER).is_file() else None
    if made_of is not None:
        raise UnsupportedModelError(
            f"{path} is {made_of}, of which a model is made in memory, and no checkpoint whose blocks can be read "
            f"one by one: `eckart export {path} DENSE --dense` writes one, give that"
        )
    if place.is_file():
        raise UnsupportedModelError(f"{path} is a file; give the directory of a Hugging Face model, or a .gguf file")
    config = raw_config(path)
    if config and not trust_remote_code:
        _check_code(config, path)


def raw_config(path: str | Path) -> dict[str, Any]:
    """What config.json says; nothing where it cannot be had, which the loader then reports."""
    if Path(path).is_dir():
        return _read(Path(path) / CONFIG)
    try:
        return PreTrainedConfig.get_config_dict(path)[0]
    except (OSError, ValueError):
        return {}


def _read(file: Path) -> dict[str, Any]:
    try:
        return read_json(file)
    except (OSError, ValueError):
        return {}


def _check_code(config: dict[str, Any], path: str | Path) -> None:
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    named = architectures[0] if isinstance(architectures, list) and architectures else None
    known = not isinstance(kind, str) or kind in CONFIG_MAPPING
    if known and (named is None or hasattr(transformers, str(named))):
        return
    if config.get("auto_map"):
        raise UnsupportedModelError(
            f"{path} is a {named or kind}, which transformers lacks: {UNTRUSTED}; or give a model of a class that "
            "transformers has"
        )
    if not known:
        raise UnsupportedModelError(
            f"{path}: its model_type {kind!r} is not known to transformers {transformers.__version__}; is a newer one "
            "needed?"
        )


def check_architecture(config: PreTrainedConfig, path: str | Path) -> None:
    """Raises UnsupportedModelError where a configuration does not say which class its weights are of."""
    named = config.architectures
    if isinstance(named, list) and named and all(isinstance(name, str) for name in named):
        return
    kind = config.model_type
    guess = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) or MODEL_FOR_MASKED_LM_MAPPING_NAMES.get(kind)
    example = f', such as "architectures": ["{guess}"]' if isinstance(guess, str) else ""
    raise UnsupportedModelError(
        f"{path}: its {CONFIG} names no architectures, so which class of transformers its weights are of is not known; "
        f"add the class that they were saved from{example}"
    )


def check_quantised(config: PreTrainedConfig, name: str | Path) -> None:
    """Raises UnsupportedModelError for a model that is quantised, or compressed by eckart.

    Args:
        name: of the model, for the message.
    """
    method = quantised_by(config)
    if method is None:
        return
    if method == QUANT_METHOD:
        raise UnsupportedModelError(f"{name} is low-rank already; start from the dense model, or export it first")
    raise UnsupportedModelError(
        f"{name} is quantised, by {method}: its linears are no matrices of floats that could be factored; give the "
        "model that it was quantised from"
    )


def quantised_by(config: PreTrainedConfig) -> str | None:
    """transformers' name of what a model's weights are quantised by, "eckart" included; None where they are not."""
    section: Any = getattr(config, "quantization_config", None)
    if section is None:
        return None
    given = section.get if isinstance(section, dict) else lambda key: getattr(section, key, None)
    guess = "bitsandbytes" if given("load_in_4bit") or given("load_in_8bit") else "an unnamed method"
    method = given("quant_method") or guess
    return str(getattr(method, "value", method))


def check_object(model: Any) -> None:
    """Refuse what is no transformers model by itself, or one with an adapter or quantised weights in it.

    Raises:
        UnsupportedModelError: it is so; says what to give instead.
    """
    kind = type(model).__name__
    if hasattr(model, "peft_config") or getattr(model, "_hf_peft_config_loaded", False):
        raise UnsupportedModelError(
            f"the {kind} holds adapters of PEFT around its linears: merge them, model = model.merge_and_unload() of a "
            "PeftModel, or compress first and put adapters on the result"
        )
    if not isinstance(getattr(model, "base_model", None), PreTrainedModel):
        inside = next((name for name in ("module", "_orig_mod") if hasattr(model, name)), None)
        hint = f"; give the model inside it, its .{inside}" if inside else ""
        raise UnsupportedModelError(f"a {kind} is no model of transformers (PreTrainedModel){hint}")
    section: Any = getattr(model.config, "quantization_config", None)
    if getattr(section, "quant_method", None) != QUANT_METHOD:  # of ours, the linears tell
        check_quantised(model.config, f"the {kind}")
