"""Gradients: Fisher sums and gradient covariances equal autograd by brute force, one sample at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from eckart.calibration import gradients
from eckart.calibration.cache import GradientFile, read_gradients, read_making, write_gradients
from eckart.calibration.gradients import MASKED_SHARE, Loss, collect_gradients, record_squares
from eckart.calibration.weights import ALIKE
from eckart.data.tokens import Tokens
from eckart.lowrank import GradientMoments
from eckart.lowrank.moments import FISHER, GRADIENT_STATISTICS
from eckart.models.sites import find_sites
from tiny import ENCODERS, FAMILY_CONFIGS, MASK, VOCABULARY, logits_of, relative, tiny_model, tiny_tokens

IGNORED = -100  # labels that transformers leaves out of a loss
COVARIANCE = frozenset({"gradient_covariance"})


def losses(model: PreTrainedModel, tokens: Tokens) -> Iterator[tuple[Tensor, int]]:
    """The loss of every sample with its number of scored tokens, as transformers computes it from labels."""
    generator = torch.Generator().manual_seed(0)
    for row, mask in zip(tokens.ids, tokens.mask, strict=True):
        ids = row[mask][None]
        if "Classification" in type(model).__name__:
            odds = model(input_ids=ids).logits.detach().softmax(-1)
            label = torch.multinomial(odds, 1, generator=generator)[:, 0]
            yield model(input_ids=ids, labels=label).loss, 1
        elif model.config.model_type in ENCODERS:
            chosen = torch.rand(ids.shape, generator=generator) < MASKED_SHARE
            chosen[:, -1] |= ~chosen.any()
            labels = ids.masked_fill(~chosen, IGNORED)
            yield model(input_ids=ids.masked_fill(chosen, MASK), labels=labels).loss, int(chosen.sum())
        else:
            yield model(input_ids=ids, labels=ids).loss, ids.shape[1] - 1


CASES = [(name, None) for name in FAMILY_CONFIGS] + [(name, "classifier") for name in ("bert", "roberta", "llama")]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_fisher_is_the_mean_square_gradient_of_each_sample(model_type: str, head: str | None, padded: bool) -> None:
    model, tokens = tiny_model(model_type, head), tiny_tokens(4, 10, padded=padded)
    sites = find_sites(model)
    collected = collect_gradients(model, tokens, sites, FISHER)
    modules = [model.get_submodule(site.name) for site in sites]
    squares: list[list[Tensor]] = [[] for _ in sites]
    for loss, _ in losses(model, tokens):
        gradients = torch.autograd.grad(loss, [module.weight for module in modules])
        for module, gradient, square in zip(modules, gradients, squares, strict=True):
            square.append((gradient.mT if isinstance(module, Conv1D) else gradient).square())
    for site, square in zip(sites, squares, strict=True):
        fisher = torch.stack(square).mean(0)
        assert fisher.shape == (site.d_out, site.d_in)
        assert fisher.max() > 0
        assert collected[site.name].examples == 4
        assert relative(collected[site.name].fisher_in, fisher.sum(0)) < 1e-4, site.name
        assert relative(collected[site.name].fisher_out, fisher.sum(1)) < 1e-4, site.name
        assert "gradient_covariance" not in collected[site.name].sums


@pytest.mark.parametrize(
    ("model_type", "head"), [("llama", None), ("gpt2", None), ("gemma2", None), ("bert", None), ("bert", "classifier")]
)
def test_gradient_covariance_is_that_of_the_summed_loss(model_type: str, head: str | None) -> None:
    model, tokens = tiny_model(model_type, head), tiny_tokens(4, 10, padded=True)
    sites = find_sites(model)
    collected = collect_gradients(model, tokens, sites, GRADIENT_STATISTICS)
    outputs: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    handles = [
        model.get_submodule(site.name).register_forward_hook(
            lambda _module, _args, output, name=site.name: outputs[name].append(output)
        )
        for site in sites
    ]
    rows: dict[str, list[Tensor]] = {site.name: [] for site in sites}
    for loss, scored in losses(model, tokens):
        # A classifier's label costs the brute force a forward pass of its own; the last pass is the loss's.
        last = {name: outputs[name][-1] for name in outputs}
        gradients = torch.autograd.grad(loss * scored, list(last.values()))
        for name, gradient in zip(last, gradients, strict=True):
            rows[name].append(gradient.flatten(0, -2).double())
    for handle in handles:
        handle.remove()
    for site in sites:
        stacked = torch.cat(rows[site.name])
        assert collected[site.name].tokens == len(stacked) == tokens.count
        assert relative(collected[site.name].gradient_covariance, stacked.mT @ stacked / len(stacked)) < 1e-4
        assert collected[site.name].fisher_in.max() > 0
        weights = collected[site.name].token_weights
        if site.part in ALIKE:
            assert weights is None
            continue
        assert weights is not None
        assert relative(weights.view(tokens.mask.shape)[tokens.mask], stacked.square().sum(1)) < 1e-4
        assert not weights.view(tokens.mask.shape)[~tokens.mask].any()


def test_the_same_tokens_are_masked_in_every_run() -> None:
    model, tokens = tiny_model("bert"), tiny_tokens(3, 10)
    sites = find_sites(model)
    first, second = (collect_gradients(model, tokens, sites, FISHER) for _ in range(2))
    assert all(torch.equal(first[site.name].fisher_in, second[site.name].fisher_in) for site in sites)


# The loss of one sample


def test_masked_models_are_asked_for_fifteen_per_cent() -> None:
    loss, asked, total = Loss(tiny_model("bert"), MASK), 0, 0
    for number in range(20):
        rows = tiny_tokens(2, 50, seed=number).rows(2)[0]
        ids, batch = rows.ids, loss.ask(rows)
        assert batch.targets is not None
        masked = batch.read.ids == MASK
        assert batch.scored == masked.sum(1).tolist()
        assert min(batch.scored) >= 1
        assert torch.equal(batch.read.ids[~masked], ids[~masked])
        assert torch.equal(batch.targets, ids.masked_fill(~masked, IGNORED))
        asked, total = asked + sum(batch.scored), total + ids.numel()
    assert 0.12 < asked / total < 0.18


def test_a_short_sample_is_asked_for_one_token_at_least() -> None:
    loss = Loss(tiny_model("bert"), MASK)
    assert min(min(loss.ask(tiny_tokens(5, 2, seed=n).rows(5)[0]).scored) for n in range(8)) == 1


def test_a_classifier_is_asked_for_its_own_labels() -> None:
    """Its logits are here what comes into its last linear, so that the gradient tells which label was drawn."""
    model = tiny_model("bert", "classifier", num_labels=3)
    with torch.no_grad():
        model.classifier.weight.zero_()
        model.classifier.bias.copy_(torch.tensor([0.2, 0.5, 0.3]).log())
    slopes: list[Tensor] = []
    model.classifier.register_full_backward_pre_hook(lambda _module, outputs: slopes.append(outputs[0].clone()))
    collect_gradients(model, tiny_tokens(300, 6), find_sites(model), COVARIANCE)
    drawn = torch.cat(slopes)
    assert drawn.shape == (300, 3)
    labels = drawn.argmin(-1)
    expected = torch.tensor([0.2, 0.5, 0.3]) - torch.eye(3)[labels]
    torch.testing.assert_close(drawn, expected)
    assert ((labels.bincount(minlength=3) / 300) - torch.tensor([0.2, 0.5, 0.3])).abs().max() < 0.1


# Together, and without gradients of weights


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(
    ("model_type", "head"),
    [*((name, None) for name in FAMILY_CONFIGS), ("bert", "classifier"), ("llama", "classifier"), ("modernbert", None)],
)
def test_samples_together_are_samples_one_by_one(
    monkeypatch: pytest.MonkeyPatch, model_type: str, head: str | None, padded: bool
) -> None:
    """The same masks and labels are drawn, and each token has its own sample's gradient."""
    model, tokens = tiny_model(model_type, head), tiny_tokens(5, 10)
    if padded:  # rows of two lengths, some of them next to their like
        tokens.mask[[0, 1, 3], 7:] = False
    sites, before = find_sites(model), tiny_tokens(2, 9, seed=1)
    alone = collect_gradients(model, tokens, sites, GRADIENT_STATISTICS, after=before)
    rows = seen_rows(model)
    together = collect_gradients(model, tokens, sites, COVARIANCE, after=before)
    assert max(rows) == (2 if padded else 5)
    monkeypatch.setattr(gradients, "LOGITS", 4 * VOCABULARY * 3)  # three tokens through the head at a time
    monkeypatch.setattr(gradients, "ACTIVATIONS", 1)
    parts = collect_gradients(model, tokens, sites, COVARIANCE, after=before)
    for name, moments in alone.items():
        assert moments.keeps_fisher
        for other in (together[name], parts[name]):
            assert not other.keeps_fisher
            assert (other.examples, other.tokens) == (0, moments.tokens)
            assert relative(other.gradient_covariance, moments.gradient_covariance) < 1e-5, name


