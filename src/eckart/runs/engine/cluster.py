"""Cluster: functions run by the workers of a Ray cluster. The only file that knows Ray, which is an optional extra.

Work is distributed in three ways: `streams` (calls that give one answer after another, all at the same time), `crew`
(workers that each hold something) and `spread` (a crew that holds a function). Ray repeats the task of a lost
worker, on another machine where its own is gone. Every worker computes on one thread: there is one for each core, and
several threads each would wait for each other. A worker takes seconds to start, so a crew's are kept for the next.

Streams and crews hold no core of Ray's. They are assigned to machines here, one for every core, and may wait for each
other: where a machine is lost, those that were on it must find room on the remaining ones, or the others wait for ever.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import version
from types import FrameType, ModuleType
from typing import Any, Generic, TypeVar

import numpy
import psutil
import torch
from torch import Tensor

from eckart.runs.engine.watcher import VITAL, vital_processes, watched

T = TypeVar("T")
# Makes what a worker answers with: called by each worker of a crew.
Make = Callable[[], Callable[[Any], Any]]

# How often a lost worker's task is repeated. A machine that is short of memory kills again and again.
RETRIES = 3
# Answers that a stream makes before they are asked for: the next one, while the last is worked on.
AHEAD = 2
# Seconds in which a cluster has to answer. Ray itself would try for two minutes, and then end the process.
PATIENCE = 15.0
# Seconds that a worker may go on with a task that nobody waits for: a new worker takes as long to start.
GRACE = 10.0
ONE_THREAD = {"env_vars": dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")}
# Numbers that numpy has no type for travel as integers of their size.
INTEGERS = {1: torch.uint8, 2: torch.int16}


# Seconds between two looks whether Ray's processes are there.
NOTICED_EVERY = 0.5
# Wakes the main thread. Not SIGINT, which is the user's, and which a shell script's background jobs ignore.
WAKING = getattr(signal, "SIGUSR2", signal.SIGINT)
AGAIN = "and what was finished is kept: give the same command again"


class ClusterError(ConnectionError):
    """The cluster cannot be reached, or lost its workers too often."""


@contextmanager
def open_cluster(address: str | None = None, workers: int | None = None) -> Iterator[Cluster]:
    """A cluster to work on: the one at `address`, or one of this machine's cores that ends with the block.

    Where the program has started or joined one itself, it is that one.

    Args:
        address: of the cluster's head, HOST:PORT, from one of its machines; "auto" is the one that runs here.
        workers: how many; None is one for each core of the cluster.

    Raises:
        ClusterError: Ray is not installed, or nothing that answers as a cluster is at the address.
    """
    ray = _ray()
    if ray.is_initialized():
        joined = ray.get_runtime_context().gcs_address
        if address not in (None, "auto", joined):
            raise ClusterError(f"this program has joined the cluster at {joined} already, and cannot join {address}")
        with closing(Cluster(workers)) as cluster:
            yield cluster
        return
    # No word to Ray's makers: nothing here needs a network.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    where: dict[str, Any] = {"address": address}
    if address is None:
        where = {"address": "local", "num_cpus": workers or os.cpu_count(), "include_dashboard": False}
    elif address != "auto":
        _check_address(address)
    with ExitStack() as stack:
        if address is None:
            stack.enter_context(watched())
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)
                ray.init(**where, log_to_driver=False, logging_level="error", runtime_env=ONE_THREAD)
        except (SystemExit, Exception) as error:  # plain ones, where a process of Ray's dies while it starts
            raise ClusterError(f"no Ray cluster {f'at {address} ' if address else ''}can be used: {error}") from error
        lost = threading.Event()
        try:
            with _noticing(vital_processes(psutil.Process()), lost), closing(Cluster(workers, lost)) as cluster:
                yield cluster
        finally:
            if not lost.is_set():  # without its head, Ray would wait for a minute, and then end this process
                ray.shutdown()


@contextmanager
def _noticing(vital: Sequence[psutil.Process], lost: threading.Event) -> Iterator[None]:
    """Raises ClusterError inside, as soon as one of these processes has ended; `lost` is set then.

    Ray itself ends this process without a word, a minute later. Where this is not the main thread, nothing is noticed.
    """
    over, main = threading.Event(), threading.main_thread()

    def watch() -> None:
        while not over.wait(NOTICED_EVERY):
            if not all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in vital):
                lost.set()
                signal.pthread_kill(main.ident or 0, WAKING)  # wakes it where it waits
                return

    def wake(number: int, frame: FrameType | None) -> None:
        raise _WokenError

    if not vital or threading.current_thread() is not main:
        yield
        return
    before = signal.signal(WAKING, wake)
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    except _WokenError:
        raise ClusterError(f"a process of Ray's ({' or '.join(VITAL)}) has died, {AGAIN}") from None
    finally:
        over.set()
        signal.signal(WAKING, before)


class _WokenError(BaseException):
    """The main thread was woken: a process that the cluster needs has died. Nothing on the way handles it."""


class Cluster:
    """The cluster that this process has joined.

    Attributes:
        requested: how many workers; None is one for each of its cores.
        lost: set when the cluster has died: nothing is asked of it then.
    """

    def __init__(self, workers: int | None = None, lost: threading.Event | None = None) -> None:
        self._ray = _ray()
        self.lost = lost or threading.Event()
        self.requested = workers
        self._known: dict[Callable[..., Any], Any] = {}
        self._members: list[Any] = []
        _let_tensors_travel()

    @property
    def workers(self) -> int:
        """How many there are at this time."""
        return len(self._places())

    def spread(self, function: Callable[[Any], T], items: Sequence[Any]) -> Iterator[T]:
        """function(item) of every item, in their order, each computed by a free worker.

        Raises:
            ClusterError: one lost its workers too often. What the function raises is raised as it is.
        """
        if items:
            with self.crew(lambda: function) as crew:
                yield from crew.answers(items)

    @contextmanager
    def streams(self, function: Callable[[Any], Iterator[T]], items: Sequence[Any]) -> Iterator[list[Iterator[T]]]:
        """The answers of function(item), one iterator for each item. All of them run, and make `AHEAD` at most.

        A stream whose worker is lost is begun again, so that it must give the same answers again.

        Raises:
            ClusterError: as `spread`, by the iterator.
        """
        options = {"num_cpus": 0, "max_retries": RETRIES, "num_returns": "streaming"}
        options["_generator_backpressure_num_objects"] = AHEAD
        running = [
            self._remote(_stream, {**options, "scheduling_strategy": place}).remote(version("eckart"), function, item)
            for item, place in zip(items, self._places(len(items)), strict=True)
        ]
        streams = [self._answers(stream) for stream in running]
        try:
            yield streams
        except BaseException:
            self._cancel(running)
            raise
        for stream in streams:  # to their ends: to cancel one is to end its worker, which would be missed
            for _ in stream:
                pass

    @contextmanager
    def crew(self, make: Make, size: int | None = None) -> Iterator[Crew]:
        """Workers that each hold a function, made by `make`, and answer with it.

        Args:
            make: called by each worker when it is first asked, and again by one that replaces a lost worker.
            size: how many; None is all.
        """
        size = size or self.workers
        places, release = self._places(max(size, len(self._members))), version("eckart")
        options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": RETRIES}
        while len(self._members) < size:
            place = places[len(self._members)]
            self._members.append(self._remote(_Member, {**options, "scheduling_strategy": place}).remote(release))
        crew = Crew(self, self._members[:size], self.keep(make))
        try:
            yield crew
        finally:
            crew.dismiss()

    def dismiss(self, member: Any) -> None:
        """End a worker of the crews; another one is started when there is need of it."""
        self._members.remove(member)
        with suppress(self._ray.exceptions.RayError):
            self._ray.kill(member)

    def close(self) -> None:
        """End the workers that were kept for the next crew."""
        for member in list(self._members) if not self.lost.is_set() else ():
            self.dismiss(member)

    def keep(self, value: T) -> Kept[T]:
        """The value, in the cluster's memory, where all of its workers can fetch it."""
        return Kept(self._ray.put(value))

    def get(self, ticket: Any) -> Any:
        """The answer behind a ticket, once it is there.

        Raises:
            ClusterError: it was lost with its workers. What the work raised is raised as it is.
        """
        errors = self._ray.exceptions
        try:
            return self._ray.get(ticket)
        except errors.RayTaskError as error:
            cause = error.cause
            if not isinstance(cause, Exception) or isinstance(cause, errors.RayError):
                raise ClusterError(f"a worker failed: {error}") from error
        except errors.RayError as error:
            raise ClusterError(
                f"a worker was lost {RETRIES + 1} times with the same work, for want of memory perhaps "
                f"({_first_line(error)}), {AGAIN}, with fewer --workers"
            ) from error
        raise cause

    def ready(self, tickets: Sequence[Any], *, within: float | None = None) -> set[Any]:
        """Those that are there; waits until there is one, or within some seconds for all of them."""
        if not tickets:
            return set()
        if within is None:
            self._ray.wait(list(tickets), num_returns=1, fetch_local=False)
        ready, _ = self._ray.wait(list(tickets), num_returns=len(tickets), timeout=within or 0, fetch_local=False)
        return set(ready)

    def _answers(self, stream: Any) -> Iterator[Any]:
        for ticket in stream:
            yield self.get(ticket)

    def _cancel(self, running: Iterable[Any]) -> None:
        for task in running if not self.lost.is_set() else ():
            with suppress(self._ray.exceptions.RayError, ValueError, TypeError):
                self._ray.cancel(task, force=True)

    def _remote(self, work: Callable[..., Any], options: dict[str, Any]) -> Any:
        if work not in self._known:
            self._known[work] = self._ray.remote(work)
        return self._known[work].options(**options, runtime_env=ONE_THREAD)

    def _places(self, count: int | None = None) -> list[Any]:
        """A machine for each worker: one for every core, the machines by turns; over again where more are asked for."""
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        cores = sorted(
            (number, node["NodeID"])
            for node in self._ray.nodes()
            if node["Alive"]
            for number in range(int(node["Resources"].get("CPU", 0)))
        )
        if not cores:
            raise ClusterError("the cluster has no core to work on: `ray status` shows what it has")
        total = (self.requested or len(cores)) if count is None else count
        return [NodeAffinitySchedulingStrategy(cores[n % len(cores)][1], soft=True) for n in range(total)]


