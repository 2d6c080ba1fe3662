"""Source: where a worker finds the model that this process has, and how it knows that it is the same."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel

from eckart.models.loading import load_model
from eckart.runs.engine.cluster import machine
from eckart.support.fingerprint import sketch


@dataclass(frozen=True)
class Source:
    """A model by its place.

    Attributes:
        path: a directory or a GGUF file that every machine sees, or a hub name.
        dtype: of its weights.
        sketch: of the model, see `fingerprint.sketch`.
        trust_remote_code: its class is of code that came with the files, which this process was told to run.
    """

    path: str
    dtype: str
    sketch: str
    trust_remote_code: bool = False

    @classmethod
    def of(cls, model: PreTrainedModel) -> Source:
        """Where this model was loaded from.

        Raises:
            ValueError: it was made in memory, or is on a GPU, and workers compute on the CPU.
        """
        path = str(model.name_or_path)
        if not path:
            raise ValueError(
                f"this {type(model).__name__} was made in memory, where no worker can find it: save it first"
            )
        if model.device.type != "cpu":
            raise ValueError(f"the workers of a cluster compute on the CPU, and the model is on {model.device}")
        if Path(path).exists():
            path = str(Path(path).resolve())
        return cls(path, str(model.dtype).removeprefix("torch."), sketch(model), model.is_remote_code())

    def load(self) -> PreTrainedModel:
        """The model, for reading: a process that asks again gets the one that it has.

        Raises:
            ValueError: this machine does not have it, or has another one there; names the machine and the path.
        """
        return _loaded(self)

    def load_own(self) -> PreTrainedModel:
        """The model, for changing. Raises ValueError as `load`."""
        try:
            model = load_model(self.path, dtype=self.dtype, trust_remote_code=self.trust_remote_code)
        except ValueError as error:
            raise ValueError(
                f"{machine()}: {error}; every machine of the cluster has to find the model at {self.path}, in a folder "
                "that they share or in its own copy of the hub"
            ) from error
        if sketch(model) != self.sketch:
            raise ValueError(f"{machine()}: the model at {self.path} is not the one that the run was started with")
        return model


# Two: the one that is measured, and the one that it is compared with.
@functools.lru_cache(maxsize=2)
def _loaded(source: Source) -> PreTrainedModel:
    return source.load_own()
