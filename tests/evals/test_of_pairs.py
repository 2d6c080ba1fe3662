"""Evaluations of encoder-decoders, against direct computations: divergence, distance, similarity and cost."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from typer.testing import CliRunner

import eckart
from eckart.cli.app import app
from eckart.data.pairs import decoder_inputs
from eckart.data.samples import halve
from eckart.data.tokens import Tokens
from eckart.evals.cost import cost, count_macs
from eckart.evals.distance import distance, read_errors
from eckart.evals.divergence import divergence
from eckart.evals.similarity import read_activations, similarity
from eckart.models.sites import find_sites, input_groups, low_rank_modules
from eckart.runs.calibration_errors import shortened
from evals.log_errors import log_errors
from tiny import (
    BOS,
    ENCODER_DECODER_CONFIGS,
    EOS,
    POSITIONS,
    site_inputs,
    tiny_model,
    tiny_pairs,
    tiny_text,
    tiny_tokenizer,
    tiny_tokens,
)

SPECIALS = ((BOS,), (EOS,))
MOST = [
    name if name in ("t5", "umt5", "bart") else pytest.param(name, marks=pytest.mark.slow)
    for name in ENCODER_DECODER_CONFIGS
]


def compressed(model_type: str, method: str = "asvd-i") -> PreTrainedModel:
    model, built = tiny_model(model_type), eckart.build_method(method)
    eckart.compress(model, built, eckart.plan(model, 0.5), eckart.calibrate(model, tiny_pairs(), built))
    return model


def stream_of(windows: int, content: int = 6) -> Tensor:
    return tiny_tokens(1, 2 * windows * content, seed=3).ids[0]


def pairs_of(stream: Tensor, content: int = 6) -> Tokens:
    """The halves of a stream with special tokens around each."""
    ids = halve(stream.view(-1, 2 * content), *SPECIALS)
    return Tokens(ids, torch.ones_like(ids, dtype=torch.bool), split=ids.shape[1] // 2)


@torch.no_grad()
@pytest.mark.parametrize("model_type", ENCODER_DECODER_CONFIGS)
def test_divergence_is_at_the_targets(model_type: str) -> None:
    model, reference, stream = compressed(model_type), tiny_model(model_type), stream_of(4)
    expected = []
    for row in pairs_of(stream).ids:
        source, target = row[None].tensor_split([8], 1)
        log_q, log_p = (
            each(input_ids=source, decoder_input_ids=decoder_inputs(each, target))
            .logits[0, 1:-1]
            .double()
            .log_softmax(-1)
            for each in (model, reference)
        )
        expected.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    result = divergence(model, reference, stream, length=16, specials=SPECIALS)
    assert result.examples == pytest.approx(expected, abs=1e-5)
    assert result.value == pytest.approx(sum(expected) / 4, abs=1e-5)
    assert result.settings["scored_tokens"] == 4 * 6
    assert divergence(reference, reference, stream, length=16, specials=SPECIALS).value == 0


def test_a_decoder_is_not_compared_with_an_encoder_decoder() -> None:
    with pytest.raises(ValueError, match="only one of the two models is an encoder-decoder"):
        divergence(tiny_model("t5"), tiny_model("llama"), stream_of(2), length=12)


@torch.no_grad()
@pytest.mark.parametrize("model_type", MOST)
def test_distance_is_of_both_stacks(model_type: str) -> None:
    calibration, stream = tiny_pairs(5, padded=True), stream_of(3)
    model, reference = compressed(model_type), tiny_model(model_type)
    sites = find_sites(reference)

    theirs, ours = log_errors(model, reference, calibration), log_errors(model, reference, pairs_of(stream))
    errors = read_errors(model, reference, calibration, list(low_rank_modules(model)))
    result = distance(model, reference, errors, stream, length=16, specials=SPECIALS)
    assert set(result.details["linears"]) == {site.name for site in sites}
    for site in sites:
        growth = sum(ours[site.name]) / 3 - sum(theirs[site.name]) / 5
        assert result.details["linears"][site.name] == pytest.approx(math.exp(growth), rel=1e-3)


def test_a_distance_needs_pairs() -> None:
    model = compressed("t5")
    with pytest.raises(ValueError, match="T5ForConditionalGeneration is an encoder-decoder, and reads pairs"):
        read_errors(model, tiny_model("t5"), tiny_tokens(3, 8), list(low_rank_modules(model)))
    with pytest.raises(ValueError, match=r"a target of 65 is past the model's 64 positions"):
        read_activations(tiny_model("bart"), tiny_pairs(2, target=65), input_groups(tiny_model("bart")))


def test_pairs_are_cut_on_both_sides() -> None:
    tokens = tiny_pairs(4, source=9, target=5)
    cut = shortened(tokens, 8, 3)
    assert (cut.split, tuple(cut.ids.shape), cut.source["read"]) == (4, (3, 8), [3, 8])
    assert torch.equal(cut.ids, torch.cat([tokens.ids[:3, :4], tokens.ids[:3, 9:13]], 1))
    assert shortened(tokens, 100, None).source["read"] == [4, 14]


@pytest.mark.parametrize("model_type", MOST)
def test_similarity_is_of_both_stacks(model_type: str) -> None:
    """Sources and targets of one width, each with a padding of its own."""
    model, stream = tiny_model(model_type), stream_of(3)
    calibration = tiny_pairs(5, source=8, target=8, padded=True)
    sites = [site for site in find_sites(model) if site.name == site.input_group]
    result = similarity(
        model, read_activations(model, calibration, input_groups(model)), stream, length=16, specials=SPECIALS
    )
    assert set(result.details["modules"]) == {site.name for site in sites}
    assert {site.of_source for site in sites} == {True, False}
    centres = site_inputs(model, calibration, sites)
    windows = pairs_of(stream)
    for site in sites:
        centre = centres[site.name].double().mean(0)
        means = [
            site_inputs(model, windows.take(slice(row, row + 1)), [site])[site.name].double().mean(0)
            for row in range(3)
        ]
        expected = torch.nn.functional.cosine_similarity(torch.stack(means), centre[None]).mean()
        assert result.details["modules"][site.name] == pytest.approx(float(expected), abs=1e-5)


# Cost


def linears_of(model: PreTrainedModel, source: int, target: int) -> int:
    """Multiply-accumulates of the linears, from the sites' shapes and what each reads; and of the head."""
    sites = find_sites(model)
    head = model.get_output_embeddings().weight.numel()
    return sum(site.num_params * (source if site.of_source else target) for site in sites) + head * target


@pytest.mark.parametrize("model_type", ENCODER_DECODER_CONFIGS)
def test_cost_is_of_both_stacks(model_type: str) -> None:
    model = tiny_model(model_type)
    macs = count_macs(model, 10, 6)
    assert macs.linear == linears_of(model, 10, 6)
    encoder, decoder = (3, 2) if "t5" in model_type else (2, 3)
    assert macs.attention == 32 * 2 * (encoder * 10 * 10 + decoder * (6 * 6 + 6 * 10))
    assert macs.length == 16
    result = cost(model, prompt=10, tokens=6, rounds=1)
    assert result.read("macs") == macs.total / 16
    assert result.read("macs.linear") == macs.linear / 16


def test_shares_and_speeds_of_a_compressed_one() -> None:
    dense, model = tiny_model("bart"), compressed("bart")
    result = cost(model, reference=dense, prompt=8, tokens=3, rounds=1)
    assert result.read("macs.kept") == count_macs(model, 8, 3).total / count_macs(dense, 8, 3).total
    assert result.read("params.kept") < 1
    assert result.read("decode_speed") > 0


def test_the_decoder_generates_with_a_cache_and_the_encoder_reads_once() -> None:
    model = tiny_model("t5")
    read: list[int] = []
    written: list[tuple[int, ...]] = []
    model.get_encoder().register_forward_hook(lambda *_: read.append(1))
    model.get_decoder().register_forward_pre_hook(
        lambda _m, _a, kwargs: written.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    cost(model, prompt=8, tokens=3, rounds=1, batch=2)
    assert len(read) == 3  # the count, the first call, the round
    assert written == [(1, 3), *[(2, 1)] * 3, *[(2, 1)] * 4]


def test_the_cost_of_a_model_of_sound() -> None:
    model = tiny_model("whisper")
    macs = count_macs(model, 5, 6)
    assert macs.linear == linears_of(model, 12, 6)
    assert macs.length == 12 + 6
    result = cost(model, tokens=4, rounds=1)
    assert result.settings["prompt"] == 12
    assert result.read("macs") == count_macs(model, 12, 4).total / 16
    with pytest.raises(ValueError, match="reads sounds of 12 rows: leave the prompt of 8 out"):
        cost(model, prompt=8, tokens=4, rounds=1)


@pytest.mark.parametrize(
    "lengths", [{"prompt": POSITIONS + 1, "tokens": 2}, {"prompt": 4, "tokens": POSITIONS}], ids=str
)
def test_each_side_fits_its_positions(lengths: dict[str, int]) -> None:
    assert cost(tiny_model("bart"), prompt=POSITIONS, tokens=2, rounds=1).settings["prompt"] == POSITIONS
    with pytest.raises(ValueError, match="has 64 positions"):
        cost(tiny_model("bart"), rounds=1, **lengths)


# By name


def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tiny_tokenizer()
    for name, model in (("dense", tiny_model("t5")), ("small", compressed("t5"))):
        eckart.save(model, tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    text = tmp_path / "text.txt"
    text.write_text(tiny_text(300))
    monkeypatch.chdir(tmp_path)
    names = [f"divergence:{text}", f"distance:{text}", f"similarity:{text}", "cost"]
    given = [each for name in names for each in ("--task", name)]
    more = ["--reference", "dense", "--calibration", str(text), "--samples", "5", "--length", "16", "--out", "results"]
    outcome = CliRunner().invoke(app, ["eval", "small", *given, *more])
    assert outcome.exit_code == 0, outcome.output
    assert len(list((tmp_path / "results").glob("*.json"))) >= 4
