"""Reads the form that a target's rules ask for back into a float graph and the numbers that quantize it.

Converters of TFLite and MNN take float graphs only, and their scales beside them. What a Q/DQ graph says with nodes is
therefore said here with tables: the graph that remains has no QuantizeLinear, no DequantizeLinear, no short weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import CompileError
from edgedeploy.records.quantization import Grid
from edgedeploy.records.target import Precision

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

# Operators that compute on integers by themselves: there is no float graph with tables that says the same.
_INTEGER_OPERATORS = frozenset({
    "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger", "MatMulNBits", "MatMulBnb4", "MatMulIntegerToFloat",
    "DynamicQuantizeMatMul", "DynamicQuantizeLSTM", "QGemm", "QAttention", "QMoE", "GatherBlockQuantized",
})  # fmt: skip
_CLAMPS = ("Relu", "Clip")
# Operators whose second input are weights; what they compute with must be stored as integers too.
_PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
# Element types of ONNX (onnx.proto, TensorProto.DataType).
_FLOAT, _FLOAT16, _BFLOAT16 = 1, 10, 16
_FLOATS = frozenset({1, 10, 11, 16, 17, 18, 19, 20})
_FLOAT8 = frozenset({17, 18, 19, 20})
_INT8_SPAN = 128


@dataclass(frozen=True, slots=True, eq=False)
class StoredWeights:
    """Integer weights: real = scale * (code - zero_point).

    Attributes:
        codes: in the shape of the weights; unsigned ones of the file are shifted by 128.
        scales: (channels,) along `axis`, (1,) without an axis, (channels, blocks) where blocks have scales.
        axis: the channel axis, None for one scale in all.
        zero_points: like `scales`; all 0 where the weights are symmetric.
        block: how many neighbours along the other axis of a matrix share a scale; 0: all of them.
    """

    codes: NDArray[np.int8]
    scales: NDArray[np.float32]
    axis: int | None
    zero_points: NDArray[np.int32]
    block: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """A model in a back end's form, taken apart.

    Attributes:
        graph: float32, without Q/DQ and without short weights; an initializer holds exactly the values that its codes
            stand for. Inputs, outputs, tensors and nodes are called what they are called in the fp32 model.
        precision: what the form was built as.
        activations: tensor → the grid that it is rounded to.
        weights: initializer → its integers.
        short: initializers that the form stores in 16 bits and float16 holds without loss.
        quantized_nodes: nodes whose data inputs and outputs are all rounded; the output may be behind its Relu or Clip.
    """

    graph: ModelProto
    precision: Precision
    activations: Mapping[str, Grid]
    weights: Mapping[str, StoredWeights]
    short: frozenset[str]
    quantized_nodes: frozenset[str]


def read_form(path: Path, backend: str = "this back end") -> Form:
    """Take a form apart that `emit` or `shorten` wrote, or the plain fp32 model.

    Args:
        path: a self-contained .onnx.
        backend: who asks, for the text of errors.

    Raises:
        CompileError: naming the node that is no part of such a form: an operator that computes on integers, an input
            that is an integer tensor already, scales per channel of an activation, one tensor on two grids.
    """
    import onnx

    return _Reader(onnx.load(str(path), load_external_data=False), backend).form()


@dataclass(frozen=True, slots=True, eq=False)
class _Chain:
    """Constant weights on their way from what is stored to what is computed with.

    Attributes:
        value: float32.
        codes: int8, None where no integers are stored (short floats) or they are no weights (int32 biases).
        place: for each element of `codes` the index of its scale; a view without memory of its own until it is moved.
        axis: of the channels, as long as nothing was moved.
    """

    value: NDArray[np.float32]
    codes: NDArray[np.int8] | None = None
    place: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    scales: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, np.float32))
    points: NDArray[np.int32] = field(default_factory=lambda: np.zeros(0, np.int32))
    axis: int | None = None
    is_moved: bool = False
    is_float8: bool = False

    def moved(self, move: Callable[[NDArray[Any]], NDArray[Any]]) -> _Chain:
        """Return the weights after something that only picks and rearranges elements."""
        if self.codes is None:
            return replace(self, value=move(self.value), is_moved=True)
        return replace(
            self, value=move(self.value), codes=move(self.codes), place=move(self.place), axis=None, is_moved=True
        )


class _Reader:
    """Takes one graph apart; every method looks at one kind of node."""

    def __init__(self, model: ModelProto, backend: str) -> None:
        self._model, self._graph, self._backend = model, model.graph, backend
        self._constants: dict[str, TensorProto] = {item.name: item for item in model.graph.initializer}
        self._inputs = {value.name for value in model.graph.input} - set(self._constants)
        self._outputs = [value.name for value in model.graph.output]
        self._chains: dict[str, _Chain] = {}
        # Stored activation → the tensor that it was rounded from, and its grid.
        self._stored: dict[str, tuple[str, Grid]] = {}
        # Rounded tensor → the tensor that it was rounded from.
        self._sources: dict[str, str] = {}
        self._grids: dict[str, Grid] = {}

    def form(self) -> Form:
        """Return the form."""
        from onnx import helper

        _demand_known(self._graph.node, self._backend)
        has_pairs = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in self._graph.node)
        kept = [node for node in self._graph.node if not self._takes(node)]
        names, copies = self._names()
        for node in kept:
            _rename(node, names)
        kept += [
            helper.make_node("Identity", [source], [output], name=f"{output}/copy") for output, source in copies.items()
        ]
        read = _names_read(kept) | set(self._outputs)
        weights, short = self._write_constants(read)
        del self._graph.node[:]
        self._graph.node.extend(kept)
        del self._graph.value_info[:]
        self._drop_unread(read)
        activations = {names.get(source, source): grid for source, grid in self._grids.items()}
        precision: Precision = "int8" if has_pairs else "fp16" if self._chains else "fp32"
        quantized = _quantized_nodes(self._model, activations, weights) if has_pairs else frozenset()
        return Form(self._model, precision, activations, weights, short, quantized)

    def _takes(self, node: NodeProto) -> bool:
        """Keep what a node says in a table and answer True, or answer False for a node of the float graph."""
        if node.domain not in ("", "ai.onnx"):
            return False
        if node.op_type == "QuantizeLinear":
            self._quantize(node)
        elif node.op_type == "DequantizeLinear":
            self._dequantize(node)
        elif node.op_type == "Cast" and node.input[0] in self._constants:
            return self._widen(node)
        elif node.input and node.input[0] in self._chains:
            return self._move(node)
        else:
            return False
        return True

    def _quantize(self, node: NodeProto) -> None:
        source, grid = node.input[0], self._grid(node)
        if source in self._constants or source in self._chains:
            raise self._refused(node, f"it rounds the constant {source!r} in each inference", "store its integers")
        if (known := self._grids.get(self._root(source))) not in (None, grid):
            assert known is not None
            raise self._refused(
                node,
                f"the tensor {source!r} is rounded to two grids (scale {known.scale:.6g} and {grid.scale:.6g})",
                "round it once",
            )
        self._grids[self._root(source)] = grid
        self._stored[node.output[0]] = (source, grid)

    def _dequantize(self, node: NodeProto) -> None:
        if node.input[0] in self._constants:
            self._chains[node.output[0]] = self._read_integers(node)
            return
        if node.input[0] not in self._stored:
            raise self._refused(
                node,
                f"its input {node.input[0]!r} is an integer tensor that no QuantizeLinear made",
                "build from the float model",
            )
        source, grid = self._stored[node.input[0]]
        if self._grid(node) != grid:
            raise self._refused(
                node, f"it reads {node.input[0]!r} by another scale or zero-point than it was written by", "use one"
            )
        self._sources[node.output[0]] = source

    def _grid(self, node: NodeProto) -> Grid:
        """Return the grid of a node of an activation."""
        from onnx import helper, numpy_helper

        numbers = [numpy_helper.to_array(self._constant(node, name)) for name in node.input[1:] if name]
        if any(item.size != 1 for item in numbers):
            raise self._refused(node, "an activation has a scale for each channel or block", "give it one scale")
        settings = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        stored = settings.get("output_dtype", 0) if node.op_type == "QuantizeLinear" else 0
        # Without a zero-point the type is uint8, unless the attribute says so (ONNX operators, QuantizeLinear-21).
        dtype = numbers[1].dtype if len(numbers) > 1 else np.dtype(np.int8 if stored == 3 else np.uint8)
        if dtype not in (np.int8, np.uint8):
            raise self._refused(node, f"an activation is rounded to {dtype}", "round it to 8 bits")
        point = int(numbers[1].reshape(())) if len(numbers) > 1 else 0
        span = np.iinfo(dtype)
        return Grid(
            scale=float(numbers[0].astype(np.float32).reshape(())),
            zero_point=point,
            low_code=int(span.min),
            high_code=int(span.max),
        )

    def _constant(self, node: NodeProto, name: str) -> TensorProto:
        if name not in self._constants:
            raise self._refused(node, f"its scale or zero-point {name!r} is no constant", "use constant scales")
        return self._constants[name]

    def _read_integers(self, node: NodeProto) -> _Chain:
        """Return the weights, or the bias, behind a DequantizeLinear; scale * (code - zero_point) in float32."""
        from onnx import helper, numpy_helper

        stored, scales = (numpy_helper.to_array(self._constant(node, name)) for name in node.input[:2])
        has_points = len(node.input) > 2 and node.input[2]
        points = numpy_helper.to_array(self._constant(node, node.input[2])) if has_points else np.zeros_like(scales)
        if stored.dtype.kind not in "iu" and "int" not in str(stored.dtype):
            raise self._refused(node, f"the constant {node.input[0]!r} holds {stored.dtype}", "store 8-bit integers")
        settings = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        codes = stored.astype(np.int32)
        place, axis = self._places(node, codes.shape, scales.shape, settings)
        scales, points = scales.astype(np.float32).reshape(-1), points.astype(np.int32).reshape(-1)
        value = (codes - points[place]).astype(np.float32) * scales[place]
        if stored.dtype.itemsize > 1:
            return _Chain(value)
        if stored.dtype == np.uint8:
            codes, points = codes - _INT8_SPAN, points - _INT8_SPAN
        return _Chain(value, codes.astype(np.int8), place, scales, points, axis)

    def _places(
        self, node: NodeProto, shape: tuple[int, ...], scales: tuple[int, ...], settings: Mapping[str, Any]
    ) -> tuple[NDArray[np.int32], int | None]:
        """Return for each element the index of its scale, and the channel axis where there is one."""
        count = int(np.prod(scales, dtype=np.int64))
        places = np.arange(count, dtype=np.int32)
        if count == 1:
            return np.broadcast_to(places.reshape(()), shape), None
        axis = int(settings.get("axis", 1)) % max(len(shape), 1)
        if block := int(settings.get("block_size", 0)):
            wide = places.reshape(scales).repeat(block, axis=axis)
            return wide[tuple(slice(size) for size in shape)], None
        if len(scales) != 1 or count != shape[axis]:
            raise self._refused(
                node, f"{scales} scales do not fit weights of shape {shape} on axis {axis}", "export the model again"
            )
        return np.broadcast_to(places.reshape([-1 if item == axis else 1 for item in range(len(shape))]), shape), axis

    def _widen(self, node: NodeProto) -> bool:
        from onnx import helper, numpy_helper

        target = next(int(helper.get_attribute_value(item)) for item in node.attribute if item.name == "to")
        stored = self._constants[node.input[0]]
        if target != _FLOAT or stored.data_type not in {_FLOAT16, _BFLOAT16} | _FLOAT8:
            return False
        value = numpy_helper.to_array(stored).astype(np.float32)
        self._chains[node.output[0]] = _Chain(value, is_float8=stored.data_type in _FLOAT8)
        return True

    def _move(self, node: NodeProto) -> bool:
        """Follow weights through what `emit` puts between their blocks or bytes and their own shape."""
        from onnx import helper, numpy_helper

        if not all(name in self._constants for name in node.input[1:] if name):
            return False
        chain = self._chains[node.input[0]]
        numbers = [numpy_helper.to_array(self._constants[name]) for name in node.input[1:] if name]
        settings = {item.name: helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type == "Reshape" and not settings.get("allowzero"):
            sizes = [
                int(size) or chain.value.shape[index] if size == 0 else int(size)
                for index, size in enumerate(numbers[0])
            ]
            moved = chain.moved(lambda array: array.reshape(sizes))
        elif node.op_type == "Transpose":
            moved = chain.moved(lambda array: array.transpose(settings.get("perm")))
        elif node.op_type == "Slice" and len(numbers) == len(node.input) - 1:
            moved = chain.moved(lambda array: array[_slices(array.ndim, numbers)])
        elif node.op_type == "Mul" and chain.is_float8:
            moved = _Chain((chain.value * numbers[0]).astype(np.float32), is_moved=True)
        else:
            return False
        self._chains[node.output[0]] = moved
        return True

    def _root(self, tensor: str) -> str:
        while tensor in self._sources:
            tensor = self._sources[tensor]
        return tensor

    def _names(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return what tensors are called without their pairs, and graph outputs that need a copy of another tensor."""
        same: dict[str, list[str]] = {}
        for rounded in self._sources:
            same.setdefault(self._root(rounded), []).append(rounded)
        names: dict[str, str] = {}
        copies: dict[str, str] = {}
        for root, pairs in same.items():
            outputs = [name for name in (*pairs, root) if name in self._outputs]
            name = root if root in self._inputs else (outputs or pairs)[0]
            names.update(dict.fromkeys((root, *pairs), name))
            copies.update({output: name for output in outputs if output != name})
        return names, copies

    def _write_constants(self, read: set[str]) -> tuple[dict[str, StoredWeights], frozenset[str]]:
        """Put the weights that are still read into the graph as float32."""
        from onnx import numpy_helper

        weights: dict[str, StoredWeights] = {}
        short: set[str] = set()
        for name, chain in self._chains.items():
            if name not in read:
                continue
            value = np.ascontiguousarray(chain.value)
            self._graph.initializer.append(numpy_helper.from_array(value, name))
            if chain.codes is not None:
                weights[name] = self._stored_weights(name, chain)
            elif not chain.is_float8 and value.ndim and _is_exact_in_float16(value):
                short.add(name)
        return weights, frozenset(short)

    def _stored_weights(self, name: str, chain: _Chain) -> StoredWeights:
        assert chain.codes is not None
        found = _by_channel(chain) or _by_block(chain)
        if found is None:
            raise CompileError(
                f"the weights {name!r} have scales that follow neither channels nor blocks of a matrix",
                backend=self._backend,
                op="DequantizeLinear",
                hint="quantize them per channel",
            )
        scales, points, axis, block = found
        return StoredWeights(np.ascontiguousarray(chain.codes), scales, axis, points, block)

    def _drop_unread(self, read: set[str]) -> None:
        # Popped one by one: to rebuild the list would copy every weight.
        for index in reversed(range(len(self._graph.initializer))):
            if self._graph.initializer[index].name not in read:
                del self._graph.initializer[index]

    def _refused(self, node: NodeProto, what: str, hint: str) -> CompileError:
        return CompileError(what, backend=self._backend, node=node.name, op=node.op_type, hint=hint)


