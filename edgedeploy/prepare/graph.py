"""ONNX graphs as the host sees them: read, look around, write reproducibly, and run on ONNX Runtime."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from edgedeploy.errors import BackendMissing, ModelError
from edgedeploy.records.model import DType, TensorSpec
from edgedeploy.storage import write_atomic

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto

Tensors = dict[str, NDArray[Any]]

# How ONNX Runtime names an operator of a domain that it has nothing of, and its version.
_UNKNOWN_OPERATOR = re.compile(r"(?P<name>[\w.]*:?\w+)\(-?\d+\) is not a registered function/op")
# protobuf cannot serialise more into one message.
MAX_FILE_BYTES = 2**31 - 1
# The file format's own version: 8 goes with opset 18 and is read by ONNX Runtime 1.14 and later (JetPack 5 has 1.16).
# Newer tools stamp a newer version on files that use nothing of it, and runtimes refuse it unseen.
_IR_VERSIONS = {19: 9, 20: 9, 21: 10, 22: 10}
_OLDEST_IR_VERSION = 8
_DTYPES: dict[int, DType] = {
    1: "float32", 2: "uint8", 3: "int8", 5: "int16", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 11: "float64",
}  # fmt: skip

# https://onnx.ai/onnx/operators/onnx__ReduceMean.html: before, the axes are an attribute.
FIRST_OPSET_WITH_REDUCED_AXES_AS_INPUT = 18


@dataclass(frozen=True, slots=True)
class View:
    """A graph with its constants, producers and consumers looked up once; a snapshot, not updated by edits.

    Attributes:
        constants: initializer name → value.
        producers: tensor → the node that makes it.
        consumers: tensor → the nodes that read it, once for each time they do.
        outputs: names of the graph's outputs.
    """

    graph: GraphProto
    constants: Mapping[str, NDArray[Any]]
    producers: Mapping[str, NodeProto]
    consumers: Mapping[str, Sequence[NodeProto]]
    outputs: frozenset[str] = field(default_factory=frozenset)

    def sole_consumer(self, tensor: str) -> NodeProto | None:
        """Return the only node that reads a tensor, or None when there are several, none, or it is a graph output."""
        readers = self.consumers.get(tensor, ())
        return readers[0] if len(readers) == 1 and tensor not in self.outputs else None


def view(graph: GraphProto) -> View:
    """Look a graph up."""
    from onnx import numpy_helper

    producers: dict[str, NodeProto] = {}
    consumers: dict[str, list[NodeProto]] = {}
    for node in graph.node:
        for name in node.output:
            producers[name] = node
        for name in _read_by(node):
            consumers.setdefault(name, []).append(node)
    constants = {item.name: numpy_helper.to_array(item) for item in graph.initializer}
    return View(graph, constants, producers, consumers, frozenset(item.name for item in graph.output))


def _read_by(node: NodeProto) -> list[str]:
    """Return what a node reads, including what its branches and loop bodies take from outside."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for inner in [attribute.g, *attribute.graphs]:
            names += [name for child in inner.node for name in _read_by(child)]
    return names


def attributes(node: NodeProto) -> dict[str, Any]:
    """Return a node's attributes as Python values."""
    from onnx import helper

    return {item.name: helper.get_attribute_value(item) for item in node.attribute}


def opset_of(model: ModelProto) -> int:
    """Return the version of ONNX's own operators that a model uses."""
    return next((int(item.version) for item in model.opset_import if item.domain in ("", "ai.onnx")), 0)


def specs_of(values: Any) -> tuple[TensorSpec, ...]:
    """Return graph inputs or outputs as specifications; an axis without a name or size is named after its tensor.

    Raises:
        ModelError: something that is no tensor, or has a type that we do not carry.
    """
    specs = []
    for value in values:
        tensor = value.type.tensor_type
        if value.type.WhichOneof("value") != "tensor_type" or tensor.elem_type not in _DTYPES:
            raise ModelError(
                f"{value.name!r} is not a plain tensor of a type we carry ({', '.join(_DTYPES.values())}); change the "
                f"model's interface"
            )
        shape = tuple(
            size.dim_param or f"{value.name}_{axis}" if size.WhichOneof("value") != "dim_value" else int(size.dim_value)
            for axis, size in enumerate(tensor.shape.dim)
        )
        specs.append(TensorSpec(name=value.name, dtype=_DTYPES[tensor.elem_type], shape=shape))
    return tuple(specs)


def read_graph(path: Path) -> ModelProto:
    """Read an ONNX file of ours, weights inside."""
    import onnx

    return onnx.load(str(path), load_external_data=False)


def write_graph(model: ModelProto, path: Path) -> None:
    """Check a model and write it so that the same model always gives the same bytes.

    Raises:
        ModelError: the graph is not valid, or too large for one file.
    """
    import onnx

    tidy(model)
    if model.ByteSize() > MAX_FILE_BYTES:
        raise ModelError(f"the ONNX file would have {model.ByteSize()} bytes; files of 2 GB and more are not supported")
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"the ONNX graph for {path.name} is not valid: {error}") from error
    write_atomic(path, model.SerializeToString(deterministic=True))


def stamp_oldest(model: ModelProto) -> None:
    """Stamp the oldest file format version on a model that has what its opset needs."""
    opset = opset_of(model)
    if opset <= max(_IR_VERSIONS):
        model.ir_version = min(model.ir_version, _IR_VERSIONS.get(opset, _OLDEST_IR_VERSION))


