"""Trains the built-in tokenizer and model on the built-in corpus, and measures them on its held-out part.

    python training/train_builtin.py --minutes 40

Two CPU cores are enough. A run that is killed goes on from its last saved state when it is started again with
the same `--out`. The outcome does not depend on the clock when `--steps` is given in place of `--minutes`:
the seed and the number of steps then decide it.
"""

import argparse
import json
import math
import platform
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from loop import Schedule, add_schedule_options, make_optimizer, run_steps, take_step
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from eckart.data.builtin import builtin_model_path, builtin_texts

DOMAINS = ("prose", "code")
VOCABULARY = 4096
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
WINDOW = 256
LONG_WINDOW = 1024
# One step in this many has long windows: otherwise positions past 256 would be promised by the configuration
# and never have been seen.
LONG_WINDOW_EVERY = 8
# A token drawn eight times still teaches something; without the cap an even mix would repeat prose 13 times.
MOST_PROSE_EPOCHS = 8.0
METRICS_FILE = Path(__file__).parent / "builtin_model.json"


@dataclass(frozen=True)
class Plan:
    """What a run was asked for."""

    minutes: float
    steps: int | None
    out: Path
    metrics: Path
    seed: int
    batch_tokens: int
    peak_rate: float
    weight_decay: float
    warm_up: float
    compile: bool

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.minutes, self.steps, self.peak_rate, self.warm_up)


def read_plan() -> Plan:
    parser = argparse.ArgumentParser(description="Train eckart's built-in model.")
    add_schedule_options(parser, minutes=40.0)
    parser.add_argument("--out", type=Path, default=builtin_model_path(), help="folder for the checkpoint")
    parser.add_argument("--metrics", type=Path, default=METRICS_FILE, help="file for the figures")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens in a step")
    return Plan(**vars(parser.parse_args()))


