"""The exported program, made functional, as an ``OperatorGraph`` in which nothing is left over."""

from __future__ import annotations

import operator
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram, default_decompositions
from torch.export.graph_signature import InputKind, OutputKind

from autopar.errors import UnsupportedModelError
from autopar.extractor import einsum
from autopar.ir.graph import (
    ITEM_BYTES,
    Argument,
    Dtype,
    Input,
    Operator,
    OperatorGraph,
    Role,
    Tensor,
    TensorSpec,
)
from autopar.ops import RULES, complaint, rule_for
from autopar.ops.grouped import GATHER_BMM

PREFIX = "model."
"""Of the names in the exported program: the model is the child of a module that adds the loss."""

PLACEMENT_KEYWORDS = {"device", "layout", "pin_memory", "memory_format", "non_blocking"}
"""Keywords that say where and how a tensor lies; the runtime decides that."""

MAX_CONSTANT = 1 << 16
"""Elements of a tensor constant: the values are written out in the plan file."""

_DROPPED = {"aten.alias.default", "aten.lift_fresh_copy.default", "aten.lift_fresh.default"}
_NO_VALUE = {"aten._assert_tensor_metadata.default", "aten._assert_async.msg", "aten.sym_size.int"}

_CASTS = {f"aten.to.{variant}" for variant in ("device", "dtype", "dtype_layout", "other")}
_RESHAPES = {"aten.flatten.using_ints", "aten.reshape.default", "aten.unflatten.int"}
_DROPOUTS = {"aten.dropout.default", "aten.native_dropout.default"}
_OFTEN_IDENTITY = {
    *_CASTS,
    *_RESHAPES,
    "aten.expand_as.default",
    "aten._to_copy.default",
    "aten._unsafe_view.default",
    "aten.detach.default",
    "aten.expand.default",
    "aten.reshape.default",
    "aten.slice.Tensor",
    "aten.view.default",
}
"""Operators that change nothing when they change neither shape nor dtype."""

_SHAPED = {
    "aten._unsafe_view.default",
    "aten.expand.default",
    "aten.reshape.default",
    "aten.view.default",
}
"""Operators whose second argument is the shape of the result, perhaps with a -1 in it."""

_NO_GRAD = torch.ops.higher_order.wrap_with_set_grad_enabled
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd

_REWRITTEN = {
    *_CASTS,
    *_RESHAPES,
    "aten.chunk.default",
    "aten.contiguous.default",
    "aten.dropout.default",
    "aten.expand_as.default",
}
"""Operators that ``_rewritten`` says in others, as ``run_decompositions`` would."""

_FILLED_LATER = {
    "aten.empty.memory_format": "aten.zeros.default",
    "aten.empty_like.default": "aten.zeros_like.default",
    "aten.new_empty.default": "aten.new_zeros.default",
}
"""Operators that leave memory as it is, and those that give it a value, on every rank the same."""

_WRITES_UNDECLARED = {"aten.batch_norm.default", "aten.instance_norm.default"}
"""Operators that update buffers although their schema does not say so."""

_GRADIENT_STOPS = re.compile(
    r"aten\.(detach|\w+_like|new_\w+|bernoulli|sign|uniform|exponential|normal|normal_functional)\."
)
_UPDATED = {"aten._native_batch_norm_legit_functional.default": {3: 3, 4: 4}}
"""Results that are new values of arguments, by position. They are of these arguments' dtype, as
kernels make them; what torch knows without running them is float32 for those of bfloat16."""

_ONLY_FIRST_DIFFERENTIABLE = re.compile(r"aten\.\w*batch_norm\w*\.")


def convert(
    program: ExportedProgram,
    model: nn.Module,
    inputs: list[tuple[str, str]],
    name: str,
    problems: list[str],
) -> OperatorGraph:
    """``inputs`` are (name, keyword) of the tensors given to the model, in order.

    ``problems`` are what tracing found to be unsupported; they are listed with what is found here.
    """
    program = _in_known_ops(program)
    return _Converter(program, model, inputs, name, problems).graph()


