"""CodedLinear: what it computes, what it stores, and the checkpoint that stock `from_pretrained` makes of it again."""

from __future__ import annotations

import copy
import json
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import eckart  # noqa: F401 (registers the checkpoint format)
from eckart.allocation import RankPlan, weight_bytes
from eckart.compression.replace import compress
from eckart.lowrank import build_method
from eckart.lowrank.codes import BITS, round_nearest
from eckart.lowrank.rounding import CodedFactors
from eckart.lowrank.storage import Storage
from eckart.models import coded as coded_module
from eckart.models.checkpoint import CheckpointError, LowRankConfig
from eckart.models.coded import KERNEL_PROCESSORS, ROWS_FOR_UNITS, CodedLinear, CodedMatrix
from eckart.models.dense import export_dense
from eckart.models.families import UnsupportedModelError
from eckart.models.linear import LowRankLinear
from eckart.models.loading import load_model, save
from eckart.models.sites import find_sites, low_rank_modules
from eckart.support.sizes import num_bytes, num_params
from tiny import DEFAULT_CONFIGS, ENCODERS, FAMILY_CONFIGS, HEADS, logits_of, relative, tiny_model

ALL = sorted({*FAMILY_CONFIGS, *DEFAULT_CONFIGS})
# One after the other for the linears of a model: every kind of place that a checkpoint has.
WAYS = (
    (None, Storage(4, None, 8)),
    (2, Storage(3, 4, 8)),
    (3, Storage(None, 8, 16)),
    (2, Storage(8, None, 16)),
    (4, Storage()),
    (None, Storage()),
)


def mixed(model: PreTrainedModel) -> RankPlan:
    sites = find_sites(model)
    ways = {site.name: WAYS[at % len(WAYS)] for at, site in enumerate(sites)}
    stored = {name: storage for name, (_, storage) in ways.items() if not storage.is_plain}
    return RankPlan(sites, {name: rank for name, (rank, _) in ways.items()}, stored=stored)


def coded(model: PreTrainedModel) -> PreTrainedModel:
    compress(model, build_method("svd"), mixed(model))
    return model


def head_of(model_type: str) -> Any:
    return HEADS["masked" if model_type in ENCODERS else "causal"]


@pytest.mark.parametrize("model_type", ALL)
def test_every_family_comes_back_to_the_last_bit(model_type: str, tmp_path: Path) -> None:
    """By stock from_pretrained, by load_model, and exported; the files are as large as the plan says."""
    model = tiny_model(model_type)
    plan = mixed(model)
    promised = weight_bytes(model, plan)
    coded(model)
    path = save(model, tmp_path / "out")
    assert sum(file.stat().st_size for file in path.glob("*.safetensors")) == promised
    section = json.loads((path / "config.json").read_text())["quantization_config"]
    assert section["format"] == 3
    changed = {name for name, storage in plan.stored.items()} | {n for n, rank in plan.ranks.items() if rank}
    assert section["sites"].keys() == changed
    for loaded in (head_of(model_type).from_pretrained(path), load_model(path)):
        ours, theirs = model.state_dict(), loaded.state_dict()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
        assert torch.equal(logits_of(loaded), logits_of(model))
    again = head_of(model_type).from_pretrained(save(loaded, tmp_path / "again"))
    assert torch.equal(logits_of(again), logits_of(model))
    assert relative(logits_of(export_dense(copy.deepcopy(model))), logits_of(model)) < 1e-5


def linear_of(storage: Storage, rank: int, dtype: torch.dtype = torch.float32) -> CodedLinear:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(20, 24, generator=random)
    left, right = torch.randn(20, rank, generator=random), torch.randn(rank, 24, generator=random)
    group, bits = storage.group, storage.factors
    base = None if storage.base is None else round_nearest(weight, storage.base, (1, group))
    sides = (
        (left, right)
        if bits is None
        else (round_nearest(left, bits, (group, 1)), round_nearest(right, bits, (1, group)))
    )
    factors = CodedFactors(storage, base, *(sides if rank else (None, None)))
    return CodedLinear.from_coded(factors, torch.randn(20, generator=random), device=torch.device("cpu"), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "storage"), [(rank or 0, storage) for rank, storage in WAYS[:4]], ids=str)
