import math
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgedeploy.documents import encode_json
from edgedeploy.errors import UsageError
from edgedeploy.judge.gate import is_decided, judge, judge_gate

from .judge_samples import answers, finding_of, make_visit, memory_of, normal_effects, policy, runs_with_effects

MIB = 2**20
ALL = policy(accuracy="-1pt", latency_p50="+5%", peak_memory="+5%", artifact_size="+10%")
UTC = "2026-11-22T09:14:05Z"


def cell(*, effects, lost=4, gained=5, peaks=(60 * MIB,) * 3, size_bytes=200_000):
    """A measured pair with known accuracy, latency, memory and size."""
    before, after = answers(lost, gained, 2000)
    baseline, candidate = runs_with_effects(effects)
    baseline = replace(baseline, outputs=before, memory=memory_of(*[60 * MIB] * 3))
    artifact = replace(candidate.artifact, size_bytes=size_bytes)
    return (
        replace(baseline, artifact=replace(baseline.artifact, size_bytes=200_000)),
        replace(candidate, outputs=after, memory=memory_of(*peaks), artifact=artifact),
    )


QUIET = normal_effects(1, 0.0, 0.005, 8)


def test_a_cell_passes_only_when_every_judged_metric_does():
    assert judge(*cell(effects=QUIET), ALL).decision == "PASS"
    assert judge(*cell(effects=[effect + 0.1 for effect in QUIET]), ALL).decision == "FAIL"
    assert judge(*cell(effects=QUIET, peaks=(70 * MIB,) * 3), ALL).decision == "FAIL"
    assert judge(*cell(effects=QUIET, size_bytes=230_000), ALL).decision == "FAIL"
    assert judge(*cell(effects=QUIET[:3]), ALL).decision == "INCONCLUSIVE"


def test_a_fast_wrong_model_fails_and_needs_no_latency():
    fast_and_wrong = cell(effects=[], lost=200)
    assert judge(*fast_and_wrong, ALL).decision == "FAIL"
    assert is_decided(*fast_and_wrong, ALL)
    verdict = judge(*cell(effects=[math.log(0.3)] * 8, lost=200), ALL)
    assert verdict.decision == "FAIL"
    assert verdict.findings[0].metric == "accuracy"
    assert finding_of(verdict, "latency_p50").decision == "PASS"


@pytest.mark.parametrize("metric", ["accuracy", "latency_p50", "latency_p95", "peak_memory"])
def test_a_metric_with_a_margin_and_no_data_is_inconclusive(metric):
    baseline, candidate = cell(effects=QUIET)
    candidate = replace(candidate, outputs=None, memory=(), visits=())
    verdict = judge(baseline, candidate, policy(**{metric: "-1pt" if metric == "accuracy" else "+5%"}))
    assert verdict.decision == "INCONCLUSIVE"
    finding = finding_of(verdict, metric)
    assert finding.reason
    assert finding.needed


def test_metrics_without_a_margin_are_reported_and_do_not_decide():
    verdict = judge(*cell(effects=[0.5] * 8, lost=500), policy(artifact_size="+10%"))
    assert verdict.decision == "PASS"
    assert [finding.metric for finding in verdict.findings] == [
        "accuracy", "latency_p50", "latency_p95", "first_inference", "load_time", "peak_memory", "artifact_size",
    ]  # fmt: skip
    assert finding_of(verdict, "latency_p50").effect == pytest.approx(math.expm1(0.5))
    assert all("not judged" in finding.reason for finding in verdict.findings if finding.margin is None)


def test_a_policy_without_margins_shows_nothing():
    verdict = judge(*cell(effects=QUIET), policy())
    assert verdict.decision == "INCONCLUSIVE"
    assert "nothing was judged" in verdict.notes[0]


def test_runs_of_different_sessions_still_have_accuracy_and_size_judged():
    baseline, candidate = cell(effects=QUIET)
    verdict = judge(baseline, replace(candidate, session="another"), ALL)
    decisions = {finding.metric: finding.decision for finding in verdict.findings if finding.margin}
    assert decisions == {
        "accuracy": "PASS", "latency_p50": "INCONCLUSIVE", "peak_memory": "PASS", "artifact_size": "PASS",
    }  # fmt: skip
    assert verdict.decision == "INCONCLUSIVE"
    assert is_decided(baseline, replace(candidate, session="another"), ALL)


def first_blocks(pair, count):
    return tuple(replace(run, visits=run.visits[:count]) for run in pair)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 0.03, 0.05, 0.08, 0.12]), st.sampled_from([0.005, 0.03]))
