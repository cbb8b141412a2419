"""The command line: results to stdout, progress and errors to stderr, exit codes as documented."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from autopar import __version__
from autopar.errors import AutoparError

if TYPE_CHECKING:
    from autopar.ir.measurement import Measurement
    from autopar.ir.plan import Plan
    from autopar.ir.simulation import Estimate

Command = TypeVar("Command", bound=Callable[..., Any])

INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells give it."""

READER_GONE = 141
"""Exit code when the reader of stdout, e.g. `head`, ended first, as shells give it (SIGPIPE). Not 0
or 1: what `verify` found, for one, was not told."""

EXIT_CODES = """\b
Exit codes: 0 ok, 1 internal error, failed verification, or a run of which a
process ended or did not answer, 2 usage, 3 no plan fits, 4 model not
supported, 5 out of time, 130 interrupted, 141 nobody reads the output.
"""


def main(arguments: list[str] | None = None) -> None:
    """What the ``autopar`` command runs; always ends in ``SystemExit``."""
    given = sys.argv[1:] if arguments is None else arguments
    if arguments is None and not sys.warnoptions and "--traceback" not in given:
        # what torch and transformers say to their developers
        warnings.simplefilter("ignore")
        logging.disable(logging.CRITICAL)
    try:
        code = _run(given)
    except (BrokenPipeError, _ReaderGoneError):
        # what is still buffered has no reader either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = READER_GONE
    sys.exit(code)


