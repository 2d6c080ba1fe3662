"""The command line on a tiny model: every command, and one clear line for what goes wrong."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoModelForCausalLM

from eckart.evals.result import EvalResult
from tiny import Run, tiny_model, tiny_text, tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, its tokenizer, a calibration text and an evaluation text."""
    folder = tmp_path_factory.mktemp("cli")
    tiny_model("llama").save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    (folder / "train.txt").write_text(tiny_text(900, seed=1))
    (folder / "test.txt").write_text(tiny_text(300, seed=2))
    return folder


def compress(run: Run, place: Path, out: Path, *more: str | Path) -> tuple[int, str]:
    calibration = ("--calibration", place / "train.txt", "--samples", "8", "--length", "16", "--cache", place / "cache")
    return run("compress", place / "model", out, *calibration, *more)


def test_a_mixture_with_weights_from_the_command_line_to_the_card(run: Run, place: Path, tmp_path: Path) -> None:
    mixture = f"{place / 'train.txt'}*3+{place / 'test.txt'}"
    text = ("--calibration", mixture, "--samples", "8", "--length", "16")
    status, printed = run("compress", place / "model", tmp_path / "small", *text, "--method", "asvd-i", "--keep", "0.6")
    assert status == 0, printed
    card = (tmp_path / "small/README.md").read_text()
    assert "Calibrated on 128 tokens" in card
    assert "| train.txt | 6 | 96 | 0.750 |\n| test.txt | 2 | 32 | 0.250 |" in card
    facts = json.loads((tmp_path / "small/compression.json").read_text())
    assert [part["tokens"] for part in facts["calibration"]] == [96, 32]

    task = f"similarity:{place / 'test.txt'}"
    arguments = ("--calibration", mixture, "--samples", "4", "--length", "16", "--out", tmp_path / "e")
    status, printed = run("eval", place / "model", "--task", task, *arguments)
    assert status == 0, printed
    (file,) = (tmp_path / "e").glob("*.json")
    parts = EvalResult.from_json(file.read_text()).settings["calibration"]["parts"]
    assert [part["samples"] for part in parts] == [3, 1]


def test_a_method_that_reads_no_text_names_none_in_its_card(run: Run, place: Path, tmp_path: Path) -> None:
    status, printed = compress(run, place, tmp_path / "small", "--method", "svd", "--keep", "0.6")
    assert status == 0, printed
    assert "Calibrated on" not in (tmp_path / "small/README.md").read_text()


def test_compress_then_eval_then_inspect_then_export(run: Run, place: Path, tmp_path: Path) -> None:
    status, printed = compress(run, place, tmp_path / "small", "--method", "nsvd-i", "--keep", "0.6")
    assert status == 0, printed
    assert "factor" in printed
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "plan.json", "recipe.yaml"} <= {
        file.name for file in (tmp_path / "small").iterdir()
    }
    resolved = yaml.safe_load((tmp_path / "small/recipe.yaml").read_text())
    assert resolved["calibration"]["cut"] == "windows"
    card = (tmp_path / "small/README.md").read_text()
    assert "nsvd-i" in card
    assert "| train.txt | 8 | 128 | 1.000 |" in card

    task = f"perplexity:{place / 'test.txt'}"
    arguments = ("eval", tmp_path / "small", "--task", task, "--length", "16", "--limit", "4", "--out", tmp_path / "e")
    status, printed = run(*arguments)
    assert status == 0, printed
    (file,) = (tmp_path / "e").glob("*.json")
    result = EvalResult.from_json(file.read_text())
    assert result.n == 4
    assert result.settings["scored_tokens"] == 60
    assert f"{result.value:.4f}" in printed
    status, printed = run(*arguments)
    assert status == 0
    assert "1 of 1 are there already" in printed
    assert f"{result.value:.4f}" in printed

    status, printed = run("inspect", tmp_path / "small")
    assert status == 0
    assert "down_proj" in printed
    assert "nsvd-i" in printed
    status, printed = run("inspect", tmp_path / "small", "--keep", "0.5")
    assert status == 2
    assert "is compressed already" in printed
    status, printed = run("inspect", tmp_path / "small", "--json")
    assert {each["stored"] for each in json.loads(printed[printed.index("{") :])["linears"]} == {None}

    status, printed = run("export", tmp_path / "small", tmp_path / "dense", "--dense")
    assert status == 0, printed
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert run("export", tmp_path / "dense", tmp_path / "again", "--dense")[0] == 2