def seen_rows(model: PreTrainedModel) -> list[int]:
    """The number of rows in each batch that the first linear reads, as they are read."""
    rows: list[int] = []
    first = model.get_submodule(find_sites(model)[0].name)
    first.register_forward_hook(lambda _module, _args, output: rows.append(len(output)))
    return rows


def test_a_classifier_without_a_token_for_padding_reads_one_sample_at_a_time() -> None:
    model = tiny_model("llama", "classifier", pad_token_id=None)
    rows = seen_rows(model)
    collect_gradients(model, tiny_tokens(4, 8), find_sites(model), COVARIANCE)
    assert rows == [1, 1, 1, 1]


def test_a_backward_pass_ends_at_the_first_site() -> None:
    """Covariances need no gradient of a weight, nor any of what comes before the first site."""
    model = tiny_model("llama")
    reached: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda m, args, output, name=name: reached.append(name) if output.requires_grad else None
            )
            module.weight.register_hook(lambda gradient, name=name: pytest.fail(f"{name} has a gradient"))
    sites = [site for site in find_sites(model) if site.block == 1]
    collected = collect_gradients(model, tiny_tokens(2, 8), sites, COVARIANCE)
    assert collected.keys() == {site.name for site in sites}
    assert not any(name.startswith("model.layers.0.") for name in reached)
    assert all(moments.gradient_covariance.any() for moments in collected.values())