def _run(arguments: list[str]) -> int:
    """Run the command; what goes wrong is said on stderr. Returns the exit code."""
    try:
        result = commands.main(arguments, prog_name="autopar", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("autopar: interrupted", err=True)
        return INTERRUPTED
    except AutoparError as error:
        click.echo(f"autopar: {error}", err=True)
        return error.exit_code
    except (BrokenPipeError, _ReaderGoneError):
        raise
    except Exception as error:
        click.echo(f"autopar: internal error: {type(error).__name__}: {error}", err=True)
        if "--traceback" in arguments:
            traceback.print_exc()
        else:
            click.echo("autopar: `autopar --traceback ...` shows where; please report it", err=True)
        return 1
    return result if isinstance(result, int) else 0


class _ReaderGoneError(Exception):
    """Nobody reads stdout any more."""


class _Commands(click.Group):
    """Lists commands as they stand in this file, not by the alphabet. A closed pipe is an error of
    its own: click would end with code 1, which has other meanings here."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def make_context(self, *arguments: Any, **options: Any) -> click.Context:
        try:
            return super().make_context(*arguments, **options)
        except BrokenPipeError as error:
            raise _ReaderGoneError from error

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _ReaderGoneError from error


HELP = {"help_option_names": ["-h", "--help"]}


@click.group(cls=_Commands, epilog=EXIT_CODES, context_settings=HELP)
@click.option("--traceback", is_flag=True, help="Show the traceback of an internal error.")
@click.version_option(__version__, prog_name="autopar")
def commands(traceback: bool) -> None:
    """Find the fastest way to train a PyTorch model on a cluster, and run it.

    MODEL is a path to model.py (with functions model() and inputs(), optionally
    loss(outputs, inputs)), package.module:callable, or hf:NAME_OR_PATH.
    """


# Options that several commands have

AT_LEAST_1 = click.IntRange(min=1)
ABOVE_0 = click.FloatRange(min=0, min_open=True)

_model_options = (
    click.argument("model"),
    click.option(
        "--precision",
        type=click.Choice(["full", "mixed"]),
        default="full",
        show_default=True,
        help="As the model is, or bf16 with an fp32 master copy.",
    ),
    click.option("--batch", type=AT_LEAST_1, help="Global batch of an hf: model."),
    click.option("--sequence", type=AT_LEAST_1, help="Tokens of a sample of an hf: model."),
)

_search_options = (
    click.option(
        "--topology",
        default="local",
        show_default=True,
        help="A machine (`autopar list topologies`), NODESxDEVICESxMACHINE, a TOML file, or "
        "local: this machine, measured once.",
    ),
    click.option(
        "--devices",
        type=AT_LEAST_1,
        help="How many of this machine.  [default: its GPUs, else cores]",
    ),
    click.option("--mesh", help="Sizes of the mesh axes, e.g. 32,8.  [default: try all]"),
    click.option(
        "--memory-limit",
        help="For the tensors of each device, e.g. 70GB.  [default: what the process leaves]",
    ),
    click.option(
        "--optimizer",
        type=click.Choice(["sgd", "momentum", "adam", "adamw"]),
        default="adamw",
        show_default=True,
        help="What the model is trained with.",
    ),
    click.option("--clip-norm", type=ABOVE_0, help="Clip gradients to this global norm."),
    click.option(
        "--microbatches",
        default="auto",
        show_default=True,
        help="Work on the batch in so many parts, one after the other, with the same result; auto: "
        "those with which it is fastest.",
    ),
    click.option(
        "--recompute",
        type=click.Choice(["none", "attention", "selective", "full", "auto"]),
        default="none",
        show_default=True,
        help="Of repeated blocks, what is not kept for the backward but made again: in all of them "
        "the products of attention and what is between (attention), what is cheap (selective) or "
        "all but their result (full); auto: what is fastest within memory.",
    ),
    click.option(
        "--searcher", default="hybrid", show_default=True, help="`autopar list searchers`."
    ),
    click.option(
        "--time-limit",
        type=ABOVE_0,
        help="Seconds to search. Without it at most 300, of which 2, or half as long as it took "
        "to look at everything once, to prove how good the plan is.",
    ),
    click.option(
        "--dimensions",
        default="SOAP",
        show_default=True,
        help="What may be split: Sample, Operator, Attribute, Parameter.",
    ),
    click.option("--propose", is_flag=True, help="Find rules by trying for ops that have none."),
    click.option(
        "--objective",
        type=click.Choice(["step", "throughput"]),
        default="step",
        show_default=True,
        help="Of a profiled graph: the time of a step, or the busiest device or link in one.",
    ),
)

_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def _with(*options: Callable[[Any], Any]) -> Callable[[Command], Command]:
    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _wanted(options: dict[str, Any]) -> dict[str, Any]:
    """The command line's options as ``api.plan`` names them."""
    from autopar import api

    limit = options["memory_limit"]
    wanted = {
        key: options[key]
        for key in (
            "topology",
            "devices",
            "optimizer",
            "precision",
            "clip_norm",
            "searcher",
            "recompute",
            "dimensions",
            "propose",
            "batch",
            "sequence",
            "objective",
        )
    }
    return {
        **wanted,
        "time_limit_s": options["time_limit"],
        "microbatches": _microbatches(options["microbatches"]),
        "mesh": None if options["mesh"] is None else _sizes(options["mesh"]),
        "memory_limit_bytes": None if limit is None else api.bytes_of(limit),
    }


def _microbatches(text: str) -> int | None:
    if text == "auto":
        return None
    if text.isdigit() and int(text) > 0:
        return int(text)
    raise AutoparError(f"{text!r} is no number of microbatches; write for example 4, or auto")


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        raise AutoparError(f"{text!r} is not a mesh; write its sizes, for example 32,8") from None


# Commands, in the order in which a person meets them


@commands.command("extract")
@_with(*_model_options)
@click.option("-o", "--output", type=Path, help="Write the graph as JSON.")
@_json_option
def extract_command(
    model: str,
    precision: Any,
    batch: int | None,
    sequence: int | None,
    output: Path | None,
    as_json: bool,
) -> None:
    """Trace MODEL and show its operators."""
    from autopar import api
    from autopar.ir.graph import graph_to_json
    from autopar.ir.plan import check_writable, write_atomically

    if output is not None:
        check_writable(output)
    with progress() as tell:
        graph = api.extract(
            model, precision=precision, batch=batch, sequence=sequence, progress=tell
        )
    if output is not None:
        write_atomically(output, json.dumps(graph_to_json(graph)) + "\n")
    if as_json:
        click.echo(json.dumps(graph_to_json(graph)))
        return
    from autopar.exporters import text

    click.echo(text.graph(graph))


@commands.command("plan")
@_with(*_model_options, *_search_options)
@click.option(
    "--recipe",
    help="Plan this instead of searching: a name (`autopar list recipes`), or degrees such as "
    "tensor=8,pipeline=4,data=2,microbatch=1 (docs/recipes.md).",
)
@click.option("-o", "--output", type=Path, help="Write the plan to this file.")
@click.option("--top", type=AT_LEAST_1, default=5, show_default=True, help="Meshes to show.")
@_json_option
def plan_command(
    model: str,
    recipe: str | None,
    output: Path | None,
    top: int,
    as_json: bool,
    **options: Any,
) -> int:
    """Find the fastest strategy for MODEL that fits in memory.

    MODEL: a path to model.py, package.module:callable, or hf:NAME_OR_PATH; or GRAPH.json, operators
    with measured times, which are planned in stages (docs/profiled_graphs.md).

    Ctrl-C ends the search: the best so far is printed and written, with exit code 130.
    """
    from autopar import api
    from autopar.exporters import json as json_exporter
    from autopar.exporters import stages, text
    from autopar.ir.plan import check_writable
    from autopar.ir.profiled_graph import is_profiled

    if output is not None:
        check_writable(output)
    with progress() as tell:
        found = api.plan(model, recipe=recipe, progress=tell, **_wanted(options))
    _say_doubts(api.doubts(found))
    if output is not None:
        api.save_plan(found, output)
    profiled = is_profiled(found.graph)
    if as_json:
        summary = stages.summarised(found) if profiled else json_exporter.summary(found)
        click.echo(json.dumps(summary))
        return _code(found.search.stop_reason)
    click.echo(stages.summary(found) if profiled else text.summary(found, top))
    if output is not None:
        click.echo(f"\nwritten to {output}; `autopar explain {output}` says what it does and why")
    return _code(found.search.stop_reason)


def _code(stop_reason: str) -> int:
    return INTERRUPTED if stop_reason == "interrupted" else 0


@commands.command("search")
@_with(*_model_options, *_search_options)
@_json_option
def search_command(model: str, as_json: bool, **options: Any) -> int:
    """Like plan, but print every mesh that was tried."""
    from autopar import api
    from autopar.exporters import text
    from autopar.ir.plan import search_to_json, summarise

    with progress() as tell:
        wanted = _wanted(options)
        searcher, limit_s = wanted.pop("searcher"), wanted.pop("time_limit_s")
        problem = api.problem_of(model, progress=tell, **wanted)
        result = api.run_search(problem, searcher, limit_s, tell)
    if result.best is None:
        summary = summarise(result, problem.memory_limit_bytes, problem.dimensions)
        click.echo(json.dumps(search_to_json(summary)) if as_json else text.search(summary))
        api.plan_of(problem, result)  # raises what the exit code tells
    best = api.plan_of(problem, result)
    if as_json:
        band = best.estimate.band and asdict(best.estimate.band)
        click.echo(json.dumps({**search_to_json(best.search), "band": band}))
    else:
        click.echo(text.search(best.search, best.estimate))
    return _code(result.stop_reason)


@commands.command("explain")
@click.argument("plan", type=Path)
@click.option("--views", is_flag=True, help="List operators that cost nothing, too.")
@_json_option
def explain_command(plan: Path, views: bool, as_json: bool) -> None:
    """What PLAN splits how, what each redistribution costs, and where the memory goes."""
    from autopar import api
    from autopar.exporters import json as json_exporter
    from autopar.exporters import stages, text
    from autopar.ir.profiled_graph import is_profiled

    loaded = api.load_plan(plan)
    if is_profiled(loaded.graph):
        if as_json:
            click.echo(json.dumps(stages.explained(loaded, api.timeline_of_plan(loaded))))
        else:
            click.echo(api.explain(loaded), nl=False)
        return
    rules = api.rules_of(loaded)
    if as_json:
        click.echo(json.dumps(json_exporter.explained(loaded, rules)))
    else:
        click.echo(text.explain(loaded, rules, views=views), nl=False)


@commands.command("verify")
@click.argument("plan", type=Path)
@click.argument("model", required=False)
@click.option(
    "--rank",
    type=click.IntRange(min=0),
    help="Which process to be.  [default: 0; of several stages one of each that differ]",
)
@_json_option
def verify_command(plan: Path, model: str | None, rank: int | None, as_json: bool) -> int:
    """Dry-run one step of PLAN, and compare with what it promised.

    Works without devices for any number of processes. Exit code 1 if collectives, bytes, the order
    of actions or peak memory differ, or a tensor's type is not what spmd_types derives. With MODEL,
    also check that the plan was made for it.
    """
    from autopar import api
    from autopar.exporters import text

    loaded = api.load_plan(plan)
    api.refuse_profiled(loaded, "verified")
    with progress() as tell:
        if model is not None:
            api.check_model(loaded, model, tell)
        from autopar.runtime.verify_stages import StagesReport

        report = api.verify(loaded, rank=rank, progress=tell)
    if as_json:
        click.echo(report.to_json())
    elif isinstance(report, StagesReport):
        click.echo(text.verification_of_stages(report))
    else:
        click.echo(text.verification(report))
    return 0 if report.ok else 1


@commands.command("run")
@click.argument("plan", type=Path)
@click.argument("model", required=False)
@click.option("--steps", type=AT_LEAST_1, default=10, show_default=True, help="How many to train.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of weights and batch.")
@click.option(
    "--compare", is_flag=True, help="Train the same in one process, too, and compare the losses."
)
@click.option(
    "--timeout",
    type=ABOVE_0,
    help="Seconds to wait for another process that does not answer.  [default: 300]",
)
@click.option("--result", type=Path, hidden=True)
@_json_option
def run_command(
    plan: Path,
    model: str | None,
    steps: int,
    seed: int,
    compare: bool,
    timeout: float | None,
    result: Path | None,
    as_json: bool,
) -> None:
    """Train MODEL for a few steps as PLAN says, and compare with what it predicted.

    Starts torchrun with a process for each device of the plan on this machine; started by torchrun,
    it is one of these processes. MODEL is needed only when the plan does not name it.
    """
    from autopar import api

    loaded = api.load_plan(plan)
    api.refuse_profiled(loaded, "run")
    name = api.named(loaded, model)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        _run_here(loaded, plan, name, steps, seed, timeout, result, as_json)
        return
    from autopar.exporters import text

    with progress() as tell:
        api.check_processes(loaded)
        api.check_model(loaded, name, tell)
        _say_doubts(api.doubts(loaded, running=True))
        tell(f"training {steps} steps, processes: {loaded.world_size}")
        found = api.rehearse(loaded, plan, name, steps, seed, timeout_s=timeout)
        if compare:
            tell(f"training {steps} steps in one process")
        alone = api.single_process(loaded, name, steps, seed) if compare else None
    if as_json:
        click.echo(json.dumps({**_run_json(loaded, plan, found), "single_process_losses": alone}))
    else:
        random = compare and alone is None
        click.echo(text.measurement(loaded, found, alone, random=random))


def _run_here(
    plan: Plan,
    path: Path,
    name: str,
    steps: int,
    seed: int,
    timeout_s: float | None,
    result: Path | None,
    as_json: bool,
) -> None:
    """As one of the processes that torchrun started: the first one prints, or leaves its results in
    the folder ``result``, where all leave what goes wrong."""
    from autopar import api
    from autopar.exporters import text
    from autopar.runtime import first_cause, rehearsal
    from autopar.runtime.peers import tell_nobody

    rank = int(os.environ["RANK"])
    diary = tell_nobody if result is None else first_cause.Diary(result, rank)
    try:
        api.division_of(plan)  # says what is wrong with a split, if anything
        build = api.source_of(plan, name)
        found = rehearsal.rehearse(plan, build, steps, seed, timeout_s, diary)
    except Exception as error:
        if result is not None:
            first_cause.leave(result, rank, error)
        raise
    if rank != 0:
        return
    if result is not None:
        rehearsal.leave(result, found)
    elif as_json:
        click.echo(json.dumps(_run_json(plan, path, found)))
    else:
        click.echo(text.measurement(plan, found, None))


def _say_doubts(doubts: list[str]) -> None:
    for doubt in doubts:
        click.echo(f"autopar: {doubt}", err=True)


def _run_json(plan: Plan, path: Path, found: Measurement) -> dict[str, Any]:
    from autopar import api
    from autopar.ir.measurement import run_to_json

    return run_to_json(api.run_record(plan, path, found))


@commands.command("profile")
@click.option(
    "--devices", type=AT_LEAST_1, help="GPUs or processes.  [default: its GPUs, else cores]"
)
@click.option("--seconds", type=ABOVE_0, help="How long to measure, about.")
@click.option("-o", "--output", type=Path, help="Write the profile, for --topology, here, too.")
@_json_option
def profile_command(
    devices: int | None, seconds: float | None, output: Path | None, as_json: bool
) -> None:
    """Measure this machine again, and keep it as --topology local.

    Or a cluster: `torchrun ... -m autopar profile -o FILE` on all its hosts measures each axis of
    it, in a host and from host to host; --topology FILE then plans for it. Ctrl-C ends early and
    keeps what was measured.
    """
    from autopar import api
    from autopar.exporters import text
    from autopar.ir.plan import check_writable, write_atomically
    from cost_models.saved import cost_model_to_json

    started = "TORCHELASTIC_RUN_ID" in os.environ
    if started and devices is not None:
        raise AutoparError("torchrun says how many devices there are; leave --devices out")
    if started and output is None:
        raise AutoparError("a cluster is measured into a file; say which with -o FILE")
    if output is not None:
        check_writable(output)
    with progress() as tell:
        found = (
            api.profile_cluster(seconds=seconds, progress=tell)
            if started
            else api.profile(devices, seconds=seconds, progress=tell)
        )
    if found is None:  # another process tells
        return
    saved = cost_model_to_json(found)
    if output is not None:
        write_atomically(output, json.dumps(saved["profiled"], indent=1) + "\n")
    click.echo(json.dumps(saved) if as_json else text.profile(saved))


@commands.command("calibrate")
@click.option(
    "--from-run",
    "runs",
    type=Path,
    multiple=True,
    required=True,
    help="What `autopar run PLAN --json` printed. Several tell more.",
)
@click.option(
    "--profile", type=Path, help="What to correct.  [default: what the plan was made with]"
)
@click.option(
    "-o", "--output", type=Path, required=True, help="Write the corrected profile, for --topology."
)
@_json_option
def calibrate_command(
    runs: tuple[Path, ...], profile: Path | None, output: Path, as_json: bool
) -> None:
    """Correct a profile by steps that were measured.

    The seconds of compute, of communication and of what the host adds get a factor each, as far as
    the runs tell them apart; the profile says what it was corrected from.
    """
    from autopar import api
    from autopar.exporters import text
    from autopar.ir.plan import check_writable, write_atomically
    from cost_models.saved import cost_model_to_json

    check_writable(output)
    with progress() as tell:
        tell("pricing the plans of the runs")
        found, factors = api.calibrate(runs, profile=profile)
    saved = cost_model_to_json(found)
    write_atomically(output, json.dumps(saved["profiled"], indent=1) + "\n")
    if as_json:
        click.echo(json.dumps({"factors": [asdict(f) for f in factors], **saved}))
    else:
        click.echo(text.calibration(saved, factors, str(output)))


@commands.command("simulate")
@click.argument("plan", type=Path)
@click.option("--topology", help="Price it on this machine instead of its own.")
@_json_option
def simulate_command(plan: Path, topology: str | None, as_json: bool) -> None:
    """Price PLAN again: on its own machine, or on another one."""
    from autopar import api
    from autopar.exporters import text

    loaded = api.load_plan(plan)
    with progress() as tell:
        tell("pricing the plan")
        estimate = api.simulate(loaded, topology)
    if as_json:
        click.echo(json.dumps(_estimate_json(estimate)))
    else:
        click.echo(text.estimate(estimate, topology or str(loaded.topology.get("name"))))


def _estimate_json(estimate: Estimate) -> dict[str, Any]:
    return {**asdict(estimate), "peak_memory_bytes": estimate.peak_memory_bytes}


@commands.command("diff")
@click.argument("first", type=Path)
@click.argument("second", type=Path)
@_json_option
def diff_command(first: Path, second: Path, as_json: bool) -> None:
    """What the plan SECOND decides otherwise than FIRST."""
    from autopar import api
    from autopar.exporters import text

    found = api.diff(api.load_plan(first), api.load_plan(second))
    click.echo(json.dumps(asdict(found)) if as_json else text.difference(found), nl=as_json)


@commands.command("export")
@click.argument("plan", type=Path)
@click.argument("exporter")
@click.option("-o", "--output", type=Path, help="Write to this file instead of stdout.")
def export_command(plan: Path, exporter: str, output: Path | None) -> None:
    """PLAN in another form: see `autopar list exporters`."""
    from autopar import api
    from autopar.ir.plan import write_atomically

    content = api.export(api.load_plan(plan), exporter)
    if output is None:
        click.echo(content, nl=False)
    else:
        write_atomically(output, content)


@commands.command("list")
@click.argument("shelf")
@_json_option
def list_command(shelf: str, as_json: bool) -> None:
    """What there is of SHELF: topologies, recipes, schedules, searchers, exporters, operators."""
    from autopar import api

    names = sorted(api.pick(_SHELVES, shelf, "shelf")())
    click.echo(json.dumps(names) if as_json else "\n".join(names))


def _topologies() -> list[str]:
    from cost_models import topology_names

    return ["local", *topology_names()]


def _recipes() -> list[str]:
    from autopar.recipes import PUBLISHED, RECIPES

    return [*RECIPES, *PUBLISHED]


def _schedules() -> list[str]:
    from autopar.schedules import SCHEDULES

    return list(SCHEDULES)


def _searchers() -> list[str]:
    from autopar.searchers import SEARCHERS

    return list(SEARCHERS)


def _exporters() -> list[str]:
    from autopar.exporters import EXPORTERS

    return list(EXPORTERS)


def _operators() -> list[str]:
    from autopar.ops import RULES

    return list(RULES)


_SHELVES: dict[str, Callable[[], list[str]]] = {
    "topologies": _topologies,
    "recipes": _recipes,
    "schedules": _schedules,
    "searchers": _searchers,
    "exporters": _exporters,
    "operators": _operators,
}


@commands.command("draw")
@click.argument("schedule")
@click.option("--devices", type=AT_LEAST_1, default=4, show_default=True, help="Groups of devices.")
@click.option("--microbatches", type=AT_LEAST_1, default=8, show_default=True, help="Of a step.")
@click.option("--chunks", type=AT_LEAST_1, help="Stages on each group.  [default: the schedule's]")
@click.option(
    "--times",
    default="1,1,1",
    show_default=True,
    help="Of a stage's forward, the gradient of its inputs, that of its weights.",
)
@click.option(
    "-o",
    "--output",
    type=Path,
    help="Write a page (.html), a picture (.svg) or a trace for ui.perfetto.dev (.json).",
)
@_json_option
def draw_command(
    schedule: str,
    devices: int,
    microbatches: int,
    chunks: int | None,
    times: str,
    output: Path | None,
    as_json: bool,
) -> None:
    """What each group of devices does when under SCHEDULE.

    Stages are equal and communication takes no time. See `autopar list schedules`. Or give a plan
    file (.json) instead: its own rows, as its machine takes them.
    """
    from autopar import api
    from autopar.exporters import drawing, perfetto, played
    from autopar.ir.plan import write_atomically
    from autopar.ir.profiled_graph import is_profiled

    time_text, names = drawing.number_text, None
    if schedule.endswith(".json"):
        plan = api.load_plan(schedule)
        if is_profiled(plan.graph):
            found = api.timeline_of_plan(plan)
        else:
            found, names = played.timeline(plan), played.row_names(plan)
        microbatches, schedule = plan.strategy.microbatches, f"{plan.graph.name}, {schedule}"
        time_text = drawing.seconds_text
    else:
        found = api.timeline_of(schedule, devices, microbatches, chunks, _times(times))
    if output is not None:
        title = f"{schedule}, {microbatches} microbatches"
        draw = {
            ".html": lambda: drawing.html(found, title, time_text),
            ".svg": lambda: drawing.svg(found, time_text),
            ".json": lambda: perfetto.trace(found, names),
        }
        write_atomically(output, api.pick(draw, output.suffix, "kind of drawing")())
    columns = shutil.get_terminal_size((120, 24)).columns
    click.echo(
        json.dumps(drawing.summary(found)) if as_json else drawing.text(found, columns, time_text)
    )


def _times(text: str) -> tuple[Fraction, Fraction, Fraction]:
    try:
        forward, inputs, weights = map(Fraction, text.split(","))
    except (ValueError, ZeroDivisionError):
        raise AutoparError(f"{text!r} are no three times; write for example 1,1,1") from None
    if min(forward, inputs) <= 0 or weights < 0:
        raise AutoparError(f"{text!r}: a forward and a backward take some time; try 1,1,1")
    return forward, inputs, weights


@commands.command("version")
@_json_option
def version_command(as_json: bool) -> None:
    """Versions of autopar and of what it stands on."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"autopar": __version__, "python": platform.python_version()}
    for package in ("torch", "spmd_types", "ortools", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    click.echo(json.dumps(found) if as_json else "\n".join(f"{k} {v}" for k, v in found.items()))


# Progress


SHOWN_AFTER_S = 1.0
"""What is quicker is not worth a line."""


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Gives a function that is told what is being done, and shows it on stderr if it takes long."""
    if sys.stderr.isatty():
        from rich.console import Console

        with Console(stderr=True).status("") as status:
            yield lambda what: status.update(f"{what} ...")
        return
    lines = _Lines()
    try:
        yield lines
    finally:
        lines.stop()


class _Lines:
    """A line on stderr for each thing that has taken more than a second."""

    def __init__(self) -> None:
        self._timer: threading.Timer | None = None

    def __call__(self, what: str) -> None:
        self.stop()
        self._timer = threading.Timer(SHOWN_AFTER_S, self._show, (what,))
        self._timer.daemon = True
        self._timer.start()

    def _show(self, what: str) -> None:
        click.echo(f"autopar: {what} ...", err=True)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
