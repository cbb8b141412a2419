"""Reading and writing at positions that tensors hold: gather, index, scatter."""

from __future__ import annotations

from autopar.ir.graph import Input, Operator, TensorSpec
from autopar.ir.rule import OpRule, RuleMaker, Saved
from autopar.ops.signatures import NoRuleError, broadcast, dim_of, labels, signature

Specs = tuple[TensorSpec, ...]


def gather(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Split by positions (the source is whole then) and by the dims that run along."""
    del outputs
    source, index = inputs[0].shape, inputs[1].shape
    if not source:
        return OpRule(", -> ")
    dim = dim_of(operator.argument(1, "dim"), len(source))
    names = labels(index)
    table = labels(source, "source")
    for i, size in enumerate(index):
        if i != dim and size == source[i]:
            table[i] = names[i]
    short = [i for i, size in enumerate(index) if i != dim and size != source[i]]
    return OpRule(
        signature([table, names], [names]),
        whole=tuple(names[i] for i in short if names[i] != "1"),
        linear=(0,) if inputs[0].is_floating else (),
        saves=(Saved("input 0"), Saved("input 1")),
    )


def index_select(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Split by positions and by the dims that are not looked up."""
    del outputs
    table = labels(inputs[0].shape)
    dim = dim_of(operator.argument(1, "dim"), len(table))
    positions = ["1" if inputs[1].shape in ((), (1,)) else "position"]
    out = [*table[:dim], *positions, *table[dim + 1 :]]
    return OpRule(
        signature([table, positions[: len(inputs[1].shape)]], [out]),
        linear=(0,) if inputs[0].is_floating else (),
        saves=(Saved("input 1"),),
    )


def _indexed(operator: Operator, inputs: Specs) -> tuple[list[list[str]], list[str], list[str]]:
    """Labels of the table, the indices and the result of ``table[i, :, j]``."""
    table = labels(inputs[0].shape, "d")
    indices = operator.argument(1, "indices")
    at = [dim for dim, index in enumerate(indices) if isinstance(index, Input)]
    shapes = [inputs[indices[dim].index].shape for dim in at]
    if any(inputs[indices[dim].index].dtype == "bool" for dim in at):
        raise NoRuleError("the shape of what a mask selects is not known beforehand")
    rank = max((len(shape) for shape in shapes), default=0)
    common = tuple(
        max(shape[i - rank + len(shape)] for shape in shapes if i - rank + len(shape) >= 0)
        for i in range(rank)
    )
    names = labels(common, "position")
    sides = [broadcast(shape, common, names) for shape in shapes]
    adjacent = at == list(range(at[0], at[0] + len(at))) if at else True
    rest = [name for dim, name in enumerate(table) if dim not in at]
    first = at[0] if at and adjacent else 0
    return [table, *sides], [*rest[:first], *names, *rest[first:]], [table[dim] for dim in at]


def index(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """``table[i, :, j]``: split by positions and by the dims that are not indexed."""
    del outputs
    sides, out, _ = _indexed(operator, inputs)
    return OpRule(
        signature(sides, [out]),
        linear=(0,) if inputs[0].is_floating else (),
        saves=tuple(Saved(f"input {i}") for i in range(1, len(inputs))),
    )


def index_put(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Split by the dims that are not indexed; by positions too where values are added up."""
    sides, out, at = _indexed(operator, inputs)
    positions = list(dict.fromkeys(n for side in sides[1:] for n in side if n != "1"))
    adds = bool(operator.argument(3, "accumulate", False)) and inputs[0].is_floating
    known = {
        name: size
        for side, spec in zip(sides, inputs, strict=False)
        for name, size in zip(side, spec.shape, strict=True)
    }
    values = broadcast(inputs[-1].shape, tuple(known[name] for name in out), out)
    del outputs
    return OpRule(
        signature([*sides, values], [sides[0]]),
        whole=tuple(dict.fromkeys(n for n in (*at, *([] if adds else positions)) if n != "1")),
        sums=tuple(positions) if adds else (),
        addends=(0,) if adds else (),
        linear=(0, len(inputs) - 1) if inputs[0].is_floating else (),
        saves=tuple(Saved(f"input {i}") for i in range(1, len(inputs) - 1)),
    )


def scatter(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Split by the dims that run along in all tensors; by positions too where values are added."""
    del outputs
    shape, rank = inputs[0].shape, len(inputs[0].shape)
    dim = dim_of(operator.argument(1, "dim"), rank)
    adds = "add" in operator.op and inputs[0].is_floating
    names = labels(shape)
    positions = labels(inputs[1].shape, "position")
    source = labels(inputs[-1].shape, "source") if len(inputs) == 3 else []
    for i in range(rank):
        if i != dim and all(spec.shape[i] == shape[i] for spec in inputs):
            positions[i] = names[i]
        if source and inputs[1].shape[i] == inputs[2].shape[i]:
            source[i] = positions[i]
    sides = [names, positions, source][: len(inputs)]
    shared = {n for n in names if all(n in side for side in sides)}
    loose = {n for side in sides for n in side} - {"1"} - shared
    # along other dims, position i meets row i of the tensor: a slice would meet the wrong one
    adds = adds and positions[dim] != "1" and positions[dim] == source[dim]
    summed = (positions[dim],) if adds else ()
    return OpRule(
        signature(sides, [names]),
        whole=tuple(sorted(loose - set(summed))),
        sums=summed,
        addends=(0,) if adds else (),
        linear=(0, 2) if len(inputs) == 3 and inputs[0].is_floating else (),
        saves=(Saved("input 1", needs=(2,) if "add" in operator.op else ()),),
    )


def scatter_reduce(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Split by the dims that run along in all tensors only: the largest of a part is not the
    largest."""
    rule = scatter(operator, inputs, outputs)
    kept = (*(Saved(f"input {i}") for i in range(3)), Saved("output 0"))
    return OpRule(rule.signature, whole=rule.whole, saves=kept)


def index_add(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """Adding rows at positions; linear in the tensor and the rows together."""
    del outputs
    names = labels(inputs[0].shape)
    dim = dim_of(operator.argument(1, "dim"), len(names))
    positions = "1" if inputs[1].numel == 1 else "position"
    rows = [*names[:dim], positions, *names[dim + 1 :]]
    return OpRule(
        signature([names, [positions], rows], [names]),
        whole=tuple(n for n in (names[dim],) if n != "1"),
        sums=(positions,) if positions != "1" else (),
        addends=(0,),
        linear=(0, 2) if inputs[0].is_floating else (),
        saves=(Saved("input 1", needs=(2,)), Saved("input 2", needs=(2,))),
    )


def bucketize(operator: Operator, inputs: Specs, outputs: Specs) -> OpRule:
    """The boundaries are needed whole."""
    del operator
    names = labels(outputs[0].shape)
    return OpRule(signature([names, ["boundaries"]], [names]), whole=("boundaries",))


RULES: dict[str, OpRule | RuleMaker] = {
    "aten.gather.default": gather,
    "aten.index_select.default": index_select,
    "aten.index.Tensor": index,
    "aten.index_put.default": index_put,
    "aten.scatter.src": scatter,
    "aten.scatter.value": scatter,
    "aten.scatter_add.default": scatter,
    "aten.scatter_reduce.two": scatter_reduce,
    "aten.index_add.default": index_add,
    "aten.bucketize.Tensor": bucketize,
}
