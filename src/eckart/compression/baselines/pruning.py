"""Pruning: whole attention heads and MLP channels removed, as LLM-Pruner does.

A unit is removed as one (LLM-Pruner section 3.1, "coupled structures"): a head is its rows of q, k, v and its
columns of o; with grouped queries, a key-value head and every query head that reads it; a channel is its rows of gate
and up and its column of down. The units are stated here for each family. torch-pruning, which finds them by tracing,
finds the same (a test compares), but does not terminate where heads are grouped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.calibration.gradients import language_loss
from eckart.data.encoding import check_vocabulary
from eckart.data.tokens import Tokens
from eckart.models.families import UnsupportedModelError
from eckart.models.sites import blocks_of, find_sites, read_weight
from eckart.support.precision import in_float32
from eckart.support.progress import Track, silent

Part = Literal["heads", "channels"]
# {(block, part): indices of units, ascending}.
Kept = Mapping[tuple[int, Part], Tensor]


@dataclass(frozen=True)
class Layout:
    """Where a family keeps its heads and channels; paths are inside a block.

    Attributes:
        attention, mlp: the modules whose width attributes are updated.
        qkv: the three projections, or the one that holds all three, one after the other.
        out: the projection that reads the heads.
        up: the projections that write the channels. down: the one that reads them.
        width: the attention's attribute with the width of a head.
    """

    attention: str
    qkv: tuple[str, ...]
    out: str
    mlp: str
    up: tuple[str, ...]
    down: str
    width: str = "head_dim"


GATED = Layout(
    "self_attn",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
    "mlp",
    ("mlp.gate_proj", "mlp.up_proj"),
    "mlp.down_proj",
)
ENCODER = Layout(
    "attention.self",
    ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attention.output.dense",
    "intermediate",
    ("intermediate.dense",),
    "output.dense",
    width="attention_head_size",
)
# A family belongs here when its attention takes the number of heads from the projections or from the module, and not
# from the config, which all blocks share.
LAYOUTS: dict[str, Layout] = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "gemma2": GATED,
    "gemma3_text": GATED,
    "opt": Layout(
        "self_attn",
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "self_attn.out_proj",
        "",
        ("fc1",),
        "fc2",
    ),
    "gpt2": Layout("attn", ("attn.c_attn",), "attn.c_proj", "mlp", ("mlp.c_fc",), "mlp.c_proj"),
    "bert": ENCODER,
    "roberta": ENCODER,
}
# Of models that do not generate, the classes with a loss that text alone gives.
LOSSES = ("ForMaskedLM", "ForSequenceClassification")


@dataclass(frozen=True)
class Units:
    """The heads or the channels of one block, which can be removed one by one.

    Attributes:
        rows: {path in the block: (units, size) output features of that linear, by unit}.
        columns: the same for input features.
        numbers: in the weights of one unit.
    """

    rows: Mapping[str, Tensor]
    columns: Mapping[str, Tensor]
    numbers: int

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def prune_structures(
    model: PreTrainedModel,
    keep: float,
    tokens: Tokens,
    *,
    samples: int = 10,
    length: int = 64,
    first: int | None = None,
    last: int | None = None,
    track: Track = silent,
) -> dict[str, Any]:
    """Remove the heads and channels of least importance, in place, until a share `keep` of the linears remains.

    The share is of all compressible linears, as everywhere here; since some blocks stay whole, the rest lose more.
    Those all lose the same share, and units compete inside their block (LLM-Pruner's block-wise setting). Heads are
    coarse: a block keeps the number nearest to its share, and its channels make up for the rest.

    The result stays in memory: its blocks have shapes of their own, which no config states. LLM-Pruner's recovery by
    LoRA is not part of it.

    Args:
        keep: in (0, 1]; at 1 nothing is changed and nothing is read.
        tokens: calibration text, of which the first `samples` windows and their first `length` tokens are read; 10 and
            64 are LLM-Pruner's.
        first, last: blocks left whole at either end. None is an eighth and a sixteenth of the blocks, rounded: 4 and 2
            of LLaMA-7B's 32, as in the authors' script.

    Returns:
        {"keep": kept share, "first", "last", "samples", "heads": {block: kept of it}, "channels": {block: how many}}.

    Raises:
        ValueError: keep leaves a block without a head or a channel, or what `importances` raises.
        UnsupportedModelError: a family without a row in LAYOUTS. Nothing was changed.
    """
    units = find_units(model)
    count = len(blocks_of(model))
    first = round(count / 8) if first is None else first
    last = round(count / 16) if last is None else last
    if first < 0 or last < 0 or first + last >= count:
        raise ValueError(f"first {first} and last {last} leave no block to prune of {count}")
    total = sum(site.num_params for site in find_sites(model))
    pruned = {key: group for key, group in units.items() if first <= key[0] < count - last}
    facts: dict[str, Any] = {"keep": 1.0, "first": first, "last": last, "samples": 0, "heads": {}, "channels": {}}
    if keep == 1:
        return facts
    numbers = allocate(pruned, total, keep)
    scores = importances(model, pruned, tokens, samples=samples, length=length, track=track)
    kept = {key: scores[key].topk(number).indices.sort().values for key, number in numbers.items()}
    remove(model, pruned, kept)
    removed = sum((len(group) - numbers[key]) * group.numbers for key, group in pruned.items())
    return facts | {
        "keep": (total - removed) / total,
        "samples": min(samples, len(tokens)),
        "heads": {str(block): index.tolist() for (block, part), index in kept.items() if part == "heads"},
        "channels": {str(block): len(index) for (block, part), index in kept.items() if part == "channels"},
    }


def find_units(model: PreTrainedModel) -> dict[tuple[int, Part], Units]:
    """{(block, "heads" or "channels"): its units}, blocks in order.

    Raises:
        UnsupportedModelError: a family without a row in LAYOUTS, or what `find_sites` refuses.
    """
    layout = LAYOUTS.get(model.config.model_type)
    if layout is None or not (model.can_generate() or type(model).__name__.endswith(LOSSES)):
        raise UnsupportedModelError(
            f"{type(model).__name__} ({model.config.model_type}): which heads and channels belong together is not "
            f"known, or there is no loss; pruning takes language models and text classifiers of {', '.join(LAYOUTS)}"
        )
    find_sites(model)
    units: dict[tuple[int, Part], Units] = {}
    for index, block in enumerate(blocks_of(model)):
        units[index, "heads"] = _heads(block, layout)
        units[index, "channels"] = _channels(block, layout)
    return units


def _heads(block: nn.Module, layout: Layout) -> Units:
    width = cast(int, getattr(block.get_submodule(layout.attention), layout.width))
    out_columns = _shape(block, layout.out)[1]
    fused = len(layout.qkv) == 1
    groups = (out_columns if fused else _shape(block, layout.qkv[1])[0]) // width  # of key-value heads
    columns = torch.arange(out_columns).view(groups, -1)
    rows: dict[str, Tensor] = {}
    if fused:
        rows[layout.qkv[0]] = torch.cat([columns + part * out_columns for part in range(3)], 1)
    else:
        for path in layout.qkv:
            rows[path] = torch.arange(_shape(block, path)[0]).view(groups, -1)
    return _units(block, rows, {layout.out: columns})


def _channels(block: nn.Module, layout: Layout) -> Units:
    columns = torch.arange(_shape(block, layout.down)[1])[:, None]
    return _units(block, dict.fromkeys(layout.up, columns), {layout.down: columns})


def _units(block: nn.Module, rows: dict[str, Tensor], columns: dict[str, Tensor]) -> Units:
    numbers = sum(index.shape[1] * _shape(block, path)[1] for path, index in rows.items())
    numbers += sum(index.shape[1] * _shape(block, path)[0] for path, index in columns.items())
    return Units(rows, columns, numbers)


def _shape(block: nn.Module, path: str) -> tuple[int, int]:
    d_out, d_in = read_weight(block.get_submodule(path)).shape
    return d_out, d_in


def allocate(units: Mapping[tuple[int, Part], Units], total: int, keep: float) -> dict[tuple[int, Part], int]:
    """How many units of each kind every block keeps, so that at most a share `keep` of `total` numbers remains.

    Every block gets the same share of itself. What a block leaves unspent, because units are whole, goes to the next.

    Args:
        units: of the blocks that may be pruned. total: numbers of all compressible linears.

    Raises:
        ValueError: a block would keep no head or no channel.
    """
    size = sum(len(group) * group.numbers for group in units.values())
    share = 1 - (1 - keep) * total / size
    spare = 0.0
    kept: dict[tuple[int, Part], int] = {}
    for block in dict.fromkeys(block for block, _ in units):
        heads, channels = units[block, "heads"], units[block, "channels"]
        budget = share * (len(heads) * heads.numbers + len(channels) * channels.numbers) + spare
        # 1e-6: a budget that is whole in exact arithmetic stays whole.
        rest = {n: int((budget - n * heads.numbers) / channels.numbers + 1e-6) for n in range(1, len(heads) + 1)}
        affordable = {n: m for n, m in rest.items() if m >= 1}
        if not affordable:
            raise ValueError(
                f"keep {keep} leaves {max(share, 0):.3f} of each block that may be pruned, less than one head and one "
                "channel; raise keep, or lower first and last"
            )
        # Where the channels cannot use up the rest of the budget, more heads do.
        number = min(affordable, key=lambda n: (max(0, affordable[n] - len(channels)), abs(n - share * len(heads))))
        kept[block, "heads"] = number
        kept[block, "channels"] = min(affordable[number], len(channels))
        spare = budget - number * heads.numbers - kept[block, "channels"] * channels.numbers
    return kept


def importances(
    model: PreTrainedModel,
    units: Mapping[tuple[int, Part], Units],
    tokens: Tokens,
    *,
    samples: int = 10,
    length: int = 64,
    track: Track = silent,
) -> dict[tuple[int, Part], Tensor]:
    """{(block, part): (units,) float32}: the sum over a unit's weights of |w dL/dw|.

    LLM-Pruner Eq. 5 to first order, per weight and summed over the unit ("param_first", "sum"); L is the mean over
    samples of the next-token loss; of a masked language model that of 15 % of the tokens, masked, the same ones each
    time; of a classifier that of its likeliest class, as calibration text has no labels. Biases do not count.

    Raises:
        ValueError: no positive count of samples, samples of a single token, tokens of another vocabulary, or a gradient
            that is not finite (names the linear).

    Cost: a forward and a backward pass per sample; the gradients of the units' weights are in memory together.
    Gradients in float16 would underflow to zero: such a model is in float32 meanwhile, and takes twice its memory.
    """
    check_vocabulary(model, tokens.ids)
    rows = [ids[mask][:length] for ids, mask in zip(tokens.ids[:samples], tokens.mask[:samples], strict=True)]
    if samples < 1 or length < 2 or not rows or min(len(row) for row in rows) < 2:
        raise ValueError(f"samples {samples}, length {length}: pruning needs windows of two tokens or more")
    blocks = blocks_of(model)
    paths = dict.fromkeys(
        (block, path) for (block, _), group in units.items() for path in (*group.rows, *group.columns)
    )
    generator = torch.Generator().manual_seed(0)
    modules = {key: blocks[key[0]].get_submodule(key[1]) for key in paths}
    with (
        in_float32(model, {torch.float16}),
        torch.enable_grad(),
        _only_gradients_of(model, list(modules.values())),
    ):
        for row in track(rows, "llm-pruner: gradients", len(rows)):
            ids = row[None].to(model.device)
            (_loss(model, ids, tokens.mask_token, generator) / len(rows)).backward()
        salience = {key: _salience(f"block {key[0]}: {key[1]}", module) for key, module in modules.items()}
    scores: dict[tuple[int, Part], Tensor] = {}
    for (block, part), group in units.items():
        score = torch.zeros(len(group))
        for path, index in group.rows.items():
            score += salience[block, path].sum(1)[index].sum(1)
        for path, index in group.columns.items():
            score += salience[block, path].sum(0)[index].sum(1)
        scores[block, part] = score
    return scores


def _loss(model: PreTrainedModel, ids: Tensor, mask_token: int | None, generator: torch.Generator) -> Tensor:
    """The loss of one sample (1, length)."""
    if model.can_generate():
        return nn.functional.cross_entropy(model(input_ids=ids).logits[0, :-1].float(), ids[0, 1:])
    if type(model).__name__.endswith("ForSequenceClassification"):
        logits = model(input_ids=ids).logits.float()
        return nn.functional.cross_entropy(logits, logits.detach().argmax(-1))
    return language_loss(model, ids, torch.ones_like(ids, dtype=torch.bool), mask_token, generator)[0]


def _salience(name: str, module: nn.Module) -> Tensor:
    """|w dL/dw|, (d_out, d_in) in float32, on the CPU."""
    weight = cast(Tensor, module.weight)
    assert weight.grad is not None
    product = (weight.detach().float() * weight.grad.float()).abs().cpu()
    if not torch.isfinite(product).all():
        raise ValueError(f"{name}: a gradient is not finite; the model or its calibration text is broken")
    return product.mT if isinstance(module, Conv1D) else product


@contextmanager
def _only_gradients_of(model: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, the weights of `modules` gather gradients and no other parameter does; afterwards all is as before."""
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for module in modules:
            cast(Tensor, module.weight).requires_grad_(True)
        yield
    finally:
        for parameter, (required, gradient) in before.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient


@torch.no_grad()
def remove(model: PreTrainedModel, units: Mapping[tuple[int, Part], Units], kept: Kept) -> None:
    """Remove every unit that is not in `kept` from the model, in place: its rows, its biases, its columns."""
    layout, blocks = LAYOUTS[model.config.model_type], blocks_of(model)
    for (number, part), index in kept.items():
        block, group = blocks[number], units[number, part]
        for path, rows in group.rows.items():
            _select(block.get_submodule(path), 0, rows[index].flatten().sort().values)
        for path, columns in group.columns.items():
            _select(block.get_submodule(path), 1, columns[index].flatten())
        if part == "channels":
            _tell(block.get_submodule(layout.mlp), intermediate_size=len(index))
        else:
            attention = block.get_submodule(layout.attention)
            width = _shape(block, layout.out)[1]
            heads = width // cast(int, getattr(attention, layout.width))
            sizes = {"split_size": width, "all_head_size": width}
            _tell(attention, num_heads=heads, num_attention_heads=heads, num_key_value_heads=len(index), **sizes)


def _select(module: nn.Module, axis: Literal[0, 1], index: Tensor) -> None:
    """Keep these output features (axis 0) or input features (axis 1) of a linear, in place."""
    weight, bias = cast(nn.Parameter, module.weight), cast(nn.Parameter | None, module.bias)
    index = index.to(weight.device)
    stored = 1 - axis if isinstance(module, Conv1D) else axis
    module.weight = nn.Parameter(weight.index_select(stored, index), requires_grad=weight.requires_grad)
    if axis == 0 and bias is not None:
        module.bias = nn.Parameter(bias.index_select(0, index), requires_grad=bias.requires_grad)
    _tell(module, **{name: len(index) for name in (("out_features", "nf"), ("in_features", "nx"))[axis]})


def _tell(module: nn.Module, **widths: int) -> None:
    """Set those of the attributes that the module has."""
    for name, value in widths.items():
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, value)
