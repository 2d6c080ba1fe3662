"""`eckart demo`: the built-in model by five methods at five sizes, in one table."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer

from eckart.allocation import plan
from eckart.calibration.moments import calibrate
from eckart.cli.terminal import TerminalTrack, console, megabytes, table
from eckart.compression.replace import compress
from eckart.data.builtin import builtin_model_path
from eckart.data.corpora import read_text
from eckart.data.encoding import encode
from eckart.data.samples import sample_windows
from eckart.evals.perplexity import perplexity
from eckart.evals.speed import decode_speed
from eckart.lowrank import Factored, build_method
from eckart.models.loading import load_model, load_tokenizer
from eckart.support.files import write_whole
from eckart.support.progress import Track, silent
from eckart.support.sizes import num_params

METHODS = ("svd", "asvd-0", "asvd-i", "nsvd-i", "sfsd")
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)
# Enough tokens for a moment of full rank (the widest input has 640 channels), few enough for a coffee's length.
SAMPLES, LENGTH, WINDOWS = 64, 256, 24
# Calibrated on prose: prose is then the domain, and code is out of it.
IN_DOMAIN, OUT_OF_DOMAIN = "builtin/prose", "builtin/code"


@dataclass(frozen=True)
class DemoRow:
    """One compressed model: perplexity in and out of the calibration domain, size, speed against dense."""

    method: str
    keep: float
    in_domain: float
    out_of_domain: float
    params: int
    bytes: int
    decode_speed: float

    def to_dict(self) -> dict[str, float | int | str]:
        return asdict(self)


def run_demo(
    *, methods: Sequence[str] = METHODS, keeps: Sequence[float] = KEEPS, track: Track = silent
) -> Iterator[DemoRow]:
    """Compress the built-in model at every size by every method; the dense model comes first, as method "dense".

    One calibration serves every method and size. Bytes are of the stored type, float16; arithmetic is float32.
    """
    model = load_model(builtin_model_path())
    stored_bytes = model.dtype.itemsize
    model = model.float()
    tokenizer = load_tokenizer(builtin_model_path())
    streams = [encode(read_text(name, split="test"), tokenizer) for name in (IN_DOMAIN, OUT_OF_DOMAIN)]
    tokens = sample_windows(read_text(IN_DOMAIN), tokenizer, samples=SAMPLES, length=LENGTH)
    statistics = calibrate(model, tokens, build_method("asvd-i"), track=track)

    def row(name: str, keep: float, candidate: torch.nn.Module) -> DemoRow:
        values = [
            perplexity(candidate, stream, length=LENGTH, limit=WINDOWS).value  # type: ignore[arg-type]
            for stream in streams
        ]
        params = num_params(candidate)
        speed = 1.0 if candidate is model else decode_speed(candidate, model)  # type: ignore[arg-type]
        return DemoRow(name, keep, values[0], values[1], params, params * stored_bytes, speed)

    yield row("dense", 1.0, model)
    cases = [(keep, name) for keep in keeps for name in methods]
    spectra: dict[str, dict[str, Factored]] = {name: {} for name in methods}
    for keep, name in track(cases, "compressing", len(cases)):
        candidate = copy.deepcopy(model)
        compress(candidate, name, plan(candidate, keep), statistics, spectra=spectra[name])
        yield row(name, keep, candidate)


def command(
    out: Annotated[Path | None, typer.Option(help="Also write the table as JSON to this file")] = None,
) -> None:
    """Compress the built-in model by five methods at five sizes and print what it cost.

    Needs no network. Calibrated on Python's documentation (prose); code is the text it has not been calibrated on.
    """
    rows = []
    for row in run_demo(track=TerminalTrack(console)):
        rows.append(row)
        if not console.is_terminal:
            console.print(f"{row.method} {row.keep}: {row.in_domain:.2f} in domain, {row.out_of_domain:.2f} out of it")
    console.print(
        table(
            "Perplexity of held-out text after compression, calibrated on prose",
            ["method", "keep", "prose (in)", "code (out)", "parameters", "stored", "decode speed"],
            [
                [
                    row.method,
                    f"{row.keep:.1f}",
                    f"{row.in_domain:.2f}",
                    f"{row.out_of_domain:.2f}",
                    f"{row.params:,}",
                    megabytes(row.bytes),
                    f"{row.decode_speed:.2f} x",
                ]
                for row in rows
            ],
        )
    )
    console.print(
        "keep is the share of each linear kept; embeddings stay dense. Decode speed is against dense, same run."
    )
    if out is not None:
        write_whole(out, json.dumps([row.to_dict() for row in rows], indent=1))
