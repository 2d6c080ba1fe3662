"""Shares: a calibration cut into shares of its samples that workers take, and put together in one fixed order.

The number of samples decides how many shares there are, never the workers. Their statistics are added in the order
of a tree that halves the shares again and again, and a worker that has all of a branch adds it up itself. So the sums
are the same to the last bit for any number of workers, and little is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeVar

from eckart.calibration.cache import Store
from eckart.calibration.gradients import collect_gradients
from eckart.calibration.moments import calibrate_by_block
from eckart.calibration.weights import Weights
from eckart.data.tokens import Tokens
from eckart.lowrank import GradientMoments, InputMoments, Method
from eckart.models.sites import Site
from eckart.runs.engine.base import CalibrationRequest
from eckart.runs.engine.cluster import Cluster
from eckart.runs.engine.source import Source

# More workers than this find nothing to do in a calibration. With the default 256 samples a share is a batch of 8.
SHARES = 32


S = TypeVar("S", InputMoments, GradientMoments)


@dataclass(frozen=True)
class Portion:
    """One worker's part of a calibration.

    Attributes:
        source: the model.
        tokens: all of the samples.
        shares: those that this worker takes.
        sites: whose statistics, in the model's order.
        needs: out of the statistics of inputs, or of gradients.
        method, batch_size, weights: as in `calibrate_by_block`.
    """

    source: Source
    tokens: Tokens
    shares: range
    sites: tuple[Site, ...]
    needs: frozenset[str]
    method: Method
    batch_size: int = 1
    weights: Weights = field(default_factory=dict)

    @property
    def branches(self) -> list[range]:
        """The largest branches of the tree that lie in the worker's shares, in order."""
        return branches(range(count_shares(self.tokens)), self.shares)

    @property
    def blocks(self) -> list[int]:
        """The blocks of the sites."""
        return sorted({site.block for site in self.sites})


def count_shares(tokens: Tokens) -> int:
    """Into how many shares the samples are cut."""
    return min(len(tokens), SHARES)


def share_of(tokens: Tokens, number: int) -> tuple[Tokens, Tokens]:
    """(the samples of one share, all those before it); shares differ by one sample at most."""
    count = count_shares(tokens)
    start, stop = number * len(tokens) // count, (number + 1) * len(tokens) // count
    return (
        tokens.take(slice(start, stop)),
        tokens.take(slice(start)),
    )


def halves(branch: range) -> tuple[range, range]:
    """The two branches of a branch."""
    middle = (branch.start + branch.stop) // 2
    return range(branch.start, middle), range(middle, branch.stop)


def branches(tree: range, shares: range) -> list[range]:
    """The largest branches of a tree that lie in some shares, which follow each other; in order."""
    if tree.stop <= shares.start or shares.stop <= tree.start or not tree:
        return []
    if shares.start <= tree.start and tree.stop <= shares.stop:
        return [tree]
    return [branch for half in halves(tree) for branch in branches(half, shares)]


def put_together(tree: range, known: Collection[range], find: Callable[[range], dict[str, S]]) -> dict[str, S]:
    """The sum of a tree's shares, by name.

    Args:
        known: branches that `find` gives whole. It is asked for them in order.
    """
    if tree in known:
        return find(tree)
    first, second = (put_together(half, known, find) for half in halves(tree))
    return {name: first[name] + second[name] for name in first}


