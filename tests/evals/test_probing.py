"""Probing: laws of probes and controls, and what the evaluation reports."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from eckart.data.labelled import Labelled
from eckart.evals import probing
from eckart.evals.probing import control_labels, draw, probe, train_probe
from eckart.evals.result import EvalResult
from eckart.evals.task import Task
from eckart.evals.tasks import evaluate
from eckart.support.progress import silent
from tiny import BLOCKS, Run, tiny_model, tiny_text, tiny_tokenizer


def labelled(labels: list[int] | NDArray[Any], texts: list[str] | None = None) -> Labelled:
    texts = texts or [f"text {number}" for number in range(len(labels))]
    names: dict[str, int] = {}
    groups = tuple(names.setdefault(text, len(names)) for text in texts)
    return Labelled(tuple(texts), tuple(int(n) for n in labels), ("no", "yes"), groups, {"corpus": "made"})


def readings(states: NDArray[np.float32], rows: Labelled, seeds: int = 1, **options: Any) -> list[probing.Reading]:
    """What probes of one layer with these states say, by seed."""
    trials = [draw(rows, options.get("control", "text"), seed) for seed in range(seeds)]
    (layer,) = probing._read_layers(states[None], np.array(rows.labels), trials, 1, "probing", silent)
    return layer


def keyword_rows(count: int, seed: int = 0) -> Labelled:
    """Texts of the tiny tokenizer whose class is whether they contain a word."""
    texts = [f"{tiny_text(6, seed + n)} {'w1 w1' if n % 2 else 'w2 w2'}" for n in range(count)]
    return labelled([n % 2 for n in range(count)], texts)


@pytest.mark.parametrize("classes", [2, 3])
def test_a_planted_linear_feature_is_found(classes: int) -> None:
    draw = np.random.default_rng(0)
    labels = np.arange(1000) % classes
    states = draw.standard_normal((1000, 64)).astype(np.float32)
    states += 4 * np.eye(classes, 64, dtype=np.float32)[labels]
    rows = Labelled(
        tuple(map(str, range(1000))), tuple(labels.tolist()), tuple("abc"[:classes]), tuple(range(1000)), {}
    )
    (reading,) = readings(states, rows)
    assert min(reading.f1, reading.accuracy, reading.mcc) > 0.95
    assert reading.selectivity > 0.3


def test_what_no_line_divides_is_found_as_well() -> None:
    """The probe has a hidden layer: the product of two signs."""
    draw = np.random.default_rng(0)
    states = draw.standard_normal((2000, 8)).astype(np.float32)
    (reading,) = readings(states, labelled((states[:, 0] * states[:, 1] > 0).astype(int)))
    assert reading.f1 > 0.9


@pytest.mark.parametrize("share", [pytest.param(0.5, marks=pytest.mark.slow), 0.2])
@pytest.mark.parametrize("what", ["random features", "shuffled labels"])
def test_where_there_is_nothing_selectivity_is_zero_within_its_error(what: str, share: float) -> None:
    draw = np.random.default_rng(1)
    labels = (draw.random(800) < share).astype(int)
    states = draw.standard_normal((800, 32)).astype(np.float32)
    if what == "shuffled labels":  # features that know the true labels are of no use for others
        states[:, 0] += 4 * labels
        labels = draw.permutation(labels)
    selectivities = np.array([reading.selectivity for reading in readings(states, labelled(labels), seeds=10)])
    assert abs(selectivities.mean()) < 3 * selectivities.std(ddof=1) / np.sqrt(len(selectivities))
    assert selectivities.std() > 0


def test_a_control_remembers_what_recurs_and_nothing_else() -> None:
    """Texts of their own are new to the probe; last words that recur can be remembered."""
    draw = np.random.default_rng(2)
    words = draw.integers(0, 12, 1000)
    texts = [f"text {number} word{word}." for number, word in enumerate(words)]
    states = (np.eye(12, dtype=np.float32)[words] + 0.01 * draw.standard_normal((1000, 12))).astype(np.float32)
    rows = labelled(draw.integers(0, 2, 1000), texts)
    by_text, by_word = readings(states, rows), readings(states, rows, control="last-word")
    assert by_word[0].control > 0.99
    assert by_text[0].control < 0.65
    assert by_text[0].f1 == by_word[0].f1  # the task is the same


def test_control_labels_have_the_tasks_frequencies_and_one_label_a_type() -> None:
    texts = [f"a b{number % 3000}" for number in range(6000)]
    rows = labelled([int(number % 10 < 3) for number in range(6000)], texts)
    drawn = control_labels(rows, "text", 0)
    assert np.array_equal(drawn[:3000], drawn[3000:])
    assert drawn.mean() == pytest.approx(0.3, abs=0.03)
    assert not np.array_equal(drawn, control_labels(rows, "text", 1))
    words = control_labels(labelled([0, 1, 0, 1], ["x Dog.", "y dog", "z cat!", "dog cat"]), "last-word", 3)
    assert words[0] == words[1]
    assert words[2] == words[3]


def test_a_split_is_four_to_one_keeps_shares_and_leaves_groups_whole() -> None:
    rows = labelled([n % 4 == 0 for n in range(1000)], [f"text {n // 2 * 2 + (n % 4 == 0)}" for n in range(1000)])
    for seed in range(3):
        trial = draw(rows, "text", seed)
        assert sorted([*trial.train, *trial.test]) == list(range(1000))
        assert len(trial.test) == pytest.approx(200, abs=5)
        labels, groups = np.array(rows.labels), np.array(rows.groups)
        assert labels[trial.test].mean() == pytest.approx(0.25, abs=0.02)
        assert not set(groups[trial.train]) & set(groups[trial.test])
    assert not np.array_equal(draw(rows, "text", 0).test, draw(rows, "text", 1).test)


def test_a_probe_is_what_its_seed_says() -> None:
    draw = np.random.default_rng(0)
    states, labels = draw.standard_normal((200, 8)).astype(np.float32), draw.integers(0, 2, 200)
    train, test = np.arange(160), np.arange(160, 200)
    first = train_probe(states, labels, train, test, 0)
    assert np.array_equal(first, train_probe(states, labels, train, test, 0))
    assert not np.array_equal(first, train_probe(states, labels, train, test, 1))
    assert (train_probe(states, np.ones(200, dtype=np.intp), train, test, 0) == 1).all()


def test_the_result_has_every_layer_with_its_control() -> None:
    result = probe(tiny_model("llama"), tiny_tokenizer(), keyword_rows(100), seeds=2, task="probing:made")
    layers = result.details["layers"]
    assert [layer["layer"] for layer in layers] == list(range(BLOCKS + 1))
    for layer in layers:
        assert all(len(layer[name]) == 2 for name in ("f1", "accuracy", "mcc", "control"))
        number = layer["layer"]
        for name in ("f1", "control"):
            score = result.scores[f"{name}.{number}"]
            assert score.value == pytest.approx(np.mean(layer[name]))
            assert score.stderr == pytest.approx(np.std(layer[name], ddof=1) / np.sqrt(2))
        gap = result.scores[f"selectivity.{number}"].value
        assert gap == pytest.approx(np.mean(layer["f1"]) - np.mean(layer["control"]))
        assert layer["passes"] == (gap >= 0.2)
    blocks = layers[1:]  # the embeddings are read and not counted
    assert result.value == pytest.approx(np.mean([layer["f1"] for layer in blocks]))
    assert result.scores["selectivity"].value == pytest.approx(result.value - result.scores["control"].value)
    assert result.scores["passed"].value == pytest.approx(np.mean([layer["passes"] for layer in blocks]))
    assert (result.metric, result.better, result.n) == ("f1", "higher", 100)
    assert result.details["majority"] == pytest.approx(1 / 3)  # half the rows, F1 2/3
    assert EvalResult.from_json(result.to_json()) == result
    assert result.scores["f1.0"].value > 0.8  # the mean of embeddings, two of them of the word


@pytest.mark.slow
def test_workers_and_batches_change_nothing() -> None:
    model, rows = tiny_model("llama"), keyword_rows(60)
    plain = probe(model, tiny_tokenizer(), rows, seeds=1)
    assert probe(model, tiny_tokenizer(), rows, seeds=1, workers=3).details == plain.details
    assert probe(model, tiny_tokenizer(), rows, seeds=1).details == plain.details


@pytest.mark.slow
def test_one_seed_has_no_error_and_another_first_seed_is_another_draw() -> None:
    model, rows = tiny_model("llama"), labelled(np.random.default_rng(0).integers(0, 2, 80), [
        tiny_text(5, n) for n in range(80)
    ])  # fmt: skip
    one, other = (probe(model, tiny_tokenizer(), rows, seeds=1, seed=seed) for seed in (0, 1))
    assert one.stderr is None
    assert one.details["layers"] != other.details["layers"]
    both = probe(model, tiny_tokenizer(), rows, seeds=2)
    assert [layer["f1"][0] for layer in both.details["layers"]] == [layer["f1"][0] for layer in one.details["layers"]]


def test_what_does_not_fit_is_named() -> None:
    model, rows = tiny_model("llama"), keyword_rows(20)
    few = labelled([1] * 16 + [0] * 4, list(rows.texts))
    with pytest.raises(ValueError, match=r"made: 4 texts of class 'no'; .* at least 5 of every class"):
        probe(model, tiny_tokenizer(), few)
    with pytest.raises(ValueError, match="seeds 0 is not positive"):
        probe(model, tiny_tokenizer(), rows, seeds=0)
    with pytest.raises(ValueError, match="control 'word' is none of text, last-word"):
        probe(model, tiny_tokenizer(), rows, control="word")  # type: ignore[arg-type]


def write_rows(file: Path, rows: Labelled) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip(rows.texts, rows.labels, strict=True)]
    file.write_text("\n".join(lines))


def test_probing_is_an_evaluation_like_any_other(tmp_path: Path) -> None:
    write_rows(tmp_path / "cola" / "dev.jsonl", keyword_rows(60))
    write_rows(tmp_path / "cola" / "train.jsonl", keyword_rows(80, 1000))
    tasks = [Task("probing:cola", seeds=1), Task("probing:cola", "train", limit=40, pooling="last", seeds=1)]
    results = evaluate(tiny_model("llama"), tiny_tokenizer(), tasks, data=tmp_path, cache=tmp_path / "cache")
    assert [result.task for result in results] == ["probing:cola", "probing:cola@train@last"]
    assert [result.n for result in results] == [60, 40]
    assert results[1].settings["pooling"] == "last"
    assert Counter(file.suffix for file in (tmp_path / "cache" / "states").iterdir()) == {".npy": 2}


@pytest.mark.slow
def test_the_command_prints_a_row_for_every_layer(run: Run, tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "rows.jsonl", keyword_rows(60))
    options = ("--task", tmp_path / "rows.jsonl", "--seeds", "2", "--no-cache", "--out", tmp_path / "out")
    status, printed = run("probe", tmp_path / "model", *options, "--reference", tmp_path / "model")
    assert status == 0
    assert all(word in printed for word in ("embeddings", "weighted F1", "control", "selectivity", "passes", "+0.000"))
    (file,) = (tmp_path / "out").glob("probing-*.json")
    assert EvalResult.from_json(file.read_text()).n == 60
    status, printed = run("probe", tmp_path / "model", *options, "--limit", "40")
    assert status == 2
    assert "is of something else (limit was None and is 40); give another --out, or --force" in printed
    status, printed = run("probe", tmp_path / "model", "--task", "colla")
    assert status == 2
    assert "no labelled set 'colla'" in printed


def test_layers_are_counted_from_the_last_as_well() -> None:
    result = probe(tiny_model("llama"), tiny_tokenizer(), keyword_rows(40), seeds=1)
    assert result.read("f1.-1") == result.read(f"f1.{BLOCKS}")
    assert result.read("control.-2") == result.read(f"control.{BLOCKS - 1}")
    with pytest.raises(ValueError, match=r"has no score 'f1.-1'; it has"):
        result.read(f"f1.-{BLOCKS + 2}")
    with pytest.raises(ValueError, match=r"has no score"):
        result.read("kl.-1")
