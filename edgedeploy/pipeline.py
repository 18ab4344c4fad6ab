"""THE SPINE: from a model reference to a verdict; the only file that knows every room.

model ─ build: load, export, simplify, quantize, emit, compile ─▶ artifact
      ─ measure: ship, outputs, memory, interleaved visits ─▶ runs ─ judge ─▶ verdict ─ render
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import msgspec

import edgedeploy
from edgedeploy import passports
from edgedeploy.arguments import (
    ALL,
    DEFAULT_MARGINS,
    backends_of,
    dropped_options,
    margins_from_texts,
    model_name,
    on_other_runtimes,
    parse_inputs,
    policy_from_pairs,
    precision_from_text,
    read_release,
)
from edgedeploy.build import (
    BuildRequest,
    Built,
    Progress,
    artifact_in_cache,
    build,
    canonical_model,
    deliver,
    load_artifact,
    silent,
    this_target,
)
from edgedeploy.comparing import Comparing
from edgedeploy.dispatch import Dispatched, Ended, Terms, Work, dispatch
from edgedeploy.documents import closest, read_json
from edgedeploy.engines import engine, is_tied_to_device
from edgedeploy.errors import BackendMissing, InternalError, UsageError
from edgedeploy.explain import CAP_S, PASSES, ExplainRequest, explained
from edgedeploy.explain import explain as find_reasons
from edgedeploy.journal import Finished, History, Journal, Planned, PlannedCell, Resumed, history, unfinished
from edgedeploy.journal import named as named_journal
from edgedeploy.journal import start as start_journal
from edgedeploy.judge.percentiles import samples_for
from edgedeploy.judge.planning import blocks_by_cell
from edgedeploy.lab.inventory import LOCAL, lab_path, load_lab
from edgedeploy.lab.inventory import device as device_of
from edgedeploy.measure import Evaluation, MeasureRequest
from edgedeploy.outcomes import AnyPath, Outcome, Pair, StoredRun, judge_pairs, measure_and_store, optional_path
from edgedeploy.records.artifact import Artifact, OptionValue
from edgedeploy.records.comparison import Comparison
from edgedeploy.records.device import Device, Lab
from edgedeploy.records.explanation import Explanation
from edgedeploy.records.model import Model, TensorSpec
from edgedeploy.records.quantization import QuantizationPolicy
from edgedeploy.records.release import CellEntry, Release, baseline_of, input_specs
from edgedeploy.records.run import Run
from edgedeploy.records.sensitivity import Sensitivity
from edgedeploy.records.target import ConditionLimits, Target
from edgedeploy.records.verdict import FORMAT as VERDICT_FORMAT
from edgedeploy.records.verdict import CellVerdict, Contender, LedgerEntry, Policy, Verdict
from edgedeploy.render.commands import command_line
from edgedeploy.render.noise import plan_lines
from edgedeploy.results import Results, load_run, utc_now
from edgedeploy.storage import cache_dir, sha256_file, write_atomic

# device = "any": whichever of the lab is of the cell's target. --resume: the newest run that stopped in the middle.
ANY, NEWEST = "any", "newest"


# ---------------------------------------------------------------- the whole spine


def run(
    release_file: AnyPath,
    *,
    cells: Sequence[str] = (),
    targets: Sequence[str] = (),
    backends: Sequence[str] = (),
    device: str = "",
    rebuild: bool = False,
    trust_pickle: bool = False,
    seed: int = 0,
    wait_s: float = 0.0,
    lab: AnyPath | None = None,
    results: AnyPath = Path("bench_results"),
    resume: str = "",
    executor: Executor | None = None,
    builders: int = 1,
    is_explained: bool = True,
    budget_s: float = 0.0,
    against_itself: bool = False,
    progress: Progress = silent,
) -> Outcome:
    """Build, measure and judge every candidate cell of a release file, each on a free device of its own or its kind.

    A cell that cannot be built or measured does not stop the others: it is INCONCLUSIVE, with the reason, and stands in
    `Outcome.problems`. What is done is written to a journal, from which `resume` goes on after this process died.

    Args:
        release_file, lab, results: as text or Path.
        cells: names of candidate cells; empty: all.
        targets: only the cells of these targets; "all": every one, on every runtime that is installed for it.
        backends: each candidate on these runtimes too, or on "all"; what is not installed stands in
            `Verdict.contenders` with what installs it.
        device: measure every cell on this one, instead of its own; "any": on any of its target.
        wait_s: how long to queue for a device that somebody else holds, when there is no other of its kind.
        resume: the name of a run that stopped in the middle, or "newest" of this file; everything else that decides
            what is done is as it was then.
        executor: where builds and sessions run; None: in this process.
        builders: builds at a time on an executor.
        is_explained: look for the reason at once where a latency or the accuracy of a cell failed.
        budget_s: how long each device may measure; it decides the most blocks of each cell, before any of them is
            measured. 0: the release file decides.
        against_itself: judge every candidate against itself, which shows how often the gate raises false alarms.

    Raises:
        UsageError: the release file, a name or a file in it is wrong, or a run cannot go on because something changed.
        EdgedeployError: the only cell could not be built or measured; what was measured is stored and named.
    """
    release_file = Path(release_file)
    known: History | None = None
    if resume:
        journal, known = _run_to_resume(release_file, resume)
        asked = known.planned
        release_file, lab, results = Path(asked.release), asked.lab, asked.results
        cells, targets, backends, device = asked.names, asked.targets, asked.backends, asked.device
        rebuild, trust_pickle, seed = asked.rebuild, asked.trust_pickle, asked.seed
    if executor is not None:  # its workers may stand in other folders
        release_file, results = release_file.absolute(), Path(results).absolute()
    release, policy = read_release(release_file)
    lab_file = lab_path(optional_path(lab))
    inventory = load_lab(lab_file)
    chosen = _chosen_cells(release_file, release, cells, targets, backends)
    if against_itself or (known is not None and known.planned.against_itself):
        chosen = dataclasses.replace(chosen, pairs=[(one, _again(one)) for one, _ in chosen.pairs])
    for one in chosen.absent:
        progress(f"{one.cell}: left out: {one.absent}")
    works = [
        _work(release_file, release, candidate, baseline, inventory, device, rebuild, trust_pickle)
        for candidate, baseline in chosen.pairs
    ]
    works = [_with_sentinels(work, inventory, progress) for work in works]
    terms = Terms(
        policy=policy,
        evaluation=_evaluation(release_file, release),
        seed=seed,
        results=Path(results),
        rebuild=rebuild,
        wait_s=wait_s,
    )
    if known is not None:
        policy = msgspec.structs.replace(policy, blocks=known.planned.blocks)
    elif budget_s:
        policy = _within_budget(works, inventory, terms, budget_s, executor, builders, progress)
    if known is None:
        for earlier in unfinished(release_file)[:1]:
            progress(f"an earlier run of this file stopped in the middle: edgedeploy run --resume {earlier.name}")
        journal = start_journal()
    with journal.owned():
        if known is not None:
            progress(f"going on with the run {journal.name}: {_done_so_far(known, len(works))}")
            journal.append(Resumed(utc=utc_now()))
        else:
            journal.append(
                Planned(
                    started_utc=utc_now(),
                    release=str(release_file.absolute()),
                    release_sha256=sha256_file(release_file),
                    lab=str(lab_file.absolute()) if lab_file.exists() else "",
                    results=str(Path(results).absolute()),
                    cells=tuple(
                        PlannedCell(candidate=one.name, baseline=base.name, target=one.target, device=one.device)
                        for one, base in chosen.pairs
                    ),
                    names=tuple(cells),
                    targets=tuple(targets),
                    backends=tuple(backends),
                    device=device,
                    seed=seed,
                    rebuild=rebuild,
                    trust_pickle=trust_pickle,
                    against_itself=against_itself,
                    blocks=policy.blocks,
                    edgedeploy=edgedeploy.__version__,
                    code=_deciding_code(),
                )
            )
        terms = dataclasses.replace(terms, policy=policy, journal=journal)
        try:
            done = dispatch(
                works, inventory.devices, terms, known=known, executor=executor, builders=builders, progress=progress
            )
        except KeyboardInterrupt:
            progress(f"interrupted; to go on with it: edgedeploy run --resume {journal.name}")
            raise
        outcome = _concluded(release_file, release, policy, chosen, done, journal, Path(results), progress)
        options = {"cell": cells, "targets": ",".join(targets), "backends": ",".join(backends), "device": device}
        places = {"seed": seed, "trust-pickle": trust_pickle, "lab": lab, "results": _unusual(results, "bench_results")}
        how = {"budget": f"{budget_s:g}s" if budget_s else "", "aa": against_itself}
        verb = "gate" if against_itself else "run"
        outcome = _made_by(outcome, command_line(verb, [release_file], {**options, **places, **how}))
        if not is_explained:
            return outcome

        def to_explain(cell: CellVerdict, metrics: tuple[str, ...]) -> ExplainRequest:
            names = (cell.baseline_cell, cell.cell)
            before, after = (_in_cache(outcome.artifacts[name].key, name) for name in names)
            session = MeasureRequest(
                sides=((names[0], before), (names[1], after)),
                device_name=cell.device,
                device=device_of(inventory, cell.device),
                limits=_limits(cell.target),
                evaluation=terms.evaluation,
                blocks=policy.max_blocks,
                seed=terms.seed,
                wait_s=wait_s,
            )
            return _to_explain(session, outcome, cell, metrics)

        verdict = explained(outcome.verdict, to_explain, Results(Path(results)), progress)
        return dataclasses.replace(outcome, verdict=verdict)


def _again(cell: CellEntry) -> CellEntry:
    """Return a cell under another name, to be its own baseline."""
    return msgspec.structs.replace(cell, name=f"{cell.name} (again)", baseline="")


def _with_sentinels(work: Work, inventory: Lab, progress: Progress) -> Work:
    """Return a work with the sentinels of its back ends, where one of its devices takes them."""
    if not any(inventory.devices[name].sentinel for name in (*work.devices, *work.spares)):
        return work
    compiled: dict[str, Built] = {}
    for request in work.requests.values():
        compiled |= passports.sentinels(request.target, [request.backend], progress)
    return dataclasses.replace(work, sentinels=compiled)


def _within_budget(
    works: Sequence[Work],
    inventory: Lab,
    terms: Terms,
    budget_s: float,
    executor: Executor | None,
    builders: int,
    progress: Progress,
) -> Policy:
    """Return the policy with the most blocks of each cell, so that the whole run keeps to a time.

    Cells whose noise nobody knows are measured for a few blocks, which count for no verdict; that time is spent.
    """
    asked = [passports.Asked(cell=one.cell, baseline=one.baseline, devices=one.devices) for one in works]
    store, policy, spent_s = Results(terms.results), terms.policy, 0.0
    noises = passports.known_noise(asked, policy, store)
    unknown = [work for work in works if work.cell not in noises]
    if unknown:
        names = ", ".join(work.cell for work in unknown)
        few = passports.PILOT_BLOCKS
        progress(f"measuring {few} blocks of {names} to learn their noise; they count for no verdict")
        pilot = dataclasses.replace(
            terms,
            policy=Policy(margins={}, max_blocks=few, min_blocks=few),
            evaluation=None,
        )
        tried = dispatch(unknown, inventory.devices, pilot, executor=executor, builders=builders, progress=progress)
        told = [one for one in asked if one.cell not in noises]
        for one, ended in zip(told, tried.ended, strict=True):
            if not ended.runs:
                continue
            baseline, candidate = ended.runs
            if (found := passports.noise_from_session(one, baseline, candidate, policy, store)) is not None:
                noises[one.cell] = found
        at_work_s: dict[str, float] = collections.defaultdict(float)
        for place in tried.occupied:
            at_work_s[place.device] += place.ended_s - place.started_s
        spent_s = max(at_work_s.values(), default=0.0)
        progress(f"that took {spent_s:.0f} s of the budget")
    plan = passports.plan_budget(noises, asked, policy, budget_s - spent_s)
    for line in plan_lines(plan):
        progress(line)
    return msgspec.structs.replace(policy, blocks=dict(blocks_by_cell(plan.cells)))


def _run_to_resume(release_file: Path, name: str) -> tuple[Journal, History]:
    """Return the journal to go on with, and what it says; of a complete run only the verdict is made again.

    Raises:
        UsageError: there is none, or something changed that its numbers rest on.
    """
    if name == NEWEST:
        candidates = unfinished(release_file)
        if not candidates:
            raise UsageError(
                f"no run of {release_file} stopped in the middle; start one: edgedeploy run {release_file}"
            )
        journal = candidates[0]
    else:
        journal = named_journal(name)
    known = history(journal)
    asked = known.planned
    changed = []
    if not Path(asked.release).is_file() or sha256_file(Path(asked.release)) != asked.release_sha256:
        changed.append(f"the release file {asked.release}")
    if asked.edgedeploy != edgedeploy.__version__:
        changed.append(f"edgedeploy (it was {asked.edgedeploy}, and is {edgedeploy.__version__})")
    now = _deciding_code()
    changed += [f"edgedeploy's {file}" for file in sorted(asked.code | now) if asked.code.get(file) != now.get(file)]
    if changed:
        raise UsageError(
            f"the run {journal.name} cannot go on, because since it was started there changed {', '.join(changed)}; "
            f"start it afresh: edgedeploy run {asked.release}"
        )
    return journal, known


def _deciding_code() -> dict[str, str]:
    """Return the digests of the files of edgedeploy that decide what a number is."""
    package = Path(__file__).parent
    return {file: sha256_file(package / file) for file in ("ondevice/runner.py", "lab/visits.py", "measure.py")}


def _done_so_far(known: History, cells: int) -> str:
    blocks = sum(session.blocks for session in known.open.values())
    half = f", {len(known.open)} half measured ({blocks} blocks)" if known.open else ""
    return f"{len(known.stored)} of {cells} cells are measured, {len(known.failed)} failed{half}"


def _work(
    path: Path,
    release: Release,
    candidate: CellEntry,
    baseline: CellEntry,
    lab: Lab,
    device: str,
    rebuild: bool,
    trust_pickle: bool,
) -> Work:
    """Return how a pair is built, and where it may be measured: both sides on the candidate's device, or one of it."""
    place = lab.devices.get(device or candidate.device)
    candidate, baseline = _of_its_kind(candidate, place), _of_its_kind(baseline, place)
    target = this_target(candidate.target)
    alike = tuple(
        name for name, one in lab.devices.items() if one.target and one.target in (candidate.target, target.name)
    )
    wanted, spares = device or candidate.device, tuple[str, ...]()
    if wanted == ANY:
        if not alike and target.name == this_target("host").name:
            alike = (LOCAL,)
        if not alike:
            raise UsageError(
                f"cell {candidate.name!r} may be measured on any device of target {candidate.target!r}, and the lab "
                f'file has none; add target = "{candidate.target}" to the devices that are of this kind'
            )
        devices = alike
    else:
        device_of(lab, wanted)  # a sentence where there is none
        devices = (wanted,)
        is_of_kind = wanted in alike and not device
        spares = tuple(name for name in alike if name != wanted) if is_of_kind else ()
    return Work(
        cell=candidate.name,
        baseline=baseline.name,
        requests={cell.name: _request(path, release, cell, rebuild, trust_pickle) for cell in (baseline, candidate)},
        devices=devices,
        spares=spares,
        limits=target.conditions,
    )


