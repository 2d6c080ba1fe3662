"""Activation similarity: how much an evaluation text's activations look like the calibration text's (NSVD Figure 1)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from eckart.data.positions import check_positions
from eckart.data.tokens import Tokens, check_vocabulary
from eckart.evals.module_inputs import ROWS, read_inputs, whole_rows
from eckart.evals.result import TRAITS, EvalResult, Score
from eckart.evals.windows import check_evaluating, check_one_text, cut_windows
from eckart.support.progress import Track, silent

# Of the histogram over [-1, 1].
BINS = 40


@dataclass(frozen=True)
class Activations:
    """What modules read on a text: the mean input of every row, for each of them.

    Attributes:
        means: {module: (rows, width)}, float64.
        counts: (rows,) tokens in each row.
        length: of the rows, padding included.
        source: where the text came from.
    """

    means: dict[str, Float[Tensor, "rows width"]]
    counts: Int[Tensor, "rows"]
    length: int
    source: dict[str, Any]


@torch.inference_mode()
def read_activations(
    model: PreTrainedModel, tokens: Tokens, watched: Sequence[str], *, track: Track = silent
) -> Activations:
    """The activations of a calibration text, to compare evaluation texts with; padding is left out.

    Args:
        watched: names of modules.

    Raises:
        ValueError: no module to watch or one that the model has not, an input that is not finite, rows longer than the
            model reads, or a model in training mode.

    Cost: a forward pass over the text; memory for one mean vector per row and module.
    """
    if not watched:
        raise ValueError("similarity needs the names of the modules whose inputs are compared")
    check_evaluating(model)
    check_one_text(model)
    check_vocabulary(model, tokens.ids)
    check_positions(model, tokens.ids.shape[1], "calibration length")
    rows = tokens.batches(ROWS)
    means = _means(model, watched, track(rows, "similarity: calibration", len(rows)), "similarity: calibration")
    return Activations(means, tokens.mask.sum(1), tokens.ids.shape[1], tokens.source)


@torch.inference_mode()
def similarity(
    model: PreTrainedModel,
    calibration: Activations,
    stream: Int[Tensor, "tokens"],
    *,
    length: int | None = None,
    limit: int | None = None,
    task: str = "similarity",
    settings: dict[str, Any] | None = None,
    track: Track = silent,
) -> EvalResult:
    """Cosine similarity between the activations of a text and those of the calibration text.

    For every watched module and every window of the text: the cosine between the mean input over the window's tokens
    and the mean input over all calibration tokens. NSVD (Figure 1, Table 2) prints means and deviations of "cosine
    similarities for activations between the calibration set and each evaluation set" without saying between which
    vectors; this is our reading of it.

    Args:
        calibration: of the same model.
        stream: (n,) token ids of the evaluation text.
        length, limit: windows of the text, as in `perplexity`; the default length is the calibration's.

    Returns:
        value = mean cosine over windows and modules; stderr from the spread between windows. Scores: `std` over windows
        and modules; `calibration`, the same mean for the calibration's own rows, what a text of that kind would
        have. details: histogram {edges, counts}, `modules` {name: mean cosine}. examples: mean cosine of each window.

    Raises:
        ValueError: an input that is not finite, and what `cut_windows` raises.

    Cost: a forward pass over the text.
    """
    length = length or calibration.length
    windows = cut_windows(model, stream, length=length, limit=limit)
    texts = whole_rows(windows)
    own, weights = calibration.means, calibration.counts.double()
    means = _means(model, list(own), track(texts, task, len(texts)), task)
    cosines, ceiling = {}, []
    for name in own:
        centre = (weights @ own[name]) / weights.sum()
        cosines[name] = torch.nn.functional.cosine_similarity(means[name], centre[None], dim=1)
        ceiling.append(torch.nn.functional.cosine_similarity(own[name], centre[None], dim=1))
    table = torch.stack(list(cosines.values()))  # (modules, windows)
    per_window = table.mean(0)
    edges = torch.linspace(-1, 1, BINS + 1, dtype=torch.float64)
    counts = torch.histogram(table.flatten().clamp(-1, 1), edges).hist
    return EvalResult(
        task=task,
        metric="cosine",
        value=float(table.mean()),
        stderr=float(per_window.std()) / math.sqrt(len(windows)) if len(windows) > 1 else None,
        n=len(windows),
        traits=TRAITS["similarity"],
        settings={
            "length": length,
            "windows": len(windows),
            "modules": len(own),
            "calibration": calibration.source,
            **(settings or {}),
        },
        examples=[round(value, 6) for value in per_window.tolist()],
        scores={
            "std": Score(float(table.std(correction=0)), None, table.numel()),
            "calibration": Score(float(torch.stack(ceiling).mean()), None, len(weights)),
        },
        details={
            "histogram": {
                "edges": [round(edge, 4) for edge in edges.tolist()],
                "counts": [int(count) for count in counts.tolist()],
            },
            "modules": {name: round(float(values.mean()), 6) for name, values in cosines.items()},
        },
    )


def _means(
    model: PreTrainedModel, watched: Sequence[str], batches: Any, task: str
) -> dict[str, Float[Tensor, "rows width"]]:
    """{module: mean input over each row's tokens}, in float64 on the CPU."""
    means: dict[str, list[Tensor]] = {name: [] for name in watched}

    def note(name: str, x: Tensor, _y: Tensor, mask: Tensor) -> None:
        kept = torch.where(mask[..., None], x.double(), 0.0)
        means[name].append((kept.sum(1) / mask.sum(1, keepdim=True)).cpu())
        if not torch.isfinite(means[name][-1]).all():
            raise ValueError(f"{task}: an input of {name} is not finite; the model is broken")

    read_inputs(model, watched, batches, note)
    return {name: torch.cat(parts) for name, parts in means.items()}
