"""Sounds: recordings and their transcripts as the pairs that a speech model is calibrated on."""

from __future__ import annotations

import random
import wave
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.corpora import DEFAULT_SPLIT, check_split, read_text
from eckart.data.encoding import cut_on_the_right
from eckart.data.tokens import Tokens

# Types of the numbers in a .wav file, by their bytes, and what stands for silence.
WIDTHS = {1: (np.uint8, 128), 2: (np.int16, 0), 4: (np.int32, 0)}


def sample_sounds(
    corpus: str,
    model: PreTrainedModel,
    extractor: Any,
    tokenizer: PreTrainedTokenizerBase,
    *,
    samples: int,
    length: int,
    target: str,
    column: str | None = None,
    split: str = DEFAULT_SPLIT,
    data: Path | None = None,
    seed: int = 0,
) -> Tokens:
    """`samples` recordings, each with its transcript, which the decoder is to predict.

    Args:
        corpus: a table whose rows name .wav files, relative to its folder.
        extractor: the model's feature extractor. model: for the rows that its encoder makes of a sound.
        column: the field that names the file. target: the field with the transcript.
        length: tokens of a transcript at most.

    Raises:
        ValueError: fewer rows than `samples`, rows without one of the fields, or a file that is no such sound.
    """
    check_split([corpus], split, DEFAULT_SPLIT)
    names, texts = (
        read_text(corpus, split=split, data=data, column=field, tokenizer=tokenizer)
        for field in (column or "audio", target)
    )
    if len(names.documents) != len(texts.documents):
        raise ValueError(
            f"corpus {corpus} has {len(names.documents)} sounds and {len(texts.documents)} transcripts: give rows that "
            "have both"
        )
    if len(names.documents) < samples:
        raise ValueError(f"corpus {corpus} has {len(names.documents)} rows; {samples} were asked for")
    numbers = sorted(random.Random(seed).sample(range(len(names.documents)), samples))
    folder, rate = Path(corpus).parent, int(extractor.sampling_rate)
    waves = [read_wave(folder / names.documents[number], rate) for number in numbers]
    features = extractor(waves, sampling_rate=rate, return_tensors="pt")[model.main_input_name]
    with cut_on_the_right(tokenizer):
        batch = tokenizer(
            text_target=[texts.documents[number] for number in numbers],
            truncation=True,
            max_length=length,
            padding=True,
            padding_side="right",
            return_tensors="pt",
        )
    ids, mask = batch["input_ids"], batch["attention_mask"].bool()
    if bool((ids[:, 0] == model.config.decoder_start_token_id).all()):
        ids, mask = ids[:, 1:], mask[:, 1:]  # the shift to the right puts it there
    rows = torch.ones((samples, model.config.max_source_positions), dtype=torch.bool)
    source = {**names.source, "samples": samples, "length": length, "seed": seed, "cut": "sounds"}
    return Tokens(
        torch.cat([torch.zeros_like(rows, dtype=ids.dtype), ids], 1),
        torch.cat([rows, mask], 1),
        source,
        tokenizer.mask_token_id,
        split=rows.shape[1],
        sound=features,
    )


def read_wave(path: Path, rate: int) -> np.ndarray:
    """The sound in a .wav file of whole numbers, in -1 ... 1; of several channels their mean.

    Raises:
        ValueError: there is no such file, it is of another kind, or of another rate than `rate` per second.
    """
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, own = file.getsampwidth(), file.getnchannels(), file.getframerate()
            content = file.readframes(file.getnframes())
    except (OSError, EOFError, wave.Error) as error:
        raise ValueError(f"{path} cannot be read as a .wav file: {error}") from error
    if own != rate or width not in WIDTHS:
        raise ValueError(
            f"{path} has {own} numbers of {8 * width} bits a second, and the model reads {rate}; convert it, such as "
            f"by `ffmpeg -i IN -ar {rate} -c:a pcm_s16le OUT.wav`"
        )
    kind, silence = WIDTHS[width]
    numbers = np.frombuffer(content, dtype=kind).astype(np.float32) - silence
    return numbers.reshape(-1, channels).mean(1) / 2 ** (8 * width - 1)
