"""Visits against visits: the effect of each block, and a sequential decision over blocks. Pure.

The unit of inference is the block, a pair of fresh processes: noise between processes dominates noise between
inferences, so tests on single inferences raise many times more alarms than they say. Within a block the bursts of the
two sides alternate, and the median over burst pairs cancels what drifts more slowly than a burst.

The t-test takes block effects for independent and normal. Simulated on the margin, 4 to 16 blocks and 5 % allowed, it
errs in 5 % for normal effects and in 4 % for heavy tails (Student's t with 3 degrees of freedom). Log ratios of two
sides that are measured alike are symmetric; where one side alone stalls now and then for whole visits, so that block
effects are skewed (log-normal, sigma 0.5), a change that lies below the margin in most blocks and on it only in the
mean passes in 15 %. The figures are those of tests/benchmarks/gate_error_rates.py.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgedeploy.judge.boundaries import differing_field
from edgedeploy.judge.estimate import estimate_of_mean, units_to_decide
from edgedeploy.judge.family import ErrorRate
from edgedeploy.judge.percentiles import SUPPORT, samples_of, supported_percentile
from edgedeploy.judge.spending import nominal_levels
from edgedeploy.records.run import Run, Visit
from edgedeploy.records.verdict import Decision, Finding, Margin, Policy
from edgedeploy.units import format_change, format_duration

LatencyMetric = Literal["latency_p50", "latency_p95"]
LATENCY_METRICS: tuple[LatencyMetric, ...] = ("latency_p50", "latency_p95")

# No decision while more than one dropped block comes to two that count. A convention: beyond it, what is dropped says
# more about the candidate (it heats the device) than what is kept.
_DROPPED_TO_COUNTED = 0.5


@dataclass(frozen=True, slots=True)
class Block:
    """One usable A/B block: the candidate's effect and what each side took."""

    effect: float
    baseline_s: float
    candidate_s: float
    dropped_before: int


@dataclass(frozen=True, slots=True)
class Blocks:
    """What became of each measured block, in order.

    Attributes:
        outcomes: a block that counts; "dropped" for one with a dropped, throttled or missing visit; "too short" for one
            whose visits have too few samples for the percentile.
    """

    outcomes: tuple[Block | Literal["dropped", "too short"], ...]

    @property
    def usable(self) -> tuple[Block, ...]:
        """The blocks that count."""
        return tuple(outcome for outcome in self.outcomes if isinstance(outcome, Block))

    @property
    def dropped(self) -> int:
        """How many were dropped."""
        return self.outcomes.count("dropped")

    @property
    def too_short(self) -> int:
        """How many were too short."""
        return self.outcomes.count("too short")


@dataclass(frozen=True, slots=True, kw_only=True)
class LatencyEvidence:
    """All that two runs say about one latency metric.

    Attributes:
        margin: the allowed worsening; None reports without judging.
        refusal: why the runs cannot be compared, and what would make them so; None where they can.
        baseline_s, candidate_s: what each side took, for display where nothing is compared.
    """

    metric: LatencyMetric
    margin: Margin | None
    blocks: Blocks
    refusal: tuple[str, str] | None
    baseline_s: float | None
    candidate_s: float | None

    def until(self, measured: int) -> LatencyEvidence:
        """Return the evidence as it was when so many blocks had been measured."""
        return replace(self, blocks=Blocks(self.blocks.outcomes[:measured]))


def latency_evidence(metric: LatencyMetric, baseline: Run, candidate: Run, margin: Margin | None) -> LatencyEvidence:
    """Gather what two runs, measured interleaved, say about one latency metric."""
    is_relative = margin is None or margin.kind == "relative"
    refusal = why_not_comparable(baseline, candidate)
    blocks = Blocks(())
    if refusal is None:
        blocks = blocks_of(metric, baseline.visits, candidate.visits, is_relative=is_relative)
    return LatencyEvidence(
        metric=metric,
        margin=margin,
        blocks=blocks,
        refusal=refusal,
        baseline_s=_overall_s(metric, baseline),
        candidate_s=_overall_s(metric, candidate),
    )


