"""How an emitted graph stores weights and biases: integers or short floats behind what widens them again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import ModelError
from edgedeploy.prepare.emission.draft import NAMES, Draft
from edgedeploy.prepare.graph import opset_of
from edgedeploy.prepare.grid import ActivationGrid, bias_integers, integers, weight_scales
from edgedeploy.prepare.ptq.quantized_set import bias_of
from edgedeploy.records.quantization import WeightQuantization

if TYPE_CHECKING:
    from onnx import NodeProto

Codes = NDArray[np.int16]

# Without VNNI two products of an unsigned and a signed byte are added in 16 bits: 255 * 64 + 255 * 64 still fits.
_LARGEST_SAFE_CODE = 64
# The smallest opset whose Cast knows 8-bit floats.
_FLOAT8_OPSET = 19
# Trained weights lie on their grid up to float32's rounding of scale * code.
_GRID_TOLERANCE = 1e-3
_LOWEST_NARROW_CODE = -127


def codes_of(weight: NDArray[Any], grid: WeightQuantization, name: str) -> Codes:
    """Return the integers of weights, zero-points included, in [-2**(bits-1), 2**(bits-1)).

    Raises:
        ModelError: trained weights that do not lie on their own grid.
    """
    if grid.rounding or (grid.origin != "trained" and not grid.zero_points):
        return np.asarray(integers(weight, grid), np.int16)
    # Trained codes may use the whole type, -128 and -8 too, which a calibrated grid leaves out.
    exact = weight.astype(np.float64) / wide(weight, grid.scales, grid) + wide(weight, grid.zero_points or (0,), grid)
    codes = np.rint(exact)
    half = 2 ** (grid.bits - 1)
    if grid.origin == "trained" and (
        np.abs(exact - codes).max(initial=0) > _GRID_TOLERANCE
        or codes.min(initial=0) < -half
        or codes.max(initial=0) >= half
    ):
        raise ModelError(
            f"the trained weights {name!r} do not lie on the grid that came with them; export the model again"
        )
    return np.asarray(np.clip(codes, -half, half - 1), np.int16)


def wide(weight: NDArray[Any], values: tuple[float, ...] | tuple[int, ...], grid: WeightQuantization) -> NDArray[Any]:
    """Return a grid's scales or zero-points in a shape that broadcasts with the weights."""
    flat = np.asarray(values, np.float64)
    if flat.size == 1:
        return flat.reshape(())
    assert grid.axis is not None
    if not grid.block:
        shaped: NDArray[Any] = flat.reshape([-1 if axis == grid.axis else 1 for axis in range(weight.ndim)])
        return shaped
    blocks = flat.reshape(weight.shape[grid.axis], -1).repeat(grid.block, axis=1)[:, : weight.shape[1 - grid.axis]]
    return blocks if grid.axis == 0 else blocks.T


def write_integer_weights(draft: Draft, name: str) -> WeightQuantization:
    """Store weights of integer nodes by the target's rules and return the grid that they lie on.

    Raises:
        ModelError: trained weights that the rules cannot keep, where changes are not allowed.
    """
    grid = _by_the_rules(draft, name)
    if grid.bits <= 4:
        draft.changed(
            f"the {grid.bits}-bit weights {NAMES} are multiplied on 8-bit integers here and would be stored in whole "
            f"bytes, with the same values",
            name,
        )
    codes = codes_by_the_rules(draft, name, grid)
    largest = int(np.abs(codes).max(initial=0))
    if draft.rules.weight_bits < grid.bits and largest > _LARGEST_SAFE_CODE:
        draft.note(
            f"the weights {NAMES} have trained codes beyond {_LARGEST_SAFE_CODE}, whose products saturate on this "
            f"target; they are stored as unsigned bytes, which is exact and slower",
            name,
        )
        write_dequantized(draft, name, codes, grid, np.dtype(np.uint8))
    else:
        write_dequantized(draft, name, codes, grid, np.dtype(np.int8))
    return grid


