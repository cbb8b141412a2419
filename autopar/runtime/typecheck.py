"""The lowered program checked by ``spmd_types``: no rank mixes what may not be mixed, and no
gradient misses a reduction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import spmd_types
import torch
from spmd_types.checker import typecheck as checking
from torch import Tensor, fx

from autopar.errors import VerificationError
from autopar.ir.sharding import Sharding
from autopar.runtime.lowering import Execution, LocalOperator, LoweredProgram


def typecheck(
    program: LoweredProgram,
    execution: Execution,
    buffers: Mapping[str, Tensor],
    inputs: Mapping[str, Tensor],
) -> None:
    """Run the forward, fake or real, with ``spmd_types`` deriving the type of every tensor.

    Told to it: how parameters are stored, and that each redistribution takes its source to its
    target. Derived: what each operator makes of its inputs' types, which must be what the plan
    says. Where an operator sums over what an axis divides, where it takes partial sums, and where
    it has an implementation of its own, the rule's word is taken for the result (rules are checked
    by execution); that its inputs lie as the rule wants them is checked there too.

    Raises:
        VerificationError: an operator is given what it must not be given.
    """
    checker = _Checker(program, execution)
    # a type is an attribute of the tensor: leave the caller's alone
    values = {
        name: tensor.detach().requires_grad_(tensor.requires_grad)
        for name, tensor in {**execution.parameters, **buffers, **inputs}.items()
    }
    names = (*program.parameters, *program.buffers, *program.inputs)
    try:
        with spmd_types.set_current_mesh(checker.axes), checking():
            given = (values[name] for name in names)
            results = checker.run(execution, execution.communicator, *given)
            for (name, sharding), result in zip(program.ends.items(), results, strict=False):
                what = "the loss" if name == program.graph.loss else name
                checker.expect(result, sharding, what)
    except spmd_types.SpmdTypeError as error:
        raise VerificationError(f"in {checker.at}: {error}") from error


class _Checker(fx.Interpreter):
    def __init__(self, program: LoweredProgram, execution: Execution) -> None:
        super().__init__(program.graph_module)
        self.communicator = execution.communicator
        mesh = self.communicator.device_mesh
        self.axes = {
            name: spmd_types.MeshAxis.of(mesh.get_group(name)) for name in program.mesh.names
        }
        self.at = "the inputs"

    def run_node(self, node: fx.Node) -> Any:
        self.at = node.meta.get("operator") or node.name
        if "wanted" in node.meta:
            return self._operator(node)
        if node.target is torch.ops.aten.detach.default:
            with spmd_types.no_typecheck():
                detached = super().run_node(node)
            return spmd_types.assert_type(detached, self.communicator.types(node.meta["sharding"]))
        value = super().run_node(node)
        if node.op in ("placeholder", "get_attr") and isinstance(value, Tensor):
            return spmd_types.assert_type(value, self.communicator.types(node.meta["sharding"]))
        return value

    def _operator(self, node: fx.Node) -> Any:
        """Call it; derive or declare the types of its results, and compare with the plan."""
        given = [self.env[source] for source in node.meta["given"]]
        for index, (tensor, wanted) in enumerate(zip(given, node.meta["wanted"], strict=True)):
            self.expect(tensor, wanted, f"its input {index}")
        declared = self._is_local(node) or any("P" in wanted for wanted in node.meta["wanted"])
        if declared or not given:
            with spmd_types.no_typecheck():
                result = super().run_node(node)
        else:
            result = super().run_node(node)
        results: Sequence[Tensor] = (result,) if isinstance(result, Tensor) else result
        for tensor, produced in zip(results, node.meta["produced"], strict=False):
            self._settle(tensor, produced, derived=bool(given) and not declared)
        return result

    def _is_local(self, node: fx.Node) -> bool:
        return node.op == "call_module" and isinstance(
            self.module.get_submodule(str(node.target)), LocalOperator
        )

    def expect(self, tensor: Tensor, sharding: Sharding, what: str) -> None:
        found, wanted = spmd_types.get_local_type(tensor), self.communicator.types(sharding)
        for axis, kind in wanted.items():
            if not self._same(found.get(axis), kind, tensor):
                raise spmd_types.SpmdTypeError(
                    f"{what} is {found.get(axis)} on axis {axis}, where {kind} is wanted"
                )

    def _settle(self, tensor: Tensor, sharding: Sharding, *, derived: bool) -> None:
        """Give a result its planned type, if that may be said of the derived one.

        Varying pieces may be called a partial sum; copies may be called varying (each rank then
        keeps its own); where no gradient flows R and I are one.
        """
        planned = self.communicator.types(sharding)
        if not derived:
            spmd_types.assert_type(tensor, planned)
            return
        found = dict(spmd_types.get_local_type(tensor))
        for axis, kind in planned.items():
            before = found.get(axis)
            may = (before, kind) in (
                (spmd_types.V, spmd_types.P),
                (spmd_types.R, spmd_types.V),
            )
            if not may and not self._same(before, kind, tensor):
                raise spmd_types.SpmdTypeError(
                    f"its result is {before} on axis {axis}, where the plan says {kind}"
                )
            if before != kind:
                spmd_types.mutate_type(tensor, axis, src=before, dst=kind)

    @staticmethod
    def _same(found: Any, wanted: Any, tensor: Tensor) -> bool:
        copies = {spmd_types.R, spmd_types.I}
        no_gradient = not (tensor.requires_grad and torch.is_grad_enabled())
        return bool(found == wanted or (no_gradient and {found, wanted} == copies))
