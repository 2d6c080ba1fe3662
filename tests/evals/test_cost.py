"""Cost: counted by hand, by torch's FLOP counter, and against the numbers that SFSD prints."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import eckart
from eckart.allocation import RankPlan
from eckart.evals import speed
from eckart.evals.cost import cost, count_macs, resident_bytes
from eckart.evals.result import EvalResult
from eckart.evals.speed import decode_speed, prefill_speed
from eckart.lowrank.storage import Storage
from eckart.models.coded import KERNEL_PROCESSORS, CodedMatrix
from eckart.models.linear import LowRankLinear
from eckart.models.loading import weights_on_disk
from eckart.models.sites import find_sites, replace_module
from eckart.support.sizes import num_params
from tiny import BLOCKS, DEFAULT_CONFIGS, FAMILY_CONFIGS, POSITIONS, VOCABULARY, tiny_model

COUNTED = (*FAMILY_CONFIGS, *DEFAULT_CONFIGS)


def eager(model_type: str, head: str | None = None) -> PreTrainedModel:
    model = tiny_model(model_type, head)
    if model_type != "bloom":  # it has its own attention, which is eager
        model.set_attn_implementation("eager")
    return model


@torch.no_grad()
def flops(model: PreTrainedModel, length: int) -> dict[str, float]:
    """{operation: multiply-accumulates} by torch's counter, two operations each."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.ones(1, length, dtype=torch.int64))
    return {str(name): count / 2 for name, count in counter.get_flop_counts()["Global"].items()}


def check_against_the_counter(model: PreTrainedModel, length: int) -> None:
    macs, seen = count_macs(model, length), flops(model, length)
    assert macs.linear == seen.get("aten.mm", 0) + seen.get("aten.addmm", 0)
    assert macs.attention == seen.get("aten.bmm", 0) + seen.get("aten.baddbmm", 0)
    assert macs.total == sum(seen.values())


@pytest.mark.parametrize("model_type", COUNTED)
@pytest.mark.parametrize("length", [1, 12])
def test_macs_are_those_of_the_flop_counter(model_type: str, length: int) -> None:
    check_against_the_counter(eager(model_type), length)


@pytest.mark.parametrize("model_type", COUNTED)
def test_low_rank_macs_are_those_of_the_flop_counter(model_type: str) -> None:
    model = eager(model_type)
    dense = count_macs(model, 12)
    plan = eckart.plan(model, 0.5)
    eckart.compress(model, "svd", plan)
    check_against_the_counter(model, 12)
    macs = count_macs(model, 12)
    assert dense.linear - macs.linear == 12 * (plan.dense_params - plan.kept_params)
    assert macs.attention == dense.attention


