"""Stopwatch: a table of speeds measured: a model's step, and its linears dense and at a grid of ranks.

Everything is timed in turns, round after round, so that what slows the machine for a while slows all of it, and the
medians are taken. A linear is not called twice in a row but in turn with copies that fill POOL bytes, or as many as the
model has: in the model its weights have left the cache, too, when its turn comes again.
"""

from __future__ import annotations

import math
import platform
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.allocation.speed import LinearTimes, Shape, SpeedTable
from eckart.data.positions import check_positions, usable_positions
from eckart.evals.speed import synchronise, time_once
from eckart.lowrank import Layout
from eckart.models.experts import expert_of
from eckart.models.linear import LowRankLinear
from eckart.models.sites import Site
from eckart.models.units import Unit, units_of
from eckart.support.progress import Track, silent
from eckart.support.sizes import num_bytes

# Bytes of weights that are walked through: several times what caches hold.
POOL = 96 << 20
# Copies of a linear at most: of small ones, making more takes longer than timing them.
COPIES = 256
# Parts of the largest rank that saves anything at which low-rank linears are timed; between them is a straight line.
GRID = 8
# Rounds at least and at most, and the seconds after which no further one is begun.
ROUNDS, MOST_ROUNDS, PATIENCE = 5, 15, 20.0
# Shortest stretch that is timed: a thousand times the clock's own resolution and cost.
STRETCH = 4e-3
# Of a step: tokens before it, and steps in a row.
CACHED, STEPS = 16, 4

# Does what is timed; or times itself, and gives the seconds.
Run = Callable[[], float | None]


