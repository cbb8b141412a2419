"""A training step as operators and tensors: what the extractor makes and all else reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from math import prod
from typing import Any, Literal

ITEM_BYTES = {
    "float64": 8,
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float8_e4m3fn": 1,
    "float8_e5m2": 1,
    "float4_e2m1fn_x2": 1,  # half a byte, and kept twice: products read rows and columns of it
    "int64": 8,
    "int32": 4,
    "int16": 2,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
    "complex64": 8,
    "complex128": 16,
}
"""Bytes of one element, by the name torch gives the dtype."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Global shape and dtype (torch's name without the ``torch.``).

    >>> TensorSpec((4, 8), "bfloat16").bytes
    64
    """

    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.numel * ITEM_BYTES[self.dtype]

    @property
    def is_floating(self) -> bool:
        return self.dtype.startswith(("float", "bfloat", "complex"))


class Role(StrEnum):
    """Where a tensor comes from."""

    INPUT = "input"  # one of the model's inputs: a batch
    PARAMETER = "parameter"
    BUFFER = "buffer"  # a registered buffer, read or (``OperatorGraph.mutations``) written
    CONSTANT = "constant"  # a tensor that the trace lifted; its value is in ``constants``
    ACTIVATION = "activation"  # made by an operator


@dataclass(frozen=True, slots=True)
class Tensor:
    """A value of the graph.

    ``differentiable``: a gradient flows through it in the backward. ``name`` of a parameter or
    buffer is its dotted name in the module (the first one, when several names share it).
    """

    name: str
    spec: TensorSpec
    role: Role
    differentiable: bool


@dataclass(frozen=True, slots=True)
class Input:
    """In ``Operator.arguments``: the tensor ``operator.inputs[index]``."""

    index: int


@dataclass(frozen=True, slots=True)
class Dtype:
    """In ``Operator.arguments``: a torch dtype, by name."""

    name: str


Argument = Any
"""None, bool, int, float, str, ``Input``, ``Dtype``, or a tuple of these."""


@dataclass(frozen=True, slots=True)
class Operator:
    """One call of ``op``, e.g. ``aten.linear.default``, rebuilt by ``op(*arguments, **keywords)``.

    ``inputs`` and ``outputs`` are tensor names; a tensor that is passed twice stands twice. An
    output that nothing reads is still listed. ``module`` is the path of the module that called it
    and ``name`` is unique, e.g. ``model.layers.0.mlp.up_proj.linear``.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    arguments: tuple[Argument, ...] = ()
    keywords: tuple[tuple[str, Argument], ...] = ()
    module: str = ""

    def argument(self, index: int, keyword: str, default: Argument = None) -> Argument:
        """The argument given at ``index`` or as ``keyword``, else ``default``."""
        if index < len(self.arguments):
            return self.arguments[index]
        return dict(self.keywords).get(keyword, default)


