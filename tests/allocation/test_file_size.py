"""Weight files: their size is known before they are written, and a budget of bytes is kept."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from eckart.allocation import ALLOCATIONS, Budget, RankPlan, plan, weight_bytes
from eckart.calibration.moments import calibrate
from eckart.compression.replace import compress
from eckart.lowrank import LAYOUTS, Layout, build_method
from eckart.models.families import FAMILIES
from eckart.models.sites import find_sites
from eckart.models.units import units_of
from tiny import DEFAULT_CONFIGS, FAMILY_CONFIGS, tiny_model, tiny_tokens

from .curves import curve

# With linears that read one tensor, and without.
GROUPED = sorted(
    name for name in FAMILY_CONFIGS if any(len(one) > 1 for of in FAMILIES[name].parts.values() for one in of)
)
ALL = sorted({*FAMILY_CONFIGS, *DEFAULT_CONFIGS})
OPTIONS: Mapping[str, dict[str, Any]] = {"per-role": {"shares": {"mlp": 2.0}}, "global": {"exact": True}}


def written(model: PreTrainedModel, folder: Path, **options: Any) -> int:
    model.save_pretrained(folder, **options)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def groups(model: PreTrainedModel) -> set[str]:
    """Input groups of several linears, but for those of one block."""
    found = [site.input_group for site in find_sites(model)]
    return {group for group in found if found.count(group) > 1 and ".1." not in group}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("model_type", "joint"), [*((name, False) for name in ALL), *((name, True) for name in GROUPED)]
)
def test_the_files_are_as_large_as_foretold(model_type: str, layout: Layout, joint: bool, tmp_path: Path) -> None:
    """To the byte, in a type whose orders of pivots are wider, and where the file's order of tensors shows."""
    model = tiny_model(model_type, dtype=torch.bfloat16)
    assert bool(groups(model)) == (model_type in GROUPED)
    sites = find_sites(model)
    assert written(model, tmp_path / "dense") == weight_bytes(model, RankPlan(sites, {}))
    made = plan(model, 0.6, layout=layout, joint=groups(model) if joint else (), exclude=sites[-1].role)
    foretold = weight_bytes(model, made)
    compress(model, "svd", made)
    real = written(model, tmp_path / "low-rank")
    if joint and layout == "pivoted":  # which linear's rows are the pivots shows only in the factors
        assert real <= foretold <= real + 8 * len(sites)
    else:
        assert foretold == real


@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_added_biases_and_shards_are_counted(model_type: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    made = plan(model, 0.5, layout="pivoted")
    foretold = weight_bytes(model, made, bias=True, shard=20_000)
    compress(model, "sfsd", made, calibrate(model, tiny_tokens(), build_method("sfsd")))
    assert written(model, tmp_path, max_shard_size=20_000) == foretold
    assert len(list(tmp_path.glob("*.safetensors"))) > 3


def test_sizes_need_no_weights(tmp_path: Path) -> None:
    """A model on the meta device is as large as one in memory."""
    real = tiny_model("gemma2")
    with torch.device("meta"):
        empty = type(real)(real.config)
    for keep in (0.5, 1):
        assert weight_bytes(empty, plan(empty, keep)) == weight_bytes(real, plan(real, keep))


def test_a_type_that_files_here_never_have_is_refused() -> None:
    model = tiny_model("llama")
    model.register_buffer("strange", torch.zeros(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"strange is of type torch\.complex64"):
        weight_bytes(model, plan(model, 0.5))


@pytest.mark.parametrize("name", [name for name, row in ALLOCATIONS.items() if row.needs != "trials"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model_type", ["llama", "bert", "gpt_neox"])
def test_no_allocation_writes_more_than_the_budget(model_type: str, layout: Layout, name: str, tmp_path: Path) -> None:
    model = tiny_model(model_type)
    sites, joint = find_sites(model), groups(model)
    units = units_of(sites, joint)
    curves = [curve(unit.sites, seed) for seed, unit in enumerate(units)]
    dense = weight_bytes(model, RankPlan(sites, {}))
    sizes = []
    for max_bytes in (int(0.7 * dense), dense - 1, dense):
        numbers = Budget(max_bytes=max_bytes).numbers(model, sites, layout=layout, joint=joint)
        made = ALLOCATIONS[name].allocate(sites, curves, numbers, layout=layout, **OPTIONS.get(name, {}))
        sizes.append(weight_bytes(model, made))
        assert sizes[-1] <= max_bytes
        if max_bytes == int(0.7 * dense):
            spent = made
    assert sizes[-1] == dense
    compress(model, "svd", spent)
    assert written(model, tmp_path) <= int(0.7 * dense)


def test_a_budget_of_bytes_is_spent(tmp_path: Path) -> None:
    """What is held back for headers is small beside the weights, even of a small model."""
    model = tiny_model("llama", hidden_size=128, intermediate_size=256, head_dim=32)
    dense = weight_bytes(model, RankPlan(find_sites(model), {}))
    for layout in LAYOUTS:
        made = plan(model, max_bytes=int(0.8 * dense), layout=layout)
        assert 0.78 * dense < weight_bytes(model, made) <= 0.8 * dense


def test_added_biases_are_within_the_budget(tmp_path: Path) -> None:
    model = tiny_model("llama")
    made = plan(model, max_bytes=90_000, bias=True)
    compress(model, "sfsd", made, calibrate(model, tiny_tokens(), build_method("sfsd")))
    assert written(model, tmp_path) <= 90_000
