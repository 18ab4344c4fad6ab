"""Q/DQ pairs as every TensorRT parses them: symmetric int8, float32 scales; checked and named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.backends.trt_graph import FLOAT, INT8, Draft, attributes, bodies, nodes_within, set_attribute

if TYPE_CHECKING:
    from onnx import NodeProto

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PAIRS = ("QuantizeLinear", "DequantizeLinear")
_REQUANTIZE = "quantize the model again by this target's own rules: int8, symmetric, float32 scales"
# What emission calls the rounded form of a graph input, whose own name is taken by the input itself.
_OF_INPUT = "/dequantized"


@dataclass(slots=True)
class Pairs:
    """What is quantized in a graph.

    Attributes:
        scales: tensor, or weights → scales of its pair, one or one per channel.
        integers: names of products whose operands are all rounded.
        weights: rounded weights → the initializer that holds their codes.
        grids: result of a DequantizeLinear of an activation → its scale.
        notes: what a person should know.
    """

    scales: dict[str, tuple[float, ...]] = field(default_factory=dict)
    integers: tuple[str, ...] = ()
    weights: dict[str, str] = field(default_factory=dict)
    grids: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def settle_pairs(draft: Draft) -> Pairs:
    """Check all pairs, write what is left implicit, and turn what no kernel takes as integers into floats.

    int32 biases become float32 ones, and so do 8-bit weights that multiply float activations: exactly the values that
    they stand for.

    Raises:
        CompileError: naming the node: zero-points, unsigned bytes, scales of another type or per channel of an
            activation, weights per channel of another axis than TensorRT's kernels have.
    """
    found = Pairs()
    _demand_none_inside(draft)
    for node in draft.graph.node:
        if node.op_type in PAIRS:
            _demand_fit(draft, node)
    _fold_biases(draft)
    makers = draft.makers()
    found.integers = tuple(
        node.name for node in draft.graph.node if node.op_type in PRODUCTS and _is_on_integers(draft, node, makers)
    )
    _fold_float_weights(draft, found)
    for node in draft.graph.node:
        if node.op_type == "DequantizeLinear":
            _note_pair(draft, node, makers, found)
    _demand_axes(draft, found)
    draft.drop_unread_constants()
    return found


def _demand_none_inside(draft: Draft) -> None:
    for node in draft.graph.node:
        for body in bodies(node):
            for child in nodes_within(body):
                if child.op_type in PAIRS:
                    raise draft.refused(child, f"it stands in a branch or loop body of {node.name!r}", _REQUANTIZE)


def _demand_fit(draft: Draft, node: NodeProto) -> None:
    """Refuse what onnx-tensorrt's QuantDequantLinearHelper asserts, before a device meets it."""
    scale = draft.value(node.input[1])
    if scale is None:
        raise draft.refused(node, f"its scale {node.input[1]!r} is no constant", _REQUANTIZE)
    if scale.dtype != np.float32:
        # Release 8.5 reads the bytes of any scale as float32.
        raise draft.refused(node, f"its scale is {scale.dtype}, and TensorRT 8.5 would read it as float32", _REQUANTIZE)
    if not (np.isfinite(scale).all() and (scale > 0).all()):
        raise draft.refused(node, "a scale is not above zero", _REQUANTIZE)
    is_weight = node.op_type == "DequantizeLinear" and draft.has_constant(node.input[0])
    stored = draft.constant(node.input[0]).data_type if is_weight else INT8
    point = draft.value(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if point is None and len(node.input) > 2 and node.input[2]:
        raise draft.refused(node, f"its zero-point {node.input[2]!r} is no constant", _REQUANTIZE)
    if point is None and not is_weight:
        # Without a zero-point QuantizeLinear makes uint8 (ONNX operators).
        raise draft.refused(node, "it has no zero-point, so it stores uint8", _REQUANTIZE)
    wanted = (np.int8, np.int32) if is_weight and stored != INT8 else (np.int8,)
    if point is not None and point.dtype not in wanted:
        raise draft.refused(node, f"it stores {point.dtype}, and TensorRT's kernels take int8", _REQUANTIZE)
    if point is not None and point.any():
        raise draft.refused(node, f"its zero-point is {int(point.reshape(-1)[point.reshape(-1) != 0][0])}", _REQUANTIZE)
    if not is_weight and scale.size > 1:
        raise draft.refused(node, f"the activation {node.input[0]!r} has a scale for each channel", _REQUANTIZE)
    if not is_weight and node.op_type == "QuantizeLinear" and draft.has_constant(node.input[0]):
        raise draft.refused(node, f"it rounds the constant {node.input[0]!r} in each inference", "store its integers")
    _write_out(draft, node, scale, point)


def _write_out(draft: Draft, node: NodeProto, scale: NDArray[Any], point: NDArray[Any] | None) -> None:
    """Write zero-point and axis, which 8.5 demands or reads in another way than ONNX (its default axis is 0, not 1)."""
    if point is None or point.shape != scale.shape:
        kind = draft.constant(node.input[0]).data_type if draft.has_constant(node.input[0]) else INT8
        zero = np.zeros(scale.shape, np.int8 if kind == INT8 else np.int32)
        del node.input[2:]
        node.input.append(draft.add(f"{node.name}/zero_point", zero))
    if scale.size > 1:
        rank = len(draft.constant(node.input[0]).dims)
        set_attribute(node, "axis", int(attributes(node).get("axis", 1)) % rank)


def dequantized(draft: Draft, node: NodeProto) -> NDArray[np.float32]:
    """Return what a DequantizeLinear of a constant makes, in float32."""
    codes, scale = draft.value(node.input[0]), draft.value(node.input[1])
    assert codes is not None and scale is not None
    if scale.size > 1:
        axis = int(attributes(node)["axis"])
        scale = scale.reshape([-1 if place == axis else 1 for place in range(codes.ndim)])
    return np.asarray(codes.astype(np.float32) * scale.reshape(scale.shape if scale.size > 1 else ()), np.float32)


def _fold_biases(draft: Draft) -> None:
    """Turn int32 constants behind a DequantizeLinear into float ones: TensorRT takes no int32 there."""
    _fold(
        draft,
        [
            node
            for node in draft.graph.node
            if node.op_type == "DequantizeLinear"
            and draft.has_constant(node.input[0])
            and draft.constant(node.input[0]).data_type != INT8
        ],
    )


def _fold(draft: Draft, nodes: list[NodeProto]) -> None:
    if not nodes:
        return
    names = {node.name for node in nodes}
    values = {node.output[0]: dequantized(draft, node) for node in nodes}
    draft.replace_nodes([node for node in draft.graph.node if node.name not in names])
    for name, value in values.items():
        _add_under(draft, name, value)
    draft.look()


def _add_under(draft: Draft, name: str, value: NDArray[Any]) -> None:
    """Add an initializer under the very name that a node's output had."""
    from onnx import numpy_helper

    draft.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(value).reshape(value.shape), name))


