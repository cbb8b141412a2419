"""Validation plans published runs as any model is planned, and says how good predictions are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from autopar import api
from autopar.extractor import extract
from autopar.ir.graph import OperatorGraph
from autopar.ir.plan import Plan
from autopar.ir.simulation import Estimate
from autopar.recipes import Degrees, by_degrees
from autopar.simulator.microbatches import division
from autopar.simulator.pipelines import StagePrices, evaluate_stages
from autopar.simulator.prices import evaluate
from benchmarks import runs
from benchmarks.kernels import proposals
from benchmarks.quality import kendall_tau, share, validate
from benchmarks.report import page
from benchmarks.rows import COLUMNS, run_of
from benchmarks.runs import Compared, Run, estimate, overlap_of
from benchmarks.runs import predicted as predictions
from benchmarks.transformer import DROPOUT, Transformer
from benchmarks.validate import main, text
from cost_models import cost_model
from cost_models.topology import topology
from tests.helpers.rows import ROW

SMALL = Transformer(2, 32, 4, 4, 128, 64, 16)
GPT = replace(SMALL, flash=False, dropout=True)
LLAMA = replace(SMALL, kv_heads=2, gated=True, biased=False, tied=False)


class Block(nn.Module):
    """The same in plain PyTorch."""

    def __init__(self, of: Transformer) -> None:
        super().__init__()
        norm = nn.RMSNorm if of.gated else nn.LayerNorm
        width, d = of.width, of.width // of.heads
        self.of, self.norm_1, self.norm_2 = of, norm(width), norm(width)

        def linear(a: int, b: int) -> nn.Linear:
            return nn.Linear(a, b, bias=of.biased)

        if of.kv_heads == of.heads:
            self.qkv = linear(width, 3 * width)
        else:
            self.q = linear(width, width)
            self.k, self.v = (linear(width, of.kv_heads * d) for _ in range(2))
        self.out = linear(width, width)
        self.up, self.down = linear(width, of.ffn), linear(of.ffn, width)
        if of.gated:
            self.gate = linear(width, of.ffn)

    def forward(self, x: torch.Tensor, rotary: torch.Tensor | None) -> torch.Tensor:
        x = x + self.dropped(self.attention(self.norm_1(x), rotary))
        y = self.norm_2(x)
        y = self.swiglu(y) if self.of.gated else F.gelu(self.up(y))
        return x + self.dropped(self.down(y))

    def swiglu(self, y: torch.Tensor) -> torch.Tensor:
        up = self.up(y)
        return F.silu(self.gate(y)) * up

    def attention(self, y: torch.Tensor, rotary: torch.Tensor | None) -> torch.Tensor:
        of, (batch, length, width) = self.of, y.shape
        if of.kv_heads == of.heads:
            parts = self.qkv(y).split(width, dim=2)
        else:
            parts = self.q(y), self.k(y), self.v(y)
        counts = (of.heads, of.kv_heads, of.kv_heads)
        q, k, v = (
            part.view(batch, length, n, width // of.heads).transpose(1, 2)
            for part, n in zip(parts, counts, strict=True)
        )
        if rotary is not None:
            q, k = q * rotary, k * rotary
        if of.flash:
            grouped = of.kv_heads != of.heads
            z = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
        else:
            z = self.dropped(F.softmax(q @ k.transpose(2, 3), dim=-1)) @ v
        return self.out(z.transpose(1, 2).reshape(batch, length, width))

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(x, DROPOUT) if self.of.dropout else x


class Decoder(nn.Module):
    def __init__(self, of: Transformer) -> None:
        super().__init__()
        self.of = of
        self.tokens = nn.Embedding(of.vocabulary, of.width)
        if of.gated:
            self.register_buffer("rotary", torch.zeros(of.length, of.width // of.heads))
        else:
            self.positions = nn.Parameter(torch.zeros(of.length, of.width))
        self.blocks = nn.ModuleList(Block(of) for _ in range(of.layers))
        self.norm = (nn.RMSNorm if of.gated else nn.LayerNorm)(of.width)
        if not of.tied:
            self.head = nn.Linear(of.width, of.vocabulary, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        if not self.of.gated:
            x = x + self.positions
            x = F.dropout(x, DROPOUT) if self.of.dropout else x
        for block in self.blocks:
            x = block(x, self.rotary if self.of.gated else None)
        x = self.norm(x)
        logits = F.linear(x, self.tokens.weight) if self.of.tied else self.head(x)
        return F.cross_entropy(logits.float().transpose(1, 2), targets)


def traced(of: Transformer, batch: int) -> OperatorGraph:
    with torch.device("meta"):
        model = Decoder(of).to(torch.bfloat16)
        tokens = torch.zeros(batch, of.length, dtype=torch.long)
    return extract(model, (tokens, tokens), precision="mixed")


def content(graph: OperatorGraph) -> Iterator[tuple[Any, ...]]:
    """What a graph is, but for names and for arguments that are torch's defaults."""
    for o in graph.operators:
        specs = [graph.by_name[n] for n in (*o.inputs, *o.outputs)]
        more = tuple(a for a in o.arguments if not isinstance(a, bool | float | None))
        yield o.op, more, [(t.spec, t.role, t.differentiable) for t in specs]


