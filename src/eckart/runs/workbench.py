"""Workbench: what a recipe needs of its model (calibration text, ranks, moments), each computed when asked for."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.allocation import Ranking, RankPlan, Rule, Speed, SpeedTable, plan
from eckart.allocation.cache import CacheBudget, cache_facts, head_sites
from eckart.allocation.rank_plan import in_bits, settle
from eckart.calibration.moments import (
    BlockCalibration,
    Memory,
    calibration_digest,
    kept_inputs,
    recorded_gradients,
)
from eckart.calibration.sequential import KnownInputs, PassReport, SequentialCalibration
from eckart.compression.tuning.lora import Lora
from eckart.compression.tuning.recovery import Samples
from eckart.data.tokens import Tokens
from eckart.lowrank import GradientMoments
from eckart.lowrank.moments import GRADIENT_STATISTICS
from eckart.models.adapters import import_peft
from eckart.models.loading import load_model, locate, read_processor
from eckart.models.remote_code import carry_code
from eckart.models.sites import Site, find_sites, select_sites
from eckart.runs.added_bias import settle_bias
from eckart.runs.calibration_text import make_tokens, resolve
from eckart.runs.card import write_card
from eckart.runs.engine.base import CalibrationRequest
from eckart.runs.engine.local import Here
from eckart.runs.facts import FACTS, Facts
from eckart.runs.how import How
from eckart.runs.notices import notices
from eckart.runs.ranks import AllocationInputs, joint_groups, rank
from eckart.runs.recipe import Recipe
from eckart.runs.sections import default_text
from eckart.runs.speed_tables import speeds_of
from eckart.support.files import GRADIENTS, digest_of

# Samples in a step of block refinement. It changes numbers, so it is not the batch size that a run is given.
REFINED_TOGETHER = 8


class Workbench:
    """A recipe and its model, in memory or out of core.

    Attributes:
        recipe: with its defaults filled in, and its composition's bias settled by the model.
        composition: of that recipe.
        no_bias: why the composition adds no bias, see `settle_bias`; None where that was not ours to settle.
    """

    def __init__(self, recipe: Recipe, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, how: How) -> None:
        recipe, self.no_bias = settle_bias(recipe, model, planned_sites(model, recipe))
        self._text = recipe.calibration.corpus  # as it was written: `resolve` spells a named mixture out
        self.recipe = resolve(recipe, model, tokenizer)
        self.model, self.tokenizer, self.how = model, tokenizer, how
        self.composition = recipe.composition
        # Of the dense model's inputs, where they came with the gradients and no cache has them: see `_one_shot`.
        self._memory: Memory = {}
        # Of a recovery, where it is not merged: around the factors of the model until that is saved.
        self.adapter: Lora | None = None

    def check(self) -> None:
        """Raises ValueError where the recovery's data or the code to carry do not fit, before anything is computed.

        Or where a recovery by an adapter has no PEFT.
        """
        if self.recipe.opens_heads and not isinstance(self.how.engine, Here):
            raise ValueError("keep_cache is for this process: leave out --engine")
        _ = self.recovery_samples
        if self.composition.recovery is not None and self.composition.recovery.adapter is not None:
            import_peft()
        if self.how.remote_code:
            carry_code(self.model)

    def announce(self) -> None:
        """Say what to know before anything is computed."""
        for line in notices(self.model, self.sites, self.composition):
            self.how.say(line)
        if self.no_bias is not None:
            self.how.say(self.no_bias)
        if self._text != default_text(self.recipe.model) and not self.draws_text:
            self.how.say(f"{self.composition.method.name} reads no calibration text here: {self._text} is not used")
        if self.recipe.calibration.cut == "halves" and self.draws_text:
            kind, length = type(self.model).__name__, self.recipe.calibration.length
            self.how.say(
                f"{kind} is an encoder-decoder: of each {length} tokens of the calibration text the first half is the "
                "source and the second the target; for pairs of your own name the fields that hold them, column and "
                "target"
            )

    @property
    def noted(self) -> dict[str, Any]:
        """The recipe as a checkpoint's configuration holds it."""
        return self.recipe.model_dump(exclude_none=True, exclude={"evaluate"})

    def side_files(self, plan: RankPlan, facts: Facts, measured: Mapping[str, Any]) -> dict[str, str]:
        """{file name: text} of the files that accompany the weights of a compressed model.

        Code to carry is named in the model's configuration, in place, so that this comes before that is written.

        Args:
            measured: facts that were measured for the plan.
        """
        return {
            **(carry_code(self.model) if self.how.remote_code else {}),
            **({"allocation.json": json.dumps(measured, indent=1)} if measured else {}),
            "README.md": write_card(
                self.recipe, facts, architecture=type(self.model).__name__, remote_code=self.how.remote_code
            ),
            "plan.json": plan.to_json(),
            "recipe.yaml": self.recipe.to_yaml(),
            FACTS: facts.to_json(),
            **read_processor(self.model),
        }

    @functools.cached_property
    def sites(self) -> tuple[Site, ...]:
        """The linears that the budget is shared among."""
        return selected_sites(self.model, self.recipe)

    @functools.cached_property
    def tokens(self) -> tuple[Tokens, Tokens | None]:
        """(calibration samples, held-out ones); None where no part of the composition is judged on held-out samples."""
        tokens = self._all_tokens
        if not self.composition.holds_out:
            return tokens, None
        return tokens.hold_out(self.recipe.calibration.aside)

    @functools.cached_property
    def _all_tokens(self) -> Tokens:
        return make_tokens(self.recipe, self.model, self.tokenizer, self.how.data)

    @property
    def parts(self) -> list[dict[str, Any]]:
        """The texts that it was calibrated on, as `Tokens.parts` has them; nothing where no text was read."""
        return self._all_tokens.parts if "_all_tokens" in vars(self) else []

    @functools.cached_property
    def recording(self) -> str | None:
        """The digest of the Fisher sums that were recorded while the model was fine-tuned; None where none are read."""
        if self.recipe.calibration.fisher != "recorded" or not self.composition.method.needs_gradients:
            return None
        path = Path(locate(self.recipe.model)) / GRADIENTS
        return digest_of(path) if path.is_file() else None  # who reads them says that there are none

    @functools.cached_property
    def gradients(self) -> dict[str, GradientMoments]:
        """{site name: gradient statistics} of the selected sites: gathered, or recorded while the model was fine-tuned.

        Empty where the method needs none.
        """
        if not self.composition.method.needs_gradients:
            return {}
        if self.recipe.calibration.fisher == "recorded":
            return recorded_gradients(locate(self.recipe.model), self.sites)
        request = self._calibration_request(self.sites)
        if not self._reads_one_shot:
            request = replace(request, memory=None)
        return self.how.engine.gather_gradients(request)

    @property
    def _reads_one_shot(self) -> bool:
        """Whether the moments of the dense model's inputs are used: for the ranks, or for the cuts."""
        return self._measures or self.composition.order == "one-shot"

    @property
    def _measures(self) -> bool:
        """Whether the ranks depend on moments."""
        shares = self.recipe.budget is not None or self.recipe.keep_cache is not None
        return shares and self.composition.allocation.row.needs != "sites"

    @property
    def reads_text(self) -> bool:
        """Whether any of the method's statistics of the dense model come from the calibration text."""
        recorded = GRADIENT_STATISTICS if self.recipe.calibration.fisher == "recorded" else frozenset()
        return bool(self.composition.method.needs - recorded)

    @property
    def draws_text(self) -> bool:
        """Whether the calibration text is read: for statistics, ranks, held-out samples, or by a recovery (`check`)."""
        probed = self.composition.allocation.weights == "probes"
        return self.reads_text or self.walks or probed or "_all_tokens" in vars(self)

    @property
    def measures_losses(self) -> bool:
        """Whether the ranks come from what each linear loses at every rank."""
        by_rules = self.recipe.rules is not None and self.recipe.keep_cache is None
        return self.recipe.plan is None and not by_rules and self.composition.allocation.row.needs == "losses"

    def rank(self, inputs: AllocationInputs | None = None) -> Ranking:
        """The recipe's ranks on this model, and the bits that its numbers are kept in.

        Args:
            inputs: of the allocation; default `allocation_inputs`.
        """
        recipe = self.recipe
        if not recipe.opens_heads:
            return self._rank_weights(inputs)
        ranking = self._rank_weights(inputs) if recipe.keep_cache is None else self._rank_apart(inputs)
        return replace(ranking, facts={**ranking.facts, "cache": cache_facts(self.model, ranking.plan)})

    def _rank_apart(self, inputs: AllocationInputs | None) -> Ranking:
        """The ranks of keys and values by the budget of the cache, and those of the other linears by theirs.

        Raises:
            ValueError: no key or value is selected.
        """
        recipe, heads = self.recipe, head_sites(self.model, self.sites)
        if not heads:
            raise ValueError("keep_cache: sites selects no k_proj and no v_proj, which a cache holds the outputs of")
        assert recipe.keep_cache is not None
        inputs = inputs or self.allocation_inputs()
        cache = rank(
            self.composition,
            CacheBudget(recipe.keep_cache),
            replace(inputs, sites=heads),
            rank_multiple=recipe.rank_multiple,
        )
        others = tuple(site for site in self.sites if site not in heads)
        facts, ranks = cache.facts, dict(cache.plan.ranks)
        if others and not recipe.only_cache:
            weights = self._rank_weights(replace(inputs, sites=others))
            names = {site.name for site in heads}
            ranks |= {name: each for name, each in weights.plan.ranks.items() if name not in names}
            facts = {**facts, **weights.facts}
        return Ranking(settle(find_sites(self.model), ranks, layout=self.composition.layout), facts)

    def _rank_weights(self, inputs: AllocationInputs | None) -> Ranking:
        """The ranks by the budget of the weights."""
        recipe, composition = self.recipe, self.composition
        same_share = composition.allocation.row.same_share and recipe.keep is not None
        if recipe.plan is not None:
            return Ranking(make_plan(self.model, recipe))
        if recipe.rules is not None or same_share:
            return self._in_bits(Ranking(make_plan(self.model, recipe)))
        inputs = inputs or self.allocation_inputs()
        ranking = rank(composition, recipe.budget, inputs, rank_multiple=recipe.rank_multiple)
        if self.speeds is None or not isinstance(recipe.budget, Speed):
            return self._in_bits(ranking)
        facts = self.speeds.facts(recipe.budget, ranking.plan, self.sites)
        return replace(ranking, facts={**ranking.facts, "speed": facts})

    def _in_bits(self, ranking: Ranking) -> Ranking:
        """The same with numbers in the recipe's bits, where it names some and a budget of bytes has not chosen them."""
        bits, group = self.composition.bits, self.composition.group
        if bits is None or bits == "auto" or ranking.plan.stored:
            return ranking
        return replace(ranking, plan=in_bits(ranking.plan, bits, group))

    @functools.cached_property
    def speeds(self) -> SpeedTable | None:
        """What each rank takes on this machine, measured or kept from an earlier run; None for other budgets."""
        recipe, composition = self.recipe, self.composition
        if recipe.speed is None:
            return None
        assert recipe.speed.rows is not None
        return speeds_of(
            self.model,
            self.sites,
            self.how,
            rows=recipe.speed.rows,
            layout=composition.layout,
            joint=joint_groups(self.sites, find_sites(self.model)) if composition.joint else (),
            bias=composition.method.centred,
            rank_multiple=recipe.rank_multiple,
        )

    def allocation_inputs(self) -> AllocationInputs:
        """The inputs of the recipe's allocation."""
        recipe, composition = self.recipe, self.composition
        needs = composition.method.needs if composition.allocation.row.needs != "sites" else frozenset()
        probes = composition.allocation.weights == "probes"
        journals = None if self.how.cache is None else self.how.cache / "searches"
        if journals is not None and self.recording is not None:
            journals /= self.recording  # a journal's identity has model and text, and would not tell these sums apart
        return AllocationInputs(
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
            speeds=self.speeds,
            track=self.how.track,
        )

    def calibration(self, plan: RankPlan) -> Iterable[BlockCalibration] | None:
        """The calibration that `compress` needs for the plan, in the composition's order; None where it needs none."""
        composition, sites = self.composition, plan.changed
        if not sites:
            return ()
        if not self.walks:
            # Where losses decided the ranks, the moments of all selected sites are in the cache; else only the cut
            # sites' are computed.
            return self._one_shot(None if self._measures else sites) if composition.method.needs else None
        return self.walk(plan, self.gradients, self._known())

    def _known(self) -> KnownInputs | None:
        """The dense model's moments, by block, where ranks or gradients have needed them; None in another order."""
        if self.composition.order != "anchored":
            return None
        if self._memory or self.how.cache is None:
            return lambda number: self._memory.pop(number, {})
        method, cache = self.composition.method, self.how.cache
        return kept_inputs(self.model, self.tokens[0], method, self.sites, cache, self.gradients)

    def walk(
        self, plan: RankPlan, gradients: dict[str, GradientMoments], known: KnownInputs | None = None
    ) -> SequentialCalibration:
        """The calibration that a plan needs block by block, in the composition's order; `known`: see there."""
        composition, (tokens, held_out) = self.composition, self.tokens
        return SequentialCalibration(
            self.model,
            tokens,
            composition.in_order,
            order=composition.order,
            held_out=held_out,
            sites=plan.changed,
            joint=plan.joint,
            gradients=gradients,
            known=known,
            passes=() if composition.refinement is None else (composition.refinement,),
            judged=composition.refit,
            batch_size=self.how.batch_size if composition.refinement is None else REFINED_TOGETHER,
            track=self.how.track,
        )

    @property
    def walks(self) -> bool:
        """Whether the blocks are compressed one after another on what those before them give, or improved by passes."""
        return self.composition.order != "one-shot" or self.composition.holds_out

    def walk_identity(self, out: Path) -> dict[str, Any]:
        """What losses, and blocks of one plan, depend on, by content; and the place that the run claims."""
        tokens, held_out = self.tokens
        return {
            "of": calibration_digest(self.model, tokens, self.composition.in_order.needs, self.sites),
            "held out": None if held_out is None else held_out.digest,
            "fisher": self.recording,
            "recipe": self.noted,
            "together": REFINED_TOGETHER if self.composition.refinement else None,
            "out": os.path.realpath(out),
        }

    def distil(self) -> list[PassReport]:
        """Distil the compressed model, in place. Gives the report; nothing without a distillation."""
        distillation = self.composition.distillation
        if distillation is None:
            return []
        tokens, held_out = self.tokens
        assert held_out is not None
        dense = load_model(
            self.recipe.model,
            dtype=self.recipe.dtype,
            device=self.how.device,
            trust_remote_code=self.how.trust_remote_code,
        )
        report = distillation(self.model, dense, tokens, held_out, self.how.track)
        return [] if report is None else [report]

    @functools.cached_property
    def recovery_samples(self) -> Samples | None:
        """The samples that the compressed model is fine-tuned on; None where it is not."""
        recovery = self.composition.recovery
        if recovery is None:
            return None
        return recovery.read_samples(self.model, self.tokenizer, lambda: self.tokens[0], self.how.data)

    def recover(self) -> list[PassReport]:
        """Fine-tune the compressed model, in place, as the last step. Gives the report; nothing without a recovery."""
        if self.composition.recovery is None or self.recovery_samples is None:
            return []
        report, self.adapter = self.composition.recovery.train(self.model, self.recovery_samples, self.how.track)
        return [report]

    def _one_shot(self, sites: Sequence[Site] | None = None) -> Iterator[BlockCalibration]:
        """The dense model's moments of these sites; default: the selected ones.

        Cheap to ask for again where a cache has them, or where they came with the gradients and are in memory.
        """
        sites = self.sites if sites is None else sites
        if not self.reads_text:
            for number in sorted({site.block for site in sites}):
                names = [site.name for site in sites if site.block == number]
                yield BlockCalibration(number, gradients={name: self.gradients[name] for name in names})
            return
        request = replace(self._calibration_request(sites), gradients=self.gradients)
        yield from self.how.engine.calibrate_by_block(request)

    def _calibration_request(self, sites: Sequence[Site]) -> CalibrationRequest:
        """The request to calibrate these sites of the dense model."""
        return CalibrationRequest(
            self.model,
            self.tokens[0],
            self.composition.method,
            sites=sites,
            cache=self.how.cache,
            memory=self._memory,
            batch_size=self.how.batch_size,
            track=self.how.track,
        )


