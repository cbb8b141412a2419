"""Factors are found as far as the steps tell, and not beyond."""

from __future__ import annotations

from collections.abc import Mapping

import pytest

from autopar.simulator.calibration import SPREADS, Factor, MeasuredStep, factors
from cost_models import Collective, Profiled, Work
from cost_models.profiled import PARTS, Profile
from tests.helpers.profiles import ideal

PRODUCT = Work("matmul", "float32", 2.0 * 512**3, 0.0, (1, 512, 512, 512))
SMALL = Work("memory", "float32", 0.0, 1.0)
EXCHANGE = Collective("all_reduce", 2**22, 8, 1)


def step_of(products: int, exchanges: int, small: int) -> MeasuredStep:
    """Of so many of each; the seconds are those of the profile."""

    def price(profile: Profile) -> float:
        costs = Profiled(profile)
        return (
            products * costs.compute_time_s(PRODUCT)
            + exchanges * costs.collective_time_s(EXCHANGE)
            + small * costs.compute_time_s(SMALL)
        )

    return MeasuredStep(price, price(ideal()), spread=0.0)


def measured(step: MeasuredStep, times: float) -> MeasuredStep:
    return MeasuredStep(step.price, times * step.seconds, step.spread)


def by_part(found: tuple[Factor, ...]) -> Mapping[str, Factor]:
    assert [factor.part for factor in found] == list(PARTS)
    return {factor.part: factor for factor in found}


ONLY = {"compute": (10, 0, 0), "communication": (0, 10, 0), "overhead": (0, 0, 1000)}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("times", [0.7, 1.0, 1.5])
def test_a_step_of_one_part_tells_its_factor_and_no_other(part: str, times: float) -> None:
    found = by_part(factors(ideal(), [measured(step_of(*ONLY[part]), times)]))
    assert found[part].factor == pytest.approx(times, rel=0.02)
    assert found[part].learnt > 0.9
    for other in set(PARTS) - {part}:
        assert found[other] == Factor(other, 1.0, 0.0)


@pytest.mark.parametrize(
    ("compute", "communication", "overhead"), [(1.0, 1.0, 1.0), (1.4, 0.6, 0.9), (0.7, 1.5, 1.6)]
)
def test_steps_of_all_parts_tell_them_apart(
    compute: float, communication: float, overhead: float
) -> None:
    true = {"compute": compute, "communication": communication, "overhead": overhead}
    steps = [measured(step_of(*ONLY[part]), true[part]) for part in PARTS]
    found = by_part(factors(ideal(), steps))
    for part in PARTS:
        assert found[part].factor == pytest.approx(true[part], rel=0.03)


@pytest.mark.parametrize("times", [0.75, 1.3])
def test_one_step_of_several_parts_is_predicted_after_and_shared_by_what_was_unsure(
    times: float,
) -> None:
    """Where half of a step is of each of two parts, the less certain one takes more of it."""
    product_s, exchange_s = step_of(1, 0, 0).seconds, step_of(0, 1, 0).seconds
    step = measured(step_of(1000, round(1000 * product_s / exchange_s), 0), times)
    found = by_part(factors(ideal(), [step]))
    compute, communication = found["compute"].factor, found["communication"].factor
    assert (compute + communication) / 2 == pytest.approx(times, rel=0.02)
    assert SPREADS["communication"] > SPREADS["compute"]
    assert abs(communication - 1) >= abs(compute - 1)
    assert found["communication"].learnt > found["compute"].learnt


def test_a_step_that_varies_much_tells_less() -> None:
    step = measured(step_of(*ONLY["compute"]), 1.5)
    sure, unsure = (
        by_part(factors(ideal(), [MeasuredStep(step.price, step.seconds, spread)]))["compute"]
        for spread in (0.0, 0.3)
    )
    assert 1.0 < unsure.factor < sure.factor
    assert unsure.learnt < sure.learnt
