"""ONNX Runtime: compiled for it, a model is one self-contained .onnx; what is fused is decided at load time."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgedeploy.backends.toolenv import ToolEnvironment
from edgedeploy.errors import BackendMissing, CompileError
from edgedeploy.records.artifact import LayerReport
from edgedeploy.records.explanation import ProfiledLayer
from edgedeploy.records.model import Model
from edgedeploy.records.runtime import DeviceRuntime
from edgedeploy.records.target import Precision, Target
from edgedeploy.storage import write_atomic

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto


@dataclasses.dataclass(frozen=True, slots=True)
class _Scales:
    """Where an operator has its scales: (tensor, scale) by input index, and the index of its output's scale."""

    inputs: tuple[tuple[int, int], ...]
    output: int | None = None


_UNARY = _Scales(((0, 1),), 3)
_BINARY = _Scales(((0, 1), (3, 4)), 6)
# What computes on integers once ONNX Runtime has fused Q/DQ pairs into it; the order of inputs is that of its operator
# documentation (docs/ContribOperators.md) and of ONNX.
_INTEGER_OPERATORS = {
    "QLinearConv": _BINARY, "QLinearMatMul": _BINARY, "QLinearAdd": _BINARY, "QLinearMul": _BINARY,
    "QGemm": _Scales(((0, 1), (3, 4)), 7),
    "MatMulInteger": _Scales(()), "ConvInteger": _Scales(()),
    "MatMulIntegerToFloat": _Scales(((0, 2), (1, 3))),
    "DynamicQuantizeMatMul": _Scales(((1, 2),)),
    "DynamicQuantizeLSTM": _Scales(((1, 8), (2, 10))),
    "MatMulNBits": _Scales(((1, 2),)),
    "QLinearAveragePool": _UNARY, "QLinearGlobalAveragePool": _UNARY, "QLinearSoftmax": _UNARY,
    "QLinearSigmoid": _UNARY, "QLinearLeakyRelu": _UNARY, "QLinearReduceMean": _UNARY,
    # The output's scale comes first, then tensor, scale and zero-point of each input.
    "QLinearConcat": _Scales(tuple((index, index + 1) for index in range(2, 2 + 3 * 64, 3)), 0),
}  # fmt: skip
_BORDERS = {"QuantizeLinear": _Scales((), 1), "DequantizeLinear": _Scales(((0, 1),))}
# What computes in float when its output is a float tensor, and would be integer arithmetic had it been fused.
_FLOAT_OPERATORS = frozenset({
    "Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Einsum", "Attention",
    "MultiHeadAttention", "Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Exp", "Log", "Erf", "AveragePool",
    "GlobalAveragePool", "LpPool", "ReduceMean", "ReduceMax", "ReduceMin", "ReduceSum", "ReduceL2", "CumSum", "Concat",
    "Relu", "Clip", "LeakyRelu", "PRelu", "Elu", "Celu", "Selu", "Sigmoid", "Tanh", "Mish", "Softplus", "HardSigmoid",
    "HardSwish", "Gelu", "FastGelu", "BiasGelu",
    "QuickGelu", "Softmax", "LogSoftmax", "BatchNormalization", "InstanceNormalization",
    "GroupNormalization", "GroupNorm", "LayerNormalization", "SimplifiedLayerNormalization", "SkipLayerNormalization",
    "Resize", "GridSample", "Where", "LSTM", "GRU", "RNN", "Gather",
})  # fmt: skip
# Element types of the ONNX file format in which weights are stored in fewer bytes than float32 takes.
_SMALL_TYPES = frozenset({2, 3, 10, 16, 17, 18, 19, 20, 21, 22})
_FLOAT_TYPES = frozenset({1, 10, 11, 16})
# How an emitted form names what it stores for a tensor; the runtime appends to it what it rearranges.
_STORED = re.compile(r"/(stored|quantize|integers|packed|float16|bfloat16|float8e4m3fn)(?=$|_)")
# What the runtime appends to the name of a node that it replaces.
_RENAMED = re.compile(r"(_nhwc|_token_\d+)+$")
_MOVES = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "MaxPool", "Identity"})
_NO_KERNEL = re.compile(r"implementation for (?P<op>\w+)\(\d+\) node with name '(?P<node>[^']*)'")


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How a session on the device runs; none of it changes the artifact's bytes.

    Attributes:
        threads: threads that share one inference.
        allow_spinning: idle threads wait actively, which is faster and costs CPU time.
    """

    threads: int = 1
    allow_spinning: bool = True


class OnnxRuntimeBackend:
    """The host half of ONNX Runtime."""

    name = "onnxruntime"
    suffix = ".onnx"
    precisions: frozenset[Precision] = frozenset({"fp32", "fp16", "int8"})
    builds_on: Literal["host", "device"] = "host"
    options: type = Options
    packages: tuple[str, ...] = ("onnx", "onnxruntime")
    tools: ToolEnvironment | None = None
    computes = True
    computes_in_half = False
    # x86 without VNNI saturates where other processors are exact.
    int8_is_portable = False
    device_runtimes = (
        DeviceRuntime(
            distribution="onnxruntime",
            module="onnxruntime",
            unneeded=tuple(f"onnxruntime/{part}/*" for part in ("datasets", "quantization", "tools", "transformers")),
        ),
    )

    def missing(self) -> str | None:
        """Say what to install."""
        absent = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if absent:
            return f"compiling for ONNX Runtime needs {' and '.join(absent)}; pip install 'edgedeploy[onnxruntime]'"
        return None

    def compile(self, model: Model, target: Target, options: Options, out: Path) -> None:
        """Write the .onnx with its weights inside; the same model always gives the same bytes.

        Raises:
            CompileError: ONNX Runtime cannot load it.
        """
        import onnx

        if options.threads < 1:
            raise CompileError(f"threads is {options.threads}", backend=self.name, hint="give 1 or more")
        graph = onnx.load(model.path)
        data = graph.SerializeToString(deterministic=True)
        for node in graph.graph.node:
            if node.domain not in ("", "ai.onnx", "com.microsoft"):
                raise CompileError(
                    f"the operator's domain {node.domain!r} is unknown to it",
                    backend=self.name,
                    node=node.name,
                    op=node.op_type,
                    hint="replace it by standard operators",
                )
        # Loading is the real test: the checker knows operators that the runtime has no kernel for.
        _optimized(graph, data, self.name)
        write_atomic(out, data)

    def inspect(self, artifact: Path) -> LayerReport:
        """Let ONNX Runtime optimise the file as it does on the device, and report what became of each layer.

        Which integer forms are fused depends on the processor: int8 activations, which the ARM targets use, are fused
        here as they are there.
        """
        import onnx

        source = onnx.load(str(artifact))
        graph = _optimized(source, artifact.read_bytes(), self.name).graph
        operators = Counter(node.op_type for node in graph.node)
        quantized = tuple(_label(node) for node in graph.node if node.op_type in _INTEGER_OPERATORS)
        is_int8 = bool(quantized) or any(name in operators for name in ("QuantizeLinear", "DequantizeLinear"))
        islands = tuple(_label(node) for node in _float_nodes(graph))
        return LayerReport(
            operators=dict(sorted(operators.items())),
            quantized=quantized,
            float_islands=islands if is_int8 else (),
            scales=_scales_in(graph, _quantized_by(source.graph)),
            expanded=_expanded(source.graph, graph),
        )

    def profiled_layers(self, artifact: Path, executed: Sequence[tuple[str, str]]) -> tuple[ProfiledLayer, ...]:
        """Return the layers that a session timed, in the names of the artifact's own graph."""
        import onnx

        from edgedeploy.backends.onnxruntime.profiled import profiled_layers

        source = onnx.load(str(artifact))
        graph = _optimized(source, artifact.read_bytes(), self.name).graph
        return profiled_layers(
            source.graph, graph, executed, integers=frozenset(_INTEGER_OPERATORS), floats=_float_nodes(graph)
        )


