"""A twin of a model with integer operators whose products are exact on this machine too.

x86 without VNNI adds two products of an unsigned and a signed byte in 16 bits, where they saturate. The same weights as
unsigned bytes with 128 for zero do not, so that a form for another processor, or a source that was made for one, can be
computed here as it is meant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

# Operator → where it has the zero-point of what it multiplies with, its weights, and their zero-points.
_PLACES: dict[str, tuple[int | None, tuple[tuple[int, int], ...]]] = {
    "MatMulInteger": (2, ((1, 3),)),
    "ConvInteger": (2, ((1, 3),)),
    "QLinearConv": (2, ((3, 5),)),
    "QLinearMatMul": (2, ((3, 5),)),
    "QGemm": (2, ((3, 5),)),
    "MatMulIntegerToFloat": (4, ((1, 5),)),
    "DynamicQuantizeMatMul": (None, ((1, 3),)),
    "DynamicQuantizeLSTM": (None, ((1, 9), (2, 11))),
}


def exact_here(model: ModelProto) -> bytes | None:
    """Return a model whose integer products do not saturate, None where there is nothing to change in it.

    Signed weights that meet signed activations stay: those products are exact everywhere.

    Args:
        model: valid ONNX, weights inside; not changed.
    """
    import onnx
    from onnx import numpy_helper

    twin = onnx.ModelProto()
    twin.CopyFrom(model)
    constants = {item.name: item for item in twin.graph.initializer}
    shifted: dict[str, str] = {}
    for node in twin.graph.node:
        if node.op_type not in _PLACES or _reads_signed(node, constants):
            continue
        for weight, zero_point in _PLACES[node.op_type][1]:
            given = constants.get(node.input[weight])
            if given is None or given.data_type != onnx.TensorProto.INT8:
                continue
            if len(node.input) <= zero_point or not node.input[zero_point]:
                _add_zero_point(twin, node, zero_point)
            for place in (weight, zero_point):
                name = node.input[place]
                if name not in shifted:
                    shifted[name] = f"{name}/unsigned"
                    codes = numpy_helper.to_array(next(item for item in twin.graph.initializer if item.name == name))
                    unsigned = (codes.astype(np.int16) + 128).astype(np.uint8)
                    twin.graph.initializer.append(numpy_helper.from_array(unsigned, shifted[name]))
                node.input[place] = shifted[name]
    return bytes(twin.SerializeToString(deterministic=True)) if shifted else None


def _reads_signed(node: NodeProto, constants: dict[str, TensorProto]) -> bool:
    """Whether what a node multiplies its weights with is stored in signed bytes, as far as its zero-point tells."""
    import onnx

    place = _PLACES[node.op_type][0]
    if place is None or len(node.input) <= place:
        return False
    zero_point = constants.get(node.input[place])
    return zero_point is not None and zero_point.data_type == onnx.TensorProto.INT8


def _add_zero_point(model: ModelProto, node: NodeProto, place: int) -> None:
    """Write the zero-point 0 of signed weights that an operator may leave out."""
    from onnx import numpy_helper

    name = f"{node.output[0]}/zero_point_of_weights"
    node.input.extend([""] * (place + 1 - len(node.input)))
    node.input[place] = name
    model.graph.initializer.append(numpy_helper.from_array(np.zeros((), np.int8), name))
