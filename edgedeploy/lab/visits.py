"""The measuring schedule: which process is opened when, how bursts alternate, and what each visit recorded.

One block measures every side once. Two sides are interleaved as finely as asked: "bursts" keeps one fresh process of
each alive and alternates short bursts, so that the two halves of a pair are milliseconds apart and the device's drift
cancels; "visits" alternates whole processes. Order is ABBA or BAAB, by a seed.
"""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from edgedeploy.errors import DeviceError, TransferError
from edgedeploy.lab import answers, bundle
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.transport import Transport
from edgedeploy.records.run import Boundary, Burst, Conditions, LayerTime, MemoryVisit, Visit
from edgedeploy.records.target import ConditionLimits
from edgedeploy.units import format_bytes

# Kernels count CPU time in ticks of 10 ms; over a shorter time the share of others cannot be told.
LEAST_LOAD_SPAN_S = 0.2
# What a distribution-free bound on the 95th percentile needs.
LEAST_SAMPLES = 59
# The answers of a segmentation network to thousands of samples are a tenth of this.
MOST_OUTPUT_BYTES = 8 << 30
# Rounds of bursts that the device does by itself before the host looks at the clock.
_ROUNDS_AT_ONCE = 10


@dataclass(frozen=True, slots=True)
class Side:
    """One artifact to measure: what must be on the device, by digest.

    Attributes:
        cell: its name in errors and events.
        batch: samples of the inputs file that one inference takes.
        runtime: the provisioned runtime on the device that the session is opened with; "": what its Python has.
    """

    cell: str
    artifact_sha256: str
    session_sha256: str
    options: Mapping[str, Any]
    inputs_sha256: str
    batch: int = 1
    runtime: str = ""


@dataclass(frozen=True, slots=True)
class Schedule:
    """How a block is measured.

    Attributes:
        bursts_per_visit, samples_per_burst: their product is the samples of a visit; 59 bound the 95th percentile.
        bursts_cap_s: a slow model's block ends after this time, as soon as each visit has `least_samples`.
        lead_in: inferences at the start of each burst that are not counted: the other side has just used the caches.
        warm_up_window: samples per window; warm-up ends when two adjacent windows' medians agree ...
        warm_up_tolerance: ... within this fraction, ...
        warm_up_cap_s: ... or after this time, and the visit is recorded as not steady.
        memory_inferences: inferences of a memory visit; profile_inferences: of one that times single operators.
    """

    bursts_per_visit: int = 8
    samples_per_burst: int = 10
    bursts_cap_s: float = 20.0
    least_samples: int = LEAST_SAMPLES
    lead_in: int = 2
    warm_up_window: int = 10
    warm_up_tolerance: float = 0.02
    warm_up_cap_s: float = 5.0
    interleave: Literal["bursts", "visits"] = "bursts"
    memory_inferences: int = 10
    profile_inferences: int = 20
    open_timeout_s: float = 300.0
    burst_timeout_s: float = 300.0
    outputs_timeout_s: float = 3600.0
    close_timeout_s: float = 10.0


def schedule_text(schedule: Schedule, sides: int) -> str:
    """Return in words how a visit's samples are taken.

    >>> schedule_text(DUET, 2)
    '160 bursts of 1 after 1 uncounted, alternating with the other side by bursts'
    """
    text = f"{schedule.bursts_per_visit} bursts of {schedule.samples_per_burst} after {schedule.lead_in} uncounted"
    return f"{text}, alternating with the other side by {schedule.interleave}" if sides > 1 else text


# A single inference of one side, then of the other: where the machine itself steps between states every few dozen
# milliseconds, finer pairs see the same state. Measured on a shared 2-core virtual machine, 3 ms model, standard
# deviation of a block's effect: 8 pairs of 10 samples 2.6 %, 80 pairs of one 1.7 %, 160 pairs of one 0.6 %.
DUET = Schedule(bursts_per_visit=160, samples_per_burst=1, lead_in=1)


@dataclass(frozen=True, slots=True)
class Measured:
    """A visit and what the session said about itself."""

    side: Side
    visit: Visit
    runtime: str
    boundary: Boundary


@dataclass(frozen=True, slots=True)
class DeviceOutputs:
    """The artifact's answers to every sample, fetched from the device."""

    sha256: str
    samples: int
    is_repeatable: bool
    runtime: str
    boundary: Boundary


