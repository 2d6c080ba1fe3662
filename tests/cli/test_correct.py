"""`eckart correct` on tiny quantised models: an adapter that PEFT takes, its card, and what is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from eckart.models.loading import load_model, save
from eckart.models.quantised import load_quantised
from eckart.models.sites import find_sites, read_weight
from gguf_files import write_gguf
from tiny import Run, logits_of, relative, tiny_model, tiny_text, tiny_tokenizer

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a reference, its tokenizer, the same quantised by torchao in 8 and 4 bits, and a text."""
    pytest.importorskip("peft", reason="needs peft (pip install 'eckart[peft]')")
    torchao: Any = pytest.importorskip("torchao.quantization", reason="needs torchao: pip install 'eckart[baselines]'")
    from transformers import TorchAoConfig

    folder = tmp_path_factory.mktemp("correct")
    save(tiny_model("llama", intermediate_size=64), folder / "reference", tiny_tokenizer())
    kinds = {
        "int8": torchao.Int8WeightOnlyConfig(set_inductor_config=False),
        "int4": torchao.IntxWeightOnlyConfig(torch.int4, torchao.PerGroup(16)),  # type: ignore[attr-defined]
    }
    for name, kind in kinds.items():
        config = TorchAoConfig(quant_type=kind)
        model: Any = AutoModelForCausalLM.from_pretrained(folder / "reference", quantization_config=config)
        model.save_pretrained(folder / name)
    (folder / "train.txt").write_text(tiny_text(900, seed=1))
    return folder


def correct(run: Run, place: Path, out: Path, *more: str | Path, quantised: Path | None = None) -> tuple[int, str]:
    text = ("--calibration", place / "train.txt", "--samples", "8", "--length", "16", "--cache", place / "cache")
    return run("correct", quantised or place / "int4", out, "--reference", place / "reference", *text, *more)


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_peft_puts_the_adapter_on_the_quantised_model(bits: str, run: Run, place: Path, tmp_path: Path) -> None:
    import peft

    status, printed = correct(run, place, tmp_path / "a", "--rank", "6", quantised=place / bits)
    assert status == 0, printed
    config = "Int8WeightOnlyConfig" if bits == "int8" else "IntxWeightOnlyConfig"
    for words in (f"torchao {config}", "21 of 21 quantised ones", "bits added", "before", "with the largest error"):
        assert words in printed, words
    files = {file.name for file in (tmp_path / "a").iterdir()}
    assert files == {"adapter_config.json", "adapter_model.safetensors", "README.md", "eckart.json"}

    reference = load_model(place / "reference")
    quantised, wanted = load_quantised(place / bits).model, logits_of(reference)
    before = (logits_of(quantised) - wanted).norm()
    dense: dict[str, torch.Tensor] = {}
    factors = load_file(tmp_path / "a/adapter_model.safetensors")
    for site in find_sites(reference):
        left, right = (factors[f"base_model.model.{site.name}.lora_{side}.weight"].float() for side in "BA")
        dense[site.name] = quantised.get_submodule(site.name).weight.dequantize() + left @ right
    wrapped = peft.PeftModel.from_pretrained(quantised, str(tmp_path / "a"))
    got = logits_of(wrapped)  # type: ignore[arg-type]
    assert (got - wanted).norm() < 0.7 * before
    with torch.no_grad():
        for name, weight in dense.items():
            read_weight(reference.get_submodule(name)).copy_(weight)
    assert relative(got, logits_of(reference)) < 1e-4
    # As eckart reads the folder: added to codes, the correction would be rounded away.
    merged = load_model(tmp_path / "a")
    assert getattr(merged.config, "quantization_config", None) is None
    assert relative(logits_of(merged), got) < 1e-4

    facts = json.loads((tmp_path / "a/eckart.json").read_text())
    assert facts["file_bytes"] == (tmp_path / "a/adapter_model.safetensors").stat().st_size
    assert facts["params"] == sum(tensor.numel() for tensor in factors.values())
    assert facts["bytes"] == 2 * facts["params"]  # bfloat16 of a float32 reference
    assert facts["relative_error"][1] < facts["relative_error"][0]
    assert facts["recipe"]["order"] == "anchored"
    assert facts["calibration"] == [{"corpus": "train.txt", "samples": 8, "tokens": 128}]
    card = (tmp_path / "a/README.md").read_text()
    assert "asvd-i" in card
    assert "library_name: peft" in card
    assert f"{facts['file_bytes']:,} bytes" in card
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str((place / bits).resolve())
    assert (settings["r"], settings["lora_alpha"], settings["rank_pattern"]) == (6, 6, {})


