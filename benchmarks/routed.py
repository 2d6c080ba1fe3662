"""Time of a layer of experts: ours, open and compressed, over transformers' loop and its grouped products, in turns.

    OMP_NUM_THREADS=1 python benchmarks/routed.py [--shape 2048x768] [--experts 128] [--chosen 8] [--keeps 0.8 0.5]
        [--rows 1 16 512] [--type float32] [--device cuda] [--json FILE]

One layer of random experts with a random router's choices; the default is Qwen3-30B-A3B's. `loop` and `grouped` are
what transformers computes with experts_implementation "eager" and "grouped_mm"; `open` is the same dense numbers as
linears of each expert, as eckart loads them; `keep 0.8` has factors in their place, `joint` a right factor that all
experts' first linears share. Each figure is the dense loop's time over its own, median over the rounds: above 1 is
faster. 1 and 16 rows are steps of generating with one and sixteen sequences, 512 a prompt.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import in_turns, machine, write_json
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

from eckart.lowrank import rank_for
from eckart.models.experts import Experts
from eckart.models.linear import LowRankLinear

# In each of which every layer is called, one after the other.
ROUNDS = 9


def fused_experts(given: argparse.Namespace) -> nn.Module:
    """transformers' own, with random numbers."""
    hidden, width = map(int, given.shape.split("x"))
    config = Qwen3MoeConfig(
        hidden_size=hidden, moe_intermediate_size=width, num_experts=given.experts, num_experts_per_tok=given.chosen
    )
    with torch.device(given.device):
        module = Qwen3MoeExperts(config).to(getattr(torch, given.type))
    for weight in module.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return module


def as_transformers(fused: nn.Module, implementation: str, *args: Tensor) -> Tensor:
    """What transformers computes with an implementation that its configuration names."""
    fused.config._experts_implementation = implementation  # type: ignore[union-attr]  # noqa: SLF001 (no other way)
    result: Tensor = fused(*args)
    return result


def compressed(fused: nn.Module, keep: float, *, joint: bool) -> Experts:
    """The experts with random factors of that share of their numbers; joint, the first linears share the right one."""
    experts = Experts(fused)
    lender: LowRankLinear | None = None
    for number in range(experts.num_experts):
        for name, dense in list(experts.get_submodule(str(number)).named_children()):
            assert isinstance(dense, nn.Linear)
            d_out, d_in = dense.weight.shape
            shared = joint and name == "gate_up_proj"
            # All that share a factor are one linear of as many rows as they have together.
            rank = min(rank_for(keep, d_out * (experts.num_experts if shared else 1), d_in), d_out, d_in)
            low = LowRankLinear(
                d_in,
                d_out,
                rank,
                bias=False,
                right_of=lender if shared else None,
                device=dense.weight.device,
                dtype=dense.weight.dtype,
            )
            if shared and lender is None:
                lender = low
            experts.set_submodule(f"{number}.{name}", low)
    return experts


def speeds(layers: Mapping[str, Callable[..., object]], args: tuple[Tensor, ...]) -> dict[str, float]:
    """{layer: the loop's time over its own, median over the rounds}, and the loop's milliseconds."""
    samples = in_turns({name: partial(layer, *args) for name, layer in layers.items()}, ROUNDS, args[0].device)
    loop = samples.pop("loop")
    ratios = {name: [one / other for one, other in zip(loop, own, strict=True)] for name, own in samples.items()}
    return {
        "loop, ms": round(1e3 * statistics.median(loop), 2),
        **{name: round(statistics.median(values), 2) for name, values in ratios.items()},
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="2048x768", help="hidden size x width of an expert")
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--chosen", type=int, default=8, help="experts for each token")
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.5])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 512])
    parser.add_argument("--type", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    torch.manual_seed(0)
    fused = fused_experts(given)
    layers: dict[str, Callable[..., object]] = {
        "loop": partial(as_transformers, fused, "eager"),
        "grouped": partial(as_transformers, fused, "grouped_mm"),
        "open": Experts(fused),
    }
    for keep in given.keeps:
        layers[f"keep {keep:g}"] = compressed(fused, keep, joint=False)
        layers[f"keep {keep:g}, joint"] = compressed(fused, keep, joint=True)
    rows: list[dict[str, Any]] = []
    for count in given.rows:
        x = torch.randn(count, int(given.shape.split("x")[0]))
        scores = torch.randn(count, given.experts).softmax(1).topk(given.chosen)
        dtype = getattr(torch, given.type)
        args = (x.to(given.device, dtype), scores.indices.to(given.device), scores.values.to(given.device, dtype))
        rows.append({"rows": count, **speeds(layers, args)})
        print(rows[-1], flush=True)
    write_json(given.json, {"machine": machine(), "layer": vars(given) | {"json": None}, "rows": rows})


if __name__ == "__main__":
    main()