def _calls(module: fx.GraphModule) -> Iterator[fx.Node]:
    """The calls, those inside ``no_grad`` regions included."""
    for node in module.graph.nodes:
        if node.target is _NO_GRAD:
            yield from _calls(_region(node))
        elif node.op == "call_function":
            yield node


def _region(node: fx.Node) -> fx.GraphModule:
    """The body of a region with gradients on or off."""
    region = getattr(node.graph.owning_module, str(node.args[1].target))  # type: ignore[union-attr]
    assert isinstance(region, fx.GraphModule)
    return region


def _is_known_functional(node: fx.Node) -> bool:
    """Whether the converter can take the call as it is.

    Not what writes to a tensor, nor what is made of other operators and may return a view of its
    argument: ``_decomposed`` expresses those in others, which doubles the time of the extraction.
    """
    target = node.target
    if target is operator.getitem or str(target) in _NO_VALUE | _REWRITTEN:
        return True
    if not isinstance(target, torch._ops.OpOverload) or str(target) in _WRITES_UNDECLARED:
        return False
    if target._schema.is_mutable:
        return False
    aliases = any(argument.alias_info for argument in target._schema.arguments)
    return not (aliases and target.has_kernel_for_dispatch_key(_COMPOSITE))


def _in_known_ops(program: ExportedProgram) -> ExportedProgram:
    """The program as the converter can take it, whose ops have rules where torch knows how."""
    functional = all(map(_is_known_functional, _calls(program.graph_module)))
    tried: set[torch._ops.OpOverload] = set()
    while (composite := _composite_without_rule(program) - tried) or not functional:
        program = _decomposed(program, composite)
        tried |= composite
        functional = True
    return program


def _composite_without_rule(program: ExportedProgram) -> set[torch._ops.OpOverload]:
    """Ops without a rule that torch makes of others (cosine similarity, an LSTM): what autograd
    sees are those, so saying the op in them changes neither values nor gradients."""
    known = RULES.keys() | _REWRITTEN | _NO_VALUE | _DROPPED
    return {
        node.target
        for node in _calls(program.graph_module)
        if isinstance(node.target, torch._ops.OpOverload)
        and node.target.has_kernel_for_dispatch_key(_COMPOSITE)
        and not node.target._schema.is_mutable
        and str(node.target) not in known
    }


def _decomposed(program: ExportedProgram, ops: set[torch._ops.OpOverload]) -> ExportedProgram:
    """Without writes to tensors (those to buffers are results instead), and ``ops`` said in those
    that they are made of."""
    module = program.graph_module
    for node in module.graph.find_nodes(op="call_function", target=_NO_GRAD):
        if node.args[0]:
            continue
        for user in list(node.users):  # the region itself is forgotten
            with module.graph.inserting_after(user):
                detached = module.graph.call_function(torch.ops.aten.detach.default, (user,))
            detached.meta = dict(user.meta)
            user.replace_all_uses_with(detached, lambda reader, d=detached: reader is not d)
    module.recompile()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, about itself
        known = default_decompositions() if ops else {}
        table = {op: known[op] for op in ops if op in known}
        functional: ExportedProgram = program.run_decompositions(table)
    return functional


_Call = tuple[str, Any, Any]
"""Op, arguments and keywords as they stand in an fx node."""


