"""What a strategy of several stages costs: its stages priced, its rows played, its promise.

Stages that are alike, on devices that lie alike, are priced once; so are rows arranged once. A
search keeps one ``StagePrices`` for all that it tries.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import ceil

from autopar.ir.graph import ITEM_BYTES, OperatorGraph
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import (
    HOLDERS,
    WORLD,
    Estimate,
    Memory,
    PipelineEstimate,
    PromisedCollective,
    RowEstimate,
    Traffic,
)
from autopar.ir.strategy import Strategy, Training
from autopar.simulator.arrangement import Arrangement
from autopar.simulator.costs import ComputeCache, Costs, within_units
from autopar.simulator.critical_path import critical_path
from autopar.simulator.machine_links import MachineLinks
from autopar.simulator.memory import local_bytes
from autopar.simulator.messages import Flow
from autopar.simulator.microbatches import Division
from autopar.simulator.overlap import NOTHING_AT_ONCE, Overlap
from autopar.simulator.pipeline import Instant, Pipeline, StageCost, StageMemory, Synchronisation
from autopar.simulator.reserved import communicators, reserved
from autopar.simulator.row_memory import FeedBytes, RowStates, row_memory, row_states
from autopar.simulator.shared_gradients import SharedGradient, exchange_bytes
from autopar.simulator.sharing import alone
from autopar.simulator.sharing import shared as shared_timeline
from autopar.simulator.stage_memory import StageBytes, stage_bytes
from autopar.simulator.stage_parts import StageParts, stage_parts
from autopar.simulator.stages import Boundary, Pipelined, StagePart, pipelined
from autopar.simulator.timeline import Timeline, play
from cost_models.interface import Collective, CostModel, members_in_units, units_of


@dataclass(frozen=True, slots=True)
class PricedStage:
    """``part`` is one of those that are alike."""

    part: StagePart
    parts: StageParts
    bytes: StageBytes

    @property
    def cost(self) -> StageCost:
        p = self.parts
        input_gradient_s = p.input_compute_s + p.input_communication_s
        weight_gradient_s = p.weight_compute_s + p.weight_communication_s
        return StageCost(
            forward_s=p.forward_compute_s + p.forward_communication_s,
            backward_s=input_gradient_s + weight_gradient_s,
            update_s=p.optimizer_s + p.refresh_s,
            input_gradient_s=input_gradient_s,
            weight_gradient_s=weight_gradient_s,
            memory=_timeline_memory(self.bytes),
            launches_s=p.launches_s,
        )


def _timeline_memory(found: StageBytes) -> StageMemory:
    """As timelines count it: gradients all step long."""
    parameters, _, optimizer, *_ = found.always
    saved, gradients = sum(found.saved), sum(found.gradients)
    moments = {kind: sum(moment.held) for kind, moment in found.moments.items()}
    last = moments.get("B", moments.get("W", 0)) - gradients
    return StageMemory(
        parameters_bytes=parameters,
        gradients_bytes=gradients,
        optimizer_bytes=optimizer,
        activations_bytes=saved,
        for_weights_bytes=sum(found.for_weights),
        forward_bytes=moments["F"] - saved,
        backward_bytes=max(0, max(last, moments.get("I", 0), sum(found.first.held)) - saved),
        update_bytes=max(0, max(moments["R"], moments["U"]) - gradients),
    )


@dataclass(frozen=True)
class GradientExchange:
    """Of one parameter, once a step. ``sums``: by kind of its holders, over the rows that have it;
    ``traffic``: bytes that kinds pass on, by (row, row), those inside a row too."""

    sums: dict[int, PromisedCollective]
    traffic: Counter[tuple[int, int]]
    passing_s: float

    @property
    def time_s(self) -> float:
        return sum(one.time_s for one in self.sums.values()) + self.passing_s


@dataclass
class StagePrices:
    """Prices of stages on a machine, remembered by what the stages are and how their devices lie.

    Only for parts of divisions that live as long.
    """

    cost_model: CostModel
    compute_cache: ComputeCache = field(default_factory=dict)
    overlap: Overlap = NOTHING_AT_ONCE
    _known: dict[Hashable, PricedStage] = field(default_factory=dict)
    _costs: dict[Hashable, Costs] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Each device as if it shared with nobody; timelines say how much they do."""
        self.cost_model = alone(self.cost_model)

    def of(
        self,
        part: StagePart,
        devices: tuple[int, ...],
        *,
        parted: bool = False,
        handed_on: frozenset[str] = frozenset(),
        shared: frozenset[str] = frozenset(),
    ) -> PricedStage:
        """``parted``, ``handed_on`` and ``shared`` as for ``stage_bytes``."""
        place = within_units(units_of(self.cost_model), part.mesh, devices)
        key = (
            part.content,
            part.division.count,  # gradients of all but the first are added
            place,
            parted,
            tuple(name in handed_on for name in part.given),
            tuple(n in shared for o in part.graph.operators for n in o.inputs) if shared else (),
        )
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = PricedStage(
                part,
                stage_parts(
                    part,
                    self.costs(part.mesh, devices),
                    parted=parted,
                    handed_on=handed_on,
                    overlap=self.overlap,
                ),
                stage_bytes(part, parted=parted, handed_on=handed_on, shared=shared),
            )
        return found

    def costs(self, mesh: Mesh, devices: tuple[int, ...]) -> Costs:
        """Prices on a mesh of devices that lie so."""
        key = mesh, within_units(units_of(self.cost_model), mesh, devices)
        if key not in self._costs:
            self._costs[key] = Costs(self.cost_model, mesh, self.compute_cache, devices)
        return self._costs[key]


