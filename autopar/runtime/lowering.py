"""A strategy becomes a program: the model's operators on local tensors, and what moves between."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import spmd_types
import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_leaves

from autopar.errors import PlanMismatchError
from autopar.ir.graph import Argument, Dtype, Input, Operator, OperatorGraph, Role
from autopar.ir.plan import mesh_text
from autopar.ir.rule import RESERVED, BoundRule, Split
from autopar.ir.sharding import Mesh, Sharding, gradient, local_shape
from autopar.ir.strategy import Strategy
from autopar.runtime.again import (
    Reads,
    SegmentProgram,
    SegmentRun,
    begin_segment,
    gathered_again,
    recomputing,
    regathering,
)
from autopar.runtime.collectives import Communicator, method_of
from autopar.runtime.local_ops import LOCAL_OPS, mean_divisor, needs_local_op
from autopar.simulator.edges import (
    Edge,
    ParameterEdge,
    Rules,
    canonical,
    carries_gradient,
    edges,
    parameter_edges,
)
from autopar.simulator.microbatches import Division, undivided
from autopar.simulator.recomputation import check_recompute, recomputation
from autopar.simulator.redistribution import Step, steps
from autopar.simulator.stages import StagePart


@dataclass
class PartedBackward:
    """What a microbatch's forward notes so that the gradient of its inputs can come before that of
    the parameters: for each operator that reads parameters, where its outputs stand in the graph of
    autograd, and the aliases of parameters that only it reads. None of their memory is kept."""

    outputs: dict[str, list[GradientEdge]] = field(default_factory=dict)
    aliases: dict[str, list[GradientEdge]] = field(default_factory=dict)


@dataclass
class Execution:
    """What the lowered program needs beside tensors: passed as its first argument.

    ``parameters``: this rank's shards. ``seed``: of this pass, the same on all ranks; dropout masks
    are made from it. ``microbatch``: which one this pass is. ``divisors``: by operator, what its
    mean over all microbatches divides by, where that is counted. ``gradients``: what the backward
    has summed for each parameter edge, as ``gradient(edge.target)`` where it travels once a step,
    else as ``edge.destination``. ``parted``: what the forward notes for a backward in two parts.
    ``recomputed`` and ``segments``: of the program, by operator and in order.
    """

    communicator: Communicator
    edges: dict[tuple[str, Sharding], ParameterEdge]
    regathered: dict[str, tuple[ParameterEdge, ...]]
    parameters: dict[str, Tensor]
    seed: int = 0
    microbatch: int = 0
    divisors: dict[str, Tensor] = field(default_factory=dict)
    parted: PartedBackward | None = None
    gradients: dict[tuple[str, Sharding], Tensor] = field(default_factory=dict)
    recomputed: Mapping[str, Reads] = field(default_factory=dict)
    segments: tuple[SegmentProgram, ...] = ()

    def accumulate(self, edge: ParameterEdge, addend: Tensor) -> None:
        key = edge.parameter, edge.target
        before = self.gradients.get(key)
        self.gradients[key] = addend if before is None else before + addend


@dataclass(frozen=True)
class LoweredProgram:
    """The forward of one (micro)batch on one rank; autograd derives the planned backward.

    ``graph_module(execution, spmd, *parameters, *buffers, *inputs)`` returns the ``ends`` (the
    loss; of a stage, what departs from it), in these shardings, and the new values of ``mutated``
    buffers; ``spmd`` is the execution's communicator. Parameters are shards as stored, inputs are
    the whole (micro)batch, from which each rank takes its part (or what arrives in a stage).
    ``graph`` is that of one microbatch, ``division`` says of what. ``segments`` are what the
    backward runs again. ``print(program)`` shows all of it, with every collective, and the sharding
    of each tensor.
    """

    graph_module: fx.GraphModule
    division: Division
    mesh: Mesh
    parameters: tuple[str, ...]
    buffers: tuple[str, ...]
    inputs: tuple[str, ...]
    mutated: tuple[str, ...]
    edges: tuple[ParameterEdge, ...]
    regathered: dict[str, tuple[ParameterEdge, ...]]
    ends: dict[str, Sharding]
    recomputed: dict[str, Reads] = field(default_factory=dict)
    segments: tuple[SegmentProgram, ...] = ()

    @property
    def graph(self) -> OperatorGraph:
        return self.division.graph

    def constant(self, name: str) -> Tensor:
        return self.graph_module.get_buffer(_constant_name(name))

    def execution(self, communicator: Communicator, parameters: dict[str, Tensor]) -> Execution:
        """
        Raises:
            PlanMismatchError: the communicator connects another mesh than the program is for.
        """
        if communicator.mesh != self.mesh:
            raise PlanMismatchError(
                f"the program is for the mesh {mesh_text(self.mesh)}, and the processes are "
                f"connected as {mesh_text(communicator.mesh)}; connect them with the strategy's "
                "own mesh, `connect(strategy.mesh, ...)`, or lower a strategy for theirs"
            )
        by_use = {(edge.parameter, edge.target): edge for edge in self.edges}
        return Execution(
            communicator,
            by_use,
            self.regathered,
            parameters,
            recomputed=self.recomputed,
            segments=self.segments,
        )

    def __call__(
        self, execution: Execution, buffers: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss, and the new values of mutated buffers by name."""
        ends, mutated = self.run(execution, buffers, inputs)
        return ends[self.graph.loss], mutated

    def run(
        self, execution: Execution, buffers: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The ends, and the new values of mutated buffers, by name."""
        values = self.graph_module(
            execution,
            execution.communicator,
            *(execution.parameters[name] for name in self.parameters),
            *(buffers[name] for name in self.buffers),
            *(inputs[name] for name in self.inputs),
        )
        count = len(self.ends)
        return (
            dict(zip(self.ends, values[:count], strict=True)),
            dict(zip(self.mutated, values[count:], strict=True)),
        )

    def __str__(self) -> str:
        again = (segment for segment in self.segments if segment.made)
        code = "\n\n".join(map(str, (self.graph_module.code, *again)))
        return re.sub(r"autopar_runtime_(lowering|again)_", "", code).strip()


def lower(
    graph: OperatorGraph,
    strategy: Strategy,
    rules: Rules,
    device: torch.device | str = "cpu",
    *,
    parted: bool = False,
) -> LoweredProgram:
    """As ``lower_microbatch``, when the batch is not divided in time. ``parted``: its backward can
    come in two parts."""
    division = undivided(graph, rules)
    return _Lowering(division, strategy, torch.device(device), parted=parted).program()


def lower_microbatch(
    division: Division, strategy: Strategy, device: torch.device | str = "cpu"
) -> LoweredProgram:
    """The program is the same for every rank: what depends on the rank, ``Execution`` knows.

    Each tensor is redistributed once for each sharding that is wanted of it, however many
    operators want it; a tensor that is already as wanted is used as it is.
    """
    return _Lowering(division, strategy, torch.device(device)).program()


def lower_stage(
    part: StagePart, device: torch.device | str = "cpu", *, parted: bool = False
) -> LoweredProgram:
    """One stage of several. ``parted``: its backward can come in two parts."""
    lowering = _Lowering(
        part.division, part.strategy, torch.device(device), part.given, part.ends, parted
    )
    return lowering.program()


def divisors(
    program: LoweredProgram, buffers: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What means over all microbatches divide by, by operator: counted in the targets of the global
    batch, which every rank has."""
    division = program.division
    if not division.means:
        return {}
    device = next(iter(inputs.values())).device
    constants = {name: program.constant(name) for name, _ in division.graph.constants}
    values: dict[str, Tensor] = {**buffers, **constants, **inputs}
    with torch.no_grad():
        for operator in division.counting:
            args, kwargs = arguments_of(operator, values, device)
            results = resolve(operator.op)(*args, **kwargs)
            found = (results,) if isinstance(results, Tensor) else results
            values.update(zip(operator.outputs, found, strict=True))
        return {
            operator.name: mean_divisor(*arguments_of(operator, values, device))
            for operator in division.whole.operators
            if operator.name in division.means
        }


def arguments_of(
    operator: Operator, values: Mapping[str, Tensor], device: torch.device
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operator's arguments, ``None`` for tensors that are not among ``values``."""
    given: list[Any] = [values.get(name) for name in operator.inputs]
    kwargs = {k: _argument(v, given) for k, v in operator.keywords}
    if any(argument.name == "device" for argument in resolve(operator.op)._schema.arguments):
        kwargs["device"] = device
    return tuple(_argument(a, given) for a in operator.arguments), kwargs


class _Lowering:
    def __init__(
        self,
        division: Division,
        strategy: Strategy,
        device: torch.device,
        given: Mapping[str, Sharding] | None = None,
        ends: Mapping[str, Sharding] | None = None,
        parted: bool = False,
    ) -> None:
        assert division.count == strategy.microbatches
        self.given, self.parted = given or {}, parted
        self.division, self.strategy, self.device = division, strategy, device
        graph, rules = self.graph, self.rules = division.graph, division.rules
        self.mesh = strategy.mesh
        # time cuts the batch first, then devices cut each microbatch
        self.mesh_and_time = Mesh((("time", division.count), *self.mesh.axes))
        self.edges: dict[tuple[str, Sharding], Edge] = {
            (edge.tensor, edge.target): edge for edge in edges(graph, rules, strategy, ends)
        }
        whole = ("I",) * len(self.mesh.axes)
        self.ends = {graph.loss: whole} if ends is None else dict(ends)
        check_recompute(graph, strategy)
        self.again = recomputation(graph, rules, strategy)
        self.parameter_edges = tuple(parameter_edges(graph, rules, strategy, self.again.again))
        self.saved_again = {
            (consumer, edge.parameter, edge.target): edge
            for edge in self.parameter_edges
            if edge.gathers
            for consumer in edge.regathered
        }
        self.regathered: dict[str, tuple[ParameterEdge, ...]] = {}
        self.root = nn.Module()
        self.fx = fx.Graph()
        self.made: dict[str, fx.Node] = {}
        self.moved: dict[tuple[str, Sharding], fx.Node] = {}
        self.begun: dict[int, fx.Node] = {}
        self.readers: dict[str, list[fx.Node]] = {}

    def program(self) -> LoweredProgram:
        self.execution, self.spmd = map(self.fx.placeholder, ("execution", "spmd"))
        names = {
            role: tuple(tensor.name for tensor in self.graph.of_role(role))
            for role in (Role.PARAMETER, Role.BUFFER)
        }
        for name in (*names[Role.PARAMETER], *names[Role.BUFFER], *self.graph.inputs):
            self.made[name] = placeholder = self._named("placeholder", _identifier(name), name)
            # fx renames what is called like a builtin ("sum"), and may then meet a real "sum_1"
            placeholder.target = placeholder.name
            self._describe(self.made[name], name, self._given_as(name))
        for name, value in self.graph.constants:
            self.made[name] = self._constant(name, value)
            self._describe(self.made[name], name, self._given_as(name))
        for operator in self.graph.operators:
            self._call(operator)
        whole = ("I",) * len(self.mesh.axes)
        wanted = (*self.ends.items(), *((tensor, whole) for _, tensor in self.graph.mutations))
        self.fx.output(tuple(self._as(name, sharding) for name, sharding in wanted))
        self.fx.on_generate_code(lambda _: _commented(self.fx))
        segments = tuple(
            _SegmentLowering(self, number).program() for number in range(len(self.again.segments))
        )
        return LoweredProgram(
            fx.GraphModule(self.root, self.fx, "Lowered"),
            self.division,
            self.mesh,
            names[Role.PARAMETER],
            names[Role.BUFFER],
            self.graph.inputs,
            tuple(buffer for buffer, _ in self.graph.mutations),
            self.parameter_edges,
            self.regathered,
            self.ends,
            {name: self._reads(name, segments) for name in self.readers},
            segments,
        )

    def _named(
        self,
        kind: Literal["placeholder", "call_function", "call_method", "call_module", "get_attr"],
        target: Any,
        tensor: str,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> fx.Node:
        return self.fx.create_node(kind, target, args, kwargs or {}, _identifier(tensor))

    def _constant(self, name: str, value: Any) -> fx.Node:
        spec = self.graph.spec(name)
        tensor = torch.tensor(value, dtype=_dtype(spec.dtype), device=self.device)
        target = _constant_name(name)
        self.root.register_buffer(target, tensor.reshape(spec.shape), persistent=False)
        return self._named("get_attr", target, name)

    # ---- tensors -------------------------------------------------------------------------------

    def _given_as(self, name: str) -> Sharding:
        """How the caller passes a tensor: parameters as stored, everything else whole, or as it
        arrives."""
        tensor = self.graph.by_name[name]
        if tensor.role is Role.PARAMETER:
            kept = self.strategy.storage[name].parameter
        elif name in self.given:
            kept = self.given[name]
        else:
            kept = ("I",) * len(self.mesh.axes)
        return canonical(kept, tensor.differentiable)

    def _as(self, name: str, wanted: Sharding) -> fx.Node:
        """``name`` in the sharding ``wanted``, moved there when nobody has asked before."""
        tensor = self.graph.by_name[name]
        target = canonical(wanted, tensor.differentiable)
        if (name, target) not in self.moved:
            self.moved[name, target] = self._move(name, target)
        return self.moved[name, target]

    def _move(self, name: str, target: Sharding) -> fx.Node:
        """One call for each step; activations' gradients go back the same way."""
        role = self.graph.by_name[name].role
        activation = role is Role.ACTIVATION
        source = self.edges[name, target].source if activation else self._given_as(name)
        node, current = self.made[name], list(source)
        for step in steps(source, target):
            node = self._step(name, node, step)
            current[step.axis] = step.target
            self._describe(node, name, tuple(current))
            node.meta["version"] = name, target
        if role is Role.PARAMETER:
            args = (node, self.made[name], self.execution, name, target)
            node = self._named("call_function", use_parameter, f"{name}_used", args)
            self._describe(node, name, target)
        return node

    def _step(self, name: str, node: fx.Node, step: Step) -> fx.Node:
        method, axis = method_of(step), self.mesh.names[step.axis]
        placements = {"src": step.source, "dst": step.target}
        return self._named(
            "call_method", method, f"{name}_{method}", (self.spmd, node, axis), placements
        )

    def _describe(self, node: fx.Node, name: str, sharding: Sharding) -> None:
        spec = self.graph.spec(name)
        shape = ", ".join(map(str, local_shape(spec.shape, sharding, self.mesh)))
        node.meta["sharding"] = sharding
        node.meta["tensor"] = name
        node.meta["comment"] = f"{spec.dtype}[{shape}] ({', '.join(sharding)})"

    # ---- operators -----------------------------------------------------------------------------

    def _call(self, operator: Operator) -> None:
        bound, split = self.rules[operator.name], self.strategy.splits[operator.name]
        wanted, produced = bound.shardings(split)
        inputs = [
            self._as(name, sharding) for name, sharding in zip(operator.inputs, wanted, strict=True)
        ]
        if not carries_gradient(self.graph, operator):
            inputs = [
                self._detached(node, name, sharding)
                if self.graph.by_name[name].differentiable
                else node
                for name, node, sharding in zip(operator.inputs, inputs, wanted, strict=True)
            ]
        for i in self.division.shares.get(operator.name, ()):
            inputs[i] = self._share(inputs[i], operator.inputs[i], wanted[i])
        gathered = self._gathered(operator, wanted)
        local = self._localized(operator, bound, wanted, produced)
        called = self._aliased(operator, inputs)
        node = self._operation(operator, local, bound, split, called, gathered)
        shardings = [
            canonical(sharding, self.graph.by_name[name].differentiable)
            for name, sharding in zip(operator.outputs, produced, strict=True)
        ]
        node.meta["operator"] = operator.name
        node.meta["given"], node.meta["wanted"] = called, wanted
        node.meta["produced"] = shardings
        if _returns_one(operator.op):
            (name,), (sharding,) = operator.outputs, shardings
            self._describe(node, name, sharding)
            node.meta["version"] = name, sharding
            self.made[name] = self._noted(operator, name, node)
            self._describe(self.made[name], name, sharding)
            return
        for index, (name, sharding) in enumerate(zip(operator.outputs, shardings, strict=True)):
            taken = self._named("call_function", _getitem, name, (node, index))
            taken.meta["version"] = name, sharding
            if index in _NEW_STATISTICS.get(operator.op, ()):
                dtype = _dtype(self.graph.spec(name).dtype)
                taken = self._named("call_method", "to", name, (taken, dtype))
            self._describe(taken, name, sharding)
            taken.meta["version"] = name, sharding
            self.made[name] = self._noted(operator, name, taken)
            self._describe(self.made[name], name, sharding)

    def _detached(self, node: fx.Node, name: str, sharding: Sharding) -> fx.Node:
        """For operators off the loss's way, lest they keep what no backward will ask for."""
        op = torch.ops.aten.detach.default
        detached = self._named("call_function", op, f"{node.name}_detached", (node,))
        detached.meta["for_one"] = True
        self._describe(detached, name, canonical(sharding, False))
        return detached

    def _share(self, node: fx.Node, name: str, sharding: Sharding) -> fx.Node:
        """Of what every microbatch has and one of them would be enough to add."""
        op, count = torch.ops.aten.div.Scalar, self.division.count
        share = self._named("call_function", op, f"{node.name}_share", (node, count))
        share.meta["for_one"] = True
        produced = canonical(sharding, self.graph.by_name[name].differentiable)
        self._describe(share, name, produced)
        share.meta["given"], share.meta["wanted"] = [node], (sharding,)
        share.meta["produced"] = [produced]
        return share

    def _aliased(self, operator: Operator, inputs: list[fx.Node]) -> list[fx.Node]:
        """With a backward in two parts, parameters under a name that only this operator reads."""
        if not self.parted or not carries_gradient(self.graph, operator):
            return inputs
        called = list(inputs)
        for i, name in enumerate(operator.inputs):
            tensor = self.graph.by_name[name]
            if tensor.role is Role.PARAMETER and tensor.differentiable:
                args = (inputs[i], self.execution, operator.name)
                alias = f"{inputs[i].name}_in_{operator.name}"
                called[i] = self._named("call_function", alias_parameter, alias, args)
                called[i].meta.update({**inputs[i].meta, "same_as": inputs[i]})
        return called

    def _noted(self, operator: Operator, name: str, node: fx.Node) -> fx.Node:
        """With a backward in two parts, an output of an operator that reads parameters."""
        reads = any(
            self.graph.by_name[given].role is Role.PARAMETER
            and self.graph.by_name[given].differentiable
            for given in operator.inputs
        )
        if not (self.parted and reads and self.graph.by_name[name].differentiable):
            return node
        args = (node, self.execution, operator.name)
        noted = self._named("call_function", note_output, f"{name}_noted", args)
        noted.meta["same_as"] = node
        return noted

    def _gathered(self, operator: Operator, wanted: Sequence[Sharding]) -> tuple[fx.Node, ...]:
        """Inputs that the operator's backward gathers again; noted in ``regathered``."""
        found = {}
        for name, sharding in zip(operator.inputs, wanted, strict=True):
            target = canonical(sharding, self.graph.by_name[name].differentiable)
            edge = self.saved_again.get((operator.name, name, target))
            if edge is not None:
                found[self._as(name, sharding)] = edge
        if found:
            self.regathered[operator.name] = tuple(found.values())
        return tuple(found)

    def _localized(
        self,
        operator: Operator,
        bound: BoundRule,
        wanted: Sequence[Sharding],
        produced: Sequence[Sharding],
    ) -> Operator:
        if bound.rule.localize is None:
            return operator
        return bound.rule.localize(
            operator,
            tuple(
                local_shape(spec.shape, sharding, self.mesh)
                for spec, sharding in zip(bound.input_specs, wanted, strict=True)
            ),
            tuple(
                local_shape(spec.shape, sharding, self.mesh)
                for spec, sharding in zip(bound.output_specs, produced, strict=True)
            ),
        )

    def _operation(
        self,
        operator: Operator,
        local: Operator,
        bound: BoundRule,
        split: Split,
        inputs: list[fx.Node],
        gathered: tuple[fx.Node, ...],
    ) -> fx.Node:
        result = operator.outputs[0] if len(operator.outputs) == 1 else operator.name
        op = resolve(local.op)
        args = tuple(_argument(a, inputs) for a in local.arguments)
        kwargs = {k: _argument(v, inputs) for k, v in local.keywords}
        if any(argument.name == "device" for argument in op._schema.arguments):
            kwargs["device"] = self.device
        choice = self.division.choices[operator.name]
        special = self.division.whole_rules[operator.name].rule.special
        if choice in special or ("*" in special and choice not in RESERVED):
            whole = self.division.whole_rules[operator.name]
            called = LocalOperator(local, whole, (choice, *split), self.mesh_and_time, in_time=True)
        elif needs_local_op(bound, split):
            called = LocalOperator(local, bound, split, self.mesh)
        else:
            called = None
        segments = self._segments(operator, bound, split)
        if segments:
            leaves = tree_leaves((args, kwargs))
            self.readers[operator.name] = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
        plain: tuple[Any, ...]
        target: Any
        if called is not None:
            target = _identifier(operator.name)
            self.root.add_module(target, called)
            plain = "call_module", target, (self.execution, (), args, kwargs, ()), {}
            args, kwargs = (self.execution, gathered, args, kwargs, segments), {}
            node = self._named("call_module", target, result, args, kwargs)
        else:
            plain = "call_function", op, args, kwargs
            target = op
            if segments:
                args = (segments, self.execution, operator.name, gathered, op, *args)
                target = recomputing
            elif gathered:
                args = (self.execution, operator.name, gathered, op, *args)
                target = regathering
            node = self._named("call_function", target, result, args, kwargs)
        node.meta["plain"], node.meta["gathered"] = plain, gathered
        return node

    # ---- recomputation -------------------------------------------------------------------------

    def _segments(self, operator: Operator, bound: BoundRule, split: Split) -> tuple[fx.Node, ...]:
        """Those that make again what the operator reads, or the operator itself."""
        own = self.again.again.get(operator.name)
        wanted, _ = bound.shardings(split)
        found = {} if own is None else {own: None}
        for name, sharding in zip(operator.inputs, wanted, strict=True):
            version = name, canonical(sharding, self.graph.by_name[name].differentiable)
            number = self.again.segment_of.get(version)
            if number is not None and self.again.segments[number].again:
                found[number] = None
        return tuple(map(self._begun, sorted(found)))

    def _begun(self, number: int) -> fx.Node:
        if number not in self.begun:
            args = self.execution, number
            name = f"segment_{number}"
            self.begun[number] = self._named("call_function", begin_segment, name, args)
        return self.begun[number]

    def _reads(self, operator: str, segments: Sequence[SegmentProgram]) -> Reads:
        given = []
        for node in self.readers[operator]:
            source, number = _source(node), self.segment_of(node)
            if number is not None and source.name not in segments[number].made:
                number = None  # nobody was known to save it
            given.append((source.name, number))
        return Reads(tuple(given), self.again.again.get(operator))

    def segment_of(self, node: fx.Node) -> int | None:
        """The segment that makes a tensor again."""
        source = _source(node)
        if source.meta.get("for_one"):
            return self.segment_of(source.all_input_nodes[0])
        return self.again.segment_of.get(source.meta.get("version", ("", ())))


def _source(node: fx.Node) -> fx.Node:
    """The node whose very value this one passes on."""
    while "same_as" in node.meta:
        node = node.meta["same_as"]
    return node


class _SegmentLowering:
    """The part of the lowered program that makes a segment again."""

    def __init__(self, whole: _Lowering, number: int) -> None:
        self.whole, self.number = whole, number
        self.again = set(whole.again.segments[number].again)
        self.fx = fx.Graph()
        self.made: dict[fx.Node, fx.Node] = {}
        self.kept: dict[fx.Node, fx.Node] = {}

    def program(self) -> SegmentProgram:
        wanted = self._wanted()
        self.segment, self.execution, self.spmd = map(
            self.fx.placeholder, ("segment", "execution", "spmd")
        )
        for placeholder in (self.segment, self.execution, self.spmd):
            placeholder.meta["name"] = placeholder.name
        for node in wanted:
            for read in self._read(node):
                if not self._is_made(read) and read not in self.kept:
                    self.kept[read] = kept = self.fx.placeholder(read.name)
                    kept.meta.update(name=read.name, comment=read.meta["comment"])
        for node in wanted:
            self.made[node] = self._copied(node)
        self.fx.output(())
        self.fx.on_generate_code(lambda _: _commented(self.fx))
        return SegmentProgram(
            self.number,
            self.fx,
            tuple(node.name for node in self.kept),
            frozenset(node.name for node in self.made),
            self.whole.root,
        )

    def _is_made(self, node: fx.Node) -> bool:
        several = node.meta.get("operator") in self.again and "version" not in node.meta
        return several or self.whole.segment_of(node) == self.number

    def _wanted(self) -> list[fx.Node]:
        """In order: the operators, and what their operands and those who save tensors read."""
        found: set[fx.Node] = set()
        open_ = [node for node in self.whole.fx.nodes if node.meta.get("operator") in self.again]
        remade = {version for version, _ in self.whole.again.segments[self.number].remade}
        for key, node in self.whole.moved.items():
            if key in remade:
                open_.append(_source(node))
        for name in self.again:
            for output in self.whole.graph.operator[name].outputs:
                made = _source(self.whole.made[output])
                if self._is_made(made):
                    open_.append(made)
        for nodes in self.whole.readers.values():
            open_ += [
                source
                for node in nodes
                if (source := _source(node)).meta.get("for_one") and self._is_made(source)
            ]
        while open_:
            node = open_.pop()
            if node not in found:
                found.add(node)
                open_ += [read for read in self._read(node) if self._is_made(read)]
        return [node for node in self.whole.fx.nodes if node in found]

    def _read(self, node: fx.Node) -> list[fx.Node]:
        """The tensors that a node of the whole program reads; gathered parameters are not among
        them."""
        if "plain" not in node.meta:
            reads = node.all_input_nodes
        else:
            _, _, args, kwargs = node.meta["plain"]
            leaves = tree_leaves((args, kwargs))
            gathered = set(map(_source, node.meta["gathered"]))
            reads = [n for n in leaves if isinstance(n, fx.Node) and _source(n) not in gathered]
        return [_source(n) for n in reads if n not in (self.whole.execution, self.whole.spmd)]

    def _copied(self, node: fx.Node) -> fx.Node:
        kind, target, args, kwargs = node.meta.get(
            "plain", (node.op, node.target, node.args, node.kwargs)
        )
        operator = node.meta.get("operator")
        gathered = {}
        for index, parameter in enumerate(node.meta.get("gathered", ())):
            given = self.segment, operator, index
            name = f"{_source(parameter).name}_again"
            gathered[_source(parameter)] = self.fx.create_node(
                "call_function", gathered_again, given, {}, name
            )
            gathered[_source(parameter)].meta["name"] = name

        def copy_of(read: fx.Node) -> fx.Node:
            if read is self.whole.execution:
                return self.execution
            if read is self.whole.spmd:
                return self.spmd
            source = _source(read)
            return gathered.get(source) or self.made.get(source) or self.kept[source]

        copied = self.fx.create_node(
            kind,
            target,
            fx.node.map_arg(args, copy_of),
            fx.node.map_arg(kwargs, copy_of),
            node.name,
        )
        copied.meta.update({k: node.meta[k] for k in ("comment", "operator") if k in node.meta})
        copied.meta["name"] = node.name
        return copied


_NEW_STATISTICS = {"aten._native_batch_norm_legit_functional.default": (3, 4)}
"""Results that are of the buffers' dtype on every device, but not so under fake tensors, where
those of bfloat16 are float32: a dry run would gather twice the bytes."""


def _commented(graph: fx.Graph) -> Callable[[list[str]], list[str]]:
    """Writes beside each tensor of the code what it is."""

    def with_comments(lines: list[str]) -> list[str]:
        comments = {
            node.name: node.meta["comment"] for node in graph.nodes if "comment" in node.meta
        }
        return [_with_comment(line, comments) for line in "".join(lines).splitlines(True)]

    return with_comments


_ASSIGNMENT = re.compile(r"\s*(\w+) = ")


def _with_comment(line: str, comments: dict[str, str]) -> str:
    found = _ASSIGNMENT.match(line)
    comment = comments.get(found[1]) if found else None
    return line if comment is None else f"{line.rstrip()}  # {comment}\n"


def _identifier(name: str) -> str:
    """
    >>> _identifier("0.weight")
    '_0_weight'
    """
    return re.sub(r"\W|^(?=\d)", "_", name)


def _constant_name(name: str) -> str:
    return "constant_" + _identifier(name)


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def _argument(value: Argument, inputs: Sequence[Any]) -> Any:
    match value:
        case Input(index):
            return inputs[index]
        case Dtype(name):
            return _dtype(name)
        case tuple():
            return [_argument(item, inputs) for item in value]
        case _:
            return value


_AS_RESHAPE = ("aten.view.default", "aten._unsafe_view.default")
"""A shard need not have the strides that a view of the whole could count on."""


def resolve(op: str) -> torch._ops.OpOverload:
    """The torch operator that is called ``namespace.name.overload``."""
    namespace, name, overload = ("aten.reshape.default" if op in _AS_RESHAPE else op).split(".")
    found = getattr(getattr(getattr(torch.ops, namespace), name), overload)
    assert isinstance(found, torch._ops.OpOverload)
    return found


def _returns_one(op: str) -> bool:
    returns = resolve(op)._schema.returns
    return len(returns) == 1 and str(returns[0].type) == "Tensor"


def _getitem(values: Sequence[Tensor], index: int) -> Tensor:
    return values[index]


# ---- what the lowered program calls ------------------------------------------------------------


def use_parameter(
    moved: Tensor, parameter: Tensor, execution: Execution, name: str, target: Sharding
) -> Tensor:
    """``moved``, which is ``parameter`` taken from storage to use. The gradient goes to
    ``execution.gradients``, not to ``.grad``: it may be sharded otherwise than the parameter, and
    may wait for the end of the step."""
    edge = execution.edges[name, target]
    used: Tensor = _UseParameter.apply(moved.detach(), parameter, execution, edge)  # type: ignore[no-untyped-call]
    return used


class _UseParameter(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, moved: Tensor, parameter: Tensor, execution: Execution, edge: ParameterEdge
    ) -> Tensor:
        ctx.execution, ctx.edge = execution, edge
        return moved.view_as(moved)

    @staticmethod
    def spmd_typecheck(
        used: Tensor,
        *,
        moved: Tensor,
        parameter: Tensor,
        execution: Execution,
        edge: ParameterEdge,
    ) -> None:
        types = execution.communicator.types
        # of a frozen one R and I are the same
        stored = canonical(edge.storage.parameter, parameter.requires_grad)
        spmd_types.assert_type(parameter, types(stored))
        spmd_types.assert_type(moved, types(edge.target))
        spmd_types.assert_type(used, types(edge.target))

    @staticmethod
    def backward(ctx: Any, arrived: Tensor) -> tuple[None, None, None, None]:
        execution: Execution = ctx.execution
        edge: ParameterEdge = ctx.edge
        if not edge.per_step:
            path = steps(gradient(edge.target), edge.destination)
            arrived = execution.communicator.walk(arrived, path)
        execution.accumulate(edge, arrived)
        return None, None, None, None


def alias_parameter(parameter: Tensor, execution: Execution, operator: str) -> Tensor:
    """The parameter for one operator alone, noted: in a backward in two parts its gradient is asked
    for by itself."""
    assert execution.parted is not None
    alias = parameter.view_as(parameter)
    execution.parted.aliases.setdefault(operator, []).append(get_gradient_edge(alias))
    return alias


def note_output(made: Tensor, execution: Execution, operator: str) -> Tensor:
    """Not the tensor, which need not be kept."""
    assert execution.parted is not None
    execution.parted.outputs.setdefault(operator, []).append(get_gradient_edge(made))
    return made


class LocalOperator(nn.Module):
    """An operator with an implementation of its own in ``local_ops``.

    ``in_time``: ``bound`` is of the global batch and the first axis of ``mesh`` is time.
    """

    def __init__(
        self,
        operator: Operator,
        bound: BoundRule,
        split: Split,
        mesh: Mesh,
        *,
        in_time: bool = False,
    ) -> None:
        super().__init__()
        self.operator, self.bound, self.split, self.mesh = operator, bound, split, mesh
        self.in_time = in_time
        self.implementation = LOCAL_OPS[operator.op]
        digest = hashlib.blake2b(operator.name.encode(), digest_size=7).digest()
        self.operator_id = int.from_bytes(digest, "big")

    def forward(
        self,
        execution: Execution,
        gathered: tuple[Tensor, ...],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        segments: tuple[SegmentRun, ...],
    ) -> Any:
        context = _OperatorContext(self, execution)
        call = (context, self.operator, args, kwargs)
        if segments:
            name = self.operator.name
            return recomputing(segments, execution, name, gathered, self.implementation, *call)
        if gathered:
            name = self.operator.name
            return regathering(execution, name, gathered, self.implementation, *call)
        return self.implementation(*call)


class _OperatorContext:
    """``local_ops.LocalContext`` of one call."""

    def __init__(self, local: LocalOperator, execution: Execution) -> None:
        self.bound, self.split, self.mesh = local.bound, local.split, local.mesh
        self.operator_id, self.seed = local.operator_id, execution.seed
        self.divisor = execution.divisors.get(local.operator.name)
        self._communicator = execution.communicator
        self._time = (execution.microbatch,) if local.in_time else ()

    def axes(self, factor: str) -> tuple[int, ...]:
        return tuple(axis for axis, choice in enumerate(self.split) if choice == factor)

    def offset(self, factor: str) -> int:
        size, start = self.bound.sizes[factor], 0
        coordinates = (*self._time, *self._communicator.coordinates)
        for axis in self.axes(factor):
            size //= self.mesh.sizes[axis]
            start += coordinates[axis] * size
        return start

    def all_reduce(self, tensor: Tensor, axis: int, op: Literal["sum", "max"] = "sum") -> Tensor:
        assert axis >= len(self._time), "microbatches do not wait for each other"
        return self._communicator.combine(tensor, axis - len(self._time), op)


__all__ = [
    "Execution",
    "LoweredProgram",
    "PartedBackward",
    "divisors",
    "lower",
    "lower_microbatch",
    "lower_stage",
]
