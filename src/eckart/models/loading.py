"""Loading and saving whole models: the right class for a directory, and writes that never leave a partial one."""

from __future__ import annotations

import copy
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoFeatureExtractor,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE
from transformers.utils import cached_file

from eckart.data.builtin import builtin_model_path
from eckart.models.adapters import Adapter, import_peft, merge_adapter, read_adapter
from eckart.models.checkpoint import describe
from eckart.models.experts import open_experts
from eckart.models.families import UnsupportedModelError
from eckart.models.gguf import gguf_type, load_gguf, load_gguf_tokenizer
from eckart.models.gguf_header import gguf_file
from eckart.models.heads import close_heads, heads_in_a_group, open_heads
from eckart.models.matching import check_counts, complaints_about, is_head, refuse, stored_names, wrong_types
from eckart.models.plain_weights import multiply_out
from eckart.models.refusals import UNTRUSTED, check_architecture, check_quantised, check_source, raw_config
from eckart.models.registration import QUANT_METHOD
from eckart.models.remote_code import carries_code, carry_code, drop_code
from eckart.models.sites import find_sites, low_rank_modules
from eckart.models.weight_files import (
    CheckpointError,
    Stored,
    local_folder,
    read_headers,
    verify,
    weight_files,
    write_digests,
)
from eckart.support.device import check_device
from eckart.support.files import staged_directory, whole_file, write_whole
from eckart.support.quiet import quiet

BUILTIN = "builtin"
# What prepares sound or images for a model.
PROCESSORS = ("preprocessor_config.json", "processor_config.json")
DTYPES = ("auto", "float32", "bfloat16", "float16")
# What configurations and files that are damaged, or of another making, end in while transformers reads them.
FAULTS = (
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    AssertionError,
    EOFError,
    RecursionError,
    pickle.UnpicklingError,
    SafetensorError,
    StrictDataclassError,
)