@dataclass(frozen=True)
class OperatorGraph:
    """Operators in topological order over named tensors, for one *global* batch.

    ``loss`` is the scalar that is differentiated. ``mutations`` are (buffer, tensor) pairs: after
    the step, the buffer takes the tensor's value (batch-norm statistics). ``shared`` are
    (other name, name) pairs of tied parameters and buffers. ``constants`` hold the values of
    lifted tensors as (name, nested tuple). ``inputs`` are in the order of the model's signature;
    ``input_keys`` are their names for keyword inputs ("" when positional).
    ``trainable`` parameters have ``differentiable`` set.
    """

    tensors: tuple[Tensor, ...]
    operators: tuple[Operator, ...]
    loss: str
    inputs: tuple[str, ...]
    input_keys: tuple[str, ...]
    mutations: tuple[tuple[str, str], ...] = ()
    shared: tuple[tuple[str, str], ...] = ()
    constants: tuple[tuple[str, Any], ...] = ()
    name: str = "model"

    @cached_property
    def by_name(self) -> dict[str, Tensor]:
        return {tensor.name: tensor for tensor in self.tensors}

    @cached_property
    def producer(self) -> dict[str, Operator]:
        return {output: o for o in self.operators for output in o.outputs}

    @cached_property
    def consumers(self) -> dict[str, tuple[tuple[Operator, int], ...]]:
        """(operator, input position) pairs that read each tensor, in order."""
        found: dict[str, list[tuple[Operator, int]]] = {t.name: [] for t in self.tensors}
        for operator in self.operators:
            for position, name in enumerate(operator.inputs):
                found[name].append((operator, position))
        return {name: tuple(readers) for name, readers in found.items()}

    @cached_property
    def parameters_alike(self) -> dict[str, Tensor]:
        """For each parameter, the first of those with its shape, dtype and differentiability."""
        first: dict[tuple[TensorSpec, bool], Tensor] = {}
        return {p.name: first.setdefault((p.spec, p.differentiable), p) for p in self.parameters}

    @cached_property
    def operator(self) -> dict[str, Operator]:
        return {operator.name: operator for operator in self.operators}

    @cached_property
    def differentiable(self) -> dict[str, tuple[tuple[bool, ...], tuple[bool, ...]]]:
        """By operator, through which of its inputs and outputs a gradient flows."""
        flows = {tensor.name: tensor.differentiable for tensor in self.tensors}.__getitem__
        return {
            o.name: (tuple(map(flows, o.inputs)), tuple(map(flows, o.outputs)))
            for o in self.operators
        }

    @cached_property
    def weighing(self) -> dict[str, tuple[bool, ...]]:
        """By operator, which of its inputs are parameters."""
        names = {parameter.name for parameter in self.parameters}
        return {o.name: tuple(name in names for name in o.inputs) for o in self.operators}

    def spec(self, tensor: str) -> TensorSpec:
        return self.by_name[tensor].spec

    def of_role(self, role: Role) -> Iterator[Tensor]:
        return (tensor for tensor in self.tensors if tensor.role is role)

    @cached_property
    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(self.of_role(Role.PARAMETER))

    @property
    def parameter_count(self) -> int:
        return sum(tensor.spec.numel for tensor in self.parameters)

    @cached_property
    def fingerprint(self) -> str:
        """Hexadecimal SHA-256 of the content; names of tensors count, ``name`` does not."""
        content = {k: v for k, v in graph_to_json(self).items() if k != "name"}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def argument_to_json(value: Argument) -> Any:
    """JSON form of an argument: ``Input(0)`` is ``{"input": 0}``; tuples become lists."""
    match value:
        case Input(index):
            return {"input": index}
        case Dtype(name):
            return {"dtype": name}
        case tuple() | list():
            return [argument_to_json(item) for item in value]
        case float() if value != value or value in (float("inf"), float("-inf")):
            return {"float": repr(value)}
        case _:
            return value


def argument_from_json(value: Any) -> Argument:
    match value:
        case {"input": index}:
            return Input(index)
        case {"dtype": name}:
            return Dtype(name)
        case {"float": text}:
            return float(text)
        case list():
            return tuple(argument_from_json(item) for item in value)
        case _:
            return value


def graph_to_json(graph: OperatorGraph) -> dict[str, Any]:
    """The plan file's ``graph``: lists rather than objects, since there may be thousands."""
    return {
        "name": graph.name,
        "tensors": [
            [t.name, list(t.spec.shape), t.spec.dtype, str(t.role), t.differentiable]
            for t in graph.tensors
        ],
        "operators": [
            {
                "name": o.name,
                "op": o.op,
                "inputs": list(o.inputs),
                "outputs": list(o.outputs),
                "arguments": argument_to_json(o.arguments),
                "keywords": {k: argument_to_json(v) for k, v in o.keywords},
                "module": o.module,
            }
            for o in graph.operators
        ],
        "loss": graph.loss,
        "inputs": list(graph.inputs),
        "input_keys": list(graph.input_keys),
        "mutations": [list(pair) for pair in graph.mutations],
        "shared": [list(pair) for pair in graph.shared],
        "constants": [[name, argument_to_json(value)] for name, value in graph.constants],
    }


def graph_from_json(data: dict[str, Any]) -> OperatorGraph:
    return OperatorGraph(
        name=data["name"],
        tensors=tuple(
            Tensor(name, TensorSpec(tuple(shape), dtype), Role(role), differentiable)
            for name, shape, dtype, role, differentiable in data["tensors"]
        ),
        operators=tuple(
            Operator(
                o["name"],
                o["op"],
                tuple(o["inputs"]),
                tuple(o["outputs"]),
                argument_from_json(o["arguments"]),
                tuple((k, argument_from_json(v)) for k, v in o["keywords"].items()),
                o["module"],
            )
            for o in data["operators"]
        ),
        loss=data["loss"],
        inputs=tuple(data["inputs"]),
        input_keys=tuple(data["input_keys"]),
        mutations=tuple((a, b) for a, b in data["mutations"]),
        shared=tuple((a, b) for a, b in data["shared"]),
        constants=tuple((name, argument_from_json(v)) for name, v in data["constants"]),
    )


Phase = Literal["forward", "backward"]
