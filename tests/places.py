"""Where tests find what is not part of the project, or of the package."""

import sys
from pathlib import Path

import pytest

# Text and trained models of the developers' machines; a user has none of it, and such tests skip.
SHARED = Path(__file__).parents[2] / "shared"
# Benchmarks are scripts that import one another by name.
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))


def real_model(name: str) -> Path:
    """The checkpoint that benchmarks/real_models.py has made; skips the test where it has not."""
    from real_models import path_of

    try:
        return path_of(name)
    except FileNotFoundError as error:
        pytest.skip(str(error))