def test_nothing_said_is_the_best_composition(run: Run, place: Path, tmp_path: Path) -> None:
    status, printed = compress(
        run, place, tmp_path / "small", "--keep", "0.5", "--include", "mlp", "--blocks", "last 2"
    )
    assert status == 0, printed
    recipe = yaml.safe_load((tmp_path / "small/recipe.yaml").read_text())
    assert recipe["method"]["name"] == "kfac"
    assert (recipe["allocation"]["name"], recipe["layout"], recipe["order"]) == ("global", "pivoted", "anchored")
    assert recipe["sites"] == {"include": ["mlp"], "exclude": [], "blocks": "last 2"}
    assert "rules" not in recipe
    for measure in ("(keep)", "(keep_total)", "(max_bytes)", "multiply-accumulates per token", "calibrate"):
        assert measure in printed, measure
    assert "refined" not in printed
    plan = json.loads((tmp_path / "small/plan.json").read_text())
    assert plan["layout"] == "pivoted"
    size = (tmp_path / "small/model.safetensors").stat().st_size
    status, printed = compress(run, place, tmp_path / "less", "--max-bytes", str(size - 2000), "--effort", "high")
    assert status == 0, printed
    assert (tmp_path / "less/model.safetensors").stat().st_size <= size - 2000
    assert "refined" in printed
    status, printed = run("inspect", tmp_path / "small")
    assert status == 0, printed
    kept = {
        line.split()[1]: float(line.split()[-2]) for line in printed.splitlines() if "mlp." in line and " x " in line
    }
    for name, share in kept.items():
        d_out, d_in = (48, 32) if "down" not in name else (32, 48)
        rank = plan["ranks"][name]
        assert share == pytest.approx(rank * (d_out + d_in - rank) / (d_out * d_in), abs=5e-4)
    assert len(kept) == len([rank for rank in plan["ranks"].values() if rank])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--allocation", "global", "--layout", "pivoted"), {"allocation": "global", "layout": "pivoted"}),
        (("--order", "sequential", "--refit", "--joint"), {"order": "sequential", "refit": True, "joint": True}),
        (("--refine", "2", "--no-joint"), {"refine": 2, "joint": False}),
    ],
)
def test_what_is_around_a_method_is_an_option_each(
    run: Run, place: Path, tmp_path: Path, options: tuple[str, ...], expected: dict[str, object]
) -> None:
    status, printed = compress(run, place, tmp_path / "out", "--method", "asvd-i", "--keep-total", "0.7", *options)
    assert status == 0, printed
    recipe = yaml.safe_load((tmp_path / "out/recipe.yaml").read_text())
    short = {**recipe, "allocation": recipe["allocation"]["name"], "refine": recipe["refine"]["steps"]}
    assert {name: short[name] for name in expected} == expected
    assert recipe["keep_total"] == 0.7


def test_selection_is_one_line_each(run: Run, place: Path, tmp_path: Path) -> None:
    status, printed = compress(run, place, tmp_path / "mlp", "--method", "svd", "--keep", "0.5", "--include", "mlp")
    assert status == 0, printed
    ranks = json.loads((tmp_path / "mlp/plan.json").read_text())["ranks"]
    assert ranks
    assert all(".mlp." in name for name in ranks)
    status, printed = compress(run, place, tmp_path / "last", "--method", "svd", "--keep", "0.46", "--blocks", "last 2")
    assert status == 0, printed
    ranks = json.loads((tmp_path / "last/plan.json").read_text())["ranks"]
    assert {name.split(".")[2] for name in ranks} == {"1", "2"}


