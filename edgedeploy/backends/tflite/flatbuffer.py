"""A .tflite opened for editing: tensors, operators, constants and metadata.

The schema is the one that comes with ai-edge-litert; tensors and operators are its objects, named by their index.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import BackendMissing, CompileError
from edgedeploy.records.quantization import Grid

_IDENTIFIER = b"TFL3"
# The schema demands it of every buffer (schema.fbs, Buffer.data: force_align 16); kernels load vectors from there.
_ALIGNMENT = 16
# Codes of the schema (schema.fbs, TensorType).
DTYPES: dict[int, str] = {
    0: "float32", 1: "float16", 2: "int32", 3: "uint8", 4: "int64", 6: "bool", 7: "int16", 9: "int8", 10: "float64",
}  # fmt: skip
_CODES = {name: code for code, name in DTYPES.items()}
# What the schema's operator codes above 127 stand behind, for readers that know only the old field.
_OLD_CODE_LIMIT = 127
NO_TENSOR = -1


def schema() -> Any:
    """Return the module of the schema's classes.

    Raises:
        BackendMissing: ai-edge-litert is not installed here.
    """
    try:
        from ai_edge_litert import schema_py_generated
    except ModuleNotFoundError as error:
        raise BackendMissing(
            f"reading and writing .tflite files needs {error.name}; pip install 'edgedeploy[tflite]'"
        ) from error
    return schema_py_generated


class FlatGraph:
    """A model with one graph that matters; the graphs of its branches and loops are carried along untouched."""

    def __init__(self, data: bytes, source: str) -> None:
        """Read a file.

        Raises:
            CompileError: it is not a .tflite.
        """
        self.source = source
        if len(data) < 8 or data[4:8] != _IDENTIFIER:
            raise CompileError(f"{source} is not a .tflite file", backend="tflite", hint="compile again")
        try:
            self.model = schema().ModelT.InitFromPackedBuf(data, 0)
        except BackendMissing:
            raise
        except Exception as error:  # the generated code checks nothing: a broken offset fails in any way
            raise CompileError(
                f"{source} cannot be read: {type(error).__name__}: {error}", backend="tflite", hint="compile again"
            ) from error
        self.graph = self.model.subgraphs[0]
        self.tensors: list[Any] = self.graph.tensors
        self.operators: list[Any] = self.graph.operators if self.graph.operators is not None else []
        for operator in self.operators:  # what was read is a view of the file
            operator.inputs = np.array(operator.inputs if operator.inputs is not None else [], np.int32)
            operator.outputs = np.array(operator.outputs if operator.outputs is not None else [], np.int32)

    def operator_name(self, operator: Any) -> str:
        """Return the operator's name, as the schema spells it or, for a custom one, as the file does."""
        code = self.model.operatorCodes[operator.opcodeIndex]
        number = max(code.builtinCode, code.deprecatedBuiltinCode)
        custom = code.customCode
        if custom:
            return custom.decode("utf-8", "replace") if isinstance(custom, bytes) else str(custom)
        return _operator_names().get(number, f"operator {number}")

    def is_custom(self, operator: Any) -> bool:
        """Whether the operator is none of TFLite's own."""
        return bool(self.model.operatorCodes[operator.opcodeIndex].customCode)

    def version(self, operator: Any) -> int:
        """Return the operator's version."""
        return int(self.model.operatorCodes[operator.opcodeIndex].version)

    def name(self, index: int) -> str:
        """Return a tensor's name."""
        return str(self.tensors[index].name.decode("utf-8", "replace"))

    def shape(self, index: int) -> tuple[int, ...]:
        """Return a tensor's shape; an axis of free length counts as what the file has for it."""
        shape = self.tensors[index].shape
        return tuple(int(length) for length in shape) if shape is not None else ()

    def signature(self, index: int) -> tuple[int, ...]:
        """Return a tensor's shape with -1 for an axis of free length."""
        free = self.tensors[index].shapeSignature
        return tuple(int(length) for length in free) if free is not None and len(free) else self.shape(index)

    def dtype(self, index: int) -> str:
        """Return a tensor's element type as numpy spells it, "" where numpy has none."""
        return DTYPES.get(self.tensors[index].type, "")

    def constant(self, index: int) -> NDArray[Any] | None:
        """Return a constant tensor's values, None for one that is computed."""
        if index == NO_TENSOR or self.tensors[index].buffer == 0 or not self.dtype(index):
            return None
        data = self.model.buffers[self.tensors[index].buffer].data
        if data is None or len(data) == 0:
            return None
        return np.frombuffer(np.asarray(data, np.uint8).tobytes(), self.dtype(index)).reshape(self.shape(index))

    def scales(self, index: int) -> tuple[float, ...]:
        """Return a quantized tensor's scales, () for one that is not quantized."""
        found = self.tensors[index].quantization
        return tuple(float(scale) for scale in found.scale) if found is not None and found.scale is not None else ()

    def makers(self) -> dict[int, Any]:
        """Return which operator makes each tensor that is computed."""
        return {int(out): operator for operator in self.operators for out in operator.outputs}

    def readers(self) -> dict[int, list[Any]]:
        """Return which operators read each tensor."""
        found: dict[int, list[Any]] = {}
        for operator in self.operators:
            for index in inputs_of(operator):
                found.setdefault(index, []).append(operator)
        return found

    def add_tensor(
        self,
        name: str,
        dtype: str,
        like: int,
        *,
        values: NDArray[Any] | None = None,
        scales: Sequence[float] | NDArray[np.float32] = (),
        zero_point: int = 0,
        axis: int = 0,
    ) -> int:
        """Add a tensor with the shape of another, or of its own values, and return its index."""
        tensor = schema().TensorT()
        tensor.name, tensor.type = name.encode(), _CODES[dtype]
        tensor.shape = self.tensors[like].shape if values is None else np.asarray(values.shape, np.int32)
        tensor.shapeSignature = self.tensors[like].shapeSignature if values is None else None
        tensor.hasRank = True
        tensor.buffer = 0 if values is None else self.add_buffer(np.ascontiguousarray(values).tobytes())
        if len(scales):
            grid = schema().QuantizationParametersT()
            grid.scale = np.asarray(scales, np.float32)
            grid.zeroPoint = np.full(len(scales), zero_point, np.int64)
            grid.quantizedDimension = axis
            tensor.quantization = grid
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def add_quantized(self, name: str, like: int, grid: Grid) -> int:
        """Add an int8 tensor on a grid."""
        return self.add_tensor(name, "int8", like, scales=(grid.scale,), zero_point=grid.zero_point)

    def add_buffer(self, data: bytes) -> int:
        """Add a constant's bytes and return their index."""
        buffer = schema().BufferT()
        buffer.data = np.frombuffer(data, np.uint8)
        self.model.buffers.append(buffer)
        return len(self.model.buffers) - 1

    def operator(self, name: str, inputs: Sequence[int], outputs: Sequence[int], version: int = 1) -> Any:
        """Return a new operator without options; it is not put into the graph."""
        operator = schema().OperatorT()
        operator.inputs, operator.outputs = np.asarray(inputs, np.int32), np.asarray(outputs, np.int32)
        operator.opcodeIndex = self.opcode(name, version)
        return operator

    def opcode(self, name: str, version: int) -> int:
        """Return the index of an operator's code, adding it where the file does not have it."""
        number = getattr(schema().BuiltinOperator, name)
        for index, code in enumerate(self.model.operatorCodes):
            if max(code.builtinCode, code.deprecatedBuiltinCode) == number and code.version == version:
                return index
        code = schema().OperatorCodeT()
        code.builtinCode, code.version = number, version
        code.deprecatedBuiltinCode = min(number, _OLD_CODE_LIMIT)
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def metadata(self, name: str) -> bytes | None:
        """Return what the file says under a name of its metadata."""
        for item in self.model.metadata or []:
            if item.name is not None and item.name.decode("utf-8", "replace") == name:
                data = self.model.buffers[item.buffer].data
                return b"" if data is None else np.asarray(data, np.uint8).tobytes()
        return None

    def set_metadata(self, name: str, data: bytes) -> None:
        """Say something under a name that the file does not have yet."""
        item = schema().MetadataT()
        item.name, item.buffer = name.encode(), self.add_buffer(data)
        self.model.metadata = [*(self.model.metadata or []), item]

    def rename_ports(self, replaced: dict[int, int]) -> None:
        """Put other tensors in the places of inputs and outputs."""
        self.graph.inputs = np.asarray([replaced.get(int(i), int(i)) for i in self.graph.inputs], np.int32)
        self.graph.outputs = np.asarray([replaced.get(int(i), int(i)) for i in self.graph.outputs], np.int32)
        for signature in self.model.signatureDefs or []:
            if signature.subgraphIndex == 0:
                for port in [*(signature.inputs or []), *(signature.outputs or [])]:
                    port.tensorIndex = replaced.get(int(port.tensorIndex), int(port.tensorIndex))

    def packed(self) -> bytes:
        """Return the file, without tensors, constants and operator codes that nothing uses."""
        import flatbuffers

        self._drop_unused()
        for buffer in self.model.buffers:
            buffer.__class__ = _aligned_buffer()
        builder = flatbuffers.Builder(1024)
        builder.Finish(self.model.Pack(builder), file_identifier=_IDENTIFIER)
        return bytes(builder.Output())

    def _drop_unused(self) -> None:
        used = {index for operator in self.operators for index in (*inputs_of(operator), *map(int, operator.outputs))}
        for operator in self.operators:
            used |= {int(i) for i in operator.intermediates} if operator.intermediates is not None else set()
        used |= {int(index) for index in (*self.graph.inputs, *self.graph.outputs)}
        place = {old: new for new, old in enumerate(sorted(used))}
        self.graph.tensors = self.tensors = [self.tensors[old] for old in sorted(used)]
        self.graph.operators = self.operators
        for operator in self.operators:
            operator.inputs = np.asarray([place.get(int(i), NO_TENSOR) for i in operator.inputs], np.int32)
            operator.outputs = np.asarray([place[int(i)] for i in operator.outputs], np.int32)
            if operator.intermediates is not None:
                operator.intermediates = np.asarray([place[int(i)] for i in operator.intermediates], np.int32)
        self.rename_ports(place)
        self._drop_unused_buffers()
        codes = sorted({op.opcodeIndex for graph in self.model.subgraphs for op in graph.operators or []})
        for graph in self.model.subgraphs:
            for operator in graph.operators or []:
                operator.opcodeIndex = codes.index(operator.opcodeIndex)
        self.model.operatorCodes = [self.model.operatorCodes[index] for index in codes]

    def _drop_unused_buffers(self) -> None:
        holders = [tensor for graph in self.model.subgraphs for tensor in graph.tensors]
        holders += list(self.model.metadata or [])
        # The first buffer is empty by the schema's demand: it is that of every tensor without values.
        used = sorted({0, *(int(holder.buffer) for holder in holders)})
        place = {old: new for new, old in enumerate(used)}
        for holder in holders:
            holder.buffer = place[int(holder.buffer)]
        self.model.buffers = [self.model.buffers[old] for old in used]
        self.model.metadataBuffer = None