def calibrate_on(
    cluster: Cluster, request: CalibrationRequest, sites: Sequence[Site], store: Store | None, weights: Weights
) -> Iterator[tuple[int, dict[str, InputMoments]]]:
    """(block, moments of its input groups) of one block after another; see `calibrate_by_block`.

    Each worker walks its shares through the model, and is a block ahead of what was asked for.

    Args:
        sites: those of the request, or all.
        store: blocks that are calibrated already are read from it, and the others written to it.
        weights: what tokens weigh.
    """
    numbers = sorted({site.block for site in sites})
    missing = [number for number in numbers if not (store and store.holds(number))]
    unread = tuple(site for site in sites if site.block in missing)
    source, tokens, method = Source.of(request.model), request.tokens, request.method
    whole = Portion(source, tokens, range(0), unread, method.needs, method, request.batch_size, weights)
    portions = _portions(cluster, whole)
    with cluster.streams(walk_shares, portions if missing else []) as streams:
        for number in request.track(numbers, "moments", len(numbers)):
            if store and number not in missing:
                yield number, store.read(number)
                continue
            summed: dict[str, InputMoments] = _collect(tokens, portions, streams)
            compact = {group: moments.compact() for group, moments in summed.items()}
            del summed
            if store:
                store.write(number, compact)
            yield number, compact
            del compact


def gather_on(
    cluster: Cluster, request: CalibrationRequest, sites: Sequence[Site], needs: frozenset[str]
) -> dict[str, GradientMoments]:
    """{site name: gradient statistics}; see `collect_gradients`."""
    source, tokens = Source.of(request.model), request.tokens
    portions = _portions(cluster, Portion(source, tokens, range(0), tuple(sites), needs, request.method))
    gathered: dict[str, GradientMoments] = {}
    with cluster.streams(gather_shares, portions) as streams:
        for _ in request.track(portions[0].blocks, "gradients", len(portions[0].blocks)):
            gathered |= _collect(tokens, portions, streams)
    return {site.name: gathered[site.name] for site in sites}


def walk_shares(portion: Portion) -> Iterator[dict[str, InputMoments]]:
    """A worker's moments of its portion: block after block, and in each branch after branch."""
    model = portion.source.load()
    walks = {
        number: calibrate_by_block(
            model,
            share_of(portion.tokens, number)[0],
            portion.method,
            sites=portion.sites,
            gradients={},
            weights=_weights_of(portion, number),
            batch_size=portion.batch_size,
        )
        for number in portion.shares
    }
    single = [range(number, number + 1) for number in portion.shares]
    for _ in portion.blocks:
        for branch in portion.branches:
            yield put_together(branch, single, lambda share: next(walks[share.start]).inputs)


def _weights_of(portion: Portion, number: int) -> Weights:
    """What the tokens of one share weigh."""
    rows, before = share_of(portion.tokens, number)
    return {group: each[len(before) : len(before) + len(rows)] for group, each in portion.weights.items()}


def gather_shares(portion: Portion) -> Iterator[dict[str, GradientMoments]]:
    """A worker's gradient statistics of its portion: block after block, and in each branch after branch."""
    model = portion.source.load()

    def gather(share: range) -> dict[str, GradientMoments]:
        rows, before = share_of(portion.tokens, share.start)
        whole = len(portion.tokens)
        return collect_gradients(model, rows, portion.sites, portion.needs, after=before, samples=whole)

    single = [range(number, number + 1) for number in portion.shares]
    sums = [put_together(branch, single, gather) for branch in portion.branches]
    for block in portion.blocks:
        names = [site.name for site in portion.sites if site.block == block]
        for branch in sums:
            yield {name: branch.pop(name) for name in names}


def _portions(cluster: Cluster, whole: Portion) -> list[Portion]:
    """The whole in portions of shares that follow each other, one for each worker that gets any."""
    count = count_shares(whole.tokens)
    workers = min(cluster.workers, count)
    cuts = [number * count // workers for number in range(workers + 1)]
    return [replace(whole, shares=range(start, stop)) for start, stop in pairwise(cuts)]


def _collect(tokens: Tokens, portions: Sequence[Portion], streams: Sequence[Iterator[dict[str, S]]]) -> dict[str, S]:
    """The next block's statistics, added up from the workers' branches."""
    makers: Mapping[range, Iterator[dict[str, S]]] = {
        branch: stream for portion, stream in zip(portions, streams, strict=True) for branch in portion.branches
    }
    return put_together(range(count_shares(tokens)), makers.keys(), lambda branch: next(makers[branch]))
