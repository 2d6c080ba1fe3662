"""Gradients: statistics of each linear from backward passes, run for the purpose or while the model is trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.data.tokens import Tokens
from eckart.lowrank import GradientMoments
from eckart.models.sites import Site
from eckart.support.precision import in_float32
from eckart.support.progress import Track, silent

# A masked language model is asked for this share of its tokens, as in its pretraining (BERT, section 3.1).
MASKED_SHARE = 0.15
# The target that cross_entropy ignores.
UNSCORED = -100


def collect_gradients(
    model: PreTrainedModel,
    tokens: Tokens,
    sites: Sequence[Site],
    needs: frozenset[str],
    *,
    after: Tokens | None = None,
    track: Track = silent,
) -> dict[str, GradientMoments]:
    """Fisher sums and gradient covariances of every site, one sample at a time.

    The loss is of one sample, averaged over its scored tokens:
        causal language model: each next token;
        masked language model: 15 % of the tokens, masked, the same ones in every run;
        classifier: a label drawn from the model's own prediction (the true Fisher; calibration text has no labels).

    Args:
        needs: out of GRADIENT_STATISTICS.
        after: samples before these, of the same text, that another call takes: labels and masks are drawn as if they
            had been read, so that the sum over parts of a text is that of the whole.

    Raises:
        ValueError: a model without a head, or a gradient that is not finite (names the site).

    Cost: a forward and a backward pass per sample; memory of one weight's gradient at a time. Gradients in float16
    would underflow to zero: such a model is in float32 meanwhile, and takes twice its memory.
    """
    device = place_sums(model.device, sites, needs)
    collected = {site.name: GradientMoments(site.d_out, site.d_in, needs, device=device) for site in sites}
    generator = torch.Generator().manual_seed(0)
    if after is not None:
        _draw_past(model, after, generator)
    with in_float32(model, {torch.float16}), torch.enable_grad(), watching(model, collected) as scale_of:
        for ids, mask in track(tokens.batches(1), "gradients", len(tokens)):
            loss, scored = sample_loss(model, ids[mask][None], tokens.mask_token, generator)
            scale_of.tokens = scored
            loss.backward()
    return collected


def place_sums(device: torch.device | str, sites: Iterable[Site], needs: frozenset[str]) -> torch.device:
    """Where the sums are kept: on the device, or in main memory where they would take over half of what it has free.

    In main memory every product is copied there, which takes longer than the product.
    """
    device = torch.device(device)
    size = sum(site.d_out**2 for site in sites) if "gradient_covariance" in needs else 0
    if device.type == "cuda" and 8 * size <= torch.cuda.mem_get_info(device)[0] / 2:
        return device
    return torch.device("cpu")


def _draw_past(model: PreTrainedModel, tokens: Tokens, generator: torch.Generator) -> None:
    """Draw from `generator` what `sample_loss` would for each of these samples; that depends on shapes alone."""
    kind = type(model).__name__
    for mask in tokens.mask:
        if "ForSequenceClassification" in kind:
            torch.multinomial(torch.ones(1, int(model.config.num_labels or 0)), 1, generator=generator)
        elif "ForMaskedLM" in kind:
            torch.rand((1, int(mask.sum())), generator=generator)


def sample_loss(
    model: PreTrainedModel, ids: Tensor, mask_token: int | None, generator: torch.Generator
) -> tuple[Tensor, int]:
    """The loss of one sample (1, length) and the number of tokens or labels it is a mean over.

    Raises:
        ValueError: the model's class has no loss that this file knows.
    """
    ids = ids.to(model.device)
    if "ForSequenceClassification" in type(model).__name__:
        logits = model(input_ids=ids).logits.float()
        label = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
        return nn.functional.cross_entropy(logits, label.to(logits.device)), 1
    return language_loss(model, ids, torch.ones_like(ids, dtype=torch.bool), mask_token, generator)


def language_loss(
    model: PreTrainedModel,
    ids: Int[Tensor, "rows length"],
    mask: Bool[Tensor, "rows length"],
    mask_token: int | None,
    generator: torch.Generator,
) -> tuple[Tensor, int]:
    """A language model's own loss on a batch, and the number of tokens that it is a mean over; padding is in neither.

    Of a causal model each next token; of a masked one 15 % of the tokens, drawn by `generator`, and at least one of
    every row: its last, where none was drawn.

    Raises:
        ValueError: the model's class has no loss that this file knows, or there is nothing to predict.
    """
    kind = type(model).__name__
    ids, mask = ids.to(model.device), mask.to(model.device)
    attention_mask = None if bool(mask.all()) else mask.long()
    if "ForMaskedLM" in kind:
        masked, drawn = _mask_some(kind, ids, mask, mask_token, generator)
        logits = model(input_ids=masked, attention_mask=attention_mask).logits.float()
        return nn.functional.cross_entropy(logits[drawn], ids[drawn]), int(drawn.sum())
    if model.can_generate():
        scored = mask[:, :-1] & mask[:, 1:]
        if not scored.any():
            raise ValueError("a calibration sample of one token has no next token to predict")
        logits = model(input_ids=ids, attention_mask=attention_mask).logits[:, :-1].float()
        targets = ids[:, 1:].masked_fill(~scored, UNSCORED)
        # The same mean either way. A GPU is slow where the classes are not next to each other in memory.
        rows = (logits.flatten(0, 1), targets.flatten()) if logits.is_cuda else (logits.transpose(1, 2), targets)
        return nn.functional.cross_entropy(*rows, ignore_index=UNSCORED), int(scored.sum())
    raise ValueError(
        f"{kind} has no loss to take gradients of; load the model with a language-modelling or classification head"
    )


def sample_input(model: PreTrainedModel, ids: Tensor, mask_token: int | None, generator: torch.Generator) -> Tensor:
    """What `sample_loss` has the model read of a sample (1, length), for a generator in the same state."""
    kind = type(model).__name__
    if "ForMaskedLM" in kind:
        return _mask_some(kind, ids, torch.ones_like(ids, dtype=torch.bool), mask_token, generator)[0]
    return ids


def _mask_some(
    kind: str, ids: Tensor, mask: Tensor, mask_token: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The ids with some tokens masked, and which; see `language_loss`."""
    if mask_token is None:
        raise ValueError(f"{kind} is trained on masked tokens, and the tokenizer has no mask token")
    drawn = (torch.rand(ids.shape, generator=generator).to(ids.device) < MASKED_SHARE) & mask
    last = ids.shape[1] - 1 - mask.flip(1).int().argmax(1)
    drawn[torch.arange(len(ids), device=ids.device), last] |= ~drawn.any(1)
    return ids.masked_fill(drawn, mask_token), drawn


