"""Rewrites a float ONNX graph into one that MNN converts rightly, or refuses it by name.

Each rewrite answers a fault that was seen: neither the converter's exit code nor its success line speak of the numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.backends.qdq import Form, StoredWeights
from edgedeploy.errors import CompileError
from edgedeploy.records.quantization import Grid

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# Operator → why it is not handed to the converter, although it would take it, and what to do.
REFUSED: Mapping[str, str] = {
    "Unique": "MNN returns the values in another order than ONNX says; sort or count them outside of the model",
}
_CLAMPS = ("Relu", "Clip")
# What becomes one kind of operator there, into which a Relu that follows is merged; right on integers, and not.
_RIGHT_ARITHMETIC = ("Add", "Sub", "Mul")
_WRONG_ARITHMETIC = ("Max", "Min", "Div", "Pow", "Mod")
# What hands the grid of its result on to what it reads.
_PASSES = (
    *_CLAMPS, "LeakyRelu", "PRelu", "MaxPool", "Concat", "Slice",
    "Reshape", "Transpose", "Flatten", "Squeeze", "Unsqueeze",
)  # fmt: skip
_CODES = 128
# 255 * 127 * 1,024 stays far below 2^31, in which products are added up.
_MOST_PIXELS = 1024


@dataclass(frozen=True, slots=True)
class Product:
    """A convolution, or what MNN makes one of, and where its numbers come from.

    Attributes:
        node: name of the ONNX node; `op` is its operator.
        weights: name of its weights in the model.
        source: the tensor that it reads.
        result: the tensor that it makes, behind its clamp where it has one.
        is_quantized: whether the form rounds both.
        stored: the integers of its weights, rows = output channels as MNN keeps them; None for float weights.
    """

    node: str
    op: str
    weights: str
    source: str
    result: str
    is_quantized: bool
    stored: StoredWeights | None


@dataclass(slots=True)
class Prepared:
    """A graph on its way to the converter.

    Attributes:
        graph: float32.
        activations: tensor → its grid.
        weights: initializer → its integers.
        quantized: names of nodes that the form rounds around.
        small: weights of the form that it stores in less than 32 bits.
        products: output of the node, which is what MNN calls the operator → what is known of it.
        origins: initializer that a rewrite made → the model's own.
        nodes: likewise for names of nodes; `tensors` for tensors that only move another's values.
    """

    graph: ModelProto
    activations: dict[str, Grid]
    weights: dict[str, StoredWeights]
    quantized: set[str]
    small: frozenset[str]
    products: dict[str, Product] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    nodes: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)


def prepare(form: Form, *, weights_only: bool = False, keeps_scales: bool = False) -> Prepared:
    """Return the graph that is converted.

    Args:
        form: the model.
        weights_only: forget how activations are rounded.
        keeps_scales: every scale was trained, and has to be in the file.

    Raises:
        CompileError: an operator that MNN would convert wrongly.
    """
    small = frozenset(form.weights) | form.short
    draft = Prepared(form.graph, dict(form.activations), dict(form.weights), set(form.quantized_nodes), small)
    if weights_only:
        draft.activations.clear()
        draft.quantized.clear()
    _demand_convertible(draft.graph)
    _clean(draft.graph)
    if keeps_scales:
        _means_as_convolutions(draft)
    for rewrite in _REWRITES:
        rewrite(draft)
    draft.products = _products(draft)
    return draft


def _demand_convertible(graph: ModelProto) -> None:
    for node in graph.graph.node:
        if node.op_type == "MaxPool" and any(step != 1 for step in _attributes(node).get("dilations", ())):
            raise CompileError(
                "MNN ignores the dilations of a pool",
                backend="mnn", node=node.name, op=node.op_type, hint="pool neighbours, or slice before the pool",
            )  # fmt: skip
        if node.domain not in ("", "ai.onnx"):
            raise CompileError(
                f"the operator's domain {node.domain!r} is unknown to it",
                backend="mnn", node=node.name, op=node.op_type, hint="replace it by standard operators",
            )  # fmt: skip
        if reason := REFUSED.get(node.op_type):
            what, _, hint = reason.partition("; ")
            raise CompileError(what, backend="mnn", node=node.name, op=node.op_type, hint=hint)


def _clean(graph: ModelProto) -> None:
    """Drop what exporters note beside the model: the converter would copy it, paths of this machine included."""
    del graph.metadata_props[:]
    graph.doc_string = graph.graph.doc_string = graph.producer_name = graph.producer_version = ""
    for node in graph.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    del graph.graph.value_info[:]


def _copy(node: NodeProto) -> NodeProto:
    """Return a copy of a node; a graph's nodes lose their place in memory when its list is emptied."""
    from onnx import NodeProto as Node

    copy: NodeProto = Node.FromString(node.SerializeToString())
    return copy


