"""Structured pruning: zeroing and removing are one, units cover all numbers, the least important go first."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

import eckart
from eckart.compression.baselines import build_baseline, pruning
from eckart.compression.baselines.pruning import (
    LAYOUTS,
    Part,
    Units,
    allocate,
    find_units,
    importances,
    prune_structures,
    remove,
)
from eckart.data.encoding import encode
from eckart.data.tokens import Tokens
from eckart.evals.cost import count_macs
from eckart.evals.perplexity import perplexity
from eckart.models.families import UnsupportedModelError
from eckart.models.sites import blocks_of, find_sites, read_weight
from eckart.support.sizes import num_params
from places import SHARED
from tiny import DECODERS, VOCABULARY, logits_of, relative, tiny_model, tiny_tokens

PRUNED = tuple(LAYOUTS)


# Pruning.

Choice = dict[tuple[int, Part], Tensor]


def choose(units: dict[tuple[int, Part], Units], seed: int = 0) -> Choice:
    """Some of the units of every kind, at random."""
    generator = torch.Generator().manual_seed(seed)
    return {
        key: torch.randperm(len(group), generator=generator)[: max(1, int(0.6 * len(group)))].sort().values
        for key, group in units.items()
    }


@torch.no_grad()
def zeroed(model: PreTrainedModel, units: dict[tuple[int, Part], Units], kept: Choice, *, everywhere: bool) -> None:
    """Write zeros over the units that are not kept: where they are read, or over all their rows and biases as well."""
    for (block, part), index in kept.items():
        group = units[block, part]
        gone = [unit for unit in range(len(group)) if unit not in index]
        for path, columns in group.columns.items():
            read_weight(blocks_of(model)[block].get_submodule(path))[:, columns[gone].flatten()] = 0
        for path, rows in group.rows.items() if everywhere else ():
            module = blocks_of(model)[block].get_submodule(path)
            read_weight(module)[rows[gone].flatten()] = 0
            if module.bias is not None:
                module.bias[rows[gone].flatten()] = 0


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("model_type", PRUNED)
def test_pruning_is_zeroing(model_type: str, everywhere: bool) -> None:
    """The law of the groups: a model without the units computes what one with zeros in their place does."""
    pruned, dense = tiny_model(model_type), tiny_model(model_type)
    units = find_units(pruned)
    kept = choose(units)
    zeroed(dense, units, kept, everywhere=everywhere)
    remove(pruned, units, kept)
    assert relative(logits_of(pruned), logits_of(dense)) < 1e-5
    assert relative(logits_of(pruned), logits_of(tiny_model(model_type))) > 1e-2
    assert num_params(pruned) < num_params(dense)


@pytest.mark.parametrize("model_type", PRUNED)
def test_units_cover_every_number_once(model_type: str) -> None:
    model = tiny_model(model_type)
    for (block, _), group in find_units(model).items():
        for along, axis in ((group.rows, 0), (group.columns, 1)):
            for path, index in along.items():
                width = read_weight(blocks_of(model)[block].get_submodule(path)).shape[axis]
                assert index.flatten().sort().values.tolist() == list(range(width))
    total = sum(len(group) * group.numbers for group in find_units(model).values())
    assert total == sum(site.num_params for site in find_sites(model))


def test_a_grouped_head_goes_with_its_queries() -> None:
    heads = find_units(tiny_model("llama"))[0, "heads"]  # 4 query heads of 8, two for each key-value head
    assert len(heads) == 2
    assert heads.rows["self_attn.q_proj"][1].tolist() == list(range(16, 32))
    assert heads.rows["self_attn.k_proj"][1].tolist() == list(range(8, 16))
    assert heads.columns["self_attn.o_proj"][1].tolist() == list(range(16, 32))
    assert heads.numbers == 32 * (16 + 8 + 8 + 16)


def test_a_fused_head_is_in_all_three_thirds() -> None:
    heads = find_units(tiny_model("gpt2"))[0, "heads"]
    assert heads.rows["attn.c_attn"][1].tolist() == [*range(8, 16), *range(40, 48), *range(72, 80)]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "opt"])
def test_units_are_those_that_tracing_finds(model_type: str) -> None:
    """torch-pruning follows the graph of a forward pass; only without grouped heads, where it does not end."""
    tracing = pytest.importorskip("torch_pruning", reason="needs torch-pruning")
    model = tiny_model(model_type, **({} if model_type == "opt" else {"num_key_value_heads": 4}))
    block = blocks_of(model)[1]
    graph = tracing.DependencyGraph().build_dependency(
        model,
        example_inputs={"input_ids": tiny_tokens(1, 8).ids, "use_cache": False},
        forward_fn=lambda model, inputs: model(**inputs),
        output_transform=lambda output: output.logits,
    )
    layout = LAYOUTS[model_type]
    for part, root in (("heads", layout.qkv[2]), ("channels", layout.up[0])):
        units = find_units(model)[1, part]  # type: ignore[index]
        gone = units.rows[root][1].tolist()
        group = graph.get_pruning_group(block.get_submodule(root), tracing.prune_linear_out_channels, idxs=gone)
        members = {
            (target.target.module, "out" in target.handler.__name__): sorted(index)
            for target, index in group
            if isinstance(target.target.module, nn.Linear)
        }
        assert members == {
            (block.get_submodule(path), is_row): index[1].tolist()
            for along, is_row in ((units.rows, True), (units.columns, False))
            for path, index in along.items()
        }


@pytest.mark.parametrize("model_type", PRUNED)
def test_nothing_is_pruned_at_keep_1(model_type: str) -> None:
    model = tiny_model(model_type)
    facts = build_baseline("llm-pruner").apply(model, keep=1.0, tokens=tiny_tokens())
    assert torch.equal(logits_of(model), logits_of(tiny_model(model_type)))
    assert facts["keep"] == 1
    assert facts["params"][0] == facts["params"][1]


@pytest.mark.parametrize("keep", [0.9, 0.7, 0.5])
@pytest.mark.parametrize("model_type", PRUNED)
def test_the_share_kept_is_the_one_asked_for(model_type: str, keep: float) -> None:
    model = tiny_model(model_type)
    sites, before = find_sites(model), num_params(model)
    biases = sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    total = sum(site.num_params for site in sites)
    facts = build_baseline("llm-pruner").apply(model, keep=keep, tokens=tiny_tokens())
    after = sum(read_weight(model.get_submodule(site.name)).numel() for site in sites)
    assert facts["keep"] == after / total
    channel = max(group.numbers for (_, part), group in find_units(model).items() if part == "channels")
    assert keep * total - channel < after <= keep * total + 1e-6
    assert facts["params"] == [before, num_params(model)]
    fewer_biases = biases - sum(p.numel() for n, p in model.named_parameters() if n.endswith("bias"))
    assert before - num_params(model) == total - after + fewer_biases
    if keep < 0.9:  # above it these models lose channels only, which have no biases in qwen2
        assert (fewer_biases > 0) == (model_type in {"qwen2", "opt", "gpt2", "bert", "roberta"})
    assert json.loads(json.dumps(facts)) == facts


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("model_type", sorted(set(PRUNED) & set(DECODERS)))
def test_a_pruned_model_is_used_like_any_other(model_type: str, implementation: str) -> None:
    if (model_type, implementation) == ("gemma2", "sdpa"):
        pytest.skip("gemma2 has no fused attention in transformers")
    model = tiny_model(model_type)
    model.set_attn_implementation(implementation)
    build_baseline("llm-pruner").apply(model, keep=0.6, tokens=tiny_tokens())
    ids = tiny_tokens(2, 5).ids
    cached, plain = (
        model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, use_cache=use) for use in (True, False)
    )
    assert torch.equal(cached, plain)
    macs, sites = count_macs(model, 8), find_sites(model)
    head = model.get_output_embeddings().weight.numel()
    assert macs.linear == 8 * (head + sum(site.num_params for site in sites))
    assert macs.attention < count_macs(tiny_model(model_type), 8).attention
    assert torch.equal(logits_of(copy.deepcopy(model)), logits_of(model))


def test_modules_know_their_new_widths() -> None:
    for model_type in PRUNED:
        model = tiny_model(model_type)
        build_baseline("llm-pruner").apply(model, keep=0.5, tokens=tiny_tokens())
        for site in find_sites(model):
            module = model.get_submodule(site.name)
            d_out, d_in = read_weight(module).shape
            named = (module.nf, module.nx) if isinstance(module, Conv1D) else (module.out_features, module.in_features)
            assert named == (d_out, d_in)
            assert module.bias is None or len(module.bias) == d_out
            assert module.weight.requires_grad


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "opt"])
def test_units_of_zeros_go_first(model_type: str) -> None:
    # A unit of ReLU that no token wakes has no importance either: OPT is given a smooth activation.
    model = tiny_model(model_type, **({"activation_function": "gelu"} if model_type == "opt" else {}))
    units = find_units(model)
    kept = {key: torch.arange(len(group))[1::2] for key, group in units.items()}  # every second one stays as it is
    zeroed(model, units, kept, everywhere=True)
    logits = logits_of(model)
    facts = prune_structures(model, 0.5, tiny_tokens(), first=0, last=0)
    assert facts["keep"] == 0.5
    assert relative(logits_of(model), logits) < 1e-5


def test_importance_by_hand() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(3, 9)
    units = find_units(model)
    scores = importances(model, units, tokens, samples=2, length=6)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    loss = sum(
        nn.functional.cross_entropy(model(input_ids=ids[None]).logits[0, :-1], ids[1:]) for ids in tokens.ids[:2, :6]
    )
    (loss / 2).backward()
    block = model.model.layers[1]
    taylor = {name: (p * p.grad).abs() for name, p in block.named_parameters() if p.ndim == 2}
    channels = taylor["mlp.gate_proj.weight"].sum(1) + taylor["mlp.up_proj.weight"].sum(1)
    channels = channels + taylor["mlp.down_proj.weight"].sum(0)
    assert torch.allclose(scores[1, "channels"], channels, rtol=1e-4)
    heads = [
        taylor["self_attn.q_proj.weight"][16 * g : 16 * g + 16].sum()
        + taylor["self_attn.k_proj.weight"][8 * g : 8 * g + 8].sum()
        + taylor["self_attn.v_proj.weight"][8 * g : 8 * g + 8].sum()
        + taylor["self_attn.o_proj.weight"][:, 16 * g : 16 * g + 16].sum()
        for g in range(2)
    ]
    assert torch.allclose(scores[1, "heads"], torch.stack(heads), rtol=1e-4)


def test_the_least_important_units_go(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    scores = {}

    def watched(*args: Any, **settings: Any) -> dict[Any, Tensor]:
        scores.update(importances(*args, **settings))
        return scores

    monkeypatch.setattr(pruning, "importances", watched)
    before = model.model.layers[1].mlp.down_proj.weight.detach().clone()
    facts = prune_structures(model, 0.6, tiny_tokens())
    for block in range(3):
        best = scores[block, "heads"].argmax().item()
        assert facts["heads"][str(block)] in ([best], [0, 1])
    keeps = scores[1, "channels"].argsort(descending=True)[: facts["channels"]["1"]].sort().values
    assert torch.equal(model.model.layers[1].mlp.down_proj.weight, before[:, keeps])


def test_padding_is_not_read() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(4, 12, padded=True)
    units = find_units(model)
    other = Tokens(tokens.ids.masked_fill(~tokens.mask, 50), tokens.mask)
    scores, again = importances(model, units, tokens), importances(model, units, other)
    assert all(torch.equal(scores[key], again[key]) for key in units)


def test_blocks_at_the_ends_stay_whole() -> None:
    model, dense = (tiny_model("llama", num_hidden_layers=8) for _ in range(2))
    facts = prune_structures(model, 0.8, tiny_tokens(), first=2, last=1)
    assert set(facts["heads"]) == set(facts["channels"]) == {"2", "3", "4", "5", "6"}
    for block in (0, 1, 7):
        pairs = zip(model.model.layers[block].parameters(), dense.model.layers[block].parameters(), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
    assert facts["keep"] == pytest.approx(0.8, abs=0.005)


@pytest.mark.parametrize(("blocks", "first", "last"), [(3, 0, 0), (6, 1, 0), (12, 2, 1), (32, 4, 2)])
def test_the_default_ends_are_the_papers(blocks: int, first: int, last: int) -> None:
    model = tiny_model("llama", num_hidden_layers=blocks)
    facts = prune_structures(model, 1.0, tiny_tokens())
    assert (facts["first"], facts["last"]) == (first, last)


def test_llama_7b_at_the_papers_ratio() -> None:
    """LLM-Pruner's script: 25 % of blocks 4 ... 29 of LLaMA-7B, which is 20 % of the model."""
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig())  # the defaults are LLaMA-7B
    total = sum(site.num_params for site in find_sites(model))
    units = {key: group for key, group in find_units(model).items() if 4 <= key[0] < 30}
    kept = allocate(units, total, 1 - 0.25 * 26 / 32)
    assert {n for (_, part), n in kept.items() if part == "heads"} == {24}
    assert {n for (_, part), n in kept.items() if part == "channels"} <= {8256, 8255, 8257}
    removed = sum((len(group) - kept[key]) * group.numbers for key, group in units.items())
    assert removed / num_params(model) == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep": 0.05}, r"keep 0.05 leaves 0.050 of each block that may be pruned, less than one head"),
        ({"keep": 0.3, "first": 1, "last": 1}, r"keep 0.3 leaves 0.000 of each block .* raise keep, or lower first"),
        ({"keep": 0.7, "first": 2, "last": 1}, "first 2 and last 1 leave no block to prune of 3"),
        ({"keep": 0.7, "length": 1}, "pruning needs windows of two tokens or more"),
        ({"keep": 0.7, "samples": 0}, "pruning needs windows of two tokens or more"),
    ],
)
def test_bad_requests(settings: dict[str, Any], message: str) -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match=message):
        prune_structures(model, tokens=tiny_tokens(), **settings)
    assert torch.equal(logits_of(model), logits_of(tiny_model("llama")))