def _is_on_integers(draft: Draft, node: NodeProto, makers: dict[str, NodeProto]) -> bool:
    """Whether all operands come straight from a DequantizeLinear, and one of them is an activation."""
    operands = [makers.get(name) for name in node.input[:2]]
    if not all(maker is not None and maker.op_type == "DequantizeLinear" for maker in operands):
        return False
    return any(maker is not None and not draft.has_constant(maker.input[0]) for maker in operands)


def _fold_float_weights(draft: Draft, found: Pairs) -> None:
    """Turn 8-bit weights that no product on integers reads into float ones."""
    read = {name for node in draft.graph.node if node.name in found.integers for name in node.input}
    idle = [
        node
        for node in draft.graph.node
        if node.op_type == "DequantizeLinear" and draft.has_constant(node.input[0]) and node.output[0] not in read
    ]
    if idle:
        named = ", ".join(repr(node.output[0]) for node in idle[:2]) + (
            f" ... ({len(idle)} in all)" if idle[2:] else ""
        )
        found.notes = (
            f"the 8-bit weights {named} multiply float activations, which no kernel of TensorRT does; the engine "
            f"stores them as floats of the same values",
        )
    _fold(draft, idle)


def _note_pair(draft: Draft, node: NodeProto, makers: dict[str, NodeProto], found: Pairs) -> None:
    scale = draft.value(node.input[1])
    assert scale is not None
    scales = tuple(float(number) for number in scale.reshape(-1))
    if draft.has_constant(node.input[0]):
        found.weights[node.output[0]] = node.input[0]
        found.scales[node.output[0]] = scales
        return
    rounding = makers.get(node.input[0])
    if rounding is None or rounding.op_type != "QuantizeLinear":
        raise draft.refused(
            node, f"its input {node.input[0]!r} is an integer tensor that no QuantizeLinear made", _REQUANTIZE
        )
    written = draft.value(rounding.input[1])
    assert written is not None
    if written.reshape(-1)[0] != scale.reshape(-1)[0]:
        raise draft.refused(node, f"it reads {node.input[0]!r} by another scale than it was written by", _REQUANTIZE)
    inputs = {value.name for value in draft.graph.input}
    source, name = rounding.input[0], node.output[0]
    is_input = source in inputs and name == f"{source}{_OF_INPUT}"
    found.scales[source if is_input else name] = scales
    found.grids[name] = scales[0]