@pytest.mark.parametrize("of", [SMALL, GPT, LLAMA])
def test_a_transformer_of_sizes_is_what_torch_traces(of: Transformer) -> None:
    made, real = of.graph(8), traced(of, 8)
    assert list(content(made)) == list(content(real))
    assert made.parameter_count == real.parameter_count


def test_a_row_says_what_a_recipe_says() -> None:
    run = run_of(ROW)
    wanted = Degrees(2, 2, 2, microbatch=1, between="sequence", zero=1, recompute="attention")
    assert run.degrees == wanted
    assert (run.machine, run.batch, run.step_s) == ("1x8xa100-sxm-80gb", 16, 0.5)
    assert (run.model.vocabulary, run.model.dtype) == (1024, "float16")  # padded for two devices


def run_by_its_program(plan: Plan, run: Run) -> Estimate:
    """The plan as the program of a published run executes it, which does some things at once."""
    machine, how = cost_model(run.topology), overlap_of(run)
    of = division(plan.graph, plan.strategy.microbatches)
    if len(plan.strategy.stages) > 1:
        return evaluate_stages(of, machine, plan.strategy, StagePrices(machine, overlap=how))
    return evaluate(of.graph, of.rules, machine, plan.strategy, overlap=how)


def test_a_row_is_predicted_as_its_model_is_planned() -> None:
    """No second model for validation: the strategy, prices and memory of a plan."""
    run = run_of({**ROW, "precision": "bf16"})
    run = replace(run, model=replace(run.model, fused=False))  # ATen's kernels are those traced
    ((_, compared),) = predictions([run])
    graph = traced(run.model, 16)
    plan = api.plan(
        graph, topology=run.machine, recipe=run.degrees, precision="mixed", optimizer="adam"
    )
    assert isinstance(compared, Compared)
    assert run_by_its_program(plan, run).step_time_s == pytest.approx(compared.step_s)
    assert plan.estimate.reserved_memory_bytes == compared.memory_bytes
    assert plan.estimate.device_memory_bytes == compared.device_bytes


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"EP": "8", "n_experts": "8", "topk": "2", "moe_ffn": "9", "gated_mlp": "True"},
            "experts=8 with",
        ),
        ({"EP": "2", "TP": "1", "DP": "4"}, "EP is given, and n_experts is not"),
        ({"n_experts": "8", "topk": "2"}, "experts that are not gated"),
        ({"n_experts": "8", "topk": "2", "gated_mlp": "True"}, "moe_ffn is not given"),
        (
            {"n_experts": "7", "topk": "2", "gated_mlp": "True", "moe_ffn": "9", "seq_len": "127"},
            "a sequence of 127 cannot be 2 equal parts",
        ),
        ({"precision": "fp8"}, "no peak for float8_e4m3fn"),
        ({"precision": "int3"}, "precision is 'int3': not known"),
        ({"recompute": "recipe (weights offload)"}, "no name here: recipe"),
        ({"sequence_parallel": "maybe"}, "neither True nor False"),
        ({"layers": "1e9"}, "more than the 4096"),
        ({"layers": "inf"}, "layers is 'inf', no whole number"),
        ({"TP": "1.5"}, "TP is '1.5', no whole number"),
        ({"iter_time_s": "fast"}, "iter_time_s is 'fast', no number"),
        ({"iter_time_s": "-1"}, "iter_time_s is -1, and must be more than 0"),
        ({"vocab": ""}, "vocab is not given"),
        ({"zero_fsdp": "7"}, "zero_fsdp is '7': not known"),
        ({"gpu_type": "H900"}, "no topology for H900"),
        ({"layers": "many"}, "layers is 'many', no number"),
        ({"TP": "0"}, "TP is 0, and must be at least 1"),
        ({"n_gpus": "16"}, "degrees make 8 devices, and n_gpus is 16"),
        ({"recompute": "every 3rd"}, "recomputes in a way that has no name here: every 3rd"),
        ({"global_batch": "3"}, "a batch of 3 samples is not a whole number"),
        ({"gpu_type": "V100-32GB-SXM(DGX-2H)", "precision": "bf16"}, "no peak for bfloat16"),
    ],
)
def test_what_cannot_be_predicted_is_skipped_with_the_reason(
    changes: dict[str, str], reason: str
) -> None:
    (found, every), compared = validate([{**ROW, **changes}])
    assert not compared
    assert (found.rows, found.predicted, every.rows) == (1, 0, 1)
    ((said, number),) = found.skipped.items()
    assert reason in said and number == 1
    assert "skipped 1: " in text(found)


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence_parallel": "true", "flash_attn": "0", "gated_mlp": "no"},
        {"layers": "4.0", "TP": " 2 ", "DP": "2.0", "zero_fsdp": "1.0"},
        {"CP": "", "EP": "", "n_experts": "none", "kv_heads": "", "gpus_per_node": ""},
        {"head_dim": "64", "virtual_pp": "1.0", "schedule": ""},
    ],
)
def test_cells_may_be_spelled_otherwise(changes: dict[str, str]) -> None:
    written, plain = (
        run_of({**ROW, **changes}),
        run_of({**ROW, "head_dim": changes.get("head_dim", "")}),
    )
    assert written == plain


