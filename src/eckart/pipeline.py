"""Pipeline: a recipe in, a compressed model out."""

from __future__ import annotations

import functools
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.allocation import RankPlan, Rule, plan, summarise
from eckart.baselines import build_baseline
from eckart.calibration import calibrate_by_block
from eckart.card import write_card
from eckart.compression import CompressionReport, compress
from eckart.corpora import parts_of, read_text
from eckart.evals.tasks import default_length
from eckart.lowrank import build_method
from eckart.models.loading import check_free, load_model, load_tokenizer, own_memory, save
from eckart.models.sites import find_sites
from eckart.recipe import Recipe
from eckart.tokens import Tokens, sample_documents, sample_windows
from eckart.tracking import Track, silent


@dataclass(frozen=True)
class How:
    """Where and how fast a run goes. None of it changes a number beyond rounding.

    Attributes:
        device: of the model while it is calibrated, factored and evaluated.
        batch_size: calibration rows at a time.
        cache: folder for moments; None keeps none.
        data: folder with local copies of known corpora; None asks the hub.
        track: shows progress.
    """

    device: str = "cpu"
    batch_size: int = 8
    cache: Path | None = None
    data: Path | None = None
    track: Track = silent


@dataclass(frozen=True)
class Outcome:
    """What `make_checkpoint` did: the recipe with every default filled in, the plan, the report, the seconds."""

    recipe: Recipe
    plan: RankPlan
    summary: dict[str, Any]
    report: CompressionReport
    seconds: dict[str, float]


def make_checkpoint(recipe: Recipe, out: Path, how: How, *, force: bool = False) -> Outcome:
    """Compress the recipe's model into the checkpoint directory `out`.

    The directory holds the model, the tokenizer, README.md, plan.json, recipe.yaml and compression.json. It appears
    whole or not at all.

    Raises:
        FileExistsError: `out` exists and `force` is not given; nothing is read or computed then.
        ValueError, UnsupportedModelError, DecompositionError: as the stages raise them.
    """
    if recipe.is_baseline:
        raise ValueError(f"{recipe.method.name} is a baseline: `eckart run` measures it; it makes no checkpoint")
    check_free(out, force=force)
    start = time.perf_counter()
    model = load_model(recipe.model, dtype=recipe.dtype, device=how.device)
    own_memory(model)
    tokenizer = load_tokenizer(recipe.model)
    seconds = {"load": time.perf_counter() - start}
    ranks = make_plan(model, recipe)
    summary = summarise(ranks, model)
    method = build_method(recipe.method.name, recipe.method.options)
    blocks = None
    if method.needs:
        recipe = resolve(recipe, model, tokenizer)
        blocks = calibrate_by_block(
            model,
            make_tokens(recipe, model, tokenizer, how.data),
            method,
            sites=[site for site in ranks.sites if ranks.rank(site) is not None],
            cache=how.cache,
            batch_size=how.batch_size,
            track=how.track,
        )
    noted = recipe.model_dump(exclude_none=True, exclude={"evaluate"})
    report = compress(model, method, ranks, blocks, recipe=noted, track=how.track)
    seconds |= report.seconds
    start = time.perf_counter()
    facts = {**summary, **report.to_dict()}
    files = {
        "README.md": write_card(recipe, facts),
        "plan.json": ranks.to_json(),
        "recipe.yaml": recipe.to_yaml(),
        "compression.json": json.dumps(facts, indent=2),
    }
    save(model, out, tokenizer, recipe=noted, files=files, force=force)
    seconds["save"] = time.perf_counter() - start
    return Outcome(recipe, ranks, summary, report, seconds)


def make_baseline(recipe: Recipe, directory: Path, how: How) -> PreTrainedModel:
    """The recipe's baseline, in memory; the directory gets recipe.yaml and compression.json, what it did.

    Raises:
        ValueError, UnsupportedModelError: as the baseline raises them.
    """
    model = load_model(recipe.model, dtype=recipe.dtype, device=how.device)
    own_memory(model)
    baseline = build_baseline(recipe.method.name, recipe.method.options)
    tokens = None
    if baseline.needs_tokens:
        tokenizer = load_tokenizer(recipe.model)
        recipe = resolve(recipe, model, tokenizer)
        tokens = make_tokens(recipe, model, tokenizer, how.data)
    facts = baseline.apply(model, keep=recipe.keep, tokens=tokens, track=how.track)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    (directory / "compression.json").write_text(json.dumps(facts, indent=2), encoding="utf-8")
    return model


def make_plan(model: PreTrainedModel, recipe: Recipe) -> RankPlan:
    """The recipe's allocation on this model."""
    if recipe.plan is not None:
        path = Path(recipe.plan)
        if not path.is_file():
            raise ValueError(f"no plan at {path}")
        return RankPlan.from_json(path.read_text(encoding="utf-8"), find_sites(model))
    if recipe.rules is not None:
        rules = [Rule(r.keep, tuple(r.include), tuple(r.exclude), r.blocks) for r in recipe.rules]
        return plan(model, rules=rules, rank_multiple=recipe.rank_multiple)
    return plan(model, recipe.keep, rank_multiple=recipe.rank_multiple)


def make_tokens(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Path | None
) -> Tokens:
    """The calibration tokens of a recipe; a mixture of corpora gives each an equal part of the samples."""
    section = resolve(recipe, model, tokenizer).calibration
    assert section.length is not None
    sample = sample_windows if section.cut == "windows" else sample_documents
    corpora = parts_of(section.corpus)
    if section.samples < len(corpora):
        raise ValueError(f"{section.samples} samples are fewer than the {len(corpora)} corpora of {section.corpus}")
    drawn = []
    for index, name in enumerate(corpora):
        text = read_text(name, split=section.split, data=data, column=section.column)
        share = section.samples // len(corpora) + (index < section.samples % len(corpora))
        drawn.append(sample(text, tokenizer, samples=share, length=section.length, seed=section.seed))
    return functools.reduce(Tokens.__add__, drawn)


def resolve(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """The recipe with the defaults that depend on the model filled in: calibration length and cut.

    A model that does not generate and whose tokenizer has a mask token is an encoder, and reads whole documents.
    """
    section = recipe.calibration
    decoder = model.can_generate() or tokenizer.mask_token_id is None
    return recipe.model_copy(
        update={
            "calibration": section.model_copy(
                update={
                    "length": section.length or default_length(model, recipe.context),
                    "cut": section.cut or ("windows" if decoder else "documents"),
                }
            )
        }
    )
