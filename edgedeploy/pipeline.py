"""THE SPINE: from a model reference to a verdict; the only file that knows every room.

model ─ build: load, export, simplify, quantize, emit, compile ─▶ artifact
      ─ measure: ship, outputs, memory, interleaved visits ─▶ runs ─ judge ─▶ verdict ─ render
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from edgedeploy.arguments import (
    DEFAULT_MARGINS,
    margins_from_texts,
    model_name,
    parse_inputs,
    policy_from_pairs,
    precision_from_text,
    read_release,
)
from edgedeploy.build import BuildRequest, Built, Progress, build, canonical_model, deliver, load_artifact, this_target
from edgedeploy.documents import closest, write_json
from edgedeploy.errors import DeviceError, ModelError, ToolchainError, UsageError
from edgedeploy.lab.inventory import device as device_of
from edgedeploy.lab.inventory import lab_path, load_lab
from edgedeploy.measure import Evaluation, MeasurementInterrupted, MeasureRequest, measure
from edgedeploy.records.artifact import Artifact, OptionValue
from edgedeploy.records.model import Model, TensorSpec
from edgedeploy.records.quantization import QuantizationPolicy
from edgedeploy.records.release import CellEntry, Release, baseline_of, input_specs
from edgedeploy.records.run import Run
from edgedeploy.records.sensitivity import Sensitivity
from edgedeploy.records.target import ConditionLimits
from edgedeploy.records.verdict import CellVerdict, Policy, Verdict
from edgedeploy.results import Results, load_run, utc_now
from edgedeploy.storage import cache_dir, write_atomic


def _silent(text: str) -> None:
    """Tell nobody."""


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
    """

    verdict: Verdict
    runs: Mapping[str, Run]
    artifacts: Mapping[str, Artifact] = field(default_factory=dict)
    problems: tuple[CellVerdict, ...] = ()
    files: dict[str, Path] = field(default_factory=dict)


# ---------------------------------------------------------------- the whole spine


def run(
    release_file: Path,
    *,
    cells: Sequence[str] = (),
    rebuild: bool = False,
    trust_pickle: bool = False,
    seed: int = 0,
    lab: Path | None = None,
    results: Path = Path("bench_results"),
    progress: Progress = _silent,
) -> Outcome:
    """Build, measure and judge every candidate cell of a release file.

    A cell that cannot be built or measured does not stop the others: it is INCONCLUSIVE, with the reason, and stands in
    `Outcome.problems`.

    Raises:
        UsageError: the release file, a name or a file in it is wrong.
        EdgedeployError: the only cell could not be built or measured; what was measured is stored and named.
    """
    release, policy = read_release(release_file)
    inventory = load_lab(lab_path(lab))
    judged_cells = _judged_cells(release_file, release, cells)
    built: dict[str, Built] = {}
    pairs: list[Pair] = []
    problems: list[CellVerdict] = []
    for candidate, baseline in judged_cells:
        try:
            for cell in (baseline, candidate):
                if cell.name not in built:
                    built[cell.name] = build(_request(release_file, release, cell, rebuild, trust_pickle), progress)
            request = MeasureRequest(
                sides=((baseline.name, built[baseline.name]), (candidate.name, built[candidate.name])),
                device_name=candidate.device,
                device=device_of(inventory, candidate.device),
                limits=_limits(candidate.target),
                evaluation=_evaluation(release_file, release),
                blocks=policy.max_blocks,
                seed=seed,
            )
            pairs.append(_measured_pair(request, policy, len(judged_cells), Results(results), progress))
        except (ModelError, ToolchainError, DeviceError) as error:
            if len(judged_cells) == 1:
                raise
            progress(f"{candidate.name}: {error}")
            problems.append(_unjudged(candidate, baseline, error))
    artifacts = {name: one.artifact for name, one in built.items()}
    outcome = _judged(release.name, pairs, policy, artifacts, _leakage_notes(release_file, release, artifacts))
    return _with_problems(outcome, problems)


def plan(release_file: Path, *, cells: Sequence[str] = ()) -> list[str]:
    """Return in words what `run` would do, without doing it."""
    release, policy = read_release(release_file)
    steps = []
    for candidate, baseline in _judged_cells(release_file, release, cells):
        for cell in (baseline, candidate):
            step = f"build {cell.name}: {cell.model} for {cell.target} with {cell.backend} {cell.precision}"
            steps += [] if step in steps else [step]
        steps.append(
            f"measure {baseline.name} and {candidate.name} interleaved on {candidate.device}, at most "
            f"{policy.max_blocks} blocks"
        )
        margins = ", ".join(f"{metric} {margin.text}" for metric, margin in policy.margins.items())
        steps.append(f"judge {candidate.name} against {baseline.name}: {margins or 'no margins, nothing is judged'}")
    return steps


