"""The backward sweep, block by block: what it gathers is what one backward pass through the whole model gives."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import eckart
from eckart.calibration.backward import Sweep
from eckart.calibration.gradients import collect_gradients
from eckart.data.pairs import is_encoder_decoder
from eckart.lowrank.moments import GRADIENT_STATISTICS
from eckart.models.shards import Skeleton
from eckart.models.sites import find_sites
from tiny import CONFIGS, MIXTURE_CONFIGS, REFUSED_CONFIGS, closed_model, tiny_model, tiny_pairs, tiny_tokens

NAMES = [name for name in CONFIGS if name not in {*REFUSED_CONFIGS, *MIXTURE_CONFIGS, "whisper"}]


def check_sweep(
    folder: Path,
    padded: bool,
    first: int = 0,
    tolerance: float = 1e-4,
    needs: frozenset[str] = GRADIENT_STATISTICS,
) -> None:
    """Both ways, on the model in the folder."""
    skeleton, model = Skeleton(folder / "model"), eckart.load_model(folder / "model")
    tokens = tiny_pairs(5, padded=padded) if is_encoder_decoder(model) else tiny_tokens(5, 14, padded=padded)
    sites = [site for site in find_sites(model) if site.block >= first]
    sweep = Sweep(skeleton, tokens, sites, needs, folder / "sweep")
    sweep.run()
    expected = collect_gradients(model, tokens, sites, needs)
    count = len(skeleton.blocks)
    for number in range(first, count):
        statistics = sweep.read(number)
        assert statistics.keys() == {site.name for site in sites if site.block == number}
        for name, moments in statistics.items():
            assert (moments.examples, moments.tokens) == (expected[name].examples, expected[name].tokens)
            for statistic, value in expected[name].sums.items():
                scale = float(value.abs().max())
                torch.testing.assert_close(
                    moments.sums[statistic], value, rtol=tolerance, atol=tolerance * scale, msg=f"{name}: {statistic}"
                )
    assert all(parameter.device.type == "meta" for parameter in skeleton.blocks.parameters())
    assert [place.suffix for place in (folder / "sweep").iterdir()] == [".safetensors"] * (count - first)


@pytest.mark.parametrize("model_type", NAMES)
def test_every_family(tmp_path: Path, model_type: str) -> None:
    closed_model(model_type).save_pretrained(tmp_path / "model", max_shard_size="20KB")
    check_sweep(tmp_path, padded=False)


@pytest.mark.parametrize(
    ("model_type", "head"), [("llama", "causal"), ("bert", "masked"), ("bert", "classifier"), ("t5", "seq2seq")]
)
@pytest.mark.parametrize("first", [0, 1])
def test_heads_and_padding(tmp_path: Path, model_type: str, head: str, first: int) -> None:
    closed_model(model_type, head=head).save_pretrained(tmp_path / "model")
    check_sweep(tmp_path, padded=True, first=first)


@pytest.mark.parametrize(("model_type", "head"), [("llama", "causal"), ("bert", "masked"), ("bert", "classifier")])
def test_covariances_alone_take_samples_together(tmp_path: Path, model_type: str, head: str) -> None:
    closed_model(model_type, head=head).save_pretrained(tmp_path / "model")
    check_sweep(tmp_path, padded=False, needs=frozenset({"gradient_covariance"}))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """float16 is in float32 meanwhile, in both ways; bfloat16 is not."""
    tiny_model("llama", dtype=dtype).save_pretrained(tmp_path / "model")
    check_sweep(tmp_path, padded=True, tolerance=1e-4 if dtype == torch.float16 else 3e-2)


def test_a_model_without_a_head_is_refused(tmp_path: Path) -> None:
    tiny_model("llama", head="base").save_pretrained(tmp_path / "model")
    skeleton = Skeleton(tmp_path / "model")
    sites = find_sites(skeleton.model)
    with pytest.raises(ValueError, match="has no loss to take gradients of"):
        Sweep(skeleton, tiny_tokens(2, 8), sites, GRADIENT_STATISTICS, tmp_path / "sweep").run()
