"""What is not kept for the backward, and there again when it is needed: gathered parameters are
gathered again, recomputed tensors made again."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from autopar.runtime.collectives import Communicator
from autopar.simulator.edges import ParameterEdge
from autopar.simulator.redistribution import steps

if TYPE_CHECKING:
    from autopar.runtime.lowering import Execution


@dataclass(frozen=True)
class _View:
    """How a saved tensor lies in the memory of one that is made again."""

    size: torch.Size
    stride: tuple[int, ...]
    offset: int | torch.SymInt

    @staticmethod
    def of(tensor: Tensor) -> _View:
        return _View(tensor.size(), tensor.stride(), tensor.storage_offset())

    def on(self, whole: Tensor) -> Tensor:
        return whole.as_strided(self.size, self.stride, self.offset)


def _share_memory(a: Tensor, b: Tensor) -> bool:
    """And are views of it that differ in their shape alone."""
    kinds = [(t.dtype, t.is_conj(), t.is_neg()) for t in (a, b)]
    same = a.untyped_storage()._cdata == b.untyped_storage()._cdata
    return same and kinds[0] == kinds[1]


# ---- gathered parameters -----------------------------------------------------------------------


def gathered_parameter(shard: Tensor, communicator: Communicator, edge: ParameterEdge) -> Tensor:
    return communicator.walk(shard, steps(edge.storage.parameter, edge.target))


def regathering(
    execution: Execution,
    operator: str,
    gathered: tuple[Tensor, ...],
    op: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call ``op``; of ``gathered`` parameters it saves nothing but how to gather them again.

    In the backward of this operator each of them is gathered once, when it is first needed, and
    dropped after its last use; so an operator that saves a gathered parameter (in its rule's
    ``saves``) repeats the forward's collectives exactly once.
    """
    group = _Gathered(execution, execution.regathered[operator], gathered)
    with saved_tensors_hooks(group.pack, group.unpack):
        result = op(*args, **kwargs)
    group.gathered = ()  # autograd holds on to both hooks until the backward
    return result


@dataclass(frozen=True)
class _OfParameter:
    """A saved tensor that is a view of a gathered parameter."""

    parameter: int
    view: _View


class _Gathered:
    """The gathered parameters that one call of an operator has saved."""

    def __init__(
        self,
        execution: Execution,
        edges: tuple[ParameterEdge, ...],
        gathered: tuple[Tensor, ...],
    ) -> None:
        self.execution, self.edges, self.gathered = execution, edges, gathered
        self.wanted = [0] * len(edges)
        self.whole: list[Tensor | None] = [None] * len(edges)

    def pack(self, tensor: Tensor) -> Tensor | _OfParameter:
        storage = tensor.untyped_storage()._cdata
        for i, whole in enumerate(self.gathered):
            if whole.untyped_storage()._cdata == storage:
                self.wanted[i] += 1
                return _OfParameter(i, _View.of(tensor))
        return tensor

    def unpack(self, packed: Tensor | _OfParameter) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        i = packed.parameter
        whole = self.gather(i)
        self.wanted[i] -= 1
        self.whole[i] = whole if self.wanted[i] else None
        return packed.view.on(whole)

    def gather(self, i: int) -> Tensor:
        """The whole parameter; where it was saved it stays until that is asked for."""
        whole = self.whole[i]
        if whole is None:
            edge = self.edges[i]
            shard = self.execution.parameters[edge.parameter].detach()
            whole = gathered_parameter(shard, self.execution.communicator, edge)
            self.whole[i] = whole if self.wanted[i] else None
        return whole


# ---- recomputed tensors ------------------------------------------------------------------------

_VALUE = -1
"""Instead of a place: what is missing is (a view of) a tensor of the program."""


@dataclass(frozen=True)
class Reads:
    """What is known of an operator that is recomputed, or reads what is.

    ``given``: for each tensor among its arguments its name in the program, and the segment that
    makes it again (``None``: it is kept, or gathered). ``own``: the segment with which the operator
    is run again.
    """

    given: tuple[tuple[str, int | None], ...]
    own: int | None = None


