"""Small random problems of stages, and their best staging by trying all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product
from random import Random

from autopar.ir.schedule import Shape
from autopar.simulator.pipeline import (
    Instant,
    Network,
    PairLinks,
    PortLinks,
    StageCost,
    StageMemory,
)
from autopar.simulator.stage_problem import (
    Alternative,
    Groups,
    Layout,
    Pool,
    StageChoice,
    StageProblem,
    Staging,
    Unit,
    in_order,
    value_of,
)


def stagings(problem: StageProblem) -> Iterator[Staging]:
    """All of them, those that cannot be done too; of equal ones inside a stage only one."""
    for m in problem.microbatches:
        units = problem.units(m)
        for parts in partitions(range(len(units))):
            try:
                ordered = in_order(parts, units)
            except ValueError:
                continue
            shapes = [
                (schedule, chunks)
                for schedule in problem.schedules
                for chunks in range(1, len(parts) + 1)
                if not schedule.refuses(Shape(len(parts), m, chunks))
            ]
            for choices in product(*(ways(part, units) for part in ordered)):
                for schedule, chunks in shapes:
                    yield Staging(m, schedule, chunks, choices)


def partitions(items: Sequence[int]) -> Iterator[list[tuple[int, ...]]]:
    if not items:
        yield []
        return
    last = items[-1]
    for parts in partitions(items[:-1]):
        yield [*parts, (last,)]
        for i, part in enumerate(parts):
            yield [*parts[:i], (*part, last), *parts[i + 1 :]]


def ways(part: tuple[int, ...], units: Sequence[Unit]) -> list[StageChoice]:
    found: dict[object, StageChoice] = {}
    layouts = {a.layout for u in part for a in units[u].alternatives}
    for layout in sorted(layouts, key=repr):
        places = [
            [i for i, a in enumerate(units[u].alternatives) if a.layout == layout] for u in part
        ]
        for chosen in product(*places):
            counted = Counter((units[u].alternatives, i) for u, i in zip(part, chosen, strict=True))
            key = (layout, frozenset(counted.items()))
            found.setdefault(key, StageChoice(part, layout, chosen))
    return list(found.values())


def best_of_all(problem: StageProblem) -> tuple[Fraction | float | None, Staging | None]:
    best_s, best = None, None
    for staging in stagings(problem):
        value = value_of(problem, staging, problem.units(staging.microbatches))
        if value is not None and (best_s is None or value.time_s < best_s):
            best_s, best = value.time_s, staging
    return best_s, best


@dataclass
class RandomStages:
    """Times are integers, so that the timeline is exact. ``tight``: how near memory is to what is
    needed, from 0 (nothing fits) to 1 (all does)."""

    seed: int
    branching: bool = False
    most_units: int = 4
    random: Random = field(init=False)
    problem: StageProblem = field(init=False)

    def __post_init__(self) -> None:
        self.random = random = Random(self.seed)
        count = random.randint(2, self.most_units)
        devices = random.randint(4, 8)
        layouts = random.sample([1, 2, 3, 4], random.randint(1, 2))
        kinds = [self._kind(layouts) for _ in range(random.randint(1, count))]
        reads = [self._reads(u) for u in range(count)]
        of_units = [
            (random.choice(kinds), random.randint(0, 400), random.random() < 0.9)
            for _ in range(count)
        ]
        tables = {
            m: tuple(
                Unit(f"unit {u}", self._for(kind, m), reads[u], size // m, gradient)
                for u, (kind, size, gradient) in enumerate(of_units)
            )
            for m in random.sample([1, 2, 3, 4, 6], 2)
        }
        limit = random.choice([10**6, random.randint(60, 400)])
        network = self._network()
        self.problem = StageProblem(
            units=tables.__getitem__,
            microbatches=tuple(tables),
            pools=(Pool(devices, limit),),
            network=network,
            exchange_s=lambda size, copies: size * copies // 4,
            norm_s=random.choice([None, None, 7]),
            shared=(((0, count - 1), random.randint(1, 60)),) if random.random() < 0.2 else (),
        )

    def _reads(self, unit: int) -> tuple[int, ...]:
        if not self.branching:
            skip = {self.random.randrange(unit)} if unit and self.random.random() < 0.2 else set()
            return tuple(sorted({unit - 1, *skip})) if unit else ()
        earlier = range(unit)
        return tuple(sorted(self.random.sample(earlier, min(unit, self.random.randint(0, 2)))))

    def _kind(self, layouts: list[int]) -> list[tuple[int, str, list[int]]]:
        """(devices, name, numbers), the more devices the less of everything."""
        random = self.random
        numbers = [random.randint(20, 400) for _ in range(11)]
        halves = random.random() < 0.8
        found = []
        for devices in layouts:
            worth = random.choice([devices, devices, max(1, devices - 1)])
            of_layout = [-(-n // worth) for n in numbers]
            found.append((devices, "plain", [halves, *of_layout]))
            if random.random() < 0.5:
                less = list(of_layout)
                less[1] += less[0]  # the gradient of the inputs, with the forward once more
                less[6] //= 4  # activations
                found.append((devices, "recomputed", [halves, *less]))
        return found

    def _for(self, kind: list[tuple[int, str, list[int]]], m: int) -> tuple[Alternative, ...]:
        found = []
        for devices, name, (halves, *n) in kind:
            forward, inputs, weights = (5 * n[i] // m + 1 for i in range(3))
            memory = StageMemory(
                parameters_bytes=n[3] // 8,
                gradients_bytes=n[4] // 8,
                optimizer_bytes=n[5] // 4,
                activations_bytes=n[6] // m,
                for_weights_bytes=n[6] // m // 2 if halves else 0,
                forward_bytes=n[7] // m // 8,
                backward_bytes=n[8] // m // 8,
            )
            split = (inputs, weights) if halves else (None, None)
            cost = StageCost(forward, inputs + weights, n[9] // 4, *split, memory)
            found.append(Alternative(Layout(devices, parts=devices), cost, n[10] // 4, name))
        return tuple(found)

    def _network(self):  # type: ignore[no-untyped-def]
        random = self.random
        speed, latency = Fraction(random.choice([1, 20, 500])), Fraction(random.choice([0, 1, 40]))
        kind = random.choice(["pair", "port", "instant"])

        def network(groups: Groups) -> Network:
            if kind == "instant":
                return Instant()
            return (PairLinks if kind == "pair" else PortLinks)(speed, latency)

        return network