def inputs_of(operator: Any) -> list[int]:
    """Return the tensors that an operator reads, without the optional ones that are left out."""
    return [int(index) for index in operator.inputs if int(index) != NO_TENSOR]


def transposition(graph: FlatGraph, operator: Any) -> tuple[int, ...] | None:
    """Return the constant permutation of a TRANSPOSE, None for any other operator."""
    if graph.operator_name(operator) != "TRANSPOSE":
        return None
    order = graph.constant(int(operator.inputs[1]))
    return tuple(int(axis) for axis in order) if order is not None else None


def inverse(permutation: Iterable[int]) -> tuple[int, ...]:
    """Return the permutation that undoes another.

    >>> inverse((0, 2, 3, 1))
    (0, 3, 1, 2)
    """
    return tuple(int(axis) for axis in np.argsort(list(permutation)))


def read(path: Path) -> FlatGraph:
    """Open a file.

    Raises:
        CompileError: it is not a .tflite.
    """
    return FlatGraph(path.read_bytes(), path.name)


@cache
def _operator_names() -> dict[int, str]:
    return {code: name for name, code in vars(schema().BuiltinOperator).items() if not name.startswith("_")}


@cache
def _aligned_buffer() -> type:
    base: Any = schema().BufferT

    class AlignedBuffer(base):  # type: ignore[misc]  # the schema's classes have no types
        def Pack(self, builder: Any) -> Any:
            if self.data is not None:
                builder.Prep(_ALIGNMENT, len(self.data))
            return super().Pack(builder)

    return AlignedBuffer
