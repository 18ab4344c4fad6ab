"""Our scales and codes in a .mnn file: what the converter is told, what is put right after it.

The converter's compression parameters are a JSON of MNN.Compression.Pipeline (MNN_compression.proto). A layer with
ranges for its input and output is computed on integers; one with weights alone is stored in 8 bits and computed in
float, with scales that the converter derives anew, which are therefore overwritten by the form's own afterwards.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.backends.mnn.contents import Contents, Operator, Weights, read_contents
from edgedeploy.backends.mnn.rewrites import Prepared, Product, signed_shift
from edgedeploy.backends.qdq import StoredWeights
from edgedeploy.errors import CompileError
from edgedeploy.records.model import TensorSpec
from edgedeploy.records.quantization import Grid

Codes = NDArray[np.int8]

# Stands where the converter wants an output and there is none to match: no tensor has this name.
_NO_TENSOR = "no tensor"
_CODES = 128


def compression_parameters(contents: Contents, prepared: Prepared) -> dict[str, Any]:
    """Return the JSON for the converter.

    Args:
        contents: the same graph converted as float: what MNN calls its operators and tensors.
        prepared: the numbers.
    """
    layers = []
    for operator, product in _matched(contents, prepared):
        if product.stored is None:
            continue
        if product.is_quantized:
            layers.append(_integer_layer(contents, operator, product, prepared.activations))
        elif _fits_file(operator, product):
            layers.append(_stored_layer(operator, product.stored))
    return {"version": contents.version, "algo": [{"type": "QUANTIZE", "quantParams": {"layer": layers}}]}


def _matched(contents: Contents, prepared: Prepared) -> list[tuple[Operator, Product]]:
    pairs = [(item, prepared.products.get(item.name)) for item in contents.operators if item.kind]
    return [(operator, product) for operator, product in pairs if product is not None]


def _integer_layer(contents: Contents, operator: Operator, product: Product, grids: dict[str, Grid]) -> dict[str, Any]:
    assert product.stored is not None
    return {
        "opName": operator.name,
        "input": [_range(contents.tensors[operator.inputs[0]], grids[product.source])],
        "output": [_range(contents.tensors[operator.outputs[0]], grids[product.result])],
        "weight": [
            {
                "name": operator.name,
                "bits": 8,
                "scales": [float(scale) for scale in _row_scales(product.stored)],
                "clampMin": -_CODES,
                "clampMax": _CODES - 1,
                "asymmetric": False,
            }
        ],
    }


def _range(name: str, grid: Grid) -> dict[str, Any]:
    shift = signed_shift(grid)
    return {
        "name": name,
        "bits": 8,
        "scales": [grid.scale],
        "zeroPoint": grid.zero_point - shift,
        "clampMin": grid.low_code - shift,
        "clampMax": grid.high_code - shift,
    }


def _row_scales(stored: StoredWeights) -> NDArray[np.float32]:
    return np.broadcast_to(stored.scales.reshape(-1), (stored.codes.shape[0],)).astype(np.float32)


def stays_small(product: Product) -> bool:
    """Whether MNN stores a product's integers without changing a value: one grid for each output channel."""
    stored = product.stored
    if stored is None or stored.block or stored.axis not in (None, 0):
        return False
    return product.op != "ConvTranspose" and stored.codes.ndim in (2, 4)


def _fits_file(operator: Operator, product: Product) -> bool:
    return operator.kind in ("Convolution", "ConvolutionDepthwise") and stays_small(product)


def _stored_layer(operator: Operator, stored: StoredWeights) -> dict[str, Any]:
    return {
        "opName": operator.name,
        "output": [{"name": _NO_TENSOR, "scales": [1.0]}],
        "weight": [{"name": operator.name, "bits": 8, "asymmetric": bool(stored.zero_points.any())}],
    }


def with_our_numbers(data: bytes, prepared: Prepared) -> bytes:
    """Return the file with the form's own codes and scales in it, and demand that all of them are there.

    Raises:
        CompileError: an operator whose integers the converter lost, or changed in a way that cannot be undone.
    """
    contents = read_contents(data)
    changed = bytearray(data)
    seen: list[Product] = []
    for operator, product in _matched(contents, prepared):
        if product.stored is None:
            continue
        seen.append(product)
        if not product.is_quantized and not _fits_file(operator, product):
            continue
        _put_weights(changed, operator, product)
        if product.is_quantized:
            _demand_ranges(contents, operator, product, prepared.activations)
    lost = [item for item in prepared.products.values() if item.is_quantized and all(item is not one for one in seen)]
    if lost:
        raise CompileError(
            "its converter made something else of it, which computes in float",
            backend="mnn", node=lost[0].node, op=lost[0].op, hint="leave it in float (-Q float_layers)",
        )  # fmt: skip
    return bytes(changed)


def _put_weights(changed: bytearray, operator: Operator, product: Product) -> None:
    assert product.stored is not None
    weights, stored = operator.weights, product.stored
    codes = stored.codes.reshape(stored.codes.shape[0], -1)
    if weights is None or weights.codes is None or weights.codes.shape != codes.shape:
        raise _changed(product, "lost its integer weights")
    scales = _file_scales(stored)
    if np.array_equal(weights.codes, codes) and np.array_equal(weights.scales, scales):
        return
    _demand_same_layout(product, weights, weights.codes, codes)
    if weights.codes_place is None or weights.scales.shape != scales.shape:
        raise _changed(product, "stores its integer weights in another way than was asked for")
    written = (codes.astype(np.int16) + weights.codes_offset).astype(np.uint8).tobytes()
    changed[weights.codes_place : weights.codes_place + len(written)] = written
    changed[weights.scales_place : weights.scales_place + scales.nbytes] = scales.astype("<f4").tobytes()


def _file_scales(stored: StoredWeights) -> NDArray[np.float32]:
    """Return one scale per channel, or the smallest value and the step of each where there are zero-points.

    real = scale * (code - zero_point) = smallest + scale * (code + 128).
    """
    scales = _row_scales(stored)
    if not stored.zero_points.any():
        return scales
    points = np.broadcast_to(stored.zero_points.reshape(-1), scales.shape)
    smallest = (scales.astype(np.float64) * (-_CODES - points)).astype(np.float32)
    return np.stack([smallest, scales], axis=1).reshape(-1)


def _demand_same_layout(product: Product, weights: Weights, found: Codes, codes: Codes) -> None:
    """Demand that what the converter wrote are the same weights on another grid, before they are overwritten."""
    assert product.stored is not None
    stored = product.stored
    scales = _row_scales(stored)[:, None].astype(np.float64)
    points = np.broadcast_to(stored.zero_points.reshape(-1), (codes.shape[0],))[:, None]
    ours = scales * (codes.astype(np.float64) - points)
    if weights.is_asymmetric:
        smallest, step = weights.scales.reshape(-1, 2).T.astype(np.float64)[:, :, None]
        theirs = smallest + step * (found.astype(np.float64) + _CODES)
    else:
        step = weights.scales.astype(np.float64)[:, None]
        theirs = step * found
    # Half a step of each grid, and float32's rounding of the values between them.
    if not (np.abs(ours - theirs) <= 0.51 * (step + scales) + 1e-6 * np.abs(ours)).all():
        raise _changed(product, "changed its weights: something that follows was merged into them")


def _demand_ranges(contents: Contents, operator: Operator, product: Product, grids: dict[str, Grid]) -> None:
    for index, name in ((operator.inputs[0], product.source), (operator.outputs[0], product.result)):
        found, wanted = contents.grids.get(index), grids[name]
        if found is None or found.scale != np.float32(wanted.scale):
            raise _changed(product, f"lost the scale of {name!r}")
        if found.zero_point != wanted.zero_point - signed_shift(wanted):
            raise _changed(product, f"lost the zero-point of {name!r}")


def _changed(product: Product, what: str) -> CompileError:
    return CompileError(
        f"its converter {what}",
        backend="mnn",
        node=product.node,
        op=product.op,
        hint="leave it in float (-Q float_layers)",
    )


def with_open_axes(data: bytes, inputs: Sequence[TensorSpec]) -> bytes:
    """Return the file with -1 for each axis that stays open; the converter writes 1, as if the size were fixed."""
    places = read_contents(data).inputs
    changed = bytearray(data)
    for spec in inputs:
        start, count = places.get(spec.name, (0, 0))
        for axis, size in enumerate(spec.shape if count == len(spec.shape) else ()):
            if not isinstance(size, int):
                changed[start + 4 * axis : start + 4 * axis + 4] = (-1).to_bytes(4, "little", signed=True)
    return bytes(changed)


def with_content_id(data: bytes) -> bytes:
    """Return the file with an id that its content decides, in place of the random one."""
    place = read_contents(data).uuid_place
    if place is None:
        return data
    changed = bytearray(data)
    changed[place : place + 36] = b"0" * 36
    name = uuid.UUID(bytes=hashlib.sha256(bytes(changed)).digest()[:16], version=5)
    changed[place : place + 36] = str(name).encode()
    return bytes(changed)