def test_stopping_when_decided_gives_the_verdict_that_all_blocks_would_have_given(seed, mean, spread):
    pair = cell(effects=normal_effects(seed, mean, spread))
    stopped = next(
        (first_blocks(pair, count) for count in range(17) if is_decided(*first_blocks(pair, count), ALL, cells=2)), pair
    )
    early, late = judge(*stopped, ALL, cells=2), judge(*pair, ALL, cells=2)
    assert early.decision == late.decision
    there, here = finding_of(early, "latency_p50"), finding_of(late, "latency_p50")
    assert (there.decision, there.units, there.effect) == (here.decision, here.units, here.effect)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1000), st.sampled_from([0.0, 0.04, 0.1])), min_size=1, max_size=3))
def test_a_gate_keeps_what_each_cell_decided_while_it_was_measured(draws):
    pairs = [cell(effects=normal_effects(seed, mean, 0.02)) for seed, mean in draws]
    verdict = judge_gate("release", pairs, ALL, judged_utc=UTC)
    for pair, judged in zip(pairs, verdict.cells, strict=True):
        for finding in judge(*pair, ALL, cells=len(pairs)).findings:
            assert finding.decision in ("INCONCLUSIVE", finding_of(judged, finding.metric).decision)


def test_latency_goes_on_until_it_is_decided_or_the_last_look():
    pair = cell(effects=normal_effects(3, math.log(1.05), 0.02))
    assert not is_decided(*first_blocks(pair, 0), ALL)
    assert not is_decided(*first_blocks(pair, 15), ALL)
    assert is_decided(*pair, ALL)
    assert judge(*pair, ALL).decision == "INCONCLUSIVE"


def test_latency_that_is_only_reported_is_measured_to_the_first_look():
    pair = cell(effects=QUIET)
    only_size = policy(artifact_size="+10%")
    assert not is_decided(*first_blocks(pair, 3), only_size)
    assert is_decided(*first_blocks(pair, 4), only_size)
    assert is_decided(pair[0], replace(pair[1], visits=(), session="another"), only_size)


def test_the_gate_is_as_good_as_its_worst_cell():
    good, bad = cell(effects=QUIET), cell(effects=[effect + 0.2 for effect in QUIET])
    undecided = cell(effects=QUIET[:2])
    assert judge_gate("g", [good, good], ALL, judged_utc=UTC).decision == "PASS"
    assert judge_gate("g", [good, undecided], ALL, judged_utc=UTC).decision == "INCONCLUSIVE"
    assert judge_gate("g", [good, undecided, bad], ALL, judged_utc=UTC).decision == "FAIL"
    assert judge_gate("g", [], ALL, judged_utc=UTC).decision == "INCONCLUSIVE"


def test_one_cell_in_a_gate_is_judged_as_alone():
    pair = cell(effects=normal_effects(5, 0.03, 0.02))
    assert judge_gate("g", [pair], ALL, judged_utc=UTC).cells == (judge(*pair, ALL),)


def test_more_cells_make_each_harder_to_decide():
    pair = cell(effects=normal_effects(5, 0.02, 0.02))
    findings = [finding_of(judge(*pair, ALL, cells=cells), "latency_p50") for cells in (1, 4, 16)]
    assert [finding.units for finding in findings] == sorted(finding.units for finding in findings)
    assert findings[0].units < findings[-1].units


def test_unsteady_and_unrepeatable_runs_are_noted():
    baseline, candidate = cell(effects=QUIET)
    visits = (replace(candidate.visits[0], is_steady=False), *candidate.visits[1:])
    candidate = replace(candidate, visits=visits, outputs=replace(candidate.outputs, is_repeatable=False))
    notes = judge(baseline, candidate, ALL).notes
    assert "1 of 8 visits of the candidate never warmed up" in notes[0]
    assert "different outputs for the same samples" in notes[1]


@pytest.mark.parametrize(
    "changes", [{"error_rate": 0.0}, {"error_rate": 0.6}, {"min_blocks": 1}, {"min_blocks": 9, "max_blocks": 8}]
)
def test_a_policy_that_cannot_be_meant_is_refused(changes):
    with pytest.raises(UsageError, match="the policy's"):
        judge(*cell(effects=QUIET), policy(latency_p50="+5%", **changes))


def test_a_throttled_device_never_passes():
    baseline, candidate = cell(effects=QUIET)
    throttled = tuple(make_visit(visit.block, 0.001, throttled=True) for visit in candidate.visits)
    verdict = judge(baseline, replace(candidate, visits=throttled), ALL)
    assert finding_of(verdict, "latency_p50").decision == "INCONCLUSIVE"
    assert "all 8 A/B blocks were dropped" in finding_of(verdict, "latency_p50").reason


def test_judging_twice_gives_the_same_bytes():
    pair = cell(effects=normal_effects(9, 0.03, 0.02))
    verdicts = {encode_json(judge_gate("g", [pair], ALL, judged_utc=UTC)) for _ in range(2)}
    assert len(verdicts) == 1


def test_importing_the_judge_imports_neither_numpy_nor_scipy():
    script = (
        "import sys, edgedeploy.judge.gate, edgedeploy.judge.margin, edgedeploy.judge.percentiles\n"
        "print([name for name in ('numpy', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
