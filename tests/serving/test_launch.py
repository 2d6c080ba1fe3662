"""`eckart exec`: a program that never imports eckart runs as it does by itself, and loads compressed checkpoints."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import eckart
from eckart.serving.launch import find_program
from tiny import Run, logits_of, tiny_model, tiny_text, tiny_tokenizer, tiny_tokens

MAIN = "from eckart.cli import main; main()"
# Says what a program can see of how it was started; a helper in its own folder is imported.
SCRIPT = """
import atexit, json, os, pickle, signal, sys
import own_helper

class Own: ...

assert type(pickle.loads(pickle.dumps(Own()))) is Own
assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
seen = {"argv": sys.argv, "place": sys.path[0], "name": __name__, "file": globals().get("__file__")}
with open(os.environ["SEEN"], "w") as file:
    json.dump({**seen, "eckart": "eckart" in sys.modules}, file)
atexit.register(lambda: print("at exit", hasattr(sys.modules["__main__"], "Own")))
if "raise" in sys.argv:
    raise RuntimeError("of its own")
if "interrupt" in sys.argv:
    os.kill(os.getpid(), signal.SIGINT)
if "exit" in sys.argv:
    sys.exit(7)
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a script, a module of the same text, and what they import."""
    (tmp_path / "scripts").mkdir()
    (tmp_path / "module").mkdir()
    (tmp_path / "script.py").write_text("raise SystemExit('a script in the wrong folder')")
    for file in ("scripts/script.py", "module/__main__.py"):
        (tmp_path / file).write_text(SCRIPT)
    for file in ("scripts/own_helper.py", "own_helper.py", "module/__init__.py"):
        (tmp_path / file).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SEEN", str(tmp_path / "seen.json"))
    return tmp_path


def _with_interrupts() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start(before: list[str], words: list[str], place: Path) -> tuple[int, dict[str, Any], str]:
    """Status, what the program saw, and all it printed, of a new process."""
    command = [sys.executable, *before, *words]
    # A shell has what it starts in the background ignore interrupts, and with it all that these tests start.
    done = subprocess.run(command, capture_output=True, text=True, check=False, preexec_fn=_with_interrupts)
    seen = json.loads((place / "seen.json").read_text()) if (place / "seen.json").is_file() else {}
    return done.returncode, seen, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("given", "by_python"),
    [
        (["scripts/script.py", "exit", "--help", "--", "--version"], None),
        (["python", "scripts/script.py", "raise"], ["scripts/script.py", "raise"]),
        (["--", "python", "-m", "module", "interrupt"], ["-m", "module", "interrupt"]),
        (["-m", "module", "--dtype", "x"], None),
        (["--", "-c", SCRIPT, "exit"], ["-c", SCRIPT, "exit"]),
    ],
    ids=["script", "raises", "interrupted", "module", "code"],
)
def test_it_runs_as_it_does_by_itself(place: Path, given: list[str], by_python: list[str] | None) -> None:
    status, seen, printed = start([], by_python or given, place)
    ours = start(["-c", MAIN, "exec"], given, place)
    assert ours[0] == status
    assert ours[1].pop("eckart")
    assert not seen.pop("eckart")
    assert ours[1] == seen
    last, expected = ours[2].splitlines()[-2:], printed.splitlines()[-2:]
    if "-m" in given:  # runpy puts the __main__ before back when a module is through
        last, expected = last[:-1], expected[:-1]
    assert last == expected


def test_an_installed_program_is_called_as_its_script_calls_it(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "own-1.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: own\nVersion: 1\n")
    (folder / "entry_points.txt").write_text("[console_scripts]\nown-program = own_helper:run\n")
    (tmp_path / "own_helper.py").write_text("import sys\ndef run(): print(sys.argv); return 'why it failed'\n")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    status, _, printed = start(["-c", MAIN, "exec"], ["own-program", "--help", "-m", "--", "x"], place)
    assert status == 1
    assert (
        printed == f"{[str(Path(sys.executable).parent / 'own-program'), '--help', '-m', '--', 'x']}\nwhy it failed\n"
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "say what to run"),
        (["no-such-program", "x"], "no program no-such-program: give a program that is installed"),
        (["--no-such-option"], "no program --no-such-option"),
        (["none.py"], "no script at none.py"),
        (["python"], "python alone reads commands from the keyboard"),
        (["python", "scripts"], "scripts is a folder without a __main__.py"),
        (["python", "-u", "script.py"], "python -u: this Python runs already .* PYTHONUNBUFFERED=1"),
        (["python3", "-m"], "-m needs the name of a module"),
        (["/opt/other/bin/python", "script.py"], "is not the Python that eckart runs in"),
        (["-m", "no_such_module"], "no module no_such_module to run"),
        (["ls"], "is no Python program"),
        (["./of-another"], "/opt/other/bin/python is not the Python that eckart runs in"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_what_is_no_program_is_one_line(place: Path, words: list[str], message: str) -> None:
    (place / "of-another").write_text("#!/opt/other/bin/python\n")
    (place / "of-another").chmod(0o755)
    with pytest.raises(ValueError, match=message):
        find_program(words)


def test_a_script_of_this_python_needs_no_ending(place: Path) -> None:
    for name, line in (("by-path", f"#!{sys.executable}"), ("by-name", "#!/usr/bin/env python3")):
        (place / name).write_text(f"{line}\n")
        (place / name).chmod(0o755)
        assert find_program([f"./{name}", "x"]).argv == (f"./{name}", "x")


def test_bad_input_is_told_as_of_every_command_and_the_help_is_ours(run: Run) -> None:
    assert run("exec", "none.py") == (2, "error: no script at none.py\n")
    status, printed = run("exec", "--help")
    assert status == 0
    assert "eckart exec -- lm_eval" in printed


# Checkpoints

LOADER = """
import json, sys
import torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    print(json.dumps(model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits.tolist()))
"""


@pytest.fixture(scope="module")
def compressed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """A checkpoint, and its model."""
    model, method = tiny_model("llama"), eckart.build_method("asvd-i")
    eckart.compress(model, method, eckart.plan(model, 0.5), eckart.calibrate(model, tiny_tokens(), method))
    return eckart.save(model, tmp_path_factory.mktemp("exec") / "OUT", tiny_tokenizer()), model


def test_a_script_of_transformers_alone_loads_a_compressed_checkpoint(
    compressed: tuple[Path, Any], tmp_path: Path
) -> None:
    out, model = compressed
    (tmp_path / "loader.py").write_text(LOADER)
    tokens = tiny_tokens(2, 12)
    words = [str(tmp_path / "loader.py"), str(out), json.dumps(tokens.ids.tolist())]
    done = subprocess.run([sys.executable, "-c", MAIN, "exec", *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    logits = torch.tensor(json.loads(done.stdout))
    torch.testing.assert_close(logits, logits_of(model, tokens), rtol=0, atol=1e-6)


@pytest.fixture
def untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a program that runs in this process changes is put back."""
    monkeypatch.setattr("sys.path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))


@pytest.mark.slow  # lm_eval describes the whole machine before it prints a number
def test_lm_eval_measures_a_compressed_checkpoint(
    run: Run,
    compressed: tuple[Path, Any],
    tmp_path: Path,
    index: None,
    untouched: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install 'eckart[tasks]'")
    out, model = compressed
    rows = [{"text": tiny_text(4, seed), "choices": ["w3 w4", "w5"], "answer": seed % 2} for seed in range(8)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    task = {
        "task": "own",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{text}}",
        "doc_to_target": "answer",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "tasks/own.yaml").write_text(json.dumps(task))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    what = ("--model", "hf", "--model_args", f"pretrained={out}", "--device", "cpu", "--batch_size", "2")
    tasks = ("--tasks", "own", "--include_path", tmp_path / "tasks", "--log_samples")
    status, printed = run("exec", "--", "lm_eval", *what, *tasks, "--output_path", tmp_path / "results")
    assert status == 0, printed
    (samples,) = (tmp_path / "results").rglob("samples_own_*.jsonl")
    answered = sorted(map(json.loads, samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    for row, sample in zip(rows, answered, strict=True):
        expected = [_likelihood(model, row["text"], choice) for choice in row["choices"]]
        assert [float(value) for value, _greedy in sample["filtered_resps"]] == pytest.approx(expected, rel=1e-4)


@torch.no_grad()
def _likelihood(model: Any, text: str, choice: str) -> float:
    """Of the words of a choice, in nats."""
    context, words = (tiny_tokenizer()(part)["input_ids"] for part in (text, choice))
    logits = model(input_ids=torch.tensor([context + words])).logits[0].log_softmax(-1)
    return sum(float(logits[len(context) + place - 1, word]) for place, word in enumerate(words))
