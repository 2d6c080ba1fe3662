"""Speed: how fast a model generates, as a ratio to another model timed in the same minutes."""

from __future__ import annotations

import statistics
import time

import torch
from transformers import PreTrainedModel


def decode_speed(
    model: PreTrainedModel, baseline: PreTrainedModel, *, tokens: int = 32, prompt: int = 16, rounds: int = 3
) -> float:
    """Greedy tokens per second of `model` over those of `baseline`, batch 1, with a cache.

    The two take turns, and the medians are compared, because machines are noisy: a number of seconds on its own says
    little, a ratio from the same run more.

    Args:
        tokens: generated in each round. prompt: length of a fixed prompt.
    """
    seconds: dict[int, list[float]] = {0: [], 1: []}
    generate(model, tokens=2, prompt=prompt)  # the first call pays for allocations
    generate(baseline, tokens=2, prompt=prompt)
    for _ in range(rounds):
        for which, candidate in enumerate((model, baseline)):
            start = time.perf_counter()
            generate(candidate, tokens=tokens, prompt=prompt)
            seconds[which].append(time.perf_counter() - start)
    return statistics.median(seconds[1]) / statistics.median(seconds[0])


@torch.inference_mode()
def generate(model: PreTrainedModel, *, tokens: int, prompt: int) -> None:
    """Generate exactly `tokens` greedy tokens after a fixed prompt of `prompt` tokens."""
    ids = torch.ones(1, prompt, dtype=torch.int64, device=model.device)
    model.generate(  # type: ignore[operator]
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=False,
        pad_token_id=0,
    )
