"""Names: what a file or a folder is called after a text, so that two texts do not share one."""

from __future__ import annotations

import hashlib
import re

# Of characters: room is left for what is added to a name, and file systems end at 255 bytes.
LONGEST = 150


def dashed(text: str) -> str:
    """The text with a dash in place of what some file system does not take; others may become the same."""
    return re.sub(r"[^A-Za-z0-9_.=-]+", "-", text).strip("-.")


def dashed_apart(text: str) -> str:
    """The same, not longer than LONGEST, with a digest of the text: what no other text becomes."""
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:8]
    name = dashed(text)[: LONGEST - len(digest) - 1]
    return f"{name}-{digest}" if name else digest
