"""Baselines: what low-rank compression has to beat at equal bytes. Quantised weights and pruned structures."""

from eckart.compression.baselines.catalogue import BASELINES, Baseline, baseline_options, build_baseline

__all__ = ["BASELINES", "Baseline", "baseline_options", "build_baseline"]
