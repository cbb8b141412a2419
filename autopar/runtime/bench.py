"""What is measured of a machine: questions that all its processes ask together, in rounds.

Somebody else may use the machine meanwhile. So everything is asked in several rounds, of which the
half counts in which others used the processors least. Compute on a CPU is counted in the seconds
that the processor spent on it; collectives, which wait for each other, in seconds by how stretched
time is: how long a process that only computes waits for a processor, beside each part of a round.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from itertools import cycle
from statistics import fmean, median
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812, torch's own name for it

from autopar.ir.sharding import Mesh, Placement
from autopar.runtime.collectives import Communicator, connect
from autopar.runtime.devices import (
    MeasuredDevice,
    cores,
    optimizer_options,
    processor_seconds,
    software,
)
from autopar.runtime.sample_program import LONG, SHORT, Programs, alone, microbatch, sample_graph
from autopar.simulator.redistribution import Step
from cost_models.profiled import Exchange, Overlap, Pass, Product, Profile

Report = Callable[[str], None]

MATMULS = (
    (1, 32, 32, 32),
    (1, 64, 256, 64),
    (1, 256, 64, 256),
    (1, 256, 256, 256),
    (1, 1024, 64, 1024),
    (1, 4, 1024, 1024),
    (1, 64, 1024, 1024),
    (1, 1024, 1024, 64),
    (1, 512, 512, 512),
    (1, 128, 512, 1024),
    (1, 256, 1024, 2048),
    (1, 256, 256, 2048),
    (1, 2048, 256, 256),
    (1, 1024, 1024, 1024),
    (16, 64, 64, 32),
    (16, 256, 64, 64),
)
"""(batch, m, n, k): small and large, and each of the three sizes the short one."""

ATTENTIONS = ((8, 64, 64, 32), (8, 256, 256, 64), (2, 1024, 1024, 64))
ATTENTIONS_ON_GPU = (
    (256, 256, 256, 64),
    (512, 512, 512, 64),
    (128, 1024, 1024, 64),
    (128, 2048, 2048, 64),
    (64, 4096, 4096, 128),
    (16, 8192, 8192, 128),
)
"""(heads of all samples, queries, keys, dim); so many that a GPU is busy, and not its host."""


@dataclass(frozen=True, slots=True)
class Convolution:
    """Of square images: ``size`` of the smaller side of the two, as ``stride`` makes it."""

    batch: int
    channels: int
    out: int
    size: int
    window: int
    stride: int = 1
    groups: int = 1

    @property
    def product(self) -> tuple[int, int, int, int]:
        """The product that it is, as in ``Work``."""
        rows = self.batch * self.size**2
        each = self.channels // self.groups
        return self.groups, rows, self.out // self.groups, each * self.window**2

    @property
    def products(self) -> tuple[tuple[int, int, int, int], ...]:
        """Of the forward, of the gradient of its input, of that of its weights."""
        batch, m, n, k = self.product
        return self.product, (batch, m, k, n), (batch, k, n, m)


CONVOLUTIONS = (
    Convolution(4, 4, 32, 32, 3),
    Convolution(4, 32, 32, 32, 3),
    Convolution(4, 64, 64, 16, 3),
    Convolution(4, 128, 128, 8, 3),
    Convolution(1, 64, 64, 16, 3),
    Convolution(8, 64, 256, 16, 1),
    Convolution(4, 64, 128, 8, 2, stride=2),
    Convolution(2, 3, 64, 32, 7, stride=2),
    Convolution(4, 64, 64, 16, 3, groups=64),
)
"""Of images and of features, windows from one point to 7 x 7, patches, channels apart."""

CONVOLUTIONS_ON_GPU = (
    Convolution(32, 4, 64, 128, 3),
    Convolution(32, 64, 64, 128, 3),
    Convolution(32, 128, 128, 64, 3),
    Convolution(64, 256, 256, 32, 3),
    Convolution(64, 512, 512, 16, 3),
    Convolution(8, 128, 128, 64, 3),
    Convolution(64, 256, 1024, 32, 1),
    Convolution(64, 256, 512, 16, 2, stride=2),
    Convolution(64, 3, 64, 112, 7, stride=2),
    Convolution(64, 3, 1024, 14, 16, stride=16),
    Convolution(64, 256, 256, 32, 3, groups=256),
)
"""The same, so much larger that the device is busy and not its host."""

PASS_WIDTH = 256
"""Of the rows that a norm is over."""

LOSSES = ((64, 512), (256, 2048), (512, 4096))
"""(rows, classes)."""

UPDATES: tuple[tuple[type[torch.optim.Optimizer], dict[str, Any]], ...] = (
    (torch.optim.SGD, {"lr": 0.0}),
    (torch.optim.SGD, {"lr": 0.0, "momentum": 0.9}),
    (torch.optim.AdamW, {"lr": 0.0}),
)
"""An optimizer of each number of states. What it does not learn stays the same, however often."""

UPDATE_BYTES = (2**10, 2**18, 2**22)
"""Of a parameter."""

MOST_UPDATED = 64
"""Parameters in a step."""

PASS_BYTES = (2**12, 2**15, 2**18, 2**21, 2**23, 2**25)
EXCHANGE_BYTES = (2**10, 2**14, 2**17, 2**20, 2**22, 2**24)
OVERLAP_BYTES = (2**20, 2**24)
DTYPES = ("float32", "float64", "bfloat16")
ROUNDS, LEAST_ROUND_S = 4, 4.0
"""How often all is asked; less often, where that would be less than so long."""

MOVES: Mapping[str, tuple[Placement, Placement]] = {
    "all_reduce": ("P", "I"),
    "all_gather": ("S(0)", "R"),
    "reduce_scatter": ("P", "S(0)"),
    "all_to_all": ("S(0)", "S(1)"),
}
"""The redistribution that is each collective."""

LEAST_S = 1e-9
"""Of what is the difference of two measurements, which noise may have the wrong way round."""

ALONE_SHARE, ALONE_ROUNDS = 0.015, 3
"""How much longer measuring takes for each time that some devices are measured with and without the
others, and how often. Shorter than some tenths of a second says nothing on a machine that is busy:
who has waited is let go first."""

STRETCH_S = 0.12
"""For each part of a round and both before and after it, so long all compute, to see how stretched
time is. Shorter than some turns of waiting for a processor says nothing."""

FORWARD_AND_BACKWARD = 3.5
"""Flops of fused attention's forward and backward, in forwards: 2 products forward, 5 backward."""

