"""The picture of how the search for stages grows is that of the data beside it."""

from __future__ import annotations

from xml.etree import ElementTree

from benchmarks.stage_growth import DATA, VALUES, drawn, read


def test_the_picture_is_drawn_from_the_data() -> None:
    picture = DATA.with_suffix(".svg")
    assert drawn(read()) == picture.read_text(), "run `python -m benchmarks.stage_growth --draw`"
    ElementTree.parse(picture)


def test_the_data_has_all_that_is_varied() -> None:
    found = [(measured.varied, measured.value) for measured in read()]
    assert found == [(varied, value) for varied, values in VALUES.items() for value in values]