# ---------------------------------------------------------------- one step each


def compile(
    source: str,
    *,
    weights: Path | None = None,
    inputs: Sequence[str | TensorSpec] = (),
    target: str = "host",
    backend: str = "onnxruntime",
    precision: str = "fp32",
    calibration: Path | None = None,
    options: Mapping[str, OptionValue] | None = None,
    quantization: Sequence[str] | QuantizationPolicy = (),
    allow_loss: bool = False,
    output: Path | None = None,
    name: str | None = None,
    trust_pickle: bool = False,
    rebuild: bool = False,
    progress: Progress = _silent,
) -> Built:
    """Turn a model into an artifact; with `output`, copy it and its manifest there.

    Args:
        quantization: how a float model is quantized, as a record or as texts "ranges=mse".
        allow_loss: build even what cannot keep the model's compression; the manifest then says what is lost.
    """
    policy = _policy(quantization)
    if quantization and precision != "int8" and not isinstance(quantization, QuantizationPolicy):
        raise UsageError(
            f"-Q {quantization[0]} says how int8 is made, and the precision is {precision}; add --precision int8, or "
            f"leave it out"
        )
    request = BuildRequest(
        name=name or model_name(source),
        source=source,
        base=Path.cwd(),
        weights=weights,
        inputs=parse_inputs(inputs),
        target=target,
        backend=backend,
        precision=precision_from_text(precision),
        calibration=calibration,
        options=options or {},
        policy=policy,
        allow_loss=allow_loss,
        trust_pickle=trust_pickle,
        rebuild=rebuild,
    )
    built = build(request, progress)
    return deliver(built, output) if output else built


def sensitivity(
    source: str,
    *,
    calibration: Path,
    weights: Path | None = None,
    inputs: Sequence[str | TensorSpec] = (),
    target: str = "host",
    backend: str = "onnxruntime",
    quantization: Sequence[str] | QuantizationPolicy = (),
    name: str | None = None,
    trust_pickle: bool = False,
    progress: Progress = _silent,
) -> Sensitivity:
    """Say what a model gains in int8 when one layer after another stays float, and what that costs.

    Args:
        calibration: everything is measured on it.
        quantization: as for `compile`; `max_float_layers` and `budget_db` say where the curve ends.

    Raises:
        UsageError: the model carries its own quantization, so that no layer's precision is ours to choose.
    """
    from edgedeploy.prepare.dataset import load_samples
    from edgedeploy.prepare.ptq.step_costs import sensitivity_of

    resolved, here = this_target(target), this_target("host")
    rules = resolved.quantization.get(backend)
    if rules is None:
        known = ", ".join(resolved.quantization) or "none"
        raise UsageError(f"target {target!r} has no int8 rules for back end {backend!r} (it has: {known})")
    request = BuildRequest(
        name=name or model_name(source),
        source=source,
        base=Path.cwd(),
        weights=weights,
        inputs=parse_inputs(inputs),
        target=target,
        backend=backend,
        precision="int8",
        calibration=calibration,
        trust_pickle=trust_pickle,
    )
    model = canonical_model(request, progress)
    return sensitivity_of(
        model,
        load_samples(calibration, model.inputs),
        rules,
        _policy(quantization),
        name=request.name,
        target=resolved.name,
        backend=backend,
        is_timed=resolved.name == here.name and backend == "onnxruntime",
        cache=cache_dir() / "calibration",
        progress=progress,
    )


def bench(
    artifact: Path,
    *,
    device: str = "local",
    lab: Path | None = None,
    evaluation: Path | None = None,
    metric: str = "top1",
    output_name: str = "",
    visits: int = 5,
    seed: int = 0,
    results: Path = Path("bench_results"),
    progress: Progress = _silent,
) -> tuple[Run, Path]:
    """Measure one artifact and store the run; return it and its file."""
    built = load_artifact(artifact)
    request = MeasureRequest(
        sides=((built.artifact.name, built),),
        device_name=device,
        device=device_of(load_lab(lab_path(lab)), device),
        limits=_limits(built.artifact.recipe.target),
        evaluation=Evaluation(path=evaluation, metric=metric, output=output_name) if evaluation else None,
        blocks=visits,
        seed=seed,
    )
    (stored,) = _stored_runs(request, lambda runs: False, Results(results), progress)
    return stored.run, Path(stored.file)


