"""Tokens per second on a device, dense and low-rank: prompts, and steps behind a cache. Not a program: see gpu.py."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from gpu_stages import make_model
from inference import LAYOUTS, low_rank, rank_of
from measuring import median_seconds, now
from transformers import LlamaConfig, PreTrainedModel, StaticCache

from eckart.models.sites import find_sites, replace_module

KEEPS = (0.8, 0.6, 0.5)
# Tokens that are generated at most, warming up and capturing included.
STEPS = 256


def replaced(model: PreTrainedModel, keep: float, layout: Any, where: dict[str, Any]) -> None:
    """Random low-rank linears in place of all, in place."""
    for site in find_sites(model):
        kept = rank_of(site.d_out, site.d_in, keep, layout, 32)
        replace_module(model, site.name, low_rank(site.d_out, site.d_in, kept, layout, where))


@torch.inference_mode()
def measure_tokens(
    entry: dict[str, Any],
    device: torch.device,
    config: LlamaConfig,
    note: Callable[[dict[str, Any]], bool],
    prompt: int,
    compiled: bool,
) -> None:
    """Tokens per second of a few blocks: a prompt, and a step of one and of sixteen sequences behind a cache.

    `note` gets the entry after each model, and says whether there is time for the next.
    """
    where: dict[str, Any] = {"device": device, "dtype": torch.bfloat16}
    variants: list[tuple[str, float, Any]] = [("dense", 1.0, None)]
    variants += [(f"{layout} {keep}", keep, layout) for keep in KEEPS for layout in LAYOUTS]
    for name, keep, layout in variants:
        model = make_model(config, device)
        if layout is not None:
            replaced(model, keep, layout, where)
        row: dict[str, float] = {}
        ids = torch.ones(1, prompt, dtype=torch.int64, device=device)
        read = partial(model.base_model, input_ids=ids, use_cache=False)
        row["prompt"] = prompt / median_seconds(read, device, 5)
        for sequences in (1, 16):
            step = stepping(model, sequences, config, prompt // 4)
            row[f"step of {sequences}"] = sequences / median_seconds(partial(eight_times, step), device) * 8
            if device.type == "cuda":
                graph = captured(step)
                row[f"step of {sequences}, graph"] = (
                    8 * sequences / median_seconds(partial(eight_times, graph.replay), device, 5)
                )
                del graph
        if compiled:
            start = now(device)
            try:
                fast = torch.compile(model.base_model)
                read = partial(fast, input_ids=ids, use_cache=False)
                row["prompt, compiled"] = prompt / median_seconds(read, device, 5)
                graph = captured(stepping(model, 1, config, prompt // 4, fast))
                row["step of 1, compiled graph"] = 8 / median_seconds(partial(eight_times, graph.replay), device, 5)
                del graph
            except Exception:  # noqa: BLE001 (the next one may compile)
                print(f"{name}: {traceback.format_exc()}", flush=True)
            row["seconds to compile"] = now(device) - start
            torch.compiler.reset()
        entry[name] = {key: round(value, 1) for key, value in row.items()}
        del model, read
        if not note(entry):
            entry["ended early"] = True
            return


def eight_times(run: Callable[[], object]) -> None:
    """A stretch that is long enough to time."""
    for _ in range(8):
        run()


def stepping(
    model: PreTrainedModel, sequences: int, config: LlamaConfig, cached: int, run: Callable[..., object] | None = None
) -> Callable[[], object]:
    """Reads one token of each sequence behind a static cache, which has room for STEPS of them."""
    cache = StaticCache(config=config, max_cache_len=cached + STEPS)
    ids = torch.ones(sequences, cached, dtype=torch.int64, device=model.device)
    model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
    last, step_of = ids[:, :1].contiguous(), model.base_model if run is None else run

    def step() -> object:
        return step_of(input_ids=last, past_key_values=cache, use_cache=True)

    return step


def captured(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """The step as a graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph
