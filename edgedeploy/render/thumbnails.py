"""A sample as a small picture in a data URI: PNG, written with zlib. Pure."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from edgedeploy.records.model import TensorSpec

# Of a side, in pixels: enough to see what it is; two dozen of them weigh less than 300 kB.
SIDE = 64
_SMALLEST = 4


def thumbnail(tensors: Mapping[str, Any], specs: Sequence[TensorSpec] = ()) -> str:
    """Return a sample as a data URI; "" where it is no image of one or three channels.

    Args:
        tensors: input → values of one sample, with or without a first axis of 1.
        specs: the model's inputs, for their layout; where they do not say, an axis of 1 or 3 is the channels.
    """
    layouts = {spec.name: spec.layout for spec in specs}
    for name, values in tensors.items():
        pixels = _pixels(values, layouts.get(name, ""))
        if pixels is not None:
            return f"data:image/png;base64,{base64.b64encode(_png(_shrunk(pixels))).decode()}"
    return ""


def _pixels(values: Any, layout: str) -> Any:
    """Return uint8 of (height, width, channels), or None."""
    import numpy

    array = numpy.asarray(values)
    if array.ndim == 4 and array.shape[0] == 1:
        array = array[0]
    if array.ndim != 3 or array.dtype.kind not in "fui":
        return None
    axes = layout.upper().removeprefix("N")
    is_first = axes == "CHW" if axes in ("CHW", "HWC") else array.shape[0] in (1, 3)
    if is_first:
        array = array.transpose(1, 2, 0)
    if array.shape[2] not in (1, 3) or min(array.shape[:2]) < _SMALLEST:
        return None
    if array.dtype == numpy.uint8:
        return array
    return _stretched(array.astype(numpy.float64))


def _stretched(array: Any) -> Any:
    """Return numbers of any range, as preparation leaves them, stretched to 0..255."""
    import numpy

    low, high = float(array.min()), float(array.max())
    if not (numpy.isfinite(low) and numpy.isfinite(high)) or high == low:
        return numpy.zeros(array.shape, numpy.uint8)
    return numpy.rint((array - low) / (high - low) * 255).astype(numpy.uint8)


def _shrunk(pixels: Any) -> Any:
    """Return an image no side of which is longer than SIDE: the mean of each square of pixels."""
    import numpy

    factor = -(-max(pixels.shape[:2]) // SIDE)
    if factor == 1:
        return pixels
    # An edge that does not fill a square is repeated until it does.
    rows, columns = (-(-length // factor) * factor for length in pixels.shape[:2])
    padding = ((0, rows - pixels.shape[0]), (0, columns - pixels.shape[1]), (0, 0))
    whole = numpy.pad(pixels.astype(numpy.float64), padding, mode="edge")
    squares = whole.reshape(rows // factor, factor, columns // factor, factor, pixels.shape[2])
    return numpy.rint(squares.mean(axis=(1, 3))).astype(numpy.uint8)


def _png(pixels: Any) -> bytes:
    """Encode 8-bit grey or RGB. Source: W3C, Portable Network Graphics (Third Edition), §5 and §11."""
    height, width, channels = pixels.shape
    header = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
