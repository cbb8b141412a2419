"""What programs of published runs do, by their family and the time from which they do it.

A row says of its program which family it is of (what shards parameters is of FSDP's kind unless its
source is called Megatron or NeMo, all else of Megatron-LM's), whether it has fused attention, and
often when it was written: the number of a paper on arXiv and the release of NeMo are dates. What
Megatron-LM has had since when is in its history (NVIDIA/Megatron-LM), and what DeepSpeed has in its
own; the commits are named below.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from typing import TypeVar

from autopar.simulator.overlap import OneByOne

SINCE = {
    # 83b1e42f30, --gradient-accumulation-fusion: products add to the gradients of their weights
    "added_in_products": date(2022, 2, 16),
    # 16c90445e7, --async-tensor-model-parallel-allreduce: beside gradients of weights
    "sums": date(2021, 9, 2),
    # a2fdcdf061, --persist-layer-norm: Apex's norm, whose backward is one pass
    "norms_in_one_pass": date(2021, 11, 10),
    # 2d5220a424, --overlap-grad-reduce, and f048bf8c08, --overlap-param-gather
    "replicas": date(2023, 11, 17),
    # f9283c5a8a, --overlap-p2p-communication, where a device has several stages
    "messages_beside": date(2023, 5, 31),
    # 3db741160b, --fp8-recipe tensorwise: the scale of a tensor is that of its own largest number
    # or of its blocks, and what is cast is a norm's result; before, norms wrote what products take
    "own_scales": date(2025, 3, 22),
    # 0d389f5e99, DeepEP: tokens go once to each host, for models that limit these
    "once_to_hosts": date(2025, 2, 25),
    # the same on chips after H100: NVIDIA-NeMo/Megatron-Bridge 1fd34b18c and 7c06ec0c0
    "once_to_newer_hosts": date(2026, 1, 9),
    # ae1c88296f, --overlap-moe-expert-parallel-comm: forward and backward of two microbatches
    "experts_beside": date(2025, 8, 1),
    # 3df200905e, HybridEP: once to each device, where a rack has one switch
    "once_in_racks": date(2025, 11, 18),
    # 6815c0fefe and f007db77b9: experts in one kernel, places of tokens found on the device
    "whole_experts": date(2026, 5, 22),
    # 77efcccb93, --timing-log-level: before, the host waits for its device to time each pass
    "passes_untimed": date(2022, 8, 10),
    # 116ffddc58, Transformer Engine's user buffers: gathers and scatters in pieces of a product
    "in_pieces": date(2023, 10, 23),
}
"""Fused softmax, dropout with the residual sum, and GELU with its bias it has had since 51a2e6b0ff
and d73def35a3 (2020-09), before all runs that are known here."""

DEEPSPEED = {
    # 7b46d11fa2: a hook begins to count steps one too late, and what is read next is not known
    # from then on (issue 1069: nothing is gathered ahead)
    "loses_its_trace": date(2021, 4, 7),
    # 0d4a54a04d: a message that is not shown has the norm of each parameter that was gathered
    "norms": date(2021, 4, 18),
    # c0eeb69dfb: parameters are gathered into one buffer, without parts and copies of these
    "in_one_buffer": date(2021, 10, 31),
}
"""The same of ZeRO-3 in microsoft/DeepSpeed."""

COMPILED_LOSS = date(2025, 4, 2)
"""bbb1b616e of pytorch/torchtitan (``build_cross_entropy_loss``): where a run is compiled, so is
its loss, which then makes nothing wide of logits. Before, that met errors of CUDA (e23bb707d)."""

FIRST = date(2021, 4, 9)
"""Assumed of a program without fused attention that does not say when it was written: the kernels
of arXiv 2104.04473, section 4.2. With fused attention it is assumed to be a new one."""

MONTHS = (
    re.compile(r"arXiv[: ]+(\d\d)(\d\d)\.\d{4,5}"),
    re.compile(r"NeMo (\d\d)\.(\d\d)"),
    re.compile(r"(?<!\d)20([12]\d)-?([01]\d)(?!\d)"),
)
"""How a source tells the year and the month."""


MEGATRON = re.compile(r"megatron|\bnemo\b", re.IGNORECASE)
"""How a source tells that it is of Megatron-LM's family also where parameters are sharded."""

