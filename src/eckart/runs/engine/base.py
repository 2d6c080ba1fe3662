"""Base: what an engine does, and the requests to it. An engine is where work runs.

Wherever that is, the numbers are the same. Each engine is a file of its own and a row of `choose.ENGINES`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from eckart.allocation.search.loss_weights import Spread
from eckart.allocation.search.trials import ScoreModel, Team
from eckart.calibration.moments import BlockCalibration, Memory
from eckart.compression.cuts import Cut, CutRequest, FactorRequest
from eckart.data.tokens import Tokens
from eckart.evals.result import EvalResult
from eckart.evals.subject import Setup, Subject
from eckart.evals.task import Task
from eckart.lowrank import GradientMoments, Method
from eckart.models.sites import Site
from eckart.models.units import Unit
from eckart.support.progress import Track, silent

# Computes the moments of a model's blocks anew at each call; None where none are needed.
Blocks = Callable[[], Iterable[BlockCalibration]] | None


@dataclass(frozen=True)
class CalibrationRequest:
    """A model to be read on tokens, for what a method needs.

    Attributes:
        model, tokens, method, sites, cache, gradients, memory, batch_size, track: as in `calibration.moments`'s
            functions. An engine may leave the memory empty.
    """

    model: PreTrainedModel
    tokens: Tokens
    method: Method
    sites: Sequence[Site] | None = None
    cache: Path | None = None
    gradients: dict[str, GradientMoments] | None = None
    memory: Memory | None = None
    batch_size: int = 8
    track: Track = silent


@dataclass(frozen=True)
class SearchRequest:
    """A model to be measured with cuts in it.

    Attributes:
        model: dense.
        method: makes the spectra that are cut.
        blocks: the dense model's own moments, which make the spectra.
        joint: input groups whose linears are factored as one stack.
    """

    model: PreTrainedModel
    method: Method
    blocks: Blocks
    joint: Collection[str] = ()


@dataclass(frozen=True)
class EvaluationRequest:
    """A model to be evaluated.

    Attributes:
        subject: the model, and what it is compared with.
        tasks: in the order of the results.
        setup: settings that change no number.
    """

    subject: Subject
    tasks: Sequence[Task]
    setup: Setup


class Engine(ABC):
    """Where work runs. A method with the name of a function of eckart gives what that gives, and raises the same."""

    @abstractmethod
    def calibrate_by_block(self, request: CalibrationRequest) -> Iterator[BlockCalibration]:
        """The moments of one block after another, see `calibration.moments.calibrate_by_block`."""

    @abstractmethod
    def gather_gradients(self, request: CalibrationRequest) -> dict[str, GradientMoments]:
        """{site name: gradient statistics}, see `calibration.moments.gather_gradients`."""

    @abstractmethod
    def cut_units(self, request: CutRequest) -> Iterator[tuple[Unit, Cut]]:
        """Each unit cut at its rank, in order, see `compression.cuts.cut_units`."""

    @abstractmethod
    def losses(self, request: FactorRequest) -> Iterator[tuple[Unit, Tensor]]:
        """Each unit, in order, and its `Factored.tails`, in main memory."""

    @abstractmethod
    def team(self, request: SearchRequest, score: ScoreModel) -> AbstractContextManager[Team | None]:
        """A team that measures a search's trials, for the block; None: the search measures them itself."""

    @abstractmethod
    def probing(self, request: SearchRequest) -> AbstractContextManager[Spread | None]:
        """What carries out probes, for the block; None: `probe_linears` does it itself."""

    @abstractmethod
    def outcomes(self, request: EvaluationRequest) -> Iterator[EvalResult | ValueError]:
        """The result of each task in order, or why it was refused."""
