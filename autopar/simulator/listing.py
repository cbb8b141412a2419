"""From a graph, its rules and a mesh to a price list, and from a selection back to a strategy."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, product
from math import prod

import numpy as np
from numpy.typing import NDArray

from autopar.ir.graph import ITEM_BYTES, Operator, OperatorGraph, Role, TensorSpec
from autopar.ir.rule import PRODUCTS, RESERVED, BoundRule, Choice, Split
from autopar.ir.sharding import Mesh, Parts, Sharding, pieces
from autopar.ir.strategy import Stage, Storage, Strategy, Training
from autopar.simulator.blocks import Block, blocks
from autopar.simulator.clusters import Cluster, Link, clusters, links
from autopar.simulator.costs import ComputeCache, Costs, is_free
from autopar.simulator.edges import Rules, canonical, carries_gradient, saves_input
from autopar.simulator.folding import Folded, fold, whole
from autopar.simulator.memory import optimizer_bytes_per_element
from autopar.simulator.microbatches import batch_factors
from autopar.simulator.operator_times import launches_s
from autopar.simulator.parameter_prices import (
    LEVELS,
    Offers,
    ParameterPrices,
    Priced,
    parts_by_dim,
)
from autopar.simulator.price_list import Flow, Instead, Kept, Menu, Node, PriceList, Selection
from autopar.simulator.redistribution_table import (
    Codes,
    RedistributionTable,
    code,
    codes,
    placement_code,
    sharding,
)
from cost_models.interface import CostModel

Index = NDArray[np.int64]

AT_LOSS, AT_END = 0, 1
"""Memory rows: all activations saved and no gradient yet; all gradients and no activation left."""


@dataclass(frozen=True)
class Use:
    """Parameters that are used alike: by the same classes of operators at the same inputs; in the
    order of their first readers.

    ``readers``: (class, input position); ``saving``: for each reader, how many of its operators
    need one and the same parameter again in the backward.
    """

    parameters: tuple[str, ...]
    readers: tuple[tuple[int, int], ...]
    saving: tuple[int, ...]


@dataclass(frozen=True)
class Structure:
    """What does not depend on the mesh: worked out once for all of them."""

    graph: OperatorGraph
    rules: Rules
    _folded: dict[tuple[frozenset[int], ...], Folded] = field(default_factory=dict, compare=False)

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        rules = {name: bound.rule for name, bound in self.rules.items()}
        marks = {name: (rule.joined, rule.added) for name, rule in rules.items()}
        return blocks(self.graph, marks)

    @cached_property
    def class_of(self) -> tuple[int, ...]:
        found = list(range(len(self.graph.operators)))
        for block in self.blocks:
            for index in range(block.start, block.stop):
                found[index] = block.start + (index - block.start) % block.period
        return tuple(found)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Of the operators."""
        return tuple(operator.name for operator in self.graph.operators)

    @cached_property
    def number(self) -> dict[str, int]:
        """Which operator of the graph has each name."""
        return {name: i for i, name in enumerate(self.names)}

    @cached_property
    def position(self) -> dict[str, int]:
        """The number of the operator that makes each tensor."""
        return {name: i for i, o in enumerate(self.graph.operators) for name in o.outputs}

    @cached_property
    def copies(self) -> dict[int, int]:
        """How many operators each class stands for."""
        found: dict[int, int] = {}
        for representative in self.class_of:
            found[representative] = found.get(representative, 0) + 1
        return found

    def folded_in_runs(self, ends: tuple[frozenset[int], ...]) -> Folded:
        """The graph folded, each block in runs of copies that end (exclusively) there."""
        if ends not in self._folded:
            runs = [
                run for block, of in zip(self.blocks, ends, strict=True) for run in block.runs(of)
            ]
            self._folded[ends] = fold(self.graph, runs)
        return self._folded[ends]

    @cached_property
    def folded(self) -> Folded:
        """All copies alike."""
        return self.folded_in_runs(tuple(frozenset[int]() for _ in self.blocks))

    @cached_property
    def batch(self) -> dict[str, Choice] | None:
        """``batch_factors`` of the folded graph."""
        return batch_factors(self.folded.graph, self.rules)

    @cached_property
    def links(self) -> tuple[Link, ...]:
        return links(self.graph, self.class_of)

    @cached_property
    def clusters(self) -> tuple[Cluster, ...]:
        return clusters(self.graph, self.rules, self.class_of, self.copies, self.links)

    @cached_property
    def home(self) -> dict[int, int]:
        """The number of the cluster that each class belongs to."""
        return {m: i for i, cluster in enumerate(self.clusters) for m in cluster.members}

    @cached_property
    def choice_of(self) -> dict[int, Index]:
        """For each class, what each option of its cluster does to it: the number of a factor, or of
        one of ``RESERVED``, which come after these."""
        found = {}
        for cluster in self.clusters:
            for member in cluster.members:
                choices = (*self.bound(member).factors, *RESERVED)
                number = {choice: i for i, choice in enumerate(choices)}
                of = [number[option[member]] for option in cluster.options]
                found[member] = np.array(of, dtype=np.int64)
        return found

    @cached_property
    def uses(self) -> tuple[Use, ...]:
        position = self.number
        grouped: dict[object, list[str]] = {}
        details: dict[object, tuple[tuple[tuple[int, int], ...], tuple[int, ...]]] = {}
        for tensor in self.graph.parameters:
            readers: dict[tuple[int, int], int] = {}
            for operator, place in self.graph.consumers[tensor.name]:
                reader = (self.class_of[position[operator.name]], place)
                saves = saves_input(self.graph, operator, self.rules[operator.name], place)
                readers[reader] = readers.get(reader, 0) + saves
            key = (tensor.spec, tensor.differentiable, tuple(readers.items()))
            grouped.setdefault(key, []).append(tensor.name)
            details[key] = tuple(readers), tuple(readers.values())
        first = {
            name: position[self.graph.consumers[name][0][0].name]
            for names in grouped.values()
            for name in names
            if self.graph.consumers[name]
        }
        return tuple(
            Use(tuple(sorted(names, key=lambda name: first.get(name, 0))), *details[key])
            for key, names in grouped.items()
        )

    @cached_property
    def letters(self) -> dict[int, dict[str, str]]:
        """SOAP: for each class, where the index of a factor comes from: the batch dim of an input
        (S), another dim of an input (A), or a parameter (P). The batch is where microbatches would
        cut it; where they cannot, the first dim of every input."""
        graph, batch = self.folded.graph, self.batch
        first = "S" if batch is None else "A"
        origin = {
            t.name: (first + "A" * len(t.spec.shape))[: len(t.spec.shape)]
            for t in graph.of_role(Role.INPUT)
        }
        found: dict[int, dict[str, str]] = {}
        for operator in graph.operators:
            bound = self.rules[operator.name]
            letters = _letters(graph, operator, bound, origin)
            for name, dims in zip(operator.outputs, bound.outputs, strict=True):
                origin[name] = "".join(letters[dim[0]] if dim else "A" for dim in dims)
            if batch is not None and batch[operator.name] in letters:
                letters[batch[operator.name]] = "S"
            found.setdefault(self.class_of[self.number[operator.name]], letters)
        return found

    def bound(self, representative: int) -> BoundRule:
        return self.rules[self.graph.operators[representative].name]


