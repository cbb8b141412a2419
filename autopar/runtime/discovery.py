"""Proposes a rule for an op that has none, by trying, and accepts it only after the rule check."""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, product
from math import prod
from multiprocessing.connection import Connection
from pathlib import Path

import platformdirs
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from autopar.ir.graph import Argument, Operator, OperatorGraph, TensorSpec
from autopar.ir.plan import rule_from_json, rule_to_json
from autopar.ir.rule import BoundRule, OpRule, Product, Saved, bind
from autopar.ir.sharding import INVARIANT, PARTIAL, Mesh, shard
from autopar.ops import Proposals, bind_operator, bound_rules
from autopar.ops.proposals import call_key
from autopar.runtime.rule_check import (
    MESHES,
    Draw,
    Failure,
    check,
    close,
    index_data,
    kept_tensors,
    listed,
    plain,
    signed_data,
    spread,
    widened,
)

Specs = tuple[TensorSpec, ...]
Attempt = tuple[tuple[int | None, ...], tuple[int, ...]]
"""For each input the dim that is cut, and the inputs that are handed out as addends."""

CALL_TIME_S = 120.0  # for one call, with all its attempts; then it stays without a rule
MOST_ELEMENTS = 200_000  # a tensor that is tried at its real size has at most so many
MOST_ATTEMPTS = 4000  # ways of cutting the inputs of one call
MOST_TOGETHER = 6  # inputs of which all subsets are tried as partial sums
PAIR = Mesh((("a", 2),))
VERSION = 1  # of what is cached
_STABLE = ("aten.", "prims.")  # ops that only another torch changes


def rules_with_proposals(graph: OperatorGraph) -> tuple[dict[str, BoundRule], Proposals]:
    """The bound rule of every operator, and the proposals that were made for it.

    Raises:
        UnsupportedModelError: some calls have no rule and none could be proposed.
    """
    calls: dict[str, tuple[Operator, Specs, Specs]] = {}
    for operator in graph.operators:
        if bind_operator(graph, operator) is None:
            inputs = tuple(graph.spec(name) for name in operator.inputs)
            outputs = tuple(graph.spec(name) for name in operator.outputs)
            calls.setdefault(call_key(operator, inputs), (operator, inputs, outputs))
    found = propose_all(list(calls.values()))
    proposals = tuple(
        (key, rule) for key, rule in zip(calls, found, strict=True) if rule is not None
    )
    return bound_rules(graph, proposals), proposals


def propose(
    operator: Operator, input_specs: Specs, output_specs: Specs, *, cache: Path | None = None
) -> OpRule | None:
    """A rule for this call, checked by execution; ``None`` when it cannot even be run replicated.

    A rule without factors is legal: the op then runs whole on every rank.
    """
    return propose_all([(operator, input_specs, output_specs)], cache=cache)[0]


def propose_all(
    calls: Sequence[tuple[Operator, Specs, Specs]], *, cache: Path | None = None
) -> list[OpRule | None]:
    """One proposal a call. ``cache``: a folder (default: the user's cache), for torch's own ops;
    others are tried each time, since what they do may have changed under their name."""
    folder = cache or Path(platformdirs.user_cache_dir("autopar")) / "rules"
    files = [folder / f"{_fingerprint(*call)}.json" for call in calls]
    kept = [operator.op.startswith(_STABLE) for operator, _, _ in calls]
    known = {i: _read(file) for i, file in enumerate(files) if kept[i] and file.exists()}
    found = {i: rule for i, (ok, rule) in known.items() if ok}
    missing = [i for i in range(len(calls)) if i not in found]
    for i, (rule, settled) in zip(missing, _tried([calls[i] for i in missing]), strict=True):
        found[i] = rule
        if settled and kept[i]:
            _write(files[i], rule)
    return [found[i] for i in range(len(calls))]


# --- the cache -----------------------------------------------------------------------------------


