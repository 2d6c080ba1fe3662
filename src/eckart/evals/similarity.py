"""Activation similarity: how much an evaluation text's activations look like the calibration text's (NSVD Figure 1)."""

from __future__ import annotations

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

# Of the histogram over [-1, 1].
BINS = 40


@dataclass(frozen=True)
class Activations:
    """What modules read on a text: the mean input of every row, for each of them.

    Attributes:
        means: {module: (rows, width)}, float64.
        counts: {module: (rows,) tokens that it reads of each row}; of an encoder-decoder the source's or the target's.
        length: of the rows, padding included; of pairs, of source and target together.
        source: where the text came from.
    """

    means: dict[str, Float[Tensor, "rows width"]]
    counts: dict[str, Int[Tensor, "rows"]]
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
    check_vocabulary(model, tokens.ids)
    check_sides(model, tokens, "calibration length")
    rows, task = tokens.rows(ROWS), "similarity: calibration"
    means, counts = _means(model, watched, track(rows, task, len(rows)), task)
    return Activations(means, counts, tokens.ids.shape[1], tokens.source)


@torch.inference_mode()
def similarity(
    model: PreTrainedModel,
    calibration: Activations,
    stream: Int[Tensor, "tokens"],
    *,
    length: int | None = None,
    limit: int | None = None,
    specials: Specials = ((), ()),
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
        length, limit, specials: windows of the text, as in `perplexity`; the default length is the calibration's.

    Returns:
        value = mean cosine over windows and modules; stderr from the spread between windows. Scores: `std` over windows
        and modules; `calibration`, the same mean for the calibration's own rows, what a text of that kind would
        have. details: histogram {edges, counts}, `modules` {name: mean cosine}. examples: mean cosine of each window.

    Raises:
        ValueError: an input that is not finite, and what `cut_text` raises.

    Cost: a forward pass over the text.
    """
    length = length or calibration.length
    windows = cut_text(model, stream, length=length, limit=limit, specials=specials)
    texts, own = windows.rows(ROWS), calibration.means
    means, _ = _means(model, list(own), track(texts, task, len(texts)), task)
    cosines, ceiling = {}, []
    for name in own:
        weights = calibration.counts[name].double()
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
        stderr=stderr_of(per_window),
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
            "calibration": Score(float(torch.stack(ceiling).mean()), None, len(ceiling[0])),
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
    model: PreTrainedModel, watched: Sequence[str], batches: Iterable[Rows], task: str
) -> tuple[dict[str, Float[Tensor, "rows width"]], dict[str, Int[Tensor, "rows"]]]:
    """({module: mean input over each row's tokens}, {module: how many those are}), in float64 on the CPU."""
    means: dict[str, list[Tensor]] = {name: [] for name in watched}
    counts: dict[str, list[Tensor]] = {name: [] for name in watched}

    def note(name: str, x: Tensor, _y: Tensor, mask: Tensor) -> None:
        kept = torch.where(mask[..., None], x.double(), 0.0)
        means[name].append((kept.sum(1) / mask.sum(1, keepdim=True)).cpu())
        counts[name].append(mask.sum(1).cpu())
        if not torch.isfinite(means[name][-1]).all():
            raise ValueError(f"{task}: an input of {name} is not finite; the model is broken")

    read_inputs(model, watched, batches, note)
    joined = [{name: torch.cat(parts) for name, parts in each.items()} for each in (means, counts)]
    return joined[0], joined[1]
