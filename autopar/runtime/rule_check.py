"""Executes a rule: every legal split of an operator, joined, must equal the whole operator."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor

from autopar.ir.graph import ITEM_BYTES, Argument, Dtype, Input, Operator, TensorSpec
from autopar.ir.rule import NOTHING, REPLICATED, BoundRule, OpRule, Split, bind
from autopar.ir.sharding import (
    PARTIAL,
    Mesh,
    Sharding,
    gradient,
    local_ranges,
    local_shape,
    sharded_dim,
)
from autopar.ops.draws import draws
from autopar.runtime.grouped import BY_DEFINITION
from autopar.runtime.local_ops import LOCAL_OPS, ReduceOp, aten, needs_local_op
from autopar.runtime.pieces import held

Specs = tuple[TensorSpec, ...]
Draw = Callable[[Operator, Specs, int, torch.Generator], Tensor | None]
"""(operator, input specs, position, generator) -> that input; ``None``: the usual way."""

MESHES = (Mesh((("a", 2),)), Mesh((("a", 3),)), Mesh((("a", 2), ("b", 2))))
TOLERANCE = 1e-9  # relative, in float64: the order of sums differs
COLLECTIVE_TIMEOUT_S = 5.0  # a rank that never comes


@dataclass(frozen=True, slots=True)
class Failure:
    """What went wrong, and under which split of which mesh."""

    split: Split
    mesh: tuple[int, ...]
    seed: int
    what: str

    def __str__(self) -> str:
        return f"{self.split} on {self.mesh}, seed {self.seed}: {self.what}"


def check(
    operator: Operator,
    input_specs: Specs,
    output_specs: Specs,
    rule: OpRule,
    *,
    meshes: Sequence[Mesh] = MESHES,
    seeds: Sequence[int] = (0, 1),
    differentiable: Sequence[int] | None = None,
    draw: Draw | None = None,
    saves: bool = True,
) -> list[Failure]:
    """Run ``operator`` whole and as ranks under every legal split; an empty list is a pass.

    Compared: outputs, gradients of all ``differentiable`` inputs (default: the floating ones),
    inner collectives with those that the rule declares, and (``saves``) what autograd keeps. Specs
    should be float64. Data is signed, and indices take their full range.
    """
    bound = bind(rule, input_specs, output_specs)
    if differentiable is None:
        differentiable = [i for i, spec in enumerate(input_specs) if spec.is_floating]
    case = _Case(operator, bound, tuple(differentiable))
    failures: list[Failure] = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        inputs = [
            _drawn(operator, input_specs, i, generator, draw) for i in range(len(input_specs))
        ]
        try:
            whole = case.whole(inputs, generator)
        except Exception as error:
            return [Failure((), (), seed, f"the whole operator raises {error!r}")]
        if whole.mismatch:
            failures.append(Failure((), (), seed, whole.mismatch))
        if saves and seed == seeds[0]:
            failures += [Failure((), (), seed, text) for text in case.kept(inputs)]
        for mesh in meshes:
            for split in bound.splits(mesh):
                if len(split) > 1 and all(c in (NOTHING, REPLICATED) for c in split):
                    continue
                for what in case.divided(inputs, whole, split, mesh, generator):
                    failures.append(Failure(split, mesh.sizes, seed, what))
    return failures


def widened(
    operator: Operator, input_specs: Specs, output_specs: Specs
) -> tuple[Operator, Specs, Specs]:
    """The same call in float64, where a sum's order does not hide a wrong rule."""

    def wide(name: str) -> str:
        return "float64" if name in _NARROW else name

    def widen(argument: Argument) -> Argument:
        match argument:
            case Dtype(name):
                return Dtype(wide(name))
            case tuple():
                return tuple(widen(item) for item in argument)
            case _:
                return argument

    def specs(given: Specs) -> Specs:
        return tuple(TensorSpec(spec.shape, wide(spec.dtype)) for spec in given)

    changed = replace(
        operator,
        arguments=widen(operator.arguments),
        keywords=tuple((k, widen(v)) for k, v in operator.keywords),
    )
    return changed, specs(input_specs), specs(output_specs)


_NARROW = ("float32", "float16", "bfloat16")


# --- data ----------------------------------------------------------------------------------------


def _drawn(
    operator: Operator, specs: Specs, position: int, generator: torch.Generator, draw: Draw | None
) -> Tensor:
    if draw is not None:
        found = draw(operator, specs, position, generator)
        if found is not None:
            return found
    return signed_data(specs[position], generator)


