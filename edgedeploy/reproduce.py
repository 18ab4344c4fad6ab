"""Builds a bundle's artifacts again from their recipes, and says which came out the same.

The recipe of each stands in the bundle; the sources (model, weights, calibration set) are those of the working
directory, or beside the release file that is given. They are compared by digest before anything is built.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgedeploy import golden
from edgedeploy.build import BuildRequest, Built, build, deliver, recipe_of
from edgedeploy.documents import read_toml
from edgedeploy.errors import DocumentError, EdgedeployError, FidelityError, UsageError, VisitFailed
from edgedeploy.installing import Progress, check_here, read_member, unpack_here
from edgedeploy.records.artifact import Artifact, Golden, Recipe
from edgedeploy.records.bundle import BundledCell
from edgedeploy.records.installation import ReproducedCell, Reproduction
from edgedeploy.records.quantization import QuantizationPolicy
from edgedeploy.records.release import FORMAT, Release
from edgedeploy.storage import cache_dir

RELEASE = "evidence/release.toml"
# Of a release file; the demo's has 4 KiB.
_RELEASE_BYTES = 4 << 20
# What a recipe names by digest that is not the same: nothing can come out the same.
_INGREDIENTS = {
    "model_sha256": "the model's source",
    "weights_sha256": "its weights",
    "calibration_sha256": "the calibration set",
}
_NOT_THERE = "not there"


def reproduce(
    bundle: Path,
    key: Path,
    progress: Progress,
    *,
    release: Path | None = None,
    keep: Path | None = None,
    trust_pickle: bool = False,
) -> Reproduction:
    """Build every artifact of a bundle again, and compare each with the one in the bundle.

    Args:
        bundle, key: files; the key is the signer's public one.
        progress: told what happens.
        release: a release file whose folder has the sources; None: the bundle's own, and the working directory.
        keep: a folder for what was built, one folder a cell; None: it is thrown away.
        trust_pickle: run code inside pickled files of the sources.

    Raises:
        BundleRefused: there is evidence against the bundle.
        DocumentError: it has no release file.
    """
    manifest = check_here(bundle, key)
    with tempfile.TemporaryDirectory(prefix="edgedeploy-") as scratch:
        written, base = _release(bundle, release, Path(scratch))
        work = _Work(bundle, key, written, base, Path(scratch), keep, trust_pickle, progress)
        with _own_cache(Path(scratch) / "cache"):
            cells = tuple(work.reproduced(number, cell) for number, cell in enumerate(manifest.cells))
    return Reproduction(
        bundle=manifest.name,
        version=manifest.version,
        release=str(release) if release else f"{RELEASE} of the bundle, sources in {base}",
        cells=cells,
        is_reproduced=all(cell.state in ("identical", "equal", "same kit") for cell in cells),
    )


def _release(bundle: Path, given: Path | None, scratch: Path) -> tuple[Release, Path]:
    """Return a release file and the folder that paths in it start from.

    Not `load_release`: a file that is missing concerns the cells that need it.
    """
    if given is not None:
        return read_toml(given, Release, FORMAT), given.absolute().parent
    packed = scratch / "release.toml"
    try:
        packed.write_bytes(read_member(bundle, RELEASE, _RELEASE_BYTES))
    except DocumentError as error:
        raise DocumentError(f"{error}; name the release file with --release") from error
    return read_toml(packed, Release, FORMAT), Path.cwd()


@contextlib.contextmanager
def _own_cache(folder: Path) -> Iterator[None]:
    """Build with an empty cache, so that everything is built, and nothing that was released is replaced."""
    chosen = {"EDGEDEPLOY_CACHE_DIR": str(folder), "EDGEDEPLOY_TOOLS_DIR": str(cache_dir() / "tools")}
    before = {name: os.environ.get(name) for name in chosen}
    chosen["EDGEDEPLOY_TOOLS_DIR"] = before["EDGEDEPLOY_TOOLS_DIR"] or chosen["EDGEDEPLOY_TOOLS_DIR"]
    os.environ.update(chosen)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True, slots=True)
class _Work:
    """A bundle that is built again: its sources, and where things go."""

    bundle: Path
    key: Path
    release: Release
    base: Path
    scratch: Path
    keep: Path | None
    trust_pickle: bool
    progress: Progress

    def reproduced(self, number: int, cell: BundledCell) -> ReproducedCell:
        """Return what became of one cell; what cannot be built does not stop the others."""
        self.progress(f"{cell.cell}: unpacking what was released")
        then = unpack_here(self.bundle, self.key, cell, self.scratch / _folder_of(number, cell))
        row = ReproducedCell(
            cell=cell.cell, artifact=then.artifact.name, state="not built", then_sha256=then.artifact.sha256
        )
        try:
            request = self._request(then.artifact.recipe)
            recipe = recipe_of(request)
            row = msgspec.structs.replace(row, changes=changes_of(then.artifact.recipe, recipe))
            if others := _other_ingredients(then.artifact.recipe, recipe, request):
                return msgspec.structs.replace(row, note=f"not built, because {others}")
            self.progress(f"{cell.cell}: building it again")
            now = build(request, self.progress)
        except UsageError as error:
            then_do = f"; its sources are looked for in {self.base}, and elsewhere with --release"
            return msgspec.structs.replace(row, note=f"{error}{then_do}")
        except EdgedeployError as error:
            return msgspec.structs.replace(row, note=str(error))
        if self.keep is not None:
            now = deliver(now, self.keep / _folder_of(number, cell))
        row = msgspec.structs.replace(row, now_sha256=now.artifact.sha256)
        self.progress(f"{cell.cell}: comparing")
        return _compared(row, then, now)

    def _request(self, recipe: Recipe) -> BuildRequest:
        entry = self.release.models.get(recipe.model)
        if entry is None:
            known = ", ".join(self.release.models)
            raise DocumentError(f"the release file has no model {recipe.model!r} (it has: {known})")
        calibration = self.release.calibration
        if recipe.calibration and calibration is None:
            raise DocumentError(f"it was calibrated on {recipe.calibration}, and the release file has no [calibration]")
        return BuildRequest(
            name=recipe.model,
            source=entry.source,
            base=self.base,
            weights=self.base / entry.weights if entry.weights else None,
            inputs=recipe.inputs,
            target=recipe.target,
            backend=recipe.backend,
            precision=recipe.precision,
            calibration=self.base / calibration.set if calibration and recipe.calibration else None,
            options=recipe.options,
            policy=recipe.quantization or QuantizationPolicy(),
            allow_loss=recipe.allow_loss,
            trust_pickle=self.trust_pickle,
            rebuild=True,
        )


def _folder_of(number: int, cell: BundledCell) -> str:
    """Return a folder's name for a cell: no name of a bundle decides a path."""
    return f"{number + 1}-{cell.sha256[:8]}"