def codes_by_the_rules(draft: Draft, name: str, grid: WeightQuantization) -> Codes:
    """Return the integers of weights as `codes_of` does, within what the target's kernels take.

    Raises:
        ModelError: trained weights that do not lie on their own grid.
    """
    codes = codes_of(draft.seen.constants[name], grid, name)
    if draft.rules.weight_range == "full" or codes.min(initial=0) >= _LOWEST_NARROW_CODE:
        return codes
    draft.note(
        f"the weights {NAMES} have trained integers of -128, which this target's kernels do not take; those became "
        f"-127, one step of their grid",
        name,
    )
    return np.maximum(codes, np.int16(_LOWEST_NARROW_CODE))


def _by_the_rules(draft: Draft, name: str) -> WeightQuantization:
    grid = draft.table.weights[name]
    if grid.zero_points and any(grid.zero_points) and draft.rules.activation_symmetric:
        draft.changed(
            f"the weights {NAMES} have zero-points, this target wants none, and they would be rounded again", name
        )
    elif len(grid.scales) > 1 and not draft.rules.weight_per_channel:
        draft.changed(
            f"the weights {NAMES} have a scale for each channel or block, this target wants one in all, and they "
            f"would be rounded again",
            name,
        )
    else:
        return grid
    axis = grid.axis if draft.rules.weight_per_channel else None
    weight = draft.seen.constants[name]
    scales = weight_scales(weight, axis=axis, bits=draft.rules.weight_bits, bias=None, input_scale=1.0)
    return WeightQuantization(
        bits=draft.rules.weight_bits, axis=axis, scales=tuple(float(scale) for scale in scales), origin="max-abs"
    )


def write_dequantized(draft: Draft, name: str, codes: Codes, grid: WeightQuantization, dtype: np.dtype[Any]) -> None:
    """Store codes as bytes; a DequantizeLinear in front of all nodes gives the weights their name again.

    Blocks become rows of a matrix that is reshaped afterwards, since DequantizeLinear knows none before opset 21.
    """
    from onnx import helper

    offset = 128 if dtype == np.uint8 else 0
    scales = np.asarray(grid.scales, np.float32)
    zero_points = np.broadcast_to(np.asarray(grid.zero_points or (0,)) + offset, scales.shape).astype(dtype)
    stored = (codes.astype(np.int32) + offset).astype(dtype)
    draft.replace_constant(name)
    if grid.block and scales.size > 1:
        _write_blocks(draft, name, stored, scales, zero_points, grid)
        return
    shape = () if grid.axis is None or scales.size == 1 else (-1,)
    inputs = [
        draft.constant(f"{name}/integers", stored),
        draft.constant(f"{name}/scale", scales.reshape(shape)),
        draft.constant(f"{name}/zero_point", zero_points.reshape(shape)),
    ]
    node = helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}/dequantize")
    if shape:
        node.attribute.append(helper.make_attribute("axis", grid.axis))
    draft.front.append(node)