def test_broken_input() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"block \d: \S+: a gradient is not finite"):
        prune_structures(model, 0.7, tiny_tokens())
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        prune_structures(tiny_model("llama"), 0.7, Tokens(torch.full((2, 8), VOCABULARY), torch.ones(2, 8).bool()))


def test_a_float16_model_is_pruned_by_its_float32_gradients() -> None:
    """Its weights are those of a float32 model, so the same units go; what stays has its type and its numbers."""
    half, full = tiny_model("llama", dtype=torch.float16), tiny_model("llama", dtype=torch.float16).float()
    before = {name: value.clone() for name, value in half.state_dict().items()}
    facts = [prune_structures(model, 0.7, tiny_tokens()) for model in (half, full)]
    assert facts[0] == facts[1]
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float16}
    after = half.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items() if after[name].shape == value.shape)
    assert all(torch.equal(after[name].float(), value) for name, value in full.state_dict().items())
    assert not any(parameter.grad is not None for parameter in half.parameters())


@pytest.mark.parametrize("model_type", sorted({*DECODERS, "bert"} - set(PRUNED)))
def test_families_without_a_layout_are_refused(model_type: str) -> None:
    model = tiny_model(model_type)
    with pytest.raises(UnsupportedModelError, match=rf"\({model_type}\): which heads and channels belong together"):
        build_baseline("llm-pruner").apply(model, keep=0.7, tokens=tiny_tokens())