def _of_its_kind(cell: CellEntry, device: Device | None) -> CellEntry:
    """Return a cell; one for `host`, "whatever this machine is", is for what the device is that it is measured on."""
    if cell.target != "host" or device is None or device.transport == "local" or not device.target:
        return cell
    return msgspec.structs.replace(cell, target=device.target)


def _concluded(
    path: Path,
    release: Release,
    policy: Policy,
    chosen: _Chosen,
    done: Dispatched,
    journal: Journal,
    results: Path,
    progress: Progress,
) -> Outcome:
    """Judge what was measured, say what was not, and close the journal."""
    pairs: list[Pair] = []
    absent, problems, ledger = list(chosen.absent), list[CellVerdict](), list[LedgerEntry]()
    for (candidate, baseline), ended in zip(chosen.pairs, done.ended, strict=True):
        if ended.state == "measured":
            old, new = (StoredRun(file, run) for file, run in zip(ended.files, ended.runs, strict=True))
            pairs.append((old, new))
            ledger.append(LedgerEntry(cell=candidate.name, state="judged", device=ended.device))
            continue
        assert ended.error is not None, "what is not measured has a reason"
        is_left_out = candidate.name in chosen.notes and ended.is_not_installed
        absent.append(_unmeasured(candidate, baseline, ended.error, None if is_left_out else "INCONCLUSIVE"))
        if not is_left_out:
            problems.append(_unjudged(candidate, baseline, ended))
            entry = LedgerEntry(cell=candidate.name, state=ended.state, reason=ended.reason, device=ended.device)
            ledger.append(entry)
    left_out = {row.cell for row in absent if row.decision is None}
    asked = [candidate.name for candidate, _ in chosen.pairs if candidate.name not in left_out]
    if [entry.cell for entry in ledger] != asked:
        raise InternalError(f"the ledger does not balance: {asked} were asked for, {ledger} is what became of them")
    if len(done.ended) == 1 and (error := done.ended[0].error) is not None:
        journal.append(Finished(utc=utc_now(), decision="INCONCLUSIVE", ledger=tuple(ledger)))
        if done.ended[0].state == "pending":
            progress(f"to go on with it: edgedeploy run --resume {journal.name}")
        raise error
    notes = _leakage_notes(path, release, done.artifacts)
    outcome = judge_pairs(release.name, pairs, policy, done.artifacts, notes)
    outcome = _with_self_knowledge(outcome, Results(results))
    outcome = _side_by_side(_with_problems(outcome, problems), absent, chosen.notes)
    verdict = msgspec.structs.replace(outcome.verdict, ledger=tuple(ledger))
    journal.append(Finished(utc=utc_now(), decision=verdict.decision, ledger=tuple(ledger)))
    return dataclasses.replace(
        outcome,
        verdict=verdict,
        other_runtimes=chosen.other_runtimes,
        journal=journal.name,
        results=results,
        occupied=done.occupied,
        release=path,
    )


