"""Widths that are learnt are those of the world that the runs are from."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import bands
from benchmarks.bands import COVERAGE, Residual, Table, own_width, quantile, variances, widths
from benchmarks.quality import validate
from benchmarks.validate import read
from cost_models.bands import CORRECTED, DATASHEET, KINDS, PROFILED, read_bands
from tests.unit.benchmarks.test_validation import ROW

TRUE = {"products": 0.05, "between": 0.5, "memory": 0.2}


def world(seed: int, sources: int = 120, runs: int = 6, noise: float = 0.0) -> list[Residual]:
    """Prices of each source are off by the true widths; runs have random shares."""
    rng = np.random.default_rng(seed)
    found = []
    for source in range(sources):
        off = {kind: rng.normal(0, width) for kind, width in TRUE.items()}
        for _ in range(runs):
            shares = dict(zip(TRUE, rng.dirichlet((1, 1, 1)).tolist(), strict=True))
            error = sum(shares[kind] * off[kind] for kind in TRUE) + rng.normal(0, noise)
            found.append(Residual(f"source {source}", f"model {source}", error, shares))
    return found


def test_the_deviations_of_a_made_up_world_are_found() -> None:
    found = dict(zip(KINDS, np.sqrt(variances(Table.of(world(0)))).tolist(), strict=True))
    assert found["between"] == pytest.approx(0.5, rel=0.2)
    assert found["memory"] == pytest.approx(0.2, rel=0.3)
    assert found["products"] < 0.15


def test_bands_hold_as_many_runs_of_new_sources_as_they_say() -> None:
    new, inside, of_others = Table.of(world(100)), [], []
    for seed in range(3):
        learnt = widths(world(seed, sources=8), [])
        by_kind = np.array([learnt.kinds.get(kind, 0.0) ** 2 for kind in KINDS])
        inside.append((np.abs(new.errors) <= bands.half_widths(new, by_kind)).mean())
        of_others += [told.covered for told in learnt.sources if told.covered is not None]
    assert np.mean(inside) == pytest.approx(COVERAGE, abs=0.06)
    assert np.mean(of_others) == pytest.approx(COVERAGE, abs=0.06)


def test_kinds_that_no_step_has_are_not_told() -> None:
    assert set(widths(world(3, sources=8), []).kinds) == set(TRUE)


def test_differences_of_plans_are_covered_by_what_they_do_not_share_and_their_own_noise() -> None:
    residuals = Table.of(world(4, noise=0.1))
    by_kind = variances(residuals)
    own = own_width(residuals, by_kind, COVERAGE)
    missing = bands.missing_squares(residuals, by_kind)
    assert (missing <= own**2).mean() == pytest.approx(COVERAGE, abs=0.01)
    assert own < 1.2816 * math.sqrt(2) * 0.1 * 1.5  # some of it is explained by kinds
    pairs = [told for told in widths(world(5, sources=6, noise=0.1), []).sources if told.pairs]
    assert [told.pairs for told in pairs] == [15] * 6
    assert 0.5 < np.mean([told.pairs_covered or 0.0 for told in pairs]) <= 1
    quiet = Table.of(world(4))
    assert own_width(quiet, by_kind, COVERAGE) < own


def test_a_source_of_many_runs_counts_no_more_than_one_of_some() -> None:
    few = [Residual("few", "", 0.1, {"products": 1.0})] * 10
    many = [Residual("many", "", 0.5, {"products": 1.0})] * 1000
    (variance,) = {round(float(v), 6) for v in variances(Table.of([*few, *many]))[:1]}
    assert variance == pytest.approx((0.1**2 + 0.5**2) / 2, rel=0.05)


def test_a_quantile_counts_weights() -> None:
    values, weights = np.array([5.0, 1.0, 3.0]), np.array([1.0, 1.0, 8.0])
    assert [quantile(values, weights, share) for share in (0.1, 0.11, 0.9, 0.91)] == [1, 3, 3, 5]


def test_the_command_learns_from_tables_and_writes_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {**ROW, "source": source, "TP": tp, "DP": dp, "iter_time_s": step_s}
        for source, step_s in (("a", "0.02"), ("b", "0.05"))
        for tp, dp in (("2", "2"), ("1", "4"))
    ]
    table, local, out = tmp_path / "rows.csv", tmp_path / "local", tmp_path / "bands.json"
    local.mkdir()
    table.write_text("\n".join([",".join(ROW), *(",".join(row.values()) for row in rows)]) + "\n")
    (local / "plans.csv").write_text(
        "# how it was made\nmodel,machine,predicted_step_s,measured_step_s,"
        "predicted_peak_bytes,measured_peak_bytes\ngpt,cpu,1,1.1,100,100\nunet,cpu,2,1.9,100,101\n"
    )
    (local / "corrected.csv").write_text(
        "model,machine,predicted_step_s,corrected_step_s,corrects,measured_step_s,"
        "predicted_peak_bytes,measured_peak_bytes\n"
        "gpt,cpu,1,1.2,0,1.21,100,101\nunet,cpu,1,1.1,0,1.11,100,101\n"
        "unet,cpu,1,1.2,1,1.2,100,101\n"
    )
    (local / "others.csv").write_text("a,b\n1,2\n")
    arguments = ["bands", str(table), "--measured", str(local), "-o", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    assert bands.main() == 0
    found = read_bands(out)
    sheet, local_widths = found.machines[DATASHEET], found.machines[PROFILED]
    assert [told.source for told in sheet.sources] == ["a", "b"]
    assert (sheet.devices, local_widths.devices) == (("a100-sxm-80gb",), ("cpu",))
    assert (sheet.rows, local_widths.rows, local_widths.memory_rows) == (4, 5, 5)
    better = found.machines[CORRECTED]  # the run that corrected tells nothing of others
    assert better.rows == 2 and better.of("products") < local_widths.of("products") / 3
    assert local_widths.of("products") < sheet.of("products")
    assert local_widths.memory == pytest.approx(math.log(1.01), rel=0.01)
    said = capsys.readouterr().out
    assert "datasheet: 4 runs" in said and "the widest: no run tells" in said
    _, compared = validate(read([table]))
    assert bands.learn(compared, local, found.date) == found


def test_nothing_to_learn_from_is_said(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no row has a measured step"):
        bands.learn([], tmp_path, "")
