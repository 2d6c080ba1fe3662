"""Shards: a model without its blocks, from its files."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import eckart
from eckart.models.shards import Skeleton
from tiny import tiny_model


def test_a_skeleton_is_the_model_without_its_blocks(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path, max_shard_size="10KB")
    skeleton, model = Skeleton(tmp_path), eckart.load_model(tmp_path)
    assert {name: tuple(p.shape) for name, p in skeleton.model.named_parameters()} == {
        name: tuple(p.shape) for name, p in model.named_parameters()
    }
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, skeleton.model.get_buffer(name)), name
    with skeleton.resident(1) as block:
        check_equal(block, model.get_submodule("model.layers.1"))
    assert all(parameter.device.type == "meta" for parameter in skeleton.blocks.parameters())


def check_equal(found: nn.Module, expected: nn.Module) -> None:
    theirs = expected.state_dict()
    for name, tensor in found.state_dict().items():
        assert torch.equal(tensor, theirs[name]), name
