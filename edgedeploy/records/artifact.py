"""A compiled file and the exact recipe that made it."""

from __future__ import annotations

from edgedeploy.documents import Record
from edgedeploy.records.compression import CompressionReport
from edgedeploy.records.model import Fidelity, TensorSpec
from edgedeploy.records.quantization import QuantizationPolicy
from edgedeploy.records.survival import SurvivalReport
from edgedeploy.records.target import Precision

# History of edgedeploy.manifest:
#   1 (0.1.0)  first version
FORMAT = "edgedeploy.manifest/1"

OptionValue = str | int | float | bool


class Recipe(Record, frozen=True, kw_only=True):
    """Everything that decides an artifact's bytes; its digest is the cache key.

    Attributes:
        model: the source as given; its identity is model_sha256 (code, weights and inputs together).
        calibration_sha256: "" where no calibration is used.
        target_sha256: digest of the resolved target's content.
        quantization: how a float model was quantized after training; None where that did not happen.
        allow_loss: whether losing compression was accepted.
        toolchain: package → version of everything that touched the bytes.
    """

    model: str
    model_sha256: str
    weights_sha256: str
    inputs: tuple[TensorSpec, ...]
    calibration: str
    calibration_sha256: str
    target: str
    target_sha256: str
    backend: str
    precision: Precision
    options: dict[str, OptionValue]
    quantization: QuantizationPolicy | None = None
    allow_loss: bool = False
    toolchain: dict[str, str]


class Port(Record, frozen=True, kw_only=True):
    """Where an artifact keeps one of its model's inputs or outputs.

    Attributes:
        tensor: its name in the artifact.
        layout: the artifact's order of axes in letters ("NHWC"), "" where it is the model's own.
        permutation: axis i of the artifact's tensor is axis permutation[i] of the model's; empty: the same axes.
    """

    tensor: str
    layout: str = ""
    permutation: tuple[int, ...] = ()


class Layer(Record, frozen=True, kw_only=True):
    """One kernel of an engine, as its runtime describes it; an empty value means that it does not say.

    Attributes:
        name: the runtime's.
        kind: the runtime's word for what it does.
        precision: what its data inputs are stored in, and so what it computes on: "int8", "fp16", "fp32".
        output: what it writes.
        format: how its first input lies in memory, in the runtime's words.
        tactic: the kernel that was chosen.
        nodes: ONNX nodes that were fused into it.
    """

    name: str
    kind: str = ""
    precision: str = ""
    output: str = ""
    format: str = ""
    tactic: str = ""
    nodes: tuple[str, ...] = ()


class LayerReport(Record, frozen=True, kw_only=True):
    """What precision each layer of an artifact really got, as the runtime itself says.

    Attributes:
        operators: operator → how many, in the runtime's own optimised graph.
        quantized: what computes on integers, "operator name".
        float_islands: what computes in float within a model that has integers.
        scales: tensor or weights → the scale, or scales, that the runtime has for it.
        expanded: weights that the file stores small and the runtime widens to float32, at load or in each inference.
        ports: inputs and outputs that bear another name, or have their axes in another order, than the model's.
        notes: sentences for a person who runs the artifact without edgedeploy.
        layers: kernel by kernel, where the runtime describes them.
    """

    operators: dict[str, int]
    quantized: tuple[str, ...]
    float_islands: tuple[str, ...]
    scales: dict[str, tuple[float, ...]] = {}
    expanded: tuple[str, ...] = ()
    ports: dict[str, Port] = {}
    notes: tuple[str, ...] = ()
    layers: tuple[Layer, ...] = ()


class Fingerprint(Record, frozen=True, kw_only=True):
    """What an artifact that was built on a device is tied to.

    Attributes:
        gpu: the GPU's name.
        compute_capability: "8.7".
        tensorrt: version of the runtime, as it says itself.
        driver: newest CUDA version that the driver supports ("12.6").
        jetpack: "" where it is not a Jetson, or does not say.
    """

    gpu: str
    compute_capability: str
    tensorrt: str
    driver: str
    jetpack: str = ""


class EngineBuild(Record, frozen=True, kw_only=True):
    """One of several engines that were built from one kit.

    Attributes:
        p50_s: median latency of one short visit; None where only one engine was built.
        largest_difference: of its answers to the golden inputs from the chosen engine's, in ratio to the largest.
        is_chosen: whether the artifact is this one.
    """

    sha256: str
    size_bytes: int
    seconds: float
    p50_s: float | None = None
    largest_difference: float | None = None
    is_chosen: bool = False


class EngineReceipt(Record, frozen=True, kw_only=True):
    """How an artifact was built on a device.

    Attributes:
        kit_sha256: of what it was built from; kit_key: digest of that one's recipe.
        builder_sha256: of the program that built it there.
        device: its name in the inventory.
        timing_cache_sha256: of the measured tactics that the engine was chosen by; "" where there are none.
        is_pinned: whether engines after the first were bound to those tactics.
        is_typed: whether precisions were read from the graph, and not set by flags.
        builds: every engine that was built.
    """

    fingerprint: Fingerprint
    kit_sha256: str
    kit_key: str
    builder_sha256: str
    device: str
    timing_cache_sha256: str = ""
    is_pinned: bool = False
    is_typed: bool = False
    flags: tuple[str, ...] = ()
    workspace_bytes: int = 0
    parse_s: float = 0.0
    builds: tuple[EngineBuild, ...] = ()


class Golden(Record, frozen=True, kw_only=True):
    """Inputs and the answers to them, beside an artifact; what it answers wherever it runs is compared with these.

    Attributes:
        inputs_sha256: of golden-inputs.safetensors, one tensor an input, first axis = sample.
        outputs_sha256: of golden-outputs.safetensors, likewise.
        batch: samples that are answered together.
        max_relative: allowed largest error in ratio to the largest answer; None: the noise is judged instead.
        max_noise: allowed root mean square of the error in ratio to that of the answers.
    """

    inputs_sha256: str
    outputs_sha256: str
    batch: int
    max_relative: float | None = None
    max_noise: float | None = None


class Artifact(Record, frozen=True, kw_only=True):
    """manifest.json beside the binary.

    Attributes:
        file: the binary's name, in the manifest's directory.
        sha256: its digest, which is the artifact's name.
        key: digest of the recipe.
        fidelity: each conversion compared with PyTorch (or with the ONNX that was given).
        survival: what became of each scale that the source came with; None for a float source.
        engine: how and where it was built, where it is tied to a device.
        golden: samples that it is checked on wherever it runs; None where the runtime computes nothing.
        notes: sentences for a person: what was changed or lost, and accepted.
    """

    format: str = FORMAT
    name: str
    file: str
    sha256: str
    size_bytes: int
    key: str
    recipe: Recipe
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    fidelity: tuple[Fidelity, ...]
    compression: CompressionReport
    layers: LayerReport
    survival: SurvivalReport | None = None
    engine: EngineReceipt | None = None
    golden: Golden | None = None
    notes: tuple[str, ...] = ()
    created_utc: str
