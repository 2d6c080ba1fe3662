"""GGUF files as models: the same numbers as the model that was written, and one error for what cannot be read."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers.modeling_gguf_pytorch_utils as in_transformers

from eckart.models.families import FAMILIES, UnsupportedModelError
from eckart.models.gguf import ARCHITECTURES, gguf_type
from eckart.models.gguf_header import read_gguf_header
from eckart.models.loading import load_classifier, load_model, load_tokenizer, save
from eckart.models.shards import Skeleton
from eckart.models.sites import find_sites
from eckart.models.weight_files import CheckpointError
from gguf_files import MODELS, dequantised, tiny_of, write_gguf
from tiny import Run, tiny_model, tiny_tokens


def logits_of(model: Any) -> torch.Tensor:
    ids = tiny_tokens(samples=2, length=12).ids
    with torch.no_grad():
        return model(ids).logits


def test_every_architecture_has_a_row_and_transformers_knows_it() -> None:
    assert ARCHITECTURES.keys() == MODELS.keys()
    for name, row in ARCHITECTURES.items():
        assert row.model_type in FAMILIES
        assert name in in_transformers.GGUF_SUPPORTED_ARCHITECTURES


@pytest.mark.parametrize("architecture", MODELS)
def test_the_model_that_was_written(architecture: str, tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "m.gguf", architecture)
    read = load_model(tmp_path / "m.gguf", dense=True)
    assert type(read) is type(written)
    assert read.dtype == torch.float32
    assert not read.training
    state = read.state_dict()
    assert state.keys() == written.state_dict().keys()
    # gemma's norms are stored with one added, which rounds
    assert all(torch.allclose(state[name], value, atol=1e-6) for name, value in written.state_dict().items())
    assert torch.allclose(logits_of(read), logits_of(written), atol=2e-4)
    assert [site.name for site in find_sites(read)] == [site.name for site in find_sites(written)]


@pytest.mark.parametrize("switches", [("attention_bias",), ("mlp_bias",), ("attention_bias", "mlp_bias")], ids="+".join)
def test_the_biases_that_a_dense_export_may_have(switches: tuple[str, ...], tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "m.gguf", model=tiny_of("llama", **dict.fromkeys(switches, True)))
    read = load_model(tmp_path / "m.gguf")
    assert {name for name in ("attention_bias", "mlp_bias") if getattr(read.config, name)} == set(switches)
    state = written.state_dict()
    assert any(name.endswith("proj.bias") and value.abs().max() > 0.1 for name, value in state.items())
    assert all(torch.equal(read.state_dict()[name], value) for name, value in state.items())
    assert torch.equal(logits_of(read), logits_of(written))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_1"])
def test_quantised_weights_are_multiplied_out_in_float32(kind: str, tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "m.gguf", quantised=kind)
    read, half = load_model(tmp_path / "m.gguf"), load_model(tmp_path / "m.gguf", dtype="bfloat16")
    assert gguf_type(tmp_path / "m.gguf") == kind
    name = "model.layers.1.mlp.down_proj.weight"
    expected = dequantised(written.get_parameter(name), kind)
    assert torch.equal(read.get_parameter(name), expected)
    assert torch.equal(half.get_parameter(name), expected.bfloat16())
    assert (expected - written.get_parameter(name)).abs().max() > 1e-4
    assert getattr(read.config, "quantization_config", None) is None
    save(read, tmp_path / "out", load_tokenizer(tmp_path / "m.gguf"))
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    assert torch.equal(logits_of(load_model(tmp_path / "out")), logits_of(read))


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_weights_that_are_not_quantised_keep_their_type(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "m.gguf", quantised=kind)
    read = load_model(tmp_path / "m.gguf")
    assert read.dtype == dtype
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(read.get_parameter(name), written.get_parameter(name).to(dtype))


def test_a_head_of_its_own_and_a_tied_one(tmp_path: Path) -> None:
    for tied in (True, False):
        written = write_gguf(tmp_path / "m.gguf", model=tiny_of("llama", tie_word_embeddings=tied))
        read = load_model(tmp_path / "m.gguf")
        assert read.config.tie_word_embeddings is tied
        assert (read.lm_head.weight is read.model.embed_tokens.weight) is tied
        assert torch.allclose(logits_of(read), logits_of(written), atol=1e-5)


def test_what_the_metadata_say_reaches_the_configuration(tmp_path: Path) -> None:
    linear = {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    write_gguf(tmp_path / "m.gguf", "gemma3", entries={**linear, "rope.freq_base_swa": 123.0})
    rope = load_model(tmp_path / "m.gguf").config.rope_parameters
    assert (rope["full_attention"]["rope_type"], rope["full_attention"]["factor"]) == ("linear", 4.0)
    assert (rope["sliding_attention"]["rope_type"], rope["sliding_attention"]["rope_theta"]) == ("default", 123.0)
    write_gguf(tmp_path / "m.gguf", "gemma2", entries={"final_logit_softcapping": 7.0})
    assert load_model(tmp_path / "m.gguf").config.final_logit_softcapping == 7.0


def test_the_positions_of_llama_3(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 32.0, "low_freq_factor": 1.0}
    scaling |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    model = tiny_of("llama", head_dim=32, rope_theta=None, rope_parameters=scaling)
    plain = 500_000.0 ** -(np.arange(0, 32, 2) / 32)
    factors = (plain / model.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    assert factors.max() > 30
    write_gguf(tmp_path / "m.gguf", model=model, tensors={"rope_freqs.weight": factors})
    assert torch.allclose(logits_of(load_model(tmp_path / "m.gguf")), logits_of(model), atol=1e-5)
    write_gguf(tmp_path / "m.gguf", model=model, tensors={"rope_freqs.weight": factors**2})
    with pytest.raises(UnsupportedModelError, match="stretches positions otherwise than Llama 3"):
        load_model(tmp_path / "m.gguf")


def test_the_tokenizer_of_the_same_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "tokenizer_config.json").write_text("damaged, and of another model")
    tokenizer = load_tokenizer(tmp_path / "m.gguf")
    assert tokenizer.convert_ids_to_tokens(tokenizer("a the cat").input_ids) == ["a", "Ġthe", "Ġ", "c", "a", "t"]
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<pad>", "</s>")
    tokenizer.save_pretrained(tmp_path / "out")
    assert str(tmp_path) not in (tmp_path / "out/tokenizer_config.json").read_text()


def test_a_folder_with_one_file(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    (tmp_path / "config.json").write_text("{}")
    assert torch.equal(logits_of(load_model(tmp_path)), logits_of(load_model(tmp_path / "m.gguf")))
    assert load_tokenizer(tmp_path).eos_token == "</s>"
    write_gguf(tmp_path / "n.gguf")
    with pytest.raises(UnsupportedModelError, match=r"holds 2 GGUF files \(m.gguf, n.gguf\): give the path of one"):
        load_model(tmp_path)
    save(tiny_model("llama"), tmp_path / "model")
    (tmp_path / "m.gguf").rename(tmp_path / "model/m.gguf")
    assert torch.equal(logits_of(load_model(tmp_path / "model")), logits_of(tiny_model("llama")))


def test_a_classifier_of_it(tmp_path: Path) -> None:
    written = write_gguf(tmp_path / "m.gguf")
    model, new = load_classifier(tmp_path / "m.gguf", ["a", "b"])
    assert new == ("score.weight",)
    name = "layers.2.mlp.up_proj.weight"
    assert torch.equal(model.model.get_parameter(name), written.model.get_parameter(name))


def test_out_of_core_it_is_refused_with_what_to_give(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    written = write_gguf(file)
    with pytest.raises(UnsupportedModelError, match=r"m\.gguf is a GGUF file.*`eckart export .*m\.gguf DENSE --dense`"):
        Skeleton(file)
    status, printed = run("export", file, tmp_path / "dense", "--dense", "--dtype", "float16")
    assert status == 0, printed
    skeleton = Skeleton(tmp_path / "dense")
    assert skeleton.dtype == torch.float16
    assert load_tokenizer(tmp_path / "dense").eos_token == "</s>"
    with skeleton.resident(0) as block:
        assert torch.equal(block.mlp.up_proj.weight, written.model.layers[0].mlp.up_proj.weight.half())
    status, printed = run("export", tmp_path / "dense", tmp_path / "again", "--dense")
    assert status == 2
    assert "it is dense already" in " ".join(printed.split())


# {what is wrong: (entries, tensors, the sentence)}
WRONG: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "yarn": ({"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}, {}, "stretches its positions by 'yarn'"),
    "experts": ({"expert_count": 8}, {}, r"does not read expert_count \(8\) of a GGUF file"),
    "per block": ({"attention.head_count_kv": [2, 2, 1]}, {}, "attention.head_count_kv differ from block to block"),
    "values": ({"attention.value_length": 4}, {}, "keys are 8 wide, and its values are not"),
    "partly": ({"rope.dimension_count": 4}, {}, "only 4 of a head's 8 coordinates"),
    "two ways": ({"attention.causal": False}, {}, "attention.causal"),
    "missing entry": ({"block_count": None}, {}, "it lacks block_count"),
    "huge": ({"feed_forward_length": 2**31}, {}, f"feed_forward_length is {2**31}"),
    "blocks": ({"block_count": 5000}, {}, "block_count is 5,000, and it holds 30 tensors"),
    "a word": ({"block_count": "three"}, {}, "block_count is 'three'"),
    "missing tensor": ({}, {"blk.1.ffn_up.weight": None}, "missing tensor model.layers.1.mlp.up_proj.weight"),
    "no embedding": ({}, {"token_embd.weight": None}, "it lacks token_embd.weight"),
    "a bias": ({}, {"blk.1.attn_q.bias": np.zeros(32, "f")}, "unknown tensor blk.1.attn_q.bias"),
    "a shape": ({}, {"blk.1.ffn_up.weight": np.zeros((60, 32), "f")}, r"up_proj.weight has shape \(60, 32\), expected"),
    "not finite": ({}, {"output_norm.weight": np.full(32, np.nan, "f")}, "model.norm.weight has numbers that are not"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_would_become_another_model_is_refused(what: str, tmp_path: Path) -> None:
    entries, tensors, sentence = WRONG[what]
    write_gguf(tmp_path / "m.gguf", entries=entries, tensors=tensors)
    with pytest.raises((UnsupportedModelError, CheckpointError), match=sentence) as error:
        load_model(tmp_path / "m.gguf")
    assert str(error.value).startswith(str(tmp_path / "m.gguf"))
    assert "\n" not in str(error.value)


def test_an_unknown_architecture_names_those_that_are_read(tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file)
    file.write_bytes(file.read_bytes().replace(b"llama", b"mamba"))
    for load in (load_model, load_tokenizer):
        with pytest.raises(UnsupportedModelError, match="'mamba'; of GGUF files eckart reads llama, qwen2, qwen3"):
            load(file)


def test_parts_of_a_model(tmp_path: Path) -> None:
    for number in (1, 2):
        write_gguf(tmp_path / f"m-0000{number}-of-00002.gguf")
    for path in (tmp_path, tmp_path / "m-00001-of-00002.gguf"):
        with pytest.raises(UnsupportedModelError, match=r"00001-of-00002\.gguf is one of 2 parts.*llama-gguf-split"):
            load_model(path)
    with pytest.raises(ValueError, match=r"there is no file org/repo/m\.gguf; if it is on the hub, `hf download`"):
        load_model("org/repo/m.gguf")


def test_a_damaged_file_is_one_error(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", quantised="Q8_0")
    whole, file = (tmp_path / "m.gguf").read_bytes(), tmp_path / "broken.gguf"
    lengths = [0, 3, 4, 20, 100, 1000, len(whole) // 2, len(whole) - 64]
    broken = [whole[:length] for length in lengths]
    # counts and lengths that are far too large: of entries, of a string, of words, of dimensions
    words = whole.index(b"tokenizer.ggml.tokens") + len(b"tokenizer.ggml.tokens") + 8
    embedding = whole.index(b"token_embd.weight") + len(b"token_embd.weight")
    for place, length in ((8, 8), (16, 8), (24, 8), (words, 8), (embedding, 4), (embedding + 4, 8)):
        broken.append(whole[:place] + b"\xff" * (length - 1) + b"\x7f" + whole[place + length :])
    broken += [b"PK" + whole[2:], whole.replace(b"GGUF\x03", b"GGUF\x01", 1)]
    for content in broken:
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"broken\.gguf is no GGUF file, or damaged \(.*Download or") as error:
            load_model(file)
        assert "\n" not in str(error.value)


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for load in (load_model, load_tokenizer, gguf_type):
        with pytest.raises(ValueError, match=r"needs the package gguf: pip install 'eckart\[gguf\]'"):
            load(tmp_path / "m.gguf")


def test_the_header_of_a_large_vocabulary_is_read_without_its_words(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf")
    header = read_gguf_header(tmp_path / "m.gguf")
    assert header.metadata["tokenizer.ggml.tokens"] == (96,)
    assert header.tensors["token_embd.weight"].shape == (96, 32)
