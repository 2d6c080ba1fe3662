"""The built-in corpus: two domains of text that every CPython (3.11 or later) already has on its disk.

`prose` is the language reference behind `help()` (pydoc's topics) and the standard library's docstrings;
`code` is the same modules' source without those docstrings. Files are read and parsed, never imported, so
asking for text runs none of it. Which modules are for training and which are held out is fixed by the lists
below; the text itself is that of the running interpreter, so it differs a little from one Python version to
the next.
"""

import ast
import inspect
import sysconfig
import tokenize
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

DOMAINS = ("prose", "code")
SPLITS = ("train", "heldout")


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# Only names found in every CPython from 3.11 to 3.14, in Debian's libpython3-stdlib too. A package means
# all its submodules, so a held-out package is unseen as a whole.
HELDOUT_MODULES = _names(
    """
    argparse calendar concurrent configparser csv fractions graphlib heapq json pathlib pprint queue sched
    shlex statistics tarfile textwrap wsgiref
    """
)
TRAIN_MODULES = _names(
    """
    __future__ _aix_support _collections_abc _compat_pickle _markupbase _osx_support _py_abc _pydecimal _pyio
    _sitebuiltins _strptime _threading_local _weakrefset abc ast asyncio base64 bdb bisect bz2 cProfile cmd
    code codecs codeop collections colorsys compileall contextlib copy copyreg ctypes curses dataclasses
    datetime dbm difflib dis doctest email enum filecmp fileinput fnmatch ftplib functools genericpath getopt
    getpass gettext glob gzip hashlib hmac html http imaplib importlib inspect io ipaddress keyword linecache
    locale logging lzma mailbox mimetypes modulefinder multiprocessing netrc ntpath numbers opcode operator
    optparse os pdb pickle pickletools pkgutil platform plistlib poplib posixpath profile pstats pty
    py_compile pyclbr pydoc quopri random re reprlib rlcompleter runpy secrets selectors shelve shutil signal
    site smtplib socket socketserver sqlite3 ssl stat string stringprep subprocess symtable sysconfig tabnanny
    tempfile threading timeit token tokenize tomllib trace traceback tracemalloc tty turtle types typing
    unittest urllib uuid venv warnings wave weakref webbrowser xml xmlrpc zipapp zipfile zipimport zoneinfo
    """
)
HELDOUT_TOPICS = frozenset(
    _names("calls comparisons execmodel formatstrings import naming string-methods typesmapping")
)

# A table of character names, 75 kB: neither prose nor code.
_LEFT_OUT = frozenset({"html/entities.py"})
_TEST_FOLDERS = frozenset({"test", "tests"})
_LEAST_FOUND = 0.9
# Shorter paragraphs ("Return None.") recur by chance; longer ones that recur are the same text twice.
_COPIED_PARAGRAPH = 80


@dataclass(frozen=True)
class _Source:
    """One source file, taken apart: its docstrings (one text) and its code (the rest)."""

    prose: str
    code: str


def builtin_texts(domain: str, split: str) -> list[str]:
    """The documents of one domain (`prose` or `code`) and one split (`train` or `heldout`).

    A document is one pydoc topic, one file's docstrings joined, or one file's source without docstrings. The
    order is fixed, and mixed by a hash of the documents' names, so that the first few are a fair sample. A
    paragraph of the held-out prose is removed wherever the training prose repeats it.

    Raises ValueError on another domain or split, RuntimeError where the standard library's sources are
    missing. The first call for `train` parses about 7 MB of Python (some seconds); later ones are answered
    from memory.
    """
    if domain not in DOMAINS:
        raise ValueError(f"no built-in domain {domain!r}: the domains are {', '.join(DOMAINS)}")
    if split not in SPLITS:
        raise ValueError(f"no built-in split {split!r}: the splits are {', '.join(SPLITS)}")
    return list(_texts(domain, split))


@cache
def _texts(domain: str, split: str) -> tuple[str, ...]:
    sources = _sources(split)
    if domain == "code":
        documents = {name: source.code for name, source in sources.items()}
    else:
        documents = {name: source.prose for name, source in sources.items()}
        documents |= _topics(split)
        if split == "train":
            copied = frozenset(p for text in _texts("prose", "heldout") for p in _long_paragraphs(text))
            documents = {name: _without_paragraphs(text, copied) for name, text in documents.items()}
    order = sorted(documents, key=lambda name: (zlib.crc32(name.encode()), name))
    return tuple(documents[name] for name in order if documents[name].strip())


