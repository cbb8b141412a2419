"""The verbs of autopar. Names that a user gives become objects here, and nowhere further in."""

from __future__ import annotations

import difflib
import gc
import math
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Unpack

from autopar import __version__
from autopar.errors import (
    AutoparError,
    InfeasibleError,
    InterruptedSearchError,
    OutOfTimeError,
    PlanMismatchError,
)
from autopar.ir.graph import OperatorGraph
from autopar.ir.measurement import Measurement, RunRecord, read_run
from autopar.ir.plan import Plan, PlanDiff, digest_of, load_plan, save_plan, summarise
from autopar.ir.plan import diff as diff_plans
from autopar.ir.profiled_graph import is_profiled, is_profiled_file, load_profiled_graph
from autopar.ir.search import Budget, Problem, SearchResult, SearchSummary, Trial
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Strategy, Training
from cost_models.interface import CostModel

if TYPE_CHECKING:
    from torch import nn

    from autopar.exporters import Exporter
    from autopar.ops import Proposals
    from autopar.recipes import Degrees
    from autopar.recipes import Recipe as RestrictedSearch
    from autopar.runtime.pipeline import PipelineStep
    from autopar.runtime.step import TrainingStep
    from autopar.runtime.verify import Report
    from autopar.runtime.verify_stages import StagesReport
    from autopar.searchers.over_stages import StageResult
    from autopar.simulator.calibration import Factor
    from autopar.simulator.edges import Rules
    from autopar.simulator.microbatches import Division
    from autopar.simulator.stage_problem import StageProblem
    from autopar.simulator.timeline import Timeline
    from cost_models.profiled import Profile

Progress = Callable[[str], None]
"""Is told what is done, at the start of everything that may take over a second."""

Objective = Literal["step", "throughput"]
Precision = Literal["full", "mixed"]
Optimizer = Literal["sgd", "momentum", "adam", "adamw"]
Searcher = Callable[..., SearchResult]
"""``search(problem, budget, progress=...)``, as those on the shelf."""
Loss = Callable[[Any, Any], Any]

SEARCHER = "hybrid"
"""What searches unless it is told otherwise."""

LOCAL = "local"
"""The topology that is this machine, measured."""


class Wanted(TypedDict, total=False):
    """What a search is for; every key has a default.

    - ``topology``: ``"local"`` (this machine, measured once; the default), the name of a machine,
      ``NODESxDEVICESxNAME``, a TOML file, or a cost model of one's own.
    - ``devices``: how many of this machine (default: its GPUs, else its cores).
    - ``mesh``: sizes of the mesh axes, outermost first (default: all factorizations).
    - ``memory_limit_bytes``: for the tensors of each device (default: what the process does not
      hold otherwise of its memory).
    - ``optimizer``, ``precision``, ``clip_norm``: what is trained with.
    - ``microbatches``: in how many the batch is worked on, one after the other; the result is the
      same (default, ``None``: those with which it is fastest).
    - ``recompute``: of the repeated blocks, what is not kept for the backward but made again:
      ``"none"`` (the default), in all copies ``"attention"`` (its products and what is between),
      ``"selective"`` (what is cheap) or ``"full"`` (all but what the next copy reads), or
      ``"auto"``, what is fastest within memory.
    - ``dimensions``: which of Sample, Operator, Attribute and Parameter may be split.
    - ``propose``: find rules by trying for ops that have none.
    - ``loss``: ``loss(outputs, inputs)`` when the model does not return its own.
    - ``batch``, ``sequence``: sizes of the batch of an ``hf:`` model.
    - ``objective``: of a profiled graph, the time of a ``step``, or ``throughput``: the busiest
      device or link when steps follow each other without a gap.
    """

    topology: str | Path | CostModel
    devices: int | None
    mesh: tuple[int, ...] | Mesh | None
    memory_limit_bytes: int | None
    optimizer: Optimizer
    precision: Precision
    clip_norm: float | None
    microbatches: int | None
    recompute: str
    dimensions: str
    propose: bool
    loss: Loss | None
    batch: int | None
    sequence: int | None
    objective: Objective


@contextmanager
def _as_user_errors(*, unpriced_only: bool = False) -> Iterator[None]:
    """``cost_models`` stands below autopar's errors and raises plain ``ValueError``.
    ``unpriced_only``: what a machine has no figure for; others are defects of ours."""
    from cost_models import UnpricedError

    users: type[ValueError] = UnpricedError if unpriced_only else ValueError
    try:
        yield
    except users as error:
        raise AutoparError(str(error)) from error


def extract(
    model: str | Path | nn.Module | OperatorGraph,
    inputs: Any = None,
    *,
    loss: Loss | None = None,
    precision: Precision = "full",
    batch: int | None = None,
    sequence: int | None = None,
    progress: Progress | None = None,
) -> OperatorGraph:
    """The training graph of a module with one global batch of ``inputs``, or of a model by name.

    A name is a path to ``model.py``, ``package.module:callable`` or ``hf:NAME_OR_PATH`` (whose
    batch has the sizes ``batch`` and ``sequence``); its extraction is cached. A graph is itself.
    """
    if isinstance(model, OperatorGraph):
        return model
    if isinstance(model, str | Path) and is_profiled_file(model):
        return load_profiled_graph(model)
    _tell(progress, "extracting the operators")
    if isinstance(model, str | Path):
        from autopar.extractor import cached_extract

        return cached_extract(str(model), batch=batch, sequence=sequence, precision=precision)
    if inputs is None:
        raise AutoparError(
            "a module cannot be extracted without a batch: give inputs, a tuple (positional) or a "
            "dict (keyword) of tensors with the sizes of one global batch"
        )
    from autopar.extractor import extract as extract_module

    name = type(model).__name__
    return extract_module(model, inputs, loss, name=name, precision=precision)


def search(
    model: str | Path | nn.Module | OperatorGraph,
    inputs: Any = None,
    *,
    searcher: str | Searcher = SEARCHER,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
    **wanted: Unpack[Wanted],
) -> SearchResult:
    """All trials and the best of them; see ``Wanted`` for the other arguments.

    ``time_limit_s``: all of it may go into proofs; without one (``USUAL``) they get less.
    """
    problem = problem_of(model, inputs, progress=progress, **wanted)
    return run_search(problem, searcher, time_limit_s, progress)


