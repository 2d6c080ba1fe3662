"""How: where and how fast a run goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eckart.runs.engine.base import Engine
from eckart.runs.engine.local import HERE
from eckart.support.progress import Track, mute, silent


@dataclass(frozen=True)
class How:
    """Where and how fast a run goes. None of it changes a number beyond rounding.

    Attributes:
        device: of the model while it is calibrated, factored and evaluated.
        batch_size: calibration rows at a time.
        cache: folder for moments; None keeps none.
        data: folder with local copies of known corpora; None asks the hub.
        workers: probes trained at a time.
        engine: where work runs; see `engine.choose.open_engine`.
        track: shows progress.
        say: shows a line, before what it is about is computed.
        trust_remote_code: run code that comes with a model's files; never asked for, and no part of a recipe, which
            people take from others.
        remote_code: a checkpoint carries code by which those who trust it load it without eckart.
    """

    device: str = "cpu"
    batch_size: int = 8
    cache: Path | None = None
    data: Path | None = None
    track: Track = silent
    workers: int = 1
    engine: Engine = HERE
    say: Callable[[str], None] = mute
    trust_remote_code: bool = False
    remote_code: bool = False