def test_what_a_row_does_not_say_is_assumed_and_counted() -> None:
    row = {**ROW, "virtual_pp": "", "micro_batch": "", "schedule": "interleaved 1F1B"}
    row |= {"layers": "24", "ffn": "", "DP": ""}
    (found, every), (one,) = validate([row])
    degrees = one.run.degrees
    assert (degrees.chunks, degrees.microbatch, degrees.data) == (6, 1, 2)
    assert one.run.model.ffn == 1024
    said = ("virtual_pp is 6", "micro_batch is 1", "ffn is four times hidden")
    assert found.assumed == every.assumed == dict.fromkeys(said, 1)
    assert "assumed of 1: virtual_pp is 6" in text(found)


@pytest.mark.parametrize(("layers", "chunks"), [("24", 6), ("10", 5), ("2", 1), ("5", 1)])
def test_interleaved_stages_have_two_layers_or_one(layers: str, chunks: int) -> None:
    row = {**ROW, "virtual_pp": "", "schedule": "interleaved", "layers": layers}
    assert run_of(row).degrees.chunks == chunks


@pytest.mark.parametrize(
    ("said", "machine"),
    [
        ("H200 141GB SXM5", "h200-sxm"),
        ("nvidia h100 pcie", "h100-pcie"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm-80gb"),
        ("a100 40gb", "a100-sxm-40gb"),
        ("MI300X", "mi300x"),
        ("TPU v5p", "tpu-v5p"),
        ("GB300", "gb300-nvl72"),
        ("L40S", "l40s"),
    ],
)
def test_machines_are_known_by_other_names(said: str, machine: str) -> None:
    row = {**ROW, "gpu_type": said, "precision": "bf16"}
    assert run_of(row).machine == f"1x8x{machine}"


@pytest.mark.parametrize(
    ("said", "level"),
    [("zero1", 1), ("ZeRO 2", 2), ("stage-1", 1), ("distributed optimizer", 1), ("DDP", 0)],
)
def test_levels_of_sharding_have_several_spellings(said: str, level: int) -> None:
    row = {**ROW, "zero_fsdp": said, "PP": "1", "DP": "4", "virtual_pp": "1"}
    assert run_of(row).degrees.zero == level


@pytest.mark.parametrize(
    ("metric", "value", "step_s"),
    [
        ("tokens_per_s_per_gpu", 16 * 128 / 8 / 0.5, 0.5),
        ("tokens/sec", 16 * 128 / 0.5, 0.5),
        ("samples_per_s", 32, 0.5),
        ("iter_time_ms", 500, 0.5),
        ("step_time_s", 0.5, 0.5),
    ],
)
def test_a_rate_says_how_long_a_step_takes(metric: str, value: float, step_s: float) -> None:
    run = run_of({**ROW, "iter_time_s": "", "metric": metric, "value": f"{value!r}"})
    assert run.step_s == pytest.approx(step_s) and not run.assumed


def test_flops_a_second_and_their_share_of_the_peak_say_it_too() -> None:
    row = {**ROW, "iter_time_s": "", "metric": "model_tflops_per_gpu", "value": "2.0"}
    run, of = run_of(row), run_of(row).model
    weights = of.layers * 12 * of.width**2 + of.width * of.vocabulary
    flops = 16 * 128 * (6 * weights + 12 * of.layers * of.width * 128)
    assert run.step_s == pytest.approx(flops / 8 / 2e12)
    assert any("flops" in what for what in run.assumed)
    share = run_of({**row, "metric": "MFU", "value": "50"})
    assert share.step_s == pytest.approx(flops / 8 / (0.5 * 312e12))
    assert run_of({**row, "metric": "loss", "value": "2.5"}).step_s is None


H100 = {"gpu_type": "H100-80GB-SXM", "precision": "bf16", "flash_attn": "True", "TP": "1"}
H100 |= {"PP": "1", "DP": "8", "gated_mlp": "True", "recompute": "none"}
H100 |= {"hidden": "4096", "ffn": "16384", "heads": "32", "kv_heads": "32", "seq_len": "2048"}


def predicted(changes: dict[str, str]) -> Compared:
    _, (one,) = validate([{**ROW, **H100, **changes}])
    return one


def test_narrow_products_are_faster_and_their_casts_cost() -> None:
    wide, narrow = predicted({}), predicted({"precision": "fp8"})
    products = 0.794 / 1.403  # of the largest measured speeds: those of blocks, all but attention
    assert products * wide.step_s < narrow.step_s < wide.step_s
    graph = replace(narrow.run.model, engine=False, fused_loss=False).graph(8)
    casts = [o for o in graph.operators if o.op in ("aten._to_copy.default", "fused.cast.default")]
    assert len(casts) == 4 * (4 + 5) + 1  # four inputs and five weights; the logits
    by_name = {t.name: t.spec.dtype for t in graph.tensors}
    assert {by_name[o.inputs[0]] for o in graph.operators if "attention" in o.op} == {"bfloat16"}


def test_narrow_products_that_are_checkpointed_keep_as_much_as_wide_ones() -> None:
    """Every other product is kept, whatever it multiplies: 77.0 and 76.8 GiB in torchtitan's
    table 1 of December 2024."""
    wide, narrow = (
        predicted({"recompute": "selective(op)", "precision": name}) for name in ("bf16", "fp8")
    )
    assert narrow.memory_bytes == pytest.approx(wide.memory_bytes, rel=0.05)


def test_attention_takes_what_the_software_of_a_run_takes() -> None:
    """Megatron-LM has Transformer Engine's on H100, FSDP FlashAttention-2 there too, and both have
    that on A100, beside its best as programs of their time have it; attention in parts is of no
    library."""
    rows = {"flash_attn": "True", "zero_fsdp": "1", "precision": "bf16"}
    for gpu, engine in (("H100-80GB-SXM", True), ("A100-80GB-SXM", False)):
        megatron = run_of({**ROW, **rows, "gpu_type": gpu}).topology.device
        cells = {"zero_fsdp": "FSDP", "TP": "1", "PP": "1", "DP": "8", "sequence_parallel": "False"}
        fsdp = run_of({**ROW, **rows, **cells, "gpu_type": gpu}).topology.device
        assert (megatron != fsdp) is engine is megatron.attention_as_products
        if engine:
            speeds = (dict(of.attention_flops_per_s)["bfloat16"] for of in (megatron, fsdp))
            assert next(speeds) == pytest.approx(539 / 335 * next(speeds))
        parts = run_of({**ROW, **rows, "flash_attn": "False", "gpu_type": gpu})
        assert parts.topology == topology(parts.machine)


def test_experts_of_a_row_work_as_much_as_those_that_are_chosen() -> None:
    """Two of eight experts, each half as wide as the MLP: tokens are sent, and gradients of experts
    that a device does not have are not."""
    changes = {"n_experts": "8", "topk": "2", "moe_ffn": "8192", "EP": "8"}
    dense, sparse = predicted({}), predicted(changes)
    assert sparse.run.degrees == replace(dense.run.degrees, experts=8)
    assert sparse.step_s == pytest.approx(dense.step_s, rel=0.3)


def test_a_rack_is_used_in_parts_that_make_all_devices() -> None:
    row = {**ROW, "gpu_type": "GB200-NVL72", "gpus_per_node": "72", "TP": "1", "PP": "1"}
    for devices, machine in ((8, "1x8x"), (64, "1x64x"), (128, "2x64x"), (144, "2x72x")):
        cells = {"DP": str(devices), "n_gpus": str(devices), "global_batch": str(devices)}
        assert run_of({**row, **cells}).machine == f"{machine}gb200-nvl72"


def test_more_recomputation_takes_longer_and_keeps_less() -> None:
    kinds = ["none", "selective layernorm", "selective(op)", "full"]
    found = [predicted({"recompute": kind}) for kind in kinds]
    assert [one.step_s for one in found] == sorted(one.step_s for one in found)
    assert [-one.memory_bytes for one in found] == sorted(-one.memory_bytes for one in found)
    half = predicted({"recompute": "selective(layer=every 2nd)"})
    assert half.step_s == pytest.approx((found[0].step_s + found[-1].step_s) / 2)


def test_a_part_of_the_blocks_is_evaluated_as_the_whole_graph_is() -> None:
    """Folded into two runs, it is what it is unfolded."""
    run = run_of({**ROW, **H100, "recompute": "full block 1 layers", "layers": "6"})
    run = replace(run, model=replace(run.model, fused=False))
    ((_, one),) = predictions([run])
    assert isinstance(one, Compared)
    plan = api.plan(
        run.model.graph(16),
        topology=run.machine,
        recipe=run.degrees,
        precision="mixed",
        optimizer="adam",
    )
    assert run_by_its_program(plan, one.run).step_time_s == pytest.approx(one.step_s)
    assert plan.estimate.memory.reserved_bytes == one.memory_bytes


def test_errors_are_relative_and_by_source() -> None:
    rows = [{**ROW, "iter_time_s": "1"}, {**ROW, "source": "others", "iter_time_s": "2"}]
    (first, second, every), compared = validate(rows)
    step_s = compared[0].step_s
    assert first.step_bias == pytest.approx(step_s - 1)
    assert second.step_mean == second.step_largest == pytest.approx(abs(step_s / 2 - 1))
    assert every.step_mean == pytest.approx((abs(step_s - 1) + abs(step_s / 2 - 1)) / 2)
    shown = page([first, second, every], compared)
    assert shown.count("<circle") == 2
    assert "others" in shown and share(first.step_bias) in shown


def test_what_ran_out_of_memory_and_fits_is_a_false_fit() -> None:
    out = {**ROW, "metric": "iter_time_s", "value": "oom", "iter_time_s": ""}
    huge = {"hidden": "65536", "ffn": "262144"}
    (found, _), _ = validate([out, {**out, **huge}, ROW, {**ROW, **huge}])
    assert (found.false_fits, found.false_rejects) == (1, 1)


def test_what_is_not_said_of_recomputation_is_not_judged_where_it_decides() -> None:
    """Kept whole, the first two do not fit; recomputed, the first does."""
    large = {**ROW, **H100, "hidden": "8192", "ffn": "32768", "heads": "64", "kv_heads": "64"}
    large |= {"seq_len": "8192", "layers": "8", "recompute": "unspecified"}
    undecided = {**large, "micro_batch": "2"}
    (found, _), (one,) = validate([undecided])
    assert not one.fits and not one.judged
    assert (found.false_rejects, found.not_judged) == (0, 1)
    assert "1 not judged" in text(found)
    said = {**undecided, "recompute": "none"}
    too_large, small = {**large, "layers": "64"}, {**large, "layers": "1"}
    (found, _), _ = validate([said, too_large, small])
    assert (found.false_rejects, found.not_judged) == (2, 0)


def test_measured_memory_is_compared() -> None:
    row = {**ROW, "metric": "peak_mem_GiB", "value": "1.0", "iter_time_s": "9"}
    (found, _), (compared,) = validate([row])
    assert found.step_mean is None
    assert found.memory_mean == pytest.approx(abs(compared.memory_bytes / 2**30 - 1))


def test_tau_counts_pairs_in_order() -> None:
    rng = Random(0)
    for _ in range(50):
        pairs = [(rng.randrange(5), rng.randrange(5)) for _ in range(8)]
        signs = [
            ((a > c) - (a < c), (b > d) - (b < d))
            for i, (a, b) in enumerate(pairs)
            for c, d in pairs[:i]
        ]
        left, right = sum(a != 0 for a, _ in signs), sum(b != 0 for _, b in signs)
        wanted = sum(a * b for a, b in signs) / (left * right) ** 0.5 if left * right else None
        assert kendall_tau(pairs) == pytest.approx(wanted)


def test_the_page_has_times_and_memory_lines_and_what_was_left_out() -> None:
    rows = [
        ROW,
        {**ROW, "config_id": "b", "iter_time_s": "3", "source": "<others>"},
        {**ROW, "config_id": "c", "metric": "peak_mem_GiB", "value": "1.0"},
        {**ROW, "config_id": "d", "gpu_type": "H900"},
        {**ROW, "config_id": "e", "micro_batch": ""},
    ]
    shown = page(*validate(rows))
    assert shown.count("<svg") == 2 and shown.count("<circle") == 4
    assert shown.count("in the mean</title>") == 3  # two sources' times, one's memory
    assert "&lt;others&gt;" in shown and "<others>" not in shown
    assert "tensor=2,pipeline=2,data=2" in shown
    assert "1: gpu_type is 'H900'" in shown.replace("&#x27;", "'") and "</summary>d<" in shown
    assert "somebody: 1 rows, micro_batch is 1" in shown


def test_a_defect_is_told_by_the_name_of_its_row_and_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = runs._estimate

    def broken(run: Run, *rest: Any) -> Any:
        if run.name == "broken":
            raise KeyError("a dict of ours")
        return right(run, *rest)

    monkeypatch.setattr(runs, "_estimate", broken)
    rows = [{**ROW, "config_id": name} for name in ("first", "broken", "last")]
    (found, every), compared = validate(rows)
    assert [one.run.name for one in compared] == ["first", "last"]
    assert found.failed == every.failed == (("broken", "KeyError: 'a dict of ours'"),)
    assert (found.rows, found.predicted, found.skipped) == (3, 2, {})
    assert "FAILED: broken: KeyError" in text(found)
    assert "broken" in page([found, every], compared)


def test_any_cells_are_read_without_a_traceback() -> None:
    """Rows whose cells are drawn at random from what tables have in other places."""
    rng = Random(0)
    cells = ("", "none", "0", "-1", "8.0", "1e9", "nan", "inf", "True", "fp8", "oom", "3", "x" * 99)
    rows = []
    for _ in range(60):
        row: dict[str, Any] = dict(ROW)
        for name in rng.sample(sorted(row), 2):
            row[name] = rng.choice((*cells, None))
        rows.append(row)
    rows.append({None: ["more"], "config_id": "short"})
    *_, every = validate(rows)[0]
    assert every.rows == len(rows) and every.predicted + len(every.left_out) == len(rows)
    assert not every.failed
    page(*validate(rows))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("a,b\n1,2\n", "has no columns config_id"),
        (",".join(COLUMNS) + "\n", "has columns and no rows"),
        (None, "cannot be read: No such file"),
    ],
    ids=["other columns", "no rows", "no file"],
)
def test_a_file_that_has_no_rows_of_ours_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: str | None, said: str
) -> None:
    path = tmp_path / "rows.csv"
    if words is not None:
        path.write_text(words)
    monkeypatch.setattr("sys.argv", ["validate", str(path)])
    with pytest.raises(SystemExit, match=said):
        main()


