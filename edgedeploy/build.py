"""Steps 1 to 4 of the spine: a model reference and a recipe become an artifact, or the cache already has it."""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import msgspec

import edgedeploy
from edgedeploy import golden
from edgedeploy.backends import Backend, backend, parse_options
from edgedeploy.documents import encode_json, read_json, to_builtins, write_json
from edgedeploy.errors import BackendMissing, DocumentError, UsageError
from edgedeploy.prepare.dataset import Samples, load_samples, random_samples
from edgedeploy.prepare.form import Formed
from edgedeploy.prepare.identity import installed_version, source_identity
from edgedeploy.records.artifact import FORMAT, Artifact, LayerReport, OptionValue, Recipe
from edgedeploy.records.compression import CompressionReport
from edgedeploy.records.model import FORMAT as MODEL_FORMAT
from edgedeploy.records.model import Model, TensorSpec
from edgedeploy.records.quantization import QuantizationPolicy
from edgedeploy.records.release import Declared
from edgedeploy.records.survival import SurvivalReport
from edgedeploy.records.target import BackendRules, Precision, QuantizationRules, Target, is_target, load_target
from edgedeploy.results import utc_now
from edgedeploy.storage import atomic_path, cache_dir, exchange, sha256_bytes, sha256_file

Progress = Callable[[str], None]


def silent(text: str) -> None:
    """Tell nobody."""


MANIFEST = "manifest.json"
QUANTIZATION = "quantization.json"
# What a device builds an artifact from, where the artifact is tied to the device.
KIT = "model.kit"
# What a runtime's builder says of each kernel; and the tactics that it measured.
LAYERS, TIMING_CACHE = "layers.json", "timing.cache"
# Everything on the host that can change an artifact's bytes; a back end adds its own packages.
_EXPORT_PACKAGES = ("torch", "onnxscript")
_GRAPH_PACKAGES = ("numpy", "onnx", "onnxslim", "onnxruntime")
# The longest build has ended by then; a folder that is not finished and older belongs to nobody.
_ABANDONED_S = 7 * 24 * 3600
_WIDENED = "its weights are widened when it is loaded, and it computes in float32"
# Samples that a conversion is checked on when there is no calibration set: enough to see a wrong axis or a lost branch.
_RANDOM_SAMPLES = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildRequest:
    """One model for one cell.

    Attributes:
        name: how people call the model.
        base: folder that relative paths and modules are looked up in.
        inputs: empty: what the model's own file says.
        calibration: samples for int8 ranges and for the checks of every conversion; None: random ones (checks only).
        policy: how a float model is quantized for int8.
        allow_loss: build even what cannot keep the model's compression.
        declared: what compression the model is said to carry; checked when it is built.
    """

    name: str
    source: str
    base: Path
    target: str
    backend: str
    precision: Precision
    weights: Path | None = None
    inputs: tuple[TensorSpec, ...] = ()
    calibration: Path | None = None
    options: Mapping[str, OptionValue] = field(default_factory=dict)
    policy: QuantizationPolicy = field(default_factory=QuantizationPolicy)
    allow_loss: bool = False
    declared: Declared | None = None
    trust_pickle: bool = False
    rebuild: bool = False


@dataclass(frozen=True, slots=True)
class Built:
    """An artifact and the folder that holds it and its manifest."""

    artifact: Artifact
    folder: Path
    is_cached: bool

    @property
    def file(self) -> Path:
        """The binary."""
        return self.folder / self.artifact.file