def test_a_block_may_change_what_its_first_linears_give_in_place() -> None:
    model = tiny_model("llama")
    expected = collect_gradients(model, tiny_tokens(2, 8), find_sites(model), COVARIANCE)
    for role in ("q_proj", "k_proj"):  # scores are the same if one is doubled and the other halved
        factor = 2.0 if role == "q_proj" else 0.5
        module = model.model.layers[0].self_attn.get_submodule(role)
        module.register_forward_hook(lambda _m, _a, output, factor=factor: output.mul_(factor))
        module.weight.data /= factor
    changed = collect_gradients(model, tiny_tokens(2, 8), find_sites(model), COVARIANCE)
    name = "model.layers.2.mlp.down_proj"
    assert relative(changed[name].gradient_covariance, expected[name].gradient_covariance) < 1e-4


# Recorded while a model is trained


@pytest.mark.parametrize(("model_type", "head"), [("bert", "classifier"), ("gpt2", None), ("llama", None)])
def test_recorded_squares_are_of_each_backward_pass_and_leave_its_gradient(model_type: str, head: str | None) -> None:
    model, tokens = tiny_model(model_type, head), tiny_tokens(6, 10)
    sites = find_sites(model)
    recorded = {site.name: GradientMoments(site.d_out, site.d_in, FISHER) for site in sites}
    weights = [model.get_submodule(site.name).weight for site in sites]
    expected = [torch.zeros_like(weight) for weight in weights]
    with record_squares(model, recorded):
        for ids, _ in tokens.batches(2):
            logits = model(input_ids=ids).logits
            loss = logits.float().square().mean()
            whole = torch.autograd.grad(loss, weights, retain_graph=True)
            loss.backward()
            for weight, gradient, square in zip(weights, whole, expected, strict=True):
                assert torch.allclose(weight.grad, gradient, rtol=1e-4, atol=1e-9)
                square += gradient.square()
            model.zero_grad()
    for site, square in zip(sites, expected, strict=True):
        square = square.mT if model_type == "gpt2" else square
        assert recorded[site.name].examples == 3
        assert relative(recorded[site.name].sums["fisher_in"], square.sum(0)) < 1e-4, site.name
        assert relative(recorded[site.name].sums["fisher_out"], square.sum(1)) < 1e-4, site.name
    model(input_ids=tokens.ids).logits.mean().backward()
    assert all(moments.examples == 3 for moments in recorded.values()), "outside, nothing is recorded"


