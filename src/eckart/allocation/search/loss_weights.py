"""Probes: one linear cut at a time, and how far the predictions move: what a linear's own loss is worth in nats."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.allocation.fitting import check_multiple
from eckart.allocation.search.trials import Cuts, Spectra, describe_units, seconds_since, select_units, swapped
from eckart.data.encoding import check_vocabulary
from eckart.data.positions import check_positions
from eckart.data.tokens import Tokens
from eckart.evals.predictions import log_probabilities, summed_divergence
from eckart.evals.windows import check_evaluating, windows_per_batch
from eckart.lowrank import Factored, Layout
from eckart.models.sites import Site
from eckart.models.units import Unit
from eckart.support.journal import Record, open_journal
from eckart.support.progress import Track, silent

KIND = "probe"
# Depth of the cut: the middle of the depths that are allocated. On a Llama of 6 million parameters (asvd-i) a weight
# taken at half predicts the divergence at keep 0.3 to 0.8 within a factor of two for nine linears in ten; deeper cuts
# cost more than it says, shallower ones less.
PROBE_KEEP = 0.5
# The dense model's log-probabilities are kept on the model's device, in float32, up to this many bytes: 64 windows of
# 256 tokens at a vocabulary of 32,000. For the other windows they are computed again at every probe.
MEMORY = 2**31
# A tail below this share of the whole is the rounding error of a cut that loses nothing.
NOTHING = 1e-12


class MakeProber(Protocol):
    """Makes a function that probes units of a model."""

    def __call__(self, model: PreTrainedModel, spectra: Spectra, /) -> Callable[[Unit], Record]: ...


class Spread(Protocol):
    """Probes units with models of its own, several at a time, and gives their records in order."""

    def __call__(self, make: MakeProber, units: Sequence[Unit], /) -> Iterable[Record]: ...


@dataclass(frozen=True)
class Probe:
    """What one cut did.

    Attributes:
        name: `Unit.name`.
        rank: of the cut.
        divergence: mean KL(dense || cut) of the predictions, in nats.
        tail: the method's own loss of the cut, in its metric, as `Factored.tails` has it.
        seconds: cut and measurement took.
    """

    name: str
    rank: int
    divergence: float
    tail: float
    seconds: float

    @property
    def weight(self) -> float:
        """Nats for one unit of tail, so that weight x tail(rank) is in nats at every rank; 0 where nothing is lost."""
        return self.divergence / self.tail if self.tail > 0 else 0.0


@dataclass(frozen=True)
class ProbeResult:
    """The probes of a model.

    Attributes:
        probes: one for every unit, in the model's order.
        evaluations: passes over all windows, the dense ones and those of the journal included.
    """

    probes: tuple[Probe, ...]
    evaluations: int

    @property
    def weights(self) -> dict[str, float]:
        """{`Unit.name`: nats for one unit of its tail}."""
        return {probe.name: probe.weight for probe in self.probes}

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "evaluations": self.evaluations,
            "probes": [{**asdict(probe), "weight": probe.weight} for probe in self.probes],
        }


@torch.no_grad()
def probe_linears(
    model: PreTrainedModel,
    spectra: Spectra,
    tokens: Tokens,
    *,
    keep: float = PROBE_KEEP,
    sites: Sequence[Site] | None = None,
    layout: Layout = "plain",
    joint: Collection[str] = (),
    rank_multiple: int = 1,
    memory: int = MEMORY,
    journal: Path | None = None,
    identity: Mapping[str, Any] | None = None,
    spread: Spread | None = None,
    track: Track = silent,
) -> ProbeResult:
    """For every linear: cut it alone at one depth, and take the mean KL(dense || cut) of the model's predictions.

    A method's tail is in its own metric, and those of two linears cannot be compared. Divergence is to leading order
    proportional to the squared error of one linear, so weight = KL / tail at one depth makes weight x tail(r) an
    estimate in nats at every rank: what an allocation over all linears minimises.

    Predictions are, for a causal model, the next-token distributions at every real token that has a next; for a masked
    language model, the distribution at every real token; for a classifier, the one of each example. KL is taken in
    float32 and summed in float64; rounding alone gives about 1e-7, and a negative mean counts as 0.

    Where a cut at this depth loses nothing (a linear of low rank) half of its rank is tried, and so on.

    Args:
        model: dense, in eval mode; it is as it was after each probe.
        spectra, sites, layout, joint, rank_multiple: as in `surgical.search`.
        tokens: text to measure on; padding does not count.
        keep: depth of the cut, as a share of the linear's numbers.
        memory: bytes for the dense model's log-probabilities, on the model's device.
        journal, identity: as in `surgical.search`; the tokens are in the header by their digest.
        spread: carries out the probes on copies of the model elsewhere, several at the same time.
        track: shows the probes that remain.

    Raises:
        ValueError: a prediction that is not finite (names the site), a model without predictions to compare, in
            training mode or with fewer positions than the windows have, a journal of other probes, keep outside (0, 1).
        DecompositionError: a cut failed; names the site.

    Cost: one pass over the tokens per linear and a dense one; another dense one per linear over the windows for which
    `memory` has no room. One factorisation of each site.
    """
    if not 0 < keep < 1:
        raise ValueError(f"keep {keep} is outside (0, 1): it is the share of the linear's numbers kept in a probe")
    check_multiple(rank_multiple)
    check_evaluating(model)
    check_positions(model, tokens.ids.shape[1])
    _, units = select_units(model, sites, joint)
    settings = {
        "keep": keep,
        "layout": layout,
        "rank_multiple": rank_multiple,
        "tokens": tokens.digest,
        "sites": describe_units(units),
    }
    with open_journal(journal, KIND, identity and {**identity, **settings}) as entries:
        make = partial(Prober, tokens=tokens, keep=keep, layout=layout, rank_multiple=rank_multiple, memory=memory)
        probes: dict[str, Probe] = {}
        for unit in units:
            record = entries.find(unit.name)
            if record is not None:
                probes[unit.name] = _probe(unit, record)
        remaining = [unit for unit in units if unit.name not in probes]
        records = map(make(model, spectra), remaining) if spread is None else spread(make, remaining)
        for unit, record in track(zip(remaining, records, strict=True), "probes", len(remaining)):
            entries.write(unit.name, record)
            probes[unit.name] = _probe(unit, record)
    return ProbeResult(tuple(probes[unit.name] for unit in units), 1 + len(units))


class Prober:
    """Probes a model's units; calling it gives a unit's record for the journal.

    Args:
        as in `probe_linears`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        spectra: Spectra,
        *,
        tokens: Tokens,
        keep: float,
        layout: Layout,
        rank_multiple: int,
        memory: int,
    ) -> None:
        self._cuts, self._predictions = Cuts(model, spectra), _Predictions(model, tokens, memory)
        self._rank_for = partial(Unit.rank_for, share=keep, layout=layout, multiple=rank_multiple)

    @torch.no_grad()
    def __call__(self, unit: Unit) -> Record:
        start = time.perf_counter()
        rank, tail = _depth(self._cuts.factored(unit), self._rank_for(unit))
        divergence = _divergence(self._predictions, self._cuts.modules(unit, rank), f"{unit.name} at rank {rank}")
        return {"rank": rank, "divergence": divergence, "tail": tail, "seconds": seconds_since(start)}


