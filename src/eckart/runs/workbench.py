"""Workbench: a recipe at work on its model: the calibration text, the ranks, the moments, each when it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.allocation import Ranking, RankPlan, Rule, plan
from eckart.calibration.moments import BlockCalibration, recorded_gradients
from eckart.calibration.sequential import PassReport, SequentialCalibration
from eckart.compression.tuning.recovery import Samples
from eckart.data.corpora import parts_of, read_text
from eckart.data.tokens import Tokens, sample_documents, sample_windows
from eckart.evals.tasks import default_length
from eckart.lowrank import GradientMoments
from eckart.lowrank.moments import GRADIENT_STATISTICS
from eckart.models.loading import load_model, locate
from eckart.models.sites import Site, find_sites, select_sites
from eckart.runs.card import write_card
from eckart.runs.engine.base import CalibrationRequest
from eckart.runs.facts import FACTS, Facts
from eckart.runs.how import How
from eckart.runs.ranks import Bench, joint_groups, rank
from eckart.runs.recipe import Recipe

# Samples in a step of block refinement. It changes numbers, so it is not the batch size that a run is given.
REFINED_TOGETHER = 8


class Workbench:
    """A recipe at work on its model, in memory or out of core.

    Attributes:
        recipe: with its defaults filled in.
    """

    def __init__(self, recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, how: How) -> None:
        self.recipe = resolve(recipe, model, tokenizer)
        self.model, self.tokenizer, self.how = model, tokenizer, how
        self.composition = recipe.composition

    def check(self) -> None:
        """Raises ValueError for what does not fit, before anything is computed."""
        _ = self.recovery_samples

    @property
    def noted(self) -> dict[str, Any]:
        """The recipe as a checkpoint's configuration holds it."""
        return self.recipe.model_dump(exclude_none=True, exclude={"evaluate"})

    def side_files(self, plan: RankPlan, facts: Facts) -> dict[str, str]:
        """{name: text} of what stands beside the weights of a compressed model."""
        return {
            "README.md": write_card(self.recipe, facts),
            "plan.json": plan.to_json(),
            "recipe.yaml": self.recipe.to_yaml(),
            FACTS: facts.to_json(),
        }

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """The linears that the budget is shared among."""
        chosen = self.recipe.sites
        return select_sites(
            find_sites(self.model), include=chosen.include, exclude=chosen.exclude, blocks=chosen.blocks
        )

    @functools.cached_property
    def tokens(self) -> tuple[Tokens, Tokens | None]:
        """The calibration samples, and those held out where something has to prove itself on them."""
        tokens = make_tokens(self.recipe, self.model, self.tokenizer, self.how.data)
        if not self.composition.holds_out:
            return tokens, None
        return tokens.hold_out(self.recipe.calibration.aside)

    @functools.cached_property
    def gradients(self) -> dict[str, GradientMoments]:
        """Of the chosen sites, where the method needs them: gathered, or recorded while the model was fine-tuned."""
        if not self.composition.method.needs_gradients:
            return {}
        if self.recipe.calibration.fisher == "recorded":
            return recorded_gradients(locate(self.recipe.model), self.sites)
        return self.how.engine.gather_gradients(self._calibration_request(self.sites))

    @property
    def reads_text(self) -> bool:
        """Whether the method's statistics of the dense model are taken from the calibration text."""
        recorded = GRADIENT_STATISTICS if self.recipe.calibration.fisher == "recorded" else frozenset()
        return bool(self.composition.method.needs - recorded)

    def rank(self) -> Ranking:
        """The recipe's ranks on this model."""
        recipe, composition = self.recipe, self.composition
        if recipe.plan is not None or recipe.rules is not None:
            return Ranking(make_plan(self.model, recipe))
        row = composition.allocation.row
        if row.same_share and recipe.keep is not None:
            return Ranking(make_plan(self.model, recipe))
        return rank(composition, recipe.budget, self.bench(), rank_multiple=recipe.rank_multiple)

    def bench(self) -> Bench:
        """What the recipe's allocation works with."""
        recipe, composition = self.recipe, self.composition
        needs = composition.method.needs if composition.allocation.row.needs != "sites" else frozenset()
        probes = composition.allocation.weights == "probes"
        journals = None if self.how.cache is None else self.how.cache / "searches"
        if journals is not None and recipe.calibration.fisher == "recorded":
            journals /= "recorded"  # their identity is of the model and the text, and here other sums go with these
        return Bench(
            self.model,
            self.sites,
            blocks=self._one_shot if needs else None,
            tokens=self.tokens[0] if (needs and self.reads_text) or probes else None,
            tokenizer=self.tokenizer,
            data=self.how.data,
            batch_size=self.how.batch_size,
            workers=self.how.workers,
            context=recipe.context,
            engine=self.how.engine,
            journals=journals,
            track=self.how.track,
        )

    def calibration(self, plan: RankPlan) -> Iterable[BlockCalibration] | None:
        """What `compress` needs for the plan, in the composition's order."""
        composition, sites = self.composition, [site for site in plan.sites if plan.rank(site) is not None]
        if not sites:
            return ()
        if composition.order == "one-shot" and not composition.holds_out:
            # Where losses chose the ranks, the moments of all chosen sites are in the cache; else only these are made.
            measured = self.recipe.budget is not None and composition.allocation.row.needs != "sites"
            return self._one_shot(None if measured else sites) if composition.method.needs else None
        tokens, held_out = self.tokens
        return SequentialCalibration(
            self.model,
            tokens,
            composition.in_order,
            order=composition.order,
            held_out=held_out,
            sites=sites,
            gradients=self.gradients,
            passes=() if composition.refinement is None else (composition.refinement,),
            batch_size=self.how.batch_size if composition.refinement is None else REFINED_TOGETHER,
            track=self.how.track,
        )

    def distil(self) -> list[PassReport]:
        """What became of the composition's distillation, once the model is compressed; nothing where it has none."""
        distillation = self.composition.distillation
        if distillation is None:
            return []
        tokens, held_out = self.tokens
        assert held_out is not None
        dense = load_model(self.recipe.model, dtype=self.recipe.dtype, device=self.how.device)
        report = distillation(self.model, dense, tokens, held_out, self.how.track)
        return [] if report is None else [report]

    @functools.cached_property
    def recovery_samples(self) -> Samples | None:
        """What the compressed model is fine-tuned on; None where it is not."""
        recovery = self.composition.recovery
        if recovery is None:
            return None
        return recovery.read_samples(self.model, self.tokenizer, lambda: self.tokens[0], self.how.data)

    def recover(self) -> list[PassReport]:
        """What became of the composition's recovery, the last that is done to the model; nothing where it has none."""
        if self.composition.recovery is None or self.recovery_samples is None:
            return []
        return [self.composition.recovery(self.model, self.recovery_samples, self.how.track)]

    def _one_shot(self, sites: Sequence[Site] | None = None) -> Iterator[BlockCalibration]:
        """The dense model's moments of these sites; default the chosen ones."""
        sites = self.sites if sites is None else sites
        if not self.reads_text:
            for number in sorted({site.block for site in sites}):
                names = [site.name for site in sites if site.block == number]
                yield BlockCalibration(number, gradients={name: self.gradients[name] for name in names})
            return
        request = replace(self._calibration_request(sites), gradients=self.gradients)
        yield from self.how.engine.calibrate_by_block(request)

    def _calibration_request(self, sites: Sequence[Site]) -> CalibrationRequest:
        """The dense model, to be read for these sites."""
        return CalibrationRequest(
            self.model,
            self.tokens[0],
            self.composition.method,
            sites=sites,
            cache=self.how.cache,
            batch_size=self.how.batch_size,
            track=self.how.track,
        )


