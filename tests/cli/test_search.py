"""`eckart search`: ranks by measurement from the command line, in a file that compress takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eckart.models.sites import find_sites
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.recipe import parse_recipe
from tiny import Run, tiny_model, tiny_text, tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer, a calibration text and a text to search on."""
    folder = tmp_path_factory.mktemp("search")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "train.txt").write_text(tiny_text(900, seed=1))
    (folder / "test.txt").write_text(tiny_text(300, seed=2))
    return folder


def search(run: Run, place: Path, plan: Path, *more: str | Path) -> tuple[int, str]:
    return run(
        "search", place / "model", plan, "--score", f"perplexity:{place / 'test.txt'}", "--length", "16",
        "--calibration", place / "train.txt", "--samples", "8", "--cache", place / "cache", *more,
    )  # fmt: skip


def test_search_then_compress(run: Run, place: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    arguments = ("--tolerance", "2%", "--budget", "0.3", "--budget", "0.6")
    status, printed = search(run, place, plan, *arguments)
    assert status == 0, printed
    assert "evaluations" in printed
    result = json.loads((tmp_path / "plan.search.json").read_text())
    assert result["ranks"] == json.loads(plan.read_text())["ranks"]
    assert result["curve"][-1]["keep"] < 1
    trials = tmp_path / "plan.trials.jsonl"
    assert len(trials.read_text().splitlines()) == 1 + result["evaluations"]

    status, printed = search(run, place, plan, *arguments)
    assert status == 2
    assert "exists" in printed
    before = trials.read_bytes()
    status, printed = search(run, place, plan, *arguments, "--force")  # all of it is in the journal
    assert status == 0, printed
    assert trials.read_bytes() == before
    assert json.loads((tmp_path / "plan.search.json").read_text()) == result
    status, printed = search(run, place, plan, "--tolerance", "3%", "--force")
    assert status == 2
    assert "another surgical search" in printed

    status, printed = run(
        "compress", place / "model", tmp_path / "small", "--method", "sfsd", "--plan", plan,
        "--calibration", place / "train.txt", "--samples", "8", "--length", "16", "--cache", place / "cache",
    )  # fmt: skip
    assert status == 0, printed


def test_a_target_and_some_sites(run: Run, place: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    arguments = ("--method", "svd", "--include", "mlp", "--tolerance", "1000%", "--budget", "0.5", "--keep")
    status, printed = search(run, place, plan, *arguments, "0.9")
    assert status == 0, printed
    written = json.loads(plan.read_text())
    assert all("mlp" in name for name in written["ranks"])
    # keep is the share of the selected linears, as everywhere: the first plan that is small enough ends the search.
    selected = sum(site.num_params for site in find_sites(tiny_model("llama")) if "mlp" in site.name)
    curve = json.loads((tmp_path / "plan.search.json").read_text())["curve"]
    shares = [1 - (written["dense_params"] - point["kept_params"]) / selected for point in curve]
    assert shares[-1] <= 0.9 < shares[-2]
    assert [point["keep"] for point in curve] == pytest.approx(shares)
    assert f"keeps {shares[-1]:.1%} of the selected linears" in printed
    status, printed = search(run, place, plan, *arguments, "0.3", "--force")
    assert status == 0, printed
    assert "before keep 0.3 was reached" in printed


@pytest.mark.slow
def test_ranks_are_chosen_by_what_layers_know(run: Run, place: Path, tmp_path: Path) -> None:
    """The search reads the train split and the report the other; the score is the selectivity."""
    for name, seed in (("train", 0), ("dev", 1000)):
        rows = [{"text": tiny_text(4, seed + n) + " w1" * (n % 2), "label": n % 2} for n in range(40)]
        (tmp_path / "sst2").mkdir(exist_ok=True)
        (tmp_path / "sst2" / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    few = ("--method", "svd", "--include", "down_proj", "--blocks", "last 1", "--budget", "0.5", "--tolerance", "2")
    status, printed = search(run, place, tmp_path / "plan.json", *few, "--score", "probing:sst2", "--data", tmp_path)
    assert status == 0, printed
    header = json.loads((tmp_path / "plan.trials.jsonl").read_text().splitlines()[0])["of"]["score"]
    assert (header["task"]["name"], header["task"]["split"], header["score"]) == (
        "probing:sst2",
        "train-without-test",
        "selectivity",
    )
    assert json.loads((tmp_path / "plan.search.json").read_text())["evaluations"] == 2
    status, printed = search(run, place, tmp_path / "other.json", *few, "--score", f"probing:{place / 'test.txt'}")
    assert status == 2
    assert "has one split, which would be searched and reported on" in printed


def test_the_command_finds_what_the_recipe_does(run: Run, place: Path, tmp_path: Path) -> None:
    """One search behind both; a limit is what it reads at most, after the division."""
    shared = {"budgets": [0.3, 0.6], "tolerance": "2%", "limit": 2}
    arguments = [word for share in shared["budgets"] for word in ("--budget", str(share))]  # type: ignore[attr-defined]
    status, printed = search(run, place, tmp_path / "plan.json", *arguments, "--tolerance", "2%", "--limit", "2")
    assert status == 0, printed
    recipe = parse_recipe(
        {
            "model": str(place / "model"),
            "method": "sfsd",
            "allocation": {"name": "surgical", "score": f"perplexity:{place / 'test.txt'}", **shared},
            "context": 16,
            "calibration": {"corpus": str(place / "train.txt"), "samples": 8},
        }
    )
    outcome = make_checkpoint(recipe, tmp_path / "out", How())
    written = json.loads((tmp_path / "plan.json").read_text())["ranks"]
    assert written == outcome.plan.ranks
    assert any(rank is not None for rank in written.values())
    header = json.loads((tmp_path / "plan.trials.jsonl").read_text().splitlines()[0])["of"]
    assert header["score"]["windows"] == [2, 16]
    assert header["budgets"] == [0.3, 0.6]


def test_plans_whose_names_end_in_a_number_keep_their_own_curves(run: Run, place: Path, tmp_path: Path) -> None:
    for keep in ("0.8", "0.9"):
        status, printed = search(run, place, tmp_path / f"plan-{keep}", "--budget", "0.5", "--keep", keep)
        assert status == 0, printed
    names = {f"plan-{keep}{what}" for keep in ("0.8", "0.9") for what in ("", ".search.json", ".trials.jsonl")}
    assert {file.name for file in tmp_path.iterdir()} == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--tolerance", "much"), "is none of"),
        (("--score", "cost"), "no score to search by"),
        (("--score", "perplexty:ptb"), "did you mean 'perplexity'"),
        (("--layout", "round"), "should be 'plain' or 'pivoted'"),
        (("--budget", "1.5"), "each in (0, 1)"),
        (("--keep", "1"), "the budget keeps everything"),
        (("--score", "stereoset", "--score-split", "train"), "split 'train' is of a corpus of text"),
        (("--length", "64", "--samples", "4"), "of windows of 64 tokens, 4 documents are too few"),
    ],
)
def test_bad_input_is_one_line(run: Run, place: Path, tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    status, printed = search(run, place, tmp_path / "plan.json", *arguments)
    assert status == 2
    assert message in printed
    assert "Traceback" not in printed
    assert not list(tmp_path.iterdir())
