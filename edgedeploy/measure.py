"""Steps 5 to 8 of the spine: artifacts are shipped to one device, visited interleaved, and become runs.

A session is a pure fold over its steps (`Session`): each step is told to `keep` as soon as it is done, and a session
that is given the steps of a dead one goes on where that stopped, on the same device.
"""

from __future__ import annotations

import contextlib
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import edgedeploy
from edgedeploy import golden
from edgedeploy.backends import device_runtimes, session_file, session_options
from edgedeploy.build import Built, Progress
from edgedeploy.errors import (
    DeviceBusy,
    DeviceError,
    DeviceLost,
    DeviceUnreachable,
    LeaseLost,
    TransferError,
    UsageError,
    VisitFailed,
)
from edgedeploy.judge.scores import class_labels, predictions, score
from edgedeploy.lab import bundle, provision, visits
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.inventory import open_transport
from edgedeploy.lab.transport import Transport
from edgedeploy.lab.visits import DUET, Measured, Schedule, Side
from edgedeploy.prepare.dataset import Samples, inference_batch, load_samples, random_samples
from edgedeploy.records.artifact import Artifact
from edgedeploy.records.device import Device
from edgedeploy.records.model import Fidelity
from edgedeploy.records.run import ArtifactReference, Boundary, LayerTime, MemoryVisit, Outputs, Run, Visit
from edgedeploy.records.session import (
    Begun,
    BlockEnded,
    Continued,
    GoldenAnswered,
    MemoryMeasured,
    OperatorsTimed,
    OutputsComputed,
    SentinelVisited,
    Shipped,
    SideBegun,
    Step,
    Taken,
)
from edgedeploy.records.target import ConditionLimits
from edgedeploy.results import utc_now
from edgedeploy.storage import cache_dir, sha256_file, write_atomic

# Memory hardly varies between visits; three show whether it does.
MEMORY_VISITS = 3
# Blocks that may fail (a child that dies, a pair dropped by a signal) before the session is given up.
_FAILED_BLOCKS_ALLOWED = 2
# What may be a single accident; anything else (a missing runtime, a broken artifact) would fail again.
_PASSING_FAILURES = ("died", "timeout")
# What the runner, or who ships to it, says when the device itself cannot go on, whatever is measured.
_FAULTS_OF_DEVICES = frozenset({"disk-full", "device-io", "not-shipped"})
# A link may be lost once in a session; the second time the device is given up.
_LOSSES_ALLOWED = 1
# A board boots in a minute, and a lease that its dead holder does not renew expires in one.
RECONNECT_S = 180.0
_BETWEEN_ATTEMPTS_S = (0.5, 1.0, 2.0, 4.0, 8.0)
# Enough for the median of a network that takes about a millisecond on a server; a visit is mostly its process's start.
SENTINEL = Schedule(bursts_per_visit=8, samples_per_burst=10, bursts_cap_s=0.3, lead_in=0, warm_up_cap_s=0.3)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """The evaluation set, how it is scored, and which output is judged ("" for the only one)."""

    path: Path
    metric: str = "top1"
    output: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeasureRequest:
    """One session on one device.

    Attributes:
        sides: (cell, artifact): one alone, or baseline and candidate.
        blocks: the most A/B blocks (or visits of a single artifact).
        schedule: None: the usual one, a plain loop for one artifact and a duet for two.
        is_profiled: time single operators too, in a pass of their own.
        wait_s: how long to queue for a device that somebody else holds.
        reconnect_s: how long a device that was lost in the middle is waited for.
        least_samples: of a visit: what the percentiles need that are judged.
        sentinels: back end → the sentinel as it compiled it; the sides' own are visited at both ends of the session.
    """

    sides: tuple[tuple[str, Built], ...]
    device_name: str
    device: Device
    limits: ConditionLimits
    evaluation: Evaluation | None
    blocks: int
    schedule: Schedule | None = None
    is_profiled: bool = False
    seed: int = 0
    wait_s: float = 0.0
    reconnect_s: float = RECONNECT_S
    sentinels: Mapping[str, Built] = field(default_factory=dict)
    least_samples: int = visits.LEAST_SAMPLES


class MeasurementInterrupted(DeviceError):
    """The device or the way to it failed in the middle; `runs` is what was measured until then."""

    def __init__(self, message: str, runs: tuple[Run, ...]) -> None:
        super().__init__(message)
        self.runs = runs