@pytest.mark.parametrize("kernel", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_macs_of_linears_in_bits_are_those_of_their_numbers(
    bits: int, dtype: torch.dtype, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights in bits, factors in bits and plain linears; whichever kernel multiplies, attention is the dense one's."""
    model = tiny_model("llama", hidden_size=64, intermediate_size=128).to(dtype)
    dense, sites = count_macs(model, 12), find_sites(model)
    ways = [(None, Storage(bits, None, 32)), (16, Storage(bits, bits, 32)), (16, Storage(None, bits, 32)), (16, None)]
    by_site = dict(zip(sites, itertools.cycle(ways), strict=False))
    plan = RankPlan(
        sites,
        {site.name: rank for site, (rank, _) in by_site.items()},
        stored={site.name: storage for site, (_, storage) in by_site.items() if storage is not None},
    )
    eckart.compress(model, "svd", plan)
    used: list[CodedMatrix] = []
    by_kernel = CodedMatrix._by_kernel
    monkeypatch.setattr(CodedMatrix, "_by_kernel", lambda self, x: (used.append(self), by_kernel(self, x))[1])
    if not kernel:
        monkeypatch.setattr(CodedMatrix, "_has_kernel", lambda *_: False)
    macs = count_macs(model, 12)
    assert dense.linear - macs.linear == 12 * (plan.dense_params - plan.kept_params)
    assert macs.attention == dense.attention
    there = torch.backends.cpu.get_cpu_capability() in KERNEL_PROCESSORS
    assert bool(used) == (kernel and there and bits == 4 and dtype == torch.bfloat16)


@pytest.mark.parametrize(("model_type", "head"), [("bert", "classifier"), ("albert", None), ("llama", "base")])
def test_linears_count_as_often_and_for_as_many_tokens_as_they_run(model_type: str, head: str | None) -> None:
    """A pooler reads one token; ALBERT's layers share their weights; a base model has no head."""
    check_against_the_counter(eager(model_type, head), 12)


def test_macs_by_hand() -> None:
    attention = 32 * 32 + 2 * 32 * 16 + 32 * 32
    linear = BLOCKS * (attention + 3 * 32 * 48) + VOCABULARY * 32
    for tied in (True, False):
        macs = count_macs(tiny_model("llama", tie_word_embeddings=tied), 10)
        assert macs.linear == 10 * linear
        assert macs.attention == pytest.approx(BLOCKS * 2 * 10 * 10 * 32, rel=0.01)


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_fused_attention_is_counted_like_eager(model_type: str) -> None:
    fused = tiny_model(model_type)
    fused.set_attn_implementation("sdpa")
    assert count_macs(fused, 12) == count_macs(eager(model_type), 12)


def test_counting_leaves_no_hooks() -> None:
    model = tiny_model("llama")
    count_macs(model, 4)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_llama_7b_as_sfsd_prints_it() -> None:
    """SFSD Table 1: 423.93 G dense and 339.99 G with 46 % kept of the last 12 blocks, for 64 tokens."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # the defaults are LLaMA-7B
    assert round(count_macs(model, 64).total / 1e9, 2) == 423.93
    plan = eckart.plan(model, 0.46, blocks="last 12")
    for site in plan.sites:
        rank = plan.rank(site)
        if rank is not None:
            replace_module(model, site.name, LowRankLinear(site.d_in, site.d_out, rank, bias=True, device="meta"))
    assert round(count_macs(model, 64).total / 1e9, 2) == 339.99


def test_attention_that_cannot_be_counted_is_refused() -> None:
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attention 'flash_attention_2' cannot be counted"):
        count_macs(model, 4)


def test_parameters_are_counted_once_where_tied() -> None:
    tied, untied = (tiny_model("llama", tie_word_embeddings=tied) for tied in (True, False))
    assert num_params(untied) - num_params(tied) == VOCABULARY * 32
    assert num_params(tied) == num_params(tied)


def test_resident_bytes_by_hand() -> None:
    module = nn.Linear(6, 4, dtype=torch.bfloat16)
    module.register_buffer("angles", torch.zeros(5))
    module.register_parameter("again", module.weight)
    assert resident_bytes(module) == 2 * (6 * 4 + 4) + 4 * 5


def short(model: PreTrainedModel, **settings: Any) -> EvalResult:
    return cost(model, **{"rounds": 1, "tokens": 2, "prompt": 8, **settings})


def test_a_dense_model_alone(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(bytes(33))  # as of another program: no loader reads it
    result = short(model, weights=weights_on_disk(tmp_path))
    assert (result.task, result.metric, result.better, result.value) == ("cost", "params", "lower", num_params(model))
    macs = count_macs(model, 8)
    assert {name: score.value for name, score in result.scores.items()} == {
        "bytes.resident": resident_bytes(model),
        "bytes.disk": (tmp_path / "model.safetensors").stat().st_size,
        "macs": macs.total / 8,
        "macs.linear": macs.linear / 8,
        "macs.attention": macs.attention / 8,
    }
    assert result.settings == {"batch": 1, "prompt": 8, "tokens": 2, "rounds": 1, "dtype": "float32"}
    rates = result.details["tokens_per_second"]
    assert rates["model"].keys() == {"prefill", "decode"}
    assert "reference" not in rates
    assert EvalResult.from_json(result.to_json()) == result


def test_shares_of_a_reference() -> None:
    dense, small = tiny_model("llama"), tiny_model("llama")
    eckart.compress(small, "svd", eckart.plan(small, 0.5))
    result = short(small, reference=dense)
    assert result.read("params.kept") == num_params(small) / num_params(dense)
    assert result.read("bytes.kept") == resident_bytes(small) / resident_bytes(dense)
    assert result.read("macs.kept") == count_macs(small, 8).total / count_macs(dense, 8).total
    assert result.read("prefill_speed") > 0
    assert result.read("decode_speed") > 0
    assert result.details["tokens_per_second"]["reference"].keys() == {"prefill", "decode"}


@pytest.mark.parametrize("model_type", ["bert", "roberta", "modernbert"])
def test_an_encoder_has_no_decode_speed(model_type: str) -> None:
    model = tiny_model(model_type)
    result = short(model, reference=model)
    assert "prefill_speed" in result.scores
    assert "decode_speed" not in result.scores
    assert result.details["tokens_per_second"]["model"].keys() == {"prefill"}
    with pytest.raises(ValueError, match="does not generate; it has no decode speed"):
        decode_speed(model, model, rounds=1)


@pytest.mark.parametrize("model_type", COUNTED)
def test_every_family_has_a_cost(model_type: str) -> None:
    assert short(tiny_model(model_type)).read("macs") > 0


def clocked(monkeypatch: pytest.MonkeyPatch, seconds: dict[PreTrainedModel, list[float]]) -> None:
    """A clock that only a model's forward pass moves, by the next of its `seconds`, the last one for ever."""
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    for model, steps in seconds.items():

        def tick(*_: object, steps: list[float] = steps) -> None:
            now[0] += steps.pop(0) if len(steps) > 1 else steps[0]

        model.register_forward_hook(tick)


def test_speeds_are_ratios_of_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    fast, slow = tiny_model("llama"), tiny_model("gpt2")
    # Warm-up, then rounds of one prefill each; one of the five is an outlier.
    clocked(monkeypatch, {fast: [99, 1, 1, 50, 1, 1], slow: [99, 3, 3, 3, 3, 0.1]})
    assert prefill_speed(fast, slow, rounds=5) == 3
    fast, slow = tiny_model("llama"), tiny_model("gpt2")
    clocked(monkeypatch, {fast: [2.0], slow: [5.0]})
    assert decode_speed(fast, slow, tokens=4) == 2.5
    result = short(slow, reference=fast, batch=3)
    assert result.read("prefill_speed") == result.read("decode_speed") == 0.4
    assert result.details["tokens_per_second"]["model"] == {"prefill": round(3 * 8 / 5, 1), "decode": round(3 / 5, 1)}


def test_decoding_reads_one_token_at_a_time_with_a_cache() -> None:
    model = tiny_model("llama")
    widths: list[tuple[int, ...]] = []
    model.register_forward_pre_hook(lambda _m, _a, kwargs: widths.append(kwargs["input_ids"].shape), with_kwargs=True)
    model.config.use_cache = False
    short(model, batch=2, tokens=3)
    count, *timed = widths
    assert count == (1, 8)
    assert timed == [(2, 8), (2, 1), (2, 1), (2, 8), (2, 1), (2, 1), (2, 1)]


def test_the_prompt_fits_the_positions() -> None:
    assert short(tiny_model("llama"), prompt=None, tokens=32).settings["prompt"] == POSITIONS - 32
    assert short(tiny_model("llama", max_position_embeddings=512), prompt=None).settings["prompt"] == 64
    assert short(tiny_model("gpt2"), prompt=POSITIONS - 2).settings["prompt"] == POSITIONS - 2


@pytest.mark.parametrize("settings", [{"prompt": 63, "tokens": 2}, {"prompt": None, "tokens": 64}])
def test_a_prompt_past_the_positions(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"has 64 positions: a prompt of \d+ and \d+ tokens do not fit; lower them"):
        short(tiny_model("llama"), **settings)


@pytest.mark.parametrize("name", ["prompt", "tokens", "rounds", "batch"])
def test_counts_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} 0 is not positive"):
        short(tiny_model("llama", max_position_embeddings=512), **{name: 0})


def test_a_broken_model_has_no_cost() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(ValueError, match="LlamaForCausalLM: a logit is not finite; the model is broken"):
        short(model)
