"""What compression a model carries, counted in its ONNX graph: parameters, zeros, multiply-accumulates, operators."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from edgedeploy.prepare.graph import View, attributes, read_graph, view
from edgedeploy.records.model import CompressionReport

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# Which inputs of an operator are learnt. Shapes, axes, clip limits, scales and zero-points are not.
_LEARNT_INPUTS = {
    "Conv": (1, 2), "ConvTranspose": (1, 2), "Gemm": (0, 1, 2), "MatMul": (0, 1), "Gather": (0,), "Add": (0, 1),
    "Mul": (0, 1), "PRelu": (1,), "BatchNormalization": (1, 2, 3, 4), "LayerNormalization": (1, 2),
    "InstanceNormalization": (1, 2), "LSTM": (1, 2, 3), "GRU": (1, 2, 3), "RNN": (1, 2, 3), "DequantizeLinear": (0,),
}  # fmt: skip


def compression_report(path: Path) -> CompressionReport:
    """Count what a model consists of.

    Args:
        path: an .onnx file, weights inside.

    Returns:
        The report; `macs` counts Conv, ConvTranspose, Gemm and MatMul for one sample, None where a shape that it needs
        is not known.
    """
    model = read_graph(path)
    seen = view(model.graph)
    learnt = {
        node.input[index]
        for node in model.graph.node
        for index in _LEARNT_INPUTS.get(node.op_type, ())
        if index < len(node.input) and node.input[index] in seen.constants
    }
    return CompressionReport(
        parameters=sum(seen.constants[name].size for name in learnt),
        nonzero_parameters=sum(int(np.count_nonzero(seen.constants[name])) for name in learnt),
        macs=_macs(model, seen),
        initializer_bytes=sum(value.nbytes for value in seen.constants.values()),
        operators=dict(sorted(Counter(node.op_type for node in model.graph.node).items())),
    )


def _macs(model: ModelProto, seen: View) -> int | None:
    shapes = _shapes_of_one_sample(model, seen)
    total = 0
    for node in model.graph.node:
        if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            macs = _node_macs(node, shapes)
            if macs is None:
                return None
            total += macs
    return total


def _node_macs(node: NodeProto, shapes: Mapping[str, Sequence[int]]) -> int | None:
    left, right, made = (shapes.get(name) for name in (node.input[0], node.input[1], node.output[0]))
    if left is None or right is None or made is None:
        return None
    if node.op_type == "Conv":  # each output value: the weights of one filter
        return math.prod(made) * math.prod(right[1:])
    if node.op_type == "ConvTranspose":  # each input value: the weights that it is spread by
        return math.prod(left) * math.prod(right[1:])
    inner = left[0 if attributes(node).get("transA") else 1] if node.op_type == "Gemm" else left[-1]
    return math.prod(made) * inner


def _shapes_of_one_sample(model: ModelProto, seen: View) -> dict[str, tuple[int, ...]]:
    """Return every shape that inference finds when the batch is 1; other named axes stay unknown."""
    import onnx

    single = onnx.ModelProto()
    single.CopyFrom(model)
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
            shapes[value.name] = tuple(size.dim_value for size in sizes)
    return shapes
