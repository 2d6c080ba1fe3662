"""--json: what stdout has is that JSON and nothing else, whatever happens, and its keys stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eckart import cli
from eckart.cli.terminal import JSON_FORMAT, print_json
from eckart.evals.catalogue import EVALUATIONS
from eckart.lowrank import METHODS
from eckart.models.loading import load_model
from tiny import Run, tiny_model, tiny_text, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("json")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "text.txt").write_text(tiny_text(200, seed=2))
    return folder / "model"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs `eckart ARGUMENTS --json`; gives what stdout has, read strictly, and what stderr has."""

    def call(*arguments: str | Path) -> tuple[Any, str]:
        monkeypatch.setattr("sys.argv", ["eckart", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert not stop.value.code, capsys.readouterr()
        out, told = capsys.readouterr()
        return json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")), told

    return call


def test_methods_as_json(read: Any) -> None:
    whole, told = read("methods")
    assert not told
    assert whole.keys() == {"format", "compositions", "methods", "baselines"}
    assert [each["name"] for each in whole["methods"]] == list(METHODS)
    keys = {"name", "kind", "about", "paper", "equation", "assumes", "fails", "needs", "settings"}
    assert all(each.keys() == keys for kind in ("compositions", "methods") for each in whole[kind])
    one, _ = read("methods", "nsvd-i")
    assert one == {"format": JSON_FORMAT, **next(each for each in whole["methods"] if each["name"] == "nsvd-i")}
    assert one["settings"] == {"share": 0.95}
    baseline, _ = read("methods", "int8")
    assert baseline.keys() - {"format"} == keys - {"equation", "assumes", "fails"}


def test_evaluations_as_json(read: Any) -> None:
    whole, told = read("evaluations")
    assert not told
    assert whole.keys() == {"format", "evaluations", "corpora", "mixtures", "labelled", "lm_eval_from_local_files"}
    assert [each["name"] for each in whole["evaluations"]] == list(EVALUATIONS)
    assert all(sum(each["shares"].values()) == pytest.approx(1) for each in whole["mixtures"])


def test_inspect_as_json(read: Any, model: Path, tmp_path: Path, run: Run) -> None:
    whole, _ = read("inspect", model, "--keep", "0.5")
    assert not whole["compressed"]
    assert whole["made_by"] is None
    assert whole["plan"]["params"][1] < whole["plan"]["params"][0] == whole["params"]
    assert {"name", "part", "block", "d_out", "d_in", "break_even_rank", "rank"} == whole["linears"][0].keys()
    status, _ = run("compress", model, tmp_path / "out", "--method", "svd", "--keep", "0.5", "--no-cache")
    assert status == 0
    small, _ = read("inspect", tmp_path / "out", "--verify")
    assert small.keys() == whole.keys()
    assert small["compressed"]
    assert small["verified_files"] > 0
    assert small["made_by"]["method"]["name"] == "svd"
    assert {each["name"]: each["rank"] for each in small["linears"]} == {
        each["name"]: each["rank"] for each in whole["linears"]
    }


def test_eval_as_json_while_others_print(read: Any, model: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    def loud(*arguments: Any, **options: Any) -> Any:
        print("loading a model")
        return load_model(*arguments, **options)

    monkeypatch.setattr("eckart.cli.eval.load_model", loud)
    task = f"perplexity:{model.parent / 'text.txt'}"
    whole, told = read("eval", model, "--task", task, "--length", "16", "--limit", "3")
    assert "loading a model" in told
    (result,) = whole["results"]
    assert result.keys() == {"task", "metric", "value", "stderr", "n", "better", "scores", "settings", "warning"}
    assert (result["metric"], result["n"], result["better"]) == ("perplexity", 3, "lower")
    _, printed = run("eval", model, "--task", task, "--length", "16", "--limit", "3")
    assert f"{result['value']:.4f}" in printed


def test_an_error_leaves_stdout_empty(
    model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = load_model(model)
    with torch.no_grad():
        next(broken.parameters()).fill_(torch.nan)
    monkeypatch.setattr("eckart.cli.eval.load_model", lambda *_, **__: broken)
    task = f"perplexity:{model.parent / 'text.txt'}"
    monkeypatch.setattr("sys.argv", ["eckart", "eval", str(model), "--task", task, "--length", "16", "--json"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, told = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert told.startswith("error: ")


def test_numbers_that_json_does_not_have_are_null(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"value": float("inf"), "scores": {"a": {"stderr": float("nan")}}})
    assert json.loads(capsys.readouterr().out) == {
        "format": JSON_FORMAT,
        "value": None,
        "scores": {"a": {"stderr": None}},
    }
