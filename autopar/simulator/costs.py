"""Seconds of an operator's local work and of a redistribution, on one mesh and cost model.

Everything that is priced is priced here, once: searchers and ``evaluate`` both ask ``Costs``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from typing import Literal

from autopar.ir.graph import ITEM_BYTES, TensorSpec
from autopar.ir.rule import BoundRule, Inner, Product, Split
from autopar.ir.sharding import Mesh, Sharding, gradient, local_shape
from autopar.simulator.redistribution import (
    Transfer,
    forward_collective,
    reverse,
    steps,
    transfers,
)
from cost_models.interface import (
    Collective,
    CollectiveKind,
    CostModel,
    HostTime,
    Work,
    host_time_of,
    members_in_units,
    units_of,
)


@dataclass(frozen=True, slots=True)
class ParameterPrice:
    """Of one use of a parameter: its collectives ``there`` and its gradient's ``back``, and what is
    moved inside the device for either."""

    there: tuple[Transfer, ...]
    back: tuple[Transfer, ...]
    there_s: float
    back_s: float


ComputeCache = dict[object, tuple[float, float]]
"""Compute seconds depend on local sizes, not on the mesh: one cache serves all meshes."""


@dataclass
class Costs:
    """Prices on one mesh, remembered by what they depend on.

    ``devices``: which of the machine's the ranks of the mesh are; empty for all of them in their
    order.
    """

    cost_model: CostModel
    mesh: Mesh
    compute_cache: ComputeCache = field(default_factory=dict)
    devices: tuple[int, ...] = ()
    parameters: dict[object, ParameterPrice] = field(default_factory=dict)
    _edges: dict[object, float] = field(default_factory=dict)

    @cached_property
    def host(self) -> HostTime:
        return host_time_of(self.cost_model)

    # ---- compute -------------------------------------------------------------------------------

    def operator_s(
        self, bound: BoundRule, split: Split, differentiable: tuple[bool, ...]
    ) -> tuple[float, float]:
        """Forward and backward compute of one rank; ``differentiable``: which inputs need a
        gradient (none: no backward)."""
        return self._by_sizes("in turn", self._kernel_s, bound, split, differentiable)

    def device_s(
        self, bound: BoundRule, split: Split, differentiable: tuple[bool, ...]
    ) -> tuple[float, float]:
        """For how long of that the device is busy."""
        if is_free(bound):
            return 0.0, 0.0
        price = self.cost_model.compute_time_s
        return self._by_sizes("device", price, bound, split, differentiable)

    def host_s(
        self, bound: BoundRule, split: Split, differentiable: tuple[bool, ...]
    ) -> tuple[float, float]:
        """For how long of that the host is busy."""
        each_s = self.host.operator_s
        return self._by_sizes("host", lambda _: each_s, bound, split, differentiable)

    def _by_sizes(
        self,
        what: Literal["in turn", "device", "host"],
        price: Callable[[Work], float],
        bound: BoundRule,
        split: Split,
        differentiable: tuple[bool, ...],
    ) -> tuple[float, float]:
        view_s = self.host.view_s if bound.rule.kind == "view" and what != "device" else 0.0
        if is_free(bound):
            return view_s, view_s * any(differentiable)
        local = tuple(bound.local_sizes(split, self.mesh).values())
        key = (what, id(bound), local, differentiable)
        found = self.compute_cache.get(key)
        if found is None:
            forward, backward = work(bound, split, self.mesh, differentiable)
            found = (
                view_s + sum(map(price, forward)),
                view_s * any(differentiable) + sum(map(price, backward)),
            )
            self.compute_cache[key] = found
        return found

    def _kernel_s(self, of: Work) -> float:
        """A device waits for its host where that takes longer."""
        return max(self.host.operator_s, self.cost_model.compute_time_s(of))

    def memory_bound_s(self, moved_bytes: float, dtype: str, of: str = "") -> float:
        """An elementwise pass that reads and writes ``moved_bytes``; ``of`` as in ``Work``."""
        return self.cost_model.compute_time_s(Work("memory", dtype, 0.0, moved_bytes, of=of))

    # ---- communication -------------------------------------------------------------------------

    def collective_s(self, kind: CollectiveKind, axis: int, size_bytes: int) -> float:
        """One collective over a mesh axis; no time on an axis of one device."""
        if self.mesh.sizes[axis] == 1:
            return 0.0
        collective = Collective(kind, size_bytes, *self._groups[axis])
        return self.cost_model.collective_time_s(collective)

    @cached_property
    def _groups(self) -> list[tuple[int, int, tuple[int, ...]]]:
        """Size, stride and place of each axis's groups."""
        places = within_units(units_of(self.cost_model), self.mesh, self.devices)
        return list(zip(self.mesh.sizes, self.mesh.strides, places, strict=True))

    def transfer_s(self, transfer: Transfer) -> float:
        return self.collective_s(transfer.kind, transfer.axis, transfer.bytes)

    def inner_s(
        self, bound: BoundRule, split: Split, phase: Literal["forward", "backward"]
    ) -> float:
        """The collectives of the operator's own implementation."""
        return sum(
            self.transfer_s(transfer)
            for transfer in inner_transfers(bound, split, self.mesh, phase)
        )

    def redistribution_s(
        self, spec: TensorSpec, source: Sharding, target: Sharding, *, backward: bool
    ) -> float:
        """Forward seconds of taking a tensor from ``source`` to ``target``, or those of the
        gradient's way back: collectives and what is moved inside the device."""
        key = (spec, source, target, backward)
        found = self._edges.get(key)
        if found is None:
            found = self.moves_s(spec, source, target, backward=backward) + sum(
                self.transfer_s(t)
                for t in transfers(source, target, spec.bytes, self.mesh, backward=backward)
            )
            self._edges[key] = found
        return found

    def moves_s(
        self, spec: TensorSpec, source: Sharding, target: Sharding, *, backward: bool
    ) -> float:
        """The part of ``redistribution_s`` that is no collective: masks and pads (to P) write a
        whole local tensor, slices (to S) copy their part; each is a call of the host, and so is a
        step that moves nothing."""
        path = steps(source, target)
        if backward:
            path = tuple(reverse(step) for step in reversed(path))
        current = list(gradient(target) if backward else source)
        total = 0.0
        for step in path:
            current[step.axis] = step.target
            if forward_collective(step) is None:
                total += self.host.step_s
                if step.target[0] in "SP":
                    moved = 2.0 * _bytes(spec, tuple(current), self.mesh)
                    total += self.memory_bound_s(moved, spec.dtype)
        return total


