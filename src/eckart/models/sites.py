"""Sites: the linears of a model that can be compressed; find them, select among them, read and replace them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.models.coded import CompressedLinear
from eckart.models.experts import Experts, layer_role
from eckart.models.families import (
    UnsupportedModelError,
    family_of,
    is_linear,
    language_model,
    position_readers,
    refuse_other_weights,
)
from eckart.models.heads import HeadGroups
from eckart.models.refusals import check_object

# The number of an expert, or of another member of a list, inside a block.
NUMBERS = re.compile(r"\.\d+\.")
# That of a group of heads, at the end of a path.
HEADS = re.compile(r"\.\d+$")
# What transformers' mixtures call their routers, and why those are no sites.
ROUTERS = {"gate", "router"}
ROUTER = (
    "; a router is no site: it has as many rows as there are experts, so that its factors would save next to nothing, "
    "and what it loses sends tokens to other experts"
)


@dataclass(frozen=True)
class Site:
    """One compressible linear.

    Attributes:
        name: module path in the model, "model.layers.3.mlp.down_proj".
        role: path inside the block, "mlp.down_proj".
        part: "attention" or "mlp" for a known family.
        block: index of the block, from 0.
        input_group: sites with the same value read the same tensor.
        d_in, d_out: widths.
        has_bias: whether the dense linear has a bias.
        of_source: whether it reads the tokens of an encoder-decoder's source: those of the encoder, and in the decoder
            the keys and values of cross-attention.
        of_positions: whether it reads relative positions, instead of the tokens or as well: it has no one input for
            each token, so that only methods without calibration take it, and it is selected only where it is named.
    """

    name: str
    role: str
    part: str
    block: int
    input_group: str
    d_in: int
    d_out: int
    has_bias: bool
    of_source: bool = False
    of_positions: bool = False

    @property
    def joint_group(self) -> str:
        """Sites with the same value can share a right factor: those that read one tensor, and the first linears of a
        layer's experts, which read tokens of one tensor.
        """
        role = layer_role(self.name)
        return self.input_group if role is None or role.endswith(".down_proj") else role

    @property
    def num_params(self) -> int:
        """Numbers of the dense weight; the bias, which stays, is not counted."""
        return self.d_in * self.d_out

    @property
    def break_even_rank(self) -> int:
        """The largest rank that stores no more numbers than the dense weight."""
        return self.num_params // (self.d_in + self.d_out)


def stacks_of(model: PreTrainedModel) -> tuple[nn.ModuleList, ...]:
    """The model's lists of blocks: one, or of an encoder-decoder the encoder's and the decoder's.

    Raises:
        UnsupportedModelError: a path of the family leads nowhere in this model.
    """
    family, language = family_of(model), language_model(model)
    stacks = []
    for path in (family.encoder, family.blocks):
        if path is None:
            continue
        try:
            stacks.append(language.get_submodule(path))
        except AttributeError as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} has no blocks at {path!r} of its language model, as its family "
                f"{language.config.model_type!r} should"
            ) from error
    return tuple(stacks)  # type: ignore[arg-type]


def blocks_of(model: PreTrainedModel) -> nn.ModuleList:
    """The model's list of blocks; of an encoder-decoder, a list of the encoder's and then the decoder's.

    Raises:
        UnsupportedModelError: as `stacks_of`.
    """
    stacks = stacks_of(model)
    return stacks[0] if len(stacks) == 1 else nn.ModuleList([block for blocks in stacks for block in blocks])


def block_names(model: PreTrainedModel) -> tuple[str, ...]:
    """The names of the model's blocks as modules of it, in order. Raises UnsupportedModelError as `stacks_of`."""
    return tuple(f"{_path_of(blocks, model)}.{index}" for blocks in stacks_of(model) for index in range(len(blocks)))


def common_blocks(model: PreTrainedModel, reference: PreTrainedModel) -> tuple[str, ...]:
    """The names of the blocks of two models that have the same.

    Raises:
        ValueError: they have not.
        UnsupportedModelError: as `blocks_of`.
    """
    names, expected = block_names(model), block_names(reference)
    if names != expected:
        raise ValueError(
            f"the model has {len(names)} blocks and the reference {len(expected)}, from {names[0]} and {expected[0]} "
            "on: is it the dense model that this one came from?"
        )
    return names


def _path_of(part: nn.Module, model: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is part)


