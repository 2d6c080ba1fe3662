"""A decoder in ONNX Runtime: a folder that `export_onnx` wrote, run token by token with its cache. numpy alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eckart.support.extras import import_extra
from eckart.support.plain_data import read_json

MODEL = "model.onnx"
PAST = "past_key_values."
TYPES: dict[str, type[np.generic]] = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
# What configurations call the most positions that a model has.
POSITIONS = ("max_position_embeddings", "n_positions")


class OnnxDecoder:
    """A model with a cache, as `export_onnx` writes it, in ONNX Runtime.

    Attributes:
        session: ONNX Runtime's.
        end: ids of tokens that end a text, of generation_config.json.
        pad: the id that fills a row after its end.

    Args:
        folder: what `export_onnx` wrote.
        providers: where ONNX Runtime runs it, in its words, the first that is there.
        threads: of a processor; None leaves it to ONNX Runtime.

    Raises:
        ValueError: the extra is not installed, or the graph has no cache: it is of no decoder.
        OSError: a file is not there.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        threads: int | None = None,
    ) -> None:
        runtime = import_extra("onnxruntime", "onnx", "running an ONNX model")
        file = Path(folder) / MODEL
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no {MODEL}: give a folder that `eckart export --onnx` wrote")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = threads or 0
        self.session: Any = runtime.InferenceSession(str(file), options, providers=list(providers))
        self.inputs = {given.name: given for given in self.session.get_inputs()}
        self.past = tuple(name for name in self.inputs if name.startswith(PAST))
        if not self.past:
            raise ValueError(f"{file} has no cache of keys and values, and goes on with no text: is it an encoder?")
        config = read_json(Path(folder) / "config.json")
        self.positions = next((int(config[name]) for name in POSITIONS if config.get(name)), None)
        settings = read_json(Path(folder) / "generation_config.json")
        end = settings.get("eos_token_id")
        self.end: tuple[int, ...] = () if end is None else tuple(end) if isinstance(end, list) else (end,)
        pad = settings.get("pad_token_id")
        self.pad: int = pad if pad is not None else self.end[0] if self.end else 0

    def empty_cache(self, batch: int) -> list[NDArray[Any]]:
        """Keys and values of no token, block by block."""
        caches = []
        for name in self.past:
            _, heads, _, width = self.inputs[name].shape
            caches.append(np.zeros((batch, heads, 0, width), TYPES[self.inputs[name].type]))
        return caches

    def step(
        self, ids: NDArray[Any], mask: NDArray[Any], past: list[NDArray[Any]]
    ) -> tuple[NDArray[Any], list[NDArray[Any]]]:
        """Logits (batch, new, vocabulary) of new tokens, and the cache with them in it.

        Args:
            ids: (batch, new).
            mask: (batch, held + new): 1 where a token is, 0 where padding is, with what the cache holds.
            past: keys and values of the tokens before, (batch, heads, held, width) each.
        """
        given = {"input_ids": ids, "attention_mask": mask, **dict(zip(self.past, past, strict=True))}
        if "position_ids" in self.inputs:
            given["position_ids"] = np.maximum(mask.cumsum(-1) - 1, 0)[:, -ids.shape[1] :]
        logits, *present = self.session.run(None, given)
        return logits, present

    def generate(
        self, input_ids: ArrayLike, attention_mask: ArrayLike | None = None, *, max_new_tokens: int = 20
    ) -> NDArray[np.int64]:
        """Go on with texts, always by the likeliest token: (batch, length + what is new), as transformers gives it.

        A row that has come to an end is filled with `pad`; all ended, it stops. Nothing else of generation_config.json
        is obeyed.

        Args:
            input_ids: (batch, length), padded on the left.
            attention_mask: (batch, length), 1 where a token is; default, everywhere.
            max_new_tokens: at most so many.

        Raises:
            ValueError: other shapes, padding on the right, or more tokens than the model has positions for.
        """
        ids = np.asarray(input_ids, dtype=np.int64)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask, dtype=np.int64)
        if ids.ndim != 2 or 0 in ids.shape or mask.shape != ids.shape:
            raise ValueError(f"input_ids {ids.shape} and attention_mask {mask.shape} are not both (batch, length)")
        if not mask[:, -1].all():
            raise ValueError("a row ends in padding: pad on the left, as tokenizer(..., padding_side='left') does")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens {max_new_tokens} is not positive")
        if self.positions is not None and ids.shape[1] + max_new_tokens > self.positions:
            raise ValueError(
                f"{ids.shape[1]} tokens and {max_new_tokens} new ones are more than the {self.positions} positions of "
                "the model"
            )
        new, past, ended = ids, self.empty_cache(len(ids)), np.zeros(len(ids), dtype=bool)
        for _ in range(max_new_tokens):
            logits, past = self.step(new, mask, past)
            likeliest = np.where(ended, self.pad, logits[:, -1].argmax(-1))
            new = likeliest[:, None].astype(np.int64)
            ids = np.concatenate([ids, new], 1)
            mask = np.concatenate([mask, np.ones_like(new)], 1)
            ended |= np.isin(likeliest, self.end)
            if ended.all():
                break
        return ids