@cache
def _sources(split: str) -> dict[str, _Source]:
    """Each source file of the split, by its path below the standard library."""
    root = _library()
    modules = HELDOUT_MODULES if split == "heldout" else TRAIN_MODULES
    files = {module: _module_files(root, module) for module in modules}
    missing = [module for module, paths in files.items() if not paths]
    if len(missing) > (1 - _LEAST_FOUND) * len(modules):
        raise RuntimeError(
            f"the standard library at {root} lacks the source of {', '.join(missing)}: the built-in corpus "
            "needs a full standard library with its .py files (on Debian and Ubuntu, install libpython3-stdlib)"
        )
    return {file.relative_to(root).as_posix(): _take_apart(file) for paths in files.values() for file in paths}


def _library() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _module_files(root: Path, module: str) -> list[Path]:
    """The module's files, its tests left out; none where this interpreter lacks it.

    Looked up by path, since `importlib.util.find_spec` runs the parent package of a submodule.
    """
    package = root / module
    if not (package / "__init__.py").is_file():
        file = root / f"{module}.py"
        return [file] if file.is_file() else []
    return [
        file
        for file in sorted(package.rglob("*.py"))
        if not _TEST_FOLDERS.intersection(file.relative_to(root).parts)
        and file.relative_to(root).as_posix() not in _LEFT_OUT
    ]


def _topics(split: str) -> dict[str, str]:
    """The pydoc topics of the split, read from the one assignment in `pydoc_data/topics.py`."""
    file = _library() / "pydoc_data" / "topics.py"
    if not file.is_file():
        raise RuntimeError(
            f"{file} is missing: the built-in corpus needs a full standard library (on Debian and Ubuntu, "
            "install libpython3-stdlib)"
        )
    assignments = [node for node in ast.parse(_read(file)).body if isinstance(node, ast.Assign)]
    topics: dict[str, str] = ast.literal_eval(assignments[0].value)
    return {f"topic {name}": text for name, text in topics.items() if (name in HELDOUT_TOPICS) == (split == "heldout")}


def _read(file: Path) -> str:
    with tokenize.open(file) as stream:  # honours the file's own coding line
        return stream.read()


def _take_apart(file: Path) -> _Source:
    source = _read(file)
    docstrings = list(_find_docstrings(ast.parse(source)))
    prose = "\n\n".join(inspect.cleandoc(text) for _, text, _ in docstrings)
    # ast counts columns in UTF-8 bytes, so the cutting is done on bytes.
    lines = source.encode().splitlines(keepends=True)
    for node, _, alone in reversed(docstrings):
        _cut(lines, node, alone)
    return _Source(prose=prose.strip() + "\n" if prose.strip() else "", code=b"".join(lines).decode())


def _find_docstrings(tree: ast.Module) -> Iterator[tuple[ast.Expr, str, bool]]:
    """Each docstring in order of place: its statement, its text, and whether its block holds nothing else."""
    docstrings: list[tuple[ast.Expr, str, bool]] = []
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body[:1]:
                case [ast.Expr(value=ast.Constant(value=str(text))) as statement]:
                    alone = len(node.body) == 1 and not isinstance(node, ast.Module)
                    docstrings.append((statement, text, alone))
        # Docstrings are only in blocks of statements: expressions, most of the tree, need no visit.
        for block in ("body", "orelse", "finalbody", "handlers", "cases"):
            children = getattr(node, block, None)
            if isinstance(children, list):
                pending.extend(children)
    yield from sorted(docstrings, key=lambda item: (item[0].lineno, item[0].col_offset))


def _cut(lines: list[bytes], node: ast.Expr, alone: bool) -> None:
    """Removes a docstring from its lines; `pass` takes its place where the code needs a statement there."""
    first, last = node.lineno - 1, (node.end_lineno or node.lineno) - 1
    before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
    shares_lines = bool(before.strip() or after.strip())
    lines[first : last + 1] = [before + b"pass" + after] if alone or shares_lines else []


def _long_paragraphs(text: str) -> Iterator[str]:
    """The text's longer paragraphs, with white space made even (copies are indented differently)."""
    for paragraph in text.split("\n\n"):
        even = " ".join(paragraph.split())
        if len(even) >= _COPIED_PARAGRAPH:
            yield even


def _without_paragraphs(text: str, removed: frozenset[str]) -> str:
    return "\n\n".join(p for p in text.split("\n\n") if " ".join(p.split()) not in removed)
