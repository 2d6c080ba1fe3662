"""Compressed experts against fewer experts, at equal bytes; and what an expert loses against how much it is used.

    python benchmarks/experts.py --model MIXTURE [--keeps 0.5 0.3 0.15] [--variants svd asvd-i ...] [--json FILE]

Only experts' linears are compressed, so that `keep` is a share of the experts' numbers in every row.
drop     the experts of each layer that the calibration text uses the least are left out, as many as the share says; the
         router's weights of those that stay are scaled to the sum that they had together. What a router gives to none
         that stays adds nothing. (A router that chooses anew among those that stay would lose less.)
joint    a layer's experts share a right factor where that is better.

Perplexities are of `--windows` windows of 256 tokens of the built-in prose, which is calibrated on, and code. Then, of
the first keep and of each variant that has ranks: over the experts of a layer, Spearman's correlation of an expert's
use (the sum of the router's squared weights, a token) with its rank and with its relative error, means over layers.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import machine, write_json
from real_models import add_model_option
from scipy.stats import spearmanr
from torch import Tensor, nn
from transformers import PreTrainedModel

from eckart import build_method, calibrate, load_model, load_tokenizer, parse_recipe, read_text, read_tokens
from eckart.data.encoding import encode
from eckart.evals.predictions import token_losses
from eckart.evals.windows import cut_windows
from eckart.models.experts import expert_of, opened_experts
from eckart.runs.facts import Outcome
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint

LENGTH = 256
TEXTS = ("builtin/prose", "builtin/code")
VARIANTS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "asvd-i": {"method": "asvd-i"},
    "asvd-i, joint": {"method": "asvd-i", "joint": True},
    "best": {"method": "best"},
    "best, joint": {"method": "best", "joint": True},
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser, needed="the folder of a mixture of experts")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.5, 0.3, 0.15])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    tokenizer, dense = load_tokenizer(given.model), load_model(given.model, dtype="float32")
    tokens = read_tokens(TEXTS[0], tokenizer, samples=given.samples, length=LENGTH)
    use = {
        group: moments.use
        for part in calibrate(dense, tokens, build_method("asvd-0"))
        for group, moments in part.inputs.items()
        if expert_of(group)
    }
    windows = {
        text: cut_windows(dense, encode(read_text(text, split="test"), tokenizer), length=LENGTH, limit=given.windows)
        for text in TEXTS
    }
    rows: list[dict[str, Any]] = []

    def add(name: str, keep: float, model: PreTrainedModel, outcome: Outcome | None = None) -> None:
        values = {text: perplexity(model, windows[text]) for text in TEXTS}
        related = None if outcome is None else against_use(outcome, use)
        rows.append({"name": name, "keep": keep, "perplexity": values, "use": related})
        print(name, keep, *(f"{value:.2f}" for value in values.values()), related or "", flush=True)

    add("dense", 1.0, dense)
    for keep in given.keeps:
        add("drop", keep, drop_experts(load_model(given.model, dtype="float32"), use, keep))
        for variant in given.variants:
            with tempfile.TemporaryDirectory() as folder:
                calibration = {"corpus": TEXTS[0], "samples": given.samples, "length": LENGTH}
                keys = {"model": given.model, "dtype": "float32", "keep": keep, "calibration": calibration}
                recipe = parse_recipe({**keys, "sites": {"include": ["experts"]}, **VARIANTS[variant]})
                outcome = make_checkpoint(recipe, Path(folder) / "out", How())
                add(variant, keep, load_model(Path(folder) / "out"), outcome)
    write_json(given.json, {"machine": machine(), "settings": vars(given), "rows": rows})


@torch.inference_mode()
def perplexity(model: PreTrainedModel, windows: Tensor) -> float:
    """Of all tokens of the windows but each one's first."""
    losses = [token_losses(model(input_ids=rows).logits[:, :-1], rows[:, 1:]) for rows in windows.split(4)]
    return math.exp(torch.cat(losses).mean().item())


def drop_experts(model: PreTrainedModel, use: dict[str, float], keep: float) -> PreTrainedModel:
    """The model without the least used experts of each layer, in place."""
    for place, experts in opened_experts(model).items():
        first = "gate_up_proj" if f"{place}.0.gate_up_proj" in use else "up_proj"
        uses = torch.tensor([use[f"{place}.{number}.{first}"] for number in range(experts.num_experts)])
        stays = torch.zeros(len(uses), dtype=torch.bool)
        stays[uses.topk(max(1, round(keep * len(uses)))).indices] = True

        def choose(_module: nn.Module, args: tuple[Tensor, ...], stays: Tensor = stays) -> tuple[Tensor, ...]:
            hidden, chosen, weights = args
            staying = weights * stays[chosen]
            scale = weights.sum(-1, keepdim=True) / staying.sum(-1, keepdim=True).clamp_min(1e-9)
            return hidden, chosen, staying * scale

        experts.register_forward_pre_hook(choose)
    return model


def against_use(outcome: Outcome, use: dict[str, float]) -> dict[str, float]:
    """{linear, rank or error: Spearman's correlation with use, mean over layers}; none where nothing differs."""
    layers: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for report in outcome.report.sites:
        place = expert_of(report.site.name)
        if place is not None and report.relative_error is not None:
            key = place[0], report.site.name.rpartition(".")[2]
            layers.setdefault(key, []).append((use[report.site.input_group], report.rank or 0, report.relative_error))
    sums: dict[str, list[float]] = {}
    for (_, linear), experts in layers.items():
        uses, ranks, errors = zip(*experts, strict=True)
        for what, values in (("rank", ranks), ("error", errors)):
            if len(experts) > 2 and len({*values}) > 1:
                sums.setdefault(f"{linear} {what}", []).append(float(spearmanr(uses, values).statistic))
    return {name: round(sum(values) / len(values), 2) for name, values in sums.items()}


if __name__ == "__main__":
    main()
