"""Checkpoints of pivoted layouts and shared right factors: round trips, what is on disk, and what is refused."""

from __future__ import annotations

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
from eckart.evals.cost import count_macs
from eckart.lowrank import num_stored
from eckart.models.checkpoint import CheckpointError, LowRankConfig, describe
from eckart.models.loading import save
from eckart.models.sites import low_rank_modules, replace_module
from eckart.support.sizes import num_bytes, num_params
from tiny import DEFAULT_CONFIGS, ENCODERS, FAMILY_CONFIGS, HEADS, logits_of, tiny_model, tiny_tokens

from .layouts import KINDS, groups_of, head_of, laid_out, lay_out

ALL = sorted({*FAMILY_CONFIGS, *DEFAULT_CONFIGS})
# One that shares right factors, one of Conv1Ds, and an encoder whose attention reads a block's input as it comes.
SOME = ("llama", "gpt2", "bert")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[PreTrainedModel, Path]]:
    """(in memory, directory) of a tiny model in a layout; each is made once."""

    @cache
    def make(model_type: str, kind: str, **changes: Any) -> tuple[PreTrainedModel, Path]:
        model = laid_out(model_type, kind, **changes)
        return model, save(model, tmp_path_factory.mktemp(model_type) / "out", max_shard_size="30KB")

    return make


def tensors_of(path: Path) -> dict[str, Tensor]:
    return {name: tensor for file in path.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_shared(model: PreTrainedModel, kind: str) -> None:
    """Every right factor is one module for those that share it."""
    modules = low_rank_modules(model)
    borrowers = {name: module for name, module in modules.items() if module.lender is not None}
    assert bool(borrowers) == (KINDS[kind][1] and model.config.model_type not in {"gpt2"})
    for name, module in borrowers.items():
        assert module.right is module.lender.right, name
        assert any(module.lender is other for other in modules.values()), name


# Round trips


@pytest.mark.parametrize(
    ("model_type", "kind"),
    [*((name, "joint pivoted") for name in ALL), *((name, kind) for name in SOME for kind in list(KINDS)[1:3])],
)
def test_round_trip_is_exact_and_repeats(saved: Any, model_type: str, kind: str, tmp_path: Path) -> None:
    model, path = saved(model_type, kind)
    loaded = HEADS[head_of(model_type)].from_pretrained(path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in loaded.state_dict().items())
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert (num_params(loaded), num_bytes(loaded)) == (num_params(model), num_bytes(model))
    loaded.save_pretrained(tmp_path)
    again = HEADS[head_of(model_type)].from_pretrained(tmp_path)
    assert torch.equal(logits_of(again), logits_of(model))
    sections = [json.loads((d / "config.json").read_text())["quantization_config"] for d in (path, tmp_path)]
    assert sections[0] == sections[1]
    describe(again, {"layout": kind})
    assert again.config.quantization_config.sites == sections[0]["sites"]


@pytest.mark.parametrize("kind", list(KINDS)[1:])
@pytest.mark.parametrize("model_type", SOME)
def test_base_model_reads_the_same_directory(saved: Any, model_type: str, kind: str, tmp_path: Path) -> None:
    model, path = saved(model_type, kind)
    ids = tiny_tokens(2, 12).ids
    with torch.no_grad():
        expected = model.base_model(input_ids=ids).last_hidden_state
        base = HEADS["base"].from_pretrained(path)
        assert_shared(base, kind)
        assert torch.equal(base(input_ids=ids).last_hidden_state, expected)
        base.save_pretrained(tmp_path)
        headed = HEADS[head_of(model_type)].from_pretrained(tmp_path)
        assert_shared(headed, kind)
        assert torch.equal(headed.base_model(input_ids=ids).last_hidden_state, expected)


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_tied_and_untied_embeddings(saved: Any, kind: str, tie: bool) -> None:
    model, path = saved("llama", kind, tie_word_embeddings=tie)
    loaded = HEADS["causal"].from_pretrained(path)
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tie
    assert ("lm_head.weight" in tensors_of(path)) != tie
    assert_shared(loaded, kind)
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("asked", ["auto", torch.float32])
@pytest.mark.parametrize("kind", KINDS)
def test_types(saved: Any, kind: str, stored: torch.dtype, asked: Any) -> None:
    model, path = saved("llama", kind, dtype=stored)
    loaded = HEADS["causal"].from_pretrained(path, dtype=asked)
    expected = stored if asked == "auto" else asked
    assert {parameter.dtype for parameter in loaded.parameters()} == {expected}
    orders = [module.order for module in low_rank_modules(loaded).values() if module.order is not None]
    assert {order.dtype for order in orders} <= {torch.int32}
    assert bool(orders) == (KINDS[kind][0] == "pivoted")
    expected = model.state_dict()
    assert all(torch.equal(value, expected[key].to(value.dtype)) for key, value in loaded.state_dict().items())
    if asked == "auto":
        assert torch.equal(logits_of(loaded), logits_of(model))
    loaded.half()
    assert all(torch.equal(m.order, expected[f"{n}.order"]) for n, m in low_rank_modules(loaded).items() if m.pivots)


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
@pytest.mark.parametrize("kind", KINDS)
def test_device_maps(saved: Any, kind: str, device_map: Any) -> None:
    model, path = saved("llama", kind)
    loaded = HEADS["causal"].from_pretrained(path, device_map=device_map)
    assert_shared(loaded, kind)
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_block_may_lie_on_disk(saved: Any, kind: str, tmp_path: Path) -> None:
    model, path = saved("llama", kind)
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk", "model.layers.2": "cpu"}
    loaded = HEADS["causal"].from_pretrained(path, device_map=places, offload_folder=tmp_path)
    attention = loaded.model.layers[1].self_attn
    assert attention.v_proj.right.weight.device.type == "meta"
    computed: list[int] = []
    attention.q_proj.right.register_forward_hook(lambda *_: computed.append(1))
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert len(computed) == 1
    loaded.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(HEADS["causal"].from_pretrained(tmp_path / "again")), logits_of(model))