@lru_cache(maxsize=None)
def within_units(
    units: tuple[int, ...], mesh: Mesh, devices: tuple[int, ...]
) -> tuple[tuple[int, ...], ...]:
    """For each axis, how its groups lie in the machine's units, as ``Collective.within`` has it."""
    if not devices:
        return ((),) * len(mesh.axes)
    return tuple(
        members_in_units(
            {
                tuple(devices[r] for r in mesh.group(axis, rank))
                for rank in range(mesh.size)
                if rank // stride % size == 0  # the first of its group
            },
            units,
        )
        for axis, (stride, size) in enumerate(zip(mesh.strides, mesh.sizes, strict=True))
    )


def inner_transfers(
    bound: BoundRule, split: Split, mesh: Mesh, phase: Literal["forward", "backward"]
) -> tuple[Transfer, ...]:
    """What the operator's local implementation communicates, axis by axis."""
    if not bound.rule.inner:
        return ()
    sizes = bound.local_sizes(split, mesh)
    return tuple(
        Transfer(inner.kind, axis, _inner_bytes(inner, bound, sizes))
        for axis, choice in enumerate(split)
        for inner in bound.rule.inner
        if inner.factor == choice and inner.phase == phase
    )


def _inner_bytes(inner: Inner, bound: BoundRule, sizes: dict[str, int]) -> int:
    item = ITEM_BYTES[inner.dtype or bound.input_specs[0].dtype]
    return inner.times * prod(_factor_sizes(inner.points, sizes)) * item


