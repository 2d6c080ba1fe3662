"""One pass: a method that needs moments of inputs and of gradients gets both from the same forward passes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import eckart.calibration.moments
from eckart.calibration.moments import Memory, calibrate, calibrate_by_block, gather_gradients
from eckart.lowrank import Method, build_method
from eckart.models.sites import blocks_of, find_sites
from tiny import BLOCKS, relative, tiny_model, tiny_tokens
from walks import Noted, alike, refuse_to_run

KFAC = build_method("kfac", {"weighted": False})
WEIGHTED = build_method("kfac", {"weighted": True})


@pytest.mark.parametrize("method", [KFAC, WEIGHTED], ids=["alike", "weighted"])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("model_type", "head"), [("llama", None), ("gpt2", None), ("gemma2", None), ("bert", "classifier")]
)
def test_one_pass_gives_what_two_give(
    monkeypatch: pytest.MonkeyPatch, model_type: str, head: str | None, padded: bool, method: Method
) -> None:
    model, tokens, noted = tiny_model(model_type, head), tiny_tokens(5, 12, padded=padded), Noted()
    both = calibrate(model, tokens, method, track=noted)
    assert noted.seen == ["gradients"]
    monkeypatch.setattr(eckart.calibration.moments, "IN_ONE_PASS", 0)
    apart = calibrate(model, tokens, method, track=noted)
    assert noted.seen[1:] == ["gradients", "embedding", *(f"block {number}: moments" for number in range(BLOCKS))]
    for one, other in zip(both, apart, strict=True):
        assert (one.block, one.inputs.keys()) == (other.block, other.inputs.keys())
        for group, moments in one.inputs.items():
            assert moments.count == other.inputs[group].count == tokens.count
            assert moments.sums.keys() == other.inputs[group].sums.keys()
            for name, value in moments.sums.items():
                assert value.dtype == other.inputs[group].sums[name].dtype
                assert relative(value, other.inputs[group].sums[name]) < 2e-5, (group, name)
        assert all(
            torch.equal(one.gradients[n].gradient_covariance, g.gradient_covariance) for n, g in other.gradients.items()
        )


@pytest.mark.parametrize(("model_type", "dtype"), [("bert", torch.float32), ("llama", torch.float16)])
def test_two_passes_where_gradients_are_of_another_reading(model_type: str, dtype: torch.dtype) -> None:
    """Of masked text, or of the model in another type."""
    noted = Noted()
    calibrate(tiny_model(model_type, dtype=dtype), tiny_tokens(3, 10), KFAC, track=noted)
    assert [description for description in noted.seen if "moments" in description]


def test_what_is_in_memory_is_read_again() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, 10)
    expected = calibrate(model, tokens, KFAC)
    memory: Memory = {}
    gradients = gather_gradients(model, tokens, KFAC, memory=memory)
    assert sorted(memory) == list(range(BLOCKS))
    for block in blocks_of(model):
        block.register_forward_pre_hook(refuse_to_run)
    for _ in range(2):
        assert alike(calibrate_by_block(model, tokens, KFAC, gradients=gradients, memory=memory), expected)
    few = [site for site in find_sites(model) if site.part == "mlp" and site.block == 1]
    (block,) = calibrate_by_block(model, tokens, KFAC, sites=few, gradients=gradients, memory=memory)
    assert block.inputs.keys() == {site.input_group for site in few}


def test_what_memory_lacks_is_computed_in_the_dense_model() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, 10)
    memory: Memory = {}
    gradients = gather_gradients(model, tokens, KFAC, memory=memory)
    whole = dict(memory)
    del memory[1]
    noted = Noted()
    blocks = list(calibrate_by_block(model, tokens, KFAC, gradients=gradients, memory=memory, track=noted))
    assert [description for description in noted.seen if "moments" in description] == ["block 1: moments"]
    for group, moments in whole[1].items():
        assert relative(blocks[1].inputs[group].second_moment, moments.second_moment) < 1e-5


def test_a_cache_gets_them_and_memory_does_not(tmp_path: Path) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, 10)
    expected = calibrate(model, tokens, KFAC)
    memory: Memory = {}
    gather_gradients(model, tokens, KFAC, cache=tmp_path, memory=memory)
    assert memory == {}
    for block in blocks_of(model):
        block.register_forward_pre_hook(refuse_to_run)
    assert alike(calibrate_by_block(model, tokens, KFAC, cache=tmp_path), expected)


def test_an_input_that_is_not_finite_names_its_group() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("inf")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.self_attn\.q_proj: an input is not finite"):
        calibrate(model, tiny_tokens(2, 8), KFAC)
