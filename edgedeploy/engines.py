"""Step 4 for runtimes that are tied to a device: a kit becomes an engine there, or the cache has one for its like.

An engine is kept apart from the artifacts that hold it: options of a session make another artifact of the same engine.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, cast

import msgspec
import numpy as np

from edgedeploy import golden
from edgedeploy.backends import DeviceBuilt, backend, parse_options, session_file, session_options
from edgedeploy.build import (
    KIT,
    LAYERS,
    MANIFEST,
    QUANTIZATION,
    TIMING_CACHE,
    Built,
    Progress,
    joined_notes,
    staging,
    stored_artifact,
)
from edgedeploy.documents import Record, encode_json, write_json
from edgedeploy.errors import CompileError, DeviceError, FidelityError, VisitFailed
from edgedeploy.lab import builders, bundle, visits
from edgedeploy.lab.builders import Made
from edgedeploy.lab.conversation import Agent
from edgedeploy.lab.conversation import Progress as Told
from edgedeploy.lab.inventory import open_transport
from edgedeploy.lab.transport import Transport
from edgedeploy.lab.visits import Schedule, Side
from edgedeploy.records.artifact import Artifact, EngineBuild, EngineReceipt, Fingerprint, LayerReport
from edgedeploy.records.device import Device
from edgedeploy.records.survival import SurvivalReport
from edgedeploy.render.figures import one_line
from edgedeploy.results import utc_now
from edgedeploy.storage import cache_dir, sha256_bytes, sha256_file, write_atomic

# Longer than the builder's own limit and the grace that it gives a step of TensorRT's: it is to give up by itself, for
# it alone can say at what.
_GRACE_S = 180.0
_ENGINE = re.compile(r"engine(-[2-9]|-[1-9][0-9]+)?")
_RECEIPT = "engine.json"
# A builder tells once a second how far it is; where it is still at the same, that often is enough for a person.
_SAME_TOLD_S = 10.0
# A device's words end in a manifest and on a terminal: this many sentences of this length, no control characters.
_SENTENCES, _CHARACTERS = 20, 500


class _BuildTold(msgspec.Struct, frozen=True):
    """One engine, as its builder tells of it."""

    sha256: str = ""
    seconds: float = 0.0


class _Report(msgspec.Struct, frozen=True):
    """What is read of a builder's report; the device may be of any age and in any state, so each field is checked."""

    stopped: str = ""
    typed: bool = False
    is_pinned: bool = False
    flags: tuple[str, ...] = ()
    workspace_bytes: int | None = None
    parse_s: float = 0.0
    builds: tuple[_BuildTold, ...] = ()
    notes: tuple[str, ...] = ()


class _Engine(Record, frozen=True, kw_only=True):
    """An engine as it is kept: how it was built, and what its builder had to say."""

    receipt: EngineReceipt
    notes: tuple[str, ...] = ()

    @property
    def chosen(self) -> EngineBuild:
        """The build that the file is."""
        return next(one for one in self.receipt.builds if one.is_chosen)


def is_tied_to_device(backend_name: str) -> bool:
    """Say whether a runtime's artifacts are built on the device that runs them."""
    return backend(backend_name).builds_on == "device"


def engine(
    kit: Built,
    device_name: str,
    device: Device,
    progress: Progress,
    *,
    rebuild: bool = False,
    wait_s: float = 0.0,
) -> Built:
    """Return what a kit becomes on a device: built there, or taken from the cache where one of its kind has built it.

    Args:
        kit: as `build` made it; an artifact of a runtime that is not tied to a device is returned as it is.
        device_name: in the inventory.
        device: how to reach it.
        progress: told what happens; a build takes minutes.
        rebuild: build even if the cache has it.
        wait_s: how long to queue for the device when somebody else holds it.

    Raises:
        CompileError: the builder refused, crashed or did not end, or what it built answers otherwise than the model.
        DeviceError: the device cannot be reached, or lacks GPU, driver or runtime.
    """
    recipe = kit.artifact.recipe
    if not is_tied_to_device(recipe.backend) or kit.artifact.engine is not None:
        return kit
    with open_transport(device_name, device, wait_s=wait_s, progress=progress) as transport:
        progress(f"{device_name}: connecting")
        with bundle.connect(transport, device, device_name=device_name, wait_s=wait_s, progress=progress) as agent:
            return _Site(kit, device_name, agent, transport, progress).engine(rebuild=rebuild)


