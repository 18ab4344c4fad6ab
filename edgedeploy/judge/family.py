"""How several metrics and cells share one error rate. Pure.

What the error rate means: in one gate, the probability that any metric of any cell is called FAIL although it is not
worse than its margin is at most the error rate, and so is the probability that any is called PASS although it is worse.
A metric is on one side of its margin, so a gate in which nothing is worse can only err towards FAIL, and one in which
something is worse can only err, as a whole, towards PASS: the gate's decision is wrong with at most the error rate.

How it is kept: for each direction on its own, Holm's step-down (1979, Scandinavian Journal of Statistics 6:65). The
cells get equal shares of the error rate, and the metrics of a cell equal shares of the cell's; what a rejected
hypothesis had goes to the others of its cell, and what a cell had that is rejected throughout goes to the other
cells. That is a sequentially rejective graph with fixed weights (Bretz, Maurer, Brannath & Posch 2009, Statistics in
Medicine 28:586), so it needs no assumption on how metrics depend on each other. The family is what the policy has
margins for, whether or not there are data; a size is not in it, for it is counted, not estimated.

With looks after each block: each hypothesis has its own spending function at its current level, and a raised level
may be applied to the looks already taken, because the nominal level of every look rises with the overall one (Maurer
& Bretz 2013, Statistics in Biopharmaceutical Research 5:311; Ye, Li, Liu & Yao 2013, Statistics in Medicine 32:1112).
What has been decided at a lower level is never judged again, and a cell that stops early only forgoes rejections;
both are subsets of what the procedure may reject.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from edgedeploy.records.verdict import Decision, Finding, Metric


@dataclass(frozen=True, slots=True)
class ErrorRate:
    """What one metric, one cell or one gate may err: probabilities of a wrong FAIL and of a wrong PASS."""

    wrong_fail: float
    wrong_pass: float

    def share(self, members: int, *, failed: int, passed: int) -> ErrorRate:
        """Return the share of each member that is not yet rejected, in each direction on its own.

        >>> ErrorRate(0.06, 0.06).share(3, failed=0, passed=1)
        ErrorRate(wrong_fail=0.02, wrong_pass=0.03)
        """
        return ErrorRate(self.wrong_fail / max(members - failed, 1), self.wrong_pass / max(members - passed, 1))

    def decide(self, p_fail: float, p_pass: float) -> Decision:
        """Return what two one-sided p-values show."""
        if p_fail <= self.wrong_fail:
            return "FAIL"
        return "PASS" if p_pass <= self.wrong_pass else "INCONCLUSIVE"


def combine(decisions: Iterable[Decision]) -> Decision:
    """Return the worst decision; of none, INCONCLUSIVE: nothing was shown.

    >>> combine(["PASS", "INCONCLUSIVE"]), combine(["INCONCLUSIVE", "FAIL"]), combine([])
    ('INCONCLUSIVE', 'FAIL', 'INCONCLUSIVE')
    """
    found = set(decisions)
    if "FAIL" in found:
        return "FAIL"
    return "PASS" if found == {"PASS"} else "INCONCLUSIVE"


def holm(p_values: Sequence[float], error_rate: float) -> list[bool]:
    """Return which hypotheses Holm's step-down rejects, in the order given.

    Ours because scipy has none (its `false_discovery_control` is Benjamini & Hochberg, which controls another rate) and
    statsmodels would be a dependency for these lines. Tests compare it with the closed test that it is a short cut of.

    >>> holm([0.04, 0.001, 0.03], 0.05)
    [False, True, False]
    """
    rejected = [False] * len(p_values)
    for place, number in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        if p_values[number] > error_rate / (len(p_values) - place):
            break
        rejected[number] = True
    return rejected


Judge = Callable[[ErrorRate], Finding]
# Judges a cell at its error rate; what was decided at a lower one is handed in and stays.
CellJudge = Callable[[ErrorRate, Mapping[Metric, Finding]], dict[Metric, Finding]]


def step_down(
    judges: Mapping[Metric, Judge], error_rate: ErrorRate, settled: Mapping[Metric, Finding]
) -> dict[Metric, Finding]:
    """Judge the metrics of one cell, each at its share, until no share grows any more.

    Args:
        judges: metric → how to judge it at a given error rate.
        error_rate: of the cell.
        settled: earlier findings; what they decided stays.
    """
    findings = dict(settled)
    previous, share = None, _share_of_metric(judges, findings, error_rate)
    while share != previous:
        findings |= {
            metric: judge(share)
            for metric, judge in judges.items()
            if metric not in findings or findings[metric].decision == "INCONCLUSIVE"
        }
        previous, share = share, _share_of_metric(judges, findings, error_rate)
    return findings


def _share_of_metric(
    judges: Mapping[Metric, Judge], findings: Mapping[Metric, Finding], error_rate: ErrorRate
) -> ErrorRate:
    decisions = [finding.decision for finding in findings.values()]
    return error_rate.share(len(judges), failed=decisions.count("FAIL"), passed=decisions.count("PASS"))


def step_down_cells(cells: Sequence[CellJudge], error_rate: ErrorRate) -> list[dict[Metric, Finding]]:
    """Judge several cells, each at its share, until no share grows any more."""
    findings: list[dict[Metric, Finding]] = [{} for _ in cells]
    previous, share = None, error_rate.share(len(cells), failed=0, passed=0)
    while share != previous:
        findings = [cell(share, found) for cell, found in zip(cells, findings, strict=True)]
        previous, share = (
            share,
            error_rate.share(len(cells), failed=_unanimous(findings, "FAIL"), passed=_unanimous(findings, "PASS")),
        )
    return findings


def _unanimous(cells: Iterable[Mapping[Metric, Finding]], decision: Decision) -> int:
    """Return how many cells have this decision throughout."""
    return sum(bool(found) and {finding.decision for finding in found.values()} == {decision} for found in cells)
