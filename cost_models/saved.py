"""A cost model as JSON and back, so that a plan file carries the machine it was made for."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from cost_models.analytical import Analytical
from cost_models.calibration import Calibration, read_calibration
from cost_models.interface import CostModel
from cost_models.profiled import Profiled, profile_from_json, profile_to_json
from cost_models.topology import Device, Tier, Topology


def cost_model_to_json(cost_model: CostModel) -> dict[str, Any]:
    """``name``, ``devices``, ``memory_bytes``, and under ``analytical`` or ``profiled`` all that
    the model reads; a cost model of another class has no such key and cannot be read back."""
    found: dict[str, Any] = {
        "name": type(cost_model).__name__,
        "devices": cost_model.devices,
        "memory_bytes": cost_model.memory_bytes,
    }
    match cost_model:
        case Analytical():
            found["name"] = cost_model.topology.name
            found["analytical"] = asdict(cost_model.topology)
            found["calibration"] = asdict(cost_model.calibration)
        case Profiled():
            found["name"] = f"local ({cost_model.profile.device})"
            found["profiled"] = profile_to_json(cost_model.profile)
    plain: dict[str, Any] = json.loads(json.dumps(found))  # tuples become lists, as in a file
    return plain


def cost_model_from_json(data: dict[str, Any]) -> CostModel:
    """Raises ``ValueError`` when ``data`` is not what ``cost_model_to_json`` gives, or is of a
    class that only its author can make."""
    try:
        if "analytical" in data:
            # plans made before there was one have none
            known = data.get("calibration")
            calibration = read_calibration() if known is None else Calibration(**known)
            return Analytical(_topology(data["analytical"]), calibration)
        if "profiled" in data:
            return Profiled(profile_from_json(data["profiled"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"the description of the machine is damaged ({error!r})") from error
    raise ValueError(f"{data.get('name')!r} is a cost model of the user's own, not kept in files")


def _topology(data: dict[str, Any]) -> Topology:
    device = {"attention_as_products": False, **data["device"]}  # earlier files mean those of then
    known = ("peak_flops_per_s", "achievable_flops_per_s", "attention_flops_per_s")
    rates = [rate for rate in known if rate in device]  # earlier files have fewer
    return Topology(
        **{
            **data,
            "device": Device(**{**device, **{k: _pairs(device[k]) for k in rates}}),
            "tiers": tuple(Tier(**tier) for tier in data["tiers"]),
        }
    )


def _pairs(rows: list[list[Any]]) -> tuple[tuple[str, float], ...]:
    return tuple((dtype, rate) for dtype, rate in rows)
