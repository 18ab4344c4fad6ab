"""Accuracy class by class: what fails, what passes, what is set aside, and how often that is wrong."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from edgedeploy.judge.classes import judge_class_accuracy, samples_to_judge
from edgedeploy.judge.family import ErrorRate
from edgedeploy.judge.gate import judge
from edgedeploy.judge.margin import margin_from_text
from edgedeploy.judge.proportions import p_not_worse

from .judge_samples import finding_of, normal_effects, outputs_of, policy, runs_with_effects

RATE = ErrorRate(0.05, 0.05)


def sides(**classes):
    """Both sides' outputs; c3=(samples, lost, gained): all other answers to samples of class 3 are right."""
    labels, before, after = [], [], []
    for name, (samples, lost, gained) in classes.items():
        labels += [int(name[1:])] * samples
        before += [1] * lost + [0] * gained + [1] * (samples - lost - gained)
        after += [0] * lost + [1] * gained + [1] * (samples - lost - gained)
    return tuple(replace(outputs_of(scores), labels=tuple(labels)) for scores in (before, after))


def judged(outputs, text="-5pt", rate=RATE, small_at=0.05):
    margin = margin_from_text("class_accuracy", text) if text else None
    return judge_class_accuracy(*outputs, margin, error_rate=rate, small_at=small_at)


EVEN = {f"c{label}": (200, 2, 2) for label in range(9)}


def test_a_drop_in_one_class_is_seen_though_the_mean_hardly_moves():
    outputs = sides(**EVEN, c9=(200, 40, 2))
    finding = judged(outputs)
    assert finding.decision == "FAIL"
    assert "class 9 -19.00 pt (99 % to 80 % of 200 samples: 40 lost, 2 gained)" in finding.reason
    assert "Holm over 10 classes" in finding.reason
    assert finding.classes[0].label == 9
    assert {one.label for one in finding.classes if one.decision == "FAIL"} == {9}
    assert (finding.effect, finding.baseline_value) == (pytest.approx(0.19), pytest.approx(0.99))
    mean = sum(outputs[0].scores) / 2000 - sum(outputs[1].scores) / 2000
    assert mean == pytest.approx(0.019)


def test_classes_that_did_not_drop_pass_and_the_largest_drop_is_named():
    finding = judged(sides(**EVEN, c9=(200, 4, 1)))
    assert finding.decision == "PASS"
    assert "none of 10 classes" in finding.reason
    assert "class 9 -1.50 pt" in finding.reason
    assert finding.needed == ""


def test_a_class_between_is_inconclusive_and_says_how_many_samples_of_it_would_decide():
    finding = judged(sides(**EVEN, c9=(200, 12, 2)))
    assert finding.decision == "INCONCLUSIVE"
    assert finding.reason.startswith("class 9")
    assert finding.needed.startswith("class 9: ")
    assert "samples" in finding.needed


def test_small_classes_are_set_aside_by_name_and_do_not_make_it_inconclusive():
    finding = judged(sides(**EVEN, c9=(12, 0, 0), c10=(8, 1, 1)))
    assert finding.decision == "PASS"
    assert "classes 9, 10 with 1.1 % of the samples too small to be judged and set aside (one needs 59 samples)" in (
        finding.reason
    )
    small = [one for one in finding.classes if one.decision is None]
    assert {(one.label, one.needed_samples) for one in small} == {(9, 59), (10, 59)}


def test_a_small_class_that_all_turned_wrong_fails_and_one_that_looks_dropped_is_inconclusive():
    assert judged(sides(**EVEN, c9=(9, 9, 0))).decision == "FAIL"
    looks = judged(sides(**EVEN, c9=(12, 5, 0)))
    assert looks.decision == "INCONCLUSIVE"
    assert "class 9" in looks.reason
    assert judged(sides(**EVEN, c9=(12, 1, 0))).decision == "PASS"


def test_a_margin_finer_than_most_samples_can_show_is_inconclusive():
    finding = judged(sides(**EVEN), "-0.5pt")
    assert finding.decision == "INCONCLUSIVE"
    assert "finer than the samples of most classes can show" in finding.reason
    assert "at least 598 evaluation samples of each class" in finding.needed
    assert "another margin" in judged(sides(**EVEN), "0pt").needed


@pytest.mark.parametrize(("points", "error_rate"), [(5, 0.05), (1, 0.05), (0.5, 0.00139), (20, 0.01)])
def test_a_class_is_small_just_where_no_change_at_all_would_not_show_it(points, error_rate):
    margin = margin_from_text("class_accuracy", f"-{points}pt")
    least = samples_to_judge(margin, error_rate, 10)
    assert p_not_worse(0, 0, least, margin.value, 1e-5) <= error_rate
    assert p_not_worse(0, 0, least - 1, margin.value, 1e-5) > error_rate


