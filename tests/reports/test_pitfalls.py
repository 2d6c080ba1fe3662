"""The three questions of the probing paper, on runs whose answers are known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from eckart.evals.result import EvalResult, Score
from eckart.reports.counterparts import WHAT
from eckart.reports.pitfalls import POOLED, WonBack, answer, compare, fail, recover, relate
from eckart.reports.runs import Collection, read_runs
from eckart.reports.verdicts import answers_data, pitfalls_of, sections

from .make_runs import (
    change_result,
    classification_result,
    make_probing_run,
    make_probing_study,
    make_run,
    probing_result,
    write_json,
)

HERON, SABLE = "example-org/heron-15M", "example-org/sable-60M"


def flat(selectivity: float, *, task: str = "probing:cola", layers: int = 4, **more: float) -> EvalResult:
    """A probing result with the same selectivity in every layer but the embeddings."""
    return probing_result(task, [(0.5, 0.5)] + [(0.5 + selectivity, 0.5)] * layers, **more)  # type: ignore[arg-type]


def correlated_runs(folder: Path, *, slope: float, noise: float, model: str = HERON, runs: int = 12) -> Collection:
    """Runs that lose from 0 to 0.5 of Matthews' correlation, and selectivity in proportion to it, with noise."""
    draw = np.random.default_rng(7)
    losses = np.linspace(0.02, 0.5, runs)
    for place, (loss, extra) in enumerate(zip(losses, draw.normal(0, noise, runs), strict=True)):
        results = {
            "probing:cola": (flat(0.4), flat(0.4 - slope * float(loss) - float(extra))),
            "classification:cola": (classification_result(0.6), classification_result(0.6 - float(loss))),
        }
        make_probing_run(folder / f"{model[-3:]}-{place}", model, keep=0.9 - 0.01 * place, results=results)
    return read_runs([folder])


def test_planted_losses_go_together(tmp_path: Path) -> None:
    (relation,) = relate(correlated_runs(tmp_path, slope=0.5, noise=0.03))
    assert (relation.model, relation.score, relation.probing) == (
        "heron-15M",
        "classification:cola mcc",
        "probing:cola",
    )
    assert relation.pearson.n == len(relation.points) == 12
    x, y = ([getattr(point, name) for point in relation.points] for name in ("loss", "selectivity"))
    assert sorted(x) == pytest.approx(np.linspace(0.02, 0.5, 12))
    assert relation.pearson.value == pytest.approx(np.corrcoef(x, y)[0, 1])
    truth = 0.5 * np.std(x) / math.hypot(0.5 * float(np.std(x)), 0.03)
    assert relation.pearson.interval is not None
    assert relation.pearson.interval[0] < truth < relation.pearson.interval[1]
    assert relation.verdict == "go together"
    assert relation.together == [1, 2, 3, 4]
    assert relation.layers[3][0].value == pytest.approx(relation.pearson.value)  # all layers lose the same here


def test_independent_losses_show_no_relation(tmp_path: Path) -> None:
    (relation,) = relate(correlated_runs(tmp_path, slope=0.0, noise=0.05))
    assert relation.pearson.interval is not None
    assert relation.pearson.interval[0] < 0 < relation.pearson.interval[1]
    assert (relation.verdict, relation.together) == ("no relation shown", [])


def test_models_are_also_taken_together(tmp_path: Path) -> None:
    correlated_runs(tmp_path, slope=0.5, noise=0.03, runs=3)
    for place, loss in enumerate((0.1, 0.2, 0.3)):
        results = {
            "probing:cola": (flat(0.4, layers=6), flat(0.4 - loss / 2, layers=6)),
            "classification:cola": (classification_result(0.6), classification_result(0.6 - loss)),
        }
        make_probing_run(tmp_path / f"sable-{place}", SABLE, keep=0.9 - 0.1 * place, results=results)
    by_model = {relation.model: relation for relation in relate(read_runs([tmp_path]))}
    assert list(by_model) == ["heron-15M", "sable-60M", POOLED]
    assert by_model["sable-60M"].verdict == "3 runs: too few for an interval"
    assert by_model["sable-60M"].pearson.value == pytest.approx(1.0)
    assert (by_model[POOLED].pearson.n, by_model[POOLED].layers) == (6, {})
    assert by_model[POOLED].verdict == "go together"


