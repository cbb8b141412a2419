"""Seconds of an operator's local work and of a redistribution, on one mesh and cost model.

Everything that is priced is priced here, once: searchers and ``evaluate`` both ask ``Costs``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import ceil, prod
from typing import Literal

from autopar.ir.graph import ITEM_BYTES, TensorSpec
from autopar.ir.rule import REPLICATED, BoundRule, Inner, Kernel, Product, Split
from autopar.ir.sharding import Mesh, Sharding, gradient, local_elements
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
    is_compiled,
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


@dataclass(frozen=True, slots=True)
class OperatorPrice:
    """Seconds of an operator forward, of its gradients of inputs and of parameters, and what these
    take more where they are asked for ``later``; its own collectives ``there`` and ``back``; and
    what its host takes to launch its forward and its backward."""

    forward_s: float
    input_s: float
    weight_s: float
    later_s: float
    there: tuple[Transfer, ...]
    back: tuple[Transfer, ...]
    launches_s: tuple[float, float]


@dataclass(frozen=True, slots=True)
class EdgePrice:
    """Of a redistribution: its collectives ``there`` and its gradient's ``back``, and what is moved
    inside the device for either."""

    there: tuple[Transfer, ...]
    back: tuple[Transfer, ...]
    there_s: float
    back_s: float


ONE_DEVICE = Mesh((("all", 1),))

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
    operators: dict[object, OperatorPrice] = field(default_factory=dict)
    activations: dict[object, EdgePrice] = field(default_factory=dict)
    _edges: dict[object, float] = field(default_factory=dict)

    @cached_property
    def host(self) -> HostTime:
        """What a device waits for, in its turn; nothing where hosts go ahead."""
        found = host_time_of(self.cost_model)
        return HostTime() if found.ahead else found

    @cached_property
    def host_ahead(self) -> HostTime:
        """What a host takes that goes ahead of its device."""
        found = host_time_of(self.cost_model)
        return found if found.ahead else HostTime()

    # ---- compute -------------------------------------------------------------------------------

    def operator_s(
        self, bound: BoundRule, split: Split, differentiable: tuple[bool, ...]
    ) -> tuple[float, float]:
        """Forward and backward compute of one rank; ``differentiable``: which inputs need a
        gradient (none: no backward)."""
        view_s = self.host.view_s if bound.rule.kind == "view" else 0.0
        if is_free(bound):
            return view_s, view_s * any(differentiable)
        local = tuple(bound.local_sizes(split, self.mesh).values())
        key = (id(bound), local, differentiable)
        found = self.compute_cache.get(key)
        if found is None:
            forward, backward = self.work(bound, split, differentiable)
            price = self.cost_model.compute_time_s
            found = (
                view_s + sum(map(price, forward)),
                view_s * any(differentiable) + sum(map(price, backward)),
            )
            self.compute_cache[key] = found
        return found

    def launches_s(
        self, bound: BoundRule, differentiable: tuple[bool, ...], split: Split | None
    ) -> tuple[float, float]:
        """What a host that goes ahead takes for the forward and the backward of an operator. The
        same however it is divided (kernels are as many, or nearly), unless its rule has a factor
        whose parts are launched ``apart``; without a ``split``, what it takes at least."""
        if not self.host_ahead.ahead:
            return 0.0, 0.0
        apart = bound.rule.apart if split is not None else ""
        calls = bound.local_sizes(split, self.mesh)[apart] if apart and split is not None else 1
        key = ("launches", id(bound), differentiable, calls)
        found = self.compute_cache.get(key)
        if found is None:
            found = self.compute_cache[key] = self._launches_s(bound, differentiable, calls)
        return found

    def _launches_s(
        self, bound: BoundRule, differentiable: tuple[bool, ...], calls: int
    ) -> tuple[float, float]:
        """``calls``: for the first kernel of either; the others have one each."""
        host = self.host_ahead
        view_s = host.view_s if bound.rule.kind == "view" else 0.0
        works: tuple[list[Work], list[Work]] = ([], [])
        if not is_free(bound):
            compiled = is_compiled(self.cost_model)
            works = work(bound, (REPLICATED,), ONE_DEVICE, differentiable, compiled=compiled)
        forward, backward = (
            sum(not one.follows for one in of) + (calls - 1) * bool(of) for of in works
        )
        return (
            view_s + host.operator_s * forward,
            view_s * any(differentiable) + host.operator_s * backward,
        )

    def work(
        self, bound: BoundRule, split: Split, differentiable: tuple[bool, ...]
    ) -> tuple[list[Work], list[Work]]:
        compiled = is_compiled(self.cost_model)
        return work(bound, split, self.mesh, differentiable, compiled=compiled)

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
    several parts the backward makes one tensor, and those of several readers it adds up."""
    return is_view(bound) and not bound.rule.backward and not bound.rule.added


