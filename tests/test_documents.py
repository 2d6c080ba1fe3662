"""The documents: lines that fit, links and paths that lead somewhere, pages made from the code that are not stale."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

import eckart

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


def tool(name: str) -> dict[str, Any]:
    """What is in a script of tools/."""
    return runpy.run_path(str(ROOT / "tools" / f"{name}.py"))


def test_the_page_of_the_recipe_is_not_stale() -> None:
    written = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert written == tool("recipe_page")["page"](), "run python tools/recipe_page.py"


def test_the_page_of_the_families_is_not_stale() -> None:
    written = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert written == tool("families_page")["page"](), "run python tools/families_page.py"


def test_a_cell_needs_a_test_that_is_there_and_names_a_family() -> None:
    families_in = tool("families_page")["families_in"]
    with pytest.raises(ValueError, match=r"test_cost\.py has no test_of_yesterday: enter the test's name of today"):
        families_in("evals/test_cost.py::test_of_yesterday")
    with pytest.raises(ValueError, match="no family of models is found in it"):
        families_in("evals/test_cost.py::clocked")
    assert families_in("models/test_dense.py::test_gpt2_gets_its_conv1d_back") == {"gpt2"}
    assert {"llama", "bloom"} <= families_in("evals/test_cost.py::COUNTED")


def test_a_key_without_a_description_is_refused() -> None:
    class Bare(BaseModel):
        """A section."""

        speed: int = 3

    with pytest.raises(ValueError, match="speed has no description"):
        tool("recipe_page")["section_text"]("bare", Bare)


def test_modules_in_the_changelog_are_there() -> None:
    rows = re.findall(r"^\| `[\w.]+` \| `([\w.]+)` \|$", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert len(rows) > 50
    for name in rows:
        place = PACKAGE.joinpath(*name.split("."))
        assert place.with_suffix(".py").is_file() or (place / "__init__.py").is_file(), name


@pytest.mark.slow
def test_the_tutorial_runs() -> None:
    notebook = tool("tutorial")["run_tutorial"]()
    printed = "".join(
        output.text
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if output.output_type == "stream"
    )
    by_hand = re.findall(r"(?:by hand|its entry): +([\d.]+)", printed)
    tails = re.findall(r"asvd-i(?:, tail|, measured|\)): +([\d.]+)", printed)
    assert len(by_hand) == 2
    assert len(set(by_hand)) == 1
    assert len(tails) == 3
    assert len(set(tails)) == 1
    assert "identical logits: True" in printed


@pytest.mark.slow
def test_the_reference_is_built(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tools" / "reference.py"), "--out", str(tmp_path)]
    subprocess.run(command, check=True, timeout=600)
    reference = (tmp_path / "eckart.html").read_text(encoding="utf-8")
    for name in eckart.__all__:
        assert f'id="{name}"' in reference, name
    assert (tmp_path / "eckart" / "lowrank" / "factors.html").is_file()
    assert 'href="methods.html' in (tmp_path / "index.html").read_text(encoding="utf-8")


def test_rooms_are_counted(tmp_path: Path) -> None:
    """A house of three rooms, two of which need each other, in place of the package."""
    files = {
        "__init__.py": "",
        "top.py": "import eckart.left, eckart.right",
        "left/__init__.py": "",
        "left/a.py": "from eckart.right import b",
        "right/__init__.py": "",
        "right/b.py": "def late():\n    import eckart.left.a",
        "low.py": "",
    }
    for name, text in files.items():
        (tmp_path / "eckart" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "eckart" / name).write_text(text)
    command = [sys.executable, str(ROOT / "tools" / "rooms.py"), str(tmp_path)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    assert "4 rooms on 2 floors, 4 arrows, 6 modules" in printed
    assert "1 circles of imports\n  eckart.left.a, eckart.right.b" in printed
