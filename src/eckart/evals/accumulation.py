"""Accumulation: the error of every block of a compressed model, split into its own and what it inherits.

The probing paper's Russian text names the cumulative error of compressed layers as what remains to be studied; no paper
defines it. This is our definition.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.evals.means import mean_of
from eckart.evals.result import TRAITS, EvalResult
from eckart.evals.windows import cut_windows, is_causal
from eckart.support.progress import Track, silent

# What is kept of a block on a window: means over its tokens, in this order. The last two, of which growth is the ratio,
# are relative to the dense state before the block, the others to that after it.
KEPT = ("error", "own", "inherited", "overlap", "passed on", "arriving")
SCORES = ("error", "own", "inherited")


@dataclass(frozen=True)
class _Visit:
    """A block while its model reads a batch: what it was given, what it gave, and what it gives for other states."""

    name: str
    given: Float[Tensor, "rows tokens width"]
    gave: Float[Tensor, "rows tokens width"]
    again: Callable[[Tensor], Tensor]


@torch.inference_mode()
def accumulation(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    blocks: Sequence[str],
    stream: Int[Tensor, "tokens"],
    *,
    length: int,
    limit: int | None = None,
    batch_size: int = 8,
    task: str = "accumulation",
    settings: dict[str, Any] | None = None,
    track: Track = silent,
) -> EvalResult:
    """Which blocks of a compressed model err by themselves, and which carry on the errors of those before them.

    Let h_k be the dense model's hidden states after block k and B_k(x) what that block makes of states x; h'_k and B'_k
    are the compressed model's. What is wrong after block k, e_k = h'_k - h_k, is the sum of two parts:

        own_k       = B'_k(h_k-1) - B_k(h_k-1)      the compressed block errs, though it is given the dense states;
        inherited_k = B'_k(h'_k-1) - B'_k(h_k-1)    the same block makes this of what was wrong before it.

    At every token the squared norm of each is divided by that of h_k, and the mean is taken over a window's tokens.
    (Sums over tokens would be of the first token alone: trained decoders give it a state hundreds of times as long as
    any other, 98 % of the sum of squares in the middle of SmolLM2.) The squares of the parts do not add up, as the
    parts may point the same way or against each other: error = own + inherited + overlap, where overlap is
    2 <own_k, inherited_k> / |h_k|^2, negative where a block undoes some of what it inherits.

    An error of more than 1 is possible: a token whose state the compressed model makes longer than the dense one does.

    Args:
        model, reference: the compressed model, and the dense one that it came from.
        blocks: names of the blocks' modules in both, in the order in which they run.
        stream: (n,) token ids of the text.
        length, limit: windows of the text, as in `perplexity`. They are whole, so there is no padding.
        batch_size: windows at a time: memory and speed only.

    Returns:
        value = error after the last block, before the final norm. It is, as all scores are, the arithmetic mean over
        windows, so that the sum above holds for them; stderr is from the spread between windows. examples: the value
        of each window. Scores of every block K from 1: `error.K`, `own.K`, `inherited.K`. details: `blocks`, for each
        its number as `block`, its `overlap`, and its `growth`: |inherited_k|^2 over |e_k-1|^2, both divided by
        |h_k-1|^2 at every token before the means are taken. It is 1 where a block adds the same to any states, and None
        where nothing is inherited.

    Raises:
        ValueError: a block that one of the models lacks, states of other widths, blocks that do not run once each in
            this order or give something else when they are called again, a state that is not finite, and what
            `cut_windows` raises of either model.

    Cost: a forward pass of each model without its head, and another of the compressed model's blocks; memory for the
    dense model's states at every block, of one batch.
    """
    if not blocks:
        raise ValueError(f"{task} needs the names of the model's blocks")
    for each in (model, reference):
        rows = cut_windows(each, stream, length=length, limit=limit)
    batches = rows.split(batch_size)
    parts = [_compare(model, reference, blocks, ids, task) for ids in track(batches, task, len(batches))]
    means = dict(zip(KEPT, torch.cat(parts, dim=1).unbind(2), strict=True))  # (blocks, windows) of each
    last = mean_of(means["error"][-1])
    return EvalResult(
        task=task,
        metric="relative error",
        value=last.value,
        stderr=last.stderr,
        n=last.n,
        traits=TRAITS["accumulation"],
        settings={"length": length, "windows": len(rows), "blocks": len(blocks), **(settings or {})},
        examples=[float(f"{value:.6g}") for value in means["error"][-1].tolist()],
        scores={
            f"{name}.{number}": mean_of(means[name][number - 1])
            for number in range(1, len(blocks) + 1)
            for name in SCORES
        },
        details={
            "blocks": [
                {
                    "block": number,
                    "overlap": float(means["overlap"][number - 1].mean()),
                    "growth": _growth(means["passed on"][number - 1], means["arriving"][number - 1]),
                }
                for number in range(1, len(blocks) + 1)
            ]
        },
    )


def _compare(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    blocks: Sequence[str],
    ids: Int[Tensor, "rows tokens"],
    task: str,
) -> Float[Tensor, "blocks rows kept"]:
    """What is kept of every block on each window of a batch, float64 on the CPU."""
    dense: deque[tuple[Tensor, Tensor]] = deque()
    kept: list[Tensor] = []

    def split(visit: _Visit) -> None:
        device = visit.gave.device
        before, after = (states.to(device) for states in dense.popleft())
        if after.shape != visit.gave.shape:
            raise ValueError(
                f"{task}: {visit.name} gives states of width {after.shape[-1]} in the dense model and of width "
                f"{visit.gave.shape[-1]} in the compressed one; is it the model that this one came from?"
            )
        alone = before.to(visit.given.dtype)
        between = visit.again(alone)
        if torch.equal(alone, visit.given):
            _check_repeated(visit, between, task)
        kept.append(_measure(before, after, between, visit))
        if not torch.isfinite(kept[-1]).all():
            raise ValueError(f"{task}: a state after {visit.name} is not finite; one of the models is broken")

    _run(reference, blocks, ids, lambda visit: dense.append((visit.given, visit.gave)), task)
    _run(model, blocks, ids, split, task)
    return torch.stack(kept)


def _measure(before: Tensor, after: Tensor, between: Tensor, visit: _Visit) -> Float[Tensor, "rows kept"]:
    """Means over the tokens of each row, see KEPT.

    Args:
        before, after: the dense model's states. between: what the compressed block makes of `before`.
    """
    before, after, between = before.double(), after.double(), between.double()
    given, gave = visit.given.double(), visit.gave.double()
    own, inherited = between - after, gave - between
    # A state of zeros has no relative error; the smallest number stands for its norm.
    least = torch.finfo(torch.float32).tiny
    level_before, level_after = (states.square().sum(-1).clamp(min=least) for states in (before, after))
    per_token = [
        (gave - after).square().sum(-1) / level_after,
        own.square().sum(-1) / level_after,
        inherited.square().sum(-1) / level_after,
        2 * (own * inherited).sum(-1) / level_after,
        inherited.square().sum(-1) / level_before,
        (given - before).square().sum(-1) / level_before,
    ]
    return torch.stack([each.mean(1) for each in per_token], dim=1).cpu()


def _run(
    model: PreTrainedModel,
    blocks: Sequence[str],
    ids: Int[Tensor, "rows tokens"],
    see: Callable[[_Visit], None],
    task: str,
) -> None:
    """Let the model read a batch, and `see` look at each block once it has run; the hooks are taken off at the end."""
    expected = iter(blocks)

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        def look(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if next(expected, None) != name:
                raise other_order()
            by_name = "hidden_states" in kwargs

            def again(states: Tensor) -> Tensor:
                # `forward`: a call of the block would run these hooks again.
                if by_name:
                    return _states_of(block.forward(*args, **{**kwargs, "hidden_states": states}))
                return _states_of(block.forward(states, *args[1:], **kwargs))

            see(_Visit(name, kwargs["hidden_states"] if by_name else args[0], _states_of(output), again))

        return look

    def other_order() -> ValueError:
        return ValueError(
            f"{task}: {type(model).__name__} does not run its {len(blocks)} blocks once each in order; "
            "their errors cannot be split"
        )

    handles = []
    try:
        for name in blocks:
            try:
                block = model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"{task}: {type(model).__name__} has no block {name!r}") from None
            handles.append(block.register_forward_hook(hook(name), with_kwargs=True))
        model.base_model(input_ids=ids.to(model.device), **({"use_cache": False} if is_causal(model) else {}))
    finally:
        for handle in handles:
            handle.remove()
    if next(expected, None) is not None:
        raise other_order()


def _check_repeated(visit: _Visit, between: Tensor, task: str) -> None:
    """Raises ValueError where a block gives something else for the same states, by more than rounding."""
    apart = float((between.double() - visit.gave.double()).square().sum())
    if apart > torch.finfo(visit.gave.dtype).eps * float(visit.gave.double().square().sum()):
        raise ValueError(
            f"{task}: {visit.name} gives something else when it is called again with the same states; "
            "its error cannot be split"
        )


def _states_of(output: Any) -> Tensor:
    """The hidden states in a block's output."""
    states: Tensor = output[0] if isinstance(output, tuple | list) else output
    return states


def _growth(passed_on: Tensor, arriving: Tensor) -> float | None:
    return float(passed_on.sum() / arriving.sum()) if arriving.any() else None
