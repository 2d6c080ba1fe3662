"""Sections of a recipe: method, sites, budgets, calibration, evaluations, gradient steps.

`python tools/recipe_page.py` writes docs/recipe.md from the descriptions of the fields.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from eckart.compression.baselines import BASELINES, build_baseline
from eckart.compression.tuning.distillation import Distillation
from eckart.compression.tuning.lora import RANK as LORA_RANK
from eckart.compression.tuning.recovery import Recovery
from eckart.compression.tuning.refinement import Refinement
from eckart.data.corpora import BUILTIN, DEFAULT_SPLIT
from eckart.data.mixtures import BROAD, shares_of
from eckart.data.samples import Cutting
from eckart.evals.catalogue import find_task
from eckart.evals.hidden_states import Pooling
from eckart.evals.probing import Control
from eckart.evals.task import Task
from eckart.lowrank import build_method
from eckart.lowrank.entries import build_entry
from eckart.runs.composition import COMPOSITIONS, Composition, Effort, composition_options
from eckart.support.section import Section

# Descriptions that several sections share.
INCLUDE: Any = Field(
    default_factory=list,
    description="parts (mlp), roles (q_proj) or shell patterns (model.layers.*.mlp.*) of linears; default: all",
)
EXCLUDE: Any = Field(default_factory=list, description="the same, of those that stay dense")
BLOCKS: Any = Field(None, description='"last 12", "first 4", "last 3/8", "8-19" (from 0, both ends in), "0,5,7"')
STEPS = "of one batch each; 0 is none of it"
RATE = "largest step of a number, relative to the root mean square of its tensor"
BATCH = "samples in a step"
OWN = "default: the method's own"


class MethodSection(Section):
    """A composition (best), a method of the catalogue, or a baseline (int8, int4, llm-pruner), and its settings."""

    name: str = Field("best", description="see `eckart methods`; a name in place of the section stands for itself")
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of the method, which `eckart methods NAME` lists with their defaults",
    )

    @model_validator(mode="after")
    def _known(self) -> MethodSection:
        if self.name in BASELINES:
            build_baseline(self.name, self.options)
        else:
            self.composition()
        return self

    def composition(self, effort: Effort | None = None) -> Composition:
        """The composition of this name; of a method of the catalogue, the method with nothing around it.

        Args:
            effort: None for the composition's own.

        Raises:
            ValueError: an unknown name or setting, or an effort for a method, which has but one way to go.
        """
        composition_options(self.name)  # refuses an unknown name, with what there is
        if self.name in COMPOSITIONS:
            # Its settings are those of its method, which knows them.
            method = build_entry(COMPOSITIONS, "composition", self.name).method
            chosen = {} if effort is None else {"effort": effort}
            return COMPOSITIONS[self.name](**chosen, **build_method(method.name, self.options).options)
        if effort is not None:
            raise ValueError(f"effort is for a composition ({', '.join(COMPOSITIONS)}), and {self.name} is a method")
        return Composition(build_method(self.name, self.options))


class SitesSection(Section):
    """Which linears are compressed: see `select_sites`. The others stay dense, and are not counted in keep."""

    include: list[str] = INCLUDE
    exclude: list[str] = EXCLUDE
    blocks: str | None = BLOCKS


class RefineSection(Section):
    """Gradient steps on each block, undone where they do not help: see `refinement.Refinement`."""

    steps: int = Field(Refinement.steps, ge=0, description=STEPS)
    rate: float = Field(Refinement.rate, gt=0, lt=1, description=RATE)


class SpeedSection(Section):
    """How many times as fast as the dense model, by a table that is measured once on the machine: see `Speed`."""

    times: float = Field(ge=1, lt=float("inf"), description="tokens per second over the dense model's")
    rows: int | None = Field(
        None,
        gt=0,
        description="tokens at a time: 1 is generating, more is reading a prompt of so many; default 1, or for a model "
        "that does not generate 512 or its positions",
    )


class RuleSection(Section):
    """Linears that keep a share of their numbers: see `allocation.Rule`."""

    keep: float = Field(gt=0, le=1, description="share of the numbers of each linear kept")
    include: list[str] = INCLUDE
    exclude: list[str] = EXCLUDE
    blocks: str | None = BLOCKS


class CalibrationSection(Section):
    """Which text calibrates, and how it is cut."""

    corpus: str = Field(
        BROAD,
        description="a known corpus, a hub data set, a file (.txt, .jsonl, .json, .csv, .tsv, .parquet), or a mixture: "
        "several joined by +, with weights ptb*2+c4, or by name, broad or broad*3+mine.jsonl; a name in place of the "
        "section; of the model builtin the default is its own text, builtin",
    )
    split: str = Field(DEFAULT_SPLIT, description="which split of it is read; a file has none")
    column: str | None = Field(None, description="field that holds the text; default: the corpus's own, or text")
    target: str | None = Field(
        None,
        description="of an encoder-decoder: field that holds the target, where column is the source, or a speech "
        "model's .wav file; default: each sample of plain text is halved",
    )
    samples: int = Field(256, gt=0, description="windows, documents or pairs that the statistics are made of")
    length: int | None = Field(
        None,
        gt=0,
        description="tokens of a sample, of source and target together; default: the context, or the model's positions "
        "if fewer",
    )
    seed: int = Field(0, description="draws the samples")
    cut: Cutting | None = Field(
        None,
        description="how text becomes samples; default: windows of a stream for decoders, documents for encoders; for "
        "encoder-decoders pairs where a target is named, else halves of windows, the first the source",
    )
    aside: float = Field(
        0.125, gt=0, lt=1, description="share of the samples held out to judge refit, refinement and distillation by"
    )
    fisher: Literal["gathered", "recorded"] = Field(
        "gathered",
        description="gathered on this text, or recorded while the model was fine-tuned, see `eckart finetune`",
    )

    @model_validator(mode="after")
    def _mixes(self) -> CalibrationSection:
        shares_of(self.corpus)  # refuses a weight that is none
        return self


class EvaluationSection(Section):
    """One evaluation of the dense and of the compressed model."""

    task: str = Field(
        description="EVALUATION:CORPUS or EVALUATION:TASK, see `eckart evaluations`; a name in place of the section"
    )
    split: str = Field("test", description="which split is read; of text and tasks, also sfsd-search, sfsd-evaluation")
    column: str | None = Field(None, description="field that holds the text; default: the corpus's own, or text")
    length: int | None = Field(
        None, gt=1, description="tokens of a window; of cost, of the prompt; default: the context, or the positions"
    )
    limit: int | None = Field(None, gt=0, description="windows, questions or texts read at most; default: all")
    shots: int | None = Field(None, ge=0, description="examples in front of each question; default: the task's own")
    seed: int = Field(0, description="draws those examples")
    leave_out_long: bool = Field(False, description="StereoSet: leave out what is past the model's positions")
    pooling: Pooling = Field("mean", description="probing: how a text's hidden states become one")
    control: Control = Field("text", description="probing: what has one random label in the control task")
    seeds: int = Field(3, gt=0, description="probing: probes of each layer")

    @model_validator(mode="after")
    def _known(self) -> EvaluationSection:
        find_task(self.task)
        return self

    def to_task(self) -> Task:
        """As `evaluate` takes it."""
        values = self.model_dump(exclude={"task"})
        return Task(self.task, **values)


class DistilSection(Section):
    """Gradient steps on the whole model towards the dense model's predictions: see `distillation.Distillation`."""

    steps: int = Field(Distillation.steps, ge=0, description=STEPS)
    rate: float = Field(Distillation.rate, gt=0, lt=1, description=RATE)
    batch: int = Field(Distillation.batch, gt=0, description=BATCH)


