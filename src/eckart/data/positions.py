"""Positions: how many tokens a model reads at most, known here alone."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel

# Names under which configurations have the limit; most others are mapped to the first by transformers itself
# (`n_positions` of GPT-2). `max_seq_len` is MPT's, `max_target_positions` that of a Whisper decoder.
LIMITS = ("max_position_embeddings", "max_seq_len", "max_target_positions")


def usable_positions(model: PreTrainedModel) -> int | None:
    """Tokens that the model reads at most; None where there is no bound, as of Bloom and Mamba.

    Of a model that reads images or sound as well it is its language model's. Where positions are looked up in a table
    that has a row for padding, RoBERTa's and its descendants', they are counted from behind that row: of the 514 in
    the configuration 512 can be used. A table with rows added for such an offset, as OPT's, has as many as the
    configuration says.
    """
    try:
        config: Any = model.config.get_text_config()
    except ValueError:  # it has several; then its own values are the ones to go by
        config = model.config
    limits = (getattr(config, name, None) for name in LIMITS)
    # XLNet says -1 for no limit.
    limit = next((limit for limit in limits if isinstance(limit, int) and limit > 0), None)
    if limit is None:
        return None
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.Embedding)
            and "position" in name.rpartition(".")[2]
            and module.padding_idx is not None
            and module.num_embeddings == limit
        ):
            return limit - module.padding_idx - 1
    return limit


def check_positions(model: PreTrainedModel, length: int, what: str = "length") -> None:
    """Raises ValueError where rows of `length` tokens are longer than the model reads."""
    positions = usable_positions(model)
    if positions is not None and length > positions:
        raise ValueError(f"{what} {length} is past the model's {positions} positions; lower it")
