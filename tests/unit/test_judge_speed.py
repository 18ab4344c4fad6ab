import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgedeploy.judge.family import ErrorRate
from edgedeploy.judge.margin import margin_from_text
from edgedeploy.judge.speed import blocks_of, can_more_blocks_decide, judge_latency, latency_evidence
from edgedeploy.records.run import Boundary, Burst

from .judge_samples import BASE_S, make_visit, normal_effects, policy, run_of, runs_with_effects

RATE = ErrorRate(0.05, 0.05)
MARGIN = "+5%"
LIMIT = math.log(1.05)


def evidence_of(runs, margin=MARGIN, metric="latency_p50"):
    return latency_evidence(metric, *runs, margin_from_text(metric, margin) if margin else None)


def judged(runs, margin=MARGIN, *, metric="latency_p50", rate=RATE, **looks):
    return judge_latency(evidence_of(runs, margin, metric), policy(**looks), error_rate=rate)


def test_slow_fails_fast_passes_and_a_change_on_the_margin_is_inconclusive():
    assert judged(runs_with_effects(normal_effects(1, 0.10, 0.01))).decision == "FAIL"
    assert judged(runs_with_effects(normal_effects(1, 0.0, 0.01))).decision == "PASS"
    undecided = judged(runs_with_effects(normal_effects(1, LIMIT, 0.01)))
    assert undecided.decision == "INCONCLUSIVE"
    assert undecided.units == 16
    assert undecided.low < 0.05 < undecided.high
    assert "blocks" in undecided.needed


def test_a_demanded_improvement_must_be_shown():
    assert judged(runs_with_effects(normal_effects(2, math.log(0.7), 0.01)), "-20%").decision == "PASS"
    assert judged(runs_with_effects(normal_effects(2, math.log(0.9), 0.01)), "-20%").decision == "FAIL"


def test_an_absolute_margin_is_in_seconds():
    finding = judged(runs_with_effects(normal_effects(3, 0.10, 0.01)), "+0.1ms")
    assert finding.decision == "FAIL"
    assert finding.effect == pytest.approx(0.1 * BASE_S, rel=0.2)
    assert judged(runs_with_effects(normal_effects(3, 0.10, 0.01)), "+1ms").decision == "PASS"


def test_effect_and_interval_are_those_of_a_t_test_over_blocks():
    from scipy import stats

    from edgedeploy.judge.spending import nominal_levels

    effects = normal_effects(4, LIMIT, 0.02, 8)
    finding = judged(runs_with_effects(effects), max_blocks=8)
    level = nominal_levels(4, 8, 0.05)[-1]
    interval = stats.ttest_1samp(effects, 0).confidence_interval(1 - 2 * level)
    assert finding.effect == pytest.approx(math.expm1(np.mean(effects)))
    assert finding.low == pytest.approx(math.expm1(interval.low))
    assert finding.high == pytest.approx(math.expm1(interval.high))
    assert finding.p_fail == pytest.approx(stats.ttest_1samp(effects, LIMIT, alternative="greater").pvalue)


def test_interval_over_blocks_agrees_with_a_bootstrap_over_blocks():
    from scipy import stats

    effects = normal_effects(5, 0.02, 0.03, 30)
    finding = judged(runs_with_effects(effects), None, min_blocks=30, max_blocks=30)
    bootstrap = stats.bootstrap(
        (effects,), np.mean, confidence_level=0.9, n_resamples=4000, rng=np.random.default_rng(6)
    ).confidence_interval
    width = math.log1p(finding.high) - math.log1p(finding.low)
    assert math.log1p(finding.low) == pytest.approx(bootstrap.low, abs=0.1 * width)
    assert math.log1p(finding.high) == pytest.approx(bootstrap.high, abs=0.1 * width)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.03, LIMIT, 0.07, 0.12]), st.sampled_from([0.003, 0.02, 0.05]))
def test_what_is_decided_stays_decided_with_more_blocks(seed, mean, spread):
    effects = normal_effects(seed, mean, spread)
    decisions = [judged(runs_with_effects(effects[:count])).decision for count in range(4, 17)]
    first = next((place for place, decision in enumerate(decisions) if decision != "INCONCLUSIVE"), len(decisions))
    assert set(decisions[first:]) <= {decisions[first]} if first < len(decisions) else True
    assert set(decisions[:first]) <= {"INCONCLUSIVE"}


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.05, 0.1]))
def test_exchanging_the_sides_turns_the_effect(seed, mean):
    effects = normal_effects(seed, mean, 0.02, 6)
    baseline, candidate = runs_with_effects(effects)
    there, back = judged((baseline, candidate), None), judged((candidate, baseline), None)
    assert math.log1p(there.effect) == pytest.approx(-math.log1p(back.effect))
    assert math.log1p(there.low) == pytest.approx(-math.log1p(back.high))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.floats(1e-6, 1e3))