def tidy(model: ModelProto) -> None:
    """Remove what exporters leave behind and no runtime reads: source paths, stack traces, inner shapes."""
    stamp_oldest(model)
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    used: set[str] = set()
    for index, node in enumerate(graph.node):
        node.doc_string = ""
        del node.metadata_props[:]
        # Every node has a name of its own: the quantization table refers to nodes by it.
        name = node.name or f"{node.op_type}_{index}"
        node.name = name if name not in used else f"{name}_{index}"
        used.add(node.name)
    for value in [*graph.input, *graph.output, *graph.initializer]:
        value.doc_string = ""
        del value.metadata_props[:]


def drop_unused_constants(model: ModelProto) -> None:
    """Remove initializers that nothing reads."""
    seen = view(model.graph)
    used = [item for item in model.graph.initializer if item.name in seen.consumers or item.name in seen.outputs]
    del model.graph.initializer[:]
    model.graph.initializer.extend(used)


def _has_int8_activations(graph: GraphProto) -> bool:
    types = {item.name: item.data_type for item in graph.initializer}
    stored = (node.input[2] for node in graph.node if node.op_type == "QuantizeLinear" and len(node.input) > 2)
    return any(types.get(name) == graph.initializer[0].INT8 for name in stored)


def _on_exact_kernels(model: Path | bytes, options: Any) -> str | bytes:
    """Let the optimiser choose 8-bit kernels whose numbers are right also on x86 without VNNI; return what to load.

    The default ones saturate there. Right are fused ones of int8 activations, as on ARM, and precise ones of uint8
    activations; both settings at once make an operator that has no kernel (seen in onnxruntime 1.31.1).
    """
    import onnx

    loaded = onnx.load(str(model)) if isinstance(model, Path) else onnx.load_from_string(model)
    exact = "qdqisint8allowed" if _has_int8_activations(loaded.graph) else "x64quantprecision"
    options.add_session_config_entry(f"session.{exact}", "1")
    # Weights that are dequantized for a MatMul stay what they are; the default rounds activations to 8 bits beside.
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    if any(node.op_type == "DequantizeLinear" for node in loaded.graph.node):
        unshared: bytes = _unshared(loaded).SerializeToString()
        return unshared
    return str(model) if isinstance(model, Path) else model


def _unshared(model: ModelProto) -> ModelProto:
    """Give each reader of dequantized constants its own, since precise kernels rewrite them and meet no name twice.

    Without it, onnxruntime 1.31.1 cannot load a model in which two layers share quantized weights; its error is
    "AddInitializedOrtValue Attempt to replace the existing tensor".
    """
    constants = {item.name: item for item in model.graph.initializer}
    readers: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    nodes: list[NodeProto] = []
    for node in model.graph.node:
        nodes.append(node)
        if node.op_type != "DequantizeLinear" or not all(name in constants for name in node.input):
            continue
        for number, reader in enumerate(readers.get(node.output[0], ())[1:], 1):
            twin = type(node)()
            twin.CopyFrom(node)
            twin.output[0] = f"{node.output[0]}/{number}"
            twin.name = f"{node.name}/{number}"
            for index, name in enumerate(node.input):
                copied = model.graph.initializer.add()
                copied.CopyFrom(constants[name])
                twin.input[index] = copied.name = f"{name}/{number}"
            position = list(reader.input).index(node.output[0])
            reader.input[position] = twin.output[0]
            nodes.append(twin)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return model


def reduce_axes(model: ModelProto, operator: str, tensor: str, axes: Sequence[int], result: str) -> None:
    """Append ReduceMean or ReduceMax over axes that vanish, in the words of the model's opset."""
    from onnx import helper, numpy_helper

    if opset_of(model) < FIRST_OPSET_WITH_REDUCED_AXES_AS_INPUT:
        node = helper.make_node(operator, [tensor], [result], axes=list(axes), keepdims=0)
    else:
        name = f"{result}/axes"
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(axes, np.int64), name))
        node = helper.make_node(operator, [tensor, name], [result], keepdims=0)
    model.graph.node.append(node)


class Runner:
    """An ONNX model on the host's ONNX Runtime: inputs → outputs.

    Args:
        model: a file, or a serialised model.
        is_optimized: whether the runtime may rewrite the graph; without, a Q/DQ graph is computed as it is written,
            in float, which is what its numbers mean.
    """

    def __init__(self, model: Path | bytes, *, is_optimized: bool = True) -> None:
        try:
            import onnxruntime
        except ModuleNotFoundError as error:
            raise BackendMissing(
                "preparing a model needs ONNX Runtime on this machine; pip install 'edgedeploy[onnxruntime]'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        # Idle threads that spin slow down everything else on the machine, and nothing is timed here.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        level = onnxruntime.GraphOptimizationLevel
        options.graph_optimization_level = level.ORT_ENABLE_ALL if is_optimized else level.ORT_DISABLE_ALL
        source = str(model) if isinstance(model, Path) else model
        if is_optimized:
            source = _on_exact_kernels(model, options)
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has one exception class for each status code, and none in common
            what = model.name if isinstance(model, Path) else "the model"
            if unknown := _UNKNOWN_OPERATOR.search(str(error)):
                raise ModelError(
                    f"{what} has the operator {unknown['name']}, which is neither ONNX's nor one that ONNX Runtime "
                    f"brings; replace it in the model by standard operators"
                ) from error
            raise ModelError(f"ONNX Runtime cannot load {what}: {error}") from error
        self.outputs: list[str] = [output.name for output in self._session.get_outputs()]

    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> Tensors:
        """Run one batch."""
        try:
            values = self._session.run(self.outputs, dict(inputs))
        except Exception as error:  # as above
            raise ModelError(f"ONNX Runtime cannot run the model: {error}") from error
        return {name: np.asarray(value) for name, value in zip(self.outputs, values, strict=True)}
