"""Visits against visits: the effect of each block, and a sequential decision over blocks. Pure.

The unit of inference is the block, a pair of fresh processes: noise between processes dominates noise between
inferences, so tests on single inferences raise many times more alarms than they say. Within a block the bursts of the
two sides alternate, and the median over burst pairs cancels what drifts more slowly than a burst. What a process does
once (loading, the first inference) is one value a visit, compared within the block.

The t-test takes block effects for independent and normal. Simulated on the margin, 4 to 16 blocks and 5 % allowed, it
errs in 5 % for normal effects and in 4 % for heavy tails (Student's t with 3 degrees of freedom). Log ratios of two
sides that are measured alike are symmetric; where one side alone stalls now and then for whole visits, so that block
effects are skewed (log-normal, sigma 0.5), a change that lies below the margin in most blocks and on it only in the
mean passes in 15 %. The figures are those of tests/benchmarks/gate_error_rates.py.

A limit on the candidate itself ("<= 5ms") is judged by the same looks over the logarithms of its own levels. There is
no other side to cancel the device's drift, so it speaks of the session that was measured, and of no other day. Where
the level lies just on the limit, it errs in 6 % on each side for independent visits (5 % nominal), in 10 % where
successive ones correlate by 0.3, and in 30 % where they do by 0.7, as on a shared virtual machine: leave a limit some
headroom there. Figures of tests/benchmarks/gate_family.py, 300 gates each.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from edgedeploy.judge.boundaries import differing_field
from edgedeploy.judge.clock import why_no_clock
from edgedeploy.judge.effort import Needed, blocks_needed, seconds_per_block
from edgedeploy.judge.estimate import estimate_of_mean
from edgedeploy.judge.family import ErrorRate
from edgedeploy.judge.limit import conclusion as limit_conclusion
from edgedeploy.judge.limit import refused, share_of_part, with_limit, without_limit
from edgedeploy.judge.percentiles import PERCENTILES, SUPPORT, samples_of, supported_percentile
from edgedeploy.judge.spending import nominal_levels
from edgedeploy.records.run import Run, Visit
from edgedeploy.records.verdict import Decision, Finding, LimitFinding, Margin, Policy
from edgedeploy.units import format_change, format_duration

LatencyMetric = Literal["latency_p50", "latency_p95", "latency_p99", "first_inference", "load_time"]
LATENCY_METRICS: tuple[LatencyMetric, ...] = (
    "latency_p50",
    "latency_p95",
    "latency_p99",
    "first_inference",
    "load_time",
)

# No decision while more than one dropped block comes to two that count. A convention: beyond it, what is dropped says
# more about the candidate (it heats the device) than what is kept.
_DROPPED_TO_COUNTED = 0.5
_AGAIN = "measure both artifacts interleaved in one session on one device"
_ORDINALS = {0.95: "95th", 0.99: "99th"}


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
        own: the candidate alone, effect = logarithm of its level; empty where the margin has no limit.
        own_refusal: why its times cannot be judged, likewise.
        block_s: seconds that a block takes; None where nobody knows.
        fewest_samples: of a visit of either side that counts.
    """

    metric: LatencyMetric
    margin: Margin | None
    blocks: Blocks
    refusal: tuple[str, str] | None
    baseline_s: float | None
    candidate_s: float | None
    own: Blocks = Blocks(())
    own_refusal: tuple[str, str] | None = None
    block_s: float | None = None
    fewest_samples: int = 0

    @property
    def measured(self) -> int:
        """How many blocks were measured, whatever became of them."""
        return max(len(self.blocks.outcomes), len(self.own.outcomes))

    def until(self, measured: int) -> LatencyEvidence:
        """Return the evidence as it was when so many blocks had been measured."""
        return replace(self, blocks=Blocks(self.blocks.outcomes[:measured]), own=Blocks(self.own.outcomes[:measured]))