def plan(
    model: str | Path | nn.Module | OperatorGraph,
    inputs: Any = None,
    *,
    searcher: str | Searcher = SEARCHER,
    time_limit_s: float | None = None,
    recipe: str | Degrees | None = None,
    progress: Progress | None = None,
    **wanted: Unpack[Wanted],
) -> Plan:
    """The fastest strategy that fits, with its price, its proof and its promise.

    See ``Wanted`` for the other arguments. A graph of measured operators, or the path of one
    (docs/profiled_graphs.md), is planned in stages. ``recipe``: plan this, and search nothing else:
    a name of ``autopar list recipes``, degrees such as ``"tensor=8,pipeline=4"``, a name and what
    differs from it, or ``Degrees`` (docs/recipes.md).

    Raises:
        InfeasibleError: nothing fits in memory; the message has the nearest miss.
        OutOfTimeError: the time limit came before any strategy was found.
        InterruptedSearchError: Ctrl-C did; later, it ends the search with the best so far.
        UnsupportedModelError: the model cannot be traced, or has operators without a rule.
    """
    profiled = _profiled(model)
    if profiled is not None and recipe is not None:
        raise AutoparError(
            "a recipe divides the operators of a model, and this is a profiled graph; leave it out"
        )
    if profiled is not None:
        name = str(model) if isinstance(model, str | Path) else ""
        return plan_profiled(
            profiled, name, searcher, time_limit_s=time_limit_s, progress=progress, **wanted
        )
    chosen = None if recipe is None else _recipe(recipe, wanted, progress)
    problem = problem_of(model, inputs, progress=progress, **wanted)
    if recipe is not None and chosen is not None:
        found = _by_recipe(problem, recipe, chosen, wanted.get("microbatches"), progress)
    else:
        found = plan_of(problem, run_search(problem, searcher, time_limit_s, progress))
    if not isinstance(model, str | Path):
        return found
    return replace(
        found, model=str(model), batch=wanted.get("batch"), sequence=wanted.get("sequence")
    )


def _profiled(model: object) -> OperatorGraph | None:
    """The graph, where it is one of measured operators."""
    if isinstance(model, str | Path) and is_profiled_file(model):
        return load_profiled_graph(model)
    if isinstance(model, OperatorGraph) and is_profiled(model):
        return model
    return None


STAGES = "stages"
"""The searcher of profiled graphs."""


@_as_user_errors(unpriced_only=True)
def plan_profiled(
    graph: OperatorGraph,
    name: str = "",
    searcher: str | Searcher = SEARCHER,
    *,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
    **wanted: Unpack[Wanted],
) -> Plan:
    """``plan`` of measured operators; ``name``: their file.

    Raises:
        InfeasibleError, OutOfTimeError, InterruptedSearchError: as ``plan``.
    """
    from autopar.searchers import over_stages
    from autopar.simulator import profiled_stages
    from autopar.simulator.bands import with_band
    from autopar.simulator.reserved import usual_limit_bytes
    from autopar.simulator.shares import seconds_of_measured
    from autopar.simulator.stage_problem import value_of
    from cost_models.saved import cost_model_to_json

    _check_names(wanted)
    _only_of_models(searcher, wanted)
    cost_model = machine(wanted.get("topology", LOCAL), wanted.get("devices"), progress)
    topology = cost_model_to_json(cost_model)
    limit = wanted.get("memory_limit_bytes")
    limit = usual_limit_bytes(cost_model) if limit is None else limit
    training = Training(wanted.get("optimizer", "adamw"))
    objective = wanted.get("objective", "step")
    problem = profiled_stages.stage_problem(
        graph,
        cost_model,
        device_kind(topology),
        limit,
        training,
        objective,
        _microbatches_of(graph, wanted.get("microbatches")),
    )
    budget = USUAL if time_limit_s is None else Budget(time_limit_s, USUAL.gap)
    _check_measured(problem, device_kind(topology))
    result = over_stages.search(problem, budget, progress or _silent)
    if result.best is None:
        raise _no_stages(graph, result, limit)
    units = problem.units(result.best.microbatches)
    value = value_of(problem, result.best, units)
    assert value is not None
    estimate = profiled_stages.estimate_of(value.timeline, objective)
    return Plan(
        graph=graph,
        topology=topology,
        strategy=profiled_stages.strategy_of(graph, problem, result.best, training),
        estimate=with_band(estimate, seconds_of_measured(cost_model, estimate), cost_model),
        search=over_stages.summarise(result, STAGES, limit),
        model=name,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        autopar=__version__,
        objective=objective,
    )


def _check_names(wanted: Wanted) -> None:
    for name in wanted.keys() - Wanted.__annotations__.keys():
        raise AutoparError(unknown(name, Wanted.__annotations__, "argument"))


def device_kind(topology: Mapping[str, Any]) -> str:
    """The name of a machine's device, "" if it has none."""
    found = topology.get("analytical", {}).get("device", {}).get("name", "")
    return str(found)


def _only_of_models(searcher: str | Searcher, wanted: Wanted) -> None:
    given: dict[str, Any] = {"searcher": None if searcher == SEARCHER else searcher}
    for key in ("mesh", "clip_norm", "loss", "batch", "sequence"):
        given[key] = wanted.get(key)
    given["propose"] = wanted.get("propose") or None
    given["precision"] = None if wanted.get("precision", "full") == "full" else "mixed"
    given["dimensions"] = None if wanted.get("dimensions", "SOAP") == "SOAP" else "some"
    for key, value in given.items():
        if value is not None:
            raise AutoparError(
                f"{key} is for models that are traced, and this is a profiled graph, which is "
                "planned from its measurements; leave it out"
            )


def _microbatches_of(graph: OperatorGraph, wanted: int | None) -> int | None:
    from autopar.ir.profiled_graph import global_batch

    batch = global_batch(graph)
    if wanted is not None and batch % wanted:
        near = max(m for m in range(1, wanted) if batch % m == 0)
        raise AutoparError(
            f"a global batch of {batch} samples cannot be worked on in {wanted} equal "
            f"microbatches; {near} would work"
        )
    return wanted


