"""Writes small .tflite files by TensorFlow Lite's own schema, so that tests of the runtime need no converter."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

schema = pytest.importorskip("ai_edge_litert.schema_py_generated")
flatbuffers = pytest.importorskip("flatbuffers")

_TYPES = {
    "float32": schema.TensorType.FLOAT32,
    "float16": schema.TensorType.FLOAT16,
    "int64": schema.TensorType.INT64,
    "int32": schema.TensorType.INT32,
    "int8": schema.TensorType.INT8,
    "bool": schema.TensorType.BOOL,
}


@dataclass(frozen=True)
class Operator:
    """One operator: its name in the schema ("CONV_2D"; "CUSTOM:name" for others), tensors by name, options."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    options: Any = None


@dataclass
class File:
    """A model with one subgraph; shapes may hold -1 for an axis that the caller chooses.

    `scales` makes a tensor quantized with zero-points 0: its scales, and the axis that they go along. `variables` are
    tensors that keep their values from one inference to the next.
    """

    tensors: dict[str, tuple[str, tuple[int, ...]]]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: tuple[Operator, ...]
    constants: dict[str, np.ndarray] = field(default_factory=dict)
    signature: dict[str, str] = field(default_factory=dict)
    scales: dict[str, tuple[np.ndarray, int]] = field(default_factory=dict)
    variables: tuple[str, ...] = ()

    def write(self, path: Path) -> Path:
        """Write it and return where it is."""
        model = schema.ModelT()
        model.version = 3
        model.description = b"made by a test"
        model.buffers = [schema.BufferT()]
        graph = schema.SubGraphT()
        graph.name = b"main"
        graph.tensors = [self._tensor(model, name) for name in [*self.tensors, *self.constants]]
        graph.inputs = [self._index(name) for name in self.inputs]
        graph.outputs = [self._index(name) for name in self.outputs]
        graph.operators = [self._operator(model, operator) for operator in self.operators]
        model.subgraphs = [graph]
        if self.signature:
            model.signatureDefs = [self._signature()]
        builder = flatbuffers.Builder(1024)
        builder.Finish(model.Pack(builder), b"TFL3")
        path.write_bytes(bytes(builder.Output()))
        return path

    def _index(self, name: str) -> int:
        return [*self.tensors, *self.constants].index(name)

    def _tensor(self, model: Any, name: str) -> Any:
        tensor = schema.TensorT()
        tensor.name = name.encode()
        if name in self.constants:
            values = self.constants[name]
            dtype, shape = values.dtype.name, values.shape
            buffer = schema.BufferT()
            buffer.data = np.frombuffer(values.tobytes(), np.uint8)
            model.buffers.append(buffer)
            tensor.buffer = len(model.buffers) - 1
        else:
            dtype, shape = self.tensors[name]
        tensor.type = _TYPES[dtype]
        tensor.shape = np.array([abs(axis) for axis in shape], np.int32)
        tensor.shapeSignature = np.array(shape, np.int32)
        tensor.isVariable = name in self.variables
        if name in self.scales:
            scales, axis = self.scales[name]
            tensor.quantization = schema.QuantizationParametersT()
            tensor.quantization.scale = np.asarray(scales, np.float32)
            tensor.quantization.zeroPoint = np.zeros(len(scales), np.int64)
            tensor.quantization.quantizedDimension = axis
        return tensor

    def _operator(self, model: Any, operator: Operator) -> Any:
        code = schema.OperatorCodeT()
        kind, _, custom = operator.kind.partition(":")
        code.builtinCode = getattr(schema.BuiltinOperator, kind)
        code.deprecatedBuiltinCode = min(code.builtinCode, 127)
        code.version = 1
        code.customCode = custom.encode() if custom else None
        model.operatorCodes = [*(model.operatorCodes or []), code]
        made = schema.OperatorT()
        made.opcodeIndex = len(model.operatorCodes) - 1
        made.inputs = np.array([self._index(name) for name in operator.inputs], np.int32)
        made.outputs = np.array([self._index(name) for name in operator.outputs], np.int32)
        if operator.options is not None:
            made.builtinOptions = operator.options
            made.builtinOptionsType = getattr(schema.BuiltinOptions, type(operator.options).__name__.removesuffix("T"))
        return made

    def _signature(self) -> Any:
        made = schema.SignatureDefT()
        made.signatureKey = b"serving_default"
        made.subgraphIndex = 0
        made.inputs, made.outputs = [], []
        for name, tensor in self.signature.items():
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = name.encode(), self._index(tensor)
            (made.inputs if tensor in self.inputs else made.outputs).append(entry)
        return made