def test_a_prediction_knows_its_errors() -> None:
    run = run_of(ROW)
    one = Compared(run, step_s=0.6, memory_bytes=8, device_bytes=10, limit_bytes=5)
    assert one.step_error == pytest.approx(0.2)
    assert (one.memory_error, one.fits) == (None, False)


def test_a_fused_loss_needs_the_logits_once() -> None:
    plain = run_of({**ROW, "precision": "bf16"}).model
    fused = run_of({**ROW, "precision": "bf16", "model_family": "MPT"}).model
    assert (plain.fused_loss, fused.fused_loss) == (False, True)
    ops = [[o.op for o in model.graph(2).operators] for model in (plain, fused)]
    assert [names.count("aten._to_copy.default") for names in ops] == [1, 0]


def test_torchtitan_keeps_attention_and_every_other_product() -> None:
    row = {**ROW, "recompute": "selective(op: every-other-matmul/SDPA save)", "precision": "bf16"}
    run = run_of({**row, "model_family": "Llama", "gated_mlp": "True", "flash_attn": "True"})
    assert run.degrees.recompute == "alternate"
    graph = run.model.graph(run.batch)
    found = division(graph, run.degrees.microbatches(run.batch), proposals(graph))
    strategy = by_degrees(found, run.degrees, cost_model(run.machine), run.training)
    again = {name for name in strategy.recompute if name.startswith("blocks.0.")}
    inside = [o.name for o in found.graph.operators if o.name.startswith("blocks.0.")]
    products = [name for name in inside if "linear" in name]
    assert [name in again for name in products] == [False, True, False, True, False]
    assert not any("attention" in name for name in again)
    assert any("norm" in name for name in again)


