"""A cost model from tables gives back what was measured, and is sensible between and beyond."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cost_models import (
    Collective,
    CollectiveKind,
    Profiled,
    ProfileError,
    UnpricedError,
    Work,
    cost_model,
)
from cost_models.interface import HostTime, host_time_of
from cost_models.profiled import (
    COLLECTIVE_KINDS,
    Correction,
    Exchange,
    Overlap,
    Pass,
    corrected,
    fit_line,
    profile_from_json,
    profile_to_json,
    read_profile,
)
from tests.helpers.profiles import (
    BYTES_PER_S,
    CALL_S,
    FLOPS_PER_S,
    OPERATOR_S,
    SHAPES,
    SIZES,
    exchange_s,
    ideal,
)


def product(
    shape: tuple[int, ...], dtype: str = "float32", kind: Literal["matmul", "attention"] = "matmul"
) -> Work:
    return Work(kind, dtype, 2.0 * math.prod(shape), 0.0, shape)


def test_what_was_measured_comes_back() -> None:
    costs = Profiled(ideal())
    for shape in SHAPES:
        expected = OPERATOR_S + 2.0 * math.prod(shape) / FLOPS_PER_S
        assert costs.compute_time_s(product(shape)) == pytest.approx(expected)
    for size in SIZES:
        seconds = costs.compute_time_s(Work("memory", "float32", 0.0, float(size)))
        assert seconds == pytest.approx(OPERATOR_S + size / BYTES_PER_S)
    for kind in COLLECTIVE_KINDS:
        for group_size in (2, 8):
            for size in SIZES:
                seconds = costs.collective_time_s(Collective(kind, size, group_size, 1))
                assert seconds == pytest.approx(exchange_s(kind, group_size, size))


@given(st.floats(0, 1e12), st.floats(0, 1e12))
def test_more_bytes_are_never_faster_and_never_free(a: float, b: float) -> None:
    costs = Profiled(ideal())
    few, many = (costs.compute_time_s(Work("memory", "float32", 0.0, n)) for n in sorted((a, b)))
    assert 0 < few <= many


@given(st.tuples(*[st.integers(1, 4096)] * 4), st.sampled_from(["float32", "float64"]))
def test_a_product_between_the_measured_ones_runs_at_their_speed(
    shape: tuple[int, ...], dtype: str
) -> None:
    work = product(shape, dtype)
    slow = 2 if dtype == "float64" else 1
    expected = OPERATOR_S + work.flops * slow / FLOPS_PER_S
    assert Profiled(ideal()).compute_time_s(work) == pytest.approx(expected)


def test_a_speed_that_depends_on_the_shape_is_that_of_the_nearest() -> None:
    products = tuple(
        replace(p, seconds=CALL_S + p.flops * (4 if min(p.shape[1:]) <= 64 else 1) / FLOPS_PER_S)
        for p in ideal().products
    )
    costs = Profiled(ideal(products=products))

    def flops_per_s(*shape: int) -> float:
        work = product(shape)
        return work.flops / (costs.compute_time_s(work) - OPERATOR_S)

    assert flops_per_s(1, 600, 500, 600) == pytest.approx(FLOPS_PER_S, rel=0.1)
    assert flops_per_s(1, 500, 60, 600) == pytest.approx(FLOPS_PER_S / 4, rel=0.1)
    assert FLOPS_PER_S / 4 < flops_per_s(1, 512, 180, 512) < FLOPS_PER_S


def test_a_group_between_the_measured_ones_costs_between_them() -> None:
    costs = Profiled(ideal())
    for kind in COLLECTIVE_KINDS:
        for size in SIZES:
            times = [
                costs.collective_time_s(Collective(kind, size, group_size, 1))
                for group_size in (2, 4, 8)
            ]
            assert all(a < b for a, b in pairwise(times))


def test_beyond_the_largest_group_costs_grow_with_it() -> None:
    costs = Profiled(ideal(devices=32))
    at_8, at_32 = (costs.collective_coefficients("all_gather", g, 1) for g in (8, 32))
    assert at_32 == pytest.approx((4 * at_8[0], 4 * at_8[1]))


@pytest.mark.parametrize("missing", COLLECTIVE_KINDS)
def test_a_kind_that_was_not_measured_is_priced_by_another_and_not_free(
    missing: CollectiveKind,
) -> None:
    kept = tuple(e for e in ideal().exchanges if e.kind != missing)
    seconds = Profiled(ideal(exchanges=kept)).collective_time_s(Collective(missing, 2**20, 8, 1))
    assert seconds >= exchange_s(missing, 8, 2**20) * 0.99


def test_a_dtype_that_was_not_measured_is_priced_by_the_nearest() -> None:
    only = tuple(p for p in ideal().products if p.dtype == "float32")
    costs = Profiled(ideal(products=only))
    single, double = (costs.compute_time_s(product(SHAPES[2], d)) for d in ("float32", "float64"))
    assert double - OPERATOR_S == pytest.approx(2 * (single - OPERATOR_S))
    whole = costs.compute_time_s(Work("memory", "int64", 0.0, 2.0**22))
    assert whole == costs.compute_time_s(Work("memory", "float32", 0.0, 2.0**22))
    with pytest.raises(ValueError, match="no matmul of int8"):
        costs.compute_time_s(product(SHAPES[0], "int8"))


def test_attention_that_was_not_measured_runs_like_products() -> None:
    only = tuple(p for p in ideal().products if p.kind == "matmul")
    work = product(SHAPES[1], kind="attention")
    assert Profiled(ideal(products=only)).compute_time_s(work) == pytest.approx(
        OPERATOR_S + work.flops / FLOPS_PER_S
    )


def test_questions_without_an_answer_are_refused() -> None:
    costs: Any = Profiled(ideal())
    for group_size, stride in ((1, 1), (16, 1), (4, 4), (2, 0)):
        with pytest.raises(ValueError, match="does not fit"):
            costs.collective_time_s(Collective("all_reduce", 1, group_size, stride))
    with pytest.raises(KeyError, match="gossip"):
        costs.collective_coefficients("gossip", 2, 1)
    with pytest.raises(KeyError, match="magic"):
        costs.compute_time_s(Work("magic", "float32", 1.0, 1.0))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="shape of four"):
        costs.compute_time_s(Work("matmul", "float32", 1.0, 1.0))
    with pytest.raises(UnpricedError, match="no matmul of int8 was measured"):
        costs.compute_time_s(Work("matmul", "int8", 1.0, 1.0, (1, 8, 8, 8)))
    with pytest.raises(UnpricedError, match="no collective in a host; measure the machine again"):
        Profiled(ideal(exchanges=())).collective_time_s(Collective("send", 1, 2, 1))


@given(
    st.floats(1e-6, 1e-2),
    st.floats(1e-12, 1e-8),
    st.lists(st.floats(0.7, 1.4), min_size=6, max_size=6),
)
def test_a_noisy_line_is_found_within_its_noise(a: float, b: float, noise: list[float]) -> None:
    points = [
        (float(x), (a + b * x) * n)
        for x, n in zip((2**10, 2**14, 2**17, 2**20, 2**22, 2**24), noise, strict=True)
    ]
    found_a, found_b = fit_line(points)
    assert found_a > 0
    assert found_b > 0
    for x, y in points:
        assert 0.45 < (found_a + found_b * x) / y < 2.2


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile_to_json(ideal())))
    assert read_profile(path) == ideal()
    found = cost_model(path, devices=8)
    assert (found.devices, found.memory_bytes) == (8, 2**30)
    assert cost_model(str(path)) == Profiled(ideal())
    with pytest.raises(ValueError, match="8 devices, not 4"):
        cost_model(path, devices=4)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"format": "other"}, "not a profile"),
        ({"version": 99}, "version 99"),
        ({"passes": []}, "no pass"),
        ({"products": []}, "no matmul"),
        ({"products": [{"kind": "matmul"}]}, "damaged"),
        ({"operator_s": 0}, "not positive"),
        ({"view_s": -1.0}, "not positive"),
        ({"speeds": [[1, 0]]}, "not positive"),
        ({"call_s": "fast"}, "not positive"),
        ({"hosts": 3}, "8 devices are evenly on 3 hosts"),
        ({"overlaps": [{"kind": "all_reduce"}]}, "damaged"),
        ({"exchanges": 3}, "damaged"),
    ],
)
def test_a_broken_foreign_or_newer_profile_is_refused(change: dict[str, Any], says: str) -> None:
    with pytest.raises(ProfileError, match=says):
        profile_from_json({**profile_to_json(ideal()), **change})


def test_all_that_is_measured_is_kept_and_told() -> None:
    made = ideal(
        view_s=1e-6,
        pass_s=1e-5,
        part_s=2e-5,
        step_s=3e-5,
        message_s=4e-5,
        message_byte_s=5e-10,
        speeds=((1, 2.0), (2, 1.5)),
        hosts=2,
        overlaps=(Overlap("all_reduce", 2**20, 1.0, 1.1, 1.4),),
        left_out=("attention",),
        corrections=(Correction("01", "2026-11-26", (("p.json", 1.0, 2.0),), (("compute", 1.5),)),),
    )
    assert profile_from_json(json.loads(json.dumps(profile_to_json(made)))) == made
    assert host_time_of(Profiled(made)) == HostTime(
        1e-6, 1e-5, part_s=2e-5, step_s=3e-5, message_s=4e-5, message_byte_s=5e-10
    )
    assert Profiled(made).speeds == ((1, 2.0), (2, 1.5))
    assert Profiled(made).scale_up_devices == 4
    assert made.digest != ideal().digest == ideal().digest


@pytest.mark.parametrize("version", [1, 2])
def test_an_old_profile_is_refused_with_what_to_do(version: int) -> None:
    data = {**profile_to_json(ideal()), "version": version}
    with pytest.raises(ProfileError, match=rf"version {version}.*autopar profile.*on the machine"):
        profile_from_json(data)


def test_a_profile_of_a_later_autopar_is_not_called_old() -> None:
    data = {**profile_to_json(ideal()), "version": 99}
    with pytest.raises(ProfileError, match=r"version 99.*reads 4 to .*with a later autopar"):
        profile_from_json(data)


def test_what_blocks_read_again_is_in_the_caches_of_processors_alone() -> None:
    once = Work("memory", "float32", 0.0, float(SIZES[1]))
    twice, more = replace(once, bytes=2 * once.bytes), replace(once, again_bytes=once.bytes)
    for backend, like in (("gloo", once), ("nccl", twice)):
        model = Profiled(ideal(software=(("backend", backend),)))
        assert model.compute_time_s(more) == model.compute_time_s(like)


def test_what_the_same_call_launches_is_not_launched_twice() -> None:
    first = Work("memory", "float32", 0.0, float(SIZES[1]))
    model = Profiled(ideal())
    beside_s = model.compute_time_s(first) - model.compute_time_s(replace(first, follows=True))
    assert beside_s == pytest.approx(OPERATOR_S)


def test_messages_of_version_5_take_the_same_whatever_their_size() -> None:
    made = ideal(message_s=4e-5, message_byte_s=5e-10)
    old = {**profile_to_json(made), "version": 5}
    del old["message_byte_s"]
    assert profile_from_json(old) == replace(made, message_byte_s=0.0)


def test_a_loss_of_version_4_is_told_for_half_of_its_six_passes() -> None:
    told = (*ideal().passes, Pass("float32", 1000, 2e-3, "loss"))
    old = {**profile_to_json(ideal(passes=told)), "version": 4}
    *others, loss = profile_from_json(old).passes
    assert tuple(others) == ideal().passes
    assert loss == Pass("float32", 3000, 3e-3, "loss")


# ---- hosts -----------------------------------------------------------------------------------

SLOWER_ACROSS = 8


def on_hosts(measured_all: float = 1.0) -> Profiled:
    """Two hosts of four; from host to host everything takes 8 times as long, and over all devices
    ``measured_all`` times as long as inside the hosts and across, one after the other."""
    made = ideal(hosts=2, devices=8)

    def inside(kind: str, size: int, n: int) -> float:
        return exchange_s(kind, size, n)

    axes = {
        (2, 1): lambda k, n: inside(k, 2, n),
        (4, 1): lambda k, n: inside(k, 4, n),
        (2, 4): lambda k, n: SLOWER_ACROSS * inside(k, 2, n),
        (8, 1): lambda k, n: measured_all * (inside(k, 4, n) + SLOWER_ACROSS * inside(k, 2, n)),
    }
    exchanges = tuple(
        Exchange(kind, size, n, seconds(kind, n), stride)
        for kind in COLLECTIVE_KINDS
        for (size, stride), seconds in axes.items()
        for n in SIZES
    )
    return Profiled(replace(made, exchanges=exchanges))


@pytest.mark.parametrize("kind", COLLECTIVE_KINDS)
def test_each_axis_of_a_cluster_costs_what_was_measured_on_it(kind: CollectiveKind) -> None:
    costs, n = on_hosts(measured_all=1.5), 2**18

    def seconds(group_size: int, stride: int, *within: int) -> float:
        return costs.collective_time_s(Collective(kind, n, group_size, stride, within))

    inside, across = exchange_s(kind, 4, n), SLOWER_ACROSS * exchange_s(kind, 2, n)
    assert seconds(4, 1) == pytest.approx(inside)
    assert seconds(2, 4) == pytest.approx(across)
    assert seconds(8, 1) == pytest.approx(1.5 * (inside + across))
    # two devices of each host: inside, then across, as much dearer as all devices are
    assert seconds(4, 2) == pytest.approx(1.5 * (exchange_s(kind, 2, n) + across))
    # which devices they are is known: all on one host after all, or each on another
    assert seconds(2, 4, 2, 2) == pytest.approx(exchange_s(kind, 2, n))
    assert seconds(2, 1, 1, 2) == pytest.approx(across)


def test_hosts_that_were_not_measured_together_have_no_price() -> None:
    costs = Profiled(ideal(hosts=2, exchanges=tuple(e for e in ideal().exchanges if e.stride > 1)))
    with pytest.raises(ValueError, match="from host to host"):
        costs.collective_time_s(Collective("all_reduce", 1, 2, 4))


def test_convolutions_have_prices_of_their_own() -> None:
    slow = tuple(
        replace(p, kind="convolution", seconds=CALL_S + 3 * p.flops / FLOPS_PER_S)
        for p in ideal().products
        if (p.kind, p.dtype) == ("matmul", "float32")
    )
    work = replace(product(SHAPES[1]), kind="convolution")
    with_them = Profiled(ideal(products=ideal().products + slow)).compute_time_s(work)
    assert with_them == pytest.approx(OPERATOR_S + 3 * work.flops / FLOPS_PER_S)
    without = Profiled(ideal()).compute_time_s(work)
    assert without == pytest.approx(OPERATOR_S + work.flops / FLOPS_PER_S)


def test_what_several_kernels_do_has_a_price_of_its_own_or_that_of_a_pass() -> None:
    slower = tuple(Pass("float32", n, CALL_S + 3 * n / BYTES_PER_S, "update 2") for n in SIZES)
    plain = ideal()
    made = Profiled(replace(plain, passes=(*slower, *plain.passes)))
    size = float(SIZES[2])

    def beside_s(model: Profiled, of: str) -> float:
        return model.compute_time_s(Work("memory", "float32", 0.0, size, of=of)) - OPERATOR_S

    assert beside_s(made, "update 2") == pytest.approx(3 * beside_s(made, ""))
    assert beside_s(made, "loss") == beside_s(made, "") == beside_s(Profiled(plain), "update 2")


@given(*[st.floats(0.1, 10.0)] * 3)
def test_a_correction_changes_the_seconds_of_its_part(
    compute: float, communication: float, overhead: float
) -> None:
    made = ideal(view_s=1e-6, pass_s=1e-5)
    factors = {"compute": compute, "communication": communication, "overhead": overhead}
    before, after = Profiled(made), Profiled(corrected(made, factors))
    for work in (product(SHAPES[2]), Work("memory", "float32", 0.0, float(SIZES[-1]))):
        beyond_s = before.compute_time_s(work) - OPERATOR_S
        expected = overhead * OPERATOR_S + compute * beyond_s
        assert after.compute_time_s(work) == pytest.approx(expected)
    exchanged = Collective("all_gather", 2**18, 8, 1)
    expected = communication * before.collective_time_s(exchanged)
    assert after.collective_time_s(exchanged) == pytest.approx(expected)
    assert after.host_time.pass_s == pytest.approx(overhead * 1e-5)


def test_a_file_that_is_no_profile_is_named(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    with pytest.raises(ProfileError, match="cannot read the profile"):
        read_profile(path)
    path.write_text("{")
    with pytest.raises(ProfileError, match=r"profile\.json is damaged.*`autopar profile -o"):
        read_profile(path)
    path.write_text("[]")
    with pytest.raises(ProfileError, match="not a profile"):
        read_profile(path)


def test_a_gpu_does_not_wait_for_its_host_where_that_is_faster() -> None:
    in_turn, ahead = (
        Profiled(ideal(software=(("backend", backend),))) for backend in ("gloo", "nccl")
    )
    assert (in_turn.host_time.operator_s, ahead.host_time.operator_s) == (0.0, OPERATOR_S)
    work = product(SHAPES[2])
    measured_s = next(p.seconds for p in ideal().products if p.shape == work.shape)
    assert ahead.compute_time_s(work) == pytest.approx(measured_s)
    assert in_turn.compute_time_s(work) > ahead.compute_time_s(work)
