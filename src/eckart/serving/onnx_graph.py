"""The ONNX graph of a model: which inputs and outputs it has, and the making of it by torch's exporter.

A decoder with its cache, N counting the blocks from 0, batch B, L new tokens behind P that the cache holds:

    input_ids, position_ids (B, L); attention_mask (B, P + L); past_key_values.N.key, .value (B, heads, P, width)
    -> logits (B, L, vocabulary); present.N.key, .value (B, heads, P + L, width)

These are the names of optimum and of onnxruntime-genai. P is 0 for a prompt. A model without a use for `position_ids`
has no such input. Padding is on the left, so that the last position is the newest token of every row.
Other models: input_ids, attention_mask (B, L), where they read them token_type_ids too -> logits, or last_hidden_state
of a model without a head.
"""

from __future__ import annotations

import inspect
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from eckart.models.experts import opened_experts
from eckart.models.families import UnsupportedModelError
from eckart.support.quiet import quiet

# Of the example that is traced: all different, and none 0 or 1, which torch takes for fixed.
BATCH, NEW, HELD = 2, 3, 4
# Who talks while a graph is made: of packages that are not installed, and of the names of axes.
TALKATIVE = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class Signature:
    """What goes into the graph and comes out of it.

    Attributes:
        inputs: names of the integer inputs, in order.
        past: (heads, width) of keys and of values, block by block: keys, values, keys, ...; empty without a cache.
        output: "logits" or "last_hidden_state".
    """

    inputs: tuple[str, ...]
    past: tuple[tuple[int, int], ...]
    output: str

    @property
    def past_names(self) -> tuple[str, ...]:
        return _cache_names("past_key_values", len(self.past))

    @property
    def present_names(self) -> tuple[str, ...]:
        return _cache_names("present", len(self.past))


def _cache_names(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}.{block}.{what}" for block in range(count // 2) for what in ("key", "value"))


