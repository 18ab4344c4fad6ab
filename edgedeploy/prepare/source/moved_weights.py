"""Weights that are cut, joined or turned after they are dequantized: the same is done to their codes and scales.

ONNX's recurrent operators want the gates in another order than PyTorch has them, so an exported LSTM reads slices and
concatenations of its weights. Such operators only move values, and moving the codes instead keeps one constant with one
grid, which is what runtimes have kernels for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.prepare.graph import attributes, view
from edgedeploy.prepare.markers import DOMAIN

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_MOVES = ("Slice", "Concat", "Unsqueeze", "Squeeze", "Transpose", "Reshape", "Identity", "Flatten", "Gather")


@dataclass(frozen=True, slots=True)
class _Stored:
    """Dequantized weights, element by element: codes, and the scale and zero-point of each; `name` is where from."""

    name: str
    codes: NDArray[Any]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.int32]
    bits: int


def settle_moves(model: ModelProto) -> ModelProto:
    """Replace moves of dequantized weights by dequantized weights that are stored where the moves end.

    Args:
        model: with DequantizeWeight markers; changed in place and returned. Weights whose scales would not lie along
            one axis after the moves stay as they are, and so do those that share a scale in blocks, unless the move
            picks rows.
    """
    _pick_rows_of_blocks(model)
    seen = view(model.graph)
    stored: dict[str, _Stored] = {}
    ends: list[str] = []
    for node in model.graph.node:
        if node.domain == DOMAIN and node.op_type == "DequantizeWeight":
            if (weights := _read(node, seen.constants)) is not None:
                stored[node.output[0]] = weights
        elif node.op_type in _MOVES and not node.domain and _moves_weights(node, stored, seen.constants):
            stored[node.output[0]] = _moved(node, stored, seen.constants)
            ends.append(node.output[0])
    for tensor in ends:
        readers = seen.consumers.get(tensor, ())
        if tensor in seen.outputs or any(reader.output[0] not in stored for reader in readers):
            _store(model, tensor, stored[tensor])
    _drop_unread(model)
    return model


def _read(node: NodeProto, constants: Any) -> _Stored | None:
    settings = attributes(node)
    codes, scale, zero = (constants.get(name) for name in node.input)
    if codes is None or scale is None or zero is None or settings["block"]:
        return None
    axis = settings["axis"]
    shape = [-1 if index == axis and scale.size > 1 else 1 for index in range(codes.ndim)]
    spread = [np.broadcast_to(part.reshape(shape), codes.shape) for part in (scale, zero)]
    return _Stored(node.input[0], codes, spread[0], spread[1], int(settings["bits"]))


def _moves_weights(node: NodeProto, stored: dict[str, _Stored], constants: Any) -> bool:
    data = list(node.input) if node.op_type == "Concat" else list(node.input[:1])
    rest = [] if node.op_type == "Concat" else [name for name in node.input[1:] if name]
    if not all(name in stored for name in data) or not all(name in constants for name in rest):
        return False
    return len({(stored[name].bits, stored[name].codes.dtype) for name in data}) == 1


def _moved(node: NodeProto, stored: dict[str, _Stored], constants: Any) -> _Stored:
    from onnx.reference import ReferenceEvaluator

    evaluator = ReferenceEvaluator(node)

    def run(part: str) -> Any:
        feeds = {
            name: np.ascontiguousarray(getattr(stored[name], part)) if name in stored else constants[name]
            for name in node.input
            if name
        }
        made: Any = evaluator.run(None, feeds)
        return made[0]

    first = stored[node.input[0]]
    return _Stored(first.name, run("codes"), run("scales"), run("zero_points"), first.bits)


def _pick_rows_of_blocks(model: ModelProto) -> None:
    """Pick the rows of an embedding that are always the same ones (positions) from its codes and scales in blocks."""
    from onnx import helper, numpy_helper

    seen = view(model.graph)
    for position, node in enumerate(list(model.graph.node)):
        marker = seen.producers.get(node.input[0]) if node.op_type == "Gather" and not node.domain else None
        rows = seen.constants.get(node.input[1]) if marker is not None else None
        if marker is None or rows is None or marker.op_type != "DequantizeWeight" or rows.ndim != 1:
            continue
        settings = attributes(marker)
        if not settings["block"] or settings["axis"] != 0 or attributes(node).get("axis", 0) != 0:
            continue
        names = [f"{name}/{node.output[0]}" for name in marker.input]
        model.graph.initializer.extend(
            numpy_helper.from_array(np.ascontiguousarray(seen.constants[source][rows]), name)
            for source, name in zip(marker.input, names, strict=True)
        )
        picked = helper.make_node(
            "DequantizeWeight", names, list(node.output), name=f"{node.output[0]}/moved", domain=DOMAIN, **settings
        )
        model.graph.node[position].CopyFrom(picked)


def _store(model: ModelProto, tensor: str, weights: _Stored) -> None:
    """Let a marker make a tensor that moves made before."""
    from onnx import helper, numpy_helper

    axis = _axis(weights)
    if axis is None:
        return
    shape = weights.codes.shape
    index = tuple(slice(None) if position == axis else 0 for position in range(len(shape)))
    parts = {
        "codes": np.ascontiguousarray(weights.codes),
        "scale": np.atleast_1d(weights.scales[index]).astype(np.float32),
        "zero_point": np.atleast_1d(weights.zero_points[index]).astype(np.int32),
    }
    # The codes keep the layer's name in front, by which people and reports know it.
    names = {part: f"{weights.name}/{tensor}" + ("" if part == "codes" else f"/{part}") for part in parts}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.ascontiguousarray(value), names[part]) for part, value in parts.items()
    )
    position = next(i for i, node in enumerate(model.graph.node) if tensor in node.output)
    del model.graph.node[position]
    marker = helper.make_node(
        "DequantizeWeight",
        list(names.values()),
        [tensor],
        name=f"{tensor}/moved",
        domain=DOMAIN,
        axis=axis,
        block=0,
        bits=weights.bits,
    )
    model.graph.node.insert(position, marker)


def _axis(weights: _Stored) -> int | None:
    """Return the axis along which the scales differ, -1 where they do not, None where more than one does."""
    rank: int = len(weights.codes.shape)
    for axis in [-1, *range(rank)]:
        index = tuple(slice(None) if i == axis else slice(0, 1) for i in range(rank))
        if all(np.array_equal(np.broadcast_to(x[index], x.shape), x) for x in (weights.scales, weights.zero_points)):
            return int(axis)
    return None


def _drop_unread(model: ModelProto) -> None:
    """Remove markers and moves whose result nothing reads any more."""
    while True:
        read = {name for node in model.graph.node for name in node.input} | {item.name for item in model.graph.output}
        unread = [
            node
            for node in model.graph.node
            if (node.domain == DOMAIN or node.op_type in _MOVES) and not read.intersection(node.output)
        ]
        if not unread:
            return
        for node in unread:
            model.graph.node.remove(node)
