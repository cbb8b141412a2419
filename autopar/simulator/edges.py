"""Which redistributions a strategy needs: the one list that is priced, executed and verified."""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

from autopar.ir.graph import Operator, OperatorGraph, Role, Tensor, TensorSpec
from autopar.ir.rule import BoundRule, Split
from autopar.ir.sharding import INVARIANT, REPLICATE, Mesh, Sharding, gradient
from autopar.ir.strategy import Storage, Strategy
from autopar.simulator.redistribution import Transfer, forward_collective, steps, transfers

Rules = Mapping[str, BoundRule]
"""The bound rule of each operator, by operator name."""

Lying = tuple[tuple[Sharding, ...], tuple[Sharding, ...]]
"""Shardings of the inputs and of the outputs of an operator, as ``canonical`` has them."""

_NOTHING: Mapping[str, Sharding] = MappingProxyType({})

OUTPUT = "(output)"
"""Stands among consumers for the end of the step: the loss, or a buffer's new value."""


@dataclass(frozen=True, slots=True)
class Edge:
    """A tensor made in ``source`` and wanted in ``target`` by ``consumers`` (operator names).

    One redistribution serves them all; their gradients are summed before they travel back.
    ``backward``: a gradient comes back through it.
    """

    tensor: str
    spec: TensorSpec
    source: Sharding
    target: Sharding
    consumers: tuple[str, ...]
    backward: bool

    def transfers(self, mesh: Mesh) -> tuple[tuple[Transfer, ...], tuple[Transfer, ...]]:
        """Collectives forward and backward."""
        args = (self.source, self.target, self.spec.bytes, mesh)
        return transfers(*args), transfers(*args, backward=True) if self.backward else ()


@dataclass(frozen=True, slots=True)
class ParameterEdge:
    """A parameter kept as ``storage`` and used as ``target`` by ``consumers``.

    The forward goes from ``storage.parameter`` to ``target``. ``regathered``: the consumers that
    need the parameter again in their backward, or to be run again for it; for each of them the
    forward's collectives are repeated (nothing gathered is kept from forward to backward).
    ``per_step``: the gradient is
    summed over microbatches first and travels once a step, from ``gradient(target)`` straight to
    the optimizer's shard (ZeRO-1 is a reduce-scatter); else it travels with every microbatch, to
    ``storage.gradient``.
    """

    parameter: str
    spec: TensorSpec
    storage: Storage
    target: Sharding
    consumers: tuple[str, ...]
    regathered: tuple[str, ...]
    trainable: bool

    @property
    def per_step(self) -> bool:
        return self.storage.gradient == self.storage.parameter and not self.gathers

    @property
    def destination(self) -> Sharding:
        """Where the gradient travels to."""
        return self.storage.optimizer if self.per_step else self.storage.gradient

    @property
    def summed(self) -> Sharding:
        """How the gradients of microbatches lie when they are added up."""
        return gradient(self.target) if self.per_step else self.destination

    @property
    def gathers(self) -> bool:
        """Whether the forward communicates."""
        return _gathers(self.storage.parameter, self.target)

    def forward_transfers(self, mesh: Mesh) -> tuple[Transfer, ...]:
        return transfers(self.storage.parameter, self.target, self.spec.bytes, mesh)

    def backward_transfers(self, mesh: Mesh) -> tuple[Transfer, ...]:
        if not self.trainable:
            return ()
        return transfers(gradient(self.target), self.destination, self.spec.bytes, mesh)


@lru_cache(maxsize=None)
def _gathers(kept: Sharding, used: Sharding) -> bool:
    return any(forward_collective(step) is not None for step in steps(kept, used))


def canonical(sharding: Sharding, differentiable: bool) -> Sharding:
    """Where no gradient flows, R and I are the same: both are written R."""
    if differentiable:
        return sharding
    return tuple(REPLICATE if placement == INVARIANT else placement for placement in sharding)


def lying(
    graph: OperatorGraph, rules: Rules, splits: Mapping[str, Split], operator: Operator
) -> Lying:
    """How the operator reads its inputs and makes its outputs."""
    name = operator.name
    return _lying(rules[name].shardings(splits[name]), graph.differentiable[name])


@lru_cache(maxsize=4096)
def _lying(shardings: Lying, differentiable: tuple[tuple[bool, ...], ...]) -> Lying:
    ins, outs = (
        tuple(canonical(*pair) for pair in zip(of, flows, strict=True))
        for of, flows in zip(shardings, differentiable, strict=True)
    )
    return ins, outs


def carries_gradient(graph: OperatorGraph, operator: Operator) -> bool:
    """Whether the operator has a backward."""
    return any(graph.differentiable[operator.name][1])