def _demand_axes(draft: Draft, found: Pairs) -> None:
    """Refuse weights of a convolution that are not per output channel: no kernel has another grid.

    For Gemm and MatMul the parsers of 8.5 and later take the axis that is written, whichever it is.
    """
    makers = draft.makers()
    for node in draft.graph.node:
        if node.name not in found.integers or node.op_type not in ("Conv", "ConvTranspose"):
            continue
        maker = makers[node.input[1]]
        scale = draft.value(maker.input[1])
        assert scale is not None
        axis = 0 if node.op_type == "Conv" else 1
        if scale.size > 1 and attributes(maker)["axis"] != axis:
            raise draft.refused(
                node,
                f"its weights {node.input[1]!r} have scales along axis {attributes(maker)['axis']}, and its output "
                f"channels lie along axis {axis}",
                _REQUANTIZE,
            )


def store_as_floats(draft: Draft, pairs: Pairs) -> None:
    """Give every rounded weight as float32 behind a QuantizeLinear and its DequantizeLinear.

    NVIDIA's guide to TensorRT 8 asks for float32 weights in front of a pair; integers without a QuantizeLinear are
    described from version 10 on ("Explicit Quantization", Quantized Weights). Rounding code x scale by the same scale
    gives the code again: both steps err by 2^-24 of at most 128.
    """
    from onnx import helper

    nodes: list[NodeProto] = []
    for node in draft.graph.node:
        weights = node.output[0] if node.output else ""
        if node.op_type == "DequantizeLinear" and weights in pairs.weights:
            source = draft.add(f"{weights}/float", dequantized(draft, node))
            stored = draft.fresh(f"{weights}/stored")
            inputs = [source, *node.input[1:]]
            rounding = helper.make_node("QuantizeLinear", inputs, [stored], name=draft.fresh(f"{weights}/quantize"))
            rounding.attribute.extend(node.attribute)
            nodes.append(rounding)
            node.input[0] = stored
        nodes.append(node)
    draft.replace_nodes(nodes)
    draft.drop_unread_constants()
    draft.look()


def widen_constants(draft: Draft) -> None:
    """Turn short floats behind a Cast into float32 constants."""
    widened = {}
    for node in draft.graph.node:
        if node.op_type == "Cast" and attributes(node)["to"] == FLOAT and draft.has_constant(node.input[0]):
            value = draft.value(node.input[0])
            assert value is not None
            widened[node.output[0]] = value.astype(np.float32)
    if not widened:
        return
    draft.replace_nodes([node for node in draft.graph.node if not node.output or node.output[0] not in widened])
    for name, value in widened.items():
        _add_under(draft, name, value)
    draft.drop_unread_constants()
    draft.look()