class Stopped(Exception):
    """The session was told to end, and has."""


class Stop:
    """Ends the sessions of this process from another thread, such as the one that Ctrl-C interrupts."""

    def __init__(self) -> None:
        self._event, self._lock = threading.Event(), threading.Lock()
        self._agents: list[Agent] = []

    @property
    def is_requested(self) -> bool:
        """Whether sessions should end."""
        return self._event.is_set()

    def request(self) -> None:
        """Ask every session to end now; their devices are given back."""
        self._event.set()
        with self._lock:
            agents = list(self._agents)
        # All at once: each may take seconds to say farewell to a device that is gone.
        for agent in agents:
            threading.Thread(target=agent.close, daemon=True).start()

    def wait(self, seconds: float) -> None:
        """Let time pass, but not after `request`."""
        self._event.wait(seconds)

    @contextmanager
    def over(self, agent: Agent) -> Iterator[None]:
        """Have `request` close an agent while the block lasts."""
        with self._lock:
            self._agents.append(agent)
        try:
            if self.is_requested:
                raise Stopped
            yield
        finally:
            with self._lock:
                self._agents.remove(agent)


Keep = Callable[[Step], None]


def _forget(step: Step) -> None:
    """Keep no record."""


def measure(
    request: MeasureRequest,
    is_decided: Callable[[tuple[Run, ...]], bool],
    progress: Progress,
    *,
    keep: Keep = _forget,
    done: Sequence[Step] = (),
    session: str = "",
    stop: Stop | None = None,
) -> tuple[Run, ...]:
    """Measure one artifact, or two interleaved, and return a run for each.

    A link that is lost in the middle is taken up again, once, and measuring goes on at the next block.

    Args:
        request: what to measure, and where.
        is_decided: asked after the outputs and after every block; True ends the session.
        progress: told what happens.
        keep: told each step before the next one begins.
        done: the steps of this session that another process has done.
        session: its name; empty: a new one.
        stop: ends it from another thread.

    Raises:
        MeasurementInterrupted: the device failed after something had been measured.
        DeviceError: it failed before that.
        UsageError: what is on this machine is not what `done` was measured with.
        Stopped: `stop` was requested.
    """
    stop = stop or Stop()
    known = Session(request, session or secrets.token_hex(8))
    for step in done:
        known.apply(step)
    worker = _Worker(known, is_decided, progress, keep, stop)
    try:
        worker.measure()
    except DeviceError as error:
        if stop.is_requested:
            raise Stopped from error
        runs = known.runs() if known.begun is not None else ()
        if any(run.visits or run.outputs for run in runs):
            raise MeasurementInterrupted(str(error), runs) from error
        raise
    return known.runs()


class Held:
    """A device that is held for what is no run of a gate, with everything on it that the sides of a request need.

    Attributes:
        sides: as the request has them.
        schedule: how a gate would measure these sides.
    """

    def __init__(self, worker: _Worker, agent: Agent, transport: Transport) -> None:
        self.agent, self.sides, self.schedule = agent, worker.sides, worker.schedule
        self._worker, self._transport = worker, transport

    def outputs(self, number: int) -> Outputs:
        """Compute a side's answers to the evaluation set; they are kept in the cache."""
        return self._worker.outputs(number, self.agent, self._transport).outputs


@contextmanager
def held(request: MeasureRequest, progress: Progress) -> Iterator[Held]:
    """Reach a device, hold it, ship what is missing there, and compare the sides' answers with their golden ones.

    Args:
        request: sides, device, evaluation set and seed.
        progress: told what happens.

    Raises:
        DeviceError: it cannot be reached, is held by somebody else, or failed.
        FidelityError: an artifact does not answer there what its model answers.
    """
    worker = _Worker(Session(request, secrets.token_hex(8)), lambda runs: False, progress, _forget, Stop())
    with worker.held() as (agent, transport):
        yield Held(worker, agent, transport)


# ---------------------------------------------------------------- the session as a fold over its steps


@dataclass(slots=True)
class _SideState:
    """What one side has said so far."""

    role: Literal["single", "baseline", "candidate"]
    cell: str
    built: Built
    runtime: str = ""
    boundary: Boundary | None = None
    golden: Fidelity | None = None
    layer_times: tuple[LayerTime, ...] = ()
    is_profiled: bool = False
    visits: list[Visit] = field(default_factory=list)
    memory: list[MemoryVisit] = field(default_factory=list)
    outputs: Outputs | None = None
    events: list[str] = field(default_factory=list)