def plan(
    release_file: AnyPath,
    *,
    cells: Sequence[str] = (),
    targets: Sequence[str] = (),
    backends: Sequence[str] = (),
    device: str = "",
    budget_s: float = 0.0,
    lab: AnyPath | None = None,
    results: AnyPath = Path("bench_results"),
) -> list[str]:
    """Return in words what `run` would do, without doing it; its arguments are those of `run`."""
    release_file = Path(release_file)
    release, policy = read_release(release_file)
    steps = []
    chosen = _chosen_cells(release_file, release, cells, targets, backends)
    for candidate, baseline in chosen.pairs:
        for cell in (baseline, candidate):
            step = f"build {cell.name}: {cell.model} for {cell.target} with {cell.backend} {cell.precision}"
            steps += [] if step in steps else [step]
        place = device or candidate.device
        steps.append(
            f"measure {baseline.name} and {candidate.name} interleaved on "
            f"{f'any device of target {candidate.target}' if place == ANY else place}, at most "
            f"{policy.max_blocks} blocks"
        )
        margins = ", ".join(f"{metric} {margin.text}" for metric, margin in policy.margins.items())
        steps.append(f"judge {candidate.name} against {baseline.name}: {margins or 'no margins, nothing is judged'}")
    steps += [f"leave out {one.cell}: {one.absent}" for one in chosen.absent]
    if budget_s:
        inventory = load_lab(lab_path(optional_path(lab)))
        works = [
            _work(release_file, release, candidate, baseline, inventory, device, False, False)
            for candidate, baseline in chosen.pairs
        ]
        asked = [passports.Asked(cell=one.cell, baseline=one.baseline, devices=one.devices) for one in works]
        noises = passports.known_noise(asked, policy, Results(Path(results)))
        steps += plan_lines(passports.plan_budget(noises, asked, policy, budget_s))
    return steps


