"""Devices: the names of those that are here, and one error for the others."""

from __future__ import annotations

import pytest
import torch

from eckart.support.device import check_device


def test_what_is_here() -> None:
    assert check_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["cuda:99", "tpu", "", "meta", "cpu:7", "cuda:-1", "gpu"])
def test_what_is_not(name: str) -> None:
    with pytest.raises(ValueError, match=rf"device '{name}': this machine has cpu"):
        check_device(name)


def test_a_torch_without_cuda_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match="built without CUDA"):
        check_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert check_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"has cpu, cuda:0 \.\.\. cuda:1$"):
        check_device("cuda:2")