def signed_data(spec: TensorSpec, generator: torch.Generator) -> Tensor:
    """Normal numbers; integers of both signs but not zero, which divides; booleans."""
    dtype = getattr(torch, spec.dtype)
    if spec.is_floating:
        wide = torch.complex128 if dtype.is_complex else torch.float64
        return torch.randn(spec.shape, generator=generator, dtype=wide).to(dtype)
    if spec.dtype == "bool":
        return torch.rand(spec.shape, generator=generator) < 0.5
    size = torch.randint(1, 5, spec.shape, generator=generator)
    sign = torch.randint(0, 2, spec.shape, generator=generator) * 2 - 1
    return (size * sign).to(dtype)


def index_data(spec: TensorSpec, count: int, generator: torch.Generator) -> Tensor:
    """Indices below ``count``, the first and the last among them."""
    data = torch.randint(0, count, spec.shape, generator=generator)
    if data.numel() > 1:
        data.view(-1)[0], data.view(-1)[-1] = count - 1, 0
    return data.to(getattr(torch, spec.dtype))


# --- one rank and its peers ----------------------------------------------------------------------


class Group:
    """Ranks in threads that meet at a barrier."""

    def __init__(self, mesh: Mesh) -> None:
        self.mesh = mesh
        self.barrier = threading.Barrier(max(mesh.size, 1), timeout=COLLECTIVE_TIMEOUT_S)
        self.posted: dict[int, Tensor] = {}

    def all_reduce(self, rank: int, tensor: Tensor, axis: int, op: ReduceOp) -> Tensor:
        self.posted[rank] = tensor
        self.barrier.wait()
        peers = [self.posted[peer] for peer in self.mesh.group(axis, rank)]
        self.barrier.wait()
        stacked = torch.stack(peers)
        return stacked.sum(0) if op == "sum" else stacked.amax(0)


@dataclass
class RankContext:
    """``LocalContext`` of one rank, noting its collectives and what autograd keeps."""

    bound: BoundRule
    split: Split
    mesh: Mesh
    rank: int
    group: Group
    seed: int = 5
    operator_id: int = 7
    divisor: Tensor | None = None
    phase: str = "forward"
    done: Counter[tuple[int, str, str, int]] = field(default_factory=Counter)
    kept: list[Tensor] = field(default_factory=list)
    extra: str = ""

    def axes(self, factor: str) -> tuple[int, ...]:
        return tuple(axis for axis, choice in enumerate(self.split) if choice == factor)

    def offset(self, factor: str) -> int:
        length, start = self.bound.sizes[factor], 0
        for axis in self.axes(factor):
            length //= self.mesh.sizes[axis]
            start += self.mesh.coordinates(self.rank)[axis] * length
        return start

    def all_reduce(self, tensor: Tensor, axis: int, op: ReduceOp = "sum") -> Tensor:
        self.done[axis, "all_reduce", self.phase, tensor.numel() * tensor.element_size()] += 1
        return self.group.all_reduce(self.rank, tensor.detach(), axis, op)


# --- whole and divided ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Result:
    """Outputs; cotangents (``None``: not differentiable); gradients by position."""

    outputs: list[Tensor]
    cotangents: list[Tensor | None]
    gradients: dict[int, Tensor]
    mismatch: str = ""


