"""Collects what goes into a bundle: a verdict, its runs, the artifacts that they measured, and what made those."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from edgedeploy import golden
from edgedeploy.backends import session_file
from edgedeploy.build import LAYERS, MANIFEST, QUANTIZATION, TIMING_CACHE, Built, artifact_in_cache, load_artifact
from edgedeploy.documents import encode_json, read_json
from edgedeploy.errors import DocumentError, UsageError
from edgedeploy.evidence import check
from edgedeploy.lab.bundle import RUNNER
from edgedeploy.records.artifact import FORMAT as ARTIFACT_FORMAT
from edgedeploy.records.artifact import Artifact
from edgedeploy.records.bundle import BundledCell, DeviceDemand, Ingredients, RuntimeDemand
from edgedeploy.records.release import load_release
from edgedeploy.records.run import Run
from edgedeploy.records.target import load_target
from edgedeploy.records.verdict import FORMAT as VERDICT_FORMAT
from edgedeploy.records.verdict import CellVerdict, Decision, Finding, Verdict
from edgedeploy.render.figures import finding_text
from edgedeploy.results import Results, load_run
from edgedeploy.storage import cache_dir, sha256_bytes, sha256_file

# A member is bytes that were made here, or a file that is read while the archive is written.
Source = bytes | Path

RELEASE, VERDICT, POLICY, LOCK = (
    "evidence/release.toml",
    "evidence/verdict.json",
    "evidence/policy.json",
    "evidence/lock.json",
)
RUNS, CARD, LICENSE, SBOM = "evidence/runs", "card/MODEL_CARD.md", "card/LICENSE", "sbom.cdx.json"
RUNNER_MEMBER = "runner/edgedeploy_runner.py"
_CARD_NAMES = ("MODEL_CARD.md",)
_LICENSE_NAMES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "LICENCE", "COPYING")
_MOST_WORDS = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class PackRequest:
    """What is to be packed.

    Attributes:
        subject: a verdict, or a release file, whose newest verdict in `results` is meant.
        version: of the release, as its maker calls it.
        sequence: grows with each release.
        release: the release file of a verdict; None: without one, or `subject` itself.
        card, license: None: what lies beside the release file.
        allowed: decisions other than PASS that are packed all the same.
        with_baselines: the baselines' artifacts too, so that the comparison can be made again elsewhere.
    """

    subject: Path
    version: str
    sequence: int = 0
    results: Path = Path("bench_results")
    release: Path | None = None
    card: Path | None = None
    license: Path | None = None
    allowed: tuple[Decision, ...] = ()
    with_baselines: bool = False


@dataclass(frozen=True, slots=True)
class Measured:
    """An artifact that goes into the bundle, and the run that measured it."""

    cell: BundledCell
    artifact: Artifact
    run: Run


@dataclass(slots=True)
class Contents:
    """Everything that a bundle will hold, except what is made from all of it: SBOM, manifest, signature.

    Attributes:
        members: path in the bundle → its content.
        absent: what a reader might look for and does not find, each with the reason.
    """

    verdict: Verdict
    members: dict[str, Source] = field(default_factory=dict)
    measured: list[Measured] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    def add(self, name: str, source: Source) -> str:
        """Add a member; one that is there already must be the same."""
        if problem := check.name_problem(name):
            raise UsageError(f"{name!r} cannot be a member of a bundle: the name {problem}")
        known = self.members.setdefault(name, source)
        if known != source and _content(known) != _content(source):
            raise DocumentError(f"two different files would be {name} in the bundle: {known!s} and {source!s}")
        return name


def gather(request: PackRequest) -> Contents:
    """Collect what a verdict rests on.

    Raises:
        UsageError: there is no verdict, its decision is not allowed, or an artifact is not in the cache any more.
        DocumentError: a file is not what it should be, or was edited.
    """
    _demand_words(request)
    verdict_file, release_file = _files(request)
    verdict = read_json(verdict_file, Verdict, VERDICT_FORMAT)
    if verdict.decision != "PASS" and verdict.decision not in request.allowed:
        raise UsageError(
            f"the verdict in {verdict_file} is {verdict.decision}, and a bundle says that a release may go out; to "
            f"pack it all the same, with that decision in it: --allow-decision {verdict.decision}"
        )
    contents = Contents(verdict)
    contents.add(VERDICT, verdict_file)
    contents.add(POLICY, encode_json(verdict.policy))
    if release_file is None:
        contents.absent.append("no release file: none was named (--release)")
    else:
        contents.add(RELEASE, release_file)
    runs = _Runs(verdict_file, request.results)
    baselines: set[str] = set()
    for cell in verdict.cells:
        if not cell.candidate_run:
            why = "; ".join(cell.notes) or "it was not measured"
            contents.absent.append(f"no artifact of cell {cell.cell}: {why}")
            continue
        file, run = runs.find(cell.candidate_run)
        _add_cell(contents, cell, file, run, cell.decision)
        file, run = runs.find(cell.baseline_run)
        if request.with_baselines and run.artifact.sha256 not in baselines:
            baselines.add(run.artifact.sha256)
            _add_cell(contents, cell, file, run, None)
        else:
            contents.add(_run_member(file), file)
    if not contents.measured:
        raise UsageError(f"no cell of {verdict_file} was measured, so there is nothing to pack")
    if not request.with_baselines:
        names = ", ".join(dict.fromkeys(cell.baseline_cell for cell in verdict.cells))
        contents.absent.append(f"no artifact of the baseline {names}: only its runs are there (--with-baselines)")
    contents.add(RUNNER_MEMBER, RUNNER)
    _note_other_runner(contents)
    _add_papers(contents, request, release_file)
    return contents


def ingredients(measured: Measured) -> Ingredients:
    """Return what an artifact was made from and judged on."""
    recipe, outputs = measured.artifact.recipe, measured.run.outputs
    return Ingredients(
        cell=measured.cell.cell,
        key=measured.artifact.key,
        model=recipe.model,
        model_sha256=recipe.model_sha256,
        weights_sha256=recipe.weights_sha256,
        calibration=recipe.calibration,
        calibration_sha256=recipe.calibration_sha256,
        evaluation=outputs.dataset if outputs else "",
        evaluation_sha256=outputs.dataset_sha256 if outputs else "",
        target=recipe.target,
        target_sha256=recipe.target_sha256,
        toolchain=dict(sorted(recipe.toolchain.items())),
    )


# ---------------------------------------------------------------- verdict and runs


def _demand_words(request: PackRequest) -> None:
    version = request.version
    if not version.strip() or not version.isprintable() or len(version) > _MOST_WORDS:
        raise UsageError(f"--version {version!r} must be a word such as 1.4.0, of at most {_MOST_WORDS} characters")
    if not 0 <= request.sequence < 10**15:
        raise UsageError(f"--sequence {request.sequence} must be a whole number from 0 on, larger with each release")


def _files(request: PackRequest) -> tuple[Path, Path | None]:
    """Return the verdict's file and the release file, where there is one."""
    subject = request.subject
    if not subject.is_file():
        raise UsageError(f"{subject} is not there; give a verdict (RESULTS/reports/*.json) or a release file")
    if subject.suffix != ".toml":
        if request.release is not None:
            _demand_file(request.release, "the release file")
        return subject, request.release
    name, reports = load_release(subject).name, request.results / "reports"
    found: list[tuple[str, str, Path]] = []
    for path in sorted(reports.glob("*.json")):
        try:
            verdict = read_json(path, Verdict, VERDICT_FORMAT)
        except DocumentError:  # something else lies there, or it was damaged: the person means one that can be read
            continue
        if verdict.name == name:
            found.append((verdict.judged_utc, path.name, path))
    if not found:
        raise UsageError(
            f"there is no verdict of {name!r} in {reports}; make one: edgedeploy run {subject}, or name another place "
            f"with --results"
        )
    return max(found)[2], subject


