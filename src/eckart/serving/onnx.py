"""ONNX: a model as a graph that ONNX Runtime runs, with a cache of keys and values, and its factors as two products.

The folder has `model.onnx`, its numbers in `model.onnx.data`, and what programs read next to them: config.json,
generation_config.json, the tokenizer's files and, where onnxruntime-genai knows the kind of model, genai_config.json.
Inputs and outputs have the names that optimum and onnxruntime-genai give them, see `serving.onnx_graph`.
"""

from __future__ import annotations

import copy
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.models.coded import CodedLinear, CodedMatrix
from eckart.models.families import UnsupportedModelError
from eckart.models.sites import low_rank_modules
from eckart.serving.genai import genai_config
from eckart.serving.onnx_check import difference_of
from eckart.serving.onnx_decoder import MODEL
from eckart.serving.onnx_graph import Signature, signature_of, trace
from eckart.support.extras import import_extra
from eckart.support.files import staged_directory, write_whole

# {type that ONNX Runtime has a processor's kernels for: how far an output may be from the model's, over its largest
# number}. Kernels round in another order, and half precision rounds coarsely.
CLOSE = {torch.float32: 1e-3, torch.float16: 5e-2}
# Weights of these are kept in 8 bits by `int8`; an embedding, which is looked up and not multiplied, is not.
PRODUCTS = ("MatMul", "Gemm")


@dataclass(frozen=True)
class OnnxExport:
    """What was written.

    Attributes:
        folder: where.
        num_bytes: of the graph and its numbers, on disk.
        cached: whether the graph has a cache of keys and values; one of an encoder or a classifier has none.
        multiplied_out: linears of few bits, whose numbers are in the graph as those that they stand for.
        difference: the largest of ONNX Runtime's logits from the model's on random tokens, over the largest logit.
    """

    folder: Path
    num_bytes: int
    cached: bool
    multiplied_out: int
    difference: float


def export_onnx(
    model: PreTrainedModel,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    int8: bool = False,
    force: bool = False,
) -> OnnxExport:
    """Write a model, dense or compressed, as a folder that ONNX Runtime runs; whole or not at all.

    A decoder gets a cache of keys and values; batch, length and what is in the cache can have any size. In blocks with
    a sliding window the cache holds everything as well, and the mask is what the window is. Others (encoders,
    classifiers) get one pass without a cache. Factors stay two products, in every layout. Linears of few bits become,
    in place, linears with the numbers that they stand for. ONNX Runtime's results are compared with the model's before
    anything is put in place; by how much those of `int8` differ is only told.

    Args:
        model: on the processor, in float32, or float16 for those who run it on a GPU.
        tokenizer: saved next to it.
        int8: keep the weights of all products, factors too, in 8 bits with a scale for each output, and let ONNX
            Runtime round inputs to 8 bits as they come. Embeddings keep their type.
        force: replace a folder that exists.

    Raises:
        ValueError: the extra is not installed; or the type is none of CLOSE's, or `int8` is asked of float16.
        UnsupportedModelError: an encoder-decoder, a model of more than text, a cache that is none of keys and values;
            or torch's exporter or ONNX Runtime cannot; or what ONNX Runtime computes is not what the model does.
        FileExistsError, OSError: as `staged_directory`.

    Cost: some three times the model in memory; seconds, and of large models minutes.
    """
    for package in ("onnx", "onnxscript", "onnxruntime"):
        import_extra(package, "onnx", "exporting to ONNX")
    dtype = next(parameter.dtype for parameter in model.parameters())
    if dtype not in CLOSE or (int8 and dtype != torch.float32):
        raise ValueError(
            f"ONNX Runtime has no kernels for {'int8 of ' if int8 else ''}{str(dtype).removeprefix('torch.')} on a "
            "processor; load the model in float32"
        )
    signature = signature_of(model)
    multiplied_out = _multiply_out(model)
    with staged_directory(out, force=force) as staging:
        if int8:
            with tempfile.TemporaryDirectory(dir=staging) as exact:
                _write_exact(model, signature, Path(exact), tied=False)
                _round_weights(Path(exact) / MODEL, staging / MODEL)
            difference = difference_of(model, signature, staging)
        else:
            difference = _write_exact(model, signature, staging, tied=True)
        _write_companions(model, signature, tokenizer, staging)
        num_bytes = sum(file.stat().st_size for file in staging.glob(f"{MODEL}*"))
    return OnnxExport(Path(out), num_bytes, bool(signature.past), multiplied_out, difference)


def _write_exact(model: PreTrainedModel, signature: Signature, folder: Path, *, tied: bool) -> float:
    """Write the graph in the model's type; gives by how much its logits differ, or refuses it where that is much."""
    trace(model, signature, folder / MODEL, tied=tied)
    difference = difference_of(model, signature, folder)
    if difference > CLOSE[model.dtype]:
        raise UnsupportedModelError(
            f"{type(model).__name__} would be exported to ONNX wrongly: ONNX Runtime's logits differ from the model's "
            f"by {difference:.1e} of the largest; use PyTorch for this model"
        )
    return difference


@torch.no_grad()
def _multiply_out(model: nn.Module) -> int:
    """Give the matrices of few bits the numbers that they stand for, in place; gives how many linears had some.

    Factors stay two of them: what is multiplied out is a code and its scale.
    """
    coded = [module for module in low_rank_modules(model).values() if isinstance(module, CodedLinear)]
    for module in coded:
        for name, part in list(module.named_children()):
            if isinstance(part, CodedMatrix):
                linear = nn.Linear(part.in_features, part.out_features, bias=False, device="meta")
                linear.weight = nn.Parameter(part.dense(module.weight.dtype))
                setattr(module, name, linear)
    return len(coded)


def _round_weights(exact: Path, out: Path) -> None:
    """Write the graph with the weights of its products in 8 bits; their inputs are rounded when they come.

    Weights use 7 of the 8: processors without instructions for such products (VNNI) add two of them in 16 bits, which
    overflow without a word where both factors use all 8. (https://onnxruntime.ai/docs/performance/model-optimizations/
    quantization.html, "reduce_range")
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    graph = onnx.load(exact, load_external_data=False)
    # It turns weights around without telling the shapes that the graph notes of them, and would stumble over those.
    weights = {weight.name for weight in graph.graph.initializer}
    noted = [value for value in graph.graph.value_info if value.name not in weights]
    del graph.graph.value_info[:]
    graph.graph.value_info.extend(noted)
    # Without this mark it asks for a pass over the graph of its own; shapes, all that it wants, are known.
    onnx.helper.set_model_props(graph, {"onnx.quant.pre_process": "onnxruntime.quant"})
    onnx.save(graph, exact)
    quantize_dynamic(
        exact,
        out,
        op_types_to_quantize=list(PRODUCTS),
        per_channel=True,
        weight_type=QuantType.QInt8,
        reduce_range=True,
        use_external_data_format=True,
    )


def _write_companions(
    model: PreTrainedModel, signature: Signature, tokenizer: PreTrainedTokenizerBase | None, folder: Path
) -> None:
    """Write what programs read next to the graph. The config is the dense model's: the graph says what is low-rank."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(model).__name__]
    config.dtype = model.dtype
    config.save_pretrained(folder)
    if signature.past:
        generation: Any = model.generation_config
        generation.save_pretrained(folder)
        settings = genai_config(config, generation, signature)
        if settings is not None:
            write_whole(folder / "genai_config.json", json.dumps(settings, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
