"""Pages that are made from code are as the code makes them now."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

DOCS = Path(__file__).parents[3] / "docs"
PAGES = ["plan.schema.json", "profiled_graph.schema.json", "cli.md", "overview.svg"]


def generate() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PAGES)
def test_a_generated_page_is_not_stale(name: str) -> None:
    assert generate().GENERATED[name]() == (DOCS / name).read_text(), "run `make docs`"


def test_every_generated_page_is_tested() -> None:
    assert set(generate().GENERATED) == set(PAGES)


def test_the_picture_is_well_formed() -> None:
    ElementTree.parse(DOCS / "overview.svg")
