"""What kernels an operator has, forward and backward, and what they move."""

from __future__ import annotations

import pytest

from autopar.ir.sharding import Mesh
from autopar.ops import bound_rules
from autopar.simulator.costs import attended, work
from autopar.simulator.microbatches import division
from benchmarks.transformer import Transformer
from cost_models.interface import Work

TOKENS, WIDTH, HALF = 2 * 1024, 256, 2  # bytes of a number
SIZES = Transformer(1, WIDTH, 4, 4, 4 * WIDTH, 512, 1024, fused_loss=True)
GRAPH = SIZES.graph(2)
RULES = bound_rules(GRAPH)
ALONE = Mesh((("device", 1),))


def kernels(name: str, *, wanted: tuple[bool, ...] | None = None) -> tuple[list[Work], list[Work]]:
    operator = GRAPH.operator[name]
    if wanted is None:
        wanted = tuple(GRAPH.by_name[n].differentiable for n in operator.inputs)
    return work(RULES[name], (None,), ALONE, wanted)


def test_causal_attention_works_on_half_of_the_pairs_and_on_the_diagonals_blocks() -> None:
    (forward,), (backward,) = kernels("blocks.0.scaled_dot_product_attention")
    pairs = 2 * 4 * 1024 * (1024 + 128) / 2  # samples, heads
    assert forward.flops == pytest.approx(2 * 2 * pairs * (WIDTH // 4))
    assert backward.flops == pytest.approx(2.5 * forward.flops)


def test_the_share_of_pairs_falls_from_all_to_half() -> None:
    shares = [attended(2**n) for n in range(4, 24)]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == 1.0 and shares[-1] == pytest.approx(0.5, rel=1e-4)


def test_gradients_of_what_all_rows_share_are_made_by_another_kernel() -> None:
    """A norm's scale and shift: what comes back and the input are read once more."""
    (forward,), backward = kernels("blocks.0.norm_1.layer_norm")
    x, rows, weights = TOKENS * WIDTH * HALF, 2 * TOKENS * HALF, 2 * WIDTH * HALF
    assert forward.bytes == 2 * x + weights + rows
    whole, shared = (one.bytes for one in backward)
    assert whole == pytest.approx(3 * x, rel=0.02)
    assert shared == pytest.approx(2 * x, rel=0.02)
    _, (only,) = kernels("blocks.0.norm_1.layer_norm", wanted=(True, False, False))
    assert only.bytes == pytest.approx(3 * x, rel=0.02)


def test_the_gradient_of_a_bias_is_a_sum_over_rows() -> None:
    _, backward = kernels("blocks.0.up.linear")
    assert [one.kind for one in backward] == ["matmul", "matmul", "memory"]
    assert backward[-1].bytes == (TOKENS + 1) * 4 * WIDTH * HALF
    _, without = kernels("blocks.0.up.linear", wanted=(True, True, False))
    assert without == backward[:2]


def test_views_are_free_but_for_putting_gradients_of_parts_together() -> None:
    assert kernels("blocks.0.view") == ([], [])
    forward, (together,) = kernels("blocks.0.split")
    assert forward == []
    assert together.bytes == 2 * 3 * TOKENS * WIDTH * HALF


def test_what_a_forward_keeps_beside_its_tensors_is_written() -> None:
    """The loss keeps probabilities of all classes."""
    forward, backward = kernels("cross_entropy_loss")
    logits = TOKENS * SIZES.vocabulary
    assert sum(one.bytes for one in forward) == pytest.approx(2 * logits * HALF, rel=0.02)
    assert backward[-1].bytes == pytest.approx(3 * logits * HALF, rel=0.02)


def test_microbatches_of_one_sample_have_half_the_kernels_work() -> None:
    of = division(GRAPH, 2)
    name = "blocks.0.scaled_dot_product_attention"
    (half,), _ = work(of.rules[name], (None,), ALONE, (True,) * 3)
    (whole,), _ = kernels(name)
    assert half.flops == pytest.approx(whole.flops / 2)
