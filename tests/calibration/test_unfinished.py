"""A pass for gradients that was killed goes on from the sums that it has written, and gives the same to the bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import eckart.calibration.gradients
import eckart.calibration.unfinished
from eckart.calibration.moments import Memory, calibrate_by_block, gather_gradients
from eckart.calibration.unfinished import UNFINISHED, Unfinished
from eckart.data.tokens import Tokens
from eckart.lowrank import GradientMoments, InputMoments, Method, build_method
from eckart.models.sites import blocks_of
from eckart.support.progress import Track, silent
from tiny import tiny_model, tiny_tokens

KFAC, FWSVD = build_method("kfac"), build_method("fwsvd")
WEIGHTED = build_method("kfac", {"weighted": True})
SAMPLES = 6


@pytest.fixture(autouse=True)
def one_sample_and_one_write_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eckart.calibration.gradients, "ACTIVATIONS", 1)
    monkeypatch.setattr(eckart.calibration.unfinished, "LEAST", 0.0)
    monkeypatch.setattr(eckart.calibration.unfinished, "TIMES", 0.0)


class Killed(Exception):
    """Stands for what stops a process."""


class Passes:
    """Counts the calls of a model's first block, some for each sample, and dies in the one of a number."""

    def __init__(self, model: PreTrainedModel, dies_in: int | None = None) -> None:
        self.count, self.dies_in = 0, dies_in
        self.handle = blocks_of(model)[0].register_forward_pre_hook(self._see)

    def _see(self, *_given: Any) -> None:
        if self.count == self.dies_in:
            self.handle.remove()
            raise Killed
        self.count += 1


def samples(seed: int = 0) -> Tokens:
    return tiny_tokens(SAMPLES, 10, padded=True, seed=seed)


def gathered(
    model: PreTrainedModel, method: Method, cache: Path | None, tokens: Tokens | None = None, track: Track = silent
) -> dict[str, GradientMoments]:
    memory: Memory = {}
    return gather_gradients(model, tokens or samples(), method, cache=cache, memory=memory, track=track)


def everything(model: PreTrainedModel, method: Method, cache: Path, gradients: dict[str, GradientMoments]) -> Any:
    """{name: tensor} of all that the pass has summed; nothing is computed again."""
    sums: dict[str, Tensor] = {}
    for block in calibrate_by_block(model, samples(), method, cache=cache, gradients=gradients):
        for kind, moments in (("input", block.inputs), ("gradient", block.gradients)):
            for name, each in moments.items():
                assert isinstance(each, InputMoments | GradientMoments)
                counts = (each.count,) if isinstance(each, InputMoments) else (each.examples, each.tokens)
                sums[f"{kind} {name}"] = torch.tensor(counts)
                sums |= {f"{kind} {name} {statistic}": total for statistic, total in each.sums.items()}
    return sums


MODELS = {
    "llama": lambda: tiny_model("llama"),
    "bert, masked": lambda: tiny_model("bert", "masked"),
    "bert, classes": lambda: tiny_model("bert", "classifier"),
    "experts": lambda: tiny_model("mixtral"),
}


@pytest.mark.parametrize("method", [KFAC, FWSVD, WEIGHTED], ids=["kfac", "fwsvd", "weighted"])
@pytest.mark.parametrize("name", list(MODELS))
def test_goes_on_with_the_sample_that_is_next(tmp_path: Path, name: str, method: Method) -> None:
    model = MODELS[name]()
    expected = everything(model, method, tmp_path / "whole", gathered(model, method, tmp_path / "whole"))
    per_sample = Passes(model)
    gathered(model, method, None)
    each = per_sample.count // SAMPLES
    per_sample.handle.remove()

    for died in (2, 4):
        passes = Passes(model, each * 2)
        with pytest.raises(Killed):
            gathered(model, method, tmp_path / "cache")
        assert passes.count == each * 2, died
        assert len(list((tmp_path / "cache").rglob(UNFINISHED))) == 1
    passes = Passes(model)
    gradients = gathered(model, method, tmp_path / "cache")
    assert passes.count == each * (SAMPLES - 4)
    passes.handle.remove()
    assert not list((tmp_path / "cache").rglob(f"{UNFINISHED}*"))
    resumed = everything(model, method, tmp_path / "cache", gradients)
    assert resumed.keys() == expected.keys()
    assert all(torch.equal(resumed[key], expected[key]) for key in expected)


