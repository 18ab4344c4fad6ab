"""Traces each scale that a model came with: into the table, the emitted form and the runtime's artifact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import FidelityError
from edgedeploy.prepare.graph import View, read_graph, view
from edgedeploy.prepare.source.clean_graph import MOVES
from edgedeploy.prepare.source.inherit import used_codes
from edgedeploy.records.artifact import LayerReport
from edgedeploy.records.quantization import Grid, QuantizationTable, SourceQuantization, WeightQuantization
from edgedeploy.records.survival import Fate, Stage, SurvivalEntry, SurvivalReport

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Array = NDArray[Any]
Found = tuple[Fate, float]

_KEPT: Found = ("kept", 0.0)
_FOLDED: Found = ("folded", 0.0)
_DROPPED: Found = ("dropped", 0.0)
_CLAMPS = ("Relu", "Clip")
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# How many tensors an error names.
_NAMED = 5


def trace(
    source: SourceQuantization,
    table: QuantizationTable,
    emitted: ModelProto | Path,
    layers: LayerReport | None = None,
) -> SurvivalReport:
    """Return what became of each quantized tensor of a source.

    Args:
        source: the quantization that the model carried.
        table: what was made of it.
        emitted: the explicit form; the scale of tensor or weights `x` is the constant `x/scale`, or that of the
            QuantizeLinear and DequantizeLinear around `x`.
        layers: what the runtime says it executes; None leaves the stage out.
    """
    form = _Form(view((read_graph(emitted) if isinstance(emitted, Path) else emitted).graph))
    entries = []
    for name, values in source.activations.items():
        trained = used_codes(values)
        if trained is None:
            continue
        now = table.activations[name].grid if name in table.activations else None
        in_form = form.activation(name, trained)
        found: dict[Stage, Found] = {"canonical": _grid_fate(trained, now), "emitted": in_form}
        if layers is not None:
            found["artifact"] = _activation_in(layers, name, form, in_form)
        entries.append(_entry(name, "activation", (trained.scale,), found))
    for name, weight in source.weights.items():
        if not weight.scales:
            continue
        stored = table.weights.get(name)
        in_form = form.weight(name, weight)
        found = {"canonical": _weight_fate(weight, stored), "emitted": in_form}
        if layers is not None:
            # A runtime can replace constants by what they stand for, and nothing else.
            scales = layers.scales.get(name)
            found["artifact"] = _scale_fate(weight.scales, scales) if scales and in_form == _KEPT else _FOLDED
            if in_form[0] in ("dropped", "re-scaled"):
                found["artifact"] = in_form
        entries.append(_entry(name, "weight", weight.scales, found))
    largest = max((entry.relative_change for entry in entries), default=0.0)
    return SurvivalReport(entries=tuple(entries), largest_relative_change=largest)


def demand_survival(report: SurvivalReport) -> None:
    """Raise where a scale was dropped.

    Raises:
        FidelityError: names the first tensors and the stage that dropped them.
    """
    dropped = [
        (entry, next(stage for stage, fate in entry.stages.items() if fate == "dropped"))
        for entry in report.entries
        if "dropped" in entry.stages.values()
    ]
    if not dropped:
        return
    named = ", ".join(f"{entry.tensor!r} ({entry.role}, {stage})" for entry, stage in dropped[:_NAMED])
    more = f" and {len(dropped) - _NAMED} more" if len(dropped) > _NAMED else ""
    raise FidelityError(
        f"{len(dropped)} of {len(report.entries)} scales that the model came with are dropped: {named}{more}; the "
        f"layers around them would compute in float or with other numbers; build for another back end, or for a target "
        f"whose rules keep them, or accept the change with --allow-loss"
    )


def represents(trained: Grid, zero_point: int, scale: float, codes: tuple[int, int]) -> bool:
    """Whether each value of a trained grid is exactly a value of another one.

    Args:
        trained: the grid.
        zero_point: of the other.
        scale: of the other.
        codes: lowest and highest code of the other.
    """
    ratio = Fraction(trained.scale) / Fraction(scale)
    if ratio.denominator != 1:
        return False
    ends = [zero_point + ratio * (code - trained.zero_point) for code in (trained.low_code, trained.high_code)]
    return codes[0] <= ends[0] and ends[1] <= codes[1]


def _entry(name: str, role: Any, scales: tuple[float, ...], found: Mapping[Stage, Found]) -> SurvivalEntry:
    return SurvivalEntry(
        tensor=name,
        role=role,
        scales=scales,
        stages={stage: fate for stage, (fate, _) in found.items()},
        relative_change=max(change for _, change in found.values()),
    )


def _grid_fate(trained: Grid, now: Grid | None) -> Found:
    if now is None:
        return _DROPPED
    if represents(trained, now.zero_point, now.scale, (now.low_code, now.high_code)):
        return _KEPT
    return "re-scaled", abs(now.scale - trained.scale) / trained.scale


def _weight_fate(trained: WeightQuantization, now: WeightQuantization | None) -> Found:
    if now is None or now.storage != trained.storage or not now.scales:
        return _DROPPED
    if now.zero_points != trained.zero_points or now.bits < trained.bits:
        return "re-scaled", _scale_fate(trained.scales, now.scales)[1]
    return _scale_fate(trained.scales, now.scales)


def _scale_fate(trained: Sequence[float], now: Sequence[float] | Array) -> Found:
    """Compare scales: one for each channel may stand once for each of its blocks, and matrices may be transposed."""
    old, new = (np.asarray(part, np.float32) for part in (trained, now))
    if not new.size or new.size % old.size:
        return _DROPPED
    arranged = [np.repeat(old, new.size // old.size), np.tile(old, new.size // old.size)]
    shapes = [(new.shape[0], -1)] if new.ndim > 1 else []
    arranged += [old.reshape(shape[::-1]).T.ravel() for shape in shapes if old.size == new.size]
    flat = new.ravel()
    change = min(float(np.max(np.abs(flat - one) / one)) for one in arranged)
    return _KEPT if change == 0 else ("re-scaled", change)


def _activation_in(layers: LayerReport, name: str, form: _Form, in_form: Found) -> Found:
    """Return what a runtime made of an activation that the emitted form has with these numbers."""
    if in_form[0] in ("folded", "dropped"):
        return in_form
    scale = form.scale_of(name)
    for tensor in (name, *sorted(form.moved_with(name))):
        found = layers.scales.get(tensor)
        if found and scale is not None and any(np.float32(item) == scale for item in found):
            return in_form if tensor == name else _FOLDED
    if (found := layers.scales.get(name)) and scale is not None:
        change = min(abs(item - float(scale)) / float(scale) for item in found)
        return "re-scaled", max(change, in_form[1])
    return _DROPPED


@dataclass(slots=True)
class _Form:
    """An emitted graph, in which scales are looked up."""

    seen: View

    def activation(self, name: str, trained: Grid) -> Found:
        """Return what the form has of an activation's grid."""
        scale = self.scale_of(name)
        if scale is None:
            return _FOLDED if self._is_fused_into_sum(name) else _DROPPED
        node = self._quantizer(name)
        zero = self._zero_point(node) if node is not None else np.zeros((), np.int8)
        limits = np.iinfo(zero.dtype)
        if represents(trained, int(zero.reshape(-1)[0]), float(scale), (int(limits.min), int(limits.max))):
            return _KEPT
        return "re-scaled", abs(float(scale) - trained.scale) / trained.scale

    def weight(self, name: str, trained: WeightQuantization) -> Found:
        """Return what the form has of the scales of weights."""
        scales = self.seen.constants.get(f"{name}/scale")
        if scales is None:
            readers = self.seen.producers.get(name)
            if readers is not None and readers.op_type == "DequantizeLinear":
                scales = self.seen.constants.get(readers.input[1])
        if scales is not None:
            return _scale_fate(trained.scales, scales)
        stored = self.seen.constants.get(name)
        return _FOLDED if stored is not None and stored.dtype == np.float32 else _DROPPED

    def scale_of(self, name: str) -> np.float32 | None:
        """Return the scale that an activation is rounded to, or None where it is not."""
        node = self._quantizer(name)
        scale = self.seen.constants.get(node.input[1] if node is not None else f"{name}/scale")
        return None if scale is None else np.float32(scale.reshape(-1)[0])

    def moved_with(self, name: str) -> set[str]:
        """Return tensors that hold the same values in another order, by name without what emission appends."""
        found: set[str] = set()
        waiting = [name]
        while waiting:
            tensor = waiting.pop()
            if tensor in found:
                continue
            found.add(tensor)
            waiting += [out for node in self.seen.consumers.get(tensor, ()) if _moves(node) for out in node.output]
            maker = self.seen.producers.get(tensor)
            if maker is not None and _moves(maker):
                waiting.append(maker.input[0])
        return {_plain(tensor) for tensor in found} - {name}

    def _quantizer(self, name: str) -> NodeProto | None:
        """Return the QuantizeLinear that rounds a tensor."""
        made = self.seen.producers.get(name)
        if made is not None and made.op_type == "DequantizeLinear":
            made = self.seen.producers.get(made.input[0])
            if made is not None and made.op_type == "QuantizeLinear":
                return made
        for tensor in (f"{name}/float", name):
            for node in self.seen.consumers.get(tensor, ()):
                if node.op_type == "QuantizeLinear":
                    return node
        return None

    def _zero_point(self, node: NodeProto) -> Array:
        name = node.input[2] if len(node.input) > 2 else ""
        return self.seen.constants.get(name, np.zeros((), np.uint8))

    def _is_fused_into_sum(self, name: str) -> bool:
        """Whether a tensor comes from a product and goes into one Add whose other input is rounded.

        Engines add within the product there, so that the tensor has no integers of its own.
        """
        reader = self.seen.sole_consumer(name)
        while reader is not None and reader.op_type in _CLAMPS:
            name = reader.output[0]
            reader = self.seen.sole_consumer(name)
        maker = self.seen.producers.get(name)
        while maker is not None and maker.op_type in _CLAMPS:
            maker = self.seen.producers.get(maker.input[0])
        if reader is None or reader.op_type != "Add" or maker is None or maker.op_type not in _PRODUCTS:
            return False
        others = [self.seen.producers.get(item) for item in reader.input if item != name]
        return any(other is not None and other.op_type == "DequantizeLinear" for other in others)


def _moves(node: NodeProto) -> bool:
    return node.op_type in MOVES or node.op_type in ("QuantizeLinear", "DequantizeLinear")


def _plain(tensor: str) -> str:
    for suffix in ("/float", "/stored", "/dequantized"):
        tensor = tensor.removesuffix(suffix)
    return tensor
