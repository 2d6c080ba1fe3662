"""Matrix products: the two of a low-rank linear, each in the order of operations that the processor is fastest with.

y = left(right(x)) is two products of torch's, and nothing here changes their results but for rounding. On a processor
torch takes different times for the same product, depending on how it is asked; benchmarks/inference.py measures what
is used here, docs/decisions.md has the numbers:

    one row, bfloat16:    `mv` reads the matrix once, where a linear first packs it for the processor's tiles.
    few rows:             W xᵀ instead of x Wᵀ: the large matrix comes first and is read as stored. The result stays
                          transposed for the next product, and reordering it moves whole rows.
    many rows, pivoted:   the outputs are reordered by what is cheapest: as integers where they have 16 bits; or never,
                          where the rank is small and the left factor is spread to all rows for the time of a call.

The first two and the spreading are for processors with tiles for matrices (Intel AMX): without them torch has another
product of bfloat16, which is up to four times as slow that way round.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.functional import linear

# More rows than these are faster the ordinary way.
FEW = 64
# A matrix of fewer numbers is in the cache, where the order matters less than the time to decide on it.
SMALL = 2**18
# In float32, fewer rows than these are faster the ordinary way: a linear then reads the matrix row by row as well.
FEWEST_FLOAT32 = 16
# Moving one number of 16 bits to its place takes about as long as so many multiplications of bfloat16.
MOVE = 800


def is_bare(module: nn.Module, x: Tensor) -> bool:
    """Whether module(x) is the product x Wᵀ and nothing else, on a processor, with no gradient or graph to be kept.

    A linear with a hook, a wrapper or another kind of weight in its place has to be called as it is.

    Cost: some microseconds, so ask `is_worth` or `is_prompt` first.
    """
    return (
        not _is_recorded()
        and not torch.is_grad_enabled()
        and type(module) is nn.Linear
        and type(x) is Tensor
        and x.device.type == "cpu"
        and type(module.weight) is nn.Parameter
        and module.weight.dtype == x.dtype
        and module.weight.device == x.device
        and module.bias is None
        and not (module._forward_hooks or module._forward_pre_hooks)  # noqa: SLF001 (torch has no public name for them)
        and "forward" not in vars(module)
        and not torch.is_autocast_enabled("cpu")
        and not _is_transformed()
    )


def is_worth(module: nn.Module, x: Tensor) -> bool:
    """Whether there are few rows, and a matrix so large that the order of operations outweighs the decision.

    Deciding takes some ten microseconds, as long as a product with SMALL numbers.
    """
    if type(module) is not nn.Linear or module.in_features * module.out_features < SMALL or _is_recorded():
        return False
    least = FEWEST_FLOAT32 if x.dtype == torch.float32 else 1
    return least <= x.numel() // max(x.shape[-1], 1) <= FEW


def is_prompt(x: Tensor) -> bool:
    """Whether there are more than few rows."""
    return not _is_recorded() and x.numel() > FEW * x.shape[-1]


def multiply(module: nn.Module, x: Tensor) -> Tensor:
    """module(x). Of a bare linear and few rows it may be transposed in memory, as is fastest for `combine`.

    Args:
        x: (..., d_in).
    """
    # What is small or gains nothing is called as it is, before any dearer test.
    if not is_worth(module, x) or not is_bare(module, x):
        product: Tensor = module(x)
        return product
    weight: Tensor = module.weight  # type: ignore[assignment]
    if _is_one(x):
        return torch.mv(weight, x.reshape(-1)).view(*x.shape[:-1], -1)
    if not _prefers_transposed(x):
        return linear(x, weight)
    return _shaped(torch.mm(weight, x.reshape(-1, x.shape[-1]).T).T, x)


def combine(left: Tensor, p: Tensor, order: Tensor | None, bias: Tensor | None) -> Tensor:
    """left p + bias, or [p, left p] in the order `order`, plus bias; contiguous. For a bare left linear.

    Args:
        left: (d_out, rank), or where pivoted (others, rank).
        p: (..., rank), of `multiply`.
        order, bias: (d_out,).
    """
    if _is_one(p):
        y = torch.mv(left, p.reshape(-1))
        y = y if order is None else torch.cat((p.reshape(-1), y)).index_select(0, order)
        return (y if bias is None else y.add_(bias)).view(*p.shape[:-1], -1)
    rows = p.reshape(-1, p.shape[-1])
    if rows.shape[0] > 1 and not rows.is_contiguous():
        transposed = torch.mm(left, rows.T)
        if order is not None:
            transposed = torch.cat((rows.T, transposed)).index_select(0, order)
        y = transposed.T.contiguous()
        return _shaped(y if bias is None else y.add_(bias), p)
    if order is None:
        return linear(p, left, bias)
    if _spreads(rows, left, order):
        return linear(p, spread(left, order), bias)
    y = _shaped(_reordered(rows, left, order), p)
    return y if bias is None else y.add_(bias)


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


def _reordered(rows: Tensor, left: Tensor, order: Tensor) -> Tensor:
    """[p, left p] in the order: the product is written behind a copy of p, and one more copy reorders."""
    rank = rows.shape[1]
    joined = rows.new_empty(len(rows), rank + len(left))
    joined[:, :rank] = rows
    torch.mm(rows, left.T, out=joined[:, rank:])
    if rows.element_size() != 2:
        # Indexing with brackets takes several times as long as index_select.
        return joined.index_select(-1, order)
    # Types of half precision are gathered one number at a time through float32, and integers as they are.
    return joined.view(torch.int16).gather(-1, order.long().expand(len(rows), -1)).view(rows.dtype)


def _is_one(x: Tensor) -> bool:
    """Whether it is one row whose product `mv` is fastest with."""
    return x.dtype == torch.bfloat16 and x.numel() == x.shape[-1] and has_tiles()


def _prefers_transposed(x: Tensor) -> bool:
    """Whether W xᵀ is faster than x Wᵀ, for an input that `is_worth` it and that is not one row for `mv`."""
    return x.dtype in (torch.bfloat16, torch.float32) and x.numel() > x.shape[-1] and has_tiles()


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