def test_a_plan_is_written_edited_and_used(run: Run, place: Path, tmp_path: Path) -> None:
    status, printed = run("inspect", place / "model", "--keep", "0.5", "--save-plan", tmp_path / "plan.json")
    assert status == 0, printed
    plan = json.loads((tmp_path / "plan.json").read_text())
    first = next(iter(plan["ranks"]))
    plan["ranks"] = {first: 3}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    status, printed = compress(run, place, tmp_path / "out", "--method", "svd", "--plan", tmp_path / "plan.json")
    assert status == 0, printed
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["quantization_config"]["sites"] == {first: {"rank": 3, "bias": False}}


def test_a_size_in_bytes_chooses_ranks_and_bits(run: Run, place: Path, tmp_path: Path) -> None:
    """What was chosen is printed and listed, and the result loads, is measured and exported like any other."""
    status, printed = compress(run, place, tmp_path / "out", "--max-bytes", "80000", "--bits", "auto", "--group", "16")
    assert status == 0, printed
    assert (tmp_path / "out/model.safetensors").stat().st_size <= 80_000
    line = next(line for line in printed.splitlines() if line.startswith("kept: "))
    stored = json.loads((tmp_path / "out/plan.json").read_text())["stored"]
    counts = [int(part.split()[0]) for part in line.removeprefix("kept: ").split(", ") if part.split()[0].isdigit()]
    assert sum(counts) >= len(stored) > 0
    status, printed = run("inspect", tmp_path / "out")
    assert status == 0, printed
    assert "stored" in printed
    assert any(word in printed for word in ("int3 weight", "int4 weight", "int8 weight"))
    status, printed = run("export", tmp_path / "out", tmp_path / "dense", "--dense")
    assert status == 0, printed
    for folder in ("out", "dense"):
        task = ("--task", f"perplexity:{place / 'test.txt'}", "--limit", "4", "--length", "16")
        status, printed = run("eval", tmp_path / folder, *task, "--out", tmp_path / f"e-{folder}")
        assert status == 0, printed
    values = [json.loads(next((tmp_path / f"e-{f}").glob("*.json")).read_text())["value"] for f in ("out", "dense")]
    assert values[0] == pytest.approx(values[1], rel=1e-3)
    status, printed = compress(run, place, tmp_path / "never", "--keep", "0.5", "--bits", "five")
    assert status == 2
    assert "bits: Input should be 'auto', 8, 4, 3 or 2" in printed


def test_the_pivoted_layout_has_more_rank_for_the_same_share(run: Run, place: Path, tmp_path: Path) -> None:
    plans = {}
    for layout in ("plain", "pivoted"):
        file = tmp_path / f"{layout}.json"
        status, printed = run("inspect", place / "model", "--keep", "0.5", "--layout", layout, "--save-plan", file)
        assert status == 0, printed
        assert "numbers in the linears (keep)" in printed
        plans[layout] = json.loads(file.read_text())
        assert plans[layout]["layout"] == layout
        assert plans[layout]["keep"] <= 0.5
    assert all(plans["pivoted"]["ranks"][name] > rank for name, rank in plans["plain"]["ranks"].items())
    assert "numbers in all linears" not in printed
    status, printed = run("inspect", place / "model", "--keep", "0.5", "--include", "mlp")
    share = next(float(line.rstrip(" │|").split()[-1].rstrip("%")) for line in printed.splitlines() if "(keep)" in line)
    assert 40 < share <= 50
    assert "numbers in all linears" in printed
    status, printed = run("inspect", place / "model", "--keep", "0.5", "--layout", "round")
    assert status == 2
    assert "layout 'round' is none of plain, pivoted" in printed
    status, printed = compress(run, place, tmp_path / "out", "--plan", tmp_path / "pivoted.json", "--layout", "plain")
    assert status == 2
    assert "leave out layout: what is in plan decides that" in printed


def stop(*_args: object, **_options: object) -> None:
    raise OSError("no space left on device")