def build(request: BuildRequest, progress: Progress) -> Built:
    """Build one artifact, or return the cached one of the same recipe.

    Raises:
        UsageError, ModelError, ToolchainError: as the classes say; the cache keeps only finished artifacts.
    """
    runtime = backend(request.backend)
    target = this_target(request.target)
    rules = _rules(runtime, target, request.precision)
    options = parse_options(runtime.options, {**rules.options, **request.options})
    recipe = _recipe(request, runtime, target, {**rules.options, **request.options})
    key = sha256_bytes(encode_json(recipe))
    folder = cache_dir() / "artifacts" / key
    if advice := _advice(request, target):
        progress(f"{request.name}: {advice}")
    if not request.rebuild and (stored := stored_artifact(folder, key)):
        # What the label says is no part of the recipe: it changes no byte, but it may be wrong today.
        if request.declared not in (None, Declared()):
            _demand_declared(request, canonical_model(request, progress))
        progress(f"{request.name}: unchanged, taken from the cache ({key[:8]})")
        return Built(stored, folder, is_cached=True)
    if reason := runtime.missing():
        raise BackendMissing(reason)
    if runtime.tools is not None:
        runtime.tools.python(progress)
    with staging(folder) as work:
        model = canonical_model(request, progress)
        _demand_declared(request, model)
        if check := getattr(runtime, "check", None):
            check(model, options)
        # Opened once, however many steps look at them.
        samples = cache(lambda: _samples(request, model.inputs))
        formed = _formed(request, model, target.quantization.get(runtime.name), samples, work, progress)
        if request.precision == "fp16" and not runtime.computes_in_half:
            formed = dataclasses.replace(formed, notes=(*formed.notes, _WIDENED))
        if runtime.computes_in_half and request.precision != "fp32":
            from edgedeploy.prepare.half_range import beyond_half

            progress(f"{request.name}: looking for values beyond float16")
            limited = msgspec.structs.replace(formed.model, beyond_half=beyond_half(formed.model, samples()))
            formed = dataclasses.replace(formed, model=limited)
        if formed.table:
            write_json(work / QUANTIZATION, formed.table)
        file = work / (KIT if runtime.builds_on == "device" else f"model{runtime.suffix}")
        progress(f"{request.name}: compiling for {target.name} with {runtime.name} {request.precision}")
        kept = None
        if runtime.computes:
            kept = golden.write_golden(formed.model, request.precision, samples(), work)
        checked = msgspec.structs.replace(formed.model, check_inputs=str(work / golden.INPUTS) if kept else "")
        runtime.compile(checked, target, options, file)
        layers = runtime.inspect(file)
        survival = _survival(request, model, formed, layers)
        artifact = Artifact(
            name=f"{request.name}-{target.name}-{runtime.name}-{request.precision}",
            file=file.name,
            sha256=sha256_file(file),
            size_bytes=file.stat().st_size,
            key=key,
            recipe=recipe,
            inputs=formed.model.inputs,
            outputs=formed.model.outputs,
            fidelity=formed.model.fidelity,
            compression=_compression(model, formed, survival, layers),
            layers=layers,
            survival=survival,
            golden=kept,
            notes=joined_notes(*(item.note for item in model.kinds), *formed.notes, *layers.notes, advice),
            created_utc=utc_now(),
        )
        artifact = _proven(runtime, target, artifact, work, progress)
        write_json(work / MANIFEST, artifact)
    return Built(artifact, folder, is_cached=False)


def recipe_of(request: BuildRequest) -> Recipe:
    """Return what would decide the bytes of an artifact, without building it.

    Raises:
        UsageError: a file or name is wrong, or the target does not allow it.
    """
    runtime, target = backend(request.backend), this_target(request.target)
    rules = _rules(runtime, target, request.precision)
    return _recipe(request, runtime, target, {**rules.options, **request.options})


def load_artifact(folder: Path) -> Built:
    """Read a folder that `compile` wrote.

    Raises:
        DocumentError: no manifest, or the files beside it are not those that it describes.
    """
    manifest = folder / MANIFEST if folder.is_dir() else folder
    artifact = read_json(manifest, Artifact, FORMAT)
    described = {artifact.file: artifact.sha256}
    if artifact.golden is not None:
        described |= {golden.INPUTS: artifact.golden.inputs_sha256, golden.OUTPUTS: artifact.golden.outputs_sha256}
    for name, digest in described.items():
        if Path(name).name != name:
            raise DocumentError(f"{manifest} describes {name!r}, which is no file beside it; compile again")
        file = manifest.parent / name
        if not file.is_file():
            raise DocumentError(f"{manifest} describes {name}, which is not beside it; compile again")
        if sha256_file(file) != digest:
            raise DocumentError(f"{file} is not the file that {manifest} describes (its sha256 differs); compile again")
    return Built(artifact, manifest.parent, is_cached=True)


