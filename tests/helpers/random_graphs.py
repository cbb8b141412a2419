"""Random small operator graphs of real ops, made without torch, and prices for them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from math import prod
from random import Random

from autopar.ir.graph import Argument, Input, Operator, OperatorGraph, Role, Tensor, TensorSpec
from cost_models.interface import Collective, Work

DTYPE = "float32"
HIDDEN = 4


@dataclass(frozen=True)
class HashPrices:
    """Prices that follow from nothing but the question: no order or monotony to lean on."""

    seed: int
    devices: int = 4
    memory_bytes: int = 10**15

    @property
    def scale_up_devices(self) -> int:
        return self.devices

    def compute_time_s(self, work: Work) -> float:
        return self._price(repr(work))

    def collective_time_s(self, collective: Collective) -> float:
        return self._price(repr(collective))

    def _price(self, question: str) -> float:
        digest = hashlib.sha256(f"{self.seed} {question}".encode()).digest()
        return 1e-6 * (0.1 + int.from_bytes(digest[:4]) / 2**32)


@dataclass
class Builder:
    """Operators one after the other; each method returns the name of what it makes."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    operators: list[Operator] = field(default_factory=list)
    inputs: list[str] = field(default_factory=list)

    def input(self, *shape: int) -> str:
        name = f"input{len(self.inputs)}"
        self.inputs.append(name)
        return self._tensor(name, shape, Role.INPUT, differentiable=False)

    def parameter(self, *shape: int, trained: bool = True) -> str:
        name = f"parameter{len(self.tensors)}"
        return self._tensor(name, shape, Role.PARAMETER, differentiable=trained)

    def _tensor(
        self, name: str, shape: tuple[int, ...], role: Role, *, differentiable: bool
    ) -> str:
        self.tensors[name] = Tensor(name, TensorSpec(shape, DTYPE), role, differentiable)
        return name

    def shape(self, name: str) -> tuple[int, ...]:
        return self.tensors[name].spec.shape

    def call(
        self, op: str, inputs: tuple[str, ...], shape: tuple[int, ...], *rest: Argument
    ) -> str:
        number = len(self.operators)
        output = self._tensor(
            f"t{number}",
            shape,
            Role.ACTIVATION,
            differentiable=any(self.tensors[name].differentiable for name in inputs),
        )
        arguments = (*(Input(i) for i in range(len(inputs))), *rest)
        self.operators.append(Operator(f"o{number}", op, inputs, (output,), arguments))
        return output

    def linear(self, x: str, weight: str, *bias: str) -> str:
        shape = (*self.shape(x)[:-1], self.shape(weight)[0])
        return self.call("aten.linear.default", (x, weight, *bias), shape)

    def same(self, op: str, *inputs: str) -> str:
        return self.call(op, inputs, self.shape(inputs[0]))

    def layer_norm(self, x: str) -> str:
        width = self.shape(x)[-1]
        weight, bias = self.parameter(width), self.parameter(width)
        arguments = (Input(0), (width,), Input(1), Input(2), 1e-5)
        made = self.same("aten.layer_norm.default", x, weight, bias)
        last = self.operators[-1]
        self.operators[-1] = Operator(last.name, last.op, last.inputs, last.outputs, arguments)
        return made

    def view(self, x: str, *shape: int) -> str:
        return self.call("aten.view.default", (x,), shape, shape)

    def transpose(self, x: str, a: int, b: int) -> str:
        shape = list(self.shape(x))
        shape[a], shape[b] = shape[b], shape[a]
        return self.call("aten.transpose.int", (x,), tuple(shape), a, b)

    def cat(self, x: str, y: str, dim: int) -> str:
        shape = list(self.shape(x))
        shape[dim] += self.shape(y)[dim]
        made = self.call("aten.cat.default", (x, y), tuple(shape))
        last = self.operators[-1]
        arguments = ((Input(0), Input(1)), dim)
        self.operators[-1] = Operator(last.name, last.op, last.inputs, last.outputs, arguments)
        return made

    def total(self, x: str) -> str:
        return self.call("aten.sum.default", (x,), ())

    def graph(self, loss: str) -> OperatorGraph:
        return OperatorGraph(
            tuple(self.tensors.values()),
            tuple(self.operators),
            loss,
            tuple(self.inputs),
            ("",) * len(self.inputs),
        )


def random_graph(seed: int, most_operators: int = 6) -> OperatorGraph:
    """Random wiring: fan-out, tensors used twice, shared and frozen weights, dead ends."""
    rng = Random(seed)
    build = Builder()
    shape = rng.choice([(4, HIDDEN), (4, 2, HIDDEN), (8, 4)])
    weights = [build.parameter(HIDDEN, HIDDEN)]
    made = [build.linear(build.input(*shape), weights[0])]
    for _ in range(rng.randint(1, most_operators - 2)):
        made.append(_operator(build, rng, made, weights))
    loss = build.total(made[-1])
    for leaf in _unread(build, made[:-1]):
        if rng.random() < 0.7:
            loss = build.same("aten.add.Tensor", loss, build.total(leaf))
    return build.graph(loss)


def _unread(build: Builder, made: list[str]) -> list[str]:
    read = {name for operator in build.operators for name in operator.inputs}
    return [name for name in made if name not in read]


def _operator(build: Builder, rng: Random, made: list[str], weights: list[str]) -> str:
    x = rng.choice(made[-2:])
    shape = build.shape(x)
    alike = [name for name in made if build.shape(name) == shape]
    kind = rng.choice(
        ["linear", "linear", "shared", "gelu", "add", "mul", "norm", "view", "transpose", "cat"]
        + ["sum"] * (len(shape) > 1)
    )
    match kind:
        case "linear":
            out = rng.choice([HIDDEN, 2 * HIDDEN])
            weights.append(build.parameter(out, shape[-1], trained=rng.random() < 0.85))
            bias = (build.parameter(out),) if rng.random() < 0.4 else ()
            return build.linear(x, weights[-1], *bias)
        case "shared":
            fitting = [w for w in weights if build.shape(w)[1] == shape[-1]]
            if fitting:
                return build.linear(x, rng.choice(fitting))
            return build.same("aten.gelu.default", x)
        case "add" | "mul":
            return build.same(f"aten.{kind}.Tensor", x, rng.choice(alike))
        case "norm":
            return build.layer_norm(x)
        case "view":
            flat = prod(shape)
            return build.view(x, *rng.choice([(flat // shape[-1], shape[-1]), (2, flat // 2)]))
        case "transpose":
            return build.transpose(x, *rng.sample(range(len(shape)), 2)) if len(shape) > 1 else x
        case "cat":
            return build.cat(x, rng.choice(alike), rng.randrange(len(shape)))
        case "sum":
            dim = rng.randrange(len(shape))
            return build.call("aten.sum.dim_IntList", (x,), shape[:dim] + shape[dim + 1 :], (dim,))
    return build.same("aten.gelu.default", x)
