"""Weights: what each token of the calibration text counts for in the moments of an input.

The loss changes by E[(g^T (W - M) x)^2] / 2 to second order: a token counts by its gradient g. K-FAC (Martens and
Grosse, arXiv 1503.05671) takes g and x to be independent, E[g g^T] (x) E[x x^T]. They are not: nearly all heads attend
to a text's first token, whose gradient is some hundred times that of others, and whose keys and values are like no
other's. With the weights |g|^2 the factor of the inputs is

    E[|g|^2 x x^T] / E[|g|^2],

what is left of the whole, E[g g^T (x) x x^T], once the outputs are summed over: the step from the identity towards the
nearest product of two matrices (Van Loan and Pitsianis 1993), whose fixed point GFWSVD seeks (arXiv 2505.17974).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from eckart.data.tokens import Rows, Tokens
from eckart.lowrank import GradientMoments
from eckart.lowrank.moments import TOKEN_WEIGHTS
from eckart.models.experts import layer_role
from eckart.models.sites import Site

# {input group: what its tokens weigh, (samples, length)}.
Weights = Mapping[str, Float[Tensor, "samples length"]]


def blank_gradients(
    sites: Iterable[Site], needs: frozenset[str], places: int, device: torch.device
) -> dict[str, GradientMoments]:
    """{site name: gradient statistics, without a token so far}. Tokens of experts weigh what their router says."""
    return {
        site.name: GradientMoments(
            site.d_out,
            site.d_in,
            needs - {TOKEN_WEIGHTS} if layer_role(site.name) else needs,
            device=device,
            places=places,
        )
        for site in sites
    }


def group_weights(gradients: Mapping[str, GradientMoments], sites: Sequence[Site], tokens: Tokens) -> Weights:
    """What the tokens weigh in each input group of the sites: |g|^2, summed over the linears that read it.

    They are one on average. A group has none where all its gradients are zero, or whose tokens a router weighs.

    Args:
        gradients: of the sites that have any. sites: all that read the groups.
    """
    sums: dict[str, Tensor] = {}
    for site in sites:
        own = gradients[site.name].token_weights if site.name in gradients else None
        if own is not None:
            sums[site.input_group] = sums[site.input_group] + own if site.input_group in sums else own
    weights = {}
    for group, total in sums.items():
        each = total.view(tokens.ids.shape).double()
        read = int((each > 0).sum())
        if read:
            weights[group] = each * (_tokens_read(tokens, sites, group) / each.sum())
    return weights


def rows_weighed(weights: Weights | None, group: str, rows: Rows, *, source: bool) -> Float[Tensor, "rows side"] | None:
    """What some samples' tokens weigh in a group; None where they weigh alike."""
    if weights is None or group not in weights:
        return None
    return rows.side_of(weights[group][rows.first : rows.first + len(rows.ids)], source=source)


def _tokens_read(tokens: Tokens, sites: Sequence[Site], group: str) -> int:
    """How many tokens a group reads: all, or those of the source or of the target."""
    if tokens.split is None:
        return tokens.count
    source = next(site.of_source for site in sites if site.input_group == group)
    side = tokens.mask[:, : tokens.split] if source else tokens.mask[:, tokens.split :]
    return int(side.sum())
