"""The harness's view of a model: its own wrapper, which also checks what goes in and what comes out."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.encoding import check_vocabulary
from eckart.data.positions import usable_positions
from eckart.support.progress import Track


def make_scorer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    rows: dict[str, list[int]] | None,
    name: str,
    track: Track,
) -> Any:
    """lm_eval's HFLM of a model, with progress; a broken model or a foreign token ends the run at once.

    Args:
        rows: {task: the documents that are asked}, where not all are; for the messages.
        name: of what is evaluated, for the messages.

    Raises (when it is asked):
        ValueError: an empty prompt without a token to start from, a continuation without tokens or past the model's
            positions, a token outside the vocabulary, a likelihood or logit that is not finite.
    """
    from lm_eval.models.huggingface import HFLM

    startless = tokenizer.bos_token_id is None and tokenizer.eos_token_id is None

    class Scorer(HFLM):
        truncated = 0

        def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            self.asked = requests
            self._check_start(request for request in requests if not request.args[0])
            with self._followed(requests):
                return super().loglikelihood(requests, disable_tqdm=True)

        def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            self.asked = []  # what is scored are windows of the requests, which always fit
            self._check_start(requests)
            with self._followed(requests):
                return super().loglikelihood_rolling(requests, disable_tqdm=True)

        def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> Any:
            with self._followed(requests):
                return super().generate_until(requests, disable_tqdm=True)

        def _loglikelihood_tokens(
            self, requests: list[Any], disable_tqdm: bool = False, override_bs: int | None = None
        ) -> Any:
            for request, (_, context, continuation) in zip(self.asked, requests, strict=False):
                if not continuation:
                    raise ValueError(f"{self._place(request)}: the tokenizer makes nothing of a continuation")
                if len(continuation) > self.max_length:
                    raise ValueError(
                        f"{self._place(request)}: a continuation has {len(continuation)} tokens, "
                        f"more than the model's {self.max_length} positions"
                    )
                self.truncated += len(context) + len(continuation) > self.max_length + 1
            self._check_tokens(max(max(context + continuation) for _, context, continuation in requests))
            return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

        def tok_batch_encode(self, *args: Any, **kwargs: Any) -> Any:
            ids, mask = super().tok_batch_encode(*args, **kwargs)
            self._check_tokens(int(ids.max()))
            return ids, mask

        def _model_generate(self, *args: Any, **kwargs: Any) -> Any:
            def check(_module: Any, _inputs: Any, output: Any) -> None:
                if not torch.isfinite(output.logits[:, -1]).all():
                    raise ValueError(f"{name}: a logit is not finite; the model is broken, there is no result")

            handle = self.model.register_forward_hook(check)
            try:
                return super()._model_generate(*args, **kwargs)
            finally:
                handle.remove()

        def _check_tokens(self, largest: int) -> None:
            try:
                check_vocabulary(self.model, torch.tensor([largest]), tokenizer)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from error

        def _check_start(self, unprompted: Iterable[Any]) -> None:
            """Raises ValueError where a text without a prompt has no token to start from."""
            request = next(iter(unprompted), None)
            if request is not None and startless:
                raise ValueError(
                    f"{self._place(request)} has no prompt, and the tokenizer has neither a begin nor an end token, "
                    "one of which the harness starts it with"
                )

        def _place(self, request: Any) -> str:
            document = rows[request.task_name][request.doc_id] if rows else request.doc_id
            return f"{request.task_name}: document {document}"

        @contextmanager
        def _followed(self, requests: list[Any]) -> Iterator[None]:
            """Every answer is checked as it arrives, so that a broken model ends the run at once."""
            first = {request.args[:2]: request for request in reversed(requests) if isinstance(request.args[-1], str)}
            steps = iter(track(range(len(requests)), name, len(requests)))
            next(steps, None)

            class Follower:
                def add_partial(_self, kind: str, request: Any, answer: Any) -> None:
                    value = answer[0] if kind == "loglikelihood" else answer
                    if not isinstance(value, str) and not math.isfinite(value):
                        raise ValueError(
                            f"{self._place(first[request])} has a log-likelihood of {value}; "
                            "the model is broken, there is no result"
                        )
                    next(steps, None)

            before = self.cache_hook
            self.set_cache_hook(Follower())
            try:
                yield
            finally:
                self.set_cache_hook(before)
                if hasattr(steps, "close"):
                    steps.close()

    # It decodes its start token for every prompt; where there is none any other serves, since no prompt is empty.
    start = 0 if startless else None
    # The harness gives a tokenizer without a pad token one; that stays with the copy.
    return Scorer(
        pretrained=model,
        tokenizer=copy.deepcopy(tokenizer),
        backend="causal",
        batch_size=batch_size,
        prefix_token_id=start,
        max_length=usable_positions(model),  # it would not look where all models have it
    )
