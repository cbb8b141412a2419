"""Peak memory of one device: the step is walked as the runtime executes it, operator by operator.

Counted: parameters, gradients and optimizer states as they are stored; what autograd saves, until
the operator that saved it has had its backward; what recomputed segments keep, and make when they
are run again; tensors that are passed on; gradients of
activations; what redistributions allocate; the workspace of operators and of the optimizer. Views
share their base's memory. Left out: the caller's batch, the allocator's rounding and fragmentation,
the framework's and the communication library's own memory.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from types import MappingProxyType
from typing import TypeVar

from autopar.ir.graph import ITEM_BYTES, Operator, OperatorGraph, Role, TensorSpec
from autopar.ir.rule import BoundRule, Split
from autopar.ir.sharding import (
    INVARIANT,
    Mesh,
    Placement,
    Sharding,
    gradient,
    local_elements,
    sharded_dim,
    sharded_parts,
)
from autopar.ir.simulation import Memory
from autopar.ir.strategy import Storage, Strategy, Training
from autopar.simulator.edges import Rules, canonical, parameter_edges, stored_alike
from autopar.simulator.folding import Folded, whole
from autopar.simulator.recomputation import Segment, recomputation
from autopar.simulator.redistribution import Step, forward_collective, reverse, steps
from autopar.simulator.workspace import CAT, passes_gradient_on, update_groups, workspace_bytes

Key = tuple[str, Sharding]
"""A tensor in one of its shardings: a version of it."""

_K = TypeVar("_K", bound=Hashable)

KINDS = ("parameters", "gradients", "optimizer", "activations", "temporaries", "buffers")


def local_bytes(spec: TensorSpec, sharding: Sharding, mesh: Mesh) -> int:
    return local_elements(spec.shape, sharding, mesh) * ITEM_BYTES[spec.dtype]


def optimizer_bytes_per_element(spec: TensorSpec, training: Training) -> int:
    """Optimizer state beside the parameter: moments, and with mixed precision an fp32 copy.

    States have the parameter's dtype in full precision and are fp32 in mixed precision.
    """
    if training.precision == "mixed":
        return 4 * (training.state_tensors + 1)
    return training.state_tensors * ITEM_BYTES[spec.dtype]


def peak_memory(
    graph: OperatorGraph, rules: Rules, strategy: Strategy, folded: Folded | None = None
) -> Memory:
    """Bytes on one device at the worst moment of a step (all ranks are alike).

    ``folded``: as for ``prices.evaluate``.
    """
    return MemoryWalk(folded or whole(graph), graph, rules, strategy).memory()


def saved_bytes(
    graph: OperatorGraph,
    rules: Rules,
    strategy: Strategy,
    folded: Folded | None = None,
    given: Mapping[str, Sharding] = MappingProxyType({}),
    ends: Mapping[str, Sharding] | None = None,
    versions: Versions | None = None,
) -> int:
    """What one microbatch keeps on a device from its forward for its backward. ``given`` and
    ``ends`` as in ``StagePart``, where the graph is that of a stage; ``versions``: if they are
    known."""
    seen = whole(graph) if folded is None else folded
    return MemoryWalk(seen, graph, rules, strategy, given, ends, versions).saved_bytes()


STAYING = ("activations", "gradients")
"""Kinds of which all copies of a block have theirs at once."""


@dataclass(slots=True, eq=False)
class Block:
    """A piece of device memory, and how many need it still; in a folded graph each of ``copies``
    has one."""

    size_bytes: int
    kind: str
    copies: int
    users: int = 1

    @property
    def held_bytes(self) -> int:
        return self.size_bytes * (self.copies if self.kind in STAYING else 1)


@dataclass(frozen=True, slots=True)
class Footprint:
    """What one operator does to memory under one split; equal operators share it.

    ``wanted`` and ``produced``: the shardings of inputs and outputs, with their local bytes.
    ``aliases``: the outputs are views of input 0. ``saved_inputs``, ``saved_outputs`` and
    ``own_bytes`` are kept for the backward. ``passes_on``: inputs whose gradient is the incoming
    one, the same memory.
    """

    wanted: tuple[Sharding, ...]
    wanted_bytes: tuple[int, ...]
    produced: tuple[Sharding, ...]
    produced_bytes: tuple[int, ...]
    aliases: bool
    carries_gradient: bool
    differentiable: tuple[bool, ...]
    saved_inputs: tuple[int, ...]
    saved_outputs: tuple[int, ...]
    own_bytes: int
    forward_bytes: int
    backward_bytes: int
    passes_on: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class _Move:
    """What a redistribution allocates, step by step: bytes to work on, and bytes of the result.

    Steps that allocate nothing are left out.
    """

    steps: tuple[tuple[int, int], ...]

    @property
    def in_place(self) -> bool:
        """Whether the result is the same memory (I to R)."""
        return not self.steps

    @property
    def most_bytes(self) -> int:
        """At once; what is between two steps is freed."""
        befores = (0, *(size for _, size in self.steps))
        return max((b + sum(step) for b, step in zip(befores, self.steps, strict=False)), default=0)


class Versions:
    """In which shardings the tensors of a graph are needed, whatever is kept and recomputed, and
    what each operator does to memory.

    ``given`` and ``ends``: how what comes from elsewhere arrives, and how what is made for
    elsewhere is left (nothing is said: the loss, whole). ``home``: the sharding in which a tensor
    is made, or arrives. ``made``: which versions each operator, and at last the end, is the first
    to want. ``reads``: how often each version is read: by an operator, or to make another of it.
    """

    def __init__(
        self,
        graph: OperatorGraph,
        rules: Rules,
        splits: Mapping[str, Split],
        mesh: Mesh,
        given: Mapping[str, Sharding] = MappingProxyType({}),
        ends: Mapping[str, Sharding] | None = None,
    ) -> None:
        self.graph, self.rules, self.splits, self.mesh = graph, rules, splits, mesh
        whole = (INVARIANT,) * len(mesh.axes)
        self.given, self.ends = given, {graph.loss: whole} if ends is None else ends
        self._footprints: dict[object, Footprint] = {}
        self.footprints = [self._footprint(operator) for operator in graph.operators]
        self.home: dict[str, Sharding] = dict(given)
        self.made: list[list[Key]] = []
        self.reads: Counter[Key] = Counter()
        self._plan()

    def _footprint(self, operator: Operator) -> Footprint:
        bound, split = self.rules[operator.name], self.splits[operator.name]
        differentiable = self.graph.differentiable[operator.name]
        key = (id(bound), split, differentiable)
        found = self._footprints.get(key)
        if found is None:
            found = self._footprints[key] = _footprint(
                operator, bound, split, self.mesh, differentiable
            )
        return found

    def _plan(self) -> None:
        seen: set[Key] = set()
        for operator, footprint in zip(self.graph.operators, self.footprints, strict=True):
            wanted = dict.fromkeys(zip(operator.inputs, footprint.wanted, strict=True))
            self.made.append(self._wanted(wanted, seen))
            self.home.update(zip(operator.outputs, footprint.produced, strict=True))
        whole = (INVARIANT,) * len(self.mesh.axes)
        new_values = ((tensor, whole) for _, tensor in self.graph.mutations)
        by_name = self.graph.by_name
        at_end = [
            (name, canonical(wanted, by_name[name].differentiable))
            for name, wanted in (*self.ends.items(), *new_values)
        ]
        self.made.append(self._wanted(at_end, seen))

    def _wanted(self, versions: Iterable[Key], seen: set[Key]) -> list[Key]:
        """Those of them that nobody has wanted before."""
        made = []
        for key in versions:
            home = self.home.get(key[0])
            if home != key[1] and key not in seen:
                made.append(key)
                seen.add(key)
                if home is not None:
                    self.reads[key[0], home] += 1
            self.reads[key] += 1
        return made


class MemoryWalk:
    """A step in the order in which the runtime executes it, and where the walk stands in it: what
    is alive by kind, blocks by what they hold, and the peak.

    A whole step is ``keep_state``, for each microbatch ``forward`` and ``backward``, and
    ``update``. Who walks otherwise (a stage, action by action) calls these and what they consist
    of, or does some of it in another way: what arrives (``given_bytes``), where the backward begins
    (``seeds``), the backward of an operator, what happens when gradients are reduced. ``copies``:
    for how many the operator stands that the walk is at. ``parameters``: the graph that was folded,
    whose parameters are all kept. ``versions``: if they are known; else ``given`` and ``ends`` are
    as there.
    """

    def __init__(
        self,
        folded: Folded,
        parameters: OperatorGraph,
        rules: Rules,
        strategy: Strategy,
        given: Mapping[str, Sharding] = MappingProxyType({}),
        ends: Mapping[str, Sharding] | None = None,
        versions: Versions | None = None,
    ) -> None:
        graph = folded.graph
        self.graph, self.rules, self.strategy = graph, rules, strategy
        self.parameters = parameters
        self.weights = [folded.weight[operator.name] for operator in graph.operators]
        self.copies = 1
        self.mesh = strategy.mesh
        if versions is None:
            versions = Versions(graph, rules, strategy.splits, strategy.mesh, given, ends)
        self.given, self.ends = versions.given, versions.ends
        self.live = dict.fromkeys(KINDS, 0)
        self.total = 0
        self.peak = 0
        self.at_peak = dict(self.live)
        self.where = "start"
        self.blocks: dict[Key, Block] = {}
        self._moves: dict[object, _Move] = {}
        self.footprints, self.home = versions.footprints, versions.home
        self.made, self.reads = versions.made, versions.reads
        self.again = recomputation(graph, rules, strategy)
        self.edges = {
            (e.parameter, e.target): e
            for e in parameter_edges(graph, rules, strategy, self.again.again)
        }
        self.kept: list[dict[Key, Block]] = []
        self.gathered_again: dict[str, list[Block]] = {}
        self.indices = {o.name: i for i, o in enumerate(graph.operators)}
        self.savers = self._savers()
        self.arrived: dict[Key, Block] = {}
        self.arrivals: list[Block] = []

    def memory(self) -> Memory:
        self.keep_state()
        # in the second microbatch the gradients of the first are there; the others are like it
        for _ in range(min(2, self.strategy.microbatches)):
            self.backward(self.forward())
        self.update()
        kinds = {f"{kind}_bytes": size for kind, size in self.at_peak.items()}
        return Memory(**kinds, at=self.where)

    def saved_bytes(self) -> int:
        self.forward()
        return self.live["activations"]

    # ---- blocks --------------------------------------------------------------------------------

    def mark(self, where: str, extra_bytes: int = 0) -> None:
        """``extra_bytes``: what is there for this moment only. Copies that others stand for lie
        between their neighbours, which are marked."""
        if self.copies == 1 and self.total + extra_bytes > self.peak:
            self.peak = self.total + extra_bytes
            self.at_peak = self.live.copy()
            self.at_peak["temporaries"] += extra_bytes
            self.where = where

    def allocate(self, size_bytes: int, kind: str) -> Block:
        block = Block(size_bytes, kind, self.copies)
        self.total += block.held_bytes
        self.live[kind] += block.held_bytes
        return block

    def release(self, block: Block) -> None:
        block.users -= 1
        if block.users == 0:
            self.total -= block.held_bytes
            self.live[block.kind] -= block.held_bytes

    def relabel(self, block: Block, kind: str) -> None:
        self.total -= block.held_bytes
        self.live[block.kind] -= block.held_bytes
        block.kind = kind
        self.total += block.held_bytes
        self.live[kind] += block.held_bytes

    # ---- redistributions -----------------------------------------------------------------------

    def move_between(
        self, spec: TensorSpec, source: Sharding, target: Sharding, backward: bool
    ) -> _Move:
        key = (spec, source, target, backward)
        found = self._moves.get(key)
        if found is None:
            path = steps(source, target)
            if backward:
                path = tuple(reverse(step) for step in reversed(path))
                source = gradient(target)
            found = self._moves[key] = _path_memory(spec, source, path, self.mesh)
        return found

    def moved(self, block: Block | None, move: _Move, kind: str, where: str) -> Block:
        """The block after the move, whose first step is a use of ``block``; ``None``: of what is
        stored."""
        for staging, size in move.steps:
            self.mark(where, staging + size)
            after = self.allocate(size, kind)
            if block is not None:
                self.release(block)
            block = after
        assert block is not None
        return block

    # ---- forward -------------------------------------------------------------------------------

    def keep_state(self) -> None:
        """What is there from step to step: parameters, optimizer states, buffers, constants."""
        training = self.strategy.training
        for tensor, storage, count in stored_alike(self.parameters, self.strategy):
            size = local_bytes(tensor.spec, storage.parameter, self.mesh)
            self.allocate(size * count, "parameters")
            if tensor.differentiable:
                elements = local_elements(tensor.spec.shape, storage.optimizer, self.mesh)
                size = elements * optimizer_bytes_per_element(tensor.spec, training)
                size += _moved_piece_bytes(tensor.spec, storage, self)
                self.allocate(size * count, "optimizer")
        for role in (Role.BUFFER, Role.CONSTANT):
            for tensor in self.graph.of_role(role):
                self.allocate(tensor.spec.bytes, "parameters")

    def forward(self) -> list[list[Block]]:
        """What each operator saved."""
        saved = []
        self.kept = [{} for _ in self.again.segments]
        for key in list(self.blocks):
            self.forget(key)  # what the last microbatch returned
        for name, sharding in self.given.items():
            size = self.given_bytes(name, sharding)
            block = self.blocks[name, sharding] = self.allocate(size, "activations")
            block.users += 1  # who gave it keeps it for the backward
            self.arrivals.append(block)
        blocks, reads = self.blocks, self.reads.copy()
        for operator, footprint, made, weight in zip(
            self.graph.operators, self.footprints, self.made, self.weights, strict=False
        ):
            self.copies = weight
            for key in made:
                self._make(key, operator.name, reads)
            versions = list(zip(operator.inputs, footprint.wanted, strict=True))
            base = blocks.get(versions[0]) if versions and footprint.aliases else None
            for name, home, size in zip(
                operator.outputs, footprint.produced, footprint.produced_bytes, strict=True
            ):
                if not footprint.aliases:
                    blocks[name, home] = self.allocate(size, "temporaries")
                elif base is not None:
                    base.users += 1
                    blocks[name, home] = base
            saved.append(self._save(operator, footprint))
            dropped = footprint.own_bytes if operator.name in self.again.recomputed else 0
            self.mark(f"{operator.name} forward", footprint.forward_bytes + dropped)
            for key in dict.fromkeys(versions):
                self._read(key, reads)
            for key in zip(operator.outputs, footprint.produced, strict=True):
                if not reads[key]:
                    self.forget(key)
        self.copies = 1
        for key in self.made[-1]:
            self._make(key, "end of the forward", reads)
        return saved

    def given_bytes(self, name: str, sharding: Sharding) -> int:
        """What arrives takes of this device's memory."""
        return local_bytes(self.graph.spec(name), sharding, self.mesh)

    def _make(self, key: Key, operator: str, reads: Counter[Key]) -> None:
        """Have a version: a part of an input, a gathered parameter, a redistributed activation."""
        name, target = key
        tensor = self.graph.by_name[name]
        where = f"{name} for {operator}"
        home = self.home.get(name)
        if home is not None:
            move = self.move_between(tensor.spec, home, target, False)
            block = self.blocks.get((name, home))
            if block is not None:
                block.users += 1
            self._read((name, home), reads)
            if block is not None or not move.in_place:
                self.blocks[key] = self.moved(block, move, "buffers", where)
            return
        stored = (
            self.strategy.storage[name].parameter
            if tensor.role is Role.PARAMETER
            else (INVARIANT,) * len(target)
        )
        move = self.move_between(tensor.spec, stored, target, False)
        if not move.in_place:
            kind = "buffers" if tensor.role is Role.PARAMETER else "temporaries"
            self.blocks[key] = self.moved(None, move, kind, where)

    def _save(self, operator: Operator, footprint: Footprint) -> list[Block]:
        """Hold what autograd keeps, and what segments are run again from. Gathered parameters are
        not kept but gathered again, recomputed tensors made again."""
        held: list[Block] = []
        recomputed = operator.name in self.again.recomputed
        if footprint.own_bytes and not recomputed:
            held.append(self.allocate(footprint.own_bytes, "activations"))
        for index in footprint.saved_inputs:
            key = operator.inputs[index], footprint.wanted[index]
            edge = self.edges.get(key)
            if key not in self.again.segment_of and (edge is None or not edge.gathers):
                self.hold(key, held)
        for index in footprint.saved_outputs:
            if not recomputed:
                self.hold((operator.outputs[index], footprint.produced[index]), held)
        number = self.again.again.get(operator.name)
        if number is not None:
            for key in dict.fromkeys(zip(operator.inputs, footprint.wanted, strict=True)):
                if key in self.again.segments[number].kept and key not in self.kept[number]:
                    self.kept[number].update((key, block) for block in self._held(key))
        return held

    def hold(self, key: Key, held: list[Block]) -> None:
        """Keep a version beside who has it, in ``held``."""
        held += self._held(key)

    def _held(self, key: Key) -> Iterator[Block]:
        """The block of a version, kept by one more; none where it is stored anyway."""
        block = self.blocks.get(key)
        if block is not None:
            if block.kind != "activations":
                self.relabel(block, "activations")
            block.users += 1
            yield block

    def _savers(self) -> dict[Key, list[int]]:
        """By version that is made again, the operators that save it."""
        found: defaultdict[Key, list[int]] = defaultdict(list)
        for index, footprint in enumerate(self.footprints):
            inputs = self.graph.operators[index].inputs
            for key in {(inputs[i], footprint.wanted[i]) for i in footprint.saved_inputs}:
                if key in self.again.segment_of:
                    found[key].append(index)
        return dict(found)

    def _read(self, key: Key, reads: Counter[Key]) -> None:
        reads[key] -= 1
        if not reads[key]:
            self.forget(key)

    def forget(self, key: Key) -> None:
        """The forward needs a version no more."""
        block = self.blocks.pop(key, None)
        if block is not None:
            self.release(block)

    # ---- backward ------------------------------------------------------------------------------

    def backward(self, saved: list[list[Block]]) -> dict[Key, Block]:
        """In the exact reverse of the forward, redistributions included; what is left are the
        gradients of what was given."""
        gradients = self.seeds()
        self.move_back(self.made[-1], gradients)
        for index in range(len(self.footprints) - 1, -1, -1):
            operator, footprint = self.graph.operators[index], self.footprints[index]
            self.copies = self.weights[index]
            if footprint.carries_gradient:
                for number in self.again.before.get(operator.name, ()):
                    self._run_again(number, saved)
                self.operator_backward(operator, footprint, gradients, saved[index])
            self.move_back(self.made[index], gradients)
        self.copies = 1
        return gradients

    def seeds(self) -> dict[Key, Block]:
        """Where the backward begins."""
        whole = (INVARIANT,) * len(self.mesh.axes)
        size = self.graph.spec(self.graph.loss).bytes
        return {(self.graph.loss, whole): self.allocate(size, "temporaries")}

    def operator_backward(
        self,
        operator: Operator,
        footprint: Footprint,
        gradients: dict[Key, Block],
        saved: list[Block],
    ) -> None:
        incoming = [
            block
            for key in zip(operator.outputs, footprint.produced, strict=True)
            if (block := gradients.pop(key, None)) is not None
        ]
        where = f"{operator.name} backward"
        gathered = self.gathered_again.pop(operator.name, None)
        saved += self._regathered(operator, footprint, where) if gathered is None else gathered
        outgoing: list[tuple[Key, Block, int]] = []
        by_name = self.graph.by_name
        for key, size, differentiable, passes in zip(
            zip(operator.inputs, footprint.wanted, strict=True),
            footprint.wanted_bytes,
            footprint.differentiable,
            footprint.passes_on,
            strict=True,
        ):
            if not differentiable:
                continue
            if passes and incoming:
                incoming[0].users += 1
                outgoing.append((key, incoming[0], size))
            else:
                kind = "gradients" if by_name[key[0]].role is Role.PARAMETER else "temporaries"
                outgoing.append((key, self.allocate(size, kind), size))
        self.mark(where, footprint.backward_bytes)
        for block in incoming:
            self.release(block)
        for block in saved:
            self.release(block)
        for key, block, size in outgoing:
            self._add(gradients, key, block, where, size)

    def _regathered(self, operator: Operator, footprint: Footprint, where: str) -> list[Block]:
        """Parameters that this backward gathers again."""
        keys = ((operator.inputs[i], footprint.wanted[i]) for i in footprint.saved_inputs)
        return list(self._gathered(dict.fromkeys(keys), where).values())

    def _gathered(self, keys: Iterable[Key], where: str) -> dict[Key, Block]:
        found = {}
        for key in keys:
            edge = self.edges.get(key)
            if edge is not None and edge.gathers:
                move = self.move_between(edge.spec, edge.storage.parameter, edge.target, False)
                found[key] = self.moved(None, move, "buffers", where)
        return found

    # ---- recomputation -------------------------------------------------------------------------

    def _run_again(self, number: int, saved: list[list[Block]]) -> None:
        """Make again what a segment did not keep. It stays for those that save it until their
        backward; the rest goes when it was read, and what was kept for this goes in the end."""
        segment = self.again.segments[number]
        remade, run_again = dict(segment.remade), set(segment.again)
        made: dict[Key, Block] = dict(self.kept[number])
        reads = self._reads_of(segment)
        for index in self._steps_of(segment):
            for key in self.made[index]:
                if key in remade:
                    self._redistribute_again(key, (key[0], remade[key]), made, reads, saved)
            if self.graph.operators[index].name in run_again:
                self._operator_again(index, made, reads, saved)
        for block in self.kept[number].values():
            self.release(block)
        self.kept[number] = {}

    def _steps_of(self, segment: Segment) -> list[int]:
        """The operators that are run again, or first want a version that is made again."""
        remade = {version for version, _ in segment.remade}
        run_again = {self.indices[name] for name in segment.again}
        wanting = {i for i, made in enumerate(self.made[:-1]) if not remade.isdisjoint(made)}
        return sorted(run_again | wanting)

    def _reads_of(self, segment: Segment) -> Counter[Key]:
        """How often what a segment makes is read while it is run again."""
        reads: Counter[Key] = Counter((name, home) for (name, _), home in segment.remade)
        for name in segment.again:
            index = self.indices[name]
            inputs = self.graph.operators[index].inputs
            reads.update(set(zip(inputs, self.footprints[index].wanted, strict=True)))
        return reads

    def _redistribute_again(
        self,
        key: Key,
        source: Key,
        made: dict[Key, Block],
        reads: Counter[Key],
        saved: list[list[Block]],
    ) -> None:
        move = self.move_between(self.graph.spec(key[0]), source[1], key[1], False)
        block = made.get(source)
        if block is not None:
            block.users += 1
        self._read_again(source, made, reads)
        if block is not None or not move.in_place:
            block = self.moved(block, move, "temporaries", f"{key[0]} again")
            self._remade(key, block, made, reads, saved)

    def _operator_again(
        self,
        index: int,
        made: dict[Key, Block],
        reads: Counter[Key],
        saved: list[list[Block]],
    ) -> None:
        operator, footprint = self.graph.operators[index], self.footprints[index]
        where = f"{operator.name} again"
        versions = dict.fromkeys(zip(operator.inputs, footprint.wanted, strict=True))
        gathered = self._gathered(versions, where)
        base = made.get(next(iter(versions), ("", ()))) if footprint.aliases else None
        outputs = list(zip(operator.outputs, footprint.produced, strict=True))
        new: list[tuple[Key, Block]] = []
        for key, size in zip(outputs, footprint.produced_bytes, strict=True):
            if not footprint.aliases:
                new.append((key, self.allocate(size, "temporaries")))
            elif base is not None:
                base.users += 1
                new.append((key, base))
        if footprint.own_bytes:
            saved[index].append(self.allocate(footprint.own_bytes, "temporaries"))
        self.mark(where, footprint.forward_bytes)
        of_outputs = {outputs[i] for i in footprint.saved_outputs}
        for key, block in new:
            if key in of_outputs:
                block.users += 1
                saved[index].append(block)
            self._remade(key, block, made, reads, saved)
        wanted = {(operator.inputs[i], footprint.wanted[i]) for i in footprint.saved_inputs}
        self.gathered_again[operator.name] = [gathered[key] for key in gathered if key in wanted]
        for key, block in gathered.items():
            if key not in wanted:
                self.release(block)
        for key in versions:
            self._read_again(key, made, reads)

    def _remade(
        self,
        key: Key,
        block: Block,
        made: dict[Key, Block],
        reads: Counter[Key],
        saved: list[list[Block]],
    ) -> None:
        """A version is there again: for those that save it, and while it is read."""
        for index in self.savers.get(key, ()):
            block.users += 1
            saved[index].append(block)
        if reads[key] and key in self.again.segment_of:
            made[key] = block
        else:
            self.release(block)

    def _read_again(self, key: Key, made: dict[Key, Block], reads: Counter[Key]) -> None:
        reads[key] -= 1
        if not reads[key] and key in made and key in self.again.segment_of:
            self.release(made.pop(key))

    def _add(
        self,
        gradients: dict[_K, Block],
        key: _K,
        block: Block,
        where: str,
        size_bytes: int | None = None,
    ) -> None:
        """Gradients of one version are summed as they arrive. ``size_bytes``: of the sum, where a
        gradient may be a part of its block."""
        before = gradients.get(key)
        if before is None:
            gradients[key] = block
            return
        size = before.size_bytes if size_bytes is None else size_bytes
        gradients[key] = self.allocate(size, before.kind)
        self.mark(where)
        self.release(before)
        self.release(block)

    def move_back(self, made: Sequence[Key], gradients: dict[Key, Block]) -> None:
        """The gradients of versions travel to where the tensor was made or is stored."""
        for key in reversed(made):
            block = gradients.pop(key, None)
            if block is None:
                continue
            name, target = key
            tensor = self.graph.by_name[name]
            where = f"{name} gradient"
            if name in self.home:
                home = self.home[name]
                move = self.move_between(tensor.spec, home, target, True)
                self._add(gradients, (name, home), self.moved(block, move, "buffers", where), where)
            elif tensor.role is Role.PARAMETER:
                self._arrive(key, block, where)
            else:
                self.release(block)

    def _arrive(self, key: Key, block: Block, where: str) -> None:
        """A parameter's gradient waits for the step, where those of earlier microbatches are."""
        edge = self.edges[key]
        self.relabel(block, "gradients")
        if edge.per_step:
            self._add(self.arrived, key, block, where)
            return
        move = self.move_between(edge.spec, gradient(edge.target), edge.destination, False)
        block.users += 1
        moved = self.moved(block, move, "gradients", where)
        self._add(self.arrived, key, moved, where)
        self.release(block)  # autograd holds it until all this is done

    # ---- update --------------------------------------------------------------------------------

    def update(self) -> None:
        """Gradients go to the optimizer's shards; then they are scaled or cast, and used, a group
        of parameters at a time."""
        reduced = self.reduce()
        for key in list(self.blocks):
            self.forget(key)
        training = self.strategy.training
        mixed = training.precision == "mixed"
        sizes = {
            p.name: _piece_bytes(self, p.name, mixed)
            for p in self.graph.parameters
            if p.differentiable
        }
        for names in update_groups(sizes):
            pieces = [sizes[name] for name in names if name in reduced]
            clipped = training.clip_norm is not None
            copied = sum(sizes[n] for n in names if n in reduced and (clipped or self.cast(n)))
            self.mark("optimizer step", copied + _update_bytes(pieces, training))
            for name in names:
                self._refresh(name, mixed)

    def cast(self, name: str) -> bool:
        """Whether its gradient has another dtype than the optimizer takes."""
        return self.strategy.training.precision == "mixed"

    def reduce(self) -> dict[str, Block]:
        """Gradients, summed over microbatches, to the optimizer's shards."""
        reduced: dict[str, Block] = {}
        for key, block in self.arrived.items():
            edge, where = self.edges[key], f"{key[0]} reduction"
            self.copies = block.copies
            here = gradient(edge.target) if edge.per_step else edge.destination
            for there in dict.fromkeys((edge.destination, edge.storage.optimizer)):
                if here != there:
                    move = self.move_between(edge.spec, here, there, False)
                    block.users += 1  # the caller's, until the last step
                    moved = self.moved(block, move, "gradients", where)
                    self.release(block)
                    block = moved
                here = there
            self._add(reduced, key[0], block, where)
        self.copies = 1
        return reduced

    def _refresh(self, name: str, mixed: bool) -> None:
        """The updated piece back to the parameter's dtype and storage."""
        storage, spec = self.strategy.storage[name], self.graph.spec(name)
        move = self.move_between(spec, storage.optimizer, storage.parameter, False)
        if not move.in_place:
            cast = local_bytes(spec, storage.optimizer, self.mesh) if mixed else 0
            self.mark(f"{name} update", cast + move.most_bytes)


