"""Latencies of two sessions: widened by the device's noise, FAIL possible, PASS only where it is allowed by name."""

import math

import pytest
from msgspec.structs import replace

from edgedeploy.judge.gate import is_decided, judge
from edgedeploy.judge.stored import estimate_across_sessions

from .judge_samples import BASE_S, finding_of, make_visit, normal_effects, policy, run_of


def sessions(change, *, seed=1, spread=0.01, visits=8, offset=0.0):
    """A baseline of another session, and a candidate with this log ratio; `offset`: what the day did to it."""
    before = [BASE_S * math.exp(one) for one in normal_effects(seed, 0.0, spread, visits)]
    after = [BASE_S * math.exp(one) for one in normal_effects(seed + 10**6, change + offset, spread, visits)]
    return run_of("baseline", before, session="last week"), run_of("candidate", after)


def latency(runs, text="+5%", *, noise=0.01, allow=False, metric="latency_p50", **looks):
    rules = replace(policy(**{metric: text}, **looks), allow_stored_pass=allow)
    return finding_of(judge(*runs, rules, noise=noise), metric)


def test_a_clear_change_fails_and_no_change_is_no_pass():
    failed = latency(sessions(0.2))
    assert failed.decision == "FAIL"
    assert failed.is_stored
    assert "run-to-run CV of 1 %" in failed.reason
    assert "not measured interleaved" in failed.reason
    unchanged = latency(sessions(0.0))
    assert unchanged.decision == "INCONCLUSIVE"
    assert "by stored numbers, which alone are no PASS" in unchanged.reason
    assert "--allow-stored-pass" in unchanged.needed
    assert unchanged.p_pass < 0.05


def test_a_policy_that_allows_it_by_name_may_pass():
    assert latency(sessions(0.0), allow=True).decision == "PASS"
    assert latency(sessions(0.2), allow=True).decision == "FAIL"
    near = latency(sessions(math.log(1.05)), allow=True)
    assert near.decision == "INCONCLUSIVE"
    assert "allow" not in near.needed


def test_without_a_passport_nothing_is_decided_and_the_command_is_named():
    for allow in (False, True):
        finding = latency(sessions(0.5), noise=None, allow=allow)
        assert finding.decision == "INCONCLUSIVE"
        assert "edgedeploy devices passport pi5-desk" in finding.needed
        assert "is not known" in finding.reason
    assert latency(sessions(0.5), noise=math.nan).decision == "INCONCLUSIVE"


def test_the_noisier_the_device_the_wider_the_interval():
    widths = []
    for noise in (0.0, 0.01, 0.05, 0.3):
        finding = latency(sessions(0.2), noise=noise)
        widths.append(finding.high - finding.low)
    assert widths == sorted(widths)
    assert latency(sessions(0.2), noise=0.3).decision == "INCONCLUSIVE"


def test_without_noise_it_is_welchs_test():
    from scipy import stats

    before, after = normal_effects(3, 0.0, 0.02, 6), normal_effects(4, 0.1, 0.05, 9)
    found = estimate_across_sessions(before, after, 0.0)
    test = stats.ttest_ind(after, before, equal_var=False, alternative="greater")
    assert found.degrees == pytest.approx(test.df)
    assert found.p_fail(0.0) == pytest.approx(test.pvalue)


def test_wrong_fails_and_allowed_passes_stay_within_the_error_rate_when_days_differ_as_the_passport_says():
    import random

    random_, gates, noise = random.Random(5), 400, 0.03
    wrong = {"FAIL": 0, "PASS": 0, "INCONCLUSIVE": 0}
    for seed in range(gates):
        offset = random_.gauss(0, noise) - random_.gauss(0, noise)
        runs = sessions(math.log(1.05), seed=seed, spread=0.02, offset=offset)
        wrong[latency(runs, noise=noise, allow=True).decision] += 1
    allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / gates)
    assert wrong["FAIL"] / gates <= allowed
    assert wrong["PASS"] / gates <= allowed


def test_absolute_margins_limits_and_single_values_across_sessions():
    assert latency(sessions(0.2), "+0.1ms").decision == "FAIL"
    assert latency(sessions(0.0), "+1ms", allow=True).decision == "PASS"
    assert latency(sessions(0.0), "-100ms", allow=True).decision == "FAIL"
    assert latency(sessions(0.0), "<= 5ms").decision == "PASS"  # the candidate's own visits, nothing stored
    assert latency(sessions(0.0), "+5%, <= 5ms").decision == "INCONCLUSIVE"
    assert latency(sessions(0.0), "+5%, <= 5ms", allow=True).decision == "PASS"
    assert latency(sessions(0.0), metric="load_time", allow=True).decision == "PASS"
    short = latency(sessions(0.0), metric="latency_p99")
    assert "0 visits that count with enough samples" in short.reason


@pytest.mark.parametrize("visits", [0, 1, 2])
def test_too_few_visits_are_said(visits):
    runs = sessions(0.5, visits=8)
    finding = latency((replace(runs[0], visits=runs[0].visits[:visits]), runs[1]))
    assert finding.decision == "INCONCLUSIVE"
    assert f"the baseline has {visits} visits that count" in finding.reason


def test_dropped_visits_do_not_count():
    baseline, candidate = sessions(0.0)
    visits = (*candidate.visits, make_visit(8, 100 * BASE_S, dropped="throttled"))
    assert latency((baseline, replace(candidate, visits=visits)), allow=True).decision == "PASS"


@pytest.mark.parametrize("change", [{"device": "another"}, {"boundary": None}, {"facts": "another cpu"}])
def test_what_is_unlike_beside_the_session_is_still_refused(change):
    baseline, candidate = sessions(0.5)
    if "facts" in change:
        change = {"facts": replace(candidate.facts, cpu_model="another")}
    if "boundary" in change:
        change = {"boundary": replace(candidate.boundary, threads=7)}
    finding = latency((baseline, replace(candidate, **change)))
    assert (finding.decision, finding.is_stored) == ("INCONCLUSIVE", False)


def test_a_restart_between_the_sessions_is_no_obstacle():
    baseline, candidate = sessions(0.2)
    finding = latency((baseline, replace(candidate, facts=replace(candidate.facts, boot_id="another"))))
    assert finding.decision == "FAIL"
    assert "was restarted between the two runs" in finding.reason


def test_more_blocks_do_not_help_against_another_session():
    assert is_decided(*sessions(0.0), policy(latency_p50="+5%"))
