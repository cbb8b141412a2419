"""What the column ``recompute`` says."""

from __future__ import annotations

import re

from benchmarks.assumed import AS_FITS
from benchmarks.cells import NOT_SAID, Row, SkippedError

RECOMPUTE: tuple[tuple[str, str, str], ...] = (
    # how a cell begins, what is recomputed, what is assumed thereby
    ("none or", "none", "nothing is recomputed"),
    ("none", "none", ""),
    ("no", "none", ""),
    ("false", "none", ""),
    ("unspecified(assume none", "none", "nothing is recomputed"),
    ("unspecified (selective", "attention", "attention is recomputed"),
    ("unspecified", "none", "nothing is recomputed"),
    ("uniform", "full", ""),
    ("true", "full", ""),
    ("selective(op", "alternate", ""),
    ("selective layernorm", "elementwise", ""),
    ("selective modules", "elementwise", "what is no product is recomputed, for single modules"),
    ("full", "full", ""),
    ("selective(layer", "full", ""),
    ("selective (hfu/mfu", "full", ""),
    ("selective", "attention", "attention is recomputed"),
    ("attention", "attention", ""),
    ("core attention", "attention", ""),
    ("activation", "full", ""),  # checkpointing
    ("checkpoint", "full", ""),
    ("gradient checkpoint", "full", ""),
    ("remat", "full", ""),
    ("yes", "full", ""),
    ("minimal", "elementwise", "what is no product is recomputed"),
)


ON_HOST = "activations are kept by the host, and their way there and back is hidden"
"""Their memory is not looked at then: the row does not say which of them."""

ASSUMED_RECOMPUTED = frozenset(what for *_, what in RECOMPUTE if what)


def recomputed(row: Row, layers: float, assumed: list[str], *, flash: bool) -> tuple[str, float]:
    """What is recomputed, and in which part of the ``layers`` of a stage. Where that is not said,
    ``flash`` attention leaves nothing that would be worth it."""
    text = _cell(row)
    said = text.lower()
    if said in NOT_SAID:
        if not said:
            assumed.append(AS_FITS)
        return "none", 1.0
    if said == "selective":
        return "attention", 1.0  # as arXiv 2205.05198 has it
    if "offload" in said and "activation" in said:
        assumed.append(ON_HOST)
        return "none", 1.0
    for begins, kind, what in RECOMPUTE:
        if said.startswith(begins):
            if what == "attention is recomputed" and flash:
                kind = "none"
                what = "nothing is recomputed"
            assumed += [what] * bool(what)
            return kind, _part(said, layers)
    raise SkippedError(
        f"recompute is {text!r}: recomputes in a way that has no name here: {text}; none, full, "
        "selective, selective(op), selective layernorm, full block N layers are read"
    )


def _cell(row: Row) -> str:
    """What its cell says, unless that is of other machines: ``(recipe H100/B200)``."""
    said = row["recompute"]
    if found := re.search(r"\(recipe ([\w/]+)\)", said):
        names = found[1].lower().split("/")
        return said if any(name in row["gpu_type"].lower() for name in names) else "none"
    return said


def _part(said: str, layers: float) -> float:
    """Of the layers; or so much that as many flops are done for those of the model, of which all
    would be a third more.

    >>> _part("selective(layer=every 2nd)", 32), _part("full block 4 layers", 32), _part("full", 32)
    (0.5, 0.125, 1.0)
    >>> round(_part("selective (hfu/mfu 1.13)", 32), 2)
    0.39
    """
    if found := re.search(r"every (\d+)", said):
        return 1 / max(1, int(found[1]))
    if found := re.search(r"block (\d+) layers", said):
        return min(1.0, int(found[1]) / layers)
    if found := re.search(r"hfu/mfu (\d+\.?\d*)", said):
        return min(1.0, max(0.0, 3 * (float(found[1]) - 1)))
    return 1.0


__all__ = ["ASSUMED_RECOMPUTED", "ON_HOST", "recomputed"]