MEASURED = {"MP PURE": date(2023, 5, 24)}
"""When a run was measured, by what ``precision`` says: tables of llm-foundry say PURE of what ran
with torch 1.13 (mosaicml/llm-foundry@1ef7b4d21, scripts/train/benchmarking: README.md, sweep.sh),
and DEFAULT of what ran with torch 2.1 (b2a43a147 and 5e85bd62d, 2023-10 and 2024-01)."""

STOPS_EARLY = date(2023, 10, 4)
"""Release of torch 2.1, from which torch.utils.checkpoint ends a forward that is run again where
nothing is missing any more (``set_checkpoint_early_stop``; that it came then is from memory): a
block's last product is not repeated.
"""

REPEATED_UNTIL = date(2026, 1, 27)
"""pytorch/torchtitan ff0829c10, "GQA without kv repeats": before, ``repeat_kv`` makes keys and
values for each head of queries."""

GATHERED = {"fp8 allgather": 1}
"""Bytes of an element of a parameter that FSDP gathers, by what ``precision`` says."""

REDUCED = {"FSDP2": 4, "MP DEFAULT": 4}
"""Of its gradient, by what ``zero_fsdp`` or ``precision`` says: torchtitan's
``mixed_precision_reduce`` is float32, and so is Composer's ``DEFAULT``, which gathers what products
take (mosaicml/composer@v0.16.4, ``composer/trainer/mosaic_fsdp_utils.py``)."""

FORK = re.compile(r"deepspeed|bigscience|mt-?nlg", re.IGNORECASE)
"""How a row tells that DeepSpeed trained a model of Megatron-LM's. Its Megatron-LM is a fork (Smith
et al. 2022, arXiv 2201.11990; BigScience's is one of that)."""

FORKED = date(2021, 5, 15)
"""Last commit of NVIDIA's in the history of bigscience-workshop/Megatron-DeepSpeed (42c1cf4279);
at its last commit, in 2023, it has nothing of ``SINCE``."""

METRICS = {"MPT": 2}
"""Cross-entropies of each microbatch that are only measured, by how ``model_family`` begins:
Composer updates ``LanguageCrossEntropy`` and ``LanguagePerplexity`` after the backward, under
autocast, which makes them float32 (mosaicml/composer@v0.14.1, ``composer/trainer/trainer.py``,
``_eval_train_metrics``; mosaicml/llm-foundry, ``llmfoundry/models/mpt/modeling_mpt.py``)."""


@dataclass(frozen=True, slots=True)
class Program:
    """``is_megatron``: whether it is of Megatron-LM's family rather than of FSDP and DeepSpeed;
    ``shards``: parameters, gathered ahead (Megatron-LM has its own FSDP).
    ``written``: the day to which its features are looked up, ``None``: today. ``gathered_bytes``,
    ``reduced_bytes``: of elements of parameters and gradients, of FSDP; 0: as products take them.
    ``flat``: FSDP's first version, whose parameters are parts of one tensor
    (torch/distributed/fsdp/_flat_param.py): the backward of its split concatenates gradients, which
    are cast and divided before they are reduced (_runtime_utils.py, ``_post_backward_hook``).
    ``per_parameter``: FSDP2, which copies each parameter out of the gathered buffer
    (torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py) and came with torch 2.4, whose own
    fused attention is FlashAttention-2. Its programs are torchtitan's, whose rotary positions are
    complex numbers (``apply_rotary_emb``), and contexts torch's ring. In a pipeline they gather
    parameters once a step, and reduce gradients after its last microbatch (torchtitan's
    ``reshard_after_forward``; torch/distributed/pipelining/stage.py,
    ``backward_maybe_with_nosync``). ``is_deepspeed``: DeepSpeed of a time that is told.
    ``compiled_loss``: cross-entropy is what a compiler makes of it. ``in_pieces``: gathers and
    scatters between tensor-parallel products go on piece by piece beside them (torch's symmetric
    memory, ``_micro_pipeline_tp``), where its name or notes say async TP.
    """

    is_megatron: bool = True
    written: date | None = None
    gathered_bytes: int = 0
    reduced_bytes: int = 0
    flat: bool = False
    per_parameter: bool = False
    metrics: int = 0
    is_deepspeed: bool = False
    shards: bool = False
    compiled_loss: bool = False
    in_pieces: bool = False

    def has(self, feature: str) -> bool:
        return self.is_megatron and self._is_since(SINCE[feature])

    @property
    def one_by_one(self) -> OneByOne | None:
        """How it gathers parameters one by one, if it does."""
        has = {feature: self._is_since(day) for feature, day in DEEPSPEED.items()}
        if not self.is_deepspeed or has["in_one_buffer"]:
            return None
        return OneByOne(traced=not has["loses_its_trace"], norms=has["norms"])

    def _is_since(self, day: date) -> bool:
        return self.written is None or self.written >= day

    @property
    def repeats_keys(self) -> bool:
        """For all queries that share them (torchtitan)."""
        return self.per_parameter and self.written is not None and self.written < REPEATED_UNTIL

    @property
    def stops_early(self) -> bool:
        """Of recomputation: torch's does, and Megatron-LM's own runs all again that it was given
        (``CheckpointFunction`` of megatron/core/tensor_parallel/random.py, and of mpu before)."""
        return not self.is_megatron and (self.written is None or self.written >= STOPS_EARLY)


