"""Chooses for each weight whether it is rounded up or down, so that its layer answers as before on calibration samples.

To nearest is best for each weight alone and not for their sum: errors of weights whose inputs go together may cancel.
With d the rounding errors of one output channel and H the covariance of its inputs, the layer's mean squared error is
d' H d, up to a constant that the bias takes up. Which of two integers each weight becomes is a quadratic problem in
bits (Nagel et al. 2020, "Up or Down? Adaptive Rounding for Post-Training Quantization", equation 13). AdaRound relaxes
it and descends by gradients; here the bit that lowers the error most is flipped until none does, which needs no
training framework, no learning rate and no seed. Scales are chosen first, by the same error.

Memory does not grow with the number of samples: only H and the inputs' means are summed, inside the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgedeploy.prepare.dataset import Samples
from edgedeploy.prepare.graph import Runner, View, attributes
from edgedeploy.prepare.grid import largest_weight, rounding_text, spread
from edgedeploy.prepare.ptq.calibrate import bare, small_batches
from edgedeploy.prepare.ptq.statistics import thinned
from edgedeploy.records.model import Model
from edgedeploy.records.quantization import WeightQuantization

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

Progress = Callable[[str], None]
Array = NDArray[Any]
Floats = NDArray[np.float64]

# More samples than this change no bit that matters, and each costs time.
_SAMPLES = 128
# Inputs of one output channel that are treated together: H has the square of this many numbers. A longer channel is cut
# into parts, whose errors are taken as independent.
_LONGEST = 1280
# Sums that are held at once; layers are taken in turns of that size.
_TURN_BYTES = 128 * 2**20
# How far H is drawn towards its diagonal: few photographs know little about which inputs go together. On EfficientNet-
# Lite0 with 8 photographs fitted and 3 others scored, weights alone: 0: 28.6 dB, 0.1: 29.4, 0.3: 29.7, 1: 25.6 dB.
_SHRINKAGE = 0.2
# Scales that are tried, as parts of the one that the largest weight needs.
_PARTS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6)


@dataclass(frozen=True, slots=True)
class Moments:
    """First and second moments of what the channels of a layer read.

    Attributes:
        products: E[x x'], shape (groups, inputs, inputs); a group's inputs may be a part of an output channel's.
        means: E[x], shape (groups, inputs).
    """

    products: Floats
    means: Floats


def input_moments(
    model: Model, samples: Samples, nodes: Sequence[NodeProto], seen: View, *, progress: Progress | None = None
) -> dict[str, Moments]:
    """Return the moments of the inputs of Conv, Gemm and MatMul nodes with constant weights, by node name.

    Args:
        model: fp32.
        samples: real inputs; no more than 128 of them, evenly picked, are used.
        nodes: which nodes.
        seen: the model's graph.
    """
    moments: dict[str, Moments] = {}
    some = thinned(samples, _SAMPLES)
    for turn in _turns(nodes, seen):
        graph = bare(model)
        for node in turn:
            _add_moments(graph.graph, node, _parts_of(node, seen))
        runner = Runner(graph.SerializeToString())
        sums: dict[str, Any] = {}
        for batch in small_batches(some, model):
            for name, value in runner(batch).items():
                sums[name] = sums.get(name, 0) + value.astype(np.float64)
        for node in turn:
            products, total, size = (sums[f"{node.name}/{what}"] for what in ("products", "total", "size"))
            count = size / total.size
            moments[node.name] = Moments(products / count, total / count)
        if progress:
            progress(f"correlating the inputs of layers: {len(moments)} of {len(nodes)} layers")
    return moments


def choose(
    weight: Array,
    rows: Array,
    grid: WeightQuantization,
    moments: Sequence[Moments],
    *,
    smallest: Array | None,
    has_bias: bool,
) -> WeightQuantization:
    """Return the grid with scales and roundings that lose least of the layer's outputs.

    Args:
        weight: as stored.
        rows: `row_places` of the weight: where the inputs of each output channel lie.
        grid: largest weight → largest code.
        moments: of each node that reads the weight.
        smallest: scales that the bias needs at least, one per output channel.
        has_bias: whether a bias takes up the mean error.
    """
    table = np.mean([_objective(item, has_bias=has_bias) for item in moments], axis=0)
    parts = table.shape[0] // rows.shape[0]
    scales = _scales(weight, rows, grid, table, smallest)
    grid = msgspec.structs.replace(grid, scales=tuple(float(scale) for scale in scales), origin="mse")
    exact = (weight / spread(weight, grid)).ravel()[rows].astype(np.float64)
    steps = np.broadcast_to(spread(weight, grid), weight.shape).ravel()[rows].astype(np.float64)
    limit = largest_weight(grid.bits)
    is_up = _split(_flipped(_cut(exact, parts), _cut(steps, parts), table, limit), parts)
    bits = np.zeros(weight.size, np.bool_)
    bits[rows.ravel()] = is_up.ravel()
    return msgspec.structs.replace(grid, rounding=rounding_text(bits.reshape(weight.shape)))


def row_places(node: NodeProto, weight: Array) -> NDArray[np.intp]:
    """Return the flat places of a node's weights, shape (groups, output channels of a group, inputs of a channel)."""
    places = np.arange(weight.size).reshape(weight.shape)
    if node.op_type == "Conv":
        groups = int(attributes(node).get("group", 1))
        return places.reshape(groups, weight.shape[0] // groups, -1)
    return (places if attributes(node).get("transB") else places.T)[None]


def _parts_of(node: NodeProto, seen: View) -> tuple[int, int]:
    """Return in how many groups a node's inputs fall, long channels cut, and the inputs of each."""
    groups, _, inputs = row_places(node, seen.constants[node.input[1]]).shape
    parts = next(number for number in range(1, inputs + 1) if inputs % number == 0 and inputs // number <= _LONGEST)
    return groups * parts, inputs // parts


def _turns(nodes: Sequence[NodeProto], seen: View) -> Iterator[list[NodeProto]]:
    turn: list[NodeProto] = []
    held = 0
    for node in nodes:
        groups, inputs = _parts_of(node, seen)
        size = 8 * groups * inputs**2
        if turn and held + size > _TURN_BYTES:
            yield turn
            turn, held = [], 0
        turn.append(node)
        held += size
    if turn:
        yield turn


def _add_moments(graph: GraphProto, node: NodeProto, parts: tuple[int, int]) -> None:
    """Sum x x' and x over positions and samples of a batch, x being what one output channel of a node reads."""
    from onnx import helper, numpy_helper

    def constant(key: str, value: Any) -> str:
        graph.initializer.append(numpy_helper.from_array(np.asarray(value), f"{node.name}/{key}"))
        return f"{node.name}/{key}"

    def add(operator: str, inputs: list[str], key: str, **settings: Any) -> str:
        graph.node.append(helper.make_node(operator, inputs, [f"{node.name}/{key}"], **settings))
        return f"{node.name}/{key}"

    groups, inputs = parts
    if node.op_type == "Conv":
        patches = _add_patches(graph, node, constant, add)
        apart = add("Reshape", [patches, constant("apart", [0, groups, inputs, -1])], "split")
        turned = add("Transpose", [apart], "turned", perm=[1, 2, 0, 3])
    else:
        flat = add("Reshape", [node.input[0], constant("apart", [-1, groups, inputs])], "split")
        turned = add("Transpose", [flat], "turned", perm=[1, 2, 0])
    x = add("Reshape", [turned, constant("flat", [groups, inputs, -1])], "x")
    outputs = {
        add("MatMul", [x, add("Transpose", [x], "across", perm=[0, 2, 1])], "products"): 1,
        add("ReduceSum", [x, constant("last", [2])], "total", keepdims=0): 1,
        add("Size", [x], "size"): 7,
    }
    graph.output.extend(helper.make_tensor_value_info(name, kind, None) for name, kind in outputs.items())


def _add_patches(graph: GraphProto, node: NodeProto, constant: Callable[..., str], add: Callable[..., str]) -> str:
    """Lay the window of a convolution out along the channels: a convolution with kernels of a single one does it."""
    from onnx import numpy_helper

    settings = attributes(node)
    shape = next(numpy_helper.to_array(item).shape for item in graph.initializer if item.name == node.input[1])
    kernel = shape[2:]
    window = int(np.prod(kernel))
    if window == 1 and all(step == 1 for step in settings.get("strides", [1])) and not any(settings.get("pads", [])):
        return str(node.input[0])
    channels = shape[1] * int(settings.get("group", 1))
    ones = np.tile(np.eye(window, dtype=np.float32).reshape(window, 1, *kernel), (channels, *[1] * (1 + len(kernel))))
    kept = {key: value for key, value in settings.items() if key != "group"}
    return add("Conv", [node.input[0], constant("ones", ones)], "patches", group=channels, **kept)


def _objective(moments: Moments, *, has_bias: bool) -> Floats:
    table = moments.products
    if has_bias:
        table = table - moments.means[:, :, None] * moments.means[:, None, :]
    diagonal = np.einsum("gii->gi", table)
    # An input that never changes would leave its weight's rounding undecided.
    floor = np.maximum(diagonal, 1e-3 * diagonal.mean(axis=1, keepdims=True) + 1e-12)
    shrunk: Floats = (1 - _SHRINKAGE) * table
    np.einsum("gii->gi", shrunk)[...] = floor
    return shrunk


def _cut(rows: Array, parts: int) -> Array:
    """Cut (groups, channels, inputs) into (groups * parts, channels, inputs / parts)."""
    groups, channels, _ = rows.shape
    return rows.reshape(groups, channels, parts, -1).transpose(0, 2, 1, 3).reshape(groups * parts, channels, -1)


def _split(rows: Array, parts: int) -> Array:
    """Undo `_cut`."""
    groups, channels, inputs = rows.shape
    return (
        rows.reshape(groups // parts, parts, channels, inputs)
        .transpose(0, 2, 1, 3)
        .reshape(-1, channels, parts * inputs)
    )


def _scales(
    weight: Array, rows: Array, grid: WeightQuantization, table: Floats, smallest: Array | None
) -> NDArray[np.float32]:
    """Return for each channel the scale among parts of the largest that loses least when rounding to nearest."""
    largest = np.asarray(grid.scales, np.float32)
    if grid.axis is None:
        return largest
    limit = largest_weight(grid.bits)
    parts = table.shape[0] // rows.shape[0]
    values = weight.ravel()[rows].astype(np.float64)
    floor = np.zeros_like(largest) if smallest is None else np.minimum(smallest.astype(np.float32), largest)
    best, chosen = np.full(largest.shape, np.inf), largest.copy()
    for part in _PARTS:
        scales = np.maximum(largest * np.float32(part), floor)
        steps = scales.reshape(*rows.shape[:2], 1)
        errors = _cut(np.clip(np.rint(values / steps), -limit, limit) * steps - values, parts)
        lost = ((errors @ table) * errors).sum(axis=2)
        lost = lost.reshape(rows.shape[0], parts, rows.shape[1]).sum(axis=1).ravel()
        is_better = lost < best
        best[is_better], chosen[is_better] = lost[is_better], scales[is_better]
    return chosen


def _flipped(exact: Floats, steps: Floats, table: Floats, limit: int) -> NDArray[np.bool_]:
    """Return which weights are rounded up: to nearest first, then the best flip of each channel until none is left.

    Args:
        exact: weights in steps, shape (groups, channels, inputs). steps: real width of a step, likewise.
        table: H of each group.
        limit: largest code.
    """
    shape = exact.shape
    group = np.repeat(np.arange(shape[0]), shape[1])
    low = np.clip(np.floor(exact), -limit, limit)
    high = np.clip(np.floor(exact) + 1, -limit, limit)
    is_up = np.rint(exact) > np.floor(exact)
    error = (np.where(is_up, high, low) - exact) * steps
    slope = (error @ table).reshape(-1, shape[2])
    diagonal = np.einsum("gii->gi", table)[group]
    width = ((high - low) * steps).reshape(-1, shape[2])
    up = is_up.reshape(-1, shape[2]).copy()
    live = np.arange(len(up))
    # Each flip lowers the error, so this ends; the bound only guards against rounding of the sums.
    for _ in range(2 * shape[2]):
        change = np.where(up[live], -width[live], width[live])
        gain = change * (2 * slope[live] + change * diagonal[live])
        place = gain.argmin(axis=1)
        lines = np.arange(len(live))
        is_gain = gain[lines, place] < -1e-9 * np.abs(gain).max(axis=1)
        live, place, moved = live[is_gain], place[is_gain], change[lines, place][is_gain]
        if not live.size:
            break
        up[live, place] ^= True
        slope[live] += moved[:, None] * table[group[live], place]
    return up.reshape(shape)