def _write_blocks(
    draft: Draft,
    name: str,
    stored: NDArray[Any],
    scales: NDArray[np.float32],
    zero_points: NDArray[Any],
    grid: WeightQuantization,
) -> None:
    from onnx import helper

    assert grid.axis is not None
    rows = stored if grid.axis == 0 else stored.T
    channels, width = rows.shape
    blocks = -(-width // grid.block)
    padded = np.zeros((channels, blocks * grid.block), rows.dtype)
    padded[:, :width] = rows
    inputs = [
        draft.constant(f"{name}/integers", padded.reshape(channels * blocks, grid.block)),
        draft.constant(f"{name}/scale", scales.reshape(-1)),
        draft.constant(f"{name}/zero_point", zero_points.reshape(-1)),
    ]
    steps = [helper.make_node("DequantizeLinear", inputs, [f"{name}/blocks"], name=f"{name}/dequantize", axis=0)]
    shape = draft.constant(f"{name}/shape", np.array([channels, blocks * grid.block], np.int64))
    steps.append(helper.make_node("Reshape", [f"{name}/blocks", shape], [f"{name}/rows"], name=f"{name}/reshape"))
    if width < blocks * grid.block:
        bounds = [
            draft.constant(f"{name}/{word}", np.array([value], np.int64))
            for word, value in (("first", 0), ("end", width), ("along", 1))
        ]
        steps.append(helper.make_node("Slice", [steps[-1].output[0], *bounds], [f"{name}/cut"], name=f"{name}/slice"))
    if grid.axis == 1:
        turned = helper.make_node("Transpose", [steps[-1].output[0]], [name], name=f"{name}/transpose", perm=[1, 0])
        steps.append(turned)
    steps[-1].output[0] = name
    draft.front += steps


def write_short_float(draft: Draft, name: str) -> None:
    """Store weights as 16- or 8-bit floats; a Cast (and Mul, where they have scales) gives them their name again.

    Raises:
        ModelError: the graph's opset does not know the type, or a value does not fit it.
    """
    import ml_dtypes
    from onnx import TensorProto, helper

    grid = draft.table.weights[name]
    weight = draft.seen.constants[name]
    dtype: Any = {"float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float8e4m3fn": ml_dtypes.float8_e4m3fn}[
        grid.storage
    ]
    if grid.storage == "float8e4m3fn" and opset_of(draft.model) < _FLOAT8_OPSET:
        draft.changed(
            f"the 8-bit float weights {NAMES} need opset {_FLOAT8_OPSET}, the model has {opset_of(draft.model)}, and "
            f"they would be stored as float32",
            name,
        )
        return
    scaled = weight / wide(weight, grid.scales, grid).astype(np.float32) if grid.scales else weight
    with np.errstate(over="ignore"):  # what does not fit is refused by name, two lines below
        stored = scaled.astype(dtype)
    if not np.isfinite(stored.astype(np.float32)).all():
        raise ModelError(
            f"the weights {name!r} reach {float(np.abs(scaled).max()):.3g}, which {grid.storage} cannot hold; "
            f"keep them in float32"
        )
    draft.replace_constant(name)
    codes = draft.constant(f"{name}/{grid.storage}", stored)
    widened = f"{name}/widened" if grid.scales else name
    draft.front.append(helper.make_node("Cast", [codes], [widened], name=f"{name}/cast", to=TensorProto.FLOAT))
    if grid.scales:
        scale = draft.constant(f"{name}/scale", wide(weight, grid.scales, grid).astype(np.float32))
        draft.front.append(helper.make_node("Mul", [widened, scale], [name], name=f"{name}/rescale"))


def write_bias(draft: Draft, node: NodeProto, grid: WeightQuantization, source: ActivationGrid | None) -> None:
    """Give an integer node its corrected bias, as int32 at input scale times weight scale or as the rules want it."""
    name = bias_of(node, draft.seen)
    if not name:
        return
    delta = draft.table.bias_deltas.get(name)
    corrected = draft.seen.constants[name] + np.asarray(0.0 if delta is None else delta, np.float32)
    if draft.rules.bias == "int32" and source is not None and not grid.block and _fits_int32(corrected, source, grid):
        own = msgspec.structs.replace(
            grid, axis=None if len(grid.scales) == 1 else 0, zero_points=(), rounding="", origin="max-abs"
        )
        _write_int32(draft, name, bias_integers(corrected, source.scale, own), source, own)
    elif delta is not None:
        node.input[2] = draft.constant(f"{name}/corrected", corrected)


def _fits_int32(bias: NDArray[Any], source: ActivationGrid, grid: WeightQuantization) -> bool:
    steps = np.abs(bias.astype(np.float64)) / (source.scale * np.asarray(grid.scales, np.float64))
    return bool((steps < np.iinfo(np.int32).max).all())


def _write_int32(
    draft: Draft, name: str, stored: NDArray[np.int32], source: ActivationGrid, grid: WeightQuantization
) -> None:
    from onnx import helper

    shape = () if grid.axis is None else (-1,)
    scales = (np.float32(source.scale) * np.asarray(grid.scales, np.float32)).astype(np.float32)
    draft.replace_constant(name)
    inputs = [
        draft.constant(f"{name}/integers", stored),
        draft.constant(f"{name}/scale", scales.reshape(shape)),
        draft.constant(f"{name}/zero_point", np.zeros(scales.shape, np.int32).reshape(shape)),
    ]
    node = helper.make_node("DequantizeLinear", inputs, [name], name=f"{name}/dequantize")
    if shape:
        node.attribute.append(helper.make_attribute("axis", 0))
    draft.front.append(node)
