"""Quantization: weights of the compressible linears in 8 or 4 bits, by torchao, without calibration."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.models.families import UnsupportedModelError
from eckart.models.sites import find_sites, read_weight, replace_module
from eckart.support.progress import Track, silent
from eckart.support.quiet import TORCHAO, quiet

# At 16, a float32 scale and a zero point are two and a half bits more for each number.
SMALLEST_GROUP = 16


@torch.no_grad()
def quantize_weights(
    model: PreTrainedModel, *, bits: Literal[8, 4], group_size: int = 128, track: Track = silent
) -> dict[str, Any]:
    """Store the weights of every compressible linear in `bits` bits, in place. Embeddings, heads and biases stay.

    8 bits: code = round(w / s), s = max |w| / 127.5 of a row (symmetric; torchao's Int8WeightOnlyConfig).
    4 bits: code = round(w / s) + z, 0 ... 15, s = (max - min) / 15 of a group of inputs in a row and 0 (asymmetric;
        the numbers of torchao's IntxWeightOnlyConfig, in the memory layout of `PackedInt4`). A width that the group
        size does not divide gets the largest group below it that does.
    Arithmetic stays in the model's type. GPT-2's Conv1D becomes the nn.Linear of the same numbers, the only kind that
    torchao knows.

    Returns:
        {"bits", "sites": how many, "groups": {group size: sites}, "left_dense": {site: why}, "rewritten": Conv1Ds}.

    Raises:
        ValueError: torchao is not installed, or the group size is below 16.
        UnsupportedModelError: as in `find_sites`, or the model is quantised already. Nothing was changed.
    """
    check_group_size(group_size)
    torchao = import_torchao()
    from eckart.compression.baselines.packed import PackedInt4  # needs torchao

    sites = find_sites(model)
    for site in sites:
        if is_traceable_wrapper_subclass(model.get_submodule(site.name).weight):
            raise UnsupportedModelError(f"{site.name} is quantised already; start from the dense model")
    groups: Counter[int] = Counter()
    left_dense: dict[str, str] = {}
    rewritten = 0
    for site in track(sites, f"int{bits}", len(sites)):
        group = site.d_in if bits == 8 else _largest_divisor(site.d_in, group_size)
        if bits == 4 and group < SMALLEST_GROUP:
            left_dense[site.name] = f"no group of {SMALLEST_GROUP} ... {group_size} divides its {site.d_in} inputs"
            continue
        module = model.get_submodule(site.name)
        if isinstance(module, Conv1D):
            module = as_linear(module)
            replace_module(model, site.name, module)
            rewritten += 1
        if bits == 8:
            config = torchao.Int8WeightOnlyConfig(set_inductor_config=False)
        else:
            config = torchao.IntxWeightOnlyConfig(
                torch.int4,  # type: ignore[attr-defined]
                torchao.PerGroup(group),
                torchao.quant_primitives.MappingType.ASYMMETRIC,
            )
        torchao.quantize_(module, config)
        if bits == 4:
            module.weight = nn.Parameter(PackedInt4.pack(module.weight), requires_grad=False)
        groups[group] += 1
    return {
        "bits": bits,
        "sites": groups.total(),
        "groups": {str(group): count for group, count in sorted(groups.items())},
        "left_dense": left_dense,
        "rewritten": rewritten,
    }


def check_group_size(group_size: int) -> None:
    """Raises ValueError for groups so small that scales weigh as much as what they scale."""
    if group_size < SMALLEST_GROUP:
        raise ValueError(f"group_size {group_size} is below {SMALLEST_GROUP}: the scales would outweigh the numbers")


def import_torchao() -> Any:
    """torchao.quantization, imported without the warnings about kernels for other machines that it logs.

    Raises:
        ValueError: it is not installed.
    """
    with quiet(*TORCHAO):
        try:
            import torchao.quantization
        except ImportError as error:
            raise ValueError("torchao is not installed: pip install 'eckart[baselines]'") from error
        return torchao.quantization


def _largest_divisor(number: int, limit: int) -> int:
    return max(divisor for divisor in range(1, limit + 1) if number % divisor == 0)


def as_linear(module: Conv1D) -> nn.Linear:
    """The nn.Linear with the numbers of a Conv1D."""
    weight = read_weight(module)
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight.contiguous())
    linear.bias = nn.Parameter(module.bias.detach())
    return linear.train(module.training)
