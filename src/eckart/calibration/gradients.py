"""Gradients: statistics of each linear from backward passes, run for the purpose or while the model is trained."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput
from transformers.pytorch_utils import Conv1D

from eckart.calibration.calls import Tail, run_through, standing_in, without_cache
from eckart.calibration.unfinished import Unfinished
from eckart.calibration.walk import summing_inputs
from eckart.calibration.weights import Late, blank_gradients
from eckart.data.pairs import arguments_of, is_encoder_decoder
from eckart.data.tokens import Rows, Tokens
from eckart.lowrank import GradientMoments, InputMoments
from eckart.lowrank.moments import FISHER
from eckart.models.sites import Site, find_sites, first_readers, stacks_of
from eckart.support.memory import give_back
from eckart.support.precision import in_float32
from eckart.support.progress import Track, silent

# A masked language model is asked for this share of its tokens, as in its pretraining (BERT, section 3.1).
MASKED_SHARE = 0.15
# The target that cross_entropy ignores.
UNSCORED = -100
ONE_TOKEN = "a calibration sample of one token has no next token to predict"
# Bytes of activations that are kept for one backward pass, and of logits that exist at a time.
ACTIVATIONS = 2**30
LOGITS = 2**25


def collect_gradients(
    model: PreTrainedModel,
    tokens: Tokens,
    sites: Sequence[Site],
    needs: frozenset[str],
    *,
    after: Tokens | None = None,
    samples: int | None = None,
    inputs: Mapping[str, InputMoments] | None = None,
    unfinished: Path | None = None,
    track: Track = silent,
) -> dict[str, GradientMoments]:
    """Fisher sums, where they are needed, and gradient covariances of every site; see `Loss` for what of.

    Args:
        needs: out of GRADIENT_STATISTICS.
        after: samples before these, of the same text, that another call takes: labels and masks are drawn as if they
            had been read, so that the sum over parts of a text is that of the whole.
        samples: of the whole text, where these are a part of it.
        inputs: {input group of the sites: moments}; the same passes add to these, in place, by what tokens weigh where
            that is needed. Not of a model that does not `read_as_it_is`.
        unfinished: a file of this pass alone, see `Unfinished`: the sums so far, written now and then, and gone on from
            where it is there. It stays when the pass is over. Not with `after`.

    Raises:
        ValueError: a model without a head, an input or a gradient that is not finite (names the group or site).

    Cost: a forward and a backward pass of each sample. Covariances alone need no gradient of a weight, and take short
    samples together. Fisher sums need the gradients of one sample at a time, and memory of one weight's. Gradients in
    float16 would underflow to zero: such a model is in float32 meanwhile, and takes twice its memory.
    """
    if not sites:
        return {}
    device = place_sums(model.device, sites, needs)
    before, length = 0 if after is None else len(after), tokens.ids.shape[1]
    collected = blank_gradients(sites, needs, (samples or before + len(tokens)) * length, device)
    loss = Loss(model, tokens.mask_token)
    if after is not None:
        loss.draw_past(after)
    known = inputs or {}
    batches = rows_of_one_length(tokens, rows_together(model, needs))
    kept = None if unfinished is None else Unfinished(unfinished, [len(rows.ids) for rows in batches])
    done = 0 if kept is None else kept.restore(collected, known)
    if done:
        loss.draw_past(tokens.take(slice(sum(len(rows.ids) for rows in batches[:done]))))
    first = first_readers(sites)
    late = Late(sites, known, collected)
    readers = {group: first[group].name for group in known if group not in late.readers}
    of_source = {group for group, site in first.items() if site.of_source}
    with (
        in_float32(model, {torch.float16}),
        watching(model, collected, {site.name for site in sites if site.of_source}) as scale,
        summing_inputs(model, readers, known, of_source) as expect,
        late.held(model),
    ):
        todo = batches[done:]
        for number, rows in enumerate(track(todo, "gradients", len(todo)), done + 1):
            batch = loss.ask(rows)
            expect(rows)
            with torch.enable_grad():
                hidden, tail = run_through(model, batch.read)
            give_back()
            gradient = loss.gradient(hidden.detach(), tail, batch)
            scale.scored = batch.scored
            scale.places = partial(places_of, tokens, rows, before * length)
            give_back()
            hidden.backward(gradient)
            late.add(rows, scale.places)
            del hidden, gradient
            give_back()
            if kept is not None:
                kept.keep(number, collected, known)
    count_examples(collected, len(tokens.ids))
    late.level()
    return collected


def count_examples(collected: Mapping[str, GradientMoments], samples: int) -> None:
    """Have Fisher sums be of all samples, in place: one in which an expert is given no token has no gradient of it."""
    for moments in collected.values():
        if moments.keeps_fisher:
            moments.examples = samples


def read_as_it_is(model: PreTrainedModel) -> bool:
    """Whether `collect_gradients` has the model read the text as it is, in its own type.

    Not so of a masked language model, nor of one in float16.
    """
    return not _is_masked(model) and model.dtype != torch.float16


def place_sums(device: torch.device | str, sites: Iterable[Site], needs: frozenset[str]) -> torch.device:
    """Where the sums are kept: on the device, or in main memory where they would take over half of what it has free.

    In main memory every product is copied there, which takes longer than the product.
    """
    device = torch.device(device)
    size = sum(site.d_out**2 for site in sites) if "gradient_covariance" in needs else 0
    if device.type == "cuda" and 4 * size <= torch.cuda.mem_get_info(device)[0] / 2:
        return device
    return torch.device("cpu")


def rows_together(model: PreTrainedModel, needs: frozenset[str]) -> Callable[[int], int]:
    """How many samples of a length may be in one backward pass: {length: rows}, by the memory of their activations.

    One where the square of each one's gradient is needed; and of a decoder with a head for classes that has no token
    for padding, which reads no more.
    """
    alone = FISHER & needs or (_is_classifier(model) and model.config.get_text_config().pad_token_id is None)
    # What is kept for the backward pass is about what the linears read and give.
    size = sum(site.d_in + site.d_out for site in find_sites(model)) * torch.finfo(model.dtype).bits // 8
    return lambda length: 1 if alone else max(1, ACTIVATIONS // (size * max(1, length)))


def rows_of_one_length(tokens: Tokens, together: Callable[[int], int]) -> list[Rows]:
    """The samples in order, without their padding: those that follow each other and are of one length in one batch.

    Of pairs, sources and targets are each of one length.
    """
    batches: list[Rows] = []

    def lengths(row: int) -> tuple[int, int | None]:
        mask = tokens.mask[row]
        return int(mask.sum()), None if tokens.split is None else int(mask[: tokens.split].sum())

    for (length, split), alike in groupby(range(len(tokens)), lengths):
        numbers = [*alike]
        ids = torch.stack([tokens.ids[row][tokens.mask[row]] for row in numbers])
        whole = replace(tokens.take(torch.tensor(numbers)), ids=ids, mask=torch.ones_like(ids).bool(), split=split)
        batches += [rows._replace(first=numbers[0] + rows.first) for rows in whole.rows(together(length))]
    return batches


@dataclass(frozen=True)
class Batch:
    """Some samples of one length, without padding, as the model is asked for them.

    Attributes:
        read: what the model reads, some of the ids masked for a masked language model.
        targets: the token to predict at each place, UNSCORED where there is none; None of a classifier. Those of an
            encoder-decoder stand where its decoder reads the token before each.
        scored: how many tokens or labels a sample's loss is a mean over, for each sample.
    """

    read: Rows
    targets: Int[Tensor, "rows length"] | None
    scored: list[int]


class Loss:
    """The loss of calibration samples, in order, and its gradient:

        causal language model: of each next token;
        masked language model: of 15 % of the tokens, masked, the same ones in every run;
        encoder-decoder: of each token of the target;
        classifier: of a label drawn from the model's own prediction (the true Fisher; calibration text has no labels).

    It is summed over tokens, so that the gradient at a token is that of its own sample, whatever samples are in the
    batch with it.
    """

    def __init__(self, model: PreTrainedModel, mask_token: int | None) -> None:
        self.model, self.mask_token = model, mask_token
        self.generator = torch.Generator().manual_seed(0)

    def draw_past(self, tokens: Tokens) -> None:
        """Draw what would be drawn for these samples; that depends on shapes alone."""
        for mask in tokens.mask:
            if _is_classifier(self.model):
                odds = torch.ones(1, int(self.model.config.num_labels or 0))
                torch.multinomial(odds, 1, generator=self.generator)
            elif _is_masked(self.model):
                torch.rand((1, int(mask.sum())), generator=self.generator)

    def ask(self, rows: Rows) -> Batch:
        """What the model is asked for in some samples. Draws the masks of a masked language model, row by row.

        Raises:
            ValueError: the model's class has no loss that this file knows, or there is nothing to predict.
        """
        ids = rows.ids.to(self.model.device)
        rows = rows._replace(ids=ids)
        if rows.split is not None:
            _check_loss(self.model)
            targets = ids.clone()
            targets[:, : rows.split] = UNSCORED
            return Batch(rows, targets, [ids.shape[1] - rows.split] * len(ids))
        if _is_classifier(self.model):
            return Batch(rows, None, [1] * len(ids))
        if _is_masked(self.model):
            kind, whole = type(self.model).__name__, torch.ones_like(ids[:1], dtype=torch.bool)
            each = [_mask_some(kind, row[None], whole, self.mask_token, self.generator) for row in ids]
            read, drawn = (torch.cat(parts) for parts in zip(*each, strict=True))
            return Batch(rows._replace(ids=read), ids.masked_fill(~drawn, UNSCORED), drawn.sum(1).tolist())
        _check_loss(self.model)
        if ids.shape[1] < 2:
            raise ValueError(ONE_TOKEN)
        targets = nn.functional.pad(ids[:, 1:], (0, 1), value=UNSCORED)
        return Batch(rows, targets, [ids.shape[1] - 1] * len(ids))

    def gradient(self, hidden: Float[Tensor, "rows length width"], tail: Tail, batch: Batch) -> Tensor:
        """dLoss/d(hidden) at what the last block gives. Draws the labels of a classifier, row by row.

        Of a language model the places that are scored go through the head alone, some at a time: what follows the
        last block, the final norm and the head, works on each token by itself.

        Args:
            tail: what the last block gives after the hidden states.
        """
        if batch.targets is None:
            with self._head(hidden, tail, batch.read.ids) as (leaf, logits):
                odds = logits.detach().float().softmax(-1)
                labels = torch.cat([torch.multinomial(row[None], 1, generator=self.generator) for row in odds.cpu()])
                slope = odds.scatter_add(-1, labels.to(odds.device), torch.full_like(odds, -1.0))
                logits.backward(slope.to(logits))
            return gradient_of(leaf)
        gradient = torch.zeros_like(hidden).flatten(0, 1)
        places = (batch.targets.flatten() != UNSCORED).nonzero()[:, 0]
        vocabulary = cast(nn.Embedding, self.model.get_input_embeddings()).num_embeddings
        longest = hidden.shape[1] - (batch.read.split or 0)
        together = min(longest, max(1, LOGITS // (4 * vocabulary)))
        for some in places.split(together):
            # As one sample, which is no longer than those that the model was given.
            rows, ids = (whole.flatten(0, 1)[some][None] for whole in (hidden, batch.read.ids))
            with self._head(rows, tail, ids) as (leaf, logits):
                slope = logits.detach().float().softmax(-1)
                slope[0, torch.arange(len(some)), batch.targets.flatten()[some]] -= 1
                logits.backward(slope.to(logits))
            gradient[some] = gradient_of(leaf)[0]
        return gradient.view_as(hidden)

    @contextmanager
    def _head(self, hidden: Tensor, tail: Tail, ids: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(the hidden states as a leaf, the logits that the model makes of them)."""
        leaf = hidden.detach().requires_grad_()
        given: dict[str, Any] = {"input_ids": ids}
        if is_encoder_decoder(self.model):
            encoded = hidden.new_zeros(len(ids), 1, hidden.shape[-1])  # which the blocks that stand in do not read
            given = {"encoder_outputs": BaseModelOutput(last_hidden_state=encoded), "decoder_input_ids": ids}
        with torch.enable_grad(), standing_in(stacks_of(self.model)[-1], leaf, tail):
            yield leaf, self.model(**given, **without_cache(self.model)).logits


