"""Finds the fastest way to train a PyTorch model on a cluster, says how good it is, and runs it."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from autopar.api import (
        calibrate,
        diff,
        explain,
        export,
        extract,
        load_plan,
        plan,
        profile,
        run,
        save_plan,
        search,
        simulate,
        verify,
    )
    from autopar.errors import AutoparError
    from autopar.ir.plan import Plan

_HOME = {
    "AutoparError": "autopar.errors",
    "Plan": "autopar.ir.plan",
    "calibrate": "autopar.api",
    "diff": "autopar.api",
    "explain": "autopar.api",
    "export": "autopar.api",
    "extract": "autopar.api",
    "load_plan": "autopar.api",
    "plan": "autopar.api",
    "profile": "autopar.api",
    "run": "autopar.api",
    "save_plan": "autopar.api",
    "search": "autopar.api",
    "simulate": "autopar.api",
    "verify": "autopar.api",
}

__all__ = [
    "AutoparError",
    "Plan",
    "__version__",
    "calibrate",
    "diff",
    "explain",
    "export",
    "extract",
    "load_plan",
    "plan",
    "profile",
    "run",
    "save_plan",
    "search",
    "simulate",
    "verify",
]


def __getattr__(name: str) -> Any:
    """The verbs are imported when they are first used, so that ``import autopar`` costs nothing."""
    if name not in _HOME:
        raise AttributeError(f"module 'autopar' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
