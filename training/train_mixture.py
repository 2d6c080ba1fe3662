"""Trains a small mixture of experts on the built-in corpus, of Qwen3-MoE's architecture, to try compression on.

    python training/train_mixture.py --out MIXTURE --minutes 60

Its tokenizer is the built-in model's. Two CPU cores are enough. It is trained in float32: experts' small products in
bfloat16 take ten times as long on a CPU without units for it. A run that is killed goes on from its last saved state
when it is started again with the same `--out`.
"""

import argparse
from typing import Any

import torch
from on_builtin import add_options, builtin_tokenizer, train_and_save
from train_builtin import LONG_WINDOW, WINDOW, Plan, measure_perplexity
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

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
    add_options(parser, minutes=60.0)
    parser.add_argument("--experts", type=int, default=12)
    given = vars(parser.parse_args())
    experts = given.pop("experts")
    plan = Plan(**given, metrics=given["out"] / "training.json")
    tokenizer = builtin_tokenizer()
    train_and_save(
        make_model(tokenizer, experts, plan.seed),
        tokenizer,
        plan,
        prose_share=PROSE_SHARE,
        loss=compute_loss,
        perplexity=lambda model, tokens: measure_perplexity(model, tokens, WINDOW),
        experts=experts,
    )


if __name__ == "__main__":
    main()
