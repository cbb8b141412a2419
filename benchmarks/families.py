"""Sizes that tables of published runs leave out and the models' own publications give.

A row names its family. Columns that are called as in the models' ``config.json`` go before these
(``expert_bias``: 1 if experts have biases, which no ``config.json`` says; ``rope_factor``: the
``factor`` in ``rope_scaling`` of YaRN). Of so many layers as
``sliding_window_pattern`` says one sees all tokens before it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

COLUMNS = (
    *("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"),
    *("n_shared_experts", "first_k_dense_replace", "expert_bias", "n_group", "topk_group"),
    *("sliding_window", "sliding_window_pattern", "use_parallel_residual"),
    *("swiglu_limit", "rope_factor", "use_qk_norm"),
)

_HEADS = {"qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
_RANKS = {"q_lora_rank": 1536, "kv_lora_rank": 512}
_AS_V2 = {"n_shared_experts": 2, "first_k_dense_replace": 1}
_AS_V3 = {"n_shared_experts": 1, "first_k_dense_replace": 3, "n_group": 8, "topk_group": 4}
_WINDOWS = {"sliding_window": 128, "sliding_window_pattern": 2}

FAMILIES: tuple[tuple[str, Mapping[str, int]], ...] = (
    # arXiv 2412.19437, section 4.2: one shared expert, the first three layers without experts, each
    # token in four of eight groups
    (r"deepseek.?v?3|deepseek.?r1", {**_RANKS, **_HEADS, **_AS_V3}),
    # arXiv 2405.04434, appendix B: of the smaller one, queries are not compressed
    (r"deepseek.?v?2.?lite", {"kv_lora_rank": 512, **_HEADS, **_AS_V2}),
    # arXiv 2405.04434, section 3.1.2
    (r"deepseek.?v?2", {**_RANKS, **_HEADS, **_AS_V2, "n_group": 8, "topk_group": 3}),
    # arXiv 2507.20534, table 2: as DeepSeek-V3, but for one layer without experts, and no groups
    (
        r"kimi.?k2",
        {**_RANKS, **_HEADS, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    # attention and MLP read the same: arXiv 2204.02311, section 2; 2204.06745, section 2.1;
    # 2311.16867, section 3.3
    (r"palm|gpt.?neox|gpt.?j\b|pythia|falcon", {"use_parallel_residual": 1}),
    # arXiv 2505.09388, section 2: queries and keys are normalised
    (r"qwen.?3", {"use_qk_norm": 1}),
    # arXiv 2508.10925, section 2: every other layer sees 128 tokens, SwiGLU is clamped, YaRN scales
    # positions 32 times; experts have biases
    (r"gpt.?oss", {**_WINDOWS, "expert_bias": 1, "swiglu_limit": 7, "rope_factor": 32}),
)
"""By what ``model_family`` is called, in small letters; the first that is found."""


def published(family: str) -> Mapping[str, int]:
    """
    >>> published("DeepSeekV3(MLA)")["kv_lora_rank"], published("Llama3")
    (512, {})
    """
    said = family.lower()
    return next((sizes for name, sizes in FAMILIES if re.search(name, said)), {})


__all__ = ["COLUMNS", "FAMILIES", "published"]
