"""How often the gate cries wolf: the exact interval, and what is told of it."""

import pytest
from msgspec.structs import replace

from edgedeploy.judge.false_alarms import CONFIDENCE, exact_interval, summary_of
from edgedeploy.records.passport import AaCell, AaOutcome
from edgedeploy.render.noise import false_alarm_line

OUTCOME = AaOutcome(
    name="a", judged_utc="2026-11-22T00:00:00Z", decision="PASS", error_rate=0.05, margins={}, seconds=2.0,
    cells=(AaCell(cell="a", device="board", target="host", decision="PASS"),),
)  # fmt: skip


def outcomes(fails: int, gates: int) -> list[AaOutcome]:
    return [replace(OUTCOME, decision="FAIL" if number < fails else "PASS") for number in range(gates)]


@pytest.mark.parametrize(("hits", "trials"), [(0, 1), (0, 200), (1, 200), (7, 20), (20, 20), (3, 1000)])
def test_interval_is_that_of_clopper_and_pearson(hits, trials):
    from scipy.stats import binomtest

    expected = binomtest(hits, trials).proportion_ci(CONFIDENCE, method="exact")
    assert exact_interval(hits, trials) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(
    ("fails", "gates", "is_proven"), [(0, 200, False), (2, 20, False), (4, 20, True), (9, 60, True)]
)
def test_gate_is_proven_wrong_only_beyond_what_chance_explains(fails, gates, is_proven):
    summary = summary_of(outcomes(fails, gates))
    assert summary.proven_above is is_proven
    assert summary.rate == fails / gates
    assert ("proven to be more" in false_alarm_line(summary)) is is_proven


def test_gates_are_counted_and_not_their_cells():
    both = replace(OUTCOME, cells=OUTCOME.cells * 2, decision="FAIL")
    assert summary_of([both, OUTCOME]).false_fails == 1


def test_two_hundred_quiet_gates_show_less_than_two_percent():
    summary = summary_of(outcomes(0, 200))
    assert summary.high < 0.019
    assert false_alarm_line(summary) == (
        "false alarms: 0 FAIL in 200 gates of something against itself, 0 % (95 % interval 0 % to 1.8 %; allowed 5 %)"
    )


def test_no_gate_has_no_rate():
    assert summary_of([]) is None