def gate(
    candidate: str,
    *,
    baseline: str | None = None,
    margins: Sequence[str] = (),
    max_blocks: int = 16,
    device: str = "local",
    lab: Path | None = None,
    evaluation: Path | None = None,
    metric: str = "top1",
    output_name: str = "",
    seed: int = 0,
    results: Path = Path("bench_results"),
    progress: Progress = _silent,
) -> Outcome:
    """Judge a candidate against a baseline: two artifact folders are measured, two stored runs are judged as they are.

    Args:
        candidate: an artifact folder, or a stored run.
        baseline: likewise; None: the blessed run of the candidate's target and model.
        margins: "metric=amount"; empty: accuracy=-1pt, latency_p50=+5%, peak_memory=+10%, artifact_size=+10%.
    """
    policy = Policy(
        margins=margins_from_texts(margins or DEFAULT_MARGINS), max_blocks=max_blocks, min_blocks=min(4, max_blocks)
    )
    store = Results(results)
    artifacts: dict[str, Artifact] = {}
    if _is_artifact(candidate):
        if baseline is None or not _is_artifact(baseline):
            raise UsageError(
                f"{candidate} is an artifact, so its baseline must be one too (--baseline FOLDER): latency is judged "
                f"only on two artifacts measured interleaved"
            )
        sides = (_side(baseline), _side(candidate))
        if sides[0][0] == sides[1][0]:
            sides = ((f"{sides[0][0]} (baseline)", sides[0][1]), (f"{sides[1][0]} (candidate)", sides[1][1]))
        artifacts = {name: one.artifact for name, one in sides}
        request = MeasureRequest(
            sides=sides,
            device_name=device,
            device=device_of(load_lab(lab_path(lab)), device),
            limits=_limits(sides[1][1].artifact.recipe.target),
            evaluation=Evaluation(path=evaluation, metric=metric, output=output_name) if evaluation else None,
            blocks=max_blocks,
            seed=seed,
        )
        pair = _measured_pair(request, policy, 1, store, progress)
    else:
        pair = _stored_pair(store, candidate, baseline)
    return _judged(f"{pair[1].run.cell} against {pair[0].run.cell}", [pair], policy, artifacts)


def inspect(
    model: str,
    *,
    weights: Path | None = None,
    inputs: Sequence[str] = (),
    reference: str | None = None,
    trust_pickle: bool = False,
    progress: Progress = _silent,
) -> Model | Artifact:
    """Return what a model is: its Artifact for a folder that `compile` wrote, else its Model after export.

    Args:
        reference: the same network before channels were removed, in any form that `model` may have.
    """
    from edgedeploy.prepare.count.compression import compression_report
    from edgedeploy.prepare.count.statements import statements

    def canonical(source: str, given: Path | None) -> Model:
        request = BuildRequest(
            name=model_name(source),
            source=source,
            base=Path.cwd(),
            weights=given,
            inputs=parse_inputs(inputs),
            target="host",
            backend="onnxruntime",
            precision="fp32",
            trust_pickle=trust_pickle,
        )
        return canonical_model(request, progress)

    if _is_artifact(model):
        built = load_artifact(Path(model))
        if reference is None:
            return built.artifact
        report = compression_report(built.file, reference=_dense(reference, canonical))
        report = msgspec.structs.replace(report, statements=built.artifact.compression.statements)
        return msgspec.structs.replace(built.artifact, compression=report)
    found = canonical(model, weights)
    dense = _dense(reference, canonical) if reference else None
    report = compression_report(Path(found.path), table=found.quantization, reference=dense)
    made = statements(found.kinds, report, None)
    return msgspec.structs.replace(found, compression=msgspec.structs.replace(report, statements=made))


def _dense(reference: str, canonical: Callable[[str, Path | None], Model]) -> Path:
    """Return the ONNX of a dense reference."""
    if _is_artifact(reference):
        return load_artifact(Path(reference)).file
    return Path(canonical(reference, None).path)


