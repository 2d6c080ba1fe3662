"""Experts: opened they compute the same, are saved and loaded, compressed and exported; closed they are as before."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from eckart.allocation import plan
from eckart.compression.replace import compress
from eckart.models.checkpoint import LowRankConfig
from eckart.models.dense import export_dense
from eckart.models.experts import (
    Experts,
    close_experts,
    expert_of,
    fused_experts,
    layer_role,
    open_experts,
    opened_experts,
)
from eckart.models.families import UnsupportedModelError
from eckart.models.loading import load_model, save
from eckart.models.shards import Skeleton
from eckart.models.sites import find_sites, low_rank_modules, select_sites
from eckart.models.weight_files import CheckpointError
from eckart.serving.onnx_graph import signature_of
from tiny import MIXTURE_CONFIGS, closed_model, logits_of, relative, tiny_model, tiny_tokens

ALL = sorted(MIXTURE_CONFIGS)
TOKENS = tiny_tokens(2, 12, padded=True)


@pytest.mark.parametrize("model_type", ALL)
def test_open_experts_compute_the_same_and_close_again(model_type: str) -> None:
    model = closed_model(model_type)
    model.set_experts_implementation("eager")
    expected, state = logits_of(model, TOKENS), model.state_dict()
    names = {*fused_experts(model)}
    assert names
    open_experts(model)
    assert {*opened_experts(model)} == names
    assert torch.equal(logits_of(model, TOKENS), expected)
    for experts in opened_experts(model).values():
        experts.visits_all = True  # experts without a token add nothing
    assert torch.equal(logits_of(model, TOKENS), expected)
    close_experts(model)
    assert {*fused_experts(model)} == names
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("model_type", ALL)
def test_a_dense_model_is_saved_as_transformers_saves_it(model_type: str, tmp_path: Path) -> None:
    closed = closed_model(model_type)
    closed.save_pretrained(tmp_path / "stock")
    model = load_model(tmp_path / "stock")
    assert opened_experts(model)
    save(model, tmp_path / "ours")
    assert opened_experts(model)  # what is in memory stays as it was
    stock, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "ours"))
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[name], ours[name]) for name in stock)


@pytest.mark.parametrize("model_type", ALL)
def test_its_own_saving_writes_what_stock_transformers_loads(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    for name, each in {"own": model, "copy": copy.deepcopy(model)}.items():
        each.save_pretrained(tmp_path / name)
        stock = AutoModelForCausalLM.from_pretrained(tmp_path / name).eval()
        assert fused_experts(stock)
        assert relative(logits_of(stock, TOKENS), logits_of(model, TOKENS)) < 1e-5
    # An optimiser that holds its parameters goes on with them.
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    with pytest.raises(ValueError, match=r"save without state_dict, or after .*close_experts"):
        model.save_pretrained(tmp_path / "given", state_dict=model.state_dict())
    close_experts(model).save_pretrained(tmp_path / "closed", state_dict=model.state_dict())
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("closed", "own"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("model_type", ALL)
def test_compressed_experts_are_loaded_again_and_exported(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    sites = find_sites(model)
    experts = [site for site in sites if layer_role(site.name) is not None]
    assert experts
    compress(model, "svd", plan(model, keep=0.6))
    assert all(site.name in low_rank_modules(model) for site in experts)
    expected = logits_of(model, TOKENS)
    save(model, tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits_of(again, TOKENS), expected)
    ids, how = tiny_tokens(2, 6).ids, {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    written = [each.generate(input_ids=ids, **how) for each in (model, again)]
    assert torch.equal(*written)
    assert written[0].shape == (2, 10)
    save(export_dense(again), tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert fused_experts(dense)
    torch.testing.assert_close(logits_of(dense, TOKENS), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_what_is_not_compressed_keeps_its_experts(model_type: str, tmp_path: Path) -> None:
    # Attention alone; then only some experts of one block.
    for number, selection in enumerate(({"include": ["attention"]}, {"include": ["*.2.mlp.experts.1.*"]})):
        model = tiny_model(model_type)
        compress(model, "svd", plan(model, keep=0.6, **selection))  # type: ignore[arg-type]
        expected = logits_of(model, TOKENS)
        out = tmp_path / str(number)
        save(model, out)
        torch.testing.assert_close(logits_of(load_model(out), TOKENS), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("model_type", ALL)
def test_a_loader_that_knows_no_eckart_stops(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    compress(model, "svd", plan(model, keep=0.6, include=["experts"]))
    save(model, tmp_path / "out")
    config = tmp_path / "out" / "config.json"
    text = config.read_text(encoding="utf-8")
    assert '"quantization_config"' in text
    config.write_text(text.replace('"quantization_config"', '"unknown_to_a_stock_loader"'), encoding="utf-8")
    with pytest.raises((RuntimeError, ValueError, AttributeError)):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out")


@pytest.mark.parametrize("model_type", ALL)
def test_a_skeleton_reads_every_expert(model_type: str, tmp_path: Path) -> None:
    closed_model(model_type).save_pretrained(tmp_path)
    expected, skeleton = load_model(tmp_path).state_dict(), Skeleton(tmp_path)
    for number in range(len(skeleton.blocks)):
        with skeleton.resident(number) as block:
            for name, value in block.state_dict(prefix=f"{skeleton.places[number]}.").items():
                assert torch.equal(value, expected[name]), name


def test_names_of_experts() -> None:
    assert expert_of("model.layers.3.mlp.experts.12.down_proj") == ("model.layers.3.mlp.experts", 12)
    assert expert_of("model.layers.3.mlp.down_proj") is None
    assert layer_role("model.layers.3.mlp.experts.12.down_proj") == "model.layers.3.mlp.experts.*.down_proj"
    assert layer_role("model.layers.3.self_attn.q_proj") is None


def test_experts_are_selected_by_part_role_and_number() -> None:
    sites = find_sites(tiny_model("qwen3_moe"))
    experts = [site for site in sites if site.part == "experts"]
    assert len(experts) == 2 * 6 * 2  # the second of three blocks has none
    assert select_sites(sites, include=["experts"]) == tuple(experts)
    down = select_sites(sites, include=["mlp.experts.*.down_proj"])
    assert {site.role.rpartition(".")[2] for site in down} == {"down_proj"}
    assert len(down) == 12
    assert len(select_sites(sites, include=["mlp.experts.5.down_proj"])) == 2
    assert len({site.input_group for site in experts}) == len(experts)


@pytest.mark.parametrize("name", ["gate", "router", "mlp.gate"])
def test_a_router_that_is_asked_for_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"matches no site.*a router is no site"):
        select_sites(find_sites(tiny_model("qwen3_moe")), include=[name])


def test_open_experts_need_their_format() -> None:
    with pytest.raises(CheckpointError, match="open_experts"):
        LowRankConfig(sites={}, format=3, open_experts=True)
    with pytest.raises(CheckpointError, match="open_experts"):
        LowRankConfig(sites={}, format=4, open_experts="yes")  # type: ignore[arg-type]


def test_closing_compressed_experts_is_refused() -> None:
    model = tiny_model("mixtral")
    compress(model, "svd", plan(model, keep=0.6, include=["*.1.mlp.experts.0.down_proj"]))
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts: down_proj: an expert is compressed"):
        close_experts(model)


def test_opening_twice_changes_nothing() -> None:
    model = tiny_model("mixtral")
    before = {name: id(module) for name, module in model.named_modules()}
    assert {name: id(module) for name, module in open_experts(model).named_modules()} == before
    assert all(isinstance(module, Experts) for module in opened_experts(model).values())


def test_what_cannot_run_open_experts_says_so(tmp_path: Path) -> None:
    model = tiny_model("mixtral")
    compress(model, "svd", plan(model, keep=0.6))
    with pytest.raises(UnsupportedModelError, match="experts with linears of their own"):
        save(model, tmp_path / "code", remote_code=True)
    with pytest.raises(UnsupportedModelError, match="is a mixture of experts"):
        signature_of(model)


def test_from_config_builds_open_experts() -> None:
    model = tiny_model("mixtral")
    compress(model, "svd", plan(model, keep=0.6))
    built = AutoModelForCausalLM.from_config(model.config)
    assert {name: value.shape for name, value in built.state_dict().items()} == {
        name: value.shape for name, value in model.state_dict().items()
    }


@pytest.mark.parametrize("model_type", ALL)
def test_closed_experts_are_no_sites_yet(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"give each linears of its own first: eckart\.open_experts"):
        find_sites(closed_model(model_type))
