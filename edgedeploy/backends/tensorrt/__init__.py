"""TensorRT: the host writes a kit of ONNX forms; the device, to which an engine is tied, builds it.

One kit serves every version: the builder on the device takes the weakly typed form or the strongly typed one, by what
the TensorRT there really has.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from edgedeploy.backends.toolenv import ToolEnvironment
from edgedeploy.backends.trt_options import EngineOptions, demand_sense
from edgedeploy.records.artifact import LayerReport
from edgedeploy.records.model import Model
from edgedeploy.records.target import Precision, Target


@dataclasses.dataclass(frozen=True, slots=True)
class Options(EngineOptions):
    """How an engine is built on the device, and how a session there runs it; the rest is in EngineOptions.

    Attributes:
        workspace_mib: memory that the builder may use for tactics; 0: what is free, less a reserve.
        optimization_level: how long the builder looks for tactics (0 to 5); -1: what the version does by itself.
        builds: engines to build, whose latency and answers are compared; tactics are chosen by timing, which varies.
        pin_tactics: build the second engine and later ones from the first one's timing cache.
        refit: build an engine whose weights can be exchanged, and exchange only them where nothing else has changed.
        dla_core: a core of the deep learning accelerator, the GPU taking what it cannot do; -1: the GPU alone.
        version_compatible: let later TensorRT versions of the same major number load the engine.
    """

    workspace_mib: int = 0
    optimization_level: int = -1
    builds: int = 1
    pin_tactics: bool = True
    refit: bool = False
    dla_core: int = -1
    version_compatible: bool = False


class TensorRTBackend:
    """The host half of TensorRT."""

    name = "tensorrt"
    suffix = ".engine"
    precisions: frozenset[Precision] = frozenset({"fp32", "fp16", "int8"})
    builds_on: Literal["host", "device"] = "device"
    options: type = Options
    packages: tuple[str, ...] = ("onnx", "onnxruntime")
    tools: ToolEnvironment | None = None
    computes = True
    computes_in_half = True
    int8_is_portable = False
    device_half = Path(__file__).parent.parent / "trt_session.py"
    builder = Path(__file__).parent / "builder.py"
    # What Options adds is the builder's; what both back ends have has shaped the kit, or is the session's.
    engine_options = frozenset(Options.__dataclass_fields__) - frozenset(EngineOptions.__dataclass_fields__)

    def missing(self) -> str | None:
        """Say what to install here; TensorRT itself is needed on the device alone."""
        absent = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if absent:
            return f"the forms for TensorRT are made with {' and '.join(absent)}; pip install 'edgedeploy[tensorrt]'"
        return None

    def check(self, model: Model, options: Options) -> None:
        """Raise what is known of a model before it is quantized: operators, axes without a range, senseless options."""
        from edgedeploy.backends.trt_forms import forms_of

        demand_sense(options, self.name)
        forms_of(model, options, self.name)

    def compile(self, model: Model, target: Target, options: Options, out: Path) -> None:
        """Write the kit that the device builds an engine from; the same model always gives the same bytes.

        Raises:
            CompileError: naming operator and node: no TensorRT takes it, or its form answers otherwise than the model.
        """
        from edgedeploy.backends.tensorrt.kit import write_kit
        from edgedeploy.backends.trt_forms import forms_of
        from edgedeploy.backends.trt_proof import demand_same_answers

        demand_sense(options, self.name)
        forms = forms_of(model, options, self.name)
        demand_same_answers(forms, model, self.name)
        write_kit(out, forms)

    def inspect(self, artifact: Path) -> LayerReport:
        """Say what the kit asks for; what the engine really does is in `built_report`."""
        from edgedeploy.backends.tensorrt.kit import asked_report

        return asked_report(artifact)

    def built_report(self, kit: Path, made: Mapping[str, Path], options: Options) -> LayerReport:
        """Say what precision each layer of an engine got, from what the builder fetched out of it.

        Args:
            kit: what it was built from.
            made: the builder's files by name; "layers" is the engine inspector's JSON.
            options: `lost_scales` says whether what was lost is an error.

        Raises:
            CompileError: a scale vanished, and that is to be refused. A product that was meant to run on integers and
                does not is named in the notes.
        """
        from edgedeploy.backends.tensorrt.kit import engine_layers

        return engine_layers(kit, made["layers"], is_refused=options.lost_scales == "refuse")


BACKEND = TensorRTBackend()
