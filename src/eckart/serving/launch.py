"""Launch: another Python program in this process, which has imported eckart, so that it loads compressed checkpoints.

transformers looks for no plug-ins by itself: what reads a checkpoint has to be imported in the process that loads it.
"""

from __future__ import annotations

import io
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

# Its sitecustomize.py is what Python imports when a process starts that has this folder in PYTHONPATH.
CHILDREN = Path(__file__).with_name("children")
PYTHON = re.compile(r"python[\d.]*(\.exe)?")
ARCHIVES = (".zip", ".pyz")
USAGE = "a program that is installed, such as lm_eval; python SCRIPT.py, -m MODULE or -c CODE; or SCRIPT.py"


@dataclass(frozen=True)
class Program:
    """A program that is ready to run.

    Attributes:
        argv: as it finds it in sys.argv.
        place: as it finds it in sys.path[0]; None leaves what is there.
        start: runs it, and ends as it does: by returning, by SystemExit, or by what it raises.
    """

    argv: tuple[str, ...]
    place: str | None
    start: Callable[[], object]

    def __call__(self) -> None:
        """Run it in this process, with its own arguments, path and exit status.

        Processes that it starts import eckart too, see `carry_to_children`.

        Raises:
            SystemExit: it ended with a status, which of an installed program is what its function returns.
        """
        sys.argv[:] = self.argv
        _put_first(self.place)
        carry_to_children()
        self.start()


def find_program(words: Sequence[str]) -> Program:
    """The program that a command line names, without running any of it.

    Args:
        words: the program, and its arguments as they are. A program is the name of one that is installed with this
            Python; `python` with a script, -m or -c; these without `python`; a script; or what `python` takes for one,
            a folder or an archive with a __main__.py.

    Raises:
        ValueError: there is none, or it is no program of this Python.
    """
    if not words:
        raise ValueError(f"say what to run: {USAGE}")
    first, *others = words
    if PYTHON.fullmatch(Path(first).name):
        _check_this_python(first)
        if not others:
            raise ValueError(f"{first} alone reads commands from the keyboard: give {USAGE}")
        first, *others = others
        if first.startswith("-") and first not in ("-m", "-c"):
            raise ValueError(
                f"python {first}: this Python runs already and takes no more options: leave it out, or set the "
                "environment variable that stands for it, as PYTHONUNBUFFERED=1 for -u"
            )
        return _of_python(first, others)
    return _of_python(first, others) if first in ("-m", "-c") or first.endswith(".py") else _installed(first, others)


def carry_to_children() -> None:
    """Let processes that this one starts import eckart first, if they are of Python and are given its environment.

    Python imports a sitecustomize that it finds in PYTHONPATH, unless it is started with -E, -I or -S.
    """
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    others = [path for path in paths if path and path != str(CHILDREN)]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(CHILDREN), *others])


def _of_python(first: str, others: list[str]) -> Program:
    """What `python FIRST OTHERS` runs."""
    if first in ("-m", "-c"):
        if not others:
            raise ValueError(f"{first} needs {'the name of a module' if first == '-m' else 'code'}")
        return (_module if first == "-m" else _code)(*others)
    path = Path(first)
    if not path.exists():
        raise ValueError(f"no script at {first}")
    is_folder = path.is_dir()
    if is_folder and not (path / "__main__.py").is_file():
        raise ValueError(f"{first} is a folder without a __main__.py: name the script in it")
    if is_folder or path.suffix in ARCHIVES:  # of which runpy makes a place for imports
        return Program((first, *others), None, lambda: runpy.run_path(first, run_name="__main__"))
    return _script(path, (first, *others))


def _module(name: str, *others: str) -> Program:
    here = os.getcwd()
    _put_first(here)
    top = name.partition(".")[0]
    if find_spec(top) is None:  # of a module in it the package would have to be imported
        raise ValueError(f"no module {top} to run: is it installed with {sys.executable}?")
    return Program(("-m", *others), here, lambda: runpy.run_module(name, run_name="__main__", alter_sys=True))


def _code(code: str, *others: str) -> Program:
    return Program(("-c", *others), "", lambda: _run_main(code, "<string>"))


def _script(path: Path, argv: tuple[str, ...]) -> Program:
    def start() -> None:
        with io.open_code(str(path)) as file:
            _run_main(file.read(), str(path.absolute()))

    return Program(argv, str(path.resolve().parent), start)


def _run_main(code: str | bytes, file: str) -> None:
    """Run code as the module __main__, which it stays: what ends after the code, as threads do, finds it there."""
    main = sys.modules["__main__"] = ModuleType("__main__")
    if isinstance(code, bytes):
        main.__file__ = file
    exec(compile(code, file, "exec"), main.__dict__)


def _installed(name: str, others: list[str]) -> Program:
    """The program of this name of the environment's, or the script at this path or on PATH."""
    programs = Path(sys.executable).parent
    file = shutil.which(name, path=os.pathsep.join([str(programs), os.environ.get("PATH", os.defpath)]))
    entries = () if os.sep in name else tuple(entry_points(group="console_scripts", name=name))
    if entries:
        argv = (file or str(programs / name), *others)
        return Program(argv, str(Path(argv[0]).parent), lambda: sys.exit(entries[0].load()()))
    if file is None:
        raise ValueError(f"no program {name}: give {USAGE}")
    _check_script(name, Path(file))
    return _script(Path(file), (file, *others))


def _put_first(place: str | None) -> None:
    """Make a folder the first place for imports, as Python does with that of a script; not where it was told not to."""
    if place is not None and not sys.flags.safe_path:
        sys.path[0] = place


def _check_this_python(name: str) -> None:
    """Raises ValueError for the path of another Python than this one, which has other packages."""
    if os.sep in name and Path(os.path.abspath(name)).parent != Path(os.path.abspath(sys.executable)).parent:
        raise ValueError(f"{name} is not the Python that eckart runs in, {sys.executable}: install eckart there")


def _check_script(name: str, file: Path) -> None:
    """Raises ValueError for a file that is no script of this Python."""
    with file.open("rb") as opened:
        line = opened.readline(512)
    words = line[2:].decode(errors="replace").split() if line.startswith(b"#!") else []
    by_name = len(words) > 1 and Path(words[0]).name == "env"
    interpreter = words[-1] if by_name else words[0] if words else ""
    if not PYTHON.fullmatch(Path(interpreter).name):
        raise ValueError(f"{name} ({file}) is no Python program, and only those run in eckart's process")
    _check_this_python(interpreter)
