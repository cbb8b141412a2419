"""A run as a row of a table of published runs."""

from __future__ import annotations

from benchmarks.cells import Row

ROW: Row = {
    **dict.fromkeys(("head_dim", "n_experts"), ""),
    "config_id": "a",
    "source": "somebody",
    "model_family": "GPT",
    "layers": "4",
    "hidden": "256",
    "heads": "4",
    "kv_heads": "4",
    "ffn": "1024",
    "gated_mlp": "False",
    "vocab": "1000",
    "seq_len": "128",
    "global_batch": "16",
    "micro_batch": "1",
    "gpu_type": "A100-80GB-SXM",
    "n_gpus": "8",
    "gpus_per_node": "8",
    "TP": "2",
    "PP": "2",
    "virtual_pp": "1",
    "DP": "2",
    "CP": "1",
    "EP": "1",
    "zero_fsdp": "1",
    "sequence_parallel": "True",
    "recompute": "selective",
    "flash_attn": "False",
    "precision": "fp16",
    "schedule": "1F1B",
    "metric": "iter_time_s",
    "value": "0.5",
    "iter_time_s": "0.5",
}
