"""Compressing a model of Llama-7B's shape with one block in memory: seconds a block, peak memory, a kill on the way.

    python benchmarks/outofcore.py --step make --folder DIR [--layers 32 | --mixture --layers 2]
    python benchmarks/outofcore.py --step compress --folder DIR [--model smollm2] [--kill-after 2] [--json FILE]

`make` writes random weights in bfloat16 (13.5 GB), a few blocks at a time, and the built-in tokenizer. `compress` runs
asvd-i, or what `--method` names, at keep 0.7 in a process of its own, kills it (SIGKILL) once `--kill-after` blocks are
done, resumes it, and stops it for good after `--blocks` of them; 0 lets it come through. Printed are seconds a block
and how many times the floor (floor.py) of asvd-i they are, the peak resident memory of each process (VmHWM: mapped
pages count) over the model's bytes, and what all blocks of the model would take at that pace. Of kfac and best, what
comes before the first block (gradients, and losses of best) is of all the blocks that there are: make as many as are to
be compressed.

With `--mixture` the model is of Qwen3-30B-A3B's shape, 128 experts a block, 8 for each token; there is no floor of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from floor import factor_work, forward_work, measure_rates, moments_work
from measuring import machine, peak_bytes, write_json
from real_models import add_model_option
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, PreTrainedConfig, Qwen3MoeConfig

from eckart import load_tokenizer
from eckart.data.builtin import builtin_model_path
from eckart.models.shards import write_index, write_shard
from eckart.runs.how import How
from eckart.runs.out_of_core import compress_out_of_core
from eckart.runs.recipe import parse_recipe

BLOCKS_A_SHARD = 2
KEEP = 0.7


def shape_of(arguments: argparse.Namespace) -> PreTrainedConfig:
    """Llama-7B, or what the arguments make of it; or Qwen3-30B-A3B with as many layers as they say."""
    if arguments.mixture:
        settings: dict[str, Any] = {
            "architectures": ["Qwen3MoeForCausalLM"],
            "vocab_size": 32000,
            "hidden_size": 2048,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_hidden_layers": arguments.layers,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }
        return Qwen3MoeConfig(**settings)
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=32000,
        hidden_size=arguments.hidden,
        intermediate_size=arguments.intermediate,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.heads,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def block_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """{name in the files: shape} of a block's weights."""
    wide, heads = config.hidden_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or wide // heads
    queries, keys = heads * width, config.num_key_value_heads * width
    shapes: dict[str, tuple[int, ...]] = {
        "self_attn.q_proj": (queries, wide),
        "self_attn.k_proj": (keys, wide),
        "self_attn.v_proj": (keys, wide),
        "self_attn.o_proj": (wide, queries),
        "input_layernorm": (wide,),
        "post_attention_layernorm": (wide,),
    }
    inner, places = config.intermediate_size, ["mlp"]
    if isinstance(config, Qwen3MoeConfig):
        shapes |= {"mlp.gate": (config.num_experts, wide)}
        shapes |= {"self_attn.q_norm": (width,), "self_attn.k_norm": (width,)}
        inner, places = config.moe_intermediate_size, [f"mlp.experts.{number}" for number in range(config.num_experts)]
    for place in places:
        shapes |= {f"{place}.{name}_proj": (inner, wide) for name in ("gate", "up")}
        shapes |= {f"{place}.down_proj": (wide, inner)}
    return shapes


def random_block(config: PreTrainedConfig, number: int) -> dict[str, Tensor]:
    """One block's weights: as large as training leaves them, so that activations stay near one."""
    generator = torch.Generator().manual_seed(number)
    block = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.randn(shape, generator=generator, dtype=torch.bfloat16) / shape[1] ** 0.5
        for name, shape in block_shapes(config).items()
    }
    return {f"model.layers.{number}.{name}.weight": tensor for name, tensor in block.items()}