def deliver(built: Built, folder: Path) -> Built:
    """Copy an artifact and its manifest into a folder; the manifest goes last, so that it never describes a torso."""
    beside = (QUANTIZATION, LAYERS, TIMING_CACHE, golden.INPUTS, golden.OUTPUTS)
    for name in (built.artifact.file, *beside, MANIFEST):
        if (built.folder / name).is_file():
            with atomic_path(folder / name) as part:
                shutil.copyfile(built.folder / name, part)
        else:  # what another artifact left there before says nothing about this one
            (folder / name).unlink(missing_ok=True)
    return Built(built.artifact, folder, built.is_cached)


def _proven(runtime: Backend, target: Target, artifact: Artifact, folder: Path, progress: Progress) -> Artifact:
    """Return the artifact with what it answered to its golden inputs here, or a note that says why it was not asked."""
    if artifact.golden is None or runtime.builds_on == "device":
        return artifact
    is_this_machine = is_target(target, machine=platform.machine(), isa=this_isa())
    if artifact.recipe.precision == "int8" and not (is_this_machine or runtime.int8_is_portable):
        why = f"int8 kernels are not those of {target.name}"
    else:
        progress(f"{artifact.recipe.model}: comparing its answers with the model's")
        answered = golden.replay_here(runtime, artifact, folder)
        if answered is not None:
            return msgspec.structs.replace(artifact, fidelity=(*artifact.fidelity, answered))
        why = f"{runtime.name} cannot run"
    later = "they are compared on the device before a number counts"
    note = f"its golden answers were not compared here, where {why}; {later}"
    return msgspec.structs.replace(artifact, notes=joined_notes(*artifact.notes, note))


def joined_notes(*sentences: str) -> tuple[str, ...]:
    """Return what there is to say, each sentence once."""
    return tuple(dict.fromkeys(sentence for sentence in sentences if sentence))


def _advice(request: BuildRequest, target: Target) -> str:
    """Say where int8 is no gain on the target; "" elsewhere."""
    from edgedeploy.judge.advice import int8_advice

    return int8_advice(target, request.backend) if request.precision == "int8" else ""


def this_target(name: str) -> Target:
    """Read a target, resolving `host` to what this machine is."""
    return load_target(name, machine=platform.machine(), isa=this_isa())