def describe_machine(model: PreTrainedModel) -> dict[str, str | int]:
    """What timings depend on besides the model's architecture: device, threads, type of numbers, version of torch."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return {
        "device": device.type,
        "name": name,
        "threads": torch.get_num_threads(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "torch": torch.__version__,
    }


@torch.inference_mode()
def measure_speed(
    model: PreTrainedModel,
    sites: Sequence[Site],
    *,
    rows: int,
    layout: Layout = "plain",
    joint: Collection[str] = (),
    bias: bool = False,
    rank_multiple: int = 1,
    track: Track = silent,
) -> SpeedTable:
    """What the model's step takes on this machine, and each of the `sites`, dense and at every rank.

    Args:
        model: dense, in memory.
        rows: tokens at a time, see `Speed`. A model that does not generate reads texts of so many.
        joint: input groups that are timed with a shared right factor, too.
        bias: the method adds a bias to every low-rank linear.
        rank_multiple: ranks are multiples of this; of 1 odd ones are timed, as most are.

    Raises:
        ValueError: more rows than the model's positions, or a linear of an expert, which reads as many rows as its
            router gives it.

    Cost: some ten seconds, of a large model some of its steps. POOL bytes, or twice its largest linear's.
    """
    if routed := next((site.name for site in sites if expert_of(site.name)), None):
        raise ValueError(
            f"{routed}: a budget in speed is not supported for experts, whose rows a router chooses; give keep, "
            'keep_total or max_bytes, or exclude "*.experts.*"'
        )
    units = {Shape.of(unit): unit for unit in (*units_of(sites), *units_of(sites, joint))}
    step, steps = step_of(model, rows)
    pool = _Pool(model)
    x = {width: pool.filled(torch.Size((1, rows, width))) for width in {unit.d_in for unit in units.values()}}
    runs: dict[tuple[Shape, int | None], Run] = {}
    grids = {shape: _grid(unit, layout, rank_multiple) for shape, unit in units.items()}
    for shape, unit in units.items():
        if len(unit.sites) == 1:
            module = model.get_submodule(unit.name)
            runs[shape, None] = _walking(_copies(pool, lambda: _dense(pool, module, unit)), x[unit.d_in])  # noqa: B023
        for rank in grids[shape]:
            copies = _copies(pool, lambda: _low_rank(pool, unit, rank, layout, bias))  # noqa: B023
            runs[shape, rank] = _walking(copies, x[unit.d_in])
    taken, *each = _in_turns([step, *runs.values()], model.device, track)
    times = dict(zip(runs, each, strict=True))
    linears = [
        LinearTimes(
            shape,
            sum(times[Shape.of(Unit((site,))), None] for site in unit.sites),
            grids[shape],
            tuple(times[shape, rank] for rank in grids[shape]),
        )
        for shape, unit in units.items()
    ]
    return SpeedTable(rows, layout, taken // steps, tuple(linears), describe_machine(model))


class _Pool:
    """One stretch of memory, whose numbers are handed out from its beginning, and again at its end."""

    def __init__(self, model: PreTrainedModel) -> None:
        size, largest = model.dtype.itemsize, max(parameter.numel() for parameter in model.parameters())
        # Not zeros: of memory that was never written, a system has one page.
        self.numbers = torch.full(
            (max(min(POOL, num_bytes(model)) // size, 2 * largest),), 0.01, dtype=model.dtype, device=model.device
        )
        self.handed_out = 0

    def next(self, shape: torch.Size) -> Tensor:
        """The next numbers, as a tensor that begins where a line of the cache does."""
        count = shape.numel()
        start = self.handed_out % len(self.numbers)
        if start + count > len(self.numbers):
            self.handed_out += len(self.numbers) - start
            start = 0
        self.handed_out += -(-count // 64) * 64
        return self.numbers[start : start + count].view(shape)

    def filled(self, shape: torch.Size) -> Tensor:
        """A tensor of its own, of the same type and on the same device."""
        return self.numbers.new_full(shape, 0.01)


def _copies(pool: _Pool, make: Callable[[], list[nn.Module]]) -> list[list[nn.Module]]:
    """Units until their weights are all of the pool, COPIES at most."""
    copies, before = [make()], pool.handed_out
    copies.append(make())
    more = len(pool.numbers) // max(pool.handed_out - before, 1) - len(copies)
    return copies + [make() for _ in range(min(more, COPIES - len(copies)))]


def _walking(copies: list[list[nn.Module]], x: Tensor) -> Run:
    """Calls the next unit's linears."""
    following = cycle(copies)

    def run() -> None:
        for module in next(following):
            module(x)

    return run


def _dense(pool: _Pool, module: nn.Module, unit: Unit) -> list[nn.Module]:
    """The unit's linear, of the kind of the model's own `module`."""
    (site,) = unit.sites
    with torch.device("meta"):
        conv = isinstance(module, Conv1D)
        made = Conv1D(site.d_out, site.d_in) if conv else nn.Linear(site.d_in, site.d_out, bias=site.has_bias)
    return [_weighted(made, pool)]


def _low_rank(pool: _Pool, unit: Unit, rank: int, layout: Layout, bias: bool) -> list[nn.Module]:
    """The unit's linears at a rank, with one right factor for all."""
    modules: list[LowRankLinear] = []
    pivots = _shared_out(unit, rank) if layout == "pivoted" else [None] * len(unit.sites)
    for site, own in zip(unit.sites, pivots, strict=True):
        module = LowRankLinear(
            site.d_in,
            site.d_out,
            rank,
            bias=site.has_bias or bias,
            pivots=own,
            right_of=modules[0] if modules else None,
            device="meta",
        )
        if own is not None:
            module.order = _some_order(site.d_out, rank, own).to(pool.numbers.device)
        module.weight = pool.numbers[:0]
        modules.append(module)
    return [_weighted(module, pool) for module in modules]


def _weighted(module: nn.Module, pool: _Pool) -> nn.Module:
    """The module, in place, with the next numbers of the pool as its parameters."""
    for part in module.modules():
        for name, parameter in list(part.named_parameters(recurse=False)):
            setattr(part, name, nn.Parameter(pool.next(parameter.shape), requires_grad=False))
    return module.eval()