def test_a_relative_verdict_does_not_depend_on_the_clock_unit(seed, scale):
    effects = normal_effects(seed, 0.04, 0.02, 8)
    here = judged(runs_with_effects(effects))
    scaled = [
        run_of("baseline", [BASE_S * scale] * 8),
        run_of("candidate", [BASE_S * scale * math.exp(effect) for effect in effects]),
    ]
    there = judged(scaled)
    assert (there.decision, there.units) == (here.decision, here.units)
    assert there.effect == pytest.approx(here.effect, abs=1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.05, 0.1]))
def test_a_wider_margin_never_gives_a_worse_verdict_at_one_look(seed, mean):
    order = ("FAIL", "INCONCLUSIVE", "PASS")
    runs = runs_with_effects(normal_effects(seed, mean, 0.03, 6))
    places = [
        order.index(judged(runs, f"+{percent}%", min_blocks=6, max_blocks=6).decision) for percent in (1, 5, 10, 30)
    ]
    assert places == sorted(places)


@pytest.mark.parametrize("spread", [0.01, 0.04])
def test_wrong_verdicts_on_the_margin_stay_within_the_error_rate(spread):
    gates = 400
    decisions = [judged(runs_with_effects(normal_effects(seed, LIMIT, spread))).decision for seed in range(gates)]
    allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / gates)
    assert decisions.count("FAIL") / gates <= allowed
    assert decisions.count("PASS") / gates <= allowed


def test_a_quiet_device_is_decided_at_the_first_look_and_ten_percent_are_seen_on_a_common_one():
    quiet = [judged(runs_with_effects(normal_effects(seed, 0.0, 0.005))) for seed in range(50)]
    assert {(finding.decision, finding.units) for finding in quiet} == {("PASS", 4)}
    common = [judged(runs_with_effects(normal_effects(seed, math.log(1.1), 0.02))).decision for seed in range(100)]
    assert common.count("FAIL") >= 98


def test_identical_blocks_are_decided_at_the_first_look():
    finding = judged(runs_with_effects([0.0] * 4))
    assert (finding.decision, finding.effect, finding.low, finding.high) == ("PASS", 0.0, 0.0, 0.0)


def test_bursts_are_paired_so_that_drift_within_a_visit_cancels():
    drift = [1.0, 1.5, 2.5, 1.2, 0.9, 1.1]

    def drifting(factor, order):
        bursts = tuple(Burst(pair=pair, samples_s=(BASE_S * drift[pair] * factor,) * 10) for pair in order)
        return replace(make_visit(0, BASE_S), bursts=bursts)

    # The candidate misses the slowest pair and ran the others in another order.
    blocks = blocks_of("latency_p50", [drifting(1, range(6))], [drifting(1.03, (5, 0, 4, 1, 3))], is_relative=True)
    assert blocks.usable[0].effect == pytest.approx(math.log(1.03))


def test_unpaired_bursts_fall_back_to_the_medians_of_the_visits():
    before = make_visit(0, BASE_S)
    after = replace(make_visit(0, 1.02 * BASE_S), bursts=(Burst(pair=99, samples_s=(1.02 * BASE_S,) * 5),))
    blocks = blocks_of("latency_p50", [before], [after], is_relative=True)
    assert blocks.usable[0].effect == pytest.approx(math.log(1.02))


def test_a_block_with_two_visits_a_side_is_still_one_block():
    before = [make_visit(0, BASE_S), make_visit(0, BASE_S)]
    after = [make_visit(0, 1.1 * BASE_S), make_visit(0, 1.1 * BASE_S)]
    blocks = blocks_of("latency_p50", before, after, is_relative=True)
    assert [block.effect for block in blocks.usable] == [pytest.approx(math.log(1.1))]


def with_block(run, block, **changes):
    visits = tuple(
        replace(make_visit(block, 100 * BASE_S), **changes) if visit.block == block else visit for visit in run.visits
    )
    return replace(run, visits=visits)


def test_dropped_throttled_and_half_measured_blocks_do_not_count():
    baseline, candidate = runs_with_effects([0.0] * 12)
    candidate = with_block(candidate, 1, dropped="a signal came")
    baseline = with_block(baseline, 3, after=make_visit(3, 1, throttled=True).after)
    candidate = replace(candidate, visits=tuple(visit for visit in candidate.visits if visit.block != 5))
    finding = judged((baseline, candidate))
    assert finding.decision == "PASS"
    assert finding.effect == 0.0
    assert "3 dropped" in finding.reason


def test_gate_is_inconclusive_when_too_many_blocks_are_dropped():
    baseline, candidate = runs_with_effects([0.0] * 8)
    for block in (0, 1, 2):
        candidate = with_block(candidate, block, dropped="throttled")
    finding = judged((baseline, candidate))
    assert (finding.decision, finding.units) == ("INCONCLUSIVE", 5)
    assert "3 blocks were dropped to 5 that count" in finding.needed
    # Further blocks that count bring the share down.
    longer = runs_with_effects([0.0] * 12)
    candidate = replace(longer[1], visits=candidate.visits + longer[1].visits[8:])
    assert judged((longer[0], candidate)).decision == "PASS"


