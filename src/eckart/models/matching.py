"""Matching: whether weights files hold the model that a class builds from its configuration.

transformers fills what the files lack with random numbers, leaves out what the class has no place for, and warns at
most. Here each of these is an error, but for what changes nothing that the model computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from eckart.models.weight_files import CheckpointError, Stored, some_of

# Tables that older releases stored and that every class makes anew: rotary frequencies, positions, causal masks
# (`attn.bias` of GPT-2's relatives; a projection's own bias has the projection's name), and a library's notes.
TABLES = re.compile(
    r"(^|\.)(original_inv_freq|inv_freq|cos_cached|sin_cached|position_ids|token_type_ids|masked_bias|causal_mask"
    r"|relative_position_index|_extra_state)$|(^|\.)(attn|attention)\.bias$"
)
# Entries of a configuration that say how many modules there are, and how many of a kind a model has at most: a larger
# number has to have as many tensors in the files.
COUNTS = re.compile(r"(^|_)(layers?|experts|groups|blocks)$")
MOST = 1024


def check_counts(config: PreTrainedConfig, tensors: int | None) -> None:
    """Refuse a configuration with more modules than there can be, before a model of that size is built.

    Args:
        tensors: in the files; None where that is not known.

    Raises:
        CheckpointError: it has; the message names the entry.
    """
    for name, count in _counts(config.to_dict()):
        if count > max(MOST, tensors or 0):
            held = "" if tensors is None else f", and the files hold {tensors:,} tensors"
            raise CheckpointError(f"config.json says {name}: {count:,}{held}. Save or download it again")


def _counts(section: Mapping[str, Any], place: str = "") -> Iterable[tuple[str, int]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _counts(value, f"{place}{key}.")
        elif type(value) is int and COUNTS.search(str(key)):
            yield f"{place}{key}", value


def is_head(model: PreTrainedModel, name: str) -> bool:
    """Whether a tensor is of a head: outside the base model, or the pooler that only some heads use."""
    prefix = f"{model.base_model_prefix}."
    is_base = model.base_model is model
    return name.removeprefix(prefix).startswith("pooler.") or not (is_base or name.startswith(prefix))


def made_anew(model: PreTrainedModel) -> set[str]:
    """Parameters that the class computes by itself and never saves, such as Marian's tables of positions."""
    never = model._keys_to_ignore_on_save or ()  # noqa: SLF001 (nothing public says it)
    return {*never} & {name for name, _ in model.named_parameters()}


def without_place(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """Of tensors that the class has no place for, those of a part that it has: what it computes is not what was stored.

    That is so in a list of modules (a further block, a bias inside one), and in a module with numbers of its own (the
    head's bias). Not so of what the class leaves out as a whole: another head, a pooler, a tower for images; nor of
    tables that it makes anew.

    Args:
        names: with or without the base model's prefix.
    """
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."

    def belongs(name: str) -> bool:
        steps = name.split(".")
        lists = (at for at, step in enumerate(steps) if step.isdigit())
        if any(isinstance(modules.get(".".join(steps[:at])), nn.ModuleList) for at in lists):
            return True
        holder = modules.get(".".join(steps[:-1])) if len(steps) > 1 else None
        return holder is not None and any(True for _ in holder.parameters(recurse=False))

    return [
        name
        for name in names
        if not TABLES.search(name) and any(map(belongs, (name, name.removeprefix(prefix), prefix + name)))
    ]


def complaints_about(
    model: PreTrainedModel,
    info: Mapping[str, Collection[Any]],
    *,
    may_be_new: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """What is wrong with files for a model, by transformers' report of loading them (`output_loading_info`).

    The report leaves out what transformers knows to be harmless: tied weights, buffers that are not stored, and the
    class's own `_keys_to_ignore_on_load_...`.

    Args:
        may_be_new: whether the files need not have this tensor.
    """
    missing = [name for name in info["missing_keys"] if not (may_be_new(name) or TABLES.search(name))]
    unknown = without_place(model, info["unexpected_keys"])
    misshaped = {name: f"{name} has shape {tuple(s)}, expected {tuple(e)}" for name, s, e in info["mismatched_keys"]}
    return [
        *(f"missing tensor {name}" for name in sorted(missing)),
        *(f"unknown tensor {name}" for name in sorted(unknown)),
        *(misshaped[name] for name in sorted(misshaped)),
    ]


def wrong_types(expected: Mapping[str, Tensor], stored: Mapping[str, Stored]) -> list[str]:
    """What is wrong with the types of tensors: integers or truth values where the model computes with floats, and
    floats where it counts.

    Args:
        expected, stored: by the same names.
    """
    return [
        f"{name} is stored as {stored[name].type}, expected {'a float type' if floats else 'integers'}"
        for name in sorted(expected.keys() & stored.keys())
        for floats in [expected[name].is_floating_point()]
        if stored[name].is_float != floats and expected[name].dtype != torch.bool
    ]


def check_finite(where: str, parameters: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse numbers that are not finite, of whatever part of a model: its answers are not finite sooner or later.

    Args:
        where: the model is, for the message.
        parameters: names and tensors; those on the meta device have no numbers.

    Raises:
        CheckpointError: one has; the message names it.

    Cost: one pass over the tensors, and a quarter of the largest one's memory in float32.
    """
    for name, tensor in parameters:
        if tensor.device.type != "meta" and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{where}: {name} has numbers that are not finite. Save or download it again; training that diverged "
                "leaves such numbers, and so does a type too narrow for the model"
            )


def refuse(where: str, complaints: list[str], what: str) -> None:
    """Raises CheckpointError where there are complaints, one message with all of them."""
    if complaints:
        raise CheckpointError(f"{where} does not hold {what}: {some_of(complaints)}. Save or download it again")


def stored_names(model: PreTrainedModel, keys: Iterable[str]) -> dict[str, str]:
    """{name of a tensor in the model, without the base model's prefix: the key that it is stored under}."""
    prefix = f"{model.base_model_prefix}."
    # Releases rename tensors ("embed_out" is "lm_head" today, "gamma" is "weight"); the stock loader's table says how.
    renamings = [t for t in get_model_conversion_mapping(model) if isinstance(t, WeightRenaming)]
    names: dict[str, str] = {}
    for key in keys:
        name = key
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        names[name.removeprefix(prefix)] = key
    return names