Answer = Product | Pass | Exchange | float


@dataclass(frozen=True)
class Question:
    """A call to be timed, and what its seconds mean. ``together``: it is a collective. ``cold``:
    other work comes before each call, and has the caches of a processor then. ``spends``:
    what it takes of the processor is asked, not how long it waits."""

    call: Callable[[], Any]
    answer: Callable[[float], Answer]
    together: bool = False
    spends: bool = False
    cold: bool = False


@dataclass(frozen=True)
class Part:
    """Questions of a kind. ``share``: of the time for all."""

    name: str
    questions: Sequence[Question]
    share: float


@dataclass(frozen=True, slots=True)
class Moment:
    """What a part took in one round, as it would where time is as stretched as the devices do it
    to each other. ``others``: the share of the processors that other programs used."""

    seconds: tuple[float, ...]
    others: float


@dataclass
class Rounds:
    """What was measured so far, by part."""

    moments: defaultdict[str, list[Moment]] = field(default_factory=lambda: defaultdict(list))
    speeds: tuple[tuple[int, float], ...] | None = None
    overlaps: tuple[Overlap, ...] | None = None

    def seconds(self, part: str) -> list[float]:
        """Of each question: the median of the quietest rounds."""
        chosen = [moment.seconds for moment in quietest(self.moments[part])]
        return [median(of_question) for of_question in zip(*chosen, strict=True)]

    @property
    def others(self) -> float:
        return fmean(m.others for of in self.moments.values() for m in quietest(of))


class _Disturbed(Protocol):
    @property
    def others(self) -> float: ...


Some = TypeVar("Some", bound=_Disturbed)


def quietest(moments: Sequence[Some]) -> list[Some]:
    """The half in which others used least; of an odd number the one in the middle, too; and all
    that were about as quiet as the quietest, since then something else tells rounds apart."""
    ordered = sorted(moments, key=lambda moment: moment.others)
    half = (len(ordered) + 1) // 2
    return ordered[:half] + [
        moment for moment in ordered[half:] if moment.others < ordered[0].others + AS_QUIET
    ]


AS_QUIET = 0.1
"""Of the processors."""


