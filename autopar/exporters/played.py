"""The rows of a plan played on its own machine, for drawings."""

from __future__ import annotations

from autopar.errors import AutoparError
from autopar.exporters.explanation import ranges_text
from autopar.ir.plan import Plan
from autopar.schedules import SCHEDULES
from autopar.simulator.microbatches import division
from autopar.simulator.pipeline import Instant, Pipeline, StageCost
from autopar.simulator.pipelines import PricedPipeline, StagePrices
from autopar.simulator.stages import pipelined
from autopar.simulator.timeline import Timeline, simulate
from cost_models.saved import cost_model_from_json


def timeline(plan: Plan) -> Timeline:
    """Of one stage: its microbatches one after the other, as long as the estimate says.

    Raises:
        AutoparError: the plan's machine is of a cost model that is not saved with it.
    """
    if len(plan.strategy.stages) > 1:
        try:
            cost_model = cost_model_from_json(plan.topology)
        except ValueError as error:
            raise AutoparError(str(error)) from error
        divided = division(plan.graph, plan.strategy.microbatches, plan.proposed)
        found = pipelined(divided, plan.strategy)
        return PricedPipeline(found, StagePrices(cost_model)).timeline
    e, times = plan.estimate, plan.strategy.microbatches
    cost = StageCost(
        forward_s=(e.forward_compute_s + e.forward_communication_s) / times,
        backward_s=(e.backward_compute_s + e.backward_communication_s) / times,
        update_s=e.gradient_synchronisation_s + e.optimizer_s,
    )
    return simulate(SCHEDULES["1f1b"](1, times), Pipeline((cost,), (), Instant()))


def row_names(plan: Plan) -> list[str]:
    if plan.pipeline is None:
        return [f"devices {ranges_text(range(plan.world_size))}"]
    return [
        f"row {number}: devices {ranges_text(row.devices)}, "
        f"stage{'s' if len(row.stages) > 1 else ''} {ranges_text(row.stages)}"
        for number, row in enumerate(plan.pipeline.rows)
    ]


__all__ = ["row_names", "timeline"]
