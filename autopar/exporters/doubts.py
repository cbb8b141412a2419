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
    ``remedy``: what would measure it. ``elsewhere``: as of the band."""

    kind: str
    what: str
    share: float
    time_s: float
    off_s: float
    told: bool
    remedy: str
    elsewhere: str


THE_HOST = "`autopar profile -o FILE` on this machine, for --topology FILE"
ONE_HOST = "`autopar profile` on one of its hosts"
ALL_HOSTS = "`torchrun ... -m autopar profile -o FILE` on all its hosts, for --topology FILE"
A_STEP = "a step: `autopar run PLAN --json > RUN`, then `autopar calibrate --from-run RUN -o FILE`"

BEYOND_A_HOST = ("between", "transfers", "idle")
"""Kinds that no host by itself can tell of."""


def largest_doubt(plan: Plan) -> LargestDoubt | None:
    """``None`` where nothing is known of how far the estimate may be off."""
    band = plan.estimate.band
    if band is None or not band.doubts:
        return None
    most = band.doubts[0]
    return LargestDoubt(
        kind=most.kind,
        what=KINDS.get(most.kind, most.kind),
        share=most.relative**2 / sum(doubt.relative**2 for doubt in band.doubts),
        time_s=most.time_s,
        off_s=most.relative * plan.estimate.step_time_s,
        told=most.told,
        remedy=_remedy(plan, most.kind),
        elsewhere=band.elsewhere,
    )


def _remedy(plan: Plan, kind: str) -> str:
    """A machine that was measured is known better by a step only."""
    if "profiled" in plan.topology:
        return A_STEP
    if len(plan.topology.get("analytical", {}).get("tiers", ())) == 1:
        return THE_HOST
    return ALL_HOSTS if kind in BEYOND_A_HOST else ONE_HOST


def doubt_text(found: LargestDoubt) -> list[str]:
    """For the explanation of a plan."""
    told = "" if found.told else ", no run that is known tells more, so it counts as the widest"
    return [
        f"largest doubt: {found.what}, {time_text(found.time_s)} of the step, which may be longer "
        f"by {time_text(found.off_s)} for it alone "
        f"({share_text(found.share, 1)} of the band{told})",
        *(
            [f"  no run on {found.elsewhere} is known; bands are those of other devices"]
            * bool(found.elsewhere)
        ),
        f"  what would tell: {found.remedy}",
    ]
