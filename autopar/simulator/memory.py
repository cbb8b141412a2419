"""Peak memory of one device: the step is walked operator by operator, forward and backward.

Counted: parameters, gradients and optimizer states as they are stored; what autograd saves, until
the operator that saved it has had its backward; tensors that are passed on; gradients of
activations; what redistributions allocate; the optimizer's temporaries. Views share their base's
memory. Left out: the caller's batch, allocator fragmentation, the framework's and the
communication library's own memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import prod

from autopar.ir.graph import ITEM_BYTES, Operator, OperatorGraph, Role, TensorSpec
from autopar.ir.rule import BoundRule
from autopar.ir.sharding import Mesh, Sharding, local_shape
from autopar.ir.simulation import Memory
from autopar.ir.strategy import Storage, Strategy, Training
from autopar.simulator.edges import Rules, canonical, carries_gradient
from autopar.simulator.redistribution import forward_collective, steps

Key = tuple[str, Sharding]
"""A tensor in one of its shardings."""


def local_bytes(spec: TensorSpec, sharding: Sharding, mesh: Mesh) -> int:
    return prod(local_shape(spec.shape, sharding, mesh)) * ITEM_BYTES[spec.dtype]


def optimizer_bytes_per_element(spec: TensorSpec, training: Training) -> int:
    """Optimizer state beside the parameter: moments, and with mixed precision an fp32 copy.

    States have the parameter's dtype in full precision and are fp32 in mixed precision.
    """
    if training.precision == "mixed":
        return 4 * (training.state_tensors + 1)
    return training.state_tensors * ITEM_BYTES[spec.dtype]


def stored_bytes(
    spec: TensorSpec, storage: Storage, training: Training, mesh: Mesh, *, trained: bool
) -> tuple[int, int, int]:
    """Parameter, gradient and optimizer state that a device keeps for one parameter."""
    parameter = local_bytes(spec, storage.parameter, mesh)
    if not trained:
        return parameter, 0, 0
    elements = prod(local_shape(spec.shape, storage.optimizer, mesh))
    return (
        parameter,
        local_bytes(spec, storage.gradient, mesh),
        elements * optimizer_bytes_per_element(spec, training),
    )


def copies(source: Sharding, target: Sharding) -> bool:
    """Whether the redistribution allocates; else the result is the same memory (I to R)."""
    return any(
        forward_collective(step) is not None or step.target[0] in "SP"
        for step in steps(source, target)
    )


@dataclass
class _Block:
    """A piece of device memory and how many need it still."""

    size_bytes: int
    kind: str
    users: int = 0


@dataclass
class _Walk:
    """Where the walk stands: blocks by what they hold, and the peak so far."""

    graph: OperatorGraph
    rules: Rules
    strategy: Strategy
    live: Counter[str] = field(default_factory=Counter)
    blocks: dict[Key, _Block] = field(default_factory=dict)
    peak: tuple[int, Counter[str], str] = (0, Counter(), "")

    def mark(self, where: str, extra_bytes: int = 0) -> None:
        total = sum(self.live.values()) + extra_bytes
        if total > self.peak[0]:
            at_peak = self.live.copy()
            at_peak["temporaries"] += extra_bytes
            self.peak = (total, at_peak, where)

    def allocate(self, size_bytes: int, kind: str) -> _Block:
        self.live[kind] += size_bytes
        return _Block(size_bytes, kind)

    def hold(self, block: _Block) -> _Block:
        block.users += 1
        return block

    def release(self, block: _Block) -> None:
        block.users -= 1
        if block.users == 0:
            self.live[block.kind] -= block.size_bytes

    def relabel(self, block: _Block, kind: str) -> None:
        self.live[block.kind] -= block.size_bytes
        self.live[kind] += block.size_bytes
        block.kind = kind


def peak_memory(graph: OperatorGraph, rules: Rules, strategy: Strategy) -> Memory:
    """Bytes on one device at the worst moment of a step (all ranks are alike)."""
    walk = _Walk(graph, rules, strategy)
    _keep_parameters(walk)
    saved = _forward(walk)
    _backward(walk, saved)
    _optimizer(walk)
    _, at_peak, where = walk.peak
    return Memory(
        parameters_bytes=at_peak["parameters"],
        gradients_bytes=at_peak["gradients"],
        optimizer_bytes=at_peak["optimizer"],
        activations_bytes=at_peak["activations"],
        temporaries_bytes=at_peak["temporaries"],
        buffers_bytes=at_peak["buffers"],
        at=where,
    )


def _keep_parameters(walk: _Walk) -> None:
    mesh, training = walk.strategy.mesh, walk.strategy.training
    for name, storage in walk.strategy.storage.items():
        tensor = walk.graph.by_name[name]
        parameter, _, optimizer = stored_bytes(
            tensor.spec, storage, training, mesh, trained=tensor.differentiable
        )
        walk.live["parameters"] += parameter
        walk.live["optimizer"] += optimizer
    for role in (Role.BUFFER, Role.CONSTANT):
        walk.live["parameters"] += sum(t.spec.bytes for t in walk.graph.of_role(role))


def _wanted(walk: _Walk, operator: Operator) -> list[Key]:
    inputs, _ = walk.rules[operator.name].shardings(walk.strategy.splits[operator.name])
    by_name = walk.graph.by_name
    return [
        (name, canonical(sharding, by_name[name].differentiable))
        for name, sharding in zip(operator.inputs, inputs, strict=True)
    ]


def _last_uses(walk: _Walk) -> tuple[dict[Key, int], dict[str, int]]:
    """The last operator that reads each version, and the last that reads any of a tensor's."""
    versions: dict[Key, int] = {}
    tensors: dict[str, int] = {}
    for index, operator in enumerate(walk.graph.operators):
        for key in _wanted(walk, operator):
            versions[key] = index
            tensors[key[0]] = index
    for name in (walk.graph.loss, *(tensor for _, tensor in walk.graph.mutations)):
        tensors[name] = len(walk.graph.operators)
    return versions, tensors


