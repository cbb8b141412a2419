"""The device of a process that measures: all that differs between CPUs and GPUs is here."""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BIGGER_ON_GPU = 8
"""On a GPU every size of a product is this many times that of a CPU: 8192 instead of 1024."""

MORE_BYTES_ON_GPU = 16
"""The same of the bytes of passes and exchanges: up to 512 MB, which no cache holds."""

BACKENDS = {"cpu": "gloo", "cuda": "nccl"}


@dataclass(frozen=True)
class MeasuredDevice:
    """``kind``: of torch. ``index``: which of its host."""

    kind: str
    index: int = 0

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.kind, self.index if self.on_gpu else 0)

    @property
    def on_gpu(self) -> bool:
        return self.kind == "cuda"

    @property
    def backend(self) -> str:
        return BACKENDS[self.kind]

    @property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.torch_device) if self.on_gpu else processor()

    def memory_bytes(self, sharing: int) -> int:
        """Its own, or the part of the host's memory of one of so many processes."""
        if self.on_gpu:
            return int(torch.cuda.get_device_properties(self.torch_device).total_memory)
        return memory_bytes() // sharing

    def use(self) -> None:
        """For what this process makes from now on."""
        if self.on_gpu:
            torch.cuda.set_device(self.torch_device)
        else:
            keep_freed_memory()

    def synchronize(self) -> None:
        """Wait until all that was begun is done."""
        if self.on_gpu:
            torch.cuda.synchronize(self.torch_device)

    def product_sizes(self, *on_cpu: int) -> tuple[int, ...]:
        return tuple(size * (BIGGER_ON_GPU if self.on_gpu else 1) for size in on_cpu)

    def byte_sizes(self, on_cpu: tuple[int, ...]) -> list[int]:
        return [size * (MORE_BYTES_ON_GPU if self.on_gpu else 1) for size in on_cpu]


TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's ``mallopt`` (malloc.h)."""

NEVER, LARGEST_KEPT_BYTES = -1, 2**25
"""As much as glibc lets it be. What is larger is the system's again when it is free: a hole that is
a little too small for the next such tensor would be memory lost."""


def keep_freed_memory() -> None:
    """What tensors on the CPU leave stays this process's, for those of the next microbatch, as on a
    GPU. By itself glibc gives large tensors and the end of the heap back, and each page of those
    that follow is then a fault of the system, 1 to 2 µs (``docs/decisions/0043``)."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if set_option is not None:  # glibc has it
        set_option(TRIM_THRESHOLD, NEVER)
        set_option(MMAP_THRESHOLD, LARGEST_KEPT_BYTES)


def optimizer_options(kinds: Collection[str]) -> dict[str, Any]:
    """How torch's optimizers do an update of parameters on devices of these kinds: on GPUs in one
    pass over gradients, parameters and states, instead of one for each step of the formula."""
    return {"fused": True} if "cuda" in kinds else {}


def device_type(devices: int) -> str:
    """``cuda`` when this machine has that many GPUs, else ``cpu``."""
    return "cuda" if 1 <= devices <= torch.cuda.device_count() else "cpu"


def software(backend: str) -> tuple[tuple[str, str], ...]:
    """What decides, beside the machine, how fast it is."""
    return (
        ("python", platform.python_version()),
        ("torch", str(torch.__version__)),
        ("backend", backend),
    )


def processor() -> str:
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


def processor_seconds() -> tuple[float, float]:
    """What all programs have used of the processors of this machine since it was started, and what
    there was of it; zeros where the system does not say."""
    try:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    except OSError:
        return 0.0, 0.0
    user, nice, system, idle, waiting, interrupts, soft, stolen = map(int, fields)
    busy, per_second = user + nice + system + stolen, os.sysconf("SC_CLK_TCK")
    return busy / per_second, (busy + idle + waiting + interrupts + soft) / per_second


__all__ = [
    "MeasuredDevice",
    "cores",
    "device_type",
    "keep_freed_memory",
    "memory_bytes",
    "optimizer_options",
    "processor",
    "processor_seconds",
    "software",
]
