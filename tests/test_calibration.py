"""Calibration: moments block by block equal those of plain hooks on the whole model, and a cache never lies."""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart.allocation import plan
from eckart.calibration import BlockCalibration, Calibration, calibrate, calibrate_by_block, calibration_digest
from eckart.compression import compress
from eckart.lowrank import Method, build_method
from eckart.models.families import FAMILIES
from eckart.models.sites import blocks_of, find_sites
from eckart.tokens import Tokens
from tiny import (
    BLOCKS,
    DEFAULT_CONFIGS,
    ENCODERS,
    HEADS,
    logits_of,
    relative,
    site_inputs,
    tiny_model,
    tiny_tokens,
)

ALL = sorted({*FAMILIES, *DEFAULT_CONFIGS})
METHOD = build_method("asvd-i")
T = TypeVar("T")


def tensors_of(blocks: Iterable[BlockCalibration]) -> dict[str, Tensor]:
    """Every number of a calibration, flat."""
    numbers: dict[str, Tensor] = {}
    for block in blocks:
        for group, moments in block.inputs.items():
            numbers[f"{group} count"] = torch.tensor(moments.count)
            numbers.update({f"{group} {name}": value for name, value in moments.sums.items()})
        for site, found in block.gradients.items():
            numbers[f"{site} examples"] = torch.tensor(found.examples)
            numbers.update({f"{site} {name}": value for name, value in found.sums.items()})
    return numbers


def same(first: Iterable[BlockCalibration], second: Iterable[BlockCalibration]) -> bool:
    ours, theirs = tensors_of(first), tensors_of(second)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


class Noted:
    """A track that notes what is being done, and fails on one of the descriptions."""

    def __init__(self, fail: str = "") -> None:
        self.fail, self.seen = fail, []  # type: ignore[var-annotated]

    def __call__(self, items: Iterable[T], description: str, total: int) -> Iterable[T]:
        self.seen.append(description)
        for number, item in enumerate(items):
            if description == self.fail and number:
                raise KeyboardInterrupt(description)
            yield item


# The law: a block at a time is the whole model at once.


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", ALL)
def test_moments_equal_those_of_plain_hooks(model_type: str, padded: bool) -> None:
    model, tokens = tiny_model(model_type), tiny_tokens(padded=padded)
    sites = find_sites(model)
    inputs = site_inputs(model, tokens, sites)
    calibration = calibrate(model, tokens, METHOD, batch_size=4)
    assert [block.block for block in calibration] == list(range(BLOCKS))
    collected = {group: moments for block in calibration for group, moments in block.inputs.items()}
    assert collected.keys() == {site.input_group for site in sites}
    for site in sites:
        rows, moments = inputs[site.name].double(), collected[site.input_group]
        assert moments.count == len(rows) == tokens.count
        assert relative(moments.second_moment, rows.T @ rows / len(rows)) < 2e-6, site.name
        assert relative(moments.mean, rows.mean(0)) < 5e-6, site.name
        assert relative(moments.abs_mean, rows.abs().mean(0)) < 2e-6, site.name


@pytest.mark.parametrize("head", ["base", "classifier"])
@pytest.mark.parametrize("model_type", ["llama", "bert", "roberta"])
def test_the_head_does_not_matter(model_type: str, head: str) -> None:
    model, tokens = tiny_model(model_type, head), tiny_tokens(padded=True)
    expected = site_inputs(model, tokens, find_sites(model))
    for block in calibrate(model, tokens, METHOD):
        for group, moments in block.inputs.items():
            rows = expected[group].double()
            assert relative(moments.second_moment, rows.T @ rows / len(rows)) < 2e-6


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2", "bert"])
def test_batch_size_changes_nothing(model_type: str, padded: bool) -> None:
    model, tokens = tiny_model(model_type), tiny_tokens(7, padded=padded)
    whole = tensors_of(calibrate(model, tokens, METHOD, batch_size=7))
    for size in (1, 3, 100):
        cut = tensors_of(calibrate(model, tokens, METHOD, batch_size=size))
        assert whole.keys() == cut.keys()
        assert max(relative(cut[name], whole[name]) for name in whole) < 5e-6


