"""The shares kept in compression.json against the sizes in it and the numbers in the files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eckart.reports.site_facts import SiteFacts
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.out_of_core import compress_out_of_core

from .from_files import BATCHED, facts_of, recipe_of, tensors_of

pytestmark = pytest.mark.usefixtures("any_tokenizer")

WAYS: list[dict[str, Any]] = [
    {},
    {"layout": "pivoted"},
    {"joint": True},
    {"joint": True, "layout": "pivoted"},
    {"sites": {"include": ["mlp"]}},
    {"bits": 8, "group": 16},
    {"method": "kfac", "allocation": "global", "bits": "auto", "keep": None, "max_bytes": 80_000, "group": 16},
]


@pytest.mark.parametrize("make", [make_checkpoint, compress_out_of_core])
@pytest.mark.parametrize("keys", WAYS, ids=str)
def test_what_the_linears_keep_is_what_the_files_hold(
    place: Path, tmp_path: Path, make: Any, keys: dict[str, Any]
) -> None:
    """Of numbers in few bits it is their bytes; every share of this model's type is one of bytes as well."""
    make(recipe_of(place, **keys), tmp_path / "out", BATCHED)
    facts = facts_of(tmp_path / "out")
    assert bool(facts["joint"]) == keys.get("joint", False)
    sites = [SiteFacts.of(name, item, facts) for name, item in facts["sites"].items()]
    sizes = [site.shape[0] * site.shape[1] for site in sites]
    stored = sum(size * site.kept for size, site in zip(sizes, sites, strict=True) if site.kept is not None)
    if "bits" not in keys:
        assert stored / sum(sizes) == pytest.approx(facts["keep_of_linears"], rel=1e-6)
    tensors = {name: tensor for name, tensor in tensors_of(tmp_path / "out").items() if "bias" not in name}
    held = sum(
        tensor.nbytes
        for name, tensor in tensors.items()
        if any(name.startswith(f"{site.name}.") for site in sites) and "order" not in name
    )
    assert 4 * stored == pytest.approx(held, rel=1e-6)
    assert {"rank", "kept"} <= set.intersection(*(set(item) for item in facts["sites"].values()))
