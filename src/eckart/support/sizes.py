"""Sizes: what a model stores, in numbers and in bytes."""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


def num_params(model: nn.Module) -> int:
    """Numbers that the model stores, tied tensors once; a quantised weight counts the numbers that it represents."""
    return sum(parameter.numel() for parameter in model.parameters()) + _coded(model, "coded_params")


def num_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters, tied tensors once; a quantised weight counts its codes and scales."""
    return sum(tensor_bytes(parameter) for parameter in model.parameters()) + _coded(model, "coded_bytes")


def _coded(model: nn.Module, what: str) -> int:
    """The sum of what modules say that keep numbers in buffers, as codes and scales."""
    return sum(getattr(module, what, 0) for module in model.modules())


def tensor_bytes(tensor: Tensor) -> int:
    """Bytes that a tensor holds; one that wraps others, as quantised weights do, holds what they hold."""
    if is_traceable_wrapper_subclass(tensor):
        inner, _ = tensor.__tensor_flatten__()
        return sum(tensor_bytes(getattr(tensor, name)) for name in inner)
    return tensor.numel() * tensor.element_size()