NEW = Program()
"""Megatron-LM as it is today."""


def program_of(row: Mapping[str, str], *, shards: bool, flash: bool) -> Program:
    """``shards``: parameters; ``flash``: whether attention is one kernel."""
    told, sharding = written(row["source"]), row["zero_fsdp"].upper()
    if not shards and FORK.search(row["source"] + sharding):
        told = min(told or FORKED, FORKED)
    is_second = shards and "FSDP2" in sharding
    called = f"{row['config_id']} {row['notes']}".lower()
    is_compiled = "compile" in called and told is not None and told >= COMPILED_LOSS
    return Program(
        is_megatron=not shards or bool(MEGATRON.search(row["source"])),
        written=told or _said(row["precision"], MEASURED, None) or (None if flash else FIRST),
        gathered_bytes=_said(row["precision"], GATHERED, 0) * shards,
        reduced_bytes=_said(sharding + row["precision"], REDUCED, 0) * shards,
        flat=shards and not is_second and _is_torchs(row["source"], sharding),
        per_parameter=is_second,
        metrics=_said(row["model_family"], METRICS, 0),
        is_deepspeed=shards and told is not None and FSDP.search(sharding) is None,
        shards=shards,
        compiled_loss=is_second and is_compiled,
        in_pieces=re.search(r"async.?tp", called) is not None,
    )


def _is_torchs(source: str, sharding: str) -> bool:
    """And not the one that NeMo has of its own."""
    return FSDP.search(sharding) is not None and "NeMo" not in source


FSDP = re.compile(r"SDP|FULL_SHARD|FULLY.?SHARDED")
"""How a row tells that PyTorch shards, and not DeepSpeed, in capitals."""


_T = TypeVar("_T")


def _said(cell: str, words: Mapping[str, _T], otherwise: _T) -> _T:
    return next((found for word, found in words.items() if word in cell), otherwise)


def written(source: str) -> date | None:
    """The last day of the month that ``source`` names, if it does.

    >>> written("arXiv 2205.05198 Table 5"), written("NeMo docs performance_summary (NeMo 24.07)")
    (datetime.date(2022, 5, 28), datetime.date(2024, 7, 28))
    >>> written("benchmarks/llama3_h100_202412.md"), written("notes (2022-02)")
    (datetime.date(2024, 12, 28), datetime.date(2022, 2, 28))
    >>> written("a README")
    """
    for pattern in MONTHS:
        if found := pattern.search(source):
            year, month = map(int, found.groups())
            if 1 <= month <= 12:
                return date(2000 + year, month, 28)
    return None


__all__ = ["DEEPSPEED", "NEW", "SINCE", "Program", "program_of", "written"]
