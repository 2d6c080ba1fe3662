"""vLLM: compressed checkpoints as one of its quantisation methods, found by the entry point `vllm.general_plugins`.

vLLM holds q, k and v as one layer, and gate and up; ours in it may be of different ranks and layouts, some of them
dense. `EckartConfig` is the rank map, `EckartLinearMethod` one layer's linears while they load, and `SharedLayer` what
then runs. Written against vLLM 0.32.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.distributed import get_pp_group, tensor_model_parallel_all_reduce
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from eckart.models.checkpoint import LowRankConfig
from eckart.models.registration import QUANT_METHOD
from eckart.models.weight_files import CheckpointError
from eckart.serving.tensor_parallel import Arriving, SharedLayer, Span, rows_of

# vLLM's own handlers print what loggers below its name say.
logger = logging.getLogger("vllm.eckart")
INSTEAD = "Write a dense model and serve that: eckart export CHECKPOINT OUT --dense"


def register() -> None:
    """Make vLLM read compressed checkpoints; it calls this in each of its processes, perhaps more than once."""
    register_quantization_config(QUANT_METHOD)(EckartConfig)


class EckartConfig(QuantizationConfig):
    """The rank map of a checkpoint, by the names that vLLM's classes give the linears.

    Args:
        sites: {linear: its entry}, see `LowRankConfig`.
    """

    def __init__(self, sites: Mapping[str, Mapping[str, Any]]) -> None:
        super().__init__()
        self.sites = {name: dict(spec) for name, spec in sites.items()}
        # Linears that a layer of the model has taken.
        self.served: set[str] = set()

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> EckartConfig:
        """Of the `quantization_config` section of config.json. Raises CheckpointError as `LowRankConfig`."""
        section = LowRankConfig(**config)
        sites = section.sites
        if section.open_experts:
            raise CheckpointError(f"experts that are factored one by one have no layer of their own in vLLM. {INSTEAD}")
        if section.heads is not None:
            raise CheckpointError(
                "keys and values that are factored in groups of heads have no layer of their own in vLLM, whose cache "
                f"holds whole keys and values. {INSTEAD}"
            )
        bases = sum("base" in spec for spec in sites.values())
        coded = sum("bits" in spec and "base" not in spec for spec in sites.values())
        if bases or coded:
            logger.warning(
                "numbers in few bits are multiplied out as they are loaded: %d linears with a quantised weight become "
                "dense, quantised factors of %d become factors in the model's type. The answers are those of the "
                "checkpoint, the memory is not",
                bases,
                coded,
            )
        return cls(sites)

    def get_name(self) -> str:
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0  # ordinary products, which every device has

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []  # all of it is in config.json

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Give the linears the names that vLLM's class has for them."""
        for spec in self.sites.values():
            if "right_of" in spec:
                spec["right_of"] = hf_to_vllm_mapper.apply_list([spec["right_of"]])[0]
        self.sites = hf_to_vllm_mapper.apply_dict(self.sites)

    def get_quant_method(self, layer: Any, prefix: str) -> QuantizeMethodBase | None:
        """What runs a layer: ours where one of its linears is in the rank map.

        Raises:
            CheckpointError: the rank map names parts of a layer that is no linear, as experts are in vLLM.
        """
        if not isinstance(layer, LinearBase):
            inside = [site for site in self.sites if prefix and f"{site}.".startswith(f"{prefix}.")]
            if inside:
                raise CheckpointError(
                    f"{inside[0]} is part of a {type(layer).__name__} in vLLM, not a linear. {INSTEAD}"
                )
            return None
        parent, _, own = prefix.rpartition(".")
        members = self.packed_modules_mapping.get(own, [own])
        names = [f"{parent}.{member}" if parent else member for member in members]
        sites = {name: self.sites.get(name) for name in names}
        if not any(sites.values()):
            return UnquantizedLinearMethod()
        self.served.update(names)
        return EckartLinearMethod(self, sites)

    def check_served(self) -> None:
        """Raises CheckpointError where a linear of the rank map is in no layer of the model, which is built by now."""
        unknown = [] if get_pp_group().world_size > 1 else [name for name in self.sites if name not in self.served]
        if unknown:
            raise CheckpointError(
                f"vLLM's class of this model has no linear {unknown[0]}, which the checkpoint's rank map names "
                f"({len(unknown)} of {len(self.sites)} are not there). {INSTEAD}"
            )