@dataclass(frozen=True)
class _Case:
    operator: Operator
    bound: BoundRule
    differentiable: tuple[int, ...]

    def whole(self, inputs: list[Tensor], generator: torch.Generator) -> _Result:
        """The plain op; the local implementation where only that is deterministic."""
        mesh = Mesh(())
        context = RankContext(self.bound, (), mesh, 0, Group(mesh))
        tensors = self._leaves(inputs)
        mismatch = ""
        if self._random:
            outputs = self._call(context, self.operator, tensors)
        else:
            outputs = listed(plain(self.operator, tensors))
            if needs_local_op(self.bound, ()):
                own = self._call(context, self.operator, self._leaves(inputs))
                if not all(map(close, own, outputs)):
                    mismatch = "the local implementation differs from the op"
        cotangents = [
            torch.randn(o.shape, generator=generator, dtype=torch.float64).to(o.dtype)
            if o.requires_grad
            else None
            for o in outputs
        ]
        gradients = self._gradients(tensors, outputs, cotangents)
        return _Result([o.detach() for o in outputs], cotangents, gradients, mismatch)

    @property
    def _random(self) -> bool:
        attends = self.bound.rule.kind == "attention"
        return draws(self.operator.op) or (
            attends and bool(self.operator.argument(4, "dropout_p", 0.0))
        )

    def divided(
        self,
        inputs: list[Tensor],
        whole: _Result,
        split: Split,
        mesh: Mesh,
        generator: torch.Generator,
    ) -> Iterator[str]:
        """What differs when the ranks of ``mesh`` share the work by ``split``."""
        wanted, produced = self.bound.shardings(split)
        shares = [
            spread(value, sharding, mesh, generator)
            for value, sharding in zip(inputs, wanted, strict=True)
        ]
        cotangents = [
            None if value is None else spread(value, gradient(sharding), mesh, generator)
            for value, sharding in zip(whole.cotangents, produced, strict=True)
        ]
        local = self._localized(wanted, produced, mesh)
        group = Group(mesh)

        def run(rank: int) -> tuple[list[Tensor], dict[int, Tensor], RankContext]:
            context = RankContext(self.bound, split, mesh, rank, group)
            tensors = self._leaves([share[rank] for share in shares])
            with _recording(context.kept):
                outputs = self._call(context, local, tensors)
            if rank == 0 and needs_local_op(self.bound, split):
                context.extra = self._extra(context.kept, tensors, outputs, split, mesh)
            mine = [None if c is None else c[rank] for c in cotangents]
            context.phase = "backward"
            gradients = self._gradients(tensors, outputs, mine)
            return [o.detach() for o in outputs], gradients, context

        try:
            ranks = _run_all(run, mesh.size, together=needs_local_op(self.bound, split))
        except Exception as error:
            yield f"a rank raises {type(error).__name__}: {error}"
            return
        for i, sharding in enumerate(produced):
            spec = self.bound.output_specs[i]
            yield from _compared(
                f"output {i}", whole.outputs[i], [r[0][i] for r in ranks], sharding, mesh, spec
            )
        for i in self.differentiable:
            yield from _compared(
                f"gradient of input {i}",
                whole.gradients[i],
                [r[1][i] for r in ranks],
                gradient(wanted[i]),
                mesh,
                self.bound.input_specs[i],
            )
        if ranks[0][2].extra:
            yield ranks[0][2].extra
        declared = self._declared(split, mesh)
        for rank, (_, _, context) in enumerate(ranks):
            if context.done != declared:
                yield (
                    f"rank {rank} did the collectives {dict(context.done)} (axis, kind, phase, "
                    f"bytes), the rule declares {dict(declared)}"
                )
                break

    def _declared(self, split: Split, mesh: Mesh) -> Counter[tuple[int, str, str, int]]:
        sizes = self.bound.local_sizes(split, mesh)
        found: Counter[tuple[int, str, str, int]] = Counter()
        for axis, choice in enumerate(split):
            for inner in self.bound.rule.inner:
                if inner.factor != choice:
                    continue
                if inner.phase == "backward" and not self.differentiable:
                    continue
                dtype = inner.dtype or self.bound.input_specs[0].dtype
                count = prod(sizes[f] for f in inner.points.split()) * inner.times
                found[axis, inner.kind, inner.phase, count * ITEM_BYTES[dtype]] += 1
        return found

    def _localized(
        self, wanted: Sequence[Sharding], produced: Sequence[Sharding], mesh: Mesh
    ) -> Operator:
        if self.bound.rule.localize is None:
            return self.operator
        ins, outs = (
            tuple(local_shape(x.shape, s, mesh) for x, s in zip(specs, sides, strict=True))
            for specs, sides in (
                (self.bound.input_specs, wanted),
                (self.bound.output_specs, produced),
            )
        )
        return self.bound.rule.localize(self.operator, ins, outs)

    def _leaves(self, inputs: Iterable[Tensor]) -> list[Tensor]:
        return [
            x.detach().clone().requires_grad_(i in self.differentiable)
            for i, x in enumerate(inputs)
        ]

    def _call(
        self, context: RankContext, operator: Operator, tensors: list[Tensor]
    ) -> list[Tensor]:
        if not needs_local_op(context.bound, context.split):
            return listed(plain(operator, tensors))
        values, keywords = _arguments(operator, tensors)
        return listed(LOCAL_OPS[operator.op](context, operator, values, keywords))

    def _gradients(
        self, tensors: list[Tensor], outputs: list[Tensor], cotangents: list[Tensor | None]
    ) -> dict[int, Tensor]:
        pairs = [
            (o, c)
            for o, c in zip(outputs, cotangents, strict=True)
            if c is not None and o.requires_grad
        ]
        leaves = [tensors[i] for i in self.differentiable]
        if not pairs or not leaves:
            return {i: torch.zeros_like(tensors[i]) for i in self.differentiable}
        found = torch.autograd.grad(
            [o for o, _ in pairs], leaves, [c for _, c in pairs], materialize_grads=True
        )
        return dict(zip(self.differentiable, found, strict=True))

    # --- what autograd keeps ---

    def kept(self, inputs: list[Tensor]) -> Iterator[str]:
        """Where ``saves`` differs from what autograd keeps of the whole operator."""
        patterns = {self.differentiable, *((i,) for i in self.differentiable)}
        for pattern in sorted(patterns):
            yield from replace(self, differentiable=pattern)._kept(inputs)

    def _kept(self, inputs: list[Tensor]) -> Iterator[str]:
        mesh = Mesh(())
        context = RankContext(self.bound, (), mesh, 0, Group(mesh))
        tensors = self._leaves(inputs)
        operator = self._localized(*self.bound.shardings(()), mesh)
        found: list[Tensor] = []
        with _recording(found):
            outputs = self._call(context, operator, tensors)
        if not any(o.requires_grad for o in outputs):
            return
        real, own_bytes = _classified(found, tensors, outputs)
        expected, expected_bytes = self._expected(self.bound.sizes)
        label = f"(inputs {self.differentiable} differentiable)"
        if real != expected:
            yield f"autograd keeps {sorted(real)}, the rule says {sorted(expected)} {label}"
        if abs(own_bytes - expected_bytes) > _NEGLIGIBLE_BYTES:
            yield (
                f"autograd keeps {own_bytes} bytes besides inputs and outputs, "
                f"the rule says {expected_bytes} {label}"
            )

    def _extra(
        self,
        found: list[Tensor],
        inputs: list[Tensor],
        outputs: list[Tensor],
        split: Split,
        mesh: Mesh,
    ) -> str:
        """What a local implementation keeps beyond ``saves``; it may keep less."""
        if not any(o.requires_grad for o in outputs):
            return ""
        names, own = _classified(found, inputs, outputs)
        allowed, own_allowed = self._expected(self.bound.local_sizes(split, mesh))
        if names <= allowed and own <= own_allowed + _NEGLIGIBLE_BYTES:
            return ""
        return (
            f"the local implementation keeps {sorted(names)} and {own} bytes, "
            f"the rule says {sorted(allowed)} and {own_allowed}"
        )

    def _expected(self, sizes: dict[str, int]) -> tuple[set[str], int]:
        names: set[str] = set()
        own = 0
        for saved in self.bound.rule.saves:
            if saved.needs and not set(saved.needs) & set(self.differentiable):
                continue
            if saved.what.startswith(("input ", "output ")):
                names.add(saved.what)
            else:
                dtype = saved.dtype or self.bound.output_specs[0].dtype
                own += prod(sizes[f] for f in saved.what.split()) * ITEM_BYTES[dtype]
        return names, own


