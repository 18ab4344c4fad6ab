"""The single source of quantization truth: ranges, weight scales, what is quantized, and each number's origin."""

from __future__ import annotations

from typing import Literal

from edgedeploy.documents import Record

# History of edgedeploy.quantization:
#   1 (0.1.0)  first version
#   2 (0.2.0)  trained grids, weights in blocks and in short floats, chosen rounding, dynamic activations
FORMAT = "edgedeploy.quantization/2"


class Grid(Record, frozen=True, kw_only=True):
    """real = scale * (code - zero_point), with codes clamped to [low_code, high_code]."""

    scale: float
    zero_point: int
    low_code: int
    high_code: int


class ActivationRange(Record, frozen=True, kw_only=True):
    """The real values that a float tensor takes; each back end turns it into a scale and zero-point by its own rules.

    Attributes:
        low: smallest value to represent (<= 0 after widening to contain zero, which every back end needs).
        high: largest value to represent (>= 0).
        origin: "calibrated" (observed) or "trained" (came with the model: QAT, or PTQ done before us).
        grid: the source's own grid, which is kept exactly wherever a back end's rules allow; None when calibrated.
    """

    low: float
    high: float
    origin: Literal["calibrated", "trained"]
    grid: Grid | None = None


class WeightQuantization(Record, frozen=True, kw_only=True):
    """How a float initializer is stored: real = scale * (code - zero_point).

    Codes of ours lie in [-(2**(bits-1)-1), 2**(bits-1)-1]; trained ones may be -2**(bits-1) too. Unsigned sources are
    shifted by 2**(bits-1).

    Attributes:
        axis: the output-channel axis of `scales`, None for one scale per tensor.
        block: how many neighbours along the other (input) axis share a scale; 0: all of them. With blocks `scales` is
            the flattened (channels, blocks) matrix. Blocks occur in matrices only.
        scales: one per channel along `axis`, or one; empty for a short float without a scale.
        zero_points: likewise; empty: all 0 (symmetric).
        storage: "integer", or a short float that the values are stored in, times the scale where there is one.
        rounding: how the codes were chosen: "" by rounding to nearest, else base64 of the zlib-compressed packed bits
            (numpy.packbits, C order), one for each weight: 1 = floor(weight / scale) + 1, 0 = floor(weight / scale).
    """

    bits: int = 8
    axis: int | None
    block: int = 0
    scales: tuple[float, ...]
    zero_points: tuple[int, ...] = ()
    storage: Literal["integer", "float16", "bfloat16", "float8e4m3fn"] = "integer"
    origin: Literal["max-abs", "mse", "trained"]
    rounding: str = ""


class DynamicActivation(Record, frozen=True, kw_only=True):
    """An activation that is quantized anew in each inference, from the values that it has then."""

    bits: int = 8
    symmetric: bool
    per_token: bool


class SourceQuantization(Record, frozen=True, kw_only=True):
    """The quantization that a model carried when it came, in the names of its canonical fp32 ONNX.

    Attributes:
        activations: tensor name → range, with the source's grid, origin "trained".
        weights: initializer name → integer grid, origin "trained". The fp32 initializer holds exactly the values that
            the source's integers stand for.
        dynamic: initializer name → how the node that reads these weights quantizes its other input.
        bias_codes: names of float biases that the source stores as integers.
    """

    activations: dict[str, ActivationRange] = {}
    weights: dict[str, WeightQuantization] = {}
    dynamic: dict[str, DynamicActivation] = {}
    bias_codes: tuple[str, ...] = ()


class QuantizationPolicy(Record, frozen=True, kw_only=True):
    """How a float model is quantized after training: `-Q key=value`, or [quantization] in the release file.

    Nothing in it is drawn at random: the same model, samples and policy give the same table.

    Attributes:
        ranges: how an activation's range is chosen from what was seen on calibration samples.
        percentile: of |values|, for ranges = "percentile".
        bias_correction: add what rounding the weights loses on average to the bias.
        equalize: rescale channels of neighbouring layers so that their weights fill the grid alike.
        rounding: each weight to its nearest code, or up or down as reconstructs its layer best on calibration samples.
        budget_db: leave layers in float, those that hurt most for their bytes first, until the outputs reach this ratio
            of signal to quantization noise on calibration samples; None: all layers are quantized.
        max_float_layers: where `budget_db` gives up.
        float_layers: names of nodes that stay float in any case.
    """

    ranges: Literal["mse", "min-max", "percentile", "entropy"] = "mse"
    percentile: float = 99.99
    bias_correction: bool = True
    equalize: bool = True
    rounding: Literal["nearest", "adaround"] = "adaround"
    budget_db: float | None = None
    max_float_layers: int = 16
    float_layers: tuple[str, ...] = ()


class QuantizationTable(Record, frozen=True, kw_only=True):
    """Everything that is needed to emit any back end's int8 form of one canonical fp32 model.

    Attributes:
        model_sha256: the canonical fp32 ONNX that the tensor names refer to.
        calibration: name of the calibration set, "" when every number is the source's; calibration_sha256 pins it.
        nodes: names of the nodes that are quantized; every other node stays float.
        activations: tensor name → range.
        weights: initializer name → integer grid. Weights whose node is not in `nodes` are stored so and computed with
            in float (weight-only quantization).
        dynamic: initializer name → how the node that reads these weights quantizes its other input.
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
    dynamic: dict[str, DynamicActivation] = {}
    bias_deltas: dict[str, tuple[float, ...]] = {}
