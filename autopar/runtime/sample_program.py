"""A small program of many operators, run as the runtime runs any: what operators take beside work.

The tensors are so small that their arithmetic is nothing beside it. In a loop over one operator,
which finds all it needs in the caches, the same operators take less than half as long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from autopar.ir.graph import Argument, Input, Operator, OperatorGraph, Role, Tensor, TensorSpec
from autopar.ir.rule import NOTHING
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Stage, Storage, Strategy, Training
from autopar.ops import bound_rules
from autopar.runtime.collectives import Communicator, device_mesh
from autopar.runtime.lowering import PartedBackward, lower
from autopar.runtime.step import TrainingStep
from autopar.runtime.storage import State
from autopar.runtime.two_parts import input_part, weight_part

ROWS, WIDTH = 8, 16
ALONE = Mesh((("device", 1),))

WORKS_OF_BLOCK = 14
"""Those that are priced: of gelu and sum one forward and one backward, of a norm two backward (its
scale and shift are another kernel), of each of two products one forward and two backward, and of a
bias one more."""

WORKS_MORE_IN_PARTS, TRAINED_OF_BLOCK = 0, 3
"""In a backward in two parts: works (of a norm one in each), and operators that are asked for the
gradients of their parameters by themselves."""

VIEWS_OF_BLOCK = 16

SHORT, LONG = 1, 12
"""Blocks of the programs that are compared."""


@dataclass
class _Builder:
    tensors: list[Tensor] = field(default_factory=list)
    operators: list[Operator] = field(default_factory=list)

    def tensor(self, name: str, role: Role, *shape: int) -> str:
        spec = TensorSpec(shape, "float32")
        self.tensors.append(Tensor(name, spec, role, role is not Role.INPUT))
        return name

    def call(self, op: str, inputs: tuple[str, ...], shape: tuple[int, ...], *rest: Any) -> str:
        number = len(self.operators)
        made = self.tensor(f"t{number}", Role.ACTIVATION, *shape)
        arguments: tuple[Argument, ...] = rest or tuple(map(Input, range(len(inputs))))
        self.operators.append(Operator(f"o{number}", op, inputs, (made,), arguments))
        return made

    def block(self, x: str, number: int, views: bool) -> str:
        """Norm, product with a bias, gelu, product, residual sum."""
        shape = (ROWS, WIDTH)
        norm, shift, bias = (
            self.tensor(f"{name}{number}", Role.PARAMETER, WIDTH)
            for name in ("norm", "shift", "bias")
        )
        up, down = (
            self.tensor(f"{name}{number}", Role.PARAMETER, WIDTH, WIDTH) for name in ("up", "down")
        )
        normed = (Input(0), (WIDTH,), Input(1), Input(2), 1e-5)
        y = self.call("aten.layer_norm.default", (x, norm, shift), shape, *normed)
        y = self.call("aten.linear.default", (y, up, bias), shape)
        for _ in range(VIEWS_OF_BLOCK // 2 if views else 0):
            cut = (ROWS, 2, WIDTH // 2)
            y = self.call("aten.view.default", (y,), cut, Input(0), cut)
            y = self.call("aten.view.default", (y,), shape, Input(0), shape)
        y = self.call("aten.gelu.default", (y,), shape)
        y = self.call("aten.linear.default", (y, down), shape)
        return self.call("aten.add.Tensor", (x, y), shape)


def sample_graph(blocks: int, *, views: bool = False) -> OperatorGraph:
    build = _Builder()
    x = build.tensor("x", Role.INPUT, ROWS, WIDTH)
    for number in range(blocks):
        x = build.block(x, number, views)
    loss = build.call("aten.sum.default", (x,), ())
    return OperatorGraph(tuple(build.tensors), tuple(build.operators), loss, ("x",), ("",))


@dataclass(frozen=True, slots=True)
class Programs:
    """Seconds of a microbatch of programs, which take the parts of it apart; ``parted_s``: of the
    long one, with its backward in two parts."""

    short_s: float
    long_s: float
    with_views_s: float
    parted_s: float

    @property
    def operator_s(self) -> float:
        return (self.long_s - self.short_s) / (LONG - SHORT) / WORKS_OF_BLOCK

    @property
    def view_s(self) -> float:
        """Forward or backward."""
        return (self.with_views_s - self.long_s) / LONG / VIEWS_OF_BLOCK / 2

    @property
    def pass_s(self) -> float:
        """Of a forward or a backward of no operator."""
        return (self.short_s - SHORT * WORKS_OF_BLOCK * self.operator_s) / 2

    @property
    def part_s(self) -> float:
        """Of an operator with parameters, in the second part of a backward."""
        works_s = LONG * WORKS_MORE_IN_PARTS * self.operator_s
        more_s = self.parted_s - self.long_s - works_s - self.pass_s
        return more_s / LONG / TRAINED_OF_BLOCK


def alone() -> Communicator:
    """A mesh of this process; all processes of the world call it together."""
    made = [
        device_mesh(ALONE, (rank,), local_type(), None) for rank in range(dist.get_world_size())
    ]
    (mine,) = filter(None, made)
    return Communicator(ALONE, 0, mine)


def local_type() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def microbatch(
    graph: OperatorGraph,
    communicator: Communicator,
    device: torch.device,
    *,
    parted: bool = False,
) -> Callable[[], None]:
    """A function that does a forward and a backward, or one in two parts."""
    nothing, whole = (NOTHING,), ("I",)
    strategy = Strategy(
        (Stage(tuple(o.name for o in graph.operators), (0,), ALONE),),
        {o.name: nothing for o in graph.operators},
        {p.name: Storage(whole, whole, whole) for p in graph.parameters},
        training=Training("sgd"),
    )
    values = {
        p.name: torch.rand(p.spec.shape, device=device).requires_grad_() for p in graph.parameters
    }
    program = lower(graph, strategy, bound_rules(graph), device, parted=parted)
    step = TrainingStep(program, strategy, State(values, {}), communicator)
    inputs = {"x": torch.rand(ROWS, WIDTH, device=device)}

    def both() -> None:
        loss, _ = program(step.execution, {}, step.microbatch(inputs, 0))
        loss.backward()  # type: ignore[no-untyped-call]
        step.execution.gradients.clear()

    def all_three() -> None:
        noted = step.execution.parted = PartedBackward()
        loss, _ = program(step.execution, {}, step.microbatch(inputs, 0))
        step.execution.parted = None
        weight_part(input_part(noted, [loss], [None], ())[1])
        step.execution.gradients.clear()

    return all_three if parted else both


__all__ = ["LONG", "SHORT", "Programs", "alone", "microbatch", "sample_graph"]
