"""Torch's door in: a module and one batch become an ``OperatorGraph``; opened on first use."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from autopar.extractor.cache import cached_extract

if TYPE_CHECKING:
    from autopar.extractor.interpreter import execute
    from autopar.extractor.sources import LoadedModel, know_ops, load
    from autopar.extractor.trace import extract, in_bfloat16

__all__ = ["LoadedModel", "cached_extract", "execute", "extract", "in_bfloat16", "know_ops", "load"]

_HOME = {
    "LoadedModel": "sources",
    "know_ops": "sources",
    "load": "sources",
    "execute": "interpreter",
    "extract": "trace",
    "in_bfloat16": "trace",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
