"""This machine, measured for a moment by two processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from autopar.runtime import profiler
from autopar.runtime.bench import OVERLAP_BYTES
from autopar.runtime.profiler import ProfilerError, local_cost_model, profile
from cost_models import Collective, Profiled, Work
from cost_models.profiled import COLLECTIVE_KINDS, Profile, read_profile
from tests.helpers.pool import pool

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def measured() -> Profile:
    return profile(2, seconds=1.0)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(profiler, "user_cache_path", lambda _name: tmp_path)
    yield tmp_path


def test_everything_is_measured(measured: Profile) -> None:
    assert measured.devices == 2
    assert {(e.kind, e.group_size) for e in measured.exchanges} == {
        (kind, 2) for kind in COLLECTIVE_KINDS
    }
    assert {p.kind for p in measured.products} == {"matmul", "convolution", "attention"}
    assert {p.dtype for p in measured.products} == {"float32", "float64", "bfloat16"}
    assert 2**27 < measured.memory_bytes < 2**44
    assert measured.left_out == ()
    assert dict(measured.software)["backend"] == "gloo"
    assert all(o.slowdown > 0 for o in measured.overlaps)
    assert {o.bytes for o in measured.overlaps} == set(OVERLAP_BYTES)


def test_its_cost_model_answers_and_more_work_takes_longer(measured: Profile) -> None:
    costs = Profiled(measured)
    small, large = (
        costs.compute_time_s(Work("matmul", "float32", 2.0 * n**3, 12.0 * n**2, (1, n, n, n)))
        for n in (16, 1024)
    )
    assert 1e-6 < small < 1e-2
    assert large > 10 * small
    for kind in COLLECTIVE_KINDS:
        few, many = (
            costs.collective_time_s(Collective(kind, size, 2, 1)) for size in (2**10, 2**26)
        )
        assert 1e-6 < few < many


def test_a_machine_is_measured_once_and_read_after(
    measured: Profile, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def measure(devices: int, seconds: float, report: object = None) -> Profile:
        asked.append(devices)
        return measured

    monkeypatch.setattr(profiler, "profile", measure)
    said: list[str] = []
    first = local_cost_model(2, report=said.append)
    assert any("measuring this machine with 2" in line for line in said)
    assert local_cost_model(2, report=said.append) == first == Profiled(measured)
    assert asked == [2]
    (kept,) = cache.glob("profiles/*.json")
    assert read_profile(kept) == measured

    kept.write_text("{")  # damaged: measured again, and whole again
    assert local_cost_model(2, report=said.append) == first
    assert asked == [2, 2]
    profiler.save(replace(measured, software=(("torch", "0.1"),)), kept)
    assert local_cost_model(2, report=said.append) == first
    assert asked == [2, 2, 2]
    profiler.save(replace(measured, left_out=("attention",)), kept)  # somebody ended it early
    assert local_cost_model(2, report=said.append) == first
    assert asked == [2, 2, 2, 2]
    local_cost_model(2, refresh=True, report=said.append)
    assert asked == [2, 2, 2, 2, 2]


def test_a_script_without_a_main_guard_can_ask(tmp_path: Path) -> None:
    """Starting processes must not run the user's script again."""
    script = tmp_path / "script.py"
    script.write_text(
        "from autopar.runtime.profiler import profile\n"
        "print('once', profile(1, seconds=0.3).devices)\n"
    )
    root = Path(profiler.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stdout) == (0, "once 1\n"), done.stderr


def measured_as_hosts(per_host: int) -> Profile | None:
    """On a process that torchrun might have started."""
    os.environ["LOCAL_WORLD_SIZE"] = str(per_host)
    try:
        return profiler.profile_cluster(0.5)
    finally:
        del os.environ["LOCAL_WORLD_SIZE"]


def test_a_cluster_is_measured_over_each_axis_of_its_hosts() -> None:
    found, *others = pool().run(4, measured_as_hosts, 2)
    assert others == [None] * 3
    assert (found.devices, found.hosts) == (4, 2)
    axes = {(e.group_size, e.stride) for e in found.exchanges}
    assert axes == {(2, 1), (2, 2), (4, 1)}  # in a host, from host to host, all
    costs = Profiled(found)
    assert costs.scale_up_devices == 2
    for kind in COLLECTIVE_KINDS:
        assert all(costs.collective_time_s(Collective(kind, 2**20, *axis)) > 0 for axis in axes)


def test_hosts_with_different_numbers_of_processes_are_refused() -> None:
    with pytest.raises(AssertionError, match="equally many devices"):
        pool().run(4, measured_as_hosts, 3)


def test_an_early_end_keeps_what_was_measured() -> None:
    said: list[str] = []

    def interrupt_in_the_collectives(line: str) -> None:
        said.append(line)
        if line.endswith(": collectives"):
            os.kill(os.getpid(), signal.SIGINT)

    found = profile(2, seconds=0.5, report=interrupt_in_the_collectives)
    assert said[-1] == "ending early; what was measured is kept"
    assert set(found.left_out) == {
        "devices with and without the others",
        "collectives beside products",
    }
    assert found.exchanges  # the part that was begun is ended
    assert Profiled(found).speeds == ()


def test_an_end_before_anything_has_a_price_is_an_interruption() -> None:
    def interrupt(line: str) -> None:
        if line.endswith(": overheads"):
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        profile(2, seconds=0.5, report=interrupt)


def test_no_devices_cannot_be_measured() -> None:
    with pytest.raises(ProfilerError, match="at least 1"):
        profile(0)


def test_a_failure_of_a_process_is_told_with_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiler, "device_type", lambda _devices: "abacus")
    with pytest.raises(ProfilerError, match="abacus"):
        profile(2, seconds=0.1)
