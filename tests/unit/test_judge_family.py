import itertools
import math
import statistics
from functools import partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgedeploy.judge.family import ErrorRate, holm, step_down, step_down_cells
from edgedeploy.records.verdict import Finding, Margin

MARGIN = Margin(kind="relative", value=0.05, text="+5%")
METRICS = ("accuracy", "latency_p50", "latency_p95", "peak_memory")
RATE = ErrorRate(0.05, 0.05)


def judge_of(metric, p_fail, p_pass, asked=None):
    def judge(rate):
        if asked is not None:
            asked.append((metric, rate))
        return Finding(
            metric=metric,
            decision=rate.decide(p_fail, p_pass),
            baseline_value=1.0,
            candidate_value=1.0,
            effect=0.0,
            margin=MARGIN,
            reason="",
        )

    return judge


def decisions(judges, rate=RATE):
    return [finding.decision for finding in step_down(judges, rate, {}).values()]


def cell_of(*p_values):
    """A cell in which the given metrics have these p-values for PASS, and none for FAIL."""
    return {metric: judge_of(metric, 1.0, p) for metric, p in zip(METRICS, p_values, strict=False)}


def gate_of(*cells):
    return step_down_cells([partial(step_down, cell) for cell in cells], RATE)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 0.1), min_size=1, max_size=4))
def test_passes_are_those_of_holms_procedure(p_values):
    rejected, ordered = 0, sorted(p_values)
    while rejected < len(ordered) and ordered[rejected] <= 0.05 / (len(ordered) - rejected):
        rejected += 1
    assert decisions(cell_of(*p_values)).count("PASS") == rejected


def test_a_pass_gives_its_share_to_the_other_passes_and_not_to_the_fails():
    judges = cell_of(0.001, 0.04)
    assert decisions(judges) == ["PASS", "PASS"]
    judges["latency_p50"] = judge_of("latency_p50", 0.04, 0.9)
    assert decisions(judges) == ["PASS", "INCONCLUSIVE"]


def test_what_is_decided_is_never_judged_again():
    asked = []
    judges = {
        "accuracy": judge_of("accuracy", 1.0, 0.001, asked),
        "latency_p50": judge_of("latency_p50", 1.0, 0.04, asked),
    }
    step_down(judges, RATE, {})
    assert [metric for metric, _ in asked] == ["accuracy", "latency_p50", "latency_p50"]


def test_cells_share_the_rate_and_a_passed_cell_leaves_its_share_to_the_others():
    passing, hesitant = cell_of(0.001, 0.001), cell_of(0.04)
    assert [list(found.values())[-1].decision for found in gate_of(passing, hesitant)] == ["PASS"] * 2
    undecided = cell_of(0.9)
    found = gate_of(undecided, hesitant)
    assert found[1]["accuracy"].decision == "INCONCLUSIVE"


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.1), st.floats(0, 0.1)), min_size=1, max_size=3))
def test_a_cell_judged_alone_at_its_share_keeps_its_decisions_in_the_gate(p_values):
    cells = [cell_of(*pair) for pair in p_values]
    share = RATE.share(len(cells), failed=0, passed=0)
    together = gate_of(*cells)
    for cell, found in zip(cells, together, strict=True):
        for metric, finding in step_down(cell, share, {}).items():
            assert finding.decision in ("INCONCLUSIVE", found[metric].decision)


@pytest.mark.parametrize("true_nulls", [1, 2, 3])
def test_wrong_passes_stay_within_the_error_rate_for_any_mixture(true_nulls):
    import numpy as np

    random_ = np.random.default_rng(true_nulls)
    wrong, gates = 0, 4000
    for _ in range(gates):
        # True hypotheses have uniform p-values; false ones nearly always tiny ones, which frees their shares.
        p_values = [*random_.uniform(size=true_nulls), *random_.uniform(0, 0.02, size=3 - true_nulls)]
        wrong += "PASS" in decisions(cell_of(*p_values))[:true_nulls]
    assert wrong / gates <= 0.05 + 3 * (0.05 * 0.95 / gates) ** 0.5


def test_no_cells_and_no_metrics_are_settled_without_asking():
    assert step_down({}, RATE, {}) == {}
    assert gate_of() == []
    assert gate_of({}, {}) == [{}, {}]


def test_order_of_metrics_does_not_matter():
    p_values = dict(zip(METRICS, (0.001, 0.012, 0.02, 0.3), strict=True))
    results = {
        tuple(sorted((metric, finding.decision) for metric, finding in found.items()))
        for order in itertools.permutations(METRICS)
        for found in [step_down({metric: judge_of(metric, 1.0, p_values[metric]) for metric in order}, RATE, {})]
    }
    assert len(results) == 1


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(st.floats(0, 0.1), st.sampled_from([0.0125, 0.05 / 3, 0.025, 0.05])), max_size=6))
def test_holm_rejects_what_the_closed_test_rejects(p_values):
    """A hypothesis is rejected where every intersection that it is part of is rejected by Bonferroni (Marcus 1976)."""
    numbers = range(len(p_values))
    subsets = [one for size in numbers for one in itertools.combinations(numbers, size + 1)]
    closed = [
        all(min(p_values[one] for one in subset) <= 0.05 / len(subset) for subset in subsets if number in subset)
        for number in numbers
    ]
    assert holm(p_values, 0.05) == closed


@pytest.mark.parametrize("true_nulls", [36, 30, 8, 1])
def test_wrong_passes_of_nine_metrics_in_four_cells_stay_within_the_error_rate(true_nulls):
    import numpy as np

    random_ = np.random.default_rng(true_nulls)
    metrics = [f"metric {number}" for number in range(9)]
    wrong, gates = 0, 1500
    for _ in range(gates):
        # Metrics of a cell depend on each other; the worst that are not worse than their margins lie on them.
        common = random_.normal(size=(4, 1))
        scores = 0.7 * common + math.sqrt(1 - 0.7**2) * random_.normal(size=(4, 9))
        p_values = np.array([statistics.NormalDist().cdf(score) for score in scores.ravel()])
        is_null = np.zeros(36, bool)
        is_null[random_.permutation(36)[:true_nulls]] = True
        p_values = np.where(is_null, p_values, 1e-7)
        cells = [
            {metric: judge_of(metric, 1.0, p) for metric, p in zip(metrics, row, strict=True)}
            for row in p_values.reshape(4, 9).tolist()
        ]
        found = [finding.decision for cell in gate_of(*cells) for finding in cell.values()]
        wrong += any(decision == "PASS" and null for decision, null in zip(found, is_null, strict=True))
    assert wrong / gates <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / gates)
