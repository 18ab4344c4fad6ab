"""Many cells on many devices: each is built once and measured on a free device that is fit, and none is dropped.

Every device has one thread, which takes the next cell that may be measured there; builds run in the main thread, or on
an executor. What is done is written to a journal step by step, so that another process can go on after this one dies.
"""

from __future__ import annotations

import collections
import dataclasses
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from edgedeploy.build import BuildRequest, Built, Progress, build, silent
from edgedeploy.engines import engine
from edgedeploy.errors import (
    BackendMissing,
    DeviceBusy,
    DeviceError,
    EdgedeployError,
    ModelError,
    ToolchainError,
    UsageError,
    VisitFailed,
)
from edgedeploy.journal import (
    CellBuilt,
    CellFailed,
    History,
    Journal,
    Line,
    SessionAbandoned,
    SessionHistory,
    SessionStep,
    SessionStored,
)
from edgedeploy.judge.percentiles import samples_for
from edgedeploy.judge.planning import policy_of
from edgedeploy.lab import health
from edgedeploy.lab.inventory import LOCAL
from edgedeploy.measure import (
    RECONNECT_S,
    Evaluation,
    MeasurementInterrupted,
    MeasureRequest,
    Session,
    Stop,
    Stopped,
    is_lost,
    measure,
)
from edgedeploy.records.artifact import Artifact
from edgedeploy.records.device import Device
from edgedeploy.records.run import Run
from edgedeploy.records.session import Begun, Step
from edgedeploy.records.target import ConditionLimits
from edgedeploy.records.verdict import Policy
from edgedeploy.results import Results, load_run

# What a cell's own model, tools or device may do wrong; anything else concerns the whole run.
_CELL_ERRORS = (ModelError, ToolchainError, DeviceError)
# How long devices get to be given back after Ctrl-C.
_FAREWELL_S = 20.0


def progress_of(progress: Progress, device: str) -> Progress:
    """Return what is told about one device: a line of its own where `progress` has such lines, else with its name."""
    if (for_device := getattr(progress, "device", None)) is not None:
        told: Progress = for_device(device)
        return told

    def tell(text: str) -> None:
        progress(text if text.startswith(f"{device}: ") else f"{device}: {text}")

    return tell