def make_model(folder: Path, config: PreTrainedConfig) -> None:
    """The checkpoint, and the built-in tokenizer, whose ids fit the vocabulary."""
    folder.mkdir(parents=True, exist_ok=True)
    count = -(-config.num_hidden_layers // BLOCKS_A_SHARD) + 1
    files: dict[str, list[str]] = {}
    total = 0
    for shard in range(count):
        tensors: dict[str, Tensor] = {}
        if shard == count - 1:
            generator = torch.Generator().manual_seed(config.num_hidden_layers)
            shape = (config.vocab_size, config.hidden_size)
            tensors["model.embed_tokens.weight"] = torch.randn(shape, generator=generator, dtype=torch.bfloat16)
            head = torch.randn(shape, generator=generator, dtype=torch.bfloat16)
            tensors["lm_head.weight"] = head / config.hidden_size**0.5
            tensors["model.norm.weight"] = torch.ones(config.hidden_size, dtype=torch.bfloat16)
        else:
            first = shard * BLOCKS_A_SHARD
            for number in range(first, min(first + BLOCKS_A_SHARD, config.num_hidden_layers)):
                tensors |= random_block(config, number)
        name = f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
        write_shard(folder / name, tensors)
        files[name] = sorted(tensors)
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    write_index(folder, files, total)
    config.save_pretrained(folder)
    load_tokenizer(builtin_model_path()).save_pretrained(folder)
    print(f"{folder}: {total:,} bytes in {count} files, peak memory {peak_bytes() / 2**20:,.0f} MiB")


def run_child(arguments: argparse.Namespace) -> None:
    """The compression itself."""
    calibration = {"corpus": "builtin", "samples": arguments.samples, "length": arguments.length}
    recipe = parse_recipe(
        {
            "model": str(source_of(arguments)),
            "dtype": arguments.dtype,
            "method": arguments.method,
            "keep": KEEP,
            "calibration": calibration,
        }
    )
    compress_out_of_core(recipe, place_of(arguments), How(batch_size=arguments.batch), resume=True)


def floor_of(arguments: argparse.Namespace) -> float | None:
    """The seconds that a block's products take at this machine's rates, now: forward, moments and factors.

    None of a mixture: which expert has how many tokens is not known before it runs.
    """
    config = AutoConfig.from_pretrained(source_of(arguments))
    if not isinstance(config, LlamaConfig):
        return None
    samples, length = arguments.samples, arguments.length
    work = forward_work(config, samples, length) + moments_work(config, samples, length) + factor_work(config, KEEP)
    return measure_rates(2048).seconds(work)


def source_of(arguments: argparse.Namespace) -> Path:
    """The dense model: --model, or what `make` writes."""
    return Path(arguments.model or arguments.folder)


def place_of(arguments: argparse.Namespace) -> Path:
    """Where the compressed model goes."""
    folder: Path = arguments.folder
    return folder.with_name(f"{folder.name}-outofcore-{arguments.method}")


def records_of(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What the journal has, a record a block."""
    out = place_of(arguments)
    journal = out.with_name(f".{out.name}.work") / "journal.jsonl"
    if not journal.is_file():
        return []
    lines = journal.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[1:-1]]


def watch(arguments: argparse.Namespace, until: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run until the journal has so many blocks, then kill: what was seen, and the journal; 0 lets the run end."""
    start, before, peak = time.perf_counter(), len(records_of(arguments)), 0
    seen: list[dict[str, Any]] = []
    child = subprocess.Popen([sys.executable, *sys.argv, "--step", "child"])
    while child.poll() is None:
        try:
            peak = max(peak, peak_bytes(child.pid))
        except (FileNotFoundError, ProcessLookupError, StopIteration):
            continue  # it has just ended
        seen = records_of(arguments) or seen
        if until and len(seen) >= until:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
        time.sleep(0.2)
    if child.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"the run failed with status {child.returncode}")
    killed = child.returncode != 0
    blocks = [before, len(seen) if killed else arguments.layers]
    return {"seconds": time.perf_counter() - start, "peak_bytes": peak, "blocks": blocks, "killed": killed}, seen


def main() -> None:
    """Make, or compress and tell."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", choices=("make", "compress", "child"), required=True)
    parser.add_argument(
        "--folder", type=Path, required=True, help="where `make` writes; the compressed model goes next to it"
    )
    add_model_option(parser, None)
    parser.add_argument("--mixture", action="store_true", help="of Qwen3-30B-A3B's shape")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=11008)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--method", default="asvd-i", help="asvd-i, kfac, best")
    parser.add_argument("--blocks", type=int, default=4, help="stop after so many; 0 for all")
    parser.add_argument("--kill-after", type=int, default=2, help="and kill once on the way; 0 for never")
    parser.add_argument("--resume", action="store_true", help="go on from what an earlier run of this kind has done")
    parser.add_argument("--dtype", default="auto", help="float32 where a processor has no units for 16 bits")
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.step == "make":
        make_model(arguments.folder, shape_of(arguments))
        return
    if arguments.step == "child":
        run_child(arguments)
        return
    out = place_of(arguments)
    if not arguments.resume:
        for folder in (out, out.with_name(f".{out.name}.work")):
            shutil.rmtree(folder, ignore_errors=True)
    arguments.layers = json.loads((source_of(arguments) / "config.json").read_text())["num_hidden_layers"]
    runs: list[dict[str, Any]] = []
    seen: list[dict[str, Any]] = []
    for until in [arguments.kill_after, arguments.blocks] if arguments.kill_after else [arguments.blocks]:
        run, seen = watch(arguments, until)
        runs.append(run)
    dense = sum(file.stat().st_size for file in source_of(arguments).glob("*.safetensors"))
    blocks = [{"block": number, **record["seconds"]} for number, record in enumerate(seen)]
    print(f"model {dense / 2**30:.2f} GiB, {arguments.samples} x {arguments.length} tokens, {arguments.layers} blocks")
    floor = floor_of(arguments)
    for block in blocks:
        stages = ", ".join(f"{stage} {value:.1f} s" for stage, value in block.items() if stage != "block")
        block["whole"] = sum(value for stage, value in block.items() if stage != "block")
        over = f"; {block['whole'] / floor:.1f} x the floor of {floor:.1f} s" if floor else ""
        print(f"block {block['block']}: {stages}{over}")
    for run in runs:
        first, last = run["blocks"]
        end = "killed" if run["killed"] else "came through"
        print(
            f"blocks {first} ... {last - 1}: {run['seconds']:.1f} s, peak memory {run['peak_bytes'] / 2**20:,.0f} MiB, "
            f"{run['peak_bytes'] / dense:.0%} of the model; {end}"
        )
    whole = sum(block["whole"] for block in blocks) / max(len(blocks), 1) * arguments.layers
    first = blocks[: runs[0]["blocks"][1]]
    before = runs[0]["seconds"] - sum(block["whole"] for block in first)
    print(f"before the first block: {before:.1f} s")
    print(f"all {arguments.layers} blocks at that pace: {whole / 60:.1f} min")
    facts = {"machine": machine(), "settings": vars(arguments), "model_bytes": dense, "floor_seconds": floor}
    write_json(arguments.json, {**facts, "blocks": blocks, "runs": runs, "whole_seconds": whole})


if __name__ == "__main__":
    main()