def test_it_computes_what_it_stores(rank: int, storage: Storage, dtype: torch.dtype) -> None:
    module = linear_of(storage, rank, dtype)
    x = torch.randn(3, 7, 24).to(dtype)
    assert module.bias is not None
    expected = x.float() @ module.dense().float().mT + module.bias.float()
    assert relative(module(x).float(), expected) < (1e-5 if dtype == torch.float32 else 2e-2)
    assert module(x).dtype == dtype
    assert module.weight.shape == (0,)
    assert torch.equal(pickle.loads(pickle.dumps(module))(x), module(x))
    assert str(storage.base or storage.factors) in repr(module)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block", [(1, 64), (1, 48), (64, 1)], ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(48, 64), (160, 192), (20, 100)], ids=str)
def test_products_of_a_matrix_in_codes(
    monkeypatch: pytest.MonkeyPatch, bits: int, block: tuple[int, int], shape: tuple[int, int], dtype: torch.dtype
) -> None:
    """By torch's kernel where it has one, some rows at a time, and at once: products of what it stands for."""
    random = torch.Generator().manual_seed(0)
    matrix = CodedMatrix.of(round_nearest(torch.randn(*shape, generator=random), bits, block))
    x = torch.randn(2, 5, shape[1], generator=random).to(dtype)
    expected = x.float() @ matrix.dense(torch.float32).mT
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for at_once in (2**19, 1000):
        monkeypatch.setattr(coded_module, "AT_ONCE", at_once)
        with torch.no_grad():
            assert relative(matrix(x).float(), expected) < tolerance
        assert relative(matrix(x.clone().requires_grad_()).float().detach(), expected) < tolerance


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in KERNEL_PROCESSORS, reason="torch has no kernel here")
@pytest.mark.parametrize("units", [True, False])
def test_prompts_are_multiplied_out_where_the_processor_has_units(monkeypatch: pytest.MonkeyPatch, units: bool) -> None:
    matrix, read = CodedMatrix.of(round_nearest(torch.randn(64, 64), 4, (1, 64))), []
    by_kernel = matrix._by_kernel

    def note(x: torch.Tensor) -> torch.Tensor:
        read.append(x.shape[:-1].numel())
        return by_kernel(x)

    monkeypatch.setattr(matrix, "_by_kernel", note)
    monkeypatch.setattr(coded_module, "has_units_for", lambda x: units)
    for rows in (1, ROWS_FOR_UNITS - 1, ROWS_FOR_UNITS):
        x = torch.randn(1, rows, 64).bfloat16()
        assert relative(matrix(x).float(), x.float() @ matrix.dense(torch.float32).mT) < 2e-2
    assert read == [1, ROWS_FOR_UNITS - 1, *([] if units else [ROWS_FOR_UNITS])]


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in KERNEL_PROCESSORS, reason="torch has no kernel here")
def test_the_kernels_copy_follows_the_codes_and_is_not_stored() -> None:
    matrix = CodedMatrix.of(round_nearest(torch.randn(64, 64), 4, (1, 64)))
    x = torch.randn(3, 64).bfloat16()
    before = matrix(x)
    assert matrix._ordered is not None
    copied = pickle.loads(pickle.dumps(matrix))
    assert copied._ordered is None
    assert copied.state_dict().keys() == matrix.state_dict().keys() == {"codes", "scales"}
    assert torch.equal(copy.deepcopy(matrix)(x), before)
    matrix.scales.mul_(2)
    torch.testing.assert_close(matrix(x), 2 * before)
    matrix.codes.zero_()
    assert relative(matrix(x).float(), x.float() @ matrix.dense(torch.float32).mT) < 2e-2


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in KERNEL_PROCESSORS, reason="torch has no kernel here")
def test_the_kernel_is_for_what_was_made_in_inference_mode_too() -> None:
    with torch.inference_mode():
        matrix = CodedMatrix.of(round_nearest(torch.randn(64, 64), 4, (1, 64)))
        x = torch.randn(1, 64).bfloat16()
        first = matrix(x)
        kept = matrix._ordered
        assert kept is not None
        assert torch.equal(matrix(x), first)
        assert matrix._ordered is kept


@pytest.mark.parametrize("assign", [False, True])
def test_other_codes_give_other_products_however_they_came(assign: bool) -> None:
    """By another address, by the same one given away again, and where changes are not counted."""
    matrix, x = CodedMatrix.of(round_nearest(torch.randn(64, 64), 4, (1, 64))), torch.randn(3, 64).bfloat16()
    for seed in range(12):
        weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode(seed % 2 == 1):
            state = CodedMatrix.of(round_nearest(weight, 4, (1, 64))).state_dict()
            matrix.load_state_dict(state, assign=assign)
            del state
            expected = x.float() @ matrix.dense(torch.float32).mT
            assert relative(matrix(x).float(), expected) < 2e-2


