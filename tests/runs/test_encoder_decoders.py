"""Encoder-decoders from a recipe to a checkpoint: in memory, out of core, loaded by stock transformers, evaluated."""

from __future__ import annotations

import json
import math
import struct
import wave
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import processors
from torch import nn
from transformers import (
    AutoFeatureExtractor,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    WhisperFeatureExtractor,
)

import eckart
from eckart.data.corpora import Text
from eckart.data.encoding import encode
from eckart.data.pairs import decoder_inputs
from eckart.data.sounds import sample_sounds
from eckart.evals.perplexity import perplexity
from eckart.models.sites import find_sites
from eckart.runs import out_of_core
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.out_of_core import compress_out_of_core
from eckart.runs.recipe import parse_recipe
from tiny import (
    BOS,
    ENCODER_DECODER_CONFIGS,
    EOS,
    logits_of,
    relative,
    tiny_model,
    tiny_pairs,
    tiny_sound,
    tiny_text,
    tiny_tokenizer,
)

from .from_files import BATCHED, both, put_model, recipe_of, resume_until_done, tensors_of

pytestmark = [
    pytest.mark.usefixtures("any_tokenizer", "two_passes"),
    pytest.mark.filterwarnings("ignore:At least one mel filter has all zero values"),
]


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return put_model(tmp_path_factory.mktemp("t5"), "t5")


