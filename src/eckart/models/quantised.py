"""Quantised models: weights in few bits, loaded as they run, and given back as ordinary numbers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.quantization_config import CompressedTensorsConfig

from eckart.models.adapters import ADAPTER
from eckart.models.families import UnsupportedModelError, is_linear
from eckart.models.gguf import FLOATS, gguf_type, load_gguf
from eckart.models.gguf_header import gguf_file
from eckart.models.loading import class_of, load_or_refuse, locate, read_config
from eckart.models.matching import complaints_about, refuse
from eckart.models.plain_weights import numbers_of
from eckart.models.refusals import quantised_by
from eckart.models.registration import QUANT_METHOD
from eckart.models.sites import Site, read_weight
from eckart.models.weight_files import CheckpointError, read_headers
from eckart.support.device import check_device
from eckart.support.extras import import_extra
from eckart.support.quiet import TORCHAO, quiet

# What can be corrected, in words.
READ = "a torchao or compressed-tensors checkpoint, or a quantised GGUF file"
COMPRESSED_TENSORS = "compressed-tensors"


@dataclass(frozen=True)
class Quantised:
    """A quantised model: as it runs, and in words how it is quantised ("torchao Int8WeightOnlyConfig", "GGUF Q4_K_M").

    A GGUF file and a compressed-tensors checkpoint are multiplied out when they are loaded: their linears are ordinary
    ones with the quantised numbers in them.
    """

    model: PreTrainedModel
    kind: str


def load_quantised(path: str | Path, *, device: str = "cpu", trust_remote_code: bool = False) -> Quantised:
    """The quantised model at `path`, in eval mode.

    Args:
        path: the directory of a checkpoint, a hub name, a GGUF file, or a folder with one.
        trust_remote_code: as in `loading.load_model`.

    Raises:
        UnsupportedModelError: it is not quantised, or in a way that is not read here; says what can be given.
        ValueError: there is no model, or the package that it was quantised with is not installed.
        CheckpointError: the files do not hold what the configuration describes.
    """
    check_device(device)
    path = locate(path)
    if (file := gguf_file(path)) is not None:
        kind = gguf_type(file)
        if kind in FLOATS:
            raise _not_quantised(path, f"its weights are {kind}")
        return Quantised(load_gguf(file).to(device), f"GGUF {kind}")  # type: ignore[arg-type]
    if (Path(path) / ADAPTER).is_file():
        raise UnsupportedModelError(f"{path} is an adapter, and no quantised model: give {READ}")
    with quiet(*TORCHAO, "transformers"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You passed `quantization_config`", UserWarning)  # as intended, see `given`
        config = read_config(path, trust_remote_code=trust_remote_code)
        method = quantised_by(config)
        if method is None:
            raise _not_quantised(path, "its configuration has no quantization_config")
        if method == QUANT_METHOD:
            raise _not_quantised(path, "it is low-rank, made by eckart")
        if method == "torchao":
            import_extra("torchao", "baselines", f"{path} is quantised by torchao, which loads it")
        elif method != COMPRESSED_TENSORS:
            raise UnsupportedModelError(
                f"{path} is quantised by {method}, whose weights eckart does not read; it corrects {READ}: give one of "
                "these of the same reference"
            )
        given: dict[str, Any] = {}
        if method == COMPRESSED_TENSORS:
            given["quantization_config"] = CompressedTensorsConfig(dequantize=True)
        model_class: Any = class_of(config, path, trust_remote_code=trust_remote_code)
        try:
            model, info = load_or_refuse(
                f"the model {path}",
                path,
                lambda: model_class.from_pretrained(
                    path, trust_remote_code=trust_remote_code, output_loading_info=True, **given
                ),
            )
        except RuntimeError as error:
            if method == "torchao" and (loose := _outside_of_modules(path)):
                raise UnsupportedModelError(
                    f"{path}: a {model_class.__name__} has {loose} outside of any module, and torchao does not read a "
                    "checkpoint of such a model back: correct it in Python where it was quantised, by "
                    "eckart.compression.correction.correct"
                ) from error
            raise CheckpointError(
                f"cannot load the model {path}: no weight could be made of what its files hold "
                f"({str(error).partition('. ')[0]}). Is the download whole, and does its format run on a CPU?"
            ) from error
    refuse(str(path), complaints_about(model, info), f"the {type(model).__name__} that its config.json describes")
    section: Any = config.quantization_config
    scheme = section.get("quant_type") if isinstance(section, dict) else getattr(section, "quant_type", None)
    named = next(iter(scheme.values()))["_type"] if isinstance(scheme, dict) else type(scheme).__name__
    return Quantised(model.to(device).eval(), f"torchao {named}" if scheme is not None else method)


def _outside_of_modules(path: str | Path) -> str | None:
    """A tensor of a checkpoint whose name has no module's in front; None where there is none."""
    files = sorted(Path(path).glob("*.safetensors"))
    return next((name for name in read_headers(files) if "." not in name), None)


