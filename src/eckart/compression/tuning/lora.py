"""LoRA on a compressed model: an adapter around both factors of every low-rank linear, trained and merged into them.

With A and B of an adapter of rank r, a factor F becomes F + B A: as large as it was, so that the linear's rank stays,
however large r is. The factors themselves need no gradients and no moments of Adam, and keep their type.
"""

from __future__ import annotations

import json
import math
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from eckart.compression.tuning.descent import size_of
from eckart.models.adapters import ADAPTER, WEIGHTS, import_peft, lora_targets
from eckart.models.sites import low_rank_modules
from eckart.support.plain_data import read_json

# Of the adapter where nothing is said, as PEFT's.
RANK = 8
# How much larger its steps are than those of all numbers: it moves few directions, and starts at none. Of 4, 10 and 20
# the one with the lowest loss on other text after 32 steps, on the built-in model cut to 0.4 by asvd-i.
STEP = 10.0
NAME = "default"


@dataclass(frozen=True)
class Lora:
    """An adapter that is in its place, around the factors of a model.

    Attributes:
        wrapped: PEFT's model around the model.
        parameters: A and B of every factor, float32 or wider.
        sizes: of the steps of each, see `descent.descend`. B's are such that the first steps change a factor by their
            rate, relative to the factor's numbers.
        trained: what of the model had gradients before.
    """

    wrapped: Any
    parameters: list[nn.Parameter]
    sizes: list[float]
    trained: frozenset[str]

    @classmethod
    def around(cls, model: PreTrainedModel, rank: int | None) -> Lora:
        """Put an adapter that changes nothing yet around the model's factors, in place; the same in every run.

        Raises:
            ValueError: PEFT is not installed, no linear is low-rank, or (UnsupportedModelError) factors are in few
                bits.
        """
        peft, rank = import_peft(), rank or RANK
        trained = frozenset(name for name, parameter in model.named_parameters() if parameter.requires_grad)
        names = lora_targets(model, list(low_rank_modules(model)))
        if not names:
            raise ValueError("recovery: the model has no low-rank linear that an adapter could be put around")
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.simplefilter("ignore", FutureWarning)  # PEFT reads what transformers is about to rename
            torch.manual_seed(0)
            wrapped = peft.get_peft_model(model, config)
        parameters: list[nn.Parameter] = []
        sizes: list[float] = []
        for name in names:
            layer: Any = model.get_submodule(name)
            inner, outer = layer.lora_A[NAME].weight, layer.lora_B[NAME].weight
            size = size_of(inner)
            parameters += [inner, outer]
            sizes += [STEP * size, STEP * size_of(layer.get_base_layer().weight) / (size * math.sqrt(rank))]
        return cls(wrapped, parameters, sizes, trained)

    def merge(self) -> None:
        """Add it to the factors, in place, rounded to their type; the model is without adapters then."""
        self.wrapped.merge_and_unload()
        self._restore()

    def take_off(self, base: str) -> dict[str, str | bytes]:
        """Take it off the model, in place: {name: content} of the files of PEFT's that hold it.

        Args:
            base: the checkpoint that it is an adapter of, as the files name it.
        """
        with tempfile.TemporaryDirectory() as place:
            self.wrapped.save_pretrained(place, save_embedding_layers=False)
            settings = read_json(Path(place) / ADAPTER)
            settings |= {"base_model_name_or_path": base, "target_modules": sorted(settings["target_modules"])}
            weights = (Path(place) / WEIGHTS).read_bytes()
        self.wrapped.unload()
        self._restore()
        return {ADAPTER: json.dumps(settings, indent=2, sort_keys=True), WEIGHTS: weights}

    def _restore(self) -> None:
        model = self.wrapped.get_base_model()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in self.trained)
        if hasattr(model, "peft_config"):
            del model.peft_config
