"""Descent: a few gentle steps of Adam on some of a model's numbers, each tensor at a rate of its own size."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from eckart.models.sites import low_rank_modules
from eckart.support.progress import Track, silent

# Adam's averages are empty at first, and its first steps as large as its largest: the rate rises over these.
WARM_UP = 8
# Averages over some ten steps and a hundred: a descent is a few dozen steps long.
BETAS = (0.9, 0.99)


def low_rank_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Left, right and bias of every low-rank linear inside, a shared right factor once."""
    parameters = [parameter for linear in low_rank_modules(module).values() for parameter in linear.parameters()]
    return list({id(parameter): parameter for parameter in parameters}.values())


def draw_batches(rows: int, size: int, count: int) -> list[list[int]]:
    """Row numbers of `count` batches of `size`: all rows in one random order, then all of them in another."""
    draw, order = random.Random(0), list[int]()
    while len(order) < size * count:
        some = list(range(rows))
        draw.shuffle(some)
        order += some
    return [order[start : start + size] for start in range(0, size * count, size)]


@torch.enable_grad()
def descend(
    module: nn.Module,
    parameters: list[nn.Parameter],
    loss: Callable[[int], Tensor],
    *,
    steps: int,
    rate: float,
    what: str,
    sizes: Sequence[float] | None = None,
    track: Track = silent,
) -> None:
    """Take `steps` of Adam, in place; the rate falls to zero along a cosine.

    A step of Adam has one size for all numbers of a tensor, so that a rate that suits one tensor ruins another: each
    tensor's is `rate` times the root mean square of its numbers.

    Args:
        module: has the parameters; only they have gradients meanwhile.
        parameters: float32 or wider.
        loss: from the number of a step to its loss, which is minimised.
        sizes: of each parameter, in place of the root mean square of its numbers.

    Cost: a forward and a backward pass per step; three times the memory of the parameters.
    """
    sizes = [size_of(parameter) for parameter in parameters] if sizes is None else sizes
    groups = [
        {"params": [parameter], "lr": 0.0, "size": size} for parameter, size in zip(parameters, sizes, strict=True)
    ]
    optimiser = torch.optim.Adam(groups, betas=BETAS)
    with _only(module, parameters):
        for step in track(range(steps), what, steps):
            share = min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            for group in optimiser.param_groups:
                group["lr"] = rate * share * group["size"]
            optimiser.zero_grad()
            loss(step).backward()
            optimiser.step()


def size_of(tensor: Tensor) -> float:
    """The root mean square of its numbers."""
    return float(tensor.detach().square().mean().sqrt())


@torch.no_grad()
def put_back(parameters: Iterable[nn.Parameter], values: Iterable[Tensor]) -> None:
    """Give the parameters these values, in place."""
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


@contextmanager
def _only(module: nn.Module, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Inside, these parameters of the module have gradients and no others; what they had before is restored."""
    before = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
    trained = {id(parameter) for parameter in parameters}
    try:
        for parameter, _, _ in before:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in trained)
        yield
    finally:
        for parameter, required, gradient in before:
            parameter.requires_grad_(required)
            parameter.grad = gradient