def _letters(
    graph: OperatorGraph, operator: Operator, bound: BoundRule, origin: dict[str, str]
) -> dict[str, str]:
    """A factor that meets several origins is S before A before P; one that meets none is A."""
    met: dict[str, set[str]] = {factor: set() for factor in bound.sizes}
    for name, dims in zip(operator.inputs, bound.inputs, strict=True):
        parameter = graph.by_name[name].role is Role.PARAMETER
        known = "P" * len(dims) if parameter else origin.get(name, "")
        for dim, letter in zip(dims, known, strict=False):
            for factor in dim:
                if factor == dim[0] or factor in bound.factors:
                    met[factor].add(letter)
    return {f: next((x for x in "SAP" if x in letters), "A") for f, letters in met.items()}


LETTERS = "SAP"
"""Of SOAP, those that say what is divided inside an operator."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What one mesh axis may do: divide factors of these ``letters`` of SOAP, and keep parameters
    replicated or at one of these ZeRO ``levels``. ``always``: it divides whatever gradients flow
    through that it may and can divide, whether that is faster or not; ``weights``: so it does, by
    letter P, with products, attention, tables and losses over classes, before all else."""

    letters: str = LETTERS
    levels: tuple[int, ...] = LEVELS
    always: bool = False
    weights: bool = False


VOCABULARY = frozenset({"vocab", "classes"})
"""Factors of the ops that look up and compare tokens: tables, and losses over classes."""


@dataclass(frozen=True)
class Candidates:
    """The alternatives of a cluster on one mesh: which option each axis takes."""

    cluster: Cluster
    option: Index  # (alternatives, axes)

    def split(self, alternative: int, member: int) -> Split:
        return tuple(self.cluster.options[o][member] for o in self.option[alternative].tolist())


