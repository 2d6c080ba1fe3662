"""Module inputs: what named modules of a model read and give while it runs over a text, one batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

# Rows read at a time: memory and speed only.
ROWS = 8


def read_inputs(
    model: PreTrainedModel,
    names: Sequence[str],
    batches: Iterable[tuple[Tensor, Tensor]],
    note: Callable[[str, Tensor, Tensor, Tensor], None],
) -> None:
    """Run the model over batches of (ids, mask), and let `note` see what passes each of the named modules.

    Args:
        note: (name, input, output, mask), in the order in which the modules run: (rows, tokens, width) of each, and the
            mask (rows, tokens) of the batch on the same device, True for real tokens. Nothing is kept for it.

    Raises:
        ValueError: the model has no module of that name; and what `note` raises.
    """
    masks: list[Tensor] = []

    def see(name: str, x: Tensor, y: Tensor) -> None:
        mask = masks[-1].to(x.device)
        # Some models flatten rows and tokens before their MLP.
        note(name, x.reshape(*mask.shape, x.shape[-1]), y.reshape(*mask.shape, y.shape[-1]), mask)

    with watch_modules(model, names, see):
        for ids, mask in batches:
            masks.append(mask)
            whole = bool(mask.all())
            model(input_ids=ids.to(model.device), attention_mask=None if whole else mask.to(model.device).long())


def whole_rows(windows: Int[Tensor, "rows tokens"]) -> list[tuple[Tensor, Tensor]]:
    """Batches of (ids, mask) of rows without padding."""
    return [(ids, torch.ones_like(ids, dtype=torch.bool)) for ids in windows.split(ROWS)]


@contextmanager
def watch_modules(model: nn.Module, names: Sequence[str], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """Inside, `see` is called with (name, input, output) of the named modules; the hooks are taken off at the end.

    Raises:
        ValueError: the model has no module of that name.
    """
    handles = []
    try:
        for name in names:
            try:
                module = model.get_submodule(name)
            except AttributeError:
                raise ValueError(f"{type(model).__name__} has no module {name!r}") from None
            handles.append(module.register_forward_hook(lambda _module, args, y, name=name: see(name, args[0], y)))
        yield
    finally:
        for handle in handles:
            handle.remove()
