"""The arithmetic of integer engines: exact sums of products of codes, and their way back to codes. Pure numpy.

A value that an engine holds as integers is a `Scaled`: integers, less their zero-point, times a scale. Products and
sums of codes are formed in whole numbers; how a sum becomes a code again (requantization) is where engines differ:

    exact        the rational number (integers * scale / output scale) is rounded once, half to even. No engine can do
                 better; the reference against which the others are counted.
    float32      multiplier = float32(float32(input scale * weight scale) / output scale); the sum is converted to
                 float32 and multiplied in float32. What ONNX Runtime's MLAS kernels do.
    fixed-point  the multiplier is 31 bits and a shift; doubling high multiplication, then a rounding shift, both half
                 away from zero. What gemmlowp and TFLite's reference kernels do (without TFLITE_SINGLE_ROUNDING).

Source: ONNX operators QLinearConv, ConvInteger and QuantizeLinear ("rounding half to even", "the accumulation may
overflow if and only if in 32 bits"); Jacob et al. 2018, arXiv 1712.05877, section 2.2, for the fixed-point form.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Integers = NDArray[np.int64]
Reals = NDArray[np.float64]
Arithmetic = Literal["exact", "float32", "fixed-point"]

# Two roundings of float64 move a quotient below 2**17 by less than this; what is no nearer to a half needs no proof.
_TIE_WINDOW = 2.0**-30
_FAR_BEYOND_CODES = 2.0**17
_INT32 = 2**32


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaled:
    """Integers that stand for real numbers: real = clip(integers * scale / divisor, low, high).

    Attributes:
        integers: int64, zero-point already subtracted.
        scale: float64, of no axes or of as many as `integers`; the exact product of the float32 scales that went in.
        divisor: likewise, int64: how many codes were summed where a mean is meant.
        low: a clamp that was passed on the way, in real numbers; it is applied to codes, which comes to the same.
        dtype: the float type that the graph declares for the value.
        is_stored: the integers are codes, not sums of them, so that an engine can multiply them.
    """

    integers: Integers
    scale: Reals
    divisor: Integers
    low: float = -math.inf
    high: float = math.inf
    dtype: np.dtype[Any]
    is_stored: bool

    @property
    def has_clamp(self) -> bool:
        """Whether a clamp is still to be applied."""
        return self.low != -math.inf or self.high != math.inf

    def reals(self) -> Reals:
        """Return the real numbers in float64, in which codes of 8 and 16 bits times their scale are exact."""
        return np.asarray(np.clip(self.integers * self.scale / self.divisor, self.low, self.high))


def stored(codes: Array, scale: Array, zero_point: Array | None, axis: int) -> Scaled:
    """Return what codes stand for.

    Args:
        codes: integers of any width.
        scale: a scalar, or one for each index of `axis`.
        zero_point: as `scale`; None: 0.
    """
    whole = codes.astype(np.int64)
    if zero_point is not None:
        whole -= along(zero_point, codes.ndim, axis).astype(np.int64)
    return Scaled(
        integers=whole,
        scale=along(scale, codes.ndim, axis).astype(np.float64),
        divisor=np.asarray(1, np.int64),
        dtype=scale.dtype,
        is_stored=codes.dtype.itemsize <= 2,
    )


def clamped(value: Scaled, low: float, high: float) -> Scaled:
    """Return a value whose real numbers are clipped to [low, high]."""
    if low == 0 and not value.has_clamp:  # zero lies on every grid
        return replace(value, integers=np.maximum(value.integers, 0), high=high)
    return replace(value, low=min(max(value.low, low), high), high=min(max(value.high, low), high))


def along(values: Array, axes: int, axis: int) -> Array:
    """Return one value, or one for each index of an axis, in a shape that broadcasts to `axes` axes."""
    if values.size == 1 and values.ndim < 2:
        return values.reshape(())
    if values.ndim != 1:
        return values
    return values.reshape([-1 if index == axis % axes else 1 for index in range(axes)])


def wrapped(sums: Integers) -> tuple[Integers, int]:
    """Return sums as a 32-bit accumulator holds them, and how many did not fit and were wrapped around."""
    low = np.iinfo(np.int32).min
    held = (sums - low) % _INT32 + low
    return held, int(np.count_nonzero(held != sums))


def product(left: Integers, right: Integers) -> Integers:
    """Return the exact matrix product of integers, with numpy's broadcasting.

    Floating-point products of whole numbers are exact as long as no sum can leave the significand, whatever the order
    of summation, and they are much faster than those of integers.
    """
    if not left.size or not right.size:
        return np.asarray(np.matmul(left, right))
    bound = _largest(left) * _largest(right) * left.shape[-1]
    kind = np.float32 if bound < 2**24 else np.float64 if bound < 2**53 else np.int64
    return np.asarray(np.matmul(left.astype(kind), right.astype(kind)).astype(np.int64))


def _largest(values: Integers) -> int:
    return max(abs(int(values.min())), abs(int(values.max())))


@dataclass(frozen=True, slots=True)
class Window:
    """How a kernel moves over the spatial axes, one number for each.

    Attributes:
        before: padding in front.
        after: padding behind.
        beyond: positions behind the padding that the last window covers when sizes are rounded up.
    """

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    dilations: tuple[int, ...]
    before: tuple[int, ...]
    after: tuple[int, ...]
    beyond: tuple[int, ...]

    def over(self, values: Array, fill: Any) -> Array:
        """Return a view of shape (batch, channels, *positions, *kernel) on the padded values."""
        behind = [after + beyond for after, beyond in zip(self.after, self.beyond, strict=True)]
        padding = [(0, 0), (0, 0), *zip(self.before, behind, strict=True)]
        padded = np.pad(values, padding, constant_values=fill) if any(map(any, padding)) else values
        spatial = len(self.kernel)
        spans = [(size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True)]
        view = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(2, 2 + spatial)))
        every = [slice(None, None, step) for step in (*self.strides, *self.dilations)]
        return np.asarray(view[(slice(None), slice(None), *every)])

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes of the kernel in what `over` returns."""
        return tuple(range(-len(self.kernel), 0))


