"""Mixtures of experts and latent attention of published rows: what is counted, and from what."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod

import pytest

from autopar.ir.graph import OperatorGraph
from autopar.ir.rule import BoundRule
from autopar.ir.sharding import Mesh
from autopar.ir.simulation import Estimate
from autopar.ir.strategy import Training
from autopar.recipes import Degrees, by_degrees
from autopar.simulator.costs import Costs, work
from autopar.simulator.microbatches import division
from autopar.simulator.overlap import NOTHING_AT_ONCE, Overlap
from autopar.simulator.prices import evaluate
from benchmarks import families
from benchmarks.cells import SkippedError
from benchmarks.kernels import proposals
from benchmarks.quality import validate
from benchmarks.rows import run_of
from benchmarks.runs import overlap_of, predicted
from benchmarks.transformer import Experts, Latent, Transformer
from cost_models import Analytical, cost_model, topology
from cost_models.collectives import Dispatch
from cost_models.interface import Collective, Work
from tests.helpers.rows import ROW

LATENT = Latent(keys=16, queries=24, plain=8, rotary=4, values=8)
PLAIN = Transformer(3, 64, 4, 4, 192, 128, 32, gated=True, biased=False, tied=False, fused=True)
PLAIN = replace(PLAIN, fused_loss=True, one_pass=True)
NARROW = replace(PLAIN, latent=LATENT, experts=Experts(4, 2, 48, shared=48, after=1))
MIXED = Training("adam", "mixed")


def evaluated(
    model: Transformer, degrees: Degrees, batch: int = 8, overlap: Overlap = NOTHING_AT_ONCE
) -> Estimate:
    graph = model.graph(batch)
    divided = division(graph, degrees.microbatches(batch), proposals(graph))
    machine = cost_model("1x8xh100-sxm")
    strategy = by_degrees(divided, degrees, machine, MIXED)
    return evaluate(divided.graph, divided.rules, machine, strategy, overlap=overlap)


def shapes(graph: OperatorGraph, ends: str) -> list[tuple[int, ...]]:
    return [p.spec.shape for p in graph.parameters if p.name.endswith(ends)]


# ---- the graph -----------------------------------------------------------------------------------


def test_latent_attention_has_the_weights_of_its_paper() -> None:
    """DeepSeek-V3's published sizes make 671 billion parameters, 37 of them for a token."""
    sizes = families.published("DeepSeekV3(MLA)")
    latent = Latent(sizes["kv_lora_rank"], sizes["q_lora_rank"])
    experts = Experts(256, 8, 2048, shared=2048, after=sizes["first_k_dense_replace"])
    model = replace(PLAIN, layers=61, width=7168, heads=128, kv_heads=128, ffn=18432)
    model = replace(model, vocabulary=129280, latent=latent, experts=experts, length=512)
    held = sum(prod(p.spec.shape) for p in model.graph(1).parameters)
    assert held == pytest.approx(671e9, rel=0.002)
    embedding = model.vocabulary * model.width
    assert model.weights_of_a_token + embedding == pytest.approx(37e9, rel=0.02)


@pytest.mark.parametrize(
    "model",
    [
        PLAIN,
        replace(PLAIN, kv_heads=2),
        replace(PLAIN, latent=replace(LATENT, queries=0)),
        NARROW,
        replace(PLAIN, gated=False, head_width=8),
    ],
)
def test_weights_of_a_token_are_those_of_the_products_of_its_graph(model: Transformer) -> None:
    graph, found = model.graph(1), 0
    for operator in graph.operators:
        if operator.op in ("aten.linear.default", "aten.einsum.default"):
            weight = graph.spec(operator.inputs[1]).shape
            share = 1 if len(weight) == 2 or model.experts is None else model.experts.chosen
            found += share * prod(weight[-2:])
    assert model.weights_of_a_token == found


def test_layers_before_experts_have_an_mlp_and_others_a_shared_one() -> None:
    graph = NARROW.graph(2)
    assert shapes(graph, "blocks.0.up.weight") == [(192, 64)]
    assert not shapes(graph, "blocks.0.router.weight")
    assert len(shapes(graph, ".shared.up.weight")) == 2
    assert shapes(graph, ".experts.up.weight") == [(4, 48, 64)] * 2


