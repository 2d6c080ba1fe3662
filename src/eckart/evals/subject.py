"""Subject: what is evaluated, and what it may be compared with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.evals.distance import LinearErrors
from eckart.evals.similarity import Activations
from eckart.support.progress import Track, silent


@dataclass(frozen=True)
class Subject:
    """A model under evaluation. Only evaluations that need more than the first two fields ask for it.

    Attributes:
        model, tokenizer: the model and its tokenizer.
        weights: the files that it was loaded from, for its bytes on disk; see `models.loading.weights_on_disk`.
        reference: the dense model that it came from, for comparisons.
        activations: of the model on its calibration text; see `similarity.read_activations`.
        errors: of a compressed model's linears on its calibration text; see `distance.read_errors`.
        blocks: names of its blocks' modules, in order; see `models.sites.block_names`.
        context: the window for text where a task names none; a model with fewer positions is read at its own.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    weights: tuple[Path, ...] = ()
    reference: PreTrainedModel | None = None
    activations: Activations | None = None
    errors: LinearErrors | None = None
    blocks: tuple[str, ...] = ()
    context: int | None = None


@dataclass(frozen=True)
class Setup:
    """Where an evaluation reads and how fast it goes; nothing of it changes a number beyond rounding.

    Attributes:
        data: folder with local copies of known corpora and tasks; None asks the hub.
        batch_size: examples at a time, where an evaluation does not choose for itself.
        workers: jobs at a time, of evaluations that have many small ones.
        cache: folder for hidden states; None keeps none.
        track: shows progress.
    """

    data: Path | None = None
    batch_size: int = 8
    workers: int = 1
    cache: Path | None = None
    track: Track = silent
