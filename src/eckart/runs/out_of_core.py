"""Out of core: a model compressed from its files to files, one block in memory at a time.

The work folder `.<name>.work`, next to `out`, has a journal, the unfinished checkpoint, the hidden states of the
calibration text at the door of the next block, and for a method with gradients the statistics of each block. It is
removed once the checkpoint is whole and in its place, and kept when anything fails: a resumed run goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eckart.allocation import RankPlan, summarise
from eckart.calibration.backward import Sweep
from eckart.calibration.doors import Spill, whole_doors
from eckart.calibration.moments import FORMAT, BlockCalibration, check_readable, recorded_gradients
from eckart.calibration.walk import Walk
from eckart.compression.cuts import CutRequest, FactorRequest
from eckart.compression.replace import CompressionReport, SiteReport, place
from eckart.data.tokens import Tokens
from eckart.lowrank import GradientMoments, Method
from eckart.lowrank.moments import GRADIENT_STATISTICS, INPUT_STATISTICS
from eckart.models.checkpoint import attach, specs_of
from eckart.models.loading import load_tokenizer, locate
from eckart.models.shards import Skeleton, write_index, write_shard
from eckart.models.sites import Site, find_sites, first_readers
from eckart.models.units import Unit, units_of
from eckart.models.weight_files import write_digests
from eckart.runs.facts import Facts, Outcome
from eckart.runs.how import How
from eckart.runs.recipe import Recipe
from eckart.runs.workbench import Workbench
from eckart.support.files import check_replaceable, claimed, digest_of, put_in_place, write_whole
from eckart.support.journal import Journal, open_journal
from eckart.support.sizes import num_bytes, num_params

KIND = "compression out of core"
# In the work folder: the record of each finished block, and the unfinished checkpoint.
JOURNAL, CHECKPOINT = "journal.jsonl", "checkpoint"


def compress_out_of_core(recipe: Recipe, out: Path, how: How, *, resume: bool = False, force: bool = False) -> Outcome:
    """What `make_checkpoint` does, for a model that need not fit into memory.

    The checkpoint is the same, with one shard for each block and one for the modules around the blocks (embeddings and
    head). In memory at a time: those modules, one block and its moments, one batch of hidden states. A method with
    gradients keeps the hidden states at every door on disk, and takes a backward pass block by block, each recomputed
    from its door.

    Args:
        recipe: any method of the catalogue, with ranks that need no measured losses.
        resume: go on from the work folder of an earlier run of the same recipe. Finished shards are checked by their
            digests; a damaged one is written again.
        force: discard the work folder of an earlier run, and replace `out` once the new checkpoint is complete.

    Raises:
        FileExistsError: `out` exists and `force` is not given, or an earlier run's work folder exists and neither
            `resume` nor `force` is given.
        ValueError: the recipe needs the whole model at once, the work is of another recipe, model or text, or another
            run is at it.
        CheckpointError: the model's files are damaged or incomplete.
        OSError: the disk is full. Finished blocks are kept.
        DecompositionError: a decomposition failed; the message names the site.

    Cost: as `calibrate_by_block` and `compress`; the model's files are read once (with gradients three times). Disk:
    the compressed model, and the hidden states at two doors, or with gradients at every door.
    """
    _check_recipe(recipe)
    with claimed(out) as out:
        work = out.with_name(f".{out.name}.work")
        check_replaceable(out, force=force, reads=recipe.reads)
        if (work / JOURNAL).exists() and not resume and not force:
            raise FileExistsError(f"{work} has an earlier run's work: go on with --resume, or --force to start anew")
        compression = _Compression(recipe, work, how)
        if work.exists() and not resume:
            shutil.rmtree(work)
        (work / CHECKPOINT).mkdir(parents=True, exist_ok=True)
        outcome = compression.run()
        _publish(work, out)
    return outcome


class _Compression:
    """One compression out of core, in its work folder."""

    def __init__(self, recipe: Recipe, work: Path, how: How) -> None:
        start = time.perf_counter()
        self.work, self.how, self.checkpoint = work, how, work / CHECKPOINT
        self.skeleton = Skeleton(
            recipe.model, dtype=recipe.dtype, device=how.device, trust_remote_code=how.trust_remote_code
        )
        self.model = self.skeleton.model
        self.tokenizer = load_tokenizer(recipe.model, trust_remote_code=how.trust_remote_code)
        self.workbench = workbench = Workbench(recipe, self.model, self.tokenizer, how)
        workbench.announce()
        self.recipe = workbench.recipe
        self.method: Method = recipe.composition.in_order
        self.plan: RankPlan = workbench.rank().plan
        self.planned = [site for site in find_sites(self.model) if self.plan.rank(site) is not None]
        self.needs = self.method.needs & INPUT_STATISTICS
        self.tokens: Tokens | None = workbench.tokens[0] if workbench.reads_text and self.planned else None
        if self.tokens is not None:
            check_readable(self.model, self.tokens)
        self.summary = summarise(self.plan, self.model, bias=self.method.centred)
        self.noted = workbench.noted
        # What the hidden states and gradients depend on, in addition to the batch size.
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

    def run(self) -> Outcome:
        """Compress every block that is not finished, and complete the checkpoint."""
        identity = {"recipe": self.noted, **self.stream, "ranks": dict(self.plan.ranks)}
        with ExitStack() as stack:
            try:
                journal = stack.enter_context(open_journal(self.work / JOURNAL, KIND, identity))
            except ValueError as error:
                raise ValueError(f"{error} (--force without --resume does)") from error
            gradients = self._gradients()
            todo = [number for number in range(len(self.skeleton.blocks)) if not self._is_done(journal, number)]
            for number in self.how.track(todo, "blocks", len(todo)):
                self._compress_block(number, journal, gradients)
            records = [_last(journal, number) for number in range(len(self.skeleton.blocks))]
        return self._finish([record for record in records if record is not None])

    def _file(self, number: int) -> str:
        """Name of a block's shard; the one after the last block's holds the modules around the blocks."""
        count = len(self.skeleton.blocks) + 1
        return f"model-{number + 1:05d}-of-{count:05d}.safetensors"

    def _folder(self, name: str, settings: dict[str, Any]) -> Path:
        """A folder for data of this model, text and settings; those of other settings are removed."""
        state = json.dumps({**self.stream, "dtype": str(self.skeleton.dtype), **settings}, sort_keys=True)
        folder = self.work / f"{name}-{hashlib.sha256(state.encode()).hexdigest()[:12]}"
        for other in self.work.glob(f"{name}-*"):
            if other != folder:
                shutil.rmtree(other)
        return folder

    def _is_done(self, journal: Journal, number: int) -> bool:
        """Whether the block's shard is on disk, undamaged."""
        record, path = _last(journal, number), self.checkpoint / self._file(number)
        return record is not None and path.is_file() and digest_of(path) == record["sha256"]

    def _compress_block(
        self, number: int, journal: Journal, gradients: Sweep | dict[str, GradientMoments] | None
    ) -> None:
        """Calibrate, factor and write a block."""
        start = time.perf_counter()
        sites = [site for site in self.planned if site.block == number]
        if sites and self.needs:
            self._walk_to(number)
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

    def _walk_to(self, number: int) -> None:
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
        statistics = gradients.read(number) if isinstance(gradients, Sweep) else gradients or {}
        return BlockCalibration(
            number, inputs, {site.name: statistics[site.name] for site in sites if site.name in statistics}
        )

    def _factor(self, sites: list[Site], part: BlockCalibration) -> list[SiteReport]:
        """Cut the block's units and put the cuts in place."""
        groups = [group for group in self.plan.joint if any(site.input_group == group for site in sites)]
        weight_of, bias_of = partial(Unit.weight, model=self.model), partial(Unit.own_bias, model=self.model)
        reports: list[SiteReport] = []
        request = FactorRequest(self.method, units_of(sites, groups), part, weight_of, bias_of)
        for unit, cut in self.how.engine.cut_units(CutRequest(request, self.plan)):
            reports += place(self.model, unit, cut, self.plan)
        return reports

    def _gradients(self) -> Sweep | dict[str, GradientMoments] | None:
        """Each block's gradient statistics, computed now unless recorded or on disk; None where none are needed."""
        needs = self.method.needs & GRADIENT_STATISTICS
        if not needs or not self.planned:
            return None
        if self.recipe.calibration.fisher == "recorded":
            return recorded_gradients(locate(self.recipe.model), self.planned)
        assert self.tokens is not None
        start = time.perf_counter()
        settings = {"format": FORMAT, "needs": sorted(needs), "sites": [site.name for site in self.planned]}
        folder = self._folder("gradients", settings)
        sweep = Sweep(self.skeleton, self.tokens, self.planned, needs, folder, track=self.how.track)
        sweep.run()
        self.seconds["calibrate"] += time.perf_counter() - start
        return sweep

    def _finish(self, records: list[dict[str, Any]]) -> Outcome:
        """Write the modules around the blocks, the index, the configuration, and the facts."""
        start = time.perf_counter()
        files = {self._file(number): record["tensors"] for number, record in enumerate(records)}
        around = self.skeleton.tensors_around()
        last = self._file(len(records))
        digests = {self._file(number): record["sha256"] for number, record in enumerate(records)}
        digests[last] = write_shard(self.checkpoint / last, around)
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
        for record in records:  # of a resumed run, those of the runs before it too
            for stage, value in record["seconds"].items():
                self.seconds[stage] += value
        known = {site.name: site for site in self.plan.sites}
        reports = tuple(SiteReport.from_record(each, known) for record in records for each in record["reports"])
        dense = tuple(site for site in self.plan.sites if self.plan.rank(site) is None)
        after = [self.around[at] + sum(record["params"][at] for record in records) for at in (0, 1)]
        report = CompressionReport(reports, dense, self.before[0], after[0], self.before[1], after[1], self.seconds)
        facts = Facts.of(self.recipe, self.plan, self.summary, report)
        for name, text in self.workbench.side_files(self.plan, facts).items():
            write_whole(self.checkpoint / name, text)
        write_digests(self.checkpoint, digests)
        self.seconds["save"] += time.perf_counter() - start
        return Outcome(self.recipe, self.plan, self.summary, report, dict(self.seconds))


def _check_recipe(recipe: Recipe) -> None:
    """Raises ValueError where the recipe needs more of the model than one block at a time."""
    recipe.check_makes_checkpoint()
    composition = recipe.composition
    allocation = composition.allocation
    measured = allocation.row.needs != "sites"
    conditions = {
        f"ranks by {allocation.name} (--allocation uniform)": measured and recipe.plan is None and recipe.rules is None,
        f"the order {composition.order} (--order one-shot)": composition.order != "one-shot",
        "a budget in speed, for which the whole model is timed (--keep, or --plan)": recipe.speed is not None,
        "a refit (--no-refit)": composition.refit,
        "refined blocks (--refine 0)": composition.refinement is not None,
        "distillation (distil: 0 in the recipe)": composition.distillation is not None,
        "recovery (leave out recover)": composition.recovery is not None,
    }
    obstacles = [what for what, holds in conditions.items() if holds]
    if obstacles:
        raise ValueError(
            f"out of core, one block is in memory at a time, and {recipe.method.name} here has {', '.join(obstacles)}: "
            "change that, or give a method without these, such as --method asvd-i or --method kfac"
        )


def _publish(work: Path, out: Path) -> None:
    """Put the checkpoint in its place, and remove the work folder."""
    put_in_place(work / CHECKPOINT, out)
    shutil.rmtree(work)


def _keys(journal: Journal, number: int) -> list[str]:
    """The keys of a block's records, the last one unused; a damaged shard is written again and has one more record."""
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
