"""Module inputs: what named modules of a model read and give while it runs over a text, one batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.data.pairs import arguments_of, is_encoder_decoder
from eckart.data.tokens import Rows

# Rows read at a time: memory and speed only.
ROWS = 8


@dataclass
class _Read:
    """The batch that a model reads: its samples' masks, and once its encoder has run, what that gives."""

    source: Tensor
    target: Tensor
    encoded: Tensor | None = None

    def mask_of(self, x: Tensor, in_encoder: bool) -> Tensor:
        """The mask of what a module reads: the source's in the encoder, and where the decoder reads the encoder's."""
        of_source = in_encoder or (
            self.encoded is not None
            and x.shape == self.encoded.shape
            and torch.equal(x, self.encoded.to(x.device, x.dtype))
        )
        return (self.source if of_source else self.target).to(x.device)


def read_inputs(
    model: PreTrainedModel,
    names: Sequence[str],
    batches: Iterable[Rows],
    note: Callable[[str, Tensor, Tensor, Tensor], None],
) -> None:
    """Run the model over some samples, and let `note` see what passes each of the named modules.

    Args:
        note: (name, input, output, mask), in the order in which the modules run: (rows, tokens, width) of each, and the
            mask (rows, tokens) on the same device, True for real tokens: of an encoder-decoder those of the source in
            its encoder and where the decoder reads what the encoder gives, else those of the target. Nothing is kept
            for it.

    Raises:
        ValueError: the model has no module of that name, or one that does not read every token; and what `note` raises.
    """
    read: list[_Read] = []
    encoder = model.get_encoder() if is_encoder_decoder(model) else None
    inside = set() if encoder is None else set(encoder.modules())
    in_encoder = {name: module in inside for name, module in model.named_modules() if name in set(names)}

    def see(name: str, x: Tensor, y: Tensor) -> None:
        mask = read[-1].mask_of(x, in_encoder[name])
        if x.shape[:-1].numel() != mask.numel():
            raise ValueError(
                f"{name} reads {x.shape[:-1].numel()} rows for {mask.numel()} tokens, as a linear of an expert does: "
                "leave it out, this is of linears that read every token"
            )
        # Some models flatten rows and tokens before their MLP.
        note(name, x.reshape(*mask.shape, x.shape[-1]), y.reshape(*mask.shape, y.shape[-1]), mask)

    def encode(_module: nn.Module, _args: object, output: Any) -> None:
        read[-1].encoded = output[0]

    with watch_modules(model, names, see):
        handle = None if encoder is None else encoder.register_forward_hook(encode)
        try:
            for rows in batches:
                read[:] = [_Read(rows.mask_of(source=True), rows.mask_of(source=False))]
                model(**arguments_of(model, rows))
        finally:
            if handle is not None:
                handle.remove()


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
