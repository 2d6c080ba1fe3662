"""What a compressed mixture says of its experts: in compression.json, in the terminal and on the report's page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import eckart
from eckart.cli.tables import experts_table
from eckart.models.experts import expert_of, opened_experts
from eckart.models.sites import find_sites
from eckart.reports.experts import SHOWN, experts
from eckart.reports.page import render
from eckart.reports.runs import read_runs
from tiny import Run, site_inputs, tiny_model, tiny_tokens

from .from_files import BATCHED, facts_of, put_model, recipe_of

pytestmark = pytest.mark.usefixtures("any_tokenizer")


@pytest.mark.parametrize("joint", [False, True])
def test_the_tokens_of_every_expert_are_counted(joint: bool) -> None:
    """By hooks: every row that an expert reads, of all tokens but padding."""
    model, tokens, method = tiny_model("qwen3_moe"), tiny_tokens(5, 12), eckart.build_method("asvd-i")
    for each in opened_experts(model).values():
        each.visits_all = True
    sites = [site for site in find_sites(model) if expert_of(site.name)]
    read = {name: len(rows) / tokens.count for name, rows in site_inputs(model, tokens, sites).items()}
    groups = {site.joint_group for site in sites} if joint else ()
    ranks = eckart.plan(model, 0.5, joint=groups)
    report = eckart.compress(model, method, ranks, eckart.calibrate(model, tokens, method))
    counted = {each.name: each.tokens for each in report.sites if each.tokens is not None}
    assert counted.keys() == read.keys()
    assert counted == pytest.approx(read)
    assert sum(counted.values()) == pytest.approx(2 * 2 * 2)  # two layers, two linears, each token to two experts
    stored = report.to_dict()["sites"]
    assert all(("tokens" in stored[name]) == (expert_of(name) is not None) for name in stored)


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = put_model(tmp_path_factory.mktemp("mixture"), "mixtral")
    recipe = recipe_of(place, method="best", sites={"include": ["experts"]}, refine={"steps": 0})
    eckart.run(recipe, place / "run", BATCHED)
    return place / "run"


def test_the_report_has_a_mark_for_every_expert(run_directory: Path) -> None:
    collection = read_runs([run_directory])
    chart = experts(collection)
    assert chart is not None
    assert {view.choices[-1] for view in chart.views} == {*SHOWN}
    sites = facts_of(run_directory / "model")["sites"]
    for view in chart.views:
        key = {"rank": "rank", "relative error": "relative_error"}[view.choices[-1]]
        assert [note.text for note in view.figure.layout.annotations] == [f"layer {block}" for block in range(3)]
        drawn = [(x, y) for trace in view.figure.data for x, y in zip(trace.x, trace.y, strict=True)]
        wanted = [
            (site["tokens"], min(site["shape"]) if key == "rank" and site["rank"] is None else site[key])
            for site in sites.values()
            if "tokens" in site and (key == "rank" or site[key] is not None)
        ]
        assert sorted(drawn) == sorted(wanted)
    rows = [[cell.value for cell in row] for row in chart.table.rows]
    assert len(rows) == 3 * 4 * 2
    name = "model.layers.1.mlp.experts.2.down_proj"
    (row,) = [row for row in rows if row[3:6] == ["down_proj", 1, 2]]
    assert row[6:] == [sites[name][key] for key in ("tokens", "rank", "relative_error")]
    assert "Experts by their use" in render(collection)


def test_no_mixture_no_figure(tmp_path: Path) -> None:
    place = put_model(tmp_path, "llama")
    eckart.run(recipe_of(place, method="svd"), place / "run", BATCHED)
    assert experts(read_runs([place / "run"])) is None


def test_the_terminal_compares_the_more_used_half(run: Run, tmp_path: Path) -> None:
    place = put_model(tmp_path, "mixtral")
    given: list[Any] = ["--keep", "0.6", "--method", "asvd-i", "--calibration", place / "train.jsonl"]
    status, printed = run("compress", place / "model", tmp_path / "out", *given, "--samples", "8", "--length", "16")
    assert status == 0, printed
    assert "the more used half of a layer" in printed
    sites = facts_of(tmp_path / "out")["sites"]
    uses = [site["tokens"] for name, site in sites.items() if ".1.mlp.experts." in name]
    assert f"{min(uses):.1%} to {max(uses):.1%}" in " ".join(printed.split())
    model, method = tiny_model("llama"), eckart.build_method("svd")
    assert experts_table(eckart.compress(model, method, eckart.plan(model, 0.5))) is None