@pytest.mark.parametrize("model_type", ENCODER_DECODER_CONFIGS)
def test_every_family_comes_out_of_core_as_in_memory_and_loads_and_generates(tmp_path: Path, model_type: str) -> None:
    outcome, _ = both(put_model(tmp_path, model_type), tmp_path, method="asvd-i", order="anchored")
    assert outcome.recipe.calibration.cut == "halves"
    assert {site.part for site in outcome.plan.changed} == {"attention", "cross_attention", "mlp"}
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 2 + 3 + 1
    assert "model = AutoModelForSeq2SeqLM.from_pretrained" in (tmp_path / "out" / "README.md").read_text()
    ours, theirs = (eckart.load_model(tmp_path / name) for name in ("out", "expected"))
    torch.testing.assert_close(logits_of(ours), logits_of(theirs))
    stock = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    assert type(stock) is type(ours)
    assert torch.equal(logits_of(stock), logits_of(ours))
    source = tiny_pairs(2).ids[:, :12]
    written = [each.generate(input_ids=source, max_new_tokens=5, do_sample=False) for each in (stock, ours)]
    assert torch.equal(*written)
    expected = logits_of(ours)
    eckart.save(eckart.export_dense(ours), tmp_path / "dense")
    dense = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "dense").eval()
    torch.testing.assert_close(logits_of(dense), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {"method": "svd"},
        {"method": "asvd-i", "order": "sequential"},
        {"method": "nsvd-i"},
        {"method": "fwsvd"},
        {"method": "kfac", "joint": True, "layout": "pivoted"},
        {"method": "best", "refine": {"steps": 3}},
        {"method": "best", "dtype": "bfloat16"},
        {"method": "best", "dtype": "float16"},
        {"method": "best", "sites": {"include": ["cross_attention"]}},
        {"method": "best", "sites": {"include": ["decoder.*"]}},
        {"method": "best", "bits": 8},
    ],
    ids=str,
)
def test_recipes_come_out_of_core_as_in_memory(t5: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    both(t5, tmp_path, **keys)
    assert torch.isfinite(logits_of(eckart.load_model(tmp_path / "out"))).all()


def test_what_transformers_keeps_in_float32_stays_so(t5: Path, tmp_path: Path) -> None:
    make_checkpoint(recipe_of(t5), tmp_path / "out", BATCHED)
    half = eckart.load_model(tmp_path / "out", dtype="float16")
    types = {name: each.dtype for name, each in half.named_parameters()}
    assert {types[name] for name in types if ".wo." in name} == {torch.float32}
    assert {types[name] for name in types if ".wo." not in name} == {torch.float16}
    assert relative(logits_of(half), logits_of(eckart.load_model(tmp_path / "out"))) < 0.02


def test_what_is_said_of_halves_and_not_of_a_head(t5: Path, tmp_path: Path) -> None:
    said: list[str] = []
    make_checkpoint(recipe_of(t5, method="svd"), tmp_path / "svd", How(say=said.append))
    (unread,) = said
    assert "reads no calibration text" in unread
    make_checkpoint(recipe_of(t5), tmp_path / "out", How(say=said.append))
    (halves,) = said[1:]
    assert "of each 16 tokens of the calibration text the first half is the source" in halves


def test_what_is_kept_dense_computes_the_same(t5: Path, tmp_path: Path) -> None:
    make_checkpoint(recipe_of(t5, keep=1.0), tmp_path / "out", BATCHED)
    assert torch.equal(logits_of(eckart.load_model(tmp_path / "out")), logits_of(eckart.load_model(t5 / "model")))


def test_an_interrupted_run_goes_on(t5: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of(t5, method="best", refine={"steps": 2})
    assert resume_until_done(recipe, tmp_path / "out", monkeypatch, out_of_core, "write_shard", 2) >= 2
    compress_out_of_core(recipe, tmp_path / "whole", BATCHED)
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "whole")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("speed", [{"times": 1.0}, {"times": 1.0, "rows": 8}], ids=str)
def test_a_budget_in_speed_is_refused(t5: Path, tmp_path: Path, speed: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"encoder-decoder.*a budget in speed is not defined"):
        make_checkpoint(recipe_of(t5, keep=None, speed=speed), tmp_path / "out", BATCHED)


def test_what_is_kept_in_a_cache_is_read_again(t5: Path, tmp_path: Path) -> None:
    how = How(batch_size=3, cache=tmp_path / "cache")
    for name in ("first", "second"):
        make_checkpoint(recipe_of(t5, method="best"), tmp_path / name, how)
    first, second = (tensors_of(tmp_path / name) for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("way", [{"distil": {"steps": 2}}, {"recover": {"steps": 2}}], ids=str)
def test_the_whole_model_takes_steps(t5: Path, tmp_path: Path, way: dict[str, Any]) -> None:
    outcome = make_checkpoint(recipe_of(t5, method="svd", **way), tmp_path / "out", BATCHED)
    (report,) = outcome.passes
    assert math.isfinite(report.after)


def test_weights_by_probes(t5: Path, tmp_path: Path) -> None:
    recipe = recipe_of(t5, allocation={"name": "global", "weights": "probes"}, sites={"blocks": "0,2"})
    assert make_checkpoint(recipe, tmp_path / "out", BATCHED).plan.changed


# Source and target


def pairs_file(folder: Path) -> Path:
    file = folder / "pairs.jsonl"
    rows = [
        {"article": tiny_text(9, seed=n), "summary": tiny_text(2 + n % 3, seed=n + 100), "text": "w1"}
        for n in range(12)
    ]
    file.write_text("\n".join(map(json.dumps, rows)))
    return file


def test_pairs_of_fields(t5: Path, tmp_path: Path) -> None:
    calibration = {"corpus": str(pairs_file(tmp_path)), "column": "article", "target": "summary", "samples": 6}
    outcome = make_checkpoint(
        recipe_of(t5, calibration={**calibration, "length": 24}), tmp_path / "out", How(batch_size=2)
    )
    assert outcome.recipe.calibration.cut == "pairs"
    tokenizer = tiny_tokenizer()
    tokens = eckart.read_tokens(
        calibration["corpus"], tokenizer, samples=6, length=24, cut="pairs", column="article", target="summary"
    )
    assert tokens.split == 9
    for row in range(6):
        ids, mask = (side[row].tensor_split([9]) for side in (tokens.ids, tokens.mask))
        source, target = (tokenizer.decode(part[real]) for part, real in zip(ids, mask, strict=True))
        assert (len(source.split()), 2 <= len(target.split()) <= 4) == (9, True)
    assert Path(tmp_path / "out" / "recipe.yaml").read_text().count("target: summary") == 1


def test_halves_of_plain_text_have_special_tokens_at_both_ends() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    tokens = eckart.sample_halves(Text((tiny_text(200),), "", {"corpus": "words"}), tokenizer, samples=5, length=16)
    assert tokens.ids.shape == (5, 16)
    assert tokens.split == 8
    for half in tokens.ids.tensor_split([8], 1):
        assert (half[:, 0] == BOS).all()
        assert (half[:, -1] == EOS).all()
    stream = encode(Text((tiny_text(200),), "", {}), tokenizer).tolist()
    content = [*tokens.ids[1, 1:7].tolist(), *tokens.ids[1, 9:15].tolist()]
    assert any(stream[at : at + 12] == content for at in range(0, len(stream), 12))


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ({"target": "summary"}, "train.jsonl.* has no text field 'summary'"),
        ({"cut": "windows"}, "T5ForConditionalGeneration reads pairs of source and target, and not windows"),
        ({"cut": "pairs"}, "pairs need the field that holds the target"),
        ({"length": 1}, "do not fit|length 1"),
    ],
    ids=str,
)
def test_calibrations_that_are_refused(t5: Path, tmp_path: Path, calibration: dict[str, Any], message: str) -> None:
    whole = {"corpus": str(t5 / "train.jsonl"), "samples": 4, "length": 16, **calibration}
    with pytest.raises(ValueError, match=message):
        make_checkpoint(recipe_of(t5, calibration=whole), tmp_path / "out", BATCHED)


