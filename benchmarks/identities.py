"""The laws of the methods as numbers, on real weights and real activations.

    python benchmarks/identities.py [--model MODEL] [--corpus NAME_OR_FILE] [--data DIR] [--samples 32] [--length 256]

For every linear of the model, at keep 0.7, prints the largest value over all linears of
    ||(M_a - M_b) x|| / ||W x||     for methods that must agree, and, as a control, for two that must not;
    |tail - measured| / measured    where "measured" is the squared output error on the calibration activations
                                    themselves, taken with hooks on the dense model, not from moments;
    the same two against a float64 SVD of W B, the reference of the accuracy claim.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from real_models import add_model_option
from torch import Tensor

import eckart
from eckart.lowrank import Moments, rank_for
from eckart.models.sites import Site, find_sites, read_weight

KEEP = 0.7
EQUAL = [
    ("asvd-i", "asvd-ii"),
    ("asvd-i", "feature-space"),
    ("asvd-iii", "svd"),
    ("nsvd-i", "nsvd-ii"),
    ("nid-i", "nid-ii"),
]
CONTROL = ("asvd-i", "svd")
EXACT_TAIL = ("asvd-i", "asvd-ii", "feature-space", "sfsd")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser)
    parser.add_argument("--corpus", default="builtin/prose")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--length", type=int, default=256)
    arguments = parser.parse_args()
    model = eckart.load_model(arguments.model, dtype="float32")
    text = eckart.read_text(arguments.corpus, data=arguments.data)
    tokens = eckart.sample_windows(
        text, eckart.load_tokenizer(arguments.model), samples=arguments.samples, length=arguments.length
    )
    calibration = eckart.calibrate(model, tokens, eckart.build_method("asvd-i"))
    inputs = {group: moments for block in calibration for group, moments in block.inputs.items()}
    sites = find_sites(model)
    worst: dict[str, float] = {}

    def note(what: str, value: float) -> None:
        worst[what] = max(worst.get(what, 0.0), value)

    for site in sites:
        activations = capture(model, site, tokens)
        weight = read_weight(model.get_submodule(site.name)).double()
        dense = activations @ weight.mT
        rank = rank_for(KEEP, site.d_out, site.d_in)
        outputs: dict[str, Tensor] = {}
        for name in dict.fromkeys((*EXACT_TAIL, *(name for pair in (*EQUAL, CONTROL) for name in pair))):
            factored = eckart.build_method(name).factor(weight, Moments(inputs[site.input_group]))
            outputs[name] = factored.cut(rank)(activations)
            if name in EXACT_TAIL:
                measured = float((dense - outputs[name]).square().sum(1).mean())
                note(f"tail of {name} against measured", abs(factored.tail(rank) - measured) / measured)
        for a, b in (*EQUAL, CONTROL):
            kind = "control, must differ" if (a, b) == CONTROL else "must agree"
            note(f"{a} against {b} ({kind})", float((outputs[a] - outputs[b]).norm() / dense.norm()))
        left, singular, right = torch.linalg.svd(dense, full_matrices=False)
        reference = (left[:, :rank] * singular[:rank]) @ right[:rank]
        note("asvd-i against the SVD of the outputs", float((outputs["asvd-i"] - reference).norm() / dense.norm()))
        optimum = float(singular[rank:].square().sum())
        loss = float((dense - outputs["asvd-i"]).square().sum())
        note("asvd-i's loss above that optimum", loss / optimum - 1)
    print(f"{len(sites)} linears, {tokens.count} tokens, keep {KEEP}; largest value over the linears")
    for what, value in worst.items():
        print(f"{value:10.1e}  {what}")


@torch.no_grad()
def capture(model: torch.nn.Module, site: Site, tokens: eckart.Tokens) -> Tensor:
    """(tokens, d_in) float64: what the site reads in the dense model."""
    seen: list[Tensor] = []
    handle = model.get_submodule(site.name).register_forward_pre_hook(
        lambda _module, args: seen.append(args[0].flatten(0, -2).double())
    )
    try:
        for ids, _ in tokens.batches(8):
            model(input_ids=ids)
    finally:
        handle.remove()
    return torch.cat(seen)


if __name__ == "__main__":
    main()
