"""What each step of a sensitivity curve costs: its int8 form is written, and timed here beside the float model."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgedeploy.errors import UsageError
from edgedeploy.prepare.dataset import Samples
from edgedeploy.prepare.emission.emit import emit
from edgedeploy.prepare.graph import read_graph, view
from edgedeploy.prepare.ptq.calibrate import small_batches
from edgedeploy.prepare.ptq.equalize import equalize
from edgedeploy.prepare.ptq.quantize import quantize
from edgedeploy.prepare.ptq.sensitivity import curve, without
from edgedeploy.prepare.ptq.statistics import thinned
from edgedeploy.records.model import Model
from edgedeploy.records.quantization import QuantizationPolicy, QuantizationTable
from edgedeploy.records.sensitivity import PlanPoint, Sensitivity, SensitivityStep
from edgedeploy.records.target import QuantizationRules

Progress = Callable[[str], None]

# Samples that each form is compared with fp32 on when it is written; the figures come from the curve, not from these.
_SAMPLES = 8
# Rounds of one inference of each form. A ratio is the median over rounds, so that a busy moment spoils one of them.
_ROUNDS = 21
TIMING = (
    f"measured here with ONNX Runtime, one thread: median of {_ROUNDS} interleaved rounds, relative to fp32; a shared "
    f"machine makes it uncertain by 10 % or so, and `edgedeploy compare` measures it properly"
)


def sensitivity_of(
    model: Model,
    samples: Samples,
    rules: QuantizationRules,
    policy: QuantizationPolicy,
    *,
    name: str,
    target: str,
    backend: str,
    is_timed: bool,
    cache: Path | None,
    progress: Progress,
) -> Sensitivity:
    """Quantize a float model and return what leaving one layer after another in float gives and costs.

    Args:
        model: canonical fp32.
        samples: the calibration samples.
        rules: of the back end on its target.
        policy: how the model is quantized; the curve ends at its `max_float_layers`, or where `budget_db` is met.
        name: what people call the model.
        target: the target's name. backend: the back end's.
        is_timed: whether the target is this machine.
        cache: folder where statistics are looked for and kept.
        progress: called with a sentence, now and then.

    Raises:
        UsageError: the model carries its own quantization.
        ModelError: as for `quantize`.
    """
    if model.quantization is not None:
        raise UsageError(
            f"{name} carries its own quantization, so that which layers are quantized is not chosen here; give the "
            f"float model"
        )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = equalize(model, samples, folder / "equalized.onnx", progress=progress) if policy.equalize else model
        everything = msgspec.structs.replace(policy, budget_db=None)
        table = quantize(source, samples, rules, everything, cache=cache, progress=progress)
        found = curve(
            source,
            table,
            samples,
            rules,
            until_db=policy.budget_db,
            most=policy.max_float_layers,
            progress=progress,
        )
        steps = step_costs(source, table, rules, found.points, samples, folder, is_timed=is_timed, progress=progress)
    return Sensitivity(
        model=name,
        target=target,
        backend=backend,
        calibration=samples.name,
        samples=samples.count,
        method=table.method,
        fp32_bytes=Path(model.path).stat().st_size,
        layers=found.layers,
        steps=steps,
        timing=TIMING if is_timed else f"not measured, since {target} with {backend} does not run here",
    )


def step_costs(
    model: Model,
    table: QuantizationTable,
    rules: QuantizationRules,
    points: Sequence[PlanPoint],
    samples: Samples,
    folder: Path,
    *,
    is_timed: bool,
    progress: Progress,
) -> tuple[SensitivityStep, ...]:
    """Write each point's form and return what it costs.

    Args:
        model: the fp32 model that `table` quantizes.
        table: with every layer quantized.
        rules: the back end's on its target.
        points: of the curve, fewest layers in float first.
        samples: calibration samples.
        folder: where the forms are written.
        is_timed: whether the target is this machine.
        progress: called with a sentence for each step.
    """
    seen = view(read_graph(Path(model.path)).graph)
    some = thinned(samples, max(_SAMPLES, _fixed_rows(model)))
    files = []
    for number, point in enumerate(points):
        progress(f"writing the int8 form of each step: {number + 1} of {len(points)} steps")
        kept = without(table, seen, point.float_nodes)
        file = folder / f"step-{number}.onnx"
        emit(model, kept, rules, some, file)
        files.append(file)
    ratios: list[float | None] = [None] * len(points)
    if is_timed:
        progress("timing all steps here, interleaved")
        batch = next(small_batches(some, model))
        feed = {name: values[: max(1, _fixed_rows(model))] for name, values in batch.items()}
        ratios = [*latency_ratios(Path(model.path), files, feed)]
    steps: list[SensitivityStep] = []
    before = PlanPoint(float_nodes=(), sqnr_db=points[0].sqnr_db, size_bytes=0)
    for point, file, ratio in zip(points, files, ratios, strict=True):
        steps.append(
            SensitivityStep(
                left=tuple(name for name in point.float_nodes if name not in before.float_nodes),
                sqnr_db=point.sqnr_db,
                gain_db=point.sqnr_db - before.sqnr_db,
                size_bytes=file.stat().st_size,
                latency_ratio=ratio,
            )
        )
        before = point
    return tuple(steps)


def latency_ratios(reference: Path, candidates: Sequence[Path], feed: dict[str, Any]) -> list[float]:
    """Return for each candidate the median over rounds of its latency relative to the reference's in the same round.

    Args:
        reference: an .onnx. candidates: others of the same inputs.
        feed: one batch.
    """
    import onnxruntime

    sessions = []
    for file in (reference, *candidates):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        session.run(None, feed)  # the first run allocates
        sessions.append(session)
    seconds = np.zeros((_ROUNDS, len(sessions)))
    for row in seconds:
        for place, session in enumerate(sessions):
            begin = time.perf_counter()
            session.run(None, feed)
            row[place] = time.perf_counter() - begin
    return [float(ratio) for ratio in np.median(seconds[:, 1:] / seconds[:, :1], axis=0)]


def _fixed_rows(model: Model) -> int:
    """Return the batch that the model insists on, 0 where it takes any."""
    return max((spec.shape[0] for spec in model.inputs if spec.shape and isinstance(spec.shape[0], int)), default=0)