def _attributes(node: NodeProto) -> dict[str, Any]:
    from onnx import helper

    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def _constants(graph: ModelProto) -> dict[str, NDArray[Any]]:
    from onnx import numpy_helper

    return {item.name: numpy_helper.to_array(item) for item in graph.graph.initializer}


def _add_constant(draft: Prepared, name: str, value: NDArray[Any]) -> str:
    from onnx import numpy_helper

    draft.graph.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
    return name


def _shapes(graph: ModelProto) -> dict[str, tuple[int | None, ...]]:
    """Return the sizes of tensors whose rank is known; None for an axis that stays open."""
    import onnx

    inferred = onnx.shape_inference.infer_shapes(graph).graph
    return {
        item.name: tuple(axis.dim_value or None for axis in item.type.tensor_type.shape.dim)
        for item in [*inferred.input, *inferred.value_info, *inferred.output]
        if item.type.tensor_type.HasField("shape")
    }


def _replace_nodes(draft: Prepared, made: Mapping[int, list[NodeProto]]) -> None:
    """Put nodes in the places of others, by index."""
    nodes = [item for index, node in enumerate(draft.graph.graph.node) for item in made.get(index, [node])]
    kept = [_copy(node) for node in nodes]
    del draft.graph.graph.node[:]
    draft.graph.graph.node.extend(kept)


def _is_plain(stored: StoredWeights, axis: int) -> bool:
    """Whether weights have one scale in all or one for each index along an axis, and no zero-points."""
    return not stored.block and not stored.zero_points.any() and stored.axis in (None, axis)


def _products_to_convolutions(draft: Prepared) -> None:
    """Make matrix products that are computed on integers 1x1 convolutions.

    MNN makes them convolutions itself, but keeps large weights of them outside of the graph where its quantizer does
    not find them (1,280 x 1,000 weights: the file cannot be run; 512 x 512 x 3 x 3 of a convolution are fine).
    """
    from onnx import helper

    constants, shapes = _constants(draft.graph), _shapes(draft.graph)
    made: dict[int, list[NodeProto]] = {}
    for index, node in enumerate(draft.graph.graph.node):
        if node.op_type not in ("Gemm", "MatMul") or node.name not in draft.quantized:
            continue
        matrix = _matrix(node, draft, constants)
        result = shapes.get(node.output[0])
        if matrix is None or result is None or sum(size is None for size in result) > 1 or len(result) < 2:
            continue
        name, is_turned, bias = node.input[1], matrix[0], matrix[1]
        stored = draft.weights[name]
        rows = stored.codes if is_turned else stored.codes.T
        weights = constants[name] if is_turned else constants[name].T
        kernel = f"{name}/kernel of {node.output[0]}"
        _add_constant(draft, kernel, weights[:, :, None, None])
        draft.weights[kernel] = StoredWeights(
            np.ascontiguousarray(rows[:, :, None, None]),
            stored.scales,
            None if stored.axis is None else 0,
            stored.zero_points,
        )
        draft.origins[kernel] = name
        columns, products = f"{node.output[0]}/source columns", f"{node.output[0]}/columns"
        inward = _add_constant(draft, f"{columns}/shape", np.array([-1, weights.shape[1], 1, 1], np.int64))
        outward = _add_constant(draft, f"{products}/shape", np.array([size or -1 for size in result], np.int64))
        made[index] = [
            helper.make_node("Reshape", [node.input[0], inward], [columns], name=f"{node.name}/source columns"),
            helper.make_node("Conv", [columns, kernel, *bias], [products], name=f"{node.name}/product"),
            helper.make_node("Reshape", [products, outward], [node.output[0]], name=node.name),
        ]
        draft.nodes[f"{node.name}/product"] = node.name
        draft.quantized.add(f"{node.name}/product")
        draft.activations[columns] = draft.activations[node.input[0]]
        draft.tensors[columns] = node.input[0]
        result_name = _behind_clamp(draft, node.output[0])
        draft.activations[products] = draft.activations[result_name]
        draft.tensors[products] = result_name
    _replace_nodes(draft, made)


