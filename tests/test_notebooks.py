"""What a prompt and a notebook show of the nouns: a line that says what it is, a small table, and no tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

import eckart
from eckart.evals.result import EvalResult, Score
from eckart.lowrank.pivoting import Pivoted
from eckart.models.sites import read_weight
from tiny import tiny_model

WORDS = "<b>&"


@dataclass(frozen=True)
class Made:
    """One of each noun, made the way that users make them."""

    nouns: dict[str, Any]


@pytest.fixture(scope="module")
def made() -> Made:
    model = tiny_model("llama")
    text = eckart.read_text("builtin/prose")
    ids = eckart.Tokens(*_windows(), {"corpus": WORDS})
    method = eckart.build_method("kfac")
    calibration = eckart.calibrate(model, ids, method)
    plan = eckart.plan(model, keep=0.5)
    site = plan.sites[0]
    spectrum = eckart.build_method("svd").factor(read_weight(model.get_submodule(site.name)).double(), None)
    factors = spectrum.cut(2)
    block = calibration.blocks[0]
    result = EvalResult(f"perplexity:{WORDS}", "perplexity", 13.5, 0.25, 900, examples=[2.5] * 900)
    return Made(
        {
            "text": text,
            "tokens": ids,
            "mixture": ids + ids,
            "labelled": eckart.Labelled((WORDS * 99,) * 40, (0, 1) * 20, ("no", "yes"), tuple(range(40)), {}),
            "calibration": calibration,
            "block": block,
            "inputs": next(iter(block.inputs.values())),
            "gradients": next(iter(block.gradients.values())),
            "plan": replace(plan, stored={site.name: eckart.Storage(factors=8)}),
            "spectrum": spectrum,
            "factors": factors,
            "pivoted": Pivoted(factors.right, factors.left[2:], factors.left[:, 0].argsort()),
            "report": eckart.compress(model, method, plan, calibration),
            "result": replace(result, scores={"bits": Score(1.5)}),
        }
    )


def _windows() -> tuple[Any, Any]:
    ids = torch.arange(4 * 16).reshape(4, 16) % 60
    return ids, torch.ones_like(ids, dtype=torch.bool)


NOUNS = ("text", "tokens", "mixture", "labelled", "calibration", "block", "inputs", "gradients", "plan", "spectrum")
NOUNS += ("factors", "pivoted", "report", "result")


@pytest.mark.parametrize("noun", NOUNS)
def test_a_noun_is_one_short_line_that_names_it(made: Made, noun: str) -> None:
    thing = made.nouns[noun]
    shown = repr(thing)
    assert shown.startswith(f"{type(thing).__name__}(")
    assert len(shown) < 160
    assert not [word for word in ("tensor(", "object at", "\n") if word in shown]


@pytest.mark.parametrize("noun", ["tokens", "mixture", "calibration", "plan", "report", "result"])
def test_a_notebook_shows_a_table_of_text(made: Made, noun: str) -> None:
    html = made.nouns[noun]._repr_html_()
    assert html.startswith("<table>")
    assert html.count("<tr>") == html.count("</tr>") > 1
    assert WORDS not in html
    assert len(html) < 4000


def test_what_the_lines_say(made: Made) -> None:
    shown = {name: repr(thing) for name, thing in made.nouns.items()}
    assert shown["tokens"] == f"Tokens(4 samples of 16, 64 tokens of {WORDS})"
    assert shown["mixture"] == "Tokens(8 samples of 16, 128 tokens of 2 texts)"
    assert shown["labelled"] == "Labelled(40 texts, classes no, yes)"
    assert shown["result"] == f"EvalResult(perplexity:{WORDS}: perplexity 13.5 \u00b1 0.25, n = 900)"
    plan = made.nouns["plan"]
    assert f"keep {plan.keep:.3f}, layout plain, 1 in few bits" in shown["plan"]
    assert f"{len(plan.ranks)} of {len(plan.sites)} linears" in shown["plan"]
