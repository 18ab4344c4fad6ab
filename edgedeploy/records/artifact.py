"""A compiled file and the exact recipe that made it."""

from __future__ import annotations

from edgedeploy.documents import Record
from edgedeploy.records.model import CompressionReport, Fidelity, TensorSpec
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
    toolchain: dict[str, str]


class LayerReport(Record, frozen=True, kw_only=True):
    """What precision each layer of an artifact really got."""

    operators: dict[str, int]
    quantized: tuple[str, ...]
    float_islands: tuple[str, ...]


class Artifact(Record, frozen=True, kw_only=True):
    """manifest.json beside the binary.

    Attributes:
        file: the binary's name, in the manifest's directory.
        sha256: its digest, which is the artifact's name.
        key: digest of the recipe.
        fidelity: each conversion compared with PyTorch (or with the ONNX that was given).
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
    notes: tuple[str, ...] = ()
    created_utc: str