# ---------------------------------------------------------------- one step each


def compile(
    source: AnyPath,
    *,
    weights: AnyPath | None = None,
    inputs: Sequence[str | TensorSpec] = (),
    target: str = "host",
    backend: str = "onnxruntime",
    precision: str = "fp32",
    calibration: AnyPath | None = None,
    options: Mapping[str, OptionValue] | None = None,
    quantization: Sequence[str] | QuantizationPolicy = (),
    allow_loss: bool = False,
    output: AnyPath | None = None,
    name: str | None = None,
    device: str = "",
    lab: AnyPath | None = None,
    wait_s: float = 0.0,
    trust_pickle: bool = False,
    rebuild: bool = False,
    progress: Progress = silent,
) -> Built:
    """Turn a model into an artifact; with `output`, copy it and its manifest there.

    Args:
        source: a file, as text or Path, or "package.module:factory".
        weights, calibration, output, lab: files and folders, likewise.
        quantization: how a float model is quantized, as a record or as texts "ranges=mse".
        allow_loss: build even what cannot keep the model's compression; the manifest then says what is lost.
        device: where artifacts are built that are tied to a device; its name in the lab file.
        wait_s: how long to queue for that device when somebody else holds it.
    """
    if device and not is_tied_to_device(backend):
        raise UsageError(f"{backend} compiles on this machine; leave --device {device} out, and give it to bench")
    if not device and is_tied_to_device(backend):
        raise UsageError(f"{backend} builds its artifacts on the device that runs them; name it with --device")
    place = device_of(load_lab(lab_path(optional_path(lab))), device) if device else None
    source, policy = str(source), _policy(quantization)
    if quantization and precision != "int8" and not isinstance(quantization, QuantizationPolicy):
        raise UsageError(
            f"-Q {quantization[0]} says how int8 is made, and the precision is {precision}; add --precision int8, or "
            f"leave it out"
        )
    request = BuildRequest(
        name=name or model_name(source),
        source=source,
        base=Path.cwd(),
        weights=optional_path(weights),
        inputs=parse_inputs(inputs),
        target=target,
        backend=backend,
        precision=precision_from_text(precision),
        calibration=optional_path(calibration),
        options=options or {},
        policy=policy,
        allow_loss=allow_loss,
        trust_pickle=trust_pickle,
        rebuild=rebuild,
    )
    built = build(request, progress)
    if place is not None:
        built = engine(built, device, place, progress, rebuild=rebuild, wait_s=wait_s)
    return built if output is None else deliver(built, Path(output))


def sensitivity(
    source: AnyPath,
    *,
    calibration: AnyPath,
    weights: AnyPath | None = None,
    inputs: Sequence[str | TensorSpec] = (),
    target: str = "host",
    backend: str = "onnxruntime",
    quantization: Sequence[str] | QuantizationPolicy = (),
    name: str | None = None,
    trust_pickle: bool = False,
    progress: Progress = silent,
) -> Sensitivity:
    """Say what a model gains in int8 when one layer after another stays float, and what that costs.

    Args:
        calibration: a folder or an .npz, as text or Path, like `weights`; everything is measured on it.
        quantization: as for `compile`; `max_float_layers` and `budget_db` say where the curve ends.

    Raises:
        UsageError: the model carries its own quantization, so that no layer's precision is ours to choose.
    """
    from edgedeploy.prepare.dataset import load_samples
    from edgedeploy.prepare.ptq.step_costs import sensitivity_of

    source = str(source)
    resolved, here = this_target(target), this_target("host")
    rules = resolved.quantization.get(backend)
    if rules is None:
        known = ", ".join(resolved.quantization) or "none"
        raise UsageError(f"target {target!r} has no int8 rules for back end {backend!r} (it has: {known})")
    request = BuildRequest(
        name=name or model_name(source),
        source=source,
        base=Path.cwd(),
        weights=optional_path(weights),
        inputs=parse_inputs(inputs),
        target=target,
        backend=backend,
        precision="int8",
        calibration=Path(calibration),
        trust_pickle=trust_pickle,
    )
    model = canonical_model(request, progress)
    return sensitivity_of(
        model,
        load_samples(Path(calibration), model.inputs),
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
    artifact: AnyPath,
    *,
    device: str = "local",
    lab: AnyPath | None = None,
    evaluation: AnyPath | None = None,
    metric: str = "top1",
    output_name: str = "",
    visits: int = 5,
    profile: bool = False,
    seed: int = 0,
    wait_s: float = 0.0,
    results: AnyPath = Path("bench_results"),
    progress: Progress = silent,
) -> tuple[Run, Path]:
    """Measure one artifact and store the run; return it and its file.

    Args:
        profile: time single operators too, in a pass of their own, where the runtime can.
        wait_s: how long to queue for a device that somebody else holds.
        artifact: a folder that `compile` wrote, as text or Path, like `lab`, `evaluation` and `results`.
    """
    built = load_artifact(Path(artifact))
    request = MeasureRequest(
        sides=((built.artifact.name, built),),
        device_name=device,
        device=device_of(load_lab(lab_path(optional_path(lab))), device),
        limits=_limits(built.artifact.recipe.target),
        evaluation=Evaluation(path=Path(evaluation), metric=metric, output=output_name) if evaluation else None,
        blocks=visits,
        is_profiled=profile,
        seed=seed,
        wait_s=wait_s,
        sentinels=_sentinels(built, progress=progress),
    )
    (stored,) = measure_and_store(request, lambda runs: False, Results(Path(results)), progress)
    return stored.run, Path(stored.file)