def init(path: Path, *, force: bool = False) -> Path:
    """Write a commented release file."""
    if path.is_dir():
        path = path / "edgedeploy.toml"
    if path.exists() and not force:
        raise UsageError(f"{path} exists; give another path, or --force to replace it")
    write_atomic(path, (Path(__file__).parent / "release_template.toml").read_bytes())
    return path


def write_reports(
    outcome: Outcome, *, junit: Path | None = None, markdown: Path | None = None, html: Path | None = None
) -> None:
    """Write the verdict in the forms that were asked for, and note in `outcome.files` where."""
    from edgedeploy.render.html import report_html
    from edgedeploy.render.junit import verdict_junit
    from edgedeploy.render.markdown import verdict_markdown

    forms: dict[str, tuple[Path | None, Callable[[], str]]] = {
        "JUnit": (junit, lambda: verdict_junit(outcome.verdict)),
        "Markdown": (markdown, lambda: verdict_markdown(outcome.verdict, outcome.runs, outcome.artifacts)),
        "report": (html, lambda: report_html(outcome.verdict, outcome.runs, outcome.artifacts)),
    }
    for label, (path, render) in forms.items():
        if path is not None:
            write_atomic(path, render().encode())
            outcome.files[label] = path
    if html is not None:
        write_json(html.with_suffix(".json"), outcome.verdict)
        outcome.files["verdict"] = html.with_suffix(".json")


def report_path(outcome: Outcome, results: Path) -> Path:
    """Return where `run` puts its HTML report and verdict by default."""
    time = re.sub(r"[^0-9TZ]", "", outcome.verdict.judged_utc)
    return results / "reports" / f"{time}-{re.sub(r'[^A-Za-z0-9._-]+', '-', outcome.verdict.name)}.html"


# ---------------------------------------------------------------- what the verbs share


def _judged_cells(path: Path, release: Release, names: Sequence[str]) -> list[tuple[CellEntry, CellEntry]]:
    """Return (candidate, baseline) for every candidate cell that was asked for."""
    known = [cell.name for cell in release.cells]
    for name in names:
        if name not in known:
            raise UsageError(f"{path} has no cell {name!r}{closest(name, known)} (known: {', '.join(known)})")
    pairs = [(cell, baseline_of(release, cell)) for cell in release.cells if not names or cell.name in names]
    judged = [(cell, baseline) for cell, baseline in pairs if baseline is not None]
    if not judged:
        raise UsageError(f"{path} lists nothing to judge: add a [[cells]] entry beside the baseline")
    return judged


def _request(path: Path, release: Release, cell: CellEntry, rebuild: bool, trust_pickle: bool) -> BuildRequest:
    model, base = release.models[cell.model], path.parent
    return BuildRequest(
        name=cell.model,
        source=model.source,
        base=base,
        weights=base / model.weights if model.weights else None,
        inputs=input_specs(release, model),
        target=cell.target,
        backend=cell.backend,
        precision=cell.precision,
        calibration=base / release.calibration.set if release.calibration else None,
        options=cell.options,
        policy=cell.quantization or release.quantization,
        allow_loss=cell.allow_loss,
        declared=model.declared,
        rebuild=rebuild,
        trust_pickle=trust_pickle,
    )


def _evaluation(path: Path, release: Release) -> Evaluation | None:
    entry = release.evaluation
    return Evaluation(path=path.parent / entry.set, metric=entry.metric, output=entry.output) if entry else None


def _unjudged(candidate: CellEntry, baseline: CellEntry, error: Exception) -> CellVerdict:
    return CellVerdict(
        cell=candidate.name,
        baseline_cell=baseline.name,
        device=candidate.device,
        target=candidate.target,
        decision="INCONCLUSIVE",
        findings=(),
        notes=(f"could not be built or measured: {error}",),
    )


def _with_problems(outcome: Outcome, problems: Sequence[CellVerdict]) -> Outcome:
    """Add the cells without a judgement to a verdict, which then cannot be PASS."""
    from edgedeploy.judge.gate import combine

    cells = (*outcome.verdict.cells, *problems)
    verdict = msgspec.structs.replace(outcome.verdict, cells=cells, decision=combine(cell.decision for cell in cells))
    return dataclasses.replace(outcome, verdict=verdict, problems=tuple(problems))


