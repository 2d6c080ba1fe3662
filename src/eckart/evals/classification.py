"""Classification: how well a fine-tuned classifier tells the classes of a labelled set apart."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from eckart.data.labelled import Labelled
from eckart.evals.hidden_states import pad_rows, tokenize_texts
from eckart.evals.result import TRAITS, EvalResult, Score
from eckart.evals.windows import check_finite
from eckart.support.progress import Track, silent


@torch.inference_mode()
def classification(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Labelled,
    *,
    length: int | None = None,
    batch_size: int = 8,
    task: str = "classification",
    settings: dict[str, Any] | None = None,
    track: Track = silent,
) -> EvalResult:
    """Matthews' correlation, accuracy and weighted F1 of a classifier's answers.

    Args:
        model: with a sequence-classification head of as many labels as the set has classes, in their order.
        length: tokens of a text read at most; default what the model has positions for.
        batch_size: texts at a time: memory and speed only. A model without a token for padding reads one.

    Returns:
        value = Matthews' correlation (0 where every answer is the same); stderr by the jackknife. Scores: accuracy,
        with its binomial error, and f1, weighted, with the jackknife's. examples: 1 right, 0 wrong; details: ids and
        answers, for agreement, `truncated`, and the `confusion` of true class (rows) and answer (columns).

    Raises:
        ValueError: a model without such a head, with another number of labels, or a logit that is not finite.

    Cost: one forward pass over the texts.
    """
    if "ForSequenceClassification" not in type(model).__name__:
        raise ValueError(
            f"{type(model).__name__} is no classifier: fine-tune one with `eckart finetune`, or probe its states"
        )
    if model.config.num_labels != len(rows.classes):
        raise ValueError(
            f"{type(model).__name__} tells {model.config.num_labels} classes apart, {task} has {len(rows.classes)} "
            f"({', '.join(rows.classes)}): is it fine-tuned on another task?"
        )
    texts = tokenize_texts(model, tokenizer, rows.texts, length)
    order, at_once = texts.by_length, 1 if texts.padding is None else batch_size
    batches = [order[start : start + at_once] for start in range(0, len(order), at_once)]
    answers = np.zeros(len(rows), dtype=np.int64)
    for number, batch in enumerate(track(batches, task, len(batches))):
        ids, mask = pad_rows([texts.ids[row] for row in batch], texts.padding)
        logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device).long()).logits.float()
        check_finite(logits, task, number * at_once)
        answers[batch] = logits.argmax(-1).cpu().numpy()
    labels = np.array(rows.labels)
    confusion = np.zeros((len(rows.classes),) * 2)
    np.add.at(confusion, (labels, answers), 1.0)
    right = (labels == answers).astype(np.float64)
    accuracy = float(right.mean())
    return EvalResult(
        task=task,
        metric="mcc",
        value=matthews(confusion),
        stderr=_jackknife(confusion, matthews),
        n=len(rows),
        traits=TRAITS["classification"],
        settings={**rows.source, **(settings or {}), "length": texts.length, "rows": len(rows)},
        examples=right.tolist(),
        scores={
            "accuracy": Score(accuracy, float(np.sqrt(accuracy * (1 - accuracy) / len(rows))), len(rows)),
            "f1": Score(weighted_f1(confusion), _jackknife(confusion, weighted_f1), len(rows)),
        },
        details={
            "ids": list(range(len(rows))),
            "answers": answers.tolist(),
            "truncated": texts.truncated,
            "confusion": confusion.astype(int).tolist(),
        },
    )


def matthews(confusion: NDArray[np.float64]) -> float:
    """Matthews' correlation of any number of classes (Gorodkin 2004); 0 where one side has one class only.

    Args:
        confusion: (classes, classes) counts by true class and answer.
    """
    from sklearn.metrics import matthews_corrcoef  # slow to import, and needed only here

    labels, answers = np.nonzero(confusion)
    if len(np.union1d(labels, answers)) == 1:
        return 0.0
    return float(matthews_corrcoef(labels, answers, sample_weight=confusion[labels, answers]))


def weighted_f1(confusion: NDArray[np.float64]) -> float:
    """F1 of every class, weighted by how many rows are truly of it; a class without rows and answers counts nothing."""
    from sklearn.metrics import f1_score

    labels, answers = np.nonzero(confusion)
    weights = confusion[labels, answers]
    return float(f1_score(labels, answers, average="weighted", sample_weight=weights, zero_division=0.0))


def _jackknife(confusion: NDArray[np.float64], statistic: Any) -> float | None:
    """The standard error of a statistic of the counts, leaving one row out at a time: all rows of a cell alike."""
    total = confusion.sum()
    if total < 2:
        return None
    values, counts = [], []
    for cell in zip(*np.nonzero(confusion), strict=True):
        without = confusion.copy()
        without[cell] -= 1
        values.append(statistic(without))
        counts.append(confusion[cell])
    mean = np.average(values, weights=counts)
    spread = np.average((np.array(values) - mean) ** 2, weights=counts)
    return float(np.sqrt((total - 1) * spread))
