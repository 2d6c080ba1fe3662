"""Pausing: a block's forward pass on one batch, which waits wherever an input group is read, and then goes on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from greenlet import greenlet
from torch import Tensor, nn

from eckart.calibration.calls import Call
from eckart.calibration.routes import Routes
from eckart.calibration.walk import not_of_tokens
from eckart.models.experts import Route

# What a linear reads of a batch, and of which tokens; None of all.
Read = tuple[Tensor, Route | None]


class Run(greenlet):
    """A block's forward pass on one batch.

    A site's linear may be replaced while the run waits for it: what goes on is the linear that is in its place then. So
    every linear of a block can be calibrated on those before it in one pass, where a pass that cannot wait would have
    to be taken from the start for every group. What waits keeps what the block has computed so far in memory.

    It is a coroutine (`greenlet`), as a block is ordinary code which cannot give back control by itself, and not a
    thread, of which each would have torch's pool of threads to itself.

    Args:
        block: its sites may be replaced between two steps.
        hidden: (batch, length, width), at the block's door. call: the other arguments.
        readers: {group: {input group: path in the block of the first linear that reads it}}. The run waits before the
            first linear of a group, which is of one input, or of what the experts of a layer read.
        passed: groups that the run does not wait for.
    """

    def __init__(
        self,
        block: nn.Module,
        hidden: Tensor,
        call: Call,
        readers: Mapping[str, Mapping[str, str]],
        passed: tuple[str, ...] = (),
    ) -> None:
        super().__init__(self._forward)
        self.block, self.readers, self._passed = block, readers, passed
        self.first = {group: next(iter(paths.values())) for group, paths in readers.items()}
        self.routes = Routes(block, [path for paths in readers.values() for path in paths.values()])
        self._start: tuple[Tensor, Call] | None = (hidden, call)
        self._seen: set[str] = set()
        self.forwards: dict[str, Callable[..., Any]] = {}

    def advance(self) -> tuple[str, dict[str, Read]] | Tensor:
        """(the next group, {input group: what is read, of which tokens}), or the block's output where no further group
        is read.

        Raises:
            ValueError: a group is read a second time; or what the block raises.

        Cost: of the block's operations, those between two groups.
        """
        with _standing_in(self.block, self.first, self), self.routes.watched(), torch.no_grad():
            return self.switch()

    def finish(self) -> Tensor:
        """The block's output."""
        while not isinstance(reached := self.advance(), Tensor):
            pass
        return reached

    def _forward(self) -> Tensor:
        assert self._start is not None
        hidden, call = self._start
        self._start = None  # the block's own names are the only ones while it runs
        return call.run(self.block, hidden)

    def wait(self, group: str, x: Tensor) -> None:
        """Called in the run, where a group is read: gives back control until `advance` is called again."""
        if group in self._seen:
            raise not_of_tokens(group, "is called more than once by its block")
        self._seen.add(group)
        if group not in self._passed:
            assert self.parent is not None
            self.parent.switch((group, self._reads(group, x)))

    def _reads(self, group: str, x: Tensor) -> dict[str, Read]:
        paths = self.readers[group]
        if len(paths) > 1:
            return {name: self.routes.rows_of(path) for name, path in paths.items()}
        return {name: (x, self.routes.of(path)) for name, path in paths.items()}


@contextmanager
def _standing_in(block: nn.Module, readers: Mapping[str, str], run: Run) -> Iterator[None]:
    """Inside, the first reader of each group waits before it multiplies."""

    def stand_in(group: str, path: str) -> Callable[..., Any]:
        def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            run.wait(group, x)
            return run.forwards[path](x, *args, **kwargs)  # of the linear that is there now

        return forward

    modules = {path: block.get_submodule(path) for path in readers.values()}
    before: dict[str, Any] = {path: vars(module).get("forward") for path, module in modules.items()}
    run.forwards = {path: module.forward for path, module in modules.items()}
    try:
        for group, path in readers.items():
            modules[path].forward = stand_in(group, path)
        yield
    finally:
        for path, module in modules.items():
            vars(module).pop("forward", None)  # the class's forward is visible again
            if before[path] is not None:
                module.forward = before[path]  # an instance attribute of another library
