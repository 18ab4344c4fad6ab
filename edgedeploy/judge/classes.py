"""Accuracy class by class, so that a drop in one class cannot hide in the mean. Pure.

Each class is tested by itself: the same exact tests as for accuracy as a whole, over the samples that bear its label.
What the metric says is made of them so:

FAIL   where any class is shown to be worse than the margin. Holm's correction over all classes, small ones too, keeps
       the chance that any is accused wrongly within the metric's error rate. A class of nine samples, all of
       which turned wrong, is enough among ten classes (p = 0.003).
PASS   where every class that the samples can decide is shown not to be worse: each at the metric's whole error rate,
       for the claim is that all hold (an intersection-union test, Berger 1982, Technometrics 24:295).
Small  classes are set aside, by name and with the number of samples that they would need. A class is small where even
       no change in any of its answers would not show it within the margin at the gate's whole error rate; that follows
       from its number of samples, the margin and the policy, never from the answers, so that which classes a PASS
       speaks of is settled before anything is seen. Small classes do not make a metric INCONCLUSIVE, with two
       exceptions. One whose own test, without the correction for the number of classes, speaks against it at the gate's
       error rate: it looks dropped. And where small classes hold more than half of all samples: then the margin is
       finer than this evaluation set can show, and a PASS would speak of less than half of it.

Simulated for ten classes of 20 to 400 samples (tests/benchmarks/gate_family.py, 300 gates each, 5 % allowed): with all
classes on the margin of 5 points 3.7 % FAIL; with one of them on it and the others unchanged 0.3 % FAIL and 1.0 to
1.3 % PASS; a largest class that drops by 15 points fails in 99 %, one of 20 samples that drops by 60 points in 91 %.
Exact tests of few samples cannot use their error rate up, and ten classes are all shown unharmed in 26 % of sets so
small only: a class of 60 samples needs every answer unchanged.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from edgedeploy.judge.accuracy import RATES, needed_samples, refused_accuracy, why_no_scores, why_not_paired
from edgedeploy.judge.family import ErrorRate, combine, holm
from edgedeploy.judge.proportions import p_at_least, p_at_most, p_not_worse
from edgedeploy.records.run import Outputs
from edgedeploy.records.verdict import ClassFinding, Decision, Finding, Margin
from edgedeploy.units import format_points

# Where small classes hold more of the samples, the margin is finer than the set can show. A convention: the majority.
_MOST_SET_ASIDE = 0.5
# A class that needs more samples than this is not decided by finding more.
_MOST_SAMPLES = 10**7
# Classes that a sentence names before it counts the others.
_NAMED = 4


@dataclass(frozen=True, slots=True)
class ClassCounts:
    """How both sides answered the samples of one class.

    Attributes:
        lost: answered rightly by the baseline only; gained: by the candidate only; both_right: by both.
    """

    label: int
    samples: int
    lost: int
    gained: int
    both_right: int

    @property
    def drop(self) -> float:
        """The share of right answers that went away."""
        return (self.lost - self.gained) / self.samples

    @property
    def right(self) -> tuple[int, int]:
        """Right answers of the baseline and of the candidate."""
        return self.both_right + self.lost, self.both_right + self.gained


def judge_class_accuracy(
    baseline: Outputs | None,
    candidate: Outputs | None,
    margin: Margin | None,
    *,
    error_rate: ErrorRate,
    small_at: float,
) -> Finding:
    """Judge right-or-wrong scores class by class, as the module says.

    Args:
        baseline: answers of the artifact that the candidate is compared with.
        candidate: answers to the same samples.
        margin: the allowed drop of any class, the least share of right answers in any class, or both; None reports.
        error_rate: of this metric.
        small_at: the gate's whole error rate, at which a class that nothing happened to must pass to be judged.
    """
    refusal = _why_no_classes(baseline, candidate)
    if refusal is not None:
        return refused_accuracy("class_accuracy", baseline, candidate, margin, *refusal)
    assert baseline is not None and candidate is not None and baseline.scores and candidate.scores and baseline.labels
    counted = count_classes(baseline.labels, baseline.scores, candidate.scores)
    if margin is None:
        told = [_class_finding(one, None, None) for one in counted]
        return _finding("PASS", told, None, f"reported, not judged; {_worst_text(told)}", "", (None, None))
    outside = 1e-4 / len(counted)
    p_values = [_p_values(one, margin, outside) for one in counted]
    accused = holm([p_fail for p_fail, _ in p_values], error_rate.wrong_fail)
    found: list[ClassFinding] = []
    least = samples_to_judge(margin, small_at, len(counted))
    for one, (p_fail, p_pass), is_accused in zip(counted, p_values, accused, strict=True):
        is_small = least is None or one.samples < least
        decision: Decision | None = "INCONCLUSIVE"
        if is_accused:
            decision = "FAIL"
        elif p_pass <= error_rate.wrong_pass:
            decision = "PASS"
        elif is_small and p_fail > small_at:
            decision = None
        found.append(_class_finding(one, decision, (p_fail, p_pass), least if is_small else None))
    return _concluded(found, margin, error_rate, least)


def count_classes(
    labels: Sequence[int], baseline: Sequence[float], candidate: Sequence[float]
) -> tuple[ClassCounts, ...]:
    """Count how both sides answered, class by class, in the order of the classes' numbers."""
    tables: dict[int, list[int]] = {}
    for label, before, after in zip(labels, baseline, candidate, strict=True):
        table = tables.setdefault(label, [0, 0, 0, 0])
        table[0] += 1
        table[1] += before > after
        table[2] += before < after
        table[3] += before == after == 1
    return tuple(ClassCounts(label, *table) for label, table in sorted(tables.items()))


