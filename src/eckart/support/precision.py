"""Precision: what a model has in half precision, in float32 for a while."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

HALF = (torch.float16, torch.bfloat16)


@contextmanager
def in_float32(module: nn.Module, types: Collection[torch.dtype] = HALF) -> Iterator[torch.dtype]:
    """Inside, what a module has in one of `types` is in float32; gives the type of its inputs then. Rounded back after.

    Tensors that are float32 beside it, such as rotary tables and the norms of some models, stay what they are. What
    nobody changes meanwhile comes back bit for bit. Memory: that of the module twice over.
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