def train_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 4096 pieces, trained on both domains, that starts each document with `<s>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    # Prose twice: it is a third of the code's size, and the pieces are for both.
    texts = [
        *builtin_texts("prose", "train"),
        *builtin_texts("prose", "train"),
        *builtin_texts("code", "train"),
    ]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, tokenizer.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=LONG_WINDOW,
        clean_up_tokenization_spaces=False,
    )


def tokenize_texts(tokenizer: PreTrainedTokenizerFast, domain: str, split: str) -> torch.Tensor:
    """The documents' tokens, one after another: `<s>`, the document, `</s>`."""
    documents = tokenizer(builtin_texts(domain, split), verbose=False)["input_ids"]
    tokens = [token for document in documents for token in (*document, tokenizer.eos_token_id)]
    return torch.tensor(tokens, dtype=torch.long)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=LONG_WINDOW,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    return LlamaForCausalLM(config)


def draw_batch(streams: dict[str, torch.Tensor], prose_share: float, plan: Plan, step: int) -> torch.Tensor:
    """The windows of one step, decided by the seed and the step alone, so that a run can be resumed."""
    draw = np.random.default_rng((plan.seed, step))
    window = LONG_WINDOW if step % LONG_WINDOW_EVERY == LONG_WINDOW_EVERY - 1 else WINDOW
    rows = []
    for _ in range(plan.batch_tokens // window):
        stream = streams["prose" if draw.random() < prose_share else "code"]
        start = int(draw.integers(0, len(stream) - window))
        rows.append(stream[start : start + window])
    return torch.stack(rows)


def compute_loss(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood (nats) of each token after the first of its row."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=tokens, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), tokens[:, 1:].flatten())


# Compiled for each of the two shapes of a step, the loss and its gradient take two thirds of the time.
compute_loss_compiled = torch.compile(compute_loss, dynamic=False)


def measure_step_seconds(model: LlamaForCausalLM, loss_of: Callable[[int], torch.Tensor], plan: Plan) -> float:
    """The time of a step, from a few at a learning rate of zero, which leave the model as it was."""
    optimizer = make_optimizer(model, plan.peak_rate, plan.weight_decay)
    seconds = []
    for step in range(2 * LONG_WINDOW_EVERY):
        started = time.monotonic()
        take_step(model, optimizer, loss_of(step), 0.0)
        seconds.append(time.monotonic() - started)
    return float(np.mean(seconds[LONG_WINDOW_EVERY:]))  # the first round includes compilation


def train(model: LlamaForCausalLM, streams: dict[str, torch.Tensor], plan: Plan, state_file: Path) -> dict[str, Any]:
    """Trains to the end of the plan, from the saved state where there is one; the counts of the run."""
    loss = compute_loss_compiled if plan.compile else compute_loss
    counts: dict[str, Any] = {"steps": 0, "seconds": 0.0}
    if state_file.exists():
        counts["prose_share"] = torch.load(state_file, weights_only=True)["counts"]["prose_share"]
    else:
        seconds = measure_step_seconds(model, lambda step: loss(model, draw_batch(streams, 0.5, plan, step)), plan)
        planned = (plan.steps or int(60 * plan.minutes / seconds)) * plan.batch_tokens
        counts["prose_share"] = min(0.5, MOST_PROSE_EPOCHS * len(streams["prose"]) / planned)
        print(
            f"{seconds:.3f} s a step, {plan.batch_tokens / seconds:.0f} tokens/s, "
            f"about {planned / 1e6:.1f} M tokens; prose share {counts['prose_share']:.2f}",
            flush=True,
        )
    share = counts["prose_share"]
    optimizer = make_optimizer(model, plan.peak_rate, plan.weight_decay)
    return run_steps(
        model,
        lambda step: loss(model, draw_batch(streams, share, plan, step)),
        plan.schedule,
        optimizer,
        state_file,
        counts,
    )


def split_windows(tokens: torch.Tensor, window: int) -> Iterator[torch.Tensor]:
    """Batches of whole windows, without overlap; the rest at the end is left out."""
    rows = tokens[: len(tokens) // window * window].view(-1, window)
    yield from rows.split(max(1, 8192 // window))


@torch.no_grad()
def measure_perplexity(model: PreTrainedModel, tokens: torch.Tensor, window: int) -> float:
    """Perplexity in float32, each window on its own."""
    total, count = 0.0, 0
    for rows in split_windows(tokens, window):
        logits = model(input_ids=rows, use_cache=False).logits[:, :-1].flatten(0, 1)
        total += torch.nn.functional.cross_entropy(logits, rows[:, 1:].flatten(), reduction="sum").item()
        count += rows[:, 1:].numel()
    return math.exp(total / count)


def measure_unigram_perplexity(train: torch.Tensor, heldout: torch.Tensor) -> float:
    """Perplexity of the training tokens' frequencies (each count plus one) on the same held-out tokens."""
    counts = torch.bincount(train, minlength=VOCABULARY).double() + 1
    logs = (counts / counts.sum()).log()
    scored = torch.cat([rows[:, 1:].flatten() for rows in split_windows(heldout, WINDOW)])
    return math.exp(-logs[scored].mean().item())


def save_checkpoint(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> LlamaForCausalLM:
    """Writes the checkpoint in float16 and gives the model back as it will be loaded, in float32."""
    half = LlamaForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half.half()
    if not all(torch.isfinite(p).all() for p in half.parameters()):
        raise RuntimeError("a weight is outside the range of float16")
    half.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # written for its owner alone, which a built wheel would keep
    return LlamaForCausalLM.from_pretrained(out, dtype=torch.float32).eval()


def main() -> None:
    plan = read_plan()
    torch.set_num_threads(2)
    plan.out.mkdir(parents=True, exist_ok=True)
    # Training is fixed by the corpus, so a resumed run gets the same pieces again.
    tokenizer = train_tokenizer()
    streams = {domain: tokenize_texts(tokenizer, domain, "train") for domain in DOMAINS}
    heldout = {domain: tokenize_texts(tokenizer, domain, "heldout") for domain in DOMAINS}
    for domain in DOMAINS:
        print(f"{domain}: {len(streams[domain])} tokens to train on, {len(heldout[domain])} held out", flush=True)
    model = make_model(tokenizer, plan.seed)
    print(f"{model.num_parameters()} parameters")
    state_file = plan.out.parent / f"{plan.out.name}.state.pt"
    counts = train(model, streams, plan, state_file)
    stored = save_checkpoint(model, tokenizer, plan.out)

    every = torch.cat([streams[domain] for domain in DOMAINS])
    perplexity = {domain: measure_perplexity(stored, heldout[domain], WINDOW) for domain in DOMAINS}
    long_perplexity = {domain: measure_perplexity(stored, heldout[domain], LONG_WINDOW) for domain in DOMAINS}
    unigram = {domain: measure_unigram_perplexity(every, heldout[domain]) for domain in DOMAINS}
    seen = counts["steps"] * plan.batch_tokens
    metrics = {
        "heldout_perplexity": perplexity,
        "heldout_perplexity_windows_of_1024": long_perplexity,
        "unigram_perplexity": unigram,
        "heldout_tokens": {domain: len(heldout[domain]) for domain in DOMAINS},
        "train_tokens": {domain: len(streams[domain]) for domain in DOMAINS},
        "parameters": model.num_parameters(),
        "tokens_seen": seen,
        "prose_share": counts["prose_share"],
        "steps": counts["steps"],
        "minutes": counts["seconds"] / 60,
        "seed": plan.seed,
        "batch_tokens": plan.batch_tokens,
        "peak_rate": plan.peak_rate,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "machine": "2 CPU cores",
    }
    plan.metrics.write_text(json.dumps(metrics, indent=2) + "\n")
    print(json.dumps(metrics, indent=2))
    if any(perplexity[domain] > unigram[domain] / 3 for domain in DOMAINS):
        sys.exit("the model's perplexity is above a third of the unigram model's")
    state_file.unlink()


if __name__ == "__main__":
    main()
