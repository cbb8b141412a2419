"""What the seconds of a step are spent on, by the kinds whose prices may be wrong."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

from autopar.ir.graph import OperatorGraph
from autopar.ir.rule import BoundRule, Split
from autopar.ir.simulation import HOLDERS, WORLD, Estimate, PromisedCollective
from autopar.ir.strategy import Stage, Strategy
from autopar.simulator.costs import Costs, is_free, within_units
from autopar.simulator.edges import Rules, carries_gradient
from cost_models.collectives import members_in_unit
from cost_models.interface import CostModel, Work, units_of

Seconds = Mapping[str, float]
"""By kind, see ``cost_models.bands.KINDS``."""
Spent = defaultdict[str, float]


def seconds_by_kind(
    graph: OperatorGraph,
    rules: Rules,
    cost_model: CostModel,
    strategy: Strategy,
    estimate: Estimate,
) -> Seconds:
    """Of an estimate of ``strategy``; together they are the step, but for ``idle``, which comes on
    top. ``graph`` is that of one microbatch."""
    found = Spent(float)
    compute_s = estimate.forward_compute_s + estimate.backward_compute_s
    spent = computed(graph, rules, cost_model, strategy)
    _divide(found, compute_s, spent, "memory")
    found["launches"] += estimate.launches_s
    moved_s = estimate.forward_communication_s + estimate.backward_communication_s
    farthest = _farthest(cost_model)
    passes, steps = _communicated(cost_model, strategy, estimate)
    _divide(found, moved_s, passes, farthest)
    _divide(found, estimate.gradient_synchronisation_s, steps, farthest)
    found["optimizer"] = estimate.optimizer_s
    if estimate.pipeline is not None:
        found["transfers"] = estimate.pipeline.transfer_s
        found["idle"] = min(row.idle_s for row in estimate.pipeline.rows) - estimate.launches_s
    return {kind: time_s for kind, time_s in found.items() if time_s > 0}


def seconds_of_measured(cost_model: CostModel, estimate: Estimate) -> Seconds:
    """The same of a plan of a profiled graph."""
    compute_s = estimate.forward_compute_s + estimate.backward_compute_s
    left_s = estimate.step_time_s
    found: dict[str, float] = {}
    for kind, time_s in (
        ("measured", compute_s),
        ("optimizer", estimate.optimizer_s),
        (_farthest(cost_model), estimate.gradient_synchronisation_s),
        ("idle", left_s),
    ):
        found[kind] = min(time_s, left_s)
        left_s -= found[kind]
    return {kind: time_s for kind, time_s in found.items() if time_s > 0}


def _farthest(cost_model: CostModel) -> str:
    return "between" if cost_model.scale_up_devices < cost_model.devices else "inside"


def _divide(found: Spent, time_s: float, parts: Mapping[str, float], other: str) -> None:
    """In proportion to the parts; all of it to ``other`` where there are none."""
    total = sum(parts.values())
    if total > 0:
        _add(found, parts, time_s / total)
    else:
        found[other] += time_s


def _add(found: Spent, more: Seconds, times: float = 1.0) -> None:
    for kind, time_s in more.items():
        found[kind] += times * time_s


# Compute


def computed(
    graph: OperatorGraph,
    rules: Rules,
    cost_model: CostModel,
    strategy: Strategy,
) -> Spent:
    """Seconds of one microbatch on one device of each stage, those of what is run again, too."""
    found = Spent(float)
    known: dict[object, tuple[Spent, Spent]] = {}
    costs = {stage.mesh: Costs(cost_model, stage.mesh) for stage in strategy.stages}
    again = frozenset(strategy.recompute)
    for operator in graph.operators:
        bound, split = rules[operator.name], strategy.splits[operator.name]
        mesh = strategy.mesh_of[operator.name]
        if is_free(bound):
            found["launches"] += 2 * costs[mesh].host.view_s
            continue
        wanted = tuple(graph.by_name[name].differentiable for name in operator.inputs)
        if not carries_gradient(graph, operator):
            wanted = (False,) * len(wanted)
        key = (id(bound), split, mesh, wanted)
        if key not in known:
            known[key] = _operator(bound, split, wanted, costs[mesh])
        forward, backward = known[key]
        times = 2.0 if operator.name in again else 1.0
        _add(found, forward, times)
        _add(found, backward)
    found["launches"] += 2 * sum(costs[stage.mesh].host.pass_s for stage in strategy.stages)
    return found


def _operator(
    bound: BoundRule, split: Split, wanted: tuple[bool, ...], costs: Costs
) -> tuple[Spent, Spent]:
    """Forward and backward; what is not the work of its kernels is waiting for their launches."""
    works = costs.work(bound, split, wanted)
    forward, backward = (_works(of, costs.cost_model) for of in works)
    for found, time_s in zip(
        (forward, backward), costs.operator_s(bound, split, wanted), strict=True
    ):
        found["launches"] += max(0.0, time_s - sum(found.values()))
    return forward, backward


def _works(works: Iterable[Work], cost_model: CostModel) -> Spent:
    """What any kernel takes, however small, counts as its launch."""
    found = Spent(float)
    for one in works:
        time_s = cost_model.compute_time_s(one)
        smallest = Work("memory", one.dtype, 0.0, 1.0, follows=one.follows)
        launch_s = min(time_s, cost_model.compute_time_s(smallest))
        found["launches"] += launch_s
        found[one.kind if one.kind in ("attention", "memory") else "products"] += time_s - launch_s
    return found


# Communication


def _communicated(
    cost_model: CostModel, strategy: Strategy, estimate: Estimate
) -> tuple[Spent, Spent]:
    """Seconds of all collectives: of forwards and backwards, and those of once a step."""
    passes = Spent(float)
    steps = Spent(float)
    for stages, promised in _promised(strategy, estimate):
        places = {
            axes: "between" if _leaves_host(axes, stages, cost_model) else "inside"
            for axes in {one.axis for one in promised}
        }
        for one in promised:
            (steps if one.phase == "step" else passes)[places[one.axis]] += one.time_s * one.count
    return passes, steps


def _promised(
    strategy: Strategy, estimate: Estimate
) -> Iterator[tuple[tuple[Stage, ...], tuple[PromisedCollective, ...]]]:
    """Those of each row, with its stages."""
    if estimate.pipeline is None:
        yield strategy.stages, estimate.collectives
        return
    for row in estimate.pipeline.rows:
        yield tuple(strategy.stages[number] for number in row.stages), row.collectives


def _leaves_host(axes: str, stages: tuple[Stage, ...], cost_model: CostModel) -> bool:
    """Whether its groups are not all within one unit of the fastest links."""
    if cost_model.scale_up_devices >= cost_model.devices:
        return False
    if axes in (WORLD, HOLDERS):
        return True
    names = axes.split("+")
    return any(
        name in names and name in dict(stage.mesh.axes) and _axis_leaves(stage, name, cost_model)
        for stage in stages
        for name in stage.mesh.names
    )


def _axis_leaves(stage: Stage, name: str, cost_model: CostModel) -> bool:
    axis = stage.mesh.names.index(name)
    size, stride = stage.mesh.sizes[axis], stage.mesh.strides[axis]
    if stage.mesh.size == cost_model.devices:
        unit = cost_model.scale_up_devices
        return members_in_unit(size, stride, unit, cost_model.devices) < size
    places = within_units(units_of(cost_model), stage.mesh, stage.devices)
    return places[axis][0] < size
