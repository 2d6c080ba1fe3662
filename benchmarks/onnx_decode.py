"""Speed and size in ONNX Runtime: a model, dense and low-rank, in float32 and in 8 bits.

    OMP_NUM_THREADS=1 python benchmarks/onnx_decode.py [--model smollm2] [--keep 0.6] [--method svd] [--held 64]
        [--rounds 15] [--folder DIR] [--json FILE]

The model is exported four times: as it is, with factors by a method that needs no text, and both with --int8. For each:
megabytes of the graph and its numbers; how many of the greedy tokens behind a prompt are those that transformers gives
of the same model in float32 (of an export in 8 bits some differ), counted up to the first that is not; and the speed of
a step of one token behind `held` tokens in the cache: the median, over rounds in which each takes a step in turn, of
the dense float32 model's time over its own. An export that is in --folder is taken from there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import machine, write_json
from real_models import add_model_option
from transformers import PreTrainedModel

from eckart.allocation import plan
from eckart.compression.replace import compress
from eckart.models.loading import load_model
from eckart.serving.onnx import export_onnx
from eckart.serving.onnx_decoder import OnnxDecoder

PROMPT, NEW, STEPS = 8, 32, 4


def exported(model: PreTrainedModel, folder: Path, *, int8: bool) -> tuple[OnnxDecoder, dict[str, Any]]:
    """The model in ONNX Runtime, and its megabytes and the seconds of the export."""
    start = time.perf_counter()
    if not folder.is_dir():
        export_onnx(model, folder, int8=int8)
    seconds = round(time.perf_counter() - start, 1)
    size = sum(file.stat().st_size for file in folder.glob("model.onnx*"))
    return OnnxDecoder(folder, threads=torch.get_num_threads()), {"MB": round(size / 1e6, 1), "export_s": seconds}


def equal_tokens(decoder: OnnxDecoder, ids: torch.Tensor, expected: torch.Tensor) -> int:
    """New tokens up to the first that is not the expected one."""
    got = decoder.generate(ids, max_new_tokens=NEW)[0, PROMPT:]
    length = min(len(got), expected.shape[1] - PROMPT)
    same = got[:length] == expected[0, PROMPT : PROMPT + length].numpy()
    return length if same.all() else int(same.argmin())


def step_seconds(decoders: dict[str, OnnxDecoder], held: int, rounds: int) -> dict[str, list[float]]:
    """{name: seconds of a step of one token in each round}, all of them in turns."""
    ids, mask = np.full((1, held), 9), np.ones((1, held + 1), dtype=np.int64)
    caches = {name: decoder.step(ids, mask[:, :held], decoder.empty_cache(1))[1] for name, decoder in decoders.items()}
    times: dict[str, list[float]] = {name: [] for name in decoders}
    for number in range(rounds + 1):
        for name, decoder in decoders.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                decoder.step(ids[:, :1], mask, caches[name])
            if number:  # the first is to warm up
                times[name].append((time.perf_counter() - start) / STEPS)
    return times


@torch.no_grad()
def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A row for each export."""
    model = load_model(arguments.model, dtype="float32")
    words = model.config.get_text_config().vocab_size
    ids = torch.randint(words, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    rows: dict[str, dict[str, Any]] = {}
    decoders: dict[str, OnnxDecoder] = {}
    for kind in ("dense", "low-rank"):
        if kind == "low-rank":
            compress(model, arguments.method, plan(model, keep=arguments.keep))
        expected = model.generate(  # type: ignore[operator]
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW,
            do_sample=False,
            repetition_penalty=1.0,
        )
        for int8 in (False, True):
            name = f"{kind}{', int8' if int8 else ''}"
            decoders[name], rows[name] = exported(model, folder / name.replace(", ", "-"), int8=int8)
            rows[name]["equal_tokens"] = (
                f"{equal_tokens(decoders[name], ids, expected)} of {expected.shape[1] - PROMPT}"
            )
    times = step_seconds(decoders, arguments.held, arguments.rounds)
    for name, seconds in times.items():
        ratios = [dense / own for dense, own in zip(times["dense"], seconds, strict=True)]
        rows[name]["speed"] = round(statistics.median(ratios), 2)
        rows[name]["step_ms"] = round(1e3 * statistics.median(seconds), 2)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser)
    parser.add_argument("--keep", type=float, default=0.6)
    parser.add_argument("--method", default="svd")
    parser.add_argument("--held", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", type=Path, help="where the exports are kept; default: nowhere")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", torch.get_num_threads())))
    with tempfile.TemporaryDirectory() as temporary:
        rows = measure(arguments, arguments.folder or Path(temporary))
    for name, row in rows.items():
        print(name.ljust(16), *(f"{key} {value}".ljust(24) for key, value in row.items()))
    settings = {key: str(value) for key, value in vars(arguments).items() if key not in ("json", "folder")}
    write_json(arguments.json, {"machine": machine(), **settings, "rows": rows})


if __name__ == "__main__":
    main()