def test_targets_are_for_encoder_decoders_and_for_files_with_fields(place: Path, t5: Path, tmp_path: Path) -> None:
    whole = {"corpus": str(pairs_file(tmp_path)), "samples": 4, "length": 16, "target": "summary"}
    with pytest.raises(ValueError, match="LlamaForCausalLM reads one text: leave out target"):
        make_checkpoint(recipe_of(place, calibration=whole), tmp_path / "out", BATCHED)
    (tmp_path / "plain.txt").write_text(tiny_text(300))
    with pytest.raises(ValueError, match="plain text, which has no field for a target"):
        make_checkpoint(
            recipe_of(t5, calibration={**whole, "corpus": str(tmp_path / "plain.txt")}), tmp_path / "out", BATCHED
        )


# Evaluation


@torch.no_grad()
@pytest.mark.parametrize("model_type", ENCODER_DECODER_CONFIGS)
def test_perplexity_is_of_the_targets(model_type: str) -> None:
    model = tiny_model(model_type)
    stream = torch.arange(7, 7 + 60)
    result = perplexity(model, stream, length=16, specials=((BOS,), (EOS,)))
    losses = []
    for start in range(0, 60, 12):
        source, target = ([BOS, *stream[at : at + 6].tolist(), EOS] for at in (start, start + 6))
        labels = torch.tensor([target])
        logits = model(input_ids=torch.tensor([source]), decoder_input_ids=decoder_inputs(model, labels)).logits
        losses.append(nn.functional.cross_entropy(logits[0, 1:-1], labels[0, 1:-1]))
    assert result.value == pytest.approx(float(torch.stack(losses).mean().exp()), rel=1e-5)
    assert result.settings["scored_tokens"] == 5 * 6
    assert result.n == 5


def test_uniform_logits_have_the_vocabulary_as_perplexity() -> None:
    model = tiny_model("t5")
    nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, torch.arange(7, 67), length=12).value == pytest.approx(96, rel=1e-5)


@pytest.mark.parametrize("model_type", ENCODER_DECODER_CONFIGS)
@pytest.mark.parametrize("task", ["accumulation", "lm-eval:piqa", "probing:cola"])
def test_other_evaluations_are_refused(tmp_path: Path, task: str, model_type: str) -> None:
    model, tokenizer = tiny_model(model_type), tiny_tokenizer()
    (tmp_path / "text.txt").write_text(tiny_text(200))
    name = task if ":" in task else f"{task}:{tmp_path / 'text.txt'}"
    if task == "probing:cola":
        rows = [{"sentence": tiny_text(4, seed=n), "label": n % 2} for n in range(20)]
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        name = f"probing:{tmp_path / 'rows.jsonl'}"
    with pytest.raises(ValueError, match=r"encoder-decoder|not a causal language model"):
        eckart.evaluate(
            model,
            tokenizer,
            [eckart.Task(name, column="sentence" if "rows" in name else None, length=16)],
            reference=tiny_model(model_type),
            errors=object(),  # type: ignore[arg-type]
            blocks=("x",),
        )


# Whisper reads sound


