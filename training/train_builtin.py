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
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from eckart.builtin import builtin_model_path, builtin_texts

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
SAVE_EVERY_SECONDS = 180.0
PRINT_EVERY_STEPS = 50
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

    def progress(self, step: int, elapsed: float) -> float:
        """How much of the run is done, 0 to 1: by steps where their number is given, else by the clock."""
        return step / self.steps if self.steps else elapsed / (60 * self.minutes)

    def rate(self, progress: float) -> float:
        """The learning rate: a linear warm-up, then half a cosine down to a fiftieth of the peak."""
        if progress < self.warm_up:
            return self.peak_rate * max(progress / self.warm_up, 0.02)
        done = min((progress - self.warm_up) / (1 - self.warm_up), 1.0)
        return self.peak_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))


def read_plan() -> Plan:
    parser = argparse.ArgumentParser(description="Train eckart's built-in model.")
    parser.add_argument("--minutes", type=float, default=40.0, help="time for the training steps")
    parser.add_argument("--steps", type=int, default=None, help="a number of steps, in place of --minutes")
    parser.add_argument("--out", type=Path, default=builtin_model_path(), help="folder for the checkpoint")
    parser.add_argument("--metrics", type=Path, default=METRICS_FILE, help="file for the figures")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens in a step")
    parser.add_argument("--peak-rate", type=float, default=2e-3, help="highest learning rate")
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--warm-up", type=float, default=0.04, help="share of the run before the peak")
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch.compile (needs a C++ compiler)",
    )
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


def make_optimizer(model: LlamaForCausalLM, plan: Plan) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": plan.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=plan.peak_rate, betas=(0.9, 0.95), fused=True)


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


def take_step(
    model: LlamaForCausalLM, optimizer: torch.optim.AdamW, tokens: torch.Tensor, rate: float, plan: Plan
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = (compute_loss_compiled if plan.compile else compute_loss)(model, tokens)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def measure_step_seconds(streams: dict[str, torch.Tensor], model: LlamaForCausalLM, plan: Plan) -> float:
    """The time of a step, from a few at a learning rate of zero, which leave the model as it was."""
    optimizer = make_optimizer(model, plan)
    seconds = []
    for step in range(2 * LONG_WINDOW_EVERY):
        started = time.monotonic()
        take_step(model, optimizer, draw_batch(streams, 0.5, plan, step), 0.0, plan)
        seconds.append(time.monotonic() - started)
    return float(np.mean(seconds[LONG_WINDOW_EVERY:]))  # the first round includes compilation


def run_steps(
    model: LlamaForCausalLM, streams: dict[str, torch.Tensor], plan: Plan, state_file: Path
) -> dict[str, Any]:
    """Trains to the end of the plan, from the saved state where there is one; the counts of the run."""
    optimizer = make_optimizer(model, plan)
    if state_file.exists():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        counts: dict[str, Any] = state["counts"]
        print(f"goes on from step {counts['steps']} after {counts['seconds'] / 60:.1f} minutes")
    else:
        seconds = measure_step_seconds(streams, model, plan)
        planned = (plan.steps or int(60 * plan.minutes / seconds)) * plan.batch_tokens
        share = min(0.5, MOST_PROSE_EPOCHS * len(streams["prose"]) / planned)
        counts = {"steps": 0, "seconds": 0.0, "prose_share": share}
        print(
            f"{seconds:.3f} s a step, {plan.batch_tokens / seconds:.0f} tokens/s, "
            f"about {planned / 1e6:.1f} M tokens; prose share {share:.2f}",
            flush=True,
        )
    saved = time.monotonic()
    started = saved - counts["seconds"]
    smooth = math.nan
    model.train()
    while (progress := plan.progress(counts["steps"], counts["seconds"])) < 1:
        batch = draw_batch(streams, counts["prose_share"], plan, counts["steps"])
        loss = take_step(model, optimizer, batch, plan.rate(progress), plan)
        smooth = loss if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss
        counts["steps"] += 1
        now = time.monotonic()
        counts["seconds"] = now - started
        if counts["steps"] % PRINT_EVERY_STEPS == 0:
            done = plan.progress(counts["steps"], counts["seconds"])
            left = counts["seconds"] * (1 - done) / done
            print(
                f"step {counts['steps']}: loss {smooth:.3f}, {max(left, 0.0) / 60:.1f} minutes left",
                flush=True,
            )
        if now - saved > SAVE_EVERY_SECONDS:
            save_state(state_file, model, optimizer, counts)
            saved = now
    save_state(state_file, model, optimizer, counts)
    return counts


def save_state(file: Path, model: LlamaForCausalLM, optimizer: torch.optim.AdamW, counts: dict[str, Any]) -> None:
    unfinished = file.with_suffix(".unfinished")
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "counts": counts}
    torch.save(state, unfinished)
    unfinished.replace(file)  # at once, so that a killed run never leaves half a state


def split_windows(tokens: torch.Tensor, window: int) -> Iterator[torch.Tensor]:
    """Batches of whole windows, without overlap; the rest at the end is left out."""
    rows = tokens[: len(tokens) // window * window].view(-1, window)
    yield from rows.split(max(1, 8192 // window))


@torch.no_grad()
def measure_perplexity(model: LlamaForCausalLM, tokens: torch.Tensor, window: int) -> float:
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
    train = {domain: tokenize_texts(tokenizer, domain, "train") for domain in DOMAINS}
    heldout = {domain: tokenize_texts(tokenizer, domain, "heldout") for domain in DOMAINS}
    for domain in DOMAINS:
        print(f"{domain}: {len(train[domain])} tokens to train on, {len(heldout[domain])} held out", flush=True)
    model = make_model(tokenizer, plan.seed)
    print(f"{model.num_parameters()} parameters")
    state_file = plan.out.parent / f"{plan.out.name}.state.pt"
    counts = run_steps(model, train, plan, state_file)
    stored = save_checkpoint(model, tokenizer, plan.out)

    every = torch.cat([train[domain] for domain in DOMAINS])
    perplexity = {domain: measure_perplexity(stored, heldout[domain], WINDOW) for domain in DOMAINS}
    long_perplexity = {domain: measure_perplexity(stored, heldout[domain], LONG_WINDOW) for domain in DOMAINS}
    unigram = {domain: measure_unigram_perplexity(every, heldout[domain]) for domain in DOMAINS}
    seen = counts["steps"] * plan.batch_tokens
    metrics = {
        "heldout_perplexity": perplexity,
        "heldout_perplexity_windows_of_1024": long_perplexity,
        "unigram_perplexity": unigram,
        "heldout_tokens": {domain: len(heldout[domain]) for domain in DOMAINS},
        "train_tokens": {domain: len(train[domain]) for domain in DOMAINS},
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