def test_rows_that_do_not_follow_each_other_in_memory() -> None:
    matrix = CodedMatrix.of(round_nearest(torch.randn(64, 64), 4, (1, 64)))
    for x in (torch.randn(64, 4).bfloat16().mT, torch.randn(3, 5, 64).bfloat16()[:, -1:]):
        assert torch.equal(matrix(x), matrix(x.contiguous()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_cast_leaves_the_numbers_alone(dtype: torch.dtype) -> None:
    """Codes are whole numbers, and scales keep their type: float16 would lose small ones."""
    module = linear_of(Storage(3, 8, 8), 4)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    cast = copy.deepcopy(module).to(dtype)
    assert cast.base is not None
    for name, value in cast.state_dict().items():
        if "codes" in name or "scales" in name:
            assert value.dtype == before[name].dtype
            assert torch.equal(value, before[name]), name
        else:
            assert value.dtype == dtype
    back = cast.to(torch.float32)
    assert relative(back.dense(), module.dense()) < 1e-6


def test_sizes_count_numbers_and_bytes() -> None:
    model = tiny_model("llama")
    dense_params, dense_bytes = num_params(model), num_bytes(model)
    sites = find_sites(model)
    stored = {site.name: Storage(4, None, 8) for site in sites}
    compress(model, build_method("svd"), RankPlan(sites, dict.fromkeys(stored), stored=stored))
    assert num_params(model) == dense_params
    saved = sum(site.num_params * 4 - stored[site.name].num_bytes(site.d_out, site.d_in, None, 4) for site in sites)
    assert dense_bytes - num_bytes(model) == saved


def test_a_model_in_few_bits_is_not_compressed_again() -> None:
    with pytest.raises(UnsupportedModelError, match="is low-rank already"):
        find_sites(coded(tiny_model("llama")))


@pytest.mark.parametrize(
    ("entry", "complaint"),
    [
        ({"rank": 0, "bias": False, "bits": 4, "group": 8}, "is not {'rank': a positive int"),
        ({"rank": 2, "bias": False, "base": 5, "group": 8}, "bits 5 is none of"),
        ({"rank": 2, "bias": False, "base": 4, "group": 2}, "group 2 is below 8"),
        ({"rank": 2, "bias": False, "base": "4", "group": 8}, "and of numbers in few bits"),
        ({"rank": 2, "bias": False, "base": 4, "group": 8, "pivots": 1}, "is not {'rank'"),
        ({"rank": 2, "bias": False, "base": 4}, "is not {'rank'"),
    ],
    ids=str,
)
def test_entries_that_say_nothing_sensible_are_refused(entry: dict[str, Any], complaint: str) -> None:
    with pytest.raises(CheckpointError, match=re.escape(complaint)):
        LowRankConfig(sites={"model.layers.0.mlp.up_proj": entry}, format=3)


def test_older_formats_know_no_bits() -> None:
    with pytest.raises(CheckpointError, match=re.escape("is not {'rank'")):
        LowRankConfig(sites={"a": {"rank": 2, "bias": False, "base": 4, "group": 8}}, format=2)


def test_damaged_codes_are_refused(tmp_path: Path) -> None:
    """Too few of them, and scales that are not finite."""
    model = coded(tiny_model("llama"))
    for spoil, complaint in (
        (lambda tensors, name: tensors.__setitem__(name, tensors[name][:-4].clone()), "has shape"),
        (lambda tensors, name: tensors.pop(name), "missing tensor"),
        (lambda tensors, name: tensors[name.replace("codes", "scales")].fill_(torch.nan), "not finite"),
    ):
        path = save(model, tmp_path / complaint.replace(" ", "-"))
        tensors = load_file(path / "model.safetensors")
        name = next(name for name in tensors if name.endswith("base.codes"))
        spoil(tensors, name)
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        (path / "digests.json").unlink(missing_ok=True)
        with pytest.raises(CheckpointError, match=complaint):
            load_model(path)


def test_a_linear_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="without a quantised weight"):
        CodedLinear(8, 8, 0, Storage(None, 8, 8), bias=False)


def test_plain_linears_next_to_it_are_as_ever() -> None:
    modules = low_rank_modules(coded(tiny_model("llama")))
    assert {type(module) for module in modules.values()} == {CodedLinear, LowRankLinear}
