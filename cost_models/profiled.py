"""Seconds from measured tables: a machine's own products, passes over memory and collectives."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from itertools import pairwise
from math import ceil
from pathlib import Path
from typing import Any, Literal

from cost_models.collectives import members_in_unit
from cost_models.interface import Collective, CollectiveKind, HostTime, UnpricedError, Work

FORMAT = "autopar-profile"
VERSION = 6
"""Up to 2, there were no convolutions, and collectives without what the runtime adds to them; up to
3, operands were in the caches, and updates were passes over memory like others; up to 4, what a
loss took was told for a third of it, with the bytes of its logits; up to 5, messages took the same
of the processor whatever their size."""

READS = f"4 to {VERSION}"

Where = Literal["inside", "across", "all"]
"""Where the ranks of a measured group are: on one host, each on another, or all devices."""

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
    """Seconds of one matmul, convolution or attention of ``flops``; ``shape`` as in ``Work``."""

    kind: str
    dtype: str
    shape: tuple[int, ...]
    flops: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Pass:
    """Seconds of an elementwise operator that reads and writes ``bytes``, or of what else is bound
    by memory: ``of`` as in ``Work``."""

    dtype: str
    bytes: int
    seconds: float
    of: str = ""


@dataclass(frozen=True, slots=True)
class Exchange:
    """Seconds of a collective of ``bytes``, ``group_size`` and ``stride`` (as in ``Collective``)
    while all such groups of the machine do the same."""

    kind: str
    group_size: int
    bytes: int
    seconds: float
    stride: int = 1


@dataclass(frozen=True, slots=True)
class Overlap:
    """Seconds of a product, of a collective over all devices, and of both begun together."""

    kind: str
    bytes: int
    product_s: float
    collective_s: float
    together_s: float

    @property
    def slowdown(self) -> float:
        """How many times as long the longer of the two takes beside the other; what they would
        take one after the other is the most that makes sense.

        >>> Overlap("all_reduce", 1, product_s=1.0, collective_s=2.0, together_s=2.5).slowdown
        1.25
        """
        return self.together_s / max(self.product_s, self.collective_s)


@dataclass(frozen=True, slots=True)
class Correction:
    """``of``: the ``digest`` of the profile that was corrected. ``runs``: by which measured steps
    (plan, seconds predicted by that profile, seconds measured). ``factors``: on the seconds of each
    of ``PARTS``."""

    of: str
    date: str
    runs: tuple[tuple[str, float, float], ...]
    factors: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Profile:
    """What was measured, on which machine, when and with what.

    ``devices`` are on ``hosts`` of equally many, those of a host one after the other. All work at
    once during each measurement. ``operator_s``: what any operator takes, however small (Python,
    dispatch, autograd), averaged over forward and backward. ``call_s``: the part of it that every
    measured ``Product`` and ``Pass`` contains. ``view_s``, ``pass_s``, ``part_s``, ``step_s``,
    ``message_s`` and ``message_byte_s`` as in ``HostTime``. ``speeds``: (so many devices, how many
    times as fast each is when the others idle), fewest first: processes on fewer cores, cores that
    share a memory. ``others``: the share of the processors that other programs used meanwhile.
    ``left_out``: what was still to be measured when somebody ended it.
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
    part_s: float = 0.0
    step_s: float = 0.0
    message_s: float = 0.0
    message_byte_s: float = 0.0
    speeds: tuple[tuple[int, float], ...] = ()
    hosts: int = 1
    overlaps: tuple[Overlap, ...] = ()
    others: float = 0.0
    left_out: tuple[str, ...] = ()
    corrections: tuple[Correction, ...] = ()

    @property
    def digest(self) -> str:
        """Hexadecimal digits that two profiles share only if they are the same."""
        content = json.dumps(profile_to_json(self), sort_keys=True)
        return hashlib.sha256(content.encode()).hexdigest()[:12]


def profile_to_json(profile: Profile) -> dict[str, Any]:
    return {"format": FORMAT, "version": VERSION, **asdict(profile)}


