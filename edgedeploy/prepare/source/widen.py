"""Makes a half-precision graph with quantization a float32 one, so that its scales can be read and kept exactly."""

from __future__ import annotations

from typing import TYPE_CHECKING

from edgedeploy.prepare.graph import attributes, view

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

_SCALED = ("QuantizeLinear", "DequantizeLinear")
# Attributes that name the type of a result.
_TYPES = ("to", "dtype", "output_dtype")


def widened(model: ModelProto) -> ModelProto:
    """Compute in float32 what a graph with half-precision scales computes in half precision, in place.

    Every float16 and bfloat16 value is a float32 value, so scales and constants stay what they are; what is between
    them is rounded less. Inputs and outputs keep their types, behind casts.

    Args:
        model: valid ONNX; changed where a QuantizeLinear or DequantizeLinear has a half-precision scale.
    """
    from onnx import TensorProto, helper, numpy_helper

    halves = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    graph = model.graph
    types = {item.name: item.data_type for item in graph.initializer}
    if not any(node.op_type in _SCALED and types.get(node.input[1]) in halves for node in graph.node):
        return model
    for item in graph.initializer:
        if item.data_type in halves:
            item.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item).astype("float32"), item.name))
    for node in graph.node:
        _widen_attributes(node, halves)
    before, after = [], []
    seen = view(graph)
    for value in graph.input:
        if value.type.tensor_type.elem_type in halves:
            before.append(helper.make_node("Cast", [value.name], [f"{value.name}/wide"], to=TensorProto.FLOAT))
            for node in seen.consumers.get(value.name, ()):
                node.input[:] = [f"{name}/wide" if name == value.name else name for name in node.input]
    for value in graph.output:
        kind = value.type.tensor_type.elem_type
        if kind in halves:
            for node in graph.node:
                for names in (node.input, node.output):
                    names[:] = [f"{name}/wide" if name == value.name else name for name in names]
            after.append(helper.make_node("Cast", [f"{value.name}/wide"], [value.name], to=kind))
    nodes = [*before, *graph.node, *after]
    del graph.node[:], graph.value_info[:]
    graph.node.extend(nodes)
    return model


def _widen_attributes(node: NodeProto, halves: tuple[int, ...]) -> None:
    from onnx import TensorProto, numpy_helper

    settings = attributes(node)
    for item in node.attribute:
        if item.name in _TYPES and settings[item.name] in halves:
            item.i = TensorProto.FLOAT
        elif item.HasField("t") and item.t.data_type in halves:
            item.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(item.t).astype("float32"), item.t.name))
