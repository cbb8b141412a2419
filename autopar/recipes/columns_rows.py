"""Which factor each axis divides, as people write it down: the batch by data axes; by a tensor axis
columns, then rows, and with them heads and the vocabulary (Megatron-LM, arXiv 1909.08053).

No prices: the same model is divided alike on every machine. Sizes decide only where an axis does
not divide something, which is then left whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autopar.errors import AutoparError
from autopar.ir.graph import Operator, OperatorGraph, Role
from autopar.ir.rule import (
    NOTHING,
    PRODUCTS,
    REPLICATED,
    RESERVED,
    SUMMED,
    BoundRule,
    Choice,
    Split,
)
from autopar.ir.sharding import INVARIANT, PARTIAL, Mesh, Placement, shard, sharded_dim
from autopar.simulator.edges import Rules, carries_gradient
from autopar.simulator.listing import VOCABULARY, Structure

DATA, CONTEXT, TENSOR = "data", "context", "tensor"
EXPERTS, TENSOR_EXPERTS = "experts", "tensor and experts"
"""What an axis of a mesh may be for."""


SEQUENCE = 1
"""The dim of the inputs that a context axis divides."""

BETWEEN = {"whole": "", "sequence": "A", "width": "P"}
"""What of the tensors between tensor-parallel regions is divided, and the letter of SOAP that such
a factor has."""


def splits_by_purpose(
    structure: Structure, mesh: Mesh, purposes: Sequence[str], between: str = "whole"
) -> dict[str, Split]:
    """A split for each operator; ``purposes`` has one of ``_AXES`` for each axis.

    - Data axes divide the batch.
    - A context axis divides the sequence, the second dim of the inputs, as far as it goes: what
      meets other positions (attention) takes its queries divided and keys and values whole.
    - Experts are products side by side, each with a parameter of its own (a batch of products that
      the parameter has, too). An axis for experts divides these, and what is between them, and else
      the batch; on its way there and back a tensor goes all to all. A tensor axis for experts does
      so with its own.
    - A tensor axis begins at a product with a parameter, which it divides by columns if all that
      reads them can go on with its own columns or heads to a product that sums over them (rows), or
      to the loss over classes; else the product is left whole. It divides a table by its rows (the
      vocabulary) where what is looked up is in the batch.
    - ``between``: these regions tensors are whole, or lie divided by their ``sequence`` (arXiv
      2205.05198) or ``width``, from where sums are made to where a column needs them whole.
    - Views, and what is made of parameters alone, take what their readers want.

    Equal blocks are split alike.

    Raises:
        AutoparError: the model needs its batch whole.
    """
    graph = structure.folded.graph
    by_batch = {DATA, EXPERTS} & set(purposes)
    batch = _batch(structure) if by_batch and mesh.size > 1 else {}
    splits: dict[str, Split] = {operator.name: () for operator in graph.operators}
    for purpose in purposes:
        axis = _AXES[purpose](graph, structure, mesh, batch, splits, BETWEEN[between])
        axis.choose()
        axis.agree_with_readers()
        splits = {name: (*split, axis.chosen[name]) for name, split in splits.items()}
    of_class: dict[int, Split] = {}
    for name, split in splits.items():
        of_class.setdefault(structure.class_of[structure.number[name]], split)
    return {
        name: of_class[of] for name, of in zip(structure.names, structure.class_of, strict=True)
    }


def _batch(structure: Structure) -> Mapping[str, Choice]:
    if structure.batch is None:
        raise AutoparError(
            f"{structure.graph.name} has operators that need the whole batch (batch norm in "
            "training, losses between samples), so that replicas cannot share it; autopar plan "
            "without --recipe finds what can be divided"
        )
    return structure.batch


@dataclass
class _Axis:
    """One axis, operator by operator. ``splits``: what earlier axes divide; ``letter``: of factors
    that are divided between tensor-parallel regions."""

    graph: OperatorGraph
    structure: Structure
    mesh: Mesh
    batch: Mapping[str, Choice]
    splits: Mapping[str, Split]
    letter: str
    chosen: dict[str, Choice] = field(default_factory=dict)
    made: dict[str, Placement] = field(default_factory=dict)
    varying: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        """``varying``: tensors that another batch changes."""
        self.varying.update(self.graph.inputs)
        for operator in self.graph.operators:
            if not self._is_same(operator):
                self.varying.update(operator.outputs)

    @property
    def rules(self) -> Rules:
        return self.structure.rules

    def choose(self) -> None:
        for operator in self.graph.operators:
            self._take(operator, self._choice(operator))

    def _choice(self, operator: Operator) -> Choice:
        raise NotImplementedError

    def _take(self, operator: Operator, choice: Choice) -> None:
        self.chosen[operator.name] = choice
        _, made = self.rules[operator.name].placements(choice)
        self.made.update(zip(operator.outputs, made, strict=True))

    def _divided(self, operator: Operator) -> dict[int, Placement]:
        return {
            i: self.made[name]
            for i, name in enumerate(operator.inputs)
            if sharded_dim(self.made.get(name, INVARIANT)) is not None
        }

    def _accepting(self, operator: Operator, given: Mapping[int, Placement]) -> Choice | None:
        """The factor that takes these inputs as they are."""
        bound = self.rules[operator.name]
        for factor in bound.factors:
            wanted, _ = bound.placements(factor)
            if all(wanted[i] == p for i, p in given.items()) and self._fits(operator, factor):
                return factor
        return None

    def _by_expert(self, operator: Operator, inside: set[str]) -> Choice | None:
        """The experts of a product, or of what is between two; what it makes is ``inside``."""
        divided = self._divided(operator)
        of_experts = {i: p for i, p in divided.items() if operator.inputs[i] in inside}
        if of_experts:
            found = self._accepting(operator, of_experts)
            if found is not None and not self._is_of_experts(operator, found):
                found = None
        else:
            found = next((f for f in self._experts_of(operator) if self._fits(operator, f)), None)
        if found is not None:
            inside.update(operator.outputs)
        return found

    def _is_of_experts(self, operator: Operator, factor: Choice) -> bool:
        """Whether it is a product of experts, or all that reads it comes to one, so divided."""
        if factor in self._experts_of(operator):
            return True
        _, made = self.rules[operator.name].placements(factor)
        readers = [
            (reader, position, placement)
            for name, placement in zip(operator.outputs, made, strict=True)
            for reader, position in self.graph.consumers[name]
        ]
        for reader, position, placement in readers:
            taken = self._accepting(reader, {position: placement})
            if taken is None or not self._is_of_experts(reader, taken):
                return False
        return bool(readers)

    def _experts_of(self, operator: Operator) -> list[Choice]:
        bound = self.rules[operator.name]
        held = {
            factor
            for name, dims in zip(operator.inputs, bound.inputs, strict=True)
            if name in self.graph.by_name and self._is_constant(name)
            for dim in dims
            for factor in dim
        }
        batches = {f for product in bound.rule.products for f in product.batch.split()}
        batches.add(bound.rule.apart)
        return [f for f in bound.factors if f in held & batches]

    def _is_constant(self, name: str) -> bool:
        return name not in self.varying

    def _fits(self, operator: Operator, choice: Choice) -> bool:
        before = self.splits[operator.name]
        rest = (NOTHING,) * (len(self.mesh.axes) - len(before) - 1)
        return self.rules[operator.name].divides((*before, choice, *rest), self.mesh)

    def agree_with_readers(self) -> None:
        """Where all readers want the same of a view, or of a product or of what is the same for all
        batches that its result is for different work, it is made so: then the tensor before it is
        redistributed, as it is for other columns, and not the one after it."""
        for operator in reversed(self.graph.operators):
            bound = self.rules[operator.name]
            is_view = bound.rule.kind == "view"
            may = is_view or bound.rule.products or self._is_same(operator)
            if self.chosen[operator.name] != NOTHING or not may:
                continue
            wanted = {
                self.rules[reader.name].placements(self.chosen[reader.name])[0][position]
                for name in operator.outputs
                if self.graph.by_name[name].differentiable
                for reader, position in self.graph.consumers[name]
            }
            if len(wanted) != 1 or wanted <= {INVARIANT, PARTIAL}:
                continue
            follows = is_view or not bound.rule.products
            offered = (*bound.factors, REPLICATED) if follows else (REPLICATED,)
            for choice in offered:
                if set(bound.placements(choice)[1]) == wanted and self._fits(operator, choice):
                    self._take(operator, choice)
                    break

    def _is_same(self, operator: Operator) -> bool:
        """For all batches: made of parameters and constants."""
        return self.varying.isdisjoint(operator.inputs)


class _Data(_Axis):
    def _choice(self, operator: Operator) -> Choice:
        choice = self.batch.get(operator.name, NOTHING)
        return NOTHING if choice in RESERVED or not self._fits(operator, choice) else choice


@dataclass
class _Experts(_Data):
    """``inside``: tensors that lie by experts."""

    inside: set[str] = field(default_factory=set)

    def _choice(self, operator: Operator) -> Choice:
        choice = self._by_expert(operator, self.inside)
        return super()._choice(operator) if choice is None else choice


class _Context(_Axis):
    """From the inputs on, each operator divides the factor that takes most of what is divided as it
    is; of several the one that takes the first. Sums only where that is all of it."""

    def choose(self) -> None:
        for name in self.graph.inputs:
            if len(self.graph.spec(name).shape) > SEQUENCE:
                self.made[name] = shard(SEQUENCE)
        super().choose()

    def _choice(self, operator: Operator) -> Choice:
        bound, divided = self.rules[operator.name], self._divided(operator)
        best, most = NOTHING, (0, 0)
        for factor in _with_queries(bound) if divided else ():
            wanted, _ = bound.placements(factor)
            taken = [i for i, placement in divided.items() if wanted[i] == placement]
            partly = len(taken) < len(divided)
            if not taken or (partly and factor in bound.rule.sums):
                continue
            rank = len(taken), -taken[0]
            if rank > most and self._fits(operator, factor):
                best, most = factor, rank
        return best


def _with_queries(bound: BoundRule) -> tuple[Choice, ...]:
    """What an axis may divide: of causal attention the queries too, although nothing here can run
    that (a device needs to know where its own begin)."""
    if bound.rule.kind != "attention":
        return bound.factors
    return tuple(dict.fromkeys((*bound.factors, bound.rule.products[0].m)))


@dataclass
class _Tensor(_Axis):
    """``inside``: tensors that lie in the columns or heads of some product."""

    inside: set[str] = field(default_factory=set)
    of_parameters: set[str] = field(default_factory=set)
    _ends: dict[tuple[str, Placement], bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.of_parameters.update(t.name for t in self.graph.of_role(Role.PARAMETER))

    def _take(self, operator: Operator, choice: Choice) -> None:
        super()._take(operator, choice)
        if operator.inputs and self.of_parameters.issuperset(operator.inputs):
            self.of_parameters.update(operator.outputs)

    def _choice(self, operator: Operator) -> Choice:
        bound = self.rules[operator.name]
        divided = self._divided(operator)
        inside = {i: p for i, p in divided.items() if operator.inputs[i] in self.inside}
        choice = self._accepting(operator, inside) if inside else self._begun(operator, bound)
        if choice is not None:
            _, made = bound.placements(choice)
            self.inside.update(
                name
                for name, placement in zip(operator.outputs, made, strict=True)
                if sharded_dim(placement) is not None
            )
            return choice
        if inside:
            return NOTHING
        return self._between(operator, bound, divided)

    # ---- columns, then rows --------------------------------------------------------------------

    def _begun(self, operator: Operator, bound: BoundRule) -> Choice | None:
        """The rows of a table, or the columns of a product."""
        weights = [i for i, n in enumerate(operator.inputs) if n in self.of_parameters]
        if not weights or len(weights) == len(operator.inputs):
            return None
        held = {f for i in weights for dim in bound.inputs[i] for f in dim}
        for factor in bound.factors:
            if factor not in held or not self._fits(operator, factor):
                continue
            if factor in bound.rule.sums:
                if factor in VOCABULARY and not self._is_same(operator):
                    return factor
            elif bound.rule.kind in PRODUCTS and self._go_on(operator, factor):
                return factor
        return None

    def _go_on(self, operator: Operator, factor: Choice) -> bool:
        """Whether all that is made so divided comes to a sum over it."""
        _, made = self.rules[operator.name].placements(factor)
        return all(
            sharded_dim(placement) is not None and self._comes_to_a_sum(name, placement)
            for name, placement in zip(operator.outputs, made, strict=True)
            if self.graph.by_name[name].differentiable
        )

    def _comes_to_a_sum(self, name: str, placement: Placement) -> bool:
        known = self._ends.get((name, placement))
        if known is None:
            readers = [
                (reader, position)
                for reader, position in self.graph.consumers[name]
                if carries_gradient(self.graph, reader)
            ]
            known = bool(readers) and all(
                self._passes(reader, position, placement) for reader, position in readers
            )
            self._ends[name, placement] = known
        return known

    def _passes(self, reader: Operator, position: int, placement: Placement) -> bool:
        factor = self._accepting(reader, {position: placement})
        if factor is None:
            return False
        return factor in self.rules[reader.name].rule.sums or self._go_on(reader, factor)

    # ---- between -------------------------------------------------------------------------------

    def _between(
        self, operator: Operator, bound: BoundRule, divided: Mapping[int, Placement]
    ) -> Choice:
        if self._adds_sums(operator, bound):
            return SUMMED
        if not self.letter or not carries_gradient(self.graph, operator) or bound.rule.products:
            return NOTHING
        if divided:
            return self._accepting(operator, divided) or NOTHING
        if bound.rule.kind == "view" or not any(map(self._is_sum, operator.inputs)):
            return NOTHING
        return self._of_letter(operator)

    def _of_letter(self, operator: Operator, but: Choice | None = None) -> Choice:
        letters = self.structure.letters[self.structure.class_of[self._number(operator)]]
        divisible = (f for f in self.rules[operator.name].factors if self._fits(operator, f))
        return next((f for f in divisible if letters[f] == self.letter and f != but), NOTHING)

    def _is_sum(self, name: str) -> bool:
        return self.made.get(name) == PARTIAL

    def _adds_sums(self, operator: Operator, bound: BoundRule) -> bool:
        """Whether it may as well work on sums that are still to be made: on views of one, or on
        several that nobody else reads, which are then made once for all."""
        if not operator.inputs or not all(map(self._is_sum, operator.inputs)):
            return False
        if not set(range(len(operator.inputs))) <= set(bound.rule.linear):
            return False
        alone = all(len(self.graph.consumers[name]) == 1 for name in operator.inputs)
        return bound.rule.kind == "view" or (alone and len(operator.inputs) > 1)

    def _number(self, operator: Operator) -> int:
        return self.structure.number[operator.name]


@dataclass
class _TensorExperts(_Tensor):
    """``apart``: tensors that lie by experts."""

    apart: set[str] = field(default_factory=set)

    def _choice(self, operator: Operator) -> Choice:
        choice = self._by_expert(operator, self.apart)
        if choice is not None:
            return choice
        if not self.apart.isdisjoint(operator.inputs):  # back from the experts
            return self._of_letter(operator, self._accepting(operator, self._divided(operator)))
        return super()._choice(operator)


_AXES: dict[str, type[_Axis]] = {
    DATA: _Data,
    EXPERTS: _Experts,
    CONTEXT: _Context,
    TENSOR: _Tensor,
    TENSOR_EXPERTS: _TensorExperts,
}

__all__ = ["CONTEXT", "DATA", "EXPERTS", "TENSOR", "TENSOR_EXPERTS", "splits_by_purpose"]
