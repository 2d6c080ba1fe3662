"""Trains a small BERT-style masked language model on local text: an encoder for the probing study where no hub is.

    python training/train_encoder.py --out ENCODER --text sst2/train.jsonl.gz --text ptb/train.txt.gz ... --data DIR

Two CPU cores are enough. It is BERT (Devlin et al., arXiv 1810.04805), uncased, with the norms in front
(RobertaPreLayerNorm): with the norms behind so small a budget does not leave the unigram loss. Masked tokens alone are
too few to learn from in an hour. So every other step is one of a causal language model, as in GPT-BERT (Charpentier &
Samuel, arXiv 2410.24159): each token sees those before it and predicts the next. In the other steps 30 % of the tokens
are masked and asked for, and everything is seen; a place that shows a mask is asked for what is under it, any other for
what comes next.

A run that is killed goes on from its last saved state when it is started again with the same `--out`.
"""

import argparse
import json
import math
import platform
import time
from pathlib import Path

import numpy as np
import torch
from loop import Schedule, add_schedule_options, make_optimizer, run_steps, take_step
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, RobertaPreLayerNormConfig, RobertaPreLayerNormForMaskedLM

from eckart import read_text

PAD, UNKNOWN, CLS, SEP, MASK = SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = 6144
WINDOW = 64
POSITIONS = 128
MASKED = 0.3
# One line in this many is held out.
HELD_OUT = 50


def read_lines(names: list[str], data: Path) -> list[str]:
    """The lines of texts: each a file, or FILE:FIELD for rows whose text stands in another field than "text"."""
    lines = []
    for name in names:
        file, _, field = name.partition(":")
        for document in read_text(str(data / file), column=field or None).documents:
            lines += [line.strip() for line in document.splitlines() if len(line.split()) > 2]
    return list(dict.fromkeys(lines))


def train_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """Uncased WordPiece, `[CLS] text [SEP]`, as BERT's."""
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=VOCABULARY, special_tokens=list(SPECIALS), show_progress=False)
    tokenizer.train_from_iterator(lines, trainer)
    ends = [(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}", pair=f"{CLS} $A {SEP} $B {SEP}", special_tokens=ends
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        unk_token=UNKNOWN,
        cls_token=CLS,
        sep_token=SEP,
        mask_token=MASK,
        model_max_length=POSITIONS,
    )


def make_model(seed: int, layers: int, width: int) -> RobertaPreLayerNormForMaskedLM:
    """The encoder, with random weights."""
    torch.manual_seed(seed)
    config = RobertaPreLayerNormConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        max_position_embeddings=POSITIONS + 1,  # they are counted from the padding token's id, 0, on
        type_vocab_size=1,
        pad_token_id=SPECIALS.index(PAD),
        bos_token_id=SPECIALS.index(CLS),
        eos_token_id=SPECIALS.index(SEP),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        tie_word_embeddings=True,
    )
    return RobertaPreLayerNormForMaskedLM(config)


def tokenize(tokenizer: PreTrainedTokenizerFast, lines: list[str]) -> torch.Tensor:
    """The lines' tokens, one after another, each in its `[CLS] ... [SEP]`."""
    rows = tokenizer(lines, verbose=False)["input_ids"]
    return torch.tensor([token for row in rows for token in row], dtype=torch.long)


def draw_windows(stream: torch.Tensor, rows: int, seed: int, step: int) -> torch.Tensor:
    """The windows of a step."""
    starts = np.random.default_rng((seed, step)).integers(0, len(stream) - WINDOW, rows)
    return torch.stack([stream[start : start + WINDOW] for start in starts.tolist()])


def draw_places(ids: torch.Tensor, seed: int, step: int) -> torch.Tensor:
    """The places that are masked, the same number in every step; specials are not asked for."""
    scores = torch.from_numpy(np.random.default_rng((seed, step, 1)).random(ids.numel(), dtype=np.float32))
    scores[ids.flatten() < len(SPECIALS)] = -1.0
    return scores.topk(int(MASKED * ids.numel())).indices


