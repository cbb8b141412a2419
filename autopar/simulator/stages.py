"""A strategy of several stages: the graph cut into them, and what goes from one to another.

A tensor that another stage reads **departs** from the mesh of its stage and **arrives** on that of
the reader, in pieces or whole on each device; sums are made before it departs. Each device is sent
the pieces that it will hold, by one of the devices that have them; gradients go back by the same
rule. So meshes may differ in size and shape.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from typing import NamedTuple

from autopar.errors import AutoparError
from autopar.ir.graph import ITEM_BYTES, Operator, OperatorGraph, Role, TensorSpec
from autopar.ir.schedule import Action, Feeds, Rows, Schedule, Shape, homes
from autopar.ir.sharding import (
    INVARIANT,
    Mesh,
    Sharding,
    local_shape,
    pieces,
    sharded_dim,
)
from autopar.ir.strategy import Storage, Strategy
from autopar.schedules import SCHEDULES
from autopar.simulator.arrangement import Arrangement, Route, arrange
from autopar.simulator.edges import canonical, carries_gradient
from autopar.simulator.messages import End, Flow, Message, flow, messages
from autopar.simulator.microbatches import Division
from autopar.simulator.pipeline import Feed, Wiring
from autopar.simulator.recomputation import check_recompute
from autopar.simulator.shared_gradients import SharedGradient, shared_gradient
from autopar.simulator.strides import Strides


@dataclass(frozen=True, slots=True)
class Boundary:
    """``tensor`` is made in stage ``source`` and read in stage ``target``, once a microbatch.

    ``departs``, ``arrives``: how it lies on the meshes of the two. ``gradient``: one goes back, and
    lies as the tensor does, equal on devices that hold equal parts.
    """

    tensor: str
    spec: TensorSpec
    source: int
    target: int
    departs: Sharding
    arrives: Sharding
    gradient: bool


@dataclass(frozen=True)
class StagePart:
    """One stage as a program of its own: its part of the graph, for one microbatch, and of the
    strategy.

    What arrives stands among the graph's inputs, in the shardings ``given``; ``ends`` are the
    tensors that depart, and the loss if it is made here, as they are wanted. ``graph.loss`` is
    empty where it is not. ``returns``: how many gradients come back for what departs.
    """

    division: Division
    strategy: Strategy
    given: dict[str, Sharding] = field(hash=False)
    ends: dict[str, Sharding] = field(hash=False)
    returns: dict[str, int] = field(default_factory=dict, hash=False)

    @property
    def graph(self) -> OperatorGraph:
        return self.division.graph

    @property
    def mesh(self) -> Mesh:
        return self.strategy.mesh

    def kept(self, parameter: str) -> Storage:
        return self.strategy.storage[parameter]

    @cached_property
    def content(self) -> Hashable:
        """The same for stages that are alike: operators, splits, storages, what is recomputed and
        what flows between them, whatever their names are."""
        numbers: dict[str, int] = {}
        by_name, rules, strategy = self.graph.by_name, self.division.rules, self.strategy
        recomputed, repeated = set(strategy.recompute), set(strategy.repeat_collectives)
        operators = []
        for o in self.graph.operators:
            ins = tuple([numbers.setdefault(name, len(numbers)) for name in o.inputs])
            outs = tuple([numbers.setdefault(name, len(numbers)) for name in o.outputs])
            called = (id(rules[o.name]), o.op, o.arguments, o.keywords)
            again = o.name in recomputed, repeated.isdisjoint(o.outputs)
            operators.append((*called, strategy.splits[o.name], again, ins, outs))
        tensors = []
        for name, number in numbers.items():
            tensor = by_name[name]
            kept = strategy.storage.get(name)
            tensors.append((number, tensor.spec, tensor.role, tensor.differentiable, kept))
        unread = [by_name[name] for name in by_name.keys() - numbers.keys()]
        loss = self.graph.loss
        return (
            tuple(operators),
            tuple(tensors),
            tuple(sorted((t.role, t.spec.bytes, t.name in strategy.storage) for t in unread)),
            tuple((numbers.get(name), of) for name, of in self.given.items()),
            tuple(
                (numbers.get(name), of, name == loss, self.returns.get(name, 0))
                for name, of in self.ends.items()
            ),
            tuple((numbers.get(a), numbers.get(b)) for a, b in self.graph.mutations),
            self.mesh,
            strategy.training,
        )


class Move(NamedTuple):
    """A boundary tensor, or with ``backward`` its gradient, goes to the stage that waits for it;
    that may be in the same row."""

    boundary: Boundary
    microbatch: int
    backward: bool
    source_row: int
    target_row: int


@dataclass(frozen=True)
class Pipelined:
    """A strategy whose stages are several, ready to be simulated or run.

    ``rows`` are those of its schedule, ``groups`` the devices of each row. ``routes``: for each
    feed (source, target, whether a gradient goes back) the boundaries it carries.
    """

    strategy: Strategy
    parts: tuple[StagePart, ...]
    boundaries: tuple[Boundary, ...]
    routes: dict[tuple[int, int, bool], tuple[Boundary, ...]] = field(hash=False)
    shape: Shape
    groups: tuple[tuple[int, ...], ...]

    @property
    def rows(self) -> Rows:
        return _rows(self.schedule, self.shape)

    @property
    def schedule(self) -> Schedule:
        assert self.strategy.schedule is not None
        return SCHEDULES[self.strategy.schedule]

    @property
    def world_size(self) -> int:
        return sum(map(len, self.groups))

    def row_of(self, rank: int) -> int:
        return next(row for row, group in enumerate(self.groups) if rank in group)

    def arranged(self, wiring: Wiring | None = None) -> Arrangement:
        """The rows as tasks; made once for all strategies with the same rows and wiring."""
        return _arranged(self.schedule, self.shape, self.wiring if wiring is None else wiring)

    @property
    def wiring(self) -> Wiring:
        return Wiring(len(self.parts), tuple(self.routes))

    @property
    def copies(self) -> tuple[tuple[int, ...], ...]:
        """For each stage, the rows that have it, its home first."""
        return _copies(self.schedule, self.shape)

    @cached_property
    def holders(self) -> dict[str, tuple[tuple[int, int], ...]]:
        """For each parameter, the (stage, row) that hold it, its owner first. With more than one,
        gradients are exchanged."""
        found: dict[str, list[tuple[int, int]]] = {}
        for stage, part in enumerate(self.parts):
            for parameter in part.graph.parameters:
                found.setdefault(parameter.name, []).extend((stage, r) for r in self.copies[stage])
        return {name: tuple(of) for name, of in found.items()}

    @cached_property
    def shared(self) -> tuple[SharedGradient, ...]:
        """How gradients are summed that have several holders; all rows go by this order. What
        nothing reads has none."""
        found = []
        for name, holders in self.holders.items():
            graph = self.parts[holders[0][0]].graph
            tensor = graph.by_name[name]
            if len(holders) > 1 and tensor.differentiable and graph.consumers[name]:
                kept = {
                    (stage, row): (self.parts[stage].kept(name).optimizer, self.parts[stage].mesh)
                    for stage, row in holders
                }
                of, training = tensor.spec, self.strategy.training
                found.append(shared_gradient(name, of.shape, of.dtype, kept, training))
        return tuple(found)

    @cached_property
    def feeds(self) -> tuple[Feed, ...]:
        """As the timeline plays them: ``bytes`` of all messages between two groups of devices."""
        found = []
        for (source, target, gradient), boundaries in self.routes.items():
            there = [self.flow(b, backward=False) for b in boundaries]
            back = [self.flow(b, backward=True) for b in boundaries] if gradient else []
            found.append(
                Feed(
                    source,
                    target,
                    sum(flow.total_bytes for flow in there),
                    sum(flow.total_bytes for flow in back) if gradient else None,
                    gradient,
                    sum(self.held_bytes(b, at_source=True) for b in boundaries),
                    sum(self.held_bytes(b, at_source=False) for b in boundaries),
                    sum(flow.busiest_bytes for flow in there),
                    sum(flow.busiest_bytes for flow in back) if gradient else None,
                )
            )
        return tuple(found)

    def instructions(self, row: int) -> tuple[Action | Move, ...]:
        """What the devices of a row do in a step, up to the updates.

        All rows take their moves from one order of all tasks, in which each comes after all that it
        waits for. So any two devices have the messages between them in the same order, which needs
        no tags; and nobody waits for ever, even if sending waited for the receiver.
        """
        return self._instructions[row]

    @cached_property
    def _instructions(self) -> tuple[tuple[Action | Move, ...], ...]:
        arranged = self.arranged()
        inside: dict[int, list[Move]] = {}
        for sender, _, route in arranged.local:
            inside.setdefault(sender, []).extend(self._moves(arranged.action(sender), route))
        found: list[list[Action | Move]] = [[] for _ in self.groups]
        for task in arranged.order:
            if task < arranged.actions:
                action = arranged.action(task)
                if action.kind != "U":
                    found[arranged.row_of[task]] += [action, *inside.get(task, ())]
            elif task < arranged.actions + arranged.transfers:
                number = task - arranged.actions
                route = arranged.routes[arranged.route_of[number]]
                moves = self._moves(arranged.action(arranged.sender[number]), route)
                found[route.source_row] += moves
                found[route.target_row] += moves
        return tuple(map(tuple, found))

    def updates(self, row: int) -> tuple[Action, ...]:
        """The row's updates, at the end of the step."""
        return tuple(action for action in self.arranged().rows[row] if action.kind == "U")

    @cached_property
    def handed_on(self) -> dict[int, frozenset[str]]:
        """By stage, what another stage of the same row hands on to it in place, always."""
        arranged, feeds = self.arranged(), list(self.routes.values())
        crossing = {route.feed for route in arranged.routes}
        found: dict[int, set[str]] = {}
        for feed in {route.feed for _, _, route in arranged.local} - crossing:
            for b in feeds[feed]:
                sizes = {self.held_bytes(b, at_source=True), self.held_bytes(b, at_source=False)}
                if len(sizes) == 1 and not self.bytes(b, backward=False, together=True):
                    found.setdefault(b.target, set()).add(b.tensor)
        return {stage: frozenset(names) for stage, names in found.items()}

    @property
    def parted(self) -> frozenset[int]:
        """The stages whose backwards are ``I`` and ``W``."""
        return _parted(self.schedule, self.shape)

    def _moves(self, sender: Action, route: Route) -> list[Move]:
        return [
            Move(b, sender.microbatch, route.backward, route.source_row, route.target_row)
            for b in tuple(self.routes.values())[route.feed]
        ]

    def messages(self, boundary: Boundary, backward: bool, together: bool) -> tuple[Message, ...]:
        """``together``: both stages are on the same devices, for this microbatch."""
        return messages(boundary.spec.shape, *self._ends(boundary, backward), together)

    def flow(
        self,
        boundary: Boundary,
        backward: bool,
        together: bool = False,
        strides: Strides | None = None,
    ) -> Flow:
        """``strides``: of what is sent, where they are not those of its dims in order."""
        ends = self._ends(boundary, backward)
        return flow(boundary.spec.shape, ITEM_BYTES[boundary.spec.dtype], *ends, together, strides)

    def bytes(self, boundary: Boundary, backward: bool, together: bool = False) -> int:
        """What goes from device to device."""
        return self.flow(boundary, backward, together).total_bytes

    def held_bytes(self, boundary: Boundary, at_source: bool) -> int:
        """What each device of one side has of it."""
        departs, arrives = self._ends(boundary, False)
        sharding, mesh = departs if at_source else arrives
        elements = prod(local_shape(boundary.spec.shape, sharding, mesh))
        return elements * ITEM_BYTES[boundary.spec.dtype]

    def _ends(self, boundary: Boundary, backward: bool) -> tuple[End, End]:
        departs = boundary.departs, self.parts[boundary.source].mesh
        arrives = boundary.arrives, self.parts[boundary.target].mesh
        return (arrives, departs) if backward else (departs, arrives)