def test_experts_that_share_tokens_unevenly_have_room_for_one_more() -> None:
    """Six experts for 64 places: eleven each, and as much work as that."""
    even, uneven = (replace(PLAIN, experts=Experts(count, 2, 48, apart=True)) for count in (4, 6))
    (some,), _ = works(even, "grouped")
    (more,), _ = works(uneven, "grouped")
    assert (some.shape[:2], more.shape[:2]) == ((4, 16), (6, 11))
    degrees = Degrees(data=2, experts=2)
    assert evaluated(uneven, degrees).step_time_s > evaluated(even, degrees).step_time_s
    kinds = {one.kind for one in evaluated(uneven, degrees).collectives}
    assert kinds == {one.kind for one in evaluated(even, degrees).collectives}


def test_parallel_blocks_have_one_norm() -> None:
    graphs = [replace(PLAIN, parallel=flag).graph(2) for flag in (False, True)]
    norms = [sum("rms_norm" in o.op for o in graph.operators) for graph in graphs]
    assert norms == [2 * 3 + 1, 3 + 1]
    weights = [sum(prod(p.spec.shape) for p in graph.parameters) for graph in graphs]
    assert weights[0] - weights[1] == 3 * PLAIN.width


@pytest.mark.parametrize(
    "degrees",
    [
        Degrees(data=8, zero=3),
        Degrees(tensor=2, data=4, microbatch=1),
        Degrees(tensor=4, data=2, microbatch=2, between="sequence", zero=1),
        Degrees(data=8, experts=4, zero=1),
    ],
    ids=["data", "tensor", "sequence", "experts"],
)
def test_latent_attention_and_experts_are_divided(degrees: Degrees) -> None:
    """Each device does its share of the products, but for what is narrow and made by all."""
    model = replace(NARROW, width=256, ffn=768, length=64)
    whole, divided = evaluated(model, Degrees(data=1)), evaluated(model, degrees)
    products = whole.peak_memory_bytes
    assert divided.peak_memory_bytes < products
    assert divided.collectives


def test_of_latent_attention_heads_are_divided_and_narrow_vectors_are_not() -> None:
    graph = NARROW.graph(2)
    divided = division(graph, 1, proposals(graph))
    degrees = Degrees(tensor=2, data=1)
    strategy = by_degrees(divided, degrees, cost_model("1x2xh100-sxm"), MIXED)
    kept = {
        name.removeprefix("blocks.1."): storage.parameter
        for name, storage in strategy.storage.items()
        if name.startswith("blocks.1.")
    }
    assert kept["q_up.weight"] == kept["kv_up.weight"] == ("S(0)",)
    assert kept["out.weight"] == ("S(1)",)
    assert kept["q_down.weight"] == kept["kv_down.weight"] == ("I",)


# ---- kernels -------------------------------------------------------------------------------------


def works(model: Transformer, kernel: str) -> tuple[list[Work], list[Work]]:
    """Of the first such operator, forward and backward, of one sample."""
    bound, wanted = first(model, kernel)
    return work(bound, ("nothing",), ALONE, wanted)


def first(model: Transformer, kernel: str) -> tuple[BoundRule, tuple[bool, ...]]:
    """Such an operator, and which of its inputs need a gradient."""
    graph = model.graph(1)
    divided = division(graph, 1, proposals(graph))
    operator = next(o for o in divided.graph.operators if kernel in o.op)
    wanted = tuple(graph.by_name[name].differentiable for name in operator.inputs)
    return divided.rules[operator.name], wanted


ALONE = Mesh((("data", 1),))


def flops(of: Iterable[Work]) -> float:
    return sum(one.flops for one in of)