def latency_evidence(metric: LatencyMetric, baseline: Run, candidate: Run, margin: Margin | None) -> LatencyEvidence:
    """Gather what two runs, measured interleaved, say about one latency metric."""
    is_relative = margin is None or margin.kind in ("relative", "limit")
    refusal = why_not_comparable(baseline, candidate) or why_no_level(metric, baseline, candidate)
    blocks, own, own_refusal = Blocks(()), Blocks(()), None
    if refusal is None:
        blocks = blocks_of(metric, baseline.visits, candidate.visits, is_relative=is_relative)
    if margin is not None and margin.limit is not None:
        own_refusal = _why_no_own_level(metric, candidate)
        if own_refusal is None:
            together = baseline.visits if baseline.session == candidate.session else ()
            own = own_blocks(metric, together, candidate.visits)
    counted = [visit for run in (baseline, candidate) for visit in run.visits if not _is_dropped(visit)]
    return LatencyEvidence(
        metric=metric,
        margin=margin,
        blocks=blocks,
        refusal=refusal,
        baseline_s=_overall_s(metric, baseline),
        candidate_s=_overall_s(metric, candidate),
        own=own,
        own_refusal=own_refusal,
        block_s=seconds_per_block([*baseline.visits, *candidate.visits]) if refusal is None else None,
        fewest_samples=min((len(samples_of(visit)) for visit in counted), default=0),
    )


def blocks_of(
    metric: LatencyMetric, baseline: Sequence[Visit], candidate: Sequence[Visit], *, is_relative: bool
) -> Blocks:
    """Return the effect of each block: a log ratio, or a difference in seconds.

    p50: the median over burst pairs of the bursts' medians compared; where bursts are unpaired, the visits' medians
    compared. p95, p99: the visits' percentiles compared, where both have the 59 or 299 samples that one needs. First
    inference and loading: the two processes compared.
    """
    sides = (_by_block(baseline), _by_block(candidate))
    outcomes: list[Block | Literal["dropped", "too short"]] = []
    for number in sorted(sides[0].keys() | sides[1].keys()):
        before, after = sides[0].get(number, []), sides[1].get(number, [])
        if not before or not after or any(_is_dropped(visit) for visit in before + after):
            outcomes.append("dropped")
            continue
        levels_s = [level_s(metric, visits) for visits in (before, after)]
        if levels_s[0] is None or levels_s[1] is None:
            outcomes.append("too short")
            continue
        pairs = _burst_pairs(before, after) if metric == "latency_p50" else []
        effects = [_change(*pair, is_relative=is_relative) for pair in pairs or [(levels_s[0], levels_s[1])]]
        outcomes.append(Block(statistics.median(effects), levels_s[0], levels_s[1], outcomes.count("dropped")))
    return Blocks(tuple(outcomes))


def own_blocks(metric: LatencyMetric, baseline: Sequence[Visit], candidate: Sequence[Visit]) -> Blocks:
    """Return the candidate's own level in each block, as a logarithm; those in which it did not count are dropped.

    Args:
        metric: what to read of a visit.
        baseline: says only which blocks there were.
        candidate: whose levels they are.
    """
    own = _by_block(candidate)
    outcomes: list[Block | Literal["dropped", "too short"]] = []
    for number in sorted({*own, *(visit.block for visit in baseline)}):
        visits = own.get(number, [])
        if not visits or any(_is_dropped(visit) for visit in visits):
            outcomes.append("dropped")
            continue
        took_s = level_s(metric, visits)
        dropped = outcomes.count("dropped")
        outcomes.append("too short" if took_s is None else Block(math.log(took_s), math.nan, took_s, dropped))
    return Blocks(tuple(outcomes))


def judge_latency(evidence: LatencyEvidence, policy: Policy, *, error_rate: ErrorRate) -> Finding:
    """Judge one latency metric by a sequential paired t-test over blocks.

    Looks are taken after each block from `policy.min_blocks` to `policy.max_blocks`, at the levels of `nominal_levels`;
    the first look that crosses decides, and the finding describes that look. Blocks after `max_blocks` are not used.
    A limit on the candidate itself is judged beside it (`limit`).

    Args:
        evidence: of the metric.
        policy: the looks.
        error_rate: of this metric.
    """
    margin = evidence.margin
    share = share_of_part(margin, error_rate)
    change = _judge_change(replace(evidence, margin=without_limit(margin)), policy, share)
    if margin is None or margin.limit is None:
        return change
    return with_limit(change, judge_own_level(evidence, policy, share), margin)