def test_run_goes_on_where_it_was(run: Run, place: Path, tmp_path: Path) -> None:
    recipe = {
        "model": str(place / "model"),
        "method": "sfsd",
        "keep": 0.6,
        "calibration": {"corpus": str(place / "train.txt"), "samples": 8, "length": 16},
        "evaluate": [{"task": f"perplexity:{place / 'test.txt'}", "length": 16}],
    }
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    arguments = ("run", tmp_path / "r.yaml", "--out", tmp_path / "run", "--no-cache")
    status, printed = run(*arguments)
    assert status == 0, printed
    folder = tmp_path / "run"
    assert {file.name for file in folder.iterdir()} == {
        "recipe.yaml",
        "inputs.json",
        "made.yaml",
        "environment.json",
        "evals",
        "model",
    }
    assert "perplexity" in (folder / "model/README.md").read_text()
    weights = folder / "model/model.safetensors"
    before = weights.stat().st_mtime_ns
    (after,) = [file for file in (folder / "evals").iterdir() if "dense" not in file.name]
    first = after.read_text()
    after.unlink()
    assert run(*arguments)[0] == 0
    assert weights.stat().st_mtime_ns == before, "the model was made again"
    assert after.read_text() == first
    recipe["keep"] = 0.5
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    status, printed = run(*arguments)
    assert status == 2
    assert "something else" in printed
    assert weights.stat().st_mtime_ns == before
    # Stopped while the old model is being replaced: it stays, and is not taken for the new one afterwards.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("eckart.runs.experiment.make_checkpoint", stop)
        assert run(*arguments, "--force")[0] == 2
    assert weights.stat().st_mtime_ns == before
    assert run(*arguments)[0] == 0
    assert weights.stat().st_mtime_ns != before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "nsvdi"], "did you mean 'nsvd-i'"),
        (["--keep", "7"], "less than or equal to 1"),
        (["--method", "bets"], "did you mean 'best'"),
        (["--option", "share"], "not NAME=VALUE"),
        (["--option", "shrink_in=much"], "not a number"),
        (["--option", "bias=perhaps"], "neither true nor false"),
        (["--option", "alpha=1"], "no setting 'alpha'"),
        (["--keep-total", "0.5"], "give exactly one of keep, keep_total, max_bytes, speed, rules, plan"),
        (["--allocation", "glbal"], "'global'"),
        (["--allocation", "per-role"], "shares, such as {mlp: 2, attention: 1}"),
        (["--allocation", "surgical"], "surgical needs score"),
        (["--layout", "round"], "layout: Input should be 'plain' or 'pivoted'"),
        (["--order", "backwards"], "'anchored'"),
        (["--include", "q_prj"], "'q_prj' matches no site"),
        (["--blocks", "last 99"], "this model has 3 blocks"),
        (["--calibration", "nowhere.txt"], "no corpus 'nowhere.txt'"),
        (["--samples", "9999"], "windows of 16"),
        (["--length", "4096"], "4096"),
        (["--dtype", "int3"], "dtype"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(
    run: Run, place: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    status, printed = compress(run, place, tmp_path / "out", "--keep", "0.5", *arguments)
    assert status == 2, printed
    assert message in printed
    assert "Traceback" not in printed
    assert printed.count("error:") == 1
    assert list(tmp_path.iterdir()) == []


def test_an_existing_checkpoint_is_not_touched(run: Run, place: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    status, printed = compress(run, place, out, "--method", "svd", "--keep", "0.5")
    assert status == 2
    assert "--force" in printed
    assert [file.name for file in out.iterdir()] == ["precious.txt"]
    status, printed = compress(run, place, out, "--method", "svd", "--keep", "0.5", "--force")
    assert status == 2
    assert "holds precious.txt, which is no part of a checkpoint" in printed
    (out / "precious.txt").unlink()
    for _ in range(2):
        assert compress(run, place, out, "--method", "svd", "--keep", "0.5", "--force")[0] == 0
        assert (out / "config.json").is_file()


def test_a_model_that_is_not_there(run: Run, tmp_path: Path) -> None:
    status, printed = run("eval", tmp_path / "none", "--task", "perplexity:builtin/code")
    assert status == 2
    assert "cannot load" in printed
    status, printed = run("eval", tmp_path / "none", "--task", "perplexty:builtin/code")
    assert status == 2
    assert "did you mean 'perplexity'" in printed


def test_methods_and_help_teach(run: Run) -> None:
    status, printed = run("methods")
    assert status == 0
    assert "nid-ii" in printed
    assert "best" in printed
    status, printed = run("methods", "fwsvd")
    assert "2207.00112" in printed
    status, printed = run("methods", "best")
    assert status == 0
    for told in ("kfac", "Ranks: global, layout: pivoted, order: anchored", "docs/ablation.md", "shrink_in=0.1"):
        assert told in printed, told
    status, printed = run("methods", "bets")
    assert status == 2
    assert "did you mean 'best'" in printed
    status, printed = run("--help")
    assert all(command in printed for command in ("demo", "compress", "eval", "inspect", "export", "methods", "run"))


def study_of(place: Path, columns: int) -> dict[str, object]:
    """A study of one run, read at several lengths for as many columns."""
    tasks = [{"task": f"perplexity:{place / 'test.txt'}", "length": 16}]
    return {
        "title": "Table 9",
        "base": {"model": "nowhere", "calibration": {"corpus": str(place / "train.txt"), "samples": 8, "length": 16}},
        "columns": [f"perplexity:{place / 'test.txt'}#{name}" for name in ["perplexity", *["n"] * (columns - 1)]],
        "runs": [{"method": "svd", "keep": 0.5, "evaluate": tasks, "published": [7.0, *[None] * (columns - 1)]}],
    }


@pytest.mark.parametrize("columns", [2, 12])
def test_a_study_is_reproduced_and_reported(run: Run, place: Path, tmp_path: Path, columns: int) -> None:
    (tmp_path / "nine.yaml").write_text(yaml.safe_dump(study_of(place, columns)))
    arguments = ("reproduce", tmp_path / "nine.yaml", "--set", f"model={place / 'model'}", "--out", tmp_path / "out")
    status, printed = run(*arguments)
    assert status == 0, printed
    assert "ours - paper" in printed
    table = json.loads((tmp_path / "out/study.json").read_text())
    (line,) = [row for row in table["rows"] if row["run"]]
    assert line["difference"][0] == pytest.approx(line["ours"][0] - 7.0)
    assert f"{line['ours'][0]:.4g}" in printed
    assert (tmp_path / "out/report.html").is_file()
    assert run("report", tmp_path / "out", "--out", tmp_path / "out/report.html")[0] == 2
    assert run("report", tmp_path / "out", "--out", tmp_path / "page.html", "--title", "Mine")[0] == 0
    assert "<title>Mine</title>" in (tmp_path / "page.html").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nsvd-table-9"], "did you mean 'nsvd-table-"),
        (["nsvd-table-1", "--scale", "medium"], "no scale 'medium' in this study; it has paper, small, builtin"),
        (["nsvd-table-1", "--set", "keep"], "'keep' is not KEY=VALUE"),
        (["nsvd-table-1", "--set", "kep=0.5"], "unknown key 'kep'; did you mean 'keep'?"),
        (["nsvd-table-1", "--set", "keep=[0.5"], "is not YAML"),
    ],
)
def test_a_study_that_cannot_be_run_is_one_line(run: Run, tmp_path: Path, arguments: list[str], message: str) -> None:
    status, printed = run("reproduce", *arguments, "--out", tmp_path / "out")
    assert status == 2
    assert message in printed
    assert printed.count("error:") == 1
    assert not (tmp_path / "out").exists()


def test_a_study_without_any_number_is_no_success(run: Run, place: Path, tmp_path: Path) -> None:
    study = study_of(place, 2)
    missing = [f"perplexity:{tmp_path / 'nothing.txt'}#{name}" for name in ("perplexity", "n")]
    study |= {"columns": missing, "runs": [{**study["runs"][0], "evaluate": [missing[0].partition("#")[0]]}]}
    (tmp_path / "nine.yaml").write_text(yaml.safe_dump(study))
    arguments = ("reproduce", tmp_path / "nine.yaml", "--set", f"model={place / 'model'}", "--out", tmp_path / "out")
    status, printed = run(*arguments)
    assert status == 2
    assert "nothing was measured, for the reasons above" in printed
    assert "there is no such file" in printed


def test_what_there_is_can_be_listed(run: Run) -> None:
    status, printed = run("evaluations")
    assert status == 0
    assert all(name in printed for name in ("stereoset", "lm-eval:TASK", "cmrc2018", "truthfulqa_mc2"))
    status, printed = run("reproduce")
    assert status == 0
    assert "sfsd-figure-3" in printed
    status, printed = run("methods", "llm-pruner")
    assert status == 0
    assert "2305.11627" in printed
    status, printed = run("compress", "nowhere", "out", "--method", "llm-pruner", "--keep", "0.7")
    assert status == 2
    assert "makes no checkpoint" in printed


def test_a_text_far_from_the_calibration_has_a_warning(
    run: Run, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calibration text is the checkpoint's own, or a named one."""
    (tmp_path / "near.txt").write_text("w1 w2 w3 w4 w5 " * 200)
    text = ("--calibration", tmp_path / "near.txt", "--samples", "8", "--length", "16")
    status, printed = run("compress", place / "model", tmp_path / "small", *text, "--method", "asvd-i", "--keep", "0.5")
    assert status == 0, printed
    tasks = [f"distance:{file}" for file in (tmp_path / "near.txt", place / "test.txt")]
    arguments = ("eval", tmp_path / "small", "--task", tasks[0], "--task", tasks[1], "--out", tmp_path / "e")
    status, printed = run(*arguments)
    assert status == 2, printed
    assert "the dense model to compare with (--reference)" in printed

    status, printed = run(*arguments, "--reference", place / "model")
    assert status == 0, printed
    assert printed.count("is far from the text that the model was calibrated on") == 1
    assert f"+{place / 'test.txt'}'" in printed
    status, printed = run(*arguments, "--reference", place / "model")
    assert status == 0, printed
    assert "2 of 2 are there already" in printed
    assert printed.count("is far from") == 1

    (tmp_path / "near.txt").write_text("w1 w2 w3 w4 w5 w6 " * 200)
    status, printed = run(*arguments, "--reference", place / "model")
    assert status == 2
    assert "near.txt is changed" in printed
    named = ("--calibration", place / "test.txt", "--samples", "4", "--length", "16", "--reference", place / "model")
    (tmp_path / "near.txt").unlink()
    status, printed = run("eval", tmp_path / "small", "--task", tasks[1], "--reference", place / "model")
    assert status == 2
    assert "near.txt, and that cannot be had" in printed
    status, printed = run("eval", tmp_path / "small", "--task", tasks[1], *named)
    assert status == 0, printed
    assert "is far from" not in printed

    (tmp_path / "short.txt").write_text("w1 w2 w3")
    monkeypatch.setattr("eckart.cli.eval.calibration_errors", None)  # a pass over text that nothing would be read for
    short = ("--task", f"distance:{tmp_path / 'short.txt'}")
    status, printed = run("eval", tmp_path / "small", *short, *named)
    assert status == 2, printed
    assert "less than one window" in printed


def test_the_errors_of_blocks_need_the_dense_model(run: Run, place: Path, tmp_path: Path) -> None:
    status, printed = compress(run, place, tmp_path / "small", "--method", "svd", "--keep", "0.6")
    assert status == 0, printed
    task = f"accumulation:{place / 'test.txt'}"
    arguments = ("eval", tmp_path / "small", "--task", task, "--out", tmp_path / "e", "--length", "16", "--limit", "3")
    status, printed = run(*arguments)
    assert status == 2
    assert "needs the dense model to compare with (--reference)" in printed
    status, printed = run(*arguments, "--reference", place / "model")
    assert status == 0, printed
    assert "inherited.3" in printed
    (file,) = (tmp_path / "e").glob("*.json")
    result = EvalResult.from_json(file.read_text())
    assert result.read("own.1") == result.read("error.1") > 0
    assert result.read("inherited.-1") > 0
