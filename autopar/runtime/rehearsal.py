"""A few real steps of a plan, against one process and against what was predicted."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autopar.errors import AutoparError
from autopar.ir.graph import Operator, OperatorGraph
from autopar.ir.measurement import Measurement
from autopar.ir.plan import Plan, write_atomically
from autopar.ir.strategy import Training
from autopar.ops.draws import draws
from autopar.runtime.first_cause import first_cause
from autopar.runtime.initial import InitialValues
from autopar.runtime.launch import local_device, run, torchrun
from autopar.runtime.local_ops import OUT_OF_RANGE
from autopar.runtime.peers import Tell, tell_nobody
from autopar.runtime.pipeline import PipelineStep
from autopar.runtime.step import OPTIMIZERS, TrainingStep
from autopar.runtime.watch import MemoryWatch, Watch

Build = Callable[[], tuple[nn.Module, Any, Callable[[Any, Any], Tensor] | None]]
"""Makes the model, one global batch, and the loss if the model does not return it."""

Batch = tuple[tuple[Any, ...], dict[str, Any]]


def rehearse(
    plan: Plan,
    build: Build,
    steps: int,
    seed: int,
    timeout_s: float | None = None,
    tell: Tell = tell_nobody,
) -> Measurement:
    """On one of the plan's processes: train so many steps on one batch, then once more to see how
    much memory is alive at once."""
    ready = prepare(plan, build, seed, timeout_s, tell)
    losses, times_s = [], []
    for number in range(steps):
        loss, step_s = ready.take_step(f"step {number}")
        losses.append(loss)
        times_s.append(step_s)
    peak_bytes = ready.peak_bytes()
    with ready.step.peers.doing("comparing times and memory", ready.everybody):
        of_ranks = _of_all([*times_s, peak_bytes])
    *slowest_s, largest_bytes = of_ranks.max(dim=0).values.tolist()
    return Measurement(
        tuple(losses),
        tuple(slowest_s),
        int(largest_bytes),
        tuple(tuple(of_rank) for of_rank in of_ranks[:, :-1].tolist()),
    )


@dataclass(frozen=True)
class Ready:
    """A plan on this process, ready for steps on one batch."""

    step: TrainingStep | PipelineStep
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def everybody(self) -> Sequence[int]:
        return range(dist.get_world_size())

    def take_step(self, name: str = "a step") -> tuple[float, float]:
        """Its loss and seconds, which begin when all processes have come."""
        with self.step.peers.doing(f"the start of {name}", self.everybody):
            dist.barrier()
        began_s = time.perf_counter()
        with _index_errors_explained():
            loss = float(self.step(*self.args, **self.kwargs))  # waits for the device
        return loss, time.perf_counter() - began_s

    def peak_bytes(self) -> int:
        """Of what is alive at once in one more step."""
        return _peak_bytes(self.step, self.args, self.kwargs)


def prepare(
    plan: Plan,
    build: Build,
    seed: int,
    timeout_s: float | None = None,
    tell: Tell = tell_nobody,
) -> Ready:
    step = run(plan, lambda: build()[0], seed=seed, timeout_s=timeout_s, tell=tell)
    return Ready(step, *batch_of(plan.graph, _inputs(build, seed), plan.strategy.training))


@contextmanager
def _index_errors_explained() -> Iterator[None]:
    """The shapes of the batch were checked when it was planned; its values are used only now."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        if not isinstance(error, IndexError) and OUT_OF_RANGE not in str(error):
            raise
        raise AutoparError(
            "the batch of inputs() has an index, a token or a label, that is too large or below 0: "
            f"{error}; make inputs() for the sizes of the model"
        ) from error


def _inputs(build: Build, seed: int) -> Any:
    """The batch that ``build`` makes after the model, without keeping a model in memory."""
    made: list[Any] = []

    def model() -> nn.Module:
        built: nn.Module
        built, inputs, _ = build()
        made.append(inputs)
        return built

    values = InitialValues()
    values.make(model, seed)

    def real(value: Any) -> Any:
        return values.whole(value) if isinstance(value, Tensor) else value

    (inputs,) = made
    if isinstance(inputs, dict):
        return {key: real(value) for key, value in inputs.items()}
    return tuple(map(real, inputs))


def batch_of(graph: OperatorGraph, inputs: Any, training: Training) -> Batch:
    """Positional and keyword inputs as the plan was made for them."""

    def cast(value: Any) -> Any:
        if training.precision == "mixed" and isinstance(value, Tensor):
            return value.to(torch.bfloat16) if value.is_floating_point() else value
        return value

    if isinstance(inputs, Mapping):
        return (), {key: cast(inputs[key]) for key in graph.input_keys}
    return tuple(map(cast, inputs)), {}


