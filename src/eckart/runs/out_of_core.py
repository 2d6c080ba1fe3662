"""Out of core: a model compressed from its files to files, one block in memory at a time.

The work folder `.<name>.work`, next to `out`, has a journal, the unfinished checkpoint, the hidden states of the
calibration text at the door of the next block (in the dense model and, where the order or a pass reads it, in the
compressed one), for ranks by losses those of each block, and for a method with gradients the statistics of each. It is
removed once the checkpoint is whole and in its place, and kept when anything fails: a resumed run goes on from it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch

from eckart.allocation import Ranking, RankPlan, summarise
from eckart.calibration.backward import Sweep
from eckart.calibration.doors import Spill, whole_doors
from eckart.calibration.moments import FORMAT, BlockCalibration, check_readable, recorded_gradients
from eckart.calibration.routes import mean_gradients
from eckart.calibration.sequential import PassReport, SequentialCalibration
from eckart.calibration.streams import Streams
from eckart.compression.cuts import CutRequest, FactorRequest
from eckart.compression.replace import CompressionReport, SiteReport, is_of, place
from eckart.data.tokens import Tokens
from eckart.lowrank import GradientMoments
from eckart.lowrank.input_moments import INPUT_STATISTICS
from eckart.lowrank.moments import GRADIENT_STATISTICS, TOKEN_WEIGHTS
from eckart.models.checkpoint import attach, specs_of
from eckart.models.experts import layer_role
from eckart.models.loading import load_tokenizer, locate
from eckart.models.shards import Skeleton, write_index, write_shard
from eckart.models.sites import Site
from eckart.models.units import Unit, units_of
from eckart.models.weight_files import write_digests
from eckart.runs.facts import Facts, Outcome
from eckart.runs.how import How
from eckart.runs.recipe import Recipe
from eckart.runs.recorded_losses import RecordedLosses
from eckart.runs.workbench import Workbench
from eckart.support.files import check_replaceable, claimed, digest_of, put_in_place, remove_partial, write_whole
from eckart.support.journal import Journal, open_journal
from eckart.support.sizes import num_bytes, num_params
from eckart.support.timing import timed

KIND = "compression out of core"
# In the work folder: the record of each finished block, the losses of each block, and the unfinished checkpoint.
JOURNAL, LOSSES, CHECKPOINT = "journal.jsonl", "losses.jsonl", "checkpoint"


def compress_out_of_core(recipe: Recipe, out: Path, how: How, *, resume: bool = False, force: bool = False) -> Outcome:
    """What `make_checkpoint` does, for a model that need not fit into memory.

    The checkpoint is the same, with one shard for each block and one for the modules around the blocks (embeddings and
    head). In memory at a time: those modules, one block (in the anchored order a copy too), the moments of what is
    factored of it, one batch of hidden states, and `streams.WAITING_BYTES` of batches on their way through the block. A
    method with gradients keeps the hidden states at every door on disk, and takes a backward pass block by block, each
    recomputed from its door.

    Args:
        recipe: without searches, probes, distillation and recovery.
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

    Cost: as `calibrate_by_block` and `compress`; the model's files are read once (with gradients three times, for
    ranks by losses once more). Disk: the compressed model, the hidden states of each stream at two doors, with
    gradients at every door, and the gradient statistics.
    """
    _check_recipe(recipe)
    with claimed(out) as out:
        work = out.with_name(f".{out.name}.work")
        check_replaceable(out, force=force, reads=recipe.reads)
        if any((work / name).exists() for name in (JOURNAL, LOSSES)) and not resume and not force:
            raise FileExistsError(f"{work} has an earlier run's work: go on with --resume, or --force to start anew")
        compression = _Compression(recipe, work, how)
        if work.exists() and not resume:
            shutil.rmtree(work)
        (work / CHECKPOINT).mkdir(parents=True, exist_ok=True)
        remove_partial(work / CHECKPOINT)
        outcome = compression.run()
        _publish(work, out)
    return outcome


class _Walk:
    """A calibration's streams, in files, on their way from block to block.

    Args:
        folder: for the streams' doors. Those in it that are whole are gone on from.
    """

    def __init__(self, calibration: SequentialCalibration, skeleton: Skeleton, folder: Path) -> None:
        self.calibration, self.skeleton, self.folder = calibration, skeleton, folder
        self.spills: dict[str, Spill] = {}
        self.streams: Streams | None = None

    def to(self, number: int, put_back: Callable[[int], None]) -> Streams:
        """The streams at the door of a block, from the nearest one before it that all have reached.

        Args:
            put_back: puts the linears of a block that was compressed before in their places.
        """
        if self.streams is None:
            with self.skeleton.first_resident():  # it runs once, to show the form of its output
                self.streams = self.calibration.open_streams(self._spill, self._reached(number))
        while (at := self.streams.number) < number:
            with self.skeleton.resident(at):
                self.calibration.pass_by(self.streams, at, partial(put_back, at))
            self.clear()
        return self.streams

    def clear(self) -> None:
        """Remove the doors that have been passed."""
        for spill in self.spills.values():
            spill.clear()

    def _reached(self, number: int) -> tuple[int, dict[str, Spill]] | None:
        """The last door up to a block's that is whole in every stream; None where there is none."""
        names = self.calibration.names
        first = min(site.block for site in self.calibration.sites)  # up to which the streams are the same
        whole = {name: whole_doors(self.folder / name) for name in names}
        doors = [
            door
            for door in whole[names[0]]
            if door <= number and (door <= first or all(door in whole[name] for name in names))
        ]
        if not doors:
            return None
        door = max(doors)
        return door, {name: self._spill(name, 0, door) for name in names if door in whole[name]}

    def _spill(self, name: str, first: int, door: int | None = None) -> Spill:
        texts = [text for text in (self.calibration.tokens, self.calibration.held_out) if text is not None]
        batches = sum(len(text.rows(self.calibration.batch_size)) for text in texts)
        folder, device = self.folder / name, self.skeleton.device
        self.spills[name] = Spill(folder, batches, first=first, door=door, device=device)
        return self.spills[name]


