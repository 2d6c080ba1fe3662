"""Coding: a linear kept in few bits: its weight quantised, what that lost corrected by factors, all by its moments.

    M = Q + L R + (x -> d),   minimise E||A (W x - M xh)||^2

Q is the anchored target T (or W) rounded so that its columns take up each other's errors; L R is the method's cut of
T - Q, rounded in turn, its left factor fit to what the rounded right one gives. Without a base Q is zero, and the
factors alone are in few bits. Then Q and L R are made anew in turns, each for what the other leaves, as long as the
loss falls: LoftQ's alternation (Li et al., arXiv 2310.08659) in the metric of the method.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from eckart.lowrank import Factored, Factors, Method, Moments
from eckart.lowrank.codes import Codes, round_nearest
from eckart.lowrank.method import Prepared
from eckart.lowrank.metrics import Metric, Whitening
from eckart.lowrank.rounding import CodedFactors, code_factors, round_compensated
from eckart.lowrank.storage import Storage
from eckart.lowrank.truncation import weigh


def code_linear(
    method: Method,
    weight: Tensor,
    moments: Moments,
    prepared: Prepared,
    storage: Storage,
    rank: int | None,
    *,
    turns: int = 0,
) -> tuple[CodedFactors, Factored | None]:
    """A linear in few bits, and the spectrum that its factors were cut from; None where it has none.

    Args:
        weight: (d_out, d_in). prepared: of these moments.
        rank: None for a quantised weight alone.
        turns: how often at most Q and L R are made anew.

    Raises:
        ValueError, DecompositionError: as the method and the rounding raise them.

    Cost: of the base `rounding.round_compensated`, of the factors the method's, both again for each turn.
    """
    target, moment = _target(weight, prepared), _moment(method, moments, prepared)
    base = None if storage.base is None else _round(target, moment, storage.base, storage.group)
    coded, factored = CodedFactors(storage, base, None, None), None
    if rank is not None:
        coded, factored = _with_factors(method, weight, moments, prepared, coded, rank, target, moment)
        if storage.base is not None and turns:
            loss = _loss_of(method, moments, prepared, target)
            least = loss(coded)
            for _ in range(turns):
                other = _round(target - _product(coded, target.dtype), moment, storage.base, storage.group)
                again, _ = _with_factors(
                    method, weight, moments, prepared, replace(coded, base=other), rank, target, moment
                )
                lost = loss(again)
                if lost >= least:
                    break
                coded, least = again, lost
    return _with_bias(method, weight, moments, coded), factored


def losses_in_bits(
    method: Method, weight: Tensor, moments: Moments, prepared: Prepared, bases: Sequence[int], group: int
) -> dict[int | None, Tensor]:
    """{bits of a quantised weight: the method's loss at every rank of a correction}; under None that of factors alone.

    Factors are taken as they are before rounding. Raises, cost: of each as `code_linear`, without singular vectors.
    """
    target, moment = _target(weight, prepared), _moment(method, moments, prepared)
    losses: dict[int | None, Tensor] = {None: method.tails(weight, moments, prepared=prepared)}
    for bits in bases:
        base = _round(target, moment, bits, group).dense(target.dtype)
        losses[bits] = method.tails(weight, moments, prepared=prepared, base=base)
    return losses


def _with_factors(
    method: Method,
    weight: Tensor,
    moments: Moments,
    prepared: Prepared,
    coded: CodedFactors,
    rank: int,
    target: Tensor,
    moment: Tensor | None,
) -> tuple[CodedFactors, Factored]:
    """The base with the method's cut of what it leaves, as it is stored; and the cut's spectrum."""
    storage = coded.storage
    base = None if coded.base is None else coded.base.dense(target.dtype)
    factored = method.factor(weight, moments, prepared=prepared, rank=rank, base=base)
    factors = factored.cut(rank)
    if storage.factors is None:
        balanced = Factors(factors.left, factors.right).balanced().to(weight.dtype)
        return replace(coded, left=balanced.left, right=balanced.right), factored
    left_over = target if base is None else target - base
    factors = Factors(factors.left.to(target.dtype), factors.right.to(target.dtype))
    left, right = code_factors(factors, left_over, moment, storage.factors, storage.group)
    return replace(coded, left=left, right=right), factored


def _target(weight: Tensor, prepared: Prepared) -> Tensor:
    """T, in float32 or better: W, or in anchored order what comes nearest to its outputs."""
    exact = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if prepared.anchor is None:
        return exact
    target = prepared.anchor.target(exact)
    if target is None:
        target = prepared.anchor.target(exact.double())
        assert target is not None
    return target.to(exact.dtype)


def _moment(method: Method, moments: Moments, prepared: Prepared) -> Tensor | None:
    """The moment by which the method weighs inputs; the plain one where it has none, None where there is no text."""
    if isinstance(prepared.root, Whitening):
        return prepared.root.moment()
    inputs = moments.inputs
    if inputs is None or inputs.keeps("covariance") is None:
        return None
    return inputs.moment(centred=method.centred)


def _round(target: Tensor, moment: Tensor | None, bits: int, group: int) -> Codes:
    """A weight in few bits."""
    block = (1, group)
    return round_nearest(target, bits, block) if moment is None else round_compensated(target, moment, bits, block)


def _product(coded: CodedFactors, dtype: torch.dtype) -> Tensor:
    """L R."""
    return replace(coded, base=None).dense(dtype)


def _loss_of(method: Method, moments: Moments, prepared: Prepared, target: Tensor) -> Callable[[CodedFactors], float]:
    """||A (T - M) B||^2 of what is stored, the part of the loss that M decides."""
    metric: Metric = None if method.stage.metric is None else method.stage.metric(moments)

    def loss(coded: CodedFactors) -> float:
        lost = target.double() - coded.dense(torch.float64)
        return float(weigh(lost, prepared.root, metric).square().sum())

    return loss


def _with_bias(method: Method, weight: Tensor, moments: Moments, coded: CodedFactors) -> CodedFactors:
    """The same with the bias that fits what is stored, d = W mu - M mu; unchanged for a method without one."""
    if not method.centred:
        return coded
    inputs = moments.require_inputs()
    given = coded.dense(torch.float64) @ inputs.mean
    return replace(coded, bias=weight.double() @ inputs.reference_mean - given)
