"""Recovery: a whole compressed model, a few steps down its own loss: how much of the damage can be mended."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.calibration.gradients import language_loss
from eckart.calibration.sequential import PassReport
from eckart.compression.tuning.descent import descend, draw_batches
from eckart.compression.tuning.lora import Lora
from eckart.data.labelled import read_labelled
from eckart.data.tokens import Tokens
from eckart.evals.hidden_states import pad_rows, tokenize_texts
from eckart.support.precision import in_float32
from eckart.support.progress import Track, silent


@dataclass(frozen=True)
class Samples:
    """The samples that a model recovers on.

    Attributes:
        labels: (samples,) of a labelled set, for a classifier; None for a language model, which predicts the tokens.
    """

    tokens: Tokens
    labels: Int[Tensor, "samples"] | None = None


@dataclass(frozen=True)
class Recovery:
    """A short fine-tuning of a compressed model, on its own loss: next tokens, masked tokens, or labels.

    All parameters move, in float32 and without dropout. Adam's step is relative to each tensor's own size, see
    `descent.descend`: the two factors of a linear differ in scale by orders of magnitude, so that no one rate of plain
    AdamW suits both, and 5e-4 of a dense weight, whose numbers are around 0.04, is the 2e-5 of ordinary fine-tuning. A
    tensor that is all zeros stays so.

    By an adapter only it moves, see `lora.Lora`: less memory, and less that can change. It is merged into the factors,
    or taken off and kept by itself.

    It is a measurement of how much steps can mend, and so it is never undone.

    Attributes:
        steps: of one batch each, in an order that is the same in every run.
        rate: of the largest step of a number, relative to the root mean square of the tensor that it is in.
        batch: samples in a step.
        corpus: of a classifier, the labelled set, whose train split it recovers on.
        adapter: None moves all parameters.
        adapter_rank: None is `lora.RANK`.
        merge: None is True.

    Raises:
        ValueError: steps, a rate, a batch or a rank that are not positive, or settings of an adapter without one.
    """

    steps: int = 64
    rate: float = 5e-4
    batch: int = 8
    corpus: str | None = None
    adapter: Literal["lora"] | None = None
    adapter_rank: int | None = None
    merge: bool | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch < 1 or not 0 < self.rate < 1:
            raise ValueError(
                f"recovery: {self.steps} steps of {self.batch} at rate {self.rate}; give at least 1 of each and a rate "
                "in (0, 1)"
            )
        if self.adapter is None and (self.adapter_rank, self.merge) != (None, None):
            raise ValueError("recovery: adapter_rank and merge go with adapter: lora")
        if self.adapter_rank is not None and self.adapter_rank < 1:
            raise ValueError(f"recovery: an adapter of rank {self.adapter_rank} is none")

    def describe(self) -> str:
        """In words, for a model card."""
        if self.adapter is None:
            return f"fine-tuned in {self.steps} steps"
        how = "merged into the factors" if self.merge is not False else "which is kept by itself"
        return f"fine-tuned in {self.steps} steps by a LoRA adapter, {how}"

    def read_samples(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        calibration: Callable[[], Tokens],
        data: Path | None = None,
    ) -> Samples:
        """The samples that this model recovers on: of its corpus for a classifier, else the calibration samples.

        Args:
            calibration: returns them; called where they are needed.
            data: folder with local copies of known sets.

        Raises:
            ValueError: a classifier without a corpus, a language model with one, another number of classes, and what
                `read_labelled` raises.
        """
        kind = type(model).__name__
        if "ForSequenceClassification" not in kind:
            if self.corpus is not None:
                raise ValueError(
                    f"recover: {kind} is no classifier and recovers on the calibration text: leave out corpus"
                )
            return Samples(calibration())
        if self.corpus is None:
            raise ValueError(f"recover: {kind} recovers on labels: give a corpus, such as {{corpus: cola}}")
        rows = read_labelled(self.corpus, split="train", data=data)
        if len(rows.classes) != model.config.num_labels:
            raise ValueError(
                f"recover: {kind} tells {model.config.num_labels} classes apart, {self.corpus} has {len(rows.classes)}"
            )
        texts = tokenize_texts(model, tokenizer, rows.texts)
        return Samples(Tokens(*pad_rows(texts.ids, texts.padding), rows.source), torch.tensor(rows.labels))

    def __call__(self, model: PreTrainedModel, samples: Samples, track: Track = silent) -> PassReport:
        """The report of `train`; an adapter that is not merged stays around the model's factors."""
        return self.train(model, samples, track)[0]

    def train(self, model: PreTrainedModel, samples: Samples, track: Track = silent) -> tuple[PassReport, Lora | None]:
        """Recover, in place.

        Returns:
            the mean loss on the samples that steps were taken on, each once, before the first and after the last step;
            and the adapter, still around the model's factors, where it is not to be merged.

        Raises:
            ValueError: a loss that is not finite (the rate is too high, or the model is broken); or as `Lora.around`.

        Cost: a forward and a backward pass per step; the activations of one batch; memory of the model, and three times
        that for Adam, or three times that of the adapter.
        """
        batches = draw_batches(len(samples.tokens), self.batch, self.steps)
        seen = batches[: math.ceil(len(samples.tokens) / self.batch)]
        before = _mean_loss(model, samples, seen)

        def loss(step: int) -> Tensor:
            return _loss(model, samples, batches[step], step)[0]

        descent: Any = {"steps": self.steps, "rate": self.rate, "what": "recovery", "track": track}
        lora = None
        if self.adapter is None:
            parameters = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
            with in_float32(model):
                descend(model, parameters, loss, **descent)
        else:
            lora = Lora.around(model, self.adapter_rank)
            descend(model, lora.parameters, loss, sizes=lora.sizes, **descent)
            if self.merge is not False:
                lora.merge()
                lora = None
        return PassReport("recover", "model", before, _mean_loss(model, samples, seen), True), lora


def _loss(model: PreTrainedModel, samples: Samples, rows: list[int], number: int) -> tuple[Tensor, int]:
    """The loss of these rows, without the columns that are padding in all of them, and its number of predictions.

    Args:
        number: of the batch; draws the tokens that a masked language model is asked for.
    """
    tokens = samples.tokens
    width = int(tokens.mask[rows].any(0).nonzero().max()) + 1
    ids, mask = tokens.ids[rows, :width], tokens.mask[rows, :width]
    if samples.labels is None:
        sound = None if tokens.sound is None else tokens.sound[rows]
        generator = torch.Generator().manual_seed(number)
        return language_loss(model, ids, mask, tokens.mask_token, generator, tokens.split, sound)
    attention_mask = None if bool(mask.all()) else mask.to(model.device).long()
    logits = model(input_ids=ids.to(model.device), attention_mask=attention_mask).logits.float()
    return nn.functional.cross_entropy(logits, samples.labels[rows].to(logits.device)), len(rows)


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, samples: Samples, batches: list[list[int]]) -> float:
    """Over all predictions of the batches."""
    total, count = 0.0, 0
    for number, rows in enumerate(batches):
        loss, scored = _loss(model, samples, rows, number)
        total, count = total + float(loss) * scored, count + scored
    if not math.isfinite(total):
        raise ValueError("recovery: the loss is not finite: lower the rate, or look for what broke the model before")
    return total / count
