"""Weights: what each token of the calibration text counts for in the moments of an input.

The loss changes by E[(g^T (W - M) x)^2] / 2 to second order: a token counts by its gradient g. K-FAC (Martens and
Grosse, arXiv 1503.05671) takes g and x to be independent, E[g g^T] (x) E[x x^T]. They are not: nearly all heads attend
to a text's first token, whose gradient is some hundred times that of others, and whose keys and values are like no
other's. What is left of the whole, E[g g^T (x) x x^T], once the outputs are summed over, is E[|g|^2 x x^T]: the step
from the identity towards the nearest product of two matrices (Van Loan and Pitsianis 1993), whose fixed point GFWSVD
seeks (arXiv 2505.17974). Gradients have heavy tails, and squares leave few tokens that count; so tokens weigh half way
between that and alike,

    E[|g| x x^T] / E[|g|],

which loses less than either on a real model (docs/decisions.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from eckart.calibration.routes import add_rows
from eckart.data.tokens import Rows, Tokens
from eckart.lowrank import GradientMoments, InputMoments
from eckart.lowrank.moments import TOKEN_WEIGHTS
from eckart.models.sites import Site, first_readers

# Parts of a block whose linears have no tokens that count more than others for what the linear is to give: there
# weights leave fewer tokens, and gain nothing.
ALIKE = frozenset({"mlp", "experts"})

# {input group: what its tokens weigh, (samples, length)}.
Weights = Mapping[str, Float[Tensor, "samples length"]]


def blank_gradients(
    sites: Iterable[Site], needs: frozenset[str], places: int, device: torch.device
) -> dict[str, GradientMoments]:
    """{site name: gradient statistics, without a token so far}."""
    return {
        site.name: GradientMoments(
            site.d_out,
            site.d_in,
            needs - {TOKEN_WEIGHTS} if site.part in ALIKE else needs,
            device=device,
            places=places,
        )
        for site in sites
    }


def group_weights(gradients: Mapping[str, GradientMoments], sites: Sequence[Site], tokens: Tokens) -> Weights:
    """What the tokens weigh in each input group of the sites: |g|, of the gradients of all linears that read it.

    They are one on average. A group has none where its tokens weigh alike, as in ALIKE, or all gradients are zero.

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
        each = total.view(tokens.ids.shape).double().sqrt()
        if each.any():
            weights[group] = each * (_tokens_read(tokens, sites, group) / each.sum())
    return weights


class Late:
    """Inputs whose tokens' weights a backward pass brings: held until it is over, and then added to their moments.

    Attributes:
        readers: {input group: its first reader}, of these groups.

    Args:
        sites: all. moments: {input group: moments without a token}. gradients: of the sites, whose passes these are.
    """

    def __init__(
        self,
        sites: Sequence[Site],
        moments: Mapping[str, InputMoments],
        gradients: Mapping[str, GradientMoments],
    ) -> None:
        weighing = [site for site in sites if gradients[site.name].token_weights is not None]
        self.readers = {group: site for group, site in first_readers(weighing).items() if group in moments}
        self._names = {group: [site.name for site in weighing if site.input_group == group] for group in self.readers}
        self._moments, self._gradients = moments, gradients
        self._read: dict[str, Tensor] = {}

    @contextmanager
    def held(self, model: nn.Module) -> Iterator[None]:
        """Inside, what the groups read in a forward pass is held."""

        def hold(group: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            def note(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
                self._read[group] = args[0].detach()

            return note

        handles = [
            model.get_submodule(site.name).register_forward_pre_hook(hold(group))
            for group, site in self.readers.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def add(self, rows: Rows, places: Callable[[bool], Tensor]) -> None:
        """Add what is held of some samples, once their backward pass is over.

        Args:
            places: where their tokens are in the text, of the source (True) or the target.

        Raises:
            ValueError: an input is not finite (names the group).
        """
        for group, site in self.readers.items():
            x, mask = self._read.pop(group), rows.mask_of(source=site.of_source)
            squares = sum(self._squares(name, places(site.of_source)) for name in self._names[group])
            assert isinstance(squares, Tensor)
            offered = rows.offered(source=site.of_source)
            try:
                add_rows(self._moments[group], x, mask, None, offered=offered, weights=squares.sqrt().view(mask.shape))
            except ValueError as error:
                raise ValueError(f"{group}: {error}") from error

    def level(self) -> None:
        """Have the weights be one on average, as those of `group_weights` are, once all samples were added."""
        for group in self.readers:
            moments = self._moments[group]
            if moments.total:
                moments.scale(moments.count / moments.total)

    def _squares(self, name: str, places: Tensor) -> Tensor:
        total = self._gradients[name].token_weights
        assert total is not None
        return total[places.to(total.device)].double()


def rows_weighed(weights: Weights | None, group: str, rows: Rows, *, source: bool) -> Float[Tensor, "rows side"] | None:
    """What some samples' tokens weigh in a group; None where they weigh alike."""
    if weights is None or group not in weights:
        return None
    return rows.side_of(weights[group][rows.first : rows.first + len(rows.ids)], source=source)


def _tokens_read(tokens: Tokens, sites: Sequence[Site], group: str) -> int:
    """How many tokens a group reads: all, or those of the source or of the target."""
    source = next(site.of_source for site in sites if site.input_group == group)
    return sum(int(rows.mask_of(source=source).sum()) for rows in tokens.rows(len(tokens)))
