"""Stages of a traced model that are to be chosen: its units, priced as stages of their own.

They are priced by the price list of whole plans, so what is found is what would be evaluated, but
for what depends on neighbours: what stages hand on to each other in place, and parameters or
tensors without a gradient that several units of a stage read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

from autopar.ir.graph import OperatorGraph
from autopar.ir.schedule import Schedule
from autopar.ir.sharding import Mesh, Sharding, pieces
from autopar.ir.strategy import Strategy, Training
from autopar.schedules import SCHEDULES
from autopar.simulator.listing import Structure
from autopar.simulator.machine_links import MachineLinks, exchange_s
from autopar.simulator.microbatches import Division
from autopar.simulator.pipeline import StageCost, StageMemory
from autopar.simulator.pipelines import PricedStage, StagePrices, summed_bytes
from autopar.simulator.recompute_choices import KINDS, BlockChoices
from autopar.simulator.stage_problem import (
    Alternative,
    Layout,
    Pool,
    StageProblem,
    Staging,
    Unit,
    groups_of_staging,
    played,
)
from autopar.simulator.staged import staged
from autopar.simulator.stages import Cutting, StagePart
from cost_models.interface import Collective, CostModel

NOT_RECOMPUTED = "none"


@dataclass(eq=False)
class TracedStages:
    """A traced model as a ``StageProblem``, and the way back from a staging to a strategy.

    ``laid``: for each number of microbatches, strategies of one stage, whose mesh, splits and
    storages a stage may have. ``units``: positions of operators that stay together. ``recompute``:
    what a unit may do of ``recompute_choices.KINDS``.
    """

    structure: Callable[[int], tuple[Division, Structure]]
    units: tuple[range, ...]
    cost_model: CostModel
    memory_limit_bytes: int
    laid: Mapping[int, Sequence[Strategy]]
    prices: StagePrices
    training: Training = Training()
    recompute: tuple[str, ...] = (NOT_RECOMPUTED,)
    schedules: tuple[Schedule, ...] = tuple(SCHEDULES.values())
    _priced: dict[int, _Priced] = field(default_factory=dict)

    @cached_property
    def problem(self) -> StageProblem:
        machine = self.cost_model
        return StageProblem(
            units=lambda m: self._at(m).units,
            microbatches=tuple(sorted(self.laid)),
            pools=(Pool(machine.devices, self.memory_limit_bytes),),
            network=partial(MachineLinks, machine),
            exchange_s=partial(exchange_s, machine),
            schedules=self.schedules,
            norm_s=self._norm_s,
            shared=tuple(self._shared()),
            all_devices=True,
        )

    def within(self, memory_limit_bytes: int) -> TracedStages:
        """The same with less memory; nothing is priced again."""
        return replace(self, memory_limit_bytes=memory_limit_bytes)

    def strategy(self, staging: Staging) -> Strategy:
        """What the staging chooses, operator by operator."""
        at = self._at(staging.microbatches)
        devices = groups_of_staging(self.problem, staging, at.units)
        names = [operator.name for operator in at.graph.operators]
        stages, like = [], []
        for choice in staging.stages:
            stages.append([names[i] for u in choice.units for i in self.units[u]])
            chosen = at.like[choice.layout]
            again = (
                at.recomputed[u, at.units[u].alternatives[a]]
                for u, a in zip(choice.units, choice.alternatives, strict=True)
            )
            like.append(replace(chosen, recompute=tuple(n for of_unit in again for n in of_unit)))
        return staged(
            at.graph,
            stages,
            like,
            staging.schedule.name,
            staging.microbatches,
            chunks=None if staging.schedule.copies else staging.chunks,
            devices=devices,
        )

    def peak_bytes(self, staging: Staging) -> int:
        """Of the fullest row, as the units say."""
        timeline = played(self.problem, staging, self.problem.units(staging.microbatches))
        assert timeline is not None
        return max(memory.total_bytes for memory in timeline.memories())

    def _at(self, m: int) -> _Priced:
        if m not in self._priced:
            division, structure = self.structure(m)
            self._priced[m] = _Priced(self, division, structure, self.laid[m])
        return self._priced[m]

    @property
    def _graph(self) -> OperatorGraph:
        return self.structure(min(self.laid))[0].whole

    @property
    def _norm_s(self) -> float:
        """Sums over all devices: of the loss, and of squares where gradients are clipped."""
        machine = self.cost_model
        sizes = summed_bytes(self._graph, self.training).values()
        if machine.devices == 1:
            return 0.0
        return sum(
            machine.collective_time_s(Collective("all_reduce", size, machine.devices, 1))
            for size in sizes
        )

    def _shared(self) -> Iterator[tuple[tuple[int, ...], int]]:
        graph = self._graph
        home = {
            graph.operators[i].name: u for u, positions in enumerate(self.units) for i in positions
        }
        for parameter in graph.parameters:
            readers = graph.consumers[parameter.name]
            sharing = tuple(sorted({home[operator.name] for operator, _ in readers}))
            if len(sharing) > 1 and parameter.differentiable:
                yield sharing, parameter.spec.bytes


class _Priced:
    """The units of one number of microbatches. ``recomputed``: by unit and alternative, the
    operators that it does not keep."""

    def __init__(
        self,
        stages: TracedStages,
        division: Division,
        structure: Structure,
        laid: Sequence[Strategy],
    ) -> None:
        self.stages, self.division, self.structure = stages, division, structure
        self.graph = division.graph
        self.like: dict[Layout, Strategy] = {}
        self.recomputed: dict[tuple[int, Alternative], tuple[str, ...]] = {}
        self._known: dict[Hashable, list[tuple[Alternative, tuple[int, ...]]]] = {}
        self._tuples: dict[tuple[int, ...], tuple[Alternative, ...]] = {}
        self._makers = {
            name: u
            for u, positions in enumerate(stages.units)
            for i in positions
            for name in self.graph.operators[i].outputs
        }
        found = [self._laid(number, strategy) for number, strategy in enumerate(laid)]
        by_unit = [[a for of in found for a in of[u]] for u in range(len(stages.units))]
        self.units = tuple(self._unit(u, of_unit) for u, of_unit in enumerate(by_unit))

    def _unit(self, number: int, alternatives: Sequence[Alternative]) -> Unit:
        same = tuple(map(id, alternatives))
        shared = self._tuples.setdefault(same, tuple(alternatives))
        leaving = self._leaving(number)
        return Unit(
            self.graph.operators[self.stages.units[number].start].name,
            shared,
            tuple(sorted({self._makers[name] for name in self._arriving(number)})),
            sum(self.graph.spec(name).bytes for name in leaving),
            bool(leaving),
        )

    def _arriving(self, number: int) -> list[str]:
        """What has a gradient and is made in other units. All else is small, or read at once."""
        return [
            name
            for i in self.stages.units[number]
            for name in self.graph.operators[i].inputs
            if self._makers.get(name, number) != number and self.graph.by_name[name].differentiable
        ]

    def _leaving(self, number: int) -> list[str]:
        return [
            name
            for i in self.stages.units[number]
            for name in self.graph.operators[i].outputs
            if self.graph.by_name[name].differentiable and self._is_read_outside(name, number)
        ]

    def _is_read_outside(self, name: str, number: int) -> bool:
        unit = self.stages.units[number]
        return any(
            self.structure.number[reader.name] not in unit
            for reader, _ in self.graph.consumers[name]
        )

    # ---- one strategy --------------------------------------------------------------------------

    def _laid(self, number: int, like: Strategy) -> list[list[Alternative]]:
        """For each unit its alternatives."""
        units = self.stages.units
        names = self.structure.names
        runs = [[names[i] for i in positions] for positions in units]
        strategy = staged(self.graph, runs, [like] * len(units), "gpipe", self.division.count)
        cutting = Cutting(self.division, strategy)
        keys = [self._key(like, number, positions) for positions in units]
        first: dict[Hashable, int] = {}
        for u, key in enumerate(keys):
            first.setdefault(key, u)
        parts = {key: cutting.part(u) for key, u in first.items()}
        layout = _layout(number, like.mesh, [part.ends for part in parts.values()])
        self.like[layout] = replace(like, recompute=(), repeat_collectives=())
        for key, part in parts.items():
            self._known[key] = list(self._ways(part, layout))
        found = []
        for u, key in enumerate(keys):
            alternatives = []
            for alternative, offsets in self._known[key]:
                positions = units[u]
                again = tuple(names[positions.start + offset] for offset in offsets)
                self.recomputed[u, alternative] = again
                alternatives.append(alternative)
            found.append(alternatives)
        return found

    def _key(self, like: Strategy, number: int, positions: range) -> Hashable:
        """Equal for units that are alike under this strategy."""
        graph, classes = self.graph, self.structure.class_of
        operators = [graph.operators[i] for i in positions]
        kept = [like.storage.get(name) for o in operators for name in o.inputs]
        unit = self._makers[operators[0].outputs[0]]
        read = [self._is_read_outside(name, unit) for o in operators for name in o.outputs]
        return number, tuple(classes[i] for i in positions), tuple(kept), tuple(read)

    def _ways(
        self, part: StagePart, layout: Layout
    ) -> Iterator[tuple[Alternative, tuple[int, ...]]]:
        """The unit kept or recomputed, and the places of the operators that are recomputed."""
        prices = self.stages.prices
        devices = tuple(range(part.mesh.size))
        choices = BlockChoices.of_part(part, prices.costs(part.mesh, devices))
        seen = set()
        for kind in self.stages.recompute:
            offsets = KINDS[kind](choices)
            if offsets in seen:
                continue
            seen.add(offsets)
            names = tuple(part.graph.operators[offset].name for offset in offsets)
            done = replace(part, strategy=replace(part.strategy, recompute=names))
            # what one unit hands on to the next is there once, and counted by the one that made it
            given = frozenset(done.given)
            whole, parted = (
                prices.of(done, devices, parted=p, handed_on=given) for p in (False, True)
            )
            name = "" if kind == NOT_RECOMPUTED else kind
            yield (
                Alternative(layout, _cost(whole, parted), whole.parts.reduction_s, name),
                offsets,
            )


def _cost(whole: PricedStage, parted: PricedStage) -> StageCost:
    """``whole``: with backwards that are one action; ``parted``: that are two."""
    cost, halves = whole.cost, parted.cost
    assert cost.memory is not None and halves.memory is not None
    return replace(
        cost,
        input_gradient_s=halves.input_gradient_s,
        weight_gradient_s=halves.weight_gradient_s,
        memory=_larger(cost.memory, halves.memory),
    )


def _larger(one: StageMemory, other: StageMemory) -> StageMemory:
    return replace(
        one,
        for_weights_bytes=other.for_weights_bytes,
        backward_bytes=max(one.backward_bytes, other.backward_bytes),
        update_bytes=max(one.update_bytes, other.update_bytes),
    )


def _layout(number: int, mesh: Mesh, ends: Sequence[Mapping[str, Sharding]]) -> Layout:
    """``ends``: what departs from units, and how it lies; most are alike."""
    cut = Counter(pieces(of, mesh) for departing in ends for of in departing.values())
    sizes = "x".join(map(str, mesh.sizes))
    return Layout(mesh.size, f"{sizes} #{number}", cut.most_common(1)[0][0])


__all__ = ["TracedStages"]
