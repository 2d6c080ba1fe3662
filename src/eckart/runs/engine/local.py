"""Local: work that runs in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from eckart.allocation.search.loss_weights import Spread
from eckart.allocation.search.trials import ScoreModel, Team
from eckart.calibration.moments import BlockCalibration, calibrate_by_block, gather_gradients
from eckart.compression.cuts import Cut, CutRequest, FactorRequest, cut_units, tails_of_units
from eckart.evals.result import EvalResult
from eckart.evals.subject import Setup, Subject
from eckart.evals.task import Task
from eckart.evals.tasks import evaluate
from eckart.lowrank import GradientMoments
from eckart.models.units import Unit
from eckart.runs.engine.base import CalibrationRequest, Engine, EvaluationRequest, SearchRequest


class Here(Engine):
    """This process."""

    def calibrate_by_block(self, request: CalibrationRequest) -> Iterator[BlockCalibration]:
        """See `Engine`."""
        return calibrate_by_block(**vars(request))

    def gather_gradients(self, request: CalibrationRequest) -> dict[str, GradientMoments]:
        """See `Engine`."""
        return gather_gradients(
            request.model,
            request.tokens,
            request.method,
            sites=request.sites,
            cache=request.cache,
            memory=request.memory,
            track=request.track,
        )

    def cut_units(self, request: CutRequest) -> Iterator[tuple[Unit, Cut]]:
        """See `Engine`."""
        return cut_units(request)

    def losses(self, request: FactorRequest) -> Iterator[tuple[Unit, Tensor]]:
        """See `Engine`."""
        for unit, tails in tails_of_units(request):
            yield unit, tails.cpu()

    @contextmanager
    def team(self, request: SearchRequest, score: ScoreModel) -> Iterator[Team | None]:
        """See `Engine`."""
        yield None

    @contextmanager
    def probing(self, request: SearchRequest) -> Iterator[Spread | None]:
        """See `Engine`."""
        yield None

    def outcomes(self, request: EvaluationRequest) -> Iterator[EvalResult | ValueError]:
        """See `Engine`."""
        for task in request.tasks:
            yield outcome_of(request.subject, task, request.setup)


HERE = Here()


@contextmanager
def open_here(address: str | None = None, workers: int | None = None) -> Iterator[Engine]:
    """This process, for the block.

    Args:
        workers: not used: an evaluation's `Setup` says how much it does at a time.

    Raises:
        ValueError: an address, which this process has not.
    """
    if address is not None:
        raise ValueError(f"address {address}: this process has none; leave it out, or say with --engine whose it is")
    yield HERE


def outcome_of(subject: Subject, task: Task, setup: Setup) -> EvalResult | ValueError:
    """The result of one task, or why it was refused."""
    try:
        # The fields of both are the arguments of `evaluate`.
        (result,) = evaluate(tasks=[task], **vars(subject), **vars(setup))
    except ValueError as error:
        return error
    return result
