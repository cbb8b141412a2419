"""Parameters of prices come from a file, and prices follow them as physics has it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cost_models import Analytical, Work, topology
from cost_models.calibration import (
    FILE,
    PARAMETERS,
    Calibration,
    CalibrationError,
    read_calibration,
)
from cost_models.interface import host_time_of
from cost_models.saved import cost_model_from_json, cost_model_to_json

KNOWN = read_calibration()
A100, H100 = topology("a100-sxm-80gb"), topology("h100-sxm")
SIZES = st.integers(1, 3000)


def matmul(*shape: int, dtype: str = "bfloat16") -> Work:
    batch, m, n, k = shape
    moved = 2.0 * batch * (m * k + k * n + m * n)
    return Work("matmul", dtype, 2.0 * math.prod(shape), moved, shape)


def rate(of: Analytical, *shape: int) -> float:
    work = matmul(*shape)
    return work.flops / of.compute_time_s(work)


@pytest.mark.parametrize("name", [n for n in PARAMETERS if n.endswith("efficiency")])
@given(st.tuples(SIZES, SIZES, SIZES, SIZES))
@settings(max_examples=15, deadline=None)
def test_less_efficiency_is_never_faster(name: str, shape: tuple[int, int, int, int]) -> None:
    usual = Analytical(A100)
    worse = Analytical(A100, replace(KNOWN, **{name: 0.5 * getattr(KNOWN, name)}))
    for work in (
        matmul(*shape),
        replace(matmul(*shape), kind="attention"),
        Work("memory", "bfloat16", 0.0, float(math.prod(shape[:2]))),
    ):
        assert worse.compute_time_s(work) >= usual.compute_time_s(work) > A100.device.launch_s / 2


@given(st.tuples(SIZES, SIZES, SIZES, SIZES), st.floats(0.1, 30.0), st.floats(1.0, 5.0))
@settings(max_examples=30, deadline=None)
def test_filling_and_misalignment_only_cost(
    shape: tuple[int, int, int, int], fill_steps: float, slowdown: float
) -> None:
    work = matmul(*shape)
    without = Analytical(A100, replace(KNOWN, fill_steps=1e-6, misaligned_slowdown=1.0))
    with_both = replace(KNOWN, fill_steps=fill_steps, misaligned_slowdown=slowdown)
    assert Analytical(A100, with_both).compute_time_s(work) >= without.compute_time_s(work)


def test_rows_that_start_off_16_bytes_are_slow_and_padding_pays() -> None:
    """The vocabulary of GPT-2: padded by 47 words its logits are sooner made."""
    costs = Analytical(A100)
    odd, padded = ((1, 8192, words, 2048) for words in (50257, 50304))
    assert costs.compute_time_s(matmul(*odd)) > 1.3 * costs.compute_time_s(matmul(*padded))
    # float32 rows of 4 words are whole units of 16 bytes, bfloat16 rows are not
    four = (1, 4096, 4100, 4096)
    for dtype, slow in (("bfloat16", True), ("tensorfloat32", False)):
        whole = replace(KNOWN, misaligned_slowdown=1.0)
        times = [
            Analytical(A100, known).compute_time_s(matmul(*four, dtype=dtype))
            for known in (KNOWN, whole)
        ]
        assert (times[0] > times[1]) is slow


def test_a_short_sum_is_slower_per_flop_than_a_long_one() -> None:
    costs = Analytical(A100)
    rates = [rate(costs, 1, 8192, 8192, k) for k in (64, 256, 1024, 8192)]
    assert rates == sorted(rates)
    assert rates[0] < 0.7 * rates[-1]


def test_attention_runs_beside_the_measured_where_it_was_and_beside_products_else() -> None:
    """As products do beside theirs; that of earlier programs as these did."""
    work = Work("attention", "bfloat16", 4.0 * 128 * 8192 * 8192 * 128, 0.0, (128, 8192, 8192, 128))
    earlier = replace(H100, device=replace(H100.device, attention_as_products=False))
    measured = dict(H100.device.attention_flops_per_s)["bfloat16"]
    of_products = dict(A100.device.achievable_flops_per_s)["bfloat16"] * 203 / 271.2
    for machine, best, share in (
        (earlier, measured, KNOWN.attention_efficiency),
        (H100, measured, KNOWN.matmul_efficiency * Analytical(H100).clock),
        (A100, of_products, KNOWN.matmul_efficiency * Analytical(A100).clock),
    ):
        achieved = work.flops / Analytical(machine).compute_time_s(work)
        assert 0.9 * share * best < achieved <= share * best


@given(st.floats(50.0, 5000.0), st.floats(0.1, 3.0))
@settings(max_examples=50, deadline=None)
def test_products_run_at_the_clock_that_power_can_hold(power_w: float, flop_pj: float) -> None:
    """What they draw grows as the cube of it."""
    work = matmul(1, 8192, 8192, 8192)
    device = replace(H100.device, power_w=power_w, launch_s=1e-12)
    of = replace(KNOWN, flop_pj=flop_pj)
    held_s = Analytical(replace(H100, device=device), of).compute_time_s(work)
    free_s = Analytical(replace(H100, device=replace(device, power_w=0.0)), of).compute_time_s(work)
    drawn_w = dict(device.achievable_flops_per_s)["bfloat16"] * flop_pj * 1e-12
    expected = max(1.0, drawn_w / power_w) ** (1 / 3)
    assert held_s / free_s == pytest.approx(expected, rel=1e-6)


def test_chips_whose_operations_draw_less_run_faster_until_nothing_holds_them() -> None:
    work = matmul(1, 8192, 8192, 8192)
    free_s = Analytical(H100, replace(KNOWN, flop_pj=0.0)).compute_time_s(work)
    held = [replace(H100, device=replace(H100.device, flop_energy=e)) for e in (1.0, 0.8, 0.4)]
    times = [Analytical(machine).compute_time_s(work) for machine in held]
    assert times[0] > times[1] > times[2] == free_s


def test_passes_over_memory_do_not_draw_so_much() -> None:
    work = Work("memory", "bfloat16", 0.0, 1e9)
    weak = replace(H100, device=replace(H100.device, power_w=50.0))
    assert Analytical(weak).compute_time_s(work) == Analytical(H100).compute_time_s(work)


def test_plans_made_before_power_was_priced_are_priced_without_it() -> None:
    data = cost_model_to_json(Analytical(H100))
    del data["calibration"]["flop_pj"], data["analytical"]["device"]["power_w"]
    before = cost_model_from_json(data)
    work = matmul(1, 8192, 8192, 8192)
    without = Analytical(H100, replace(KNOWN, flop_pj=0.0))
    assert before.compute_time_s(work) == without.compute_time_s(work)


def test_programs_that_are_compiled_do_not_wait_for_their_host() -> None:
    waits = host_time_of(Analytical(topology("tpu-v4")))
    assert waits.operator_s == 0.0
    assert host_time_of(Analytical(A100)).operator_s == KNOWN.operator_s


@pytest.mark.parametrize(
    ("changed", "means"),
    [
        ({"memory_efficiency": 1.2}, "memory_efficiency is 1.2"),
        ({"operator_s": 0.0}, "operator_s is 0.0"),
        ({"misaligned_slowdown": 0.5}, "misaligned_slowdown is 0.5"),
        ({"fill_steps": float("nan")}, "fill_steps is nan"),
    ],
)
def test_parameters_that_cannot_be_are_refused(changed: dict[str, float], means: str) -> None:
    with pytest.raises(CalibrationError, match=means):
        replace(KNOWN, **changed)


@pytest.mark.parametrize(
    ("old", "new", "means"),
    [
        ("version = 1", "version = 9", "version 1"),
        ("fill_steps", "full_steps", "fill_steps, full_steps"),
        ("[parameters]", "[parameters", "cannot be read"),
        ("operator_s = { value = ", 'operator_s = { value = "x", was = ', "no number"),
    ],
)
def test_files_that_are_none_are_refused(tmp_path: Path, old: str, new: str, means: str) -> None:
    path = tmp_path / "calibration.toml"
    path.write_text(FILE.read_text().replace(old, new))
    with pytest.raises(CalibrationError, match=means):
        read_calibration(path)
    with pytest.raises(CalibrationError, match="cannot be read"):
        read_calibration(tmp_path / "none.toml")


def test_what_is_read_is_what_the_file_says() -> None:
    assert isinstance(KNOWN, Calibration)
    text = FILE.read_text()
    for name in PARAMETERS:
        assert f"{name} = " in text
