"""One declarative recipe a model family."""

from __future__ import annotations

from torch import nn

from hf_fastpath.errors import Unsupported
from hf_fastpath.patches import llama
from hf_fastpath.patches.recipe import Recipe

RECIPES: tuple[Recipe, ...] = (llama.RECIPE,)


def find_recipe(model: nn.Module) -> Recipe:
    """The recipe for a model.

    Raises:
        Unsupported: none fits; the message lists the supported model classes.
    """
    for recipe in RECIPES:
        if isinstance(model, recipe.model_class):
            return recipe
    supported = ", ".join(recipe.model_class.__name__ for recipe in RECIPES)
    raise Unsupported(f"{type(model).__name__} is not a supported model: supported are {supported}")
