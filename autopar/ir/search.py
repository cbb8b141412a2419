"""What is searched, for how long, and what came of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from autopar.ir.graph import OperatorGraph
from autopar.ir.rule import OpRule
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Strategy, Training
from cost_models.interface import CostModel


@dataclass(frozen=True)
class Problem:
    """A model, a machine and what is fixed beforehand.

    ``meshes``: those to try (all factorizations of the devices, or the one that the user gave).
    ``dimensions``: letters of SOAP that may be split. ``proposals``: (call, rule) pairs for
    operators that have no rule of their own. ``memory_limit_bytes``: on each device.
    ``microbatches`` of the global batch that ``graph`` is for; ``None``: the fastest.
    ``recompute``: what of repeated blocks: ``none``, ``selective`` or ``full`` in all copies, or
    ``auto``, what is fastest within memory.
    """

    graph: OperatorGraph
    cost_model: CostModel
    meshes: tuple[Mesh, ...]
    memory_limit_bytes: int
    training: Training = Training()
    microbatches: int | None = 1
    dimensions: str = "SOAP"
    proposals: tuple[tuple[str, OpRule], ...] = ()
    recompute: str = "none"


@dataclass(frozen=True, slots=True)
class Budget:
    """When to stop: seconds of wall time, and a relative gap that is good enough. ``proof_s``: how
    long the gap may be worked on once every mesh was looked at, half as long as that took at least.
    """

    time_s: float = 300.0
    gap: float = 1e-6
    proof_s: float = math.inf

    def proof_after_s(self, looked_s: float) -> float:
        """How long the gap may be worked on, where it took so long to look at every mesh once."""
        return max(self.proof_s, looked_s / 2)


@dataclass(frozen=True)
class Trial:
    """One mesh (or recipe) that was looked at.

    ``estimate`` and ``strategy`` are of the best strategy found for it, ``None`` if none;
    ``lower_bound_s``: no strategy on this mesh has a shorter step; ``outcome``: ``optimal``,
    ``gap`` (not proved to be the best: see the bound), ``bounded`` (its bound is above the best
    elsewhere: not searched), ``infeasible`` (proved), ``unknown`` (nothing that fits was found, nor
    proved not to exist), ``time`` (the budget ended first), or ``recipe``.
    """

    name: str
    mesh: Mesh
    strategy: Strategy | None
    estimate: Estimate | None
    lower_bound_s: float
    outcome: str


@dataclass(frozen=True)
class SearchResult:
    """All trials, the best strategy, and a proof of how far from optimal it can be at most.

    ``stop_reason``: ``optimal`` (within the budget's gap), ``gap`` (all was tried, the best is not
    proved), ``time``, ``interrupted`` (Ctrl-C), or, where ``best`` is ``None``, ``infeasible`` and
    ``unknown`` (``nearest_miss_bytes`` is the smallest peak memory seen, ``least_bytes`` what a
    device would hold at least if everything were split perfectly). ``among``: what the bound is of,
    where that is not every plan.
    """

    searcher: str
    trials: tuple[Trial, ...]
    best: Trial | None
    lower_bound_s: float
    stop_reason: str
    search_time_s: float
    nearest_miss_bytes: int | None = None
    least_bytes: int | None = None
    among: str = ""

    @property
    def gap(self) -> float:
        """(best - bound) / best; 1.0 when nothing was found."""
        if self.best is None or self.best.estimate is None:
            return 1.0
        time_s = self.best.estimate.step_time_s
        return max(0.0, (time_s - self.lower_bound_s) / time_s) if time_s else 0.0


@dataclass(frozen=True, slots=True)
class TrialSummary:
    """A mesh or recipe that was looked at, without its strategy.

    ``outcome`` as in ``Trial``; ``bound_by`` says what takes most of the step ("" when there is no
    strategy); times and memory are ``None`` when there is none.
    """

    name: str
    mesh: Mesh
    outcome: str
    lower_bound_s: float
    step_time_s: float | None
    peak_memory_bytes: int | None
    bound_by: str


@dataclass(frozen=True, slots=True)
class Tie:
    """A plan of which it is not known whether it is slower than the best, and what it trades.

    ``slower``: by so much is its predicted step longer, relative to that of the best; ``within``:
    so much longer may be a mistake. ``sent_bytes``: the buffers of all collectives and transfers of
    the device that has most, in a step. ``axes``: in how many ways work is divided: axes of the
    mesh, and stages. ``recomputed``: operators.
    """

    name: str
    mesh: Mesh
    step_time_s: float
    slower: float
    within: float
    peak_memory_bytes: int
    sent_bytes: int
    axes: int
    stages: int
    microbatches: int
    recomputed: int


@dataclass(frozen=True, slots=True)
class SearchSummary:
    """How the strategy was found: what ``SearchResult`` knows, small enough for a file. ``ties``:
    trials that may be as fast, the best itself first; none where no trial may. ``among``: what the
    bound is of, where that is not every plan.
    """

    searcher: str
    stop_reason: str
    lower_bound_s: float
    gap: float
    search_time_s: float
    memory_limit_bytes: int
    dimensions: str
    trials: tuple[TrialSummary, ...]
    ties: tuple[Tie, ...] = ()
    among: str = ""