def _forward(walk: _Walk) -> dict[str, list[_Block]]:
    """Walk the forward; returns what each operator saved."""
    mesh = walk.strategy.mesh
    last_version, last_any = _last_uses(walk)
    ends: dict[int, list[Key]] = {}
    for key, index in last_version.items():
        ends.setdefault(index, []).append(key)
    produced: dict[str, Sharding] = {}
    saved: dict[str, list[_Block]] = {}
    for index, operator in enumerate(walk.graph.operators):
        bound = walk.rules[operator.name]
        wanted = _wanted(walk, operator)
        for key in wanted:
            _make_version(walk, produced, key)
        _, shardings = bound.shardings(walk.strategy.splits[operator.name])
        for name, sharding in zip(operator.outputs, shardings, strict=True):
            tensor = walk.graph.by_name[name]
            home = canonical(sharding, tensor.differentiable)
            produced[name] = home
            base = _base(walk, bound, wanted)
            block = base or walk.allocate(local_bytes(tensor.spec, home, mesh), "temporaries")
            walk.blocks[name, home] = walk.hold(block)
        walk.mark(f"{operator.name} forward")
        saved[operator.name] = _save(walk, operator, bound, wanted, produced)
        _forget(walk, operator, index, ends, produced, last_any)
    return saved


def _base(walk: _Walk, bound: BoundRule, wanted: list[Key]) -> _Block | None:
    """The memory that a view shares."""
    if bound.rule.kind != "view" or not wanted:
        return None
    return walk.blocks.get(wanted[0])