def pipelined(division: Division, strategy: Strategy) -> Pipelined:
    """Cut the graph of one microbatch as the strategy says.

    Raises:
        AutoparError: what cannot be run so, and why.
    """
    _check(division.graph, strategy)
    cutting = Cutting(division, strategy)
    parts = tuple(cutting.part(stage) for stage in range(len(strategy.stages)))
    boundaries = tuple(cutting.boundaries)
    routes: dict[tuple[int, int, bool], tuple[Boundary, ...]] = {}
    for boundary in boundaries:
        route = boundary.source, boundary.target, boundary.gradient
        routes[route] = (*routes.get(route, ()), boundary)
    feeds = tuple(sorted({(source, target) for source, target, _ in routes}))
    shape = _shape(strategy, feeds)
    groups = _groups(strategy, _rows(SCHEDULES[strategy.schedule or ""], shape))
    return Pipelined(strategy, parts, boundaries, routes, shape, groups)


class Cutting:
    """The stages of a strategy, each as a program of its own; made one by one."""

    def __init__(self, division: Division, strategy: Strategy) -> None:
        self.division, self.strategy = division, strategy
        self.graph, self.rules = division.graph, division.rules
        self.stage_of = {
            name: number for number, stage in enumerate(strategy.stages) for name in stage.operators
        }
        self.position = {t.name: i for i, t in enumerate(self.graph.tensors)}
        self.operators: list[list[Operator]] = [[] for _ in strategy.stages]
        for operator in self.graph.operators:
            self.operators[self.stage_of[operator.name]].append(operator)
        self.recomputed = set(strategy.recompute)
        self.boundaries = list(self._boundaries())
        self.mutations = [(self._mutated_in(*pair), pair) for pair in self.graph.mutations]
        self.unread = {p.name for p in self.graph.parameters if not self.graph.consumers[p.name]}

    def _boundaries(self) -> Iterator[Boundary]:
        for operator in self.graph.operators:
            source = self.stage_of[operator.name]
            for name in operator.outputs:
                readers = [reader for reader, _ in self.graph.consumers[name]]
                for target in sorted({self.stage_of[o.name] for o in readers} - {source}):
                    tensor = self.graph.by_name[name]
                    inside = [o for o in readers if self.stage_of[o.name] == target]
                    gradient = tensor.differentiable and any(
                        carries_gradient(self.graph, o) for o in inside
                    )
                    departs = self._departs(operator, name)
                    meshes = [self.strategy.stages[s].mesh.sizes for s in (source, target)]
                    like = departs if meshes[0] == meshes[1] else None
                    arrives = self._arrives(name, target, gradient, like)
                    yield Boundary(name, tensor.spec, source, target, departs, arrives, gradient)

    def _departs(self, operator: Operator, name: str) -> Sharding:
        """As it is made; whole if it is a buffer's new value, too."""
        _, produced = self.rules[operator.name].shardings(self.strategy.splits[operator.name])
        made = _pieces_or_whole(produced[operator.outputs.index(name)])
        if any(name == tensor for _, tensor in self.graph.mutations):
            made = (INVARIANT,) * len(made)
        return canonical(made, self.graph.by_name[name].differentiable)

    def _arrives(
        self, name: str, target: int, gradient: bool, departs: Sharding | None
    ) -> Sharding:
        """In the pieces that all readers want. Where they want different ones, as it ``departs``
        (if the meshes are alike), or in the smallest pieces that one of them wants."""
        wanted = []
        for operator, position in self.graph.consumers[name]:
            if self.stage_of[operator.name] == target:
                split = self.strategy.splits[operator.name]
                inputs, _ = self.rules[operator.name].shardings(split)
                wanted.append(canonical(_pieces_or_whole(inputs[position]), gradient))
        if departs is not None and len(set(wanted)) > 1:
            return canonical(departs, gradient)
        mesh = self.strategy.stages[target].mesh
        return max(wanted, key=lambda sharding: pieces(sharding, mesh))

    def part(self, number: int) -> StagePart:
        stage = self.strategy.stages[number]
        operators = tuple(self.operators[number])
        means = tuple(o.name for o in operators if o.name in self.division.means)
        arriving = {b.tensor: b for b in self.boundaries if b.target == number}
        mutations = tuple(pair for made_in, pair in self.mutations if made_in == number)
        kept = {name for o in operators for name in (*o.inputs, *o.outputs)}
        kept |= {buffer for buffer, _ in mutations}
        if means:  # every rank counts them in the whole batch, before the first microbatch
            kept |= {
                name
                for o in self.division.counting
                for name in o.inputs
                if self.graph.by_name[name].role in (Role.BUFFER, Role.CONSTANT)
            }
        if number == 0:
            kept |= self.unread
        tensors = [self.graph.by_name[name] for name in sorted(kept, key=self.position.__getitem__)]
        graph = replace(
            self.graph,
            tensors=tuple(
                replace(t, role=Role.INPUT, differentiable=arriving[t.name].gradient)
                if t.name in arriving
                else t
                for t in tensors
            ),
            operators=operators,
            loss=self.graph.loss if self._made_in(self.graph.loss) == number else "",
            inputs=(*(name for name in self.graph.inputs if name in kept), *arriving),
            input_keys=("",) * (sum(n in kept for n in self.graph.inputs) + len(arriving)),
            mutations=mutations,
            shared=tuple(pair for pair in self.graph.shared if pair[1] in kept),
            constants=tuple(pair for pair in self.graph.constants if pair[0] in kept),
        )
        strategy = replace(
            self.strategy,
            stages=(stage,),
            splits={o.name: self.strategy.splits[o.name] for o in operators},
            storage={p.name: self.strategy.kept(number, p.name) for p in graph.parameters},
            schedule=None,
            chunks=None,
            recompute=tuple(o.name for o in operators if o.name in self.recomputed),
            repeat_collectives=tuple(
                name
                for o in operators
                for name in o.outputs
                if name in self.strategy.repeat_collectives
            ),
        )
        names = strategy.splits.keys()
        division = replace(
            self.division,
            graph=graph,
            rules={name: self.rules[name] for name in names},
            choices={name: self.division.choices[name] for name in names},
            means=means,
            counting=self.division.counting if means else (),
            shares={n: s for n, s in self.division.shares.items() if n in names},
        )
        ends = {b.tensor: b.departs for b in self.boundaries if b.source == number}
        if graph.loss:
            ends[graph.loss] = canonical(
                (INVARIANT,) * len(stage.mesh.axes), graph.by_name[graph.loss].differentiable
            )
        returns = Counter(b.tensor for b in self.boundaries if b.source == number and b.gradient)
        given = {n: b.arrives for n, b in arriving.items()}
        return StagePart(division, strategy, given, ends, dict(returns))

    def _made_in(self, tensor: str) -> int | None:
        producer = self.graph.producer.get(tensor)
        return None if producer is None else self.stage_of[producer.name]

    def _mutated_in(self, buffer: str, tensor: str) -> int:
        made = self._made_in(tensor)
        others = {self.stage_of[o.name] for o, _ in self.graph.consumers[buffer]} - {made}
        if made is None or others:
            where = f"in stage {made}" if made is not None else "outside of all stages"
            raise AutoparError(
                f"the buffer {buffer} gets its new value {where} and is read in stage "
                f"{', '.join(map(str, sorted(others))) or 'none'}; put the operators that read and "
                "write it into one stage"
            )
        return made