def test_recorded_squares_add_to_what_is_there_and_survive_their_file(tmp_path: Path) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(2, 8)
    sites = find_sites(model)
    recorded = {site.name: GradientMoments(site.d_out, site.d_in, FISHER) for site in sites}
    for _ in range(2):
        with record_squares(model, recorded):
            model(input_ids=tokens.ids).logits.float().square().mean().backward()
        model.zero_grad()
        write_gradients(tmp_path / "g.safetensors", recorded, made_by={"task": "cola"})
        recorded = read_gradients(tmp_path / "g.safetensors")
    once = {site.name: GradientMoments(site.d_out, site.d_in, FISHER) for site in sites}
    with record_squares(model, once):
        model(input_ids=tokens.ids).logits.float().square().mean().backward()
    assert recorded.keys() == once.keys()
    for name, moments in recorded.items():
        assert moments.examples == 2
        assert torch.equal(moments.fisher_in, once[name].fisher_in)
    assert read_making(tmp_path / "g.safetensors") == {"task": "cola"}
    tmp_path.joinpath("none.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"none\.safetensors holds no gradient statistics"):
        read_gradients(tmp_path / "none.safetensors")


def test_whether_a_file_has_a_site_is_known_without_reading_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    recorded = collect_gradients(model, tiny_tokens(3, 8), find_sites(model), COVARIANCE)
    write_gradients(tmp_path / "g.safetensors", recorded)
    file = GradientFile(tmp_path / "g.safetensors")
    name = next(iter(recorded))
    assert torch.equal(file[name].gradient_covariance, recorded[name].gradient_covariance)
    monkeypatch.setattr("eckart.calibration.cache.safe_open", None)
    assert name in file
    assert "lm_head" not in file
    assert {*file} == {*recorded}
    assert file.get("lm_head") is None


# The model stays as it was


@pytest.mark.parametrize("fails", [False, True])
def test_flags_gradients_and_hooks_are_put_back(fails: bool) -> None:
    model = tiny_model("llama")
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].self_attn.q_proj.weight.requires_grad_(False)
    own = torch.ones_like(model.model.layers[1].mlp.up_proj.weight)
    model.model.layers[1].mlp.up_proj.weight.grad = own
    flags, before = {name: p.requires_grad for name, p in model.named_parameters()}, logits_of(model)
    expected = collect_gradients(tiny_model("llama"), tiny_tokens(3, 8), find_sites(model), FISHER)
    if fails:
        handle = model.model.layers[0].mlp.down_proj.register_full_backward_pre_hook(stop)
        with pytest.raises(RuntimeError, match="stopped"):
            collect_gradients(model, tiny_tokens(3, 8), find_sites(model), GRADIENT_STATISTICS)
        handle.remove()
    else:
        collected = collect_gradients(model, tiny_tokens(3, 8), find_sites(model), FISHER)
        assert all(torch.equal(collected[name].fisher_in, expected[name].fisher_in) for name in expected)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert model.model.layers[1].mlp.up_proj.weight.grad is own
    assert torch.equal(own, torch.ones_like(own))
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["model.layers.1.mlp.up_proj.weight"]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(logits_of(model), before)


