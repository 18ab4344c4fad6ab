"""A canonical model in the form that a precision and a back end ask for, or a refusal to lose what it carries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from edgedeploy.errors import ModelError
from edgedeploy.prepare.dataset import Samples
from edgedeploy.records.model import Model
from edgedeploy.records.quantization import QuantizationPolicy, QuantizationTable, SourceQuantization
from edgedeploy.records.target import Precision, QuantizationRules

Progress = Callable[[str], None]

# How `quantize` begins what looks wrong about the samples.
_NOTE = "note: "
_UNUSED_POLICY = (
    "the model carries its own quantization, whose numbers win: what -Q or [quantization] says about calibration was "
    "not used"
)


@dataclass(frozen=True, slots=True)
class Formed:
    """A model as a back end compiles it.

    Attributes:
        table: what was quantized and how; None for a form that stores float32.
        notes: what a person should know about it.
    """

    model: Model
    table: QuantizationTable | None = None
    notes: tuple[str, ...] = ()


def form(
    model: Model,
    precision: Precision,
    rules: QuantizationRules | None,
    policy: QuantizationPolicy,
    *,
    calibration: Callable[[], Samples],
    checks: Callable[[], Samples],
    allow_loss: bool,
    folder: Path,
    cache: Path | None = None,
    progress: Progress,
) -> Formed:
    """Return the model in the form for one precision.

    Args:
        model: canonical fp32, with the quantization that its source carried.
        rules: of the back end on its target; int8 needs them.
        policy: how a float model is quantized.
        calibration: opens the calibration set, or raises a sentence when there is none; called only where it is needed.
        checks: opens samples to compare forms on.
        allow_loss: accept that the form does not keep the source's compression; a note says what is lost.
        folder: where forms are written.
        cache: where what calibration saw is kept.
        progress: called with a sentence, now and then.

    Raises:
        ModelError: the source's compression cannot be kept, and `allow_loss` is False.
    """
    from edgedeploy.prepare.emission.emit import emit, shorten

    if (undone := [item for item in model.kinds if not item.is_kept]) and not allow_loss:
        raise ModelError(
            f"{model.source} carries {', '.join(item.kind for item in undone)} that ONNX does not keep: "
            f"{'; '.join(item.note for item in undone)}; accept that with --allow-loss"
        )
    source = model.quantization
    if precision == "int8":
        assert rules is not None, "the caller has looked the rules up"
        if source is not None and _has_codes(source):
            from edgedeploy.prepare.source.inherit import inherited_table

            progress("taking over the quantization that the model carries")
            table, samples = inherited_table(model, rules), checks()
            heard = [] if policy == QuantizationPolicy() else [_UNUSED_POLICY]
        else:
            heard = []
            tell = _listening(progress, heard)
            table, samples, model = _quantized(model, calibration(), rules, policy, folder, cache, tell)
        progress("emitting the int8 form and comparing it with fp32")
        emitted = emit(model, table, rules, samples, folder / "quantized.onnx", allow_change=allow_loss)
        return Formed(emitted.model, table, (*heard, *emitted.notes))
    lost = _lost(model, precision)
    if lost and not allow_loss:
        advice = "build it as int8" if source is not None and _has_codes(source) else "build it as fp16"
        raise ModelError(f"{model.source} carries {lost}; {advice}, or accept the loss with --allow-loss")
    notes = [f"lost: {lost}"] if lost else []
    if precision == "fp16":
        is_brain = source is not None and _storages(source) == {"bfloat16"}
        shortened = shorten(model, "bfloat16" if is_brain else "float16", folder / "short.onnx", checks())
        return Formed(shortened.model, None, (*notes, *shortened.notes))
    return Formed(model, None, tuple(notes))


def _listening(progress: Progress, heard: list[str]) -> Progress:
    """Return `progress` that also keeps what is said about the samples: the artifact is read after the terminal."""

    def tell(text: str) -> None:
        if text.startswith(_NOTE):
            heard.append(text.removeprefix(_NOTE))
        progress(text)

    return tell


def _quantized(
    model: Model,
    samples: Samples,
    rules: QuantizationRules,
    policy: QuantizationPolicy,
    folder: Path,
    cache: Path | None,
    progress: Progress,
) -> tuple[QuantizationTable, Samples, Model]:
    from edgedeploy.prepare.ptq.quantize import quantize

    progress(f"calibrating on {samples.count} samples of {samples.name}")
    if policy.equalize:
        from edgedeploy.prepare.ptq.equalize import equalize

        progress("equalizing channels")
        model = equalize(model, samples, folder / "equalized.onnx")
    table = quantize(model, samples, rules, policy, cache=cache, progress=progress)
    return table, samples, model


def _has_codes(source: SourceQuantization) -> bool:
    """Whether the source is quantized to codes, and not just stored in half the bytes."""
    return bool(source.activations or source.dynamic or _storages(source) - {"float16", "bfloat16"})


def _storages(source: SourceQuantization) -> set[str]:
    return {grid.storage for grid in source.weights.values()}


def _lost(model: Model, precision: Precision) -> str:
    """Say what a float form would lose of the source's compression; "" when nothing."""
    source = model.quantization
    if source is None:
        return ""
    if _has_codes(source):
        kinds = ", ".join(dict.fromkeys(item.kind for item in model.kinds)) or "a quantization"
        scales = sum(len(grid.scales) for grid in source.weights.values()) + len(source.activations)
        return f"{kinds}, and {precision} would drop its {scales} scales and store its integer weights as floats"
    if precision == "fp32" and source.weights:
        stored = ", ".join(sorted(_storages(source)))
        return f"weights in {stored}, which fp32 would store in twice the bytes (fp16 keeps them)"
    return ""
