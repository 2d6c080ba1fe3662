"""Linears that read relative positions: left out unless they are named, and then refused where statistics are taken."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from transformers import PreTrainedModel

from eckart.allocation import plan
from eckart.calibration.moments import calibrate, calibrate_by_block
from eckart.calibration.sequential import SequentialCalibration
from eckart.compression.replace import compress
from eckart.lowrank import build_method
from eckart.models.families import FAMILIES
from eckart.models.loading import load_model, save
from eckart.models.sites import default_sites, find_sites, input_groups, low_rank_modules, select_sites
from tiny import COMMON, logits_of, tiny_tokens

WAY = r"exclude it, or give a method that needs no calibration, such as svd$"
POSITIONS = {"pos_key_proj", "pos_query_proj"}
# {whether positions go through the tokens' own projections: the linears that read them}.
READERS = {False: POSITIONS, True: {"query_proj", "key_proj"}}


def deberta(**more: Any) -> PreTrainedModel:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**COMMON, **{**relative, **more})).eval()


def last_names(sites: Any) -> set[str]:
    return {site.role.rpartition(".")[2] for site in sites}


@pytest.mark.parametrize("shared", [False, True])
def test_they_are_sites_that_have_to_be_named(shared: bool) -> None:
    model, readers = deberta(share_att_key=shared), READERS[shared]
    sites = find_sites(model)
    assert last_names(site for site in sites if site.of_positions) == readers
    assert last_names(default_sites(model)) == {"query_proj", "key_proj", "value_proj", "dense"} - readers
    for include in (("attention",), ("*attention*",), ("*",)):
        assert last_names(select_sites(sites, include=include)).isdisjoint(readers)
    (name, *_) = sorted(readers)
    for include in ((name,), (f"attention.self.{name}",), (f"*.attention.self.{name}",)):
        assert last_names(select_sites(sites, include=include)) == {name}
    assert len(select_sites(sites, include=("mlp", name))) == 3 * 3
    assert set(input_groups(model)) == {site.input_group for site in default_sites(model)}


@pytest.mark.parametrize("shared", [False, True])
def test_the_others_are_calibrated_and_compressed_by_default(shared: bool, tmp_path: Any) -> None:
    model, method = deberta(share_att_key=shared), build_method("asvd-i")
    ranks = plan(model, 0.5)
    compress(model, method, ranks, calibrate(model, tiny_tokens(), method))
    assert set(low_rank_modules(model)) == {site.name for site in default_sites(deberta(share_att_key=shared))}
    expected = logits_of(model)
    save(model, tmp_path / "out")
    assert torch.equal(logits_of(load_model(tmp_path / "out")), expected)


@pytest.mark.parametrize("shared", [False, True])
def test_named_they_are_cut_without_a_text(shared: bool) -> None:
    model = deberta(share_att_key=shared)
    compress(model, "svd", plan(model, 0.5, include=sorted(READERS[shared])))
    assert {name.rpartition(".")[2] for name in low_rank_modules(model)} == READERS[shared]


# One row of 16 tokens is as many rows as there are relative positions: then only the second call tells.
@pytest.mark.parametrize(("rows", "shared"), [(4, True), (4, False), (1, True)])
def test_named_they_have_no_statistics(rows: int, shared: bool) -> None:
    model, method = deberta(share_att_key=shared), build_method("asvd-i")
    sites = select_sites(find_sites(model), include=sorted(READERS[shared]))
    what = r"(is called more than once by its block|reads \d+ rows for \d+ tokens), so that it has no input for each"
    with pytest.raises(ValueError, match=rf"^deberta\S+\.0\.attention\.self\.\w+ {what} token .*{WAY}"):
        list(calibrate_by_block(model, tiny_tokens(rows, 16), method, sites=sites))
    calibration = SequentialCalibration(model, tiny_tokens(rows, 16), method, order="sequential", sites=sites)
    with pytest.raises(ValueError, match=rf"{what}.*{WAY}"):
        list(calibration)


def test_what_the_row_says_of_positions_is_in_it() -> None:
    for family in FAMILIES.values():
        paths = {path for inputs in family.parts.values() for shared in inputs for path in shared}
        assert family.positions | family.shared_positions <= paths
