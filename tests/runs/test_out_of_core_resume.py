"""Out of core: a kill, a full disk or a damaged file costs a block at most, and two runs do not share a place."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from eckart.calibration import doors
from eckart.calibration.cache import write_gradients
from eckart.lowrank import GradientMoments
from eckart.lowrank.moments import FISHER
from eckart.models import shards
from eckart.models.loading import load_model
from eckart.models.sites import find_sites
from eckart.runs import out_of_core
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.out_of_core import compress_out_of_core
from eckart.support.files import GRADIENTS, claimed
from tiny import BLOCKS, Run, tiny_model

from .from_files import BATCHED, Killed, check_same, killing, note_blocks, recipe_of, resume_until_done, tensors_of

pytestmark = pytest.mark.usefixtures("any_tokenizer", "two_passes")


@pytest.fixture(scope="module")
def expected(two_passes: None, place: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """{method: what it makes in memory}."""
    folder = tmp_path_factory.mktemp("expected")
    for method in ("asvd-i", "kfac"):
        make_checkpoint(recipe_of(place, method=method), folder / method, BATCHED)
    return {method: folder / method for method in ("asvd-i", "kfac")}


@pytest.mark.parametrize("method", ["asvd-i", "kfac"])
@pytest.mark.parametrize(
    ("module", "name", "after"),
    [
        (out_of_core, "write_shard", 1),
        (out_of_core._Compression, "_factor", 1),
        (out_of_core._Compression, "_parts", 1),
        (out_of_core, "write_index", 0),
        (shutil, "rmtree", 4),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_killed_run_goes_on(
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, Path],
    method: str,
    module: Any,
    name: str,
    after: int,
) -> None:
    recipe, out = recipe_of(place, method=method), tmp_path / "out"
    if name == "write_index":  # it would be killed there for ever
        with pytest.raises(Killed), killing(monkeypatch, module, name, after):
            compress_out_of_core(recipe, out, BATCHED)
        compress_out_of_core(recipe, out, BATCHED, resume=True)
    else:
        assert resume_until_done(recipe, out, monkeypatch, module, name, after) > 0
    check_same(out, expected[method])


@pytest.mark.parametrize("name", ["_head", "_backward", "_forward"])
def test_a_killed_sweep_goes_on(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Path], name: str
) -> None:
    recipe, out = recipe_of(place, method="kfac"), tmp_path / "out"
    if name == "_backward":
        assert resume_until_done(recipe, out, monkeypatch, out_of_core.Sweep, name, 1) == BLOCKS - 1
    else:
        with pytest.raises(Killed), killing(monkeypatch, out_of_core.Sweep, name, 0):
            compress_out_of_core(recipe, out, BATCHED)
        compress_out_of_core(recipe, out, BATCHED, resume=True)
    check_same(out, expected["kfac"])


def test_at_most_one_block_is_done_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, out = recipe_of(place), tmp_path / "out"
    with pytest.raises(Killed), killing(monkeypatch, out_of_core._Compression, "_factor", BLOCKS - 1):
        compress_out_of_core(recipe, out, BATCHED)
    forward = note_blocks(monkeypatch)
    compress_out_of_core(recipe, out, BATCHED, resume=True)
    assert forward == [BLOCKS - 1]


def test_another_batch_size_on_the_way(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Path]
) -> None:
    with pytest.raises(Killed), killing(monkeypatch, out_of_core, "write_shard", 1):
        compress_out_of_core(recipe_of(place), tmp_path / "out", BATCHED)
    compress_out_of_core(recipe_of(place), tmp_path / "out", How(batch_size=4), resume=True)
    check_same(tmp_path / "out", expected["asvd-i"])


@pytest.mark.parametrize("damage", ["flipped", "shortened", "removed"])
@pytest.mark.parametrize("number", [0, 1])
def test_a_damaged_shard_is_made_again(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Path], damage: str, number: int
) -> None:
    recipe, out = recipe_of(place), tmp_path / "out"
    with pytest.raises(Killed), killing(monkeypatch, out_of_core, "write_shard", 2):
        compress_out_of_core(recipe, out, BATCHED)
    shard = sorted((tmp_path / ".out.work" / "checkpoint").glob("*.safetensors"))[number]
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(bytes(data if damage == "flipped" else data[:-5]))
    if damage == "removed":
        shard.unlink()
    compress_out_of_core(recipe, out, BATCHED, resume=True)
    check_same(out, expected["asvd-i"])


def test_work_of_an_earlier_run_is_not_thrown_away(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Path]
) -> None:
    recipe, out = recipe_of(place), tmp_path / "out"
    with pytest.raises(Killed), killing(monkeypatch, out_of_core, "write_shard", 1):
        compress_out_of_core(recipe, out, BATCHED)
    with pytest.raises(FileExistsError, match="--resume, or --force to start anew"):
        compress_out_of_core(recipe, out, BATCHED)
    with pytest.raises(ValueError, match=r"another compression out of core: ranks was"):
        compress_out_of_core(recipe_of(place, keep=0.5), out, BATCHED, resume=True)
    assert len(list((tmp_path / ".out.work" / "checkpoint").glob("*.safetensors"))) == 1
    compress_out_of_core(recipe, out, BATCHED, force=True)
    check_same(out, expected["asvd-i"])
    with pytest.raises(FileExistsError, match="exists; give another place"):
        compress_out_of_core(recipe, out, BATCHED)


def test_another_model_on_the_way_is_refused(own_place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Killed), killing(monkeypatch, out_of_core, "write_shard", 1):
        compress_out_of_core(recipe_of(own_place), tmp_path / "out", BATCHED)
    tiny_model("llama", seed=3).save_pretrained(own_place / "model", max_shard_size="10KB")
    with pytest.raises(ValueError, match="another compression out of core: model was"):
        compress_out_of_core(recipe_of(own_place), tmp_path / "out", BATCHED, resume=True)


def test_two_runs_do_not_share_a_place(place: Path, tmp_path: Path) -> None:
    with (
        ThreadPoolExecutor(1) as other,
        claimed(tmp_path / "out"),
        pytest.raises(ValueError, match="another run is making"),
    ):
        other.submit(compress_out_of_core, recipe_of(place), tmp_path / "out", BATCHED).result()
    compress_out_of_core(recipe_of(place), tmp_path / "out", BATCHED)
    assert not list(tmp_path.glob(".out*"))


def test_a_full_disk_loses_nothing(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, Path]
) -> None:
    recipe, out = recipe_of(place), tmp_path / "out"
    usage, save = shutil.disk_usage(tmp_path), shards.save_file

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _folder: usage._replace(free=100))
        with pytest.raises(OSError, match=r"has room for 100 bytes, and the hidden states take [\d,]+: make room"):
            compress_out_of_core(recipe, out, BATCHED)

    def full(tensors: dict[str, Tensor], path: Path, *rest: Any) -> None:
        if "00002-of" in path.name or "door-002" in str(path):
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(tensors, path, *rest)

    for module, what in ((doors, "hidden states"), (shards, "bytes")):
        with monkeypatch.context() as patch:
            patch.setattr(module, "save_file", full)
            with pytest.raises(
                OSError,
                match=rf"cannot write .*{what}.*No space left.*what was finished before is kept|"
                rf"cannot write {what} .*No space left.*kept",
            ):
                compress_out_of_core(recipe, out, BATCHED, resume=True)
        assert not list((tmp_path / ".out.work").rglob("*.partial"))
        assert (tmp_path / ".out.work" / "checkpoint" / "model-00001-of-00004.safetensors").is_file()
    compress_out_of_core(recipe, out, BATCHED, resume=True)
    check_same(out, expected["asvd-i"])


def test_a_real_kill(place: Path, tmp_path: Path, expected: dict[str, Path]) -> None:
    """SIGKILL, once the journal has a block."""
    out, journal = tmp_path / "out", tmp_path / ".out.work" / "journal.jsonl"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(recipe_of(place).to_yaml())
    code = (
        "import sys, time; from pathlib import Path; from eckart.runs import out_of_core\n"
        "from eckart.runs.how import How; from eckart.runs.recipe import load_recipe\n"
        "do = out_of_core._Compression._compress_block\n"
        "def slow(*arguments): do(*arguments); time.sleep(2)\n"
        "out_of_core._Compression._compress_block = slow\n"
        "out_of_core.compress_out_of_core(load_recipe(sys.argv[1]), Path(sys.argv[2]), How(batch_size=3))\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(recipe), str(out)])
    try:
        deadline = time.monotonic() + 240
        while not (journal.is_file() and '"block 0"' in journal.read_text()):
            assert child.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    assert not out.exists()
    compress_out_of_core(recipe_of(place), out, BATCHED, resume=True)
    check_same(out, expected["asvd-i"])


def test_a_shard_that_a_kill_left_half_written_is_not_in_the_checkpoint(
    place: Path, tmp_path: Path, expected: dict[str, Path]
) -> None:
    """SIGKILL while it is written: nothing of the process tidies up."""
    out, recipe = tmp_path / "out", tmp_path / "recipe.yaml"
    recipe.write_text(recipe_of(place).to_yaml())
    code = (
        "import os, signal, sys; from pathlib import Path; from eckart.models import shards\n"
        "from eckart.runs import out_of_core\n"
        "from eckart.runs.how import How; from eckart.runs.recipe import load_recipe\n"
        "save = shards.save_file\n"
        "def killed(tensors, file, *more):\n"
        "    save(tensors, file, *more)\n"
        "    os.truncate(file, os.path.getsize(file) // 2)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "shards.save_file = killed\n"
        "out_of_core.compress_out_of_core(load_recipe(sys.argv[1]), Path(sys.argv[2]), How(batch_size=3))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(recipe), str(out)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert list((tmp_path / ".out.work" / "checkpoint").glob("*.partial"))
    compress_out_of_core(recipe_of(place), out, BATCHED, resume=True)
    check_same(out, expected["asvd-i"])
    assert not list(out.glob("*.partial"))


def test_other_recorded_sums_are_another_run(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    shutil.copytree(place / "model", model)
    sites = find_sites(load_model(model))

    def record(seed: int) -> None:
        random, recorded = torch.Generator().manual_seed(seed), {}
        for site in sites:
            recorded[site.name] = GradientMoments(site.d_out, site.d_in, FISHER)
            recorded[site.name].update_fisher(torch.randn(site.d_out, site.d_in, generator=random))
        write_gradients(model / GRADIENTS, recorded)

    recipe = recipe_of(place, model=str(model), method="fwsvd")
    recipe = recipe.model_copy(update={"calibration": recipe.calibration.model_copy(update={"fisher": "recorded"})})
    record(0)
    first = (model / GRADIENTS).read_bytes()
    with pytest.raises(Killed), killing(monkeypatch, out_of_core, "write_shard", 1):
        compress_out_of_core(recipe, tmp_path / "out", BATCHED)
    record(1)
    with pytest.raises(ValueError, match="fisher was"):
        compress_out_of_core(recipe, tmp_path / "out", BATCHED, resume=True)
    (model / GRADIENTS).write_bytes(first)
    compress_out_of_core(recipe, tmp_path / "out", BATCHED, resume=True)


def test_the_command(place: Path, tmp_path: Path, run: Run, expected: dict[str, Path]) -> None:
    arguments = (place / "model", tmp_path / "out", "--calibration", place / "train.jsonl", "--samples", 8)
    arguments += ("--length", 16, "--keep", 0.6, "--batch-size", 3)
    status, text = run("compress", *arguments, "--method", "best-distilled", "--out-of-core")
    assert status == 2
    assert "--method asvd-i" in text
    status, text = run("compress", *arguments, "--method", "asvd-i", "--resume")
    assert status == 2
    assert "--resume is for --out-of-core" in text
    status, text = run("compress", *arguments, "--method", "asvd-i", "--out-of-core")
    assert status == 0, text
    ours, theirs = tensors_of(tmp_path / "out"), tensors_of(expected["asvd-i"])
    assert ours.keys() == theirs.keys()
