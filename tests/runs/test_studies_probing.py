"""The studies of the probing paper: its rows as it prints them, and every run a recipe that fits."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from eckart.data.labelled import LABELLED
from eckart.models.sites import find_sites, select_sites
from eckart.runs.recipe import Recipe
from eckart.runs.study import Study, load_study, studies
from tiny import tiny_model

SETS = ("cola", "sst2", "truthfulqa")
METHODS = {"SVD": "svd", "FWSVD": "fwsvd", "ASVD": "asvd-i"}
# The paper's own, then those of its questions and of its outlook.
TABLES = [f"probing-table-{name}" for name in ("2-cola", "2-mmlu", "3", "4", "5")]
FIGURES = [f"probing-figure-{number}" for number in (2, 3, 4)]
# Figure 1: the curves of Table 2 with pruning and quantisation.
RIVALS = ["probing-figure-1-cola", "probing-figure-1-mmlu"]
OTHERS = ["probing-methods", "probing-questions", "probing-questions-encoder", "probing-search", "probing-table-2-sst2"]
NAMES = [name for name in studies() if name.startswith("probing-")]
# Labelled text does not come with eckart, so what reads nothing else cannot run without data.
WITHOUT_DATA = ["probing-figure-1-mmlu", "probing-table-2-mmlu", "probing-questions", "probing-search"]
FINE_TUNED = [
    "probing-figure-1-cola",
    "probing-table-2-cola",
    "probing-table-2-sst2",
    "probing-table-3",
    "probing-questions-encoder",
]

# Rows as the paper prints them. Table 2: the share removed in per cent, then the numbers.
CURVES = {
    "probing-table-2-mmlu": """
        rate | 0 5 10 15 25 35
        SVD | 0.456 0.296 0.265 0.257 0.255 0.232
        FWSVD | 0.456 0.337 0.296 0.274 0.26 0.236
        ASVD | 0.456 0.428 0.417 0.345 0.285 0.261
    """,
    "probing-table-2-cola": """
        rate | 0 10 20 30 40 50
        SVD | 0.59 0.384 0.156 0.035 0 0
        FWSVD | 0.59 0.552 0.553 0.388 0.09 0
    """,
}
# Tables 3 to 5: four layers of CoLA, of SST-2, of TruthfulQA.
LAYERS = {
    "probing-table-3": """
        w/o compress | 0.824 0.832 0.832 0.829 0.842 0.851 0.857 0.836 0.747 0.723 0.796 0.778
        control t. | 0.525 0.435 0.545 0.557 0.456 0.472 0.483 0.424 0.571 0.576 0.602 0.393
        SVD 90% | 0.765 0.77 0.774 0.765 0.801 0.79 0.791 0.79 0.788 0.787 0.654 0.667
        control t. | 0.577 0.513 0.571 0.516 0.395 0.413 0.459 0.388 0.608 0.501 0.543 0.407
        FWSVD 90% | 0.768 0.775 0.767 0.77 0.808 0.794 0.808 0.796 0.687 0.728 0.756 0.61
        control t. | 0.468 0.556 0.468 0.551 0.448 0.423 0.442 0.485 0.494 0.449 0.475 0.45
        SVD 70% | 0.68 0.6 0.62 0.639 0.736 0.731 0.711 0.69 0.71 0.655 0.646 0.694
        control t. | 0.494 0.542 0.378 0.318 0.46 0.415 0.41 0.398 0.508 0.615 0.478 0.388
        FWSVD 70% | 0.631 0.652 0.637 0.603 0.698 0.718 0.711 0.716 0.614 0.524 0.636 0.713
        control t. | 0.561 0.468 0.562 0.495 0.485 0.423 0.396 0.453 0.44 0.57 0.571 0.584
        SVD 50% | 0.529 0.627 0.451 0.612 0.72 0.718 0.701 0.672 0.583 0.699 0.632 0.562
        control t. | 0.426 0.451 0.578 0.443 0.44 0.352 0.378 0.432 0.576 0.653 0.524 0.408
        FWSVD 50% | 0.548 0.443 0.507 0.441 0.736 0.617 0.672 0.507 0.473 0.494 0.347 0.537
        control t. | 0.428 0.318 0.299 0.431 0.345 0.34 0.351 0.381 0.397 0.673 0.636 0.476
    """,
    "probing-table-4": """
        w/o compress | 0.75 0.774 0.76 0.711 0.905 0.904 0.914 0.904 0.791 0.795 0.801 0.782
        control t. | 0.579 0.563 0.387 0.569 0.396 0.352 0.469 0.417 0.629 0.647 0.6 0.596
        SVD 95% | 0.74 0.716 0.667 0.701 0.891 0.873 0.471 0.87 0.757 0.774 0.297 0.724
        control t. | 0.438 0.249 0.401 0.429 0.426 0.436 0.403 0.39 0.604 0.616 0.244 0.602
        FWSVD 95% | 0.761 0.746 0.758 0.72 0.9 0.893 w.895 0.874 0.785 0.769 0.797 0.779
        control t. | 0.491 0.505 0.582 0.439 0.453 0.478 0.491 0.403 0.658 0.647 0.583 0.658
        ASVD 95% | 0.726 0.750 0.768 0.735 0.922 0.920 0.917 0.910 0.798 0.800 0.811 0.786
        control t. | 0.412 0.378 0.432 0.509 0.357 0.370 0.393 0.385 0.625 0.603 0.606 0.606
        SVD 85% | 0.711 0.651 0.297 0.532 0.812 0.813 0.345 0.782 0.698 0.196 0.478 0.523
        control t. | 0.455 0.433 0.565 0.312 0.339 0.423 0.337 0.4 0.431 0.608 0.291 0.546
        FWSVD 85% | 0.745 0.761 0.757 0.714 0.891 0.9 0.876 0.848 0.795 0.748 0.597 0.535
        control t. | 0.493 0.451 0.563 0.427 0.472 0.409 0.394 0.38 0.582 0.644 0.631 0.621
        ASVD 85% | 0.76 0.767 0.771 0.745 0.894 0.908 0.904 0.902 0.808 0.821 0.773 0.776
        control t. | 0.396 0.42 0.401 0.521 0.441 0.361 0.512 0.399 0.62 0.598 0.602 0.612
        SVD 75% | 0.565 0.469 0.347 0.567 0.712 0.712 0.402 0.5 0.252 0.658 0.462 0.458
        control t. | 0.565 0.356 0.574 0.584 0.37 0.35 0.366 0.384 0.432 0.553 0.666 0.648
        FWSVD 75% | 0.719 0.704 0.71 0.633 0.841 0.843 0.783 0.793 0.498 0.711 0.526 0.336
        control t. | 0.417 0.462 0.571 0.3 0.507 0.397 0.341 0.336 0.527 0.577 0.672 0.546
        ASVD 75% | 0.680 0.671 0.673 0.651 0.820 0.815 0.813 0.813 0.777 0.72 0.760 0.750
        control t. | 0.432 0.421 0.581 0.499 0.390 0.401 0.388 0.410 0.591 0.566 0.561 0.615
    """,
    "probing-table-5": """
        w/o compress | 0.787 0.783 0.783 0.747 0.920 0.909 0.913 0.899 0.783 0.771 0.758 0.720
        control t. | 0.579 0.563 0.387 0.569 0.396 0.352 0.469 0.417 0.629 0.647 0.6 0.596
        SVD 95% | 0.774 0.751 0.715 0.615 0.888 0.896 0.885 0.853 0.772 0.778 0.759 0.612
        control t. | 0.438 0.249 0.401 0.429 0.426 0.436 0.403 0.39 0.604 0.616 0.244 0.602
        ASVD 95% | 0.766 0.773 0.804 0.754 0.906 0.902 0.902 0.898 0.712 0.737 0.762 0.607
        control t. | 0.412 0.378 0.432 0.509 0.357 0.370 0.393 0.385 0.625 0.603 0.606 0.606
        SVD 85% | 0.610 0.654 0.660 0.519 0.747 0.726 0.718 0.713 0.597 0.762 0.760 0.708
        control t. | 0.455 0.433 0.565 0.312 0.339 0.423 0.337 0.4 0.431 0.608 0.291 0.546
        ASVD 85% | 0.708 0.742 0.718 0.729 0.819 0.829 0.834 0.812 0.766 0.752 0.749 0.685
        control t. | 0.396 0.42 0.401 0.521 0.441 0.361 0.512 0.399 0.62 0.598 0.602 0.612
        SVD 75% | 0.627 0.642 0.568 0.524 0.668 0.643 0.643 0.547 0.655 0.433 0.479 0.672
        control t. | 0.565 0.356 0.574 0.584 0.372 0.35 0.366 0.384 0.432 0.553 0.666 0.648
        ASVD 75% | 0.694 0.706 0.6 0.640 0.714 0.681 0.678 0.672 0.696 0.547 0.641 0.476
        control t. | 0.432 0.421 0.581 0.499 0.390 0.401 0.388 0.410 0.591 0.566 0.561 0.615
    """,
}


def printed(text: str) -> Iterator[tuple[str, list[float]]]:
    """(label, numbers) of every row; "w.895" is 0.895."""
    for line in text.strip().splitlines():
        label, numbers = line.split(" | ")
        yield label.strip(), [float(re.sub("^w", "0", number)) for number in numbers.split()]


def layer_rows(name: str) -> dict[str, tuple[list[float], list[float]]]:
    """{label: (scores, controls)} of a table of layers."""
    rows = list(printed(LAYERS[name]))
    assert [label for label, _ in rows[1::2]] == ["control t."] * (len(rows) // 2)
    return {label: (scores, controls) for (label, scores), (_, controls) in zip(rows[::2], rows[1::2], strict=True)}


def at_scales(name: str) -> Iterator[tuple[str, Study]]:
    study = load_study(name)
    for scale in ("paper", *study.scales):
        yield scale, study.at(scale)


def recipes_of(study: Study) -> list[Recipe]:
    return [recipe for *_, recipe in study.recipes()]


def size_of(recipe: Recipe) -> tuple[str, float]:
    assert recipe.keep is not None
    return recipe.method.name, recipe.keep


def test_every_table_and_question_has_its_file() -> None:
    assert sorted(NAMES) == sorted(TABLES + FIGURES + RIVALS + OTHERS)


@pytest.mark.parametrize("name", NAMES)
def test_structure(name: str) -> None:
    study = load_study(name)
    if name in TABLES + FIGURES + RIVALS:
        place = re.match(r"Probing ((?:Table|Figure) \d)", study.title)
        assert place is not None
        assert study.paper.endswith(place[1])
        assert name.startswith("probing-" + place[1].lower().replace(" ", "-"))
    assert "Probing the Pitfalls" in study.paper
    assert len(study.about.split()) > 40
    assert list(study.scales) == (["small", "builtin"] if name in WITHOUT_DATA else ["small"])
    assert ("There is no scale builtin" in study.about) == (name not in WITHOUT_DATA)
    for scale in study.scales.values():
        assert scale.note.strip()
        assert scale.base["model"] == "builtin"


@pytest.mark.parametrize("name", NAMES)
def test_every_run_is_a_valid_recipe(name: str) -> None:
    for scale, study in at_scales(name):
        tasks = {task.name for recipe in recipes_of(study) for task in recipe.tasks}
        for column in study.columns:
            assert column.partition("#")[0].removeprefix("agreement:") in tasks, (scale, column)
        for recipe in recipes_of(study):
            assert all(t.argument in LABELLED for t in recipe.tasks if t.kind in ("probing", "classification"))
            if scale != "paper":
                assert recipe.model == "builtin"
                assert recipe.dtype == "float32"
                assert all(task.limit for task in recipe.tasks if task.kind != "cost"), "a small model reads little"
            if scale == "builtin":
                assert all("builtin" in task.name or task.kind == "cost" for task in recipe.tasks)
                assert recipe.calibration.corpus.startswith("builtin")
                assert recipe.allocation is None or "builtin" in (recipe.allocation.score or "builtin")


@pytest.mark.parametrize("name", NAMES)
def test_nothing_but_mlps_is_compressed(name: str) -> None:
    """The roles that the paper names: all linears of the MLP and none of attention's, of a decoder and an encoder."""
    for _, study in at_scales(name):
        low_rank = [recipe for recipe in recipes_of(study) if not recipe.is_baseline]
        assert all(recipe.sites.include == ["mlp"] and not recipe.sites.exclude for recipe in low_rank)
    for kind, roles in (
        ("llama", {"mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"}),
        ("bert", {"intermediate.dense", "output.dense"}),
    ):
        assert {site.role for site in select_sites(find_sites(tiny_model(kind)), include=["mlp"])} == roles


