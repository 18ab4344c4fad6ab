"""Reads a .tflite: what precision its operators got, and where inputs and outputs are."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from edgedeploy.backends.tflite.flatbuffer import FlatGraph, inputs_of, read
from edgedeploy.errors import CompileError
from edgedeploy.records.artifact import LayerReport, Port

# Names in the file's metadata under which compile says what the file itself has no field for.
PORTS = "edgedeploy.ports"
TENSORS = "edgedeploy.tensors"
FIXED_BATCH = "edgedeploy.fixed_batch"

_CONVERSIONS = frozenset({"QUANTIZE", "DEQUANTIZE"})
_STATE = (
    "its recurrent layers keep their state from one inference to the next; an application that starts anew each time "
    "must call reset_all_variables() first, as edgedeploy does"
)
_ONE_SAMPLE = (
    "it takes one sample at a time: its layers could not be converted with a free batch axis; fix the batch of the "
    "model (--input NAME=4x...) for another one"
)
# What has no arithmetic: it moves values, makes shapes or indices, or only hands on. In float it costs no accuracy.
_MOVES = frozenset({
    "RESHAPE", "SQUEEZE", "EXPAND_DIMS", "TRANSPOSE", "SLICE", "STRIDED_SLICE", "SPLIT", "SPLIT_V", "PACK", "UNPACK",
    "GATHER", "GATHER_ND", "TILE", "BROADCAST_TO", "PAD", "PADV2", "MIRROR_PAD", "SPACE_TO_DEPTH", "DEPTH_TO_SPACE",
    "SPACE_TO_BATCH_ND", "BATCH_TO_SPACE_ND", "REVERSE_V2", "CONCATENATION", "SHAPE", "FILL", "RANGE", "CAST",
    "RESIZE_NEAREST_NEIGHBOR", "MAX_POOL_2D", "REDUCE_MAX", "REDUCE_MIN",
})  # fmt: skip


def report(artifact: Path) -> LayerReport:
    """Return what a compiled file says of its layers.

    Raises:
        CompileError: the file is no .tflite, or was not written by edgedeploy.
    """
    graph = read(artifact)
    tensors = _said(graph, TENSORS, artifact)
    operators = Counter(graph.operator_name(operator) for operator in graph.operators)
    quantized = [operator for operator in graph.operators if _is_integer(graph, operator)]
    floats = [operator for operator in graph.operators if _is_float(graph, operator)]
    return LayerReport(
        operators=dict(sorted(operators.items())),
        quantized=tuple(_label(graph, operator) for operator in quantized),
        float_islands=tuple(_label(graph, operator) for operator in floats) if quantized else (),
        scales=_scales(graph, tensors),
        expanded=_expanded(graph, tensors),
        ports={name: Port(**entry) for name, entry in sorted(_said(graph, PORTS, artifact).items())},
        notes=_notes(graph),
    )


def _notes(graph: FlatGraph) -> tuple[str, ...]:
    keeps_state = any(tensor.isVariable for tensor in graph.tensors)
    is_fixed = graph.metadata(FIXED_BATCH) is not None
    return (*([_STATE] if keeps_state else []), *([_ONE_SAMPLE] if is_fixed else []))


def write_said(
    graph: FlatGraph, ports: dict[str, Port], tensors: dict[str, str], *, is_batch_fixed: bool = False
) -> None:
    """Put into a file what `report` reads from it.

    Args:
        graph: the file.
        ports: the model's input or output → where the file has it.
        tensors: rounded tensor or weights of the model → the tensor that stores it.
        is_batch_fixed: whether a batch that is free in the model had to be fixed at 1.
    """
    if is_batch_fixed:
        graph.set_metadata(FIXED_BATCH, b"1")
    said = {
        name: {"tensor": port.tensor, "layout": port.layout, "permutation": list(port.permutation)}
        for name, port in ports.items()
    }
    for key, value in ((PORTS, said), (TENSORS, tensors)):
        graph.set_metadata(key, json.dumps(value, sort_keys=True, separators=(",", ":")).encode())


def _said(graph: FlatGraph, key: str, artifact: Path) -> dict[str, Any]:
    data = graph.metadata(key)
    if data is None:
        raise CompileError(
            f"{artifact} has no {key} among its metadata, so edgedeploy did not write it",
            backend="tflite",
            hint="compile it again from the model",
        )
    said = json.loads(data)
    for entry in said.values():
        if isinstance(entry, dict):
            entry["permutation"] = tuple(entry["permutation"])
    return dict(said)


def _is_integer(graph: FlatGraph, operator: Any) -> bool:
    """Whether an operator computes on int8: it makes a quantized int8 tensor from another."""
    made = [int(index) for index in operator.outputs]
    return (
        graph.operator_name(operator) not in _CONVERSIONS
        and any(graph.dtype(index) == "int8" and graph.scales(index) for index in made)
        and any(graph.dtype(index) == "int8" for index in inputs_of(operator))
    )


def _is_float(graph: FlatGraph, operator: Any) -> bool:
    """Whether an operator computes in float."""
    made = [int(index) for index in operator.outputs]
    return graph.operator_name(operator) not in _CONVERSIONS | _MOVES and any(
        graph.dtype(index) in ("float32", "float16") for index in made
    )


def _label(graph: FlatGraph, operator: Any) -> str:
    return f"{graph.operator_name(operator)} {graph.name(int(operator.outputs[0])).partition('/stored')[0]}"


def _scales(graph: FlatGraph, tensors: dict[str, str]) -> dict[str, tuple[float, ...]]:
    places = {graph.name(index): index for index in range(len(graph.tensors))}
    found = {name: graph.scales(places[stored]) for name, stored in tensors.items() if stored in places}
    return {name: scales for name, scales in sorted(found.items()) if scales}


def _expanded(graph: FlatGraph, tensors: dict[str, str]) -> tuple[str, ...]:
    """Return weights that the file stores small and a DEQUANTIZE widens when it is loaded."""
    widened = {
        graph.name(int(operator.inputs[0]))
        for operator in graph.operators
        if graph.operator_name(operator) == "DEQUANTIZE" and graph.constant(int(operator.inputs[0])) is not None
    }
    return tuple(sorted(name for name, stored in tensors.items() if stored in widened))
