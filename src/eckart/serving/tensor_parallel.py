"""Tensor parallelism: a runtime's layer that holds one or several of our linears, and a process's share of it.

Of a layer whose outputs are divided, each process has all right factors and its rows of the left ones; of one whose
inputs are divided, its columns of the right factor and the whole left one. Sums over processes are then over the rank's
values, or, where the runtime sums the outputs itself, over those. Nothing here knows a runtime.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from eckart.lowrank.pivoting import check_order
from eckart.models.checkpoint import empty_linear
from eckart.models.coded import CodedLinear, CodedMatrix
from eckart.models.linear import LowRankLinear
from eckart.models.matching import check_finite
from eckart.models.weight_files import CheckpointError


@dataclass(frozen=True)
class Span:
    """Outputs of a linear, or inputs, that one process has.

    Attributes:
        full: how many there are in all processes. start: the first one. size: how many.
    """

    full: int
    start: int
    size: int

    @classmethod
    def of(cls, size: int, process: int = 0, processes: int = 1, copies: int = 1) -> Span:
        """The span of a process, where each has `size` and `copies` neighbouring ones have the same.

        Heads of keys and values are copied where there are fewer of them than processes.
        """
        return cls(size * processes // copies, process // copies * size, size)


def rows_of(spans: Sequence[Span]) -> tuple[int, Tensor]:
    """Of a linear whose outputs are these spans, one after the other: how many it has, and the process's (rows,)."""
    rows, before = [], 0
    for span in spans:
        rows.append(torch.arange(span.start, span.start + span.size) + before)
        before += span.full
    return before, torch.cat(rows)


@dataclass(frozen=True)
class Share:
    """What one process multiplies with in place of one linear.

    y = weight x, or y = left p, or, pivoted, y = [p, left p] in the order `order`, with p = right x; plus bias.

    Attributes:
        weight: (rows, columns), of a dense linear and of a quantised weight.
        right: (rank, columns); None of a dense linear, and of one that shares another's.
        left: (rows, rank), pivoted those of no pivot; None where there are none.
        order: (rows,). bias: (rows,), or None.
    """

    weight: Tensor | None = None
    right: Tensor | None = None
    left: Tensor | None = None
    order: Tensor | None = None
    bias: Tensor | None = None

    def to(self, device: torch.device, dtype: torch.dtype) -> Share:
        """The same in a type, but for the order, and on a device."""
        numbers = {name: getattr(self, name) for name in ("weight", "right", "left", "bias")}
        moved = {name: None if t is None else t.to(device, dtype).contiguous() for name, t in numbers.items()}
        return Share(**moved, order=None if self.order is None else self.order.to(device))


def share_of(module: nn.Module, rows: Tensor, columns: Span) -> Share:
    """The share of a linear, whose numbers must be there. Cost: a copy of the share.

    Numbers in few bits are multiplied out: a quantised weight, with its factors added to it, to a dense weight, in the
    model's type; quantised factors to factors.

    Args:
        module: a `LowRankLinear`, a `CodedLinear` or an nn.Linear.
        rows: (rows,) the process's outputs. columns: its inputs.
    """
    bias = None if module.bias is None else cast(Tensor, module.bias).detach()[rows]
    inputs = slice(columns.start, columns.start + columns.size)
    if isinstance(module, CodedLinear) and module.base is None:
        right, left = (cast(CodedMatrix, side).dense(module.weight.dtype) for side in (module.right, module.left))
        return Share(right=right[:, inputs], left=left[rows], bias=bias)
    if isinstance(module, CodedLinear):
        return Share(weight=module.dense()[rows][:, inputs], bias=bias)
    if not isinstance(module, LowRankLinear):
        return Share(weight=cast(Tensor, module.weight).detach()[rows][:, inputs], bias=bias)
    own = None if module.lender is not None else module.right.weight.detach()[:, inputs]
    coefficients = module.left.weight.detach()
    if module.order is None:
        return Share(right=own, left=coefficients[rows], bias=bias)
    needed, order = cut_order(module.order, module.rank, rows)
    return Share(right=own, left=coefficients[needed] if len(needed) else None, order=order, bias=bias)