# ---- what is the same for equal operators ------------------------------------------------------


def _footprint(
    operator: Operator,
    bound: BoundRule,
    split: Split,
    mesh: Mesh,
    differentiable: tuple[tuple[bool, ...], tuple[bool, ...]],
) -> Footprint:
    ins, outs = differentiable
    inputs, outputs = bound.shardings(split)
    wanted = tuple(canonical(s, d) for s, d in zip(inputs, ins, strict=True))
    produced = tuple(canonical(s, d) for s, d in zip(outputs, outs, strict=True))
    wanted_bytes = _each_bytes(bound.input_specs, wanted, mesh)
    produced_bytes = _each_bytes(bound.output_specs, produced, mesh)
    carries = any(outs)
    saved = [
        s for s in bound.rule.saves if carries and (not s.needs or any(ins[i] for i in s.needs))
    ]
    sizes = bound.local_sizes(split, mesh)
    forward, backward = workspace_bytes(operator, bound, sizes, ins, wanted_bytes, produced_bytes)
    return Footprint(
        wanted=wanted,
        wanted_bytes=wanted_bytes,
        produced=produced,
        produced_bytes=produced_bytes,
        aliases=bound.rule.kind == "view",
        carries_gradient=carries,
        differentiable=ins,
        saved_inputs=tuple(int(s.what[6:]) for s in saved if s.what.startswith("input ")),
        saved_outputs=tuple(int(s.what[7:]) for s in saved if s.what.startswith("output ")),
        own_bytes=sum(
            _points(s.what, sizes) * ITEM_BYTES[s.dtype or bound.output_specs[0].dtype]
            for s in saved
            if not s.what.startswith(("input ", "output "))
        ),
        forward_bytes=forward,
        backward_bytes=backward,
        passes_on=tuple(
            passes_gradient_on(operator, bound, i)
            and (size == produced_bytes[0] or operator.op == CAT)
            for i, size in enumerate(wanted_bytes)
        ),
    )


