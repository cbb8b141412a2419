"""A lower bound for a price list, a selection near it, and what cannot be part of an optimum.

The linear relaxation of the flow-form ILP (``ilp``) has the dual

    maximise    Σ_n min_k θ̃[n,k]
    subject to  Σ_c max(0, a[t,c,σ] + b[t,c,σ′]) ≤ C[t,σ,σ′]      for every tensor t and pair (σ,σ′)
    where       θ̃[n,k] = θ[n,k] + Σ_(t made by n, c) a[t,c,σ(k)] + Σ_(t read by n) b[t,n,σ′(k)]

with θ the price of an alternative, C that of a redistribution, c the consumers of t. Every a and b
that satisfy the constraints give a lower bound; sweeps over the nodes raise it, one edge at a time
(sequential reweighted message passing: Kolmogorov, TRW-S, 2006; sharing redistributions is ours).
What memory costs enters θ and C with Lagrange multipliers (seconds per byte, by memory row).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autopar.simulator.price_list import Groups, Kept, PriceList, Selection, cheapest_storages

Seconds = NDArray[np.float64]
Index = NDArray[np.int64]
Mask = NDArray[np.bool_]

TOLERANCE = 1e-9
"""Relative slack when alternatives are excluded, against rounding in the sums."""


@dataclass
class _Edge:
    """One consumer of a flow, with its part of the dual. ``share``: of the price of each target,
    what this consumer may take as long as all take equal parts; ``None`` for the only consumer."""

    flow: int
    producer: int
    consumer: int
    source: Groups
    target: Groups
    share: Seconds | None
    a: Seconds
    b: Seconds
    positive: Seconds  # max(0, a + b)


@dataclass(frozen=True)
class Survivors:
    """What may still be part of a selection as fast as ``best_s``: alternatives of each node, pairs
    of each flow (indexed as in the price list)."""

    alternatives: tuple[Mask, ...]
    pairs: tuple[Mask, ...]

    @property
    def columns(self) -> int:
        return sum(int(m.sum()) for m in (*self.alternatives, *self.pairs))


@dataclass
class Dual:
    """Prices with memory multipliers in them, and a feasible dual."""

    price_list: PriceList
    weights: Seconds
    theta: list[Seconds]
    cost: list[Seconds]
    edges: list[_Edge]
    used: list[Seconds]  # of flows with several consumers: what they take together
    reduced: list[Seconds]
    incident: list[list[_Edge]]
    onward: dict[bool, list[list[_Edge]]]  # of each node those to later nodes, and all others
    dummy: int

    @property
    def bound_s(self) -> float:
        """No selection within the memory limits is faster."""
        spare = float(self.weights @ np.where(np.isfinite(self._room), self._room, 0.0))
        total = sum(float(r.min()) for r in self.reduced) + self.price_list.fixed_time_s
        return total - spare

    @property
    def _room(self) -> Seconds:
        limit = self.price_list.limit_bytes - self.price_list.fixed_memory_bytes
        return np.asarray(limit, dtype=np.float64)

    def excess(self, node: int) -> Seconds:
        """By how much the bound rises if the node takes each alternative."""
        reduced = self.reduced[node]
        return np.asarray(reduced - np.minimum.reduce(reduced))


def dual(
    price_list: PriceList,
    weights: Seconds | None = None,
    offered: Survivors | None = None,
    never_s: float = 0.0,
) -> Dual:
    """The dual with all a and b zero. What is not ``offered`` costs ``never_s`` more."""
    rows = len(price_list.limit_bytes)
    weights = np.zeros(rows) if weights is None else weights
    theta = [node.count * (node.time_s + weights @ node.memory_bytes) for node in price_list.nodes]
    for n, node in enumerate(price_list.nodes):
        for menu in node.menus:
            best = [
                float((t + weights @ m).min())
                for t, m in zip(menu.time_s, menu.memory_bytes, strict=True)
            ]
            theta[n] = theta[n] + menu.count * np.array(best)[menu.use]
    dummy = len(theta)
    theta.append(np.zeros(1))
    ends = [(flow.producer, flow.consumers, flow.groups) for flow in price_list.flows]
    cost = [flow.count * flow.time_s for flow in price_list.flows]
    if weights.any():
        # kept versions are paid like redistributions from a node without a choice
        ends += [(dummy, kept.holders, kept.groups) for kept in price_list.kept]
        cost += [kept.count * _price_of_versions(kept, weights) for kept in price_list.kept]
    if offered is not None:
        for n, alternatives in enumerate(offered.alternatives):
            theta[n] = theta[n] + never_s * ~alternatives
        for i, pairs in enumerate(offered.pairs):
            cost[i] = cost[i] + never_s * ~pairs
    edges = [edge for i, of in enumerate(ends) for edge in _edges(i, cost[i].shape, *of)]
    incident: list[list[_Edge]] = [[] for _ in theta]
    for edge in edges:
        incident[edge.producer].append(edge)
        if edge.consumer != edge.producer:
            incident[edge.consumer].append(edge)
    onward = {
        forward: [
            [e for e in of_node if (_other(e, node) > node) == forward]
            for node, of_node in enumerate(incident)
        ]
        for forward in (True, False)
    }
    used = [np.zeros_like(c) for c in cost]
    reduced = [t.copy() for t in theta]
    return Dual(price_list, weights, theta, cost, edges, used, reduced, incident, onward, dummy)


def _edges(
    number: int,
    shape: tuple[int, ...],
    producer: int,
    consumers: Sequence[tuple[int, Index]],
    groups: tuple[Groups, tuple[Groups, ...]],
) -> list[_Edge]:
    source, targets = groups
    shares: Sequence[Seconds | None] = [None]
    if len(consumers) > 1:
        able = np.zeros((len(consumers), shape[1]))
        for i, target in enumerate(targets):
            able[i, target.present] = 1.0
        shares = list(able / np.maximum(able.sum(axis=0), 1.0))
    return [
        _Edge(
            number,
            producer,
            consumer,
            source,
            target,
            share,
            np.zeros(shape[0]),
            np.zeros(shape[1]),
            np.zeros(shape),
        )
        for (consumer, _), target, share in zip(consumers, targets, shares, strict=True)
    ]


def _price_of_versions(kept: Kept, weights: Seconds) -> Seconds:
    """None costs nothing: the last version."""
    time_s, memory_bytes = kept.cheapest(weights)
    return np.append(time_s + weights @ memory_bytes, 0.0)[None, :]


LOOKS = 2
"""After how many sweeps a selection is looked for, besides at the end: a better bound does not
always lead to a better selection."""


def ascend(
    problem: Dual,
    sweeps: int,
    enough: Callable[[float], bool] = lambda bound_s: False,
    rise: float = 1e-6,
) -> Selection:
    """Raise the bound by so many sweeps there and back, until none raises it by more than ``rise``
    (relative), or until it is ``enough``; returns the best selection met on the way (which may not
    fit).

    At first the consumers of a tensor pay equal parts of a redistribution; then each takes what the
    others leave.
    """
    met: list[Selection] = []
    for fair in (True, False):
        if _sweep(problem, sweeps, fair, enough, rise, met):
            break
    met = met or [near_selection(problem)]
    if len(met) == 1:
        return met[0]
    return min(met, key=lambda selection: weighed_s(problem, selection))


def weighed_s(problem: Dual, selection: Selection) -> float:
    """Time and, with the multipliers, memory of a selection."""
    time_s, memory_bytes = problem.price_list.exchanged(selection, problem.weights)
    return time_s + float(problem.weights @ memory_bytes)


def _sweep(
    problem: Dual,
    sweeps: int,
    fair: bool,
    enough: Callable[[float], bool],
    rise: float,
    met: list[Selection],
) -> bool:
    order = range(len(problem.theta))
    before = problem.bound_s
    for sweep in range(sweeps):
        for node in order:
            _push(problem, node, forward=True, fair=fair)
        for node in reversed(order):
            _push(problem, node, forward=False, fair=fair)
        now = problem.bound_s
        if enough(now):
            return True
        done = now - before <= rise * abs(now)
        if done or sweep < LOOKS:
            met.append(near_selection(problem))
        if done:
            break
        before = now
    return False


def _push(problem: Dual, node: int, *, forward: bool, fair: bool) -> None:
    """Give the node's excess to its edges that lead on, and let the other ends have all that the
    edges can carry."""
    onward = problem.onward[forward][node]
    if not onward:
        return
    behind = len(problem.incident[node]) - len(onward)
    share = problem.excess(node) / max(len(onward), behind)
    for edge in onward:
        _move(problem, edge, node, share, fair=fair)


def _other(edge: _Edge, node: int) -> int:
    return edge.consumer if edge.producer == node else edge.producer


def _move(problem: Dual, edge: _Edge, node: int, share: Seconds, *, fair: bool) -> None:
    """Lower this end of the edge by ``share``, raise the other as far as the constraint allows."""
    capacity = problem.cost[edge.flow]
    if edge.share is not None:
        left = capacity - problem.used[edge.flow] + edge.positive
        capacity = capacity * edge.share if fair else left
    if edge.producer == node:
        give = edge.source.least(share)
        edge.a -= give
        problem.reduced[node] -= give[edge.source.of]
        new = np.minimum.reduce(capacity - edge.a[:, None], axis=0)
        problem.reduced[edge.consumer] += (new - edge.b)[edge.target.of]
        edge.b = new
    else:
        give = edge.target.least(share)
        edge.b -= give
        problem.reduced[node] -= give[edge.target.of]
        new = np.minimum.reduce(capacity - edge.b, axis=1)
        problem.reduced[edge.producer] += (new - edge.a)[edge.source.of]
        edge.a = new
    if edge.share is not None:
        edge.positive = np.maximum(edge.a[:, None] + edge.b, 0.0)
        problem.used[edge.flow] = problem.cost[edge.flow] - left + edge.positive


# ---- selections ---------------------------------------------------------------------------------


def decode(problem: Dual) -> tuple[int, ...]:
    """Alternatives chosen one node after the other, the undecided ones represented by the dual."""
    price_list = problem.price_list
    chosen: dict[int, int] = {problem.dummy: 0}
    wanted: list[set[int]] = [set() for _ in problem.cost]
    for node in range(len(price_list.nodes)):
        price = problem.theta[node].copy()
        for edge in problem.incident[node]:
            price += _edge_price(problem, edge, node, chosen, wanted)
        chosen[node] = int(price.argmin())
        for edge in problem.incident[node]:
            if edge.consumer == node:
                wanted[edge.flow].add(int(edge.target.of[chosen[node]]))
    return tuple(chosen[node] for node in range(len(price_list.nodes)))


def _edge_price(
    problem: Dual, edge: _Edge, node: int, chosen: dict[int, int], wanted: list[set[int]]
) -> Seconds:
    cost = problem.cost[edge.flow]
    if edge.producer == edge.consumer:
        return np.asarray(cost[edge.source.of, edge.target.of])
    if edge.consumer == node:
        if edge.producer in chosen:
            row = cost[edge.source.of[chosen[edge.producer]]].copy()
            row[list(wanted[edge.flow])] = 0.0
            return np.asarray(row[edge.target.of])
        return np.asarray(edge.b[edge.target.of])
    if edge.consumer in chosen:
        return np.asarray(cost[edge.source.of, edge.target.of[chosen[edge.consumer]]])
    return np.asarray(edge.a[edge.source.of])


def improve(problem: Dual, alternatives: Sequence[int], rounds: int = 20) -> tuple[int, ...]:
    """Change one node at a time as long as that lowers the price."""
    current = [*alternatives, 0]
    by_flow: dict[int, list[_Edge]] = {}
    for edge in problem.edges:
        by_flow.setdefault(edge.flow, []).append(edge)
    open_nodes = set(range(len(alternatives)))  # at which something may have changed
    for _ in range(rounds):
        for node in range(len(alternatives)):
            if node not in open_nodes:
                continue
            open_nodes.remove(node)
            price = _price_of_each(problem, node, current, by_flow)
            best = int(price.argmin())
            if price[best] < price[current[node]] * (1 - 1e-12) - 1e-18:
                current[node] = best
                for flow in {edge.flow for edge in problem.incident[node]}:
                    for edge in by_flow[flow]:
                        open_nodes |= {edge.producer, edge.consumer}
        open_nodes -= {problem.dummy}
        if not open_nodes:
            break
    return tuple(current[:-1])


def _price_of_each(
    problem: Dual, node: int, current: Sequence[int], by_flow: dict[int, list[_Edge]]
) -> Seconds:
    """Everything that depends on this node, for each of its alternatives, the others fixed."""
    price = problem.theta[node].copy()
    for flow in dict.fromkeys(edge.flow for edge in problem.incident[node]):
        edges = by_flow[flow]
        cost = problem.cost[flow]
        own = [edge for edge in edges if edge.consumer == node]
        others = {int(e.target.of[current[e.consumer]]) for e in edges if e.consumer != node}
        if edges[0].producer == node:
            source = edges[0].source.of
            for target in others:
                price += cost[source, target]
        else:
            source = np.full(len(price), edges[0].source.of[current[edges[0].producer]])
        paid: list[Index] = []
        unpaid = np.ones(cost.shape[1], dtype=bool)
        unpaid[list(others)] = False
        for edge in own:
            new = unpaid[edge.target.of]
            for earlier in paid:
                new &= edge.target.of != earlier
            price += np.where(new, cost[source, edge.target.of], 0.0)
            paid.append(edge.target.of)
    return price


def near_selection(problem: Dual) -> Selection:
    """A good selection under the multipliers; whether it fits is for the caller to see."""
    alternatives = improve(problem, decode(problem))
    return cheapest_storages(problem.price_list, alternatives, problem.weights)


# ---- exclusion ----------------------------------------------------------------------------------


def everything(price_list: PriceList) -> Survivors:
    return Survivors(
        tuple(np.ones(len(n.time_s), dtype=bool) for n in price_list.nodes),
        tuple(np.ones(f.time_s.shape, dtype=bool) for f in price_list.flows),
    )


def common(a: Survivors, b: Survivors) -> Survivors:
    """What survives both."""
    return Survivors(
        tuple(x & y for x, y in zip(a.alternatives, b.alternatives, strict=True)),
        tuple(x & y for x, y in zip(a.pairs, b.pairs, strict=True)),
    )


def survivors(problem: Dual, best_s: float) -> Survivors:
    """Drop what would raise the bound above ``best_s``: it is in no better selection."""
    room = best_s - problem.bound_s + TOLERANCE * max(abs(best_s), 1e-12)
    count = len(problem.price_list.nodes)
    alternatives = [problem.excess(n) <= room for n in range(count)]
    pairs = [np.zeros(c.shape, dtype=bool) for c in problem.cost[: len(problem.price_list.flows)]]
    for edge in problem.edges:
        if edge.flow < len(pairs):
            pairs[edge.flow] |= _surviving_pairs(problem, edge, room, alternatives)
    return Survivors(tuple(alternatives), tuple(pairs))


def _surviving_pairs(problem: Dual, edge: _Edge, room: float, alternatives: Sequence[Mask]) -> Mask:
    """The bound rises by the unused part of the redistribution's price, by what this consumer's
    dual gives up, and by the excess of the best alternatives on both sides."""
    both = edge.a[:, None] + edge.b
    used = np.maximum(both, 0.0) if edge.share is None else problem.used[edge.flow]
    unused = problem.cost[edge.flow] - used
    given_up = np.maximum(-both, 0.0)
    rise = unused + given_up
    rise = (
        rise
        + _least_or_inf(problem, edge.producer, edge.source.of, len(edge.a), alternatives)[:, None]
    )
    if edge.consumer != edge.producer:
        rise = rise + _least_or_inf(
            problem, edge.consumer, edge.target.of, len(edge.b), alternatives
        )
    return np.asarray(rise <= room)


def _least_or_inf(
    problem: Dual, node: int, groups: Index, count: int, alternatives: Sequence[Mask]
) -> Seconds:
    found = np.full(count, np.inf)
    excess = np.where(alternatives[node], problem.excess(node), np.inf)
    np.minimum.at(found, groups, excess)
    return found
