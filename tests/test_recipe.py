"""Recipes: what is written is what is read, and a slip of the pen is named."""

from pathlib import Path

import pytest

from eckart.recipe import Recipe, load_recipe, parse_recipe

GOOD = {
    "model": "m",
    "method": {"name": "asvd-0", "options": {"alpha": 1.0}},
    "rules": [{"keep": 0.46, "blocks": "last 12"}, {"keep": 0.9}],
    "calibration": {"corpus": "ptb", "samples": 4, "length": 8, "seed": 3},
    "evaluate": ["perplexity:ptb", {"task": "perplexity:c4", "limit": 2}],
}


def test_a_recipe_survives_its_own_yaml(tmp_path: Path) -> None:
    recipe = parse_recipe(GOOD)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(file) == recipe
    assert recipe.evaluate[0].task == "perplexity:ptb"
    assert recipe.evaluate[1].limit == 2


def test_a_method_may_be_a_bare_name() -> None:
    assert parse_recipe({"model": "m", "method": "sfsd", "keep": 0.5}).method.name == "sfsd"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kep": 0.7}, "unknown key 'kep'; did you mean 'keep'?"),
        ({"calibration": {"sampels": 4}}, "unknown key 'sampels' in calibration; did you mean 'samples'?"),
        ({"rules": [{"keep": 0.5, "block": "last 2"}]}, "unknown key 'block' in rules.0; did you mean 'blocks'?"),
        ({"evaluate": [{"task": "x", "limt": 4}]}, "did you mean 'limit'?"),
        ({"method": "asvd-4"}, "did you mean"),
        ({"method": {"name": "svd", "options": {"alpha": 1}}}, "method svd has no setting 'alpha'"),
        ({"keep": 1.5}, "keep: Input should be less than or equal to 1"),
        ({"keep": 0}, "keep: Input should be greater than 0"),
        ({"keep": 0.5}, "give exactly one of keep, rules and plan"),
        ({"rules": None}, "give exactly one of keep, rules and plan"),
        ({"calibration": {"samples": 0}}, "calibration.samples"),
        ({"dtype": "int8"}, "dtype"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, object], said: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the message is compared below)
        parse_recipe({**GOOD, **change}, where="r.yaml")
    assert said in str(caught.value)
    assert str(caught.value).startswith("r.yaml: ")


@pytest.mark.parametrize(
    ("text", "said"), [("a: [", "is not YAML"), ("- 1", "holds no recipe"), ("", "holds no recipe")]
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, text: str, said: str) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=said):
        load_recipe(file)
    with pytest.raises(ValueError, match="no recipe at"):
        load_recipe(tmp_path / "none.yaml")


def test_recipes_do_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        parse_recipe(GOOD).model = "other"  # type: ignore[misc]
    assert isinstance(parse_recipe(GOOD), Recipe)
