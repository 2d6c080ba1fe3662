"""Hidden states on disk: what is written at one door is read at it, and a door is there whole or not at all."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eckart.calibration.calls import shared
from eckart.calibration.doors import Spill, whole_doors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("step", [1, -1])
def test_states_go_from_door_to_door(tmp_path: Path, dtype: torch.dtype, step: int) -> None:
    states = torch.randn(3, 2, 5, 4).to(dtype)
    spill = Spill(tmp_path, 3, first=4, step=step)
    for door in range(3):
        for index in range(3):
            if door:
                assert torch.equal(spill.read(index), states[index] + (door - 1))
            spill.write(index, states[index] + door)
        spill.turn()
        assert spill.door == 4 + door * step
    assert whole_doors(tmp_path) == sorted([4, 4 + step, 4 + 2 * step])
    assert torch.equal(spill.read_at(4, 1), states[1])
    spill.clear()
    assert whole_doors(tmp_path) == [4 + 2 * step]


def test_a_half_written_door_is_none(tmp_path: Path) -> None:
    spill = Spill(tmp_path, 2)
    spill.write(0, torch.zeros(1))
    assert whole_doors(tmp_path) == []
    again = Spill(tmp_path, 2)  # after a kill
    for index in range(2):
        again.write(index, torch.full((1,), float(index)))
    again.turn()
    assert whole_doors(tmp_path) == [0]
    assert again.read(1) == 1
    assert not list(tmp_path.glob("*.partial"))


def test_a_walk_that_begins_anew_goes_over_doors_that_are_there(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        spill = Spill(tmp_path, 1)
        for _ in range(2):
            spill.write(0, torch.full((1,), value))
            spill.turn()
    assert spill.read(0) == 2.0


def test_what_is_equal_is_held_once() -> None:
    table, mask = torch.ones(3), torch.zeros(2)
    known = [((mask, None), {"rotary": (table, table), "flag": True})]
    calls = shared([((mask + 0, None), {"rotary": (table + 0, table + 1), "flag": False})], known)
    assert calls[0][0][0] is mask
    assert calls[0][1]["rotary"][0] is table
    assert torch.equal(calls[0][1]["rotary"][1], table + 1)
    assert calls[0][1]["flag"] is False
    assert shared(table.double(), table) is not table
    assert shared(torch.ones(4), table).shape == (4,)


@given(bit=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_every_flipped_bit_of_a_state_is_caught(bit: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("flips") / "doors"
    spill, states = Spill(folder, 1), torch.randn(2, 3)
    spill.write(0, states)
    spill.turn()
    (file,) = folder.rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    bit %= 8 * len(data)
    data[bit // 8] ^= 1 << bit % 8
    file.write_bytes(data)
    told = ""
    try:
        read = spill.read(0)
    except OSError as error:
        told = str(error)
    if told:
        assert "00000.safetensors is damaged" in told
        assert whole_doors(folder) == []
    else:
        assert torch.equal(read, states), "a bit in the checksum's own name"