@dataclass(slots=True)
class _SentinelState:
    """What the sentinel of one back end has said so far; `has_begun` and `has_ended` also where its visit failed."""

    built: Built
    visits: list[Visit] = field(default_factory=list)
    has_begun: bool = False
    has_ended: bool = False


@dataclass(frozen=True, slots=True)
class Todo:
    """What comes next in a session.

    Attributes:
        number: of the side, of the sentinel, or of the block.
        is_look: whether the session may be decided before it.
    """

    what: Literal["golden", "outputs", "memory", "operators", "sentinel", "block"]
    number: int
    is_look: bool = False


class Session:
    """What a session knows. Pure: no device, no clock; it is its request and the steps that were applied."""

    def __init__(self, request: MeasureRequest, name: str) -> None:
        self.request, self.name = request, name
        usual = request.schedule or _usual_schedule([built for _, built in request.sides])
        self.schedule = _with_samples(usual, request.least_samples)
        roles: tuple[Literal["single", "baseline", "candidate"], ...] = (
            ("single",) if len(request.sides) == 1 else ("baseline", "candidate")
        )
        self.states = [_SideState(role, cell, built) for role, (cell, built) in zip(roles, request.sides, strict=True)]
        wanted = dict.fromkeys(built.artifact.recipe.backend for _, built in request.sides)
        compiled = request.sentinels if request.device.sentinel else {}
        self.sentinels = {name: _SentinelState(compiled[name]) for name in wanted if name in compiled}
        self.begun: Begun | None = None
        self.boot_id = ""
        self.blocks, self.failures = 0, 0
        self.fatal = ""

    def apply(self, step: Step) -> None:
        """Take note of a step."""
        match step:
            case Begun():
                self.begun, self.boot_id = step, step.facts.boot_id
            case Continued():
                self.boot_id = step.boot_id
                self._tell(step.event)
            case GoldenAnswered():
                self.states[step.side].golden = step.fidelity
            case OutputsComputed():
                state = self.states[step.side]
                state.outputs, state.runtime, state.boundary = step.outputs, step.runtime, step.boundary
            case MemoryMeasured():
                self.states[step.side].memory.append(step.visit)
            case OperatorsTimed():
                state = self.states[step.side]
                state.layer_times, state.is_profiled = step.layers, True
                state.events += [step.event] if step.event else []
            case SentinelVisited():
                self._note_sentinel(step)
            case BlockEnded():
                self._end_block(step)

    def _note_sentinel(self, step: SentinelVisited) -> None:
        if step.event:
            self._tell(step.event)
        known = list(self.sentinels.values())
        if step.number < len(known):  # the lab file may have been told meanwhile to do without
            state = known[step.number]
            state.has_begun, state.has_ended = True, state.has_ended or step.is_end
            state.visits += [step.visit] if step.visit is not None else []

    def _end_block(self, step: BlockEnded) -> None:
        for taken in step.taken:
            state = self.states[taken.side]
            state.visits.append(taken.visit)
            state.runtime, state.boundary = taken.runtime, taken.boundary
        self.blocks = step.block + 1
        if step.failure:
            self._tell(f"block {step.block} was dropped: {step.failure}")
            self.failures += not step.is_lost
        if step.is_fatal:
            self.fatal = step.failure

    def _tell(self, event: str) -> None:
        for state in self.states:
            state.events.append(event)

    def next(self) -> Todo | None:
        """Return what is to be done next; None when everything is."""
        request = self.request
        for number, state in enumerate(self.states):
            if state.built.artifact.golden is not None and state.golden is None:
                return Todo("golden", number)
        if request.evaluation is not None:
            for number, state in enumerate(self.states):
                if state.outputs is None:
                    return Todo("outputs", number)
        is_first = request.evaluation is not None
        for number, state in enumerate(self.states):
            if len(state.memory) < MEMORY_VISITS:
                return Todo("memory", number, is_look=is_first and number == 0 and not state.memory)
        if request.is_profiled:
            for number, state in enumerate(self.states):
                if not state.is_profiled:
                    return Todo("operators", number)
        if self.blocks == 0:
            for number, sentinel in enumerate(self.sentinels.values()):
                if not sentinel.has_begun:
                    return Todo("sentinel", number)
        if self.blocks < request.blocks:
            return Todo("block", self.blocks, is_look=self.blocks > 0)
        return self.last()

    def last(self) -> Todo | None:
        """Return what is left when no more blocks are wanted: the other end of what the sentinel began."""
        for number, sentinel in enumerate(self.sentinels.values()):
            if self.blocks > 0 and sentinel.has_begun and not sentinel.has_ended:
                return Todo("sentinel", number)
        return None

    def todo(self, is_decided: Callable[[tuple[Run, ...]], bool]) -> Todo | None:
        """Return what is to be done next, where the session may be decided before it; None when nothing is."""
        todo = self.next()
        return self.last() if todo is not None and todo.is_look and is_decided(self.runs()) else todo

    def is_over(self, is_decided: Callable[[tuple[Run, ...]], bool]) -> bool:
        """Say whether nothing is left to be measured."""
        return self.begun is not None and self.todo(is_decided) is None

    def block_ended(self, taken: Sequence[Taken], error: DeviceError | None) -> BlockEnded:
        """Return the step that ends the current block."""
        if error is None:
            return BlockEnded(block=self.blocks, taken=tuple(taken))
        was_lost = is_lost(error)
        may_pass = isinstance(error, VisitFailed) and error.kind in _PASSING_FAILURES
        return BlockEnded(
            block=self.blocks,
            taken=tuple(taken),
            failure=str(error),
            is_lost=was_lost,
            is_fatal=not was_lost and (not may_pass or self.failures >= _FAILED_BLOCKS_ALLOWED),
        )

    def runs(self) -> tuple[Run, ...]:
        """Return a run per side with everything that was measured until now."""
        begun = self.begun
        assert begun is not None, "runs are asked for after the device was reached"
        return tuple(
            Run(
                session=begun.session,
                cell=state.cell,
                side=state.role,
                artifact=artifact_reference(state.built.artifact),
                device=begun.device,
                facts=begun.facts,
                runtime=state.runtime,
                boundary=state.boundary,
                golden=state.golden,
                layer_times=state.layer_times,
                schedule=begun.schedule,
                started_utc=begun.started_utc,
                visits=tuple(state.visits),
                memory=tuple(state.memory),
                outputs=state.outputs,
                events=tuple(state.events),
                settings_applied=begun.settings_applied,
                settings_refused=begun.settings_refused,
                sentinel=tuple(sentinel.visits) if sentinel else (),
                sentinel_sha256=sentinel.built.artifact.sha256 if sentinel and sentinel.visits else "",
                edgedeploy=edgedeploy.__version__,
                runner_sha256=begun.runner_sha256,
            )
            for state in self.states
            for sentinel in (self.sentinels.get(state.built.artifact.recipe.backend),)
        )