@dataclass(slots=True)
class _OpenVisit:
    """What is known of a visit while it is measured."""

    side: Side
    name: str
    position: int
    opened: answers.Opened
    before: Conditions
    boundary: Boundary
    cooled: answers.Cooled | None
    bursts: list[Burst] = field(default_factory=list)

    def measured(self, block: int, after: Conditions, foreign_load: float | None, dropped: str) -> Measured:
        """Return the finished record."""
        visit = Visit(
            block=block,
            position=self.position,
            load_s=self.opened.load_s,
            first_inference_s=self.opened.first_inference_ns / 1e9,
            warm_up_samples_s=_seconds(self.opened.warm_up_ns),
            is_steady=self.opened.is_steady,
            bursts=tuple(self.bursts),
            before=self.before,
            after=after,
            foreign_load=foreign_load,
            dropped=dropped,
            cooled_s=self.cooled.waited_s if self.cooled else None,
            is_cool=self.cooled.reached if self.cooled else None,
        )
        return Measured(self.side, visit, self.opened.runtime, self.boundary)


def measure_block(agent: Agent, sides: Sequence[Side], schedule: Schedule, *, block: int, seed: int) -> list[Measured]:
    """Measure every side once, in fresh processes.

    Args:
        agent: the runner on the device; everything that the sides name has been shipped.
        sides: one (a plain benchmark) or two (baseline and candidate).
        schedule: how.
        block: number of this block; it decides, with the seed, which side goes first.
        seed: the same for all blocks of a session, so that AB and BA blocks come in twos.

    Returns:
        One record per side, in the order of `sides`.

    Raises:
        VisitFailed: a visit died, hung or was refused; the device is well and the next block can be tried.
        DeviceError: the device or the connection was lost.
        Either error's `measured` holds what the block had measured until then, every visit of it marked as dropped.
    """
    order = list(range(len(sides)))
    if _is_reversed(seed, block):
        order.reverse()
    groups = [order] if schedule.interleave == "bursts" else [[number] for number in order]
    measured: dict[int, Measured] = {}
    for group in groups:
        run = _Group(agent, schedule, block, seed)
        try:
            run.measure([(number, sides[number]) for number in group], first_position=len(measured))
        except DeviceError as error:
            reason = str(error).split("\n")[0]
            run.abandon(reason)
            error.measured = tuple(_dropped(kept, reason) for kept in (*measured.values(), *run.finished.values()))
            raise
        measured |= run.finished
    return [measured[number] for number in range(len(sides))]


class _Group:
    """Visits that are alive at the same time."""

    def __init__(self, agent: Agent, schedule: Schedule, block: int, seed: int) -> None:
        self._agent, self._schedule, self._block, self._seed = agent, schedule, block, seed
        self._open: dict[int, _OpenVisit] = {}
        self.finished: dict[int, Measured] = {}

    def measure(self, sides: Sequence[tuple[int, Side]], first_position: int) -> None:
        """Wait until it is cool where that is asked for; open all, alternate bursts, read the conditions, close all."""
        schedule, cooled = self._schedule, self._agent.cool()
        # A process that does not exist yet has used no CPU time: this zero is a fact.
        before = msgspec.structs.replace(self._agent.conditions()[""], own_core_s=0.0)
        for position, (number, side) in enumerate(sides, start=first_position):
            name = f"{side.cell} block {self._block}.{position}"
            said = self._agent.ask("open", visit=name, job=_job(side, schedule), timeout_s=schedule.open_timeout_s)
            opened = answers.read(said, answers.Opened, self._agent.label, f"open in visit {name!r}")
            boundary = _boundary(self._agent, opened)
            self._open[number] = _OpenVisit(side, name, position, opened, before, boundary, cooled)
        self._alternate([number for number, _ in sides])
        after = self._agent.conditions([visit.name for visit in self._open.values()])
        foreign_load = load_of_others(before, [after[visit.name] for visit in self._open.values()])
        for number, visit in self._open.items():
            self.finished[number] = visit.measured(self._block, after[visit.name], foreign_load, "")
        for visit in self._open.values():
            self._agent.ask("close", visit=visit.name, timeout_s=schedule.close_timeout_s)

    def _alternate(self, numbers: Sequence[int]) -> None:
        """Take the visits' bursts in turns, on the device's own clock."""
        schedule = self._schedule
        started_s = time.monotonic()
        order = list(_burst_order(numbers, schedule.bursts_per_visit, self._seed, self._block))
        step = _ROUNDS_AT_ONCE * len(numbers)
        for first in range(0, len(order), step):
            has_enough = first // len(numbers) * schedule.samples_per_burst >= schedule.least_samples
            if has_enough and time.monotonic() - started_s > schedule.bursts_cap_s:
                return
            turn = order[first : first + step]
            answer = self._agent.ask(
                "bursts",
                visits=[self._open[number].name for _, number in turn],
                count=schedule.samples_per_burst,
                lead_in=schedule.lead_in,
                timeout_s=schedule.burst_timeout_s,
            )
            taken = answers.read(answer, answers.Bursts, self._agent.label, "bursts").samples_ns
            if [len(samples_ns) for samples_ns in taken] != [schedule.samples_per_burst] * len(turn):
                raise DeviceError(
                    f"{self._agent.label}: the runner was asked for {len(turn)} bursts of {schedule.samples_per_burst} "
                    "inferences and sent another number"
                )
            for (pair, number), samples_ns in zip(turn, taken, strict=True):
                self._open[number].bursts.append(Burst(pair=pair, samples_s=_seconds(samples_ns)))

    def abandon(self, reason: str) -> None:
        """Keep what was measured, and end the visits that still live."""
        for number, visit in self._open.items():
            if number not in self.finished:
                self.finished[number] = visit.measured(self._block, visit.before, None, reason)
            try:
                self._agent.ask("close", visit=visit.name, timeout_s=self._schedule.close_timeout_s)
            except DeviceError:  # it was this one that failed, or the whole device: the reason is already told
                continue