def compare_precisions(
    source: AnyPath,
    *,
    weights: AnyPath | None = None,
    inputs: Sequence[str | TensorSpec] = (),
    target: str = "host",
    backends: Sequence[str] = ("onnxruntime",),
    calibration: AnyPath | None = None,
    options: Mapping[str, OptionValue] | None = None,
    quantization: Sequence[str] | QuantizationPolicy = (),
    allow_loss: bool = False,
    name: str | None = None,
    trust_pickle: bool = False,
    device: str = "local",
    lab: AnyPath | None = None,
    evaluation: AnyPath | None = None,
    metric: str = "top1",
    output_name: str = "",
    margin: str = "",
    max_blocks: int = 16,
    seed: int = 0,
    wait_s: float = 0.0,
    results: AnyPath = Path("bench_results"),
    progress: Progress = silent,
) -> Comparison:
    """Build a model in every precision that a target and its back ends allow, and measure each beside fp32.

    Every precision is measured interleaved with the fp32 of its own back end; the best of each back end then play off
    against each other, likewise interleaved. What cannot be built or measured is a row that says why.

    Args:
        source: a model reference, as for `compile`; with weights, inputs and quantization likewise.
        lab, evaluation, results: as text or Path.
        backends: names, or "all": each that the target has rules for.
        calibration: what int8 is calibrated on; without it, only a model that brings its own scales becomes int8.
        margin: how much accuracy may be lost and still count as kept; "": "accuracy=-1pt", or "accuracy=+5%" for mae.
        max_blocks: A/B pairs at most for each comparison.
        wait_s: how long to queue for a device that somebody else holds, each time that it is needed.

    Raises:
        UsageError: a name or a file is wrong, or `source` is an artifact.
        EdgedeployError: nothing at all could be measured.
    """
    source = str(source)
    if _is_artifact(source):
        raise UsageError(
            f"{source} is an artifact, which has one precision; give the model that it was made from, and every "
            f"precision of it is built and measured"
        )
    resolved = this_target(target)
    states = backends_of(resolved, backends)
    request = BuildRequest(
        name=name or model_name(source),
        source=source,
        base=Path.cwd(),
        weights=optional_path(weights),
        inputs=parse_inputs(inputs),
        target=target,
        backend="",
        precision="fp32",
        calibration=optional_path(calibration),
        options=options or {},
        policy=_policy(quantization),
        allow_loss=allow_loss,
        trust_pickle=trust_pickle,
    )
    accuracy = _accuracy_margin(margin, metric) if evaluation else ""
    limits = margins_from_texts(("latency_p50=+0%", *([f"accuracy={accuracy}"] if accuracy else [])))
    comparing = Comparing(
        request,
        resolved,
        Policy(margins=limits, max_blocks=max_blocks, min_blocks=min(4, max_blocks)),
        MeasureRequest(
            sides=(),
            device_name=device,
            device=device_of(load_lab(lab_path(optional_path(lab))), device),
            limits=resolved.conditions,
            evaluation=Evaluation(path=Path(evaluation), metric=metric, output=output_name) if evaluation else None,
            blocks=max_blocks,
            seed=seed,
            wait_s=wait_s,
        ),
        Results(Path(results)),
        progress,
    )
    for backend, state in states.items():
        if isinstance(state, str) and ALL not in backends:
            raise BackendMissing(state)
        comparing.build(backend, state)
    comparing.measure()
    return comparing.result(accuracy)


