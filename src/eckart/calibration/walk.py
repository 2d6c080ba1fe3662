"""Walk: a model run one block at a time on all batches, from the recorded calls that it makes of its blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.calibration.calls import Call, Tail, record, shared
from eckart.calibration.doors import Doors, Held
from eckart.calibration.routes import Routes, add_rows
from eckart.calibration.weights import Weights, rows_weighed
from eckart.data.tokens import Rows
from eckart.lowrank import InputMoments
from eckart.models.experts import Route
from eckart.models.sites import Site, blocks_of
from eckart.support.progress import Track, silent


def check_rows(name: str, x: Tensor, mask: Tensor, route: Route | None = None) -> None:
    """Raises ValueError where a linear's input (..., d_in) is not one row for each token of the mask, or of a route."""
    rows, tokens = x.shape[:-1].numel(), mask.numel() if route is None else len(route.tokens)
    if rows != tokens:
        raise not_of_tokens(name, f"reads {rows} rows for {tokens} tokens")


def not_of_tokens(name: str, what: str) -> ValueError:
    """The error of a linear whose inputs are not the text's tokens alone: DeBERTa's read relative positions too."""
    return ValueError(
        f"{name} {what}, so that it has no input for each token to take statistics of; exclude it, or give a method "
        "that needs no calibration, such as svd"
    )


@contextmanager
def summing_inputs(
    root: nn.Module,
    readers: Mapping[str, str],
    sums: Mapping[str, InputMoments],
    of_source: Collection[str] = (),
    weights: Weights | None = None,
) -> Iterator[Callable[[Rows], None]]:
    """Inside, what each linear reads is added to the moments of its input group, in place.

    Args:
        root: the model, or a block of it.
        readers: {input group: path of its first reader}. sums: {input group: moments}, of the same groups.
        of_source: groups that read the tokens of an encoder-decoder's source.
        weights: what tokens weigh in groups where they do not weigh alike.

    Yields: what is to be told a batch before its forward pass.

    Raises:
        ValueError: an input that is not finite or not one row for each token, or a second one in a forward pass (names
            the group).
    """
    batch: list[Rows] = []
    seen: set[str] = set()
    routes = Routes(root, readers.values())

    def expect(rows: Rows) -> None:
        batch[:] = [rows]
        seen.clear()

    def watch(group: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_module: nn.Module, args: tuple[Any, ...]) -> None:
            if group in seen:
                raise not_of_tokens(group, "is called more than once by its block")
            seen.add(group)
            route, source = routes.of(readers[group]), group in of_source
            mask, offered = batch[0].mask_of(source=source), batch[0].offered(source=source)
            check_rows(group, args[0], mask, route)
            try:
                weighed = rows_weighed(weights, group, batch[0], source=source)
                add_rows(sums[group], args[0], mask, route, offered=offered, weights=weighed)
            except ValueError as error:
                raise ValueError(f"{group}: {error}") from error

        return add

    handles = [root.get_submodule(path).register_forward_pre_hook(watch(group)) for group, path in readers.items()]
    try:
        with routes.watched():
            yield expect
    finally:
        for handle in handles:
            handle.remove()


class Walk:
    """Hidden states of all batches, advancing block by block.

    Attributes:
        next: the block at whose door they are.
        calls: of each batch, the other arguments of every block's call.
        tail: what blocks return after the hidden states.

    Args:
        batches: of the text.
        held: where they are kept between blocks; default in memory.
        start: the block at whose door `held` has them already; None to embed them.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batches: Sequence[Rows],
        track: Track = silent,
        *,
        held: Doors | None = None,
        start: int | None = None,
    ) -> None:
        self.blocks = blocks_of(model)
        self.track = track
        self.held: Doors = held or Held()
        self.batches = batches
        self.calls: list[list[Call]] = []
        self.tail: Tail = None
        for index, rows in track(enumerate(batches), "embedding", len(batches)):
            recording = record(model, rows)
            if start is None:
                self.held.write(index, recording.hidden)
            self.calls.append(shared(recording.calls, self.calls[-1] if self.calls else None))
            self.tail = recording.tail
            del recording
        if start is None:
            self.held.turn()
        self.next = start or 0

    @torch.no_grad()
    def moments(
        self, number: int, groups: dict[str, Site], needs: frozenset[str], weights: Weights | None = None
    ) -> dict[str, InputMoments]:
        """Run the blocks up to and with `number`, and return its moments.

        Args:
            weights: as in `summing_inputs`.
        """
        self.skip(number - 1)
        device = self.held.read(0).device
        collected = {group: InputMoments(site.d_in, needs, device=device) for group, site in groups.items()}
        readers = {group: site.role for group, site in groups.items()}
        of_source = {group for group, site in groups.items() if site.of_source}
        with summing_inputs(self.blocks[number], readers, collected, of_source, weights) as expect:
            for _ in self._advance(f"block {number}: moments", expect):
                pass
        return {group: collected.pop(group).compact() for group in list(collected)}

    @torch.no_grad()
    def skip(self, number: int) -> None:
        """Run the blocks up to and with `number`, without moments."""
        while self.next <= number:
            for _ in self._advance(f"block {self.next}: forward"):
                pass

    def _advance(self, description: str, expect: Callable[[Rows], None] = lambda _: None) -> Iterator[Rows]:
        """Run the next block on every batch; yields each batch once its forward pass is done.

        Args:
            expect: is given each batch before its forward pass.
        """
        block = self.blocks[self.next]
        for index, rows in self.track(enumerate(self.batches), description, len(self.batches)):
            expect(rows)
            self.held.write(index, self.calls[index][self.next].run(block, self.held.read(index)))
            yield rows
        self.held.turn()
        self.next += 1