_NEGLIGIBLE_BYTES = 24  # a few numbers of dimension 0


@contextmanager
def _recording(found: list[Tensor]) -> Iterator[None]:
    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield


def kept_tensors(
    operator: Operator, inputs: Sequence[Tensor], differentiable: Sequence[int]
) -> tuple[set[str], list[Tensor]]:
    """Names of the inputs and outputs that autograd keeps, and the tensors of its own."""
    leaves = [x.detach().clone().requires_grad_(i in differentiable) for i, x in enumerate(inputs)]
    found: list[Tensor] = []
    with _recording(found):
        outputs = listed(plain(operator, leaves))
    return _sorted_out(found, leaves, outputs)


def _sorted_out(
    found: list[Tensor], inputs: list[Tensor], outputs: list[Tensor]
) -> tuple[set[str], list[Tensor]]:
    known: dict[int, str] = {}
    for kind, tensors in (("output", outputs), ("input", inputs)):
        for i, tensor in enumerate(tensors):
            known[tensor.untyped_storage().data_ptr()] = f"{kind} {i}"
    names: set[str] = set()
    own: dict[int, Tensor] = {}
    for tensor in found:
        pointer = tensor.untyped_storage().data_ptr()
        if tensor.numel() == 0:
            continue
        if pointer in known:
            names.add(known[pointer])
        else:
            own[pointer] = tensor
    return names, list(own.values())


def _classified(
    found: list[Tensor], inputs: list[Tensor], outputs: list[Tensor]
) -> tuple[set[str], int]:
    """Names of kept inputs and outputs, and bytes of other storages."""
    names, own = _sorted_out(found, inputs, outputs)
    return names, sum(tensor.untyped_storage().nbytes() for tensor in own)


def _run_all(
    run: Callable[[int], Any], ranks: int, *, together: bool
) -> list[tuple[list[Tensor], dict[int, Tensor], RankContext]]:
    if not together:
        return [run(rank) for rank in range(ranks)]
    with ThreadPoolExecutor(ranks) as pool:
        return list(pool.map(run, range(ranks)))


