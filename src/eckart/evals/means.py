"""Means over windows of text, with the standard errors that the spread between the windows gives."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from eckart.evals.result import Score


def mean_of(values: Float[Tensor, "windows"]) -> Score:
    """The mean with its standard error; one window has none."""
    return Score(float(values.mean()), stderr_of(values), len(values))


def stderr_of(values: Float[Tensor, "windows"], *, slope: float = 1.0) -> float | None:
    """The standard error of the mean, or by the delta method of a function of it that has this slope there."""
    return slope * float(values.std()) / math.sqrt(len(values)) if len(values) > 1 else None
