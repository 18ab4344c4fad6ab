"""Convolution chains whose cost is known by construction: n equal layers cost n times one."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

CHANNELS = 24
SIZE = 32


def chain(layers: int, path: Path) -> Path:
    """Write an ONNX chain of `layers` equal 3x3 convolutions with ReLU; return its path."""
    rng = np.random.default_rng(0)
    scale = 1 / np.sqrt(CHANNELS * 9 / 2)
    nodes, weights, tensor = [], [], "image"
    for layer in range(layers):
        weight = (rng.standard_normal((CHANNELS, CHANNELS, 3, 3)) * scale).astype(np.float32)
        weights.append(numpy_helper.from_array(weight, f"weight_{layer}"))
        output = "features" if layer == layers - 1 else f"relu_{layer}"
        nodes.append(
            helper.make_node("Conv", [tensor, f"weight_{layer}"], [f"conv_{layer}"], f"conv_{layer}", pads=[1, 1, 1, 1])
        )
        nodes.append(helper.make_node("Relu", [f"conv_{layer}"], [output], f"relu_{layer}"))
        tensor = output
    shape = [1, CHANNELS, SIZE, SIZE]
    graph = helper.make_graph(
        nodes,
        f"chain_{layers}",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("features", TensorProto.FLOAT, shape)],
        weights,
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9), path)
    return path
