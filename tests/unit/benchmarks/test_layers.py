"""Single layers are priced as the difference of models that have a few more."""

from __future__ import annotations

import pytest

from benchmarks.layers import layers

ROW = {"kind": "layer_time", "gpu": "A100-80GB", "value": "1.0/2.0", "source": "a table"}
CONFIG = "h6144 a64 s2048 mbs4 TP8, no recompute"


def row(what: str, config: str = "same") -> dict[str, str]:
    return {**ROW, "what": what, "config": config}


def test_what_is_recomputed_is_in_the_backward_and_sharding_the_sequence_spares_passes() -> None:
    plain, full, some, divided = layers(
        [
            row("baseline", CONFIG),
            row("full recompute"),
            {**row("the largest product"), "kind": "gemm_max"},
            row("selective recompute"),
            row("+sequence parallel"),
        ]
    )
    assert (plain.measured_forward_ms, plain.measured_backward_ms) == (1.0, 2.0)
    assert plain.forward_ms == pytest.approx(full.forward_ms)
    assert plain.backward_ms < some.backward_ms < full.backward_ms
    # the last product of a layer is not done again
    assert full.backward_ms - plain.backward_ms < full.forward_ms
    assert full.backward_ms - plain.backward_ms > 0.7 * full.forward_ms
    assert divided.forward_ms < plain.forward_ms
