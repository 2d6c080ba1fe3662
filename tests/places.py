"""Where tests find what is not part of the project."""

from pathlib import Path

# Text and trained models of the developers' machines; a user has none of it, and such tests skip.
SHARED = Path(__file__).parents[2] / "shared"
