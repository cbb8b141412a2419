"""The solver's process: it answers in time or is ended, and never stands in the way."""

from __future__ import annotations

import math
import os
import random
import signal
import sys
from collections.abc import Iterator
from time import monotonic

import pytest
from ortools.math_opt.python import mathopt

from autopar.searchers import _milp, _solver
from autopar.searchers._solver import NoAnswerError, Solver, SolverError, end_all, solver
from autopar.searchers.bounds import everything
from tests.helpers.random_prices import world

LONG_S = 3600.0

SILENT = "import time; time.sleep(3600)"
INTERRUPTING = (
    "import os, signal, sys, time\n"
    "sys.stdin.buffer.read(8)\n"
    "os.kill(os.getppid(), signal.SIGINT)\n"
    "time.sleep(3600)\n"
)
DYING = "raise SystemExit(7)"


@pytest.fixture(autouse=True)
def no_process_before_and_after() -> Iterator[None]:
    end_all()
    yield
    end_all()


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT raises, as in a command; a test runner's own processes may ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def pretend(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    """Run another program as the solver."""
    monkeypatch.setattr(_solver, "COMMAND", [sys.executable, "-c", program])


def easy() -> tuple[mathopt.Model, mathopt.Variable]:
    model = mathopt.Model()
    x = model.add_integer_variable(lb=0, ub=10)
    model.add_linear_constraint(2 * x <= 7)
    model.maximize(x)
    return model, x


def market_split() -> mathopt.Model:
    """Cornuejols and Dawande's market split: small, and out of reach of branch and bound."""
    numbers = random.Random(1)
    model = mathopt.Model()
    x = [model.add_binary_variable() for _ in range(40)]
    for _ in range(5):
        row = [numbers.randint(1, 99) for _ in x]
        over, under = model.add_variable(lb=0.0), model.add_variable(lb=0.0)
        total = mathopt.fast_sum([v * n for v, n in zip(x, row, strict=True)])
        model.add_linear_constraint(total + under - over == sum(row) // 2)
        model.objective.set_linear_coefficient(over, 1.0)
        model.objective.set_linear_coefficient(under, 1.0)
    return model


def solve(found: Solver, model: mathopt.Model, limit_s: float) -> mathopt.SolveResult:
    return found.solve(model, mathopt.SolveParameters(), monotonic() + limit_s)


def alive(process_id: int) -> bool:
    try:
        os.kill(process_id, 0)
    except ProcessLookupError:
        return False
    return True


def test_one_process_solves_one_problem_after_the_other() -> None:
    used = set()
    for _ in range(3):
        with solver() as found:
            model, x = easy()
            result = solve(found, model, LONG_S)
            assert result.variable_values(x) == 3
            used.add(found.process_id)
    assert len(used) == 1
    end_all()
    assert not any(map(alive, used))


def test_two_problems_at_once_have_two_processes() -> None:
    with solver() as one, solver() as other:
        assert one.process_id != other.process_id


def test_a_problem_that_takes_too_long_is_answered_with_the_best_so_far_and_a_bound() -> None:
    with solver() as found:
        result = solve(found, market_split(), 1.0)
    assert result.termination.reason == mathopt.TerminationReason.FEASIBLE
    assert 0 <= result.termination.objective_bounds.dual_bound < result.objective_value()


def test_a_solver_that_overruns_its_limit_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, SILENT)
    with pytest.raises(NoAnswerError), solver() as found:
        process_id = found.process_id
        solve(found, easy()[0], 0.0)
    assert not alive(process_id)


def test_then_nothing_is_found_and_nothing_is_claimed(monkeypatch: pytest.MonkeyPatch) -> None:
    price_list = world(1, 500).price_list
    every = everything(price_list)
    assert _milp.solve(price_list, every, time_limit_s=LONG_S).selection is not None
    end_all()
    pretend(monkeypatch, SILENT)
    for time_limit_s in (0.01, 0.0, -1.0):
        found = _milp.solve(price_list, every, time_limit_s=time_limit_s)
        assert (found.selection, found.bound_s, found.infeasible) == (None, -math.inf, False)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_does_not_wait_for_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, INTERRUPTING)
    with pytest.raises(KeyboardInterrupt), solver() as found:
        process_id = found.process_id
        solve(found, easy()[0], LONG_S)
    assert not alive(process_id)
    monkeypatch.undo()
    with solver() as found:
        model, x = easy()
        assert solve(found, model, LONG_S).variable_values(x) == 3


def test_a_real_search_tree_is_left_at_once() -> None:
    def leave(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, leave)
    try:
        with pytest.raises(KeyboardInterrupt), solver() as found:
            process_id = found.process_id
            signal.setitimer(signal.ITIMER_REAL, 1.0)
            solve(found, market_split(), LONG_S)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
    assert not alive(process_id)


def test_a_solver_that_dies_is_an_error_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, DYING)
    with pytest.raises(SolverError, match="ended with code 7"), solver() as found:
        solve(found, easy()[0], LONG_S)


def test_what_the_solver_refuses_is_said() -> None:
    model = mathopt.Model()
    model.add_variable(lb=2.0, ub=math.nan)
    with pytest.raises(SolverError, match=r"(?i)nan"), solver() as found:
        solve(found, model, LONG_S)
