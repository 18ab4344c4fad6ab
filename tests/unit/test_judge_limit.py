"""Limits on the candidate itself: latency, memory, size and accuracy, alone and beside a change."""

import math

import pytest
from msgspec.structs import replace

from edgedeploy.judge.accuracy import judge_accuracy
from edgedeploy.judge.family import ErrorRate
from edgedeploy.judge.footprint import judge_artifact_size, judge_peak_memory
from edgedeploy.judge.gate import is_decided, judge
from edgedeploy.judge.margin import margin_from_text
from edgedeploy.judge.speed import can_more_blocks_decide, judge_latency, latency_evidence

from .judge_samples import (
    BASE_S,
    answers,
    finding_of,
    make_visit,
    memory_of,
    normal_effects,
    outputs_of,
    policy,
    run_of,
    runs_with_effects,
)

RATE = ErrorRate(0.05, 0.05)
MIB = 2**20


def latency(runs, text, metric="latency_p50", rate=RATE, **looks):
    evidence = latency_evidence(metric, *runs, margin_from_text(metric, text))
    return judge_latency(evidence, policy(**looks), error_rate=rate)


def own_levels(seed, level_s, spread, count=16):
    """A candidate whose visits lie about a level, beside a baseline that says nothing of it."""
    return (
        run_of("baseline", [1.0] * count),
        run_of("candidate", [level_s * math.exp(one) for one in normal_effects(seed, 0.0, spread, count)]),
    )


def test_a_limit_is_kept_broken_or_not_decided():
    assert latency(own_levels(1, 0.004, 0.02), "<= 5ms").decision == "PASS"
    assert latency(own_levels(1, 0.006, 0.02), "<= 5ms").decision == "FAIL"
    undecided = latency(own_levels(1, 0.005, 0.02), "<= 5ms")
    assert undecided.decision == "INCONCLUSIVE"
    assert undecided.limit.low < 0.005 < undecided.limit.high
    assert "blocks" in undecided.needed
    assert "neither side of the limit of 5 ms" in undecided.reason


def test_effect_and_interval_of_a_limit_are_those_of_a_t_test_over_logarithms():
    import numpy as np
    from scipy import stats

    runs = own_levels(2, 0.005, 0.02, 8)
    finding = latency(runs, "<= 5ms", min_blocks=8, max_blocks=8)
    levels = np.log([visit.bursts[0].samples_s[0] for visit in runs[1].visits])
    interval = stats.ttest_1samp(levels, 0).confidence_interval(0.9)
    assert finding.limit.value == pytest.approx(math.exp(levels.mean()))
    assert (finding.limit.low, finding.limit.high) == (
        pytest.approx(math.exp(interval.low)),
        pytest.approx(math.exp(interval.high)),
    )
    assert finding.p_fail == pytest.approx(stats.ttest_1samp(levels, math.log(0.005), alternative="greater").pvalue)


@pytest.mark.parametrize(
    ("effect", "text", "decision"),
    [
        (0.0, "+5%, <= 5ms", "PASS"),
        (0.0, "+5%, <= 3ms", "FAIL"),
        (0.15, "+5%, <= 5ms", "FAIL"),
        (0.15, "+30%, <= 5ms", "PASS"),
        (math.log(1.05), "+5%, <= 5ms", "INCONCLUSIVE"),
        (0.0, "+5%, <= 4ms", "INCONCLUSIVE"),
        (math.log(1.05), "+5%, <= 3ms", "FAIL"),
    ],
)
def test_a_change_and_a_limit_must_both_hold(effect, text, decision):
    finding = latency(runs_with_effects(normal_effects(3, effect, 0.01)), text)
    assert finding.decision == decision
    assert finding.margin.text == text
    assert finding.limit.limit == pytest.approx(margin_from_text("latency_p50", text).limit)
    assert "margin of +" in finding.reason
    assert "limit of" in finding.reason
    assert bool(finding.needed) == (decision == "INCONCLUSIVE")
    assert finding.low < finding.effect < finding.high


def test_a_limit_needs_no_baseline_to_be_judged():
    baseline, candidate = own_levels(4, 0.004, 0.02)
    there = replace(baseline, session="another", device="elsewhere")
    finding = latency((there, candidate), "<= 5ms")
    assert (finding.decision, finding.effect) == ("PASS", None)
    assert latency((there, candidate), "+5%, <= 5ms").decision == "INCONCLUSIVE"
    assert latency((there, candidate), "+5%, <= 3ms").decision == "FAIL"


