"""What parameters and gradients cost beside collectives: moves, sums of microbatches, updates."""

from __future__ import annotations

from autopar.ir.graph import ITEM_BYTES, TensorSpec
from autopar.ir.sharding import gradient, local_elements
from autopar.ir.strategy import Storage, Training
from autopar.simulator.costs import Costs
from autopar.simulator.edges import ParameterEdge, Rules
from autopar.simulator.memory import local_bytes
from autopar.simulator.overlap import NOTHING_AT_ONCE, Overlap


def parameter_moves_s(edge: ParameterEdge, costs: Costs) -> tuple[float, float]:
    """Slices and masks of a parameter on its way to use, and of its gradient on the way back."""
    forward = costs.moves_s(edge.spec, edge.storage.parameter, edge.target, backward=False)
    if not edge.trainable:
        return forward, 0.0
    source = gradient(edge.target)
    return forward, costs.moves_s(edge.spec, source, edge.destination, backward=False)


def added_in_products(edge: ParameterEdge, rules: Rules, overlap: Overlap) -> bool:
    return overlap.added_in_products and all(rules[n].rule.products for n in edge.consumers)


def sum_of_s(edge: ParameterEdge, microbatches: int, costs: Costs) -> float:
    """Of each microbatch's backward, what adds its gradient to those of the others."""
    if not edge.trainable or microbatches == 1:
        return 0.0
    size = local_bytes(edge.spec, edge.summed, costs.mesh)
    return sum_time_s(size, microbatches, edge.spec, costs) / microbatches


def sum_time_s(size_bytes: float, microbatches: int, spec: TensorSpec, costs: Costs) -> float:
    """Adding up as many gradients of this size: of each but the first two are read, one is
    written."""
    return (microbatches - 1) * costs.memory_bound_s(3.0 * size_bytes, spec.dtype)


def optimizer_time_s(
    spec: TensorSpec,
    storage: Storage,
    training: Training,
    costs: Costs,
    overlap: Overlap = NOTHING_AT_ONCE,
) -> float:
    """The update of one parameter's shard."""
    elements = local_elements(spec.shape, storage.optimizer, costs.mesh)
    return update_time_s(elements, spec, training, costs, overlap.update_bytes)


def update_time_s(
    elements: int, spec: TensorSpec, training: Training, costs: Costs, beside_bytes: int = 0
) -> float:
    """An update of so many elements: the gradient is read, parameter and states are read and
    written. In mixed precision the parameter is the master copy, for which the gradient is cast
    before, and from which the parameter is cast after it. ``beside_bytes``: moved for each element
    before and after that."""
    mixed, states = training.precision == "mixed", training.state_tensors
    dtype = "float32" if mixed else spec.dtype
    moved = elements * (ITEM_BYTES[dtype] * (3 + 2 * states) + beside_bytes)
    if mixed:
        moved += elements * 2 * (ITEM_BYTES[spec.dtype] + ITEM_BYTES[dtype])
    return costs.memory_bound_s(float(moved), dtype, f"update {states}")
