"""The file by which a checkpoint loads without eckart: as eckart loads it, in every layout, and only where trusted."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from eckart.lowrank.codes import BITS, round_nearest
from eckart.models import standalone
from eckart.models.coded import CodedMatrix
from eckart.models.dense import export_dense
from eckart.models.families import UnsupportedModelError
from eckart.models.loading import load_model, save
from eckart.models.registration import QUANT_METHOD
from eckart.models.remote_code import FILE, SOURCE, carry_code
from eckart.models.sites import low_rank_modules
from tiny import Run, logits_of, relative, tiny_model, tiny_tokenizer, tiny_tokens

from .layouts import KINDS, laid_out
from .test_coded import coded

CASES = [("llama", kind) for kind in KINDS] + [
    ("gpt2", "joint pivoted"),
    ("bert", "joint plain"),
    ("phi3", "pivoted"),
    ("t5", "pivoted"),
]
CASES += [("t5", "pivoted"), ("llama", "coded"), ("gpt2", "coded")]


def compressed(model_type: str, kind: str) -> PreTrainedModel:
    return coded(tiny_model(model_type)) if kind == "coded" else laid_out(model_type, kind)


def read_alone(model: PreTrainedModel) -> PreTrainedModel:
    """The model as the file builds it, with the tensors that a checkpoint has."""
    config = copy.deepcopy(model.config)
    sites = config.quantization_config.sites
    del config.quantization_config
    alone = type(model)(config).to(model.dtype).eval()
    standalone.build(alone, sites)
    alone.load_state_dict(model.state_dict())
    return alone


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("model_type", "kind"), CASES)
def test_the_file_computes_what_eckart_does(model_type: str, kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    save(compressed(model_type, kind), tmp_path / "out")  # which describes it
    model = load_model(tmp_path / "out").to(dtype)
    alone = read_alone(model)
    assert not low_rank_modules(alone)
    assert alone.state_dict().keys() == model.state_dict().keys()
    close = 1e-5 if dtype == torch.float32 else 0.03
    assert relative(logits_of(alone), logits_of(model)) < close


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("block", [(1, 8), (8, 1)], ids=["rows", "columns"])
def test_the_file_reads_codes_to_the_last_bit(bits: int, block: tuple[int, int]) -> None:
    matrix = torch.randn(13, 11, generator=torch.Generator().manual_seed(bits))
    ours = CodedMatrix.of(round_nearest(matrix, bits, block))
    alone = standalone.CodedMatrix(11, 13, bits, block)
    alone.load_state_dict(ours.state_dict())
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(alone.to(dtype).numbers(dtype), ours.to(dtype).dense(dtype))


# In a process without eckart

SCRIPT = """
import json, sys
sys.modules["eckart"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

folder, ids, names = sys.argv[1], torch.tensor(json.loads(sys.argv[2])), sys.argv[3:]
results = {}

def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids)[0].tolist()

try:
    AutoModelForCausalLM.from_pretrained(f"{folder}/{names[0]}")
except Exception as error:
    results["untrusted"] = f"{type(error).__name__}: {error}"
for name in names:
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{name}", trust_remote_code=True)
    results[name] = logits(model)
    results[f"{name} types"] = sorted({type(module).__name__ for module in model.modules()})
    model.save_pretrained(f"{folder}/{name}-again")
results["generated"] = model.generate(ids[:1], max_new_tokens=4, do_sample=False).tolist()
first = f"{folder}/{names[0]}"
again = AutoModelForCausalLM.from_pretrained(f"{first}-again", trust_remote_code=True)
results["again"] = logits(again)
results["base"] = type(AutoModel.from_pretrained(first, trust_remote_code=True)).__name__
results["classifier"] = type(AutoModelForSequenceClassification.from_pretrained(first, trust_remote_code=True)).__name__
config = AutoConfig.from_pretrained(first, trust_remote_code=True)
described = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
described.load_state_dict(again.state_dict())
results["from config"] = logits(described)
results["tokenizer"] = AutoTokenizer.from_pretrained(first, trust_remote_code=True)("w1")["input_ids"]
damaged = f"{folder}/damaged"
try:
    AutoModelForCausalLM.from_pretrained(damaged, trust_remote_code=True)