def _make_version(walk: _Walk, produced: dict[str, Sharding], key: Key) -> None:
    """Have ``key`` in memory: a slice of an input, a gathered parameter, a redistribution."""
    if key in walk.blocks:
        return
    name, target = key
    tensor, mesh = walk.graph.by_name[name], walk.strategy.mesh
    size = local_bytes(tensor.spec, target, mesh)
    if name in produced:
        source = produced[name]
        home = walk.blocks.get((name, source))
        same = home is not None and not copies(source, target)
        block = home if same and home else walk.allocate(size, "buffers")
    elif tensor.role is Role.PARAMETER:
        storage = walk.strategy.storage[name]
        if not copies(storage.parameter, target):
            return  # the stored parameter itself
        block = walk.allocate(size, "buffers")
    elif tensor.role is Role.INPUT or target != canonical(
        ("I",) * len(target), tensor.differentiable
    ):
        block = walk.allocate(size, "temporaries")
    else:
        return  # a whole buffer or constant, already counted
    walk.blocks[key] = walk.hold(block)


def _save(
    walk: _Walk,
    operator: Operator,
    bound: BoundRule,
    wanted: list[Key],
    produced: dict[str, Sharding],
) -> list[_Block]:
    """Hold what autograd keeps; gathered parameters are not kept but gathered again."""
    if not carries_gradient(walk.graph, operator):
        return []
    needed = [walk.graph.by_name[name].differentiable for name in operator.inputs]
    held: list[_Block] = []
    for item in bound.rule.saves:
        if item.needs and not any(needed[i] for i in item.needs):
            continue
        what, _, number = item.what.rpartition(" ")
        if what == "input":
            key = wanted[int(number)]
            if walk.graph.by_name[key[0]].role is Role.PARAMETER and _gathered(walk, key):
                continue
            block = walk.blocks.get(key)
        elif what == "output":
            name = operator.outputs[int(number)]
            block = walk.blocks.get((name, produced[name]))
        else:
            sizes = bound.local_sizes(walk.strategy.splits[operator.name], walk.strategy.mesh)
            elements = prod(
                size
                for factor, size in sizes.items()
                if factor in item.what.split()
                or ("..." in item.what.split() and factor.startswith("..."))
            )
            dtype = item.dtype or bound.output_specs[0].dtype
            block = walk.allocate(elements * ITEM_BYTES[dtype], "activations")
        if block is not None:
            if block.kind != "activations":
                walk.relabel(block, "activations")
            held.append(walk.hold(block))
    return held


def _gathered(walk: _Walk, key: Key) -> bool:
    name, target = key
    return any(
        s.startswith("S") and s != t
        for s, t in zip(walk.strategy.storage[name].parameter, target, strict=True)
    )


def _forget(
    walk: _Walk,
    operator: Operator,
    index: int,
    ends: dict[int, list[Key]],
    produced: dict[str, Sharding],
    last_any: dict[str, int],
) -> None:
    """Drop the program's own references to what no later operator reads."""
    keys: set[Key] = set(ends.get(index, ()))
    for name in {*operator.inputs, *operator.outputs}:
        if name in produced and last_any.get(name, index) <= index:
            keys.add((name, produced[name]))
    for key in keys:
        name = key[0]
        if name in produced and key[1] == produced[name] and last_any.get(name, index) > index:
            continue  # other versions are still made from it
        block = walk.blocks.pop(key, None)
        if block is not None:
            walk.release(block)


def _backward(walk: _Walk, saved: dict[str, list[_Block]]) -> None:
    """Walk the backward: gradients of outputs in, gradients of inputs out, saved tensors freed."""
    gradients: dict[Key, _Block] = {}
    produced = _productions(walk)
    remaining = _gradient_readers(walk)
    for operator in reversed(walk.graph.operators):
        if not carries_gradient(walk.graph, operator):
            continue
        bound = walk.rules[operator.name]
        incoming = _incoming(walk, operator, gradients, produced)
        transient = _regathered_bytes(walk, operator, saved)
        _outgoing(walk, operator, bound, gradients, incoming)
        walk.mark(f"{operator.name} backward", transient)
        for block in (*incoming, *saved[operator.name]):
            walk.release(block)
        _finish_parameters(walk, operator, gradients, remaining)
    for block in gradients.values():
        walk.release(block)


def _productions(walk: _Walk) -> dict[str, Sharding]:
    return {
        name: sharding
        for operator in walk.graph.operators
        for name, sharding in zip(
            operator.outputs,
            walk.rules[operator.name].shardings(walk.strategy.splits[operator.name])[1],
            strict=True,
        )
    }