@pytest.mark.parametrize("kind", list(KINDS)[1:])
def test_generates_with_a_cache(saved: Any, kind: str) -> None:
    model, path = saved("llama", kind)
    loaded, ids = HEADS["causal"].from_pretrained(path), tiny_tokens(2, 8).ids
    settings = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "attention_mask": torch.ones_like(ids)}
    generated = loaded.generate(ids, use_cache=True, **settings)
    assert torch.equal(generated, model.generate(ids, use_cache=True, **settings))
    assert torch.equal(generated, loaded.generate(ids, use_cache=False, **settings))
    assert all(module.product.is_empty for module in low_rank_modules(loaded).values())


# What is stored


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("model_type", ["llama", "opt", "bert"])
def test_every_number_is_stored_once(saved: Any, model_type: str, kind: str) -> None:
    """In memory and on disk: the formula's numbers for every group, and what is no factor."""
    model, path = saved(model_type, kind)
    layout, joint = KINDS[kind]
    dense, modules, stored = tiny_model(model_type), low_rank_modules(model), tensors_of(path)
    groups = groups_of(dense, joint)
    assert sum(name.endswith("right.weight") for name in stored) == len(groups)
    expected = num_params(dense) - sum(site.num_params for sites in groups for site in sites)
    for sites in groups:
        d_out = sum(site.d_out for site in sites)
        expected += num_stored(d_out, sites[0].d_in, modules[sites[0].name].rank, layout)
        expected += sum(site.d_out for site in sites if not site.has_bias)  # the added biases
    assert num_params(model) == expected
    missing = {name for name in model.state_dict() if name not in stored}
    assert missing <= set(model.all_tied_weights_keys)  # a tied head, as in the dense model
    for name in modules:  # what stops a loader without eckart
        assert stored[f"{name}.weight"].shape == (0,)
    orders = {name: value for name, value in stored.items() if name.endswith(".order")}
    assert {value.dtype for value in orders.values()} <= {torch.int32}
    assert sum(value.numel() for value in orders.values()) == (
        sum(site.d_out for sites in groups for site in sites) if layout == "pivoted" else 0
    )


@pytest.mark.parametrize(("kind", "number"), list(zip(KINDS, (1, 2, 2, 2), strict=True)))
def test_the_format_is_the_lowest_that_can_say_it(saved: Any, kind: str, number: int) -> None:
    _, path = saved("llama", kind)
    section = json.loads((path / "config.json").read_text())["quantization_config"]
    assert section["format"] == number
    entry = section["sites"]["model.layers.1.self_attn.k_proj"]
    layout, joint = KINDS[kind]
    assert entry.keys() == {"rank", "bias"} | ({"pivots"} if layout == "pivoted" else set()) | (
        {"right_of"} if joint else set()
    )
    assert entry.get("right_of", "model.layers.1.self_attn.q_proj") == "model.layers.1.self_attn.q_proj"
    assert "right_of" not in section["sites"]["model.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_shared_product_is_counted_once(saved: Any, kind: str) -> None:
    model, _ = saved("llama", kind)
    weights = sum(p.numel() for name, p in model.named_parameters() if name.endswith(("left.weight", "right.weight")))
    head = model.lm_head.weight.numel()
    assert count_macs(model, 8).linear == 8 * (weights + head)


# Training


@pytest.mark.parametrize("kind", list(KINDS)[1:])
@pytest.mark.parametrize("model_type", SOME)
def test_gradient_checkpointing_gives_the_same_gradients(saved: Any, model_type: str, kind: str) -> None:
    _, path = saved(model_type, kind)
    model, ids = HEADS[head_of(model_type)].from_pretrained(path), tiny_tokens(2, 12).ids
    model.train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()
                      if parameter.grad is not None})  # fmt: skip
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())
    for name, module in low_rank_modules(model).items():
        assert gradients[0][f"{name}.left.weight"].abs().max() > 0
        assert module.right.weight.grad.abs().max() > 0


