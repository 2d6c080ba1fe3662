"""The documents: lines that fit, links and paths that lead somewhere, pages made from the code that are not stale."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "eckart"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
WIDEST = 120
README_WORDS = 1200


def tracked(*patterns: str) -> list[Path]:
    """Files of the repository, with those that are new and not ignored."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *patterns]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return [ROOT / name for name in names if (ROOT / name).is_file()]


def name_of(file: Path) -> str:
    return str(file.relative_to(ROOT))


def test_no_line_is_too_wide() -> None:
    files = tracked("*.md", "*.py") if (ROOT / ".git").exists() else [*DOCUMENTS, *PACKAGE.rglob("*.py")]
    assert len(files) > 100
    wide = [
        f"{name_of(file)}:{number}"
        for file in files
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if len(line) > WIDEST
    ]
    assert not wide


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= README_WORDS


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d.name != "decisions.md"], ids=name_of)
def test_files_that_are_named_exist(document: Path) -> None:
    """A path in code quotes with a folder in it is of the repository, or of the package."""
    for name in re.findall(r"`([a-z_.]+(?:/[\w.-]+)+\.(?:py|ipynb))`", document.read_text(encoding="utf-8")):
        assert (ROOT / name).is_file() or (PACKAGE / name).is_file(), name


def test_every_document_has_its_line_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {file.name for file in (ROOT / "docs").iterdir() if file.suffix in {".md", ".ipynb"}} - {"index.md"}
    assert pages == set(re.findall(r"\]\(([\w-]+\.(?:md|ipynb))\)", index))