def test_perplexity_counts_in_nats_and_infinity_is_left_out(tmp_path: Path) -> None:
    def text(value: float) -> EvalResult:
        return EvalResult("perplexity:ptb", "perplexity", value, None, 9, "lower")

    for place, value in enumerate((12.0, 20.0, 40.0, 80.0, math.inf)):
        results = {
            "probing:cola": (flat(0.4), flat(0.4 - 0.1 * math.log(value / 10) if math.isfinite(value) else 0.0)),
            "perplexity:ptb": (text(10.0), text(value)),
        }
        make_probing_run(tmp_path / str(place), keep=0.9 - 0.1 * place, results=results)
    (relation,) = relate(read_runs([tmp_path]))
    assert [point.loss for point in relation.points] == pytest.approx([math.log(v / 10) for v in (12, 20, 40, 80)])
    assert relation.left_out == ("4",)
    assert relation.pearson.value == pytest.approx(1.0)
    (section,) = [s for s in pitfalls_of(read_runs([tmp_path])) if s.slug == "pitfalls-relation"]
    assert "Left out, as their loss is infinite: 4." in section.sentences


def losing_runs(folder: Path, *, own: bool = True) -> Collection:
    """Four runs that lose 0.1, 0.2, 0.3 and 0.4 nats, the first two measured on another part of the text.

    Args:
        own: each has a dense result of its own; otherwise only the first and the last one have.
    """

    def text(value: float, windows: int) -> EvalResult:
        return EvalResult("perplexity:ptb", "perplexity", value, None, 9, "lower", settings={"windows": windows})

    for place, (nats, dense, windows) in enumerate(((0.1, 10, 10), (0.2, 10, 10), (0.3, 20, 100), (0.4, 20, 100))):
        results = {
            "probing:cola": (flat(0.4), flat(0.4 - nats)),
            "perplexity:ptb": (text(dense, windows), text(dense * math.exp(nats), windows)),
        }
        run = make_probing_run(folder / str(place), keep=0.9 - 0.1 * place, results=results)
        if not own and place in (1, 2):
            (run / "evals" / "perplexity-ptb.dense.json").unlink()
    return read_runs([folder])


@pytest.mark.parametrize("own", [True, False])
def test_a_loss_is_from_the_runs_own_dense_result(tmp_path: Path, own: bool) -> None:
    collection = losing_runs(tmp_path, own=own)
    (relation,) = relate(collection)
    assert [point.loss for point in relation.points] == pytest.approx([0.1, 0.2, 0.3, 0.4])
    warning = "perplexity:ptb on heron-15M was measured with different windows: do not compare."
    (section,) = [each for each in pitfalls_of(collection) if each.slug == "pitfalls-relation"]
    assert warning in section.sentences
    assert answer(collection).clashes == {"perplexity:ptb": [warning]}


def test_a_run_without_a_dense_result_of_its_settings_is_no_point(tmp_path: Path) -> None:
    losing_runs(tmp_path)
    for place in (2, 3):
        (tmp_path / str(place) / "evals" / "perplexity-ptb.dense.json").unlink()
    (relation,) = relate(read_runs([tmp_path]))
    assert [point.run for point in relation.points] == ["0", "1"]


def test_what_is_won_back_is_from_the_runs_own_dense_result(tmp_path: Path) -> None:
    make_probing_run(tmp_path / "1", keep=0.9, results={"probing:cola": (flat(0.2), flat(0.1))})
    for name, steps, value in (("2", 0, 0.1), ("3", 8, 0.3)):
        make_probing_run(tmp_path / name, steps=steps, results={"probing:cola": (flat(0.4), flat(value))})
    (row,) = [row for row in recover(read_runs([tmp_path])) if row.measure == "selectivity"]
    assert (row.dense.value, row.lost.value) == (pytest.approx(0.4), pytest.approx(0.3))
    change_result(tmp_path / "2" / "evals" / "probing-cola.json", settings={"seeds": 1})
    assert list(recover(read_runs([tmp_path]))) == []