def is_lost(error: BaseException | None) -> bool:
    """Say whether it is the device or the way to it that is at fault, and nothing is wrong with what was measured."""
    is_faulty = isinstance(error, DeviceError) and error.kind in _FAULTS_OF_DEVICES
    return is_faulty or isinstance(error, DeviceUnreachable | LeaseLost)


# ---------------------------------------------------------------- the session on its device


class _Worker:
    """Takes a session through its steps on a device, as often as that must be reached for it."""

    def __init__(
        self,
        session: Session,
        is_decided: Callable[[tuple[Run, ...]], bool],
        progress: Progress,
        keep: Keep,
        stop: Stop,
    ) -> None:
        self._session, self._is_decided, self._progress = session, is_decided, progress
        self._keep, self._stop = keep, stop
        self._request, self._name = session.request, session.request.device_name
        self._samples: list[Samples] = []
        self._sides: list[Side] = []
        self._files: dict[str, Path] = {}
        self._sentinels: list[Side] = []

    def measure(self) -> None:
        """Do everything that is left, over as many connections as it takes."""
        session = self._session
        losses, why = 0, "by another process" if session.begun is not None else ""
        if why:
            self._forgo_sentinel("the session had been measured by another process")
        while not session.is_over(self._is_decided):
            if session.fatal:
                raise DeviceError(session.fatal)
            try:
                with self._reached(is_patient=session.begun is not None) as (agent, transport), self._advising():
                    self._greet(agent, why)
                    self._ship(agent, transport)
                    self._work(agent, transport)
            except DeviceError as error:
                if not self._stop.is_requested and self._forgo_sentinel(_first_line(error)):
                    continue
                # A file that did not arrive may have met a link that broke, which shows when we connect again.
                may_be_lost = is_lost(error) or isinstance(error, TransferError)
                if self._stop.is_requested or session.begun is None or not may_be_lost:
                    raise
                losses += 1
                is_named = isinstance(error, TransferError) or error.kind in _FAULTS_OF_DEVICES
                if isinstance(error, DeviceLost) or (losses > _LOSSES_ALLOWED and is_named):
                    raise
                if losses > _LOSSES_ALLOWED:
                    raise DeviceLost(f"{error}; it was lost for the second time in this session") from error
                why = "after the device had been lost"
                is_over = session.is_over(self._is_decided)
                then = "that was the last block" if is_over else "reaching it again"
                self._progress(f"{self._name}: lost ({_first_line(error)}); {then}")

    @contextmanager
    def _reached(self, *, is_patient: bool) -> Iterator[tuple[Agent, Transport]]:
        """Connect and take the lease; a device that was lost is tried until it is back, or given up."""
        deadline_s = time.monotonic() + (self._request.reconnect_s if is_patient else 0.0)
        attempt = 0
        with contextlib.ExitStack() as open_ways:
            while True:
                ways = contextlib.ExitStack()
                try:
                    way = open_transport(
                        self._name, self._request.device, wait_s=self._request.wait_s, progress=self._progress
                    )
                    transport = ways.enter_context(way)
                    self._progress(f"{self._name}: connecting")
                    agent = ways.enter_context(
                        bundle.connect(
                            transport,
                            self._request.device,
                            device_name=self._name,
                            wait_s=self._request.wait_s,
                            progress=self._progress,
                        )
                    )
                except (DeviceUnreachable, DeviceBusy) as error:
                    ways.close()
                    if self._stop.is_requested:
                        raise Stopped from error
                    if time.monotonic() >= deadline_s:
                        if is_patient and not isinstance(error, DeviceBusy):
                            waited = f"it did not come back within {self._request.reconnect_s:g} s"
                            raise DeviceLost(f"{error}; {waited}") from error
                        raise
                    pause_s = _BETWEEN_ATTEMPTS_S[min(attempt, len(_BETWEEN_ATTEMPTS_S) - 1)]
                    attempt += 1
                    self._stop.wait(min(pause_s, max(0.0, deadline_s - time.monotonic())))
                except BaseException:
                    ways.close()
                    raise
                else:
                    open_ways.push(ways)
                    open_ways.enter_context(self._stop.over(agent))
                    break
            yield agent, transport

    def _forgo_sentinel(self, reason: str) -> bool:
        """Do without the sentinel's last visit where nothing else is left, for no device is worth reaching for it."""
        session, was_left = self._session, False
        while session.sentinels and session.begun is not None and session.blocks > 0 and not session.fatal:
            todo = session.todo(self._is_decided)
            if todo is None or todo.what != "sentinel":
                break
            event = f"the sentinel was not visited after the last block: {reason}"
            self._did(SentinelVisited(number=todo.number, is_end=True, visit=None, event=event))
            was_left = True
        return was_left

    @property
    def sides(self) -> Sequence[Side]:
        """What is on the device; known once it was reached."""
        return self._sides

    @property
    def schedule(self) -> Schedule:
        """How the sides are measured."""
        return self._session.schedule

    @contextmanager
    def held(self) -> Iterator[tuple[Agent, Transport]]:
        """Hold the device, have everything there, and see that both sides answer what their models answer."""
        with self._reached(is_patient=False) as (agent, transport), self._advising():
            self._greet(agent, "")
            self._ship(agent, transport)
            for number, state in enumerate(self._session.states):
                if state.built.artifact.golden is not None:
                    self._did(self._about_side(Todo("golden", number), agent, transport))
            yield agent, transport

    def outputs(self, number: int, agent: Agent, transport: Transport) -> OutputsComputed:
        """Compute a side's answers to the evaluation set."""
        self._progress(f"{self._sides[number].cell}: computing the evaluation set's outputs")
        return self._outputs(number, agent, transport)

    def _did(self, step: Step) -> None:
        """Write a step down, then believe it."""
        self._keep(step)
        self._session.apply(step)

    def _greet(self, agent: Agent, why: str) -> None:
        """Begin the session, or take note that it goes on."""
        session = self._session
        if not self._sides:
            self._prepare()
            self._prepare_sentinels()
        self._choose_runtimes(agent)
        self._sentinels = [replace(one, runtime=self._runtime_of(one)) for one in self._sentinels]
        sides = tuple(
            SideBegun(
                cell=side.cell,
                artifact_sha256=side.artifact_sha256,
                session_sha256=side.session_sha256,
                inputs_sha256=side.inputs_sha256,
                runtime=side.runtime,
            )
            for side in self._sides
        )
        if session.begun is None:
            self._did(
                Begun(
                    session=session.name,
                    started_utc=utc_now(),
                    device=self._name,
                    facts=agent.facts,
                    runner_sha256=agent.runner_sha256,
                    schedule=visits.schedule_text(session.schedule, len(sides)),
                    seed=self._request.seed,
                    sides=sides,
                    settings_applied=agent.settings_applied,
                    settings_refused=agent.settings_refused,
                )
            )
            return
        if (session.begun.sides, session.begun.runner_sha256) != (sides, agent.runner_sha256):
            raise UsageError(
                f"the session {session.name} was begun with other files (artifacts, inputs, device halves, runtimes or "
                "runner); "
                f"numbers of the two must not be mixed: start the run afresh"
            )
        boot = "on the same boot"
        if agent.facts.boot_id != session.boot_id:
            boot = f"after a reboot (boot {session.boot_id or 'unknown'}, now {agent.facts.boot_id or 'unknown'})"
        utc = utc_now()
        event = f"measuring went on at {utc} with block {session.blocks}, {why}, {boot}"
        self._did(Continued(utc=utc, boot_id=agent.facts.boot_id, event=event))

    def _prepare(self) -> None:
        """Load the samples, and name everything that must be on the device."""
        for state in self._session.states:
            artifact = state.built.artifact
            session = session_file(artifact.recipe.backend)
            samples = self._samples_of(artifact)
            inputs = _inputs_file(samples)
            side = Side(
                cell=state.cell,
                artifact_sha256=artifact.sha256,
                session_sha256=sha256_file(session),
                options=session_options(artifact),
                inputs_sha256=sha256_file(inputs),
                batch=inference_batch(artifact.inputs),
            )
            self._samples.append(samples)
            self._sides.append(side)
            self._files |= {
                side.session_sha256: session,
                side.artifact_sha256: state.built.file,
                side.inputs_sha256: inputs,
            }
            if artifact.golden is not None:
                self._files[artifact.golden.inputs_sha256] = state.built.folder / golden.INPUTS

    def _prepare_sentinels(self) -> None:
        """Name what the sentinels need on the device; they are fed the same samples in every session."""
        for name, state in self._session.sentinels.items():
            artifact, session = state.built.artifact, session_file(name)
            inputs = _inputs_file(random_samples(artifact.inputs, inference_batch(artifact.inputs), seed=0))
            side = Side(
                cell=f"sentinel of {name}",
                artifact_sha256=artifact.sha256,
                session_sha256=sha256_file(session),
                options=session_options(artifact),
                inputs_sha256=sha256_file(inputs),
                batch=inference_batch(artifact.inputs),
            )
            self._sentinels.append(side)
            self._files |= {
                side.session_sha256: session,
                side.artifact_sha256: state.built.file,
                side.inputs_sha256: inputs,
            }

    def _runtime_of(self, sentinel: Side) -> str:
        """Return the provisioned runtime that the sides of a sentinel's back end are opened with."""
        return next(side.runtime for side in self._sides if side.session_sha256 == sentinel.session_sha256)

    def _choose_runtimes(self, agent: Agent) -> None:
        """Open each side with the runtime that was provisioned for it, where one is installed.

        Raises:
            VisitFailed: the device's entry names a version that is not installed there.
        """
        choices = [device_runtimes(built.artifact.recipe.backend) for _, built in self._request.sides]
        if not any(choices):
            return
        found = provision.installed(agent)
        for number, (_, built) in enumerate(self._request.sides):
            runtime = built.artifact.recipe.backend
            pinned = self._request.device.runtimes.get(runtime, "")
            chosen = provision.choose(found, choices[number], agent.facts, version=pinned)
            if pinned and chosen is None:
                raise VisitFailed(
                    f"{agent.label}: its entry in lab.toml names {runtime} {pinned}, which is not installed there",
                    kind="missing-runtime",
                )
            name = chosen.name if chosen else ""
            self._sides[number] = replace(self._sides[number], runtime=name)

    @contextmanager
    def _advising(self) -> Iterator[None]:
        """Name the command that installs a runtime, where one is missing on a device that can be provisioned."""
        try:
            yield
        except VisitFailed as error:
            device = self._request.device
            wanted = dict.fromkeys(built.artifact.recipe.backend for _, built in self._request.sides)
            runtimes = [
                f"{name}=={device.runtimes[name]}" if name in device.runtimes else name
                for name in wanted
                if device_runtimes(name)
            ]
            if error.kind != "missing-runtime" or device.transport == "local" or not runtimes:
                raise
            command = f"edgedeploy devices provision {self._name} --runtime {' --runtime '.join(runtimes)}"
            advised = VisitFailed(f"{error}\nTo install it there, also without internet: {command}", kind=error.kind)
            advised.measured = error.measured
            raise advised from error

    def _ship(self, agent: Agent, transport: Transport) -> None:
        """Push what is missing on the device: device halves, artifacts, and the samples that they are fed."""
        self._progress(f"{self._name}: sending what is missing there")
        self._did(Shipped(sent=tuple(bundle.ship(agent, transport, self._files))))

    def _work(self, agent: Agent, transport: Transport) -> None:
        """Do one step after another.

        Raises:
            FidelityError: an artifact does not answer here what its model answers; nothing of it is worth measuring.
        """
        session = self._session
        while (todo := session.todo(self._is_decided)) is not None:
            if self._stop.is_requested:
                raise Stopped
            if todo.what == "block":
                self._block(agent, todo.number)
            elif todo.what == "sentinel":
                self._did(self._sentinel(agent, todo.number))
            else:
                self._did(self._about_side(todo, agent, transport))

    def _about_side(self, todo: Todo, agent: Agent, transport: Transport) -> Step:
        """Do what concerns one side alone."""
        number, session = todo.number, self._session
        state, side = session.states[number], self._sides[number]
        if todo.what == "golden":
            promised = state.built.artifact.golden
            assert promised is not None, "only what has golden answers is to be compared with them"
            self._progress(f"{side.cell}: comparing its answers with the model's")
            where = f"{state.built.artifact.name} on {self._name}"
            found = golden.replay(agent, transport, side, promised, state.built.folder, where=where)
            return GoldenAnswered(side=number, fidelity=found)
        if todo.what == "outputs":
            self._progress(f"{side.cell}: computing the evaluation set's outputs")
            return self._outputs(number, agent, transport)
        if todo.what == "memory":
            if not state.memory:
                self._progress(f"{side.cell}: measuring peak memory")
            return MemoryMeasured(side=number, visit=visits.measure_memory(agent, side, session.schedule))
        self._progress(f"{side.cell}: timing its operators one by one")
        try:
            return OperatorsTimed(side=number, layers=visits.profile(agent, side, session.schedule))
        except VisitFailed as error:
            if error.kind != "not-available":
                raise
            return OperatorsTimed(side=number, layers=(), event=str(error))

    def _sentinel(self, agent: Agent, number: int) -> SentinelVisited:
        """Visit a sentinel; one that fails says nothing of the board, and stops nothing."""
        session, is_end = self._session, self._session.blocks > 0
        block = session.blocks if is_end else -1
        try:
            (measured,) = visits.measure_block(agent, [self._sentinels[number]], SENTINEL, block=block, seed=0)
        except VisitFailed as error:
            event = f"the visit of the {self._sentinels[number].cell} failed: {_first_line(error)}"
            return SentinelVisited(number=number, is_end=is_end, visit=None, event=event)
        return SentinelVisited(number=number, is_end=is_end, visit=visits.mark(measured.visit, self._request.limits))

    def _block(self, agent: Agent, number: int) -> None:
        """Measure one block; what it had measured when it failed is kept, marked as dropped."""
        request, session = self._request, self._session
        self._progress(f"{self._name}: block {number + 1} of at most {request.blocks}")
        try:
            measured = visits.measure_block(agent, self._sides, session.schedule, block=number, seed=request.seed)
        except DeviceError as error:
            if self._stop.is_requested:
                raise
            kept = [one for one in error.measured if isinstance(one, Measured)]
            step = session.block_ended(self._taken(kept), error)
            self._did(step)
            if step.is_lost or step.is_fatal:
                raise
        else:
            self._did(session.block_ended(self._taken(measured), None))
        for reason in sorted({visit.dropped for state in session.states for visit in state.visits[-1:]} - {""}):
            self._progress(f"{self._name}: this block does not count: {reason}")

    def _taken(self, measured: Sequence[Measured]) -> list[Taken]:
        return [
            Taken(
                side=next(number for number, side in enumerate(self._sides) if side is one.side),
                visit=visits.mark(one.visit, self._request.limits),
                runtime=one.runtime,
                boundary=one.boundary,
            )
            for one in measured
        ]

    def _outputs(self, number: int, agent: Agent, transport: Transport) -> OutputsComputed:
        evaluation, samples = self._request.evaluation, self._samples[number]
        assert evaluation is not None, "outputs are computed of an evaluation set"
        artifact, session = self._session.states[number].built.artifact, self._session
        with _outputs_folder() as folder:
            fetched = folder / "outputs.safetensors"
            answer = visits.compute_outputs(agent, transport, self._sides[number], fetched, session.schedule)
            chosen = _chosen_output(evaluation, artifact, golden.read_tensors(fetched, golden.FETCHED))
            fetched.replace(folder.parent / f"{answer.sha256}.safetensors")
        scores = None if samples.labels is None else score(evaluation.metric, chosen, samples.labels)
        outputs = Outputs(
            dataset=samples.name,
            dataset_sha256=samples.sha256,
            samples=samples.count,
            sha256=answer.sha256,
            metric=evaluation.metric,
            scores=scores,
            value=sum(scores) / len(scores) if scores else None,
            is_repeatable=answer.is_repeatable,
            labels=class_labels(evaluation.metric, samples.labels),
            predictions=predictions(evaluation.metric, chosen),
        )
        return OutputsComputed(side=number, outputs=outputs, runtime=answer.runtime, boundary=answer.boundary)

    def _samples_of(self, artifact: Artifact) -> Samples:
        if self._request.evaluation is not None:
            return load_samples(self._request.evaluation.path, artifact.inputs)
        return random_samples(artifact.inputs, inference_batch(artifact.inputs), self._request.seed)


