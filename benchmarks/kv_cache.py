"""A cache of latents against an ordinary one: bytes a token, perplexity at length, retrieval, and seconds a token.

    python benchmarks/kv_cache.py [--model smollm2 --data DIR] [--keeps 0.7 0.5 0.3] [--out runs/kv_cache.jsonl]
    python benchmarks/kv_cache.py --variants best asvd-i ... --groups 1 3
    python benchmarks/kv_cache.py show --out runs/kv_cache.jsonl              # what is there, as Markdown

A variant is a recipe with `keep_cache`, made by what `eckart compress` calls, and measured through its cache: windows
of --context tokens are read in pieces of --piece, so that all but the first piece are predicted from cached latents.
bytes a token   of the tensors that the cache holds after a window, over its tokens.
perplexity      over --windows of held-out text that do not overlap; also the increase in nats over the dense model's.
retrieval       a number of five digits in a filler text of --filler tokens, asked for at its end: how often it is what
                greedy generation says. A dense model that cannot do it says nothing of a cache: give fewer tokens.
decode          milliseconds of a step of one token with a full window cached, in turn with steps of the dense model,
                and the ratio of the two medians, dense over latent: above 1 is faster.

Rows are appended to --out as they come, and what is there is not computed again. Weights are float32: on processors it
is faster than bfloat16.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import append_line, machine, read_lines
from real_models import add_model_option
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.corpora import read_text
from eckart.data.encoding import encode
from eckart.evals.predictions import token_losses
from eckart.evals.windows import cut_windows
from eckart.models.latent_attention import LatentCache
from eckart.models.loading import load_model, load_tokenizer
from eckart.runs.how import How
from eckart.runs.in_memory import make_checkpoint
from eckart.runs.recipe import parse_recipe

VARIANTS: dict[str, dict[str, Any]] = {
    "best": {"method": "best"},
    "best, low": {"method": "best", "effort": "low"},
    "best, uniform": {"method": "best", "effort": "low", "allocation": "uniform"},
    "asvd-i": {"method": "asvd-i"},
    "svd": {"method": "svd"},
}
FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key. "
QUESTION = "What is the pass key? The pass key is"
STEPS = 15

Open = Callable[[PreTrainedModel], DynamicCache]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", nargs="?", choices=["measure", "show"], default="measure")
    add_model_option(parser)
    parser.add_argument("--data", type=Path, help="folder with WikiText-2; without it the built-in prose")
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=["best, low"])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.7, 0.5, 0.3])
    parser.add_argument("--groups", type=int, nargs="+", help="key-value heads in a group; default: recipes' own")
    parser.add_argument("--samples", type=int, default=32, help="calibration windows")
    parser.add_argument("--length", type=int, default=512, help="tokens in each")
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--windows", type=int, default=3)
    parser.add_argument("--piece", type=int, default=512)
    parser.add_argument("--filler", type=int, default=2048, help="tokens of the retrieval's text")
    parser.add_argument("--keys", type=int, default=6, help="numbers that are hidden, each at another depth")
    parser.add_argument("--cache", type=Path, help="folder for moments, shared by the variants")
    parser.add_argument("--out", type=Path, help="JSON lines; a stopped run goes on from it")
    arguments = parser.parse_args()
    rows = read_lines(arguments.out)
    if arguments.step == "measure":
        comparison = Comparison(arguments)
        comparison.run()
        rows = [*comparison.rows.values()]
    show(rows)


class Comparison:
    """One model, its text, and the rows measured so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.corpus = "builtin/prose" if arguments.data is None else "wikitext2"
        self.dense = load_model(arguments.model, dtype="float32")
        self.tokenizer = load_tokenizer(arguments.model)
        stream = encode(read_text(self.corpus, split="test", data=arguments.data), self.tokenizer)
        self.windows = cut_windows(self.dense, stream, length=arguments.context, limit=arguments.windows)
        self.cached: DynamicCache | None = None  # the dense model's, of the last window
        self.rows = {tuple(row["key"]): row for row in read_lines(arguments.out)}

    def run(self) -> None:
        """Measure what is not there yet."""
        given = self.arguments
        self.measure(["dense", 1.0, None], self.dense, open_ordinary)
        for variant in given.variants:
            for group in given.groups or [None]:
                for keep in given.keeps:
                    key = [variant, keep, group]
                    if (*key, *self.setting) in self.rows:
                        continue
                    with tempfile.TemporaryDirectory() as folder:
                        start = time.perf_counter()
                        out = self.compress(VARIANTS[variant], keep, group, Path(folder) / "out")
                        made = time.perf_counter() - start
                        self.measure(key, load_model(out), open_latent, made)

    @property
    def setting(self) -> tuple[Any, ...]:
        """What rows have to agree in to be compared."""
        given = self.arguments
        name = Path(given.model).name
        return name, self.corpus, given.context, len(self.windows), given.samples, given.length, given.filler

    def compress(self, keys: dict[str, Any], keep: float, group: int | None, out: Path) -> Path:
        """A checkpoint of the variant."""
        given = self.arguments
        calibration = {"corpus": self.corpus, "samples": given.samples, "length": given.length}
        recipe = {"model": given.model, "dtype": "float32", "keep_cache": keep, "calibration": calibration, **keys}
        how = How(data=given.data, cache=given.cache)
        make_checkpoint(parse_recipe({**recipe, **({} if group is None else {"cache_group": group})}), out, how)
        return out

    def measure(self, key: list[Any], model: PreTrainedModel, opened: Open, made: float = 0.0) -> None:
        """Measure a model and add its row."""
        full = (*key, *self.setting)
        if full in self.rows:
            return
        losses, cache = [], opened(model)
        for window in self.windows:
            cache = opened(model)
            losses.append(self.loss(model, window, cache))
        tokens = cache.get_seq_length()
        held = sum(tensor.nbytes for layer in cache.layers for tensor in held_by(layer))
        if model is self.dense:
            self.cached = cache
        if self.cached is None:  # the dense row was there already
            self.cached = open_ordinary(self.dense)
            self.loss(self.dense, self.windows[-1], self.cached)
        row = {
            "key": full,
            "bytes": held / tokens,
            "nats": losses,
            "found": self.retrieve(model, opened),
            "seconds": step_seconds([(self.dense, self.cached), (model, cache)], self.windows[-1]),
            "made": made,
            "machine": machine(),
        }
        self.rows[full] = row
        append_line(self.arguments.out, row)
        print(line_of(row, self.rows[("dense", 1.0, None, *self.setting)]), flush=True)

    @torch.inference_mode()
    def loss(self, model: PreTrainedModel, window: Tensor, cache: DynamicCache) -> float:
        """The mean negative log-likelihood of a window's tokens, read piece by piece through the cache."""
        total, last = 0.0, None
        for piece in window[None].split(self.arguments.piece, 1):
            logits = model(piece, past_key_values=cache).logits.float()
            if last is not None:
                total += float(token_losses(last, piece[:, :1]).double().sum())
            total += float(token_losses(logits[:, :-1], piece[:, 1:]).double().sum())
            last = logits[:, -1:]
        return total / (len(window) - 1)

    @torch.inference_mode()
    def retrieve(self, model: PreTrainedModel, opened: Open) -> list[bool]:
        """Whether each of some hidden numbers is what the model says when asked."""
        said = []
        for number in range(self.arguments.keys):
            ids, key = hidden(self.tokenizer, self.arguments.filler, number, self.arguments.keys)
            how: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
            out = model.generate(ids, past_key_values=opened(model), **how)  # type: ignore[operator]
            answer = str(self.tokenizer.decode(out[0, ids.shape[1] :]))
            said.append(answer.strip().startswith(key))
        return said


