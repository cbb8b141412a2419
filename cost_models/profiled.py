"""Seconds from measured tables: a machine's own products, passes over memory and collectives."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

from cost_models.interface import Collective, CollectiveKind, HostTime, Work

FORMAT = "autopar-profile"
VERSION = 2
READ_VERSIONS = (1, 2)
"""The first had no ``view_s`` and no ``pass_s``, which are then taken to be nothing, and no
``speeds``."""
COLLECTIVE_KINDS: tuple[CollectiveKind, ...] = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "send",
)


class ProfileError(ValueError):
    """A profile that cannot be read, or does not hold what is needed."""


@dataclass(frozen=True, slots=True)
class Product:
    """Seconds of one matmul or attention of ``flops``; ``shape`` as in ``Work``."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    flops: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Pass:
    """Seconds of an elementwise operator that reads and writes ``bytes``."""

    dtype: str
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Exchange:
    """Seconds of a collective of ``bytes`` (as in ``Collective``) while all groups of the machine
    do the same."""

    kind: str
    group_size: int
    bytes: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """What was measured, on which machine, when and with what.

    All devices work at once during each measurement. ``operator_s``: what any operator takes,
    however small (Python, dispatch, autograd), averaged over forward and backward.
    ``call_s``: the part of it that every measured ``Product`` and ``Pass`` contains. ``view_s`` and
    ``pass_s`` as in ``HostTime``. ``speeds``: (so many devices, how many times as fast each is
    when the others idle), fewest first: processes on fewer cores, cores that share a memory.
    """

    machine: str
    device: str
    devices: int
    memory_bytes: int
    software: tuple[tuple[str, str], ...]
    date: str
    operator_s: float
    call_s: float
    products: tuple[Product, ...]
    passes: tuple[Pass, ...]
    exchanges: tuple[Exchange, ...]
    view_s: float = 0.0
    pass_s: float = 0.0
    speeds: tuple[tuple[int, float], ...] = ()


def profile_to_json(profile: Profile) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, **asdict(profile)}


def profile_from_json(data: Any) -> Profile:
    """Raises ``ProfileError`` when this is not a profile of this version."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ProfileError("this is not a profile; `autopar profile` makes one")
    if data.get("version") not in READ_VERSIONS:
        raise ProfileError(
            f"the profile has version {data.get('version')!r}, this autopar reads {VERSION}; "
            "measure again with `autopar profile`"
        )
    try:
        if data["version"] == 1:
            data = {"view_s": 0.0, "pass_s": 0.0, "speeds": [], **data}
        values = {f.name: data[f.name] for f in fields(Profile)}
        profile = Profile(
            **{
                **values,
                "software": tuple((str(k), str(v)) for k, v in values["software"]),
                "products": tuple(
                    Product(p["kind"], p["dtype"], tuple(p["shape"]), p["flops"], p["seconds"])
                    for p in values["products"]
                ),
                "passes": tuple(Pass(**p) for p in values["passes"]),
                "exchanges": tuple(Exchange(**e) for e in values["exchanges"]),
                "speeds": tuple((int(n), speed) for n, speed in values["speeds"]),
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"the profile is damaged ({error!r}); measure again") from error
    _check(profile)
    return profile


def _check(profile: Profile) -> None:
    seconds = [p.seconds for p in profile.products] + [p.seconds for p in profile.passes]
    seconds += [e.seconds for e in profile.exchanges]
    seconds += [profile.operator_s, profile.call_s, profile.devices, profile.memory_bytes]
    seconds += [speed for _, speed in profile.speeds]
    beside = [profile.view_s, profile.pass_s]
    if not all(isinstance(s, int | float) and 0 < s < math.inf for s in seconds) or not all(
        isinstance(s, int | float) and 0 <= s < math.inf for s in beside
    ):
        raise ProfileError("the profile has times that are not positive; measure again")
    if not profile.passes or not any(p.kind == "matmul" for p in profile.products):
        raise ProfileError("the profile has no matmul or no pass over memory; measure again")


def read_profile(path: Path) -> Profile:
    try:
        return profile_from_json(json.loads(path.read_text()))
    except OSError as error:
        raise ProfileError(f"cannot read the profile {path}: {error.strerror}") from error
    except ValueError as error:
        raise ProfileError(f"{path}: {error}") from error


SAME_SPEED = {
    "float16": "bfloat16",
    "bfloat16": "float16",
    "tensorfloat32": "float32",
    "float64": "float32",
    "float32": "float64",
}
"""Whose measurements stand in for a dtype that was not measured; float64 and float32 for each
other by the bytes of an element."""

ITEM_BYTES = {"float64": 8, "float32": 4, "tensorfloat32": 4, "float16": 2, "bfloat16": 2}

STAND_IN: dict[CollectiveKind, tuple[tuple[CollectiveKind, float], ...]] = {
    "all_reduce": (("all_gather", 2.0), ("reduce_scatter", 2.0), ("all_to_all", 2.0)),
    "all_gather": (("reduce_scatter", 1.0), ("all_to_all", 1.0), ("all_reduce", 0.5)),
    "reduce_scatter": (("all_gather", 1.0), ("all_to_all", 1.0), ("all_reduce", 0.5)),
    "all_to_all": (("all_gather", 1.0), ("reduce_scatter", 1.0), ("all_reduce", 0.5)),
    "send": (("all_gather", 1.0), ("reduce_scatter", 1.0), ("all_reduce", 0.5)),
}
"""Which kind stands in, times what, for one that was not measured: the laws of a ring."""

NEARNESS = 4
"""Measured products count by 1 / distance ** this, in the space of the shapes' logarithms."""

