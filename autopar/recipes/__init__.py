"""Shelf of recipes: the strategies that people write by hand.

A recipe of ``RECIPES`` restricts the search space: which meshes, and for each axis which factors it
may divide (letters of SOAP) and how parameters are kept. The best strategy within that is found, so
a recipe is defined for every model. Those of ``PUBLISHED`` are numbers (``Degrees``), of which
``by_degrees`` makes a strategy, of several stages where they say so.
"""

from __future__ import annotations

from autopar.recipes.by_degrees import by_degrees, recomputed_copies
from autopar.recipes.data import data_parallel, hsdp, replicate, zero1, zero2, zero3
from autopar.recipes.degrees import Degrees, degrees_from_text, degrees_text
from autopar.recipes.megatron import megatron, megatron_sp
from autopar.recipes.published import PUBLISHED, Published
from autopar.recipes.recipe import Layout, Recipe

RECIPES: dict[str, Recipe] = {
    recipe.name: recipe
    for recipe in (replicate, data_parallel, zero1, zero2, zero3, hsdp, megatron, megatron_sp)
}
"""By name, from the simplest to the most elaborate."""

__all__ = [
    "PUBLISHED",
    "RECIPES",
    "Degrees",
    "Layout",
    "Published",
    "Recipe",
    "by_degrees",
    "degrees_from_text",
    "degrees_text",
    "recomputed_copies",
]
