"""ONNX Runtime: compiled for it, a model is one self-contained .onnx; what is fused is decided at load time."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgedeploy.errors import BackendMissing, CompileError
from edgedeploy.records.artifact import LayerReport
from edgedeploy.records.model import Model
from edgedeploy.records.target import Precision, Target
from edgedeploy.storage import write_atomic

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# What computes on integers once ONNX Runtime has fused Q/DQ pairs into it.
_INTEGER_OPERATORS = frozenset({
    "QLinearConv", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul",
    "ConvInteger", "QLinearAdd", "QLinearMul", "QLinearConcat", "QLinearAveragePool", "QLinearGlobalAveragePool",
    "QLinearSoftmax", "QLinearSigmoid", "QLinearLeakyRelu", "QLinearReduceMean",
})  # fmt: skip
# What of an int8 model should be among them and still bears a name that stands for float arithmetic.
_FLOAT_OPERATORS = frozenset({
    "Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "Add", "AveragePool",
    "GlobalAveragePool",
})  # fmt: skip
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
    precisions: frozenset[Precision] = frozenset({"fp32", "int8"})
    builds_on: Literal["host", "device"] = "host"
    options: type = Options
    packages: tuple[str, ...] = ("onnx", "onnxruntime")

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

        graph = _optimized(onnx.load(str(artifact)), artifact.read_bytes(), self.name).graph
        operators = Counter(node.op_type for node in graph.node)
        quantized = tuple(_label(node) for node in graph.node if node.op_type in _INTEGER_OPERATORS)
        is_int8 = bool(quantized) or any(name in operators for name in ("QuantizeLinear", "DequantizeLinear"))
        islands = tuple(_label(node) for node in graph.node if node.op_type in _FLOAT_OPERATORS)
        return LayerReport(
            operators=dict(sorted(operators.items())),
            quantized=quantized,
            float_islands=islands if is_int8 else (),
        )


def _label(node: NodeProto) -> str:
    return f"{node.op_type} {node.name}"


def _has_int8_activations(model: ModelProto) -> bool:
    types = {item.name: item.data_type for item in model.graph.initializer}
    return any(
        types.get(node.input[2]) == model.graph.initializer[0].INT8
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
