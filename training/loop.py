"""Loop: what every training script here shares: the schedule, the optimizer, steps that are resumed after a kill."""

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

SAVE_EVERY_SECONDS = 180.0
PRINT_EVERY_STEPS = 50


@dataclass(frozen=True)
class Schedule:
    """How long a run goes on, and how fast.

    Attributes:
        minutes: time for the steps.
        steps: their number, in place of the time; the outcome then does not depend on the clock.
        peak_rate: highest learning rate. warm_up: share of the run before it.
    """

    minutes: float
    steps: int | None
    peak_rate: float
    warm_up: float

    def progress(self, step: int, elapsed: float) -> float:
        """How much of the run is done, 0 to 1: by steps where their number is given, else by the clock."""
        return step / self.steps if self.steps else elapsed / (60 * self.minutes)

    def rate(self, progress: float) -> float:
        """The learning rate: a linear warm-up, then half a cosine down to a fiftieth of the peak."""
        if progress < self.warm_up:
            return self.peak_rate * max(progress / self.warm_up, 0.02)
        done = min((progress - self.warm_up) / (1 - self.warm_up), 1.0)
        return self.peak_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def add_schedule_options(parser: argparse.ArgumentParser, *, minutes: float) -> None:
    """The command-line options of a `Schedule`, and those that every training script has."""
    parser.add_argument("--minutes", type=float, default=minutes, help="time for the training steps")
    parser.add_argument("--steps", type=int, default=None, help="a number of steps, in place of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--peak-rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warm-up", type=float, default=0.04, help="share of the run before the peak")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch.compile (needs a C++ compiler)",
    )


def make_optimizer(model: torch.nn.Module, rate: float, weight_decay: float) -> torch.optim.AdamW:
    """AdamW, whose weight decay is of matrices and not of vectors."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def take_step(model: torch.nn.Module, optimizer: torch.optim.AdamW, loss: torch.Tensor, rate: float) -> float:
    """One step down a loss, its gradient clipped at 1; the loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def run_steps(
    model: torch.nn.Module,
    loss_of: Callable[[int], torch.Tensor],
    schedule: Schedule,
    optimizer: torch.optim.AdamW,
    state_file: Path,
    counts: dict[str, Any],
) -> dict[str, Any]:
    """Train to the end of the schedule, from the saved state where there is one; the counts of the run.

    Args:
        loss_of: the loss of a step, decided by its number alone, so that a run can be resumed.
        counts: {"steps": 0, "seconds": 0.0} and whatever else a resumed run has to know.
    """
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        counts = state["counts"]
        print(f"goes on from step {counts['steps']} after {counts['seconds'] / 60:.1f} minutes", flush=True)
    saved = time.monotonic()
    started = saved - counts["seconds"]
    smooth = math.nan
    model.train()
    while (progress := schedule.progress(counts["steps"], counts["seconds"])) < 1:
        loss = take_step(model, optimizer, loss_of(counts["steps"]), schedule.rate(progress))
        smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
        counts["steps"] += 1
        now = time.monotonic()
        counts["seconds"] = now - started
        if counts["steps"] % PRINT_EVERY_STEPS == 0:
            done = schedule.progress(counts["steps"], counts["seconds"])
            remaining = counts["seconds"] * (1 - done) / done
            print(f"step {counts['steps']}: loss {smooth:.3f}, {max(remaining, 0.0) / 60:.1f} minutes left", flush=True)
        if now - saved > SAVE_EVERY_SECONDS:
            save_state(state_file, model, optimizer, counts)
            saved = now
    save_state(state_file, model, optimizer, counts)
    return counts


def save_state(file: Path, model: torch.nn.Module, optimizer: torch.optim.AdamW, counts: dict[str, Any]) -> None:
    """Write the state at once, so that a killed run never leaves half of one."""
    unfinished = file.with_suffix(".unfinished")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "counts": counts}
    torch.save(state, unfinished)
    unfinished.replace(file)