def test_a_limit_looks_no_further_once_it_is_decided():
    runs = own_levels(5, 0.004, 0.005)
    rules = policy(latency_p50="<= 5ms")
    first = tuple(replace(run, visits=run.visits[:4]) for run in runs)
    assert is_decided(*first, rules)
    assert judge(*first, rules).findings == judge(*first, rules).findings
    assert finding_of(judge(*runs, rules), "latency_p50").limit.units == 4
    assert not is_decided(*(replace(run, visits=run.visits[:3]) for run in runs), rules)


def test_what_dropped_blocks_and_short_visits_mean_for_a_limit():
    baseline, candidate = own_levels(6, 0.004, 0.005, 8)
    dropped = replace(candidate, visits=tuple(replace(visit, dropped="throttled") for visit in candidate.visits))
    finding = latency((baseline, dropped), "<= 5ms")
    assert finding.decision == "INCONCLUSIVE"
    assert "all 8 A/B blocks were dropped" in finding.reason
    evidence = latency_evidence("latency_p99", baseline, candidate, margin_from_text("latency_p99", "<= 5ms"))
    assert not can_more_blocks_decide(evidence, policy())
    assert judge_latency(evidence, policy(), error_rate=RATE).decision == "INCONCLUSIVE"


@pytest.mark.parametrize("spread", [0.01, 0.1])
def test_wrong_verdicts_on_a_limit_stay_within_the_error_rate(spread):
    gates = 150
    decisions = [latency(own_levels(seed, 0.005, spread), "<= 5ms").decision for seed in range(gates)]
    allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / gates)
    assert decisions.count("FAIL") / gates <= allowed
    assert decisions.count("PASS") / gates <= allowed


def test_wrong_fails_of_both_parts_together_stay_within_the_error_rate():
    gates, fails = 150, 0
    for seed in range(gates):  # the change lies on its margin, and so does the level
        effects = normal_effects(seed, math.log(1.05), 0.02)
        levels = [BASE_S * math.exp(one) for one in normal_effects(10**6 + seed, 0.0, 0.02)]
        after = [level * math.exp(effect) for level, effect in zip(levels, effects, strict=True)]
        limit_ms = BASE_S * 1.05 * 1e3
        fails += (
            latency((run_of("baseline", levels), run_of("candidate", after)), f"+5%, <= {limit_ms}ms").decision
            == "FAIL"
        )
    assert fails / gates <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / gates)


def memory(before, after, text):
    runs = run_of("baseline", [], memory=memory_of(*before)), run_of("candidate", [], memory=memory_of(*after))
    return judge_peak_memory(*runs, margin_from_text("peak_memory", text), error_rate=RATE)


SIXTY = [60 * MIB, 60 * MIB + 8192, 60 * MIB - 12288]


def test_peak_memory_keeps_a_limit_by_its_own_visits():
    assert memory([], SIXTY, "<= 64MiB").decision == "PASS"
    assert memory([], SIXTY, "<= 50MiB").decision == "FAIL"
    assert memory(SIXTY, SIXTY, "+5%, <= 64MiB").decision == "PASS"
    assert memory(SIXTY, SIXTY, "+5%, <= 50MiB").decision == "FAIL"
    assert memory([], SIXTY, "+5%, <= 64MiB").decision == "INCONCLUSIVE"
    finding = memory(SIXTY, [60 * MIB, 72 * MIB, 60 * MIB], "<= 64MiB")
    assert finding.decision == "INCONCLUSIVE"
    assert "no number of visits" in finding.needed
    assert memory(SIXTY, SIXTY[:2], "<= 64MiB").decision == "INCONCLUSIVE"
    assert memory(SIXTY, [60 * MIB, 0, 60 * MIB], "<= 64MiB").limit.reason.endswith("no memory at all")


@pytest.mark.parametrize(
    ("size", "text", "decision"),
    [
        (1000, "<= 1000B", "PASS"),
        (1001, "<= 1000B", "FAIL"),
        (1000, "+0%, <= 1MiB", "PASS"),
        (1001, "+0%, <= 1MiB", "FAIL"),
        (1000, "+10%, <= 999B", "FAIL"),
        (0, "<= 1000B", "INCONCLUSIVE"),
    ],
)
def test_size_is_counted_against_a_limit(size, text, decision):
    runs = [run_of(side, []) for side in ("baseline", "candidate")]
    runs = [
        replace(run, artifact=replace(run.artifact, size_bytes=count))
        for run, count in zip(runs, (1000, size), strict=True)
    ]
    finding = judge_artifact_size(*runs, margin_from_text("artifact_size", text))
    assert (finding.decision, finding.p_fail) == (decision, None)


def accuracy(baseline, candidate, text):
    return judge_accuracy(baseline, candidate, margin_from_text("accuracy", text), error_rate=RATE)