@pytest.mark.parametrize("name", CURVES)
def test_table_2_is_the_paper_s(name: str) -> None:
    study = load_study(name)
    (_, rates), *rows = printed(CURVES[name])
    expected = {
        (METHODS[label], round(1 - rate / 100, 2)): [value]
        for label, (_, *values) in rows
        for rate, value in zip(rates[1:], values, strict=True)
    }
    assert {size_of(recipe): row.published for _, row, recipe in study.recipes()} == expected
    assert {(study.dense or [None])[0]} == {values[0] for _, values in rows}
    assert len(study.columns) == 1


@pytest.mark.parametrize("name", LAYERS)
def test_tables_of_layers_are_the_paper_s_with_the_control_of_every_score(name: str) -> None:
    study = load_study(name)
    first = {"probing-table-3": 9}.get(name, 29)  # the headers' "29 30 32 32" is 29 to 32
    places = [(task, layer) for task in SETS for layer in range(first, first + 4)]
    assert study.columns[::2] == [f"probing:{task}#f1.{layer}" for task, layer in places]
    assert study.columns[1::2] == [f"probing:{task}#control.{layer}" for task, layer in places]
    rows = layer_rows(name)
    by_size = {size_of(recipe): row.published for _, row, recipe in study.recipes()}
    dense = rows.pop("w/o compress")
    for published, (scores, controls) in [(study.dense, dense)] + [
        (by_size.pop((METHODS[label.split()[0]], int(label.split()[1].rstrip("%")) / 100)), row)
        for label, row in rows.items()
    ]:
        assert published is not None
        assert len(scores) == len(controls) == 12
        assert published[::2] == scores
        assert published[1::2] == controls
    assert not by_size, "runs that the paper has no row for"
    small = study.at("small")
    from_the_last = [re.sub(r"\d+$", lambda n: str(int(n[0]) - first - 4), column) for column in study.columns]
    assert small.columns == from_the_last  # of a model of any depth
    assert {recipe.method.name for recipe in recipes_of(small)} == {recipe.method.name for recipe in recipes_of(study)}


