"""Why an artifact is slower, or less accurate, than another: both are profiled on one device, in turns.

Every layer is timed in passes of their own, a fresh process of each side in the order A B, B A. Between them,
inferences that nobody watches are timed interleaved, so that what watching costs is known and the layers' sum can be
checked.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

import edgedeploy
from edgedeploy import golden
from edgedeploy.backends import backend
from edgedeploy.build import Built, Progress
from edgedeploy.errors import DeviceError, EdgedeployError, FidelityError, ModelError, UsageError, VisitFailed
from edgedeploy.judge.layer_difference import speed_explanation
from edgedeploy.judge.moved_samples import CLASS_METRICS, accuracy_explanation
from edgedeploy.judge.speed import Block, blocks_of
from edgedeploy.lab import visits
from edgedeploy.lab.visits import Measured, Schedule
from edgedeploy.measure import Evaluation, Held, MeasureRequest, artifact_reference, held
from edgedeploy.prepare.dataset import Samples, load_samples
from edgedeploy.records.artifact import Artifact, Layer
from edgedeploy.records.device import Device
from edgedeploy.records.explanation import (
    AccuracyExplanation,
    Explanation,
    LayerRole,
    Profile,
    ProfiledLayer,
    SpeedExplanation,
)
from edgedeploy.records.run import LayerTime, Outputs
from edgedeploy.records.target import ConditionLimits
from edgedeploy.records.verdict import CellVerdict, Verdict
from edgedeploy.records.verification import LayerComparison
from edgedeploy.results import Results, utc_now
from edgedeploy.storage import cache_dir

# Pairs of passes: with eight, a difference of 1.2 times the spread between pairs is proven alone (t, 5 %).
PASSES = 8
# Fewer say nothing about spread; where no layer can be timed, this many blocks tell the whole difference.
_LEAST_PASSES = 3
# A gate that has failed is not made to wait much longer for the reason.
CAP_S = 120.0
# A gate of many cells that all fail is not held up by all of them.
ALL_CAP_S = 600.0
# Short blocks, for they only check a sum.
_BLOCK = Schedule(bursts_per_visit=60, samples_per_burst=1, lead_in=1, bursts_cap_s=5.0, warm_up_cap_s=2.0)
# Each sample costs two unoptimised inferences, and a jump shows in the first ones.
_SAMPLES_COMPARED = 16
# Kinds of layer of TensorRT that only lay values down in another order or type.
_MOVES = ("reformat", "noop", "shuffle", "copy")


@dataclass(frozen=True, slots=True, kw_only=True)
class ExplainRequest:
    """What to explain, and where.

    Attributes:
        sides: (cell, artifact) of baseline and candidate.
        evaluation: None: accuracy is not looked at, unless outputs are given.
        outputs: of both sides on this device, where they are known already.
        metrics: that failed; empty: everything that can be explained.
        passes: pairs of passes at most; cap_s: no pair is begun after it.
        schedule: of the blocks that nobody watches; None: short ones.
    """

    sides: tuple[tuple[str, Built], tuple[str, Built]]
    device_name: str
    device: Device
    limits: ConditionLimits
    evaluation: Evaluation | None = None
    outputs: tuple[Outputs, Outputs] | None = None
    metrics: tuple[str, ...] = ()
    passes: int = PASSES
    cap_s: float = CAP_S
    seed: int = 0
    wait_s: float = 0.0

    @property
    def is_about_speed(self) -> bool:
        """Whether latency is asked about."""
        return not self.metrics or any(metric.startswith("latency") for metric in self.metrics)

    @property
    def is_about_accuracy(self) -> bool:
        """Whether answers are asked about, and there are any."""
        asked = not self.metrics or any("accuracy" in metric for metric in self.metrics)
        return asked and (self.evaluation is not None or self.outputs is not None)


def explain(request: ExplainRequest, progress: Progress) -> Explanation:
    """Profile both artifacts on one device, compare their answers, and say what accounts for the difference.

    Raises:
        DeviceError: the device cannot be reached, or failed.
        FidelityError: an artifact does not answer there what its model answers.
        UsageError: names or samples that do not fit.
    """
    started_s = time.monotonic()
    notes: list[str] = []
    speed, accuracy = None, None
    outputs = request.outputs
    needs_answers = request.is_about_accuracy and outputs is None
    if request.is_about_speed or needs_answers:
        with held(_session(request), progress) as place:
            if needs_answers:
                outputs = (place.outputs(0), place.outputs(1))
            if request.is_about_speed:
                speed = _Profiling(request, place, started_s + request.cap_s, progress).explained()
    if request.is_about_accuracy and outputs is not None:
        accuracy = _accuracy(request, outputs, progress)
    if request.evaluation is None and outputs is None and not request.metrics:
        notes.append("accuracy was not looked at: give --evaluation SET")
    return Explanation(
        cell=request.sides[1][0],
        baseline_cell=request.sides[0][0],
        device=request.device_name,
        metrics=request.metrics,
        speed=speed,
        accuracy=accuracy,
        explained_utc=utc_now(),
        seconds=time.monotonic() - started_s,
        notes=tuple(notes),
        edgedeploy=edgedeploy.__version__,
    )


def _session(request: ExplainRequest) -> MeasureRequest:
    return MeasureRequest(
        sides=request.sides,
        device_name=request.device_name,
        device=request.device,
        limits=request.limits,
        evaluation=request.evaluation,
        blocks=request.passes,
        seed=request.seed,
        wait_s=request.wait_s,
    )


# ---------------------------------------------------------------- speed


class _Profiling:
    """Passes in which every layer is timed, and blocks in which none is, until there are enough or time is up."""

    def __init__(self, request: ExplainRequest, place: Held, deadline_s: float, progress: Progress) -> None:
        self._request, self._place = request, place
        self._deadline_s, self._progress = deadline_s, progress
        self._passes: tuple[list[tuple[LayerTime, ...]], list[tuple[LayerTime, ...]]] = ([], [])
        self._unavailable = ["", ""]
        self._measured: list[list[Measured]] = []
        self._notes: list[str] = []

    def explained(self) -> SpeedExplanation:
        """Take the passes, and say what they show."""
        request = self._request
        done = 0
        for number in range(request.passes):
            if number >= _LEAST_PASSES and (any(self._unavailable) or time.monotonic() > self._deadline_s):
                break
            self._progress(f"{request.device_name}: timing layers, pass {number + 1} of {request.passes}")
            self._pass(number)
            self._block(number)
            done += 1
        if done < request.passes and not any(self._unavailable):
            self._notes.append(
                f"{done} of {request.passes} pairs of passes were taken: no pair is begun after {request.cap_s:g} s"
            )
        built = [side for _, side in request.sides]
        blocks = self._blocks()
        profiles = tuple(self._profile(number, blocks) for number in (0, 1))
        self._note_settings(built)
        return speed_explanation(
            profiles[0],
            profiles[1],
            [block.effect for block in blocks],
            macs=(_macs(built[0].artifact), _macs(built[1].artifact)),
            reports=(built[0].artifact.layers, built[1].artifact.layers),
            notes=self._notes,
        )

    def _pass(self, number: int) -> None:
        """Time the layers of both sides once; which goes first alternates."""
        for side in (0, 1) if number % 2 == 0 else (1, 0):
            if any(self._unavailable):
                return
            try:
                times = visits.profile(self._place.agent, self._place.sides[side], _BLOCK)
            except VisitFailed as error:
                if error.kind != "not-available":
                    raise
                self._unavailable[side] = str(error).partition("\n")[0]
                return
            self._passes[side].append(times)

    def _block(self, number: int) -> None:
        """Time whole inferences, unwatched and interleaved."""
        place, limits = self._place, self._request.limits
        schedule = _BLOCK if place.schedule.interleave == "bursts" else dataclasses.replace(_BLOCK, interleave="visits")
        measured = visits.measure_block(place.agent, place.sides, schedule, block=number, seed=self._request.seed)
        self._measured.append([dataclasses.replace(one, visit=visits.mark(one.visit, limits)) for one in measured])

    def _blocks(self) -> list[Block]:
        """Return the blocks that count."""
        sides = [[block[side].visit for block in self._measured] for side in (0, 1)]
        found = blocks_of("latency_p50", *sides, is_relative=False)
        if found.dropped:
            reasons = sorted({visit.dropped for side in sides for visit in side if visit.dropped})
            self._notes.append(
                f"{found.dropped} of {len(self._measured)} unwatched blocks do not count: {'; '.join(reasons)}"
            )
        return list(found.usable)

    def _profile(self, number: int, blocks: Sequence[Block]) -> Profile:
        cell, built = self._request.sides[number]
        passes = self._passes[number]
        reason = self._unavailable[number]
        if not reason and any(self._unavailable):
            reason = "the other side's runtime does not say what single layers take"
        return Profile(
            cell=cell,
            artifact=artifact_reference(built.artifact),
            runtime=self._measured[0][number].runtime,
            layers=() if reason else _layers(built, passes, where=f"{cell} on {self._request.device_name}"),
            not_available=reason,
            whole_s=tuple(block.candidate_s if number else block.baseline_s for block in blocks),
        )

    def _note_settings(self, built: Sequence[Built]) -> None:
        """Say what else is different about how the two are run."""
        before, after = self._measured[0]
        if before.runtime != after.runtime:
            self._notes.append(f"the baseline runs on {before.runtime}, the candidate on {after.runtime}")
        elif before.boundary != after.boundary:
            self._notes.append(f"the baseline is run as {_setting(before)}, the candidate as {_setting(after)}")
        options = [one.artifact.recipe.options for one in built]
        unlike = sorted(
            key for key in options[0].keys() | options[1].keys() if options[0].get(key) != options[1].get(key)
        )
        self._notes += [
            f"option {key} is {options[0].get(key, 'as usual')} in the baseline, {options[1].get(key, 'as usual')} in "
            f"the candidate"
            for key in unlike
        ]
        tools = [one.artifact.recipe.toolchain for one in built]
        self._notes += [
            f"{name} was {tools[0][name]} when the baseline was made, {tools[1][name]} for the candidate"
            for name in sorted(tools[0].keys() & tools[1].keys())
            if tools[0][name] != tools[1][name]
        ]


def _setting(measured: Measured) -> str:
    boundary = measured.boundary
    return f"{boundary.detail or 'it is'} ({boundary.threads} threads, batch {boundary.batch})"


def _layers(built: Built, passes: Sequence[Sequence[LayerTime]], *, where: str) -> tuple[ProfiledLayer, ...]:
    """Return the layers of one side with their times, in the names of the model.

    Raises:
        DeviceError: the runtime told other layers in another pass.
    """
    first = [(one.name, one.kind) for one in passes[0]]
    for times in passes:
        if [(one.name, one.kind) for one in times] != first:
            raise DeviceError(
                f"{where}: the runtime named {len(times)} layers in one pass and {len(first)} in another, or others; "
                f"passes that time different layers cannot be compared"
            )
    runtime = backend(built.artifact.recipe.backend)
    if name_them := getattr(runtime, "profiled_layers", None):
        named: tuple[ProfiledLayer, ...] = name_them(built.file, first)
    else:
        named = described_layers(built.artifact.layers.layers, first)
    return tuple(
        msgspec.structs.replace(layer, passes_s=tuple(times[place].p50_s for times in passes))
        for place, layer in enumerate(named)
    )


def described_layers(layers: Sequence[Layer], executed: Sequence[tuple[str, str]]) -> tuple[ProfiledLayer, ...]:
    """Return layers that were timed with what an artifact's own report says of the layer of that name.

    Args:
        layers: kernel by kernel, as the runtime described them when the artifact was built.
        executed: name and kind of each, as they were timed.
    """
    by_name: dict[str, list[Layer]] = {}
    for layer in layers:
        by_name.setdefault(layer.name, []).append(layer)
    # A name may stand for several layers: they are told in the order of execution, both times.
    waiting = {name: itertools.chain(found, itertools.repeat(found[-1])) for name, found in by_name.items()}
    named = []
    for name, kind in executed:
        known = next(waiting[name]) if name in waiting else None
        # TensorRT appends the number of the optimization profile where there are several.
        if known is None and (plain := name.partition(" [profile ")[0]) in waiting:
            known = next(waiting[plain])
        if known is None:
            named.append(ProfiledLayer(name=name, kind=kind, passes_s=()))
            continue
        named.append(
            ProfiledLayer(
                name=name,
                kind=kind or known.kind,
                role=_described_role(known),
                precision=known.precision,
                nodes=tuple(node for node in known.nodes if not node.endswith(("/quantize", "/dequantize"))),
                detail=", ".join(part for part in (known.format, known.tactic) if part),
                passes_s=(),
            )
        )
    return tuple(named)


def _described_role(layer: Layer) -> LayerRole:
    nodes = [node for node in layer.nodes if not node.endswith(("/quantize", "/dequantize"))]
    if nodes:
        return "compute"
    if len(layer.nodes) > len(nodes) or (layer.precision and layer.output and layer.precision != layer.output):
        return "convert"
    is_move = any(word in f"{layer.kind} {layer.name}".lower() for word in _MOVES)
    return "layout" if is_move else "compute"


def _macs(artifact: Artifact) -> dict[str, int]:
    return {layer.name: layer.macs for layer in artifact.compression.layers if layer.macs}


# ---------------------------------------------------------------- accuracy


def _accuracy(request: ExplainRequest, outputs: tuple[Outputs, Outputs], progress: Progress) -> AccuracyExplanation:
    """Say where answers differ: along the graph, by class and by sample."""
    notes: list[str] = []
    samples = _samples(request)
    answers = _answers(request, outputs, notes)
    layers = _compared_layers(request, samples, notes, progress)
    first, second = outputs
    labels = first.labels
    if labels is None and samples is not None and samples.labels is not None and first.metric in CLASS_METRICS:
        labels = tuple(int(label) for label in samples.labels.reshape(-1))
    predictions = None
    if first.predictions is not None and second.predictions is not None:
        predictions = (first.predictions, second.predictions)
    scores = None if first.scores is None or second.scores is None else (first.scores, second.scores)
    return accuracy_explanation(
        dataset=first.dataset,
        metric=first.metric,
        outputs=answers,
        labels=labels,
        predictions=predictions,
        scores=scores,
        layers=layers,
        samples=first.samples,
        notes=notes,
    )


def _samples(request: ExplainRequest) -> Samples | None:
    """Return the evaluation samples; both sides must take the same."""
    if request.evaluation is None:
        return None
    inputs = [[spec.name for spec in built.artifact.inputs] for _, built in request.sides]
    if set(inputs[0]) != set(inputs[1]):
        raise UsageError(
            f"the baseline takes the inputs {', '.join(inputs[0])} and the candidate {', '.join(inputs[1])}; only "
            f"artifacts with the same inputs can be compared on the same samples"
        )
    return load_samples(request.evaluation.path, request.sides[0][1].artifact.inputs)


def _answers(request: ExplainRequest, outputs: tuple[Outputs, Outputs], notes: list[str]) -> tuple[Any, Any] | None:
    """Return the judged output of both sides; None where one is no longer in the cache."""
    found = []
    for (cell, built), one in zip(request.sides, outputs, strict=True):
        path = cache_dir() / "outputs" / f"{one.sha256}.safetensors"
        if not path.is_file():
            notes.append(f"the answers of {cell} are no longer in the cache: the worst samples are not known")
            return None
        tensors = golden.read_tensors(path, f"{path}")
        wanted = request.evaluation.output if request.evaluation else ""
        name = wanted or built.artifact.outputs[0].name
        if name not in tensors:
            raise UsageError(f"{cell} has no output {name!r} (it has: {', '.join(tensors)})")
        found.append(tensors[name])
    if found[0].shape != found[1].shape:
        notes.append(f"the answers have the shapes {found[0].shape} and {found[1].shape}: samples are not compared")
        return None
    return found[0], found[1]


def _compared_layers(
    request: ExplainRequest, samples: Samples | None, notes: list[str], progress: Progress
) -> LayerComparison | None:
    """Compare the inner tensors of two ONNX graphs; None, with a note, where there are none to compare."""
    built = [side for _, side in request.sides]
    other = [one.artifact.recipe.backend for one in built if one.file.suffix != ".onnx"]
    if other or samples is None:
        why = f"an artifact of {other[0]} does not show its inner tensors" if other else "it needs --evaluation SET"
        notes.append(f"where along the graph the error grows is not known: {why}")
        return None
    from edgedeploy.prepare.graph import read_graph
    from edgedeploy.prepare.layerwise import compare_layers

    progress(f"{request.sides[1][0]}: comparing its inner tensors with the baseline's")
    graphs = [read_graph(one.file) for one in built]
    policies = [one.artifact.recipe.quantization for one in built]
    is_equalized = any(policy is not None and policy.equalize for policy in policies)
    if is_equalized:
        notes.append("inner tensors are compared up to one factor a channel: equalization rescaled channels")
    try:
        return compare_layers(
            graphs[0],
            graphs[1],
            samples,
            built[0].artifact.inputs,
            names=("the baseline", "the candidate"),
            limit=_SAMPLES_COMPARED,
            is_scale_free=is_equalized,
        )
    except (FidelityError, ModelError) as error:
        # Two models, and not two forms of one, or a graph that this machine cannot compute: the rest is still told.
        notes.append(f"where along the graph the error grows is not known: {error}")
        return None


# ---------------------------------------------------------------- a gate that said FAIL


def failed_metrics(cell: CellVerdict) -> tuple[str, ...]:
    """Return what failed in a cell that can be explained: latencies and accuracies."""
    return tuple(
        finding.metric
        for finding in cell.findings
        if finding.decision == "FAIL"
        and finding.margin is not None
        and (finding.metric.startswith("latency") or "accuracy" in finding.metric)
    )


def explained(
    verdict: Verdict,
    request_of: Callable[[CellVerdict, tuple[str, ...]], ExplainRequest],
    store: Results,
    progress: Progress,
    *,
    cap_s: float = ALL_CAP_S,
) -> Verdict:
    """Return a verdict with the reasons of what failed in it, each stored; a cell that cannot be explained says why.

    Args:
        verdict: judged.
        request_of: cell and its failed metrics → what to explain; it may raise what `explain` raises.
        store: where explanations are kept.
        progress: told what happens.
        cap_s: no cell is begun after so long.
    """
    deadline_s = time.monotonic() + cap_s
    cells = []
    for cell in verdict.cells:
        metrics = failed_metrics(cell) if cell.decision == "FAIL" else ()
        if not metrics:
            cells.append(cell)
            continue
        if time.monotonic() > deadline_s:
            note = (
                f"why it failed was not looked at: no cell is begun after {cap_s:g} s; ask for it: edgedeploy explain"
            )
            cells.append(_noted(cell, note))
            continue
        progress(f"{cell.cell}: looking for the reason of {', '.join(metrics)}")
        try:
            found = explain(request_of(cell, metrics), progress)
        except EdgedeployError as error:
            # The verdict stands on its own; that its reason is not known is told with it.
            cells.append(_noted(cell, f"why it failed could not be explained: {error}"))
            continue
        store.save_explanation(found)
        cells.append(msgspec.structs.replace(cell, explanation=found))
    return msgspec.structs.replace(verdict, cells=tuple(cells))


def _noted(cell: CellVerdict, note: str) -> CellVerdict:
    return msgspec.structs.replace(cell, notes=(*cell.notes, note))
