"""Shelf of recipes: the strategies that people write by hand, as restrictions of the search space.

A recipe says which meshes, and for each axis which factors it may divide (letters of SOAP) and how
parameters are kept. The best strategy within that is found, so a recipe is defined for every model.
"""

from __future__ import annotations

from autopar.recipes.data import data_parallel, hsdp, replicate, zero1, zero2, zero3
from autopar.recipes.megatron import megatron, megatron_sp
from autopar.recipes.recipe import Layout, Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (replicate, data_parallel, zero1, zero2, zero3, hsdp, megatron, megatron_sp)
}
"""By name, from the simplest to the most elaborate."""

__all__ = ["RECIPES", "Layout", "Recipe"]
