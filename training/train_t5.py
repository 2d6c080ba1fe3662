"""Trains a small encoder-decoder on the built-in corpus, of T5's architecture, to try compression on.

    python training/train_t5.py --out T5 --minutes 30

It reads the first half of a window of text and is asked for the second, as eckart halves plain text. Its tokenizer is
the built-in model's. Two CPU cores are enough. A run that is killed goes on from its last saved state when it is
started again with the same `--out`.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from loop import Schedule, add_schedule_options, make_optimizer, run_steps
from train_builtin import DOMAINS, LONG_WINDOW, Plan, draw_batch, tokenize_texts
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from eckart.data.builtin import builtin_model_path
from eckart.data.pairs import decoder_inputs
from eckart.data.tokens import halve, specials_of
from eckart.evals.perplexity import perplexity

PROSE_SHARE = 0.6


def make_model(tokenizer: PreTrainedTokenizerFast, layers: int, seed: int) -> T5ForConditionalGeneration:
    """As many blocks in the encoder as in the decoder, of the width of the built-in model's."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "d_model": 256,
        "d_kv": 32,
        "d_ff": 512,
        "num_heads": 8,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "feed_forward_proj": "gated-gelu",
        "dropout_rate": 0.0,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "decoder_start_token_id": tokenizer.pad_token_id,
    }
    return T5ForConditionalGeneration(T5Config(**settings))


def compute_loss(model: T5ForConditionalGeneration, pairs: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood (nats) of each token of the targets."""
    source, target = pairs.chunk(2, 1)
    logits = model(input_ids=source, decoder_input_ids=decoder_inputs(model, target), use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small encoder-decoder.")
    add_schedule_options(parser, minutes=30.0)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens in a step, of sources and targets")
    parser.add_argument("--layers", type=int, default=3, help="blocks of each stack")
    given = vars(parser.parse_args())
    layers, out = given.pop("layers"), given["out"]
    plan = Plan(**given, metrics=out / "training.json")
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(builtin_model_path())
    specials = specials_of(tokenizer)
    streams = {domain: tokenize_texts(tokenizer, domain, "train") for domain in DOMAINS}
    model = make_model(tokenizer, layers, plan.seed)
    print(f"{model.num_parameters()} parameters", flush=True)
    loss = torch.compile(compute_loss, dynamic=False) if plan.compile else compute_loss
    optimizer = make_optimizer(model, plan.peak_rate, plan.weight_decay)
    schedule = Schedule(plan.minutes, plan.steps, plan.peak_rate, plan.warm_up)
    state_file = out.parent / f"{out.name}.state.pt"
    counts = run_steps(
        model,
        lambda step: loss(model, halve(draw_batch(streams, PROSE_SHARE, plan, step), *specials)),
        schedule,
        optimizer,
        state_file,
        {"steps": 0, "seconds": 0.0},
    )
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    heldout = {domain: tokenize_texts(tokenizer, domain, "heldout") for domain in DOMAINS}
    metrics = {
        "heldout_perplexity": {
            domain: perplexity(model, heldout[domain], length=LONG_WINDOW, limit=64, specials=specials).value
            for domain in DOMAINS
        },
        "parameters": model.num_parameters(),
        "tokens_seen": counts["steps"] * plan.batch_tokens,
        "steps": counts["steps"],
        "minutes": counts["seconds"] / 60,
        "seed": plan.seed,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    plan.metrics.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(metrics, indent=2))
    state_file.unlink()


if __name__ == "__main__":
    main()