def stop(*_: object) -> None:
    raise RuntimeError("stopped")


def test_works_where_gradients_are_switched_off() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        collected = collect_gradients(model, tiny_tokens(2, 8), find_sites(model), FISHER)
        assert not torch.is_grad_enabled()
    assert all(moments.fisher_in.max() > 0 for moments in collected.values())


# Refusals


def test_float16_is_taken_in_float32_and_left_as_it_was() -> None:
    """Its own gradients would underflow to zero."""
    model = tiny_model("llama", dtype=torch.float16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collected = collect_gradients(model, tiny_tokens(), find_sites(model), GRADIENT_STATISTICS)
    exact = collect_gradients(
        tiny_model("llama", dtype=torch.float16).float(), tiny_tokens(), find_sites(model), GRADIENT_STATISTICS
    )
    for name, moments in collected.items():
        assert torch.equal(moments.fisher_in, exact[name].fisher_in), name
        assert torch.equal(moments.gradient_covariance, exact[name].gradient_covariance), name
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.dtype == torch.float16


def test_bfloat16_is_not() -> None:
    exact, rounded = tiny_model("llama"), tiny_model("llama").bfloat16()
    sites = find_sites(exact)
    first, second = (collect_gradients(m, tiny_tokens(4, 10), sites, FISHER) for m in (exact, rounded))
    assert max(relative(second[s.name].fisher_in, first[s.name].fisher_in) for s in sites) < 0.2


@pytest.mark.parametrize("model_type", ["llama", "bert"])
def test_a_model_without_a_head_is_refused(model_type: str) -> None:
    model = tiny_model(model_type, "base")
    with pytest.raises(ValueError, match=r"(Llama|Bert)Model has no loss.*load the model with a language-modelling"):
        collect_gradients(model, tiny_tokens(), find_sites(model), FISHER)


def test_a_masked_model_needs_a_mask_token() -> None:
    model, tokens = tiny_model("roberta"), dataclasses.replace(tiny_tokens(), mask_token=None)
    with pytest.raises(ValueError, match=r"RobertaForMaskedLM is trained on masked tokens.*no mask token"):
        collect_gradients(model, tokens, find_sites(model), FISHER)


def test_one_token_has_no_next_one() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="one token has no next token to predict"):
        collect_gradients(model, tiny_tokens(1, 1), find_sites(model), FISHER)


def test_a_gradient_that_is_not_finite_names_its_site() -> None:
    model = tiny_model("llama")
    model.model.layers[2].mlp.down_proj.register_full_backward_hook(
        lambda _module, grads, _outputs: (grads[0] * float("nan"),)
    )
    with pytest.raises(ValueError, match=r"^model\.layers\.2\.mlp\.(up|gate)_proj: a gradient is not finite"):
        collect_gradients(model, tiny_tokens(1, 8), find_sites(model), FISHER)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_only_the_selected_sites_have_gradients() -> None:
    model = tiny_model("llama")
    sites = find_sites(model)[7:9]
    collected = collect_gradients(model, tiny_tokens(2, 8), sites, FISHER)
    whole = collect_gradients(model, tiny_tokens(2, 8), find_sites(model), FISHER)
    assert collected.keys() == {site.name for site in sites}
    assert all(torch.equal(collected[name].fisher_in, whole[name].fisher_in) for name in collected)