@dataclass(frozen=True)
class SegmentProgram:
    """A segment as it is run again: what it is made from (``kept``), and what is ``made`` by the
    nodes of ``graph``, whose ``meta["name"]`` is what they are called in the whole program."""

    number: int
    graph: fx.Graph
    kept: tuple[str, ...]
    made: frozenset[str]
    modules: nn.Module

    def __str__(self) -> str:
        code = str(self.graph.python_code("self").src)
        return code.replace("def forward(", f"def segment_{self.number}_again(", 1).strip()


@dataclass(eq=False)
class _Missing:
    """Stands for a saved tensor of a segment: autograd has this, and lets go of it and of what it
    stands for after the last backward that needs it. ``view``: of the tensor ``name``; without one,
    what the operator ``name`` saved as its ``place``-th."""

    segment: SegmentRun
    name: str
    place: int
    view: _View | None
    value: Tensor | None = None

    def found(self) -> Tensor:
        if self.value is None:
            self.segment.run_again()
        assert self.value is not None, f"{self.name} was not made again"
        return self.value


@dataclass(eq=False)
class SegmentRun:
    """One segment in one microbatch: what was kept, and who misses what of it."""

    program: SegmentProgram
    execution: Execution
    kept: dict[str, Tensor] = field(default_factory=dict)
    gathered: dict[str, _Gathered] = field(default_factory=dict)
    missing: list[weakref.ref[_Missing]] = field(default_factory=list)
    done: bool = False

    def keep(self, name: str, tensor: Tensor) -> None:
        if name in self.program.kept and name not in self.kept:
            # without its history, which may lead back to what is missing here
            self.kept[name] = _alone(tensor, tensor.requires_grad)

    def without(self, name: str, place: int = _VALUE, view: _View | None = None) -> _Missing:
        """In place of a saved tensor."""
        missing = _Missing(self, name, place, view)
        self.missing.append(weakref.ref(missing))
        return missing

    def run_again(self) -> None:
        """Make what is missing, the first time that anything is."""
        if self.done:
            return
        self.done = True
        wanted: dict[tuple[str, int], list[_Missing]] = {}
        for reference in self.missing:
            if (missing := reference()) is not None:
                wanted.setdefault((missing.name, missing.place), []).append(missing)
        self.missing = []
        _Again(self, wanted).run()
        self.kept, self.gathered = {}, {}


def _alone(tensor: Tensor, requires_grad: bool) -> Tensor:
    return tensor.detach().requires_grad_(requires_grad)


def begin_segment(execution: Execution, number: int) -> SegmentRun:
    """A segment of this microbatch; when it is run again, another one may be under way."""
    return SegmentRun(execution.segments[number], replace(execution, parted=None))