def test_where_queries_see_a_window_attention_does_as_much_less() -> None:
    length = 2048
    whole = works(replace(PLAIN, length=length), "scaled_dot_product_attention")
    near = works(replace(PLAIN, length=length, near=length // 8), "near_attention")
    seen = (length + 128) / (2 * length)
    for all_of, some in zip(whole, near, strict=True):
        assert flops(some) == pytest.approx(flops(all_of) / seen / 8)


def test_latent_attention_sums_over_keys_and_over_values() -> None:
    model = replace(NARROW, length=2048)
    (there,), _ = works(model, "causal_attention")
    seen, dk = (2048 + 128) / (2 * 2048), LATENT.plain + LATENT.rotary
    assert there.flops == pytest.approx(seen * 2 * 4 * 2048**2 * (dk + LATENT.values))


GROUPED = replace(PLAIN, experts=Experts(4, 2, 48, apart=True))


def test_the_host_calls_experts_one_by_one_and_the_device_does_them_at_once() -> None:
    together = replace(GROUPED, experts=Experts(4, 2, 48))
    assert works(GROUPED, "grouped") == works(together, "einsum")
    costs = Costs(cost_model("h100-sxm"), ALONE)
    one_by_one, at_once, least = (
        costs.launches_s(*first(model, kernel), split)
        for model, kernel, split in (
            (GROUPED, "grouped", ("nothing",)),
            (together, "einsum", ("nothing",)),
            (GROUPED, "grouped", None),
        )
    )
    for some, others in zip(one_by_one, at_once, strict=True):
        assert some == pytest.approx(others + 3 * costs.host_ahead.operator_s)
    assert least == at_once


def test_a_host_that_reads_where_tokens_go_waits_for_that() -> None:
    """With hosts that take next to nothing it changes nothing; else a step takes no less than if
    it went on, and no more than all that it launches and all that devices do."""
    model = replace(PLAIN, experts=Experts(8, 2, 48, steps=1))
    graph = model.graph(8)
    divided = division(graph, 1, proposals(graph))
    machine = Analytical(topology("1x8xh100-sxm"))
    strategy = by_degrees(divided, Degrees(data=8, experts=8), machine, MIXED)
    goes_on = {
        name: replace(bound, rule=replace(bound.rule, awaited=False))
        for name, bound in divided.rules.items()
    }

    def step_s(rules: Mapping[str, BoundRule], operator_s: float) -> tuple[float, float]:
        calibration = replace(machine.calibration, operator_s=operator_s)
        of = replace(machine, calibration=calibration)
        found = evaluate(divided.graph, rules, of, strategy)
        return found.step_time_s, found.launches_s

    devices_s, _ = step_s(goes_on, 1e-12)
    assert step_s(divided.rules, 1e-12)[0] == pytest.approx(devices_s)
    for operator_s in (1e-6, 3e-6, 1e-5, 1e-4):
        ahead_s, launches_s = step_s(goes_on, operator_s)
        host_s = ahead_s if launches_s else 0.0
        reads_s, _ = step_s(divided.rules, operator_s)
        assert reads_s >= ahead_s * (1 - 1e-9)
        if host_s:
            assert reads_s <= host_s + devices_s
    assert reads_s > ahead_s  # and some of what devices do is waited for


def test_biases_of_experts_are_added_in_float32() -> None:
    biased = replace(PLAIN, experts=Experts(4, 2, 48, biased=True))
    there, back = works(biased, "expert_bias")
    elements = PLAIN.length * 2 * PLAIN.width
    assert sum(one.bytes for one in there) == (4 + (2 + 4 + 4) + (4 + 4) + (4 + 2)) * elements
    *own, weights = back  # whose gradients come from here and from SwiGLU, and are added
    assert sum(one.bytes for one in own) == ((2 + 4) + (4 + 2) + 2 * (8 + 4) + 4) * elements
    assert weights.bytes == 3 * 2 * PLAIN.length * 2


def test_biases_are_of_the_experts_that_have_them() -> None:
    """Divided among devices with their experts, each a call of the host."""
    model = replace(PLAIN, experts=Experts(8, 2, 48, biased=True, apart=True))
    graph = model.graph(8)
    divided = division(graph, 1, proposals(graph))
    machine = cost_model("1x8xh100-sxm")
    strategy = by_degrees(divided, Degrees(data=8, experts=8), machine, MIXED)
    named = {o.op: o.name for o in divided.graph.operators if o.name.startswith("blocks.0.")}
    bias, product = named["fused.expert_bias.default"], named["fused.grouped.default"]
    (expert,) = strategy.splits[bias]
    assert divided.rules[bias].sizes[expert] == 8
    assert strategy.splits[bias] == strategy.splits[product]


def test_clamps_compare_what_they_were_given() -> None:
    """Each half of the product's result, copied, and joined with the other; back a byte for each
    comparison, one for whether both hold, and what is left of the gradient."""
    clamped = replace(PLAIN, experts=Experts(4, 2, 48, clamped=True))
    elements = PLAIN.length * 2 * 48
    for kernel, back_bytes in (("above", 3 + 5 + 4), ("on_both", 3 + 3 + 3 + 5 + 4)):
        there, back = works(clamped, f"clamped.{kernel}")
        assert sum(one.bytes for one in there) == (4 + 4) * elements
        assert sum(one.bytes for one in back) == back_bytes * elements
        assert there[0].instructions > there[1].instructions == 0


def test_a_norm_that_is_cast_reads_what_it_wrote() -> None:
    """For NVFP4 twice, since the tensor has a scale, too."""
    engine = replace(PLAIN, engine=True, cast_norms=True)
    wide = 2 * PLAIN.length * PLAIN.width
    for dtype, again in (("float8_e4m3fn", 1), ("float4_e2m1fn_x2", 2)):
        apart = works(replace(engine, products=dtype), "rms_norm")[0]
        plain = works(replace(engine, products=None), "rms_norm")[0]
        written = wide if again == 1 else wide // 2
        read = sum(one.bytes for one in apart) - written
        assert read == pytest.approx(sum(one.bytes for one in plain) + again * wide, rel=0.02)


# ---- tokens on their way -------------------------------------------------------------------------

MACHINE = topology("8x8xh100-sxm")


def sent_s(of: Dispatch | None, group: int = 64) -> float:
    question = Collective("all_to_all", 10**9, group, 1)
    return Analytical(MACHINE, dispatch=of).collective_time_s(question)


@pytest.mark.parametrize("group", [2, 8, 16, 64])
def test_tokens_that_go_once_to_each_place_take_no_longer(group: int) -> None:
    times = [sent_s(Dispatch(copies), group) for copies in (1, 2, 4, 8, 16)]
    assert times == sorted(times, reverse=True)
    assert times[0] == pytest.approx(sent_s(None, group))
    assert sent_s(Dispatch(8, 2), group) <= sent_s(Dispatch(8), group)


def test_a_token_for_all_hosts_comes_to_each_once() -> None:
    """Of eight copies on four hosts of eight, so many go as there are hosts."""
    assert sent_s(Dispatch(8, 4)) == pytest.approx(sent_s(None) / 2, rel=0.01)


def test_groups_of_experts_lie_on_fewer_hosts_than_there_are_groups() -> None:
    """Four of eight groups: on four of eight hosts, and of four hosts with two groups each on 3.14,
    where eight experts drawn evenly were on 3.6."""
    assert sent_s(Dispatch(8, 4, 8)) == sent_s(Dispatch(8, 4))
    some, evenly = sent_s(Dispatch(8, 4, 8), 32), sent_s(Dispatch(8, 4), 32)
    assert some / evenly == pytest.approx(3.14 / 3.6, rel=0.01)


# ---- rows ----------------------------------------------------------------------------------------

MOE = {
    **ROW,
    "source": "Megatron-Bridge, NeMo 25.11",
    "model_family": "DeepSeekV3(MLA)",
    "layers": "5",
    "hidden": "512",
    "heads": "8",
    "kv_heads": "8",
    "ffn": "1024",
    "gated_mlp": "True",
    "flash_attn": "True",
    "n_experts": "16",
    "topk": "4",
    "moe_ffn": "256",
    "gpu_type": "H100-80GB-SXM",
    "TP": "1",
    "PP": "1",
    "DP": "8",
    "EP": "8",
    "precision": "FP8-CS",
    "recompute": "selective modules moe_act",
    "micro_batch": "2",
    "sequence_parallel": "False",
}


def test_a_row_of_a_known_family_has_its_published_sizes() -> None:
    run = run_of(MOE)
    assert run.model.latent == Latent(512, 1536, 128, 64, 128)
    assert run.model.experts is not None
    assert (run.model.experts.shared, run.model.experts.after) == (256, 3)
    assert run.machine_model.dispatch == Dispatch(4, 4, 8)
    other = run_of({**MOE, "kv_lora_rank": "256", "first_k_dense_replace": "1"})
    assert other.model.latent == Latent(256, 1536, 128, 64, 128)
    ((_, one),) = predicted([run])
    assert not isinstance(one, Exception) and one.step_s > 0


def test_latent_attention_of_no_known_sizes_says_which_columns_would_do() -> None:
    with pytest.raises(SkippedError, match="give columns q_lora_rank, kv_lora_rank"):
        run_of({**MOE, "model_family": "Something(MLA)"})
    with pytest.raises(SkippedError, match="v_head_dim are not"):
        run_of({**MOE, "model_family": "Something", "kv_lora_rank": "512"})


def test_experts_are_run_as_the_program_of_the_release_does() -> None:
    """One by one, sorted and padded; narrow ones in one kernel since 2026 where one switch joins
    all, and those that are padded to their capacity without waiting for counts, and without the
    host where there is no pipeline."""
    release = {"source": "Megatron-Bridge, NeMo 26.08"}
    rows: list[dict[str, str]] = [
        {},
        {"precision": "bf16"},
        release,
        {**release, "gpu_type": "B200-180GB"},
        {**release, "gpu_type": "B200-180GB", "n_gpus": "16", "DP": "16", "global_batch": "32"},
        {"config_id": "a-tokendrop"},
        {"config_id": "a-tokendrop", "PP": "2", "n_gpus": "16"},
    ]
    found = [run_of({**MOE, **changes}) for changes in rows]
    told = [run.model.experts for run in found]
    assert [one and (one.sorted, one.padded, one.apart, one.steps > 0) for one in told] == [
        (True, True, True, True),
        (True, False, True, True),
        (True, True, True, True),
        (False, False, False, False),
        (True, True, True, True),
        (True, False, False, False),
        (True, False, True, False),
    ]
    hosts = [run.machine_model.host_time.operator_s for run in found]
    eager, captured = hosts[0], hosts[3]
    assert eager > captured
    assert hosts == [eager, eager, eager, captured, eager, captured, eager]


def test_tokens_go_once_to_a_host_since_programs_for_its_chips_do_so() -> None:
    def sent(**changes: str) -> Dispatch | None:
        return run_of({**MOE, **changes}).machine_model.dispatch

    newer = {"gpu_type": "B200-180GB"}
    assert sent() == sent(**newer, source="NeMo 26.02") == Dispatch(4, 4, 8)
    assert sent(**newer) is None
    assert sent(config_id="a-tokendrop") is None
    racks = {"model_family": "Qwen3", "gpu_type": "GB200-NVL72", "gpus_per_node": "72"}
    assert sent(**racks, source="NeMo 25.11") == Dispatch(4)
    assert sent(**racks, source="NeMo 25.09") is None


def test_what_goes_all_to_all_is_beside_another_microbatch_as_in_recipes() -> None:
    """Of interleaved pipelines on hosts that nothing but a network joins."""
    interleaved = {"PP": "2", "virtual_pp": "2", "layers": "8", "n_gpus": "16", "DP": "8"}

    def share(**changes: str) -> float:
        return overlap_of(run_of({**MOE, **changes})).experts

    assert 0 < share(**interleaved) < 1
    assert share() == share(**interleaved, config_id="a-tokendrop") == 0
    assert share(**interleaved, source="NeMo 24.07") == 0
    racks = {"gpu_type": "GB200-NVL72", "gpus_per_node": "72"}
    assert share(**interleaved, **racks) == 0
    assert share(**interleaved, **racks, source="NeMo 26.08") > 0  # captured as a whole


def test_what_is_hidden_is_a_share_of_what_goes_all_to_all() -> None:
    model, degrees = replace(PLAIN, experts=Experts(8, 2, 48)), Degrees(data=8, experts=8)
    plain, half = (evaluated(model, degrees, overlap=Overlap(experts=of)) for of in (0.0, 0.5))
    sent = [c for c in plain.collectives if c.kind == "all_to_all"]
    for phase, shorter_s in (
        ("forward", plain.forward_communication_s - half.forward_communication_s),
        ("backward", plain.backward_communication_s - half.backward_communication_s),
    ):
        whole_s = sum(c.time_s * c.count for c in sent if c.phase == phase)
        assert whole_s > 0
        assert shorter_s == pytest.approx(whole_s / 2)


def test_a_recipe_of_other_machines_recomputes_nothing_here() -> None:
    said = {"recompute": "selective layernorm+moe_act (recipe H100/B200)"}
    assert run_of({**MOE, **said}).degrees.recompute == "elementwise"
    other = run_of({**MOE, **said, "gpu_type": "B300-288GB"})
    assert other.degrees.recompute == "none"


def test_sizes_of_a_family_decide_its_kernels() -> None:
    """Clamped factors and scaled positions of gpt-oss, normalised heads of Qwen3."""

    def ops(**changes: str) -> set[str]:
        run = run_of({**MOE, "model_family": "GPT-OSS", **changes})
        return {
            f"{o.op} of {o.name.split('.')[2]}"
            for o in run.model.graph(1).operators[:60]
            if o.name.startswith("blocks.0.")
        }

    oss, qwen = ops(), ops(model_family="Qwen3")
    assert any(op.startswith("fused.clamped.above") for op in oss)
    assert any(op.startswith("fused.rotary.in_steps") for op in oss)
    assert not any("clamped" in op or "in_steps" in op for op in qwen)
    assert {op.split(" of ")[1] for op in qwen} >= {"q_norm", "k_norm"}
    assert not {"q_norm", "k_norm"} & {op.split(" of ")[1] for op in oss}
    plain = ops(swiglu_limit="", rope_factor="1", model_family="Llama3")
    assert not any("clamped" in op or "in_steps" in op for op in plain)


def test_families_are_found_by_what_they_are_called() -> None:
    for family in (
        "DeepSeekV3(MLA)",
        "deepseek-v3",
        "Kimi-K2",
        "DeepSeek V2 Lite",
        "GPT-OSS",
        "Qwen3-MoE",
        "Falcon",
    ):
        assert families.published(family), family
    for family in ("Llama3", "GPT", "GPT-2", "MPT (GPT, ALiBi/learned pos)", "Qwen2", ""):
        assert not families.published(family), family
    assert all(re.compile(name) for name, _ in families.FAMILIES)
    assert {size for _, sizes in families.FAMILIES for size in sizes} <= set(families.COLUMNS)


def test_layers_with_a_window_and_without_take_turns() -> None:
    row = {**MOE, "model_family": "GPT-OSS", "seq_len": "2048", "precision": "bf16"}
    run = run_of(row)
    assert run.model.near == round(((2048 + 128) / 2 + 2 * 128) / 2)
    assert run.model.experts is not None and run.model.experts.biased
    assert run_of({**row, "seq_len": "128"}).model.near == 0
    assert run_of({**row, "sliding_window_pattern": "1"}).model.near == 256


def test_blocks_that_read_the_same_are_told_by_the_family_or_in_the_notes() -> None:
    told = ({}, {"notes": "uses parallel block + SWA"}, {"model_family": "GPT-NeoX"})
    assert [run_of({**ROW, **cells}).model.parallel for cells in told] == [False, True, True]


def test_megatrons_own_fsdp_has_the_kernels_of_megatron() -> None:
    cells = {"zero_fsdp": "FSDP (ZeRO-3)", "EP": "1", "n_experts": "", "model_family": "Llama3"}
    ours, theirs = (run_of({**MOE, **cells, "source": s}) for s in (MOE["source"], "a table"))
    assert ours.program.shards and ours.program.is_megatron and ours.model.engine
    assert theirs.program.shards and not theirs.program.is_megatron


def test_activations_on_the_host_are_not_judged_by_what_a_device_has() -> None:
    small = {"hidden": "4096", "layers": "4", "global_batch": "512", "micro_batch": "256"}
    small |= {"seq_len": "4096", "heads": "32", "kv_heads": "32", "ffn": "16384"}
    row = {**ROW, **small, "flash_attn": "True"}
    _, (kept,) = validate([{**row, "recompute": "none"}])
    (found, _), (offloaded,) = validate([{**row, "recompute": "none (CPU activation offload)"}])
    assert kept.false_reject and not offloaded.fits and not offloaded.false_reject
    assert (offloaded.step_s, found.not_judged) == (kept.step_s, 1)
    assert any("kept by the host" in what for what in found.assumed)
