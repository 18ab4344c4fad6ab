"""An outcome: a verdict with the runs and artifacts that it rests on; measured, judged, written down and read again."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edgedeploy.arguments import read_release, web_address
from edgedeploy.build import Progress, artifact_in_cache, silent
from edgedeploy.dispatch import Occupied
from edgedeploy.documents import encode_json, line_number, read_json, write_json
from edgedeploy.errors import DeviceError, UsageError
from edgedeploy.measure import MeasurementInterrupted, MeasureRequest, measure
from edgedeploy.records.artifact import Artifact
from edgedeploy.records.run import Run
from edgedeploy.records.verdict import FORMAT as VERDICT_FORMAT
from edgedeploy.records.verdict import CellVerdict, Policy, Verdict
from edgedeploy.results import Results, load_run, utc_now
from edgedeploy.storage import atomic_path, cache_dir, sha256_bytes, write_atomic

# What a verb takes for a file or a folder; a relative one starts at the working directory.
AnyPath = str | Path


def optional_path(given: AnyPath | None) -> Path | None:
    """Return what was given as a path."""
    return None if given is None else Path(given)


@dataclass(frozen=True, slots=True)
class StoredRun:
    """A run and the file that keeps it."""

    file: str
    run: Run


Pair = tuple[StoredRun, StoredRun]


@dataclass(frozen=True, slots=True)
class Outcome:
    """A verdict with what it rests on.

    Attributes:
        runs: file of a run (as the verdict names it) → the run.
        artifacts: cell → artifact.
        problems: the cells that could not be built or measured; the verdict has them as INCONCLUSIVE.
        files: label → where something was written.
        other_runtimes: back ends of the candidates' targets that no cell was made for.
        journal: name of the run, to go on with it; results: where its runs are.
        occupied: when which device was at work.
        release: the release file that it is of; None: of none, or that is not known.
    """

    verdict: Verdict
    runs: Mapping[str, Run]
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    problems: tuple[CellVerdict, ...] = ()
    files: dict[str, Path] = field(default_factory=dict)
    other_runtimes: tuple[str, ...] = ()
    journal: str = ""
    results: Path | None = None
    occupied: tuple[Occupied, ...] = ()
    release: Path | None = None


def measure_and_store(
    request: MeasureRequest, decided: Callable[[tuple[Run, ...]], bool], store: Results, progress: Progress
) -> list[StoredRun]:
    """Measure and store; an interrupted session is stored too, and its files are named in the error."""
    try:
        runs = measure(request, decided, progress)
    except MeasurementInterrupted as error:
        kept = [str(store.save_run(run)) for run in error.runs]
        raise DeviceError(f"{error}; what was measured until then is kept in {', '.join(kept)}") from error
    return [StoredRun(str(store.save_run(run)), run) for run in runs]


def judge_pairs(
    name: str,
    pairs: Sequence[Pair],
    policy: Policy,
    artifacts: Mapping[str, Artifact],
    notes: tuple[str, ...] = (),
    noises: Mapping[str, float] | None = None,
) -> Outcome:
    """Judge every pair within one error rate, and name in the verdict the files that it rests on."""
    from edgedeploy.judge.contenders import contenders
    from edgedeploy.judge.gate import judge_gate

    sides = [(old.run, new.run) for old, new in pairs]
    verdict = judge_gate(name, sides, policy, judged_utc=utc_now(), noises=noises)
    cells = tuple(
        msgspec.structs.replace(
            cell,
            baseline_run=old.file,
            candidate_run=new.file,
            notes=(*notes, *lost_compression(cell, artifacts), *cell.notes),
        )
        for cell, (old, new) in zip(verdict.cells, pairs, strict=True)
    )
    runs = {stored.file: stored.run for pair in pairs for stored in pair}
    verdict = msgspec.structs.replace(verdict, cells=cells, contenders=contenders(cells, runs))
    return Outcome(verdict, runs, artifacts)


def lost_compression(cell: CellVerdict, artifacts: Mapping[str, Artifact]) -> list[str]:
    """Say which compression a cell's artifacts have lost: a verdict on them should not be read without it."""
    return [
        f"{name} has lost its compression ({one.kind}): {one.artifact_reason}"
        for name in (cell.baseline_cell, cell.cell)
        if (artifact := artifacts.get(name)) is not None
        for one in artifact.compression.statements
        if one.artifact == "lost"
    ]


def report_path(outcome: Outcome, results: AnyPath) -> Path:
    """Return where results keep a verdict's HTML report, and the verdict beside it: no other verdict has this name."""
    time = re.sub(r"[^0-9TZ]", "", outcome.verdict.judged_utc)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", outcome.verdict.name)[:100]
    return Path(results) / "reports" / f"{time}-{name}-{sha256_bytes(encode_json(outcome.verdict))[:8]}.html"