def summed_bytes(whole: OperatorGraph, training: Training) -> dict[str, int]:
    """What all processes sum once a step, whatever the stages are."""
    sizes = {"loss": ITEM_BYTES[whole.spec(whole.loss).dtype]}
    if training.clip_norm is not None:
        wide = any(p.spec.dtype == "float64" for p in whole.parameters)
        sizes["gradient norm"] = ITEM_BYTES["float64" if wide else "float32"]
    return sizes


def group_sum(
    cost_model: CostModel,
    axis: str,
    size: int,
    reason: str,
    groups: tuple[tuple[int, ...], ...],
) -> PromisedCollective:
    """An all-reduce, once a step, in each of these groups of devices."""
    members, time_s = len(groups[0]), 0.0
    if members > 1:
        stride = max(1, min(groups[0][1] - groups[0][0], cost_model.devices // members))
        within = _members_in_units(groups, units_of(cost_model))
        one = Collective("all_reduce", size, members, stride, within)
        time_s = cost_model.collective_time_s(one)
    return PromisedCollective("all_reduce", "step", axis, size, 1, reason, time_s)


def evaluate_stages(
    division: Division, cost_model: CostModel, strategy: Strategy, prices: StagePrices | None = None
) -> Estimate:
    """Price a strategy of several stages, as ``prices.evaluate`` does one of one.

    Raises:
        AutoparError: what cannot be run so, and why.
    """
    prices = StagePrices(cost_model) if prices is None else prices
    return PricedPipeline(pipelined(division, strategy), prices).estimate()


@dataclass(frozen=True)
class PricedPipeline:
    """Everything that is known of a step before it is run. What is not asked for is not made."""

    plan: Pipelined
    prices: StagePrices = field(repr=False)

    @cached_property
    def stages(self) -> tuple[PricedStage, ...]:
        """Of copies, the one whose devices lie worst."""
        plan = self.plan
        shared: defaultdict[int, set[str]] = defaultdict(set)
        for of in plan.shared:
            for number in of.stages:
                shared[number].add(of.name)
        return tuple(
            max(
                (
                    self.prices.of(
                        part,
                        plan.groups[row],
                        parted=number in plan.parted,
                        handed_on=plan.handed_on.get(number, frozenset()),
                        shared=frozenset(shared[number]),
                    )
                    for row in plan.copies[number]
                ),
                key=lambda priced: priced.cost.forward_s + priced.cost.backward_s,
            )
            for number, part in enumerate(plan.parts)
        )

    @cached_property
    def pipeline(self) -> Pipeline:
        plan = self.plan
        exchanged: defaultdict[tuple[int, ...], float] = defaultdict(float)
        for shared in plan.shared:
            exchanged[shared.stages] += self.exchanges[shared.name].time_s
        reductions = (
            Synchronisation(stages, self._reduction_s(stages)) for stages in _together(plan)
        )
        exchanges = (Synchronisation(stages, time_s) for stages, time_s in exchanged.items())
        costs = tuple(priced.cost for priced in self.stages)
        links = MachineLinks(self.prices.cost_model, plan.groups)
        waits = self.prices.overlap.waits
        return Pipeline(
            stages=tuple(map(self._with_messages, range(len(costs)), costs)) if waits else costs,
            feeds=plan.feeds,
            network=Instant() if waits else links,
            synchronisations=tuple(s for s in (*reductions, *exchanges) if s.time_s > 0),
            norm_s=sum(one.time_s for one in self.sums),
        )

    @cached_property
    def timeline(self) -> Timeline:
        played = play(self.plan.arranged(self.pipeline.wiring), self.pipeline)
        return shared_timeline(
            played, [len(group) for group in self.plan.groups], self.prices.cost_model
        )

    @property
    def step_time_s(self) -> float:
        return float(self.timeline.with_hosts_s)

    def _with_messages(self, stage: int, cost: StageCost) -> StageCost:
        """With what its passes send, which arrives as they end."""
        boundaries = self.plan.boundaries
        there_s = sum(self._message_s(b, backward=False) for b in boundaries if b.source == stage)
        back_s = sum(
            self._message_s(b, backward=True)
            for b in boundaries
            if b.target == stage and b.gradient
        )
        inputs_s = cost.input_gradient_s
        return replace(
            cost,
            forward_s=cost.forward_s + there_s,
            backward_s=cost.backward_s + back_s,
            input_gradient_s=None if inputs_s is None else inputs_s + back_s,
        )

    def _message_s(self, b: Boundary, *, backward: bool) -> float:
        plan = self.plan
        ends = (b.target, b.source) if backward else (b.source, b.target)
        rows = [plan.copies[stage][0] for stage in ends]
        if rows[0] == rows[1]:
            return 0.0
        size, mesh = plan.held_bytes(b, at_source=not backward), plan.parts[ends[0]].mesh
        lies = b.arrives if backward else b.departs
        parts, axis = max(
            (n if p in "IR" else 1, i)
            for i, (p, n) in enumerate(zip(lies, mesh.sizes, strict=True))
        )
        links = MachineLinks(self.prices.cost_model, plan.groups)
        sent_s = links.time_s(ceil(size / parts), rows[0], rows[1])
        if parts == 1:
            return sent_s
        return sent_s + self.prices.costs(mesh, plan.groups[rows[1]]).collective_s(
            "all_gather", axis, size
        )

    # ---- memory --------------------------------------------------------------------------------

    @cached_property
    def memories(self) -> tuple[Memory, ...]:
        """At the peak of each device of each row."""
        plan, feeds = self.plan, [self._feed_bytes(route) for route in self.plan.routes]
        shared: defaultdict[int, list[SharedGradient]] = defaultdict(list)
        for of in plan.shared:
            for row in of.rows:
                shared[row].append(of)
        return tuple(
            reserved(
                row_memory(
                    states,
                    {stage: self._bytes(stage) for stage in states.stages},
                    feeds,
                    [action.stage for action in plan.updates(row)],
                    exchange_bytes(shared[row], row, plan.groups, self._gradient_bytes),
                ),
                self.prices.cost_model,
                self._communicators(row),
            )
            for row, states in enumerate(_states(plan.arranged()))
        )

    def _communicators(self, row: int) -> int:
        """Of the stage of the row whose mesh has most."""
        plan = self.plan
        devices = sum(map(len, plan.groups))
        return max(
            communicators(part.mesh, len(plan.parts), devices)
            for part, rows in zip(plan.parts, plan.copies, strict=True)
            if row in rows
        )

    @cached_property
    def _gradient_bytes(self) -> dict[tuple[str, int], int]:
        """Of shared parameters, as each stage has reduced them."""
        parts = self.plan.parts
        return {
            (of.name, stage): local_bytes(
                parts[stage].graph.spec(of.name),
                parts[stage].kept(of.name).optimizer,
                parts[stage].mesh,
            )
            for of in self.plan.shared
            for kind in of.kinds
            for stage, _ in kind.holders
        }

    def _bytes(self, stage: int) -> StageBytes:
        """With what is copied to be sent, which is kept until the gradient comes back."""
        found, plan = self.stages[stage].bytes, self.plan
        copied = sum(
            self._sent(b).copied_bytes for b in plan.boundaries if b.source == stage and b.gradient
        )
        if not copied:
            return found
        *others, buffers = found.saved
        return replace(found, saved=(*others, buffers + copied))

    def _feed_bytes(self, route: tuple[int, int, bool]) -> FeedBytes:
        plan, boundaries, gradient = self.plan, self.plan.routes[route], route[2]
        arriving = sum(plan.held_bytes(b, at_source=False) for b in boundaries)
        if not gradient:
            copied = sum(self._sent(b).copied_bytes for b in boundaries)
            return FeedBytes(arriving, copied, 0, 0)
        given_back = sum(map(self._given_back_bytes, boundaries))
        returning = sum(plan.held_bytes(b, at_source=True) for b in boundaries)
        return FeedBytes(arriving, 0, returning, given_back)

    def _sent(self, b: Boundary) -> Flow:
        number = list(self.plan.parts[b.source].ends).index(b.tensor)
        strides = self.stages[b.source].bytes.departs[number]
        return self.plan.flow(b, backward=False, strides=strides)

    def _given_back_bytes(self, b: Boundary) -> int:
        """What stays of a gradient until it has arrived: copies, or itself, unless that counts as
        the gradient of another tensor already."""
        number = list(self.plan.parts[b.target].given).index(b.tensor)
        of = self.stages[b.target].bytes
        copied = self.plan.flow(b, backward=True, strides=of.given_back[number]).copied_bytes
        if copied or of.first_given[number] != number:
            return copied
        return self.plan.held_bytes(b, at_source=False)

    # ---- between rows, once a step -------------------------------------------------------------

    @cached_property
    def exchanges(self) -> dict[str, GradientExchange]:
        """By parameter that has several holders."""
        return {of.name: self._exchange(of) for of in self.plan.shared}

    def _exchange(self, of: SharedGradient) -> GradientExchange:
        groups = self.plan.groups
        sums = {}
        for k, kind in enumerate(of.kinds):
            if len(kind.rows) > 1:
                alike = tuple(zip(*(groups[row] for row in kind.rows), strict=True))
                sums[k] = group_sum(
                    self.prices.cost_model, HOLDERS, of.piece_bytes(k), of.name, alike
                )
        traffic: Counter[tuple[int, int]] = Counter()
        busiest: Counter[tuple[bool, int]] = Counter()
        for one in of.sent(groups):
            traffic[one.passing.source_row, one.passing.target_row] += one.bytes
            busiest[True, one.sender] += one.bytes
            busiest[False, one.receiver] += one.bytes
        links = MachineLinks(self.prices.cost_model, groups)
        size = max(busiest.values(), default=0)
        # all kinds send at once, each device its parts one after the other
        passing_s = max((links.time_s(size, *rows) for rows in traffic), default=0.0)
        return GradientExchange(sums, traffic, passing_s)

    @cached_property
    def sums(self) -> tuple[PromisedCollective, ...]:
        """Over all processes: of the loss, and of squares if gradients are clipped by their norm;
        all updates come after them."""
        whole = self.plan.parts[0].division.whole
        everyone = (tuple(device for group in self.plan.groups for device in group),)
        sizes = summed_bytes(whole, self.plan.strategy.training)
        return tuple(
            group_sum(self.prices.cost_model, WORLD, n, what, everyone) for what, n in sizes.items()
        )

    def _reduction_s(self, stages: tuple[int, ...]) -> float:
        """A row reduces the gradients of its stages one after the other, after all backwards."""
        rows = {row for stage in stages for row in self.plan.copies[stage]}
        return max(
            sum(self.stages[s].parts.reduction_s for s in stages if row in self.plan.copies[s])
            for row in rows
        )

    # ---- the estimate --------------------------------------------------------------------------

    def estimate(self) -> Estimate:
        rows = tuple(map(self._row, range(len(self.plan.groups))))
        traffic = Counter(self.timeline.sent_bytes())
        for exchange in self.exchanges.values():
            traffic.update({rows: n for rows, n in exchange.traffic.items() if len(set(rows)) > 1})
        spent = self._on_critical_path()
        return Estimate(
            step_time_s=self.step_time_s,
            forward_compute_s=spent["forward_compute_s"],
            backward_compute_s=spent["backward_compute_s"],
            forward_communication_s=spent["forward_communication_s"],
            backward_communication_s=spent["backward_communication_s"],
            gradient_synchronisation_s=spent["gradient_synchronisation_s"],
            optimizer_s=spent["optimizer_s"],
            memory=max((row.memory for row in rows), key=lambda memory: memory.device_bytes),
            pipeline=PipelineEstimate(
                rows,
                tuple(Traffic(*pair, n) for pair, n in sorted(traffic.items()) if n),
                spent["transfer_s"],
            ),
            launches_s=self.step_time_s - float(self.timeline.step_time_s),
        )

    @cached_property
    def _passes_s(self) -> float:
        return float(self.timeline.passes_s)

    def _row(self, row: int) -> RowEstimate:
        timeline = self.timeline
        forward_s, backward_s, update_s, _ = map(float, timeline.parts(row))
        return RowEstimate(
            devices=self.plan.groups[row],
            stages=tuple(stage for stage, of in enumerate(self.plan.copies) if row in of),
            forward_s=forward_s,
            backward_s=backward_s,
            update_s=update_s,
            idle_s=self.step_time_s - forward_s - backward_s - update_s,
            bubble_s=self._passes_s - forward_s - backward_s,
            most_in_flight=timeline.most_in_flight(row),
            memory=self.memories[row],
            collectives=tuple(self._collectives(row)),
        )

    def _collectives(self, row: int) -> Iterator[PromisedCollective]:
        """By the names of the stage itself, not of the one that was priced for it."""
        plan = self.plan
        microbatches = Counter(a.stage for a in plan.rows[row] if a.kind == "F")
        for stage, times in sorted(microbatches.items()):
            priced = self.stages[stage]
            names = _renamed(priced.part, plan.parts[stage])
            for one in priced.parts.collectives:
                count = one.count * (1 if one.phase == "step" else times)
                yield replace(one, count=count, reason=names.get(one.reason, one.reason))
        for shared in plan.shared:
            for kind, promised in self.exchanges[shared.name].sums.items():
                if row in shared.kinds[kind].rows:
                    yield promised
        yield from self.sums

    def _on_critical_path(self) -> defaultdict[str, float]:
        found: defaultdict[str, float] = defaultdict(float)
        for piece in critical_path(self.timeline):
            length_s = float(piece.end_s - piece.start_s)
            if piece.kind == "send":
                found["transfer_s"] += length_s
            elif piece.kind in ("exchange", "norm"):
                found["gradient_synchronisation_s"] += length_s
            else:
                stage = self.timeline.arrangement.action(piece.task).stage
                for part, share in _shares(self.stages[stage].parts, piece.kind).items():
                    found[part] += share * length_s
        return found


def _shares(parts: StageParts, kind: str) -> dict[str, float]:
    """What an action consists of."""
    found = {
        "F": {
            "forward_compute_s": parts.forward_compute_s,
            "forward_communication_s": parts.forward_communication_s,
        },
        "B": {
            "backward_compute_s": parts.backward_compute_s,
            "backward_communication_s": parts.backward_communication_s,
        },
        "I": {
            "backward_compute_s": parts.input_compute_s,
            "backward_communication_s": parts.input_communication_s,
        },
        "W": {
            "backward_compute_s": parts.weight_compute_s,
            "backward_communication_s": parts.weight_communication_s,
        },
        "U": {
            "optimizer_s": parts.optimizer_s,
            "gradient_synchronisation_s": parts.refresh_s,
        },
    }[kind]
    total = sum(found.values())
    return {part: time_s / total for part, time_s in found.items()} if total else {}


def _renamed(priced: StagePart, part: StagePart) -> Mapping[str, str]:
    """Operators and tensors of a stage that is alike, by their names in the other."""
    if priced is part:
        return {}
    found: dict[str, str] = {}
    for theirs, own in zip(priced.graph.operators, part.graph.operators, strict=True):
        found.update(zip(theirs.inputs, own.inputs, strict=True))
        found.update(zip(theirs.outputs, own.outputs, strict=True))
        found[theirs.name] = own.name
    return found


def _together(plan: Pipelined) -> tuple[tuple[int, ...], ...]:
    """Stages that share a row, or share one with another that does."""
    groups: list[set[int]] = []
    for row in range(len(plan.groups)):
        stages = {stage for stage, rows in enumerate(plan.copies) if row in rows}
        met = [group for group in groups if group & stages]
        groups = [group for group in groups if not group & stages]
        groups.append(stages.union(*met))
    return tuple(tuple(sorted(group)) for group in groups)


@lru_cache(maxsize=1024)
def _members_in_units(
    groups: tuple[tuple[int, ...], ...], units: tuple[int, ...]
) -> tuple[int, ...]:
    return members_in_units(groups, units)


@lru_cache(maxsize=64)
def _states(arrangement: Arrangement) -> tuple[RowStates, ...]:
    return row_states(arrangement)


__all__ = ["PricedPipeline", "PricedStage", "StagePrices", "evaluate_stages", "group_sum"]
