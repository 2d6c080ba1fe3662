"""Fingerprint: a model by its configuration and weights, so that results kept for it are not taken for another's."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

# Keys of a configuration that say where a model came from, and not what it computes.
VOLATILE = ("_name_or_path", "transformers_version", "quantization_config")
# Numbers of each tensor that a sketch reads.
LOOKED_AT = 8


class Hash(Protocol):
    """A hash object of `hashlib`."""

    def update(self, data: Any, /) -> None: ...


def describe_architecture(model: PreTrainedModel) -> dict[str, Any]:
    """{"model": class, "config": configuration} without what names its origin; plain data but for odd values."""
    configuration = model.config.to_dict()
    for key in VOLATILE:
        configuration.pop(key, None)
    return {"model": type(model).__name__, "config": configuration}


def hash_weights(state: Hash, model: PreTrainedModel) -> None:
    """Feed every tensor of the model, by name, type, shape and value, to `state`, in place.

    Cost: one read of the model's weights.
    """
    for name, tensor in sorted(model.state_dict().items()):
        _hash_tensor(state, name, tensor)


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


def _hash_tensor(state: Hash, name: str, tensor: torch.Tensor) -> None:
    state.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    if hasattr(tensor, "__tensor_flatten__"):  # quantised: several plain tensors in one
        for part in tensor.__tensor_flatten__()[0]:
            _hash_tensor(state, f"{name}.{part}", getattr(tensor, part))
        return
    state.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
