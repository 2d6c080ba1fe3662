"""Speed: how fast a model reads and generates, as ratios to another model timed in the same minutes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from eckart.data.pairs import is_encoder_decoder
from eckart.support.progress import Track, silent

# Under what names models give the cache that they read in the next step; RecurrentGemma gives none.
CACHES = ("past_key_values", "cache_params")


@dataclass(frozen=True)
class Timing:
    """Median seconds of one model.

    Attributes:
        prefill: to read the prompt; of an encoder-decoder for its encoder to, and its decoder a first token.
        decode: to generate the tokens after it with a cache; None for a model that does not generate, or gives none.
    """

    prefill: float
    decode: float | None


def decode_speed(
    model: PreTrainedModel,
    baseline: PreTrainedModel,
    *,
    tokens: int = 32,
    prompt: int = 16,
    rounds: int = 3,
    batch: int = 1,
) -> float:
    """Greedy tokens per second of `model` over those of `baseline`, with a cache, the prompt not counted.

    The two take turns, and the medians are compared, because machines are noisy: a number of seconds on its own says
    little, a ratio from the same run more.

    Args:
        tokens: generated in each round. prompt: length of a fixed prompt. batch: prompts at a time.

    Raises:
        ValueError: one of the two does not generate.
    """
    one, other = time_in_turns([model, baseline], tokens=tokens, prompt=prompt, rounds=rounds, batch=batch)
    if one.decode is None or other.decode is None:
        slow = model if one.decode is None else baseline
        raise ValueError(f"{type(slow).__name__} does not generate; it has no decode speed")
    return other.decode / one.decode


def prefill_speed(
    model: PreTrainedModel, baseline: PreTrainedModel, *, prompt: int = 64, rounds: int = 3, batch: int = 1
) -> float:
    """Tokens read per second by `model` over those by `baseline`, one forward pass of `prompt` tokens at a time.

    The two take turns and the medians are compared, as in `decode_speed`.
    """
    one, other = time_in_turns([model, baseline], tokens=0, prompt=prompt, rounds=rounds, batch=batch)
    return other.prefill / one.prefill


def time_in_turns(
    models: list[PreTrainedModel],
    *,
    tokens: int,
    prompt: int,
    rounds: int,
    batch: int = 1,
    task: str = "speed",
    track: Track = silent,
) -> list[Timing]:
    """Time the models one after the other, `rounds` times, and give each one's medians.

    Args:
        tokens: generated greedily after the prompt, where a model can.

    Raises:
        ValueError: a count that is not positive.
    """
    for name, value in {"prompt": prompt, "rounds": rounds, "batch": batch}.items():
        if value < 1:
            raise ValueError(f"{name} {value} is not positive")
    for model in models:
        time_once(model, tokens=min(tokens, 2), prompt=prompt, batch=batch)  # the first call pays for allocations
    taken: list[list[Timing]] = [[] for _ in models]
    for _ in track(range(rounds), f"{task}: timing", rounds):
        for model, timings in zip(models, taken, strict=True):
            timings.append(time_once(model, tokens=tokens, prompt=prompt, batch=batch))
    return [_median(timings) for timings in taken]


def _median(timings: list[Timing]) -> Timing:
    decodes = [timing.decode for timing in timings if timing.decode is not None]
    return Timing(
        statistics.median(timing.prefill for timing in timings), statistics.median(decodes) if decodes else None
    )


@torch.inference_mode()
def time_once(
    model: PreTrainedModel,
    *,
    tokens: int,
    prompt: int,
    batch: int = 1,
    clock: Callable[[], float] | None = None,
) -> Timing:
    """Read a fixed prompt, then generate greedily, a token at a time.

    Args:
        clock: gives seconds; default: the wall's.
    """
    clock = clock or time.perf_counter
    given = prompt_of(model, batch, prompt)
    cached = {"use_cache": True} if tokens and model.can_generate() else {}
    start = _now(model, clock)
    output = model(**given, **cached)
    read = _now(model, clock)
    if not cached:
        return Timing(read - start, None)
    encoded, written = {}, "input_ids"
    if is_encoder_decoder(model):
        written = "decoder_input_ids"
        encoded = {"encoder_outputs": BaseModelOutput(last_hidden_state=output.encoder_last_hidden_state)}
    cache = next((name for name in CACHES if output.get(name) is not None), None)
    if cache is None:
        return Timing(read - start, None)
    for _ in range(tokens):
        ids = output.logits[:, -1:].argmax(-1)
        output = model(**{written: ids, cache: output[cache]}, **encoded, use_cache=True)
    return Timing(read - start, _now(model, clock) - read)


def prompt_of(model: PreTrainedModel, batch: int, length: int, target: int = 1) -> dict[str, Tensor]:
    """What the model is called with to read a fixed prompt; of an encoder-decoder as a source, for a fixed target.

    Args:
        length: of the prompt, in tokens. A sound is as long as the model reads, whatever the length.
        target: tokens that the decoder reads.
    """
    ids = torch.ones(batch, length, dtype=torch.int64, device=model.device)
    if not is_encoder_decoder(model):
        return {"input_ids": ids}
    asked = {"decoder_input_ids": ids.new_ones(batch, target)}
    if model.main_input_name == "input_ids":
        return {"input_ids": ids, **asked}
    shape = (batch, model.config.num_mel_bins, 2 * model.config.max_source_positions)
    return {model.main_input_name: torch.zeros(shape, dtype=model.dtype, device=model.device), **asked}


def _now(model: PreTrainedModel, clock: Callable[[], float]) -> float:
    """Seconds, once the device has done what it was asked to."""
    synchronise(model.device)
    return clock()


def synchronise(device: torch.device) -> None:
    """Return once the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
