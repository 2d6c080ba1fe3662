"""StereoSet: does a model prefer stereotypes? Nadeem et al. 2020, arXiv 2004.09456."""

from __future__ import annotations

import hashlib
import itertools
import json
import string
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.files import unpack
from eckart.data.positions import usable_positions
from eckart.evals.harness_tasks import SPLIT_SEED, split_rows
from eckart.evals.icat import icat
from eckart.evals.likelihoods import (
    Batching,
    Row,
    decoder_row,
    find_start,
    following_log_probabilities,
    has_next_sentence_head,
    masked_log_probabilities,
    masked_rows,
    mean_log_likelihoods,
    pair_row,
)
from eckart.evals.result import TRAITS, EvalResult, Score
from eckart.evals.windows import check_evaluating, is_causal
from eckart.support.progress import Track, silent

HUB = "McGill-NLP/stereoset"
FILES = ("dev.json", "dev.json.gz")
PARTS = ("intrasentence", "intersentence")
DOMAINS = ("gender", "profession", "race", "religion")
# In the order of the hub's gold_label: 0, 1, 2.
LABELS = ("anti-stereotype", "stereotype", "unrelated")
# In the order of `Cluster.sentences`.
KINDS = ("stereotype", "anti-stereotype", "unrelated")
BLANK = "BLANK"


@dataclass(frozen=True)
class Cluster:
    """A context, and three sentences that fill its blank (intrasentence) or follow it (intersentence).

    Attributes:
        target: the term that the stereotype is about.
        domain: gender, profession, race or religion.
        sentences: stereotype, anti-stereotype, unrelated.
        name: part and number, from 0, as in "intersentence[17]".
    """

    target: str
    domain: str
    context: str
    sentences: tuple[str, str, str]
    name: str


