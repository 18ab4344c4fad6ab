"""Small kits for TensorRT's builder, made by hand: one network in both forms, for each precision."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

INT8_NODES = ("/conv1", "/conv2", "/fc")
FLOAT32_NODES = {"/softmax": "Softmax"}


class Net:
    """A graph that grows node by node; in the typed form floats are half but where they must not be."""

    def __init__(self, *, half: bool, pairs: bool, dynamic: bool, seed: int) -> None:
        self.half, self.pairs, self.dynamic = half, pairs, dynamic
        self.random = np.random.default_rng(seed)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.scales: dict[str, tuple[float, ...]] = {}

    def constant(self, name: str, array: Any) -> str:
        self.constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def node(self, operator: str, inputs: list[str], output: str, name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output

    def cast(self, tensor: str, to: int, name: str) -> str:
        return self.node("Cast", [tensor], name.lstrip("/"), name, to=to) if self.half else tensor

    def rounded(self, tensor: str) -> str:
        """Put a pair of Q and DQ behind a tensor, by the names of our forms; in the typed form with the casts around it."""
        if not self.pairs:
            return tensor
        is_input = tensor == "x"
        name = tensor.removesuffix("/float")
        scale = self.constant(f"{name}/scale", np.float32(0.05))
        zero = self.constant(f"{name}/zero", np.int8(0))
        self.scales[name] = (0.05,)
        source = tensor if is_input else self.cast(tensor, TensorProto.FLOAT, f"{name}/to_float32")
        stored = self.node("QuantizeLinear", [source, scale, zero], f"{name}/stored", f"{name}/quantize")
        result = f"{name}/dequantized" if is_input else name
        read = self.node("DequantizeLinear", [stored, scale, zero], result, f"{name}/dequantize")
        return self.cast(read, TensorProto.FLOAT16, f"{name}/to_half")

    def before_rounding(self, tensor: str) -> str:
        """Return what a tensor is called before it is rounded."""
        return f"{tensor}/float" if self.pairs else tensor

    def weights(self, name: str, shape: tuple[int, ...]) -> str:
        values = self.random.standard_normal(shape).astype(np.float32)
        if not self.pairs:
            return self.constant(name, values.astype(np.float16) if self.half else values)
        scales = np.abs(values).reshape(shape[0], -1).max(axis=1) / 127
        wide = scales.reshape(-1, *[1] * (len(shape) - 1))
        codes = np.clip(np.round(values / wide), -127, 127)
        self.scales[name] = tuple(map(float, scales))
        pair = [
            self.constant(f"{name}/scale", scales.astype(np.float32)),
            self.constant(f"{name}/zero", np.zeros(shape[0], np.int8)),
        ]
        if self.half:
            stored = self.constant(f"{name}/stored", codes.astype(np.int8))
        else:
            floats = self.constant(f"{name}/float", (codes * wide).astype(np.float32))
            stored = self.node("QuantizeLinear", [floats, *pair], f"{name}/stored", f"{name}/quantize", axis=0)
        read = self.node("DequantizeLinear", [stored, *pair], name, f"{name}/dequantize", axis=0)
        return self.cast(read, TensorProto.FLOAT16, f"{name}/to_half")

    def bias(self, name: str, size: int) -> str:
        return self.constant(name, self.random.standard_normal(size).astype(np.float16 if self.half else np.float32))

    def model(self) -> onnx.ModelProto:
        x = self.rounded("x") if self.pairs else self.cast("x", TensorProto.FLOAT16, "x/float16")
        y = self.node("Conv", [x, self.weights("w1", (4, 3, 3, 3)), self.bias("b1", 4)], "c1", "/conv1", pads=[1] * 4)
        y = self.rounded(self.node("Relu", [y], self.before_rounding("r1"), "/relu1"))
        y = self.node("Conv", [y, self.weights("w2", (4, 4, 3, 3)), self.bias("b2", 4)], "c2", "/conv2", pads=[1] * 4)
        y = self.node("Relu", [y], "r2", "/relu2")
        y = self.node("GlobalAveragePool", [y], "p", "/pool")
        y = self.rounded(self.node("Flatten", [y], self.before_rounding("f"), "/flatten"))
        y = self.node("Gemm", [y, self.weights("w3", (5, 4)), self.bias("b3", 5)], "g", "/fc", transB=1)
        self.node("Softmax", [self.cast(y, TensorProto.FLOAT, "g/float32")], "y", "/softmax")
        batch = "batch" if self.dynamic else 1
        graph = helper.make_graph(
            self.nodes, "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 8, 8])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 5])],
            self.constants,
        )  # fmt: skip
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        onnx.checker.check_model(model)
        return model


def contents(precision: str, *, dynamic: bool = False, **changes: Any) -> dict[str, Any]:
    """Return kit.json."""
    has_int8 = precision == "int8"
    shapes = {key: [size, 3, 8, 8] for key, size in (("min", 1), ("opt", 2), ("max", 4))}
    return {
        "format": "edgedeploy.kit/1",
        "precision": precision,
        "float_type": "float32" if precision == "fp32" else "float16",
        "has_int8": has_int8,
        "operators": {},
        "float32_nodes": {} if precision == "fp32" else FLOAT32_NODES,
        "int8_nodes": list(INT8_NODES) if has_int8 else [],
        "pairs": {},
        "profiles": {"x": shapes} if dynamic else {},
        "notes": [],
        **changes,
    }


def forms(precision: str, *, dynamic: bool = False, seed: int = 0) -> dict[str, onnx.ModelProto]:
    """Return the weakly and the strongly typed form of the network."""
    pairs = precision == "int8"
    return {
        "weak.onnx": Net(half=False, pairs=pairs, dynamic=dynamic, seed=seed).model(),
        "typed.onnx": Net(half=precision != "fp32", pairs=pairs, dynamic=dynamic, seed=seed).model(),
    }


def write_kit(
    path: Path, precision: str, *, dynamic: bool = False, seed: int = 0, change: Any = None, **changes: Any
) -> Path:
    """Write a kit; `change` may edit each of its models first."""
    made = forms(precision, dynamic=dynamic, seed=seed)
    for model in made.values():
        if change is not None:
            change(model.graph)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as kit:
        kit.writestr("kit.json", json.dumps(contents(precision, dynamic=dynamic, **changes)))
        for name, model in made.items():
            kit.writestr(name, model.SerializeToString(deterministic=True))
    return path
