"""Remote code: a file in a checkpoint by which transformers loads it, where it is trusted, without eckart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

from eckart.models.experts import opened_experts
from eckart.models.families import UnsupportedModelError
from eckart.models.heads import opened_heads

# The file in a checkpoint: the text of `standalone`, as it is.
FILE = "modeling_eckart.py"
SOURCE = Path(__file__).with_name("standalone.py")
# transformers' tables from a configuration to a class, each with the auto class that looks into it. Those of
# encoder-decoders first: the table of masked models has BART's as well.
TABLES = {
    "AutoModel": "MODEL_MAPPING",
    "AutoModelForCausalLM": "MODEL_FOR_CAUSAL_LM_MAPPING",
    "AutoModelForSeq2SeqLM": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING",
    "AutoModelForSpeechSeq2Seq": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING",
    "AutoModelForMaskedLM": "MODEL_FOR_MASKED_LM_MAPPING",
    "AutoModelForSequenceClassification": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING",
    "AutoModelForTokenClassification": "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING",
    "AutoModelForQuestionAnswering": "MODEL_FOR_QUESTION_ANSWERING_MAPPING",
    "AutoModelForImageTextToText": "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING",
}


def auto_class_of(architecture: str) -> str:
    """The auto class of transformers by which a class of models is loaded; that of decoders for one of other code."""
    names = ((auto, getattr(modeling_auto, f"{table}_NAMES")) for auto, table in TABLES.items())
    return next((auto for auto, listed in names if architecture in listed.values()), "AutoModelForCausalLM")


def carries_code(config: PreTrainedConfig | dict[str, Any]) -> bool:
    """Whether a configuration names our file for its classes, so that eckart needs no trust to load the model."""
    entries = config.get("auto_map") if isinstance(config, dict) else getattr(config, "auto_map", None)
    return isinstance(entries, dict) and any(_is_ours(reference) for reference in entries.values())


def carry_code(model: PreTrainedModel) -> dict[str, str]:
    """Name our file in the model's configuration, in place, and give {its name: its text}.

    Raises:
        UnsupportedModelError: the model's class is of code of its own, which the file would stand in the way of; or it
            is a model whose experts or heads are open.
    """
    kind = type(model)
    if not kind.__module__.startswith("transformers.") and not carries_code(model.config):
        raise UnsupportedModelError(
            f"{kind.__name__} is of code that comes with its model, and that is needed to load it anyway: leave out "
            "remote code, and `import eckart` besides"
        )
    if opened_experts(model):
        raise UnsupportedModelError(
            f"{kind.__name__} has experts with linears of their own, which only eckart's own code loads: leave out "
            "remote code"
        )
    if opened_heads(model):
        raise UnsupportedModelError(
            f"{kind.__name__} has groups of key and value heads with linears of their own, which only eckart's own "
            "code loads: leave out remote code"
        )
    model.config.auto_map = _auto_map(model.config)
    return {FILE: SOURCE.read_text(encoding="utf-8")}


def drop_code(config: PreTrainedConfig) -> None:
    """Name our file no more, in place: of a model that is dense again, or a checkpoint without the file."""
    if carries_code(config):
        del config.auto_map


def _auto_map(config: PreTrainedConfig) -> dict[str, str]:
    """{auto class: its class in our file}, of all that transformers has for this kind of model."""
    kind = transformers.CONFIG_MAPPING[config.model_type]
    classes: dict[str, Any] = {"AutoConfig": kind}
    for auto, table in TABLES.items():
        if kind in (mapping := getattr(transformers, table)):
            listed = mapping[kind]
            classes[auto] = listed[0] if isinstance(listed, list | tuple) else listed
    stem = Path(FILE).stem
    return {auto: f"{stem}.{each.__name__}" for auto, each in classes.items()}


def _is_ours(reference: Any) -> bool:
    # Of a model on the hub transformers puts "OWNER/NAME--" in front.
    return isinstance(reference, str) and reference.rpartition("--")[2].startswith(f"{Path(FILE).stem}.")
