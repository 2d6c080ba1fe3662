"""A model of any architecture trained on the built-in corpus with the built-in model's tokenizer, and measured."""

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from loop import add_schedule_options, make_optimizer, run_steps
from train_builtin import DOMAINS, Plan, draw_batch, tokenize_texts
from transformers import PreTrainedTokenizerFast

from eckart.data.builtin import builtin_model_path


def add_options(parser: argparse.ArgumentParser, *, minutes: float) -> None:
    """The options of a `Plan`, less the file for the figures, which lies in --out."""
    add_schedule_options(parser, minutes=minutes)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens in a step")


def builtin_tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(builtin_model_path())


def train_and_save(
    model: Any,
    tokenizer: PreTrainedTokenizerFast,
    plan: Plan,
    *,
    prose_share: float,
    loss: Callable[[Any, torch.Tensor], torch.Tensor],
    perplexity: Callable[[Any, torch.Tensor], float],
    batch: Callable[[torch.Tensor], torch.Tensor] = lambda tokens: tokens,
    **facts: Any,
) -> None:
    """Trains to the end of the plan, from the saved state where there is one; writes checkpoint and figures.

    Args:
        model: a transformers model.
        prose_share: of the windows, how many are prose; the others are code.
        loss: of a batch, differentiable; it is compiled where the plan says so.
        perplexity: of a stream of held-out tokens.
        batch: what becomes of a step's windows (windows, tokens) before `loss` has them.
        facts: what else the figures name.
    """
    streams = {domain: tokenize_texts(tokenizer, domain, "train") for domain in DOMAINS}
    print(f"{model.num_parameters()} parameters", flush=True)
    loss_of = torch.compile(loss, dynamic=False) if plan.compile else loss
    plan.out.mkdir(parents=True, exist_ok=True)
    state_file = plan.out.parent / f"{plan.out.name}.state.pt"
    counts = run_steps(
        model,
        lambda step: loss_of(model, batch(draw_batch(streams, prose_share, plan, step))),
        plan.schedule,
        make_optimizer(model, plan.peak_rate, plan.weight_decay),
        state_file,
        {"steps": 0, "seconds": 0.0},
    )
    model.eval().save_pretrained(plan.out)
    tokenizer.save_pretrained(plan.out)
    heldout = {domain: tokenize_texts(tokenizer, domain, "heldout") for domain in DOMAINS}
    metrics = {
        "heldout_perplexity": {domain: perplexity(model, heldout[domain]) for domain in DOMAINS},
        "parameters": model.num_parameters(),
        "tokens_seen": counts["steps"] * plan.batch_tokens,
        "steps": counts["steps"],
        "minutes": counts["seconds"] / 60,
        "seed": plan.seed,
        **facts,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    plan.metrics.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(metrics, indent=2))
    state_file.unlink()