def refused_latency(evidence: LatencyEvidence, reason: str, needed: str, *, is_stored: bool = False) -> Finding:
    """Return the finding where two latencies cannot be compared: why, and what would make them so."""
    margin = evidence.margin
    return Finding(
        metric=evidence.metric,
        decision="INCONCLUSIVE" if margin else "PASS",
        baseline_value=evidence.baseline_s,
        candidate_value=evidence.candidate_s,
        effect=None,
        margin=margin,
        reason=reason if margin else f"reported, not judged; {reason}",
        needed=needed if margin else "",
        is_stored=is_stored,
    )


def _judge_change(evidence: LatencyEvidence, policy: Policy, error_rate: ErrorRate) -> Finding:
    blocks, margin = evidence.blocks, evidence.margin
    refusal = evidence.refusal or (None if blocks.usable else _why_no_block(evidence, blocks, policy))
    if refusal is not None:
        return refused_latency(evidence, *refusal)
    looks = _looks(policy, error_rate)
    look = min(len(blocks.usable), policy.max_blocks)
    if margin is not None:
        limit = math.log1p(margin.value) if margin.kind == "relative" else margin.value
        look = _deciding_look(blocks, policy, limit, looks)
    return _finding_at(evidence, look, looks)


def judge_own_level(evidence: LatencyEvidence, policy: Policy, error_rate: ErrorRate) -> LimitFinding:
    """Judge the limit on the candidate itself, by the looks of `judge_latency` over the logarithms of its levels.

    Args:
        evidence: with a margin that has a limit.
        policy: the looks.
        error_rate: of this part.
    """
    margin, blocks = evidence.margin, evidence.own
    assert margin is not None and margin.limit is not None, "only a limit is judged"
    refusal = evidence.own_refusal or (None if blocks.usable else _why_no_block(evidence, blocks, policy))
    if refusal is not None:
        return refused(margin, *refusal, value=evidence.candidate_s)
    looks, limit = _looks(policy, error_rate), math.log(margin.limit)
    look = _deciding_look(blocks, policy, limit, looks)
    effects = [block.effect for block in blocks.usable[:look]]
    decision = _decision_at(blocks, look, limit, looks)
    value_s = math.exp(statistics.fmean(effects))
    estimate = estimate_of_mean(effects) if len(effects) > 1 else None
    level = looks.level(look)
    said = limit_conclusion(decision, f"level of {format_duration(value_s)}", format_duration(margin.limit))
    return LimitFinding(
        decision=decision,
        limit=margin.limit,
        value=value_s,
        low=None if estimate is None else _seconds(estimate.low(level.wrong_fail)),
        high=None if estimate is None else _seconds(estimate.high(level.wrong_pass)),
        p_fail=None if estimate is None else estimate.p_fail(limit),
        p_pass=None if estimate is None else estimate.p_pass(limit),
        units=look,
        reason=f"{said}; {_counts(blocks, look)}",
        needed=_needed(blocks, effects, limit, looks, evidence, 1.0, 1).text if decision == "INCONCLUSIVE" else "",
    )


def can_more_blocks_decide(evidence: LatencyEvidence, policy: Policy) -> bool:
    """Say whether an undecided latency may be decided by measuring further blocks."""
    margin = evidence.margin
    parts: list[tuple[tuple[str, str] | None, Blocks]] = []
    if margin is None or margin.kind != "limit":
        parts.append((evidence.refusal, evidence.blocks))
    if margin is not None and margin.limit is not None:
        parts.append((evidence.own_refusal, evidence.own))
    # A part that nothing can decide leaves the metric undecided whatever becomes of the other.
    return all(
        refusal is None and not (blocks.too_short > 0 and not blocks.usable) for refusal, blocks in parts
    ) and any(len(blocks.usable) < policy.max_blocks for _, blocks in parts)


def why_not_comparable(baseline: Run, candidate: Run) -> tuple[str, str] | None:
    """Return (why the latencies of two runs cannot be compared, what would make them so), or None."""
    return (
        why_other_device(baseline, candidate)
        or why_not_interleaved(baseline, candidate)
        or why_unlike(baseline, candidate)
    )


def why_other_device(baseline: Run, candidate: Run) -> tuple[str, str] | None:
    """Return why two runs are of different devices and what would make them of one, or None."""
    if baseline.device != candidate.device:
        return f"the baseline was measured on {baseline.device} and the candidate on {candidate.device}", _AGAIN
    if baseline.facts.cpu_model != candidate.facts.cpu_model:
        return (
            f"{baseline.device} had the processor {baseline.facts.cpu_model} for the baseline and "
            f"{candidate.facts.cpu_model} for the candidate",
            _AGAIN,
        )
    return None