def gate(
    candidate: AnyPath,
    *,
    baseline: AnyPath | None = None,
    margins: Sequence[str] = (),
    max_blocks: int = 16,
    allow_stored_pass: bool = False,
    device: str = "local",
    lab: AnyPath | None = None,
    evaluation: AnyPath | None = None,
    metric: str = "top1",
    output_name: str = "",
    seed: int = 0,
    wait_s: float = 0.0,
    is_explained: bool = True,
    results: AnyPath = Path("bench_results"),
    progress: Progress = silent,
) -> Outcome:
    """Judge a candidate against a baseline: two artifact folders are measured, two stored runs are judged as they are.

    An artifact folder against a stored run: the run's artifact is measured again, interleaved with the candidate, if
    the cache still has it; otherwise the candidate alone, and the verdict says so.

    Args:
        candidate: an artifact folder, or a stored run, as text or Path.
        baseline: likewise; None: the blessed run of the candidate's target and model.
        lab, evaluation, results: as text or Path.
        margins: "metric=amount"; empty: accuracy=-1pt, latency_p50=+5%, peak_memory=+10%, artifact_size=+10%.
        allow_stored_pass: a latency may pass against one of another session, by the device's known noise.
        wait_s: how long to queue for a device that somebody else holds.
        is_explained: look for the reason at once where a latency or the accuracy of two artifacts failed.
    """
    candidate, baseline = str(candidate), None if baseline is None else str(baseline)
    policy = Policy(
        margins=margins_from_texts(margins or DEFAULT_MARGINS),
        max_blocks=max_blocks,
        min_blocks=min(4, max_blocks),
        allow_stored_pass=allow_stored_pass,
    )
    store = Results(Path(results))
    artifacts: dict[str, Artifact] = {}
    request: MeasureRequest | None = None
    notes: tuple[str, ...] = ()
    if _is_artifact(candidate):
        sides: tuple[tuple[str, Built], ...] = (_side(candidate),)
        before = _baseline_side(store, sides[0][1], baseline)
        if isinstance(before, StoredRun):
            notes = (_why_not_again(before.run),)
        else:
            old, notes = before
            sides = (old, *sides)
            if old[0] == sides[1][0]:
                sides = ((f"{old[0]} (baseline)", old[1]), (f"{old[0]} (candidate)", sides[1][1]))
        for note in notes:
            progress(note)
        artifacts = {name: one.artifact for name, one in sides}
        request = MeasureRequest(
            sides=sides,
            device_name=device,
            device=device_of(load_lab(lab_path(optional_path(lab))), device),
            limits=_limits(sides[-1][1].artifact.recipe.target),
            evaluation=Evaluation(path=Path(evaluation), metric=metric, output=output_name) if evaluation else None,
            blocks=max_blocks,
            seed=seed,
            wait_s=wait_s,
            sentinels=_sentinels(*(one for _, one in sides), progress=progress),
            least_samples=samples_for(policy.margins),
        )
        if isinstance(before, StoredRun):
            (measured,) = measure_and_store(request, lambda runs: False, store, progress)
            pair, request = (before, measured), None
        else:
            pair = _measured_pair(request, policy, 1, store, progress)
    else:
        pair = _stored_pair(store, candidate, baseline)
    name = f"{pair[1].run.cell} against {pair[0].run.cell}"
    outcome = judge_pairs(name, [pair], policy, artifacts, notes, _noises(store, [pair]))
    outcome = _with_self_knowledge(outcome, store)
    options = {"baseline": baseline, "margin": margins, "max-blocks": _unusual(max_blocks, 16), "seed": seed}
    places = {"device": _unusual(device, "local"), "lab": lab, "results": _unusual(results, "bench_results")}
    judged = {"evaluation": evaluation, "metric": _unusual(metric, "top1"), "output-name": output_name}
    places["allow-stored-pass"] = allow_stored_pass
    outcome = _made_by(outcome, command_line("gate", [candidate], {**options, **places, **judged}))
    if request is None or not is_explained:
        return outcome
    session = request
    verdict = explained(
        outcome.verdict, lambda cell, metrics: _to_explain(session, outcome, cell, metrics), store, progress
    )
    return dataclasses.replace(outcome, verdict=verdict)


def explain(
    baseline: AnyPath,
    candidate: AnyPath = "",
    *,
    device: str = "",
    lab: AnyPath | None = None,
    evaluation: AnyPath | None = None,
    metric: str = "top1",
    output_name: str = "",
    passes: int = PASSES,
    cap_s: float = CAP_S,
    seed: int = 0,
    wait_s: float = 0.0,
    results: AnyPath = Path("bench_results"),
    progress: Progress = silent,
) -> tuple[Explanation, Path]:
    """Say why a candidate is slower or less accurate than a baseline; return that and the file that keeps it.

    Args:
        baseline, candidate: artifact folders or stored runs; or a verdict's file and one of its cells ("" for the first
            that failed), whose artifacts are then taken from the cache.
        device: "": where it was measured, or `local` for artifact folders.
        evaluation: without it, accuracy is explained only where both runs have answers.
        passes: pairs of passes in which layers are timed, at most.
        cap_s: no pair of passes is begun after so long.

    Raises:
        UsageError: a name is wrong, or an artifact is no longer in the cache.
        DeviceError: the device cannot be reached, or failed.
    """
    baseline, candidate, store = str(baseline), str(candidate), Results(Path(results))
    if _is_verdict(baseline):
        baseline, candidate = _runs_of_verdict(Path(baseline), candidate, store)
    elif not candidate:
        raise UsageError(f"{baseline} is one side; name the candidate too: edgedeploy explain {baseline} B")
    found = [_artifact_or_run(reference, store) for reference in (baseline, candidate)]
    runs = [run for _, _, run in found if run is not None]
    names = [name for name, _, _ in found]
    if names[0] == names[1]:
        names = [f"{names[0]} (baseline)", f"{names[1]} (candidate)"]
    place = device or (runs[-1].device if runs else LOCAL)
    answers = [run.outputs for run in runs if run.outputs is not None]
    explanation = find_reasons(
        ExplainRequest(
            sides=((names[0], found[0][1]), (names[1], found[1][1])),
            device_name=place,
            device=device_of(load_lab(lab_path(optional_path(lab))), place),
            limits=_limits(found[1][1].artifact.recipe.target),
            evaluation=Evaluation(path=Path(evaluation), metric=metric, output=output_name) if evaluation else None,
            outputs=(answers[0], answers[1]) if len(answers) == 2 and not evaluation else None,
            passes=passes,
            cap_s=cap_s,
            seed=seed,
            wait_s=wait_s,
        ),
        progress,
    )
    return explanation, store.save_explanation(explanation)


def inspect(
    model: AnyPath,
    *,
    weights: AnyPath | None = None,
    inputs: Sequence[str] = (),
    reference: AnyPath | None = None,
    trust_pickle: bool = False,
    progress: Progress = silent,
) -> Model | Artifact:
    """Return what a model is: its Artifact for a folder that `compile` wrote, else its Model after export.

    Args:
        weights: a file, as text or Path.
        reference: the same network before channels were removed, in any form that `model` may have.
    """
    from edgedeploy.prepare.count.compression import compression_report
    from edgedeploy.prepare.count.statements import statements

    model, reference = str(model), None if reference is None else str(reference)

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
    found = canonical(model, optional_path(weights))
    dense = _dense(reference, canonical) if reference else None
    report = compression_report(Path(found.path), table=found.quantization, reference=dense)
    made = statements(found.kinds, report, None)
    return msgspec.structs.replace(found, compression=msgspec.structs.replace(report, statements=made))


def _dense(reference: str, canonical: Callable[[str, Path | None], Model]) -> Path:
    """Return the ONNX of a dense reference."""
    if _is_artifact(reference):
        return load_artifact(Path(reference)).file
    return Path(canonical(reference, None).path)