# --- placing and joining -------------------------------------------------------------------------


def spread(
    value: Tensor, sharding: Sharding, mesh: Mesh, generator: torch.Generator
) -> list[Tensor]:
    """What each rank holds of ``value``; partial sums are random addends."""
    partial = [axis for axis, placement in enumerate(sharding) if placement == PARTIAL]
    keys = list(product(*(range(mesh.sizes[axis]) for axis in partial)))
    addends: dict[tuple[int, ...], Tensor] = {}
    rest = value
    for key in keys[:-1]:
        noise = torch.randn(value.shape, generator=generator, dtype=torch.float64)
        addends[key] = noise.to(value.dtype)
        rest = rest - addends[key]
    addends[keys[-1]] = rest
    shares = []
    for rank in range(mesh.size):
        where = mesh.coordinates(rank)
        whole = addends[tuple(where[axis] for axis in partial)]
        shares.append(held(whole, sharding, mesh, rank).clone())
    return shares


def indices(shape: Sequence[int], sharding: Sharding, mesh: Mesh, rank: int) -> tuple[Tensor, ...]:
    """Where in the whole tensor what ``rank`` holds of it belongs."""
    along = (
        torch.cat([torch.arange(a, b) for a, b in ranges])
        for ranges in local_ranges(tuple(shape), sharding, mesh, rank)
    )
    return tuple(torch.meshgrid(*along, indexing="ij"))


def _compared(
    name: str,
    whole: Tensor,
    shares: list[Tensor],
    sharding: Sharding,
    mesh: Mesh,
    spec: TensorSpec,
) -> Iterator[str]:
    expected = local_shape(spec.shape, sharding, mesh)
    if any(tuple(share.shape) != expected for share in shares):
        yield f"{name} has local shape {tuple(shares[0].shape)}, not {expected}"
        return
    joined = torch.zeros_like(whole)
    alike: dict[tuple[int, ...], Tensor] = {}
    for rank, share in enumerate(shares):
        where = mesh.coordinates(rank)
        distinct = tuple(
            where[a] if p == PARTIAL or sharded_dim(p) is not None else 0
            for a, p in enumerate(sharding)
        )
        if distinct in alike:
            if not close(share, alike[distinct]):
                yield f"{name} differs between ranks that should agree ({sharding})"
                return
            continue
        alike[distinct] = share
        if not spec.shape:
            joined = share if whole.dtype == torch.bool else joined + share
            continue
        here = indices(spec.shape, sharding, mesh, rank)
        joined[here] = share if whole.dtype == torch.bool else joined[here] + share
    if not close(joined, whole):
        yield f"{name} joined from {sharding} differs from the whole"


def close(a: Tensor, b: Tensor) -> bool:
    """Equal up to the order of sums."""
    if a.shape != b.shape:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return bool((a == b).all())
    a, b = a.detach(), b.detach()
    finite = b[b.isfinite()]
    scale = max(1.0, float(finite.abs().max())) if finite.numel() else 1.0
    return torch.allclose(a, b, rtol=0, atol=TOLERANCE * scale, equal_nan=True)


# --- calling -------------------------------------------------------------------------------------


_AS_RESHAPE = {
    "aten.view.default": "aten.reshape.default",
    "aten._unsafe_view.default": "aten.reshape.default",
}
"""As the lowered program does: a shard need not have the strides that a view can count on."""


def plain(operator: Operator, tensors: Sequence[Tensor]) -> Any:
    """The op itself on these tensors, with the operator's other arguments."""
    values, keywords = _arguments(operator, tensors)
    called = BY_DEFINITION.get(operator.op) or aten(_AS_RESHAPE.get(operator.op, operator.op))
    return called(*values, **keywords)


def _arguments(operator: Operator, tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
    return (
        [_value(a, tensors) for a in operator.arguments],
        {k: _value(v, tensors) for k, v in operator.keywords},
    )


def _value(argument: Argument, tensors: Sequence[Tensor]) -> Any:
    match argument:
        case Input(index):
            return tensors[index]
        case Dtype(name):
            return getattr(torch, name)
        case tuple():
            return [_value(item, tensors) for item in argument]
        case _:
            return argument


def listed(outputs: Any) -> list[Tensor]:
    return list(outputs) if isinstance(outputs, (tuple, list)) else [outputs]


__all__ = [
    "MESHES",
    "Draw",
    "Failure",
    "Group",
    "RankContext",
    "check",
    "close",
    "index_data",
    "indices",
    "kept_tensors",
    "listed",
    "plain",
    "signed_data",
    "spread",
    "widened",
]