def recomputing(
    segments: tuple[SegmentRun, ...],
    execution: Execution,
    operator: str,
    gathered: tuple[Tensor, ...],
    op: Callable[..., Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Call ``op``; of what ``segments`` make again it saves nothing but what is missing. Gathered
    parameters as in ``regathering``."""
    call = _Call(segments, execution, operator, gathered, tree_leaves((args, kwargs)))
    with saved_tensors_hooks(call.pack, call.unpack):
        result = op(*args, **kwargs)
    call.end()
    return result


class _Call:
    """Of one call of an operator, what becomes of the tensors that it saves."""

    def __init__(
        self,
        segments: tuple[SegmentRun, ...],
        execution: Execution,
        operator: str,
        gathered: tuple[Tensor, ...],
        arguments: Sequence[Any],
    ) -> None:
        reads = execution.recomputed[operator]
        runs = {run.program.number: run for run in segments}
        self.operator = operator
        self.own = None if reads.own is None else runs[reads.own]
        tensors = [leaf for leaf in arguments if isinstance(leaf, Tensor)]
        self.given: list[tuple[Tensor, str, SegmentRun | None]] = [
            (tensor, name, None if number is None else runs[number])
            for tensor, (name, number) in zip(tensors, reads.given, strict=True)
        ]
        self.place = 0
        edges = execution.regathered.get(operator, ())
        self.group = _Gathered(execution, edges, gathered) if gathered else None
        if self.own is not None:
            if self.group is not None:
                self.own.gathered[operator] = self.group
            for tensor, name, segment in self.given:
                if segment is None:
                    self.own.keep(name, tensor)

    def pack(self, tensor: Tensor) -> Tensor | _OfParameter | _Missing:
        place = self.place
        self.place += 1
        if self.group is not None:
            packed = self.group.pack(tensor)
            if not isinstance(packed, Tensor):
                return packed
        same = [given for given in self.given if _share_memory(given[0], tensor)]
        for _, name, segment in sorted(same, key=lambda given: given[2] is not None):
            return tensor if segment is None else segment.without(name, view=_View.of(tensor))
        if self.own is not None:
            return self.own.without(self.operator, place)
        return tensor.detach()  # a result would keep alive what made it, which keeps this

    def unpack(self, packed: Tensor | _OfParameter | _Missing) -> Tensor:
        if isinstance(packed, _Missing):
            return packed.found()
        if isinstance(packed, _OfParameter):
            assert self.group is not None
            if self.own is not None:
                self.own.run_again()  # which gathers it as well, once for both
            return self.group.unpack(packed)
        return packed

    def end(self) -> None:
        """Autograd holds on to both hooks until the backward: keep no tensor alive with them."""
        self.given = []
        if self.group is not None:
            self.group.gathered = ()


class _Again:
    """A segment while it is run again, node by node."""

    def __init__(self, run: SegmentRun, wanted: dict[tuple[str, int], list[_Missing]]) -> None:
        self.segment, self.wanted = run, wanted
        self.values: dict[fx.Node, Any] = {}
        self.given: dict[str, Any] = {
            "segment": run,
            "execution": run.execution,
            "spmd": run.execution.communicator,
            **run.kept,
        }

    def run(self) -> None:
        nodes = [node for node in self.segment.program.graph.nodes if node.op != "output"]
        last = _last_reads(nodes)
        for node in nodes:
            name = node.meta["name"]
            value = self.given[name] if node.op == "placeholder" else self._called(node)
            for missing in self.wanted.get((name, _VALUE), ()):
                assert missing.view is not None
                missing.value = missing.view.on(value.detach())
            self.values[node] = value
            del value
            for read in last.get(node, ()):
                del self.values[read]

    def _called(self, node: fx.Node) -> Any:
        """As in the forward, so that autograd saves the same in the same order."""
        args: Any = fx.node.map_arg(node.args, self.values.__getitem__)
        kwargs: Any = fx.node.map_arg(node.kwargs, self.values.__getitem__)
        operator, places = node.meta.get("operator", ""), count()

        def pack(tensor: Tensor) -> None:
            for missing in self.wanted.get((operator, next(places)), ()):
                missing.value = tensor.detach()

        with torch.enable_grad(), saved_tensors_hooks(pack, _never):
            result = _callable(node, self.segment.program.modules)(*args, **kwargs)
        if isinstance(result, Tensor):
            return _alone(result, result.requires_grad)
        return [_alone(tensor, tensor.requires_grad) for tensor in result]


def _last_reads(nodes: Sequence[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """By node, whose values nobody reads after it."""
    last: dict[fx.Node, list[fx.Node]] = {}
    seen: set[fx.Node] = set()
    for node in reversed(nodes):
        for read in (node, *node.all_input_nodes):
            if read not in seen:
                seen.add(read)
                last.setdefault(node, []).append(read)
    return last


def _callable(node: fx.Node, modules: nn.Module) -> Callable[..., Any]:
    if node.op == "call_module":
        return modules.get_submodule(str(node.target))
    if node.op == "call_method":
        name = str(node.target)
        return lambda of, *args, **kwargs: getattr(of, name)(*args, **kwargs)
    assert callable(node.target)
    return node.target


def _never(packed: object) -> Tensor:
    raise AssertionError("what is run again has no backward of its own")


def gathered_again(segment: SegmentRun, operator: str, index: int) -> Tensor:
    """A gathered parameter for an operator that is run again; if the operator saves it, it stays
    for its backward."""
    group = segment.gathered[operator]
    return _alone(group.gather(index), group.edges[index].trainable)


__all__ = [
    "Reads",
    "SegmentProgram",
    "SegmentRun",
    "begin_segment",
    "gathered_again",
    "gathered_parameter",
    "recomputing",
    "regathering",
]