@pytest.fixture(scope="module")
def whisper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Whisper, its feature extractor, and a table of sounds with transcripts."""
    place = put_model(tmp_path_factory.mktemp("whisper"), "whisper")
    extractor = WhisperFeatureExtractor(feature_size=8, sampling_rate=240, hop_length=10, chunk_length=1, n_fft=120)
    extractor.save_pretrained(place / "model")
    rows = []
    for number in range(10):
        write_wave(place / f"{number}.wav", [round(9000 * math.sin(at * (1 + number) / 9)) for at in range(200)], 240)
        rows.append({"audio": f"{number}.wav", "text": tiny_text(3 + number % 4, seed=number)})
    (place / "sounds.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return place


def write_wave(file: Path, numbers: list[int], rate: int) -> None:
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes(struct.pack(f"<{len(numbers)}h", *numbers))


def sounds_of(place: Path, **changes: Any) -> dict[str, Any]:
    return {"corpus": str(place / "sounds.jsonl"), "target": "text", "samples": 8, "length": 12, **changes}


@pytest.mark.parametrize(
    "keys", [{"method": "best", "refine": {"steps": 2}}, {"method": "fwsvd"}, {"method": "best", "bits": 8}], ids=str
)
def test_whisper_is_calibrated_on_sounds_and_transcripts(whisper: Path, tmp_path: Path, keys: dict[str, Any]) -> None:
    # Adam divides by what a gradient is usually, so that rounding in a gradient near zero is as large as a step.
    both(whisper, tmp_path, tolerance=1e-3 if "refine" in keys else 1e-5, calibration=sounds_of(whisper), **keys)
    ours = eckart.load_model(tmp_path / "out")
    assert ours.generate(input_features=tiny_sound(), max_new_tokens=4, do_sample=False).shape[0] == 2
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert extractor.to_dict() == AutoFeatureExtractor.from_pretrained(whisper / "model").to_dict()


def test_what_whisper_calibrates_on_is_what_it_reads(whisper: Path) -> None:
    model, tokenizer = eckart.load_model(whisper / "model"), tiny_tokenizer()
    extractor = AutoFeatureExtractor.from_pretrained(whisper / "model")
    tokens = sample_sounds(
        str(whisper / "sounds.jsonl"), model, extractor, tokenizer, samples=5, length=12, target="text"
    )
    assert tokens.split == 12
    sites = find_sites(model)
    seen: dict[str, list[torch.Tensor]] = {site.name: [] for site in sites}
    for site in sites:
        model.get_submodule(site.name).register_forward_pre_hook(
            lambda _module, args, name=site.name: seen[name].append(args[0].detach().flatten(0, -2))
        )
    for row in range(5):
        labels = tokens.ids[row, 12:][tokens.mask[row, 12:]][None]
        model(input_features=tokens.sound[row : row + 1], decoder_input_ids=decoder_inputs(model, labels))
    expected = {name: torch.cat(rows).double() for name, rows in seen.items()}
    for block in eckart.calibrate(model, tokens, eckart.build_method("asvd-i"), batch_size=2):
        for site in (site for site in sites if site.block == block.block):
            moments, x = block.inputs[site.input_group], expected[site.name]
            assert moments.count == len(x)
            assert relative(moments.second_moment, x.T @ x / len(x)) < 5e-6


def test_what_the_shift_puts_in_front_is_not_put_there_twice(whisper: Path) -> None:
    model, plain, starting = eckart.load_model(whisper / "model"), tiny_tokenizer(), tiny_tokenizer()
    extractor = AutoFeatureExtractor.from_pretrained(whisper / "model")
    assert model.config.decoder_start_token_id == EOS
    starting.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", EOS)]
    )
    first, second = (
        sample_sounds(str(whisper / "sounds.jsonl"), model, extractor, each, samples=5, length=12, target="text")
        for each in (plain, starting)
    )
    assert torch.equal(first.ids, second.ids)
    assert torch.equal(first.mask, second.mask)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": 11}, "has 10 rows; 11 were asked for"),
        ({"column": "text", "target": "audio"}, r"cannot be read as a \.wav file"),
        ({"target": "nothing"}, "no text field 'nothing'"),
        ({"corpus": "slow.jsonl"}, "800 numbers of 16 bits a second, and the model reads 240; convert it"),
    ],
    ids=str,
)
def test_sounds_that_are_refused(
    whisper: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_wave(tmp_path / "slow.wav", [0] * 50, 800)
    (tmp_path / "slow.jsonl").write_text("\n".join([json.dumps({"audio": "slow.wav", "text": "w1 w2"})] * 8))
    with pytest.raises(ValueError, match=message):
        make_checkpoint(recipe_of(whisper, calibration=sounds_of(whisper, **changes)), tmp_path / "out", BATCHED)


def test_whisper_is_compressed_without_text_and_generates(whisper: Path, tmp_path: Path) -> None:
    recipe = parse_recipe({"model": str(whisper / "model"), "method": "svd", "keep": 0.6})
    outcome = make_checkpoint(recipe, tmp_path / "expected", BATCHED)
    linears = sum(site.num_params for site in outcome.plan.sites)
    assert outcome.summary.macs_per_token[0] == linears + 96 * 32  # those and the head
    compress_out_of_core(recipe, tmp_path / "out", BATCHED)
    ours = eckart.load_model(tmp_path / "out")
    stock = AutoModelForSpeechSeq2Seq.from_pretrained(tmp_path / "expected").eval()
    assert torch.equal(logits_of(ours, tiny_pairs(2)), logits_of(stock, tiny_pairs(2)))
    written = [each.generate(input_features=tiny_sound(), max_new_tokens=4, do_sample=False) for each in (ours, stock)]
    assert torch.equal(*written)


def test_whisper_cannot_be_calibrated_or_measured_on_text(whisper: Path, tmp_path: Path) -> None:
    place = whisper
    with pytest.raises(ValueError, match=r"reads input_features and no text: it can be neither calibrated nor.*svd"):
        make_checkpoint(recipe_of(place, method="best"), tmp_path / "out", BATCHED)
    with pytest.raises(ValueError, match="reads input_features and no text"):
        eckart.evaluate(tiny_model("whisper"), tiny_tokenizer(), [f"perplexity:{place / 'train.jsonl'}"])
