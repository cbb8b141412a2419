"""Measures this machine, or all hosts of a cluster, with all devices at work, and keeps what it
found."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from platformdirs import user_cache_path

from autopar.errors import AutoparError
from autopar.runtime.bench import Bench, Report, profile_of
from autopar.runtime.devices import (
    BACKENDS,
    MeasuredDevice,
    cores,
    device_type,
    memory_bytes,
    processor,
    software,
)
from cost_models.profiled import (
    Profile,
    Profiled,
    ProfileError,
    profile_from_json,
    profile_to_json,
    read_profile,
)

MEASURE_S = 20.0
"""Default of the measurements together. To start processes, to make what is asked with, and to see
how stretched time is takes about as long again; others on the machine make it longer."""

BUSY = 0.5
"""A load average of more than this for each core is told to the user."""


class ProfilerError(AutoparError):
    """The machine could not be measured."""


def local_cost_model(
    devices: int,
    *,
    seconds: float = MEASURE_S,
    refresh: bool = False,
    report: Report | None = None,
) -> Profiled:
    """The cost model of ``devices`` devices of this machine: GPUs when it has as many, else CPU
    processes. Measured on first use (or when ``refresh``), then read from the user's cache."""
    path = profile_path(devices)
    if not refresh:
        kept = _kept(path, devices)
        if kept is not None:
            return Profiled(kept)
    say = report or _to_stderr
    kind = device_type(devices)
    say(f"measuring this machine with {devices} {_processes(kind)}, about {2 * seconds + 10:.0f} s")
    if os.getloadavg()[0] > BUSY * cores():
        say("other programs are busy here and make it look slower; measure again when they end")
    profile_ = profile(devices, seconds, report=say)
    save(profile_, path)
    say(f"kept in {path}")
    return Profiled(profile_)


def profile(devices: int, seconds: float = MEASURE_S, *, report: Report | None = None) -> Profile:
    """Measure now: about ``seconds``, and some more to start ``devices`` processes.

    After Ctrl-C, what was measured, if that is enough to price anything (``Profile.left_out``).
    """
    if devices < 1:
        raise ProfilerError(f"cannot measure {devices} devices; give at least 1")
    with tempfile.TemporaryDirectory(prefix="autopar-profile-") as folder:
        result, errors = Path(folder, "profile.json"), Path(folder, "errors.txt")
        # a fresh interpreter: the caller's may have threads, and a script without a main guard
        command = [sys.executable, "-m", "autopar.runtime.profiler"]
        command += [str(devices), str(seconds), device_type(devices), folder]
        search_path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search_path}
        with (
            errors.open("w") as error_file,
            subprocess.Popen(
                command,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=error_file,
                text=True,
                start_new_session=True,  # Ctrl-C comes to this process, which passes it on
            ) as process,
            _passing_on(process, report),
        ):
            assert process.stdout is not None
            for line in process.stdout:
                if report is not None and line.startswith(PROGRESS):
                    report(line.removeprefix(PROGRESS).strip())
        if process.returncode == TOO_LITTLE:
            raise KeyboardInterrupt
        if process.returncode != 0 or not result.exists():
            last = "\n".join(errors.read_text().strip().splitlines()[-12:])
            raise ProfilerError(
                f"measuring this machine with {devices} processes failed; give a machine with "
                f"--topology NAME instead, or fewer --devices. The processes said:\n{last}"
            )
        return profile_from_json(json.loads(result.read_text()))