def _pieces_or_whole(sharding: Sharding) -> Sharding:
    """As it can be sent: sums are made, and copies are equal."""
    return tuple(p if sharded_dim(p) is not None else INVARIANT for p in sharding)


def _check(graph: OperatorGraph, strategy: Strategy) -> None:
    if strategy.schedule not in SCHEDULES:
        raise AutoparError(
            f"a strategy of {len(strategy.stages)} stages needs a schedule, and it has "
            f"{strategy.schedule or 'none'}; there are {', '.join(SCHEDULES)}"
        )
    _check_operators(graph, strategy)
    check_recompute(graph, strategy)
    parameters = {parameter.name for parameter in graph.parameters}
    for number, stage in enumerate(strategy.stages):
        read = dict.fromkeys(name for o in stage.operators for name in graph.operator[o].inputs)
        _check_storage(strategy, number, [name for name in read if name in parameters])


def _check_storage(strategy: Strategy, number: int, parameters: Sequence[str]) -> None:
    stage = strategy.stages[number]
    axes = len(stage.mesh.axes)
    for name in parameters:
        kept = strategy.kept(number, name)
        if {len(kept.parameter), len(kept.gradient), len(kept.optimizer)} != {axes}:
            raise AutoparError(
                f"the storage of {name} has {len(kept.parameter)} placements, and the mesh of "
                f"stage {number}, which reads it, {axes} axes; stages that share a parameter on "
                "other meshes say in their `storage` how they keep it"
            )
    if unread := sorted(stage.storage.keys() - set(parameters)):
        raise AutoparError(
            f"stage {number} says how it keeps {', '.join(unread[:3])}, which none of its "
            "operators reads; leave that out of its `storage`"
        )


