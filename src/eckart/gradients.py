"""Gradients: what one backward pass per sample tells about each linear."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.lowrank import GradientMoments
from eckart.models.sites import Site
from eckart.precision import in_float32
from eckart.tokens import Tokens
from eckart.tracking import Track, silent

# A masked language model is asked for this share of its tokens, as in its pretraining (BERT, section 3.1).
MASKED_SHARE = 0.15


def collect_gradients(
    model: PreTrainedModel,
    tokens: Tokens,
    sites: Sequence[Site],
    needs: frozenset[str],
    *,
    track: Track = silent,
) -> dict[str, GradientMoments]:
    """Fisher sums and gradient covariances of every site, one sample at a time.

    The loss is of one sample, averaged over its scored tokens:
        causal language model: each next token;
        masked language model: 15 % of the tokens, masked, the same ones in every run;
        classifier: a label drawn from the model's own prediction (the true Fisher; calibration text has no labels).

    Args:
        needs: out of GRADIENT_STATISTICS.

    Raises:
        ValueError: a model without a head, or a gradient that is not finite (names the site).

    Cost: a forward and a backward pass per sample; memory of one weight's gradient at a time. Gradients in float16
    would underflow to zero: such a model is in float32 meanwhile, and takes twice its memory.
    """
    collected = {site.name: GradientMoments(site.d_out, site.d_in, needs) for site in sites}
    generator = torch.Generator().manual_seed(0)
    with in_float32(model, {torch.float16}), torch.enable_grad(), _watching(model, collected) as scale_of:
        for ids, mask in track(tokens.batches(1), "gradients", len(tokens)):
            loss, scored = sample_loss(model, ids[mask][None], tokens.mask_token, generator)
            scale_of.tokens = scored
            loss.backward()
    return collected


def sample_loss(
    model: PreTrainedModel, ids: Tensor, mask_token: int | None, generator: torch.Generator
) -> tuple[Tensor, int]:
    """The loss of one sample (1, length) and the number of tokens or labels it is a mean over.

    Raises:
        ValueError: the model's class has no loss that this file knows.
    """
    kind = type(model).__name__
    ids = ids.to(model.device)
    if "ForSequenceClassification" in kind:
        logits = model(input_ids=ids).logits.float()
        label = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        return nn.functional.cross_entropy(logits, label.to(logits.device)), 1
    if "ForMaskedLM" in kind:
        chosen = torch.rand(ids.shape, generator=generator).to(ids.device) < MASKED_SHARE
        chosen[:, -1] |= ~chosen.any()
        if mask_token is None:
            raise ValueError(f"{kind} is trained on masked tokens, and the tokenizer has no mask token")
        logits = model(input_ids=ids.masked_fill(chosen, mask_token)).logits.float()
        return nn.functional.cross_entropy(logits[chosen], ids[chosen]), int(chosen.sum())
    if model.can_generate():
        if ids.shape[1] < 2:
            raise ValueError("a calibration sample of one token has no next token to predict")
        logits = model(input_ids=ids).logits[:, :-1].float()
        return nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:]), ids.shape[1] - 1
    raise ValueError(
        f"{kind} has no loss to take gradients of; load the model with a language-modelling or classification head"
    )


class _Scale:
    """Tokens in the mean of the current loss: per-token gradients are of the sum."""

    tokens: int = 1


@contextmanager
def _watching(model: PreTrainedModel, collected: dict[str, GradientMoments]) -> Iterator[_Scale]:
    """Inside, only the sites' weights have gradients; each is added to its moments and freed as soon as it exists."""
    scale = _Scale()
    wanted = {name: model.get_submodule(name) for name in collected}
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    handles = []
    try:
        for parameter in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, module in wanted.items():
            weight: nn.Parameter = module.weight  # type: ignore[assignment]
            weight.requires_grad_(True)
            handles.append(weight.register_post_accumulate_grad_hook(_fisher_hook(name, module, collected[name])))
            if "gradient_covariance" in collected[name].sums:
                handles.append(module.register_forward_hook(_covariance_hook(name, collected[name], scale)))
        yield scale
    finally:
        for handle in handles:
            handle.remove()
        for parameter, (required, gradient) in before.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _fisher_hook(name: str, module: nn.Module, moments: GradientMoments) -> Callable[[Tensor], None]:
    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.mT if isinstance(module, Conv1D) else parameter.grad
        try:
            moments.update_fisher(gradient)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        parameter.grad = None

    return add


def _covariance_hook(name: str, moments: GradientMoments, scale: _Scale) -> Callable[..., None]:
    def add(gradient: Tensor) -> None:
        try:
            moments.update_covariance(gradient * scale.tokens, None)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def watch(_module: nn.Module, _args: object, output: Tensor) -> None:
        output.register_hook(add)

    return watch
