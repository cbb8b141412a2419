"""A profiled graph as a problem of stages, and a staging of it as a strategy and back.

Replicas: an operator that was measured on t devices runs on d times as many, each t of them with a
d-th of a microbatch's samples. Its time is taken to be proportional to its samples; gradients are
all-reduced between replicas at the end of the step, at the price of the cost model; parameters,
gradients and optimizer states are whole in every replica.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

from autopar.errors import PlanMismatchError
from autopar.ir.graph import OperatorGraph
from autopar.ir.profiled_graph import (
    Measured,
    ProfiledOperator,
    global_batch,
    profiled_operators,
)
from autopar.ir.rule import Split
from autopar.ir.sharding import INVARIANT, Mesh, shard
from autopar.ir.simulation import Estimate, Memory
from autopar.ir.strategy import Stage, Storage, Strategy, Training
from autopar.schedules import SCHEDULES
from autopar.simulator.machine_links import MachineLinks, exchange_s
from autopar.simulator.pipeline import StageCost, StageMemory
from autopar.simulator.stage_problem import (
    Alternative,
    Layout,
    Objective,
    Pool,
    StageChoice,
    StageProblem,
    Staging,
    Unit,
    busiest_s,
    groups_of_staging,
)
from autopar.simulator.timeline import Timeline
from cost_models.interface import Collective, CostModel, Work

DATA, TENSOR = "data", "tensor"
RECOMPUTED = "recomputed"


def stage_problem(
    graph: OperatorGraph,
    cost_model: CostModel,
    device: str,
    memory_limit_bytes: int,
    training: Training,
    objective: Objective = "step",
    microbatches: int | None = None,
) -> StageProblem:
    """``device``: the kind that the machine has. ``microbatches``: ``None`` for all divisors of the
    global batch."""
    batch = global_batch(graph)
    counts = (
        tuple(m for m in range(1, batch + 1) if batch % m == 0)
        if microbatches is None
        else (microbatches,)
    )
    return StageProblem(
        units=_units(graph, cost_model, device, training),
        microbatches=counts,
        pools=(Pool(cost_model.devices, memory_limit_bytes),),
        network=partial(MachineLinks, cost_model),
        exchange_s=partial(exchange_s, cost_model),
        objective=objective,
    )


def _units(
    graph: OperatorGraph, cost_model: CostModel, device: str, training: Training
) -> Callable[[int], tuple[Unit, ...]]:
    operators = profiled_operators(graph)
    place = {operator.name: u for u, operator in enumerate(operators)}
    reads = [
        tuple(place[graph.producer[name].name] for name in o.inputs if name in graph.producer)
        for o in graph.operators
    ]
    batch = global_batch(graph)

    @lru_cache(maxsize=None)
    def at(m: int) -> tuple[Unit, ...]:
        made: dict[tuple[object, ...], tuple[Alternative, ...]] = {}
        units = []
        for operator, of in zip(operators, reads, strict=True):
            taken = sum(operators[u].output_bytes for u in of)
            key = (
                operator.samples,
                operator.output_bytes,
                operator.recompute,
                taken,
                operator.measured,
            )
            if key not in made:
                made[key] = tuple(
                    _alternatives(operator, taken, batch // m, cost_model, device, training)
                )
            size = -(-operator.output_bytes * (batch // m) // operator.samples)
            units.append(Unit(operator.name, made[key], of, size))
        return tuple(units)

    return at


def _alternatives(
    operator: ProfiledOperator,
    taken_bytes: int,
    samples: int,
    cost_model: CostModel,
    device: str,
    training: Training,
) -> list[Alternative]:
    """``taken_bytes``: of what it reads, as measured; ``samples``: of a microbatch."""
    found = []
    for measured in _on(operator.measured, device):
        replicas = cost_model.devices // measured.tensor_parallel
        for data in (d for d in range(1, replicas + 1) if samples % d == 0):
            share = samples / data / operator.samples
            for recomputed in (False, True) if operator.recompute else (False,):
                found.append(
                    _alternative(
                        measured, taken_bytes, data, share, recomputed, cost_model, training
                    )
                )
    return found


def _on(measured: tuple[Measured, ...], device: str) -> list[Measured]:
    """For each degree what was measured on this kind of device, else what is for any."""
    found: dict[int, Measured] = {}
    for one in sorted(measured, key=lambda one: one.device == device):
        if one.device in ("", device):
            found[one.tensor_parallel] = one
    return [found[degree] for degree in sorted(found)]


def _alternative(
    measured: Measured,
    taken_bytes: int,
    data: int,
    share: float,
    recomputed: bool,
    cost_model: CostModel,
    training: Training,
) -> Alternative:
    size, states = measured.parameter_bytes, training.state_tensors
    again_s = measured.forward_s * share if recomputed else 0.0
    halves: tuple[float | None, float | None] = (None, None)
    if measured.input_gradient_s is not None and measured.weight_gradient_s is not None:
        halves = (measured.input_gradient_s * share + again_s, measured.weight_gradient_s * share)
    kept = round(measured.activation_bytes * share)
    left = min(kept, round(taken_bytes * share)) if recomputed else kept
    # reads parameter, gradient and states, writes parameter and states
    moved = size * (3 + 2 * states)
    update_s = (
        cost_model.compute_time_s(Work("memory", "float32", 0.0, moved, of=f"update {states}"))
        if size
        else 0.0
    )
    cost = StageCost(
        forward_s=measured.forward_s * share,
        backward_s=measured.backward_s * share + again_s,
        update_s=update_s,
        input_gradient_s=halves[0],
        weight_gradient_s=halves[1],
        memory=StageMemory(
            parameters_bytes=size,
            gradients_bytes=size,
            optimizer_bytes=size * states,
            activations_bytes=left,
            for_weights_bytes=kept,
            backward_bytes=kept - left,
        ),
    )
    exchanged_s = 0.0
    if data > 1 and size:
        exchanged_s = cost_model.collective_time_s(
            Collective("all_reduce", size, data, measured.tensor_parallel)
        )
    degree = measured.tensor_parallel
    layout = Layout(degree * data, f"{DATA} {data} x {TENSOR} {degree}", data)
    return Alternative(layout, cost, exchanged_s, RECOMPUTED if recomputed else "")


# Strategies


def strategy_of(
    graph: OperatorGraph, problem: StageProblem, staging: Staging, training: Training
) -> Strategy:
    units = problem.units(staging.microbatches)
    groups = groups_of_staging(problem, staging, units)
    stages, storage, recompute = [], {}, []
    splits: dict[str, Split] = {}
    for choice, devices in zip(staging.stages, groups, strict=True):
        data = choice.layout.parts
        mesh = Mesh(((DATA, data), (TENSOR, choice.layout.devices // data)))
        names = tuple(units[u].name for u in choice.units)
        stages.append(Stage(names, devices, mesh))
        for unit, place in zip(choice.units, choice.alternatives, strict=True):
            operator = graph.operators[unit]
            splits[operator.name] = ("samples", "work")
            for name in operator.inputs:
                if name not in graph.producer and name not in graph.inputs:
                    lies = (INVARIANT, shard(0) if mesh.sizes[1] > 1 else INVARIANT)
                    storage[name] = Storage(lies, lies, lies)
            if units[unit].alternatives[place].name == RECOMPUTED:
                recompute.append(operator.name)
    return Strategy(
        stages=tuple(stages),
        splits=splits,
        storage=storage,
        microbatches=staging.microbatches,
        recompute=tuple(recompute),
        schedule=staging.schedule.name,
        training=training,
        chunks=staging.chunks,
    )


def staging_of(strategy: Strategy, units: tuple[Unit, ...]) -> Staging:
    """
    Raises:
        PlanMismatchError: an operator cannot be done as the strategy says.
    """
    place = {unit.name: u for u, unit in enumerate(units)}
    if strategy.schedule not in SCHEDULES:
        raise PlanMismatchError(
            f"the plan has the schedule {strategy.schedule}, which is not on the shelf; plan again"
        )
    stages = []
    for stage in strategy.stages:
        data = dict(stage.mesh.axes)[DATA]
        part = tuple(sorted(place[name] for name in stage.operators))
        chosen = [
            _chosen(units[u], stage.mesh.size, data, units[u].name in strategy.recompute)
            for u in part
        ]
        layout = units[part[0]].alternatives[chosen[0]].layout
        stages.append(StageChoice(part, layout, tuple(chosen)))
    schedule = SCHEDULES[strategy.schedule]
    return Staging(strategy.microbatches, schedule, strategy.chunks or 1, tuple(stages))


def _chosen(unit: Unit, devices: int, data: int, recomputed: bool) -> int:
    for i, alternative in enumerate(unit.alternatives):
        layout = alternative.layout
        same = (layout.devices, layout.parts) == (devices, data)
        if same and (alternative.name == RECOMPUTED) == recomputed:
            return i
    raise PlanMismatchError(
        f"the plan does {unit.name} on {devices} devices with {data} replicas"
        f"{', recomputed' if recomputed else ''}, which this machine or profile has no time for; "
        "plan again"
    )


def estimate_of(timeline: Timeline, objective: Objective) -> Estimate:
    """Parts are those of the row that works longest; memory is that of the fullest one."""
    rows = range(len(timeline.rows))
    parts = max((timeline.parts(row) for row in rows), key=lambda p: float(-p.idle_s))
    exchanged_s = max((float(s.time_s) for s in timeline.pipeline.synchronisations), default=0.0)
    memory: Memory = max(timeline.memories(), key=lambda m: m.total_bytes)
    time_s = timeline.step_time_s if objective == "step" else busiest_s(timeline)
    return Estimate(
        step_time_s=float(time_s),
        forward_compute_s=float(parts.forward_s),
        backward_compute_s=float(parts.backward_s),
        forward_communication_s=0.0,
        backward_communication_s=0.0,
        gradient_synchronisation_s=exchanged_s,
        optimizer_s=float(parts.update_s),
        memory=memory,
    )
