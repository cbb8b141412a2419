"""What a device's memory holds beside the tensors of a step: the runtime's own, by kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

MIB = 2**20


@dataclass(frozen=True, slots=True)
class Overheads:
    """Of one process on one device.

    ``context_bytes``: of the driver's context and the kernels that are loaded. ``library_bytes``:
    of the communication library, once it is used; ``communicator_bytes``: of each group of devices
    that it communicates in. ``workspace_bytes``: of the matrix library. ``fragmentation``: for each
    allocated byte, what the allocator holds beside in pieces that nothing fits into. ``headroom``:
    share of the memory that is left free where nobody says what the limit is.
    """

    context_bytes: int = 0
    library_bytes: int = 0
    communicator_bytes: int = 0
    workspace_bytes: int = 0
    fragmentation: float = 0.0
    headroom: float = 0.0

    def fixed_bytes(self, communicators: int) -> int:
        """Whatever is allocated."""
        return self.context_bytes + self.communicators_bytes(communicators) + self.workspace_bytes

    def communicators_bytes(self, communicators: int) -> int:
        return (self.library_bytes + self.communicator_bytes * communicators) * bool(communicators)

    def fragmentation_bytes(self, allocated_bytes: int, trapped_bytes: int = 0) -> int:
        """``trapped_bytes``: of such pieces, those that are known to be there; nothing, where no
        allocator keeps pieces."""
        if not self.fragmentation:
            return 0
        return max(int(self.fragmentation * allocated_bytes), trapped_bytes)


NCCL_CHANNELS = 24
"""That a communicator on eight A100 or H100 has (NCCL's log, "24 coll channels"; from memory)."""

NCCL_NEIGHBOURS = 2
"""From whom a rank receives in a channel: the one before it in the ring, and the one after it, too,
in the tree, whose part inside of a host is the same chain both ways."""

NCCL_BUFFERS_BYTES = 4 * MIB + 8 * 512 * 8 * 16 + 120 * 640 * 8 * 8
"""For each of these, one for each protocol, Simple, LL and LL128 (NCCL@5067397 src/init.cc:
DEFAULT_BUFFSIZE, DEFAULT_LL_BUFFSIZE, DEFAULT_LL128_BUFFSIZE)."""

CUDA = Overheads(
    # 0.47 GiB after the first tensor, kernels loaded when needed, PyTorch 2.1.1, a device of 80 GB
    # (stas00/ml-engineering@744d01e training/performance, "Preloaded CUDA kernels memory usage")
    context_bytes=480 * MIB,
    # the same page, "torch.distributed memory usage": the first collective of two ranks takes 1.45
    # GiB, of which 0.73 stay when the group is destroyed
    library_bytes=748 * MIB,
    communicator_bytes=NCCL_CHANNELS * NCCL_NEIGHBOURS * NCCL_BUFFERS_BYTES,
    # at::cuda::getChosenWorkspaceSize: 32 MiB on Hopper, :4096:2:16:8 (8 MiB) before; the larger
    workspace_bytes=32 * MIB,
    # 4.23 GiB beside 74.53 allocated when memory ran out (hahnyuan/PB-LLM#3); 0.89 beside 12.87
    # (TianheWu/CoSeR#10): 0.06 and 0.07
    fragmentation=0.06,
    # an allocator that is this near to the end frees its cache and asks again, again and again
    headroom=0.01,
)
"""With the caching allocator of PyTorch and NCCL."""

NOTHING = Overheads()
"""Where a process measures what it has (``local``), and where nobody measured the runtime."""

BY_VENDOR = {
    "nvidia": CUDA,
    "amd": CUDA,  # RCCL and the allocator are ports of these; the context is taken to be as large
    "google": NOTHING,  # XLA lays out a program's memory before it runs, and keeps its own apart
}


class HasMemory(Protocol):
    @property
    def memory_bytes(self) -> int: ...


def overheads_of(cost_model: object) -> Overheads:
    """Nothing unless the cost model says otherwise."""
    found: Overheads | None = getattr(cost_model, "overheads", None)
    return NOTHING if found is None else found


def allocatable_bytes(cost_model: HasMemory, communicators: int) -> int:
    """What the tensors of a step can have of a device at their peak, headroom left free."""
    found = overheads_of(cost_model)
    left = cost_model.memory_bytes * (1 - found.headroom) - found.fixed_bytes(communicators)
    return int(max(0.0, left) / (1 + found.fragmentation))