def _check_operators(graph: OperatorGraph, strategy: Strategy) -> None:
    assigned = [name for stage in strategy.stages for name in stage.operators]
    twice = (
        {name for name in assigned if assigned.count(name) > 1}
        if (len(set(assigned)) < len(assigned))
        else set()
    )
    missing = graph.operator.keys() - set(assigned)
    unknown = set(assigned) - graph.operator.keys()
    for names, what in (
        (twice, "in several stages"),
        (missing, "in no stage"),
        (unknown, "not of this graph"),
    ):
        if names:
            raise AutoparError(
                f"operators {', '.join(sorted(names)[:3])} are {what} ({len(names)} in all); each "
                "operator must be in one stage"
            )
    for number, stage in enumerate(strategy.stages):
        if not stage.operators:
            raise AutoparError(
                f"stage {number} of {len(strategy.stages)} has no operators, and the model has "
                f"{len(graph.operators)}; leave it out, or move some to it"
            )
        if stage.mesh.size != len(stage.devices):
            raise AutoparError(
                f"stage {number} has {len(stage.devices)} devices and a mesh of {stage.mesh.size}"
            )


def _shape(strategy: Strategy, feeds: Feeds) -> Shape:
    schedule = SCHEDULES[strategy.schedule or ""]
    chunks = strategy.chunks
    if chunks is None and not schedule.copies:
        groups = len({stage.devices for stage in strategy.stages})
        chunks = len(strategy.stages) // groups
    return Shape(
        len(strategy.stages),
        strategy.microbatches,
        schedule.chunks if chunks is None else chunks,
        feeds,
    )