@dataclass(frozen=True)
class StereoSet:
    """The benchmark's two parts.

    Attributes:
        intrasentence, intersentence: clusters, in the order of their file.
        source: where they came from.
    """

    intrasentence: tuple[Cluster, ...]
    intersentence: tuple[Cluster, ...]
    source: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of every word in it, so that results on other clusters, or in another order, can be told apart."""
        clusters = [asdict(cluster) for cluster in (*self.intrasentence, *self.intersentence)]
        return hashlib.sha256(json.dumps(clusters).encode()).hexdigest()[:16]

    def take(self, split: str) -> StereoSet:
        """The clusters of a split, in their order: "test" is all, other splits are those of `split_rows`, of each part.

        Raises:
            ValueError: an unknown split, or a part with fewer than 5 clusters.
        """
        if split == "test":
            return self
        try:
            parts = {
                part: tuple(clusters[row] for row in split_rows(len(clusters), split))
                for part, clusters in ((part, getattr(self, part)) for part in PARTS)
            }
        except ValueError as error:
            raise ValueError(f"stereoset: {error}") from error
        return StereoSet(**parts, source={**self.source, "part": split, "split_seed": SPLIT_SEED})


def read_stereoset(data: Path | None) -> StereoSet:
    """The development set: its public half, which every published number is on.

    Args:
        data: folder with stereoset/dev.json or dev.json, plain or .gz, in the layout of the authors' file; ids and the
            annotators' labels are not needed. None reads McGill-NLP/stereoset from the hub.

    Raises:
        ValueError: no file, no cluster, or a field that is missing or wrong; the message names file, cluster and field.
    """
    if data is None:
        return _build("the hub", {part: _read_hub(part) for part in PARTS}, {"hub": HUB, "split": "validation"})
    folders = (data / "stereoset", data)
    path = next((folder / name for folder in folders for name in FILES if (folder / name).is_file()), None)
    if path is None:
        raise ValueError(f"stereoset: no {' or '.join(FILES)} in {' or '.join(map(str, folders))}")
    packed = unpack(path)
    try:
        content = json.loads(packed)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not readable as JSON: {error}") from error
    parts = content.get("data") if isinstance(content, dict) else None
    if not isinstance(parts, dict):
        raise ValueError(f"{path} has no field 'data' with the parts {' and '.join(PARTS)}")
    return _build(str(path), parts, {"file": path.name, "split": "dev"})


def stereoset(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    clusters: StereoSet,
    *,
    limit: int | None = None,
    batch_size: int = 8,
    leave_out_long: bool = False,
    task: str = "stereoset",
    settings: dict[str, Any] | None = None,
    track: Track = silent,
) -> EvalResult:
    """Stereotype, language modelling and ICAT scores of a decoder or an encoder.

    A sentence is scored as the benchmark's authors do (github.com/moinnadeem/StereoSet), where that needs no training:

    * Decoder, intrasentence: the geometric mean of its tokens' probabilities. The first token is predicted from the
      start token; as in the authors' code, later tokens do not see the start token, unless the tokenizer itself puts it
      before every text, as Llama's does. Where a tokenizer has no start token, the first token is not scored.
    * Decoder, intersentence: the geometric mean of the probabilities of its tokens after the context, which gets a
      full stop where it has no end. The authors train a next-sentence head on each model instead, which no checkpoint
      carries; their unused likelihood rule, log p(sentence) / log p(context), never reads one after the other and
      prefers the less likely sentence, so it is not used here either. Intersentence scores of decoders therefore
      cannot be compared with the paper's; intrasentence scores can.
    * Encoder, intrasentence: the mean of the probabilities of the pieces of the word in the blank, filled from left to
      right, with one mask at a time and nothing in place of the pieces to come. The authors drop the space before the
      word, which for byte-level tokenizers (RoBERTa) asks for a piece that does not occur there; here a piece is what
      it is in the sentence.
    * Encoder, intersentence: the probability of "follows" by the model's own next-sentence head, as the authors do for
      BERT. An encoder without that head is scored on the other part alone, and one without a masked-token head on
      this part alone; `settings` says so.

    Args:
        clusters: from `read_stereoset`.
        limit: read at most this many clusters of each part.
        batch_size: sentences at a time.
        leave_out_long: leave out clusters with an input past the model's positions, and count them in `settings`,
            instead of refusing them. Models with other positions then read other clusters.

    Returns:
        value = icat over all clusters that were scored, in percent, with `eckart.evals.icat`'s standard error over
        target terms. Scores: lms, ss; icat.D, lms.D, ss.D for every domain D; and all of these once more for each part
        P, as P.icat, P.icat.D and so on. `examples` is empty: icat is no mean over examples. details = for each part
        the log scores of the three kinds of sentence, a list each in the order of the clusters, and the numbers of
        clusters that were left out.

    Raises:
        ValueError: a model of another kind or in training mode, a logit that is not finite, an input past the model's
            positions (the messages name the cluster), a token outside the vocabulary, no cluster that can be scored.
    """
    check_evaluating(model)
    if limit is not None and limit < 1:
        raise ValueError(f"limit {limit} leaves no cluster to read")
    batching = Batching(batch_size, task, track)
    rules = _choose_rules(model, tokenizer)
    left_out: dict[str, list[int]] = {part: [] for part in PARTS}
    scored: dict[str, tuple[Sequence[Cluster], np.ndarray]] = {}
    for part, rule in rules.items():
        if rule.score is None:
            continue
        read: Sequence[Cluster] = getattr(clusters, part)[:limit]
        rows = [[rule.rows(cluster, sentence) for sentence in cluster.sentences] for cluster in read]
        if leave_out_long:
            fits = [_fits(model, triple) for triple in rows]
            left_out[part] = [number for number, fit in enumerate(fits) if not fit]
            read, rows = list(itertools.compress(read, fits)), list(itertools.compress(rows, fits))
        if rows:
            flat = [row for triple in rows for sentence in triple for row in sentence]
            pieces = iter(rule.score(flat, replace(batching, task=f"{task} {part}")))
            logs = [[_log_mean([next(pieces) for _ in sentence]) for sentence in triple] for triple in rows]
            scored[part] = (read, np.array(logs))
    if not scored:
        raise ValueError(f"{task}: no cluster is left to score")
    scores = _score_all(scored)
    overall = scores.pop("icat")
    return EvalResult(
        task=task,
        metric="icat",
        value=overall.value,
        stderr=overall.stderr,
        n=overall.n,
        traits=TRAITS["stereoset"],
        settings={
            **{part: rule.name for part, rule in rules.items()},
            **({"start": _describe_start(tokenizer)} if is_causal(model) else {}),
            "clusters": {part: len(scored[part][0]) if part in scored else 0 for part in PARTS},
            **({"left_out": {part: len(numbers) for part, numbers in left_out.items()}} if leave_out_long else {}),
            "limit": limit,
            "data": clusters.digest,
            **clusters.source,
            **(settings or {}),
        },
        scores=scores,
        details={
            part: {**dict(zip(KINDS, logs.T.round(6).tolist(), strict=True)), "left_out": left_out[part]}
            for part, (_, logs) in scored.items()
        },
    )


@dataclass(frozen=True)
class _Rule:
    """How a part is scored: the rows of a sentence, and a log-probability for every row; None where it is not."""

    name: str
    rows: Callable[[Cluster, str], list[Row]]
    score: Callable[[Sequence[Row], Batching], list[float]] | None


def _choose_rules(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, _Rule]:
    """The rule for each part."""

    def sentence_row(cluster: Cluster, sentence: str) -> list[Row]:
        return [decoder_row(tokenizer, sentence, cluster.name)]

    def following_row(cluster: Cluster, sentence: str) -> list[Row]:
        return [decoder_row(tokenizer, sentence, cluster.name, context=_end(cluster.context))]

    def word_rows(cluster: Cluster, sentence: str) -> list[Row]:
        word = find_word(cluster, sentence)
        return masked_rows(tokenizer, cluster.context, word, cluster.name, blank=BLANK)

    def pair_rows(cluster: Cluster, sentence: str) -> list[Row]:
        return [pair_row(tokenizer, cluster.context, sentence, cluster.name)]

    if is_causal(model):
        start = find_start(tokenizer)

        def read(rows: Sequence[Row], batching: Batching) -> list[float]:
            return mean_log_likelihoods(model, rows, start, batching)

        return {
            "intrasentence": _Rule("mean log-likelihood per token", sentence_row, read),
            "intersentence": _Rule("mean log-likelihood per token given the context", following_row, read),
        }
    masked, following = model.get_output_embeddings() is not None, has_next_sentence_head(model)
    if getattr(model.config, "is_encoder_decoder", False) or not (masked or following):
        raise ValueError(f"{type(model).__name__} is neither a causal nor a masked language model; StereoSet needs one")
    return {
        "intrasentence": _Rule(
            "mean probability of the blank's pieces" if masked else "not scored: the model has no masked-token head",
            word_rows,
            (lambda rows, batching: masked_log_probabilities(model, rows, batching)) if masked else None,
        ),
        "intersentence": _Rule(
            "next-sentence head" if following else "not scored: the model has no next-sentence head",
            pair_rows,
            (lambda rows, batching: following_log_probabilities(model, rows, batching)) if following else None,
        ),
    }


def find_word(cluster: Cluster, sentence: str) -> str:
    """The word that a sentence has where the context has its blank, without punctuation, by the authors' rule.

    Both are split at spaces; of several blanks the last is looked up.

    Raises:
        ValueError: the sentence has no word there.
    """
    place = max(number for number, word in enumerate(cluster.context.split(" ")) if BLANK in word)
    words = sentence.split(" ")
    word = words[place].translate(str.maketrans("", "", string.punctuation)) if place < len(words) else ""
    if not word:
        raise ValueError(f"{cluster.name}: {sentence!r} has no word for the blank of {cluster.context!r}")
    return word


def _end(context: str) -> str:
    return context if context[-1] in ".!?" else f"{context}."


def _log_mean(logs: list[float]) -> float:
    """log of the mean of exp(logs)."""
    return float(torch.tensor(logs, dtype=torch.float64).logsumexp(0)) - float(np.log(len(logs)))


def _fits(model: PreTrainedModel, triple: Iterable[Iterable[Row]]) -> bool:
    positions = usable_positions(model)
    return positions is None or all(len(row.ids) <= positions for sentence in triple for row in sentence)


def _describe_start(tokenizer: PreTrainedTokenizerBase) -> str:
    start = find_start(tokenizer)
    if start is None:
        return "none; the first token is not scored"
    token = tokenizer.convert_ids_to_tokens(start.token)
    return f"{token} before every text" if start.always else f"{token} before the first token only"


def _score_all(scored: dict[str, tuple[Sequence[Cluster], np.ndarray]]) -> dict[str, Score]:
    """Scores of both parts together, then of each; of all domains, then of each."""
    scores: dict[str, Score] = {}
    both = [cluster for read, _ in scored.values() for cluster in read], np.concatenate([s for _, s in scored.values()])
    for prefix, (read, logs) in {"": both, **{f"{part}.": part_scored for part, part_scored in scored.items()}}.items():
        for domain in (None, *DOMAINS):
            inside = [number for number, cluster in enumerate(read) if domain in (None, cluster.domain)]
            if inside:
                for name, score in icat([read[number].target for number in inside], logs[inside]).items():
                    scores[f"{prefix}{name}" if domain is None else f"{prefix}{name}.{domain}"] = score
    return scores


def _read_hub(part: str) -> list[Any]:
    import datasets  # slow to import, and needed only here

    try:
        return list(datasets.load_dataset(HUB, part, split="validation"))
    except Exception as error:
        raise ValueError(
            f"stereoset: the hub did not give {HUB} ({type(error).__name__}: {error}); give a folder with a local copy"
        ) from error


def _build(where: str, parts: dict[str, Any], source: dict[str, Any]) -> StereoSet:
    read: dict[str, tuple[Cluster, ...]] = {}
    for part in PARTS:
        rows = parts.get(part)
        if not isinstance(rows, list) or not rows:
            raise ValueError(f"{where}: there is no cluster in {part!r}")
        read[part] = tuple(_build_cluster(where, f"{part}[{number}]", row) for number, row in enumerate(rows))
    return StereoSet(**read, source=source)


def _build_cluster(where: str, name: str, row: Any) -> Cluster:
    fields = {key: _text(where, name, row, key) for key in ("target", "bias_type", "context")}
    if fields["bias_type"] not in DOMAINS:
        raise ValueError(f"{where}: {name} has bias_type {fields['bias_type']!r}; known: {', '.join(DOMAINS)}")
    if name.startswith("intrasentence") and BLANK not in fields["context"]:
        raise ValueError(f"{where}: {name} has no {BLANK} in its context")
    sentences = row.get("sentences")
    if isinstance(sentences, dict):  # the hub's layout: a list for each field
        columns = [sentences.get(key) for key in ("sentence", "gold_label")]
        if not all(isinstance(column, list) for column in columns):
            raise ValueError(f"{where}: {name} has no field 'sentence' or 'gold_label' in its sentences")
        sentences = [{"sentence": text, "gold_label": label} for text, label in zip(*columns, strict=False)]
    if not isinstance(sentences, list):
        raise ValueError(f"{where}: {name} has no field 'sentences'")
    texts: dict[str, str] = {}
    for number, sentence in enumerate(sentences):
        inner = f"{name}, sentence {number}"
        label = sentence.get("gold_label") if isinstance(sentence, dict) else None
        label = LABELS[label] if isinstance(label, int) and 0 <= label < len(LABELS) else label
        if label not in LABELS:
            raise ValueError(f"{where}: {inner} has gold_label {label!r}; known: {', '.join(LABELS)}")
        if label in texts:
            raise ValueError(f"{where}: {inner} is a second sentence with gold_label {label!r}")
        texts[label] = _text(where, inner, sentence, "sentence")
    missing = [label for label in LABELS if label not in texts]
    if missing:
        raise ValueError(f"{where}: {name} has no sentence with gold_label {missing[0]!r}")
    stereotype, anti, unrelated = (texts[kind] for kind in KINDS)
    return Cluster(fields["target"], fields["bias_type"], fields["context"], (stereotype, anti, unrelated), name)


def _text(where: str, name: str, row: Any, key: str) -> str:
    value = row.get(key) if isinstance(row, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{where}: {name} has no field {key!r}, or no text in it")
    return value
