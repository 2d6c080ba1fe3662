"""The reference of the package by pdoc, and the documents next to it, as pages that need no network.

    python tools/reference.py --out build/docs

Names of the face that are imported when they are first used are looked up before, so that pdoc sees them.
"""

from __future__ import annotations

import argparse
import pkgutil
import shutil
import warnings
from pathlib import Path

import markdown2
import pdoc

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")), *(ROOT / "docs").glob("*.md"))
STYLE = """body { max-width: 62rem; margin: 2rem auto; padding: 0 1rem; font: 16px/1.5 sans-serif }
table { border-collapse: collapse } td, th { border: 1px solid #ccc; padding: 0.2rem 0.6rem }
pre, code { background: #f4f4f4 } pre { padding: 0.6rem; overflow: auto }"""
PAGE = '<!doctype html><meta charset="utf-8"><title>{title}</title><style>{style}</style>{body}\n'


def build(out: Path) -> None:
    """Write the pages: out/index.html is the index of the documents, out/eckart.html the reference."""
    import eckart

    for name in dir(eckart):
        vars(eckart).setdefault(name, getattr(eckart, name))
    pdoc.render.configure(docformat="google", show_source=False, search=False)
    out.mkdir(parents=True, exist_ok=True)
    # A package with __all__ hides its modules from pdoc, one without shows them: so all are named, some twice.
    modules = [module.name for module in pkgutil.walk_packages(eckart.__path__, "eckart.")]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*already been added")
        pdoc.pdoc("eckart", *modules, output_directory=out)
    (out / "docs").mkdir(exist_ok=True)
    shutil.copy(ROOT / "docs" / "demo.svg", out / "docs")
    for document in DOCUMENTS:
        (out / f"{document.stem}.html").write_text(_page(document), encoding="utf-8")


def _page(document: Path) -> str:
    """A document as HTML, with links to other documents that lead to their pages."""
    body = str(markdown2.markdown(document.read_text(encoding="utf-8"), extras=["tables", "fenced-code-blocks"]))
    for other in DOCUMENTS:
        for place in ("", "../", "docs/"):
            body = body.replace(f'href="{place}{other.name}', f'href="{other.stem}.html')
    return PAGE.format(title=document.stem, style=STYLE, body=body)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "docs")
    out = parser.parse_args().out
    build(out)
    print(f"wrote {out / 'index.html'} and {out / 'eckart.html'}")


if __name__ == "__main__":
    main()
