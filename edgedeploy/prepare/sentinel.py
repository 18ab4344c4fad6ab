"""The sentinel: a small fixed network whose series of latencies says when a board changed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from edgedeploy.storage import atomic_path

# History:
#   1 (0.2.0)  five convolutions on 32x32, one linear layer: 39 million multiply-adds, 1 ms on a core of a server
VERSION = 1
INPUT, OUTPUT = "image", "scores"
SIZE, CHANNELS, CLASSES = 32, 32, 10
_OPSET, _IR_VERSION = 18, 9


def weight_bytes(name: str, count: int) -> bytes:
    """Return the int8 numbers that a tensor's weights are made of, always the same for a name.

    An extendable hash function instead of a random generator: no library's next version changes what it says.
    """
    return hashlib.shake_256(f"edgedeploy sentinel {VERSION} {name}".encode()).digest(count)


def shapes() -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight tensor, in the order of the layers."""
    return {
        "weight_0": (CHANNELS, 3, 3, 3),
        **{f"weight_{layer}": (CHANNELS, CHANNELS, 3, 3) for layer in range(1, 5)},
        "weight_5": (CLASSES, CHANNELS),
    }


def write_sentinel(folder: Path) -> Path:
    """Write the network as ONNX into a folder, once, and return the file."""
    path = folder / f"sentinel-{VERSION}.onnx"
    if not path.is_file():
        import onnx

        model = onnx.helper.make_model(
            _graph(), opset_imports=[onnx.helper.make_opsetid("", _OPSET)], ir_version=_IR_VERSION
        )
        with atomic_path(path) as part:
            part.write_bytes(model.SerializeToString(deterministic=True))
    return path


def _graph() -> Any:
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weights, nodes, tensor = [], [], INPUT
    for place, (name, shape) in enumerate(shapes().items()):
        raw = np.frombuffer(weight_bytes(name, int(np.prod(shape))), dtype=np.int8).reshape(shape)
        # A power of two near the spread that keeps activations level (He et al. 2015), so that no weight is rounded.
        fan_in = int(np.prod(shape[1:]))
        scale = 2.0 ** round(float(np.log2(np.sqrt(2 / fan_in) / 74)))
        weights.append(numpy_helper.from_array(raw.astype(np.float32) * np.float32(scale), name))
        if len(shape) == 4:
            nodes.append(helper.make_node("Conv", [tensor, name], [f"conv_{place}"], f"conv_{place}", pads=[1] * 4))
            nodes.append(helper.make_node("Relu", [f"conv_{place}"], [f"relu_{place}"], f"relu_{place}"))
            tensor = f"relu_{place}"
    nodes.append(helper.make_node("GlobalAveragePool", [tensor], ["pooled"], "pool"))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"))
    nodes.append(helper.make_node("Gemm", ["flat", "weight_5"], [OUTPUT], "linear", transB=1))
    return helper.make_graph(
        nodes,
        f"sentinel_{VERSION}",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, [1, 3, SIZE, SIZE])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, [1, CLASSES])],
        weights,
    )