class Crew:
    """Workers that each hold something, and answer with it; see `Cluster.crew`."""

    def __init__(self, cluster: Cluster, members: Sequence[Any], make: Kept[Make]) -> None:
        self.cluster, self._members, self._make = cluster, members, make
        self._last: dict[int, Any] = {}

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self._members)

    def ask(self, member: int, item: Any) -> Any:
        """A ticket for one member's answer to an item; it answers in the order in which it was asked."""
        self._last[member] = self._members[member].ask.remote(self._make, item)
        return self._last[member]

    def get(self, ticket: Any) -> Any:
        """The answer behind a ticket, as `Cluster.get`."""
        return self.cluster.get(ticket)

    def ready(self, tickets: Sequence[Any]) -> set[Any]:
        """Those that were answered; waits until there is one."""
        return self.cluster.ready(tickets)

    def answers(self, items: Sequence[Any]) -> Iterator[Any]:
        """The answers to all items, in their order. A member that has answered takes the next item.

        An error is raised when its item's turn has come.
        """
        free, sent = list(range(self.size)), 0
        tickets: dict[int, Any] = {}
        members: dict[Any, int] = {}
        for turn in range(len(items)):
            while turn not in tickets or tickets[turn] in members:
                while free and sent < len(items):
                    member = free.pop(0)
                    tickets[sent] = self.ask(member, items[sent])
                    members[tickets[sent]] = member
                    sent += 1
                for ticket in self.ready(list(members)):
                    free.append(members.pop(ticket))
            yield self.get(tickets.pop(turn))

    def dismiss(self) -> None:
        """Release the members for the next crew, except those still busy with a task that nobody waits for."""
        if self.cluster.lost.is_set():
            return
        answered = self.cluster.ready(list(self._last.values()), within=GRACE)
        for number, ticket in self._last.items():
            if ticket in answered:
                self._members[number].drop.remote()
            else:
                self.cluster.dismiss(self._members[number])


