"""Seconds of an operator's local work and of a redistribution, on one mesh and cost model.

Everything that is priced is priced here, once: searchers and ``evaluate`` both ask ``Costs``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import Literal

from autopar.ir.graph import ITEM_BYTES, TensorSpec
from autopar.ir.rule import BoundRule, Inner, Product, Split
from autopar.ir.sharding import Mesh, Sharding, gradient, local_shape
from autopar.simulator.redistribution import Step, Transfer, reverse, steps, transfers
from cost_models.interface import Collective, CollectiveKind, CostModel, Work


@dataclass
class Costs:
    """Prices on one mesh, remembered by what they depend on."""

    cost_model: CostModel
    mesh: Mesh
    _operators: dict[object, tuple[float, float]] = field(default_factory=dict)
    _edges: dict[object, float] = field(default_factory=dict)
    _collectives: dict[object, tuple[float, float]] = field(default_factory=dict)

    # ---- compute -------------------------------------------------------------------------------

    def operator_s(
        self, bound: BoundRule, split: Split, differentiable: tuple[bool, ...]
    ) -> tuple[float, float]:
        """Forward and backward compute of one rank; ``differentiable``: which inputs need a
        gradient (none: no backward)."""
        key = (id(bound), split, differentiable)
        if key not in self._operators:
            self._operators[key] = self._operator_s(bound, split, differentiable)
        return self._operators[key]

    def _operator_s(
        self, bound: BoundRule, split: Split, differentiable: tuple[bool, ...]
    ) -> tuple[float, float]:
        if bound.rule.kind == "view":
            return 0.0, 0.0
        forward, backward = work(bound, split, self.mesh, differentiable)
        return (
            sum(map(self.cost_model.compute_time_s, forward)),
            sum(map(self.cost_model.compute_time_s, backward)),
        )

    def memory_bound_s(self, moved_bytes: float, dtype: str) -> float:
        """An elementwise pass that reads and writes ``moved_bytes``."""
        return self.cost_model.compute_time_s(Work("memory", dtype, 0.0, moved_bytes))

    # ---- communication -------------------------------------------------------------------------

    def collective_s(self, kind: CollectiveKind, axis: int, size_bytes: int) -> float:
        """One collective over a mesh axis; no time on an axis of one device."""
        if self.mesh.sizes[axis] == 1:
            return 0.0
        group = (self.mesh.sizes[axis], self.mesh.strides[axis])
        return self.cost_model.collective_time_s(Collective(kind, size_bytes, *group))

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
        gradient's way back; what is moved inside the device is priced too."""
        key = (spec, source, target, backward)
        found = self._edges.get(key)
        if found is None:
            communication = sum(
                self.transfer_s(t)
                for t in transfers(source, target, spec.bytes, self.mesh, backward=backward)
            )
            found = communication + self._local_moves_s(spec, source, target, backward)
            self._edges[key] = found
        return found

    def _local_moves_s(
        self, spec: TensorSpec, source: Sharding, target: Sharding, backward: bool
    ) -> float:
        """Masks and pads (…→P) write a whole local tensor; a slice (…→S) copies its part."""
        path = steps(source, target)
        current = list(gradient(target) if backward else source)
        total = 0.0
        for step in (reverse(s) for s in reversed(path)) if backward else path:
            current[step.axis] = step.target
            if _moves_locally(step):
                kept = prod(local_shape(spec.shape, tuple(current), self.mesh))
                total += self.memory_bound_s(2 * kept * ITEM_BYTES[spec.dtype], spec.dtype)
        return total


def _moves_locally(step: Step) -> bool:
    return step.source in ("R", "I") and step.target[0] in "SP" or (
        step.source[0] == "S" and step.target == "P"
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
    if bound.rule.products:
        kind: Literal["attention", "matmul"] = (
            "attention" if bound.rule.kind == "attention" else "matmul"
        )
        forward, backward = [], []
        for product in bound.rule.products:
            batch, m, n, k = (prod(_factor_sizes(names, sizes)) for names in _fields(product))
            item = ITEM_BYTES[dtype]
            forward.append(_product(kind, dtype, (batch, m, n, k), item))
            operands = min(2, sum(differentiable)) if kind == "matmul" else 2
            if any(differentiable):
                if operands == 2 or differentiable[0]:
                    backward.append(_product(kind, dtype, (batch, m, k, n), item))
                if operands == 2 or not differentiable[0]:
                    backward.append(_product(kind, dtype, (batch, k, n, m), item))
        return forward, backward
    moved = float(sum(read) + sum(written))
    if moved == 0:
        return [], []
    forward = [Work("memory", dtype, float(max(written, default=0)), moved)]
    if not any(differentiable):
        return forward, []
    gradients = sum(n for n, needed in zip(read, differentiable, strict=True) if needed)
    return forward, [Work("memory", dtype, 0.0, float(gradients + moved))]


def _fields(product: Product) -> tuple[str, str, str, str]:
    return product.batch, product.m, product.n, product.k


def _product(
    kind: Literal["attention", "matmul"], dtype: str, shape: tuple[int, int, int, int], item: int
) -> Work:
    batch, m, n, k = shape
    moved = batch * (m * k + k * n + m * n) * item
    return Work(kind, dtype, 2.0 * batch * m * n * k, float(moved), shape)


def _bytes(spec: TensorSpec, sharding: Sharding, mesh: Mesh) -> int:
    return prod(local_shape(spec.shape, sharding, mesh)) * ITEM_BYTES[spec.dtype]