def why_not_interleaved(baseline: Run, candidate: Run) -> tuple[str, str] | None:
    """Return why drift between two runs of one device is not cancelled and what would cancel it, or None."""
    if baseline.facts.boot_id != candidate.facts.boot_id:
        return f"{baseline.device} was restarted between the two runs", _AGAIN
    if baseline.session != candidate.session:
        return (
            "the two runs were not measured interleaved in one session, so drift between them is not cancelled",
            _AGAIN,
        )
    return None


def why_unlike(baseline: Run, candidate: Run) -> tuple[str, str] | None:
    """Return what was timed differently in two runs, or what no clock can have said, and what to do, or None."""
    if (field := differing_field(baseline, candidate)) is not None:
        before, after = (getattr(run.boundary, field) for run in (baseline, candidate))
        return (
            f"the timed regions differ: {field} is {before!r} for the baseline and {after!r} for the candidate",
            f"measure both artifacts with the same {field}",
        )
    for side, run in (("baseline", baseline), ("candidate", candidate)):
        if (jump := why_no_clock(side, run)) is not None:
            return jump, f"{_AGAIN}; if it happens again, the device's clock is at fault"
    return None


def why_no_level(metric: LatencyMetric, *runs: Run) -> tuple[str, str] | None:
    """Return why a visit has no logarithm of what it took once, and what to do, or None."""
    what = {"first_inference": "the first inference", "load_time": "loading"}.get(metric)
    if what is None:
        return None
    for run in runs:
        for visit in run.visits:
            if not _is_dropped(visit) and (level_s(metric, [visit]) or 0.0) <= 0:
                return f"the visit of {run.cell} in block {visit.block} says that {what} took no time", _AGAIN
    return None


def _why_no_own_level(metric: LatencyMetric, candidate: Run) -> tuple[str, str] | None:
    if (jump := why_no_clock("candidate", candidate)) is not None:
        return jump, "measure the candidate again; if it happens again, the device's clock is at fault"
    return why_no_level(metric, candidate)


def _by_block(visits: Sequence[Visit]) -> Mapping[int, list[Visit]]:
    blocks: dict[int, list[Visit]] = {}
    for visit in visits:
        blocks.setdefault(visit.block, []).append(visit)
    return blocks


def _is_dropped(visit: Visit) -> bool:
    is_throttled = visit.before.throttled or visit.after.throttled
    return bool(visit.dropped or is_throttled or not any(burst.samples_s for burst in visit.bursts))


def counted_visits(run: Run) -> list[Visit]:
    """Return the visits of a run that count."""
    return [visit for visit in run.visits if not _is_dropped(visit)]


def level_s(metric: LatencyMetric, visits: Sequence[Visit]) -> float | None:
    """Return the mean over one side's visits in a block (mostly one) of what the metric is of a visit.

    None: a visit has too few samples for the percentile.
    """
    levels_s = [_level_of_visit_s(metric, visit) for visit in visits]
    known_s = [one_s for one_s in levels_s if one_s is not None]
    return statistics.fmean(known_s) if len(known_s) == len(levels_s) else None


def _level_of_visit_s(metric: LatencyMetric, visit: Visit) -> float | None:
    if metric == "first_inference":
        return visit.first_inference_s
    if metric == "load_time":
        return visit.load_s
    if metric == "latency_p50":
        return statistics.median(samples_of(visit))
    return supported_percentile(samples_of(visit), PERCENTILES[metric])


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
    levels_s = [took_s for visit in counted_visits(run) if (took_s := level_s(metric, [visit])) is not None]
    value_s = statistics.median(levels_s) if levels_s else math.nan
    return value_s if math.isfinite(value_s) else None


