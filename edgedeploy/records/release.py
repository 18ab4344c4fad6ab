"""The release file, edgedeploy.toml: what is built, where it is measured, and what may not get worse."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from edgedeploy.documents import Record, closest, line_of, read_toml
from edgedeploy.errors import DocumentError
from edgedeploy.records.artifact import OptionValue
from edgedeploy.records.model import DType, TensorSpec
from edgedeploy.records.quantization import QuantizationPolicy
from edgedeploy.records.target import Precision

# History of edgedeploy.release:
#   1 (0.1.0)  first version
FORMAT = "edgedeploy.release/1"


class InputEntry(Record, frozen=True, kw_only=True):
    """One named model input; a string in `shape` names a dynamic axis."""

    shape: tuple[int | str, ...]
    dtype: DType = "float32"
    layout: str = ""


class Declared(Record, frozen=True, kw_only=True):
    """What a model is said to be: `[models.NAME.declared]`. Building fails where it is not; None says nothing.

    Attributes:
        sparsity: share of zeros among the weights that are multiplied with, at least.
        pattern: "2:4": in every layer whose input channels come in fours; "unstructured", "channels": in some layer.
        qat: whether it was trained with fake quantization.
        weight_bits: of every layer's weights, at most; activation_bits: of what every layer reads.
        rank: there are low-rank pairs, and none has a higher rank.
        max_macs: for one sample.
        except_layers: module paths or node names of layers that sparsity, pattern, rank and bits do not speak of.
    """

    sparsity: float | None = None
    pattern: Literal["unstructured", "2:4", "channels"] | None = None
    qat: bool | None = None
    weight_bits: int | None = None
    activation_bits: int | None = None
    rank: int | None = None
    max_parameters: int | None = None
    max_macs: int | None = None
    except_layers: tuple[str, ...] = ()


class ModelEntry(Record, frozen=True, kw_only=True):
    """A model: "package.module:factory", a .pt2 or a .onnx.

    Attributes:
        weights: a state_dict (.safetensors, or .pt that holds nothing but tensors) for a factory.
        inputs: input name → specification; empty: the release's `inputs`, or what the file itself says.
        declared: what its compression must be found to be.
    """

    source: str
    weights: str = ""
    inputs: dict[str, InputEntry] = {}
    declared: Declared = Declared()


class CalibrationEntry(Record, frozen=True, kw_only=True):
    """The calibration set: a folder with manifest.toml, or an .npz."""

    set: str


class EvaluationEntry(Record, frozen=True, kw_only=True):
    """The evaluation set: a folder with manifest.toml, or an .npz, with `labels`.

    Attributes:
        metric: "top1", "top5" or "mae".
        output: the output that is judged; empty: the only one.
    """

    set: str
    metric: str = "top1"
    output: str = ""


class CellEntry(Record, frozen=True, kw_only=True):
    """One model × target × backend × precision × device.

    Attributes:
        baseline: the cell that this one is compared with; empty: the gate's.
        quantization: how this cell's float model is quantized; None: as the release says.
        allow_loss: build it even where the target cannot keep the model's compression.
    """

    name: str
    model: str
    target: str
    backend: str
    precision: Precision
    device: str = "local"
    options: dict[str, OptionValue] = {}
    baseline: str = ""
    quantization: QuantizationPolicy | None = None
    allow_loss: bool = False


class Margins(Record, frozen=True, kw_only=True):
    """How much worse each metric may get ("+5%", "+0.5ms", "-0.5pt", "+1MiB"), and what it must keep to ("<= 5ms")."""

    accuracy: str = ""
    class_accuracy: str = ""
    latency_p50: str = ""
    latency_p95: str = ""
    latency_p99: str = ""
    first_inference: str = ""
    load_time: str = ""
    peak_memory: str = ""
    artifact_size: str = ""


class GateEntry(Record, frozen=True, kw_only=True):
    """The gate's policy.

    Attributes:
        baseline: the cell that candidates are compared with.
        error_rate: chance of a wrong PASS or FAIL in the whole gate.
        max_blocks: A/B blocks after which an undecided latency is INCONCLUSIVE.
        allow_stored_pass: a latency may pass against one of another session, by the known noise of the device.
    """

    baseline: str
    margins: Margins = Margins()
    error_rate: float = 0.05
    min_blocks: int = 4
    max_blocks: int = 16
    allow_stored_pass: bool = False


class Release(Record, frozen=True, kw_only=True):
    """The whole release file; paths in it are relative to its folder."""

    format: str
    name: str
    models: dict[str, ModelEntry]
    inputs: dict[str, InputEntry] = {}
    calibration: CalibrationEntry | None = None
    quantization: QuantizationPolicy = QuantizationPolicy()
    evaluation: EvaluationEntry | None = None
    cells: tuple[CellEntry, ...]
    gate: GateEntry


def load_release(path: Path) -> Release:
    """Read and check a release file.

    Raises:
        DocumentError: naming file, line and the likely intended key, name or file.
    """
    if not path.exists():
        raise DocumentError(f"there is no release file {path}; write a commented one with: edgedeploy init {path}")
    release = read_toml(path, Release, FORMAT)
    if not release.cells:
        raise DocumentError(f"{path} lists no cells; add a [[cells]] table (see: edgedeploy init)")
    names = [cell.name for cell in release.cells]
    for index, cell in enumerate(release.cells):
        at = ("cells", index)
        if names.index(cell.name) != index:
            raise DocumentError(f'{line_of(path, *at, "name")}: the cell name "{cell.name}" is used twice')
        _demand(path, (*at, "model"), "model", cell.model, release.models)
        if cell.baseline:
            _demand(path, (*at, "baseline"), "cell", cell.baseline, names)
        baseline = cell.baseline or release.gate.baseline
        device = next((other.device for other in release.cells if other.name == baseline), cell.device)
        if device != cell.device:
            raise DocumentError(
                f'{line_of(path, *at)}: cell "{cell.name}" is on device "{cell.device}" but its baseline "{baseline}" '
                f'is on "{device}"; a candidate and its baseline are measured on one device: add a baseline '
                f'cell for "{cell.device}" and name it with baseline = "..."'
            )
    _demand(path, ("gate", "baseline"), "cell", release.gate.baseline, names)
    if not 0 < release.gate.error_rate < 0.5:
        raise DocumentError(f"{line_of(path, 'gate', 'error_rate')}: error_rate must lie between 0 and 0.5")
    if not 2 <= release.gate.min_blocks <= release.gate.max_blocks:
        raise DocumentError(f"{line_of(path, 'gate')}: demand 2 <= min_blocks <= max_blocks")
    for name, model in release.models.items():
        _demand_possible(path, name, model.declared)
    _demand_files(path, release)
    return release


def baseline_of(release: Release, cell: CellEntry) -> CellEntry | None:
    """Return the cell that `cell` is compared with, or None when it is itself a baseline."""
    name = cell.baseline or release.gate.baseline
    return None if name == cell.name else next(other for other in release.cells if other.name == name)


def input_specs(release: Release, model: ModelEntry) -> tuple[TensorSpec, ...]:
    """Return a model's inputs as the release file gives them; empty when it leaves them to the model's own file."""
    entries = model.inputs or release.inputs
    return tuple(
        TensorSpec(name=name, dtype=entry.dtype, shape=entry.shape, layout=entry.layout)
        for name, entry in entries.items()
    )


def _demand_possible(path: Path, name: str, declared: Declared) -> None:
    """Refuse what no model could be."""
    ranges: tuple[tuple[str, float | None, float, float], ...] = (
        ("sparsity", declared.sparsity, 0.0, 1.0),
        ("weight_bits", declared.weight_bits, 1, 32),
        ("activation_bits", declared.activation_bits, 1, 32),
        ("rank", declared.rank, 1, float("inf")),
        ("max_parameters", declared.max_parameters, 1, float("inf")),
        ("max_macs", declared.max_macs, 1, float("inf")),
    )
    for key, value, lowest, highest in ranges:
        if value is not None and not lowest <= value <= highest:
            limits = f"at least {lowest:g}" if highest == float("inf") else f"between {lowest:g} and {highest:g}"
            where = line_of(path, "models", name, "declared", key)
            raise DocumentError(f"{where}: {key} = {value:g} must be {limits}")


def _demand(path: Path, where: tuple[str | int, ...], noun: str, name: str, known: object) -> None:
    names = list(known) if isinstance(known, dict | list) else []
    if name not in names:
        raise DocumentError(
            f'{line_of(path, *where)}: there is no {noun} "{name}"{closest(name, names)} (known: {", ".join(names)})'
        )


def _demand_files(path: Path, release: Release) -> None:
    files: list[tuple[tuple[str | int, ...], str]] = []
    for name, model in release.models.items():
        if model.weights:
            files.append((("models", name, "weights"), model.weights))
        if ":" not in model.source:
            files.append((("models", name, "source"), model.source))
        elif not (model.inputs or release.inputs):
            raise DocumentError(
                f'{line_of(path, "models", name)}: model "{name}" comes from Python, so its inputs must be named: add '
                f"[inputs.NAME] with shape and dtype"
            )
    if release.calibration:
        files.append((("calibration", "set"), release.calibration.set))
    if release.evaluation:
        files.append((("evaluation", "set"), release.evaluation.set))
    for where, file in files:
        if not (path.parent / file).exists():
            raise DocumentError(
                f'{line_of(path, *where)}: the file or folder "{file}" does not exist beside {path.name}'
            )