def init(path: AnyPath, *, force: bool = False) -> Path:
    """Write a commented release file to a path or into a folder, given as text or Path; return where it is."""
    path = Path(path)
    if path.is_dir():
        path = path / "edgedeploy.toml"
    if path.exists() and not force:
        raise UsageError(f"{path} exists; give another path, or --force to replace it")
    write_atomic(path, (Path(__file__).parent / "release_template.toml").read_bytes())
    return path


# ---------------------------------------------------------------- what the verbs share


@dataclass(frozen=True, slots=True)
class _Chosen:
    """What a run of a release file judges.

    Attributes:
        pairs: (candidate, baseline).
        notes: cell that is not in the file → what a reader should know about it.
        absent: what would be judged too if its runtime were installed or could do it.
        other_runtimes: back ends of the candidates' targets that no cell is for.
    """

    pairs: list[tuple[CellEntry, CellEntry]]
    notes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    absent: tuple[Contender, ...] = ()
    other_runtimes: tuple[str, ...] = ()


def _chosen_cells(
    path: Path, release: Release, names: Sequence[str], targets: Sequence[str], backends: Sequence[str]
) -> _Chosen:
    """Return the cells that were asked for, on every runtime that was asked for."""
    pairs = _judged_cells(path, release, names)
    resolved = {cell.target: this_target(cell.target) for cell, _ in pairs}
    if ALL in targets:
        backends = (ALL,)
    elif targets:
        pairs = _of_targets(path, pairs, resolved, targets)
    if not backends:
        used = {cell.backend for cell in release.cells}
        others = dict.fromkeys(name for cell, _ in pairs for name in resolved[cell.target].backends if name not in used)
        return _Chosen(pairs, other_runtimes=tuple(others))
    expanded: list[tuple[CellEntry, CellEntry]] = []
    notes: dict[str, tuple[str, ...]] = {}
    absent: list[Contender] = []
    for candidate, baseline in pairs:
        made, missing = on_other_runtimes(candidate, resolved[candidate.target], release.cells, backends)
        expanded += [(candidate, baseline), *((one, baseline) for one in made)]
        for one in made:
            lost = ", ".join(f"{key}={value}" for key, value in dropped_options(candidate, one).items())
            notes[one.name] = (f"without {candidate.backend}'s options {lost}",) if lost else ()
        absent += [msgspec.structs.replace(one, baseline_cell=baseline.name) for one in missing]
    return _Chosen(expanded, notes, tuple(absent))


def _of_targets(
    path: Path,
    pairs: Sequence[tuple[CellEntry, CellEntry]],
    resolved: Mapping[str, Target],
    wanted: Sequence[str],
) -> list[tuple[CellEntry, CellEntry]]:
    """Return the pairs whose target is wanted, by the name in the file or by what that is on this machine."""
    names = {name: {name, target.name} for name, target in resolved.items()}
    known = dict.fromkeys(alias for aliases in names.values() for alias in sorted(aliases))
    for name in wanted:
        if name not in known:
            raise UsageError(
                f"{path} has no candidate cell for target {name!r}{closest(name, known)} (it has: {', '.join(known)})"
            )
    return [(cell, baseline) for cell, baseline in pairs if names[cell.target].intersection(wanted)]


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


def _unjudged(candidate: CellEntry, baseline: CellEntry, ended: Ended) -> CellVerdict:
    what = "could not be built or measured" if ended.state == "failed" else "has not been measured yet"
    return CellVerdict(
        cell=candidate.name,
        baseline_cell=baseline.name,
        device=ended.device or candidate.device,
        target=candidate.target,
        decision="INCONCLUSIVE",
        findings=(),
        notes=(f"{what}: {ended.reason}",),
    )


def _unmeasured(
    candidate: CellEntry, baseline: CellEntry, error: Exception, decision: Literal["INCONCLUSIVE"] | None
) -> Contender:
    """Return the row of a cell without figures; without a decision, it was not asked for by name."""
    return Contender(
        cell=candidate.name,
        backend=candidate.backend,
        precision=candidate.precision,
        target=this_target(candidate.target).name,
        device=candidate.device,
        model=candidate.model,
        baseline_cell=baseline.name,
        decision=decision,
        absent=str(error),
    )


def _side_by_side(outcome: Outcome, absent: Sequence[Contender], notes: Mapping[str, Sequence[str]]) -> Outcome:
    """Add to a verdict the rows of what was not measured, and what is to be known about cells that we made."""
    from edgedeploy.judge.contenders import in_place

    verdict = outcome.verdict
    cells = tuple(
        msgspec.structs.replace(cell, notes=(*notes.get(cell.cell, ()), *cell.notes)) for cell in verdict.cells
    )
    rows = in_place(verdict.contenders, absent)
    return dataclasses.replace(outcome, verdict=msgspec.structs.replace(verdict, cells=cells, contenders=rows))


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


def _in_cache(key: str, name: str) -> Built:
    """Return an artifact that was built here before.

    Raises:
        UsageError: it is no longer in the cache.
    """
    folder = cache_dir() / "artifacts" / key
    if not (folder / "manifest.json").is_file():
        raise UsageError(
            f"the artifact of {name} is no longer in the cache; build it again (edgedeploy run, or edgedeploy compile) "
            f"and name its folder"
        )
    return load_artifact(folder)


def _artifact_or_run(reference: str, store: Results) -> tuple[str, Built, Run | None]:
    """Return the name and artifact of a folder, or those of a stored run with the run."""
    if _is_artifact(reference):
        return (*_side(reference), None)
    run = load_run(store.find_run(reference))
    return run.cell, _in_cache(run.artifact.key, run.cell), run


def _is_verdict(reference: str) -> bool:
    """Say whether a file is a verdict: its format is its first key."""
    path = Path(reference)
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return b'"edgedeploy.verdict/' in stream.read(100)


