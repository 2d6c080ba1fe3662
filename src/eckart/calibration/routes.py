"""Routes: which tokens of a batch each expert is given, while a model or a block runs."""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from eckart.lowrank import GradientMoments, InputMoments
from eckart.models.experts import Experts, Route, expert_of, layer_role


class Routes:
    """The routes of the latest batch, for the linears of experts at some paths.

    Args:
        root: the model or the block. paths: of linears in it, experts' or not.
    """

    def __init__(self, root: nn.Module, paths: Iterable[str]) -> None:
        self._places = {path: expert_of(path) for path in paths}
        names = {place[0] for place in self._places.values() if place is not None}
        self._experts = {name: root.get_submodule(name) for name in names}
        self._called: dict[str, tuple[Tensor, list[Route]]] = {}

    def of(self, path: str) -> Route | None:
        """The tokens that the linear is given; None of one that reads all of them."""
        place = self._places[path]
        return None if place is None else self._called[place[0]][1][place[1]]

    def rows_of(self, path: str) -> tuple[Tensor, Route]:
        """What an expert's first linear reads of the batch, (n, d_in), whether it was called already or not."""
        place, route = self._places[path], self.of(path)
        assert place is not None
        assert route is not None
        return self._called[place[0]][0][route.tokens], route

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Inside, each call of the experts is noted, and every expert is run, also those that no token is given to."""
        before, handles = {}, []
        try:
            for name, experts in self._experts.items():
                assert isinstance(experts, Experts)
                before[name], experts.visits_all = experts.visits_all, True
                handles.append(experts.register_forward_pre_hook(self._note(name)))
            yield
        finally:
            for handle in handles:
                handle.remove()
            for name, visits_all in before.items():
                self._experts[name].visits_all = visits_all  # type: ignore[assignment]

    def _note(self, name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(experts: nn.Module, args: tuple[Any, ...]) -> None:
            assert isinstance(experts, Experts)
            self._called[name] = args[0], Route.to_each(experts.num_experts, args[1], args[2])

        return note


def add_rows(
    moments: InputMoments,
    x: Tensor,
    mask: Tensor,
    route: Route | None,
    *,
    offered: int = 0,
    reference: Tensor | None = None,
    weights: Tensor | None = None,
) -> None:
    """Add what a linear reads of a batch to its moments, in place.

    The tokens of an expert weigh the square of what the router multiplies its output by: what the expert gets wrong
    of a token is in the model's hidden states times that number, and the errors are squared.

    Args:
        x: (..., d_in), of all tokens, or (n, d_in) of an expert's. mask: (...) of all tokens, True for real ones.
        route: of the expert. offered: see `Rows.offered`.
        weights: (...) of all tokens, see `weights.group_weights`; None where they weigh alike. Not of an expert's.

    Raises:
        ValueError: as `InputMoments.update`.
    """
    mask = mask.to(x.device)
    if route is None:
        if weights is not None:
            weights, offered = weights.to(x.device), offered or int(mask.sum())
        moments.update(x, mask, reference=reference, weights=weights, offered=offered)
        return
    weights = route.weights.double().square()
    offered = int(mask.sum())
    moments.update(x, mask.flatten()[route.tokens], reference=reference, weights=weights, offered=offered)


def both_routes(
    routes: Mapping[str, Route | None], seen: Mapping[str, Tensor]
) -> tuple[Route | None, dict[str, Tensor]]:
    """(the route, {stream: rows}) of the tokens that an expert is given in every stream.

    A token that two models send to different experts is no pair of inputs of one of them. Weights are the last
    stream's.
    """
    first, *others = routes.values()
    if first is None:
        return None, dict(seen)
    common = first.tokens
    for route in others:
        assert route is not None
        common = common[torch.isin(common, route.tokens)]
    rows, last = {}, first
    for name, route in routes.items():
        assert route is not None
        kept = torch.isin(route.tokens, common)
        rows[name], last = seen[name][kept], Route(common, route.weights[kept])
    return last, rows


def mean_of_experts(moments: Iterable[InputMoments]) -> InputMoments:
    """The moments of all tokens of several experts together.

    Raises:
        ValueError: none of them is given a token.
    """
    seen = [each for each in moments if each.total]
    if not seen:
        raise ValueError(
            "no calibration token is given to any selected expert of its layer: select more of them, or take more text"
        )
    return reduce(operator.add, seen)


def mean_gradients(gradients: Mapping[str, GradientMoments], layers: Collection[str]) -> dict[str, GradientMoments]:
    """{role of the experts of a layer: gradient statistics of all of them together}, of these roles."""
    means: dict[str, GradientMoments] = {}
    for name in gradients:
        role = layer_role(name)
        if role is not None and role in layers:
            means[role] = means[role] + gradients[name] if role in means else gradients[name]
    return means
