"""Distance: how much more a compressed model's linears err on a text than on the text that it was calibrated on."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from eckart.data.encoding import check_vocabulary
from eckart.data.pairs import check_sides
from eckart.data.tokens import Rows, Tokens
from eckart.evals.means import stderr_of
from eckart.evals.module_inputs import ROWS, read_inputs
from eckart.evals.result import TRAITS, EvalResult, Score
from eckart.evals.windows import Specials, check_evaluating, cut_text
from eckart.support.progress import Track, silent

# A warning from here on. On SmolLM2 at keep 0.8, calibrated on WikiText-2, what is lost, in nats or in divergence,
# doubles at 1.3 to 1.55, by a line through the logarithms of both over eight texts (docs/commands.md): other English
# prose is at 1.2 to 1.35, instructions at 1.6, Chinese and Japanese at 2.3 to 2.5.
FAR = 1.5
# Linears that the result names, those that err most beyond their error on the calibration text first.
NAMED = 5


@dataclass(frozen=True)
class LinearErrors:
    """How far a compressed model's linears are from the dense model's on a text, both given the dense model's inputs.

    Attributes:
        logs: {linear: (rows,)} log of sum ||W x - M x||^2 / sum ||W x||^2 over the tokens of each row, float64.
        length: of the rows, padding included; of pairs, of source and target together.
        source: where the text came from.
        parts: of a mixture, the corpus of each row.
    """

    logs: dict[str, Float[Tensor, "rows"]]
    length: int
    source: dict[str, Any]
    parts: tuple[str, ...] = ()


@torch.inference_mode()
def read_errors(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokens: Tokens,
    linears: Sequence[str],
    *,
    track: Track = silent,
) -> LinearErrors:
    """The errors of a compressed model's linears on a calibration text; padding is left out.

    Args:
        model, reference: the compressed model, and the dense one that it came from.
        linears: names of the low-rank ones that read every token, which experts do not.

    Raises:
        ValueError: no linear, one that the reference lacks or has in another shape, an error that is not finite, rows
            longer than the reference reads or pairs where it reads one text, or a model in training mode.

    Cost: a forward pass of the dense model over the text, and one of the compressed linears.
    """
    if not linears:
        raise ValueError("distance needs the names of the low-rank linears whose errors are compared")
    for each in (model, reference):
        check_evaluating(each)
    check_vocabulary(reference, tokens.ids)
    check_sides(reference, tokens, "calibration length")
    batches, task = tokens.rows(ROWS), "distance: calibration"
    logs = _logs(model, reference, linears, track(batches, task, len(batches)), task)
    names = [str(source.get("corpus")) for source in tokens.source.get("parts", [])]
    parts = () if tokens.part_of is None else tuple(names[part] for part in tokens.part_of.tolist())
    return LinearErrors(logs, tokens.ids.shape[1], tokens.source, parts)


@torch.inference_mode()
def distance(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    calibration: LinearErrors,
    stream: Int[Tensor, "tokens"],
    *,
    length: int | None = None,
    limit: int | None = None,
    specials: Specials = ((), ()),
    task: str = "distance",
    settings: dict[str, Any] | None = None,
    track: Track = silent,
) -> EvalResult:
    """The relative squared error of a compressed model's linears on a text, over that on the calibration text.

    The dense model reads both texts, and each low-rank linear M is given what the dense one, W, reads there: the error
    of a window is sum ||W x - M x||^2 / sum ||W x||^2. Means over windows and over linears are of its logarithm:
    errors of linears differ by orders of magnitude, and each linear counts by how many times its own error grows.

    Args:
        calibration: of the same two models.
        stream: (n,) token ids of the text.
        length, limit, specials: windows of the text, as in `perplexity`; the default length is the calibration's.

    Returns:
        value = how many times the error on the calibration text: 1 is a text like it. It is the geometric mean of
        `examples`, one for each window, from whose spread stderr is; the calibration's error is taken as exact.
        Scores: `error` and `error.calibration`, both geometric means over linears and windows. details: `linears`
        {name: how many times}; `farthest`, the names of those that grow most; of a mixture `parts` {corpus: how many
        times as much as on the whole mixture}; and `warning`, a line that says what to do, where the value is FAR or
        more, of a mixture FAR times that of the part that is farthest from the whole.

    Raises:
        ValueError: an error that is not finite, linears that the reference lacks or has in another shape, and what
            `cut_text` raises.

    Cost: as `read_errors`.
    """
    length = length or calibration.length
    check_evaluating(model)
    tokens = cut_text(reference, stream, length=length, limit=limit, specials=specials)
    batches, names = tokens.rows(ROWS), list(calibration.logs)
    logs = _logs(model, reference, names, track(batches, task, len(batches)), task)
    windows = len(tokens)
    table = torch.stack([logs[name] for name in names])  # (linears, windows)
    own = torch.stack([calibration.logs[name].mean() for name in names])
    growth = table - own[:, None]
    per_window, per_linear = growth.mean(0), growth.mean(1)
    value = math.exp(float(growth.mean()))
    farthest = [names[place] for place in per_linear.argsort(descending=True)[:NAMED].tolist()]
    details: dict[str, Any] = {
        "linears": {name: _rounded(log) for name, log in zip(names, per_linear.exp().tolist(), strict=True)},
        "farthest": farthest,
    }
    within = [1.0]
    if calibration.parts:
        per_row = (torch.stack([calibration.logs[name] for name in names]) - own[:, None]).mean(0)
        details["parts"] = {
            part: _rounded(math.exp(float(per_row[[each == part for each in calibration.parts]].mean())))
            for part in dict.fromkeys(calibration.parts)
        }
        within += details["parts"].values()
    if value >= FAR * max(within):
        details["warning"] = _warning(task, value)
    return EvalResult(
        task=task,
        metric="error ratio",
        value=value,
        stderr=stderr_of(per_window, slope=value),
        n=windows,
        traits=TRAITS["distance"],
        settings={
            "length": length,
            "windows": windows,
            "linears": len(names),
            "calibration": calibration.source,
            **(settings or {}),
        },
        examples=[_rounded(each) for each in per_window.exp().tolist()],
        scores={
            "error": Score(math.exp(float(table.mean())), None, windows),
            "error.calibration": Score(math.exp(float(own.mean())), None, len(calibration.logs[names[0]])),
        },
        details=details,
    )


def _logs(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    linears: Sequence[str],
    batches: Iterable[Rows],
    task: str,
) -> dict[str, Float[Tensor, "rows"]]:
    """{linear: log of each row's relative squared error}, in float64 on the CPU."""
    logs: dict[str, list[Tensor]] = {name: [] for name in linears}
    modules = {name: model.get_submodule(name) for name in linears}
    dtypes = {next(each.parameters()).dtype for each in (model, reference)}
    # What rounding alone makes of equal linears. Below it an error is no error, and two of them have no ratio.
    least = max(torch.finfo(dtype).eps for dtype in dtypes) ** 2

    def note(name: str, x: Tensor, y: Tensor, mask: Tensor) -> None:
        module = modules[name]
        weight = next(module.parameters())
        ours = module(x.to(weight.device, weight.dtype)).to(y.device)
        if ours.shape != y.shape:
            raise ValueError(
                f"{task}: {name} gives {y.shape[-1]} numbers in the dense model and {ours.shape[-1]} in the "
                "compressed one; is it the model that this one came from?"
            )
        bias = getattr(reference.get_submodule(name), "bias", None)
        signal = _energy(y if bias is None else y - bias, mask)
        error = _energy(ours.float() - y.float(), mask)
        # A linear that gives nothing has no relative error; the smallest numbers stand for what it gives.
        share = error / signal.clamp(min=torch.finfo(torch.float32).tiny)
        if not torch.isfinite(share).all():
            raise ValueError(f"{task}: the error of {name} is not finite; one of the models is broken")
        logs[name].append(share.clamp(min=least).log().cpu())

    read_inputs(reference, linears, batches, note)
    return {name: torch.cat(parts) for name, parts in logs.items()}


def _energy(y: Float[Tensor, "rows tokens width"], mask: Tensor) -> Float[Tensor, "rows"]:
    """Sum of squares over each row's real tokens."""
    return torch.where(mask, y.double().square().sum(-1), 0.0).sum(1)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _warning(task: str, value: float) -> str:
    text = task.partition(":")[2].partition("@")[0] or "the text"
    return (
        f"{text} is far from the text that the model was calibrated on: its linears err {value:.2g} times as much "
        f"there ({FAR:g} is far). To use the model on such text, calibrate on a mixture with it, as in "
        f"--calibration 'broad*3+{text}'"
    )
