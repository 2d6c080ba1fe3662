"""Walk: a model's blocks, run one at a time from the calls that were recorded, give what the whole model gives."""

from __future__ import annotations

from types import MethodType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from eckart.calibration.calls import hidden_of, record
from eckart.models.sites import blocks_of
from tiny import BLOCKS, DEFAULT_CONFIGS, FAMILY_CONFIGS, MIXTURE_CONFIGS, logits_of, tiny_model, tiny_tokens
from walks import hidden_states, traces

ALL = sorted({*FAMILY_CONFIGS, *MIXTURE_CONFIGS, *DEFAULT_CONFIGS})


@pytest.mark.parametrize("model_type", ALL)
@torch.no_grad()
def test_blocks_one_at_a_time_are_the_whole_model(model_type: str) -> None:
    model, tokens = tiny_model(model_type), tiny_tokens(3, 12, padded=True)
    expected = hidden_states(model, tokens)
    recordings = [record(model, rows) for rows in tokens.rows(2)]
    row = 0
    for recording in recordings:
        assert len(recording.calls) == BLOCKS
        hidden = recording.hidden
        for number, (block, call) in enumerate(zip(blocks_of(model), recording.calls, strict=True)):
            hidden = call.run(block, hidden)
            for place, rows in enumerate(hidden):
                states = expected[row + place][number]
                torch.testing.assert_close(rows[: len(states)], states, rtol=1e-4, atol=1e-4)
        row += len(hidden)
    assert row == len(tokens)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_only_the_first_block_runs_and_only_once(model_type: str) -> None:
    model, ran = tiny_model(model_type), []
    for number, block in enumerate(blocks_of(model)):
        next(block.children()).register_forward_pre_hook(lambda *_, number=number: ran.append(number))
    for rows in tiny_tokens(4, 8).rows(1):
        record(model, rows)
    assert set(ran) == {0}
    assert len(ran) == 4


def test_a_mask_that_hides_nothing_is_left_out() -> None:
    model = tiny_model("bert")
    masks: list[Tensor | None] = []
    model.base_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    for padded in (False, True):
        record(model, tiny_tokens(2, 8, padded=padded).rows(2)[0])
    assert masks[0] is None
    assert torch.equal(masks[1], tiny_tokens(2, 8, padded=True).mask.long())


def test_what_stood_in_a_blocks_place_is_put_back() -> None:
    model = tiny_model("llama")
    before, blocks = logits_of(model), blocks_of(model)

    def own(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs)

    mine = MethodType(own, blocks[1])
    blocks[1].forward = mine
    record(model, tiny_tokens(2, 8).rows(2)[0])
    assert blocks[1].forward is mine
    assert traces(model) == ["model.layers.1.forward"]
    assert torch.equal(logits_of(model), before)


def test_a_model_that_stops_half_way_is_left_as_it_was() -> None:
    model = tiny_model("llama")
    handle = model.model.norm.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        record(model, tiny_tokens(2, 8).rows(2)[0])
    handle.remove()
    assert traces(model) == []


def test_blocks_that_are_called_twice_are_refused() -> None:
    with pytest.raises(ValueError, match="AlbertForMaskedLM does not call its 1 blocks once each in order"):
        record(tiny_model("albert"), tiny_tokens(2, 8).rows(2)[0])


def test_hidden_states_among_what_a_block_gives() -> None:
    hidden = torch.zeros(1, 2, 3)
    assert hidden_of(hidden) is hidden
    assert hidden_of((hidden, None)) is hidden
    assert hidden_of([hidden]) is hidden
