"""Refit: the left factor once more, by least squares, with the right one fixed."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.lowrank.factors import Factors
from eckart.lowrank.metrics import DecompositionError
from eckart.lowrank.moments import Moments

# Moments are kept in float32: a direction with less than this share of the largest variance is rounding.
RESOLUTION = 1e-6


def refit_left(weight: Float[Tensor, "out in"], factors: Factors, moments: Moments) -> Factors:
    """The left factor that reads the dense output W x best from what the right one keeps of xh.

        left = W X R^T (R Gh R^T)^-1,    d = W mu - left R mu_h    (moments centred where there is a bias)

    xh is x itself where the moments are of one stream (METHODS: refits). No output metric enters: with `left` free,
    each output is a regression of its own. The squared output error on the calibration tokens is never above that of
    the given factors; for factors that are optimal already (asvd-i, sfsd) nothing changes.

    Directions of R xh that no token used get the least-norm answer, so a singular moment is no special case.

    Raises:
        ValueError: the moments have no second moment.
        DecompositionError: the solve did not converge.

    Cost: products of 2 rank d_in^2 operations, one symmetric eigenproblem of size rank.
    """
    inputs = moments.require_inputs()
    crossed = inputs.keeps("cross_covariance") is not None
    if factors.bias is None:
        moment, cross = inputs.second_moment, inputs.cross_moment if crossed else inputs.second_moment
    else:
        moment, cross = inputs.covariance, inputs.cross_covariance if crossed else inputs.covariance
    right = factors.right.double().to(moment.device)
    weight = weight.double()
    kept = right @ moment @ right.mT
    # Each direction to a variance of one, so that what counts as unused does not depend on the factors' scale.
    scale = kept.diagonal().clamp_min(0).sqrt()
    scale = torch.where(scale > 0, 1 / scale, torch.zeros_like(scale))
    try:
        inverse = torch.linalg.pinv(scale[:, None] * kept * scale, hermitian=True, rtol=RESOLUTION)
    except torch.linalg.LinAlgError as error:
        raise DecompositionError(f"the moment of {factors.rank} kept directions cannot be solved with") from error
    left = (weight @ cross @ right.mT * scale) @ inverse * scale
    bias = None
    if factors.bias is not None:
        bias = weight @ inputs.reference_mean - left @ (right @ inputs.mean)
    return Factors(left, right, bias)