def _matrix(node: NodeProto, draft: Prepared, constants: Mapping[str, NDArray[Any]]) -> tuple[bool, list[str]] | None:
    """Return whether a product's rows are its output channels, and its bias; None where it is no plain product."""
    settings, stored = _attributes(node), draft.weights.get(node.input[1])
    if stored is None or stored.codes.ndim != 2:
        return None
    is_turned = bool(settings.get("transB"))
    if not _is_plain(stored, 0 if is_turned else 1) or settings.get("transA"):
        return None
    if settings.get("alpha", 1.0) != 1.0 or settings.get("beta", 1.0) != 1.0:
        return None
    bias = [name for name in node.input[2:] if name]
    channels = stored.codes.shape[0 if is_turned else 1]
    if any(name not in constants or constants[name].shape != (channels,) for name in bias):
        return None
    return is_turned, bias


def _behind_clamp(draft: Prepared, tensor: str) -> str:
    """Return the tensor that is rounded: the given one, or that of the clamp which reads it."""
    if tensor in draft.activations:
        return tensor
    for node in draft.graph.graph.node:
        if node.op_type in _CLAMPS and node.input[0] == tensor and node.output[0] in draft.activations:
            return str(node.output[0])
    return tensor


def _ungroup(draft: Prepared) -> None:
    """Make grouped convolutions depthwise or plain ones.

    MNN splits them itself, into parts without names, so that no scale reaches them; kept whole (--groupConvNative)
    they are computed wrongly on integers, in nearly every value.
    """
    constants = _constants(draft.graph)
    made: dict[int, list[NodeProto]] = {}
    for index, node in enumerate(draft.graph.graph.node):
        settings = _attributes(node)
        group = int(settings.get("group", 1))
        if node.op_type != "Conv" or group == 1 or node.input[1] not in constants:
            continue
        outputs, inputs = constants[node.input[1]].shape[:2]
        if inputs == 1 and outputs == group:
            continue
        spread = _spread if inputs == 1 else _split
        made[index] = spread(draft, node, constants, group, settings)
    _replace_nodes(draft, made)


