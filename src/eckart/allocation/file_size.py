"""Files: how large the weight files of a model are, before it is compressed and written."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import cast

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from eckart.allocation.rank_plan import RankPlan
from eckart.lowrank.storage import Storage
from eckart.models.coded import CodedLinear, CompressedLinear
from eckart.models.linear import LowRankLinear
from eckart.models.sites import Site, read_weight

# Bytes of the largest file, as `models.loading.save` writes them.
SHARD = 5_000_000_000
# safetensors' names of types, in the order in which a file has them.
TYPES: dict[torch.dtype, str] = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
# What every file begins with: the length of the header. The header ends with spaces up to a multiple of as many.
WORD = 8


def weight_bytes(model: PreTrainedModel, plan: RankPlan, *, bias: bool = False, shard: int = SHARD) -> int:
    """Bytes of the weight files that `save_pretrained` writes of the model once `plan` is carried out.

    Names, types and shapes of all tensors decide it, so it is known to the byte: empty tensors, orders of pivoted
    factors, and the header of each safetensors file included. Only where sites share pivots is it a bound, above by a
    word for each of them: how many of the pivots are a site's own rows is not known before the factors are.

    Args:
        model: dense; its weights are not read.
        bias: the method adds a bias to every site of the plan that has none and does not stay dense.
        shard: bytes of the largest file.

    Raises:
        ValueError: a tensor of a type that is unknown here.
    """
    tensors = stored_tensors(model, plan, bias=bias)
    files = split_torch_state_dict_into_shards(tensors, max_shard_size=shard).filename_to_tensors
    # A number of rows that is longer, written out, than the one here; no header grows by more than this.
    unknown = [unit for unit in plan.units if len(unit.sites) > 1 and plan.layout == "pivoted"]
    digits = WORD * sum(len(unit.sites) for unit in unknown if plan.rank(unit.sites[0]) is not None)
    return digits + sum(_file_bytes({name: tensors[name] for name in names}) for names in files.values())


def stored_tensors(model: PreTrainedModel, plan: RankPlan, *, bias: bool = False) -> dict[str, Tensor]:
    """The tensors that would be saved, by the names they have in the file, on the meta device."""
    modules: dict[str, CompressedLinear] = {}
    for unit in plan.units:
        first = unit.sites[0]
        rank, storage = plan.rank(first), plan.storage(first)
        if not storage.is_plain:
            modules[first.name] = coded_twin(model, first, rank or 0, storage, bias=bias)
            continue
        if rank is None:
            continue
        pivots = [None] * len(unit.sites) if plan.layout == "plain" else _own_pivots(unit.sites, rank)
        for site, own in zip(unit.sites, pivots, strict=True):
            lender = cast("LowRankLinear | None", modules.get(first.name))
            modules[site.name] = low_rank_twin(model, site, rank, own, bias=bias, right_of=lender)
    return revert_weight_conversion(model, with_modules(dense_tensors(model), modules))


def dense_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The model's own tensors on the meta device, tied ones once."""
    kept = remove_tied_weights_from_state_dict(dict(model.state_dict()), model)
    return {name: tensor.to("meta") for name, tensor in kept.items()}


def low_rank_twin(
    model: PreTrainedModel,
    site: Site,
    rank: int,
    pivots: int | None,
    *,
    bias: bool,
    right_of: LowRankLinear | None = None,
) -> LowRankLinear:
    """The module that would stand at the site, on the meta device."""
    return LowRankLinear(
        site.d_in,
        site.d_out,
        rank,
        bias=bias or site.has_bias,
        pivots=pivots,
        right_of=right_of,
        device="meta",
        dtype=read_weight(model.get_submodule(site.name)).dtype,
    )


def coded_twin(model: PreTrainedModel, site: Site, rank: int, storage: Storage, *, bias: bool) -> CodedLinear:
    """The module of numbers in few bits that would stand at the site, on the meta device."""
    return CodedLinear(
        site.d_in,
        site.d_out,
        rank,
        storage,
        bias=bias or site.has_bias,
        device="meta",
        dtype=read_weight(model.get_submodule(site.name)).dtype,
    )


def with_modules(tensors: Mapping[str, Tensor], modules: Mapping[str, CompressedLinear]) -> dict[str, Tensor]:
    """The tensors with those of `modules` in the places of the dense linears'. Files are filled in this order."""
    replaced: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        site, _, kind = name.rpartition(".")
        if site not in modules:
            replaced[name] = tensor
        elif kind == "weight":
            for own, value in modules[site].state_dict().items():
                # Empty tensors all lie at the address 0, so that files are divided as if they were one tensor.
                replaced[f"{site}.{own}"] = value if value.numel() else torch.empty_like(value, device="cpu")
    return replaced


def _own_pivots(sites: Sequence[Site], rank: int) -> list[int]:
    """Pivots of each site, as many as possible at the last: the tensors before it are then as long as they can be, and
    so are their places in the file."""
    remaining, own = rank, {}
    for site in sorted(sites, key=lambda site: site.name, reverse=True):
        own[site.name] = min(remaining, site.d_out)
        remaining -= own[site.name]
    return [own[site.name] for site in sites]


def _file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of one safetensors file: a word, the header, the tensors."""
    order = {name: number for number, name in enumerate(TYPES.values())}
    entries, place = {}, 0
    kinds = {name: type_name(name, tensor) for name, tensor in tensors.items()}
    for name in sorted(tensors, key=lambda name: (order[kinds[name]], name)):
        end = place + tensors[name].nbytes
        entries[name] = entry(kinds[name], list(tensors[name].shape), place, end)
        place = end
    return WORD + header_bytes(entries) + place


def header_bytes(entries: Mapping[str, object]) -> int:
    """Bytes of a header with these entries."""
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"), ensure_ascii=False).encode()
    return -(-len(text) // WORD) * WORD


def entry(kind: str, shape: Sequence[int], start: int, end: int) -> dict[str, object]:
    """What a header says of one tensor."""
    return {"dtype": kind, "shape": shape, "data_offsets": [start, end]}


def type_name(name: str, tensor: Tensor) -> str:
    """safetensors' name of the tensor's type."""
    if tensor.dtype not in TYPES:
        raise ValueError(f"{name} is of type {tensor.dtype}, whose size in a file is not known here")
    return TYPES[tensor.dtype]
