"""Out of core: a model compressed from its files to files, one block in memory at a time.

Beside `out` stands a folder of work, `.<name>.work`: a journal, the checkpoint as far as it is, the hidden states of
the calibration text at the door of the next block, and of a method with gradients the statistics of each block. It is
removed once the checkpoint is whole and in its place, and kept when anything fails: a resumed run goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eckart.allocation import RankPlan, summarise
from eckart.calibration.backward import Sweep
from eckart.calibration.doors import Spill, whole_doors
from eckart.calibration.moments import BlockCalibration, check_readable, recorded_gradients
from eckart.calibration.walk import Walk
from eckart.compression.cuts import CutRequest, FactorRequest
from eckart.compression.replace import CompressionReport, SiteReport, place
from eckart.data.tokens import Tokens
from eckart.lowrank import GradientMoments, Method
from eckart.lowrank.moments import GRADIENT_STATISTICS, INPUT_STATISTICS
from eckart.models.checkpoint import attach, specs_of
from eckart.models.loading import load_tokenizer, locate
from eckart.models.shards import Skeleton, digest_of, write_index, write_shard
from eckart.models.sites import Site, find_sites, first_readers
from eckart.models.units import Unit, units_of
from eckart.runs.facts import Facts, Outcome
from eckart.runs.how import How
from eckart.runs.recipe import Recipe
from eckart.runs.workbench import Workbench
from eckart.support.files import check_free, put_in_place, write_whole
from eckart.support.journal import Journal, open_journal
from eckart.support.sizes import num_bytes, num_params

KIND = "compression out of core"
# Of the folder of work: what has been done, and the checkpoint that is being made.
JOURNAL, CHECKPOINT = "journal.jsonl", "checkpoint"


def compress_out_of_core(recipe: Recipe, out: Path, how: How, *, resume: bool = False, force: bool = False) -> Outcome:
    """What `make_checkpoint` does, for a model that need not fit into memory.

    The checkpoint is the same one, in one shard a block. What is in memory at a time: what stands around the blocks
    (embeddings and head), one block and its moments, one batch of hidden states. A method with gradients keeps the
    hidden states at every door on disk, and takes a backward pass block by block, each recomputed from its door.

    Args:
        recipe: any method of the catalogue, with ranks that no losses are measured for.
        resume: go on with what an earlier run of the same recipe left. Finished shards are checked by their digests;
            one that is damaged is made again.
        force: start anew where an earlier run left its work, and replace `out` once the new one is complete.

    Raises:
        FileExistsError: `out` exists and `force` is not given, or there is work of an earlier run and neither `resume`
            nor `force` is.
        ValueError: the recipe needs the whole model at once, the work is of another recipe, model or text, or another
            run is at it.
        CheckpointError: the model's files are damaged or incomplete.
        OSError: the disk is full. What was finished before is kept.
        DecompositionError: a decomposition failed; the message names the site.

    Cost: as `calibrate_by_block` and `compress`; the model's files are read once (with gradients three times). Disk:
    the compressed model, and the hidden states at two doors, or with gradients at every door.
    """
    _check_recipe(recipe)
    out = Path(out)
    work = out.with_name(f".{out.name}.work")
    with _locked(out):
        check_free(out, force=force)
        if (work / JOURNAL).exists() and not resume and not force:
            raise FileExistsError(f"{work} has what an earlier run left: go on with --resume, or --force to start anew")
        run = _Run(recipe, work, how)
        if work.exists() and not resume:
            shutil.rmtree(work)
        (work / CHECKPOINT).mkdir(parents=True, exist_ok=True)
        outcome = run.make()
        _publish(work, out)
    return outcome


class _Run:
    """One compression, from its folder of work."""

    def __init__(self, recipe: Recipe, work: Path, how: How) -> None:
        start = time.perf_counter()
        self.work, self.how, self.checkpoint = work, how, work / CHECKPOINT
        self.skeleton = Skeleton(recipe.model, dtype=recipe.dtype, device=how.device)
        self.model = self.skeleton.model
        self.tokenizer = load_tokenizer(recipe.model)
        self.bench = bench = Workbench(recipe, self.model, self.tokenizer, how)
        self.recipe = bench.recipe
        self.method: Method = recipe.composition.in_order
        self.plan: RankPlan = bench.rank().plan
        self.planned = [site for site in find_sites(self.model) if self.plan.rank(site) is not None]
        self.needs = self.method.needs & INPUT_STATISTICS
        self.tokens: Tokens | None = bench.tokens[0] if bench.reads_text and self.planned else None
        if self.tokens is not None:
            check_readable(self.model, self.tokens)
        self.summary = summarise(self.plan, self.model, bias=self.method.centred)
        self.noted = bench.noted
        # What the hidden states and gradients depend on, beside how many there are in a batch.
        self.stream = {
            "model": self.skeleton.shards.fingerprint(),
            "tokens": None if self.tokens is None else self.tokens.digest,
        }
        self.before = (num_params(self.model), num_bytes(self.model))
        blocks = self.skeleton.blocks
        self.around = (self.before[0] - num_params(blocks), self.before[1] - num_bytes(blocks))
        self.seconds = {"load": time.perf_counter() - start, "calibrate": 0.0, "factor": 0.0, "save": 0.0}
        self.walk: Walk | None = None
        self.spill: Spill | None = None

    def make(self) -> Outcome:
        """Every block, the rest, and the facts."""
        identity = {"recipe": self.noted, **self.stream, "ranks": dict(self.plan.ranks)}
        with ExitStack() as stack:
            try:
                journal = stack.enter_context(open_journal(self.work / JOURNAL, KIND, identity))
            except ValueError as error:
                raise ValueError(f"{error} (--force without --resume does)") from error
            gradients = self._gradients()
            todo = [number for number in range(len(self.skeleton.blocks)) if not self._is_done(journal, number)]
            for number in self.how.track(todo, "blocks", len(todo)):
                self._do(number, journal, gradients)
            records = [_last(journal, number) for number in range(len(self.skeleton.blocks))]
        return self._finish([record for record in records if record is not None])

    def _file(self, number: int) -> str:
        """Of a block; the last one holds what stands around the blocks."""
        count = len(self.skeleton.blocks) + 1
        return f"model-{number + 1:05d}-of-{count:05d}.safetensors"

    def _folder(self, name: str, settings: dict[str, Any]) -> Path:
        """For what is made of the model and the text with these settings; what was made otherwise is removed."""
        state = json.dumps({**self.stream, "dtype": str(self.skeleton.dtype), **settings}, sort_keys=True)
        folder = self.work / f"{name}-{hashlib.sha256(state.encode()).hexdigest()[:12]}"
        for other in self.work.glob(f"{name}-*"):
            if other != folder:
                shutil.rmtree(other)
        return folder

    def _is_done(self, journal: Journal, number: int) -> bool:
        """Whether the block's shard is there as it was written."""
        record, path = _last(journal, number), self.checkpoint / self._file(number)
        return record is not None and path.is_file() and digest_of(path) == record["sha256"]

    def _do(self, number: int, journal: Journal, gradients: Sweep | dict[str, GradientMoments] | None) -> None:
        """Calibrate, factor and write a block."""
        start = time.perf_counter()
        sites = [site for site in self.planned if site.block == number]
        if sites and self.needs:
            self._go_to(number)
        with self.skeleton.resident(number) as block, torch.no_grad():
            part = BlockCalibration(number)
            if sites:
                part = self._calibrate(number, sites, gradients)
            factoring = time.perf_counter()
            reports = self._factor(sites, part)
            del part
            writing = time.perf_counter()
            tensors = self.skeleton.tensors_of(number)
            digest = write_shard(self.checkpoint / self._file(number), tensors)
            spent = {
                "calibrate": factoring - start,
                "factor": writing - factoring,
                "save": time.perf_counter() - writing,
            }
            record = {
                "sha256": digest,
                "tensors": sorted(tensors),
                "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
                "reports": [report.to_record() for report in reports],
                "params": [num_params(block), num_bytes(block)],
                "sites": specs_of(block, f"{self.skeleton.prefix}.{number}."),
                "seconds": {stage: round(value, 3) for stage, value in spent.items()},
            }
            del tensors, block
        journal.write(_new_key(journal, number), record)
        if self.spill is not None:
            self.spill.clear()

    def _go_to(self, number: int) -> None:
        """Bring the walk to the door of a block, from the nearest whole one before it."""
        assert self.tokens is not None
        if self.walk is None or self.spill is None:
            folder = self._folder("hidden", {"together": self.how.batch_size})
            batches = self.tokens.batches(self.how.batch_size)
            door = max((door for door in whole_doors(folder) if door <= number), default=None)
            self.spill = Spill(folder, len(batches), door=door, device=self.skeleton.device)
            with self.skeleton.resident(0):  # it runs once, to show the form of its output
                self.walk = Walk(self.model, batches, self.how.track, held=self.spill, start=door)
        nearest = max(door for door in whole_doors(self.spill.folder) if door <= number)
        if nearest > self.walk.next:  # a shard before it was damaged and made again
            self.walk.next = self.spill.door = nearest
        while self.walk.next < number:
            with self.skeleton.resident(self.walk.next):
                self.walk.skip(self.walk.next)
            self.spill.clear()

    def _calibrate(
        self, number: int, sites: list[Site], gradients: Sweep | dict[str, GradientMoments] | None
    ) -> BlockCalibration:
        """The block's moments; the walk is at the next door afterwards."""
        inputs = {}
        if self.needs:
            assert self.walk is not None
            inputs = self.walk.moments(number, first_readers(sites), self.needs)
        found = gradients.read(number) if isinstance(gradients, Sweep) else gradients or {}
        return BlockCalibration(number, inputs, {site.name: found[site.name] for site in sites if site.name in found})

    def _factor(self, sites: list[Site], part: BlockCalibration) -> list[SiteReport]:
        """Cut the block's units and put the cuts in place."""
        groups = [group for group in self.plan.joint if any(site.input_group == group for site in sites)]
        weight_of = partial(Unit.weight, model=self.model)
        reports: list[SiteReport] = []
        request = FactorRequest(self.method, units_of(sites, groups), part, weight_of)
        for unit, cut in self.how.engine.cut_units(CutRequest(request, self.plan)):
            reports += place(self.model, unit, cut, self.plan)
        return reports

    def _gradients(self) -> Sweep | dict[str, GradientMoments] | None:
        """Where each block's gradient statistics are, made now where they are not."""
        needs = self.method.needs & GRADIENT_STATISTICS
        if not needs or not self.planned:
            return None
        if self.recipe.calibration.fisher == "recorded":
            return recorded_gradients(locate(self.recipe.model), self.planned)
        assert self.tokens is not None
        start = time.perf_counter()
        settings = {"needs": sorted(needs), "sites": [site.name for site in self.planned]}
        folder = self._folder("gradients", settings)
        sweep = Sweep(self.skeleton, self.tokens, self.planned, needs, folder, track=self.how.track)
        sweep.run()
        self.seconds["calibrate"] += time.perf_counter() - start
        return sweep

    def _finish(self, records: list[dict[str, Any]]) -> Outcome:
        """What stands around the blocks, the index, the configuration, and the facts."""
        start = time.perf_counter()
        files = {self._file(number): record["tensors"] for number, record in enumerate(records)}
        around = self.skeleton.tensors_around()
        last = self._file(len(records))
        write_shard(self.checkpoint / last, around)
        files[last] = sorted(around)
        total = sum(record["bytes"] for record in records)
        total += sum(tensor.numel() * tensor.element_size() for tensor in around.values())
        write_index(self.checkpoint, files, total)
        if self.planned:
            sites = {name: spec for record in records for name, spec in record["sites"].items()}
            attach(self.model, sites, self.noted)
        self.model.config.save_pretrained(self.checkpoint)
        if self.model.can_generate() and self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(self.checkpoint)
        self.tokenizer.save_pretrained(self.checkpoint)
        for record in records:  # of a resumed run, also what the runs before it took
            for stage, value in record["seconds"].items():
                self.seconds[stage] += value
        known = {site.name: site for site in self.plan.sites}
        reports = tuple(SiteReport.from_record(each, known) for record in records for each in record["reports"])
        dense = tuple(site for site in self.plan.sites if self.plan.rank(site) is None)
        after = [self.around[at] + sum(record["params"][at] for record in records) for at in (0, 1)]
        report = CompressionReport(reports, dense, self.before[0], after[0], self.before[1], after[1], self.seconds)
        facts = Facts.of(self.recipe, self.plan, self.summary, report)
        for name, text in self.bench.side_files(self.plan, facts).items():
            write_whole(self.checkpoint / name, text)
        self.seconds["save"] += time.perf_counter() - start
        return Outcome(self.recipe, self.plan, self.summary, report, dict(self.seconds))