def _spread(
    draft: Prepared, node: NodeProto, constants: Mapping[str, NDArray[Any]], group: int, settings: dict[str, Any]
) -> list[NodeProto]:
    """Return a depthwise convolution of as many channels as it makes, which reads each channel several times."""
    from onnx import helper

    outputs = constants[node.input[1]].shape[0]
    source = f"{node.output[0]}/repeated"
    order = _add_constant(draft, f"{source}/order", np.arange(group).repeat(outputs // group).astype(np.int64))
    _share_grid(draft, node.input[0], source)
    convolution = _copy(node)
    convolution.input[0] = source
    for item in convolution.attribute:
        if item.name == "group":
            item.i = outputs
    gather = helper.make_node("Gather", [node.input[0], order], [source], name=f"{node.name}/repeat", axis=1)
    return [gather, convolution]


def _share_grid(draft: Prepared, tensor: str, copy: str) -> None:
    if tensor in draft.activations:
        draft.activations[copy] = draft.activations[tensor]
    draft.tensors[copy] = draft.tensors.get(tensor, tensor)


def _split(
    draft: Prepared, node: NodeProto, constants: Mapping[str, NDArray[Any]], group: int, settings: dict[str, Any]
) -> list[NodeProto]:
    """Return one convolution for each group, between a Split and a Concat."""
    from onnx import helper

    name, bias = node.input[1], node.input[2] if len(node.input) > 2 else ""
    weights = constants[name]
    outputs, inputs = weights.shape[0] // group, weights.shape[1]
    result = _behind_clamp(draft, node.output[0])
    parts = [f"{node.output[0]}/group {index}" for index in range(group)]
    sources = [f"{part}/source" for part in parts]
    sizes = _add_constant(draft, f"{node.output[0]}/sizes", np.full(group, inputs, np.int64))
    made = [helper.make_node("Split", [node.input[0], sizes], sources, name=f"{node.name}/split", axis=1)]
    plain = {key: value for key, value in settings.items() if key != "group"}
    for index, (part, source) in enumerate(zip(parts, sources, strict=True)):
        rows = slice(index * outputs, (index + 1) * outputs)
        read = [source, _add_constant(draft, f"{part}/weights", weights[rows])]
        if bias in constants:
            read.append(_add_constant(draft, f"{part}/bias", constants[bias][rows]))
        made.append(helper.make_node("Conv", read, [part], name=f"{node.name}/group {index}", **plain))
        draft.nodes[made[-1].name] = node.name
        _share_grid(draft, node.input[0], source)
        _share_grid(draft, result, part)
        draft.origins[read[1]] = name
        if name in draft.weights:
            draft.weights[read[1]] = _rows_of(draft.weights[name], rows)
        if node.name in draft.quantized:
            draft.quantized.add(made[-1].name)
    return [*made, helper.make_node("Concat", parts, [node.output[0]], name=f"{node.name}/concat", axis=1)]


def _rows_of(stored: StoredWeights, rows: slice) -> StoredWeights:
    is_by_row = stored.axis == 0
    return StoredWeights(
        np.ascontiguousarray(stored.codes[rows]),
        stored.scales[rows] if is_by_row else stored.scales,
        stored.axis,
        stored.zero_points[rows] if is_by_row else stored.zero_points,
        stored.block,
    )


def _products(draft: Prepared) -> dict[str, Product]:
    """Return what is known of each convolution and matrix product, by the name that MNN gives the operator."""
    constants = {item.name for item in draft.graph.graph.initializer}
    found: dict[str, Product] = {}
    for node in draft.graph.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul") or node.input[1] not in constants:
            continue
        stored = draft.weights.get(node.input[1])
        result = _behind_clamp(draft, node.output[0])
        is_quantized = (
            node.op_type == "Conv"
            and stored is not None
            and stored.codes.ndim == 4
            and node.name in draft.quantized
            and _is_plain(stored, 0)
            and {node.input[0], result} <= draft.activations.keys()
        )
        product = Product(
            node=draft.nodes.get(node.name, node.name),
            op=node.op_type,
            weights=draft.origins.get(node.input[1], node.input[1]),
            source=node.input[0],
            result=result,
            is_quantized=is_quantized,
            stored=stored and _as_rows(node, stored),
        )
        found[node.output[0]] = found[f"{node.output[0]}__matmul_converted"] = product
    return found


def _as_rows(node: NodeProto, stored: StoredWeights) -> StoredWeights:
    """Return integers with the output channels first, as MNN keeps those of convolutions and matrix products."""
    turns = node.op_type == "MatMul" or (node.op_type == "Gemm" and not _attributes(node).get("transB"))
    if not turns or stored.codes.ndim != 2:
        return stored
    axis = stored.axis if stored.axis is None else 1 - stored.axis
    return StoredWeights(np.ascontiguousarray(stored.codes.T), stored.scales, axis, stored.zero_points, stored.block)


def signed_shift(grid: Grid) -> int:
    """Return what is subtracted from the codes of a grid so that they are signed, as they all are in MNN."""
    return _CODES if grid.high_code >= _CODES else 0


def _keep_from_integers(draft: Prepared) -> None:
    """Keep pools, running sums, resizes and some arithmetic from integers where MNN computes them wrongly.

    It computes them on integers wherever a neighbour does. The maximum of negative integers comes out wrong on x86
    (cosine 0.2 to the right answer). A mean over a whole map is rounded to the grid of the map, of which it often spans
    a few steps. An interpolation whose sides have two scales gives codes of one as if they were of the other (off by up
    to a quarter of the range). Maxima and minima of two tensors are wrong (cosine 0.6), quotients and powers off by
    half of the range; a Relu merged into a sum, a difference or a product clips at code 0 instead of at the zero-point
    (cosine 0.5 to 0.9). A product with 1 is computed in float, and stops that.
    """
    from onnx import helper

    made: dict[int, list[NodeProto]] = {}
    producers = {name: node for node in draft.graph.graph.node for name in node.output}
    consumers = _consumers(draft.graph)
    for index, node in enumerate(draft.graph.graph.node):
        if _goes_wrong(node, producers, _grids_behind(node, consumers, draft)):
            sides = "result"
        elif draft.activations.keys() & {*node.input[:1], node.output[0]}:
            sides = _float_sides(node, producers, draft)
        else:
            continue
        if not sides:
            continue
        result = node.output[0]
        one = _add_constant(draft, f"{result}/one", np.ones((), np.float32))
        inner = _copy(node)
        nodes = [inner]
        if sides == "result" or result in draft.activations:
            inner.output[0] = f"{result}/float"
            nodes.append(helper.make_node("Mul", [inner.output[0], one], [result], name=f"{node.name}/keep float"))
        if sides == "both":
            inner.input[0] = f"{result}/float source"
            read = [node.input[0], one]
            nodes.insert(0, helper.make_node("Mul", read, [inner.input[0]], name=f"{node.name}/keep float source"))
            draft.quantized.discard(node.name)
        made[index] = nodes
    _replace_nodes(draft, made)


def _float_sides(node: NodeProto, producers: Mapping[str, NodeProto], draft: Prepared) -> str:
    """Return which sides of a node integers must be kept from: "both", "result" or ""."""
    if node.op_type in ("GlobalAveragePool", "GlobalMaxPool", "ReduceMean", "ReduceMax", "ReduceSum", "CumSum"):
        return "both"
    if node.op_type == "MaxPool":
        grid = draft.activations.get(node.input[0])
        has_no_negative_codes = (
            grid is not None and grid.zero_point >= signed_shift(grid) and _is_never_negative(node.input[0], producers)
        )
        return "" if has_no_negative_codes else "both"
    is_interpolation = node.op_type == "Resize" and _attributes(node).get("mode", b"nearest") != b"nearest"
    return "result" if is_interpolation else ""


def _consumers(graph: ModelProto) -> dict[str, list[NodeProto]]:
    found: dict[str, list[NodeProto]] = {}
    for node in graph.graph.node:
        for name in node.input:
            found.setdefault(name, []).append(node)
    return found


def _grids_behind(node: NodeProto, consumers: Mapping[str, list[NodeProto]], draft: Prepared) -> list[Grid]:
    """Return the grids that MNN may compute a node on: its result's, or one that is handed back to it."""
    found: list[Grid] = []
    waiting, seen = [str(name) for name in node.output], set[str]()
    while waiting:
        tensor = waiting.pop()
        if tensor in seen:
            continue
        seen.add(tensor)
        if tensor in draft.activations:
            found.append(draft.activations[tensor])
            continue
        waiting += [out for reader in consumers.get(tensor, ()) if reader.op_type in _PASSES for out in reader.output]
    return found


def _goes_wrong(node: NodeProto, producers: Mapping[str, NodeProto], grids: list[Grid]) -> bool:
    """Whether a node is arithmetic whose integers come out wrong on these grids."""
    if node.op_type in _WRONG_ARITHMETIC:
        return bool(grids)
    maker = producers.get(node.input[0]) if node.input else None
    is_merged = node.op_type == "Relu" and maker is not None and maker.op_type in _RIGHT_ARITHMETIC
    return is_merged and any(grid.zero_point != signed_shift(grid) for grid in grids)


def _is_never_negative(tensor: str, producers: Mapping[str, NodeProto]) -> bool:
    node = producers.get(tensor)
    while node is not None and node.op_type in ("MaxPool", "Reshape", "Transpose"):
        node = producers.get(node.input[0])
    return node is not None and node.op_type in ("Relu", "Sigmoid", "Softmax", "HardSigmoid")


def _means_as_convolutions(draft: Prepared) -> None:
    """Write means over a whole map as depthwise convolutions where the scale of the map would be lost otherwise.

    A file has the scales of what convolutions read and make, and no others: that of a sum which only a mean reads is
    nowhere, and both are computed in float. With codes of 127 and one scale, the products add up to the mean exactly.
    """
    from onnx import helper

    constants, shapes = _constants(draft.graph), _shapes(draft.graph)
    kept = {
        tensor
        for node in draft.graph.graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.name in draft.quantized
        for tensor in (node.input[0], _behind_clamp(draft, node.output[0]))
    }
    made: dict[int, list[NodeProto]] = {}
    for index, node in enumerate(draft.graph.graph.node):
        if not _is_mean_of_maps(node, constants) or node.input[0] in kept:
            continue
        shape = shapes.get(node.input[0], ())
        if not {node.input[0], node.output[0]} <= draft.activations.keys() or len(shape) != 4:
            continue
        channels, height, width = shape[1:]
        if channels is None or height is None or width is None or height * width > _MOST_PIXELS:
            continue
        name = f"{node.output[0]}/mean"
        codes = np.full((channels, 1, height, width), _CODES - 1, np.int8)
        scales = np.full(channels, 1 / ((_CODES - 1) * height * width), np.float32)
        _add_constant(draft, name, codes * scales.reshape(-1, 1, 1, 1))
        draft.weights[name] = StoredWeights(codes, scales, 0, np.zeros(channels, np.int32))
        read = [node.input[0], name]
        made[index] = [helper.make_node("Conv", read, [node.output[0]], name=node.name, group=channels)]
        draft.quantized.add(node.name)
    _replace_nodes(draft, made)


def _is_mean_of_maps(node: NodeProto, constants: Mapping[str, NDArray[Any]]) -> bool:
    if node.op_type != "ReduceMean":
        return node.op_type == "GlobalAveragePool"
    settings = _attributes(node)
    axes = constants.get(node.input[1]) if len(node.input) > 1 else settings.get("axes")
    return axes is not None and settings.get("keepdims", 1) == 1 and {int(axis) % 4 for axis in axes} == {2, 3}


def _explicit_strides(draft: Prepared) -> None:
    """Write the strides of pools that leave them at 1: MNN takes them for 0, and divides by them."""
    from onnx import helper

    for node in draft.graph.graph.node:
        settings = _attributes(node)
        if node.op_type in ("MaxPool", "AveragePool", "LpPool") and "strides" not in settings:
            node.attribute.append(helper.make_attribute("strides", [1] * len(settings["kernel_shape"])))


def _flat_convolutions(draft: Prepared) -> None:
    """Give convolutions and pools over one axis a second one of size 1.

    MNN does so itself, and where such an operator makes an output of the model it forgets to take the axis away.
    """
    from onnx import helper

    constants, shapes = _constants(draft.graph), _shapes(draft.graph)
    made: dict[int, list[NodeProto]] = {}
    for index, node in enumerate(draft.graph.graph.node):
        kinds = ("Conv", "ConvTranspose", "MaxPool", "AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LpPool")
        if node.op_type not in kinds or len(shapes.get(node.input[0], ())) != 3 or len(node.output) > 1:
            continue
        has_weights = node.op_type in ("Conv", "ConvTranspose")
        if has_weights and node.input[1] not in constants:
            continue
        result = node.output[0]
        wide, inner = f"{result}/source with two axes", _copy(node)
        inner.input[0], inner.output[0], inner.name = wide, f"{result}/two axes", f"{node.name}/two axes"
        if has_weights:
            inner.input[1] = _widened_weights(draft, node.input[1], constants, result)
        _widen_attributes(inner)
        axis = _add_constant(draft, f"{result}/axis", np.array([2], np.int64))
        made[index] = [
            helper.make_node("Unsqueeze", [node.input[0], axis], [wide], name=f"{node.name}/second axis"),
            inner,
            helper.make_node("Squeeze", [inner.output[0], axis], [result], name=node.name),
        ]
        draft.nodes[inner.name] = node.name
        if node.name in draft.quantized:
            draft.quantized.add(inner.name)
        _share_grid(draft, node.input[0], wide)
        _share_grid(draft, _behind_clamp(draft, result), inner.output[0])
    _replace_nodes(draft, made)


def _widened_weights(draft: Prepared, name: str, constants: Mapping[str, NDArray[Any]], result: str) -> str:
    wide = _add_constant(draft, f"{name}/two axes of {result}", constants[name][:, :, None, :])
    draft.origins[wide] = name
    if name in draft.weights:
        stored = draft.weights[name]
        draft.weights[wide] = StoredWeights(
            stored.codes[:, :, None, :], stored.scales, stored.axis, stored.zero_points, stored.block
        )
    return wide


def _widen_attributes(node: NodeProto) -> None:
    """Say of an axis of size 1 what leaves it as it is, in front of what the node says of its one axis."""
    for item in node.attribute:
        if item.name in ("kernel_shape", "strides", "dilations"):
            item.ints.insert(0, 1)
        elif item.name == "pads":
            first, last = item.ints
            item.ints[:] = [0, first, 0, last]
        elif item.name in ("output_padding", "output_shape"):
            item.ints.insert(0, 0 if item.name == "output_padding" else 1)


def _without_functions(draft: Prepared) -> None:
    """Replace operators that MNN does not know by what ONNX defines them as."""
    from onnx import helper

    made = {
        index: [
            helper.make_node("Softplus", [node.input[0]], [f"{node.output[0]}/softplus"], name=f"{node.name}/softplus"),
            helper.make_node(
                "Tanh", [f"{node.output[0]}/softplus"], [f"{node.output[0]}/tanh"], name=f"{node.name}/tanh"
            ),
            helper.make_node("Mul", [node.input[0], f"{node.output[0]}/tanh"], [node.output[0]], name=node.name),
        ]
        for index, node in enumerate(draft.graph.graph.node)
        if node.op_type == "Mish"
    }
    _replace_nodes(draft, made)


def _resizes_as_products(draft: Prepared) -> None:
    """Write bicubic resizes as two matrix products: MNN's own differ by more than half of the range.

    Interpolation is linear and goes along one axis after the other, so that resizing the unit matrix gives the matrix.
    """
    from onnx import helper

    constants, shapes = _constants(draft.graph), _shapes(draft.graph)
    made: dict[int, list[NodeProto]] = {}
    for index, node in enumerate(draft.graph.graph.node):
        if node.op_type != "Resize" or _attributes(node).get("mode") != b"cubic":
            continue
        source, result = shapes.get(node.input[0]), shapes.get(node.output[0])
        is_fixed = source and result and len(source) == 4 and None not in (*source[2:], *result[2:])
        if not is_fixed or any(name and name not in constants for name in node.input[1:]):
            raise CompileError(
                "MNN's bicubic interpolation gives other values than ONNX's, and only one of images of a fixed size "
                "can be written as products",
                backend="mnn", node=node.name, op="Resize",
                hint="fix the size of the input, or interpolate bilinearly",
            )  # fmt: skip
        assert source is not None and result is not None
        name = node.output[0]
        across, down = (_interpolation(node, constants, draft.graph, axis, source) for axis in (3, 2))
        made[index] = [
            helper.make_node(
                "MatMul", [node.input[0], _add_constant(draft, f"{name}/across", across)], [f"{name}/wide"],
                name=f"{node.name}/across",
            ),
            helper.make_node(
                "MatMul", [_add_constant(draft, f"{name}/down", down.T), f"{name}/wide"], [name], name=node.name
            ),
        ]  # fmt: skip
        draft.quantized.discard(node.name)
    _replace_nodes(draft, made)


def _interpolation(
    node: NodeProto,
    constants: Mapping[str, NDArray[Any]],
    graph: ModelProto,
    axis: int,
    source: tuple[int | None, ...],
) -> NDArray[np.float32]:
    """Return the matrix (size before, size after) by which a Resize computes one axis."""
    from onnx import helper, numpy_helper
    from onnx.reference import ReferenceEvaluator

    size = source[axis]
    assert size is not None
    alone = _copy(node)
    alone.input[0], alone.output[0] = "unit", "matrix"
    initializers = []
    for index, name in enumerate(node.input[1:], start=1):
        if not name:
            continue
        value = constants[name]
        if index == 3 and value.size == 4:  # sizes
            value = np.where(np.arange(4) == axis, value, [1, 1, size, size]).astype(np.int64)
        elif index == 2 and value.size == 4:  # scales
            value = np.where(np.arange(4) == axis, value, 1).astype(np.float32)
        initializers.append(numpy_helper.from_array(value, name))
    # The unit matrix once along each axis: the other one stays as it is.
    unit = np.eye(size, dtype=np.float32)[None, None]
    inner = helper.make_graph([alone], "interpolation", [helper.make_tensor_value_info("unit", 1, unit.shape)],
                              [helper.make_tensor_value_info("matrix", 1, None)], initializers)  # fmt: skip
    made: Any = ReferenceEvaluator(helper.make_model(inner, opset_imports=list(graph.opset_import))).run(
        None, {"unit": unit}
    )
    matrix = np.asarray(made[0], np.float32)[0, 0]
    return np.ascontiguousarray(matrix if axis == 3 else matrix.T)


# In this order: what one writes another may rewrite.
_REWRITES = (
    _explicit_strides,
    _without_functions,
    _resizes_as_products,
    _flat_convolutions,
    _keep_from_integers,
    _products_to_convolutions,
    _ungroup,
)
