"""TFLite: a model becomes one .tflite, whose scales and integers are exactly the form's.

onnx2tf converts the float graph in a child process; the integers are then written by us, and nothing derives them anew.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgedeploy.backends.toolenv import ToolEnvironment
from edgedeploy.errors import CompileError
from edgedeploy.records.artifact import LayerReport
from edgedeploy.records.model import Model
from edgedeploy.records.runtime import DeviceRuntime
from edgedeploy.records.target import Precision, Target
from edgedeploy.storage import write_atomic

if TYPE_CHECKING:
    from onnx import ModelProto

    from edgedeploy.backends.qdq import Form

TOOLS = ToolEnvironment("tflite", Path(__file__).parent / "requirements.txt", ("onnx2tf", "sng4onnx", "psutil", "tqdm"))
# It would allow a delegate to add in float16 where the file says float32.
_PRECISION_HINT = b"reduced_precision_support"


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How a model is converted, and how a session on the device runs.

    Attributes:
        threads: threads that share one inference; changes no byte of the artifact.
        xnnpack: let the XNNPACK delegate take over the operators that it has; changes no byte of the artifact.
        keep_layout: "NCHW": inputs and outputs keep the model's order of axes, which costs a turn in each inference;
            "": they have the order that the runtime computes in, and whoever feeds them turns them before.
    """

    threads: int = 1
    xnnpack: bool = True
    keep_layout: Literal["", "NCHW"] = ""


class TFLiteBackend:
    """The host half of TFLite."""

    name = "tflite"
    suffix = ".tflite"
    precisions: frozenset[Precision] = frozenset({"fp32", "fp16", "int8"})
    builds_on: Literal["host", "device"] = "host"
    options: type = Options
    packages: tuple[str, ...] = ("onnx", "onnxruntime", "ai-edge-litert", "flatbuffers")
    tools: ToolEnvironment | None = TOOLS
    computes = True
    computes_in_half = False
    # Codes are computed with the same fixed-point factors everywhere; kernels differ by a step here and there.
    int8_is_portable = True
    device_runtimes = (
        DeviceRuntime(
            distribution="ai-edge-litert",
            module="ai_edge_litert.interpreter",
            # The last is loaded for a GPU alone.
            unneeded=("ai_edge_litert/aot/*", "ai_edge_litert/tools/*", "ai_edge_litert/libLiteRtWebGpuAccelerator.so"),
        ),
        # For Pythons and C libraries that the former has no wheel for; with numpy 2 it imports, and fails at once.
        DeviceRuntime(distribution="tflite-runtime", module="tflite_runtime.interpreter", needs=("numpy<2",)),
    )

    def missing(self) -> str | None:
        """Say what to install; what the converter needs is installed by itself, in an environment of its own."""
        needed = {"onnx": "onnx", "onnxruntime": "onnxruntime", "ai_edge_litert": "ai-edge-litert"}
        absent = [package for module, package in needed.items() if importlib.util.find_spec(module) is None]
        if absent:
            return f"compiling for TFLite needs {' and '.join(absent)}; pip install 'edgedeploy[tflite]'"
        return TOOLS.missing()

    def compile(self, model: Model, target: Target, options: Options, out: Path) -> None:
        """Write the .tflite; the same model always gives the same bytes.

        Raises:
            CompileError: naming operator and node: TFLite cannot compute it, the converter makes something else of it,
                or a scale or integer of the form would be lost.
            ToolchainError: the converter's environment cannot be made.
        """
        from edgedeploy.backends.qdq import read_form
        from edgedeploy.backends.tflite.conversion import convert
        from edgedeploy.backends.tflite.integers import write_integers, write_short_floats
        from edgedeploy.backends.tflite.prepasses import prepare
        from edgedeploy.backends.tflite.report import write_said

        if options.threads < 1:
            raise CompileError(f"threads is {options.threads}", backend=self.name, hint="give 1 or more")
        form = read_form(Path(model.path), self.name)
        _demand_numbers(form.graph)
        converted = convert(
            form.graph,
            lambda graph: prepare(graph, form.activations),
            TOOLS,
            rounded=form.activations,
            keep_layout=options.keep_layout == "NCHW",
        )
        graph = converted.graph
        tensors: dict[str, str] = {}
        if form.precision == "int8":
            tensors = write_integers(converted, form)
        elif form.precision == "fp16":
            tensors = write_short_floats(graph, form.short, _initializers(form))
            if not tensors:
                raise CompileError(
                    "none of its weights can be stored in float16", backend=self.name, hint="build it as fp32"
                )
        graph.model.metadata = [item for item in graph.model.metadata or [] if item.name != _PRECISION_HINT]
        write_said(graph, converted.ports, tensors, is_batch_fixed=converted.is_batch_fixed)
        write_atomic(out, graph.packed())

    def inspect(self, artifact: Path) -> LayerReport:
        """Read from the file what precision each operator got and where its inputs and outputs are."""
        from edgedeploy.backends.tflite.report import report

        return report(artifact)


def _initializers(form: Form) -> dict[str, object]:
    from onnx import numpy_helper

    return {item.name: numpy_helper.to_array(item) for item in form.graph.graph.initializer if item.name in form.short}


def _demand_numbers(graph: ModelProto) -> None:
    """Raise where weights hold NaN: the runtime dies of it when the model is loaded."""
    import numpy as np
    from onnx import numpy_helper

    for item in graph.graph.initializer:
        values = numpy_helper.to_array(item)
        if values.dtype.kind == "f" and np.isnan(values).any():
            readers = [node for node in graph.graph.node if item.name in node.input]
            raise CompileError(
                f"the constant {item.name!r} holds NaN",
                backend="tflite",
                node=readers[0].name if readers else "",
                op=readers[0].op_type if readers else "",
                hint="train the model again",
            )


BACKEND = TFLiteBackend()
