import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgedeploy.judge.accuracy import judge_accuracy, smallest_detectable_drop
from edgedeploy.judge.family import ErrorRate
from edgedeploy.judge.margin import margin_from_text

from .judge_samples import answers, outputs_of

RATE = ErrorRate(0.05, 0.05)


def judged(baseline, candidate, margin="-0.5pt"):
    return judge_accuracy(
        baseline, candidate, margin_from_text("accuracy", margin) if margin else None, error_rate=RATE
    )


def test_a_clear_drop_fails_and_a_clear_tie_passes():
    failed = judged(*answers(60, 10, 2000))
    assert failed.decision == "FAIL"
    assert failed.effect == pytest.approx(0.025)
    assert failed.low > 0.005
    passed = judged(*answers(4, 5, 2000))
    assert passed.decision == "PASS"
    assert passed.high < 0.005
    assert passed.units == 2000


def test_a_drop_near_the_margin_is_inconclusive_and_says_how_many_samples_would_decide():
    finding = judged(*answers(30, 24, 2000))
    assert finding.decision == "INCONCLUSIVE"
    assert finding.low < 0.005 < finding.high
    assert "evaluation samples in all" in finding.needed
    assert "McNemar p = 0.5" in finding.reason


def test_a_margin_finer_than_the_samples_can_show_is_said_to_be():
    assert "finer than they can show" in judged(*answers(15, 10, 500)).reason
    assert "2.5 pt" in judged(*answers(15, 10, 500)).reason


def test_smallest_detectable_drop_is_that_of_the_method():
    # measured elsewhere: 500 images 2 / 5 / 10 % differing: 1.6 / 2.5 / 3.5 points; 50,000: 0.16 / 0.25 / 0.35.
    for samples, share, points in ((500, 0.02, 1.6), (500, 0.05, 2.5), (500, 0.1, 3.5), (50_000, 0.05, 0.25)):
        drop = smallest_detectable_drop(round(samples * share), samples, 0.05)
        assert drop * 100 == pytest.approx(points, rel=0.03)


def test_identical_answers_pass_only_where_there_are_enough_of_them():
    assert judged(*answers(0, 0, 2000)).decision == "PASS"
    few = judged(*answers(0, 0, 100))
    assert few.decision == "INCONCLUSIVE"
    assert few.needed


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_exchanging_the_sides_turns_the_effect_and_its_interval(lost, gained):
    baseline, candidate = answers(lost, gained, 1000)
    there, back = judged(baseline, candidate), judged(candidate, baseline)
    assert there.effect == -back.effect
    assert there.low == pytest.approx(-back.high)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_decision_and_interval_agree(lost, gained):
    finding = judged(*answers(lost, gained, 1000), margin="-1pt")
    assert (finding.decision == "PASS") == (finding.high < 0.01 + 1e-9)
    assert (finding.decision == "FAIL") == (finding.low > 0.01 - 1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40))
def test_a_wider_margin_never_turns_a_pass_into_anything_else(lost, gained):
    order = ("FAIL", "INCONCLUSIVE", "PASS")
    decisions = [judged(*answers(lost, gained, 1000), margin=f"-{points}pt").decision for points in (0.2, 1, 3, 8)]
    places = [order.index(decision) for decision in decisions]
    assert places == sorted(places)


def errors(seed, worse, samples=400):
    random_ = random.Random(seed)
    before = [random_.uniform(0.5, 1.5) for _ in range(samples)]
    after = [error * (1 + worse) + random_.gauss(0, 0.1) for error in before]
    return outputs_of(before, metric="mae"), outputs_of(after, metric="mae")


@pytest.mark.parametrize(("margin", "kind"), [("+5%", "relative"), ("+0.05", "absolute")])
def test_errors_are_judged_by_paired_differences(margin, kind):
    assert judged(*errors(1, 0.0), margin=margin).decision == "PASS"
    assert judged(*errors(1, 0.10), margin=margin).decision == "FAIL"
    undecided = judged(*errors(1, 0.05), margin=margin)
    assert undecided.decision == "INCONCLUSIVE"
    assert undecided.low < undecided.margin.value < undecided.high
    assert undecided.margin.kind == kind
    assert undecided.needed


def test_relative_interval_turns_where_the_test_does():
    from scipy import stats

    baseline, candidate = errors(3, 0.02)
    finding = judged(baseline, candidate, margin="+5%")
    for bound, alternative in ((finding.low, "greater"), (finding.high, "less")):
        differences = [
            after - (1 + bound) * before for before, after in zip(baseline.scores, candidate.scores, strict=True)
        ]
        assert stats.ttest_1samp(differences, 0, alternative=alternative).pvalue == pytest.approx(0.05)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.001, 1000))
def test_relative_judgement_of_errors_does_not_depend_on_their_unit(scale):
    sides = errors(4, 0.04)
    scaled = [outputs_of([score * scale for score in side.scores], metric="mae") for side in sides]
    there, here = judged(*scaled, margin="+5%"), judged(*sides, margin="+5%")
    assert there.p_pass == pytest.approx(here.p_pass, rel=1e-6)
    assert there.high == pytest.approx(here.high, rel=1e-6)


RIGHT = outputs_of([1, 0, 1, 1])


@pytest.mark.parametrize(
    ("baseline", "candidate", "margin", "says"),
    [
        (None, RIGHT, "-1pt", "baseline was not run on an evaluation set"),
        (RIGHT, None, "-1pt", "candidate was not run on an evaluation set"),
        (RIGHT, replace(RIGHT, scores=None), "-1pt", "no labels"),
        (RIGHT, outputs_of([1, 0, 1]), "-1pt", "not the same samples"),
        (RIGHT, outputs_of([1, 0, 1, 1], dataset_sha256="another"), "-1pt", "not the same samples"),
        (RIGHT, outputs_of([1, 0, 1, 1], metric="top5"), "-1pt", "scored by top1 and the candidate by top5"),
        (RIGHT, outputs_of([1, 0, float("nan"), 1]), "-1pt", "score of sample 2 is nan"),
        (RIGHT, outputs_of([1, 0, 0.5, 1]), "-1pt", "not all 0 or 1"),
        (outputs_of([1]), outputs_of([1]), "-1pt", "one sample"),
        (RIGHT, RIGHT, "+5%", "does not fit the metric top1"),
        (outputs_of([1, 2], metric="mae"), outputs_of([1, 2], metric="mae"), "-1pt", "does not fit the metric mae"),
        (outputs_of([0, 0], metric="mae"), outputs_of([0, 1], metric="mae"), "+5%", "error is zero"),
    ],
)
def test_what_cannot_be_paired_is_inconclusive_with_the_reason(baseline, candidate, margin, says):
    finding = judged(baseline, candidate, margin)
    assert finding.decision == "INCONCLUSIVE"
    assert says in finding.reason
    assert finding.needed


def test_without_a_margin_accuracy_is_reported_and_not_judged():
    finding = judged(*answers(60, 10, 2000), margin=None)
    assert finding.margin is None
    assert finding.effect == pytest.approx(0.025)
    assert "not judged" in finding.reason
    assert "not judged" in judged(None, None, margin=None).reason
    assert judged(*errors(1, 0.1), margin=None).effect == pytest.approx(0.1, abs=0.02)
    zero = outputs_of([0, 0], metric="mae")
    assert judged(zero, zero, margin=None).effect is None
