"""Seconds of a step from the rate that a row reports in place of them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from benchmarks.transformer import Transformer


@dataclass(frozen=True, slots=True)
class Step:
    """What a step does. ``peak_flops_per_s``: of a device, in the dtype of most products;
    ``repeated``: the part of a forward that is recomputed."""

    model: Transformer
    samples: int
    devices: int
    peak_flops_per_s: float
    repeated: float = 0.0

    @property
    def tokens(self) -> int:
        return self.samples * self.model.length

    @property
    def flops(self) -> float:
        """Six for each weight that a token meets and twelve for each pair of a query and a key, as
        if no mask left any out: what most reports count (arXiv 2204.02311, appendix B)."""
        return self.tokens * (6.0 * self.model.weights_of_a_token + self._pairs)

    @property
    def hardware_flops(self) -> float:
        """With what is recomputed, of blocks and not of the head: what Megatron-LM reported until
        2022 (arXiv 2104.04473, appendix)."""
        blocks = self.model.weights_of_a_token - self.model.width * self.model.vocabulary
        return self.flops + self.repeated * self.tokens * (2.0 * blocks + self._pairs / 3)

    @property
    def _pairs(self) -> float:
        of = self.model
        return 12.0 * of.layers * of.length * of.heads * of.value_width


def seconds(metric: str, value: float, step: Step) -> float | None:
    """By the words of ``metric``, in any order: what is counted, and of how many devices. ``None``
    for what is no time, as a loss."""
    said = re.sub(r"[^a-z0-9]+", "_", metric.lower().replace("/", " per "))
    devices = step.devices if re.search(r"gpu|device|chip|accelerator", said) else 1
    is_hardware = re.search(r"hardware|hw|hfu", said) is not None
    flops = step.hardware_flops if is_hardware else step.flops
    if re.search(r"mfu|hfu|utili[sz]ation", said):
        share = value if value <= 1 else value / 100
        return flops / step.devices / step.peak_flops_per_s / share
    if re.search(r"(?<![a-z])[tp]?flop", said):  # always of a device
        return flops / step.devices / value / (1e15 if "pflop" in said else 1e12)
    if re.search(r"tok|samples|sequences|seqs", said) and "per" in said:
        count = step.tokens if "tok" in said else step.samples
        return count / devices / value
    if re.search(r"iter|step|batch|latency|^sec|^s_per|time|^m?s_?$", said):
        return value * (1e-3 if re.search(r"(^|_)(ms|millisec\w*)(_|$)", said) else 1.0)
    return None


__all__ = ["Step", "seconds"]
