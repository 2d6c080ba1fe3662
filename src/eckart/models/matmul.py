"""Matrix products: the two of a low-rank linear, each in the order of operations that the processor is fastest with.

y = left(right(x)) is two products of torch's, and nothing here changes their results but for rounding. On a processor
torch takes different times for the same product, depending on how it is asked; benchmarks/inference.py measures what
is used here, docs/decisions.md has the numbers:

    one row:              `mv` takes less time to be called than a linear, which in bfloat16 also packs the matrix for
                          the processor's tiles first.
    few rows:             W xᵀ instead of x Wᵀ: the large matrix comes first and is read as stored. The result stays
                          transposed for the next product, and reordering it moves whole rows.
    many rows, pivoted:   both products are written next to each other into one piece of memory; or the left factor is
                          spread to all rows for the time of a call, where the rank is small, and nothing is reordered.
    pivoted:              outputs are put in order by whichever of torch's functions is fastest, see `reorder`.

Few rows transposed, the spreading and `mv` in bfloat16 are for processors with tiles for matrices (Intel AMX): without
them torch has another product of bfloat16, which is up to four times as slow transposed.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.nn.modules.module import _has_any_global_hook

# More rows than these are faster the ordinary way, and are worth the calls that save a pass over them.
FEW = 64
# A matrix of fewer numbers is in the cache, where the order matters less than the calls that change it.
SMALL = 2**18
# In float32, fewer rows than these are faster the ordinary way: a linear then reads the matrix row by row as well.
FEWEST_FLOAT32 = 16
# Moving one number of 16 bits to its place takes about as long as so many multiplications of bfloat16.
MOVE = 800


def bare_weights(x: Tensor, *modules: nn.Module) -> list[Tensor] | None:
    """The modules' weights, if each module(x) is x Wᵀ and nothing else, on a processor, without a gradient or a graph.

    None otherwise: a linear with a hook, a wrapper or another kind of weight in its place has to be called as it is.

    Args:
        x: an input of the first module, of whose type and device those of the others are.

    Cost: some three microseconds, less than calling the modules takes besides their products.
    """
    if (
        torch.is_grad_enabled()
        or _is_recorded()
        or type(x) is not Tensor
        or not x.is_cpu
        or torch.is_autocast_enabled("cpu")
        or _is_transformed()
        or _has_any_global_hook()
    ):
        return None
    weights: list[Tensor] = []
    for module in modules:
        if type(module) is not nn.Linear:
            return None
        # Read where torch keeps it, and has no public name for: as an attribute it takes a microsecond.
        parameters = module._parameters  # noqa: SLF001
        weight = parameters.get("weight")
        if (
            type(weight) is not nn.Parameter
            or weight.dtype != x.dtype
            or not weight.is_cpu
            or parameters.get("bias", weight) is not None
            or module._forward_hooks  # noqa: SLF001
            or module._forward_pre_hooks  # noqa: SLF001
            or "forward" in module.__dict__
        ):
            return None
        weights.append(weight)
    return weights


def multiply(module: nn.Module, x: Tensor) -> Tensor:
    """module(x). Of a bare linear and few rows it may be transposed in memory, as is fastest for `combine`.

    Args:
        x: (..., d_in).
    """
    weights = bare_weights(x, module)
    if weights is None:
        product: Tensor = module(x)
        return product
    return _product(weights[0], x)


def combine(left: Tensor, p: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
    """left p + bias, or [p, left p] in the order `order`, plus bias; contiguous. For a bare left linear.

    Args:
        left: (d_out, rank), or where pivoted (others, rank).
        p: (..., rank), of `multiply`.
        order, bias: (d_out,).
    """
    if _is_one(p):
        return _combine_one(left, p.reshape(-1), order, bias).view(*p.shape[:-1], -1)
    rows = p.reshape(-1, p.shape[-1])
    if rows.shape[0] > 1 and not rows.is_contiguous():
        transposed = torch.mm(left, rows.T)
        if order is not None:
            transposed = torch.cat((rows.T, transposed)).index_select(0, order)
        y = transposed.T.contiguous()
        return _shaped(y if bias is None else y.add_(bias), p)
    if order is None:
        y = linear(p, left)
        # Not the linear's own bias, which rounds once less than the same module does with gradients.
        return y if bias is None else y.add_(bias)
    if len(rows) <= FEW:
        return _finished(torch.cat((rows, linear(rows, left)), 1), order, bias, p)
    if _spreads(rows, left, order):
        return linear(p, spread(left, order), bias)
    rank = rows.shape[1]
    joined = rows.new_empty(len(rows), rank + len(left))
    joined[:, :rank] = rows
    torch.mm(rows, left.T, out=joined[:, rank:])
    return _finished(joined, order, bias, p)


def run(right: Tensor, left: Tensor, order: Tensor | None, bias: Tensor | None, x: Tensor) -> Tensor:
    """`combine` of the product with the right factor, which nobody else reads. For two bare linears.

    Args:
        right: (rank, d_in).
        left, order, bias: as of `combine`.
        x: (..., d_in).
    """
    if _is_one(x):
        p = torch.mv(right, x.reshape(-1))
        return _combine_one(left, p, order, bias).view(*x.shape[:-1], -1)
    if order is None or not _is_joined(x):
        return combine(left, _product(right, x), order, bias)
    rows, rank = x.reshape(-1, x.shape[-1]), len(right)
    joined = rows.new_empty(len(rows), rank + len(left))
    torch.mm(rows, right.T, out=joined[:, :rank])
    torch.mm(joined[:, :rank], left.T, out=joined[:, rank:])
    return _finished(joined, order, bias, x)


def reorder(joined: Tensor, order: Tensor) -> Tensor:
    """joined[..., order].

    On a processor index_select is fast for a float32 matrix and has no fast backward pass; of more dimensions or of
    other types it takes two to ten times as long as `gather`, whose indices have the shape of the result.
    """
    if _is_recorded() or not joined.is_cpu:
        return joined.index_select(-1, order)
    if joined.dtype != torch.float32 or joined.requires_grad:
        return joined.gather(-1, order.long().expand(*joined.shape[:-1], -1))
    if joined.dim() == 2:
        return joined.index_select(1, order)
    return _shaped(joined.reshape(-1, joined.shape[-1]).index_select(1, order), joined)


def spread(coefficients: Tensor, order: Tensor) -> Tensor:
    """(d_out, rank): the left factor of a pivoted map with a row for every output; of a pivot, a unit row.

    Cost: as much memory as the left factor of a plain linear of that rank.
    """
    rank, entries = coefficients.shape[1], order.long()
    left = coefficients.index_select(0, (entries - rank).clamp_(min=0))
    pivots = (entries < rank).nonzero()[:, 0]
    left.index_fill_(0, pivots, 0)
    left[pivots, entries[pivots]] = 1
    return left


@cache
def has_tiles() -> bool:
    """Whether the processor has tiles for products of bfloat16 (Intel AMX)."""
    return bool(torch.cpu.get_capabilities().get("amx_bf16"))


def _product(weight: Tensor, x: Tensor) -> Tensor:
    """x Wᵀ, see `multiply`."""
    if _is_one(x):
        return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    if not _prefers_transposed(weight, x):
        return linear(x, weight)
    return _shaped(torch.mm(weight, x.reshape(-1, x.shape[-1]).T).T, x)


def _combine_one(left: Tensor, p: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
    """(d_out,): `combine` of one row p (rank,)."""
    y = torch.mv(left, p)
    if order is not None:
        y = torch.cat((p, y)).index_select(0, order)
    return y if bias is None else y.add_(bias)


def _finished(joined: Tensor, order: Tensor, bias: Tensor | None, like: Tensor) -> Tensor:
    """The rows of [p, left p] in the order, plus bias, in the batch shape of `like`."""
    if len(joined) == 1:
        y = joined.view(-1).index_select(0, order)
    elif joined.element_size() == 2:
        # Types of half precision are gathered one number at a time through float32, and integers as they are.
        y = reorder(joined.view(torch.int16), order).view(joined.dtype)
    else:
        y = reorder(joined, order)
    return _shaped(y if bias is None else y.add_(bias), like)


def _is_one(x: Tensor) -> bool:
    """Whether it is one row whose product `mv` is fastest with."""
    if x.numel() != x.shape[-1]:
        return False
    return x.dtype in (torch.float32, torch.float64) or (x.dtype == torch.bfloat16 and has_tiles())


def _prefers_transposed(weight: Tensor, x: Tensor) -> bool:
    """Whether W xᵀ is faster than x Wᵀ: few rows, and a matrix so large that it matters."""
    if not has_tiles() or weight.numel() < SMALL or x.dtype not in (torch.bfloat16, torch.float32):
        return False
    least = FEWEST_FLOAT32 if x.dtype == torch.float32 else 2
    return least <= x.numel() // max(x.shape[-1], 1) <= FEW


def _is_joined(x: Tensor) -> bool:
    """Whether it has so many rows that writing both products into one memory pays.

    Torch's products of bfloat16 are slower with rows that are not next to each other.
    """
    return x.numel() > FEW * x.shape[-1] and x.dtype in (torch.float32, torch.float64)


def _spreads(rows: Tensor, left: Tensor, order: Tensor) -> bool:
    """Whether spreading the left factor is faster than reordering the outputs.

    It moves rank numbers for each output, once, where reordering moves one for each row, and adds rank^2
    multiplications to each row, where reordering moves d_out numbers.
    """
    rank = rows.shape[1]
    pays = max(FEW, rank) < len(rows) and rank * rank <= MOVE * len(order)
    return rows.dtype == torch.bfloat16 and pays and len(left) > 0 and has_tiles()


def _shaped(rows: Tensor, like: Tensor) -> Tensor:
    """Rows (n, out) in the batch shape of `like`."""
    return rows.view(*like.shape[:-1], rows.shape[-1])


def _is_recorded() -> bool:
    """Whether code is being compiled or traced, where a question about a shape would become part of the program."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def _is_transformed() -> bool:
    """Whether torch.func or forward gradients are at work, which cannot follow integers and `out=` memory."""
    return (
        torch._C._functorch.peek_interpreter_stack() is not None  # noqa: SLF001 (torch has no public name for it)
        or forward_ad._current_level >= 0  # noqa: SLF001 (nor for this)
    )