def dying(items: Iterable[Any], _description: str, _total: int) -> Iterator[Any]:
    """A progress display that dies with the fourth batch."""
    for number, item in enumerate(items):
        if number == 3:
            raise Killed
        yield item


def stop(model: PreTrainedModel, cache: Path, tokens: Tokens | None = None) -> Path:
    """A pass of kfac that is killed half way: its file."""
    with pytest.raises(Killed):
        gathered(model, KFAC, cache, tokens, dying)
    (file,) = cache.rglob(UNFINISHED)
    return file


def count_of(model: PreTrainedModel, cache: Path, method: Method = KFAC, tokens: Tokens | None = None) -> int:
    """How many batches a pass walks."""
    walked: list[Any] = []

    def track(items: Iterable[Any], _description: str, _total: int) -> Iterator[Any]:
        for item in items:
            walked.append(item)
            yield item

    gathered(model, method, cache, tokens, track)
    return len(walked)


def test_another_text_model_or_method_starts_anew(tmp_path: Path) -> None:
    model = tiny_model("llama")
    file = stop(model, tmp_path)
    assert count_of(model, tmp_path, tokens=samples(seed=1)) == SAMPLES
    assert count_of(model, tmp_path, FWSVD) == SAMPLES
    other = tiny_model("llama")
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    assert count_of(other, tmp_path) == SAMPLES
    assert file.exists()
    assert count_of(model, tmp_path) == SAMPLES - 3
    assert not file.exists()


def test_other_batches_start_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model("llama"), tiny_tokens(SAMPLES, 10)
    stop(model, tmp_path, tokens)
    monkeypatch.setattr(eckart.calibration.gradients, "ACTIVATIONS", 2**30)
    assert count_of(model, tmp_path, tokens=tokens) == 1


def test_a_file_without_the_inputs_starts_anew(tmp_path: Path) -> None:
    model = tiny_model("llama")
    with pytest.raises(Killed):
        gather_gradients(model, samples(), KFAC, cache=tmp_path, track=dying)
    assert list(tmp_path.rglob(UNFINISHED))
    assert count_of(model, tmp_path) == SAMPLES


def test_a_damaged_file_is_set_aside(tmp_path: Path) -> None:
    model = tiny_model("llama")
    file = stop(model, tmp_path)
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="is damaged"):
        assert count_of(model, tmp_path) == SAMPLES


def test_nothing_is_written_before_its_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eckart.calibration.unfinished, "LEAST", 3600.0)
    with pytest.raises(Killed):
        gathered(tiny_model("llama"), KFAC, tmp_path, track=dying)
    assert not list(tmp_path.rglob(UNFINISHED))


def test_writing_takes_a_small_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that takes ten seconds is followed by none for TIMES as long."""
    clock, written = [0.0], []
    monkeypatch.setattr(eckart.calibration.unfinished, "LEAST", 60.0)
    monkeypatch.setattr(eckart.calibration.unfinished, "TIMES", 50.0)
    monkeypatch.setattr(eckart.calibration.unfinished.time, "monotonic", lambda: clock[0])

    def write(*_given: Any) -> None:
        written.append(clock[0])
        clock[0] += 10

    monkeypatch.setattr(eckart.calibration.unfinished, "write_entries", write)
    unfinished = Unfinished(tmp_path / UNFINISHED, [1] * 100)
    for done in range(1, 101):
        clock[0] += 20
        unfinished.keep(done, {}, {})
    assert written == [60.0, 570.0, 1080.0, 1590.0]


def test_moments_go_on_to_the_bit() -> None:
    """Even those that no row was added to, and those that were read."""
    rows = torch.randn(40, 8, generator=torch.Generator().manual_seed(0)) + 30
    needs = frozenset({"second_moment"})
    for done in (0, 7, 40):
        whole, first, second = (InputMoments(8, needs, dtype=torch.float32) for _ in range(3))
        for part in (rows[:done], rows[done:]):
            whole.update(part)
        first.update(rows[:done])
        second.go_on_from(first.count, {name: value.clone() for name, value in first.running.items()})
        second.update(rows[done:])
        assert all(torch.equal(second.sums[name], total) for name, total in whole.sums.items())
    read, other = InputMoments.from_state(whole.count, whole.sums), InputMoments(8, needs)
    other.go_on_from(read.count, {name: value.clone() for name, value in read.running.items()})
    for each in (read, other):
        each.update(rows)
    assert all(torch.equal(other.sums[name], total) for name, total in read.sums.items())
