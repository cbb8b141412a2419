"""What an operator can be split by, as one einops-like line and a few facts about it.

``OpRule`` is the line as it is written in ``autopar/ops``; ``BoundRule`` is that line together with
the sizes of one operator, ready to say how tensors lie for a choice on one mesh axis.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from math import gcd, prod
from typing import Any, Literal

from autopar.ir.graph import Operator, TensorSpec
from autopar.ir.sharding import (
    INVARIANT,
    PARTIAL,
    REPLICATE,
    Mesh,
    Parts,
    Placement,
    Sharding,
    shard,
)

NOTHING = "nothing"  # every tensor invariant: each rank of the axis does the same work
REPLICATED = "replicated"  # every tensor R: the same work, its gradients left partial
SUMMED = "partial"  # a linear operator on partial sums: P in, P out
RESERVED = (NOTHING, REPLICATED, SUMMED)

Choice = str
"""What one mesh axis does to an operator: the name of a factor, or one of ``RESERVED``."""

Split = tuple[Choice, ...]
"""A choice for each mesh axis. Several axes may divide one factor; the first cuts it first."""

Kind = Literal["view", "memory", "matmul", "attention", "convolution"]
"""What an operator costs: see ``OpRule``."""

PRODUCTS: tuple[Kind, ...] = ("matmul", "attention", "convolution")
"""The kinds whose work is products."""

Dim = tuple[str, ...]
"""The factors that make up a dim of a tensor, the outermost first; ``()`` is a dim of size 1."""


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product inside an operator: the factors of its batch, rows, columns and sum.

    ``linear`` is ``Product("", "... batch", "out", "in")``; flops are 2 x all four.
    """

    batch: str
    m: str
    n: str
    k: str


@dataclass(frozen=True, slots=True)
class Saved:
    """What the operator keeps for its backward.

    ``what``: ``"input 0"``, ``"output 0"``, or factors, e.g. ``"batch heads q"`` for a tensor of
    its own of these sizes and ``dtype`` (``""``: that of output 0). ``needs``: kept only when one
    of these inputs is differentiable (``()``: any of them).
    """

    what: str
    needs: tuple[int, ...] = ()
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Kernel:
    """One kernel of an operator, as torch's implementation launches it.

    ``moves``: what it reads or writes, each once: ``"input 0"`` or ``"output 0"`` (a gradient is
    like its tensor), or the factors of a temporary, of the dtype after a slash (without one: that
    of output 0), as in ``"batch q k/float32"``. ``again``: what each of its blocks reads a second
    time (a third: named twice). ``needs``: it is launched only if one of these inputs needs a
    gradient (``()``: any); ``divided`` and ``undivided``: only if an axis divides one of these
    factors, or none does.

    ``threads`` for each index of ``shares``, each with ``loads`` elements on the way, are all that
    work (0: as many as a device has). ``indexed``: how often it works out where an element lies;
    0 where elements are taken one after the other. ``product``: it is a product, not bound by
    memory.
    """

    moves: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    needs: tuple[int, ...] = ()
    divided: tuple[str, ...] = ()
    undivided: tuple[str, ...] = ()
    threads: int = 0
    shares: str = ""
    loads: int = 1
    indexed: int = 0
    product: Product | None = None


Kernels = tuple[Kernel, ...]


@dataclass(frozen=True, slots=True)
class Inner:
    """A collective that the local implementation itself does on an axis that divides ``factor``.

    Its buffer has the local sizes of the factors ``points`` (``""``: one element), times ``times``,
    of ``dtype`` (``""``: that of input 0). Not in the edges of a plan, but in its promise.
    """

    factor: str
    kind: Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
    phase: Literal["forward", "backward"]
    points: str = ""
    times: int = 1
    dtype: str = ""


@dataclass(frozen=True, slots=True)
class Joined:
    """A dim that is several parts one after the other (query, key and value of a fused
    projection): dividing ``factor`` divides each of them.

    ``tensor`` counts inputs, then outputs. ``parts``: their relative sizes.
    """

    tensor: int
    dim: int
    factor: str
    parts: Parts


Localize = Callable[[Operator, tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]], Operator]
"""(operator, local shapes of its inputs, of its outputs) -> the operator with local arguments."""


