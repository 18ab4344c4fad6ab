import pytest
from msgspec.structs import replace

from edgedeploy.judge.family import ErrorRate
from edgedeploy.judge.footprint import judge_artifact_size, judge_peak_memory
from edgedeploy.judge.margin import margin_from_text

from .judge_samples import memory_of, run_of

MIB = 2**20


def peak(before, after, margin="+5%", **candidate):
    runs = run_of("baseline", [], memory=memory_of(*before)), run_of("candidate", [], memory=memory_of(*after))
    return judge_peak_memory(
        runs[0],
        replace(runs[1], **candidate),
        margin_from_text("peak_memory", margin) if margin else None,
        error_rate=ErrorRate(0.025, 0.025),
    )


SIXTY = [60 * MIB, 60 * MIB + 8192, 60 * MIB - 12288]


def test_peaks_that_repeat_are_decided_by_three_visits():
    assert peak(SIXTY, SIXTY).decision == "PASS"
    assert peak(SIXTY, [70 * MIB, 70 * MIB + 4096, 70 * MIB + 8192]).decision == "FAIL"
    assert peak([60 * MIB] * 3, [60 * MIB] * 3).decision == "PASS"
    assert peak([60 * MIB] * 3, [64 * MIB] * 3).decision == "FAIL"


def test_an_absolute_margin_is_in_bytes():
    finding = peak(SIXTY, [63 * MIB, 63 * MIB + 8192, 63 * MIB - 4096], "+4MiB")
    assert finding.decision == "PASS"
    assert finding.effect == pytest.approx(3 * MIB, rel=0.01)
    assert peak(SIXTY, [63 * MIB, 63 * MIB + 8192, 63 * MIB - 4096], "+1MiB").decision == "FAIL"


def test_peaks_with_two_modes_are_inconclusive_and_said_to_differ():
    finding = peak(SIXTY, [60 * MIB, 72 * MIB, 60 * MIB])
    assert finding.decision == "INCONCLUSIVE"
    assert "differ among themselves by up to 20 %" in finding.reason
    assert "memory visits of each artifact" in finding.needed


def test_interval_is_that_of_welch_over_logarithms():
    import numpy as np
    from scipy import stats

    finding = peak(SIXTY, [61 * MIB, 63 * MIB, 62 * MIB])
    test = stats.ttest_ind(np.log([61 * MIB, 63 * MIB, 62 * MIB]), np.log(SIXTY), equal_var=False)
    interval = test.confidence_interval(0.95)
    assert (finding.low, finding.high) == (
        pytest.approx(np.expm1(interval.low)),
        pytest.approx(np.expm1(interval.high)),
    )


@pytest.mark.parametrize(
    ("after", "changes", "says"),
    [
        ([], {}, "0 memory visits of a side are too few"),
        (SIXTY[:2], {}, "2 memory visits of a side are too few"),
        ([60 * MIB, 0, 60 * MIB], {}, "no memory at all"),
        (SIXTY, {"device": "another"}, "measured on pi5-desk and the candidate on another"),
        (SIXTY, {"boundary": None}, "threads, batch or copies differ"),
    ],
)
def test_peaks_that_cannot_be_judged_are_inconclusive_with_the_reason(after, changes, says):
    finding = peak(SIXTY, after, **changes)
    assert finding.decision == "INCONCLUSIVE"
    assert says in finding.reason
    assert finding.needed


def test_without_a_margin_memory_is_reported():
    finding = peak(SIXTY, [70 * MIB] * 3, None)
    assert finding.effect == pytest.approx(1 / 6, rel=0.01)
    assert "not judged" in finding.reason
    assert "not judged" in peak(SIXTY, [], None).reason


def size(before, after, margin):
    runs = [run_of(side, []) for side in ("baseline", "candidate")]
    runs = [
        replace(run, artifact=replace(run.artifact, size_bytes=count))
        for run, count in zip(runs, (before, after), strict=True)
    ]
    return judge_artifact_size(*runs, margin_from_text("artifact_size", margin) if margin else None)


@pytest.mark.parametrize(
    ("after", "margin", "decision"),
    [
        (1100, "+10%", "PASS"),
        (1101, "+10%", "FAIL"),
        (1000, "0%", "PASS"),
        (400, "-50%", "PASS"),
        (600, "-50%", "FAIL"),
        (1024, "+24B", "PASS"),
        (1025, "+24B", "FAIL"),
    ],
)
def test_size_is_compared_and_has_no_p_value(after, margin, decision):
    finding = size(1000, after, margin)
    assert (finding.decision, finding.p_fail, finding.low) == (decision, None, None)


def test_an_empty_artifact_is_inconclusive():
    assert size(0, 1000, "+10%").decision == "INCONCLUSIVE"
    assert size(0, 1000, "+10%").needed
    assert size(0, 1000, None).effect is None