@dataclass(frozen=True, slots=True)
class _Site:
    """A kit and the device that an engine is built on."""

    kit: Built
    device_name: str
    agent: Agent
    transport: Transport
    progress: Progress

    @property
    def runtime(self) -> DeviceBuilt:
        """The back end."""
        return cast("DeviceBuilt", backend(self.kit.artifact.recipe.backend))

    @property
    def options(self) -> Any:
        """What the back end was given."""
        return parse_options(self.runtime.options, self.kit.artifact.recipe.options)

    @property
    def file_name(self) -> str:
        """How the engine's file is called wherever it lies."""
        return f"model{self.runtime.suffix}"

    def engine(self, *, rebuild: bool) -> Built:
        """Return the artifact for this device."""
        builder = sha256_file(self.runtime.builder)
        bundle.ship(self.agent, self.transport, {builder: self.runtime.builder})
        fingerprint = self._fingerprint(builders.probe(self.agent, builder))
        key = sha256_bytes(f"{self.kit.artifact.key} {builder} ".encode() + encode_json(fingerprint))
        folder = cache_dir() / "artifacts" / key
        if not rebuild and (stored := stored_artifact(folder, key)):
            self.progress(f"{stored.recipe.model}: built before on such a device, taken from the cache ({key[:8]})")
            return Built(stored, folder, is_cached=True)
        kept = cache_dir() / "engines" / self._engine_key(builder, fingerprint)
        if rebuild or (made := _kept_engine(kept, self.file_name)) is None:
            with staging(kept) as work:
                made = self._built(builder, fingerprint, work)
                write_json(work / _RECEIPT, made)
        else:
            self.progress(f"{self.kit.artifact.recipe.model}: its engine was built before on such a device")
        with staging(folder) as work:
            artifact = self._artifact(made, key, kept, work)
            write_json(work / MANIFEST, artifact)
        return Built(artifact, folder, is_cached=False)

    def _fingerprint(self, found: Mapping[str, Any]) -> Fingerprint:
        """Return what engines of this device are tied to."""
        where = self.agent.label
        if found.get("driver"):
            raise DeviceError(f"{where} has no GPU that can be used: {_sentence(found['driver'])}")
        if not found.get("tensorrt"):
            why = _sentence(found.get("tensorrt_problem") or f"its {self.agent.python} has no {self.runtime.name}")
            raise DeviceError(
                f"{where} cannot build engines: {why}; install it for that interpreter, or name the one that has it as "
                f'python = "..." of this device in lab.toml'
            )
        gpus = found.get("devices")
        gpu = gpus[0] if isinstance(gpus, list) and gpus and isinstance(gpus[0], dict) else {}
        return Fingerprint(
            gpu=_sentence(gpu.get("name", "")),
            compute_capability=_sentence(gpu.get("compute_capability", "")),
            tensorrt=_sentence(found["tensorrt"]),
            driver=_sentence(found.get("cuda_driver", "")),
            jetpack=_sentence(found.get("jetpack") or ""),
        )

    def _engine_key(self, builder: str, fingerprint: Fingerprint) -> str:
        """Return the digest of everything that decides an engine."""
        decisive = [self.kit.artifact.sha256, builder, repr(self._decisive_options())]
        return sha256_bytes("\n".join(decisive).encode() + encode_json(fingerprint))

    def _decisive_options(self) -> list[tuple[str, Any]]:
        """Return the options that decide an engine; of several, the fastest in a session with its options is taken."""
        given = dataclasses.asdict(self.options)
        return [(name, given[name]) for name in given if given["builds"] > 1 or name in self.runtime.engine_options]

    def _built(self, builder: str, fingerprint: Fingerprint, work: Path) -> _Engine:
        """Build on the device, choose one engine and bring back what belongs to it."""
        runtime, options = self.runtime, self.options
        like = sha256_bytes(encode_json(fingerprint))
        timing = cache_dir() / "timing" / f"{like}.cache"
        lineage = cache_dir() / "refit" / f"{sha256_bytes(f'{like} {self._lineage()}'.encode())}.json"
        files = {"kit": self.kit.file}
        if timing.is_file():
            # A copy: a build for another device of this kind may replace the cache while it is sent.
            files["timing_cache"] = Path(shutil.copyfile(timing, work / TIMING_CACHE))
        if options.refit:
            files |= _ancestor(lineage, self.file_name)
        digests = {name: sha256_file(path) for name, path in files.items()}
        self.progress(f"{self.device_name}: sending the kit of {self.kit.artifact.recipe.model}")
        bundle.ship(self.agent, self.transport, {digests[name]: path for name, path in files.items()})
        report, made = self._told_build(builder, digests, options)
        (work / TIMING_CACHE).unlink(missing_ok=True)
        if "timing_cache" in made:
            builders.fetch(self.agent, self.transport, made["timing_cache"], timing)
        engines = {name: one for name, one in made.items() if _ENGINE.fullmatch(name)}
        if not engines:
            raise CompileError(
                _sentence(report.stopped) or "the builder ended without an engine",
                backend=runtime.name,
                hint="what was timed until then is kept: build again to go on from there, or give more time_limit_s"
                if "timing_cache" in made
                else "",
            )
        receipt = EngineReceipt(
            fingerprint=fingerprint,
            kit_sha256=self.kit.artifact.sha256,
            kit_key=self.kit.artifact.key,
            builder_sha256=builder,
            device=self.device_name,
            timing_cache_sha256=made["timing_cache"].sha256 if "timing_cache" in made else "",
            is_pinned=report.is_pinned,
            is_typed=report.typed,
            flags=_sentences(report.flags),
            workspace_bytes=report.workspace_bytes or 0,
            parse_s=report.parse_s,
        )
        seconds = {one.sha256: one.seconds for one in report.builds}
        builds = [
            EngineBuild(sha256=one.sha256, size_bytes=one.size_bytes, seconds=seconds.get(one.sha256, 0.0))
            for one in engines.values()
        ]
        notes: tuple[str, ...] = ()
        if len(builds) == 1:
            builds = [msgspec.structs.replace(builds[0], is_chosen=True)]
        else:
            builds, notes = self._compared(receipt, builds)
        found = _Engine(
            receipt=msgspec.structs.replace(receipt, builds=tuple(builds)), notes=(*_sentences(report.notes), *notes)
        )
        self._bring_back(list(engines)[builds.index(found.chosen)], made, work)
        if options.refit:
            write_atomic(lineage, msgspec.json.encode([self._engine_key(builder, fingerprint), self.kit.artifact.key]))
        return found

    def _lineage(self) -> str:
        """Return what engines have in common of which one may take another's weights, as far as the host can say."""
        recipe = self.kit.artifact.recipe
        return f"{recipe.model} {recipe.target} {recipe.backend} {recipe.precision} {sorted(recipe.options.items())}"

    def _told_build(self, builder: str, digests: Mapping[str, str], options: Any) -> tuple[_Report, dict[str, Made]]:
        """Have the builder work, and tell how far it is."""
        limit_s = float(options.time_limit_s) + _GRACE_S
        try:
            report, made = builders.build(
                self.agent,
                builder,
                digests,
                dataclasses.asdict(options),
                timeout_s=limit_s,
                hear=_teller(self.device_name, self.progress),
            )
        except VisitFailed as error:
            raise CompileError(str(error), backend=self.runtime.name) from error
        try:
            return msgspec.convert(report, _Report), made
        except msgspec.ValidationError as error:
            raise DeviceError(f"{self.agent.label}: the builder's report is none: {error}") from error

    def _bring_back(self, name: str, made: Mapping[str, Made], work: Path) -> None:
        """Fetch an engine and what belongs to it."""
        number = name.removeprefix("engine")
        if f"layers{number}" not in made:
            raise DeviceError(f"{self.agent.label}: the builder made {name!r} and does not say what its layers are")
        builders.fetch(self.agent, self.transport, made[name], work / self.file_name)
        builders.fetch(self.agent, self.transport, made[f"layers{number}"], work / LAYERS)
        # Engines that were bound to the first one's tactics have no cache of their own.
        tactics = made.get(f"timing_cache{number}") or made.get("timing_cache")
        if tactics is not None:
            builders.fetch(self.agent, self.transport, tactics, work / TIMING_CACHE)

    def _compared(self, receipt: EngineReceipt, builds: list[EngineBuild]) -> tuple[list[EngineBuild], tuple[str, ...]]:
        """Return how fast each of several engines is and how far its answers lie from the fastest's, and what is odd.

        One that answers NaN or infinity where another does not is never the one that is taken.
        """
        artifact = msgspec.structs.replace(self.kit.artifact, engine=receipt)
        answers: list[dict[str, Any]] = []
        for number, one in enumerate(builds):
            self.progress(f"{self.device_name}: measuring engine {number + 1} of {len(builds)}")
            side = self._side(artifact, one.sha256)
            answers.append(golden.answers_there(self.agent, self.transport, side))
            (measured,) = visits.measure_block(self.agent, [side], Schedule(), block=number, seed=0)
            samples_s = [sample_s for burst in measured.visit.bursts for sample_s in burst.samples_s]
            builds[number] = msgspec.structs.replace(one, p50_s=median(samples_s))
        finite = [number for number in range(len(builds)) if _is_finite(answers[number])]
        fastest = min(finite or range(len(builds)), key=lambda number: builds[number].p50_s or 0.0)
        odd = [number for number in range(len(builds)) if finite and number not in finite]
        compared = [
            msgspec.structs.replace(
                one,
                is_chosen=number == fastest,
                largest_difference=None if number in odd else _largest_difference(answers[number], answers[fastest]),
            )
            for number, one in enumerate(builds)
        ]
        return compared, tuple(f"engine {number + 1} answers NaN or infinity and was not taken" for number in odd)

    def _side(self, artifact: Artifact, sha256: str) -> Side:
        assert artifact.golden is not None, "a runtime that computes comes with golden samples"
        session, inputs = session_file(artifact.recipe.backend), self.kit.folder / golden.INPUTS
        side = Side(
            cell=artifact.name,
            artifact_sha256=sha256,
            session_sha256=sha256_file(session),
            options=session_options(artifact),
            inputs_sha256=sha256_file(inputs),
            batch=artifact.golden.batch,
        )
        bundle.ship(self.agent, self.transport, {side.session_sha256: session, side.inputs_sha256: inputs})
        return side

    def _artifact(self, made: _Engine, key: str, kept: Path, work: Path) -> Artifact:
        """Put the kit's recipe and an engine together: as it is described, and as it answers on the device.

        Raises:
            CompileError: something was lost that is to be refused, or it answers something else than the model.
        """
        for source, names in (
            (kept, (self.file_name, LAYERS, TIMING_CACHE)),
            (self.kit.folder, (QUANTIZATION, golden.INPUTS, golden.OUTPUTS)),
        ):
            for name in names:
                if (source / name).is_file():
                    shutil.copyfile(source / name, work / name)
        asked = self.kit.artifact
        layers = self.runtime.built_report(self.kit.file, {"layers": work / LAYERS}, self.options)
        artifact = msgspec.structs.replace(
            asked,
            file=self.file_name,
            sha256=made.chosen.sha256,
            size_bytes=(work / self.file_name).stat().st_size,
            key=key,
            engine=msgspec.structs.replace(made.receipt, kit_key=asked.key),
            layers=layers,
            survival=_survival(asked.survival, asked.layers, layers),
            notes=joined_notes(*asked.notes, *layers.notes, *made.notes),
            created_utc=utc_now(),
        )
        return self._proven(artifact, work)

    def _proven(self, artifact: Artifact, work: Path) -> Artifact:
        """Return the artifact with what it answered to its golden inputs on the device.

        Raises:
            CompileError: it answers something else than the model.
        """
        if artifact.golden is None:
            return artifact
        self.progress(f"{artifact.recipe.model}: comparing its answers with the model's")
        side, where = self._side(artifact, artifact.sha256), f"{artifact.name} on {self.device_name}"
        bundle.ship(self.agent, self.transport, {artifact.sha256: work / artifact.file})
        try:
            answered = golden.replay(self.agent, self.transport, side, artifact.golden, work, where=where)
        except FidelityError as error:
            raise CompileError(
                str(error), backend=self.runtime.name, hint="build it as fp32, or with -O float_type=float32"
            ) from error
        return msgspec.structs.replace(artifact, fidelity=(*artifact.fidelity, answered))