def _shared_out(unit: Unit, rank: int) -> list[int | None]:
    """How many of the pivots are rows of each linear: in proportion to its rows."""
    ends = [rank * sum(site.d_out for site in unit.sites[: n + 1]) // unit.d_out for n in range(len(unit.sites))]
    return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def _some_order(d_out: int, rank: int, pivots: int) -> Tensor:
    """(d_out,) int32: an order of a pivoted linear, whose pivots are spread over its rows."""
    is_pivot = torch.zeros(d_out, dtype=torch.bool)
    is_pivot[torch.arange(pivots) * d_out // max(pivots, 1)] = True
    return torch.where(is_pivot, is_pivot.cumsum(0) - 1, rank + (~is_pivot).cumsum(0) - 1).to(torch.int32)


def _grid(unit: Unit, layout: Layout, rank_multiple: int) -> tuple[int, ...]:
    """The ranks at which the unit is timed: the smallest, and GRID parts of the largest that saves numbers."""
    largest = unit.rank_for(1.0, layout)
    ranks = {rank_multiple}
    for part in range(1, GRID + 1):
        rank = largest * part // GRID
        ranks.add(rank - rank % rank_multiple if rank_multiple > 1 else rank - (rank % 2 == 0))
    return tuple(sorted(rank for rank in ranks if 1 <= rank <= min(unit.d_out, unit.d_in)))


def step_of(model: PreTrainedModel, rows: int) -> tuple[Callable[[], float], int]:
    """(what is timed of the whole model, how many steps it is): generating tokens, or reading a text of `rows`.

    Raises:
        ValueError: more rows than the model's positions.
    """
    clock = _clock(model.device)
    if rows > 1 or not model.can_generate():
        check_positions(model, rows, "speed: rows")
        return lambda: time_once(model, tokens=0, prompt=rows, clock=clock).prefill, 1
    positions = usable_positions(model) or CACHED + STEPS
    steps = max(1, min(STEPS, positions // 2))
    cached = max(1, min(CACHED, positions - steps))

    def generate() -> float:
        seconds = time_once(model, tokens=steps, prompt=cached, clock=clock).decode
        if seconds is None:
            raise ValueError(
                f"speed: {type(model).__name__} gives no cache to generate with, so that a step cannot be timed: give "
                "the tokens that are read at a time (--speed-rows)"
            )
        return seconds

    return generate, steps


def _in_turns(runs: Sequence[Run], device: torch.device, track: Track) -> list[int]:
    """Median nanoseconds of each. What a run gives, if it gives something, are its seconds; else it is timed here."""
    stretches = []
    for run in runs:
        run()  # the first call pays for allocations
        stretches.append(max(1, math.ceil(STRETCH / max(_stretch(run, 2, device), 1e-7))))
    taken: list[list[float]] = [[] for _ in runs]
    start = time.perf_counter()
    for number in track(range(MOST_ROUNDS), "speed: timing linears", MOST_ROUNDS):
        if number >= ROUNDS and time.perf_counter() - start > PATIENCE:
            break
        for run, times, samples in zip(runs, stretches, taken, strict=True):
            samples.append(_stretch(run, times, device))
    return [round(1e9 * statistics.median(samples)) for samples in taken]


def _stretch(run: Run, times: int, device: torch.device) -> float:
    """Seconds of one call, over `times` of them."""
    own = run()
    if own is not None:
        return own
    synchronise(device)
    clock = _clock(device)
    start = clock()
    for _ in range(times):
        run()
    synchronise(device)
    return (clock() - start) / times


def _clock(device: torch.device) -> Callable[[], float]:
    """Seconds; where all work is this thread's, those that it ran, without those in which other programs had the core.

    Of a table made on a busy machine the ratios are then those of an idle one.
    """
    return time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter


def _processor() -> str:
    """The processor's name, as the system has it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())