def put_int8(kind: str, folder: Path) -> None:
    """An encoder-decoder as folder/reference, and as folder/int8 quantised by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    save(tiny_model(kind), folder / "reference", tiny_tokenizer())
    config = TorchAoConfig(quant_type=Int8WeightOnlyConfig(set_inductor_config=False))
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(folder / "reference", quantization_config=config)
    model.save_pretrained(folder / "int8")


def test_an_encoder_decoder_on_pairs_of_its_own(run: Run, place: Path, tmp_path: Path) -> None:
    import peft

    put_int8("t5", tmp_path)
    rows = [{"text": tiny_text(9, seed=n), "short": tiny_text(3 + n % 3, seed=n + 50)} for n in range(20)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    given = ["--calibration", tmp_path / "pairs.jsonl", "--target", "short", "--samples", "8", "--length", "24"]
    status, printed = run(
        "correct", tmp_path / "int8", tmp_path / "a", "--reference", tmp_path / "reference", "--rank", "8", *given
    )
    assert status == 0, printed
    wanted, quantised = logits_of(load_model(tmp_path / "reference")), load_quantised(tmp_path / "int8").model
    before = (logits_of(quantised) - wanted).norm()
    wrapped: Any = peft.PeftModel.from_pretrained(quantised, str(tmp_path / "a"))
    assert type(wrapped).__name__ == "PeftModelForSeq2SeqLM"
    assert (logits_of(wrapped) - wanted).norm() < 0.8 * before


def test_a_checkpoint_that_torchao_itself_does_not_read_is_said_to_be_one(
    run: Run, place: Path, tmp_path: Path
) -> None:
    put_int8("bart", tmp_path)
    status, printed = correct(run, place, tmp_path / "out", quantised=tmp_path / "int8")
    assert status == 2
    assert "has final_logits_bias outside of any module" in printed
    assert "correct it in Python where it was quantised, by eckart.compression.correction.correct" in printed


def test_a_gguf_file_against_its_original(run: Run, place: Path, tmp_path: Path) -> None:
    reference = load_model(place / "reference")
    write_gguf(tmp_path / "m.gguf", model=reference, quantised="Q4_0")
    status, printed = correct(
        run, place, tmp_path / "a", "--rank", "8", "--dtype", "float32", quantised=tmp_path / "m.gguf"
    )
    assert status == 0, printed
    assert "GGUF Q4_0" in printed
    wanted, before = logits_of(reference), logits_of(load_model(tmp_path / "m.gguf"))
    after = logits_of(load_model(tmp_path / "a"))  # the adapter, merged into the file that it names as its base
    assert (after - wanted).norm() < 0.7 * (before - wanted).norm()


def test_selected_linears_ranks_by_the_knapsack_and_force(run: Run, place: Path, tmp_path: Path) -> None:
    more = ("--rank", "4", "--include", "mlp", "--blocks", "last 2", "--method", "kfac", "--allocation", "global")
    status, printed = correct(run, place, tmp_path / "a", *more)
    assert status == 0, printed
    assert "of 6 quantised" in printed
    facts = json.loads((tmp_path / "a/eckart.json").read_text())
    ranks = {name: site["rank"] for name, site in facts["sites"].items()}
    assert len(ranks) == 6
    assert len(set(ranks.values())) > 1
    assert all("mlp" in name and ".0." not in name for name in ranks)
    settings = json.loads((tmp_path / "a/adapter_config.json").read_text())
    assert {name: settings["rank_pattern"].get(name, settings["r"]) for name, rank in ranks.items() if rank} == {
        name: rank for name, rank in ranks.items() if rank
    }
    assert settings["r"] == settings["lora_alpha"] == max(ranks.values())
    assert settings["alpha_pattern"] == settings["rank_pattern"]
    assert correct(run, place, tmp_path / "a", *more)[0] == 2
    status, printed = correct(run, place, tmp_path / "a", "--method", "svd", "--rank", "2", "--force")
    assert status == 0, printed
    assert "weight error" in printed  # no text was read
    assert json.loads((tmp_path / "a/eckart.json").read_text())["calibration"] == []


def changed(place: Path, out: Path, *, section: Any = None, without: str | None = None) -> Path:
    """A copy of the int4 checkpoint with another section quantization_config, or without some tensors."""
    shutil.copytree(place / "int4", out)
    config = json.loads((out / "config.json").read_text())
    if section is not None:
        (out / "config.json").write_text(json.dumps({**config, "quantization_config": section}))
    if without is not None:
        file = out / "model.safetensors"
        with safe_open(file, "pt") as opened:
            noted = opened.metadata()
        save_file({name: tensor for name, tensor in load_file(file).items() if without not in name}, file, noted)
    return out


def test_what_is_not_quantised_or_not_read_is_refused(run: Run, place: Path, tmp_path: Path) -> None:
    def refused(quantised: Path, *words: str, more: tuple[str, ...] = ()) -> None:
        status, printed = correct(run, place, tmp_path / "out", *more, quantised=quantised)
        assert status == 2, printed
        assert len(printed.strip().splitlines()) == 1, printed
        for word in words:
            assert word in printed, (word, printed)
        assert not (tmp_path / "out").exists()

    refused(place / "reference", "is not quantised", "no quantization_config", "eckart compress")
    write_gguf(tmp_path / "f16.gguf", quantised="F16")
    refused(tmp_path / "f16.gguf", "is not quantised", "F16")
    gptq = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    refused(changed(place, tmp_path / "gptq", section=gptq), "quantised by gptq", "torchao", "GGUF")
    refused(changed(place, tmp_path / "nf4", section={"load_in_4bit": True}), "bitsandbytes")
    low_rank = changed(place, tmp_path / "ours", section={"quant_method": "eckart", "format": 1, "ranks": {}})
    refused(low_rank, "low-rank")
    refused(tmp_path / "nothing", "nothing")
    refused(changed(place, tmp_path / "part", without=f"{UP}._weight_qdata"), "cannot load", "Is the download whole")
    refused(changed(place, tmp_path / "half", without=f"{UP}."), f"missing tensor {UP}.weight")
    refused(changed(place, tmp_path / "norm", without="model.norm"), "missing tensor model.norm.weight")
    refused(place / "int4", "rank", more=("--rank", "0"))
    refused(place / "int4", "sfsd fits a bias", more=("--method", "sfsd"))
    refused(place / "int4", "order", more=("--order", "sequential"))
    refused(place / "int4", "dtype", more=("--dtype", "int8"))
    refused(place / "int4", "unknown method 'asvdi'", more=("--method", "asvdi"))
    status, printed = run("correct", place / "int4", tmp_path / "out", "--reference", place / "int4")
    assert status == 2
    assert "is quantised, by torchao" in printed
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter/adapter_config.json").write_text("{}")
    refused(tmp_path / "adapter", "is an adapter")


def test_another_reference_is_one_error_that_names_the_linear(run: Run, place: Path, tmp_path: Path) -> None:
    save(tiny_model("llama", intermediate_size=96), tmp_path / "wide", tiny_tokenizer())
    status, printed = run(
        "correct", place / "int4", tmp_path / "out", "--reference", tmp_path / "wide", "--method", "svd"
    )
    assert status == 2
    assert "model.layers.0.mlp.gate_proj is 96 x 32 in the reference and 64 x 32 in the quantised model" in printed
    write_gguf(tmp_path / "m.gguf", model=load_model(place / "reference"), quantised="Q8_0")
    status, printed = run(
        "correct", tmp_path / "m.gguf", tmp_path / "out", "--reference", tmp_path / "m.gguf", "--method", "svd"
    )
    assert status == 2
    assert "none of the 21 linears differs from the reference's" in printed


def test_a_model_that_was_not_the_one_quantised_is_refused(run: Run, place: Path, tmp_path: Path) -> None:
    """Of the same shapes, or with fewer blocks: corrections of it would be of numbers that nothing ties together."""
    others = {
        "other": (tiny_model("llama", intermediate_size=64, seed=5), "zeros would be nearer"),
        "shallow": (tiny_model("llama", intermediate_size=64, num_hidden_layers=2), r"layers.2.self_attn.q_proj is in"),
    }
    for name, (model, message) in others.items():
        save(model, tmp_path / name, tiny_tokenizer())
        status, printed = correct(run, place, tmp_path / "out", "--reference", tmp_path / name)
        assert status == 2, printed
        assert message in printed
        assert "the model that was quantised?" in printed
        assert not (tmp_path / "out").exists()


def test_an_adapter_is_not_written_into_what_is_read(run: Run, place: Path) -> None:
    before = sorted(place.rglob("*"))
    for folder in ("int4", "reference"):
        status, printed = run(
            "correct", place / "int4", place / folder / "a", "--reference", place / "reference", "--method", "svd"
        )
        assert status == 2
        assert "which is read and stays as it is: give another place" in printed
    assert sorted(place.rglob("*")) == before
