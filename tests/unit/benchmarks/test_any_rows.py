"""Tables that nobody here has seen: every row is predicted, or skipped with a reason to act on."""

from __future__ import annotations

import csv
from math import isfinite
from pathlib import Path
from random import Random

import pytest

from benchmarks.cells import Row
from benchmarks.quality import validate
from benchmarks.rows import COLUMNS, OPTIONAL, run_of
from benchmarks.transformer import Transformer
from cost_models.topology import topology
from tests.helpers.rows import ROW

HELD_OUT = Path(__file__).parents[3] / "benchmarks/measured/held_out_2026-11-27.csv"

ANY = ("", "nan", "none", "-", "1,536", "8.0", "1.5", "-1", "0", "1e9", "1e400", "inf", "many")
ANY += ("True", "3", "7", "48", "1000000", "N/A", "½", "8 GPUs")

WORDS: dict[str, tuple[str, ...]] = {
    "gpu_type": ("H100 SXM5 80GB", "A100", "MI250", "8xH100", "GB200", "TPU v5p", "V100"),
    "precision": ("bf16-mixed", "int8", "FP8", "fp32", "NVFP4"),
    "flash_attn": ("flash2", "no", "FA3", "maybe"),
    "gated_mlp": ("SwiGLU", "GELU", "maybe"),
    "zero_fsdp": ("ZeRO-3", "FSDP2", "HSDP over 0", "zero 9", "DDP", "2"),
    "recompute": ("full", "selective", "every 0", "full block 0 layers", "checkpointing"),
    "schedule": ("GPipe", "zb-h1", "interleaved", "dualpipe", "chimera", "looped bfs"),
    "inter": ("4x100Gb/s EFA/node", "400Gb/s", "0Gb/s", "1e9Gb/s", "NDR", "50GB/s"),
    "metric": ("MFU", "tokens/s", "loss", "HFU", "samples/sec", "peak_mem_GiB"),
    "value": ("oom", "50%", "24k", "~12"),
    "sequence_parallel": ("yes", "maybe"),
    **dict.fromkeys(("TP", "PP", "virtual_pp", "CP", "EP", "DP"), ("2", "3", "5", "64")),
    **dict.fromkeys(("kv_heads", "heads", "micro_batch"), ("1", "5", "64")),
    **dict.fromkeys(("layers", "seq_len", "global_batch", "n_gpus"), ("1", "5", "100", "1024")),
    "n_experts": ("8", "7"),
    "topk": ("9", "2"),
}


def held_out() -> list[Row]:
    with HELD_OUT.open(newline="") as file:
        return list(csv.DictReader(file))


def mutated(rows: list[Row], random: Random, count: int) -> list[Row]:
    """``rows`` with one to three cells of others' spellings, of nonsense, or of nothing."""
    columns = sorted({*rows[0]} & {*COLUMNS, *OPTIONAL} - {"config_id", "source"})
    made = []
    for number in range(count):
        row = {**random.choice(rows), "config_id": str(number)}
        for name in random.sample(columns, random.choice((1, 1, 2, 3))):
            row[name] = random.choice((*ANY, *WORDS.get(name, ()) * 3))
        made.append(row)
    return made


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_row_is_predicted_or_skipped_by_the_name_of_a_column(seed: int) -> None:
    small = [row for row in held_out() if int(row["n_gpus"]) <= 64]
    rows = mutated(small, Random(seed), 40)
    *_, every = found = validate(rows)[0]
    assert not every.failed
    assert every.predicted + len(every.left_out) == len(rows) == every.rows
    for _, reason in every.left_out:
        assert any(name in reason for name in rows[0]), reason
    assert found


def test_predictions_of_any_row_are_seconds() -> None:
    small = [row for row in held_out() if int(row["n_gpus"]) <= 16]
    _, compared = validate(mutated(small, Random(2), 20))
    assert compared
    assert all(isfinite(one.step_s) and one.step_s > 0 for one in compared)