def _demand_known(nodes: Iterable[NodeProto], backend: str, *, is_inner: bool = False) -> None:
    """Refuse nodes that compute on integers, and any Q/DQ in a branch or loop body."""
    for node in nodes:
        is_pair = node.op_type in ("QuantizeLinear", "DequantizeLinear")
        is_foreign_pair = is_pair and (is_inner or node.domain not in ("", "ai.onnx"))
        if node.op_type in _INTEGER_OPERATORS or node.op_type.startswith("QLinear") or is_foreign_pair:
            raise CompileError(
                "it computes on integers by itself, and this back end's converter takes float graphs with scales only",
                backend=backend,
                node=node.name,
                op=node.op_type,
                hint='give the target weight_only = "DequantizeLinear" and dynamic = "refused" for this back end',
            )
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                _demand_known(inner.node, backend, is_inner=True)


def _slices(rank: int, numbers: list[NDArray[Any]]) -> tuple[slice, ...]:
    starts, ends = numbers[0].tolist(), numbers[1].tolist()
    axes = numbers[2].tolist() if len(numbers) > 2 else list(range(len(starts)))
    steps = numbers[3].tolist() if len(numbers) > 3 else [1] * len(starts)
    slices = [slice(None)] * rank
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        # ONNX writes "to before the first element" as a very negative end, which Python would count from the back.
        slices[axis] = slice(start, None if step < 0 and end < -(2**31) else end, step)
    return tuple(slices)