def test_torchtitan_gathers_the_parameters_of_a_stage_once() -> None:
    """In however many microbatches."""
    titan = {**ROW, "zero_fsdp": "FSDP2", "precision": "bf16", "flash_attn": "True", "TP": "1"}

    def gathers(batch: int) -> int:
        found = estimate(run_of({**titan, "DP": "4", "global_batch": str(batch)}))
        assert found.pipeline is not None
        every = [one for row in found.pipeline.rows for one in row.collectives]
        return sum(one.count for one in every if one.kind == "all_gather")

    assert gathers(16) == gathers(32) > 0


def test_torchtitan_goes_round_a_ring_and_repeats_what_goes() -> None:
    titan = {**ROW, "zero_fsdp": "FSDP2", "precision": "bf16", "flash_attn": "True", "PP": "1"}
    titan |= {"TP": "1", "kv_heads": "2", "gated_mlp": "True", "source": "a_202412_b.md"}
    found = [
        run_of({**titan, "CP": str(context), "DP": str(8 // context), "zero_fsdp": zero}).model
        for context, zero in ((2, "FSDP2"), (1, "FSDP2"), (2, "FSDP"))
    ]
    assert [(of.ring, of.repeated) for of in found] == [(True, True), (False, True), (False, False)]


def test_what_devices_do_not_divide_is_padded() -> None:
    """Each has a 56th of every parameter, or one number more; a 64th, if there are 64, is less."""

    def estimate_on(devices: int) -> Estimate:
        of = {"DP": str(devices), "n_gpus": str(devices), "global_batch": str(devices)}
        run = run_of({**ROW, "zero_fsdp": "3", "precision": "bf16", "TP": "1", "PP": "1", **of})
        return estimate(run)

    padded, even = estimate_on(56), estimate_on(64)
    graph = run_of({**ROW, "zero_fsdp": "3", "TP": "1", "PP": "1", "DP": "8"}).model.graph(1)
    sizes = [parameter.spec.numel for parameter in graph.parameters]
    assert padded.memory.parameters_bytes == sum(2 * -(-n // 56) for n in sizes)
    assert padded.memory.optimizer_bytes >= sum(12 * -(-n // 56) for n in sizes)
    assert even.memory.parameters_bytes < padded.memory.parameters_bytes
    assert {one.kind for one in padded.collectives} == {one.kind for one in even.collectives}
    assert [one.bytes for one in padded.collectives] == [one.bytes for one in even.collectives]


def test_runs_that_only_their_programs_tell_apart_are_priced_apart() -> None:
    """Stages are priced once for runs that are alike, with what their programs do at once."""
    rows = [
        {**ROW, "PP": "2", "n_gpus": "2", "DP": "1", "TP": "1", "source": f"arXiv {month}.00001"}
        for month in ("2201", "2404")
    ]
    together = {run.source: found for run, found in predictions(map(run_of, rows))}
    for row in rows:
        ((_, alone),) = predictions([run_of(row)])
        found = together[row["source"]]
        assert isinstance(alone, Compared) and isinstance(found, Compared)
        assert found.step_s == alone.step_s
    old, new = (together[row["source"]] for row in rows)
    assert isinstance(old, Compared) and isinstance(new, Compared) and old.step_s != new.step_s
