"""A model that came quantized: its numbers become the QuantizationTable, and a trained grid meets a target's rules."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from edgedeploy.errors import ModelError
from edgedeploy.prepare.graph import View, read_graph, view
from edgedeploy.prepare.grid import activation_grid
from edgedeploy.prepare.ptq.quantized_set import MOVES
from edgedeploy.records.model import Model
from edgedeploy.records.quantization import ActivationRange, Grid, QuantizationTable, SourceQuantization
from edgedeploy.records.target import QuantizationRules

if TYPE_CHECKING:
    from onnx import NodeProto

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Operators whose outputs hold values of their first input and no others.
_MOVES = (*MOVES, "Identity", "Slice", "Split", "Gather", "Expand")


def inherited_table(model: Model, rules: QuantizationRules) -> QuantizationTable:
    """Return the table of a model that carries its own quantization, without calibration.

    What is a rearrangement of a quantized tensor has its grid, as it has in the source, where integers are moved.
    A node is quantized when all that it reads and that is no parameter of it was quantized in the source: a
    convolution or product its input and its weights (or both factors), any other node all of its float inputs. What is
    left out are the operators that the rules exclude. Weights of all other nodes stay in the table: they are stored as
    integers and computed with in float. No number of the source is changed here; `map_grid` and `emit` do what a
    target demands, and `survival` tells it.

    Raises:
        ModelError: the model carries no quantization.
    """
    source = model.quantization
    if source is None or not (source.activations or source.weights):
        raise ModelError(f"{model.source} carries no quantization of its own; quantize it with calibration samples")
    seen = view(read_graph(Path(model.path)).graph)
    source = msgspec.structs.replace(source, activations=_with_moved(source.activations, seen))
    nodes = [
        node.name
        for node in seen.graph.node
        if node.op_type not in rules.excluded_operators and _was_quantized(node, seen, source)
    ]
    return QuantizationTable(
        model_sha256=model.sha256,
        calibration="",
        calibration_sha256="",
        samples=0,
        method="the source's own numbers",
        nodes=tuple(nodes),
        activations=source.activations,
        weights=source.weights,
        dynamic=source.dynamic,
    )


def _with_moved(activations: Mapping[str, ActivationRange], seen: View) -> dict[str, ActivationRange]:
    """Return activations with those added that are rearrangements of them."""
    found = dict(activations)
    for node in seen.graph.node:
        if node.op_type in _MOVES and node.input[0] in found:
            for name in node.output:
                found.setdefault(name, found[node.input[0]])
    return found


def _was_quantized(node: NodeProto, seen: View, source: SourceQuantization) -> bool:
    """Whether a node computed on quantized values in the source."""
    if any(name in source.dynamic for name in node.input):
        return False
    stored = {*source.activations, *source.weights}
    if node.op_type in _WEIGHTED:
        return all(name in stored for name in node.input[:2]) and node.input[0] in source.activations
    read = [name for name in node.input if name and not _is_parameter(name, seen, source)]
    return bool(read) and all(name in stored for name in read) and any(name in source.activations for name in read)


def _is_parameter(name: str, seen: View, source: SourceQuantization) -> bool:
    """Whether an input says how a node works (a shape, axes, ends of a clamp) and is not what it works on."""
    value = seen.constants.get(name)
    return value is not None and name not in source.weights and (value.dtype != np.float32 or value.size <= 1)


def map_grid(values: ActivationRange, rules: QuantizationRules) -> tuple[Grid, bool, float]:
    """Return the grid of an activation under a target's rules, kept where the rules allow it.

    - The other type of eight bits: the same scale, all codes moved by 128.
    - A tensor that is never negative, where asymmetric is wanted: the same scale, zero-point at the lowest code, so
      that integers cannot become negative and a Relu before them has nothing left to do.
    - A symmetric grid of a tensor that is never negative, where asymmetric is wanted: half the scale, zero-point at the
      lowest code. Every trained value stays a value of the grid (trained code c is code 2c above the zero-point), and
      the codes that were never used halve the rounding error.
    - An asymmetric grid where symmetric is demanded, or more than 256 codes: a new scale that covers the same values.

    Args:
        values: a range; without a trained grid the rules alone decide.
        rules: the target's.

    Returns:
        (grid, whether every value that the trained grid can represent is represented exactly, relative change of the
        scale where it is not: |new - trained| / trained). The codes are those that the trained grid uses, except for
        the superset and a new scale, which use all.
    """
    dtype = np.dtype(rules.activation_dtype)
    lowest, highest = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    trained = values.grid
    if trained is None:
        chosen = activation_grid(values, rules)
        grid = Grid(scale=chosen.scale, zero_point=chosen.zero_point, low_code=lowest, high_code=highest)
        return grid, True, 0.0
    if not rules.activation_symmetric and _wastes_half(values, trained):
        used = 2 * (trained.high_code - trained.zero_point)
        half = np.float32(trained.scale) / np.float32(2)
        if used <= highest - lowest and np.float32(2) * half == np.float32(trained.scale):
            return Grid(scale=float(half), zero_point=lowest, low_code=lowest, high_code=highest), True, 0.0
    if not rules.activation_symmetric:
        trained = used_codes(values) or trained
    shift = _shift(trained, lowest, highest, is_symmetric=rules.activation_symmetric)
    if shift is not None:
        moved = Grid(
            scale=trained.scale,
            zero_point=trained.zero_point + shift,
            low_code=trained.low_code + shift,
            high_code=trained.high_code + shift,
        )
        return moved, True, 0.0
    chosen = activation_grid(values, rules)
    grid = Grid(scale=chosen.scale, zero_point=chosen.zero_point, low_code=lowest, high_code=highest)
    return grid, False, abs(chosen.scale - trained.scale) / trained.scale


def used_codes(values: ActivationRange) -> Grid | None:
    """Return an activation's trained grid without the codes that its values never take; None without a grid."""
    grid = values.grid
    if grid is None or values.low < 0 or grid.low_code >= grid.zero_point:
        return grid
    return msgspec.structs.replace(grid, low_code=grid.zero_point)


def _wastes_half(values: ActivationRange, trained: Grid) -> bool:
    """Whether a symmetric grid keeps codes for negative values that its tensor never has."""
    is_symmetric = abs(trained.low_code + trained.high_code - 2 * trained.zero_point) <= 1
    return is_symmetric and values.low >= 0 and trained.low_code < trained.zero_point


def _shift(trained: Grid, lowest: int, highest: int, *, is_symmetric: bool) -> int | None:
    """Return by how much the codes of a grid move into another type; None where they do not fit."""
    if is_symmetric:
        shifts = [(lowest + highest + 1) // 2 - trained.zero_point]
    elif trained.low_code == trained.zero_point:
        shifts = [lowest - trained.low_code]
    else:
        # From the beginning of their own type to that of the other; else as low as possible.
        shifts = [lowest - (0 if trained.low_code >= 0 else -128), lowest - trained.low_code]
    for shift in shifts:
        codes = (trained.low_code, trained.high_code, trained.zero_point)
        if all(lowest <= code + shift <= highest for code in codes):
            return shift
    return None
