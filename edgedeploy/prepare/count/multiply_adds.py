"""Multiply-accumulates of an ONNX graph for one sample, node by node, from inferred shapes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from edgedeploy.prepare.graph import View, attributes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

Shapes = Mapping[str, Sequence[int]]

# Runtimes' own operators, which ONNX infers no shapes for: the standard one that has the same, and which of their
# inputs it takes.
_STANDARD: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "QGemm": ("Gemm", (0, 3)), "QLinearAdd": ("Add", (0, 3)), "QLinearMul": ("Mul", (0, 3)),
    "QLinearSigmoid": ("Sigmoid", (0,)), "QLinearLeakyRelu": ("LeakyRelu", (0,)), "QLinearSoftmax": ("Softmax", (0,)),
    "QLinearAveragePool": ("AveragePool", (0,)), "QLinearGlobalAveragePool": ("GlobalAveragePool", (0,)),
    "DynamicQuantizeMatMul": ("MatMul", (0, 1)), "MatMulIntegerToFloat": ("MatMul", (0, 1)),
    "MatMulNBits": ("MatMul", (0, 1)), "DynamicQuantizeLSTM": ("LSTM", (0, 1, 2)), "FusedConv": ("Conv", (0, 1)),
    "FusedMatMul": ("MatMul", (0, 1)), "FusedGemm": ("Gemm", (0, 1)), "Gelu": ("Relu", (0,)),
    "QuickGelu": ("Relu", (0,)),
}  # fmt: skip
# Operator → which inputs are multiplied with each other.
_OPERANDS: Mapping[str, tuple[int, int]] = {
    "Conv": (0, 1), "FusedConv": (0, 1), "ConvInteger": (0, 1), "QLinearConv": (0, 3), "ConvTranspose": (0, 1),
    "Gemm": (0, 1), "FusedGemm": (0, 1), "QGemm": (0, 3), "MatMul": (0, 1), "FusedMatMul": (0, 1),
    "MatMulInteger": (0, 1), "QLinearMatMul": (0, 3), "DynamicQuantizeMatMul": (0, 1), "MatMulIntegerToFloat": (0, 1),
    "MatMulNBits": (0, 1), "LSTM": (1, 2), "GRU": (1, 2), "RNN": (1, 2), "DynamicQuantizeLSTM": (1, 2),
}  # fmt: skip


def counts_macs(node: NodeProto) -> bool:
    """Whether a node multiplies and accumulates."""
    return node.op_type in _OPERANDS


def node_macs(node: NodeProto, shapes: Shapes) -> int | None:
    """Return a node's multiply-accumulates, or None where a shape that it needs is not known."""
    first, second = _OPERANDS[node.op_type]
    left, right, made = (shapes.get(name) for name in (node.input[first], node.input[second], node.output[0]))
    if "LSTM" in node.op_type or node.op_type in ("GRU", "RNN"):  # each weight once in each step
        read = shapes.get(node.input[0])
        steps = None if read is None else read[1 if attributes(node).get("layout") else 0]
        return None if steps is None or left is None or right is None else steps * (math.prod(left) + math.prod(right))
    if made is None:
        return None
    if node.op_type == "MatMulNBits":
        return math.prod(made) * int(attributes(node)["K"])
    if left is None or right is None:
        return None
    if node.op_type == "ConvTranspose":  # each input value: the weights that it is spread by
        return math.prod(left) * math.prod(right[1:])
    if "Conv" in node.op_type:  # each output value: the weights of one filter
        return math.prod(made) * math.prod(right[1:])
    is_turned = attributes(node).get("transA")
    return math.prod(made) * (left[-2] if is_turned else left[-1])


def shapes_of_one_sample(model: ModelProto, seen: View) -> dict[str, tuple[int, ...]]:
    """Return every shape that inference finds when the batch is 1; other named axes stay unknown."""
    import onnx

    single = onnx.ModelProto()
    single.CopyFrom(model)
    for node in single.graph.node:
        _standardize(node, single, seen)
    batch_names = {
        value.type.tensor_type.shape.dim[0].dim_param
        for value in single.graph.input
        if value.type.tensor_type.shape.dim and value.type.tensor_type.shape.dim[0].dim_param
    }
    for value in single.graph.input:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param in batch_names:
                size.dim_value = 1
    for value in single.graph.output:
        value.type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(single, data_prop=True).graph
    shapes: dict[str, tuple[int, ...]] = {name: value.shape for name, value in seen.constants.items()}
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        sizes = value.type.tensor_type.shape.dim
        if value.type.tensor_type.HasField("shape") and all(size.WhichOneof("value") == "dim_value" for size in sizes):
            shapes.setdefault(value.name, tuple(size.dim_value for size in sizes))
    return shapes


def _standardize(node: NodeProto, model: ModelProto, seen: View) -> None:
    """Write a runtime's own operator as the standard one that gives a result of the same shape."""
    from onnx import TensorProto, helper

    if node.domain in ("", "ai.onnx"):
        return
    if node.op_type == "QLinearConcat":
        standard, places = "Concat", tuple(range(2, len(node.input), 3))
    elif node.op_type in _STANDARD:
        standard, places = _STANDARD[node.op_type]
    else:
        return
    names = [node.input[place] for place in places]
    if node.op_type == "MatMulNBits":
        settings = attributes(node)
        names[1] = f"{node.name}/unpacked"
        shape = [int(settings["K"]), int(settings["N"])]
        model.graph.value_info.append(helper.make_tensor_value_info(names[1], TensorProto.FLOAT, shape))
    node.op_type, node.domain = standard, ""
    del node.input[:]
    node.input.extend(names)
