"""What is known least of a plan's step, and the measurement that would tell."""

from __future__ import annotations

from dataclasses import dataclass

from autopar.exporters.units import share_text, time_text
from autopar.ir.plan import Plan
from cost_models.bands import CORRECTED, KINDS, PROFILED, known_bands


@dataclass(frozen=True, slots=True)
class LargestDoubt:
    """``share``: of the width of the band (of its square, which adds up). ``time_s``: of the step.
    ``off_s``: by so much its price alone may make the step longer. ``told``: some run said so.
    ``remedy``: what would measure it. ``width``: by how much the logarithm of its price may be off,
    and ``width_then`` where that was done (``None``: of a kind that is no longer told apart).
    ``elsewhere``: as of the band."""

    kind: str
    what: str
    share: float
    time_s: float
    off_s: float
    told: bool
    remedy: str
    width: float
    width_then: float | None
    elsewhere: str


THE_HOST = "`autopar profile -o FILE` on this machine, for --topology FILE"
ONE_HOST = "`autopar profile` on one of its hosts"
ALL_HOSTS = "`torchrun ... -m autopar profile -o FILE` on all its hosts, for --topology FILE"
A_STEP = "a step: `autopar run PLAN --json > RUN`, then `autopar calibrate --from-run RUN -o FILE`"
OTHER_STEPS = A_STEP.replace("a step", "steps of other plans, which tell its parts apart")

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
        width=most.relative * plan.estimate.step_time_s / most.time_s,
        width_then=_width_then(plan, most.kind),
        elsewhere=band.elsewhere,
    )


def _remedy(plan: Plan, kind: str) -> str:
    """A machine that was measured is known better by a step only."""
    if "profiled" in plan.topology:
        return OTHER_STEPS if plan.topology["profiled"].get("corrections") else A_STEP
    if len(plan.topology.get("analytical", {}).get("tiers", ())) == 1:
        return THE_HOST
    return ALL_HOSTS if kind in BEYOND_A_HOST else ONE_HOST


def _width_then(plan: Plan, kind: str) -> float | None:
    machines = known_bands().machines
    if kind not in KINDS:
        return None
    if "profiled" in plan.topology and CORRECTED in machines:
        return machines[CORRECTED].of(kind)
    return machines[PROFILED].of(kind)


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
        *_no_promise(found),
    ]


def _no_promise(found: LargestDoubt) -> list[str]:
    """Where a measurement has left as much doubt elsewhere."""
    if found.width_then is None or found.width_then < found.width:
        return []
    return [
        "    where that was done, such prices were off by as much as "
        f"{share_text(found.width_then, 1)}; by {share_text(found.width, 1)}, before"
    ]
