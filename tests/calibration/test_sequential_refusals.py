"""Sequential: a walk leaves nothing behind, holds one part at a time, and refuses what it cannot walk."""

from __future__ import annotations

import copy
import types
import weakref
from collections.abc import Iterable
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

import eckart.calibration.sequential
from eckart.allocation import plan
from eckart.calibration.moments import BlockCalibration
from eckart.calibration.sequential import Order, SequentialCalibration
from eckart.compression.replace import compress
from eckart.data.tokens import Tokens
from eckart.lowrank import Method
from eckart.models.sites import blocks_of, find_sites
from tiny import BLOCKS, VOCABULARY, logits_of, tiny_model, tiny_tokens
from walks import ANCHORED, METHOD_OF, PLAIN, Collect, assert_walks_as_hooks_see_it, tokens_of, traces, walk

T = TypeVar("T")

# What stays in memory


@pytest.mark.parametrize("order", ["one-shot", "sequential", "anchored"])
def test_nothing_is_left_and_copies_are_gone(order: Order, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[weakref.ref[nn.Module]] = []
    alive_before: list[int] = []

    def spy(block: nn.Module) -> nn.Module:
        alive_before.append(sum(reference() is not None for reference in copies))
        duplicate = copy.deepcopy(block)
        copies.append(weakref.ref(duplicate))
        return duplicate

    monkeypatch.setattr(eckart.calibration.sequential, "copy", types.SimpleNamespace(deepcopy=spy))
    model, (tokens, held_out) = tiny_model("llama"), tokens_of()
    compress(
        model,
        METHOD_OF[order],
        plan(model, 0.5),
        SequentialCalibration(model, tokens, METHOD_OF[order], order=order, held_out=held_out, passes=[Collect()]),
    )
    # One dense copy at a time, and none where the dense stream can go through the block before it is replaced.
    assert alive_before == ([0] * BLOCKS if order == "anchored" else [])
    assert all(reference() is None for reference in copies)
    assert traces(model) == []


def test_one_part_of_moments_in_memory_at_a_time() -> None:
    model, (tokens, held_out) = tiny_model("llama"), tokens_of()
    alive: list[weakref.ref[Any]] = []
    at_start: dict[str, int] = {}

    def track(items: Iterable[T], description: str, total: int) -> Iterable[T]:
        at_start[description] = sum(reference() is not None for reference in alive)
        for item in items:  # noqa: UP028 (holds the item while the next one is made, as progress bars do)
            yield item

    def watched(parts: Iterable[BlockCalibration]) -> Iterable[BlockCalibration]:
        for part in parts:
            alive.extend(weakref.ref(moments) for moments in [*part.inputs.values(), *part.held_out.values()])
            yield part
            del part

    calibration = SequentialCalibration(model, tokens, ANCHORED, held_out=held_out, track=track)
    compress(model, ANCHORED, plan(model, 0.5), watched(calibration), track=track)
    assert len(alive) == 2 * 4 * BLOCKS
    moments = {what: number for what, number in at_start.items() if what.endswith(": moments")}
    assert len(moments) == 4 * BLOCKS
    assert set(moments.values()) == {0}


@pytest.mark.parametrize("order", ["one-shot", "anchored"])
def test_nothing_is_left_when_the_reader_stops(order: Order) -> None:
    model, (tokens, _) = tiny_model("llama"), tokens_of()
    before = logits_of(model)
    iterator = iter(SequentialCalibration(model, tokens, METHOD_OF[order], order=order))
    next(iterator)
    assert traces(model) == []
    del iterator
    assert torch.equal(logits_of(model), before)


# Refusals


def test_a_walk_is_walked_once() -> None:
    model, (tokens, _) = tiny_model("llama"), tokens_of()
    calibration = SequentialCalibration(model, tokens, ANCHORED)
    next(iter(calibration))
    with pytest.raises(ValueError, match="walked through already"):
        next(iter(calibration))


@pytest.mark.parametrize(("order", "method"), [("anchored", PLAIN), ("sequential", ANCHORED), ("one-shot", ANCHORED)])
def test_order_and_method_go_together(order: Order, method: Method) -> None:
    with pytest.raises(ValueError, match=f"order '{order}' and asvd-i, anchored at .*, do not fit together"):
        SequentialCalibration(tiny_model("llama"), tokens_of()[0], method, order=order)


@pytest.mark.parametrize("order", ["one-shot", "sequential"])
def test_a_reference_is_for_the_anchored_order(order: Order) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=f"a reference is for order 'anchored', and not for '{order}'"):
        SequentialCalibration(model, tiny_tokens(), METHOD_OF[order], order=order, reference=tiny_model("llama"))


def test_a_pass_needs_held_out_samples() -> None:
    with pytest.raises(ValueError, match="held-out samples: hold some out"):
        SequentialCalibration(tiny_model("llama"), tokens_of()[0], ANCHORED, passes=[Collect()])


def test_a_model_in_training_mode() -> None:
    with pytest.raises(ValueError, match="is in training mode"):
        list(SequentialCalibration(tiny_model("llama").train(), tokens_of()[0], ANCHORED))


@pytest.mark.parametrize("part", ["tokens", "held_out"])
def test_samples_that_the_model_cannot_read(part: str) -> None:
    good, bad = tiny_tokens(2, 8), Tokens(torch.full((1, 8), VOCABULARY), torch.ones(1, 8, dtype=torch.bool))
    tokens, held_out = (bad, good) if part == "tokens" else (good, bad)
    with pytest.raises(ValueError, match=f"token {VOCABULARY} is outside the model's vocabulary"):
        list(SequentialCalibration(tiny_model("llama"), tokens, ANCHORED, held_out=held_out))


@pytest.mark.parametrize("order", ["sequential", "anchored", "one-shot"])
def test_an_input_that_is_not_finite_names_its_group(order: Order) -> None:
    model, (tokens, _) = tiny_model("llama"), tokens_of()
    model.get_submodule("model.layers.1.post_attention_layernorm").weight.data[3] = float("nan")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.gate_proj: an input is not finite"):
        walk(model, SequentialCalibration(model, tokens, METHOD_OF[order], order=order))
    assert traces(model) == []


class Deaf(LlamaMLP):
    """A half of a block that multiplies with a weight and does not call its module."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(x @ self.gate_proj.weight.T))


@pytest.mark.parametrize("order", ["sequential", "anchored"])
def test_a_site_that_its_block_does_not_call(order: Order) -> None:
    model, (tokens, _) = tiny_model("llama"), tokens_of()
    blocks_of(model)[1].mlp.__class__ = Deaf
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.gate_proj is not called by its block; exclude it"):
        walk(model, SequentialCalibration(model, tokens, METHOD_OF[order], order=order))
    assert traces(model) == []
    sites = [site for site in find_sites(tiny_model("llama")) if site.role not in ("mlp.gate_proj", "mlp.up_proj")]
    model = tiny_model("llama")
    blocks_of(model)[1].mlp.__class__ = Deaf
    assert_walks_as_hooks_see_it(model, sites, order)