def test_controls_of_table_5_are_those_of_table_4() -> None:
    """What `about` says of them, and the one that is printed with another number of digits."""
    fourth, fifth = layer_rows("probing-table-4"), layer_rows("probing-table-5")
    different = [
        (label, place)
        for label, (_, controls) in fifth.items()
        for place, (one, other) in enumerate(zip(controls, fourth[label][1], strict=True))
        if one != other
    ]
    assert different == [("SVD 75%", 4)]


@pytest.mark.parametrize("name", FIGURES)
def test_figures_have_runs_of_their_tables(name: str) -> None:
    table = load_study("probing-table-5" if name.endswith("4") else "probing-table-4")
    shared, of_table = recipes_of(load_study(name)), recipes_of(table)
    assert shared
    assert all(recipe in of_table for recipe in shared)
    if name.endswith("4"):
        assert len(shared) == len(of_table)
    assert all(len(recipes_of(study)) == len(shared) for _, study in at_scales(name))


@pytest.mark.parametrize("name", RIVALS)
def test_figure_1_has_the_curves_of_table_2_and_their_rivals_at_the_same_size(name: str) -> None:
    table, study = load_study(name.replace("figure-1", "table-2")), load_study(name)
    curves = {size_of(recipe): row.published for _, row, recipe in study.recipes() if not recipe.is_baseline}
    assert curves == {size_of(recipe): [*(row.published or []), None] for _, row, recipe in table.recipes()}
    rivals = [recipe for recipe in recipes_of(study) if recipe.is_baseline]
    assert {recipe.method.name for recipe in rivals} == {"llm-pruner", "int8", "int4"}
    # Two thirds of a block are its MLP, in BERT (8 / 12) and in Llama (3 * 11008 / (4 * 4096 + 3 * 11008)).
    mlp = 8 / 12 if name.endswith("cola") else 3 * 11008 / (4 * 4096 + 3 * 11008)
    shares = [recipe.keep for recipe in rivals if recipe.keep is not None]
    sizes = sorted({keep for _, keep in curves}, reverse=True)
    assert shares == pytest.approx([1 - (1 - keep) * mlp for keep in sizes], abs=6e-4)


