"""Whether a plan of several stages keeps its promise: each different process is dry-run.

Processes that hold alike stages, do alike actions in the same order and send and receive as much
are one: it stands for all of them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from autopar.errors import VerificationError
from autopar.ir.graph import ITEM_BYTES
from autopar.ir.schedule import Action
from autopar.ir.sharding import local_shape
from autopar.ir.simulation import HOLDERS, WORLD, Estimate, RowEstimate
from autopar.ir.strategy import Strategy
from autopar.runtime.batches import Batches
from autopar.runtime.dry_run import (
    DryRun,
    Seen,
    check_rank,
    fake_inputs,
    fake_state,
    fake_world,
    watched,
)
from autopar.runtime.launch import communicators_of
from autopar.runtime.lowering import LoweredProgram, PartedBackward, lower_stage
from autopar.runtime.pipeline import PipelineStep, Trace
from autopar.runtime.recorder import Recorder
from autopar.runtime.repetition import ShortenedRow
from autopar.runtime.shared_gradients import groups_of
from autopar.runtime.step import TrainingStep
from autopar.runtime.typecheck import typecheck as check_types
from autopar.runtime.watch import MemoryWatch, Watch, device_for_dry_runs
from autopar.simulator.messages import Message
from autopar.simulator.microbatches import Division
from autopar.simulator.shared_gradients import Alike
from autopar.simulator.stages import Move, Pipelined, pipelined


@dataclass(frozen=True, kw_only=True)
class RankReport(DryRun):
    """What a dry run of ``rank`` found, which stands for all of ``ranks``.

    ``sent``: (row, row, bytes promised, bytes sent).
    """

    rank: int
    ranks: tuple[int, ...]
    row: int
    stages: tuple[int, ...]
    actions: int
    most_in_flight: int
    sent: tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True)
class StagesReport:
    """``differences`` are sentences; none: the promise is kept."""

    world_size: int
    ranks: tuple[RankReport, ...]
    typechecked: bool
    differences: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.differences

    def to_json(self) -> str:
        ranks = [one.to_data() for one in self.ranks]
        return json.dumps({"ok": self.ok, **asdict(self), "ranks": ranks}, indent=1)


def verify_stages(
    division: Division,
    strategy: Strategy,
    estimate: Estimate,
    *,
    rank: int | None = None,
    typecheck: bool = True,
    progress: Callable[[str], None] | None = None,
) -> StagesReport:
    """``rank``: the only one that is looked at; ``None``: one of each that are alike.

    Raises:
        AutoparError: the process is part of a real process group; the dry run needs its own.
    """
    assert estimate.pipeline is not None
    plan = pipelined(division, strategy)
    if rank is not None:
        check_rank(rank, plan.world_size)
    groups = alike(plan) if rank is None else [(rank,)]
    dry = _DryRuns(plan, division, typecheck)
    found = []
    for ranks in groups:
        if progress is not None:
            stands = f", which stands for {len(ranks)}" if len(ranks) > 1 else ""
            progress(f"dry-running rank {ranks[0]} of {plan.world_size}{stands}")
        row = estimate.pipeline.rows[plan.row_of(ranks[0])]
        found.append(dry.report(ranks, row))
    differences = [f"rank {one.rank}: {text}" for one in found for text in one.differences]
    differences += _traffic_differences(plan, estimate)
    return StagesReport(plan.world_size, tuple(found), typecheck, tuple(differences))


# ---- which ranks are alike -----------------------------------------------------------------------


def alike(plan: Pipelined) -> list[tuple[int, ...]]:
    """All ranks, those together that do the same."""
    found: dict[Hashable, list[int]] = {}
    for row, group in enumerate(plan.groups):
        does = _does(plan, row)
        boundaries = _boundaries(plan, row)
        for place, rank in enumerate(group):
            moved = tuple(
                (
                    sum(m.elements for m in messages if m.sender == place),
                    sum(m.elements for m in messages if m.receiver == place),
                )
                for messages in boundaries
            )
            found.setdefault((does, moved), []).append(rank)
    return [tuple(ranks) for ranks in found.values()]


def _does(plan: Pipelined, row: int) -> Hashable:
    """Stages, actions and messages of a row, whatever their numbers."""
    stages = sorted({action.stage for action in plan.rows[row]})
    place = {stage: i for i, stage in enumerate(stages)}
    sequence: list[Hashable] = []
    for one in (*plan.instructions(row), *plan.updates(row)):
        if isinstance(one, Action):
            sequence.append((place[one.stage], one.kind))
        else:
            b, ways = one.boundary, (one.source_row == row, one.target_row == row)
            ends = place.get(b.source, -1), place.get(b.target, -1)
            sequence.append((ends, ways, one.backward, b.spec, b.departs, b.arrives, b.gradient))
    exchanged = tuple(
        (of.shape, of.item_bytes, tuple(_exchanges(kind, row, place) for kind in of.kinds))
        for of in plan.shared
        if of.kinds_in(row)
    )
    return (
        tuple((plan.parts[stage].content, stage in plan.parted) for stage in stages),
        tuple(sequence),
        exchanged,
    )


def _exchanges(kind: Alike, row: int, place: Mapping[int, int]) -> Hashable:
    """Which stages of a row a gradient is of, with how many rows it is all-reduced."""
    stages = tuple(place[stage] for stage in kind.stages_in(row))
    return stages, len(kind.rows) if stages else 0


def _boundaries(plan: Pipelined, row: int) -> list[tuple[Message, ...]]:
    """Messages of a row; the end that is in another one is -1."""
    moves = (one for one in plan.instructions(row) if isinstance(one, Move))
    kinds = dict.fromkeys(
        (m.boundary, m.backward, m.source_row == row, m.target_row == row) for m in moves
    )
    found = []
    for boundary, backward, sends, receives in kinds:
        messages = plan.messages(boundary, backward, sends and receives)
        found.append(_ends_here(messages, sends, receives))
    for shared in plan.shared:
        for passing in shared.passings:
            sends, receives = passing.source_row == row, passing.target_row == row
            if sends or receives:
                found.append(_ends_here(shared.messages(passing), sends, receives))
    return found


def _ends_here(messages: Iterable[Message], sends: bool, receives: bool) -> tuple[Message, ...]:
    return tuple(
        m._replace(sender=m.sender if sends else -1, receiver=m.receiver if receives else -1)
        for m in messages
    )


# ---- dry runs ------------------------------------------------------------------------------------


class _DryRuns:
    """Stages are lowered once for all ranks that hold them."""

    def __init__(self, plan: Pipelined, division: Division, typecheck: bool) -> None:
        self.plan, self.division, self.typecheck = plan, division, typecheck
        self.mode, self.device = FakeTensorMode(), device_for_dry_runs()
        self.programs: dict[int, LoweredProgram] = {}
        self.typed: set[Hashable] = set()

    def report(self, ranks: tuple[int, ...], row: RowEstimate) -> RankReport:
        rank = ranks[0]
        with fake_world(self.plan.world_size, rank):
            step, seen = self._run(rank)
        trace = step.trace
        sent = tuple(_sent(promised_bytes(self.plan, rank), trace))
        actions = self.plan.arranged().rows[step.row]
        found = seen.against(
            row.collectives,
            row.memory,
            beside=(
                *_sent_differences(sent),
                *_order_differences(actions, row.most_in_flight, trace),
            ),
            least=not set(row.devices) <= set(ranks),
        )
        return RankReport(
            **vars(found),
            rank=rank,
            ranks=ranks,
            row=step.row,
            stages=row.stages,
            actions=len(trace.actions),
            most_in_flight=trace.most_in_flight,
            sent=sent,
        )

    def _run(self, rank: int) -> tuple[PipelineStep, Seen]:
        plan, graph, device = self.plan, self.division.whole, self.device
        communicators = communicators_of(plan, rank, device.type, alone=True)
        groups = groups_of(plan, rank, alone=True)
        with self.mode:
            held = {}
            for stage, communicator in communicators.items():
                part = plan.parts[stage]
                state = fake_state(part.graph, part.strategy, device)
                held[stage] = TrainingStep(self._program(stage), part.strategy, state, communicator)
            inputs = fake_inputs(graph, device)
            batches = Batches(self.division, plan.strategy.training, device)
            step = PipelineStep(plan, rank, held, batches, groups)
            watch = Watch(MemoryWatch(), one_recorder(step))
            row = step.instructions = ShortenedRow(step, watch)
            kept_bytes = watched(step, held.values(), watch, graph, inputs)
            step.trace.actions = list(row.actions())
            mistyped = tuple(self._mistyped(step, inputs)) if self.typecheck else ()
        return step, Seen(watch, kept_bytes, mistyped)

    def _program(self, stage: int) -> LoweredProgram:
        if stage not in self.programs:
            part, parted = self.plan.parts[stage], stage in self.plan.parted
            self.programs[stage] = lower_stage(part, self.device, parted=parted)
        return self.programs[stage]

    def _mistyped(self, step: PipelineStep, inputs: Mapping[str, Tensor]) -> Iterator[str]:
        """Stages that are alike have one type."""
        for stage, of_stage in step.held.items():
            part = self.plan.parts[stage]
            if part.content in self.typed:
                continue
            self.typed.add(part.content)
            given = {}
            for name in part.graph.inputs:
                if name in part.given:
                    spec, sharding = part.graph.spec(name), part.given[name]
                    shape = local_shape(spec.shape, sharding, part.mesh)
                    tensor = torch.empty(
                        shape, dtype=getattr(torch, spec.dtype), device=self.device
                    )
                    wanted = part.graph.by_name[name].differentiable
                    given[name] = tensor.requires_grad_(wanted)
                else:
                    given[name] = step.batches.part(name, inputs[name], 0)
            of_stage.execution.parted = PartedBackward() if stage in self.plan.parted else None
            try:
                check_types(of_stage.program, of_stage.execution, of_stage.state.buffers, given)
            except VerificationError as error:
                yield f"stage {stage}: {error}"


def one_recorder(step: PipelineStep) -> Recorder:
    """For all that a process communicates: the meshes of its stages, and what is beside them."""
    axes: dict[str, str | None] = {}
    for of_stage in step.held.values():
        axes.update(of_stage.communicator.recorder.axis_of_group)
    world = dist.group.WORLD
    assert world is not None
    beside = {str(world.group_name): WORLD}
    beside.update({str(group.group_name): HOLDERS for group in step.groups.values()})
    recorder = Recorder(axes, beside_meshes=beside)
    for of_stage in step.held.values():
        of_stage.communicator.recorder = recorder
    return recorder


# ---- comparing -----------------------------------------------------------------------------------


def promised_bytes(plan: Pipelined, rank: int) -> Counter[tuple[int, int]]:
    """What one process sends in a step, by (row, row)."""
    row = plan.row_of(rank)
    place, found = plan.groups[row].index(rank), Counter[tuple[int, int]]()
    for move in plan.instructions(row):
        if isinstance(move, Move) and move.source_row == row:
            group, item = plan.groups[move.target_row], ITEM_BYTES[move.boundary.spec.dtype]
            together = move.source_row == move.target_row
            for message in plan.messages(move.boundary, move.backward, together):
                if message.sender == place and group[message.receiver] != rank:
                    found[row, move.target_row] += item * message.elements
    for shared in plan.shared:
        for one in shared.sent(plan.groups):
            if one.sender == rank:
                found[row, one.passing.target_row] += one.bytes
    return found


def _sent(promised: Counter[tuple[int, int]], trace: Trace) -> Iterator[tuple[int, int, int, int]]:
    for pair in sorted({*promised, *trace.sent_bytes}):
        yield (*pair, promised[pair], trace.sent_bytes[pair])


def _sent_differences(sent: Iterable[tuple[int, int, int, int]]) -> Iterator[str]:
    for a, b, promised, executed in sent:
        if promised != executed:
            yield f"{promised} bytes from row {a} to row {b} promised, {executed} sent"


def _order_differences(actions: tuple[Action, ...], in_flight: int, trace: Trace) -> Iterable[str]:
    if tuple(trace.actions) != actions:
        yield f"other actions than the {len(actions)} of its row were done, or in another order"
    if trace.most_in_flight != in_flight:
        yield f"{in_flight} microbatches in flight promised, {trace.most_in_flight} kept"


def _traffic_differences(plan: Pipelined, estimate: Estimate) -> Iterator[str]:
    """Of the promise itself, between rows."""
    assert estimate.pipeline is not None
    promised = {(t.source_row, t.target_row): t.bytes for t in estimate.pipeline.traffic}
    needed: Counter[tuple[int, int]] = Counter()
    for group in plan.groups:
        for rank in group:
            needed += promised_bytes(plan, rank)
    for a, b in sorted({*promised, *(pair for pair in needed if pair[0] != pair[1])}):
        if promised.get((a, b), 0) != needed[a, b]:
            yield (
                f"from row {a} to row {b} {promised.get((a, b), 0)} bytes are promised, and the "
                f"strategy needs {needed[a, b]}"
            )


__all__ = ["RankReport", "StagesReport", "alike", "one_recorder", "promised_bytes", "verify_stages"]
