"""Opens a bundle on this machine: it is verified first, and its artifacts may then answer their golden inputs."""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import edgedeploy
from edgedeploy import golden
from edgedeploy.backends import load_backends, session_file
from edgedeploy.build import load_artifact, this_isa
from edgedeploy.documents import read_json
from edgedeploy.errors import (
    BundleRefused,
    CompileError,
    DocumentError,
    EdgedeployError,
    FidelityError,
    UsageError,
    VisitFailed,
)
from edgedeploy.evidence import check
from edgedeploy.evidence.gather import RUNS, VERDICT
from edgedeploy.records.bundle import FORMAT, Bundle, BundledCell, BundleVerification, Replay
from edgedeploy.records.run import FORMAT as RUN_FORMAT
from edgedeploy.records.run import Run
from edgedeploy.records.verdict import FORMAT as VERDICT_FORMAT
from edgedeploy.records.verdict import CellVerdict, Verdict
from edgedeploy.storage import sha256_file

Progress = Callable[[str], None]


def verify(
    path: Path,
    key: Path,
    *,
    machine: str = "",
    min_sequence: int | None = None,
    replays: bool | None = None,
    progress: Progress = lambda text: None,
) -> BundleVerification:
    """Verify a bundle with its signer's public key, and nothing else than the bundle and the key.

    What was decided is judged again from the raw runs in the bundle, where the same version of edgedeploy does it.

    Golden inputs go through the bundle's artifact with the device half that is installed here, never with the one in
    the bundle: a signature says who made a file, not that running it is harmless, and whoever verifies has not yet
    decided to trust the release. The bundle's own is compared by digest, and said to differ where it does.

    Args:
        path: the bundle.
        key: the public key, PEM.
        machine: at least one cell must be for it, as `uname -m` says; "": any.
        min_sequence: refuse a release before this one.
        replays: whether artifacts answer their golden inputs here; None: those that are for this machine.
        progress: told what happens.

    Raises:
        BundleRefused: there is evidence against it.
        UsageError: a file cannot be read, or the key is of another kind.
        EdgedeployError: it could not be checked, or `replays` was demanded and nothing could be replayed.
    """
    progress(f"verifying {path}")
    found = verified(path, key, machine=machine, min_sequence=min_sequence)
    bundle = contents(found)
    progress("judging its runs again")
    not_rejudged = _rejudged(found, bundle)
    answered: tuple[Replay, ...] = ()
    if replays is not False:
        answered = _replayed(found, bundle, is_demanded=bool(replays), progress=progress)
    if replays and not any(one.fidelity for one in answered):
        reasons = "; ".join(f"{one.cell}: {one.reason}" for one in answered)
        raise EdgedeployError(f"{path} is verified, but nothing of it could be replayed here: {reasons}")
    return BundleVerification(
        file=str(path),
        size_bytes=found.size_bytes,
        key_sha256=found.key_sha256,
        manifest_sha256=found.manifest_sha256,
        bundle=bundle,
        machine=machine,
        replays=answered,
        session_differs=_other_sessions(found, bundle),
        is_rejudged=not not_rejudged,
        not_rejudged=not_rejudged,
    )


def verified(
    path: Path, key: Path, *, machine: str = "", cell: str = "", min_sequence: int | None = None
) -> check.Verified:
    """Check a bundle as a device would, with the same program; raises as `verify` does."""
    try:
        return check.verify(str(path), str(key), machine=machine, cell=cell, min_sequence=min_sequence)
    except check.Refused as error:
        raise BundleRefused(f"{path} is refused: {error}") from error
    except check.Misused as error:
        raise UsageError(str(error)) from error
    except check.NotChecked as error:
        raise EdgedeployError(f"{path} could not be checked: {error}") from error


def contents(found: check.Verified) -> Bundle:
    """Return the manifest of a verified bundle.

    Raises:
        BundleRefused: it has keys or values that this edgedeploy does not know.
    """
    with tempfile.TemporaryDirectory(prefix="edgedeploy-") as scratch:
        (name,) = unpack(found, [check.MANIFEST], Path(scratch) / "bundle")
        try:
            return read_json(name, Bundle, FORMAT)
        except EdgedeployError as error:
            raise BundleRefused(f"the manifest of {found.path} is not what edgedeploy writes: {error}") from error


def unpack(found: check.Verified, names: Iterable[str], folder: Path) -> list[Path]:
    """Write members of a verified bundle into a new folder, checked once more as they are written."""
    try:
        return [Path(one) for one in check.extract(found, names, str(folder))]
    except check.Refused as error:
        raise BundleRefused(str(error)) from error
    except check.Misused as error:
        raise UsageError(str(error)) from error


