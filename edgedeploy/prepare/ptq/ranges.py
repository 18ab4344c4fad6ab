"""How an activation's range is chosen from its statistics. Pure: no I/O, no clock, no randomness.

A range that leaves out rare large values gives all others a finer grid. The range is never wider than what was seen,
and a tensor behind a Relu or Clip is seen within its limits, so a choice never undoes a clamp.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.prepare.ptq.statistics import Statistics
from edgedeploy.records.quantization import ActivationRange, QuantizationPolicy
from edgedeploy.records.target import QuantizationRules

Floats = NDArray[np.float64]

# How many ends of a range are tried on each side, evenly from nothing to what was seen.
_STEPS = 128
# Integer steps on each side of zero of a symmetric 8-bit grid, and in an asymmetric one.
_SYMMETRIC_STEPS, _STEPS_IN_ALL = 127, 255
# Kullback-Leibler divergence looks at this many thresholds; TensorRT's own calibrator looks at every bin of 2,048.
_THRESHOLDS = 120


def activation_range(seen: Statistics, rules: QuantizationRules, policy: QuantizationPolicy) -> ActivationRange:
    """Return the range that a policy chooses for a tensor.

    Args:
        seen: the tensor's statistics.
        rules: whether the grid is symmetric, which decides what a wider range costs.
        policy: `ranges` and `percentile`.
    """
    low, high = seen.low, seen.high
    if seen.counts.any():
        if policy.ranges == "mse":
            low, high = _least_squares(seen, is_symmetric=rules.activation_symmetric)
        elif policy.ranges == "percentile":
            low, high = _within(seen, percentile(seen, policy.percentile))
        elif policy.ranges == "entropy":
            low, high = _within(seen, _least_divergence(seen, is_symmetric=rules.activation_symmetric))
    return ActivationRange(low=float(low), high=float(high), origin="calibrated")


def percentile(seen: Statistics, percent: float) -> float:
    """Return the |value| that `percent` of all values do not exceed, to the width of a bin."""
    order = np.argsort(np.abs(seen.centers))
    reached = seen.zeros + np.cumsum(seen.counts[order])
    place = int(np.searchsorted(reached, percent / 100 * reached[-1]))
    half = (seen.high - seen.low) / len(seen.counts) / 2
    return float(np.abs(seen.centers[order][min(place, len(order) - 1)]) + half)


def squared_error(seen: Statistics, lows: Floats, highs: Floats, steps: Floats) -> Floats:
    """Return what grids between `lows` and `highs` lose in all: step² / 12 for a value inside, the excess² outside.

    Zeros are exact on every grid and cost nothing. Source: the uniform-noise model of rounding (Bennett 1948).

    Args:
        lows: lower ends <= 0. highs: upper ends >= 0. steps: width of one integer step. All broadcast together.
    """
    centers, counts = seen.centers, seen.counts.astype(np.float64)
    # Sums of 1, x and x² over all bins up to each: the clipped tails' errors then cost two look-ups.
    sums = [np.concatenate([[0.0], np.cumsum(counts * centers**power)]) for power in range(3)]
    below, above = np.searchsorted(centers, lows), np.searchsorted(centers, highs, side="right")
    tail_low = sums[2][below] - 2 * lows * sums[1][below] + lows**2 * sums[0][below]
    rest = [total[-1] - total[above] for total in sums]
    tail_high = rest[2] - 2 * highs * rest[1] + highs**2 * rest[0]
    inside = sums[0][above] - sums[0][below]
    lost: Floats = inside * steps**2 / 12 + np.maximum(tail_low, 0) + np.maximum(tail_high, 0)
    return lost


def _least_squares(seen: Statistics, *, is_symmetric: bool) -> tuple[float, float]:
    parts = np.arange(1, _STEPS + 1) / _STEPS
    if is_symmetric:
        ends = parts * max(-seen.low, seen.high)
        lows, highs = np.maximum(-ends, seen.low), np.minimum(ends, seen.high)
        best = int(np.argmin(squared_error(seen, lows, highs, ends / _SYMMETRIC_STEPS)))
        return float(lows[best]), float(highs[best])
    lows, highs = np.meshgrid(
        seen.low * parts if seen.low < 0 else np.zeros(1),
        seen.high * parts if seen.high > 0 else np.zeros(1),
        indexing="ij",
    )
    best = int(np.argmin(squared_error(seen, lows, highs, (highs - lows) / _STEPS_IN_ALL)))
    return float(lows.ravel()[best]), float(highs.ravel()[best])


def _within(seen: Statistics, threshold: float) -> tuple[float, float]:
    return max(seen.low, -threshold), min(seen.high, threshold)


def _least_divergence(seen: Statistics, *, is_symmetric: bool) -> float:
    """Return the threshold of |value| whose 8-bit histogram diverges least from the whole one.

    Source: Migacz 2017, "8-bit inference with TensorRT": values beyond the threshold are counted in the last bin of the
    reference, the bins are merged into as many as there are integers, and spread again over those that were not empty.
    """
    size = len(seen.counts)
    peak = max(-seen.low, seen.high)
    places = np.minimum((np.abs(seen.centers) / peak * size).astype(int), size - 1)
    magnitudes = np.bincount(places, weights=seen.counts, minlength=size)
    # A grid that is symmetric, or must hold both signs, has half of its integers for magnitudes.
    levels = 128 if is_symmetric or (seen.low < 0 < seen.high) else 256
    thresholds = np.unique(np.linspace(levels, size, _THRESHOLDS).astype(int))
    best = int(np.argmin([_divergence(magnitudes, int(end), levels) for end in thresholds]))
    return float(peak * thresholds[best] / size)


def _divergence(magnitudes: NDArray[Any], end: int, levels: int) -> float:
    reference = magnitudes[:end].astype(np.float64).copy()
    is_filled = reference > 0
    merged_into = np.arange(end) * levels // end
    totals = np.bincount(merged_into, weights=reference, minlength=levels)
    filled = np.bincount(merged_into, weights=is_filled, minlength=levels)
    spread = np.where(is_filled, (totals / np.maximum(filled, 1))[merged_into], 0.0)
    reference[-1] += magnitudes[end:].sum()
    if spread.sum() == 0:
        return float("inf")
    p, q = reference / reference.sum(), spread / spread.sum()
    # Values that the merged histogram gives no place to cost as much as one count in a million would.
    return float(np.sum(p[p > 0] * np.log(p[p > 0] / np.maximum(q[p > 0], 1e-6))))
