"""What compressed linears lose of each sample, by hand."""

from __future__ import annotations

import math

from transformers import PreTrainedModel

from eckart.data.tokens import Tokens
from eckart.models.sites import find_sites, read_weight
from tiny import site_inputs


def log_errors(model: PreTrainedModel, reference: PreTrainedModel, tokens: Tokens) -> dict[str, list[float]]:
    """{linear: log of the relative error of its outputs on each sample}, on the dense model's inputs."""
    sites = find_sites(reference)
    rows: dict[str, list[float]] = {site.name: [] for site in sites}
    for row in range(len(tokens)):
        for name, x in site_inputs(reference, tokens.take(slice(row, row + 1)), sites).items():
            weight = read_weight(reference.get_submodule(name)).double()
            cut = model.get_submodule(name).dense().double()
            error, signal = (float((x.double() @ w.mT).square().sum()) for w in (weight - cut, weight))
            rows[name].append(math.log(error / signal))
    return rows