def _check_recipe(recipe: Recipe) -> None:
    """Raises ValueError where the recipe needs more of the model than one block at a time."""
    recipe.check_makes_checkpoint()
    composition = recipe.composition
    allocation = composition.allocation
    measured = allocation.row.needs != "sites"
    found = {
        f"ranks by {allocation.name} (--allocation uniform)": measured and recipe.plan is None and recipe.rules is None,
        f"the order {composition.order} (--order one-shot)": composition.order != "one-shot",
        "a refit (--no-refit)": composition.refit,
        "refined blocks (--refine 0)": composition.refinement is not None,
        "distillation (distil: 0 in the recipe)": composition.distillation is not None,
        "recovery (leave out recover)": composition.recovery is not None,
    }
    needed = [what for what, there in found.items() if there]
    if needed:
        raise ValueError(
            f"out of core, one block is in memory at a time, and {recipe.method.name} here has {', '.join(needed)}: "
            "change that, or give a method that stands alone, such as --method asvd-i or --method kfac"
        )


@contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Inside, no other run makes `out`.

    Raises:
        ValueError: one does.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.with_name(f".{out.name}.lock")
    with path.open("a", encoding="utf-8") as file:
        if not _take(file.fileno(), path):
            raise ValueError(f"another run is making {out}; wait for it, or give another place")
        try:
            yield
        finally:
            with suppress(OSError):  # where a file cannot be removed while it is open
                path.unlink()


def _take(descriptor: int, path: Path) -> bool:
    """Whether the lock on an open file is ours now; it ends with the process, however that ends."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # A run that ends removes the file: a lock on one that was opened before keeps nobody out.
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except OSError:
        return False


def _publish(work: Path, out: Path) -> None:
    """Put the checkpoint in its place, and take the rest of the work away."""
    put_in_place(work / CHECKPOINT, out)
    shutil.rmtree(work)


def _keys(journal: Journal, number: int) -> list[str]:
    """The keys of a block's records; a shard that was damaged is made again and has one more."""
    keys = [f"block {number}"]
    while journal.find(keys[-1]) is not None:
        keys.append(f"block {number}, time {len(keys) + 1}")
    return keys


def _last(journal: Journal, number: int) -> dict[str, Any] | None:
    """The newest record of a block."""
    keys = _keys(journal, number)
    return journal.find(keys[-2]) if len(keys) > 1 else None


def _new_key(journal: Journal, number: int) -> str:
    return _keys(journal, number)[-1]
