"""Shared products: the product of one input with a right factor that several linears share, computed once."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from eckart.models.matmul import multiply


@dataclass(slots=True)
class _Held:
    """A product, its input and factor, and which linears have read it."""

    input: weakref.ref[Tensor]
    product: Tensor
    parts: tuple[object, ...]  # the factor and its weights, kept alive so that nothing else gets their ids
    stamp: tuple[object, ...]
    read: set[int]


class SharedProduct:
    """The product of one input with a right factor, handed to the linears that share the factor, one after the other.

    The first linear that is called with an input computes; the next ones, called with the same tensor object, get its
    product. The product is dropped once every linear has read it, or the input is gone, or a backward pass has gone
    through it. A linear that asks a second time, an input or a weight that was changed in place or replaced since, a
    weight that was frozen, another module in the factor's place, and another gradient, inference, autocast or training
    mode: each computes anew.

    So no call differs from `right(x)`, but for changes that torch does not record, where they fall between two linears'
    calls on one input: of a weight through `.data`, and of the input in place under inference mode or in compiled code.

    Copies and pickles are empty: they carry the number of readers and no product.

    Args:
        readers: linears that share the factor.
    """

    def __init__(self, readers: int = 1) -> None:
        self.readers = readers
        self._held: _Held | None = None
        # An input and its product, which were computed elsewhere.
        self._given: tuple[Tensor, Tensor] | None = None
        # In compiled code: the factor, the input, the product, and how many linears have yet to read it.
        self._traced: tuple[nn.Module, Tensor, Tensor, int] | None = None

    def __reduce__(self) -> tuple[object, ...]:
        return SharedProduct, (self.readers,)

    @property
    def is_empty(self) -> bool:
        """Whether no product is held."""
        return self._held is None and self._traced is None

    def give(self, x: Tensor, product: Tensor) -> None:
        """Hand over the product with an input that the next call of `take` is to be asked for: rows of a larger one."""
        self._given = (x, product)

    def take(self, right: nn.Module, x: Tensor, reader: object) -> Tensor:
        """right(x), computed now or held since another reader's call.

        Cost: the product itself and some microseconds, whatever the size.
        """
        given, self._given = self._given, None
        if given is not None and given[0] is x:
            return given[1]
        if self.readers == 1 or torch.jit.is_tracing():
            return multiply(right, x)
        if torch.compiler.is_compiling():
            # With gradients the compiler merges equal products by itself.
            return right(x) if torch.is_grad_enabled() else self._take_traced(right, x)
        held = self._held
        if (
            held is not None
            and held.input() is x
            and id(reader) not in held.read
            and held.stamp == _stamp(right, _weights(right), x)
        ):
            held.read.add(id(reader))
            if len(held.read) >= self.readers:
                self._held = None
            return held.product
        product = multiply(right, x)
        # Taken after the call: a weight that an offloading hook fetches is another object before it.
        weights = _weights(right)
        reference = weakref.ref(x, self._forget)
        self._held = _Held(reference, product, (right, *weights), _stamp(right, weights, x), {id(reader)})
        if product.requires_grad:
            # A backward pass frees what a second one through this product would need.
            product.register_hook(lambda _gradient: self._forget(reference))
        return product

    def _take_traced(self, right: nn.Module, x: Tensor) -> Tensor:
        """The same in code that is being compiled, which knows no weak references and no versions.

        Nothing outlives the graph: the last reader drops the product.
        """
        if self._traced is not None and self._traced[0] is right and self._traced[1] is x:
            product, pending = self._traced[2:]
        else:
            product, pending = right(x), self.readers
        self._traced = (right, x, product, pending - 1) if pending > 1 else None
        return product

    def _forget(self, reference: weakref.ref[Tensor]) -> None:
        """Drop the product of this input, if it is the one that is held."""
        if self._held is not None and self._held.input is reference:
            self._held = None


def _weights(right: nn.Module) -> tuple[nn.Parameter, ...]:
    """All parameters of the factor; of an ordinary linear without the walk, which takes longer than a small product."""
    return (right.weight,) if type(right) is nn.Linear and right.bias is None else tuple(right.parameters())


def _stamp(right: nn.Module, weights: tuple[nn.Parameter, ...], x: Tensor) -> tuple[object, ...]:
    """All that the product depends on but the tensors' numbers; equal stamps of one input mean equal products."""
    kind = x.device.type
    return (
        x.requires_grad,
        _version(x),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind),
        id(right),
        right.training,
        *((id(weight), weight.requires_grad, _version(weight)) for weight in weights),
    )


def _version(tensor: Tensor) -> int | None:
    """How often the tensor was changed in place; None of an inference tensor, which does not count it."""
    return None if tensor.is_inference() else tensor._version  # noqa: SLF001 (torch has no public name for it)
