"""Hidden states: transformers' own, pooled without padding, whatever the batch; kept by content; resumed."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from eckart.allocation import plan
from eckart.compression.replace import compress
from eckart.evals import hidden_states
from eckart.evals.hidden_states import Pooling, read_hidden_states, tokenize_texts
from tiny import BLOCKS, CLS, ENCODERS, FAMILY_CONFIGS, POSITIONS, tiny_model, tiny_text, tiny_tokenizer

TEXTS = [tiny_text(words, seed) for seed, words in enumerate((9, 3, 14, 3, 7, 1))]


def states_of(model: PreTrainedModel, texts: list[str] = TEXTS, **options: Any) -> NDArray[np.float32]:
    with read_hidden_states(model, tiny_tokenizer(), texts, **options) as states:
        return np.array(states.values)


@torch.no_grad()
def expected(model: PreTrainedModel, pooling: Pooling) -> NDArray[np.float32]:
    """A text at a time through the whole model, so that nothing is padded."""
    rows = []
    for text in TEXTS:
        ids = torch.tensor([tiny_tokenizer()(text)["input_ids"]])
        states = torch.stack(model(input_ids=ids, output_hidden_states=True).hidden_states)[:, 0]
        rows.append({"mean": states.mean(1), "last": states[:, -1], "cls": states[:, 0]}[pooling])
    return torch.stack(rows, 1).numpy()


@pytest.mark.parametrize("model_type", FAMILY_CONFIGS)
@pytest.mark.parametrize("pooling", ["mean", "last", "cls"])
def test_states_are_those_of_each_text_alone(model_type: str, pooling: Pooling) -> None:
    model = tiny_model(model_type)
    if pooling == "cls" and model_type not in ENCODERS:
        with pytest.raises(ValueError, match="its first token has seen no other"):
            states_of(model, pooling=pooling)
        return
    states = states_of(model, pooling=pooling, batch_size=4)
    assert states.shape == (BLOCKS + 1, len(TEXTS), 32)
    assert states.dtype == np.float32
    assert np.abs(states - expected(model, pooling)).max() < 2e-5


def test_the_batch_changes_nothing_but_rounding() -> None:
    model = tiny_model("llama")
    assert np.abs(states_of(model, batch_size=1) - states_of(model, batch_size=6)).max() < 1e-5


def test_a_compressed_model_has_states_as_well() -> None:
    model = tiny_model("llama")
    compress(model, "svd", plan(model, keep=0.5))
    assert np.abs(states_of(model) - expected(model, "mean")).max() < 2e-5


def test_texts_are_cut_at_the_positions_and_counted() -> None:
    texts = [tiny_text(POSITIONS + 5), tiny_text(5)]
    for model_type, longest in (("llama", POSITIONS), ("roberta", POSITIONS - 1)):  # one is the padding's
        with read_hidden_states(tiny_model(model_type), tiny_tokenizer(), texts) as states:
            assert (states.truncated, states.length) == (1, longest)
    with read_hidden_states(tiny_model("llama"), tiny_tokenizer(), texts, length=5) as states:
        assert (states.truncated, states.length) == (1, 5)
    with pytest.raises(ValueError, match="length 65 is past the model's 64 positions"):
        states_of(tiny_model("llama"), length=65)


def test_texts_are_cut_on_the_right_whatever_the_tokenizer_does() -> None:
    model, text = tiny_model("llama"), tiny_text(20)
    for side in ("right", "left"):
        tokenizer = tiny_tokenizer(truncation_side=side)
        assert tokenize_texts(model, tokenizer, [text], 8).ids == (tuple(tokenizer(text)["input_ids"][:8]),)
        assert tokenizer.truncation_side == side


def test_states_are_kept_by_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    first = states_of(model, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.suffix == ".npy"
    with monkeypatch.context() as patch:
        patch.setattr(hidden_states, "_pool", lambda *a, **k: pytest.fail("read again"))
        assert np.array_equal(states_of(model, cache=tmp_path, batch_size=2), first)
        for change in (
            {"pooling": "last"},
            {"texts": TEXTS[:-1]},
        ):
            with pytest.raises(pytest.fail.Exception, match="read again"):
                states_of(model, cache=tmp_path, **change)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] += 1e-3
    assert not np.array_equal(states_of(model, cache=tmp_path), first)
    assert len([f for f in tmp_path.iterdir() if f.suffix == ".npy"]) == 2


def test_a_killed_reading_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    whole = states_of(model, batch_size=1)
    monkeypatch.setattr(hidden_states, "NOTED_EVERY", 2)

    def dying(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        for place, item in enumerate(items):
            if place == 5:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        states_of(model, cache=tmp_path, batch_size=1, track=dying)
    asked: list[int] = []

    def counting(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        asked.append(total)
        return items

    resumed = states_of(model, cache=tmp_path, batch_size=1, track=counting)
    assert asked == [2]  # four of six were noted
    assert np.array_equal(resumed, whole)
    assert [file.suffix for file in tmp_path.iterdir()] == [".npy"]


def test_a_reading_killed_at_its_very_end_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the digest was written, before the file has its name; the last texts were not noted."""
    model = tiny_model("llama")
    monkeypatch.setattr(hidden_states, "NOTED_EVERY", 2)

    def die(_partial: Path, _file: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", die)
        with pytest.raises(KeyboardInterrupt):
            states_of(model, cache=tmp_path, batch_size=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resumed, again = states_of(model, cache=tmp_path, batch_size=1), states_of(model, cache=tmp_path, batch_size=1)
    assert np.array_equal(resumed, again)
    assert np.array_equal(resumed, states_of(model, batch_size=1))
    assert [file.suffix for file in tmp_path.iterdir()] == [".npy"]


def test_two_readings_of_the_same_states_do_not_meet(tmp_path: Path) -> None:
    model = tiny_model("llama")

    def inner(items: Iterable[Any], description: str, total: int) -> Iterable[Any]:
        with (
            ThreadPoolExecutor(1) as other,
            pytest.raises(ValueError, match=r"another run is making .*\.npy; wait for it"),
        ):
            other.submit(states_of, model, cache=tmp_path).result()
        return items

    states_of(model, cache=tmp_path, track=inner)


def test_a_full_disk_is_an_error_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hidden_states.os, "posix_fallocate", full)
    with pytest.raises(OSError, match="No space left"):
        states_of(tiny_model("llama"), cache=tmp_path)
    monkeypatch.undo()
    assert states_of(tiny_model("llama"), cache=tmp_path).shape[1] == len(TEXTS)  # what was left behind is no obstacle


def test_a_broken_model_has_no_states() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="a hidden state of layer 2 is not finite"):
        states_of(model)


def test_input_that_does_not_fit_is_named() -> None:
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="no texts"):
        states_of(model, [])
    with pytest.raises(ValueError, match="text 1 \\(''\\) has no token"):
        states_of(model, ["w1", ""])
    with pytest.raises(ValueError, match="pooling 'max' is none of mean, last, cls"):
        states_of(model, pooling="max")
    with pytest.raises(ValueError, match="in training mode"):
        states_of(model.train())
    assert tiny_tokenizer().cls_token_id == CLS


def test_every_flipped_bit_of_kept_states_is_caught(tmp_path: Path) -> None:
    model = tiny_model("llama")
    first = states_of(model, cache=tmp_path)
    (file,) = tmp_path.iterdir()
    whole, generator = file.read_bytes(), random.Random(0)
    for _ in range(12):
        data, bit = bytearray(whole), generator.randrange(8 * len(whole))
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        with pytest.warns(UserWarning, match=r"\.npy is damaged: .* is computed again"):
            assert np.array_equal(states_of(model, cache=tmp_path), first)
        assert file.read_bytes() == whole
    file.write_bytes(whole[:-32])  # of an older eckart: without a digest
    assert np.array_equal(states_of(model, cache=tmp_path), first)
