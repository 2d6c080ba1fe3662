"""Kept blocks: what a walk in memory has finished is in files of a folder, so that a killed run goes on from it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from eckart.allocation import Ranking, RankPlan
from eckart.calibration.cache import CHECKSUM, checksum_of
from eckart.calibration.moments import BlockCalibration
from eckart.calibration.sequential import PassReport, SequentialCalibration
from eckart.compression.replace import SiteReport
from eckart.lowrank.storage import Storage
from eckart.models.checkpoint import put_back, specs_of
from eckart.models.sites import Site, find_sites
from eckart.support.files import check_room, set_aside, whole_file, write_whole
from eckart.support.plain_data import read_json

# Number of this layout and of the way blocks are made; part of the folder's name, so that a change reuses nothing.
FORMAT = 2
# Metadata key of what is not a tensor.
RECORD = "record"


class KeptBlocks:
    """The parts of a calibration, as iterating it gives them, but for those of blocks that an earlier run finished.

    Those are put in place when their turn comes, and the streams go through them. It can be iterated once.

    Attributes:
        finished: the reports of their sites.

    Args:
        calibration: of a model in memory.
        folder: for the blocks' files. A damaged one is set aside, and its block made again.

    Cost: a finished block takes a forward pass of each stream, and none where no block after it is unfinished.
    """

    def __init__(self, calibration: SequentialCalibration, folder: Path) -> None:
        self.calibration, self.model, self.folder = calibration, calibration.model, folder
        self.numbers = sorted({site.block for site in calibration.sites})
        known = {site.name: site for site in find_sites(self.model)}
        self._passes: dict[int, list[PassReport]] = {}
        self._placed: list[SiteReport] = []
        finished: list[SiteReport] = []
        for number in self.numbers:
            if (content := _read(self._file(number))) is not None:
                record, _ = content
                finished += [SiteReport.from_record(each, known) for each in record["reports"]]
                self._passes[number] = [PassReport(**each) for each in record["passes"]]
        self.finished = tuple(finished)

    @property
    def reports(self) -> list[PassReport]:
        """The results of the passes over all blocks so far, those of the earlier run too."""
        return [report for number in sorted(self._passes) for report in self._passes[number]]

    def note(self, reports: Sequence[SiteReport]) -> None:
        """What was put in place: it is kept with its block."""
        self._placed += reports

    def __iter__(self) -> Iterator[BlockCalibration]:
        calibration = self.calibration
        calibration.begin()
        there = set(self._passes)
        last = max((number for number in self.numbers if number not in there), default=-1)
        streams = calibration.open_streams() if last >= 0 else None
        for number in range(1 + calibration.last):
            if streams is None or number > last:
                if number in there:
                    self._put_back(number)
            elif number in there:
                calibration.pass_by(streams, number, partial(self._put_back, number))
            else:
                before = len(calibration.reports)
                yield from calibration.walk(streams, number)
                if number in self.numbers:
                    self._keep(number, calibration.reports[before:])

    def _file(self, number: int) -> Path:
        return self.folder / f"block-{number:03d}.safetensors"

    def _keep(self, number: int, passes: Sequence[PassReport]) -> None:
        """Write a finished block's low-rank linears, and what is known of them.

        Raises:
            OSError: the disk is full. The blocks before it are kept.
        """
        self._passes[number] = list(passes)
        placed = [report for report in self._placed if report.site.block == number]
        names = {report.name for report in placed}
        specs = {name: spec for name, spec in specs_of(self.model).items() if name in names}
        tensors = {
            key: tensor.cpu().contiguous()
            for name in specs
            for key, tensor in self.model.get_submodule(name).state_dict(prefix=f"{name}.").items()
        }
        record = {
            "sites": specs,
            "reports": [report.to_record() for report in placed],
            "passes": [asdict(report) for report in passes],
        }
        metadata = {RECORD: json.dumps(record)}
        metadata[CHECKSUM] = checksum_of(metadata, sorted(tensors.items()))
        self.folder.mkdir(parents=True, exist_ok=True)
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        check_room(self.folder, size, f"the factors of block {number}")
        with whole_file(self._file(number)) as partial_file:
            save_file(tensors, partial_file, metadata)

    def _put_back(self, number: int) -> None:
        content = _read(self._file(number))
        if content is None:
            raise OSError(f"{self._file(number)} was damaged or removed just now; give the same command again")
        record, tensors = content
        on_device = {name: tensor.to(self.model.device) for name, tensor in tensors.items()}
        put_back(self.model, record["sites"], on_device)


def kept_ranking(path: Path, sites: Sequence[Site], rank: Callable[[], Ranking]) -> Ranking:
    """The ranks in a file, or those that `rank` gives, which are written there. A damaged file is set aside.

    Args:
        sites: of the model.
    """
    if path.exists():
        try:
            kept = read_json(path)
            if kept.pop(CHECKSUM) == _digest(kept):
                joint = frozenset(kept["joint"])
                stored = {name: Storage.from_dict(each) for name, each in kept.get("stored", {}).items()}
                plan = RankPlan(tuple(sites), kept["ranks"], kept["notes"], kept["layout"], joint, stored)
                return Ranking(plan, kept["facts"])
        except (ValueError, KeyError, TypeError):
            pass
        set_aside(path)
    ranking = rank()
    plan = ranking.plan
    content = {
        "ranks": dict(plan.ranks),
        "notes": dict(plan.notes),
        "layout": plan.layout,
        "joint": sorted(plan.joint),
        "stored": plan.stored_record,
        "facts": ranking.facts,
    }
    write_whole(path, json.dumps({**content, CHECKSUM: _digest(content)}))
    return ranking


def folder_of(cache: Path, identity: Mapping[str, Any]) -> Path:
    """Where a run keeps its ranks and, in a folder by the plan, its blocks, until its checkpoint is in place.

    Args:
        identity: all that they depend on, and the place that the run claims: no two runs share a folder.
    """
    return cache / "blocks" / _digest({"format": FORMAT, **identity})


def blocks_of_plan(folder: Path, plan: RankPlan) -> Path:
    """Where the blocks are that are cut to a plan."""
    return folder / _digest(plan.to_json())


def _digest(plain: Any) -> str:
    return hashlib.sha256(json.dumps(plain, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """(what is not a tensor, the tensors) of a block's file; None where there is none. A damaged one is set aside."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key).clone() for key in sorted(file.keys())}
        if metadata.get(CHECKSUM) == checksum_of(metadata, tensors.items()):
            return json.loads(metadata[RECORD]), tensors
    except (SafetensorError, KeyError):
        pass
    set_aside(path)
    return None