class _Converter:
    """State of one conversion: which tensor each fx node became, and names already taken."""

    def __init__(
        self,
        program: ExportedProgram,
        model: nn.Module,
        inputs: list[tuple[str, str]],
        name: str,
        problems: list[str],
    ) -> None:
        self.program, self.model, self.name = program, model, name
        self.inputs = inputs
        self.tensors: dict[str, Tensor] = {}
        self.operators: list[Operator] = []
        self.of: dict[fx.Node, str | tuple[str, ...]] = {}
        self.taken: Counter[str] = Counter()
        self.constants: dict[str, Any] = {}
        self.problems = list(problems)
        self.refused: set[fx.Node] = set()
        self.shared: list[tuple[str, str]] = []

    def graph(self) -> OperatorGraph:
        self._placeholders()
        for node in self.program.graph.nodes:
            if node.op == "call_function":
                self._consider(node)
        if self.problems:
            listed = "\n".join(f"  - {problem}" for problem in dict.fromkeys(self.problems))
            missing = self._without_rule()
            also = f"\nand {missing}" if missing else ""
            raise UnsupportedModelError(f"the model has what autopar cannot plan:\n{listed}{also}")
        loss, mutations = self._outputs()
        operators = list(_live(self.operators, {loss, *(value for _, value in mutations)}))
        operators = _fuse_gathers(_fuse_copies(operators, self.tensors), self.tensors)
        receives = _receiving(operators, loss, self.tensors)
        used = {loss, *(n for pair in mutations for n in pair)}
        used |= {n for o in operators for n in o.inputs + o.outputs}
        used |= set(self.input_names)
        tensors = tuple(
            replace(t, differentiable=t.name in receives)
            for t in self.tensors.values()
            if t.name in used
        )
        return OperatorGraph(
            tensors=tensors,
            operators=tuple(operators),
            loss=loss,
            inputs=tuple(self.input_names),
            input_keys=tuple(key for _, key in self.inputs),
            mutations=tuple(mutations),
            shared=tuple(pair for pair in self.shared if pair[1] in used),
            constants=tuple((n, v) for n, v in self.constants.items() if n in used),
            name=self.name,
        )

    def _without_rule(self) -> str:
        """What ``bound_rules`` would complain of in the operators that could be converted."""

        def spec(name: str) -> TensorSpec:
            return self.tensors[name].spec

        missing = [
            o
            for o in self.operators
            if rule_for(o, tuple(map(spec, o.inputs)), tuple(map(spec, o.outputs))) is None
        ]
        return complaint(missing, spec) if missing else ""

    # -- tensors that no operator makes

    def _placeholders(self) -> None:
        nodes = {n.name: n for n in self.program.graph.nodes if n.op == "placeholder"}
        first = _first_names(self.model)
        self.shared = [(other, name) for other, name in first.items() if other != name]
        parameters = dict(self.model.named_parameters(remove_duplicate=False))
        self.taken.update(parameters.keys())
        self.taken.update(n for n, _ in self.model.named_buffers(remove_duplicate=False))
        self.input_names: list[str] = []
        given = iter(self.inputs)
        for spec in self.program.graph_signature.input_specs:
            node = nodes[spec.arg.name]
            match spec.kind:
                case InputKind.PARAMETER | InputKind.BUFFER:
                    name = first[str(spec.target).removeprefix(PREFIX)]
                    is_parameter = spec.kind is InputKind.PARAMETER
                    role = Role.PARAMETER if is_parameter else Role.BUFFER
                    trains = is_parameter and parameters[name].requires_grad
                    self._add(node, name, role, trains)
                case InputKind.USER_INPUT:
                    if not isinstance(node.meta.get("val"), torch.Tensor):
                        continue  # a Python number, which the trace has burnt in
                    name = self._unique(next(given)[0])
                    self.input_names.append(name)
                    self._add(node, name, Role.INPUT, False)
                case InputKind.CONSTANT_TENSOR:
                    name = self._unique(f"constant.{str(spec.target).removeprefix(PREFIX)}")
                    self._add(node, name, Role.CONSTANT, False)
                    self._constant(name, self.program.constants[str(spec.target)], node)
                case _:
                    self.problems.append(f"an input of kind {spec.kind.name}: {spec.target}")

    def _add(self, node: fx.Node, name: str, role: Role, differentiable: bool) -> None:
        self.of[node] = name
        if name not in self.tensors:
            self.tensors[name] = Tensor(
                name, self._spec(node.meta["val"], node), role, differentiable
            )

    def _constant(self, name: str, value: Any, node: fx.Node) -> None:
        if not node.users:
            return
        if value.is_meta and value.numel():
            self.problems.append(
                f"the tensor {name.removeprefix('constant.')!r} is needed but has no value on the "
                "meta device: make it in forward, or register it as a buffer"
            )
        elif value.numel() > MAX_CONSTANT:
            self.problems.append(
                f"the constant tensor {name.removeprefix('constant.')!r} has {value.numel()} "
                f"elements, more than {MAX_CONSTANT}: register it as a buffer"
            )
        else:
            self.constants[name] = _tuples([] if value.is_meta else value.tolist())

    # -- operators

    def _consider(self, node: fx.Node) -> None:
        """Convert the call, or say once why not: what reads a refused result is not reported."""
        known, made = len(self.problems), len(self.operators)
        if not self.refused.intersection(node.all_input_nodes):
            self._call(node)
            if len(self.problems) == known:
                return
            del self.operators[made:]
        self.refused.add(node)

    def _call(self, node: fx.Node) -> None:
        op = str(node.target)
        if node.target is operator.getitem:
            self.of[node] = self.of[node.args[0]][node.args[1]]  # type: ignore[index]
        elif node.target is _NO_GRAD:
            self._inline(node)
        elif op in _NO_VALUE:
            return
        elif op in _DROPPED:
            self.of[node] = self.of[node.args[0]]  # type: ignore[index]
        elif not isinstance(node.target, torch._ops.OpOverload):
            self.problems.append(f"{op}{_where(node)}: not a tensor operator")
        elif self._does_nothing(node, op):
            whole = self.of[node.args[0]]  # type: ignore[index]
            self.of[node] = (str(whole),) if op == "aten.native_dropout.default" else whole
        elif op == "aten.broadcast_tensors.default":
            self._broadcast(node)
        elif op == "aten.einsum.default":
            self.of[node] = self._einsum(node)
        elif op == "aten.copy.default":  # a write to all of a tensor, which autograd cannot undo
            written = str(self.of[node.args[1]])  # type: ignore[index]
            self.of[node] = self._fitted(written, self._spec(node.meta["val"], node), _module(node))
        elif op == "aten.dropout.default":
            value = node.meta["val"]
            mask = torch.empty_like(value, dtype=torch.bool, device="meta")
            results = (value, mask)
            native: _Call = ("aten.native_dropout.default", node.args, {})
            self.of[node] = self._operator(node, native, results)[0]
        else:
            self.of[node] = self._operator(node, _rewritten(node), node.meta["val"])

    def _inline(self, node: fx.Node) -> None:
        """The calls of a region without gradients, and where they leave it a ``detach``."""
        region = _region(node)
        given = iter(node.args[2:])
        for inner in region.graph.nodes:
            if inner.op == "placeholder":
                self.of[inner] = self.of[next(given)]  # type: ignore[index]
            elif inner.op == "call_function":
                self._consider(inner)
        (output,) = region.graph.find_nodes(op="output")
        results = []
        for inner in output.args[0]:
            name = str(self.of[inner])
            if self.tensors[name].differentiable and not node.args[0]:
                detach: _Call = ("aten.detach.default", (inner,), {})
                name = str(self._operator(inner, detach, inner.meta["val"]))
            results.append(name)
        self.of[node] = tuple(results)

    def _does_nothing(self, node: fx.Node, op: str) -> bool:
        """Whether the only result that is used is the first argument itself."""
        if op in _DROPOUTS:
            _, p, training = node.args
            used = {user.args[1] for user in node.users} if "native" in op else {0}
            return (p == 0 or not training) and used == {0}
        if op == "aten.contiguous.default":
            before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
            return bool(before.stride() == after.stride())
        if op not in _OFTEN_IDENTITY or not isinstance(node.args[0], fx.Node):
            return False
        source = self.tensors[str(self.of[node.args[0]])]
        if op == "aten.detach.default":
            return not source.differentiable
        return source.spec == self._spec(node.meta["val"], node)

    def _broadcast(self, node: fx.Node) -> None:
        """Losses do this to tensors that mostly have the same shape: ``expand`` the others."""
        pairs = zip(node.args[0], node.meta["val"], strict=True)  # type: ignore[arg-type]
        self.of[node] = tuple(
            self._fitted(str(self.of[read]), self._spec(value, node), _module(node))
            for read, value in pairs
        )

    def _einsum(self, node: fx.Node) -> str:
        """Without an ellipsis, of at most two tensors in each operator."""
        value, module = node.meta["val"], _module(node)
        names = [str(self.of[read]) for read in node.args[1]]  # type: ignore[index, union-attr]
        given = str(node.args[0])
        equation = einsum.in_letters(given, [len(self.tensors[n].spec.shape) for n in names])
        if len(names) == 1 or (len(names) == 2 and "." not in given):
            args = given if "." not in given else equation, node.args[1]
            return str(self._operator(node, (str(node.target), args, {}), value))
        sizes: dict[str, int] = {}
        for text, name in zip(equation.partition("->")[0].split(","), names, strict=True):
            for letter, size in zip(text, self.tensors[name].spec.shape, strict=True):
                sizes[letter] = max(size, sizes.get(letter, 1))
        path: Any = node.kwargs.get("path") or ()
        for product in einsum.products(equation, path):
            pair = names[product.left], names[product.right]
            shape = tuple(sizes[c] for c in product.equation.partition("->")[2])
            arguments = (product.equation, (Input(0), Input(1)))
            spec = TensorSpec(shape, self._spec(value, node).dtype)
            made = self._added("aten.einsum.default", pair, spec, arguments, (), module)
            names = [n for i, n in enumerate(names) if i not in (product.left, product.right)]
            names.append(made)
        return names[0]

    def _fitted(self, name: str, spec: TensorSpec, module: str) -> str:
        """The tensor, cast and expanded to ``spec`` where it differs."""
        if self.tensors[name].spec.dtype != spec.dtype:
            cast = TensorSpec(self.tensors[name].spec.shape, spec.dtype)
            keywords = (("dtype", Dtype(spec.dtype)),)
            name = self._added(
                "aten._to_copy.default", (name,), cast, (Input(0),), keywords, module
            )
        if self.tensors[name].spec.shape != spec.shape:
            arguments = (Input(0), spec.shape)
            name = self._added("aten.expand.default", (name,), spec, arguments, (), module)
        return name

    def _added(
        self,
        op: str,
        sources: tuple[str, ...],
        spec: TensorSpec,
        arguments: tuple[Argument, ...],
        keywords: tuple[tuple[str, Argument], ...],
        module: str,
    ) -> str:
        """An operator that no node stands for."""
        name = self._unique(".".join(filter(None, (module, op.split(".")[1].strip("_")))))
        flows = any(self.tensors[source].differentiable for source in sources)
        self.tensors[name] = Tensor(name, spec, Role.ACTIVATION, flows and spec.is_floating)
        self.operators.append(Operator(name, op, sources, (name,), arguments, keywords, module))
        return name

    def _operator(self, node: fx.Node, call: _Call, results: Any) -> str | tuple[str, ...]:
        """Add the call, which gives ``results``; the names of these."""
        op, given, given_keywords = call
        inputs: list[str] = []
        arguments = tuple(self._argument(value, inputs, node) for value in given)
        keywords = tuple(
            (key, self._argument(value, inputs, node))
            for key, value in given_keywords.items()
            if key not in PLACEMENT_KEYWORDS
        )
        module = _module(node)
        short = op.split("::")[-1].split(".")[1 if op.startswith("aten.") else 0]
        name = self._unique(".".join(filter(None, (module, short.strip("_") or short))))
        flows = any(self.tensors[i].differentiable for i in inputs)
        flows = flows and not _GRADIENT_STOPS.match(op)
        several = isinstance(results, tuple | list)
        outputs = []
        for position, value in enumerate(results if several else (results,)):
            output = self._unique(f"{name}:{position}") if several else name
            if value is None:
                continue
            spec = self._spec(value, node)
            updated = _UPDATED.get(op, {}).get(position)
            if updated is not None:
                spec = self.tensors[str(self.of[given[updated]])].spec
            differentiable = flows and spec.is_floating
            if position and _ONLY_FIRST_DIFFERENTIABLE.match(op):
                differentiable = False
            self.tensors[output] = Tensor(output, spec, Role.ACTIVATION, differentiable)
            outputs.append(output)
        if op in _SHAPED:
            arguments = (arguments[0], self.tensors[name].spec.shape)
        self.operators.append(
            Operator(name, op, tuple(inputs), tuple(outputs), arguments, keywords, module)
        )
        return tuple(outputs) if several else name

    def _argument(self, value: Any, inputs: list[str], node: fx.Node) -> Argument:
        match value:
            case fx.Node():
                name = self.of[value]
                if isinstance(name, tuple):
                    return tuple(self._input(n, inputs) for n in name)
                return self._input(name, inputs)
            case torch.dtype():
                return Dtype(_dtype(value))
            case list() | tuple():
                return tuple(self._argument(item, inputs, node) for item in value)
            case None | bool() | int() | float() | str():
                return value
            case torch.device() | torch.layout() | torch.memory_format():
                return None
        self.problems.append(f"{node.target}{_where(node)}: argument {value!r}")
        return None

    @staticmethod
    def _input(name: str, inputs: list[str]) -> Input:
        inputs.append(name)
        return Input(len(inputs) - 1)

    def _spec(self, value: Any, node: fx.Node) -> TensorSpec:
        if not isinstance(value, torch.Tensor):
            self.problems.append(
                f"{node.target}{_where(node)}: makes a {type(value).__name__}, whose value the "
                "rest of the program needs; use fixed sizes"
            )
            return TensorSpec((), "int64")
        if any(not isinstance(size, int) for size in value.shape):
            self.problems.append(
                f"{node.target}{_where(node)}: the size of its result depends on the values of "
                "tensors; use fixed sizes and masking"
            )
            return TensorSpec((), "int64")
        name = _dtype(value.dtype)
        if name not in ITEM_BYTES:
            self.problems.append(f"{node.target}{_where(node)}: tensors of dtype {name}")
            return TensorSpec((), "int64")
        return TensorSpec(tuple(value.shape), name)

    def _unique(self, name: str) -> str:
        count = self.taken[name]
        self.taken[name] += 1
        return self._unique(f"{name}_{count}") if count else name

    # -- results

    def _outputs(self) -> tuple[str, list[tuple[str, str]]]:
        (output,) = self.program.graph.find_nodes(op="output")
        first = _first_names(self.model)
        loss, mutations = "", []
        signature = self.program.graph_signature
        for spec, node in zip(signature.output_specs, output.args[0], strict=True):
            name = str(self.of[node])
            if spec.kind is OutputKind.USER_OUTPUT:
                loss = name
            elif spec.kind is OutputKind.BUFFER_MUTATION:
                mutations.append((first[str(spec.target).removeprefix(PREFIX)], name))
            else:
                raise UnsupportedModelError(
                    f"the forward pass overwrites {spec.target}, which is not a buffer: register "
                    "it as one, or make a new tensor"
                )
        if not self.tensors[loss].differentiable:
            raise UnsupportedModelError(
                "the loss does not depend on any parameter that is trained: nothing to plan "
                "(is everything frozen, detached or under no_grad?)"
            )
        return loss, mutations


