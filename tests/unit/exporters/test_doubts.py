"""What is shown of an estimate says how far it may be off, and what would tell more."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from autopar import api
from autopar.exporters import EXPORTERS, doubts, stages, text
from autopar.exporters.doubts import BEYOND_A_HOST, largest_doubt
from autopar.exporters.units import peak_text, step_text
from autopar.ir.measurement import Measurement
from autopar.ir.plan import Plan, plan_from_json, plan_to_json
from autopar.ir.search import Tie
from autopar.ops import bound_rules
from autopar.simulator.bands import with_band
from cost_models import cost_model
from cost_models.bands import DATASHEET, KINDS, PROFILED, Bands, Widths
from cost_models.saved import cost_model_to_json
from tests.helpers import fake_plans

WIDTHS = Widths({"products": 0.1, "between": 0.4}, 0.02, 0.1, 9, 9)
BANDS = Bands(0.8, "2026-11-26", "autopar", {DATASHEET: WIDTHS, PROFILED: WIDTHS})
HOSTS = cost_model("2x4xa100-sxm-80gb")


def plan(**shares: float) -> Plan:
    found = fake_plans.priced(2)
    step_s = found.estimate.step_time_s
    spent = {kind: share * step_s for kind, share in shares.items()}
    return replace(found, estimate=with_band(found.estimate, spent, HOSTS, BANDS))


def products_to(width: float) -> Widths:
    return replace(WIDTHS, kinds={"products": width})


def tied() -> Plan:
    found = plan(products=1.0)
    best = Tie("", fake_plans.MESH, 1e-3, 0.0, 0.02, 5000, 2000, 2, 1, 4, 0)
    other = replace(best, name="megatron", step_time_s=1.01e-3, slower=0.01, sent_bytes=100)
    return replace(found, search=replace(found.search, ties=(best, other)))


def test_a_step_and_its_peak_are_shown_with_what_they_may_be() -> None:
    estimate = plan(products=1.0).estimate
    assert step_text(estimate) == "43.9 us (39.7–48.5)"
    assert peak_text(estimate) == "5.00 kB (4.52–5.53)"
    assert step_text(replace(estimate, band=None)) == "43.9 us"
    said = text.summary(plan(products=1.0))
    assert "step 43.9 us (39.7–48.5): forward" in said
    assert "peak memory 5.00 kB (4.52–5.53) of 10.0 MB on each device\n" in said
    assert "43.9 us (39.7–48.5)" in text.estimate(estimate, "a machine")
    assert "39.7–48.5" in EXPORTERS["html"](
        plan(products=1.0), bound_rules(fake_plans.two_blocks())
    )
    run = Measurement((1.0, 1.0), (4e-5, 4e-5), 5000)
    assert "43.9 us (39.7–48.5)   40.0 us" in text.measurement(plan(products=1.0), run, None)


def test_where_the_limit_is_inside_the_band_of_memory_it_is_said() -> None:
    found = plan(products=1.0)
    search = replace(found.search, memory_limit_bytes=5200)
    assert "of 5.20 kB on each device, which may be too little" in text.summary(
        replace(found, search=search)
    )


def test_ties_are_shown_with_what_they_trade() -> None:
    said = text.summary(tied()).split("\n")
    place = next(i for i, line in enumerate(said) if line.startswith("ties"))
    columns, best, other = said[place + 1 : place + 4]
    assert columns.split()[:3] == ["mesh", "step", "slower"]
    assert " ".join(best.split()) == "data 2 x tensor 4 1.00 ms 5.00 kB 2.00 kB 1 4 2 0"
    traded = "megatron 1.01 ms +1.0% 2.0% 5.00 kB 100 B 1 4 2 0"
    assert " ".join(other.split()) == f"data 2 x tensor 4 {traded}"
    assert "ties" not in text.summary(plan(products=1.0))


def test_the_explanation_names_the_largest_doubt_and_what_would_tell() -> None:
    found = plan(products=0.7, between=0.3)
    said = text.explain(found, bound_rules(found.graph))
    assert "largest doubt: collectives between hosts, 13.2 us of the step" in said
    assert "may be longer by 5.26 us for it alone (75% of the band)" in said
    assert "what would tell: `torchrun ... -m autopar profile -o FILE` on all its hosts" in said
    data = json.loads(EXPORTERS["json"](found, bound_rules(found.graph)))
    assert data["largest_doubt"]["kind"] == "between"
    assert data["largest_doubt"]["share"] == pytest.approx(0.12**2 / (0.12**2 + 0.07**2))
    assert data["estimate"]["band"]["doubts"][0]["kind"] == "between"


def test_a_kind_that_no_run_tells_of_is_said() -> None:
    found = plan(attention=1.0)
    said = text.explain(found, bound_rules(found.graph))
    assert "fused attention" in said and "no run that is known tells more" in said


@pytest.mark.parametrize(
    ("machine", "kind", "remedy"),
    [
        ("2x4xa100-sxm-80gb", "products", "`autopar profile` on one of its hosts"),
        ("2x4xa100-sxm-80gb", "between", "`torchrun ... -m autopar profile -o FILE` on all"),
        ("1x8xa100-sxm-80gb", "inside", "`autopar profile -o FILE` on this machine"),
    ],
)
def test_what_would_tell_is_what_can_measure_it(machine: str, kind: str, remedy: str) -> None:
    topology = cost_model_to_json(cost_model(machine))
    doubt = largest_doubt(replace(plan(**{kind: 1.0}), topology=topology))
    assert doubt is not None and remedy in doubt.remedy
    assert set(BEYOND_A_HOST) < set(KINDS)


def test_of_a_machine_that_was_measured_only_a_step_tells_more() -> None:
    found = plan(products=1.0)
    doubt = largest_doubt(replace(found, topology={**found.topology, "profiled": {}}))
    assert doubt is not None and "`autopar calibrate --from-run RUN -o FILE`" in doubt.remedy


def test_what_was_corrected_by_a_step_asks_for_others() -> None:
    found = plan(products=1.0)
    topology = {**found.topology, "profiled": {"corrections": [{"of": "a"}]}}
    doubt = largest_doubt(replace(found, topology=topology))
    assert doubt is not None and doubt.remedy.startswith("steps of other plans")


def test_a_measurement_that_left_as_much_doubt_elsewhere_is_no_promise() -> None:
    """Prices of products are known to a tenth, and to half of that once measured; or the other way
    round."""
    for then, promised in ((0.05, True), (0.2, False)):
        known = Bands(0.8, "2026-11-26", "", {DATASHEET: WIDTHS, PROFILED: products_to(then)})
        found = plan(products=1.0)
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(doubts, "known_bands", lambda known=known: known)
            said = text.explain(found, bound_rules(found.graph))
        line = "where that was done, such prices were off by as much as 20%; by 10%, before"
        assert (line in said) != promised


def test_a_kind_that_is_no_longer_told_apart_is_explained() -> None:
    """As plans of an earlier autopar may have it."""
    found = plan(products=1.0)
    band = found.estimate.band
    assert band is not None
    old = replace(band, doubts=(replace(band.doubts[0], kind="kernels"),))
    found = replace(found, estimate=replace(found.estimate, band=old))
    doubt = largest_doubt(found)
    assert doubt is not None and doubt.width_then is None
    assert "largest doubt: kernels" in text.explain(found, bound_rules(found.graph))


def test_a_device_that_no_run_was_on_is_named() -> None:
    found = plan(products=1.0)
    said = text.explain(found, bound_rules(found.graph))
    assert "no run on a100-sxm-80gb is known; bands are those of other devices" in said
    there = Bands(0.8, "", "", {DATASHEET: replace(WIDTHS, devices=("a100-sxm-80gb",))})
    spent = {"products": found.estimate.step_time_s}
    known = replace(found, estimate=with_band(found.estimate, spent, HOSTS, there))
    assert "no run on" not in text.explain(known, bound_rules(found.graph))


def test_meshes_whose_bounds_do_not_exclude_a_tie_are_counted() -> None:
    found = tied()
    step_s = found.estimate.step_time_s
    trials = tuple(
        replace(trial, outcome="bounded", lower_bound_s=step_s * more)
        for trial, more in zip(found.search.trials, (1.0, 1.01, 1.03, 2.0, 3.0), strict=True)
    )
    said = text.summary(replace(found, search=replace(found.search, trials=trials)))
    assert "not searched, and their bounds do not exclude a tie: 2" in said


def test_plans_without_bands_and_ties_are_read_and_shown_as_before() -> None:
    old = json.loads(json.dumps(plan_to_json(fake_plans.priced(2))))
    assert "band" not in old["estimate"] and "ties" not in old["search"]
    found = plan_from_json(old)
    assert largest_doubt(found) is None
    assert "doubt" not in text.explain(found, bound_rules(found.graph))


def test_bands_and_ties_survive_the_file() -> None:
    found = tied()
    assert plan_from_json(json.loads(json.dumps(plan_to_json(found)))) == found


def test_two_plans_that_may_be_as_fast_are_a_tie() -> None:
    a, b = plan(products=1.0), plan(products=0.5, between=0.5)
    changed = replace(b, strategy=replace(b.strategy, microbatches=2))
    found = api.diff(a, changed)
    assert found.within is not None and found.within > 1.2
    assert ": a tie, it is known to a factor of 1.2" in text.difference(found)
    assert "tie" not in text.difference(api.diff(a, a))
    elsewhere = replace(changed, topology={**changed.topology, "name": "another"})
    assert api.diff(a, elsewhere).within is None
    assert "tie" not in text.difference(api.diff(fake_plans.priced(2), changed))


def test_a_plan_of_a_profiled_graph_has_its_band_and_its_doubt() -> None:
    found = api.plan("examples/two_towers.json", topology="1x4xa100-sxm-80gb", time_limit_s=5)
    band = found.estimate.band
    assert band is not None and band.low_s < found.estimate.step_time_s < band.high_s
    assert {doubt.kind for doubt in band.doubts} >= {"measured"}
    assert f"step {step_text(found.estimate)}" in stages.summary(found)
    assert "largest doubt: " in api.explain(found)
    assert api.simulate(found).band == band