def load_model(
    path: str | Path,
    *,
    dtype: str = "auto",
    device: str = "cpu",
    dense: bool = False,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model at `path` in the class that its config names, in eval mode.

    Args:
        path: a directory, a hub name, or "builtin"; a GGUF file, or a folder with one, see `gguf.load_gguf`; or the
            folder of an adapter, which is merged into its base model, see `adapters.merge_adapter`.
        dtype: "auto" keeps the stored type; else one of float32, bfloat16, float16.
        dense: the model is to be compressed; refuse one that cannot be before its weights are read.
        trust_remote_code: run code that comes with the files, and take the classes that it has. Never asked for.

    Raises:
        ValueError: the dtype is none of DTYPES, the device is not here, or there is no model at `path`, or it needs
            code of its own.
        UnsupportedModelError: what is there is no model that transformers has a class for, see `refusals`; of `dense`,
            as `find_sites`.
        CheckpointError: a file is damaged or outside the folder, or the files do not hold what the config describes:
            a tensor is missing, unknown, or of another shape or kind of number. All of it in one message. Or they are
            not those that eckart wrote there, by their digests.

    Cost: every file is read, and where there are digests, once more.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    check_device(device)
    path = locate(path)
    if (file := gguf_file(path)) is not None:
        return open_experts(load_gguf(file, dtype).to(device))  # type: ignore[arg-type]
    if (adapter := read_adapter(path)) is not None:
        import_peft()
        base = _load_base(adapter, dtype=dtype, dense=dense, trust_remote_code=trust_remote_code)
        multiply_out(base, adapter.base)
        return merge_adapter(base, adapter).to(device)  # type: ignore[arg-type]
    config = read_config(path, trust_remote_code=trust_remote_code)
    model_class = class_of(config, path, trust_remote_code=trust_remote_code)
    if dense:
        check_compressible(config, model_class, path)
    check_weights(path, model_class, trust_remote_code=trust_remote_code)
    torch_dtype: Any = dtype if dtype == "auto" else getattr(torch, dtype)
    model = load_or_refuse(
        f"the model {path}",
        path,
        lambda: model_class.from_pretrained(path, dtype=torch_dtype, trust_remote_code=trust_remote_code),
    )
    if Path(path).is_dir():
        verify(path)
    return open_experts(model.to(device).eval())


def _load_base(adapter: Adapter, **given: Any) -> PreTrainedModel:
    """The model that an adapter is of, as `load_model` loads it."""
    try:
        return load_model(adapter.base, **given)
    except ValueError as error:
        raise ValueError(f"{adapter.folder} holds an adapter of {adapter.base}: {error}") from error


def describe_origin(path: str | Path) -> dict[str, str]:
    """What else than a plain checkpoint the model at `path` is made of, for people; nothing where it is one.

    Returns:
        of a GGUF file its name and "quantised", see `gguf.gguf_type`; of an adapter its kind, "adapter", and "base".
    """
    path = locate(path)
    if (file := gguf_file(path)) is not None:
        return {"gguf": file.name, "quantised": gguf_type(file)}
    adapter = read_adapter(path)
    return {} if adapter is None else {"adapter": adapter.kind, "base": adapter.base}


def plain_folder(path: str | Path) -> Path | None:
    """The directory of a checkpoint on this machine; None for any other name, a GGUF file, or an adapter."""
    folder = Path(path)
    return folder if folder.is_dir() and gguf_file(folder) is None and read_adapter(folder) is None else None


def weights_on_disk(path: str | Path) -> tuple[Path, ...]:
    """The files that a checkpoint on this machine is loaded from; none for any other name, a GGUF file, or an adapter.

    Raises:
        CheckpointError: an index is damaged, or names a file outside the folder.
    """
    folder = plain_folder(path)
    return () if folder is None else tuple(weight_files(folder))


@contextmanager
def _as_checkpoint(path: str | Path, *, trust_remote_code: bool) -> Iterator[str | Path]:
    """Inside, a place that transformers loads itself: `path`, or a checkpoint made of its GGUF file or its adapter."""
    if gguf_file(path) is None and read_adapter(path) is None:
        yield path
        return
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        yield save(load_model(path, trust_remote_code=trust_remote_code), Path(folder) / "model")


def check_compressible(config: PreTrainedConfig, model_class: type[PreTrainedModel], path: str | Path) -> None:
    """Refuse a model that cannot be compressed, from its configuration alone.

    Raises:
        UnsupportedModelError: as `find_sites`.

    Cost: the model is built without memory for its weights.
    """
    check_quantised(config, path)
    with torch.device("meta"):
        find_sites(open_experts(model_class(copy.deepcopy(config))))


def read_config(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The configuration of the model at `path`, with sizes that the files can have.

    Raises:
        ValueError: there is none, or it is damaged, or it needs code of its own.
        UnsupportedModelError: what is there is no model, see `refusals.check_source`.
        CheckpointError: a weights file is damaged or outside the folder; or there are more layers than tensors.
    """
    check_source(path, trust_remote_code=trust_remote_code)
    trusted = trust_remote_code and not carries_code(raw_config(path))
    config = load_or_refuse(
        f"the model {path}", path, lambda: AutoConfig.from_pretrained(path, trust_remote_code=trusted)
    )
    stored = _read_stored(path)
    check_counts(config, None if stored is None else len(stored))
    return config


def _read_stored(path: str | Path) -> dict[str, Stored] | None:
    """What the headers of the model's files say; None where they are not on this machine, or nowhere.

    Raises:
        CheckpointError: a file is damaged, missing from the folder, or outside it.
    """
    folder = local_folder(path)
    files = [] if folder is None else weight_files(folder)
    is_whole = Path(path).is_dir() or all(file.is_file() for file in files)
    return read_headers(files) if files and is_whole else None


def check_weights(
    path: str | Path,
    model_class: Any,
    *,
    config: PreTrainedConfig | None = None,
    may_be_new: Callable[[PreTrainedModel, str], bool] = lambda model, name: False,
    trust_remote_code: bool = False,
) -> tuple[str, ...]:
    """Refuse files that do not hold the model; gives the names of tensors that they lack and that may be new.

    The model is built and filled by transformers without memory for its numbers, and its report is read.

    Args:
        model_class: what builds it, by `from_pretrained`.
        config: default, the one at `path`.
        may_be_new: whether the files need not have this tensor of the model.

    Raises:
        CheckpointError: they do not; one message with all that is wrong.

    Cost: a tenth of a second, more for thousands of tensors; no number is read from a safetensors file.
    """
    given = {} if config is None else {"config": config}
    with _unheard():
        model, info = load_or_refuse(
            f"the model {path}",
            path,
            lambda: model_class.from_pretrained(
                path,
                **given,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            ),
            (*FAULTS, RuntimeError),
        )
    complaints = complaints_about(model, info, may_be_new=lambda name: may_be_new(model, name))
    section = getattr(model.config, "quantization_config", None)
    if section is None or getattr(section, "quant_method", None) == QUANT_METHOD:  # others store codes, on purpose
        stored = _read_stored(path) or {}
        prefix = f"{model.base_model_prefix}."
        expected = {name.removeprefix(prefix): tensor for name, tensor in model.state_dict().items()}
        complaints += wrong_types(expected, {name: stored[key] for name, key in stored_names(model, stored).items()})
    refuse(str(path), complaints, f"the {type(model).__name__} that its config.json describes")
    return tuple(sorted(info["missing_keys"]))


@contextmanager
def _unheard() -> Iterator[None]:
    """Inside, transformers shows neither its report nor a bar, and draws no number from torch's generator."""
    logging = transformers.utils.logging
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with quiet("transformers"), torch.random.fork_rng(devices=[]):
            yield
    finally:
        if shown:
            logging.enable_progress_bar()


def class_of(config: PreTrainedConfig, path: str | Path, *, trust_remote_code: bool = False) -> type[PreTrainedModel]:
    """The class that a configuration names: of transformers, or of the code that comes with the files if trusted.

    Args:
        path: of the model, where such code is.

    Raises:
        UnsupportedModelError: it names none that there is.
    """
    check_architecture(config, path)
    architecture = (config.architectures or [""])[0]
    own = {
        str(reference).rpartition(".")[2]: (auto_class, str(reference))
        for auto_class, reference in (getattr(config, "auto_map", None) or {}).items()
    }
    if trust_remote_code and architecture in own and not carries_code(config):
        auto_class, reference = own[architecture]
        remote: type[PreTrainedModel] = load_or_refuse(
            f"the code of {path}", path, lambda: get_class_from_dynamic_module(reference, str(path))
        )
        remote.register_for_auto_class(auto_class)  # so that saving the model writes its code as well
        return remote
    model_class: type[PreTrainedModel] | None = getattr(transformers, architecture, None)
    if model_class is None:
        hint = f"; {UNTRUSTED}" if architecture in own else ""
        raise UnsupportedModelError(
            f"{path}: its config names architecture {architecture!r}, which transformers lacks{hint}"
        )
    return model_class


def load_classifier(
    path: str | Path, classes: Sequence[str], *, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """The model at `path` with a head that tells `classes` apart, in float32 and eval mode, and what in it is new.

    Args:
        path: as in `load_model`; a model with any head or none. An existing classification head is kept.
        trust_remote_code: as in `load_model`.

    Returns:
        the model, and the names of the parameters that the files lack and that were drawn at random, from torch's
        seed: of the head, and of the pooler that it reads.

    Raises:
        ValueError: no model at `path`, or a classifier of another number of classes.
        UnsupportedModelError: transformers has no classifier of this kind.
        CheckpointError: as `load_model`.
    """
    with _as_checkpoint(locate(path), trust_remote_code=trust_remote_code) as folder:
        return _load_classifier(folder, classes, trust_remote_code=trust_remote_code)


def _load_classifier(
    path: str | Path, classes: Sequence[str], *, trust_remote_code: bool
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    config = read_config(path, trust_remote_code=trust_remote_code)
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
    auto = AutoModelForSequenceClassification
    new = check_weights(path, auto, config=config, may_be_new=is_head, trust_remote_code=trust_remote_code)
    model = load_or_refuse(
        f"the model {path}",
        path,
        lambda: auto.from_pretrained(path, config=config, dtype=torch.float32, trust_remote_code=trust_remote_code),
    )
    return model.eval(), new


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


def load_tokenizer(path: str | Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of the model at `path`: of an adapter without one of its own, its base model's.

    Args:
        trust_remote_code: as in `load_model`.

    Raises:
        ValueError: there is none, or it needs code of its own.
    """
    path = locate(path)
    if (file := gguf_file(path)) is not None:
        return load_gguf_tokenizer(file)
    if (adapter := read_adapter(path)) is not None:
        if not (adapter.folder / TOKENIZER_CONFIG_FILE).is_file():
            return load_tokenizer(adapter.base, trust_remote_code=trust_remote_code)
    elif Path(path).exists():  # of a model on the hub the configuration is asked for when it is loaded
        check_source(path, trust_remote_code=trust_remote_code)
    return load_or_refuse(
        f"the tokenizer of {path}",
        path,
        lambda: AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code),
    )


def load_extractor(model: PreTrainedModel) -> Any:
    """What makes features of sound, from where the model was loaded. Raises ValueError: there is none."""
    path = str(model.config.name_or_path)
    return load_or_refuse(f"the feature extractor of {path}", path, lambda: AutoFeatureExtractor.from_pretrained(path))


def read_processor(model: PreTrainedModel) -> dict[str, str]:
    """{file name: text} of what the model was loaded with for sound or images; nothing of one that reads text."""
    if model.main_input_name == "input_ids":
        return {}
    path = str(model.config.name_or_path)
    try:
        places = {name: cached_file(path, name, _raise_exceptions_for_missing_entries=False) for name in PROCESSORS}
    except FAULTS:
        return {}
    return {name: Path(place).read_text(encoding="utf-8") for name, place in places.items() if place is not None}


def load_or_refuse(
    what: str, path: str | Path, load: Callable[[], Any], faults: tuple[type[Exception], ...] = FAULTS
) -> Any:
    """What `load` gives; what is wrong with the files is one ValueError, or the CheckpointError that it was."""
    try:
        return load()
    except (CheckpointError, UnsupportedModelError):
        raise
    except ImportError as error:
        raise ValueError(f"cannot load {what}: it needs a package ({str(error).strip().splitlines()[0]})") from error
    except faults as error:
        if "trust_remote_code" in str(error):
            raise ValueError(f"cannot load {what}: {UNTRUSTED}") from error
        local = Path(path).exists()
        hint = "is it a Hugging Face directory?" if local else "no such directory, and the hub did not give it"
        raise ValueError(f"cannot load {what}: {hint} ({_brief(error)})") from error


def _brief(error: Exception) -> str:
    """The first line of a message, and the second where the first announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return text if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: {text}"


def save(
    model: PreTrainedModel,
    out: str | Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    recipe: dict[str, Any] | None = None,
    files: Mapping[str, str | bytes] | None = None,
    remote_code: bool | None = None,
    max_shard_size: str = "5GB",
    force: bool = False,
) -> Path:
    """Write a Hugging Face directory that stock `from_pretrained` reads after `import eckart`.

    The experts of a dense model are written as transformers keeps them, one tensor a layer, see `open_experts`, and so
    are its keys and values, see `close_heads`.

    Args:
        tokenizer: saved with the model.
        recipe: what made the model; goes into config.json. None keeps what `compress` noted.
        files: {name: content} of further files, such as README.md and plan.json.
        remote_code: write a file by which people who trust it load the model without eckart, as code that comes with
            it; None does so where the model was loaded with such a file.
        force: replace a directory that exists; it is removed only after the new one is complete.

    Raises:
        FileExistsError: `out` exists and `force` is off. Nothing was changed.
        ValueError: `remote_code` for a model without compressed linears, or (UnsupportedModelError) of a class of its
            own. Nothing was written.

    Cost: what is written is read once more, for the digests that `weight_files.verify` checks.
    """
    heads = heads_in_a_group(model)
    with staged_directory(out, force=force) as staging:
        if low_rank_modules(model):
            noted = getattr(getattr(model.config, "quantization_config", None), "recipe", None)
            describe(model, recipe if recipe is not None else noted)
        elif remote_code:
            raise ValueError(f"the {type(model).__name__} holds no compressed linear: it loads without code of ours")
        else:
            remote_code = False
            close_heads(model)
        if remote_code or (remote_code is None and carries_code(model.config)):
            files = {**(files or {}), **carry_code(model)}
        else:
            drop_code(model.config)
        model.save_pretrained(staging, max_shard_size=max_shard_size)
        if heads is not None:
            open_heads(model, heads)
        if tokenizer is not None:
            tokenizer.save_pretrained(staging)
        for name, content in (files or {}).items():
            if isinstance(content, str):
                write_whole(staging / name, content)
            else:
                with whole_file(staging / name) as partial:
                    partial.write_bytes(content)
        write_digests(staging)
    return Path(out)
