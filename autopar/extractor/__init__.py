"""Torch's door in: a module and one batch become an ``OperatorGraph``; opened on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autopar.extractor.interpreter import execute
    from autopar.extractor.trace import extract

__all__ = ["execute", "extract"]

_HOME = {"execute": "interpreter", "extract": "trace"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