@contextmanager
def record_squares(model: PreTrainedModel, recorded: Mapping[str, GradientMoments]) -> Iterator[None]:
    """Inside, every backward pass adds the squares of dLoss/dW to `recorded`, in place; gradients stay as they are.

    For a training loop. What is recorded are squares of a mini-batch's mean gradient, along the whole trajectory: what
    FWSVD's published recipe (Hsu et al., arXiv 2207.00112) and the probing study collect while they fine-tune, without
    a further pass. It is not the Fisher information at the end of training, the mean square of each single example's
    gradient there (see `collect_gradients`): in a batch the gradients of examples cancel in part, and early steps,
    whose gradients are larger, weigh more. Of one matrix, fwsvd uses only how the sums compare with each other, so that
    a common factor changes nothing.

    The hook runs as soon as a weight's gradient is whole, so before anything clips it. Where gradients are accumulated
    over several backward passes it would see sums of the first k of them, and square those: clear gradients after each.

    Args:
        recorded: {site name: moments}, which are added to. `examples` counts backward passes.

    Raises:
        ValueError: a gradient that is not finite (names the site).

    Cost: a square and two sums per step and site, and one check of the result, which waits for the GPU.
    """
    handles = []
    try:
        for name, moments in recorded.items():
            module = model.get_submodule(name)
            weight: nn.Parameter = module.weight  # type: ignore[assignment]
            hook = _fisher_hook(name, module, moments, clear=False)
            handles.append(weight.register_post_accumulate_grad_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Scale:
    """Tokens in the mean of the current loss: per-token gradients are of the sum."""

    tokens: int = 1


@contextmanager
def watching(model: PreTrainedModel, collected: dict[str, GradientMoments]) -> Iterator[Scale]:
    """Inside, only the sites' weights have gradients; each is added to its moments and freed as soon as it exists."""
    scale = Scale()
    modules = {name: model.get_submodule(name) for name in collected}
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    handles = []
    try:
        for parameter in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, module in modules.items():
            weight: nn.Parameter = module.weight  # type: ignore[assignment]
            weight.requires_grad_(True)
            handles.append(
                weight.register_post_accumulate_grad_hook(_fisher_hook(name, module, collected[name], clear=True))
            )
            if "gradient_covariance" in collected[name].sums:
                handles.append(module.register_forward_hook(_covariance_hook(name, collected[name], scale)))
        yield scale
    finally:
        for handle in handles:
            handle.remove()
        for parameter, (required, gradient) in before.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _fisher_hook(name: str, module: nn.Module, moments: GradientMoments, *, clear: bool) -> Callable[[Tensor], None]:
    """Adds the square of a weight's gradient, as of a (d_out, d_in) weight; `clear` frees the gradient then."""

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.mT if isinstance(module, Conv1D) else parameter.grad
        try:
            moments.update_fisher(gradient)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if clear:
            parameter.grad = None

    return add


def _covariance_hook(name: str, moments: GradientMoments, scale: Scale) -> Callable[..., None]:
    def add(gradient: Tensor) -> None:
        try:
            moments.update_covariance(gradient * scale.tokens, None)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def watch(_module: nn.Module, _args: object, output: Tensor) -> None:
        output.register_hook(add)

    return watch
