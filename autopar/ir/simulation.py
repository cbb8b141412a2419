"""What a strategy is predicted to cost and to communicate."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from cost_models.interface import CollectiveKind


@dataclass(frozen=True, slots=True)
class PromisedCollective:
    """A collective that every rank executes ``count`` times a step.

    ``axis``: name of the mesh axis; ``"+"`` joined names for a group over several axes.
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
    communication buffers. ``at``: the operator and phase of the peak.
    """

    parameters_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    temporaries_bytes: int
    buffers_bytes: int
    at: str = ""

    @property
    def total_bytes(self) -> int:
        return (
            self.parameters_bytes
            + self.gradients_bytes
            + self.optimizer_bytes
            + self.activations_bytes
            + self.temporaries_bytes
            + self.buffers_bytes
        )


@dataclass(frozen=True)
class Estimate:
    """The predicted step, its parts in seconds, peak memory of a device, and the promise."""

    step_time_s: float
    forward_compute_s: float
    backward_compute_s: float
    forward_communication_s: float
    backward_communication_s: float
    gradient_synchronisation_s: float
    optimizer_s: float
    memory: Memory
    collectives: tuple[PromisedCollective, ...] = field(repr=False, default=())

    @property
    def peak_memory_bytes(self) -> int:
        return self.memory.total_bytes
