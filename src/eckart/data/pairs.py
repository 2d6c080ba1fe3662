"""Pairs: source and target as an encoder-decoder reads them, and the checks that come before."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from transformers import PreTrainedModel

from eckart.data.positions import check_positions
from eckart.data.tokens import Rows, Tokens


def is_encoder_decoder(model: PreTrainedModel) -> bool:
    """Whether the model has an encoder for one text, and a decoder for another that reads what the encoder gives."""
    return bool(getattr(model.config, "is_encoder_decoder", False))


def decoder_inputs(model: PreTrainedModel, targets: Int[Tensor, "rows length"]) -> Int[Tensor, "rows length"]:
    """What the decoder reads where it is to predict `targets`: those, shifted to the right as the model itself does.

    Raises:
        ValueError: the model does not say how its decoder begins.
    """
    shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    if shift is not None:
        shifted: Tensor = shift(labels=targets)
        return shifted
    start = getattr(model.config, "decoder_start_token_id", None)
    if not isinstance(start, int):
        raise ValueError(
            f"{type(model).__name__}: its configuration has no decoder_start_token_id, so how its decoder begins is "
            "not known"
        )
    return torch.cat([torch.full_like(targets[:, :1], start), targets[:, :-1]], 1)


def check_reads_text(model: PreTrainedModel) -> None:
    """Raises ValueError for an encoder-decoder whose encoder reads sound or images."""
    if is_encoder_decoder(model) and model.main_input_name != "input_ids":
        raise ValueError(
            f"{type(model).__name__} reads {model.main_input_name} and no text: it can be neither calibrated nor "
            "measured on text; calibrate on a table of sounds and transcripts (--column, --target), or give a method "
            "that needs no calibration, such as svd"
        )


def check_sides(model: PreTrainedModel, tokens: Tokens, what: str) -> None:
    """Raises ValueError where samples are longer than the model reads, or are pairs for a model of one text or
    the other way round.
    """
    kind = type(model).__name__
    if not is_encoder_decoder(model):
        if tokens.split is not None:
            raise ValueError(f"{kind} reads one text, and the samples are pairs of source and target")
        check_positions(model, tokens.ids.shape[1], what)
        return
    if tokens.sound is None:
        check_reads_text(model)
    elif model.main_input_name == "input_ids":
        raise ValueError(f"{kind} reads text, and the samples are sound")
    if tokens.split is None:
        raise ValueError(
            f"{kind} is an encoder-decoder, and reads pairs of source and target: cut the text with "
            "eckart.sample_halves or eckart.sample_pairs"
        )
    widths = {"source": tokens.split, "target": tokens.ids.shape[1] - tokens.split}
    for side in ("source", "target")[tokens.sound is not None :]:
        width = widths[side]
        check_positions(model, width, f"{what}: a {side} of")


def arguments_of(model: PreTrainedModel, rows: Rows) -> dict[str, Tensor | None]:
    """What the model is called with to read some samples, on its device; of pairs to predict their targets.

    As in calibration, a mask that hides nothing is left out.
    """
    ids, mask = rows.ids.to(model.device), rows.mask.to(model.device)
    if rows.split is None:
        return {"input_ids": ids, "attention_mask": _shown(mask)}
    sources, targets = ids.tensor_split([rows.split], 1)
    masks = mask.tensor_split([rows.split], 1)
    read: dict[str, Tensor | None] = {"input_ids": sources, "attention_mask": _shown(masks[0])}
    if rows.sound is not None:
        read = {model.main_input_name: rows.sound.to(model.device, model.dtype)}
    return {
        **read,
        "decoder_input_ids": decoder_inputs(model, targets),
        "decoder_attention_mask": _shown(masks[1]),
    }


def _shown(mask: Bool[Tensor, "rows length"]) -> Tensor | None:
    return None if bool(mask.all()) else mask.long()
