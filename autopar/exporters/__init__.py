"""Shelf: a plan in forms for other eyes and tools. ``EXPORTERS`` is its table."""

from __future__ import annotations

from collections.abc import Callable

from autopar.exporters import html, json, perfetto, stages, text
from autopar.ir.plan import Plan
from autopar.simulator.edges import Rules

Exporter = Callable[[Plan, Rules], str]
"""(plan, the bound rule of each operator) -> the content of one file."""

EXPORTERS: dict[str, Exporter] = {
    "html": html.export,
    "json": json.export,
    "perfetto": perfetto.export,
    "text": text.export,
}

STAGE_EXPORTERS = stages.EXPORTERS
"""For plans of profiled graphs, which have a timeline and no rules."""