def _sentence(text: object) -> str:
    """Return what a device said as a line that a terminal shows and does not obey."""
    line = one_line(str(text))
    return line if len(line) <= _CHARACTERS else line[: _CHARACTERS - 1] + "…"


def _sentences(told: tuple[str, ...]) -> tuple[str, ...]:
    """Return what a device said, of which only so much is kept."""
    left = len(told) - _SENTENCES
    more = (f"and {left} more of the builder's notes, which are not kept",) if left > 0 else ()
    return (*map(_sentence, told[:_SENTENCES]), *more)


def _teller(device_name: str, progress: Progress) -> Callable[[Told], None]:
    """Return what passes a builder's progress on: at once when it turns to something else, seldom while it does not."""
    said, said_s = "", 0.0

    def hear(told: Told) -> None:
        nonlocal said, said_s
        text = _sentence(told.text)
        doing, now_s = text.partition(",")[0], time.monotonic()
        if doing == said and now_s - said_s < _SAME_TOLD_S:
            return
        said, said_s = doing, now_s
        progress(f"{device_name}: {text}" + (f" ({told.done} of {told.total})" if told.total else ""))

    return hear


def _kept_engine(folder: Path, file_name: str) -> _Engine | None:
    """Return an engine that is kept whole, or None: then it is built."""
    try:
        made = msgspec.json.decode((folder / _RECEIPT).read_bytes(), type=_Engine)
        is_whole = sha256_file(folder / file_name) == made.chosen.sha256 and (folder / LAYERS).is_file()
    except (OSError, msgspec.MsgspecError, StopIteration):
        return None
    return made if is_whole else None


