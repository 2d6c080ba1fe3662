"""Shards: a model's safetensors files, read and written block by block, so that one block is in memory at a time.

A `Skeleton` is the model without its weights: every parameter of its blocks is on the meta device, which has shapes and
no numbers; everything around the blocks (embeddings, norms, heads, rotary tables) is in memory. A block is filled
from the files, used, and emptied.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from accelerate.utils import set_module_tensor_to_device  # type: ignore[import-untyped]
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import local_torch_dtype
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME

from eckart.models.checkpoint import put_back
from eckart.models.coded import CodedMatrix, CompressedLinear
from eckart.models.experts import Source, open_experts, opened_experts, sources_of
from eckart.models.loading import check_weights, class_of, locate, read_config
from eckart.models.matching import check_finite, made_anew, stored_names
from eckart.models.refusals import check_quantised, check_source
from eckart.models.sites import block_names, blocks_of, stacks_of
from eckart.models.weight_files import (
    CONFIG,
    INDEX,
    CheckpointError,
    damaged,
    read_header,
    read_index,
    some_of,
    verify,
    weight_files,
)
from eckart.support.files import check_room, digest_of, whole_file, write_whole

FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
# Files of a model on the hub that are not weights: configuration and tokenizer.
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja")
# Bytes of a file that its fingerprint reads, at as many places: weights that differ at all differ nearly everywhere.
SAMPLED, PLACES = 4096, 64


class Shards:
    """The safetensors files of one model.

    Attributes:
        folder: where they are.
        files: {stored name: file}.
        shapes: {stored name: shape}.
        types: {stored name: its type, as safetensors spells it}.
        spans: {stored name: (first byte, the one after the last)} in its file.

    Raises:
        ValueError: there is no model, or none in safetensors files.
        CheckpointError: a file that the index names is missing, damaged or cut short; the message names it.
    """

    def __init__(self, path: str | Path) -> None:
        path = locate(path)
        folder = Path(path)
        if not folder.is_dir():
            try:
                folder = Path(snapshot_download(str(path), allow_patterns=list(COMPANIONS)))
                # Only the files that the index names: there may be copies of the weights in other formats.
                names = read_index(folder / INDEX) if (folder / INDEX).is_file() else [SAFE_WEIGHTS_NAME]
                snapshot_download(str(path), allow_patterns=names)
            except CheckpointError:
                raise
            except (OSError, ValueError) as error:
                raise ValueError(
                    f"cannot load the model {path}: no such directory, and the hub did not give it "
                    f"({str(error).splitlines()[0]})"
                ) from error
        self.folder = folder
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.types: dict[str, str] = {}
        self.spans: dict[str, tuple[int, int]] = {}
        for file in self.paths:
            shapes = {name: stored.shape for name, stored in read_header(file).items()}
            self.shapes |= shapes
            self.files |= dict.fromkeys(shapes, file)
            start, header = _read_header(file)
            for name in shapes:
                self.types[name] = header[name]["dtype"]
                begin, end = header[name]["data_offsets"]
                self.spans[name] = (start + begin, start + end)

    @property
    def paths(self) -> list[Path]:
        """Every file, once."""
        files = weight_files(self.folder)
        if files and files[0].suffix == ".safetensors":
            return files
        others = sorted(file.name for file in self.folder.glob("*.bin"))
        hint = f"; {others[0]} is of an older format: load the model and save it again" if others else ""
        raise ValueError(f"{self.folder} has neither {SAFE_WEIGHTS_NAME} nor {INDEX}{hint}")

    def fingerprint(self) -> str:
        """A digest of the configuration and the files: names, lengths, headers, and a sample of their bytes.

        Cost: a quarter of a megabyte read of each file, however long.
        """
        state = hashlib.sha256((self.folder / "config.json").read_bytes())
        state.update(json.dumps([self.shapes, self.types, self.spans], sort_keys=True).encode())
        for file in self.paths:
            size = file.stat().st_size
            state.update(f"{file.name} {size}".encode())
            with file.open("rb") as stream:
                for place in range(PLACES):
                    stream.seek(place * max(size - SAMPLED, 0) // (PLACES - 1))
                    state.update(stream.read(SAMPLED))
        return state.hexdigest()[:32]

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """(name, tensor) of each, in memory of its own.

        The file is opened for each anew: it is mapped, and what was read of it counts as resident until it is closed.

        Raises:
            CheckpointError: a file cannot be read.
        """
        for name in sorted(names, key=lambda name: (self.files[name], self.spans[name])):
            file = self.files[name]
            try:
                with safe_open(file, framework="pt") as tensors:
                    tensor = tensors.get_tensor(name).clone()
            except (OSError, SafetensorError) as error:
                raise damaged(file, error) from error
            yield name, tensor

    def read_ahead(self, names: Sequence[str]) -> None:
        """Ask the system to have these tensors at hand soon; nothing where it cannot be asked."""
        if hasattr(os, "posix_fadvise"):
            for name in names:
                begin, end = self.spans[name]
                with self.files[name].open("rb") as stream:
                    os.posix_fadvise(stream.fileno(), begin, end - begin, os.POSIX_FADV_WILLNEED)


class Skeleton:
    """A model whose blocks have their weights only while they are used.

    Attributes:
        model: in eval mode, in the class that its config names.
        shards: where its tensors are.
        blocks: of the model. places: their names.

    Args:
        path, dtype: as in `load_model`.
        device: of the tensors that are in memory.

    Raises:
        ValueError, CheckpointError: as `Shards`; or a tensor that the model has is in no file, or has another shape.
        UnsupportedModelError: the config names no architecture that transformers has, or the model is compressed.
    """

    def __init__(
        self, path: str | Path, *, dtype: str = "auto", device: str = "cpu", trust_remote_code: bool = False
    ) -> None:
        check_source(locate(path), trust_remote_code=trust_remote_code)
        self.shards = Shards(path)
        folder = self.shards.folder
        config = read_config(folder, trust_remote_code=trust_remote_code)
        model_class = class_of(config, folder, trust_remote_code=trust_remote_code)
        check_quantised(config, path)
        check_weights(folder, model_class, trust_remote_code=trust_remote_code)
        verify(folder, {CONFIG, INDEX, *(file.name for file in self.shards.paths)})
        as_stored: Any = config.dtype or self._stored_type()
        self.dtype: torch.dtype = as_stored if dtype == "auto" else getattr(torch, dtype)
        self.device = torch.device(device)
        config.dtype = self.dtype
        with init_empty_weights(include_buffers=False), local_torch_dtype(self.dtype, model_class.__name__):
            self.model: PreTrainedModel = model_class(config)
        self.model.eval()
        for name, parameter in self.model.named_parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(self._type_of(name))
        if (self.shards.folder / GENERATION_CONFIG_NAME).is_file():
            self.model.generation_config = GenerationConfig.from_pretrained(self.shards.folder)
        open_experts(self.model)
        self.blocks, self.places = blocks_of(self.model), block_names(self.model)
        self.experts: dict[str, Source] = {}
        self.made = made_anew(self.model)
        self.names = self._find_names()
        self.fill(name for name in self.names if not self._is_in_block(name))
        self._make()
        self.model.tie_weights()
        self._check_whole()

    def _stored_type(self) -> torch.dtype:
        """The first float tensor's."""
        return next((FLOATS[kind] for kind in self.shards.types.values() if kind in FLOATS), torch.float32)

    def _find_names(self) -> dict[str, str]:
        """{name of a parameter or a stored buffer: stored name}.

        Raises:
            CheckpointError: a tensor is missing or has another shape; one message with all of them.
        """
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        stored = stored_names(self.model, self.shards.files)
        prefix = f"{self.model.base_model_prefix}."
        names, complaints = {}, []
        parameters = {name for name, _ in self.model.named_parameters()}
        self.experts, experts = sources_of(self.model, stored), opened_experts(self.model)
        for name, tensor in self.model.state_dict().items():
            if name not in parameters and name.rpartition(".")[0] in experts:
                continue  # the empty tensors under the keys of closed experts
            if name in self.experts:
                shape = self.experts[name].shape(self.shards.shapes)
                if shape != tuple(tensor.shape):
                    complaints.append(f"{name} has shape {shape}, expected {tuple(tensor.shape)}")
                names[name] = self.experts[name].keys[0]
                continue
            key = stored.get(name.removeprefix(prefix))
            if key is None:
                if name in parameters and name not in tied and name not in self.made:
                    complaints.append(f"missing tensor {name}")
            elif self.shards.shapes[key] != tuple(tensor.shape):
                complaints.append(f"{name} has shape {self.shards.shapes[key]}, expected {tuple(tensor.shape)}")
            elif name not in tied:
                names[name] = key
        if complaints:
            raise CheckpointError(
                f"{self.shards.folder} does not hold the model: {some_of(complaints)}. Save or download it again"
            )
        return names

    def fill(self, names: Iterable[str]) -> None:
        """Read these tensors of the model from the files.

        Raises:
            CheckpointError: a file cannot be read, or a tensor has numbers that are not finite.
        """
        names = list(names)
        stored = {self.names[name]: name for name in names if name not in self.experts}
        for key, tensor in self.shards.read(list(stored)):
            self._put(stored[key], tensor)
        # Of experts some tensors are of several linears, and some linears of several tensors.
        by_keys: dict[tuple[str, ...], list[str]] = {}
        for name in names:
            if name in self.experts:
                by_keys.setdefault(self.experts[name].keys, []).append(name)
        for keys, linears in by_keys.items():
            tensors = dict(self.shards.read(keys))
            for name in linears:
                self._put(name, self.experts[name].make(tensors))

    def _put(self, name: str, tensor: Tensor) -> None:
        """Give a tensor of the model its numbers."""
        check_finite(str(self.shards.folder), [(name, tensor)])
        kind = self._type_of(name) if tensor.is_floating_point() else tensor.dtype
        set_module_tensor_to_device(self.model, name, self.device, value=tensor, dtype=kind)

    def _type_of(self, name: str) -> torch.dtype:
        """The type of a float tensor: transformers keeps some in float32, such as T5's `wo` of a model in float16."""
        plan = self.model._get_dtype_plan(self.dtype)  # noqa: SLF001 (what `from_pretrained` goes by)
        return next((kind for pattern, kind in plan.items() if re.search(pattern.replace("*", ".*"), name)), self.dtype)

    def _make(self) -> None:
        """Compute what no file has."""
        for name in self.made - self.names.keys():
            module, _, own = name.rpartition(".")
            shape = self.model.get_parameter(name).shape
            set_module_tensor_to_device(self.model, name, self.device, value=torch.empty(shape, dtype=self.dtype))
            holder = self.model.get_submodule(module)
            getattr(holder, own).requires_grad_(False)
            self.model._init_weights(holder)  # noqa: SLF001 (what fills it where a model is loaded)

    def _check_whole(self) -> None:
        for name, parameter in self.model.named_parameters():
            if parameter.device.type == "meta" and not self._is_in_block(name):
                raise CheckpointError(f"{self.shards.folder} does not hold the model: missing tensor {name}")
        for name, buffer in list(self.model.named_buffers()):
            if buffer.device != self.device:
                set_module_tensor_to_device(self.model, name, self.device, value=buffer)

    def _is_in_block(self, name: str) -> bool:
        return any(name.startswith(f"{place.rpartition('.')[0]}.") for place in (self.places[0], self.places[-1]))

    def names_of(self, number: int) -> list[str]:
        """Parameters and stored buffers of a block."""
        return [name for name in self.names if name.startswith(f"{self.places[number]}.")]

    def _keys_of(self, names: Iterable[str]) -> list[str]:
        """Where the files have these, each once."""
        keys = (self.experts[name].keys if name in self.experts else (self.names[name],) for name in names)
        return list(dict.fromkeys(key for some in keys for key in some))

    @contextmanager
    def resident(self, number: int) -> Iterator[nn.Module]:
        """Inside, the block has its weights; afterwards they are gone, those of modules put into it as well."""
        names = self.names_of(number)
        try:
            self.fill(names)
            if number + 1 < len(self.blocks):
                self.shards.read_ahead(self._keys_of(self.names_of(number + 1)))
            yield self.blocks[number]
        finally:
            self.empty(number)

    @contextmanager
    def first_resident(self) -> Iterator[list[nn.Module]]:
        """Inside, the first block has its weights; of an encoder-decoder, the encoder's first and the decoder's."""
        starts = accumulate([0, *(len(blocks) for blocks in stacks_of(self.model)[:-1])])
        with ExitStack() as stack:
            yield [stack.enter_context(self.resident(number)) for number in starts]

    def empty(self, number: int) -> None:
        """Free the weights of a block, in place: parameters, buffers that are read for it, and those of new modules.

        Other buffers stay, such as tables of positions: nothing would make them again.
        """
        read = set(self.names_of(number))
        for path, module in self.blocks[number].named_modules(prefix=self.places[number]):
            is_new = isinstance(module, CompressedLinear | CodedMatrix)
            buffers = [
                (name, buffer)
                for name, buffer in module.named_buffers(recurse=False)
                if is_new or f"{path}.{name}" in read
            ]
            for name, tensor in [*module.named_parameters(recurse=False), *buffers]:
                if tensor.device.type != "meta":
                    set_module_tensor_to_device(module, name, "meta")

    def put_back(self, path: Path, sites: Mapping[str, Mapping[str, Any]]) -> None:
        """Replace linears of a block that is resident by those of its shard, see `checkpoint.put_back`.

        Args:
            path: what `write_shard` made of the block's `tensors_of`. sites: its rank map.
        """
        prefix = f"{self.model.base_model_prefix}."
        tensors = {}
        with safe_open(path, framework="pt") as file:
            stored = stored_names(self.model, file.keys())
            for name in sites:
                for key in [key for key in stored if key.startswith(f"{name.removeprefix(prefix)}.")]:
                    rest = key.removeprefix(f"{name.removeprefix(prefix)}.")
                    tensors[f"{name}.{rest}"] = file.get_tensor(stored[key]).to(self.device, copy=True)
        put_back(self.model, sites, tensors)

    def tensors_of(self, number: int) -> dict[str, Tensor]:
        """{name in a file: tensor} of a block that is resident, in its present state."""
        state = self.blocks[number].state_dict(prefix=f"{self.places[number]}.")
        return dict(revert_weight_conversion(self.model, state))

    def tensors_around(self) -> dict[str, Tensor]:
        """{name in a file: tensor} of everything stored outside the blocks, tied ones once."""
        state = self.model.state_dict()
        around = {name: state[name] for name in self.names if not self._is_in_block(name)}
        return dict(revert_weight_conversion(self.model, around))


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file whole or not at all, even if the power fails; returns its SHA-256.

    Raises:
        OSError: the disk is full, or the folder cannot be written; no part of the file remains.
    """
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    check_room(path.parent, size, path.name)
    try:
        with whole_file(path) as partial:
            save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, partial, {"format": "pt"})
            with partial.open("r+b") as stream:
                os.fsync(stream.fileno())
            return digest_of(partial)
    except (OSError, SafetensorError) as error:
        raise OSError(f"cannot write {path}, {size:,} bytes ({error}); what was finished before is kept") from error


def _read_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Of a safetensors file: where its tensors begin, and {name: type and byte range}."""
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        return 8 + length, json.loads(stream.read(length))


def write_index(folder: Path, files: Mapping[str, Sequence[str]], total: int) -> None:
    """The index that says which file holds which tensor.

    Args:
        files: {file name: names of its tensors}. total: bytes of all of them.
    """
    file_of = {tensor: file for file, tensors in files.items() for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
    write_whole(folder / INDEX, json.dumps(index, indent=2) + "\n")
