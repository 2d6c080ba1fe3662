"""docs/tutorial.ipynb run from top to bottom, with its outputs written into it.

    python tools/tutorial.py             # rewrites docs/tutorial.ipynb

Cost: about a minute on two cores.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parents[1] / "docs" / "tutorial.ipynb"


def run_tutorial() -> nbformat.NotebookNode:
    """The notebook with fresh outputs. Raises CellExecutionError where a cell fails, with its traceback."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", record_timing=False).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            # Progress bars and warnings of the machine go to stderr.
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def main() -> None:
    nbformat.write(run_tutorial(), NOTEBOOK)
    print(f"wrote {NOTEBOOK}")


if __name__ == "__main__":
    main()
