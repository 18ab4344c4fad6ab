"""Makes small .mnn files of ONNX graphs with MNN's converter, in a process of its own: it may crash."""

from __future__ import annotations

import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

_CONVERT = """
import sys
import _tools
_tools.mnnconvert(["mnnconvert", "-f", "ONNX", "--modelFile", sys.argv[1], "--MNNModel", sys.argv[2], "--bizCode", "x"])
"""


def write_mnn(
    folder: Path,
    nodes: list[Any],
    inputs: dict[str, tuple[str, list[Any]]],
    outputs: dict[str, tuple[str, list[Any]]],
    constants: dict[str, np.ndarray],
) -> Path:
    """Write a graph as net.onnx and net.mnn into a folder; return where the latter is.

    A named axis of an input is free in the .mnn as well, in which MNN's converter would write 1.
    """
    import onnx
    from onnx import helper, numpy_helper

    def values(described: dict[str, tuple[str, list[Any]]]) -> list[Any]:
        return [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
            for name, (dtype, shape) in described.items()
        ]

    graph = helper.make_graph(
        nodes, "net", values(inputs), values(outputs), [numpy_helper.from_array(v, n) for n, v in constants.items()]
    )
    source, made = folder / "net.onnx", folder / "net.mnn"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), source)
    done = subprocess.run(
        [sys.executable, "-c", _CONVERT, str(source), str(made)], capture_output=True, text=True, timeout=60, check=True
    )
    assert "Converted Success" in done.stdout, done.stdout
    made.write_bytes(_with_free_axes(made.read_bytes(), {name: shape for name, (_, shape) in inputs.items()}))
    return made


def _with_free_axes(data: bytes, shapes: dict[str, list[Any]]) -> bytes:
    """Return a .mnn in which the named axes of its inputs are -1, found by the shape that the converter wrote."""
    changed = bytearray(data)
    for shape in shapes.values():
        if not any(isinstance(axis, str) for axis in shape):
            continue
        written = struct.pack(f"<{1 + len(shape)}i", len(shape), *(1 if isinstance(a, str) else a for a in shape))
        free = struct.pack(f"<{1 + len(shape)}i", len(shape), *(-1 if isinstance(a, str) else a for a in shape))
        place = changed.find(written)
        assert place > 0
        changed[place : place + len(free)] = free
    return bytes(changed)
