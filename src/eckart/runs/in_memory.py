"""In memory: a recipe in, a checkpoint or a baseline out, with the whole model in the memory of this process."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from eckart.allocation import summarise
from eckart.calibration.sequential import SequentialCalibration
from eckart.compression.baselines import build_baseline
from eckart.compression.replace import compress
from eckart.models.heads import open_heads
from eckart.models.loading import describe_origin, load_model, load_tokenizer, own_memory, save
from eckart.models.matching import check_finite
from eckart.models.sites import find_sites
from eckart.runs.calibration_text import make_tokens, resolve
from eckart.runs.facts import FACTS, Facts, Outcome
from eckart.runs.how import How
from eckart.runs.inputs import inputs_of
from eckart.runs.kept_blocks import KeptBlocks, blocks_of_plan, folder_of, kept_ranking
from eckart.runs.recipe import Recipe
from eckart.runs.workbench import Workbench
from eckart.support.files import check_replaceable, claimed, write_whole
from eckart.support.timing import timed

# In a checkpoint, of a recovery's adapter that is not merged.
ADAPTER_FOLDER = "adapter"


def make_checkpoint(recipe: Recipe, out: Path, how: How, *, force: bool = False) -> Outcome:
    """Compress the recipe's model into the checkpoint directory `out`.

    The directory holds the model, the tokenizer, README.md, plan.json, recipe.yaml and compression.json. It appears
    whole or not at all.

    Raises:
        FileExistsError: `out` exists and `force` is not given; nothing is read or computed then.
        ValueError: another run is making `out`; nothing is read or computed then.
        ValueError, UnsupportedModelError, DecompositionError: as the stages raise them.
    """
    recipe.check_makes_checkpoint()
    with claimed(out):
        check_replaceable(out, force=force, reads=recipe.reads)
        return _make(recipe, out, how, force)


def _make(recipe: Recipe, out: Path, how: How, force: bool) -> Outcome:
    seconds: dict[str, float] = {}
    with timed(seconds, "load"):
        model = load_model(
            recipe.model, dtype=recipe.dtype, device=how.device, dense=True, trust_remote_code=how.trust_remote_code
        )
        own_memory(model)
        check_finite(recipe.model, model.named_parameters())
        if recipe.opens_heads:
            open_heads(model, recipe.cache_group)
        tokenizer = load_tokenizer(recipe.model, trust_remote_code=how.trust_remote_code)
        origin = origin_of(recipe.model)
    work = Workbench(recipe, model, tokenizer, how)
    work.check()
    work.announce()
    folder = None if how.cache is None or not work.walks else folder_of(how.cache, work.walk_identity(out))
    with timed(seconds, "allocate"):
        if folder is None or not work.measures_losses:
            ranking = work.rank()
        else:
            ranking = kept_ranking(folder / "ranks.json", find_sites(model), work.rank)
    composition = work.composition
    summary = summarise(ranking.plan, model, bias=composition.method.centred)
    blocks = work.calibration(ranking.plan)
    kept = None
    if isinstance(blocks, SequentialCalibration) and folder is not None:
        blocks = kept = KeptBlocks(blocks, blocks_of_plan(folder, ranking.plan))
    report = compress(
        model,
        composition.in_order,
        ranking.plan,
        blocks,
        refit=composition.refit,
        turns=composition.turns,
        cut=how.engine.cut_units,
        finished=() if kept is None else kept.finished,
        note=None if kept is None else kept.note,
        recipe=work.noted,
        track=how.track,
    )
    seconds |= report.seconds
    passes = [*blocks.reports] if isinstance(blocks, SequentialCalibration | KeptBlocks) else []
    with timed(seconds, "distil"):
        passes += work.distil()
    with timed(seconds, "recover"):
        passes += work.recover()
    with timed(seconds, "save"):
        speed = ranking.facts.get("speed")
        facts = Facts.of(
            work.recipe,
            ranking.plan,
            summary,
            report,
            passes,
            speed,
            work.parts,
            origin,
            no_bias=work.no_bias,
            cache=ranking.facts.get("cache"),
        )
        files: dict[str, str | bytes] = {}
        if work.adapter is not None:
            taken = work.adapter.take_off(str(out.absolute()))
            files |= {f"{ADAPTER_FOLDER}/{name}": content for name, content in taken.items()}
        files |= work.side_files(ranking.plan, facts, ranking.facts)
        save(model, out, tokenizer, recipe=work.noted, files=files, force=force)
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)  # it is as large as the model
    return Outcome(work.recipe, ranking.plan, summary, report, seconds, tuple(passes), ranking.facts)


def origin_of(model: str) -> dict[str, Any] | None:
    """What a model was made of that is no plain checkpoint, as `Facts.origin` has it; None of one that is."""
    described = describe_origin(model)
    if not described:
        return None
    files = inputs_of([model], (), None)
    return {**described, "files": {source.removeprefix("the model "): digests for source, digests in files.items()}}


def make_baseline(recipe: Recipe, directory: Path, how: How) -> PreTrainedModel:
    """The recipe's baseline, in memory; the directory gets recipe.yaml and its facts, compression.json.

    Raises:
        ValueError, UnsupportedModelError: as the baseline raises them.
    """
    model = load_model(
        recipe.model, dtype=recipe.dtype, device=how.device, dense=True, trust_remote_code=how.trust_remote_code
    )
    own_memory(model)
    check_finite(recipe.model, model.named_parameters())
    baseline = build_baseline(recipe.method.name, recipe.method.options)
    tokens = None
    if baseline.needs_tokens:
        tokenizer = load_tokenizer(recipe.model, trust_remote_code=how.trust_remote_code)
        recipe = resolve(recipe, model, tokenizer)
        tokens = make_tokens(recipe, model, tokenizer, how.data)
    facts = baseline.apply(model, keep=recipe.keep, tokens=tokens, track=how.track)
    write_whole(directory / "recipe.yaml", recipe.to_yaml())
    write_whole(directory / FACTS, json.dumps(facts, indent=2))
    return model