@dataclass(frozen=True, slots=True)
class OpRule:
    """``signature``: labelled dims of the tensor inputs and outputs.

    ``"... in, out in -> ... out"``: names are factors, the same name has the same size everywhere;
    ``...`` stands for any leading dims (named ``...0``, ``...1``, counted from the left); ``1`` is
    a dim of size 1; ``(heads dim)`` is a dim made of two factors of which only the first can be
    split. A scalar tensor has no labels: ``"tokens vocab, tokens ->"``.

    - ``whole``: factors that are never split.
    - ``sizes``: of factors whose size does not follow from the shapes (the groups of group norm).
    - ``sums``: factors that are absent from an output because the operator sums over them; when one
      is split, that output is partial. Factors absent from an output and not here are whole.
    - ``addends``: inputs that are added once to such a sum (a bias): partial when it is split.
    - ``linear``: inputs in which the operator is linear when taken together; all partial gives
      partial outputs. Inputs not named are replicated then.
    - ``agreed``: outputs that every rank has whole although they lack the factor, because the
      implementation agrees on them (statistics of batch norm): replicated, and no factor's sum.
    - ``kind`` and ``products`` say what it costs: ``view`` nothing (no memory is touched),
      ``memory`` bytes read and written, the kinds of ``PRODUCTS`` the products.
    - ``routed``: (rows, experts): each index of the one factor meets one of the other in the
      products, and not all: they are shared out among those of all devices, evenly on the average.
    - ``of``: of what it is, if it is bound by memory, as in ``Work``.
    - ``forward`` and ``backward``: kernels, where these are not one that reads the inputs and
      writes the outputs, and one that reads what comes back and what was kept and writes gradients;
      of attention, those that do it by its definition where ``fused`` does not hold.
    - ``around``: of fused attention, kernels beside the one that it is, forward and backward.
    - ``added``: inputs that operators before this one read as well, whose gradients are added to
      those that these give. Found in the graph.
    - ``apart``: a factor for each index of which the host makes a call of its own, forward and
      backward, though the kernels go on at once: parameters of experts, kept one by one.
    - ``awaited``: the host reads its result before it launches anything else (how many rows go to
      each expert): until then it goes ahead, and not beyond.
    - ``causal``: a fused kernel that leaves out what the mask hides, a block of keys at a time; one
      that is bound by memory does not read it.
    - ``saves``: what is kept for the backward. ``workspace``: of a kernel that is not torch's own,
      temporaries that are there at once in its forward, and in its backward, beside inputs,
      outputs, their gradients and what is kept: factors, with a dtype, as in ``Kernel``.
    - ``inner``: collectives of its local implementation; ``special``: factors whose split needs an
      implementation of its own in ``autopar/runtime/local_ops.py`` (``"*"``: it is always used).
    - ``localize``: changes arguments that hold sizes (the shape of a view).
    - ``joined``: dims of which each part is divided; in them a factor may be split that is not the
      first of its dim. Found in the graph (``autopar/ops/parts.py``).
    - ``proposed``: found by trying, not written by a person.
    """

    signature: str
    whole: tuple[str, ...] = ()
    sums: tuple[str, ...] = ()
    addends: tuple[int, ...] = ()
    linear: tuple[int, ...] = ()
    agreed: tuple[int, ...] = ()
    kind: Kind = "memory"
    products: tuple[Product, ...] = ()
    routed: tuple[str, str] | None = None
    of: str = ""
    forward: Kernels | None = None
    backward: Kernels | None = None
    fused: bool = True
    around: tuple[Kernels, Kernels] = ((), ())
    added: tuple[int, ...] = ()
    apart: str = ""
    awaited: bool = False
    causal: bool = False
    saves: tuple[Saved, ...] = ()
    workspace: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
    inner: tuple[Inner, ...] = ()
    special: tuple[str, ...] = ()
    localize: Localize | None = None
    proposed: bool = False
    sizes: tuple[tuple[str, int], ...] = ()
    joined: tuple[Joined, ...] = ()


NOT_DATA = frozenset(
    {
        *("localize", "joined", "forward", "backward", "fused", "around", "added", "apart"),
        *("awaited", "routed", "workspace"),
    }
)
"""Fields of a rule that no proposed one has, and no plan."""

RuleMaker = Callable[[Operator, tuple[TensorSpec, ...], tuple[TensorSpec, ...]], OpRule]
"""(operator, specs of its inputs, specs of its outputs) -> its rule, where the shapes decide."""