class _Runs:
    """Runs by the names that a verdict gives them, wherever the results were moved since."""

    def __init__(self, verdict_file: Path, results: Path) -> None:
        self._folders = (verdict_file.absolute().parent.parent, results)
        self._verdict_file = verdict_file

    def find(self, name: str) -> tuple[Path, Run]:
        """Return a run and its file.

        Raises:
            DocumentError: it is gone, or was edited.
        """
        for path in self._candidates(name):
            if path.is_file():
                return path, load_run(path)
        raise DocumentError(
            f"{self._verdict_file} rests on the run {name}, which is not there; give the folder that holds it with "
            f"--results"
        )

    def _candidates(self, name: str) -> Iterator[Path]:
        yield Path(name)
        for folder in self._folders:
            yield from (path for path in Results(folder).run_files() if path.name == Path(name).name)


def _run_member(file: Path) -> str:
    name = file.name if not check.name_problem(f"{RUNS}/{file.name}") else f"{sha256_file(file)[:16]}.json"
    return f"{RUNS}/{name}"


def _note_other_runner(contents: Contents) -> None:
    ours = sha256_file(RUNNER)
    if any(measured.run.runner_sha256 != ours for measured in contents.measured):
        contents.absent.append(
            "no copy of the runner that measured: edgedeploy was changed since, and the runner in here is its own now"
        )