@cache
def this_isa() -> frozenset[str]:
    """Return what this machine's processor has, as /proc/cpuinfo spells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def _rules(runtime: Backend, target: Target, precision: Precision) -> BackendRules:
    rules = target.backends.get(runtime.name)
    if rules is None:
        known = ", ".join(target.backends) or "none"
        raise UsageError(f"target {target.name!r} has no rules for back end {runtime.name!r} (it has: {known})")
    if precision not in rules.precisions or precision not in runtime.precisions:
        allowed = ", ".join(sorted(runtime.precisions.intersection(rules.precisions)))
        raise UsageError(f"{runtime.name} for target {target.name!r} does not do {precision} (it does: {allowed})")
    if precision == "int8" and runtime.name not in target.quantization:
        raise UsageError(
            f"target {target.name!r} gives {runtime.name} no int8 rules; add [quantization.{runtime.name}]"
        )
    return rules


def _recipe(request: BuildRequest, runtime: Backend, target: Target, options: Mapping[str, OptionValue]) -> Recipe:
    if ":" in request.source and not request.inputs:
        raise UsageError(
            f"{request.source} comes from Python, so its inputs must be named; give --input NAME=1x3x224x224, or "
            f"[inputs.NAME] in the release file"
        )
    packages = (*_source_packages(request.source), *runtime.packages)
    return Recipe(
        model=request.name,
        model_sha256=source_identity(request.source, request.base),
        weights_sha256=_file_digest(request.weights) if request.weights else "",
        inputs=request.inputs,
        calibration=str(request.calibration.name) if request.calibration else "",
        calibration_sha256=_set_digest(request.calibration) if request.calibration else "",
        target=target.name,
        target_sha256=sha256_bytes(encode_json(target)),
        backend=runtime.name,
        precision=request.precision,
        options=dict(sorted(options.items())),
        quantization=request.policy if request.precision == "int8" else None,
        allow_loss=request.allow_loss,
        toolchain={
            "edgedeploy": edgedeploy.__version__,
            **{name: _version(name) for name in sorted({*packages})},
            **({} if runtime.tools is None else runtime.tools.versions()),
        },
    )


def _source_packages(source: str) -> tuple[str, ...]:
    return _GRAPH_PACKAGES if source.endswith(".onnx") else (*_EXPORT_PACKAGES, *_GRAPH_PACKAGES)


def _file_digest(path: Path) -> str:
    if not path.is_file():
        raise UsageError(f"the file {path} does not exist")
    return sha256_file(path)


def _set_digest(path: Path) -> str:
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        return sha256_bytes("\n".join(f"{file.name}={sha256_file(file)}" for file in files).encode())
    return _file_digest(path)


def _version(package: str) -> str:
    return installed_version(package) or "not installed"


def stored_artifact(folder: Path, key: str) -> Artifact | None:
    """Return the cached artifact if it is whole; a damaged one is built anew."""
    try:
        built = load_artifact(folder)
    except DocumentError:
        return None
    return built.artifact if built.artifact.key == key else None


def artifact_in_cache(key: str, sha256: str) -> Built | None:
    """Return the artifact of these bytes that was built here by this recipe, or None where the cache lost it.

    Args:
        key: of the recipe, as a run or a bundle from anywhere may say it.
        sha256: of the binary: a recipe of the same name may have given other bytes since.
    """
    if re.fullmatch(r"[0-9a-f]{64}", key) is None:
        return None
    folder = cache_dir() / "artifacts" / key
    stored = stored_artifact(folder, key)
    return Built(stored, folder, is_cached=True) if stored is not None and stored.sha256 == sha256 else None


class staging:
    """A folder beside `final` that takes its place when the block succeeds and vanishes when it does not."""

    def __init__(self, final: Path) -> None:
        self._final = final

    def __enter__(self) -> Path:
        self._final.parent.mkdir(parents=True, exist_ok=True)
        self._sweep()
        self._work = Path(tempfile.mkdtemp(prefix=f".{self._final.name[:8]}-", dir=self._final.parent))
        return self._work

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            for leftover in self._work.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
            self._take_place()
        else:
            shutil.rmtree(self._work, ignore_errors=True)

    def _sweep(self) -> None:
        """Remove what builders left that were killed; a cache may be shared by hosts, so that only age can tell."""
        for left in self._final.parent.glob(".*-*"):
            with contextlib.suppress(FileNotFoundError):  # another sweeper was faster
                if time.time() - left.stat().st_mtime > _ABANDONED_S:
                    shutil.rmtree(left, ignore_errors=True)

    def _take_place(self) -> None:
        """Replace what is there: a damaged or explicitly rebuilt entry, or that of a builder who was faster."""
        while True:
            try:
                self._work.rename(self._final)
                return
            except OSError:
                if not self._final.exists():
                    raise
            # In one step where the system can: another builder may be reading it this moment.
            if exchange(self._work, self._final):
                shutil.rmtree(self._work)
                return
            stale = Path(tempfile.mkdtemp(prefix=".stale-", dir=self._final.parent))
            with contextlib.suppress(FileNotFoundError):
                self._final.rename(stale / "entry")
            shutil.rmtree(stale)


def canonical_model(request: BuildRequest, progress: Progress) -> Model:
    """Return the simplified fp32 ONNX, exported once for all precisions and back ends of the same source."""
    identity = [
        edgedeploy.__version__,
        source_identity(request.source, request.base),
        _file_digest(request.weights) if request.weights else "",
        _set_digest(request.calibration) if request.calibration else "",
        *(repr(to_builtins(spec)) for spec in request.inputs),
        *(f"{name}={_version(name)}" for name in _source_packages(request.source)),
    ]
    folder = cache_dir() / "models" / sha256_bytes("\n".join(identity).encode())
    if not request.rebuild and (stored := _stored_model(folder)):
        progress(f"{request.name}: exported before, taken from the cache")
        return stored
    from edgedeploy.prepare.export import declared_inputs, export
    from edgedeploy.prepare.load import load
    from edgedeploy.prepare.simplify import simplify

    progress(f"{request.name}: loading {request.source}")
    loaded = load(request.source, request.weights, base=request.base, trust_pickle=request.trust_pickle)
    with staging(folder) as stage:
        scratch = stage / "scratch"
        scratch.mkdir()
        samples = _samples(request, request.inputs or declared_inputs(loaded) or ())
        progress(f"{request.name}: exporting to ONNX and comparing with the source on {samples.count} samples")
        model = export(loaded, request.inputs or None, samples, scratch / "exported.onnx")
        progress(f"{request.name}: simplifying")
        model = simplify(model, samples, stage / "model.onnx")
        model = msgspec.structs.replace(model, path=str(folder / "model.onnx"))
        write_json(stage / "model.json", model)
    return model


def _stored_model(folder: Path) -> Model | None:
    try:
        model = read_json(folder / "model.json", Model, MODEL_FORMAT)
    except DocumentError:
        return None
    path = Path(model.path)
    return model if path.is_file() and sha256_file(path) == model.sha256 else None


def _samples(request: BuildRequest, inputs: Sequence[TensorSpec]) -> Samples:
    if request.calibration is not None:
        return load_samples(request.calibration, inputs)
    fixed_batches = [spec.shape[0] for spec in inputs if spec.shape and isinstance(spec.shape[0], int)]
    return random_samples(inputs, max(_RANDOM_SAMPLES, *fixed_batches, 1), seed=0)


def _demand_declared(request: BuildRequest, model: Model) -> None:
    if request.declared is not None:
        from edgedeploy.prepare.count.declared import demand_declared

        demand_declared(request.declared, model.compression, model.kinds, name=request.name)


def _formed(
    request: BuildRequest,
    model: Model,
    rules: QuantizationRules | None,
    samples: Callable[[], Samples],
    work: Path,
    progress: Progress,
) -> Formed:
    from edgedeploy.prepare.form import form

    def calibration() -> Samples:
        if request.calibration is None:
            raise UsageError(
                f"{request.name}: int8 needs samples to calibrate on; give --calibration (a folder or an .npz), or "
                f"[calibration] in the release file"
            )
        return samples()

    return form(
        model,
        request.precision,
        rules,
        request.policy,
        calibration=calibration,
        checks=samples,
        allow_loss=request.allow_loss,
        folder=work,
        cache=cache_dir() / "calibration",
        progress=lambda text: progress(f"{request.name}: {text}"),
    )


def _survival(request: BuildRequest, model: Model, formed: Formed, layers: LayerReport) -> SurvivalReport | None:
    if model.quantization is None or formed.table is None:
        return None
    from edgedeploy.prepare.source.survival import demand_survival, trace

    report = trace(model.quantization, formed.table, Path(formed.model.path), layers)
    if not request.allow_loss:
        demand_survival(report)
    return report


def _compression(
    model: Model, formed: Formed, survival: SurvivalReport | None, layers: LayerReport
) -> CompressionReport:
    """Count what the artifact's form consists of, and say what became of each kind of compression on the way."""
    from edgedeploy.prepare.count.compression import compression_report
    from edgedeploy.prepare.count.statements import statements

    report = compression_report(Path(formed.model.path))
    made = statements(model.kinds, model.compression, report, _changes(survival), layers.expanded)
    return msgspec.structs.replace(report, statements=made)


def _changes(survival: SurvivalReport | None) -> tuple[str, ...]:
    if survival is None:
        return ()
    changed = [one for one in survival.entries if {"re-scaled", "dropped"} & set(one.stages.values())]
    if not changed:
        return ()
    return (
        f"{len(changed)} of {len(survival.entries)} scales of the source are not kept (first: {changed[0].tensor}; "
        f"largest relative change {survival.largest_relative_change:.2g})",
    )