class RecoverSection(Section):
    """A short fine-tuning of the compressed model, never undone: see `recovery.Recovery`."""

    steps: int = Field(Recovery.steps, ge=0, description=STEPS)
    rate: float = Field(Recovery.rate, gt=0, lt=1, description=RATE)
    batch: int = Field(Recovery.batch, gt=0, description=BATCH)
    corpus: str | None = Field(None, description="of a classifier: the labelled set that it recovers on")
    adapter: Literal["lora"] | None = Field(
        None, description="only an adapter around the factors moves, and the ranks stay; default: all numbers move"
    )
    adapter_rank: int | None = Field(None, gt=0, description=f"of the adapter; default {LORA_RANK}")
    merge: bool | None = Field(
        None,
        description="true adds the adapter to the factors; false leaves these and puts it into the folder adapter of "
        "the checkpoint, for PEFT; default true",
    )

    @model_validator(mode="after")
    def _fits(self) -> RecoverSection:
        if self.steps:
            Recovery(**self.model_dump())
        return self


def named_text(section: Any, model: Any) -> Any:
    """A calibration section that is perhaps only named, with the default text of the model where it names none."""
    section = {"corpus": section} if isinstance(section, str) else {} if section is None else section
    if isinstance(section, dict) and section.get("corpus") is None:
        section = {**section, "corpus": default_text(model)}
    return section


def default_text(model: Any) -> str:
    """The calibration text of a model for which none is named."""
    return BUILTIN if model == BUILTIN else BROAD