def write_reports(
    outcome: Outcome,
    *,
    junit: AnyPath | None = None,
    markdown: AnyPath | None = None,
    html: AnyPath | None = None,
    sarif: AnyPath | None = None,
    csv: AnyPath | None = None,
    report_url: str = "",
    is_stored: bool = False,
    kept_in: AnyPath | None = None,
) -> None:
    """Write the verdict in the forms that were asked for, by text or Path, and note in `outcome.files` where.

    Args:
        outcome: the verdict and its runs.
        junit, markdown, html, sarif, csv: where to; beside `html` the verdict itself is written, as JSON.
        report_url: where the HTML report will be found; the Markdown links there.
        is_stored: the verdict is written down already, and not written again.
        kept_in: results that keep the report and the verdict too, where `history`, `serve` and `bundle` look for them.

    Raises:
        UsageError: two forms would be one file, or the address is none of the web.
    """
    from edgedeploy.prepare.evaluated import EvaluatedSamples
    from edgedeploy.render.html import report_html
    from edgedeploy.render.junit import verdict_junit
    from edgedeploy.render.markdown import verdict_markdown
    from edgedeploy.render.samples_csv import samples_csv
    from edgedeploy.render.sarif import verdict_sarif

    report_url = web_address(report_url)
    html, verdict, runs = optional_path(html), outcome.verdict, outcome.runs

    @functools.cache
    def page() -> str:
        return report_html(verdict, runs, outcome.artifacts, sample_of=EvaluatedSamples(cache_dir() / "inputs"))

    forms: dict[str, tuple[Path | None, Callable[[], str | Iterable[str]]]] = {
        "JUnit": (optional_path(junit), lambda: verdict_junit(verdict)),
        "Markdown": (
            optional_path(markdown),
            lambda: verdict_markdown(verdict, runs, outcome.artifacts, report_url=report_url),
        ),
        "SARIF": (
            optional_path(sarif),
            lambda: verdict_sarif(
                verdict, runs, release=_from_here(outcome.release), lines=_lines_of_cells(outcome.release)
            ),
        ),
        "CSV": (optional_path(csv), lambda: samples_csv(verdict, runs)),
        "report": (html, page),
    }
    stored = html.with_suffix(".json") if html is not None and not is_stored else None
    kept = None if kept_in is None else report_path(outcome, kept_in)
    if kept is not None:  # first: a mistake in what else was asked for must not lose it
        _write_text(kept, page())
        write_json(kept.with_suffix(".json"), verdict)
    places = [path.absolute() for path in (*(path for path, _ in forms.values()), stored) if path is not None]
    if len(places) != len(set(places)):
        raise UsageError("two forms of the report would be written into one file; give each a name of its own")
    for label, (path, render) in forms.items():
        if path is not None:
            _write_text(path, render())
            outcome.files[label] = path
    if stored is not None:
        write_json(stored, verdict)
        outcome.files["verdict"] = stored
    elif kept is not None:
        outcome.files.update(report=kept, verdict=kept.with_suffix(".json"))


def _write_text(path: Path, text: str | Iterable[str]) -> None:
    """Write a text, or one that is made line by line, whole or not at all."""
    if isinstance(text, str):
        write_atomic(path, text.encode())
        return
    with atomic_path(path) as part, part.open("w", encoding="utf-8", newline="") as stream:
        stream.writelines(text)


def _from_here(path: Path | None) -> str:
    """Return a path as seen from the working directory, which in a pipeline is the repository's root."""
    if path is None:
        return ""
    whole, here = path.absolute(), Path.cwd()
    return (whole.relative_to(here) if whole.is_relative_to(here) else Path(path.name)).as_posix()


def _lines_of_cells(path: Path | None) -> dict[str, int]:
    """Return at which line of a release file each of its cells is named."""
    if path is None:
        return {}
    release, _ = read_release(path)
    return {cell.name: line_number(path, "cells", place, "name") for place, cell in enumerate(release.cells)}


def stored_outcome(
    verdict_file: AnyPath,
    *,
    results: AnyPath | None = None,
    elsewhere: AnyPath = Path("bench_results"),
    progress: Progress = silent,
) -> Outcome:
    """Return a verdict that was stored, with those of its runs and manifests that are at hand.

    A run is looked for among those of a results folder, by the name of its file: what a verdict from elsewhere says
    decides on no path here.

    Args:
        verdict_file: as `write_reports` wrote it, as text or Path, like the folders.
        results: where the runs are kept; None: in the results folder that the verdict lies in, else `elsewhere`.
        elsewhere: a results folder.
        progress: told which runs are missing.

    Raises:
        DocumentError: the verdict, or a run of it, is damaged or no such document.
    """
    verdict = read_json(Path(verdict_file), Verdict, VERDICT_FORMAT)
    around = Path(verdict_file).absolute().parent.parent
    root = Path(results) if results else around if (around / "runs").is_dir() else Path(elsewhere)
    known = {path.name: path for path in Results(root).run_files()}
    runs: dict[str, Run] = {}
    for name in dict.fromkeys(name for cell in verdict.cells for name in (cell.baseline_run, cell.candidate_run)):
        if path := known.get(Path(name).name):
            runs[name] = load_run(path)
        elif name:
            progress(f"the run {name} is not in {root}: what it says is missing from the report")
    return Outcome(verdict, runs, _kept_manifests(runs.values()))


def _kept_manifests(runs: Iterable[Run]) -> dict[str, Artifact]:
    """Return the manifests of measured artifacts that the cache still has, by their digests."""
    kept = (artifact_in_cache(run.artifact.key, run.artifact.sha256) for run in runs)
    return {built.artifact.sha256: built.artifact for built in kept if built is not None}