def test_pairs_of_one_set_come_first_and_fine_tuned_runs_do_not_count(tmp_path: Path) -> None:
    relations = list(relate(read_runs([make_probing_study(tmp_path)])))
    assert [relation.probing for relation in relations] == ["probing:cola", "probing:sst2"]
    assert {relation.pearson.n for relation in relations} == {6}


def test_methods_differ_by_the_mean_over_cells(tmp_path: Path) -> None:
    ours = {0.9: (0.38, 0.3), 0.5: (0.22, 0.1)}
    theirs = {0.9: (0.36, 0.25), 0.5: (0.10, 0.0)}
    for method, values in (("fwsvd", ours), ("svd", theirs)):
        for keep, (cola, sst2) in values.items():
            results = {
                "probing:cola": (flat(0.4), flat(cola)),
                "probing:sst2": (flat(0.4, task="probing:sst2"), flat(sst2, task="probing:sst2")),
            }
            make_probing_run(tmp_path / f"{method}-{keep}", method=method, keep=keep, results=results)
    make_probing_run(tmp_path / "alone", method="asvd-0", keep=0.7)  # no svd of this size
    collection = read_runs([tmp_path])
    (difference,) = compare(collection)
    assert (difference.model, difference.method, difference.baseline) == ("heron-15M", "fwsvd", "svd")
    differences = sorted(cell.selectivity for cell in difference.cells)
    assert differences == pytest.approx([0.02, 0.05, 0.10, 0.12])
    assert difference.selectivity.value == pytest.approx(0.0725)
    assert difference.f1.value == pytest.approx(0.0725)  # controls are alike here
    assert difference.selectivity.interval is not None
    assert 0.02 <= difference.selectivity.interval[0] < 0.0725 < difference.selectivity.interval[1] <= 0.12
    assert difference.verdict == "keeps more"
    (other,) = compare(collection, baseline="fwsvd")
    assert (other.method, other.selectivity.value) == ("svd", pytest.approx(-0.0725))
    assert other.verdict == "keeps less"


def test_layers_that_fail_the_check_are_counted(tmp_path: Path) -> None:
    half = probing_result("probing:cola", [(0.9, 0.5), (0.8, 0.5), (0.75, 0.5), (0.6, 0.5), (0.5, 0.5)])
    make_probing_run(tmp_path / "a", results={"probing:cola": (flat(0.4), half)})
    by_method = {row.method: row for row in fail(read_runs([tmp_path]))}
    assert by_method["dense"].tasks == {"probing:cola": (0, 4)}
    assert by_method["svd"].tasks == {"probing:cola": (2, 4)}  # the embeddings pass, and do not count
    assert by_method["svd"].total == (2, 4)


def test_a_dense_model_that_knows_nothing_is_named(tmp_path: Path) -> None:
    make_probing_run(tmp_path / "a", results={"probing:cola": (flat(0.1), flat(0.1))})
    (section,) = pitfalls_of(read_runs([tmp_path]))
    assert "heron-15M: the dense model fails the check in every layer; there is little to lose." in section.sentences


def test_what_a_fine_tuning_wins_back(tmp_path: Path) -> None:
    dense, cut, mended = flat(0.4), flat(0.1), flat(0.25)
    make_probing_run(tmp_path / "cut", results={"probing:cola": (dense, cut)})
    make_probing_run(tmp_path / "mended", steps=64, results={"probing:cola": (dense, mended)})
    make_probing_run(tmp_path / "other", keep=0.5, steps=64)  # its pair is missing
    by_measure = {row.measure: row for row in recover(read_runs([tmp_path]))}
    assert set(by_measure) == {"selectivity", "f1"}
    row = by_measure["selectivity"]
    assert (row.model, row.method, row.size, row.settings) == ("heron-15M", "svd", "keep 0.7", {"steps": 64})
    error = dense.scores["selectivity"].stderr
    assert error == pytest.approx(0.02 / math.sqrt(3))  # seeds 0.02 apart, both up in F1 and down in the control
    assert row.lost.value == pytest.approx(0.3)
    assert row.lost.stderr == pytest.approx(error * math.sqrt(2))
    assert row.won_back == pytest.approx(0.5)
    assert row.remains.value == pytest.approx(0.15)
    assert row.failed == (0, 4, 0)
    assert row.verdict == "partly won back"


