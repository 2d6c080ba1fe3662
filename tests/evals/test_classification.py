"""Classification: Matthews' correlation and its error, and the evaluation of a fine-tuned classifier."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from sklearn.metrics import f1_score, matthews_corrcoef
from transformers import PreTrainedModel

from eckart.data.labelled import Labelled
from eckart.evals.agreement import agreement, has_answers
from eckart.evals.classification import _jackknife, classification, matthews, weighted_f1
from tiny import EOS, PAD, VOCABULARY, tiny_model, tiny_text, tiny_tokenizer

TEXTS = tuple(tiny_text(words, seed) for seed, words in enumerate((9, 3, 14, 3, 7, 1, 5, 8)))
ROWS = Labelled(TEXTS, (0, 1, 0, 1, 0, 1, 1, 1), ("no", "yes"), tuple(range(8)), {"corpus": "made"})


def confusion_of(labels: list[int], answers: list[int], classes: int = 3) -> NDArray[np.float64]:
    table = np.zeros((classes, classes))
    np.add.at(table, (labels, answers), 1.0)
    return table


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=1, max_size=60))
def test_scores_of_counts_are_scikit_learns(pairs: list[tuple[int, int]]) -> None:
    labels, answers = [a for a, _ in pairs], [b for _, b in pairs]
    table = confusion_of(labels, answers)
    assert matthews(table) == pytest.approx(matthews_corrcoef(labels, answers), abs=1e-12)
    assert weighted_f1(table) == pytest.approx(f1_score(labels, answers, average="weighted", zero_division=0.0))


def test_the_jackknife_leaves_out_every_row_once() -> None:
    draw = np.random.default_rng(0)
    labels = draw.integers(0, 3, 40)
    answers = np.where(draw.random(40) < 0.6, labels, draw.integers(0, 3, 40))
    left_out = np.array(
        [matthews(confusion_of(list(np.delete(labels, n)), list(np.delete(answers, n)))) for n in range(40)]
    )
    expected = np.sqrt(39 / 40 * ((left_out - left_out.mean()) ** 2).sum())
    assert _jackknife(confusion_of(list(labels), list(answers)), matthews) == pytest.approx(expected)
    assert _jackknife(confusion_of([0], [0]), matthews) is None


@pytest.mark.slow
def test_the_error_is_that_of_repeated_samples() -> None:
    draw = np.random.default_rng(1)

    def sample() -> NDArray[np.float64]:
        labels = (draw.random(400) < 0.7).astype(int)
        answers = np.where(draw.random(400) < 0.8, labels, 1 - labels)
        return confusion_of(list(labels), list(answers), 2)

    tables = [sample() for _ in range(300)]
    spread = np.std([matthews(table) for table in tables])
    assert np.mean([_jackknife(table, matthews) or 0 for table in tables]) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("model_type", ["bert", "roberta", "llama"])
def test_answers_are_those_of_each_text_alone(model_type: str) -> None:
    model = tiny_model(model_type, "classifier", num_labels=2)
    tokenizer = tiny_tokenizer()
    with torch.no_grad():
        answers = [int(model(**tokenizer(text, return_tensors="pt")).logits.argmax()) for text in TEXTS]
    result = classification(model, tokenizer, ROWS, batch_size=3, task="classification:made")
    assert result.details["answers"] == answers
    right = [float(a == b) for a, b in zip(answers, ROWS.labels, strict=True)]
    assert result.examples == right
    assert result.scores["accuracy"].value == pytest.approx(np.mean(right))
    assert (result.metric, result.better, result.n) == ("mcc", "higher", 8)
    assert result.value == pytest.approx(matthews_corrcoef(ROWS.labels, answers))
    assert np.sum(result.details["confusion"]) == 8
    assert has_answers(result)
    assert agreement(result, result).value == 0


@pytest.mark.parametrize("of_tokenizer", ["<pad>", "</s>", None])
@pytest.mark.parametrize("of_config", [PAD, EOS, VOCABULARY - 6, None, -1])
@pytest.mark.parametrize("model_type", ["llama", "gpt2"])
def test_answers_do_not_depend_on_the_batch(model_type: str, of_config: int | None, of_tokenizer: str | None) -> None:
    """A decoder's head reads the last token that is not the config's padding, whatever the tokenizer pads with."""
    model = tiny_model(model_type, "classifier", num_labels=2)
    model.config.pad_token_id = of_config
    tokenizer = tiny_tokenizer(pad_token=of_tokenizer)
    logits: dict[int, list[torch.Tensor]] = {1: [], 8: []}
    for size, seen in logits.items():
        with record_logits(model, seen):
            classification(model, tokenizer, ROWS, batch_size=size)
    torch.testing.assert_close(torch.cat(logits[8]), torch.cat(logits[1]), rtol=1e-4, atol=1e-5)
    assert len(logits[8]) == (8 if of_config in (None, -1) else 1)


@contextmanager
def record_logits(model: PreTrainedModel, seen: list[torch.Tensor]) -> Iterator[None]:
    """Inside, the logits of each batch are added to `seen`."""
    handle = model.register_forward_hook(lambda _model, _args, output: seen.append(output.logits))
    yield
    handle.remove()


def change(**fields: Any) -> Labelled:
    return Labelled(**{**{name: getattr(ROWS, name) for name in ROWS.__dataclass_fields__}, **fields})


def test_models_that_do_not_fit_are_named() -> None:
    with pytest.raises(ValueError, match="LlamaForCausalLM is no classifier"):
        classification(tiny_model("llama"), tiny_tokenizer(), ROWS)
    with pytest.raises(ValueError, match="tells 3 classes apart, classification has 2 "):
        classification(tiny_model("bert", "classifier", num_labels=3), tiny_tokenizer(), ROWS)
    empty = change(texts=(*TEXTS[:2], "", *TEXTS[3:]))
    with pytest.raises(ValueError, match=r"text 2 .* has no token"):
        classification(tiny_model("bert", "classifier", num_labels=2), tiny_tokenizer(), empty)
    broken = tiny_model("bert", "classifier", num_labels=2)
    with torch.no_grad():
        broken.classifier.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        classification(broken, tiny_tokenizer(), ROWS)