@dataclass(frozen=True)
class BoundRule:
    """A rule with the sizes of one operator."""

    rule: OpRule
    inputs: tuple[tuple[Dim, ...], ...]
    outputs: tuple[tuple[Dim, ...], ...]
    input_specs: tuple[TensorSpec, ...]
    output_specs: tuple[TensorSpec, ...]
    sizes: dict[str, int] = field(hash=False)

    @cached_property
    def factors(self) -> tuple[str, ...]:
        """The factors that an axis may divide, in order of appearance."""
        return tuple(f for f in self.sizes if self._splittable(f))

    def _splittable(self, factor: str) -> bool:
        if factor in self.rule.whole or self.sizes[factor] <= 1:
            return False
        for tensor, dims in enumerate(self.inputs + self.outputs):
            holders = [i for i, dim in enumerate(dims) if factor in dim]
            if len(holders) > 1 or any(
                self._leading(dims[i]) != factor and (tensor, i, factor) not in self._parts
                for i in holders
            ):
                return False
        lacking = [
            spec
            for i, (dims, spec) in enumerate(zip(self.outputs, self.output_specs, strict=True))
            if i not in self.rule.agreed and not any(factor in dim for dim in dims)
        ]
        return not lacking or (
            factor in self.rule.sums and all(spec.is_floating for spec in lacking)
        )

    def _leading(self, dim: Dim) -> str:
        return next((f for f in dim if self.sizes[f] > 1), dim[0])

    @cached_property
    def _parts(self) -> dict[tuple[int, int, str], Parts]:
        return {(j.tensor, j.dim, j.factor): j.parts for j in self.rule.joined}

    @cached_property
    def limits(self) -> dict[str, int]:
        """What the devices that divide a factor have to divide: its size, and where a dim has parts
        the largest common divisor of theirs."""
        limits = dict(self.sizes)
        specs = self.input_specs + self.output_specs
        for joined in self.rule.joined:
            unit = specs[joined.tensor].shape[joined.dim] // sum(joined.parts)
            limits[joined.factor] = gcd(limits[joined.factor], unit)
        return limits

    def parts(self, choice: Choice) -> Parts:
        """The parts of a factor that is divided in parts; of several dims the first that has any
        decides."""
        return next((j.parts for j in self.rule.joined if j.factor == choice), ())

    @cached_property
    def choices(self) -> tuple[Choice, ...]:
        """What one axis may do, divisibility aside. ``REPLICATED`` is legal for every operator."""
        return (*self.factors, NOTHING, REPLICATED) + ((SUMMED,) if self.rule.linear else ())

    @cached_property
    def _known(self) -> dict[object, Any]:
        """Answers of ``placements`` (by choice) and ``shardings`` (by split)."""
        return {}

    def placements(self, choice: Choice) -> tuple[tuple[Placement, ...], tuple[Placement, ...]]:
        """How inputs and outputs lie on an axis that makes this choice."""
        found = self._known.get(choice)
        if found is None:
            found = self._known[choice] = self._placements(choice)
        return found

    def _placements(self, choice: Choice) -> tuple[tuple[Placement, ...], tuple[Placement, ...]]:
        if choice == NOTHING:
            return (INVARIANT,) * len(self.inputs), (INVARIANT,) * len(self.outputs)
        if choice == REPLICATED:
            return (REPLICATE,) * len(self.inputs), (REPLICATE,) * len(self.outputs)
        if choice == SUMMED:
            return tuple(
                PARTIAL if i in self.rule.linear else REPLICATE for i in range(len(self.inputs))
            ), (PARTIAL,) * len(self.outputs)
        reduced = choice in self.rule.sums
        return tuple(
            self._placement(i, choice, PARTIAL if reduced and i in self.rule.addends else REPLICATE)
            for i in range(len(self.inputs))
        ), tuple(
            self._placement(
                len(self.inputs) + i, choice, REPLICATE if i in self.rule.agreed else PARTIAL
            )
            for i in range(len(self.outputs))
        )

    def _placement(self, tensor: int, factor: str, otherwise: Placement) -> Placement:
        dims = (self.inputs + self.outputs)[tensor]
        return next(
            (
                shard(i, self._parts.get((tensor, i, factor), ()))
                for i, dim in enumerate(dims)
                if factor in dim
            ),
            otherwise,
        )

    def shardings(self, split: Split) -> tuple[tuple[Sharding, ...], tuple[Sharding, ...]]:
        """Shardings of the inputs and of the outputs under ``split``."""
        found = self._known.get(split)
        if found is None:
            found = self._known[split] = self._shardings(split)
        return found

    def _shardings(self, split: Split) -> tuple[tuple[Sharding, ...], tuple[Sharding, ...]]:
        by_axis = [self.placements(choice) for choice in split]
        inputs = tuple(tuple(axis[0][i] for axis in by_axis) for i in range(len(self.inputs)))
        outputs = tuple(tuple(axis[1][i] for axis in by_axis) for i in range(len(self.outputs)))
        return inputs, outputs

    def local_sizes(self, split: Split, mesh: Mesh) -> dict[str, int]:
        """Sizes of the factors on one rank."""
        sizes = dict(self.sizes)
        for choice, n in zip(split, mesh.sizes, strict=True):
            if choice in sizes:
                assert sizes[choice] % n == 0, (choice, self.sizes, split, mesh)
                sizes[choice] //= n
        return sizes

    def divides(self, split: Split, mesh: Mesh) -> bool:
        """Whether every axis divides its factor exactly."""
        cuts: dict[str, int] = {}
        for choice, n in zip(split, mesh.sizes, strict=True):
            cuts[choice] = cuts.get(choice, 1) * n
        return all(self.limits[f] % n == 0 for f, n in cuts.items() if f in self.sizes)

    def splits(self, mesh: Mesh, choices: tuple[Choice, ...] | None = None) -> Iterator[Split]:
        """Every legal split on ``mesh``, optionally of these choices only."""
        offered = self.choices if choices is None else choices
        for split in product(offered, repeat=len(mesh.axes)):
            if self.divides(split, mesh):
                yield split

    def refused(self, mesh: Mesh) -> tuple[tuple[str, str], ...]:
        """(axis name, factor) pairs that are not offered since the axis does not divide it."""
        return tuple(
            (name, f) for f in self.factors for name, n in mesh.axes if self.limits[f] % n != 0
        )


