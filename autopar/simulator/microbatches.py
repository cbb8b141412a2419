"""A step in microbatches: the batch divided by time, with the rules that divide it by devices.

Every operator does in time what a split says of one more mesh axis: it divides a factor, or does
not see that the batch is divided (its tensors are the same in every microbatch), or passes sums on
that are whole only when those of all microbatches are added, as the loss is in the end. So means
are those of the global batch, masks of dropout are drawn by the index in the global batch, and the
gradients are the same as without microbatches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from autopar.errors import AutoparError, UnsupportedModelError
from autopar.ir.graph import Input, Operator, OperatorGraph, Role, TensorSpec
from autopar.ir.rule import REPLICATED, SUMMED, BoundRule, Choice, OpRule, bind
from autopar.ir.sharding import INVARIANT, PARTIAL, Placement, shard, sharded_dim
from autopar.ops import Proposals, bind_operator, bound_rules
from autopar.ops.factories import COUNTERS, READ_NO_VALUES
from autopar.ops.proposals import call_key
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


def divide(graph: OperatorGraph, count: int, proposals: Proposals = ()) -> OperatorGraph:
    """The graph of one of ``count`` microbatches; operators and tensors keep their names."""
    return division(graph, count, proposals).graph


def division(graph: OperatorGraph, count: int, proposals: Proposals = ()) -> Division:
    """``graph`` divided into ``count`` microbatches; 1 leaves it as it is.

    Raises:
        AutoparError: ``count`` does not divide the batch.
        UnsupportedModelError: an operator needs the whole batch; or has no rule at all.
    """
    rules = bound_rules(graph, proposals)
    if count == 1:
        return undivided(graph, rules)
    size = batch_size(graph)
    if count < 1 or size % count:
        raise AutoparError(
            f"{count} microbatches do not divide the batch of {size}; give a divisor of {size}"
        )
    return _Propagation(graph, rules, count, size).division()


def undivided(graph: OperatorGraph, rules: Rules) -> Division:
    """One microbatch, the whole batch."""
    choices = dict.fromkeys((o.name for o in graph.operators), REPLICATED)
    placements = dict.fromkeys((t.name for t in graph.tensors), INVARIANT)
    return Division(graph, graph, 1, rules, rules, choices, placements)


def batch_size(graph: OperatorGraph) -> int:
    """The commonest leading dim of the inputs (the first of those that are as common)."""
    sizes = Counter(
        spec.shape[0] for spec in (graph.spec(name) for name in graph.inputs) if spec.shape
    )
    return max(sizes, key=lambda size: sizes[size]) if sizes else 1


def counts(graph: OperatorGraph) -> Iterator[int]:
    """The numbers of microbatches that are tried: 1, 2, 4, ... as far as they divide the batch,
    and samples one by one."""
    size = batch_size(graph)
    count = 1
    while count < size and size % count == 0:
        yield count
        count *= 2
    yield size


class _RefusedError(Exception):
    """Why an operator cannot be divided."""


class _Propagation:
    """Walks from the inputs to the loss, as often as tensors turn out to be needed in pieces."""

    def __init__(self, graph: OperatorGraph, rules: Rules, count: int, size: int) -> None:
        self.graph, self.rules, self.count = graph, rules, count
        self.forced: dict[str, str] = {}  # operators without the batch among their inputs
        self.given = {name: 0 for name in graph.inputs if graph.spec(name).shape[:1] == (size,)}
        self.settled = False
        self.placements: dict[str, Placement] = {}
        self.positions: set[str] = set()  # tensors that hold where in the batch a sample stands
        self.choices: dict[str, Choice] = {}

    def division(self) -> Division:
        while not self.settled:
            self._walk()
        self._check_ends()
        means = tuple(o.name for o in self.graph.operators if self._counts(o))
        divided = self._divided()
        return Division(
            whole=self.graph,
            graph=divided,
            count=self.count,
            whole_rules=self.rules,
            rules={o.name: self._divided_rule(divided, o) for o in divided.operators},
            choices={
                name: REPLICATED if self._is_counter(name) else choice
                for name, choice in self.choices.items()
            },
            placements=self.placements,
            means=means,
            counting=self._counting(means),
        )

    # ---- where the batch goes ------------------------------------------------------------------

    def _walk(self) -> None:
        self.settled = True
        self.positions.clear()
        self.placements = {
            tensor.name: shard(self.given[tensor.name]) if tensor.name in self.given else INVARIANT
            for tensor in self.graph.tensors
        }
        for operator in self.graph.operators:
            try:
                choice = self._choice(operator)
                self.choices[operator.name] = choice
                self._place_outputs(operator, choice)
            except _RefusedError as refused:
                if not self.settled:
                    return  # it may not be so once all that is wanted in pieces is made in pieces
                raise self._refusal(operator, str(refused)) from None

    def _refusal(self, operator: Operator, why: str) -> UnsupportedModelError:
        return UnsupportedModelError(
            f"{self.graph.name} cannot be trained in {self.count} microbatches as in one batch: "
            f"{operator.name} ({operator.op}) {why}; plan it with one microbatch"
        )

    def _choice(self, operator: Operator) -> Choice:
        """What time does to the operator, given how its inputs lie."""
        bound = self.rules[operator.name]
        if operator.name in self.forced:
            factor = self.forced[operator.name]
            if operator.op not in READ_NO_VALUES:
                self._demand_inputs(operator, bound, factor)
            return factor
        given = [self.placements[name] for name in operator.inputs]
        if operator.op in READ_NO_VALUES or all(placement == INVARIANT for placement in given):
            return REPLICATED
        if PARTIAL in given:
            return self._passing_sums_on(bound, given)
        if operator.op == INDEXING and (position := self._own_sample(operator)) is not None:
            return position
        self._refuse_positions(operator)
        factor = self._only_factor(operator, bound, given)
        self._check(bound, factor)
        self._demand_inputs(operator, bound, factor)
        return factor

    @staticmethod
    def _passing_sums_on(bound: BoundRule, given: list[Placement]) -> Choice:
        wanted, _ = bound.placements(SUMMED)
        linear = bound.rule.linear
        partial = tuple(i for i, placement in enumerate(given) if placement == PARTIAL)
        if not linear or partial != tuple(sorted(linear)) or len(wanted) != len(given):
            raise _RefusedError("needs a sum over the whole batch")
        if any(sharded_dim(placement) is not None for placement in given):
            raise _RefusedError("meets each sample with a sum over the whole batch")
        return SUMMED

    def _only_factor(self, operator: Operator, bound: BoundRule, given: list[Placement]) -> str:
        found = set()
        for dims, placement in zip(bound.inputs, given, strict=True):
            dim = sharded_dim(placement)
            if dim is not None:
                found.add(next((f for f in dims[dim] if bound.sizes[f] > 1), ""))
        if len(found) > 1:
            raise _RefusedError("meets samples with other samples of the batch")
        (factor,) = found
        return factor

    def _check(self, bound: BoundRule, factor: str) -> None:
        """Whether pieces of this factor can be worked on one after the other."""
        if factor not in bound.factors:
            raise _RefusedError("needs all samples at once")
        if bound.sizes[factor] % self.count:
            raise _RefusedError(f"has them in groups, {bound.sizes[factor]} in all")
        rule = bound.rule
        if factor in rule.sums:
            if rule.addends:
                raise _RefusedError("adds something once to a sum over the batch")
        elif factor in rule.special:
            raise _RefusedError("takes statistics over the whole batch")

    def _place_outputs(self, operator: Operator, choice: Choice) -> None:
        bound = self.rules[operator.name]
        _, produced = bound.placements(choice)
        for name, placement in zip(operator.outputs, produced, strict=True):
            if sharded_dim(placement) is None and placement != PARTIAL:
                placement = INVARIANT
            self.placements[name] = placement
        held = any(name in self.positions for name in operator.inputs)
        is_view = bound.rule.kind == "view" and operator.op != INDEXING
        if self._is_counter(operator.name) or (held and is_view):
            self.positions.update(operator.outputs)

    def _is_counter(self, operator: str) -> bool:
        return operator in self.forced and self.graph.operator[operator].op in COUNTERS

    # ---- tensors that are made without the batch, and have to be cut with it ------------------

    def _demand_inputs(self, operator: Operator, bound: BoundRule, factor: str) -> None:
        wanted, _ = bound.placements(factor)
        for name, placement in zip(operator.inputs, wanted, strict=True):
            dim, here = sharded_dim(placement), self.placements[name]
            if dim is None:
                if here != INVARIANT and placement != PARTIAL:
                    raise _RefusedError("meets each sample with the whole batch")
            elif here == INVARIANT:
                self._demand(name, dim)
            elif here != placement:
                raise _RefusedError("meets samples with other samples of the batch")

    def _demand(self, name: str, dim: int) -> None:
        """Have the tensor in pieces along ``dim`` in the next walk."""
        tensor = self.graph.by_name[name]
        if tensor.role is Role.INPUT and name not in self.given:
            self.given[name] = dim
        elif tensor.role is Role.ACTIVATION:
            producer = self.graph.producer[name]
            bound = self.rules[producer.name]
            dims = bound.outputs[producer.outputs.index(name)][dim]
            factor = next((f for f in dims if bound.sizes[f] > 1), "")
            counter = producer.op in COUNTERS
            if counter and not _counts_samples(producer):
                raise _RefusedError(
                    f"meets each sample with a number that {producer.name} gives it"
                )
            if not counter:
                self._check(bound, factor)
            if factor in bound.rule.sums or producer.name in self.forced:
                raise _RefusedError(f"needs {name} in pieces, which is made as a whole")
            self.forced[producer.name] = factor
        else:
            raise _RefusedError(f"meets each sample with its own part of the {tensor.role} {name}")
        self.settled = False
        self.placements[name] = shard(dim)

    # ---- indexing by the position in the batch -------------------------------------------------

    def _own_sample(self, operator: Operator) -> Choice | None:
        """``table[arange(batch), ...]`` gives each sample its own row: the factor of the positions;
        ``None`` when this is not that."""
        bound = self.rules[operator.name]
        (table, *_), indices = operator.inputs, operator.argument(1, "indices")
        cut = sharded_dim(self.placements[table])
        index = indices[cut] if cut is not None and cut < len(indices) else None
        if not isinstance(index, Input):
            return None
        name = operator.inputs[index.index]
        shape = self.graph.spec(name).shape
        long = [dim for dim, size in enumerate(shape) if size > 1]
        if len(long) != 1 or shape[long[0]] != self.graph.spec(table).shape[cut or 0]:
            return None
        if self.placements[name] == INVARIANT:
            if not self._comes_from_a_counter(name):
                return None
            self._demand(name, long[0])
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
        if self.placements[loss] != PARTIAL:
            raise self._refusal(self.graph.producer[loss], "does not add up over the batch")
        for buffer, tensor in self.graph.mutations:
            if self.placements[tensor] != INVARIANT:
                raise self._refusal(
                    self.graph.producer[tensor],
                    f"gives the buffer {buffer} a value that depends on the whole batch",
                )

    def _counts(self, operator: Operator) -> bool:
        """Whether the operator divides by a count over the batch."""
        rule, choice = self.rules[operator.name].rule, self.choices[operator.name]
        return choice in rule.sums and any(inner.factor == choice for inner in rule.inner)

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

    def _divided(self) -> OperatorGraph:
        tensors = tuple(
            replace(tensor, spec=self._local_spec(tensor.name)) for tensor in self.graph.tensors
        )
        specs = {tensor.name: tensor.spec for tensor in tensors}
        operators = tuple(self._local(operator, specs) for operator in self.graph.operators)
        return replace(self.graph, tensors=tensors, operators=operators)

    def _local_spec(self, name: str) -> TensorSpec:
        spec, dim = self.graph.spec(name), sharded_dim(self.placements[name])
        if dim is None:
            return spec
        shape = list(spec.shape)
        shape[dim] //= self.count
        return TensorSpec(tuple(shape), spec.dtype)

    def _local(self, operator: Operator, specs: dict[str, TensorSpec]) -> Operator:
        inputs = tuple(specs[name].shape for name in operator.inputs)
        outputs = tuple(specs[name].shape for name in operator.outputs)
        if self._is_counter(operator.name):
            (end,) = outputs[0]
            return with_argument(operator, COUNTERS[operator.op], "end", end)
        localize = self.rules[operator.name].rule.localize
        return operator if localize is None else localize(operator, inputs, outputs)

    def _divided_rule(self, divided: OperatorGraph, operator: Operator) -> BoundRule:
        whole = self.rules[operator.name]
        specs = (
            tuple(divided.spec(name) for name in operator.inputs),
            tuple(divided.spec(name) for name in operator.outputs),
        )
        if specs == (whole.input_specs, whole.output_specs):
            return whole
        if whole.rule.proposed:
            proposals: Proposals = ((call_key(operator, specs[0]), self._proposal(operator.name)),)
        else:
            proposals = ()
        found = bind_operator(divided, operator)
        if found is None:
            one = replace(divided, operators=(operator,))
            found = bound_rules(one, proposals)[operator.name]
        if not self._counts(self.graph.operator[operator.name]):
            return found
        # what it divides by is known before the first microbatch
        kept = tuple(inner for inner in found.rule.inner if inner.points)
        return bind(replace(found.rule, inner=kept), *specs)

    def _proposal(self, operator: str) -> OpRule:
        rule, choice = self.rules[operator].rule, self.choices[operator]
        sizes = tuple((f, n // self.count if f == choice else n) for f, n in rule.sizes)
        return replace(rule, sizes=sizes)


def _counts_samples(operator: Operator) -> bool:
    """Whether it makes 0, 1, 2, ..."""
    start = operator.argument(0, "start", 0) if COUNTERS[operator.op] else 0
    return bool(start == 0 and operator.argument(2, "step", 1) == 1)


__all__ = ["Division", "batch_size", "counts", "divide", "division", "undivided"]