def hidden(tokenizer: PreTrainedTokenizerBase, length: int, number: int, count: int) -> tuple[Tensor, str]:
    """(1, tokens) of a filler text with a number in it and the question after it; and the number.

    Args:
        length: of the filler, in tokens. number: of `count`; it sets the number and its depth, which runs evenly from
            the start to the end.
    """
    key = str(random.Random(number).randrange(10_000, 100_000))
    filler = tokenizer(FILLER * (1 + length // 8), add_special_tokens=False)["input_ids"][:length]
    sentence = len(tokenizer(FILLER, add_special_tokens=False)["input_ids"])
    depth = round(number / max(1, count - 1) * length / sentence) * sentence
    needle, question = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (NEEDLE.format(key=key), QUESTION)
    )
    return torch.tensor([[*filler[:depth], *needle, *filler[depth:], *question]]), key


def held_by(layer: Any) -> tuple[Tensor, Tensor]:
    """What a layer of a cache holds."""
    return layer.keys, layer.values


def open_ordinary(model: PreTrainedModel) -> DynamicCache:
    return DynamicCache(config=model.config)


def open_latent(model: PreTrainedModel) -> DynamicCache:
    return LatentCache(model.config)


@torch.inference_mode()
def step_seconds(models: Sequence[tuple[PreTrainedModel, DynamicCache]], window: Tensor) -> list[float]:
    """For each model, with what it has cached, the median of some steps of one token, in turn with those of the others.

    The caches are as they were afterwards.
    """
    times: list[list[float]] = [[] for _ in models]
    for _ in range(STEPS):
        for (model, cache), own in zip(models, times, strict=True):
            start = time.perf_counter()
            model(window[None, :1], past_key_values=cache)
            own.append(time.perf_counter() - start)
            cache.crop(-1)
    return [statistics.median(own) for own in times]


HEADER = (
    "| | keep | heads in a group | bytes a token | of dense | perplexity | nats over dense | retrieved | decode, ms | "
    "times dense |\n|---|---|---|---|---|---|---|---|---|---|"
)


def show(rows: list[dict[str, Any]]) -> None:
    """The rows as Markdown tables, one a setting."""
    for setting in dict.fromkeys(tuple(row["key"][3:]) for row in rows):
        own = [row for row in rows if tuple(row["key"][3:]) == setting]
        name, corpus, context, windows, samples, length, filler = setting
        print(
            f"\n{name}: {windows} windows of {context} tokens of {corpus}, calibrated on {samples} x {length}, numbers "
            f"hidden in {filler} tokens\n\n{HEADER}"
        )
        dense = next((row for row in own if row["key"][0] == "dense"), own[0])
        for row in own:
            print(line_of(row, dense))


def line_of(row: dict[str, Any], dense: dict[str, Any]) -> str:
    """One row of the table."""
    name, keep, group, *_ = row["key"]
    nats, base = statistics.mean(row["nats"]), statistics.mean(dense["nats"])
    before, after = row["seconds"]
    cells = [
        name,
        keep,
        group or "",
        f"{row['bytes']:,.0f}",
        f"{row['bytes'] / dense['bytes']:.3f}",
        f"{torch.tensor(nats).exp():.3f}",
        f"{nats - base:.4f}",
        f"{sum(row['found'])} of {len(row['found'])}",
        f"{1e3 * after:.0f}",
        f"{before / after:.2f}",
    ]
    return f"| {' | '.join(map(str, cells))} |"


if __name__ == "__main__":
    main()