_TOKEN = re.compile(r"\.\.\.|\(|\)|[A-Za-z_][A-Za-z_0-9']*|1")


def bind(
    rule: OpRule, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]
) -> BoundRule:
    """Read ``rule.signature`` against these tensors.

    Raises:
        ValueError: ranks or sizes do not fit the signature.

    >>> linear = OpRule("... in, out in -> ... out", sums=("in",))
    >>> x, w, y = (TensorSpec(shape, "float32") for shape in ((4, 2), (6, 2), (4, 6)))
    >>> bound = bind(linear, (x, w), (y,))
    >>> bound.factors
    ('...0', 'in', 'out')
    >>> bound.placements("in")
    (('S(1)', 'S(1)'), ('P',))
    """
    left, arrow, right = rule.signature.partition("->")
    if not arrow:
        raise ValueError(f"no '->' in signature {rule.signature!r}")
    specs = inputs + outputs
    texts = _tensors(left, len(inputs)) + _tensors(right, len(outputs))
    if len(texts) != len(specs):
        raise ValueError(f"signature {rule.signature!r} does not name {len(specs)} tensors")
    labelled = tuple(_dims(text, len(spec.shape)) for text, spec in zip(texts, specs, strict=True))
    sizes = _sizes(rule.signature, labelled, specs, dict(rule.sizes))
    return BoundRule(rule, labelled[: len(inputs)], labelled[len(inputs) :], inputs, outputs, sizes)


def _tensors(side: str, count: int) -> list[str]:
    return [part.strip() for part in side.split(",")] if count else []


def _dims(text: str, rank: int) -> tuple[Dim, ...]:
    dims: list[Dim] = []
    group: list[str] | None = None
    ellipsis: int | None = None
    for token in _TOKEN.findall(text):
        if token == "...":
            ellipsis = len(dims)
        elif token == "(":
            group = []
        elif token == ")":
            assert group is not None, text
            dims.append(tuple(group))
            group = None
        elif group is not None:
            if token != "1":
                group.append(token)
        else:
            dims.append(() if token == "1" else (token,))
    if ellipsis is not None:
        leading = tuple((f"...{i}",) for i in range(rank - len(dims)))
        return (*dims[:ellipsis], *leading, *dims[ellipsis:])
    return tuple(dims)


def _sizes(
    signature: str,
    labelled: tuple[tuple[Dim, ...], ...],
    specs: tuple[TensorSpec, ...],
    sizes: dict[str, int],
) -> dict[str, int]:
    """``sizes`` are those that the rule gives."""
    compound: list[tuple[Dim, int]] = []
    for dims, spec in zip(labelled, specs, strict=True):
        if len(dims) != len(spec.shape):
            raise ValueError(f"{signature!r}: {dims} does not label a tensor of {spec.shape}")
        for dim, size in zip(dims, spec.shape, strict=True):
            if len(dim) > 1:
                compound.append((dim, size))
            elif sizes.setdefault(dim[0] if dim else "1", size if dim else 1) != size:
                raise ValueError(f"{signature!r}: {dim or '1'} has sizes {sizes} and {size}")
    sizes.pop("1", None)
    _solve(signature, sizes, compound)
    order = [f for dims in labelled for dim in dims for f in dim]
    return {f: sizes[f] for f in dict.fromkeys(order)}


def _solve(signature: str, sizes: dict[str, int], compound: list[tuple[Dim, int]]) -> None:
    """Fill in the one unknown factor of each compound dim, as often as that helps."""
    for _ in range(len(compound) + 1):
        for dim, size in compound:
            unknown = [f for f in dim if f not in sizes]
            known = prod(sizes[f] for f in dim if f in sizes)
            if len(unknown) == 1 and size % known == 0:
                sizes[unknown[0]] = size // known
            elif not unknown and known != size:
                raise ValueError(f"{signature!r}: {dim} makes {known}, the dim has {size}")
    if missing := [f for dim, _ in compound for f in dim if f not in sizes]:
        raise ValueError(f"{signature!r}: the sizes of {missing} do not follow from the shapes")
