"""The floor: operations and bytes that a stage cannot do without, and how fast this machine does such, in the same run.

Not a program: scale.py and outofcore.py import it. The distance to the floor is measured seconds over the floor's. The
floor counts products and one pass over what has to be read and written; it leaves out everything small.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from measuring import PROCESSOR, best_seconds
from transformers import LlamaConfig

from eckart.lowrank import rank_for
from eckart.lowrank.float32 import COLUMNS, exact_products

# Operations of a symmetric eigenproblem of size n, over n^3: reduction to tridiagonal form 4/3, divide and conquer 8/3
# at most, and the way back 2 (LAPACK's dsyevd; Golub and Van Loan, section 8.3).
EIGH = 6.0


@dataclass(frozen=True)
class Work:
    """Operations by the type they are done in, and bytes to and from memory."""

    float32: float = 0.0
    bfloat16: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.float32 + other.float32, self.bfloat16 + other.bfloat16, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(times * self.float32, times * self.bfloat16, times * self.bytes)


@dataclass(frozen=True)
class Rates:
    """What this machine does in a second: float32 and bfloat16 operations in large products, bytes copied."""

    float32: float
    bfloat16: float
    bytes: float

    def seconds(self, work: Work) -> float:
        """The least time for the work: products one after the other, and no less than the bytes take."""
        return max(work.float32 / self.float32 + work.bfloat16 / self.bfloat16, work.bytes / self.bytes)


def measure_rates(size: int = 4096, device: torch.device = PROCESSOR) -> Rates:
    """This machine's or card's rates, now: products of that size, and copies of 16 size^2 bytes."""
    single = torch.randn(size, size, device=device)
    half = single.bfloat16()
    blank = torch.randn(2 * size, 2 * size, device=device)
    target = torch.empty_like(blank)
    return Rates(
        2 * size**3 / best_seconds(lambda: single @ single, device=device),
        2 * size**3 / best_seconds(lambda: half @ half.T, device=device),
        2 * blank.nbytes / best_seconds(lambda: target.copy_(blank), device=device),
    )


def shapes_of(config: LlamaConfig) -> list[tuple[list[int], int]]:
    """([d_out of each linear], d_in) for each input group of a block."""
    hidden, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or hidden // heads
    wide, narrow = head * heads, head * (config.num_key_value_heads or heads)
    return [([wide, narrow, narrow], hidden), ([hidden], wide), ([inner, inner], hidden), ([hidden], inner)]


def forward_work(config: LlamaConfig, samples: int, length: int) -> Work:
    """One block on all tokens: its products and causal attention; weights read once, hidden states in and out."""
    tokens = samples * length
    weights = sum(sum(outs) * d_in for outs, d_in in shapes_of(config))
    attention = 2 * tokens * length * config.hidden_size
    return Work(bfloat16=2 * weights * tokens + attention, bytes=2 * weights + 4 * tokens * config.hidden_size)


def moments_work(config: LlamaConfig, samples: int, length: int) -> Work:
    """Second moments of one block's input groups: half of X^T X, of bfloat16 inputs that are read once."""
    tokens, work = samples * length, Work()
    for _, d_in in shapes_of(config):
        work += Work(bfloat16=tokens * d_in * (d_in + COLUMNS), bytes=2 * tokens * d_in + 8 * d_in * d_in)
    return work


def factor_work(config: LlamaConfig, keep: float) -> Work:
    """Factors of one block: Gram matrices, eigenvectors, and the factors themselves."""
    work = Work()
    for outs, d_in in shapes_of(config):
        for d_out in outs:
            small, rank = min(d_out, d_in), rank_for(keep, d_out, d_in)
            products = 2 * d_out * d_in * d_in + small * (small + COLUMNS) * max(d_out, d_in) + 2 * rank * d_out * d_in
            if d_out > d_in:
                products += 2 * d_out * d_in * rank
            work += Work(float32=products + EIGH * small**3, bytes=4 * (d_out * d_in + d_in * d_in))
    return work


def check_exactness() -> bool:
    """Whether bfloat16 inputs are multiplied by the processor's bfloat16 units here."""
    with exact_products(torch.zeros(1, dtype=torch.bfloat16)):
        return torch.get_float32_matmul_precision() == "medium"