def _each_bytes(
    specs: Sequence[TensorSpec], shardings: Sequence[Sharding], mesh: Mesh
) -> tuple[int, ...]:
    return tuple(local_bytes(*pair, mesh) for pair in zip(specs, shardings, strict=True))


def _points(factors: str, sizes: dict[str, int]) -> int:
    """How many elements a tensor over these factors has; ``...`` are all leading ones."""
    names = factors.split()
    return prod(
        size
        for factor, size in sizes.items()
        if factor in names or ("..." in names and factor.startswith("..."))
    )


# ---- what a redistribution allocates -----------------------------------------------------------


def _path_memory(spec: TensorSpec, source: Sharding, path: Sequence[Step], mesh: Mesh) -> _Move:
    current = list(source)
    size = local_bytes(spec, source, mesh)
    found = []
    for step in path:
        before = size
        current[step.axis] = step.target
        size = local_bytes(spec, tuple(current), mesh)
        if forward_collective(step) is not None or step.target[0] in "SP":
            found.append((_staging_bytes(step, before, size), size))
    return _Move(tuple(found))


def _staging_bytes(step: Step, before: int, after: int) -> int:
    """Collectives work on rows of dim 0: along another dim, or where a dim has parts, the pieces
    are put together before or after."""
    cut, joined = _is_scattered(step.target), _is_scattered(step.source)
    match forward_collective(step):
        case "all_gather":
            return after if joined else 0
        case "reduce_scatter":
            return before if cut else 0
        case "all_to_all":
            return (before if cut else 0) + (before if joined else 0)
        case _:
            in_parts = sharded_parts(step.target), sharded_parts(step.source)
            return before if in_parts[0] else after if in_parts[1] else 0


