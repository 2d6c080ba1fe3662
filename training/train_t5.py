"""Trains a small encoder-decoder on the built-in corpus, of T5's architecture, to try compression on.

    python training/train_t5.py --out T5 --minutes 30

It reads the first half of a window of text and is asked for the second, as eckart halves plain text. Its tokenizer is
the built-in model's. Two CPU cores are enough. A run that is killed goes on from its last saved state when it is
started again with the same `--out`.
"""

import argparse
from typing import Any

import torch
from on_builtin import add_options, builtin_tokenizer, train_and_save
from train_builtin import LONG_WINDOW, Plan
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from eckart.data.encoding import specials_of
from eckart.data.pairs import decoder_inputs
from eckart.data.samples import halve
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
    add_options(parser, minutes=30.0)
    parser.add_argument("--layers", type=int, default=3, help="blocks of each stack")
    given = vars(parser.parse_args())
    layers = given.pop("layers")
    plan = Plan(**given, metrics=given["out"] / "training.json")
    tokenizer = builtin_tokenizer()
    specials = specials_of(tokenizer)
    train_and_save(
        make_model(tokenizer, layers, plan.seed),
        tokenizer,
        plan,
        prose_share=PROSE_SHARE,
        loss=compute_loss,
        perplexity=lambda model, tokens: (
            perplexity(model, tokens, length=LONG_WINDOW, limit=64, specials=specials).value
        ),
        batch=lambda windows: halve(windows, *specials),
        layers=layers,
    )


if __name__ == "__main__":
    main()