def find_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """Every compressible linear in the model's blocks, in order. Embeddings, heads and poolers stay dense.

    Raises:
        UnsupportedModelError: the model is compressed already, keeps fused experts or other weights that are no
            linears', is quantised, holds adapters, is an encoder-decoder without a row, or has no linears.
    """
    check_object(model)
    for name in low_rank_modules(model):
        raise UnsupportedModelError(f"{name} is low-rank already; start from the dense model, or export it first")
    family, stacks, positions = family_of(model), stacks_of(model), position_readers(model)
    for blocks in stacks:
        refuse_other_weights(model, blocks)
    of_encoder = len(stacks[0]) if len(stacks) > 1 else 0
    sites = []
    for index, (name, block) in enumerate(zip(block_names(model), blocks_of(model), strict=True)):
        for part, inputs in family.parts.items():
            for shared in inputs:
                for paths in each_expert(block, shared):
                    of_tokens = [path for path in paths if path not in positions]
                    for path in each_group(block, paths):
                        first = path if path in positions else of_tokens[0]
                        of_source = index < of_encoder or path in family.crossing
                        site = _site(name, block, path, part, index, first)
                        if site is not None:
                            sites.append(replace(site, of_source=of_source, of_positions=path in positions))
    if not sites:
        places = " and ".join(_path_of(blocks, model) for blocks in stacks)
        raise UnsupportedModelError(f"{type(model).__name__}: its blocks at {places} hold no linear to compress")
    return tuple(sites)


def each_expert(block: nn.Module, paths: tuple[str, ...]) -> list[tuple[str, ...]]:
    """The paths, once for every expert of the block where they have a "*" for its number."""
    place = paths[0].partition(".*.")[0]
    if place == paths[0]:
        return [paths]
    experts = next((module for path, module in block.named_modules() if path == place), None)
    count = experts.num_experts if isinstance(experts, Experts) else 0
    return [tuple(path.replace("*", str(number)) for path in paths) for number in range(count)]


def each_group(block: nn.Module, paths: tuple[str, ...]) -> Iterator[str]:
    """The paths, with those of the groups of heads in place of an open projection's."""
    for path in paths:
        try:
            module = block.get_submodule(path)
        except AttributeError:
            module = None
        if isinstance(module, HeadGroups):
            yield from (f"{path}.{number}" for number in range(len(module.groups)))
        else:
            yield path


def _site(prefix: str, block: nn.Module, path: str, part: str, index: int, first: str) -> Site | None:
    name = f"{prefix}.{path}"
    try:
        module = block.get_submodule(path)
    except AttributeError:
        return None  # blocks of one model may differ, such as attention on every other one
    if not is_linear(module):
        raise UnsupportedModelError(f"{name} is a {type(module).__name__}, not a linear that can be factored")
    weight = read_weight(module)
    if not weight.is_floating_point():
        raise UnsupportedModelError(f"{name} is stored as {weight.dtype}; load the model in a float type")
    return Site(
        name=name,
        role=path,
        part=part,
        block=index,
        input_group=f"{prefix}.{first}",
        d_in=weight.shape[1],
        d_out=weight.shape[0],
        has_bias=getattr(module, "bias", None) is not None,
    )


def read_weight(module: nn.Module) -> Tensor:
    """The weight as (d_out, d_in), whatever the module stores. A view, not a copy."""
    weight: Tensor = module.weight.detach()  # type: ignore[operator]
    return weight.mT if isinstance(module, Conv1D) else weight


def select_sites(
    sites: Sequence[Site],
    *,
    include: str | Iterable[str] = (),
    exclude: str | Iterable[str] = (),
    blocks: str | None = None,
) -> tuple[Site, ...]:
    """The sites that match.

    Args:
        include, exclude: each a shell pattern on site names ("model.layers.*.mlp.*"), a role ("q_proj",
            "mlp.down_proj") or a part ("mlp", "attention"). No include means all but those that read relative
            positions, which only a pattern with their own last name includes, "pos_key_proj" or "*.0.*.pos_key_proj".
        blocks: "last 12", "first 4", "last 3/8" (of all), "8-19" (both ends in, from 0), or "0,5,7"; None means all.

    Raises:
        ValueError: a pattern matches nothing (the message lists roles and parts), a block range is malformed or
            outside the model, or no site matches all of it.
    """
    include, exclude = as_patterns(include), as_patterns(exclude)
    for pattern in (*include, *exclude):
        if not any(matches(site, pattern) for site in sites):
            roles = ", ".join(dict.fromkeys(NUMBERS.sub(".*.", site.role) for site in sites))
            parts = ", ".join(dict.fromkeys(site.part for site in sites))
            raise ValueError(
                f"{pattern!r} matches no site; roles: {roles}; parts: {parts}; or a pattern such as {sites[0].name!r}"
                f"{ROUTER if pattern.rpartition('.')[2] in ROUTERS else ''}"
            )
    numbers = None if blocks is None else parse_blocks(blocks, 1 + max(site.block for site in sites))
    selected = tuple(
        site
        for site in sites
        if (numbers is None or site.block in numbers)
        and ((not include and not site.of_positions) or any(_includes(pattern, site) for pattern in include))
        and not any(matches(site, pattern) for pattern in exclude)
    )
    if not selected:
        raise ValueError(
            f"no site matches all of it: include {list(include)}, exclude {list(exclude)}, blocks {blocks!r}"
        )
    return selected


