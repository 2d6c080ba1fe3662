"""Time and memory of probing one task, and how both grow with layers and with examples.

    python benchmarks/probing.py [--model MODEL] [--task sst2] [--data DIR] [--texts 500 1000 2000] [--out FILE]

Each point runs in a process of its own: hidden states of every layer of MODEL (its first blocks, for the growth with
layers), then three seeds of probes and controls with one worker. Prints seconds of both stages, in brackets over those
of the first point, the peak resident memory above that of the loaded model, and the bytes of the states on disk.
Without --data it makes labelled texts from the built-in corpus (prose or code), so that it runs anywhere.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from measuring import lap, peak_bytes, write_json
from real_models import add_model_option

from eckart import Labelled, load_model, load_tokenizer, probe, read_labelled
from eckart.data.builtin import builtin_texts
from eckart.evals.hidden_states import read_hidden_states
from eckart.models.sites import blocks_of

SEEDS = 3
WARM_UP = 40


def read_rows(task: str, data: Path | None, count: int) -> Labelled:
    """Rows of the task, or lines of prose and of code."""
    if data is not None:
        return read_labelled(task, split="train", data=data).draw(count)
    lines = {
        domain: [line for text in builtin_texts(domain, "train") for line in text.splitlines() if len(line) > 40]
        for domain in ("prose", "code")
    }
    texts = [line for pair in zip(lines["prose"], lines["code"], strict=False) for line in pair][:count]
    labels = tuple(place % 2 for place in range(len(texts)))
    return Labelled(tuple(texts), labels, ("prose", "code"), tuple(range(len(texts))), {"corpus": "builtin"})


def measure(model_name: str, task: str, data: Path | None, texts: int, layers: int) -> dict[str, Any]:
    """One point: seconds of both stages, bytes on disk, peak memory above the loaded model's."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(model_name, dtype="float32"), load_tokenizer(model_name)
    blocks = blocks_of(model)
    layers = min(layers, len(blocks))
    del blocks[layers:]
    rows = read_rows(task, data, texts)
    with tempfile.TemporaryDirectory() as folder:  # once unmeasured: imports, and what is compiled at its first use
        probe(model, tokenizer, rows.draw(WARM_UP), seeds=1, cache=Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        before, seconds = peak_bytes(), dict[str, float]()
        with lap(seconds, "states"), read_hidden_states(model, tokenizer, rows.texts, cache=Path(folder)):
            pass
        stored = sum(file.stat().st_size for file in Path(folder).iterdir())
        with lap(seconds, "probes"):
            result = probe(model, tokenizer, rows, seeds=SEEDS, cache=Path(folder))
    return {
        "texts": len(rows),
        "layers": layers,
        "states_seconds": seconds["states"],
        "probes_seconds": seconds["probes"],
        "states_bytes": stored,
        "peak_above_model": peak_bytes() - before,
        "f1": result.value,
        "selectivity": result.scores["selectivity"].value,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_option(parser)
    parser.add_argument("--task", default="sst2")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--texts", type=int, nargs="+", default=[500, 1000, 2000])
    parser.add_argument("--layers", type=int, nargs="+", help="default: a third, two thirds, all of the blocks")
    parser.add_argument("--out", type=Path, help="also write the points as JSON")
    parser.add_argument("--point", type=int, nargs=2, help="used by the benchmark itself")
    arguments = parser.parse_args()
    if arguments.point:
        print(json.dumps(measure(arguments.model, arguments.task, arguments.data, *arguments.point)))
        return
    whole = len(blocks_of(load_model(arguments.model)))
    layers = arguments.layers or sorted({max(1, whole // 3), max(1, 2 * whole // 3), whole})
    points = [(count, whole) for count in arguments.texts] + [
        (max(arguments.texts), some) for some in layers if some != whole
    ]
    measured = []
    print("texts  layers   states s (over first)   probes s (over first)   peak MB   disk MB")
    for texts, some in points:
        command = [sys.executable, __file__, "--model", arguments.model, "--task", arguments.task]
        command += ["--data", str(arguments.data)] if arguments.data else []
        finished = subprocess.run(
            [*command, "--point", str(texts), str(some)], check=True, stdout=subprocess.PIPE, text=True
        )
        point = json.loads(finished.stdout.strip().splitlines()[-1])
        measured.append(point)
        relative = {
            stage: point[f"{stage}_seconds"] / measured[0][f"{stage}_seconds"] for stage in ("states", "probes")
        }
        point["relative"] = relative
        stages = "   ".join(f"{point[f'{stage}_seconds']:8.1f} (x{times:9.1f})" for stage, times in relative.items())
        sizes = "  ".join(f"{point[key] / 1e6:8.1f}" for key in ("peak_above_model", "states_bytes"))
        print(f"{point['texts']:5d}  {point['layers']:6d}   {stages}   {sizes}", flush=True)
    write_json(arguments.out, measured)


if __name__ == "__main__":
    main()