class _Compression:
    """One compression out of core, in its work folder."""

    plan: RankPlan
    planned: list[Site]
    walk: _Walk | None

    def __init__(self, recipe: Recipe, work: Path, how: How) -> None:
        start = time.perf_counter()
        self.work, self.how, self.checkpoint = work, how, work / CHECKPOINT
        self.skeleton = Skeleton(
            recipe.model, dtype=recipe.dtype, device=how.device, trust_remote_code=how.trust_remote_code
        )
        self.model = self.skeleton.model
        self.tokenizer = load_tokenizer(recipe.model, trust_remote_code=how.trust_remote_code)
        self.workbench = workbench = Workbench(recipe, self.model, self.tokenizer, how)
        workbench.check()
        workbench.announce()
        self.recipe, self.composition = workbench.recipe, workbench.composition
        self.method = self.composition.in_order
        self.noted = workbench.noted
        self.fingerprint = self.skeleton.shards.fingerprint()
        self.before = (num_params(self.model), num_bytes(self.model))
        blocks = self.skeleton.blocks
        self.around = (self.before[0] - num_params(blocks), self.before[1] - num_bytes(blocks))
        self.seconds = {"load": time.perf_counter() - start, "calibrate": 0.0, "factor": 0.0, "save": 0.0}

    def run(self) -> Outcome:
        """Choose the ranks, compress every block that is not finished, and complete the checkpoint."""
        with timed(self.seconds, "allocate"):
            ranking = self._rank()
        self.plan = ranking.plan
        self.planned = [*self.plan.changed]
        self.summary = summarise(self.plan, self.model, bias=self.method.centred)
        # Passes, and orders other than one-shot, read the text whatever the method needs.
        walks = self.workbench.walks
        reads = bool(self.planned) and (walks or self.workbench.reads_text)
        identity = {"recipe": self.noted, **self._sources(reads), "ranks": dict(self.plan.ranks)}
        if self.plan.stored:
            identity["stored"] = self.plan.stored_record
        with self._open_journal(JOURNAL, KIND, identity) as journal:
            self.walk = None
            if self.planned and (walks or self.method.needs & INPUT_STATISTICS):
                calibration = self.workbench.walk(self.plan, {})
                folder = self._folder("hidden", {"together": calibration.batch_size})
                self.walk = _Walk(calibration, self.skeleton, folder)
            with timed(self.seconds, "calibrate"):
                _ = self._gradients
            todo = [number for number in range(len(self.skeleton.blocks)) if not self._is_done(journal, number)]
            for number in self.how.track(todo, "blocks", len(todo)):
                self._compress_block(number, journal)
            records = [_last(journal, number) for number in range(len(self.skeleton.blocks))]
        return self._finish([record for record in records if record is not None], ranking)

    def _rank(self) -> Ranking:
        """The ranks. Losses that they need are measured block by block, and recorded."""
        if not self.workbench.measures_losses:
            return self.workbench.rank()
        identity = {"recipe": self.noted, **self._sources(self.workbench.reads_text)}
        with self._open_journal(LOSSES, "losses out of core", identity) as journal:
            losses = RecordedLosses(journal, self.how.engine.losses)
            inputs = self.workbench.allocation_inputs()
            ranking = self.workbench.rank(
                replace(inputs, blocks=lambda: self._dense_parts(losses), losses=losses, journals=None)
            )
        for folder in self.work.glob("dense-*"):
            shutil.rmtree(folder)
        return ranking

    def _dense_parts(self, losses: RecordedLosses) -> Iterator[BlockCalibration]:
        """The dense model's moments of the selected sites; each block is in memory until the next one is asked for."""
        walk, sites = None, self.workbench.sites
        if self.composition.method.needs & INPUT_STATISTICS:
            calibration = SequentialCalibration(
                self.model,
                self._texts[0],
                self.composition.method,
                order="one-shot",
                sites=sites,
                gradients={},
                batch_size=self.how.batch_size,
                track=self.how.track,
            )
            walk = _Walk(calibration, self.skeleton, self._folder("dense", {"together": self.how.batch_size}))
        for number in sorted({site.block for site in sites}):
            if losses.holds(number):
                yield BlockCalibration(number)
                continue
            gradients = self._gradients_of(number)
            streams = None if walk is None else walk.to(number, _nothing)
            with self.skeleton.resident(number), torch.no_grad():
                if walk is None or streams is None:
                    yield BlockCalibration(number, gradients=gradients)
                else:
                    yield from _with_gradients(walk.calibration.walk(streams, number, gradients), gradients)
            if walk is not None:
                walk.clear()

    @cached_property
    def _texts(self) -> tuple[Tokens, Tokens | None]:
        """(calibration samples, held-out ones), which the model can read."""
        for text in self.workbench.tokens:
            if text is not None:
                check_readable(self.model, text)
        return self.workbench.tokens

    def _sources(self, reads: bool) -> dict[str, Any]:
        """What hidden states and gradients depend on, in addition to the batch size.

        Args:
            reads: whether there are any: a text that nothing reads may be missing.
        """
        tokens, held_out = self._texts if reads else (None, None)
        return {
            "model": self.fingerprint,
            "tokens": None if tokens is None else tokens.digest,
            **({} if self.workbench.recording is None else {"fisher": self.workbench.recording}),
            **({} if held_out is None else {"held out": held_out.digest}),
        }

    @contextmanager
    def _open_journal(self, name: str, kind: str, identity: dict[str, Any]) -> Iterator[Journal]:
        with ExitStack() as stack:
            try:
                journal = stack.enter_context(open_journal(self.work / name, kind, identity))
            except ValueError as error:
                raise ValueError(f"{error} (--force without --resume does)") from error
            yield journal

    def _file(self, number: int) -> str:
        """Name of a block's shard; the one after the last block's holds the modules around the blocks."""
        count = len(self.skeleton.blocks) + 1
        return f"model-{number + 1:05d}-of-{count:05d}.safetensors"

    def _folder(self, name: str, settings: dict[str, Any]) -> Path:
        """A folder for data of this model, text and settings; those of other settings are removed."""
        state = json.dumps({**self._sources(True), "dtype": str(self.skeleton.dtype), **settings}, sort_keys=True)
        folder = self.work / f"{name}-{hashlib.sha256(state.encode()).hexdigest()[:12]}"
        for other in self.work.glob(f"{name}-*"):
            if other != folder:
                shutil.rmtree(other)
        return folder

    def _is_done(self, journal: Journal, number: int) -> bool:
        """Whether the block's shard is on disk, undamaged."""
        record, path = _last(journal, number), self.checkpoint / self._file(number)
        return record is not None and path.is_file() and digest_of(path) == record["sha256"]

    def _compress_block(self, number: int, journal: Journal) -> None:
        """Calibrate, factor, improve and write a block."""
        start, factoring = time.perf_counter(), 0.0
        sites = [site for site in self.planned if site.block == number]
        groups = [group for group in self.plan.joint if any(site.joint_group == group for site in sites)]
        units = units_of(sites, groups)
        streams = None if self.walk is None or not sites else self.walk.to(number, partial(self._put_back, journal))
        earlier = 0 if self.walk is None else len(self.walk.calibration.reports)
        with self.skeleton.resident(number) as block, torch.no_grad():
            reports: list[SiteReport] = []
            for part in self._parts(number, streams) if sites else ():
                began = time.perf_counter()
                reports += self._factor([unit for unit in units if is_of(unit, part, self.method)], part)
                factoring += time.perf_counter() - began
                del part
            passes = [] if self.walk is None else self.walk.calibration.reports[earlier:]
            writing = time.perf_counter()
            tensors = self.skeleton.tensors_of(number)
            digest = write_shard(self.checkpoint / self._file(number), tensors)
            spent = {
                "calibrate": writing - start - factoring,
                "factor": factoring,
                "save": time.perf_counter() - writing,
            }
            record = {
                "sha256": digest,
                "tensors": sorted(tensors),
                "bytes": sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
                "reports": [report.to_record() for report in reports],
                "passes": [asdict(report) for report in passes],
                "params": [num_params(block), num_bytes(block)],
                "sites": specs_of(block, f"{self.skeleton.places[number]}."),
                "seconds": {stage: round(value, 3) for stage, value in spent.items()},
            }
            del tensors, block
        journal.write(_new_key(journal, number), record)
        if self.walk is not None:
            self.walk.clear()

    def _parts(self, number: int, streams: Streams | None) -> Iterator[BlockCalibration]:
        """The block's moments; the streams are at the next door afterwards."""
        gradients = self._gradients_of(number)
        if self.walk is None or streams is None:
            yield BlockCalibration(number, gradients=gradients)
        else:
            yield from _with_gradients(self.walk.calibration.walk(streams, number, gradients), gradients)

    def _factor(self, units: Sequence[Unit], part: BlockCalibration) -> list[SiteReport]:
        """Cut some of the block's units and put the cuts in place."""
        weight_of, bias_of = partial(Unit.weight, model=self.model), partial(Unit.own_bias, model=self.model)
        reports: list[SiteReport] = []
        request = CutRequest(
            FactorRequest(self.method, units, part, weight_of, bias_of),
            self.plan,
            refit=self.composition.refit,
            turns=self.composition.turns,
        )
        for unit, cut in self.how.engine.cut_units(request):
            reports += place(self.model, unit, cut, self.plan)
        return reports

    def _put_back(self, journal: Journal, number: int) -> None:
        """Put the linears of a finished block in their places, where a stream goes through them."""
        record = _last(journal, number)
        assert record is not None
        assert self.walk is not None
        if "compressed" in self.walk.calibration.names:
            self.skeleton.put_back(self.checkpoint / self._file(number), record["sites"])

    def _gradients_of(self, number: int) -> Mapping[str, GradientMoments]:
        """A block's gradient statistics."""
        return self._gradients.read(number) if isinstance(self._gradients, Sweep) else self._gradients

    @cached_property
    def _gradients(self) -> Sweep | Mapping[str, GradientMoments]:
        """Every block's gradient statistics, computed now unless recorded or on disk; empty where none are needed."""
        needs = self.method.needs & GRADIENT_STATISTICS
        # Where losses decide the ranks, of all sites that share the budget, and where they say what tokens weigh, of
        # all that read what these do; else of those that are cut.
        whole = self.workbench.measures_losses or TOKEN_WEIGHTS in needs
        sites = self.workbench.sites if whole else self.planned
        if not needs or not sites:
            return {}
        if self.recipe.calibration.fisher == "recorded":
            return recorded_gradients(locate(self.recipe.model), sites)
        settings = {"format": FORMAT, "needs": sorted(needs), "sites": [site.name for site in sites]}
        folder = self._folder("gradients", settings)
        sweep = Sweep(self.skeleton, self._texts[0], sites, needs, folder, track=self.how.track)
        sweep.run()
        return sweep

    def _finish(self, records: list[dict[str, Any]], ranking: Ranking) -> Outcome:
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
        if self.model.can_generate() and self.model.generation_config is not None:
            self.model.generation_config.save_pretrained(self.checkpoint)
        self.tokenizer.save_pretrained(self.checkpoint)
        for record in records:  # of a resumed run, those of the runs before it too
            for stage, value in record["seconds"].items():
                self.seconds[stage] += value
        known = {site.name: site for site in self.plan.sites}
        reports = tuple(SiteReport.from_record(each, known) for record in records for each in record["reports"])
        dense = tuple(site for site in self.plan.sites if site not in self.planned)
        after = [self.around[at] + sum(record["params"][at] for record in records) for at in (0, 1)]
        report = CompressionReport(reports, dense, self.before[0], after[0], self.before[1], after[1], self.seconds)
        # A record of an older eckart, which made no passes out of core, has none.
        passes = tuple(PassReport(**each) for record in records for each in record.get("passes", ()))
        parts, no_bias = self.workbench.parts, self.workbench.no_bias
        facts = Facts.of(self.recipe, self.plan, self.summary, report, passes, calibration=parts, no_bias=no_bias)
        for name, text in self.workbench.side_files(self.plan, facts, ranking.facts).items():
            write_whole(self.checkpoint / name, text)
        self.model.config.save_pretrained(self.checkpoint)
        write_digests(self.checkpoint, digests)
        self.seconds["save"] += time.perf_counter() - start
        return Outcome(self.recipe, self.plan, self.summary, report, dict(self.seconds), passes, ranking.facts)