def _factor_sizes(names: str, sizes: dict[str, int]) -> list[int]:
    """Sizes of the factors named; ``...`` are all leading ones."""
    found = []
    for name in names.split():
        if name == "...":
            found += [n for factor, n in sizes.items() if factor.startswith("...")]
        else:
            found.append(sizes[name])
    return found


def is_free(bound: BoundRule) -> bool:
    """A view of one tensor as one touches no memory, forward or backward; of the gradients of
    several parts the backward makes one tensor."""
    return bound.rule.kind == "view" and len(bound.output_specs) == 1


def work(
    bound: BoundRule, split: Split, mesh: Mesh, differentiable: tuple[bool, ...]
) -> tuple[list[Work], list[Work]]:
    """What one rank computes, forward and backward.

    A product's backward is one product for each of its operands that needs a gradient: for
    C[m,n] = A[m,k] B[k,n] these are dA[m,k] over n and dB[k,n] over m.
    """
    sizes = bound.local_sizes(split, mesh)
    wanted, produced = bound.shardings(split)
    read = [
        _bytes(spec, sharding, mesh)
        for spec, sharding in zip(bound.input_specs, wanted, strict=True)
    ]
    written = [
        _bytes(spec, sharding, mesh)
        for spec, sharding in zip(bound.output_specs, produced, strict=True)
    ]
    dtype = bound.output_specs[0].dtype if bound.output_specs else "float32"
    if bound.rule.kind == "view":
        return [], [] if is_free(bound) else _joined(dtype, read, written, differentiable)
    if bound.rule.kind == "attention":
        return _attention(bound, sizes, dtype, float(sum(read) + sum(written)), any(differentiable))
    if bound.rule.products:
        narrow = bound.input_specs[0].dtype  # what is multiplied; the sum may be wider
        dtype = narrow if narrow in NARROW else dtype
        return _products(bound, sizes, dtype, differentiable)
    moved = float(sum(read) + sum(written))
    if moved == 0:
        return [], []
    of = bound.rule.of
    kept, made = _saved_bytes(bound, sizes, read, written, differentiable)
    forward = [Work("memory", dtype, float(max(written, default=0)), moved + made, of=of)]
    if not any(differentiable):
        return forward, []
    given = sum(n for n, spec in zip(written, bound.output_specs, strict=True) if spec.is_floating)
    gradients = sum(n for n, needed in zip(read, differentiable, strict=True) if needed)
    backward = [Work("memory", dtype, 0.0, float(given + kept + made + gradients), of=of)]
    if _is_shared(bound, read, differentiable):
        backward.append(Work("memory", dtype, 0.0, float(given + kept + made), of=of))
    return forward, backward


def _is_shared(bound: BoundRule, read: Sequence[int], differentiable: tuple[bool, ...]) -> bool:
    """Whether an input that every row is scaled or shifted by needs a gradient, beside one that has
    all rows: that is a sum over rows, which another kernel makes of the same tensors."""
    sizes = [
        size // ITEM_BYTES[spec.dtype]
        for size, spec, needed in zip(read, bound.input_specs, differentiable, strict=True)
        if needed
    ]
    return len(sizes) > 1 and min(sizes) < max(sizes)


def _saved_bytes(
    bound: BoundRule,
    sizes: dict[str, int],
    read: Sequence[int],
    written: Sequence[int],
    differentiable: tuple[bool, ...],
) -> tuple[int, int]:
    """What the backward reads beside the gradients that it is given: inputs and outputs, and what
    the forward makes for it beside these."""
    total = made = 0
    for saved in bound.rule.saves:
        if saved.needs and not any(differentiable[i] for i in saved.needs):
            continue
        kind, _, place = saved.what.partition(" ")
        if kind in ("input", "output"):
            total += (read if kind == "input" else written)[int(place)]
        else:
            item = ITEM_BYTES[saved.dtype or bound.output_specs[0].dtype]
            made += prod(_factor_sizes(saved.what, sizes)) * item
    return total, made


