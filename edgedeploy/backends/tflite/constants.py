"""Finds a form's integer weights among the constants of a converted file, by their values.

A converter turns weights, splits them into groups and gives them names of its own; it does not change a value. The
float weights of a form are exactly what its integers stand for, so equal values are equal weights, and the integers are
found again by dividing by the scale.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import CompileError

if TYPE_CHECKING:
    from edgedeploy.backends.qdq import StoredWeights

# How far, in codes, value / scale may lie from a whole number: three roundings of float32.
_EXACT = 1e-3
# "int8 weights ... restricted range [-127, 127]" (LiteRT 8-bit quantization specification).
_LARGEST = 127


@dataclass(frozen=True, slots=True, eq=False)
class IntegerWeights:
    """A constant of the file as integers with zero-point 0.

    Attributes:
        names: the initializers that it holds, or holds parts of.
        codes: int8, in the constant's own shape.
        scales: one, or one for each channel along `axis`.
        axis: of the constant.
    """

    names: tuple[str, ...]
    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    axis: int


class KnownWeights:
    """The integer weights of a form, by their values as a whole and channel by channel."""

    def __init__(self, weights: Mapping[str, StoredWeights]) -> None:
        """Index the weights by what they stand for."""
        self._whole: dict[bytes, list[str]] = {}
        self._channels: dict[bytes, list[tuple[str, np.float32]]] = {}
        self._weights = weights
        for name, stored in weights.items():
            values = _values(stored)
            self._whole.setdefault(fingerprint(values), []).append(name)
            if stored.axis is not None and stored.scales.ndim == 1:
                for channel, scale in zip(np.moveaxis(values, stored.axis, 0), stored.scales, strict=True):
                    self._channels.setdefault(fingerprint(channel), []).append((name, scale))

    def find(self, constant: NDArray[Any], axis: int) -> IntegerWeights | None:
        """Return a constant's integers with its scales along an axis, None where it is none of the form's weights."""
        if constant.dtype != np.float32 or not constant.size:
            return None
        for name in self._whole.get(fingerprint(constant), ()):
            scales = self._weights[name].scales
            if scales.ndim == 1 and len(scales) in (1, constant.shape[axis]):
                found = _codes(constant, scales, axis, (name,))
                if found is not None:
                    return found
        return self._by_channels(constant, axis)

    def find_anywhere(self, constant: NDArray[Any]) -> IntegerWeights | None:
        """Return a constant's integers with scales along whichever of its axes has them."""
        found = (self.find(constant, axis) for axis in range(constant.ndim))
        return next((item for item in found if item is not None), None)

    def _by_channels(self, constant: NDArray[Any], axis: int) -> IntegerWeights | None:
        """Put weights together from channels: those of one group of a convolution, or in another order."""
        scales, names = [], []
        for channel in np.moveaxis(constant, axis, 0):
            matches = self._channels.get(fingerprint(channel))
            if matches is None:
                return None
            name, scale = next((item for item in matches if item[0] in names), matches[0])
            names.append(name)
            scales.append(scale)
        return _codes(constant, np.asarray(scales, np.float32), axis, tuple(dict.fromkeys(names)))


def _values(stored: StoredWeights) -> NDArray[np.float32]:
    """Return what integers stand for, as qdq.read_form computes it: float32 throughout."""
    if stored.scales.ndim > 1:  # blocks: no channel has one scale, and TFLite's kernels have none for blocks
        return np.zeros(0, np.float32)
    shape = [1] * stored.codes.ndim
    if stored.axis is not None:
        shape[stored.axis] = -1
    points, scales = (np.asarray(item).reshape(shape) for item in (stored.zero_points, stored.scales))
    return np.asarray((stored.codes.astype(np.int32) - points).astype(np.float32) * scales, np.float32)


def fingerprint(values: NDArray[Any]) -> bytes:
    """Return what arrays with the same values in any order have in common; 0 and -0 are the same value."""
    ordered = np.sort(values.astype(np.float32), axis=None) + np.float32(0)
    return hashlib.sha256(ordered.tobytes()).digest()


def _codes(
    constant: NDArray[Any], scales: NDArray[np.float32], axis: int, names: tuple[str, ...]
) -> IntegerWeights | None:
    shape = [1] * constant.ndim
    shape[axis] = len(scales)
    quotients = constant.astype(np.float64) / np.asarray(scales, np.float64).reshape(shape)
    codes = np.rint(quotients)
    if np.abs(quotients - codes).max() > _EXACT:
        return None
    if np.abs(codes).max() > _LARGEST:
        raise CompileError(
            f"the weights {names[0]!r} have the integer {int(codes.flat[np.abs(codes).argmax()])} around their "
            f"zero-point, and TFLite's kernels take -{_LARGEST} to {_LARGEST}, two of which they add in 16 bits",
            backend="tflite",
            hint="quantize the weights symmetrically, without -128",
        )
    return IntegerWeights(names, codes.astype(np.int8), scales, axis)