@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt2", "bert", "roberta"])
def test_more_padding_changes_nothing(model_type: str) -> None:
    model, tokens = tiny_model(model_type), tiny_tokens(4, 12, padded=True)
    wider = Tokens(nn.functional.pad(tokens.ids, (0, 9)), nn.functional.pad(tokens.mask, (0, 9)))
    assert wider.count == tokens.count
    expected = tensors_of(calibrate(model, tokens, METHOD))
    found = tensors_of(calibrate(model, wider, METHOD))
    assert max(relative(found[name], expected[name]) for name in expected) < 5e-6


def test_moments_are_of_the_stored_type_in_float32() -> None:
    model, tokens = tiny_model("llama", dtype=torch.bfloat16), tiny_tokens()
    rows = site_inputs(model, tokens, find_sites(model))
    assert rows["model.layers.0.mlp.down_proj"].dtype == torch.bfloat16
    moments = calibrate(model, tokens, METHOD, batch_size=1).blocks[0].inputs["model.layers.0.mlp.down_proj"]
    assert moments.sums["second_moment"].dtype == torch.float32
    exact = rows["model.layers.0.mlp.down_proj"].double()
    assert relative(moments.second_moment, exact.T @ exact / len(exact)) < 1e-6


# Only what is needed


def test_a_method_without_needs_never_runs_the_model() -> None:
    model = tiny_model("llama")
    model.base_model.register_forward_pre_hook(refuse_to_run)
    calibration = calibrate(model, tiny_tokens(), build_method("svd"))
    assert [(block.block, block.inputs, block.gradients) for block in calibration] == [(n, {}, {}) for n in range(3)]


def test_statistics_are_what_the_method_needs() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(2, 8)
    assert calibrate(model, tokens, build_method("asvd-0")).blocks[0].inputs[
        "model.layers.0.mlp.down_proj"
    ].sums.keys() == {
        "mean",
        "abs_mean",
    }
    fisher = calibrate(model, tokens, build_method("fwsvd"))
    assert fisher.blocks[0].inputs == {}
    assert fisher.blocks[1].gradients.keys() == {s.name for s in find_sites(model) if s.block == 1}
    both = dataclasses.replace(METHOD, needs=frozenset({"abs_mean", "fisher_out"}))
    assert calibrate(model, tokens, both).blocks[2].inputs
    assert calibrate(model, tokens, both).blocks[2].gradients


def test_only_the_chosen_sites() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    chosen = [s for s in find_sites(model) if s.block == 2 and s.role in {"self_attn.v_proj", "mlp.down_proj"}]
    (block,) = calibrate_by_block(model, tokens, METHOD, sites=chosen)
    whole = calibrate(model, tokens, METHOD).blocks[2]
    assert block.block == 2
    assert block.inputs.keys() == {"model.layers.2.self_attn.q_proj", "model.layers.2.mlp.down_proj"}
    for group, moments in block.inputs.items():
        assert torch.equal(moments.second_moment, whole.inputs[group].second_moment)


def test_calibration_says_where_it_came_from() -> None:
    tokens = tiny_tokens(3, 8)
    assert calibrate(tiny_model("llama"), tokens, METHOD).source == {"corpus": "random", "tokens": 24}


def test_a_block_may_be_replaced_as_soon_as_it_was_given_out() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    expected = calibrate(model, tokens, METHOD)
    found = []
    for block in calibrate_by_block(model, tokens, METHOD):
        found.append(block)
        blocks_of(model)[block.block] = nn.Identity()
    assert same(found, expected)


def test_one_block_of_moments_in_memory_at_a_time() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    alive: list[weakref.ref[Any]] = []
    at_start: dict[str, int] = {}

    def track(items: Iterable[T], description: str, total: int) -> Iterable[T]:
        at_start[description] = sum(reference() is not None for reference in alive)
        for item in items:  # noqa: UP028 (holds the item while the next one is made, as progress bars do)
            yield item

    def watched(blocks: Iterable[BlockCalibration]) -> Iterable[BlockCalibration]:
        for block in blocks:
            alive.extend(weakref.ref(moments) for moments in block.inputs.values())
            yield block
            del block

    walk = watched(calibrate_by_block(model, tokens, METHOD, track=track))
    compress(model, METHOD, plan(model, 0.5), walk, track=track)
    assert len(alive) == 12
    assert {at_start[f"block {number}: moments"] for number in range(BLOCKS)} == {0}


# The model is left as it was


def refuse_to_run(*_: object) -> None:
    raise AssertionError("the model ran")


