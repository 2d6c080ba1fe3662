"""Loads a language model that eckart compressed, with torch and transformers alone.

This file comes with the files of the model. It is run where it is trusted, by `from_pretrained(PLACE,
trust_remote_code=True)`; then it enters the format into transformers' table of stored weights, and has a subclass, of
the same name, of each of its classes of models. It reads no other file and no network. Where eckart is imported, eckart
loads the model, and runs it faster; the numbers are the same.

A compressed linear is two factors, y = left(right(x)) + bias, or numbers in few bits, or both. `quantization_config` in
config.json has the sizes: {name of a linear: its entry}.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

QUANT_METHOD = "eckart"
# The newest format that is read: 1 has plain factors, 2 also pivoted and shared ones, 3 also numbers in few bits.
NEWEST = 3


class LowRankLinear(nn.Module):
    """y = left(right(x)) + bias; pivoted, y = [p, left(p)] in the order `order`, plus bias, with p = right(x).

    Tensors: `right.weight` (rank, d_in), but for one that shares that of another linear, its lender; `left.weight`
    (d_out, rank), or of a pivoted one (d_out - pivots, rank); `order` (d_out,), if pivoted; `bias` (d_out,), if any;
    and `weight` (0,), of whose shape loaders without this file complain, instead of building another model.
    """

    order: Tensor | None

    def __init__(
        self, d_in: int, d_out: int, entry: Mapping[str, Any], lender: LowRankLinear | None, **place: Any
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = d_in, d_out, entry["rank"]
        self.__dict__["lender"] = lender  # its tensors are not this module's
        if lender is None:
            self.right = nn.Linear(d_in, self.rank, bias=False, **place)
        self.left = nn.Linear(self.rank, d_out - entry.get("pivots", 0), bias=False, **place)
        self.bias = nn.Parameter(torch.zeros(d_out, **place)) if entry["bias"] else None
        order = None
        if "pivots" in entry:  # some valid order, until the model's own is loaded
            places = torch.arange(d_out, dtype=torch.int32, device=place.get("device"))
            order = torch.where(places < entry["pivots"], places, places + (self.rank - entry["pivots"]))
        self.register_buffer("order", order)
        self.register_buffer("weight", torch.empty(0, **place))

    def forward(self, x: Tensor) -> Tensor:
        lender = self.__dict__["lender"]
        p = (self if lender is None else lender).right(x)
        y = self.left(p)
        if self.order is not None:
            y = torch.cat((p, y), -1).index_select(-1, self.order)
        return y if self.bias is None else y + self.bias


class CodedMatrix(nn.Module):
    """x -> x Mᵀ with M_ij = code_ij * scale of its block. Tensors: `codes` uint8, packed; `scales` bfloat16."""

    codes: Tensor
    scales: Tensor

    def __init__(self, d_in: int, d_out: int, bits: int, block: tuple[int, int], device: Any = None) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bits, self.block = d_in, d_out, bits, block
        blocks = -(-d_out // block[0]), -(-d_in // block[1])
        self.register_buffer("codes", torch.zeros(-(-d_in * d_out // 8) * bits, dtype=torch.uint8, device=device))
        self.register_buffer("scales", torch.zeros(blocks, dtype=torch.bfloat16, device=device))

    def numbers(self, dtype: torch.dtype) -> Tensor:
        """(d_out, d_in): M, multiplied in float32 or better and rounded once."""
        wide, shape = torch.promote_types(dtype, torch.float32), (self.out_features, self.in_features)
        # A code is in pieces of a power of two of bits: first the largest of all codes, then the next one.
        eights, start, shift = len(self.codes) // self.bits, 0, 0
        codes = torch.zeros(8 * eights, dtype=torch.int32, device=self.codes.device)
        for width in (width for width in (8, 4, 2, 1) if self.bits & width):
            part = self.codes[start : start + eights * width].int()
            pieces = [part >> place & (1 << width) - 1 for place in range(0, 8, width)]
            codes |= torch.stack(pieces, -1).flatten() << shift
            start, shift = start + eights * width, shift + width
        matrix = (codes[: shape[0] * shape[1]] - (1 << self.bits - 1)).view(shape).to(wide)
        scales = self.scales.to(wide).repeat_interleave(self.block[0], 0).repeat_interleave(self.block[1], 1)
        return (matrix * scales[: shape[0], : shape[1]]).to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.numbers(x.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CodedMatrix:
        """As of every module, but a change of type leaves the scales, for which the codes were chosen."""
        before = self.scales
        super()._apply(fn, recurse)
        if self.scales.dtype != before.dtype:
            self.scales = before.to(self.scales.device)
        return self


class CodedLinear(nn.Module):
    """y = base(x) + left(right(x)) + bias; base or factors may be absent, and each may be in few bits."""

    def __init__(self, d_in: int, d_out: int, entry: Mapping[str, Any], **place: Any) -> None:
        super().__init__()
        self.in_features, self.out_features, self.rank = d_in, d_out, entry["rank"]
        device, group, bits = place.get("device"), entry["group"], entry.get("bits")
        self.base = None
        self.left: nn.Module | None = None
        self.right: nn.Module | None = None
        if "base" in entry:
            self.base = CodedMatrix(d_in, d_out, entry["base"], (1, group), device)
        if self.rank and bits is not None:
            self.right = CodedMatrix(d_in, self.rank, bits, (1, group), device)
            self.left = CodedMatrix(self.rank, d_out, bits, (group, 1), device)
        elif self.rank:
            self.right = nn.Linear(d_in, self.rank, bias=False, **place)
            self.left = nn.Linear(self.rank, d_out, bias=False, **place)
        self.bias = nn.Parameter(torch.zeros(d_out, **place)) if entry["bias"] else None
        self.register_buffer("weight", torch.empty(0, **place))

    def forward(self, x: Tensor) -> Tensor:
        parts = [] if self.base is None else [self.base(x)]
        if self.right is not None and self.left is not None:
            parts.append(self.left(self.right(x)))
        if self.bias is not None:
            parts.append(self.bias)
        return sum(parts[1:], start=parts[0])


class EckartConfig(QuantizationConfigMixin):
    """`quantization_config` of config.json: a format number, the entries, and what made the model, for people."""

    def __init__(self, sites: Mapping[str, Any] | None = None, format: int = 1, recipe: Any = None, **_: Any) -> None:
        if format not in range(1, NEWEST + 1):
            raise ValueError(f"the model's format {format!r} is newer than its code reads: `import eckart` to load it")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format, self.sites, self.recipe = format, dict(sites or {}), recipe


class EckartQuantizer(HfQuantizer):
    """What transformers calls while it loads and saves a compressed model."""

    quantization_config: EckartConfig
    requires_calibration = True  # a dense model is not compressed by loading it

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        names = build(model, self.quantization_config.sites)
        files = [str(file) for file in kwargs.get("checkpoint_files") or () if str(file).endswith(".safetensors")]
        if files:
            check_files(model, names, files)
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        model.is_quantized = False  # half(), float() and training are safe
        return model

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def build(model: Any, sites: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Put compressed linears, without their numbers, where dense ones are; gives their names in this model."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."
    named = {}
    for site in sites:
        spellings = [name for name in (site, site.removeprefix(prefix), prefix + site) if name in modules]
        if not spellings:
            raise ValueError(f"{type(model).__name__} has no module {site}, which its config.json says is compressed")
        named[site] = spellings[0]
    for site in sorted(sites, key=lambda site: "right_of" in sites[site]):  # lenders first
        entry, weight = sites[site], modules[named[site]].weight
        d_out, d_in = weight.shape
        if isinstance(modules[named[site]], transformers.pytorch_utils.Conv1D):
            d_out, d_in = d_in, d_out
        place: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
        if "group" in entry:
            made: nn.Module = CodedLinear(d_in, d_out, entry, **place)
        else:
            lender = model.get_submodule(named[entry["right_of"]]) if "right_of" in entry else None
            made = LowRankLinear(d_in, d_out, entry, lender, **place)
        model.set_submodule(named[site], made)
    return list(named.values())


def check_files(model: Any, names: Iterable[str], files: Iterable[str]) -> None:
    """Raises ValueError where the files lack a tensor of a compressed linear: it would be left at random."""
    prefix = f"{model.base_model_prefix}."
    stored: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as opened:
            stored.update(key.removeprefix(prefix) for key in opened.keys())  # noqa: SIM118 (it is no dict)
    expected = [f"{name}.{key}" for name in names for key in model.get_submodule(name).state_dict()]
    missing = [key for key in expected if key.removeprefix(prefix) not in stored]
    if missing:
        raise ValueError(f"the model's files lack {len(missing)} tensors, such as {missing[0]}: download them again")


def register() -> None:
    """Enter the format into transformers' tables, unless eckart has."""
    if sys.modules.get("eckart") is None:
        AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = EckartConfig
        AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = EckartQuantizer


class Compressed:
    """What the subclass of a model's class has of its own."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        register()  # another model's file may have come in between
        return super().from_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def _from_config(cls, config: Any, **kwargs: Any) -> Any:
        model = super()._from_config(config, **kwargs)  # type: ignore[misc]
        section = getattr(config, "quantization_config", None)
        if section is not None and sys.modules.get("eckart") is None:
            build(model, section["sites"] if isinstance(section, dict) else section.sites)
        return model


CLASSES: dict[str, type] = {}


def __getattr__(name: str) -> type:
    """The subclass of transformers' class of this name: of a model, or of a configuration, which stays as it is."""
    if name not in CLASSES:
        base: Any = None if name.startswith("_") else getattr(transformers, name, None)
        is_model = isinstance(base, type) and issubclass(base, transformers.PreTrainedModel)
        if not is_model and not (isinstance(base, type) and issubclass(base, transformers.PreTrainedConfig)):
            raise AttributeError(f"transformers has no class of models {name!r}")
        own = (Compressed,) if is_model else ()
        CLASSES[name] = type(name, (*own, base), {"__module__": __name__})
    return CLASSES[name]


register()