@dataclass(frozen=True)
class Bench:
    """Measurements on one rank; all ranks make the same ones in the same order. ``hosts``: on which
    equally many of the ``devices`` are, those of a host one after the other."""

    devices: int
    hosts: int
    device: MeasuredDevice
    dtypes: tuple[str, ...] = DTYPES

    @property
    def per_host(self) -> int:
        return self.devices // self.hosts

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        return (
            Part("overheads", self._overheads(), 0.12),
            Part("products", self._matmuls(), 0.28),
            Part("convolutions", self._convolutions(), 0.1),
            Part("attention", self._attentions(), 0.08),
            Part("passes over memory", self._passes(), 0.17),
            Part("collectives", [*self._exchanges()], 0.25),
        )

    # ---- rounds --------------------------------------------------------------------------------

    def measured(self, seconds: float, report: Report, ended: Callable[[], bool]) -> Rounds:
        """All parts in rounds, until somebody has ``ended`` it; every rank is asked whether."""
        found, rounds = Rounds(), max(1, min(ROUNDS, round(seconds / LEAST_ROUND_S)))
        for number in range(rounds):
            for part in self.parts:
                if self._one_has(ended()):
                    return found
                report(f"round {number + 1} of {rounds}: {part.name}")
                found.moments[part.name].append(self.ask(part, seconds / rounds))
        if not self._one_has(ended()):
            report("devices with and without the others")
            found.speeds = tuple(self.speeds(ALONE_SHARE * seconds))
        if not self._one_has(ended()):
            report("collectives beside products")
            found.overlaps = tuple(self._overlaps())
        return found

    def ask(self, part: Part, round_s: float) -> Moment:
        """For so much of a round as is the part's share."""
        budget_s = part.share * round_s / max(1, len(part.questions))
        before, stretched = self.spent(), [self.stretch()]
        for question in part.questions:
            question.call()  # after another part, caches are cold; and kernels are to be chosen
        dist.barrier()
        times = self._mean(
            self._often_s(question, budget_s)
            if question.together
            # the other ranks are busy meanwhile, with this question or the next
            else self._steady_s(question, budget_s)
            for question in part.questions
        )
        stretched.append(self.stretch())
        less = self.usual_stretch / fmean(stretched)
        return Moment(
            tuple(
                time_s
                * (
                    1.0
                    if question.spends or (self.by_processor and not question.together)
                    else less
                )
                for question, time_s in zip(part.questions, times, strict=True)
            ),
            self.others(before),
        )

    @property
    def by_processor(self) -> bool:
        """Whether a process's own time tells what it computes: no device does it, nor threads."""
        return not self.device.on_gpu and torch.get_num_threads() == 1

    @property
    def usual_stretch(self) -> float:
        """What the devices do to each other: more of them than processors take turns."""
        return max(1.0, self.per_host / cores()) if self.by_processor else 1.0

    def stretch(self) -> float:
        """Seconds that pass for one that a process computes, while all do."""
        dist.barrier()
        if not self.by_processor:
            return 1.0
        began_s, spent_s = time.perf_counter(), time.process_time()
        while (passed_s := time.perf_counter() - began_s) < STRETCH_S:
            self._reference.call()
        passed_s, spent_s = self._mean([passed_s, time.process_time() - spent_s])
        return max(self.usual_stretch, passed_s / spent_s)

    @cached_property
    def _reference(self) -> Question:
        m, n, k = self.device.product_sizes(256, 256, 256)
        return Question(partial(torch.mm, self._random(m, k), self._random(k, n)), _seconds)

    def _one_has(self, ended: bool) -> bool:
        return self._mean([float(ended)])[0] > 0

    def spent(self) -> tuple[float, float, float]:
        """Processor seconds of the host, used and in all, as its first rank tells, and of this
        process."""
        busy_s, all_s = processor_seconds() if dist.get_rank() % self.per_host == 0 else (0.0, 0.0)
        return busy_s, all_s, time.process_time()

    def others(self, before: tuple[float, float, float]) -> float:
        """The share of the processors that other programs have used since."""
        spent = [now - then for now, then in zip(self.spent(), before, strict=True)]
        busy_s, all_s, own_s = self._mean(spent)
        return min(1.0, max(0.0, (busy_s - own_s) / all_s)) if all_s > 0 else 0.0

    # ---- questions -----------------------------------------------------------------------------

    def _overheads(self) -> list[Question]:
        """A single small call, and a microbatch of each of the sample programs."""
        device = self.device.torch_device
        small = torch.ones(16, device=device)
        communicator = alone()
        graphs = (sample_graph(SHORT), sample_graph(LONG), sample_graph(LONG, views=True))
        calls: list[Callable[[], Any]] = [lambda: torch.mul(small, small)]
        calls += [microbatch(graph, communicator, device) for graph in graphs]
        calls += [microbatch(graphs[1], communicator, device, parted=True)]
        found = [
            Question(calls[0], _seconds),
            *(Question(c, _seconds, cold=True) for c in calls[1:]),
        ]
        if self.devices > 1:
            everybody, axis = self._over(self.devices, 1)
            group = everybody.groups[everybody.mesh.names[axis]]
            held = small.clone().requires_grad_()
            found.append(Question(partial(everybody.move, held, Step(axis, "I", "R")), _seconds))
            for message in (small, self._random(MESSAGE_BYTES // 4)):
                call = partial(_pass_on, message, group)
                found.append(Question(call, _half, True, self.by_processor, cold=True))
        return found

    def _matmuls(self) -> list[Question]:
        shapes = [(b, *self.device.product_sizes(m, n, k)) for b, m, n, k in MATMULS]
        return [
            Question(
                self._matmuls_of(shape, getattr(torch, dtype)),
                partial(_product_of_three, dtype, shape),
            )
            for dtype in self.dtypes
            for shape in shapes
        ]

    def _matmuls_of(self, shape: tuple[int, ...], dtype: torch.dtype) -> Callable[[], Any]:
        """As a layer has them forward, for the gradient of its input and for that of its weights:
        of the two operands one, none, or the other lies transposed."""
        batch, m, n, k = shape
        keep = self._keeping(dtype, batch * m * n)
        some = () if batch == 1 else (batch,)
        rows, rows_t = (self._in_turn(dtype, *some, *of) for of in ((m, k), (k, m)))
        columns, columns_t = (self._in_turn(dtype, *some, *of) for of in ((k, n), (n, k)))

        def three() -> None:
            keep(torch.matmul(rows(), columns_t().mT))
            keep(torch.matmul(rows(), columns()))
            keep(torch.matmul(rows_t().mT, columns()))

        return three

    def _in_turn(self, dtype: torch.dtype, *shape: int) -> Callable[[], torch.Tensor]:
        """Operands one after the other from more memory than caches hold, as in a program, where
        what is read was written some time ago."""
        return cycle(self._different(dtype, *shape)).__next__

    def _different(self, dtype: torch.dtype, *shape: int) -> list[torch.Tensor]:
        """As many as there is room for."""
        count = math.prod(shape)
        memory = self._memories.get(dtype)
        if memory is None or memory.numel() < count:
            least = self.device.byte_sizes((RING_BYTES,))[0] // dtype.itemsize
            memory = self._memories[dtype] = self._random(max(count, least), dtype=dtype)
        copies = min(MOST_COPIES, memory.numel() // count)
        return [memory[i * count :][:count].view(shape) for i in range(copies)]

    @cached_property
    def _memories(self) -> dict[torch.dtype, torch.Tensor]:
        return {}

    def _keeping(self, dtype: torch.dtype, count: int) -> Callable[[torch.Tensor], None]:
        """For results of so many elements, which stay until as many bytes were made after them: as
        in a program, where what is written was not looked at for some time."""
        least = self.device.byte_sizes((RING_BYTES,))[0] // dtype.itemsize
        most, kept = max(1, min(MOST_COPIES, least // count)), self._results

        def keep(result: torch.Tensor) -> None:
            kept.append(result)
            while len(kept) > most:
                kept.popleft()

        return keep

    @cached_property
    def _results(self) -> deque[torch.Tensor]:
        """The last ones, of whatever question."""
        return deque()

    def _random(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(*shape, device=self.device.torch_device).to(dtype)

    def _convolutions(self) -> list[Question]:
        made = CONVOLUTIONS_ON_GPU if self.device.on_gpu else CONVOLUTIONS
        return [
            Question(call, partial(Product, "convolution", dtype, shape, 2.0 * math.prod(shape)))
            for dtype in self.dtypes
            if dtype != "float64"  # CPUs take their time, and nobody trains with it
            for one in made
            for call, shape in zip(
                self._convolution(one, getattr(torch, dtype)), one.products, strict=True
            )
        ]

    def _convolution(self, of: Convolution, dtype: torch.dtype) -> list[Callable[[], Any]]:
        """Forward, gradient of the input, gradient of the weights."""
        side = of.size * of.stride
        margin = (of.window - 1) // 2 if of.window != of.stride else 0
        x = self._in_turn(dtype, of.batch, of.channels, side, side)
        weight = self._in_turn(dtype, of.out, of.channels // of.groups, of.window, of.window)
        shared = ([of.stride] * 2, [margin] * 2, [1, 1])
        made = torch.ops.aten.conv2d(x(), weight(), None, *shared, of.groups)
        given, keep = self._in_turn(dtype, *made.shape), self._keeping(dtype, made.numel())
        keep_gradient = self._keeping(dtype, x().numel())

        def forward() -> None:
            keep(torch.ops.aten.conv2d(x(), weight(), None, *shared, of.groups))

        def backward(*wanted: bool) -> None:
            of_windows = (None, *shared, False, [0, 0], of.groups, [*wanted, False])
            found = torch.ops.aten.convolution_backward(given(), x(), weight(), *of_windows)
            keep_gradient(found[0] if wanted[0] else found[1])

        return [forward, partial(backward, True, False), partial(backward, False, True)]

    def _attentions(self) -> list[Question]:
        return [
            Question(
                self._attention(shape, getattr(torch, dtype)),
                partial(
                    Product,
                    "attention",
                    dtype,
                    shape,
                    FORWARD_AND_BACKWARD * 4.0 * math.prod(shape),
                ),
            )
            for dtype in self.dtypes
            for shape in (ATTENTIONS_ON_GPU if self.device.on_gpu else ATTENTIONS)
            if dtype != "float64" or not self.device.on_gpu
        ]

    def _attention(self, shape: tuple[int, int, int, int], dtype: torch.dtype) -> Callable[[], Any]:
        heads, queries, keys, dim = shape
        q, k, v = (
            self._random(1, heads, length, dim, dtype=dtype).requires_grad_()
            for length in (queries, keys, keys)
        )

        def both() -> None:
            out = F.scaled_dot_product_attention(q, k, v)
            torch.autograd.grad(out.sum(), (q, k, v))

        return both

    def _passes(self) -> list[Question]:
        """The mean of a cheap and two dear elementwise operators, since ``Work`` does not say
        which it is. To GPUs all that do not look at a row are alike, and norms are counted as the
        passes that they are."""
        found = []
        for dtype in self.dtypes:
            kind = getattr(torch, dtype)
            for size in self.device.byte_sizes(PASS_BYTES):
                shape = (size // 2 // kind.itemsize // PASS_WIDTH, PASS_WIDTH)
                rows, keep = self._in_turn(kind, *shape), self._keeping(kind, math.prod(shape))
                some = OVER_ELEMENTS if self.device.on_gpu else PASSES
                call = partial(_passes_of, some, rows, keep)
                found.append(Question(call, partial(_pass_of_several, len(some), dtype, size)))
        return [*found, *self._losses(), *self._updates()]

    def _losses(self) -> Iterator[Question]:
        """Cross-entropy forward and backward, a call of either: the first reads the logits and
        writes what is saved, the second fills zeros, reads these and what was saved, and writes
        the gradient."""
        for rows, classes in LOSSES:
            rows *= self.device.byte_sizes((1,))[0]
            logits = self._in_turn(torch.float32, rows, classes)
            labels = torch.arange(rows, device=self.device.torch_device) % classes
            keep = self._keeping(torch.float32, rows * classes)
            yield Question(
                partial(_loss, logits, labels, keep), partial(_half_of_loss, 4 * rows * classes)
            )

    def _updates(self) -> Iterator[Question]:
        for states, (maker, options) in enumerate(UPDATES):
            for size in self.device.byte_sizes(UPDATE_BYTES):
                several = self._different(torch.float32, size // 4)[: 2 * MOST_UPDATED]
                most = self.device.byte_sizes((UPDATED_BYTES,))[0] // size
                count = max(1, min(len(several) // 2, most))
                parameters = several[:count]
                for parameter, gradient in zip(parameters, reversed(several), strict=False):
                    parameter.grad = gradient
                how = optimizer_options([self.device.kind])
                step = maker([{"params": parameters}], **options, **how).step
                moved = size * (3 + 2 * states)
                yield Question(step, partial(_pass_of_one, moved, f"update {states}", count))

    # ---- collectives ---------------------------------------------------------------------------

    @property
    def axes(self) -> list[tuple[int, int]]:
        """(size, stride) of the mesh axes that are measured: in a host pairs, about half and all;
        one device of each host, and of pairs of hosts; all devices."""
        found = [(size, 1) for size in _some_divisors(self.per_host)]
        found += [(size, self.per_host) for size in _some_divisors(self.hosts)]
        return list(dict.fromkeys([*found, *[(self.devices, 1)] * (self.devices > 1)]))

    def _exchanges(self) -> Iterator[Question]:
        sizes = self.device.byte_sizes(EXCHANGE_BYTES)
        for size, stride in self.axes:
            communicator, axis = self._over(size, stride)
            for kind in (*MOVES, "send"):
                for count in sizes:
                    yield Question(
                        self._exchange(kind, communicator, axis, count),
                        partial(Exchange, kind, size, count, stride=stride),
                        together=True,
                    )

    def _over(self, size: int, stride: int) -> tuple[Communicator, int]:
        """A mesh of all devices with such an axis, and which it is."""
        axes = (("outer", self.devices // size // stride), ("group", size), ("inner", stride))
        mesh = Mesh(tuple((name, n) for name, n in axes if n > 1))
        return connect(mesh, self.device.kind), mesh.names.index("group")

    def _exchange(
        self, kind: str, communicator: Communicator, axis: int, size_bytes: int
    ) -> Callable[[], Any]:
        """As lowered programs call them, for tensors with a gradient."""
        ranks = communicator.mesh.sizes[axis]
        rows = max(1, size_bytes // 4 // ranks**2) * ranks
        whole = self._random(rows, ranks)  # float32, both dims are multiples of the group
        if kind == "send":
            return partial(_pass_on, whole, communicator.groups[communicator.mesh.names[axis]])
        held = whole[: rows // ranks] if kind == "all_gather" else whole
        source, target = MOVES[kind]
        return partial(communicator.move, held.clone().requires_grad_(), Step(axis, source, target))

    def _overlaps(self) -> Iterator[Overlap]:
        """An all-reduce over all devices beside products that take about as long."""
        if self.devices == 1:
            return
        product = self._reference
        for size in self.device.byte_sizes(OVERLAP_BYTES):
            whole = self._random(size // 4)
            begin = partial(dist.all_reduce, whole, async_op=True)
            both: list[tuple[float, float, float]] = []
            for _ in range(OVERLAP_ROUNDS):
                (one_s,) = self._mean([self._repeated_s(product, 4)])
                (exchange_s,) = self._mean([self._repeated_s(_waited(begin), 2)])
                calls = max(1, round(exchange_s / one_s))
                (product_s,) = self._mean([self._repeated_s(product, calls)])
                beside = Question(partial(_beside, begin, product.call, calls), _seconds)
                (together_s,) = self._mean([self._repeated_s(beside, 1)])
                both.append((calls * product_s, exchange_s, together_s))
            middle = sorted(both, key=lambda times: times[2] / max(times[:2]))[len(both) // 2]
            yield Overlap("all_reduce", size, *middle)

    # ---- time ----------------------------------------------------------------------------------

    def speeds(self, budget_s: float) -> list[tuple[int, float]]:
        """How many times as fast one rank, and each of half of them, is when the others wait."""
        found: list[tuple[int, float]] = []
        for few in sorted({1, self.devices // 2} - {0, self.devices}, reverse=True):
            # fewer are no slower, and do not do more together than all
            least, most = found[0][1] if found else 1.0, self.devices / few
            found.insert(0, (few, min(max(least, self._speed(few, budget_s)), most)))
        return found

    def _speed(self, few: int, budget_s: float) -> float:
        questions = [self._reference, Question(self._large_pass(), _seconds)]
        ratios = []
        for question in questions * ALONE_ROUNDS:
            dist.barrier()
            (together_s,) = self._mean([self._steady_s(question, budget_s)])
            dist.barrier()
            mine_s = self._steady_s(question, budget_s, few) if dist.get_rank() < few else 0.0
            ratios.append(together_s / (self._mean([mine_s])[0] * self.devices / few))
        return median(ratios)

    def _large_pass(self) -> Callable[[], Any]:
        return partial(torch.mul, self._random(self.device.byte_sizes(PASS_BYTES)[3] // 8), 2.0)

    def _often_s(self, question: Question, budget_s: float) -> float:
        """All ranks call a collective equally often."""
        (once_s,) = self._mean([self._repeated_s(question, 1)])
        calls = min(MOST_CALLS, max(2, int(budget_s / once_s)))
        looks = min(calls, LOOKS)
        each = 1 if question.cold else calls // looks
        return median([self._repeated_s(question, each) for _ in range(looks)])

    def _repeated_s(self, question: Question, calls: int) -> float:
        if question.spends:
            return self._taken_s(question, calls, time.process_time) * self.usual_stretch / calls
        return self._taken_s(question, calls, time.perf_counter) / calls

    def _steady_s(self, question: Question, budget_s: float, at_work: int = 0) -> float:
        """While the other ranks do the same: for as long, however often. On a CPU the seconds that
        it computes, times what devices wait for each other. ``at_work``: devices, if not all."""
        clock = time.process_time if self.by_processor else time.perf_counter
        in_turns = max(1.0, min(at_work or self.per_host, self.per_host) / cores())
        in_turns = in_turns if self.by_processor else 1.0
        began_s, calls, taken_s = clock(), 1, list[float]()
        # a turn may be longer than the budget, and who waits for it would look once
        while clock() - began_s < budget_s / in_turns or not taken_s:
            taken_s.append(self._taken_s(question, calls, clock) / calls)
            calls = max(1, int(budget_s / in_turns / LOOKS / max(taken_s[-1], LEAST_S)))
            calls = 1 if question.cold else calls
        return median(taken_s) * in_turns

    def _taken_s(self, question: Question, calls: int, clock: Callable[[], float]) -> float:
        """By so many calls."""
        if question.cold and self.by_processor:
            return sum(self._after_other_work_s(question.call, clock) for _ in range(calls))
        self.device.synchronize()
        began_s = clock()
        for _ in range(calls):
            question.call()
        self.device.synchronize()
        return clock() - began_s

    def _after_other_work_s(self, call: Callable[[], Any], clock: Callable[[], float]) -> float:
        torch.sum(self._other_work)
        began_s = clock()
        call()
        return clock() - began_s

    @cached_property
    def _other_work(self) -> torch.Tensor:
        (all_of_it,) = self._different(torch.float32, RING_BYTES // 4)
        return all_of_it[: OTHER_BYTES // 4]

    def _mean(self, seconds: Iterable[float]) -> list[float]:
        total = torch.tensor([*seconds], dtype=torch.float64, device=self.device.torch_device)
        dist.all_reduce(total)
        return [float(value) for value in total / self.devices]


RING_BYTES = 2**26
"""More than the cache of a core, and its share of one that all have. On a virtual machine with two
cores of a Sapphire Rapids a pass of 4 MB takes as long out of 2 MB as out of 16, and nearly twice
as long out of 32 and of 128 (2026-11-27)."""

UPDATED_BYTES = RING_BYTES // 4
"""Of parameters in a step: with gradients and states as much as caches do not hold."""

OTHER_BYTES = 2**24
"""What other work reads: more than the cache of a core."""

MESSAGE_BYTES = 2**20
"""Of the large one of two."""

MOST_COPIES = 1024
LOOKS = 8
"""So many parts of the time for a question are measured, of which the one in the middle counts."""

MOST_CALLS = 1000
OVERLAP_ROUNDS = 3


def profile_of(bench: Bench, rounds: Rounds, machine: str) -> Profile | None:
    """What the rounds say; ``None`` if it is too little to price anything."""
    asked = [part for part in bench.parts if rounds.moments[part.name]]
    names = {part.name for part in asked}
    if not names >= {"overheads", "products", "passes over memory"}:
        return None
    answers = [
        question.answer(seconds)
        for part in asked
        for question, seconds in zip(part.questions, rounds.seconds(part.name), strict=True)
    ]
    call_s, *of_programs = (a for a in answers if isinstance(a, float))
    programs = Programs(*of_programs[:4])
    step_s, small_s, large_s = of_programs[4:] or (0.0, 0.0, 0.0)
    per_byte_s = max(0.0, large_s - small_s) / MESSAGE_BYTES
    left_out = [part.name for part in bench.parts if part.name not in names]
    left_out += ["devices with and without the others"] * (rounds.speeds is None)
    left_out += ["collectives beside products"] * (rounds.overlaps is None)
    return Profile(
        machine=machine,
        device=bench.device.name,
        devices=bench.devices,
        memory_bytes=bench.device.memory_bytes(bench.per_host),
        software=software(bench.device.backend),
        date=datetime.now(UTC).date().isoformat(),
        # no operator is quicker than the cheapest call; noise may say so of the rest
        operator_s=max(programs.operator_s, call_s),
        call_s=call_s,
        products=tuple(a for a in answers if isinstance(a, Product)),
        passes=tuple(a for a in answers if isinstance(a, Pass)),
        exchanges=tuple(a for a in answers if isinstance(a, Exchange)),
        view_s=max(programs.view_s, LEAST_S),
        pass_s=max(programs.pass_s, LEAST_S),
        part_s=max(programs.part_s, LEAST_S),
        step_s=step_s,
        # GPUs go on while their host sends
        message_s=small_s if bench.by_processor else 0.0,
        message_byte_s=per_byte_s if bench.by_processor else 0.0,
        speeds=rounds.speeds or (),
        hosts=bench.hosts,
        overlaps=rounds.overlaps or (),
        others=round(rounds.others, 3),
        left_out=tuple(left_out),
    )


def _seconds(seconds: float) -> float:
    return seconds


def _half(seconds: float) -> float:
    """Of two messages, one each way."""
    return seconds / 2


OVER_ELEMENTS: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = (
    lambda rows: torch.mul(rows, 2.0),
    F.gelu,
)
PASSES = (*OVER_ELEMENTS, lambda rows: F.layer_norm(rows, (PASS_WIDTH,)))


def _passes_of(
    some: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    rows: Callable[[], torch.Tensor],
    keep: Callable[[torch.Tensor], None],
) -> None:
    for one in some:
        keep(one(rows()))


def _loss(
    logits: Callable[[], torch.Tensor], labels: torch.Tensor, keep: Callable[[torch.Tensor], None]
) -> None:
    scores = logits().detach().requires_grad_()
    (gradient,) = torch.autograd.grad(F.cross_entropy(scores, labels), scores)
    keep(gradient)


def _product_of_three(dtype: str, shape: tuple[int, ...], seconds: float) -> Product:
    return Product("matmul", dtype, shape, 2.0 * math.prod(shape), seconds / 3)


def _pass_of_several(count: int, dtype: str, size_bytes: int, seconds: float) -> Pass:
    return Pass(dtype, size_bytes, seconds / count)


LOSS_PASSES = 6
"""Over all classes, forward and backward: as the rule of cross-entropy counts them."""


def _half_of_loss(size_bytes: int, seconds: float) -> Pass:
    return Pass("float32", LOSS_PASSES * size_bytes // 2, seconds / 2, "loss")


def _pass_of_one(moved: int, of: str, count: int, seconds: float) -> Pass:
    return Pass("float32", moved, seconds / count, of)


def _some_divisors(count: int) -> list[int]:
    """2, about half, and all.

    >>> _some_divisors(1), _some_divisors(2), _some_divisors(8), _some_divisors(6)
    ([], [2], [2, 4, 8], [2, 3, 6])
    """
    divisors = [d for d in range(2, count + 1) if count % d == 0]
    middle = [d for d in divisors if 2 < d < count]
    return sorted({*divisors[:1], *middle[-1:], *divisors[-1:]})


def _waited(begin: Callable[[], Any]) -> Question:
    return Question(lambda: begin().wait(), _seconds)


def _beside(begin: Callable[[], Any], product: Callable[[], Any], calls: int) -> None:
    work = begin()
    for _ in range(calls):
        product()
    work.wait()


def _pass_on(tensor: torch.Tensor, group: Any) -> None:
    """Every rank sends to the next of its group and receives from the one before."""
    ranks = dist.get_process_group_ranks(group)
    here = ranks.index(dist.get_rank())
    operations = [
        dist.P2POp(dist.isend, tensor, ranks[(here + 1) % len(ranks)], group),
        dist.P2POp(dist.irecv, torch.empty_like(tensor), ranks[here - 1], group),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()


__all__ = ["Bench", "Moment", "Part", "Question", "Report", "Rounds", "profile_of"]
