"""The arithmetic of integer grids: scales and zero-points from ranges, weights to integers and back. Pure."""

from __future__ import annotations

import base64
import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import DocumentError
from edgedeploy.records.quantization import ActivationRange, WeightQuantization
from edgedeploy.records.target import QuantizationRules

Array = NDArray[Any]

# A bias is stored as int32 at input scale times weight scale. Half of the type is left free for the sums added to it.
_MAX_BIAS = 2**30


@dataclass(frozen=True, slots=True)
class ActivationGrid:
    """real = scale * (integer - zero_point).

    Attributes:
        scale: a float32 value, as files store it.
        dtype: of the integers.
    """

    scale: float
    zero_point: int
    dtype: np.dtype[Any]


def activation_grid(values: ActivationRange, rules: QuantizationRules) -> ActivationGrid:
    """Return the grid that represents a range, zero included, by a target's rules."""
    dtype = np.dtype(rules.activation_dtype)
    lowest, highest = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    low, high = min(values.low, 0.0), max(values.high, 0.0)
    if rules.activation_symmetric:
        zero_point = (lowest + highest + 1) // 2
        scale = _scale(max(-low, high) / (highest - zero_point))
    else:
        scale = _scale((high - low) / (highest - lowest))
        zero_point = int(np.clip(round(lowest - low / scale), lowest, highest))
    return ActivationGrid(scale, zero_point, dtype)


def largest_weight(bits: int) -> int:
    """Return the largest integer of a symmetric weight grid: 127 for 8 bits, 63 for 7."""
    return int(2 ** (bits - 1)) - 1


def weight_scales(weight: Array, *, axis: int | None, bits: int, bias: Array | None, input_scale: float) -> Array:
    """Return max-abs scales, one per channel of `axis` or one in all.

    A channel whose weights are all but zero gets a larger scale than they need, so that its bias still fits int32.
    """
    magnitude = np.abs(weight.astype(np.float64))
    largest = magnitude.max() if axis is None else magnitude.max(axis=_others(weight, axis))
    scales = np.atleast_1d(largest / largest_weight(bits))
    if bias is not None:
        needed = smallest_scales(bias, input_scale)
        scales = np.maximum(scales, needed.max() if axis is None else needed)
    scales = np.maximum(np.where(scales > 0, scales, 1.0), np.finfo(np.float32).tiny)
    return np.asarray(scales, np.float32)


def smallest_scales(bias: Array, input_scale: float) -> Array:
    """Return the weight scale that each element of a bias needs at least, so that it fits int32."""
    return np.asarray(np.abs(bias.astype(np.float64)) / (input_scale * _MAX_BIAS))


def integers(weight: Array, grid: WeightQuantization) -> NDArray[np.int8]:
    """Return weights as integers of a symmetric grid, each rounded to nearest even or as the grid says.

    Raises:
        DocumentError: the grid's rounding is not one bit for each of these weights.
    """
    limit = largest_weight(grid.bits)
    exact = weight / spread(weight, grid)
    codes = np.floor(exact) + rounding_bits(grid.rounding, weight.shape) if grid.rounding else np.rint(exact)
    return np.asarray(np.clip(codes, -limit, limit), np.int8)


def rounding_text(is_up: NDArray[np.bool_]) -> str:
    """Return chosen roundings as `WeightQuantization.rounding` holds them: 1 for up, in C order."""
    # The bits of well-chosen roundings look random: a higher level of compression saves nothing.
    return base64.b64encode(zlib.compress(np.packbits(is_up).tobytes(), 1)).decode()


def rounding_bits(text: str, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Return which weights are rounded up.

    Raises:
        DocumentError: damaged, or not one bit for each weight.
    """
    count = math.prod(shape)
    reader = zlib.decompressobj()
    try:
        # No more than is needed is unpacked, whatever the text promises.
        packed = reader.decompress(base64.b64decode(text, validate=True), count // 8 + 2)
    except (ValueError, zlib.error) as error:
        raise DocumentError(f"the rounding of weights in a quantization table is damaged: {error}") from error
    if len(packed) != (count + 7) // 8 or not reader.eof:
        raise DocumentError(
            f"a quantization table holds {'more' if len(packed) > count // 8 else 'fewer'} than one rounding for each "
            f"of {count} weights; quantize the model again"
        )
    return np.unpackbits(np.frombuffer(packed, np.uint8), count=count).astype(np.bool_).reshape(shape)


def rounded(weight: Array, grid: WeightQuantization) -> Array:
    """Return the float32 weights that the integers stand for."""
    return (integers(weight, grid).astype(np.float32) * spread(weight, grid)).astype(np.float32)


def spread(weight: Array, grid: WeightQuantization) -> Array:
    """Return a grid's scales in a shape that multiplies with the weights."""
    scales = np.asarray(grid.scales, np.float32)
    if grid.axis is None:
        return scales.reshape(())
    shaped: Array = scales.reshape([-1 if axis == grid.axis else 1 for axis in range(weight.ndim)])
    return shaped


def bias_integers(bias: Array, input_scale: float, grid: WeightQuantization) -> NDArray[np.int32]:
    """Return a bias as int32 at input scale times weight scale."""
    scales = np.float64(input_scale) * np.asarray(grid.scales, np.float64)
    return np.clip(np.rint(bias.astype(np.float64) / scales), -(2**31), 2**31 - 1).astype(np.int32)


def _scale(value: float) -> float:
    # An empty range (a tensor that is always zero) has any scale; one keeps the numbers ordinary.
    scale = np.float32(value)
    return float(scale) if scale >= np.finfo(np.float32).tiny else 1.0


def _others(weight: Array, axis: int) -> tuple[int, ...]:
    return tuple(index for index in range(weight.ndim) if index != axis)