@dataclass(frozen=True)
class Kept(Generic[T]):
    """A value in the cluster's memory, see `Cluster.keep`. It is sent in the value's place, and costs next to nothing.

    Not Ray's own reference, for which Ray would put in the value with every call.
    """

    reference: Any

    def fetch(self) -> T:
        """The value."""
        return _ray().get(self.reference)


def machine() -> str:
    """The name of the machine that this runs on, for messages."""
    return socket.gethostname()


class _Member:
    """What an actor runs: the worker of one crew after another."""

    def __init__(self, release: str) -> None:
        _settle()
        self._release = release
        self._make: Kept[Make] | None = None
        self._answer: Callable[[Any], Any] | None = None

    def ask(self, make: Kept[Make], item: Any) -> Any:
        """The answer. A crew's first one makes what answers: what that raises is then an answer too."""
        if self._answer is None or self._make != make:
            self.drop()
            _check_release(self._release)
            self._answer = make.fetch()()
            self._make = make
        return self._answer(item)

    def drop(self) -> None:
        """Let go of the crew's function."""
        self._answer = self._make = None


def _stream(release: str, function: Callable[[Any], Iterator[T]], item: Any) -> Iterator[T]:
    _settle()
    _check_release(release)
    yield from function(item)


def _check_release(release: str) -> None:
    """Raises ClusterError where this worker has another eckart than the process that it works for."""
    own = version("eckart")
    if own != release:
        raise ClusterError(
            f"{machine()} has eckart {own}, and the run was started with {release}: install the same on every machine "
            "of the cluster"
        )