def test_every_row_that_is_held_out_is_read() -> None:
    assert [run_of(row).name for row in held_out()] == [row["config_id"] for row in held_out()]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"kv_heads": "3"}, "kv_heads is 3, which does not divide the 4 heads"),
        ({"heads": "3", "kv_heads": ""}, "hidden is 256, not a whole number for each of 3 heads"),
        ({"global_batch": "3"}, "global_batch is 3"),
        ({"PP": "64", "TP": "1", "DP": "1", "n_gpus": "64"}, "PP 64 x virtual_pp 1 are more"),
        ({"precision": "nvfp4"}, "precision is 'nvfp4', and gpu_type 'A100-80GB-SXM'"),
        ({"n_gpus": "1e12"}, "n_gpus is 1e12, more than"),
        ({"inter": "0Gb/s", "n_gpus": "16", "DP": "4"}, "inter is '0Gb/s'"),
        ({"metric": "tokens/s", "value": "fast", "iter_time_s": ""}, "value is 'fast', no number"),
    ],
)
def test_what_does_not_go_together_is_told_by_its_columns(
    changes: dict[str, str], reason: str
) -> None:
    (found, _), compared = validate([{**ROW, **changes}])
    assert not compared
    assert reason in next(iter(found.skipped))


@pytest.mark.parametrize(
    ("changes", "same_as"),
    [
        ({"flash_attn": "FlashAttention-2"}, {"flash_attn": "True"}),
        ({"gated_mlp": "SwiGLU"}, {"gated_mlp": "True"}),
        ({"gated_mlp": "GELU"}, {"gated_mlp": "False"}),
        ({"precision": "fp16-mixed"}, {"precision": "fp16"}),
        ({"layers": "4.0", "vocab": "1,000"}, {"vocab": "1000"}),
        ({"recompute": "activation checkpointing"}, {"recompute": "full"}),
        ({"gpu_type": "8xA100 SXM4 80GB"}, {}),
        ({"zero_fsdp": "ZeRO-1 (DeepSpeed)", "source": "arXiv 2104.04473"}, {}),
        ({"iter_time_s": "", "metric": "ms/iter", "value": "~500"}, {}),
        ({"iter_time_s": "", "metric": "ms", "value": "500"}, {}),
        ({"iter_time_s": "", "metric": "samples per GPU per second", "value": "4"}, {}),
        ({"schedule": "1F1B-I", "virtual_pp": "2"}, {"virtual_pp": "2"}),
        ({"inter": "8x200Gb/s HDR IB/node"}, {}),
    ],
)
def test_spellings_of_one_thing_are_read_alike(
    changes: dict[str, str], same_as: dict[str, str]
) -> None:
    source = {"source": changes.get("source", ROW["source"])}
    read, plain = run_of({**ROW, **changes}), run_of({**ROW, **source, **same_as})
    kept = ("model", "machine", "degrees", "batch", "step_s", "network_bytes_per_s")
    assert [getattr(read, name) for name in kept] == [getattr(plain, name) for name in kept]


FOUR_HOSTS = {"n_gpus": "32", "DP": "32", "TP": "1", "PP": "1", "global_batch": "64"}
FOUR_HOSTS |= {"zero_fsdp": "FSDP", "precision": "bf16", "flash_attn": "True"}


def test_a_slower_network_takes_longer_and_a_faster_one_does_not() -> None:
    def step_s(inter: str) -> float:
        _, (one,) = validate([{**ROW, **FOUR_HOSTS, "inter": inter}])
        return one.step_s

    usual = step_s("")
    assert step_s("8x200Gb/s") == usual == step_s("IB")
    assert step_s("4x100Gb/s EFA/node") > usual >= step_s("8x400Gb/s")


