"""What a program has had since when, and how a row tells its time."""

from __future__ import annotations

from datetime import date, timedelta

import pytest

from autopar.simulator.overlap import OneByOne
from benchmarks.programs import FIRST, SINCE, Program, program_of, written


def row(**cells: str) -> dict[str, str]:
    plain = {"source": "a table", "precision": "bf16", "zero_fsdp": "FSDP", "model_family": "GPT"}
    return {"config_id": "a", "notes": "", **plain, **cells}


@pytest.mark.parametrize("feature", SINCE)
def test_a_program_has_what_was_there_when_it_was_written(feature: str) -> None:
    day = SINCE[feature]
    assert Program(written=day).has(feature)
    assert not Program(written=day - timedelta(1)).has(feature)


def test_newer_programs_have_all_that_older_ones_have() -> None:
    days = sorted(SINCE.values())
    for older, newer in zip(days, [*days[1:], None], strict=True):
        had = {f for f in SINCE if Program(written=older).has(f)}
        assert had <= {f for f in SINCE if Program(written=newer).has(f)}


def test_what_shards_parameters_has_none_of_megatrons() -> None:
    program = program_of(row(source="arXiv 2402.15627"), shards=True, flash=True)
    assert not any(map(program.has, SINCE))


def test_deepspeed_of_2021_gathers_one_by_one_and_knows_less_and_less() -> None:
    usual = row(precision="fp16", zero_fsdp="3")

    def on(day: str) -> Program:
        return program_of({**usual, "source": day}, shards=True, flash=False)

    march, april, may = (on(f"arXiv 210{month}.00001").one_by_one for month in (3, 4, 5))
    assert march == OneByOne(traced=True, norms=False)
    assert april == may == OneByOne(traced=False, norms=True)
    assert on("arXiv 2111.00001").one_by_one is None
    assert on("a table").one_by_one is None  # of no time that is told
    fsdp = {**usual, "source": "arXiv 2104.00001", "zero_fsdp": "FSDP (ZeRO-3)"}
    assert program_of(fsdp, shards=True, flash=False).one_by_one is None


@pytest.mark.parametrize(
    ("cells", "reduced", "flat", "early"),
    [
        ({"precision": "bf16 (MP PURE)"}, 0, True, False),
        ({"precision": "amp_bf16 (MP DEFAULT)"}, 4, True, True),
        ({"zero_fsdp": "FSDP2 (ZeRO-3)"}, 4, False, True),
        ({"zero_fsdp": "HSDP (ZeRO-3)"}, 0, True, True),
        ({"source": "performance-summary NeMo 25.11"}, 0, False, False),
        ({"source": "arXiv 2104.04473", "zero_fsdp": "3"}, 0, False, False),
    ],
    ids=["torch 1.13", "torch 2.1", "second", "hybrid", "of NeMo", "DeepSpeed"],
)
def test_each_version_of_fsdp_does_what_it_does(
    cells: dict[str, str], reduced: int, flat: bool, early: bool
) -> None:
    """What gradients are reduced in, whether parameters are parts of one tensor, and whether a
    forward that is run again ends where nothing is missing."""
    program = program_of(row(**cells), shards=True, flash=True)
    assert (program.reduced_bytes, program.flat, program.stops_early) == (reduced, flat, early)
    assert program.gathered_bytes == 0


def test_composer_measures_what_it_trains() -> None:
    found = [
        program_of(row(model_family=family), shards=True, flash=True).metrics
        for family in ("MPT (GPT, ALiBi/learned pos)", "Llama3")
    ]
    assert found == [2, 0]


@pytest.mark.parametrize(
    ("source", "day"),
    [
        ("arXiv 2205.05198 Table 5", date(2022, 5, 28)),
        ("arXiv: 2104.04473v5", date(2021, 4, 28)),
        ("NVIDIA NeMo docs performance_summary (NeMo 24.07)", date(2024, 7, 28)),
        ("docs performance-summary(-archive) NeMo 26.04.01", date(2026, 4, 28)),
        ("torchtitan benchmarks/llama3_h100_202412_torchtitan.md T2", date(2024, 12, 28)),
        ("benchmarks/asyncTP_llama3_h100_2025-06_torchtitan.md", date(2025, 6, 28)),
        ("llama_209999_", None),
        ("arXiv 2299.05198", None),
        ("Megatron-LM README", None),
        ("", None),
    ],
)
def test_papers_and_releases_are_dated(source: str, day: date | None) -> None:
    assert written(source) == day


def test_torchtitan_repeated_keys_until_its_attention_took_fewer() -> None:
    def repeats(source: str) -> bool:
        cells = row(source=source, zero_fsdp="FSDP2")
        return program_of(cells, shards=True, flash=True).repeats_keys

    found = list(map(repeats, ("llama3_h100_202412_a.md", "llama3_h100_202602_a.md", "a table")))
    assert found == [True, False, False]
    plain = program_of(row(source="llama3_h100_202412_a.md"), shards=True, flash=True)
    assert not plain.repeats_keys


def test_without_a_date_fused_attention_tells_a_new_program() -> None:
    old, new = (program_of(row(zero_fsdp="1"), shards=False, flash=f) for f in (False, True))
    assert old.written == FIRST
    assert not any(map(old.has, SINCE))
    assert all(map(new.has, SINCE))


def test_losses_of_torchtitan_are_compiled_since_they_can_be() -> None:
    usual = row(zero_fsdp="fsdp2", notes="torch.compile, async TP")

    def read(source: str, **cells: str) -> Program:
        return program_of({**usual, "source": source, **cells}, shards=True, flash=True)

    assert read("a table (2025-06)").compiled_loss and read("a table (2025-06)").in_pieces
    assert not read("a table (2024-12)").compiled_loss
    assert not read("a table").compiled_loss  # of no time that is told
    assert not read("a table (2025-06)", notes="eager").compiled_loss
