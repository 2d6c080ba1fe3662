"""Cost: what a model takes: numbers, bytes, multiply-accumulates, and time compared with another model's."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.data.pairs import is_encoder_decoder
from eckart.data.positions import usable_positions
from eckart.evals.result import TRAITS, EvalResult, Score
from eckart.evals.speed import Timing, prompt_of, time_in_turns
from eckart.support.progress import Track, silent
from eckart.support.sizes import num_params, tensor_bytes

# SFSD Table 1 counts at 64 tokens; a model with fewer positions is counted at as many as fit.
DEFAULT_PROMPT = 64


@dataclass(frozen=True)
class Macs:
    """Multiply-accumulates of one forward pass over one sequence, or of an encoder-decoder one pair, in total.

    Attributes:
        linear: of the linears, d_in d_out for each token that one reads; a head that is tied counts like any other.
        attention: of every other product: the scores and the weighted values. The whole square of scores counts,
            the masked half as well, as published counts do. A sound's convolutions are in it.
        length: tokens of the sequence; of a pair those of source and target, and of a sound the rows that it becomes.
    """

    linear: int
    attention: int
    length: int

    @property
    def total(self) -> int:
        return self.linear + self.attention


def cost(
    model: PreTrainedModel,
    *,
    reference: PreTrainedModel | None = None,
    weights: Sequence[Path] = (),
    batch: int = 1,
    prompt: int | None = None,
    tokens: int = 32,
    rounds: int = 3,
    task: str = "cost",
    track: Track = silent,
) -> EvalResult:
    """Parameters, bytes, multiply-accumulates per token, and speeds relative to `reference`.

    Scores, the main one is `params`:
        params: numbers stored, tied ones once; a quantised weight counts the numbers that it represents.
        bytes.resident: of parameters and buffers as they lie in memory: a quantised weight counts its codes and scales.
        bytes.disk: of the files `weights`; without them there is none.
        macs, macs.linear, macs.attention: per token of a sequence of `prompt` tokens, see `count_macs`. SFSD Table 1
            prints the total of a sequence of 64 tokens: 423.93 G for LLaMA-7B is 64 times the `macs` here. Of an
            encoder-decoder they are of both stacks, per token of a source of `prompt` and a target of `tokens` tokens.
        params.kept, bytes.kept, macs.kept: shares of the reference's.
        prefill_speed, decode_speed: tokens per second over the reference's, medians of runs in turns. A model that does
            not generate has no decode speed. An encoder-decoder's prefill is the source's. Tokens per second as such
            are in details["tokens_per_second"]: noisy numbers, of one machine in one minute.

    Args:
        reference: the dense model. Without it there are no shares and no speeds.
        weights: the files that the model was loaded from, see `models.weight_files`.
        batch: sequences at a time, for the speeds.
        prompt: tokens of context, or of an encoder-decoder's source; None is 64, or as many as the model has positions
            for beside `tokens`, if fewer. A source of sound has the length that the model reads.
        tokens: generated in each round. rounds: of timing.

    Raises:
        ValueError: more tokens than positions, a prompt of another length than a sound has, a count that is not
            positive, or a logit that is not finite.

    Cost: one forward pass for the count, 2 + `rounds` (prefill and `tokens` steps) for each model's speed.
    """
    prompt = _check_length(model, prompt, tokens)
    values = _sizes(model, prompt, tokens)
    if weights:
        values["bytes.disk"] = sum(file.stat().st_size for file in weights)
    models = [model] if reference is None else [model, reference]
    if reference is not None:
        dense = _sizes(reference, _check_length(reference, prompt, tokens), tokens)
        for share, name in (("params.kept", "params"), ("bytes.kept", "bytes.resident"), ("macs.kept", "macs")):
            values[share] = values[name] / dense[name]
    timings = time_in_turns(models, tokens=tokens, prompt=prompt, rounds=rounds, batch=batch, task=task, track=track)
    if len(timings) == 2:
        one, other = timings
        values["prefill_speed"] = other.prefill / one.prefill
        if one.decode is not None and other.decode is not None:
            values["decode_speed"] = other.decode / one.decode
    return EvalResult(
        task=task,
        metric="params",
        value=values.pop("params"),
        stderr=None,
        n=1,
        traits=TRAITS["cost"],
        settings={"batch": batch, "prompt": prompt, "tokens": tokens, "rounds": rounds, "dtype": str(model.dtype)[6:]},
        scores={name: Score(value) for name, value in values.items()},
        details={
            "tokens_per_second": {
                "note": "noisy: of one machine in one minute; compare the ratios",
                **{
                    name: _rates(timing, batch, prompt, tokens)
                    for name, timing in zip(("model", "reference"), timings, strict=False)
                },
            }
        },
    )


def resident_bytes(model: nn.Module) -> int:
    """Bytes of the model's parameters and buffers as they lie in memory, tied ones once."""
    return sum(tensor_bytes(tensor) for tensor in (*model.parameters(), *model.buffers()))