@contextmanager
def _passing_on(process: subprocess.Popen[str], report: Report | None) -> Iterator[None]:
    """The first Ctrl-C ends the measurement early, the second ends everything."""

    def once(_number: int, _frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        process.send_signal(signal.SIGINT)
        if report is not None:
            report("ending early; what was measured is kept")

    try:
        before = signal.signal(signal.SIGINT, once)
    except ValueError:  # not the main thread, which gets all signals
        yield
        return
    try:
        yield
    except KeyboardInterrupt:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    finally:
        signal.signal(signal.SIGINT, before)


def here(devices: int) -> tuple[str, tuple[tuple[str, str], ...]]:
    """The device and the software with which so many processes of this machine run."""
    device = MeasuredDevice(device_type(devices))
    return device.name, software(device.backend)


def local_devices() -> int:
    """How many devices this machine is when nobody says: its GPUs, else a process for each core,
    as a power of two (which divides most models' sizes) of at most 8."""
    return torch.cuda.device_count() or min(8, 1 << (cores().bit_length() - 1))


def profile_path(devices: int) -> Path:
    """Where the profile of this machine is kept."""
    name = f"{machine_fingerprint()}-{device_type(devices)}-{devices}.json"
    return user_cache_path("autopar") / "profiles" / name


def machine_fingerprint() -> str:
    """Hexadecimal digits of what decides the speed of this machine: processor, cores that may be
    used, memory, GPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    content = [processor(), cores(), round(memory_bytes() / 2**30), *gpus]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def save(profile_: Profile, path: Path) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(profile_to_json(profile_), indent=1) + "\n")
    draft.replace(path)


def _kept(path: Path, devices: int) -> Profile | None:
    """The profile in the cache, unless it is damaged, of an earlier version, of other software, or
    was ended early."""
    try:
        kept = read_profile(path)
    except ProfileError:
        return None
    here = software(BACKENDS[device_type(devices)])
    alike = kept.devices == devices and kept.software == here
    return kept if alike and not kept.left_out else None


def _processes(kind: str) -> str:
    return "GPUs" if kind == "cuda" else "CPU processes"


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


# ------------------------------------------------------------- in processes that torchrun started


def profile_cluster(seconds: float = MEASURE_S, *, report: Report | None = None) -> Profile | None:
    """On each of the processes that torchrun started, on one host or several: measure all of them
    together. The profile on the first rank, ``None`` on the others.

    Raises:
        ProfilerError: hosts have different numbers of processes.
    """
    per_host = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    device = MeasuredDevice(device_type(per_host), int(os.environ.get("LOCAL_RANK", "0")))
    device.use()
    torch.set_num_threads(1)
    if not dist.is_initialized():
        dist.init_process_group(
            device.backend, device_id=device.torch_device if device.on_gpu else None
        )
    devices = dist.get_world_size()
    _check_even(devices, per_host, device)
    return _measure(Bench(devices, devices // per_host, device), seconds, report or _nobody)


def _check_even(devices: int, per_host: int, device: MeasuredDevice) -> None:
    largest = torch.tensor([per_host, -per_host], device=device.torch_device)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    most, least = int(largest[0]), -int(largest[1])
    if most != least or devices % per_host:
        raise ProfilerError(
            f"a profile is of hosts with equally many devices, and these have from {least} to "
            f"{most} processes; start as many on each (--nproc-per-node)"
        )


def _measure(bench: Bench, seconds: float, report: Report) -> Profile | None:
    """Raises ``KeyboardInterrupt`` where that came too early."""
    torch.manual_seed(dist.get_rank())
    say = report if dist.get_rank() == 0 else _nobody
    with _until_interrupted() as ended:
        rounds = bench.measured(seconds, say, ended)
    found = profile_of(bench, rounds, machine_fingerprint())
    if found is None:
        raise KeyboardInterrupt
    return found if dist.get_rank() == 0 else None


@contextmanager
def _until_interrupted() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C is only noted; gives a function that says whether it came."""
    came = _Came()

    def note(_number: int, _frame: Any) -> None:
        came.yet = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: came.yet
    finally:
        signal.signal(signal.SIGINT, before)


@dataclass
class _Came:
    yet: bool = False


# ------------------------------------------------------------- in the processes of this machine

PROGRESS = "progress: "
TOO_LITTLE = 130
"""Exit code after a Ctrl-C before anything could be priced, as shells give it."""


def _main(devices: int, seconds: float, kind: str, folder: Path) -> int:
    """Forks the ranks before torch has any threads: torch is imported once for all of them."""
    torch.set_num_threads(1)
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(target=_rank, args=(rank, devices, seconds, kind, folder))
        for rank in range(devices)
    ]
    for process in ranks:
        process.start()

    def pass_on(_number: int, _frame: Any) -> None:
        for process in ranks:
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, signal.SIGINT)

    signal.signal(signal.SIGINT, pass_on)
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks):
            for process in ranks:
                process.terminate()
        time.sleep(0.05)
    codes = [process.exitcode or 0 for process in ranks]
    return TOO_LITTLE if TOO_LITTLE in codes else max(map(abs, codes))


def _rank(rank: int, devices: int, seconds: float, kind: str, folder: Path) -> None:
    device = MeasuredDevice(kind, rank)
    device.use()
    dist.init_process_group(
        device.backend,
        store=dist.FileStore(  # type: ignore[attr-defined]
            str(folder / "store"), devices
        ),
        rank=rank,
        world_size=devices,
        device_id=device.torch_device if device.on_gpu else None,
    )
    try:
        found = _measure(Bench(devices, 1, device), seconds, _to_stdout)
    except KeyboardInterrupt:
        os._exit(TOO_LITTLE)
    if found is not None:
        (folder / "profile.json").write_text(json.dumps(profile_to_json(found)))
    if device.on_gpu:  # gloo does not always survive it, and this process ends here
        dist.destroy_process_group()


def _to_stdout(line: str) -> None:
    sys.stdout.write(f"{PROGRESS}{line}\n")
    sys.stdout.flush()


def _nobody(_line: str) -> None:
    pass


__all__ = [
    "MEASURE_S",
    "ProfilerError",
    "cores",
    "device_type",
    "local_cost_model",
    "local_devices",
    "machine_fingerprint",
    "memory_bytes",
    "profile",
    "profile_cluster",
    "profile_path",
    "save",
]

if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], Path(sys.argv[4])))
