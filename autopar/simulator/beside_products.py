"""What products hide of the communication of activations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from autopar.ir.graph import OperatorGraph
from autopar.ir.strategy import Strategy
from autopar.simulator.costs import Costs
from autopar.simulator.edges import Edge, Rules
from autopar.simulator.operator_times import are_inputs, are_parameters
from autopar.simulator.overlap import Overlap, Streams
from autopar.simulator.redistribution import Transfer
from cost_models.interface import slowdown_of


@dataclass(frozen=True)
class BesideProducts:
    """What of the communication of activations products hide, in seconds of a microbatch.

    The gradient of a product's input is summed beside the product that gives the gradient of its
    weight (Megatron-LM: a column-parallel layer's all-reduce or reduce-scatter); an input that was
    not kept whole is gathered again beside the product that gives its own gradient. In pieces, what
    is gathered for a product arrives while it is at those that are there, and what is scattered
    leaves as it is made, all but the last piece; of gradients the same. ``run_again``: operators of
    which the forward is repeated in the backward.
    """

    graph: OperatorGraph
    rules: Rules
    strategy: Strategy
    costs: Costs
    overlap: Overlap
    run_again: frozenset[str]

    def hidden_s(
        self, activations: Iterable[tuple[Edge, int]], again: Iterable[tuple[Edge, int]]
    ) -> tuple[float, float]:
        """Forward and backward; ``again``: whose forward is repeated in the backward. Each with how
        many there are."""
        forward_s = backward_s = 0.0
        for edge, count in activations:
            there, back = edge.transfers(self.costs.mesh)
            forward_s += count * self._forward_s(edge, there)
            backward_s += count * self._backward_s(edge, back)
        for edge, count in again:
            backward_s += count * self._again_s(edge, edge.transfers(self.costs.mesh)[0])
        return forward_s, backward_s

    def _forward_s(self, edge: Edge, of: Sequence[Transfer]) -> float:
        if not self.overlap.in_pieces or len(of) != 1:
            return 0.0
        if of[0].kind == "all_gather":
            return self._beside_s(self._made_s(edge.consumers), of)
        if of[0].kind == "reduce_scatter":
            return self._beside_s(self._made_s(self._makers(edge)), of, last=True)
        return 0.0

    def _again_s(self, edge: Edge, of: Sequence[Transfer]) -> float:
        """Of products that are not run again, only gradients of weights want it."""
        only_gathered = len(of) == 1 and of[0].kind == "all_gather"
        if self.overlap.sums and only_gathered and self.run_again.isdisjoint(edge.consumers):
            return self._beside_s(self._gradients_s(edge.consumers, of_inputs=True), of)
        return self._forward_s(edge, of)

    def _backward_s(self, edge: Edge, of: Sequence[Transfer]) -> float:
        if self.overlap.in_pieces and len(of) == 1 and of[0].kind == "all_gather":
            return self._beside_s(self._gradients_s(self._makers(edge), of_inputs=True), of)
        return self._beside_s(self._gradients_s(edge.consumers, of_inputs=False), of)

    def _beside_s(self, products_s: float, of: Sequence[Transfer], last: bool = False) -> float:
        streams = Streams(slowdown_of(self.costs.cost_model))
        time_s = sum(map(self.costs.transfer_s, of))
        if last:
            time_s *= 1 - 1 / self.costs.mesh.sizes[of[0].axis]
        return max(0.0, streams.hidden_s(products_s, time_s)) if products_s else 0.0

    def _makers(self, edge: Edge) -> tuple[str, ...]:
        maker = self.graph.producer.get(edge.tensor)
        return () if maker is None else (maker.name,)

    def _made_s(self, names: Iterable[str]) -> float:
        return sum(self._product_s(name, None)[0] for name in names)

    def _gradients_s(self, names: Iterable[str], *, of_inputs: bool) -> float:
        return sum(self._product_s(name, of_inputs)[1] for name in names)

    def _product_s(self, name: str, of_inputs: bool | None) -> tuple[float, float]:
        """Of an operator that is one: its forward, and what gives the gradient of its input or of
        its weight."""
        operator = self.graph.operator.get(name)
        if operator is None or not self.rules[name].rule.products:
            return 0.0, 0.0
        wanted = are_inputs(self.graph, operator)
        if not of_inputs:
            weights = are_parameters(self.graph, operator)
            first = weights.index(True) if any(weights) else None
            wanted = tuple(i == first for i in range(len(weights)))
        return self.costs.operator_s(self.rules[name], self.strategy.splits[name], wanted)
