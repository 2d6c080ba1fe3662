"""The Hugging Face face: a compressed model is a checkpoint that stock `from_pretrained` builds and loads.

transformers calls a plug-in for stored weight formats a "quantizer"; `registration` enters ours. `config.json` carries,
under `quantization_config`, a format number and the rank map; the loader builds the model empty, swaps each named
linear for a LowRankLinear, checks the files against it, and loads. A right factor that several linears share is a
tensor of the one that lends it, on disk as in memory, so the model has no tied tensors because of it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from eckart.lowrank.pivoting import check_order
from eckart.lowrank.storage import PLAIN, Storage
from eckart.models.coded import CodedLinear, CompressedLinear
from eckart.models.dense import export_dense
from eckart.models.experts import open_experts, opened_experts, without_merging
from eckart.models.families import is_linear
from eckart.models.heads import heads_in_a_group, open_heads
from eckart.models.linear import LowRankLinear
from eckart.models.matching import check_finite, is_head, made_anew, refuse, stored_names, without_place, wrong_types
from eckart.models.registration import QUANT_METHOD
from eckart.models.sites import low_rank_modules, read_weight, replace_module
from eckart.models.weight_files import CheckpointError, read_headers

# 1: plain factors, each linear with its own. 2: pivoted layouts and shared right factors as well. 3: numbers in few
# bits. 4: experts with linears of their own. 5: key and value heads in groups with linears of their own.
FORMATS = (1, 2, 3, 4, 5)
# Keys of an entry whose numbers are in few bits.
CODED = ("base", "bits", "group")


class LowRankConfig(QuantizationConfigMixin):
    """The `quantization_config` section of a compressed model's config.json.

    Attributes:
        format: number of this layout; a loader refuses a number it does not know. A section is written with the lowest
            number that can say it, so that older versions read what they can.
        sites: {module name: {"rank": int, "bias": bool}}; every other module is as its class builds it. Of format 2 on
            also "pivots": how many of its rows are pivots, where it is pivoted; and "right_of": the site whose right
            factor it shares, where it has none of its own. Of format 3 on also "base": bits of a quantised weight, to
            which factors are added if the rank is not 0; "bits": of the factors; and "group": numbers of one scale.
        open_experts: whether the experts of its mixtures have linears of their own, see `experts.Experts`; format 4.
        heads: key-value heads in a group, where groups of heads have linears of their own, see `heads.open_heads`;
            None where they have not. Format 5.
        recipe: method, settings and calibration that made it; for people, not read by the loader.
    """

    open_experts = False
    heads: int | None = None

    def __init__(
        self,
        sites: Mapping[str, Mapping[str, Any]] | None = None,
        format: int = FORMATS[0],
        recipe: Mapping[str, Any] | None = None,
        open_experts: bool = False,
        heads: int | None = None,
        **unknown: Any,
    ) -> None:
        unknown.pop("quant_method", None)
        if format not in FORMATS:
            raise CheckpointError(
                f"checkpoint format {format!r} is not known to this eckart, which reads formats {FORMATS[0]} to "
                f"{FORMATS[-1]}; install the eckart that wrote it, or a newer one"
            )
        if unknown:
            raise CheckpointError(f"unknown keys in the checkpoint's eckart section: {', '.join(sorted(unknown))}")
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]
        self.format = format
        for name, spec in (sites or {}).items():
            _check_spec(name, spec, format)
        self.sites = {name: dict(spec) for name, spec in (sites or {}).items()}
        for name, spec in self.sites.items():
            _check_lender(name, spec, self.sites)
        self.recipe = dict(recipe or {})
        if type(open_experts) is not bool or (open_experts and format < 4):
            raise CheckpointError(f"open_experts: {open_experts!r} does not go with format {format}")
        if open_experts:
            self.open_experts = open_experts
        if heads is not None:
            if type(heads) is not int or heads < 1 or format < 5:
                raise CheckpointError(f"heads: {heads!r} does not go with format {format}")
            self.heads = heads


def _check_spec(name: str, spec: Any, format: int) -> None:
    """Raises CheckpointError unless the entry says what an entry of this format may say."""
    entry: dict[str, Any] = dict(spec) if isinstance(spec, Mapping) else {}
    rank, bias = entry.pop("rank", None), entry.pop("bias", None)
    expected, least = "{'rank': a positive int, 'bias': a bool}", 1
    valid = isinstance(bias, bool)
    if format > 2 and "group" in entry:
        expected += f", and of numbers in few bits {', '.join(map(repr, CODED))}: ints"
        least = 0 if "base" in entry else 1
        valid = valid and all(type(entry.pop(name, 8)) is int for name in CODED)
    elif format > 1:
        expected += ", and where they apply 'pivots': an int of 0 ... rank, 'right_of': the name of a site"
        pivots, lender = entry.pop("pivots", 0), entry.pop("right_of", "")
        valid = valid and type(pivots) is int and 0 <= pivots <= (rank or 0) and isinstance(lender, str)
    if not valid or entry or type(rank) is not int or rank < least:
        raise CheckpointError(f"{name}: its entry {spec} is not {expected}")
    try:
        storage_of(spec)
    except ValueError as error:
        raise CheckpointError(f"{name}: its entry {spec} does not go: {error}") from error


def storage_of(spec: Mapping[str, Any]) -> Storage:
    """How an entry of a rank map says that its numbers are kept. Raises ValueError as `Storage`."""
    return Storage.from_dict(spec) if "group" in spec else PLAIN


def _check_lender(name: str, spec: Mapping[str, Any], sites: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises CheckpointError unless the site that `spec` borrows from has a right factor of the same kind."""
    if "right_of" not in spec:
        return
    lender = sites.get(spec["right_of"])
    if lender is None or "right_of" in lender:
        raise CheckpointError(f"{name} shares the right factor of {spec['right_of']!r}, which has none of its own")
    if lender["rank"] != spec["rank"] or ("pivots" in lender) != ("pivots" in spec):
        raise CheckpointError(
            f"{name} with {spec} shares the right factor of {spec['right_of']} with {lender}: "
            "rank and layout of both have to be the same"
        )


