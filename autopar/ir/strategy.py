"""What is chosen: a split for each operator, a storage for each parameter, a training recipe."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from autopar.errors import AutoparError
from autopar.ir.rule import Split
from autopar.ir.sharding import Mesh, Sharding


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained with; fixed by the user, not searched.

    ``precision="mixed"``: the graph is in bf16 and the optimizer keeps an fp32 master copy.
    ``clip_norm``: gradients are clipped to this global norm.
    """

    optimizer: Literal["sgd", "momentum", "adam", "adamw"] = "adamw"
    precision: Literal["full", "mixed"] = "full"
    clip_norm: float | None = None

    @property
    def state_tensors(self) -> int:
        """Tensors of optimizer state for a parameter, the master copy not counted."""
        return {"sgd": 0, "momentum": 1, "adam": 2, "adamw": 2}[self.optimizer]


@dataclass(frozen=True, slots=True)
class Storage:
    """How a parameter, its gradient and its optimizer state are kept between microbatches.

    Each placement is ``I`` (whole) or ``S(d)``. On an axis: all ``I`` is plain replication;
    ``optimizer`` alone sharded is ZeRO-1 (the gradient stays whole until the end of the step and
    is then reduce-scattered to the optimizer's shards); with ``gradient`` ZeRO-2; all three ZeRO-3
    (and the way a tensor-parallel parameter is kept). A sharded ``parameter`` has its ``gradient``
    sharded the same way, and a sharded ``gradient`` its ``optimizer``.
    """

    parameter: Sharding
    gradient: Sharding
    optimizer: Sharding


@dataclass(frozen=True, slots=True)
class Stage:
    """Operators that run on one set of devices, given in the order of the mesh's ranks.

    ``storage``: parameters that another stage reads, too, and that this one keeps otherwise than
    ``Strategy.storage`` says, on its own mesh.
    """

    operators: tuple[str, ...]
    devices: tuple[int, ...]
    mesh: Mesh
    storage: dict[str, Storage] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Strategy:
    """Every choice of a plan. ``splits`` by operator name, ``storage`` by parameter name.

    Several stages need a ``schedule``, a name of the schedules shelf; ``chunks``: how many of them
    (for chimera: copies of them) a group of devices holds, ``None`` for as many as it follows from
    the devices (for chimera: 2).

    ``recompute``: names of operators of which nothing is kept for the backward, neither what they
    make nor what they save beside, whoever needs it. Those that follow one another (in the order of
    the graph, in one stage) are a *segment*: before the first backward that misses something of it,
    what made that is run again, from its inputs, which are kept. A segment's inputs are made by
    operators that are not recomputed, or are kept all the same; so operators left out between two
    runs decide what is kept.

    Collectives are not repeated: what a redistribution of such a tensor brought is kept, unless the
    tensor is in ``repeat_collectives``; then it is not, and the redistribution is done again (as
    are the collectives inside the operator that makes it). Gathered parameters (ZeRO-3) are never
    kept: an operator that is run again gathers its own, and uses them for its backward as well.
    Dropout masks are the same again. New values of buffers are those of the first time.
    """

    stages: tuple[Stage, ...]
    splits: dict[str, Split] = field(hash=False)
    storage: dict[str, Storage] = field(hash=False)
    microbatches: int = 1
    recompute: tuple[str, ...] = ()
    schedule: str | None = None
    training: Training = Training()
    chunks: int | None = None
    repeat_collectives: tuple[str, ...] = ()

    @cached_property
    def mesh(self) -> Mesh:
        """The mesh of the only stage."""
        if len(self.stages) != 1:
            raise AutoparError(
                f"this is for strategies of one stage, and this one has {len(self.stages)}; each "
                "of them has a mesh of its own"
            )
        return self.stages[0].mesh

    @cached_property
    def mesh_of(self) -> dict[str, Mesh]:
        """By operator, the mesh of its stage."""
        return {name: stage.mesh for stage in self.stages for name in stage.operators}

    def kept(self, stage: int, parameter: str) -> Storage:
        """How a stage keeps a parameter that it reads."""
        own = self.stages[stage].storage.get(parameter)
        return self.storage[parameter] if own is None else own

    @property
    def devices(self) -> int:
        """How many devices the stages run on."""
        return len({device for stage in self.stages for device in stage.devices})


def strategy_to_json(strategy: Strategy) -> dict[str, Any]:
    return {
        "stages": [
            {
                "operators": list(s.operators),
                "devices": list(s.devices),
                "mesh": [list(axis) for axis in s.mesh.axes],
                **({"storage": _storages_to_json(s.storage)} if s.storage else {}),
            }
            for s in strategy.stages
        ],
        "splits": {name: list(split) for name, split in strategy.splits.items()},
        "storage": _storages_to_json(strategy.storage),
        "microbatches": strategy.microbatches,
        "recompute": list(strategy.recompute),
        "schedule": strategy.schedule,
        **({} if strategy.chunks is None else {"chunks": strategy.chunks}),
        **(
            {"repeat_collectives": list(strategy.repeat_collectives)}
            if strategy.repeat_collectives
            else {}
        ),
        "training": {
            "optimizer": strategy.training.optimizer,
            "precision": strategy.training.precision,
            "clip_norm": strategy.training.clip_norm,
        },
    }


def strategy_from_json(data: dict[str, Any]) -> Strategy:
    return Strategy(
        stages=tuple(
            Stage(
                tuple(s["operators"]),
                tuple(s["devices"]),
                Mesh(tuple((name, size) for name, size in s["mesh"])),
                _storages_from_json(s.get("storage", {})),
            )
            for s in data["stages"]
        ),
        splits={name: tuple(split) for name, split in data["splits"].items()},
        storage=_storages_from_json(data["storage"]),
        microbatches=data["microbatches"],
        recompute=tuple(data["recompute"]),
        schedule=data["schedule"],
        training=Training(**data["training"]),
        chunks=data.get("chunks"),
        repeat_collectives=tuple(data.get("repeat_collectives", ())),
    )


def _storages_to_json(storages: dict[str, Storage]) -> dict[str, Any]:
    return {
        name: [list(s.parameter), list(s.gradient), list(s.optimizer)]
        for name, s in storages.items()
    }


def _storages_from_json(data: dict[str, Any]) -> dict[str, Storage]:
    return {name: Storage(tuple(p), tuple(g), tuple(o)) for name, (p, g, o) in data.items()}
