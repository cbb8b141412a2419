"""Measures this machine with all its devices at work, and keeps what it found."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812, torch's own name for it
from platformdirs import user_cache_path

from autopar.errors import AutoparError
from autopar.runtime.sample_program import LONG, SHORT, Programs, alone, microbatch, sample_graph
from cost_models.profiled import (
    Exchange,
    Pass,
    Product,
    Profile,
    Profiled,
    ProfileError,
    profile_from_json,
    profile_to_json,
    read_profile,
)

Report = Callable[[str], None]

MEASURE_S = 14.0
"""Default of the measurements together; starting the processes takes some seconds more."""

BUSY = 0.5
"""A load average of more than this for each core is told to the user."""

MATMULS = (
    (1, 32, 32, 32),
    (1, 64, 256, 64),
    (1, 256, 64, 256),
    (1, 256, 256, 256),
    (1, 1024, 64, 1024),
    (1, 4, 1024, 1024),
    (1, 64, 1024, 1024),
    (1, 1024, 1024, 64),
    (1, 512, 512, 512),
    (1, 1024, 1024, 1024),
    (16, 64, 64, 32),
    (16, 256, 64, 64),
)
"""(batch, m, n, k): small and large, and each of the three sizes the short one."""

ATTENTIONS = ((8, 64, 64, 32), (8, 256, 256, 64), (2, 1024, 1024, 64))
PASS_BYTES = (2**12, 2**15, 2**18, 2**21, 2**23, 2**25)
EXCHANGE_BYTES = (2**10, 2**14, 2**17, 2**20, 2**22, 2**24)
DTYPES = ("float32", "float64", "bfloat16")
ROUNDS = 3
KINDS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")

BIGGER_ON_GPU = 8
"""On a GPU every size of a product is this many times that of a CPU: 8192 instead of 1024."""

MORE_BYTES_ON_GPU = 16
"""The same of the bytes of passes and exchanges: up to 512 MB, which no cache holds."""

LEAST_S = 1e-9
"""Of what is the difference of two measurements, which noise may have the wrong way round."""

ALONE_SHARE, ALONE_ROUNDS = 0.015, 4
"""How much longer measuring takes for each time that some devices are measured with and without the
others, and how often. Shorter than some tenths of a second says nothing on a machine that is busy:
who has waited is let go first."""

FORWARD_AND_BACKWARD = 3.5
"""Flops of fused attention's forward and backward, in forwards: 2 products forward, 5 backward."""


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
    say(f"measuring this machine with {devices} {_processes(kind)}, about {seconds + 8:.0f} s")
    if os.getloadavg()[0] > BUSY * cores():
        say("other programs are busy here and make it look slower; measure again when they end")
    profile_ = profile(devices, seconds, report=say)
    save(profile_, path)
    say(f"kept in {path}")
    return Profiled(profile_)


def profile(devices: int, seconds: float = MEASURE_S, *, report: Report | None = None) -> Profile:
    """Measure now: about ``seconds``, and some more to start ``devices`` processes."""
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
                command, env=environment, stdout=subprocess.PIPE, stderr=error_file, text=True
            ) as process,
        ):
            assert process.stdout is not None
            for line in process.stdout:
                if report is not None and line.startswith(PROGRESS):
                    report(line.removeprefix(PROGRESS).strip())
        if process.returncode != 0 or not result.exists():
            last = "\n".join(errors.read_text().strip().splitlines()[-12:])
            raise ProfilerError(
                f"measuring this machine with {devices} processes failed; give a machine with "
                f"--topology NAME instead, or fewer --devices. The processes said:\n{last}"
            )
        return profile_from_json(json.loads(result.read_text()))


def local_devices() -> int:
    """How many devices this machine is when nobody says: its GPUs, else a process for each core,
    as a power of two (which divides most models' sizes) of at most 8."""
    return torch.cuda.device_count() or min(8, 1 << (cores().bit_length() - 1))


def device_type(devices: int) -> str:
    """``cuda`` when this machine has that many GPUs, else ``cpu``."""
    return "cuda" if 1 <= devices <= torch.cuda.device_count() else "cpu"


def profile_path(devices: int) -> Path:
    """Where the profile of this machine is kept."""
    name = f"{machine_fingerprint()}-{device_type(devices)}-{devices}.json"
    return user_cache_path("autopar") / "profiles" / name