def _settle() -> None:
    """Prepare a worker's process."""
    torch.set_num_threads(1)
    _let_tensors_travel()


def _let_tensors_travel() -> None:
    """Tensors that leave this process go as the numpy arrays that they are views of, which Ray does not copy."""
    _ray().util.register_serializer(Tensor, serializer=_packed, deserializer=_unpacked)


def _packed(tensor: Tensor) -> tuple[numpy.ndarray, torch.dtype]:
    plain, kind = tensor.detach().cpu().contiguous(), tensor.dtype
    try:
        return plain.numpy(), kind
    except TypeError:
        return plain.view(INTEGERS[plain.element_size()]).numpy(), kind


def _unpacked(packed: tuple[numpy.ndarray, torch.dtype]) -> Tensor:
    """A copy: an array out of Ray's store is read-only, and torch, which knows no such thing, would write into it."""
    array, kind = packed
    return torch.from_numpy(array.copy()).view(kind)


def _ray() -> ModuleType:
    try:
        import ray
    except ImportError as error:
        raise ClusterError("Ray is not installed: pip install 'eckart[ray]'") from error
    return ray


def _check_address(address: str) -> None:
    """Raises ClusterError unless a cluster's head answers at HOST:PORT."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit() or "/" in host:
        raise ClusterError(f"address {address!r} is not HOST:PORT, as `ray start --head` prints it, nor auto")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise ClusterError(f"nothing answers at {address} ({error}): is it the address of a Ray head?") from error
    ask = [sys.executable, "-m", "ray.scripts.scripts", "health-check", "--address", address]
    try:
        answered = subprocess.run(ask, capture_output=True, timeout=PATIENCE).returncode == 0
    except subprocess.TimeoutExpired:
        answered = False
    if not answered:
        raise ClusterError(f"what answers at {address} is no Ray head of this version, or is not well")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
