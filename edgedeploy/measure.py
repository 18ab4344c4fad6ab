"""Steps 5 to 8 of the spine: artifacts are shipped to one device, visited interleaved, and become runs."""

from __future__ import annotations

import secrets
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import edgedeploy
from edgedeploy import golden
from edgedeploy.backends import session_file, session_options
from edgedeploy.build import Built, Progress
from edgedeploy.errors import DeviceError, UsageError, VisitFailed
from edgedeploy.judge.scores import score
from edgedeploy.lab import bundle, visits
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.inventory import open_transport
from edgedeploy.lab.transport import Transport
from edgedeploy.lab.visits import DUET, Measured, Schedule, Side
from edgedeploy.prepare.dataset import Samples, inference_batch, load_samples, random_samples
from edgedeploy.records.artifact import Artifact
from edgedeploy.records.device import Device
from edgedeploy.records.model import Fidelity
from edgedeploy.records.run import ArtifactReference, Boundary, LayerTime, MemoryVisit, Outputs, Run, Visit
from edgedeploy.records.target import ConditionLimits
from edgedeploy.results import utc_now
from edgedeploy.storage import cache_dir, sha256_file, write_atomic

# Memory hardly varies between visits; three show whether it does.
MEMORY_VISITS = 3
# Blocks that may fail (a child that dies, a pair dropped by a signal) before the session is given up.
_FAILED_BLOCKS_ALLOWED = 2
# What may be a single accident; anything else (a missing runtime, a broken artifact) would fail again.
_PASSING_FAILURES = ("died", "timeout")


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


class MeasurementInterrupted(DeviceError):
    """The device or the way to it failed in the middle; `runs` is what was measured until then."""

    def __init__(self, message: str, runs: tuple[Run, ...]) -> None:
        super().__init__(message)
        self.runs = runs


@dataclass(slots=True)
class _SideState:
    """What one side has said so far."""

    role: Literal["single", "baseline", "candidate"]
    built: Built
    side: Side
    samples: Samples
    runtime: str = ""
    boundary: Boundary | None = None
    golden: Fidelity | None = None
    layer_times: tuple[LayerTime, ...] = ()
    visits: list[Visit] = field(default_factory=list)
    memory: list[MemoryVisit] = field(default_factory=list)
    outputs: Outputs | None = None
    events: list[str] = field(default_factory=list)


def measure(
    request: MeasureRequest, is_decided: Callable[[tuple[Run, ...]], bool], progress: Progress
) -> tuple[Run, ...]:
    """Measure one artifact, or two interleaved, and return a run for each.

    Args:
        request: what to measure, and where.
        is_decided: asked after the outputs and after every block; True ends the session.
        progress: told what happens.

    Raises:
        MeasurementInterrupted: the device failed after something had been measured.
        DeviceError: it failed before that.
    """
    name = request.device_name
    with open_transport(name, request.device) as transport:
        progress(f"{name}: connecting")
        with bundle.connect(transport, request.device, device_name=name) as agent:
            session = _Session(request, agent, transport, progress)
            try:
                session.ship()
                for _ in session.steps():
                    if is_decided(session.runs()):
                        break
            except DeviceError as error:
                if any(run.visits or run.outputs for run in session.runs()):
                    raise MeasurementInterrupted(str(error), session.runs()) from error
                raise
            return session.runs()