except Exception as error:
    results["damaged"] = f"{type(error).__name__}: {error}"
assert not [name for name in sys.modules if name.startswith("eckart.")]
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], dict[str, PreTrainedModel]]:
    """The folder of checkpoints, what a process without eckart made of them, and the models."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("alone")
    cases = {"joint-pivoted": ("llama", "joint pivoted"), "coded": ("llama", "coded"), "conv": ("gpt2", "pivoted")}
    models = {name: compressed(*case) for name, case in cases.items()}
    for name, model in models.items():
        save(model, folder / name, tiny_tokenizer(), remote_code=True)
    save(models["conv"], folder / "damaged", remote_code=True)
    tensors = load_file(folder / "damaged/model.safetensors")
    del tensors[next(name for name in tensors if name.endswith("left.weight"))]
    save_file(tensors, folder / "damaged/model.safetensors", {"format": "pt"})
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules")}
    arguments = [str(folder), json.dumps(tiny_tokens(2, 12).ids.tolist()), *models]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout), models


@pytest.mark.parametrize(
    "name", ["joint-pivoted", *(pytest.param(name, marks=pytest.mark.slow) for name in ("coded", "conv"))]
)
def test_transformers_alone_loads_it_with_its_factors(outcome: Any, name: str) -> None:
    _, results, models = outcome
    torch.testing.assert_close(
        torch.tensor(results[name]), logits_of(models[name], tiny_tokens(2, 12)), rtol=0, atol=2e-5
    )
    assert {"LowRankLinear", "CodedLinear"} & {*results[f"{name} types"]}


def test_it_is_a_model_like_any_other(outcome: Any) -> None:
    results = outcome[1]
    assert results["again"] == results["from config"] == results["joint-pivoted"]
    assert results["base"] == "LlamaModel"
    assert results["classifier"] == "LlamaForSequenceClassification"
    assert len(results["generated"][0]) == 16
    assert results["tokenizer"] == tiny_tokenizer()("w1")["input_ids"]


def test_it_stops_where_it_is_not_trusted_or_not_whole(outcome: Any) -> None:
    results = outcome[1]
    assert "mismatch" in results["untrusted"] or "size" in results["untrusted"]
    assert "ValueError: the model's files lack 1 tensors, such as transformer.h.0" in results["damaged"]


def test_eckart_reads_what_transformers_alone_has_saved(outcome: Any) -> None:
    folder, _, models = outcome
    for name, model in models.items():
        loaded = load_model(folder / f"{name}-again")
        assert torch.equal(logits_of(loaded), logits_of(model))
        assert low_rank_modules(loaded)


# With eckart


def test_eckart_and_the_file_agree_where_both_are_there(outcome: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import dynamic_module_utils

    folder, _, models = outcome
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(folder / "modules"))
    model = models["joint-pivoted"]
    trusted = AutoModelForCausalLM.from_pretrained(folder / "joint-pivoted", trust_remote_code=True).eval()
    assert type(trusted).__module__.endswith(f".{Path(FILE).stem}")
    assert low_rank_modules(trusted).keys() == low_rank_modules(model).keys()
    assert torch.equal(logits_of(trusted), logits_of(model))
    config = AutoConfig.from_pretrained(folder / "joint-pivoted", trust_remote_code=True)
    assert low_rank_modules(AutoModelForCausalLM.from_config(config, trust_remote_code=True))
    ours = load_model(folder / "joint-pivoted", trust_remote_code=True)
    assert type(ours) is type(model)
    assert type(ours.config) is type(model.config)


def test_what_is_saved_again_carries_it_on_and_a_dense_export_does_not(outcome: Any, tmp_path: Path) -> None:
    folder = outcome[0]
    save(load_model(folder / "joint-pivoted"), tmp_path / "again")
    assert (tmp_path / "again" / FILE).read_text() == SOURCE.read_text()
    save(load_model(folder / "joint-pivoted"), tmp_path / "without", remote_code=False)
    save(export_dense(load_model(folder / "conv")), tmp_path / "dense")
    for name in ("without", "dense"):
        assert not (tmp_path / name / FILE).exists()
        assert "auto_map" not in json.loads((tmp_path / name / "config.json").read_text())
        load_model(tmp_path / name)


def test_what_needs_no_code_or_has_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no compressed linear"):
        save(tiny_model("llama"), tmp_path / "dense", remote_code=True)
    own = type("OwnModel", (type(tiny_model("llama")),), {"__module__": "own"})
    model = laid_out("llama", "plain")
    model.__class__ = own
    with pytest.raises(UnsupportedModelError, match="OwnModel is of code that comes with its model"):
        carry_code(model)
    assert not list(tmp_path.iterdir())


def test_export_adds_the_code_to_a_checkpoint(run: Run, tmp_path: Path) -> None:
    save(
        laid_out("llama", "pivoted"),
        tmp_path / "out",
        tiny_tokenizer(),
        files={"README.md": "# A card\n", "plan.json": "{}"},
    )
    status, printed = run("export", tmp_path / "out", tmp_path / "new", "--remote-code")
    assert status == 0, printed
    assert (tmp_path / "new/plan.json").read_text() == "{}"
    assert "trust_remote_code=True" in (tmp_path / "new/README.md").read_text()
    assert (tmp_path / "new" / FILE).is_file()
    assert (tmp_path / "new/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()
    for forms in ((), ("--dense", "--remote-code")):
        status, printed = run("export", tmp_path / "out", tmp_path / "none", *forms)
        assert status == 2
        assert "say which form, one of them" in printed


@pytest.mark.parametrize("options", [(), ("--out-of-core",)], ids=["in memory", "out of core"])
def test_compress_writes_the_code_and_the_card_says_so(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    save(tiny_model("llama"), tmp_path / "dense", tiny_tokenizer())
    arguments = ("--method", "svd", "--keep", "0.5", *options)
    for name, more in (("with", ("--remote-code",)), ("without", ())):
        status, printed = run("compress", tmp_path / "dense", tmp_path / name, *arguments, *more)
        assert status == 0, printed
    card = (tmp_path / "with/README.md").read_text()
    assert f"trust_remote_code=True)` runs {FILE}" in card
    assert "eckart exec" in card
    assert "eckart export path/to/this DENSE --dense" in card
    assert "trust_remote_code" not in (tmp_path / "without/README.md").read_text()
    assert not (tmp_path / "without" / FILE).exists()
    config = json.loads((tmp_path / "with/config.json").read_text())
    assert config["auto_map"]["AutoModelForCausalLM"] == f"{Path(FILE).stem}.LlamaForCausalLM"
    assert config["quantization_config"]["quant_method"] == QUANT_METHOD
    load_model(tmp_path / "with")  # its digests are those of all files


# A model of a configuration alone


@pytest.mark.parametrize("kind", [*KINDS, "coded"])
def test_from_config_builds_what_the_configuration_describes(kind: str, tmp_path: Path) -> None:
    model = compressed("llama", kind)
    save(model, tmp_path / "out")
    config = AutoConfig.from_pretrained(tmp_path / "out")
    built = AutoModelForCausalLM.from_config(config).eval()
    assert all(bool(torch.isfinite(parameter).all()) for parameter in built.parameters())
    built.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(built), logits_of(model))
    save(built, tmp_path / "again")
    assert torch.equal(logits_of(load_model(tmp_path / "again")), logits_of(model))
    with torch.device("meta"):
        base = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path / "out"))
    assert low_rank_modules(base)
    assert {parameter.device.type for parameter in base.parameters()} == {"meta"}


def test_from_config_of_others_is_untouched() -> None:
    config = tiny_model("llama").config
    assert not low_rank_modules(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize("model_type", ["gemma2", "gpt2", "llama"])
def test_a_class_that_builds_its_base_by_from_config_loads_and_goes_dense_as_before(
    model_type: str, tmp_path: Path
) -> None:
    save(laid_out(model_type, "joint pivoted", "classifier", added_bias=False), tmp_path / "out")
    model = load_model(tmp_path / "out")
    expected = logits_of(model)
    built = AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(tmp_path / "out")).eval()
    built.load_state_dict(model.state_dict())
    assert torch.equal(logits_of(built), expected)
    dense = export_dense(model)
    assert not low_rank_modules(dense)
    assert relative(logits_of(dense), expected) < 1e-4