def _runs_of_verdict(path: Path, name: str, store: Results) -> tuple[str, str]:
    """Return the files of both runs of a verdict's cell; "" names the first that failed, or the only one."""
    verdict = read_json(path, Verdict, VERDICT_FORMAT)
    cells = {cell.cell: cell for cell in verdict.cells}
    failed = [cell.cell for cell in verdict.cells if cell.decision == "FAIL"]
    if not name and not failed and len(cells) != 1:
        raise UsageError(f"no cell of {path} failed; name one of them: {', '.join(cells) or 'it has none'}")
    chosen = name or (failed or list(cells))[0]
    if chosen not in cells:
        raise UsageError(f"{path} has no cell {chosen!r}{closest(chosen, cells)} (it has: {', '.join(cells)})")
    cell = cells[chosen]
    if not cell.baseline_run or not cell.candidate_run:
        raise UsageError(f"cell {chosen!r} of {path} was not measured, so there is nothing to explain")
    files = [one if Path(one).is_file() else Path(one).stem for one in (cell.baseline_run, cell.candidate_run)]
    return str(store.find_run(files[0])), str(store.find_run(files[1]))


def _to_explain(
    session: MeasureRequest, outcome: Outcome, cell: CellVerdict, metrics: tuple[str, ...]
) -> ExplainRequest:
    """Return what is asked about a cell that failed, on the device that it was measured on."""
    first, second = session.sides
    runs = [outcome.runs[file] for file in (cell.baseline_run, cell.candidate_run)]
    answers = [run.outputs for run in runs if run.outputs is not None]
    return ExplainRequest(
        sides=(first, second),
        device_name=session.device_name,
        device=session.device,
        limits=session.limits,
        evaluation=session.evaluation,
        outputs=(answers[0], answers[1]) if len(answers) == 2 else None,
        metrics=metrics,
        seed=session.seed,
        wait_s=session.wait_s,
    )


def _measured_pair(request: MeasureRequest, policy: Policy, cells: int, store: Results, progress: Progress) -> Pair:
    """Measure baseline and candidate interleaved until the gate of so many cells is decided, and store both runs."""
    from edgedeploy.judge.gate import is_decided

    def decided(runs: tuple[Run, ...]) -> bool:
        return is_decided(runs[0], runs[1], policy, cells=cells)

    baseline, candidate = measure_and_store(request, decided, store, progress)
    return baseline, candidate


def _blessed(store: Results, target: str, model: str) -> Path:
    """Return the file of the blessed run of a target and model."""
    pointer = store.baseline(target, model)
    if pointer is None:
        raise UsageError(
            f"no baseline is set for target {target!r} and model {model!r}; give --baseline, or: "
            f"edgedeploy baseline set RUN --why ..."
        )
    return store.baseline_run(pointer)


def _baseline_side(
    store: Results, candidate: Built, baseline: str | None
) -> tuple[tuple[str, Built], tuple[str, ...]] | StoredRun:
    """Return what a candidate is measured beside, with what to say of it; or a run whose artifact is gone."""
    if baseline is not None and _is_artifact(baseline):
        return _side(baseline), ()
    recipe = candidate.artifact.recipe
    file = _blessed(store, recipe.target, recipe.model) if baseline is None else store.find_run(baseline)
    run = load_run(file)
    kept = artifact_in_cache(run.artifact.key, run.artifact.sha256)
    if kept is None:
        return StoredRun(str(file), run)
    note = (
        f"the baseline {run.cell} of {run.started_utc} is measured again, interleaved with the candidate: the cache "
        f"still has its artifact ({run.artifact.sha256[:8]}), and stored numbers do not cancel drift"
    )
    return (run.cell, kept), (note,)


def _why_not_again(run: Run) -> str:
    return (
        f"the baseline {run.cell} of {run.started_utc} was not measured again: its artifact "
        f"({run.artifact.sha256[:8]}) is no longer in the cache, so that its stored numbers are all there is"
    )


def _noises(store: Results, pairs: Sequence[Pair]) -> dict[str, float]:
    """Return the run-to-run CV of the devices on which pairs were measured in different sessions, where known."""
    noises: dict[str, float] = {}
    for old, new in pairs:
        if old.run.session != new.run.session and (newest := store.newest_passport(new.run.device)) is not None:
            passport, _ = newest
            if passport.cpu_model == new.run.facts.cpu_model:  # else it describes another board of this name
                noises[new.run.device] = passport.run_to_run_cv
    return noises


def _stored_pair(store: Results, candidate: str, baseline: str | None) -> Pair:
    candidate_file = store.find_run(candidate)
    candidate_run = load_run(candidate_file)
    if baseline is None:
        baseline_file = _blessed(store, candidate_run.artifact.target, candidate_run.artifact.model)
    elif _is_artifact(baseline):
        raise UsageError(f"{candidate} is a stored run, so its baseline must be one too; {baseline} is an artifact")
    else:
        baseline_file = store.find_run(baseline)
    return StoredRun(str(baseline_file), load_run(baseline_file)), StoredRun(str(candidate_file), candidate_run)


def _made_by(outcome: Outcome, command: str) -> Outcome:
    """Write into a verdict the command line that makes it again."""
    return dataclasses.replace(outcome, verdict=msgspec.structs.replace(outcome.verdict, command=command))


def _unusual(value: object, usual: object) -> object:
    """Return what a command line must say: nothing where it is as usual."""
    return "" if str(value) == str(usual) else value


def _with_self_knowledge(outcome: Outcome, store: Results) -> Outcome:
    """Add to a verdict what is known of its devices, and of the gate itself."""
    return dataclasses.replace(outcome, verdict=passports.with_self_knowledge(outcome.verdict, outcome.runs, store))


def _sentinels(*sides: Built, progress: Progress) -> dict[str, Built]:
    """Return the sentinels of the back ends of some artifacts, compiled for the last one's target."""
    backends = dict.fromkeys(built.artifact.recipe.backend for built in sides)
    return passports.sentinels(sides[-1].artifact.recipe.target, backends, progress)


def _accuracy_margin(given: str, metric: str) -> str:
    """Return how much accuracy may be lost, from "accuracy=-1pt"; "": the usual one of the metric."""
    if not given:
        return "+5%" if metric == "mae" else "-1pt"
    name, equals, amount = given.partition("=")
    if name != "accuracy" or not equals:
        raise UsageError(
            f"--margin {given}: what decides here is accuracy, such as accuracy=-1pt; latency is compared, not judged"
        )
    return amount