def make_plan(model: PreTrainedModel, recipe: Recipe) -> RankPlan:
    """The ranks that a recipe says outright: its plan, its rules, or the same share everywhere."""
    if recipe.plan is not None:
        path = Path(recipe.plan)
        if not path.is_file():
            raise ValueError(f"no plan at {path}")
        return RankPlan.from_json(path.read_text(encoding="utf-8"), find_sites(model))
    composition, chosen = recipe.composition, recipe.sites
    shared: dict[str, Any] = {"rank_multiple": recipe.rank_multiple, "layout": composition.layout}
    if composition.joint:
        sites = find_sites(model)
        narrowed = select_sites(sites, include=chosen.include, exclude=chosen.exclude, blocks=chosen.blocks)
        shared["joint"] = joint_groups(narrowed, sites)
    if recipe.rules is not None:
        rules = [Rule(r.keep, tuple(r.include), tuple(r.exclude), r.blocks) for r in recipe.rules]
        return plan(model, rules=rules, **shared)
    return plan(model, recipe.keep, include=chosen.include, exclude=chosen.exclude, blocks=chosen.blocks, **shared)


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
    """The recipe with every default filled in: what a composition's name stands for, calibration length and cut.

    A model that does not generate and whose tokenizer has a mask token is an encoder, and reads whole documents.
    """
    recipe = recipe.spelled_out()
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