# ---------------------------------------------------------------- artifacts


def _add_cell(contents: Contents, cell: CellVerdict, file: Path, run: Run, decision: Decision | None) -> None:
    """Add an artifact with everything that belongs to it; without a decision, it is the baseline."""
    built = _built(cell.cell if decision else cell.baseline_cell, run)
    artifact = built.artifact
    folder = _folder(contents, built)
    manifest = contents.add(f"{folder}/{MANIFEST}", built.folder / MANIFEST)
    binary = contents.add(f"{folder}/{artifact.file}", built.file)
    golden_members = ("", "")
    if artifact.golden is not None:
        golden_members = (
            contents.add(f"{folder}/{golden.INPUTS}", built.folder / golden.INPUTS),
            contents.add(f"{folder}/{golden.OUTPUTS}", built.folder / golden.OUTPUTS),
        )
    for name in (QUANTIZATION, LAYERS, TIMING_CACHE):
        if (built.folder / name).is_file():
            contents.add(f"{folder}/{name}", built.folder / name)
    backend = artifact.recipe.backend
    bundled = BundledCell(
        cell=cell.cell if decision else cell.baseline_cell,
        role="candidate" if decision else "baseline",
        baseline_cell=cell.baseline_cell if decision else "",
        decision=decision,
        model=artifact.recipe.model,
        target=artifact.recipe.target,
        precision=artifact.recipe.precision,
        device=run.device,
        requires=_requires(artifact, run),
        artifact=binary,
        manifest=manifest,
        sha256=artifact.sha256,
        golden_inputs=golden_members[0],
        golden_outputs=golden_members[1],
        session=contents.add(f"sessions/{backend}.py", session_file(backend)),
        run=contents.add(_run_member(file), file),
        inputs=artifact.inputs,
        outputs=artifact.outputs,
        summary=_summary(cell, run) if decision else "",
    )
    contents.measured.append(Measured(bundled, artifact, run))


def _built(cell: str, run: Run) -> Built:
    """Return the artifact that a run measured, from the cache."""
    wanted = run.artifact
    if (built := artifact_in_cache(wanted.key, wanted.sha256)) is not None:
        return built
    for manifest in sorted((cache_dir() / "artifacts").glob(f"*/{MANIFEST}")):
        try:
            if read_json(manifest, Artifact, ARTIFACT_FORMAT).sha256 == wanted.sha256:
                return load_artifact(manifest.parent)
        except DocumentError:  # a damaged entry is built anew by whoever needs it
            continue
    raise UsageError(
        f"the artifact that cell {cell} was measured with ({wanted.name}, sha256 {wanted.sha256[:16]}) is not in the "
        f"cache {cache_dir()} any more; build and measure it again (edgedeploy run), or set EDGEDEPLOY_CACHE_DIR to "
        f"where it was built"
    )


