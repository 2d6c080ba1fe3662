"""Precision: a model's half-precision tensors in float32 for a while."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def in_float32(module: nn.Module, types: Collection[torch.dtype] = HALF) -> Iterator[torch.dtype]:
    """Inside, a module's tensors of `types` are in float32; yields the type of its inputs. Rounded back after.

    Tensors that are float32 already, such as rotary tables and the norms of some models, stay as they are. Those that
    are not changed meanwhile come back bit for bit. Memory: that of the module twice over.
    """
    tensors = [*module.parameters(), *module.buffers()]
    half = [(tensor, tensor.dtype) for tensor in tensors if tensor.dtype in types]
    for tensor, _ in half:
        tensor.data = tensor.data.float()
    try:
        yield torch.float32 if half else tensors[0].dtype
    finally:
        for tensor, dtype in half:
            tensor.data = tensor.data.to(dtype)