class EckartLinearMethod(LinearMethodBase):
    """One layer of vLLM, of whose linears at least one is compressed.

    Args:
        sites: {linear: its entry in the rank map, None where it is dense}, in the layer's order.
    """

    arriving: Arriving

    def __init__(self, config: EckartConfig, sites: Mapping[str, Mapping[str, Any] | None]) -> None:
        self.config, self.sites = config, dict(sites)
        self.products = UnquantizedLinearMethod()
        # An adapter's products are added before the runtime's sum over processes, so that sum has to stay.
        self.has_adapters = get_current_vllm_config().lora_config is not None
        self.reduces = False

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Empty parameters under the names of the checkpoint's tensors, whose loaders fill `arriving`.

        Raises:
            CheckpointError: a layer whose division among processes is not known, or an entry that does not fit it.
        """
        spans = _spans(layer, output_partition_sizes)
        if len(self.sites) not in (1, len(spans)):
            raise CheckpointError(f"{next(iter(self.sites))} is one of {len(spans)} parts of a layer. {INSTEAD}")
        each = [spans] if len(self.sites) == 1 else [[span] for span in spans]
        processes = layer.tp_size if isinstance(layer, RowParallelLinear) else 1
        columns = Span.of(input_size_per_partition, layer.tp_rank if processes > 1 else 0, processes)
        device = torch.empty(0).device  # the one that vLLM builds the model on
        self.arriving = Arriving(
            self.sites, [rows_of(spans) for spans in each], columns, device=device, dtype=params_dtype
        )
        expected = {key: like for i in range(len(self.sites)) for key, like in self.arriving.expected(i).items()}
        bias = expected.pop("bias", None)
        for key, like in {"weight": torch.empty(0, dtype=params_dtype), **expected}.items():
            self._await(layer, key, like.dtype)
        self._await_bias(layer, bias)

    def _await(self, layer: Any, key: str, dtype: torch.dtype) -> None:
        """Put an empty parameter where vLLM looks for a tensor's place."""
        *path, name = key.split(".")
        for part in path:
            if part not in layer._modules:  # noqa: SLF001 (`hasattr` also finds what is no module)
                layer.add_module(part, nn.Module())
            layer = layer.get_submodule(part)
        layer.register_parameter(name, self._place(key, dtype))

    def _place(self, key: str, dtype: torch.dtype) -> nn.Parameter:
        place = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
        place.weight_loader = partial(self._load, key)  # type: ignore[attr-defined]
        return place

    def _await_bias(self, layer: Any, ours: Tensor | None) -> None:
        """Decide who loads biases once vLLM says whether the layer has one.

        It registers a bias, or None, after the weights are made, and drops the tensors of one that it has no place for.
        """
        plain = layer.register_parameter

        def once(name: str, value: nn.Parameter | None) -> None:
            if name != "bias":
                return plain(name, value)
            del layer.register_parameter  # the instance's: what the class does is there again
            if value is not None:
                self.arriving.give_up_biases()
            return plain(name, value if value is not None or ours is None else self._place("bias", ours.dtype))

        layer.register_parameter = once

    def _load(self, key: str, place: nn.Parameter, tensor: Tensor, shard: str | int | None = None) -> None:
        """A tensor of the checkpoint, as vLLM's loaders hand it over.

        Args:
            shard: which of the layer's linears it is of; None where the layer is one.
        """
        i = 0 if shard is None else ("q", "k", "v").index(shard) if isinstance(shard, str) else shard
        self.config.check_served()
        self.arriving.take(i, key, tensor)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Put what runs in the place of what was loaded.

        Raises:
            CheckpointError: a tensor was not in the checkpoint's files.
        """
        self.config.check_served()
        shares = self.arriving.finished()
        divided = isinstance(layer, RowParallelLinear) and layer.tp_size > 1
        self.reduces = divided and layer.reduce_results and not self.has_adapters
        if self.reduces:
            layer.reduce_results = False
        ours = layer.bias is not None and not layer.bias.numel()
        if ours:
            layer.bias = None
        if divided and not self.reduces and layer.tp_rank:
            shares = [replace(share, bias=None) for share in shares]  # the sum over processes has it once
        low_rank = SharedLayer(
            shares,
            self.arriving.lenders,
            multiply=self.products.apply,
            reduce=tensor_model_parallel_all_reduce if self.reduces else None,
        )
        for matrix in low_rank.matrices:
            self.products.process_weights_after_loading(matrix)
        for name in ("right", "left", "base", "order"):
            if name in layer._modules or name in layer._parameters:  # noqa: SLF001
                delattr(layer, name)
        layer.low_rank = low_rank
        del self.arriving

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The layer's outputs, of one process."""
        if self.reduces:
            # vLLM gives the first process alone the bias, before a sum that is behind us.
            bias = None if layer.skip_bias_add else layer.bias
        y: Tensor = layer.low_rank(x)
        return y if bias is None else y + bias


def _spans(layer: Any, sizes: Sequence[int]) -> list[Span]:
    """Which outputs of each of its parts a layer has in this process.

    Raises:
        CheckpointError: the layer is of a kind of its own, and divided.
    """
    if layer.tp_size == 1 or isinstance(layer, ReplicatedLinear | RowParallelLinear):
        return [Span.of(size) for size in sizes]
    if type(layer) not in (ColumnParallelLinear, MergedColumnParallelLinear, QKVParallelLinear):
        raise CheckpointError(
            f"{layer.prefix}: how a {type(layer).__name__} is divided among processes is not known. Serve it in one "
            f"(--tensor-parallel-size 1), or write a dense model and serve that: eckart export CHECKPOINT OUT --dense"
        )
    copies = [1, layer.num_kv_head_replicas, layer.num_kv_head_replicas] if isinstance(layer, QKVParallelLinear) else []
    return [
        Span.of(size, layer.tp_rank, layer.tp_size, each)
        for size, each in zip(sizes, copies or [1] * len(sizes), strict=True)
    ]