def _rejudged(found: check.Verified, bundle: Bundle) -> str:
    """Judge the bundle's runs again; return why that says nothing, or "" where the verdict came out the same.

    Raises:
        BundleRefused: the verdict in the bundle does not follow from its runs.
    """
    from edgedeploy.judge.gate import combine, judge_gate

    if bundle.edgedeploy != edgedeploy.__version__:
        return f"it was judged by edgedeploy {bundle.edgedeploy}, and this is {edgedeploy.__version__}"
    with tempfile.TemporaryDirectory(prefix="edgedeploy-") as scratch:
        folder = Path(scratch) / "bundle"
        unpack(found, [name for name in found.places if name == VERDICT or name.startswith(f"{RUNS}/")], folder)
        try:
            told = read_json(folder / VERDICT, Verdict, VERDICT_FORMAT)
            cells = [cell for cell in told.cells if cell.candidate_run]
            pairs = [
                tuple(
                    read_json(folder / RUNS / Path(name).name, Run, RUN_FORMAT)
                    for name in (cell.baseline_run, cell.candidate_run)
                )
                for cell in cells
            ]
        except DocumentError as error:
            raise BundleRefused(f"the evidence in {found.path} cannot be read: {error}") from error
    if any(baseline.session != candidate.session for baseline, candidate in pairs):
        return "a side was measured in another session, and how much the device varies between two is not in the bundle"
    again = judge_gate(
        told.name, [(baseline, candidate) for baseline, candidate in pairs], told.policy, judged_utc=told.judged_utc
    )
    for cell, anew in zip(cells, again.cells, strict=True):
        if _decisions(cell) != _decisions(anew):
            raise BundleRefused(
                f"the verdict in {found.path} does not follow from the runs in it: cell {cell.cell} is "
                f"{cell.decision}, and its runs say {anew.decision}"
            )
    if bundle.decision != told.decision or told.decision != combine(cell.decision for cell in told.cells):
        raise BundleRefused(f"{found.path} says {bundle.decision}, and the verdict of its cells is another one")
    return ""


def _decisions(cell: CellVerdict) -> tuple[object, ...]:
    return (cell.decision, [(finding.metric, finding.decision, finding.effect) for finding in cell.findings])


def _replayed(found: check.Verified, bundle: Bundle, *, is_demanded: bool, progress: Progress) -> tuple[Replay, ...]:
    return tuple(
        _replay(found, cell, progress)
        if not (why := _reason_against(cell, is_demanded))
        else Replay(cell=cell.cell, reason=why)
        for cell in bundle.cells
    )


def _reason_against(cell: BundledCell, is_demanded: bool) -> str:
    """Say why an artifact is not asked here; "" where it is."""
    requires = cell.requires
    if not cell.golden_inputs:
        return "it carries no golden answers: its runtime computes nothing"
    runtimes, _ = load_backends()
    if requires.backend not in runtimes:
        return f"there is no back end {requires.backend} here"
    if requires.fingerprint is not None:
        return f"it is tied to {requires.fingerprint.gpu or 'a GPU'}: replay it there with --device"
    is_here = requires.machine in ("", platform.machine()) and set(requires.isa) <= this_isa()
    if is_here or (is_demanded and (cell.precision != "int8" or runtimes[requires.backend].int8_is_portable)):
        return ""
    return f"it is for {requires.machine} ({cell.target}), and this machine is not: replay it there with --device"


def _replay(found: check.Verified, cell: BundledCell, progress: Progress) -> Replay:
    progress(f"{cell.cell}: answering its golden inputs")
    members = [cell.artifact, cell.manifest, cell.golden_inputs, cell.golden_outputs]
    with tempfile.TemporaryDirectory(prefix="edgedeploy-") as scratch:
        unpack(found, members, Path(scratch) / "bundle")
        try:
            built = load_artifact(Path(scratch) / "bundle" / Path(cell.manifest).parent)
        except DocumentError as error:
            raise BundleRefused(f"the artifact of cell {cell.cell} in {found.path} is not whole: {error}") from error
        if built.artifact.sha256 != cell.sha256 or built.artifact.recipe.backend != cell.requires.backend:
            raise BundleRefused(f"{found.path}: the artifact of cell {cell.cell} is not the one that its manifest says")
        runtimes, _ = load_backends()
        try:
            answered = golden.replay_here(runtimes[cell.requires.backend], built.artifact, built.folder)
        except CompileError as error:
            if isinstance(error.__cause__, FidelityError):
                raise BundleRefused(f"{found.path}: cell {cell.cell}: {error.__cause__}") from error
            assert isinstance(error.__cause__, VisitFailed), "these are the two ways in which a replay fails"
            return Replay(cell=cell.cell, reason=f"it does not run here: {error.__cause__}")
    if answered is None:
        return Replay(cell=cell.cell, reason=f"{cell.requires.runtime.name} is not installed here")
    return Replay(cell=cell.cell, fidelity=answered)


def _other_sessions(found: check.Verified, bundle: Bundle) -> tuple[str, ...]:
    """Return the back ends whose device half is another one here than in the bundle."""
    runtimes, _ = load_backends()
    inside = {cell.requires.backend: found.places[cell.session][2] for cell in bundle.cells}
    return tuple(
        sorted(
            name for name, sha256 in inside.items() if name in runtimes and sha256_file(session_file(name)) != sha256
        )
    )
