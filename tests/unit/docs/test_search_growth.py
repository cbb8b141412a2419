"""The pictures of how searches grow are those of the data beside them."""

from __future__ import annotations

from types import ModuleType
from xml.etree import ElementTree

import pytest

from benchmarks import plan_growth, stage_growth


@pytest.mark.parametrize("of", [stage_growth, plan_growth])
def test_the_picture_is_drawn_from_the_data(of: ModuleType) -> None:
    picture = of.DATA.with_suffix(".svg")
    again = f"run `python -m {of.__name__} --draw`"
    assert of.drawn(of.read()) == picture.read_text(), again
    ElementTree.parse(picture)


def test_the_data_has_all_that_is_varied() -> None:
    found = [(measured.varied, measured.value) for measured in stage_growth.read()]
    values = stage_growth.VALUES
    assert found == [(varied, value) for varied, of in values.items() for value in of]
    planned = [(of.varied, of.value, of.searcher) for of in plan_growth.read()]
    assert planned == list(plan_growth.cases())