def blocks_of(
    metric: LatencyMetric, baseline: Sequence[Visit], candidate: Sequence[Visit], *, is_relative: bool
) -> Blocks:
    """Return the effect of each block: a log ratio, or a difference in seconds.

    p50: the median over burst pairs of the bursts' medians compared; where bursts are unpaired, the visits' medians
    compared. p95: the visits' 95th percentiles compared, where both have 59 samples.
    """
    sides = (_by_block(baseline), _by_block(candidate))
    outcomes: list[Block | Literal["dropped", "too short"]] = []
    for number in sorted(sides[0].keys() | sides[1].keys()):
        before, after = sides[0].get(number, []), sides[1].get(number, [])
        if not before or not after or any(_is_dropped(visit) for visit in before + after):
            outcomes.append("dropped")
            continue
        levels_s = [_level_s(metric, visits) for visits in (before, after)]
        if levels_s[0] is None or levels_s[1] is None:
            outcomes.append("too short")
            continue
        pairs = _burst_pairs(before, after) if metric == "latency_p50" else []
        effects = [_change(*pair, is_relative=is_relative) for pair in pairs or [(levels_s[0], levels_s[1])]]
        outcomes.append(Block(statistics.median(effects), levels_s[0], levels_s[1], outcomes.count("dropped")))
    return Blocks(tuple(outcomes))


def judge_latency(evidence: LatencyEvidence, policy: Policy, *, error_rate: ErrorRate) -> Finding:
    """Judge one latency metric by a sequential paired t-test over blocks.

    Looks are taken after each block from `policy.min_blocks` to `policy.max_blocks`, at the levels of `nominal_levels`;
    the first look that crosses decides, and the finding describes that look. Blocks after `max_blocks` are not used.

    Args:
        evidence: of the metric.
        policy: the looks.
        error_rate: of this metric.
    """
    blocks, margin = evidence.blocks, evidence.margin
    refusal = evidence.refusal or (None if blocks.usable else _why_no_block(blocks, policy))
    if refusal is not None:
        reason, needed = refusal
        return Finding(
            metric=evidence.metric,
            decision="INCONCLUSIVE" if margin else "PASS",
            baseline_value=evidence.baseline_s,
            candidate_value=evidence.candidate_s,
            effect=None,
            margin=margin,
            reason=reason if margin else f"reported, not judged; {reason}",
            needed=needed if margin else "",
        )
    looks = _looks(policy, error_rate)
    last = min(len(blocks.usable), policy.max_blocks)
    if margin is not None:
        limit = math.log1p(margin.value) if margin.kind == "relative" else margin.value
        for look in range(policy.min_blocks, last):
            if _decision_at(blocks, look, limit, looks) != "INCONCLUSIVE":
                return _finding_at(evidence, look, looks)
    return _finding_at(evidence, last, looks)


def can_more_blocks_decide(evidence: LatencyEvidence, policy: Policy) -> bool:
    """Say whether an undecided latency may be decided by measuring further blocks."""
    has_too_short_visits_only = evidence.blocks.too_short > 0 and not evidence.blocks.usable
    return (
        evidence.refusal is None and not has_too_short_visits_only and len(evidence.blocks.usable) < policy.max_blocks
    )


def why_not_comparable(baseline: Run, candidate: Run) -> tuple[str, str] | None:
    """Return (why the latencies of two runs cannot be compared, what would make them so), or None."""
    again = "measure both artifacts interleaved in one session on one device"
    if baseline.device != candidate.device:
        return f"the baseline was measured on {baseline.device} and the candidate on {candidate.device}", again
    if baseline.facts.cpu_model != candidate.facts.cpu_model:
        return (
            f"{baseline.device} had the processor {baseline.facts.cpu_model} for the baseline and "
            f"{candidate.facts.cpu_model} for the candidate",
            again,
        )
    if baseline.facts.boot_id != candidate.facts.boot_id:
        return f"{baseline.device} was restarted between the two runs", again
    if baseline.session != candidate.session:
        return (
            "the two runs were not measured interleaved in one session, so drift between them is not cancelled",
            again,
        )
    if (field := differing_field(baseline, candidate)) is not None:
        before, after = (getattr(run.boundary, field) for run in (baseline, candidate))
        return (
            f"the timed regions differ: {field} is {before!r} for the baseline and {after!r} for the candidate",
            f"measure both artifacts with the same {field}",
        )
    for side, run in (("baseline", baseline), ("candidate", candidate)):
        for visit in run.visits:
            for sample_s in samples_of(visit):
                if not (math.isfinite(sample_s) and sample_s > 0):
                    return (
                        f"the {side}'s visit in block {visit.block} holds an inference that took {sample_s} s, which "
                        "no clock can say",
                        f"{again}; if it happens again, the device's clock is at fault",
                    )
    return None


