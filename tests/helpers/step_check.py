"""What every step in one stage must do, whatever its splits, storages and microbatches."""

from __future__ import annotations

from collections import Counter

from autopar.ir.strategy import Strategy
from tests.helpers.cases import Case, Outcome, divided, outcome, promised
from tests.helpers.pool import pool


def check(of: Case, strategy: Strategy) -> None:
    """Loss, gradients and parameters are those of one process; collectives those promised."""
    found = pool().run(strategy.mesh.size, outcome, of, strategy)[0]
    assert isinstance(found, Outcome)
    assert found.loss < 1e-9
    assert found.gradient < 1e-9, found.worst_gradient
    assert found.parameter < 1e-8
    assert Counter(found.executed) == promised(divided(of.graph, strategy.microbatches), strategy)