def _gradient_readers(walk: _Walk) -> Counter[Key]:
    """How many operators will still contribute to the gradient of each parameter version."""
    readers: Counter[Key] = Counter()
    for operator in walk.graph.operators:
        if carries_gradient(walk.graph, operator):
            readers.update(
                key
                for key in set(_wanted(walk, operator))
                if walk.graph.by_name[key[0]].role is Role.PARAMETER
            )
    return readers


def _incoming(
    walk: _Walk,
    operator: Operator,
    gradients: dict[Key, _Block],
    produced: dict[str, Sharding],
) -> list[_Block]:
    """The gradients of the operator's outputs, summed over the versions that were read."""
    mesh = walk.strategy.mesh
    found = []
    for name in operator.outputs:
        tensor = walk.graph.by_name[name]
        versions = [key for key in gradients if key[0] == name]
        if not versions:
            continue
        home = next((key for key in versions if not copies(produced[name], key[1])), None)
        if home is None or len(versions) > 1:
            block = walk.hold(
                walk.allocate(local_bytes(tensor.spec, produced[name], mesh), "temporaries")
            )
            walk.mark(f"{operator.name} backward")
            for key in versions:
                walk.release(gradients.pop(key))
        else:
            block = gradients.pop(home)
        found.append(block)
    return found


def _outgoing(
    walk: _Walk,
    operator: Operator,
    bound: BoundRule,
    gradients: dict[Key, _Block],
    incoming: list[_Block],
) -> None:
    """Gradients of the differentiable inputs; a view's gradient shares its output's memory."""
    mesh = walk.strategy.mesh
    for key in _wanted(walk, operator):
        tensor = walk.graph.by_name[key[0]]
        if not tensor.differentiable or tensor.role is Role.INPUT:
            continue
        passes_on = bound.rule.kind == "view" and incoming
        if key in gradients:
            continue  # added to what is there
        if passes_on:
            gradients[key] = walk.hold(incoming[0])
        else:
            kind = "gradients" if tensor.role is Role.PARAMETER else "temporaries"
            size = local_bytes(tensor.spec, key[1], mesh)
            gradients[key] = walk.hold(walk.allocate(size, kind))


def _regathered_bytes(walk: _Walk, operator: Operator, saved: dict[str, list[_Block]]) -> int:
    """Parameters that are gathered again for this backward."""
    mesh = walk.strategy.mesh
    return sum(
        local_bytes(walk.graph.spec(key[0]), key[1], mesh)
        for key in set(_wanted(walk, operator))
        if walk.graph.by_name[key[0]].role is Role.PARAMETER and _gathered(walk, key)
    )


def _finish_parameters(
    walk: _Walk, operator: Operator, gradients: dict[Key, _Block], remaining: Counter[Key]
) -> None:
    """A parameter version's gradient is complete: bring it to where it is stored."""
    mesh = walk.strategy.mesh
    for key in set(_wanted(walk, operator)):
        name, _target = key
        if key not in remaining or key not in gradients:
            continue
        remaining[key] -= 1
        if remaining[key]:
            continue
        storage = walk.strategy.storage[name]
        kept = local_bytes(walk.graph.spec(name), storage.gradient, mesh)
        block = gradients.pop(key)
        if kept != block.size_bytes:
            walk.hold(walk.allocate(kept, "gradients"))
            walk.mark(f"{name} gradient")
            walk.release(block)
        # else it stays where it is until the optimizer has used it


def _optimizer(walk: _Walk) -> None:
    """The largest parameter's update needs two temporaries of its shard's size."""
    mesh = walk.strategy.mesh
    shards: Iterable[int] = (
        local_bytes(walk.graph.spec(name), storage.optimizer, mesh)
        for name, storage in walk.strategy.storage.items()
        if walk.graph.by_name[name].differentiable
    )
    walk.mark("optimizer step", 2 * max(shards, default=0))