class LowRankQuantizer(HfQuantizer):
    """What transformers calls while it builds, loads, saves and dequantises a compressed model."""

    quantization_config: LowRankConfig
    requires_calibration = True  # a dense checkpoint cannot be compressed on the fly by passing a config

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        sites = self.quantization_config.sites
        _open(model, self.quantization_config)
        names = dict(zip(sites, resolve_names(model, sites), strict=True))
        _build(model, sites, names, device="meta")
        files = kwargs.get("checkpoint_files") or ()
        check_files(model, list(names.values()), [file for file in files if str(file).endswith(".safetensors")])
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        # The factors are ordinary float tensors: half(), float() and to(dtype) are safe and so is training, and
        # transformers forbids them while this is True. `hf_quantizer` stays, so that save_pretrained writes the rank
        # map again.
        check_orders(model)
        for name, module in low_rank_modules(model).items():
            check_finite("the checkpoint", module.named_parameters(prefix=name))
            scales = (each for each in module.named_buffers(prefix=name) if each[1].is_floating_point())
            check_finite("the checkpoint", scales)
        model.is_quantized = False  # type: ignore[assignment]
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], *given: Any) -> list[Any]:
        """How stored tensors become the model's: those of open experts are as the model has them."""
        conversions = super().update_weight_conversions(weight_conversions, *given)
        return without_merging(conversions) if self.quantization_config.open_experts else conversions

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """`model.dequantize()` is `export_dense`, so that its result can be saved; None keeps the model's type."""
        model = export_dense(model)
        return model if dtype is None else model.to(dtype)  # type: ignore[arg-type]


def describe(model: PreTrainedModel, recipe: Mapping[str, Any] | None = None) -> None:
    """Write the model's rank map into its config, in place, so that `save_pretrained` writes a loadable checkpoint.

    Raises:
        CheckpointError: a linear shares the right factor of one that is no longer in the model.
    """
    attach(model, specs_of(model), recipe)


def specs_of(module: nn.Module, prefix: str = "") -> dict[str, dict[str, Any]]:
    """{site: its entry in the rank map} of every low-rank linear in a model, or in a part of one.

    Args:
        prefix: of the part's names in the model.

    Raises:
        CheckpointError: a linear shares the right factor of one that is not in the module.
    """
    modules = low_rank_modules(module)
    names = {id(linear): prefix + name for name, linear in modules.items()}
    sites: dict[str, dict[str, Any]] = {}
    for linear in modules.values():
        name = names[id(linear)]
        spec: dict[str, Any] = {"rank": linear.rank, "bias": linear.bias is not None}
        if isinstance(linear, CodedLinear):
            spec |= linear.storage.to_dict()
        if linear.pivots is not None:
            spec["pivots"] = linear.pivots
        if linear.lender is not None:
            if id(linear.lender) not in names:
                raise CheckpointError(
                    f"{name} shares the right factor of a linear that is not in the model any more; "
                    "replace all linears that share one, or none"
                )
            spec["right_of"] = names[id(linear.lender)]
        sites[name] = spec
    return sites


