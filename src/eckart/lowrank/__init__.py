"""The mathematics: a method is a metric, a cut, and a sum. torch and scipy only; knows no model and no file."""

from eckart.lowrank.catalogue import METHODS, build_method, method_options
from eckart.lowrank.factors import Factors
from eckart.lowrank.input_moments import InputMoments
from eckart.lowrank.method import Factored, Method, NestedSpectrum, Stage, output_error
from eckart.lowrank.metrics import DecompositionError
from eckart.lowrank.moments import GradientMoments, Moments
from eckart.lowrank.pivoting import LAYOUTS, Layout, Pivoted, num_stored, pivot, pivoted_rank_for, split
from eckart.lowrank.refit import refit_left
from eckart.lowrank.truncation import Spectrum, factor, interpolate, rank_for

__all__ = [
    "LAYOUTS",
    "METHODS",
    "DecompositionError",
    "Factored",
    "Factors",
    "GradientMoments",
    "InputMoments",
    "Layout",
    "Method",
    "Moments",
    "NestedSpectrum",
    "Pivoted",
    "Spectrum",
    "Stage",
    "build_method",
    "factor",
    "interpolate",
    "method_options",
    "num_stored",
    "output_error",
    "pivot",
    "pivoted_rank_for",
    "rank_for",
    "refit_left",
    "split",
]
