"""Average improvement, on the NSVD paper's own numbers."""

from __future__ import annotations

import pytest

from eckart.evals.improvement import average_improvement

# NSVD Table 1 at 30 % removed: WikiText-2, PTB, C4, SNIPS, AlpacaEval, MCTest, CMRC, AlpacaEval (JP).
NAMES = ("wikitext2", "ptb", "c4", "snips", "alpaca_eval", "mctest", "cmrc2018", "japanese")
ASVD_I = dict(zip(NAMES, (9.51, 27.11, 25.81, 17.89, 9.45, 3.06, 688.23, 813.23), strict=True))
NSVD_I = dict(zip(NAMES, (9.64, 25.19, 24.41, 15.74, 8.85, 3.02, 577.63, 367.69), strict=True))


def test_the_paper_s_average() -> None:
    assert average_improvement(NSVD_I, ASVD_I, in_domain=["wikitext2"]) == pytest.approx(0.147, abs=5e-4)


def test_signs_and_limits() -> None:
    assert average_improvement(ASVD_I, ASVD_I) == 0
    assert average_improvement({"a": 2.0, "b": 0.5}, {"a": 1.0, "b": 1.0}) == pytest.approx(-0.25)
    with pytest.raises(ValueError, match="no value for ptb"):
        average_improvement(NSVD_I, {name: value for name, value in ASVD_I.items() if name != "ptb"})
    with pytest.raises(ValueError, match="no task outside"):
        average_improvement({"a": 1.0}, {"a": 1.0}, in_domain=["a"])
