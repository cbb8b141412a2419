"""What equal groups of devices could do with a traced model at best, before stages are chosen.

A pipeline of equal rows does the work of the whole graph once, each row an equal part of it; and
keeps an equal part of the parameters, and of what each microbatch keeps that is in flight on the
fullest row. So the price list of the graph on the mesh of one row, its time and its memory divided
by the rows, bounds all of its stages, splits and storages; what crosses a stage's end arrives as it
departs, for nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from math import gcd

from autopar.ir.rule import REPLICATED
from autopar.ir.search import Problem
from autopar.ir.sharding import Mesh
from autopar.ir.strategy import Strategy
from autopar.schedules import SCHEDULES
from autopar.searchers.approach import Wanted, Weights, approach
from autopar.searchers.stage_proposals import cuts
from autopar.simulator import meshes
from autopar.simulator.costs import ComputeCache, Costs
from autopar.simulator.edges import carries_gradient
from autopar.simulator.listing import Allowed, Listing, Structure
from autopar.simulator.pipelines import StagePrices
from autopar.simulator.price_list import PriceList, Selection
from autopar.simulator.stage_problem import facts_of

MOST_ACTIONS = 4000
"""Forwards of rows that are made only to count what is in flight."""

CHUNKS = 4
"""As many stages as a row likely has at most where that shortens the ramp of a pipeline."""

MOST_CHAINS = 4
"""Of numbers of microbatches: each bounds a mesh anew."""

MARGIN = 0.95
"""Of the memory: where a selection is to fit, too, on rows that are not quite equal."""


@dataclass(frozen=True, slots=True)
class Prospect:
    """Plans of ``rows`` groups of devices, each with ``mesh``, in one of ``counts`` microbatches;
    none has a shorter step than ``bound_s``."""

    rows: int
    mesh: Mesh
    counts: tuple[int, ...]
    bound_s: float = 0.0

    @property
    def is_single(self) -> bool:
        return len(self.counts) == 1

    def halves(self) -> tuple[Prospect, Prospect]:
        """
        >>> [half.counts for half in Prospect(2, Mesh(()), (1, 2, 4)).halves()]
        [(1,), (2, 4)]
        """
        middle = len(self.counts) // 2
        return (
            replace(self, counts=self.counts[:middle]),
            replace(self, counts=self.counts[middle:]),
        )


def chains(counts: Iterable[int]) -> list[tuple[int, ...]]:
    """Such that in each all are multiples of the smallest: by their odd factors. One, where there
    are too many of these.

    >>> chains((1, 2, 3, 4, 6))
    [(1, 2, 4), (3, 6)]
    """
    by_odd: dict[int, list[int]] = {}
    for count in counts:
        by_odd.setdefault(count // (count & -count), []).append(count)
    found = [tuple(of) for of in by_odd.values()]
    return found if len(found) <= MOST_CHAINS else [tuple(counts)]


@dataclass(frozen=True, slots=True)
class Likely:
    """A strategy of one stage for a row's mesh, and what a pipeline of it should take."""

    prospect: Prospect
    strategy: Strategy
    step_s: float

    @property
    def count(self) -> int:
        return self.strategy.microbatches


