"""Writes a form's integers into a float .tflite: its grids, its weights, its integer kernels.

Nothing is derived from data here. Each scale, zero-point and weight is the form's to the last bit, or the model is
refused; a tensor that the form leaves float stays float, with a QUANTIZE or DEQUANTIZE where the two meet.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from edgedeploy.backends.tflite.constants import KnownWeights, fingerprint
from edgedeploy.backends.tflite.conversion import Converted
from edgedeploy.backends.tflite.flatbuffer import NO_TENSOR, FlatGraph, inputs_of
from edgedeploy.backends.tflite.kernels import (
    DEQUANTIZE_CHANNELS_VERSION,
    DEQUANTIZE_HALF_VERSION,
    DEQUANTIZE_VERSION,
    KERNELS,
    QUANTIZE_VERSION,
    REARRANGES,
    REQUANTIZE_VERSION,
    Kernel,
)
from edgedeploy.errors import CompileError
from edgedeploy.records.quantization import Grid

if TYPE_CHECKING:
    from onnx import NodeProto

    from edgedeploy.backends.qdq import Form, StoredWeights

_BACKEND = "tflite"
STORED = "/stored"
# What must compute on integers when all that it reads and writes is rounded; anything else would be a silent island.
_EXPECTED_INTEGER = frozenset({
    "Conv", "ConvTranspose", "Gemm", "MatMul", "Add", "Concat", "AveragePool", "GlobalAveragePool", "MaxPool",
})  # fmt: skip
_CLAMPS = ("Relu", "Clip")
_INT32_MAX = 2**31 - 1


def write_integers(converted: Converted, form: Form) -> dict[str, str]:
    """Turn a converted float model into the form's int8 model, in place.

    Args:
        converted: the float model; its tensors are known by the form's names.
        form: what is rounded, to which grids, and which integers the weights are.

    Returns:
        Name of a rounded tensor or of weights → name of the int8 tensor that holds it.

    Raises:
        CompileError: a rounded tensor or weights that the file does not have, weights or biases that TFLite's kernels
            do not take, or a quantized node that TFLite would compute in float.
    """
    grids, names = _grids(converted, form)
    _spread(converted.graph, grids)
    writer = _Writer(converted.graph, grids, names, KnownWeights(form.weights))
    writer.write()
    _demand_integer_nodes(form, converted, writer)
    _demand_weights(form, writer.weights)
    return writer.stored(form.activations, converted.tensors)


def _grids(converted: Converted, form: Form) -> tuple[dict[int, Grid], dict[int, str]]:
    """Return the grid of each tensor of the file that the form rounds, and whose name it bears."""
    lost = [name for name in form.activations if not converted.tensors.get(name)]
    if lost:
        node = _maker(form, lost[0])
        raise CompileError(
            f"the converter leaves out {len(lost)} of {len(form.activations)} rounded tensors: {', '.join(lost[:8])}",
            backend=_BACKEND,
            node=node.name if node is not None else "",
            op=node.op_type if node is not None else "",
            hint="leave that node in float (-Q float_layers), or report the model",
        )
    grids: dict[int, Grid] = {}
    names: dict[int, str] = {}
    for name, grid in form.activations.items():
        if (grid.low_code, grid.high_code) != (-128, 127):
            raise CompileError(
                f"the tensor {name!r} is rounded to {grid.low_code} to {grid.high_code}; TFLite computes on int8",
                backend=_BACKEND,
                hint='the target\'s rules must say activation_dtype = "int8"',
            )
        for index in converted.tensors[name]:
            # Equal values under several names are one tensor that was only rearranged: its own name decides.
            if index not in grids or converted.graph.name(index) == name:
                grids[index], names[index] = grid, name
    return grids, names


def _maker(form: Form, tensor: str) -> NodeProto | None:
    return next((node for node in form.graph.graph.node if tensor in node.output), None)


def _spread(graph: FlatGraph, grids: dict[int, Grid]) -> None:
    """Give tensors between rounded ones the grid that changes nothing: that of what they are a rearrangement of.

    Backwards first (a product whose result is only turned before it is rounded), then forwards, through everything
    that hands on values (pads, pools, slices). A constant has no grid.
    """
    readers = graph.readers()
    outputs = {int(index) for index in graph.graph.outputs}
    for operator in reversed(graph.operators):
        if graph.operator_name(operator) not in REARRANGES:
            continue
        source, made = int(operator.inputs[0]), int(operator.outputs[0])
        alone = len(readers.get(source, ())) == 1 and source not in outputs and graph.constant(source) is None
        if made in grids and source not in grids and alone and graph.dtype(source) == "float32":
            grids[source] = grids[made]
    for operator in graph.operators:
        kernel = KERNELS.get(graph.operator_name(operator))
        if kernel is None or not kernel.moves:
            continue
        assert kernel.data is not None
        source = int(operator.inputs[kernel.data[0]])
        for made in (int(index) for index in operator.outputs):
            if source in grids and made not in grids and graph.dtype(made) == "float32":
                grids[made] = grids[source]


@dataclass(frozen=True, slots=True)
class _Stored:
    """An int8 tensor and its grid."""

    index: int
    grid: Grid


class _Writer:
    """Writes a graph's operators anew, in their order, converting between float and int8 where the two meet."""

    def __init__(
        self, graph: FlatGraph, grids: Mapping[int, Grid], names: Mapping[int, str], weights: KnownWeights
    ) -> None:
        self._graph, self._grids, self._names, self._known = graph, grids, names, weights
        self._outputs = {int(index) for index in graph.graph.outputs}
        self._inputs = {int(index) for index in graph.graph.inputs}
        self._written: list[Any] = []
        # Tensor → its int8 versions, that on its own grid first.
        self._stored: dict[int, list[_Stored]] = {}
        # Tensor → its float version, as far as it is written.
        self._floats: dict[int, int] = {}
        self._taken: set[str] = set()
        self._constants: dict[tuple[Any, ...], int] = {}
        self.weights: dict[str, str] = {}
        # Tensors of the float model that are computed, and those of them that integer kernels compute.
        self.computed = set(graph.makers())
        self.integer: set[int] = set()

    def write(self) -> None:
        """Write all operators."""
        operators = self._graph.operators
        for operator in operators:
            kernel = KERNELS.get(self._graph.operator_name(operator))
            if kernel is not None and self._fits(operator, kernel):
                self._integer(operator, kernel)
            else:
                self._float(operator)
        for index in sorted(self._outputs):
            self._as_float(index)
        self._graph.operators = self._written

    def stored(self, activations: Mapping[str, Grid], tensors: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
        """Return what holds each rounded tensor and all weights."""
        found = dict(self.weights)
        for name, grid in activations.items():
            held = [one for index in tensors[name] for one in self._stored.get(index, ()) if one.grid == grid]
            if held:
                found[name] = self._graph.name(held[0].index)
        return found

    def _fits(self, operator: Any, kernel: Kernel) -> bool:
        """Whether an operator can compute on int8: every activation has a grid, and every constant is known."""
        graph = self._graph
        data = self._data(operator, kernel)
        made = [int(index) for index in operator.outputs]
        if not data or not all(index in self._grids and graph.dtype(index) == "float32" for index in data):
            return False
        if not all(index in self._grids and graph.dtype(index) == "float32" for index in made):
            return False
        if kernel.weights is None:
            return True
        constant = graph.constant(int(operator.inputs[kernel.weights]))
        bias = self._place(operator, kernel.bias)
        if constant is None or (bias is not None and graph.constant(bias) is None):
            return False
        return self._known.find(constant, kernel.axis) is not None

    def _data(self, operator: Any, kernel: Kernel) -> list[int]:
        if kernel.data is None:
            return inputs_of(operator)
        return [int(operator.inputs[place]) for place in kernel.data]

    def _place(self, operator: Any, place: int | None) -> int | None:
        if place is None or place >= len(operator.inputs) or int(operator.inputs[place]) == NO_TENSOR:
            return None
        return int(operator.inputs[place])

    def _integer(self, operator: Any, kernel: Kernel) -> None:
        graph = self._graph
        data = self._data(operator, kernel)
        made = [int(index) for index in operator.outputs]
        own = self._grids[made[0]]
        if kernel.grids == "as output":
            inputs = [self._as_integer(index, own) for index in data]
        else:
            inputs = [self._as_integer(index, self._grids[index]) for index in data]
        results = {"fixed": kernel.fixed, "as input": self._grids[data[0]]}.get(kernel.grids)
        replaced = dict(zip(data, inputs, strict=True))
        operator.inputs = np.asarray([replaced.get(int(index), int(index)) for index in operator.inputs], np.int32)
        if kernel.weights is not None:
            self._use_weights(operator, kernel, self._grids[data[0]].scale)
        if graph.operator_name(operator) == "PADV2":
            operator.inputs[2] = self._pad_value(int(operator.inputs[2]), self._grids[data[0]])
        operator.opcodeIndex = graph.opcode(graph.operator_name(operator), max(kernel.version, graph.version(operator)))
        stored = [self._store(index, results or self._grids[index]) for index in made]
        operator.outputs = np.asarray(stored, np.int32)
        self._written.append(operator)
        self.integer.update(made)
        for index in made:  # where the kernel's grid is not the tensor's own
            self._as_integer(index, self._grids[index])

    def _float(self, operator: Any) -> None:
        graph = self._graph
        operator.inputs = np.asarray(
            [index if index == NO_TENSOR else self._as_float(index) for index in map(int, operator.inputs)], np.int32
        )
        made = []
        for index in map(int, operator.outputs):
            if index not in self._grids or graph.dtype(index) != "float32":
                self._floats[index] = index
                made.append(index)
                continue
            raw = graph.add_tensor(self._free(f"{graph.name(index)}/float"), "float32", index)
            made.append(raw)
        self._written.append(operator)
        for index, raw in zip(map(int, operator.outputs), made, strict=True):
            if raw != index:
                self._convert(raw, self._store(index, self._grids[index]), "QUANTIZE", QUANTIZE_VERSION)
        operator.outputs = np.asarray(made, np.int32)

    def _as_integer(self, index: int, grid: Grid) -> int:
        """Return a tensor's int8 version on a grid."""
        versions = self._stored.get(index, [])
        for one in versions:
            if one.grid == grid:
                return one.index
        if versions:
            # Who reads another grid reads what was rounded to the tensor's own, where that is written.
            first = next((one for one in versions if one.grid == self._grids.get(index)), versions[0])
            source, version = first.index, REQUANTIZE_VERSION
        else:  # an input of the model, which is float
            source, version = index, QUANTIZE_VERSION
        return self._convert(source, self._store(index, grid), "QUANTIZE", version)

    def _as_float(self, index: int) -> int:
        """Return a tensor's float version: of a rounded one what its integers stand for."""
        if index in self._floats:
            return self._floats[index]
        if index not in self._grids or self._graph.dtype(index) != "float32":
            self._floats[index] = self._constant_as_float(index)
            return self._floats[index]
        stored = self._as_integer(index, self._grids[index])
        target = index
        if index in self._inputs:
            if index in self._outputs:  # an input that is handed out as it is
                return index
            target = self._graph.add_tensor(self._free(f"{self._graph.name(index)}/dequantized"), "float32", index)
        self._floats[index] = self._convert(stored, target, "DEQUANTIZE", DEQUANTIZE_VERSION)
        return self._floats[index]

    def _constant_as_float(self, index: int) -> int:
        """Return a tensor as it is, or behind a DEQUANTIZE where it is a form's integer weights."""
        graph = self._graph
        constant = graph.constant(index)
        if constant is None or constant.ndim < 2:
            return index
        found = self._known.find_anywhere(constant)
        if found is None:
            return index
        stored = self._add_weights(found.names, found.codes, found.scales, found.axis)
        version = DEQUANTIZE_CHANNELS_VERSION if len(found.scales) > 1 else DEQUANTIZE_VERSION
        target = graph.add_tensor(self._free(f"{found.names[0]}/dequantized"), "float32", stored)
        graph.tensors[target].shape = graph.tensors[index].shape
        return self._convert(stored, target, "DEQUANTIZE", version)

    def _store(self, index: int, grid: Grid) -> int:
        """Add an int8 version of a tensor."""
        name = self._free(self._names.get(index, self._graph.name(index)) + STORED)
        added = self._graph.add_quantized(name, index, grid)
        self._stored.setdefault(index, []).append(_Stored(added, grid))
        return added

    def _convert(self, source: int, target: int, name: str, version: int) -> int:
        self._written.append(self._graph.operator(name, [source], [target], version))
        return target

    def _free(self, name: str) -> str:
        """Return a name that no tensor written here has."""
        free, number = name, 1
        while free in self._taken:
            number += 1
            free = f"{name}/{number}"
        self._taken.add(free)
        return free

    def _pad_value(self, index: int, grid: Grid) -> int:
        value = self._graph.constant(index)
        if value is None or value.dtype != np.float32:
            raise CompileError(
                "a PADV2 pads with what is computed",
                backend=_BACKEND,
                node=self._graph.name(index),
                op="Pad",
                hint="pad with a constant",
            )
        with np.errstate(over="ignore"):
            codes = np.rint(value / np.float32(grid.scale)) + grid.zero_point
        stored = np.clip(codes, grid.low_code, grid.high_code).astype(np.int8)
        name = self._free(self._graph.name(index) + STORED)
        return self._graph.add_tensor(
            name, "int8", index, values=stored, scales=(grid.scale,), zero_point=grid.zero_point
        )

    def _use_weights(self, operator: Any, kernel: Kernel, input_scale: float) -> None:
        assert kernel.weights is not None
        constant = self._graph.constant(int(operator.inputs[kernel.weights]))
        assert constant is not None
        found = self._known.find(constant, kernel.axis)
        assert found is not None
        operator.inputs[kernel.weights] = self._add_weights(found.names, found.codes, found.scales, kernel.axis)
        bias = self._place(operator, kernel.bias)
        if bias is not None:
            assert kernel.bias is not None
            operator.inputs[kernel.bias] = self._bias(bias, np.float32(input_scale) * found.scales, found.names[0])

    def _add_weights(self, names: tuple[str, ...], codes: Any, scales: Any, axis: int) -> int:
        """Add integer weights once for all that read them."""
        key = (codes.shape, codes.tobytes(), scales.tobytes(), axis)
        if key not in self._constants:
            name = self._free(names[0] + STORED)
            self._constants[key] = self._graph.add_tensor(name, "int8", 0, values=codes, scales=scales, axis=axis)
        for name in names:
            self.weights.setdefault(name, self._graph.name(self._constants[key]))
        return self._constants[key]

    def _bias(self, index: int, scales: Any, weights: str) -> int:
        """Add a bias as int32 at input scale times weight scale, which is what the kernels demand."""
        graph = self._graph
        values = graph.constant(index)
        assert values is not None
        codes = np.rint(values.astype(np.float64) / np.asarray(scales, np.float64))
        if np.abs(codes).max(initial=0) > _INT32_MAX:
            raise CompileError(
                f"the bias beside the weights {weights!r} is {np.abs(codes).max():.3g} times the product of the scales "
                f"of input and weights, more than 32 bits hold",
                backend=_BACKEND,
                hint="leave that node in float (-Q float_layers): a channel has weights near zero and a large bias",
            )
        key = ("bias", codes.tobytes(), np.asarray(scales).tobytes())
        if key not in self._constants:
            name = self._free(f"{weights}/bias{STORED}")
            self._constants[key] = graph.add_tensor(name, "int32", 0, values=codes.astype(np.int32), scales=scales)
        return self._constants[key]


def _demand_integer_nodes(form: Form, converted: Converted, writer: _Writer) -> None:
    """Raise where a quantized node became something that computes in float."""
    readers: dict[str, list[NodeProto]] = {}
    for node in form.graph.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    computed = writer.computed
    for node in form.graph.graph.node:
        if node.name not in form.quantized_nodes or node.op_type not in _EXPECTED_INTEGER:
            continue
        output = node.output[0]
        clamps = [one for one in readers.get(output, ()) if one.op_type in _CLAMPS]
        if output not in form.activations and len(readers.get(output, ())) == 1 and clamps:
            output = clamps[0].output[0]
        if not (places := computed.intersection(converted.tensors.get(output, ()))) or not places <= writer.integer:
            raise CompileError(
                "all that it reads and writes is rounded, but TFLite would compute it in float",
                backend=_BACKEND,
                node=node.name,
                op=node.op_type,
                hint="leave it in float (-Q float_layers), or report the model",
            )


def _demand_weights(form: Form, written: Collection[str]) -> None:
    lost = [name for name in form.weights if name not in written]
    if not lost:
        return
    readers = [node for node in form.graph.graph.node if lost[0] in node.input]
    stored: StoredWeights = form.weights[lost[0]]
    why = "they have a scale for each block" if stored.scales.ndim > 1 else "the converter changes their values"
    raise CompileError(
        f"{len(lost)} integer weights cannot be kept ({', '.join(lost[:8])}): {why}, and they would become float32",
        backend=_BACKEND,
        node=readers[0].name if readers else "",
        op=readers[0].op_type if readers else "",
        hint="give them one scale for each output channel, or leave the node in float (-Q float_layers)",
    )


def write_short_floats(graph: FlatGraph, names: Collection[str], values: Mapping[str, Any]) -> dict[str, str]:
    """Store weights in float16 behind a DEQUANTIZE, in place; what is computed stays float32.

    Args:
        graph: the converted float model.
        names: initializers that float16 holds without loss.
        values: initializer → its float32 values.

    Returns:
        Initializer → name of the float16 tensor that holds it, or a part of it.
    """
    prints = {fingerprint(values[name]): name for name in names}
    # Parts of weights, which the converter has split, hold values of the whole.
    known = np.unique(np.concatenate([values[name].ravel() for name in names])) if names else np.zeros(0, np.float32)
    dequantized: dict[int, int] = {}
    stored: dict[str, str] = {}
    made: list[Any] = []
    for operator in graph.operators:
        for place, index in enumerate(map(int, operator.inputs)):
            constant = graph.constant(index) if index != NO_TENSOR else None
            if constant is None or constant.dtype != np.float32 or constant.ndim < 2:
                continue
            name = prints.get(fingerprint(constant))
            if name is None and not (np.isin(constant, known).all() and constant.size > 1):
                continue
            if index not in dequantized:
                label = name or graph.name(index)
                half = graph.add_tensor(f"{label}{STORED}", "float16", 0, values=constant.astype(np.float16))
                target = graph.add_tensor(f"{label}/widened", "float32", half)
                made.append(graph.operator("DEQUANTIZE", [half], [target], DEQUANTIZE_HALF_VERSION))
                dequantized[index] = target
                stored[label] = graph.name(half)
            operator.inputs[place] = dequantized[index]
    graph.operators = [*made, *graph.operators]
    return stored