LEAST_SHARE = 0.1
"""A measured time less the call counts at least this share of itself: below that the difference of
the two measurements is noise."""


@dataclass(frozen=True)
class Profiled:
    """A ``CostModel`` of the machine that was measured."""

    profile: Profile
    _computed: dict[Work, float] = field(default_factory=dict, repr=False, compare=False)
    _coefficients: dict[tuple[CollectiveKind, int], tuple[float, float]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def devices(self) -> int:
        return self.profile.devices

    @property
    def scale_up_devices(self) -> int:
        return self.profile.devices

    @property
    def memory_bytes(self) -> int:
        return self.profile.memory_bytes

    @property
    def speeds(self) -> tuple[tuple[int, float], ...]:
        return self.profile.speeds

    @property
    def host_time(self) -> HostTime:
        return HostTime(self.profile.view_s, self.profile.pass_s)

    def compute_time_s(self, work: Work) -> float:
        known = self._computed.get(work)
        if known is None:
            known = self._computed[work] = self.profile.operator_s + self._work_s(work)
        return known

    def collective_time_s(self, collective: Collective) -> float:
        latency_s, s_per_byte = self.collective_coefficients(
            collective.kind, collective.group_size, collective.stride
        )
        return latency_s + s_per_byte * collective.bytes

    def collective_coefficients(
        self, kind: CollectiveKind, group_size: int, stride: int
    ) -> tuple[float, float]:
        """(latency_s, s_per_byte): a collective of b bytes takes latency_s + s_per_byte * b."""
        if group_size < 2 or stride < 1 or group_size * stride > self.devices:
            raise ValueError(
                f"a {kind} over {group_size} ranks that are {stride} apart does not fit on the "
                f"{self.devices} devices of the profile (a group has at least 2)"
            )
        key = (kind, group_size)
        known = self._coefficients.get(key)
        if known is None:
            known = self._coefficients[key] = self._interpolated(kind, group_size)
        return known

    # ------------------------------------------------------------------ compute

    def _work_s(self, work: Work) -> float:
        if work.flops < 0 or work.bytes < 0:
            raise ValueError(f"negative work: {work}")
        match work.kind:
            case "memory":
                return self._pass_s(work)
            case "matmul" | "attention":
                return self._product_s(work)
            case _:
                raise KeyError(
                    f"no price for work of kind {work.kind!r}; known: matmul, attention, memory"
                )

    def _pass_s(self, work: Work) -> float:
        """Between two measured sizes on a line in log-log; beyond them in proportion."""
        curve = self._curves.get(work.dtype) or self._curves.get(SAME_SPEED.get(work.dtype, ""))
        return _interpolate(curve or next(iter(self._curves.values())), work.bytes)

    @cached_property
    def _curves(self) -> dict[str, list[tuple[float, float]]]:
        """(bytes, seconds beyond the call) by dtype, float32 first if it was measured."""
        dtypes = sorted({p.dtype for p in self.profile.passes}, key=lambda d: (d != "float32", d))
        return {
            dtype: _rising(
                (float(p.bytes), self._beyond_call_s(p.seconds))
                for p in self.profile.passes
                if p.dtype == dtype
            )
            for dtype in dtypes
        }

    def _product_s(self, work: Work) -> float:
        if len(work.shape) != 4 or min(work.shape) < 1:
            raise ValueError(f"a {work.kind} needs a shape of four positive sizes: {work}")
        points, slower = self._points(work.kind, work.dtype)
        wanted = [math.log(size) for size in work.shape]
        weights = [1 / (math.dist(wanted, logs) + 1e-3) ** NEARNESS for logs, _ in points]
        mean = sum(w * math.log(rate) for w, (_, rate) in zip(weights, points, strict=True))
        return work.flops * slower / math.exp(mean / sum(weights))

    def _points(self, kind: str, dtype: str) -> tuple[list[tuple[list[float], float]], float]:
        """(logarithms of the shape, flops per second) of what was measured, and how much slower
        this dtype is than the one that was."""
        found = self._rates.get((kind, dtype))
        if found:
            return found, 1.0
        other = SAME_SPEED.get(dtype, "")
        if found := self._rates.get((kind, other)):
            return found, max(1.0, ITEM_BYTES[dtype] / ITEM_BYTES[other])
        if kind == "attention" and self._rates.keys() & {("matmul", dtype), ("matmul", other)}:
            return self._points("matmul", dtype)
        measured = ", ".join(sorted({d for k, d in self._rates if k in (kind, "matmul")}))
        raise ValueError(
            f"no {kind} of {dtype} was measured on this machine ({measured} were); "
            "plan the model in one of these"
        )

    @cached_property
    def _rates(self) -> dict[tuple[str, str], list[tuple[list[float], float]]]:
        found: dict[tuple[str, str], list[tuple[list[float], float]]] = {}
        for p in self.profile.products:
            logs = [math.log(size) for size in p.shape]
            rate = p.flops / self._beyond_call_s(p.seconds)
            found.setdefault((p.kind, p.dtype), []).append((logs, rate))
        return found

    def _beyond_call_s(self, seconds: float) -> float:
        return max(seconds - self.profile.call_s, LEAST_SHARE * seconds)

    # -------------------------------------------------------------- collectives

    def _interpolated(self, kind: CollectiveKind, group_size: int) -> tuple[float, float]:
        """Both coefficients on lines in log-log over the group sizes that were measured."""
        fits, times = self._fits_of(kind)
        latency_s = _interpolate([(g, a) for g, a, _ in fits], group_size)
        s_per_byte = _interpolate([(g, b) for g, _, b in fits], group_size)
        return times * latency_s, times * s_per_byte

    def _fits_of(self, kind: CollectiveKind) -> tuple[list[tuple[float, float, float]], float]:
        if kind not in COLLECTIVE_KINDS:
            raise KeyError(f"no price for a {kind!r}; known: {', '.join(COLLECTIVE_KINDS)}")
        for other, times in ((kind, 1.0), *STAND_IN[kind]):
            if fits := self._fits.get(other):
                return fits, times
        raise ValueError("no collective was measured on this machine; measure again")

    @cached_property
    def _fits(self) -> dict[str, list[tuple[float, float, float]]]:
        """(group size, latency_s, s_per_byte) by kind, ascending."""
        by_group: dict[tuple[str, int], list[tuple[float, float]]] = {}
        for e in self.profile.exchanges:
            by_group.setdefault((e.kind, e.group_size), []).append((e.bytes, e.seconds))
        found: dict[str, list[tuple[float, float, float]]] = {}
        for (kind, group_size), points in sorted(by_group.items()):
            found.setdefault(kind, []).append((group_size, *fit_line(points)))
        return found


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(a, b), both positive, of y = a + b * x, with errors counted by ratio: twice as much and
    half as much are equally wrong.

    >>> a, b = fit_line([(0.0, 1.0), (10.0, 6.0), (100.0, 51.0)])
    >>> round(a, 9), round(b, 9)
    (1.0, 0.5)
    """
    least_a = LEAST_SHARE * min(y for _, y in points)
    least_b = LEAST_SHARE * min(y / x for x, y in points if x)
    fitted = [y for _, y in points]
    a, b = least_a, least_b
    for _ in range(10):
        # the least of sum (f - y)^2 / (y f), which is 4 sinh^2(log(f / y) / 2): f in the
        # denominator is that of the round before
        weights = [1 / (y * f) for (_, y), f in zip(points, fitted, strict=True)]
        a, b = _weighted_line(points, weights, least_a, least_b)
        fitted = [a + b * x for x, _ in points]
    return a, b


def _weighted_line(
    points: Sequence[tuple[float, float]], weights: list[float], least_a: float, least_b: float
) -> tuple[float, float]:
    """Weighted least squares with a and b no less than given."""
    weighted = [(w, x, y) for w, (x, y) in zip(weights, points, strict=True)]
    s1, sx = sum(w for w, _, _ in weighted), sum(w * x for w, x, _ in weighted)
    sxx = sum(w * x * x for w, x, _ in weighted)
    sy, sxy = sum(w * y for w, _, y in weighted), sum(w * x * y for w, x, y in weighted)
    determinant = s1 * sxx - sx * sx
    if determinant > 1e-12 * s1 * sxx:
        a, b = (sxx * sy - sx * sxy) / determinant, (s1 * sxy - sx * sy) / determinant
        if a >= least_a and b >= least_b:
            return a, b
        if a < least_a:
            return least_a, max(least_b, (sxy - least_a * sx) / sxx)
    return max(least_a, (sy - least_b * sx) / s1), least_b


def _rising(points: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """Ascending, and no larger size faster than a smaller one (noise of the measurement)."""
    found: list[tuple[float, float]] = []
    for x, y in sorted(points):
        found.append((x, max(y, found[-1][1]) if found else y))
    return found


def _interpolate(points: list[tuple[float, float]], x: float) -> float:
    """On lines in log-log between ascending points, in proportion to x beyond the ends."""
    (x0, y0), (x1, y1) = points[0], points[-1]
    if x <= x0:
        return y0 * x / x0
    if x >= x1:
        return y1 * x / x1
    for (xa, ya), (xb, yb) in pairwise(points):
        if x <= xb:
            share = math.log(x / xa) / math.log(xb / xa)
            return math.exp(math.log(ya) + share * math.log(yb / ya))
    raise AssertionError(f"{x} lies between no two points")