def _check_measured(problem: StageProblem, device: str) -> None:
    for unit in problem.units(problem.microbatches[0]):
        if not unit.alternatives:
            raise AutoparError(
                f"{unit.name} has no measurement for {problem.devices} "
                f"device{'s' * (problem.devices > 1)} of kind {device!r}; measure it there, or "
                "plan for another machine"
            )


def _ended_early(result: SearchResult | StageResult, give: str) -> AutoparError | None:
    """Why nothing was found, where the search did not end by itself; ``give``: what would leave
    less to search."""
    if result.stop_reason == "interrupted":
        return InterruptedSearchError("interrupted before any strategy was found")
    if result.stop_reason == "time":
        return OutOfTimeError(
            f"the search ended after {result.search_time_s:.1f} s, before it found any "
            f"strategy; allow more time, or give {give}"
        )
    return None


def _no_stages(graph: OperatorGraph, result: StageResult, limit_bytes: int) -> AutoparError:
    from autopar.exporters.units import bytes_text

    limit = bytes_text(limit_bytes)
    if early := _ended_early(result, "the number of microbatches"):
        return early
    proved = result.stop_reason == "infeasible"
    what = "nothing fits" if proved else "nothing was found that fits, nor proved that nothing does"
    return InfeasibleError(
        f"{what}: for {graph.name} the limit is {limit} on a device; allow more devices, measure "
        'with tensor parallelism, allow recomputation ("recompute": true), or take another '
        "optimizer"
    )


def problem_of(
    model: str | Path | nn.Module | OperatorGraph,
    inputs: Any = None,
    *,
    progress: Progress | None = None,
    **wanted: Unpack[Wanted],
) -> Problem:
    """What ``search`` and ``plan`` search: the model's graph, the machine and what is fixed."""
    from autopar.simulator import meshes
    from autopar.simulator.reserved import usual_limit_bytes

    _check_names(wanted)
    if _profiled(model) is not None:
        raise AutoparError(
            "a profiled graph is searched in stages, not mesh by mesh: plan it (autopar plan)"
        )
    if wanted.get("objective", "step") != "step":
        raise AutoparError(
            "the objective throughput is for profiled graphs so far; models that are traced are "
            "planned for the time of a step"
        )
    precision = wanted.get("precision", "full")
    cost_model = machine(wanted.get("topology", LOCAL), wanted.get("devices"), progress)
    mesh = wanted.get("mesh")
    if mesh is None:
        tried = meshes.factorizations(cost_model.devices)
    else:
        given = mesh if isinstance(mesh, Mesh) else meshes.mesh(tuple(mesh))
        tried = (meshes.check_mesh(given, cost_model.devices),)
    graph = extract(
        model,
        inputs,
        loss=wanted.get("loss"),
        precision=precision,
        batch=wanted.get("batch"),
        sequence=wanted.get("sequence"),
        progress=progress,
    )
    limit = wanted.get("memory_limit_bytes")
    proposals: Proposals = ()
    if wanted.get("propose"):
        if isinstance(model, str | Path):
            _know_ops(graph, str(model), wanted.get("batch"), wanted.get("sequence"))
        proposals = proposals_for(graph, progress)
    return Problem(
        graph=graph,
        cost_model=cost_model,
        meshes=tried,
        memory_limit_bytes=usual_limit_bytes(cost_model) if limit is None else limit,
        training=Training(wanted.get("optimizer", "adamw"), precision, wanted.get("clip_norm")),
        microbatches=wanted.get("microbatches"),
        dimensions=_dimensions(wanted.get("dimensions", "SOAP")),
        proposals=proposals,
        recompute=_recompute(wanted.get("recompute", "none")),
    )


def _know_ops(graph: OperatorGraph, model: str, batch: int | None, sequence: int | None) -> None:
    from autopar.extractor import know_ops

    know_ops(graph, model, batch, sequence)


def _recompute(kind: str) -> str:
    from autopar.searchers.recompute import RECOMPUTE

    return pick({name: name for name in RECOMPUTE}, kind, "way to recompute")


def proposals_for(graph: OperatorGraph, progress: Progress | None = None) -> Proposals:
    """Rules, found by trying and then checked like all others, for the calls that have none."""
    from autopar.runtime.discovery import rules_with_proposals

    _tell(progress, "trying how ops without a rule can be split")
    _, proposals = rules_with_proposals(graph)
    return proposals


def _dimensions(letters: str) -> str:
    if not letters or set(letters) - set("SOAP"):
        raise AutoparError(
            f"dimensions are letters of SOAP (Sample, Operator, Attribute, Parameter), got "
            f"{letters!r}; give for example S, SP or SOAP"
        )
    return letters


def machine(
    topology: str | Path | CostModel, devices: int | None = None, progress: Progress | None = None
) -> CostModel:
    """The cost model of a machine: named, described in a file, or this one."""
    if not isinstance(topology, str | Path):
        return topology
    if topology != LOCAL:
        from cost_models import cost_model

        with _as_user_errors():
            return cost_model(topology, devices)
    from autopar.runtime import profiler

    return profiler.local_cost_model(
        _local_devices(devices), report=lambda line: _tell(progress, line)
    )


def _local_devices(devices: int | None) -> int:
    from autopar.runtime import profiler

    return profiler.local_devices() if devices is None else devices


USUAL = Budget(time_s=300.0, gap=1e-3, proof_s=2.0)
"""When a search ends unless it is told otherwise: predictions are not as good as a gap of 0.1%, and
to halve the last percent takes longer than to find the plan."""