def _fingerprint(operator: Operator, inputs: Specs, outputs: Specs) -> str:
    key = call_key(operator, inputs)
    content = [VERSION, torch.__version__, key, [[s.dtype, s.shape] for s in outputs]]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


def _read(file: Path) -> tuple[bool, OpRule | None]:
    """(readable, rule); what cannot be read is tried again."""
    try:
        data = json.loads(file.read_text())
        return True, None if data is None else rule_from_json(data)
    except (OSError, ValueError, TypeError, KeyError):
        return False, None


def _write(file: Path, rule: OpRule | None) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(json.dumps(None if rule is None else rule_to_json(rule)))
    part.replace(file)


# --- the process that tries ----------------------------------------------------------------------


def _tried(calls: list[tuple[Operator, Specs, Specs]]) -> Iterator[tuple[OpRule | None, bool]]:
    """(rule, settled) for each call, from a process that an illegal shape may kill.

    It is forked, so that it knows the custom ops of this one. Where it dies, the attempt that it
    had announced is left out and it starts again; what only ran out of time is not settled.
    """
    for call in calls:
        fatal: set[Attempt] = set()
        while True:
            answer = _in_process(call, frozenset(fatal))
            if not isinstance(answer, tuple):
                yield answer, True
                break
            attempt, timed_out = answer
            if timed_out or attempt is None or attempt in fatal:
                yield None, not timed_out
                break
            fatal.add(attempt)


