"""GGUF files and adapters where a model is named: commands, runs, the card, and digests of what a run reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eckart.models.loading import load_model, load_tokenizer, save
from eckart.runs.engine.source import Source
from eckart.runs.experiment import run as carry_out
from eckart.runs.how import How
from eckart.runs.inputs import INPUTS, inputs_of
from eckart.runs.recipe import parse_recipe
from eckart.support.files import digest_of
from gguf_files import write_gguf
from tiny import Run, tiny_text, tiny_tokenizer


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("the cat a dog " * 400)
    return file


def test_a_gguf_file_in_every_command(run: Run, text: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "m.gguf", tmp_path / "out"
    write_gguf(file, quantised="Q8_0")
    given = ["--method", "asvd-i", "--keep", "0.7", "--calibration", text, "--samples", "4", "--length", "16"]
    status, printed = run("compress", file, out, *given)
    assert status == 0, printed
    loaded = load_model(out)
    assert loaded.dtype == torch.float32
    assert load_tokenizer(out).eos_token == "</s>"
    origin = json.loads((out / "compression.json").read_text())["origin"]
    assert origin == {"gguf": "m.gguf", "quantised": "Q8_0", "files": {str(file): {"m.gguf": digest_of(file)}}}
    card = " ".join((out / "README.md").read_text().split())
    assert f"the GGUF file m.gguf (SHA-256 {digest_of(file)}), whose weights were stored as Q8_0" in card
    task = ["--task", f"perplexity:{text}", "--length", "16", "--limit", "4"]
    for command in (
        ["eval", out, *task, "--task", "cost", "--reference", file, "--out", tmp_path / "a"],
        ["eval", file, *task, "--out", tmp_path / "b"],
        ["inspect", file, "--keep", "0.5"],
        ["inspect", file, "--verify"],
    ):
        status, printed = run(*command)
        assert status == 0, printed
    status, printed = run("compress", file, tmp_path / "no", "--keep", "0.7", "--out-of-core", *given[-6:])
    assert status == 2
    assert "--dense` writes one, give that" in " ".join(printed.split())


def test_a_run_of_a_gguf_file_knows_it_again(text: Path, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    write_gguf(file)
    keys: dict[str, Any] = {"model": str(file), "method": "svd", "keep": 0.5}
    keys["evaluate"] = [{"task": f"perplexity:{text}", "length": 16}]
    recipe = parse_recipe(keys)
    carry_out(recipe, tmp_path / "run", How())
    assert json.loads((tmp_path / "run" / INPUTS).read_text())[f"the model {file}"] == {"m.gguf": digest_of(file)}
    write_gguf(file, quantised="F16")
    with pytest.raises(FileExistsError, match=r"m\.gguf is changed"):
        carry_out(recipe, tmp_path / "run", How())


def test_an_adapter_is_its_files_and_its_bases(run: Run, tmp_path: Path) -> None:
    peft: Any = pytest.importorskip("peft", reason="needs peft (pip install 'eckart[peft]')")
    base, lora, file = tmp_path / "base", tmp_path / "lora", tmp_path / "m.gguf"
    write_gguf(file)
    save(load_model(file), base, tiny_tokenizer())
    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    peft.get_peft_model(load_model(base), config).save_pretrained(lora)
    inputs = inputs_of([str(lora)], (), None)
    assert inputs.keys() == {f"the model {lora}", f"the model {base}"}
    assert inputs[f"the model {lora}"].keys() == {"adapter_config.json", "adapter_model.safetensors"}
    assert "model.safetensors" in inputs[f"the model {base}"]
    (tmp_path / "words.txt").write_text(tiny_text(400))
    status, printed = run("compress", lora, tmp_path / "out", "--method", "svd", "--keep", "0.5")
    assert status == 0, printed
    origin = json.loads((tmp_path / "out/compression.json").read_text())["origin"]
    assert (origin["adapter"], origin["base"]) == ("LORA", str(base))
    assert origin["files"][str(base)]["model.safetensors"] == digest_of(base / "model.safetensors")
    assert f"The dense model is {base} with an adapter (LORA) merged" in (tmp_path / "out/README.md").read_text()
    status, printed = run("export", lora, tmp_path / "dense", "--dense")
    assert status == 0, printed
    merged = load_model(lora).state_dict()
    assert all(torch.equal(merged[name], value) for name, value in load_model(tmp_path / "dense").state_dict().items())


def test_a_worker_makes_the_same_model_of_the_same_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_gguf(tmp_path / "m.gguf", quantised="Q8_0")
    model = load_model("m.gguf", dtype="bfloat16")
    source = Source.of(model)
    monkeypatch.chdir("/")
    loaded = source.load_own()
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
