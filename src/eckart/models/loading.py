"""Loading and saving whole models: the right class for a directory, and writes that never leave a partial one."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from eckart.data.builtin import builtin_model_path
from eckart.models.checkpoint import CheckpointError, describe
from eckart.models.families import UnsupportedModelError
from eckart.models.refusals import check_architecture, check_quantised, check_source
from eckart.models.sites import find_sites, low_rank_modules
from eckart.support.files import staged_directory, write_whole

BUILTIN = "builtin"
DTYPES = ("auto", "float32", "bfloat16", "float16")


def load_model(path: str | Path, *, dtype: str = "auto", device: str = "cpu", dense: bool = False) -> PreTrainedModel:
    """The model at `path` (a directory, a hub name, or "builtin") in the class that its config names, in eval mode.

    Args:
        dtype: "auto" keeps the stored type; else one of float32, bfloat16, float16.
        dense: the model is to be compressed; refuse one that cannot be before its weights are read.

    Raises:
        ValueError: the dtype is none of DTYPES, or there is no model at `path`.
        UnsupportedModelError: what is there is no model that transformers has a class for, see `refusals`; of `dense`,
            as `find_sites`.
        CheckpointError: a compressed checkpoint does not match its own description.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    path = locate(path)
    check_source(path)
    config = _load(f"the model {path}", path, lambda: AutoConfig.from_pretrained(path))
    model_class = class_of(config, path)
    if dense:
        check_compressible(config, model_class, path)
    torch_dtype: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    model = _load(f"the model {path}", path, lambda: model_class.from_pretrained(path, dtype=torch_dtype))
    return model.to(device).eval()


def check_compressible(config: PreTrainedConfig, model_class: type[PreTrainedModel], path: str | Path) -> None:
    """Refuse a model that cannot be compressed, from its configuration alone.

    Raises:
        UnsupportedModelError: as `find_sites`.

    Cost: the model is built without memory for its weights.
    """
    check_quantised(config, path)
    with torch.device("meta"):
        find_sites(model_class(copy.deepcopy(config)))


def class_of(config: PreTrainedConfig, path: str | Path) -> type[PreTrainedModel]:
    """The class of transformers that a configuration names.

    Args:
        path: of the model, for the message.

    Raises:
        UnsupportedModelError: it names none that transformers has.
    """
    check_architecture(config, path)
    names: Sequence[str | None] = config.architectures or [None]
    architecture = names[0]
    model_class: type[PreTrainedModel] | None = getattr(transformers, architecture or "", None)
    if model_class is None:
        raise UnsupportedModelError(f"{path}: its config names architecture {architecture!r}, which transformers lacks")
    return model_class


def load_classifier(path: str | Path, classes: Sequence[str]) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model at `path` with a head that tells `classes` apart, in float32 and eval mode, and what in it is new.

    Args:
        path: as in `load_model`; a model with any head or none. An existing classification head is kept.

    Returns:
        the model, and the names of the parameters that the files lack and that were drawn at random, from torch's seed.

    Raises:
        ValueError: no model at `path`, or a classifier of another number of classes.
        UnsupportedModelError: transformers has no classifier of this kind.
    """
    path = locate(path)
    check_source(path)
    config = _load(f"the model {path}", path, lambda: AutoConfig.from_pretrained(path))
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise UnsupportedModelError(f"{path}: transformers has no classifier of the kind {config.model_type!r}")
    if "ForSequenceClassification" in (config.architectures or [""])[0] and config.num_labels != len(classes):
        raise ValueError(
            f"{path} is a classifier already, of {config.num_labels} classes and not of {len(classes)} "
            f"({', '.join(classes)}): start from the model that it was fine-tuned from"
        )
    config.id2label = dict(enumerate(classes))
    config.label2id = {name: number for number, name in enumerate(classes)}
    config.problem_type = "single_label_classification"
    model, info = _load(
        f"the model {path}",
        path,
        lambda: AutoModelForSequenceClassification.from_pretrained(
            path, config=config, dtype=torch.float32, output_loading_info=True
        ),
    )
    return model.eval(), tuple(sorted(info["missing_keys"]))


def own_memory(model: PreTrainedModel) -> None:
    """Copy the parameters out of the files that loading maps into memory, in place.

    A mapped file stays resident as a whole while any of its tensors is in use; with tensors of their own, a weight that
    is replaced gives its memory back. Cost: one copy of the model, and both copies at once of one file's tensors.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()


def locate(path: str | Path) -> str | Path:
    """The directory or hub name as it is; "builtin" is the directory of the model that comes with eckart."""
    return builtin_model_path() if str(path) == BUILTIN else path


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the model at `path`.

    Raises:
        ValueError: there is none.
    """
    path = locate(path)
    if Path(path).exists():  # of a model on the hub the configuration is asked for when it is loaded
        check_source(path)
    return _load(f"the tokenizer of {path}", path, lambda: AutoTokenizer.from_pretrained(path))


def _load(what: str, path: str | Path, load: Callable[[], Any]) -> Any:
    try:
        return load()
    except (CheckpointError, UnsupportedModelError):
        raise
    except ImportError as error:
        raise ValueError(f"cannot load {what}: it needs a package ({str(error).strip().splitlines()[0]})") from error
    except (OSError, ValueError) as error:
        local = Path(path).exists()
        hint = "is it a Hugging Face directory?" if local else "no such directory, and the hub did not give it"
        raise ValueError(f"cannot load {what}: {hint} ({str(error).splitlines()[0]})") from error


def save(
    model: PreTrainedModel,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    recipe: dict[str, Any] | None = None,
    files: dict[str, str] | None = None,
    max_shard_size: str = "5GB",
    force: bool = False,
) -> Path:
    """Write a Hugging Face directory that stock `from_pretrained` reads after `import eckart`.

    Args:
        tokenizer: saved with the model.
        recipe: what made the model; goes into config.json. None keeps what `compress` noted.
        files: {name: text} of further files, such as README.md and plan.json.
        force: replace a directory that exists; it is removed only after the new one is complete.

    Raises:
        FileExistsError: `out` exists and `force` is off. Nothing was changed.
    """
    with staged_directory(out, force=force) as staging:
        if low_rank_modules(model):
            noted = getattr(getattr(model.config, "quantization_config", None), "recipe", None)
            describe(model, recipe if recipe is not None else noted)
        model.save_pretrained(staging, max_shard_size=max_shard_size)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        for name, text in (files or {}).items():
            write_whole(staging / name, text)
    return Path(out)
