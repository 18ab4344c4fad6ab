"""Carries a source's quantization through graph simplification, which renames, merges and transposes what it can.

Before it, quantized tensors become graph outputs, so that their names stay and nothing is fused across them; after it
they are none again, and quantized weights are found by their content.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import permutations
from math import prod
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import FidelityError
from edgedeploy.prepare.graph import view
from edgedeploy.prepare.grid import spread
from edgedeploy.records.quantization import SourceQuantization, WeightQuantization

if TYPE_CHECKING:
    from onnx import ModelProto

Array = NDArray[Any]

# A normalisation folded into weights multiplies each channel in float32, which rounds twice at most.
_FOLDED_RELATIVE = 4 * float(np.finfo(np.float32).eps)


def protect(graph: ModelProto, source: SourceQuantization) -> ModelProto:
    """Return a copy whose quantized tensors are graph outputs.

    Args:
        graph: canonical fp32, as `absorb` gives it.
        source: the quantization in its names.
    """
    import onnx
    from onnx import TensorProto, helper

    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    inferred = onnx.shape_inference.infer_shapes(copy).graph
    known = {value.name: value for value in inferred.value_info}
    present = {value.name for value in [*copy.graph.input, *copy.graph.output]}
    for name in source.activations:
        if name not in present:
            unknown = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
            copy.graph.output.append(known.get(name, unknown))
    return copy


def release(
    graph: ModelProto, source: SourceQuantization, original: ModelProto
) -> tuple[ModelProto, SourceQuantization]:
    """Return a copy with the outputs that it had before `protect`, and the quantization in its names.

    Weights are looked for by name and values, then by values alone, transposed or in another shape (the axis of their
    scales follows), then as a multiple of themselves in each channel (a normalisation was folded into them: the scales
    are multiplied, the codes stay). A bias that a normalisation was folded into is not stored as the source's integers
    any more and leaves `bias_codes`.

    Args:
        graph: what simplification made of what `protect` returned.
        source: the quantization in the names of `original`.
        original: what was given to `protect`.

    Raises:
        FidelityError: simplification removed a quantized tensor, or changed quantized weights in another way.
    """
    import onnx

    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    tensors = {name for node in copy.graph.node for name in node.output} | {value.name for value in copy.graph.input}
    _demand(source.activations, tensors, "tensor")
    wanted = {value.name for value in original.graph.output}
    kept = [value for value in copy.graph.output if value.name in wanted]
    del copy.graph.output[:]
    copy.graph.output.extend(kept)
    before, after = view(original.graph).constants, view(copy.graph).constants
    names: dict[str, str] = {}
    weights: dict[str, WeightQuantization] = {}
    for name, grid in source.weights.items():
        found = _found(name, before[name], grid, after, weights)
        if found is None:
            raise FidelityError(
                f"simplification changed the quantized weights {name!r} beyond what their integers can follow; "
                f"leave the pass out that does it, and report the model"
            )
        names[name], weights[found[0]] = found
        _write_exactly(copy, found[0], before[name], grid, found[1], after)
    return copy, SourceQuantization(
        activations=source.activations,
        weights=weights,
        dynamic={names[name]: how for name, how in source.dynamic.items()},
        bias_codes=_same_biases(source.bias_codes, before, after),
    )


def _demand(names: Iterable[str], present: set[str], what: str) -> None:
    if missing := [name for name in names if name not in present]:
        raise FidelityError(
            f"simplification removed the quantized {what} {missing[0]!r}"
            + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
            + "; its trained scale would be lost: leave the pass out that does it, and report the model"
        )


def _found(
    name: str, value: Array, grid: WeightQuantization, after: Mapping[str, Array], taken: Mapping[str, Any]
) -> tuple[str, WeightQuantization] | None:
    """Return where weights are now and their grid there; of several places one that nothing else claimed."""
    if name in after and after[name].shape == value.shape and np.array_equal(after[name], value):
        return name, grid
    places = [place for place, found in after.items() if found.size == value.size and found.dtype == value.dtype]
    places.sort(key=lambda place: (place != name, place in taken))
    for search in (_rearranged, _multiplied):
        for place in places:
            moved = search(value, after[place], grid)
            if moved is not None:
                return place, moved
    return None


def _rearranged(value: Array, found: Array, grid: WeightQuantization) -> WeightQuantization | None:
    """Return the grid of weights that were transposed, reshaped or both; None where they were not."""
    for order in permutations(range(value.ndim)) if value.ndim <= 4 else [tuple(range(value.ndim))]:
        moved = value.transpose(order)
        if not np.array_equal(moved.reshape(found.shape), found):
            continue
        if grid.axis is None:
            return grid
        axis = _axis_after(moved.shape, order.index(grid.axis), found.shape)
        if axis is not None and (not grid.block or found.ndim == value.ndim):
            return msgspec.structs.replace(grid, axis=axis)
    return None


def _axis_after(shape: tuple[int, ...], axis: int, reshaped: tuple[int, ...]) -> int | None:
    """Return where an axis is after a reshape; None where it was merged or split."""
    before = prod(shape[:axis])
    for place, size in enumerate(reshaped):
        if size == shape[axis] and prod(reshaped[:place]) == before:
            return place
    return None


def _multiplied(value: Array, found: Array, grid: WeightQuantization) -> WeightQuantization | None:
    """Return the grid of weights that were multiplied by one factor for each channel; None where they were not."""
    if value.shape != found.shape or grid.block or grid.storage != "integer" or value.ndim < 2:
        return None
    for axis in (0, 1):
        factors = _factors(value, found, axis)
        if factors is None or grid.axis not in (None, axis):
            continue
        if (factors < 0).any() and grid.zero_points:
            return None
        count = len(factors)
        scales = np.asarray(grid.scales, np.float64) * np.abs(factors)
        zeros = grid.zero_points * (count if len(grid.zero_points) == 1 else 1)
        return msgspec.structs.replace(
            grid, axis=axis, scales=tuple(float(np.float32(scale)) for scale in scales), zero_points=zeros
        )
    return None


def _factors(value: Array, found: Array, axis: int) -> Array | None:
    rows, multiplied = (
        np.moveaxis(part, axis, 0).reshape(part.shape[axis], -1).astype(np.float64) for part in (value, found)
    )
    power = (rows * rows).sum(1)
    factors: Array = np.where(power > 0, (rows * multiplied).sum(1) / np.where(power > 0, power, 1), 1.0)
    errors = np.abs(multiplied - factors[:, None] * rows)
    is_multiple = (errors <= _FOLDED_RELATIVE * np.abs(multiplied)).all() and (factors != 0).all()
    return factors if is_multiple else None


def _write_exactly(
    model: ModelProto,
    place: str,
    value: Array,
    before: WeightQuantization,
    grid: WeightQuantization,
    after: Mapping[str, Array],
) -> None:
    """Write weights that were multiplied as exactly what their codes stand for on the new scales."""
    from onnx import numpy_helper

    if grid.scales == before.scales:
        return
    # One scale: all axes are "others" of a scale that broadcasts.
    old = spread(value, before)
    codes = np.rint(value / old)
    signs = np.sign(np.where(value != 0, after[place] / np.where(value != 0, value, 1), 1))
    exact = (codes * signs).astype(np.float32) * spread(value, grid)
    for item in model.graph.initializer:
        if item.name == place:
            item.CopyFrom(numpy_helper.from_array(exact.astype(np.float32), place))


def _same_biases(names: Iterable[str], before: Mapping[str, Array], after: Mapping[str, Array]) -> tuple[str, ...]:
    """Return the new names of biases whose values are still those of the source's integers."""
    found = []
    for name in names:
        places = [name] if name in after else []
        places += [place for place in after if after[place].size == before[name].size]
        for place in places:
            if after[place].dtype == before[name].dtype and np.array_equal(after[place].ravel(), before[name].ravel()):
                found.append(place)
                break
    return tuple(dict.fromkeys(found))