@lru_cache(maxsize=64)
def _rows(schedule: Schedule, shape: Shape) -> Rows:
    rows = schedule(shape.stages, shape.microbatches, shape.chunks, shape.feeds)
    early = [str(a) for row in rows for a in row if a.kind == "U" or a.version is not None]
    if early:
        raise AutoparError(
            f"the schedule {schedule.name} updates between microbatches ({early[0]}), which "
            "cannot be run yet; take one that updates at the end of the step"
        )
    return rows


@lru_cache(maxsize=64)
def _copies(schedule: Schedule, shape: Shape) -> tuple[tuple[int, ...], ...]:
    rows = _rows(schedule, shape)
    found = [[home] for home in homes(rows)]
    for r, row in enumerate(rows):
        for stage in sorted({action.stage for action in row}):
            if r != found[stage][0]:
                found[stage].append(r)
    return tuple(map(tuple, found))


@lru_cache(maxsize=64)
def _parted(schedule: Schedule, shape: Shape) -> frozenset[int]:
    return frozenset(a.stage for row in _rows(schedule, shape) for a in row if a.kind == "I")


@lru_cache(maxsize=64)
def _arranged(schedule: Schedule, shape: Shape, wiring: Wiring) -> Arrangement:
    return arrange(_rows(schedule, shape), wiring)


