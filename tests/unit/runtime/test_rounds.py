"""Which rounds of a measurement count."""

from __future__ import annotations

from autopar.runtime.bench import Moment, quietest


def moments(*others: float) -> list[Moment]:
    return [Moment((float(number),), of) for number, of in enumerate(others)]


def test_of_rounds_that_were_disturbed_the_quieter_half_counts() -> None:
    assert [m.others for m in quietest(moments(0.8, 0.1, 0.5, 0.4))] == [0.1, 0.4]
    assert [m.others for m in quietest(moments(0.8, 0.1, 0.5))] == [0.1, 0.5]


def test_rounds_that_were_about_as_quiet_as_the_quietest_count_too() -> None:
    assert [m.others for m in quietest(moments(0.05, 0.02, 0.6, 0.08))] == [0.02, 0.05, 0.08]
    assert len(quietest(moments(0.0, 0.0, 0.0, 0.0))) == 4
