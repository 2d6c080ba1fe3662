"""Linears that read something besides the text's tokens: their statistics would mix both, and are refused."""

from __future__ import annotations

from typing import Any

import pytest
import transformers as hf
from transformers import PreTrainedModel

from eckart.allocation import plan
from eckart.calibration.moments import calibrate, calibrate_by_block
from eckart.calibration.sequential import SequentialCalibration
from eckart.compression.replace import compress
from eckart.lowrank import build_method
from eckart.models.sites import find_sites, low_rank_modules
from tiny import COMMON, tiny_tokens

WAY = r"exclude it, or give a method that needs no calibration, such as svd$"


def deberta(**more: Any) -> PreTrainedModel:
    relative = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "max_relative_positions": 8}
    return hf.DebertaV2ForMaskedLM(hf.DebertaV2Config(**COMMON, **{**relative, **more})).eval()


# One row of 16 tokens is as many rows as there are relative positions: then only the second call tells.
@pytest.mark.parametrize(("rows", "shared"), [(4, True), (4, False), (1, True)])
def test_relative_positions_are_not_tokens(rows: int, shared: bool) -> None:
    model, method = deberta(share_att_key=shared), build_method("asvd-i")
    what = r"(is called more than once by its block|reads \d+ rows for \d+ tokens), so that it has no input for each"
    with pytest.raises(ValueError, match=rf"^deberta\S+\.0\.attention\.self\.\w+ {what} token .*{WAY}"):
        list(calibrate(model, tiny_tokens(rows, 16), method))
    calibration = SequentialCalibration(model, tiny_tokens(rows, 16), method, order="sequential")
    with pytest.raises(ValueError, match=rf"{what}.*{WAY}"):
        list(calibration)


def test_what_reads_tokens_alone_is_calibrated_and_the_rest_goes_by_svd() -> None:
    model, method = deberta(), build_method("asvd-i")
    ranks = plan(model, 0.5, include=("intermediate.dense", "output.dense"), exclude=("attention.output.dense",))
    sites = [site for site in find_sites(model) if ranks.rank(site) is not None]
    compress(model, method, ranks, calibrate_by_block(model, tiny_tokens(), method, sites=sites))
    assert set(low_rank_modules(model)) == {site.name for site in sites}
    whole = deberta()
    compress(whole, "svd", plan(whole, 0.5))
    assert len(low_rank_modules(whole)) == len(find_sites(deberta()))
