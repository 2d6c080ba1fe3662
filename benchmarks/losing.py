"""What a model loses on some corpora: log-probabilities beside the dense model's, window by window. Not a program."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.corpora import read_text
from eckart.data.encoding import encode
from eckart.evals.predictions import log_probabilities, summed_divergence
from eckart.evals.windows import cut_windows, windows_per_batch

# The texts of the NSVD paper, the one that it calibrates on first; Chinese and Japanese are stand-ins.
NSVD_TEXTS = ("wikitext2", "ptb", "c4", "snips", "alpaca_eval", "mctest", "cmrc2018", "japanese")
# Bytes of the dense model's log-probabilities that are kept for the next model, or none of them.
KEPT = 2**32


class Texts:
    """The first windows of the test split of some corpora, and what the dense model says of them.

    Args:
        names: of corpora; one that is shorter than a window is left out.
        data: folder with local copies.
        windows: of each corpus at most. length: of a window, in tokens.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        names: Iterable[str],
        data: Path | None,
        *,
        windows: int,
        length: int,
    ) -> None:
        self.dense = dense
        self.rows = {}
        for name in names:
            stream = encode(read_text(name, split="test", data=data), tokenizer)
            if len(stream) >= length:
                self.rows[name] = cut_windows(dense, stream, length=length, limit=windows)
        vocabulary = cast(nn.Embedding, dense.get_input_embeddings()).num_embeddings
        self.together = windows_per_batch(length, vocabulary, models=2)
        self.keeps = 4 * length * vocabulary * sum(len(rows) for rows in self.rows.values()) <= KEPT
        self.kept: dict[tuple[str, int], Tensor] = {}

    @torch.no_grad()
    def compare(self, model: PreTrainedModel) -> dict[str, dict[str, list[float]]]:
        """{"nats": increase of the mean log-loss, "kl": mean KL(dense || model)}, each {corpus: a value a window}."""
        nats: dict[str, list[float]] = {name: [] for name in self.rows}
        kl: dict[str, list[float]] = {name: [] for name in self.rows}
        for name, rows in self.rows.items():
            for start in range(0, len(rows), self.together):
                ids = rows[start : start + self.together]
                log_p, log_q = self._of_dense(name, start, ids), self._of(model, ids)
                targets = ids[:, 1:, None]
                changes = (log_p.gather(2, targets) - log_q.gather(2, targets)).mean((1, 2), dtype=torch.float64)
                nats[name] += changes.tolist()
                kl[name] += [summed_divergence(p, q) / len(p) for p, q in zip(log_p, log_q, strict=True)]
        return {"nats": nats, "kl": kl}

    @torch.no_grad()
    def dense_losses(self) -> dict[str, list[float]]:
        """{corpus: the dense model's mean log-loss of each window}."""
        losses: dict[str, list[float]] = {}
        for name, rows in self.rows.items():
            for start in range(0, len(rows), self.together):
                ids = rows[start : start + self.together]
                told = self._of_dense(name, start, ids).gather(2, ids[:, 1:, None])
                losses.setdefault(name, []).extend((-told).mean((1, 2), dtype=torch.float64).tolist())
        return losses

    def _of_dense(self, name: str, start: int, ids: Tensor) -> Tensor:
        known = self.kept.get((name, start))
        if known is None:
            known = self._of(self.dense, ids)
            if self.keeps:
                self.kept[name, start] = known
        return known

    @staticmethod
    def _of(model: PreTrainedModel, ids: Tensor) -> Tensor:
        """(windows, length - 1, vocabulary)."""
        flat = log_probabilities(model, ids, torch.ones_like(ids, dtype=torch.bool))
        return flat.view(len(ids), -1, flat.shape[-1])


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean of some windows' values and its standard error; one window has none."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def spread(values: Sequence[float]) -> str:
    """A mean with its standard error, where it has one."""
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"
