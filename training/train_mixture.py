"""Trains a small mixture of experts on the built-in corpus, of Qwen3-MoE's architecture, to try compression on.

    python training/train_mixture.py --out MIXTURE --minutes 60

Its tokenizer is the built-in model's. Two CPU cores are enough. It is trained in float32: experts' small products in
bfloat16 take ten times as long on a CPU without units for it. A run that is killed goes on from its last saved state
when it is started again with the same `--out`.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch
from loop import Schedule, add_schedule_options, make_optimizer, run_steps
from train_builtin import DOMAINS, LONG_WINDOW, WINDOW, Plan, draw_batch, measure_perplexity, tokenize_texts
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

from eckart.data.builtin import builtin_model_path

PROSE_SHARE = 0.4


def make_model(tokenizer: PreTrainedTokenizerFast, experts: int, seed: int) -> Qwen3MoeForCausalLM:
    """Two of so many experts for each token, in every block; some ten million parameters at twelve."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 256,
        "intermediate_size": 640,
        "moe_intermediate_size": 192,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "router_aux_loss_coef": 0.01,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 32,
        "max_position_embeddings": LONG_WINDOW,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))


def compute_loss(model: Qwen3MoeForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood (nats) of each next token, and the auxiliary loss that spreads tokens evenly."""
    output = model(input_ids=tokens, use_cache=False, output_router_logits=True)
    loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    return loss + model.config.router_aux_loss_coef * output.aux_loss


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small mixture of experts.")
    add_schedule_options(parser, minutes=60.0)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="tokens in a step")
    parser.add_argument("--experts", type=int, default=12)
    given = vars(parser.parse_args())
    experts, out = given.pop("experts"), given["out"]
    plan = Plan(**given, metrics=out / "training.json")
    tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(builtin_model_path())
    streams = {domain: tokenize_texts(tokenizer, domain, "train") for domain in DOMAINS}
    model = make_model(tokenizer, experts, plan.seed)
    print(f"{model.num_parameters()} parameters", flush=True)
    loss = torch.compile(compute_loss, dynamic=False) if plan.compile else compute_loss
    optimizer = make_optimizer(model, plan.peak_rate, plan.weight_decay)
    schedule = Schedule(plan.minutes, plan.steps, plan.peak_rate, plan.warm_up)
    state_file = out.parent / f"{out.name}.state.pt"
    counts = run_steps(
        model,
        lambda step: loss(model, draw_batch(streams, PROSE_SHARE, plan, step)),
        schedule,
        optimizer,
        state_file,
        {"steps": 0, "seconds": 0.0},
    )
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    heldout = {domain: tokenize_texts(tokenizer, domain, "heldout") for domain in DOMAINS}
    metrics = {
        "heldout_perplexity": {domain: measure_perplexity(model, heldout[domain], WINDOW) for domain in DOMAINS},
        "parameters": model.num_parameters(),
        "tokens_seen": counts["steps"] * plan.batch_tokens,
        "steps": counts["steps"],
        "minutes": counts["seconds"] / 60,
        "seed": plan.seed,
        "experts": experts,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    plan.metrics.write_text(json.dumps(metrics, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(metrics, indent=2))
    state_file.unlink()


if __name__ == "__main__":
    main()
