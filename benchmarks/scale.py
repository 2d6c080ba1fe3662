"""Memory and time of compressing a model of TinyLlama-1.1B's shape from disk.

    python benchmarks/scale.py [--method asvd-i] [--keep 0.7] [--layers 22] [--blocks 'last 2'] [--folder runs/scale]

Makes a random-weight bfloat16 checkpoint (once), then compresses it in a process of its own with 32 x 512 calibration
tokens, and prints seconds per stage and the peak resident memory of that process beside the bound
1.5 x one copy of the weights + 2 GB.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from eckart import load_tokenizer
from eckart.builtin import builtin_model_path
from eckart.pipeline import How, make_checkpoint
from eckart.recipe import parse_recipe


def tiny_llama(layers: int) -> LlamaConfig:
    """The published shape of TinyLlama-1.1B."""
    return LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def make_model(folder: Path, layers: int) -> None:
    """Random weights in bfloat16, and the built-in tokenizer, whose ids fit any vocabulary of 32000."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(tiny_llama(layers)).save_pretrained(folder)
    load_tokenizer(builtin_model_path()).save_pretrained(folder)


def compress(folder: Path, method: str, keep: float, blocks: str | None) -> None:
    """One compression, and what it took, as JSON on the last line."""
    recipe = parse_recipe(
        {
            "model": str(folder),
            "method": method,
            "rules": [{"keep": keep, "blocks": blocks}],
            "calibration": {"corpus": "builtin", "samples": 32, "length": 512},
        }
    )
    outcome = make_checkpoint(recipe, folder.with_name(folder.name + "-out"), How(batch_size=4), force=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kilobytes on Linux
    print(json.dumps({"peak": peak, "weights": outcome.report.bytes_before, "seconds": outcome.seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="asvd-i")
    parser.add_argument("--keep", type=float, default=0.7)
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--blocks", help='compress only these, such as "last 2": the peak is the same and comes sooner')
    parser.add_argument("--folder", type=Path, default=Path("runs/scale"))
    parser.add_argument("--step", choices=["make", "compress"], help="used by the benchmark itself")
    arguments = parser.parse_args()
    folder = arguments.folder / f"llama-{arguments.layers}"
    if arguments.step == "make":
        return make_model(folder, arguments.layers)
    if arguments.step == "compress":
        return compress(folder, arguments.method, arguments.keep, arguments.blocks)
    command = [sys.executable, __file__, "--folder", str(arguments.folder), "--layers", str(arguments.layers)]
    if not (folder / "config.json").is_file():
        subprocess.run([*command, "--step", "make"], check=True)
    command += ["--method", arguments.method, "--keep", str(arguments.keep), "--step", "compress"]
    command += ["--blocks", arguments.blocks] if arguments.blocks else []
    finished = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    facts = json.loads(finished.stdout.strip().splitlines()[-1])
    bound = 1.5 * facts["weights"] + 2e9
    print(
        f"{arguments.method}, keep {arguments.keep}, {arguments.layers} layers, "
        f"{facts['weights'] / 1e9:.2f} GB of weights"
    )
    print(", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in facts["seconds"].items()))
    print(f"peak resident memory {facts['peak'] / 1e9:.2f} GB; bound {bound / 1e9:.2f} GB")
    if facts["peak"] > bound:
        sys.exit("the bound is broken")


if __name__ == "__main__":
    main()
