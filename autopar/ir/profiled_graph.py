"""Graphs of measured operators: people have profiles without code. docs/profiled_graphs.md.

A profile becomes an ``OperatorGraph`` like any other. Its operators are calls of ``OP`` that carry
their measurements as keywords; its one input, ``SAMPLES``, has the global batch as its only dim.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from autopar.errors import AutoparError
from autopar.ir.graph import Operator, OperatorGraph, Role, Tensor, TensorSpec
from autopar.ir.plan_schema import FLAG, TEXT, Schema, described, fault, many, record

KIND = "autopar profiled graph"
FORMAT = 1
"""Version of the file: one more whenever an older autopar could misread a newer file."""

OP = "profiled.operator"
SAMPLES = "samples"

_AT_LEAST_1: Schema = {"type": "integer", "minimum": 1}
_BYTES: Schema = {"type": "integer", "minimum": 0}
_SECONDS: Schema = {"type": "number", "minimum": 0}


@dataclass(frozen=True, slots=True)
class Measured:
    """An operator on ``tensor_parallel`` devices that share its work, for a microbatch.

    Bytes are on one of these devices. ``device``: on which kind of device, "" for any.
    ``input_gradient_s``, ``weight_gradient_s``: the two parts of ``backward_s``, ``None`` if not
    known. ``activation_bytes``: what is kept for the backward.
    """

    forward_s: float
    backward_s: float
    parameter_bytes: int
    activation_bytes: int
    tensor_parallel: int = 1
    device: str = ""
    input_gradient_s: float | None = None
    weight_gradient_s: float | None = None


@dataclass(frozen=True, slots=True)
class ProfiledOperator:
    """``samples``: of the microbatch that was measured. ``output_bytes``: of its whole output.
    ``recompute``: whether the forward may be done again instead of keeping its activations."""

    name: str
    samples: int
    output_bytes: int
    recompute: bool
    measured: tuple[Measured, ...]


def is_profiled(graph: OperatorGraph) -> bool:
    return any(operator.op == OP for operator in graph.operators)


def profiled_graph_schema() -> Schema:
    optional = {
        "parameter_bytes": _BYTES,
        "activation_bytes": described(
            _BYTES, "kept for the backward; default: of the operator, or its output"
        ),
        "input_gradient_s": described(_SECONDS, "the part of backward_s that others wait for"),
        "weight_gradient_s": described(_SECONDS, "the rest of it; give both or none"),
    }
    alternative = record(
        forward_s=_SECONDS,
        backward_s=_SECONDS,
    )
    alternative["properties"] |= {
        "tensor_parallel": described(_AT_LEAST_1, "devices that share it; default 1"),
        "device": described(TEXT, "the name of a machine's device; default: any"),
        **optional,
    }
    operator = record(
        name=TEXT,
        inputs=described(many(TEXT), "names of operators before this one"),
        forward_s=described(_SECONDS, "of a microbatch on one device"),
        backward_s=_SECONDS,
        output_bytes=described(_BYTES, "of the whole output, for a microbatch"),
    )
    operator["properties"] |= {
        **optional,
        "recompute": described(FLAG, "whether its forward may be done again; default false"),
        "alternatives": many(alternative),
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{KIND}, format {FORMAT}",
        **record(
            kind={"const": KIND},
            format={"const": FORMAT},
            name=TEXT,
            global_batch=described(_AT_LEAST_1, "samples of a step"),
            microbatch=described(_AT_LEAST_1, "samples that were measured"),
            operators=described(many(operator), "in an order in which inputs come first"),
        ),
    }


def is_profiled_file(path: str | Path) -> bool:
    """Whether it is JSON; a model is never."""
    return str(path).endswith(".json") and not str(path).startswith("hf:")


def load_profiled_graph(path: str | Path) -> OperatorGraph:
    """
    Raises:
        AutoparError: the file cannot be read, or is something else; the first fault is named.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise AutoparError(f"cannot read {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise AutoparError(f"{path} is not JSON (line {error.lineno}: {error.msg})") from error
    except UnicodeDecodeError as error:
        raise AutoparError(f"{path} is not JSON (it is not text)") from error
    return profiled_graph_from_json(data, str(path))


def profiled_graph_from_json(data: Any, source: str = "the profiled graph") -> OperatorGraph:
    """``source`` names it in messages."""
    if not isinstance(data, dict) or data.get("kind") != KIND:
        raise AutoparError(
            f'{source} is JSON, but no profiled graph: it needs "kind": "{KIND}" and what '
            "docs/profiled_graphs.md lists; a plan is explained, simulated or run, not planned"
        )
    if not isinstance(data.get("format"), int) or data["format"] > FORMAT:
        raise AutoparError(
            f"{source} has format {data.get('format')}; this autopar reads up to format {FORMAT}: "
            "install a newer autopar"
        )
    what = fault(data, profiled_graph_schema()) or _contradiction(data)
    if what:
        raise AutoparError(f"{source}: {what}")
    return _graph(data)


def _contradiction(data: dict[str, Any]) -> str:
    """The first thing that the schema cannot say."""
    if not data["operators"]:
        return "operators is empty; a graph has at least one"
    if data["global_batch"] % data["microbatch"]:
        return (
            f"global_batch {data['global_batch']} is no multiple of microbatch {data['microbatch']}"
        )
    known: set[str] = set()
    for i, operator in enumerate(data["operators"]):
        where = f"operators[{i}]"
        if operator["name"] in known:
            return f"{where}.name: there are two operators {operator['name']!r}"
        for j, name in enumerate(operator["inputs"]):
            if name not in known:
                return f"{where}.inputs[{j}]: no operator before this one is called {name!r}"
        known.add(operator["name"])
        ways = [(where, operator, _OPERATOR_KEYS)] + [
            (f"{where}.alternatives[{j}]", alternative, _ALTERNATIVE_KEYS)
            for j, alternative in enumerate(operator.get("alternatives", ()))
        ]
        for place, way, keys in ways:
            if unknown := sorted(set(way) - keys):
                return f"{place}.{unknown[0]} is no key of it; it has {', '.join(sorted(keys))}"
            halves = [way.get(key) for key in ("input_gradient_s", "weight_gradient_s")]
            if halves.count(None) == 1:
                return f"{place} has one of input_gradient_s and weight_gradient_s; give both"
            if None not in halves and abs(sum(halves) - way["backward_s"]) > 0.01 * sum(halves):
                return (
                    f"{place}: input_gradient_s and weight_gradient_s are {sum(halves):g} "
                    f"together, and backward_s is {way['backward_s']:g}"
                )
        counted = Counter(
            (way.get("tensor_parallel", 1), way.get("device", "")) for _, way, _ in ways
        )
        twice = [key for key, count in counted.items() if count > 1]
        if twice:
            return f"{where}.alternatives has tensor_parallel {twice[0][0]} twice for one device"
    return ""


_ALTERNATIVE_KEYS = {field.name for field in fields(Measured)}
_OPERATOR_KEYS = {
    "name",
    "inputs",
    "output_bytes",
    "recompute",
    "alternatives",
    *(_ALTERNATIVE_KEYS - {"tensor_parallel", "device"}),
}


def _graph(data: dict[str, Any]) -> OperatorGraph:
    batch, samples = data["global_batch"], data["microbatch"]
    tensors = [Tensor(SAMPLES, TensorSpec((batch,), "uint8"), Role.INPUT, False)]
    operators = []
    for item in data["operators"]:
        name, size = item["name"], item["output_bytes"]
        # the whole output for a global batch, as bytes
        spec = TensorSpec((batch // samples, size), "uint8")
        inputs = [f"{other}.output" for other in item["inputs"]] or [SAMPLES]
        if item.get("parameter_bytes"):
            spec_of = TensorSpec((item["parameter_bytes"],), "uint8")
            tensors.append(Tensor(f"{name}.parameters", spec_of, Role.PARAMETER, True))
            inputs.append(f"{name}.parameters")
        tensors.append(Tensor(f"{name}.output", spec, Role.ACTIVATION, True))
        own = _measured(item, item)
        ways = [own, *(_measured(way, item) for way in item.get("alternatives", ()))]
        keywords = {
            "samples": samples,
            "output_bytes": size,
            "recompute": item.get("recompute", False),
            "measured": tuple(tuple(asdict(way).items()) for way in ways),
        }
        operators.append(
            Operator(
                name,
                OP,
                tuple(inputs),
                (f"{name}.output",),
                keywords=tuple(keywords.items()),
                module=name.rpartition(".")[0],
            )
        )
    return OperatorGraph(
        tensors=tuple(tensors),
        operators=tuple(operators),
        loss=operators[-1].outputs[0],
        inputs=(SAMPLES,),
        input_keys=("",),
        name=data["name"],
    )


def _measured(way: dict[str, Any], operator: dict[str, Any]) -> Measured:
    split = way.get("tensor_parallel", 1)
    whole = operator.get("parameter_bytes", 0)
    kept = operator.get("activation_bytes", operator["output_bytes"])
    return Measured(
        forward_s=float(way["forward_s"]),
        backward_s=float(way["backward_s"]),
        parameter_bytes=way.get("parameter_bytes", -(-whole // split)),
        activation_bytes=way.get("activation_bytes", kept),
        tensor_parallel=split,
        device=way.get("device", ""),
        input_gradient_s=way.get("input_gradient_s"),
        weight_gradient_s=way.get("weight_gradient_s"),
    )


def global_batch(graph: OperatorGraph) -> int:
    return graph.spec(SAMPLES).shape[0]


def profiled_operators(graph: OperatorGraph) -> list[ProfiledOperator]:
    """What the operators of a profiled graph carry.

    Raises:
        AutoparError: some of them are no measurements.
    """
    found = []
    for operator in graph.operators:
        if operator.op != OP:
            raise AutoparError(
                f"{operator.name} is a call of {operator.op}, and others are measurements: a graph "
                "is profiled as a whole or not at all"
            )
        held = dict(operator.keywords)
        found.append(
            ProfiledOperator(
                operator.name,
                held["samples"],
                held["output_bytes"],
                held["recompute"],
                tuple(Measured(**dict(way)) for way in held["measured"]),
            )
        )
    return found
