"""Seconds of a step from the rate that a row reports in place of them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Step:
    """What a step does. ``peak_flops_per_s``: of a device, in the dtype of most products."""

    model: Transformer
    samples: int
    devices: int
    peak_flops_per_s: float

    @property
    def tokens(self) -> int:
        return self.samples * self.model.length

    @property
    def flops(self) -> float:
        """Six for each weight that a token meets and twelve for each pair of a query and a key, as
        if no mask left any out: what most reports count (arXiv 2204.02311, appendix B)."""
        of = self.model
        pairs = 12.0 * of.layers * of.length * of.heads * of.value_width
        return self.tokens * (6.0 * of.weights_of_a_token + pairs)


RATES: tuple[tuple[str, Callable[[Step, float], float]], ...] = (
    # how the column ``metric`` begins, seconds of a step from what is done and the value
    (r"(iter|step).*_ms", lambda step, value: value / 1e3),
    (r"(iter|step).*(_s|seconds)?$", lambda step, value: value),
    (r"tok\w*_(per_s\w*_per_(gpu|device|chip))", lambda s, v: s.tokens / s.devices / v),
    (r"tok\w*_per_s", lambda step, value: step.tokens / value),
    (r"samples\w*_per_s\w*_per_(gpu|device|chip)", lambda s, v: s.samples / s.devices / v),
    (r"samples\w*_per_s", lambda step, value: step.samples / value),
    (r"(model_)?tflops?(_per_(gpu|device|chip)|$)", lambda s, v: s.flops / s.devices / v / 1e12),
    (r"mfu", lambda s, v: s.flops / s.devices / s.peak_flops_per_s / (v if v <= 1 else v / 100)),
)


def seconds(metric: str, value: float, step: Step) -> float | None:
    """``None`` for what does not tell the time of a step."""
    said = re.sub(r"[^a-z0-9]+", "_", metric.lower().replace("/", " per ")).strip("_")
    said = re.sub(r"per_sec(ond)?s?(?=_|$)", "per_s", said)
    for pattern, of in RATES:
        if re.match(pattern, said):
            return of(step, value)
    return None


__all__ = ["RATES", "Step", "seconds"]