@dataclass
class Prospects:
    """``structures``: by number of microbatches. ``units`` as in ``simulator.units``.
    ``compute_cache``: of one row, which is priced as a whole step; of several by ``stage_prices``.
    """

    problem: Problem
    structures: Callable[[int], Structure]
    units: tuple[range, ...]
    compute_cache: ComputeCache
    stage_prices: StagePrices
    _listings: dict[tuple[Mesh, int], Listing] = field(default_factory=dict)
    _hints: dict[tuple[int, Mesh, int], Weights] = field(default_factory=dict)
    _imbalances: dict[int, float] = field(default_factory=dict)

    def listing(self, mesh: Mesh, count: int) -> Listing:
        if (mesh, count) not in self._listings:
            problem, stages = self.problem, self.stage_prices
            alone = mesh.size == problem.cost_model.devices
            self._listings[mesh, count] = Listing(
                self.structures(count),
                problem.cost_model if alone else stages.cost_model,
                mesh,
                problem.memory_limit_bytes,
                problem.training,
                count,
                self.compute_cache if alone else stages.compute_cache,
                (Allowed(problem.dimensions),) * len(mesh.axes),
            )
        return self._listings[mesh, count]

    def can_fit(self, rows: int, count: int) -> bool:
        """Whether it fits if all is split perfectly over all devices."""
        listing = self.listing(self.problem.meshes[0], self.problem.microbatches or 1)
        saved_bytes = 0.0
        if not self._again:
            saved_bytes = listing.least_saved_bytes * (listing.microbatches / count)
            saved_bytes *= least_in_flight(rows, count)
        return listing.least_kept_bytes + saved_bytes <= self.problem.memory_limit_bytes

    def compute_s(self, prospect: Prospect) -> float:
        """A bound that is quick to know: compute alone, and the ramp of the most microbatches; or
        what hosts take for the fewest."""
        count = gcd(*prospect.counts)
        listing = self.listing(prospect.mesh, count)
        busy_s = listing.least_s / prospect.rows * (1 + self._least_ramp(prospect))
        hosts_s = listing.launches_s / count * min(prospect.counts) / prospect.rows
        return max(busy_s, hosts_s)

    def _least_ramp(self, prospect: Prospect) -> float:
        """Idle for lack of microbatches, as a share of the work: a row waits for a chunk of each
        other row, or (zero bubble) for the forwards of its only stage, which are more than a
        fourth of its work."""
        rows = prospect.rows
        chunks = max(4, len(self.units) // rows)
        return (rows - 1) / (chunks * max(prospect.counts))

    def bound_s(self, prospect: Prospect, cutoff_s: float = math.inf) -> float:
        """None of its plans is faster; it may be lower than it could be where it is above the
        cutoff.

        More microbatches never do the same work faster, and what keeps the most memory is as if
        there were fewest: times are those of the greatest common divisor of ``counts``, memory is
        that of the largest.
        """
        quick_s = self.compute_s(prospect)
        if quick_s >= cutoff_s:
            return quick_s
        count, rows = gcd(*prospect.counts), prospect.rows
        most = max(prospect.counts)
        prices = self._prices(prospect, count, least_in_flight(rows, most) * count / most)
        key = rows, prospect.mesh, len(prices.limit_bytes)
        found = approach(prices, Wanted(cutoff_s * rows, hint=self._hints.get(key)))
        if found.tight.weights.any():
            self._hints[key] = found.tight.weights
        listing = self.listing(prospect.mesh, count)
        ramp_s = listing.least_s / rows * self._least_ramp(prospect)
        return max(quick_s, found.bound_s / rows + ramp_s, prospect.bound_s)

    def likely(self, prospect: Prospect) -> Iterator[Likely]:
        """Strategies that a row may have: the fastest of which as many microbatches fit as the
        fullest row has in flight; with recomputation, also the fastest that fits with it."""
        (count,) = prospect.counts
        prices = self._prices(prospect, count, least_in_flight(prospect.rows, count), again=False)
        fitting = replace(prices, limit_bytes=prices.limit_bytes * MARGIN)
        selection = approach(fitting, Wanted()).fastest()
        if selection is not None:
            yield self._likely(prospect, selection, prices.time_of(selection))
        if self._again:
            prices = self._prices(prospect, count, least_in_flight(prospect.rows, count))
            fitting = replace(prices, limit_bytes=prices.limit_bytes * MARGIN)
            found = approach(fitting, Wanted()).fastest_exchanged()
            if found is not None and found[0] != selection:
                yield self._likely(prospect, *found)

    def _likely(self, prospect: Prospect, selection: Selection, of_rows_s: float) -> Likely:
        (count,) = prospect.counts
        rows, listing = prospect.rows, self.listing(prospect.mesh, count)
        busiest = self.imbalance(rows) / rows
        step_s = max(of_rows_s * self._ramp(rows, count), listing.launches_s) * busiest
        return Likely(prospect, listing.strategy(selection), step_s)

    @property
    def _again(self) -> bool:
        """Whether what is kept may be made again instead."""
        return self.problem.recompute != "none"

    def _prices(
        self, prospect: Prospect, count: int, in_flight: float, *, again: bool = True
    ) -> PriceList:
        """``again``: if that is allowed at all."""
        listing = self.listing(prospect.mesh, count)
        if prospect.rows == 1 and prospect.counts == (1,):
            # gradients and all that is kept are never there together
            share = 0.0 if self._again else 1.0
            return listing.below(math.inf, share).price_list
        return listing.in_rows(prospect.rows, in_flight, again=again and self._again)

    def _ramp(self, rows: int, count: int) -> float:
        chunks = max(1, min(CHUNKS, len(self.units) // rows))
        return 1 + (rows - 1) / (chunks * count)

    def imbalance(self, rows: int) -> float:
        """Of units in a row, how much more than its share the busiest row does."""
        weights = self._unit_weights
        if rows not in self._imbalances:
            parts = cuts(weights, rows)
            busiest = max(sum(weights[u] for u in part) for part in parts)
            self._imbalances[rows] = busiest * rows / sum(weights)
        return self._imbalances[rows]

    @cached_property
    def _unit_weights(self) -> list[float]:
        """Compute of each unit if nothing is divided."""
        structure = self.structures(max(self.problem.microbatches or 1, 1))
        costs = Costs(self.problem.cost_model, meshes.mesh((1,)), self.compute_cache)
        of_class: dict[int, float] = {}
        for member in structure.copies:
            operator = structure.graph.operators[member]
            gradients = tuple(
                carries_gradient(structure.graph, operator)
                and structure.graph.by_name[name].differentiable
                for name in operator.inputs
            )
            of_class[member] = sum(
                costs.operator_s(structure.bound(member), (REPLICATED,), gradients)
            )
        return [sum(of_class[structure.class_of[i]] for i in unit) for unit in self.units]


@lru_cache(maxsize=None)
def least_in_flight(rows: int, count: int) -> float:
    """Microbatches of all stages that the fullest of so many equal rows keeps, by the schedule of
    the shelf that keeps the fewest there.

    >>> least_in_flight(4, 8)
    4.0
    """
    few = min(count, rows)
    if rows * few > MOST_ACTIONS:  # fewer rows keep fewer
        return least_in_flight(rows // 2, min(count, rows // 2))
    chain = tuple((i, i + 1) for i in range(rows - 1))
    fullest = []
    for schedule in SCHEDULES.values():
        facts = facts_of(schedule, rows, few, 1, chain)
        if facts is not None:
            fullest.append(float(max(sum(of_row.values()) for of_row in facts.in_flight)))
    return min(fullest, default=1.0)


__all__ = ["Likely", "Prospect", "Prospects", "chains", "least_in_flight"]