@functools.lru_cache(maxsize=1024)
def samples_to_judge(margin: Margin, error_rate: float, classes: int) -> int | None:
    """Return the samples at which a class that nothing happened to passes; None where no number is enough.

    Args:
        margin: of class_accuracy; where it has two parts, both must pass.
        error_rate: one-sided.
        classes: how many there are, which decides how finely the exact test is searched.
    """
    outside = 1e-4 / classes
    parts: list[int | None] = []
    if margin.limit is not None:  # all answers right
        parts.append(math.ceil(math.log(error_rate) / math.log(margin.limit)))
    if margin.kind == "points":
        parts.append(_samples_without_a_change(margin.value, error_rate, outside))
    known = [part for part in parts if part is not None]
    return max(known) if len(known) == len(parts) else None


def _samples_without_a_change(drop: float, error_rate: float, outside: float) -> int | None:
    if drop <= 0:
        return None
    if drop >= 1:
        return 1
    # Without a discordant answer the exact p-value is (1 - drop) ** samples at least.
    too_few = max(math.ceil(math.log(error_rate) / math.log1p(-drop)), 1) - 1
    enough = too_few + 1
    while p_not_worse(0, 0, enough, drop, outside) > error_rate:
        too_few, enough = enough, enough + max(1, enough // 50)
        if enough > _MOST_SAMPLES:
            return None
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        if p_not_worse(0, 0, middle, drop, outside) > error_rate:
            too_few = middle
        else:
            enough = middle
    return enough


def _p_values(one: ClassCounts, margin: Margin, outside: float) -> tuple[float, float]:
    """Return the p-values of a class for FAIL and for PASS, of both parts of the margin together."""
    parts: list[tuple[float, float]] = []
    if margin.kind == "points":
        parts.append(
            (
                p_not_worse(one.gained, one.lost, one.samples, -margin.value, outside),
                p_not_worse(one.lost, one.gained, one.samples, margin.value, outside),
            )
        )
    if margin.limit is not None:
        right = one.right[1]
        parts.append((p_at_least(right, one.samples, margin.limit), p_at_most(right, one.samples, margin.limit)))
    return min(1.0, len(parts) * min(part[0] for part in parts)), max(part[1] for part in parts)


def _class_finding(
    one: ClassCounts,
    decision: Decision | None,
    p_values: tuple[float, float] | None,
    needed_samples: int | None = None,
) -> ClassFinding:
    before, after = one.right
    return ClassFinding(
        label=one.label,
        decision=decision,
        samples=one.samples,
        lost=one.lost,
        gained=one.gained,
        baseline_value=before / one.samples,
        candidate_value=after / one.samples,
        effect=one.drop,
        p_fail=p_values[0] if p_values else None,
        p_pass=p_values[1] if p_values else None,
        needed_samples=needed_samples,
    )


def _concluded(found: Sequence[ClassFinding], margin: Margin, error_rate: ErrorRate, least: int | None) -> Finding:
    """Say what the classes say together."""
    samples = sum(one.samples for one in found)
    small = [one for one in found if one.decision is None]
    judged = [one for one in found if one.decision is not None]
    is_too_fine = sum(one.samples for one in small) > _MOST_SET_ASIDE * samples
    decision = combine(one.decision for one in judged if one.decision is not None)
    if decision == "PASS" and is_too_fine:
        decision = "INCONCLUSIVE"
    p_fail = min(1.0, len(found) * min(one.p_fail for one in found if one.p_fail is not None))
    p_pass = max((one.p_pass for one in judged if one.p_pass is not None), default=1.0)
    failed = [one for one in judged if one.decision == "FAIL"]
    undecided = [one for one in judged if one.decision == "INCONCLUSIVE"]
    if failed:
        reason = f"{_listed(failed)}: shown to be worse than {margin.text} allows (Holm over {len(found)} classes)"
    elif undecided:
        reason = f"{_listed(undecided)}: on neither side of {margin.text} beyond doubt"
    elif is_too_fine:
        reason = f"{margin.text} is finer than the samples of most classes can show"
    else:
        reason = f"none of {len(judged)} classes is worse than {margin.text} allows; {_worst_text(judged)}"
    needed = "" if decision != "INCONCLUSIVE" else _needed(undecided, is_too_fine, margin, error_rate, least)
    if small:
        holds = sum(one.samples for one in small) / samples
        reason += (
            f"; {_classes(small)} with {holds * 100:.2g} % of the samples too small to be judged and set aside"
            f"{_least_text(least)}"
        )
    return _finding(decision, found, margin, reason, needed, (p_fail, p_pass))


def _needed(
    undecided: Sequence[ClassFinding], is_too_fine: bool, margin: Margin, error_rate: ErrorRate, least: int | None
) -> str:
    if is_too_fine:
        if least is None:
            return "another margin: no number of samples shows that no class has dropped at all"
        return f"at least {least:,} evaluation samples of each class, or a margin that fewer can show"
    texts = []
    for one in undecided[:_NAMED]:
        if margin.kind == "points":
            spread = math.sqrt(max(max(one.lost + one.gained, 3) / one.samples - one.effect**2, 1e-12))
            text = needed_samples(spread, margin.value - one.effect, one.samples, error_rate)
        else:
            assert margin.limit is not None, "what is no drop is a limit"
            share = min(max(one.candidate_value, 1 / one.samples), 1 - 1 / one.samples)
            spread = math.sqrt(share * (1 - share))
            text = needed_samples(spread, one.candidate_value - margin.limit, one.samples, error_rate)
        texts.append(f"class {one.label}: {text}")
    more = len(undecided) - len(texts)
    return "; ".join(texts) + (f"; likewise {more} more classes" if more else "")


def _finding(
    decision: Decision,
    found: Sequence[ClassFinding],
    margin: Margin | None,
    reason: str,
    needed: str,
    p_values: tuple[float | None, float | None],
) -> Finding:
    ordered = tuple(sorted(found, key=lambda one: (-one.effect, one.label)))
    worst = ordered[0]
    return Finding(
        metric="class_accuracy",
        decision=decision,
        baseline_value=worst.baseline_value,
        candidate_value=worst.candidate_value,
        effect=worst.effect,
        p_fail=p_values[0],
        p_pass=p_values[1],
        margin=margin,
        units=sum(one.samples for one in found),
        reason=reason,
        needed=needed,
        classes=ordered,
    )


def _why_no_classes(baseline: Outputs | None, candidate: Outputs | None) -> tuple[str, str] | None:
    """Return (why there is no judgement, what would give one), or None."""
    refusal = why_no_scores("baseline", baseline) or why_no_scores("candidate", candidate)
    refusal = refusal or why_not_paired(baseline, candidate)
    if refusal is not None:
        return refusal
    assert baseline is not None and candidate is not None and candidate.scores
    if candidate.metric not in RATES:
        return (
            f"{candidate.metric} has no right or wrong answers, so no accuracy class by class",
            "judge top1 or top5, or leave the margin of class_accuracy out",
        )
    for side, outputs in (("baseline", baseline), ("candidate", candidate)):
        if outputs.labels is None:
            return (
                f"the {side}'s run does not keep the classes of its samples",
                "measure again: runs of this edgedeploy keep them",
            )
        if len(outputs.labels) != len(outputs.scores or ()):
            return (
                f"the {side}'s run has {len(outputs.labels):,} labels for {len(outputs.scores or ()):,} samples",
                "measure again: the run was not written by this edgedeploy or is damaged",
            )
    if baseline.labels != candidate.labels:
        return "the two runs give other classes to the same samples", "measure both artifacts on one evaluation set"
    return None


def _listed(found: Sequence[ClassFinding]) -> str:
    ordered = sorted(found, key=lambda one: (-one.effect, one.label))
    texts = [_class_text(one) for one in ordered[:_NAMED]]
    more = f" and {len(ordered) - _NAMED} more classes" if len(ordered) > _NAMED else ""
    return ", ".join(texts) + more


def _class_text(one: ClassFinding) -> str:
    return (
        f"class {one.label} {format_points(-one.effect)} ({one.baseline_value * 100:.4g} % to "
        f"{one.candidate_value * 100:.4g} % of {one.samples:,} samples: {one.lost} lost, {one.gained} gained)"
    )


def _classes(found: Sequence[ClassFinding]) -> str:
    named = ", ".join(str(one.label) for one in found[:_NAMED])
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return f"{'class' if len(found) == 1 else 'classes'} {named}{more}"


def _worst_text(found: Sequence[ClassFinding]) -> str:
    return f"the largest drop is that of {_class_text(max(found, key=lambda one: (one.effect, -one.label)))}"


def _least_text(least: int | None) -> str:
    return "" if least is None else f" (one needs {least:,} samples)"
