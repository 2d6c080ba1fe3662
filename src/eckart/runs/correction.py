"""Correction: a quantised model and its reference in, an adapter directory out."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, field_validator, model_validator
from transformers import PreTrainedModel

from eckart.compression.correction import Correction, CorrectionOrder, Ranks, correct, correction_method
from eckart.data.encoding import check_vocabulary
from eckart.data.mixtures import parts_of, spell_out
from eckart.data.tokens import Tokens
from eckart.lowrank import Method
from eckart.models.adapters import WEIGHTS, import_peft, write_lora
from eckart.models.loading import load_model, load_tokenizer, locate
from eckart.models.quantised import Quantised, load_quantised
from eckart.models.sites import find_sites, select_sites
from eckart.runs.calibration_text import draw_tokens, resolve_calibration
from eckart.runs.card import calibration_lines
from eckart.runs.how import How
from eckart.runs.recipe import parse_section
from eckart.runs.sections import CalibrationSection, SitesSection, named_text
from eckart.support.files import check_replaceable, claimed, staged_directory, write_whole
from eckart.support.section import Section

# In an adapter's directory: how it was made.
FACTS = "eckart.json"
DTYPES = {"auto": None, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Linears that are named with the largest error.
WORST = 5


class CorrectionRecipe(Section):
    """A correction as plain data."""

    quantised: str = Field(description="a torchao or compressed-tensors checkpoint, or a quantised GGUF file")
    model: str = Field(description="the reference: the dense model that it was quantised from")
    rank: int = Field(32, ge=1, description="of every linear; with allocation global what the budget is made of")
    method: str = Field("asvd-i", description="of the catalogue, without a bias")
    options: dict[str, Any] = Field(default_factory=dict, description="settings of the method")
    order: CorrectionOrder = Field("anchored", description="one-shot or anchored")
    allocation: Ranks = Field("uniform", description="uniform, or global: ranks by a knapsack over all linears")
    dtype: str = Field("auto", description="of the adapter: " + ", ".join(DTYPES))
    sites: SitesSection = Field(default_factory=SitesSection, description="which linears are corrected")
    calibration: CalibrationSection = Field(default_factory=CalibrationSection, description="the text")

    @model_validator(mode="before")
    @classmethod
    def _text_by_name(cls, data: Any) -> Any:
        return {**data, "calibration": named_text(data.get("calibration"), data.get("model"))}

    @field_validator("dtype")
    @classmethod
    def _known_type(cls, value: str) -> str:
        if value not in DTYPES:
            raise ValueError(f"{value!r} is none of {', '.join(DTYPES)}")
        return value

    @model_validator(mode="after")
    def _known_method(self) -> CorrectionRecipe:
        self.build_method()
        return self

    def build_method(self) -> Method:
        """The method with its settings."""
        return correction_method(self.method, self.options)

    @property
    def reads(self) -> list[str]:
        """What may be a place on this machine that is read."""
        return [str(locate(self.quantised)), str(locate(self.model)), *parts_of(self.calibration.corpus)]


@dataclass(frozen=True)
class CorrectionOutcome:
    """What `make_correction` wrote.

    Attributes:
        kind: how the model is quantised, in words. file_bytes: of the adapter's weights file.
    """

    recipe: CorrectionRecipe
    correction: Correction
    kind: str
    file_bytes: int
    parts: list[dict[str, Any]]
    seconds: float

    def to_json(self) -> str:
        """eckart.json."""
        recipe = self.recipe.model_dump(exclude_none=True, exclude={"calibration": {"aside", "fisher"}})
        facts = {"quantised_by": self.kind, "file_bytes": self.file_bytes, "seconds": round(self.seconds, 2)}
        made = {"recipe": recipe, **facts, "calibration": self.parts, **self.correction.to_dict()}
        return json.dumps(made, indent=1)

    @property
    def worst(self) -> list[Any]:
        """The corrections with the largest relative errors, largest first."""
        return sorted(self.correction.sites, key=lambda each: -each.after)[:WORST]


def parse_correction(data: dict[str, Any], *, where: str = "recipe") -> CorrectionRecipe:
    """The recipe in plain data. Raises ValueError: one line with all that does not fit."""
    return parse_section(CorrectionRecipe, data, where)


def make_correction(recipe: CorrectionRecipe, out: Path, how: How, *, force: bool = False) -> CorrectionOutcome:
    """Correct the recipe's quantised model, and write the correction as PEFT's LoRA adapter into the directory `out`.

    The directory holds adapter_config.json and adapter_model.safetensors, the card README.md, and eckart.json. It
    appears whole or not at all. The quantised model is read and not written.

    Raises:
        FileExistsError: `out` exists and `force` is not given; nothing is read or computed then.
        ValueError: PEFT is not installed, or another run is making `out`; nothing is read then.
        ValueError, UnsupportedModelError, DecompositionError: as `load_quantised`, `load_model` and `correct`.
    """
    import_peft()
    with claimed(out):
        check_replaceable(out, force=force, reads=recipe.reads)
        for model in (recipe.quantised, recipe.model):
            folder = Path(locate(model))
            if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
                raise ValueError(f"{out} lies inside {model}, which is read and stays as it is: give another place")
        start = time.perf_counter()
        quantised = load_quantised(recipe.quantised, device=how.device, trust_remote_code=how.trust_remote_code)
        reference = load_model(recipe.model, device=how.device, dense=True, trust_remote_code=how.trust_remote_code)
        chosen = recipe.sites
        sites = select_sites(
            find_sites(reference), include=chosen.include, exclude=chosen.exclude, blocks=chosen.blocks
        )
        method = recipe.build_method()
        tokens = _tokens(recipe, quantised, reference, how) if method.needs else None
        correction = correct(
            quantised.model,
            reference,
            tokens,
            rank=recipe.rank,
            method=method,
            order=recipe.order,
            allocation=recipe.allocation,
            sites=sites,
            dtype=DTYPES[recipe.dtype],
            cache=how.cache,
            batch_size=how.batch_size,
            track=how.track,
        )
        with staged_directory(out, force=force) as staging:
            write_lora(staging, reference, correction.factors, _place(recipe.quantised))
            outcome = CorrectionOutcome(
                recipe,
                correction,
                quantised.kind,
                (staging / WEIGHTS).stat().st_size,
                [] if tokens is None else tokens.parts,
                time.perf_counter() - start,
            )
            write_whole(staging / FACTS, outcome.to_json())
            write_whole(staging / "README.md", write_correction_card(outcome))
        return outcome


def _tokens(recipe: CorrectionRecipe, quantised: Quantised, reference: PreTrainedModel, how: How) -> Tokens:
    tokenizer = load_tokenizer(recipe.model, trust_remote_code=how.trust_remote_code)
    section = recipe.calibration.model_copy(update={"corpus": spell_out(recipe.calibration.corpus)})
    tokens = draw_tokens(resolve_calibration(section, reference, tokenizer), reference, tokenizer, how.data)
    check_vocabulary(quantised.model, tokens.ids, tokenizer)
    return tokens


def _place(model: str) -> str:
    """A model as an adapter names its base: of a directory or file on this machine the whole path."""
    path = Path(locate(model))
    return str(path.resolve()) if path.exists() else model


def write_correction_card(outcome: CorrectionOutcome) -> str:
    """README.md of an adapter directory, with the front matter that the hub reads."""
    recipe, correction = outcome.recipe, outcome.correction
    method, (before, after) = correction.method, correction.errors
    shared = "the same for every linear" if correction.allocation == "uniform" else "shared out by a knapsack"
    measured = "at the linears' outputs on the calibration tokens" if outcome.parts else "of the weights"
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {recipe.quantised}",
        "tags: [eckart, low-rank, lora, quantised]",
        "---",
        "",
        f"# Correction of {recipe.quantised}",
        "",
        f"A LoRA adapter of scaling 1 for {recipe.quantised} ({outcome.kind}).",
        f"Its low-rank terms bring each quantised linear nearer to that of {recipe.model}.",
        f"Made by eckart with **{method.name}** ({method.paper}; {method.equation}).",
        f"Rank {recipe.rank}, {shared}. Order: {correction.order}.",
        "",
        "```python",
        "from peft import PeftModel",
        'model = PeftModel.from_pretrained(quantised_model, "path/to/this")',
        "```",
        "",
        f"It stores {correction.num_params:,} numbers in {outcome.file_bytes:,} bytes, {correction.bits_a_weight:.3f} "
        f"bits for each weight of the {len(correction.sites)} corrected linears.",
        f"Mean relative squared error {measured}: {before:.4g} before, {after:.4g} after. {FACTS} has each linear's.",
        "",
        "| with the largest error | rank | before | after |",
        "|---|---|---|---|",
        *(f"| {each.name} | {each.rank} | {each.before:.4g} | {each.after:.4g} |" for each in outcome.worst),
        "",
        *calibration_lines(outcome.parts),
    ]
    return "\n".join(lines)