def _probe(unit: Unit, record: Mapping[str, Any]) -> Probe:
    return Probe(unit.name, record["rank"], record["divergence"], record["tail"], record["seconds"])


def _depth(factored: Factored, rank: int) -> tuple[int, float]:
    """(rank, tail): the rank, halved until its cut loses something; the tail is 0 where no cut loses anything."""
    tails = factored.tails().tolist()
    nothing = NOTHING * tails[0]
    rank = min(rank, factored.max_rank)
    while tails[rank] <= nothing and rank > 1:
        rank //= 2
    return rank, tails[rank] if tails[rank] > nothing else 0.0


def _divergence(predictions: _Predictions, modules: Mapping[str, nn.Module], what: str) -> float:
    try:
        return predictions.divergence(modules)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


class _Predictions:
    """The dense model's predictions on the tokens, to compare with those of the model with modules swapped in."""

    def __init__(self, model: PreTrainedModel, tokens: Tokens, memory: int) -> None:
        self.model = model
        self.batches = tokens.rows(
            windows_per_batch(tokens.ids.shape[1], check_vocabulary(model, tokens.ids), models=2)
        )
        self._room = memory
        self._kept: dict[int, Tensor] = {}

    def divergence(self, modules: Mapping[str, nn.Module]) -> float:
        """Mean KL(dense || with `modules`), in nats."""
        total, count = 0.0, 0
        for number, batch in enumerate(self.batches):
            dense = self._dense(number)
            with swapped(self.model, modules):
                cut = log_probabilities(self.model, *batch.content)
            total += summed_divergence(dense, cut)
            count += len(dense)
        if count == 0:
            raise ValueError("the tokens hold nothing to predict: windows of one token")
        return max(0.0, total / count)

    def _dense(self, number: int) -> Tensor:
        if number in self._kept:
            return self._kept[number]
        predicted = log_probabilities(self.model, *self.batches[number].content)
        if predicted.nbytes <= self._room:
            self._room -= predicted.nbytes
            self._kept[number] = predicted
        return predicted