def _float_nodes(graph: GraphProto) -> list[NodeProto]:
    """Return the nodes that compute in float, by the type of what they make."""
    kinds = {item.name: item.data_type for item in graph.initializer}
    for value in [*graph.input, *graph.value_info, *graph.output]:
        kinds[value.name] = value.type.tensor_type.elem_type
    found = []
    for node in graph.node:
        # What fusing made has no entry in the file; a float operator makes the type that it reads.
        is_float = kinds.get(node.output[0] or node.input[0], kinds.get(node.input[0])) in _FLOAT_TYPES
        is_float |= node.op_type == "DequantizeLinear"
        for name in node.output:
            kinds.setdefault(name, 1 if is_float else 0)
        if is_float and node.op_type in _FLOAT_OPERATORS:
            found.append(node)
    return found


def _quantized_by(graph: GraphProto) -> dict[str, str]:
    """Return, for each node whose output is quantized, itself or behind a clamp, the name of what is stored."""
    makers = {name: node for node in graph.node for name in node.output}
    found = {}
    for node in graph.node:
        maker = makers.get(node.input[0]) if node.op_type == "QuantizeLinear" else None
        while maker is not None:
            found[maker.name] = node.output[0]
            maker = makers.get(maker.input[0]) if maker.op_type in ("Relu", "Clip") else None
    return found