@dataclass
class Listing:
    """The price list of a graph on one mesh, and the way back from selections."""

    structure: Structure
    cost_model: CostModel
    mesh: Mesh
    memory_limit_bytes: float
    training: Training
    microbatches: int = 1
    compute_cache: ComputeCache = field(default_factory=dict)
    allowed: tuple[Allowed, ...] = ()  # for each axis; empty: everything on all
    cutoff_s: float = math.inf  # alternatives with which no strategy is faster are left out
    saved_share: float = 1.0  # of what is saved for the backward, how much the memory rows count

    def below(self, cutoff_s: float, saved_share: float | None = None) -> Listing:
        """The same prices for what is faster than ``cutoff_s``; compute is not priced again."""
        share = self.saved_share if saved_share is None else saved_share
        found = replace(self, cutoff_s=cutoff_s, saved_share=share)
        found.__dict__["_work"] = self._work
        return found

    @cached_property
    def costs(self) -> Costs:
        return Costs(self.cost_model, self.mesh, self.compute_cache)

    @cached_property
    def table(self) -> RedistributionTable:
        return RedistributionTable(self.costs)

    @property
    def graph(self) -> OperatorGraph:
        return self.structure.graph

    # ---- candidates ----------------------------------------------------------------------------

    @cached_property
    def candidates(self) -> tuple[Candidates, ...]:
        """The alternatives of each cluster that the cutoff leaves."""
        return tuple(
            replace(every, option=every.option[kept])
            for (every, _, _), kept in zip(self._work, self._left, strict=True)
        )

    @cached_property
    def _left(self) -> list[NDArray[np.bool_]]:
        room_s = self.cutoff_s - self.least_s
        return [copies * (time_s - time_s.min()) <= room_s for _, time_s, copies in self._work]

    @cached_property
    def _work(self) -> list[tuple[Candidates, NDArray[np.float64], int]]:
        """For each cluster every alternative, its compute, and how many copies there are."""
        found = []
        for cluster in self.structure.clusters:
            every = self._candidates(cluster)
            time_s = sum(
                (self._operator_time_s(every, member) for member in cluster.members),
                np.zeros(len(every.option)),
            )
            copies = self.structure.copies[cluster.members[0]]
            found.append((every, time_s * self.microbatches, copies))
        return found

    @cached_property
    def least_s(self) -> float:
        """What all operators cost at least, redistributions and parameters left out: quick to
        know."""
        return sum(copies * float(time_s.min()) for _, time_s, copies in self._work)

    @cached_property
    def launches_s(self) -> float:
        """What hosts that go ahead take in a step, of which price lists know nothing; more, where
        something is recomputed."""
        seen = self.structure.folded
        of_one_s = launches_s(seen.graph, self.structure.rules, self.costs, seen.weight)
        return self.microbatches * of_one_s

    def _candidates(self, cluster: Cluster) -> Candidates:
        """Options for each axis, where every operator's factors divide exactly."""
        per_axis = [
            [i for i, option in enumerate(cluster.options) if self._may(axis, cluster, option)]
            for axis in range(len(self.mesh.axes))
        ]
        every = np.array(list(product(*per_axis)), dtype=np.int64)
        legal = np.ones(len(every), dtype=bool)
        for member in cluster.members:
            bound = self.structure.bound(member)
            _, cuts = self._cuts(cluster, member, every)
            sizes = np.array([bound.limits[f] for f in bound.factors], dtype=np.int64)
            if len(sizes):
                legal &= (sizes % cuts == 0).all(axis=1)
        return Candidates(cluster, self._divided(cluster, every[legal]))

    def _divided(self, cluster: Cluster, option: Index) -> Index:
        """Without the alternatives that leave whole what an axis always divides."""
        for axis, allowed in enumerate(self.allowed):
            for wanted, divides in (
                (allowed.weights, self._divides_weights),
                (allowed.always, self._divides_first),
            ):
                found = np.array([wanted and divides(cluster, o) for o in cluster.options])
                dividing = found[option[:, axis]]
                if dividing.any():
                    option = option[dividing]
                    break
        return option

    def _divides_first(self, cluster: Cluster, option: dict[int, Choice]) -> bool:
        first = cluster.members[0]
        gradient = carries_gradient(self.graph, self.graph.operators[first])
        return gradient and option[first] not in RESERVED

    def _divides_weights(self, cluster: Cluster, option: dict[int, Choice]) -> bool:
        return any(
            self.structure.letters[m].get(option[m]) == "P"
            and (self.structure.bound(m).rule.kind in PRODUCTS or option[m] in VOCABULARY)
            for m in cluster.members
        )

    def _may(self, axis: int, cluster: Cluster, option: dict[int, Choice]) -> bool:
        """Whether the axis is allowed what is divided: the first member that divides anything
        decides, the others follow it."""
        divided = [(m, option[m]) for m in cluster.members if option[m] not in RESERVED]
        if not divided or not self.allowed or set(self.allowed[axis].letters) >= set(LETTERS):
            return True
        first, choice = divided[0]
        return self.structure.letters[first][choice] in self.allowed[axis].letters

    def _cuts(self, cluster: Cluster, member: int, option: Index) -> tuple[Index, Index]:
        """For each alternative: the choice of each axis (as a number), and into how many pieces
        each factor of the operator is cut."""
        bound = self.structure.bound(member)
        choice = self.structure.choice_of[member][option]
        sizes = np.array(self.mesh.sizes, dtype=np.int64)
        cuts = [np.where(choice == f, sizes, 1).prod(axis=1) for f in range(len(bound.factors))]
        return choice, np.stack(cuts, axis=1) if cuts else np.ones((len(option), 0), np.int64)

    # ---- nodes ---------------------------------------------------------------------------------

    @cached_property
    def price_list(self) -> PriceList:
        nodes = [self._node(number) for number in range(len(self.structure.clusters))]
        flows = [flow for link in self.structure.links for flow in self._flows(link)]
        for use, offers in self._shared_uses:
            flows += self._shared_flows(use, offers, len(nodes))
            nodes.append(self._shared_node(use, offers))
        output = Node("(output)", np.zeros(1), np.zeros((2, 1)))
        return PriceList(
            (*nodes, output),
            tuple(flows),
            tuple(self._kept()),
            np.array([self.memory_limit_bytes] * 2, dtype=float),
            fixed_time_s=2 * self.costs.host.pass_s * self.microbatches,
            fixed_memory_bytes=float(self._constant_bytes),
        )

    def in_rows(self, rows: int, in_flight: float, *, again: bool = False) -> PriceList:
        """The same choices for the whole graph cut into ``rows`` stages on as many meshes.

        One memory row, of all stages together: parameters, their gradients and optimizer states
        once, and what ``in_flight`` microbatches keep. Times are those of all stages together.
        ``again``: what is kept can be exchanged for no more than making it again takes at least.
        """
        alone = self.price_list
        uses = len(self.structure.clusters)
        own_apart = in_flight * (not again)
        nodes = tuple(
            replace(
                node,
                memory_bytes=own_apart * node.memory_bytes[[AT_LOSS]]
                if number < uses
                else node.memory_bytes[[AT_END]],
                menus=tuple(
                    replace(menu, memory_bytes=tuple(m[[AT_END]] for m in menu.memory_bytes))
                    for menu in node.menus
                ),
            )
            for number, node in enumerate(alone.nodes)
        )
        every = (*self._kept_or_again, *self._own_or_again) if again else alone.kept
        return PriceList(
            nodes,
            alone.flows,
            tuple(_in_flight(kept, in_flight) for kept in every),
            np.array([rows * self.memory_limit_bytes], dtype=float),
            alone.fixed_time_s,
            float(self._constant_bytes),
        )

    @cached_property
    def _kept_or_again(self) -> tuple[Kept, ...]:
        """What is kept, or a part of it that has to be gathered, or nothing of it: then its
        producer has to run again."""
        found = []
        for kept in self.price_list.kept:
            producer = self.graph.operators[self.structure.position[kept.name]]
            member = self.structure.class_of[self.structure.position[kept.name]]
            forward_s = float(self._forward_s(member).min()) / len(producer.outputs)
            sizes = kept.memory_bytes[AT_LOSS]
            part = np.minimum(sizes, self.graph.spec(kept.name).bytes / self.mesh.size)
            gather_s = np.array([self._least_gather_s(int(size)) for size in sizes])
            instead = (
                Instead(self.microbatches * gather_s, np.stack([part, part])),
                Instead(
                    np.full(len(sizes), self.microbatches * forward_s),
                    np.zeros_like(kept.memory_bytes),
                ),
            )
            found.append(replace(kept, instead=instead))
        return tuple(found)

    @cached_property
    def _own_or_again(self) -> tuple[Kept, ...]:
        """What operators keep that is neither their input nor their output, or nothing of it: then
        they have to run again."""
        found = []
        for number, candidates in enumerate(self.candidates):
            for member in candidates.cluster.members:
                own = self._own_saved_bytes(candidates, member)
                if not own.any():
                    continue
                sizes, version = np.unique(own, return_inverse=True)
                forward_s = np.full(len(sizes), math.inf)
                np.minimum.at(forward_s, version, self._forward_s(member))
                memory = np.stack([sizes, np.zeros_like(sizes)])
                instead = Instead(self.microbatches * forward_s, np.zeros_like(memory))
                holder = number, version.astype(np.int64)
                copies = self.structure.copies[member]
                name = self.graph.operators[member].name
                found.append(Kept(name, (holder,), memory, copies, (instead,)))
        return tuple(found)

    def _forward_s(self, member: int) -> NDArray[np.float64]:
        """Of an operator, for each alternative of its cluster."""
        candidates = self.candidates[self.structure.home[member]]
        return self._of_each_split(candidates, member, self._forward_of_split_s)

    def _least_gather_s(self, size_bytes: int) -> float:
        """Before a device has so much of a tensor that it did not have whole."""
        axes = [axis for axis, size in enumerate(self.mesh.sizes) if size > 1]
        return min(
            (self.costs.collective_s("all_gather", axis, size_bytes) for axis in axes),
            default=math.inf,
        )

    @property
    def _constant_bytes(self) -> int:
        return sum(
            t.spec.bytes for role in (Role.BUFFER, Role.CONSTANT) for t in self.graph.of_role(role)
        )

    def _node(self, number: int) -> Node:
        candidates = self.candidates[number]
        cluster = candidates.cluster
        _, every_s, copies = self._work[number]
        time_s = every_s[self._left[number]]
        memory = np.zeros((2, len(candidates.option)))
        own = sum(self._own_saved_bytes(candidates, m) for m in cluster.members)
        memory[AT_LOSS] = self.saved_share * own
        menus = tuple(
            self._menu(use)
            for use in self.structure.uses
            if len(use.readers) == 1 and self.structure.home[use.readers[0][0]] == number
        )
        name = self.graph.operators[cluster.members[0]].name
        return Node(name, time_s, memory, copies, menus)

    def _operator_time_s(self, candidates: Candidates, member: int) -> NDArray[np.float64]:
        """Compute of each alternative."""
        return self._of_each_split(candidates, member, self._split_time_s)

    def _of_each_split(
        self,
        candidates: Candidates,
        member: int,
        seconds: Callable[[BoundRule, Split, tuple[bool, ...]], float],
    ) -> NDArray[np.float64]:
        """For each alternative; those that do the same to the operator are asked for once."""
        operator, bound = self.graph.operators[member], self.structure.bound(member)
        backward = carries_gradient(self.graph, operator)
        differentiable = tuple(
            backward and self.graph.by_name[name].differentiable for name in operator.inputs
        )
        choice, cuts = self._cuts(candidates.cluster, member, candidates.option)
        if bound.rule.inner:
            rows = choice
        elif is_free(bound):  # costs the same however it is divided
            rows = np.zeros((len(choice), 0), dtype=np.int64)
        else:
            rows = cuts
        known: dict[tuple[int, ...], float] = {}
        found = []
        for k, row in enumerate(map(tuple, rows.tolist())):
            time_s = known.get(row)
            if time_s is None:
                split = candidates.split(k, member)
                time_s = known[row] = seconds(bound, split, differentiable)
            found.append(time_s)
        return np.array(found, dtype=np.float64)

    def _split_time_s(
        self, bound: BoundRule, split: Split, differentiable: tuple[bool, ...]
    ) -> float:
        total = sum(self.costs.operator_s(bound, split, differentiable))
        if bound.rule.inner:
            total += self.costs.inner_s(bound, split, "forward")
            total += self.costs.inner_s(bound, split, "backward") if any(differentiable) else 0.0
        return total

    def _forward_of_split_s(
        self, bound: BoundRule, split: Split, differentiable: tuple[bool, ...]
    ) -> float:
        return self.costs.operator_s(bound, split, differentiable)[0]

    def _own_saved_bytes(self, candidates: Candidates, member: int) -> NDArray[np.float64]:
        """What the operator keeps that is neither its input nor its output."""
        bound = self.structure.bound(member)
        total = np.zeros(len(candidates.option))
        _, cuts = self._cuts(candidates.cluster, member, candidates.option)
        for size_bytes, factors in self._own_saved(member):
            cut = np.ones(len(cuts))
            for i, factor in enumerate(bound.factors):
                if factor in factors:
                    cut = cut * cuts[:, i]
            total += size_bytes / cut
        return total

    def _own_bytes(self, member: int) -> int:
        return sum(size_bytes for size_bytes, _ in self._own_saved(member))

    def _own_saved(self, member: int) -> Iterator[tuple[int, list[str]]]:
        """Bytes and factors of each such tensor."""
        operator, bound = self.graph.operators[member], self.structure.bound(member)
        if not carries_gradient(self.graph, operator):
            return
        needed = [self.graph.by_name[name].differentiable for name in operator.inputs]
        for saved in bound.rule.saves:
            if saved.what.startswith(("input ", "output ")):
                continue
            if saved.needs and not any(needed[i] for i in saved.needs):
                continue
            names = saved.what.split()
            factors = [
                f for f in bound.sizes if f in names or ("..." in names and f.startswith("..."))
            ]
            item = ITEM_BYTES[saved.dtype or bound.output_specs[0].dtype]
            yield prod(bound.sizes[f] for f in factors) * item, factors

    # ---- shardings -----------------------------------------------------------------------------

    def _codes(self, member: int, side: str, position: int, differentiable: bool) -> Codes:
        """The code of an input's or output's sharding for each alternative of its cluster."""
        candidates = self.candidates[self.structure.home[member]]
        bound = self.structure.bound(member)
        by_option = [
            placement_code(
                canonical(
                    (bound.placements(o[member])[side == "output"][position],), differentiable
                )[0]
            )
            for o in candidates.cluster.options
        ]
        return codes(np.array(by_option, dtype=np.int64)[candidates.option])

    def _flows(self, link: Link) -> Iterator[Flow]:
        """The tensor's way to the other clusters. Where only some consumers send a gradient back,
        the way there and the way back are paid apart."""
        tensor = self.graph.by_name[link.tensor]
        home = self.structure.home
        outside = [(c, p) for c, p in link.consumers if home[c] != home[link.producer]]
        loops = [
            (c, p)
            for c, p in link.consumers
            if home[c] == home[link.producer] and not self._internal(link, c)
        ]
        readers = [
            (c, home[c], self._codes(c, "input", p, tensor.differentiable))
            for c, p in (*outside, *loops)
        ]
        returning = [carries_gradient(self.graph, self.graph.operators[c]) for c, _, _ in readers]
        wanted = [(node, found) for _, node, found in readers]
        if link.ends:
            whole = canonical(("I",) * len(self.mesh.axes), tensor.differentiable)
            wanted.append((self._output, np.array([code(whole)])))
            returning.append(True)
        if not wanted:
            return
        source = self._codes(link.producer, "output", link.output, tensor.differentiable)
        back = tensor.differentiable
        if not back or all(returning):
            yield self._flow(link, tensor.spec, source, wanted, (True, back))
            return
        yield self._flow(link, tensor.spec, source, wanted, (True, False))
        senders = [reader for reader, sends in zip(wanted, returning, strict=True) if sends]
        if senders:
            yield self._flow(link, tensor.spec, source, senders, (False, True))

    def _internal(self, link: Link, consumer: int) -> bool:
        """Whether producer and consumer, of one cluster, also are of one copy of their block."""
        return link.count == self.structure.copies[consumer] and consumer > link.producer

    @property
    def _output(self) -> int:
        return len(self.structure.clusters) + len(self._shared_uses)

    def _flow(
        self,
        link: Link,
        spec: TensorSpec,
        source: Codes,
        wanted: Sequence[tuple[int, Codes]],
        ways: tuple[bool, bool],
    ) -> Flow:
        sources, source_index = np.unique(source, return_inverse=True)
        targets, target_index = np.unique(
            np.concatenate([found for _, found in wanted]), return_inverse=True
        )
        forward, backward = self.table.seconds(spec, self.table.paths.block(sources, targets))
        starts = np.cumsum([0, *(len(found) for _, found in wanted)])
        consumers = tuple(
            (node, target_index[a:b].astype(np.int64))
            for (node, _), a, b in zip(wanted, starts, starts[1:], strict=False)
        )
        return Flow(
            link.tensor,
            self.structure.home[link.producer],
            source_index.astype(np.int64),
            consumers,
            (forward * ways[0] + backward * ways[1]) * self.microbatches,
            link.count,
        )

    # ---- parameters ----------------------------------------------------------------------------

    @cached_property
    def _shared_uses(self) -> tuple[tuple[Use, Offers], ...]:
        """Parameters with several kinds of users: their storage is a decision of its own."""
        return tuple(
            (use, self._shared_offers(use)) for use in self.structure.uses if len(use.readers) > 1
        )

    @cached_property
    def parameters(self) -> ParameterPrices:
        levels = [a.levels for a in self.allowed] or [LEVELS] * len(self.mesh.axes)
        return ParameterPrices(self.table, self.training, self.microbatches, levels)

    def _menu(self, use: Use) -> Menu:
        ((reader, position),) = use.readers
        tensor = self.graph.by_name[use.parameters[0]]
        found = self._codes(reader, "input", position, tensor.differentiable)
        uses, index = np.unique(found, return_inverse=True)
        lists = self._priced(use, uses.tolist())
        return Menu(
            use.parameters[0],
            index.astype(np.int64),
            tuple(priced.time_s for priced in lists),
            tuple(priced.memory_bytes for priced in lists),
            len(use.parameters),
        )

    def _priced(self, use: Use, targets: Sequence[int]) -> list[Priced]:
        tensor = self.graph.by_name[use.parameters[0]]
        return self.parameters.priced(
            tensor.spec, targets, use.saving[0], trained=tensor.differentiable
        )

    def storages(self, use: Use, used: Sharding) -> tuple[Storage, ...]:
        """The storages of the menu for this use, in its order."""
        (priced,) = self._priced(use, [code(used)])
        return self._as_storages(priced.offers)

    def _as_storages(self, offers: Offers) -> tuple[Storage, ...]:
        return tuple(map(offers.storage, range(len(offers.target))))

    def _shared_offers(self, use: Use) -> Offers:
        divided = ["P" in a.letters for a in self.allowed] or [False] * len(self.mesh.axes)
        parts: dict[int, Parts] = {}
        for reader, position in use.readers:
            bound = self.structure.bound(reader)
            for factor in bound.factors:
                parts.update(parts_by_dim((bound.placements(factor)[0][position],)))
        return self.parameters.any_storage(self.graph.spec(use.parameters[0]), divided, parts)

    def _shared_node(self, use: Use, offers: Offers) -> Node:
        tensor, prices = self.graph.by_name[use.parameters[0]], self.parameters
        update = prices.update_s(tensor.spec, offers) * tensor.differentiable
        memory = prices.memory_bytes(tensor.spec, offers, trained=tensor.differentiable)
        return Node(use.parameters[0], update, memory, len(use.parameters))

    def _shared_flows(self, use: Use, offers: Offers, node: int) -> Iterator[Flow]:
        """To each distinct use once, back from those that have a gradient, and again in the
        backward of each operator that needs it."""
        tensor = self.graph.by_name[use.parameters[0]]
        prices = self.parameters
        found = [self._codes(c, "input", p, tensor.differentiable) for c, p in use.readers]
        targets, index = np.unique(np.concatenate(found), return_inverse=True)
        starts = np.cumsum([0, *(len(codes_) for codes_ in found)])
        consumers = [
            (self.structure.home[c], index[a:b].astype(np.int64))
            for (c, _), a, b in zip(use.readers, starts, starts[1:], strict=False)
        ]
        to_each = offers.for_each(targets)

        def by_target(of_each: NDArray[np.float64]) -> NDArray[np.float64]:
            return np.ascontiguousarray(of_each.reshape(len(targets), -1).T)

        there = by_target(prices.use_s(tensor.spec, to_each, trained=False))
        returning = [
            consumer
            for consumer, (c, _) in zip(consumers, use.readers, strict=True)
            if tensor.differentiable and carries_gradient(self.graph, self.graph.operators[c])
        ]
        both = there
        if returning:
            both = by_target(prices.use_s(tensor.spec, to_each, trained=True))
        again = by_target(prices.gather_s(tensor.spec, to_each))
        every = np.arange(len(offers.target), dtype=np.int64)
        count, name = len(use.parameters), use.parameters[0]
        if len(returning) in (0, len(consumers)):
            yield Flow(name, node, every, tuple(consumers), both, count)
        else:
            yield Flow(name, node, every, tuple(consumers), there, count)
            yield Flow(name, node, every, tuple(returning), both - there, count)
        for consumer, saving in zip(consumers, use.saving, strict=True):
            if saving:
                yield Flow(name, node, every, (consumer,), again * saving, count)

    # ---- memory --------------------------------------------------------------------------------

    def _kept(self) -> Iterator[Kept]:
        """Saved inputs and outputs. Versions of one piece of memory (a tensor and its views) that
        have the same size are taken to be the same, and views of parameters, buffers and inputs are
        left out: never more than what is really kept."""
        held: dict[str, list[tuple[int, Index, int]]] = {}
        for link in self.structure.links:
            root = self._root(link.tensor)
            if self.graph.by_name[root].role is not Role.ACTIVATION:
                continue
            count = min(link.count, self._copies_of(root))
            for member, side, position in self._savers(link):
                tensor = self.graph.by_name[link.tensor]
                found = self._codes(member, side, position, tensor.differentiable)
                sizes = self._local_bytes(tensor.spec, found)
                if self.graph.spec(root).bytes < tensor.spec.bytes:  # expanded
                    sizes = np.full_like(sizes, self.graph.spec(root).bytes // self.mesh.size)
                held.setdefault(root, []).append((self.structure.home[member], sizes, count))
        for root, holders in held.items():
            sizes, index = np.unique(
                np.concatenate([size for _, size, _ in holders]), return_inverse=True
            )
            starts = np.cumsum([0, *(len(size) for _, size, _ in holders)])
            versions = tuple(
                (node, index[a:b].astype(np.int64))
                for (node, _, _), a, b in zip(holders, starts, starts[1:], strict=False)
            )
            memory = np.zeros((2, len(sizes)))
            memory[AT_LOSS] = self.saved_share * sizes
            yield Kept(root, versions, memory, min(count for _, _, count in holders))

    def _savers(self, link: Link) -> Iterator[tuple[int, str, int]]:
        producer = self.graph.operators[link.producer]
        if carries_gradient(self.graph, producer) and any(
            s.what == f"output {link.output}"
            for s in self.structure.bound(link.producer).rule.saves
        ):
            yield link.producer, "output", link.output
        for consumer, position in link.consumers:
            operator = self.graph.operators[consumer]
            bound = self.structure.bound(consumer)
            if saves_input(self.graph, operator, bound, position):
                yield consumer, "input", position

    def _root(self, tensor: str) -> str:
        """The tensor whose memory this one is a view of."""
        producer = self.graph.producer.get(tensor)
        while producer is not None and producer.inputs:
            if self.structure.rules[producer.name].rule.kind != "view":
                break
            tensor = producer.inputs[0]
            producer = self.graph.producer.get(tensor)
        return tensor

    def _copies_of(self, tensor: str) -> int:
        """How many operators the one that makes the tensor stands for."""
        structure = self.structure
        return structure.copies[structure.class_of[structure.position[tensor]]]

    def _local_bytes(self, spec: TensorSpec, found: Codes) -> Index:
        axes = len(self.mesh.axes)
        unique, inverse = np.unique(found, return_inverse=True)
        sizes = [spec.bytes // pieces(sharding(int(u), axes), self.mesh) for u in unique]
        return np.array(sizes, dtype=np.int64)[inverse]

    @property
    def least_bytes(self) -> float:
        """What a device holds at least when all are alike: parameters, optimizer states and what is
        saved for the backward (as far as it is counted), each split perfectly over all devices."""
        return self.least_kept_bytes + self.saved_share * self.least_saved_bytes

    @cached_property
    def least_saved_bytes(self) -> float:
        """Of that, what is saved for the backward of a microbatch, counted or not."""
        saved: dict[str, float] = {}
        for link in self.structure.links:
            if any(self._savers(link)):
                root = self._root(link.tensor)
                if self.graph.by_name[root].role is not Role.ACTIVATION:
                    continue
                size = min(self.graph.spec(link.tensor).bytes, self.graph.spec(root).bytes)
                held = size * min(link.count, self._copies_of(root))
                saved[root] = max(saved.get(root, 0.0), held)
        own = sum(
            self.structure.copies[member] * self._own_bytes(member)
            for member in self.structure.copies
        )
        return (sum(saved.values()) + own) / self.mesh.size

    @cached_property
    def least_kept_bytes(self) -> float:
        """Of that, what stays all step long."""
        kept = 0.0
        for tensor in self.graph.parameters:
            kept += tensor.spec.bytes
            if tensor.differentiable:
                kept += tensor.spec.numel * optimizer_bytes_per_element(tensor.spec, self.training)
        return kept / self.mesh.size

    # ---- back to a strategy --------------------------------------------------------------------

    def folded(self, selection: Selection, more: Sequence[frozenset[int]] = ()) -> Folded:
        """The graph with runs of copies that are kept alike folded (all are split alike). ``more``:
        by block, after which copies else they differ."""
        counts_of = self._storage_counts(selection)
        ends: dict[int, set[int]] = {}
        for use in self.structure.uses:
            counts = counts_of.get(use.parameters[0], ())
            if sum(count > 0 for count in counts) > 1:
                reader = use.readers[0][0]
                if len(use.parameters) != self.structure.copies[reader]:
                    return whole(self.graph)  # which copies read which is not known here
                ends.setdefault(reader, set()).update(accumulate(counts))
        others = more or (frozenset[int](),) * len(self.structure.blocks)
        return self.structure.folded_in_runs(
            tuple(
                frozenset(end for end in other if end).union(
                    *(ends.get(member, ()) for member in self._members(block))
                )
                for block, other in zip(self.structure.blocks, others, strict=True)
            )
        )

    @staticmethod
    def _members(block: Block) -> range:
        return range(block.start, block.start + block.period)

    def _storage_counts(self, selection: Selection) -> dict[str, tuple[int, ...]]:
        """By the first parameter of each use, how many copies take each storage."""
        return {
            menu.name: counts
            for node, storages_ in zip(self.price_list.nodes, selection.storages, strict=True)
            for menu, counts in zip(node.menus, storages_, strict=True)
        }

    def strategy(self, selection: Selection) -> Strategy:
        """The strategy that a selection stands for."""
        chosen = {
            member: candidates.split(selection.alternatives[number], member)
            for number, candidates in enumerate(self.candidates)
            for member in candidates.cluster.members
        }
        names = self.structure.names
        stage = Stage(names, tuple(range(self.mesh.size)), self.mesh)
        return Strategy(
            (stage,),
            dict(zip(names, map(chosen.__getitem__, self.structure.class_of), strict=True)),
            self._chosen_storage(selection, chosen),
            self.microbatches,
            training=self.training,
        )

    def _chosen_storage(self, selection: Selection, chosen: dict[int, Split]) -> dict[str, Storage]:
        found: dict[str, Storage] = {}
        for number, (use, offers) in enumerate(self._shared_uses, len(self.structure.clusters)):
            storage = offers.storage(selection.alternatives[number])
            found.update(dict.fromkeys(use.parameters, storage))
        menu_of = self._storage_counts(selection)
        for use in self.structure.uses:
            if len(use.readers) > 1:
                continue
            ((reader, position),) = use.readers
            tensor = self.graph.by_name[use.parameters[0]]
            inputs, _ = self.structure.bound(reader).shardings(chosen[reader])
            used = canonical(inputs[position], tensor.differentiable)
            offered = self.storages(use, used)
            counts = menu_of[use.parameters[0]]
            spread = [s for s, n in zip(offered, counts, strict=True) for _ in range(n)]
            found.update(zip(use.parameters, spread, strict=True))
        return {t.name: found[t.name] for t in self.graph.parameters}


def _in_flight(kept: Kept, microbatches: float) -> Kept:
    """In one memory row, of so many microbatches."""
    return replace(
        kept,
        memory_bytes=microbatches * kept.memory_bytes[[AT_LOSS]],
        instead=tuple(
            replace(other, memory_bytes=microbatches * other.memory_bytes[[AT_LOSS]])
            for other in kept.instead
        ),
    )