def is_view(bound: BoundRule) -> bool:
    """Of one tensor as one."""
    return bound.rule.kind == "view" and len(bound.output_specs) == 1


def work(
    bound: BoundRule,
    split: Split,
    mesh: Mesh,
    differentiable: tuple[bool, ...],
    *,
    compiled: bool = False,
) -> tuple[list[Work], list[Work]]:
    """What one rank computes, forward and backward; ``compiled``: each pass of an operator is one
    kernel, which reads and writes nothing twice.

    A product's backward is one product for each of its operands that needs a gradient: for
    C[m,n] = A[m,k] B[k,n] these are dA[m,k] over n and dB[k,n] over m. Last come the sums of
    gradients that several readers of an input give.
    """
    local = _Local.of(bound, split, mesh, differentiable)
    forward, backward = local.kernels() if not compiled else local.passes()
    return forward, [*backward, *local.sums()]


@dataclass(frozen=True)
class _Local:
    """What a rank has of an operator: bytes of its inputs and outputs, sizes of factors."""

    bound: BoundRule
    divided: frozenset[str]
    differentiable: tuple[bool, ...]
    sizes: dict[str, int]
    read: list[int]
    written: list[int]

    @classmethod
    def of(
        cls, bound: BoundRule, split: Split, mesh: Mesh, differentiable: tuple[bool, ...]
    ) -> _Local:
        wanted, produced = bound.shardings(split)
        sizes = bound.local_sizes(split, mesh)
        inputs = zip(bound.input_specs, wanted, strict=True)
        outputs = zip(bound.output_specs, produced, strict=True)
        return cls(
            bound,
            frozenset(factor for factor, n in sizes.items() if n < bound.sizes[factor]),
            differentiable,
            sizes,
            [_bytes(spec, sharding, mesh) for spec, sharding in inputs],
            [_bytes(spec, sharding, mesh) for spec, sharding in outputs],
        )

    @property
    def dtype(self) -> str:
        return self.bound.output_specs[0].dtype if self.bound.output_specs else "float32"

    def passes(self) -> tuple[list[Work], list[Work]]:
        """What each direction does at least: one kernel, but for gradients that are sums over
        rows."""
        rule, wanted = self.bound.rule, self.differentiable
        if rule.kind == "view":
            joined = (
                [] if is_view(self.bound) else _joined(self.dtype, self.read, self.written, wanted)
            )
            return [], joined
        if rule.kind == "attention":
            moved = float(sum(self.read) + sum(self.written))
            return _attention(self.bound, self.sizes, self.dtype, moved, any(wanted))
        if rule.products:
            narrow = self.bound.input_specs[0].dtype  # what is multiplied; the sum may be wider
            dtype = narrow if narrow in NARROW else self.dtype
            return _products(self.bound, self.sizes, dtype, wanted)
        return self._one_pass() if any(self.read) or any(self.written) else ([], [])

    def _one_pass(self) -> tuple[list[Work], list[Work]]:
        bound, wanted = self.bound, self.differentiable
        of = bound.rule.of
        kept, made = _saved_bytes(bound, self.sizes, self.read, self.written, wanted)
        seen = _below_diagonal(bound) if bound.rule.causal else 1.0
        moved = seen * sum(self.read) + sum(self.written) + _by_columns(bound, self.written, wanted)
        forward = [Work("memory", self.dtype, 0.0, float(moved + made), of=of)]
        if not any(wanted) or bound.rule.backward == ():
            return forward, []
        outputs = zip(self.written, bound.output_specs, strict=True)
        given = sum(n for n, spec in outputs if spec.is_floating)
        gradients = sum(n for n, needed in zip(self.read, wanted, strict=True) if needed)
        looked_at = seen * (given + kept) + made
        back = Work("memory", self.dtype, 0.0, float(looked_at + gradients), of=of)
        if not _is_shared(bound, self.read, wanted):
            return forward, [back]
        return forward, [back, replace(back, bytes=float(looked_at))]

    def kernels(self) -> tuple[list[Work], list[Work]]:
        """As the rule says; where it does not, as ``passes``."""
        rule = self.bound.rule
        forward, backward = self.passes()
        if rule.kind == "attention" and self._attends_fused():
            around, back = map(self._works, rule.around)
            return forward + around, (backward + back if backward else [])
        if rule.forward is not None:
            forward = self._works(rule.forward)
        if rule.backward is not None:
            backward = self._works(rule.backward) if any(self.differentiable) else []
        return forward, backward

    def _attends_fused(self) -> bool:
        """A mask that is learned needs a gradient, which no fused kernel gives."""
        return self.bound.rule.fused and not any(self.differentiable[3:])

    def sums(self) -> list[Work]:
        """What this operator gives an input is added to what others gave it."""
        specs = self.bound.input_specs
        return [
            Work("memory", specs[i].dtype, 0.0, 3.0 * self.read[i])
            for i in self.bound.rule.added
            if self.differentiable[i]
        ]

    def _works(self, kernels: Sequence[Kernel]) -> list[Work]:
        """The first is launched by a call of its own, and so are products."""
        launched = [self._work(kernel) for kernel in kernels if self._is_launched(kernel)]
        return [
            replace(one, follows=number > 0 and one.kind == "memory")
            for number, one in enumerate(launched)
        ]

    def _is_launched(self, kernel: Kernel) -> bool:
        if kernel.needs and not any(self.differentiable[i] for i in kernel.needs):
            return False
        if kernel.divided and self.divided.isdisjoint(kernel.divided):
            return False
        return self.divided.isdisjoint(kernel.undivided)

    def _work(self, kernel: Kernel) -> Work:
        if kernel.product is not None:
            return _product("matmul", self.dtype, _shape(self.bound, kernel.product, self.sizes))
        moved = [self._moved(what) for what in kernel.moves]
        each = prod(_factor_sizes(kernel.shares, self.sizes))
        elements = max((size // item for size, item in moved), default=0)
        item = self._moved(kernel.moves[0])[1]
        return Work(
            "memory",
            self.dtype,
            0.0,
            float(sum(size for size, _ in moved)),
            of=self.bound.rule.of,
            again_bytes=float(sum(self._moved(what)[0] for what in kernel.again)),
            threads=kernel.threads * each,
            ahead_bytes=kernel.loads * item if kernel.threads else 0,
            instructions=float(kernel.indexed * INDEX_INSTRUCTIONS * elements),
        )

    def _moved(self, what: str) -> tuple[int, int]:
        """Bytes of a tensor and of one of its elements."""
        kind, _, place = what.partition(" ")
        if kind in ("input", "output"):
            sizes = self.read if kind == "input" else self.written
            specs = self.bound.input_specs if kind == "input" else self.bound.output_specs
            return sizes[int(place)], ITEM_BYTES[specs[int(place)].dtype]
        factors, _, dtype = what.partition("/")
        item = ITEM_BYTES[dtype or self.dtype]
        return prod(_factor_sizes(factors, self.sizes)) * item, item


INDEX_INSTRUCTIONS = 100
"""Of elementwise kernels whose tensors do not lie alike, or have other dtypes than are compiled in,
for each element: a division by each size (a product, a shift and a correction) for each tensor, a
load or store of its own with a switch over dtypes, and the loop. On an H100 such kernels take 2.4
to 3.6 ps for an element, however many bytes it has; 33.5 instructions/ps make 80 to 120 of it."""


def _by_columns(bound: BoundRule, written: Sequence[int], differentiable: tuple[bool, ...]) -> int:
    """Products of a forward and of its backward sum along other dims, and take what is narrow in
    rows of these: it is written twice (Transformer Engine's cast and transpose)."""
    specs = zip(written, bound.output_specs, strict=True)
    more = sum(n * (NARROW[spec.dtype] - 1) for n, spec in specs if spec.dtype in NARROW)
    return more if any(differentiable) else 0


def _below_diagonal(bound: BoundRule) -> float:
    """Of the pairs of queries and keys in the last dim, those that a causal mask leaves."""
    keys = bound.input_specs[0].shape[-1]
    return (keys + 1) / (2 * keys)


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


NARROW = {"float8_e4m3fn": 2, "float8_e5m2": 2, "float4_e2m1fn_x2": 1}
"""Dtypes that only products take, whose result is wider; how many copies of its bytes a tensor has
that products read along both dims (those of half a byte have two in one)."""

SCALED_AS_A_WHOLE = frozenset({"float4_e2m1fn_x2"})
"""Of these, formats with a scale for the tensor beside those of its blocks (NVFP4): a tensor is
read once for its largest number, and once more to cast it."""


def _attention(
    bound: BoundRule, sizes: dict[str, int], dtype: str, moved: float, differentiable: bool
) -> tuple[list[Work], list[Work]]:
    """Fused attention: the backward has five products for the forward's two (one recomputed)."""
    shapes = [_shape(bound, p, sizes) for p in bound.rule.products]
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
        batch, m, n, k = _shape(bound, product, sizes)
        forward.append(_product(kind, dtype, (batch, m, n, k)))
        gradients = [(batch, m, k, n), (batch, k, n, m)]
        if len(operands) == 2:
            gradients = [shape for shape, g in zip(gradients, operands, strict=True) if g]
        else:
            gradients = gradients[: sum(operands)]
        backward += [_product(kind, dtype, shape) for shape in gradients]
    if backward and dtype in NARROW:
        backward.append(_narrowed_gradient(bound, sizes, dtype))
    if any(differentiable[i] for i in bound.rule.addends):
        backward.append(_bias_sum(bound, sizes))
    return forward, backward


def _narrowed_gradient(bound: BoundRule, sizes: dict[str, int], dtype: str) -> Work:
    """What comes back is read wide, and written as the products of the backward take it: by rows
    for one, by columns for the other."""
    (product, *_), spec = bound.rule.products, bound.output_specs[0]
    batch, m, n, _ = _shape(bound, product, sizes)
    read = ITEM_BYTES[spec.dtype] * (1 + (dtype in SCALED_AS_A_WHOLE))
    item = read + NARROW[dtype] * ITEM_BYTES[dtype]
    return Work("memory", spec.dtype, 0.0, float(batch * m * n * item))


def _bias_sum(bound: BoundRule, sizes: dict[str, int]) -> Work:
    """The gradient of a bias: what comes back is read once more."""
    (product, *_), spec = bound.rule.products, bound.output_specs[0]
    batch, m, n, _ = _shape(bound, product, sizes)
    return Work("memory", spec.dtype, 0.0, float(batch * (m + 1) * n * ITEM_BYTES[spec.dtype]))


def _shape(bound: BoundRule, product: Product, sizes: dict[str, int]) -> tuple[int, int, int, int]:
    """Where rows are routed, those of one expert."""
    if bound.rule.routed is not None:
        rows, experts = bound.rule.routed
        sizes = {**sizes, rows: ceil(sizes[rows] / bound.sizes[experts])}
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
    return local_elements(spec.shape, sharding, mesh) * ITEM_BYTES[spec.dtype]