def _scales_in(graph: GraphProto, quantized_by: dict[str, str]) -> dict[str, tuple[float, ...]]:
    """Return the scales that a graph has, by the tensor or weights that they belong to.

    The runtime gives equal scales one name, and tensors that it lays out anew other names. A scale is therefore found
    by where an operator reads it, and its tensor by its own name, or as what the node of that name made in the file.
    """
    from onnx import numpy_helper

    constants = {item.name: item for item in graph.initializer}
    found: dict[str, tuple[float, ...]] = {}
    for node in graph.node:
        if node.op_type in _MOVES and node.input[0] in found:
            found.setdefault(node.output[0], found[node.input[0]])
        places = _INTEGER_OPERATORS.get(node.op_type) or _BORDERS.get(node.op_type)
        if places is None:
            continue
        pairs = [(node.input[tensor], node.input[scale]) for tensor, scale in places.inputs if scale < len(node.input)]
        if places.output is not None and places.output < len(node.input):  # QGemm may answer in float
            scale = node.input[places.output]
            pairs += [(node.output[0], scale), (quantized_by.get(_RENAMED.sub("", node.name), ""), scale)]
        for tensor, scale in pairs:
            if tensor and scale in constants:
                values = numpy_helper.to_array(constants[scale]).reshape(-1)
                found.setdefault(tensor, tuple(float(value) for value in values))
    return {_tensor_of(tensor): values for tensor, values in sorted(found.items())}


def _expanded(source: GraphProto, optimized: GraphProto) -> tuple[str, ...]:
    """Return weights that are small in the file and float32 when the runtime computes with them."""
    readers: dict[str, set[str]] = {}
    for node in optimized.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    small = [item.name for item in source.initializer if item.data_type in _SMALL_TYPES and len(item.dims) > 1]
    kept = {
        _tensor_of(item.name)
        for item in optimized.initializer
        if item.data_type in _SMALL_TYPES and not readers.get(item.name, set()) & {"DequantizeLinear", "Cast"}
    }
    return tuple(sorted({_tensor_of(name) for name in small} - kept))


def _tensor_of(name: str) -> str:
    """Return the tensor or weights that a stored constant or tensor stands for: "w/integers_T" is "w"."""
    found = _STORED.search(name)
    return name[: found.start()] if found else name


def _label(node: NodeProto) -> str:
    return f"{node.op_type} {node.name}"


def _has_int8_activations(model: ModelProto) -> bool:
    from onnx import TensorProto

    types = {item.name: item.data_type for item in model.graph.initializer}
    return any(
        types.get(node.input[2]) == TensorProto.INT8
        for node in model.graph.node
        if node.op_type == "QuantizeLinear" and len(node.input) > 2
    )


def _optimized(model: ModelProto, data: bytes, name: str) -> ModelProto:
    """Return the graph that ONNX Runtime makes of a model for the CPU."""
    try:
        import onnx
        import onnxruntime
    except ModuleNotFoundError as error:
        raise BackendMissing(
            f"inspecting an ONNX Runtime artifact needs {error.name}; pip install 'edgedeploy[onnxruntime]'"
        ) from error
    with tempfile.TemporaryDirectory(prefix="edgedeploy-") as folder:
        optimized = Path(folder) / "optimized.onnx"
        settings = onnxruntime.SessionOptions()
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        settings.optimized_model_filepath = str(optimized)
        # 3: errors only. It warns that a file optimised for this machine should stay here; ours is thrown away.
        settings.log_severity_level = 3
        settings.intra_op_num_threads = 1
        if _has_int8_activations(model):
            # The default on ARM, not on x86.
            settings.add_session_config_entry("session.qdqisint8allowed", "1")
        try:
            onnxruntime.InferenceSession(data, settings, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime has one exception class for each status code, and none in common
            where = _NO_KERNEL.search(str(error))
            raise CompileError(
                str(error).strip().splitlines()[0],
                backend=name,
                node=where["node"] if where else "",
                op=where["op"] if where else "",
                hint="replace that operator in the model" if where else "check that the file is a plain ONNX model",
            ) from error
        return onnx.load(str(optimized))


BACKEND = OnnxRuntimeBackend()
