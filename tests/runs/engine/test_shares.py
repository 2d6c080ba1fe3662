"""A calibration in shares: put together, it is one sum, whoever made which."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from eckart.calibration.gradients import collect_gradients
from eckart.data.tokens import Tokens
from eckart.models.sites import find_sites
from eckart.runs.engine.shares import branches, count_shares, put_together, share_of
from runs.engine.clusters import TOKENS
from tiny import relative, tiny_model, tiny_tokens


@pytest.mark.parametrize("count", [1, 2, 3, 5, 32])
def test_what_workers_add_up_is_one_sum(count: int) -> None:
    class Noted:
        """A sum that shows in which order it was made."""

        def __init__(self, text: str) -> None:
            self.text = text

        def __add__(self, other: Noted) -> Noted:
            return Noted(f"({self.text}+{other.text})")

    tree = range(count)
    single = [range(number, number + 1) for number in tree]
    whole = put_together(tree, single, lambda share: {"x": Noted(str(share.start))})["x"].text
    for workers in range(1, count + 1):
        cuts = [worker * count // workers for worker in range(workers + 1)]
        sums = {}
        for start, stop in pairwise(cuts):
            for branch in branches(tree, range(start, stop)):
                sums[branch] = put_together(branch, single, lambda share: {"x": Noted(str(share.start))})
        assert sorted(n for branch in sums for n in branch) == list(tree)
        assert put_together(tree, sums, sums.pop)["x"].text == whole


def test_shares_are_all_of_the_samples_once() -> None:
    tokens = tiny_tokens(75, 4)
    shares = [share_of(tokens, number) for number in range(count_shares(tokens))]
    assert torch.equal(torch.cat([rows.ids for rows, _ in shares]), tokens.ids)
    assert all(len(rows) in (2, 3) for rows, _ in shares)
    assert all(len(before) == sum(len(rows) for rows, _ in shares[:n]) for n, (_, before) in enumerate(shares))


@pytest.mark.parametrize(("model_type", "head"), [("llama", None), ("bert", None), ("bert", "classifier")])
def test_gradients_of_parts_add_up_to_those_of_the_whole(model_type: str, head: str | None) -> None:
    model, needs = tiny_model(model_type, head), frozenset({"fisher_in", "gradient_covariance"})
    sites = find_sites(model)[:3]
    whole = collect_gradients(model, TOKENS, sites, needs)
    parts = [collect_gradients(model, rows, sites, needs, after=before) for rows, before in map(share, (0, 1, 2))]
    for site in sites:
        summed = parts[0][site.name] + parts[1][site.name] + parts[2][site.name]
        assert (summed.examples, summed.tokens) == (whole[site.name].examples, whole[site.name].tokens)
        for name, value in whole[site.name].sums.items():
            assert relative(summed.sums[name], value) < (1e-6 if name == "gradient_covariance" else 1e-9)


def share(number: int) -> tuple[Tokens, Tokens]:
    """A third of the samples, and those before it."""
    ends = (0, 3, 8, 11)
    start, stop = ends[number], ends[number + 1]
    return (
        replace(TOKENS, ids=TOKENS.ids[start:stop], mask=TOKENS.mask[start:stop]),
        replace(TOKENS, ids=TOKENS.ids[:start], mask=TOKENS.mask[:start]),
    )