def default_sites(model: PreTrainedModel) -> tuple[Site, ...]:
    """The sites that are selected where nothing is asked for. Raises UnsupportedModelError as `find_sites`."""
    return select_sites(find_sites(model))


def input_groups(model: PreTrainedModel) -> tuple[str, ...]:
    """One module for every tensor that the default sites of a dense model read of every token: q, k and v count once.

    The linears of experts are none of them: an expert reads some of a text's tokens.
    """
    return tuple(site.name for site in first_readers(default_sites(model)).values() if layer_role(site.name) is None)


def first_readers(sites: Iterable[Site]) -> dict[str, Site]:
    """{input group: the first of the sites that read it}."""
    first: dict[str, Site] = {}
    for site in sites:
        first.setdefault(site.input_group, site)
    return first


def joint_readers(sites: Iterable[Site], joint: Collection[str] = ()) -> dict[str, dict[str, Site]]:
    """{group: {input group: its first reader}}: what is calibrated before any of it is replaced.

    The input groups of a `Site.joint_group` in `joint` together, and every other one by itself, under its own name.
    """
    readers: dict[str, dict[str, Site]] = {}
    for site in sites:
        group = site.joint_group if site.joint_group in joint else site.input_group
        readers.setdefault(group, {}).setdefault(site.input_group, site)
    return readers


def as_patterns(value: str | Iterable[str]) -> tuple[str, ...]:
    """The patterns; a bare string is one pattern, not its letters."""
    return (value,) if isinstance(value, str) else tuple(value)


def matches(site: Site, pattern: str) -> bool:
    """Whether a shell pattern, a role or a part names the site; "experts.*.down_proj" is a role of every expert, and
    "k_proj" one of every group of its heads.
    """
    whole = HEADS.sub("", site.role)
    roles = {site.role, NUMBERS.sub(".*.", site.role), whole, whole.rsplit(".", 1)[-1]}
    return pattern in {site.part, *roles} or fnmatchcase(site.name, pattern)


def _includes(pattern: str, site: Site) -> bool:
    named = not site.of_positions or pattern.rpartition(".")[2] == site.role.rpartition(".")[2]
    return named and matches(site, pattern)


def parse_blocks(text: str, count: int) -> frozenset[int]:
    """Block numbers out of "last 12", "first 1/4", "8-19" or "0,5,7", for a model of `count` blocks.

    A fraction is of the blocks, rounded, and at least one: 12 of LLaMA-7B's 32 are "last 3/8" of any model.

    Raises:
        ValueError: malformed, or outside 0 ... count - 1.
    """
    words = text.strip().lower()
    if match := re.fullmatch(r"(first|last)\s+(\d+)(?:/(\d+))?", words):
        number = int(match[2])
        if match[3]:
            if not 0 < number <= int(match[3]):
                raise ValueError(f"blocks {text!r}: {number}/{match[3]} is not a share in (0, 1]")
            number = max(1, round(count * number / int(match[3])))
        if not 1 <= number <= count:
            raise ValueError(f"blocks {text!r}: this model has {count} blocks")
        return frozenset(range(number) if match[1] == "first" else range(count - number, count))
    if not re.fullmatch(r"\d+(-\d+)?(\s*,\s*\d+(-\d+)?)*", words):
        raise ValueError(f"blocks {text!r} is none of 'last 12', 'first 1/4', '8-19', '0,5,7'")
    numbers: set[int] = set()
    for item in words.split(","):
        start, _, end = item.strip().partition("-")
        if int(end or start) < int(start):
            raise ValueError(f"blocks {text!r}: {item.strip()} runs backward")
        numbers.update(range(int(start), int(end or start) + 1))
    if max(numbers) >= count:
        raise ValueError(f"blocks {text!r}: this model has blocks 0 ... {count - 1}")
    return frozenset(numbers)


def low_rank_modules(model: nn.Module) -> dict[str, CompressedLinear]:
    """{name: module} of every linear in the model that was compressed, into factors or into few bits."""
    return {name: module for name, module in model.named_modules() if isinstance(module, CompressedLinear)}


def replace_module(model: nn.Module, name: str, module: nn.Module) -> None:
    """Replace the module called `name` by `module`, in place."""
    model.set_submodule(name, module)
