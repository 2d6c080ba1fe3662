"""Throughput in vLLM, of a dense checkpoint and of compressed ones made of it, as ratios in the same run.

    eckart compress MODEL SMALL --method svd --keep 0.6 --rank-multiple 32
    .venv-vllm/bin/python benchmarks/vllm_throughput.py MODEL SMALL [SMALL ...] [--dtype bfloat16] [--eager]
        [--sequences 1 8] [--prompt 256] [--tokens 33] [--rounds 3] [--processes 1] [--json FILE]

Needs vLLM's interpreter (`make vllm-env`). Every checkpoint has an engine of its own, a process that waits while the
others work, and all take turns; a speed is the median over the rounds of the dense one's time over the other's in one
round, so that what slows the machine for a while slows both. `prompt` is reading that many tokens of each sequence, and
`token` one step of generating, of all sequences at once: what a longer answer takes beyond an answer of one token. The
tokens are random, and engines keep no prompts from before.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from pathlib import Path
from typing import Any

from measuring import machine, write_json

# Tokens behind which a step of generating is timed, and the first word that is no special one of common tokenizers.
BEHIND, FIRST = 16, 100


def main() -> None:
    """Time all, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", type=Path, help="the dense checkpoint")
    parser.add_argument("compressed", type=Path, nargs="+", help="compressed ones")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each sequence that are read")
    parser.add_argument("--tokens", type=int, default=33, help="tokens that are generated")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--processes", type=int, default=1, help="tensor parallelism")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engines = {place.name: _engine(place, options) for place in (options.dense, *options.compressed)}
    entries = [entry for count in options.sequences for entry in _time(engines, count, options)]
    print(f"{'checkpoint':<28} {'sequences':>9} {'prompt, ms':>11} {'token, ms':>10} {'prompt':>7} {'token':>7}")
    for entry in entries:
        print(
            f"{entry['checkpoint']:<28} {entry['sequences']:>9} {entry['prompt_ms']:>11.1f} {entry['token_ms']:>10.2f} "
            f"{entry['prompt_speed']:>7.2f} {entry['token_speed']:>7.2f}"
        )
    if options.json:
        settings = {name: str(value) for name, value in vars(options).items()}
        write_json(options.json, {"machine": machine(), "settings": settings, "entries": entries})


def _engine(place: Path, options: argparse.Namespace) -> Any:
    from vllm import LLM

    return LLM(
        str(place),
        dtype=options.dtype,
        enforce_eager=options.eager,
        tensor_parallel_size=options.processes,
        max_model_len=max(options.prompt, BEHIND + options.tokens) + 8,
        max_num_seqs=max(options.sequences),
        enable_prefix_caching=False,
        seed=0,
    )


def _time(engines: dict[str, Any], count: int, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Of each checkpoint, at so many sequences at a time; the first is the dense one."""
    numbers = random.Random(count)
    texts = {
        length: [[numbers.randrange(FIRST, 4000) for _ in range(length)] for _ in range(count)]
        for length in (options.prompt, BEHIND)
    }
    prompts: dict[str, list[float]] = {name: [] for name in engines}
    steps: dict[str, list[float]] = {name: [] for name in engines}
    for turn in range(options.rounds + 1):
        for name, engine in engines.items():
            prompt = _seconds(engine, texts[options.prompt], 1)
            short, long = _seconds(engine, texts[BEHIND], 1), _seconds(engine, texts[BEHIND], options.tokens)
            if turn:  # the first one warms up
                prompts[name].append(prompt)
                steps[name].append((long - short) / (options.tokens - 1))
    dense = next(iter(engines))
    return [
        {
            "checkpoint": name,
            "sequences": count,
            "prompt_ms": 1000 * statistics.median(prompts[name]),
            "token_ms": 1000 * statistics.median(steps[name]),
            "prompt_speed": _speed(prompts[dense], prompts[name]),
            "token_speed": _speed(steps[dense], steps[name]),
        }
        for name in engines
    ]


def _speed(dense: list[float], other: list[float]) -> float:
    return statistics.median(theirs / ours for theirs, ours in zip(dense, other, strict=True))


def _seconds(engine: Any, texts: list[list[int]], tokens: int) -> float:
    from vllm import SamplingParams

    greedy = SamplingParams(temperature=0, max_tokens=tokens, min_tokens=tokens, ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": text} for text in texts]
    start = time.perf_counter()
    engine.generate(prompts, greedy, use_tqdm=False)
    return time.perf_counter() - start


if __name__ == "__main__":
    # Read by vLLM as it is imported; each can be set from outside.
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    main()
