"""What was communicated, to be compared with what was promised."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor
from torch.distributed import ProcessGroup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from cost_models.interface import CollectiveKind

Phase = Literal["forward", "backward", "step"]


@dataclass(frozen=True, slots=True)
class Executed:
    """One collective that this rank took part in.

    ``axis`` and ``bytes`` as in ``PromisedCollective``: names joined by ``"+"`` for a group over
    several axes; its largest buffer on this rank. ``kind``: a ``CollectiveKind``, or the
    name of a torch operator that no plan promises.
    """

    kind: str
    phase: Phase
    axis: str
    bytes: int


@dataclass
class Recorder:
    """Listens to the process groups in ``axis_of_group``: by torch's name of a group the mesh axis,
    ``None`` for a group of one rank, which communicates nothing. ``phase`` is what the training
    step is doing now. ``beside_meshes``: groups over several rows of a pipeline, which communicate
    at the end of the step, and what their axis is called."""

    axis_of_group: Mapping[str, str | None]
    phase: Phase = "forward"
    beside_meshes: Mapping[str, str] = field(default_factory=dict)

    @contextmanager
    def during(self, phase: Phase) -> Iterator[None]:
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    @contextmanager
    def recording(self) -> Iterator[Counter[Executed]]:
        """Counts what is executed inside the block."""
        with Listening(self) as listening:
            yield listening.executed


class Listening(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees the collectives themselves, whoever calls them: as torch hands them to the backend."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.recorder = recorder
        self.executed: Counter[Executed] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        del types
        result = func(*args, **(kwargs or {}))
        self.listen(func, args, result)
        return result

    def listen(self, func: Any, args: Sequence[Any], result: Any) -> None:
        """``func`` was called: counted if it communicates."""
        name = func._schema.name
        if not name.startswith(("_c10d_functional::", "c10d::")) or name in _NOT_COLLECTIVE:
            return
        axis, kind, phase = "an unknown group", _KINDS.get(name, name), self.recorder.phase
        if name == "c10d::allreduce_":
            group = ProcessGroup.unbox(args[1]).group_name
            if group in self.recorder.beside_meshes:
                axis, kind, phase = self.recorder.beside_meshes[group], "all_reduce", "step"
        if name in _KINDS:
            found = self.recorder.axis_of_group.get(args[-1], axis)
            if found is None:
                return
            axis = found
        tensors = (leaf for leaf in tree_leaves((args, result)) if isinstance(leaf, Tensor))
        largest = max((t.numel() * t.element_size() for t in tensors), default=0)
        self.executed[Executed(kind, phase, axis, largest)] += 1


_KINDS: dict[str, CollectiveKind] = {
    "_c10d_functional::all_reduce": "all_reduce",
    "_c10d_functional::all_gather_into_tensor": "all_gather",
    "_c10d_functional::reduce_scatter_tensor": "reduce_scatter",
    "_c10d_functional::all_to_all_single": "all_to_all",
}
"""Those whose last argument is their group's name. What is called otherwise nobody promised."""

_NOT_COLLECTIVE = (
    "_c10d_functional::wait_tensor",
    "_c10d_functional::_wrap_tensor_autograd",
    "c10d::send",
    "c10d::recv_",
)
"""How a collective's result is waited for; and what goes from stage to stage, whose bytes a
pipeline's step counts itself."""