def test_a_model_without_a_language_head_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="pruning takes language models and text classifiers"):
        prune_structures(tiny_model("llama", "base"), 0.7, tiny_tokens())


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED / "models/llama6M/config.json").is_file(),
    reason="needs the real models of ../shared, which are not part of the project",
)
def test_importance_beats_chance_on_a_trained_model(monkeypatch: pytest.MonkeyPatch) -> None:
    path = SHARED / "models/llama6M"
    tokenizer = eckart.load_tokenizer(path)
    text = eckart.read_text("wikitext2", data=SHARED / "data")
    tokens = eckart.sample_windows(text, tokenizer, samples=10, length=64)
    stream = encode(eckart.read_text("wikitext2", split="test", data=SHARED / "data").joined, tokenizer)
    torch.manual_seed(0)
    values = {}
    for name in ("dense", "pruned", "at random"):
        model = eckart.load_model(path)
        if name == "at random":
            monkeypatch.setattr(
                pruning, "importances", lambda _m, units, *_a, **_s: {k: torch.rand(len(g)) for k, g in units.items()}
            )
        if name != "dense":
            build_baseline("llm-pruner").apply(model, keep=0.7, tokens=tokens)
        values[name] = perplexity(model, stream, length=256, limit=6).value
    assert values["dense"] < values["pruned"] < values["at random"] / 1.1