def profile_from_json(data: Any) -> Profile:
    """Raises ``ProfileError`` when this is not a profile of this version."""
    if not isinstance(data, dict) or data.get("format") != FORMAT:
        raise ProfileError("this is not a profile; `autopar profile` makes one")
    version = data.get("version")
    if version not in (4, 5, VERSION):
        later = isinstance(version, int) and version > VERSION
        raise ProfileError(
            f"the profile has version {version!r}, this autopar reads {READS}; "
            f"{'read it with a later autopar, or ' if later else ''}"
            "measure again with `autopar profile` on the machine that it is of"
        )
    try:
        before = {"message_byte_s": 0.0} if data["version"] < VERSION else {}
        values = {f.name: {**data, **before}[f.name] for f in fields(Profile)}
        profile = Profile(
            **{
                **values,
                "software": tuple((str(k), str(v)) for k, v in values["software"]),
                "products": tuple(
                    Product(p["kind"], p["dtype"], tuple(p["shape"]), p["flops"], p["seconds"])
                    for p in values["products"]
                ),
                "passes": tuple(
                    Pass(**(_of_version_4(p) if data["version"] == 4 else p))
                    for p in values["passes"]
                ),
                "exchanges": tuple(Exchange(**e) for e in values["exchanges"]),
                "speeds": tuple((int(n), speed) for n, speed in values["speeds"]),
                "overlaps": tuple(Overlap(**o) for o in values["overlaps"]),
                "left_out": tuple(map(str, values["left_out"])),
                "corrections": tuple(
                    Correction(
                        str(c["of"]),
                        str(c["date"]),
                        tuple((str(plan), said, took) for plan, said, took in c["runs"]),
                        tuple((str(part), factor) for part, factor in c["factors"]),
                    )
                    for c in values["corrections"]
                ),
            }
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ProfileError(f"the profile is damaged ({error!r}); measure again") from error
    _check(profile)
    return profile


def _of_version_4(told: dict[str, Any]) -> dict[str, Any]:
    """A pass, of losses now for half of their six passes over all classes."""
    if told.get("of") != "loss":
        return told
    return {**told, "bytes": 3 * told["bytes"], "seconds": 1.5 * told["seconds"]}


def _check(profile: Profile) -> None:
    seconds = [p.seconds for p in profile.products] + [p.seconds for p in profile.passes]
    seconds += [e.seconds for e in profile.exchanges]
    seconds += [s for o in profile.overlaps for s in (o.product_s, o.collective_s, o.together_s)]
    seconds += [profile.operator_s, profile.call_s, profile.devices, profile.memory_bytes]
    seconds += [f for c in profile.corrections for _, f in c.factors]
    seconds += [speed for _, speed in profile.speeds]
    beside = [profile.view_s, profile.pass_s, profile.part_s, profile.step_s]
    beside += [profile.message_s, profile.message_byte_s]
    if not all(isinstance(s, int | float) and 0 < s < math.inf for s in seconds) or not all(
        isinstance(s, int | float) and 0 <= s < math.inf for s in beside
    ):
        raise ProfileError("the profile has times that are not positive; measure again")
    if not any(p.of == "" for p in profile.passes) or not any(
        p.kind == "matmul" for p in profile.products
    ):
        raise ProfileError("the profile has no matmul or no pass over memory; measure again")
    if not isinstance(profile.hosts, int) or profile.hosts < 1 or profile.devices % profile.hosts:
        raise ProfileError(
            f"the profile says that {profile.devices} devices are evenly on {profile.hosts} hosts; "
            "measure again"
        )


PARTS = ("compute", "communication", "overhead")
"""What a profile can be wrong about as a whole: work on devices; collectives; what the host adds to
every operator, view and microbatch."""


def corrected(profile: Profile, factors: Mapping[str, float]) -> Profile:
    """The profile with the seconds of each part times its factor."""
    compute, communication, overhead = (factors.get(part, 1.0) for part in PARTS)

    def worked(seconds: float) -> float:
        beyond = _beyond_call_s(seconds, profile.call_s)
        return overhead * (seconds - beyond) + compute * beyond

    return replace(
        profile,
        operator_s=overhead * profile.operator_s,
        call_s=overhead * profile.call_s,
        view_s=overhead * profile.view_s,
        pass_s=overhead * profile.pass_s,
        part_s=overhead * profile.part_s,
        step_s=overhead * profile.step_s,
        message_s=overhead * profile.message_s,
        message_byte_s=communication * profile.message_byte_s,
        products=tuple(replace(p, seconds=worked(p.seconds)) for p in profile.products),
        passes=tuple(replace(p, seconds=worked(p.seconds)) for p in profile.passes),
        exchanges=tuple(replace(e, seconds=communication * e.seconds) for e in profile.exchanges),
    )


def read_profile(path: Path) -> Profile:
    try:
        return profile_from_json(json.loads(path.read_text()))
    except OSError as error:
        raise ProfileError(f"cannot read the profile {path}: {error.strerror}") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ProfileError(
            f"{path} is damaged, or no profile ({error}); `autopar profile -o {path}` makes one"
        ) from error
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
    _coefficients: dict[tuple[CollectiveKind, int, int], tuple[float, float]] = field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def devices(self) -> int:
        return self.profile.devices

    @property
    def scale_up_devices(self) -> int:
        return self.profile.devices // self.profile.hosts

    @property
    def memory_bytes(self) -> int:
        return self.profile.memory_bytes

    @property
    def speeds(self) -> tuple[tuple[int, float], ...]:
        return self.profile.speeds

    @property
    def prepares_ahead(self) -> bool:
        """Whether the host goes on while the device works, as with GPUs."""
        return dict(self.profile.software).get("backend") == "nccl"

    @property
    def host_time(self) -> HostTime:
        of = self.profile
        operator_s = of.operator_s if self.prepares_ahead else 0.0
        beside = of.part_s, of.step_s, of.message_s, of.message_byte_s
        return HostTime(of.view_s, of.pass_s, operator_s, *beside, ahead=self.prepares_ahead)

    def compute_time_s(self, work: Work) -> float:
        known = self._computed.get(work)
        if known is None:
            ahead = self.prepares_ahead or work.follows
            host_s = 0.0 if ahead else self.profile.operator_s
            known = self._computed[work] = host_s + self._work_s(work)
        return known

    def collective_time_s(self, collective: Collective) -> float:
        latency_s, s_per_byte = self.collective_coefficients(
            collective.kind, collective.group_size, collective.stride, collective.within
        )
        return latency_s + s_per_byte * collective.bytes

    def collective_coefficients(
        self, kind: CollectiveKind, group_size: int, stride: int, within: tuple[int, ...] = ()
    ) -> tuple[float, float]:
        """(latency_s, s_per_byte): a collective of b bytes takes latency_s + s_per_byte * b."""
        if group_size < 2 or stride < 1 or group_size * stride > self.devices:
            raise ValueError(
                f"a {kind} over {group_size} ranks that are {stride} apart does not fit on the "
                f"{self.devices} devices of the profile (a group has at least 2)"
            )
        host = self.scale_up_devices
        of_host = min(
            within[0] if within else members_in_unit(group_size, stride, host, self.devices),
            group_size,
        )
        key = (kind, group_size, of_host)
        known = self._coefficients.get(key)
        if known is None:
            known = self._coefficients[key] = self._over_hosts(*key)
        return known

    # ------------------------------------------------------------------ compute

    def _work_s(self, work: Work) -> float:
        if work.flops < 0 or work.bytes < 0:
            raise ValueError(f"negative work: {work}")
        match work.kind:
            case "memory":
                return self._pass_s(work)
            case "matmul" | "convolution" | "attention":
                return self._product_s(work)
            case _:
                raise KeyError(
                    f"no price for work of kind {work.kind!r}; known: matmul, convolution, "
                    "attention, memory"
                )

    def _pass_s(self, work: Work) -> float:
        """Between two measured sizes on a line in log-log; beyond them in proportion. A plain pass
        stands in for what was not measured. What blocks read again is in a processor's caches."""
        curves = self._curves.get(work.of) or self._curves[""]
        curve = curves.get(work.dtype) or curves.get(SAME_SPEED.get(work.dtype, ""))
        moved = work.bytes + (work.again_bytes if self.prepares_ahead else 0.0)
        return _interpolate(curve or next(iter(curves.values())), moved)

    @cached_property
    def _curves(self) -> dict[str, dict[str, list[tuple[float, float]]]]:
        """(bytes, seconds beyond the call) by what it is of and dtype, float32 first if it was
        measured."""
        found: dict[str, dict[str, list[tuple[float, float]]]] = {}
        for of, dtype in sorted(
            {(p.of, p.dtype) for p in self.profile.passes}, key=lambda k: (k[1] != "float32", k)
        ):
            found.setdefault(of, {})[dtype] = _rising(
                (float(p.bytes), self._beyond_call_s(p.seconds))
                for p in self.profile.passes
                if (p.of, p.dtype) == (of, dtype)
            )
        return found

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
        if kind != "matmul" and self._rates.keys() & {("matmul", dtype), ("matmul", other)}:
            return self._points("matmul", dtype)
        measured = ", ".join(sorted({d for k, d in self._rates if k in (kind, "matmul")}))
        raise UnpricedError(
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
        """Calls come one after the other: a device that is busy for longer does not see them."""
        return seconds if self.prepares_ahead else _beyond_call_s(seconds, self.profile.call_s)

    # -------------------------------------------------------------- collectives

    def _over_hosts(
        self, kind: CollectiveKind, group_size: int, of_host: int
    ) -> tuple[float, float]:
        """``of_host``: how many of the group share a host. Those that are on one host, and those of
        which each is on another, were measured. Between these: the parts on the hosts, then one of
        each, times what all devices take for what they should take so."""
        if of_host in (1, group_size) and (group_size == of_host or self.profile.hosts > 1):
            return self._interpolated(kind, group_size, across=of_host < group_size)
        found = self._in_turn(kind, of_host, ceil(group_size / of_host))
        whole = self._fits.get((kind, "all"))
        if whole is None:
            return found
        (_, *measured), in_turn = whole[0], self._in_turn(kind, *self._shape_of_all)
        a, b = (f * m / t for f, m, t in zip(found, measured, in_turn, strict=True))
        return a, b

    @property
    def _shape_of_all(self) -> tuple[int, int]:
        return self.scale_up_devices, self.profile.hosts

    def _in_turn(self, kind: CollectiveKind, of_host: int, hosts: int) -> tuple[float, float]:
        inside = self._interpolated(kind, of_host, across=False)
        outside = self._interpolated(kind, hosts, across=True)
        return inside[0] + outside[0], inside[1] + outside[1]

    def _interpolated(
        self, kind: CollectiveKind, group_size: int, *, across: bool
    ) -> tuple[float, float]:
        """Both coefficients on lines in log-log over the group sizes that were measured."""
        fits, times = self._fits_of(kind, "across" if across else "inside")
        latency_s = _interpolate([(g, a) for g, a, _ in fits], group_size)
        s_per_byte = _interpolate([(g, b) for g, _, b in fits], group_size)
        return times * latency_s, times * s_per_byte

    def _fits_of(
        self, kind: CollectiveKind, where: Where
    ) -> tuple[list[tuple[float, float, float]], float]:
        if kind not in COLLECTIVE_KINDS:
            raise KeyError(f"no price for a {kind!r}; known: {', '.join(COLLECTIVE_KINDS)}")
        for other, times in ((kind, 1.0), *STAND_IN[kind]):
            if fits := self._fits.get((other, where)):
                return fits, times
        raise UnpricedError(
            "the profile has no collective "
            f"{'from host to host' if where == 'across' else 'in a host'}"
            f"{' (it was ended early)' if self.profile.left_out else ''}; measure the machine "
            "again with `autopar profile`, or plan for one device"
        )

    @cached_property
    def _fits(self) -> dict[tuple[str, Where], list[tuple[float, float, float]]]:
        """(group size, latency_s, s_per_byte) by kind and place, ascending."""
        by_group: dict[tuple[str, Where, int], list[tuple[float, float]]] = {}
        host = self.scale_up_devices
        for e in self.profile.exchanges:
            where: Where = "inside" if e.group_size * e.stride <= host else "all"
            if self.profile.hosts > 1 and e.stride >= host:
                where = "across"
            points = by_group.setdefault((e.kind, where, e.group_size), [])
            points.append((e.bytes, e.seconds))
        found: dict[tuple[str, Where], list[tuple[float, float, float]]] = {}
        for (kind, where, group_size), points in sorted(by_group.items()):
            found.setdefault((kind, where), []).append((group_size, *fit_line(points)))
        return found


def _beyond_call_s(seconds: float, call_s: float) -> float:
    return max(seconds - call_s, LEAST_SHARE * seconds)


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
