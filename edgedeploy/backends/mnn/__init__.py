"""MNN: compiled for it, a model is one .mnn that its converter wrote with our scales in it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgedeploy.backends.mnn.contents import read_contents
from edgedeploy.backends.toolenv import ToolEnvironment
from edgedeploy.errors import CompileError
from edgedeploy.records.artifact import LayerReport
from edgedeploy.records.explanation import ProfiledLayer
from edgedeploy.records.model import Model
from edgedeploy.records.runtime import DeviceRuntime
from edgedeploy.records.target import Precision, Target
from edgedeploy.storage import write_atomic

if TYPE_CHECKING:
    from edgedeploy.backends.mnn.rewrites import Prepared

# Operators with graphs inside, of which the one that runs depends on values.
_FLOW = ("If", "Loop", "Scan")


@dataclasses.dataclass(frozen=True, slots=True)
class Options:
    """How a session on the device runs; of them only `weights_only` changes the artifact's bytes.

    Attributes:
        threads: threads that share one inference.
        precision: "high" computes in float32; "normal" and "low" let MNN compute in 16 bits where the processor can.
        memory: "low" keeps integer weights integer in memory, where "high" may widen them.
        power: a hint to the scheduler of big and little cores.
        winograd: how convolutions may be rewritten to need fewer products. "large" is what MNN does by itself; it is
            off by up to a thousandth of the largest value, "small" by 2e-6 in 1.2 to 1.5 times its time (measured on
            x86 with kernels of 3x3 and 5x5, 16 to 64 channels).
        weights_only: int8 stores weights in 8 bits, and everything is computed in float.
    """

    threads: int = 1
    precision: Literal["high", "normal", "low"] = "high"
    memory: Literal["high", "normal", "low"] = "high"
    power: Literal["high", "normal", "low"] = "normal"
    winograd: Literal["none", "small", "large"] = "small"
    weights_only: bool = False


class MnnBackend:
    """The host half of MNN."""

    name = "mnn"
    suffix = ".mnn"
    precisions: frozenset[Precision] = frozenset({"fp32", "fp16", "int8"})
    builds_on: Literal["host", "device"] = "host"
    options: type = Options
    packages: tuple[str, ...] = ("MNN", "onnx")
    tools: ToolEnvironment | None = None
    computes = True
    computes_in_half = False
    # Its kernels add up products of bytes in 32 bits on every processor; on x86 without VNNI the answers are exact.
    int8_is_portable = True
    # The converter, which no device half imports, is more than half of the wheel.
    device_runtimes = (DeviceRuntime(distribution="MNN", module="MNN", unneeded=("MNN/tools/*", "_tools.*")),)

    def missing(self) -> str | None:
        """Say what to install."""
        absent = [name for name in ("onnx", "MNN", "_tools") if importlib.util.find_spec(name) is None]
        if absent:
            return f"compiling for MNN needs {' and '.join(absent)}; pip install 'edgedeploy[mnn]'"
        return None

    def compile(self, model: Model, target: Target, options: Options, out: Path) -> None:
        """Write the .mnn; the same model always gives the same bytes.

        Raises:
            CompileError: the converter does not know an operator, breaks down, or writes what cannot be run or does not
                carry the form's numbers.
        """
        from edgedeploy.backends.mnn.conversion import run_once
        from edgedeploy.backends.mnn.parameters import with_content_id, with_open_axes
        from edgedeploy.backends.mnn.rewrites import prepare
        from edgedeploy.backends.qdq import read_form

        if options.threads < 1:
            raise CompileError(f"threads is {options.threads}", backend=self.name, hint="give 1 or more")
        form = read_form(Path(model.path), self.name)
        if options.weights_only and form.precision != "int8":
            raise CompileError(
                f"weights_only is about int8, and this is {form.precision}",
                backend=self.name,
                hint="leave it out, or build int8",
            )
        prepared = prepare(form, weights_only=options.weights_only, keeps_scales=model.quantization is not None)
        with tempfile.TemporaryDirectory(prefix="edgedeploy-mnn-") as name:
            folder = Path(name)
            data = with_open_axes(_converted(prepared, form.precision, folder), model.inputs)
            data = with_content_id(data)
            _demand_whole(model, prepared, data)
            made = folder / "finished.mnn"
            made.write_bytes(data)
            ran = run_once(made, _sizes(model), folder)
            _demand_ports(model, ran.inputs, ran.outputs)
        write_atomic(out, data)

    def inspect(self, artifact: Path) -> LayerReport:
        """Run the file once and report what the runtime executed, and with which of the file's scales.

        Raises:
            CompileError: the file is damaged, or cannot be run here.
        """
        from edgedeploy.backends.mnn.conversion import run_once
        from edgedeploy.backends.mnn.report import layer_report

        contents = read_contents(artifact.read_bytes())
        with tempfile.TemporaryDirectory(prefix="edgedeploy-mnn-") as folder:
            return layer_report(contents, run_once(artifact, {}, Path(folder)).operators)

    def profiled_layers(self, artifact: Path, executed: Sequence[tuple[str, str]]) -> tuple[ProfiledLayer, ...]:
        """Return the layers that a session timed, in the names of the model that the file was made from."""
        from edgedeploy.backends.mnn.profiled import profiled_layers
        from edgedeploy.backends.mnn.report import origins_of

        origins, _ = origins_of(read_contents(artifact.read_bytes()))
        return profiled_layers(origins, executed)


def _converted(prepared: Prepared, precision: Precision, folder: Path) -> bytes:
    """Convert a graph, for int8 twice: the first time tells what MNN calls its operators."""
    from edgedeploy.backends.mnn.conversion import convert
    from edgedeploy.backends.mnn.parameters import compression_parameters, with_our_numbers
    from edgedeploy.backends.mnn.report import note_origins

    note_origins(prepared)
    _demand_integers(prepared)
    # The other way to write an LSTM or GRU is a loop, which no session of an interpreter can run.
    always = ["--useOriginRNNImpl"]
    if precision == "fp16":
        return convert(prepared.graph, folder, [*always, "--fp16"])
    data = convert(prepared.graph, folder, always)
    if precision == "fp32":
        return data
    parameters = folder / "parameters.json"
    parameters.write_text(json.dumps(compression_parameters(read_contents(data), prepared)), encoding="utf-8")
    data = convert(prepared.graph, folder, [*always, "--compressionParamsFile", parameters.name])
    return with_our_numbers(data, prepared)


def _demand_integers(prepared: Prepared) -> None:
    """Demand that something of what the form rounds is computed on integers, or at least stored so."""
    from edgedeploy.backends.mnn.parameters import stays_small

    if prepared.activations and not any(item.is_quantized for item in prepared.products.values()):
        node = next(iter(prepared.products.values()), None)
        raise CompileError(
            "of what is quantized here it could compute nothing on integers: it does so for two-dimensional "
            "convolutions and matrix products whose results are rounded too",
            backend="mnn",
            node=node.node if node else "",
            op=node.op if node else "",
            hint="give -O weights_only=true to store its weights in 8 bits and compute in float, or build it as fp16",
        )
    if prepared.weights and not any(stays_small(item) for item in prepared.products.values()):
        name = min(prepared.small)
        reader = next((node for node in prepared.graph.graph.node if name in node.input), None)
        raise CompileError(
            f"it would store the integer weights {name!r} as floats, like all others of this model",
            backend="mnn",
            node=reader.name if reader else "",
            op=reader.op_type if reader else "",
            hint="build it as fp16, or as int8 for another back end",
        )


def _demand_whole(model: Model, prepared: Prepared, data: bytes) -> None:
    """Demand that the model came out whole: the converter may write an empty one and call that a success."""
    contents = read_contents(data)
    if contents.has_subgraphs:
        node = next((node for node in prepared.graph.graph.node if node.op_type in _FLOW), None)
        raise CompileError(
            "its converter made a loop or a branch of it, which the runtime's sessions cannot run",
            backend="mnn",
            node=node.name if node is not None else "",
            op=node.op_type if node is not None else "",
            hint="export the model so that nothing depends on the data: sizes fixed, loops unrolled, no branch chosen",
        )
    lost = [spec.name for spec in model.outputs if spec.name not in contents.outputs]
    if lost:
        raise CompileError(
            f"its converter lost the output {lost[0]!r}",
            backend="mnn",
            hint="check what makes that output; build for another back end",
        )


def _sizes(model: Model) -> dict[str, list[int]]:
    return {spec.name: [size if isinstance(size, int) else 1 for size in spec.shape] for spec in model.inputs}


def _demand_ports(model: Model, inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]]) -> None:
    """Demand that inputs and outputs have the model's names and, where the model says them, its sizes."""
    for specs, found, word in ((model.inputs, inputs, "input"), (model.outputs, outputs, "output")):
        for spec in specs:
            sizes = found.get(spec.name)
            # A constant input that the model does not read is dropped by the converter; the session skips it.
            if sizes is None:
                raise CompileError(
                    f"its converter dropped the {word} {spec.name!r}",
                    backend="mnn",
                    hint="leave it out of the model if nothing depends on it" if word == "input" else "",
                )
            fits = len(sizes) == len(spec.shape) and all(
                not isinstance(want, int) or want == got for want, got in zip(spec.shape, sizes, strict=True)
            )
            if not fits:
                raise CompileError(
                    f"the {word} {spec.name!r} has the shape {list(sizes)} in its file and {list(spec.shape)} in the "
                    f"model",
                    backend="mnn",
                    hint="build for another back end",
                )


BACKEND = MnnBackend()