def _ancestor(lineage: Path, file_name: str) -> dict[str, Path]:
    """Return the last engine of the same lineage and its kit, for the builder to put new weights into."""
    try:
        engine_key, kit_key = msgspec.json.decode(lineage.read_bytes(), type=tuple[str, str])
    except (OSError, msgspec.MsgspecError):
        return {}
    found = {
        "engine": cache_dir() / "engines" / engine_key / file_name,
        "engine_kit": cache_dir() / "artifacts" / kit_key / KIT,
    }
    return found if all(path.is_file() for path in found.values()) else {}


def _survival(promised: SurvivalReport | None, asked: LayerReport, found: LayerReport) -> SurvivalReport | None:
    """Return what became of the source's scales, now that the engine itself says which of those asked for it has."""
    if promised is None:
        return None
    vanished = asked.scales.keys() - found.scales.keys()
    entries = tuple(
        msgspec.structs.replace(entry, stages={**entry.stages, "artifact": "dropped"})
        if entry.tensor in vanished
        else entry
        for entry in promised.entries
    )
    return msgspec.structs.replace(promised, entries=entries)


def _is_finite(answers: Mapping[str, Any]) -> bool:
    return all(bool(np.isfinite(values).all()) for values in answers.values() if values.dtype.kind == "f")


def _largest_difference(answers: Mapping[str, Any], reference: Mapping[str, Any]) -> float:
    """Return the largest difference of float answers, in ratio to the largest answer of the output."""
    found = [0.0]
    for name, expected in reference.items():
        if expected.dtype.kind == "f" and (scale := float(np.abs(expected).max(initial=0.0))):
            found.append(float(np.abs(answers[name].astype(np.float64) - expected).max()) / scale)
    return max(found)