def _with_gradients(
    parts: Iterator[BlockCalibration], gradients: Mapping[str, GradientMoments]
) -> Iterator[BlockCalibration]:
    """The parts with a block's gradient statistics."""
    roles = {role for name in gradients if (role := layer_role(name)) is not None}
    means = mean_gradients(gradients, roles) if roles else {}
    # A generator would hold a part while the next one is made.
    return map(lambda part: replace(part, gradients=gradients, gradient_means=means), parts)  # noqa: C417


def _nothing(_number: int) -> None:
    """In the dense model there is nothing to put back."""


def _check_recipe(recipe: Recipe) -> None:
    """Raises ValueError where the recipe needs more of the model than one block at a time."""
    recipe.check_makes_checkpoint()
    composition = recipe.composition
    allocation = composition.allocation
    fixed = recipe.plan is not None or recipe.rules is not None
    conditions = {
        f"ranks by {allocation.name} (--allocation global)": allocation.row.needs == "trials" and not fixed,
        "weights by probes (weights: equal in the recipe)": allocation.weights == "probes" and not fixed,
        "a budget in speed, for which the whole model is timed (--keep, or --plan)": recipe.speed is not None,
        "a budget for the cache (leave out keep_cache)": recipe.opens_heads,
        "distillation (distil: 0 in the recipe)": composition.distillation is not None,
        "recovery (leave out recover)": composition.recovery is not None,
    }
    obstacles = [what for what, holds in conditions.items() if holds]
    if obstacles:
        raise ValueError(
            f"out of core, one block is in memory at a time, and {recipe.method.name} here has {', '.join(obstacles)}: "
            "change that, or give a method without these, such as --method best or --method asvd-i"
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