def gradient_of(leaf: Tensor) -> Tensor:
    """The gradient that a backward pass left at a tensor."""
    assert leaf.grad is not None
    return leaf.grad


def _is_classifier(model: PreTrainedModel) -> bool:
    return "ForSequenceClassification" in type(model).__name__


def _is_masked(model: PreTrainedModel) -> bool:
    return "ForMaskedLM" in type(model).__name__


def _check_loss(model: PreTrainedModel) -> None:
    """Raises ValueError where this file knows no loss of the model."""
    if not model.can_generate():
        raise ValueError(
            f"{type(model).__name__} has no loss to take gradients of; load the model with a language-modelling or "
            "classification head"
        )


def language_loss(
    model: PreTrainedModel,
    ids: Int[Tensor, "rows length"],
    mask: Bool[Tensor, "rows length"],
    mask_token: int | None,
    generator: torch.Generator,
    split: int | None = None,
    sound: Tensor | None = None,
) -> tuple[Tensor, int]:
    """A language model's own loss on a batch, and the number of tokens that it is a mean over; padding is in neither.

    Of a causal model each next token; of an encoder-decoder each token of the targets; of a masked one 15 % of the
    tokens, drawn by `generator`, and at least one of every row: its last, where none was drawn.

    Args:
        split, sound: of pairs, as `Rows` has them.

    Raises:
        ValueError: the model's class has no loss that this file knows, or there is nothing to predict.
    """
    if split is not None:
        _check_loss(model)
        logits = model(**arguments_of(model, Rows(ids, mask, split, sound))).logits.float()
        targets, real = (side[:, split:].to(model.device) for side in (ids, mask))
        targets = targets.masked_fill(~real, UNSCORED)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=UNSCORED)
        return loss, int(real.sum())
    ids, mask = ids.to(model.device), mask.to(model.device)
    attention_mask = None if bool(mask.all()) else mask.long()
    if _is_masked(model):
        masked, drawn = _mask_some(type(model).__name__, ids, mask, mask_token, generator)
        logits = model(input_ids=masked, attention_mask=attention_mask).logits.float()
        return nn.functional.cross_entropy(logits[drawn], ids[drawn]), int(drawn.sum())
    _check_loss(model)
    scored = mask[:, :-1] & mask[:, 1:]
    if not scored.any():
        raise ValueError(ONE_TOKEN)
    logits = model(input_ids=ids, attention_mask=attention_mask).logits.float()
    targets = nn.functional.pad(ids[:, 1:].masked_fill(~scored, UNSCORED), (0, 1), value=UNSCORED)
    # Every place, the last ones unscored, so that nothing is copied and the classes are next to each other in memory:
    # else the softmax is slow, and on a CPU ten times less exact.
    loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=UNSCORED)
    return loss, int(scored.sum())


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
            hook = _fisher_hook(name, module, moments)
            handles.append(weight.register_post_accumulate_grad_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()


class Scale:
    """What hooks are to know of the batch at hand.

    Attributes:
        scored: tokens in each sample's loss: a weight's gradient is of their mean, those at outputs are of their sum.
        places: where its tokens are in the text, of the source (True) or the target.
    """

    scored: Sequence[int] = (1,)
    places: Callable[[bool], Tensor]


@contextmanager
def watching(
    model: PreTrainedModel, collected: Mapping[str, GradientMoments], of_source: Collection[str] = ()
) -> Iterator[Scale]:
    """Inside, backward passes of a loss that is a sum over tokens add to the sites' moments.

    Args:
        of_source: the sites that read the tokens of an encoder-decoder's source.

    Only the weights whose Fisher sums are kept have gradients; each is freed as soon as it was added. Without any, a
    backward pass ends at the first sites' outputs.
    """
    scale = Scale()
    before = {parameter: (parameter.requires_grad, parameter.grad) for parameter in model.parameters()}
    handles = []
    try:
        for parameter in before:
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, moments in collected.items():
            module = model.get_submodule(name)
            if moments.keeps_fisher:
                weight: nn.Parameter = module.weight  # type: ignore[assignment]
                weight.requires_grad_(True)
                hook = _fisher_hook(name, module, moments, scale=scale)
                handles.append(weight.register_post_accumulate_grad_hook(hook))
            if moments.keeps_covariance or moments.token_weights is not None:
                hook_of = _output_hook(name, moments, scale, source=name in of_source)
                handles.append(module.register_forward_hook(hook_of))
        yield scale
    finally:
        for handle in handles:
            handle.remove()
        for parameter, (required, gradient) in before.items():
            parameter.requires_grad_(required)
            parameter.grad = gradient


def _fisher_hook(
    name: str, module: nn.Module, moments: GradientMoments, *, scale: Scale | None = None
) -> Callable[[Tensor], None]:
    """Adds the square of a weight's gradient, as of a (d_out, d_in) weight.

    Args:
        scale: of a loss that is one sample's sum over tokens, for the gradient of the mean, which is freed then. None:
            the gradient is taken as it is, and stays.
    """

    def add(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.mT if isinstance(module, Conv1D) else parameter.grad
        try:
            moments.update_fisher(gradient if scale is None else gradient / scale.scored[0])
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if scale is not None:
            parameter.grad = None

    return add


def places_of(tokens: Tokens, rows: Rows, before: int, source: bool) -> Tensor:
    """Where a batch's tokens are in the whole text, of which `before` places precede these samples."""
    return before + tokens.places(rows, source=source)


def _output_hook(name: str, moments: GradientMoments, scale: Scale, *, source: bool) -> Callable[..., Tensor]:
    """Adds the gradient at a linear's output."""

    def add(gradient: Tensor) -> None:
        try:
            if moments.keeps_covariance:
                moments.update_covariance(gradient, None)
            if moments.token_weights is not None:
                moments.update_weights(gradient, scale.places(source))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error

    def watch(_module: nn.Module, _args: object, output: Tensor) -> Tensor:
        if not output.requires_grad:  # nothing before it has a gradient: the backward pass ends here
            output = output.detach().requires_grad_().clone()  # blocks may change what is no leaf in place
        output.register_hook(add)
        return output

    return watch
