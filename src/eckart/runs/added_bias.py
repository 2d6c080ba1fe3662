"""Added bias: whether a composition adds one to its linears, decided by the model before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from eckart.lowrank import Method
from eckart.models.dense import describe_linears, without_place_for_bias
from eckart.models.sites import Site
from eckart.runs.composition import COMPOSITIONS
from eckart.runs.recipe import Recipe

# The setting of kfac, the method of every composition.
SETTING = "bias"


def lacking_place(model: PreTrainedModel, sites: Sequence[Site], method: Method) -> list[str]:
    """The linears to which the method adds a bias that the architecture has no place for, and no dense export.

    Args:
        model: dense. sites: its linears that are to be compressed.
    """
    return without_place_for_bias(model, [site.name for site in sites if not site.has_bias]) if method.centred else []


def settle_bias(recipe: Recipe, model: PreTrainedModel, sites: Sequence[Site]) -> tuple[Recipe, str | None]:
    """The recipe, without the added bias of its composition where the result could not be exported dense with it.

    Only of a composition (best) that leaves the setting to us: a method, or a recipe that says `bias`, is as it says.

    Args, cost: as `lacking_place`, which builds the model once without memory for its weights.

    Returns:
        The recipe, and why the bias is left out; None where it is not.
    """
    if recipe.is_baseline or recipe.method.name not in COMPOSITIONS or SETTING in recipe.method.options:
        return recipe, None
    lacking = lacking_place(model, sites, recipe.composition.method)
    if not lacking:
        return recipe, None
    method = recipe.method.model_copy(update={"options": {**recipe.method.options, SETTING: False}})
    why = (
        f"{recipe.method.name} adds no bias here, as {type(model).__name__} has no place for one in "
        f"{describe_linears(lacking)}, so that the result can be exported dense; the option {SETTING}=true adds it"
    )
    return recipe.model_copy(update={"method": method}), why