def _leakage_notes(path: Path, release: Release, artifacts: Mapping[str, Artifact]) -> tuple[str, ...]:
    """Say when samples that accuracy is judged on were calibrated on: the accuracy is then flattered."""
    from edgedeploy.prepare.dataset import load_samples

    if release.calibration is None or release.evaluation is None or not artifacts:
        return ()
    artifact = next(iter(artifacts.values()))
    calibration = load_samples(path.parent / release.calibration.set, artifact.inputs)
    evaluation = load_samples(path.parent / release.evaluation.set, artifact.inputs)
    shared = evaluation.overlap(calibration)
    if not shared:
        return ()
    return (f"{shared} of the {evaluation.count} evaluation samples were also calibrated on: accuracy is flattered",)


def _policy(given: Sequence[str] | QuantizationPolicy) -> QuantizationPolicy:
    return given if isinstance(given, QuantizationPolicy) else policy_from_pairs(given)


def _limits(target: str) -> ConditionLimits:
    return this_target(target).conditions


def _is_artifact(reference: str) -> bool:
    path = Path(reference)
    return path.name == "manifest.json" or (path / "manifest.json").is_file()


def _side(folder: str) -> tuple[str, Built]:
    built = load_artifact(Path(folder))
    return built.artifact.name, built


def _measured_pair(request: MeasureRequest, policy: Policy, cells: int, store: Results, progress: Progress) -> Pair:
    """Measure baseline and candidate interleaved until the gate of so many cells is decided, and store both runs."""
    from edgedeploy.judge.gate import is_decided

    def decided(runs: tuple[Run, ...]) -> bool:
        return is_decided(runs[0], runs[1], policy, cells=cells)

    baseline, candidate = _stored_runs(request, decided, store, progress)
    return baseline, candidate


def _stored_runs(
    request: MeasureRequest, decided: Callable[[tuple[Run, ...]], bool], store: Results, progress: Progress
) -> list[StoredRun]:
    """Measure and store; an interrupted session is stored too, and its files are named in the error."""
    try:
        runs = measure(request, decided, progress)
    except MeasurementInterrupted as error:
        kept = [str(store.save_run(run)) for run in error.runs]
        raise DeviceError(f"{error}; what was measured until then is kept in {', '.join(kept)}") from error
    return [StoredRun(str(store.save_run(run)), run) for run in runs]


def _stored_pair(store: Results, candidate: str, baseline: str | None) -> Pair:
    candidate_file = store.find_run(candidate)
    candidate_run = load_run(candidate_file)
    if baseline is None:
        target, model = candidate_run.artifact.target, candidate_run.artifact.model
        pointer = store.baseline(target, model)
        if pointer is None:
            raise UsageError(
                f"no baseline is set for target {target!r} and model {model!r}; give --baseline, or: "
                f"edgedeploy baseline set RUN --why ..."
            )
        baseline_file = store.baseline_run(pointer)
    elif _is_artifact(baseline):
        raise UsageError(f"{candidate} is a stored run, so its baseline must be one too; {baseline} is an artifact")
    else:
        baseline_file = store.find_run(baseline)
    return StoredRun(str(baseline_file), load_run(baseline_file)), StoredRun(str(candidate_file), candidate_run)


def _lost(cell: CellVerdict, artifacts: Mapping[str, Artifact]) -> list[str]:
    """Say which compression a cell's artifacts have lost: a verdict on them should not be read without it."""
    return [
        f"{name} has lost its compression ({one.kind}): {one.artifact_reason}"
        for name in (cell.baseline_cell, cell.cell)
        if (artifact := artifacts.get(name)) is not None
        for one in artifact.compression.statements
        if one.artifact == "lost"
    ]


def _judged(
    name: str,
    pairs: Sequence[Pair],
    policy: Policy,
    artifacts: Mapping[str, Artifact],
    notes: tuple[str, ...] = (),
) -> Outcome:
    """Judge every pair within one error rate, and name in the verdict the files that it rests on."""
    from edgedeploy.judge.gate import judge_gate

    verdict = judge_gate(name, [(old.run, new.run) for old, new in pairs], policy, judged_utc=utc_now())
    cells = tuple(
        msgspec.structs.replace(
            cell,
            baseline_run=old.file,
            candidate_run=new.file,
            notes=(*notes, *_lost(cell, artifacts), *cell.notes),
        )
        for cell, (old, new) in zip(verdict.cells, pairs, strict=True)
    )
    runs = {stored.file: stored.run for pair in pairs for stored in pair}
    return Outcome(msgspec.structs.replace(verdict, cells=cells), runs, artifacts)
