"""Probes: what a cut does to the predictions, in nats, of a decoder, a masked model and a classifier."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from eckart.allocation.search.loss_weights import ProbeResult, probe_linears
from eckart.allocation.search.trials import low_rank, swapped
from eckart.data.tokens import Tokens
from eckart.evals.divergence import divergence
from eckart.lowrank import DecompositionError, Factored, Factors, Spectrum, factor, rank_for
from eckart.models.sites import find_sites, low_rank_modules, read_weight
from eckart.models.units import Unit
from tiny import logits_of, tiny_model, tiny_tokens

CASES = (("llama", None), ("gpt2", None), ("bert", None), ("bert", "classifier"))


@cache
def spectra_of(model_type: str, head: str | None = None) -> dict[str, Factored]:
    model = tiny_model(model_type, head)
    return {site.name: factor(read_weight(model.get_submodule(site.name))) for site in find_sites(model)}


def log_probabilities(model: PreTrainedModel, tokens: Tokens) -> Tensor:
    """One row for every prediction, sample after sample without padding, in float64."""
    rows = []
    for ids, mask in zip(tokens.ids, tokens.mask, strict=True):
        with torch.no_grad():
            logits = model(input_ids=ids[mask][None]).logits.double()
        rows.append(logits[0, :-1] if model.can_generate() else logits[0] if logits.ndim == 3 else logits)
    return torch.cat(rows).log_softmax(-1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("model_type", "head"), CASES)
def test_a_probe_is_the_mean_divergence_of_the_predictions(model_type: str, head: str | None, padded: bool) -> None:
    model, spectra, tokens = (
        tiny_model(model_type, head),
        spectra_of(model_type, head),
        tiny_tokens(5, 12, padded=padded),
    )
    before, modules = logits_of(model), dict(model.named_modules())
    result = probe_linears(model, spectra, tokens)
    assert dict(model.named_modules()) == modules
    assert torch.equal(logits_of(model), before)
    log_p = log_probabilities(model, tokens)
    sites = find_sites(model)
    assert [item.name for item in result.probes] == [site.name for site in sites]
    assert result.evaluations == 1 + len(sites)
    for item, site in zip(result.probes, sites, strict=True):
        assert item.rank == rank_for(0.5, site.d_out, site.d_in)
        with swapped(model, low_rank(model, Unit((site,)), spectra[site.name], item.rank)):
            log_q = log_probabilities(model, tokens)
        expected = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        assert item.divergence == pytest.approx(expected, rel=1e-3, abs=1e-7)
        assert item.divergence > 0
        assert item.tail == spectra[site.name].tails()[item.rank]
        assert result.weights[site.name] * item.tail == pytest.approx(item.divergence)


def test_it_is_the_divergence_that_the_evaluation_measures() -> None:
    model, reference, tokens = tiny_model("llama"), tiny_model("llama"), tiny_tokens(4, 16)
    site = find_sites(model)[3]
    (probe,) = probe_linears(model, spectra_of("llama"), tokens, sites=[site], keep=0.3).probes
    with swapped(model, low_rank(model, Unit((site,)), spectra_of("llama")[site.name], probe.rank)):
        measured = divergence(model, reference, tokens.ids.flatten(), length=16)
    assert probe.divergence == pytest.approx(measured.value, rel=1e-5)


@pytest.mark.parametrize("memory", [0, 96 * 11 * 4 * 4, 2**31])
def test_memory_changes_nothing(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # 4 bytes x 96 tokens of vocabulary x 11 predictions x 4 windows: the second batch of three is beyond it.
    monkeypatch.setattr("eckart.evals.windows.LOGITS_PER_BATCH", 2 * 12 * 96 * 4)
    model, tokens, passes = tiny_model("llama"), tiny_tokens(12, 12), []
    model.register_forward_hook(lambda *_: passes.append(bool(low_rank_modules(model))))
    result = probe_linears(model, spectra_of("llama"), tokens, memory=memory)
    assert result.weights == probe_linears(tiny_model("llama"), spectra_of("llama"), tokens).weights
    sites = len(result.probes)
    assert sum(passes) == 3 * sites
    kept = {0: 0, 96 * 11 * 4 * 4: 1, 2**31: 3}[memory]
    assert len(passes) - sum(passes) == kept + (3 - kept) * sites


def test_a_cut_that_changes_nothing_is_nothing() -> None:
    model = tiny_model("llama")
    (first, *_) = find_sites(model)
    model.get_submodule(first.name).weight.data.zero_()
    noop = factor(read_weight(model.get_submodule(first.name)))
    result = probe_linears(model, {first.name: noop}, tiny_tokens(4, 12), sites=[first])
    assert [(item.divergence, item.tail, item.weight) for item in result.probes] == [(0.0, 0.0, 0.0)]


def test_a_linear_of_low_rank_is_probed_where_it_loses_something() -> None:
    model = tiny_model("llama")
    site = find_sites(model)[0]
    module = model.get_submodule(site.name)
    module.weight.data = (torch.randn(32, 3) @ torch.randn(3, 32)) / 8
    result = probe_linears(model, {site.name: factor(module.weight.detach())}, tiny_tokens(4, 12), sites=[site])
    assert rank_for(0.5, 32, 32) == 8
    assert result.probes[0].rank == 2  # 8, 4, 2
    assert result.probes[0].weight > 0


def test_weights_do_not_depend_on_the_units_of_the_tail() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(4, 12)
    plain = spectra_of("llama")
    scaled = {
        name: Spectrum(spectrum.target, spectrum.basis, 100 * spectrum.energies)  # type: ignore[attr-defined]
        for name, spectrum in plain.items()
    }
    first, second = probe_linears(model, plain, tokens).weights, probe_linears(model, scaled, tokens).weights
    for name, weight in first.items():
        assert weight == pytest.approx(100 * second[name])


def same(first: ProbeResult, second: ProbeResult) -> bool:
    """But for the seconds."""
    strip = lambda result: [(p.name, p.rank, p.divergence, p.tail) for p in result.probes]
    return strip(first) == strip(second) and first.evaluations == second.evaluations


@pytest.mark.parametrize("kill", [0, 1, 7, 20])
def test_killed_probes_go_on(tmp_path: Path, kill: int) -> None:
    tokens, spectra = tiny_tokens(4, 12), spectra_of("llama")
    expected = probe_linears(tiny_model("llama"), spectra, tokens)
    options: dict[str, Any] = {"journal": tmp_path / "journal.jsonl", "identity": {"model": "tiny"}}
    asked: list[str] = []

    def dying(name: str) -> Factored:
        if len(asked) == kill:
            raise KeyboardInterrupt
        asked.append(name)
        return spectra[name]

    model = tiny_model("llama")
    with pytest.raises(KeyboardInterrupt):
        probe_linears(model, dying, tokens, **options)
    assert not low_rank_modules(model)
    rest = {name: spectrum for name, spectrum in spectra.items() if name not in asked}
    assert same(probe_linears(model, rest, tokens, **options), expected)
    passes: list[int] = []
    model.register_forward_hook(lambda *_: passes.append(1))
    assert same(probe_linears(model, {}, tokens, **options), expected)
    assert passes == []
    with pytest.raises(ValueError, match="tokens was"):
        probe_linears(model, spectra, tiny_tokens(4, 12, seed=1), **options)
    with pytest.raises(ValueError, match=r"keep was 0.5 and is 0.4"):
        probe_linears(model, spectra, tokens, keep=0.4, **options)


def test_joint_groups_are_probed_as_one() -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(4, 12)
    sites = find_sites(model)
    group = sites[0].input_group
    members = [site for site in sites if site.input_group == group]
    stack = factor(torch.cat([read_weight(model.get_submodule(site.name)) for site in members]))
    result = probe_linears(
        model, lambda name: stack, tokens, sites=members, joint=[group], layout="pivoted", rank_multiple=4
    )
    (item,) = result.probes
    assert (item.name, item.tail) == (f"{group}+k_proj+v_proj", stack.tails()[item.rank])
    assert item.rank % 4 == 0
    assert item.divergence > 0


class Broken:
    """A spectrum whose cuts are no good: not there, not finite, or so large that the model overflows."""

    max_rank = 16

    def __init__(self, entry: float | None) -> None:
        self.entry = entry

    def cut(self, rank: int) -> Factors:
        if self.entry is None:
            raise DecompositionError("it did not converge")
        return Factors(torch.full((32, rank), self.entry), torch.full((rank, 32), self.entry))

    def tails(self) -> Tensor:
        return torch.ones(17)


@pytest.mark.parametrize(
    ("entry", "error", "message"),
    [
        (None, DecompositionError, "{}: it did not converge"),
        (torch.nan, ValueError, "{}: its factors are not finite in torch.float32"),
        (1e19, ValueError, "{} at rank 8: a prediction is not finite"),
    ],
)
def test_what_is_broken_is_named(entry: float | None, error: type[Exception], message: str) -> None:
    model = tiny_model("llama")
    site = find_sites(model)[3]
    with pytest.raises(error, match=message.format(site.name)):
        probe_linears(model, lambda name: Broken(entry), tiny_tokens(2, 12), sites=[site])  # type: ignore
    assert not low_rank_modules(model)


def test_what_cannot_be_probed_is_refused() -> None:
    spectra, tokens = spectra_of("llama"), tiny_tokens(2, 12)
    with pytest.raises(ValueError, match=r"outside \(0, 1\)"):
        probe_linears(tiny_model("llama"), spectra, tokens, keep=1.0)
    with pytest.raises(ValueError, match="training mode"):
        probe_linears(tiny_model("llama").train(), spectra, tokens)
    with pytest.raises(ValueError, match="positions"):
        probe_linears(tiny_model("llama"), spectra, tiny_tokens(2, 80))
    with pytest.raises(ValueError, match="no predictions to compare"):
        probe_linears(tiny_model("bert", "base"), spectra_of("bert", "base"), tokens)
    with pytest.raises(ValueError, match="no predictions to compare"):
        probe_linears(tiny_model("bert", "classifier", num_labels=1), spectra_of("bert", "classifier"), tokens)
    with pytest.raises(ValueError, match="nothing to predict"):
        probe_linears(tiny_model("llama"), spectra, tiny_tokens(2, 1))
    assert isinstance(probe_linears(tiny_model("llama"), spectra, tokens).to_dict()["probes"], list)
