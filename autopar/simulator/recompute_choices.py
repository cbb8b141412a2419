"""What is worth recomputing of a graph's repeated blocks: nothing, all, or what is cheap."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from autopar.ir.graph import ITEM_BYTES, Operator, OperatorGraph, Role
from autopar.ir.sharding import Sharding, local_shape
from autopar.ir.strategy import Strategy
from autopar.simulator.blocks import Block
from autopar.simulator.costs import Costs, inner_transfers
from autopar.simulator.edges import Rules, carries_gradient
from autopar.simulator.folding import Folded, fold
from autopar.simulator.memory import Versions, saved_bytes
from autopar.simulator.recomputation import recomputation
from autopar.simulator.redistribution import transfers
from autopar.simulator.stages import StagePart


@dataclass(frozen=True)
class BlockChoices:
    """What may be recomputed of the copies of one block under a strategy.

    All answers are the same for every copy. ``costs``: on the mesh of the strategy, which has one
    stage; ``graph`` is that of one microbatch. ``given`` and ``ends`` as in ``StagePart``, where
    it is that of a stage.
    """

    graph: OperatorGraph
    rules: Rules
    strategy: Strategy
    costs: Costs
    block: Block
    given: Mapping[str, Sharding] = field(default_factory=dict)
    ends: Mapping[str, Sharding] | None = None

    @staticmethod
    def of_part(part: StagePart, costs: Costs) -> BlockChoices:
        """Of all that a stage does, as one block."""
        block = Block(0, len(part.graph.operators), 1)
        rules = part.division.rules
        return BlockChoices(part.graph, rules, part.strategy, costs, block, part.given, part.ends)

    def operators(self, kind: str, copies: int) -> tuple[str, ...]:
        """Those to recompute in the first ``copies`` copies, the first since theirs are kept
        longest: when they are run again, what the others kept is gone."""
        return tuple(self.names(KINDS[kind](self), range(copies)))

    def freed_bytes(self, kind: str) -> float:
        """What a copy keeps less on a device."""
        return self._freed_bytes(KINDS[kind](self))

    def again_s(self, kind: str) -> float:
        """Seconds of running again what a copy did not keep, in one microbatch."""
        return self._again_s(KINDS[kind](self))

    @cached_property
    def full(self) -> tuple[int, ...]:
        """All operators but those that make what is read outside of the copy, which is what the
        next one is run again from, and those that need the other ranks for their result."""
        communicating = set(self.communicating)
        return tuple(offset for offset in self._read_inside if offset not in communicating)

    @cached_property
    def communicating(self) -> tuple[int, ...]:
        """What of a copy needs the other ranks for its result: run again with its collectives."""
        return tuple(filter(self._communicates_inside, self._read_inside))

    @cached_property
    def _read_inside(self) -> tuple[int, ...]:
        return tuple(
            offset
            for offset in range(self.block.period)
            if not any(self._is_read_outside(offset, copy) for copy in range(self.block.copies))
        )

    @cached_property
    def summands(self) -> tuple[int, ...]:
        """All but what the result of a copy, and nothing else, is made of: the result is made
        again, too, and what a redistribution of it brought is not kept for its readers. Worth it
        where these want whole what lies divided: the norms of a residual stream that is divided by
        its width."""
        ends = {
            self._operator(offset).name: self._operator(offset)
            for offset in range(self.block.period)
            if any(self._is_read_outside(offset, copy) for copy in range(self.block.copies))
        }
        parts = {
            name
            for operator in ends.values()
            for name in operator.inputs
            if all(reader.name in ends for reader, _ in self.graph.consumers[name])
        }
        return tuple(
            offset
            for offset in range(self.block.period)
            if parts.isdisjoint(self._operator(offset).outputs)
            and not self._communicates_inside(offset)
        )

    @cached_property
    def gathered(self) -> tuple[int, ...]:
        """What makes, in cheap work, a shard that its readers gather, and the views of that: the
        norms before the columns of sequence parallelism. Run again with its collective, it keeps a
        shard instead of the whole, as Megatron-LM does (arXiv 2205.05198, section 4.2.2)."""
        views: set[str] = set()  # of what is gathered
        found = []
        for offset in self.full:
            operator = self._operator(offset)
            rule = self.rules[operator.name].rule
            of_views = rule.kind == "view" and not views.isdisjoint(operator.inputs)
            if of_views or (not rule.products and self._is_gathered(operator)):
                views.update(operator.outputs)
                found.append(offset)
        return tuple(found)

    @cached_property
    def selective(self) -> tuple[int, ...]:
        """What keeps much for little work: runs of operators of which each makes a byte in fewer
        seconds, and which are run again in fewer seconds for a byte that is no longer kept, than
        the block does on average."""
        freed_bytes, again_s = self._freed_bytes(self.full), self._again_s(self.full)
        if freed_bytes <= 0:
            return ()
        price = again_s / freed_bytes
        cheap = [
            offset
            for offset in self.full
            if self._forward_s(self._operator(offset)) <= price * self._made_bytes(offset)
        ]
        found: list[int] = []
        for run in _runs(cheap):
            shortest = self._shortest(run)
            freed = self._freed_bytes(shortest)
            if freed > 0 and self._again_s(shortest) < price * freed:
                found += shortest
        return tuple(found)

    @cached_property
    def attention(self) -> tuple[int, ...]:
        """Products of two activations, fused attention, and all that lies on a way from one of them
        to another: what grows with the square of the sequence (arXiv 2205.05198, section 5)."""
        start, period = self.block.start, self.block.period
        operators = self.graph.operators[start : start + period]
        ends = {o.name for o in operators if self._multiplies_activations(o)}
        after: set[str] = set()  # tensors made from such a product
        for operator in operators:
            if operator.name in ends or not after.isdisjoint(operator.inputs):
                after.update(operator.outputs)
        before: set[str] = set()  # tensors that such a product is made from
        found = []
        for offset, operator in reversed(list(enumerate(operators))):
            leads = not before.isdisjoint(operator.outputs)
            if operator.name in ends or leads:
                before.update(operator.inputs)
            if operator.name in ends or (leads and not after.isdisjoint(operator.outputs)):
                found.append(offset)
        return tuple(offset for offset in reversed(found) if offset in self.full)

    @cached_property
    def alternate(self) -> tuple[int, ...]:
        """All but fused attention and every other product with a parameter, the first one kept: as
        torchtitan checkpoints operators (``selective``, ``op``)."""
        kinds = {o: self.rules[self._operator(o).name].rule.kind for o in self.full}
        products = [o for o, kind in kinds.items() if kind == "matmul" and self._weighs(o)]
        kept = {*products[::2], *(o for o, kind in kinds.items() if kind == "attention")}
        return tuple(offset for offset in self.full if offset not in kept)

    def _weighs(self, offset: int) -> bool:
        return any(map(self._is_weight, self._operator(offset).inputs))

    def _is_weight(self, name: str) -> bool:
        """A parameter, or what is made of parameters alone: a cast of one."""
        producer = self.graph.producer.get(name)
        if producer is None:
            return self.graph.by_name[name].role is Role.PARAMETER
        return bool(producer.inputs) and all(map(self._is_weight, producer.inputs))

    @cached_property
    def elementwise(self) -> tuple[int, ...]:
        """Norms, activation functions, sums: all that is neither a product nor attention."""
        return tuple(
            offset
            for offset in self.full
            if not self.rules[self._operator(offset).name].rule.products
        )

    def _multiplies_activations(self, operator: Operator) -> bool:
        kind = self.rules[operator.name].rule.kind
        made = [name for name in operator.inputs if name in self.graph.producer]
        return kind == "attention" or (kind in ("matmul", "convolution") and len(set(made)) > 1)

    # ---- runs of operators ---------------------------------------------------------------------

    def _shortest(self, run: tuple[int, ...]) -> tuple[int, ...]:
        """Without what frees nothing at its beginning: its result may as well be kept."""
        freed = self._freed_bytes(run)
        while len(run) > 1 and (of_rest := self._freed_bytes(run[1:])) >= freed:
            run, freed = run[1:], of_rest
        return run

    def _freed_bytes(self, offsets: tuple[int, ...]) -> float:
        return (self._kept_bytes - self._saved_bytes(offsets)) / self.block.copies

    @cached_property
    def _kept_bytes(self) -> int:
        """Where nothing is recomputed."""
        return self._saved_bytes(())

    def _again_s(self, offsets: tuple[int, ...]) -> float:
        copy = range(1, 2) if self.block.copies > 1 else range(1)
        names = set(self.names(offsets, copy))
        again = recomputation(self._folded.graph, self.rules, self._with(offsets)).again
        return sum(self._forward_s(self.graph.operator[n]) for n in again if n in names)

    def _saved_bytes(self, offsets: tuple[int, ...]) -> int:
        if offsets not in self._saved:
            of = self.graph, self.rules, self._with(offsets)
            self._saved[offsets] = saved_bytes(*of, self._folded, versions=self._versions)
        return self._saved[offsets]

    @cached_property
    def _saved(self) -> dict[tuple[int, ...], int]:
        return {}

    @cached_property
    def _versions(self) -> Versions:
        splits, mesh = self.strategy.splits, self.strategy.mesh
        return Versions(self._folded.graph, self.rules, splits, mesh, self.given, self.ends)

    def _with(self, offsets: tuple[int, ...]) -> Strategy:
        names = self.names(offsets, range(self.block.copies))
        return replace(self.strategy, recompute=tuple(names), repeat_collectives=())

    @cached_property
    def _folded(self) -> Folded:
        return fold(self.graph, (self.block,))

    def names(self, offsets: Sequence[int], copies: Sequence[int]) -> Iterator[str]:
        """The operators at these places of these copies."""
        for copy in copies:
            start = self.block.start + copy * self.block.period
            yield from (self.graph.operators[start + offset].name for offset in offsets)

    # ---- one operator --------------------------------------------------------------------------

    def _operator(self, offset: int) -> Operator:
        return self.graph.operators[self.block.start + offset]

    def _is_read_outside(self, offset: int, copy: int) -> bool:
        start = self.block.start + copy * self.block.period
        inside = range(start, start + self.block.period)
        made = self.graph.operators[start + offset].outputs
        ends = {self.graph.loss, *(self.ends or ()), *(new for _, new in self.graph.mutations)}
        return not ends.isdisjoint(made) or any(
            self._number[reader.name] not in inside
            for name in made
            for reader, _ in self.graph.consumers[name]
        )

    @cached_property
    def _number(self) -> dict[str, int]:
        return {operator.name: i for i, operator in enumerate(self.graph.operators)}

    def _is_gathered(self, operator: Operator) -> bool:
        """Whether its result, a shard, is wanted whole."""
        _, produced = self.rules[operator.name].shardings(self.strategy.splits[operator.name])
        mesh = self.strategy.mesh
        for name, made in zip(operator.outputs, produced, strict=True):
            for reader, position in self.graph.consumers[name]:
                split = self.strategy.splits[reader.name]
                wanted = self.rules[reader.name].shardings(split)[0][position]
                moves = transfers(made, wanted, self.graph.spec(name).bytes, mesh)
                if any(move.kind == "all_gather" for move in moves):
                    return True
        return False

    def _communicates_inside(self, offset: int) -> bool:
        operator = self._operator(offset)
        split, mesh = self.strategy.splits[operator.name], self.strategy.mesh
        inner = inner_transfers(self.rules[operator.name], split, mesh, "forward")
        return any(mesh.sizes[transfer.axis] > 1 for transfer in inner)

    def _forward_s(self, operator: Operator) -> float:
        differentiable = tuple(
            carries_gradient(self.graph, operator) and self.graph.by_name[name].differentiable
            for name in operator.inputs
        )
        split = self.strategy.splits[operator.name]
        return self.costs.operator_s(self.rules[operator.name], split, differentiable)[0]

    def _made_bytes(self, offset: int) -> int:
        """Of all its results, on one rank."""
        operator = self._operator(offset)
        bound, mesh = self.rules[operator.name], self.strategy.mesh
        _, produced = bound.shardings(self.strategy.splits[operator.name])
        total = 0
        for spec, sharding in zip(bound.output_specs, produced, strict=True):
            size = ITEM_BYTES[spec.dtype]
            for n in local_shape(spec.shape, sharding, mesh):
                size *= n
            total += size
        return total


KINDS: dict[str, Callable[[BlockChoices], tuple[int, ...]]] = {
    "none": lambda of: (),
    "attention": lambda of: of.attention,
    "selective": lambda of: of.selective,
    "full": lambda of: of.full,
}
"""By the name that ``--recompute`` takes: which operators of a copy, counted from its first."""

RECIPE_KINDS: dict[str, Callable[[BlockChoices], tuple[int, ...]]] = {
    **KINDS,
    "alternate": lambda of: of.alternate,
    "elementwise": lambda of: of.elementwise,
}
"""Those that recipes have: what people do, though a search has better."""


def _runs(offsets: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Neighbours together.

    >>> list(_runs([1, 2, 5]))
    [(1, 2), (5,)]
    """
    run: tuple[int, ...] = ()
    for offset in offsets:
        if run and offset != run[-1] + 1:
            yield run
            run = ()
        run = (*run, offset)
    if run:
        yield run


__all__ = ["KINDS", "RECIPE_KINDS", "BlockChoices"]