@pytest.mark.parametrize("model_type", ["bert", "roberta"])
def test_a_classifier_is_pruned_by_the_loss_of_its_likeliest_class(model_type: str) -> None:
    """The importances are |w dL/dw| of that loss, here by the definition; the pruned classifier classifies."""
    model = tiny_model(model_type, "classifier")
    tokens, units = tiny_tokens(3, 12), find_units(model)
    scores = importances(model, units, tokens, samples=3, length=12)
    path, block = "intermediate.dense", blocks_of(model)[1]
    gradients: dict[str, Tensor] = {}
    for ids in tokens.ids:
        logits = model(input_ids=ids[None]).logits
        (nn.functional.cross_entropy(logits, logits.argmax(-1).detach()) / 3).backward()
    for name in (path, "output.dense"):
        weight = block.get_submodule(name).weight
        gradients[name] = (weight * weight.grad).abs().detach()
    expected = gradients[path].sum(1) + gradients["output.dense"].sum(0)
    torch.testing.assert_close(scores[1, "channels"], expected, rtol=1e-4, atol=1e-6)
    model.zero_grad(set_to_none=True)
    facts = prune_structures(model, 0.6, tokens, length=12)
    assert facts["keep"] == pytest.approx(0.6, abs=0.1)
    assert torch.isfinite(model(input_ids=tokens.ids).logits).all()
