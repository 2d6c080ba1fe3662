"""What a recipe leaves open until its model is known: its defaults, and the calibration text that they draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.encoding import check_vocabulary, warn_of_tokenizer
from eckart.data.pairs import check_reads_text, is_encoder_decoder
from eckart.data.samples import Cutting, read_tokens
from eckart.data.sounds import sample_sounds
from eckart.data.tokens import Tokens
from eckart.evals.texts import default_length
from eckart.models.loading import load_extractor
from eckart.runs.recipe import Recipe
from eckart.runs.sections import CalibrationSection
from eckart.runs.speed_tables import default_rows


def make_tokens(
    recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Path | None
) -> Tokens:
    """The calibration tokens of a recipe: see `read_tokens`."""
    section = resolve(recipe, model, tokenizer).calibration
    return draw_tokens(section, model, tokenizer, data)


def draw_tokens(
    section: CalibrationSection, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, data: Path | None
) -> Tokens:
    """The tokens of a section with every default filled in, which the model can read: see `read_tokens`."""
    assert section.length is not None
    assert section.cut is not None
    warn_of_tokenizer(model, tokenizer)
    how: dict[str, Any] = {
        "samples": section.samples,
        "length": section.length,
        "seed": section.seed,
        "split": section.split,
        "data": data,
        "column": section.column,
        "target": section.target,
    }
    if section.target is None or model.main_input_name == "input_ids":
        check_reads_text(model)
        tokens = read_tokens(section.corpus, tokenizer, cut=section.cut, **how)
    else:
        tokens = sample_sounds(section.corpus, model, load_extractor(model), tokenizer, **how)
    check_vocabulary(model, tokens.ids, tokenizer)
    return tokens


def resolve(recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Recipe:
    """The recipe with every default filled in: the parts of a named composition, calibration length and cut."""
    recipe = recipe.spelled_out()
    calibration = resolve_calibration(recipe.calibration, model, tokenizer, recipe.context)
    speed = recipe.speed
    if speed is not None and speed.rows is None:
        speed = speed.model_copy(update={"rows": default_rows(model)})
    return recipe.model_copy(update={"speed": speed, "calibration": calibration})


def resolve_calibration(
    section: CalibrationSection,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None = None,
) -> CalibrationSection:
    """The section with length and cut filled in.

    A model that does not generate and whose tokenizer has a mask token is an encoder, and reads whole documents. An
    encoder-decoder reads pairs of source and target.

    Raises:
        ValueError: a cut into pairs for a model of one text, or the other way round; a target for one.
    """
    paired = is_encoder_decoder(model)
    own: Cutting = "windows" if model.can_generate() or tokenizer.mask_token_id is None else "documents"
    if paired:
        own = "halves" if section.target is None else "pairs"
    cut = section.cut or own
    if paired != (cut in ("halves", "pairs")):
        reads = "pairs of source and target" if paired else "one text"
        raise ValueError(f"calibration: {type(model).__name__} reads {reads}, and not {cut}: leave out cut")
    if section.target is not None and not paired:
        raise ValueError(f"calibration: {type(model).__name__} reads one text: leave out target")
    return section.model_copy(update={"length": section.length or default_length(model, context), "cut": cut})