def _folder(contents: Contents, built: Built) -> str:
    """Return a folder of its own for an artifact: one file may be opened with several options."""
    folder = f"artifacts/{built.artifact.sha256[:16]}"
    known = contents.members.get(f"{folder}/{MANIFEST}")
    if known is None or _content(known) == (built.folder / MANIFEST).read_bytes():
        return folder
    return f"{folder}-{built.artifact.key[:8]}"


def _requires(artifact: Artifact, run: Run) -> DeviceDemand:
    recipe = artifact.recipe
    name, _, version = run.runtime.rpartition(" ")
    fingerprint = artifact.engine.fingerprint if artifact.engine else None
    runtime = RuntimeDemand(
        name=name or run.runtime,
        measured=version if name else "",
        versions=_versions(version, is_tied=fingerprint is not None),
    )
    try:
        target = load_target(recipe.target, machine=run.facts.machine, isa=run.facts.isa)
    except UsageError:  # a target of the maker's own, which is not here: what was measured on is what is known
        return DeviceDemand(machine=run.facts.machine, backend=recipe.backend, runtime=runtime, fingerprint=fingerprint)
    return DeviceDemand(
        machine=target.machine or run.facts.machine,
        isa=target.isa,
        any_isa=target.any_isa,
        backend=recipe.backend,
        runtime=runtime,
        fingerprint=fingerprint,
    )


def _versions(measured: str, *, is_tied: bool) -> str:
    """Return the versions that a measurement is taken to hold for: this one and later ones of the same first number.

    >>> _versions("1.23.2", is_tied=False), _versions("10.3.0", is_tied=True), _versions("nightly", is_tied=False)
    ('>=1.23.2,<2', '==10.3.0', '')
    """
    number = re.match(r"\d+(?:\.\d+)*", measured)
    if number is None:
        return ""
    return f"=={number[0]}" if is_tied else f">={number[0]},<{int(number[0].partition('.')[0]) + 1}"


def _summary(cell: CellVerdict, run: Run) -> str:
    """Return the finding that decided, or else that on latency, in words."""
    finding = _first_of_interest(cell)
    if finding is None:
        return "nothing was judged"
    text = finding_text(finding, run.outputs.metric if run.outputs else "")
    return f"{text.metric} {text.change_with_interval}, margin {text.margin}: {text.decision}"


def _first_of_interest(cell: CellVerdict) -> Finding | None:
    judged = [finding for finding in cell.findings if finding.margin is not None]
    against = [finding for finding in judged if finding.decision == cell.decision != "PASS"]
    latency = [finding for finding in judged if finding.metric == "latency_p50"]
    return next(iter([*against, *latency, *judged, *cell.findings]), None)


# ---------------------------------------------------------------- papers


def _add_papers(contents: Contents, request: PackRequest, release_file: Path | None) -> None:
    """Add model card and licence, named or found beside the release file; a bundle without them says so."""
    papers: tuple[tuple[str, str, str, Path | None, tuple[str, ...]], ...] = (
        (CARD, "model card", "--card", request.card, _CARD_NAMES),
        (LICENSE, "licence", "--license", request.license, _LICENSE_NAMES),
    )
    for member, what, option, given, names in papers:
        if given is not None:
            _demand_file(given, f"the {what}")
        beside = [release_file.parent / name for name in names] if release_file is not None else []
        file = given or next((path for path in beside if path.is_file()), None)
        if file is not None:
            contents.add(member, file)
        else:
            contents.absent.append(f"no {what}: none lies beside the release file, and none was named ({option})")


def _demand_file(path: Path, what: str) -> None:
    if not path.is_file():
        raise UsageError(f"{what} {path} is not there")


def _content(source: Source) -> bytes:
    return source if isinstance(source, bytes) else source.read_bytes()


def digests_of(members: Mapping[str, Source]) -> dict[str, tuple[str, int]]:
    """Return digest and size of each member."""
    found: dict[str, tuple[str, int]] = {}
    for name, source in sorted(members.items()):
        if isinstance(source, bytes):
            found[name] = (sha256_bytes(source), len(source))
        else:
            found[name] = (sha256_file(source), source.stat().st_size)
    return found