class CachedDecoder(nn.Module):
    """(inputs, past) -> (logits, present): a decoder with its cache as tensors.

    The cache holds all tokens in blocks with a sliding window too: then it has one length, and masks are made for it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: dict[str, Tensor], past: list[Tensor]) -> tuple[Tensor, ...]:
        cache = DynamicCache()
        for block, (keys, values) in enumerate(zip(past[::2], past[1::2], strict=True)):
            cache.update(keys, values, block)
        output = self.model(**inputs, past_key_values=cache, use_cache=True)
        layers: Any = cache.layers
        return (output.logits, *(each for layer in layers for each in (layer.keys, layer.values)))


class OnePass(nn.Module):
    """(inputs, []) -> (logits or hidden states,): a model without a cache."""

    def __init__(self, model: PreTrainedModel, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output
        self.switches = {"use_cache": False} if "use_cache" in _parameters(model) else {}

    def forward(self, inputs: dict[str, Tensor], past: list[Tensor]) -> tuple[Tensor, ...]:
        return (getattr(self.model(**inputs, **self.switches), self.output),)


def as_function(model: PreTrainedModel, signature: Signature) -> nn.Module:
    """The model as a function of what the graph's inputs are, (inputs, past) -> outputs, in the graph's order."""
    return (CachedDecoder(model) if signature.past else OnePass(model, signature.output)).eval()


@torch.no_grad()
def signature_of(model: PreTrainedModel) -> Signature:
    """What the graph of this model has for inputs and outputs; read off a pass of a few tokens.

    Raises:
        UnsupportedModelError: an encoder-decoder, a model of more than text, or a cache of something else than keys and
            values of every token.
    """
    name, config = type(model).__name__, model.config
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name}: encoder-decoder models are not exported to ONNX")
    if config.get_text_config() is not config:
        raise UnsupportedModelError(f"{name} reads more than text, and only its language model could be exported")
    if opened_experts(model):
        raise UnsupportedModelError(
            f"{name} is a mixture of experts: which of them run depends on the text, and a graph runs all it has"
        )
    accepted = _parameters(model)
    ids = torch.zeros(BATCH, HELD, dtype=torch.long, device=model.device)
    if not model.can_generate():
        typed = "token_type_ids" in accepted and getattr(config, "type_vocab_size", 1) > 1
        inputs = ("input_ids", "attention_mask", *(("token_type_ids",) if typed else ()))
        given = {name: torch.ones_like(ids) if name == "attention_mask" else ids for name in inputs}
        output = model(**given)
        return Signature(inputs, (), "logits" if "logits" in output else "last_hidden_state")
    strange = [
        type(layer).__name__
        for layer in DynamicCache(config=config).layers
        if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer)
    ]
    if strange or "past_key_values" not in accepted:
        raise UnsupportedModelError(
            f"{name} keeps {strange[0] if strange else 'a state of its own'}, and only keys and values of every token "
            "can be exported to ONNX"
        )
    cache = DynamicCache()
    model(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: Any = cache.layers
    past = tuple((each.shape[1], each.shape[3]) for layer in layers for each in (layer.keys, layer.values))
    inputs = ("input_ids", "attention_mask", *(("position_ids",) if "position_ids" in accepted else ()))
    return Signature(inputs, past, "logits")


def _parameters(model: PreTrainedModel) -> frozenset[str]:
    return frozenset(inspect.signature(model.forward).parameters)


@torch.no_grad()
def trace(model: PreTrainedModel, signature: Signature, file: Path, *, tied: bool) -> None:
    """Write the graph of a model, and its numbers into a second file next to it, of the same name with `.data`.

    Args:
        tied: store numbers once that are both an embedding and the head. ONNX Runtime transposes them when it loads.

    Raises:
        UnsupportedModelError: torch's exporter cannot, for one reason that it gives.
    """
    import onnx_ir

    given, past, sizes = _example(model, signature)
    try:
        with warnings.catch_warnings(), quiet(*TALKATIVE):
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                as_function(model, signature),
                (given, past),
                dynamo=True,
                input_names=[*signature.inputs, *signature.past_names],
                output_names=[signature.output, *signature.present_names],
                dynamic_shapes=sizes,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        cause = error.__cause__ or error
        raise UnsupportedModelError(
            f"torch.onnx cannot export {type(model).__name__}: {str(cause).strip().splitlines()[0]}"
        ) from error
    assert program is not None
    if tied:
        _store_once(program.model.graph)
    _forget_origins(program.model)
    onnx_ir.save(program.model, file, external_data=f"{file.name}.data")


def _example(model: PreTrainedModel, signature: Signature) -> tuple[dict[str, Tensor], list[Tensor], Any]:
    """Inputs to trace with, and the names of their axes that may have any size."""
    held = HELD if signature.past else 0
    lengths = {name: held + NEW if name == "attention_mask" else NEW for name in signature.inputs}
    given = {name: torch.ones(BATCH, length, dtype=torch.long) for name, length in lengths.items()}
    if "position_ids" in given:
        given["position_ids"] = torch.arange(held, held + NEW).repeat(BATCH, 1)
    past = [torch.zeros(BATCH, heads, held, width, dtype=model.dtype) for heads, width in signature.past]
    longer = "total_sequence_length" if signature.past else "sequence_length"
    sizes = (
        {name: {0: "batch_size", 1: longer if name == "attention_mask" else "sequence_length"} for name in given},
        [{0: "batch_size", 2: "past_sequence_length"} for _ in past],
    )
    return given, past, sizes


def _forget_origins(model: Any) -> None:
    """Take out, in place, where in whose files each operation was written: most of the graph's size."""
    for part in (model, model.graph, *model.graph.all_nodes(), *model.functions.values()):
        part.metadata_props.clear()
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()


def _store_once(graph: Any) -> None:
    """Make a head out of the embedding that it is tied to, in place: the exporter stores it again, transposed."""
    import onnx_ir

    embeddings = [
        node.inputs[0] for node in graph if node.op_type == "Gather" and node.inputs[0].const_value is not None
    ]
    for node in [node for node in graph if node.op_type == "MatMul" and node.inputs[1].const_value is not None]:
        head = node.inputs[1]
        for embedding in embeddings:
            if _is_transposed(head.const_value, embedding.const_value):
                transposed = onnx_ir.node("Transpose", [embedding], {"perm": [1, 0]})
                graph.insert_before(node, transposed)
                node.replace_input_with(1, transposed.outputs[0])
                if not head.uses():
                    del graph.initializers[head.name]
                break


def _is_transposed(one: Any, other: Any) -> bool:
    if tuple(one.shape) != tuple(other.shape)[::-1] or len(one.shape) != 2:
        return False
    return bool((other.numpy() == one.numpy().T).all())