def window(settings: Mapping[str, Any], sizes: Sequence[int], kernel: Sequence[int]) -> Window:
    """Read a Conv's or a pool's attributes.

    Args:
        settings: attribute → value, as in ONNX.
        sizes: of the input's spatial axes.
        kernel: of the kernel.
    """
    axes = len(kernel)
    strides = [int(step) for step in settings.get("strides") or [1] * axes]
    dilations = [int(step) for step in settings.get("dilations") or [1] * axes]
    pads = [int(pad) for pad in settings.get("pads") or [0] * (2 * axes)]
    mode = settings.get("auto_pad", b"NOTSET")
    before, after, beyond = pads[:axes], pads[axes:], [0] * axes
    for axis, (size, step) in enumerate(zip(sizes, strides, strict=True)):
        span = (kernel[axis] - 1) * dilations[axis] + 1
        if mode in (b"SAME_UPPER", b"SAME_LOWER"):
            missing = max((-(-size // step) - 1) * step + span - size, 0)
            smaller, larger = missing // 2, missing - missing // 2
            before[axis], after[axis] = (smaller, larger) if mode == b"SAME_UPPER" else (larger, smaller)
        elif mode == b"VALID":
            before[axis] = after[axis] = 0
        padded = before[axis] + size + after[axis]
        if settings.get("ceil_mode"):
            last = -(-(padded - span) // step)
            # A window that would begin behind the values and their front padding is left out.
            last -= last * step >= before[axis] + size
            beyond[axis] = max(last * step + span - padded, 0)
    return Window(*(tuple(values) for values in (map(int, kernel), strides, dilations, before, after, beyond)))


def convolution(values: Integers, weight: Integers, move: Window, groups: int) -> Integers:
    """Return the exact convolution, a matrix product for each image.

    Args:
        values: shape (batch, channels, *spatial), zero-point subtracted, so that padding is 0.
        weight: shape (filters, channels / groups, *kernel), likewise.

    Returns:
        Shape (batch, filters, *positions).
    """
    filters, depth = weight.shape[:2]
    taps = depth * math.prod(move.kernel)
    matrices = weight.reshape(groups, filters // groups, taps)
    view = move.over(values, 0)
    spatial = len(move.kernel)
    positions = view.shape[2 : 2 + spatial]
    # (channels, *positions, *kernel) -> (channels, *kernel, *positions)
    order = (0, *range(1 + spatial, 1 + 2 * spatial), *range(1, 1 + spatial))
    sums = np.empty((len(values), filters, *positions), np.int64)
    for image, patches in enumerate(view):
        columns = patches.transpose(order).reshape(groups, taps, math.prod(positions))
        sums[image] = product(matrices, columns).reshape(filters, *positions)
    return sums


def window_sums(values: Array, move: Window) -> Array:
    """Return the sum of each window, padding taken as 0."""
    return np.asarray(move.over(values, 0).sum(move.axes))


def window_counts(sizes: Sequence[int], move: Window, *, include_padding: bool) -> Integers:
    """Return how many positions each window averages over, shape (1, 1, *positions)."""
    counted = np.ones((1, 1, *sizes), np.int64)
    if include_padding:
        borders = [(0, 0), (0, 0), *zip(move.before, move.after, strict=True)]
        counted = np.pad(counted, borders, constant_values=1)
        nothing = tuple(0 for _ in move.kernel)
        move = Window(move.kernel, move.strides, move.dilations, nothing, nothing, move.beyond)
    return np.asarray(window_sums(counted, move))


def window_maxima(values: Array, move: Window) -> Array:
    """Return the largest value of each window; padding is never it."""
    lowest = np.iinfo(values.dtype).min if values.dtype.kind in "iu" else -np.inf
    return np.asarray(move.over(values, lowest).max(move.axes))


def requantized(
    value: Scaled, scale: Array, zero_point: Array, dtype: np.dtype[Any], arithmetic: Arithmetic = "exact"
) -> Array:
    """Return a value as codes: round(real / scale) + zero_point, saturated.

    Args:
        scale: of the codes, broadcasting with the value.
        zero_point: likewise.
        dtype: of the codes.
        arithmetic: how the quotient is formed, see the head of this file.
    """
    step = scale.astype(np.float64)
    steps: Array
    if arithmetic == "exact":
        steps = _rounded_quotient(value.integers, value.scale, value.divisor * step)
    elif arithmetic == "float32":
        factor = value.scale.astype(np.float32) / (value.divisor * step).astype(np.float32)
        steps = np.rint(value.integers.astype(np.float32) * factor)
    else:
        steps = fixed_point_product(value.integers, *fixed_point_factor(value.scale / (value.divisor * step)))
    codes = saturated(steps, zero_point, dtype)
    if not value.has_clamp:
        return codes
    # Rounding and saturating are monotone: to clamp the codes is to clamp the values.
    low, high = (saturated(np.rint(bound / step), zero_point, dtype) for bound in (value.low, value.high))
    return np.asarray(np.clip(codes, low, high).astype(dtype))


def quantized(values: Array, scale: Array, zero_point: Array, dtype: np.dtype[Any]) -> Array:
    """Return floats as codes: round(values / scale) + zero_point, saturated; the quotient in the floats' own type.

    Source: ONNX QuantizeLinear, which divides in the type of its input.
    """
    return saturated(np.rint(values / scale.astype(values.dtype)), zero_point, dtype)


def saturated(steps: Array, zero_point: Array, dtype: np.dtype[Any]) -> Array:
    """Return whole numbers of steps from zero as codes; what a type cannot hold becomes its nearest code."""
    limits = np.iinfo(dtype)
    codes = np.clip(steps.astype(np.float64) + zero_point.astype(np.float64), limits.min, limits.max)
    return np.asarray(codes.astype(dtype))


def _rounded_quotient(integers: Integers, numerator: Reals, denominator: Reals) -> Reals:
    """Return integers * numerator / denominator, each rounded once to the nearest whole number, half to even.

    float64 rounds twice before the quotient is rounded to a whole number, which can only matter next to a half: there
    the rational numbers themselves decide.
    """
    quotient = integers * numerator / denominator
    whole = np.rint(quotient)
    is_near = (np.abs(np.abs(quotient - whole) - 0.5) < _TIE_WINDOW) & (np.abs(quotient) < _FAR_BEYOND_CODES)
    if is_near.any():
        rows = [np.broadcast_to(part, whole.shape)[is_near] for part in (integers, numerator, denominator)]
        keys, places = np.unique(np.stack([row.astype(np.float64) for row in rows]), axis=1, return_inverse=True)
        decided = [round(Fraction(int(k)) * Fraction(n) / Fraction(d)) for k, n, d in keys.T.tolist()]
        whole[is_near] = np.asarray(decided, np.float64)[places.ravel()]
    return np.asarray(whole)


def fixed_point_factor(factor: Reals) -> tuple[Integers, Integers]:
    """Return a positive factor as (multiplier, exponent): factor ~ multiplier * 2**(exponent - 31).

    Returns:
        multiplier: in [2**30, 2**31); 0 where the factor is too small to matter, below 2**-32.
        exponent: in [-31, 30]; factors of 2**30 and more, which no pair of grids has, become the largest that there is.

    Source: TFLite `QuantizeMultiplier` (tensorflow/lite/kernels/internal/quantization_util.cc).
    """
    fraction, exponent = np.frexp(factor)
    multiplier = np.floor(fraction * 2.0**31 + 0.5).astype(np.int64)
    is_full = multiplier == 2**31
    multiplier = np.where(is_full, 2**30, multiplier)
    exponent = exponent.astype(np.int64) + is_full
    multiplier = np.where(exponent < -31, 0, np.where(exponent > 30, 2**31 - 1, multiplier))
    return multiplier, np.clip(exponent, -31, 30)


def fixed_point_product(integers: Integers, multiplier: Integers, exponent: Integers) -> Integers:
    """Return integers * multiplier * 2**(exponent - 31) as 32-bit engines form it.

    Source: TFLite `MultiplyByQuantizedMultiplier` and gemmlowp's `SaturatingRoundingDoublingHighMul` and
    `RoundingDivideByPOT`: the doubling high product is rounded half away from zero, the shift likewise.
    """
    limit = np.iinfo(np.int32).max
    shifted = np.clip(integers << np.maximum(exponent, 0), -limit - 1, limit)
    doubled = shifted * multiplier
    nudged = doubled + np.where(doubled >= 0, 2**30, 1 - 2**30)
    # C++ divides towards zero.
    high = np.sign(nudged) * (np.abs(nudged) >> 31)
    shift = np.maximum(-exponent, 0)
    mask = (1 << shift) - 1
    threshold = (mask >> 1) + (high < 0)
    return np.asarray((high >> shift) + ((high & mask) > threshold))