# ---------------------------------------------------------------- tasks: arguments and results can be pickled


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionOrder:
    """One session, to be done in this process or in another one that sees the same files.

    Attributes:
        request: what to measure; its sides may be kits, which become engines on the device.
        cells: how many the gate judges; policy: its rules. They decide when enough is measured.
        results: where runs are stored.
        journal: where each step is written down; None: nowhere.
        session, done: name and steps of a session that goes on; else a fresh one begins.
    """

    cell: str
    request: MeasureRequest
    policy: Policy
    cells: int
    results: Path
    journal: Journal | None = None
    rebuild: bool = False
    session: str = ""
    done: tuple[Step, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionResult:
    """How a session ended.

    Attributes:
        state: "measured"; "busy": somebody else holds the device; "lost": the device is gone; "failed": the cell
            cannot be measured.
        runs: as far as it was measured; files: where they are stored, of a measured one.
        artifacts: of both sides, as they were measured.
        session, steps: what was done, for whoever goes on with it.
    """

    state: Literal["measured", "busy", "lost", "failed"]
    runs: tuple[Run, ...] = ()
    files: tuple[str, ...] = ()
    artifacts: tuple[Artifact, ...] = ()
    session: str = ""
    steps: tuple[Step, ...] = ()
    error: EdgedeployError | None = None
    is_not_installed: bool = False
    started_s: float = 0.0
    ended_s: float = 0.0


def build_task(request: BuildRequest, progress: Progress | None = None) -> Built:
    """Build one artifact."""
    return build(request, progress or silent)


def session_task(order: SessionOrder, progress: Progress | None = None, stop: Stop | None = None) -> SessionResult:
    """Measure baseline and candidate interleaved until the gate is decided, and store both runs.

    Raises:
        UsageError: what was asked for cannot be meant, or the session cannot go on.
        Stopped: `stop` was requested.
    """
    from edgedeploy.judge.gate import is_decided

    progress, started_s = progress or silent, time.monotonic()
    request, steps = order.request, list(order.done)
    session = order.session or secrets.token_hex(8)

    def keep(step: Step) -> None:
        if order.journal is not None:
            order.journal.append(SessionStep(cell=order.cell, session=session, did=step))
        steps.append(step)

    artifacts: tuple[Artifact, ...] = ()
    try:
        sides = []
        for cell, kit in request.sides:
            placed = engine(
                kit, request.device_name, request.device, progress, rebuild=order.rebuild, wait_s=request.wait_s
            )
            if placed is not kit and order.journal is not None:
                order.journal.append(_built_line(cell, placed, request.device_name))
            sides.append((cell, placed))
        artifacts = tuple(built.artifact for _, built in sides)
        runs = measure(
            dataclasses.replace(request, sides=tuple(sides)),
            lambda runs: is_decided(runs[0], runs[1], order.policy, cells=order.cells),
            progress,
            keep=keep,
            done=order.done,
            session=session,
            stop=stop,
        )
    except _CELL_ERRORS as error:
        cause = error.__cause__ if isinstance(error, MeasurementInterrupted) else error
        state: Literal["busy", "lost", "failed"] = "failed"
        if isinstance(cause, DeviceBusy):
            state = "busy"
        elif is_lost(cause):
            state = "lost"
        return SessionResult(
            state=state,
            runs=error.runs if isinstance(error, MeasurementInterrupted) else (),
            artifacts=artifacts,
            session=session if steps else "",
            steps=tuple(steps),
            error=DeviceError(str(error)) if isinstance(error, MeasurementInterrupted) else error,
            is_not_installed=is_not_installed(error),
            started_s=started_s,
            ended_s=time.monotonic(),
        )
    store = Results(order.results)
    files = tuple(str(store.save_run(run)) for run in runs)
    if order.journal is not None:
        old, new = (str(Path(file).absolute()) for file in files)
        order.journal.append(
            SessionStored(cell=order.cell, session=runs[0].session, device=runs[0].device, files=(old, new))
        )
    return SessionResult(
        state="measured", runs=runs, files=files, artifacts=artifacts, started_s=started_s, ended_s=time.monotonic()
    )


def is_not_installed(error: BaseException | None) -> bool:
    """Say whether what failed, or what that rests on, is a runtime or converter that is not installed."""
    if error is None:
        return False
    is_missing = isinstance(error, VisitFailed) and error.kind == "missing-runtime"
    return is_missing or isinstance(error, BackendMissing) or is_not_installed(error.__cause__)


def _built_line(cell: str, built: Built, device: str = "") -> CellBuilt:
    return CellBuilt(cell=cell, folder=str(built.folder.absolute()), sha256=built.artifact.sha256, device=device)


# ---------------------------------------------------------------- what is asked for, and what becomes of it


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """One candidate cell beside its baseline.

    Attributes:
        baseline, cell: names of the two.
        requests: how each is built.
        devices: it is measured on one of these.
        spares: of the same kind; used when none of `devices` is.
        sentinels: back end → the sentinel as it compiled it for the target.
    """

    cell: str
    baseline: str
    requests: Mapping[str, BuildRequest]
    devices: tuple[str, ...]
    spares: tuple[str, ...]
    limits: ConditionLimits
    sentinels: Mapping[str, Built] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What holds for all cells of a run."""

    policy: Policy
    evaluation: Evaluation | None
    seed: int
    results: Path
    journal: Journal | None = None
    rebuild: bool = False
    wait_s: float = 0.0
    reconnect_s: float = RECONNECT_S


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """What became of a cell.

    Attributes:
        files, runs: baseline's and candidate's, of a measured one.
        reason: of one that is not measured.
    """

    cell: str
    state: Literal["measured", "failed", "pending"]
    device: str = ""
    files: tuple[str, ...] = ()
    runs: tuple[Run, ...] = ()
    error: EdgedeployError | None = None
    is_not_installed: bool = False

    @property
    def reason(self) -> str:
        """Why it was not measured."""
        return str(self.error) if self.error else ""


@dataclass(frozen=True, slots=True)
class Occupied:
    """A device's time from connecting to the stored run."""

    device: str
    cell: str
    started_s: float
    ended_s: float


@dataclass(frozen=True, slots=True)
class Dispatched:
    """What became of all cells, in the order of the works; artifacts: cell → as it was measured or built."""

    ended: tuple[Ended, ...]
    artifacts: Mapping[str, Artifact]
    occupied: tuple[Occupied, ...]


@dataclass(slots=True, eq=False)
class _Job:
    """A work on its way.

    Attributes:
        session: one that was begun and is not over; it goes on where it began, or not at all.
        ended: what became of it; of one that is not over, what it will be if no device is left.
    """

    work: Work
    state: Literal["unbuilt", "ready", "running", "ended"] = "unbuilt"
    sides: tuple[tuple[str, Built], ...] = ()
    session: SessionHistory | None = None
    ended: Ended | None = None


@dataclass(slots=True, eq=False)
class _Place:
    """A device on the host's side.

    Attributes:
        out: why it takes no more work; "" while it does. is_faulty: for a fault of its own, so that others step in.
        held: somebody else holds it; unfit: why its numbers would not count now.
        probation: why it is in quarantine, of one that is used only if nothing else is left.
    """

    name: str
    device: Device
    out: str = ""
    is_faulty: bool = False
    held: str = ""
    unfit: str = ""
    probation: str = ""
    is_checked: bool = False
    thread: threading.Thread | None = None

    @property
    def is_good(self) -> bool:
        """Nothing speaks against it."""
        return not (self.out or self.held or self.unfit or self.probation)


def dispatch(
    works: Sequence[Work],
    devices: Mapping[str, Device],
    terms: Terms,
    *,
    known: History | None = None,
    executor: Executor | None = None,
    builders: int = 1,
    progress: Progress = silent,
) -> Dispatched:
    """Build every cell once and measure each pair on a device of its own choice or kind.

    Args:
        works: in the order in which they are begun.
        devices: the inventory.
        terms: what holds for all of them.
        known: what a dead process has done of it.
        executor: where builds and sessions run, each a picklable task; None: in this process.
        builders: builds at a time on an executor; each needs the memory of its model several times over.
        progress: told what happens; lines about one device go to its `device(name)` where it has that.

    Raises:
        UsageError: what was asked for cannot be meant; nothing is measured any more.
    """
    return _Dispatcher(works, devices, terms, known, executor, builders, progress).run()


class _Dispatcher:
    """The state that the threads of the devices share; every change of it holds the lock."""

    def __init__(
        self,
        works: Sequence[Work],
        devices: Mapping[str, Device],
        terms: Terms,
        known: History | None,
        executor: Executor | None,
        builders: int,
        progress: Progress,
    ) -> None:
        self._terms, self._executor, self._builders, self._progress = terms, executor, builders, progress
        self._known = known
        self._changed = threading.Condition()
        self._stop = Stop()
        self._is_building = True
        self._bug: BaseException | None = None
        self._jobs = [_Job(work) for work in works]
        names = dict.fromkeys(name for work in works for name in (*work.devices, *work.spares))
        self._places = {name: _Place(name, devices[name]) for name in names}
        # (devices, spares) of a work → its choices; emptied whenever a device's state changes.
        self._groups: dict[tuple[tuple[str, ...], tuple[str, ...]], list[_Place]] = {}
        self._artifacts: dict[str, Artifact] = {}
        self._occupied: list[Occupied] = []

    # ------------------------------------------------ the main thread

    def run(self) -> Dispatched:
        """Do it all; on Ctrl-C, give every device back first."""
        self._remember()
        for name, entry in health.quarantined().items():
            if (place := self._places.get(name)) is not None:
                said = f"{name} is in quarantine since {entry.since_utc}: {entry.why}"
                if entry.by == "person":
                    place.out = f"{said} (edgedeploy devices quarantine {name} --lift ends that)"
                    place.is_faulty = True
                else:
                    place.probation = said
        with self._changed:
            self._settle()
        try:
            self._build()
            with self._changed:
                self._is_building = False
                self._settle()
                while self._bug is None and not self._is_over:
                    self._changed.wait()
            if self._bug is not None:
                raise self._bug
        finally:
            self._end_threads()
        ended = tuple(job.ended for job in self._jobs if job.ended is not None)
        assert len(ended) == len(self._jobs), "every cell ends"
        return Dispatched(ended, dict(self._artifacts), tuple(self._occupied))

    @property
    def _is_over(self) -> bool:
        return all(job.state == "ended" for job in self._jobs)

    def _end_threads(self) -> None:
        """Have every thread end; those that measure give their device back."""
        with self._changed:
            if not self._is_over:
                self._stop.request()
                if self._executor is not None:
                    self._executor.shutdown(wait=False, cancel_futures=True)
            self._changed.notify_all()
        deadline_s = time.monotonic() + _FAREWELL_S
        for place in self._places.values():
            if place.thread is not None:
                place.thread.join(max(0.0, deadline_s - time.monotonic()))

    def _remember(self) -> None:
        """Take over what another process has done.

        Raises:
            UsageError: an artifact is not what was measured.
        """
        if self._known is None:
            return
        for job in self._jobs:
            cell = job.work.cell
            if (stored := self._known.stored.get(cell)) is not None:
                runs = tuple(load_run(Path(file)) for file in stored.files)
                for run in runs:
                    self._demand_built(run.cell, run.artifact.sha256, stored.device)
                self._end(job, Ended(cell=cell, state="measured", device=stored.device, files=stored.files, runs=runs))
            elif (failed := self._known.failed.get(cell)) is not None:
                error = _error_of(failed)
                ended = Ended(cell=cell, state="failed", error=error, is_not_installed=failed.is_not_installed)
                self._end(job, ended)
            else:
                job.session = self._known.open.get(cell)

    def _demand_built(self, cell: str, sha256: str, device: str) -> None:
        """Take the artifact that a cell was measured with from the cache, if it is still there."""
        from edgedeploy.build import MANIFEST, load_artifact

        assert self._known is not None, "only what goes on has a past"
        line = self._known.built.get((cell, device)) or self._known.built.get((cell, ""))
        if line is None or not (Path(line.folder) / MANIFEST).is_file():
            return
        artifact = load_artifact(Path(line.folder)).artifact
        if artifact.sha256 != sha256:
            raise _artifact_changed(cell)
        self._artifacts[cell] = artifact

    def _build(self) -> None:
        """Build every cell that a job still needs, each once, in the order of the jobs."""
        wanted: dict[str, BuildRequest] = {}
        for job in self._jobs:
            if job.state == "unbuilt":
                wanted |= {name: job.work.requests[name] for name in (job.work.baseline, job.work.cell)}
        if self._executor is not None:
            self._build_elsewhere(wanted, self._executor)
            return
        for cell, request in wanted.items():
            if self._bug is not None:
                return
            if not any(job.state == "unbuilt" and cell in job.work.requests for job in self._jobs):
                continue  # its pair failed already
            try:
                built: Built | EdgedeployError = build_task(self._as_before(cell, request), self._progress)
            except _CELL_ERRORS as error:
                built = error
            self._has_built(cell, built)

    def _build_elsewhere(self, wanted: Mapping[str, BuildRequest], executor: Executor) -> None:
        """Have an executor build, a few at a time."""
        queue = list(wanted.items())
        running: dict[Future[Built], str] = {}
        try:
            while (queue or running) and self._bug is None:
                while queue and len(running) < self._builders:
                    cell, request = queue.pop(0)
                    self._progress(f"{cell}: building")
                    running[executor.submit(build_task, self._as_before(cell, request))] = cell
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    cell = running.pop(future)
                    try:
                        built: Built | EdgedeployError = future.result()
                    except _CELL_ERRORS as error:
                        built = error
                    self._has_built(cell, built)
        finally:
            for future in running:
                future.cancel()

    def _as_before(self, cell: str, request: BuildRequest) -> BuildRequest:
        """Return the request; what the run has built already need not be built by force again."""
        is_known = self._known is not None and (cell, "") in self._known.built
        return dataclasses.replace(request, rebuild=False) if is_known else request

    def _has_built(self, cell: str, built: Built | EdgedeployError) -> None:
        """Tell the jobs that wait for a cell; raises UsageError when it is another artifact than before."""
        if isinstance(built, Built):
            before = self._known.built.get((cell, "")) if self._known else None
            if before is not None and before.sha256 != built.artifact.sha256:
                raise _artifact_changed(cell)
            if before is None:
                self._write(_built_line(cell, built))
        with self._changed:
            for job in self._jobs:
                if job.state != "unbuilt" or cell not in (job.work.cell, job.work.baseline):
                    continue
                if not isinstance(built, Built):
                    self._fail(job, built, "", is_missing=is_not_installed(built))
                    continue
                self._artifacts[cell] = built.artifact
                job.sides = (*job.sides, (cell, built))
                if len(job.sides) == 2:
                    job.sides = tuple(sorted(job.sides, key=lambda side: side[0] != job.work.baseline))
                    job.state = "ready"
            self._settle()

    # ------------------------------------------------ who may do what; all of these are called with the lock held

    def _choices(self, job: _Job) -> list[_Place]:
        """Return the devices that a job may be measured on as things are: the best group that is not empty."""
        if job.session is not None and (pinned := self._places.get(job.session.device)) is not None and not pinned.out:
            return [pinned]
        key = (job.work.devices, job.work.spares)
        if key not in self._groups:
            named, spare = ([self._places[name] for name in names] for names in key)
            spare = spare if all(place.is_faulty or place.probation for place in named) else []
            groups = (
                [place for place in named if place.is_good],
                [place for place in named if not place.out and not place.probation],
                [place for place in spare if place.is_good],
                [place for place in spare if not place.out and not place.probation],
                [place for place in named if not place.out],
            )
            self._groups[key] = next((group for group in groups if group), [])
        return self._groups[key]

    def _settle(self) -> None:
        """Let all follow from a change: jobs without a device end, threads that are missing start, all wake up."""
        self._groups.clear()
        waiting = [job for job in self._jobs if job.state in ("unbuilt", "ready")]
        for job in waiting:
            if not self._choices(job):
                names = (*job.work.devices, *job.work.spares)
                reason = "; ".join(dict.fromkeys(self._places[name].out for name in names if self._places[name].out))
                error = job.ended.error if job.ended and job.ended.error else DeviceError(reason)
                self._end(job, Ended(cell=job.work.cell, state="pending", device=names[0], error=error))
        self._recruit()
        self._changed.notify_all()

    def _recruit(self) -> None:
        """Start the threads of as many devices as there are jobs for them."""
        jobs = collections.Counter(tuple(self._choices(job)) for job in self._jobs if job.state != "ended")
        for choices in list(jobs):
            wanted = sum(count for others, count in jobs.items() if not set(choices).isdisjoint(others))
            active = sum(place.thread is not None for place in choices)
            for place in [place for place in choices if place.thread is None][: max(0, wanted - active)]:
                place.thread = threading.Thread(
                    target=self._serve, args=(place,), name=f"device {place.name}", daemon=True
                )
                place.thread.start()

    def _take(self, place: _Place) -> _Job | None:
        """Wait for a job that may be measured on a device and take it; None: there will be none."""
        with self._changed:
            while not (self._is_over or self._stop.is_requested or self._bug or place.out):
                # A build on this machine would be in the way of what is measured on it.
                if not (self._is_building and place.device.transport == "local"):
                    mine = [job for job in self._jobs if job.state == "ready" and place in self._choices(job)]
                    # First what has no choice.
                    mine.sort(key=lambda job: len(self._choices(job)) > 1)
                    if mine:
                        mine[0].state = "running"
                        return mine[0]
                self._changed.wait()
            return None

    def _return(self, job: _Job) -> None:
        """Put a job back."""
        job.state = "ready"
        self._settle()

    # ------------------------------------------------ the thread of a device

    def _serve(self, place: _Place) -> None:
        """Measure one job after another on a device."""
        try:
            while (job := self._take(place)) is not None:
                tell = progress_of(self._progress, place.name)
                if place.is_checked or self._passes_check(place, job, tell):
                    self._measure(place, job, tell)
        except Stopped:
            return
        except BaseException as error:  # noqa: BLE001 - the main thread raises it
            with self._changed:
                self._bug = self._bug or error
                self._changed.notify_all()

    def _wait_s(self, place: _Place, job: _Job) -> float:
        """Return how long to queue for a device: not at once, and for a while where our own dead process holds it."""
        waited_s = self._terms.wait_s if place.held else 0.0
        return waited_s if job.session is None else max(waited_s, self._terms.reconnect_s)

    def _passes_check(self, place: _Place, job: _Job, tell: Progress) -> bool:
        """Say whether a device is fit; if not, the job goes back, and the device is out where that will last."""
        wait_s = self._wait_s(place, job)
        try:
            found = health.check(place.name, place.device, job.work.limits, tell, wait_s=wait_s)
        except DeviceBusy as error:
            self._is_busy(place, job, error)
            return False
        for note in found.notes:
            tell(note)
        with self._changed:
            place.is_checked = True
            if found.lasting:
                reason = "; ".join(found.lasting)
                self._quarantine(place, reason, "health check")
                place.out = f"{place.name} failed its health check: {reason}"
                tell(f"out of use: {_first_line(reason)}")
                self._return(job)
                return False
            if place.probation:
                health.lift(place.name)
                tell("passes its health check again, its quarantine is lifted")
                place.probation = ""
            if found.passing:
                place.unfit = "; ".join(found.passing)
                self._groups.clear()
                if place not in self._choices(job):
                    tell(f"not now: {place.unfit}")
                    self._return(job)
                    return False
                tell(f"measured although {place.unfit}: no other device of this kind is better")
        return True

    def _measure(self, place: _Place, job: _Job, tell: Progress) -> None:
        """Measure a job and say what became of it."""
        result = self._session(place, job, tell)
        with self._changed:
            if result.ended_s:
                self._occupied.append(Occupied(place.name, job.work.cell, result.started_s, result.ended_s))
            if result.state == "measured":
                place.held = ""
                for (cell, _), artifact in zip(job.sides, result.artifacts, strict=True):
                    self._artifacts[cell] = artifact
                ended = Ended(
                    cell=job.work.cell,
                    state="measured",
                    device=place.name,
                    files=result.files,
                    runs=result.runs,
                )
                self._end(job, ended)
                self._settle()
                tell(f"{job.work.cell}: measured")
                return
            assert result.error is not None, "what is not measured has a reason"
            job.session = SessionHistory(result.session, list(result.steps)) if result.session else None
            if result.state == "busy":
                self._is_busy(place, job, result.error)
            elif result.state == "lost":
                reason = f"lost while it measured {job.work.cell}: {result.error}"
                self._quarantine(place, reason, "run")
                place.out = f"{place.name} was {reason}"
                tell(f"out of use: {_first_line(result.error)}")
                job.ended = Ended(cell=job.work.cell, state="pending", device=place.name, error=result.error)
                self._return(job)
            else:
                files = self._keep_files(result.runs)
                error = result.error
                if files:
                    error = DeviceError(f"{error}; what was measured until then is kept in {', '.join(files)}")
                self._fail(job, error, place.name, is_missing=result.is_not_installed)
                self._settle()

    def _session(self, place: _Place, job: _Job, tell: Progress) -> SessionResult:
        """Run the session in this thread, or have the executor do it."""
        terms = self._terms
        if job.session is not None and job.session.device != place.name:
            self._abandon(job, job.session, self._request(place, job))
        session = job.session
        order = SessionOrder(
            cell=job.work.cell,
            request=self._request(place, job),
            policy=policy_of(terms.policy, job.work.cell),
            cells=len(self._jobs),
            results=terms.results,
            journal=terms.journal,
            rebuild=terms.rebuild,
            session=session.name if session is not None else "",
            done=tuple(session.steps) if session is not None else (),
        )
        tell(f"measuring {job.work.baseline} and {job.work.cell}")
        if self._executor is None:
            return session_task(order, tell, self._stop)
        return self._executor.submit(session_task, order).result()

    def _request(self, place: _Place, job: _Job) -> MeasureRequest:
        terms = self._terms
        return MeasureRequest(
            sides=job.sides,
            device_name=place.name,
            device=place.device,
            limits=job.work.limits,
            evaluation=terms.evaluation,
            blocks=policy_of(terms.policy, job.work.cell).max_blocks,
            seed=terms.seed,
            wait_s=self._wait_s(place, job),
            reconnect_s=terms.reconnect_s,
            sentinels=job.work.sentinels,
            least_samples=samples_for(terms.policy.margins),
        )

    def _abandon(self, job: _Job, session: SessionHistory, request: MeasureRequest) -> None:
        """Give up a half-measured session, for its job goes to another device; what it had measured becomes files."""
        begun = next((step for step in session.steps if isinstance(step, Begun)), None)
        files: tuple[str, ...] = ()
        if begun is not None and [side.artifact_sha256 for side in begun.sides] == [
            built.artifact.sha256 for _, built in job.sides
        ]:
            half = Session(request, session.name)
            for step in session.steps:
                half.apply(step)
            files = self._keep_files([run for run in half.runs() if run.visits or run.outputs])
        left = self._places.get(session.device)
        reason = _first_line(left.out) if left is not None else f"{session.device} is no longer a device for it"
        self._write(SessionAbandoned(cell=job.work.cell, session=session.name, reason=reason, files=files))
        job.session = None

    # ------------------------------------------------ endings; with the lock held

    def _is_busy(self, place: _Place, job: _Job, error: EdgedeployError) -> None:
        """Somebody else holds a device: others of the kind come first, then it is waited for, then it is given up."""
        with self._changed:
            if place.held or not self._terms.wait_s:
                others = [one for one in self._choices(job) if one is not place]
                if place.held or not others:
                    place.out = str(error)
            place.held = str(error)
            job.ended = Ended(cell=job.work.cell, state="pending", device=place.name, error=error)
            self._return(job)

    def _keep_files(self, runs: Sequence[Run]) -> tuple[str, ...]:
        store = Results(self._terms.results)
        return tuple(str(store.save_run(run)) for run in runs)

    def _fail(self, job: _Job, error: EdgedeployError, device: str, *, is_missing: bool) -> None:
        cell = job.work.cell
        kind = type(error).__name__
        self._write(CellFailed(cell=cell, kind=kind, reason=str(error), is_not_installed=is_missing))
        self._end(job, Ended(cell=cell, state="failed", device=device, error=error, is_not_installed=is_missing))

    def _end(self, job: _Job, ended: Ended) -> None:
        job.ended, job.state = ended, "ended"
        if ended.error is not None:
            self._progress(f"{ended.cell}: {ended.reason}")

    def _quarantine(self, place: _Place, reason: str, by: Literal["health check", "run"]) -> None:
        """Keep a faulty device out of later runs too; not this machine, which is looked at anew each time."""
        place.is_faulty = True
        if place.name != LOCAL:
            health.quarantine(place.name, reason, by)

    def _write(self, line: Line) -> None:
        if self._terms.journal is not None:
            self._terms.journal.append(line)


def _artifact_changed(cell: str) -> UsageError:
    return UsageError(
        f"the artifact of cell {cell!r} is not the one that this run has measured (its model, calibration set, target "
        f"or a tool has changed); start the run afresh"
    )


def _error_of(failed: CellFailed) -> EdgedeployError:
    """Return an error that stands for one of another process."""
    kinds = {"ModelError": ModelError, "ToolchainError": ToolchainError, "BackendMissing": BackendMissing}
    if failed.is_not_installed:
        return BackendMissing(failed.reason)
    return kinds.get(failed.kind, DeviceError)(failed.reason)


def _first_line(text: object) -> str:
    return str(text).split("\n")[0]
