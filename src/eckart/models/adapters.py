"""Adapters: a folder of PEFT's with a low-rank change of a base model, merged into that model, or written."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.lowrank import Factors
from eckart.models.coded import CodedLinear, CompressedLinear
from eckart.models.families import UnsupportedModelError, is_linear
from eckart.models.weight_files import CheckpointError, damaged, some_of
from eckart.support.extras import import_extra
from eckart.support.plain_data import read_json

ADAPTER, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# PEFT's kinds that are a change of weights, so that they can be added to them; others are prompts or modules.
MERGEABLE = ("LORA", "ADALORA", "LOHA", "LOKR", "IA3")
# Entries with which the result is no model of the base's class and weights.
UNMERGEABLE = ("modules_to_save", "layer_replication", "alora_invocation_tokens")


@dataclass(frozen=True)
class Adapter:
    """An adapter: its folder, its kind in PEFT ("LORA"), and the model that it was trained on."""

    folder: Path
    kind: str
    base: str


def import_peft() -> ModuleType:
    """PEFT.

    Raises:
        ValueError: it is not installed.
    """
    return import_extra("peft", "peft", "an adapter is merged with PEFT")


def read_adapter(path: str | Path) -> Adapter | None:
    """The adapter in a folder; None where there is none.

    Raises:
        CheckpointError: its description is damaged, or names no base model.
        UnsupportedModelError: it cannot be merged.
    """
    folder, file = Path(path), Path(path) / ADAPTER
    if not file.is_file():
        return None
    try:
        settings = read_json(file)
        kind, base = settings["peft_type"], settings.get("base_model_name_or_path")
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged ({error!r}). Save or download it again") from error
    if not isinstance(kind, str):
        raise CheckpointError(f"{file} is damaged (its peft_type is {kind!r}). Save or download it again")
    if not isinstance(base, str) or not base:
        raise CheckpointError(f"{file} names no base model, base_model_name_or_path: enter where it is")
    if Path(base).is_dir() and Path(base).resolve() == folder.resolve():
        raise CheckpointError(f"{file} names its own folder as the base model: enter where the base model is")
    if kind not in MERGEABLE:
        raise UnsupportedModelError(
            f"{folder} holds an adapter of {base} of the kind {kind}, which cannot be merged into its weights; "
            f"{', '.join(MERGEABLE)} can"
        )
    more = [name for name in UNMERGEABLE if settings.get(name)]
    if more:
        raise UnsupportedModelError(
            f"{folder} holds an adapter of {base} with {more[0]} ({settings[more[0]]}), which is more than a change of "
            "its weights: merge it with PEFT, merge_and_unload(), save_pretrained() elsewhere, and give that"
        )
    if not (folder / WEIGHTS).is_file():
        raise CheckpointError(f"{folder} holds no {WEIGHTS}, so the adapter is not whole. Save or download it again")
    return Adapter(folder, kind, base)


def merge_adapter(model: PreTrainedModel, adapter: Adapter) -> PreTrainedModel:
    """The base model with the adapter's change added to its weights; the model that is given is used up.

    Raises:
        ValueError: PEFT is not installed.
        CheckpointError: the adapter's file is damaged, or is of another base model.
    """
    peft = import_peft()
    try:
        stored = load_file(adapter.folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        raise damaged(adapter.folder / WEIGHTS, error) from error
    try:
        wrapped = peft.PeftModel.from_pretrained(model, str(adapter.folder))
        _check_names(adapter, peft.get_peft_model_state_dict(wrapped), stored)
        merged: PreTrainedModel = wrapped.merge_and_unload(safe_merge=True)
    except CheckpointError:
        raise
    except (ValueError, TypeError, RuntimeError, LookupError, AttributeError, NotImplementedError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{adapter.folder} cannot be merged into {adapter.base}: {reason}") from error
    merged.config.name_or_path = merged.name_or_path = str(adapter.folder)
    return merged.eval()


def lora_targets(model: PreTrainedModel, names: str | Iterable[str] | None = None) -> list[str]:
    """What `peft.LoraConfig(target_modules=...)` takes for a compressed model, of the names that a dense one has.

    A low-rank linear is two linears to PEFT, and both get an adapter, so that it merges into the factors and the rank
    stays. A right factor that several linears share has one adapter, where its lender is named. Dense linears are
    themselves.

    Args:
        names: ends of the names of linears, as "q_proj"; None for those that PEFT takes of this kind of model if
            nothing is said, as by `LoraConfig()`.

    Raises:
        ValueError: PEFT is not installed or has no names of its own for this kind of model; or no linear has a name.
        UnsupportedModelError: factors in few bits, which no adapter merges into.
    """
    ends = [names] if isinstance(names, str) else _default_names(model) if names is None else list(names)
    modules = {name: module for name, module in model.named_modules() if _takes_adapter(module)}
    chosen: dict[str, None] = {}
    for end in ends:
        matched = [name for name in modules if name == end or name.endswith(f".{end}")]
        if not matched:
            roles = sorted({name.rsplit(".", 1)[-1] for name in modules} - {"left", "right"})
            raise ValueError(f"no linear of the {type(model).__name__} is named {end!r}; there are {', '.join(roles)}")
        for name in matched:
            chosen |= dict.fromkeys(_factors_of(name, modules[name]))
    return list(chosen)


def _default_names(model: PreTrainedModel) -> list[str]:
    table = import_extra(
        "peft.utils", "peft", "the default names are PEFT's"
    ).TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    names = table.get(model.config.model_type)
    if names is None or isinstance(names, str):
        raise ValueError(f"PEFT has no list of names for a {model.config.model_type}: give names, such as ['q_proj']")
    return list(names)


def _takes_adapter(module: nn.Module) -> bool:
    return isinstance(module, CompressedLinear) or is_linear(module)


def _factors_of(name: str, module: nn.Module) -> list[str]:
    """The linears with numbers of their own that stand for a linear."""
    if not isinstance(module, CompressedLinear):
        return [name]
    sides = dict(module.named_children())
    factors = [side for side in ("right", "left") if isinstance(sides.get(side), nn.Linear)]
    if isinstance(module, CodedLinear) and not factors:
        raise UnsupportedModelError(
            f"{name} keeps its numbers in few bits ({module.storage}), which an adapter does not merge into: compress "
            "without bits, or put the adapter on a dense export"
        )
    return [f"{name}.{side}" for side in factors if cast(nn.Linear, sides[side]).weight.numel()]


def write_lora(folder: Path, model: PreTrainedModel, factors: Mapping[str, Factors], base: str) -> None:
    """Write low-rank corrections as an adapter of PEFT's, LoRA with A = right and B = left at scaling 1, into `folder`.

    The adapter's r and lora_alpha are the largest rank; where ranks differ, rank_pattern and alpha_pattern have those
    of the linears that have less, so that the scaling is 1 for those who read the patterns and for those who do not.

    Args:
        model: of the base model's classes and sizes; its numbers are not read.
        factors: {name of a linear: factors as they are stored, without a bias}.
        base: the model to put the adapter on, as adapter_config.json names it.

    Raises:
        ValueError: PEFT is not installed.
    """
    peft = import_peft()
    largest = max(each.rank for each in factors.values())
    lesser = {name: each.rank for name, each in factors.items() if each.rank != largest}
    config = peft.LoraConfig(
        r=largest,
        lora_alpha=largest,
        target_modules=list(factors),
        rank_pattern=lesser,
        alpha_pattern=dict(lesser),
        fan_in_fan_out=any(isinstance(model.get_submodule(name), Conv1D) for name in factors),
        task_type=_task_of(model),
        inference_mode=True,
    )
    with torch.device("meta"):
        skeleton = type(model)(copy.deepcopy(model.config))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads what transformers is about to rename
        wrapped = peft.get_peft_model(skeleton, config)
    for name, each in factors.items():
        layer = wrapped.get_base_model().get_submodule(name)
        for side, matrix in ((layer.lora_A, each.right), (layer.lora_B, each.left)):
            (adapter,) = side
            side[adapter].weight = nn.Parameter(matrix.detach().cpu().contiguous(), requires_grad=False)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    settings = read_json(folder / ADAPTER)
    settings |= {"base_model_name_or_path": base, "target_modules": sorted(settings["target_modules"])}
    (folder / ADAPTER).write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _task_of(model: PreTrainedModel) -> str | None:
    """What PEFT is to take a model for, so that its own class passes on what the model is called with.

    None, which passes on everything, of a model of sound: PEFT's class for encoder-decoders demands tokens.
    """
    if not model.can_generate():
        return None
    if not getattr(model.config, "is_encoder_decoder", False):
        return "CAUSAL_LM"
    return "SEQ_2_SEQ_LM" if model.main_input_name == "input_ids" else None


def _check_names(adapter: Adapter, expected: dict[str, Any], stored: dict[str, Any]) -> None:
    """Raises CheckpointError unless the file has the adapter's tensors: PEFT leaves at random what it lacks."""
    complaints = [f"missing tensor {name}" for name in sorted(expected.keys() - stored.keys())]
    complaints += [f"unknown tensor {name}" for name in sorted(stored.keys() - expected.keys())]
    if complaints:
        raise CheckpointError(
            f"{adapter.folder / WEIGHTS} does not hold the {adapter.kind} adapter of {adapter.base} that its {ADAPTER} "
            f"describes: {some_of(complaints)}. Save or download it again"
        )