def _in_process(
    call: tuple[Operator, Specs, Specs], fatal: frozenset[Attempt]
) -> OpRule | tuple[Attempt | None, bool] | None:
    """The rule, or (the attempt that killed the process, whether it took too long)."""
    context = multiprocessing.get_context("fork")
    mine, its = context.Pipe(duplex=False)
    process = context.Process(target=_explore_and_send, args=(call, fatal, its), daemon=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python 3.12 warns of threads; DataLoader does the same
        process.start()
    its.close()
    last: Attempt | None = None
    try:
        until_s = time.monotonic() + CALL_TIME_S
        while mine.poll(max(0.0, until_s - time.monotonic())):
            kind, value = mine.recv()
            if kind == "rule":
                return None if value is None else rule_from_json(value)
            last = value
        return last, True
    except EOFError:
        return last, False
    finally:
        process.kill()
        process.join()
        mine.close()


def _explore_and_send(
    call: tuple[Operator, Specs, Specs], fatal: frozenset[Attempt], connection: Connection
) -> None:
    torch.set_num_threads(1)  # OpenMP does not survive a fork
    warnings.simplefilter("ignore")
    rule = explore(*call, fatal=fatal, announce=lambda attempt: connection.send(("try", attempt)))
    connection.send(("rule", None if rule is None else rule_to_json(rule)))


# --- trying --------------------------------------------------------------------------------------


def explore(
    operator: Operator,
    inputs: Specs,
    outputs: Specs,
    *,
    fatal: frozenset[Attempt] = frozenset(),
    announce: Callable[[Attempt], None] = lambda attempt: None,
) -> OpRule | None:
    """``propose`` in this process."""
    trial = _set_up(*widened(operator, inputs, outputs))
    if trial is None:
        return None
    factors = _factors(trial, fatal, announce)
    linear = _linear(trial, len(trial.inputs), fatal, announce)
    thorough = False
    while True:
        rule = _assembled(trial, factors, linear)
        failures = trial.failures(rule, thorough=thorough)
        if not failures and thorough:
            break
        if not failures:
            thorough = True
            continue
        blamed = _blamed(failures)
        if blamed == PARTIAL and linear:
            linear = ()
        elif any(factor.name == blamed for factor in factors):
            factors = [factor for factor in factors if factor.name != blamed]
        else:
            return None  # not even the same twice
    try:
        bind(rule, inputs, outputs)
    except ValueError:
        return None
    return rule


@dataclass(frozen=True)
class _Factor:
    """Dims of inputs that are cut together, and the dims of outputs that this cuts."""

    name: str
    inputs: tuple[int | None, ...]
    outputs: tuple[int | None, ...]  # None: a sum
    addends: tuple[int, ...]


@dataclass(frozen=True)
class _Trial:
    """A call in float64 on small shapes, with inputs that it accepts."""

    operator: Operator
    inputs: Specs
    outputs: Specs
    draws: tuple[Draw, ...]
    samples: tuple[tuple[Tensor, ...], ...]
    differentiable: tuple[int, ...]

    def failures(self, rule: OpRule, *, thorough: bool) -> list[Failure]:
        """Of the rule check; a quick one first spares most of the work on wrong guesses."""
        return [
            failure
            for draw in self.draws
            for failure in check(
                self.operator,
                self.inputs,
                self.outputs,
                rule,
                differentiable=self.differentiable,
                draw=draw,
                saves=False,
                meshes=MESHES if thorough else MESHES[:1],
                seeds=(0, 1) if thorough else (0,),
            )
        ]


def _set_up(operator: Operator, inputs: Specs, outputs: Specs) -> _Trial | None:
    small = _shrunk(operator, inputs, outputs)
    candidates = [small] if small is not None else []
    if all(spec.numel <= MOST_ELEMENTS for spec in inputs + outputs):
        candidates.append((inputs, outputs))
    for ins, outs in candidates:
        samples, draws = [], []
        for draw in _draws(operator, ins):
            sample = _accepted(operator, ins, outs, draw)
            if sample is not None:
                samples.append(sample)
                draws.append(draw)
        if draws:
            floating = tuple(i for i, spec in enumerate(ins) if spec.is_floating)
            differentiable = floating if _has_gradient(operator, samples[0], floating) else ()
            return _Trial(operator, ins, outs, tuple(draws), tuple(samples), differentiable)
    return None


def _shrunk(operator: Operator, inputs: Specs, outputs: Specs) -> tuple[Specs, Specs] | None:
    """Equal sizes stay equal, those that an argument names stay as they are, the others become
    small multiples of six, which two, three and four ranks can cut."""
    named = set(_integers((operator.arguments, tuple(v for _, v in operator.keywords))))
    sizes: dict[int, int] = {}
    for spec in inputs:
        for size in spec.shape:
            if size > 1 and size not in named:
                sizes.setdefault(size, _SMALL[len(sizes)] if len(sizes) < len(_SMALL) else size)

    def specs(given: Specs) -> Specs:
        return tuple(
            TensorSpec(tuple(sizes.get(size, size) for size in spec.shape), spec.dtype)
            for spec in given
        )

    found = specs(inputs), specs(outputs)
    return found if all(spec.numel <= MOST_ELEMENTS for spec in found[0] + found[1]) else None


_SMALL = (12, 6, 18, 24, 30, 36)


def _integers(argument: Argument) -> Iterator[int]:
    if isinstance(argument, tuple):
        for item in argument:
            yield from _integers(item)
    elif isinstance(argument, int):
        yield argument


def _draws(operator: Operator, specs: Specs) -> list[Draw]:
    """Ways to make data, of which the op has to accept one: signed numbers, positive ones, those
    between 0 and 1, and the largest indices."""
    bounds = sorted({size for spec in specs for size in spec.shape if size > 1}, reverse=True)
    integers = [i for i, spec in enumerate(specs) if spec.dtype.startswith(("int", "uint"))]

    def signed(o: Operator, s: Specs, i: int, g: torch.Generator) -> Tensor:
        return signed_data(s[i], g)

    def positive(o: Operator, s: Specs, i: int, g: torch.Generator) -> Tensor:
        data = signed_data(s[i], g)
        return data.abs() + 0.1 if s[i].is_floating else data

    def share(o: Operator, s: Specs, i: int, g: torch.Generator) -> Tensor:
        data = signed_data(s[i], g)
        return data.sigmoid() if s[i].is_floating else data

    def below(bound: int) -> Draw:
        def indices(o: Operator, s: Specs, i: int, g: torch.Generator) -> Tensor:
            return index_data(s[i], bound, g) if i in integers else signed_data(s[i], g)

        return indices

    found: list[Draw] = [signed]
    if any(spec.dtype.startswith("float") for spec in specs):
        found += [positive] if _runs(operator, specs, signed) else [positive, share]
    if integers:
        works = (below(bound) for bound in bounds if _runs(operator, specs, below(bound)))
        found += [draw for draw in (next(works, None),) if draw is not None]
    return found


def _runs(operator: Operator, specs: Specs, draw: Draw) -> bool:
    try:
        _outputs(operator, _sample(operator, specs, draw, 0))
    except Exception:
        return False
    return True


def _sample(operator: Operator, specs: Specs, draw: Draw, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    made = (draw(operator, specs, i, generator) for i in range(len(specs)))
    return tuple(tensor for tensor in made if tensor is not None)


def _outputs(operator: Operator, inputs: Sequence[Tensor]) -> list[Tensor]:
    return listed(plain(operator, [x.clone() for x in inputs]))


def _accepted(
    operator: Operator, inputs: Specs, outputs: Specs, draw: Draw
) -> tuple[Tensor, ...] | None:
    """Inputs on which the op runs, and gives the promised shapes, numbers, and the same twice."""
    sample = _sample(operator, inputs, draw, 1)
    try:
        once, again = _outputs(operator, sample), _outputs(operator, sample)
    except Exception:
        return None
    if [tuple(x.shape) for x in once] != [spec.shape for spec in outputs]:
        return None
    undefined = sum(int(x.isnan().sum()) for x in once if x.is_floating_point())
    if undefined * 2 > sum(x.numel() for x in once):
        return None
    return sample if all(map(close, once, again)) else None


def _has_gradient(operator: Operator, sample: Sequence[Tensor], floating: tuple[int, ...]) -> bool:
    leaves = [x.clone().requires_grad_(i in floating) for i, x in enumerate(sample)]
    try:
        outputs = [o for o in listed(plain(operator, leaves)) if o.requires_grad]
        if outputs:
            wanted = [leaves[i] for i in floating]
            ones = [torch.ones_like(o) for o in outputs]
            torch.autograd.grad(outputs, wanted, ones, allow_unused=True)
    except RuntimeError:
        return False
    return bool(outputs)


def _factors(
    trial: _Trial, fatal: frozenset[Attempt], announce: Callable[[Attempt], None]
) -> list[_Factor]:
    """Ways of cutting dims of the inputs after which outputs concatenate or sum to the whole.

    Those that cut most dims come first; a dim belongs to one factor only.
    """
    floating = [i for i, spec in enumerate(trial.inputs) if spec.is_floating]
    found: list[_Factor] = []
    taken: set[tuple[int, int]] = set()
    for cut in _cuts(trial.inputs):
        dims = {(i, dim) for i, dim in enumerate(cut) if dim is not None}
        if dims & taken:
            continue
        rest = [i for i in floating if cut[i] is None]
        for addends in ((), tuple(rest), *((i,) for i in rest if len(rest) > 1)):
            attempt = (cut, addends)
            if attempt in fatal:
                continue
            announce(attempt)
            outputs = _rebuilt(trial, attempt)
            if (
                outputs is not None
                and (not addends or None in outputs)
                and _size(trial, cut, outputs) is not None
            ):
                found.append(_Factor(f"f{len(found)}", cut, outputs, addends))
                taken |= dims
                break
    return found


def _cuts(specs: Specs) -> list[tuple[int | None, ...]]:
    """For each size, every choice of at most one dim of that size in each input."""
    found: list[tuple[int | None, ...]] = []
    for size in dict.fromkeys(size for spec in specs for size in spec.shape):
        if size == 1 or size % 2:
            continue
        options = [(None, *(d for d, n in enumerate(spec.shape) if n == size)) for spec in specs]
        if prod(map(len, options)) <= MOST_ATTEMPTS:
            found += [cut for cut in product(*options) if any(dim is not None for dim in cut)]
    return sorted(found, key=lambda cut: -sum(dim is not None for dim in cut))


def _rebuilt(trial: _Trial, attempt: Attempt) -> tuple[int | None, ...] | None:
    """The dims along which two ranks' outputs concatenate (``None``: they sum) in every sample."""
    cut, addends = attempt
    placements = [
        shard(dim) if dim is not None else PARTIAL if i in addends else INVARIANT
        for i, dim in enumerate(cut)
    ]
    relations: set[tuple[int | None, ...]] = set()
    for sample in trial.samples:
        generator = torch.Generator().manual_seed(7)
        shares = [
            spread(x, (placement,), PAIR, generator)
            for x, placement in zip(sample, placements, strict=True)
        ]
        try:
            whole = _outputs(trial.operator, sample)
            parts = [_outputs(trial.operator, [s[rank] for s in shares]) for rank in range(2)]
        except Exception:
            return None
        if any(len(part) != len(whole) for part in parts):
            return None
        found = [_relation(*three) for three in zip(whole, *parts, strict=True)]
        if "none" in found:
            return None
        relations.add(tuple(None if r == "sum" else int(r) for r in found))
    return relations.pop() if len(relations) == 1 else None


def _relation(whole: Tensor, first: Tensor, second: Tensor) -> str:
    for dim in range(whole.ndim):
        halves = first.ndim == whole.ndim and first.shape[dim] * 2 == whole.shape[dim]
        if halves and first.shape == second.shape:
            joined = torch.cat([first, second], dim)
            if joined.shape == whole.shape and close(joined, whole):
                return str(dim)
    alike = first.shape == second.shape == whole.shape
    if alike and whole.is_floating_point() and close(first + second, whole):
        return "sum"
    return "none"


def _linear(
    trial: _Trial, count: int, fatal: frozenset[Attempt], announce: Callable[[Attempt], None]
) -> tuple[int, ...]:
    """The largest set of inputs that may be partial sums together."""
    floating = [i for i, spec in enumerate(trial.inputs) if spec.is_floating]
    sizes: Sequence[int] = range(len(floating), 0, -1)
    if len(floating) > MOST_TOGETHER:  # all of them, or one: what lies between is rare and much
        sizes = (len(floating), 1)
    for together in chain.from_iterable(combinations(floating, n) for n in sizes):
        attempt: Attempt = ((None,) * count, together)
        if attempt in fatal:
            continue
        announce(attempt)
        outputs = _rebuilt(trial, attempt)
        if outputs is not None and all(dim is None for dim in outputs):
            return together
    return ()


# --- the rule ------------------------------------------------------------------------------------


def _assembled(trial: _Trial, factors: Sequence[_Factor], linear: tuple[int, ...]) -> OpRule:
    left = [_labels(spec, f"i{i}_") for i, spec in enumerate(trial.inputs)]
    right = [_labels(spec, f"o{i}_") for i, spec in enumerate(trial.outputs)]
    for factor in factors:
        size = _size(trial, factor.inputs, factor.outputs)
        for side, specs, dims in (
            (left, trial.inputs, factor.inputs),
            (right, trial.outputs, factor.outputs),
        ):
            for labels, spec, dim in zip(side, specs, dims, strict=True):
                if dim is not None:
                    compound = f"({factor.name} {labels[dim]})"
                    labels[dim] = factor.name if spec.shape[dim] == size else compound
    names = {factor.name for factor in factors}
    every = {n for labels in left + right for label in labels for n in label.strip("()").split()}
    whole = every - names - {"1"}
    text = " -> ".join(", ".join(" ".join(labels) for labels in side) for side in (left, right))
    sums = tuple(factor.name for factor in factors if None in factor.outputs)
    rule = OpRule(
        signature=text,
        whole=tuple(sorted(whole)),
        sums=sums,
        addends=tuple(sorted({i for factor in factors for i in factor.addends})),
        linear=linear,
        saves=_saves(trial, left, right),
        proposed=True,
    )
    return _priced(trial, rule)


def _size(trial: _Trial, inputs: Sequence[int | None], outputs: Sequence[int | None]) -> int | None:
    """Of the factor that cuts these dims: the smallest of them; the others hold it as their first
    part. ``None`` when they are not multiples of it."""
    sizes = [
        spec.shape[dim]
        for spec, dim in zip(trial.inputs + trial.outputs, (*inputs, *outputs), strict=True)
        if dim is not None
    ]
    smallest = min(sizes)
    return smallest if smallest > 1 and all(n % smallest == 0 for n in sizes) else None


def _labels(spec: TensorSpec, prefix: str) -> list[str]:
    return ["1" if size == 1 else f"{prefix}{dim}" for dim, size in enumerate(spec.shape)]


def _saves(trial: _Trial, left: list[list[str]], right: list[list[str]]) -> tuple[Saved, ...]:
    """What autograd kept of a sample. Tensors of its own take the labels of an input or output of
    their shape; those that fit none count as whole first outputs, as many as hold their bytes."""
    names, own = kept_tensors(trial.operator, trial.samples[0], trial.differentiable)
    found = [Saved(name) for name in sorted(names)]
    shapes = [
        (spec.shape, labels)
        for spec, labels in zip(trial.outputs + trial.inputs, [*right, *left], strict=True)
    ]
    for tensor in own:
        dtype = str(tensor.dtype).removeprefix("torch.")
        dtype = "" if dtype == trial.outputs[0].dtype else dtype
        fits = next((labels for shape, labels in shapes if shape == tuple(tensor.shape)), None)
        if fits is not None:
            found.append(Saved(_points(fits), dtype=dtype))
        else:
            first = trial.outputs[0]
            times = -(-tensor.numel() * tensor.element_size() // max(first.bytes, 1))
            found += [Saved(_points(right[0]))] * times
    return tuple(found)


def _points(labels: list[str]) -> str:
    return " ".join(label.strip("()") for label in labels if label != "1")


def _priced(trial: _Trial, rule: OpRule) -> OpRule:
    """A matrix product when torch counts the flops of one over all its factors."""
    bound = bind(rule, trial.inputs, trial.outputs)
    with FlopCounterMode(display=False) as counter:
        _outputs(trial.operator, trial.samples[0])
    flops = counter.get_total_flops()
    out = {f for dim in bound.outputs[0] for f in dim}
    for pair in combinations(bound.inputs, 2):
        first, second = ({f for dim in dims for f in dim} for dims in pair)
        groups = [
            [f for f in bound.sizes if (f in first, f in second, f in out) == where]
            for where in ((True, True, True), (True, False, True), (False, True, True))
        ]
        groups.append([f for f in bound.sizes if f in first & second - out])
        if flops and flops == 2 * prod(bound.sizes[f] for group in groups for f in group):
            batch, m, n, k = (" ".join(group) for group in groups)
            return replace(rule, kind="matmul", products=(Product(batch, m, n, k),))
    return rule


def _blamed(failures: Sequence[Failure]) -> str:
    """The factor to give up: one that fails alone, else the last of a pair; ``P`` for partial."""
    reserved = {"nothing": "", "replicated": "", "partial": PARTIAL}
    for failure in sorted(failures, key=lambda f: len(f.split)):
        choices = [reserved.get(c, c) for c in failure.split]
        named = [c for c in choices if c]
        if named:
            return named[-1]
    return ""


__all__ = ["explore", "propose", "propose_all", "rules_with_proposals"]
