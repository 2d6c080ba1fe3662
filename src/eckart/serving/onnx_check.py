"""Whether ONNX Runtime computes what the model does."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.models.families import UnsupportedModelError
from eckart.serving.onnx_decoder import MODEL
from eckart.serving.onnx_graph import Signature, as_function


@torch.no_grad()
def difference_of(model: PreTrainedModel, signature: Signature, folder: Path) -> float:
    """The largest difference of ONNX Runtime's logits from the model's, over the largest of them.

    Compared are a prompt of two rows, one of them padded on the left, a token behind it, and a prompt of one row.

    Args:
        folder: with the graph.

    Returns:
        infinity where an output has another shape, or is not a number.

    Raises:
        UnsupportedModelError: ONNX Runtime cannot run it.

    Cost: the model a second time in memory, as ONNX Runtime's.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    function, largest = as_function(model, signature), 0.0
    try:
        session = onnxruntime.InferenceSession(str(folder / MODEL), providers=["CPUExecutionProvider"])
        known = {given.name for given in session.get_inputs()}
        for inputs, past in _cases(model, signature, function):
            expected = function(inputs, past)
            tensors = {**inputs, **dict(zip(signature.past_names, past, strict=True))}
            given = {key: value.numpy() for key, value in tensors.items() if key in known}
            largest = max(largest, _difference(session.run(None, given), expected, inputs))
    except (state.Fail, state.NotImplemented, state.InvalidGraph, state.RuntimeException, state.InvalidArgument) as why:
        raise UnsupportedModelError(
            f"ONNX Runtime cannot run {type(model).__name__}: {str(why).splitlines()[0]}"
        ) from why
    return largest


def _cases(
    model: PreTrainedModel, signature: Signature, function: Any
) -> Iterator[tuple[dict[str, Tensor], list[Tensor]]]:
    """Inputs and caches: random tokens, from a generator of their own."""
    words = model.config.get_text_config().vocab_size
    random = torch.Generator().manual_seed(0)

    def tokens(rows: int, length: int) -> Tensor:
        return torch.randint(words, (rows, length), generator=random)

    def inputs(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        made = {"input_ids": ids, "attention_mask": mask}
        if "position_ids" in signature.inputs:
            made["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if "token_type_ids" in signature.inputs:
            made["token_type_ids"] = torch.zeros_like(ids)
        return made

    none = [torch.zeros(2, heads, 0, width, dtype=model.dtype) for heads, width in signature.past]
    mask = torch.ones(2, 7, dtype=torch.long)
    mask[0, :2] = 0
    prompt = inputs(tokens(2, 7), mask)
    yield prompt, none
    if signature.past:
        past = list(function(prompt, none)[1:])
        yield inputs(tokens(2, 1), torch.cat([mask, mask.new_ones(2, 1)], 1)), past
    yield inputs(tokens(1, 11), torch.ones(1, 11, dtype=torch.long)), [each[:1] for each in none]


def _difference(got: list[np.ndarray[Any, Any]], expected: tuple[Tensor, ...], inputs: dict[str, Tensor]) -> float:
    """Of the first output, the others have to have the shapes; what is computed at padding is nobody's."""
    if [each.shape for each in got] != [tuple(each.shape) for each in expected]:
        return math.inf
    there = inputs["attention_mask"][:, -inputs["input_ids"].shape[1] :].bool()
    one, other = torch.from_numpy(got[0]).float(), expected[0].float()
    if one.shape[:2] == there.shape:
        one, other = one[there], other[there]
    difference = float((one - other).abs().max() / other.abs().max().clamp(min=1e-30))
    return difference if math.isfinite(difference) else math.inf
