"""What a strategy is predicted to cost and to communicate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cost_models.interface import CollectiveKind

WORLD = "(world)"
HOLDERS = "(holders)"


@dataclass(frozen=True, slots=True)
class PromisedCollective:
    """A collective that every rank executes ``count`` times a step.

    ``axis``: name of the mesh axis; ``"+"`` joined names for a group over several axes; ``WORLD``
    for all processes, ``HOLDERS`` for those of other rows that hold the same parameter.
    ``bytes``: its largest buffer. ``reason``: the edge, parameter or operator that it is for.
    """

    kind: CollectiveKind
    phase: Literal["forward", "backward", "step"]
    axis: str
    bytes: int
    count: int
    reason: str
    time_s: float


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak, by kind.

    ``parameters``, ``gradients``, ``optimizer`` stay all step long; ``activations`` are saved for
    the backward; ``temporaries`` are what the operator at the peak needs beside; ``buffers`` are
    communication buffers. ``at``: the operator and phase of the peak. Together they are what is
    allocated.

    The allocator reserves more: the matrix library's ``workspace`` and ``fragmentation``. The
    device's memory holds, beside that, the runtime's ``context`` and, for all groups of the device,
    the communication library's ``communicators``.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    temporaries_bytes: int
    buffers_bytes: int
    at: str = ""
    workspace_bytes: int = 0
    fragmentation_bytes: int = 0
    context_bytes: int = 0
    communicators_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """What is allocated for tensors."""
        return (
            self.parameters_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.temporaries_bytes
            + self.buffers_bytes
        )

    @property
    def reserved_bytes(self) -> int:
        """What the allocator has of the device."""
        return self.total_bytes + self.workspace_bytes + self.fragmentation_bytes

    @property
    def device_bytes(self) -> int:
        """All that the process has of the device."""
        return self.reserved_bytes + self.context_bytes + self.communicators_bytes


@dataclass(frozen=True, slots=True)
class RowEstimate:
    """What each device of one row of a pipeline does in a step.

    ``stages``: those that it has. ``forward_s``, ``backward_s``, ``update_s`` and ``idle_s`` are
    the step; ``bubble_s``: idle until the last backward of all rows. ``most_in_flight``:
    microbatches whose activations it keeps at once, those of each of its stages counted.
    """

    devices: tuple[int, ...]
    stages: tuple[int, ...]
    forward_s: float
    backward_s: float
    update_s: float
    idle_s: float
    bubble_s: float
    most_in_flight: int
    memory: Memory
    collectives: tuple[PromisedCollective, ...] = field(repr=False)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What all devices of one row send to those of another, in a step."""

    source_row: int
    target_row: int
    bytes: int


@dataclass(frozen=True, slots=True)
class PipelineEstimate:
    """What a step of several stages has beside that of one. ``transfer_s``: on the critical path,
    what goes from stage to stage."""

    rows: tuple[RowEstimate, ...]
    traffic: tuple[Traffic, ...]
    transfer_s: float


@dataclass(frozen=True, slots=True)
class Doubt:
    """What one kind of work or communication adds to the band of a step.

    ``kind``: see ``cost_models.bands.KINDS``. ``time_s``: of the step, it takes so much.
    ``relative``: by how much its price alone may put the logarithm of the step off. ``told``: runs
    that were measured say so; else it is as wide as the widest kind that is known.
    """

    kind: str
    time_s: float
    relative: float
    told: bool


@dataclass(frozen=True, slots=True)
class Band:
    """Between which times, and bytes at the peak, measurements are expected: the share ``coverage``
    of them. ``doubts``: what makes it wide, most first. ``own``: what the logarithms of two plans'
    steps may differ by beside what is in their doubts. ``learnt``: the date of the widths;
    ``elsewhere``: the name of the device, if no run on such a one told of them.
    """

    low_s: float
    high_s: float
    low_bytes: int
    high_bytes: int
    coverage: float
    own: float
    learnt: str
    elsewhere: str
    doubts: tuple[Doubt, ...] = field(repr=False)


@dataclass(frozen=True)
class Estimate:
    """The predicted step, its parts in seconds, peak memory of a device, and the promise.

    Of several stages (``pipeline``), the parts are those of the critical path, which together with
    its transfers are the step; ``memory`` is that of the row that needs most, and ``collectives``
    are with the rows. ``launches_s``: how much longer the step is because the busiest host takes
    longer to launch kernels than devices to run them. ``band``: how far it may be off; ``None``
    inside of searches, which compare.
    """

    step_time_s: float
    forward_compute_s: float
    backward_compute_s: float
    forward_communication_s: float
    backward_communication_s: float
    gradient_synchronisation_s: float
    optimizer_s: float
    memory: Memory
    collectives: tuple[PromisedCollective, ...] = field(repr=False, default=())
    pipeline: PipelineEstimate | None = None
    launches_s: float = 0.0
    band: Band | None = None

    @property
    def peak_memory_bytes(self) -> int:
        """What is allocated at the peak."""
        return self.memory.total_bytes

    @property
    def reserved_memory_bytes(self) -> int:
        """What the allocator has at the peak."""
        return self.memory.reserved_bytes

    @property
    def device_memory_bytes(self) -> int:
        """What the process has at the peak."""
        return self.memory.device_bytes