def _joined(
    dtype: str, read: Sequence[int], written: Sequence[int], differentiable: tuple[bool, ...]
) -> list[Work]:
    """What the backward of a view that has several parts does with their gradients."""
    if not any(differentiable):
        return []
    return [Work("memory", dtype, 0.0, float(sum(written) + sum(read)))]


NARROW = frozenset({"float8_e4m3fn", "float8_e5m2", "float4_e2m1fn_x2"})
"""Dtypes that only products take, whose result is wider."""


def _attention(
    bound: BoundRule, sizes: dict[str, int], dtype: str, moved: float, differentiable: bool
) -> tuple[list[Work], list[Work]]:
    """Fused attention: the backward has five products for the forward's two (one recomputed)."""
    shapes = [_shape(p, sizes) for p in bound.rule.products]
    batch, query, key, dim = shapes[0]
    share = attended(key) if bound.rule.causal else 1.0
    flops = share * sum(2.0 * prod(shape) for shape in shapes)
    shape = (batch, query, key, dim)
    forward = [Work("attention", dtype, flops, moved, shape)]
    return forward, [Work("attention", dtype, 2.5 * flops, 2 * moved, shape)] * differentiable


BLOCK = 128
"""Queries and keys that kernels of fused attention look at together: 64 to 256 of either (their
sources, FlashAttention-2 and torch's for CPUs)."""


def attended(keys: int) -> float:
    """Of all pairs, those in blocks on and below the diagonal. Where queries are divided, a device
    has as many early ones as late ones.

    >>> attended(64), attended(8192)
    (1.0, 0.5078125)
    """
    return min(1.0, (keys + BLOCK) / (2 * keys))


def _products(
    bound: BoundRule, sizes: dict[str, int], dtype: str, differentiable: tuple[bool, ...]
) -> tuple[list[Work], list[Work]]:
    """One product more in the backward for each operand that needs a gradient, and a sum for a
    bias."""
    kind: Literal["matmul", "convolution"] = (
        "convolution" if bound.rule.kind == "convolution" else "matmul"
    )
    forward, backward = [], []
    operands = [g for i, g in enumerate(differentiable) if i not in bound.rule.addends]
    for product in bound.rule.products:
        batch, m, n, k = _shape(product, sizes)
        forward.append(_product(kind, dtype, (batch, m, n, k)))
        gradients = [(batch, m, k, n), (batch, k, n, m)]
        if len(operands) == 2:
            gradients = [shape for shape, g in zip(gradients, operands, strict=True) if g]
        else:
            gradients = gradients[: sum(operands)]
        backward += [_product(kind, dtype, shape) for shape in gradients]
    if any(differentiable[i] for i in bound.rule.addends):
        backward.append(_bias_sum(bound, sizes))
    return forward, backward


def _bias_sum(bound: BoundRule, sizes: dict[str, int]) -> Work:
    """The gradient of a bias: what comes back is read once more."""
    (product, *_), spec = bound.rule.products, bound.output_specs[0]
    batch, m, n, _ = _shape(product, sizes)
    return Work("memory", spec.dtype, 0.0, float(batch * (m + 1) * n * ITEM_BYTES[spec.dtype]))


def _shape(product: Product, sizes: dict[str, int]) -> tuple[int, int, int, int]:
    batch, m, n, k = (
        prod(_factor_sizes(names, sizes))
        for names in (product.batch, product.m, product.n, product.k)
    )
    return batch, m, n, k


def _product(
    kind: Literal["matmul", "convolution"], dtype: str, shape: tuple[int, int, int, int]
) -> Work:
    batch, m, n, k = shape
    moved = batch * (m * k + k * n + m * n) * ITEM_BYTES[dtype]
    return Work(kind, dtype, 2.0 * batch * m * n * k, float(moved), shape)


def _bytes(spec: TensorSpec, sharding: Sharding, mesh: Mesh) -> int:
    return prod(local_shape(spec.shape, sharding, mesh)) * ITEM_BYTES[spec.dtype]
