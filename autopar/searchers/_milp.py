"""The flow-form ILP of a price list, solved exactly by OR-tools (MathOpt, HiGHS).

x[n,k] ∈ {0,1}      node n takes alternative k              Σ_k x[n,k] = 1
f[t,c,σ,σ′] ∈ [0,1] consumer c of t gets it from σ in σ′    Σ_σ′ f = Σ_(k making σ) x[producer,k]
                                                            Σ_σ  f = Σ_(k wanting σ′) x[c,k]
F[t,σ,σ′] ≥ f[t,c,σ,σ′] for every c                         paid once
z[m,u,s] ∈ {0,1,…}      copies of m's parameter in storage s  Σ_s z[m,u,s] = count · Σ_(k: u) x
M[v] ≥ Σ_(k needing v) x[h,k] for every holder h            version v is kept
Σ_n x[n,k_n] + Σ_(m,s) g[m,s] ≤ their number - 1            for every selection that is refused,
                                                            g[m,s] = 1 where z[m,u,s] ≥ its count

minimise Σ x·time + Σ F·time + Σ z·time   subject to each memory row
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from time import monotonic

import numpy as np
from ortools.math_opt.python import mathopt
from ortools.math_opt.solvers import highs_pb2

from autopar.searchers._solver import NoAnswerError, Solver, solver
from autopar.searchers.bounds import Survivors
from autopar.simulator.price_list import Flow, PriceList, Selection

Terms = list[tuple[mathopt.Variable, float]]


@dataclass(frozen=True, slots=True)
class Solved:
    """``selection`` is ``None`` when none was found; ``bound_s`` holds for what was offered to the
    solver; ``infeasible``: proved that nothing fits."""

    selection: Selection | None
    bound_s: float
    infeasible: bool


NOTHING = Solved(None, -math.inf, False)


def solve(
    price_list: PriceList,
    offered: Survivors,
    *,
    time_limit_s: float,
    gap: float = 1e-9,
    cutoff_s: float | None = None,
    refused: Iterable[Selection] = (),
) -> Solved:
    """The best selection among what is offered, within the memory limits.

    ``cutoff_s``: selections that are slower are of no interest; then "infeasible" says no more than
    that there is none faster. ``refused``: selections that are not wanted. Nothing is found when
    the time is over before the solver has begun.
    """
    deadline = monotonic() + time_limit_s
    if time_limit_s <= 0:
        return NOTHING
    try:
        with solver() as process:  # starts while the model is built
            model = _Model(price_list, offered, cutoff_s)
            for selection in refused:
                model.refuse(selection)
            return model.solve(process, deadline, gap)
    except NoAnswerError:
        return NOTHING


class _Model:
    def __init__(self, price_list: PriceList, offered: Survivors, cutoff_s: float | None) -> None:
        self.price_list = price_list
        self.offered = offered
        self.model = mathopt.Model(name="autopar")
        self.scale = _scale(price_list)
        self.objective: Terms = []
        rows = len(price_list.limit_bytes)
        self.memory: list[Terms] = [[] for _ in range(rows)]
        self.limited = [bool(np.isfinite(x)) for x in price_list.limit_bytes]
        self.x = [self._alternatives(n) for n in range(len(price_list.nodes))]
        self.z = [self._menus(n) for n in range(len(price_list.nodes))]
        for number, flow in enumerate(price_list.flows):
            self._flow(number, flow)
        if any(self.limited):
            for number in range(len(price_list.kept)):
                self._kept(number)
        self._finish(cutoff_s)

    # ---- variables and rows --------------------------------------------------------------------

    def _alternatives(self, n: int) -> dict[int, mathopt.Variable]:
        node = self.price_list.nodes[n]
        found = {
            int(k): self.model.add_binary_variable(name=f"x[{n},{k}]")
            for k in np.flatnonzero(self.offered.alternatives[n])
        }
        self.model.add_linear_constraint(mathopt.fast_sum(list(found.values())) == 1)
        for k, variable in found.items():
            self._price(variable, node.count * float(node.time_s[k]))
            self._weigh(variable, [node.count * float(m) for m in node.memory_bytes[:, k]])
        return found

    def _menus(self, n: int) -> list[dict[tuple[int, int], mathopt.Variable]]:
        """z; where one storage is all there is, it is priced with the use."""
        found = []
        for m, menu in enumerate(self.price_list.nodes[n].menus):
            variables: dict[tuple[int, int], mathopt.Variable] = {}
            uses = sorted({int(menu.use[k]) for k in self.x[n]})
            for use in uses:
                users = [v for k, v in self.x[n].items() if menu.use[k] == use]
                storages = range(len(menu.time_s[use]))
                for s in storages:
                    z = self.model.add_integer_variable(
                        lb=0, ub=menu.count, name=f"z[{n},{m},{use},{s}]"
                    )
                    variables[use, s] = z
                    self._price(z, float(menu.time_s[use][s]))
                    self._weigh(z, [float(b) for b in menu.memory_bytes[use][:, s]])
                self.model.add_linear_constraint(
                    mathopt.fast_sum([variables[use, s] for s in storages])
                    == menu.count * mathopt.fast_sum(users)
                )
            found.append(variables)
        return found

    def _flow(self, number: int, flow: Flow) -> None:
        pairs = self.offered.pairs[number]
        sources = _groups(flow.source, self.x[flow.producer])
        shared: dict[tuple[int, int], mathopt.Variable] = {}
        alone = len(flow.consumers) == 1
        for consumer, target in flow.consumers:
            targets = _groups(target, self.x[consumer])
            f = {
                (s, t): self.model.add_variable(lb=0.0, ub=1.0)
                for s in sources
                for t in targets
                if pairs[s, t]
            }
            for s, makers in sources.items():
                leaving = [v for (a, _), v in f.items() if a == s]
                self.model.add_linear_constraint(
                    mathopt.fast_sum(leaving) == mathopt.fast_sum(makers)
                )
            for t, takers in targets.items():
                arriving = [v for (_, b), v in f.items() if b == t]
                self.model.add_linear_constraint(
                    mathopt.fast_sum(arriving) == mathopt.fast_sum(takers)
                )
            for (s, t), variable in f.items():
                price = flow.count * float(flow.time_s[s, t])
                if price == 0.0:
                    continue
                if alone:
                    self._price(variable, price)
                    continue
                if (s, t) not in shared:
                    shared[s, t] = self.model.add_variable(lb=0.0, ub=1.0)
                    self._price(shared[s, t], price)
                self.model.add_linear_constraint(shared[s, t] >= variable)

    def _kept(self, number: int) -> None:
        kept = self.price_list.kept[number]
        versions: dict[int, mathopt.Variable] = {}
        for holder, version in kept.holders:
            for v, users in _groups(version, self.x[holder]).items():
                if v < 0:
                    continue
                if v not in versions:
                    versions[v] = self.model.add_variable(lb=0.0, ub=1.0)
                    self._weigh(
                        versions[v], [kept.count * float(b) for b in kept.memory_bytes[:, v]]
                    )
                self.model.add_linear_constraint(versions[v] >= mathopt.fast_sum(users))

    def _price(self, variable: mathopt.Variable, seconds: float) -> None:
        if seconds:
            self.objective.append((variable, seconds / self.scale))

    def _weigh(self, variable: mathopt.Variable, row_bytes: Sequence[float]) -> None:
        for row, size in enumerate(row_bytes):
            if size and self.limited[row]:
                self.memory[row].append((variable, size))

    def _finish(self, cutoff_s: float | None) -> None:
        fixed = self.price_list.fixed_memory_bytes + np.zeros(len(self.limited))
        for row, terms in enumerate(self.memory):
            if not self.limited[row]:
                continue
            room = float(self.price_list.limit_bytes[row] - fixed[row])
            unit = max(abs(room), 1.0)
            total = mathopt.fast_sum([v * (size / unit) for v, size in terms])
            self.model.add_linear_constraint(total <= room / unit)
        total = mathopt.fast_sum([v * price for v, price in self.objective])
        if cutoff_s is not None:
            room = (cutoff_s - self.price_list.fixed_time_s) / self.scale
            self.model.add_linear_constraint(total <= room * (1 + 1e-9))
        self.model.minimize(total)

    def refuse(self, selection: Selection) -> None:
        """Cut off this one selection."""
        if any(k not in x for k, x in zip(selection.alternatives, self.x, strict=True)):
            return
        terms = [x[k] for k, x in zip(selection.alternatives, self.x, strict=True)]
        for n, chosen in enumerate(selection.storages):
            for m, counts in enumerate(chosen):
                menu = self.price_list.nodes[n].menus[m]
                use = int(menu.use[selection.alternatives[n]])
                for s, count in enumerate(counts):
                    if count:
                        terms.append(self._reached(self.z[n][m][use, s], count, menu.count))
        self.model.add_linear_constraint(mathopt.fast_sum(terms) <= len(terms) - 1)

    def _reached(self, z: mathopt.Variable, count: int, most: int) -> mathopt.Variable:
        """1 where at least ``count`` of ``most`` copies take a storage."""
        if most == 1:
            return z
        reached = self.model.add_binary_variable()
        self.model.add_linear_constraint(z <= count - 1 + (most - count + 1) * reached)
        return reached

    # ---- solution ------------------------------------------------------------------------------

    def solve(self, process: Solver, deadline: float, gap: float) -> Solved:
        # starting the root again, as HiGHS likes to, took half of the time of the hard problems
        parameters = mathopt.SolveParameters(
            relative_gap_tolerance=gap,
            absolute_gap_tolerance=1e-12,
            highs=highs_pb2.HighsOptionsProto(bool_options={"mip_allow_restart": False}),
        )
        result = process.solve(self.model, parameters, deadline)
        reason = result.termination.reason
        if reason in (
            mathopt.TerminationReason.INFEASIBLE,
            mathopt.TerminationReason.INFEASIBLE_OR_UNBOUNDED,
        ):
            return Solved(None, math.inf, True)
        bound = result.termination.objective_bounds.dual_bound * self.scale
        bound_s = bound + self.price_list.fixed_time_s if math.isfinite(bound) else -math.inf
        if not result.has_primal_feasible_solution():
            return Solved(None, bound_s, False)
        return Solved(self._selection(result), bound_s, False)

    def _selection(self, result: mathopt.SolveResult) -> Selection:
        values = result.variable_values()
        alternatives = tuple(max(x, key=lambda k: values[x[k]]) for x in self.x)
        storages = []
        for n, menus in enumerate(self.z):
            chosen = []
            for menu, variables in zip(self.price_list.nodes[n].menus, menus, strict=True):
                use = int(menu.use[alternatives[n]])
                count = range(len(menu.time_s[use]))
                chosen.append(tuple(round(values[variables[use, s]]) for s in count))
            storages.append(tuple(chosen))
        return Selection(alternatives, tuple(storages))


def _groups(
    group: np.ndarray[tuple[int, ...], np.dtype[np.int64]], x: dict[int, mathopt.Variable]
) -> dict[int, list[mathopt.Variable]]:
    found: dict[int, list[mathopt.Variable]] = {}
    for k, variable in x.items():
        found.setdefault(int(group[k]), []).append(variable)
    return found


def _scale(price_list: PriceList) -> float:
    """A typical price, so that the solver's tolerances mean something: seconds may be tiny."""
    largest = max(
        (float(n.count * n.time_s.min()) for n in price_list.nodes if n.time_s.min() > 0),
        default=0.0,
    )
    flows = max((float(f.time_s.max()) for f in price_list.flows if f.time_s.size), default=0.0)
    return largest or flows or 1.0