def test_figures_2_and_3_share_out_table_4() -> None:
    second, third, table = (recipes_of(load_study(f"probing-{name}")) for name in ("figure-2", "figure-3", "table-4"))
    assert sorted(map(size_of, second + third)) == sorted(map(size_of, table))


@pytest.mark.parametrize("name", NAMES)
def test_encoders_are_fine_tuned_first_and_give_their_fisher_information(name: str) -> None:
    study = load_study(name)
    assert (study.finetune is not None) == (name in FINE_TUNED)
    for recipe in recipes_of(study):
        recorded = name in FINE_TUNED and recipe.method.name == "fwsvd"
        assert recipe.calibration.fisher == ("recorded" if recorded else "gathered")


@pytest.mark.parametrize("name", ["probing-questions", "probing-questions-encoder"])
def test_the_questions_have_every_run_with_and_without_recovery(name: str) -> None:
    for _, study in at_scales(name):
        without, recovered = (
            [recipe for recipe in recipes_of(study) if (recipe.recover is not None) == fine_tuned]
            for fine_tuned in (False, True)
        )
        assert [recipe.model_copy(update={"recover": None}) for recipe in recovered] == without
        assert len({str(recipe.recover) for recipe in recovered}) == 1, "one recovery for all"
        assert len({recipe.method.name for recipe in without}) * len({recipe.keep for recipe in without}) == len(
            without
        )


def test_ranks_are_chosen_in_every_way_at_every_size() -> None:
    """Large sizes first, so that each search goes on; what a search has read, no result reads."""
    for scale, study in at_scales("probing-search"):
        ways: dict[str, list[float]] = {}
        for recipe in recipes_of(study):
            assert recipe.allocation is not None
            assert recipe.keep is not None
            score = recipe.allocation.score
            ways.setdefault(f"{recipe.allocation.name} {score}", []).append(recipe.keep)
            assert score is None or recipe.allocation.limit or score.startswith("perplexity")
            for task in recipe.tasks:
                assert task.name != score or task.split == "sfsd-evaluation" or task.kind == "probing"
                assert task.kind != "probing" or task.split == "test"
        (sizes,) = {tuple(sizes) for sizes in ways.values()}
        assert list(sizes) == sorted(sizes, reverse=True)
        assert len(ways) == {"paper": 6, "small": 5, "builtin": 4}[scale]
        searched = {"paper": "surgical probing:cola", "small": "surgical probing:sst2"}
        assert scale not in searched or searched[scale] in ways