def _groups(strategy: Strategy, rows: Rows) -> tuple[tuple[int, ...], ...]:
    """Each row is done by the devices of the stages that are at home there."""
    found: dict[int, tuple[int, ...]] = {}
    for stage, row in enumerate(homes(rows)):
        devices = strategy.stages[stage].devices
        if found.setdefault(row, devices) != devices:
            raise AutoparError(
                f"the schedule {strategy.schedule} has stage {stage} in row {row}, with stages on "
                f"the devices {list(found[row])}; it is on {list(devices)}. Give all stages of a "
                "row the same devices in the same order"
            )
    groups = tuple(found[row] for row in range(len(rows)))
    used = sorted(device for group in groups for device in group)
    if used != list(range(len(used))):
        raise AutoparError(
            f"the stages are on the devices {used}; groups of devices must not overlap, and "
            f"together they must be 0 to {max(used)}"
        )
    for r, actions in enumerate(rows):
        for stage in {action.stage for action in actions}:
            if strategy.stages[stage].mesh.size != len(groups[r]):
                raise AutoparError(
                    f"row {r} of the schedule {strategy.schedule} has {len(groups[r])} devices and "
                    f"a copy of stage {stage}, whose mesh has "
                    f"{strategy.stages[stage].mesh.size}; give both as many"
                )
    return groups


__all__ = ["Boundary", "Cutting", "Move", "Pipelined", "StagePart", "pipelined"]
