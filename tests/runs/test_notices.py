"""Notices: what cannot be done with the result, and what of the model stays as it is, is said before it is computed."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

from eckart.allocation import plan
from eckart.calibration.moments import calibrate
from eckart.compression.replace import compress
from eckart.lowrank import build_method
from eckart.models.dense import export_dense
from eckart.models.families import UnsupportedModelError
from eckart.models.loading import load_model
from eckart.models.sites import find_sites
from eckart.runs.composition import Composition, best
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.notices import notices
from eckart.runs.out_of_core import compress_out_of_core
from eckart.runs.recipe import parse_recipe
from tiny import FAMILY_CONFIGS, GROUPED, Run, tiny_model, tiny_text, tiny_tokenizer, tiny_tokens


def model_of(model_type: str) -> PreTrainedModel:
    if model_type in FAMILY_CONFIGS:
        return tiny_model(model_type)
    torch.manual_seed(0)
    return hf.AutoModelForCausalLM.from_config(hf.CONFIG_MAPPING[model_type](**GROUPED)).eval()


@pytest.mark.parametrize(
    "model_type", ["mistral", "qwen3", "gemma3_text", "phi3", "olmo2", "llama", "gpt2", "opt", "qwen2"]
)
@pytest.mark.parametrize("method", ["sfsd", "asvd-i"])
def test_an_export_is_refused_exactly_where_a_notice_says_so(model_type: str, method: str) -> None:
    model = model_of(model_type)
    said = [line for line in notices(model, find_sites(model), Composition(build_method(method))) if "export" in line]
    compress(model, method, plan(model, 0.5), calibrate(model, tiny_tokens(), build_method(method)))
    try:
        export_dense(model)
        refused = False
    except UnsupportedModelError:
        refused = True
    assert refused == bool(said)
    assert refused == (method == "sfsd" and model_type not in {"llama", "gpt2", "opt"})


def test_a_notice_names_what_to_do() -> None:
    model = tiny_model("mistral")
    sites = find_sites(model)
    (line,) = notices(model, sites, best())
    assert "MistralForCausalLM has no place for one in 21 linears (self_attn.q_proj, self_attn.k_proj, " in line
    assert "option bias=false" in line
    (line,) = notices(model, sites, Composition(build_method("sfsd")))
    assert "with the method feature-space" in line
    assert not list(notices(model, sites, best(bias=False)))


class Stopped(Exception):
    """Raised by what is said first."""


def stop(line: str) -> None:
    raise Stopped(line)


def untouched(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
    raise AssertionError(f"{description} was computed before anything was said")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Mistral, its tokenizer and a calibration text."""
    folder = tmp_path_factory.mktemp("notices")
    tiny_model("mistral").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "train.txt").write_text(tiny_text(600, seed=1))
    return folder


@pytest.mark.parametrize("method", ["best", "sfsd"])
@pytest.mark.parametrize("make", [make_checkpoint, compress_out_of_core])
def test_it_is_said_before_anything_is_computed(make: Any, method: str, place: Path, tmp_path: Path) -> None:
    calibration = {"corpus": str(place / "train.txt"), "samples": 8, "length": 16}
    recipe = parse_recipe(
        {"model": str(place / "model"), "method": {"name": method}, "keep": 0.5, "calibration": calibration}
    )
    with pytest.raises(Stopped, match="no place"):
        make(recipe, tmp_path / "out", How(say=stop, track=untouched))


EVERYWHERE, IN_MEMORY = (make_checkpoint, compress_out_of_core), (make_checkpoint,)


@pytest.mark.parametrize(
    ("make", "keys", "read"),
    [
        (make, keys, read)
        for keys, read, makes in (
            ({"method": "svd"}, False, EVERYWHERE),
            ({"method": "svd", "allocation": "effective-rank"}, False, EVERYWHERE),
            ({"method": "svd", "refit": True}, True, EVERYWHERE),
            ({"method": "svd", "distil": {"steps": 1}}, True, IN_MEMORY),
            ({"method": "svd", "allocation": {"name": "global", "weights": "probes"}}, True, IN_MEMORY),
            ({"method": "svd", "recover": {"steps": 1}}, True, IN_MEMORY),
            ({"method": "asvd-i"}, True, EVERYWHERE),
        )
        for make in makes
    ],
)
def test_a_calibration_text_that_is_not_read_is_named(
    make: Any, keys: dict[str, Any], read: bool, place: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    calibration = {"corpus": str(place / "train.txt"), "samples": 8, "length": 16}
    recipe = parse_recipe({"model": str(place / "model"), "keep": 0.5, "calibration": calibration, **keys})
    make(recipe, tmp_path / "out", How(say=said.append))
    named = [line for line in said if line.startswith("svd reads no calibration text here: ")]
    assert bool(named) == (not read), said
    assert all(str(place / "train.txt") in line for line in named)


def test_the_default_text_is_not_said_to_be_unused(place: Path, tmp_path: Path) -> None:
    said: list[str] = []
    recipe = parse_recipe({"model": str(place / "model"), "keep": 0.5, "method": "svd"})
    make_checkpoint(recipe, tmp_path / "out", How(say=said.append))
    assert not [line for line in said if "reads no calibration text" in line]


def test_a_bias_that_was_asked_for_is_kept_and_the_export_says_what_to_do(
    run: Run, place: Path, tmp_path: Path
) -> None:
    common = ("--keep", "0.5", "--calibration", place / "train.txt", "--samples", "8", "--length", "16", "--no-cache")
    status, printed = run("compress", place / "model", tmp_path / "a", *common, "--option", "bias=true")
    assert status == 0, printed
    assert "`eckart export --dense` will refuse the result" in printed
    assert "compress with the method's option bias=false" in printed
    status, printed = run("export", tmp_path / "a", tmp_path / "b", "--dense")
    assert status == 2
    assert "no place for one in" in printed
    assert "`best` leaves it out by itself" in printed
    assert not (tmp_path / "b").exists()


def llava(folder: Path) -> Path:
    tower = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**tower, image_size=16, patch_size=8),
        text_config=hf.LlamaConfig(**{**GROUPED, "num_hidden_layers": 2}),
        image_token_index=95,
    )
    torch.manual_seed(0)
    hf.LlavaForConditionalGeneration(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("more", [("--refine", "0"), ("--method", "asvd-i", "--out-of-core")])
def test_of_a_model_with_a_tower_the_language_model_is_compressed(
    run: Run, place: Path, tmp_path: Path, more: tuple[str, ...]
) -> None:
    model = llava(tmp_path / "llava")
    text = ("--calibration", place / "train.txt", "--samples", "8", "--length", "16", "--no-cache")
    status, printed = run("compress", model, tmp_path / "out", "--keep", "0.5", *text, *more)
    assert status == 0, printed
    said = "linears in model.language_model.layers are compressed; model.vision_tower, model.multi_modal_projector stay"
    assert said in printed
    small, dense = load_model(tmp_path / "out").state_dict(), load_model(model).state_dict()
    kept = [name for name in dense if name.startswith(("model.vision_tower", "model.multi_modal"))]
    assert kept
    assert all(torch.equal(small[name], dense[name]) for name in kept)
    text_file = f"perplexity:{place / 'train.txt'}"
    status, printed = run("eval", tmp_path / "out", "--task", text_file, "--limit", "2", "--out", tmp_path / "e")
    assert status == 0, printed
    status, printed = run("inspect", model)
    assert said in printed