def saves_input(graph: OperatorGraph, operator: Operator, bound: BoundRule, index: int) -> bool:
    """Whether autograd keeps this input of the operator for the backward."""
    what = f"input {index}"
    found = [saved.needs for saved in bound.rule.saves if saved.what == what]
    if not found or not carries_gradient(graph, operator):
        return False
    needed = graph.differentiable[operator.name][0]
    return any(not needs or any(needed[i] for i in needs) for needs in found)


def consumers_by_sharding(
    graph: OperatorGraph, rules: Rules, strategy: Strategy, tensor: str
) -> dict[Sharding, list[tuple[Operator, int]]]:
    """Who wants ``tensor`` in which sharding, in the order of the operators."""
    wanted: dict[Sharding, list[tuple[Operator, int]]] = {}
    for operator, position in graph.consumers[tensor]:
        inputs, _ = lying(graph, rules, strategy.splits, operator)
        wanted.setdefault(inputs[position], []).append((operator, position))
    return wanted


def edges(
    graph: OperatorGraph,
    rules: Rules,
    strategy: Strategy,
    ends: Mapping[str, Sharding] | None = None,
    given: Mapping[str, Sharding] = _NOTHING,
) -> Iterator[Edge]:
    """Every (activation, target sharding) with its consumers, in the order of production.

    Those that need no communication are listed too (source and target may be equal). ``ends``: what
    is wanted at the end beside the new values of buffers, and in which sharding; ``None``: the
    loss, whole. ``given``: inputs that arrive from elsewhere, and how; they come first.
    """
    for name, source in given.items():
        tensor = graph.by_name[name]
        for target, readers in consumers_by_sharding(graph, rules, strategy, name).items():
            consumers = tuple(dict.fromkeys(o.name for o, _ in readers))
            backward = any(carries_gradient(graph, o) for o, _ in readers)
            back = backward and tensor.differentiable
            yield Edge(name, tensor.spec, source, target, consumers, back)
    whole = (INVARIANT,) * len(strategy.mesh.axes)
    wanted_at_end = {graph.loss: whole} if ends is None else dict(ends)
    wanted_at_end.update((tensor, whole) for _, tensor in graph.mutations)
    for operator in graph.operators:
        _, produced = lying(graph, rules, strategy.splits, operator)
        for name, source in zip(operator.outputs, produced, strict=True):
            tensor = graph.by_name[name]
            wanted = consumers_by_sharding(graph, rules, strategy, name)
            names = {
                target: (
                    tuple(dict.fromkeys(o.name for o, _ in readers)),
                    any(carries_gradient(graph, o) for o, _ in readers),
                )
                for target, readers in wanted.items()
            }
            if name in wanted_at_end:
                target = canonical(wanted_at_end[name], tensor.differentiable)
                consumers, _ = names.get(target, ((), False))
                names[target] = ((*consumers, OUTPUT), True)
            for target, (consumers, backward) in names.items():
                yield Edge(
                    name,
                    tensor.spec,
                    source,
                    target,
                    consumers,
                    backward and tensor.differentiable,
                )


def parameter_edges(
    graph: OperatorGraph, rules: Rules, strategy: Strategy, again: Container[str] = ()
) -> Iterator[ParameterEdge]:
    """Every (parameter, use sharding) with its consumers. ``again``: operators that are run again
    for the backward (``Recomputation.again``)."""
    for tensor in graph.of_role(Role.PARAMETER):
        storage = strategy.storage[tensor.name]
        wanted = consumers_by_sharding(graph, rules, strategy, tensor.name)
        for target, readers in wanted.items():
            saving = (
                o.name
                for o, position in readers
                if o.name in again or saves_input(graph, o, rules[o.name], position)
            )
            yield ParameterEdge(
                tensor.name,
                tensor.spec,
                storage,
                target,
                tuple(dict.fromkeys(o.name for o, _ in readers)),
                tuple(dict.fromkeys(saving)),
                tensor.differentiable and any(carries_gradient(graph, o) for o, _ in readers),
            )


def stored_alike(graph: OperatorGraph, strategy: Strategy) -> list[tuple[Tensor, Storage, int]]:
    """The parameters by shape and storage: one of each kind, and how many there are.

    Quick for many layers: what is the same object is not compared.
    """
    first = map(graph.parameters_alike.__getitem__, strategy.storage)
    same = Counter(zip(map(id, first), map(id, strategy.storage.values()), strict=True))
    tensors = {id(tensor): tensor for tensor in graph.parameters_alike.values()}
    storages = {id(storage): storage for storage in strategy.storage.values()}
    equal: Counter[tuple[Tensor, Storage]] = Counter()
    for (tensor, storage), count in same.items():
        equal[tensors[tensor], storages[storage]] += count
    return [(tensor, storage, count) for (tensor, storage), count in equal.items()]