def masked_loss(model: RobertaPreLayerNormForMaskedLM, ids: torch.Tensor, asked: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood (nats) of the masked tokens."""
    shown = ids.flatten().index_fill(0, asked, SPECIALS.index(MASK)).view_as(ids)
    hidden = model.base_model(input_ids=shown).last_hidden_state.flatten(0, 1)[asked]
    return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), ids.flatten()[asked])


def causal_loss(model: RobertaPreLayerNormForMaskedLM, ids: torch.Tensor, ahead: torch.Tensor) -> torch.Tensor:
    """Mean negative log likelihood (nats) of each token after the first of its row, from those before it."""
    hidden = model.base_model(input_ids=ids, attention_mask=ahead).last_hidden_state[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(model.lm_head(hidden).float(), ids[:, 1:].flatten())


@torch.no_grad()
def measure(model: RobertaPreLayerNormForMaskedLM, stream: torch.Tensor, batches: int = 40) -> float:
    """The masked loss of held-out text, in float32."""
    losses = []
    for step in range(batches):
        ids = draw_windows(stream, 32, 1, step)
        losses.append(masked_loss(model, ids, draw_places(ids, 1, step)).item())
    return float(np.mean(losses))


def measure_unigram(train: torch.Tensor, heldout: torch.Tensor) -> float:
    """The loss of the training tokens' frequencies on held-out text, specials left out."""
    counts = torch.bincount(train, minlength=VOCABULARY).double() + 1
    counts[: len(SPECIALS)] = 1e-9
    logs = (counts / counts.sum()).log()
    return float(-logs[heldout[heldout >= len(SPECIALS)]].mean())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a small masked language model.")
    add_schedule_options(parser, minutes=60.0)
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--data", type=Path, default=Path(), help="folder that the texts lie in")
    parser.add_argument("--text", action="append", required=True, help="FILE or FILE:FIELD, .txt or .jsonl(.gz)")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rows", type=int, default=64, help=f"windows of {WINDOW} tokens in a step")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    lines = read_lines(arguments.text, arguments.data)
    train_lines = [line for place, line in enumerate(lines) if place % HELD_OUT]
    tokenizer = train_tokenizer(train_lines)
    train = tokenize(tokenizer, train_lines)
    heldout = tokenize(tokenizer, lines[::HELD_OUT])
    print(f"{len(train)} tokens to train on, {len(heldout)} held out", flush=True)
    model = make_model(arguments.seed, arguments.layers, arguments.width)
    print(f"{model.num_parameters()} parameters", flush=True)
    optimizer = make_optimizer(model, arguments.peak_rate, arguments.weight_decay)
    masked, causal = (
        torch.compile(loss, dynamic=False) if arguments.compile else loss for loss in (masked_loss, causal_loss)
    )
    ahead = torch.full((WINDOW, WINDOW), -torch.inf).triu(1).expand(arguments.rows, 1, WINDOW, WINDOW).contiguous()

    def loss_of(step: int) -> torch.Tensor:
        ids = draw_windows(train, arguments.rows, arguments.seed, step)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss: torch.Tensor = (
                masked(model, ids, draw_places(ids, arguments.seed, step)) if step % 2 else causal(model, ids, ahead)
            )
        return loss

    for step in range(2):  # compiles; a rate of 0 changes nothing
        take_step(model, optimizer, loss_of(step), 0.0)
    start = time.monotonic()
    for step in range(6):
        take_step(model, optimizer, loss_of(step), 0.0)
    seconds = (time.monotonic() - start) / 6
    print(f"{seconds:.3f} s a step, {arguments.rows * WINDOW / seconds:.0f} tokens/s", flush=True)
    optimizer = make_optimizer(model, arguments.peak_rate, arguments.weight_decay)
    schedule = Schedule(arguments.minutes, arguments.steps, arguments.peak_rate, arguments.warm_up)
    state_file = arguments.out.parent / f"{arguments.out.name}.state.pt"
    state_file.parent.mkdir(parents=True, exist_ok=True)
    counts = run_steps(model, loss_of, schedule, optimizer, state_file, {"steps": 0, "seconds": 0.0})
    model.eval()
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    facts = {
        "heldout_loss": measure(model, heldout),
        "unigram_loss": measure_unigram(train, heldout),
        "train_tokens": len(train),
        "tokens_seen": counts["steps"] * arguments.rows * WINDOW,
        "parameters": model.num_parameters(),
        "steps": counts["steps"],
        "minutes": counts["seconds"] / 60,
        "seed": arguments.seed,
        "text": arguments.text,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if not math.isfinite(facts["heldout_loss"]):
        raise SystemExit("training diverged: lower --peak-rate")
    (arguments.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(facts, indent=2))
    state_file.unlink()


if __name__ == "__main__":
    main()