def cut_order(order: Tensor, rank: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Of a pivoted linear: which rows of its coefficients some outputs need, and the order of those outputs.

    Args:
        order: (d_out,), entries below `rank` name pivots, the others `rank` + a row of the coefficients.
        rows: (rows,) the outputs.
    """
    entries = order.long()[rows]
    combined = entries >= rank
    needed = entries[combined] - rank
    entries[combined] = rank + torch.arange(len(needed))
    return needed, entries


class Matrix(nn.Module):
    """A weight alone, as a runtime's products take it. `weight` (rows, columns)."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)


def multiply(matrix: nn.Module, x: Tensor) -> Tensor:
    """The product as torch makes it."""
    return linear(x, cast(Tensor, matrix.weight))


class SharedLayer(nn.Module):
    """The outputs of several linears that read one input, one after the other: a process's share of them.

    All that is multiplied with the input, dense weights and right factors, is one matrix, `first`.

    Args:
        shares: of each linear. lenders: of each, which one's right factor it takes, itself where that is its own.
        multiply: the product of a `Matrix` with an input; runtimes have their own.
        reduce: the sum over all processes, of a layer whose inputs are divided; None where it is not, and where the
            runtime sums the outputs.
    """

    def __init__(
        self,
        shares: Sequence[Share],
        lenders: Sequence[int],
        *,
        multiply: Callable[[nn.Module, Tensor], Tensor] = multiply,
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.multiply, self.reduce = multiply, reduce
        blocks = {i: share.right if share.weight is None else share.weight for i, share in enumerate(shares)}
        own = {i: block for i, block in blocks.items() if block is not None}
        self.first = Matrix(torch.cat(list(own.values())))
        self.widths = [len(block) for block in own.values()]
        places = {i: place for place, i in enumerate(own)}
        self.sources = [places[lender] for lender in lenders]
        self.is_dense = [share.weight is not None for share in shares]
        self.lefts = nn.ModuleList(nn.Identity() if share.left is None else Matrix(share.left) for share in shares)
        self.has_left = [share.left is not None for share in shares]
        self.is_pivoted = [share.order is not None for share in shares]
        for i, share in enumerate(shares):
            if share.order is not None:
                self.register_buffer(f"order_{i}", share.order, persistent=False)
        self.bias = _bias_of(shares)

    @property
    def matrices(self) -> list[Matrix]:
        """All that it multiplies with."""
        return [self.first, *(left for left in self.lefts if isinstance(left, Matrix))]

    def forward(self, x: Tensor) -> Tensor:
        """(..., columns) -> (..., rows)."""
        products = self.multiply(self.first, x)
        if self.reduce is not None:
            products = self.reduce(products)
        pieces = products.split(self.widths, -1) if len(self.widths) > 1 else (products,)
        outputs = []
        for i, left in enumerate(self.lefts):
            piece = pieces[self.sources[i]]
            if self.is_dense[i]:
                outputs.append(piece)
                continue
            y = self.multiply(left, piece) if self.has_left[i] else None
            if self.is_pivoted[i]:
                together = piece if y is None else torch.cat((piece, y), -1)
                y = together.index_select(-1, cast(Tensor, self._buffers[f"order_{i}"]))
            outputs.append(cast(Tensor, y))
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -1)
        return y if self.bias is None else y + self.bias


def _bias_of(shares: Sequence[Share]) -> nn.Parameter | None:
    """(rows of all,): zero where a linear has none; None where none has."""
    if all(share.bias is None for share in shares):
        return None
    parts = []
    for share in shares:
        rows = share.order if share.order is not None else share.left if share.weight is None else share.weight
        assert rows is not None
        like = next(t for t in (share.weight, share.left, share.right) if t is not None)
        parts.append(like.new_zeros(len(rows)) if share.bias is None else share.bias)
    return nn.Parameter(torch.cat(parts), requires_grad=False)


class Arriving:
    """The linears of one layer while a runtime hands over their tensors, one by one, in any order.

    Each is cut to the process's share as soon as it is whole, so that no more than a few whole linears are held.

    Args:
        sites: {name of a linear: its entry in the rank map, None where it is dense}, in the layer's order.
        rows: of each linear, how many outputs it has in all processes, and the process's.
        columns: the process's inputs.
        device, dtype: of the shares.

    Raises:
        CheckpointError: an entry does not fit its linear, or names one outside the layer as its lender.
    """

    def __init__(
        self,
        sites: Mapping[str, Mapping[str, Any] | None],
        rows: Sequence[tuple[int, Tensor]],
        columns: Span,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.names, self.rows, self.columns = list(sites), [each for _, each in rows], columns
        self.device, self.dtype = device, dtype
        self.shares: dict[int, Share] = {}
        self._arrived: list[dict[str, Tensor]] = [{} for _ in self.names]
        self.lenders = [self._lender_of(name, spec) for name, spec in sites.items()]
        linears: dict[int, nn.Module] = {}
        # Lenders first: their borrowers are built with them.
        for i in sorted(range(len(self.names)), key=lambda i: self.lenders[i] != i):
            name, spec, d_out = self.names[i], sites[self.names[i]], rows[i][0]
            if spec is None:
                linears[i] = nn.Linear(columns.full, d_out, bias=False, device="meta", dtype=dtype)
            else:
                lender = linears[self.lenders[i]] if self.lenders[i] != i else None
                linears[i] = empty_linear(name, spec, columns.full, d_out, dtype=dtype, lender=lender)
        self.linears = [linears[i] for i in range(len(self.names))]

    def _lender_of(self, name: str, spec: Mapping[str, Any] | None) -> int:
        lender = name if spec is None else spec.get("right_of", name)
        if lender not in self.names:
            raise CheckpointError(
                f"{name} shares the right factor of {lender}, which is in another layer here. "
                "Write a dense model and serve that: eckart export CHECKPOINT OUT --dense"
            )
        return self.names.index(lender)

    def expected(self, i: int) -> dict[str, Tensor]:
        """{key below the linear's name: a tensor of that shape and type} of all that one linear is made of.

        Without the empty `weight` of a low-rank one, which only stops loaders that do not know it.
        """
        state = self.linears[i].state_dict()
        return {key: tensor for key, tensor in state.items() if tensor.numel() or key != "weight"}

    def give_up_biases(self) -> None:
        """The runtime's own layer has a bias, and loads it: none of ours is waited for.

        Raises:
            CheckpointError: the rank map says that a linear has none, and the runtime would add what is in memory.
        """
        for name, module in zip(self.names, self.linears, strict=True):
            if module.bias is None and not isinstance(module, nn.Linear):
                raise CheckpointError(f"{name} has no bias in the checkpoint's rank map, and one in the model's class")
            module.register_parameter("bias", None)

    def take(self, i: int, key: str, tensor: Tensor) -> None:
        """A tensor of the i-th linear.

        Raises:
            CheckpointError: it is not expected, has another shape or numbers that are not finite, or an order that
                would read outside.
        """
        expected = self.expected(i)
        name = f"{self.names[i]}.{key}"
        if key not in expected:
            if tensor.numel():
                raise CheckpointError(f"{name} is in the checkpoint's files, and not in its rank map")
            return
        shape = expected[key].shape
        # vLLM turns every weight of a GPT-2, where the original's linears are stored turned.
        turned = tensor.ndim == 2 and tensor.shape != shape and tensor.mT.shape == shape
        arrived = tensor.detach().mT if turned else tensor.detach()
        if arrived.shape != shape:
            raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(shape)}")
        # A copy: what loaders hand over may be a buffer that they fill again.
        self._arrived[i][key] = arrived.clone()
        if self._arrived[i].keys() == expected.keys():
            self._finish(i)

    def _finish(self, i: int) -> None:
        module, name = self.linears[i], self.names[i]
        module.load_state_dict(self._arrived[i], strict=False, assign=True)
        self._arrived[i] = {}
        tensors = [*module.named_parameters(prefix=name), *module.named_buffers(prefix=name)]
        check_finite("the checkpoint", (each for each in tensors if each[1].is_floating_point()))
        if isinstance(module, LowRankLinear) and module.order is not None:
            try:
                check_order(module.order, module.rank, module.left.out_features)
            except ValueError as error:
                raise CheckpointError(f"{name}.order: {error}. Save or download the checkpoint again") from error
        self.shares[i] = share_of(module, self.rows[i], self.columns).to(self.device, self.dtype)
        module.to("meta")

    def finished(self) -> list[Share]:
        """The shares of all linears.

        Raises:
            CheckpointError: tensors are missing; names them.
        """
        missing = [
            f"{self.names[i]}.{key}"
            for i in range(len(self.names))
            if i not in self.shares
            for key in self.expected(i)
            if key not in self._arrived[i]
        ]
        if missing:
            raise CheckpointError(
                f"the checkpoint's files lack {', '.join(missing)}, which its rank map says they hold"
            )
        return [self.shares[i] for i in range(len(self.names))]
