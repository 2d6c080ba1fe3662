"""Experts: those of a mixture as linears of their own, where transformers keeps all of a layer in one tensor.

transformers computes with `gate_up_proj` (experts, d_out, d_in) and `down_proj` as parameters of one module. Opened,
the same module has a child for each expert, with two ordinary linears: each is a site like any other, with inputs, a
rank and factors of its own, and is saved under its own name, "mlp.experts.3.down_proj".
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightConverter

from eckart.models.coded import CompressedLinear
from eckart.models.linear import LowRankLinear

# The parameters of a fused module, first to last; those that are there are its experts' linears.
PROJECTIONS = ("gate_up_proj", "up_proj", "down_proj")
# What transformers says of the layout of a fused module, in each module that its experts interface knows.
LAYOUT = ("has_gate", "has_bias", "is_transposed", "num_experts")
# The path of an expert's linear: that of its module, the expert's number, the linear.
EXPERT = re.compile(r"(?P<experts>.*)\.(?P<number>\d+)\.(?P<linear>gate_up_proj|up_proj|down_proj)$")


@dataclass(frozen=True)
class Route:
    """The tokens that one expert is given, of a batch.

    Attributes:
        tokens: (n,) their places in the batch, ascending. weights: (n,) what the router multiplies its output by.
    """

    tokens: Tensor
    weights: Tensor

    @classmethod
    def to_each(cls, num_experts: int, chosen: Tensor, weights: Tensor) -> list[Route]:
        """The tokens for which a router has chosen each expert: one sort for all of them, and one wait for a GPU.

        Args:
            chosen: (tokens, k) numbers of experts. weights: (tokens, k).
        """
        places = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=num_experts).tolist()
        tokens, sorted_weights = places // chosen.shape[1], weights.flatten()[places]
        # A number past the last expert's stands for an expert that is elsewhere.
        return [cls(*pair) for pair in zip(tokens.split(counts), sorted_weights.split(counts), strict=True)][
            :num_experts
        ]


class Expert(nn.Module):
    """The linears of one expert; `Experts` runs them."""

    def __init__(self, linears: dict[str, nn.Linear]) -> None:
        super().__init__()
        for name, linear in linears.items():
            self.add_module(name, linear)


class Experts(nn.Module):
    """The experts of one layer, each a child by its number; computes what the fused module did, as its loop does.

    Empty tensors are under the fused module's keys: a loader that does not know eckart compares their shapes and stops,
    instead of building random experts.

    Args:
        fused: the module of transformers; its numbers are copied.

    Attributes:
        visits_all: whether experts without a token are run too, on no rows: whoever waits for each of them needs that.

    Cost: as transformers' loop over experts ("eager"); its grouped products are for one tensor of all experts.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        # Its activation and gate, whatever they are; it holds no numbers, and is no child.
        self.__dict__["fused"] = _without_numbers(fused)
        self.visits_all = False
        self.num_experts = cast(int, fused.num_experts)
        names = projections_of(fused)
        for number in range(self.num_experts):
            self.add_module(str(number), Expert({name: _linear(fused, name, number) for name in names}))
        for name in names:
            like = cast(Tensor, getattr(fused, name))
            device = None if like.device.type == "meta" else like.device
            self.register_buffer(name, torch.empty(0, dtype=like.dtype, device=device))

    def forward(self, hidden_states: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """(tokens, width): the sum over the chosen experts, weighted; see `Route.to_each` for the arguments."""
        total = torch.zeros_like(hidden_states)
        routes = Route.to_each(self.num_experts, chosen, weights)
        visited = [number for number, route in enumerate(routes) if len(route.tokens) or self.visits_all]
        lender = self._lender(visited)
        product = None if lender is None else lender.right(hidden_states)
        for number in visited:
            route = routes[number]
            x = hidden_states[route.tokens]
            if lender is not None and product is not None:
                lender.product.give(x, product[route.tokens])
            y = self.run(number, x) * route.weights[:, None]
            total.index_add_(0, route.tokens, y.to(total.dtype))
        return total

    def run(self, number: int, x: Tensor) -> Tensor:
        """The output of one expert, not weighted yet."""
        fused, (up, down) = self.__dict__["fused"], self._linears(number)
        gate = fused._apply_gate if fused.has_gate else fused.act_fn  # noqa: SLF001 (transformers' experts interface)
        return cast(Tensor, down(gate(up(x))))

    def _linears(self, number: int) -> tuple[nn.Module, nn.Module]:
        """(the first linear, the last one) of an expert."""
        linears = cast(nn.Module, self._modules[str(number)])._modules  # noqa: SLF001 (by name)
        up, *_, down = (cast(nn.Module, linears[name]) for name in PROJECTIONS if name in linears)
        return up, down

    def _lender(self, numbers: Iterable[int]) -> LowRankLinear | None:
        """Whose right factor these experts' first linears share: what it keeps of a token is computed once for all."""
        ups = [self._linears(number)[0] for number in numbers]
        lenders = {(up.lender or up) if isinstance(up, LowRankLinear) else None for up in ups}
        lender = lenders.pop() if len(lenders) == 1 else None
        return lender if lender is not None and lender.product.readers > 1 else None

    @property
    def is_transposed(self) -> bool:
        """Whether the fused module keeps (experts, d_in, d_out)."""
        return bool(self.__dict__["fused"].is_transposed)

    def close(self) -> nn.Module:
        """The fused module with these experts' numbers.

        Raises:
            ValueError: an expert's linear is no dense one.
        """
        fused = copy.copy(self.__dict__["fused"])
        fused._parameters = dict(fused._parameters)  # noqa: SLF001 (a copy shares its tables with what it is of)
        for name in [name for name in PROJECTIONS if name in self._buffers]:
            linears = [self.get_submodule(f"{number}.{name}") for number in range(self.num_experts)]
            if not all(type(linear) is nn.Linear for linear in linears):
                raise ValueError(f"{name}: an expert is compressed, and has no place in one tensor of all")
            weight = torch.stack([cast(nn.Linear, linear).weight.detach() for linear in linears])
            fused.register_parameter(
                name, nn.Parameter(weight.mT.contiguous() if fused.is_transposed else weight, weight.requires_grad)
            )
            if fused.has_bias:
                bias = torch.stack([cast(nn.Linear, linear).bias.detach() for linear in linears])
                fused.register_parameter(f"{name}_bias", nn.Parameter(bias))
        return cast(nn.Module, fused)


def projections_of(module: nn.Module) -> tuple[str, ...]:
    """The names of the parameters that are the linears of a fused module's experts; empty of any other module."""
    if isinstance(module, Experts) or not all(hasattr(module, name) for name in LAYOUT):
        return ()
    if getattr(module, "has_post_expert_norm", False):
        return ()
    parameters = dict(module.named_parameters(recurse=False))
    names = tuple(name for name in PROJECTIONS if name in parameters)
    known = {*names, *(f"{name}_bias" for name in names)}
    shapes = {parameters[name].shape[0] for name in names if parameters[name].ndim == 3}
    return names if len(names) == 2 and shapes == {module.num_experts} and parameters.keys() <= known else ()


def fused_experts(model: nn.Module) -> dict[str, nn.Module]:
    """{name: module} of every module that keeps all experts of a layer in one tensor, and can be opened."""
    return {name: module for name, module in model.named_modules() if projections_of(module)}


def opened_experts(model: nn.Module) -> dict[str, Experts]:
    """{name: module} of the experts that are open."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Experts)}


def open_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Give every expert of the model's mixtures linears of its own, in place; the model computes the same.

    `load_model` does it. A model without experts, or with open ones, is returned as it is. Of a model that was not
    compressed `save_pretrained`, and so `eckart.save`, writes the experts as transformers does, see `close_experts`.

    Cost: a copy of one layer's experts at a time.
    """
    fused = fused_experts(model)
    for name in fused:
        model.set_submodule(name, Experts(model.get_submodule(name)))
    if fused or opened_experts(model):
        _keep_names(model)
        model.__dict__["save_pretrained"] = functools.partial(_save_pretrained, model)
    return model


def close_experts(model: PreTrainedModel) -> PreTrainedModel:
    """Undo `open_experts`, in place: experts that are dense linears again become one tensor a layer.

    Raises:
        ValueError: an expert is compressed; names its layer.
    """
    for name, experts in opened_experts(model).items():
        try:
            model.set_submodule(name, experts.close())
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    for name in ("_weight_conversions", "save_pretrained"):
        model.__dict__.pop(name, None)
    if conversions := model.__dict__.pop("_closed_conversions", None):
        model.__dict__["_weight_conversions"] = conversions
    return model


@dataclass(frozen=True)
class Source:
    """Where files have the numbers of an expert's linear.

    Attributes:
        keys: of the tensors that make it, one below the other.
        number: of the expert, where a tensor is that of all experts. transposed: whether it is (experts, d_in, d_out).
    """

    keys: tuple[str, ...]
    number: int | None = None
    transposed: bool = False

    def shape(self, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        """Of the linear's tensor. shapes: {key: shape in the files}."""
        first = shapes[self.keys[0]][0 if self.number is None else 1 :]
        if self.transposed:
            first = first[::-1]
        return (sum(shapes[key][0] for key in self.keys), *first[1:]) if self.number is None else first

    def make(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The linear's tensor. tensors: {key: tensor}."""
        if self.number is None:
            return torch.cat([tensors[key] for key in self.keys])
        one = tensors[self.keys[0]][self.number]
        return (one.mT if self.transposed else one).clone(memory_format=torch.contiguous_format)


def sources_of(model: PreTrainedModel, stored: Mapping[str, str]) -> dict[str, Source]:
    """{name of a parameter of an open expert: where files have it}, of a model that was stored with closed experts.

    They keep all experts of a layer in one tensor, as transformers computes with them, or one tensor of each, whose
    names are in transformers' table.

    Args:
        stored: {name without the base model's prefix: key in the files}.
    """
    pieces = _pieces_of(get_model_conversion_mapping(model))
    prefix = f"{model.base_model_prefix}."
    sources = {}
    for place, experts in opened_experts(model).items():
        for name, _ in experts.named_parameters():
            number, linear, kind = name.split(".", 2)
            of_all = stored.get(f"{place}.{linear}{'_bias' if kind == 'bias' else ''}".removeprefix(prefix))
            keys = [stored.get(f"{place}.{number}.{piece}.{kind}".removeprefix(prefix)) for piece in pieces[linear]]
            if of_all is not None:
                transposed = kind == "weight" and experts.is_transposed
                sources[f"{place}.{name}"] = Source((of_all,), int(number), transposed)
            elif all(key is not None for key in keys):
                sources[f"{place}.{name}"] = Source(tuple(key for key in keys if key is not None))
    return sources


def _pieces_of(conversions: Iterable[Any]) -> dict[str, tuple[str, ...]]:
    """{linear: the names under which files keep what is one below the other in it}: gate and up, as a rule."""
    pieces: dict[str, tuple[str, ...]] = {name: (name,) for name in PROJECTIONS}
    for each in conversions:
        linear = next((name for name in PROJECTIONS if str(each.target_patterns[0]).endswith(f"experts.{name}")), None)
        matches = [re.search(r"experts\W+(\w+)\.weight$", str(pattern)) for pattern in each.source_patterns]
        if linear is not None and isinstance(each, WeightConverter) and all(matches):
            pieces[linear] = tuple(match[1] for match in matches if match)
    return pieces


def expert_of(path: str) -> tuple[str, int] | None:
    """(path of the experts' module, number) of an expert's linear; None of any other linear."""
    match = EXPERT.match(path)
    return (match["experts"], int(match["number"])) if match else None


def share_of_tokens(model: PreTrainedModel, path: str) -> Fraction:
    """How many of a text's tokens a linear reads, on average over its layer's experts: k of E; 1 of any other linear.

    Raises:
        ValueError: the configuration does not say how many experts a token is given.
    """
    place = expert_of(path)
    if place is None:
        return Fraction(1)
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    if chosen is None:
        raise ValueError(
            f"{type(model).__name__}: its configuration has no num_experts_per_tok, experts for each token"
        )
    return Fraction(chosen, cast(Experts, model.get_submodule(place[0])).num_experts)


def every_expert(root: nn.Module, path: str) -> list[str]:
    """The paths of the same linear of every expert of its layer; none of a linear that is no expert's."""
    place = expert_of(path)
    if place is None:
        return []
    experts, linear = cast(Experts, root.get_submodule(place[0])), path.rpartition(".")[2]
    return [f"{place[0]}.{number}.{linear}" for number in range(experts.num_experts)]


def layer_role(name: str) -> str | None:
    """What an expert's linear, or the input group of it, has in common with those of its layer's other experts.

    "layers.3.mlp.experts.*.down_proj"; None of a linear that is no expert's.
    """
    place = expert_of(name)
    return None if place is None else f"{place[0]}.*.{name.rpartition('.')[2]}"


def without_merging(conversions: list[Any]) -> list[Any]:
    """transformers' conversions of stored tensors, without those that merge experts into one tensor."""
    targets = re.compile(r"experts\W+(" + "|".join(PROJECTIONS) + ")")
    return [
        each
        for each in conversions
        if not (isinstance(each, WeightConverter) and any(map(targets.search, each.target_patterns)))
    ]


def routers_of(block: nn.Module) -> Iterator[str]:
    """Paths of the linears next to open experts that give a number for each of them: routers, and no sites."""
    for path, module in block.named_modules():
        if isinstance(module, Experts):
            parent = path.rpartition(".")[0]
            for name, other in block.get_submodule(parent).named_children():
                if isinstance(other, nn.Linear) and other.out_features in (1, module.num_experts):
                    yield f"{parent}.{name}" if parent else name


def _save_pretrained(
    model: PreTrainedModel,
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    **more: Any,
) -> None:
    """`PreTrainedModel.save_pretrained` of a model with open experts: where it is dense, as one with closed ones.

    Raises:
        ValueError: a dense model, of which a state dict is given.

    Cost: of a dense model a copy of all experts; the open ones stay what they are, for an optimiser that holds them.
    """
    save = functools.partial(type(model).save_pretrained, model, save_directory, is_main_process)
    if any(isinstance(module, CompressedLinear) for module in model.modules()):
        return save(state_dict, **more)
    if state_dict is not None:
        raise ValueError(
            f"the experts of this {type(model).__name__} are linears of their own (eckart.open_experts), and no loader "
            "reads a state dict that has them so: save without state_dict, or after "
            "eckart.models.experts.close_experts(model)"
        )
    opened = opened_experts(model)
    close_experts(model)
    try:
        save(**more)
    finally:
        for place, experts in opened.items():
            model.set_submodule(place, experts)
        open_experts(model)


def _keep_names(model: PreTrainedModel) -> None:
    """Have `save_pretrained` write the experts' linears under their own names, in place."""
    known = vars(model).get("_weight_conversions")
    if known is None:
        mapping = get_model_conversion_mapping(model, add_legacy=False)
        known = [each for each in mapping if not isinstance(each, PrefixChange)]
    else:
        model.__dict__["_closed_conversions"] = known
    model.__dict__["_weight_conversions"] = without_merging(known)


def _without_numbers(fused: nn.Module) -> nn.Module:
    """A copy of a fused module that has its settings and no parameters."""
    settings = copy.copy(fused)
    settings._parameters = {}  # noqa: SLF001 (a copy shares its tables with what it is of)
    return settings


def _linear(fused: nn.Module, name: str, number: int) -> nn.Linear:
    """One expert's linear, in memory of its own."""
    weight, bias = cast(Tensor, getattr(fused, name)).detach()[number], None
    weight = weight.mT if fused.is_transposed else weight
    if fused.has_bias:
        bias = cast(Tensor, getattr(fused, f"{name}_bias")).detach()[number]
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    if bias is not None:
        linear.bias = nn.Parameter(bias.clone())
    return linear