def selected_sites(model: PreTrainedModel, recipe: Recipe) -> tuple[Site, ...]:
    """The linears that a recipe selects: of one that has a budget for the cache alone, keys and values."""
    selection = recipe.sites
    selected = select_sites(
        find_sites(model), include=selection.include, exclude=selection.exclude, blocks=selection.blocks
    )
    return head_sites(model, selected) if recipe.only_cache else selected


def planned_sites(model: PreTrainedModel, recipe: Recipe) -> tuple[Site, ...]:
    """The linears that a recipe may compress: those that its rules or its plan name, else all that it selects."""
    if recipe.plan is None and recipe.rules is None:
        return selected_sites(model, recipe)
    changed = make_plan(model, recipe).changed
    if recipe.keep_cache is None:
        return changed
    heads = head_sites(model, selected_sites(model, recipe))
    return (*(site for site in changed if site not in heads), *heads)


def make_plan(model: PreTrainedModel, recipe: Recipe) -> RankPlan:
    """The ranks that a recipe fixes without measuring: by its plan, its rules, or the same share everywhere.

    Raises:
        ValueError: no file at the recipe's plan, or as `plan` raises it.
    """
    if recipe.plan is not None:
        path = Path(recipe.plan)
        if not path.is_file():
            raise ValueError(f"no plan at {path}")
        return RankPlan.from_json(path.read_text(encoding="utf-8"), find_sites(model))
    composition, selection = recipe.composition, recipe.sites
    shared: dict[str, Any] = {"rank_multiple": recipe.rank_multiple, "layout": composition.layout}
    if composition.joint:
        shared["joint"] = joint_groups(selected_sites(model, recipe), find_sites(model))
    if recipe.rules is not None:
        rules = [Rule(r.keep, tuple(r.include), tuple(r.exclude), r.blocks) for r in recipe.rules]
        return plan(model, rules=rules, **shared)
    return plan(
        model, recipe.keep, include=selection.include, exclude=selection.exclude, blocks=selection.blocks, **shared
    )