def _of_all(values: list[float]) -> Tensor:
    """A row for each rank."""
    mine = torch.tensor(values, dtype=torch.float64, device=local_device())
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)
    return torch.stack(rows).cpu()


def _peak_bytes(
    step: TrainingStep | PipelineStep, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> int:
    device = local_device()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step(*args, **kwargs)
        return torch.cuda.max_memory_allocated(device)
    parts = list(step.held.values()) if isinstance(step, PipelineStep) else [step]
    watch = Watch(MemoryWatch(), parts[0].communicator.recorder)
    watch.memory.keep("kept", (tensor for part in parts for tensor in _kept(part)))
    watch.memory.restart()
    with watch:
        step(*args, **kwargs)
    return watch.memory.peak_bytes


def _kept(step: TrainingStep) -> Iterator[Tensor]:
    """What is there between steps: parameters, buffers, constants, masters, optimizer states."""
    yield from step.state.parameters.values()
    yield from step.state.buffers.values()
    yield from step.program.graph_module.buffers()
    for group in step.optimizer.param_groups:
        for parameter in group["params"]:
            yield parameter
            states = step.optimizer.state[parameter].values()
            yield from (state for state in states if isinstance(state, Tensor))


# The same in one process


def single_process(plan: Plan, build: Build, steps: int, seed: int) -> tuple[float, ...]:
    """The losses of plain PyTorch, without autopar: the model, its optimizer, the same batch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model, inputs, loss_of = build()
    training = plan.strategy.training
    args, kwargs = batch_of(plan.graph, inputs, training)
    trained: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    masters = trained
    if training.precision == "mixed":
        masters = [p.detach().to(torch.float32, copy=True) for p in trained]
        model = model.to(torch.bfloat16)  # the same parameters, with other data
    maker, defaults = OPTIMIZERS[training.optimizer]
    optimizer = maker(masters, **defaults)
    losses = []
    for _ in range(steps):
        outputs = model(*args, **kwargs)
        loss = (
            getattr(outputs, "loss", outputs)
            if loss_of is None
            else loss_of(outputs, kwargs or args)
        )
        loss.backward()
        if training.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained, training.clip_norm)
        with torch.no_grad():
            for master, parameter in zip(masters, trained, strict=True):
                if master is not parameter and parameter.grad is not None:
                    master.grad = parameter.grad.float()
            optimizer.step()
            for master, parameter in zip(masters, trained, strict=True):
                if master is not parameter:
                    parameter.copy_(master)
                parameter.grad = None
        losses.append(float(loss.detach()))
    return tuple(losses)


def draws_random_numbers(graph: OperatorGraph) -> bool:
    """Whether a step depends on random numbers, which torch draws otherwise than the runtime."""
    return any(
        draws(operator.op) or bool(_attention_dropout(operator)) for operator in graph.operators
    )


def _attention_dropout(operator: Operator) -> float:
    if "scaled_dot_product_attention" not in operator.op:
        return 0.0
    return float(operator.argument(4, "dropout_p", 0.0))


# Between the process that starts and those that are started


def start(plan: Plan, arguments: Sequence[str]) -> Measurement:
    """Run ``autopar arguments... --result FOLDER`` in the plan's number of processes on this
    machine, and read what they left in the folder.

    Raises:
        AutoparError: what went wrong first, in whichever process.
    """
    with tempfile.TemporaryDirectory(prefix="autopar-run-") as name:
        folder = Path(name)
        result, errors = folder / RESULT, folder / "errors.txt"
        with errors.open("w") as error_file:
            code = torchrun(plan.world_size, "autopar", [*arguments, "--result", name], error_file)
        if result.exists():
            data = json.loads(result.read_text())
            return Measurement(
                tuple(data["losses"]),
                tuple(data["step_times_s"]),
                data["peak_memory_bytes"],
                tuple(map(tuple, data["rank_step_times_s"])),
            )
        said = errors.read_text()
        cause = first_cause(folder, plan.world_size, said)
    if cause is not None:
        raise cause
    last = "\n".join(said.strip().splitlines()[-30:])
    raise RuntimeError(f"torchrun ended with exit code {code} and no result; it said:\n{last}")


RESULT = "result.json"


def leave(folder: Path, found: Measurement) -> None:
    """What one of the processes found, for ``start`` to read."""
    write_atomically(folder / RESULT, json.dumps(asdict(found)))