def test_trainer_trains_and_its_checkpoint_loads(saved: Any, tmp_path: Path) -> None:
    _, path = saved("llama", "joint pivoted")
    loaded = HEADS["causal"].from_pretrained(path)
    right = loaded.model.layers[0].self_attn.v_proj.right
    before = right.weight.detach().clone()
    rows = [{"input_ids": ids, "labels": ids} for ids in tiny_tokens(4, 12).ids]
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
        use_cpu=True, report_to=[], save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model=loaded, args=arguments, train_dataset=rows)
    trainer.train()
    assert not torch.equal(right.weight, before)
    trainer.save_model(str(tmp_path / "trained"))
    again = HEADS["causal"].from_pretrained(tmp_path / "trained").eval()
    assert_shared(again, "joint pivoted")
    assert torch.equal(logits_of(again), logits_of(loaded.eval()))


@pytest.mark.parametrize("kind", list(KINDS)[1:])
@pytest.mark.parametrize("model_type", SOME)
def test_adapters_find_the_factors(saved: Any, model_type: str, kind: str) -> None:
    """One adapter on a shared right factor, for all of its members, and merged it stays the same map."""
    peft = pytest.importorskip("peft")
    _, path = saved(model_type, kind)
    model = HEADS[head_of(model_type)].from_pretrained(path)
    modules, before = low_rank_modules(model), logits_of(model)
    expected = {f"{name}.left" for name in modules}
    expected |= {f"{name}.right" for name, module in modules.items() if module.lender is None}
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", r=2)).eval()
    inner = adapted.base_model.model
    adapters = {name for name, module in inner.named_modules() if isinstance(module, peft.tuners.lora.LoraLayer)}
    assert expected <= adapters
    assert not {f"{name}.right" for name in modules} & adapters - expected
    assert torch.equal(logits_of(inner), before)
    with torch.no_grad():
        for name, parameter in inner.named_parameters():
            if "right.lora_B" in name:
                parameter.normal_(std=0.1)
    changed = logits_of(inner)
    assert (changed - before).abs().max() > 1e-3
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(logits_of(merged), changed, rtol=1e-4, atol=1e-4)
    assert_shared(merged, kind)


# Broken checkpoints

ORDER = "model.layers.1.mlp.down_proj.order"
COEFFICIENTS = "model.layers.1.self_attn.k_proj.left.weight"
RIGHT = "model.layers.1.self_attn.q_proj.right.weight"
SITE, LENDER = "model.layers.1.self_attn.k_proj", "model.layers.1.self_attn.q_proj"


@pytest.fixture
def broken(saved: Any, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the jointly pivoted llama's checkpoint with its tensors or its section changed."""

    def make(
        tensors: Callable[[dict[str, Tensor]], object] | None = None,
        section: Callable[[dict[str, Any]], object] | None = None,
    ) -> Path:
        _, path = saved("llama", "joint pivoted")
        folder = tmp_path / "broken"
        shutil.copytree(path, folder)
        merged = tensors_of(folder)
        for file in folder.glob("model*.safetensors*"):
            file.unlink()
        if tensors is not None:
            tensors(merged)
        save_file(merged, folder / "model.safetensors", metadata={"format": "pt"})
        config = json.loads((folder / "config.json").read_text())
        if section is not None:
            section(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def refusal(path: Path, head: str = "causal") -> str:
    with pytest.raises(CheckpointError) as caught:
        HEADS[head].from_pretrained(path)
    return str(caught.value)


def test_an_unbroken_copy_loads(broken: Any, saved: Any) -> None:
    loaded = HEADS["causal"].from_pretrained(broken())
    assert torch.equal(logits_of(loaded), logits_of(saved("llama", "joint pivoted")[0]))


@pytest.mark.parametrize("head", ["causal", "base", "classifier"])
@pytest.mark.parametrize("key", [ORDER, COEFFICIENTS, RIGHT])
def test_a_missing_tensor(broken: Any, key: str, head: str) -> None:
    message = refusal(broken(tensors=lambda t: t.pop(key)), head)
    assert f"missing tensor {key.removeprefix('model.')}." in message
    assert message.count("tensor ") == 1


@pytest.mark.parametrize("head", ["causal", "base"])
def test_a_right_factor_of_a_member_that_borrows_is_extra(broken: Any, head: str) -> None:
    message = refusal(broken(tensors=lambda t: t.update({f"{SITE}.right.weight": t[RIGHT].clone()})), head)
    assert f"unknown tensor {SITE.removeprefix('model.')}.right.weight." in message
    assert message.count("tensor ") == 1


@pytest.mark.parametrize("key", [ORDER, COEFFICIENTS, RIGHT])
def test_a_wrong_shape(broken: Any, key: str) -> None:
    message = refusal(broken(tensors=lambda t: t.update({key: torch.ones(5, 7)})))
    assert f"{key.removeprefix('model.')} has shape (5, 7), expected (" in message
    assert message.count(" has shape ") == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda order: order + 1,
        lambda order: order - 1,
        lambda order: order.clone().fill_(0),
        lambda order: order.flip(0).clamp_min(1),
    ],
)
def test_an_order_that_is_none(broken: Any, change: Callable[[Tensor], Tensor]) -> None:
    message = refusal(broken(tensors=lambda t: t.update({ORDER: change(t[ORDER])})))
    assert message.startswith(f"{ORDER}: an order ")


