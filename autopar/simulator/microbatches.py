"""A step in microbatches: the batch divided by time, with the rules that divide it by devices.

Every operator does in time what a split says of one more mesh axis: it divides a factor, or does
not see that the batch is divided (its tensors are the same in every microbatch), or passes sums on
that are whole only when those of all microbatches are added, as the loss is in the end. So means
are those of the global batch, masks of dropout are drawn by the index in the global batch, and the
gradients are the same as without microbatches.

Unlike the devices of a mesh, microbatches need not be slices. Where a view makes one dim of
(sequence, batch), as torch's own attention does, a microbatch has every position of its samples:
as many **blocks** as positions, and of each block one part. What works on every element of a factor
alone, which is what dividing it into its single elements means, works on any of them together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import prod
from typing import Any

from autopar.errors import AutoparError, UnsupportedModelError
from autopar.ir.graph import Input, Operator, OperatorGraph, Role, Tensor, TensorSpec
from autopar.ir.rule import REPLICATED, SUMMED, BoundRule, Choice, Dim, Inner, OpRule, bind
from autopar.ir.sharding import INVARIANT, PARTIAL, Placement, shard
from autopar.ops import Proposals, bind_operator, bound_rules, with_parts
from autopar.ops.factories import COUNTERS, READ_NO_VALUES
from autopar.ops.proposals import bind_proposal, call_key
from autopar.ops.signatures import with_argument
from autopar.simulator.edges import Rules

INDEXING = "aten.index.Tensor"


@dataclass(frozen=True)
class Division:
    """``whole``, the graph of a global batch, and ``graph``, that of one of ``count`` microbatches.

    ``rules`` are bound to ``graph``, ``whole_rules`` to ``whole``. ``choices``: what time does to
    each operator. ``placements``: how each tensor lies in time: ``S(d)`` is different in every
    microbatch, ``I`` the same in all, ``P`` to be summed. ``means``: operators that divide by a
    count over all microbatches, which ``counting``, operators of ``whole``, must find beforehand.
    ``blocks``: of tensors cut in ``S(d)``, in how many blocks dim d lies, of each of which a
    microbatch has one part (1 where nothing is said). ``shares``: operators that add what is the
    same in all microbatches to a sum over them, a regulariser for example: each microbatch takes
    these inputs divided by ``count``.
    """

    whole: OperatorGraph
    graph: OperatorGraph
    count: int
    whole_rules: Rules = field(hash=False)
    rules: Rules = field(hash=False)
    choices: dict[str, Choice] = field(hash=False)
    placements: dict[str, Placement] = field(hash=False)
    means: tuple[str, ...] = ()
    counting: tuple[Operator, ...] = ()
    blocks: dict[str, int] = field(hash=False, default_factory=dict)
    shares: dict[str, tuple[int, ...]] = field(hash=False, default_factory=dict)


def divide(graph: OperatorGraph, count: int, proposals: Proposals = ()) -> OperatorGraph:
    """The graph of one of ``count`` microbatches; operators and tensors keep their names."""
    return division(graph, count, proposals).graph


def division(graph: OperatorGraph, count: int, proposals: Proposals = ()) -> Division:
    """``graph`` divided into ``count`` microbatches; 1 leaves it as it is.

    Raises:
        AutoparError: ``count`` does not divide the batch.
        UnsupportedModelError: an operator needs the whole batch; or has no rule at all.
    """
    return Divisible(graph, proposals).into(count)


class Divisible:
    """A graph that is divided into several numbers of microbatches: where the batch goes is worked
    out once, and equal operators are divided once."""

    def __init__(self, graph: OperatorGraph, proposals: Proposals = ()) -> None:
        self.graph, self.proposals = graph, proposals
        self.rules = bound_rules(graph, proposals)
        self._batches = _batches(graph)
        self._walked: dict[_Batch, _Propagation] = {}  # whose division is known to be possible

    def into(self, count: int) -> Division:
        """As ``division``."""
        if count == 1:
            return undivided(self.graph, self.rules)
        refusal: UnsupportedModelError | None = None
        first, *others = self._batches
        for batch in (first, *others):
            if count < 1 or batch.size % count:
                continue
            try:
                return self.of_batch(batch, count)
            except UnsupportedModelError as error:
                refusal = error if batch is first else refusal
        if refusal is not None:
            raise refusal
        size = self.batch_size
        work = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise AutoparError(
            f"{count} microbatches do not divide the batch of {size}; {work} would, or another "
            "batch"
        )

    def of_batch(self, batch: _Batch, count: int) -> Division:
        walked = self._walked.get(batch)
        walked = None if walked is None else walked.into(count)
        if walked is None:
            walked = _Propagation(self.graph, self.rules, count, batch)
        found = walked.division()
        self._walked[batch] = walked
        return found

    @property
    def batch_size(self) -> int:
        """How many samples the inputs hold: the size of the first dim that may be the batch and
        that can be divided at all."""
        for batch in self._batches:
            count = _least_factor(batch.size)
            try:
                if count > 1:
                    self.of_batch(batch, count)
                    return batch.size
            except UnsupportedModelError:
                continue
        return self._batches[0].size

    def powers(self) -> Iterator[Division]:
        """Into 1, 2, 4, ... microbatches as far as they divide the batch, and samples one by one;
        only the first when the model needs its batch whole."""
        yield undivided(self.graph, self.rules)
        for batch in self._batches:
            divided = False
            for count in _powers_of_two(batch.size):
                try:
                    found = self.of_batch(batch, count)
                except UnsupportedModelError:
                    break
                divided = True
                yield found
            if divided:
                return


def undivided(graph: OperatorGraph, rules: Rules) -> Division:
    """One microbatch, the whole batch."""
    choices = dict.fromkeys((o.name for o in graph.operators), REPLICATED)
    placements = dict.fromkeys((t.name for t in graph.tensors), INVARIANT)
    return Division(graph, graph, 1, rules, rules, choices, placements)


@dataclass(frozen=True)
class _Batch:
    """How many samples there are, and in which dim of which input."""

    size: int
    dims: dict[str, int] = field(hash=False)


def _batches(graph: OperatorGraph) -> tuple[_Batch, ...]:
    """Where the batch may be: the commonest first dim of the inputs (the first of those that are as
    common); else, as for layers that want (sequence, batch, ...), the commonest second dim of those
    with most dims. Other inputs are cut where they meet these."""
    shapes = {name: graph.spec(name).shape for name in graph.inputs if graph.spec(name).shape}
    most = max(map(len, shapes.values()), default=0)
    tall = {name: shape for name, shape in shapes.items() if len(shape) == most > 1}
    found = [_commonest(given, dim) for given, dim in ((shapes, 0), (tall, 1)) if given]
    return tuple(found) or (_Batch(1, {}),)


def _commonest(shapes: dict[str, tuple[int, ...]], dim: int) -> _Batch:
    sizes = Counter(shape[dim] for shape in shapes.values())
    size = max(sizes, key=lambda size: sizes[size])
    return _Batch(size, {name: dim for name, shape in shapes.items() if shape[dim] == size})


def batch_size(graph: OperatorGraph, proposals: Proposals = ()) -> int:
    """How many samples the inputs hold."""
    return Divisible(graph, proposals).batch_size


def batch_factors(graph: OperatorGraph, rules: Rules) -> dict[str, Choice] | None:
    """By operator, its factor that is the batch, or a dim in which the samples lie (one of
    ``RESERVED`` where it has none); ``None`` when some operator needs all samples at once."""
    for batch in _batches(graph):
        try:
            return _Propagation(graph, rules, 1, batch).factors()
        except UnsupportedModelError:
            continue
    return None


def _least_factor(size: int) -> int:
    return next((factor for factor in range(2, size + 1) if size % factor == 0), 1)


def divisions(graph: OperatorGraph, proposals: Proposals = ()) -> Iterator[Division]:
    """Those that are tried where not all are."""
    return Divisible(graph, proposals).powers()


def _powers_of_two(size: int) -> Iterator[int]:
    count = 2
    while count < size and size % count == 0:
        yield count
        count *= 2
    if size > 1:
        yield size


class _RefusedError(Exception):
    """Why an operator cannot be divided."""


@dataclass(frozen=True, slots=True)
class _Cut:
    """What time divides of an operator: a factor, or one part of each of its ``blocks``; ``factor``
    may also be one of ``RESERVED``."""

    factor: Choice
    blocks: int = 1


@dataclass(frozen=True, slots=True)
class _Piece:
    """How a tensor lies that is not the same in all microbatches: of each block of ``dim`` they
    have one part."""

    dim: int
    blocks: int = 1


_PRODUCTS = frozenset({"aten.mul.Tensor"})
"""Linear in either input, when the other is given."""

_ADD_A_NUMBER = frozenset(
    {
        "aten.add.Tensor",
        "aten.add.Scalar",
        "aten.sub.Tensor",
        "aten.sub.Scalar",
        "aten.rsub.Tensor",
        "aten.rsub.Scalar",
    }
)
"""With one tensor: their argument 1 is a number that is added to it, or that it is added to."""


class _Propagation:
    """Walks from the inputs to the loss, as often as tensors turn out to be needed in pieces."""

    def __init__(self, graph: OperatorGraph, rules: Rules, count: int, batch: _Batch) -> None:
        self.graph, self.rules, self.count = graph, rules, count
        self.forced: dict[str, _Cut] = {}  # operators without the batch among their inputs
        self.given = {name: _Piece(dim) for name, dim in batch.dims.items()}
        self.settled = False
        self.pieces: dict[str, _Piece] = {}
        self.sums: set[str] = set()  # tensors that are to be summed over all microbatches
        self.positions: set[str] = set()  # tensors that hold where in the batch a sample stands
        self.cuts: dict[str, _Cut] = {}
        self.shares: dict[str, tuple[int, ...]] = {}
        self.checked: set[tuple[int, int]] = set()  # sizes that are divided, and in how many blocks

    def into(self, count: int) -> _Propagation | None:
        """What the walks, which are done, come to for another number of microbatches; ``None``
        where they would have met another answer."""
        if any(size % (blocks * count) for size, blocks in self.checked):
            return None
        found = copy(self)
        found.count = count
        return found

    def division(self) -> Division:
        self.factors()
        return replace(self._undivided, count=self.count, **self._divided())

    @cached_property
    def _undivided(self) -> Division:
        """What is the same for every number of microbatches."""
        means = tuple(o.name for o in self.graph.operators if self._counts(o))
        return Division(
            whole=self.graph,
            graph=self.graph,
            count=1,
            whole_rules=self.rules,
            rules=self.rules,
            choices={
                name: REPLICATED if self._is_counter(name) else cut.factor
                for name, cut in self.cuts.items()
            },
            placements={tensor.name: self._placement(tensor.name) for tensor in self.graph.tensors},
            means=means,
            counting=self._counting(means),
            blocks={name: piece.blocks for name, piece in self.pieces.items() if piece.blocks > 1},
            shares=self.shares,
        )

    def factors(self) -> dict[str, Choice]:
        """What of each operator is cut with the batch.

        Raises:
            UnsupportedModelError: something cannot be.
        """
        while not self.settled:
            self._walk()
        self._check_ends()
        return {name: cut.factor for name, cut in self.cuts.items()}

    def _placement(self, name: str) -> Placement:
        if name in self.pieces:
            return shard(self.pieces[name].dim)
        return PARTIAL if name in self.sums else INVARIANT

    # ---- where the batch goes ------------------------------------------------------------------

    def _walk(self) -> None:
        self.settled = True
        self.positions.clear()
        self.sums.clear()
        self.shares.clear()
        self.pieces = dict(self.given)
        for operator in self.graph.operators:
            try:
                cut = self._cut(operator)
                self.cuts[operator.name] = cut
                self._place_outputs(operator, cut)
            except _RefusedError as refused:
                if not self.settled:
                    return  # it may not be so once all that is wanted in pieces is made in pieces
                raise self._refusal(operator, str(refused)) from None

    def _refusal(self, operator: Operator, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.graph.name} cannot be trained in {self.count} microbatches as in one batch: "
            f"{operator.name} ({operator.op}) {why}; plan it with one microbatch"
        )

    def _cut(self, operator: Operator) -> _Cut:
        """What time does to the operator, given how its inputs lie."""
        bound = self.rules[operator.name]
        if operator.name in self.forced:
            cut = self.forced[operator.name]
            if operator.op not in READ_NO_VALUES:
                self._demand_inputs(operator, bound, cut)
            return cut
        if operator.op in READ_NO_VALUES or not any(map(self._varies, operator.inputs)):
            return _Cut(REPLICATED)
        if not self.sums.isdisjoint(operator.inputs):
            self._pass_sums_on(operator, bound)
            return _Cut(SUMMED)
        if operator.op == INDEXING and (position := self._own_sample(operator)) is not None:
            return _Cut(position)
        self._refuse_positions(operator)
        cut = self._only_cut(operator, bound)
        self._check(bound, cut)
        self._demand_inputs(operator, bound, cut)
        return cut

    def _varies(self, name: str) -> bool:
        return name in self.pieces or name in self.sums

    def _pass_sums_on(self, operator: Operator, bound: BoundRule) -> None:
        """What is the same in all microbatches and is added to a sum over them, each adds a share
        of."""
        if any(name in self.pieces for name in operator.inputs):
            raise _RefusedError("meets each sample with a sum over the whole batch")
        summed = {i for i, name in enumerate(operator.inputs) if name in self.sums}
        if summed <= set(bound.rule.linear):
            shared = tuple(i for i in bound.rule.linear if i not in summed)
            if shared:
                self.shares[operator.name] = shared
        elif not (
            (operator.op in _PRODUCTS and len(summed) == 1)
            or (operator.op in _ADD_A_NUMBER and len(operator.inputs) == 1)
        ):
            raise _RefusedError("needs a sum over the whole batch")

    def _only_cut(self, operator: Operator, bound: BoundRule) -> _Cut:
        found = set()
        for dims, name in zip(bound.inputs, operator.inputs, strict=True):
            if name in self.pieces:
                piece = self.pieces[name]
                found.add(_cut_of(bound, dims[piece.dim], piece.blocks))
        if len(found) > 1:
            raise _RefusedError("meets samples with other samples of the batch")
        (cut,) = found
        return cut

    def _check(self, bound: BoundRule, cut: _Cut) -> None:
        """Whether pieces of this factor can be worked on one after the other."""
        factor, rule = cut.factor, bound.rule
        if not _separable(bound, factor):
            raise _RefusedError("needs all samples at once")
        self.checked.add((bound.sizes[factor], cut.blocks))
        if bound.sizes[factor] % (cut.blocks * self.count):
            raise _RefusedError(f"has them in groups, {bound.sizes[factor]} in all")
        if factor in rule.sums:
            if rule.addends:
                raise _RefusedError("adds something once to a sum over the batch")
        elif factor in rule.special:
            raise _RefusedError(
                "takes statistics over the whole batch: those of microbatches would be another "
                "model"
            )
        if cut.blocks > 1 and "*" in rule.special:
            raise _RefusedError("draws numbers by where a sample stands, here not next to others")
        if cut.blocks > 1 and rule.proposed:
            raise _RefusedError("has a rule that was tried on slices only")

    def _place_outputs(self, operator: Operator, cut: _Cut) -> None:
        bound = self.rules[operator.name]
        _, produced = bound.placements(cut.factor)
        for name, dims, placement in zip(operator.outputs, bound.outputs, produced, strict=True):
            piece = _piece_of(bound, dims, cut)
            if piece is not None:
                self.pieces[name] = piece
            elif placement == PARTIAL:
                self.sums.add(name)
        held = any(name in self.positions for name in operator.inputs)
        is_view = bound.rule.kind == "view" and operator.op != INDEXING
        if self._is_counter(operator.name) or (held and is_view):
            self.positions.update(operator.outputs)

    def _is_counter(self, operator: str) -> bool:
        return operator in self.forced and self.graph.operator[operator].op in COUNTERS

    # ---- tensors that are made without the batch, and have to be cut with it ------------------

    def _demand_inputs(self, operator: Operator, bound: BoundRule, cut: _Cut) -> None:
        for name, dims in zip(operator.inputs, bound.inputs, strict=True):
            wanted = _piece_of(bound, dims, cut)
            if wanted is None:
                if self._varies(name):
                    raise _RefusedError("meets each sample with the whole batch")
            elif not self._varies(name):
                self._demand(name, wanted)
            elif self.pieces.get(name) != wanted:
                raise _RefusedError("meets samples with other samples of the batch")

    def _demand(self, name: str, piece: _Piece) -> None:
        """Have the tensor in such pieces in the next walk."""
        tensor = self.graph.by_name[name]
        if tensor.role is Role.INPUT and name not in self.given:
            self.given[name] = piece
        elif tensor.role is Role.ACTIVATION:
            self._force(self.graph.producer[name], name, piece)
        else:
            raise _RefusedError(f"meets each sample with its own part of the {tensor.role} {name}")
        self.settled = False
        self.pieces[name] = piece

    def _force(self, producer: Operator, name: str, piece: _Piece) -> None:
        bound = self.rules[producer.name]
        dims = bound.outputs[producer.outputs.index(name)]
        cut = _cut_of(bound, dims[piece.dim], piece.blocks)
        if producer.op not in COUNTERS:
            self._check(bound, cut)
        elif not _counts_samples(producer) or cut.blocks > 1:
            raise _RefusedError(f"meets each sample with a number that {producer.name} gives it")
        if cut.factor in bound.rule.sums or producer.name in self.forced:
            raise _RefusedError(f"needs {name} in pieces, which is made as a whole")
        self.forced[producer.name] = cut

    # ---- indexing by the position in the batch -------------------------------------------------

    def _own_sample(self, operator: Operator) -> Choice | None:
        """``table[arange(batch), ...]`` gives each sample its own row: the factor of the positions;
        ``None`` when this is not that."""
        bound = self.rules[operator.name]
        (table, *_), indices = operator.inputs, operator.argument(1, "indices")
        piece = self.pieces.get(table)
        if piece is None or piece.blocks > 1 or piece.dim >= len(indices):
            return None
        index = indices[piece.dim]
        if not isinstance(index, Input):
            return None
        name = operator.inputs[index.index]
        shape = self.graph.spec(name).shape
        long = [dim for dim, size in enumerate(shape) if size > 1]
        if len(long) != 1 or shape[long[0]] != self.graph.spec(table).shape[piece.dim]:
            return None
        if not self._varies(name):
            if not self._comes_from_a_counter(name):
                return None
            self._demand(name, _Piece(long[0]))
        elif name not in self.positions:
            return None
        (factor,) = bound.inputs[index.index][long[0]]
        return factor

    def _comes_from_a_counter(self, name: str) -> bool:
        while (producer := self.graph.producer.get(name)) is not None:
            if producer.op in COUNTERS:
                return _counts_samples(producer)
            if self.rules[producer.name].rule.kind != "view":
                return False
            name = producer.inputs[0]
        return False

    def _refuse_positions(self, operator: Operator) -> None:
        is_view = self.rules[operator.name].rule.kind == "view"
        if not is_view and any(name in self.positions for name in operator.inputs):
            raise _RefusedError("depends on where in the batch a sample stands")

    # ---- the end -------------------------------------------------------------------------------

    def _check_ends(self) -> None:
        loss = self.graph.loss
        if loss not in self.sums:
            raise self._refusal(self.graph.producer[loss], "does not add up over the batch")
        for buffer, tensor in self.graph.mutations:
            if self._varies(tensor):
                raise self._refusal(
                    self.graph.producer[tensor],
                    f"gives the buffer {buffer} a value that depends on the whole batch",
                )

    def _counts(self, operator: Operator) -> bool:
        """Whether the operator divides by a count over the batch."""
        rule, factor = self.rules[operator.name].rule, self.cuts[operator.name].factor
        return factor in rule.sums and any(inner.factor == factor for inner in rule.inner)

    def _counting(self, means: tuple[str, ...]) -> tuple[Operator, ...]:
        """The operators of the whole graph that make what is counted: everything but the scores."""
        wanted = {name for mean in means for name in self.graph.operator[mean].inputs[1:]}
        found = []
        for operator in reversed(self.graph.operators):
            if wanted.isdisjoint(operator.outputs):
                continue
            if "*" in self.rules[operator.name].rule.special:
                raise self._refusal(operator, "makes targets at random")
            found.append(operator)
            wanted.update(operator.inputs)
        for tensor in self.graph.of_role(Role.PARAMETER):
            if tensor.name in wanted:
                (mean, *_) = means
                raise self._refusal(
                    self.graph.operator[mean],
                    f"has targets or weights that depend on the parameter {tensor.name}",
                )
        return tuple(reversed(found))

    # ---- one microbatch ------------------------------------------------------------------------

    @cached_property
    def _alike(self) -> list[int]:
        """For each operator the first that is divided as it is."""
        first: dict[Hashable, int] = {}
        pieces, graph = self.pieces, self.graph
        lies = {t.name: (t.spec.shape, t.spec.dtype, pieces.get(t.name)) for t in graph.tensors}
        found = []
        for i, o in enumerate(graph.operators):
            key = (
                o.op,
                o.arguments,
                o.keywords,
                id(self.rules[o.name]),
                self.cuts[o.name],
                self._is_counter(o.name),
                *(lies[name] for name in o.inputs),
                -1,
                *(lies[name] for name in o.outputs),
            )
            found.append(first.setdefault(key, i))
        return found

    def _divided(self) -> dict[str, Any]:
        """The graph of one microbatch, and its rules."""
        local: dict[tuple[TensorSpec, int], TensorSpec] = {}
        tensors = []
        for tensor in self.graph.tensors:
            piece = self.pieces.get(tensor.name)
            if piece is not None:
                key = tensor.spec, piece.dim
                if key not in local:
                    local[key] = self._local_spec(*key)
                tensor = Tensor(tensor.name, local[key], tensor.role, tensor.differentiable)
            tensors.append(tensor)
        specs = {tensor.name: tensor.spec for tensor in tensors}
        operators: list[Operator] = []
        for i, (operator, alike) in enumerate(zip(self.graph.operators, self._alike, strict=True)):
            if alike == i:
                operators.append(self._local(operator, specs))
            elif operators[alike] is self.graph.operators[alike]:
                operators.append(operator)
            else:
                of = operators[alike]
                operators.append(
                    Operator(
                        operator.name,
                        of.op,
                        operator.inputs,
                        operator.outputs,
                        of.arguments,
                        of.keywords,
                        operator.module,
                    )
                )
        divided = replace(self.graph, tensors=tuple(tensors), operators=tuple(operators))
        rules: dict[str, BoundRule] = {}
        for i, (operator, alike) in enumerate(zip(operators, self._alike, strict=True)):
            rules[operator.name] = (
                self._divided_rule(divided, operator)
                if alike == i
                else rules[operators[alike].name]
            )
        return {"graph": divided, "rules": with_parts(divided, rules)}

    def _local_spec(self, spec: TensorSpec, dim: int) -> TensorSpec:
        shape = list(spec.shape)
        shape[dim] //= self.count
        return TensorSpec(tuple(shape), spec.dtype)

    def _local(self, operator: Operator, specs: dict[str, TensorSpec]) -> Operator:
        inputs = tuple(specs[name].shape for name in operator.inputs)
        outputs = tuple(specs[name].shape for name in operator.outputs)
        if self._is_counter(operator.name):
            (end,) = outputs[0]
            return with_argument(operator, COUNTERS[operator.op], "end", end)
        if self.cuts[operator.name].factor == SUMMED and operator.op in _ADD_A_NUMBER:
            return self._adding_a_share(operator)
        localize = self.rules[operator.name].rule.localize
        return operator if localize is None else localize(operator, inputs, outputs)

    def _adding_a_share(self, operator: Operator) -> Operator:
        """A number that is added to a sum over all microbatches comes from each in part."""
        number = operator.argument(1, "other")
        if not isinstance(number, int | float):
            return operator
        return with_argument(operator, 1, "other", number / self.count)

    def _divided_rule(self, divided: OperatorGraph, operator: Operator) -> BoundRule:
        whole = self.rules[operator.name]
        specs = (
            tuple(divided.spec(name) for name in operator.inputs),
            tuple(divided.spec(name) for name in operator.outputs),
        )
        if specs == (whole.input_specs, whole.output_specs) and not whole.rule.joined:
            return whole
        if whole.rule.proposed:
            proposals: Proposals = ((call_key(operator, specs[0]), self._proposal(operator.name)),)
        else:
            proposals = ()
        found = bind_operator(divided, operator) or bind_proposal(divided, operator, proposals)
        if found is None:
            one = replace(divided, operators=(operator,))
            found = bound_rules(one, proposals)[operator.name]
        if not self._counts(self.graph.operator[operator.name]):
            return found
        # what it divides by, one number, is known before the first microbatch
        others = {inner.factor for inner in whole.rule.inner if inner.points}
        kept = tuple(inner for inner in found.rule.inner if inner.factor in others)
        return _bound_with_inner(found.rule, kept, *specs)

    def _proposal(self, operator: str) -> OpRule:
        rule, factor = self.rules[operator].rule, self.cuts[operator].factor
        sizes = tuple((f, n // self.count if f == factor else n) for f, n in rule.sizes)
        return replace(rule, sizes=sizes)


@lru_cache(maxsize=1024)
def _bound_with_inner(
    rule: OpRule,
    inner: tuple[Inner, ...],
    input_specs: tuple[TensorSpec, ...],
    output_specs: tuple[TensorSpec, ...],
) -> BoundRule:
    """One for equal operators, also of other divisions: stages are priced once by their rules."""
    return bind(replace(rule, inner=inner), input_specs, output_specs)


def _cut_of(bound: BoundRule, dim: Dim, blocks: int) -> _Cut:
    """The factor of a dim that is cut where each of so many blocks of the dim is cut."""
    before = 1
    for factor in dim:
        after = before * bound.sizes[factor]
        if before <= blocks < after and blocks % before == 0:
            return _Cut(factor, blocks // before)
        before = after
    raise _RefusedError("regroups samples together with what is not the batch")


def _piece_of(bound: BoundRule, dims: tuple[Dim, ...], cut: _Cut) -> _Piece | None:
    """How a tensor with these dims lies when the operator is cut so; ``None``: it is not cut."""
    for i, dim in enumerate(dims):
        if cut.factor in dim:
            before = prod(bound.sizes[factor] for factor in dim[: dim.index(cut.factor)])
            return _Piece(i, before * cut.blocks)
    return None


def _separable(bound: BoundRule, factor: str) -> bool:
    """Whether pieces of the factor can be worked on one by one: a factor that an axis may divide,
    or, in a view, one that is not the first of a dim."""
    if factor in bound.factors:
        return True
    tensors = bound.inputs + bound.outputs
    return (
        bound.rule.kind == "view"
        and factor not in bound.rule.whole
        and all(sum(factor in dim for dim in dims) == 1 for dims in tensors)
    )


def _counts_samples(operator: Operator) -> bool:
    """Whether it makes 0, 1, 2, ..."""
    start = operator.argument(0, "start", 0) if COUNTERS[operator.op] else 0
    return bool(start == 0 and operator.argument(2, "step", 1) == 1)


__all__ = ["Divisible", "Division", "batch_size", "divide", "division", "divisions", "undivided"]