def measure_memory(agent: Agent, side: Side, schedule: Schedule | None = None) -> MemoryVisit:
    """Measure peak memory in a fresh process that does nothing else.

    Raises:
        VisitFailed: it died, hung or was refused.
    """
    schedule = schedule or Schedule()
    answer = agent.ask(
        "memory",
        visit=f"{side.cell} memory",
        job=_job(side, schedule),
        count=schedule.memory_inferences,
        timeout_s=schedule.open_timeout_s,
    )
    said = answers.read(answer, answers.Memory, agent.label, "memory")
    return MemoryVisit(peak_rss_bytes=said.peak_rss_bytes, import_rss_bytes=said.import_rss_bytes)


def profile(agent: Agent, side: Side, schedule: Schedule | None = None) -> tuple[LayerTime, ...]:
    """Return what each operator takes, in the order of execution, from a process that measures nothing else.

    Raises:
        VisitFailed: it died, hung or was refused; its kind is "not-available" where the runtime does not say.
    """
    schedule = schedule or Schedule()
    answer = agent.ask(
        "profile",
        visit=f"{side.cell} profile",
        job=_job(side, schedule),
        count=schedule.profile_inferences,
        timeout_s=schedule.open_timeout_s,
    )
    return answers.read(answer.get("layers"), tuple[LayerTime, ...], agent.label, "profile")


def compute_outputs(
    agent: Agent, transport: Transport, side: Side, local_path: Path, schedule: Schedule | None = None
) -> DeviceOutputs:
    """Run every sample of the side's inputs on the device and fetch the answers, verified, to `local_path`.

    The file is in the safetensors format: one tensor per output, first axis = sample.

    Raises:
        VisitFailed: it died, hung or was refused.
        TransferError: the file did not arrive whole; nothing is left at `local_path`.
    """
    schedule = schedule or Schedule()
    answer = agent.ask(
        "outputs", visit=f"{side.cell} outputs", job=_job(side, schedule), timeout_s=schedule.outputs_timeout_s
    )
    said = answers.read(answer, answers.Written, agent.label, "outputs")
    if said.size_bytes > MOST_OUTPUT_BYTES:
        raise TransferError(
            f"{agent.label}: the outputs of {side.cell} have {format_bytes(said.size_bytes)}, and no more than "
            f"{format_bytes(MOST_OUTPUT_BYTES)} are fetched; evaluate on fewer samples"
        )
    bundle.fetch(agent, transport, "outputs", said.sha256, said.size_bytes, local_path)
    transport.remove(f"{agent.root}/outputs/{said.sha256}")
    return DeviceOutputs(said.sha256, said.samples, said.is_repeatable, said.runtime, _boundary(agent, said))


