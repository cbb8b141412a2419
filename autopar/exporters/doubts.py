"""What is known least of a plan's step, and the measurement that would tell."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.exporters.units import share_text, time_text
from autopar.ir.plan import Plan
from cost_models.bands import KINDS


@dataclass(frozen=True, slots=True)
class LargestDoubt:
    """``share``: of the width of the band (of its square, which adds up). ``time_s``: of the step.
    ``off_s``: by so much its price alone may make the step longer. ``told``: some run said so.
    ``remedy``: what would measure it."""

    kind: str
    what: str
    share: float
    time_s: float
    off_s: float
    told: bool
    remedy: str


ONE_DEVICE = "`autopar profile --devices 1` on one of these devices"
ONE_HOST = "`autopar profile` on one of these hosts"
ALL_HOSTS = "`autopar profile` under torchrun on all hosts"
A_STEP = "a measured step: `autopar calibrate --from-run`"

REMEDIES = {
    "products": ONE_DEVICE,
    "attention": ONE_DEVICE,
    "memory": ONE_DEVICE,
    "launches": ONE_DEVICE,
    "optimizer": ONE_DEVICE,
    "inside": ONE_HOST,
    "between": ALL_HOSTS,
    "transfers": ALL_HOSTS,
}
"""What measures a price. Of a machine that was measured, and of what is no price, only a step tells
more."""


def largest_doubt(plan: Plan) -> LargestDoubt | None:
    """``None`` where nothing is known of how far the estimate may be off."""
    band = plan.estimate.band
    if band is None or not band.doubts:
        return None
    most = band.doubts[0]
    measured = "profiled" in plan.topology
    return LargestDoubt(
        kind=most.kind,
        what=KINDS.get(most.kind, most.kind),
        share=most.relative**2 / sum(doubt.relative**2 for doubt in band.doubts),
        time_s=most.time_s,
        off_s=most.relative * plan.estimate.step_time_s,
        told=most.told,
        remedy=A_STEP if measured else REMEDIES.get(most.kind, A_STEP),
    )


def doubt_text(found: LargestDoubt) -> list[str]:
    """For the explanation of a plan."""
    told = "" if found.told else ", no run that is known tells more, so it counts as the widest"
    return [
        f"largest doubt: {found.what}, {time_text(found.time_s)} of the step, which may be longer "
        f"by {time_text(found.off_s)} for it alone "
        f"({share_text(found.share, 1)} of the band{told})",
        f"  what would tell: {found.remedy}",
    ]
