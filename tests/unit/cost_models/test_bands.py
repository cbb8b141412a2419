"""Widths are read from a file that says what it is; what is not known is as wide as the widest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cost_models import cost_model
from cost_models.bands import (
    DATASHEET,
    KINDS,
    PROFILED,
    Bands,
    BandsError,
    Told,
    Widths,
    bands_from_json,
    bands_to_json,
    known_bands,
    read_bands,
)
from cost_models.profiled import Pass, Product, Profile, Profiled

SOME = Widths(
    {"products": 0.1, "between": 0.4}, 0.05, 0.2, 10, 3, ("it",), (Told("them", 10, None),)
)
BANDS = Bands(0.8, "2026-11-26", "autopar", {DATASHEET: SOME, PROFILED: SOME})


def measured() -> Profiled:
    product = Product("matmul", "float32", (1, 8, 8, 8), 1024.0, 1e-6)
    passed = Pass("float32", 1024, 1e-6)
    return Profiled(
        Profile("m", "cpu", 1, 10**9, (), "2026", 1e-6, 1e-7, (product,), (passed,), ())
    )


def test_what_no_run_tells_is_as_wide_as_the_widest() -> None:
    assert [SOME.of(kind) for kind in ("products", "between", "attention")] == [0.1, 0.4, 0.4]
    with pytest.raises(KeyError, match="no width for 'magic'; known: products"):
        SOME.of("magic")


def test_a_machine_that_was_measured_has_widths_of_its_own() -> None:
    bands = known_bands()
    assert bands.of(cost_model("h100-sxm")) is bands.machines[DATASHEET]
    assert bands.of(measured()) is bands.machines[PROFILED]


def test_the_file_that_comes_with_autopar_covers_most_runs_and_knows_products() -> None:
    bands = known_bands()
    assert 0.5 < bands.coverage < 1
    for widths in bands.machines.values():
        assert widths.rows > 0 and widths.sources and widths.devices
        assert "products" in widths.kinds
        assert all(widths.of(kind) > 0 for kind in KINDS)


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "bands.json"
    path.write_text(json.dumps(bands_to_json(BANDS)))
    assert read_bands(path) == BANDS


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data.pop("format"), "no file of widths"),
        (lambda data: data.update(version=99), "version 99, this autopar reads 1"),
        (lambda data: data["machines"].pop("profiled"), "damaged .*profiled"),
        (lambda data: data["machines"]["datasheet"]["kinds"].update(products=0), "positive"),
        (lambda data: data["machines"]["datasheet"]["kinds"].update(magic=1), "called magic"),
        (lambda data: data["machines"]["datasheet"]["kinds"].clear(), "positive"),
        (lambda data: data.update(coverage=1.5), "between 0 and 1, not 1.5"),
    ],
)
def test_a_damaged_file_is_refused_with_the_reason(damage: Any, reason: str) -> None:
    data = json.loads(json.dumps(bands_to_json(BANDS)))
    damage(data)
    with pytest.raises(BandsError, match=reason):
        bands_from_json(data)


def test_a_file_that_is_missing_or_no_json_is_refused_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "nothing.json"
    with pytest.raises(BandsError, match=r"cannot read the widths .*nothing\.json"):
        read_bands(path)
    path.write_text("{")
    with pytest.raises(BandsError, match=r"nothing\.json"):
        read_bands(path)
