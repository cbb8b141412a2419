"""A fit finds the parameters that made the data, and its derivatives are those of the prices."""

from __future__ import annotations

from dataclasses import replace
from math import log
from pathlib import Path

import pytest

from autopar.ir.strategy import Training
from autopar.recipes import Degrees
from benchmarks import fit
from benchmarks.derived import Derived, Seconds, scaled
from benchmarks.runs import Run, step_s
from benchmarks.transformer import Transformer
from cost_models import Analytical, topology
from cost_models.calibration import read_calibration

A100, ADAM = "a100-sxm-80gb", Training("adam", "mixed")
KNOWN = read_calibration()


def runs() -> list[Run]:
    """Bound by the host, by products, by a vocabulary that is odd; and of two stages."""
    wide = Transformer(4, 4096, 32, 32, 16384, 51200, 1024, flash=False, dropout=True)
    narrow = replace(wide, width=256, heads=4, kv_heads=4, ffn=1024)
    one = Degrees(microbatch=2, recompute="full")
    return [
        Run(
            "",
            "a",
            model,
            f"1x{stages}x{A100}",
            replace(one, pipeline=stages),
            ADAM,
            4,
            1.0,
            None,
            False,
        )
        for model, stages in (
            (narrow, 1),
            (wide, 1),
            (replace(wide, vocabulary=50257), 1),
            (wide, 2),
        )
    ]


def measured(of: Run, calibration: object) -> Run:
    assert isinstance(calibration, type(KNOWN))
    model = Analytical(topology(of.machine), calibration)
    return replace(of, step_s=float(step_s(of, model)))


@pytest.mark.parametrize("index", range(4))
def test_steps_carry_their_derivatives(index: int) -> None:
    run = runs()[index]
    time_s = step_s(run, Derived(Analytical(topology(run.machine), KNOWN), fit.NAMES))  # type: ignore[arg-type]
    assert isinstance(time_s, Seconds)
    for name, by in zip(fit.NAMES, time_s.by, strict=True):
        less = step_s(run, Analytical(topology(run.machine), scaled(KNOWN, {name: 0.999})))
        assert float(time_s - less) / 0.001 == pytest.approx(by, rel=0.02, abs=1e-4 * time_s)


def test_what_made_the_data_is_found_again() -> None:
    moved = {"matmul_efficiency": 0.9, "operator_s": 1.5, "misaligned_slowdown": 1.4}
    truth = scaled(KNOWN, moved)
    rows = [measured(run, truth) for run in runs()]
    found = fit.fitted(rows, KNOWN)
    before = [abs(row.error) for row in fit.priced(rows, KNOWN)]
    after = [abs(row.error) for row in fit.priced(rows, found)]
    assert max(after) < 0.1 * max(before)
    assert found.operator_s == pytest.approx(truth.operator_s, rel=0.05)


def test_the_file_that_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "calibration.toml"
    path.write_text(fit.content(KNOWN, [replace(runs()[0], source='"of" x')], "the command"))
    again = read_calibration(path)
    for name in fit.NAMES:
        assert log(getattr(again, name) / getattr(KNOWN, name)) == pytest.approx(0.0, abs=0.01)


def test_the_table_leaves_each_source_out_and_never_fits_to_ptd_p() -> None:
    rows = [replace(measured(run, KNOWN), source=f"source {i}") for i, run in enumerate(runs())]
    rows[0] = replace(rows[0], source="arXiv 2104.04473 Table 1")
    lines = list(fit.report(rows, KNOWN))
    assert len(lines) == 1 + len(rows)
    assert "never fitted to" in lines[1]
    assert all(line.count("|") == 2 for line in lines)


def test_a_source_is_thinned_evenly() -> None:
    (run, *_) = runs()
    many = [replace(run, name=str(i)) for i in range(100)] + [replace(run, source="few")]
    kept = fit.thinned(many, most=10)
    assert 5 <= len([r for r in kept if r.source != "few"]) <= 10
    assert kept[-1].source == "few"