def traces(model: PreTrainedModel) -> list[str]:
    """What a calibration may have left on the model."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    found = [f"{name}.{attribute}" for name, m in model.named_modules() for attribute in hooks if getattr(m, attribute)]
    return found + [f"{name}.forward" for name, m in model.named_modules() if "forward" in vars(m)]


@pytest.mark.parametrize("method", ["asvd-i", "fwsvd"])
@pytest.mark.parametrize("model_type", ALL)
def test_nothing_is_left_on_the_model(model_type: str, method: str) -> None:
    model = tiny_model(model_type)
    before, clean = logits_of(model), traces(model)
    calibrate(model, tiny_tokens(3, 8), build_method(method))
    assert traces(model) == clean == []
    assert torch.equal(logits_of(model), before)
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("where", ["model.layers.1", "model.layers.1.mlp.down_proj", "model.layers.0.mlp"])
def test_nothing_is_left_when_a_block_raises(where: str) -> None:
    model = tiny_model("llama")
    before = logits_of(model)
    handle = model.get_submodule(where).register_forward_pre_hook(refuse_to_run)
    with pytest.raises(AssertionError, match="the model ran"):
        calibrate(model, tiny_tokens(), METHOD)
    handle.remove()
    assert traces(model) == []
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("step", ["embedding", "block 0: moments", "block 1: moments"])
def test_nothing_is_left_when_it_is_stopped(step: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt, match=step):
        calibrate(model, tiny_tokens(), METHOD, batch_size=2, track=Noted(step))
    assert traces(model) == []


def test_nothing_is_left_when_the_reader_stops() -> None:
    model = tiny_model("llama")
    walk = calibrate_by_block(model, tiny_tokens(), METHOD)
    next(iter(walk))
    assert traces(model) == []


def test_a_forward_that_somebody_put_on_a_block_stays() -> None:
    # accelerate's offloading works that way.
    model = tiny_model("llama")
    expected = calibrate(model, tiny_tokens(), METHOD)
    calls: list[object] = []

    class Counting(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            calls.append(module)
            return args, kwargs

    for block in blocks_of(model):
        add_hook_to_module(block, Counting())
    found = calibrate(model, tiny_tokens(), METHOD)
    assert same(found, expected)
    calls.clear()
    logits_of(model)
    assert calls == list(blocks_of(model))


# Refusals


def test_a_model_in_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"GPT2LMHeadModel is in training mode.*call model\.eval\(\)"):
        calibrate(tiny_model("gpt2").train(), tiny_tokens(), METHOD)


@pytest.mark.parametrize("method", ["asvd-i", "fwsvd"])
def test_a_token_outside_the_vocabulary(method: str) -> None:
    tokens = tiny_tokens()
    tokens.ids[2, 3] = 96
    with pytest.raises(ValueError, match="token 96 is outside the model's vocabulary of 96"):
        calibrate(tiny_model("llama"), tokens, build_method(method))


@pytest.mark.parametrize("method", ["asvd-i", "fwsvd"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_samples_longer_than_the_model_reads(model_type: str, method: str) -> None:
    with pytest.raises(ValueError, match="calibration length 65 is past the model's 64 positions"):
        calibrate(tiny_model(model_type), tiny_tokens(1, 65), build_method(method))
    assert calibrate(tiny_model(model_type), tiny_tokens(1, 64), build_method(method)).source["tokens"] == 64


def test_an_input_that_is_not_finite_names_its_group() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = float("nan")
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.gate_proj: an input is not finite"):
        calibrate(model, tiny_tokens(), METHOD)


def test_a_model_that_calls_a_block_again_is_refused() -> None:
    with pytest.raises(ValueError, match="AlbertForMaskedLM does not call its 1 blocks once each in order"):
        calibrate(tiny_model("albert"), tiny_tokens(), METHOD)


# The cache


def digest(model: PreTrainedModel, tokens: Tokens, method: Method = METHOD, sites: slice = slice(None)) -> str:
    return calibration_digest(model, tokens, method.needs, find_sites(model)[sites])


def one_weight(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.lm_head.weight[5, 7] += 1e-3


def one_norm(model: PreTrainedModel) -> None:
    with torch.no_grad():
        model.model.layers[2].input_layernorm.weight[0] *= 1.001


def one_option(model: PreTrainedModel) -> None:
    model.config.rms_norm_eps *= 2


def one_type(model: PreTrainedModel) -> None:
    model.bfloat16()


@pytest.mark.parametrize("change", [one_weight, one_norm, one_option, one_type])
def test_the_digest_is_of_the_model(change: Callable[[PreTrainedModel], None]) -> None:
    model = tiny_model("llama")
    before = digest(model, tiny_tokens())
    change(model)
    assert digest(model, tiny_tokens()) != before


def test_the_digest_is_of_the_tokens() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    before = digest(model, tokens)
    ids, mask = tokens.ids.clone(), tokens.mask.clone()
    ids[0, 0] += 1
    mask[0, -1] = False
    others = [
        dataclasses.replace(tokens, ids=ids),
        dataclasses.replace(tokens, mask=mask),
        dataclasses.replace(tokens, mask_token=5),
        dataclasses.replace(tokens, ids=tokens.ids.view(12, 8), mask=tokens.mask.view(12, 8)),
        dataclasses.replace(tokens, ids=tokens.ids[:5], mask=tokens.mask[:5]),
        dataclasses.replace(tokens, ids=tokens.ids.flip(0)),
    ]
    assert len({before, *(digest(model, other) for other in others)}) == 1 + len(others)


def test_the_digest_is_of_what_is_collected() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens()
    digests = [digest(model, tokens, build_method(name)) for name in ("asvd-i", "asvd-0", "fwsvd")]
    digests += [digest(model, tokens, sites=slice(7)), digest(model, tokens, sites=slice(7, 14))]
    assert len(set(digests)) == len(digests)


def test_the_digest_is_not_of_names(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "a")
    first = HEADS["causal"].from_pretrained(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    second = HEADS["causal"].from_pretrained(tmp_path / "b")
    tokens = tiny_tokens()
    renamed = dataclasses.replace(tokens, source={"corpus": "another name"})
    assert digest(first, tokens) == digest(second, renamed)
    # and methods with the same needs share their moments
    assert digest(first, tokens, build_method("nsvd-i")) == digest(first, tokens, build_method("sfsd"))


@pytest.mark.parametrize("method", ["asvd-i", "fwsvd"])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_a_second_run_computes_nothing(model_type: str, method: str, tmp_path: Path) -> None:
    built, tokens = build_method(method), tiny_tokens()
    plain, first, second = (tiny_model(model_type) for _ in range(3))
    compress(plain, built, plan(plain, 0.5), calibrate(plain, tokens, built))
    compress(first, built, plan(first, 0.5), calibrate_by_block(first, tokens, built, cache=tmp_path))
    (folder,) = tmp_path.iterdir()
    assert folder.name == digest(tiny_model(model_type), tokens, built)
    second.base_model.register_forward_pre_hook(refuse_to_run)
    blocks_of(second)[0].register_forward_pre_hook(refuse_to_run)
    compress(second, built, plan(second, 0.5), calibrate_by_block(second, tokens, built, cache=tmp_path))
    for model in (first, second):
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in model.state_dict().items())
    assert not list(folder.glob("*.partial"))


def test_another_model_or_text_reuses_nothing(tmp_path: Path) -> None:
    for model, tokens in (
        (tiny_model("llama"), tiny_tokens()),
        (tiny_model("llama", seed=1), tiny_tokens()),
        (tiny_model("llama"), tiny_tokens(seed=1)),
    ):
        found = list(calibrate_by_block(model, tokens, METHOD, cache=tmp_path))
        assert same(found, calibrate(model, tokens, METHOD))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_method_without_needs_writes_nothing(tmp_path: Path) -> None:
    list(calibrate_by_block(tiny_model("llama"), tiny_tokens(), build_method("svd"), cache=tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def killed(tmp_path: Path) -> tuple[Path, Calibration]:
    """A cache in which a run was stopped in the middle of block 2, and what it would have given."""
    model, tokens = tiny_model("llama"), tiny_tokens()
    with pytest.raises(KeyboardInterrupt):
        list(calibrate_by_block(model, tokens, METHOD, cache=tmp_path, batch_size=2, track=Noted("block 2: moments")))
    (folder,) = tmp_path.iterdir()
    assert sorted(file.name for file in folder.iterdir()) == ["block-000.safetensors", "block-001.safetensors"]
    return tmp_path, calibrate(model, tokens, METHOD, batch_size=2)


def test_a_killed_run_goes_on_where_it_was(killed: tuple[Path, Calibration]) -> None:
    cache, expected = killed
    (folder,) = cache.iterdir()
    times = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    noted = Noted()
    model = tiny_model("llama")
    found = list(calibrate_by_block(model, tiny_tokens(), METHOD, cache=cache, batch_size=2, track=noted))
    assert same(found, expected)
    assert [step for step in noted.seen if step.endswith("moments")] == ["block 2: moments"]
    assert {file: file.stat().st_mtime_ns for file in times} == times
    assert len(list(folder.iterdir())) == BLOCKS


def test_a_killed_compression_goes_on_with_the_dense_inputs(killed: tuple[Path, Calibration]) -> None:
    # Blocks that were read from the cache are replaced while later ones are still to be computed: those must
    # not see the compressed ones.
    cache, expected = killed
    whole, resumed = tiny_model("llama"), tiny_model("llama")
    compress(whole, METHOD, plan(whole, 0.4), expected)
    walk = calibrate_by_block(resumed, tiny_tokens(), METHOD, cache=cache, batch_size=2)
    compress(resumed, METHOD, plan(resumed, 0.4), walk)
    assert all(torch.equal(value, whole.state_dict()[name]) for name, value in resumed.state_dict().items())
    again = list(calibrate_by_block(tiny_model("llama"), tiny_tokens(), METHOD, cache=cache))
    assert same(again, expected)


def test_a_block_in_the_middle_is_computed_alone(tmp_path: Path) -> None:
    tokens = tiny_tokens()
    expected = list(calibrate_by_block(tiny_model("llama"), tokens, METHOD, cache=tmp_path))
    (folder,) = tmp_path.iterdir()
    (folder / "block-001.safetensors").unlink()
    model, noted = tiny_model("llama"), Noted()
    compress(model, METHOD, plan(model, 0.4), calibrate_by_block(model, tokens, METHOD, cache=tmp_path, track=noted))
    assert [step for step in noted.seen if step.endswith(("moments", "forward"))] == [
        "block 0: forward",
        "block 1: moments",
    ]
    assert same(calibrate_by_block(tiny_model("llama"), tokens, METHOD, cache=tmp_path), expected)


@pytest.mark.parametrize("cut", [100, 1000, 10**9])
def test_a_truncated_file_is_not_read(killed: tuple[Path, Calibration], cut: int) -> None:
    cache, expected = killed
    (folder,) = cache.iterdir()
    file = folder / "block-001.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-cut])
    found = list(calibrate_by_block(tiny_model("llama"), tiny_tokens(), METHOD, cache=cache, batch_size=2))
    assert same(found, expected)
    assert len(file.read_bytes()) == len(whole)


def test_a_partial_file_is_not_read(killed: tuple[Path, Calibration]) -> None:
    cache, expected = killed
    (folder,) = cache.iterdir()
    (folder / "block-001.safetensors").rename(folder / "block-001.1.partial")
    noted = Noted()
    found = calibrate_by_block(tiny_model("llama"), tiny_tokens(), METHOD, cache=cache, batch_size=2, track=noted)
    assert same(found, expected)
    assert "block 1: moments" in noted.seen


def test_gradients_are_kept_as_soon_as_they_are_there(tmp_path: Path) -> None:
    method = dataclasses.replace(METHOD, needs=frozenset({"second_moment", "fisher_in"}))
    model, tokens = tiny_model("llama"), tiny_tokens()
    with pytest.raises(KeyboardInterrupt):
        list(calibrate_by_block(model, tokens, method, cache=tmp_path, batch_size=2, track=Noted("block 0: moments")))
    noted = Noted()
    found = list(calibrate_by_block(model, tokens, method, cache=tmp_path, batch_size=2, track=noted))
    assert "gradients" not in noted.seen
    assert same(found, calibrate(model, tokens, method, batch_size=2))


def test_copies_of_a_model_share_a_cache(tmp_path: Path) -> None:
    model = tiny_model("bert")
    assert "bert" in ENCODERS
    list(calibrate_by_block(model, tiny_tokens(), METHOD, cache=tmp_path))
    list(calibrate_by_block(copy.deepcopy(model), tiny_tokens(), METHOD, cache=tmp_path))
    assert len(list(tmp_path.iterdir())) == 1
