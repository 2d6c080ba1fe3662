"""Refusals: what cannot be taken is named for what it is, with what to do, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from eckart.allocation import plan
from eckart.compression.replace import compress
from eckart.models.families import UnsupportedModelError
from eckart.models.loading import load_classifier, load_model, load_tokenizer, save
from eckart.models.refusals import check_source
from eckart.models.shards import Skeleton
from eckart.models.sites import find_sites
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.recipe import parse_recipe
from tiny import COMMON, VOCABULARY, Run, tiny_config, tiny_model

LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}


def folder_of(folder: Path, config: dict[str, Any] | None, **files: str) -> Path:
    """A folder with a configuration, and no weights: nobody may come to look for them."""
    folder.mkdir(exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


CODE = {"AutoConfig": "configuration_new.NewConfig", "AutoModelForCausalLM": "modeling_new.NewForCausalLM"}
# {what it is: (config, files, the sentence)}
FOLDERS: dict[str, tuple[dict[str, Any] | None, dict[str, str], str]] = {
    "code of its own": (
        {"model_type": "new", "architectures": ["NewForCausalLM"], "auto_map": CODE},
        {"modeling_new__py": "raise SystemExit('this code ran')"},
        "is a NewForCausalLM, which transformers lacks: its files bring code of their own, which runs only where",
    ),
    "code for a known type": (
        {"model_type": "llama", "architectures": ["NewForCausalLM"], "auto_map": CODE},
        {},
        "is a NewForCausalLM, which transformers lacks",
    ),
    "an unknown type": ({"model_type": "lama3", "architectures": ["X"]}, {}, "model_type 'lama3' is not known to"),
}


@pytest.mark.parametrize("what", FOLDERS)
def test_a_folder_that_is_no_model(what: str, tmp_path: Path) -> None:
    config, files, sentence = FOLDERS[what]
    folder = folder_of(tmp_path / "model", config, **files)
    for load in (load_model, load_tokenizer, Skeleton, lambda path: load_classifier(path, ["a", "b"])):
        with pytest.raises(UnsupportedModelError, match=sentence) as error:
            load(folder)
        assert str(error.value).startswith(str(folder))
        assert "\n" not in str(error.value)


def test_code_that_is_trusted_is_let_through(tmp_path: Path) -> None:
    check_source(folder_of(tmp_path / "a", FOLDERS["code of its own"][0]), trust_remote_code=True)


def test_code_that_is_not_needed_is_no_obstacle(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    (tmp_path / "out/config.json").write_text(json.dumps({**config, "auto_map": CODE}))
    check_source(tmp_path / "out")


def test_a_file_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_text("x")
    with pytest.raises(UnsupportedModelError, match=r"is a file; give the directory of .* or a \.gguf file"):
        load_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize(("kind", "guess"), [("llama", "LlamaForCausalLM"), ("bert", "Bert"), ("vit", None)])
def test_a_config_without_architectures(kind: str, guess: str | None, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", {"model_type": kind})
    with pytest.raises(UnsupportedModelError, match=r"config\.json names no architectures") as error:
        load_model(folder)
    assert ("such as" in str(error.value)) == (guess is not None)
    assert guess is None or f'["{guess}' in str(error.value)


QUANTISED: dict[str, dict[str, Any]] = {
    "bitsandbytes": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "quant_method": "bitsandbytes"},
    "gptq": {"bits": 4, "quant_method": "gptq", "group_size": 128, "dataset": "c4"},
    "awq": {"bits": 4, "quant_method": "awq", "group_size": 128, "version": "gemm"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "torchao": {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_data": {}}}},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4"},
}


def recipe_of(model: Path) -> Any:
    return parse_recipe({"model": str(model), "method": {"name": "svd"}, "keep": 0.5})


@pytest.mark.parametrize("method", QUANTISED)
def test_a_quantised_model(method: str, tmp_path: Path) -> None:
    config = {**tiny_config("llama").to_dict(), **LLAMA, "quantization_config": QUANTISED[method]}
    folder = folder_of(tmp_path / "model", config)
    sentence = f"model is quantised, by {method}: .*give the model that it was quantised from"
    with pytest.raises(UnsupportedModelError, match=sentence):
        load_model(folder, dense=True)
    with pytest.raises(UnsupportedModelError, match=sentence):
        make_checkpoint(recipe_of(folder), tmp_path / "out", How())
    model = tiny_model("llama")
    model.config.quantization_config = QUANTISED[method]
    with pytest.raises(UnsupportedModelError, match=f"the LlamaForCausalLM is quantised, by {method}"):
        find_sites(model)


def test_an_old_section_of_bitsandbytes_has_no_name(tmp_path: Path) -> None:
    section = {"load_in_8bit": True}
    model = tiny_model("llama")
    model.config.quantization_config = section
    with pytest.raises(UnsupportedModelError, match="quantised, by bitsandbytes"):
        find_sites(model)


def test_a_quantised_model_out_of_core(tmp_path: Path) -> None:
    save(tiny_model("llama"), tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    (tmp_path / "model/config.json").write_text(json.dumps({**config, "quantization_config": QUANTISED["fp8"]}))
    with pytest.raises(UnsupportedModelError, match="is quantised, by fp8"):
        Skeleton(tmp_path / "model")


SMALL: dict[str, Any] = {"vocab_size": VOCABULARY, "pad_token_id": 0}
OTHER = r"is no linear's weight; .*attention weights by head are not supported yet"
EXPERTS = "holds all experts of a layer in one tensor of shape .*; experts of this form are not supported yet"
# {model type: (config, the sentence)}: each was told that it holds experts.
ARCHITECTURES: dict[str, tuple[dict[str, Any], str]] = {
    "rwkv": ({**SMALL, "hidden_size": 16, "num_hidden_layers": 1, "attention_hidden_size": 16}, OTHER),
    "xlnet": ({**SMALL, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48}, OTHER),
    "jetmoe": ({**COMMON, "num_local_experts": 4, "kv_channels": 8, "num_key_value_heads": 2}, EXPERTS),
}


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_an_architecture_that_is_not_made_of_linears(kind: str, tmp_path: Path) -> None:
    config, sentence = ARCHITECTURES[kind]
    built = hf.CONFIG_MAPPING[kind](**config)
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(built)
    with pytest.raises(UnsupportedModelError, match=sentence) as error:
        find_sites(model)
    assert ("experts" in str(error.value)) == (sentence is EXPERTS)
    built.architectures = [type(model).__name__]
    folder = folder_of(tmp_path / "model", built.to_dict())
    with pytest.raises(UnsupportedModelError, match=sentence):
        load_model(folder, dense=True)


def test_an_encoder_decoder_without_a_row_before_its_weights(tmp_path: Path) -> None:
    config = hf.BlenderbotConfig(architectures=["BlenderbotForConditionalGeneration"]).to_dict()
    with pytest.raises(UnsupportedModelError, match=r"of encoder-decoders, t5, .* have a row"):
        load_model(folder_of(tmp_path / "model", config), dense=True)


def test_a_compressed_checkpoint_before_its_weights(tmp_path: Path) -> None:
    model = tiny_model("llama")
    compress(model, "svd", plan(model, 0.5))
    save(model, tmp_path / "out")
    (tmp_path / "out/model.safetensors").unlink()
    with pytest.raises(UnsupportedModelError, match="out is low-rank already; start from the dense model"):
        load_model(tmp_path / "out", dense=True)


def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"])
    sentence = "holds adapters of PEFT around its linears: merge them"
    with pytest.raises(UnsupportedModelError, match=f"the PeftModel\\w* {sentence}"):
        find_sites(peft.get_peft_model(tiny_model("llama"), config))
    model = tiny_model("llama")
    model.add_adapter(config)
    with pytest.raises(UnsupportedModelError, match=f"the LlamaForCausalLM {sentence}"):
        plan(model, 0.5)
    merged = peft.get_peft_model(tiny_model("llama"), config).merge_and_unload()
    assert len(find_sites(merged)) == len(find_sites(tiny_model("llama")))


def test_other_objects() -> None:
    wrapped: Any = nn.DataParallel(tiny_model("llama"))
    with pytest.raises(UnsupportedModelError, match=r"a DataParallel is no model of transformers.*its \.module"):
        find_sites(wrapped)
    with pytest.raises(UnsupportedModelError, match=r"a Linear is no model of transformers \(PreTrainedModel\)$"):
        find_sites(nn.Linear(2, 2))  # type: ignore[arg-type]


def test_the_command_line_says_it_in_one_line(run: Run, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "model", {"model_type": "lama3", "architectures": ["X"]})
    for command in (["compress", folder, tmp_path / "out", "--keep", "0.5"], ["inspect", folder]):
        status, printed = run(*command)
        assert status == 2
        assert printed.count("error:") == 1
        assert "model_type 'lama3' is not known" in " ".join(printed.split())