def _by_block(visits: Sequence[Visit]) -> Mapping[int, list[Visit]]:
    blocks: dict[int, list[Visit]] = {}
    for visit in visits:
        blocks.setdefault(visit.block, []).append(visit)
    return blocks


def _is_dropped(visit: Visit) -> bool:
    is_throttled = visit.before.throttled or visit.after.throttled
    return bool(visit.dropped or is_throttled or not any(burst.samples_s for burst in visit.bursts))


def _level_s(metric: LatencyMetric, visits: Sequence[Visit]) -> float | None:
    """Return the mean over one side's visits in a block (mostly one) of their median or 95th percentile."""
    if metric == "latency_p50":
        return statistics.fmean(statistics.median(samples_of(visit)) for visit in visits)
    levels_s = [supported_percentile(samples_of(visit), 0.95) for visit in visits]
    known_s = [level_s for level_s in levels_s if level_s is not None]
    return statistics.fmean(known_s) if len(known_s) == len(levels_s) else None


def _burst_pairs(before: Sequence[Visit], after: Sequence[Visit]) -> list[tuple[float, float]]:
    """Return the medians of bursts that were measured next to each other."""
    sides: list[dict[int, list[float]]] = [{}, {}]
    for side, visits in zip(sides, (before, after), strict=True):
        for burst in (burst for visit in visits for burst in visit.bursts if burst.samples_s):
            side.setdefault(burst.pair, []).extend(burst.samples_s)
    common = sides[0].keys() & sides[1].keys()
    return [(statistics.median(sides[0][pair]), statistics.median(sides[1][pair])) for pair in sorted(common)]


def _change(before_s: float, after_s: float, *, is_relative: bool) -> float:
    return math.log(after_s / before_s) if is_relative else after_s - before_s


def _overall_s(metric: LatencyMetric, run: Run) -> float | None:
    """Return a run's median over visits, whatever it is good for; None where a sample is no time."""
    counted = [visit for visit in run.visits if not _is_dropped(visit)]
    levels_s = [level_s for visit in counted if (level_s := _level_s(metric, [visit])) is not None]
    value_s = statistics.median(levels_s) if levels_s else math.nan
    return value_s if math.isfinite(value_s) else None


def _why_no_block(blocks: Blocks, policy: Policy) -> tuple[str, str]:
    if blocks.too_short:
        return (
            f"the visits have fewer than {SUPPORT[0.95]} samples, too few for a 95th percentile",
            f"at least {SUPPORT[0.95]} samples in each visit",
        )
    if blocks.dropped:
        return f"all {blocks.dropped} A/B blocks were dropped", "a device that is not throttled or disturbed"
    return "no A/B block was measured", f"at least {policy.min_blocks} A/B blocks"


@dataclass(frozen=True, slots=True)
class _Looks:
    """The first and last look, in blocks, and what a t-test may err at each, from first to last."""

    first: int
    last: int
    levels: tuple[ErrorRate, ...]

    def level(self, look: int) -> ErrorRate:
        """Return the level of a look; before the first, where nothing is decided, that of the first."""
        return self.levels[max(look - self.first, 0)]


def _looks(policy: Policy, error_rate: ErrorRate) -> _Looks:
    sides = (
        nominal_levels(policy.min_blocks, policy.max_blocks, rate)
        for rate in (error_rate.wrong_fail, error_rate.wrong_pass)
    )
    levels = tuple(ErrorRate(wrong_fail, wrong_pass) for wrong_fail, wrong_pass in zip(*sides, strict=True))
    return _Looks(policy.min_blocks, policy.max_blocks, levels)


def _decision_at(blocks: Blocks, look: int, limit: float, looks: _Looks) -> Decision:
    used = blocks.usable[:look]
    if look < looks.first or used[-1].dropped_before > _DROPPED_TO_COUNTED * look:
        return "INCONCLUSIVE"
    estimate = estimate_of_mean([block.effect for block in used])
    return looks.level(look).decide(estimate.p_fail(limit), estimate.p_pass(limit))


