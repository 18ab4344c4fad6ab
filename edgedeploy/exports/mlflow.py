"""Sends verdicts and runs to MLflow: one MLflow run for each measured artifact, below one for its gate."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import logging
import math
import os
import re
import shutil
import subprocess
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from edgedeploy.documents import read_json
from edgedeploy.errors import BackendMissing, DocumentError, EdgedeployError, ToolchainError, UsageError
from edgedeploy.records.artifact import Artifact
from edgedeploy.records.run import FORMAT as RUN_FORMAT
from edgedeploy.records.run import Run
from edgedeploy.records.verdict import FORMAT as VERDICT_FORMAT
from edgedeploy.records.verdict import CellVerdict, Verdict
from edgedeploy.render.figures import count, drop_reason, one_line, quantile, run_figures, visit_samples_s
from edgedeploy.results import Results, load_run
from edgedeploy.storage import sha256_file

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

Progress = Callable[[str], None]
# Returns the folder of a compiled artifact and its manifest, by the artifact's key; None where it is not kept here.
FindArtifact = Callable[[str], tuple[Path, Artifact] | None]

DEFAULT_EXPERIMENT = "edgedeploy"
DIGEST_TAG = "edgedeploy.digest"
_PARENT_TAG = "mlflow.parentRunId"
# What MLflow takes in one request: 1,000 metrics, 100 parameters.
_METRICS_AT_ONCE, _PARAMETERS_AT_ONCE = 500, 90
# MLflow's own choice, seven tries with growing pauses, are minutes in which a person sees nothing. What is sent
# where is nobody else's business.
_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # It would write addresses to stdout, where our answer goes.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# What MLflow takes, at least since 2.0: of a key, of a parameter's value, of a tag's.
_KEY_CHARACTERS, _PARAMETER_CHARACTERS, _TAG_CHARACTERS = 250, 500, 5000
_NO_KEY_CHARACTER = re.compile(r"[^A-Za-z0-9_./ -]")
_UTC = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)")
_HEAD_BYTES = 4096


@dataclass(frozen=True, slots=True)
class Measurement:
    """One number as MLflow keeps it."""

    key: str
    value: float
    time_ms: int
    step: int = 0


@dataclass(frozen=True, slots=True)
class Attachment:
    """A file that goes with an MLflow run, into a folder of its own there; "" for the top."""

    path: str
    folder: str = ""


@dataclass(frozen=True, slots=True)
class Entry:
    """One MLflow run to be.

    Attributes:
        digest: of the file that it is made of: what is there under the same digest is not sent again.
        parent: digest of the gate that it belongs to; "" for none.
    """

    digest: str
    name: str
    parent: str
    start_ms: int
    end_ms: int
    tags: dict[str, str]
    parameters: dict[str, str]
    metrics: tuple[Measurement, ...]
    files: tuple[Attachment, ...]


@dataclass(frozen=True, slots=True)
class Exported:
    """What became of one run.

    Attributes:
        url: its page, where the store is a server.
    """

    name: str
    digest: str
    run_id: str
    state: Literal["exported", "already there"]
    url: str = ""


def export(
    references: Sequence[str],
    *,
    results: Path,
    tracking_uri: str,
    experiment: str = DEFAULT_EXPERIMENT,
    find_artifact: FindArtifact | None = None,
    progress: Progress = lambda text: None,
) -> list[Exported]:
    """Send verdicts and runs to an MLflow tracking store; what is there already is not sent again.

    Args:
        references: files of verdicts and runs, or their names in the results folder.
        results: the results folder.
        tracking_uri: of a server (https://...) or a database (sqlite:///mlflow.db, relative to the working directory).
        experiment: is made where it does not exist.
        find_artifact: given, compiled artifacts are sent too, and what is missing is said.
        progress: told what happens.

    Raises:
        UsageError: a reference fits nothing; DocumentError: a file is not what it should be.
        BackendMissing: MLflow's client is not installed here.
        ToolchainError: the store did not take the export; what arrived stays, and is not sent again.
    """
    planned = entries(references, Results(results), find_artifact, progress)
    client = _client(tracking_uri)
    progress(f"sending {count(len(planned), 'run')} to {shown_uri(tracking_uri)}, experiment {experiment!r}")
    with _sentences(tracking_uri):
        experiment_id = _experiment(client, experiment, _artifact_location(tracking_uri, experiment))
        exported: dict[str, Exported] = {}
        for entry in planned:
            parent = exported.get(entry.parent)
            run_id, state = _sent(client, experiment_id, entry, parent.run_id if parent else "")
            url = _page(tracking_uri, experiment_id, run_id)
            exported[entry.digest] = Exported(entry.name, entry.digest, run_id, state, url)
    return list(exported.values())


# ---------------------------------------------------------------- what is sent


def entries(
    references: Sequence[str],
    results: Results,
    find_artifact: FindArtifact | None = None,
    progress: Progress = lambda text: None,
) -> list[Entry]:
    """Return what would be sent for verdicts and runs: a gate before its runs, and nothing twice."""
    found: dict[str, Entry] = {}
    for reference in references:
        path = _file(reference, results)
        kind = _kind(path)
        if kind == VERDICT_FORMAT.partition("/")[0]:
            new = _of_verdict(path, results, find_artifact, progress)
        elif kind == RUN_FORMAT.partition("/")[0]:
            new = [_of_run(path, load_run(path), None, "", find_artifact, progress)]
        else:
            raise DocumentError(f"{path} is neither a verdict nor a run, but {kind or 'no document of edgedeploy'}")
        for entry in new:
            # A run that is named alone and belongs to a gate that is named too stands below the gate.
            if entry.digest not in found or (entry.parent and not found[entry.digest].parent):
                found.pop(entry.digest, None)
                found[entry.digest] = entry
    return list(found.values())


def _file(reference: str, results: Results) -> Path:
    """Return the file of a verdict or a run, by path or by name."""
    path = Path(reference)
    if path.is_file():
        return path
    kept = results.root / "reports" / f"{path.name.removesuffix('.json')}.json"
    return kept if kept.is_file() else results.find_run(reference)


def _kind(path: Path) -> str:
    """Return "edgedeploy.verdict" of a file that starts so; the file is read whole only by who knows what it is."""
    with path.open("rb") as stream:
        head = stream.read(_HEAD_BYTES).decode("utf-8", "replace")
    match = re.search(r'"format"\s*:\s*"(edgedeploy\.[a-z_]+)/\d+"', head)
    return match[1] if match else ""


def _of_verdict(path: Path, results: Results, find_artifact: FindArtifact | None, progress: Progress) -> list[Entry]:
    verdict = read_json(path, Verdict, VERDICT_FORMAT)
    digest = sha256_file(path)
    judged_ms = _milliseconds(verdict.judged_utc, path)
    commit = commit_at(path.parent, verdict.judged_utc)
    runs = _runs_of(path, verdict, results, progress)
    children = [
        _of_run(file, run, cell, digest, find_artifact, progress, commit=commit)
        for cell in verdict.cells
        for name in (cell.baseline_run, cell.candidate_run)
        if (known := runs.get(name)) is not None
        for file, run in [known]
    ]
    report = path.with_suffix(".html")
    parent = Entry(
        digest=digest,
        name=verdict.name,
        parent="",
        start_ms=min((one.start_ms for one in children), default=judged_ms),
        end_ms=judged_ms,
        tags=_tags(
            {
                "edgedeploy.kind": "gate",
                "edgedeploy.decision": verdict.decision,
                "edgedeploy.judged_utc": verdict.judged_utc,
                **{f"edgedeploy.cell.{cell.cell}": cell.decision for cell in verdict.cells},
                "mlflow.source.name": "edgedeploy",
                "mlflow.source.git.commit": commit,
                "mlflow.note.content": _note(verdict),
            }
        ),
        parameters=_parameters(
            {
                "name": verdict.name,
                "cells": len(verdict.cells),
                **{f"margin.{metric}": margin.text for metric, margin in verdict.policy.margins.items()},
                "error_rate": verdict.policy.error_rate,
                "min_blocks": verdict.policy.min_blocks,
                "max_blocks": verdict.policy.max_blocks,
            }
        ),
        metrics=_metrics(
            {f"{cell.cell}/{key}": value for cell in verdict.cells for key, value in _effects(cell).items()}, judged_ms
        ),
        files=(Attachment(str(path.absolute())), *([Attachment(str(report.absolute()))] if report.is_file() else [])),
    )
    return [parent, *children]


def _runs_of(path: Path, verdict: Verdict, results: Results, progress: Progress) -> dict[str, tuple[Path, Run]]:
    """Return the runs that a verdict names, by that name, where they are at hand.

    A verdict may come from elsewhere: its names choose among the files of a results folder, and are no paths.
    """
    roots = dict.fromkeys([*([path.parent.parent] if path.parent.name == "reports" else []), results.root])
    at_hand = {_place(file): file for root in reversed(roots) for file in Results(root).run_files()}
    runs = {}
    for cell in verdict.cells:
        for name in (cell.baseline_run, cell.candidate_run):
            file = at_hand.get(_place(Path(name)))
            if file is not None:
                runs[name] = (file, load_run(file))
            elif name:
                progress(f"{cell.cell}: the run {one_line(name)} is not at hand, so it is left out")
    return runs


def _place(file: Path) -> tuple[str, ...]:
    """Return what names a run within a results folder: target, model, file."""
    return file.parts[-3:]


def _of_run(
    path: Path,
    run: Run,
    cell: CellVerdict | None,
    parent: str,
    find_artifact: FindArtifact | None,
    progress: Progress,
    *,
    commit: str | None = None,
) -> Entry:
    start_ms = _milliseconds(run.started_utc, path)
    # A run from elsewhere names its artifact: only a digest may choose a folder of the cache.
    has_key = re.fullmatch("[0-9a-f]{64}", run.artifact.key) is not None
    kept = find_artifact(run.artifact.key) if find_artifact is not None and has_key else None
    if find_artifact is not None and kept is None:
        progress(f"{run.cell}: its artifact is not in the cache any more, so the compiled file is left out")
    is_candidate = cell is not None and run.side == "candidate"
    length_s = max((_since_start_s(run, number) for number in range(len(run.visits))), default=0.0)
    return Entry(
        digest=sha256_file(path),
        name=run.cell if run.side == "single" else f"{run.cell} ({run.side})",
        parent=parent,
        start_ms=start_ms,
        end_ms=start_ms + round(1000 * length_s),
        tags=_tags(
            {
                "edgedeploy.kind": "run",
                "edgedeploy.side": run.side,
                "edgedeploy.session": run.session,
                "edgedeploy.artifact_sha256": run.artifact.sha256,
                "edgedeploy.recipe_sha256": run.artifact.key,
                "edgedeploy.runner_sha256": run.runner_sha256,
                "edgedeploy.decision": cell.decision if cell is not None and is_candidate else "",
                "edgedeploy.gate_sha256": parent,
                "mlflow.source.name": "edgedeploy",
                "mlflow.source.git.commit": commit_at(path.parent, run.started_utc) if commit is None else commit,
            }
        ),
        parameters=_parameters({**_run_facts(run), **(_recipe_facts(kept[1]) if kept else {})}),
        metrics=(
            *_metrics(_run_numbers(run), start_ms),
            *_metrics(_effects(cell) if cell is not None and is_candidate else {}, start_ms),
            *_visit_series(run, start_ms),
        ),
        files=(Attachment(str(path.absolute())), *(_artifact_files(*kept) if kept else ())),
    )


def _run_facts(run: Run) -> dict[str, object]:
    artifact, facts = run.artifact, run.facts
    evaluation = run.outputs
    return {
        "cell": run.cell,
        "model": artifact.model,
        "target": artifact.target,
        "backend": artifact.backend,
        "precision": artifact.precision,
        **{f"option.{key}": value for key, value in sorted(artifact.options.items())},
        "device": run.device,
        "machine": facts.machine,
        "cpu_model": facts.cpu_model,
        "kernel": facts.kernel,
        "system": facts.os_name,
        "runtime": run.runtime,
        "edgedeploy": run.edgedeploy,
        "threads": run.boundary.threads if run.boundary else None,
        "batch": run.boundary.batch if run.boundary else None,
        "schedule": run.schedule,
        "evaluation": evaluation.dataset if evaluation else None,
        "evaluation_samples": evaluation.samples if evaluation else None,
        "evaluation_metric": evaluation.metric if evaluation else None,
    }


def _recipe_facts(artifact: Artifact) -> dict[str, object]:
    recipe = artifact.recipe
    return {
        "recipe.model_sha256": recipe.model_sha256,
        "recipe.weights_sha256": recipe.weights_sha256,
        "recipe.calibration": recipe.calibration,
        "recipe.calibration_sha256": recipe.calibration_sha256,
        "recipe.target_sha256": recipe.target_sha256,
        **{f"toolchain.{name}": version for name, version in sorted(recipe.toolchain.items())},
    }


def _run_numbers(run: Run) -> dict[str, float | None]:
    """Return a run's figures under the names that they have here; accuracy is in the name of its metric."""
    numbers: dict[str, float | None] = dict(dataclasses.asdict(run_figures(run)))
    if run.outputs is not None:
        numbers["mae" if run.outputs.metric == "mae" else "accuracy"] = run.outputs.value
    return numbers


def _effects(cell: CellVerdict) -> dict[str, float | None]:
    """Return what each metric of a cell changed by, positive is worse, with its interval."""
    return {
        f"{finding.metric}{part}": value
        for finding in cell.findings
        for part, value in (("_change", finding.effect), ("_change_low", finding.low), ("_change_high", finding.high))
    }


def _visit_series(run: Run, start_ms: int) -> list[Measurement]:
    """Return the median and the hottest sensor of each visit that counts, a step each."""
    series = []
    for number, visit in enumerate(run.visits):
        if drop_reason(visit):
            continue
        time_ms = start_ms + round(1000 * _since_start_s(run, number))
        p50_s = quantile(sorted(visit_samples_s(visit)), 0.5)
        hottest = max((visit.after.temperatures_celsius or {}).values(), default=None)
        for key, value in (("visit_p50_s", p50_s), ("visit_hottest_celsius", hottest)):
            if value is not None and math.isfinite(value):
                series.append(Measurement(key, value, time_ms, number))
    return series


def _since_start_s(run: Run, number: int) -> float:
    """Return how long after the first visit's start a visit ended; a clock that was set back meanwhile adds nothing."""
    return max(run.visits[number].after.monotonic_s - run.visits[0].before.monotonic_s, 0.0)


def _artifact_files(folder: Path, artifact: Artifact) -> tuple[Attachment, ...]:
    names = (artifact.file, "manifest.json")
    return tuple(Attachment(str((folder / name).absolute()), "artifact") for name in names)


def _metrics(numbers: Mapping[str, float | None], time_ms: int) -> tuple[Measurement, ...]:
    """Return what is a finite number; MLflow's stores differ in what they make of others."""
    return tuple(
        Measurement(_key(name), float(value), time_ms)
        for name, value in numbers.items()
        if value is not None and math.isfinite(value)
    )


def _parameters(facts: Mapping[str, object]) -> dict[str, str]:
    return {_key(name): _cut(str(value), _PARAMETER_CHARACTERS) for name, value in facts.items() if _says(value)}


def _tags(texts: Mapping[str, str]) -> dict[str, str]:
    return {_key(name): _cut(text, _TAG_CHARACTERS) for name, text in texts.items() if text}


def _says(value: object) -> bool:
    return value is not None and value != ""


def _key(name: str) -> str:
    """Return a name that MLflow takes as a key.

    >>> _key("demo:int8 (pi)/latency_p50_change")
    'demo_int8 _pi_/latency_p50_change'
    """
    return _NO_KEY_CHARACTER.sub("_", name)[-_KEY_CHARACTERS:]


def _cut(text: str, characters: int) -> str:
    line = one_line(text)
    return line if len(line) <= characters else line[: characters - 1] + "…"


def _note(verdict: Verdict) -> str:
    """Return the gate in words, a line a cell, as MLflow's page shows it."""
    lines = [f"{cell.cell} against {cell.baseline_cell} on {cell.device}: {cell.decision}" for cell in verdict.cells]
    return "; ".join(lines)


def _milliseconds(utc: str, path: Path) -> int:
    try:
        moment = datetime.fromisoformat(utc)
    except ValueError as error:
        raise DocumentError(
            f"{path} holds {one_line(utc)!r} where a time such as 2026-11-22T06:30:00Z is meant"
        ) from error
    return round(1000 * moment.replace(tzinfo=moment.tzinfo or UTC).timestamp())


def commit_at(folder: Path, utc: str) -> str:
    """Return the newest commit of a folder's checked-out branch at a time; "" where there is none, or no git."""
    git = shutil.which("git")
    if git is None or not _UTC.fullmatch(utc):
        return ""
    done = subprocess.run(
        [git, "-C", str(folder), "rev-list", "-1", f"--before={utc}", "HEAD"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=30,
        check=False,
    )
    found = done.stdout.strip()
    return found if done.returncode == 0 and re.fullmatch("[0-9a-f]{40,64}", found) else ""


# ---------------------------------------------------------------- how it is sent


def shown_uri(uri: str) -> str:
    """Return an address without its password.

    >>> shown_uri("https://ci:secret@mlflow.example:5000/x"), shown_uri("sqlite:///mlflow.db")
    ('https://ci@mlflow.example:5000/x', 'sqlite:///mlflow.db')
    """
    parts = urllib.parse.urlsplit(uri)
    if parts.password is None:
        return uri
    place = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit(parts._replace(netloc=f"{parts.username or ''}@{place}"))


def demand_uri(uri: str) -> str:
    """Return the address of a tracking store.

    Raises:
        UsageError: there is none, or a folder is meant, which MLflow keeps no runs in any more.
    """
    if not uri:
        raise UsageError(
            "say where MLflow keeps its runs: --tracking-uri https://HOST:PORT of a server, or sqlite:///mlflow.db "
            "for a file here (or set MLFLOW_TRACKING_URI)"
        )
    scheme = urllib.parse.urlsplit(uri).scheme
    if scheme in ("", "file") and os.environ.get("MLFLOW_ALLOW_FILE_STORE", "").lower() not in ("1", "true"):
        raise UsageError(
            f"{uri} is a folder, and MLflow keeps runs in folders no longer (since 3.13); use a database, such as "
            f"sqlite:///mlflow.db, or set MLFLOW_ALLOW_FILE_STORE=true to let it"
        )
    return uri


def _artifact_location(uri: str, experiment: str) -> str:
    """Return where the files of a new experiment go: beside the database file, whatever the working directory is."""
    if not uri.startswith("sqlite:///"):
        return ""
    database = Path(uri.removeprefix("sqlite:///").partition("?")[0])
    return (database.absolute().parent / "mlruns" / urllib.parse.quote(experiment, safe="")).as_uri()


def _client(uri: str) -> MlflowClient:
    """Return MLflow's client of a store.

    Raises:
        BackendMissing: it is not installed here.
    """
    needed = (
        ["mlflow"] if urllib.parse.urlsplit(uri).scheme in ("http", "https") else ["mlflow", "sqlalchemy", "alembic"]
    )
    for package in needed:
        if importlib.util.find_spec(package) is None:
            raise BackendMissing(f"{package} is not installed here; pip install 'edgedeploy[mlflow]'")
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow.tracking import MlflowClient

    for name in ("mlflow", "alembic", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with _sentences(uri):
        return MlflowClient(tracking_uri=uri)


@contextlib.contextmanager
def _sentences(uri: str) -> Iterator[None]:
    """Make a sentence of whatever a store fails with: servers, databases and proxies each have errors of their own."""
    try:
        yield
    except EdgedeployError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a store, a server or a proxy raises
        raise ToolchainError(_refusal(uri, f"{type(error).__name__}: {error}")) from None


def _experiment(client: MlflowClient, name: str, artifact_location: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        return str(client.create_experiment(name, artifact_location=artifact_location or None))
    if found.lifecycle_stage != "active":
        raise UsageError(f"the experiment {name!r} was deleted there; restore it, or name another with --experiment")
    return str(found.experiment_id)


def _sent(
    client: MlflowClient, experiment: str, entry: Entry, parent_id: str
) -> tuple[str, Literal["exported", "already there"]]:
    """Write one run unless it is there, and return its id."""
    for found in client.search_runs([experiment], f"tags.`{DIGEST_TAG}` = '{entry.digest}'", max_results=100):
        run_id = str(found.info.run_id)
        if found.info.status != "FINISHED":  # left by an export that was cut off
            client.delete_run(run_id)
            continue
        if parent_id and _PARENT_TAG not in found.data.tags:
            client.set_tag(run_id, _PARENT_TAG, parent_id)
        return run_id, "already there"
    tags = {**entry.tags, DIGEST_TAG: entry.digest, **({_PARENT_TAG: parent_id} if parent_id else {})}
    made = client.create_run(experiment, start_time=entry.start_ms, tags=tags, run_name=entry.name)
    run_id = str(made.info.run_id)
    try:
        _fill(client, run_id, entry)
    except BaseException:
        with contextlib.suppress(Exception):  # a server that is gone; the next export knows a run that never finished
            client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED", end_time=entry.end_ms)
    return run_id, "exported"


def _fill(client: MlflowClient, run_id: str, entry: Entry) -> None:
    from mlflow.entities import Metric, Param

    parameters = [Param(key, value) for key, value in entry.parameters.items()]
    for start in range(0, len(parameters), _PARAMETERS_AT_ONCE):
        client.log_batch(run_id, params=parameters[start : start + _PARAMETERS_AT_ONCE])
    metrics = [Metric(one.key, one.value, one.time_ms, one.step) for one in entry.metrics]
    for start in range(0, len(metrics), _METRICS_AT_ONCE):
        client.log_batch(run_id, metrics=metrics[start : start + _METRICS_AT_ONCE])
    for file in entry.files:
        client.log_artifact(run_id, file.path, file.folder or None)


def _refusal(uri: str, said: str) -> str:
    text = one_line(said).replace(uri, shown_uri(uri))
    secret = urllib.parse.urlsplit(uri).password
    if secret:
        text = text.replace(secret, "…").replace(urllib.parse.unquote(secret), "…")
    short = text if len(text) <= 400 else text[:399] + "…"
    return (
        f"MLflow at {shown_uri(uri)} did not take the export: {short}; is it up, and is the address right? What "
        f"arrived stays there, and the same command sends only the rest"
    )


def _page(uri: str, experiment_id: str, run_id: str) -> str:
    """Return the address of a run's page, without credentials; "" where the store is no server."""
    parts = urllib.parse.urlsplit(uri)
    if parts.scheme not in ("http", "https"):
        return ""
    base = urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment=""))
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