def _first_line(error: Exception) -> str:
    return str(error).split("\n")[0]


def _usual_schedule(sides: Sequence[Built]) -> Schedule:
    """Return a plain loop for one artifact, a duet for two; whole visits in turns where a thread pool would spin idly.

    An idle pool of one side spins on the cores that the other side is being timed on.
    """
    if len(sides) == 1:
        return Schedule()
    threads = [built.artifact.recipe.options.get("threads", 1) for built in sides]
    return DUET if all(count == 1 for count in threads) else Schedule(interleave="visits")


def _with_samples(schedule: Schedule, least: int) -> Schedule:
    """Return a schedule whose visits have at least so many samples, however slow the model is."""
    if least <= schedule.least_samples:
        return schedule
    bursts = max(schedule.bursts_per_visit, -(-least // schedule.samples_per_burst))
    return replace(schedule, bursts_per_visit=bursts, least_samples=least)


@contextmanager
def _outputs_folder() -> Iterator[Path]:
    parent = cache_dir() / "outputs"
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".fetch-", dir=parent) as folder:
        yield Path(folder)


def _chosen_output(evaluation: Evaluation, artifact: Artifact, outputs: dict[str, Any]) -> Any:
    names = [spec.name for spec in artifact.outputs]
    if evaluation.output:
        if evaluation.output not in outputs:
            raise UsageError(f"{artifact.name} has no output {evaluation.output!r} (it has: {', '.join(names)})")
        return outputs[evaluation.output]
    if len(outputs) != 1:
        raise UsageError(
            f"{artifact.name} has {len(outputs)} outputs ({', '.join(names)}); say which one the metric judges "
            f"(output = in [evaluation], or --output-name)"
        )
    return next(iter(outputs.values()))


def _inputs_file(samples: Samples) -> Path:
    """Write samples as safetensors into the cache, named by what they are, once."""
    from safetensors.numpy import save

    path = cache_dir() / "inputs" / f"{samples.sha256}.safetensors"
    if not path.is_file():
        write_atomic(path, save(samples.batch(0, samples.count)))
    return path


def artifact_reference(artifact: Artifact) -> ArtifactReference:
    """Return what a run keeps of the artifact that it measured."""
    recipe = artifact.recipe
    return ArtifactReference(
        name=artifact.name,
        sha256=artifact.sha256,
        size_bytes=artifact.size_bytes,
        key=artifact.key,
        model=recipe.model,
        target=recipe.target,
        backend=recipe.backend,
        precision=recipe.precision,
        options=recipe.options,
    )