def _finding_at(evidence: LatencyEvidence, look: int, looks: _Looks) -> Finding:
    """Describe the evidence at one look."""
    blocks, margin = evidence.blocks, evidence.margin
    is_relative = margin is None or margin.kind == "relative"
    used = blocks.usable[:look]
    effects = [block.effect for block in used]
    shown = _as_fraction if is_relative else float
    effect = shown(statistics.fmean(effects))
    low = high = p_fail = p_pass = None
    decision: Decision = "PASS"
    reason, needed = f"reported, not judged; {_counts(blocks, look)}", ""
    estimate = estimate_of_mean(effects) if len(effects) > 1 else None
    if estimate is not None:
        level = looks.level(look)
        low, high = shown(estimate.low(level.wrong_fail)), shown(estimate.high(level.wrong_pass))
    if margin is not None:
        limit = math.log1p(margin.value) if is_relative else margin.value
        decision = _decision_at(blocks, look, limit, looks)
        if estimate is not None:
            p_fail, p_pass = estimate.p_fail(limit), estimate.p_pass(limit)
        reason = f"{_conclusion(decision, effect, margin)}; {_counts(blocks, look)}"
        if decision == "INCONCLUSIVE":
            needed = _needed_blocks(blocks, effects, limit, looks)
    return Finding(
        metric=evidence.metric,
        decision=decision,
        baseline_value=statistics.median(block.baseline_s for block in used),
        candidate_value=statistics.median(block.candidate_s for block in used),
        effect=effect,
        low=low,
        high=high,
        p_fail=p_fail,
        p_pass=p_pass,
        margin=margin,
        units=look,
        reason=reason,
        needed=needed,
    )


def _as_fraction(log_ratio: float) -> float:
    """Turn a log ratio into a relative change; two wild blocks have a bound beyond what a float can hold."""
    return math.expm1(min(log_ratio, 700.0))


def _conclusion(decision: Decision, effect: float, margin: Margin) -> str:
    sign = "-" if effect < 0 else "+"
    change = format_change(effect) if margin.kind == "relative" else f"{sign}{format_duration(abs(effect))}"
    if decision == "INCONCLUSIVE":
        return f"a change of {change} is on neither side of the margin of {margin.text} beyond doubt"
    if decision == "FAIL":
        return f"a change of {change} is shown to be more than the margin of {margin.text} allows"
    return f"a change of {change} is shown to stay within the margin of {margin.text}"


def _counts(blocks: Blocks, look: int) -> str:
    parts = [f"{look} A/B blocks"]
    if blocks.dropped:
        parts.append(f"{blocks.dropped} dropped")
    if blocks.too_short:
        parts.append(f"{blocks.too_short} too short for this percentile")
    if len(blocks.usable) > look:
        parts.append(f"{len(blocks.usable) - look} more measured after this look and not used")
    return ", ".join(parts)


def _needed_blocks(blocks: Blocks, effects: list[float], limit: float, looks: _Looks) -> str:
    look = len(effects)
    if blocks.usable[look - 1].dropped_before > _DROPPED_TO_COUNTED * look:
        return f"a device that is not throttled or disturbed: {blocks.dropped} blocks were dropped to {look} that count"
    if look < looks.first:
        return f"at least {looks.first - look} more A/B blocks for the first look"
    distance = limit - statistics.fmean(effects)
    spread = statistics.stdev(effects)
    last = looks.level(looks.last)
    enough = units_to_decide(spread, abs(distance), last.wrong_pass if distance > 0 else last.wrong_fail)
    if enough is None or enough > 100 * looks.last:
        return (
            "the change seen lies too near the margin: no number of blocks is likely to decide; choose another margin"
        )
    more = max(enough - look, 1)
    if look + more <= looks.last:
        return f"about {more} more A/B blocks at the noise seen, if the change seen is the true one"
    return (
        f"about {more} more A/B blocks at the noise seen, if the change seen is the true one: more than the "
        f"{looks.last} in all that the policy allows; raise max_blocks or measure on a quieter device"
    )