def _is_exact_in_float16(value: NDArray[np.float32]) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.array_equal(value.astype(np.float16).astype(np.float32), value))


Channels = tuple[NDArray[np.float32], NDArray[np.int32], int | None, int]


def _by_channel(chain: _Chain) -> Channels | None:
    """Return scales, zero-points and axis where each channel along one axis has one scale."""
    if chain.scales.size == 1:
        return chain.scales, chain.points, None, 0
    for axis in range(chain.place.ndim) if chain.axis is None else (chain.axis,):
        first = tuple(slice(None) if item == axis else slice(1) for item in range(chain.place.ndim))
        line = chain.place[first]
        if (chain.place == line).all():
            return chain.scales[line.reshape(-1)], chain.points[line.reshape(-1)], axis, 0
    return None


def _by_block(chain: _Chain) -> Channels | None:
    """Return scales and zero-points as (channels, blocks) of a matrix whose rows, or columns, have blocks."""
    if chain.place.ndim != 2:
        return None
    # Any pattern is one of blocks of 1; the axis with the longer ones is that along which they lie.
    block, axis = max((_block_of(chain.place), 0), (_block_of(chain.place.T), 1), key=lambda found: found[0])
    starts = (chain.place if axis == 0 else chain.place.T)[:, ::block] if block else None
    return None if starts is None else (chain.scales[starts], chain.points[starts], axis, block)


