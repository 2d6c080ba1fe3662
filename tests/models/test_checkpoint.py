"""Checkpoints: what stock `from_pretrained` makes of a saved model, and what it refuses."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

import eckart  # noqa: F401 (registers the checkpoint format)
from eckart.allocation import plan
from eckart.calibration.moments import calibrate
from eckart.compression.replace import compress
from eckart.lowrank import build_method
from eckart.models.checkpoint import CheckpointError, LowRankConfig
from eckart.models.linear import LowRankLinear
from eckart.models.loading import save
from eckart.models.sites import low_rank_modules
from tiny import DEFAULT_CONFIGS, ENCODERS, FAMILY_CONFIGS, HEADS, logits_of, tiny_model, tiny_tokens

ALL = sorted({*FAMILY_CONFIGS, *DEFAULT_CONFIGS})
SHARD = "30KB"


def compressed(model: PreTrainedModel, method: str = "sfsd", keep: float = 0.6) -> PreTrainedModel:
    """`model`, compressed in place. sfsd by default: it adds biases, the hardest thing to store."""
    built = build_method(method)
    compress(model, built, plan(model, keep), calibrate(model, tiny_tokens(4, 12), built))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """(in memory, directory) of a compressed model; each is made once."""

    @cache
    def make(model_type: str, head: str | None = None, **changes: Any) -> tuple[PreTrainedModel, Path]:
        model = compressed(tiny_model(model_type, head, **changes))
        return model, save(model, tmp_path_factory.mktemp(model_type) / "out", max_shard_size=SHARD)

    return make


def head_of(model_type: str) -> str:
    return "masked" if model_type in ENCODERS else "causal"


def same_tensors(first: PreTrainedModel, second: PreTrainedModel) -> bool:
    ours, theirs = first.state_dict(), second.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


# Round trips


@pytest.mark.parametrize("model_type", ALL)
def test_round_trip_is_exact_and_repeats(saved: Any, model_type: str, tmp_path: Path) -> None:
    model, path = saved(model_type)
    loaded = HEADS[head_of(model_type)].from_pretrained(path)
    ranks = {name: module.rank for name, module in low_rank_modules(model).items()}
    assert ranks
    assert {name: module.rank for name, module in low_rank_modules(loaded).items()} == ranks
    assert same_tensors(model, loaded)
    assert torch.equal(logits_of(loaded), logits_of(model))
    loaded.save_pretrained(tmp_path / "again")
    again = HEADS[head_of(model_type)].from_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(again), logits_of(model))
    first, second = (json.loads((d / "config.json").read_text()) for d in (path, tmp_path / "again"))
    assert first["quantization_config"] == second["quantization_config"]
    assert first["quantization_config"]["recipe"] == {"method": "sfsd", "options": {"centred": True}}


@pytest.mark.parametrize("model_type", ALL)
def test_base_model_reads_the_same_directory(saved: Any, model_type: str, tmp_path: Path) -> None:
    model, path = saved(model_type)
    base = HEADS["base"].from_pretrained(path)
    ids = tiny_tokens(2, 12).ids
    with torch.no_grad():
        expected = model.base_model(input_ids=ids).last_hidden_state
        assert torch.equal(base(input_ids=ids).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        again = HEADS["base"].from_pretrained(tmp_path / "base")
        assert torch.equal(again(input_ids=ids).last_hidden_state, expected)
        # and the base model's own directory carries a head model, whose head is then new
        headed = HEADS[head_of(model_type)].from_pretrained(tmp_path / "base")
        assert torch.equal(headed.base_model(input_ids=ids).last_hidden_state, expected)


@pytest.mark.parametrize("model_type", ALL)
def test_classifier_reads_a_pretrained_directory_and_its_own(saved: Any, model_type: str, tmp_path: Path) -> None:
    model, path = saved(model_type)
    classifier = HEADS["classifier"].from_pretrained(path, num_labels=3)
    tokens = tiny_tokens(2, 12)
    hidden = classifier.base_model(input_ids=tokens.ids).last_hidden_state
    assert torch.equal(hidden, model.base_model(input_ids=tokens.ids).last_hidden_state)
    classifier.save_pretrained(tmp_path / "own")
    own = HEADS["classifier"].from_pretrained(tmp_path / "own")
    assert own.config.num_labels == 3
    assert torch.equal(logits_of(own, tokens), logits_of(classifier, tokens))


@pytest.mark.parametrize("model_type", ["bert", "roberta", "llama"])
def test_a_compressed_classifier_round_trips(saved: Any, model_type: str) -> None:
    model, path = saved(model_type, "classifier", num_labels=4)
    loaded = HEADS["classifier"].from_pretrained(path)
    assert loaded.config.num_labels == 4
    assert same_tensors(model, loaded)
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "opt", "gpt_neox", "bert"])
def test_tied_and_untied_embeddings(saved: Any, model_type: str, tie: bool) -> None:
    model, path = saved(model_type, tie_word_embeddings=tie)
    loaded = HEADS[head_of(model_type)].from_pretrained(path)
    embedding, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert (embedding is head) == tie
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_large_models_are_sharded(saved: Any) -> None:
    _, path = saved("llama")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = set(index["weight_map"].values())
    assert len(shards) > 1
    assert shards == {file.name for file in path.glob("*.safetensors")}


def test_one_file_when_small(tmp_path: Path) -> None:
    model = compressed(tiny_model("llama"))
    path = save(model, tmp_path / "out")
    assert [file.name for file in path.glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits_of(HEADS["causal"].from_pretrained(path)), logits_of(model))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["auto", torch.float32, torch.bfloat16, torch.float16])
def test_types(saved: Any, stored: torch.dtype, asked: Any) -> None:
    model, path = saved("llama", dtype=stored)
    loaded = HEADS["causal"].from_pretrained(path, dtype=asked)
    expected = stored if asked == "auto" else asked
    assert {value.dtype for value in loaded.state_dict().values()} == {expected}
    if expected == stored:
        assert same_tensors(model, loaded)
        assert torch.equal(logits_of(loaded), logits_of(model))
    else:
        site, module = next(iter(low_rank_modules(model).items()))
        assert torch.equal(loaded.get_submodule(site).left.weight, module.left.weight.to(expected))
        assert torch.isfinite(logits_of(loaded)).all()


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}, "cpu"])
def test_device_maps(saved: Any, device_map: Any) -> None:
    model, path = saved("llama")
    loaded = HEADS["causal"].from_pretrained(path, device_map=device_map)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_a_block_may_lie_on_disk(saved: Any, tmp_path: Path) -> None:
    model, path = saved("llama")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    loaded = HEADS["causal"].from_pretrained(path, device_map=places, offload_folder=tmp_path)
    assert loaded.model.layers[1].mlp.down_proj.left.weight.device.type == "meta"
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("model_type", [t for t in ALL if t not in ENCODERS])
def test_generates_with_a_cache(saved: Any, model_type: str) -> None:
    model, path = saved(model_type)
    loaded = HEADS["causal"].from_pretrained(path)
    ids = tiny_tokens(2, 8).ids
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    generated = loaded.generate(ids, use_cache=True, **settings)
    assert generated.shape == (2, 14)
    assert torch.equal(generated, model.generate(ids, use_cache=True, **settings))
    assert torch.equal(generated, loaded.generate(ids, use_cache=False, **settings))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_loaded_model_changes_its_type(saved: Any, dtype: torch.dtype) -> None:
    _, path = saved("llama")
    loaded = HEADS["causal"].from_pretrained(path)
    named = {torch.float16: loaded.half, torch.bfloat16: loaded.bfloat16, torch.float32: loaded.float}
    for change in (named[dtype], lambda: loaded.to(dtype)):
        change()
        assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
        assert logits_of(loaded).dtype == dtype


def test_a_compressed_model_can_be_copied_and_shown(saved: Any) -> None:
    model, path = saved("llama")
    for one in (model, HEADS["causal"].from_pretrained(path)):
        assert torch.equal(logits_of(copy.deepcopy(one)), logits_of(model))
        assert '"quant_method": "eckart"' in str(one.config)
        assert "rank=11" in repr(one)


def test_keep_one_is_an_ordinary_checkpoint(tmp_path: Path) -> None:
    model = tiny_model("llama")
    compress(model, "svd", plan(model, 1.0))
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert torch.equal(logits_of(HEADS["causal"].from_pretrained(tmp_path)), logits_of(model))


# Training


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
def test_a_backward_pass_reaches_the_factors(saved: Any, model_type: str) -> None:
    _, path = saved(model_type)
    loaded = HEADS[head_of(model_type)].from_pretrained(path)
    ids = tiny_tokens(2, 12).ids
    loaded(input_ids=ids, labels=ids).loss.backward()
    for name, module in low_rank_modules(loaded).items():
        for parameter in module.parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name


def test_trainer_trains_and_its_checkpoint_loads(saved: Any, tmp_path: Path) -> None:
    _, path = saved("llama")
    loaded = HEADS["causal"].from_pretrained(path)
    before = loaded.model.layers[0].mlp.down_proj.left.weight.detach().clone()
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny_tokens(4, 12).ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=1, per_device_train_batch_size=2, learning_rate=1e-2,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=loaded, args=arguments, train_dataset=rows)
    trainer.train()
    assert not torch.equal(loaded.model.layers[0].mlp.down_proj.left.weight, before)
    trainer.save_model(str(tmp_path / "trained"))
    again = HEADS["causal"].from_pretrained(tmp_path / "trained").eval()
    assert torch.equal(logits_of(again), logits_of(loaded.eval()))


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize("from_disk", [True, False])
def test_adapters_find_the_factors(saved: Any, model_type: str, from_disk: bool) -> None:
    peft = pytest.importorskip("peft")
    _, path = saved(model_type)
    head = head_of(model_type)
    model = HEADS[head].from_pretrained(path) if from_disk else compressed(tiny_model(model_type))
    expected = {f"{name}.{factor}" for name in low_rank_modules(model) for factor in ("left", "right")}
    before = logits_of(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2)).eval()
    inner = adapted.base_model.model
    adapters = {name for name, module in inner.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert expected <= adapters
    assert torch.equal(logits_of(inner), before)  # an untrained adapter adds nothing
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    changed = logits_of(inner)
    assert (changed - before).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), changed, rtol=1e-4, atol=1e-4)
    assert low_rank_modules(merged).keys() == low_rank_modules(inner).keys()


# Broken checkpoints: each gives one error that names what is wrong.

LEFT = "model.layers.1.mlp.down_proj.left.weight"
SENTINEL = "model.layers.1.mlp.down_proj.weight"
NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture
def broken(saved: Any, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the llama checkpoint with its tensors or its section changed."""

    def make(
        tensors: Callable[[dict[str, Tensor]], object] | None = None,
        section: Callable[[dict[str, Any]], object] | None = None,
    ) -> Path:
        _, path = saved("llama")
        folder = tmp_path / "broken"
        shutil.copytree(path, folder)
        if tensors is not None:
            merged = {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
            for file in folder.glob("model*.safetensors*"):
                file.unlink()
            tensors(merged)
            save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
        if section is not None:
            config = json.loads((folder / "config.json").read_text())
            section(config["quantization_config"])
            (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def refusal(path: Path, head: str = "causal") -> str:
    with pytest.raises(CheckpointError) as caught:
        HEADS[head].from_pretrained(path)
    return str(caught.value)


def test_an_unbroken_copy_loads(broken: Any, saved: Any) -> None:
    path = broken(tensors=lambda t: None, section=lambda s: None)
    assert torch.equal(logits_of(HEADS["causal"].from_pretrained(path)), logits_of(saved("llama")[0]))


@pytest.mark.parametrize("head", ["causal", "base", "classifier"])
@pytest.mark.parametrize("key", [LEFT, SENTINEL, NORM, LEFT.replace("left.weight", "bias")])
def test_a_missing_tensor(broken: Any, key: str, head: str) -> None:
    message = refusal(broken(tensors=lambda t: t.pop(key)), head)
    assert f"missing tensor {key.removeprefix('model.')}." in message
    assert message.count("tensor ") == 1


def test_a_missing_tensor_outside_the_blocks(broken: Any) -> None:
    path = broken(tensors=lambda t: t.pop("lm_head.weight"))
    assert "missing tensor lm_head.weight." in refusal(path)
    HEADS["base"].from_pretrained(path)  # has no head, and needs none


@pytest.mark.parametrize("head", ["causal", "base"])
def test_an_extra_tensor(broken: Any, head: str) -> None:
    message = refusal(broken(tensors=lambda t: t.update({f"{NORM}_scale": torch.ones(3)})), head)
    assert f"unknown tensor {NORM.removeprefix('model.')}_scale." in message
    assert message.count("tensor ") == 1


@pytest.mark.parametrize("key", [LEFT, SENTINEL, NORM])
def test_a_wrong_shape(broken: Any, key: str) -> None:
    message = refusal(broken(tensors=lambda t: t.update({key: torch.ones(5, 7)})))
    assert f"{key.removeprefix('model.')} has shape (5, 7), expected (" in message
    assert message.count(" has shape ") == 1


def test_a_rank_that_the_tensors_have_not(broken: Any) -> None:
    message = refusal(broken(section=lambda s: s["sites"]["model.layers.1.mlp.down_proj"].update(rank=3)))
    assert "layers.1.mlp.down_proj.left.weight has shape (32, 11), expected (32, 3)" in message


def test_many_faults_are_one_error(broken: Any) -> None:
    def lose(tensors: dict[str, Tensor]) -> None:
        for key in [key for key in tensors if key.endswith("left.weight")]:
            del tensors[key]

    message = refusal(broken(tensors=lose))
    assert message.count("missing tensor") == 5
    assert "; and 16 more" in message


def test_a_missing_tensor_is_not_taken_for_a_renamed_one(broken: Any) -> None:
    def rename(tensors: dict[str, Tensor]) -> None:
        tensors[LEFT.replace("left.weight", "left.w")] = tensors.pop(LEFT)

    assert f"missing tensor {LEFT.removeprefix('model.')}" in refusal(broken(tensors=rename))


@pytest.mark.parametrize("number", [0, 6, "1", None])
def test_an_unknown_format_number(broken: Any, number: Any) -> None:
    message = refusal(broken(section=lambda s: s.update(format=number)))
    assert f"checkpoint format {number!r} is not known to this eckart, which reads formats 1 to 5" in message


@pytest.mark.parametrize("damage", ["truncated", "deleted"])
@pytest.mark.parametrize("head", ["causal", "base"])
def test_a_damaged_file(saved: Any, damage: str, head: str, tmp_path: Path) -> None:
    shutil.copytree(saved("llama")[1], tmp_path / "broken")
    file = sorted((tmp_path / "broken").glob("model-*.safetensors"))[1]
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    else:
        file.unlink()
    assert refusal(tmp_path / "broken", head).startswith(f"{file} is damaged or missing (")


def test_an_unknown_key(broken: Any) -> None:
    message = refusal(broken(section=lambda s: s.update(pivoted=True)))
    assert message == "unknown keys in the checkpoint's eckart section: pivoted"


@pytest.mark.parametrize("head", ["causal", "base"])
def test_a_site_that_the_model_lacks(broken: Any, head: str) -> None:
    message = refusal(
        broken(section=lambda s: s["sites"].update({"model.layers.7.mlp.up": {"rank": 2, "bias": False}})), head
    )
    assert message.startswith("model.layers.7.mlp.up is in the checkpoint's rank map but Llama")


def test_a_site_that_is_no_linear(broken: Any) -> None:
    message = refusal(broken(section=lambda s: s["sites"].update({"model.layers.0": {"rank": 2, "bias": False}})))
    assert message.startswith("model.layers.0 is in the checkpoint's rank map but is a LlamaDecoderLayer")


@pytest.mark.parametrize(
    "entry", [{"rank": 0, "bias": False}, {"rank": "4", "bias": False}, {"rank": 4}, {"rank": 4, "bias": 1}, 4]
)
def test_a_malformed_entry(broken: Any, entry: Any) -> None:
    message = refusal(broken(section=lambda s: s["sites"].update({"model.layers.1.mlp.down_proj": entry})))
    assert message.startswith("model.layers.1.mlp.down_proj: its entry")


def test_a_dense_model_is_not_compressed_by_passing_a_config(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="eckart does require the model to be pre-quantized"):
        HEADS["causal"].from_pretrained(tmp_path, quantization_config=LowRankConfig())


def test_the_loaded_modules_are_ours(saved: Any) -> None:
    _, path = saved("gpt2")
    loaded = HEADS["causal"].from_pretrained(path)
    assert isinstance(loaded.transformer.h[0].attn.c_attn, LowRankLinear)
    assert loaded.is_quantized is False
    assert loaded.hf_quantizer.is_serializable()