def _rewritten(node: fx.Node) -> _Call:
    """The call in the operators that a decomposition would use."""
    op, value = str(node.target), node.meta["val"]
    if op in _CASTS:
        return "aten._to_copy.default", node.args[:1], {"dtype": value.dtype}
    if op in _RESHAPES:
        before = node.args[0].meta["val"]  # type: ignore[union-attr]
        view = "aten.view.default" if _can_view(before, value) else "aten.reshape.default"
        return view, (node.args[0], tuple(value.shape)), {}
    if op == "aten.expand_as.default":
        return "aten.expand.default", (node.args[0], tuple(value.shape)), {}
    if op == "aten.contiguous.default":
        return "aten.clone.default", node.args[:1], {}
    if op == "aten.chunk.default":
        dim = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
        return "aten.split.Tensor", (node.args[0], value[0].shape[dim], dim), {}
    return _FILLED_LATER.get(op, op), node.args, node.kwargs


def _can_view(before: torch.Tensor, after: torch.Tensor) -> bool:
    """Whether no copy is needed to see ``before`` in the shape of ``after``."""
    hollow = torch.empty_strided(before.shape, before.stride(), device="meta")
    try:
        hollow.view(after.shape)
    except RuntimeError:
        return False
    return True


def _first_names(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter or buffer -> the first name of the same tensor."""
    first: dict[int, str] = {}
    names: dict[str, str] = {}
    tensors = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    for name, tensor in tensors:
        names[name] = first.setdefault(id(tensor), name)
    return names


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _module(node: fx.Node) -> str:
    """Dotted path of the module that made the call; '' for the model itself."""
    stack = node.meta.get("nn_module_stack") or {}
    path = re.sub(r"@\d+", "", str(list(stack.values())[-1][0])) if stack else ""
    return path.removeprefix(PREFIX.rstrip(".")).removeprefix(".")


def _where(node: fx.Node) -> str:
    module = _module(node)
    return f" in module {module!r}" if module else ""


def _live(operators: Iterable[Operator], wanted: set[str]) -> Iterator[Operator]:
    """The operators that ``wanted`` depend on, in their order."""
    kept = []
    needed = set(wanted)
    for o in reversed(list(operators)):
        if needed.intersection(o.outputs):
            needed.update(o.inputs)
            kept.append(o)
    return reversed(kept)


def _receiving(operators: list[Operator], loss: str, tensors: dict[str, Tensor]) -> set[str]:
    """The tensors through which a gradient of ``loss`` flows."""
    receiving = {loss}
    for o in reversed(operators):
        if receiving.intersection(o.outputs):
            receiving.update(name for name in o.inputs if tensors[name].differentiable)
    return receiving


def _fuse_copies(operators: list[Operator], tensors: dict[str, Tensor]) -> list[Operator]:
    """One ``reshape`` for a contiguous copy that is only made to be viewed; ``view`` for the rest.

    What ``x.transpose(1, 2).reshape(...)`` becomes in the trace is a copy and a view of it.
    """
    readers: dict[str, list[Operator]] = {}
    for o in operators:
        for name in set(o.inputs):
            readers.setdefault(name, []).append(o)
    views = ("aten.view.default", "aten._unsafe_view.default")
    copies = {
        o.outputs[0]: o.inputs[0]
        for o in operators
        if o.op == "aten.clone.default"
        and readers.get(o.outputs[0])
        and all(reader.op in views for reader in readers[o.outputs[0]])
    }
    fused = []
    for o in operators:
        if o.outputs[0] in copies:
            continue
        if o.op in views:
            source = copies.get(o.inputs[0])
            op = "aten.view.default" if source is None else "aten.reshape.default"
            o = Operator(o.name, op, (source or o.inputs[0],), o.outputs, *_rest(o))
        fused.append(o)
    return fused


def _fuse_gathers(operators: list[Operator], tensors: dict[str, Tensor]) -> list[Operator]:
    """One op for ``bmm(rows, table[index])``, where each row has a matrix of its own and nothing
    else reads ``table[index]``: that would be a copy of a matrix for every row."""
    readers = Counter(name for o in operators for name in o.inputs)
    picked = {
        o.outputs[0]: o
        for o in operators
        if _picks_matrices(o, tensors) and readers[o.outputs[0]] == 1
    }
    fused: list[Operator] = []
    used: set[str] = set()
    for o in operators:
        if o.op == "aten.bmm.default":
            for table in (0, 1):
                row = tensors[o.inputs[1 - table]].spec.shape[2 - table]
                gather = picked.get(o.inputs[table])
                if gather is not None and row == 1:
                    given = list(o.inputs)
                    given[table] = gather.inputs[0]
                    inputs = (*given, gather.inputs[1])
                    arguments = (Input(0), Input(1), Input(2), table)
                    used.add(gather.name)
                    o = Operator(o.name, GATHER_BMM, inputs, o.outputs, arguments, (), o.module)
                    break
        fused.append(o)
    return [o for o in fused if o.name not in used]


def _picks_matrices(o: Operator, tensors: dict[str, Tensor]) -> bool:
    if o.op != "aten.index.Tensor" or o.arguments[1:] != ((Input(1),),):
        return False
    table, index = (tensors[name].spec for name in o.inputs)
    return len(table.shape) == 3 and len(index.shape) == 1 and index.dtype != "bool"


def _rest(o: Operator) -> tuple[tuple[Argument, ...], tuple[tuple[str, Argument], ...], str]:
    return o.arguments, o.keywords, o.module
