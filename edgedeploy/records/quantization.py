"""The single source of quantization truth: ranges, weight scales, what is quantized, and each number's origin."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record

# History of edgedeploy.quantization:
#   1 (0.1.0)  first version
FORMAT = "edgedeploy.quantization/1"


class ActivationRange(Record, frozen=True, kw_only=True):
    """The real values that a float tensor takes; each back end turns it into a scale and zero-point by its own rules.

    Attributes:
        low: smallest value to represent (<= 0 after widening to contain zero, which every back end needs).
        high: largest value to represent (>= 0).
        origin: "calibrated" (observed) or "trained" (from quantization-aware training).
    """

    low: float
    high: float
    origin: Literal["calibrated", "trained"]


class WeightQuantization(Record, frozen=True, kw_only=True):
    """Symmetric integer weights: real = scale * q, q in [-127, 127] (8 bits), zero-point 0.

    Attributes:
        axis: the output-channel axis of `scales`, None for one scale per tensor.
        scales: one per channel along `axis`, or one.
    """

    bits: int = 8
    axis: int | None
    scales: tuple[float, ...]
    origin: Literal["max-abs", "trained"]


class QuantizationTable(Record, frozen=True, kw_only=True):
    """Everything that is needed to emit any back end's int8 form of one canonical fp32 model.

    Attributes:
        model_sha256: the canonical fp32 ONNX that the tensor names refer to.
        calibration: name of the calibration set; calibration_sha256 pins its bytes.
        nodes: names of the nodes that are quantized; every other node stays float.
        activations: tensor name → range.
        weights: initializer name → integer grid.
        bias_deltas: initializer name → correction, added to the float bias before quantization.
    """

    format: str = FORMAT
    model_sha256: str
    calibration: str
    calibration_sha256: str
    samples: int
    method: str
    nodes: tuple[str, ...]
    activations: dict[str, ActivationRange]
    weights: dict[str, WeightQuantization]
    bias_deltas: dict[str, tuple[float, ...]] = {}
