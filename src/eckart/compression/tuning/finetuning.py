"""Fine-tuning: a pretrained model trained as a classifier of a labelled set, its squared gradients recorded."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from eckart.calibration.cache import is_sound, read_gradients, read_making, write_gradients
from eckart.calibration.gradients import record_squares
from eckart.data.encoding import warn_of_tokenizer
from eckart.data.labelled import LABELLED, Labelled, read_labelled
from eckart.data.pairs import is_encoder_decoder
from eckart.evals.classification import classification
from eckart.evals.hidden_states import TokenRows, pad_rows, tokenize_texts
from eckart.evals.result import EvalResult
from eckart.lowrank import GradientMoments
from eckart.lowrank.moments import FISHER
from eckart.models.families import UnsupportedModelError
from eckart.models.loading import load_classifier, load_tokenizer
from eckart.models.sites import find_sites
from eckart.models.weight_files import write_digests
from eckart.support.device import check_device
from eckart.support.files import GRADIENTS, check_replaceable, claimed, digest_of, staged_directory, write_whole
from eckart.support.fingerprint import describe_architecture, hash_weights
from eckart.support.progress import Track, silent
from eckart.support.quiet import quiet

# The file of settings and results in a fine-tuned model's directory.
NOTES = "finetuning.json"
# A gradient longer than this is shortened to it, as in BERT's own fine-tuning. Recorded gradients keep their length.
LONGEST_GRADIENT = 1.0


@dataclass(frozen=True)
class FineTuning:
    """How a model is fine-tuned. The defaults are of the range that BERT's paper gives (1810.04805, A.3).

    Attributes:
        task: a labelled set, see `read_labelled`; its train split.
        epochs: passes over the rows.
        batch: rows in a step.
        rate: AdamW's largest, reached after the warm-up and then falling to zero along a line.
        warm_up: share of the steps in which the rate rises.
        weight_decay: AdamW's, of weights and not of biases and norms.
        seed: of a new head, the rows' order and dropout; draws the rows where there is a limit.
        limit: rows at most.
        length: tokens of a text read at most; default what the model has positions for.

    Raises:
        ValueError: a number outside its range.
    """

    task: str
    epochs: int = 3
    batch: int = 32
    rate: float = 2e-5
    warm_up: float = 0.1
    weight_decay: float = 0.01
    seed: int = 0
    limit: int | None = None
    length: int | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch", "limit", "length"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"fine-tuning: {name} {value} is not positive")
        if not 0 <= self.rate < 1:
            raise ValueError(f"fine-tuning: rate {self.rate} is outside [0, 1)")
        if not 0 <= self.warm_up <= 1:
            raise ValueError(f"fine-tuning: warm_up {self.warm_up} is no share of the steps, outside [0, 1]")
        if self.weight_decay < 0:
            raise ValueError(f"fine-tuning: weight_decay {self.weight_decay} is negative")


@dataclass(frozen=True)
class Tuned:
    """The result of a fine-tuning.

    Attributes:
        losses: mean training loss of each epoch.
        recorded: {site name: Fisher sums} of every linear that can be compressed, see `record_squares`.
        steps: taken, a batch each.
    """

    losses: tuple[float, ...]
    recorded: Mapping[str, GradientMoments]
    steps: int


def fine_tune(
    source: str | Path,
    out: Path,
    settings: FineTuning,
    *,
    data: Path | None = None,
    device: str = "cpu",
    force: bool = False,
    trust_remote_code: bool = False,
    track: Track = silent,
) -> dict[str, Any]:
    """Fine-tune the model at `source` and write it to the directory `out`.

    The directory is a checkpoint that stock transformers loads: the model, its tokenizer, README.md, finetuning.json
    (what is returned) and gradients.safetensors, the squared gradients of all steps, for `calibration: {fisher:
    recorded}`. It appears whole or not at all. Until then a folder next to it has the state after the last epoch, from
    which a killed run resumes with the same result.

    Args:
        source: as in `load_model`: an encoder or a decoder, with any head or none.
        data: folder with local copies of known sets.
        device: cpu, cuda or mps.
        force: replace what is at `out`, once the new one is complete.
        trust_remote_code: as in `load_model`.

    Returns:
        plain data: model, settings, classes, rows, initialised (names of the parameters that were drawn at random),
        losses, steps, seconds (of this call) and dev: the scores on the set's test split, None for a set without one.

    Raises:
        FileExistsError: `out` exists and `force` is off; nothing is read then.
        ValueError: another run is making `out`; nothing is read then either.
        ValueError: as `load_classifier`, `read_labelled` and `train` raise it.

    Cost: epochs x rows / batch steps, and memory of the model, three times that for AdamW, and one batch.
    """
    with claimed(out):
        check_replaceable(out, force=force, reads=[source, settings.task])
        return _fine_tune(
            source,
            out,
            settings,
            data=data,
            device=device,
            force=force,
            trust_remote_code=trust_remote_code,
            track=track,
        )


def _fine_tune(
    source: str | Path,
    out: Path,
    settings: FineTuning,
    *,
    data: Path | None,
    device: str,
    force: bool,
    trust_remote_code: bool,
    track: Track,
) -> dict[str, Any]:
    _check_device(device)
    rows = read_labelled(settings.task, split="train", data=data).draw(settings.limit, settings.seed)
    # A file and a hub set have one split: to score on it would be to score on the rows that were trained on.
    held_out = read_labelled(settings.task, split="test", data=data) if settings.task in LABELLED else None
    start = time.perf_counter()
    with _calm():
        transformers.set_seed(settings.seed)  # draws the head
        model, new = load_classifier(source, rows.classes, trust_remote_code=trust_remote_code)
        if is_encoder_decoder(model):
            raise UnsupportedModelError(
                f"{source}: a {type(model).__name__} is an encoder-decoder, and those are not fine-tuned"
            )
        tokenizer = load_tokenizer(source, trust_remote_code=trust_remote_code)
        give_padding(model, tokenizer)
        warn_of_tokenizer(model, tokenizer)
        progress = out.with_name(f".{out.name}.training")
        tuned = train(model, tokenizer, rows, settings, progress=progress, device=device, track=track)
        dev: EvalResult | None = None
        if held_out is not None:
            dev = classification(
                model,
                tokenizer,
                held_out,
                length=settings.length,
                batch_size=settings.batch,
                task=f"classification:{settings.task}",
                track=track,
            )
        facts: dict[str, Any] = {
            "model": str(source),
            "settings": asdict(settings),
            "classes": list(rows.classes),
            "rows": len(rows),
            "source": rows.source,
            "initialised": list(new),
            "losses": list(tuned.losses),
            "steps": tuned.steps,
            "seconds": time.perf_counter() - start,
            "dev": None if dev is None else _scores(dev),
        }
        with staged_directory(out, force=force) as staging:
            model.save_pretrained(staging)
            tokenizer.save_pretrained(staging)
            _write_records(staging, facts, tuned.recorded)
            write_digests(staging)
    shutil.rmtree(progress, ignore_errors=True)
    return facts


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Labelled,
    settings: FineTuning,
    *,
    progress: Path,
    device: str = "cpu",
    track: Track = silent,
) -> Tuned:
    """Fine-tune a classifier by transformers' Trainer, in place; it is in eval mode afterwards, on the device.

    In float32; dropout as the model's config has it. The same seed gives the same model, on a GPU up to the order of
    its additions. No gradient accumulation: the squares that are recorded would then be those of partial sums.

    Args:
        model: in float32, with a padding token, see `give_padding`.
        progress: folder for the state after each epoch. The same training resumes from it, another one
            starts over; it is not removed.

    Raises:
        ValueError: a gradient that is not finite (names the site), a token outside the vocabulary, a length past the
            model's positions, a text without tokens.
    """
    texts = tokenize_texts(model, tokenizer, rows.texts, settings.length)
    checkpoint = _claim(progress, _identity(model, texts, rows, settings))
    if checkpoint is None:
        recorded = {site.name: GradientMoments(site.d_out, site.d_in, FISHER) for site in find_sites(model)}
    else:
        recorded = read_gradients(checkpoint / GRADIENTS)

    def collate(numbers: Sequence[int]) -> dict[str, Tensor]:
        ids, mask = pad_rows([texts.ids[number] for number in numbers], texts.padding)
        labels = torch.tensor([rows.labels[number] for number in numbers])
        return {"input_ids": ids, "attention_mask": mask.long(), "labels": labels}

    cached = getattr(model.config, "use_cache", None)
    steps_shown = _Progress(track)
    trainer = Trainer(
        model=model,
        args=_arguments(settings, len(rows), progress, device),
        train_dataset=range(len(rows)),
        data_collator=collate,
        callbacks=[steps_shown, _Keeper(recorded)],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        with record_squares(model, recorded), _calm():
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        steps_shown.close()
    if cached is not None:
        model.config.use_cache = cached  # Trainer switches it off for the training
    model.eval()
    losses = tuple(float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    return Tuned(losses, recorded, trainer.state.global_step)


def _arguments(settings: FineTuning, rows: int, progress: Path, device: str) -> TrainingArguments:
    """Trainer's arguments for a training on so many rows."""
    steps = settings.epochs * math.ceil(rows / settings.batch)
    return TrainingArguments(
        output_dir=str(progress),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch,
        gradient_accumulation_steps=1,
        learning_rate=settings.rate,
        lr_scheduler_type="linear",
        warmup_steps=round(settings.warm_up * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=LONGEST_GRADIENT,
        optim="adamw_torch",
        seed=settings.seed,
        data_seed=settings.seed,
        use_cpu=device == "cpu",
        dataloader_pin_memory=device.startswith("cuda"),
        remove_unused_columns=False,
        eval_strategy="no",
        logging_strategy="epoch",
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
    )


def give_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Make sure that texts can be padded, in place: a decoder without a padding token pads with its end of text.

    A decoder's classification head reads the last token that is no padding, so its config is told which one that is.

    Raises:
        ValueError: an encoder without a padding token, or a decoder without one and without an end of text.
    """
    decoder = type(model.config) not in transformers.MODEL_FOR_MASKED_LM_MAPPING
    if tokenizer.pad_token_id is None:
        if not decoder or tokenizer.eos_token_id is None:
            lacks = "padding token and no end of text" if decoder else "padding token"
            raise ValueError(
                f"{type(model).__name__}: its tokenizer has no {lacks}: set tokenizer.pad_token, and save the "
                "tokenizer with the model"
            )
        tokenizer.pad_token = tokenizer.eos_token
    if decoder:
        model.config.pad_token_id = tokenizer.pad_token_id


class _Progress(TrainerCallback):
    """Shows the steps on a track."""

    def __init__(self, track: Track) -> None:
        self.track = track
        self.steps: Iterator[int] = iter(())

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        remaining = state.max_steps - state.global_step
        self.steps = iter(self.track(range(remaining), "fine-tuning", remaining))
        next(self.steps, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        next(self.steps, None)

    def close(self) -> None:
        """Remove the bar where the training ended early."""
        if isinstance(self.steps, Generator):
            self.steps.close()


class _Keeper(TrainerCallback):
    """Writes the recorded squares into each of Trainer's checkpoints, and keeps only the last checkpoint.

    They are written last, appear whole, and hold a digest of each other file: a checkpoint that has them is complete,
    and its damage is noticed.
    """

    def __init__(self, recorded: Mapping[str, GradientMoments]) -> None:
        self.recorded = recorded

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        kept = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_gradients(kept / GRADIENTS, self.recorded, made_by={"files": _digests(kept)})
        for other in kept.parent.glob("checkpoint-*"):
            if other != kept:
                shutil.rmtree(other)


def _claim(progress: Path, identity: str) -> Path | None:
    """Make the folder this training's; returns the checkpoint that it resumes from, if there is one."""
    mark = progress / "identity"
    if mark.is_file() and mark.read_text(encoding="utf-8") == identity:
        whole = [folder for folder in progress.glob("checkpoint-*") if _is_sound(folder)]
        return max(whole, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)
    shutil.rmtree(progress, ignore_errors=True)
    progress.mkdir(parents=True)
    write_whole(mark, identity)
    return None


def _is_sound(checkpoint: Path) -> bool:
    """Whether a checkpoint is complete, and holds what was written; another one is not resumed from."""
    if not is_sound(checkpoint / GRADIENTS):
        return False
    noted = read_making(checkpoint / GRADIENTS).get("files", {})  # of an older eckart: none
    return all((checkpoint / name).is_file() and digest_of(checkpoint / name) == noted[name] for name in noted)


def _digests(folder: Path) -> dict[str, str]:
    return {file.name: digest_of(file) for file in sorted(folder.iterdir()) if file.is_file()}


def _identity(model: PreTrainedModel, texts: TokenRows, rows: Labelled, settings: FineTuning) -> str:
    """A digest of everything that the training depends on: settings, tokens, labels, and the model before it."""
    state = hashlib.sha256()
    header = {**describe_architecture(model), "settings": asdict(settings), "labels": rows.labels, "ids": texts.ids}
    state.update(json.dumps(header, sort_keys=True, default=str).encode())
    hash_weights(state.update, model)
    return state.hexdigest()


def _scores(result: EvalResult) -> dict[str, Any]:
    scores = {"task": result.task, "n": result.n, result.metric: result.value, "stderr": result.stderr}
    return {**scores, **{name: score.value for name, score in result.scores.items()}}


def _write_records(folder: Path, facts: Mapping[str, Any], recorded: Mapping[str, GradientMoments]) -> None:
    """Write the squared gradients, finetuning.json and README.md."""
    made_by = {key: facts[key] for key in ("model", "settings", "steps")}
    write_gradients(folder / GRADIENTS, recorded, made_by=made_by)
    write_whole(folder / NOTES, json.dumps(facts, indent=2, ensure_ascii=False))
    write_whole(folder / "README.md", _write_card(facts))


def _write_card(facts: Mapping[str, Any]) -> str:
    """README.md: what the model is, and how it was trained."""
    settings, dev, classes = facts["settings"], facts["dev"], ", ".join(facts["classes"])
    scores = (
        [f"Matthews' correlation {dev['mcc']:.4f}, accuracy {dev['accuracy']:.4f} on {dev['n']} rows."] if dev else []
    )
    lines = [
        "---",
        "library_name: transformers",
        f"base_model: {facts['model']}",
        "---",
        "",
        f"# {Path(facts['model']).name}, fine-tuned on {settings['task']}",
        "",
        f"A classifier ({classes}), trained on {facts['rows']:,} rows for {facts['steps']:,} steps.",
        *scores,
        "",
        f"{NOTES} has the settings and losses. {GRADIENTS} has the squared gradients of all steps, for FWSVD:",
        "`eckart compress DIR OUT --method fwsvd --fisher recorded --keep 0.5`.",
        "",
    ]
    return "\n".join(lines)


def _check_device(device: str) -> None:
    """Raises ValueError for a device that is not here, that Trainer does not take, or takes together with others."""
    check_device(device)
    if device in ("cpu", "mps"):
        return
    if device not in ("cuda", "cuda:0"):
        raise ValueError(f"fine-tuning on {device!r}: give cpu, cuda or mps; CUDA_VISIBLE_DEVICES selects among GPUs")
    count = torch.cuda.device_count()
    if count != 1:
        raise ValueError(
            f"fine-tuning on cuda: this process sees {count} GPUs"
            + (", and Trainer would spread each batch over them: choose one by CUDA_VISIBLE_DEVICES" if count else "")
        )


@contextmanager
def _calm() -> Iterator[None]:
    """Inside, transformers draws no bars and does not say which parameters of a head are new."""
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        with quiet("transformers", "accelerate"):
            yield
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