def load_of_others(before: Conditions, after: Sequence[Conditions]) -> float | None:
    """Return how many cores other processes used meanwhile; None where the device does not say, or in too short a time.

    Args:
        before: read before the visits' processes were started.
        after: read once at the end, one record per visit with its own CPU time.
    """
    own_s = [conditions.own_core_s for conditions in after]
    busy_after_s, elapsed_s = after[0].busy_core_s, after[0].monotonic_s - before.monotonic_s
    if before.busy_core_s is None or busy_after_s is None or elapsed_s < LEAST_LOAD_SPAN_S:
        return None
    known_s = [value for value in own_s if value is not None]
    if len(known_s) < len(own_s):
        return None
    # The kernel's two counters tick apart, so that the difference of nearly equal times can fall below zero.
    return max(0.0, busy_after_s - before.busy_core_s - sum(known_s)) / elapsed_s


def mark(visit: Visit, limits: ConditionLimits) -> Visit:
    """Return the visit, dropped with a reason when the conditions say that its number does not count."""
    reasons = []
    names = sorted({*(visit.before.throttle_reasons or ()), *(visit.after.throttle_reasons or ()), *_guards(visit)})
    if visit.before.throttled or visit.after.throttled or names:
        reasons.append(f"the device was throttled ({', '.join(names)})" if names else "the device was throttled")
    if visit.foreign_load is not None and visit.foreign_load > limits.max_foreign_load:
        # Without the figure, which is in the record: so that equal reasons can be counted.
        plural = "" if limits.max_foreign_load == 1 else "s"
        reasons.append(f"other processes used more than {limits.max_foreign_load:g} core{plural}")
    zones = {**(visit.before.temperatures_celsius or {})}
    for zone, celsius in (visit.after.temperatures_celsius or {}).items():
        zones[zone] = max(celsius, zones.get(zone, celsius))
    if zones:
        hottest = max(zones, key=lambda zone: zones[zone])
        if zones[hottest] > limits.max_temperature_celsius:
            reasons.append(f"{hottest} was hotter than {limits.max_temperature_celsius:g} °C")
    if visit.dropped:
        reasons.insert(0, visit.dropped)
    return msgspec.structs.replace(visit, dropped="; ".join(reasons))


def _guards(visit: Visit) -> list[str]:
    """Return the guards of the power supply that slowed the device down during a visit."""
    before = visit.before.throttle_events or {}
    return [name for name, count in (visit.after.throttle_events or {}).items() if count > before.get(name, count)]


def _dropped(measured: Measured, reason: str) -> Measured:
    return dataclasses.replace(measured, visit=msgspec.structs.replace(measured.visit, dropped=reason))


def _job(side: Side, schedule: Schedule) -> dict[str, object]:
    """Return what the runner needs to know to load a side."""
    return {
        "session": side.session_sha256,
        "artifact": side.artifact_sha256,
        "inputs": side.inputs_sha256,
        "options": dict(side.options),
        "batch": side.batch,
        **({"runtime": side.runtime} if side.runtime else {}),
        "warm_up": {
            "window": schedule.warm_up_window,
            "tolerance": schedule.warm_up_tolerance,
            "cap_s": schedule.warm_up_cap_s,
        },
    }


def _is_reversed(seed: int, *position: int) -> bool:
    """Say whether the place in the schedule is a BA: places come in twos, AB then BA or BA then AB, at random."""
    *outer, number = position
    is_first_reversed = random.Random(f"{seed}/{outer}/{number // 2}").random() < 0.5  # noqa: S311 - order, no secret
    return is_first_reversed != bool(number % 2)


def _burst_order(numbers: Sequence[int], bursts: int, seed: int, block: int) -> Iterator[tuple[int, int]]:
    """Yield (pair, side number) of every burst of a block in the order of measuring."""
    for pair in range(bursts):
        order = sorted(numbers, reverse=_is_reversed(seed, block, pair))
        for number in order:
            yield pair, number


def _seconds(nanoseconds: Sequence[int]) -> tuple[float, ...]:
    return tuple(value / 1e9 for value in nanoseconds)


def _boundary(agent: Agent, said: answers.Opened | answers.Written) -> Boundary:
    return answers.read(said.boundary, Boundary, agent.label, "what its timed region includes")