@pytest.mark.parametrize(
    ("dense", "cut", "mended", "verdict", "won"),
    [
        (0.40, 0.10, 0.39, "won back", 0.29 / 0.3),
        (0.40, 0.10, 0.45, "won back", 0.35 / 0.3),
        (0.40, 0.10, 0.11, "lost for good", 0.01 / 0.3),
        (0.40, 0.10, 0.05, "lost for good", -0.05 / 0.3),
        (0.40, 0.10, 0.20, "partly won back", 1 / 3),
        (0.40, 0.39, 0.10, "no loss shown", None),
        (0.40, 0.45, 0.50, "no loss shown", None),
    ],
)
def test_a_difference_within_its_error_is_none(
    dense: float, cut: float, mended: float, verdict: str, won: float | None
) -> None:
    values = [Score(value, 0.02, 9) for value in (dense, cut, mended)]  # an error of 0.028 for differences
    row = WonBack("m", "svd", "", "probing:cola", "selectivity", *values, None, {})
    assert row.verdict == verdict
    assert row.won_back == (None if won is None else pytest.approx(won))


def test_a_single_seed_has_no_error_and_that_is_said(tmp_path: Path) -> None:
    for name, steps, value in (("cut", 0, 0.1), ("mended", 8, 0.39)):
        results = {"probing:cola": (flat(0.4, seeds=1), flat(value, seeds=1))}
        make_probing_run(tmp_path / name, steps=steps, results=results)
    collection = read_runs([tmp_path])
    row = next(iter(recover(collection)))
    assert (row.lost.stderr, row.verdict) == (None, "partly won back")
    assert any("no error, as of a single seed" in text for text in pitfalls_of(collection)[-1].sentences)


def test_no_probing_is_an_error_and_no_section(tmp_path: Path) -> None:
    collection = read_runs([make_run(tmp_path / "run")])
    assert pitfalls_of(collection) == []
    with pytest.raises(ValueError, match="no compressed model was probed"):
        answer(collection)


def test_a_probing_alone_answers_what_it_can(tmp_path: Path) -> None:
    make_probing_run(tmp_path / "run", results={"probing:cola": (flat(0.4), flat(0.1))})
    answers = answer(read_runs([tmp_path]))
    assert (answers.relations, answers.differences, answers.recoveries) == ((), (), ())
    (section,) = sections(answers)
    assert section.sentences == (f"No method can be compared with svd: no run of it has another's {WHAT}.",)
    assert [table.slug for table in section.tables] == ["failing"]


def test_a_dense_model_with_other_layers_is_refused(tmp_path: Path) -> None:
    results = {
        "probing:cola": (flat(0.4), flat(0.1, layers=3)),
        "classification:cola": (classification_result(0.6), classification_result(0.5)),
    }
    run = make_probing_run(tmp_path / "run", results=results)
    with pytest.raises(ValueError, match="run: probing:cola has 3 layers, of the dense model 4"):
        answer(read_runs([run]))


def test_tables_fit_and_the_data_is_json(tmp_path: Path) -> None:
    answers = answer(read_runs([make_probing_study(tmp_path, models=2)]))
    questions = sections(answers)
    assert [section.slug for section in questions] == ["pitfalls-relation", "pitfalls-methods", "pitfalls-recovery"]
    for section in questions:
        assert section.sentences
        for table in (*section.tables, *section.long):
            assert table.rows
            assert all(len(cells) == len(table.columns) for cells in table.rows), table.slug
    file = tmp_path / "answers.json"
    write_json(file, answers_data(answers))
    data = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["relations"][0]["pearson"]["value"] == answers.relations[0].pearson.value
    assert data["relations"][0]["layers"]["1"][0]["n"] == 6
    assert data["recoveries"][0]["remains"]["value"] == answers.recoveries[0].remains.value
    assert set(data["sentences"]) == {section.slug for section in questions}