def build_as_described(model: PreTrainedModel) -> PreTrainedModel:
    """A dense model as its class builds it, in place with the low-rank linears that its configuration describes.

    Their factors are random, as torch starts a linear; numbers in few bits and biases are zero. For those who fill it
    from a state dict, count it, or train it from the start.

    Raises:
        CheckpointError: the description does not fit the model.
    """
    section: Any = model.config.quantization_config
    config = section if isinstance(section, LowRankConfig) else LowRankConfig(**section)
    _open(model, config)
    names = dict(zip(config.sites, resolve_names(model, config.sites), strict=True))
    for linear in _build(model, config.sites, names, device=None):
        if linear.bias is not None:
            nn.init.zeros_(linear.bias)
    attach(model, config.sites, config.recipe)
    return model


def _open(model: PreTrainedModel, config: LowRankConfig) -> None:
    """Give a dense model the linears of its own that a configuration describes, in place.

    Raises:
        CheckpointError: its heads do not divide so.
    """
    if config.open_experts:
        open_experts(model)
    if config.heads is not None:
        try:
            open_heads(model, config.heads)
        except ValueError as error:
            raise CheckpointError(f"heads: {config.heads} does not fit the model: {error}") from error


def _build(
    model: nn.Module, sites: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], *, device: str | None
) -> list[CompressedLinear]:
    """Replace the linears of a rank map by low-rank ones with no numbers of their own yet, in place; gives these.

    Classes that build their base model with `AutoModel.from_config`, as classifiers do, have them there already.

    Args:
        names: {site of the map: its name in the model}.
        device: of the new ones; None for that of the linear that each replaces.

    Raises:
        CheckpointError: a site is no linear, or its entry does not fit it.
    """
    built: list[CompressedLinear] = []
    # Lenders first: their borrowers are built with them.
    for saved in sorted(sites, key=lambda saved: "right_of" in sites[saved]):
        name, spec = names[saved], sites[saved]
        dense = model.get_submodule(name)
        if isinstance(dense, CompressedLinear):
            continue
        if not is_linear(dense):
            raise CheckpointError(
                f"{name} is in the checkpoint's rank map but is a {type(dense).__name__}, not a linear"
            )
        weight = read_weight(dense)
        lender = model.get_submodule(names[spec["right_of"]]) if "right_of" in spec else None
        place: Any = {"device": device or weight.device, "dtype": weight.dtype, "lender": lender}
        linear = empty_linear(name, spec, weight.shape[1], weight.shape[0], **place)
        replace_module(model, name, linear)
        built.append(linear)
    return built


def empty_linear(
    name: str,
    spec: Mapping[str, Any],
    d_in: int,
    d_out: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str = "meta",
    lender: nn.Module | None = None,
) -> CompressedLinear:
    """The linear that an entry of a rank map describes; its state dict says what a file holds.

    Args:
        dtype: the model's type. lender: the linear whose right factor it shares.

    Raises:
        CheckpointError: the entry does not fit a linear of this size.
    """
    storage, place = storage_of(spec), {"device": device, "dtype": dtype}
    if not storage.is_plain:
        return CodedLinear(d_in, d_out, spec["rank"], storage, bias=spec["bias"], **place)  # type: ignore[arg-type]
    try:
        return LowRankLinear(
            d_in,
            d_out,
            spec["rank"],
            bias=spec["bias"],
            pivots=spec.get("pivots"),
            right_of=lender,  # type: ignore[arg-type]
            **place,  # type: ignore[arg-type]
        )
    except ValueError as error:
        raise CheckpointError(f"{name}: its entry {spec} does not fit the model: {error}") from error