def right(count, samples):
    return outputs_of([1] * count + [0] * (samples - count))


def test_accuracy_reaches_a_floor_by_the_exact_binomial_test():
    from scipy import stats

    assert accuracy(None, right(950, 1000), ">= 92%").decision == "PASS"
    assert accuracy(None, right(880, 1000), ">= 92%").decision == "FAIL"
    undecided = accuracy(None, right(92, 100), ">= 92%")
    assert undecided.decision == "INCONCLUSIVE"
    assert undecided.limit.low < 0.92 < undecided.limit.high
    assert "neither side of the limit of 92 %" in undecided.reason
    finding = accuracy(None, right(930, 1000), ">= 92%")
    for p_value, alternative in ((finding.p_fail, "less"), (finding.p_pass, "greater")):
        assert p_value == pytest.approx(stats.binomtest(930, 1000, 0.92, alternative=alternative).pvalue)
    interval = stats.binomtest(930, 1000).proportion_ci(0.9, method="exact")
    assert (finding.limit.low, finding.limit.high) == (pytest.approx(interval.low), pytest.approx(interval.high))


def test_decision_and_interval_of_a_floor_agree():
    for count in range(60, 100):
        finding = accuracy(None, right(count, 100), ">= 80%")
        assert (finding.decision == "PASS") == (finding.limit.low >= 0.8)
        assert (finding.decision == "FAIL") == (finding.limit.high <= 0.8)


def test_accuracy_with_a_drop_and_a_floor():
    assert accuracy(*answers(4, 5, 2000), "-1pt, >= 92%").decision == "PASS"
    assert accuracy(*answers(4, 5, 2000), "-1pt, >= 99.99%").decision == "FAIL"
    assert accuracy(*answers(60, 10, 2000), "-1pt, >= 80%").decision == "FAIL"
    assert accuracy(None, answers(0, 0, 2000)[1], "-1pt, >= 92%").decision == "INCONCLUSIVE"


def test_an_error_keeps_a_limit():
    close, far = (outputs_of([level + 0.01 * (n % 3) for n in range(300)], metric="mae") for level in (0.02, 0.08))
    assert accuracy(None, close, "<= 0.05").decision == "PASS"
    assert accuracy(None, far, "<= 0.05").decision == "FAIL"
    assert accuracy(far, close, "+5%, <= 0.05").decision == "PASS"


@pytest.mark.parametrize(
    ("candidate", "text", "says"),
    [
        (None, ">= 92%", "candidate was not run on an evaluation set"),
        (right(3, 4), "<= 0.05", "does not fit the metric top1"),
        (outputs_of([0.1, 0.2], metric="mae"), ">= 92%", "does not fit the metric mae"),
        (outputs_of([0.1], metric="mae"), "<= 0.05", "one sample"),
        (outputs_of([1, float("nan")]), ">= 92%", "score of sample 1 is nan"),
    ],
)
def test_a_floor_that_cannot_be_judged_is_inconclusive_with_the_reason(candidate, text, says):
    finding = accuracy(right(4, 4), candidate, text)
    assert finding.decision == "INCONCLUSIVE"
    assert says in finding.reason
    assert finding.needed


def test_every_metric_can_be_judged_by_a_limit_alone_in_one_gate():
    baseline, candidate = own_levels(7, 0.004, 0.01, 8)
    before, after = answers(4, 5, 2000)
    visits = tuple(make_visit(visit.block, visit.bursts[0].samples_s[0], samples=300) for visit in candidate.visits)
    candidate = replace(candidate, outputs=after, memory=memory_of(*SIXTY), visits=visits)
    rules = policy(
        accuracy=">= 92%", latency_p50="<= 5ms", latency_p95="<= 5ms", latency_p99="<= 5ms", first_inference="<= 20ms",
        load_time="<= 1s", peak_memory="<= 64MiB", artifact_size="<= 10MiB",
    )  # fmt: skip
    verdict = judge(replace(baseline, outputs=before, session="another"), candidate, rules)
    assert {finding.metric: finding.decision for finding in verdict.findings if finding.margin} == dict.fromkeys(
        rules.margins, "PASS"
    )


def test_a_row_beside_others_shows_the_change_where_only_a_limit_is_judged():
    from edgedeploy.judge.contenders import contenders

    runs = runs_with_effects(normal_effects(8, 0.1, 0.01))
    verdict = replace(judge(*runs, policy(latency_p50="<= 5ms")), baseline_run="b", candidate_run="c")
    rows = contenders([verdict], {"b": runs[0], "c": runs[1]})
    assert rows[1].change == pytest.approx(math.expm1(0.1), abs=0.02)
    assert rows[1].low < rows[1].change < rows[1].high