def test_a_floor_holds_for_every_class():
    assert judged(sides(**EVEN), ">= 80%").decision == "PASS"
    failed = judged(sides(**EVEN, c9=(200, 80, 0)), ">= 80%")
    assert failed.decision == "FAIL"
    assert "class 9" in failed.reason
    assert judged(sides(**EVEN, c9=(200, 12, 2)), ">= 80%").decision == "PASS"
    assert judged(sides(**EVEN, c9=(200, 12, 2)), "-5pt, >= 80%").decision == "INCONCLUSIVE"
    assert judged(sides(**EVEN, c9=(200, 40, 2)), "-5pt, >= 80%").decision == "FAIL"
    near = judged(sides(**EVEN, c9=(200, 36, 0)), ">= 80%")
    assert near.decision == "INCONCLUSIVE"
    assert "class 9: about" in near.needed


def test_without_a_margin_classes_are_reported():
    finding = judged(sides(**EVEN, c9=(200, 40, 2)), None)
    assert (finding.decision, finding.margin) == ("PASS", None)
    assert finding.reason.startswith("reported, not judged; the largest drop is that of class 9")
    assert len(finding.classes) == 10


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 120), st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=6))
def test_a_larger_error_rate_never_undoes_a_decision(tables):
    outputs = sides(
        **{f"c{n}": (max(samples, lost + gained), lost, gained) for n, (samples, lost, gained) in enumerate(tables)}
    )
    strict, loose = (judged(outputs, rate=ErrorRate(rate, rate)).decision for rate in (0.001, 0.05))
    assert strict in ("INCONCLUSIVE", loose)


GOOD = sides(c0=(100, 1, 1))


@pytest.mark.parametrize(
    ("baseline", "candidate", "says"),
    [
        (None, GOOD[1], "baseline was not run"),
        (GOOD[0], None, "candidate was not run"),
        (GOOD[0], replace(GOOD[1], labels=None), "candidate's run does not keep the classes"),
        (replace(GOOD[0], labels=None), GOOD[1], "baseline's run does not keep the classes"),
        (GOOD[0], replace(GOOD[1], labels=(0,) * 7), "7 labels for 100 samples"),
        (GOOD[0], replace(GOOD[1], labels=(1,) * 100), "other classes to the same samples"),
        (GOOD[0], replace(GOOD[1], dataset_sha256="another"), "not the same samples"),
        (GOOD[0], replace(GOOD[1], scores=(math.nan, *GOOD[1].scores[1:])), "score of sample 0 is nan"),
        (
            outputs_of([0.1, 0.2], metric="mae"),
            outputs_of([0.1, 0.2], metric="mae"),
            "mae has no right or wrong answers",
        ),
    ],
)
def test_classes_that_cannot_be_judged_are_inconclusive_with_the_reason(baseline, candidate, says):
    finding = judged((baseline, candidate))
    assert finding.decision == "INCONCLUSIVE"
    assert says in finding.reason
    assert finding.needed
    assert judged((baseline, candidate), None).decision == "PASS"


def test_the_gate_judges_classes_beside_the_mean():
    before, after = sides(**EVEN, c9=(200, 40, 2))
    baseline, candidate = runs_with_effects(normal_effects(1, 0.0, 0.005, 8))
    runs = replace(baseline, outputs=before), replace(candidate, outputs=after)
    assert judge(*runs, policy(accuracy="-5pt", latency_p50="+5%")).decision == "PASS"
    verdict = judge(*runs, policy(accuracy="-5pt", class_accuracy="-5pt", latency_p50="+5%"))
    assert verdict.decision == "FAIL"
    assert finding_of(verdict, "class_accuracy").decision == "FAIL"


@pytest.mark.parametrize("drop", [0.05, 0.0])
def test_wrong_verdicts_stay_within_the_error_rate(drop):
    """Ten classes of 60 to 240 samples, one of them on the margin, or none: no FAIL, and no PASS of the first."""
    import numpy as np

    random_ = np.random.default_rng(5)
    gates, wrong = 150, {"FAIL": 0, "PASS": 0}
    sizes = [60, 80, 100, 120, 140, 160, 180, 200, 220, 240]
    for _ in range(gates):
        tables = {}
        for label, samples in enumerate(sizes):
            worse = drop if label == 0 else 0.0
            lost, gained, _ = random_.multinomial(samples, [0.02 + worse, 0.02, 0.96 - worse])
            tables[f"c{label}"] = (samples, int(lost), int(gained))
        finding = judged(sides(**tables))
        if finding.decision in wrong:
            wrong[finding.decision] += 1
    allowed = 0.05 + 3 * math.sqrt(0.05 * 0.95 / gates)
    assert wrong["FAIL"] / gates <= allowed
    if drop:
        assert wrong["PASS"] / gates <= allowed
    else:
        assert wrong["PASS"] > 0
