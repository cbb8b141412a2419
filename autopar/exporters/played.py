"""The rows of a plan played on its own machine, for drawings."""

from __future__ import annotations

import numpy as np

from autopar.errors import AutoparError
from autopar.exporters.explanation import ranges_text
from autopar.ir.plan import Plan
from autopar.schedules import SCHEDULES
from autopar.simulator.microbatches import division
from autopar.simulator.pipeline import Instant, Pipeline, StageCost
from autopar.simulator.pipelines import PricedPipeline, StagePrices
from autopar.simulator.stages import pipelined
from autopar.simulator.timeline import Clock, Timeline, simulate
from cost_models.saved import cost_model_from_json


def timeline(plan: Plan) -> Timeline:
    """Of one stage: its microbatches one after the other, as long as the estimate says. Where
    hosts are slower than their devices, all takes longer by the same factor.

    Raises:
        AutoparError: the plan's machine is of a cost model that is not saved with it.
    """
    found, step_s = _on_devices(plan), plan.estimate.step_time_s
    devices_s = float(found.step_time_s)
    if not plan.estimate.launches_s or not devices_s:
        return found
    return found.by(Clock(np.array([0.0, devices_s]), np.array([0.0, step_s])))


def _on_devices(plan: Plan) -> Timeline:
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