def _block_of(rows: NDArray[np.int32]) -> int:
    """Return how many neighbours in a row share a scale; 0: not always as many."""
    changes = np.flatnonzero(rows[0] != rows[0, 0])
    block = int(changes[0]) if changes.size else rows.shape[1]
    return block if (rows == rows[:, ::block].repeat(block, axis=1)[:, : rows.shape[1]]).all() else 0


def _rename(node: NodeProto, names: Mapping[str, str]) -> None:
    """Call tensors by their float names, in branches and loop bodies too."""
    for index, name in enumerate(node.input):
        node.input[index] = names.get(name, name)
    for index, name in enumerate(node.output):
        node.output[index] = names.get(name, name)
    for attribute in node.attribute:
        for inner in [attribute.g, *attribute.graphs]:
            for child in inner.node:
                _rename(child, names)
            for value in inner.output:
                value.name = names.get(value.name, value.name)


def _names_read(nodes: Iterable[NodeProto]) -> set[str]:
    read: set[str] = set()
    for node in nodes:
        read.update(node.input)
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                read |= _names_read(inner.node) | {value.name for value in inner.output}
    return read


def _quantized_nodes(
    model: ModelProto, activations: Mapping[str, Grid], weights: Mapping[str, StoredWeights]
) -> frozenset[str]:
    graph = model.graph
    floats = _float_tensors(model)
    constants = {item.name for item in graph.initializer}
    outputs = {value.name for value in graph.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in _names_read([node]):
            readers.setdefault(name, []).append(node)

    def is_rounded(tensor: str) -> bool:
        """Whether a tensor is rounded, itself or behind the clamp that alone reads it."""
        if tensor in activations:
            return True
        alone = readers.get(tensor, [])
        is_clamped = len(alone) == 1 and tensor not in outputs and alone[0].op_type in _CLAMPS
        return is_clamped and alone[0].output[0] in activations

    def is_quantized(node: NodeProto) -> bool:
        data = [name for name in node.input if name in floats and name not in constants]
        is_product = node.op_type in _PRODUCTS and len(node.input) > 1
        if is_product and node.input[1] in constants and node.input[1] not in weights:
            return False
        made = [name for name in node.output if name in floats]
        return bool(data and made) and all(is_rounded(name) for name in (*data, *made))

    return frozenset(node.name for node in graph.node if is_quantized(node))


def _float_tensors(model: ModelProto) -> set[str]:
    """Return tensors of a floating type; one whose type cannot be inferred counts as such."""
    import onnx

    kinds = {item.name: item.data_type for item in model.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(_without_weights(model)).graph
    for value in [*inferred.input, *inferred.value_info, *inferred.output]:
        kinds.setdefault(value.name, value.type.tensor_type.elem_type)
    tensors = {name for node in model.graph.node for name in (*node.input, *node.output) if name}
    return {name for name in tensors if kinds.get(name, _FLOAT) in _FLOATS | {0}}


def _without_weights(model: ModelProto) -> ModelProto:
    """Return a copy in which large constants have become inputs, so that inference copies no weights."""
    import onnx
    from onnx import helper

    slim = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import)
    slim.functions.extend(model.functions)
    graph: GraphProto = slim.graph
    graph.name = model.graph.name
    graph.node.extend(model.graph.node)
    graph.input.extend(model.graph.input)
    graph.output.extend(model.graph.output)
    known = {value.name for value in model.graph.input}
    for item in model.graph.initializer:
        if item.data_type not in _FLOATS:
            graph.initializer.append(item)
        elif item.name not in known:
            graph.input.append(helper.make_tensor_value_info(item.name, item.data_type, list(item.dims)))
    return slim