def test_an_order_of_64_bits_is_read(broken: Any, saved: Any) -> None:
    loaded = HEADS["causal"].from_pretrained(broken(tensors=lambda t: t.update({ORDER: t[ORDER].long()})))
    assert torch.equal(logits_of(loaded), logits_of(saved("llama", "joint pivoted")[0]))


def changed(**changes: Any) -> Callable[[dict[str, Any]], None]:
    """Changes the entry of SITE; None takes a key away."""

    def change(section: dict[str, Any]) -> None:
        for key, value in changes.items():
            section["sites"][SITE].pop(key, None)
            if value is not None:
                section["sites"][SITE][key] = value

    return change


@pytest.mark.parametrize(
    ("section", "says"),
    [
        (changed(pivots=-1), "its entry .* is not"),
        (changed(pivots=True), "its entry .* is not"),
        (changed(pivots=99), "its entry .* is not"),
        (changed(right_of=3), "its entry .* is not"),
        (changed(order="ascending"), "its entry .* is not"),
        (changed(right_of="model.layers.9.mlp.up"), "the right factor of 'model.layers.9.mlp.up', which has none"),
        (changed(right_of=SITE.replace("k_proj", "v_proj")), "the right factor of '.*v_proj', which has none"),
        (changed(rank=30), "the right factor of .* rank and layout of both have to be the same"),
        (changed(pivots=None), "the right factor of .* rank and layout of both have to be the same"),
    ],
)
def test_a_malformed_entry(broken: Any, section: Callable[[dict[str, Any]], None], says: str) -> None:
    with pytest.raises(CheckpointError, match=rf"^{SITE}.*{says}"):
        HEADS["causal"].from_pretrained(broken(section=section))


def test_more_pivots_than_rows(tmp_path: Path) -> None:
    """Key projections of 8 rows, narrower than the rank."""
    path = save(laid_out("llama", "joint pivoted", num_key_value_heads=1), tmp_path / "out")
    config = json.loads((path / "config.json").read_text())
    changed(pivots=9)(config["quantization_config"])
    (path / "config.json").write_text(json.dumps(config))
    message = refusal(path)
    assert message.startswith(f"{SITE}: its entry ")
    assert "does not fit the model: 9 pivots are not in 0 ... 8" in message


def test_a_number_of_pivots_that_the_tensors_have_not(broken: Any) -> None:
    message = refusal(broken(section=changed(pivots=0)))
    assert "layers.1.self_attn.k_proj.left.weight has shape" in message


@pytest.mark.parametrize("key", ["pivots", "right_of"])
def test_format_one_says_no_more_than_it_could(key: str) -> None:
    with pytest.raises(CheckpointError, match=r"its entry .* is not {'rank': a positive int, 'bias': a bool}$"):
        LowRankConfig(sites={"a": {"rank": 2, "bias": False, key: 1}}, format=1)


def test_a_member_whose_lender_left_the_model_is_not_saved(tmp_path: Path) -> None:
    model = laid_out("llama", "joint plain")
    replace_module(model, LENDER, torch.nn.Linear(32, 32, bias=False))
    with pytest.raises(CheckpointError, match=r"k_proj shares the right factor of a linear that is not in the model"):
        save(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_encoders_are_among_those_that_share() -> None:
    assert "bert" in ENCODERS
    assert_shared(lay_out(tiny_model("bert"), "joint plain"), "joint plain")
