"""Calibration errors: what distances are measured from, on text like a checkpoint's calibration text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.tokens import Tokens
from eckart.evals.distance import LinearErrors, read_errors
from eckart.models.experts import expert_of
from eckart.models.sites import low_rank_modules
from eckart.runs.calibration_text import make_tokens
from eckart.runs.facts import FACTS, Facts
from eckart.runs.recipe import Recipe, load_recipe
from eckart.support.progress import Track, silent

# Samples that errors are read on at most. The 32 of broad are shared out exactly among its parts.
READ = 32


def calibration_errors(
    checkpoint: Path,
    model: PreTrainedModel,
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text: str | None = None,
    tokens: Tokens | None = None,
    length: int | None = None,
    limit: int | None = None,
    data: Path | None = None,
    track: Track = silent,
) -> LinearErrors:
    """The errors of a checkpoint's low-rank linears on text like the one that it was calibrated on.

    Args:
        checkpoint: the directory of `model`.
        reference: the dense model that it came from.
        text: what it was calibrated on, in place of what its recipe names, as another copy of it; the recipe says
            which samples the model was fit to, and others are read.
        tokens: of that text, read where no recipe says that the model was fit to any.
        length, limit: of the windows of text that are compared with it.

    Raises:
        ValueError: no low-rank linear, no calibration text or none that can be had, and what `read_errors` raises.
    """
    linears = list(low_rank_modules(model))
    if not linears:
        raise ValueError(
            f"{checkpoint} has no low-rank linear, so none was fit to a calibration text: distance is of models that "
            "eckart compressed by low rank"
        )
    linears = [name for name in linears if expert_of(name) is None]
    if not linears:
        raise ValueError(
            f"{checkpoint} has low-rank linears in experts alone, which read some of a text's tokens: distance is of "
            "linears that read them all; divergence compares such models"
        )
    if low_rank_modules(reference):
        raise ValueError(
            "distance: the reference has low-rank linears itself: give the dense model that this one came from "
            "(--reference)"
        )
    try:
        recipe = recorded_recipe(checkpoint)
    except ValueError:
        if tokens is None:
            raise
        tokens = shortened(tokens, length, limit)
    else:
        if text is not None:
            calibration = recipe.calibration.model_copy(update={"corpus": text})
            recipe = recipe.model_copy(update={"calibration": calibration})
        tokens = comparable_tokens(recipe, model, tokenizer, data, length=length, limit=limit)
    return read_errors(model, reference, tokens, linears, track=track)


def recorded_recipe(checkpoint: Path) -> Recipe:
    """The recipe that a checkpoint was made by, which names its calibration text.

    Raises:
        ValueError: there is none, or its method read no text.
    """
    file = checkpoint / "recipe.yaml"
    if not file.is_file():
        raise ValueError(
            f"{checkpoint} has no {file.name}, which says what a model was calibrated on: name the text with "
            "--calibration"
        )
    recipe = load_recipe(file)
    read = (checkpoint / FACTS).is_file() and Facts.read(checkpoint).calibration
    if not read and not recipe.is_baseline and not recipe.composition.method.needs:
        raise ValueError(
            f"{checkpoint} was calibrated on no text, for {recipe.method.name} reads none, so that no text is far from "
            "it; to compare with a text nevertheless, name it with --calibration"
        )
    return recipe


def comparable_tokens(
    recipe: Recipe,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Path | None,
    *,
    length: int | None = None,
    limit: int | None = None,
) -> Tokens:
    """At most READ samples of the calibration text that the model was not fit to, drawn as those that it was fit to.

    On samples that it was fit to, its errors are smaller than on any other text, the more so the fewer they were. Where
    the text, or a part of a mixture, has no other samples, they are the calibration's own. `source["part"]` says which:
    "unseen" or "used".

    Args:
        length: of the windows of text that are compared with them; longer samples are cut, for a model errs otherwise
            at the beginning of a window.
        limit: of those windows; no more samples are read, but those of one for each part of a mixture.

    Raises:
        ValueError: the text cannot be had; the message names it.
    """
    section = recipe.calibration
    again = recipe.model_copy(update={"calibration": section.model_copy(update={"seed": section.seed + 1})})
    try:
        used, others = (make_tokens(each, model, tokenizer, data) for each in (recipe, again))
    except (ValueError, OSError) as error:
        raise ValueError(
            f"distance is from the calibration text, {section.corpus}, and that cannot be had: {error}. Give --data, "
            "or name another copy of it with --calibration"
        ) from error
    known = {ids[mask].numpy().tobytes() for ids, mask in zip(used.ids, used.mask, strict=True)}
    is_new = [ids[mask].numpy().tobytes() not in known for ids, mask in zip(others.ids, others.mask, strict=True)]
    unseen = others.take(torch.tensor(is_new))
    whole = all(part["samples"] for part in unseen.parts)
    tokens, part = (unseen, "unseen") if whole else (used, "used")
    return shortened(replace(tokens, source={**tokens.source, "part": part}), length, limit)


def shortened(tokens: Tokens, length: int | None, limit: int | None) -> Tokens:
    """At most READ samples, cut at `length`; see `comparable_tokens`. `source["read"]` is how many, and how long."""
    few = tokens.take(slice(READ if limit is None else min(READ, max(limit, len(tokens.parts)))))
    if length is not None and few.sound is None:
        few = few.shortened(length)
    return replace(few, source={**few.source, "read": [len(few), few.ids.shape[1]]})