def _not_quantised(path: str | Path, why: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{path} is not quantised ({why}), and there is nothing to correct: give {READ}, or make the model smaller by "
        "`eckart compress`"
    )


def quantised_weight(model: nn.Module, site: Site) -> Tensor:
    """(d_out, d_in): the weight of a linear of a quantised model as ordinary numbers, in the model's type.

    Args:
        site: of the dense model.

    Raises:
        ValueError: the model has no such linear, or one of another shape.
        UnsupportedModelError: its numbers cannot be had.
    """
    try:
        module = model.get_submodule(site.name)
    except AttributeError as error:
        raise ValueError(
            f"{site.name} is in the reference and not in the quantised model: is it the model that was quantised?"
        ) from error
    if not is_linear(module):
        raise UnsupportedModelError(
            f"{site.name} is a {type(module).__name__}, whose quantised weight eckart does not read: give {READ}"
        )
    weight = read_weight(module)
    try:
        weight = numbers_of(weight)
    except (NotImplementedError, AttributeError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"{site.name} is quantised as {type(weight).__name__}, which does not give its numbers back here "
            f"({str(error).splitlines()[0] if str(error) else type(error).__name__}): give {READ}"
        ) from error
    if not weight.is_floating_point():
        raise UnsupportedModelError(f"{site.name} is stored as {weight.dtype}, codes without scales: give {READ}")
    if tuple(weight.shape) != (site.d_out, site.d_in):
        raise ValueError(
            f"{site.name} is {site.d_out} x {site.d_in} in the reference and {' x '.join(map(str, weight.shape))} in "
            "the quantised model: is it the model that was quantised?"
        )
    if not bool(torch.isfinite(weight).all()):
        raise ValueError(f"{site.name}: its quantised weight has numbers that are not finite")
    return weight


def differing_sites(model: PreTrainedModel, reference: PreTrainedModel, sites: Sequence[Site]) -> tuple[Site, ...]:
    """The sites whose weight in a quantised model is not the reference's, be it rounded to the other's type.

    Raises:
        ValueError: the models have other linears, or weights that have nothing to do with each other; and, as
            UnsupportedModelError, what `quantised_weight` raises.
    """
    known = {name for name, _ in reference.named_modules()}
    for name, module in model.named_modules():
        if is_linear(module) and name not in known:
            raise ValueError(
                f"{name} is in the quantised model and not in the reference: is it the model that was quantised?"
            )
    embeddings = [cast(nn.Embedding, each.get_input_embeddings()) for each in (model, reference)]
    _check_alike("the embedding", *(numbers_of(each.weight) for each in embeddings))
    differing = []
    for site in sites:
        weight, given = read_weight(reference.get_submodule(site.name)), quantised_weight(model, site)
        given = given.to(weight.device)
        _check_alike(site.name, given, weight)
        if not torch.equal(weight.to(given.dtype), given) and not torch.equal(given.to(weight.dtype), weight):
            differing.append(site)
    return tuple(differing)


def _check_alike(name: str, given: Tensor, weight: Tensor) -> None:
    """Raises ValueError where a quantised weight is further from the reference's than zeros are."""
    if given.shape == weight.shape:
        given, weight = given.float().to(weight.device), weight.float()
        if (weight - given).norm() > weight.norm() > 0:
            raise ValueError(
                f"{name} has nothing of the reference's, zeros would be nearer: is that the model that was quantised?"
            )