def test_blocks_beyond_the_last_look_are_not_used():
    effects = normal_effects(1, LIMIT, 0.01)
    finding = judged(runs_with_effects([*effects, *[0.5] * 50]))
    assert (finding.decision, finding.units) == ("INCONCLUSIVE", 16)
    assert "50 more measured after this look and not used" in finding.reason


def test_before_the_first_look_nothing_is_decided():
    finding = judged(runs_with_effects([0.9, 0.9, 0.9]))
    assert finding.decision == "INCONCLUSIVE"
    assert finding.needed == "at least 1 more A/B blocks for the first look"
    assert judged(runs_with_effects([0.9])).low is None
    assert judged(runs_with_effects([])).needed == "at least 4 A/B blocks"


def test_wild_blocks_have_a_bound_and_not_an_overflow():
    finding = judged(runs_with_effects([0.0, 8.0]), min_blocks=2, max_blocks=4, rate=ErrorRate(1e-4, 1e-4))
    assert finding.decision == "INCONCLUSIVE"
    assert finding.high > 1e100


def test_p95_needs_59_samples_a_visit():
    fewer = [
        replace(run, visits=tuple(make_visit(visit.block, BASE_S, samples=50) for visit in run.visits))
        for run in runs_with_effects([0.0] * 8)
    ]
    finding = judged(fewer, metric="latency_p95")
    assert finding.decision == "INCONCLUSIVE"
    assert "fewer than 59 samples" in finding.reason
    assert not can_more_blocks_decide(evidence_of(fewer, metric="latency_p95"), policy())
    assert judged(fewer).decision == "PASS"


def test_p95_sees_a_tail_that_p50_does_not():
    random_ = random.Random(11)

    def with_tail(run, share):
        visits = []
        for visit in run.visits:
            samples_s = [BASE_S * math.exp(random_.gauss(0, 0.01)) for _ in range(100)]
            for place in range(round(share * 100)):
                samples_s[place] *= 2
            visits.append(replace(visit, bursts=(Burst(pair=0, samples_s=tuple(samples_s)),)))
        return replace(run, visits=tuple(visits))

    baseline, candidate = runs_with_effects([0.0] * 12)
    runs = with_tail(baseline, 0.0), with_tail(candidate, 0.08)
    assert judged(runs).decision == "PASS"
    assert judged(runs, metric="latency_p95").decision == "FAIL"


BOUNDARY = Boundary(includes_input_copy=True, includes_output_copy=True, threads=1, batch=1)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"device": "another"}, "measured on pi5-desk and the candidate on another"),
        ({"session": "another"}, "not measured interleaved"),
        ({"boundary": BOUNDARY}, "includes_input_copy is False for the baseline and True"),
        ({"cpu_model": "another"}, "processor Cortex-A76 for the baseline and another"),
        ({"boot_id": "another"}, "was restarted"),
    ],
)
def test_runs_that_are_not_alike_are_inconclusive_with_a_way_out(changes, says):
    baseline, candidate = runs_with_effects([0.0] * 8)
    facts = {name: changes.pop(name) for name in ("cpu_model", "boot_id") if name in changes}
    candidate = replace(candidate, facts=replace(candidate.facts, **facts), **changes)
    finding = judged((baseline, candidate))
    assert finding.decision == "INCONCLUSIVE"
    assert says in finding.reason
    assert "measure both artifacts" in finding.needed
    assert finding.baseline_value == pytest.approx(BASE_S)
    assert not can_more_blocks_decide(evidence_of((baseline, candidate)), policy())


@pytest.mark.parametrize("sample_s", [0.0, -0.001, float("nan"), float("inf")])
def test_a_sample_that_no_clock_can_say_is_inconclusive(sample_s):
    baseline, candidate = runs_with_effects([0.0] * 8)
    broken = replace(candidate.visits[3], bursts=(Burst(pair=0, samples_s=(BASE_S, sample_s)),))
    candidate = replace(candidate, visits=(*candidate.visits[:3], broken, *candidate.visits[4:]))
    finding = judged((baseline, candidate))
    assert finding.decision == "INCONCLUSIVE"
    assert f"block 3 holds an inference that took {sample_s} s" in finding.reason


def test_a_run_in_which_no_visit_succeeded_says_so():
    baseline, candidate = runs_with_effects([])
    finding = judged((baseline, replace(candidate, boundary=None)))
    assert finding.reason == "no A/B block was measured"


def test_needed_blocks_are_enough_when_measured():
    effects = normal_effects(21, 0.02, 0.03, 60)
    undecided = judged(runs_with_effects(effects), max_blocks=6)
    assert undecided.decision == "INCONCLUSIVE"
    assert "more than the 6 in all that the policy allows" in undecided.needed
    assert judged(runs_with_effects(effects), max_blocks=60).decision == "PASS"
