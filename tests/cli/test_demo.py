"""The demo's rows, on the built-in model."""

import pytest
import torch

import eckart
from eckart.cli.demo import run_demo
from eckart.lowrank import Factored
from eckart.models.sites import find_sites
from tiny import logits_of, tiny_model, tiny_tokens


def test_a_row_of_the_demo() -> None:
    dense, small = run_demo(methods=["asvd-i"], keeps=[0.5])
    assert dense.method == "dense"
    assert dense.decode_speed == 1.0
    assert (small.method, small.keep) == ("asvd-i", 0.5)
    assert small.params < dense.params
    assert small.bytes == 2 * small.params
    assert small.in_domain > dense.in_domain
    assert small.out_of_domain > dense.out_of_domain
    assert small.decode_speed > 0


def test_a_sweep_over_sizes_factors_each_site_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spectra that are kept give the factors that a compression from the start gives, without a decomposition."""
    method, tokens = eckart.build_method("nsvd-i"), tiny_tokens()
    statistics = eckart.calibrate(tiny_model("llama"), tokens, method)
    spectra: dict[str, Factored] = {}
    for keep in (0.7, 0.4):
        kept, fresh = tiny_model("llama"), tiny_model("llama")
        eckart.compress(fresh, method, eckart.plan(fresh, keep), statistics, spectra={})
        with monkeypatch.context() as patched:
            if spectra:
                patched.setattr(eckart.Method, "factor", None)
            eckart.compress(kept, method, eckart.plan(kept, keep), statistics, spectra=spectra)
        assert torch.equal(logits_of(kept), logits_of(fresh))
    assert len(spectra) == len(find_sites(tiny_model("llama")))


@pytest.mark.slow
def test_the_demo_shows_what_the_papers_found() -> None:
    """At half size: activation awareness wins in its domain, loses out of it, and nesting gives part of that back."""
    rows = {row.method: row for row in run_demo(methods=["svd", "asvd-i", "nsvd-i"], keeps=[0.5])}
    assert rows["asvd-i"].in_domain < rows["nsvd-i"].in_domain < rows["svd"].in_domain
    assert rows["svd"].out_of_domain < rows["nsvd-i"].out_of_domain < rows["asvd-i"].out_of_domain