def changes_of(then: Recipe, now: Recipe) -> tuple[str, ...]:
    """Say what differs between two recipes: ingredients by digest, tools by version.

    Args:
        then: as it was built; now: as it would be built here.
    """
    named = {**_INGREDIENTS, "target_sha256": f"the rules of target {now.target}"}
    ingredients = [
        f"{what}: {_digest(getattr(then, name))} then, {_digest(getattr(now, name))} now"
        for name, what in named.items()
        if getattr(then, name) != getattr(now, name)
    ]
    tools = [
        f"{name}: {then.toolchain.get(name, _NOT_THERE)} then, {now.toolchain.get(name, _NOT_THERE)} now"
        for name in sorted({*then.toolchain, *now.toolchain})
        if then.toolchain.get(name) != now.toolchain.get(name)
    ]
    return (*ingredients, *tools)


def _digest(sha256: str) -> str:
    return sha256[:12] if sha256 else "none"


def _other_ingredients(then: Recipe, now: Recipe, request: BuildRequest) -> str:
    """Say which ingredients are others than they were; "" when none is."""
    places = {
        "model_sha256": request.source,
        "weights_sha256": str(request.weights),
        "calibration_sha256": str(request.calibration),
    }
    others = [
        f"{what} ({places[name]}) is not what it was made from"
        for name, what in _INGREDIENTS.items()
        if getattr(then, name) != getattr(now, name)
    ]
    return " and ".join(others)


def _compared(row: ReproducedCell, then: Built, now: Built) -> ReproducedCell:
    """Say how what was built compares with what was released."""
    engine = then.artifact.engine
    if engine is not None:
        if engine.kit_sha256 != now.artifact.sha256:
            return msgspec.structs.replace(
                row, state="differs", note="the kit that its engine is built from is another"
            )
        note = "its kit came out byte for byte; the engine is built on the device, and never twice the same"
        return msgspec.structs.replace(row, state="same kit", note=note)
    if then.artifact.sha256 == now.artifact.sha256:
        return msgspec.structs.replace(row, state="identical")
    if then.artifact.golden is None:
        note = f"other bytes, and {then.artifact.recipe.backend} computes nothing that could be compared"
        return msgspec.structs.replace(row, state="differs", note=note)
    try:
        return _numerically(row, then, now, then.artifact.golden)
    except (FidelityError, VisitFailed) as error:
        return msgspec.structs.replace(row, state="differs", note=str(error).split("\n")[0])


def _numerically(row: ReproducedCell, then: Built, now: Built, promised: Golden) -> ReproducedCell:
    """Have both artifacts answer the golden inputs on this machine.

    Raises:
        FidelityError: outputs of another name or shape, or NaN.
        VisitFailed: one of them does not run here.
    """
    from edgedeploy.prepare.fidelity import compare

    inputs = then.folder / golden.INPUTS
    expected, found = (
        golden.answers_here(built.artifact, built.file, inputs, batch=promised.batch) for built in (then, now)
    )
    result = compare(
        lambda _: expected, lambda _: found, [expected], names=("what was released", "what was built"),
        sample_source="golden inputs",
    )  # fmt: skip
    largest, unit = _largest_difference(then.artifact, expected, found)
    noisiest = max(0.0 if one.sqnr_db is None else float(10 ** (-one.sqnr_db / 20)) for one in result.outputs)
    relative = max(one.max_relative for one in result.outputs)
    is_near = (promised.max_relative is None or relative <= promised.max_relative) and (
        promised.max_noise is None or noisiest <= promised.max_noise
    )
    note = "" if is_near else "the answers lie further apart than the artifact's golden comparison allows"
    return msgspec.structs.replace(row, state="equal" if is_near else "differs", largest=largest, unit=unit, note=note)


def _largest_difference(artifact: Artifact, expected: Mapping[str, Any], found: Mapping[str, Any]) -> tuple[float, str]:
    """Return the largest difference of two sets of answers, in steps of the outputs' grids where they have one."""
    import numpy as np

    steps, ratios = [], []
    for name, values in expected.items():
        difference = float(np.abs(found[name].astype(np.float64) - values.astype(np.float64)).max(initial=0.0))
        scales = artifact.layers.scales.get(name, ())
        ratios.append(difference / max(float(np.abs(values.astype(np.float64)).max(initial=0.0)), 1e-30))
        if values.dtype.kind != "f":
            steps.append(difference)
        elif artifact.recipe.precision == "int8" and len(scales) == 1 and scales[0] > 0:
            steps.append(difference / scales[0])
    return (max(steps), "LSB") if len(steps) == len(expected) else (max(ratios), "of the largest value")