class _Session:
    """Sides measured interleaved on one device, one thing after another."""

    def __init__(self, request: MeasureRequest, agent: Agent, transport: Transport, progress: Progress) -> None:
        self._request, self._agent, self._transport, self._progress = request, agent, transport, progress
        self._schedule = request.schedule or _usual_schedule([built for _, built in request.sides])
        self._name, self._started_utc = secrets.token_hex(8), utc_now()
        self._states: list[_SideState] = []

    def ship(self) -> None:
        """Push what is missing on the device: device halves, artifacts, and the samples that they are fed."""
        files: dict[str, Path] = {}
        roles: tuple[Literal["single", "baseline", "candidate"], ...] = (
            ("single",) if len(self._request.sides) == 1 else ("baseline", "candidate")
        )
        for role, (cell, built) in zip(roles, self._request.sides, strict=True):
            artifact = built.artifact
            session = session_file(artifact.recipe.backend)
            samples = self._samples(artifact)
            inputs = _inputs_file(samples)
            side = Side(
                cell=cell,
                artifact_sha256=artifact.sha256,
                session_sha256=sha256_file(session),
                options=session_options(artifact),
                inputs_sha256=sha256_file(inputs),
                batch=inference_batch(artifact.inputs),
            )
            self._states.append(_SideState(role, built, side, samples))
            files |= {side.session_sha256: session, side.artifact_sha256: built.file, side.inputs_sha256: inputs}
            if artifact.golden is not None:
                files[artifact.golden.inputs_sha256] = built.folder / golden.INPUTS
        self._progress(f"{self._request.device_name}: sending what is missing there")
        bundle.ship(self._agent, self._transport, files)

    def steps(self) -> Iterator[None]:
        """Do one thing after another; each yield is a moment at which the session may be decided.

        Raises:
            FidelityError: an artifact does not answer here what its model answers; nothing of it is worth measuring.
        """
        for state in self._states:
            if (promised := state.built.artifact.golden) is not None:
                self._progress(f"{state.side.cell}: comparing its answers with the model's")
                where = f"{state.built.artifact.name} on {self._request.device_name}"
                state.golden = golden.replay(
                    self._agent, self._transport, state.side, promised, state.built.folder, where=where
                )
        if self._request.evaluation is not None:
            for state in self._states:
                self._progress(f"{state.side.cell}: computing the evaluation set's outputs")
                state.outputs = self._outputs(self._request.evaluation, state)
            yield
        for state in self._states:
            self._progress(f"{state.side.cell}: measuring peak memory")
            for _ in range(MEMORY_VISITS):
                state.memory.append(visits.measure_memory(self._agent, state.side, self._schedule))
        if self._request.is_profiled:
            for state in self._states:
                self._progress(f"{state.side.cell}: timing its operators one by one")
                try:
                    state.layer_times = visits.profile(self._agent, state.side, self._schedule)
                except VisitFailed as error:
                    if error.kind != "not-available":
                        raise
                    state.events.append(str(error))
        failures = 0
        for block in range(self._request.blocks):
            self._progress(f"{self._request.device_name}: block {block + 1} of at most {self._request.blocks}")
            try:
                self._keep(self._measured_block(block))
            except DeviceError as error:
                self._keep([one for one in error.measured if isinstance(one, Measured)])
                for state in self._states:
                    state.events.append(f"block {block} was dropped: {error}")
                failures += 1
                may_pass = isinstance(error, VisitFailed) and error.kind in _PASSING_FAILURES
                if not may_pass or failures > _FAILED_BLOCKS_ALLOWED:
                    raise
            yield

    def _measured_block(self, block: int) -> list[Measured]:
        request, sides = self._request, [state.side for state in self._states]
        return visits.measure_block(self._agent, sides, self._schedule, block=block, seed=request.seed)

    def _keep(self, taken: list[Measured]) -> None:
        for one in taken:
            state = next(state for state in self._states if state.side is one.side)
            visit = visits.mark(one.visit, self._request.limits)
            state.visits.append(visit)
            state.runtime, state.boundary = one.runtime, one.boundary
        for reason in sorted({visit.dropped for state in self._states for visit in state.visits[-1:] if visit.dropped}):
            self._progress(f"{self._request.device_name}: this block does not count: {reason}")

    def _outputs(self, evaluation: Evaluation, state: _SideState) -> Outputs:
        artifact, samples = state.built.artifact, state.samples
        with _outputs_folder() as folder:
            fetched = folder / "outputs.safetensors"
            answer = visits.compute_outputs(self._agent, self._transport, state.side, fetched, self._schedule)
            chosen = _chosen_output(evaluation, artifact, golden.read_tensors(fetched, golden.FETCHED))
            fetched.replace(folder.parent / f"{answer.sha256}.safetensors")
        state.runtime, state.boundary = answer.runtime, answer.boundary
        scores = None if samples.labels is None else score(evaluation.metric, chosen, samples.labels)
        return Outputs(
            dataset=samples.name,
            dataset_sha256=samples.sha256,
            samples=samples.count,
            sha256=answer.sha256,
            metric=evaluation.metric,
            scores=scores,
            value=sum(scores) / len(scores) if scores else None,
            is_repeatable=answer.is_repeatable,
        )

    def _samples(self, artifact: Artifact) -> Samples:
        if self._request.evaluation is not None:
            return load_samples(self._request.evaluation.path, artifact.inputs)
        return random_samples(artifact.inputs, inference_batch(artifact.inputs), self._request.seed)

    def runs(self) -> tuple[Run, ...]:
        """Return a run per side with everything that was measured until now."""
        agent = self._agent
        return tuple(
            Run(
                session=self._name,
                cell=state.side.cell,
                side=state.role,
                artifact=_reference(state.built.artifact),
                device=self._request.device_name,
                facts=agent.facts,
                runtime=state.runtime,
                boundary=state.boundary,
                golden=state.golden,
                layer_times=state.layer_times,
                schedule=visits.schedule_text(self._schedule, len(self._states)),
                started_utc=self._started_utc,
                visits=tuple(state.visits),
                memory=tuple(state.memory),
                outputs=state.outputs,
                events=tuple(state.events),
                edgedeploy=edgedeploy.__version__,
                runner_sha256=agent.runner_sha256,
            )
            for state in self._states
        )


def _usual_schedule(sides: Sequence[Built]) -> Schedule:
    """Return a plain loop for one artifact, a duet for two; whole visits in turns where a thread pool would spin idly.

    An idle pool of one side spins on the cores that the other side is being timed on.
    """
    if len(sides) == 1:
        return Schedule()
    threads = [built.artifact.recipe.options.get("threads", 1) for built in sides]
    return DUET if all(count == 1 for count in threads) else Schedule(interleave="visits")


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


def _reference(artifact: Artifact) -> ArtifactReference:
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