@_as_user_errors(unpriced_only=True)
def run_search(
    problem: Problem,
    searcher: str | Searcher = SEARCHER,
    time_limit_s: float | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    from autopar.searchers import SEARCHERS

    found = pick(SEARCHERS, searcher, "searcher") if isinstance(searcher, str) else searcher
    tried = f"{len(problem.meshes)} meshes" if len(problem.meshes) > 1 else "the mesh"
    _tell(progress, f"searching {tried} of {problem.cost_model.devices} devices")
    budget = USUAL if time_limit_s is None else Budget(time_limit_s, USUAL.gap)
    with no_garbage():
        return found(problem, budget, progress=progress or _silent)


@contextmanager
def no_garbage() -> Iterator[None]:
    """A search leaves no cycles of objects behind. Looking for them among all of torch's objects
    takes a tenth of its time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def plan_of(problem: Problem, result: SearchResult) -> Plan:
    """The best of ``result`` as a plan.

    Raises:
        InfeasibleError, OutOfTimeError, InterruptedSearchError: there is none.
    """
    best = result.best
    if best is None or best.strategy is None or best.estimate is None:
        raise _nothing_found(problem, result)
    from autopar.simulator.bands import ties
    from cost_models.saved import cost_model_to_json

    band_of = _bands_of(problem)
    fitting = [t for t in result.trials if t.estimate and _fits(t.estimate, problem)]
    search = summarise(result, problem.memory_limit_bytes, problem.dimensions)
    return Plan(
        graph=problem.graph,
        topology=cost_model_to_json(problem.cost_model),
        strategy=best.strategy,
        estimate=band_of(best),
        search=replace(search, ties=ties(best, fitting, band_of)),
        proposed=problem.proposals,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        autopar=__version__,
    )


def _fits(estimate: Estimate, problem: Problem) -> bool:
    return estimate.peak_memory_bytes <= problem.memory_limit_bytes


def _bands_of(problem: Problem) -> Callable[[Trial], Estimate]:
    """Of a trial that has a strategy, the estimate with its band."""
    from autopar.simulator.bands import banded
    from autopar.simulator.microbatches import division

    divided: dict[int, Division] = {}

    def band_of(trial: Trial) -> Estimate:
        strategy, estimate = trial.strategy, trial.estimate
        assert strategy is not None and estimate is not None
        count = strategy.microbatches
        if count not in divided:
            divided[count] = division(problem.graph, count, problem.proposals)
        of = divided[count]
        return banded(of.graph, of.rules, problem.cost_model, strategy, estimate)

    return band_of


def plan_by_hand(
    graph: OperatorGraph,
    strategy: Strategy,
    topology: str | Path | CostModel = LOCAL,
    *,
    model: str = "",
    proposals: Proposals = (),
) -> Plan:
    """The plan of a strategy that was written, not searched: its price and its promise.

    Of one stage or several; ``autopar.simulator.staged`` helps to write these. ``model``: the name
    that ``graph`` was extracted from, for the commands that need it.
    """
    from autopar.simulator.microbatches import division
    from autopar.simulator.reserved import usual_limit_bytes
    from cost_models.saved import cost_model_to_json

    cost_model = machine(topology, strategy.devices if topology == LOCAL else None)
    limit = usual_limit_bytes(cost_model)
    divided = division(graph, strategy.microbatches, proposals)
    nobody = SearchSummary("by hand", "", 0.0, 1.0, 0.0, limit, "SOAP", trials=())
    return Plan(
        graph=graph,
        topology=cost_model_to_json(cost_model),
        strategy=strategy,
        estimate=_priced(divided, cost_model, strategy),
        search=nobody,
        model=model,
        proposed=proposals,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        autopar=__version__,
    )


def _recipe(
    given: str | Degrees, wanted: Wanted, progress: Progress | None
) -> RestrictedSearch | Degrees:
    """A recipe by name or by degrees, with what options say that it says, too; checked before the
    model is looked at."""
    from autopar.recipes import PUBLISHED, RECIPES

    if isinstance(given, str) and given in RECIPES:
        return RECIPES[given]
    degrees = _degrees(given) if isinstance(given, str) else given
    if wanted.get("mesh") is not None:
        raise AutoparError("a recipe of degrees has its own mesh; leave --mesh out")
    if wanted.get("microbatches") is not None and degrees.microbatch is not None:
        raise AutoparError(
            f"the recipe has microbatches of {degrees.microbatch} samples in each replica; change "
            "that number (microbatch=...) or leave --microbatches out"
        )
    name = given.partition(",")[0] if isinstance(given, str) else ""
    cost_model = machine(wanted.get("topology", LOCAL), wanted.get("devices"), progress)
    if degrees.devices != cost_model.devices:
        published = f" --topology {PUBLISHED[name].topology}" if name in PUBLISHED else ""
        raise AutoparError(
            f"the recipe {given} is for {degrees.devices} devices, and the machine has "
            f"{cost_model.devices}; give {'it' if published else 'a machine with as many'}"
            f"{published}, or other degrees"
        )
    recompute = wanted.get("recompute", "none")
    return degrees if recompute == "none" else replace(degrees, recompute=recompute)


def _degrees(text: str) -> Degrees:
    """A published configuration, with what the rest of the text changes, or degrees."""
    from autopar.recipes import PUBLISHED, RECIPES, degrees_from_text

    name, _, changes = text.partition(",")
    if "=" in name:
        return degrees_from_text(text)
    if name in RECIPES:
        raise AutoparError(
            f"{text!r}: the recipe {name} has no degrees that could be changed; give all of them"
        )
    if name not in PUBLISHED:
        known = unknown(name, [*PUBLISHED, *RECIPES], "recipe")
        raise AutoparError(f"{known}; or give degrees, for example tensor=8,pipeline=4,data=2")
    return degrees_from_text(changes, PUBLISHED[name].degrees)


def _by_recipe(
    problem: Problem,
    given: str | Degrees,
    recipe: RestrictedSearch | Degrees,
    microbatches: int | None,
    progress: Progress | None,
) -> Plan:
    """
    Raises:
        InfeasibleError: it needs more memory than there is.
    """
    from autopar.exporters.units import bytes_text
    from autopar.recipes import Degrees, degrees_text
    from autopar.searchers import one_recipe

    name = given if isinstance(given, str) else degrees_text(given)
    _tell(progress, f"pricing the recipe {name}")
    with no_garbage(), _as_user_errors():  # such as a dtype that the machine has no speed of
        if isinstance(recipe, Degrees):
            strategy = _of_degrees(problem, recipe, microbatches)
        else:
            strategy = one_recipe.within(recipe, problem, USUAL, progress or _silent)
        found = plan_by_hand(
            problem.graph, strategy, problem.cost_model, proposals=problem.proposals
        )
    limit, peak = problem.memory_limit_bytes, found.estimate.peak_memory_bytes
    if peak > limit:
        raise InfeasibleError(
            f"the recipe {name} needs {bytes_text(peak)} on a device "
            f"(at {found.estimate.memory.at}), the limit is {bytes_text(limit)}; change its "
            "degrees or what it recomputes, or see it all the same with "
            f"--memory-limit {-(-peak // 10**9)}GB"
        )
    search = replace(found.search, searcher=f"recipe {name}", memory_limit_bytes=limit)
    return replace(found, search=search)


def _of_degrees(problem: Problem, degrees: Degrees, microbatches: int | None) -> Strategy:
    from autopar.recipes import by_degrees
    from autopar.simulator.microbatches import batch_size, division

    count = microbatches
    if count is None:
        count = degrees.microbatches(batch_size(problem.graph, problem.proposals))
    divided = division(problem.graph, count, problem.proposals)
    return by_degrees(divided, degrees, problem.cost_model, problem.training)


@_as_user_errors(unpriced_only=True)
def _priced(divided: Division, cost_model: CostModel, strategy: Strategy) -> Estimate:
    from autopar.simulator.bands import banded
    from autopar.simulator.pipelines import evaluate_stages
    from autopar.simulator.prices import evaluate

    graph, rules = divided.graph, divided.rules
    if len(strategy.stages) > 1:
        estimate = evaluate_stages(divided, cost_model, strategy)
    else:
        estimate = evaluate(graph, rules, cost_model, strategy)
    return banded(graph, rules, cost_model, strategy, estimate)


def _nothing_found(problem: Problem, result: SearchResult) -> AutoparError:
    from autopar.exporters.units import bytes_text

    limit = bytes_text(problem.memory_limit_bytes)
    if early := _ended_early(result, "the mesh"):
        return early
    devices, least = problem.cost_model.devices, result.least_bytes
    needs = ""
    if least is not None:
        perfect = bytes_text(least)
        needs += f"split perfectly over {devices} devices it needs at least {perfect}; "
    if result.nearest_miss_bytes is not None:
        met = bytes_text(result.nearest_miss_bytes)
        needs += f"the smallest strategy that was found needs {met}; "
    dimensions = "" if set(problem.dimensions) >= set("SAP") else "dimensions, "
    proved = result.stop_reason == "infeasible"
    what = "nothing fits" if proved else "nothing was found that fits, nor proved that nothing does"
    return InfeasibleError(
        f"{what}: for {problem.graph.name} the limit is {limit} on a device; {needs}"
        f"allow more devices, {dimensions}a smaller batch, another optimizer or mixed precision"
        f"{_in_microbatches(problem)}"
    )


def _in_microbatches(problem: Problem) -> str:
    """Whether more microbatches would help, or why there are none."""
    from autopar.simulator.microbatches import batch_size, division

    if problem.microbatches is not None:
        return "; or let autopar choose the number of microbatches"
    size = batch_size(problem.graph, problem.proposals)
    if size == 1:
        return ""
    try:
        divided = division(problem.graph, size, problem.proposals)
    except AutoparError as error:
        return f". {error}"
    return f" ({divided.count} microbatches of one sample do not fit either)"


def simulate(
    plan: Plan, topology: str | Path | CostModel | None = None, devices: int | None = None
) -> Estimate:
    """The plan's strategy priced again: on the machine it was made for, or on another one that
    has as many devices.

    Raises:
        PlanMismatchError: the other machine has fewer or more devices than the plan.
    """
    if is_profiled(plan.graph):
        return _estimate_profiled(plan, topology, devices)
    if topology == LOCAL and devices is None:
        devices = plan.world_size
    cost_model = _machine_of(plan, topology, devices)
    if cost_model.devices != plan.world_size:
        raise PlanMismatchError(
            f"the plan is for {plan.world_size} devices, {_named(topology)} has "
            f"{cost_model.devices}; "
            "simulate it on as many, or plan again"
        )
    return _priced(division_of(plan), cost_model, plan.strategy)


def timeline_of_plan(
    plan: Plan, topology: str | Path | CostModel | None = None, devices: int | None = None
) -> Timeline:
    """A plan of a profiled graph, played: on its machine, or on another one."""
    from autopar.simulator import profiled_stages
    from autopar.simulator.stage_problem import played
    from cost_models.saved import cost_model_to_json

    cost_model = _machine_of(plan, topology, devices)
    problem = profiled_stages.stage_problem(
        plan.graph,
        cost_model,
        device_kind(cost_model_to_json(cost_model)),
        plan.search.memory_limit_bytes,
        plan.strategy.training,
        plan.objective,
        plan.strategy.microbatches,
    )
    units = problem.units(plan.strategy.microbatches)
    staging = profiled_stages.staging_of(plan.strategy, units)
    timeline = played(problem, staging, units)
    if timeline is None:
        raise PlanMismatchError(
            f"the plan needs {plan.world_size} devices, and this machine has {cost_model.devices}; "
            "simulate it on as many, or plan again"
        )
    return timeline


def _named(topology: str | Path | CostModel | None) -> str:
    return str(topology) if isinstance(topology, str | Path) else "the machine"


def _machine_of(
    plan: Plan, topology: str | Path | CostModel | None, devices: int | None
) -> CostModel:
    """Its own, unless another one is given."""
    from cost_models.saved import cost_model_from_json

    if topology is not None:
        return machine(topology, devices)
    with _as_user_errors():
        return cost_model_from_json(plan.topology)


@_as_user_errors(unpriced_only=True)
def _estimate_profiled(
    plan: Plan, topology: str | Path | CostModel | None, devices: int | None
) -> Estimate:
    from autopar.simulator import profiled_stages
    from autopar.simulator.bands import with_band
    from autopar.simulator.shares import seconds_of_measured

    cost_model = _machine_of(plan, topology, devices)
    timeline = timeline_of_plan(plan, cost_model)
    estimate = profiled_stages.estimate_of(timeline, plan.objective)
    return with_band(estimate, seconds_of_measured(cost_model, estimate), cost_model)


def refuse_profiled(plan: Plan, what: str) -> None:
    """Raises ``AutoparError`` where ``what`` needs a model, and the plan has only measurements."""
    if is_profiled(plan.graph):
        raise AutoparError(
            f"this plan cannot be {what}: it was made from a profiled graph, which has "
            "measurements and no code; autopar explain, simulate and export show it"
        )


def timeline_of(
    schedule: str,
    devices: int,
    microbatches: int,
    chunks: int | None = None,
    times: tuple[Fraction, Fraction, Fraction] = (Fraction(1), Fraction(1), Fraction(1)),
) -> Timeline:
    """A schedule on equal stages, without communication: as papers draw it.

    ``devices``: each stands for a group that holds ``chunks`` stages (default: the schedule's).
    ``times``: of a stage's forward, the gradient of its inputs and that of its weights.
    """
    from autopar.schedules import SCHEDULES
    from autopar.simulator.pipeline import equal_stages
    from autopar.simulator.timeline import simulate

    member = pick(SCHEDULES, schedule, "schedule")
    stages = member.stages(devices, chunks)
    rows = member(stages, microbatches, chunks)
    return simulate(rows, equal_stages(stages, *times))


def explain(plan: Plan) -> str:
    """Block by block, what is split how, what each redistribution costs, and the memory."""
    from autopar.exporters import stages, text

    if is_profiled(plan.graph):
        return stages.explain(plan, timeline_of_plan(plan))
    return text.explain(plan, rules_of(plan))


def diff(a: Plan, b: Plan) -> PlanDiff:
    """What ``b`` decides otherwise than ``a``."""
    from autopar.simulator.bands import difference

    found = diff_plans(a, b)
    comparable = found.same_model and a.topology == b.topology
    if not comparable or a.estimate.band is None or b.estimate.band is None:
        return found
    return replace(found, within=math.exp(difference(a.estimate, b.estimate)))


def export(plan: Plan, exporter: str | Exporter) -> str:
    """The plan in another form; the names are those of ``autopar list exporters``."""
    from autopar.exporters import EXPORTERS, STAGE_EXPORTERS

    if is_profiled(plan.graph):
        if not isinstance(exporter, str):
            raise AutoparError("an exporter of your own needs a plan of a model that was traced")
        drawn = pick(STAGE_EXPORTERS, exporter, "exporter of plans of profiled graphs")
        return drawn(plan, timeline_of_plan(plan))
    found = pick(EXPORTERS, exporter, "exporter") if isinstance(exporter, str) else exporter
    return found(plan, rules_of(plan))


def rules_of(plan: Plan) -> Rules:
    """The bound rule of each operator of the plan, for the graph of one microbatch."""
    return division_of(plan).rules


def division_of(plan: Plan) -> Division:
    """The plan's graph, that of one microbatch, and the rules of both.

    Raises:
        PlanMismatchError: a split of the plan is not one that these rules offer.
    """
    from autopar.simulator.microbatches import division

    divided = division(plan.graph, plan.strategy.microbatches, plan.proposed)
    rules = divided.rules
    for name, split in plan.strategy.splits.items():
        mesh, offered = plan.strategy.mesh_of[name], rules[name].choices
        single = {factor for factor, size in rules[name].sizes.items() if size == 1}
        unknown = set(split) - set(offered) - single
        if not unknown and (set(split) & single or not rules[name].divides(split, mesh)):
            raise PlanMismatchError(
                f"the plan splits {name} by {', '.join(split)} over a mesh of "
                f"{' x '.join(map(str, mesh.sizes))} devices, and in {plan.strategy.microbatches} "
                f"microbatches it has {_sizes_text(rules[name].limits, split)} of these to divide; "
                "give it fewer devices, fewer microbatches or a larger batch"
            )
        whole = unknown & set(rules[name].sizes)
        if whole:
            raise PlanMismatchError(
                f"the plan divides {', '.join(sorted(whole))} of {name}, for which there is no "
                "implementation here (queries of causal attention need to know where they begin); "
                "such a plan can be explained and simulated, not run or verified: plan without "
                "context parallelism"
            )
        if unknown:
            raise PlanMismatchError(
                f"the plan splits {name} by {', '.join(split)}, which the rule of "
                f"{plan.graph.operator[name].op} does not offer (it has "
                f"{', '.join(rules[name].choices)}): the plan or autopar has changed; plan again"
            )
    return divided


def _sizes_text(sizes: Mapping[str, int], split: Iterable[str]) -> str:
    """
    >>> _sizes_text({"batch": 2, "out": 32}, ("batch", "nothing", "batch"))
    'batch 2'
    """
    return ", ".join(
        f"{factor} {sizes[factor]}" for factor in dict.fromkeys(split) if factor in sizes
    )


def verify(
    plan: Plan, *, rank: int | None = None, progress: Progress | None = None
) -> Report | StagesReport:
    """Dry-run one training step as one rank, in this process and without devices, and compare its
    collectives and its memory with what the plan promised (``report.ok``).

    ``rank``: by default 0, as all are alike; of a plan of several stages one of each that differ.
    """
    refuse_profiled(plan, "verified")
    divided = division_of(plan)  # says what is wrong with a split, if anything
    _know_ops(plan.graph, plan.model, plan.batch, plan.sequence)
    if len(plan.strategy.stages) > 1:
        from autopar.runtime.verify_stages import verify_stages

        assert plan.pipeline is not None  # or it says so
        return verify_stages(divided, plan.strategy, plan.estimate, rank=rank, progress=progress)
    from autopar.runtime import verify as dry_run

    _tell(progress, f"dry-running rank {rank or 0} of {plan.world_size}")
    return dry_run.verify(plan, rank=rank or 0)


def run(
    plan: Plan,
    model: str | Path | nn.Module | Callable[[], nn.Module] | None = None,
    *,
    seed: int = 0,
    timeout_s: float | None = None,
    **hyperparameters: Any,
) -> TrainingStep | PipelineStep:
    """The plan's training step on this process, one of those that torchrun started.

    ``loss = step(batch)`` trains on one *global* batch, which every process passes whole, as the
    model's ``forward`` takes it. ``model``: a name (default: that of the plan), a function that
    makes it, or the module itself, at the price of a whole copy in every process.
    ``timeout_s``: how long to wait for another process (default: 300, or as your own process group
    says). ``hyperparameters`` go to torch's optimizer (``lr=...``).

    Raises:
        PlanMismatchError: another number of processes, or another model, than the plan's.
        InfeasibleError: a device has less memory than the plan needs.
        PeerError: another process has ended, or did not answer in time; from the step, too.
    """
    from autopar.runtime.launch import run as join
    from autopar.runtime.room import check_promise

    refuse_profiled(plan, "run")
    division_of(plan)  # says what is wrong with a split, if anything
    check_promise(plan.estimate.peak_memory_bytes)
    if model is not None and not isinstance(model, str | Path):
        return join(plan, model, seed=seed, timeout_s=timeout_s, **hyperparameters)
    build = source_of(plan, model)
    return join(plan, lambda: build()[0], seed=seed, timeout_s=timeout_s, **hyperparameters)


def check_processes(plan: Plan) -> None:
    """Raises ``PlanMismatchError`` unless this machine can be all devices of the plan, and
    ``InfeasibleError`` if it has not the memory."""
    from autopar.runtime import launch, room

    measured = "profiled" in plan.topology
    launch.check_processes(plan.world_size, str(plan.topology.get("name")), measured_here=measured)
    room.check_promise(plan.estimate.peak_memory_bytes, plan.world_size)


def rehearse(
    plan: Plan,
    plan_path: str | Path,
    model: str,
    steps: int = 10,
    seed: int = 0,
    *,
    timeout_s: float | None = None,
) -> Measurement:
    """Train for a few steps in as many processes of this machine as the plan has devices."""
    from autopar.runtime import rehearsal

    arguments = ["run", str(plan_path), model, "--steps", str(steps), "--seed", str(seed)]
    if timeout_s is not None:
        arguments += ["--timeout", str(timeout_s)]
    return rehearsal.start(plan, arguments)


def single_process(
    plan: Plan, model: str, steps: int = 10, seed: int = 0
) -> tuple[float, ...] | None:
    """The losses of the same steps in plain PyTorch; ``None`` when these depend on random masks,
    which torch draws otherwise than a plan's processes."""
    from autopar.runtime import rehearsal

    if rehearsal.draws_random_numbers(plan.graph):
        return None
    return rehearsal.single_process(plan, source_of(plan, model), steps, seed)


def source_of(plan: Plan, model: str | Path | None = None) -> Callable[[], Any]:
    """What builds the plan's model, batch and loss from a name (default: that of the plan)."""
    from autopar.extractor import load

    return load(named(plan, model), batch=plan.batch, sequence=plan.sequence).build


def named(plan: Plan, model: str | Path | None) -> str:
    found = plan.model if model is None else str(model)
    if not found:
        raise AutoparError("the plan was made for a module, not for a name: give the model as well")
    return found


def check_model(plan: Plan, model: str | Path, progress: Progress | None = None) -> None:
    """Raises ``PlanMismatchError`` unless the model is the one that was planned."""
    graph = extract(
        model,
        precision=plan.strategy.training.precision,
        batch=plan.batch,
        sequence=plan.sequence,
        progress=progress,
    )
    if graph.fingerprint != plan.graph.fingerprint:
        raise PlanMismatchError(
            f"{model} is not the model of this plan ({_difference(plan.graph, graph)}); "
            "plan it again, or give the model that was planned"
        )


def _difference(planned: OperatorGraph, found: OperatorGraph) -> str:
    """The first thing that differs, in words."""
    for name in planned.inputs:
        if name in found.by_name and found.spec(name) != planned.spec(name):
            a, b = planned.spec(name), found.spec(name)
            return f"its input {name} is {b.dtype}{list(b.shape)}, not {a.dtype}{list(a.shape)}"
    if planned.parameter_count != found.parameter_count:
        return f"it has {found.parameter_count} parameters, not {planned.parameter_count}"
    if len(planned.operators) != len(found.operators):
        return f"it has {len(found.operators)} operators, not {len(planned.operators)}"
    for a_operator, b_operator in zip(planned.operators, found.operators, strict=True):
        if a_operator != b_operator:
            return f"its operator {b_operator.name} differs"
    return "its tensors differ"


def profile(
    devices: int | None = None, *, seconds: float | None = None, progress: Progress | None = None
) -> CostModel:
    """Measure this machine anew and keep what was found for ``topology="local"``."""
    from autopar.runtime import profiler

    return profiler.local_cost_model(
        _local_devices(devices),
        seconds=profiler.MEASURE_S if seconds is None else seconds,
        refresh=True,
        report=lambda line: _tell(progress, line),
    )


def profile_cluster(
    *, seconds: float | None = None, progress: Progress | None = None
) -> CostModel | None:
    """On each process that torchrun started, on one host or several: measure all of them together.
    The cost model on the first, ``None`` on the others."""
    from autopar.runtime import profiler
    from cost_models.profiled import Profiled

    wanted = profiler.MEASURE_S if seconds is None else seconds
    found = profiler.profile_cluster(wanted, report=lambda line: _tell(progress, line))
    return None if found is None else Profiled(found)


def run_record(plan: Plan, plan_path: str | Path, found: Measurement) -> RunRecord:
    """What ``calibrate`` needs to know of steps that were just taken."""
    from autopar.runtime.profiler import here

    device, software = here(plan.world_size)
    return RunRecord(
        plan=str(Path(plan_path).resolve()),
        plan_digest=digest_of(plan),
        graph=plan.graph.name,
        machine=plan.topology,
        device=device,
        software=software,
        date=datetime.now(UTC).date().isoformat(),
        predicted_step_time_s=plan.estimate.step_time_s,
        predicted_peak_memory_bytes=plan.estimate.peak_memory_bytes,
        measurement=found,
    )


def calibrate(
    runs: Sequence[str | Path], *, profile: str | Path | None = None
) -> tuple[CostModel, tuple[Factor, ...]]:
    """Correct a profile by measured steps: the files that ``autopar run --json`` prints.

    ``profile``: which to correct (default: the one that the first run's plan was made with). The
    result has the corrections in it, and is a ``topology`` for plans; beside it the factor on the
    seconds of each part.

    Raises:
        AutoparError: the plans were not made with a profile, or one of another machine or software
            than the runs'.
    """
    from autopar.simulator.calibration import MeasuredStep, factors
    from cost_models.profiled import Correction, Profiled, corrected, read_profile

    if not runs:
        raise AutoparError("a calibration needs a run; give a file that `autopar run --json` made")
    records = [read_run(path) for path in runs]
    with _as_user_errors():
        given = None if profile is None else read_profile(Path(profile))
    found = _profile_of(records[0]) if given is None else given
    steps = []
    for record in records:
        _check_same_machine(record, found)
        steps.append(
            MeasuredStep(partial(_step_s, _plan_of_run(record)), record.step_time_s, record.spread)
        )
    known = factors(found, steps)
    told = Correction(
        of=found.digest,
        date=datetime.now(UTC).date().isoformat(),
        runs=tuple(
            (record.plan, step.price(found), step.seconds)
            for record, step in zip(records, steps, strict=True)
        ),
        factors=tuple((factor.part, factor.factor) for factor in known),
    )
    changed = corrected(found, dict(told.factors))
    return Profiled(replace(changed, corrections=(*found.corrections, told))), known


def _step_s(plan: Plan, profile: Profile) -> float:
    from cost_models.profiled import Profiled

    return simulate(plan, Profiled(profile)).step_time_s


def _profile_of(record: RunRecord) -> Profile:
    if "profiled" not in record.machine:
        raise AutoparError(
            f"the run of {record.plan} was planned for {record.machine.get('name')}, which is from "
            "data sheets; a calibration corrects a profile: give one with --profile, or plan with "
            "--topology local or a file of `autopar profile`"
        )
    return _profile_in(record.machine)


def _profile_in(machine: Mapping[str, Any]) -> Profile:
    from cost_models.profiled import profile_from_json

    with _as_user_errors():
        return profile_from_json(machine["profiled"])


def doubts(plan: Plan, *, running: bool = False) -> list[str]:
    """What of this machine is not as where the plan's profile was measured: software and, when it
    is ``running`` here, the device; in words. Nothing of plans without a profile."""
    if "profiled" not in plan.topology:
        return []
    profile = _profile_in(plan.topology)
    if running:
        from autopar.runtime.profiler import here

        differing = _differences(profile, *here(plan.world_size))
    else:
        installed = {"python": platform.python_version(), "torch": version("torch")}
        known = tuple((k, installed.get(k, v)) for k, v in profile.software)
        differing = _differences(profile, profile.device, known)
    return [
        f"the times of this plan are of a profile of {profile.date} with {difference}; they may "
        "not hold here: measure with `autopar profile`"
        for difference in differing
    ]


def _differences(profile: Profile, device: str, software: Iterable[tuple[str, str]]) -> list[str]:
    here = {"device": device, **dict(software)}
    there = {"device": profile.device, **dict(profile.software)}
    return [
        f"{what} {there[what]!r} instead of {here.get(what)!r}"
        for what in there
        if there[what] != here.get(what)
    ]


def _check_same_machine(record: RunRecord, profile: Profile) -> None:
    if record.machine.get("devices") != profile.devices:
        raise AutoparError(
            f"the run of {record.plan} was on {record.machine.get('devices')} devices, and the "
            f"profile of {profile.date} has {profile.devices}; give the profile of as many with "
            "--profile, or run a plan for it"
        )
    differences = _differences(profile, record.device, record.software)
    if differences:
        raise AutoparError(
            f"the run of {record.plan} was not on the machine of the profile of {profile.date}, "
            f"which has {'; '.join(differences)}; measure where it ran with `autopar profile`"
        )


def _plan_of_run(record: RunRecord) -> Plan:
    plan = load_plan(record.plan)
    if digest_of(plan) != record.plan_digest:
        raise PlanMismatchError(
            f"{record.plan} has changed since it was run; run it again, and calibrate from that run"
        )
    return plan


# Names


Member = TypeVar("Member")


def pick(table: Mapping[str, Member], name: str, what: str) -> Member:
    """``table[name]``, or an error that says what there is.

    >>> pick({"ilp": 1, "mcmc": 2}, "ipl", "searcher")
    Traceback (most recent call last):
      ...
    autopar.errors.AutoparError: no searcher is called 'ipl'; did you mean ilp? Known: ilp, mcmc
    """
    if name in table:
        return table[name]
    raise AutoparError(unknown(name, table, what))


def unknown(name: str, known: Iterable[str], what: str) -> str:
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"no {what} is called {name!r}; {hint}Known: {', '.join(names)}"


_DECIMAL = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BYTES = {
    **_DECIMAL,
    **{f"{letter}b": size for letter, size in _DECIMAL.items()},
    **{f"{letter}ib": 2 ** (10 * i) for i, letter in enumerate("kmgt", 1)},
}


def bytes_of(text: str) -> int:
    """
    >>> bytes_of("70GB"), bytes_of("1.5 GiB"), bytes_of("4096")
    (70000000000, 1610612736, 4096)
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*([A-Za-z]*)\s*", text)
    try:
        assert found is not None
        return int(float(found[1]) * _BYTES[found[2].lower()])
    except (AssertionError, KeyError, ValueError):
        raise AutoparError(
            f"{text!r} is not an amount of memory; write for example 70GB, 64GiB or 80000000000"
        ) from None


def _silent(_: str) -> None:
    """Who did not ask is not told."""


def _tell(progress: Progress | None, what: str) -> None:
    if progress is not None:
        progress(what)


__all__ = [
    "Progress",
    "Wanted",
    "calibrate",
    "diff",
    "explain",
    "export",
    "extract",
    "load_plan",
    "plan",
    "profile",
    "run",
    "save_plan",
    "search",
    "simulate",
    "verify",
]
