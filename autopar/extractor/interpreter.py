"""``execute``: the graph on one process, one operator after the other; what all else must equal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from autopar.ir.graph import Argument, Dtype, Input, Operator, OperatorGraph, Role, TensorSpec
from autopar.ops.grouped import GATHER_BMM


def execute(
    graph: OperatorGraph,
    state: Mapping[str, torch.Tensor],
    inputs: tuple[torch.Tensor, ...] | Mapping[str, torch.Tensor],
    *,
    environment: dict[str, torch.Tensor] | None = None,
) -> torch.Tensor:
    """The loss, ready for ``backward``.

    ``state`` has the parameters and buffers by name; buffers in ``graph.mutations`` are updated in
    place, as the model does. ``environment``, if given, receives every tensor by name.
    """
    values = {} if environment is None else environment
    values.update({t.name: state[t.name] for t in graph.tensors if t.role in _STATE})
    for buffer, _ in graph.mutations:
        values[buffer] = state[buffer].clone()  # autograd keeps what the operators read
    values.update(bind_inputs(graph, inputs))
    device = next(iter(values.values())).device if values else torch.device("cpu")
    for name, value in graph.constants:
        values[name] = constant(graph.spec(name), value, device)
    for o in graph.operators:
        outputs = call(o, [values[name] for name in o.inputs], device)
        for name, output in zip(o.outputs, outputs, strict=True):
            stops = output.requires_grad and not graph.by_name[name].differentiable
            values[name] = output.detach() if stops else output
    with torch.no_grad():
        for buffer, name in graph.mutations:
            state[buffer].copy_(values[name])
    return values[graph.loss]


_STATE = (Role.PARAMETER, Role.BUFFER)


def bind_inputs(
    graph: OperatorGraph, inputs: tuple[torch.Tensor, ...] | Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The batch by tensor name; given as the model takes it."""
    if isinstance(inputs, Mapping):
        keyed = zip(graph.inputs, graph.input_keys, strict=True)
        return {name: inputs[key or name] for name, key in keyed}
    return dict(zip(graph.inputs, inputs, strict=True))


def constant(spec: TensorSpec, value: Any, device: torch.device) -> torch.Tensor:
    """A tensor of ``OperatorGraph.constants``."""
    return torch.tensor(value, dtype=dtype(spec.dtype), device=device).reshape(spec.shape)


def dtype(name: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, name)
    return found


def overload(op: str) -> torch._ops.OpOverload:
    """The torch operator of a name like ``aten.linear.default``."""
    namespace, name, variant = op.split(".")
    found: torch._ops.OpOverload = getattr(getattr(getattr(torch.ops, namespace), name), variant)
    return found


OWN: dict[str, Callable[..., torch.Tensor]] = {
    GATHER_BMM: lambda a, b, index, table: (
        torch.bmm(a, b[index]) if table else torch.bmm(a[index], b)
    )
}
"""The ops that graphs have and torch has not, by what they mean."""


def is_known(op: str) -> bool:
    """Whether such an op is registered here."""
    if op in OWN:
        return True
    try:
        overload(op)
    except AttributeError:
        return False
    return True


def call(o: Operator, inputs: list[torch.Tensor], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Run one operator; tensors that it makes from nothing are made on ``device``."""
    arguments = [_value(a, inputs) for a in o.arguments]
    if o.op in OWN:
        return (OWN[o.op](*arguments),)
    target = overload("aten.reshape.default" if o.op == "aten.view.default" else o.op)
    keywords = {key: _value(a, inputs) for key, a in o.keywords}
    if not inputs and any(a.name == "device" for a in target._schema.arguments):
        keywords["device"] = device
    result = target(*arguments, **keywords)
    if isinstance(result, torch.Tensor):
        return (result,)
    return tuple(tensor for tensor in result if tensor is not None)


def _value(argument: Argument, inputs: list[torch.Tensor]) -> Any:
    match argument:
        case Input(index):
            return inputs[index]
        case Dtype(name):
            return dtype(name)
        case tuple():
            return [_value(item, inputs) for item in argument]
    return argument
