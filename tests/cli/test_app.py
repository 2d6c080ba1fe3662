"""The application: its commands are the files that hold one, listed without importing them, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from eckart.cli import app
from eckart.cli.app import COMMANDS, first_line, load_command, outline_command
from eckart.cli.terminal import BARS, console
from tiny import Run


def test_every_file_with_a_command_is_listed() -> None:
    files = Path(app.__file__).parent.glob("*.py")
    assert {file.stem for file in files if "\ndef command(" in file.read_text()} == set(COMMANDS)
    assert len(set(COMMANDS)) == len(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_is_listed_as_it_says(name: str) -> None:
    command = load_command(name)
    assert command.name == name
    assert (command.help or "").splitlines()[0] == first_line(name)
    options = [parameter for parameter in command.params if parameter.name != "help"]
    assert all(getattr(option, "help", None) for option in options), name


@pytest.mark.parametrize("name", COMMANDS)
def test_what_completes_is_what_the_command_takes(name: str) -> None:
    """The options that are read from the text of a file are those of the command that it holds."""

    def forms(command: Any) -> list[tuple[object, ...]]:
        kinds = ("name", "opts", "secondary_opts", "param_type_name", "multiple", "nargs", "is_flag")
        return [tuple(getattr(parameter, kind, None) for kind in kinds) for parameter in command.params]

    assert forms(outline_command(name)) == forms(load_command(name))


def complete(words: str) -> list[str]:
    """What a shell is told for the last of some words, by a process that has to do it without torch."""
    code = (
        "import sys; sys.argv[0] = 'eckart'\n"
        "from eckart.cli import main\n"
        "try: main()\n"
        "finally: assert not {'torch', 'transformers', 'plotly'} & sys.modules.keys()"
    )
    asked = {"_ECKART_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **asked}, capture_output=True, text=True, check=False
    )
    assert not done.stderr
    return done.stdout.split()


def test_a_shell_completes_commands_and_their_options_at_once() -> None:
    assert complete("eckart co") == ["compress", "correct"]
    found = complete("eckart -q compress MODEL --keep 0.5 --out-of-core --re")
    assert sorted(found) == ["--refine", "--refit", "--remote-code", "--resume"]
    assert complete("eckart methods --js") == ["--json"]


def test_completion_is_installed_and_shown(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shellingham.detect_shell", lambda *_: ("bash", "/bin/bash"))
    monkeypatch.setenv("HOME", str(tmp_path))
    status, printed = run("--show-completion")
    assert status == 0
    assert "_ECKART_COMPLETE=complete_bash" in printed
    status, printed = run("--install-completion")
    assert status == 0
    assert "bash completion installed" in printed
    assert ".bash_completions" in (tmp_path / ".bashrc").read_text()


def test_quiet_leaves_errors(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in BARS:
        monkeypatch.setenv(name, "0")
    arguments = ("compress", "builtin", tmp_path / "out", "--method", "svd", "--keep", "0.5", "--no-cache")
    assert run("--quiet", *arguments) == (0, "")
    assert os.environ["TQDM_DISABLE"] == "1"
    status, printed = run("-q", *arguments)
    assert status == 2
    assert printed.startswith("error: ")
    assert "exists" in printed
    status, printed = run("methods")
    assert "asvd-i" in printed
    assert not console.quiet


def test_the_help_and_the_version(run: Run) -> None:
    status, printed = run("--help")
    assert status == 0
    assert all(first_line(name) in printed for name in COMMANDS)
    status, printed = run("--version")
    assert (status, printed) == (0, f"eckart {version('eckart')}\n")
    status, printed = run("compress", "--help")
    assert status == 0
    assert "eckart compress MODEL OUT --max-bytes" in printed
    status, printed = run("serach")
    assert status == 2
    assert "Did you mean 'search'" in printed


class Broken(ModuleType):
    """A file of a command that raises."""

    error: Exception

    def __getattr__(self, name: str) -> object:
        raise self.error


def test_what_ends_with_one_line_and_what_does_not(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from eckart.lowrank import DecompositionError

    broken = Broken("eckart.cli.demo")
    monkeypatch.setitem(sys.modules, "eckart.cli.demo", broken)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    broken.error = TypeError("not seen before")
    status, printed = run("demo")
    assert status == 1
    assert printed.startswith("error: TypeError, which eckart did not expect: not seen before.")
    for error in (ModuleNotFoundError("No module named 'torch'"), DecompositionError("4 x 4: no"), ValueError("[x]")):
        broken.error = error
        status, printed = run("demo")
        assert (status, printed) == (2, f"error: {error}\n")
    monkeypatch.setenv("ECKART_DEBUG", "1")
    broken.error = ValueError("told whole")
    with pytest.raises(ValueError, match="told whole"):
        run("demo")


def test_a_warning_is_a_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def warn() -> None:
        """Warn."""
        warnings.warn("the cache is damaged", stacklevel=1)

    command = ModuleType("eckart.cli.demo")
    command.command = warn  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "eckart.cli.demo", command)
    assert run("demo") == (0, "warning: the cache is damaged\n")