def _why_no_block(evidence: LatencyEvidence, blocks: Blocks, policy: Policy) -> tuple[str, str]:
    if blocks.too_short:
        fraction = PERCENTILES[evidence.metric]
        has = f"some {evidence.fewest_samples}, " if evidence.fewest_samples else ""
        return (
            f"the visits have fewer than {SUPPORT[fraction]} samples ({has}too few for a {_ORDINALS[fraction]} "
            f"percentile)",
            f"at least {SUPPORT[fraction]} samples in each visit",
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


def _deciding_look(blocks: Blocks, policy: Policy, limit: float, looks: _Looks) -> int:
    """Return the first look that decides, or else the last one that there is."""
    last = min(len(blocks.usable), policy.max_blocks)
    for look in range(policy.min_blocks, last):
        if _decision_at(blocks, look, limit, looks) != "INCONCLUSIVE":
            return look
    return last


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
    baseline_s = statistics.median(block.baseline_s for block in used)
    low = high = p_fail = p_pass = None
    decision: Decision = "PASS"
    reason, needed = f"reported, not judged; {_counts(blocks, look)}", Needed("")
    estimate = estimate_of_mean(effects) if len(effects) > 1 else None
    if estimate is not None:
        level = looks.level(look)
        low, high = shown(estimate.low(level.wrong_fail)), shown(estimate.high(level.wrong_pass))
    if margin is not None:
        limit = math.log1p(margin.value) if is_relative else margin.value
        decision = _decision_at(blocks, look, limit, looks)
        if estimate is not None:
            p_fail, p_pass = estimate.p_fail(limit), estimate.p_pass(limit)
        reason = f"{change_conclusion(decision, effect, margin)}; {_counts(blocks, look)}"
        if decision == "INCONCLUSIVE":
            needed = _needed(blocks, effects, limit, looks, evidence, 1.0 if is_relative else baseline_s, 2)
    return Finding(
        metric=evidence.metric,
        decision=decision,
        baseline_value=baseline_s,
        candidate_value=statistics.median(block.candidate_s for block in used),
        effect=effect,
        low=low,
        high=high,
        p_fail=p_fail,
        p_pass=p_pass,
        margin=margin,
        units=look,
        reason=reason,
        needed=needed.text,
        needed_units=needed.units,
        needed_s=needed.seconds,
        needed_spread=needed.spread,
    )


def _as_fraction(log_ratio: float) -> float:
    """Turn a log ratio into a relative change; two wild blocks have a bound beyond what a float can hold."""
    return math.expm1(min(log_ratio, 700.0))


def _seconds(logarithm: float) -> float:
    return math.exp(min(logarithm, 700.0))


def change_conclusion(decision: Decision, effect: float, margin: Margin) -> str:
    """Say how a change of latency lies to its margin."""
    sign = "-" if effect < 0 else "+"
    change = format_change(effect) if margin.kind == "relative" else f"{sign}{format_duration(abs(effect))}"
    allowed = margin.text
    if decision == "INCONCLUSIVE":
        return f"a change of {change} is on neither side of the margin of {allowed} beyond doubt"
    if decision == "FAIL":
        return f"a change of {change} is shown to be more than the margin of {allowed} allows"
    return f"a change of {change} is shown to stay within the margin of {allowed}"


def _counts(blocks: Blocks, look: int) -> str:
    parts = [f"{look} A/B blocks"]
    if blocks.dropped:
        parts.append(f"{blocks.dropped} dropped")
    if blocks.too_short:
        parts.append(f"{blocks.too_short} too short for this percentile")
    if len(blocks.usable) > look:
        parts.append(f"{len(blocks.usable) - look} more measured after this look and not used")
    return ", ".join(parts)


def _needed(
    blocks: Blocks,
    effects: list[float],
    limit: float,
    looks: _Looks,
    evidence: LatencyEvidence,
    level: float,
    runs: int,
) -> Needed:
    look = len(effects)
    if blocks.usable[look - 1].dropped_before > _DROPPED_TO_COUNTED * look:
        return Needed(
            f"a device that is not throttled or disturbed: {blocks.dropped} blocks were dropped to {look} that count"
        )
    if look < looks.first:
        missing = looks.first - look
        seconds = None if evidence.block_s is None else missing * evidence.block_s
        return Needed(f"at least {missing} more A/B blocks for the first look", missing, seconds)
    distance = limit - statistics.fmean(effects)
    last = looks.level(looks.last)
    return blocks_needed(
        spread=statistics.stdev(effects),
        distance=distance,
        error_rate=last.wrong_pass if distance > 0 else last.wrong_fail,
        counted=look,
        most=looks.last,
        block_s=evidence.block_s,
        level=level,
        runs=runs,
    )