def _is_scattered(placement: Placement) -> bool:
    """Whether a rank's share is not one run of rows."""
    return bool(sharded_dim(placement) or sharded_parts(placement))


# ---- parameters --------------------------------------------------------------------------------


def _piece_bytes(walk: MemoryWalk, name: str, mixed: bool) -> int:
    """What the optimizer updates of a parameter."""
    spec, storage = walk.graph.spec(name), walk.strategy.storage[name]
    elements = local_elements(spec.shape, storage.optimizer, walk.mesh)
    return elements * (4 if mixed else ITEM_BYTES[spec.dtype])


def _update_bytes(pieces: Sequence[int], training: Training) -> int:
    """Adam makes a denominator and the square root in it, parameter by parameter, and lets go of a
    denominator when it has the next."""
    if not training.optimizer.startswith("adam"):
        return 0
    return max((2 * b + a for a, b in pairwise((0, *pieces))), default=0)


def _moved_piece_bytes(spec: TensorSpec, storage: Storage, walk: MemoryWalk) -> int:
    """The optimizer's shard is a view of the parameter's, unless its pieces lie elsewhere or are
    put together from the parts of a dim."""
    if walk.strategy.training.precision == "mixed":
        return 0  # the master copy is a part of the state
    path = steps(storage.parameter, storage.optimizer)
    moves = any(s.source != INVARIANT or sharded_parts(s.target) for s in path)
    return local_bytes(spec, storage.optimizer, walk.mesh) if moves else 0
