"""Fingerprint: a model by its configuration and weights, so that results kept for it are not taken for another's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel

# Keys of a configuration that say where a model came from, and not what it computes.
VOLATILE = ("_name_or_path", "transformers_version", "quantization_config")
# Numbers of each tensor that a sketch reads.
LOOKED_AT = 8


def describe_architecture(model: PreTrainedModel) -> dict[str, Any]:
    """{"model": class, "config": configuration} without what names its origin; plain data but for odd values."""
    configuration = model.config.to_dict()
    for key in VOLATILE:
        configuration.pop(key, None)
    return {"model": type(model).__name__, "config": configuration}


def hash_weights(update: Callable[[Any], None], model: PreTrainedModel) -> None:
    """Feed every tensor of the model, by name, type, shape and value, to a hash.

    Args:
        update: of an object of `hashlib`, which is changed in place.

    Cost: one read of the model's weights.
    """
    for name, tensor in sorted(model.state_dict().items()):
        _hash_tensor(update, name, tensor)


def sketch(model: PreTrainedModel) -> str:
    """A digest of every tensor's name, type and shape, and of a few numbers of each.

    It costs next to nothing and tells one model from another, but not from the same with a number changed by hand.
    """
    state = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().flatten() if tensor.is_contiguous() else tensor.detach().mT.flatten()
        state.update(str(flat[:: max(1, len(flat) // LOOKED_AT)].tolist()).encode())
    return state.hexdigest()[:32]


def _hash_tensor(update: Callable[[Any], None], name: str, tensor: torch.Tensor) -> None:
    update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    if hasattr(tensor, "__tensor_flatten__"):  # quantised: several plain tensors that stand for one
        for part in tensor.__tensor_flatten__()[0]:
            _hash_tensor(update, f"{name}.{part}", getattr(tensor, part))
        return
    update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