@pytest.mark.parametrize(
    ("said", "per_device"),
    [
        ("4x100Gb/s EFA/node", 6.25e9),
        ("400Gb/s per node", 6.25e9),
        ("400 Gbps per GPU", 50e9),
        ("1600Gb/s RoCE per node", None),  # what it has anyway
        ("200Gb/s", None),
        ("2Tb/s RoCE", 31.25e9),
        ("50 GB/s per GPU", 50e9),
        ("IB/RoCE (unspecified, H100 3200Gb/s typical)", None),
    ],
)
def test_a_network_is_that_of_hosts_cards_or_devices(said: str, per_device: float | None) -> None:
    run = run_of({**ROW, **FOUR_HOSTS, "inter": said})
    assert run.network_bytes_per_s == per_device
    if per_device is not None:
        tier, usual = run.topology.tiers[-1], topology(run.machine).tiers[-1]
        assert (tier.bytes_per_s, tier.latency_s) == (per_device, usual.latency_s)


def test_schedules_are_those_of_the_shelf() -> None:
    def name(schedule: str) -> str:
        return run_of({**ROW, "schedule": schedule}).degrees.schedule_name

    assert [name(of) for of in ("GPipe", "ZB-H1", "1F1B", "", "Chimera")] == [
        *("gpipe", "zero_bubble_h1", "1f1b", "1f1b", "chimera")
    ]
    other = run_of({**ROW, "schedule": "DualPipe"})
    assert other.degrees.schedule_name == "1f1b"
    assert "the schedule is taken as 1f1b" in other.assumed


def test_what_is_not_said_is_as_programs_of_its_time_did_it() -> None:
    silent = {**ROW, "flash_attn": "", "sequence_parallel": "", "precision": ""}

    def read(source: str) -> tuple[Transformer, str]:
        run = run_of({**silent, "source": source})
        return run.model, run.degrees.between

    (old, old_between), (new, new_between) = read("a log (2021-06)"), read("a log (2024-06)")
    assert (old.flash, old_between) == (False, "whole")
    assert (new.flash, new_between) == (True, "sequence")
    assert old.dtype == new.dtype == "bfloat16"


def test_as_little_is_recomputed_and_as_much_worked_on_at_a_time_as_fits() -> None:
    open_row = {**ROW, **FOUR_HOSTS, "n_gpus": "8", "DP": "8", "recompute": "", "micro_batch": ""}
    small = validate([open_row])[1][0].run.degrees
    assert (small.recompute, small.microbatch) == ("none", 8)
    long = {"seq_len": "32768", "hidden": "4096", "heads": "32", "kv_heads": "32", "ffn": "16384"}
    large = validate([{**open_row, **long, "layers": "24"}])[1][0]
    assert large.fits and not large.judged
    assert large.run.degrees.recompute == "full" or large.run.degrees.microbatch == 1


def test_flops_of_the_hardware_count_what_is_done_again() -> None:
    row = {**ROW, "iter_time_s": "", "value": "2.0", "recompute": "full"}
    model, hardware = (
        run_of({**row, "metric": name}).step_s for name in ("TFLOP/s per GPU", "HW TFLOPs per GPU")
    )
    assert model is not None and hardware is not None
    assert 1.25 < hardware / model < 4 / 3


def test_the_fork_of_deepspeed_has_the_kernels_of_its_time() -> None:
    row = {**ROW, "source": "a log (2023-06)"}
    fork = run_of({**row, "zero_fsdp": "ZeRO-1 (DeepSpeed)"}).program
    assert run_of(row).program.has("added_in_products") and not fork.has("added_in_products")


def test_gradients_that_stages_share_are_padded_where_devices_do_not_divide_them() -> None:
    row = {
        **ROW,
        "n_gpus": "12",
        "DP": "3",
        "global_batch": "12",
        "gpus_per_node": "4",
    }  # a table of 1024 x 256, tied
    (found, _), (one,) = validate([row])
    assert not found.failed and one.step_s > 0
