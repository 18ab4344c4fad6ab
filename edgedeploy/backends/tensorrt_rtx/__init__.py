"""TensorRT-RTX: compiled for it, a model is one engine for RTX cards, built on any Linux PC without a GPU."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgedeploy.backends.toolenv import ToolEnvironment
from edgedeploy.backends.trt_options import EngineOptions, demand_sense
from edgedeploy.errors import CompileError, DocumentError
from edgedeploy.records.artifact import LayerReport
from edgedeploy.records.model import Model
from edgedeploy.records.target import Precision, Target
from edgedeploy.storage import write_atomic

if TYPE_CHECKING:
    from edgedeploy.backends.tensorrt_rtx.building import Made
    from edgedeploy.backends.trt_forms import EngineForms

# The wheel with the compiler, whose version decides an engine's bytes, and the one that Python reaches it through.
_LIBRARIES, _BINDINGS = "tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings"
# trt.ComputeCapability of 1.7: the GPUs that it compiles for without having one.
COMPUTE_CAPABILITIES = ("SM75", "SM80", "SM86", "SM89", "SM120", "SM121")
_CAPABILITY = re.compile(r"(?:sm_?)?(?P<major>\d{1,2})[._]?(?P<minor>\d)", re.IGNORECASE)


@dataclasses.dataclass(frozen=True, slots=True)
class Options(EngineOptions):
    """How an engine is built, and how a session runs it; the rest is in EngineOptions.

    Attributes:
        compute_capabilities: GPUs that the engine is for, several joined by commas: 8.6 (RTX 30), 8.9 (RTX 40), 12.0
            (RTX 50), or "current" for that of this machine.
        tf32: let products of float32 be computed with 10 bits of mantissa.
    """

    compute_capabilities: str = "8.6"
    tf32: bool = False


class TensorRTRTXBackend:
    """The host half of TensorRT-RTX."""

    name = "tensorrt_rtx"
    suffix = ".engine"
    precisions: frozenset[Precision] = frozenset({"fp32", "fp16", "int8"})
    builds_on: Literal["host", "device"] = "host"
    options: type = Options
    packages: tuple[str, ...] = (_LIBRARIES, _BINDINGS, "onnx", "onnxruntime")
    tools: ToolEnvironment | None = None
    computes = True
    computes_in_half = True
    int8_is_portable = False
    device_half = Path(__file__).parent.parent / "trt_session.py"

    def missing(self) -> str | None:
        """Say what to install."""
        absent = [name for name in ("onnx", "onnxruntime", "tensorrt_rtx") if importlib.util.find_spec(name) is None]
        if not absent and not _is_installed(_LIBRARIES):
            # Another flavour of the same library: its version would not enter the recipe.
            absent = [_LIBRARIES]
        if absent:
            return f"compiling for TensorRT-RTX needs {' and '.join(absent)}; pip install 'edgedeploy[tensorrt_rtx]'"
        return None

    def check(self, model: Model, options: Options) -> None:
        """Raise what is known of a model before it is quantized: operators, axes without a range, senseless options."""
        from edgedeploy.backends.trt_forms import forms_of

        demand_sense(options, self.name)
        capabilities(options.compute_capabilities)
        forms_of(model, options, self.name)

    def compile(self, model: Model, target: Target, options: Options, out: Path) -> None:
        """Write the engine, and beside it layers.json; the same model always gives the same bytes.

        Raises:
            CompileError: its parser or builder does not take the model, breaks down, or lost scales on the way.
        """
        from edgedeploy.backends.tensorrt_rtx.building import build_engine
        from edgedeploy.backends.tensorrt_rtx.grouping import join_small_groups
        from edgedeploy.backends.trt_forms import forms_of
        from edgedeploy.backends.trt_layers import write_layers
        from edgedeploy.backends.trt_proof import demand_same_answers

        demand_sense(options, self.name)
        gpus = capabilities(options.compute_capabilities)
        forms = forms_of(model, options, self.name)
        join_small_groups(forms.typed, forms.int8_nodes)
        demand_same_answers(forms, model, self.name)
        with tempfile.TemporaryDirectory(prefix="edgedeploy-rtx-") as folder:
            made = build_engine(
                forms.typed,
                Path(folder),
                compute_capabilities=gpus,
                profiles=forms.profiles,
                tf32=options.tf32,
                limit_s=options.time_limit_s,
            )
        report = _report(made, forms, is_refused=options.lost_scales == "refuse")
        write_atomic(out, made.engine)
        write_layers(out, report)

    def inspect(self, artifact: Path) -> LayerReport:
        """Read what was noted when the engine was built: without a GPU it cannot be opened.

        Raises:
            CompileError: layers.json is missing, damaged, or of another engine.
        """
        from edgedeploy.backends.trt_layers import read_layers

        try:
            return read_layers(artifact)
        except DocumentError as error:
            raise CompileError(str(error), backend=self.name) from error


def capabilities(text: str) -> tuple[str, ...]:
    """Return names of GPU generations as trt.ComputeCapability has them, in order and each once.

    Raises:
        CompileError: one is not known to the compiler.

    >>> capabilities("8.9, 8.6,SM120")
    ('SM86', 'SM89', 'SM120')
    """
    found: set[str] = set()
    for word in (part.strip() for part in text.split(",")):
        match = _CAPABILITY.fullmatch(word)
        name = f"SM{match['major']}{match['minor']}" if match else word.upper()
        if name not in (*COMPUTE_CAPABILITIES, "CURRENT"):
            known = ", ".join(f"{one[2:-1]}.{one[-1]}" for one in COMPUTE_CAPABILITIES)
            raise CompileError(
                f"it builds for no GPU of compute capability {word!r}",
                backend="tensorrt_rtx",
                hint=f"give one or more of {known}, or current; for a Jetson or another GPU, use --backend tensorrt",
            )
        found.add(name)
    if "CURRENT" in found and len(found) > 1:
        raise CompileError(
            f"compute_capabilities is {text!r}: current stands alone",
            backend="tensorrt_rtx",
            hint="name the GPUs, or give current alone",
        )
    return tuple(sorted(found, key=lambda name: int(name[2:]) if name != "CURRENT" else 0))


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _report(made: Made, forms: EngineForms, *, is_refused: bool) -> LayerReport:
    """Compare the table of layers in the build's log with what the form asked for."""
    from edgedeploy.backends.trt_layers import engine_report, kept_in_float32, layers_from_rtx_log

    try:
        layers = layers_from_rtx_log(made.log)
    except DocumentError as error:
        raise CompileError(str(error), backend="tensorrt_rtx", hint="install the version in constraints.txt") from error
    built = {node.name for node in forms.typed.graph.node}
    single = {node: why for node, why in forms.float32_nodes.items() if node in built}
    return engine_report(
        layers,
        forms.int8_nodes,
        forms.pairs,
        (*forms.notes, *kept_in_float32(single)),
        is_refused=is_refused,
        backend="tensorrt_rtx",
    )


BACKEND = TensorRTRTXBackend()