@torch.inference_mode()
def count_macs(model: PreTrainedModel, length: int, target: int | None = None) -> Macs:
    """Count the multiply-accumulates of one forward pass over one sequence of `length` tokens.

    Of an encoder-decoder `length` is the source's, and `target` the target's, by default as many; the decoder reads the
    target at once, as in training. A source of sound has the length that the model reads.

    Linears, those in few bits too, are counted from their shapes and the rows that each reads, whatever multiplies
    them, so a module that runs twice counts twice and one that reads a single token counts once. The rest is what
    torch's FLOP counter sees outside of them, at two operations for each. The model may lie on the meta device.

    Raises:
        ValueError: an attention kernel that the counter cannot see into, or a logit that is not finite.
    """
    attention = getattr(model.config, "_attn_implementation", None)
    if attention not in (None, "eager", "sdpa"):
        raise ValueError(f"attention {attention!r} cannot be counted; load the model with attn_implementation='sdpa'")
    read = prompt_of(model, 1, length, target or length)
    counter = FlopCounterMode(display=False)
    # The plain kernel consists of products that the counter knows, on every device.
    with counter, sdpa_kernel(SDPBackend.MATH), _counting_linears(model, counter) as linears:
        output = model(**read)[0]
    if output.device.type != "meta" and not torch.isfinite(output).all():
        raise ValueError(f"{type(model).__name__}: a logit is not finite; the model is broken, there is no result")
    if is_encoder_decoder(model):
        length = (_sound_rows(model) or length) + (target or length)
    return Macs(linears.macs, (counter.get_total_flops() - linears.flops) // 2, length)


def _sound_rows(model: PreTrainedModel) -> int | None:
    """The rows that the encoder of a model of sound makes of it; None of a model that reads text."""
    reads_text = not is_encoder_decoder(model) or model.main_input_name == "input_ids"
    return None if reads_text else int(model.config.max_source_positions)


@dataclass
class _Linears:
    """What the linears of a forward pass did: counted by their shapes, and as the counter saw them."""

    macs: int = 0
    flops: int = 0
    before: int = 0


def _numbers(module: nn.Module) -> int | None:
    """Numbers of a linear's matrix, one in few bits included (see `support.sizes`); None of any other module."""
    if isinstance(module, nn.Linear | Conv1D):
        return module.weight.numel()
    coded: int | None = getattr(module, "coded_params", None)
    return coded


@contextmanager
def _counting_linears(model: nn.Module, counter: FlopCounterMode) -> Iterator[_Linears]:
    """Inside, every linear adds to the count that this yields."""
    linears = _Linears()

    def enter(_module: nn.Module, _args: object) -> None:
        linears.before = counter.get_total_flops()

    def leave(module: nn.Module, args: tuple[Tensor, ...], _output: object) -> None:
        linears.macs += args[0].shape[:-1].numel() * (_numbers(module) or 0)
        linears.flops += counter.get_total_flops() - linears.before

    handles = []
    try:
        for module in model.modules():
            if _numbers(module) is not None:
                handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
        yield linears
    finally:
        for handle in handles:
            handle.remove()


def _sizes(model: PreTrainedModel, prompt: int, tokens: int) -> dict[str, float]:
    """The scores that need no other model and no clock."""
    macs = count_macs(model, prompt, tokens)
    return {
        "params": num_params(model),
        "bytes.resident": resident_bytes(model),
        "macs": macs.total / macs.length,
        "macs.linear": macs.linear / macs.length,
        "macs.attention": macs.attention / macs.length,
    }


def _check_length(model: PreTrainedModel, prompt: int | None, tokens: int) -> int:
    """The prompt's length, once it and `tokens` are sure to fit the model."""
    name = type(model).__name__
    for which, value in {"tokens": tokens, "prompt": prompt}.items():
        if value is not None and value < 1:
            raise ValueError(f"{which} {value} is not positive")
    positions, rows = usable_positions(model), _sound_rows(model)
    if rows is not None and prompt not in (None, rows):
        raise ValueError(f"{name} reads sounds of {rows} rows: leave the prompt of {prompt} out")
    paired = is_encoder_decoder(model)
    if prompt is None:
        room = None if positions is None else positions - (0 if paired else tokens)
        prompt = rows or (DEFAULT_PROMPT if room is None else min(DEFAULT_PROMPT, room))
    needed = prompt + tokens if model.can_generate() else prompt
    if paired:  # each side has as many positions; the decoder begins with a token that is not generated
        needed = max(prompt if rows is None else 0, tokens + 1)
    if positions is not None and (needed > positions or prompt < 1):
        raise ValueError(
            f"{name} has {positions} positions: a prompt of {max(prompt, 1)} and {tokens} tokens do not fit; lower them"
        )
    return prompt


def _rates(timing: Timing, batch: int, prompt: int, tokens: int) -> dict[str, float]:
    """Tokens per second."""
    rates = {"prefill": batch * prompt / timing.prefill}
    if timing.decode is not None:
        rates["decode"] = batch * tokens / timing.decode
    return {name: round(rate, 1) for name, rate in rates.items()}