def put_back(model: nn.Module, sites: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> None:
    """Replace dense linears by low-rank ones that were made before, in place.

    Args:
        sites: {name in the model: entry in the rank map}, see `specs_of`.
        tensors: {name in the model: tensor} of their state; the model has these very tensors afterwards.

    Raises:
        CheckpointError: a site is no linear, or its entry does not fit it.
        RuntimeError: a tensor is missing or has another shape.
    """
    _build(model, sites, {name: name for name in sites}, device="meta")
    for name in sites:
        state = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        model.get_submodule(name).load_state_dict(state, assign=True)


def attach(
    model: PreTrainedModel, sites: Mapping[str, Mapping[str, Any]], recipe: Mapping[str, Any] | None = None
) -> None:
    """Write a rank map into the model's config, in place."""
    keys = {key for spec in sites.values() for key in spec}
    experts, heads = bool(opened_experts(model)), heads_in_a_group(model)
    format = 5 if heads else 4 if experts else 3 if keys & {*CODED} else 2 if keys - {"rank", "bias"} else 1
    config = LowRankConfig(sites=sites, format=format, recipe=recipe, open_experts=experts, heads=heads)
    model.config.quantization_config = config
    model.hf_quantizer = LowRankQuantizer(config, pre_quantized=True)  # type: ignore[assignment]
    model.quantization_method = QUANT_METHOD  # type: ignore[assignment]


def check_orders(model: PreTrainedModel) -> None:
    """Raises CheckpointError where a pivoted linear's order, as loaded, is invalid: a gather would read outside."""
    for name, module in low_rank_modules(model).items():
        if module.order is not None and module.order.device.type != "meta":
            try:
                check_order(module.order, module.rank, module.left.out_features)
            except ValueError as error:
                raise CheckpointError(f"{name}.order: {error}. Save or download the checkpoint again") from error


def resolve_names(model: PreTrainedModel, names: Iterable[str]) -> list[str]:
    """The saved site names as this class spells them: with or without the base model's prefix ("model.", "bert.").

    Raises:
        CheckpointError: the class has no such module.
    """
    modules = dict(model.named_modules())
    prefix = f"{model.base_model_prefix}."
    resolved = []
    for name in names:
        candidates = [n for n in (name, name.removeprefix(prefix), prefix + name) if n in modules]
        if not candidates:
            raise CheckpointError(
                f"{name} is in the checkpoint's rank map but {type(model).__name__} has no such module"
            )
        resolved.append(candidates[0])
    return resolved


def check_files(model: PreTrainedModel, names: list[str], files: Iterable[Any]) -> None:
    """Compare the tensors on disk with what the model expects, before anything is loaded.

    transformers initialises a missing tensor at random and only warns. For a compressed model that is an error: the
    blocks must match tensor for tensor, and so must the rest when the class is the one that was saved (another class
    may bring a head of its own or leave one out).

    Raises:
        CheckpointError: a damaged file; else a missing or extra tensor, a wrong shape or type, one message with all of
            them.
    """
    prefix = f"{model.base_model_prefix}."
    paths = [str(file) for file in files]
    headers = read_headers(paths)
    stored = {name: headers[key] for name, key in stored_names(model, headers).items()}
    if not stored:
        return  # the caller passed a state dict; the stock loader checks its shapes
    tied = {key.removeprefix(prefix) for key in getattr(model, "all_tied_weights_keys", None) or {}}
    state = model.state_dict()
    elsewhere = tied | {key.removeprefix(prefix) for key in made_anew(model)}
    expected = {
        key.removeprefix(prefix): value for key, value in state.items() if key.removeprefix(prefix) not in elsewhere
    }
    heads = {key.removeprefix(prefix) for key in state if is_head(model, key)}
    same_class = type(model).__name__ in (getattr(model.config, "architectures", None) or [])
    blocks = {_block_prefix(name.removeprefix(prefix)) for name in names}

    def has_to_be_there(key: str) -> bool:
        return same_class or key not in heads

    missing = {key for key in expected.keys() - stored.keys() if has_to_be_there(key)}
    unused = stored.keys() - expected.keys() - tied
    extra = {key for key in unused if same_class or any(key.startswith(block) for block in blocks)}
    extra.update(without_place(model, unused))
    both = [key for key in sorted(expected.keys() & stored.keys()) if has_to_be_there(key)]
    complaints = [f"missing tensor {key}" for key in sorted(missing)]
    complaints += [f"unknown tensor {key}" for key in sorted(extra)]
    complaints += [
        f"{key} has shape {stored[key].shape}, expected {tuple(expected[key].shape)}"
        for key in both
        if stored[key].shape != tuple(expected[key].shape)
    ]
    complaints += wrong_types({key: expected[key] for key in both}, stored)
    refuse(f"the checkpoint {Path(paths[0]).parent}", complaints, "what its rank map says")


def _block_prefix(name: str) -> str:
    """ "layers.3.mlp.down_proj" -> "layers.": everything under the list of blocks."""
    match = re.match(r"(.*?)\d+\.", name)
    return match[1] if match else name
