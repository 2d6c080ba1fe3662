"""Matching: files that lack a tensor of the model, or hold another one, are one error for every loader."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from eckart.models.loading import load_classifier, load_model
from eckart.models.shards import Skeleton
from eckart.models.weight_files import CheckpointError
from tiny import BLOCKS, CONFIGS, ENCODERS, Run, closed_model, logits_of, tiny_model, tiny_text, tiny_tokenizer

Tensors = dict[str, Tensor]
# Every way in which we read a dense model.
LOADERS: dict[str, Callable[[Path], Any]] = {
    "model": load_model,
    "classifier": lambda path: load_classifier(path, ("no", "yes")),
    "out of core": Skeleton,
}
UP = "model.layers.1.mlp.up_proj.weight"


def rewrite(folder: Path, tensors: Callable[[Tensors], object] | None = None, **entries: Any) -> Path:
    """Change a saved model's tensors, and entries of its configuration."""
    file = folder / "model.safetensors"
    if tensors is not None:
        state = load_file(file)
        tensors(state)
        save_file(state, file, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))
    return folder


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A dense llama of three blocks, with an embedding that its head does not share."""
    tiny_model("llama", tie_word_embeddings=False).save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def refusal(path: Path, loader: str = "model") -> str:
    with pytest.raises(CheckpointError) as caught:
        LOADERS[loader](path)
    return str(caught.value)


@pytest.mark.parametrize("model_type", sorted(CONFIGS))
def test_every_family_loads_as_it_was_saved(model_type: str, tmp_path: Path) -> None:
    model = closed_model(model_type)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert type(loaded) is type(model)
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt", "bert", "modernbert"])
def test_tied_weights_are_not_missed(model_type: str, tie: bool, tmp_path: Path) -> None:
    model = tiny_model(model_type, tie_word_embeddings=tie)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(load_model(tmp_path)), logits_of(model))


@pytest.mark.parametrize("head", ["base", "masked", "classifier"])
@pytest.mark.parametrize("model_type", sorted(ENCODERS - {"albert"}))
def test_a_classifier_may_lack_its_head_and_pooler_alone(model_type: str, head: str, tmp_path: Path) -> None:
    model = tiny_model(model_type, head, num_labels=2)
    model.save_pretrained(tmp_path)
    _, new = load_classifier(tmp_path, ("no", "yes"))
    base = f"{model.base_model_prefix}."
    assert all(not name.startswith(base) or name.startswith(f"{base}pooler.") for name in new)
    assert bool(new) == (head != "classifier")


@pytest.mark.parametrize("loader", LOADERS)
def test_a_missing_tensor(llama: Path, loader: str) -> None:
    message = refusal(rewrite(llama, lambda t: t.pop(UP)), loader)
    assert f"{llama} does not hold the Llama" in message
    assert f"that its config.json describes: missing tensor {UP}. Save or download it again" in message


@pytest.mark.parametrize("loader", LOADERS)
def test_fewer_layers_than_the_config_says(llama: Path, loader: str) -> None:
    message = refusal(rewrite(llama, num_hidden_layers=BLOCKS + 2), loader)
    assert message.count("missing tensor model.layers.") == 5
    assert "; and 13 more" in message


@pytest.mark.parametrize("loader", LOADERS)
def test_more_layers_than_the_config_says(llama: Path, loader: str) -> None:
    message = refusal(rewrite(llama, num_hidden_layers=BLOCKS - 1), loader)
    assert message.count(f"unknown tensor model.layers.{BLOCKS - 1}.") == 5
    assert "; and 4 more" in message


@pytest.mark.parametrize("loader", LOADERS)
@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.bias", "model.norm.bias", "model.layers.1.extra.weight"])
def test_a_tensor_that_has_no_place_in_a_part_of_the_model(llama: Path, name: str, loader: str) -> None:
    assert f"unknown tensor {name}." in refusal(rewrite(llama, lambda t: t.update({name: torch.ones(3)})), loader)


@pytest.mark.parametrize("loader", LOADERS)
def test_another_shape(llama: Path, loader: str) -> None:
    message = refusal(rewrite(llama, lambda t: t.update({UP: torch.ones(5, 7)})), loader)
    assert f"{UP} has shape (5, 7), expected (48, 32)." in message


def test_the_head_of_a_language_model_is_not_drawn_at_random(llama: Path) -> None:
    message = refusal(rewrite(llama, lambda t: t.pop("lm_head.weight")))
    assert "missing tensor lm_head.weight." in message
    _, new = load_classifier(llama, ("no", "yes"))
    assert new == ("score.weight",)


def test_all_faults_are_one_error(llama: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        del tensors[UP]
        tensors["model.norm.weight"] = torch.ones(31)
        tensors[UP.replace("weight", "bias")] = torch.ones(48)

    message = refusal(rewrite(llama, spoil))
    for part in (
        f"missing tensor {UP}",
        "unknown tensor model.layers.1.mlp.up_proj.bias",
        "norm.weight has shape (31,)",
    ):
        assert part in message


@pytest.mark.parametrize("kind", [torch.bool, torch.int8, torch.int64])
@pytest.mark.parametrize("loader", LOADERS)
def test_integers_are_no_weights(llama: Path, kind: torch.dtype, loader: str) -> None:
    message = refusal(rewrite(llama, lambda t: t.update({UP: t[UP].to(kind)})), loader)
    stored = {torch.bool: "BOOL", torch.int8: "I8", torch.int64: "I64"}[kind]
    assert f"layers.1.mlp.up_proj.weight is stored as {stored}, expected a float type." in message


# What the class leaves out as a whole, and tables that it makes anew, are no error.


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("llama", ["model.layers.0.self_attn.rotary_emb.inv_freq", "v_head.summary.weight", "mtp.layers.0.fc.weight"]),
        ("gpt2", ["transformer.h.0.attn.bias", "transformer.h.1.attn.masked_bias"]),
        ("gpt_neox", ["gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"]),
        ("bert", ["bert.embeddings.position_ids", "bert.pooler.dense.weight", "cls.seq_relationship.bias"]),
        ("roberta", ["roberta.pooler.dense.bias", "roberta.embeddings.position_ids"]),
    ],
)
@pytest.mark.parametrize("loader", ["model", "out of core"])
def test_what_the_class_leaves_out_does_no_harm(model_type: str, names: list[str], loader: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    model.save_pretrained(tmp_path)
    rewrite(tmp_path, lambda t: t.update({name: torch.ones(4) for name in names}))
    loaded = LOADERS[loader](tmp_path)
    if loader == "model":
        assert torch.equal(logits_of(loaded), logits_of(model))


def test_names_of_older_releases_still_load(tmp_path: Path) -> None:
    model = tiny_model("bert")
    model.save_pretrained(tmp_path)

    def rename(tensors: Tensors) -> None:
        for name in [name for name in tensors if "LayerNorm" in name]:
            new = name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
            tensors[new] = tensors.pop(name)

    assert torch.equal(logits_of(load_model(rewrite(tmp_path, rename))), logits_of(model))


def test_names_without_the_base_model_s_prefix_load(tmp_path: Path) -> None:
    model = tiny_model("gpt2")
    model.save_pretrained(tmp_path)

    def strip(tensors: Tensors) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    assert torch.equal(logits_of(load_model(rewrite(tmp_path, strip))), logits_of(model))


def test_the_old_format_is_checked_as_well(llama: Path) -> None:
    state = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(state, llama / "pytorch_model.bin")
    assert load_model(llama)
    torch.save({**state, UP: state[UP].to(torch.int8)}, llama / "pytorch_model.bin")
    assert "layers.1.mlp.up_proj.weight is stored as int8, expected a float type" in refusal(llama)
    del state[UP]
    torch.save(state, llama / "pytorch_model.bin")
    assert f"missing tensor {UP}" in refusal(llama)


def test_loading_draws_what_it_drew_before(tmp_path: Path) -> None:
    """The check takes no random number: a new head is that of the seed."""
    tiny_model("bert").save_pretrained(tmp_path)
    from transformers import AutoModelForSequenceClassification

    torch.manual_seed(5)
    expected = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=2).state_dict()
    torch.manual_seed(5)
    model, new = load_classifier(tmp_path, ("no", "yes"))
    assert "classifier.weight" in new
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


# Sizes that no file has are refused before a model is built.


@pytest.mark.parametrize("loader", LOADERS)
def test_a_hundred_thousand_layers(llama: Path, loader: str) -> None:
    rewrite(llama, num_hidden_layers=100_000)
    start = time.perf_counter()
    message = refusal(llama, loader)
    assert time.perf_counter() - start < 10
    assert "config.json says num_hidden_layers: 100,000, and the files hold 30 tensors" in message


def test_a_hundred_thousand_experts(tmp_path: Path) -> None:
    tiny_model("mixtral").save_pretrained(tmp_path)
    assert "config.json says num_local_experts: 100,000" in refusal(rewrite(tmp_path, num_local_experts=100_000))


def test_widths_that_no_memory_holds(llama: Path) -> None:
    message = refusal(rewrite(llama, vocab_size=10**12))
    assert "model.embed_tokens.weight has shape (96, 32), expected (1000000000000, 32)" in message


# Commands


@pytest.mark.parametrize(
    "command", [("inspect",), ("eval", "--task", "perplexity:text.txt"), ("compress", "out", "--keep", "0.5")]
)
def test_commands_end_with_the_error(
    run: Run, llama: Path, command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(tiny_text(300))
    tiny_tokenizer().save_pretrained(llama)
    rewrite(llama, lambda t: t.pop(UP))
    name, *others = command
    status, printed = run(name, llama, *others)
    assert status == 2
    assert printed.count("error:") == 1
    assert f"missing tensor {UP}" in printed
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "entries",
    [{"hidden_size": "wide"}, {"num_attention_heads": 0}, {"num_hidden_layers": "three"}, {"rope_parameters": 3}],
)
@pytest.mark.parametrize("loader", LOADERS)
def test_a_config_that_is_none_is_one_error(llama: Path, entries: dict[str, Any], loader: str) -> None:
    with pytest.raises(ValueError, match=str(llama)):
        LOADERS[loader](rewrite(llama, **entries))


# Numbers that are not finite are refused before anything is computed, wherever in the model they are.


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
@pytest.mark.parametrize("name", [UP, "model.layers.1.input_layernorm.weight", "model.embed_tokens.weight"])
@pytest.mark.parametrize("where", [(), ("--out-of-core",)])
def test_a_model_with_numbers_that_are_not_finite_is_not_compressed(
    run: Run, llama: Path, name: str, value: float, where: tuple[str, ...], tmp_path: Path
) -> None:
    tiny_tokenizer().save_pretrained(llama)
    rewrite(llama, lambda t: t[name].view(-1)[3:4].fill_(value))
    arguments = ("--method", "svd", "--keep", "0.5", "--exclude", "mlp", *where)
    status, printed = run("compress", llama, tmp_path / "out", *arguments)
    assert status == 2
    assert f"error: {llama}: {name} has numbers that are not finite" in printed
    assert not (tmp_path / "out").exists()