def machine_fingerprint() -> str:
    """Hexadecimal digits of what decides the speed of this machine: processor, cores that may be
    used, memory, GPUs."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    content = [_processor(), cores(), round(memory_bytes() / 2**30), *gpus]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def save(profile_: Profile, path: Path) -> None:
    """Written whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(f".{os.getpid()}.tmp")
    draft.write_text(json.dumps(profile_to_json(profile_), indent=1) + "\n")
    draft.replace(path)


def _kept(path: Path, devices: int) -> Profile | None:
    """The profile in the cache, unless it is damaged, of other software, or says less than now."""
    try:
        kept = read_profile(path)
    except ProfileError:
        return None
    whole = kept.view_s > 0  # earlier versions did not measure views
    alike = kept.devices == devices and kept.software == _software()
    return kept if whole and alike else None


def _software() -> tuple[tuple[str, str], ...]:
    return (("python", platform.python_version()), ("torch", str(torch.__version__)))


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """RAM, or the container's part of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total


def _processes(kind: str) -> str:
    return "GPUs" if kind == "cuda" else "CPU processes"


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


# ------------------------------------------------------------- in the processes that measure

PROGRESS = "progress: "


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
    while any(process.is_alive() for process in ranks):
        if any(process.exitcode for process in ranks):
            for process in ranks:
                process.terminate()
        time.sleep(0.05)
    return max(abs(process.exitcode or 0) for process in ranks)


def _rank(rank: int, devices: int, seconds: float, kind: str, folder: Path) -> None:
    device = torch.device(kind, rank if kind == "cuda" else 0)
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        store=dist.FileStore(  # type: ignore[attr-defined]
            str(folder / "store"), devices
        ),
        rank=rank,
        world_size=devices,
        device_id=device if kind == "cuda" else None,
    )
    torch.manual_seed(rank)
    bench = _Bench(devices, device)
    found = _measured(bench, seconds, _to_stdout if rank == 0 else _nobody)
    if rank == 0:
        (folder / "profile.json").write_text(json.dumps(profile_to_json(found)))
    if kind == "cuda":  # gloo does not always survive it, and this process ends here
        dist.destroy_process_group()


def _to_stdout(line: str) -> None:
    sys.stdout.write(f"{PROGRESS}{line}\n")
    sys.stdout.flush()


def _nobody(_line: str) -> None:
    pass


@dataclass(frozen=True)
class _Question:
    """A call to be timed, and what its seconds mean. ``together``: it is a collective."""

    call: Callable[[], Any]
    answer: Callable[[float], Product | Pass | Exchange | float]
    together: bool = False


def _measured(bench: _Bench, seconds: float, report: Report) -> Profile:
    overheads, products = bench.overheads(), [*bench.matmuls(), *bench.attentions()]
    passes, exchanges = bench.passes(), bench.exchanges()
    parts = ((overheads, 0.12), (products, 0.38), (passes, 0.2), (exchanges, 0.3))
    questions = [question for part, _ in parts for question in part]
    budgets_s = [share * seconds / len(part) for part, share in parts for _ in part]
    times = bench.times_s(questions, budgets_s, report)
    answers = [q.answer(time_s) for q, time_s in zip(questions, times, strict=True)]
    call_s, *of_programs = (a for a in answers if isinstance(a, float))
    programs = Programs(*of_programs)
    return Profile(
        machine=machine_fingerprint(),
        device=torch.cuda.get_device_name() if bench.on_gpu else _processor(),
        devices=bench.devices,
        memory_bytes=(
            torch.cuda.get_device_properties(bench.device).total_memory
            if bench.on_gpu
            else memory_bytes() // bench.devices
        ),
        software=_software(),
        date=datetime.now(UTC).date().isoformat(),
        # no operator is quicker than the cheapest call; noise may say so of the rest
        operator_s=max(programs.operator_s, call_s),
        call_s=call_s,
        products=tuple(a for a in answers if isinstance(a, Product)),
        passes=tuple(a for a in answers if isinstance(a, Pass)),
        exchanges=tuple(a for a in answers if isinstance(a, Exchange)),
        view_s=max(programs.view_s, LEAST_S),
        pass_s=max(programs.pass_s, LEAST_S),
        speeds=tuple(bench.speeds(ALONE_SHARE * seconds)),
    )


@dataclass(frozen=True)
class _Bench:
    """Measurements on one rank; all ranks make the same ones in the same order."""

    devices: int
    device: torch.device

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def _sizes(self, on_cpu: tuple[int, ...]) -> list[int]:
        return [size * (MORE_BYTES_ON_GPU if self.on_gpu else 1) for size in on_cpu]

    def overheads(self) -> list[_Question]:
        """A single small call, and a microbatch of each of the sample programs."""
        small = torch.ones(16, device=self.device)
        communicator = alone()
        graphs = (sample_graph(SHORT), sample_graph(LONG), sample_graph(LONG, views=True))
        calls: list[Callable[[], Any]] = [lambda: torch.mul(small, small)]
        calls += [microbatch(graph, communicator, self.device) for graph in graphs]
        return [_Question(call, _seconds) for call in calls]

    def matmuls(self) -> list[_Question]:
        times = BIGGER_ON_GPU if self.on_gpu else 1
        shapes = [(b, m * times, n * times, k * times) for b, m, n, k in MATMULS]
        return [
            _Question(
                self._matmul(shape, getattr(torch, dtype)),
                partial(Product, "matmul", dtype, shape, 2.0 * math.prod(shape)),
            )
            for dtype in DTYPES
            for shape in shapes
        ]

    def _matmul(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Callable[[], Any]:
        batch, m, n, k = shape
        left = torch.randn(batch, m, k, device=self.device).to(dtype)
        right = torch.randn(batch, n, k, device=self.device).to(dtype)
        if batch == 1:
            return partial(F.linear, left[0], right[0])
        return partial(torch.bmm, left, right.transpose(1, 2))

    def attentions(self) -> list[_Question]:
        return [
            _Question(
                self._attention(shape, getattr(torch, dtype)),
                partial(
                    Product,
                    "attention",
                    dtype,
                    shape,
                    FORWARD_AND_BACKWARD * 4.0 * math.prod(shape),
                ),
            )
            for dtype in DTYPES
            for shape in ATTENTIONS
        ]

    def _attention(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Callable[[], Any]:
        heads, queries, keys, dim = shape
        q, k, v = (
            torch.randn(1, heads, length, dim, device=self.device).to(dtype).requires_grad_()
            for length in (queries, keys, keys)
        )

        def both() -> None:
            out = F.scaled_dot_product_attention(q, k, v)
            torch.autograd.grad(out.sum(), (q, k, v))

        return both

    def passes(self) -> list[_Question]:
        """The mean of a cheap and two dear elementwise operators, since ``Work`` does not say
        which it is."""
        found, sizes = [], self._sizes(PASS_BYTES)
        for dtype in DTYPES:
            kind = getattr(torch, dtype)
            largest = torch.randn(sizes[-1] // 2 // kind.itemsize, device=self.device)
            largest = largest.to(kind)
            for size in sizes:
                rows = largest[: size // 2 // kind.itemsize].view(-1, 64)
                found.append(_Question(partial(_three_passes, rows), partial(_third, dtype, size)))
        return found

    def exchanges(self) -> list[_Question]:
        sizes = self._sizes(EXCHANGE_BYTES)
        largest = torch.randn(sizes[-1] // 4, device=self.device)
        return [
            _Question(
                self._exchange(kind, group, largest, size),
                partial(Exchange, kind, dist.get_world_size(group), size),
                together=True,
            )
            for group in self._groups()
            for kind in KINDS
            for size in sizes
        ]

    def _groups(self) -> Iterator[Any]:
        """This rank's group of each size that is measured: pairs, about half, and all ranks; the
        groups of a size cover the machine and work at once."""
        divisors = [d for d in range(2, self.devices + 1) if self.devices % d == 0]
        middle = [d for d in divisors if 2 < d < self.devices]
        rank = dist.get_rank()
        for size in sorted({*divisors[:1], *middle[-1:], *divisors[-1:]}):
            for first in range(0, self.devices, size):
                group = dist.new_group(list(range(first, first + size)))
                if first <= rank < first + size:
                    yield group

    def _exchange(
        self, kind: str, group: Any, largest: torch.Tensor, size_bytes: int
    ) -> Callable[[], Any]:
        """As the runtime calls them: the functional collectives, waited for."""
        c10d = torch.ops._c10d_functional
        ranks, name = dist.get_world_size(group), group.group_name
        count = max(ranks, size_bytes // 4 // ranks * ranks)  # float32, a multiple of the group
        whole, part = largest[:count], largest[: count // ranks]
        rows = [count // ranks] * ranks
        calls: dict[str, Callable[[], Any]] = {
            "all_reduce": lambda: c10d.wait_tensor(c10d.all_reduce(whole, "sum", name)),
            "all_gather": lambda: c10d.wait_tensor(c10d.all_gather_into_tensor(part, ranks, name)),
            "reduce_scatter": lambda: c10d.wait_tensor(
                c10d.reduce_scatter_tensor(whole, "sum", ranks, name)
            ),
            "all_to_all": lambda: c10d.wait_tensor(c10d.all_to_all_single(whole, rows, rows, name)),
            "send": lambda: _pass_on(whole, group),
        }
        return calls[kind]

    def times_s(
        self, questions: list[_Question], budgets_s: list[float], report: Report
    ) -> list[float]:
        """Seconds of each call: the median of rounds over all of them, so that what else the
        machine does for a moment does not tell, and the mean of the ranks."""
        report("first calls")
        once = self._mean([self._once_s(question) for question in questions])
        rounds = []
        for i in range(ROUNDS):
            report(f"round {i + 1} of {ROUNDS}")
            dist.barrier()
            rounds.append(
                [
                    # a collective must be called as often by all ranks
                    self._repeated_s(q, max(2, int(budget_s / ROUNDS / once_s)))
                    if q.together
                    else self._steady_s(q, budget_s / ROUNDS)
                    for q, budget_s, once_s in zip(questions, budgets_s, once, strict=True)
                ]
            )
        return self._mean([median(times) for times in zip(*rounds, strict=True)])

    def speeds(self, budget_s: float) -> list[tuple[int, float]]:
        """How many times as fast one rank, and each of half of them, is when the others wait."""
        found: list[tuple[int, float]] = []
        for few in sorted({1, self.devices // 2} - {0, self.devices}, reverse=True):
            # fewer are no slower, and do not do more together than all
            least, most = found[0][1] if found else 1.0, self.devices / few
            found.insert(0, (few, min(max(least, self._speed(few, budget_s)), most)))
        return found

    def _speed(self, few: int, budget_s: float) -> float:
        calls = (self._matmul((1, 256, 256, 256), torch.float32), self._large_pass())
        questions = [_Question(call, _seconds) for call in calls]
        ratios = []
        for question in questions * ALONE_ROUNDS:
            dist.barrier()
            (together_s,) = self._mean([self._steady_s(question, budget_s)])
            mine_s = self._steady_s(question, budget_s) if dist.get_rank() < few else 0.0
            ratios.append(together_s / (self._mean([mine_s])[0] * self.devices / few))
        return median(ratios)

    def _large_pass(self) -> Callable[[], Any]:
        values = torch.randn(self._sizes(PASS_BYTES)[3] // 8, device=self.device)
        return partial(torch.mul, values, 2.0)

    def _once_s(self, question: _Question) -> float:
        question.call()  # the first call allocates and chooses kernels
        return self._repeated_s(question, 1)

    def _repeated_s(self, question: _Question, calls: int) -> float:
        self._synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            question.call()
        self._synchronize()
        return (time.perf_counter() - start) / calls

    def _steady_s(self, question: _Question, budget_s: float) -> float:
        """While the other ranks do the same: for as long, however often."""
        start, calls = time.perf_counter(), 0
        while (elapsed := time.perf_counter() - start) < budget_s or calls == 0:
            batch = max(1, calls // 4)
            for _ in range(batch):
                question.call()
            calls += batch
            self._synchronize()
        return elapsed / calls

    def _synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def _mean(self, seconds: list[float]) -> list[float]:
        total = torch.tensor(seconds, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total / self.devices]


def _seconds(seconds: float) -> float:
    return seconds


def _three_passes(rows: torch.Tensor) -> None:
    torch.mul(rows, 2.0)
    F.gelu(rows)
    F.layer_norm(rows, (rows.shape[1],))


def _third(dtype: str, size_bytes: int, seconds: float) -> Pass:
    return Pass(dtype, size_bytes, seconds / 3)


def _pass_on(tensor: torch.Tensor, group: Any) -> None:
    """Every rank sends to the next of its group and receives from the one before."""
    ranks = dist.get_process_group_ranks(group)
    here = ranks.index(dist.get_rank())
    operations = [
        dist.P2POp(dist.isend, tensor, ranks[(here + 1) % len(ranks)], group),
        dist.P2POp(dist.irecv, torch.empty_like(tensor), ranks[here - 1], group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


if __name__ == "__main__":
    sys.exit(_main(int(sys.argv[1]), float(sys.argv[2]), sys.argv[3], Path(sys.argv[4])))
